"""The gated delta rule of transformers' models (Qwen3-Next, Qwen3.5, OLMo hybrid, ...)."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jetkernels._optional import optional
from jetkernels.integrations._calls import announce, reason_not_served
from jetkernels.integrations._patch import Patch
from jetkernels.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

# Global names of transformers' modules -> the op that decides who serves, and the function that does
_FUNCTIONS: dict[str, tuple[str, Callable]] = {
    "torch_chunk_gated_delta_rule": ("chunk_gated_delta_rule", chunk_gated_delta_rule),
    "torch_recurrent_gated_delta_rule": ("recurrent_gated_delta_rule", fused_recurrent_gated_delta_rule),
}
_POSITIONAL = ("query", "key", "value", "g", "beta")
_KEYWORDS = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens")
_PACKED = "packed sequences (cu_seqlens) without seq_idx, by which transformers' convolution keeps them apart"


def patch_transformers() -> Patch:
    """Lets jetkernels compute the gated delta rule in every model of transformers that has it.

    These are the models whose modules have functions ``torch_chunk_gated_delta_rule`` and
    ``torch_recurrent_gated_delta_rule`` (in 5.23: qwen3_next, qwen3_5, qwen3_5_moe, olmo_hybrid, qwen4_exp), loaded yet
    or not. They are replaced by name, so models that exist already are served too. Gradients, caches, generation and
    ``torch.compile`` work as before; a second derivative raises. A call that is not served goes to what was there, and
    a warning says why, once: tensors on another device, q, k and v of several dtypes, packed sequences that the
    convolution has not kept apart, forward-mode derivatives, ``torch.export``, and on a CUDA device what no kernel of
    this library takes. Their causal convolution has taps that are parameters, not generated ones, and stays
    transformers' own.

    Returns:
        What was replaced. Used as a context manager it is undone at the end of the block, else by
        :meth:`Patch.undo`. What is served already is not replaced again.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Example:
        >>> with patch_transformers() as patched:
        ...     print(patched)
        ...     model.generate(input_ids)
    """
    transformers = optional("transformers", "hf", "patch_transformers")
    patch = Patch("transformers")
    for module in _modules(Path(transformers.__file__).parent):
        for name, (op, function) in _FUNCTIONS.items():
            original = getattr(module, name, None)
            if original is not None and not hasattr(original, "jetkernels") and _is_known(original):
                patch.replace(module, name, _replacement(f"{module.__name__}.{name}", op, function, original))
    return patch


def _modules(transformers: Path) -> Iterator[ModuleType]:
    """Those of its models that define one of the functions. Reading the files is faster than importing all."""
    definitions = [f"\ndef {name}(".encode() for name in _FUNCTIONS]
    for file in sorted(transformers.glob("models/*/modeling_*.py")):
        source = file.read_bytes()
        if any(definition in source for definition in definitions):
            yield importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")


def _is_known(original: Callable) -> bool:
    """Whether it has the arguments that are passed on."""
    names = tuple(inspect.signature(original).parameters)
    return names[:5] == _POSITIONAL and set(names) >= set(_KEYWORDS[:3])  # the originals have no cu_seqlens


def _replacement(name: str, op: str, function: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def gated_delta_rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *more: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        if more:
            reason: str | None = "arguments after beta without their names"
        elif keywords.get("cu_seqlens") is not None and keywords.get("seq_idx") is None:
            reason = _PACKED
        elif torch.compiler.is_exporting():
            reason = "torch.export: the program would need jetkernels"
        else:
            reason = reason_not_served(op, query, key, value, keywords.get("initial_state"))
        if reason is not None:
            announce(name, "transformers", reason)
            return original(query, key, value, g, beta, *more, **keywords)
        # What else a model hands on from its own caller means nothing to the originals either.
        known = {argument: keywords[argument] for argument in _KEYWORDS if argument in keywords}
        return function(query, key, value, g, beta, **known)

    gated_delta_rule.jetkernels = True  # type: ignore[attr-defined]  # so that it is not replaced again
    return gated_delta_rule
