"""The kernels in ``kernels/``: where CUTLASS's headers are, how they are compiled, and how the GEMMs are called and
judged.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest

import hoppersim

ROOT = Path(__file__).parent.parent.parent

KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def library(name: str, *flags: str) -> hoppersim.Library:
    """Compiles ``kernels/<name>.cu``; skips the test where CUTLASS's headers are not."""
    cutlass = hoppersim.cutlass_include()
    if cutlass is None:
        pytest.skip("needs CUTLASS 4.2 headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH")
    include = (ROOT, cutlass, cutlass.parent / "tools" / "util" / "include")
    return hoppersim.compile_cuda(
        KERNELS / f"{name}.cu", include_dirs=include, flags=("--expt-relaxed-constexpr", "-DNDEBUG", *flags)
    )


class Problem(ctypes.Structure):
    """jet::hopper::test::GemmProblem."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in "abc"]
        + [(name, ctypes.c_int) for name in "mnk"]
        + [(f"stride_{name}", ctypes.c_int64) for name in "abc"]
    )


def random_16_bit(dtype: str, shape, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers that are exact in ``dtype`` ("bf16" or "f16"): as bits, and as fp64."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "f16":
        half = x.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def unwritten(shape: tuple[int, int]) -> np.ndarray:
    """fp32 NaNs, aligned as device memory is: the sectors that a store touches depend on it."""
    size = 4 * shape[0] * shape[1]
    memory = np.empty(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    array = memory[start : start + size].view(np.float32).reshape(shape)
    array.fill(np.nan)
    return array


def padded(bits: np.ndarray) -> np.ndarray:
    """Rows on 16-byte multiples, as TMA wants them. The padding is NaN in both 16-bit formats: a kernel that reads it
    shows it.
    """
    rows, columns = bits.shape
    whole = np.full((rows, (columns + 7) // 8 * 8 + 8), 0x7FFF, np.uint16)
    whole[:, :columns] = bits
    return whole


class Gemm:
    """One problem C = A Bᵀ with its operands in the layouts of a kernel variant."""

    def __init__(self, m: int, n: int, k: int, dtype="bf16", a_is_mn=False, b_is_mn=False):
        self.shape, self.a_is_mn, self.b_is_mn = (m, n, k), a_is_mn, b_is_mn
        a_bits, self.a = random_16_bit(dtype, (m, k), seed=1)
        b_bits, self.b = random_16_bit(dtype, (n, k), seed=2)
        self.a_memory = padded(a_bits.T if a_is_mn else a_bits)
        self.b_memory = padded(b_bits.T if b_is_mn else b_bits)

    def run(self, source: str, *leading, name: str | None = None, columns: int | None = None, **simulate) -> np.ndarray:
        """Calls ``name(leading..., problem, message)`` of ``kernels/<source>.cu``; returns C [m, columns], NaN where
        not written.
        """
        m, n, k = self.shape
        c = unwritten((m, columns or n))
        pointers = [array.ctypes.data for array in (self.a_memory, self.b_memory, c)]
        problem = Problem(*pointers, m, n, k, self.a_memory.shape[1], self.b_memory.shape[1], c.shape[1])
        message = ctypes.create_string_buffer(512)
        kernels = library(source)
        with hoppersim.simulate(**simulate), hoppersim.registered(self.a_memory, self.b_memory, c):
            failed = kernels.call(name or source, *leading, ctypes.byref(problem), message)
        assert failed == 0, message.value.decode()
        return c

    def variant(self, dtype: str, source_of_a: str, swizzle: int, **options) -> np.ndarray:
        leading = (ctypes.c_int(swizzle), ctypes.c_int(self.a_is_mn), ctypes.c_int(self.b_is_mn))
        return self.run(f"gemm_{dtype}_{source_of_a}", *leading, **options)

    def check(self, c: np.ndarray) -> None:
        """Operands are exact and so are products in fp32, so the only error is that of k fp32 additions."""
        m, n, k = self.shape
        bound = (k + 1) * 2.0**-24 * (abs(self.a) @ abs(self.b).T)
        error = abs(c[:, :n].astype(np.float64) - self.a @ self.b.T)
        assert (error <= bound).all(), f"largest error {np.nanmax(error)}, {np.isnan(error).sum()} not a number"
        assert np.isnan(c[:, n:]).all(), "written outside C"
