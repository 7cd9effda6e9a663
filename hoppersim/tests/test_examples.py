"""The examples and the README's first program: compiled and run as the documents say, with the reports they show."""

import re
import subprocess
import sys
from pathlib import Path

import examples
import pytest

import hoppersim


def finding_lines(text: str) -> list[str]:
    """What does not depend on the version of nvcc: findings, their lines and kernels, the statuses, the counts."""
    pattern = r"^(?:.*: in \d+ of \d+ runs, .*|  at     .*|  kernel .*|The program .*|No findings\.|\d+ findings?\.)$"
    return re.findall(pattern, text, re.M)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_document_shows_the_report(name, tmp_path):
    done = examples.report(examples.build(name, tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    shown = examples.documented(name)
    assert finding_lines(done.stdout) == finding_lines(shown), done.stdout
    assert shown.splitlines()[0] == done.stdout[done.stdout.index("==== hopper") :].splitlines()[0]


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_mended_example_is_not_reported(name, tmp_path):
    done = examples.report(examples.build(name, tmp_path, "-DFIXED"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No findings." in done.stdout and done.stdout.startswith("right\n")


def test_the_document_has_every_example():
    titles = re.findall(r"^## (\w+)\.cu$", examples.DOCUMENT.read_text(), re.M)
    assert sorted(titles) == sorted(examples.EXAMPLES) and len(titles) == 10


def test_the_first_example_of_the_readme(tmp_path):
    """The source as it is shown, the commands as they are shown, the report as it is shown."""
    source, shown = examples.in_readme()
    assert source == examples.EXAMPLES[examples.FIRST].read_text()
    (tmp_path / f"{examples.FIRST}.cu").write_text(source)
    compiler, run = examples.commands()
    subprocess.run([hoppersim.nvcc(), *compiler[1:]], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", *run]
    done = subprocess.run(command, cwd=tmp_path, env=examples.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert finding_lines(done.stdout) == finding_lines(shown) and "missing_proxy_fence.cu:14" in shown
    assert len(shown.splitlines()) == len(done.stdout.splitlines())


def test_what_the_readme_says_of_seeds():
    assert "Each of the examples is found in all of its 8 runs" in " ".join(examples.README.read_text().split())
    for name in examples.EXAMPLES:
        shown = examples.documented(name)
        assert re.search(r"^[a-z].*: in \d of 8 runs, first with seed 0, timing early$", shown, re.M)
        assert sum(map(int, re.findall(r"^[a-z].*: in (\d) of 8 runs", shown, re.M))) == 8  # the first of a run ends it


def test_examples_need_their_folder_only():
    for path in Path(examples.PROJECT / "examples").iterdir():
        for included in re.findall(r'#include "(.*)"', path.read_text()):
            assert (path.parent / included).exists()
