"""The plain path where CUDA differs from a CPU: no host reads, no tensor elsewhere, no trust in cu_seqlens."""

import pytest
import torch
from support.arguments import apply_inputs, conv_inputs, delta_inputs, recurrent_call, step_call
from support.shapes import ConvShape, DeltaShape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetkernels.plain import apply_dynamic_conv as apply_conv
from jetkernels.plain import chunk_gated_delta_rule as chunk
from jetkernels.plain import dynamic_conv as conv
from jetkernels.plain import dynamic_conv_step as conv_step
from jetkernels.plain import recurrent_gated_delta_rule as recurrent

PACKED = (0, 0, 5, 70, 70, 100)


class NoHostReads(TorchDispatchMode):
    """Refuses what would stop the host for the device: scalars read back, and shapes that depend on values."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "aten.equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in self.refused), name
        if "aten.index" in name and isinstance(args[1], (list, tuple)):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return function(*args, **(kwargs or {}))


class EverythingOnMeta(TorchDispatchMode):
    """Refuses tensors made on another device than that of the inputs; a number may stay on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta" or tensor.dim() == 0, str(function)
        return result


def run_all(device, packed, mode):
    """Run all eight functions under `mode` on shapes with a ragged tail; return what they return."""
    heads, channels = DeltaShape("", 2, 100, 2, 4, 8, 6), ConvShape("", 2, 100, 5, 3)
    pack = {"B": 1, "cu_seqlens": PACKED} if packed else {}
    arguments = (
        delta_inputs(heads._replace(**pack)),
        conv_inputs(channels._replace(**pack)),
        apply_inputs(channels._replace(**pack)),
        recurrent_call(heads._replace(T=3), rows=(4, -1), P=6),
        step_call(channels, rows=(4, -1), P=6),
    )
    delta, generated, explicit, steps, one_step = (
        [t.to(device) if isinstance(t, torch.Tensor) else t for t in call] for call in arguments
    )
    with mode():
        o = chunk.chunk_gated_delta_rule(*delta)
        y = conv.dynamic_conv(*generated)
        z = apply_conv.apply_dynamic_conv(*explicit)
        return (
            o,
            chunk.chunk_gated_delta_rule_backward(*o, *delta),
            y,
            conv.dynamic_conv_backward(*y, *generated),
            z,
            apply_conv.apply_dynamic_conv_backward(*z, *explicit),
            recurrent.recurrent_gated_delta_rule(*steps),
            conv_step.dynamic_conv_step(*one_step),
        )


@pytest.mark.parametrize("packed", [False, True])
def test_no_host_reads(packed):
    run_all("cpu", packed, NoHostReads)


@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_is_made_on_the_device_of_the_inputs(packed):
    results = run_all("meta", packed, EverythingOnMeta)
    assert all(tensor.device.type == "meta" for tensor in tree_leaves(results))


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indices", [[3, -1, 0, -5], [-1, -1, -1, -1], [-1, 5, -1, 0], [5, 2, 1, 4]])
def test_rows_that_no_sequence_addresses_keep_every_bit(indices, pool_dtype):
    """Sequences without a row must not write row 0, where their clamped index points, against the one that owns it."""
    call = recurrent_call(DeltaShape("", 4, 3, 2, 4, 8, 6), pool_dtype, pool_dtype, indices, P=6)
    pool, tokens, rest = call.state, call[:5], call[-2:]
    pool.view(-1).view(torch.int16)[::7] = -1  # NaNs with a payload, which a detour through fp32 would change
    alone = pool.clone()
    o = recurrent.recurrent_gated_delta_rule(*call)
    for n, row in enumerate(indices):
        if row < 0:
            assert not o[n].any()
        else:
            one = recurrent.recurrent_gated_delta_rule(
                *(x[n : n + 1] for x in tokens), alone[row : row + 1], None, *rest
            )
            torch.testing.assert_close(o[n : n + 1], one, equal_nan=True)
    for row in range(6):
        if row not in indices:
            assert torch.equal(pool[row].view(torch.int16), alone[row].view(torch.int16))
        else:
            torch.testing.assert_close(pool[row], alone[row], equal_nan=True)


@pytest.mark.parametrize("cu", [[0, 70, 20], [0, -5, 300], [7, 3, 1], [0, 500], [0, 10, 20], [0]])
def test_wrong_cu_seqlens_stay_inside_the_tensors(cu):
    """Nobody may look at cu_seqlens on CUDA, so wrong ones give wrong numbers, but no access outside a tensor."""
    cu = torch.tensor(cu)
    q, v, g, x = torch.randn(1, 100, 2, 8), torch.randn(1, 100, 2, 6), -torch.rand(1, 100, 2), torch.randn(1, 100, 5)
    o, state = chunk.chunk_gated_delta_rule(q, q, v, g, -g, None, cu, 0.3, True)
    y, conv_state = conv.dynamic_conv(x, x, torch.randn(20, 5), None, None, cu, True)
    if cu.tolist() == [0, 10, 20]:
        assert not o[:, 20:].any() and not y[:, 20:].any()
    assert state.shape[0] == conv_state.shape[0] == len(cu) - 1
