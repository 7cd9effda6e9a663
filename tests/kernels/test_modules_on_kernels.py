"""JetBlock and the model on the Hopper kernels: their ops taken from the simulator, or on a GPU, against the same on a
CPU.
"""

import contextlib
import copy
import importlib
from collections import Counter

import pytest
import torch
from support.comparison import rms_error
from support.device_backends import has_hopper, hoppersim, simulated
from support.jet_sim import jet_sim
from support.model_cases import padded, small_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels.model import generation
from jetkernels.model.attention import rotary_table
from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.ops import _autograd
from jetkernels.plain.attention_step import attention_step as plain_attention_step

BF16 = torch.bfloat16
# The ops that the model calls; its products are PyTorch's.
OPS = (
    "add_rms_norm",
    "attention_step",
    "chunk_gated_delta_rule",
    "delta_gates",
    "dynamic_conv",
    "dynamic_conv_step",
    "gated_rms_norm",
    "jet_block_step",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "swiglu",
)
# What the record of launches calls them.
KERNELS = {
    "dynamic_conv_kernel": "convolution",
    "recurrent_kernel": "recurrent",
    "chunk_sweep_kernel": "sweep",
    "chunk_reverse_kernel": "reverse",
    "chunk_gradients_kernel": "gradients",
    "gated_norm_kernel": "gated norm of a step",
    "norm_kernel": "norm",
    "swiglu_kernel": "swiglu",
    "delta_gates_kernel": "gates",
    "norm_backward_kernel": "norm backward",
    "swiglu_backward_kernel": "swiglu backward",
    "delta_gates_backward_kernel": "gates backward",
    "partial_sums_kernel": "partial sums",
    "attention_step_kernel": "attention",
    "attention_combine_kernel": "combine",
}


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


class Others(TorchDispatchMode):
    """Refuses the ops that shall be the simulator's, and counts what is dispatched beside them, views aside: each is a
    launch on a GPU.
    """

    VIEWS = ("view", "split_with_sizes", "as_strided", "detach")

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert func.namespace != "jet" or name == "linear", f"{func} ran on the CPU"
        if func.namespace != "jet_sim" and name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_the_simulator(**options):
    """The ops are the simulator's; gives the launches, by kernel, and what was dispatched beside the ops."""
    simulated_ops = jet_sim()
    with pytest.MonkeyPatch.context() as patch:
        for name in OPS:
            module = importlib.import_module(f"jetkernels.ops.{name}")
            patch.setattr(module, "_op", getattr(simulated_ops, name).default)
        launched: Counter[str] = Counter()
        with Others() as others, hoppersim.simulate(**options):
            yield launched, others.counts
            for launch in hoppersim.launches():
                launched[next((KERNELS[name] for name in KERNELS if name in launch["kernel"]), launch["kernel"])] += 1


@contextlib.contextmanager
def differentiable():
    """The simulator's ops have the gradients that the library's have."""
    simulated_ops = jet_sim()
    with torch.library._scoped_library("jet_sim", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autograd, "overload", lambda name: getattr(simulated_ops, name).default)
        for name in OPS:
            if hasattr(simulated_ops, f"{name}_backward"):
                library.impl(name, _autograd.differentiable(name), "Autograd", with_keyset=True)
        yield


def gradients(module: torch.nn.Module, run) -> dict[str, torch.Tensor]:
    """Of the parameters, by name, after ``run(module)`` has called backward."""
    module.zero_grad()
    run(module)
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def check_gradients(found, expected, exact) -> None:
    """As near to the exact ones as those of a CPU are: each up to chance and a rounding, all together closely."""
    assert found.keys() == expected.keys() == exact.keys()
    errors = {name: [rms_error(grads[name], exact[name]) for grads in (found, expected)] for name in exact}
    for name, (error, usual) in errors.items():
        assert error < 1.5 * usual + ROUNDING[BF16], name
    assert sum(error for error, _ in errors.values()) < 1.1 * sum(usual for _, usual in errors.values())


@simulated
def test_a_layer_on_the_simulator():
    layer, x = small_layer(), torch.randn(2, 40, 64).to(BF16)
    expected = prefill_and_decode(layer, x, 36)
    with on_the_simulator() as (launched, _):
        y = prefill_and_decode(layer, x, 36)
    assert rms_error(y, expected) < 1e-2
    # a prefill and four steps
    assert launched["sweep"] == 1 and launched["convolution"] == 5 and launched["recurrent"] == 4


def kernel_model():
    """A model of all kinds of layers, of sizes that the kernels take; bf16."""
    jet = {"num_heads": 2, "head_dim": 64, "expand_v": 1.0, "conv_size": 4, "dconv_generator_reduction": 4}
    return small_model(
        "jet",
        "attn",
        "swa",
        "jet",
        seed=2,
        dtype=BF16,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        efficient_attention_config={"jet": jet | {"norm_eps": 1e-5}, "swa": {"window_size": 16}},
    ).eval()


JET_STEP = {"convolution": 1, "recurrent": 1, "gated norm of a step": 1}
ATTENTION_STEP = {"attention": 1, "combine": 1}
MOST_LAUNCHES = 10  # of a layer's step, products included
ROUNDING = {torch.float16: 2**-11, BF16: 2**-8}  # at most
PROMPTS, STEPS = (21, 9), 3  # tokens: the window of 16 is full in one sequence and not in the other


@pytest.fixture(scope="module")
def sequences():
    rows = [tokens(length + STEPS, seed=n) for n, length in enumerate(PROMPTS)]
    return rows, padded([row[:length] for row, length in zip(rows, PROMPTS)], left=True)


@torch.no_grad()
def decode(model, cache, rows) -> torch.Tensor:
    """Logits [steps, N, vocab] of the tokens behind the prompts."""
    news = torch.stack([row[-STEPS:] for row in rows], 1)
    return torch.stack([model.step(new, cache) for new in news])


@torch.no_grad()
def exactly(model, sequences) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and states of the same in fp64."""
    rows, (ids, mask) = sequences
    wide = copy.deepcopy(model).double()
    cache = wide.new_cache(2, max(PROMPTS) + STEPS)
    generation.prefill(wide, ids, mask, cache)
    return decode(wide, cache, rows), list(cache.tensors())


@simulated
@pytest.mark.parametrize("options", ({}, {"timing": "late", "seed": 1}), ids=("early", "late"))
@pytest.mark.parametrize("dtype", (torch.float16, BF16), ids=str)
@torch.no_grad()
def test_decode_steps_of_a_model_on_the_simulator(sequences, options, dtype, monkeypatch):
    rows, (ids, mask) = sequences
    model = kernel_model().to(dtype)
    cache, again = (model.new_cache(2, max(PROMPTS) + STEPS) for _ in range(2))
    for each in (cache, again):
        generation.prefill(model, ids, mask, each)
    # With AMX the CPU's attention rounds its weights to bf16, which the kernel does not; in fp16 both are the CPU's.
    if dtype == BF16:
        monkeypatch.setattr(
            "jetkernels.model.attention.attention_step_", lambda *a: plain_attention_step(*a, a[0].shape[-1] ** -0.5)
        )
    expected, (exact, exact_states) = decode(model, again, rows), exactly(model, sequences)
    monkeypatch.undo()
    with on_the_simulator(**options) as (launched, _):
        logits = decode(model, cache, rows)
    a_layer = {"norm": 2, "swiglu": 1}
    a_step = sum((Counter(a_layer | mixer) for mixer in 2 * (JET_STEP, ATTENTION_STEP)), Counter(norm=1))
    assert launched == {kernel: STEPS * count for kernel, count in a_step.items()}
    # As near to the exact ones as this machine's: processors round products of 16-bit numbers in different ways.
    assert rms_error(logits, exact) < 1.1 * rms_error(expected, exact)
    for x, need, state in zip(cache.tensors(), again.tensors(), exact_states, strict=True):
        assert rms_error(x, state) < 1.1 * rms_error(need, state) and not torch.equal(x, torch.zeros_like(x))
    assert cache.lengths_device.tolist() == cache.lengths == [length + STEPS for length in PROMPTS]


@simulated
@torch.no_grad()
def test_launches_of_a_step_of_each_layer():
    model = kernel_model()
    cache = model.new_cache(2, 8)
    h, more = (torch.randn(2, 64).to(BF16) for _ in range(2))
    cos, sin = (x[:, 0] for x in rotary_table(cache.lengths_device, 64, 1e4))
    for kind, layer, state in zip(model.config.layer_types, model.model.layers, cache.layers):
        with on_the_simulator() as (launched, others):
            layer.step(h, more, state, lengths=cache.lengths_device, rotary=(cos, sin))
        assert others == {"linear": 4}, "the fused projection of the input, that of the output, two of the MLP"
        mixer = JET_STEP if kind == "jet" else ATTENTION_STEP
        assert launched == mixer | {"norm": 2, "swiglu": 1}
        assert launched.total() + others.total() <= MOST_LAUNCHES


@simulated
@pytest.mark.filterwarnings("ignore:jetkernels")
def test_a_training_step_of_a_layer_on_the_simulator():
    layer, x = small_layer(), torch.randn(2, 40, 64).to(BF16)
    layer.register_parameter("x", torch.nn.Parameter(x))
    dy = torch.randn_like(x)

    def run(layer):
        layer(layer.x).backward(dy.to(layer.x.dtype))

    expected, exact = gradients(layer, run), gradients(copy.deepcopy(layer).double(), run)
    with on_the_simulator() as (launched, _), differentiable():
        found = gradients(layer, run)
    # The backward of the rule sweeps again, for the states.
    assert (
        launched.items() >= {"norm": 1, "gates": 1, "convolution": 1, "sweep": 2, "reverse": 1, "gradients": 1}.items()
    )
    assert launched.items() >= {"norm backward": 1, "gates backward": 1, "partial sums": 2}.items()
    check_gradients(found, expected, exact)


@simulated
@pytest.mark.filterwarnings("ignore:jetkernels")
def test_a_training_step_of_a_model_on_the_simulator(sequences):
    rows, _ = sequences
    model, ids = kernel_model().train(), rows[0][None]

    def run(model):
        model(ids, labels=ids).loss.backward()

    expected, exact = gradients(model, run), gradients(copy.deepcopy(model).double(), run)
    with on_the_simulator() as (launched, _), differentiable():
        found = gradients(model, run)
    # Two norms of each layer and the last one; of a JetBlock also the gated one.
    assert launched.items() >= {"norm": 11, "norm backward": 11, "swiglu": 4, "swiglu backward": 4}.items()
    assert launched.items() >= {"gates": 2, "gates backward": 2, "partial sums": 13}.items()
    check_gradients(found, expected, exact)


@simulated
@torch.no_grad()
def test_a_prefill_of_a_model_on_the_simulator(sequences):
    _, (ids, mask) = sequences
    model = kernel_model()
    expected, exact = model(ids, mask).logits, copy.deepcopy(model).double()(ids, mask).logits
    with on_the_simulator() as (launched, _):
        logits = model(ids, mask).logits
    # Two norms of each layer and the last one; of a JetBlock also the gated one.
    assert launched.items() >= {"norm": 11, "swiglu": 4, "gates": 2, "convolution": 2, "sweep": 2}.items()
    assert rms_error(logits, exact) < 1.1 * rms_error(expected, exact)


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
def test_decode_steps_of_a_model_on_a_gpu(sequences):
    rows, (ids, mask) = sequences
    model, logits = kernel_model(), []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        cache = there.new_cache(2, max(PROMPTS) + STEPS)
        generation.prefill(there, ids.to(device), mask.to(device), cache)
        logits.append(decode(there, cache, [row.to(device) for row in rows]).cpu())
    (expected, found), (exact, _) = logits, exactly(model, sequences)
    assert rms_error(found, exact) < 1.5 * rms_error(expected, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("options", ({}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 7, "top_p": 0.9}), ids=str)
def test_a_model_generates_the_same_tokens_from_a_cuda_graph(sequences, options):
    _, (ids, mask) = sequences
    model, runs = kernel_model().cuda(), []
    assert model.has_device_steps
    for capture in (False, True, True):  # the second graph in the stream of the first
        generator = torch.Generator("cuda").manual_seed(3)
        runs.append(model.generate(ids.cuda(), mask.cuda(), 20, capture=capture, generator=generator, **options))
        runs.append(torch.rand(3, device="cuda", generator=generator))  # so many draws were made
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[0], runs[4])
    assert torch.equal(runs[1], runs[3]) and torch.equal(runs[1], runs[5])


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
