"""What the documents say of names: options, variables, the Python API, keys, files."""

import inspect
import json
import re
import tomllib
from pathlib import Path

import examples
import numpy as np
import pytest

import hoppersim
from hoppersim import _cli, _summary

DOCUMENTS = [examples.README, *sorted((examples.PROJECT / "docs").glob("*.md"))]
README = examples.README.read_text()


def options(text: str) -> set[str]:
    return set(re.findall(r"`(--[a-z-]+)", text))


def test_options_of_the_command():
    parser = _cli._parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    assert set(commands.choices) == {"run", "kinds"} and "`hoppersim kinds`" in README
    known = {option for action in commands.choices["run"]._actions for option in action.option_strings}
    section = README[README.index("## hoppersim run") : README.index("## From Python")]
    assert options(section) == known - {"-h", "--help"}
    assert all(options(path.read_text()) <= known for path in DOCUMENTS)
    defaults = commands.choices["run"].parse_args(["program"])
    assert defaults.seeds == 4 and defaults.timing == "both"
    assert "default, 4 seeds and both timings" in " ".join(README.split())


def test_exit_statuses():
    rows = dict(re.findall(r"^\| ([012]) \| (.*) \|$", README, re.M))
    assert set(rows) == {"0", "1", "2"}
    for number, meaning in rows.items():
        assert f"  {number}  {meaning.split(',')[0]}" in _cli._STATUSES


def test_environment_variables():
    sources = [*(examples.PROJECT / "src").glob("*.cpp"), *(examples.PROJECT / "hoppersim").glob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(HOPPERSIM_[A-Z_]+)"', path.read_text())}
    assert set(re.findall(r"HOPPERSIM_[A-Z_]+", README)) == read


def test_python_names():
    for path in DOCUMENTS:
        for name in re.findall(r"hoppersim\.(\w+)\b(?!\.md|/)", re.sub(r"\S*_hoppersim\S*", "", path.read_text())):
            if name == "tensor_map":
                continue
            assert hasattr(hoppersim, name), (path.name, name)
    assert (Path(hoppersim.__file__).parent / "tensor_map.py").exists()
    shown = re.search(r"`hoppersim\.simulate\((.*?)\)`", README)[1]
    assert [name.strip("= ") for name in shown.split(",")] == list(inspect.signature(hoppersim.simulate).parameters)
    for method in re.findall(r"`Library\.(\w+)\(\)`", README):
        assert callable(getattr(hoppersim.Library, method))
    parameters = inspect.signature(hoppersim.simulate).parameters
    assert parameters["host_threads"].default == 2 and "`HOPPERSIM_HOST_THREADS` (2)" in README


def test_the_python_example(tmp_path, monkeypatch):
    """Runs as it is shown, with a source and a PTX text of the test."""
    (tmp_path / "gemm.cu").write_text(
        "__global__ void gemm(const float* a, const float* b, float* c) { c[0] = a[0] * b[0]; }\n"
        'extern "C" int run_gemm(const float* a, const float* b, float* c, long n) {\n'
        "  gemm<<<1, 1>>>(a, b, c);\n  return n == 256 ? cudaGetLastError() : -1;\n}\n"
    )
    ptx = (
        ".version 8.0\n.target sm_90a\n.address_size 64\n"
        ".visible .entry kernel(.param .u64 p, .param .u32 n, .param .f32 x)\n{\n\tret;\n}\n"
    )
    a, b, c = (np.ones(1, np.float32) * n for n in (2, 3, 0))
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {"a": a, "b": b, "c": c, "ptx_text": ptx, "grid": 2, "block": 32})
    assert c[0] == 6


def test_keys_of_launches_and_of_the_json_file(tmp_path):
    text = ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{\n\tret;\n}\n"
    with hoppersim.simulate():
        hoppersim.Module(text).launch("k", 1, 1)
        (record,) = hoppersim.launches()
    flat = " ".join(README.split())
    listed = flat[flat.index("`hoppersim.launches()` the launches") :]
    listed = set(re.findall(r"`(\w+)`", listed[: listed.index("([docs/modelled.md]")])) - {"hoppersim"}
    assert listed == set(record)
    assert set(record["counters"]) == set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^(\| `.*?) \|", _section("modelled.md", "Counters"), re.M)))
    )
    program = examples.build("uninitialised_shared", tmp_path)
    command = ["run", "--seeds", "1", "--json", str(tmp_path / "told.json"), str(program)]
    assert _cli.main(command) == 1
    told = json.loads((tmp_path / "told.json").read_text())
    listed = flat[flat.index("The JSON file holds") : flat.index("`hoppersim kinds` lists")]
    assert set(re.findall(r"`(\w+)`", listed)) == set(told) | set(told["runs"][0])


def _section(document: str, title: str) -> str:
    text = (examples.PROJECT / "docs" / document).read_text()
    return text[text.index(f"## {title}") :].split("\n## ")[0]


def test_columns_of_the_table_of_launches():
    listed = README[README.index("| Column |") : README.index("The JSON file holds")]
    names = re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in listed.splitlines() if "|" in line))
    run = _cli.Run(0, "early", 0, None)
    assert _summary.table_of_launches(run).split() == names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:examples|src|docs|tests)/[\w./*]+)`", text):
        assert list(examples.PROJECT.glob(name)), name


def test_the_package_is_described():
    project = tomllib.loads((examples.PROJECT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hoppersim": "hoppersim._cli:main"}
    assert project["requires-python"] == ">=3.11" and "Python 3.11 or newer" in README
    assert "test" in project["optional-dependencies"] and "hoppersim[test]" in README


def test_without_a_toolkit_the_error_names_the_variable(monkeypatch):
    monkeypatch.setattr("hoppersim._compile.nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc.*CUDA_HOME"):
        hoppersim.compile_cuda("__global__ void k() {}\n\n")
    configured = (examples.PROJECT / "CMakeLists.txt").read_text()
    assert "environment variable" in configured and "CUDA_HOME to the folder" in configured and "$CUDA_HOME" in README


def test_no_other_project_is_needed():
    for path in DOCUMENTS:
        assert not re.search(r"\bjet|csrc/", path.read_text()), path.name
