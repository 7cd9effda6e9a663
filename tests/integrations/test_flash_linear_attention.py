"""jetkernels behind flash-linear-attention's functions and layers, against that library's own plain PyTorch.

flash-linear-attention has no code for a CPU: what answers here is jetkernels, or an error of Triton.
"""

import logging
import sys
import types
import warnings

import pytest
import torch
from support.comparison import assert_bitwise, assert_error
from torch.nn import functional as F

import jetkernels
from jetkernels.integrations import _calls, _flash_linear_attention, register_fla_backend

REASON = "needs the packages flash-linear-attention 0.6, fla-core, triton and einops"


@pytest.fixture(scope="module")
def fla():
    pytest.importorskip("triton", reason=REASON)
    pytest.importorskip("einops", reason=REASON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        pytest.importorskip("fla.backends", reason=REASON)
        return pytest.importorskip("fla.ops.gated_delta_rule", reason=REASON)


@pytest.fixture(autouse=True)
def nothing_is_announced_yet(monkeypatch):
    monkeypatch.setattr(_calls, "_announced", set())


def arguments(B=1, T=70, H=2, HV=4, K=16, dtype=torch.float32):
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, H, K, dtype=dtype) for _ in range(2))
    v = torch.randn(B, T, HV, K, dtype=dtype)
    return {"q": q, "k": k, "v": v, "g": F.logsigmoid(torch.randn(B, T, HV)), "beta": torch.rand(B, T, HV)}


def naive(fla, q, k, v, g, beta):
    """Their definition, of normalised keys and as many key heads as value heads."""
    q, k = (F.normalize(x, dim=-1).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    return fla.naive_recurrent_gated_delta_rule(q, k, v, beta, g, output_final_state=True)


@pytest.mark.parametrize("name", ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"))
def test_their_functions_equal_their_definition(fla, name):
    x = {argument: t.requires_grad_() for argument, t in arguments().items()}
    refs = naive(fla, **x)
    with register_fla_backend():
        outs = getattr(fla, name)(**x, use_qk_l2norm_in_kernel=True, output_final_state=True)
    cotangents = [torch.randn_like(ref) for ref in refs]
    found = torch.autograd.grad(outs, list(x.values()), cotangents)
    for argument, grad, ref in zip(x, found, torch.autograd.grad(refs, list(x.values()), cotangents)):
        assert_error(f"d{argument}", grad, ref, 1e-4)
    for what, out, ref in zip(("o", "final_state"), outs, refs):
        assert_error(what, out, ref, 1e-5)


def test_positional_arguments_have_their_order_there(fla):
    """In the recurrent function gk and gv stand before beta; in the chunked one use_beta_sigmoid_in_kernel is the
    tenth.
    """
    q, k, v, g, beta = arguments().values()
    with register_fla_backend():
        o, _ = fla.fused_recurrent_gated_delta_rule(q, k, v, g, None, None, beta)
        assert_bitwise(o, jetkernels.fused_recurrent_gated_delta_rule(q, k, v, g, beta)[0])
        o, _ = fla.chunk_gated_delta_rule(q, k, v, g, beta, 0.5, None, False, True, True)
        options = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        assert_bitwise(o, jetkernels.chunk_gated_delta_rule(q, k, v, g, beta, 0.5, **options)[0])


@pytest.mark.parametrize("allow_neg_eigval", (False, True))
def test_their_layer(fla, allow_neg_eigval):
    """Raw gates, raw beta and a V-first state; chunked with gradients, token by token without."""
    from fla.layers import GatedDeltaNet
    from fla.models.utils import Cache

    torch.manual_seed(0)
    layer = GatedDeltaNet(
        hidden_size=32,
        head_dim=8,
        num_heads=2,
        num_v_heads=4,
        use_short_conv=False,
        use_gate=False,
        allow_neg_eigval=allow_neg_eigval,
        layer_idx=0,
    )
    layer.o_norm = torch.nn.RMSNorm(layer.head_v_dim)  # theirs is a Triton kernel
    x = torch.randn(2, 9, 32)
    q, k = (F.silu(project(x)).unflatten(-1, (2, 8)) for project in (layer.q_proj, layer.k_proj))
    v = F.silu(layer.v_proj(x)).unflatten(-1, (4, -1))
    g = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
    beta = torch.sigmoid(layer.b_proj(x)) * (2 if allow_neg_eigval else 1)
    expected = layer.o_proj(layer.o_norm(naive(fla, q, k, v, g, beta)[0]).flatten(2))
    cotangent = torch.randn_like(expected)
    parameters = dict(layer.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values()), cotangent)))
    with register_fla_backend():
        out = layer(x)[0]
        for name, grad in zip(parameters, torch.autograd.grad(out, list(parameters.values()), cotangent)):
            assert_error(name, grad, grads[name], 1e-4)
        layer.eval()
        with torch.no_grad():
            cache = Cache()
            parts = [layer(x[:, t : t + 3], past_key_values=cache, use_cache=True)[0] for t in (0, 3, 6)]
    assert_error("chunked", out, expected, 1e-5)
    assert_error("token by token", torch.cat(parts, 1), expected, 1e-5)


def test_undone_it_is_theirs_again(fla):
    x, names = arguments(), ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    before = {name: getattr(fla, name) for name in names}
    with register_fla_backend() as patched:
        assert "fla.ops.gated_delta_rule.chunk_gated_delta_rule" in patched.functions
        assert "fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule" in patched.functions
        with register_fla_backend() as again:
            assert again.functions == []
        kept = {name: getattr(fla, name) for name in names}  # as a module has it that imported it meanwhile
        for function in kept.values():
            function(**x)
    assert {name: getattr(fla, name) for name in names} == before
    for function in (*before.values(), *kept.values()):
        with pytest.raises(RuntimeError, match="active drivers"):  # of Triton
            function(**x)
    with register_fla_backend():
        for function in kept.values():
            function(**x)


def test_the_environment_switches_it_off(fla, monkeypatch):
    monkeypatch.setenv("FLA_JETKERNELS", "0")
    with register_fla_backend(), pytest.raises(RuntimeError, match="active drivers"):
        fla.chunk_gated_delta_rule(**arguments())
    with register_fla_backend(), pytest.raises(RuntimeError, match="active drivers"):
        fla.fused_recurrent_gated_delta_rule(**arguments())
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    with pytest.raises(RuntimeError, match="FLA_DISABLE_BACKEND_DISPATCH=1 switches .* registry off"):
        register_fla_backend()


X = arguments(T=5)
NOT_SERVED = {
    "gk": (X | {"gk": X["k"]}, "jetkernels does not compute gk"),
    "cp_context": (X | {"cp_context": object()}, "jetkernels does not compute cp_context"),
    "an unknown argument": (X | {"head_first": True}, "jetkernels does not know the argument head_first"),
    "a flag by truth": (X | {"state_v_first": 1}, "state_v_first is neither True nor False"),
    "beta per value": (X | {"beta": X["v"]}, "jetkernels takes one beta per token and value head"),
    "hints alone": (X | {"chunk_indices": torch.zeros(1, 2, dtype=torch.int64)}, "hints of packed sequences"),
    "another chunk_size": (X | {"chunk_size": 128}, "chunk_size is 128"),
    "A_log alone": (X | {"A_log": torch.ones(4)}, "A_log without use_gate_in_kernel"),
    "two dtypes": (X | {"v": X["v"].half()}, "q, k and v must have one floating dtype"),
    "no v": ({"q": X["q"]}, "its arguments do not fit"),
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_what_is_not_served_goes_to_them_with_a_reason(case, fla, caplog):
    given, reason = NOT_SERVED[case]
    backends = sys.modules["fla.backends"]
    with register_fla_backend():
        with pytest.warns(UserWarning, match=f"fused_recurrent_gated_delta_rule stays with .*: {reason}"):
            with pytest.raises(Exception, match="active drivers|missing|unexpected") as caught:
                fla.fused_recurrent_gated_delta_rule(**given)
        assert "jetkernels" not in str(caught.value)
        backends._get_operation_registry("gated_delta_rule")._logged.clear()
        with caplog.at_level(logging.INFO, "fla.backends"), pytest.raises(Exception) as caught:
            fla.chunk_gated_delta_rule(**given)
        assert "jetkernels" not in str(caught.value)
    assert reason in caplog.text


# ---- without the library


def test_without_it_the_sentence_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    monkeypatch.setattr(_flash_linear_attention.importlib, "import_module", missing("fla"))
    with pytest.raises(ModuleNotFoundError, match="needs the package fla, .*: pip install flash-linear-attention"):
        register_fla_backend()


def missing(name: str):
    def import_module(module: str) -> types.ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return import_module


def test_another_version_is_refused_by_name(monkeypatch):
    old = {"fla": types.SimpleNamespace(__version__="0.5.2"), "fla.ops.gated_delta_rule": types.ModuleType("rule")}
    old["fla.backends"] = types.ModuleType("fla.backends")
    monkeypatch.setattr(_flash_linear_attention.importlib, "import_module", old.__getitem__)
    with pytest.raises(ImportError, match="needs flash-linear-attention 0.6, with fla.backends; got 0.5.2"):
        register_fla_backend()
