"""Tasks of lm-evaluation-harness as objectives of a search."""

import importlib.util
import json
import math

import pytest
import torch
from support.postnas_cases import text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.model import Tokenizer
from jetkernels.postnas import MultipleChoice, from_pretrained

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs the package lm_eval: pip install jetkernels[harness]")
DOCUMENTS = [("2 + 2 =", ["4", "5"], 0), ("abc", ["d", "e e e e e"], 1), ("xyz", ["d", "eeee"], 0)]


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    model = from_pretrained(tiny_base_folder(tmp_path_factory.mktemp("base")))
    return lambda ids: model(ids).logits


def configuration(folder, **changes) -> dict:
    """A task in the harness's own form, on a local file."""
    path = folder / "documents.json"
    path.write_text("\n".join(json.dumps({"q": q, "c": c, "a": a}) for q, c, a in DOCUMENTS))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "c",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return task | changes


@needs_harness
def test_choices_are_scored_as_ours_are(tmp_path, predict):
    """The harness puts a space in front of each choice."""
    from jetkernels.postnas.harness import HarnessTask

    tokenizer = Tokenizer.byte_level()
    score = HarnessTask(configuration(tmp_path), tokenizer).score(predict)
    ours = MultipleChoice("toy", [(q, [f" {c}" for c in choices], a) for q, choices, a in DOCUMENTS], tokenizer)
    tokens = sum(1 + len(choices[gold]) for _, choices, gold in DOCUMENTS)
    assert score.accuracy == pytest.approx(ours.score(predict).accuracy)
    assert score.loss == pytest.approx(ours.score(predict).loss * tokens / len(DOCUMENTS), rel=1e-5)
    with pytest.raises(ValueError, match="metric of toy must be one of acc, .* got 'f1'"):
        HarnessTask(configuration(tmp_path), tokenizer, metric="f1").score(predict)


@needs_harness
@torch.no_grad()
def test_text_is_rolled_over_and_generated(tmp_path, predict):
    from jetkernels.postnas.harness import HarnessTask

    tokenizer = Tokenizer.byte_level()
    rolling = configuration(
        tmp_path,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{q}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    nats, count = 0.0, 0
    for q, _, _ in DOCUMENTS:
        ids = torch.tensor([[256, *q.encode()]])
        nats -= predict(ids[:, :-1]).log_softmax(-1)[0].gather(1, ids[0, 1:, None]).sum().item()
        count += len(q)
    score = HarnessTask(rolling, tokenizer, metric="bits_per_byte").score(predict)
    # Fewer bits are better, so that their negative is the objective.
    assert score.accuracy == pytest.approx(-nats / count / math.log(2), rel=1e-5) and math.isnan(score.loss)
    ids = list(DOCUMENTS[0][0].encode())
    for _ in range(3):
        ids.append(predict(torch.tensor([ids]))[0, -1].argmax().item())
    generating = configuration(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target=tokenizer.decode(ids[-3:]),
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match"}],
    )
    assert HarnessTask(generating, tokenizer, limit=1, metric="exact_match").score(predict).accuracy == 1.0


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install(tmp_path, capsys):
    arguments = ["--text", str(text_folder(tmp_path / "text")), "--base", str(tiny_base_folder(tmp_path / "base"))]
    arguments += ["--output", str(tmp_path / "out"), "--steps", "0", "--device", "cpu", "--harness", "arc_easy"]
    assert main(["search", "placement", *arguments]) == 1
    error = capsys.readouterr().err
    assert "pip install 'jetkernels[harness]'" in error.splitlines()[-1] and "Traceback" not in error
