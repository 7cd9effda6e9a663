"""Which Linear layers may give their weight to a fused op instead of being called."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .fused import PLAIN_TENSORS

_FORWARD = nn.Linear.forward
_announced: set[tuple[str, str]] = set()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs anything beside the forward of its class."""
    return has_own_hooks(module.__dict__) or _has_any_global_hook()


def has_own_hooks(attributes: dict[str, Any]) -> bool:
    """`has_hooks` of a module with these attributes, but for the hooks on all modules."""
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def linears_are_called_by_torch() -> bool:
    """Whether a Linear without hooks of its own does what PyTorch wrote."""
    return nn.Linear.forward is _FORWARD and not _has_any_global_hook()


def plain_weights(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that computes x W^T + b and does nothing else; None if it has to be called instead.

    Adapters, hooks, pruning, parametrizations, offloading and quantisation change what a call of the layer does, and
    its weight alone knows nothing of them. `name`, for people, is used to announce once that and why such a layer is
    called.
    """
    if type(module) is nn.Linear and not has_hooks(module) and nn.Linear.forward is _FORWARD:
        # Much cheaper than two attributes of a module, and on the path of every decoded token.
        parameters = module._parameters
        weight: Tensor | None = parameters.get("weight")
        bias: Tensor | None
        if weight is None:
            # A replica of DataParallel has its tensors as attributes.
            weight, bias = module.weight, module.bias
        else:
            bias = parameters["bias"] if "bias" in parameters else module.bias
        if type(weight) in PLAIN_TENSORS and (bias is None or type(bias) in PLAIN_TENSORS):
            return weight, bias
    if not torch.compiler.is_compiling():
        _announce(module, name)
    return None


def floating_weight(*modules: nn.Module) -> Tensor:
    """The weight of the first module that has one of a floating dtype: where and in what it computes.

    Quantised modules have none. That of a wrapper is the first parameter of what it wraps.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        for found in module.parameters() if weight is None else (weight,):
            if isinstance(found, Tensor) and found.is_floating_point():
                return found
    names = ", ".join(type(module).__qualname__ for module in modules)
    raise RuntimeError(f"one of {names} must have a floating weight, which says where and in what the model computes")


def computing_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module with this weight computes.

    accelerate's offloading leaves the weight on meta between calls and names the device, also inside a wrapper.
    """
    if weight.is_meta:
        for inner in module.modules():
            hook = getattr(inner, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                if (device := getattr(part, "execution_device", None)) is not None:
                    return torch.device(device)
    return weight.device


def _announce(module: nn.Module, name: str) -> None:
    reason = _reason(module)
    if (name, reason) not in _announced:
        _announced.add((name, reason))
        warnings.warn(f"jetkernels: {name} is called as a module, not fused with others: {reason}", stacklevel=3)


def _reason(module: nn.Module) -> str:
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}, not a torch.nn.Linear"
    if _has_any_global_hook():
        return "there is a hook on all modules"
    if "forward" in module.__dict__ or nn.Linear.forward is not _FORWARD:
        return "its forward was replaced"
    if has_hooks(module):
        return "it has hooks"
    return f"its weight is a {type(module.weight).__qualname__}, not a plain tensor"
