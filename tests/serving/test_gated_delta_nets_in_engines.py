"""The rule of Qwen3-Next and Qwen3.5 on the pools of vLLM and SGLang, on stand-ins for these."""

import random
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from serving.stand_ins import CONTEXT, GDNAttentionMetadata, install_sglang, install_vllm, module
from support.comparison import assert_bitwise

import jetkernels
from jetkernels.serving import plugins
from reference.recurrent_gated_delta_rule import gated_delta_rule

HK, H, K, V, BLOCKS = 2, 4, 8, 6, 7
WIDTHS = [HK * K, HK * K, H * V]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def rule(mixed, a, b, A_log, dt_bias, before=None):
    """The definition for one sequence: o [T, H, V] and the state [H, V, K] behind it, in fp64."""
    q, k, v = (t.unflatten(-1, (heads, -1))[None] for t, heads in zip(mixed.split(WIDTHS, -1), (HK, HK, H)))
    g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    state = None if before is None else before.mT[None]
    o, S = gated_delta_rule(q, k, v, g[None], b.double().sigmoid()[None], state, None, K**-0.5, True)
    return o[0].float(), S[0].mT.float()


def steps(lengths, seed):
    """[(sequence, tokens)] of each step, those that decode first, and how much of each sequence had been read."""
    draw, read = random.Random(seed), [0] * len(lengths)
    while left := [i for i, n in enumerate(lengths) if read[i] < n]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = {i: min(draw.choice([1, 1, draw.randint(2, 90)]), lengths[i] - read[i]) for i in chosen}
        decodes = [i for i in chosen if counts[i] == 1 and read[i]]
        yield [(i, counts[i]) for i in decodes], [(i, counts[i]) for i in chosen if i not in decodes], list(read)
        for i in chosen:
            read[i] += counts[i]


@pytest.fixture
def other_models(monkeypatch):
    monkeypatch.setenv("JETKERNELS_GATED_DELTA_NETS", "1")


@pytest.mark.parametrize("padded", (0, 2))
def test_vllm(monkeypatch, other_models, padded):
    pytest.importorskip("transformers", reason="needs the package transformers")
    registry = install_vllm(monkeypatch)
    plugins.vllm()
    plugins.vllm()
    assert "jetkernels.serving.gated_delta_net_for_vllm" not in sys.modules
    where, _, name = registry.models["Qwen3NextForCausalLM"].partition(":")
    own = type(name, (), {})
    module(monkeypatch, "vllm.model_executor.models.qwen3_next", **{name: own})
    assert getattr(import_module(where), name) is own
    layer_class = import_module("vllm.model_executor.custom_op").op_registry_oot["QwenGatedDeltaNetAttention"]
    sys.modules.pop("jetkernels.serving.gated_delta_net_for_vllm", None)
    torch.manual_seed(0)
    layer = layer_class("layer", HK, H, K, V, BLOCKS).requires_grad_(False)
    lengths, rows = (200, 1, 70, 33), (3, 1, 6, 2)
    mixed = [torch.randn(n, sum(WIDTHS)) for n in lengths]
    gates = [(torch.randn(n, H), torch.randn(n, H)) for n in lengths]
    weight = layer.conv1d.weight.squeeze(1)
    expected = []
    for x, (a, b) in zip(mixed, gates):
        past = torch.cat([torch.zeros(3, x.shape[1]), x])
        convolved = F.silu(sum(past[j : j + len(x)] * weight[:, j] for j in range(4)))
        expected.append(rule(convolved, a, b, layer.A_log, layer.dt_bias)[0])
    got = [[] for _ in lengths]
    for decodes, prompts, read in steps(lengths, seed=padded):
        batch, extra = decodes + prompts, 0 if prompts else padded
        counts = [n for _, n in batch] + [1] * extra
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        indices = torch.tensor([rows[i] for i, _ in batch] + [0] * extra, dtype=torch.int32)
        has = torch.tensor([read[i] > 0 for i, _ in batch])
        D = len(decodes)
        metadata = GDNAttentionMetadata(
            num_prefills=len(prompts),
            num_decodes=D,
            num_decode_tokens=D,
            num_actual_tokens=sum(counts),
            has_initial_state=has if prompts else None,
            non_spec_query_start_loc=starts,
            non_spec_state_indices_tensor=indices,
            prefill_query_start_loc=starts[D:] - D,
            prefill_state_indices=indices[D:],
            prefill_has_initial_state=has[D:],
        )
        CONTEXT.attn_metadata = {"layer": metadata}

        def parts(of, width):
            return torch.cat([of[i][read[i] : read[i] + n] for i, n in batch] + [torch.zeros(extra, width)])

        out = torch.full((sum(counts) + 1, H, V), torch.nan)
        a, b = (parts([g[j] for g in gates], H) for j in (0, 1))
        layer._forward_core(mixed_qkv=parts(mixed, sum(WIDTHS)), b=b, a=a, core_attn_out=out)
        for (i, _), o in zip(batch, out[:-1].split(counts)):
            got[i].append(o)
        assert layer.kv_cache[1][[0, 4, 5]].isnan().all(), "blocks of nobody"
    for o, want in zip(got, expected):
        torch.testing.assert_close(torch.cat(o), want, **TOLERANCE)
    for name in ("spec_sequence_masks", "flashinfer_checkpoint_plan"):
        setattr(metadata, name, object())
        with pytest.raises(AssertionError, match="vLLM's own"):
            layer._forward_core(mixed[0], *gates[0], out)
        setattr(metadata, name, None)
    layer.kv_cache = tuple(state.half() for state in layer.kv_cache)
    with pytest.raises(AssertionError, match="vLLM's own"):
        layer._forward_core(mixed[0], *gates[0], out)


@pytest.fixture
def dispatcher(monkeypatch, other_models):
    registry = install_sglang(monkeypatch)
    plugins.sglang()
    plugins.sglang()
    ((kind, hook, _),) = registry._hooks["sglang.srt.layers.attention.linear.gdn_backend.GDNKernelDispatcher.__init__"]
    assert kind.name == "AFTER"
    triton = import_module("sglang.srt.layers.attention.linear.kernels.gdn_triton").TritonGDNKernel
    chosen = SimpleNamespace(decode_kernel=object(), extend_kernel=object(), supports_packed_decode=False)
    before = dict(vars(chosen))
    hook(None, chosen)
    assert vars(chosen) == before, "what the user chose by name stays"
    mine = SimpleNamespace(decode_kernel=triton(), extend_kernel=triton(), verify_kernel=triton())
    hook(None, mine)
    assert isinstance(mine.verify_kernel, triton) and mine.supports_packed_decode
    yield mine
    for name in ("for_sglang", "gated_delta_net_for_sglang"):
        sys.modules.pop(f"jetkernels.serving.{name}", None)


@pytest.mark.parametrize("packed", (False, True))
def test_sglang(dispatcher, packed):
    torch.manual_seed(0)
    A_log, dt_bias = torch.randn(H), torch.randn(H)
    pool = torch.full((BLOCKS, H, V, K), torch.nan)
    lengths, slots = (200, 3, 70), (4, 1, 5)
    mixed = [torch.randn(n, sum(WIDTHS)) for n in lengths]
    gates = [(torch.randn(n, H), torch.randn(n, H)) for n in lengths]
    expected = [rule(x, *g, A_log, dt_bias)[0] for x, g in zip(mixed, gates)]
    got = [[] for _ in lengths]
    for decodes, prompts, read in steps(lengths, seed=1):
        for batch, decode in ((decodes, True), (prompts, False)):  # a step of SGLang is all decode or all extend
            if not batch:
                continue
            extra = [0, -1] if decode else []
            x, a, b = (
                torch.cat(
                    [of[i][read[i] : read[i] + n] for i, n in batch] + [torch.full((len(extra), width), torch.nan)]
                )
                for of, width in ((mixed, sum(WIDTHS)), ([g[0] for g in gates], H), ([g[1] for g in gates], H))
            )
            counts = [n for _, n in batch] + [1] * len(extra)
            more = {
                "ssm_states": pool,
                "cache_indices": torch.tensor([slots[i] for i, _ in batch] + extra, dtype=torch.int32),
            }
            starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
            q, k, v = (t.unflatten(-1, (h, -1))[None] for t, h in zip(x.split(WIDTHS, -1), (HK, HK, H)))
            raw = {"A_log": A_log, "dt_bias": dt_bias}
            if decode and packed:
                sizes = {"scale": K**-0.5, "num_v_heads": H, "head_v_dim": V}
                o = dispatcher.decode_kernel.packed_decode(x, a, b, **raw, **sizes, **more, replayssm_d=None)
            elif decode:
                o = dispatcher.decode_kernel.decode(q, k, v, a, b, **raw, **more, query_start_loc=starts)
            else:
                for i, _ in batch:  # the engine clears a slot before the first piece
                    if not read[i]:
                        pool[slots[i]] = 0
                g, beta = jetkernels.delta_gates(a[None], b[None], A_log, dt_bias)
                o, *nothing = dispatcher.extend_kernel.extend(
                    q, k, v, g, beta, **more, query_start_loc=starts, track_state=None, track_chunk_idx=None, layer_id=0
                )
                assert nothing == [None, None]
            assert o.shape == (1, len(x), H, V)
            for (i, _), y in zip(batch, o[0].split(counts)):
                got[i].append(y)
            assert pool[[0, 2, 3, 6]].isnan().all(), "slots of nobody"
    for o, want in zip(got, expected):
        torch.testing.assert_close(torch.cat(o), want, **TOLERANCE)
    ring = dict.fromkeys(("replayssm_d", "replayssm_k", "replayssm_g", "replayssm_write_pos"), x)
    with pytest.raises(NotImplementedError, match="--enable-linear-replayssm is not served"):
        dispatcher.decode_kernel.packed_decode(x, a, b, **raw, scale=1, num_v_heads=H, head_v_dim=V, **more, **ring)


def test_sglang_keeps_states_for_its_radix_cache(dispatcher):
    """The state before a chunk of 64 tokens of each sequence that is tracked; without it the pool is the same."""
    torch.manual_seed(0)
    A_log, dt_bias = torch.randn(H), torch.randn(H)
    lengths, chunks = (130, 64, 100, 20), (2, -1, 1, 0)
    pool = torch.randn(BLOCKS, H, V, K)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mixed, a, b = torch.randn(int(starts[-1]), sum(WIDTHS)), *torch.randn(2, int(starts[-1]), H)
    q, k, v = (t.unflatten(-1, (h, -1))[None] for t, h in zip(mixed.split(WIDTHS, -1), (HK, HK, H)))
    g, beta = jetkernels.delta_gates(a[None], b[None], A_log, dt_bias)
    slots = torch.tensor([5, 0, 1, 6], dtype=torch.int32)  # a request may have the first one
    more = {"cache_indices": slots, "query_start_loc": starts}
    plain, tracked = pool.clone(), pool.clone()
    o, *_ = dispatcher.extend_kernel.extend(q, k, v, g, beta, ssm_states=plain, **more)
    track_state = torch.full((4, H, V, K), torch.nan)
    track = {"track_state": track_state, "track_chunk_idx": torch.tensor(chunks, dtype=torch.int32)}
    again, *_ = dispatcher.extend_kernel.extend(q, k, v, g, beta, ssm_states=tracked, **more, **track)
    assert_bitwise(again, o, "output")
    assert_bitwise(tracked, plain, "pool")
    for n, chunk in enumerate(chunks):
        if chunk >= 0:
            part = slice(int(starts[n]), int(starts[n]) + 64 * chunk)
            want = rule(mixed[part], a[part], b[part], A_log, dt_bias, pool[slots[n]].double())[1]
            torch.testing.assert_close(track_state[n], want, **TOLERANCE)
    untouched, copy = pool.clone(), pool.clone()
    o, *_ = dispatcher.extend_kernel.extend(q, k, v, g, beta, ssm_states=copy, **more, inplace_update=False)
    assert_bitwise(copy, untouched, "pool")
