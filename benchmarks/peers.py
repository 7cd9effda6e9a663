"""The peers: how each is imported and called. Arguments are adapted before the clock runs; ``adapters`` says how.

A peer is a function of the inputs that returns (run, read): ``run()`` is what is timed, ``read(run())`` is (output,
final state or None) as our op would return them.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import adapters
from benchmarks.adapters import Inputs

Run = Callable[[], object]
Read = Callable[[object], tuple[Tensor, Tensor | None]]


class Peer(NamedTuple):
    name: str
    load: Callable[[], Callable]  # imports it: the function that is handed to prepare; ImportError says what is missing
    prepare: Callable[..., tuple[Run, Read]]
    note: str = ""


# What is imported


def transformers_delta_rule():
    """The torch functions of transformers' Qwen3-Next: (chunk, recurrent). Their q, k, v are [B, T, H, K or V]."""
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    # Where flash-linear-attention is installed the names stand for its functions.
    return inspect.unwrap(peer.torch_chunk_gated_delta_rule), inspect.unwrap(peer.torch_recurrent_gated_delta_rule)


def _fla(name: str) -> Callable[[], Callable]:
    def load():
        import fla.ops.gated_delta_rule as peer

        return getattr(peer, name)

    return load


def _flash_qla():
    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule


def _flashinfer(module: str, name: str) -> Callable[[], Callable]:
    def load():
        import importlib

        return getattr(importlib.import_module(f"flashinfer.{module}"), name)

    return load


def _plain(op: str, function: str = "") -> Callable[[], Callable]:
    def load():
        import importlib

        return getattr(importlib.import_module(f"jetkernels.plain.{op}"), function or op)

    return load


# Chunked: prepare(function, inputs)


def fla_chunk(function, inputs: Inputs):
    def run():
        return function(**inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return run, lambda out: out


def transformers_chunk(function, inputs: Inputs):
    """Without heads in groups: q and k are repeated beforehand."""
    groups = inputs["v"].shape[2] // inputs["q"].shape[2]
    q, k = (inputs[name].repeat_interleave(groups, 2) for name in "qk")
    values = q, k, inputs["v"], inputs["g"], inputs["beta"]
    return lambda: function(*values, output_final_state=True, use_qk_l2norm_in_kernel=True), lambda out: out


def flash_qla_chunk(function, inputs: Inputs):
    H, K = inputs["v"].shape[2], inputs["q"].shape[3]
    adapted = adapters.heads_of_128(inputs)

    def read(out):
        o, state = out
        return adapters.merged_values(o, H), adapters.merged_states(state, H)[:, :, :K]

    return lambda: function(**adapted, scale=K**-0.5, output_final_state=True), read


def flashinfer_chunk(function, inputs: Inputs):
    """Packed tokens, decay in linear space, states [N, H, V, K]."""
    B, T, H, _ = inputs["v"].shape
    K = inputs["q"].shape[3]
    adapted = {name: x.flatten(0, 1) for name, x in adapters.heads_of_128(inputs).items()}
    adapted["g"] = adapted["g"].exp()
    bounds = torch.arange(0, B * T + 1, T, dtype=torch.int64, device=inputs["q"].device)

    def read(out):
        o, state = out
        return adapters.merged_values(o.unflatten(0, (B, T)), H), adapters.merged_states(state.transpose(-1, -2), H)[
            :, :, :K
        ]

    return lambda: function(**adapted, scale=K**-0.5, output_final_state=True, cu_seqlens=bounds), read


def plain_chunk(function, inputs: Inputs):
    scale = inputs["q"].shape[3] ** -0.5
    return lambda: function(*inputs.values(), None, None, scale, True), lambda out: out


# The chunked backward: prepare(function, inputs, grad_o); the peer's forward has run before the clock does. Results are
# dq, dk and dv, or of these what stands for itself.


def _differentiate(function, inputs: Inputs, grad_o: Tensor, **options) -> Run:
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o = function(**leaves, **options)[0]
    return lambda: torch.autograd.grad(o, tuple(leaves.values()), grad_o, retain_graph=True)


def fla_chunk_backward(function, inputs: Inputs, grad_o: Tensor):
    run = _differentiate(function, inputs, grad_o, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return run, lambda grads: grads[:3]


def flash_qla_chunk_backward(function, inputs: Inputs, grad_o: Tensor):
    H, K = inputs["v"].shape[2], inputs["q"].shape[3]
    grad = adapters.split_values(grad_o).contiguous()
    run = _differentiate(function, adapters.heads_of_128(inputs), grad, scale=K**-0.5, output_final_state=True)
    return run, lambda grads: (None, None, adapters.merged_values(grads[2], H))


def plain_chunk_backward(function, inputs: Inputs, grad_o: Tensor):
    scale = inputs["q"].shape[3] ** -0.5
    return lambda: function(grad_o, None, *inputs.values(), None, None, scale, True), lambda grads: grads[:3]


# Recurrent, T = 1: prepare(function, inputs, state fp32 [B, H, K, V], a, b). In-place peers get their own copy of the
# state.


def fla_recurrent(function, inputs: Inputs, state: Tensor, a: Tensor, b: Tensor):
    def run():
        return function(**inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return run, lambda out: out


def transformers_recurrent(function, inputs: Inputs, state: Tensor, a: Tensor, b: Tensor):
    groups = inputs["v"].shape[2] // inputs["q"].shape[2]
    q, k = (inputs[name].repeat_interleave(groups, 2) for name in "qk")
    values = q, k, inputs["v"], inputs["g"], inputs["beta"]
    return (
        lambda: function(*values, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True),
        lambda out: out,
    )


def flashinfer_recurrent(function, inputs: Inputs, state: Tensor, a: Tensor, b: Tensor):
    """Raw gates: g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b). K must be 128 or more."""
    H, K = state.shape[1:3]
    zeros = torch.zeros(H, device=state.device)
    pool = F.pad(state, (0, 0, 0, max(0, adapters.HEAD - K))).contiguous()
    q, k = inputs["q"], inputs["k"]
    if padded := K < adapters.HEAD:
        q, k = (adapters.padded_keys(adapters.normalized(x)).contiguous() for x in (q, k))
    values = dict(q=q, k=k, v=inputs["v"], state=pool, A_log=zeros, a=a, dt_bias=zeros, b=b)
    return lambda: function(**values, scale=K**-0.5, use_qk_l2norm=not padded), lambda out: (out[0], out[1][:, :, :K])


def plain_recurrent(function, inputs: Inputs, state: Tensor, a: Tensor, b: Tensor):
    scale, pool = state.shape[2] ** -0.5, state.clone()
    return lambda: function(*inputs.values(), pool, None, scale, True), lambda o: (o, pool)


# Convolution: prepare(function, x, hidden, weight, bias)


def generator_gemm(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The bare GEMM that generates the taps [B, T, D*W]: what the convolution cannot be rid of."""
    return F.linear(hidden, weight, bias)


def unfused_dynamic_conv(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with stored taps, as the official code computes it: linear, unfold, sum, SiLU."""
    B, T, D = x.shape
    W = weight.shape[0] // D
    taps = F.linear(hidden, weight, bias).view(B, T, D, W)
    windows = F.pad(x.transpose(1, 2), (W - 1, 0)).unfold(-1, W, 1)  # [B, D, T, W]
    return F.silu((windows.transpose(1, 2) * taps).sum(-1))


CHUNK = (
    Peer("flash-linear-attention", _fla("chunk_gated_delta_rule"), fla_chunk),
    Peer("FlashQLA", _flash_qla, flash_qla_chunk, "q, k normalised and everything laid out beforehand"),
    Peer(
        "FlashInfer",
        _flashinfer("gdn_prefill", "chunk_gated_delta_rule"),
        flashinfer_chunk,
        "q, k normalised and everything laid out beforehand",
    ),
    Peer("plain PyTorch", _plain("chunk_gated_delta_rule"), plain_chunk),
    Peer("transformers", lambda: transformers_delta_rule()[0], transformers_chunk, "q, k repeated beforehand"),
)
CHUNK_BACKWARD = (
    Peer("flash-linear-attention", _fla("chunk_gated_delta_rule"), fla_chunk_backward),
    Peer("FlashQLA", _flash_qla, flash_qla_chunk_backward, "q, k normalised and everything laid out beforehand"),
    Peer(
        "plain PyTorch",
        _plain("chunk_gated_delta_rule", "chunk_gated_delta_rule_backward"),
        plain_chunk_backward,
    ),
)
RECURRENT = (
    Peer("flash-linear-attention", _fla("fused_recurrent_gated_delta_rule"), fla_recurrent, "out of place"),
    Peer(
        "FlashInfer",
        _flashinfer("gdn_decode", "gated_delta_rule_decode"),
        flashinfer_recurrent,
        "gates computed inside; K < 128 padded and normalised beforehand",
    ),
    Peer("plain PyTorch", _plain("recurrent_gated_delta_rule"), plain_recurrent),
    Peer("transformers", lambda: transformers_delta_rule()[1], transformers_recurrent, "out of place"),
)
