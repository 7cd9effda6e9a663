"""The arrows between folders: csrc/hopper <- csrc/<family> <- bindings <- jetkernels/ops <- modules <- model <- postnas
<- cli; and the rooms of the kernels, csrc/<family>/<kernel>.
"""

import ast
import re
from pathlib import Path

import pytest
from support.paths import ROOT

# A folder may import itself, the folders listed for it, and what is outside the project.
PYTHON_ARROWS = {
    "reference": set(),
    "jetkernels/plain": set(),
    "jetkernels/ops": {"jetkernels/plain", "jetkernels"},
    "jetkernels/modules": {"jetkernels/ops"},
    "jetkernels/model": {"jetkernels/ops", "jetkernels/modules"},
    "jetkernels/hf": {"jetkernels", "jetkernels/modules", "jetkernels/model"},
    "jetkernels/integrations": {"jetkernels", "jetkernels/ops"},
    "jetkernels/parallel": {"jetkernels/modules", "jetkernels/model"},
    "jetkernels/serving": {
        *("jetkernels/ops", "jetkernels/modules", "jetkernels/model", "jetkernels/parallel", "jetkernels/hf"),
    },
    "jetkernels/postnas": {"jetkernels", "jetkernels/ops", "jetkernels/modules", "jetkernels/model"},
    "jetkernels/cli": {
        *("jetkernels", "jetkernels/ops", "jetkernels/modules", "jetkernels/model", "jetkernels/parallel"),
        "jetkernels/postnas",
    },
    "jetkernels": {"jetkernels/ops", "jetkernels/cli"},
}
MACHINE = {"csrc/common", "csrc/cpu", "csrc/hopper"}
FAMILY_ARROWS = {
    "csrc/attention": MACHINE,
    "csrc/dynamic_conv": MACHINE,
    "csrc/gated_delta_rule": MACHINE,
    "csrc/linear": MACHINE,
    "csrc/norm": MACHINE,
    "csrc/pointwise": MACHINE,
    "csrc/jet_block_step": MACHINE | {"csrc/dynamic_conv", "csrc/gated_delta_rule", "csrc/norm", "csrc/pointwise"},
}
FAMILIES = tuple(FAMILY_ARROWS)
C_ARROWS = {
    "csrc/common": set(),
    "csrc/cpu": {"csrc/common"},
    "csrc/hopper": {"csrc/common"},
    **FAMILY_ARROWS,
    "bindings": MACHINE | set(FAMILIES),
}

OPS = {path.stem for path in (ROOT / "jetkernels" / "ops").glob("[a-z]*.py")}


def folder_of(path: str, folders: dict[str, set[str]]) -> str | None:
    """The longest known folder that holds ``path``."""
    return max((f for f in folders if path == f or path.startswith(f + "/")), key=len, default=None)


def imported_names(source: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, relative imports resolved."""
    names = set()
    package = source.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def is_module(path: str) -> bool:
    return (ROOT / path).is_dir() or (ROOT / f"{path}.py").exists()


@pytest.mark.parametrize("folder", PYTHON_ARROWS)
def test_python_arrows(folder):
    sources = [
        p for p in (ROOT / folder).rglob("*.py") if folder_of(str(p.parent.relative_to(ROOT)), PYTHON_ARROWS) == folder
    ]
    assert sources, f"{folder} has no Python files"
    for source in sources:
        for name in imported_names(source):
            target = name.replace(".", "/")
            if not is_module(target):
                continue
            home = folder_of(target if (ROOT / target).is_dir() else str(Path(target).parent), PYTHON_ARROWS)
            if home is None or (home == "jetkernels" and folder == "jetkernels/model"):
                continue
            assert home in PYTHON_ARROWS[folder] | {folder}, f"{source.relative_to(ROOT)} imports {name}"


def includes(source: Path) -> list[str]:
    return re.findall(r'^#include\s+[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE)


def sources_of(folder: str) -> list[Path]:
    found = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert found, f"{folder} has no C++ files"
    return found


@pytest.mark.parametrize("folder", C_ARROWS)
def test_c_arrows(folder):
    for source in sources_of(folder):
        for name in includes(source):
            home = folder_of(str(Path(name).parent), C_ARROWS)
            assert home is None or home in C_ARROWS[folder] | {folder}, f"{source.relative_to(ROOT)} includes {name}"


@pytest.mark.parametrize("folder", [f for f in C_ARROWS if f.startswith("csrc")])
def test_kernels_do_not_know_torch(folder):
    for source in sources_of(folder):
        assert not [name for name in includes(source) if name.startswith(("torch/", "ATen/", "c10/"))], source


def room_of(path: str) -> str | None:
    """csrc/<family>/<kernel>, of a file in it or in a folder of it."""
    return next((str(folder) for folder in Path(path).parents if str(folder.parent) in FAMILIES), None)


@pytest.mark.parametrize("folder", C_ARROWS)
def test_what_is_in_a_room_is_private(folder):
    """But for the headers of its ops, and the one that says which calls its kernels take."""
    for source in sources_of(folder):
        home = room_of(str(source.relative_to(ROOT)))
        for name in includes(source):
            if room_of(name) not in (None, home):
                assert Path(name).stem in OPS | {"kernel_takes"}, f"{source.relative_to(ROOT)} includes {name}"


def test_a_file_name_says_which_file():
    """Two files have one name only in the folders of different kernels, which say whose they are."""
    places: dict[str, list[str]] = {}
    for folder in C_ARROWS:
        for source in sources_of(folder):
            places.setdefault(source.name, []).append(folder_of(str(source.relative_to(ROOT)), C_ARROWS))
    twice = {name: folders for name, folders in places.items() if len(folders) > 1}
    assert not {name: folders for name, folders in twice.items() if not set(folders) <= set(FAMILIES)}


def test_bindings_do_not_know_python():
    """One library serves every Python."""
    for source in (ROOT / "bindings").glob("*"):
        assert not [name for name in includes(source) if name.startswith(("pybind11/", "Python.h"))], source


def test_reference_and_plain_import_torch_only():
    for folder in ("reference", "jetkernels/plain"):
        for source in (ROOT / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in imported_names(source)}
            own = folder.split("/")[0]
            assert roots <= {"torch", own, "math", "collections", "typing", "dataclasses", "__future__", "functools"}, (
                source,
                roots,
            )


def test_test_files_have_names_of_their_own():
    """pytest imports a test file by its name alone and refuses a second one of that name, in whatever folder."""
    names = [path.name for folder in ("tests", "hoppersim/tests") for path in (ROOT / folder).rglob("test_*.py")]
    assert len(names) > 50
    assert {name for name in names if names.count(name) > 1} == set()
