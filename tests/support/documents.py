"""The code blocks of the Markdown files that people read."""

import re
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

# The first line of a block of Python that a test cannot run; why stands behind it.
NOT_RUN = "# not run: "
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# Documents whose blocks of Python need what their own test has, and that test; test_code_blocks.py runs all others.
OWN_TESTS = {
    "CONTRIBUTING.md": "tests/repository/test_contributing.py",
    "docs/drafts.md": "tests/model/test_drafts.py",
    "docs/integrations.md": "tests/integrations/test_page.py",
    "docs/scaling.md": "tests/parallel/test_divided_model.py",
    "docs/transformers.md": "tests/hf/test_hf_document.py",
}


class Block(NamedTuple):
    """A fenced code block.

    Attributes:
        language: the word behind the fence, "" if there is none.
        before: the document in front of it.
        line: of the document, that the code begins at.
        code: what stands in it.
    """

    language: str
    before: str
    line: int
    code: str


def blocks(document: str, language: str | None = None) -> list[Block]:
    """Those of a file, by its path from the root, in one language or in all."""
    text = (ROOT / document).read_text()
    found = []
    for match in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before = text[: match.start(2)]
        found.append(Block(match[1], text[: match.start()], before.count("\n") + 1, match[2]))
    return [block for block in found if language in (None, block.language)]


def block_after(document: str, words: str) -> Block:
    """The first code block behind these words."""
    return next(block for block in blocks(document) if words in block.before)


def run_python(document: str, found: list[Block], names: dict[str, object], flags: int = 0) -> None:
    """Runs blocks one after the other in one namespace; those marked NOT_RUN are compiled only.

    `flags` are those of the compiler, of a future that the file has which a block belongs in.
    """
    for block in found:
        # So that a failure names the line of the document.
        code = compile(
            "\n" * (block.line - 1) + block.code, str(Path(ROOT, document)), "exec", flags, dont_inherit=True
        )
        if not block.code.startswith(NOT_RUN):
            exec(code, names)
