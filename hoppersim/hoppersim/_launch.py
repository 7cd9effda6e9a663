"""Launches of kernels from PTX text, and the arrays that they may touch."""

import contextlib
import struct

import numpy as np

from ._control import last_counters
from ._native import native


def _extent(array) -> tuple[int, int]:
    """Address and bytes that a NumPy array or a CPU tensor spans."""
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high - low
    if array.numel() == 0:
        return array.data_ptr(), 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, array.stride()))
    return array.data_ptr(), span * array.element_size()


def is_array(value) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


@contextlib.contextmanager
def registered(*arrays):
    """While the block runs kernels may touch these arrays: NumPy (read-only ones are only read), CPU tensors."""
    simulator = native()
    ranges = {}
    for array in arrays:
        begin, size = _extent(array)
        if size:
            writable = not isinstance(array, np.ndarray) or array.flags.writeable
            known = ranges.get(begin, (0, False))
            ranges[begin] = (max(size, known[0]), writable or known[1])
    added = [begin for begin, (size, writable) in ranges.items() if simulator.add_range(begin, size, writable)]
    try:
        yield
    finally:
        for begin in added:
            simulator.remove_range(begin)


def _bits(value, size: int) -> bytes:
    if isinstance(value, bytes):
        raw = value
    elif is_array(value):
        raw = struct.pack("<Q", address(value))
    elif isinstance(value, float):
        raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
    elif isinstance(value, np.generic):
        raw = value.tobytes()
    else:
        raw = int(value).to_bytes(size, "little", signed=value < 0)
    if len(raw) != size:
        raise ValueError(f"argument {value!r} has {len(raw)} bytes, its parameter {size}")
    return raw


def _triple(value) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values + (1,) * (3 - len(values))


class Module:
    """Kernels of a PTX text, launched directly.

    Raises Fault at once for a text that is no PTX; for a statement that is not modelled when the kernel that holds it
    is launched.
    """

    def __init__(self, ptx: str):
        self._module = native().TextModule(ptx)

    @property
    def kernels(self) -> list[str]:
        return self._module.kernels()

    def launch(self, name: str, grid, block, args=(), *, cluster=(1, 1, 1), shared: int = 0) -> dict:
        """Runs one launch to its end; returns its counters.

        ``args``: arrays and tensors (their address is passed, and they may be touched), int, float, NumPy scalars and
        bytes, one per parameter. ``shared``: dynamic shared bytes.
        """
        parameters = self._module.parameters(name)
        if len(parameters) != len(args):
            raise ValueError(f"{name} takes {len(parameters)} arguments, got {len(args)}")
        packed = bytearray()
        for (_, offset, size), value in zip(parameters, args):
            packed += b"\0" * (offset - len(packed)) + _bits(value, size)
        with registered(*(a for a in args if is_array(a))):
            self._module.launch(name, _triple(grid), _triple(block), bytes(packed), _triple(cluster), shared)
        return last_counters()

    def global_bytes(self, name: str) -> bytes:
        """Current contents of a .global or .const variable."""
        return self._module.global_bytes(name)
