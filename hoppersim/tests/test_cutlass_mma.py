"""Each mma.sync and dot-product wrapper of CUTLASS's headers (cute/arch/mma_sm61.hpp … mma_sm90.hpp) against NumPy."""

import re

import numpy as np
import pytest
from cutlass_headers import cutlass_source, wrappers
from cutlass_kernels import library
from lane_ptx import HEADER
from wgmma_ptx import to_bits

import hoppersim

HEADERS = tuple(f"cute/arch/mma_sm{arch}.hpp" for arch in (61, 70, 75, 80, 89, 90))
BITS = {
    "f16": 16,
    "bf16": 16,
    "tf32": 32,
    "f32": 32,
    "e4m3": 8,
    "e5m2": 8,
    "s8": 8,
    "u8": 8,
    "s4": 4,
    "u4": 4,
    "b1": 1,
    "f64": 64,
    "s32": 32,
}
DTYPES = {"f16": np.float16, "f32": np.float32, "s32": np.int32, "f64": np.float64}
RANGES = {"s8": (-128, 127), "u8": (0, 255), "s4": (-8, 7), "u4": (0, 15), "b1": (0, 1)}
NOT_PTX = {"SM61_DP2A::fma": "its asm names neither .lo nor .hi, which PTX requires of dp2a: ptxas refuses it"}
COMPOSED = {  # of several mma.sync, in kernels/wrappers_mma.cu: m, k
    "SM80_8x8x4_C64C64C64C64_TN::fma": (8, 4),
    "SM80_8x8x4_GC64C64C64GC64_TN::fma": (8, 4),
    "MMA_16x8x4_C64C64C64C64_TN::fma": (16, 4),
    "MMA_16x8x8_C64C64C64C64_TN::fma": (16, 8),
    "MMA_16x8x16_C64C64C64C64_TN::fma": (16, 16),
}
BY_NAME = {f.name: f for f in wrappers(*HEADERS) if f.asm} if cutlass_source() else {}
LANE = np.arange(32)

needs_cutlass = pytest.mark.skipif(not BY_NAME, reason="needs CUTLASS's headers")


def run(asm, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Runs the asm in one warp. ``arrays``: bits of the registers of a, b, c [32, registers]; returns those of d."""
    roles = [re.fullmatch(r"([abcd])(\d*)", expression).groups() for _, expression in asm.operands]
    wide = any(constraint.endswith("d") for constraint, _ in asm.operands)
    bits, size = (64, 8) if wide else (32, 4)
    count = sum(role == "d" for role, _ in roles)
    arrays = {**arrays, "d": np.zeros((32, count), np.uint64 if wide else np.uint32)}
    body = ["mov.u32 %t, %tid.x;"]
    for role, array in arrays.items():
        registers = array.shape[1]
        body += [
            f".reg .b{bits} %{role}<{registers}>;",
            f"ld.param.u64 %p{role}, [{role}];",
            f"mad.wide.u32 %p{role}, %t, {size * registers}, %p{role};",
        ]
        if role != "d":
            body += [f"ld.global.b{bits} %{role}{r}, [%p{role}+{size * r}];" for r in range(registers)]
    body.append(
        re.sub(r"%(\d+)", lambda match: "%" + roles[int(match[1])][0] + (roles[int(match[1])][1] or "0"), asm.text)
    )
    body += [f"st.global.b{bits} [%pd+{size * r}], %d{r};" for r in range(count)]
    parameters = ", ".join(f".param .u64 {role}" for role in arrays)
    text = (
        HEADER
        + f".visible .entry k({parameters})\n{{\n.reg .b32 %t;\n.reg .b64 %pa, %pb, %pc, %pd;\n"
        + "\n".join(body)
        + "\nret;\n}\n"
    )
    hoppersim.Module(text).launch("k", 1, 32, tuple(arrays.values()))
    return arrays["d"]


def words(matrix: np.ndarray, element: str) -> np.ndarray:
    """[rows, k] -> its 32-bit words (64-bit of f64) [rows, words]."""
    if element == "f64":
        return np.ascontiguousarray(matrix, np.float64).view(np.uint64)
    if BITS[element] >= 8:
        return np.ascontiguousarray(to_bits(matrix, element)).view(np.uint32)
    per_word = 32 // BITS[element]
    values = matrix.astype(np.int64).reshape(len(matrix), -1, per_word) & ((1 << BITS[element]) - 1)
    return (values << np.arange(per_word) * BITS[element]).sum(2).astype(np.uint32)


def fragments(matrix: np.ndarray, element: str) -> np.ndarray:
    """Rows of A, or columns of B, to registers: words of four lanes side by side, then the next 8 rows, then the next 4
    words.
    """
    w = words(matrix, element)
    places = [(row, at) for at in range(0, w.shape[1], 4) for row in range(0, len(w), 8)]
    return np.stack([w[row + LANE // 4, at + LANE % 4] for row, at in places], 1)


def accumulators(matrix: np.ndarray, element: str) -> np.ndarray:
    columns = [matrix[row + LANE // 4, LANE % 4 * 2 + e] for row in range(0, len(matrix), 8) for e in (0, 1)]
    values = np.ascontiguousarray(np.stack(columns, 1).astype(DTYPES[element]))
    return values.view(np.uint64 if element == "f64" else np.uint32)


def expected_product(a, b, c, saturate: bool, integer: bool, exclusive_or: bool):
    d = c + ((a[:, None, :] != b[None, :, :]).sum(2) if exclusive_or else a @ b.T)
    if not integer:
        return d
    return d.clip(-(2**31), 2**31 - 1) if saturate else d.astype(np.int64).astype(np.int32)


MMA = re.compile(
    r"mma\.sync\.aligned\.m(\d+)n8k(\d+)\.(row|col)\.(row|col)\.(\w+)\.(\w+)\.(\w+)\.(\w+)((?:\.[a-z]+)*)[\s{]"
)


def operands(m: int, k: int, element_a: str, element_b: str, accumulator: str):
    rng = np.random.default_rng(m + k)
    a, b = (
        rng.integers(low, high + 1, (rows, k))
        for rows, (low, high) in ((m, RANGES.get(element_a, (-4, 4))), (8, RANGES.get(element_b, (-4, 4))))
    )
    c = rng.integers(-8, 9, (m, 8)).astype(np.float64)
    if accumulator == "s32":
        c[::3, ::2], c[1::3, 1::2] = 2**31 - 5, -(2**31) + 5
    return a.astype(np.float64), b.astype(np.float64), c


@pytest.mark.parametrize(
    "name", [name for name, f in BY_NAME.items() if MMA.search(f.asm[0].text) and not name.startswith("SM70")]
)
def test_mma(name):
    asm = BY_NAME[name].asm[0]
    m, k, _, _, d, element_a, element_b, c_type, suffix = MMA.search(asm.text).groups()
    a, b, c = operands(int(m), int(k), element_a, element_b, d)
    registers = {"a": fragments(a, element_a), "b": fragments(b, element_b), "c": accumulators(c, c_type)}
    got = run(asm, registers)
    expected = expected_product(a, b, c, "satfinite" in suffix, d == "s32", "xor" in suffix)
    np.testing.assert_array_equal(got, accumulators(expected, d))


def quad_layouts() -> dict[str, np.ndarray]:
    """Offset row + 8 column (row + 8 k) of each element of each of the 8 threads of a quad pair: the layouts of
    cute/atom/mma_traits_sm70.hpp.
    """
    text = (cutlass_source() / "include/cute/atom/mma_traits_sm70.hpp").read_text()
    found = {}
    for name in ("SM70_8x4_Row", "SM70_8x4_Col", "SM70_8x8_16b", "SM70_8x8_32b"):
        body = re.search(rf"using {name}\s*=\s*Layout<(.*?)>;", text, re.S)[1]
        shape, stride = (re.findall(r"_(\d+)", part) for part in re.split(r"Stride", body, maxsplit=1))
        offsets = np.zeros(int(np.prod([int(s) for s in shape])), int)
        for index in range(len(offsets)):
            rest = index
            for size, step in zip(map(int, shape), map(int, stride)):
                offsets[index] += rest % size * step
                rest //= size
        found[name] = offsets.reshape(-1, 8).T  # [thread, element]
    return found


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith("SM70")])
def test_quad_pairs(name):
    asm = BY_NAME[name].asm[0]
    _, _, layout_a, layout_b, d, *_ = MMA.search(asm.text).groups()
    layouts = quad_layouts()
    rng = np.random.default_rng(4)
    a, b, c = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((4, 8, 4), (4, 8, 4), (4, 8, 8)))
    # [quad pair, thread]
    lanes = np.stack([np.concatenate([4 * q + np.arange(4), 16 + 4 * q + np.arange(4)]) for q in range(4)])

    def registers(matrices, layout, dtype):
        out = np.zeros((32, layout.shape[1]), dtype)
        for quad, matrix in enumerate(matrices):
            out[lanes[quad]] = matrix[layout % 8, layout // 8]
        return out.view(np.uint32)

    operand = {"row": "SM70_8x4_Row", "col": "SM70_8x4_Col"}
    accumulator, dtype = ("SM70_8x8_16b", np.float16) if d == "f16" else ("SM70_8x8_32b", np.float32)
    got = run(
        asm,
        {
            "a": registers(a, layouts[operand[layout_a]], np.float16),
            "b": registers(b, layouts[operand["col" if layout_b == "row" else "row"]], np.float16),
            "c": registers(c, layouts[accumulator], dtype),
        },
    )
    np.testing.assert_array_equal(got, registers(c + a @ b.transpose(0, 2, 1), layouts[accumulator], dtype))


@needs_cutlass
def test_dot_product():
    rng = np.random.default_rng(6)
    a, b = (rng.integers(-128, 128, (32, 4)).astype(np.int8) for _ in range(2))
    c = rng.integers(-1000, 1000, (32, 1)).astype(np.int32)
    got = run(
        BY_NAME["SM61_DP4A::fma"].asm[0], {"a": a.view(np.uint32), "b": b.view(np.uint32), "c": c.view(np.uint32)}
    )
    np.testing.assert_array_equal(got.view(np.int32)[:, 0], (a.astype(int) * b).sum(1) + c[:, 0])


@needs_cutlass
@pytest.mark.parametrize("name", COMPOSED)
def test_complex(name):
    m, k = COMPOSED[name]
    rng = np.random.default_rng(8)
    a, b, c = (rng.integers(-5, 6, shape) + 1j * rng.integers(-5, 6, shape) for shape in ((m, k), (8, k), (m, 8)))
    places = [(row, at) for at in range(0, k, 4) for row in range(0, m, 8)]
    of_a = np.ascontiguousarray(np.stack([a[row + LANE // 4, at + LANE % 4] for row, at in places], 1))
    of_b = np.ascontiguousarray(np.stack([b[LANE // 4, at + LANE % 4] for at in range(0, k, 4)], 1))

    def spread(matrix):
        return np.ascontiguousarray(
            np.stack([matrix[row + LANE // 4, LANE % 4 * 2 + e] for row in range(0, m, 8) for e in (0, 1)], 1)
        )

    d = np.zeros_like(spread(c))
    with hoppersim.simulate():
        assert (
            library("wrappers_mma").call("run_complex_product", list(COMPOSED).index(name), of_a, of_b, spread(c), d)
            == 0
        )
    np.testing.assert_array_equal(d, spread(a @ b.T + c))


@needs_cutlass
def test_every_wrapper_is_tried():
    others = {f.name for f in wrappers(*HEADERS) if f.name.endswith("::fma")} - set(COMPOSED) - set(NOT_PTX)
    tried = {name for name, f in BY_NAME.items() if MMA.search(f.asm[0].text)} | {"SM61_DP4A::fma"}
    assert others == tried and not tried & set(NOT_PTX)


@needs_cutlass
@pytest.mark.parametrize("name", NOT_PTX)
def test_what_is_not_ptx_is_refused(name):
    one = np.ones((32, 1), np.uint32)
    with pytest.raises(hoppersim.Fault) as caught:
        run(BY_NAME[name].asm[0], {"a": one, "b": one, "c": one})
    assert caught.value.kind == "unsupported instruction"
