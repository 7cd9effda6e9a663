"""The hybrid model: one answer however its input is padded, packed, split or batched; caches; training."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import ATOL, VOCAB, WINDOW, boundaries, padded, pieces, small_config, small_model, tokens

from jetkernels.model import JetNemotronCache, JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model import attention as attention_module
from jetkernels.model.layout import TokenLayout
from reference.hybrid import hybrid

MIB = 2**20
KINDS = [("jet",), ("attn",), ("swa",), ("jet", "swa", "jet", "attn")]


def close(got, need, atol=ATOL):
    torch.testing.assert_close(got, need, atol=atol, rtol=0)


def run_split(model, ids, sizes, mask=None, max_length=None):
    cache = model.new_cache(len(ids), max_length or ids.shape[1])
    spans = pieces(ids.shape[1], sizes)
    with torch.no_grad():
        return torch.cat(
            [model(ids[:, s], None if mask is None else mask[:, s], cache).logits for s in spans], 1
        ), cache


# ---- what the published models are


@pytest.mark.parametrize("name, parameters, mib", [("2b", 1_964_806_208, 157.8), ("4b", 3_960_424_768, 258.8)])
def test_published_sizes(name, parameters, mib):
    config = JetNemotronConfig.from_name(name)
    model = JetNemotronForCausalLM(config, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    cache = JetNemotronCache(config, 1, 65536, device="meta", dtype=torch.bfloat16)
    # The published figure counts W inputs of convolution state per channel; the op's state holds W - 1.
    jet = config.layer_types.count("jet")
    assert round((cache.nbytes + jet * config.jet.value_dim * 2) / MIB, 1) == mib
    assert cache.nbytes / MIB < mib
    assert model.model.layers[0].self_attn.A_log.dtype == torch.float32


def test_state_dict_keys():
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    attention = {f"self_attn.{n}_proj.{p}" for n in "qkv" for p in ("weight", "bias")} | {"self_attn.o_proj.weight"}
    generator = "self_attn.dynamic_conv1d.kernel_generator"
    jet = {f"self_attn.{n}_proj.weight" for n in "qkvgoab"}
    jet |= {"self_attn.A_log", "self_attn.dt_bias", "self_attn.o_norm.weight"}
    jet |= {f"{generator}.w1.weight", f"{generator}.w2.weight", f"{generator}.w2.bias"}
    need = {"model.embed_tokens.weight", "model.norm.weight"}
    for i, kind in enumerate(("jet", "swa", "jet", "attn")):
        need |= {f"model.layers.{i}.{name}" for name in layer | (jet if kind == "jet" else attention)}
    assert set(small_model().state_dict()) == need
    assert set(small_model(tie_word_embeddings=False).state_dict()) == need | {"lm_head.weight"}


@pytest.mark.parametrize("kinds", KINDS)
def test_model_is_its_definition(kinds):
    model, ids = small_model(*kinds, dtype=torch.float64), tokens(2, 13)
    with torch.no_grad():
        logits = model(ids).logits
        # The reference has rotary tables in fp64, the model in fp32.
        close(logits, hybrid(ids, model.state_dict(), model.config.to_dict()), 1e-6)


@pytest.mark.parametrize("kind", ["attn", "swa"])
def test_attention_layers_equal_transformers_qwen2(kind):
    transformers = pytest.importorskip("transformers")
    model, ids = small_model(kind, kind), tokens(2, 17)
    config = model.config
    peer_config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=True,
        use_sliding_window=kind == "swa",
        sliding_window=WINDOW,
        max_window_layers=0,
        attn_implementation="eager",
    )
    peer = transformers.Qwen2ForCausalLM(peer_config).eval()
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    peer.tie_weights()
    with torch.no_grad():
        close(model(ids).logits, peer(ids, use_cache=False).logits)


# ---- one answer, however the input is arranged


@pytest.mark.parametrize("kinds", KINDS)
def test_mask_none_is_ones_mask_is_each_row_alone(kinds):
    model, ids = small_model(*kinds), tokens(3, 12)
    with torch.no_grad():
        need = model(ids).logits
        for mask in (torch.ones(3, 12), torch.ones(3, 12, dtype=torch.bool), torch.ones(3, 20, dtype=torch.int64)):
            assert torch.equal(model(ids, mask).logits, need)
        for n in range(3):
            close(model(ids[n : n + 1]).logits[0], need[n])


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), left=st.booleans(), kinds=st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_padded_rows_equal_rows_alone(lengths, left, kinds):
    """Also the last token: it is not taken for padding, and padding is not taken for it."""
    model = small_model(*kinds)
    rows = [tokens(t, seed=n) for n, t in enumerate(lengths)]
    ids, mask = padded(rows, left)
    with torch.no_grad():
        out = model(ids, mask)
        last = model(ids, mask, last_logits_only=True).logits
        for n, row in enumerate(rows):
            need = model(row[None]).logits[0]
            close(out.logits[n, mask[n].bool()], need)
            close(last[n], need[-1:] if len(row) else torch.zeros(1, VOCAB))
            assert not out.logits[n, ~mask[n].bool()].any()


def test_padding_value_does_not_matter():
    model = small_model()
    rows = [tokens(9, seed=1), tokens(4, seed=2)]
    with torch.no_grad():
        a, b = (model(*padded(rows, left=True, fill=fill)).logits for fill in (0, VOCAB - 1))
    assert torch.equal(a, b)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), kinds=st.sampled_from(KINDS))
@settings(max_examples=20, deadline=None)
def test_packed_equals_separate(lengths, kinds):
    """Logits and the gradient of every parameter."""
    ids, cu_seqlens = tokens(1, sum(lengths)), boundaries(lengths, torch.int32)
    for dtype, atol in ((torch.float32, ATOL), (torch.float64, 1e-9)):
        model = small_model(*kinds, dtype=dtype)
        packed = model(ids, cu_seqlens=cu_seqlens).logits
        separate = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        close(packed, separate, atol)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    got, need = (torch.autograd.grad((y * weight).sum(), parameters) for y in (packed, separate))
    for g, n in zip(got, need):
        torch.testing.assert_close(g, n, atol=1e-8, rtol=1e-6)


@given(sizes=st.lists(st.integers(1, 14), min_size=1, max_size=6), kinds=st.sampled_from(KINDS), grad=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_chunked_prefill_equals_one_call(sizes, kinds, grad):
    model, ids = small_model(*kinds), tokens(2, 29)
    with torch.set_grad_enabled(grad):
        need = model(ids).logits.detach()
        got, _ = run_split(model, ids, sizes)
    close(got, need)


@given(
    lengths=st.lists(st.integers(0, 14), min_size=2, max_size=4).filter(any),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    left=st.booleans(),
    kinds=st.sampled_from(KINDS),
)
@settings(max_examples=30, deadline=None)
def test_ragged_chunked_prefill_then_decode(lengths, sizes, left, kinds):
    """Rows of unequal length are prefilled in pieces, padding on either side, and then decode together."""
    model, extra = small_model(*kinds), 8
    rows = [tokens(t + extra, seed=n) for n, t in enumerate(lengths)]
    ids, mask = padded([row[:-extra] for row in rows], left)
    got, cache = run_split(model, ids, sizes, mask, max_length=max(lengths) + extra)
    assert cache.lengths == lengths == cache.lengths_device.tolist()
    tail = torch.stack([row[-extra:] for row in rows])
    with torch.no_grad():
        steps = [model(tail[:, s], cache=cache).logits for s in pieces(extra, [1, 1, 3, 1])]
        for n, row in enumerate(rows):
            need = model(row[None]).logits[0]
            close(torch.cat([got[n, mask[n].bool()], *(step[n] for step in steps)]), need)


def test_packed_prefill_into_a_cache():
    model, lengths = small_model(), [3, 0, 9]
    ids = tokens(1, 12)
    cache = model.new_cache(3, 16)
    with torch.no_grad():
        model(ids, cache=cache, cu_seqlens=boundaries(lengths))
        next_ids = tokens(3, 1, seed=5)
        got = model(next_ids, cache=cache).logits
        for n, part in enumerate(ids.split(lengths, 1)):
            close(got[n], model(torch.cat((part, next_ids[n : n + 1]), 1)).logits[0, -1:])


def test_last_logits_only():
    model, ids = small_model(), tokens(2, 7)
    with torch.no_grad():
        close(model(ids, last_logits_only=True).logits, model(ids).logits[:, -1:])


def test_nan_stays_in_its_row():
    model, ids = small_model(), tokens(3, 8)
    ids[ids == 7] = 8
    need = model(ids).logits
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    ids[1, 2] = 7
    got = model(ids).logits[:, :, :7]
    close(got[[0, 2]], need[[0, 2], :, :7])
    assert got[1, 2:].isnan().all()


@pytest.mark.parametrize("block", [256, 4])
@pytest.mark.parametrize("sizes", [[23], [8], [9, 1, 4], [1]])
@pytest.mark.parametrize("kinds", KINDS)
def test_nan_reaches_no_earlier_token(kinds, sizes, block, monkeypatch):
    """Packed, padded, in one call or in several."""
    monkeypatch.setattr(attention_module, "BLOCK", block)
    model = small_model(*kinds, tie_word_embeddings=False)
    rows = [tokens(23, seed=1), tokens(12, seed=2), tokens(17, seed=3)]
    at = [11, 3, 16]
    with torch.no_grad():
        for row, i in zip(rows, at):
            row[row == 7] = 8
            row[i] = 7
        need = [model(row[None]).logits[0] for row in rows]
        model.model.embed_tokens.weight[7] = math.nan
        ids, mask = padded(rows, left=True)
        outputs = [run_split(model, ids, sizes, mask)[0][n][mask[n].bool()] for n in range(3)]
        outputs += model(torch.cat(rows)[None], cu_seqlens=boundaries([23, 12, 17])).logits[0].split([23, 12, 17])
        outputs += [model(row[None]).logits[0] for row in rows]
        outputs += [run_split(model, row[None], sizes)[0][0] for row in rows]
    for n, got in enumerate(outputs):
        i = at[n % 3]
        close(got[:i], need[n % 3][:i])
        assert got[i : i + WINDOW].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sizes", [[23], [8], [9, 1, 4]])
def test_nan_leaves_with_the_window(bad, sizes):
    """One layer: the token is seen by WINDOW queries, itself included, and by no other."""
    model, ids = small_model("swa", tie_word_embeddings=False), tokens(2, 23)
    ids[ids == 7] = 8
    ids[0, 6] = 7
    with torch.no_grad():
        need = model(ids).logits
        model.model.embed_tokens.weight[7] = bad
        for got in (model(ids).logits, run_split(model, ids, sizes)[0]):
            assert got[0].isnan().all(-1).tolist() == [6 <= t < 6 + WINDOW for t in range(23)]
            close(got[0, :6], need[0, :6])
            close(got[0, 6 + WINDOW :], need[0, 6 + WINDOW :])
            close(got[1], need[1])


def test_low_precision_model():
    ids = tokens(2, 20)
    need = small_model()(ids).logits
    model = small_model(dtype=torch.bfloat16)
    got = model(ids).logits
    split, cache = run_split(model, ids, [7, 1, 1])
    assert got.dtype == torch.bfloat16 and cache.layers[0].recurrent_state.dtype == torch.float32
    assert (got - need).norm() < 0.05 * need.norm() and (split - need).norm() < 0.05 * need.norm()


def test_autocast():
    model, ids = small_model(), tokens(2, 20)
    need = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
        split, _ = run_split(model, ids, [7, 1, 1])
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    for got in (out.logits, split):
        assert (got - need).norm() < 0.05 * need.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_nothing_in_nothing_out(shape):
    assert small_model()(tokens(*shape)).logits.shape == (*shape, VOCAB)


# ---- sliding window


@pytest.mark.parametrize("T", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_window_counts_the_token_itself(T):
    """The last token depends on the window - 1 tokens before it and on no other."""
    model, ids = small_model("swa"), tokens(1, T)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    layer = model.model.layers[0].self_attn
    rotary = attention_module.rotary_table(torch.arange(T)[None], model.config.head_dim, 1e6)
    y = layer(embedded, layout=TokenLayout.dense(1, T, [0], None, "cpu"), rotary=rotary)
    seen = torch.autograd.grad(y[0, -1].sum(), embedded)[0][0].abs().sum(-1) > 0
    assert seen.tolist() == [j > T - 1 - WINDOW for j in range(T)]


@pytest.mark.parametrize("sizes", [[1], [2], [3], [WINDOW - 1], [WINDOW], [WINDOW + 1], [2 * WINDOW + 3], [4, 1, 1, 7]])
def test_window_with_chunked_prefill(sizes):
    model, ids = small_model("swa", "jet", "swa"), tokens(2, 4 * WINDOW + 3)
    with torch.no_grad():
        close(run_split(model, ids, sizes)[0], model(ids).logits)


def test_window_ring_is_bounded():
    model = small_model("swa")
    assert model.new_cache(2, 1000).layers[0].slots == WINDOW
    assert model.new_cache(2, 3).layers[0].slots == 3


@pytest.mark.parametrize("kinds", [("attn",), ("swa",)])
def test_long_prompts_are_attended_in_blocks(kinds, monkeypatch):
    model, ids = small_model(*kinds), tokens(2, 41)
    with torch.no_grad():
        need = model(ids).logits
        monkeypatch.setattr(attention_module, "BLOCK", 4)
        close(model(ids).logits, need)
        close(run_split(model, ids, [11, 17])[0], need)
        rows = [tokens(t, seed=t) for t in (20, 13)]
        batch, mask = padded(rows, left=True)
        got, _ = run_split(model, batch, [9], mask)
        for n, row in enumerate(rows):
            close(got[n, mask[n].bool()], model(row[None]).logits[0])


# ---- cache


def test_decode_never_reallocates_the_cache():
    model, ids = small_model(), tokens(2, 12)
    cache = model.new_cache(2, 12)
    addresses, size = [t.data_ptr() for t in cache.tensors()], cache.nbytes
    with torch.no_grad():
        for span in pieces(12, [5, 1, 1, 1, 1, 3]):
            model(ids[:, span], cache=cache)
            assert [t.data_ptr() for t in cache.tensors()] == addresses
    assert cache.nbytes == size and cache.lengths == [12, 12]


def test_full_cache_refuses_and_stays():
    model, ids = small_model(), tokens(2, 8)
    _, cache = run_split(model, ids, [8], max_length=9)
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(ValueError, match=r"max_length = 9 must hold the 8 \+ 2 tokens of sequence 0"):
        model(ids[:, :2], cache=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, got 1"):
        model(ids[:1, :1], cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors())) and cache.lengths == [8, 8]


def test_reset_cache_is_a_new_cache():
    model, ids = small_model(), tokens(2, 9)
    need, cache = run_split(model, ids, [4])
    cache.reset()
    with torch.no_grad():
        assert torch.equal(torch.cat([model(ids[:, s], cache=cache).logits for s in pieces(9, [4])], 1), need)


# ---- training


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 31, 63, 64, 65])
def test_training_at_any_length(T):
    model = small_model()
    loss = model(tokens(2, T), labels=tokens(2, T)).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Up to two tokens the loss sees the first one only, and that one has nothing to remember.
        assert T <= 2 or parameter.grad.any(), name


def test_every_parameter_learns_within_two_steps():
    config = small_config()
    torch.manual_seed(0)
    model = JetNemotronForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = tokens(4, 24)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.7) and losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_loss_counts_each_successor_once():
    model = small_model()
    rows = [tokens(t, seed=t) for t in (9, 1, 4)]
    losses, count = 0.0, 0
    for row in rows:
        logits = model(row[None]).logits[0, :-1]
        losses = losses + F.cross_entropy(logits, row[1:], reduction="sum")
        count += len(row) - 1
    need = losses / count
    for left in (False, True):
        ids, mask = padded(rows, left)
        out = model(ids, mask, labels=ids)
        close(out.loss, need)
        close(out.logits, model(ids, mask).logits)
    packed = torch.cat(rows)[None]
    for cu in ([9, 1, 4], [0, 9, 1, 0, 4, 0]):
        close(model(packed, cu_seqlens=boundaries(cu), labels=packed).loss, need)
    ignored = packed.clone()
    ignored[0, 9:] = -100
    first = F.cross_entropy(model(rows[0][None]).logits[0, :-1], rows[0][1:])
    close(model(packed, cu_seqlens=boundaries([9, 1, 4]), labels=ignored).loss, first)


# ---- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"input_ids must be \[B, T\], got \[4\]"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be \[2, 4\].*got \[2, 3\]"),
        ({"attention_mask": torch.ones(2, 4), "cu_seqlens": boundaries([4])}, "exclude each other"),
        ({"cu_seqlens": boundaries([4])}, r"B = 1, got \[0, 4\] with B = 2"),
        ({"input_ids": tokens(1, 4), "cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"must rise from 0 to T = 4"),
        ({"input_ids": torch.zeros(2, 4)}, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": torch.full((2, 4), VOCAB)}, "input_ids must be in 0..60, got 61"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids must be in 0..60, got -1"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, r"labels must be \[2, 4\], got \[2, 3\]"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**{"input_ids": tokens(2, 4), **call})
