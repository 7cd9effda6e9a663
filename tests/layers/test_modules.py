"""DynamicShortConvolution and JetBlock against the reference in fp64, and against themselves."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import ATOL, boundaries, padded, pieces, small_block
from torch.nn.utils import parametrize, prune

from jetkernels.modules import DynamicShortConvolution, GatedRMSNorm, JetBlock, JetBlockConfig, RMSNorm
from reference.dynamic_conv import dynamic_conv
from reference.jet_block import jet_block

PUBLISHED_NAMES = {
    "q_proj.weight": (12, 20),
    "k_proj.weight": (12, 20),
    "v_proj.weight": (18, 20),
    "g_proj.weight": (18, 20),
    "o_proj.weight": (20, 18),
    "a_proj.weight": (2, 20),
    "b_proj.weight": (2, 20),
    "A_log": (2,),
    "dt_bias": (2,),
    "o_norm.weight": (9,),
    "dynamic_conv1d.kernel_generator.w1.weight": (9, 20),
    "dynamic_conv1d.kernel_generator.w2.weight": (72, 9),
    "dynamic_conv1d.kernel_generator.w2.bias": (72,),
}


def defined(block: JetBlock, x, **options):
    """The block as the reference defines it: y and the two states."""
    return jet_block(x, dict(block.named_parameters()), norm_eps=block.config.norm_eps, **options)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_convolution_is_its_definition(W, T):
    torch.manual_seed(0)
    conv = DynamicShortConvolution(12, W, 10, 4).double()
    torch.nn.init.normal_(conv.kernel_generator.w2.weight)
    x, u = torch.randn(2, T, 12).double(), torch.randn(2, T, 10).double()
    y, state = conv(x, u, output_final_state=True)
    w1, w2 = conv.kernel_generator.w1, conv.kernel_generator.w2
    need, need_state = dynamic_conv(x, F.silu(u @ w1.weight.T), w2.weight, w2.bias, None, None, True, torch.float64)
    torch.testing.assert_close(y, need)
    torch.testing.assert_close(state, need_state)
    assert conv(x, u)[1] is None
    # In place, one token at a time.
    pool = torch.zeros(2, 12, W - 1).double()
    with torch.no_grad():
        steps = torch.stack([conv.step_(x[:, t], u[:, t], pool) for t in range(T)], 1)
    torch.testing.assert_close(steps, y)
    torch.testing.assert_close(pool, state)


def test_generator_learns_from_its_initial_values():
    """With w1 and w2 both at zero the generator's gradient would be zero for ever."""
    torch.manual_seed(0)
    conv = DynamicShortConvolution(64, 4, 32, 8)
    w1, w2 = conv.kernel_generator.w1, conv.kernel_generator.w2
    assert w1.weight.shape == (8, 32) and w2.weight.shape == (256, 8) and w2.bias.shape == (256,)
    assert w1.weight.std() > 0.01 and not w2.weight.any()
    assert 0.015 < w2.bias.std() < 0.025
    x, u, target = torch.randn(2, 9, 64), torch.randn(2, 9, 32), torch.randn(2, 9, 64)
    optimiser = torch.optim.SGD(conv.parameters(), lr=1.0)
    for step in range(2):
        optimiser.zero_grad()
        F.mse_loss(conv(x, u)[0], target).backward()
        assert w2.weight.grad.abs().max() > 0 and w2.bias.grad.abs().max() > 0
        assert (w1.weight.grad.abs().max() > 0) == (step == 1)
        optimiser.step()


@pytest.mark.parametrize("T", [1, 2, 3, 5, 63, 64, 65, 70])
def test_block_is_its_definition(T):
    block = small_block(dtype=torch.float64)
    x = torch.randn(2, T, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    state = block.new_state(2)
    with torch.no_grad():
        need = defined(block, x)
        for a, b in zip((block(x, state=state), *state), need):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
        # From where that left off, packed into one row.
        x, cu_seqlens = x.flatten(0, 1)[None], boundaries([T, T])
        need = defined(block, x, conv_state=need[1], recurrent_state=need[2], cu_seqlens=cu_seqlens)
        for a, b in zip((block(x, cu_seqlens=cu_seqlens, state=state), *state), need):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("T", [1, 4, 64, 66])
def test_block_gradients_are_those_of_its_definition(T):
    block = small_block(dtype=torch.float64)
    x = torch.randn(1, T, 20, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, T, 20, dtype=torch.float64)
    parameters = [x, *block.parameters()]
    got = torch.autograd.grad((block(x) * cotangent).sum(), parameters)
    need = torch.autograd.grad((defined(block, x)[0] * cotangent).sum(), parameters)
    for g, n in zip(got, need):
        torch.testing.assert_close(g, n, atol=1e-8, rtol=1e-6)


def test_block_parameters_are_named_as_published():
    assert {name: tuple(p.shape) for name, p in small_block().named_parameters()} == PUBLISHED_NAMES
    block = JetBlock(1536, device="meta")
    assert (block.config.num_heads, block.config.head_dim, block.config.head_v_dim) == (12, 96, 256)
    assert block.dynamic_conv1d.kernel_generator.w1.weight.shape == (384, 1536)
    assert block.dynamic_conv1d.kernel_generator.w2.weight.shape == (12288, 384)


def test_initial_decay_covers_short_and_long_memory():
    torch.manual_seed(0)
    block = JetBlock(8, JetBlockConfig(num_heads=512, head_dim=1, expand_v=1, dconv_generator_reduction=64))
    rate, step = block.A_log.exp(), F.softplus(block.dt_bias)
    assert 1 <= rate.min() < 1.2 and 14 < rate.max() <= 16.001
    assert 0.0009 < step.min() < 0.0012 and 0.09 < step.max() < 0.101


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float().bfloat16()]
)
def test_gates_stay_fp32_when_the_block_is_cast(cast):
    block = small_block()
    before = [block.A_log.clone(), block.dt_bias.clone()]
    cast(block)
    assert block.q_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for old, new in zip(before, (block.A_log, block.dt_bias)):
        assert new.dtype == torch.float32 and torch.equal(old, new)


@pytest.mark.parametrize("assign", [False, True])
def test_gates_stay_fp32_when_a_bf16_checkpoint_is_loaded(assign):
    block = small_block(seed=1)
    saved = {name: t.to(torch.bfloat16) for name, t in small_block(seed=2).state_dict().items()}
    block.load_state_dict(saved, assign=assign)
    assert block.A_log.dtype == block.dt_bias.dtype == torch.float32
    assert torch.equal(block.A_log, saved["A_log"].float())
    assert saved["A_log"].dtype == torch.bfloat16
    y = block.bfloat16()(torch.randn(1, 5, 20).bfloat16())
    assert y.dtype == torch.bfloat16


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_gates_stay_fp32_behind_pruning_and_parametrizations(how):
    block, x = small_block(), torch.randn(2, 4, 20)
    if how == "pruned":
        prune.random_unstructured(block, "A_log", amount=1)
    else:
        parametrize.register_parametrization(block, "A_log", Doubled())
    block(x)
    need = block.A_log.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block.to(torch.bfloat16)
    block(x.bfloat16())
    assert block.A_log.dtype == torch.float32 and torch.equal(block.A_log, need)
    names = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert names == {"dt_bias", "A_log_orig" if how == "pruned" else "parametrizations.A_log.original"}
    block.load_state_dict({name: value.bfloat16() for name, value in block.state_dict().items()}, assign=True)
    block(x.bfloat16())
    assert block.A_log.dtype == torch.float32 and torch.equal(block.A_log, need.bfloat16().float())


def test_cast_keeps_gradients_usable():
    block = small_block()
    block(torch.randn(1, 3, 20)).sum().backward()
    block.bfloat16()
    assert block.A_log.grad.dtype == torch.float32 and block.q_proj.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_block_in_low_precision(dtype, tolerance):
    block = small_block()
    x = torch.randn(2, 33, 20)
    need = block(x)
    got = small_block().to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got - need).norm() <= tolerance * need.norm()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7], [7, 3, 1], [0, 4], [2, 9, 0, 5]])
def test_padded_rows_equal_rows_alone(left, lengths):
    block = small_block()
    rows = [torch.randn(t, 20, generator=torch.Generator().manual_seed(n)) for n, t in enumerate(lengths)]
    x, mask = padded(rows, left, fill=math.nan)
    state = block.new_state(len(rows))
    with torch.no_grad():
        y = block(x, attention_mask=mask, state=state)
        for n, row in enumerate(rows):
            alone = block.new_state(1)
            torch.testing.assert_close(y[n, mask[n].bool()], block(row[None], state=alone)[0], atol=ATOL, rtol=0)
            assert not y[n, ~mask[n].bool()].any()
            for got, need in zip(state, alone):
                torch.testing.assert_close(got[n : n + 1], need, atol=ATOL, rtol=0)


def test_all_ones_mask_is_no_mask():
    block, x = small_block(), torch.randn(2, 6, 20)
    assert torch.equal(block(x), block(x, attention_mask=torch.ones(2, 6)))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), int32=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_packed_equals_separate(lengths, int32, seed):
    """Forward and backward: no context leaks over a boundary, empty sequences included."""
    block = small_block(dtype=torch.float64)
    x, cotangent = torch.randn(
        2, 1, sum(lengths), 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x.requires_grad_()
    packed = block(x, cu_seqlens=boundaries(lengths, torch.int32 if int32 else torch.int64))
    separate = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-9, rtol=0)
    got, need = (torch.autograd.grad(y, x, cotangent)[0] for y in (packed, separate))
    torch.testing.assert_close(got, need, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype, error", ((torch.float32, ATOL), (torch.float64, 1e-12)), ids=str)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), grad=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_split_equals_one_call(dtype, error, sizes, grad, seed):
    block = small_block(dtype=dtype)
    x = torch.randn(2, 19, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.set_grad_enabled(grad):
        whole = block.new_state(2)
        need = block(x, state=whole)
        state = block.new_state(2)
        addresses = [t.data_ptr() for t in state]
        got = torch.cat([block(x[:, span], state=state) for span in pieces(19, sizes)], 1)
    torch.testing.assert_close(got, need, atol=error, rtol=error)
    for a, b in zip(state, whole):
        torch.testing.assert_close(a, b, atol=error, rtol=error)
        assert not a.requires_grad
    assert [t.data_ptr() for t in state] == addresses


@pytest.mark.parametrize("chunk", [2, 3])
def test_short_chunk_shifts_the_convolution_state(chunk):
    """A chunk shorter than the kernel must push older inputs on, not overwrite the whole state."""
    block = small_block(conv_size=4)
    x = torch.randn(1, 10, 20)
    with torch.no_grad():
        state = block.new_state(1)
        got = torch.cat([block(x[:, span], state=state) for span in pieces(10, [5, chunk, 1])], 1)
        torch.testing.assert_close(got, block(x), atol=ATOL, rtol=0)
        torch.testing.assert_close(state.conv_state, block.v_proj(x)[:, -3:].transpose(1, 2), atol=ATOL, rtol=0)


def no_activation(block):
    block.dynamic_conv1d.activation = None


def narrow_norm(block):
    block.o_norm.bfloat16()


def wide_gates(block):
    block.A_log.data, block.dt_bias.data = block.A_log.data.double(), block.dt_bias.data.double()


def twice_the_convolution(block):
    class Twice(DynamicShortConvolution):
        def forward(self, *args, **options):
            y, state = super().forward(*args, **options)
            return 2 * y, state

    block.dynamic_conv1d.__class__ = Twice


@pytest.mark.parametrize("change", [no_activation, narrow_norm, wide_gates, twice_the_convolution])
def test_steps_follow_what_is_changed_in_a_block(change):
    plain, block, x = small_block(), small_block(), torch.randn(2, 7, 20)
    change(block)
    with torch.no_grad():
        need, state = block(x), block.new_state(2)
        got = torch.cat([block(x[:, :3], state=state), *(block(x[:, t : t + 1], state=state) for t in range(3, 7))], 1)
        torch.testing.assert_close(got, need, atol=ATOL, rtol=ATOL)
        assert change is wide_gates or (need - plain(x)).abs().max() > 1e-3


def test_gradient_through_a_call_with_state():
    """The state's values before the call stay what backward needs, though the call overwrites them."""
    block, x = small_block(dtype=torch.float64), torch.randn(1, 8, 20, dtype=torch.float64, requires_grad=True)
    need = torch.autograd.grad(block(x)[:, 4:].sum(), x)[0][:, 4:]
    state = block.new_state(1)
    block(x[:, :4], state=state)
    got = torch.autograd.grad(block(x[:, 4:], state=state).sum(), x)[0][:, 4:]
    torch.testing.assert_close(got, need, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("K, V", [(64, 64), (64, 384), (96, 256), (128, 192), (192, 384), (256, 144), (128, 576)])
def test_key_and_value_sizes_of_the_search(K, V):
    block = JetBlock(32, JetBlockConfig(num_heads=2, head_dim=K, expand_v=V / K + 1e-10))
    assert block.config.head_v_dim == V
    y = block(torch.randn(1, 5, 32))
    y.sum().backward()
    assert y.shape == (1, 5, 32) and y.isfinite().all()


def test_nan_stays_in_its_sequence():
    block, x = small_block(), torch.randn(3, 6, 20)
    need = block(x)
    x[1] = math.nan
    got = block(x)
    assert torch.equal(got[[0, 2]], need[[0, 2]]) and got[1].isnan().all()


@pytest.mark.parametrize("norm", [RMSNorm(8, 1e-5), GatedRMSNorm(8, 1e-5)])
def test_norm_rounds_once(norm):
    x, gate = torch.randn(5, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    torch.nn.init.normal_(norm.weight)
    wide = x.double()
    need = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    if isinstance(norm, GatedRMSNorm):
        need, got = need * F.silu(gate.double()), norm(x, gate)
    else:
        got = norm(x)
    assert got.dtype == torch.bfloat16
    assert ((got - need).abs() <= need.abs() * 2**-8 * 1.001).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"head_dim": 1.5}, "head_dim must be a positive int, got 1.5"),
        ({"norm_eps": "tiny"}, "norm_eps must be a number, got 'tiny'"),
        ({"expand_v": -2}, "expand_v must be a positive float, got -2"),
        ({"conv_size": 5}, "conv_size must be 2, 3 or 4, got 5"),
        ({"dconv_generator_reduction": 4000}, "dconv_generator_reduction must be at most 3072, got 4000"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        JetBlockConfig(**changes)


def test_bad_calls_are_refused():
    block, x = small_block(), torch.randn(2, 4, 20)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 4\].*got \[2, 3\]"):
        block(x, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="exclude each other"):
        block(x[:1], attention_mask=torch.ones(1, 4), cu_seqlens=boundaries([4]))


@pytest.mark.parametrize("backend, packed", [("inductor", False), ("aot_eager", False), ("aot_eager", True)])
def test_compiled_block_equals_eager(backend, packed):
    block, x = small_block(dtype=torch.float64), torch.randn(2, 9, 20, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for run in (block, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf.view(1, 18, 20), cu_seqlens=boundaries([5, 13])) if packed else run(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])))
    for got, need in zip(results[1], results[0]):
        torch.testing.assert_close(got, need, atol=1e-8, rtol=1e-6)


def norm_cases():
    """Each norm with the arguments of a call."""
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for norm, arguments in ((RMSNorm(8, 1e-5), (x,)), (GatedRMSNorm(8, 1e-5), (x, gate))):
        torch.nn.init.normal_(norm.weight)
        yield norm, arguments


def norm_in_torch(norm, x, gate=None):
    """In fp64, rounded to the dtype of x."""
    y = F.rms_norm(x.double(), x.shape[-1:], norm.weight.double(), norm.eps)
    return (y if gate is None else y * F.silu(gate.double())).to(x.dtype)


DTYPES_OF_NORMS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("weight_dtype", DTYPES_OF_NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES_OF_NORMS, ids=str)
def test_norms_take_every_pair_of_dtypes(dtype, weight_dtype):
    for norm, (x, *gate) in norm_cases():
        norm.to(weight_dtype)
        for gate_dtype in DTYPES_OF_NORMS if gate else (None,):
            arguments = (x.to(dtype), *(g.to(gate_dtype) for g in gate))
            y = norm(*arguments)
            assert y.dtype == dtype
            torch.testing.assert_close(y, norm_in_torch(norm, *arguments))
            y.float().sum().backward()
            assert norm.weight.grad.dtype == weight_dtype and norm.weight.grad.any()
            norm.zero_grad()


def test_norms_use_the_ops_and_other_tensors_decide_themselves():
    class Watched(torch.Tensor):
        called: list = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.called.append(getattr(function, "__name__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    for norm, arguments in norm_cases():
        need = norm(*arguments)
        with torch.profiler.profile() as profile:
            norm(*arguments)
        assert any(event.name.startswith("jet::") for event in profile.events())
        Watched.called.clear()
        torch.testing.assert_close(
            norm(arguments[0].as_subclass(Watched), *arguments[1:]).as_subclass(torch.Tensor), need
        )
        assert "rms_norm" in Watched.called
        norm.weight = torch.nn.Parameter(norm.weight.detach().as_subclass(Watched))
        torch.testing.assert_close(norm(*arguments).as_subclass(torch.Tensor), need)


def test_norms_under_transforms_forward_mode_autocast_meta_and_compile():
    for norm, (x, *gate) in norm_cases():
        need = norm(x, *gate)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(torch.vmap(norm)(x, *gate), need)
        value, tangent = torch.func.jvp(lambda x: norm(x, *gate), (x,), (x,))
        torch.testing.assert_close(value, need)
        assert tangent.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x, *gate).dtype == torch.float32
            low = [t.bfloat16() for t in (x, *gate)]
            assert norm(*low).dtype == torch.bfloat16
            if gate:
                torch.testing.assert_close(norm(x, *low[1:]), norm(x, *(t.float() for t in low[1:])))
        meta = norm.to("meta")(*(t.to("meta") for t in (x, *gate)))
        assert meta.is_meta and meta.shape == x.shape
    for norm, arguments in norm_cases():
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), norm(*arguments), rtol=0, atol=0)
        exported = torch.export.export(norm, arguments).module()
        torch.testing.assert_close(exported(*arguments), norm(*arguments), rtol=0, atol=0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed tensors")
def test_norms_with_distributed_weights(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for norm, arguments in norm_cases():
            need = norm(*arguments)
            norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))
            spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in arguments]
            torch.testing.assert_close(norm(*spread).full_tensor(), need)
    finally:
        torch.distributed.destroy_process_group()
