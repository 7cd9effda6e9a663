"""One call of every op in a tiny and in an ordinary size. Run as a program under count_regions.c: prints the parallel
regions that each call opens, as JSON."""

import ctypes
import json

import torch
from support.arguments import (
    LINEAR_OPS,
    NORM_OPS,
    POOL_OPS,
    SEQUENCE_OPS,
    attention_call,
    block_step_call,
    call_of,
    cotangents,
    gates_inputs,
    inputs_of,
    linear_inputs,
    norm_inputs,
    prefill_call,
    swiglu_inputs,
)
from support.shapes import AttentionShape, ConvShape, DeltaShape

from jetkernels import ops  # noqa: F401  (registers torch.ops.jet)
from jetkernels.ops._register import defined

TOKENS = 1000  # of "ordinary": 1500 in three blocks of dynamic_conv_backward (528)


def calls(size: str, dtype: torch.dtype) -> dict[str, tuple]:
    """Each op's arguments; "tiny": one token of a small model."""
    tiny = size == "tiny"
    if tiny:
        tokens, conv, rows = DeltaShape("", 1, 1, 2, 2, 16, 32), ConvShape("", 1, 1, 64, 24), 1
        attention = AttentionShape("", (1,), H=2, Hkv=1, d=64, L=1400)
    else:
        tokens = DeltaShape("", 3, TOKENS // 2, 4, 4, 48, 96)
        conv, rows = ConvShape("", 1, 3 * (TOKENS // 2), 264, 40), 40
        attention = AttentionShape("", (700, 1400), H=2, Hkv=1, d=64, L=1400)
    shapes = {
        "recurrent_gated_delta_rule": tokens._replace(T=1),
        "recurrent_gated_delta_rule_verify": tokens._replace(T=2),
        "recurrent_gated_delta_rule_commit": tokens._replace(T=2),
        "dynamic_conv_step": conv._replace(B=rows),
    }
    found = {op: inputs_of(op, tokens if "delta" in op else conv, dtype) for op in SEQUENCE_OPS}
    found |= {op: norm_inputs(op, conv.T, conv.D, dtype=dtype) for op in NORM_OPS}
    found["swiglu"] = swiglu_inputs(conv.T, conv.D, dtype=dtype)
    found["delta_gates"] = gates_inputs(conv.T, tokens.H, dtype=dtype)
    backward = {f"{op}_backward": (*cotangents(inputs), *inputs) for op, inputs in found.items()}
    found |= {op: linear_inputs(op, rows, conv.D, P=4 * conv.D, G=2, dtype=dtype) for op in LINEAR_OPS}
    found |= {op: call_of(op, shapes[op], dtype) for op in POOL_OPS}
    ends = (0, 1) if tiny else (0, TOKENS // 2, TOKENS)
    found["prefill_gated_delta_rule"] = prefill_call(tokens._replace(B=1, T=ends[-1], cu_seqlens=ends), dtype)
    found["jet_block_step"] = block_step_call(*((1, 2, 16, 32, 24) if tiny else (rows, 4, 48, 66, 40)), dtype=dtype)
    found["attention_step"] = attention_call(attention, dtype)
    return found | backward


def run(op: str, arguments: tuple) -> list[torch.Tensor]:
    """What the op returns and what it writes in place, from arguments that are left alone."""
    arguments = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    found = getattr(torch.ops.jet, op)(*arguments)
    found = [] if found is None else list(found) if isinstance(found, (tuple, list)) else [found]
    return [*found, *(a for a in arguments if isinstance(a, torch.Tensor))]


def count() -> dict[str, dict[str, int]]:
    counter = ctypes.CDLL(None).count_regions
    counter.restype = ctypes.c_int64
    found: dict[str, dict[str, int]] = {}
    for size in ("tiny", "ordinary"):
        todo = calls(size, torch.float32)
        assert set(todo) == set(defined)
        for op, arguments in todo.items():
            run(op, arguments)
            before = counter()
            run(op, arguments)
            found.setdefault(size, {})[op] = counter() - before
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(count()))
