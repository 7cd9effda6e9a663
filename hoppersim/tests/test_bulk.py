"""cp.async, cp.async.bulk, cp.async.bulk.tensor, their reductions and groups, against NumPy; and what their misuse is
reported as.
"""

import itertools

import numpy as np
import pytest
from async_ptx import both_timings, finding, kernel, launch
from refusal import refusal

import hoppersim
from hoppersim import tensor_map

RNG = np.random.default_rng(0)
BAR = "mbarrier.init.shared::cta.b64 [%bar], 1;\nfence.mbarrier_init.release.cluster;\n"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {};\n"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], {}, [%bar];\n"
WAIT = "WAIT(%bar,0)\n"
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%a1], [%buffer], {};\n"
DONE = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 128: sectors are counted, and a tensor's address must be a multiple of 16."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    begin = -memory.ctypes.data % 128
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def words(count: int) -> np.ndarray:
    return aligned(RNG.integers(0, 2**32, count, dtype=np.uint32))


# ---- cp.async

PER_THREAD = """
mul.lo.u32 %r1, %tid, {size};
add.u32 %r2, %buffer, %r1;
cvt.u64.u32 %rd1, %r1;
add.u64 %rd2, %a0, %rd1;
add.u64 %rd3, %a1, %rd1;
{copy}
"""
DUMP = "".join(f"ld.shared.u32 %r5, [%r2+{b}];\nst.global.u32 [%rd3+{b}], %r5;\n" for b in range(0, 16, 4))


@both_timings
@pytest.mark.parametrize(
    "size, cache, kept", [(4, "ca", 4), (8, "ca", 8), (16, "ca", 16), (16, "cg", 16), (16, "cg", 4), (8, "ca", 0)]
)
def test_cp_async(size, cache, kept, timing):
    source, out = words(128), np.zeros(128, np.uint32)
    copy = (
        f"mov.u32 %r9, {kept};\ncp.async.{cache}.shared.global.L2::128B [%r2], [%rd2], {size}, %r9;\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;"
    )
    dump = "".join(f"ld.shared.u32 %r5, [%r2+{b}];\nst.global.u32 [%rd3+{b}], %r5;\n" for b in range(0, size, 4))
    counters = launch(kernel(PER_THREAD.format(size=size, copy=copy) + dump, arrays=2), (source, out), timing=timing)
    expected = source[: 8 * size].reshape(32, -1).copy()
    expected[:, kept // 4 :] = 0
    assert (out[: 8 * size] == expected.ravel()).all()
    assert counters["global_read_sectors"] == (size if kept else 0)


@both_timings
def test_cp_async_groups_complete_in_order(timing):
    copies = "".join(
        f"cp.async.ca.shared.global [%r2+{b}], [%rd2+{b}], 4;\ncp.async.commit_group;\n" for b in (0, 4, 8, 12)
    )
    read = "ld.shared.u32 %r5, [%r2+{0}];\nst.global.u32 [%rd3+{0}], %r5;\n"
    body = PER_THREAD.format(size=16, copy=copies) + "cp.async.wait_group 2;\n" + read.format(0) + read.format(4)
    source, out = words(128), np.zeros(128, np.uint32)
    launch(
        kernel(body + "cp.async.wait_all;\n" + read.format(8) + read.format(12), arrays=2), (source, out), timing=timing
    )
    assert (out == source).all()
    assert finding(body + read.format(8), (source, out), timing=timing).kind == "read while a copy is in flight"


@both_timings
@pytest.mark.parametrize("noinc, count", [(".noinc", 32), ("", 1)])
def test_cp_async_arrives_on_a_barrier(noinc, count, timing):
    """Without .noinc the arrivals are on top of the expected one, which follows."""
    copy = (
        "cp.async.cg.shared.global [%r2], [%rd2], 16;\n" + f"cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%bar];\n"
    )
    own = "" if noinc else "@!%p0 mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
    init = (
        f"setp.ne.u32 %p0, %tid, 0;\n@!%p0 mbarrier.init.shared::cta.b64 [%bar], {count};\nbar.warp.sync 0xffffffff;\n"
    )
    source, out = words(128), np.zeros(128, np.uint32)
    body = init + PER_THREAD.format(size=16, copy=copy) + own
    launch(kernel(body + WAIT + DUMP, arrays=2), (source, out), timing=timing)
    assert (out == source).all()
    assert finding(body + DUMP, (source, out), timing=timing).kind == "read while a copy is in flight"


# ---- Bulk


@both_timings
@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_bulk_there_and_back(space, timing):
    source, out = words(1024), np.zeros(1024, np.uint32)
    hint = "cp.async.bulk.prefetch.L2.global [%a0], 4096;\nmov.u64 %rd5, 0;\n"
    load = (
        LOAD.format(4096)
        .replace("shared::cluster", space)
        .replace("bytes [", "bytes.L2::cache_hint [")
        .replace("[%bar]", "[%bar], %rd5")
    )
    counters = launch(
        kernel(BAR + EXPECT.format(4096) + hint + load + WAIT + STORE.format(4096) + DONE, arrays=2),
        (source, out),
        threads=1,
        timing=timing,
    )
    assert (out == source).all()
    assert counters["bulk_read_bytes"] == counters["bulk_write_bytes"] == 4096


REDUCTIONS = [
    *itertools.product(["add", "min", "max"], ["u32", "s32", "u64"]),
    *itertools.product(["inc", "dec"], ["u32"]),
    *itertools.product(["and", "or", "xor"], ["b32", "b64"]),
    *itertools.product(["min", "max"], ["s64", "f16"]),
    *itertools.product(["add"], ["f32", "f64", "f16"]),
]
NUMPY = {
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def numpy_reduce(op: str, old, new):
    match op:
        case "inc":
            return np.where(old >= new, 0, old + 1).astype(old.dtype)
        case "dec":
            return np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype)
    names = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    return names[op](old, new)


def random_values(dtype, count: int) -> np.ndarray:
    if np.issubdtype(dtype, np.floating):
        return aligned(RNG.standard_normal(count).astype(dtype))
    return aligned(np.frombuffer(RNG.bytes(count * np.dtype(dtype).itemsize), dtype))


@pytest.mark.parametrize("op, kind", REDUCTIONS)
def test_bulk_reductions(op, kind):
    source, target = random_values(NUMPY[kind], 64), random_values(NUMPY[kind], 64)
    if op in ("inc", "dec"):
        source, target = source % 5, target % 5
    expected = numpy_reduce(op, target, source)
    name = f"{op}.noftz" if (op, kind) == ("add", "f16") else op
    reduce = (
        STORE.format(source.nbytes)
        .replace("cp.async.bulk", "cp.reduce.async.bulk")
        .replace("bulk_group", f"bulk_group.{name}.{kind}")
    )
    launch(
        kernel(BAR + EXPECT.format(source.nbytes) + LOAD.format(source.nbytes) + WAIT + reduce + DONE, arrays=2),
        (source, target),
        threads=1,
    )
    assert (target == expected).all()


def test_f32_reduction_flushes_subnormals():
    source, target = np.full(4, 1e-40, np.float32), np.full(4, -2e-40, np.float32)
    reduce = (
        STORE.format(16).replace("cp.async.bulk", "cp.reduce.async.bulk").replace("bulk_group", "bulk_group.add.f32")
    )
    launch(
        kernel(BAR + EXPECT.format(16) + LOAD.format(16) + WAIT + reduce + DONE, arrays=2), (source, target), threads=1
    )
    assert (target == 0).all()


@both_timings
def test_read_groups_free_the_buffer_before_the_bytes_are_out(timing):
    """After .read the stage may be filled again; the store must still bring the old bytes, and may finish after the
    kernel.
    """
    fill = (
        "st.shared.u32 [%buffer], {0};\nst.shared.u32 [%buffer+4], {0};\nst.shared.u32 [%buffer+8], {0};\n"
        "st.shared.u32 [%buffer+12], {0};\n"
    )
    fence = "fence.proxy.async.shared::cta;\n"
    first = (
        "mov.u32 %r1, 11;\nmov.u32 %r2, 22;\n"
        + fill.format("%r1")
        + fence
        + STORE.format(16)
        + "cp.async.bulk.commit_group;\n"
    )
    second = fill.format("%r2") + fence + STORE.format(16).replace("%a1", "%a0")
    read = "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\n"
    a, b = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    launch(
        kernel(first + "cp.async.bulk.wait_group.read 0;\n" + second + read, arrays=2), (a, b), threads=1, timing=timing
    )
    assert (b == 11).all() and (a == 22).all()
    assert finding(first + second + read, (a, b), threads=1, timing=timing).kind == "overwritten while read"
    assert (
        finding(first + "cp.async.bulk.wait_group.read 1;\n" + second + read, (a, b), threads=1, timing=timing).kind
        == "overwritten while read"
    )


GLOBAL = LOAD.format(64)
FAULTS = {
    "size": (LOAD.format(24), "misaligned bulk copy"),
    "global address": (GLOBAL.replace("[%a0]", "[%a0+8]"), "misaligned bulk copy"),
    "shared address": (GLOBAL.replace("[%buffer]", "[%buffer+8]"), "misaligned bulk copy"),
    "global bounds": (GLOBAL.replace("[%a0]", "[%a0+16352]"), "out-of-bounds global"),
    "shared bounds": (GLOBAL.replace("[%buffer]", "[%buffer+16777216]"), "out-of-bounds shared"),
    "no barrier": (GLOBAL.replace("[%bar]", "[%bar1]"), "uninitialised mbarrier"),
    "read before the wait": (GLOBAL + "ld.shared.u32 %r1, [%buffer];", "read while a copy is in flight"),
    "written before the wait": (GLOBAL + "st.shared.u32 [%buffer], 1;", "overwritten while a copy is in flight"),
    "copied over before the wait": (GLOBAL + GLOBAL, "overwritten while a copy is in flight"),
    "nobody waits": (GLOBAL, "exit with a load in flight"),
    "store not committed": (GLOBAL + WAIT + STORE.format(16).replace("%a1", "%a0"), "exit with a copy in flight"),
    "store not waited for": (
        GLOBAL + WAIT + STORE.format(16).replace("%a1", "%a0") + "cp.async.bulk.commit_group;",
        "exit with a copy in flight",
    ),
    "store of nothing": (STORE.format(16).replace("%a1", "%a0") + DONE, "uninitialised shared memory"),
    "store without fence": (
        GLOBAL + WAIT + "st.shared.u32 [%buffer], 1;\n" + STORE.format(16).replace("%a1", "%a0") + DONE,
        "missing proxy fence",
    ),
    "cp.async never waited for": (
        GLOBAL + WAIT + "cp.async.ca.shared.global [%buffer+128], [%a0], 4;",
        "exit with a load in flight",
    ),
}


@both_timings
@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, timing):
    body, kind = FAULTS[name]
    found = finding(BAR + EXPECT.format(64) + body, threads=1, timing=timing)
    assert found.kind == kind, str(found)
    assert "line " in str(found) and "kernel k" in str(found)


# ---- Tensor copies


def tensor_load(rank: int) -> str:
    coordinates = ", ".join(f"%r{10 + d}" for d in range(rank))
    return (
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[%buffer], [%m0, {{{coordinates}}}], [%bar];\n"
    )


def tensor_store(rank: int, map: str, reduce: str = "") -> str:
    coordinates = ", ".join(f"%r{10 + d}" for d in range(rank))
    name = (
        f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{reduce}"
        if reduce
        else f"cp.async.bulk.tensor.{rank}d.global.shared::cta"
    )
    return f"{name}.bulk_group [{map}, {{{coordinates}}}], [%buffer];\n"


def at(start) -> str:
    return "".join(f"mov.s32 %r{10 + d}, {c};\n" for d, c in enumerate(reversed(start)))


def image(array: np.ndarray, box, start, *, fill=0, strides=None) -> np.ndarray:
    """The box as dense rows, by NumPy."""
    strides = strides or (1,) * array.ndim
    grids = [c + s * np.arange(-(-n // s)) for n, s, c in zip(box, strides, start)]
    inside = np.ones([len(g) for g in grids], bool)
    for axis, (grid, extent) in enumerate(zip(grids, array.shape)):
        inside &= ((grid >= 0) & (grid < extent)).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    clipped = np.ix_(*(np.clip(g, 0, e - 1) for g, e in zip(grids, array.shape)))
    return np.where(inside, array[clipped], np.array(fill, array.dtype))


def swizzle(rows: np.ndarray, span: int) -> np.ndarray:
    """Row after row of `span` bytes: the 16-byte units of a row are exchanged by the number of its 128-byte line."""
    units = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16)
    if span == 0:
        return units.ravel()
    out = np.empty_like(units)
    for unit in range(len(units)):
        line = unit // 8 % (span // 16)
        out[unit ^ line] = units[unit]
    return out.ravel()


def dumped(array: np.ndarray, map: bytes, start, count: int, timing: str) -> tuple[np.ndarray, dict]:
    """What a load of `count` bytes leaves in shared memory, and the counters."""
    out, rank = np.zeros(count, np.uint8), array.ndim
    body = (
        BAR
        + at(start)
        + "prefetch.tensormap [%m0];\n"
        + EXPECT.format(count)
        + tensor_load(rank)
        + WAIT
        + STORE.format(count).replace("%a1", "%a0")
        + DONE
    )
    with hoppersim.registered(array):
        counters = launch(kernel(body, arrays=1, maps=1, bytes=max(1024, count)), (map, out), threads=1, timing=timing)
    return out, counters


@both_timings
@pytest.mark.parametrize("span, dtype", list(itertools.product([0, 32, 64, 128], [np.uint8, np.float16, np.float32])))
def test_tensor_swizzles(span, dtype, timing):
    inner = (span or 96) // np.dtype(dtype).itemsize
    array = random_values(dtype, 40 * 2 * inner).reshape(40, 2 * inner)
    box, start = (24, inner), (8, inner)
    out, _ = dumped(array, tensor_map.encode(array, box, swizzle=span), start, 24 * inner * array.itemsize, timing)
    assert (out == swizzle(image(array, box, start), span)).all()


SHAPES = {
    "inside 1d": ((64,), (16,), (8,)),
    "beyond 1d": ((60,), (16,), (52,)),
    "before 1d": ((64,), (16,), (-4,)),
    "far outside": ((64,), (16,), (-100,)),
    "corner 2d": ((20, 40), (8, 16), (-3, 30)),
    "3d": ((5, 12, 40), (2, 4, 8), (4, -1, 36)),
    "4d": ((3, 4, 5, 16), (2, 3, 2, 8), (-1, 2, 4, 12)),
    "5d": ((2, 3, 4, 5, 8), (2, 2, 3, 2, 4), (1, -1, 2, 4, -2)),
}


@both_timings
@pytest.mark.parametrize("name", SHAPES)
def test_tensor_ranks_and_bounds(name, timing):
    shape, box, start = SHAPES[name]
    array = random_values(np.float32, int(np.prod(shape[:-1])) * (-(-shape[-1] // 4) * 4)).reshape(*shape[:-1], -1)[
        ..., : shape[-1]
    ]
    for nan in (False, True):
        out, counters = dumped(array, tensor_map.encode(array, box, nan=nan), start, int(np.prod(box)) * 4, timing)
        np.testing.assert_array_equal(out.view(np.float32), image(array, box, start, fill=np.nan if nan else 0).ravel())
        inside = image(np.ones(shape, np.float32), box, start).sum()
        assert counters["bulk_read_bytes"] == 4 * inside


def test_element_strides():
    array = random_values(np.float32, 30 * 16).reshape(30, 16)
    out, _ = dumped(array, tensor_map.encode(array, (9, 8), element_strides=(2, 1)), (1, 4), 5 * 8 * 4, "early")
    assert (out.view(np.float32) == image(array, (9, 8), (1, 4), strides=(2, 1)).ravel()).all()


@both_timings
@pytest.mark.parametrize("span", [0, 64, 128])
@pytest.mark.parametrize("reduce", ["", "add", "min"])
def test_tensor_store_clips(span, reduce, timing):
    dtype = np.float16
    inner = (span or 32) // 2
    source, target = (
        random_values(dtype, 16 * inner).reshape(16, inner),
        random_values(dtype, 12 * 3 * inner).reshape(12, 3 * inner),
    )
    start = (-2, 2 * inner + 8)
    expected = target.copy()
    kept = expected[:12, start[1] :]
    moved = source[2:14, : inner - 8]
    kept[...] = numpy_reduce(reduce, kept, moved) if reduce else moved
    body = (
        BAR
        + at((0, 0))
        + EXPECT.format(source.nbytes)
        + tensor_load(2)
        + WAIT
        + at(start)
        + tensor_store(2, "%m1", reduce)
        + DONE
    )
    maps = (tensor_map.encode(source, (16, inner), swizzle=span), tensor_map.encode(target, (16, inner), swizzle=span))
    with hoppersim.registered(source, target):
        launch(kernel(body, arrays=0, maps=2), maps, threads=1, timing=timing)
    assert (target == expected).all()


@both_timings
@pytest.mark.parametrize("span", [0, 32])
def test_clipped_elements_need_not_be_written(span, timing):
    """Two rows of 32 bytes, of which the tensor has the first row's first 16."""
    target = aligned(np.zeros((1, 16), np.float32))
    body = (
        at((0, 12))
        + "mov.u32 %r1, 0x3f800000;\nst.shared.v4.u32 [%buffer], {%r1, %r1, %r1, %r1};\nfence.proxy.async;\n"
    )
    maps = (tensor_map.encode(target, (2, 8), swizzle=span),)
    with hoppersim.registered(target):
        launch(kernel(body + tensor_store(2, "%m0") + DONE, arrays=0, maps=1), maps, threads=1, timing=timing)
        assert target.tolist() == [[0] * 12 + [1] * 4]
        with pytest.raises(hoppersim.Fault, match="uninitialised shared memory"):
            launch(
                kernel(body + at((0, 8)) + tensor_store(2, "%m0") + DONE, arrays=0, maps=1),
                maps,
                threads=1,
                timing=timing,
            )


def test_tensor_faults():
    array = np.zeros((32, 32), np.float32)
    map = tensor_map.encode(array, (8, 8))
    begin = BAR + EXPECT.format(256) + at((0, 0))
    out = np.zeros(64, np.uint32)
    with hoppersim.registered(array):
        cases = {
            tensor_load(2).replace("[%buffer]", "[%buffer+64]"): "misaligned bulk copy",
            at((0, 0, 0)) + tensor_load(3): "invalid tensor map",
            tensor_load(2).replace("%m0", "%a0"): "invalid tensor map",
            tensor_load(2): "exit with a load in flight",
        }
        for body, kind in cases.items():
            assert finding(begin + body, (map, out), threads=1, maps=1).kind == kind
    assert finding(begin + tensor_load(2) + WAIT, (map, out), threads=1, maps=1).kind == "out-of-bounds global"


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(box=(257, 8)), "box dimension"),
        (dict(box=(8, 3)), "multiple of 16 bytes"),
        (dict(box=(8, 16), swizzle=32), "swizzle span"),
        (dict(box=(0, 8)), "box dimension"),
        (dict(box=(8, 8), element_strides=(9, 1)), "element stride"),
        (dict(box=(8, 8), array=np.zeros((8, 9), np.float32)), "stride must be a multiple of 16"),
        (dict(box=(8, 8), array=aligned(np.zeros((8, 12), np.float32))[:, 1:9]), "address"),
        (dict(box=(8, 8), array=np.zeros((8, 8), np.int32), nan=True), "floating-point"),
    ],
)
def test_what_the_driver_refuses(change, reason):
    arguments = {"array": np.zeros((64, 32), np.float32), **change}
    with pytest.raises(ValueError, match=reason):
        tensor_map.encode(arguments.pop("array"), arguments.pop("box"), **arguments)


@pytest.mark.parametrize(
    "line",
    [
        (
            "cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
            "[%buffer], [%rd1, {%r1, %r2}], [%bar];"
        ),
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd1], [%buffer], 16, %h1;",
        "cp.async.cg.shared.global [%buffer], [%rd1], 8;",
    ],
)
def test_unsupported(line):
    found = refusal(kernel(line))
    assert found.kind == "unsupported instruction"
