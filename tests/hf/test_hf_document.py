"""What docs/transformers.md shows, run as it stands, on a small model."""

import contextlib
import importlib.util
import io

import pytest
import transformers
from support.documents import blocks, run_python
from support.model_cases import small_model
from transformers import AutoTokenizer

import jetkernels.hf  # noqa: F401 - registers the model
from jetkernels.model import Tokenizer

transformers.utils.logging.set_verbosity_error()
PAGE = "docs/transformers.md"
BLOCKS = blocks(PAGE, "python")
NEEDS = {"Trainer": "accelerate", "get_peft_model": "peft", "lm_eval": "lm_eval"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's reader stands: the model beside him, and what the first blocks leave behind."""
    folder = tmp_path_factory.mktemp("page")
    small_model(vocab_size=257, eos_token_id=256, bos_token_id=None).save_pretrained(folder / "Jet-Nemotron-2B")
    Tokenizer.byte_level().save_pretrained(folder / "Jet-Nemotron-2B")
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "Jet-Nemotron-2B", **end)
    tokenizer.save_pretrained(folder / "Jet-Nemotron-2B")
    return folder


@pytest.fixture(scope="module")
def names(folder):
    names = {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        run_python(PAGE, BLOCKS[:2], names)
    return names


def test_the_first_blocks_agree(names, folder):
    assert (folder / "copy" / "config.json").exists() and names["ours"] is not None


@pytest.mark.parametrize("block", BLOCKS[2:], ids=lambda block: block.code.split("\n")[0])
def test_block(block, names, folder, monkeypatch, tmp_path):
    for word, package in NEEDS.items():
        if word in block.code and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    if "lm_eval" in block.code:
        # Its task is on a hub: a task of the same name on a local file.
        import lm_eval.tasks

        tasks = lm_eval.tasks.TaskManager(include_defaults=False)
        evaluate = lm_eval.simple_evaluate
        monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **o: evaluate(**o | local(tmp_path, tasks)))
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        run_python(PAGE, [block], dict(names))


def local(folder, tasks) -> dict:
    (folder / "questions.json").write_text('{"q": "abc", "c": ["d", "e"], "a": 0}\n')
    task = {
        "task": "arc_easy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "c",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    return {"tasks": [task], "task_manager": tasks, "device": "cpu", "bootstrap_iters": 0}
