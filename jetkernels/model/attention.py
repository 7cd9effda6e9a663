"""Grouped-query attention with rotary positions, full or over a sliding window, with or without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.types import Device

from jetkernels.modules import RMSNorm
from jetkernels.modules.fused import ops_take
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.projections import FusedProjections, apply, project
from jetkernels.modules.repeatable import in_backward
from jetkernels.ops import attention_step_

from .attention_cache import AttentionCache, AttentionDraft
from .layout import TokenLayout
from .rotary import RotaryScaling
from .token_mixer import Rotary, TokenMixer

if TYPE_CHECKING:
    from .config import JetNemotronConfig

# Queries of a block that looks at a window: [BLOCK, BLOCK + window] scores. torch's CPU kernel takes 256 queries at
# once, and shorter blocks read the window's keys more often.
BLOCK = 256
# Tokens that are rotated at once: on a CPU their fp32 values stay in its cache.
ROTATED_TOKENS = 256
# None of them plans anew for each length, as cuDNN's does.
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cos and sin, fp32 [..., T, 1, head_dim], of positions [..., T]; the two halves of a head share frequencies."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    angles = positions[..., None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), -1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, heads, head_dim]: pairs (i, i + head_dim/2), computed in fp32, rounded once."""
    if torch.compiler.is_compiling() or _needs_gradient(x) or not ops_take(x, cos, sin):
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    rotated, half = torch.empty_like(x), x.shape[-1] // 2
    size = ROTATED_TOKENS if x.device.type == "cpu" else max(1, x.shape[-3])
    for part, c, s, out in zip(*(t.split(size, -3) for t in (x, cos, sin, rotated)), strict=True):
        wide = part.to(torch.promote_types(x.dtype, cos.dtype))
        turned = wide * c
        turned[..., :half].addcmul_(wide[..., half:], s[..., :half], value=-1)
        turned[..., half:].addcmul_(wide[..., :half], s[..., half:])
        out.copy_(turned)
    return rotated


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Tokens one behind the other, [N, Hkv, L, d]; torch.cat under autocast does not join bf16 and fp16."""
    dtype = torch.promote_types(old.dtype, new.dtype)
    return torch.cat((old.to(dtype), new.to(dtype)), 2)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with q [N, H, T, d], k and v [N, Hkv, L, d]; head h reads head h // (H / Hkv)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast a cache is wider
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=groups > 1)
    if groups > 1 and q.dtype not in (torch.float16, torch.bfloat16):
        # The flash kernel alone shares a key head, and it has no fp32.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    with sdpa_kernel(CUDA_BACKENDS):
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


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """`finite_attention` of keys and values that may hold anything.

    A token that is not finite makes NaN of the queries that see it and changes no other.
    """
    bad = not_finite(k, v)
    return marked(finite_attention(q, cleared(k, bad), cleared(v, bad), window), bad, window)


def finite_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Attention of the last T tokens of L to those before them, and to themselves.

    Query t, at index i = L - T + t of the key axis, sees keys j with j <= i and i - j < window. A key or value that
    some query does not see must be finite: that query's weight is zero, but 0 * NaN is NaN.

    Args:
        q: [N, H, T, d].
        k: [N, Hkv, L, d].
        v: [N, Hkv, L, d].
        window: tokens; None for no limit.
    """
    T, L = q.shape[2], k.shape[2]
    if window is None or L <= window:
        return _attend_to_all(q, k, v)
    # Queries that see all before them, then blocks of equal size, then what is left.
    sizes = [min(T, max(0, window - (L - T)))]
    sizes += [(T - sizes[0]) // BLOCK * BLOCK, (T - sizes[0]) % BLOCK]
    parts, end = [], L - T
    for size, attention in zip(sizes, (_attend_to_all, _attend_in_blocks, _attend_in_blocks)):
        if size:
            start, end = max(0, end - window), end + size
            queries = q[:, :, end - size - (L - T) : end - (L - T)]
            parts.append(attention(queries, k[:, :, start:end], v[:, :, start:end]))
    return parts[0] if len(parts) == 1 else torch.cat([o.transpose(1, 2) for o in parts], 1).transpose(1, 2)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`finite_attention` without a window and, but for gradients through a past, without a mask."""
    T, L = q.shape[2], k.shape[2]
    past = L - T
    if past == 0:
        return attend(q, k, v, is_causal=True)
    if T == 1:
        return attend(q, k, v)
    if q.device.type != "cpu" or _needs_gradient(q, k, v):
        from torch.nn.attention.bias import causal_lower_right  # imports torch.compile: seconds

        return attend(q, k, v, causal_lower_right(T, L))
    # Attention to both is the mean of those to the past and to the rest, weighted by their sums of exponentials.
    k, v = k.to(q.dtype), v.to(q.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, log_sum_before = flash(q, k[:, :, :past], v[:, :, :past])
    among, log_sum_among = flash(q, k[:, :, past:], v[:, :, past:], is_causal=True)
    weight = (log_sum_among - log_sum_before).sigmoid()[..., None]
    return torch.lerp(before.to(weight.dtype), among.to(weight.dtype), weight).to(q.dtype)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`finite_attention` of L = window + T keys, T in blocks of BLOCK or one of less: one call, one mask for all."""
    N, H, T, d = q.shape
    Hkv, window = k.shape[1], k.shape[2] - T
    size = min(T, BLOCK)
    # The heads of a group stand in for queries: [N, Hkv, group, blocks, size, d] -> [N * blocks, Hkv, group * size, d]
    grouped = q.reshape(N, Hkv, H // Hkv, T // size, size, d).permute(0, 3, 1, 2, 4, 5)
    # [N, Hkv, blocks, d, size + window] -> [N * blocks, Hkv, size + window, d], no copy if N = 1
    k, v = (t.unfold(2, size + window, size).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k, v))
    ahead = torch.arange(size + window, device=q.device) - torch.arange(size, device=q.device)[:, None]
    mask = ((ahead > 0) & (ahead <= window)).repeat(H // Hkv, 1)
    o = attend(grouped.flatten(0, 1).flatten(2, 3), k, v, mask)
    o = o.unflatten(0, (N, -1)).unflatten(3, (H // Hkv, size))
    return o.permute(0, 1, 4, 2, 3, 5).reshape(N, T, H, d).transpose(1, 2)


class Attention(FusedProjections, TokenMixer):
    """Grouped-query attention: rotary positions, scale head_dim^-0.5; config.attention_bias, config.use_qk_norm.

        q, k, v = W x (+ b);  q, k = RMSNorm(q), RMSNorm(k) over each head, if asked for;  then rotated
        y = W_o softmax(q k^T / sqrt(head_dim)) v

    A NaN changes no output that does not see its token.

    Attributes:
        window: tokens that a query sees, itself included: key j is visible to query i when 0 <= i - j < window. None:
            all that came before it.
        has_qk_norm: whether there are q_norm and k_norm.
    """

    uses_rotary = True
    draft_type = AttentionDraft
    window: int | None = None
    has_qk_norm = False

    def __init__(self, config: JetNemotronConfig, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        H, Hkv, d, C = config.num_attention_heads, config.num_key_value_heads, config.head_size, config.hidden_size
        self.head_dim = d
        self.initializer_range = config.initializer_range
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(C, H * d, bias=config.attention_bias, **options)
        self.k_proj = nn.Linear(C, Hkv * d, bias=config.attention_bias, **options)
        self.v_proj = nn.Linear(C, Hkv * d, bias=config.attention_bias, **options)
        self.o_proj = nn.Linear(H * d, C, bias=False, **options)
        if config.use_qk_norm:
            self.has_qk_norm = True
            self.q_norm = RMSNorm(d, config.rms_norm_eps, **options)
            self.k_norm = RMSNorm(d, config.rms_norm_eps, **options)
        self.reset_parameters()
        self.fuse()

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
        if self.has_qk_norm:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout,
        rotary: Rotary | None = None,
        state: AttentionCache | AttentionDraft | None = None,
    ) -> Tensor:
        """See `TokenMixer.forward`; the rotary angles must be given."""
        if rotary is None:
            raise ValueError("Attention: rotary must be the cos and sin of the tokens' angles, got None")
        draft = state if isinstance(state, AttentionDraft) else None
        cache = state.cache if isinstance(state, AttentionDraft) else state
        if cache is not None and draft is None and layout.is_dense and layout.max_new == 1:
            cos, sin = (t.flatten(1).expand(layout.batch_size, -1) for t in rotary)
            o = self.step(hidden_states[:, 0], cache, lengths=layout.past_on_device, rotary=(cos, sin))
            return o[:, None]
        q, k, v = self._project(hidden_states)
        if cache is not None:
            self._refuse_gradients(q, k, v)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if draft is not None:
            draft.keep(k, v, layout.past_on_device)
        if layout.max_new == 0:
            o = q
        elif cache is None or layout.uniform_past:
            q, k, v = (layout.pad(t) for t in (q, k, v))
            o = layout.unpad(self._attend(q, k, v, layout.past, layout.new, cache, draft is not None))
        else:
            # After unequal pasts each sequence attends by itself, without masks or padding.
            dim, sizes = (0, [1] * layout.batch_size) if layout.is_dense else (1, layout.new)
            outputs = []
            for n, (q_n, k_n, v_n) in enumerate(zip(*(t.split(sizes, dim) for t in (q, k, v)))):
                past, new, one = [layout.past[n]], [layout.new[n]], cache.sequence(n)
                attended = self._attend(q_n, k_n, v_n, past, new, one, draft is not None) if layout.new[n] else q_n
                outputs.append(attended)
            o = torch.cat(outputs, dim)
        return apply(self.o_proj, "o_proj", o.flatten(-2))

    def step(self, x: Tensor, state: AttentionCache, *, lengths: Tensor, rotary: Rotary | None = None) -> Tensor:
        """See `TokenMixer.step`; of a sequence of negative length nothing is written."""
        if rotary is None:
            raise ValueError("Attention: rotary must be the cos and sin of the tokens' angles, got None")
        q, k, v = self._project(x)
        self._refuse_gradients(q, k, v)
        # An adapter may give another dtype than it gets.
        o = attention_step_(q, k.to(q.dtype), v.to(q.dtype), *rotary, state.key, state.value, lengths)
        return apply(self.o_proj, "o_proj", o.flatten(-2))

    def projections(self) -> dict[str, nn.Module]:
        """q_proj, k_proj and v_proj."""
        return {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [..., C]: q [..., H, head_dim], k and v [..., Hkv, head_dim], the first two normed."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(self.projections(), x))
        return (self.q_norm(q), self.k_norm(k), v) if self.has_qk_norm else (q, k, v)

    @staticmethod
    def _refuse_gradients(*projected: Tensor) -> None:
        if torch.is_grad_enabled() and (any(t.requires_grad for t in projected) or in_backward()):
            raise RuntimeError(
                "Attention: a call with a cache computes no gradient; call it under torch.no_grad(), or without a cache"
            )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: list[int],
        new: list[int],
        cache: AttentionCache | None,
        are_drafts: bool,
    ) -> Tensor:
        """Rotated q, k, v [N, T, heads, head_dim], padded on the right, after equally many tokens each -> as q."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is None:
            o = causal_attention(q, k, v, self.window)
        elif self.window is None:
            o = self._extend(q, k, v, past[0], cache)
        else:
            # What the ring holds, then the new ones, side by side; then the ring is refilled.
            k, v = (_joined(old, new) for old, new in zip(cache.recent(past[0]), (k, v), strict=True))
            o = causal_attention(q, k, v, self.window)
            if not are_drafts:
                cache.rewrite(k, v, past[0], new)
        return o.transpose(1, 2)

    @staticmethod
    def _extend(q: Tensor, k: Tensor, v: Tensor, past: int, cache: AttentionCache) -> Tensor:
        """New tokens after those in the cache."""
        # Every query sees all that was there before: only the new tokens have to be finite, and only for now.
        bad = not_finite(k, v)
        key, value = (t[:, :, : past + k.shape[2]] for t in cache)
        key[:, :, past:], value[:, :, past:] = cleared(k, bad), cleared(v, bad)
        o = marked(finite_attention(q, key, value), bad)
        key[:, :, past:], value[:, :, past:] = k, v
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
