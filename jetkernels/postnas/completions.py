"""What base and hybrid write: prompts completed by both, greedy, none left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.reading import lines_of, utf8_text

from .data import Windows, seeded

FIXED = (
    "The capital of France is",
    "Once upon a time there was a small house at the edge of the forest, and in it lived",
    "Water boils when",
    "My name is Anna. I have two brothers, Paul and Peter. My brothers' names are",
)
FROM_TEXT = 4  # prompts that are windows of the held-out text
PROMPT_TOKENS = 32  # of each of these
NEW_TOKENS = 48


class Completion(NamedTuple):
    """A prompt, and what each model made of it.

    Attributes:
        prompt: its text.
        base: the new text of the base.
        hybrid: that of the hybrid.
    """

    prompt: str
    base: str
    hybrid: str


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8 text, or holds no prompt.
    """
    lines = lines_of(utf8_text(path.read_bytes(), f"prompts: {path}"))
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"prompts: {path} must hold a prompt a line, got none")
    return found


def prompts_of(texts: Sequence[str], held_out: Tensor, tokenizer: Tokenizer) -> list[Tensor]:
    """Token ids of the prompts: the texts, then FROM_TEXT windows of the held-out text, always the same ones.

    Args:
        texts: prompts.
        held_out: tokens int64 [n].
        tokenizer: that encoded them.
    """
    size = min(PROMPT_TOKENS, len(held_out))
    windows = Windows(held_out).rows(FROM_TEXT, size, seeded("completions"))
    return [*(torch.tensor(tokenizer.encode(text)) for text in texts), *windows]


def complete(
    base: JetNemotronForCausalLM, hybrid: JetNemotronForCausalLM, prompts: Sequence[Tensor], tokenizer: Tokenizer
) -> list[Completion]:
    """At most NEW_TOKENS most likely tokens behind each prompt [T], by both models."""

    def continued(model: JetNemotronForCausalLM, ids: Tensor) -> str:
        whole = model.generate(ids[None].to(model.device), max_new_tokens=NEW_TOKENS)
        return tokenizer.decode_continuation(whole[0, len(ids) :])

    return [Completion(tokenizer.decode(ids), continued(base, ids), continued(hybrid, ids)) for ids in prompts]
