"""Memory that nobody has written holds NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty gives NaN, and freed memory that the allocator may hand out again holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # torch.use_deterministic_algorithms imports inductor first, which takes seconds
    torch._C._set_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
        for bytes_ in [1 << i for i in range(6, 22)]:
            del [torch.full((bytes_ // 4,), torch.nan) for _ in range(4)][:]
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
