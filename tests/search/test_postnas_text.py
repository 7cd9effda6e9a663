"""Text of words: what stands between files, packed files, large files."""

from __future__ import annotations

import gzip
from itertools import pairwise

import pytest
import tokenizers
import torch

from jetkernels.model import Tokenizer
from jetkernels.postnas import TextCorpus, data

NAMES = ("river", "stone", "paper", "early", "green", "whole", "light", "table", "water", "sound")


def story(seed: int, sentences: int = 40) -> str:
    """Sentences of different lengths about the names, on lines of a few words each."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for i in range(sentences):
        size = int(torch.randint(3, 12, (), generator=generator))
        words = [NAMES[k] for k in torch.randint(len(NAMES), (size,), generator=generator).tolist()]
        lines.append(f"Then {' '.join(words)},\nand that was {i}.")
    return " ".join(lines)


def bpe(*texts: str, vocabulary: int = 400, end: str = "<|endoftext|>") -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the texts, as published models have."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe(*(story(seed) for seed in range(5)), "\nThe stone is river.\n" * 50)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_the_end_of_text_stands_between_files(tmp_path, tokenizer, kind):
    """So the text is that of its files again."""
    texts = [story(seed) for seed in range(12)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    encoder = tokenizer if kind == "words" else None
    corpus = TextCorpus.from_folder(tmp_path, encoder)
    used = encoder or Tokenizer.byte_level()
    found = []
    for side in (corpus.training, corpus.held_out):
        ends = [-1, *(side == used.end_of_text_id).nonzero().flatten().tolist(), len(side)]
        found += [used.decode(side[a + 1 : b]) for a, b in pairwise(ends)]
    if corpus.split == "by position":
        found[-2:] = ["".join(found[-2:])]
    assert sorted(found) == sorted(texts)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(ValueError, match="tokenizer must have a token for the end of a text"):
        TextCorpus.from_folder(tmp_path, bpe("a b", end="<unk>"))


def test_packed_files_are_read_and_damaged_ones_counted(tmp_path, tokenizer):
    text = story(0)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed.mkdir(), plain.mkdir()
    (plain / "a.txt").write_text(text)
    (packed / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    whole = gzip.compress(text.encode())
    (packed / "b.gz").write_bytes(whole[:-20])
    (packed / "c.gz").write_bytes(b"no gzip")
    (packed / "d.gz").write_bytes(gzip.compress(b"\xff\xff"))
    (packed / "e.gz").write_bytes(whole[:10] + b"\xff" * 20)
    read, expected = (TextCorpus.from_folder(folder, tokenizer) for folder in (packed, plain))
    assert (read.files, read.skipped) == (1, 4) and read.digest == expected.digest


def test_large_files_are_encoded_in_pieces(tmp_path, tokenizer, monkeypatch):
    """Cut behind a newline; where there is none, anywhere; nothing is lost."""
    monkeypatch.setattr(data, "PIECE", 100)
    text = story(1, 100) + "x" * 250
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) == 100 and len(pieces) > len(text) // 100
    assert all(piece.endswith("\n") for piece in pieces if "x" not in piece)
    (tmp_path / "a.txt").write_text(text)
    corpus = TextCorpus.from_folder(tmp_path, tokenizer)
    assert tokenizer.decode(torch.cat([corpus.training, corpus.held_out])) == text
    assert list(data._pieces("")) == [""]
