"""JetBlock: dynamic convolution on the values, gated delta rule, gated norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from jetkernels.ops import chunk_gated_delta_rule, delta_gates, jet_block_step_, recurrent_gated_delta_rule_

from . import checks
from .dynamic_conv import DynamicShortConvolution, KernelGenerator
from .fused import fusible, is_plain
from .initialization import init_weight_
from .jet_block_config import JetBlockConfig as JetBlockConfig  # pickled models look for it here
from .jet_block_state import JetBlockDraft, JetBlockState
from .linear import computing_device, floating_weight
from .norm import GatedRMSNorm
from .padding import find_padding
from .projections import FusedProjections, apply, project
from .repeatable import RepeatableCall, may_be_repeated
from .stand_in import is_as_written
from .weight_decay import exempt_from_weight_decay

# Decay rates exp(A_log) and time steps softplus(dt_bias) of a new layer: log-uniform over these ranges, so that from
# the start some heads forget within a few tokens (rate * step near 1.6) and some remember for thousands (near 0.001).
DECAY_RATES = (1.0, 16.0)
TIME_STEPS = (1e-3, 1e-1)
# The decay is an exponential of a product of these two: a bf16 rounding of them would move every state.
GATE_PARAMETERS = ("A_log", "dt_bias")
# Their names, also where torch.nn.utils.prune or a parametrization stands before them.
GATE_NAMES = tuple(
    form.format(name) for name in GATE_PARAMETERS for form in ("{}", "{}_orig", "parametrizations.{}.original")
)


class _Projections(NamedTuple):
    """What a layer's input [..., C] is projected to, before any activation.

    Attributes:
        q: [..., H, K].
        k: [..., H, K].
        v: [..., D], of the convolution's input.
        hidden: [..., R], of the taps' generator; None where the convolution is called as a module.
        a: [..., H], of the decay.
        b: [..., H], of the write strength.
        gate: [..., H, V], of the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None
    a: Tensor
    b: Tensor
    gate: Tensor


def _are_of_one_op(projected: _Projections, parameters: Sequence[Tensor]) -> bool:
    """Whether `jet_block_step_` takes their dtypes. An adapter may give another one than it gets."""
    dtype = projected.q.dtype
    for t in projected:
        if t is not None and t.dtype != dtype:
            return False
    for t in parameters:
        if t.dtype != dtype and (t.dtype != torch.float32 or dtype == torch.float64):
            return False
    return True


class JetBlock(FusedProjections):
    """The linear-attention layer of Jet-Nemotron (arXiv 2508.15884, section on JetBlock).

    ::

        q = silu(q_proj(x));  k = silu(k_proj(x));  v = dynamic_conv1d(v_proj(x), x)
        beta = sigmoid(b_proj(x));  g = -exp(A_log) * softplus(a_proj(x) + dt_bias)
        o = gated delta rule of (l2norm(q), l2norm(k), v, g, beta), scale K^-0.5
        y = o_proj(rmsnorm(o) * o_norm.weight * silu(g_proj(x)))

    Gates and norm compute in fp32. A_log [H] and dt_bias [H] stay fp32 when the module is cast to a narrower dtype
    and when a narrower checkpoint is loaded. Both have `_no_weight_decay = True`, as in flash-linear-attention: whoever
    makes the optimiser should not let them decay (towards a decay rate of 1).

    Args:
        hidden_size: C.
        jet_block_config: the other sizes; those of the published 2B model if None.
        initializer_range: standard deviation of the projections.
        device: of the parameters.
        dtype: of the parameters; A_log and dt_bias are fp32 at least.
    """

    def __init__(
        self,
        hidden_size: int,
        jet_block_config: JetBlockConfig | None = None,
        initializer_range: float = 0.02,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        config = JetBlockConfig() if jet_block_config is None else jet_block_config
        if not isinstance(config, JetBlockConfig):
            raise ValueError(f"JetBlock: jet_block_config must be a JetBlockConfig, got {type(config).__name__}")
        hidden_size = checks.count("JetBlock: hidden_size", hidden_size)
        self.hidden_size = hidden_size
        self.config = config
        self.initializer_range = initializer_range
        H, key_dim, value_dim = config.num_heads, config.key_dim, config.value_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, key_dim)
        self.k_proj = linear(hidden_size, key_dim)
        self.v_proj = linear(hidden_size, value_dim)
        self.g_proj = linear(hidden_size, value_dim)
        self.a_proj = linear(hidden_size, H)
        self.b_proj = linear(hidden_size, H)
        self.o_proj = linear(value_dim, hidden_size)
        self.dynamic_conv1d = DynamicShortConvolution(
            value_dim,
            config.conv_size,
            hidden_size,
            config.dconv_generator_reduction,
            initializer_range=initializer_range,
            device=device,
            dtype=dtype,
        )
        self.o_norm = GatedRMSNorm(config.head_v_dim, config.norm_eps, device=device, dtype=dtype)
        gate_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(H, device=device, dtype=gate_dtype))
        self.dt_bias = nn.Parameter(torch.empty(H, device=device, dtype=gate_dtype))
        self._exempt_from_weight_decay()
        self.reset_parameters()
        self.fuse()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew; does nothing on the meta device."""
        if self.A_log.is_meta:
            return
        for name in "qkvgabo":
            init_weight_(getattr(self, f"{name}_proj").weight, self.initializer_range)
        self.dynamic_conv1d.reset_parameters()
        self.o_norm.reset_parameters()
        self.A_log.uniform_(*(math.log(rate) for rate in DECAY_RATES))
        step = self.dt_bias.uniform_(*(math.log(step) for step in TIME_STEPS)).exp()
        # The inverse of softplus: softplus(dt_bias) = step.
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def new_state(self, batch_size: int, *, device: Device = None, dtype: torch.dtype | None = None) -> JetBlockState:
        """A state of `batch_size` sequences that have seen nothing; its device and dtype are the layer's by default."""
        weight = floating_weight(self.o_proj, self.o_norm)
        device = device or computing_device(self, weight)
        return JetBlockState.zeros(self.config, batch_size, device=device, dtype=dtype or weight.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: JetBlockState | JetBlockDraft | None = None,
    ) -> Tensor:
        """Mixes the tokens of each sequence with those before them.

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, T], zero at padding, which may be anywhere; output rows there are zero.
            cu_seqlens: [N+1] int32 or int64 boundaries of sequences packed into one row (B = 1); not with a mask.
            state: memory of the N sequences before this call (`new_state`), updated in place; carries no gradient.
                Under `torch.utils.checkpoint` the second run starts from the state as the first found it and leaves it
                alone; where it cannot know which call it repeats it raises RuntimeError. A JetBlockDraft of it: the
                tokens are drafts and the state stays as it is; no mask, no cu_seqlens, no gradient.

        Returns: [B, T, C], in the dtype of hidden_states.
        """
        self._check(hidden_states, attention_mask, cu_seqlens, state)
        B, T, _ = hidden_states.shape
        padding = None
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("JetBlock: attention_mask and cu_seqlens exclude each other; got both")
            padding = find_padding(attention_mask, B, T, hidden_states.device)
        call = None
        if isinstance(state, JetBlockState) and may_be_repeated(hidden_states):
            call = RepeatableCall("JetBlock", state, hidden_states)
        if padding is None:
            return self._run(hidden_states, cu_seqlens, state, call)
        return padding.restore(self._run(padding.pack(hidden_states), padding.cu_seqlens, state, call))

    def _check(self, x: Tensor, attention_mask: object, cu_seqlens: object, state: object) -> None:
        """What the ops cannot check, or not by the names that a caller of this layer knows."""
        if not isinstance(x, Tensor):
            raise ValueError(f"JetBlock: hidden_states must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.hidden_size or not x.is_floating_point():
            raise ValueError(
                f"JetBlock: hidden_states must be floating [B, T, {self.hidden_size}], got {x.dtype} {list(x.shape)}"
            )
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise ValueError(f"JetBlock: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
        if isinstance(state, JetBlockDraft) and (attention_mask is not None or cu_seqlens is not None):
            got = "attention_mask" if attention_mask is not None else "cu_seqlens"
            raise ValueError(f"JetBlock: draft tokens must be [N, T], as many of each sequence, got {got}")
        if state is not None and not isinstance(state, (JetBlockState, JetBlockDraft)):
            raise ValueError(
                f"JetBlock: state must be a JetBlockState (new_state makes one), got {type(state).__name__}"
            )

    def _run(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        state: JetBlockState | JetBlockDraft | None,
        call: RepeatableCall | None,
    ) -> Tensor:
        if isinstance(state, JetBlockState) and call is None and x.shape[1] == 1 and cu_seqlens is None:
            # The step ops write into the state they read, so they have no gradient.
            return self.step(x[:, 0], state)[:, None]
        p = self._project(x)
        o = self._mix(x, p, cu_seqlens, state, call)
        return apply(self.o_proj, "o_proj", self.o_norm(o, p.gate).flatten(-2))

    def step(self, x: Tensor, state: JetBlockState, state_indices: Tensor | None = None) -> Tensor:
        """One more token of each sequence; nothing is read from the device. Carries no gradient.

        Args:
            x: [N, C].
            state: of the N sequences, updated in place; or, with state_indices, pools of P rows.
            state_indices: [N] int32 or int64, the row of each sequence in both pools; a negative index touches no
                state, and what its row of the result holds is not defined.

        Returns: [N, C].
        """
        self._check_step(state, x, state_indices)
        p = self._project(x)
        hidden, norm, conv = p.hidden, self.o_norm, self.dynamic_conv1d
        weights = None if hidden is None else conv.plain_weights()
        if (
            hidden is None
            or weights is None
            or conv.activation != "silu"
            or type(norm) is not GatedRMSNorm
            or not is_as_written(norm)
            or not is_plain(norm_weight := norm.weight)
            or not _are_of_one_op(p, parameters := (self.A_log, self.dt_bias, norm_weight))
        ):
            return self._step_unfused(x, p, state, state_indices)
        y = jet_block_step_(
            p.q,
            p.k,
            p.v,
            hidden,
            p.a,
            p.b,
            p.gate,
            *weights,
            *parameters,
            state.conv_state,
            state.recurrent_state,
            state_indices,
            eps=norm.eps,
        )
        return apply(self.o_proj, "o_proj", y)

    def _step_unfused(self, x: Tensor, p: _Projections, state: JetBlockState, state_indices: Tensor | None) -> Tensor:
        """The same where a part of it is a module of its own."""
        conv = self.dynamic_conv1d
        if p.hidden is None and state_indices is not None:
            v = conv.step_(p.v, x, state.conv_state, state_indices)
        elif p.hidden is None:
            v, after = conv(p.v[:, None], x[:, None], state.conv_state, output_final_state=True)
            state.conv_state.copy_(after)
            v = v[:, 0]
        else:
            v = conv.convolve_step_(p.v, F.silu(p.hidden), state.conv_state, state_indices)
        q, k, v = (t[:, None] for t in (F.silu(p.q), F.silu(p.k), v.unflatten(-1, p.gate.shape[1:])))
        g, beta = (t[:, None] for t in self._gates(p.a, p.b))
        o = recurrent_gated_delta_rule_(
            q, k, v, g, beta, state.recurrent_state, state_indices, use_qk_l2norm_in_kernel=True
        )
        return apply(self.o_proj, "o_proj", self.o_norm(o[:, 0], p.gate).flatten(-2))

    def projections(self) -> dict[str, nn.Module]:
        """The projections of the layer's input, by name, in the order in which their weights lie."""
        # Quicker than attributes of a module.
        modules: dict[str, Any] = self._modules
        names = [f"{name}_proj" for name in "qkvgab"]
        layers = {name: modules[name] for name in names[:4]}
        conv = self.dynamic_conv1d
        if type(conv) is DynamicShortConvolution and is_as_written(conv):
            generator = conv.kernel_generator
            if type(generator) is KernelGenerator and is_as_written(generator):
                layers["w1"] = generator.w1
        # Last: their rows may be no multiple of 16 bytes.
        return layers | {name: modules[name] for name in names[4:]}

    def _project(self, x: Tensor) -> _Projections:
        layers = self.projections()
        y = dict(zip(layers, project(layers, x)))
        c = self.config
        keys, values = ((*x.shape[:-1], c.num_heads, size) for size in (c.head_dim, c.head_v_dim))
        q, k, gate = y["q_proj"].view(keys), y["k_proj"].view(keys), y["g_proj"].view(values)
        return _Projections(q, k, y["v_proj"], y.get("w1"), y["a_proj"], y["b_proj"], gate)

    def _gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g <= 0 and write strength beta, both [..., H] in fp32 (fp64 in an fp64 layer)."""
        wide = torch.promote_types(a.dtype, torch.float32)
        A_log, dt_bias = self.A_log.to(wide), self.dt_bias.to(wide)
        if fusible(a, b) and fusible(A_log, dt_bias) and A_log.device == a.device:
            return delta_gates(a, b, A_log, dt_bias)
        return -A_log.exp() * F.softplus(a.to(wide) + dt_bias), torch.sigmoid(b.to(wide))

    def _check_step(self, state: JetBlockState, q: Tensor, state_indices: Tensor | None) -> None:
        """What the recurrent op would refuse when the convolution's state has moved already."""
        N, S = q.shape[0], state.recurrent_state
        if state_indices is not None:
            N = state.conv_state.shape[0]
            if state_indices.shape != q.shape[:1] or state_indices.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"JetBlock: state_indices must be [{q.shape[0]}] int32 or int64, got {state_indices.dtype} "
                    f"{list(state_indices.shape)}"
                )
        if state.conv_state.shape[0] != N:
            # The step op would take it for a pool of states, and the first of them.
            raise ValueError(f"JetBlock: state must be of B = {N} sequences, got {state.conv_state.shape[0]}")
        H, K, V = self.config.num_heads, self.config.head_dim, self.config.head_v_dim
        if S.shape != (N, H, K, V):
            raise ValueError(f"JetBlock: recurrent_state must be [{N}, {H}, {K}, {V}], got {list(S.shape)}")
        if S.device != q.device:
            raise ValueError(f"JetBlock: recurrent_state must be on {q.device}, like hidden_states, got {S.device}")
        if S.dtype != torch.float64 if q.dtype == torch.float64 else S.dtype not in (torch.float32, torch.bfloat16):
            need = "float64, like the layer" if q.dtype == torch.float64 else "float32 (or bfloat16)"
            raise ValueError(f"JetBlock: recurrent_state must be {need}, got {S.dtype}")

    def _mix(
        self,
        x: Tensor,
        p: _Projections,
        cu_seqlens: Tensor | None,
        state: JetBlockState | JetBlockDraft | None,
        call: RepeatableCall | None,
    ) -> Tensor:
        """`_recur` from a state, which is updated in place, or a draft.

        call: of the state, if it may be repeated.
        """
        if isinstance(state, JetBlockDraft):
            tokens, _ = self._tokens(x, p, cu_seqlens, state.state.conv_state, False)
            return state.verify(p.v, tokens)
        before = state if call is None else JetBlockState(*call.before)
        o, after = self._recur(x, p, cu_seqlens, before, output_final_state=state is not None)
        if after is None:
            return o
        if call is not None:
            call.finish(after, o)
        elif state is not None:
            for held, new in zip(state, after):
                held.copy_(new)
        return o

    def _recur(
        self,
        x: Tensor,
        p: _Projections,
        cu_seqlens: Tensor | None,
        before: JetBlockState | None,
        output_final_state: bool,
    ) -> tuple[Tensor, JetBlockState | None]:
        """Convolution and delta rule of whole sequences: layer input [B, T, C], projected to p -> o [B, T, H, V].

        Also gives the state behind them, if it is wanted. Gradients go through both states.
        """
        conv_before, recurrent_before = (None, None) if before is None else before
        tokens, conv_after = self._tokens(x, p, cu_seqlens, conv_before, output_final_state)
        o, recurrent_after = chunk_gated_delta_rule(
            *tokens,
            initial_state=recurrent_before,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens,
        )
        after = None
        if conv_after is not None and recurrent_after is not None:
            after = JetBlockState(conv_after, recurrent_after)
        return o, after

    def _tokens(
        self,
        x: Tensor,
        p: _Projections,
        cu_seqlens: Tensor | None,
        conv_before: Tensor | None,
        output_final_state: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """What the delta rule is given of each token (q, k, v, g, beta), and the convolution's state behind them."""
        g, beta = self._gates(p.a, p.b)
        conv = self.dynamic_conv1d
        convolve, u = (conv, x) if p.hidden is None else (conv.convolve, F.silu(p.hidden))
        v, conv_after = convolve(p.v, u, conv_before, cu_seqlens, output_final_state=output_final_state)
        return (F.silu(p.q), F.silu(p.k), v.unflatten(-1, p.gate.shape[-2:]), g, beta), conv_after

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: parameter.data for name, parameter in self._gate_parameters().items()}
        super()._apply(fn, recurse)
        for name, new in self._gate_parameters().items():
            if torch.promote_types(new.dtype, torch.float32) != new.dtype:
                # Taken from the values before the cast, which has already rounded these.
                new.data = before[name].to(device=new.device, dtype=torch.float32)
                if new.grad is not None:
                    new.grad = new.grad.to(torch.float32)
        self._exempt_from_weight_decay()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied parameter has no attributes.
        self._exempt_from_weight_decay()

    def _gate_parameters(self) -> dict[str, nn.Parameter]:
        found = dict(self.named_parameters(remove_duplicate=False))
        return {name: found[name] for name in GATE_NAMES if name in found}

    def _exempt_from_weight_decay(self) -> None:
        for parameter in self._gate_parameters().values():
            exempt_from_weight_decay(parameter)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in GATE_NAMES:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                # load_state_dict(assign=True) takes the tensor as it is.
                state_dict[prefix + name] = value.to(torch.promote_types(value.dtype, torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._exempt_from_weight_decay()

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"{self.hidden_size}, {self.config}"
