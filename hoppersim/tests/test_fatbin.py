"""Fat binaries as nvcc writes them: plain and compressed PTX, machine code, several architectures."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hoppersim

LONG = "\n".join(f"  if (n == {k}) x[{k}] = sinf(x[{k}]) * {k}.5f;" for k in range(3))
SOURCE = f"""
extern "C" __global__ void arch(float* x, int n) {{
{LONG}
#ifdef __CUDA_ARCH__
  x[threadIdx.x] = __CUDA_ARCH__;
#endif
}}
extern "C" int go(float* x) {{ arch<<<1, 32>>>(x, 1000); return cudaGetLastError(); }}
"""
MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, CODE = "arch=compute_90a,code=compute_90a", "arch=compute_90a,code=sm_90a"


def nvcc(*arguments: str | Path) -> None:
    subprocess.run([hoppersim.nvcc(), "-Xcompiler", "-fPIC", *map(str, arguments)], input=SOURCE, text=True, check=True)


def linked(folder: Path, *arguments: str | Path) -> Path:
    path, simulator = folder / "program.so", hoppersim.library_folder()
    library = [f"-L{simulator}", "-lhoppersim", "-Xlinker", f"-rpath={simulator}"]
    nvcc("-cudart", "none", "-shared", *arguments, "-o", path, *library)
    return path


def compiled(folder: Path, *flags: str) -> Path:
    return linked(folder, *flags, "-x", "cu", "-")


def compressions(path: Path) -> set[str]:
    """How the PTX of a binary is compressed, by the flags of its entries."""
    data, found = path.read_bytes(), set()
    at = data.find(MAGIC)
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, entry)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            if kind == 1:
                found.add("lz4" if flags >> 13 & 1 else "zstd" if flags >> 15 & 1 else "none")
            entry += header + payload
        at = data.find(MAGIC, end)
    return found


def run(path: Path) -> float:
    x = np.zeros(256, np.float32)
    assert hoppersim.Library(path).call("go", x) == 0
    return x[0]


@pytest.mark.parametrize(
    "flags, compression",
    [(["--no-compress"], "none"), (["--compress-mode=speed"], "lz4"), ([], "zstd")],
)
def test_compressed(flags, compression, tmp_path):
    path = compiled(tmp_path, "-arch=sm_90a", *flags)
    assert compression in compressions(path), "the test needs another size of kernel or option of nvcc"
    assert run(path) == 900


@pytest.mark.parametrize(
    "codes, architecture",
    [
        (["arch=compute_80,code=compute_80", "arch=compute_90,code=compute_90"], 900),
        ([PTX, "arch=compute_80,code=[compute_80,sm_80]", "arch=compute_100,code=[compute_100,sm_100]"], 900),
        (["arch=compute_80,code=compute_80", "arch=compute_100,code=sm_100"], 800),  # what a driver would compile
    ],
)
def test_the_code_that_the_device_takes(codes, architecture, tmp_path):
    assert run(compiled(tmp_path, *(word for code in codes for word in ("-gencode", code)))) == architecture


@pytest.mark.parametrize(
    "codes",
    [
        ["arch=compute_80,code=compute_80", CODE],  # a device would run the machine code
        ["arch=compute_100,code=compute_100"],
    ],
)
def test_without_ptx_the_flag_is_named(codes, tmp_path):
    path = compiled(tmp_path, *(word for code in codes for word in ("-gencode", code)))
    with pytest.raises(hoppersim.Fault, match=r"no PTX for sm_90a: compile with -gencode arch=compute_90a") as caught:
        run(path)
    assert caught.value.kind == "no ptx"


def test_linked_device_code_is_refused(tmp_path):
    with pytest.raises(hoppersim.Fault, match="-rdc") as caught:
        objects = [tmp_path / "program.o", tmp_path / "linked.o"]
        nvcc("-arch=sm_90a", "-rdc=true", "-c", "-x", "cu", "-", "-o", objects[0])
        nvcc("-arch=sm_90a", "-dlink", objects[0], "-o", objects[1])
        run(linked(tmp_path, *objects))
    assert caught.value.kind == "no ptx"


def test_without_zstd_the_library_is_named(tmp_path):
    """A library of that name that has no such function stands for one that is not installed."""
    path = compiled(tmp_path, "-arch=sm_90a", "--compress-mode=size")
    fake = tmp_path / "libzstd.so.1"
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(fake)], check=True)
    code = f"import hoppersim, numpy\nhoppersim.Library({str(path)!r}).call('go', numpy.zeros(256, 'f'))"
    folders = os.pathsep.join(str(folder) for folder in (tmp_path, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_LIBRARY_PATH": folders, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no ptx: the PTX in the fat binary is compressed with zstd, and libzstd.so.1 cannot be loaded" in done.stderr
