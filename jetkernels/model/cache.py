"""What the model remembers of the tokens it has seen: allocated once, written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from jetkernels.modules import JetBlockState, checks
from jetkernels.modules.repeatable import in_backward

from .config import JetNemotronConfig
from .layout import TokenLayout


class AttentionCache:
    """Keys and values of N sequences, [N, Hkv, slots, head_dim].

    A full layer has a slot per token: the token at position p lies in slot p. A windowed layer has min(window,
    max_length) slots used as a ring: position p lies in slot p % slots, over the token that has left the window.
    """

    def __init__(self, batch_size: int, heads: int, slots: int, head_dim: int, *, device, dtype):
        # Zeros, not empty: unused slots are masked, but a NaN would pass through 0 * NaN.
        # Nor zeros_like, which on meta imports torch's Python references: seconds.
        self.key, self.value = (
            torch.zeros(batch_size, heads, slots, head_dim, device=device, dtype=dtype) for _ in range(2)
        )

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    def write(self, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
        """Stores new keys and values, [N, T, Hkv, d] or packed [1, total, Hkv, d], each in its slot.

        No two tokens of one sequence may fall into one slot.
        """
        for buffer, new in ((self.key, key), (self.value, value)):
            if layout.is_dense and layout.uniform_past and self._contiguous(layout):
                start = layout.max_past % self.slots
                buffer[:, :, start : start + layout.max_new].copy_(new.transpose(1, 2))
            elif layout.is_dense:
                rows = torch.arange(layout.batch_size, device=new.device)[:, None]
                buffer[rows, :, layout.positions % self.slots] = new.to(buffer.dtype)
            else:
                buffer[layout.rows, :, layout.positions[0] % self.slots] = new[0].to(buffer.dtype)

    def _contiguous(self, layout: TokenLayout) -> bool:
        return layout.max_past % self.slots + layout.max_new <= self.slots

    def recent(self, count: int, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values of each ring, oldest first, [N, Hkv, count, d].

        A sequence of fewer than `count` tokens has something meaningless, but finite, in front.
        """
        device = self.key.device
        if layout.uniform_past:
            positions = torch.arange(layout.max_past - count, layout.max_past, device=device) % self.slots
            return self.key[:, :, positions], self.value[:, :, positions]
        positions = (layout.past_device[:, None] + torch.arange(-count, 0, device=device)) % self.slots
        return self._gather(self.key, positions), self._gather(self.value, positions)

    @staticmethod
    def _gather(x: Tensor, index: Tensor) -> Tensor:
        """x [N, Hkv, L, d], index [N, M] -> [N, Hkv, M, d]."""
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def rewrite(self, key: Tensor, value: Tensor, past: int, layout: TokenLayout) -> None:
        """Refills every slot of the ring from keys and values [N, Hkv, past + T, d].

        Their first `past` are what `recent` gave, the others new, padding on the right. Any number of new tokens.
        """
        slot = torch.arange(self.slots, device=key.device)
        before = torch.tensor(layout.past, device=key.device)[:, None]
        total = before + torch.tensor(layout.new, device=key.device)[:, None]
        # The newest position that falls into each slot, then where it is among the given keys.
        newest = total - 1 - (total - 1 - slot) % self.slots
        index = (newest - before + past).clamp(min=0)
        self.key.copy_(self._gather(key, index))
        self.value.copy_(self._gather(value, index))


def _sizes(config: JetNemotronConfig) -> dict[str, object]:
    """What a cache and the model that uses it must have in common, by names of the config."""
    kinds = set(config.layer_types)
    sizes: dict[str, object] = {"layer_types": list(config.layer_types)}
    if kinds & {"attn", "swa"}:
        sizes |= {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if "swa" in kinds:
        sizes["window_size"] = config.window_size
    if "jet" in kinds:
        sizes |= {
            f"jet.{name}": getattr(config.jet, name) for name in ("num_heads", "head_dim", "head_v_dim", "conv_size")
        }
    return sizes


class JetNemotronCache:
    """Memory of a batch of sequences: keys and values of the attention layers, states of the JetBlock layers.

    Holds up to `max_length` tokens per sequence; sequences may have different lengths. `forward` writes into it in
    place, so a step allocates nothing here. Made by `JetNemotronForCausalLM.new_cache`. A call that was interrupted, by
    an exception or by the keyboard, leaves layers that have seen its tokens and others that have not: the cache then
    refuses further calls until `reset`.

    layers: per layer an AttentionCache or a JetBlockState.  lengths: tokens seen, per sequence.
    """

    _unfinished = False

    def __init__(self, config: JetNemotronConfig, batch_size: int, max_length: int, *, device=None, dtype=None):
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"cache: {name} must be an integer, got {value!r}")
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"cache: batch_size and max_length must be at least 1, got {batch_size} and {max_length}")
        self.max_length = max_length
        self._made_for = _sizes(config)
        # One that belongs to a function which is being run again starts anew, as it did the first time.
        self.made_in_backward = in_backward()
        self.lengths = [0] * batch_size
        dtype = dtype or torch.get_default_dtype()
        self.layers: list[AttentionCache | JetBlockState] = []
        for kind in config.layer_types:
            if kind == "jet":
                self.layers.append(JetBlockState.zeros(config.jet, batch_size, device=device, dtype=dtype))
            else:
                slots = max_length if kind == "attn" else min(max_length, config.window_size)
                heads, head_dim = config.num_key_value_heads, config.head_dim
                self.layers.append(AttentionCache(batch_size, heads, slots, head_dim, device=device, dtype=dtype))
        self.lengths_device = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from layer.tensors() if isinstance(layer, AttentionCache) else layer

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def check_model(self, config: JetNemotronConfig) -> None:
        """Raises ValueError unless it was made for a model of these sizes."""
        mine, others = self._made_for, _sizes(config)
        if mine != others:
            name = next(name for name in others if mine.get(name) != others[name])
            raise ValueError(
                f"cache must be of this model: it was made for {name} = {checks.shown(mine.get(name))}, "
                f"the model has {checks.shown(others[name])}"
            )

    def check(self, new: list[int]) -> None:
        """Raises ValueError unless `new[n]` more tokens of sequence n fit; RuntimeError if they have been here before,
        or others have been here in part."""
        if torch.is_grad_enabled() and in_backward() and not self.made_in_backward:
            raise RuntimeError(
                "cache: a call with a cache cannot be repeated in a backward pass, as activation checkpointing does: the cache "
                "already holds its tokens. Call the model outside the checkpointed function, or make the cache inside it"
            )
        if self._unfinished:
            raise RuntimeError("cache: an earlier call on this cache did not finish: reset() it or make a new one")
        if len(new) != self.batch_size:
            raise ValueError(f"cache: holds {self.batch_size} sequences, got {len(new)}")
        for n, (length, more) in enumerate(zip(self.lengths, new)):
            if length + more > self.max_length:
                raise ValueError(
                    f"cache: max_length = {self.max_length} must hold the {length} + {more} tokens of sequence {n}"
                )

    def begin(self) -> None:
        """From here on layers write into the cache, until `advance`."""
        self._unfinished = True

    def advance(self, layout: TokenLayout) -> None:
        """Counts the tokens of a finished call."""
        self.lengths = [length + more for length, more in zip(self.lengths, layout.new)]
        if len(set(layout.new)) == 1:
            self.lengths_device += layout.new[0]
        else:
            self.lengths_device += torch.tensor(layout.new, device=self.lengths_device.device)
        self._unfinished = False

    def reset(self) -> None:
        """Forgets every sequence; the memory stays."""
        for tensor in self.tensors():
            tensor.zero_()
        self.lengths = [0] * self.batch_size
        self.lengths_device.zero_()
        self._unfinished = False
