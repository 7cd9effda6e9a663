"""Who computes an op in tests: the definition, the registered ops, the plain functions; and their gradients by argument
name.
"""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from support.arguments import DeltaInputs, cotangents, floating
from support.comparison import DTYPES, ZERO, assert_gradients, assert_outputs, rms
from support.shapes import ids
from torch import Tensor

from jetkernels import ops  # noqa: F401  (registers torch.ops.jet)
from jetkernels.plain import add_rms_norm as plain_add_rms_norm
from jetkernels.plain import apply_dynamic_conv as plain_apply_dynamic_conv
from jetkernels.plain import attention_step as plain_attention_step
from jetkernels.plain import chunk_gated_delta_rule as plain_chunk_gated_delta_rule
from jetkernels.plain import delta_gates as plain_delta_gates
from jetkernels.plain import dynamic_conv as plain_dynamic_conv
from jetkernels.plain import dynamic_conv_step as plain_dynamic_conv_step
from jetkernels.plain import gated_rms_norm as plain_gated_rms_norm
from jetkernels.plain import jet_block_step as plain_jet_block_step
from jetkernels.plain import prefill_gated_delta_rule as plain_prefill_gated_delta_rule
from jetkernels.plain import recurrent_gated_delta_rule as plain_recurrent_gated_delta_rule
from jetkernels.plain import recurrent_gated_delta_rule_commit as plain_recurrent_gated_delta_rule_commit
from jetkernels.plain import recurrent_gated_delta_rule_verify as plain_recurrent_gated_delta_rule_verify
from jetkernels.plain import rms_norm as plain_rms_norm
from jetkernels.plain import swiglu as plain_swiglu
from reference.add_rms_norm import add_rms_norm
from reference.apply_dynamic_conv import apply_dynamic_conv
from reference.attention_step import attention_step
from reference.delta_gates import delta_gates
from reference.dynamic_conv import dynamic_conv
from reference.dynamic_conv_step import dynamic_conv_step
from reference.gated_rms_norm import gated_rms_norm
from reference.jet_block_step import jet_block_step
from reference.linear import linear, linear_int4, linear_int8
from reference.prefill_gated_delta_rule import prefill_gated_delta_rule
from reference.recurrent_gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule
from reference.rms_norm import rms_norm
from reference.swiglu import swiglu

# The definitions, with the arguments of the ops. Those of the ops in place return what the op writes.
REFERENCE: dict[str, Callable] = {
    "chunk_gated_delta_rule": gated_delta_rule,
    "dynamic_conv": dynamic_conv,
    "apply_dynamic_conv": apply_dynamic_conv,
    "recurrent_gated_delta_rule": recurrent_gated_delta_rule,
    "dynamic_conv_step": dynamic_conv_step,
    "prefill_gated_delta_rule": prefill_gated_delta_rule,
    "attention_step": attention_step,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "swiglu": swiglu,
    "delta_gates": delta_gates,
    "linear": linear,
    "linear_int8": linear_int8,
    "linear_int4": linear_int4,
    "jet_block_step": jet_block_step,
}


def listed(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of an op that returns one or several."""
    return outs if isinstance(outs, tuple) else (outs,)


def _differentiate(
    function: Callable, inputs: NamedTuple, grads: Sequence[Tensor | None], convert: Callable
) -> dict[str, Tensor]:
    leaves = {name: convert(t.detach()).requires_grad_() for name, t in floating(inputs).items()}
    outs = listed(function(*inputs._replace(**leaves)))
    used = [(out, grad.to(out.dtype)) for out, grad in zip(outs, grads) if grad is not None and out.requires_grad]
    if not used:  # no tokens and no state: nothing depends on anything
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [out for out, _ in used],
        list(leaves.values()),
        [grad for _, grad in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found))


def reference_gradients(op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """fp64 differentiation of the definition."""
    return _differentiate(REFERENCE[op], inputs, grads, lambda t: t.double())


def dg_floor(outs: tuple[Tensor, Tensor], grads: Sequence[Tensor | None]) -> float:
    """The size of the terms that make dg: <o, dO> of a token and <S1, dS1> of a head.

    dg itself is zero before anything is remembered, and of a few tokens a sum of terms that may nearly cancel. Its
    accuracy under strong decay, where it is tiny, has tests of its own (test_gate_gradient.py).
    """
    dims = (-1, (-2, -1))
    return sum(
        rms((out.double() * grad.double()).sum(d)) for out, grad, d in zip(outs, grads, dims) if grad is not None
    )


def check_outputs(backend: "OpsBackend", op: str, inputs: NamedTuple) -> None:
    """Forward against the definition."""
    assert_outputs(backend(op, *inputs), REFERENCE[op](*inputs), inputs[0].dtype)


def check_gradients(
    backend: "OpsBackend", op: str, inputs: NamedTuple, grads: Sequence[Tensor | None] | None = None
) -> None:
    """Gradients against fp64 differentiation of the definition."""
    grads = cotangents(inputs) if grads is None else grads
    floor = dg_floor(REFERENCE[op](*inputs), grads) if isinstance(inputs, DeltaInputs) else ZERO
    refs = reference_gradients(op, inputs, grads)
    assert_gradients(backend.gradients(op, inputs, grads), refs, inputs[0].dtype, floor)


class OpsBackend:
    """torch.ops.jet, differentiated by autograd."""

    name = "ops"
    functions = torch.ops.jet

    @property
    def is_plain(self) -> bool:
        """Whether plain PyTorch computes: the order of its sums depends on strides and on the number of tokens."""
        return self.name == "plain" or os.environ.get("JETKERNELS_BACKEND") == "plain"

    def __call__(self, op: str, *args):
        return getattr(self.functions, op)(*args)

    def gradients(self, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Gradients by name, for the cotangents ``grads`` of (output, state); ``None`` is a cotangent that is not
        there.
        """
        return _differentiate(
            getattr(self.functions, op), inputs, grads, lambda t: t.clone(memory_format=torch.preserve_format)
        )


class PlainBackend(OpsBackend):
    """The plain PyTorch functions that serve CUDA tensors, here on CPU tensors; differentiated by their backward
    functions.
    """

    name = "plain"
    functions = SimpleNamespace(
        **{
            name: getattr(module, name)
            for module in (
                plain_chunk_gated_delta_rule,
                plain_recurrent_gated_delta_rule,
                plain_dynamic_conv,
                plain_dynamic_conv_step,
                plain_apply_dynamic_conv,
                plain_attention_step,
                plain_jet_block_step,
                plain_prefill_gated_delta_rule,
                plain_recurrent_gated_delta_rule_verify,
                plain_recurrent_gated_delta_rule_commit,
                plain_rms_norm,
                plain_add_rms_norm,
                plain_gated_rms_norm,
                plain_swiglu,
                plain_delta_gates,
            )
            for name in dir(module)
            if name == module.__name__.rpartition(".")[2] or name.endswith("_backward")
        }
    )

    def gradients(self, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        found = getattr(self.functions, op + "_backward")(*grads, *inputs)
        return {name: grad for name, value, grad in zip(inputs._fields, inputs, found) if value is not None}


OPS, PLAIN = OpsBackend(), PlainBackend()
each_backend = pytest.mark.parametrize("backend", (OPS, PLAIN), ids=lambda backend: backend.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)

# dtypes of the arguments and of the pool of states of recurrent_gated_delta_rule
PAIRS = (
    (torch.float64, torch.float64),
    *((dtype, state) for dtype in DTYPES if dtype != torch.float64 for state in (torch.float32, torch.bfloat16)),
)
each_pair = pytest.mark.parametrize("dtype, state_dtype", PAIRS, ids=ids)
