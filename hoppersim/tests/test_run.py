"""`hoppersim run`: unmodified programs, linked as their authors link them, on the simulated runtime."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hoppersim

SOURCE = Path(__file__).parent / "kernels" / "program.cu"
FLAGS = ["-arch=sm_90a", "-lineinfo"]
PACKAGE = Path(hoppersim.__file__).parent.parent


def compiled(path: Path, *flags: str) -> Path:
    subprocess.run([hoppersim.nvcc(), *FLAGS, *flags, str(SOURCE), "-o", str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """As the README says."""
    return compiled(tmp_path_factory.mktemp("run") / "program", "-cudart", "shared")


def hoppersim_command(*arguments, **variables) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **variables}
    command = [sys.executable, "-m", "hoppersim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def hoppersim_run(*arguments, **variables) -> subprocess.CompletedProcess:
    return hoppersim_command("run", *arguments, **variables)


def test_a_clean_program(program, tmp_path):
    done = hoppersim_run("--seeds", 2, "--json", tmp_path / "told.json", program, "twice")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""  # the loader has nothing to say
    assert done.stdout.count("twice: cudaSuccess") == 1  # the output of the first run
    assert "No findings." in done.stdout and "returned 0 in every run" in done.stdout
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["status"] == 0 and told["findings"] == [] and told["program"] == [str(program), "twice"]
    assert [(run["seed"], run["timing"]) for run in told["runs"]] == [(s, t) for s in (0, 1) for t in ("early", "late")]
    (row,) = told["launches"]
    assert row["kernel"] == "shift<64>(float*, int)" and row["mangled"] == "_Z5shiftILi64EEvPfi"
    assert row["launches"] == 2 and row["global_read_bytes"] == row["global_write_bytes"] == 2 * 256
    assert row["block"] == [64, 1, 1] and row["static_shared"] == 256 and row["occupancy"] == 4
    line = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["2", "1"])
    assert line.split() == ["2", "1", "64", "1", "256", ">=4", "512", "512", "0", "0", "1.00", line.split()[-1]]


@pytest.mark.parametrize("how", ["bug", "bug_then_abort"])
def test_a_finding_is_told_once_with_its_line(program, tmp_path, how):
    done = hoppersim_run("--seeds", 3, "--json", tmp_path / "told.json", program, how)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("uninitialised shared memory: in 6 of 6 runs, first with seed 0, timing early") == 1
    assert "1 finding." in done.stdout
    (finding,) = json.loads((tmp_path / "told.json").read_text())["findings"]
    assert finding["kind"] == "uninitialised shared memory" and finding["kernel"] == "shift<64>(float*, int)"
    assert finding["source"] == f"{SOURCE}:7, inlined at {SOURCE}:16"
    assert finding["instruction"].startswith("ld.shared") and f"ptx line {finding['ptx_line']}:" in finding["text"]
    assert ("SIGABRT in 6 of 6 runs" in done.stdout) == (how == "bug_then_abort")


def test_one_timing_one_seed(program):
    done = hoppersim_run("--seeds", 1, "--timing", "late", program, "bug")
    assert "in 1 of 1 runs, first with seed 0, timing late" in done.stdout and done.returncode == 1


def test_the_status_of_the_program_counts(program):
    done = hoppersim_run("--seeds", 2, program, "fails")
    assert done.returncode == 1 and "status 3 in 4 of 4 runs" in done.stdout and "No findings." in done.stdout
    done = hoppersim_run("--seeds", 2, program, "fails_late")
    assert done.returncode == 1 and "status 4 in 2 of 4 runs (first with seed 0, timing late)" in done.stdout
    assert done.stdout.count("fails_late: cudaSuccess") == 2  # also of the first run that ended otherwise


def test_a_refused_launch_is_told(program):
    done = hoppersim_run("--seeds", 1, program, "empty")
    assert "refused launch of shift<64>(float*, int): cudaErrorInvalidConfiguration" in done.stdout


def test_limit_of_instructions(program):
    done = hoppersim_run("--seeds", 1, "--timing", "early", "--max-instructions", 1000, program, "spin")
    assert done.returncode == 1 and "live-lock: in 1 of 1 runs" in done.stdout


def test_what_cannot_be_run(program, tmp_path):
    def refused(*arguments, **variables) -> str:
        done = hoppersim_run(*arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    assert "there is no program" in refused(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    assert "not an executable file" in refused(tmp_path / "text")
    assert re.search(r"registered no kernels .* ended with status 0\. .*-cudart shared", refused("true"))
    static = compiled(tmp_path / "static")  # nvcc's default
    assert "-cudart shared" in refused(static)
    assert "HOPPERSIM_HOST_THREADS must be a number" in refused(program, HOPPERSIM_HOST_THREADS="few")
    assert "--seeds" in refused("--seeds", "0", program)


@pytest.mark.parametrize("flag", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_library_path_in_the_program(tmp_path, flag):
    """CUDA's own runtime named by RUNPATH or RPATH in the program: the simulated one is taken."""
    cuda = Path(hoppersim.nvcc()).resolve().parent.parent
    folder = next((cuda / name for name in ("lib64", "lib") if list((cuda / name).glob("libcudart.so.*"))), None)
    if folder is None:
        pytest.skip("the toolkit has no shared runtime")
    program = compiled(tmp_path / "program", "-cudart", "shared", "-Xlinker", flag, "-Xlinker", f"-rpath={folder}")
    done = hoppersim_run("--seeds", 1, program)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr


def test_cuda_12_and_the_driver(tmp_path):
    """A program of CUDA 12 asks for libcudart.so.12, one that names driver functions for libcuda.so.1."""
    runtime = hoppersim.library_folder() / "runtime"
    libraries = ["--no-as-needed", runtime / "libcudart.so.12", runtime / "libcuda.so.1"]
    program = compiled(tmp_path / "program", "-cudart", "none", "-Xlinker", ",".join(map(str, libraries)))
    needed = subprocess.run(["readelf", "-dV", program], capture_output=True, text=True).stdout if _readelf else ""
    assert not _readelf or ("[libcudart.so.12]" in needed and "[libcuda.so.1]" in needed)
    done = hoppersim_run("--seeds", 1, program, "bug")
    assert done.returncode == 1 and done.stderr == "", done.stdout + done.stderr
    assert "1 finding." in done.stdout


_readelf = shutil.which("readelf")


def test_help_names_every_option():
    done = hoppersim_run("--help")
    assert done.returncode == 0
    options = ("--seeds N", "--timing", "--allow KIND", "--strict", "--go-on", "--json FILE", "--max-instructions N")
    for text in (*options, "exit status", "-cudart shared", "-lineinfo"):
        assert text in done.stdout


def test_allowed_kinds_and_going_on(program, tmp_path):
    kind = "uninitialised shared memory"
    done = hoppersim_run("--seeds", 1, "--allow", kind, program, "bug")
    assert done.returncode == 0 and "No findings." in done.stdout
    done = hoppersim_run("--seeds", 1, "--go-on", "--json", tmp_path / "told.json", program, "bug")
    told = json.loads((tmp_path / "told.json").read_text())
    assert done.returncode == 1 and [finding["kind"] for finding in told["findings"]] == [kind]
    assert told["launches"][0]["finished"] and told["launches"][0]["global_write_bytes"] == 256
    for wrong in ("dead-lock", "no such kind"):
        done = hoppersim_run("--allow", wrong, program)
        assert done.returncode == 2 and wrong in done.stderr


def test_the_command_lists_the_kinds():
    done = hoppersim_command("kinds")
    assert done.returncode == 0
    for name, kind in hoppersim.KINDS.items():
        assert f"{name}\n  {kind.severity}{', can be allowed' if kind.goes_on else ''}: {kind.meaning}\n" in done.stdout


def test_whoever_reads_may_have_seen_enough():
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "hoppersim", "kinds"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as done:
        done.stdout.close()
        assert done.stderr.read() == "" and done.wait() == 141
