"""Loads, stores, atomics in every state space; bounds, alignment, initialisation; sectors and bank conflicts."""

import numpy as np
import pytest
from lane_ptx import HEADER, fault_of, kernel, store

import hoppersim

OUT = np.zeros(1024, np.uint32)
SHARED = ".shared .align 16 .b8 s[4096];\nmov.u32 %r1, s;\n"


def run(body, out=None, threads=32, declare=""):
    out = np.zeros(threads, np.uint32) if out is None else out
    counters = hoppersim.Module(kernel(body, declare=declare)).launch("k", 1, threads, (out,))
    return out, counters


@pytest.mark.parametrize("space", ["shared", "local", "global", "generic"])
@pytest.mark.parametrize(
    "vector, kind, size",
    [
        ("", "u8", 1),
        ("", "s16", 2),
        ("", "b32", 4),
        ("", "b64", 8),
        (".v2", "b32", 4),
        (".v4", "b32", 4),
        (".v2", "b64", 8),
    ],
)
def test_load_store(space, vector, kind, size):
    width = size * (int(vector[2:]) if vector else 1)
    registers = "%rd{}" if size == 8 else "%h{}" if size < 4 else "%r{}"
    names = [registers.format(k) for k in range(2, 2 + width // size)]
    group = names[0] if not vector else "{" + ", ".join(names) + "}"
    body = f".shared .align 16 .b8 s[512];\n.local .align 16 .b8 l[{width}];\n"
    move = {1: "cvt.u8.u32", 2: "cvt.u16.u32", 4: "mov.b32", 8: "cvt.u64.u32"}[size]
    for k, name in enumerate(names):
        body += f"add.u32 %r20, %r0, {k};\n{move} {name}, %r20;\n"
    body += f"mul.lo.u32 %r10, %r0, {width};\n"
    if space in ("shared", "generic"):
        body += "mov.u64 %rd10, s;\ncvt.u64.u32 %rd11, %r10;\nadd.s64 %rd10, %rd10, %rd11;\n"
        body += "cvta.shared.u64 %rd10, %rd10;\n" if space == "generic" else ""
    elif space == "local":
        body += "mov.u64 %rd10, l;\n"
    else:
        body += "cvt.u64.u32 %rd11, %r10;\nadd.s64 %rd10, %rd0, %rd11;\nadd.s64 %rd10, %rd10, 2048;\n"
    suffix = "" if space == "generic" else f".{space}"
    clear = "mov.u64 {}, 0;\n" if size == 8 else "mov.u16 {}, 0;\n" if size < 4 else "mov.u32 {}, 0;\n"
    body += (
        f"st{suffix}{vector}.{kind} [%rd10], {group};\n"
        + "".join(clear.format(n) for n in names)
        + f"ld{suffix}{vector}.{kind} {group}, [%rd10];\nmov.u32 %r21, 0;\n"
    )
    for name in names:
        body += (
            f"cvt.u32.u{8 * max(size, 2)} %r20, {name};\n" + "add.u32 %r21, %r21, %r20;\n"
            if size != 4
            else f"add.u32 %r21, %r21, {name};\n"
        )
    out, _ = run(body + store("%r21"), np.zeros(1024, np.uint32))
    parts = width // size
    np.testing.assert_array_equal(out[:32], parts * np.arange(32) + parts * (parts - 1) // 2)


def test_sign_of_narrow_loads():
    out = np.zeros(32, np.uint32)
    out[0] = 0x80FF
    got, _ = run(
        (
            "ld.global.s8 %r1, [%rd0];\nld.global.u8 %r2, [%rd0+1];\nld.global.s16 %r3, [%rd0];\n"
            "add.s32 %r1, %r1, %r2;\nadd.s32 %r1, %r1, %r3;\nbar.sync 0;\n"
        )
        + store("%r1"),
        out,
    )
    assert np.int32(got[0]) == -1 + 0x80 + 0x80FF - 0x10000


def test_parameters_of_every_kind():
    text = HEADER + (
        ".visible .entry k(.param .align 8 .b8 s[24], .param .u8 c, .param .u64 out)\n{\n.reg .b32 %r<9>;\n"
        ".reg .b64 %rd<9>;\nld.param.u64 %rd0, [out];\n"
    )
    text += (
        "ld.param.u32 %r1, [s+20];\nld.param.u8 %r2, [c];\nmov.b64 %rd1, s;\ncvta.param.u64 %rd2, %rd1;\n"
        "ld.u32 %r3, [%rd2+4];\nadd.u32 %r1, %r1, %r2;\nadd.u32 %r1, %r1, %r3;\nst.global.u32 [%rd0], %r1;\n"
        "ret;\n}\n"
    )
    out = np.zeros(1, np.uint32)
    hoppersim.Module(text).launch("k", 1, 1, (np.arange(6, dtype=np.uint32).tobytes(), 200, out))
    assert out[0] == 5 + 200 + 1


def test_variables_with_initial_values():
    declare = (
        ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1};\n.global .align 4 .u32 number = 7;\n"
        ".global .align 8 .u64 pointer = generic(table)+4;\n.global .align 4 .f32 f = 0f40000000;\n"
    )
    body = (
        "ld.const.u32 %r1, [table+4];\nld.global.u32 %r2, [number];\nmov.u64 %rd1, pointer;\n"
        "ld.global.u64 %rd2, [%rd1];\nld.u32 %r3, [%rd2];\nld.global.f32 %f1, [f];\ncvt.rzi.u32.f32 %r4, %f1;\n"
    )
    body += "add.u32 %r1, %r1, %r2;\nadd.u32 %r1, %r1, %r3;\nadd.u32 %r1, %r1, %r4;\n" + store("%r1")
    out, _ = run(body, declare=declare)
    assert out[0] == 258 + 7 + 258 + 2


def test_dynamic_shared_follows_static():
    body = SHARED + (
        "mov.u32 %r2, d;\nsub.u32 %r3, %r2, %r1;\nmov.u32 %r4, %dynamic_smem_size;\nadd.u32 %r3, %r3, %r4;\n"
        "st.shared.u32 [%r2+60], %r3;\nld.shared.u32 %r3, [d+60];\n"
    )
    out = np.zeros(32, np.uint32)
    hoppersim.Module(kernel(body + store("%r3"), declare=".extern .shared .align 1024 .b8 d[];\n")).launch(
        "k", 1, 32, (out,), shared=64
    )
    assert out[0] == 4096 + 64


ATOMS = {
    "add.u32": lambda old, v: old + v,
    "min.s32": min,
    "max.u32": max,
    "and.b32": lambda old, v: old & v,
    "or.b32": lambda old, v: old | v,
    "xor.b32": lambda old, v: old ^ v,
    "exch.b32": lambda old, v: v,
    "inc.u32": lambda old, v: 0 if old >= v else old + 1,
    "dec.u32": lambda old, v: v if old == 0 or old > v else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMS)
def test_atomics(op, space):
    body = (
        SHARED
        + "mov.u32 %r2, 13;\nst.shared.u32 [%r1], %r2;\nadd.u32 %r5, %r0, 3;\n"
        + ("mov.u64 %rd1, s;\n" if space == "shared" else "mov.u64 %rd1, %rd0;\n")
    )
    body += (
        f"atom.{space}.{op} %r3, [%rd1], %r5;\nld.{space}.u32 %r4, [%rd1];\nbar.sync 0;\n"
        + store("%r3")
        + "st.global.u32 [%rd0+128], %r4;\n"
    )
    out = np.zeros(33, np.uint32)
    out[0] = 13
    run(body, out)
    value, olds = 13, []
    for lane in range(32):
        olds.append(value)
        value = ATOMS[op](value, lane + 3)
    np.testing.assert_array_equal(out, [*olds, value])


def test_floating_atomics():
    out = np.zeros(8, np.float32)
    body = (
        "cvt.rn.f32.u32 %f1, %r0;\nred.global.add.f32 [%rd0], %f1;\nmov.b32 %r2, 0x3F803F80;\n"
        "red.global.add.noftz.bf16x2 [%rd0+4], %r2;\nmov.b32 %r3, 0x3C004000;\n"
        "red.global.add.noftz.f16x2 [%rd0+8], %r3;\n"
    )
    run(body, out)
    assert out[0] == 496 and out.view(np.uint32)[1] == 0x42004200 and out.view(np.uint32)[2] == 0x50005400


def test_compare_and_swap_across_clusters():
    body = (
        "LOOP:\nld.global.u32 %r1, [%rd0];\nadd.u32 %r2, %r1, 1;\natom.global.cas.b32 %r3, [%rd0], %r1, %r2;\n"
        "setp.ne.u32 %p1, %r3, %r1;\n@%p1 bra LOOP;\n"
    )
    out = np.zeros(1, np.uint32)
    with hoppersim.simulate(seed=3, host_threads=2):
        hoppersim.Module(kernel(body)).launch("k", 6, 32, (out,))
    assert out[0] == 192


@pytest.mark.parametrize(
    "body, kind",
    [
        ("ld.global.u32 %r1, [%rd0+4096];", "out-of-bounds global"),
        ("st.global.u32 [%rd0+-4], %r0;", "out-of-bounds global"),
        ("ld.global.u32 %r1, [%rd0+2];", "misaligned"),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+24];", "misaligned"),
        (SHARED + "ld.shared.u32 %r2, [%r1];", "uninitialised shared memory"),
        (SHARED + "st.shared.u32 [%r1+4096], %r0;", "out-of-bounds shared"),
        (SHARED + "st.shared.u32 [4], %r0;", "out-of-bounds shared"),
        (SHARED + "st.shared.b16 [%r1+1], %h1;", "misaligned"),
        (SHARED + "mov.u32 %r2, 16777216;\nst.shared.u32 [%r2+1024], %r0;", "out-of-bounds shared"),
        (".local .align 4 .b8 l[8];\nmov.u64 %rd1, l;\nst.local.u32 [%rd1+8], %r0;", "out-of-bounds local"),
    ],
)
def test_faults(body, kind):
    fault = fault_of(kernel(body), (np.ascontiguousarray(OUT),))
    assert fault.kind == kind and "ptx line" in str(fault) and "warp 0, lane" in str(fault) or "shared" in kind


def test_read_only_arrays_are_protected():
    frozen = np.zeros(32, np.uint32)
    frozen.flags.writeable = False
    assert fault_of(kernel(store("%r0")), (frozen,)).kind == "out-of-bounds global"


@pytest.mark.parametrize("stride, sectors", [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors(stride, sectors):
    out = np.zeros(4096, np.uint8)
    begin = -out.ctypes.data % 128  # an aligned window of the array
    _, counters = run(
        (
            f"mul.lo.u32 %r1, %r0, {stride};\ncvt.u64.u32 %rd1, %r1;\nadd.s64 %rd1, %rd0, %rd1;\n"
            "ld.global.u32 %r2, [%rd1];"
        ),
        out[begin : begin + 2048],
    )
    assert (
        counters["global_read_sectors"] == sectors
        and counters["global_read_bytes"] == 128
        and counters["global_write_sectors"] == 0
    )


@pytest.mark.parametrize("stride, wavefronts", [(4, 1), (8, 2), (128, 32), (0, 1), (132 - 128, 1)])
def test_bank_conflicts(stride, wavefronts):
    _, counters = run(SHARED + f"mad.lo.u32 %r2, %r0, {stride}, %r1;\nst.shared.u32 [%r2], %r1;")
    assert (counters["shared_accesses"], counters["shared_wavefronts"], counters["shared_ideal_wavefronts"]) == (
        1,
        wavefronts,
        1,
    )


def test_wide_shared_accesses_go_in_phases():
    _, counters = run(SHARED + "mad.lo.u32 %r2, %r0, 16, %r1;\nst.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0};")
    assert (counters["shared_wavefronts"], counters["shared_ideal_wavefronts"]) == (4, 4)
    _, counters = run(SHARED + "mad.lo.u32 %r2, %r0, 128, %r1;\nst.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0};")
    assert (counters["shared_wavefronts"], counters["shared_ideal_wavefronts"]) == (32, 4)
