"""JetBlock and the model on the Hopper kernels: their ops taken from the simulator, or on a GPU, against the same on a
CPU.
"""

import copy
import importlib

import pytest
import torch
from support.comparison import rms_error
from support.device_backends import has_hopper, hoppersim, simulated

from jetkernels.modules import JetBlock, JetBlockConfig

BF16 = torch.bfloat16


def small_layer() -> JetBlock:
    torch.manual_seed(0)
    layer = JetBlock(
        64,
        JetBlockConfig(num_heads=2, head_dim=64, expand_v=1.0, conv_size=4, dconv_generator_reduction=4, norm_eps=1e-5),
    )
    torch.nn.init.normal_(layer.dynamic_conv1d.kernel_generator.w2.weight, std=0.1)
    return layer.to(BF16)


@torch.no_grad()
def prefill_and_decode(layer: JetBlock, x: torch.Tensor, prompt: int) -> torch.Tensor:
    state = layer.new_state(x.shape[0])
    parts = [layer(x[:, :prompt], state=state)]
    parts += [layer(x[:, t : t + 1], state=state) for t in range(prompt, x.shape[1])]
    return torch.cat(parts, 1)


@simulated
def test_a_layer_on_the_simulator(monkeypatch):
    layer, x = small_layer(), torch.randn(2, 40, 64).to(BF16)
    expected = prefill_and_decode(layer, x, 36)
    simulated_ops = hoppersim.jet_sim()
    for name in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "dynamic_conv", "dynamic_conv_step"):
        module = importlib.import_module(f"jetkernels.ops.{name}")
        monkeypatch.setattr(module, "_op", getattr(simulated_ops, name).default)
    with hoppersim.simulate():
        y = prefill_and_decode(layer, x, 36)
        kernels = [launch["kernel"] for launch in hoppersim.launches()]
    assert rms_error(y, expected) < 1e-2
    # a prefill and four steps
    assert any("chunk_sweep_kernel" in name for name in kernels)
    assert sum("dynamic_conv_kernel" in name for name in kernels) == 5
    assert sum("recurrent_kernel" in name for name in kernels) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")
def test_a_layer_on_a_gpu():
    layer, x = small_layer(), torch.randn(2, 40, 64).to(BF16)
    expected = prefill_and_decode(layer, x, 36)
    on_device = copy.deepcopy(layer).cuda()
    assert rms_error(prefill_and_decode(on_device, x.cuda(), 36).cpu(), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")
@torch.no_grad()
def test_a_decode_step_in_a_cuda_graph():
    """Captured once, replayed for other inputs: nothing in it asks the host."""
    layer = small_layer().cuda()
    state, x = layer.new_state(2), torch.randn(2, 1, 64, device="cuda").to(BF16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x, state=state)
    stream.synchronize()
    start = type(state)(*(s.clone() for s in state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = layer(x, state=state)
    for s, first in zip(state, start):
        s.copy_(first)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = layer(x, state=start)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(state.recurrent_state, start.recurrent_state, rtol=0, atol=0)
