"""Draft tokens: guesses at what comes next, all read in one call; those that are right are kept.

Speculative decoding (arXiv 2211.17192) at temperature 0: a draft is right if it is the most likely token there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jetkernels.modules.checks import shown

from .cache import JetNemotronCache
from .sampling import most_likely

if TYPE_CHECKING:
    from .hybrid import JetNemotronForCausalLM

# The texts so far, prompts without their padding and new tokens, not to be changed -> tokens that may follow each.
Propose = Callable[[list[list[int]]], Sequence[Sequence[int]]]
# Tokens of a row that are read in one call. From some tens on a CPU's time grows with their number.
MOST_PROPOSED = 32
# Tokens that are looked up at once: what follows three equal ones is mostly equal too.
LONGEST = 3


class PromptLookup:
    """Proposes what followed the last tokens of a text where they last stood before, in the same text.

    Of the last n tokens, n from `longest` down to 1, the first that are found count. Where what followed reaches the
    end of the text it goes on with itself, so a text that repeats is continued at any length.

    It remembers the places of each text's tokens, and starts anew with a text that does not continue the one before.

    Args:
        count: tokens that are proposed.
        longest: tokens that are looked up, at most.

    Source: prompt lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, count: int, longest: int = LONGEST):
        self.count, self.longest = count, longest
        # Of each text: behind which token some tokens last stood, and the text that has been looked at.
        self._places: list[tuple[dict[tuple[int, ...], int], list[int]]] = []

    def __call__(self, texts: list[list[int]]) -> list[list[int]]:
        """The texts so far [N] -> tokens that may follow, `count` of each or none."""
        self._places += [({}, []) for _ in texts[len(self._places) :]]
        return [self._follow(n, text) for n, text in enumerate(texts)]

    def _follow(self, n: int, text: list[int]) -> list[int]:
        places, seen = self._places[n]
        if text[: len(seen)] != seen:
            places, seen = {}, []
        for end in range(max(len(seen), 1), len(text)):
            for size in range(1, min(self.longest, end) + 1):
                places[tuple(text[end - size : end])] = end
        self._places[n] = places, text.copy()
        for size in range(min(self.longest, len(text)), 0, -1):
            place = places.get(tuple(text[-size:]))
            if place is not None:
                found = text[place : place + self.count]
                while len(found) < self.count:
                    found += found[: self.count - len(found)]
                return found
        return []


class DraftedRows:
    """The rows of a batch that is continued greedily with drafts, and who is told about it. All of it is on the host.

    Args:
        input_ids: [B, T], prompts.
        attention_mask: [B, T], zero at padding.
        most_new: new tokens of a row, at most.
        stop: a row ends with the first of these.
        pad: what follows in rows that ended before others.
        on_tokens: see `generation.generate`: it is called as it would be without drafts, once every row knows a token.
        on_draft: see `generation.generate`.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        most_new: int,
        stop: Sequence[int],
        pad: int,
        on_tokens: Callable[[Tensor, Tensor], None] | None,
        on_draft: Callable[[Tensor, Tensor], None] | None,
    ):
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.texts = [row[mask != 0].tolist() for row, mask in zip(input_ids, kept)]
        self.starts = [len(text) for text in self.texts]
        self.running = [True] * len(self.texts)
        self.most_new, self.stop, self.pad = most_new, set(stop), pad
        self.on_tokens, self.on_draft = on_tokens, on_draft
        self.device = input_ids.device
        self._told = 0

    @property
    def are_running(self) -> bool:
        """Whether a row goes on."""
        return any(self.running)

    def counts(self) -> list[int]:
        """New tokens of each row, its stop token included."""
        return [len(text) - start for text, start in zip(self.texts, self.starts)]

    def new_tokens(self) -> Tensor:
        """[B, new], with the padding in rows that ended before others."""
        width = max(self.counts())
        padded = [(text[start:] + [self.pad] * width)[:width] for text, start in zip(self.texts, self.starts)]
        return torch.tensor(padded, device=self.device)

    def step(self, model: JetNemotronForCausalLM, cache: JetNemotronCache, propose: Propose) -> None:
        """One call of the model, and at least one more token of each row that is running."""
        drafts = self._drafts(propose, model.config.vocab_size)
        width, last = max(map(len, drafts)), [text[-1] for text in self.texts]
        if width == 0 and all(self.running):
            logits = model.step(torch.tensor(last, device=self.device), cache)
            chosen, accepted = most_likely(logits)[:, None].tolist(), [0] * len(last)
        else:
            # The last token of each text has not been read yet. What fills up a short draft is not looked at.
            ids = [[token, *draft, *[token] * (width - len(draft))] for token, draft in zip(last, drafts)]
            logits = model.verify(torch.tensor(ids, device=self.device), cache)
            chosen = most_likely(logits.flatten(0, 1)).unflatten(0, logits.shape[:2]).tolist()
            accepted = [self._agreeing(draft, tokens) for draft, tokens in zip(drafts, chosen)]
            cache.commit([count + 1 if runs else 0 for count, runs in zip(accepted, self.running)])
        if self.on_draft is not None:
            counts = [
                [count if runs else -1 for count, runs in zip(found, self.running)]
                for found in (map(len, drafts), accepted)
            ]
            self.on_draft(*torch.tensor(counts, device=self.device))
        self.take([tokens[: count + 1] for tokens, count in zip(chosen, accepted)])

    def take(self, tokens: list[list[int]]) -> None:
        """Appends tokens to the rows that are running, and tells `on_tokens`."""
        for n, new in enumerate(tokens):
            if not self.running[n]:
                continue
            end = next((i for i, token in enumerate(new, 1) if token in self.stop), None)
            self.texts[n] += new[:end]
            self.running[n] = end is None and len(self.texts[n]) - self.starts[n] < self.most_new
        if self.on_tokens is not None:
            self._tell(self.on_tokens)

    def _tell(self, on_tokens: Callable[[Tensor, Tensor], None]) -> None:
        """Of the tokens that came since, those at places that every row has reached or will not reach."""
        counts = self.counts()
        known = min([count for count, runs in zip(counts, self.running) if runs], default=max(counts))
        for i in range(self._told, known):
            ran = [i < count for count in counts]
            column = [text[start + i] if r else self.pad for text, start, r in zip(self.texts, self.starts, ran)]
            on_tokens(torch.tensor(column, device=self.device), torch.tensor(ran, device=self.device))
        self._told = known

    def _drafts(self, propose: Propose, vocab_size: int) -> list[list[int]]:
        """What is proposed for the rows that are running, no more than they could take."""
        proposed = propose(self.texts)
        if not isinstance(proposed, Sequence) or len(proposed) != len(self.texts):
            raise ValueError(f"draft must propose tokens for each of {len(self.texts)} rows, got {shown(proposed)}")
        drafts = []
        for n, (tokens, count) in enumerate(zip(proposed, self.counts())):
            if not isinstance(tokens, Iterable):
                raise TypeError(f"draft must propose tokens for each row, got {shown(tokens)} for row {n}")
            draft = [_token(token, n, vocab_size) for token in tokens]
            if len(draft) > MOST_PROPOSED:
                raise ValueError(f"draft must propose at most {MOST_PROPOSED} tokens, got {len(draft)} for row {n}")
            drafts.append(draft[: self.most_new - count - 1] if self.running[n] else [])
        return drafts

    def _agreeing(self, draft: list[int], chosen: list[int]) -> int:
        """How many tokens from the first on are the same, up to one that ends the row."""
        for i, token in enumerate(draft):
            if token != chosen[i]:
                return i
            if token in self.stop:
                return i + 1
        return len(draft)


def _token(token: object, row: int, vocab_size: int) -> int:
    try:
        number = operator.index(token)  # type: ignore[arg-type]  # what is no integer raises
    except TypeError:
        raise TypeError(f"draft must propose integers, got {shown(token)} for row {row}") from None
    if not 0 <= number < vocab_size:
        raise ValueError(f"draft must propose tokens in 0..{vocab_size - 1}, got {number} for row {row}")
    return number
