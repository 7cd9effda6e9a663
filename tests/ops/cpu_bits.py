"""Digests of what the CPU ops compute, bit for bit: a change that means to change no result is held against
``cpu_bits.json``.

    python tests/ops/cpu_bits.py            # one JSON object: the digest of every op and dtype, on the variant in use
    python tests/ops/cpu_bits.py --write    # every variant that this machine runs, into cpu_bits.json

Write the file anew in the commit that means to change results, and say so there. Bits depend on the compiler; the file
names it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CASES = 24


class Draw:
    """Random tensors that are the same on every machine: from integers, so that no library's logarithm has a part in
    them.
    """

    def __init__(self, seed: int, dtype: torch.dtype):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.real = torch.float64 if dtype == torch.float64 else torch.float32

    def size(self, *among: int) -> int:
        return int(self.rng.choice(among))

    def flag(self) -> bool:
        return bool(self.rng.integers(2))

    def numbers(self, shape, low: float, high: float, dtype: torch.dtype | None = None) -> Tensor:
        unit = torch.from_numpy(self.rng.integers(0, 1 << 24, size=shape)).double() / (1 << 24)
        return (low + (high - low) * unit).to(dtype or self.dtype)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In [-1, 1); now and then with the strides of a transposed tensor."""
        if len(shape) > 1 and self.rng.integers(4) == 0:
            return self.numbers((*shape[:-2], shape[-1], shape[-2]), -1, 1, dtype).transpose(-1, -2)
        return self.numbers(shape, -1, 1, dtype)

    def maybe(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.flag() else None

    def sequences(self, T: int) -> tuple[int, int, Tensor | None]:
        """B, N and cu_seqlens."""
        if self.flag():
            B = self.size(1, 2)
            return B, B, None
        marks = sorted(int(m) for m in self.rng.integers(0, T + 1, size=2))
        return 1, 3, torch.tensor([0, *marks, T])

    def tokens(self, rows: int, T: int) -> tuple[list[Tensor], tuple[int, int, int]]:
        """q, k, v, g, beta and (H, K, V)."""
        Hk = self.size(1, 2)
        H, K, V = Hk * self.size(1, 3), self.size(8, 33, 64, 96, 128), self.size(7, 32, 80, 128)
        decay = self.size(1, 4, 60) / 4
        q, k, v = self.tensor(rows, T, Hk, K), self.tensor(rows, T, Hk, K), self.tensor(rows, T, H, V)
        return [
            q,
            k,
            v,
            self.numbers((rows, T, H), -decay, 0, self.real),
            self.numbers((rows, T, H), 0, 1, self.real),
        ], (H, K, V)

    def pool(self, rows: int, *shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A pool of states and state_indices of ``rows`` sequences."""
        if not self.flag():
            return self.tensor(rows, *shape, dtype=dtype), None
        indices = torch.from_numpy(self.rng.permutation(rows + 2)[:rows].copy())
        indices[self.rng.integers(rows)] = -1
        return self.tensor(rows + 2, *shape, dtype=dtype), indices


def chunk_gated_delta_rule(draw: Draw) -> list[Tensor]:
    T = draw.size(1, 17, 64, 65, 130, 200)
    B, N, cu_seqlens = draw.sequences(T)
    tokens, (H, K, V) = draw.tokens(B, T)
    state = draw.maybe(draw.tensor(N, H, K, V, dtype=draw.real))
    rest = (state, cu_seqlens, 0.125, draw.flag())
    grads = draw.tensor(B, T, H, V), draw.maybe(draw.tensor(N, H, K, V, dtype=draw.real))
    ops = torch.ops.jet
    return [*ops.chunk_gated_delta_rule(*tokens, *rest), *ops.chunk_gated_delta_rule_backward(*grads, *tokens, *rest)]


def recurrent_gated_delta_rule(draw: Draw) -> list[Tensor]:
    """Step, verify and commit."""
    N, T = draw.size(1, 3), draw.size(1, 4)
    tokens, (H, K, V) = draw.tokens(N, T)
    pool, rows = draw.pool(N, H, K, V, dtype=draw.real if draw.flag() or draw.real == torch.float64 else torch.bfloat16)
    keys, updates = torch.zeros(N, T, tokens[0].shape[2], K, dtype=draw.real), torch.zeros(N, T, H, V, dtype=draw.real)
    l2norm = draw.flag()
    drafts = torch.ops.jet.recurrent_gated_delta_rule_verify(*tokens, pool, rows, keys, updates, 0.125, l2norm)
    advanced = pool.clone()
    torch.ops.jet.recurrent_gated_delta_rule_commit(keys, updates, tokens[3], torch.full((N,), T), advanced, rows)
    o = torch.ops.jet.recurrent_gated_delta_rule(*tokens, pool, rows, 0.125, l2norm)
    return [drafts, keys, updates, advanced, o, pool]


def dynamic_conv(draw: Draw) -> list[Tensor]:
    T, D, W, R = draw.size(1, 5, 40, 100), draw.size(1, 24, 70, 128), draw.size(2, 3, 4), draw.size(1, 9, 32, 48)
    B, N, cu_seqlens = draw.sequences(T)
    generator = (draw.tensor(B, T, R), draw.tensor(D * W, R), draw.maybe(draw.tensor(D * W)))
    state, silu = draw.maybe(draw.tensor(N, D, W - 1)), draw.flag()
    x = draw.tensor(B, T, D)
    grads = draw.tensor(B, T, D), draw.maybe(draw.tensor(N, D, W - 1))
    arguments = (x, *generator, state, cu_seqlens, silu)
    return [*torch.ops.jet.dynamic_conv(*arguments), *torch.ops.jet.dynamic_conv_backward(*grads, *arguments)]


def dynamic_conv_step(draw: Draw) -> list[Tensor]:
    N, D, W, R = draw.size(1, 3, 8), draw.size(1, 24, 70, 128), draw.size(2, 3, 4), draw.size(1, 9, 32, 48)
    pool, rows = draw.pool(N, D, W - 1, dtype=draw.dtype)
    generator = (draw.tensor(N, R), draw.tensor(D * W, R), draw.maybe(draw.tensor(D * W)))
    return [torch.ops.jet.dynamic_conv_step(draw.tensor(N, D), *generator, pool, rows, draw.flag()), pool]


def apply_dynamic_conv(draw: Draw) -> list[Tensor]:
    T, D, W = draw.size(1, 5, 40, 100), draw.size(1, 24, 70, 128), draw.size(2, 3, 4)
    B, N, cu_seqlens = draw.sequences(T)
    grads = draw.tensor(B, T, D), draw.maybe(draw.tensor(N, D, W - 1))
    arguments = (
        draw.tensor(B, T, D),
        draw.tensor(B, T, D, W),
        draw.maybe(draw.tensor(N, D, W - 1)),
        cu_seqlens,
        draw.flag(),
    )
    return [
        *torch.ops.jet.apply_dynamic_conv(*arguments),
        *torch.ops.jet.apply_dynamic_conv_backward(*grads, *arguments),
    ]


def norms(draw: Draw) -> list[Tensor]:
    rows, C = draw.size(0, 1, 5, 37), draw.size(1, 24, 70, 256)
    x, residual, gate, grad = (draw.tensor(rows, C) for _ in range(4))
    weight, ops = draw.tensor(C), torch.ops.jet
    return [
        ops.rms_norm(x, weight, 1e-5),
        *ops.rms_norm_backward(grad, x, weight, 1e-5),
        *ops.add_rms_norm(x, residual, weight, 1e-5),
        *ops.add_rms_norm_backward(grad, gate, x, residual, weight, 1e-5),
        ops.gated_rms_norm(x, gate, weight, 1e-5),
        *ops.gated_rms_norm_backward(grad, x, gate, weight, 1e-5),
    ]


def pointwise(draw: Draw) -> list[Tensor]:
    rows, C = draw.size(0, 1, 5, 37), draw.size(1, 24, 70, 256)
    gate, up, grad = (draw.tensor(rows, C) for _ in range(3))
    a, b, A_log, dt_bias = draw.tensor(rows, C), draw.tensor(rows, C), *(draw.tensor(C, dtype=draw.real) for _ in "AB")
    grads = [draw.tensor(rows, C, dtype=draw.real) for _ in "gb"]
    ops = torch.ops.jet
    return [
        ops.swiglu(gate, up),
        *ops.swiglu_backward(grad, gate, up),
        *ops.delta_gates(a, b, A_log, dt_bias),
        *ops.delta_gates_backward(*grads, a, b, A_log, dt_bias),
    ]


def linear(draw: Draw) -> list[Tensor]:
    """With weights in the dtype, of 8 bits and of 4."""
    rows, groups, P = draw.size(1, 2, 5, 17, 40), draw.size(1, 3), draw.size(1, 16, 37)
    C = groups * draw.size(2, 32, 70, 128)
    x, bias = draw.tensor(rows, C), draw.maybe(draw.tensor(P))
    scale = draw.numbers((P, groups), 0.01, 0.1, torch.float32)
    bytes_ = torch.from_numpy(draw.rng.integers(0, 256, size=(P, C), dtype="uint8"))
    ops = torch.ops.jet
    return [
        ops.linear(x, draw.tensor(P, C), bias),
        ops.linear_int8(x, bytes_.view(torch.int8), scale, bias),
        ops.linear_int4(x, bytes_[:, : C // 2], scale, bias),
    ]


def attention_step(draw: Draw) -> list[Tensor]:
    N, Hkv, d, L = draw.size(1, 3), draw.size(1, 2), draw.size(2, 34, 64, 128), draw.size(1, 70, 600)
    H = Hkv * draw.size(1, 3, 6, 9)
    q, k, v = draw.tensor(N, H, d), draw.tensor(N, Hkv, d), draw.tensor(N, Hkv, d)
    cos, sin = (draw.tensor(N, d, dtype=torch.float32) for _ in "cs")
    key, value = draw.tensor(N, Hkv, L, d), draw.tensor(N, Hkv, L, d)
    lengths = torch.from_numpy(draw.rng.integers(-1, 2 * L, size=N))
    return [torch.ops.jet.attention_step(q, k, v, cos, sin, key, value, lengths, d**-0.5), key, value]


def jet_block_step(draw: Draw) -> list[Tensor]:
    N, H, K, V, R = draw.size(1, 3, 17), draw.size(1, 3), draw.size(8, 33, 96), draw.size(7, 32, 80), draw.size(9, 32)
    W = draw.size(2, 4)
    taps, _ = draw.pool(N, H * V, W - 1, dtype=draw.dtype)
    state = draw.tensor(taps.shape[0], H, K, V, dtype=draw.real)
    rows = torch.from_numpy(draw.rng.permutation(taps.shape[0])[:N].copy())
    o = torch.ops.jet.jet_block_step(
        draw.tensor(N, H, K),
        draw.tensor(N, H, K),
        draw.tensor(N, H * V),
        draw.tensor(N, R),
        draw.tensor(N, H),
        draw.tensor(N, H),
        draw.tensor(N, H, V),
        draw.tensor(H * V * W, R),
        draw.maybe(draw.tensor(H * V * W)),
        draw.tensor(H, dtype=draw.real),
        draw.tensor(H, dtype=draw.real),
        draw.tensor(V),
        taps,
        state,
        draw.maybe(rows) if taps.shape[0] == N else rows,
        K**-0.5,
        1e-5,
    )
    return [o, taps, state]


FAMILIES = (
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
    dynamic_conv,
    dynamic_conv_step,
    apply_dynamic_conv,
    norms,
    pointwise,
    linear,
    attention_step,
    jet_block_step,
)


def digests() -> dict[str, str]:
    """``{"<op> <dtype>": digest}`` of ``CASES`` random calls each."""
    found = {}
    for family in FAMILIES:
        for name, dtype in DTYPES.items():
            digest = hashlib.sha256()
            for seed in range(CASES):
                for out in family(Draw(seed, dtype)):
                    assert not out.isnan().any(), (family.__name__, name, seed)
                    digest.update(out.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
            found[f"{family.__name__} {name}"] = digest.hexdigest()[:16]
    return found


def digests_on(isa: str) -> dict[str, str]:
    """The same in a process of its own, on the instruction-set variant ``isa``."""
    command = [sys.executable, __file__]
    run = subprocess.run(
        command, env={**os.environ, "JETKERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true")
    write = arguments.parse_args().write
    from jetkernels import _library

    facts = _library.build_info()
    if not write:
        print(json.dumps(digests()))
        return
    variants = facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa"]) + 1]
    FILE.write_text(
        json.dumps({"compiler": facts["compiler"], "digests": {isa: digests_on(isa) for isa in variants}}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
