"""A call of the model of transformers is a call of ours."""

import copy
import pickle

import pytest
import torch
from support.hf_cases import VOCAB, mask, of, pair
from support.model_cases import OTHER_ATTENTION, small_model, tokens
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import jetkernels.hf as hf
from jetkernels.model import JetNemotronForCausalLM

FP64 = {"rtol": 0, "atol": 1e-12}
MASKS = {"whole": None, "left": mask(True, 11, 4, 7), "right": mask(False, 11, 4, 7)}
IDS = tokens(3, 11)


@pytest.fixture(scope="module")
def both():
    return pair(dtype=torch.float64)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_logits_and_gradients(attention_mask, tied):
    ours, theirs = pair(dtype=torch.float64, tie_word_embeddings=tied)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    expected, got = (model(IDS, attention_mask).logits for model in (ours, theirs))
    torch.testing.assert_close(got, expected, **FP64)
    cotangent = torch.randn_like(expected)
    for logits in (expected, got):
        logits.backward(cotangent)
    found = dict(theirs.named_parameters())
    assert found.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, **FP64)


@pytest.mark.parametrize("kind", OTHER_ATTENTION)
def test_attention_of_other_bases(kind, tmp_path):
    """Read, written, generated from and trained as ours."""
    ours, theirs = pair("attn", "swa", dtype=torch.float64, **OTHER_ATTENTION[kind])
    theirs.save_pretrained(tmp_path)
    assert JetNemotronForCausalLM.from_pretrained(tmp_path).config.to_dict().items() >= OTHER_ATTENTION[kind].items()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict()
    for model in (theirs, again):
        torch.testing.assert_close(model(IDS).logits, ours(IDS).logits, **FP64)
    text = theirs.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert text[0, 11:].tolist() == ours.generate(IDS[:1], max_new_tokens=6)[0].tolist()[-6:]
    theirs(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in theirs.parameters())


@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_loss(attention_mask):
    """Also behind padding on the left, where the first token of a row is nobody's successor."""
    ours, theirs = pair()
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    expected = ours(IDS, attention_mask, labels=labels).loss
    output = theirs(IDS, attention_mask, labels=labels, logits_to_keep=1)
    assert output[0] is output.loss and output.logits.shape == (3, 1, VOCAB)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    counted = theirs(IDS, attention_mask, labels=labels, num_items_in_batch=7).loss
    if attention_mask is None:
        attention_mask = torch.ones_like(IDS)
    kept = [row[row_mask.bool()] for row, row_mask in zip(labels, attention_mask)]
    targets = sum(int((row[1:] != -100).sum()) for row in kept)
    torch.testing.assert_close(counted, expected * targets / 7, rtol=1e-6, atol=0)


def test_embeddings_may_be_given(both):
    _, model = both
    for attention_mask in MASKS.values():
        output = model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=attention_mask, labels=IDS)
        expected = model(IDS, attention_mask, labels=IDS)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_hidden_states(both, attention_mask):
    _, model = both
    output = model(IDS, attention_mask, output_hidden_states=True)
    embeddings, *inner, last = output.hidden_states
    kept = torch.ones_like(IDS) if attention_mask is None else attention_mask
    assert torch.equal(embeddings, model.get_input_embeddings()(IDS) * kept[..., None])
    assert len(inner) == 3
    assert torch.equal(last, model.model(IDS, attention_mask).last_hidden_state)
    torch.testing.assert_close(model.lm_head(last), output.logits, **FP64)
    # Each is what the next layer is given.
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.model.layers]
    model(IDS, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    unpadded = model(IDS, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, seen, unpadded[:-1]))
    with torch.no_grad():
        past = model(IDS).past_key_values
        step = model(IDS[:, :1], past_key_values=past, output_hidden_states=True)
    assert len(step.hidden_states) == 5


def test_logits_to_keep(both):
    _, model = both
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, whole[:, -3:], **FP64)
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]], **FP64)


@torch.no_grad()
@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_position_ids_must_agree(both, attention_mask):
    _, model = both
    kept = torch.ones_like(IDS) if attention_mask is None else attention_mask
    positions = (kept.cumsum(1) - 1).masked_fill(kept == 0, 1)
    expected = model(IDS, attention_mask).logits
    assert torch.equal(model(IDS, attention_mask, positions).logits, expected)
    past = model(IDS[:, :6], kept[:, :6], positions[:, :6]).past_key_values
    model(IDS[:, 6:], kept, positions[:, 6:], past)
    with pytest.raises(ValueError, match="position_ids must be those that attention_mask and past_key_values give"):
        model(IDS, attention_mask, positions + 1)
    with pytest.raises(ValueError, match=r"position_ids must be \[3, 11\] or \[1, 11\], got \[3, 4\]"):
        model(IDS, attention_mask, positions[:, :4])


@torch.no_grad()
@pytest.mark.parametrize("attention_mask", [MASKS["whole"], MASKS["left"]], ids=["whole", "left"])
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 3, 1, 1, 2], [11]], ids=str)
def test_a_text_in_pieces(both, attention_mask, sizes):
    """The memory grows as it is filled."""
    _, model = both
    expected = model(IDS, attention_mask, use_cache=False).logits
    got, past, end = [], hf.PastKeyValues(), 0
    for size in sizes:
        given = None if attention_mask is None else attention_mask[:, : end + size]
        output = model(IDS[:, end : end + size], given, past_key_values=past)
        assert output.past_key_values is past
        got.append(output.logits)
        end += size
        assert past.get_seq_length() == end
    torch.testing.assert_close(torch.cat(got, 1), expected, **FP64)
    branch = copy.deepcopy(past)
    model(IDS[:, :1], past_key_values=branch)
    assert past.get_seq_length() == 11 and past.memory.lengths == ([11] * 3 if attention_mask is None else [11, 4, 7])
    past.reset()
    again = model(IDS, attention_mask, past_key_values=past)
    torch.testing.assert_close(again.logits, expected, **FP64)


def test_when_there_is_a_cache(both):
    _, model = both
    assert "past_key_values" not in model(IDS)  # gradients are on
    output = model(IDS, use_cache=True, labels=IDS)
    assert not output.logits.requires_grad and not output.loss.requires_grad
    with torch.no_grad():
        assert isinstance(model(IDS).past_key_values, hf.PastKeyValues)
        assert "past_key_values" not in model(IDS, use_cache=False)
        loss, logits, past = model(IDS, labels=IDS, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (3, 11, VOCAB) and len(past) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input_ids": IDS, "output_attentions": True}, "output_attentions must not be true"),
        ({}, "give input_ids or inputs_embeds, got none"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 11, 32)}, "give input_ids or inputs_embeds, got both"),
        ({"inputs_embeds": torch.zeros(3, 11, 30)}, r"inputs_embeds must be \[B, T, 32\], got \[3, 11, 30\]"),
        ({"input_ids": IDS, "past_key_values": DynamicCache()}, "must be a jetkernels.hf.PastKeyValues.*DynamicCache"),
        ({"input_ids": IDS + VOCAB}, f"input_ids must be in 0..{VOCAB - 1}"),
        ({"input_ids": IDS, "labels": IDS - 7}, f"labels must be in 0..{VOCAB - 1}, or -100"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 1, 11, 11)}, r"attention_mask must be \[3, 11\]"),
    ],
    ids=["attentions", "nothing", "both", "embeddings", "another cache", "ids", "labels", "4-D mask"],
)
def test_wrong_arguments_are_refused(both, arguments, says):
    with pytest.raises(ValueError, match=says):
        both[1](**arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        both[1](**arguments, no_such_argument=1)


@torch.no_grad()
def test_the_memory_of_another_model_is_refused(both):
    past = both[1](IDS).past_key_values
    with pytest.raises(ValueError, match="cache must be of this model: it was made for layer_types"):
        pair("jet", dtype=torch.float64)[1](IDS, past_key_values=past)
    with pytest.raises(ValueError, match="cache: holds 3 sequences, got 2"):
        both[1](IDS[:2], past_key_values=past)


def test_several_accelerators_are_refused():
    _, model = pair("jet")
    model.hf_device_map = {"model.layers.0": 0, "model.norm": "cpu", "lm_head": "disk"}
    model(IDS)
    model.hf_device_map["lm_head"] = 1
    with pytest.raises(ValueError, match='device_map must have one accelerator, got 0, 1: .* device_map="cuda:0"'):
        model(IDS)


def test_activation_checkpointing():
    ours, model = pair(dtype=torch.float64)
    ours(IDS).logits.sum().backward()
    model.activation_checkpointing_enable()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(0))
    model.train()(IDS).logits.sum().backward()
    assert len(calls) == 2
    found = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, **FP64)
    model.eval()(IDS).logits.sum().backward()
    assert len(calls) == 3
    model.activation_checkpointing_disable()
    model.train()(IDS).logits.sum().backward()
    assert len(calls) == 4
    with pytest.raises(ValueError, match="use_reentrant=False and of every layer, got use_reentrant=True"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every layer, got every_n_layers=2"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_the_vocabulary_can_grow(both):
    ours, _ = both
    model = of(ours)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == VOCAB + 3
    torch.testing.assert_close(model(IDS).logits[..., :VOCAB], ours(IDS).logits, **FP64)
    model(torch.full((1, 2), VOCAB + 2), labels=torch.full((1, 2), VOCAB + 2)).loss.backward()


def test_auto_classes_and_dtypes():
    config = hf.JetNemotronConfig(**small_model().config.to_dict())
    for dtype, gates in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert type(model) is hf.JetNemotronForCausalLM and model.dtype == dtype
        assert {p.dtype for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))} == {gates}
    model = model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.layers[0].self_attn.A_log.dtype == torch.float32
    base = AutoModel.from_config(config)
    assert type(base) is hf.JetNemotronModel
    assert set(dict(base.named_parameters())) == {name.removeprefix("model.") for name, _ in model.named_parameters()}


def test_new_models_are_drawn_as_ours_are():
    torch.manual_seed(0)
    model = hf.JetNemotronForCausalLM(hf.JetNemotronConfig(**small_model(hidden_size=64).config.to_dict()))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            assert (parameter >= 0).all() and (parameter <= 16).all() and len(set(parameter.tolist())) == 3
        elif "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.1, rel=0.3), name
        elif name.endswith("_proj.bias"):
            assert (parameter == 0).all()


def test_copies_compute_with_their_own_modules(both):
    _, model = both
    expected = model(IDS).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.model.network.layers is copied.model.layers
        with torch.no_grad():
            copied.model.norm.weight.mul_(2)
        assert not torch.equal(copied(IDS).logits, expected)
    replica = model.model._replicate_for_data_parallel()  # as nn.DataParallel makes one for each device
    replica.norm = copied.model.norm
    assert replica.network.norm is copied.model.norm and model.model.network.norm is model.model.norm
    assert torch.equal(model(IDS).logits, expected)


def test_the_whole_model_is_compiled(both):
    _, model = both
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, **FP64)
