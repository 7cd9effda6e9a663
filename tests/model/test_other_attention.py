"""Attention as Llama 3 has it (no biases, scaled rotary frequencies) and as Qwen3 has it (normed queries and keys)."""

import pytest
import torch
import transformers
from support.model_cases import ATOL, OTHER_ATTENTION, VOCAB, WINDOW, small_model, tokens

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention import rotary_table
from jetkernels.model.rotary import RotaryScaling
from reference.hybrid import hybrid

HYBRID = ("attn", "jet", "swa", "attn")
PEERS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
each = pytest.mark.parametrize("kind", OTHER_ATTENTION)


def model_of(kind: str, *layer_types: str, **changes) -> JetNemotronForCausalLM:
    return small_model(*layer_types, **OTHER_ATTENTION[kind] | changes).eval()


def close(got, need, atol=ATOL):
    torch.testing.assert_close(got, need, atol=atol, rtol=0)


def test_the_parameters():
    def names(kind):
        return {n.split(".", 4)[-1] for n in model_of(kind, "attn").state_dict() if "self_attn" in n}

    projections = {f"{name}_proj.weight" for name in "qkvo"}
    assert names("llama") == projections and names("qwen3") == projections | {"q_norm.weight", "k_norm.weight"}
    assert model_of("qwen3", "attn").model.layers[0].self_attn.q_norm.weight.shape == (16,)


@each
def test_logits_and_gradients_are_those_of_the_definition(kind):
    model, ids = model_of(kind, *HYBRID, dtype=torch.float64), tokens(2, 13)
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
    got, need = model(ids).logits, hybrid(ids, weights, model.config.to_dict())
    close(got, need, 1e-6)  # the model's rotary tables are in fp32
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    need.backward(cotangent)
    for name, parameter in model.named_parameters():
        close(parameter.grad, weights[name].grad, 1e-4)


@each
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_logits_are_those_of_transformers(kind, tied):
    model, ids = model_of(kind, "attn", "attn", tie_word_embeddings=tied), tokens(2, 40)
    config, peer = model.config, PEERS[kind]
    peer_config = peer[0](
        vocab_size=VOCAB,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_theta": config.rope_theta} | (config.rope_scaling or {"rope_type": "default"}),
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = peer[1](peer_config).eval()
    theirs.load_state_dict({"lm_head.weight": model.head_weight} | model.state_dict())
    with torch.no_grad():
        close(model(ids).logits, theirs(ids, use_cache=False).logits)


def test_scaled_frequencies_are_those_of_transformers():
    """Of Llama 3.2 1B: fast, slow and between."""
    scaling = RotaryScaling(32.0, 1.0, 4.0, 8192)
    config = transformers.LlamaConfig(
        head_dim=64, rope_parameters={"rope_theta": 5e5, **scaling.to_dict()}, max_position_embeddings=131072
    )
    need = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(scaling.scale(plain), need, rtol=1e-6, atol=0)
    shares = need / plain
    assert (shares == 1).any() and (shares < 1 / 31.99).any() and ((shares > 0.04) & (shares < 0.96)).any()
    positions = torch.tensor([3, 5000])
    cos, _ = rotary_table(positions, 64, 5e5, scaling)
    close(cos[:, 0, :32], (positions[:, None] * need).cos(), 1e-3)


@each
def test_steps_prefill_and_drafts_agree(kind):
    model, ids = model_of(kind, *HYBRID), tokens(2, 3 * WINDOW)
    assert model.has_device_steps
    with torch.no_grad():
        need = model(ids).logits
        cache = model.new_cache(2, ids.shape[1])
        close(model(ids[:, :4], cache=cache).logits, need[:, :4])
        for t in range(4, 9):
            close(model.step(ids[:, t], cache), need[:, t])
        close(model.verify(ids[:, 9:12], cache), need[:, 9:12])
        cache.commit(torch.tensor([3, 3]))
        close(model(ids[:, 12:], cache=cache).logits, need[:, 12:])


@each
def test_sequences_of_unequal_lengths_step_as_if_alone(kind):
    model, rows = model_of(kind, *HYBRID), [tokens(5, seed=1), tokens(11, seed=2)]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    new = tokens(2)
    with torch.no_grad():
        cache = model.new_cache(2, width + 1)
        model(ids, mask, cache)
        got = model.step(new, cache)
        for n, row in enumerate(rows):
            close(got[n], model(torch.cat([row, new[n : n + 1]])[None]).logits[0, -1])


@each
def test_greedy_text_is_that_of_whole_forwards(kind):
    model, ids = model_of(kind, *HYBRID, eos_token_id=None), tokens(1, 6)
    with torch.no_grad():
        got, text = model.generate(ids, max_new_tokens=12), ids
        for _ in range(12):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert got[0].tolist() in (text[0].tolist(), text[0, 6:].tolist())


@each
def test_saved_models_come_back(kind, tmp_path):
    model = model_of(kind, *HYBRID)
    model.save_pretrained(tmp_path)
    again = JetNemotronForCausalLM.from_pretrained(tmp_path)
    assert again.config == JetNemotronConfig.from_file(tmp_path) == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


@each
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_step(kind, bits, tmp_path):
    model, ids = model_of(kind, *HYBRID), tokens(1, 8)
    model.save_pretrained(tmp_path)
    loaded = JetNemotronForCausalLM.from_pretrained(tmp_path, quantize=bits)
    model.quantize_(bits)
    with torch.no_grad():
        need = model(ids).logits
        assert torch.equal(loaded(ids).logits, need)
        cache = model.new_cache(1, 8)
        model(ids[:, :7], cache=cache)
        close(model.step(ids[:, 7], cache), need[:, 7], 1e-4)


@each
def test_drawn_again_the_norms_are_neutral(kind):
    model = model_of(kind, "attn")
    model.reset_parameters()
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    assert torch.equal(
        JetNemotronForCausalLM.random(model.config, seed=1).head_weight,
        JetNemotronForCausalLM.random(model.config, seed=1).head_weight,
    )


@each
def test_compiled_whole(kind):
    model, ids = model_of(kind, *HYBRID), tokens(1, 9)
    with torch.no_grad():
        close(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, model(ids).logits)
