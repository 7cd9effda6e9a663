"""Checks of what a call of the model is given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless input_ids are [B, T] integers below vocab_size."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if _values_at_hand(input_ids):
        for value in map(int, input_ids.aminmax()):
            if not 0 <= value < vocab_size:
                raise ValueError(f"input_ids must be in 0..{vocab_size - 1}, got {value}")


def _values_at_hand(x: Tensor) -> bool:
    """Whether there are values to look at, without waiting for a device.

    There are none in a compiled program, under vmap or torch.func.grad.
    """
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def check_labels(labels: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless labels are those of input_ids: integers below vocab_size, or -100."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.device != input_ids.device:
        raise ValueError(f"labels must be on {input_ids.device}, like input_ids, got {labels.device}")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must be {list(input_ids.shape)}, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if _values_at_hand(labels):
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"labels must be in 0..{vocab_size - 1}, or -100 for none, got {wrong[0].item()}")
