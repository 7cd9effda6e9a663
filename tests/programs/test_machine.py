"""How a program's threads wait, what it does with freed memory, and what it says about a busy machine."""

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.paths import ROOT

from jetkernels import _machine

CHOICES = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "77", "KMP_BLOCKTIME": "5"}


# How threads wait


@pytest.fixture
def fresh(monkeypatch):
    """An environment without a choice, and no torch yet. Returns the `sys` that _machine sees."""
    for name in [name for name in os.environ if name in CHOICES or name.startswith("KMP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(_machine.SPIN, "to be removed, and put back at the end")
    monkeypatch.delenv(_machine.SPIN)
    fake = SimpleNamespace(modules={}, argv=["-c"], orig_argv=["python", "-c", "..."])
    monkeypatch.setattr(_machine, "sys", fake)
    return fake


def test_threads_spin_shortly_where_nothing_was_chosen(fresh):
    _machine.spin_shortly()
    assert os.environ[_machine.SPIN] == _machine.SPINS


@pytest.mark.parametrize("name", [*CHOICES, "KMP_LIBRARY"])
def test_a_users_choice_is_kept(fresh, monkeypatch, name):
    monkeypatch.setenv(name, CHOICES.get(name, "throughput"))
    before = dict(os.environ)
    _machine.spin_shortly()
    assert dict(os.environ) == before


def test_nothing_is_set_when_it_is_too_late(fresh):
    fresh.modules["torch"] = object()
    _machine.spin_shortly()
    assert _machine.SPIN not in os.environ


@pytest.mark.parametrize(
    "argv, orig_argv, name",
    [
        (["-m", "demo"], ["python", "-m", "jetkernels", "demo"], "jetkernels"),
        (
            ["-m", "demo", "--minutes", "1"],
            ["python", "-X", "dev", "-m", "jetkernels", "demo", "--minutes", "1"],
            "jetkernels",
        ),
        (["-m"], ["python", "-mjetkernels"], "jetkernels"),
        (["-m", "--device", "cpu"], ["python", "-m", "benchmarks.run", "--device", "cpu"], "benchmarks.run"),
        (["/opt/bin/jetkernels", "info"], ["/opt/bin/python", "/opt/bin/jetkernels", "info"], "jetkernels"),
        ([r"C:\venv\jetkernels.exe"] if os.name == "nt" else ["/venv/jetkernels.exe"], ["python"], "jetkernels"),
        (["-c", "jetkernels"], ["python", "-c", "import jetkernels", "jetkernels"], "-c"),
        ([""], ["python"], ""),
        (["-m", "jetkernels"], ["python", "-m", "pytest", "jetkernels"], "pytest"),
        (["train.py", "-m", "jetkernels"], ["python", "train.py", "-m", "jetkernels"], "train"),
    ],
)
def test_a_program_is_known_by_what_was_started(fresh, monkeypatch, argv, orig_argv, name):
    fresh.argv, fresh.orig_argv = argv, orig_argv
    kept = []
    monkeypatch.setattr(_machine, "keep_freed_memory", lambda: kept.append(True))
    assert _machine.program() == name
    _machine.prepare_programs()
    ours = name.startswith(("jetkernels", "benchmarks"))
    assert (_machine.SPIN in os.environ) == bool(kept) == ours


@pytest.fixture
def spin_at_torch(tmp_path):
    """spin(*command, **variables): GOMP_SPINCOUNT at the moment when a process imports torch, for which something
    stands in.
    """
    (tmp_path / "torch.py").write_text(
        "import os, pathlib\n"
        "pathlib.Path(os.environ['SPIN_FILE']).write_text(os.environ.get('GOMP_SPINCOUNT', 'not set'))\n"
        "os._exit(0)\n"
    )
    (tmp_path / "jetkernels-script").mkdir()
    script = tmp_path / "jetkernels-script" / "jetkernels"
    script.write_text("from jetkernels.__main__ import main\nmain()\n")

    def spin(*command, **variables):
        clean = {k: v for k, v in os.environ.items() if k not in CHOICES and not k.startswith("KMP_")}
        found = tmp_path / "spin"
        environment = {**clean, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SPIN_FILE": str(found), **variables}
        command = [str(script) if part == "SCRIPT" else part for part in command]
        done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return found.read_text()

    return spin


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "jetkernels", "info"),
        ("SCRIPT", "info"),
        ("-m", "benchmarks.run"),
        ("-m", "pytest", "tests/programs/test_machine.py", "-q"),
    ],
    ids=["python -m jetkernels", "jetkernels", "python -m benchmarks.run", "pytest"],
)
def test_our_programs_wait_shortly_before_torch_is_imported(spin_at_torch, command):
    assert spin_at_torch(*command) == _machine.SPINS
    assert spin_at_torch(*command, GOMP_SPINCOUNT="77") == "77"
    assert spin_at_torch(*command, OMP_WAIT_POLICY="active") == "not set"


def test_importing_the_library_changes_nothing(spin_at_torch):
    assert spin_at_torch("-c", "import jetkernels", "-m", "jetkernels") == "not set"


# Freed memory

REUSE = """
import ctypes, resource, sys
{setting}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(100 << 20))
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
{again}
"""
KEEP = "from jetkernels import _machine; print(_machine.keep_freed_memory())"


def run_reuse(setting="", again="", **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    environment = {**clean, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", REUSE.format(setting=setting, again=again)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another library")
def test_freed_memory_is_used_again():
    pages = (100 << 20) // resource.getpagesize()
    (without,) = run_reuse()
    assert int(without) >= pages // 512  # of 4 KB, or huge ones
    kept, with_it = run_reuse(KEEP)
    assert kept == "True" and int(with_it) < 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another library")
def test_kept_memory_can_be_given_back():
    kept, before, after = run_reuse(KEEP, "_machine.give_back_freed_memory(); print(faults())")
    assert kept == "True" and int(before) < 16 < int(after)


@pytest.mark.parametrize(
    "name, value",
    [*((name, "1000000") for name in _machine.MALLOC_CHOICES), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=2")],
)
def test_a_users_choice_of_malloc_is_kept(name, value):
    kept, _ = run_reuse(KEEP, **{name: value})
    assert kept == "False"


# Whether the machine is busy


def test_processors_are_what_a_program_gets_of_them(monkeypatch):
    now = [0.0]

    def perf_counter():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(_machine.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(_machine, "time", SimpleNamespace(perf_counter=perf_counter, thread_time=lambda: 0.25 * now[0]))
    found = _machine.processors()
    assert found.count == 1 and found.got == pytest.approx(0.25, rel=0.1)
    assert found.busy and "0.2 of 1 processors" in _machine.busy_notice(found, "so what")


def test_processors_of_this_machine():
    found = _machine.processors(0.05)
    assert 0 < found.got <= found.count * 1.05


def test_a_quiet_machine_is_not_talked_about():
    assert _machine.busy_notice(_machine.Processors(1.9, 2), "so what") is None
    assert (
        _machine.busy_notice(_machine.Processors(1.2, 2), "so what")
        == "this machine is busy: a program gets 1.2 of 2 processors (so what)"
    )
