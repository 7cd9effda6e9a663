"""In what dtype the search multiplies."""

from __future__ import annotations

import torch

from jetkernels.model import JetNemotronForCausalLM

PRECISIONS = ("auto", "fp32", "bf16")
NARROW = 256  # width below which `auto` is fp32 everywhere: so small a base needs no speed


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the machine has instructions for products of bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def chosen_precision(precision: str, base: JetNemotronForCausalLM) -> str:
    """What one of PRECISIONS comes to: for auto, bf16 where the machine has it and the base is not NARROW."""
    if precision != "auto":
        return precision
    return "bf16" if base.config.hidden_size >= NARROW and multiplies_bf16(base.device) else "fp32"


def computing(precision: str, device: torch.device) -> torch.autocast:
    """A block in which products are made in this precision.

    bf16: products with weights and attention are, as autocast has it; parameters, the residual stream, norms and
    gradients of parameters stay fp32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
