"""Small calls of the library's ops: each makes the pipelines of its kernels wrap around, and little else."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from support.arguments import prefill_call
from support.shapes import DeltaShape
from torch import Tensor

from benchmarks import ops
from benchmarks.shapes import Draw, Shape

FP32, BF16 = torch.float32, torch.bfloat16
WEAK = 0.05  # times the usual decays: else what is more than a few tokens back reaches no result


class Call(NamedTuple):
    op: str
    make: Callable[[], tuple]  # the op's arguments in order, the same each time
    kernel: str = ""  # a part of the names of those that it is made for: the others have enough of the smaller calls

    def results(self) -> dict[str, np.ndarray]:
        """What the op returns or writes, in fp32, outside of memory that kernels may touch."""
        found = ops.results(self.op, self.make(), "jet_sim")
        return {name: value.float().numpy().copy() for name, value in found.items() if isinstance(value, Tensor)}


def _shape(**sizes) -> Shape:
    usual = dict(H=1, Hk=1, K=64, V=64, D=128, R=64, W=4, F=64, A=(2, 1, 64))
    return Shape("small", **{**usual, **sizes})


def _call(case: ops.Case, kernel: str = "", **scales: float) -> Call:
    return _scaled(case.op, lambda: case.make(Draw()), kernel, **scales)


def _scaled(op: str, make: Callable[[], tuple], kernel: str = "", g: float = WEAK, beta: float = 1) -> Call:
    names = [argument.name for argument in ops.function(op).default._schema.arguments]
    scales = {"g": g, "beta": beta}

    def arguments() -> tuple:
        return tuple(
            value * scales[name] if name in scales else value for name, value in zip(names, make(), strict=True)
        )

    return Call(op, arguments, kernel)


def _prefill() -> tuple:
    """Two sequences with states kept at some of their tokens."""
    shape = DeltaShape("", T=1408, Hk=1, H=1, K=64, V=64, cu_seqlens=(0, 704, 1408))
    return prefill_call(shape, BF16, FP32, (1, 0), (True, False), {192: 2, 640: 3, 704: 4, 832: 5})


def calls() -> dict[str, Call]:
    """By name."""
    small = _shape()
    return {
        # more chunks, tiles or tokens than multiprocessors take at once: a CTA has several
        "many chunks backward": _call(ops.chunk_backward(_shape(H=2), 140, 20), "chunk_gradients_kernel"),
        "many heads backward": _call(ops.chunk_backward(_shape(H=6, V=256), 1, 100), "chunk_gradients_kernel"),
        "many tiles": _call(ops.conv(_shape(D=864, R=320), 1, 1152), "pingpong"),
        "many tiles backward": _call(ops.conv_backward(_shape(D=864, R=192), 1, 1152), "input_gradient"),
        "many tiles, panels even": _call(ops.conv(_shape(D=864, R=256), 1, 1152), "pingpong"),
        "many tiles backward, panels even": _call(ops.conv_backward(_shape(D=864, R=256), 1, 1152), "input_gradient"),
        "many turns": _call(ops.conv(_shape(D=3456), 1, 1152), "pingpong"),
        "many turns backward": _call(ops.conv_backward(_shape(D=3456), 1, 1152), "input_gradient"),
        "many tokens backward": _call(ops.conv_backward(_shape(D=48, R=256), 1, 64 * 16 * 12), "weight_gradient"),
        # what a segment makes of the state before it is not lost in noise
        "a long row, cut": _call(ops.chunk_backward(small, 1, 8192), g=1e-3, beta=1e-2),
        "many rows": _call(ops.norm("rms_norm", _shape(R=256), 1500), "11norm_kernel"),
        "many rows backward": _call(ops.norm_backward("rms_norm", _shape(R=256), 1500), "norm_backward_kernel"),
        "chunk": _call(ops.chunk(small, 1, 1200)),
        "one chunk backward": _call(ops.chunk_backward(small, 1, 64)),
        "chunk backward": _call(ops.chunk_backward(small, 1, 1200)),
        "prefill": _scaled("prefill_gated_delta_rule", _prefill),
        "conv": _call(ops.conv(_shape(R=1536), 1, 130)),
        "conv, one panel": _call(ops.conv(small, 1, 128)),
        "conv step": _call(ops.conv_step(_shape(R=1024), 12)),
        "conv backward": _call(ops.conv_backward(_shape(D=256, R=512), 1, 200)),
        "apply backward": _call(ops.apply_conv_backward(small, 1, 67)),
        "attention": _call(ops.attention_step(small, 2, 200)),
        "recurrent": _call(ops.recurrent(small, 2, FP32, 3)),
        "recurrent, V first": _call(ops.recurrent(small, 2, BF16, 3, v_first=True)),
        "verify": _call(ops.verify(small, 2, FP32)),
        "commit": _call(ops.commit(small, 2, FP32)),
        "block step": _call(ops.jet_block_step(_shape(R=1024, V=128), 12)),
        "norm": _call(ops.norm("rms_norm", _shape(R=256), 5)),
        "norm backward": _call(ops.norm_backward("rms_norm", _shape(R=256), 40)),
        "gates backward": _call(ops.delta_gates_backward(small, 70)),
    }
