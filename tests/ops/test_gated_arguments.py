"""flash-linear-attention's arguments of the gated delta rule: each against the same computed by hand in fp64."""

import inspect
import warnings

import pytest
import torch
from support.arguments import DeltaInputs, accumulator, delta_inputs
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.shapes import DeltaShape
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import jetkernels
from jetkernels.ops._gated_arguments import Options
from reference.recurrent_gated_delta_rule import gated_delta_rule

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FUNCTIONS = (jetkernels.chunk_gated_delta_rule, jetkernels.fused_recurrent_gated_delta_rule)
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
WHOLE = DeltaShape("two value heads a key head", B=2, T=70, Hk=2, H=4)
SHORT = WHOLE._replace(reason="one chunk", T=9)
PACKED = DeltaShape("packed, one of them empty", T=20, cu_seqlens=(0, 13, 13, 20))

# ``what`` names the case; the flags are the function's
CASES = {
    "raw gates": {"use_gate_in_kernel": True},
    "raw gates and a bias": {"use_gate_in_kernel": True, "bias": True},
    "raw beta": {"use_beta_sigmoid_in_kernel": True},
    "raw beta up to 2": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
    "V first": {"state_v_first": True},
    "V first, by its old name": {"transpose_state_layout": True},
    "no g": {"without": ("g",)},
    "no beta": {"without": ("beta",)},
    "neither": {"without": ("g", "beta")},
    "what a layer of flash-linear-attention gives": {
        "use_gate_in_kernel": True,
        "bias": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "state_v_first": True,
    },
}


def leaves_of(inputs: DeltaInputs, *, bias: bool = False, without: tuple = (), **flags: bool) -> dict[str, Tensor]:
    """What the function is differentiated in; ``flags`` decide what is raw."""
    g, beta = inputs.g, inputs.beta
    if flags.get("use_gate_in_kernel"):
        g = torch.randn(g.shape, dtype=F64).to(inputs.q.dtype)
    if flags.get("use_beta_sigmoid_in_kernel"):
        beta = (2 * torch.randn(beta.shape, dtype=F64)).to(inputs.q.dtype)
    v_first = flags.get("state_v_first") or flags.get("transpose_state_layout")
    state = inputs.initial_state.mT.contiguous() if v_first else inputs.initial_state
    found = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "g": g, "beta": beta, "initial_state": state}
    if flags.get("use_gate_in_kernel"):
        found["A_log"] = torch.randn(g.shape[2], dtype=accumulator(g.dtype)) - 1
    if bias:
        found["dt_bias"] = torch.randn(g.shape[2], dtype=accumulator(g.dtype))
    return {name: t.detach().clone().requires_grad_() for name, t in found.items() if name not in without}


def by_hand(inputs: DeltaInputs, x: dict[str, Tensor], **flags: bool) -> tuple[Tensor, Tensor]:
    """The options in operations of torch, then the definition."""
    ones = torch.ones(inputs.beta.shape, dtype=F64)
    g, beta, state = x.get("g", 0 * ones), x.get("beta", ones), x["initial_state"]
    if flags.get("use_gate_in_kernel"):
        g = -x["A_log"].exp() * F.softplus(g + x.get("dt_bias", 0.0), threshold=1e6)
    if flags.get("use_beta_sigmoid_in_kernel"):
        beta = torch.sigmoid(beta) * (2 if flags.get("allow_neg_eigval") else 1)
    v_first = flags.get("state_v_first") or flags.get("transpose_state_layout")
    rest = inputs.cu_seqlens, inputs.scale, inputs.l2norm_qk
    o, S = gated_delta_rule(x["q"], x["k"], x["v"], g, beta, state.mT if v_first else state, *rest)
    return o, S.mT if v_first else S


def call(function, inputs: DeltaInputs, x: dict[str, Tensor], **flags: bool) -> tuple[Tensor, Tensor]:
    more = {"cu_seqlens": inputs.cu_seqlens, "use_qk_l2norm_in_kernel": inputs.l2norm_qk}
    return function(**x, **more, **flags, scale=inputs.scale, output_final_state=True)


@each_function
@pytest.mark.parametrize("shape, dtype", ((WHOLE, F64), (PACKED, F64), (PACKED, F32), (SHORT, BF16)))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*transpose_state_layout:DeprecationWarning")
def test_equals_the_same_by_hand(case, dtype, shape, function):
    inputs = delta_inputs(shape, dtype)
    flags = {name: value for name, value in CASES[case].items() if name not in ("bias", "without")}
    x = leaves_of(inputs, **CASES[case])
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    refs = by_hand(inputs, wide, **flags)
    with torch.no_grad():  # where the recurrent op works
        for name, out, ref in zip(("o", "final_state"), call(function, inputs, x, **flags), refs):
            assert_error(name, out, ref, TOLERANCE[dtype].output)
    outs = call(function, inputs, x, **flags)
    for name, out, ref in zip(("o", "final_state"), outs, refs):
        assert_error(name, out, ref, TOLERANCE[dtype].output)
    assert outs[1].dtype == (F64 if dtype == F64 else F32)
    cotangents = [torch.randn(ref.shape, dtype=F64) for ref in refs]
    found = torch.autograd.grad(outs, list(x.values()), [c.to(out) for c, out in zip(cotangents, outs)])
    expected = torch.autograd.grad(refs, list(wide.values()), cotangents)
    for name, grad, ref in zip(x, found, expected):
        gate = name in ("g", "beta", "A_log", "dt_bias")
        assert_error(f"d{name}", grad, ref, TOLERANCE[dtype].gate_gradient if gate else TOLERANCE[dtype].gradient)
        assert grad.dtype == x[name].dtype


@each_function
def test_gates_of_two_dtypes_are_computed_apart(function):
    inputs = delta_inputs(WHOLE, BF16)
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    x = leaves_of(inputs, **flags)
    x["g"], x["A_log"] = x["g"].detach().float(), x["A_log"].detach().to(BF16)
    refs = by_hand(inputs, {name: t.double() for name, t in x.items()}, **flags)
    for name, out, ref in zip(("o", "final_state"), call(function, inputs, x, **flags), refs):
        assert_error(name, out, ref, TOLERANCE[BF16].output)


@each_function
@pytest.mark.parametrize("narrow", (BF16, F16), ids=str)
def test_narrow_initial_states_are_cast(function, narrow):
    for dtype in (F32, F64):
        inputs = delta_inputs(SHORT, dtype)
        x = leaves_of(inputs)
        state = x["initial_state"].detach().to(narrow)
        wide = call(function, inputs, x | {"initial_state": state.to(dtype)})
        leaf = state.clone().requires_grad_()
        for name, out, ref in zip(("o", "final_state"), call(function, inputs, x | {"initial_state": leaf}), wide):
            assert_bitwise(out, ref, name)
        (grad,) = torch.autograd.grad(call(function, inputs, x | {"initial_state": leaf})[1].sum(), leaf)
        assert grad.dtype == narrow and grad.abs().sum() > 0


@each_function
def test_arguments_are_left_alone(function):
    inputs = delta_inputs(WHOLE)
    flags = dict.fromkeys(("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "state_v_first"), True)
    x = {name: t.detach() for name, t in leaves_of(inputs, bias=True, **flags).items()}
    before = {name: t.clone() for name, t in x.items()}
    call(function, inputs, x, **flags)
    for name, t in x.items():
        assert_bitwise(t, before[name], name)


HINTS = (
    {"chunk_size": 16},
    {"autotune_interval": 8},
    {"use_cache": True},
    {"use_cache": False},
    {"cu_seqlens_cpu": torch.tensor((0, 13, 13, 20))},
    {"chunk_indices": torch.tensor(((0, 0), (2, 0)))},
)


@each_function
@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: next(iter(hint)))
def test_hints_change_nothing(function, hint):
    inputs = delta_inputs(PACKED)
    x = leaves_of(inputs)
    for name, out, ref in zip(("o", "final_state"), call(function, inputs, x, **hint), call(function, inputs, x)):
        assert_bitwise(out, ref, name)


H, T, K, V = WHOLE.H, WHOLE.T, WHOLE.K, WHOLE.V
ONES, GATE = torch.ones(H), {"use_gate_in_kernel": True, "A_log": torch.ones(H)}
CU = torch.tensor((0, 13, 40))
REFUSED = {
    "gk": ({"gk": ONES}, NotImplementedError, "gk must be None: the decay is one number per token and value head"),
    "gv": ({"gv": ONES}, NotImplementedError, "gv must be None: the decay is one number per token and value head"),
    "cp_context": ({"cp_context": 1}, NotImplementedError, "cp_context must be None: no sequence is split"),
    "a number": ({"state_v_first": 1}, TypeError, "state_v_first must be True or False, got int"),
    "a tensor": ({"state_v_first": ONES}, TypeError, "state_v_first must be True or False, got torch.float32"),
    "no A_log": ({"use_gate_in_kernel": True}, TypeError, "A_log must be a floating-point Tensor with .*, got None"),
    "integers": (GATE | {"A_log": ONES.long()}, TypeError, "A_log must be a floating-point Tensor .*, got torch.int64"),
    "A_log's size": (
        GATE | {"A_log": ONES[:3]},
        RuntimeError,
        r"A_log \[H\] dimension 0 must be H = 4 .as in g., got 3",
    ),
    "dt_bias's size": (GATE | {"dt_bias": ONES[:3]}, RuntimeError, r"dt_bias \[H\] dimension 0 must be H = 4"),
    "A_log unused": ({"A_log": ONES}, ValueError, "A_log is used with use_gate_in_kernel=True only"),
    "dt_bias unused": ({"dt_bias": ONES}, ValueError, "dt_bias is used with use_gate_in_kernel=True only"),
    "g": (GATE | {"g": None}, ValueError, "g must be a Tensor with use_gate_in_kernel=True, got None"),
    "g's dtype": (GATE | {"g": torch.ones(2, T, H).long()}, RuntimeError, "g must be float32 or .*, got int64"),
    "g's shape": (GATE | {"g": torch.ones(2, 4, H)}, RuntimeError, r"g \[[BN],T,H\] dimension 1 must be T = 70"),
    "beta": (
        {"use_beta_sigmoid_in_kernel": True, "beta": None},
        ValueError,
        "beta must be a Tensor with use_beta_sigmoid_in_kernel=True, got None",
    ),
    "beta's shape": (
        GATE | {"use_beta_sigmoid_in_kernel": True, "beta": torch.ones(2, T, 3)},
        RuntimeError,
        r"beta must have the shape \[2,70,4\] of g, got \[2,70,3\]",
    ),
    "allow_neg_eigval": ({"allow_neg_eigval": True}, ValueError, "needs use_beta_sigmoid_in_kernel=True"),
    "both names": (
        {"state_v_first": True, "transpose_state_layout": True},
        ValueError,
        "transpose_state_layout is the old name of state_v_first; give one of the two",
    ),
    "K first": (
        {"state_v_first": True, "initial_state": torch.zeros(2, H, K, V)},
        RuntimeError,
        r"initial_state must be \[N,H,V,K\] with V = 12 and K = 8 .state_v_first=True., got \[2, 4, 8, 12\]",
    ),
    "chunk_size": ({"chunk_size": 48}, ValueError, "chunk_size must be 16, 32 or 64, got 48"),
    "autotune_interval": ({"autotune_interval": 0}, ValueError, "autotune_interval must be an int of at least 1"),
    "use_cache": ({"use_cache": 1}, TypeError, "use_cache must be True, False or None, got int"),
    "cu_seqlens_cpu alone": ({"cu_seqlens_cpu": CU}, ValueError, "cu_seqlens_cpu belongs to cu_seqlens, which is None"),
    "chunk_indices alone": ({"chunk_indices": CU}, ValueError, "chunk_indices belongs to cu_seqlens, which is None"),
    "a list": ({"cu_seqlens": CU, "cu_seqlens_cpu": [0]}, TypeError, "cu_seqlens_cpu must be a Tensor of int32 or"),
    "another": ({"cu_seqlens": CU, "cu_seqlens_cpu": CU[1:]}, ValueError, r"a copy of cu_seqlens \[3\] on the CPU"),
    "flat": (
        {"cu_seqlens": CU, "chunk_indices": CU},
        ValueError,
        r"chunk_indices must be \[chunks, 2\], .*, got \[3\]",
    ),
    "v": ({"v": None, "g": None}, RuntimeError, "v must be a Tensor, got None"),
    "v's rank": ({"v": torch.zeros(3), "beta": None}, RuntimeError, "v must have 4 dimensions"),
}


@each_function
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_name(function, case):
    arguments, kind, message = REFUSED[case]
    inputs = delta_inputs(WHOLE)
    x = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "g": inputs.g, "beta": inputs.beta, **arguments}
    with pytest.raises(kind, match=f"^{function.__name__}: .*{message}"):
        function(**x)


@each_function
@pytest.mark.parametrize("name", ("g", "beta", "A_log"))
def test_forward_mode_is_refused_under_the_names_of_here(function, name):
    inputs = delta_inputs(WHOLE)
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    x = {name: t.detach() for name, t in leaves_of(inputs, **flags).items()}
    with forward_ad.dual_level():
        x[name] = forward_ad.make_dual(x[name], torch.ones_like(x[name]))
        with pytest.raises(NotImplementedError, match=f"^{function.__name__}: {name} has a tangent"):
            call(function, inputs, x, **flags)


@each_function
def test_the_old_name_is_announced_where_it_is_used(function):
    inputs = delta_inputs(WHOLE._replace(state=False))
    with pytest.warns(DeprecationWarning, match=f"^{function.__name__}: .*state_v_first") as caught:
        function(*inputs[:5], transpose_state_layout=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*inputs[:5], state_v_first=False)


def test_beta_above_one_is_taken_as_it_is():
    """allow_neg_eigval gives strengths up to 2, which none of the ops refuses."""
    inputs = delta_inputs(WHOLE)
    x = leaves_of(inputs) | {"beta": (2 * torch.rand(inputs.beta.shape)).requires_grad_()}
    refs = by_hand(inputs, {name: t.double() for name, t in x.items()})
    for function in FUNCTIONS:
        for name, out, ref in zip(("o", "final_state"), call(function, inputs, x), refs):
            assert_error(name, out, ref, TOLERANCE[F32].output)


def test_options_are_the_keyword_only_arguments():
    for function in FUNCTIONS:
        parameters = inspect.signature(function).parameters.values()
        only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert list(only.items()) == list(Options._field_defaults.items())


@each_function
@pytest.mark.parametrize("case", ("V first", "what a layer of flash-linear-attention gives", "neither"))
def test_compiles_into_one_graph(function, case):
    inputs = delta_inputs(WHOLE)
    flags = {name: value for name, value in CASES[case].items() if name not in ("bias", "without")}
    x = leaves_of(inputs, **CASES[case])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    outs, refs = compiled(function, inputs, x, **flags), call(function, inputs, x, **flags)
    for name, out, ref in zip(("o", "final_state"), outs, refs):
        assert_bitwise(out, ref, name)
    for name, grad, ref in zip(
        x, *(torch.autograd.grad((o.sum(), S.sum()), list(x.values())) for o, S in (outs, refs))
    ):
        assert_bitwise(grad, ref, name)


@each_function
def test_raw_gates_of_fp64_tokens_are_computed_in_fp64(function):
    inputs = delta_inputs(SHORT, F64)
    g, beta, A_log = inputs.g.float(), inputs.beta.float(), torch.rand(SHORT.H)
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    narrow = function(*inputs[:3], g, beta, A_log=A_log, **flags)[0]
    assert_bitwise(narrow, function(*inputs[:3], g.double(), beta.double(), A_log=A_log.double(), **flags)[0])


@each_function
def test_a_raw_beta_of_integers_and_a_g_of_another_shape_are_refused(function):
    inputs = delta_inputs(SHORT, F32)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: beta must be float32"):
        function(*inputs[:4], inputs.beta.to(torch.int64), use_beta_sigmoid_in_kernel=True)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: g must have 3 dimensions"):
        gates = {"use_gate_in_kernel": True, "A_log": torch.rand(SHORT.H)}
        function(*inputs[:3], inputs.g[..., None], inputs.beta, **gates)


@each_function
def test_vmap(function):
    inputs = delta_inputs(SHORT, F64)
    k, v, g, beta = inputs[1:5]
    queries = torch.stack([inputs.q, 2 * inputs.q])
    found = torch.func.vmap(lambda q: function(q, k, v, g, beta)[0])(queries)
    for one, q in zip(found, queries):
        torch.testing.assert_close(one, function(q, k, v, g, beta)[0])


@pytest.mark.parametrize("function", ("recurrent_gated_delta_rule_", "prefill_gated_delta_rule_"))
@pytest.mark.parametrize("negative", (False, True), ids=("beta below 1", "beta below 2"))
def test_raw_gates_on_a_pool(function, negative):
    torch.manual_seed(0)
    N, H, K, V = 3, 4, 8, 5
    q, k, v, a, b = (torch.randn(N, 1, H, *sizes) for sizes in ((K,), (K,), (V,), (), ()))
    A_log, dt_bias, pool = torch.randn(H), torch.randn(H), torch.randn(N, H, K, V)
    more: tuple = ()
    if function == "prefill_gated_delta_rule_":
        q, k, v, a, b = (t.transpose(0, 1) for t in (q, k, v, a, b))
        more = (torch.arange(N + 1),)
    raw = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "use_beta_sigmoid_in_kernel": True}
    g, beta = jetkernels.delta_gates(a, b, A_log, dt_bias)
    pools = pool.clone(), pool.clone()
    run = getattr(jetkernels, function)
    o = run(q, k, v, a, b, pools[0], *more, **raw, allow_neg_eigval=negative)
    expected = run(q, k, v, g, 2 * beta if negative else beta, pools[1], *more)
    assert torch.equal(o, expected) and torch.equal(*pools)
    with pytest.raises(ValueError, match=f"^{function}: A_log is used with use_gate_in_kernel=True only"):
        run(q, k, v, g, beta, pool, *more, A_log=A_log)
