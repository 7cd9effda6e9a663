"""Each block against a token loop written from its own paper's recurrence, in fp64; splits of a sequence; gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from jetkernels.postnas.blocks import BLOCKS, LinearBlock
from jetkernels.postnas.recurrences import decayed_linear_attention
from jetkernels.postnas.recurrences import rwkv7 as rwkv7_recurrence
from jetkernels.postnas.shapes import Shape
from reference.jet_block import jet_block

C, SHAPE = 20, Shape(6, 10, 2)
K, V, H = SHAPE


def block_of(name: str, dtype=torch.float64) -> LinearBlock:
    """Every parameter away from its neutral initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        block = BLOCKS[name](C, SHAPE)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return block.to(dtype)


def inputs(T: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, T, C, generator=torch.Generator().manual_seed(T), dtype=torch.float64).to(dtype)


def convolved(weight, x):
    """silu of the causal depthwise convolution of x [T, D], one token and tap at a time."""
    rows = []
    for t in range(len(x)):
        taps = [weight[:, w] * x[t - 3 + w] for w in range(4) if t - 3 + w >= 0]
        rows.append(F.silu(sum(taps)))
    return torch.stack(rows)


def unit(x):
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def standardised(o, eps=1e-5):
    return (o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def retnet(m, x):
    gamma = [1 - 2.0 ** (-5 - h) for h in range(H)]
    frequency = 1e4 ** -(torch.arange(0, K, 2, dtype=torch.float32).double() / K)
    S, out = x.new_zeros(H, K, V), []
    for t, u in enumerate(x):
        angle = t * frequency
        turn = torch.complex(angle.cos(), angle.sin())

        def rotated(projection):
            a, b = projection(u).view(H, 2, K // 2).unbind(1)
            z = torch.complex(a, b) * turn
            return torch.cat([z.real, z.imag], -1)

        q, k, v = rotated(m.q_proj) / K**0.5, rotated(m.k_proj), m.v_proj(u).view(H, V)
        S = torch.stack([gamma[h] * S[h] + torch.outer(k[h], v[h]) for h in range(H)])
        o = torch.stack([q[h] @ S[h] for h in range(H)])
        out.append(m.o_proj(F.silu(m.g_proj(u)) * standardised(o).flatten()))
    return torch.stack(out)


def gla(m, x):
    S, out = x.new_zeros(H, K, V), []
    for u in x:
        alpha = torch.sigmoid(m.alpha_2(m.alpha_1(u))).pow(1 / 16).view(H, K)
        q, k, v = m.q_proj(u).view(H, K) / K**0.5, m.k_proj(u).view(H, K), m.v_proj(u).view(H, V)
        S = torch.stack([torch.diag(alpha[h]) @ S[h] + torch.outer(k[h], v[h]) for h in range(H)])
        o = torch.stack([q[h] @ S[h] for h in range(H)])
        o = standardised(o) * m.norm.weight + m.norm.bias
        out.append(m.o_proj(F.silu(m.r_proj(u)) * o.flatten()))
    return torch.stack(out)


def mamba2(m, x):
    xbc = convolved(m.conv.weight, m.xbc_proj(x))
    S, out = x.new_zeros(H, K, V), []
    for t, u in enumerate(x):
        v, B, read = xbc[t, : H * V].view(H, V), xbc[t, H * V : H * V + K], xbc[t, H * V + K :]
        dt = F.softplus(m.dt_proj(u) + m.dt_bias)
        S = torch.stack([torch.exp(-m.A_log[h].exp() * dt[h]) * S[h] + dt[h] * torch.outer(B, v[h]) for h in range(H)])
        o = torch.stack([read @ S[h] + m.D[h] * v[h] for h in range(H)]).flatten()
        out.append(m.o_proj(rms(o * F.silu(m.z_proj(u)), m.norm.weight)))
    return torch.stack(out)


def delta_net(m, x, gated=False):
    q, k, v = (convolved(getattr(m, f"{n}_conv").weight, getattr(m, f"{n}_proj")(x)) for n in "qkv")
    S, out = x.new_zeros(H, K, V), []
    for t, u in enumerate(x):
        beta = torch.sigmoid(m.b_proj(u))
        decay = torch.exp(-m.A_log.exp() * F.softplus(m.a_proj(u) + m.dt_bias)) if gated else torch.ones(H)
        qt, kt, vt = unit(q[t].view(H, K)) / K**0.5, unit(k[t].view(H, K)), v[t].view(H, V)
        rows = []
        for h in range(H):
            keep = torch.eye(K) - beta[h] * torch.outer(kt[h], kt[h])
            rows.append(decay[h] * keep @ S[h] + beta[h] * torch.outer(kt[h], vt[h]))
        S = torch.stack(rows)
        o = rms(torch.stack([qt[h] @ S[h] for h in range(H)]), m.norm.weight)
        if gated:
            o = o * F.silu(m.g_proj(u).view(H, V))
        out.append(m.o_proj(o.flatten()))
    return torch.stack(out)


def rwkv7(m, x):
    S, before, out = x.new_zeros(H, V, K), x.new_zeros(C), []
    for u in x:
        x_r, x_w, x_k, x_v, x_a, x_g = (u + (before - u) * mu for mu in m.mu)
        before = u
        r, k, v = m.r_proj(x_r).view(H, K), m.k_proj(x_k).view(H, K), m.v_proj(x_v).view(H, V)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(m.w_2(torch.tanh(m.w_1(x_w))))).view(H, K)
        a = torch.sigmoid(m.a_2(m.a_1(x_a))).view(H, K)
        kappa = k * m.xi
        kappa = kappa / kappa.norm(dim=-1, keepdim=True)
        k = k * (1 + (a - 1) * m.alpha)
        rows = []
        for h in range(H):
            transition = torch.diag(w[h]) - torch.outer(kappa[h], a[h] * kappa[h])
            rows.append(S[h] @ transition + torch.outer(v[h], k[h]))
        S = torch.stack(rows)
        o = standardised(torch.stack([S[h] @ r[h] for h in range(H)]), eps=1e-5 * V)
        o = o.flatten() * m.norm.weight + m.norm.bias
        bonus = torch.stack([(r[h] * m.rho[h] * k[h]).sum() * v[h] for h in range(H)]).flatten()
        out.append(m.o_proj(m.g_2(torch.sigmoid(m.g_1(x_g))) * (o + bonus)))
    return torch.stack(out)


def jet(m, x):
    weights = dict(m.block.named_parameters())
    return jet_block(x[None], weights, norm_eps=m.block.config.norm_eps, dtype=torch.float64)[0][0]


LOOPS = {
    "RetNet": retnet,
    "GLA": gla,
    "Mamba2": mamba2,
    "DeltaNet": delta_net,
    "Gated DeltaNet": lambda m, x: delta_net(m, x, gated=True),
    "RWKV7": rwkv7,
    "JetBlock": jet,
}


@pytest.fixture(autouse=True)
def fp64():
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(old)


@pytest.mark.parametrize("T", [1, 5, 37])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block_equals_its_papers_token_loop(name, T):
    block, x = block_of(name), inputs(T)
    expected = torch.stack([LOOPS[name](block, row) for row in x])
    # RetNet's rotary tables are fp32.
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5 if name == "RetNet" else 1e-9)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("pieces", [[1] * 23, [16, 7], [3, 20]])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_any_split_into_calls_equals_one_call(name, pieces):
    block, x = block_of(name), inputs(23)
    state = block.new_state(2)
    assert state[0][0].numel() == SHAPE.state
    parts = [block(part, state=state) for part in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(x), rtol=0, atol=1e-9)
    whole = block.new_state(2)
    block(x, state=whole)
    for a, b in zip(state, whole):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_reach_every_parameter(name):
    block, x = block_of(name), inputs(19).requires_grad_()
    block(x).pow(2).sum().backward()
    assert x.grad.abs().sum() > 0
    for parameter, value in block.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter


def test_decayed_attention_has_the_gradients_of_the_recurrence():
    def draw(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()

    q, k, v, state = draw(1, 21, 2, 3), draw(1, 21, 2, 3), draw(1, 21, 2, 4), draw(1, 2, 3, 4)
    g = torch.randn(1, 21, 2, 3, generator=torch.Generator().manual_seed(0)).abs().neg().requires_grad_()
    assert torch.autograd.gradcheck(decayed_linear_attention, (q, k, v, g, state), fast_mode=True)
    strong = torch.full_like(g, -1e4)
    o, last = decayed_linear_attention(q, k, v, strong, state)
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v)
    assert last.isfinite().all()


def gradients(rule, inputs, weights, dtype):
    """Of q, k, v, g and the state, for the sum of the rule's two results under `weights`."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in inputs]
    sum((y * w.to(dtype)).sum() for y, w in zip(rule(*leaves), weights)).backward()
    return [leaf.grad for leaf in leaves]


def decayed_loop(q, k, v, g, state):
    """The recurrence of `decayed_linear_attention`, token by token."""
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


TOKENS = 40  # two chunks and a part of one
DECAYS = {f"{decay}": torch.tensor(decay) for decay in (-0.001, -0.1, -1.0, -10.0, -20.0, -50.0)} | {
    "strong among weak": torch.where(torch.arange(TOKENS) % 3 == 0, -20.0, -0.01),
    "forgetting everything": torch.where(torch.arange(TOKENS) % 7 == 3, -math.inf, -0.1),
}


@pytest.mark.parametrize("rates", [1, 6], ids=["a rate per head", "a rate per channel"])
@pytest.mark.parametrize("decay", DECAYS)
def test_decayed_attention_has_accurate_gradients_at_every_decay(decay, rates):
    """fp32 chunks against fp64 differentiation of the token loop, dg of each single token too: weak tokens must not
    leave their rounding in the gradient of a strong one.
    """
    draw = torch.Generator().manual_seed(1)
    T = TOKENS

    def randn(*shape):  # exact in fp32, as both sides get it
        return torch.randn(shape, generator=draw, dtype=torch.float32).double()

    inputs = [randn(2, T, 2, 6), randn(2, T, 2, 6), randn(2, T, 2, 5)]
    spread = 0.5 + torch.rand(2, T, 2, rates, generator=draw, dtype=torch.float32).double()
    g = (DECAYS[decay].reshape(-1, 1, 1) * spread).float().double()
    inputs += [g, randn(2, 2, 6, 5)]
    weights = randn(2, T, 2, 5), randn(2, 2, 6, 5)
    expected = gradients(decayed_loop, inputs, weights, torch.float64)
    found = gradients(decayed_linear_attention, inputs, weights, torch.float32)
    for name, got, want in zip(["q", "k", "v", "g", "state"], found, expected):
        assert (got - want).norm() < 2e-6 * want.norm(), name
    by_token = [t.transpose(0, 1).flatten(1).norm(dim=1) for t in (found[3] - expected[3], expected[3])]
    assert (by_token[0] <= 1e-5 * by_token[1]).all(), (by_token[0] / by_token[1]).max()


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_rwkv7_in_chunks_is_exact_to_fp32_at_every_decay_it_can_have(strength):
    """fp32 chunks against an fp64 token loop: the two factors of a decay lose no more than the loop itself does in
    fp32.
    """
    draw = torch.Generator().manual_seed(3)
    r, k, kappa = (torch.randn(2, 50, 2, 6, generator=draw, dtype=torch.float64) for _ in range(3))
    v, state = (
        torch.randn(2, 50, 2, 5, generator=draw, dtype=torch.float64),
        torch.randn(2, 2, 6, 5, generator=draw, dtype=torch.float64),
    )
    g, a = -(math.e**-0.5) * strength * torch.ones_like(r), torch.rand(r.shape, generator=draw, dtype=torch.float64)
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    S, expected = state, []
    for t in range(50):
        removed = torch.einsum("bhk,bhkv->bhv", kappa[:, t], S)
        taken = (a * kappa)[:, t, :, :, None] * removed[:, :, None]
        S = g[:, t].exp()[..., None] * S - taken + k[:, t, :, :, None] * v[:, t, :, None]
        expected.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    o, last = rwkv7_recurrence(*(t.float() for t in (r, g, k, v, kappa, a, state)))
    for got, want in ((o, torch.stack(expected, 1)), (last, S)):
        assert (got - want).norm() < 2e-6 * want.norm()


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_in_bf16_errs_by_roundings_however_many_tokens_came(name):
    """Against the same weights in fp64, past the 256 to which bf16 counts; in one call and token by token."""
    block = BLOCKS[name](32, Shape(8, 8, 2)).to(torch.bfloat16)
    x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = copy.deepcopy(block).double()(x.double())
    state = block.new_state(1)
    steps = torch.cat([block(token, state=state) for token in x.split(1, 1)], 1)
    for got in (block(x), steps):
        assert got.dtype == torch.bfloat16
        for part, want in zip(got.double().split(60, 1), expected.split(60, 1)):
            assert (part - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("shape", [(0, 3, C), (2, 0, C), (0, 0, C)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_no_tokens_give_no_outputs_and_change_no_state(name, shape):
    block, x = block_of(name), torch.zeros(shape).requires_grad_()
    state = [torch.ones_like(t) for t in block.new_state(shape[0])]
    assert block(x).shape == shape
    y = block(x.detach(), state=state)
    assert y.shape == shape and all(t.eq(1).all() for t in state)
    block(x).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_batches_are_refused(name):
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens must be None"):
        block_of(name)(inputs(3), cu_seqlens=torch.tensor([0, 3]))
