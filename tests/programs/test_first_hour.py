"""What people try first on the layer and the model: it works, or a sentence says which argument must be what."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.model_cases import JET, VOCAB, WINDOW, boundaries, padded, small_block, small_config, small_model, tokens
from torch import nn
from torch.func import functional_call, grad, vmap

from jetkernels.model import JetNemotronCache
from jetkernels.modules import JetBlock, JetBlockConfig, JetBlockState

ADDITIVE = torch.tensor([[-1e9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "call, message",
    [
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
        ({"input_ids": tokens(2, 4).numpy()}, "input_ids must be a tensor, got ndarray"),
        ({"input_ids": tokens(2, 4).float()}, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": tokens(2, 4) > 3}, "input_ids must be int64 or int32, got torch.bool"),
        ({"input_ids": tokens(2, 4).to("meta")}, "input_ids must be on cpu, like the model, got meta"),
        ({"attention_mask": [[1] * 4] * 2}, "attention_mask must be a tensor, got list"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask must be \[2, 4\]"),
        (
            {"attention_mask": ADDITIVE},
            "attention_mask must be 1 at tokens and 0 at padding, got negative values or NaN",
        ),
        ({"attention_mask": torch.full((2, 4), torch.nan)}, "attention_mask must be 1 at tokens"),
        (
            {"attention_mask": torch.ones(2, 4, device="meta")},
            "attention_mask must be on cpu, like the tokens, got meta",
        ),
        ({"labels": tokens(2, 4).tolist()}, "labels must be a tensor, got list"),
        ({"labels": tokens(2, 4).float()}, "labels must be int64 or int32, got torch.float32"),
        ({"labels": tokens(2, 4) + VOCAB}, r"labels must be in 0..60, or -100 for none, got"),
        ({"labels": tokens(2, 4).to("meta")}, "labels must be on cpu, like input_ids, got meta"),
        ({"cache": True}, "cache must be a JetNemotronCache .*, got bool"),
        ({"cache": JetNemotronCache(small_config(("jet",)), 2, 8)}, "cache must be of this model"),
        (
            {"input_ids": tokens(1, 4), "cu_seqlens": [0, 4]},
            r"cu_seqlens must be a tensor \[N\+1\] of int64 or int32, got list",
        ),
        (
            {"input_ids": tokens(1, 4), "cu_seqlens": torch.tensor([0.0, 4.0])},
            "cu_seqlens must be .* got torch.float32",
        ),
        (
            {"input_ids": tokens(1, 4), "cu_seqlens": torch.tensor([[0, 4]])},
            r"cu_seqlens must be .* got torch.int64 \[1, 2\]",
        ),
    ],
)
def test_a_call_of_the_model_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**{"input_ids": tokens(2, 4), **call})


@pytest.mark.parametrize(
    "x, options, message",
    [
        (None, {}, "hidden_states must be a tensor, got NoneType"),
        (torch.randn(4, 20), {}, r"hidden_states must be floating \[B, T, 20\], got torch.float32 \[4, 20\]"),
        (torch.randn(2, 4, 21), {}, r"hidden_states must be floating \[B, T, 20\], got torch.float32 \[2, 4, 21\]"),
        (torch.ones(2, 4, 20, dtype=torch.int64), {}, r"hidden_states must be floating .* got torch.int64"),
        (torch.randn(2, 4, 20), {"state": torch.zeros(2)}, "state must be a JetBlockState .* got Tensor"),
        (
            torch.randn(2, 4, 20),
            {"state": (torch.zeros(2), torch.zeros(2))},
            "state must be a JetBlockState .* got tuple",
        ),
        (torch.randn(1, 4, 20), {"cu_seqlens": [0, 4]}, "cu_seqlens must be a tensor, got list"),
        (torch.randn(2, 4, 20), {"attention_mask": ADDITIVE}, "attention_mask must be 1 at tokens"),
    ],
)
def test_a_call_of_the_layer_is_refused_by_name(x, options, message):
    with pytest.raises(ValueError, match=message):
        small_block()(x, **options)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("N", [1, 3])
def test_a_state_of_another_batch_is_refused_and_left_alone(T, N):
    block = small_block()
    state = block.new_state(N)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=f"must be .*= 2.*, got {N}"):
        block(torch.randn(2, T, 20), state=state)
    assert not any(t.any() for t in state)


@pytest.mark.parametrize("arguments", [(0,), (-3,), (1.5,), ("a",), (True,)])
def test_sizes_of_a_layer(arguments):
    with pytest.raises(ValueError, match="JetBlock: hidden_size must be a positive integer"):
        JetBlock(*arguments)
    with pytest.raises(ValueError, match="jet_block_config must be a JetBlockConfig, got dict"):
        JetBlock(20, {"num_heads": 2})


@pytest.mark.parametrize("arguments", [("2", 3), (2, 3.5), (True, 3), (2, -3), (0, 3)])
def test_sizes_of_a_cache(arguments):
    with pytest.raises(ValueError, match="cache: .* must be"):
        small_model().new_cache(*arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_types": ["jet", "swa", "jet", "swa"]}, "made for layer_types = .*'swa'], the model has .*'attn']"),
        ({"num_key_value_heads": 4}, "made for num_key_value_heads = 4, the model has 2"),
        ({"head_dim": 16}, "made for head_dim = 16, the model has 8"),
        (
            {"efficient_attention_config": {"jet": JET, "swa": {"window_size": 6}}},
            "made for window_size = 6, the model has 5",
        ),
        (
            {"efficient_attention_config": {"jet": JET | {"expand_v": 2.0}, "swa": {"window_size": WINDOW}}},
            "made for jet.head_v_dim = 16, the model has 12",
        ),
    ],
)
def test_a_cache_of_another_model_is_refused(changes, message):
    cache = JetNemotronCache(small_config(**changes), 2, 8)
    with pytest.raises(ValueError, match=f"cache must be of this model: it was {message}"):
        small_model()(tokens(2, 4), cache=cache)
    assert not any(t.any() for t in cache.tensors())


def test_a_cache_of_a_model_of_the_same_sizes_is_taken():
    model, ids = small_model("swa"), tokens(2, 4)
    cache = small_model("swa", seed=1, vocab_size=VOCAB + 1).new_cache(2, 8)
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.ones(2, 2, 6, 8), r"must be .*9.*"),
        (torch.ones(2, 2, 5, 9), r"must be .*6.*"),
        (torch.ones(3, 2, 6, 9), r"must be .*2.*3"),
        (torch.ones(2, 2, 6, 9, dtype=torch.float64), "must be .*float32.*"),
        (torch.ones(2, 2, 6, 9, dtype=torch.int64), "must be .*float32.*"),
        (torch.ones(2, 2, 6, 9, device="meta"), "must be on .*cpu"),
    ],
)
@pytest.mark.parametrize("T", [1, 3])
def test_a_refused_recurrent_state_leaves_the_convolution_alone(wrong, message, T):
    block = small_block()
    conv_state = torch.randn_like(block.new_state(2).conv_state)
    before = conv_state.clone()
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=message):
        block(torch.randn(2, T, 20), state=JetBlockState(conv_state, wrong))
    assert torch.equal(conv_state, before)


def test_a_cache_is_sized_without_imports_that_take_seconds():
    code = """if True:
        import sys, torch
        from jetkernels.cli import memory
        from jetkernels.model import JetNemotronConfig
        config = JetNemotronConfig.from_name("2b")
        memory.parameter_count(config), memory.cache_bytes(config, torch.bfloat16, 2, 100)
        sys.exit("sympy is imported" if "sympy" in sys.modules else 0)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_sizes_of_a_state():
    for wrong in (-1, "a", 1.5):
        with pytest.raises(ValueError, match="batch_size must be an integer from 0"):
            small_block().new_state(wrong)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype):
    model, rows = small_model(), [tokens(6), tokens(3, seed=2)]
    ids, mask = padded(rows, left=True)
    with torch.no_grad():
        got = model(ids, mask.to(dtype)).logits
        for n, row in enumerate(rows):
            torch.testing.assert_close(got[n, 6 - len(row) :], model(row[None]).logits[0], atol=1e-5, rtol=0)


def test_memory_layouts_do_not_matter():
    model, block = small_model(), small_block()
    ids, x = tokens(3, 8), torch.randn(3, 8, 40)
    torch.testing.assert_close(model(ids.mT.contiguous().mT).logits, model(ids).logits)
    for view in (x[..., ::2], x.transpose(0, 1)[..., :20], x[:1, :, :20].expand(3, -1, -1)):
        torch.testing.assert_close(block(view), block(view.contiguous()))


@pytest.mark.parametrize("shape", [(2, 0), (0, 4), (0, 0)])
def test_the_loss_of_nothing_is_zero(shape):
    model, ids = small_model(), tokens(*shape)
    out = model(ids, labels=ids)
    assert out.loss == 0 and out.logits.shape == (*shape, VOCAB)
    out.loss.backward()


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_without_tokens_or_sequences(T, grad):
    block = small_block()
    with torch.set_grad_enabled(grad):
        for B in (0, 2):
            state = block.new_state(B)
            assert block(torch.randn(B, T, 20), state=state).shape == (B, T, 20)
            assert T or not any(t.any() for t in state)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_on_alike_and_apart(copied):
    model, ids = small_model(), tokens(2, 6)
    with torch.no_grad():
        cache = model.new_cache(2, 8)
        model(ids[:, :5], cache=cache)
        other, twin = copied(cache), copied(model)
        need = model(ids[:, 5:], cache=cache).logits
        assert other.lengths == [5, 5]
        assert torch.equal(twin(ids[:, 5:], cache=other).logits, need)
    state = copied(small_block().new_state(2))
    assert type(state) is JetBlockState


def test_a_frozen_layer_passes_gradients_on():
    block = small_block().requires_grad_(False)
    x = torch.randn(2, 4, 20, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.any() and all(p.grad is None for p in block.parameters())


def test_a_layer_under_functional_call_and_vmap():
    block, x = small_block(), torch.randn(3, 4, 20)
    need = block(x)
    torch.testing.assert_close(torch.func.functional_call(block, dict(block.named_parameters()), (x,)), need)
    torch.testing.assert_close(torch.vmap(lambda row: block(row[None])[0])(x), need)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_each_sample(tied):
    """Of the whole model: vmap over grad equals a loop."""
    model, ids = small_model(tie_word_embeddings=tied, dtype=torch.float64), tokens(3, 9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss

    got = vmap(grad(loss), (None, 0))(parameters, ids)
    losses = vmap(loss, (None, 0))(parameters, ids)
    for n, row in enumerate(ids):
        model.zero_grad()
        need = model(row[None], labels=row[None]).loss
        need.backward()
        torch.testing.assert_close(losses[n], need.detach())
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][n], p.grad, msg=name)


def test_a_compiled_model_is_one_graph():
    """The second length makes it a symbol."""
    model = small_model("jet", "swa", "attn")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for T in (9, 12):
        ids = tokens(2, T)
        got, need = compiled(ids, labels=ids), model(ids, labels=ids)
        torch.testing.assert_close(got.logits, need.logits)
        torch.testing.assert_close(got.loss, need.loss)


def test_a_head_beside_tied_weights_is_refused_until_it_is_used():
    model, ids = small_model(), tokens(2, 4)
    cache = model.new_cache(2, 4)
    model.lm_head = nn.Linear(32, VOCAB, bias=False)
    with pytest.raises(RuntimeError, match="lm_head would not be used: set config.tie_word_embeddings = False"):
        model(ids, cache=cache)
    model.config.tie_word_embeddings = False
    h = []
    model.model.norm.register_forward_hook(lambda m, args, y: h.append(y))
    got = model(ids, cache=cache).logits
    torch.testing.assert_close(got, h[0] @ model.lm_head.weight.mT)
    del model.lm_head
    model.config.tie_word_embeddings = True
    torch.testing.assert_close(model(ids).logits, h[1] @ model.model.embed_tokens.weight.mT)


def test_an_exported_layer():
    block, x = small_block(), torch.randn(1, 4, 20)
    exported = torch.export.export(block, (x,))
    torch.testing.assert_close(exported.module()(x), block(x))
    assert "jet.dynamic_conv.default" in str(exported.graph), "the fused op, not the one for adapters"


def test_a_misfit_of_parameters_is_named():
    block = small_block()
    with pytest.raises(RuntimeError, match="Missing key.*A_log"):
        block.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for A_log"):
        block.load_state_dict(
            JetBlock(20, JetBlockConfig(num_heads=4, head_dim=6, expand_v=1.5)).state_dict(), strict=False
        )
    with pytest.raises(RuntimeError, match="A_log"):
        block.load_state_dict(block.state_dict() | {"A_log": "zeros"})


def test_packed_rows_of_int32():
    block, x = small_block(), torch.randn(1, 7, 20)
    torch.testing.assert_close(
        block(x, cu_seqlens=boundaries([3, 4], torch.int32)), block(x, cu_seqlens=boundaries([3, 4]))
    )
