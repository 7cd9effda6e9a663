"""The model of transformers behind the harness's own `hf` model."""

import importlib.util
import json

import pytest
from support.hf_cases import NO_STOP
from support.model_cases import small_model
from transformers import AutoTokenizer

from jetkernels.model import Tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the package lm_eval: pip install jetkernels[harness]"
)


def test_answers_are_those_of_our_model(tmp_path):
    import lm_eval

    from jetkernels.postnas.harness import HarnessModel, continue_with_cache

    model = small_model(vocab_size=257, **NO_STOP).eval()
    model.save_pretrained(tmp_path)
    Tokenizer.byte_level().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    documents = [("2 + 2 =", ["4", "5"], 0), ("abc", ["d", "e e e e e"], 1), ("xyz", ["d", "eeee"], 0)]
    file = tmp_path / "documents.json"
    file.write_text("\n".join(json.dumps({"q": q, "c": c, "a": a}) for q, c, a in documents))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choosing = {"task": "choosing", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "c"}
    choosing |= {"doc_to_target": "a", "metric_list": [{"metric": "acc"}]}
    answering = {"task": "answering", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "x"}
    answering |= {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5}}
    answering["metric_list"] = [{"metric": "exact_match"}]
    options = {"tasks": [data | choosing, data | answering], "bootstrap_iters": 0}
    theirs = {"pretrained": str(tmp_path), "dtype": "float32"}
    found = lm_eval.simple_evaluate("hf", theirs, device="cpu", batch_size=2, **options)["samples"]
    ours = HarnessModel(lambda ids: model(ids).logits, Tokenizer.byte_level(), continue_=continue_with_cache(model))
    expected = lm_eval.simple_evaluate(ours, **options)["samples"]
    for sample, other in zip(found["choosing"], expected["choosing"], strict=True):
        for [(score, greedy)], [(score_of_ours, greedy_of_ours)] in zip(sample["resps"], other["resps"]):
            assert score == pytest.approx(score_of_ours, rel=1e-5) and greedy == greedy_of_ours
    assert [s["resps"] for s in found["answering"]] == [s["resps"] for s in expected["answering"]]
