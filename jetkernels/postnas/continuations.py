"""Multiple choice made of a text: which words come next, among as many from elsewhere in it."""

from __future__ import annotations

import re
from itertools import chain

import torch
from torch import Tensor

from jetkernels.model import Tokenizer

from .data import seeded
from .tasks import TokenChoices

# Between two sentences: behind a full stop, with its quotation mark, and before a capital.
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’)]))\s+(?=[\"“‘(]?[A-Z])")


def _documents(tokens: Tensor, end_of_text: int | None) -> list[list[int]]:
    """The tokens between the ends of texts."""
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == end_of_text:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def _sentences(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each sentence, a space in front, every run of white space one space."""
    return [tokenizer.encode_continuation(" " + " ".join(sentence.split())) for sentence in SENTENCE_END.split(text)]


def continuations(
    tokens: Tensor,
    tokenizer: Tokenizer,
    count: int,
    *,
    context: int = 48,
    size: int = 16,
    choices: int = 4,
    seed: int = 0,
) -> TokenChoices:
    """Which tokens begin the next sentence, among the first tokens of other sentences of the same file.

    All choices have `size` tokens, so the sum of their log-likelihoods favours none for its length. The other sentences
    are of the same file, so the subject does not give the answer away.

    Args:
        tokens: a held-out text, int64 [n], the end of a text between files.
        tokenizer: that encoded it.
        count: questions.
        context: tokens before the choices.
        size: tokens of a choice, the first of a sentence.
        choices: of a question, one of them right.
        seed: another one gives other questions.

    Returns:
        The task "continuations"; its accuracy by chance is 1 / choices.

    Raises:
        ValueError: the text has too few sentences that are long enough.
    """
    if min(count, context, size) < 1 or choices < 2:
        raise ValueError(
            "continuations: count, context and size must be at least 1 and choices at least 2, "
            f"got {count}, {context}, {size} and {choices}"
        )
    # The sentences that can be asked for: (those of its file, its number among them), each (tokens before, its first).
    askable: list[tuple[list[tuple[list[int], list[int]]], int]] = []
    for document in _documents(tokens, tokenizer.end_of_text_id):
        sentences = _sentences(tokenizer.decode(document), tokenizer)
        flow, start = list(chain.from_iterable(sentences)), 0
        # By their tokens: one that comes twice would be called wrong once.
        found: dict[tuple[int, ...], list[int]] = {}
        for sentence in sentences:
            if start >= context and len(sentence) >= size:
                found[tuple(sentence[:size])] = flow[start - context : start]
            start += len(sentence)
        if len(found) >= choices:
            of_file = [(before, list(answer)) for answer, before in found.items()]
            askable += [(of_file, at) for at in range(len(of_file))]
    if len(askable) < count:
        raise ValueError(
            f"continuations: the text must have {count} sentences of {size} tokens or more behind {context} tokens, "
            f"{choices} or more of them in a file, got {len(askable)}"
        )
    generator = seeded("continuations", seed)
    questions = []
    for pick in torch.randperm(len(askable), generator=generator)[:count].tolist():
        of_file, at = askable[pick]
        others = [i for i in torch.randperm(len(of_file), generator=generator).tolist() if i != at][: choices - 1]
        gold = int(torch.randint(choices, (), generator=generator))
        order = [*others[:gold], at, *others[gold:]]
        questions.append((of_file[at][0], [of_file[i][1] for i in order], gold))
    return TokenChoices("continuations", questions)
