"""The properties of attention_step, written once for every backend."""

import math
from collections.abc import Sequence

import torch
from support.arguments import AttentionCall, attention_call
from support.backends import REFERENCE, OpsBackend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.memory import poisoned_allocations
from support.shapes import AttentionShape
from torch import Tensor

OP = "attention_step"


def run(backend: OpsBackend, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the caches after the call; ``call`` keeps its own."""
    key, value = (t.clone(memory_format=torch.preserve_format) for t in (call.key, call.value))
    return backend(OP, *call._replace(key=key, value=value)), key, value


def check(backend: OpsBackend, call: AttentionCall) -> None:
    """Output and new token equal the definition; all other slots keep their bits; a negative length gives zeros."""
    o, key, value = run(backend, call)
    ref, ref_key, ref_value = REFERENCE[OP](*call)
    assert o.dtype == call.q.dtype and o.is_contiguous()
    assert_error("o", o, ref, TOLERANCE[o.dtype].output)
    for n, length in enumerate(call.lengths.tolist()):
        kept = torch.ones(call.key.shape[2], dtype=torch.bool)
        if length >= 0:
            slot = length % call.key.shape[2]
            kept[slot] = False
            assert_error("key", key[n, :, slot], ref_key[n, :, slot], TOLERANCE[o.dtype].state)
            assert_bitwise(value[n, :, slot], call.v[n], "value")
        else:
            assert_bitwise(o[n], torch.zeros_like(o[n]), "o of a negative length")
        assert_bitwise(key[n][:, kept], call.key[n][:, kept], "key")
        assert_bitwise(value[n][:, kept], call.value[n][:, kept], "value")


def unread_slots_do_not_matter(backend: OpsBackend, shape: AttentionShape, dtype: torch.dtype) -> None:
    clean, dirty = (run(backend, attention_call(shape, dtype, dirty=dirty))[0] for dirty in (False, True))
    assert_bitwise(dirty, clean, "o")


def nan_stays_in_its_sequence(backend: OpsBackend, call: AttentionCall, n: int, value: float) -> None:
    """``value`` in all that belongs to sequence n changes no bit of the others, and reaches all of its own heads."""
    bad = call._replace(**{name: getattr(call, name).clone() for name in ("q", "k", "v", "key", "value")})
    for t in (bad.q, bad.k, bad.v, bad.key, bad.value):
        t[n] = value
    outs, bad_outs = run(backend, call), run(backend, bad)
    assert bad_outs[0][n].isnan().all()
    for name, out, bad_out in zip(("o", "key", "value"), outs, bad_outs):
        out[n] = bad_out[n] = 0
        assert_bitwise(bad_out, out, name)


def one_bad_slot_reaches_its_group_alone(backend: OpsBackend, call: AttentionCall, which: str) -> None:
    """A NaN in key head 1 of sequence 0."""
    bad = call._replace(**{which: getattr(call, which).clone()})
    getattr(bad, which)[0, 1, 1, 3] = math.nan
    out, bad_out = run(backend, call)[0], run(backend, bad)[0]
    group = call.q.shape[1] // call.key.shape[1]
    assert bad_out[0, group : 2 * group].isnan().any(-1).all()
    bad_out[0, group : 2 * group] = out[0, group : 2 * group]
    assert_bitwise(bad_out, out, "o")


def sequences_alone_give_the_same_bits(backend: OpsBackend, call: AttentionCall) -> None:
    together = run(backend, call)
    for n in range(call.q.shape[0]):
        alone = run(backend, AttentionCall(*(t[n : n + 1] for t in call[:8]), call.scale))
        for name, one, all_ in zip(("o", "key", "value"), alone, together):
            assert_bitwise(one, all_[n : n + 1], name)


def every_element_is_written(backend: OpsBackend, call: AttentionCall) -> None:
    expected = run(backend, call)
    with poisoned_allocations():
        for what, out, ref in zip(("o", "key", "value"), run(backend, call), expected):
            assert_bitwise(out, ref, what)


def steps_are_causal_attention(backend: OpsBackend, dtype: torch.dtype, T: int, L: int, ceiling: float) -> None:
    """T tokens, one after the other from an empty cache, are causal attention over the last L of them."""
    H, Hkv, d = 6, 2, 64
    tokens = [attention_call(AttentionShape("", (t, t, t), H, Hkv, d, L), dtype, seed=t) for t in range(T)]
    key, value = (torch.full((3, Hkv, L, d), math.nan, dtype=dtype) for _ in range(2))
    outs = [backend(OP, *call._replace(key=key, value=value)) for call in tokens]
    q, k, v = (torch.stack([call[i] for call in tokens], 2).double() for i in range(3))
    cos, sin = (torch.stack([call[i] for call in tokens], 1)[:, None].double() for i in (3, 4))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    i = torch.arange(T)
    seen = (i[:, None] >= i) & (i[:, None] - i < L)
    ref = torch.nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=seen, enable_gqa=True)
    assert_error("o", torch.stack(outs, 2), ref, ceiling)


def strided(t: Tensor, dims: Sequence[int]) -> Tensor:
    """The values of ``t`` with its dimensions in memory in the order ``dims``."""
    inverse = [list(dims).index(i) for i in range(t.dim())]
    return t.permute(*dims).contiguous().permute(*inverse)
