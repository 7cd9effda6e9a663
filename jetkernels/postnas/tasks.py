"""What a placement is judged by: held-out language modelling, recall at growing distance, copying, multiple choice."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.model import Tokenizer
from jetkernels.reading import lines_of, utf8_text

from .data import Windows, end_of_text, seeded

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


class KeyValueRecall(ABC):
    """Key-value retrieval: pairs are told, and after `distance` tokens of text each key's value is asked for again.

        text, told pairs, text of `distance` tokens, the same pairs

    The questions come in random order, so that position does not answer them.

    Attributes:
        tokens: the text.
        distances: between the pairs and the questions, tokens.
        pairs: of a row.
    """

    tokens: Tensor
    distances: Sequence[int]
    pairs: int

    @property
    @abstractmethod
    def pair_size(self) -> int:
        """Tokens of a pair as it is told."""

    @property
    @abstractmethod
    def answer(self) -> slice:
        """Where in a told pair its value stands."""

    @property
    @abstractmethod
    def closing(self) -> Tensor:
        """Tokens behind the last told pair, int64 [n]."""

    @abstractmethod
    def told(self, generator: torch.Generator) -> list[Tensor]:
        """The pairs of a row, int64 [pair_size] each, no key twice."""

    @property
    def overhead(self) -> int:
        """Tokens of a row that are neither text in front nor text between."""
        return len(self.closing) + 2 * self.pairs * self.pair_size

    @property
    def shortest(self) -> int:
        """Tokens of a row that has room for the largest distance."""
        return self.overhead + max(self.distances)

    def _row(self, length: int, distance: int, generator: torch.Generator) -> Tensor:
        before = length - self.overhead - distance
        told = self.told(generator)
        text = Windows(self.tokens)
        front, between = (text.rows(1, n, generator)[0] if n else self.closing[:0] for n in (before, distance))
        order = torch.randperm(self.pairs, generator=generator).tolist()
        return torch.cat([front, *told, self.closing, between, *(told[i] for i in order)])

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
        asked = torch.zeros(self.pair_size, dtype=torch.bool)
        asked[self.answer] = True
        labels = torch.full_like(rows, IGNORED)
        at = slice(length + 1 - self.pairs * self.pair_size, None)
        labels[:, at] = rows[:, at].where(asked.repeat(self.pairs), IGNORED)
        group = torch.arange(len(self.distances)).repeat_interleave(count)
        return TokenTask(
            "recall",
            rows[:, :-1].contiguous(),
            labels[:, 1:].contiguous(),
            [f"distance {d}" for d in self.distances],
            group,
        )


@dataclass(frozen=True)
class Recall(KeyValueRecall):
    """Recall of spans, for models that were trained on it: a told pair is a mark, a key and a value.

    Keys and values are spans of the text, no token twice in a span, none the mark.

    Attributes:
        tokens: the text.
        mark: a token that stands before each key and behind the last pair (the end of a text, say).
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
    def pair_size(self) -> int:
        """A mark, a key, a value."""
        return 1 + self.key_size + self.value_size

    @property
    def answer(self) -> slice:
        """The last tokens."""
        return slice(1 + self.key_size, None)

    @property
    def closing(self) -> Tensor:
        """The mark."""
        return torch.tensor([self.mark])

    def _span(self, size: int, generator: torch.Generator, without: Sequence[Tensor] = ()) -> Tensor:
        text = Windows(self.tokens)
        for _ in range(self.TRIES):
            span = text.rows(1, size, generator)[0]
            different = set(span.tolist()) - {self.mark}
            if len(different) == size and not any(torch.equal(span, other) for other in without):
                return span
        raise ValueError(f"recall: the text must hold {self.pairs} spans of {size} different tokens")

    def told(self, generator: torch.Generator) -> list[Tensor]:
        """Pairs of spans."""
        keys: list[Tensor] = []
        told = []
        for _ in range(self.pairs):
            keys.append(self._span(self.key_size, generator, keys))
            told.append(torch.cat([self.closing, keys[-1], self._span(self.value_size, generator)]))
        return told


@dataclass(frozen=True)
class WordRecall(KeyValueRecall):
    """Recall of words in sentences, which a pre-trained model answers without having been trained on it.

        The river is early.
        The whole is paper.

    A told pair is a line with two words, of the text's most frequent that are one token each and have four letters or
    more; no word is told twice. The value is asked for behind "is".

    Attributes:
        tokens: the text.
        tokenizer: that encoded it.
        distances: between the pairs and the questions, tokens.
        pairs: of a row.
        words: ids of the words, int64 [n].
    """

    tokens: Tensor
    tokenizer: Tokenizer
    distances: Sequence[int] = (8, 24, 48)
    pairs: int = 4
    words: Tensor = field(init=False)

    LINE: ClassVar[tuple[str, str, str]] = ("\nThe", " is", ".")  # before, between and behind the words
    READ: ClassVar[int] = 500_000  # tokens in which words are looked for
    WORDS: ClassVar[int] = 1000  # that are used

    def __post_init__(self) -> None:
        text = self.tokenizer.decode(self.tokens[: self.READ])
        counts = Counter(re.findall(r"(?<= )[a-z]{4,}(?=[ ,.;])", text))
        ids = [self.tokenizer.encode_continuation(f" {word}") for word, _ in counts.most_common()]
        words = [i[0] for i in ids if len(i) == 1][: self.WORDS]
        object.__setattr__(self, "words", torch.tensor(words, dtype=torch.int64))
        if len(self.words) < 2 * self.pairs:
            raise ValueError(
                f"recall: the text must hold {2 * self.pairs} words that are one token each, got {len(self.words)}"
            )

    def _line(self) -> list[Tensor]:
        return [torch.tensor(self.tokenizer.encode_continuation(part)) for part in self.LINE]

    @property
    def pair_size(self) -> int:
        """The line's own tokens and two words."""
        return 2 + sum(map(len, self._line()))

    @property
    def answer(self) -> slice:
        """The second word."""
        before, between, _ = self._line()
        at = len(before) + 1 + len(between)
        return slice(at, at + 1)

    @property
    def closing(self) -> Tensor:
        """The end of the line."""
        return torch.tensor(self.tokenizer.encode_continuation("\n"))

    def told(self, generator: torch.Generator) -> list[Tensor]:
        """Lines with different words."""
        picks = torch.randperm(len(self.words), generator=generator)[: 2 * self.pairs]
        before, between, behind = self._line()
        return [
            torch.cat([before, key[None], between, value[None], behind]) for key, value in self.words[picks].view(-1, 2)
        ]


def recall_of(tokens: Tensor, tokenizer: Tokenizer, distances: Sequence[int]) -> KeyValueRecall:
    """The recall task that suits a tokenizer: of spans where a token is a byte, else of words."""
    if tokenizer.is_byte_level:
        return Recall(tokens, end_of_text(tokenizer), distances)
    return WordRecall(tokens, tokenizer, distances)


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
class TokenChoices:
    """Questions with listed answers, in token ids: the choice of the largest log-likelihood wins.

    Attributes:
        name: of the task.
        questions: (context, choices, index of the right choice) of each question; a context has at least one token.
    """

    name: str
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]], int]]

    def score(self, predict: Predict) -> Score:
        """The loss is the mean over the tokens of the right choices."""
        pairs = [(context, choice) for context, choices, _ in self.questions for choice in choices]
        found = iter(log_likelihoods(predict, pairs))
        loss, tokens, right = 0.0, 0, 0
        for _, choices, gold in self.questions:
            sums = [next(found)[0] for _ in choices]
            right += sums.index(max(sums)) == gold
            loss, tokens = loss - sums[gold], tokens + len(choices[gold])
        return Score(loss / tokens, right / len(self.questions))


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
            ValueError: it is no UTF-8 text, a line is no such object, or there is none.
        """
        documents = []
        for number, line in enumerate(lines_of(utf8_text(Path(path).read_bytes(), f"choices: {path}")), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                query, choices, gold = values["query"], values["choices"], values["gold"]
                right = (
                    isinstance(query, str)
                    and isinstance(choices, list)
                    and all(isinstance(c, str) and c for c in choices)
                    and type(gold) is int
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
        questions = []
        for query, choices, gold in self.documents:
            context = self.tokenizer.encode(query)
            if not context:
                raise ValueError(f"choices: a query of {self.name} must encode to at least one token, got {query!r}")
            questions.append((context, [self.tokenizer.encode_continuation(choice) for choice in choices], gold))
        return TokenChoices(self.name, questions).score(predict)
