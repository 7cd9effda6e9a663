"""The Hopper kernels of the chunked gated delta rule: their properties on the simulator and on a GPU, their cost, their
machine code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import DeltaInputs, delta_inputs
from support.comparison import assert_bitwise, assert_error
from support.device_backends import (
    CHUNK_STATE_CEILING,
    EARLY,
    assert_every_schedule_agrees,
    each_device,
    each_machine,
    hoppersim,
    simulated,
)
from support.jet_sim import jet_sim
from support.kernel_code import disassembly, report
from support.layouts import far_apart, with_layouts
from support.memory import poisoned_allocations
from support.sequence_properties import part, sequences
from support.shapes import LENGTHS, PACKED, DeltaShape, ids
from support.strategies import layouts, offsets, seeds, splits

from benchmarks import counters as counting
from benchmarks import ops
from benchmarks.shapes import SHAPES as MEASURED
from benchmarks.shapes import Draw
from reference.chunk_gated_delta_rule import chunk_gated_delta_rule as reference_in_chunks
from reference.recurrent_gated_delta_rule import gated_delta_rule

OP = "chunk_gated_delta_rule"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KEY_DIMS = (64, 96, 128, 192, 256)
CUT = 8192 + 37  # tokens: one sequence of few heads is cut into eight segments
# Operands are fp16 inside: the error of o is that of its own rounding and a few 1e-4.
OUTPUT_CEILING = {BF16: 2.5e-3, F16: 1e-3}

SHAPES = (
    *(DeltaShape(f"K = {K}", T=130, K=K, V=64) for K in KEY_DIMS),
    *(DeltaShape(f"V = {V}", T=70, H=1, K=64, V=V) for V in (16, 48, 128, 144, 192, 208, 288, 384, 576)),
    *(DeltaShape(f"T = {T}", T=T, H=1, K=64, V=32) for T in LENGTHS),
    DeltaShape("the 2B model's heads", T=129, H=2, Hk=2, K=96, V=256),
    DeltaShape("the 4B model's heads", T=129, H=2, Hk=2, K=128, V=256),
    DeltaShape("128/128, two value heads per key head", B=2, T=129, Hk=2, H=4, K=128, V=128),
    DeltaShape("three value heads per key head", B=2, T=66, Hk=2, H=6, K=64, V=64),
    DeltaShape("without l2norm", B=2, T=100, K=96, V=64, l2norm=False),
    DeltaShape("without initial state", B=3, T=100, K=64, V=64, state=False),
    DeltaShape("packed, empty sequences among them", T=200, cu_seqlens=PACKED, Hk=2, H=4, K=96, V=128),
    DeltaShape("packed, without initial state", T=200, cu_seqlens=PACKED, K=128, V=64, state=False),
)
AGREE = (
    "the 2B model's heads",
    "128/128, two value heads per key head",
    "packed, empty sequences among them",
    "K = 256",
    "V = 208",
)


def random(dtype=BF16, seed: int = 0, **shape) -> DeltaInputs:
    return delta_inputs(DeltaShape("", **{"K": 64, "V": 32, **shape}), dtype, seed)


def check(backend, inputs: DeltaInputs) -> None:
    """Against the reference in chunks, in fp64; `test_reference` proves that it equals the token loop, which would take
    minutes here.
    """
    o, S = backend(OP, *inputs)
    expected = reference_in_chunks(*inputs)
    assert_error("o", o, expected[0], OUTPUT_CEILING[inputs.q.dtype])
    assert_error("final_state", S, expected[1], CHUNK_STATE_CEILING)


# ---- equals the reference


@each_device
@pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    check(backend, delta_inputs(shape, dtype))


@each_device
def test_equals_the_token_loop(backend):
    inputs = random(T=70, H=1)
    for name, out, expected in zip(("o", "final_state"), backend(OP, *inputs), gated_delta_rule(*inputs)):
        assert_error(name, out, expected, OUTPUT_CEILING[BF16])


@each_device
@settings(max_examples=12)
@given(
    K=st.sampled_from(KEY_DIMS),
    V=st.integers(1, 12).map(lambda n: 16 * n),
    Hk=st.integers(1, 2),
    group=st.integers(1, 3),
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    cu_seqlens=st.none() | offsets(longest=140),
    dtype=st.sampled_from((BF16, F16)),
    l2norm=st.booleans(),
    state=st.booleans(),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_dtype_and_layout(backend, K, V, Hk, group, B, T, cu_seqlens, dtype, l2norm, state, layouts, seed):
    if cu_seqlens is not None:
        B, T = 1, cu_seqlens[-1]
    shape = DeltaShape("", B, T, Hk, Hk * group, K, V, cu_seqlens, l2norm, state)
    inputs = delta_inputs(shape, dtype, seed)
    other = with_layouts(inputs, layouts)
    check(backend, other)
    for out, expected in zip(backend(OP, *other), backend(OP, *inputs)):
        assert_bitwise(out, expected, "other layout")


@each_device
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=ids)
@pytest.mark.parametrize("g_dtype, beta_dtype", ((F32, BF16), (BF16, F32), (F16, F16)), ids=ids)
def test_gates_and_offsets_of_other_dtypes(backend, index_dtype, g_dtype, beta_dtype):
    inputs = random(T=200, cu_seqlens=PACKED)
    check(
        backend,
        inputs._replace(
            g=inputs.g.to(g_dtype), beta=inputs.beta.to(beta_dtype), cu_seqlens=inputs.cu_seqlens.to(index_dtype)
        ),
    )


@simulated
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.reason in AGREE], ids=ids)
def test_every_schedule_agrees(shape):
    inputs = delta_inputs(shape, BF16)
    assert_every_schedule_agrees(lambda backend: backend(OP, *inputs))


@simulated
@pytest.mark.parametrize(
    "shape",
    (DeltaShape("fp32", K=64, V=32), DeltaShape("K = 80", K=80, V=32), DeltaShape("V = 40", K=64, V=40)),
    ids=ids,
)
def test_other_shapes_take_the_plain_path(shape):
    inputs = delta_inputs(shape, F32 if shape.reason == "fp32" else BF16)
    with hoppersim.simulate():
        o, _ = jet_sim().chunk_gated_delta_rule(*inputs)
        assert not hoppersim.launches()
    assert_error("o", o, gated_delta_rule(*inputs)[0], 5e-3)


# ---- calls, rows and sequences


@each_device
@settings(max_examples=8)
@given(data=st.data(), T=st.integers(0, 200), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, data, T, seed):
    inputs = random(F16, seed, T=T, B=2)
    whole, S, parts, begin = backend(OP, *inputs), inputs.initial_state, [], 0
    for length in data.draw(splits(T)):
        out, S = backend(OP, *part(inputs, begin, begin + length, S))
        parts.append(out)
        begin += length
    assert_error("o", torch.cat(parts, 1), whole[0], OUTPUT_CEILING[F16])
    assert_error("final_state", S, whole[1], CHUNK_STATE_CEILING)


@each_device
def test_split_at_every_boundary(backend):
    """At the ends of chunks it is the same arithmetic, to the bit."""
    inputs = random(T=192, H=1)
    whole = backend(OP, *inputs)
    for cut in (1, 63, 64, 65, 127, 128, 129, 191):
        first, S = backend(OP, *part(inputs, 0, cut, inputs.initial_state))
        second, S = backend(OP, *part(inputs, cut, 192, S))
        o = torch.cat((first, second), 1)
        if cut % 64 == 0:
            assert_bitwise(o, whole[0], f"cut at {cut}")
            assert_bitwise(S, whole[1], f"cut at {cut}")
        assert_error("o", o, whole[0], OUTPUT_CEILING[BF16])


@each_device
@pytest.mark.parametrize("cu_seqlens", (PACKED, (0, 64, 128, 200), (0, 63, 200)), ids=str)
def test_packed_equals_separate_to_the_bit(backend, cu_seqlens):
    inputs = random(T=200, cu_seqlens=cu_seqlens, H=2)
    o, S = backend(OP, *inputs)
    for n, here, alone in sequences(inputs):
        out, state = backend(OP, *alone)
        assert_bitwise(o[:, here], out, f"sequence {n}")
        assert_bitwise(S[n : n + 1], state, f"state {n}")


@each_device
def test_a_row_does_not_depend_on_the_others_to_the_bit(backend):
    inputs = random(T=70, B=3)
    o, S = backend(OP, *inputs)
    for b in range(3):
        alone = [t[b : b + 1] for t in inputs[:6]]
        out, state = backend(OP, *alone, *inputs[6:])
        assert_bitwise(o[b : b + 1], out, "o")
        assert_bitwise(S[b : b + 1], state, "final_state")


@each_device
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 5, 70, 70, 141)), ids=("rows", "packed"))
def test_nan_stays_in_its_sequence(backend, cu_seqlens, n, value):
    inputs = random(T=141 if cu_seqlens else 70, B=1 if cu_seqlens else 4, cu_seqlens=cu_seqlens)
    bad = inputs._replace(
        **{name: getattr(inputs, name).clone() for name in ("q", "k", "v", "g", "beta", "initial_state")}
    )
    here = (0, slice(*cu_seqlens[n : n + 2])) if cu_seqlens else (n,)
    for name, t in zip(bad._fields, bad[:5]):
        t[here] = -abs(value) if name == "g" else value  # a g above 0 is refused
    bad.initial_state[n] = value
    (o, S), (dirty_o, dirty_S) = backend(OP, *inputs), backend(OP, *bad)
    o[here], dirty_o[here], S[n], dirty_S[n] = 0, 0, 0, 0
    assert_bitwise(dirty_o, o, "o")
    assert_bitwise(dirty_S, S, "final_state")


@each_device
@pytest.mark.parametrize(
    "shape",
    (
        DeltaShape("no tokens", B=2, T=0, K=64, V=32),
        DeltaShape("no rows", B=0, T=5, K=64, V=32),
        DeltaShape("no sequences", T=0, cu_seqlens=(0,), K=64, V=32),
        DeltaShape("empty sequences only", T=0, cu_seqlens=(0, 0, 0), K=64, V=32),
        DeltaShape("no tokens, no state", B=2, T=0, K=64, V=32, state=False),
    ),
    ids=ids,
)
def test_nothing_to_do(backend, shape):
    inputs = delta_inputs(shape, BF16)
    for out, expected in zip(backend(OP, *inputs), gated_delta_rule(*inputs)):
        assert_bitwise(out.double(), expected)


# ---- hard numbers


@each_device
@pytest.mark.parametrize("T", (63, 129, 256))
@pytest.mark.parametrize("other_keys", (0, 0.01, 0.3), ids=str)
@pytest.mark.parametrize("signs", ((1, 1), (1, -1)), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(backend, T, signs, other_keys):
    """A low-precision inverse blows up here."""
    inputs = random(T=T, K=128)
    k = inputs.k[:, :1] * torch.tensor(signs, dtype=BF16).repeat(T)[:T, None, None] + other_keys * inputs.k
    check(backend, inputs._replace(k=k.to(BF16), beta=torch.ones_like(inputs.beta), g=torch.zeros_like(inputs.g)))


@each_device
@pytest.mark.parametrize("g", (0.0, -30.0, -104.0, -1000.0, -torch.finfo(F32).max, -math.inf), ids=str)
@pytest.mark.parametrize("T", (63, 130))
def test_decays(backend, T, g):
    inputs = random(T=T)
    some = inputs.g.clone()
    some[:, T // 2 :: 7] = g
    check(backend, inputs._replace(g=some))
    check(backend, inputs._replace(g=torch.full_like(inputs.g, g)))


@each_device
def test_strong_decay(backend):
    inputs = random(T=130)
    check(backend, inputs._replace(g=-16 * torch.nn.functional.softplus(torch.randn(inputs.g.shape) - 1)))


@each_device
def test_long_memory_is_exact(backend):
    """g = 0 and orthogonal keys: what the first token wrote is read back unchanged after 4096 tokens, also through
    segments.
    """
    inputs = random(T=4096, H=1, l2norm=False, state=False, V=16)
    k, q = torch.zeros_like(inputs.k), torch.zeros_like(inputs.q)
    k[:, 0, :, 0], k[:, 1:, :, 1], q[..., 0] = 1, 1, 1
    inputs = inputs._replace(q=q, k=k, g=torch.zeros_like(inputs.g), beta=torch.ones_like(inputs.beta), scale=1.0)
    o, S = backend(OP, *inputs)
    for t in (0, 2047, 2048, 4095):
        assert_bitwise(o[:, t], inputs.v[:, 0], f"token {t}")
    assert_bitwise(S[0, 0, 0].to(BF16), inputs.v[0, 0, 0], "state")


@each_device
def test_small_decays_add_up(backend):
    """A decay of 1e-6 per token is 1 % over 10,000 tokens; no rounding of g may lose it."""
    inputs = random(T=2000, H=1, V=16)
    inputs = inputs._replace(g=torch.full_like(inputs.g, -1e-5), beta=torch.zeros_like(inputs.beta))
    _, S = backend(OP, *inputs)
    assert_error("final_state", S, inputs.initial_state * math.exp(-0.02), 1e-5)


@each_device
def test_zero_keys_queries_and_beta(backend):
    inputs = random(T=130)
    inputs.q[:, ::3], inputs.k[:, ::5], inputs.beta[:, ::2] = 0, 0, 0
    check(backend, inputs)
    check(backend, inputs._replace(k=inputs.k / 8, l2norm_qk=False))
    assert not backend(OP, *inputs)[0][:, ::3].any()
    still = inputs._replace(beta=torch.zeros_like(inputs.beta), g=torch.zeros_like(inputs.g))
    assert_bitwise(backend(OP, *still)[1], inputs.initial_state, "final_state")


@each_device
@pytest.mark.parametrize("l2norm", (True, False))
@pytest.mark.parametrize("q_scale, k_scale", ((1e6, 1), (1e-6, 1), (1, 1e-4)), ids=str)
def test_queries_and_keys_of_any_size(backend, q_scale, k_scale, l2norm):
    """Rows are divided by their norms before they become fp16, with or without l2norm."""
    inputs = random(T=130, l2norm=l2norm)
    check(backend, inputs._replace(q=inputs.q * q_scale, k=inputs.k * k_scale))


# ---- segments


@each_device
@pytest.mark.parametrize("decay", (0.0, 0.01), ids=str)
def test_segments_equal_no_segments(backend, decay):
    """Against calls that are too short to be cut."""
    inputs = random(F16, T=CUT, H=2, K=96, V=48)
    inputs = inputs._replace(g=inputs.g * decay)
    whole = backend(OP, *inputs)
    S, parts = inputs.initial_state, []
    for begin in range(0, CUT, 3008):
        out, S = backend(OP, *part(inputs, begin, min(begin + 3008, CUT), S))
        parts.append(out)
    assert_error("o", whole[0], torch.cat(parts, 1), 1e-3)
    assert_error("final_state", whole[1], S, 1e-3)
    expected = reference_in_chunks(*inputs)
    assert_error("o", whole[0], expected[0], OUTPUT_CEILING[F16])
    assert_error("final_state", whole[1], expected[1], CHUNK_STATE_CEILING)


@each_device
def test_segments_of_packed_sequences(backend):
    """Some cut, some not, some empty; without initial state."""
    inputs = random(T=11500, H=1, V=16, cu_seqlens=(0, 0, 5, 4101, 4101, 4500, 11000, 11500), state=False)
    check(backend, inputs._replace(g=inputs.g * 0.01))


@each_device
def test_segments_of_rows(backend):
    inputs = random(B=2, T=4160, H=1, K=256, V=16)
    check(backend, inputs._replace(g=inputs.g * 0.01))


@simulated
def test_which_calls_are_cut():
    """Few heads and long sequences only; with cu_seqlens the kernels stand ready and the device decides."""

    def kernels(**shape) -> list[str]:
        EARLY(OP, *random(**shape))
        return [
            counting.short(launch["mangled"]).removeprefix("chunk_").removesuffix("_kernel")
            for launch in hoppersim.launches()
        ]

    assert kernels(T=3009, H=1, V=16) == ["prepare", "sweep", "join", "sweep", "replay"]
    assert kernels(T=3008, H=1, V=16) == ["prepare", "sweep", "replay"]
    assert kernels(T=128, H=1, V=16) == ["prepare", "sweep", "replay"]
    assert kernels(T=128, H=1, V=16, cu_seqlens=(0, 100, 128)) == ["plan", "prepare", "sweep", "replay"]


# ---- memory


@each_device
@pytest.mark.parametrize("shape", (*SHAPES[:3], *SHAPES[-4:], DeltaShape("cut", T=4096, H=1, K=64, V=16)), ids=ids)
def test_every_element_is_written(backend, shape):
    inputs = delta_inputs(shape, BF16)
    expected = backend(OP, *inputs)
    with poisoned_allocations():
        for out, ref in zip(backend(OP, *inputs), expected):
            assert_bitwise(out, ref)


@each_device
def test_arguments_stay_and_runs_repeat_to_the_bit(backend):
    inputs = random(T=200, cu_seqlens=PACKED)
    before, first = [t.clone() for t in inputs[:6]], backend(OP, *inputs)
    for out, again in zip(first, backend(OP, *inputs)):
        assert_bitwise(again, out)
    for t, kept in zip(inputs[:6], before):
        assert_bitwise(t, kept)


@each_machine
@pytest.mark.parametrize("dim", (0, 1), ids=("rows", "tokens"))
@pytest.mark.parametrize("name", ("q", "v", "g"))
def test_strides_beyond_32_bits(backend, name, dim):
    inputs = random(B=2, T=3)
    far = inputs._replace(**{name: far_apart(getattr(inputs, name), dim)})
    for out, expected in zip(backend(OP, *far), backend(OP, *inputs)):
        assert_bitwise(out, expected, name)


# ---- cost, counted by the simulator

FEW_HEADS = {"2b": (4, 4), "4b": (4, 4), "128/128": (8, 4)}  # value heads, key heads: in the proportion of the model
TRAFFIC = {"2b": 1.88, "4b": 1.95, "128/128": 2.06}  # bytes over the least, of measured shapes


@simulated
@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape.name)
def test_cost(shape):
    """Of 1024 tokens: bytes, tensor-core work, bank conflicts; how sweep loads."""
    H, Hk = FEW_HEADS[shape.name]
    case = ops.chunk(shape._replace(H=H, Hk=Hk), 1, 1024)
    with hoppersim.simulate():
        ops.results(case.op, case.make(Draw()), "jet_sim")
    prepare, sweep, replay = [launch["counters"] for launch in hoppersim.launches()]
    both = counting.added([prepare, sweep, replay])
    assert sum(counting.traffic(both)) <= TRAFFIC[shape.name] * case.work.bytes
    assert counting.moved(both) <= 2.2 * case.work.bytes
    assert both["tensor_flop"] <= 1.0 * case.work.flop
    assert counting.conflict_factor(sweep) == 1.0
    assert counting.conflict_factor(prepare) < 1.1
    assert sweep["global_read_bytes"] == 0, "everything comes by TMA and bulk copies"
    assert sweep["global_write_bytes"] == H * shape.K * shape.V * 4, "threads write the final states, TMA the outputs"
    assert sweep["bulk_write_bytes"] == 1024 * H * shape.V * 2
    chunks, slices = H * 1024 // 64, shape.V // 128
    image = 2 * 10 * 16 * 16 * 2 + 6 * 64 * 4  # ten of sixteen blocks of T' and P', six vectors
    assert prepare["bulk_write_bytes"] == chunks * image
    assert sweep["bulk_read_bytes"] == chunks * (slices * (image + 2 * 64 * shape.K * 2) + 64 * shape.V * 2)
    assert replay["global_read_bytes"] == H * shape.V * 4, "a row of each final state"
    assert replay["global_write_bytes"] == 0


@simulated
def test_cost_of_segments():
    """In eight: 1.9 times the tensor-core work, the second reading, and M for every 16 columns that join has."""
    shape = next(shape for shape in MEASURED if shape.name == "2b")
    case = ops.chunk(shape._replace(H=1, Hk=1), 1, 8192)
    with hoppersim.simulate():
        ops.results(case.op, case.make(Draw()), "jet_sim")
    both = counting.added([launch["counters"] for launch in hoppersim.launches()])
    assert len(hoppersim.launches()) == 5
    assert both["tensor_flop"] <= 1.9 * case.work.flop
    assert counting.moved(both) <= 3.5 * case.work.bytes


# ---- what the compiler made


@pytest.mark.parametrize("K", KEY_DIMS)
def test_machine_code_of_sweep(K):
    stem = f"csrc.gated_delta_rule.chunk.sweep_{'narrow' if K <= 128 else 'wide'}"
    sweeps = {name: facts for name, facts in report(stem).items() if f"SweepConfigILi{K}E" in name}
    assert len(sweeps) == 3, "with outputs, without, and on a pool"
    for name, facts in sweeps.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
        code = disassembly(stem)[name]
        assert not code.uses("LDL", "STL"), name
        assert code.uses("UTMALDG") and code.uses("UBLKCP") and code.uses("USETMAXREG"), name
        products = [line for line in code.instructions if line.startswith("HGMMA")]
        # HGMMA D, A, B, C: A in registers
        assert products and all(line.split(",")[1].strip().startswith("R") for line in products), name
        if "SweepPassE0" in name or "SweepPassE3" in name:
            steps = K // 16
            assert len(products) == 2 * steps + 3 * 4, f"{name}: S K, S Q, then R T', U P', U K"
            assert code.uses("UTMASTG"), name


def test_machine_code_of_prepare():
    stem = "csrc.gated_delta_rule.chunk.launch"
    kernels = {name: facts for name, facts in report(stem).items() if "prepare" in name}
    assert len(kernels) == 2 * len(KEY_DIMS), "bf16 and f16"
    for name, facts in kernels.items():
        assert (
            facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= (168 if "ILi256E" in name else 128)
        ), name
        code = disassembly(stem)[name]
        assert not code.uses("LDL", "STL"), name
        assert code.uses("HGMMA") and code.uses("HMMA") and code.uses("UTMALDG"), name
        assert len(code.instructions) <= 2700, name


def test_machine_code_of_join():
    stem = "csrc.gated_delta_rule.chunk.launch"
    kernels = {name: facts for name, facts in report(stem).items() if "join" in name}
    assert len(kernels) == len(KEY_DIMS)
    for name, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
        assert disassembly(stem)[name].uses("UTMALDG"), name


def test_machine_code_of_replay():
    stem = "csrc.gated_delta_rule.chunk.launch"
    kernels = {name: facts for name, facts in report(stem).items() if "replay" in name}
    assert len(kernels) == 2, "with a pool and without"
    for name, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= (80 if "Lb1" in name else 64), (
            name
        )
