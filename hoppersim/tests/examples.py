"""The programs of examples/, and what the documents show of their reports. Run as a program it writes them,
and the table of kinds:
PYTHONPATH=hoppersim python hoppersim/tests/examples.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import hoppersim

PROJECT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((PROJECT / "examples").glob("*.cu"))}
DOCUMENT, README = PROJECT / "docs" / "examples.md", PROJECT / "README.md"
HAZARDS = PROJECT / "docs" / "hazards.md"
FIRST = "missing_proxy_fence"
_README_CODE, _README_REPORT = re.compile(r"(```cuda\n)(.*?)(```)", re.S), re.compile(r"(```text\n)(.*?)(```)", re.S)


def _section(name: str) -> re.Pattern:
    return re.compile(rf"(^## {name}\.cu\n.*?```text\n)(.*?)(```)", re.S | re.M)


def commands() -> list[list[str]]:
    """As the README has them: nvcc, hoppersim."""
    lines = [line for line in README.read_text().splitlines() if line.startswith(("nvcc ", "hoppersim run ./"))]
    return [line.split() for line in lines]


def build(name: str, folder: Path, *flags: str) -> Path:
    command = [word.replace(FIRST, name) for word in commands()[0]]
    command[0], command[command.index(f"{name}.cu")] = hoppersim.nvcc(), str(EXAMPLES[name])
    subprocess.run([*command, *flags], cwd=folder, check=True, capture_output=True)
    return folder / name


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT)}


def report(program: Path) -> subprocess.CompletedProcess:
    """Of `hoppersim run ./program`, as seen from the folder of the sources."""
    command = [sys.executable, "-m", "hoppersim", "run", f"./{program.name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=program.parent, env=environment())
    done.stdout = done.stdout.replace(f"{PROJECT / 'examples'}{os.sep}", "")
    return done


def without_table(text: str) -> str:
    """A report without the table of launches and the output of the program."""
    text = text[text.index("==== hoppersim") :]
    paragraphs = text.rstrip().split("\n\n")
    kept = [paragraph for paragraph in paragraphs if not re.search(r"^launches +grid", paragraph, re.M)]
    if kept[0].startswith("==== ") or len(kept) == len(paragraphs):
        return "\n\n".join(kept) + "\n"
    return "\n\n".join([text.splitlines()[0], *kept]) + "\n"


def documented(name: str) -> str:
    """The report that examples.md shows."""
    return _section(name).search(DOCUMENT.read_text())[2]


def in_readme() -> tuple[str, str]:
    """Source and report of the README's first example."""
    text = README.read_text()
    return _README_CODE.search(text)[2], _README_REPORT.search(text)[2]


def _write(folder: Path) -> None:
    text, readme = DOCUMENT.read_text(), README.read_text()
    for name in EXAMPLES:
        told = report(build(name, folder)).stdout
        text = _section(name).sub(lambda match, told=told: match[1] + without_table(told) + match[3], text)
        if name == FIRST:
            readme = _README_REPORT.sub(lambda match, told=told: match[1] + told + match[3], readme)
    source = EXAMPLES[FIRST].read_text()
    readme = _README_CODE.sub(lambda match: match[1] + source + match[3], readme)
    rows = [
        f"| `{name}` | {k.severity}{', goes on' * k.goes_on} | {k.meaning} |\n" for name, k in hoppersim.KINDS.items()
    ]
    hazards = re.sub(r"(\|---\|---\|---\|\n)(?:\|.*\n)*", lambda match: match[1] + "".join(rows), HAZARDS.read_text())
    HAZARDS.write_text(hazards)
    DOCUMENT.write_text(text)
    README.write_text(readme)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        _write(Path(name))
