"""`jetkernels evaluate`."""

import importlib.util
import json

import pytest
import torch

from jetkernels.__main__ import main
from jetkernels.cli import demo
from jetkernels.cli.evaluate import metrics
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs the package lm_eval: pip install jetkernels[harness]")
DOCUMENTS = [("2 + 2 =", ["4", "5"], 0), ("abc", ["d", "e e e e e"], 1), ("xyz", ["d", "eeee"], 0)]


@pytest.fixture
def model(tmp_path):
    config = JetNemotronConfig(**{**demo.CONFIG, "hidden_size": 48, "intermediate_size": 64, "initializer_range": 0.3})
    model = JetNemotronForCausalLM.random(config)
    model.save_pretrained(tmp_path / "model")
    Tokenizer.byte_level().save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def tasks(tmp_path):
    """Folder with tasks in the harness's own form, on a local file; YAML has JSON in it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.json").write_text("\n".join(json.dumps({"q": q, "c": c, "a": a}) for q, c, a in DOCUMENTS))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.json")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "c", "doc_to_target": "a"}
    choice["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    answer = {"output_type": "generate_until", "doc_to_target": "{{c[0]}}"}
    answer["generation_kwargs"] = {"until": ["\n\n"], "max_gen_toks": 5}
    answer["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for name, more in (("choosing", choice), ("answering", answer)):
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | task | more))
    return folder


def run(tmp_path, tasks, *names: str, more=()) -> int:
    arguments = ["evaluate", "--model", str(tmp_path / "model"), "--device", "cpu", "--task-folder", str(tasks)]
    return main([*arguments, *more, *(word for name in names for word in ("--task", name))])


@needs_harness
@torch.no_grad()
def test_choices_and_answers(tmp_path, model, tasks, capsys):
    assert run(tmp_path, tasks, "choosing", "answering", more=["--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = 0
    for query, choices, gold in DOCUMENTS:
        scores = []
        for choice in choices:
            ids = torch.tensor([[*query.encode(), *f" {choice}".encode()]])
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            scores.append(log_p[len(query) - 1 :].sum().item())
        right += scores.index(max(scores)) == gold
    assert found["choosing"]["acc"]["value"] == pytest.approx(right / 3) and found["choosing"]["acc"]["stderr"] > 0
    assert found["answering"]["exact_match"]["value"] == 0.0
    # A task whose answer is what the model says.
    said = model.generate(torch.tensor([list(b"abc")]), max_new_tokens=5)[0, 3:].tolist()
    said = said[: said.index(256)] if 256 in said else said
    task = json.loads((tasks / "answering.yaml").read_text()) | {"doc_to_text": "abc"}
    task["doc_to_target"] = Tokenizer.byte_level().decode(said)
    (tasks / "answering.yaml").write_text(json.dumps(task))
    assert run(tmp_path, tasks, "answering", more=["--limit", "1"]) == 0
    assert "answering  exact_match  1.0000" in capsys.readouterr().out


@needs_harness
def test_a_task_that_is_not_there_is_named(tmp_path, model, tasks, capsys):
    assert run(tmp_path, tasks, "choosing", "chosing") == 1
    assert "there is no task chosing; `lm-eval ls tasks` lists them" in capsys.readouterr().err


@needs_harness
def test_sampled_answers_are_refused(tmp_path, model, tasks, capsys):
    task = json.loads((tasks / "answering.yaml").read_text())
    task["generation_kwargs"] |= {"do_sample": True, "temperature": 0.7}
    (tasks / "answering.yaml").write_text(json.dumps(task))
    assert run(tmp_path, tasks, "answering") == 1
    assert "answers are greedy, got a task with" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install(tmp_path, model, tasks, capsys):
    assert run(tmp_path, tasks, "choosing") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("jetkernels evaluate: scoring needs the package lm_eval")
    assert "pip install 'jetkernels[harness]'" in error[0]


def test_random_weights_are_refused(capsys):
    assert main(["evaluate", "--config", "2b", "--random-weights", "--task", "arc_easy", "--device", "cpu"]) == 2
    assert "give --model FOLDER" in capsys.readouterr().err


def test_metrics_of_filters_and_missing_errors():
    results = {
        "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4},
        "two": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1, "exact_match,loose": 1},
    }
    assert metrics(results) == {
        "one": {"acc": {"value": 0.5, "stderr": None}},
        "two": {
            "exact_match,strict-match": {"value": 0.25, "stderr": 0.1},
            "exact_match,loose": {"value": 1.0, "stderr": None},
        },
    }
