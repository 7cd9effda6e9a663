"""Sequences longer than one device: each rank has the tokens behind those of the rank before it.

A layer of rank r waits for what the same layer of rank r - 1 leaves behind its tokens (the states of a JetBlock, the
keys and values of an attention layer), and hands its own on to rank r + 1; the gradients of these go the other way. The
ranks work on neighbouring layers at the same time. Nothing is approximated: a layer is given what it would have kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, Variable

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.attention import Attention, causal_attention, rotate
from jetkernels.model.layout import TokenLayout
from jetkernels.model.mixers import JetMixer
from jetkernels.model.token_mixer import Rotary
from jetkernels.modules import JetBlockState
from jetkernels.modules.projections import apply

from .divided import Divided, refuse_divided


def _or_all(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found = group or dist.group.WORLD
    if found is None:
        raise RuntimeError("context parallel: torch.distributed must be initialised, or a group given")
    return found


class ContextParallel:
    """The ranks of a group, in the order in which they share out each sequence.

    Args:
        group: None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = _or_all(group)
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self._sent: list[tuple[Any, Tensor]] = []

    def start(self, tokens: int, device: torch.device) -> int:
        """Tokens of each sequence on the ranks before this one, which itself has `tokens`; asks all ranks."""
        own = torch.tensor([tokens], device=device)
        counts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(counts, own, group=self.group)
        return int(torch.cat(counts)[: self.rank].sum())

    def send(self, x: Tensor, step: int) -> None:
        """Hands a tensor to the rank `step` after this one, without waiting for it."""
        x = x.contiguous()
        to = dist.get_global_rank(self.group, self.rank + step)
        self._sent.append((dist.isend(x, to, group=self.group), x))

    def receive(self, like: Tensor, step: int) -> Tensor:
        """A tensor from the rank `step` after this one, as large as `like`."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(x, dist.get_global_rank(self.group, self.rank + step), group=self.group)
        return x

    def finish(self) -> None:
        """Waits until what was handed on has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def finish_behind_backward(self) -> None:
        """`finish`, at the end of the backward pass that is under way: who has made it may leave the group."""
        Variable._execution_engine.queue_callback(self.finish)

    def from_before(self, anchor: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the rank before this one hands on, as large as `like`; the gradients go back to it.

        Args:
            anchor: has a gradient if the layer has one.
            like: zeros, which rank 0 is given.
        """
        return tuple(like) if self.rank == 0 else _FromBefore.apply(anchor, self, *like)

    def hand_on(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Hands tensors on to the next rank, and y to the caller, with whose gradient theirs are waited for."""
        return y if self.rank == self.size - 1 else _HandOn.apply(y, self, *tensors)


class _FromBefore(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ranks: ContextParallel, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(ranks.receive(each, -1) for each in like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for gradient in gradients:
            ctx.ranks.send(gradient, -1)
        ctx.ranks.finish_behind_backward()
        return (None, None, *(None for _ in gradients))


class _HandOn(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: ContextParallel, *tensors: Tensor) -> Tensor:
        ctx.ranks = ranks
        ctx.like = [torch.empty_like(each, device="meta") for each in tensors], y.device
        for each in tensors:
            ranks.send(each, 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        like, device = ctx.like
        ctx.ranks.finish_behind_backward()
        found = [ctx.ranks.receive(torch.empty_like(each, device=device), 1) for each in like]
        return (gradients[0], None, *found)


class _Part(Divided):
    """Comes in front of the class of a token mixer: the sequence begins on another rank."""

    _ranks: ContextParallel

    def _check(self, layout: TokenLayout, state: object) -> None:
        if state is not None or not layout.is_dense:
            got = "a cache" if state is not None else "a packed or padded batch"
            raise ValueError(f"context parallel: a call must be of whole sequences [B, T] without a cache, got {got}")


class _PartOfJetMixer(_Part):
    def forward(self, x: Tensor, *, layout: TokenLayout, rotary: Rotary | None = None, state: Any = None) -> Tensor:
        """See `TokenMixer.forward`."""
        assert isinstance(self, JetMixer)
        self._check(layout, state)
        p = self._project(x)
        zeros = JetBlockState.zeros(self.config, x.shape[0], device=x.device, dtype=p.v.dtype)
        before = JetBlockState(*self._ranks.from_before(p.v, zeros))
        o, after = self._recur(x, p, None, before, output_final_state=True)
        assert after is not None
        return apply(self.o_proj, "o_proj", self.o_norm(self._ranks.hand_on(o, after), p.gate).flatten(-2))


class _PartOfAttention(_Part):
    def forward(self, x: Tensor, *, layout: TokenLayout, rotary: Rotary | None = None, state: Any = None) -> Tensor:
        """See `TokenMixer.forward`."""
        assert isinstance(self, Attention) and rotary is not None
        self._check(layout, state)
        q, k, v = self._project(x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *rotary), rotate(k, *rotary), v))
        seen = layout.max_past if self.window is None else min(layout.max_past, self.window - 1)
        if seen:
            like = [t.new_empty(*t.shape[:2], seen, t.shape[3]) for t in (k, v)]
            k, v = (torch.cat(pair, 2) for pair in zip(self._ranks.from_before(k, like), (k, v)))
        o = causal_attention(q, k, v, self.window)
        kept = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        if kept:
            o = self._ranks.hand_on(o, [t[:, :, t.shape[2] - kept :] for t in (k, v)])
        return apply(self.o_proj, "o_proj", o.transpose(1, 2).flatten(-2))


class _PartOfModel(Divided):
    _ranks: ContextParallel

    def forward(self, input_ids: Tensor | None, layout: TokenLayout, *args: Any, **options: Any) -> Tensor:
        """See `JetNemotronModel.forward`."""
        device = layout.positions.device
        self._ranks.finish()
        past = [self._ranks.start(layout.max_new, device)] * layout.batch_size
        whole = TokenLayout.dense(layout.batch_size, layout.max_new, past, None, device) if layout.is_dense else layout
        h = super().forward(input_ids, whole, *args, **options)
        if not h.requires_grad:
            self._ranks.finish()
        return h


def context_parallel_(model: JetNemotronForCausalLM, group: dist.ProcessGroup | None = None) -> JetNemotronForCausalLM:
    """Lets the ranks of a group share out every sequence, in place; each has the whole model, with the same weights.

    A call then takes this rank's tokens [B, T] of the same sequences, in the order of the ranks, at least one of each
    sequence and as many of each, and gives their logits; what came before is on the ranks before. Every rank makes the
    same calls, and the same backward passes. No cache, no padding, no packed sequences. The gradients of the parameters
    are this rank's part of a sum over the ranks. `labels` would not know the token behind this rank's last one:
    `split_sequence` gives each token the one that it should predict.

    Args:
        model: of this library's layers.
        group: None for all ranks.

    Returns: the model.

    Raises:
        ValueError: a layer is of another kind, or the model is divided already; nothing has changed.
    """
    refuse_divided("context parallel", model)
    kinds: dict[type, type[_Part]] = {JetMixer: _PartOfJetMixer, Attention: _PartOfAttention}
    mixers = [layer.self_attn for layer in model.model.layers]
    for i, mixer in enumerate(mixers):
        if not isinstance(mixer, tuple(kinds)):
            got = type(mixer).__name__
            raise ValueError(f"context parallel: layer {i} must have a JetMixer or an Attention, got {got}")
    ranks = ContextParallel(group)
    for mixer in mixers:
        own = next(part for kind, part in kinds.items() if isinstance(mixer, kind))
        mixer.__class__ = type(f"ContextParallel{type(mixer).__name__}", (own, type(mixer)), {"__module__": __name__})
        cast(_Part, mixer)._ranks = ranks
    whole: Any = model.model
    name, bases = f"ContextParallel{type(whole).__name__}", (_PartOfModel, type(whole))
    whole.__class__ = type(name, bases, {"__module__": __name__})
    whole._ranks = ranks
    return model


def split_sequence(input_ids: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """This rank's tokens of whole sequences, and the token that each of them should predict.

    Args:
        input_ids: [B, T], the same on every rank, T at least the number of ranks.
        group: None for all ranks.

    Returns: [B, T_r] each; the lengths of the ranks differ by one at most. -100 is behind the last token of all, as
        `torch.nn.functional.cross_entropy` wants it.

    Raises:
        ValueError: there are fewer tokens than ranks.
    """
    group = _or_all(group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if input_ids.shape[1] < size:
        raise ValueError(f"input_ids must have a token for each of the {size} ranks, got {input_ids.shape[1]}")
    following = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    return input_ids.tensor_split(size, 1)[rank].contiguous(), following.tensor_split(size, 1)[rank].contiguous()
