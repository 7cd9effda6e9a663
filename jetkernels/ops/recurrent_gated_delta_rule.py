"""``jet::recurrent_gated_delta_rule``: decode, token by token, the state pool updated in place."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from jetkernels.plain import recurrent_gated_delta_rule as plain


def _fake(q, k, v, g, beta, state, state_indices, scale, l2norm_qk):
    return v.new_empty(v.shape)


_register.define(
    "recurrent_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor? state_indices, float scale, "
    "bool l2norm_qk) -> Tensor",
    fake=_fake,
    plain=plain.recurrent_gated_delta_rule,
)
_register.autocast("recurrent_gated_delta_rule", low_precision=(0, 1, 2), fp32=(3,))


def recurrent_gated_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """Gated delta rule token by token, updating ``state`` in place. For decode; not differentiable.

    Args:
        q, k: [N, T, Hk, K], any T >= 0; one dtype with v.
        v: [N, T, H, V].
        g, beta: [N, T, H], as in :func:`chunk_gated_delta_rule`.
        state: [P, H, K, V] pool of states, fp32 or bf16 (fp64 with fp64 inputs), any strides; arithmetic is fp32.
        state_indices: [N] int32 or int64, the pool row of each sequence; a negative index touches no state and gives
            a zero output row. ``None`` means row n for sequence n.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        use_qk_l2norm_in_kernel: l2-normalise q and k first, as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [N, T, H, V] in v's dtype.

    Raises:
        RuntimeError: as :func:`chunk_gated_delta_rule`; also for an index out of range or named twice (checked on a
            CPU, and on CUDA under ``JETKERNELS_CHECK=1``). The pool is untouched then.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.jet.recurrent_gated_delta_rule(
        q, k, v, g, beta, state, state_indices, scale, use_qk_l2norm_in_kernel
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule out of place, with the arguments of :func:`chunk_gated_delta_rule`.

    Without gradients and without ``cu_seqlens`` it runs token by token on a copy of the state; where a gradient may
    be asked for, or the sequences are packed, the chunk op computes the same function.
    """
    tensors = (q, k, v, g, beta, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad or cu_seqlens is not None:
        return chunk_gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        )
    if initial_state is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = q.new_zeros((q.shape[0], v.shape[-2], q.shape[-1], v.shape[-1]), dtype=dtype)
    else:
        state = initial_state.clone(memory_format=torch.contiguous_format)
    o = recurrent_gated_delta_rule_(q, k, v, g, beta, state, None, scale, use_qk_l2norm_in_kernel)
    return o, state if output_final_state else None
