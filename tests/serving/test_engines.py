"""The plugins of vLLM and SGLang on stand-ins for these: every token is that of the model alone."""

import random
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from serving.stand_ins import (
    CONTEXT,
    GDNAttentionMetadata,
    get_temporal_copy_spec,
    install_sglang,
    install_vllm,
    vllm_config,
)
from support.model_cases import small_block, small_model, stir_, tokens

from jetkernels.modules import JetBlock
from jetkernels.serving import plugins
from jetkernels.serving.shares import JetBlockOfRank

BLOCKS = 7  # of an engine's memory; the first belongs to nobody


def steps(lengths, seed, most=20):
    """[(sequence, tokens, whether it decodes)] of each step of an engine, those that decode first."""
    draw, read = random.Random(seed), [0] * len(lengths)
    while left := [i for i, n in enumerate(lengths) if read[i] < n]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = {i: min(draw.choice([1, 1, draw.randint(2, most)]), lengths[i] - read[i]) for i in chosen}
        decodes = [i for i in chosen if counts[i] == 1 and read[i]]
        yield [(i, counts[i], i in decodes) for i in [*decodes, *(i for i in chosen if i not in decodes)]], list(read)
        for i in chosen:
            read[i] += counts[i]


@pytest.fixture
def vllm(monkeypatch):
    pytest.importorskip("transformers", reason="needs the package transformers")
    registry = install_vllm(monkeypatch)
    plugins.vllm()
    plugins.vllm()
    where, _, name = registry.models["JetNemotronForCausalLM"].partition(":")
    yield getattr(import_module(where), name)
    sys.modules.pop("jetkernels.serving.for_vllm", None)


def hf_config(config):
    from jetkernels.hf import JetNemotronConfig

    return JetNemotronConfig.from_dict(config.to_dict())


def pages_of(layer):
    """The memory of a layer's blocks, as an engine hands it over, full of NaN."""
    nbytes = sum(torch.Size(s).numel() * d.itemsize for s, d in zip(layer.get_state_shape(), layer.get_state_dtype()))
    room = -(-nbytes // 64) * 64 + 64  # a page is wider than the states in it
    layer.bind_kv_cache(torch.full((BLOCKS, 1, 1, room), -1, dtype=torch.int8))
    assert all(state.isnan().all() for state in layer.kv_cache if state.is_floating_point())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [0, 3])
def test_vllm_gives_the_tokens_of_the_model(vllm, tied, padded):
    changes = {"tie_word_embeddings": tied, "use_qk_norm": tied, "attention_bias": not tied}
    own = small_model("jet", "swa", "jet", "attn", **changes).eval()
    config = vllm_config(hf_config(own.config))
    engine = vllm(vllm_config=config)
    filled = engine.load_weights(own.state_dict().items())
    assert filled == {name for name, _ in engine.named_parameters()}
    assert not any(p.isnan().any() for p in engine.parameters())
    jets = CONTEXT.no_compile_layers
    assert list(jets) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    shapes, dtypes = engine.get_mamba_state_shape_from_config(config), engine.get_mamba_state_dtype_from_config(config)
    for layer in jets.values():
        assert (layer.get_state_shape(), layer.get_state_dtype(), layer.mamba_type.name) == (shapes, dtypes, "GDN_ATTN")
        pages_of(layer)
    # Memory is measured without metadata: nothing is written.
    CONTEXT.attn_metadata, CONTEXT.sequences = None, [("profile", 8)]
    assert engine(torch.zeros(8, dtype=torch.int64), torch.arange(8)).shape == (8, own.config.hidden_size)
    assert all(state.isnan().all() for layer in jets.values() for state in layer.kv_cache)

    ids = [tokens(n, seed=n) for n in (33, 1, 50, 21)]
    expected = [own(row[None]).logits[0] for row in ids]
    rows, got = [3, 1, 6, 2], [[] for _ in ids]
    for batch, read in steps([len(row) for row in ids], seed=padded):
        prefills = sum(not decodes for *_, decodes in batch)
        decodes = len(batch) - prefills
        extra = 0 if prefills else padded  # of a captured graph
        CONTEXT.sequences = [(i, n) for i, n, _ in batch] + [(f"padding {k}", 1) for k in range(extra)]
        counts = [n for _, n in CONTEXT.sequences]
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        if extra:
            starts[len(batch) + 1 :] = starts[len(batch)]  # as gdn_attn pads them
        metadata = GDNAttentionMetadata(
            num_prefills=prefills,
            num_decodes=decodes,
            num_actual_tokens=sum(counts),
            has_initial_state=torch.tensor([read[i] > 0 for i, *_ in batch]) if prefills else None,
            non_spec_query_start_loc=starts,
            non_spec_state_indices_tensor=torch.tensor([rows[i] for i, *_ in batch] + [0] * extra, dtype=torch.int32),
        )
        CONTEXT.attn_metadata = dict.fromkeys(jets, metadata)
        parts = [ids[i][read[i] : read[i] + n] for i, n, _ in batch] + [torch.zeros(1, dtype=torch.int64)] * extra
        positions = torch.cat(
            [torch.arange(read[i], read[i] + n) for i, n, _ in batch] + [torch.zeros(1, dtype=torch.int64)] * extra
        )
        with torch.no_grad():
            logits = engine.compute_logits(engine(torch.cat(parts), positions))
        for (i, *_), y in zip(batch, logits.split(counts)):
            got[i].append(y)
        for layer in jets.values():
            assert all(state[0].isnan().all() for state in layer.kv_cache), "block 0 is nobody's"
    for y, want in zip(got, expected):
        torch.testing.assert_close(torch.cat(y), want.detach(), rtol=0, atol=1e-4)
    assert engine.get_mamba_state_copy_func() == (get_temporal_copy_spec,) * 2


@pytest.mark.parametrize("seed", range(4))
def test_vllm_verifies_drafts(vllm, seed):
    """Requests with drafts, of which any may be wrong, beside prompts: every token that counts is the model's."""
    own, most = small_model("jet", "jet").eval(), 3
    config = vllm_config(hf_config(own.config))
    config.speculative_config, config.num_speculative_tokens = object(), most
    engine = vllm(vllm_config=config)
    engine.load_weights(own.state_dict().items())
    jets, shapes = CONTEXT.no_compile_layers, engine.get_mamba_state_shape_from_config(config)
    for layer in jets.values():
        assert layer.get_state_shape() == shapes and len(shapes) == len(layer.get_state_dtype()) == 7
        assert layer.get_state_dtype() == engine.get_mamba_state_dtype_from_config(config)
        assert layer.get_kv_cache_spec(config).num_speculative_blocks == 0
        pages_of(layer)
    draw, lengths = random.Random(seed), (40, 3, 25, 31)
    ids = [tokens(n, seed=n) for n in lengths]
    expected = [own(row[None]).logits[0] for row in ids]
    rows, read, accepted = [3, 1, 6, 2], [0] * 4, [1] * 4
    prompt, got = [draw.randint(1, n) for n in lengths], [[] for _ in ids]
    while left := [i for i in range(4) if read[i] < lengths[i]]:
        batch = []  # (request, tokens, how many of them count, whether the others are drafts)
        for i in draw.sample(left, draw.randint(1, len(left))):
            if read[i] < prompt[i]:
                count = draw.randint(1, prompt[i] - read[i])
                # A token alone may come as one to verify, and more of the prompt behind it.
                alone = count == 1 and read[i] > 0 and draw.random() < 0.5
                batch.append((i, ids[i][read[i] : read[i] + count], count, alone))
                continue
            drafts = draw.randint(0, most)
            prompt[i] = 0
            right = draw.randint(0, min(drafts, lengths[i] - read[i] - 1))
            wrong = (ids[i][read[i]].repeat(drafts - right) + 1) % own.config.vocab_size
            batch.append((i, torch.cat([ids[i][read[i] : read[i] + 1 + right], wrong]), 1 + right, True))
        extra = 2 if all(verifies for *_, verifies in batch) and draw.random() < 0.5 else 0  # of a captured graph
        CONTEXT.attn_metadata = dict.fromkeys(jets, drafts_metadata(batch, rows, read, accepted, extra))
        x = torch.cat([x for _, x, _, _ in batch] + [torch.zeros(extra, dtype=torch.int64)])
        with torch.no_grad():
            logits = engine.compute_logits(engine(x, torch.zeros_like(x)))
        for (i, _, count, verifies), y in zip(batch, logits.split([len(x) for _, x, _, _ in batch] + [1] * extra)):
            got[i].append(y[:count])
            read[i] += count
            accepted[i] = count if verifies else 1
        for layer in jets.values():
            assert all(state[0].isnan().all() for state in layer.kv_cache if state.is_floating_point())
            assert (layer.kv_cache[-1][0] == -1).all(), "block 0 is nobody's"
    for y, want in zip(got, expected):
        torch.testing.assert_close(torch.cat(y), want.detach(), rtol=0, atol=1e-4)


def drafts_metadata(batch, rows, read, accepted, extra):
    """As vLLM's builder makes it of requests with drafts and others."""
    counts = [len(x) for _, x, _, _ in batch]
    places = torch.arange(sum(counts)).split(counts)
    spec, plain = ([n for n, (*_, verifies) in enumerate(batch) if verifies == wanted] for wanted in (True, False))

    def offsets(which, more=0):
        ends = torch.tensor([0, *(counts[n] for n in which)]).cumsum(0).to(torch.int32)
        return torch.cat([ends, ends[-1:].repeat(more)])

    def of_requests(values, which, fill=0, more=0):
        return torch.tensor([values[batch[n][0]] for n in which] + [fill] * more, dtype=torch.int32)

    metadata = GDNAttentionMetadata(num_prefills=len(plain), num_decodes=0, num_actual_tokens=sum(counts))
    if plain:
        metadata.has_initial_state = of_requests(read, plain) > 0
        metadata.non_spec_query_start_loc = offsets(plain)
        metadata.non_spec_state_indices_tensor = of_requests(rows, plain)
    if spec:
        nothing = torch.zeros(0, dtype=torch.int64)
        metadata.spec_sequence_masks = torch.tensor([verifies for *_, verifies in batch])
        metadata.spec_query_start_loc = offsets(spec, extra)
        metadata.spec_state_indices_tensor = of_requests(rows, spec, 0, extra)[:, None]
        metadata.spec_token_indx = torch.cat([nothing, *(places[n] for n in spec)])
        metadata.non_spec_token_indx = torch.cat([nothing, *(places[n] for n in plain)])
        metadata.num_accepted_tokens = of_requests(accepted, spec, 1, extra)
        same = {counts[n] for n in spec}
        metadata.uniform_spec_sequence_length = same.pop() if len(same) == 1 else None
    return metadata


def test_vllm_refuses_what_is_not_computed(vllm):
    config = vllm_config(hf_config(small_model("jet").config))
    config.quant_config = object()
    with pytest.raises(NotImplementedError, match="no quantised weights"):
        vllm(vllm_config=config)
    config.quant_config, config.speculative_config = None, object()
    config.num_speculative_tokens, config.cache_config.mamba_cache_mode = 2, "align"
    with pytest.raises(NotImplementedError, match="cannot cache prefixes of a JetBlock where there are drafts"):
        vllm(vllm_config=config)
    config.speculative_config, config.num_speculative_tokens = None, 0
    vllm(vllm_config=config)
    with pytest.raises(ValueError, match="must be made once"):
        vllm(vllm_config=config)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_the_ranks_add_up(ranks):
    """Also where the generator's width is no whole part of the channels of a rank."""
    block = small_block(num_heads=4, dconv_generator_reduction=5, dtype=torch.float64)
    x = torch.randn(2, 40, block.hidden_size, dtype=torch.float64)
    total = 0
    for rank in range(ranks):
        part = JetBlockOfRank(block.hidden_size, block.config, rank, ranks, dtype=torch.float64)
        assert dict(part.named_parameters()).keys() == dict(block.named_parameters()).keys()
        for (_, parameter), whole in zip(part.named_parameters(), block.parameters(), strict=True):
            parameter.weight_loader(parameter, whole.detach())
        total = total + part(x)
    torch.testing.assert_close(total, block(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="num_heads must be a multiple of the 3 ranks, got 4"):
        JetBlockOfRank(block.hidden_size, block.config, 0, 3)
    with pytest.raises(ValueError, match=r"q_proj.weight must be \[.*\] on each of"):
        part.q_proj.weight.weight_loader(part.q_proj.weight, torch.zeros(3, 3))


@pytest.fixture
def sglang(monkeypatch):
    registry = install_sglang(monkeypatch)
    plugins.sglang()
    plugins.sglang()
    (((kind, layer, _),),) = registry._hooks.values()
    assert kind.name == "REPLACE" and list(registry._hooks) == ["sglang.srt.models.jet_nemotron.JetBlock"]
    yield layer
    sys.modules.pop("jetkernels.serving.for_sglang", None)


class SglangLayer:
    """A JetBlock of SGLang's second layer on pools full of NaN, called as the engine calls it."""

    SLOTS, DRAFTS, REQUESTS = (4, 1, 5), 3, 6  # SLOTS of three requests; the engine takes so many at once

    def __init__(self, layer_class):
        from sglang.srt.configs.jet_nemotron import JetNemotronConfig

        sizes = small_block().config.to_dict() | {"mode": "chunk", "dconv_implementation": "triton"}
        self.config = JetNemotronConfig(20, ["attn", "jet", "jet"], {"jet": sizes})
        self.layer = stir_(layer_class(self.config, layer_id=1, prefix="model.layers.1.self_attn"))
        shape = self.config.mamba2_cache_params.shape
        (D, held), (H, K, V) = shape.conv[0], shape.temporal
        nan, rows = lambda *shape: torch.full(shape, torch.nan), self.REQUESTS + 1
        # SGLang keeps the windows of a request's drafts in one row of memory, where they overlap.
        inputs = nan(rows, D, self.DRAFTS + held - 1)
        windows = inputs.as_strided((rows, self.DRAFTS, D, held), (*inputs.stride()[:1], 1, *inputs.stride()[1:]))
        self.cache = SimpleNamespace(
            conv=[nan(BLOCKS, D, held)],
            temporal=nan(BLOCKS, H, K, V),
            intermediate_conv_window=[windows],
            intermediate_ssm=nan(rows, self.DRAFTS, H, K, V),
        )
        self.backend = SimpleNamespace(
            forward_metadata=None,
            req_to_token_pool=SimpleNamespace(
                mamba2_layer_cache=lambda layer_id: self.cache if layer_id == 1 else None, size=self.REQUESTS
            ),
            topk=1,
            verify_intermediate_state_indices=torch.arange(self.REQUESTS, dtype=torch.int32),
        )
        self.forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: self.mode == "decode"),
            spec_info=SimpleNamespace(draft_token_num=self.DRAFTS, ragged_verify_layout=None),
        )
        self.forward_batch.forward_mode.is_target_verify = lambda: self.mode == "verify"

    def __call__(self, mode: str, requests, xs, read=(), padding: int = -1, extra: int = 0):
        """Outputs of each request; `extra` more, of a captured graph or of a batch filled up, have slot `padding`."""
        self.mode = mode
        counts = [len(x) for x in xs] + [self.DRAFTS if mode == "verify" else 1] * extra
        self.backend.forward_metadata = SimpleNamespace(
            mamba_cache_indices=torch.tensor([self.SLOTS[i] for i in requests] + [padding] * extra, dtype=torch.int32),
            query_start_loc=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        )
        self.forward_batch.extend_prefix_lens = torch.tensor(read) if mode == "extend" else None
        self.forward_batch.req_pool_indices = torch.tensor([5 - i for i in requests] + [0] * extra)
        CONTEXT.backend = SimpleNamespace(linear_attn_backend=self.backend)
        x = torch.cat([*xs, torch.full((sum(counts) - sum(map(len, xs)), 20), torch.nan)])
        y = self.layer(positions=None, hidden_states=x, forward_batch=self.forward_batch)
        others = [slot for slot in range(BLOCKS) if slot not in self.SLOTS]
        assert self.cache.conv[0][others].isnan().all() and self.cache.temporal[others].isnan().all()
        return y.split(counts)[: len(xs)]

    def accept(self, requests, counts, by_request: bool) -> None:
        """What SGLang does when it knows how many drafts count: the state behind the last of them is the request's."""
        for place, (i, count) in enumerate(zip(requests, counts, strict=True)):
            row = 5 - i if by_request else place
            self.cache.temporal[self.SLOTS[i]] = self.cache.intermediate_ssm[row, count - 1]
            self.cache.conv[0][self.SLOTS[i]] = self.cache.intermediate_conv_window[0][row, count - 1]


def some_inputs(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(n, 20, generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.mark.parametrize("padding", [0, -1])
def test_sglang_gives_what_the_block_gives(sglang, padding):
    engine = SglangLayer(sglang)
    assert isinstance(engine.layer, JetBlock)
    params = engine.config.mamba2_cache_params
    assert params.layers == [1, 2] and params.dtype.temporal == torch.float32
    assert params.shape.conv[0] == (engine.layer.config.value_dim, 3) and params.shape.temporal == (2, 6, 9)

    xs = some_inputs(30, 2, 45)
    got = [[] for _ in xs]
    for every, read in steps([len(x) for x in xs], seed=1):
        # A step of SGLang is all decode or all extend.
        for mode in ("decode", "extend"):
            chosen = [(i, n) for i, n, decodes in every if decodes == (mode == "decode")]
            if chosen:
                requests = [i for i, _ in chosen]
                pieces = [xs[i][read[i] : read[i] + n] for i, n in chosen]
                extra = 2 if mode == "decode" else 0
                ys = engine(mode, requests, pieces, [read[i] for i in requests], padding, extra)
                for i, y in zip(requests, ys, strict=True):
                    got[i].append(y)
    for y, x in zip(got, xs, strict=True):
        torch.testing.assert_close(torch.cat(y), JetBlock.forward(engine.layer, x[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by_request", [False, True])
def test_sglang_verifies_drafts(sglang, by_request, seed, monkeypatch):
    """Wrong drafts behind right ones, of some of the requests, in graphs filled up with others."""
    monkeypatch.setattr(CONTEXT, "rows_by_request", by_request)
    engine, draw = SglangLayer(sglang), random.Random(seed)
    xs = some_inputs(30, 22, 45)
    read = [draw.randint(1, 9) for _ in xs]
    got = [[y] for y in engine("extend", range(3), [x[:n] for x, n in zip(xs, read)], [0] * 3)]
    while left := [i for i, x in enumerate(xs) if read[i] < len(x)]:
        requests = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.randint(1, min(engine.DRAFTS, len(xs[i]) - read[i])) for i in requests]
        pieces = [
            torch.cat([xs[i][read[i] : read[i] + n], torch.full((engine.DRAFTS - n, 20), 7.0)])
            for i, n in zip(requests, counts)
        ]
        before = engine.cache.temporal.clone()
        ys = engine("verify", requests, pieces, padding=draw.choice([0, -1]), extra=draw.randint(0, 2))
        torch.testing.assert_close(engine.cache.temporal, before, rtol=0, atol=0, equal_nan=True)
        engine.accept(requests, counts, by_request)
        for i, n, y in zip(requests, counts, ys, strict=True):
            got[i].append(y[:n])
            read[i] += n
    for y, x in zip(got, xs, strict=True):
        torch.testing.assert_close(torch.cat(y), JetBlock.forward(engine.layer, x[None])[0], rtol=0, atol=1e-5)


def test_sglang_refuses_what_is_not_computed(sglang):
    engine = SglangLayer(sglang)
    with pytest.raises(NotImplementedError, match="no quantised weights"):
        sglang(engine.config, 1, quant_config=object())
    x = some_inputs(3)
    for place, name, value, said in (
        (engine.backend, "topk", 2, "trees of drafts"),
        (engine.forward_batch.spec_info, "ragged_verify_layout", object(), "drafts of differing numbers"),
        (engine.cache, "intermediate_ssm", None, "drafts kept as updates"),
    ):
        own = getattr(place, name)
        setattr(place, name, value)
        with pytest.raises(NotImplementedError, match=said):
            engine("verify", [0], x)
        setattr(place, name, own)
