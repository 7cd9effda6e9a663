"""One call of every op in a tiny and in an ordinary size. Run as a program under count_regions.c: prints the parallel
regions that each call opens, as JSON."""

import ctypes
import json

import torch

from jetkernels import ops  # noqa: F401  (registers torch.ops.jet)
from jetkernels.ops._register import defined

TOKENS = 1000  # of "ordinary": 1500 in three blocks of dynamic_conv_backward (528)


def calls(size: str, dtype: torch.dtype) -> dict:
    """Each op's arguments; "tiny": one token of a small model."""
    tiny = size == "tiny"
    N, T, H, K, V = (1, 1, 2, 16, 32) if tiny else (3, TOKENS // 2, 4, 48, 96)
    D, R, W = (64, 24, 4) if tiny else (264, 40, 4)
    generator = torch.Generator().manual_seed(0)
    high = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator).mul(0.5).to(to)

    def delta(T):
        return [
            draw(N, T, H, K),
            draw(N, T, H, K),
            draw(N, T, H, V),
            -draw(N, T, H, to=high).abs(),
            draw(N, T, H, to=high).sigmoid(),
        ]

    x, hidden, weight, bias, state = (
        draw(1, N * T, D),
        draw(1, N * T, R),
        draw(D * W, R),
        draw(D * W),
        draw(1, D, W - 1),
    )
    kernels, dy, dstate = draw(1, N * T, D, W), draw(1, N * T, D), draw(1, D, W - 1)
    S, rows = draw(N, H, K, V, to=high), (1 if tiny else 40)
    step = [draw(rows, D), draw(rows, R), weight, bias, draw(rows, D, W - 1)]
    keys, updates = torch.zeros(N, 2, H, K, dtype=high), torch.zeros(N, 2, H, V, dtype=high)
    drafts = delta(2)
    tokens = delta(T)
    return {
        "dynamic_conv": (x, hidden, weight, bias, state, None, True),
        "dynamic_conv_backward": (dy, dstate, x, hidden, weight, bias, state, None, True),
        "apply_dynamic_conv": (x, kernels, state, None, True),
        "apply_dynamic_conv_backward": (dy, dstate, x, kernels, state, None, True),
        "chunk_gated_delta_rule": (*tokens, S, None, K**-0.5, True),
        "chunk_gated_delta_rule_backward": (
            draw(N, T, H, V),
            draw(N, H, K, V, to=high),
            *tokens,
            S,
            None,
            K**-0.5,
            True,
        ),
        "dynamic_conv_step": (*step, None, True),
        "recurrent_gated_delta_rule": (*delta(1), S.clone(), None, K**-0.5, True),
        "recurrent_gated_delta_rule_verify": (*drafts, S, None, keys, updates, K**-0.5, True),
        "recurrent_gated_delta_rule_commit": (
            draw(N, 2, H, K, to=high),
            draw(N, 2, H, V, to=high),
            drafts[3],
            torch.full((N,), 2),
            S.clone(),
            None,
        ),
    }


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
