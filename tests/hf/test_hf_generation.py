"""`generate` of transformers with the memory of our model behind its Cache interface."""

import pytest
import torch
from support.hf_cases import VOCAB, mask, of, pair
from support.model_cases import padded, small_model, tokens
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, pipeline
from transformers.generation.streamers import BaseStreamer

import jetkernels.hf as hf
from jetkernels.model import Tokenizer

IDS = tokens(3, 11)
MASKS = {"whole": torch.ones_like(IDS), "left": mask(True, 11, 4, 7)}
each_mask = pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)


@pytest.fixture(scope="module")
def both():
    return pair(dtype=torch.float64)


@each_mask
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_greedy_tokens_are_ours(attention_mask, dtype):
    ours, theirs = pair(dtype=dtype)
    expected = ours.generate(IDS, attention_mask, 12)
    assert len(set(map(tuple, expected[:, 11:].tolist()))) == 3
    got = theirs.generate(IDS, attention_mask=attention_mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, expected)


def test_rows_end_as_ours_do():
    ours, _ = pair()
    stop = ours.generate(IDS, max_new_tokens=12)[0, 14].item()
    theirs = of(ours, eos_token_id=stop, pad_token_id=1)
    expected = ours.generate(IDS, max_new_tokens=12, stop_token_ids=stop, pad_token_id=1)
    assert (expected[0, 15:] == 1).all()
    assert torch.equal(theirs.generate(IDS, attention_mask=MASKS["whole"], max_new_tokens=12), expected)


@each_mask
def test_beams_are_those_without_a_cache(both, attention_mask):
    _, model = both
    options = {"attention_mask": attention_mask, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(IDS, **options, use_cache=False)
    assert expected.shape == (6, 19)
    assert not torch.equal(expected[::2], model.generate(IDS, attention_mask=attention_mask, max_new_tokens=8))
    assert torch.equal(model.generate(IDS, **options), expected)


@each_mask
def test_samples_are_those_without_a_cache(both, attention_mask):
    _, model = both
    found = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        found.append(
            model.generate(
                IDS, attention_mask=attention_mask, max_new_tokens=8, do_sample=True, top_p=0.9, use_cache=use_cache
            )
        )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], model.generate(IDS, attention_mask=attention_mask, max_new_tokens=8))


@each_mask
def test_long_prompts_in_chunks(both, attention_mask):
    _, model = both
    expected = model.generate(IDS, attention_mask=attention_mask, max_new_tokens=6)
    got = model.generate(IDS, attention_mask=attention_mask, max_new_tokens=6, prefill_chunk_size=3)
    assert torch.equal(got, expected)


def test_tokens_are_streamed(both):
    class Collector(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    collector = Collector()
    found = both[1].generate(IDS[:1], max_new_tokens=5, streamer=collector)
    assert collector.seen == found[0].tolist() and collector.ended


def test_generation_goes_on_where_it_was(both):
    _, model = both
    expected = model.generate(IDS, max_new_tokens=9)
    first = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 14  # the last token is never fed back
    got = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(got, expected)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=9), expected[:, 11:])


def test_the_memory_has_the_size_of_the_call(both):
    _, model = both
    found = model.generate(IDS, max_new_tokens=4, num_beams=2, return_dict_in_generate=True)
    memory = found.past_key_values.memory
    assert memory.max_length == 14 and memory.batch_size == 6


@pytest.mark.parametrize("left", [0, 3], ids=["whole", "padded"])
def test_looked_up_tokens_change_nothing(both, left):
    """Prompts that repeat themselves, so that drafts are accepted, and others."""
    _, model = both
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(0))
    taken = 0
    for seed in range(8):
        ids = tokens(1, 5, seed=seed).repeat(1, 3) if seed % 2 else tokens(1, 12, seed=seed)
        attention_mask = torch.ones_like(ids)
        attention_mask[:, :left] = 0
        options = {"attention_mask": attention_mask, "max_new_tokens": 24}
        expected = model.generate(ids, **options)
        calls.clear()
        found = model.generate(ids, **options, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected)
        assert found.past_key_values.get_seq_length() == expected.shape[1] - 1
        taken += 25 - len(calls)  # the front of the prompt is read in a call of its own
    hook.remove()
    assert taken > 8, "no drafts were accepted"


def test_an_assistant_changes_nothing(both):
    _, model = both
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    assistant = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, eos_token_id=None, **sizes))
    for seed in range(3):
        ids = tokens(1, 9, seed=seed)
        expected = model.generate(ids, max_new_tokens=10)
        assert torch.equal(model.generate(ids, max_new_tokens=10, assistant_model=assistant), expected)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=10), expected[:, 9:])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"assistant_model": "itself"}, ValueError, "this model cannot be the assistant of another"),
        ({"assistant_early_exit": 2}, ValueError, "this model cannot be the assistant of another"),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation must be None.*got 'static'"),
        ({"past_key_values": "another"}, ValueError, "must be a jetkernels.hf.PastKeyValues.* got str"),
        ({"no_such_option": 1}, ValueError, "no_such_option"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_refused(both, options, error, says):
    _, model = both
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with pytest.raises(error, match=says):
        model.generate(IDS[:1], max_new_tokens=2, **options)


@torch.no_grad()
def test_tokens_of_the_last_call_are_taken_back(both):
    _, model = both
    past = model(IDS[:, :4]).past_key_values
    with pytest.raises(ValueError, match=r"the last call .* \(none\), got -1"):
        past.crop(-1)
    past.activate_past_recording()
    model(IDS[:, 4:9], past_key_values=past)
    for wrong in (-6, 1):
        with pytest.raises(ValueError, match=rf"the last call .* \(5\), got {wrong}"):
            past.crop(wrong)
    past.crop(-3)
    assert past.get_seq_length() == 6 and past.memory.lengths == [6] * 3
    got = model(IDS[:, 6:8], past_key_values=past).logits
    got = torch.cat([got, model(IDS[:, 8:], past_key_values=past).logits], 1)  # what is not cropped is accepted
    torch.testing.assert_close(got, model(IDS).logits[:, 6:], rtol=0, atol=1e-12)
    past.crop(0)
    assert past.get_seq_length() == 11 and past.memory.lengths == [11] * 3


@torch.no_grad()
def test_rows_are_chosen_and_repeated(both):
    _, model = both
    past = model(IDS[:, :6], MASKS["left"][:, :6] | 1).past_key_values
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([5, 0]))
    rows = torch.tensor([2, 0])
    got = model(IDS[rows, 6:], past_key_values=past).logits
    torch.testing.assert_close(got, model(IDS[rows]).logits[:, 6:], rtol=0, atol=1e-12)


def test_the_cache_is_one_of_the_whole_model():
    past = hf.PastKeyValues()
    with pytest.raises(NotImplementedError, match="the model writes its states itself"):
        past.update(None, None, 0)
    assert past.is_croppable and not past.is_compileable and not past.is_initialized and len(past) == 0
    past.reset()
    past.crop(0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_string_ends_a_text(tmp_path, options):
    model = of(small_model(vocab_size=257, eos_token_id=256, pad_token_id=256, bos_token_id=None))
    Tokenizer.byte_level().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = {"input_ids": tokens(1, 4), "do_sample": False, "max_new_tokens": 8, **options}
    whole = model.generate(**rows)[0]
    stop = tokenizer.decode(whole[6:7])
    cut = model.generate(**rows, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert stop in tokenizer.decode(cut[4:])
    if "num_beams" not in options:  # of which another may win
        expected = next(n for n in range(1, 9) if stop in tokenizer.decode(whole[4 : 4 + n]))
        assert torch.equal(cut, whole[: 4 + expected])


def test_the_pipeline_writes_what_our_model_writes(tmp_path):
    ours = small_model(vocab_size=257, eos_token_id=256, pad_token_id=256, bos_token_id=None)
    ours.save_pretrained(tmp_path)
    Tokenizer.byte_level().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left", pad_token="<|endoftext|>")
    prompts = ["def f(", "x"]
    rows = [torch.tensor(list(prompt.encode())) for prompt in prompts]
    expected = ours.generate(*padded(rows, left=True, fill=256), 6)
    write = pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer)
    got = write(prompts, max_new_tokens=6, do_sample=False, batch_size=2, return_full_text=False)
    for (found,), row in zip(got, expected[:, 6:]):
        assert found["generated_text"] == tokenizer.decode(row, skip_special_tokens=True) != ""
