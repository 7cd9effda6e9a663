"""A JetBlock on pools of states: decode, prompts read in pieces, draft tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.types import Device

from jetkernels.modules import JetBlock, JetBlockConfig, JetBlockState
from jetkernels.modules.dynamic_conv import commit_conv_state_
from jetkernels.modules.projections import apply
from jetkernels.ops import (
    prefill_gated_delta_rule_,
    recurrent_gated_delta_rule_commit_,
    recurrent_gated_delta_rule_verify,
)

from .batch import RaggedBatch


def new_pools(
    config: JetBlockConfig, rows: int, *, device: Device = None, dtype: torch.dtype | None = None
) -> JetBlockState:
    """Pools with a row for each of so many requests: conv_state [P, D, W-1] and recurrent_state [P, H, K, V].

    An engine may hand over views of its own memory instead, with any strides that do not overlap.
    """
    return JetBlockState.zeros(config, rows, device=device, dtype=dtype)


def take(pool: Tensor, state_indices: Tensor) -> Tensor:
    """Rows [N, ...] of a pool, a copy; row 0 in the place of those that are negative."""
    return pool.index_select(0, state_indices.clamp(min=0))


def put_(pool: Tensor, state_indices: Tensor, new: Tensor) -> None:
    """`new` [N, ...] to rows of a pool; where there are negative ones, row 0 keeps what it has."""
    is_row = (state_indices >= 0).view(-1, *[1] * (pool.dim() - 1))
    new = torch.where(is_row, new.to(pool.dtype), pool[:1])
    pool.index_copy_(0, state_indices.clamp(min=0).to(torch.int64), new)


class DraftPools(NamedTuple):
    """What `commit_` needs of T draft tokens, by the rows of the pools.

    Attributes:
        inputs: [P, T, D], of the convolution, in the layer's dtype.
        keys: [P, T, H, K], fp32 (fp64 in an fp64 layer), as the next two.
        updates: [P, T, H, V].
        g: [P, T, H].
    """

    inputs: Tensor
    keys: Tensor
    updates: Tensor
    g: Tensor


def new_draft_pools(
    config: JetBlockConfig, rows: int, tokens: int, *, device: Device = None, dtype: torch.dtype | None = None
) -> DraftPools:
    """For `tokens` draft tokens of each row; `dtype` is the layer's."""
    dtype = dtype or torch.get_default_dtype()
    wide = torch.promote_types(dtype, torch.float32)
    H, shape = config.num_heads, (rows, tokens)
    return DraftPools(
        torch.zeros(*shape, config.value_dim, device=device, dtype=dtype),
        torch.zeros(*shape, H, config.head_dim, device=device, dtype=wide),
        torch.zeros(*shape, H, config.head_v_dim, device=device, dtype=wide),
        torch.zeros(*shape, H, device=device, dtype=wide),
    )


@torch.no_grad()
def forward_(block: JetBlock, x: Tensor, pools: JetBlockState, batch: RaggedBatch) -> Tensor:
    """The layer for the tokens of a step; rows of the pools that the batch does not name are neither read nor written.

    Args:
        block: the layer.
        x: [total, C], its inputs.
        pools: updated in place.
        batch: of the tokens.

    Returns: [total, C]. Of a sequence whose row is negative the values are not defined.

    Raises:
        ValueError: shapes do not fit each other; nothing has been computed.
    """
    batch.check(x.shape[0])
    D = batch.num_decodes
    parts = [block.step(x[:D], pools, batch.state_indices[:D])] if D else []
    if D < batch.num_sequences:
        parts.append(_read_prompts_(block, x[D:], pools, batch))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(x)


def _read_prompts_(block: JetBlock, x: Tensor, pools: JetBlockState, batch: RaggedBatch) -> Tensor:
    """`forward_` of the sequences behind those that decode; x: their tokens."""
    D, has = batch.num_decodes, batch.has_initial_state
    rows = batch.state_indices[D:].to(torch.int64)
    has = rows.new_zeros(rows.shape, dtype=torch.bool) if has is None else has[D:]
    cu_seqlens = batch.query_start_loc[D:] - D  # the first D sequences have a token each
    # Not a product: a row that was used before may hold anything.
    before = torch.where(has.view(-1, 1, 1), take(pools.conv_state, rows), 0)
    x = x[None]
    p = block._project(x)
    tokens, after = block._tokens(x, p, cu_seqlens, before, True)
    assert after is not None
    mark_tokens = None if batch.mark_tokens is None else batch.mark_tokens - D
    o = prefill_gated_delta_rule_(
        *tokens,
        pools.recurrent_state,
        cu_seqlens,
        rows,
        has,
        mark_tokens,
        batch.mark_indices,
        use_qk_l2norm_in_kernel=True,
    )
    if mark_tokens is not None and batch.mark_indices is not None:
        marked = _inputs_before(mark_tokens.to(torch.int64), cu_seqlens, p.v[0], before)
        pools.conv_state.index_copy_(0, batch.mark_indices.to(torch.int64), marked.to(pools.conv_state.dtype))
    put_(pools.conv_state, rows, after)
    return apply(block.o_proj, "o_proj", block.o_norm(o, p.gate).flatten(-2))[0]


def _inputs_before(tokens: Tensor, cu_seqlens: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """States of the convolution behind so many tokens of the packed row.

    Args:
        tokens: [M] int64, none at the beginning of a sequence.
        cu_seqlens: [N+1].
        x: [T, D], the convolution's inputs.
        before: [N, D, W-1], its states before the sequences.

    Returns: [M, D, W-1].
    """
    n = torch.searchsorted(cu_seqlens.to(torch.int64), tokens) - 1
    back = torch.arange(-before.shape[2], 0, device=x.device)
    local = (tokens - cu_seqlens[n])[:, None] + back  # [M, W-1], negative where the input is of an earlier call
    inputs = x[(tokens[:, None] + back).clamp(min=0)].mT
    held = before[n].gather(2, (local + before.shape[2]).clamp(max=before.shape[2] - 1)[:, None].expand_as(inputs))
    return torch.where(local[:, None] >= 0, inputs, held)


class _Verified(NamedTuple):
    y: Tensor  # [N, T, C], the layer's outputs
    drafts: DraftPools  # of these sequences alone


def _verify(block: JetBlock, x: Tensor, pools: JetBlockState, state_indices: Tensor) -> _Verified:
    """`verify_` without its last step: nothing is written."""
    state = pools.recurrent_state
    p = block._project(x)
    tokens, _ = block._tokens(x, p, None, take(pools.conv_state, state_indices), False)
    wide = torch.promote_types(state.dtype, torch.float32)
    keys, updates = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (tokens[1], tokens[2]))
    o = recurrent_gated_delta_rule_verify(*tokens, state, keys, updates, state_indices, use_qk_l2norm_in_kernel=True)
    y = apply(block.o_proj, "o_proj", block.o_norm(o, p.gate).flatten(-2))
    return _Verified(y, DraftPools(p.v, keys, updates, tokens[3]))


@torch.no_grad()
def verify_(block: JetBlock, x: Tensor, pools: JetBlockState, drafts: DraftPools, state_indices: Tensor) -> Tensor:
    """The layer for draft tokens, of which any prefix may count later (`commit_`); the pools are only read.

    Args:
        block: the layer.
        x: [N, T, C], its inputs, T at most the tokens that `drafts` has room for.
        pools: of the states.
        drafts: rows of these sequences are overwritten.
        state_indices: [N], rows of the pools; a sequence with a negative one is none, and its outputs are not defined.
            Where there is such a one, row 0 belongs to nobody.

    Returns: [N, T, C].
    """
    verified = _verify(block, x, pools, state_indices)
    for pool, new in zip(drafts, verified.drafts, strict=True):
        put_(pool[:, : x.shape[1]], state_indices, new)
    return verified.y


@torch.no_grad()
def verify_with_states_(
    block: JetBlock, x: Tensor, pools: JetBlockState, after: JetBlockState, state_indices: Tensor, rows: Tensor
) -> Tensor:
    """`verify_` for an engine that keeps the states behind each draft token, and itself copies those that count.

    K * V numbers a head and token are written, where `verify_` writes K + 2 V + 1 with the convolution's input.

    Args:
        block: the layer.
        x: [N, T, C], its inputs.
        pools: of the states; only read.
        after: conv_state [R, S, D, W-1] and recurrent_state [R, S, H, K, V], R and S one dimension of memory, S at
            least T; the first T of these rows are overwritten. Windows of a row may overlap, as those of one sequence.
        state_indices: [N], rows of `pools`, as in `verify_`.
        rows: [N], rows of `after`, each another where state_indices is not negative; where it is, what the row holds
            afterwards is not defined.

    Returns: [N, T, C].
    """
    T = x.shape[1]
    verified = _verify(block, x, pools, state_indices)
    rows, drafts = rows.to(torch.int64), verified.drafts
    inputs = torch.cat([take(pools.conv_state, state_indices).mT, drafts.inputs], 1)  # [N, W-1+T, D]
    for t in range(T):
        window = inputs[:, t + 1 : t + 1 + after.conv_state.shape[-1]].mT
        after.conv_state[:, t].index_copy_(0, rows, window.to(after.conv_state.dtype))

    # Each of the T states is that before the drafts, advanced by some of them: N T sequences for one commit.
    states = after.recurrent_state
    before = take(pools.recurrent_state, state_indices).to(states.dtype)
    states[:, :T].index_copy_(0, rows, before[:, None].expand(-1, T, -1, -1, -1))
    tokens = torch.arange(T, device=x.device)
    places = torch.where(state_indices[:, None] >= 0, rows[:, None] * states.shape[1] + tokens, -1).flatten()
    keys, updates, g = (t.repeat_interleave(T, 0) for t in drafts[1:])
    num_accepted = (tokens + 1).repeat(len(rows))
    pool = states.view(-1, *states.shape[2:])
    recurrent_gated_delta_rule_commit_(keys, updates, g, num_accepted, pool, places)
    return verified.y


@torch.no_grad()
def commit_(pools: JetBlockState, drafts: DraftPools, state_indices: Tensor, num_accepted: Tensor) -> None:
    """Advances rows of the pools by the first draft tokens of each, as `forward_` of them alone would have.

    Args:
        pools: updated in place.
        drafts: as `verify_` left them.
        state_indices: as `verify_` had them.
        num_accepted: [N] int64, each from 0 to the tokens that were verified.
    """
    x, keys, updates, g = (take(pool, state_indices) for pool in drafts)
    conv = take(pools.conv_state, state_indices)
    commit_conv_state_(conv, x, num_accepted)
    put_(pools.conv_state, state_indices, conv)
    recurrent_gated_delta_rule_commit_(keys, updates, g, num_accepted, pools.recurrent_state, state_indices)
