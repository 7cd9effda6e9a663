"""What a placement is judged by: held-out language modelling, recall at growing distance, copying, multiple choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jetkernels.model import Tokenizer

from .data import Windows, seeded

IGNORED = -100
# token ids [B, T] -> logits [B, T, vocab]
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """loss: mean nats per token of the right answer.  accuracy: in 0..1.  groups: the same pair per group of examples."""

    loss: float
    accuracy: float
    groups: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Task(Protocol):
    """Anything that can judge a model; evaluations of harnesses such as lm-eval fit behind `score`."""

    name: str

    def score(self, predict: Predict) -> Score: ...


# A score -> a number of which more is better.
OBJECTIVES: dict[str, Callable[[Score], float]] = {
    "loss": lambda score: -score.loss,
    "accuracy": lambda score: score.accuracy,
}


@dataclass(frozen=True)
class TokenTask:
    """Rows of tokens with the answers marked.

    input_ids [N, T] int64.  labels [N, T]: the token that should follow each position, -100 where nothing is asked.
    group [N]: index into group_names.  Accuracy is the share of asked tokens that are the most likely one.
    """

    name: str
    input_ids: Tensor
    labels: Tensor
    group_names: Sequence[str] = ()
    group: Tensor | None = None
    batch_size: int = 16

    @torch.no_grad()
    def score(self, predict: Predict) -> Score:
        losses, hits = [], []
        for ids, labels in zip(self.input_ids.split(self.batch_size), self.labels.split(self.batch_size)):
            logits = predict(ids).to("cpu", torch.float32)
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"))
            hits.append((logits.argmax(-1) == labels).flatten())
        asked = self.labels.flatten() != IGNORED
        loss, hit = torch.cat(losses), torch.cat(hits)

        def mean(kept: Tensor) -> tuple[float, float]:
            return loss[kept].double().mean().item(), hit[kept].double().mean().item()

        groups = {}
        if self.group is not None:
            of_token = self.group[:, None].expand_as(self.labels).flatten()
            groups = {name: mean(asked & (of_token == i)) for i, name in enumerate(self.group_names)}
        return Score(*mean(asked), groups)


def language_modelling(tokens: Tensor, count: int, length: int, seed: int = 0) -> TokenTask:
    """Next-token prediction on `count` windows of `length` positions of a held-out text."""
    rows = Windows(tokens).rows(count, length + 1, seeded("language modelling", seed))
    return TokenTask("language modelling", rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


@dataclass(frozen=True)
class Recall:
    """Key-value retrieval made from a text: the value that followed a key must follow it again, `distance` tokens later.

        text ... <mark> key <mark> value <mark> text of `distance` tokens <mark> key <mark> value

    Key, value and everything around them are spans of the text, of key_size and value_size tokens; mark: a token that
    the text does not hold (the end of a text, say).  distances: tokens between the value and its question.
    """

    tokens: Tensor
    mark: int
    distances: Sequence[int] = (16, 32, 64)
    key_size: int = 3
    value_size: int = 2

    @property
    def overhead(self) -> int:
        """Tokens of a row that are neither filler before nor text between."""
        return 5 + 2 * (self.key_size + self.value_size)

    def _row(self, length: int, distance: int, generator: torch.Generator) -> Tensor:
        before = length - self.overhead - distance
        if before < 0:
            raise ValueError(f"recall: length must be at least {length - before} at distance {distance}, got {length}")
        text = Windows(self.tokens)
        span = [text.rows(1, n, generator)[0] for n in (self.key_size, self.value_size, distance) if n]
        key, value = span[0], span[1]
        between = span[2] if distance else key[:0]
        mark = torch.tensor([self.mark])
        front = text.rows(1, before, generator)[0] if before else key[:0]
        return torch.cat([front, mark, key, mark, value, mark, between, mark, key, mark, value])

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(self.distances), (count,), generator=generator).tolist()
        return torch.stack([self._row(length, self.distances[i], generator) for i in picks])

    def task(self, count: int, length: int, seed: int = 0) -> TokenTask:
        """`count` questions at each distance, on rows of `length` positions; a group of the score per distance."""
        generator = seeded("recall", seed)
        rows = torch.stack([self._row(length + 1, d, generator) for d in self.distances for _ in range(count)])
        labels = rows[:, 1:].clone()
        labels[:, : -self.value_size] = IGNORED
        group = torch.arange(len(self.distances)).repeat_interleave(count)
        return TokenTask("recall", rows[:, :-1].contiguous(), labels, [f"distance {d}" for d in self.distances], group)


@dataclass(frozen=True)
class Copy:
    """Induction: a span of the text comes a second time, and is asked for from its token number `cue` on.

        text ... span, text of `gap` tokens, span

    size: tokens of the span.  gap: tokens between its two occurrences.
    """

    tokens: Tensor
    size: int = 24
    gap: int = 16
    cue: int = 6

    def __post_init__(self):
        if not 0 < self.cue < self.size:
            raise ValueError(f"copy: cue must be between 1 and size - 1 = {self.size - 1}, got {self.cue}")

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        if length < 2 * self.size + self.gap:
            raise ValueError(f"copy: length must be at least {2 * self.size + self.gap}, got {length}")
        text = Windows(self.tokens)
        span, rest = (text.rows(count, n, generator) for n in (self.size, length - 2 * self.size))
        front = length - 2 * self.size - self.gap
        return torch.cat([rest[:, :front], span, rest[:, front:], span], 1)

    def task(self, count: int, length: int, seed: int = 0) -> TokenTask:
        """`count` rows of `length` positions."""
        rows = self.rows(count, length + 1, seeded("copy", seed))
        labels = rows[:, 1:].clone()
        labels[:, : -(self.size - self.cue)] = IGNORED
        return TokenTask("copy", rows[:, :-1].contiguous(), labels)


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with listed answers, as lm-eval-harness scores them: the choice of the largest log-likelihood wins.

    documents: (query, choices, index of the right choice).  loss is the mean over the right choices' tokens.
    """

    name: str
    documents: Sequence[tuple[str, Sequence[str], int]]
    tokenizer: Tokenizer

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Tokenizer) -> MultipleChoice:
        """A file with one JSON object per line: "query" (text), "choices" (texts), "gold" (index)."""
        documents = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                query, choices, gold = values["query"], list(values["choices"]), values["gold"]
                right = isinstance(query, str) and all(isinstance(c, str) and c for c in choices) and 0 <= gold < len(choices)
            except (ValueError, KeyError, TypeError):
                right = False
            if not right:
                raise ValueError(f"choices: line {number} of {path} must be an object with query, choices and gold, got {line!r}")
            documents.append((query, choices, gold))
        if not documents:
            raise ValueError(f"choices: {path} must hold at least one question, got none")
        return cls(Path(path).stem, documents, tokenizer)

    @torch.no_grad()
    def score(self, predict: Predict) -> Score:
        loss, tokens, right = 0.0, 0, 0
        for query, choices, gold in self.documents:
            sums = []
            for i, choice in enumerate(choices):
                context, answer = self.tokenizer.encode(query), self.tokenizer.encode(choice)
                if not context:
                    raise ValueError(f"choices: a query of {self.name} must encode to at least one token, got {query!r}")
                ids = torch.tensor([context + answer])
                log_p = predict(ids[:, :-1]).to("cpu", torch.float32).log_softmax(-1)[0, len(context) - 1 :]
                sums.append(log_p.gather(1, ids[0, len(context) :, None]).sum().item())
                if i == gold:
                    loss, tokens = loss - sums[-1], tokens + len(answer)
            right += sums.index(max(sums)) == gold
        return Score(loss / tokens, right / len(self.documents))
