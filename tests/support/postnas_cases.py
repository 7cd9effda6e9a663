"""What the tests of the search start from: a folder of text, and a base in which only planted layers carry recall."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.stories import stories
from torch import Tensor

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.modules import JetBlockConfig
from jetkernels.postnas import TokenTask, small_base

PLANTED = (1, 3)  # layers of `planted_base` that carry recall, one class of values each
LAYERS = 5
VALUES = 8  # per class
FILLER = range(2 * VALUES, 4 * VALUES)
QUESTIONS = (4 * VALUES, 4 * VALUES + 1)  # the token that asks for the value of each class
VOCAB = 4 * VALUES + 2
TINY_JET = JetBlockConfig(num_heads=2, head_dim=4, expand_v=2.0, conv_size=4, dconv_generator_reduction=2)


class _Killed(BaseException):
    """Stands in for a kill: nothing in the library catches it."""


@contextmanager
def killed_at_write(moment: int):
    """Ends the block when its moment-th checkpoint or report is written but not yet in place; fails if it does not come
    to that.
    """
    written = 0
    replace = os.replace

    def killing(source, target):
        nonlocal written
        written += 1
        if written == moment:
            raise _Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(os, "replace", killing)
        yield


def text_folder(folder: Path, files: int = 30) -> Path:
    """Files of 4,000 characters that `stories` tells, each another part."""
    size = 4000
    source = stories(files * size)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (folder / f"piece{i}.txt").write_text(source[i * size : (i + 1) * size])
    return folder


def search_command(stage: str, **options) -> list[str]:
    """The words of `jetkernels search STAGE` behind `jetkernels`.

    True: an option without a value; a list: one that is given several times.
    """
    words = ["search", stage]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return words


def tiny_base_folder(folder: Path, layers: int = 3, seed: int = 3) -> Path:
    """An untrained byte-level base with its tokenizer, saved."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    small_base(layers, seed=seed, initializer_range=0.2, **sizes).save_pretrained(folder)
    Tokenizer.byte_level().save_pretrained(folder)
    return folder


@torch.no_grad()
def planted_base() -> JetNemotronForCausalLM:
    """Attention of layer PLANTED[c] copies the value of class c that the sequence holds into the output; that of the
    others and every MLP adds nothing. A token's hidden state is its one-hot vector, followed by one place per value."""
    config = JetNemotronConfig(
        vocab_size=VOCAB,
        hidden_size=VOCAB + 2 * VALUES,
        intermediate_size=8,
        layer_types=["attn"] * LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=VALUES,
        efficient_attention_config={},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = JetNemotronForCausalLM.random(config, seed=0)
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    # The pair of dimensions that rotate least: positions do not matter.
    slow = VALUES // 2 - 1
    for c, i in enumerate(PLANTED):
        attention = model.model.layers[i].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        values = slice(c * VALUES, (c + 1) * VALUES)
        attention.q_proj.bias[slow] = 10.0
        attention.k_proj.weight[slow, values] = 2.0
        attention.v_proj.weight[:, values] = torch.eye(VALUES)
        attention.o_proj.weight[VOCAB + c * VALUES : VOCAB + (c + 1) * VALUES] = 0.05 * torch.eye(VALUES)
    model.lm_head.weight.zero_()
    for c, question in enumerate(QUESTIONS):
        values = torch.arange(c * VALUES, (c + 1) * VALUES)
        model.lm_head.weight[values, VOCAB + values] = 2.0
        model.lm_head.weight[values, question] = 2.0
    return model.eval()


@dataclass(frozen=True)
class PlantedRows:
    """Filler, one value of each class somewhere, and at the end the question for one of them and its answer."""

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        rows = FILLER.start + draw(len(FILLER), count, length)
        values = torch.stack([c * VALUES + draw(VALUES, count) for c in range(2)], 1)
        for n in range(count):
            rows[n, torch.randperm(length - 2, generator=generator)[:2]] = values[n]
        asked = draw(2, count)
        rows[:, -2] = torch.tensor(QUESTIONS)[asked]
        rows[:, -1] = values[torch.arange(count), asked]
        return rows

    def task(self, count: int = 48, length: int = 20, seed: int = 5) -> TokenTask:
        rows = self.rows(count, length + 1, torch.Generator().manual_seed(seed))
        labels = torch.full_like(rows[:, 1:], -100)
        labels[:, -1] = rows[:, -1]
        return TokenTask("recall", rows[:, :-1].contiguous(), labels)
