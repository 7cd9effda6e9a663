"""jet::chunk_gated_delta_rule: hard numbers, its arguments. test_sequence_ops.py has what is true of all such ops."""

import math

import pytest
import torch
from support import sequence_properties as properties
from support.arguments import DeltaInputs, cotangents, delta_inputs
from support.backends import check_gradients, check_outputs, dg_floor, each_backend, each_dtype, reference_gradients
from support.comparison import DTYPES, assert_bitwise, assert_error, assert_gradients, assert_outputs
from support.shapes import LENGTHS, DeltaShape, ids

from reference import chunk_gated_delta_rule as chunk
from reference.recurrent_gated_delta_rule import gated_delta_rule

OP = "chunk_gated_delta_rule"
F32, F64 = torch.float32, torch.float64


def random(dtype: torch.dtype = F32, seed: int = 0, **shape) -> DeltaInputs:
    return delta_inputs(DeltaShape("", **shape), dtype, seed)


def check(backend, inputs: DeltaInputs) -> None:
    check_outputs(backend, OP, inputs)
    check_gradients(backend, OP, inputs)


# ---- equals the reference


@each_backend
@pytest.mark.parametrize("g_dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("beta_dtype", DTYPES, ids=ids)
def test_gates_of_any_dtype(backend, g_dtype, beta_dtype):
    inputs = random(torch.bfloat16)
    inputs = inputs._replace(g=inputs.g.to(g_dtype), beta=inputs.beta.to(beta_dtype))
    check(backend, inputs)
    grads = properties.backward(backend, OP, inputs, cotangents(inputs))
    assert grads["g"].dtype == g_dtype and grads["beta"].dtype == beta_dtype


@each_backend
@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=ids)
@pytest.mark.parametrize("cu_seqlens", (None, (0, 700, 700, 1290)), ids=("rows", "packed"))
def test_many_heads_over_many_chunks(backend, dtype, cu_seqlens):
    """Backward recomputes states piece by piece; here the pieces are shorter than the sequence.

    The reference here is its own chunk form, which `test_reference` proves equal to differentiation of the token loop.
    """
    inputs = random(dtype, T=1290, H=32, K=128, V=128, cu_seqlens=cu_seqlens)
    grads, outs = cotangents(inputs), chunk.chunk_gated_delta_rule(*inputs)
    assert_outputs(backend(OP, *inputs), outs, dtype)
    refs = dict(zip(inputs._fields, chunk.chunk_gated_delta_rule_backward(*grads, *inputs)))
    assert_gradients(backend.gradients(OP, inputs, grads), refs, dtype, dg_floor(outs, grads))


@each_backend
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize("K, V, T", ((32, 64, 33), (96, 256, 200), (128, 130, 64), (64, 64, 97), (256, 64, 70)))
def test_states_of_16_bit_inputs_are_no_coarser_than_their_products(backend, dtype, K, V, T):
    """Left in bf16, the products with the state would give 2e-3."""
    inputs = random(dtype, T=T, Hk=1, H=2, K=K, V=V)
    _, state = backend(OP, *inputs)
    assert_error("final_state", state, gated_delta_rule(*inputs)[1], 2e-5)


# ---- calls, rows and sequences


@each_backend
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_equals_recurrent_equals_single_steps(backend, T):
    inputs = random(B=2, T=T)
    o, S = backend(OP, *inputs)
    *tokens, _, _, scale, l2norm = inputs
    state = inputs.initial_state.clone()
    assert_outputs((backend("recurrent_gated_delta_rule", *tokens, state, None, scale, l2norm), state), (o, S), F32)
    state, steps = inputs.initial_state.clone(), []
    for t in range(T):
        one = [x[:, t : t + 1] for x in tokens]
        steps.append(backend("recurrent_gated_delta_rule", *one, state, None, scale, l2norm))
    assert_outputs((torch.cat(steps, 1), state), (o, S), F32)


# ---- hard numbers


def recall(backend, dtype: torch.dtype, T: int) -> None:
    """g = 0 and orthogonal keys: what the first token wrote is read back unchanged after T tokens."""
    inputs = random(dtype, T=T, H=1, K=16, V=8, l2norm=False, state=False)
    k = torch.zeros_like(inputs.k)
    k[..., 0, :, 0] = 1
    k[:, 1:, :, 1] = 1
    q = torch.zeros_like(inputs.q)
    q[..., 0] = 1
    inputs = inputs._replace(q=q, k=k, g=torch.zeros_like(inputs.g), beta=torch.ones_like(inputs.beta), scale=1.0)
    o, S = backend(OP, *inputs)
    for t in (0, T // 2, T - 1):
        assert_bitwise(o[:, t], inputs.v[:, 0], f"token {t}")
    assert_bitwise(S[0, 0, 0].to(dtype), inputs.v[0, 0, 0], "state")


@each_backend
@each_dtype
def test_long_memory_is_exact(backend, dtype):
    """No state column that decays slowly is dropped, and no state between chunks is rounded to bf16."""
    recall(backend, dtype, 4096)


@each_backend
@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=ids)
def test_long_sequence_without_decay(backend, dtype):
    inputs = random(dtype, T=2048, K=16)
    check_outputs(backend, OP, inputs._replace(g=torch.zeros_like(inputs.g)))


@each_backend
@each_dtype
@pytest.mark.parametrize("T", (63, 129, 256))
@pytest.mark.parametrize("signs", ((1, 1), (1, -1)), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(backend, dtype, T, signs):
    """A low-precision inverse blows up here."""
    inputs = random(dtype, T=T)
    k = inputs.k[:, :1] * torch.tensor(signs, dtype=dtype).repeat(T)[:T, None, None]
    inputs = inputs._replace(k=k, beta=torch.ones_like(inputs.beta), g=torch.zeros_like(inputs.g))
    check(backend, inputs)
    nearly = inputs._replace(k=(k + 0.01 * inputs.k).to(dtype))
    check(backend, nearly)


@each_backend
@each_dtype
def test_strong_decay(backend, dtype):
    """A = 16: every token forgets nearly all before it."""
    inputs = random(dtype, T=130)
    g = -16 * torch.nn.functional.softplus(torch.randn(inputs.g.shape, dtype=F64) - 1)
    check(backend, inputs._replace(g=g.to(inputs.g.dtype)))


@each_backend
@pytest.mark.parametrize("g", (-30.0, -104.0, -1000.0, -torch.finfo(F32).max, -math.inf), ids=str)
@pytest.mark.parametrize("T", (1, 2, 63, 64, 65, 130))
def test_decay_that_forgets_everything(backend, T, g):
    """All exponents are masked and clamped before exp: sums of -inf give no NaN."""
    inputs = random(T=T, B=2)
    some = inputs.g.clone()
    some[:, T // 2 :: 7] = g
    check(backend, inputs._replace(g=some))
    check(backend, inputs._replace(g=torch.full_like(inputs.g, g)))


@each_backend
@each_dtype
def test_zero_keys_and_queries(backend, dtype):
    """l2norm of an all-zero row gives zeros."""
    inputs = random(dtype, T=130)
    inputs.q[:, ::3] = 0
    inputs.k[:, ::5] = 0
    o, S = backend(OP, *inputs)
    assert_outputs((o, S), gated_delta_rule(*inputs), dtype)
    assert_bitwise(o[:, ::3], torch.zeros_like(o[:, ::3]), "o of a zero query")
    # The gradient at a zero row is 1000 times larger than elsewhere (1 / sqrt(eps)), so it hides the others.
    grads = cotangents(inputs)
    found, refs = backend.gradients(OP, inputs, grads), reference_gradients(OP, inputs, grads)
    for name, step in (("q", 3), ("k", 5)):
        for rows in (slice(None, None, step), slice(1, None, step)):
            assert_error(f"d{name}", found[name][:, rows], refs[name][:, rows], 8e-3 if dtype != F64 else 1e-10)


@each_backend
def test_beta_zero_writes_nothing(backend):
    inputs = random(T=130)
    inputs.beta[:, ::2] = 0
    check(backend, inputs)
    still = inputs._replace(beta=torch.zeros_like(inputs.beta), g=torch.zeros_like(inputs.g))
    assert_bitwise(backend(OP, *still)[1], inputs.initial_state, "final_state")


@each_backend
def test_large_and_small_values(backend):
    inputs = random(T=130)
    scaled = inputs._replace(
        q=inputs.q * 1e15, k=inputs.k * 1e-2, v=inputs.v * 1e20, initial_state=inputs.initial_state * 1e20
    )
    check_outputs(backend, OP, scaled)


# ---- meaning of the arguments


@each_backend
def test_g_is_a_natural_logarithm(backend):
    """g = log(1/2) halves the state; it is neither a factor nor a base-2 logarithm."""
    inputs = random(T=1)
    inputs = inputs._replace(g=torch.full_like(inputs.g, math.log(0.5)), beta=torch.zeros_like(inputs.beta))
    assert_error("state", backend(OP, *inputs)[1], inputs.initial_state / 2, 1e-6)


@each_backend
def test_l2norm_flag_is_obeyed(backend):
    inputs = random(T=70)
    o, _ = backend(OP, *inputs)
    larger = inputs._replace(q=inputs.q * 8, k=inputs.k * 8)
    assert_error("o", backend(OP, *larger)[0], o, 1e-5)
    small = inputs._replace(q=inputs.q / 8, k=inputs.k / 8, l2norm_qk=False)
    check_outputs(backend, OP, small)
    assert (backend(OP, *small)[0] - o).abs().max() > 0.01


@each_backend
def test_scale_multiplies_the_output_alone(backend):
    inputs = random(T=70)
    (o, S), (o4, S4) = backend(OP, *inputs), backend(OP, *inputs._replace(scale=inputs.scale * 4))
    assert_error("o", o4, o * 4, 1e-6)
    assert_error("state", S4, S, 1e-6)


@each_backend
def test_no_initial_state_means_zeros(backend):
    inputs = random(T=130, state=False)
    zeros = inputs._replace(initial_state=torch.zeros(1, 2, 8, 12))
    for out, ref in zip(backend(OP, *inputs), backend(OP, *zeros)):
        assert_error("output", out, ref, 1e-7)
