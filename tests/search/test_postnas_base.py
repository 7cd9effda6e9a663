"""Bases, text, tasks and checkpoints of the search."""

import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.postnas_cases import text_folder, tiny_base_folder

from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas import (
    Copy,
    Loader,
    MultipleChoice,
    Recall,
    Recipe,
    Score,
    TextCorpus,
    TokenTask,
    Windows,
    from_pretrained,
    language_modelling,
    small_base,
    train_base,
)
from jetkernels.postnas.base import weights_digest
from jetkernels.postnas.checkpoints import DifferentRun, load_state, save_state
from jetkernels.postnas.data import seeded
from jetkernels.postnas.tasks import log_likelihoods

# The keys that a published Qwen2.5 config.json has.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 7,
    "eos_token_id": 7,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 50,
}


def published_checkpoint(folder, **changes):
    """A folder as published: config.json and model.safetensors with the keys of a Qwen2 checkpoint, random values."""
    values = QWEN | changes
    C, width, d = (
        values["hidden_size"],
        values["intermediate_size"],
        values["hidden_size"] // values["num_attention_heads"],
    )
    shapes = {"model.embed_tokens.weight": [values["vocab_size"], C], "model.norm.weight": [C]}
    for i in range(values["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", 4 * d), ("k", 2 * d), ("v", 2 * d)):
            shapes |= {f"{layer}self_attn.{name}_proj.weight": [rows, C], f"{layer}self_attn.{name}_proj.bias": [rows]}
        shapes |= {f"{layer}self_attn.o_proj.weight": [C, C], f"{layer}mlp.down_proj.weight": [C, width]}
        shapes |= {f"{layer}mlp.{name}_proj.weight": [width, C] for name in ("gate", "up")}
        shapes |= {f"{layer}{name}_layernorm.weight": [C] for name in ("input", "post_attention")}
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [values["vocab_size"], C]
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) + ("norm" in name) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_published_qwen2_checkpoints_give_the_logits_of_transformers(tmp_path, tied):
    folder = published_checkpoint(tmp_path / "qwen", tie_word_embeddings=tied)
    base = from_pretrained(folder)
    assert base.config.layer_types == ["attn"] * 2 and base.config.tie_word_embeddings is tied
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base(ids).logits, peer(ids).logits, rtol=0, atol=2e-5)


def test_a_base_keeps_its_weights_when_saved_here(tmp_path):
    base = from_pretrained(published_checkpoint(tmp_path / "qwen"))
    base.save_pretrained(tmp_path / "ours")
    assert weights_digest(from_pretrained(tmp_path / "ours")) == weights_digest(base)
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    assert stored.keys() == base.state_dict().keys()


def test_bases_that_do_not_fit_are_refused(tmp_path):
    folder = published_checkpoint(tmp_path / "qwen")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.bias"]
    save_file(weights, str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.k_proj\.bias"):
        from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_pretrained(tmp_path)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        from_pretrained(folder)


def test_hybrids_are_no_base(tmp_path):
    from support.model_cases import small_model

    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer_types must all be attn"):
        from_pretrained(tmp_path)


def test_text_is_split_by_file_and_read_the_same_by_both_tokenizers(tmp_path):
    folder = text_folder(tmp_path / "text")
    (folder / "image.bin").write_bytes(b"\xff\xfe\x00\x01")
    corpus = TextCorpus.from_folder(folder)
    assert corpus.split == "by file" and corpus.files == 30 and corpus.skipped == 1
    assert len(corpus.training) > len(corpus.held_out) > 0
    assert TextCorpus.from_folder(folder, Tokenizer.byte_level()).digest == corpus.digest
    assert TextCorpus.from_folder(folder, suffix=".txt").skipped == 0


def test_a_single_file_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    corpus = TextCorpus.from_folder(tmp_path)
    assert corpus.split == "by position" and len(corpus.held_out) == 15
    assert torch.cat([corpus.training, corpus.held_out]).tolist() == list(b"abc" * 100)


@pytest.mark.parametrize("tokenizer", [None, Tokenizer.byte_level()])
def test_text_can_stand_between_files(tmp_path, tokenizer):
    """An empty file counts, and nothing stands before the first file or behind the last one."""
    for name, text in (("a", "xy"), ("b", ""), ("c", "z")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = sorted(tmp_path.iterdir())
    corpus = TextCorpus.from_files(tmp_path, files, tokenizer, between="\n")
    assert torch.cat([corpus.training, corpus.held_out]).tolist() == list(b"xy\n\nz")
    assert corpus.training.dtype == corpus.held_out.dtype == torch.int64


def test_files_that_would_leave_one_side_almost_empty_are_split_by_position(tmp_path):
    """However the names fall, a 40th of the tokens is on each side."""
    splits = set()
    for count in range(1, 30):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{count}-{i}.txt").write_text("x" * (2000 if i == 0 else 50))
        corpus = TextCorpus.from_folder(folder)
        splits.add(corpus.split)
        assert min(len(corpus.training), len(corpus.held_out)) >= (2000 + 50 * (count - 1)) // 40
    assert splits == {"by position", "by file"}


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        TextCorpus.from_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"must hold files named \*\.md"):
        TextCorpus.from_folder(tmp_path, suffix=".md")
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="must hold text"):
        TextCorpus.from_folder(tmp_path)


def test_batches_depend_on_seed_and_step_only_and_ranks_share_them():
    loader = Loader([(Windows(torch.arange(500)), 0.5), (Copy(torch.arange(500), 6, 3, 2), 0.5)], 8, 20, seed=3)
    whole = loader.batch(7)
    assert whole.shape == (8, 20) and torch.equal(whole, loader.batch(7)) and not torch.equal(whole, loader.batch(8))
    assert torch.equal(torch.stack([loader.batch(7, r, 2) for r in range(2)], 1).flatten(0, 1), whole)
    assert not torch.equal(whole, Loader(loader.sources, 8, 20, seed=4).batch(7))
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        loader.batch(0, 0, 3)
    with pytest.raises(ValueError, match="at least length = 20 tokens, got 5"):
        Loader([(Windows(torch.arange(5)), 1.0)], 8, 20).batch(0)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_recall_asks_for_the_value_of_every_key(data):
    """Read back from the rows alone: pairs, text of the distance, every key once more in some order, its value asked
    for.
    """
    key_size, value_size, pairs = (
        data.draw(st.integers(1, high), name) for name, high in (("key", 3), ("value", 3), ("pairs", 4))
    )
    distances, seed = (
        data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
        data.draw(st.integers(0, 99)),
    )
    tokens = torch.randint(30, (400,), generator=torch.Generator().manual_seed(seed))
    recall = Recall(tokens, 1000, distances, key_size, value_size, pairs)
    length = recall.overhead + max(distances) + data.draw(st.integers(0, 5))
    task = recall.task(3, length, seed)
    assert task.input_ids.shape == (3 * len(distances), length) and task.group_names == [
        f"distance {d}" for d in distances
    ]
    for ids, labels, group in zip(task.input_ids.tolist(), task.labels.tolist(), task.group.tolist()):
        row = ids + labels[-1:]
        starts = [i for i, token in enumerate(row) if token == 1000]
        assert len(starts) == 2 * pairs + 1 and starts[pairs + 1] - starts[pairs] - 1 == distances[group]
        spans = [row[i + 1 : i + 1 + key_size + value_size] for i in starts[:pairs] + starts[pairs + 1 :]]
        told, asked = (sorted(spans[half]) for half in (slice(pairs), slice(pairs, None)))
        assert told == asked and len({tuple(span[:key_size]) for span in told}) == pairs
        assert all(len(set(span[:key_size])) == key_size and len(set(span[key_size:])) == value_size for span in told)
        answers = {i + key_size + j for i in starts[pairs + 1 :] for j in range(value_size)}
        assert [i for i, label in enumerate(labels) if label != -100] == sorted(answers)
        assert all(labels[i] == row[i + 1] for i in answers)
    rows = recall.rows(5, length + 1, torch.Generator().manual_seed(seed))
    assert rows.shape == (5, length + 1) and ((rows == 1000).sum(1) == 2 * pairs + 1).all()


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.4, 0.3, 0.3), (0.0, 1.0, 2.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_shares_hold_over_many_steps(shares, batch):
    """Rows of source i are full of i."""
    loader = Loader([(Windows(torch.full((5,), i)), share) for i, share in enumerate(shares)], batch, 2, seed=1)
    counts = torch.stack([torch.bincount(loader.batch(step)[:, 0], minlength=3) for step in range(400)])
    wanted = batch * torch.tensor(shares) / sum(shares)
    assert (counts.sum(1) == batch).all() and ((counts - wanted).abs() < 1).all()
    assert (counts.double().mean(0) - wanted).abs().max() < 0.08


def test_recall_needs_room_and_different_spans():
    with pytest.raises(ValueError, match="length must be at least 79 at distance 31, got 39"):
        Recall(torch.arange(1000), 1000, (31,)).task(1, 39)
    with pytest.raises(ValueError, match="must hold 5 spans of 3 different tokens"):
        Recall(torch.tensor([1, 2, 3, 4] * 9), 1000, (0,), 3, 1, 5).task(1, 60)
    with pytest.raises(ValueError, match="must hold 2 spans of 1 different tokens"):
        Recall(torch.zeros(50, dtype=torch.int64), 1000, (0,), 1, 1, 2).task(1, 60)


def test_copying_asks_for_the_second_occurrence_behind_its_cue():
    copy = Copy(torch.arange(1000), size=8, gap=5, cue=3)
    for ids, labels in zip(*(t.tolist() for t in (copy.task(6, 40).input_ids, copy.task(6, 40).labels))):
        row = ids + labels[-1:]
        assert row[-8:] == row[-21:-13] and labels[-5:] == row[-5:] and set(labels[:-5]) == {-100}
    with pytest.raises(ValueError, match="cue must be between"):
        Copy(torch.arange(9), size=4, cue=4)
    with pytest.raises(ValueError, match="length must be at least 20, got 19"):
        copy.task(1, 19)


def test_rows_that_teach_copying_repeat_a_span():
    rows = Copy(torch.arange(1000), cue=3).rows(50, 31, torch.Generator().manual_seed(0))
    periods = [row.index(row[0], 1) for row in rows.tolist()]
    assert min(periods) == 5 and max(periods) == 15
    for row, period in zip(rows.tolist(), periods):
        assert row == (list(range(row[0], row[0] + period)) * 31)[:31]
    with pytest.raises(ValueError, match="copy: length must be at least 10, got 9"):
        Copy(torch.arange(1000), cue=3).rows(1, 9, torch.Generator())


def test_scores_are_those_of_the_asked_tokens():
    """A model that puts probability 3/4 on one token."""
    labels = torch.tensor([[-100, 1], [0, -100]])
    logits = torch.tensor([0.25, 0.75]).log().expand(2, 2, 2)
    task = TokenTask("x", torch.zeros(2, 2, dtype=torch.int64), labels, ("a", "b"), torch.tensor([0, 1]), batch_size=1)
    score = task.score(lambda ids: logits[: len(ids)])
    assert score.loss == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2) and score.accuracy == 0.5
    assert score.groups["a"][1] == 1.0 and score.groups["b"][0] == pytest.approx(math.log(4))


def test_multiple_choice_takes_the_likeliest_choice(tmp_path):
    path = tmp_path / "letters.jsonl"
    lines = [{"query": "q", "choices": ["aa", "b"], "gold": 1}, {"query": "q", "choices": ["b", "aa"], "gold": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    task = MultipleChoice.from_jsonl(path, Tokenizer.byte_level())

    def predict(ids):
        logits = torch.full((*ids.shape, 257), -1e9)
        logits[..., ord("a")], logits[..., ord("b")] = math.log(0.4), math.log(0.6)
        return logits

    score = task.score(predict)
    assert task.name == "letters" and score.accuracy == 0.5
    assert score.loss == pytest.approx(-(math.log(0.6) + 2 * math.log(0.4)) / 3)
    assert isinstance(score, Score)
    path.write_text('{"query": "q\u2028\x85", "choices": ["a"], "gold": 0}', encoding="utf-8")
    assert MultipleChoice.from_jsonl(path, Tokenizer.byte_level()).documents == [("q\u2028\x85", ["a"], 0)]
    for choices, gold in ((["a"], 1), (["a", "b"], 1.0), (["a", "b"], True), ("ab", 1)):
        path.write_text(json.dumps({"query": "q", "choices": choices, "gold": gold}))
        with pytest.raises(ValueError, match="line 1 of .* must be an object with query, choices and gold"):
            MultipleChoice.from_jsonl(path, Tokenizer.byte_level())
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"letters\.jsonl must be UTF-8 text, got byte 0xff"):
        MultipleChoice.from_jsonl(path, Tokenizer.byte_level())


def test_log_likelihoods_are_those_of_each_pair_alone():
    model = small_base(
        1,
        seed=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    draw = torch.Generator().manual_seed(1)
    sizes = [(1, 1), (5, 2), (2, 7), (3, 0), (9, 1)]
    pairs = [tuple(torch.randint(256, (n,), generator=draw).tolist() for n in size) for size in sizes]
    with torch.no_grad():
        ids = [*pairs[1][0]]
        for _ in range(2):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        pairs.append((pairs[1][0], ids[-2:]))
        found = log_likelihoods(lambda ids: model(ids).logits, pairs, batch_size=4)
        for (context, answer), (value, greedy) in zip(pairs, found):
            log_p = model(torch.tensor([[*context, *answer]])).logits.double().log_softmax(-1)[0]
            each = [log_p[len(context) - 1 + i, token].item() for i, token in enumerate(answer)]
            assert value == pytest.approx(sum(each), abs=1e-5)
            best = [log_p[len(context) - 1 + i].argmax().item() for i in range(len(answer))]
            assert greedy == (best == answer)
    assert found[-1][1] and not found[1][1]


def test_a_base_learns_from_text(tmp_path):
    corpus = TextCorpus.from_folder(text_folder(tmp_path / "text"))
    model = small_base(1, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    losses = train_base(model, corpus, Recipe(40, 1e-2, warmup=4), batch_size=4, length=80, distances=(8,))
    assert losses[0] > 5.4 and losses[-1] < 4.2
    assert language_modelling(corpus.held_out, 8, 60).score(lambda ids: model(ids).logits).loss < 4.5


def test_checkpoint_files_are_whole_or_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    state = {"x": torch.arange(3), "losses": [1.5], "name": "n"}
    run = {"seed": 1, "facts": {"steps": 3}}
    save_state(path, "base", run, state)
    loaded = load_state(path, "base", run)
    assert torch.equal(loaded["x"], state["x"]) and loaded["losses"] == [1.5]
    content = path.read_bytes()
    for damaged, sentence in (
        (content[:-1], "is damaged: must hold"),
        (content[:60], "is damaged: its header"),
        (content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "does not have the digest"),
        (b"PK" + content, "is not a checkpoint of a search"),
        (b"", "is not a checkpoint of a search"),
        (content.replace(b'"version": 3', b'"version": 9'), "must have format version 3, got 9"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=sentence):
            load_state(path, "base", run)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be of stage scores, got base"):
        load_state(path, "scores", run)
    with pytest.raises(
        DifferentRun, match="belongs to a run with other options.*: steps was 3, now 4; rows was null, now 2"
    ) as found:
        load_state(path, "base", {"seed": 1, "facts": {"steps": 4, "rows": 2}})
    assert found.value.differences == [("steps", 3, 4), ("rows", None, 2)]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    save_state(path, "base", {}, {"x": 1})
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(path, "base", {}, {"x": 2})
    assert load_state(path, "base", {}) == {"x": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("changes", "name"), [({"steps": -1}, "steps"), ({"steps": 1, "save_every": 0}, "save_every")])
def test_wrong_recipes_are_refused(changes, name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Recipe(**changes)


def test_draws_depend_on_their_purpose():
    def draw(*what):
        return torch.randint(1 << 30, (1,), generator=seeded(*what)).item()

    assert draw("a", 1) == draw("a", 1) and len({draw("a", 1), draw("a", 2), draw("b", 1)}) == 3


def test_the_saved_base_of_the_tests_is_a_base(tmp_path):
    base = from_pretrained(tiny_base_folder(tmp_path))
    assert isinstance(base, JetNemotronForCausalLM) and base.config.num_hidden_layers == 3
