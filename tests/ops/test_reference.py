"""The reference agrees with itself: chunks with the token loop, the hand-written backward with autograd, hybrid with
itself.
"""

import pytest
import torch
from hypothesis import given
from support.arguments import DeltaInputs, cotangents, delta_inputs
from support.backends import dg_floor, reference_gradients
from support.comparison import assert_error, assert_gradients, assert_outputs
from support.shapes import DELTA_SHAPES, LENGTHS, DeltaShape, ids
from support.strategies import delta_shapes, seeds

from reference import chunk_gated_delta_rule as chunk
from reference.dynamic_conv import dynamic_conv
from reference.dynamic_conv_step import dynamic_conv_step
from reference.recurrent_gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule

F64 = torch.float64
EQUAL = 1e-10


def check(inputs: DeltaInputs, chunk_size: int = chunk.CHUNK) -> None:
    """Chunk forward and hand-written backward against the token loop and its autograd."""
    outs, refs = chunk.chunk_gated_delta_rule(*inputs, chunk_size=chunk_size), gated_delta_rule(*inputs)
    assert_outputs(outs, refs, F64)
    grads = cotangents(inputs)
    found = dict(zip(inputs._fields, chunk.chunk_gated_delta_rule_backward(*grads, *inputs, chunk_size=chunk_size)))
    autograd = reference_gradients("chunk_gated_delta_rule", inputs, grads)
    assert_gradients({name: found[name] for name in autograd}, autograd, F64, dg_floor(refs, grads))


@pytest.mark.parametrize("shape", DELTA_SHAPES, ids=ids)
def test_chunks_equal_the_token_loop(shape):
    check(delta_inputs(shape, F64))


@given(delta_shapes(), seeds)
def test_chunks_equal_the_token_loop_for_any_shape(shape, seed):
    check(delta_inputs(shape, F64, seed))


@pytest.mark.parametrize("chunk_size", (1, 2, 16, 63, 200))
def test_any_chunk_size_gives_the_same(chunk_size):
    check(delta_inputs(DeltaShape("two heads", T=130), F64), chunk_size)


@pytest.mark.parametrize("T", LENGTHS)
def test_decay_of_minus_infinity_forgets(T):
    inputs = delta_inputs(DeltaShape("forgets", T=T, H=1), F64)
    inputs.g[:, T // 2] = -torch.inf
    check(inputs)
    S = gated_delta_rule(*inputs)[1]
    late = inputs._replace(
        **{n: getattr(inputs, n)[:, T // 2 :] for n in ("q", "k", "v", "g", "beta")}, initial_state=None
    )
    assert_error("final_state", S, gated_delta_rule(*late)[1], EQUAL)


@pytest.mark.parametrize("sign", (1, -1), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(sign):
    inputs = delta_inputs(DeltaShape("correlated", T=129), F64)
    k = inputs.k[:, :1] * torch.tensor([1, sign], dtype=F64).repeat(65)[:129, None, None]
    check(inputs._replace(k=k, beta=torch.ones_like(inputs.beta), g=torch.zeros_like(inputs.g)))


def test_beta_zero_writes_nothing_and_has_a_gradient():
    inputs = delta_inputs(DeltaShape("beta = 0"), F64)
    inputs.beta[:, ::3] = 0
    check(inputs)


def test_stages_are_what_their_names_say():
    """T inverts I + diag(beta) kk; both inverses give one U; the last row of P and U is the token loop's line."""
    q, k, v, g, beta, S0, _, scale, _ = delta_inputs(DeltaShape("one chunk", T=20), F64)
    x = chunk.chunks_of(*chunk.heads_first(q, k, v, g, beta, True), scale, chunk.CHUNK)[0]
    identity = torch.eye(20, dtype=F64)
    T = chunk.inverse(x.kk, x.beta)
    assert_error("T", T @ (identity + x.beta[..., None] * x.kk), identity.expand_as(T), EQUAL)
    R = chunk.residual(x.v, x.k, x.c, S0)
    U = chunk.update(T, x.beta, R)
    assert_error("U'", x.beta[..., None] * (chunk.column_inverse(x.kk, x.beta) @ R), U, EQUAL)
    before = recurrent_gated_delta_rule(*(t[:, :19] for t in (q, k, v, g, beta)), S0, None, scale, True)[1]
    prediction = (g[:, 19, :, None, None].exp() * before).mT @ x.k[..., 19, :, None]
    u = x.beta[..., 19, None] * (x.v[..., 19, :] - prediction[..., 0])
    assert_error("u", U[..., 19, :], u, EQUAL)


def test_zero_keys_normalise_to_zeros():
    assert torch.equal(chunk.l2norm(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_pool_rows_without_an_index_are_returned_as_they_were():
    torch.manual_seed(0)
    q, k, v, g, beta, _, _, scale, _ = delta_inputs(DeltaShape("two sequences", B=2, T=3), F64)
    pool = torch.randn(4, 2, 8, 12, dtype=F64)
    o, after = recurrent_gated_delta_rule(q, k, v, g, beta, pool, torch.tensor([2, -1]), scale, True)
    assert torch.equal(after[[0, 1, 3]], pool[[0, 1, 3]]) and torch.equal(o[1], torch.zeros_like(o[1]))
    one, S = gated_delta_rule(*(t[:1] for t in (q, k, v, g, beta)), pool[2:3], None, scale, True)
    assert torch.equal(o[:1], one) and torch.equal(after[2:3], S)


def test_convolution_steps_equal_one_call():
    torch.manual_seed(0)
    x, hidden, weight, bias = (torch.randn(*s, dtype=F64) for s in ((2, 9, 5), (2, 9, 3), (20, 3), (20,)))
    state = torch.randn(2, 5, 3, dtype=F64)
    y, after = dynamic_conv(x, hidden, weight, bias, state, None, True)
    for t in range(9):
        step, state = dynamic_conv_step(x[:, t], hidden[:, t], weight, bias, state, None, True)
        assert_error("y", step, y[:, t], EQUAL)
    assert_error("conv_state", state, after, EQUAL)
