"""The code in the documents works: blocks of Python are run, command lines have the options that they use."""

import argparse
import re
import runpy
import shlex
import sys

import pytest
import torch
from support.documents import NOT_RUN, OWN_TESTS, PAGES, Block, blocks, run_python
from support.paths import ROOT

from jetkernels.__main__ import parser_for

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)
PROGRAM = re.compile(r"^(?:\w+=\S+ +)*(?=(?:jetkernels|python3?) )")  # behind the variables that it is called with


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name not in OWN_TESTS and blocks(name, "python")])
def test_python_runs(document, tmp_path, monkeypatch):
    """The blocks of a document in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_python(document, blocks(document, "python"), {})


@pytest.mark.parametrize("document", OWN_TESTS)
def test_a_document_that_is_not_run_here_is_run_by_its_own_test(document):
    test = (ROOT / OWN_TESTS[document]).read_text()
    assert document in DOCUMENTS and blocks(document, "python")
    assert f'"{document}"' in test and "run_python(" in test


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_is_overlooked(document):
    """One of another name or place would not be run."""
    fences = [line for line in (ROOT / document).read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks(document)) and not [line for line in fences if line.startswith(" ")]
    assert {block.language for block in blocks(document)} <= {"", "python", "cpp", "{toctree}", "{eval-rst}"}


def test_a_block_that_does_not_run_is_seen():
    names: dict[str, object] = {}
    run_python("README.md", [Block("python", "", 1, "a = 1\n"), Block("python", "", 3, "b = a + 1\n")], names)
    assert names["b"] == 2
    with pytest.raises(NameError):
        run_python("README.md", [Block("python", "", 1, "missing\n")], {})
    run_python("README.md", [Block("python", "", 1, f"{NOT_RUN}needs a GPU\nmissing\n")], {})
    with pytest.raises(SyntaxError):
        run_python("README.md", [Block("python", "", 1, f"{NOT_RUN}needs a GPU\nmissing(\n")], {})


# A module that another test has imported is run as a program here.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")


class Understood(BaseException):
    """Raised by a program's parser in place of going on; no program takes it for an error of its own."""


def understand(words: list[str], monkeypatch) -> None:
    """Raises SystemExit, or fails, where a program does not take the words behind it."""
    program, *arguments = words
    if program == "jetkernels":
        parser_for(arguments).parse_args(arguments)
    elif arguments[0] == "dev.py":
        _, what, *rest = arguments
        assert f'"{what}"' in (ROOT / "dev.py").read_text(), what
        if what in ("run", "demo"):
            understand(rest if what == "run" else ["jetkernels", "demo", *rest], monkeypatch)
        assert not [word for word in rest if "/" in word and not (ROOT / word).exists()], rest
    elif arguments[:2] == ["-m", "jetkernels"]:
        understand(["jetkernels", *arguments[2:]], monkeypatch)
    else:
        assert arguments[0] == "-m", words
        parse_known_args = argparse.ArgumentParser.parse_known_args

        def parse(parser, args=None, namespace=None):
            _, unknown = parse_known_args(parser, args)
            assert not unknown, f"{words}: {unknown}"
            raise Understood

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        monkeypatch.setattr(sys, "argv", arguments[1:])
        with pytest.raises(Understood):
            runpy.run_module(arguments[1], run_name="__main__")


def command_lines(document: str) -> list[str]:
    """The calls of our programs, a line each, without the variables in front of them."""
    found = "".join(block.code for block in blocks(document) if block.language in ("", "bash", "sh"))
    lines = found.replace("\\\n", " ").splitlines()
    return [PROGRAM.sub("", line) for line in lines if PROGRAM.match(line)]


COMMAND_LINES = [(document, line) for document in DOCUMENTS for line in command_lines(document)]


@pytest.mark.parametrize("document, line", COMMAND_LINES, ids=[line for _, line in COMMAND_LINES])
def test_command_lines_are_understood(document, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    understand(shlex.split(line, comments=True), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "jetkernels generate --modle FOLDER",
        "python -m benchmarks.run --devise cpu",
        "python3 dev.py tset",
        "python3 dev.py run python -m benchmarks.model --rond 3",
        "python3 dev.py test tests/nothing",
    ],
)
def test_a_wrong_command_line_is_seen(line, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        understand(shlex.split(line), monkeypatch)
