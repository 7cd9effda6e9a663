"""Linear-attention blocks behind one interface: RetNet, GLA, Mamba2, DeltaNet, Gated DeltaNet, RWKV-7 and JetBlock.

Each follows its paper. What its released code does otherwise is said of each, but for what is true of all: K, V and H
are free, projections start as `fair_start_` says, and nothing is fused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.model.attention import rotary_table, rotate
from jetkernels.modules import GatedRMSNorm, JetBlock, JetBlockState, RMSNorm
from jetkernels.modules.initialization import init_weight_
from jetkernels.modules.jet_block import DECAY_RATES, TIME_STEPS
from jetkernels.modules.repeatable import RepeatableCall, may_be_repeated
from jetkernels.modules.weight_decay import exempt_from_weight_decay
from jetkernels.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

from .recurrences import decayed_linear_attention, rwkv7
from .shapes import Shape
from .short_convolution import ShortConvolution, init_static_taps_

NORM_EPS = 1e-5
# RMS of a block's first output (`fair_start_`). Small: what an untrained block adds to a trained model is noise.
FIRST_OUTPUT = 0.1
NOISE_TOKENS = 64  # from which it is measured


class LinearBlock(nn.Module, ABC):
    """A token mixer of fixed memory that stands where a model has its attention.

    Called as a JetBlock is: hidden states [B, T, C] -> [B, T, C]; `state`, if given, is what the block remembers of
    earlier tokens and is updated in place. A subclass says what it is made of (`build`), remembers (`memory`) and
    computes (`mix`); its output projection is `o_proj`. It starts as `fair_start_` says.

    Args:
        hidden_size: C.
        shape: K, V, H; the recurrent state has H*K*V elements in every block.

    Attributes:
        of_input: the projections of the layer input.
        input_rms: the RMS of the layer input that they are scaled for (`fair_start_`).
    """

    o_proj: nn.Linear

    def __init__(self, hidden_size: int, shape: Shape):
        super().__init__()
        self.hidden_size = hidden_size
        self.shape = shape
        self.of_input: list[nn.Linear] = []
        self.input_rms = 1.0
        self.build(*shape)
        fair_start_(self)

    @abstractmethod
    def build(self, K: int, V: int, H: int) -> None:
        """Makes the parameters and gives them their first values."""

    def memory(self) -> list[Sequence[int]]:
        """Shapes of the state's tensors for one sequence; the first is the recurrent state [H, K, V]."""
        K, V, H = self.shape
        return [(H, K, V)]

    @abstractmethod
    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Mixes x [B, T, C], which follows what `state` holds.

        Returns: y [B, T, C], and the state behind the last token.
        """

    def new_state(self, batch_size: int) -> list[Tensor]:
        """The state of `batch_size` sequences that have seen nothing."""
        weight = next(self.parameters())
        return [torch.zeros(batch_size, *shape, device=weight.device, dtype=weight.dtype) for shape in self.memory()]

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: list[Tensor] | None = None,
    ) -> Tensor:
        """Mixes x [B, T, C]. Padded and packed batches are refused: a comparison of blocks uses neither."""
        if attention_mask is not None or cu_seqlens is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask and cu_seqlens must be None")
        if x.numel() == 0:  # no tokens: there is nothing to mix or to remember
            return x.clone()
        if state is None:
            return self.mix(x, self.new_state(x.shape[0]))[0]
        if may_be_repeated(x):
            call = RepeatableCall(type(self).__name__, state, x)
            y, after = self.mix(x, list(call.before))
            call.finish(after, y)
            return y
        y, after = self.mix(x, state)
        for old, new in zip(state, after):
            old.copy_(new)
        return y

    def linear(self, outputs: int, inputs: int | None = None, bias: bool = False) -> nn.Linear:
        """A projection of the layer input, or else of `inputs` channels: input of RMS 1 makes output of RMS 1."""
        layer = nn.Linear(inputs or self.hidden_size, outputs, bias=bias)
        init_weight_(layer.weight, layer.in_features**-0.5)
        if bias:
            nn.init.zeros_(layer.bias)
        if inputs is None:
            self.of_input.append(layer)
        return layer

    def heads(self, x: Tensor) -> Tensor:
        """Splits x [..., H*n] into [..., H, n]."""
        return x.unflatten(-1, (self.shape.H, -1))


@torch.no_grad()
def fair_start_(block: LinearBlock | JetBlock, input_rms: float = 1.0) -> None:
    """Gives a block the start that every candidate has, so that none is ahead by the scale of its first values.

    The projections of the layer input start at N(0, 1/C): input of RMS 1, projections of RMS 1, at any width. Static
    taps, those of a dynamic convolution too (its generator's w2 stays zero), start as `init_taps_` says. With these the
    values in front of an output norm are above its epsilon; those of a JetBlock whose taps start at N(0, 0.02), as the
    library's do by themselves, are far below it. Last, the output projection is scaled so that the block's output of
    noise has the RMS FIRST_OUTPUT: what gates and norms in front of it make of the scale differs from block to block
    (layer-sequential unit variance, arXiv 1511.06422, for one layer).

    A LinearBlock has all of it from the beginning, for input of RMS 1; a JetBlock is drawn anew. On the meta device
    nothing is done.

    Args:
        block: changed in place.
        input_rms: of the layer input, by which the projections of it are divided; above 0. Behind a norm it is about
            the RMS of the norm's weight.
    """
    if isinstance(block, Jet):
        block = block.block
    weight, C = block.o_proj.weight, block.hidden_size
    if weight.is_meta:
        return
    if isinstance(block, JetBlock):
        convolution = block.dynamic_conv1d
        for layer in [getattr(block, f"{name}_proj") for name in "qkvgab"] + [convolution.kernel_generator.w1]:
            init_weight_(layer.weight, C**-0.5 / input_rms)
        init_static_taps_(convolution)
    else:
        for layer in block.of_input:
            layer.weight.mul_(block.input_rms / input_rms)
        block.input_rms = input_rms
    noise = input_rms * torch.randn(1, NOISE_TOKENS, C, generator=torch.Generator().manual_seed(0), device="cpu")
    output = block(noise.to(weight))
    weight.mul_(FIRST_OUTPUT / output.square().mean().sqrt())


def head_norm(o: Tensor) -> Tensor:
    """Group norm with one group per head and no parameters: o [..., V] to zero mean and unit variance."""
    return F.layer_norm(o, o.shape[-1:], eps=NORM_EPS)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """This library's op on unit q and k: the recurrent one for a single token, else the chunked one.

    Returns: o [B, T, H, V] and the state behind the last token.
    """
    rule = fused_recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    o, after = rule(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert after is not None  # it was asked for
    return o, after


def decay_parameters(heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log and dt_bias [H] as this library's JetBlock starts them, exempt from weight decay alike."""
    A_log = torch.empty(heads).uniform_(*map(math.log, DECAY_RATES))
    step = torch.empty(heads).uniform_(*map(math.log, TIME_STEPS)).exp()
    parameters = nn.Parameter(A_log), nn.Parameter(step + torch.log(-torch.expm1(-step)))
    for parameter in parameters:
        exempt_from_weight_decay(parameter)
    return parameters


class RetNet(LinearBlock):
    """Multi-scale retention (arXiv 2307.08621): fixed decay 1 - 2^(-5-h) of head h, rotated q and k, swish gate.

    S <- gamma_h S + k v^T;  o = S^T q K^-0.5;  y = W_o (swish(W_g x) * groupnorm(o))

    Differs from the released code (microsoft/torchscale): that divides decays and scores by their sums; its head norm
    is an RMS norm; it rotates neighbouring channels, and its frequencies reach 1e-4.
    """

    THETA = 1e4

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        if K % 2:
            raise ValueError(f"RetNet: K must be even (rotary positions), got {K}")
        self.q_proj, self.k_proj = self.linear(H * K), self.linear(H * K)
        self.v_proj, self.g_proj, self.o_proj = (
            self.linear(H * V),
            self.linear(H * V),
            self.linear(self.hidden_size, H * V),
        )

    def memory(self) -> list[Sequence[int]]:
        """The recurrent state, and how many tokens came before."""
        return [*super().memory(), (1,)]

    def new_state(self, batch_size: int) -> list[Tensor]:
        """See `LinearBlock.new_state`; the number of tokens is fp32 at least: bf16 counts to 256 only."""
        S, position = super().new_state(batch_size)
        return [S, position.to(torch.promote_types(position.dtype, torch.float32))]

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        S, position = state
        T = x.shape[1]
        rotary = rotary_table(position + torch.arange(T, device=x.device), self.shape.K, self.THETA)
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.shape.H, device=x.device, dtype=torch.float64))
        g = gamma.log().to(x.dtype)[:, None].expand(*x.shape[:2], -1, -1)
        o, S = decayed_linear_attention(rotate(q, *rotary) * self.shape.K**-0.5, rotate(k, *rotary), v, g, S)
        return self.o_proj(F.silu(self.g_proj(x)) * head_norm(o).flatten(-2)), [S, position + T]


class GLA(LinearBlock):
    """Gated linear attention (arXiv 2312.06635): a decay per channel of the keys, from a low-rank projection.

    alpha = sigmoid(W2 W1 x + b)^(1/16);  S <- diag(alpha) S + k v^T;  o = S^T q K^-0.5
    y = W_o (swish(W_r x + b_r) * norm(o))

    Differs from the released code (flash-linear-attention): its norm is an RMS norm, and W_r has no bias.
    """

    TEMPERATURE, RANK = 16, 16

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        self.q_proj, self.k_proj = self.linear(H * K), self.linear(H * K)
        self.v_proj, self.r_proj, self.o_proj = (
            self.linear(H * V),
            self.linear(H * V, bias=True),
            self.linear(self.hidden_size, H * V),
        )
        self.alpha_1, self.alpha_2 = self.linear(self.RANK), self.linear(H * K, self.RANK, bias=True)
        self.norm = nn.LayerNorm(V, NORM_EPS)

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        g = F.logsigmoid(self.heads(self.alpha_2(self.alpha_1(x)))) / self.TEMPERATURE
        o, S = decayed_linear_attention(q * self.shape.K**-0.5, k, v, g, state[0])
        return self.o_proj(F.silu(self.r_proj(x)) * self.norm(o).flatten(-2)), [S]


class Mamba2(LinearBlock):
    """Mamba2 (arXiv 2405.21060): H heads of V channels that share one input matrix B and one read-out C of K states.

    x, B, C = silu(conv(W x));  dt = softplus(W_dt x + dt_bias);  S <- exp(-exp(A_log) dt) S + dt B x^T
    o = S^T C + D x;  y = W_o rmsnorm(o * silu(W_z x))

    Differs from the released code (state-spaces/mamba): its convolution has a bias; exp(A_log) starts uniform in
    [1, 16], here log-uniform; D is exempt from weight decay.
    """

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        self.z_proj, self.xbc_proj, self.dt_proj = self.linear(H * V), self.linear(H * V + 2 * K), self.linear(H)
        self.conv = ShortConvolution(H * V + 2 * K)
        self.A_log, self.dt_bias = decay_parameters(H)
        self.D = nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(H * V, NORM_EPS)
        self.o_proj = self.linear(self.hidden_size, H * V)

    def memory(self) -> list[Sequence[int]]:
        """The recurrent state, and the convolution's last inputs."""
        return [*super().memory(), (3, self.conv.weight.shape[0])]

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        K, V, H = self.shape
        xbc, before = self.conv(self.xbc_proj(x), state[1])
        v, k, q = xbc.split([H * V, K, K], -1)
        v = self.heads(v)
        k, q = (t[:, :, None].expand(-1, -1, H, -1) for t in (k, q))
        dt = F.softplus(self.dt_proj(x) + self.dt_bias)[..., None]
        o, S = decayed_linear_attention(q, k, dt * v, -self.A_log.exp()[:, None] * dt, state[0])
        o = (o + self.D[:, None] * v).flatten(-2)
        return self.o_proj(self.norm(o * F.silu(self.z_proj(x)))), [S, before]


class DeltaNet(LinearBlock):
    """DeltaNet (arXiv 2406.06484): the delta rule without decay, short convolutions, unit q and k.

    q, k, v = silu(conv(W x));  beta = sigmoid(W_b x);  S <- S + beta k (v - S^T k)^T;  o = S^T q K^-0.5
    y = W_o rmsnorm(o)

    Computes what the released code (flash-linear-attention) does.
    """

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        self.q_proj, self.k_proj, self.v_proj = self.linear(H * K), self.linear(H * K), self.linear(H * V)
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConvolution(H * K),
            ShortConvolution(H * K),
            ShortConvolution(H * V),
        )
        self.b_proj, self.o_proj = self.linear(H), self.linear(self.hidden_size, H * V)
        self.norm = RMSNorm(V, NORM_EPS)

    def memory(self) -> list[Sequence[int]]:
        """The recurrent state, and the last inputs of the three convolutions."""
        K, V, H = self.shape
        return [*super().memory(), (3, H * K), (3, H * K), (3, H * V)]

    def log_decay(self, x: Tensor) -> Tensor:
        """Log decay [B, T, H] of x [B, T, C]: none."""
        return x.new_zeros(*x.shape[:2], self.shape.H)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """What the output projection is given of o [B, T, H, V]: its norm."""
        return self.norm(o)

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        (q, q_after), (k, k_after), (v, v_after) = (
            getattr(self, f"{name}_conv")(getattr(self, f"{name}_proj")(x), before)
            for name, before in zip("qkv", state[1:])
        )
        q, k, v = (self.heads(t) for t in (q, k, v))
        beta = torch.sigmoid(self.b_proj(x))
        o, S = gated_delta_rule(q, k, v, self.log_decay(x), beta, state[0])
        return self.o_proj(self.read_out(o, x).flatten(-2)), [S, q_after, k_after, v_after]


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (arXiv 2412.06464): DeltaNet with a decay per head and an output gate.

    S is first multiplied by exp(-exp(A_log) softplus(W_a x + dt_bias));  y = W_o (rmsnorm(o) * silu(W_g x))

    Differs from the released code (flash-linear-attention): there exp(A_log) starts uniform in [0, 16], here
    log-uniform in [1, 16].
    """

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        super().build(K, V, H)
        self.a_proj, self.g_proj = self.linear(H), self.linear(H * V)
        self.A_log, self.dt_bias = decay_parameters(H)
        self.norm = GatedRMSNorm(V, NORM_EPS)

    def log_decay(self, x: Tensor) -> Tensor:
        """Log decay [B, T, H] of x [B, T, C]."""
        return -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """The norm of o [B, T, H, V], gated by x."""
        return self.norm(o, self.heads(self.g_proj(x)))


class RWKV7(LinearBlock):
    """The time mixing of RWKV-7 (arXiv 2503.14456), but for its value residual.

    That comes from the first layer and is no part of a single block.

        x_c = x + (x_before - x) mu_c for c in r, w, k, v, a, g
        w = exp(-e^-0.5 sigmoid(w0 + tanh(x_w A_w) B_w));  a = sigmoid(a0 + x_a A_a B_a);  g = sigmoid(x_g A_g) B_g
        kappa = unit(k * xi);  k' = k (1 + (a - 1) alpha);  recurrence: `recurrences.rwkv7`
        y = W_o (g * (groupnorm(o) + (r . (rho * k')) v))

    Ranks and first values are those of the released training code (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py):
    the ranks of w and a are 2.5 sqrt(C), that of g 5 sqrt(C), rounded to a multiple of 32, at least 32.

    Differs from that code: no value residual; K, V and H are free, there each head has 64 channels; first values that
    depend on the layer's depth are those of half the depth, which a block does not know; W_o starts as `fair_start_`
    says, there at zero.
    """

    # How much of mu depends on the channel, for r, w, k, v, a, g.
    SHIFTS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
    DEPTH = 0.5  # of the layer, 0 to 1

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        C = self.hidden_size
        along = torch.arange(C) / C
        self.mu = nn.Parameter(torch.stack([1 - along ** (power * (1 - self.DEPTH)) for power in self.SHIFTS]))
        self.r_proj, self.k_proj, self.v_proj = self.linear(H * K), self.linear(H * K), self.linear(H * V)
        for projection, scale in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -scale * C**-0.5, scale * C**-0.5)
        self.w_1, self.w_2 = self.low_rank(H * K, 2.5, bias=True)
        self.a_1, self.a_2 = self.low_rank(H * K, 2.5, bias=True)
        self.g_1, self.g_2 = self.low_rank(H * V, 5.0)
        # Of each channel of the keys: where it lies among all, -1/2 to 1/2, and within its head, -1 to 1.
        place, in_head = torch.linspace(-0.5, 0.5, H * K), torch.linspace(-1, 1, K).repeat(H)
        in_head = in_head * in_head.abs()
        with torch.no_grad():
            self.w_2.bias.copy_(-5.5 + 6 * (place + 0.5) ** (1 + self.DEPTH**0.3) + 2.5 * in_head)
            self.a_2.bias.copy_(-0.19 + 0.3 * in_head + 0.4 * place)
        self.xi = nn.Parameter((0.71 - 0.1 * place).view(H, K))
        self.alpha, self.rho = (nn.Parameter(torch.full((H, K), value)) for value in (1.02, -0.04))
        self.norm = nn.GroupNorm(H, H * V, eps=NORM_EPS * V)
        self.o_proj = self.linear(C, H * V)

    def low_rank(self, outputs: int, ranks: float, bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
        """Two projections of rank `ranks` sqrt(C): the first zero, the second orthogonal and small."""
        rank = max(32, round(ranks * self.hidden_size**0.5 / 32) * 32)
        first, second = self.linear(rank), self.linear(outputs, rank, bias=bias)
        nn.init.zeros_(first.weight)
        if not second.weight.is_meta:  # there is no decomposition there
            nn.init.orthogonal_(second.weight, gain=0.1 * max(1, rank / outputs) ** 0.5)
        return first, second

    def memory(self) -> list[Sequence[int]]:
        """The recurrent state, and the last token."""
        return [*super().memory(), (1, self.hidden_size)]

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        before = torch.cat([state[1], x[:, :-1]], 1)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * mu for mu in self.mu)
        r, k, v = (self.heads(t) for t in (self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)))
        log_w = -(math.e**-0.5) * torch.sigmoid(self.heads(self.w_2(torch.tanh(self.w_1(x_w)))))
        a = torch.sigmoid(self.heads(self.a_2(self.a_1(x_a))))
        gate = self.g_2(torch.sigmoid(self.g_1(x_g)))
        kappa = F.normalize(k * self.xi, dim=-1)
        k = k * (1 + (a - 1) * self.alpha)
        o, S = rwkv7(r, log_w, k, v, kappa, a, state[0])
        o = self.norm(o.flatten(0, 1).flatten(-2)).view(*x.shape[:2], -1)
        bonus = (r * self.rho * k).sum(-1, keepdim=True) * v
        return self.o_proj(gate * (o + bonus.flatten(-2))), [S, x[:, -1:]]


class Jet(LinearBlock):
    """JetBlock (arXiv 2508.15884) behind this interface: `jetkernels.modules.JetBlock` itself.

    Differs from the released code (NVlabs/Jet-Nemotron): there exp(A_log) starts uniform in [0, 16], static taps at
    N(0, 0.02), here as `fair_start_` says.
    """

    def build(self, K: int, V: int, H: int) -> None:
        """See `LinearBlock.build`."""
        self.block = JetBlock(self.hidden_size, self.shape.config())

    def new_state(self, batch_size: int) -> list[Tensor]:
        """See `LinearBlock.new_state`: the recurrent state, and the convolution's last inputs."""
        inner = self.block.new_state(batch_size)
        return [inner.recurrent_state, inner.conv_state]

    def mix(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `LinearBlock.mix`."""
        inner = JetBlockState(state[1].clone(), state[0].clone())
        return self.block(x, state=inner), [inner.recurrent_state, inner.conv_state]


BLOCKS: dict[str, type[LinearBlock]] = {
    "RetNet": RetNet,
    "GLA": GLA,
    "Mamba2": Mamba2,
    "DeltaNet": DeltaNet,
    "Gated DeltaNet": GatedDeltaNet,
    "RWKV7": RWKV7,
    "JetBlock": Jet,
}


def equal_parameters(block: type[LinearBlock], hidden_size: int, shape: Shape) -> Shape:
    """`shape` with the V that brings the block's parameters closest to those of a JetBlock of `shape`."""
    if block is Jet:
        return shape

    def parameters(kind: type[LinearBlock], V: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in kind(hidden_size, shape._replace(V=V)).parameters())

    wanted, candidates = parameters(Jet, shape.V), range(1, 8 * shape.V + 1)
    above = bisect_left(candidates, wanted, key=lambda V: parameters(block, V))
    near = candidates[max(0, above - 1) : above + 1]
    return shape._replace(V=min(near, key=lambda V: abs(parameters(block, V) - wanted)))
