"""What the model remembers of the tokens it has seen: allocated once, written in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.types import Device

from jetkernels.modules import checks
from jetkernels.modules.repeatable import in_backward

from .attention import AttentionCache as AttentionCache  # where pickled caches look for it
from .config import JetNemotronConfig
from .layout import TokenLayout
from .mixers import MIXERS
from .token_mixer import Draft, State, TokenMixer


def _sizes(config: JetNemotronConfig) -> dict[str, object]:
    """What a cache and the model that uses it must have in common, by names of the config."""
    sizes: dict[str, object] = {"layer_types": list(config.layer_types)}
    for kind, mixer in MIXERS.items():
        if kind in config.layer_types:
            sizes |= mixer.sizes(config)
    return sizes


def _autocast_is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    """A list of a sequence or a tensor [N] of integers."""
    numbers = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(numbers, Iterable) or not all(type(number) is int for number in numbers):
        raise ValueError(f"cache: {name} must be a sequence of integers, got {checks.shown(values)}")
    return list(numbers)


def _selected(state: State, index: Tensor) -> State:
    """A copy of a state with the sequences `index` of each tensor; what else is in it stays as it is."""
    held = list(state)
    chosen = [tensor.index_select(0, index) for tensor in held]
    # A copy takes what it finds here in the place of what it would copy.
    selected = copy.deepcopy(state, {id(old): new for old, new in zip(held, chosen)})
    if any(new is not mine for new, mine in zip(chosen, selected, strict=True)):
        raise TypeError(f"cache: a {type(state).__name__} must hold the tensors that it gives, to be selected from")
    return selected


PATTERN = 1 << 20  # values drawn by `fill_normal_`: drawing every one of 64 K tokens takes a CPU minutes


def fill_normal_(tensor: Tensor, generator: torch.Generator) -> None:
    """Fills a contiguous tensor with values of the standard normal distribution; every 2^20 values they repeat."""
    flat = tensor.view(-1)
    pattern = torch.randn(min(flat.numel(), PATTERN), generator=generator, device=tensor.device).to(tensor.dtype)
    for part in flat.split(PATTERN):
        part.copy_(pattern[: part.numel()])


class JetNemotronCache:
    """Memory of a batch of sequences: keys and values of the attention layers, states of the JetBlock layers.

    Holds up to `max_length` tokens per sequence; sequences may have different lengths. `forward` writes into it in
    place, so a step allocates nothing here. Made by `JetNemotronForCausalLM.new_cache`. A call that was interrupted, by
    an exception or by the keyboard, leaves layers that have seen its tokens and others that have not: the cache then
    refuses further calls until `reset`.

    Args:
        config: of the model.
        batch_size: sequences.
        max_length: tokens per sequence, at most.
        device: of the memory.
        dtype: of the layers' activations; torch's default if None.
        mixers: token mixers of the layers, if they are not those that the config names.

    Attributes:
        dtype: of the layers' activations; None in a cache that was pickled when it did not say so.
        layers: the state of each layer.
        lengths: tokens seen, per sequence.
    """

    _unfinished = False
    # Those of the layers, from the call that verifies tokens to `commit`; and how many tokens of each sequence.
    _drafts: list[Draft] | None = None
    _draft_tokens: int | None = None
    dtype: torch.dtype | None = None

    def __init__(
        self,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        mixers: Sequence[TokenMixer | type[TokenMixer]] | None = None,
    ):
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
        self.dtype = dtype = dtype or torch.get_default_dtype()
        if mixers is None:
            mixers = [MIXERS[kind] for kind in config.layer_types]
        self.layers: list[State] = [
            mixer.initial_state(config, batch_size, max_length, device=device, dtype=dtype) for mixer in mixers
        ]
        self.lengths_device = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def batch_size(self) -> int:
        """Sequences that there is memory for."""
        return len(self.lengths)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of every layer's state."""
        for layer in self.layers:
            yield from layer

    @property
    def states(self) -> Sequence[State | Draft]:
        """What the layers are given in a call: their states, or the drafts that stand for them."""
        return self.layers if self._drafts is None else self._drafts

    @property
    def is_drafting(self) -> bool:
        """Whether a call's tokens are drafts."""
        return self._drafts is not None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        """Of the memory."""
        return self.lengths_device.device

    def check_model(self, config: JetNemotronConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError unless it was made for a model of these sizes, that computes there and in this dtype.

        Autocast chooses the dtype of each operation, so it fits any memory.
        """
        mine, others = self._made_for, _sizes(config)
        if mine != others:
            name = next(name for name in others if mine.get(name) != others[name])
            raise ValueError(
                f"cache must be of this model: it was made for {name} = {checks.shown(mine.get(name))}, "
                f"the model has {checks.shown(others[name])}"
            )
        if self.device != device:
            raise ValueError(f"cache must be on {device}, like the model, got {self.device}")
        if self.dtype not in (dtype, None) and not _autocast_is_on(device):
            raise ValueError(f"cache must be of {dtype}, like the model, got {self.dtype}")

    def check(self, new: list[int]) -> None:
        """Raises unless a call may bring `new[n]` more tokens of sequence n.

        Raises:
            ValueError: they do not fit.
            RuntimeError: they may have been here before, in the pass that this one repeats; or an earlier call left its
                tokens in some layers only.
        """
        if torch.is_grad_enabled() and in_backward() and not self.made_in_backward:
            raise RuntimeError(
                "cache: a call with a cache cannot be repeated in a backward pass, as activation checkpointing does: "
                "the cache already holds its tokens. Call the model outside the checkpointed function, or make the "
                "cache inside it"
            )
        self._check_usable()
        if len(new) != self.batch_size:
            raise ValueError(f"cache: holds {self.batch_size} sequences, got {len(new)}")
        for n, (length, more) in enumerate(zip(self.lengths, new)):
            if length + more > self.max_length:
                raise ValueError(
                    f"cache: max_length = {self.max_length} must hold the {length} + {more} tokens of sequence {n}"
                )

    def _check_usable(self) -> None:
        if self._unfinished:
            raise RuntimeError("cache: an earlier call on this cache did not finish: reset() it or make a new one")
        if self._draft_tokens is not None:
            raise RuntimeError(
                f"cache: {self._draft_tokens} draft tokens of each sequence have been verified: commit() says how many "
                "of them are accepted (0 for none) before another call"
            )

    def begin(self) -> None:
        """From here on layers write into the cache, until `advance`."""
        self._unfinished = True

    def advance(self, layout: TokenLayout) -> None:
        """Counts the tokens of a finished call; drafts are counted by `commit`."""
        if self._drafts is not None:
            self._draft_tokens = layout.max_new
            self._unfinished = False
            return
        self.lengths = [length + more for length, more in zip(self.lengths, layout.new)]
        if len(set(layout.new)) == 1:
            self.lengths_device += layout.new[0]
        else:
            self.lengths_device += torch.tensor(layout.new, device=self.lengths_device.device)
        self._unfinished = False

    def count_step(self) -> None:
        """Counts one token of each sequence, which the device has counted already."""
        self.lengths = [length + 1 for length in self.lengths]
        self._unfinished = False

    @contextmanager
    def drafting(self, draft_types: Sequence[type[Draft]]) -> Iterator[None]:
        """Inside, the tokens of a call are drafts; `JetNemotronForCausalLM.verify` is such a call.

        Args:
            draft_types: of the layers; see `TokenMixer`.

        Raises:
            RuntimeError: the cache cannot be used.
        """
        self._check_usable()
        self._drafts = [draft_type(state) for draft_type, state in zip(draft_types, self.layers, strict=True)]
        try:
            yield
        finally:
            if self._draft_tokens is None:  # no call came to its end
                self._drafts = None

    @torch.no_grad()
    def commit(self, num_accepted: int | Sequence[int] | Tensor) -> None:
        """Accepts the first draft tokens of each sequence, of those that `verify` has read; the others are forgotten.

        The cache is then as if a call had brought the accepted ones alone.

        Args:
            num_accepted: of each sequence, 0 to T; a number is that of all. Also a tensor [N] of integers, which is
                read on the host, once.

        Raises:
            ValueError: the numbers are wrong; the drafts still wait.
            RuntimeError: no drafts wait, or an earlier call did not finish.
        """
        if self._drafts is None or self._draft_tokens is None:
            raise RuntimeError("cache: no draft tokens wait for commit(): verify() reads them")
        if self._unfinished:
            self._check_usable()
        of_each = [num_accepted] * self.batch_size if isinstance(num_accepted, int) else num_accepted
        accepted = _integers("num_accepted", of_each)
        if len(accepted) != self.batch_size:
            raise ValueError(f"cache: holds {self.batch_size} sequences, got num_accepted of {len(accepted)}")
        for n, count in enumerate(accepted):
            if not 0 <= count <= self._draft_tokens:
                raise ValueError(f"cache: num_accepted[{n}] must be in 0..{self._draft_tokens}, got {count}")
        on_device = torch.tensor(accepted, device=self.device)
        self._unfinished = True
        for draft in self._drafts:
            draft.commit(on_device)
        self.lengths = [length + count for length, count in zip(self.lengths, accepted)]
        self.lengths_device += on_device
        self._forget_drafts()
        self._unfinished = False

    def _forget_drafts(self) -> None:
        self._drafts = self._draft_tokens = None

    def select(self, rows: Sequence[int] | Tensor) -> JetNemotronCache:
        """A cache of some sequences of this one, in any order; this one stays as it is.

        Args:
            rows: their numbers; a tensor of integers, too. One may come several times, as beams that grow from one text
                do, or not at all.

        Raises:
            ValueError: rows are empty, or no numbers of sequences.
            RuntimeError: an earlier call did not finish, or drafts wait for `commit`.
        """
        selected = copy.copy(self)
        selected.layers = list(self.layers)
        selected._select(rows, in_place=False)
        return selected

    def select_(self, rows: Sequence[int] | Tensor) -> None:
        """`select` in place. Where the number of sequences stays the same, the memory does."""
        self._select(rows, in_place=True)

    @torch.no_grad()
    def _select(self, rows: Sequence[int] | Tensor, in_place: bool) -> None:
        self._check_usable()
        numbers = _integers("rows", rows)
        if not numbers:
            raise ValueError("cache: rows must name at least one sequence, got none")
        for number in numbers:
            if not 0 <= number < self.batch_size:
                raise ValueError(f"cache: rows must be in 0..{self.batch_size - 1}, got {number}")
        index = torch.tensor(numbers, device=self.device)
        if in_place and len(numbers) == self.batch_size:
            self._unfinished = True
            for tensor in (*self.tensors(), self.lengths_device):
                tensor.copy_(tensor.index_select(0, index))
        else:
            self.layers = [_selected(layer, index) for layer in self.layers]
            self.lengths_device = self.lengths_device.index_select(0, index)
        self.lengths = [self.lengths[number] for number in numbers]
        self._unfinished = False

    @torch.no_grad()
    def preset(self, lengths: Sequence[int], seed: int = 0) -> None:
        """Stands as if `lengths[n]` tokens of sequence n had been read, with values that no model computed.

        For measuring a step behind long contexts, whose prefill would take minutes: keys, values and states are drawn
        from the standard normal distribution, the free slots too. Every page of the memory is written.

        Args:
            lengths: tokens of each sequence.
            seed: of the values.

        Raises:
            ValueError: the lengths are not those of the cache's sequences, or do not fit.
        """
        if len(lengths) != self.batch_size:
            raise ValueError(f"cache: holds {self.batch_size} sequences, got {len(lengths)} lengths")
        for n, length in enumerate(lengths):
            if type(length) is not int or not 0 <= length <= self.max_length:
                raise ValueError(
                    f"cache: lengths[{n}] must be an integer from 0 to max_length = {self.max_length}, "
                    f"got {checks.shown(length)}"
                )
        generator = torch.Generator(self.lengths_device.device).manual_seed(seed)
        for tensor in self.tensors():
            if tensor.is_floating_point():
                fill_normal_(tensor, generator)
        self.lengths = list(lengths)
        self.lengths_device.copy_(torch.tensor(self.lengths))
        self._forget_drafts()
        self._unfinished = False

    @torch.no_grad()
    def copy_from(self, other: JetNemotronCache) -> None:
        """Stands as `other` does, a cache of the same model and batch size, whose max_length may be smaller.

        Raises:
            ValueError: the caches do not fit.
            RuntimeError: an earlier call on `other` did not finish, or drafts wait there for `commit`.
        """
        other._check_usable()
        if other.max_length > self.max_length or other.batch_size != self.batch_size:
            raise ValueError(
                f"cache: a cache of {self.batch_size} sequences of {self.max_length} tokens cannot hold one of "
                f"{other.batch_size} of {other.max_length}"
            )
        for tensor, earlier in zip(self.tensors(), other.tensors(), strict=True):
            # The slots of a token are the first ones in both: a ring that has begun anew has all slots of its window.
            tensor[tuple(map(slice, earlier.shape))] = earlier
        self.lengths = list(other.lengths)
        self.lengths_device.copy_(other.lengths_device)
        self._unfinished = False

    def reset(self) -> None:
        """Forgets every sequence; the memory stays."""
        for tensor in self.tensors():
            tensor.zero_()
        self.lengths = [0] * self.batch_size
        self.lengths_device.zero_()
        self._forget_drafts()
        self._unfinished = False
