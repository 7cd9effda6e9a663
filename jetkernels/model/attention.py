"""Grouped-query attention with rotary positions, full or over a sliding window, with or without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.repeatable import in_backward

from .attention_cache import AttentionCache
from .layout import TokenLayout
from .token_mixer import Rotary, TokenMixer

if TYPE_CHECKING:
    from .config import JetNemotronConfig

# Queries per block where a mask is needed: bounds the mask to [QUERY_BLOCK, keys].
QUERY_BLOCK = 512


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cos and sin, fp32 [..., T, 1, head_dim], of positions [..., T]; the two halves of a head share frequencies."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].to(torch.float32) * theta**-exponents
    angles = torch.cat((angles, angles), -1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, heads, head_dim]: pairs (i, i + head_dim/2), computed in fp32."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q [N, H, T, d], k and v [N, Hkv, L, d]; head h reads head h // (H / Hkv)."""
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and groups > 1 and (mask is None or mask.shape[1] == 1):
        # One query: the heads of a group stand in for queries, and no key is read twice.
        grouped = q.unflatten(1, (k.shape[1], groups)).squeeze(3)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=groups > 1)


def not_finite(k: Tensor, v: Tensor) -> Tensor:
    """[N, L]: at which tokens the keys and values [N, Hkv, L, d] hold a NaN or an infinity."""
    return (k.detach() * 0 + v.detach() * 0).sum((1, 3)).isnan()


def cleared(x: Tensor, bad: Tensor) -> Tensor:
    """Puts zeros at the tokens `bad` [N, L] of x [N, Hkv, L, d]."""
    return x.masked_fill(bad[:, None, :, None], 0)


def marked(o: Tensor, bad: Tensor, window: int | None = None) -> Tensor:
    """Puts NaN into o [N, H, T, d] where one of the last T tokens of `bad` [N, L] sees a token that is bad."""
    seen = bad.cumsum(1)
    if window is not None and window < bad.shape[1]:
        seen = seen - F.pad(seen, (window, 0))[:, : bad.shape[1]]
    seen = seen[:, bad.shape[1] - o.shape[2] :] > 0
    # Added, not filled in: the gradient passes.
    return o + torch.where(seen, torch.nan, 0.0).to(o.dtype)[:, None, :, None]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None = None, first: Tensor | None = None
) -> Tensor:
    """`finite_attention` of keys that end with the queries, L = start + T, and may hold anything, like the values.

    A token that is not finite makes NaN of the queries that see it and changes no other.
    """
    if q.shape[2] == 1:
        return finite_attention(q, k, v, start, window, first)
    bad = not_finite(k, v)
    return marked(finite_attention(q, cleared(k, bad), cleared(v, bad), start, window, first), bad, window)


def finite_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, window: int | None = None, first: Tensor | None = None
) -> Tensor:
    """Attention in which each query sees some of the keys before it.

    Query t of sequence n, at index i = start + t of the key axis, sees keys j with j <= i, i - j < window and
    j >= first[n]. A key or value that some query does not see must be finite: that query's weight is zero, but 0 * NaN
    is NaN.

    Args:
        q: [N, H, T, d].
        k: [N, Hkv, L, d].
        v: [N, Hkv, L, d].
        start: one for all sequences, or [N], then without a window.
        window: tokens; None for no limit.
        first: [N]; None for 0.
    """
    T, L = q.shape[2], k.shape[2]
    whole = isinstance(start, int) and first is None
    if whole and start == 0 and T == L and (window is None or T <= window):
        return attend(q, k, v, is_causal=True)
    blocks = []
    for a in range(0, T, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, T)
        lo, hi = 0, L
        if isinstance(start, int):
            hi = start + b
            lo = 0 if window is None else max(0, start + a - window + 1)
        i = torch.arange(a, b, device=q.device)[:, None] + (start if isinstance(start, int) else start[:, None, None])
        j = torch.arange(lo, hi, device=q.device)
        mask = j <= i
        if window is not None:
            mask = mask & (i - j < window)
        if first is not None:
            mask = mask & (j >= first[:, None, None])
        mask = mask[:, None] if mask.dim() == 3 else mask
        blocks.append(attend(q[:, :, a:b], k[:, :, lo:hi], v[:, :, lo:hi], mask))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


class Attention(TokenMixer):
    """Grouped-query attention: q, k and v with bias, o without, rotary positions, scale head_dim^-0.5.

    A NaN changes no output that does not see its token.

    Attributes:
        window: tokens that a query sees, itself included: key j is visible to query i when 0 <= i - j < window. None:
            all that came before it.
    """

    uses_rotary = True
    window: int | None = None

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        H, Hkv, d, C = config.num_attention_heads, config.num_key_value_heads, config.head_size, config.hidden_size
        self.head_dim = d
        self.initializer_range = config.initializer_range
        self.q_proj = nn.Linear(C, H * d, bias=True, device=device, dtype=dtype)
        self.k_proj = nn.Linear(C, Hkv * d, bias=True, device=device, dtype=dtype)
        self.v_proj = nn.Linear(C, Hkv * d, bias=True, device=device, dtype=dtype)
        self.o_proj = nn.Linear(H * d, C, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def sizes(cls, config: JetNemotronConfig) -> dict[str, object]:
        """Heads of keys and values, and their width."""
        return {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}

    @classmethod
    def initial_state(
        cls,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """A slot for each of `max_length` tokens."""
        heads, head_dim = config.num_key_value_heads, config.head_size
        return AttentionCache(batch_size, heads, max_length, head_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_weight_(projection.weight, self.initializer_range)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout,
        rotary: Rotary | None = None,
        state: AttentionCache | None = None,
    ) -> Tensor:
        """See `TokenMixer.forward`; the rotary angles must be given."""
        if rotary is None:
            raise ValueError("Attention: rotary must be the cos and sin of the tokens' angles, got None")
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if state is not None and torch.is_grad_enabled() and (q.requires_grad or v.requires_grad or in_backward()):
            raise RuntimeError(
                "Attention: a call with a cache computes no gradient; call it under torch.no_grad(), or without a cache"
            )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if layout.max_new == 0:
            return self.o_proj(q.flatten(-2))
        if state is None:
            q, k, v = (layout.pad(t).transpose(1, 2) for t in (q, k, v))
            o = causal_attention(q, k, v, 0, self.window)
        elif layout.is_dense and layout.max_new == 1:
            o = self._step(q, k, v, layout, state)
        elif self.window is None:
            o = self._extend(q, k, v, layout, state)
        else:
            o = self._extend_window(q, k, v, layout, self.window, state)
        return self.o_proj(layout.unpad(o.transpose(1, 2)).flatten(-2))

    @staticmethod
    def _step(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, cache: AttentionCache) -> Tensor:
        """One new token per sequence. In a ring its key replaces the one that has just left the window."""
        cache.write(k, v, layout)
        used = min(layout.max_total, cache.slots)
        return attend(q.transpose(1, 2), cache.key[:, :, :used], cache.value[:, :, :used], layout.filled(used))

    @staticmethod
    def _extend(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, cache: AttentionCache) -> Tensor:
        """New tokens after those in the cache, any number, also unequal."""
        # Every query sees all that was there before: only the new tokens have to be finite, and only for now.
        bad = not_finite(k.transpose(1, 2), v.transpose(1, 2)) if layout.max_new > 1 else None
        if bad is None:
            cache.write(k, v, layout)
        else:
            finite_k, finite_v = (cleared(t.transpose(1, 2), bad).transpose(1, 2) for t in (k, v))
            cache.write(finite_k, finite_v, layout)
        q = layout.pad(q).transpose(1, 2)
        # Padded queries stand at positions past the end of their sequence.
        used = min(layout.max_past + layout.max_new, cache.slots)
        start = layout.max_past if layout.uniform_past else layout.past_on_device
        o = finite_attention(q, cache.key[:, :, :used], cache.value[:, :, :used], start)
        if bad is None:
            return o
        cache.write(k, v, layout)
        return marked(o, layout.pad(bad))

    @staticmethod
    def _extend_window(
        q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: int, cache: AttentionCache
    ) -> Tensor:
        """The same over a window: what the ring holds, then the new keys, side by side; then the ring is refilled."""
        q, k, v = (layout.pad(t).transpose(1, 2) for t in (q, k, v))
        past = min(layout.max_past, cache.slots)
        first = None
        if past:
            old_k, old_v = cache.recent(past, layout)
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
            if not layout.uniform_past:
                first = (past - layout.past_on_device).clamp(min=0)
        o = causal_attention(q, k, v, past, window, first)
        cache.rewrite(k, v, past, layout)
        return o


class SlidingWindowAttention(Attention):
    """Attention over the last `window_size` tokens, the current one included."""

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__(config, device=device, dtype=dtype)
        self.window = config.window_size

    @classmethod
    def sizes(cls, config: JetNemotronConfig) -> dict[str, object]:
        """Those of full attention, and the window."""
        return super().sizes(config) | {"window_size": config.window_size}

    @classmethod
    def initial_state(
        cls,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """A ring with a slot for each token of the window, or for all if `max_length` is less."""
        return super().initial_state(
            config, batch_size, min(max_length, config.window_size), device=device, dtype=dtype
        )
