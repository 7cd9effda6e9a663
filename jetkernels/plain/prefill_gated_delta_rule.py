"""The chunked gated delta rule on the rows of a state pool, in plain PyTorch."""

import torch

from ._chunks import CHUNK
from ._compute import accumulation_dtype, plain_op
from ._pool import PoolRows
from .chunk_gated_delta_rule import Inputs, forward


def sequence_of(cu_seqlens, tokens):
    """The sequence that each token number belongs to, the first of which is 0; of a packed row with these offsets."""
    last = cu_seqlens.shape[0] - 2
    return (torch.searchsorted(cu_seqlens, tokens.contiguous(), right=True) - 1).clamp(0, last)


def chunks_of_marks(cu, mark_tokens):
    """The chunk behind which each mark lies, counted over all sequences, and whether there is one."""
    n = sequence_of(cu, mark_tokens - 1)
    local, length = mark_tokens - cu[n], cu[n + 1] - cu[n]
    is_mark = (mark_tokens >= 1) & (local <= length) & ((local % CHUNK == 0) | (local == length))
    first = torch.cat([cu.new_zeros(1), ((cu[1:] - cu[:-1] + CHUNK - 1) // CHUNK).cumsum(0)])
    chunk = first[n] + (local - 1) // CHUNK
    return chunk, is_mark, n, chunk + 1 == first[n + 1]


@plain_op
def prefill_gated_delta_rule(*arguments):
    """jet::prefill_gated_delta_rule.

    q, k [1,T,Hk,K], v [1,T,H,V], g, beta [1,T,H], state [P,H,K,V] updated in place, state_indices [N] or None,
    cu_seqlens [N+1], has_initial_state [N] or None, mark_tokens, mark_indices [M] or None, scale, l2norm_qk
    -> o [1,T,H,V] in v's dtype; zeros for the sequences whose index is negative.
    """
    *tokens, state, state_indices, cu_seqlens, has_initial_state, mark_tokens, mark_indices, scale, l2norm_qk = (
        arguments
    )
    v = tokens[2]
    n = cu_seqlens.shape[0] - 1
    if n == 0 or state.numel() == 0:
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    rows = PoolRows(state, state_indices, n)
    old = rows.take()
    begin = old.to(accumulation_dtype(v))
    if has_initial_state is not None:
        begin = torch.where(has_initial_state.view(-1, 1, 1, 1), begin, 0)
    o, final, states = forward(Inputs._make([*tokens, begin, cu_seqlens, scale, l2norm_qk]))
    cu = cu_seqlens.to(torch.int64).contiguous()
    if mark_tokens is not None and states is not None and mark_tokens.shape[0]:
        chunk, is_mark, of, at_end = chunks_of_marks(cu, mark_tokens.to(torch.int64))
        behind = states.index_select(0, (chunk + 1).clamp(0, states.shape[0] - 1))
        behind = torch.where(at_end.view(-1, 1, 1, 1), final.index_select(0, of), behind)
        if rows.indexed:
            is_mark &= rows.valid[of]
        marks = PoolRows(state, torch.where(is_mark, mark_indices.to(torch.int64), -1), mark_tokens.shape[0])
        marks.put(marks.take(), behind.to(state.dtype))
    rows.put(old, final.to(state.dtype))
    if rows.indexed and v.shape[1]:
        there = rows.valid[sequence_of(cu, torch.arange(v.shape[1], device=v.device))]
        o = torch.where(there.view(1, -1, 1, 1), o, 0)
    return o
