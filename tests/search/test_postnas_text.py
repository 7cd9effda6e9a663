"""Text of words: packed files, large files, and the tasks that are made of it for pre-trained models."""

from __future__ import annotations

import gzip
import json
import math
from itertools import pairwise

import pytest
import tokenizers
import torch

from jetkernels.model import Tokenizer
from jetkernels.postnas import Recall, TextCorpus, WordRecall, continuations, data, recall_of

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


def sentencepiece(*texts: str) -> Tokenizer:
    """SentencePiece's BPE, trained on the texts, as Llama 2 has it: a space is put in front of each text."""
    size = {"vocab_size": 700, "show_progress": False}
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(
        [" ".join(text.split()) for text in texts], tokenizers.trainers.BpeTrainer(special_tokens=special, **size)
    )
    values = json.loads(backend.to_str())
    values |= {"pre_tokenizer": None, "added_tokens": values["added_tokens"][:3]}  # the bytes are no special tokens
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    return sentencepiece(*(story(seed) for seed in range(5)), "The stone is river. " * 50)


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
    with pytest.raises(ValueError, match=r"tokenizer must have <\|endoftext\|> or .*, the end of a text"):
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


def test_names_of_files_need_not_be_unicode(tmp_path):
    (tmp_path / "n\udce9.txt").write_text("a text")
    assert TextCorpus.from_folder(tmp_path).files == 1
    assert [data.is_held_out(name) for name in ("é23", "é24")] == [False, True]


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


def test_recall_of_words_asks_for_the_word_behind_is(tokenizer):
    """Read back from the text of the rows."""
    tokens = torch.tensor(tokenizer.encode(" ".join(story(seed) for seed in range(5))))
    recall = WordRecall(tokens, tokenizer, (5, 20), pairs=3)
    words = {tokenizer.decode([i]) for i in recall.words.tolist()}
    assert words >= {f" {name}" for name in NAMES} and all(word[1:].isalpha() and len(word) > 4 for word in words)
    length = recall.shortest + 7
    task = recall.task(4, length, seed=1)
    assert task.input_ids.shape == (8, length) and task.group_names == ["distance 5", "distance 20"]
    for ids, labels in zip(task.input_ids.tolist(), task.labels.tolist()):
        asked = [i for i, label in enumerate(labels) if label != -100]
        lines = tokenizer.decode([*ids, recall_end(recall)]).split("\n")
        told = [line for line in lines if line.startswith("The ")]
        assert len(told) == 6 and sorted(told[:3]) == sorted(told[3:])
        assert len({word for line in told for word in (line.split()[1], line.split()[3])}) == 6
        assert [f"{tokenizer.decode([labels[i]])}." for i in asked] == [f" {line.split()[3]}" for line in told[3:]]
        assert [labels[i] for i in asked] == [ids[i + 1] for i in asked]
        assert all(tokenizer.decode(ids[: i + 1]).endswith(" is") for i in asked)
    rows = recall.rows(5, length + 1, torch.Generator().manual_seed(0))
    assert rows.shape == (5, length + 1)
    assert torch.equal(rows, recall.rows(5, length + 1, torch.Generator().manual_seed(0)))


def recall_end(recall: WordRecall) -> int:
    """The full stop that a task's rows end before."""
    return recall.tokenizer.encode(recall.LINE[2])[-1]


def test_pairs_are_encoded_as_the_tokenizer_encodes_the_line(tokenizer):
    recall = WordRecall(torch.tensor(tokenizer.encode(story(0))), tokenizer, (0,))
    for line in recall.told(torch.Generator().manual_seed(0)):
        assert tokenizer.encode(tokenizer.decode(line)) == line.tolist() and len(line) == recall.pair_size


def test_tasks_of_words_have_no_space_too_many(spaced, tmp_path, monkeypatch):
    """What is put behind other tokens is encoded as it would be there."""
    text = ". ".join(story(seed) for seed in range(5))
    recall = WordRecall(torch.tensor(spaced.encode(text)), spaced, (0,))
    words = {spaced.decode([i]) for i in recall.words.tolist()}
    assert words == {*NAMES, "that"}
    told = recall.told(torch.Generator().manual_seed(0))
    for line in told:
        key, value = spaced.decode_continuation(line).removeprefix("\nThe ").removesuffix(".").split(" is ")
        assert {key, value} <= words and key != value
        assert len(line) == recall.pair_size and spaced.decode(line[recall.answer]) in words
    tokens = torch.tensor(spaced.encode(" ".join(text.split())))
    task = continuations(tokens, spaced, 6, context=8, size=5, choices=3)
    whole = tokens.tolist()
    for context, choices, gold in task.questions:
        for choice in [[*context, *choices[gold]], *choices]:
            assert any(whole[at : at + len(choice)] == choice for at in range(len(whole)))
    monkeypatch.setattr(data, "PIECE", 100)
    (tmp_path / "a.txt").write_text(text)
    corpus = TextCorpus.from_folder(tmp_path, spaced)
    assert torch.cat([corpus.training, corpus.held_out]).tolist() == spaced.encode(text)


def test_recall_of_words_needs_words(tokenizer):
    tokens = torch.tensor(tokenizer.encode(" river, stone, paper."))
    with pytest.raises(ValueError, match="must hold 8 words that are one token each, got 3"):
        WordRecall(tokens, tokenizer, (0,))


def test_the_tokenizer_decides_which_recall(tokenizer):
    tokens = torch.tensor(tokenizer.encode(story(0)))
    assert isinstance(recall_of(tokens, tokenizer, (1,)), WordRecall)
    of_bytes = recall_of(torch.tensor(list(story(0).encode())), Tokenizer.byte_level(), (1,))
    assert isinstance(of_bytes, Recall) and of_bytes.mark == 256


def test_spans_of_recall_hold_no_end_of_text():
    tokens = torch.tensor([7, 256] * 20 + list(range(6)))
    recall = Recall(tokens, 256, (0,), 2, 1, 4)
    for told in recall.told(torch.Generator().manual_seed(0)):
        assert told[0] == 256 and 256 not in told[1:]


def corpus_of(stories: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    parts = [torch.tensor([*tokenizer.encode(text), tokenizer.end_of_text_id]) for text in stories]
    return torch.cat(parts)[:-1]


def test_continuations_are_the_next_sentence_and_others_of_the_same_file(tokenizer):
    stories = [story(seed) for seed in range(6)]
    flat = [" " + " ".join(text.split()) for text in stories]
    task = continuations(corpus_of(stories, tokenizer), tokenizer, 50, context=20, size=8, choices=3, seed=2)
    assert task.name == "continuations" and len(task.questions) == 50
    for context, choices, gold in task.questions:
        assert len(context) == 20 and len(choices) == 3 and {len(choice) for choice in choices} == {8}
        of = [text for text in flat if tokenizer.decode([*context, *choices[gold]]) in text]
        assert of and tokenizer.decode(context).endswith(".")
        for i, choice in enumerate(choices):
            assert tokenizer.decode(choice).startswith(" Then") and any(tokenizer.decode(choice) in text for text in of)
            assert i == gold or choice != choices[gold]
    assert {gold for _, _, gold in task.questions} == {0, 1, 2}
    again = continuations(corpus_of(stories, tokenizer), tokenizer, 50, context=20, size=8, choices=3, seed=2)
    other = continuations(corpus_of(stories, tokenizer), tokenizer, 50, context=20, size=8, choices=3, seed=3)
    assert again.questions == task.questions != other.questions


def test_continuations_are_scored_by_the_sum_over_equally_many_tokens(tokenizer):
    """A model that knows the text has all right; a uniform one has the first choice's share and the log of the
    vocabulary.
    """
    stories = [story(seed) for seed in range(6)]
    task = continuations(corpus_of(stories, tokenizer), tokenizer, 40, context=20, size=8)
    size = tokenizer.vocab_size
    uniform = task.score(lambda ids: torch.zeros(*ids.shape, size))
    assert uniform.loss == pytest.approx(math.log(size))
    assert uniform.accuracy == sum(gold == 0 for _, _, gold in task.questions) / 40
    known = {(*context, *choices[gold]) for context, choices, gold in task.questions}

    def knows(ids):
        logits = torch.zeros(*ids.shape, size)
        for row, of_row in zip(ids.tolist(), logits):
            for text in known:
                if tuple(row) == text[:-1]:
                    of_row.scatter_(1, torch.tensor(text[1:])[:, None], 9.0)
        return logits

    score = task.score(knows)
    assert score.accuracy == 1.0 and score.loss < 0.1


def test_continuations_that_cannot_be_are_refused(tokenizer):
    tokens = corpus_of([story(0)], tokenizer)
    with pytest.raises(ValueError, match="the text must have 900 sentences of 8 tokens or more behind 20 tokens, 4"):
        continuations(tokens, tokenizer, 900, context=20, size=8)
    with pytest.raises(ValueError, match="choices at least 2, got 5, 20, 8 and 1"):
        continuations(tokens, tokenizer, 5, context=20, size=8, choices=1)
