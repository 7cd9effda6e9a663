"""How well a model predicts a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .hybrid import JetNemotronForCausalLM

CHUNK = 256  # tokens of a forward: bounds the memory of the logits


@torch.no_grad()
def text_loss(model: JetNemotronForCausalLM, ids: Tensor) -> float:
    """Mean cross-entropy, in nats per token, of each token of a text but the first, given all before it.

    Args:
        model: in evaluation mode.
        ids: [T] int64, T >= 2.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"text_loss: ids must be [T] with T >= 2, got {list(ids.shape)}")
    ids = ids.to(model.device)
    cache = model.new_cache(1, len(ids) - 1)
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for context, targets in zip(ids[:-1].split(CHUNK), ids[1:].split(CHUNK)):
        logits = model(context[None], cache=cache).logits[0]
        total += F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
    return total.item() / (len(ids) - 1)
