"""What a placement is judged by: held-out language modelling, recall at growing distance, copying, multiple choice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.model import Tokenizer

from .data import Windows, seeded

IGNORED = -100
# token ids [B, T] -> logits [B, T, vocab]
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """How well a model does in a task.

    Attributes:
        loss: mean nats per token of the right answer.
        accuracy: in 0..1.
        groups: the same pair per group of examples.
    """

    loss: float
    accuracy: float
    groups: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Task(Protocol):
    """Anything that can judge a model; evaluations of harnesses such as lm-eval fit behind `score`."""

    @property
    def name(self) -> str:
        """What reports, options and checkpoints call it."""
        ...

    def score(self, predict: Predict) -> Score:
        """The score of the model that `predict` is."""
        ...


# A score -> a number of which more is better.
OBJECTIVES: dict[str, Callable[[Score], float]] = {
    "loss": lambda score: -score.loss,
    "accuracy": lambda score: score.accuracy,
}


def objective_of(task: str, score: Score, objective: str) -> float:
    """The objective of a task's score; ValueError if it is not a number, as the loss of a task without choices."""
    value = OBJECTIVES[objective](score)
    if not math.isfinite(value):
        raise ValueError(f"objective {objective} of {task} must be finite, got {value}")
    return value


@dataclass(frozen=True)
class TokenTask:
    """Rows of tokens with the answers marked; accuracy is the share of asked tokens that are the most likely one.

    Attributes:
        name: of the task.
        input_ids: int64 [N, T].
        labels: [N, T], the token that should follow each position, -100 where nothing is asked.
        group_names: of groups of rows that are scored on their own, too.
        group: [N], index into group_names; None: no groups.
        batch_size: rows that a model is shown at once.
    """

    name: str
    input_ids: Tensor
    labels: Tensor
    group_names: Sequence[str] = ()
    group: Tensor | None = None
    batch_size: int = 16

    @torch.no_grad()
    def score(self, predict: Predict) -> Score:
        """The score over all asked tokens, and that of each group."""
        losses, hits = [], []
        for ids, labels in zip(self.input_ids.split(self.batch_size), self.labels.split(self.batch_size)):
            logits = predict(ids).to("cpu", torch.float32)
            losses.append(
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            )
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
    """Key-value retrieval made from a text: after `distance` tokens of text, the value of each key is asked for again.

        text, pairs x (<mark> key value), <mark>, text of `distance` tokens, pairs x (<mark> key value)

    The questions come in random order, so that position does not answer them. Keys and values are
    spans of the text, no token twice in a span and no key twice in a row.

    Attributes:
        tokens: the text.
        mark: a token that the text does not hold (the end of a text, say).
        distances: between the pairs and the questions, tokens.
        key_size: tokens of a key.
        value_size: tokens of a value.
        pairs: of a row.
    """

    tokens: Tensor
    mark: int
    distances: Sequence[int] = (8, 24, 48)
    key_size: int = 3
    value_size: int = 2
    pairs: int = 4

    TRIES: ClassVar[int] = 1000  # draws of a span before the text is called too uniform

    @property
    def overhead(self) -> int:
        """Tokens of a row that are neither text in front nor text between."""
        return 1 + 2 * self.pairs * (1 + self.key_size + self.value_size)

    @property
    def shortest(self) -> int:
        """Tokens of a row that has room for the largest distance."""
        return self.overhead + max(self.distances)

    def _span(self, size: int, generator: torch.Generator, without: Sequence[Tensor] = ()) -> Tensor:
        text = Windows(self.tokens)
        for _ in range(self.TRIES):
            span = text.rows(1, size, generator)[0]
            if len(set(span.tolist())) == size and not any(torch.equal(span, other) for other in without):
                return span
        raise ValueError(f"recall: the text must hold {self.pairs} spans of {size} different tokens")

    def _row(self, length: int, distance: int, generator: torch.Generator) -> Tensor:
        before = length - self.overhead - distance
        mark = torch.tensor([self.mark])
        keys: list[Tensor] = []
        facts = []
        for _ in range(self.pairs):
            keys.append(self._span(self.key_size, generator, keys))
            facts.append(torch.cat([mark, keys[-1], self._span(self.value_size, generator)]))
        front, between = (Windows(self.tokens).rows(1, n, generator)[0] if n else mark[:0] for n in (before, distance))
        order = torch.randperm(self.pairs, generator=generator).tolist()
        return torch.cat([front, *facts, mark, between, *(facts[i] for i in order)])

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Rows of `length` tokens, each at one of the distances."""
        if length < self.shortest:
            raise ValueError(
                f"recall: length must be at least {self.shortest} at distance {max(self.distances)}, got {length}"
            )
        picks = torch.randint(len(self.distances), (count,), generator=generator).tolist()
        return torch.stack([self._row(length, self.distances[i], generator) for i in picks])

    def task(self, count: int, length: int, seed: int = 0) -> TokenTask:
        """`count` rows of `length` positions at each distance, every value asked for; a distance is a group."""
        if length + 1 < self.shortest:
            raise ValueError(
                f"recall: length must be at least {self.shortest - 1} at distance {max(self.distances)}, got {length}"
            )
        generator = seeded("recall", seed)
        rows = torch.stack([self._row(length + 1, d, generator) for d in self.distances for _ in range(count)])
        labels = torch.full_like(rows[:, 1:], IGNORED)
        size = 1 + self.key_size + self.value_size
        for end in range(length, length - self.pairs * size, -size):
            answer = slice(end - self.value_size, end)
            labels[:, answer] = rows[:, 1:][:, answer]
        group = torch.arange(len(self.distances)).repeat_interleave(count)
        return TokenTask("recall", rows[:, :-1].contiguous(), labels, [f"distance {d}" for d in self.distances], group)


@dataclass(frozen=True)
class Copy:
    """Induction: a span of the text comes a second time, and is asked for from its token number `cue` on.

        text ... span, text of `gap` tokens, span

    Attributes:
        tokens: the text.
        size: tokens of the span.
        gap: tokens between its two occurrences.
        cue: tokens of its second occurrence that are not asked for.
    """

    tokens: Tensor
    size: int = 24
    gap: int = 16
    cue: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.cue < self.size:
            raise ValueError(f"copy: cue must be between 1 and size - 1 = {self.size - 1}, got {self.cue}")

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Training rows: a span of `cue` + 2 tokens or more, repeated without a gap until the row is full."""
        shortest, longest = self.cue + 2, length // 2
        if longest < shortest:
            raise ValueError(f"copy: length must be at least {2 * shortest}, got {length}")
        sizes = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
        text = Windows(self.tokens)
        return torch.cat([text.rows(1, n, generator).repeat(1, -(-length // n))[:, :length] for n in sizes])

    def task(self, count: int, length: int, seed: int = 0) -> TokenTask:
        """`count` rows of `length` positions."""
        generator, front = seeded("copy", seed), length + 1 - 2 * self.size - self.gap
        if front < 0:
            raise ValueError(f"copy: length must be at least {length - front}, got {length}")
        text = Windows(self.tokens)
        span, rest = (text.rows(count, n, generator) for n in (self.size, front + self.gap))
        rows = torch.cat([rest[:, :front], span, rest[:, front:], span], 1)
        labels = rows[:, 1:].clone()
        labels[:, : -(self.size - self.cue)] = IGNORED
        return TokenTask("copy", rows[:, :-1].contiguous(), labels)


@torch.no_grad()
def log_likelihoods(
    predict: Predict, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> list[tuple[float, bool]]:
    """How likely each continuation is.

    Args:
        predict: the model.
        pairs: (context, continuation), token ids; a context has at least one.
        batch_size: pairs that the model is shown at once.

    Returns:
        For each pair the natural log of the continuation's probability after the context, and whether it is what greedy
        decoding gives.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    by_length = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for start in range(0, len(pairs), batch_size):
        batch = by_length[start : start + batch_size]
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]]) for i in batch]
        # Padded behind, which a causal model does not see.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        log_p = predict(ids[:, :-1]).to("cpu", torch.float32).log_softmax(-1)
        for i, row, of_row in zip(batch, rows, log_p):
            asked = slice(len(pairs[i][0]) - 1, len(row) - 1)
            answer, given = row[len(pairs[i][0]) :], of_row[asked]
            found[i] = given.gather(1, answer[:, None]).double().sum().item(), torch.equal(given.argmax(-1), answer)
    return found


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with listed answers, as lm-eval-harness scores them: the choice of the largest log-likelihood wins.

    Attributes:
        name: of the task.
        documents: (query, choices, index of the right choice) of each question.
        tokenizer: of the model.
    """

    name: str
    documents: Sequence[tuple[str, Sequence[str], int]]
    tokenizer: Tokenizer

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Tokenizer) -> MultipleChoice:
        """Reads a file with one JSON object per line: "query" (text), "choices" (texts), "gold" (index).

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is no such object, or there is none.
        """
        documents = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                query, choices, gold = values["query"], list(values["choices"]), values["gold"]
                right = (
                    isinstance(query, str)
                    and all(isinstance(c, str) and c for c in choices)
                    and 0 <= gold < len(choices)
                )
            except (ValueError, KeyError, TypeError):
                right = False
            if not right:
                raise ValueError(
                    f"choices: line {number} of {path} must be an object with query, choices and gold, got {line!r}"
                )
            documents.append((query, choices, gold))
        if not documents:
            raise ValueError(f"choices: {path} must hold at least one question, got none")
        return cls(Path(path).stem, documents, tokenizer)

    def score(self, predict: Predict) -> Score:
        """The loss is the mean over the tokens of the right choices."""
        pairs = []
        for query, choices, _ in self.documents:
            context = self.tokenizer.encode(query)
            if not context:
                raise ValueError(f"choices: a query of {self.name} must encode to at least one token, got {query!r}")
            pairs += [(context, self.tokenizer.encode(choice)) for choice in choices]
        scored = iter(zip(pairs, log_likelihoods(predict, pairs)))
        loss, tokens, right = 0.0, 0, 0
        for _, choices, gold in self.documents:
            of_choices = [next(scored) for _ in choices]
            sums = [value for _, (value, _) in of_choices]
            right += sums.index(max(sums)) == gold
            loss, tokens = loss - sums[gold], tokens + len(of_choices[gold][0][1])
        return Score(loss / tokens, right / len(self.documents))
