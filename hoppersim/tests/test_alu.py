"""Arithmetic, logic, conversions, comparisons against NumPy and exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from lane_ptx import HEADER, lanes
from refusal import refusal

RNG = np.random.default_rng(0)
COUNT = 300
EDGES32 = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x10000, 0xAAAAAAAA], np.uint32)
EDGES64 = np.array([0, 1, 63, 64, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF], np.uint64)


def words(dtype, edges=None, seed=0):
    rng = np.random.default_rng(seed)
    bits = np.dtype(dtype).itemsize * 8
    edges = EDGES64.astype(dtype) if bits == 64 else EDGES32.astype(f"u{bits // 8}")
    values = rng.integers(0, 1 << bits, COUNT, dtype=np.uint64).astype(f"u{bits // 8}")
    values[: len(edges)] = rng.permutation(edges)
    return values.view(dtype)


def whole(array):
    return [int(v) for v in array]


def wrap(values, dtype):
    bits = np.dtype(dtype).itemsize * 8
    return np.array([v & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)


TYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}
BINARY = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", BINARY)
def test_integer(op, kind):
    a, b = words(TYPES[kind], seed=1), words(TYPES[kind], seed=2)
    bits = a.itemsize * 8
    expected = wrap([BINARY[op](x, y, bits) for x, y in zip(whole(a), whole(b))], a.dtype)
    np.testing.assert_array_equal(lanes(f"{op}.{kind} %y, %x0, %x1;", [a, b], kind), expected)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_truncates(kind):
    a, b = words(TYPES[kind], seed=3), words(TYPES[kind], seed=4)
    b[b == 0] = 7
    quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(whole(a), whole(b))]
    np.testing.assert_array_equal(lanes(f"div.{kind} %y, %x0, %x1;", [a, b], kind), wrap(quotients, a.dtype))
    rest = [x - q * y for x, y, q in zip(whole(a), whole(b), quotients)]
    np.testing.assert_array_equal(lanes(f"rem.{kind} %y, %x0, %x1;", [a, b], kind), wrap(rest, a.dtype))


@pytest.mark.parametrize("kind, wide", [("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")])
def test_wide_products(kind, wide):
    a, b, c = words(TYPES[kind], seed=5), words(TYPES[kind], seed=6), words(TYPES[wide], seed=7)
    products = [x * y for x, y in zip(whole(a), whole(b))]
    np.testing.assert_array_equal(lanes(f"mul.wide.{kind} %y, %x0, %x1;", [a, b], wide), wrap(products, c.dtype))
    sums = [p + z for p, z in zip(products, whole(c))]
    np.testing.assert_array_equal(lanes(f"mad.wide.{kind} %y, %x0, %x1, %x2;", [a, b, c], wide), wrap(sums, c.dtype))


def test_carries_add_128_bits():
    a, b, c, d = (words(np.uint64, seed=s) for s in range(4))
    body = "add.cc.u64 %w, %x0, %x2;\naddc.u64 %y, %x1, %x3;"
    expected = wrap(
        [(x + (y << 64) + z + (w << 64)) >> 64 for x, y, z, w in zip(whole(a), whole(b), whole(c), whole(d))], np.uint64
    )
    np.testing.assert_array_equal(lanes(body, [a, b, c, d], "u64", ".reg .b64 %w;\n"), expected)
    body = "sub.cc.u64 %w, %x0, %x2;\nsubc.u64 %y, %x1, %x3;"
    expected = wrap(
        [((x + (y << 64)) - (z + (w << 64))) >> 64 for x, y, z, w in zip(whole(a), whole(b), whole(c), whole(d))],
        np.uint64,
    )
    np.testing.assert_array_equal(lanes(body, [a, b, c, d], "u64", ".reg .b64 %w;\n"), expected)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x01, 0x80, 0x6A])
def test_lop3(table):
    a, b, c = (words(np.uint32, seed=s) for s in range(3))
    expected = np.zeros(COUNT, np.uint32)
    for k in range(8):
        if table >> k & 1:
            expected |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    np.testing.assert_array_equal(lanes(f"lop3.b32 %y, %x0, %x1, %x2, {table};", [a, b, c], "b32"), expected)


def bits_reference(op, x, n):
    if op == "popc":
        return bin(x).count("1")
    if op == "clz":
        return n - x.bit_length()
    if op == "brev":
        return int(format(x, f"0{n}b")[::-1], 2)
    return x.bit_length() - 1  # bfind


@pytest.mark.parametrize("op", ["popc", "clz", "brev", "bfind"])
@pytest.mark.parametrize("n", [32, 64])
def test_bit_counts(op, n):
    a = words(np.dtype(f"u{n // 8}"), seed=8)
    out = f"b{n}" if op == "brev" else "u32"
    expected = wrap([bits_reference(op, x, n) for x in whole(a)], f"u{8 if out == 'b64' else 4}")
    np.testing.assert_array_equal(lanes(f"{op}.{'u' if op == 'bfind' else 'b'}{n} %y, %x0;", [a], out), expected)


def test_shifts_and_fields():
    a, b, n = words(np.uint32, seed=9), words(np.uint32, seed=10), (words(np.uint32, seed=11) % 40).astype(np.uint32)
    n[:3] = (31, 32, 33)
    signed = a.view(np.int32)
    pairs = list(zip(whole(a), whole(b), whole(n)))
    np.testing.assert_array_equal(
        lanes("shl.b32 %y, %x0, %x1;", [a, n], "b32"), wrap([x << s if s < 32 else 0 for x, _, s in pairs], np.uint32)
    )
    np.testing.assert_array_equal(
        lanes("shr.u32 %y, %x0, %x1;", [a, n], "b32"), wrap([x >> s for x, _, s in pairs], np.uint32)
    )
    np.testing.assert_array_equal(
        lanes("shr.s32 %y, %x0, %x1;", [signed, n], "s32"),
        wrap([x >> s for x, s in zip(whole(signed), whole(n))], np.int32),
    )
    wrapped = [((y << 32 | x) << (s & 31)) >> 32 for x, y, s in pairs]
    np.testing.assert_array_equal(
        lanes("shf.l.wrap.b32 %y, %x0, %x1, %x2;", [a, b, n], "b32"), wrap(wrapped, np.uint32)
    )
    clamped = [(y << 32 | x) >> min(s, 32) for x, y, s in pairs]
    np.testing.assert_array_equal(
        lanes("shf.r.clamp.b32 %y, %x0, %x1, %x2;", [a, b, n], "b32"), wrap(clamped, np.uint32)
    )
    fields = [x >> 5 & 0x7FF for x in whole(a)]
    np.testing.assert_array_equal(lanes("bfe.u32 %y, %x0, 5, 11;", [a], "b32"), wrap(fields, np.uint32))
    np.testing.assert_array_equal(
        lanes("bfe.s32 %y, %x0, 5, 11;", [a], "s32"), wrap([(f ^ 0x400) - 0x400 for f in fields], np.int32)
    )
    inserted = [(y & ~(0x7FF << 5)) | (x & 0x7FF) << 5 for x, y, _ in pairs]
    np.testing.assert_array_equal(lanes("bfi.b32 %y, %x0, %x1, 5, 11;", [a, b], "b32"), wrap(inserted, np.uint32))


def test_permute():
    a, b, s = words(np.uint32, seed=12), words(np.uint32, seed=13), words(np.uint32, seed=14)
    expected = []
    for x, y, select in zip(whole(a), whole(b), whole(s)):
        source, value = y << 32 | x, 0
        for k in range(4):
            code = select >> 4 * k & 15
            byte = source >> 8 * (code & 7) & 255
            value |= ((255 if byte & 128 else 0) if code & 8 else byte) << 8 * k
        expected.append(value)
    np.testing.assert_array_equal(lanes("prmt.b32 %y, %x0, %x1, %x2;", [a, b, s], "b32"), wrap(expected, np.uint32))


def test_dot_products():
    a, b, c = words(np.uint32, seed=15), words(np.uint32, seed=16), words(np.int32, seed=17)
    dots = (a.view(np.int8).reshape(-1, 4).astype(np.int64) * b.view(np.uint8).reshape(-1, 4)).sum(1) + c
    np.testing.assert_array_equal(lanes("dp4a.s32.u32 %y, %x0, %x1, %x2;", [a, b, c], "s32"), dots.astype(np.int32))


def floats(dtype, seed=0, finite=False):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(COUNT) * np.exp2(rng.integers(-30, 30, COUNT))).astype(dtype)
    if not finite:
        values[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal]
    return rng.permutation(values)


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
@pytest.mark.parametrize(
    "op, reference", [("add.rn", np.add), ("sub.rn", np.subtract), ("mul.rn", np.multiply), ("div.rn", np.divide)]
)
def test_float(op, reference, kind, dtype):
    a, b = floats(dtype, 1), floats(dtype, 2)
    with np.errstate(all="ignore"):
        expected = reference(a, b)
    np.testing.assert_array_equal(lanes(f"{op}.{kind} %y, %x0, %x1;", [a, b], kind), expected)


def rounded(value: Fraction, mantissa: int, mode: str) -> float:
    """A normal number rounded to `mantissa` bits after the leading one."""
    if value == 0:
        return 0.0
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - mantissa)
    scaled = value / unit
    low = scaled.numerator // scaled.denominator
    rest = scaled - low
    up = {
        "rm": False,
        "rp": rest > 0,
        "rz": value < 0 and rest > 0,
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low & 1),
    }[mode]
    return float((low + up) * unit)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float_rounding_modes(mode):
    a, b, c = (floats(np.float32, s, finite=True) for s in (3, 4, 5))
    triples = [tuple(Fraction(float(v)) for v in t) for t in zip(a, b, c)]
    np.testing.assert_array_equal(
        lanes(f"add.{mode}.f32 %y, %x0, %x1;", [a, b], "f32"),
        np.float32([rounded(x + y, 23, mode) for x, y, _ in triples]),
    )
    np.testing.assert_array_equal(
        lanes(f"fma.{mode}.f32 %y, %x0, %x1, %x2;", [a, b, c], "f32"),
        np.float32([rounded(x * y + z, 23, mode) for x, y, z in triples]),
    )
    np.testing.assert_array_equal(
        lanes(f"cvt.{mode}.f32.f64 %y, %x0;", [a * np.float64(1.1)], "f32"),
        np.float32([rounded(Fraction(float(x) * 1.1), 23, mode) for x in a]),
    )


def test_minimum_of_nan_and_zeros():
    a, b = np.float32([np.nan, 1, -0.0, np.nan]), np.float32([2, np.nan, 0.0, np.nan])
    np.testing.assert_array_equal(
        lanes("min.f32 %y, %x0, %x1;", [a, b], "f32").view(np.uint32),
        np.uint32([0x40000000, 0x3F800000, 0x80000000, 0x7FFFFFFF]),
    )
    np.testing.assert_array_equal(
        np.isnan(lanes("max.NaN.f32 %y, %x0, %x1;", [a, b], "f32")), [True, True, False, True]
    )


def test_flush_and_saturate():
    a = np.float32([1e-40, -1e-40, 2.0, -3.0, np.nan, 0.25])
    np.testing.assert_array_equal(
        lanes("mul.ftz.f32 %y, %x0, 0f3F800000;", [a], "f32"), np.float32([0, -0.0, 2, -3, np.nan, 0.25])
    )
    np.testing.assert_array_equal(
        lanes("add.sat.f32 %y, %x0, 0f00000000;", [a], "f32"), np.float32([1e-40, 0, 1, 0, 0, 0.25])
    )


@pytest.mark.parametrize(
    "op, reference",
    [
        ("ex2", np.exp2),
        ("lg2", np.log2),
        ("rcp", lambda x: 1 / x),
        ("rsqrt", lambda x: 1 / np.sqrt(x)),
        ("sqrt", np.sqrt),
        ("sin", np.sin),
        ("cos", np.cos),
        ("tanh", np.tanh),
    ],
)
def test_approximations_are_rounded_truth(op, reference):
    a = np.random.default_rng(6).uniform(0.01, 20, COUNT).astype(np.float32)
    np.testing.assert_allclose(
        lanes(f"{op}.approx.f32 %y, %x0;", [a], "f32"), reference(a.astype(np.float64)), rtol=6.1e-8
    )


def halves(dtype, seed):
    if dtype == "f16":
        return np.random.default_rng(seed).integers(0, 0x7C00, COUNT).astype(np.uint16) | (
            np.random.default_rng(seed + 9).integers(0, 2, COUNT) << 15
        ).astype(np.uint16)
    return (floats(np.float32, seed, finite=True).view(np.uint32) >> 16).astype(np.uint16)


def half_value(bits, dtype) -> Fraction:
    value = bits.view(np.float16) if dtype == "f16" else np.uint32(int(bits) << 16).view(np.float32)
    return Fraction(float(value))


@pytest.mark.parametrize("dtype, mantissa", [("f16", 10), ("bf16", 7)])
def test_half_arithmetic(dtype, mantissa):
    a, b, c = (halves(dtype, s) for s in (1, 2, 3))
    for op, reference in [
        ("add", lambda x, y, z: x + y),
        ("mul", lambda x, y, z: x * y),
        ("fma", lambda x, y, z: x * y + z),
    ]:
        body = f"{op}.rn.{dtype} %y, %x0, %x1{', %x2' if op == 'fma' else ''};"
        got = lanes(body, [a, b, c], "b16")
        for x, y, z, r in zip(a, b, c, got):
            exact = reference(*(half_value(v, dtype) for v in (x, y, z)))
            if dtype == "f16" and not Fraction(2) ** -14 <= abs(exact) <= 65504:
                continue
            assert half_value(r, dtype) == Fraction(rounded(exact, mantissa, "rn")), (
                op,
                hex(x),
                hex(y),
                hex(z),
                hex(r),
            )
    packed = [v.astype(np.uint32) | v[::-1].astype(np.uint32) << 16 for v in (a, b, c)]
    both = lanes(f"fma.rn.{dtype}x2 %y, %x0, %x1, %x2;", packed, "b32")
    single = lanes(f"fma.rn.{dtype} %y, %x0, %x1, %x2;", [a, b, c], "b16")
    np.testing.assert_array_equal(both, single.astype(np.uint32) | single[::-1].astype(np.uint32) << 16)


def test_convert_half():
    bits = np.arange(0x10000, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    back = lanes("cvt.f32.f16 %y, %x0;", [bits], "f32")
    np.testing.assert_array_equal(back[finite], bits.view(np.float16)[finite].astype(np.float32))
    a = np.concatenate([floats(np.float32, 7), np.float32([65519.9, 65520, 2.0**-25, 2.0**-24 * 1.5])])
    with np.errstate(all="ignore"):
        narrow = a.astype(np.float16)
    got = lanes("cvt.rn.f16.f32 %y, %x0;", [a], "b16").view(np.float16)
    np.testing.assert_array_equal(got, narrow)


def test_convert_packed_bf16():
    a, b = floats(np.float32, 8, finite=True), floats(np.float32, 9, finite=True)

    def bf16(x):
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint32)

    np.testing.assert_array_equal(lanes("cvt.rn.bf16x2.f32 %y, %x0, %x1;", [a, b], "b32"), bf16(a) << 16 | bf16(b))


@pytest.mark.parametrize("mode, reference", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
def test_convert_to_integer_saturates(kind, mode, reference):
    a = np.concatenate([floats(np.float32, 10), np.float32([2.5, -2.5, 3e9, -3e9, 1e20, 0.5])])
    info = np.iinfo(TYPES[kind])
    expected = [
        (info.min if kind == "s64" else 0)
        if np.isnan(x)
        else info.max
        if x == np.inf
        else info.min
        if x == -np.inf
        else max(info.min, min(info.max, int(reference(float(x)))))
        for x in a
    ]
    np.testing.assert_array_equal(lanes(f"cvt.{mode}.{kind}.f32 %y, %x0;", [a], kind), np.array(expected, TYPES[kind]))


def test_convert_integers():
    a = words(np.int64, seed=18)
    np.testing.assert_array_equal(
        lanes("cvt.rn.f32.s64 %y, %x0;", [a], "f32"), np.float32([rounded(Fraction(x), 23, "rn") for x in whole(a)])
    )
    np.testing.assert_array_equal(
        lanes("cvt.rz.f64.s64 %y, %x0;", [a], "f64"), np.float64([rounded(Fraction(x), 52, "rz") for x in whole(a)])
    )
    b = words(np.int32, seed=19)
    np.testing.assert_array_equal(lanes("cvt.s32.s8 %y, %x0;", [b], "s32"), b.astype(np.int8).astype(np.int32))
    np.testing.assert_array_equal(
        lanes("cvt.sat.s16.s32 %y, %x0;", [b], "s16"), np.clip(b, -32768, 32767).astype(np.int16)
    )


@pytest.mark.parametrize(
    "name, holds",
    [
        ("eq", np.equal),
        ("ne", lambda a, b: (a < b) | (a > b)),
        ("lt", np.less),
        ("neu", np.not_equal),
        ("geu", lambda a, b: ~(a < b)),
        ("num", lambda a, b: (a == a) & (b == b)),
    ],
)
def test_compare_with_nan(name, holds):
    a, b = floats(np.float32, 11), floats(np.float32, 12)
    b[::3] = a[::3]
    np.testing.assert_array_equal(
        lanes(f"setp.{name}.f32 %p1, %x0, %x1;\nselp.u32 %y, 1, 0, %p1;", [a, b], "u32"), holds(a, b)
    )


def test_compare_joins_predicates():
    a, b = words(np.int32, seed=20), words(np.int32, seed=21)
    body = (
        "setp.gt.s32 %p1, %x0, 0;\nsetp.lt.and.s32 %p2|%p3, %x0, %x1, !%p1;\nselp.u32 %t3, 1, 0, %p2;\n"
        "selp.u32 %t4, 2, 0, %p3;\nor.b32 %y, %t3, %t4;"
    )
    gate = ~(a > 0)
    np.testing.assert_array_equal(lanes(body, [a, b], "u32"), ((a < b) & gate) + 2 * (~(a < b) & gate))


def test_unsupported_names_the_line():
    found = refusal(
        HEADER + ".visible .entry k()\n{\n.reg .b32 %r<4>;\nvadd4.u32.u32.u32 %r1, %r2, %r3, %r1;\nret;\n}\n"
    )
    assert found.kind == "unsupported instruction" and "line 7" in str(found) and "vadd4" in str(found)
