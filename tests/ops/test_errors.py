"""A wrong argument raises one line that names the op, the argument, what it needs and what it got; no pool is
touched.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.arguments import (
    POOL_OPS,
    ApplyInputs,
    BlockStepCall,
    CommitCall,
    ConvInputs,
    DeltaInputs,
    RecurrentCall,
    StepCall,
    VerifyCall,
    apply_inputs,
    block_step_call,
    commit_call,
    conv_inputs,
    cotangents,
    delta_inputs,
    recurrent_call,
    step_call,
    verify_call,
    with_pool,
    with_rows,
)
from support.comparison import assert_bitwise
from support.sequence_properties import on_tokens, state_name
from support.shapes import ConvShape, DeltaShape
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Wrong(NamedTuple):
    argument: str
    change: Callable[[Tensor | None], Tensor | None]
    says: tuple[str, ...]  # what the message contains besides the op


def resized(dim: int, size: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape)

    return change


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(dtype)


def drop_dim(t: Tensor) -> Tensor:
    return t[0]


def add_dim(t: Tensor) -> Tensor:
    return t[None]


def integers(*values: int, dtype: torch.dtype = torch.int32) -> Callable[[object], Tensor]:
    return lambda _: torch.tensor(values, dtype=dtype)


# Valid arguments: B = 2, T = 5, Hk = 2, H = 4, K = 8, V = 12; D = 12, R = 5, W = 4; N = 3 and P = 5 with a pool.
DELTA, CONV = DeltaShape("", B=2, T=5, Hk=2, H=4), ConvShape("", T=5)


def delta() -> DeltaInputs:
    return delta_inputs(DELTA)


def conv() -> ConvInputs:
    return conv_inputs(CONV)


def apply() -> ApplyInputs:
    return apply_inputs(CONV)


def recurrent() -> RecurrentCall:
    return recurrent_call(DELTA._replace(B=3), rows=(3, -1, 0))


def verify() -> VerifyCall:
    return verify_call(recurrent())


def commit() -> CommitCall:
    return commit_call(recurrent(), (5, 0, 2))


def step() -> StepCall:
    return step_call(CONV._replace(B=3), rows=(3, -1, 0))


def block_step() -> BlockStepCall:
    return block_step_call(V=6, rows=(3, -1, 0))


DELTA_TOKENS = (
    Wrong("q", drop_dim, ("q must have 4 dimensions", "got 3")),
    Wrong("q", cast(torch.int32), ("q must be", "got int32")),
    Wrong("q", cast(torch.bool), ("q must be", "got bool")),
    Wrong("k", add_dim, ("k must have 4 dimensions", "got 5")),
    Wrong("k", cast(BF16), ("k must be float32", "got bfloat16")),
    Wrong("k", resized(1, 4), ("k", "T = 5", "got 4")),
    Wrong("k", resized(2, 1), ("k", "Hk = 2", "got 1")),
    Wrong("k", resized(3, 7), ("k", "K = 8", "got 7")),
    Wrong("v", resized(0, 1), ("v", "got 1")),
    Wrong("v", cast(F64), ("v must be float32", "got float64")),
    Wrong("v", drop_dim, ("v must have 4 dimensions", "got 3")),
    Wrong("g", resized(2, 2), ("g", "H = 4", "got 2")),
    Wrong("g", add_dim, ("g must have 3 dimensions", "got 4")),
    Wrong("g", cast(torch.int64), ("g must be", "got int64")),
    Wrong("beta", resized(1, 6), ("beta", "T = 5", "got 6")),
    Wrong("beta", cast(torch.int64), ("beta must be", "got int64")),
)
CU_SEQLENS = (
    Wrong("cu_seqlens", integers(0, 3, 2, 5), ("cu_seqlens must not decrease", "2 after 3")),
    Wrong("cu_seqlens", integers(0, -1, 5), ("cu_seqlens must not decrease", "-1")),
    Wrong("cu_seqlens", integers(1, 5), ("cu_seqlens[0] must be 0", "got 1")),
    Wrong("cu_seqlens", integers(0, 4), ("cu_seqlens[1] must be T = 5", "got 4")),
    Wrong("cu_seqlens", integers(0, 6), ("cu_seqlens[1] must be T = 5", "got 6")),
    Wrong("cu_seqlens", integers(), ("cu_seqlens must have 1 dimension",)),
    Wrong("cu_seqlens", lambda _: torch.tensor([[0, 5]]), ("cu_seqlens must have 1 dimension", "[1,2]")),
    Wrong("cu_seqlens", lambda _: torch.tensor([0.0, 5.0]), ("cu_seqlens must be int32 or int64", "got float32")),
)
INDICES = (
    Wrong("state_indices", integers(5, 0, 1), ("state_indices[0]", "P = 5", "got 5")),
    Wrong("state_indices", integers(0, 1, 2**31 - 1), ("state_indices[2]", "P = 5")),
    Wrong("state_indices", integers(0, 1, 2**40, dtype=torch.int64), ("state_indices[2]", "P = 5", str(2**40))),
    Wrong("state_indices", integers(1, 0, 1), ("state_indices", "row 1")),
    Wrong("state_indices", integers(0, 1), ("state_indices", "N = 3", "got 2")),
    Wrong(
        "state_indices",
        lambda _: torch.tensor([0.0, 1.0, 2.0]),
        ("state_indices must be int32 or int64", "got float32"),
    ),
    Wrong("state_indices", lambda _: torch.tensor([[0], [1], [2]]), ("state_indices must have 1 dimension",)),
)
POOL = (
    Wrong("state", resized(1, 2), ("state", "H = 4", "got 2")),
    Wrong("state", resized(2, 7), ("state", "K = 8", "got 7")),
    Wrong("state", resized(3, 8), ("state", "V = 12", "got 8")),
    Wrong("state", drop_dim, ("state must have 4 dimensions",)),
    Wrong("state", cast(F16), ("state must be float32 or bfloat16", "got float16")),
    Wrong("state", cast(F64), ("state must be float32 or bfloat16", "got float64")),
)
EXPANDED_POOL = Wrong("state", lambda t: t[:1].expand(5, -1, -1, -1), ("state",))
BUFFERS = (
    Wrong("keys", drop_dim, ("keys must have 4 dimensions", "got 3")),
    Wrong("keys", lambda t: t.mT.contiguous().mT, ("keys must be contiguous", "strides [80,16,1,2]")),
    Wrong("keys", lambda t: t[:1].expand(3, -1, -1, -1), ("keys must be contiguous",)),
    Wrong("updates", cast(F64), ("updates must be float32", "got float64")),
    Wrong("updates", resized(0, 2), ("updates", "N = 3", "got 2")),
    Wrong("updates", lambda t: torch.cat([t, t], -1)[..., :12], ("updates must be contiguous",)),
)
GENERATOR = (
    Wrong("x", cast(torch.int64), ("x must be", "got int64")),
    Wrong("x", drop_dim, ("x must have",)),
    Wrong("hidden", add_dim, ("hidden must have",)),
    Wrong("hidden", cast(F16), ("hidden must be float32", "got float16")),
    Wrong("hidden", resized(0, 1), ("hidden", "got 1")),
    Wrong("hidden", resized(-1, 6), ("R = 6", "got 5")),
    Wrong("weight", resized(0, 47), ("weight", "D = 12", "got 47")),
    Wrong("weight", resized(0, 12), ("weight", "W in 2..4", "got 12")),
    Wrong("weight", resized(0, 60), ("weight", "W in 2..4", "got 60")),
    Wrong("weight", drop_dim, ("weight must have 2 dimensions",)),
    Wrong("weight", cast(BF16), ("weight must be float32", "got bfloat16")),
    Wrong("bias", resized(0, 12), ("bias", "48", "got 12")),
    Wrong("bias", add_dim, ("bias must have 1 dimension",)),
    Wrong("bias", cast(BF16), ("bias must be float32", "got bfloat16")),
)
CONV_STATE = (
    Wrong("conv_state", resized(0, 1), ("conv_state", "N = 2", "got 1")),
    Wrong("conv_state", resized(1, 11), ("conv_state", "D = 12", "got 11")),
    Wrong("conv_state", resized(2, 4), ("conv_state", "= 3", "got 4")),
    Wrong("conv_state", drop_dim, ("conv_state must have 3 dimensions",)),
    Wrong("conv_state", cast(BF16), ("conv_state must be float32", "got bfloat16")),
)
B_IS_TWO = Wrong("cu_seqlens", integers(0, 5), ("(B) must be 1 with cu_seqlens", "got 2"))

TABLE: dict[str, tuple[Callable[[], tuple], tuple[Wrong, ...]]] = {
    "chunk_gated_delta_rule": (
        delta,
        (
            *DELTA_TOKENS,
            B_IS_TWO,
            Wrong("q", resized(3, 0), ("K",)),
            Wrong("v", resized(3, 0), ("V",)),
            Wrong("initial_state", resized(0, 1), ("initial_state", "N = 2", "got 1")),
            Wrong("initial_state", resized(1, 2), ("initial_state", "H = 4", "got 2")),
            Wrong("initial_state", resized(2, 12), ("initial_state", "K = 8", "got 12")),
            Wrong("initial_state", resized(3, 8), ("initial_state", "V = 12", "got 8")),
            Wrong("initial_state", drop_dim, ("initial_state must have 4 dimensions",)),
            Wrong("initial_state", cast(BF16), ("initial_state must be float32", "got bfloat16")),
        ),
    ),
    "dynamic_conv": (conv, (*GENERATOR, *CONV_STATE, B_IS_TWO)),
    "apply_dynamic_conv": (
        apply,
        (
            *CONV_STATE,
            B_IS_TWO,
            Wrong("x", cast(torch.int64), ("x must be", "got int64")),
            Wrong("x", drop_dim, ("x must have 3 dimensions",)),
            Wrong("kernels", drop_dim, ("kernels must have 4 dimensions",)),
            Wrong("kernels", resized(1, 4), ("kernels", "T = 5", "got 4")),
            Wrong("kernels", resized(2, 1), ("kernels", "D = 12", "got 1")),
            Wrong("kernels", resized(3, 5), ("kernels", "2..4", "got 5")),
            Wrong("kernels", resized(3, 1), ("kernels", "2..4", "got 1")),
            Wrong("kernels", cast(BF16), ("kernels must be float32", "got bfloat16")),
        ),
    ),
    "recurrent_gated_delta_rule": (
        recurrent,
        (
            *DELTA_TOKENS,
            *INDICES,
            *POOL,
            EXPANDED_POOL,
        ),
    ),
    "recurrent_gated_delta_rule_verify": (
        verify,
        (
            *DELTA_TOKENS,
            *INDICES,
            *POOL,
            *BUFFERS,
            Wrong("keys", resized(2, 4), ("keys", "Hk = 2", "got 4")),
            Wrong("keys", cast(BF16), ("keys must be float32", "got bfloat16")),
            Wrong("updates", resized(3, 8), ("updates", "V = 12", "got 8")),
        ),
    ),
    "recurrent_gated_delta_rule_commit": (
        commit,
        (
            *BUFFERS,
            *INDICES,
            *POOL,
            EXPANDED_POOL,
            Wrong("keys", cast(BF16), ("keys must be float32 or float64", "got bfloat16")),
            Wrong(
                "keys", resized(2, 3), ("updates dimension 2 (H) must be a multiple of Hk = 3", "as in keys", "got 4")
            ),
            Wrong("keys", resized(3, 0), ("K",)),
            Wrong("updates", resized(1, 4), ("updates", "T = 5", "got 4")),
            Wrong("g", resized(2, 2), ("g", "H = 4", "got 2")),
            Wrong("g", cast(torch.int64), ("g must be", "got int64")),
            Wrong("num_accepted", integers(0, 6, 0), ("num_accepted[1] must be in 0..T = 5", "got 6")),
            Wrong("num_accepted", integers(0, 0, -1), ("num_accepted[2] must be in 0..T = 5", "got -1")),
            Wrong("num_accepted", integers(2**40, 0, 1, dtype=torch.int64), ("num_accepted[0]", str(2**40))),
            Wrong("num_accepted", integers(1, 2), ("num_accepted", "N = 3", "got 2")),
            Wrong("num_accepted", lambda _: torch.ones(3), ("num_accepted must be int32 or int64", "got float32")),
        ),
    ),
    "dynamic_conv_step": (
        step,
        (
            *GENERATOR,
            *INDICES,
            Wrong("conv_state", resized(1, 11), ("conv_state", "D = 12", "got 11")),
            Wrong("conv_state", resized(2, 2), ("conv_state", "= 3", "got 2")),
            Wrong("conv_state", drop_dim, ("conv_state must have 3 dimensions",)),
            Wrong("conv_state", cast(BF16), ("conv_state must be float32", "got bfloat16")),
            Wrong("conv_state", lambda t: t[:1].expand(5, -1, -1), ("conv_state",)),
        ),
    ),
    "jet_block_step": (
        block_step,
        (
            *INDICES,
            *(wrong for wrong in GENERATOR if wrong.argument == "bias"),
            Wrong("q", cast(torch.int64), ("q must be", "got int64")),
            Wrong("q", resized(2, 0), ("k", "K = 0 (as in q)", "got 8")),
            Wrong("q", drop_dim, ("q must have 3 dimensions [N,H,K]",)),
            Wrong("k", resized(2, 7), ("k", "K = 8", "got 7")),
            Wrong("k", cast(F16), ("k must be float32 like q", "got float16")),
            Wrong("v", resized(1, 11), ("weight dimension 0 must be D*W with D = 11 (as in v)",)),
            Wrong("v", resized(1, 0), ("v dimension 1 (D) must be at least 1",)),
            Wrong("v", add_dim, ("v must have 2 dimensions",)),
            Wrong("hidden", resized(0, 1), ("hidden", "N = 3", "got 1")),
            Wrong("hidden", cast(BF16), ("hidden must be float32 like v", "got bfloat16")),
            Wrong("a", resized(1, 3), ("a", "H = 2", "got 3")),
            Wrong("a", cast(F64), ("a must be float32 like q", "got float64")),
            Wrong("b", drop_dim, ("b must have 2 dimensions",)),
            Wrong("gate", resized(2, 5), ("v dimension 1 (D) must be H*V = 2*5 (as in gate)", "got 12")),
            Wrong("gate", resized(0, 2), ("gate", "N = 3", "got 2")),
            Wrong("weight", resized(0, 12), ("weight", "W in 2..4", "got 12")),
            Wrong("weight", cast(BF16), ("weight must be float32 like v", "got bfloat16")),
            Wrong("A_log", resized(0, 3), ("A_log", "H = 2", "got 3")),
            Wrong("A_log", cast(BF16), ("A_log must be float32", "got bfloat16")),
            Wrong("dt_bias", add_dim, ("dt_bias must have 1 dimension",)),
            Wrong("norm_weight", resized(0, 5), ("norm_weight", "V = 6", "got 5")),
            Wrong("norm_weight", cast(F64), ("norm_weight must be float32", "got float64")),
            Wrong("conv_state", resized(1, 11), ("conv_state", "D = 12", "got 11")),
            Wrong("conv_state", resized(2, 2), ("conv_state", "= 3", "got 2")),
            Wrong("conv_state", resized(0, 4), ("state", "P = 4", "got 5")),
            Wrong("conv_state", cast(BF16), ("conv_state must be float32", "got bfloat16")),
            Wrong("conv_state", lambda t: t[:1].expand(5, -1, -1), ("conv_state",)),
            Wrong("state", resized(1, 3), ("state", "H = 2", "got 3")),
            Wrong("state", resized(2, 7), ("state", "K = 8", "got 7")),
            Wrong("state", resized(3, 8), ("state", "V = 6", "got 8")),
            Wrong("state", cast(F16), ("state must be float32 or bfloat16", "got float16")),
            EXPANDED_POOL,
        ),
    ),
}


def refuse(op: str, args: tuple, says: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.jet, op)(*args)
    message = str(caught.value)
    assert message.startswith(f"{op}: ") and "\n" not in message, message
    for text in says:
        assert text in message, f"{text!r} is not in: {message}"


@pytest.mark.parametrize(
    "op, valid, wrong",
    [
        pytest.param(op, valid, wrong, id=f"{op}-{wrong.argument}-{i}")
        for op, (valid, table) in TABLE.items()
        for i, wrong in enumerate(table)
    ],
)
def test_wrong_argument(op, valid, wrong):
    args = valid()
    bad = args._replace(**{wrong.argument: wrong.change(getattr(args, wrong.argument))})
    schema = getattr(torch.ops.jet, op).default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    before = [getattr(bad, name).clone() for name in written]
    refuse(op, bad, wrong.says)
    for name, old in zip(written, before):
        assert_bitwise(getattr(bad, name), old, f"{name} after the error")


@pytest.mark.parametrize("wrong", CU_SEQLENS, ids=lambda wrong: wrong.says[0])
@pytest.mark.parametrize("op", ("chunk_gated_delta_rule", "dynamic_conv", "apply_dynamic_conv"))
def test_wrong_cu_seqlens(op, wrong):
    """Packed input is one row; unsorted offsets are refused, empty sequences are not."""
    valid, _ = TABLE[op]
    inputs = on_tokens(valid(), lambda t: t[:1])
    inputs = inputs._replace(**{state_name(inputs): None})
    good = inputs._replace(cu_seqlens=torch.tensor([0, 0, 2, 5, 5]))
    getattr(torch.ops.jet, op)(*good)
    refuse(op, inputs._replace(cu_seqlens=wrong.change(None)), wrong.says)


@pytest.mark.parametrize(
    "op", ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "recurrent_gated_delta_rule_verify")
)
def test_value_heads_are_a_multiple_of_key_heads(op):
    args = TABLE[op][0]()
    three = args._replace(**{name: getattr(args, name)[:, :, :3] for name in ("v", "g", "beta")})
    name = "state" if op.startswith("recurrent") else "initial_state"
    three = three._replace(**{name: getattr(args, name)[:, :3]})
    refuse(op, three, ("v dimension 2 (H) must be a multiple of Hk = 2", "got 3"))


@pytest.mark.parametrize("op", POOL_OPS)
def test_pool_smaller_than_the_batch(op):
    call = TABLE[op][0]()
    small = with_pool(with_rows(call, None), call.pool[:2].clone())
    before = small.pool.clone()
    refuse(op, small, ("N = 3", "2"))
    assert_bitwise(small.pool, before, "pool after the error")


@pytest.mark.parametrize("op", ("chunk_gated_delta_rule", "dynamic_conv", "apply_dynamic_conv"))
@pytest.mark.parametrize(
    "change",
    (resized(1, 3), cast(F64), drop_dim, cast(torch.int32)),
    ids=("size", "dtype", "rank", "integer"),
)
@pytest.mark.parametrize("which", (0, 1), ids=("output", "state"))
def test_wrong_cotangent(op, change, which):
    inputs = TABLE[op][0]()
    grads = list(cotangents(inputs))
    grads[which] = change(grads[which])
    refuse(op + "_backward", (*grads, *inputs), ("grad_",))


@pytest.mark.parametrize("to", ("argument", "everything else"))
@pytest.mark.parametrize("op", TABLE)
def test_tensors_on_two_devices(op, to):
    """As with a CPU state and a CUDA q: no kernel of either device runs. The second device here is meta."""
    valid, _ = TABLE[op]
    args = valid()
    for name in [name for name, t in args._asdict().items() if isinstance(t, Tensor)]:
        mixed = {
            n: t.to("meta")
            for n, t in args._asdict().items()
            if isinstance(t, Tensor) and (n == name) == (to == "argument")
        }
        before = args.pool.clone() if hasattr(args, "pool") else None
        with pytest.raises(RuntimeError, match=f"^{op}: .*must be on"):
            getattr(torch.ops.jet, op)(*args._replace(**mixed))
        if before is not None:
            assert_bitwise(args.pool, before, "pool after the error")
