"""Text generation: prefill, then one token at a time for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Steps between two looks at whether every row has ended, on devices where looking stalls the queue of work.
STOP_CHECK_INTERVAL = 16


def align_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real tokens of each row [B, T] to its right end, in order; returns ids and mask so arranged."""
    order = (attention_mask != 0).to(torch.int8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """Next tokens [B] from logits [B, vocab]: the most likely at temperature 0, else a draw.

    top_k keeps that many tokens, top_p the fewest most likely ones whose probabilities reach it; both: top_k first.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # By index, not by value: exactly top_k tokens survive a tie.
        values, indices = logits.topk(top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, values)
    if top_p is not None and top_p < 1:
        ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # The most likely token has nothing before it, so one always stays.
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered)
    # The index of the smallest of exponential draws at rates p is distributed as p; nothing has to reach the host.
    draws = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / draws).argmax(-1)


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Continues each prompt of a batch with a JetNemotronForCausalLM.

    Args:
        input_ids: [B, T] int64, T >= 1.  attention_mask: [B, T], zero at padding (either side).
        max_new_tokens: upper bound per row.
        temperature: 0 picks the most likely token, otherwise logits are divided by it before a draw.
        top_k, top_p: restrict the draw to the top_k most likely tokens, to the fewest tokens with probability top_p.
        stop_token_ids: a row ends with the first of these; the config's eos by default, () for none.
        pad_token_id: what follows in rows that ended before others; the config's pad (eos) by default.
        on_tokens: called after each step with the new tokens [B] and which rows were still running [B] (bool).
        generator: for draws, on the model's device; the global one by default.
        prefill_chunk: prompt tokens per forward; bounds the memory of a long prompt. The whole prompt by default.

    Returns: [B, T + new] int64, the prompt as given and the new tokens; new <= max_new_tokens, fewer when all rows end.
    """
    _check(input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, prefill_chunk)
    config = model.config
    stop = config.stop_token_ids if stop_token_ids is None else list(stop_token_ids)
    pad = config.padding_token_id if pad_token_id is None else pad_token_id
    B, T = input_ids.shape
    if max_new_tokens == 0:
        return input_ids.clone()
    device = input_ids.device
    out = torch.full((B, T + max_new_tokens), pad, dtype=torch.int64, device=device)
    out[:, :T] = input_ids
    # The last of the new tokens is never fed back.
    cache = model.new_cache(B, T + max_new_tokens - 1)
    logits = prefill(model, input_ids, attention_mask, cache, prefill_chunk)
    stops = torch.tensor(stop, dtype=torch.int64, device=device)
    running = torch.ones(B, dtype=torch.bool, device=device)
    # How many tokens each row has got, its stop token included.
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    interval = STOP_CHECK_INTERVAL if device.type != "cpu" and on_tokens is None else 1
    for step in range(max_new_tokens):
        chosen = choose(logits[:, -1], temperature, top_k, top_p, generator)
        tokens = torch.where(running, chosen, pad)
        out[:, T + step] = tokens
        counts += running
        if on_tokens is not None:
            on_tokens(tokens, running.clone())
        if stop:
            running &= ~torch.isin(tokens, stops)
            if step % interval == interval - 1 and not running.any():
                break
        if step + 1 < max_new_tokens:
            # Rows that have ended go on with tokens that nobody sees: the padding need not be in the vocabulary.
            logits = model(chosen[:, None], cache=cache).logits
    return out[:, : T + int(counts.max())]


def prefill(model, input_ids: Tensor, attention_mask: Tensor | None, cache, chunk: int | None = None) -> Tensor:
    """Runs prompts [B, T] into an empty cache, `chunk` columns at a time.

    Returns logits [B, 1, vocab] after each row's last token.
    """
    T = input_ids.shape[1]
    if attention_mask is not None:
        # Every row then ends in the last column, whichever side was padded.
        input_ids, attention_mask = align_right(input_ids, attention_mask)
        if bool((attention_mask[:, -1] == 0).any()):
            raise ValueError("attention_mask must keep at least one token of each row, got a row of zeros")
    size = chunk or T
    for start in range(0, T, size):
        mask = None if attention_mask is None else attention_mask[:, start : start + size]
        logits = model(input_ids[:, start : start + size], mask, cache, last_logits_only=True).logits
    return logits


def _check(input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, prefill_chunk) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, T] with B, T >= 1, got {list(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
