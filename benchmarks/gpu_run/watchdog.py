"""Reads the records that the watchdog of csrc/hopper/barrier.h leaves.

They are in host memory at a fixed address and outlive the device's context.
"""

import ctypes
import functools
import mmap
import os
import struct
import sys

ADDRESS = 0x3A0000000000
SLOTS = 256
RECORD = struct.Struct("<8I")  # block x, y, z; thread; threads of the block; barrier; parity; written
SIZE = SLOTS * RECORD.size
FIXED_NOREPLACE = 0x100000  # <linux/mman.h>
MAPPED = 2  # cudaHostRegisterMapped
LINES = 12


def line(record: tuple[int, ...]) -> str:
    x, y, z, thread, threads, barrier, parity, _ = record
    where = f"block ({x}, {y}, {z}), thread {thread} of {threads}"
    return f"jetkernels watchdog: {where}, waits for parity {parity} of the barrier at shared address {barrier:#x}"


def lines(memory: bytes) -> list[str]:
    """The records that were written; alike ones of other blocks are only counted."""
    found: dict[tuple, list[tuple]] = {}
    for record in RECORD.iter_unpack(memory):
        if record[-1]:
            found.setdefault(record[3:7], []).append(record)
    said = [
        line(records[0]) + (f", and {len(records) - 1} other blocks" if len(records) > 1 else "")
        for records in found.values()
    ]
    return said[:LINES]


@functools.cache
def records() -> ctypes.Array | None:
    """The memory, mapped and made known to this process's device.

    None where the library has no watchdog, or where that is not possible.
    """
    if not os.environ.get("JETKERNELS_LIBRARY"):  # the product's library has no watchdog
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    c = ctypes.CDLL(None, use_errno=True)
    c.mmap.restype, c.mmap.argtypes = (
        ctypes.c_void_p,
        (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long),
    )
    size = -(-SIZE // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED_NOREPLACE
    if c.mmap(ADDRESS, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != ADDRESS:
        print(f"no watchdog: nothing can be mapped at {ADDRESS:#x}", flush=True)
        return None
    torch.cuda.init()
    status = torch.cuda.cudart().cudaHostRegister(ADDRESS, size, MAPPED)
    if int(status) != 0:
        print(
            f"no watchdog: cudaHostRegister says {status}; a kernel that hangs will be called an illegal address",
            flush=True,
        )
        return None
    return (ctypes.c_char * SIZE).from_address(ADDRESS)


def said() -> list[str]:
    memory = records() if "torch" in sys.modules else None  # without torch no kernel has run
    return lines(bytes(memory)) if memory is not None else []
