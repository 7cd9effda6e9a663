"""Text generation: prefill, then one token at a time for a whole batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jetkernels.modules.checks import shown

from .cache import JetNemotronCache
from .capture import Repeated
from .drafts import MOST_PROPOSED, DraftedRows, PromptLookup, Propose
from .sampling import choose, most_likely

if TYPE_CHECKING:
    from .hybrid import JetNemotronForCausalLM

# Steps between two looks at whether every row has ended, on devices where looking stalls the queue of work.
STOP_CHECK_INTERVAL = 16
# New tokens from which on it pays to capture a step: that takes as long as a few of them.
CAPTURE_FROM = 8


def align_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real tokens of each row [B, T] to its right end, in order; returns ids and mask so arranged."""
    order = (attention_mask != 0).to(torch.int8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.no_grad()
def generate(
    model: JetNemotronForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
    capture: bool = True,
    draft: int | Propose | None = None,
    on_draft: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Continues each prompt of a batch with a JetNemotronForCausalLM.

    Args:
        model: whose config says which tokens end a text.
        input_ids: [B, T] int64 or int32, T >= 1, on the model's device.
        attention_mask: [B, T], zero at padding (either side), never in a whole row.
        max_new_tokens: upper bound per row.
        temperature: 0 picks the most likely token, otherwise logits are divided by it before a draw; finite.
        top_k: draw from this many most likely tokens.
        top_p: draw from the fewest tokens whose probabilities reach it, in (0, 1].
        stop_token_ids: a row ends with the first of these; the config's eos by default, () for none.
        pad_token_id: what follows in rows that ended before others; the config's pad (eos) by default.
        on_tokens: called after each step with the new tokens [B] and which rows were still running [B] (bool).
        generator: for draws, on the model's device; the global one by default.
        prefill_chunk: prompt tokens per forward; bounds the memory of a long prompt. The whole prompt by default.
        capture: replay the steps from a CUDA graph, on a GPU, where a step `has_device_steps`. The tokens are the same.
            Steps with drafts are not captured.
        draft: so many tokens are proposed at each step (`PromptLookup`) and read at once, and those are kept that would
            have come anyway; or a function that proposes them (`drafts.Propose`), at most `drafts.MOST_PROPOSED` of a
            row. At temperature 0 only. The tokens are those that come without drafts, but where the two largest logits
            lie so close together that rounding decides: several tokens read at once are rounded otherwise than one.
        on_draft: called after each step of a run with drafts with how many tokens of each row were proposed, and how
            many of them accepted, [B] int64 each; -1 in rows that had ended.

    Returns: [B, T + new] int64, the prompt as given and the new tokens; new <= max_new_tokens, fewer when all rows end.

    Raises:
        ValueError: an argument is wrong; nothing has been computed.
        TypeError: an argument is of a wrong type; nothing has been computed.
        RuntimeError: logits after a prompt are not finite.
        BaseException: whatever on_tokens raises; it ends the generation.
    """
    _check_prompt(model, input_ids, attention_mask)
    max_new_tokens = _count("max_new_tokens", max_new_tokens, 0)
    top_k = None if top_k is None else _count("top_k", top_k, 1)
    prefill_chunk = None if prefill_chunk is None else _count("prefill_chunk", prefill_chunk, 1)
    temperature, top_p = _temperature(temperature), None if top_p is None else _top_p(top_p)
    _check_helpers(on_tokens, generator, input_ids.device)
    propose = _propose(model, draft, on_draft, temperature)
    config = model.config
    stop = config.stop_token_ids if stop_token_ids is None else _token_ids("stop_token_ids", stop_token_ids)
    pad = config.padding_token_id if pad_token_id is None else _integer("pad_token_id", pad_token_id)
    B, T = input_ids.shape
    if max_new_tokens == 0:
        return input_ids.to(torch.int64, copy=True)
    if propose is not None:
        rows = DraftedRows(input_ids, attention_mask, max_new_tokens, stop, pad, on_tokens, on_draft)
        return _generate_with_drafts(model, input_ids, attention_mask, rows, propose, prefill_chunk)
    device = input_ids.device
    out = torch.full((B, T + max_new_tokens), pad, dtype=torch.int64, device=device)
    out[:, :T] = input_ids
    # The last of the new tokens is never fed back.
    cache = model.new_cache(B, T + max_new_tokens - 1)
    loop = _Loop(out, T, torch.tensor(stop, dtype=torch.int64, device=device), pad)
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    device_steps = model.has_device_steps

    def step() -> None:
        if device_steps:
            logits = model.compute_step(loop.chosen, cache)
        else:
            logits = model(loop.chosen[:, None], cache=cache).logits[:, -1]
        # Rows that have ended go on with tokens that nobody sees: the padding need not be in the vocabulary.
        loop.take(pick(logits))

    def undo() -> None:
        cache.reset()
        loop.reset()

    repeated = Repeated(
        step, device, undo=undo, generator=generator, capture=capture and device_steps and max_new_tokens > CAPTURE_FROM
    )
    logits = prefill(model, input_ids, attention_mask, cache, prefill_chunk)
    _check_finite(logits)
    loop.take(pick(logits[:, -1]))
    interval = STOP_CHECK_INTERVAL if device.type != "cpu" and on_tokens is None else 1
    for count in range(1, max_new_tokens + 1):
        if on_tokens is not None:
            on_tokens(loop.tokens.clone(), loop.were_running.clone())
        if count == max_new_tokens or (stop and count % interval == 0 and not loop.running.any()):
            break
        if device_steps:
            cache.begin()
        repeated()
        if device_steps:
            cache.count_step()
    return out[:, : T + int(loop.counts.max())]


def _generate_with_drafts(
    model: JetNemotronForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    rows: DraftedRows,
    propose: Propose,
    chunk: int | None,
) -> Tensor:
    """The greedy part of `generate`, several tokens at a step where drafts are right."""
    B, T = input_ids.shape
    # Rows that cannot take a token more are verified with the others.
    cache = model.new_cache(B, T + rows.most_new + MOST_PROPOSED)
    logits = prefill(model, input_ids, attention_mask, cache, chunk)
    _check_finite(logits)
    rows.take([[token] for token in most_likely(logits[:, -1]).tolist()])
    while rows.are_running:
        rows.step(model, cache, propose)
    new = rows.new_tokens()
    return torch.cat((input_ids.to(torch.int64), new), 1)


class _Loop:
    """What the steps of a generation write: tensors on the device, the same ones in every step.

    Attributes:
        out: [B, T + new], prompts and tokens.
        chosen: [B], the latest tokens, as they are fed back.
        tokens: [B], the same with the padding in rows that had ended.
        running: [B], which rows go on.
        were_running: [B], which rows the latest tokens belong to.
        counts: [B], how many tokens each row has got, its stop token included.
    """

    def __init__(self, out: Tensor, start: int, stops: Tensor, pad: int):
        self.out, self.start, self.stops, self.pad = out, start, stops, pad
        B, device = out.shape[0], out.device
        self.chosen, self.tokens, self.counts = torch.zeros(3, B, dtype=torch.int64, device=device)
        self.running, self.were_running = torch.ones(2, B, dtype=torch.bool, device=device)
        self.column = torch.full((1,), start, dtype=torch.int64, device=device)

    def take(self, chosen: Tensor) -> None:
        """Appends a token to each row that is running."""
        self.chosen.copy_(chosen)
        self.were_running.copy_(self.running)
        self.tokens.copy_(torch.where(self.running, chosen, self.pad))
        self.out.index_copy_(1, self.column, self.tokens[:, None])
        self.column += 1
        self.counts += self.running
        self.running &= (chosen[:, None] != self.stops).all(1)

    def reset(self) -> None:
        """As it was at first."""
        self.out[:, self.start :] = self.pad
        for tensor in (self.chosen, self.tokens, self.counts):
            tensor.zero_()
        self.running.fill_(True)
        self.column.fill_(self.start)


def prefill(
    model: JetNemotronForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: JetNemotronCache,
    chunk: int | None = None,
) -> Tensor:
    """Runs prompts [B, T] into an empty cache, `chunk` columns at a time.

    Returns: logits [B, 1, vocab] after each row's last token.
    """
    T = input_ids.shape[1]
    if attention_mask is not None:
        # Every row then ends in the last column, whichever side was padded.
        input_ids, attention_mask = align_right(input_ids, attention_mask)
    size = chunk or T
    for start in range(0, T, size):
        mask = None if attention_mask is None else attention_mask[:, start : start + size]
        logits = model(input_ids[:, start : start + size], mask, cache, last_logits_only=True).logits
    return logits


def _check_prompt(model: JetNemotronForCausalLM, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, T] with B, T >= 1, got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.device != model.device:
        raise ValueError(f"input_ids must be on the model's device {model.device}, got {input_ids.device}")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, T], got {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must be on the device of input_ids, {input_ids.device}, got {attention_mask.device}"
        )
    kept = (attention_mask != 0).any(dim=1)
    if not bool(kept.all()):
        row = kept.tolist().index(False)
        raise ValueError(f"attention_mask must keep at least one token of each row, got a row of zeros: row {row}")


def _check_helpers(on_tokens: object, generator: object, device: torch.device) -> None:
    if on_tokens is not None and not callable(on_tokens):
        raise TypeError(f"on_tokens must be callable, got {shown(on_tokens)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {shown(generator)}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator must be on the model's device {device}, got one on {generator.device}")


def _propose(model: JetNemotronForCausalLM, draft: object, on_draft: object, temperature: float) -> Propose | None:
    """What proposes draft tokens."""
    if on_draft is not None and not callable(on_draft):
        raise TypeError(f"on_draft must be callable, got {shown(on_draft)}")
    if draft is None:
        if on_draft is not None:
            raise ValueError("on_draft needs draft, the number of tokens to propose, got draft = None")
        return None
    propose = draft if callable(draft) else PromptLookup(_draft_tokens(draft))
    if temperature > 0:
        raise ValueError(
            f"draft needs temperature 0: drafts are held against the most likely tokens, got temperature {temperature}"
        )
    model.draft_types()
    return propose


def _draft_tokens(value: object) -> int:
    count = _count("draft", value, 1)
    if count > MOST_PROPOSED:
        raise ValueError(f"draft must be at most {MOST_PROPOSED} tokens, got {count}")
    return count


def _count(name: str, value: object, least: int) -> int:
    count = _integer(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def _temperature(value: object) -> float:
    temperature = _number("temperature", value)
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if math.isinf(temperature):
        raise ValueError(f"temperature must be finite, got {shown(value)}")
    return temperature


def _top_p(value: object) -> float:
    top_p = _number("top_p", value)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return top_p


def _integer(name: str, value: Any) -> int:
    """Any integer that a tensor can hold, also one of NumPy or in a tensor."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {shown(number)}")
    return number


def _number(name: str, value: Any) -> float:
    """Any number, also one of NumPy or in a tensor; infinity for an integer that is too large."""
    try:
        if not isinstance(value, str):
            return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {shown(value)}")


def _token_ids(name: str, values: object) -> list[int]:
    """A list of ids from a sequence, a tensor or a single id."""
    if isinstance(values, Tensor):
        values = values.tolist()
    return [_integer(name, value) for value in (values if isinstance(values, Iterable) else [values])]


def _check_finite(logits: Tensor) -> None:
    """Of the logits [B, 1, vocab] after the prompts: a draw from NaN would be a token like any other."""
    low, high = logits.aminmax(dim=-1)  # NaN if one is; quicker than isfinite
    good = (low.isfinite() & high.isfinite()).flatten()
    if not bool(good.all()):
        row = good.tolist().index(False)
        raise RuntimeError(
            f"the logits after prompt {row} are not finite: the weights hold NaN or infinity, "
            f"or {logits.dtype} is too narrow for them"
        )
