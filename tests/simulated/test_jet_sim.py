"""The library's own bindings and kernels on the simulator, and torch's memory as that of a device."""

import ctypes

import pytest
import torch
from support.jet_sim import jet_sim, library
from support.paths import ROOT

import hoppersim

SOURCE = ROOT / "hoppersim" / "tests" / "kernels" / "runtime.cu"
SUCCESS, LAUNCH_FAILURE = 0, 719
pytestmark = pytest.mark.kernels  # last: its memory stays under torch for the rest of the process


def test_empty_launch_of_the_library():
    jet_sim()
    with hoppersim.simulate():
        assert library().call("jetkernels_empty_launch", ctypes.c_void_p(None)) == SUCCESS
        (record,) = hoppersim.launches()
    assert "empty_kernel" in record["kernel"] and record["block"] == [32, 1, 1]


def test_ops_of_the_library():
    ops = jet_sim()
    torch.manual_seed(0)
    N, T, H, K, V = 2, 3, 2, 8, 8
    q, k, v = torch.randn(N, T, H, K), torch.randn(N, T, H, K), torch.randn(N, T, H, V)
    g, beta, state = -torch.rand(N, T, H), torch.rand(N, T, H), torch.randn(N, H, K, V)
    expected_state = state.clone()
    o = ops.recurrent_gated_delta_rule(q, k, v, g, beta, state, None, 0.5, True)
    expected = torch.ops.jet.recurrent_gated_delta_rule(q, k, v, g, beta, expected_state, None, 0.5, True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, expected_state)


def test_tensors_of_torch_are_registered():
    jet_sim()
    x = torch.empty(64)
    assert x.isnan().all(), "memory nobody wrote reads as NaN"
    library = hoppersim.compile_cuda(SOURCE)
    x.zero_()
    assert library.cdll.run_scale(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(64), ctypes.c_double(0.0)) == SUCCESS
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"), hoppersim.simulate():
        assert library.cdll.run_past_the_end(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(64)) == LAUNCH_FAILURE


def test_torch_works_on_registered_memory():
    """Some of torch's code asks the allocator for raw memory."""
    jet_sim()
    layer = torch.nn.Conv1d(3, 4, 3)
    x = torch.randn(2, 3, 20)
    expected = torch.einsum("bitw,oiw->bot", x.unfold(2, 3, 1), layer.weight) + layer.bias[:, None]
    torch.testing.assert_close(layer(x), expected)
