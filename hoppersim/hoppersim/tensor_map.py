"""Tensor maps for kernels launched from PTX text: the simulator's cuTensorMapEncodeTiled, called from Python."""

import ctypes
import functools

import numpy as np

import hoppersim

TYPES = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "u64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 8, "bf16": 9}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_NUMPY = {
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "int32": "s32",
    "uint64": "u64",
    "int64": "s64",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(hoppersim.library_folder() / "libhoppersim.so"))
    library.hoppersim_tensor_map_error.restype = ctypes.c_char_p
    return library


def encode(
    array: np.ndarray, box, *, swizzle: int = 0, nan: bool = False, element_strides=None, type: str | None = None
) -> bytes:
    """128 bytes that describe ``array``; ``box`` and ``element_strides`` in NumPy order (contiguous dimension last).

    Raises ValueError with the reason when the driver would refuse.
    """
    rank = array.ndim
    storage = ctypes.create_string_buffer(192)
    aligned = -(-ctypes.addressof(storage) // 64) * 64
    u64, u32 = ctypes.c_uint64 * 5, ctypes.c_uint32 * 5
    code = _library().hoppersim_encode_tensor_map(
        ctypes.c_void_p(aligned),
        TYPES[type or _NUMPY[array.dtype.name]],
        rank,
        ctypes.c_void_p(array.ctypes.data),
        u64(*array.shape[::-1]),
        u64(*array.strides[-2::-1]),
        u32(*tuple(box)[::-1]),
        u32(*tuple(element_strides or (1,) * rank)[::-1]),
        SWIZZLES[swizzle],
        int(nan),
    )
    if code:
        raise ValueError(f"CUresult {code}: {_library().hoppersim_tensor_map_error().decode()}")
    return ctypes.string_at(aligned, 128)


def encode_im2col(
    array: np.ndarray,
    lower,
    upper,
    channels: int,
    pixels: int,
    *,
    swizzle: int = 0,
    nan: bool = False,
    element_strides=None,
    type: str | None = None,
) -> bytes:
    """The same for columns of pixels; ``lower`` and ``upper``: corners in the order W, H, D."""
    rank = array.ndim
    storage = ctypes.create_string_buffer(192)
    aligned = -(-ctypes.addressof(storage) // 64) * 64
    u64, u32, i32 = ctypes.c_uint64 * 5, ctypes.c_uint32 * 5, ctypes.c_int * 3
    code = _library().hoppersim_encode_im2col_map(
        ctypes.c_void_p(aligned),
        TYPES[type or _NUMPY[array.dtype.name]],
        rank,
        ctypes.c_void_p(array.ctypes.data),
        u64(*array.shape[::-1]),
        u64(*array.strides[-2::-1]),
        i32(*lower),
        i32(*upper),
        channels,
        pixels,
        u32(*tuple(element_strides or (1,) * rank)[::-1]),
        SWIZZLES[swizzle],
        int(nan),
    )
    if code:
        raise ValueError(f"CUresult {code}: {_library().hoppersim_tensor_map_error().decode()}")
    return ctypes.string_at(aligned, 128)
