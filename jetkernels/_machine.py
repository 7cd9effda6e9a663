"""The machine a program runs on: what it is, how idle threads wait, what becomes of memory, who has the processors.

Only the standard library, as the first question must be settled before torch is imported.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SPIN = "GOMP_SPINCOUNT"
# Turns of the loop in which an idle thread waits before it sleeps; one takes 35 ns (Xeon at 2.1 GHz). Where others use
# the processors, a parallel region loses all turns before the thread that is waited for can run: 35 us with 1,000, 105
# us with 3,000, 450 us with 10,000, and whole time slices with libgomp's default of 300,000; a training step opens a
# thousand regions. Without any turn even the shortest pause between two regions puts a thread to sleep, which costs a
# quiet machine more.
SPINS = "1000"
# Freed blocks of up to so many bytes stay with a program, the most that mallopt takes. By default glibc returns every
# block of 32 MB and more to the system, and the next one costs a stop in the system's kernel for each of its pages,
# more where a virtual machine has to ask its host: 2048 tokens of the 2B model 5.7 s, and 4.9 s with memory that is
# kept; a token of the chunked rule in 256K tokens 15 us, and 9.1 us.
KEPT = 2**31 - 1
KEPT_BY_GLIBC = 32 << 20  # where its own threshold ends, which grows with what is freed
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
MALLOC_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
ROOT = Path(__file__).parent.parent  # of the repository, where there is one
PROGRAMS = ("jetkernels", "benchmarks", "tests")  # what `python -m` of ours starts with


def program() -> str:
    """What this process was started as: the name behind ``python -m``, or the name of the script."""
    if sys.argv[:1] == ["-m"]:  # until the module has been found, for example while its package is imported
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return Path(sys.argv[0]).stem if sys.argv else ""


def spin_shortly() -> None:
    """Lets idle OpenMP threads of this process and its children sleep soon, unless the user has said how they wait.

    libgomp, which PyTorch's Linux builds use, reads this once, when torch is imported; later there is nothing to be
    done.
    """
    chosen = (
        "OMP_WAIT_POLICY" in os.environ or SPIN in os.environ or any(name.startswith("KMP_") for name in os.environ)
    )
    if "torch" not in sys.modules and not chosen:
        os.environ[SPIN] = SPINS


def keep_freed_memory(up_to: int = KEPT) -> bool:
    """Lets this process keep freed blocks of up to so many bytes, unless the user has said what malloc does.

    Returns: whether it does from now on. glibc has such a setting (2.36 takes it; older ones may allow less); other
        allocators keep what they like.
    """
    chosen = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or not os.environ.keys().isdisjoint(MALLOC_CHOICES)
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, up_to) == 1 for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def give_back_freed_memory() -> None:
    """Returns to the system what malloc keeps, so that nobody takes it for memory in use."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def prepare_programs() -> None:
    """Both where this process is a program of ours; a library leaves the process as it is."""
    if program().partition(".")[0] in PROGRAMS:
        spin_shortly()
        keep_freed_memory()


@dataclass(frozen=True)
class Processors:
    """What a program gets of the processors that it may run on.

    Attributes:
        got: as many processors as its processor time comes to.
        count: how many it may run on.
    """

    got: float
    count: int

    @property
    def busy(self) -> bool:
        """Whether others use a good part of them."""
        return self.got < 0.8 * self.count

    def __str__(self) -> str:
        return f"{self.got:.1f} of {self.count} processors"


def processors(seconds: float = 0.25) -> Processors:
    """Measured: computes on each processor for so long, and compares the processor time with the time that passed."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares: list[float] = []

    def compute() -> None:
        data = bytes(1 << 20)
        start, start_cpu = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < seconds:
            hashlib.sha256(data)  # does not hold the interpreter's lock
        shares.append((time.thread_time() - start_cpu) / (time.perf_counter() - start))

    threads = [threading.Thread(target=compute) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Processors(sum(shares), count)


def busy_notice(found: Processors, consequence: str) -> str | None:
    """The sentence for people where other processes take the processors: what was found, and what follows from it."""
    return f"this machine is busy: a program gets {found} ({consequence})" if found.busy else None


def answer(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit of this tree; where the tree came without git, what JETKERNELS_COMMIT says."""
    # An installed package may lie in the repository of something else.
    named = answer("git", "rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else None
    if named is None:
        return os.environ.get("JETKERNELS_COMMIT", "unknown: no git here, and JETKERNELS_COMMIT is not set")
    return named + ("+changes" if answer("git", "status", "--porcelain") else "")


def processor_name() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def gpu_driver(index: int) -> str:
    """The version of the driver of an NVIDIA GPU."""
    asked = answer("nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader")
    return asked or "unknown: nvidia-smi did not answer"
