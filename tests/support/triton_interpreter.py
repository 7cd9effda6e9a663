"""A program: the ops of the delta rule on flash-linear-attention's kernels, in Triton's interpreter, on a CPU.

``ENVIRONMENT`` is set before it starts: by ``JETKERNELS_BACKEND=plain`` the calls come in as CUDA tensors come that no
kernel of this library takes. It prints a JSON object: the errors of each case against the definition in fp64,
what was announced, what ``backend_of`` says. fp16, because the interpreter's products of bf16 are wrong.
"""

import builtins
import importlib
import json
import warnings
from collections.abc import Callable, Iterator

import torch
from support.arguments import DeltaInputs, cotangents, delta_inputs, recurrent_call
from support.comparison import rms_error
from support.shapes import DeltaShape
from torch import Tensor

import jetkernels
from jetkernels import _library
from jetkernels.ops import _flash_linear_attention
from reference.chunk_gated_delta_rule import chunk_gated_delta_rule_backward
from reference.recurrent_gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule

ENVIRONMENT = {"TRITON_INTERPRET": "1", "JETKERNELS_BACKEND": "plain", "JETKERNELS_FLA": "1"}
LOOPS = ("fla.ops.common.chunk_delta_h", "fla.ops.common.chunk_o", "fla.ops.gated_delta_rule.wy_fast")
CHUNK, RECURRENT = "chunk_gated_delta_rule", "recurrent_gated_delta_rule"


class Index(int):
    """A counter of a loop, which a kernel may ask for another dtype."""

    def to(self, *_: object) -> "Index":
        return self


def counters(*bounds: object) -> Iterator[Index]:
    """``range`` of a kernel, whose bounds are tensors to the interpreter."""
    numbers = (b.handle.data.item() if hasattr(b, "handle") else b for b in bounds)
    return map(Index, builtins.range(*(int(number) for number in numbers)))


def interpret() -> None:
    """What the kernels need to run here: loops over numbers, no timing of their variants, CPU tensors let in."""
    autotuner = importlib.import_module("triton.runtime.autotuner")
    autotuner.Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    for name in LOOPS:
        importlib.import_module(name).range = counters
    _library.PLAIN_ASKED = -1
    _flash_linear_attention._on_gpu = lambda tensor: True
    torch.cuda.get_device_capability = lambda device: (8, 0)
    torch.cuda.is_current_stream_capturing = lambda: False


def errors(names: str, outs: tuple[Tensor, ...], refs: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> dict:
    for out, tensor in zip(outs, like):
        assert out.dtype == tensor.dtype and out.is_contiguous()
    return {name: rms_error(out, ref) for name, out, ref in zip(names.split(), outs, refs, strict=True)}


def chunk(x: DeltaInputs, final: bool = True) -> dict[str, float]:
    """Forward, backward, and the gradients as autograd gives them, of one call."""
    grad_o, grad_state = cotangents(x)
    grads = grad_o, grad_state if final else None
    o, state = torch.ops.jet.chunk_gated_delta_rule(*x)
    outs = torch.ops.jet.chunk_gated_delta_rule_backward(*grads, *x)
    refs = *gated_delta_rule(*x), *chunk_gated_delta_rule_backward(*grads, *x)
    like = x.v, grad_state, x.q, x.k, x.v, x.g, x.beta, grad_state
    return errors("o final_state dq dk dv dg dbeta dinitial_state", (o, state, *outs), refs, like)


def recurrent(rows: list[int] | None, state_dtype: torch.dtype, l2norm: bool) -> dict[str, float]:
    x = recurrent_call(DeltaShape("", B=3, T=4, K=24, V=20, l2norm=l2norm), torch.float16, state_dtype, rows)
    x.g[0, 1] = -torch.inf
    refs = recurrent_gated_delta_rule(*x)
    before = x.state.clone()
    o = torch.ops.jet.recurrent_gated_delta_rule(*x)
    touched = set(range(3)) if rows is None else {*rows}
    untouched = [row for row in range(len(before)) if row not in touched]
    assert torch.equal(x.state[untouched], before[untouched])
    assert rows is None or not o[[i for i, row in enumerate(rows) if row < 0]].any()
    return errors("o state", (o, x.state), refs, (x.v, x.state))


def strong_decay() -> dict[str, float]:
    x = delta_inputs(DeltaShape("", T=70, K=16, V=16), torch.float16)
    x.g[:, 3::7] = -torch.inf
    x.g[:, 5::11] = -150
    found = chunk(x)
    dg = torch.ops.jet.chunk_gated_delta_rule_backward(*cotangents(x), *x)[3]
    assert not dg[x.g < -104].any()
    return found


def nan_elsewhere() -> dict[str, float]:
    """Of the other sequences in a pack."""
    x = delta_inputs(DeltaShape("", T=75, K=16, V=16, cu_seqlens=(0, 5, 75)), torch.float16)
    o, state = gated_delta_rule(*x)
    x.v[:, 2] = torch.nan
    out, final = torch.ops.jet.chunk_gated_delta_rule(*x)
    assert out[:, 2].isnan().all() and final[0].isnan().all()
    return errors("o final_state", (out[:, 5:], final[1:]), (o[:, 5:], state[1:]), ())


def moved_offsets() -> dict[str, float]:
    """cu_seqlens written in place between two calls; int64, which the library takes as they are."""
    x = delta_inputs(DeltaShape("", T=75, K=16, V=16, cu_seqlens=(0, 5, 75)), torch.float16)
    x = x._replace(cu_seqlens=x.cu_seqlens.long())
    torch.ops.jet.chunk_gated_delta_rule(*x)
    x.cu_seqlens[1] = 70
    return errors("o final_state", torch.ops.jet.chunk_gated_delta_rule(*x), gated_delta_rule(*x), ())


def through_autograd() -> dict[str, float]:
    x = delta_inputs(DeltaShape("", T=20, K=16, V=16), torch.float16)
    leaves = [t.requires_grad_() for t in x[:6]]
    call = {"initial_state": x.initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    outs = jetkernels.chunk_gated_delta_rule(*x[:5], **call)
    cotangent = cotangents(x)
    found = torch.autograd.grad(outs, leaves, cotangent)
    x = DeltaInputs(*(t.detach() if isinstance(t, Tensor) else t for t in x))
    return errors("dq dk dv dg dbeta dstate", found, chunk_gated_delta_rule_backward(*cotangent, *x), x[:6])


def case(**sizes: object) -> Callable[[], dict[str, float]]:
    shape = DeltaShape("", **sizes)
    return lambda: chunk(delta_inputs(shape, torch.float16), final=shape.state)


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "chunked: a batch, two value heads a key head": case(B=2, K=16, V=32),
    "chunked: no state, no norm, no power of two": case(T=20, K=24, V=40, l2norm=False, state=False),
    "chunked: packed, one of them empty": case(T=75, K=16, V=16, cu_seqlens=(0, 5, 5, 75)),
    "chunked: decay that forgets everything": strong_decay,
    "chunked: NaN in another sequence": nan_elsewhere,
    "chunked: cu_seqlens written in place": moved_offsets,
    "chunked: gradients by autograd": through_autograd,
    "recurrent: rows of an fp32 pool": lambda: recurrent([2, -1, 0], torch.float32, True),
    "recurrent: a bf16 pool, no norm": lambda: recurrent(None, torch.bfloat16, False),
}


def backends() -> dict[str, jetkernels.Backend]:
    x = delta_inputs(DeltaShape(""), torch.float16)
    calls = {CHUNK: x, f"{CHUNK}_backward": (*cotangents(x), *x), RECURRENT: recurrent_call(DeltaShape(""))}
    return {op: jetkernels.backend_of(op, *arguments) for op, arguments in calls.items()}


def main() -> None:
    asked = backends()  # for plain PyTorch, on a CPU
    interpret()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {name: run() for name, run in CASES.items()}
    announced = [text for w in caught if (text := str(w.message)).startswith("jetkernels")]
    print(json.dumps({"errors": found, "announced": announced, "asked": asked, "let in": backends()}))


if __name__ == "__main__":
    main()
