"""transformers' models with jetkernels under them, against the same models alone."""

import importlib
import inspect
import sys
import warnings

import pytest
import torch
from support.comparison import assert_error

from jetkernels.integrations import _calls, _transformers, patch_transformers

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

F32 = torch.float32
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", SIZES | EXPERTS | {"intermediate_size": 48}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", SIZES | {"intermediate_size": 48}),
}
FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen4_exp")
NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def modeling(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.fixture(autouse=True)
def bodies_of_transformers(monkeypatch):
    """What transformers computes by itself, also where flash-linear-attention is installed, which needs a GPU."""
    for family in FAMILIES:
        for name in NAMES:
            monkeypatch.setattr(modeling(family), name, inspect.unwrap(getattr(modeling(family), name)))
    monkeypatch.setattr(_calls, "_announced", set())


def made(family: str, **changes):
    """A model with random weights whose decays are ordinary: those of the initial weights leave little of a state, and
    in the gradient of A_log little but cancelled terms.
    """
    config, kind, sizes = MODELS[family]
    torch.manual_seed(0)
    model = getattr(modeling(family), kind)(getattr(transformers, config)(**sizes | changes))
    assert {"linear_attention", "full_attention"} <= {*model.config.layer_types}
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -3, 0)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return made(request.param)


@pytest.fixture(scope="module")
def prompt():
    """A batch whose first row is padded on the left."""
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 61, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "without a cache": {"do_sample": False, "use_cache": False},
}


def counted(monkeypatch) -> list[str]:
    """The ops that are called from now on."""
    calls: list[str] = []
    for name, (op, function) in list(_transformers._FUNCTIONS.items()):
        served = lambda *args, op=op, function=function, **keywords: calls.append(op) or function(*args, **keywords)
        monkeypatch.setitem(_transformers._FUNCTIONS, name, (op, served))
    return calls


@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens_are_equal(model, prompt, way, monkeypatch):
    def tokens():
        torch.manual_seed(2)
        return model.generate(**prompt, **WAYS[way], max_new_tokens=10, pad_token_id=0, eos_token_id=None)

    expected, calls = tokens(), counted(monkeypatch)
    with patch_transformers():
        assert torch.equal(tokens(), expected)
    assert set(calls) == {op for op, _ in _transformers._FUNCTIONS.values()} - (
        {"recurrent_gated_delta_rule"} if way == "without a cache" else set()
    )
    n = len(calls)
    assert torch.equal(tokens(), expected) and len(calls) == n, "undone"


def test_logits(model, prompt):
    expected = model(**prompt).logits
    with patch_transformers():
        assert_error("logits", model(**prompt).logits, expected, 1e-5)


@pytest.mark.parametrize("dtype, ceiling", ((torch.bfloat16, 3e-2), (torch.float64, 1e-6)), ids=str)
def test_logits_in_another_dtype(prompt, dtype, ceiling):
    """transformers computes the rule in fp32 whatever the model's dtype."""
    model = made("qwen3_5").to(dtype)
    expected = model(**prompt).logits
    with patch_transformers():
        assert_error("logits", model(**prompt).logits, expected, ceiling)


def test_gradients(model, prompt):
    def gradients():
        model.zero_grad()
        model(**prompt, labels=prompt["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with patch_transformers():
        found = gradients()
    assert found.keys() == expected.keys() and any("A_log" in name for name in found)
    for name, grad in found.items():
        assert_error(name, grad, expected[name], 1e-4)


def test_a_prompt_in_two_parts(model, prompt):
    """The second part has a state and more than one token: the chunked rule begins with the cache's state."""
    ids = prompt["input_ids"]
    with patch_transformers(), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert_error("logits", torch.cat([first.logits, second.logits], 1), whole, 1e-5)


def test_compiled(prompt):
    model = made("qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with torch.no_grad():
        expected = model(**prompt).logits
        with patch_transformers():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert_error("logits", compiled(**prompt).logits, expected, 1e-5)


def test_the_report_names_what_is_served_and_undo_puts_it_back():
    before = {(family, name): getattr(modeling(family), name) for family in FAMILIES for name in NAMES}
    patched = patch_transformers()
    dotted = [f"transformers.models.{f}.modeling_{f}.{name}" for f, name in before]
    assert sorted(patched.functions) == sorted(dotted)
    assert str(patched).startswith("jetkernels serves, of transformers:\n") and all(n in str(patched) for n in dotted)
    for (family, name), original in before.items():
        replacement = getattr(modeling(family), name)
        assert replacement is not original and inspect.unwrap(replacement) is original
        assert inspect.signature(replacement) == inspect.signature(original)
    with patch_transformers() as again:
        assert again.functions == []
    assert getattr(modeling(FAMILIES[0]), NAMES[0]) is not before[FAMILIES[0], NAMES[0]], "of the first patch"
    patched.undo()
    patched.undo()
    assert {key: getattr(modeling(key[0]), key[1]) for key in before} == before
    assert "nothing of transformers" in str(patched)


def test_undo_leaves_what_another_has_put_there():
    module, mine = modeling("qwen3_next"), lambda *args, **keywords: None
    with patch_transformers():
        module.torch_chunk_gated_delta_rule = mine
    assert module.torch_chunk_gated_delta_rule is mine


def test_without_it_the_sentence_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="patch_transformers needs the package transformers, .*pip install"):
        patch_transformers()


def test_functions_of_another_kind_are_left_alone(monkeypatch):
    module, other = modeling("qwen3_next"), lambda q, k, v: None
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", other)
    with patch_transformers() as patched:
        assert module.torch_chunk_gated_delta_rule is other
        assert f"{module.__name__}.torch_chunk_gated_delta_rule" not in patched.functions


# ---- calls that stay with transformers


def arguments(dtype=F32, **more):
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=dtype) for _ in range(3))
    return {"query": q, "key": k, "value": v, "g": -torch.rand(1, 6, 2), "beta": torch.rand(1, 6, 2)} | more


def double_state():
    return torch.zeros(1, 2, 8, 8, dtype=torch.float64)


NOT_SERVED = {
    "two dtypes": (arguments(value=torch.randn(1, 6, 2, 8).double()), "q, k and v must have one floating dtype"),
    "a state of another dtype": (arguments(initial_state=double_state()), "a state of torch.float64 does not go with"),
    "packed": (arguments(cu_seqlens=torch.tensor([0, 2, 6])), "packed sequences .cu_seqlens. without seq_idx"),
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_the_reason_is_said_once(case, monkeypatch):
    given, reason = NOT_SERVED[case]
    module, calls = modeling("qwen3_next"), []
    monkeypatch.setattr(module, NAMES[0], record(getattr(module, NAMES[0]), calls))
    served = counted(monkeypatch)
    with patch_transformers():
        with pytest.warns(UserWarning, match=f"{NAMES[0]} stays with transformers: {reason}") as caught:
            module.torch_chunk_gated_delta_rule(**given)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.torch_chunk_gated_delta_rule(**given)
    assert len(calls) == 2 and calls[0].keys() == given.keys() and not served


def record(original, calls):
    """``original``, whose keyword arguments are kept."""

    def recorded(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False, **more):
        given = {"query": query, "key": key, "value": value, "g": g, "beta": beta} | more
        given |= {"initial_state": initial_state} if initial_state is not None else {}
        calls.append(given)
        return original(**given)

    recorded.__signature__ = inspect.signature(original)
    return recorded


def test_packed_sequences_that_the_convolution_keeps_apart_are_served():
    cu_seqlens, module = torch.tensor([0, 2, 6]), modeling("qwen3_next")
    given = arguments()
    with patch_transformers():
        o, _ = module.torch_chunk_gated_delta_rule(
            **given, cu_seqlens=cu_seqlens, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]])
        )
        parts = [
            module.torch_chunk_gated_delta_rule(**{name: t[:, begin:end] for name, t in given.items()})[0]
            for begin, end in ((0, 2), (2, 6))
        ]
    assert_error("o", o, torch.cat(parts, 1), 1e-6)


def test_forward_mode_stays_with_transformers():
    given, module = arguments(), modeling("qwen3_next")
    tangent = torch.randn_like(given["query"])

    def o(query):
        return module.torch_chunk_gated_delta_rule(**given | {"query": query})[0]

    expected = torch.func.jvp(o, (given["query"],), (tangent,))
    with patch_transformers(), pytest.warns(UserWarning, match="forward-mode derivatives"):
        for out, ref in zip(torch.func.jvp(o, (given["query"],), (tangent,)), expected):
            torch.testing.assert_close(out, ref)


def test_positional_arguments_after_beta_stay_with_transformers():
    given, module = arguments(), modeling("qwen3_next")
    with patch_transformers(), pytest.warns(UserWarning, match="arguments after beta without their names"):
        o, state = module.torch_chunk_gated_delta_rule(*given.values(), 64, None, True)
    torch.testing.assert_close(o, module.torch_chunk_gated_delta_rule(**given)[0])
    assert state is not None


def test_export_has_no_op_of_jetkernels():
    module = modeling("qwen3_next")

    class Rule(torch.nn.Module):
        def forward(self, query, key, value, g, beta):
            return module.torch_chunk_gated_delta_rule(query, key, value, g, beta)[0]

    with patch_transformers():
        program = torch.export.export(Rule(), tuple(arguments().values()))
    assert "torch.ops.jet" not in str(program.graph_module.code)


def test_a_device_whose_calls_no_kernel_takes_is_left_to_transformers(monkeypatch):
    """As on a GPU that is not of compute capability 9.0; on this machine backend_of is told what to say."""
    asked = []

    class Backend:
        name, detail = "plain", "the device is not of compute capability 9.0"

    def backend_of(op, *args):
        asked.append((op, args[0].shape, args[2].shape, args[0].dtype))
        return Backend

    monkeypatch.setattr(_calls, "backend_of", backend_of)
    monkeypatch.setattr(_calls, "_plain_reasons", {})
    monkeypatch.setattr(torch, "device", lambda *where: "cpu")
    for _ in range(2):
        reason = _calls.plain_reason("chunk_gated_delta_rule", 0, torch.bfloat16, 96, 256)
        assert reason == Backend.detail
    assert asked == [("chunk_gated_delta_rule", (1, 1, 1, 96), (1, 1, 1, 256), torch.bfloat16)]
