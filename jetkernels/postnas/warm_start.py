"""JetBlocks that begin from the full attention that they replace, instead of from random values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jetkernels.model.attention import Attention
from jetkernels.modules import JetBlock
from jetkernels.modules.jet_block import TIME_STEPS

NEUTRAL = 1.2784645427610738  # silu(NEUTRAL) = 1
# Of the mean square of the input; without it the fit of a constant is exact on few tokens and arbitrary on others.
RIDGE = 1e-3
# Share of a constant that a linear function of the input must explain; below, a gate of it is far from constant.
CONSTANT_ENOUGH = 0.5


@torch.no_grad()
def warm_start_(block: JetBlock, attention: Attention, hidden_states: Tensor, outputs: Tensor) -> None:
    """Lets a JetBlock begin from the attention that it replaces.

    q, k, v and o projections are the attention's, its key heads repeated. The convolution passes the current token.
    Every write has strength 1/2. The heads keep exp(-0.001) to exp(-0.1) of their state from token to token, whatever
    the token, evenly in the logarithm. The output gate has no bias, so that its projection is the linear function of
    the input that is nearest to the constant of which SiLU makes 1 (ridge regression over `hidden_states`).
    o_norm.weight is one number: with it the output has the RMS of the attention's.

    A JetBlock of `shapes.matching_shape` takes the projections whole. In another one
        head h of H begins from attention head h * heads // H, and has its share of the output where several do;
        K below head_dim takes the channels in which q and k have the largest product of norms, V below it those of v
        and o;
        what K and V above head_dim add keeps its values, with no weight in o_proj.

    What has no place in a JetBlock is left out: rotary positions and the biases of q, k and v. The weights of q and k
    norms, if there are any, multiply the rows of the projections; the delta rule normalises q and k itself.

    Args:
        block: changed in place; w1 of its generator keeps its values.
        attention: of the same hidden size C.
        hidden_states: [B, T, C], what the attention is given in its model; B*T at least C.
        outputs: [B, T, C], what it makes of them.

    Raises:
        ValueError: sizes do not fit, or no linear function of hidden_states is nearly constant.
    """
    C = block.hidden_size
    if attention.q_proj.in_features != C:
        got = attention.q_proj.in_features
        raise ValueError(f"warm start: attention must have hidden size {C}, as the block, got {got}")
    for name, value in (("hidden_states", hidden_states), ("outputs", outputs)):
        if value.dim() != 3 or value.shape[2] != C or value.shape != hidden_states.shape:
            raise ValueError(f"warm start: {name} must be [B, T, {C}], both alike, got {list(value.shape)}")
    if hidden_states[..., 0].numel() < C:
        raise ValueError(
            f"warm start: hidden_states must be of at least {C} tokens, as many as they have channels, "
            f"got {hidden_states[..., 0].numel()}"
        )
    constant = _constant(hidden_states)
    _copy_projections_(block, attention)
    convolution = block.dynamic_conv1d
    taps = convolution.kernel_generator.w2.bias.view(convolution.channels, convolution.kernel_size)
    nn.init.zeros_(convolution.kernel_generator.w2.weight)
    nn.init.zeros_(taps)
    nn.init.ones_(taps[:, -1])
    for gate in (block.a_proj, block.b_proj):
        nn.init.zeros_(gate.weight)
    slowest, fastest = TIME_STEPS
    step = torch.logspace(0, 1, block.config.num_heads, base=fastest / slowest, dtype=torch.float64) * slowest
    block.A_log.zero_()
    block.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
    block.g_proj.weight.copy_((NEUTRAL * constant).expand_as(block.g_proj.weight))
    nn.init.ones_(block.o_norm.weight)
    first = block(hidden_states.to(block.o_proj.weight.dtype))
    block.o_norm.weight.mul_(_rms(outputs) / _rms(first))


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def _constant(hidden_states: Tensor) -> Tensor:
    """The w [C] with which <w, x> is nearest to 1 over the tokens, and 1 in their mean."""
    x = hidden_states.flatten(0, 1).double()
    mean, second = x.mean(0), x.mT @ x / len(x)
    second.diagonal().add_(RIDGE * second.diagonal().mean())
    w = torch.linalg.solve_ex(second, mean).result  # NaN where all is zero
    explained = mean @ w
    if not explained >= CONSTANT_ENOUGH:
        raise ValueError(
            f"warm start: a linear function of hidden_states must be nearly constant for a neutral gate; "
            f"the nearest explains {explained:.2f} of a constant, needed {CONSTANT_ENOUGH}"
        )
    return w / explained


def _copy_projections_(block: JetBlock, attention: Attention) -> None:
    H, K, V, d = block.config.num_heads, block.config.head_dim, block.config.head_v_dim, attention.head_dim
    heads = attention.q_proj.out_features // d
    source = torch.arange(H) * heads // H  # the attention head of each head
    share = 1 / torch.bincount(source, minlength=heads)[source]

    def rows(name: str) -> Tensor:
        """Of each head of the block, the attention's rows [H, d, C]."""
        weight = getattr(attention, f"{name}_proj").weight.unflatten(0, (-1, d))
        norm = getattr(attention, f"{name}_norm", None)
        weight = weight if norm is None else weight * norm.weight[:, None]
        return weight.repeat_interleave(heads // len(weight), 0)[source]

    q, k, v = map(rows, "qkv")
    o = attention.o_proj.weight.unflatten(1, (heads, d)).permute(1, 2, 0)[source]
    of_keys, of_values = _strongest(q, k, K), _strongest(v, o, V)
    nn.init.zeros_(block.o_proj.weight)
    o = o * share.to(o)[:, None, None]
    targets = {name: getattr(block, f"{name}_proj").weight.unflatten(0, (H, -1)) for name in "qkv"}
    targets["o"] = block.o_proj.weight.unflatten(1, (H, V)).permute(1, 2, 0)
    for (name, target), weight in zip(targets.items(), (q, k, v, o)):
        kept = of_keys if name in "qk" else of_values
        target[:, : kept.shape[1]] = weight.take_along_dim(kept, 1)


def _strongest(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Up to `count` channels of each head [H, n, 1], in order: those of the largest norms in a times b [H, d, C]."""
    strength = a.norm(dim=2) * b.norm(dim=2)
    return strength.topk(min(count, a.shape[1]), 1).indices.sort(1).values[..., None]
