"""mma.sync, ldmatrix, stmatrix, movmatrix against NumPy."""

import numpy as np
import pytest
from refusal import refusal
from wgmma_ptx import to_bits

import hoppersim

HEADER = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 input, .param .u64 output)
{
  .reg .pred %p<4>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<10>;
  .shared .align 128 .b8 rows[4096];
  mov.u32 %r30, %tid.x;
  ld.param.u64 %rd1, [input];
  ld.param.u64 %rd2, [output];
"""


def launch(body: str, source: np.ndarray, target: np.ndarray, **options) -> dict:
    with hoppersim.simulate(**options):
        return hoppersim.Module(HEADER + body + "  ret;\n}\n").launch("k", 1, 32, (source, target))


def loads(first: int, count: int, words: int, at: int = 0) -> str:
    """Loads ``count`` registers from input[lane * words + at + …]."""
    text = f"  mad.wide.u32 %rd3, %r30, {4 * words}, %rd1;\n"
    return text + "".join(f"  ld.global.b32 %r{first + r}, [%rd3+{4 * (at + r)}];\n" for r in range(count))


def stores(first: int, count: int) -> str:
    text = f"  mad.wide.u32 %rd4, %r30, {4 * count}, %rd2;\n"
    return text + "".join(f"  st.global.b32 [%rd4+{4 * r}], %r{first + r};\n" for r in range(count))


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + r}" for r in range(count)) + "}"


def pack(elements: np.ndarray) -> np.ndarray:
    """Elements [..., 2] of 16 bits or [..., 1] of 32 -> words."""
    return np.ascontiguousarray(elements).view(np.uint32)[..., 0]


def fragments(matrix: np.ndarray, is_b: bool) -> np.ndarray:
    """Bits of A [16, k] or B transposed [8, k] -> words [32, registers]. Register: 8 rows by 4 words of a row, rows
    first (A).
    """
    per_word = 4 // matrix.itemsize
    words = pack(matrix.reshape(matrix.shape[0], -1, per_word))  # [rows, k / per_word]
    lane = np.arange(32)
    columns = []
    for k in range(0, words.shape[1], 4):
        for row in range(0, 8 if is_b else 16, 8):
            columns.append(words[row + lane // 4, k + lane % 4])
    return np.stack(columns, 1)


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """[16, 8] of f32 or f16 -> words [32, registers]."""
    lane = np.arange(32)
    pairs = np.stack([np.stack([matrix[lane // 4 + h, lane % 4 * 2 + i] for i in (0, 1)], 1) for h in (0, 8)], 1)
    return np.ascontiguousarray(pairs).reshape(32, -1).view(np.uint32)


def matrix_of(words: np.ndarray, dtype) -> np.ndarray:
    lane = np.arange(32)
    values = np.ascontiguousarray(words).view(dtype).reshape(32, 2, 2)
    matrix = np.empty((16, 8), dtype)
    for h in (0, 1):
        for i in (0, 1):
            matrix[lane // 4 + 8 * h, lane % 4 * 2 + i] = values[:, h, i]
    return matrix


CASES = [
    ("f16", 8, "f32"),
    ("f16", 16, "f32"),
    ("f16", 8, "f16"),
    ("f16", 16, "f16"),
    ("bf16", 8, "f32"),
    ("bf16", 16, "f32"),
    ("tf32", 4, "f32"),
    ("tf32", 8, "f32"),
]


@pytest.mark.parametrize("element, k, accumulator", CASES)
@pytest.mark.parametrize("exact", [True, False])
def test_mma(element, k, accumulator, exact):
    rng = np.random.default_rng(k)
    a, b, c = (rng.integers(-8, 9, s).astype(np.float32) for s in ((16, k), (8, k), (16, 8)))
    if not exact:
        a, b = (np.where(rng.random(x.shape) < 0.5, x / 64, x * 8).astype(np.float32) for x in (a, b))
        c = c.astype(np.float16).astype(np.float32) / 16
    kind = np.float16 if accumulator == "f16" else np.float32
    parts = [fragments(to_bits(a, element), False), fragments(to_bits(b, element), True), accumulators(c.astype(kind))]
    source = np.ascontiguousarray(np.concatenate(parts, 1))
    sizes, total = [p.shape[1] for p in parts], source.shape[1]
    d = np.zeros((32, sizes[2]), np.uint32)
    body = loads(0, total, total)
    operands = [
        registers(20, sizes[2]),
        registers(0, sizes[0]),
        registers(sizes[0], sizes[1]),
        registers(sizes[0] + sizes[1], sizes[2]),
    ]
    body += (
        f"  mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{element}.{element}.{accumulator} {', '.join(operands)};\n"
    )
    counters = launch(body + stores(20, sizes[2]), source, d)
    expected = c.copy()
    for i in range(k):
        expected += np.outer(a[:, i], b[:, i])
    np.testing.assert_array_equal(matrix_of(d, kind), expected.astype(kind))
    assert counters["tensor_flop"] == 2 * 16 * 8 * k


@pytest.mark.parametrize(
    "text",
    [
        "mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32 {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0}, {%r0,%r1,%r2,%r3};",
        (
            "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0,%r1}, {%r0,%r1,%r2,%r3}, %r4, 0;"
        ),
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0,%r1}, [%r2];",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r2], {%r0};",
    ],
)
def test_unsupported(text):
    found = refusal(HEADER + "  " + text + "\n  ret;\n}\n")
    assert found.kind == "unsupported instruction" and text.split()[0] in str(found)


FILL = (
    "  mov.u32 %r31, rows;\n  shl.b32 %r32, %r30, 4;\n  cvt.u64.u32 %rd5, %r32;\n  add.s64 %rd6, %rd1, %rd5;\n"
    "  ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd6];\n"
    "  mad.lo.u32 %r33, %r30, PITCH, %r31;\n  st.shared.v4.b32 [%r33], {%r0, %r1, %r2, %r3};\n  bar.warp.sync -1;\n"
)


@pytest.mark.parametrize("space", ["", ".shared", ".shared::cta"])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix(number, trans, space):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    d = np.zeros((32, number), np.uint32)
    address = "[%r33]" if space else "[%rd7]"
    convert = "" if space else "  cvt.u64.u32 %rd7, %r33;\n  cvta.shared.u64 %rd7, %rd7;\n"
    body = FILL.replace("PITCH", "16") + convert
    body += f"  ldmatrix.sync.aligned.m8n8.x{number}{'.trans' * trans}{space}.b16 {registers(10, number)}, {address};\n"
    launch(body + stores(10, number), matrices, d)
    for j in range(number):
        got = d[:, j].copy().view(np.uint16).reshape(8, 8)
        np.testing.assert_array_equal(got, matrices[j].T if trans else matrices[j])


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_stmatrix(number, trans):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    source = np.ascontiguousarray(matrices.reshape(4, 32, 2).view(np.uint32)[..., 0].T)  # [lane, matrix]
    d = np.zeros((32, 4), np.uint32)
    body = "  mov.u32 %r31, rows;\n  mad.lo.u32 %r33, %r30, 16, %r31;\n" + loads(0, number, 4)
    body += (
        f"  stmatrix.sync.aligned.m8n8.x{number}{'.trans' * trans}.shared.b16 [%r33], {registers(0, number)};\n"
        "  bar.warp.sync -1;\n"
    )
    body += f"  setp.lt.u32 %p1, %r30, {8 * number};\n  @%p1 ld.shared.v4.b32 {registers(10, 4)}, [%r33];\n"
    launch(body + stores(10, 4), source, d)
    got = d.view(np.uint16).reshape(4, 8, 8)
    for j in range(number):
        np.testing.assert_array_equal(got[j], matrices[j].T if trans else matrices[j])


def test_movmatrix():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    d = np.zeros((32, 1), np.uint32)
    launch(loads(0, 1, 1) + "  movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r0;\n" + stores(10, 1), matrix, d)
    np.testing.assert_array_equal(d.view(np.uint16).reshape(8, 8), matrix.T)


@pytest.mark.parametrize("pitch, factor", [(16, 1), (80, 1), (128, 8), (64, 4), (32, 2)])
def test_ldmatrix_bank_conflicts(pitch, factor):
    """Eight rows of 16 bytes per matrix: one wavefront each when they fall into different banks."""
    matrices = np.zeros((4, 8, 8), np.uint16)
    d = np.zeros((32, 4), np.uint32)
    fill = FILL.replace("PITCH", str(pitch))
    body = f"  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(10, 4)}, [%r33];\n"
    with_load = launch(fill + body + stores(0, 4), matrices, d)
    without = launch(fill + stores(0, 4), matrices, d)
    assert with_load["shared_ideal_wavefronts"] - without["shared_ideal_wavefronts"] == 4
    assert with_load["shared_wavefronts"] - without["shared_wavefronts"] == 4 * factor


def test_misaligned_row():
    with pytest.raises(hoppersim.Fault) as caught:
        launch(
            FILL.replace("PITCH", "16")
            + "  add.s32 %r33, %r33, 8;\n  ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r33];\n",
            np.zeros(256, np.uint16),
            np.zeros(4, np.uint32),
        )
    assert "misaligned" in caught.value.kind


def test_divergent_mma():
    text = "  setp.lt.u32 %p1, %r30, 16;\n  @%p1 movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r0;\n"
    with pytest.raises(hoppersim.Fault) as caught:
        launch(text, np.zeros(4, np.uint32), np.zeros(4, np.uint32))
    assert caught.value.kind == "divergent aligned instruction"
