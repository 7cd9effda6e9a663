"""What the Markdown files name exists: links, and paths in backticks."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.paths import ROOT


def listed() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\n") if name and (ROOT / name).exists()]


FILES = listed()
FOLDERS = {str(parent) for name in FILES for parent in Path(name).parents}
DOCUMENTS = [name for name in FILES if name.endswith(".md") and "results/" not in name and name != "CHANGELOG.md"]
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".cmake")
TOP = {name.split("/")[0] for name in FILES if "/" in name}
# Made by a build, written by a run, CUTLASS's headers, the op that CONTRIBUTING.md adds as an example.
ELSEWHERE = re.compile(
    r"^build/|\.so$|^summary\.md$|^(cutlass|cute)/|^(reg_reconfig|grid_dependency_control)\.h$|leaky_sum|^\.\.\./"
)


def is_here(path: str) -> bool:
    """A path from the root, with patterns, or the end of one."""
    known = FOLDERS if path.endswith("/") else FOLDERS | {*FILES}
    path = path.rstrip("/")
    return any(fnmatch(f"/{name}", f"*/{path}") for name in known)


def paths_in(text: str) -> list[str]:
    """Words in backticks that begin with a folder of the repository, or end as a source file or folder does."""
    words = [word for quoted in re.findall(r"`([^`\n]+)`", text) for word in quoted.split()]
    paths = [re.sub(r"(::.*|[,.:;]+|\[.*)$", "", word) for word in words if re.fullmatch(r"[\w./*:\[\],;-]+", word)]
    paths = [path for path in paths if path.strip("/")]
    return [path for path in paths if ("/" in path and path.split("/")[0] in TOP) or path.endswith((*SUFFIXES, "/"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    gone = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    gone += [path for path in paths_in(text) if not ELSEWHERE.search(path) and not is_here(path)]
    assert not gone
