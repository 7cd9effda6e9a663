"""CUTLASS's wgmma wrappers: what each one is, and a kernel around its asm with operands whose product is known."""

import functools
import re
from dataclasses import dataclass

import numpy as np
from cutlass_headers import Asm, cutlass_source, wrappers
from wgmma_ptx import SPAN_K, Tile, Wgmma, fragments, gather, spread, tile

import hoppersim

HEADERS = tuple(f"cute/arch/mma_sm90_gmma{suffix}.hpp" for suffix in ("", "_ext", "_sparse", "_sparse_ext"))
_WGMMA = re.compile(r"wgmma\.mma_async(\.sp)?\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)(\.satfinite)?\s")


@dataclass(frozen=True)
class Gmma:
    """One wrapper, from its asm."""

    name: str
    asm: Asm
    sparse: bool
    n: int
    k: int
    d: str
    a: str
    b: str
    saturate: bool
    in_registers: bool

    @property
    def family(self) -> str:
        kind = f"{self.d}.{self.a}.{self.b}" + ".satfinite" * self.saturate
        return ("sp." if self.sparse else "") + kind + ("-RS" if self.in_registers else "-SS")

    def parameter(self, name: str) -> bool:
        return any(name in expression for _, expression in self.asm.operands)


@functools.cache
def gmma_wrappers() -> list[Gmma]:
    found = []
    for function in wrappers(*HEADERS):
        for asm in function.asm:
            if match := _WGMMA.search(asm.text):
                sparse, n, k, d, a, b, saturate = match.groups()
                in_registers = not any(expression == "desc_a" for _, expression in asm.operands)
                found.append(
                    Gmma(function.name, asm, bool(sparse), int(n), int(k), d, a, b, bool(saturate), in_registers)
                )
    return found


class WrapperKernel(Wgmma):
    """A kernel with one wgmma: the asm of the wrapper, its operands put in."""

    def instruction(self, step: int, scale_d: str) -> str:
        values = {
            "desc_a": "%rd10",
            "desc_b": "%rd40",
            "e": "%e0",
            "int32_t(scale_D)": "%r10",
            "int32_t(spsel)": str(self.selector),
            "int32_t(scaleA)": str(self.scale[0]),
            "int32_t(scaleB)": str(self.scale[1]),
            "int32_t(tnspA)": str(self.trans[0]),
            "int32_t(tnspB)": str(self.trans[1]),
        }
        operands = []
        for _, expression in self.wrapper.asm.operands:
            register = re.fullmatch(r"([ad])0*(\d+)", expression)
            operands.append(f"%{register[1]}{register[2]}" if register else values[expression])
        return re.sub(r"%(\d+)", lambda match: operands[int(match[1])], self.wrapper.asm.text)

    @property
    def sparse(self) -> bool:
        return self.wrapper.sparse


# ---- Operands


def _integers(element: str, shape, seed: int) -> np.ndarray:
    """Integers that are exact in the element type and whose sums are exact in every accumulator."""
    low, high = {"s8": (-128, 127), "u8": (0, 255)}.get(element, (-4, 4))
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.float64)


@functools.cache
def _tile(
    element: str, rows: int, k: int, seed: int, swizzle: int, mn_major: bool, step: int
) -> tuple[np.ndarray, Tile]:
    matrix = _integers(element, (rows, k), seed)
    return matrix, tile(matrix, element, swizzle, mn_major, step)


def metadata_layout(k: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shape and stride of thread and value modes of CUTLASS's ELayout_64x<k>, read from its header."""
    text = (cutlass_source() / "include/cute/atom/mma_traits_sm90_gmma_sparse.hpp").read_text()
    shape, stride = re.search(rf"ELayout_64x{k}\s*=\s*Layout<Shape(.*?)>>,\s*Stride(.*?)>>>;", text, re.S).groups()
    modes = []
    for listed in (shape, stride):
        threads, values = listed.split(">,")
        modes.append([[int(x) for x in re.findall(r"_(\d+)", part)] for part in (threads, values)])
    return list(zip(modes[0][0], modes[1][0])), list(zip(modes[0][1], modes[1][1]))


def _offset(index: int, modes: list[tuple[int, int]]) -> int:
    total = 0
    for size, stride in modes:
        total += index % size * stride
        index //= size
    return total


@functools.cache
def sparse_a(element: str, k: int, selector: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [64, k], its stored elements [64, k / 2], and the metadata register of each thread."""
    rng = np.random.default_rng(seed)
    chunk = 2 if element == "tf32" else 4
    stored = _integers(element, (64, k // 2), seed)
    a, nibbles = np.zeros((64, k)), np.zeros((64, k // chunk), np.uint32)
    for row in range(64):
        for c in range(k // chunk):
            places = sorted(rng.choice(chunk, chunk // 2, replace=False))
            a[row, [c * chunk + p for p in places]] = stored[row, c * chunk // 2 : (c + 1) * chunk // 2]
            nibbles[row, c] = (0b0100, 0b1110)[places[0]] if chunk == 2 else places[0] | places[1] << 2
    threads, values = metadata_layout(k)
    registers = rng.integers(0, 2**32, 128).astype(np.uint32)  # lanes that hold no metadata hold anything
    for thread in range(128):
        holds_any = SPAN_K[element] == 32 or thread % 4 // 2 == selector
        bits = 0
        for n, value in enumerate(range(0, np.prod([size for size, _ in values]), chunk)):
            at = _offset(thread, threads) + _offset(value, values)
            bits |= int(nibbles[at % 64, at // 64 // chunk]) << 4 * n
        if holds_any:
            registers[thread] = bits
    return a, stored, registers


@dataclass
class Problem:
    """A kernel, its arrays, and the D that it must compute."""

    kernel: WrapperKernel
    registers: np.ndarray
    fragments: np.ndarray
    expected: np.ndarray

    def check(self) -> None:
        d = gather(self.registers, self.kernel.n, self.kernel.accumulator)
        np.testing.assert_array_equal(d, self.expected, err_msg=self.kernel.wrapper.name)


def problem(
    wrapper: Gmma, *, swizzles=(128, 128), trans=(0, 0), scale=(1, 1), selector=0, accumulate=True, **changes
) -> Problem:
    """``changes``: what a planted bug changes in the kernel (see Wgmma)."""
    step = SPAN_K[wrapper.a]
    metadata = None
    if wrapper.sparse:
        a, stored, metadata = sparse_a(wrapper.a, wrapper.k, selector, 1)
        a_tile = tile(stored, wrapper.a, swizzles[0], bool(trans[0])) if not wrapper.in_registers else None
    else:
        a, a_tile = _tile(wrapper.a, 64, wrapper.k, 1, swizzles[0], bool(trans[0]), step)
        stored = a
    b, b_tile = _tile(wrapper.b, wrapper.n, wrapper.k, 2, swizzles[1], bool(trans[1]), wrapper.k)
    kernel = WrapperKernel(
        wrapper.n,
        wrapper.a,
        b_tile,
        None if wrapper.in_registers else a_tile,
        wrapper.d,
        trans,
        scale,
        accumulate,
        **changes,
    )
    kernel.wrapper, kernel.selector = wrapper, selector
    c = _integers("f16", (64, wrapper.n), 3)
    if wrapper.d == "s32":  # sums that leave the range of the accumulator
        c[::7, ::3] = 2**31 - 100
        c[::5, 1::3] = -(2**31) + 100
    parts = [fragments(stored, wrapper.a)] if wrapper.in_registers else []
    parts += [metadata[:, None]] if wrapper.sparse else []
    parts = np.ascontiguousarray(np.concatenate(parts, 1)) if parts else np.zeros(4, np.uint32)
    expected = accumulate * c + scale[0] * scale[1] * (a @ b.T)
    if wrapper.d == "s32":
        expected = (
            expected.clip(-(2**31), 2**31 - 1) if wrapper.saturate else expected.astype(np.int64).astype(np.int32)
        )
    return Problem(kernel, spread(c, wrapper.d), parts, expected)


def run(p: Problem, **simulate) -> dict:
    with hoppersim.simulate(**simulate):
        return hoppersim.Module(p.kernel.ptx()).launch("k", 1, 128, (p.kernel.image, p.registers, p.fragments))
