"""csrc/hopper/tma.h: boxes of 1 to 5 dimensions there and back, swizzles as layout.h says, bulk copies."""

import ctypes

import numpy as np
import pytest
from kernel_library import library

import hoppersim

Five = ctypes.c_int * 5


class Problem(ctypes.Structure):
    """jet::hopper::test::CopyProblem."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("origin", "to", "dump")]
        + [(name, ctypes.c_int) for name in ("rank", "swizzle", "add")]
        + [(name, Five) for name in ("extent", "box", "at")]
    )


def aligned(shape) -> np.ndarray:
    count = int(np.prod(shape))
    memory = np.zeros(count + 4, np.float32)
    start = -memory.ctypes.data % 16 // 4
    return memory[start : start + count].reshape(shape)


def window(at: int, box: int, extent: int) -> tuple[slice, slice]:
    """The part of a box that lies inside the tensor: in the tensor's and in the box's coordinates."""
    low, high = max(at, 0), min(at + box, extent)
    return slice(low, high), slice(low - at, high - at)


def copy(extent, box, at, swizzle=16, add=False, **simulate):
    """Dimension 0 first, as TMA counts; the arrays have it last. Returns source, destination, and the box as it lay in
    shared memory.
    """
    origin, to, dump = aligned(extent[::-1]), aligned(extent[::-1]), aligned(int(np.prod(box)))
    origin[...] = np.random.default_rng(5).standard_normal(origin.shape)
    to[...] = 100
    filled = [Five(*values, *[0] * (5 - len(values))) for values in (extent, box, at)]
    problem = Problem(origin.ctypes.data, to.ctypes.data, dump.ctypes.data, len(extent), swizzle, add, *filled)
    message = ctypes.create_string_buffer(512)
    with hoppersim.simulate(**simulate), hoppersim.registered(origin, to, dump):
        failed = library("copies").call("copy_box", ctypes.byref(problem), message)
    assert failed == 0, message.value.decode()
    return origin, to, dump.reshape(box[::-1])


CASES = {
    "1-D, inside": ((64,), (16,), (8,)),
    "1-D, over the end": ((40,), (16,), (28,)),
    "2-D, over both ends": ((20, 10), (8, 6), (-3, 7)),
    "3-D": ((12, 5, 4), (8, 3, 2), (8, 1, -1)),
    "4-D": ((8, 3, 4, 3), (4, 2, 3, 2), (4, 2, -1, 1)),
    "5-D": ((8, 2, 3, 2, 3), (8, 2, 2, 1, 2), (0, 1, 1, 1, 2)),
    "wholly outside": ((16, 4), (8, 2), (16, 0)),
}


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_box(case, add, timing):
    extent, box, at = CASES[case]
    origin, to, dump = copy(extent, box, at, add=add, timing=timing)
    windows = [window(a, b, e) for a, b, e in zip(at[::-1], box[::-1], extent[::-1])]
    inside, of_box = tuple(w[0] for w in windows), tuple(w[1] for w in windows)
    expected_box, expected_to = np.zeros(box[::-1], np.float32), np.full(extent[::-1], 100, np.float32)
    if all(w[0].start < w[0].stop for w in windows):
        expected_box[of_box] = origin[inside]
        expected_to[inside] = origin[inside] + (100 if add else 0)
    np.testing.assert_array_equal(dump, expected_box)
    np.testing.assert_array_equal(to, expected_to)


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzle(swizzle):
    width = swizzle // 4
    origin, to, dump = copy((width, 24), (width, 24), (0, 0), swizzle)
    offsets = np.arange(24 * width) * 4
    swizzled = offsets ^ ((offsets >> 7 & swizzle // 16 - 1) << 4)  # layout.h: swizzled()
    np.testing.assert_array_equal(dump.reshape(-1)[swizzled // 4], origin.reshape(-1))
    np.testing.assert_array_equal(to, origin)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bulk_copies(timing):
    source, to = aligned(1000), aligned(1000)
    source[...] = np.arange(1000)
    message = ctypes.create_string_buffer(512)
    with hoppersim.simulate(timing=timing):
        assert library("copies").call("copy_bytes", source, to, ctypes.c_int(1000), message) == 0
    np.testing.assert_array_equal(to, source + 1)
    counters = hoppersim.last_counters()
    assert (counters["bulk_read_bytes"], counters["bulk_write_bytes"]) == (4000, 4000)


@pytest.mark.parametrize(
    "extent, box, swizzle, text",
    [
        ((10, 4), (8, 2), 16, "from stride[1] must be a multiple of 16 below 2^40 bytes, got 40"),
        ((8, 4), (6, 2), 16, "from box[0] must be a multiple of 16 bytes, got 24"),
        ((64, 4), (16, 2), 32, "from box[0] must be at most the swizzle's row, in bytes, got 64"),
        ((64, 512), (16, 257), 16, "from box[1] must be 1..256, got 257"),
        ((64, 0), (16, 1), 16, "from extent[1] must be 1..2^32, got 0"),
    ],
)
def test_checks(extent, box, swizzle, text):
    with pytest.raises(AssertionError) as caught:
        copy(extent, box, (0, 0), swizzle)
    assert "tensor map: " + text in str(caught.value)
