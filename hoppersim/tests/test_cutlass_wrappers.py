"""CUTLASS's wrappers of barriers, clusters, copies and tensor maps: all that sm_90a kernels may call, called from C++.

``test_every_wrapper_is_called`` finds the wrappers in the headers: each is called in kernels/wrappers_*.cu, or excluded
with a reason.
The tensor-core wrappers are in test_cutlass_mma.py and test_cutlass_gmma.py.
"""

import re

import numpy as np
import pytest
from cutlass_headers import cutlass_source, wrappers
from cutlass_kernels import KERNELS, library

import hoppersim
from hoppersim import tensor_map

TIMINGS = ("early", "late")
HEADERS = (
    "cutlass/arch/barrier.h",
    "cutlass/arch/reg_reconfig.h",
    "cutlass/arch/grid_dependency_control.h",
    "cute/arch/cluster_sm90.hpp",
    "cute/arch/copy_sm50.hpp",
    "cute/arch/copy_sm75.hpp",
    "cute/arch/copy_sm80.hpp",
    "cute/arch/copy_sm90.hpp",
    "cute/arch/copy_sm90_desc.hpp",
    "cute/arch/copy_sm90_tma.hpp",
    "cute/arch/mma_sm90_gmma.hpp",
    "cute/arch/mma_sm80.hpp",
    "cute/arch/mma_sm90.hpp",
)
EXCLUDED = {  # pattern of the name: why
    r"umma_arrive\w*": "tcgen05: needs sm_100",
    r"fence_view_async_tmem_\w+": "tensor memory: needs sm_100",
    r"NamedBarrier::\w+_internal(_unaligned)?": "private: what the public members call",
    r"Cluster\w*::(arrive_and_reset_bytes|reset_bytes|commit)": "deprecated names of members that are called",
    r"to_string|to_CUtensorMap\w+": "host only",
    r"ss_op_selector(_sparse)?|rs_op_selector(_sparse)?|\w*_op_selector\w*": "compile time only",
    r"\w+::fma": "test_cutlass_mma.py and test_cutlass_gmma.py run each",
    r".*::operator.*": "arithmetic of complex numbers, no instruction",
    r"GMMA::\w+|SPARSE::\w+": "test_cutlass_gmma.py",
}

needs_cutlass = pytest.mark.skipif(cutlass_source() is None, reason="needs CUTLASS's headers")


@needs_cutlass
def test_every_wrapper_is_called():
    called = set(re.findall(r"\w+", "".join(path.read_text() for path in KERNELS.glob("wrappers_*.cu"))))
    missing = []
    names = {f.name for f in wrappers(*HEADERS)}
    for name in sorted(names):
        if any(re.fullmatch(pattern, name) for pattern in EXCLUDED):
            continue
        if not set(name.split("::")) <= called:
            missing.append(name)
    assert not missing, "neither called in kernels/wrappers_*.cu nor excluded"
    assert len(names) > 150


ELSEWHERE = {  # files of cute/arch: which test has them, or why none
    r"mma_sm(61|70|75|89)": "test_cutlass_mma.py",
    r"mma_sm90_gmma\w+": "test_cutlass_gmma.py",
    r"\w*_sm1[02]0\w*": "needs sm_100",
    r"config|util": "no instruction beyond address conversions",
    r"copy|mma": "plain C++ that any architecture compiles",
    r"mma_sm90_desc": "descriptor type, host and device alike",
}


@needs_cutlass
def test_every_header_is_walked():
    """What CUTLASS's own kernels for sm_90 use; the older interface of cutlass/arch (mma_sm*.h, memory_sm*.h, wmma*.h)
    is not among it.
    """
    files = {path.stem for path in (cutlass_source() / "include/cute/arch").glob("*.hpp")}
    walked = {name.split("/")[-1].removesuffix(".hpp") for name in HEADERS if name.startswith("cute")}
    assert walked <= files
    assert not [name for name in files - walked if not any(re.fullmatch(pattern, name) for pattern in ELSEWHERE)]


def aligned(shape, dtype=np.float32, alignment=128) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def call(source: str, name: str, *args, timing="early", seed=0) -> dict:
    with hoppersim.simulate(timing=timing, seed=seed):
        assert library(source).call(name, *args) == 0
    return hoppersim.last_counters()


# ---- Barriers and clusters


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers(seed):
    out = np.zeros((11, 128), np.uint32)
    call("wrappers_sync", "run_named_barriers", out, seed=seed)
    thread = np.arange(128)
    for step in range(7):
        np.testing.assert_array_equal(out[step], (thread ^ 96) + 1000 * step)
    for step in range(7, 11):
        np.testing.assert_array_equal(out[step], np.where(thread < 64, 0, thread - 64 + 1000 * step))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(4))
def test_cluster_barriers(seed, timing):
    values = np.random.default_rng(seed).integers(0, 2**32, 128).astype(np.uint32)
    out = np.zeros((2, 8, 64), np.uint32)
    call("wrappers_sync", "run_cluster_barriers", values, out, timing=timing, seed=seed)
    thread = np.arange(64)
    for rank in range(2):
        for step in range(4):
            np.testing.assert_array_equal(out[rank, step], 63 - thread + 1000 * step)
        np.testing.assert_array_equal(out[rank, 4], thread + 5000 + (rank ^ 1))
        np.testing.assert_array_equal(out[rank, 5], 1)
        np.testing.assert_array_equal(out[rank, 6:], values.reshape(2, 64)[:, ::-1])


def test_places():
    out = np.zeros((2, 4, 128, 16), np.uint32)  # [block y, block x, thread, word]
    call("wrappers_sync", "run_places", out)
    for y in range(2):
        for x in range(4):
            expected = [2, 2, 1, x // 2, y, 0, x % 2, 0, 0, 2, 1, 1]
            np.testing.assert_array_equal(out[y, x, :, :12], np.tile(expected, (128, 1)))
    elected = (np.arange(128) % 32 == 0).astype(np.uint32)
    np.testing.assert_array_equal(out[..., 12], np.broadcast_to(elected, (2, 4, 128)))
    np.testing.assert_array_equal(out[..., 13], out[..., 12])
    np.testing.assert_array_equal(out[..., 14], 0)
    peer = np.arange(4)[:, None] % 2 ^ 1
    np.testing.assert_array_equal(out[..., 15], np.broadcast_to(100 + peer, (2, 4, 128)))


# ---- Thread copies


def test_matrix_moves():
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros(19 * 32 + 8 * 128, np.uint32)
    call("wrappers_sync", "run_matrix_moves", matrices, out)
    loaded = out[: 19 * 32].view(np.uint16).reshape(19, 8, 8)
    plain, transposed = list(matrices), list(matrices.transpose(0, 2, 1))
    expected = (
        plain[:1]
        + plain[:2]
        + plain[:4]
        + transposed[:1]
        + transposed[:2]
        + transposed[:4]
        + transposed[:1]
        + plain[:2]
        + transposed[:2]
    )
    np.testing.assert_array_equal(loaded, expected)
    stored = out[19 * 32 :].view(np.uint16).reshape(8, 4, 8, 8)
    for n, (count, turned) in enumerate(
        [(1, False), (2, False), (4, False), (1, True), (2, True), (4, True), (2, False), (2, True)]
    ):
        np.testing.assert_array_equal(stored[n, :count], (transposed if turned else plain)[:count])
        np.testing.assert_array_equal(stored[n, count:], 0)


@pytest.mark.parametrize("timing", TIMINGS)
def test_thread_copies(timing):
    values = aligned((32, 4), np.uint32)
    values[...] = np.random.default_rng(1).integers(1, 2**32, (32, 4))
    out = np.zeros((8, 32), np.uint32)
    call("wrappers_sync", "run_thread_copies", values, out, timing=timing)
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], values[:, 1])
    np.testing.assert_array_equal(out[1], values[:, 2])
    np.testing.assert_array_equal(out[2], np.where(lane % 2 == 0, values[:, 2], 0))
    np.testing.assert_array_equal(out[3], np.where(lane % 3 == 0, values[:, 3], 0))
    # The 2x2 transpose of a pair of lanes: the lower keeps its first word and takes the other's first as second, and so
    # on.
    for row, distance in ((4, 1), (6, 4)):
        low = lane & distance == 0
        np.testing.assert_array_equal(out[row], np.where(low, values[:, 0], values[lane ^ distance, 1]))
        np.testing.assert_array_equal(out[row + 1], np.where(low, values[lane ^ distance, 0], values[:, 1]))


# ---- The copy engine


def problem(maps, at, bytes, rank, *, offsets=(), any_rank=False, multicast=False, add=False, dump) -> np.ndarray:
    """`Problem` of kernels/wrappers_tma.cu."""
    p = aligned(320, np.uint8)
    p[:128], p[128:256] = (np.frombuffer(m, np.uint8) for m in maps)
    words = [*at, *[0] * (5 - len(at)), *offsets, *[0] * (3 - len(offsets)), bytes, rank, any_rank, multicast, add]
    p[256 : 256 + 4 * len(words)] = np.array(words, np.int32).view(np.uint8)
    p[312:320] = np.array([dump.ctypes.data], np.uint64).view(np.uint8)
    return p


def run_tma(name: str, p: np.ndarray, *arrays, timing="early", rest=()) -> None:
    with hoppersim.registered(*arrays):
        call("wrappers_tma", name, p, *rest, timing=timing)


BOXES = {
    1: ((40,), (16,), (28,)),
    2: ((20, 10), (8, 6), (-3, 7)),
    3: ((12, 5, 4), (8, 3, 2), (8, 1, -1)),
    4: ((8, 3, 4, 3), (4, 2, 3, 2), (4, 2, -1, 1)),
    5: ((8, 2, 3, 2, 3), (8, 2, 2, 1, 2), (0, 1, 1, 1, 2)),
}


def window(at: int, size: int, extent: int) -> tuple[slice, slice]:
    low, high = max(at, 0), min(at + size, extent)
    return slice(low, high), slice(low - at, high - at)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("multicast", [False, True])
@pytest.mark.parametrize("any_rank", [False, True])
@pytest.mark.parametrize("rank", BOXES)
def test_boxes(rank, any_rank, multicast, timing):
    extent, box, at = BOXES[rank]  # dimension 0 first; NumPy has it last
    source, target = aligned(extent[::-1]), aligned(extent[::-1])
    source[...] = np.random.default_rng(rank).integers(-99, 99, source.shape)
    target[...] = 1000
    maps = [tensor_map.encode(array, box[::-1]) for array in (source, target)]
    dump = np.full((1 + multicast, *box[::-1]), -1, np.float32)
    add = timing == "late"
    p = problem(maps, at, dump[0].nbytes, rank, any_rank=any_rank, multicast=multicast, add=add, dump=dump)
    run_tma("run_boxes", p, source, target, dump, timing=timing)
    inside = [window(*dimension) for dimension in zip(at, box, extent)][::-1]
    there, here = tuple(w[0] for w in inside), tuple(w[1] for w in inside)
    expected = np.zeros(box[::-1], np.float32)
    expected[here] = source[there]
    for rank_dump in dump:
        np.testing.assert_array_equal(rank_dump, expected)
    stored = np.full_like(target, 1000)
    stored[there] = source[there] + (1000 if add else 0)
    np.testing.assert_array_equal(target, stored)


def test_bulk():
    values, out = aligned(256), aligned(256)
    values[...] = np.arange(256)
    call("wrappers_tma", "run_bulk", values, out, values.nbytes)
    np.testing.assert_array_equal(out, values + 1)


# Spatial extents, corners and strides in the order W, H, D; start of the column; offsets.
COLUMNS = {
    3: ((9,), (-1,), (-1,), (1,), (3,), (2,)),
    4: ((7, 5), (-1, -2), (-1, 0), (2, 1), (1, 0), (1, 2)),
    5: ((5, 4, 3), (0, -1, -1), (-2, -1, 0), (1, 2, 1), (2, 1, -1), (0, 2, 1)),
}


def column_positions(extent, lower, upper, stride, start, pixels):
    """Positions W, H, D and image of the pixels of a column, by the definition of a convolution's output order."""
    axes = [range(low, size + high, step) for size, low, high, step in zip(extent, lower, upper, stride)]
    per_image = int(np.prod([len(axis) for axis in axes]))
    first, scale = 0, 1
    for axis, at in zip(axes, start):
        first += axis.index(at) * scale
        scale *= len(axis)
    for n in range(first, first + pixels):
        position, rest = [], n % per_image
        for axis in axes:
            position.append(axis[rest % len(axis)])
            rest //= len(axis)
        yield position, n // per_image


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("multicast", [False, True])
@pytest.mark.parametrize("any_rank, swizzle", [(False, 0), (True, 0), (False, 32)])
@pytest.mark.parametrize("rank", COLUMNS)
def test_columns(rank, any_rank, swizzle, multicast, timing):
    """im2col: a column of pixels runs through the output positions of a convolution, over the ends of rows and
    images.
    """
    extent, lower, upper, stride, start, offsets = COLUMNS[rank]
    images, channels, pixels, first_channel, first_image = 3, 8, 40, 8, 1
    shape = (images, *extent[::-1], 12)
    inside = 12 - first_channel  # channels; the others of a pixel are outside of the tensor
    source, target = aligned(shape), aligned(shape)
    source[...] = np.random.default_rng(rank).integers(-99, 99, shape)
    target[...] = 1000
    strides = (1, *stride[::-1], 1)
    maps = [
        tensor_map.encode_im2col(array, lower, upper, channels, pixels, element_strides=strides, swizzle=swizzle)
        for array in (source, target)
    ]
    dump = np.full((1 + multicast, pixels, channels), -1, np.float32)
    p = problem(
        maps,
        (first_channel, *start, first_image),
        dump[0].nbytes,
        rank,
        offsets=offsets,
        any_rank=any_rank,
        multicast=multicast,
        dump=dump,
    )
    run_tma("run_columns", p, source, target, dump, timing=timing)
    expected, stored = np.zeros((pixels, channels), np.float32), np.full(shape, 1000, np.float32)
    for n, (position, image) in enumerate(column_positions(extent, lower, upper, stride, start, pixels)):
        moved = [x + o for x, o in zip(position, offsets)]
        if image + first_image < images and all(0 <= x < size for x, size in zip(moved, extent)):
            expected[n, :inside] = source[(image + first_image, *moved[::-1], slice(first_channel, None))]
    for n, (position, image) in enumerate(column_positions(extent, lower, upper, stride, start, pixels)):
        if image + first_image < images and all(0 <= x < size for x, size in zip(position, extent)):
            stored[(image + first_image, *position[::-1], slice(first_channel, None))] = expected[n, :inside]
    in_shared = expected.copy()  # with the swizzle of 32 bytes, every second four pixels have their halves exchanged
    if swizzle:
        in_shared = np.where(np.arange(pixels)[:, None] // 4 % 2, np.roll(expected, 4, 1), expected)
    for rank_dump in dump:
        np.testing.assert_array_equal(rank_dump, in_shared)
    np.testing.assert_array_equal(target, stored)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("difference, kind", [(-32, "expect_tx too small"), (32, "expect_tx too large")])
def test_columns_with_a_wrong_count(difference, kind, timing):
    source, dump = aligned((3, 5, 7, 8)), np.zeros((2, 20, 8), np.float32)
    maps = [tensor_map.encode_im2col(source, (0, 0), (0, 0), 8, 20)] * 2
    p = problem(maps, (0, 0, 0, 0), dump[0].nbytes + difference, 4, offsets=(0, 0), dump=dump)
    with pytest.raises(hoppersim.Fault) as caught:
        run_tma("run_columns", p, source, dump, timing=timing)
    assert caught.value.kind == kind


# ---- Tensor maps that a kernel makes
MAKE = {"in_shared": 0, "in_global": 1, "without_acquire": 2, "without_release": 3, "plain_copy": 4}


def make_map(how: str, timing: str, *, shape=(24, 12), stride_bytes=None) -> tuple[np.ndarray, np.ndarray]:
    """A kernel turns a map of one tensor into that of another; returns what it loaded and what it should have."""
    small, large, work = aligned((6, 8)), aligned((12, 24)), aligned(128, np.uint8)
    small[...], large[...] = -7, np.arange(12 * 24).reshape(12, 24)
    dump = np.zeros((4, 8), np.float32)
    reshaped = how in ("in_shared", "without_acquire")
    at = (16, 9) if reshaped else (4, 3)
    p = problem([tensor_map.encode(small, (4, 8))] * 2, at, dump.nbytes, 2, dump=dump)
    dims = np.array([*shape, 1, 1, 1], np.uint32)
    strides = np.array([0, stride_bytes or large.strides[0], 0, 0, 0], np.uint64)
    run_tma("run_made_map", p, small, large, dump, work, timing=timing, rest=(work, large, dims, strides, MAKE[how]))
    # In global memory only the address is replaced.
    seen = large if reshaped else large.reshape(-1)[: 6 * 8].reshape(6, 8)
    expected = np.zeros_like(dump)
    part = seen[at[1] : at[1] + 4, at[0] : at[0] + 8]
    expected[: part.shape[0], : part.shape[1]] = part
    return dump, expected


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("how", ["in_shared", "in_global"])
def test_made_map(how, timing):
    np.testing.assert_array_equal(*make_map(how, timing))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("how", ["without_acquire", "without_release", "plain_copy"])
def test_made_map_without_fences(how, timing):
    with pytest.raises(hoppersim.Fault) as caught:
        make_map(how, timing)
    assert caught.value.kind == "missing tensormap fence" and "cp.async.bulk.tensor" in str(caught.value)
    assert ("acquire of its address" in str(caught.value)) == (how == "without_acquire")


@pytest.mark.parametrize("changes", [{"stride_bytes": 100}, {"shape": (24, 0)}])
def test_made_map_with_impossible_values(changes):
    with pytest.raises(hoppersim.Fault) as caught:
        make_map("in_shared", "early", **changes)
    assert caught.value.kind == "invalid tensor map"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"lower": (-129, 0)}, "corner"),
        ({"upper": (128, 0)}, "corner"),
        ({"lower": (8, 0), "upper": (-3, 0)}, "empty"),
        ({"channels": 260}, "256"),
        ({"pixels": 1025}, "1024"),
        ({"pixels": 0}, "1024"),
        ({"channels": 3}, "16 bytes"),
        ({"channels": 16, "swizzle": 32}, "span"),
        ({"element_strides": (1, 1, 9, 1)}, "stride"),
    ],
)
def test_encoder_of_columns_refuses(changes, reason):
    arguments = {"lower": (0, 0), "upper": (0, 0), "channels": 8, "pixels": 16, **changes}
    with pytest.raises(ValueError, match=reason):
        tensor_map.encode_im2col(
            aligned((2, 4, 8, 8)),
            arguments.pop("lower"),
            arguments.pop("upper"),
            arguments.pop("channels"),
            arguments.pop("pixels"),
            **arguments,
        )


def test_encoder_of_columns_needs_three_dimensions():
    with pytest.raises(ValueError, match="rank"):
        tensor_map.encode_im2col(aligned((4, 8)), (), (), 8, 16)


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"start": (2, 0)}, "unsupported instruction"),
        ({"start": (-3, 0)}, "unsupported instruction"),
        ({"tile": True}, "invalid tensor map"),
    ],
)
def test_columns_that_are_refused(change, kind):
    source, dump = aligned((3, 5, 7, 8)), np.zeros((2, 20, 8), np.float32)
    im2col = tensor_map.encode_im2col(source, (-1, -2), (-1, 0), 8, 20, element_strides=(1, 1, 2, 1))
    maps = [tensor_map.encode(source, (1, 1, 4, 8)) if change.get("tile") else im2col] * 2
    p = problem(maps, (0, *change.get("start", (1, 0)), 0), dump[0].nbytes, 4, offsets=(0, 0), dump=dump)
    with pytest.raises(hoppersim.Fault) as caught:
        run_tma("run_columns", p, source, dump)
    assert caught.value.kind == kind
