"""Random wrong arguments to every op and function: a sentence that names one of them, nothing written, and fake kernels
that agree.

``JETKERNELS_EXAMPLES=N`` draws N cases of each function instead of a few.
"""

import inspect
import os
import random
import re

import numpy
import pytest
import torch
from hypothesis import given, settings
from support.arguments import ALL_OPS, example
from support.comparison import assert_bitwise
from support.strategies import seeds
from torch import Tensor

import jetkernels

EXAMPLES = int(os.environ.get("JETKERNELS_EXAMPLES", 40))
many = settings(max_examples=EXAMPLES, deadline=None)
FUNCTIONS = {name: name.removesuffix("_") for name in jetkernels.ops.__all__ if name.removesuffix("_") in ALL_OPS}
FUNCTIONS["fused_recurrent_gated_delta_rule"] = "chunk_gated_delta_rule"
RENAMED = {"l2norm_qk": "use_qk_l2norm_in_kernel", "silu": "activation"}
OF_VALUES = (
    "state_indices[",
    "must name each row",
    "cu_seqlens[",
    "must not decrease",
    "num_accepted[",
    "mark_tokens[",
    "mark_indices[",
    "must name each token",
    "must be <= 0",
    "share memory",
)
DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
    torch.quint8,
)


def schema_of(op: str):
    return getattr(torch.ops.jet, op).default._schema


def valid_arguments(op: str, rng: random.Random) -> dict:
    torch.manual_seed(rng.randrange(2**31))
    return example(op, indexed=rng.random() < 0.5)._asdict()


def resized(t: Tensor, rng: random.Random) -> Tensor:
    dim = rng.randrange(t.dim())
    shape = list(t.shape)
    shape[dim] = rng.choice((0, 1, shape[dim] + 1, max(shape[dim] - 1, 0), 2 * shape[dim]))
    return torch.zeros(shape, dtype=t.dtype)


def cast(t: Tensor, rng: random.Random) -> Tensor:
    dtype = rng.choice(DTYPES)
    if dtype == torch.quint8:
        return torch.quantize_per_tensor(t.float(), 1.0, 0, dtype)
    return t.to(dtype)


def spoiled(t: Tensor, rng: random.Random) -> Tensor:
    """Other numbers: out of range, decreasing, above 0, NaN."""
    if t.is_floating_point():
        return torch.full_like(t, rng.choice((0.5, float("inf"), -float("inf"), float("nan"))))
    if t.dtype == torch.bool:
        return ~t
    limits = torch.iinfo(t.dtype)
    numbers = [n for n in (-(2**31), -1, 0, 1, 2, 3, 5, 6, 2**31 - 1) if limits.min <= n <= limits.max]
    return torch.tensor([rng.choice(numbers) for _ in range(t.numel())], dtype=t.dtype).view(t.shape)


def overlapped(t: Tensor, rng: random.Random) -> Tensor:
    stride = [rng.choice((0, 1, s)) for s in t.stride()]
    return t.as_strided(t.shape, stride)


CHANGES = (
    lambda t, rng: None,
    lambda t, rng: torch.zeros((), dtype=t.dtype),
    lambda t, rng: t[0] if t.dim() and t.shape[0] else t,
    lambda t, rng: t.unsqueeze(rng.randrange(t.dim() + 1)),
    resized,
    resized,
    resized,
    cast,
    cast,
    spoiled,
    spoiled,
    overlapped,
    lambda t, rng: t.mT.contiguous().mT if t.dim() > 1 else t,
    lambda t, rng: t.to("meta"),
    lambda t, rng: t.to_sparse(),
    lambda t, rng: rng.choice(
        ("text", 3, 2.5, True, [1, 2], {}, t.numpy(), t.shape, numpy.float32(1), Tensor, object())
    ),
)
NUMBERS = (None, "text", [1.0], 3, float("nan"), torch.zeros(2), 2**70, True, object())


def spoil(args: dict, rng: random.Random) -> dict:
    args = dict(args)
    for name in rng.sample(sorted(args), rng.choice((1, 1, 2))):
        value = args[name]
        if isinstance(value, Tensor):
            args[name] = rng.choice(CHANGES)(value, rng)
        elif value is None:
            args[name] = rng.choice(
                (torch.zeros(rng.choice(((), (1,), (2,), (2, 2)))), torch.tensor([0, 5]), "text", 3)
            )
        else:
            args[name] = rng.choice(NUMBERS)
    return args


def written(op: str, args: dict) -> dict[str, Tensor]:
    names = [a.name for a in schema_of(op).arguments if a.alias_info is not None]
    return {
        n: args[n]
        for n in names
        if isinstance(args[n], Tensor)
        and args[n].layout == torch.strided
        and not args[n].is_meta
        and not args[n].is_quantized
    }


def outcome(call, op: str, args: dict):
    """What the call returned, or its error; nothing is written then."""
    before = {n: t.clone() for n, t in written(op, args).items()}
    try:
        return call(), None
    except (RuntimeError, TypeError, ValueError) as error:
        for name, t in written(op, args).items():
            assert torch.equal(
                t.view(torch.uint8) if t.is_contiguous() and t.dim() else t.nan_to_num(),
                before[name].view(torch.uint8) if t.is_contiguous() and t.dim() else before[name].nan_to_num(),
            ), f"{name} was written: {error}"
        return None, error


def names_an_argument(message: str, names) -> bool:
    return any(re.search(rf"\b{name}\b", message) for name in names) or "state pool" in message


@pytest.mark.parametrize("function", FUNCTIONS)
@many
@given(seed=seeds)
def test_functions_name_themselves_and_an_argument(function, seed):
    rng, op = random.Random(seed), FUNCTIONS[function]
    given_arguments = valid_arguments(op, rng)
    if function == "fused_recurrent_gated_delta_rule":
        given_arguments["cu_seqlens"] = None
    args = spoil(given_arguments, rng)
    renamed = {RENAMED.get(name, name): value for name, value in args.items()}
    if "activation" in renamed and isinstance(renamed["activation"], bool):
        renamed["activation"] = "silu" if renamed["activation"] else None
    parameters = inspect.signature(getattr(jetkernels, function)).parameters
    _, error = outcome(lambda: getattr(jetkernels, function)(**renamed), op, args)
    if error is not None:
        message = str(error)
        sparse_or_quantized = isinstance(error, NotImplementedError) and "backend" in message
        assert sparse_or_quantized or (message.startswith(function + ": ") and "\n" not in message), message
        assert sparse_or_quantized or names_an_argument(message, parameters), message


@pytest.mark.parametrize("op", ALL_OPS)
@many
@given(seed=seeds)
def test_ops_and_their_fake_kernels_agree(op, seed):
    rng = random.Random(seed)
    args = spoil(valid_arguments(op, rng), rng)
    call = getattr(torch.ops.jet, op).default
    out, error = outcome(lambda: call(*args.values()), op, args)
    message = str(error)
    assert error is None or names_an_argument(message, args) or "backend" in message, message
    fake_too = all(
        not isinstance(t, Tensor) or (t.layout == torch.strided and not t.is_meta and not t.is_quantized)
        for t in args.values()
    )
    if not fake_too or any(text in message for text in OF_VALUES):
        return
    fake_out, fake_error = outcome(
        lambda: call(*(t.to("meta") if isinstance(t, Tensor) else t for t in args.values())), op, args
    )
    if not any(
        isinstance(t, Tensor) and t.stride() != t.contiguous().stride() for t in args.values()
    ):  # .to("meta") keeps no overlap
        assert error is None and fake_error is None or message.split("\n")[0] == str(fake_error).split("\n")[0], (
            message,
            fake_error,
        )
    if error is None and fake_error is None:
        for real, fake in zip(
            out if isinstance(out, tuple) else (out,), fake_out if isinstance(fake_out, tuple) else (fake_out,)
        ):
            if isinstance(real, Tensor):
                assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


# ---- memory that is shared


def fresh(op: str) -> dict:
    return valid_arguments(op, random.Random(0))


@pytest.mark.parametrize("op", [op for op in ALL_OPS if any(a.alias_info is not None for a in schema_of(op).arguments)])
def test_what_is_written_shares_memory_with_nothing(op):
    names = [a.name for a in schema_of(op).arguments if a.alias_info is not None]
    for name in names:
        for other, t in fresh(op).items():
            if other == name or not isinstance(t, Tensor):
                continue
            args = fresh(op)
            span = max(args[name].numel() * args[name].element_size(), t.numel() * t.element_size()) + 64
            memory = torch.zeros(span, dtype=torch.uint8)
            for n, offset in ((name, 0), (other, 8)):
                value = args[n]
                args[n] = (
                    memory[offset : offset + value.numel() * value.element_size()]
                    .view(value.dtype)
                    .view(value.shape)
                    .copy_(value)
                )
            before = args[name].clone()
            with pytest.raises(RuntimeError, match=f"^{op}: \\w+ is written in place and must not share memory with"):
                getattr(torch.ops.jet, op)(*args.values())
            assert_bitwise(args[name], before, name)


def test_pools_that_interleave_in_pages_are_apart():
    """A page per sequence that holds the state and, behind it, what else is kept of a sequence."""
    q, k, v, g, beta, state, rows, scale, l2norm = example("recurrent_gated_delta_rule")
    P, size = state.shape[0], state[0].numel()
    pages = torch.zeros(P, size + q[0].numel())
    paged, paged_q = pages[:, :size].view_as(state), pages[:3, size:].unflatten(-1, q.shape[1:])
    paged.copy_(state), paged_q.copy_(q)
    expected = torch.ops.jet.recurrent_gated_delta_rule(q, k, v, g, beta, state, rows, scale, l2norm)
    assert_bitwise(
        torch.ops.jet.recurrent_gated_delta_rule(paged_q, k, v, g, beta, paged, rows, scale, l2norm), expected, "o"
    )
    assert_bitwise(paged, state, "pool")
    over = pages[:3, size - 1 : -1].unflatten(-1, q.shape[1:])
    with pytest.raises(RuntimeError, match="state is written in place and must not share memory with q"):
        torch.ops.jet.recurrent_gated_delta_rule(over, k, v, g, beta, paged, rows, scale, l2norm)


def test_pools_of_any_order_of_dimensions_are_taken_and_overlapping_ones_are_not():
    call = example("recurrent_gated_delta_rule")
    pool = call.state
    for order in ((0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)):
        again = pool.permute(order).contiguous().permute([order.index(i) for i in range(4)])
        torch.ops.jet.recurrent_gated_delta_rule(*call._replace(state=again))
    for bad in (
        pool[:1].expand(pool.shape),
        pool.flatten().unfold(0, pool[0].numel(), 1)[:4].unflatten(1, pool.shape[1:]),
    ):
        with pytest.raises(RuntimeError, match="state is written in place and must not overlap itself"):
            torch.ops.jet.recurrent_gated_delta_rule(*call._replace(state=bad))


# ---- the decay


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("op", [op for op in ALL_OPS if "gated_delta_rule" in op])
def test_a_decay_above_zero_is_refused_where_it_is(op, dtype):
    for value, refused in (
        (0.5, True),
        (1e-7, True),
        (float("inf"), True),
        (0.0, False),
        (-0.0, False),
        (float("nan"), False),
        (float("-inf"), False),
        (-1e-7, False),
    ):
        args = fresh(op)
        g = torch.stack([args["g"].to(dtype)] * 2, -1)[..., 0]
        g[1 if g.shape[0] > 1 else 0, -1, 1] = value
        args["g"] = g
        if refused:
            place = re.escape(f"[{1 if g.shape[0] > 1 else 0},{g.shape[1] - 1},1]")
            with pytest.raises(RuntimeError, match=f"^{op}: g must be <= 0 .*, got .* at {place}$"):
                getattr(torch.ops.jet, op)(*args.values())
        else:
            getattr(torch.ops.jet, op)(*args.values())


def test_fused_recurrent_checks_as_chunk_with_and_without_gradients():
    q, k, v, g, beta, S, *_ = example("chunk_gated_delta_rule", indexed=False)
    for state in (
        S[:1],
        S[:, :1],
        torch.cat([S, S]),
        S.mT.contiguous(),
        S.double(),
        S.long(),
        S[0],
        torch.zeros(()),
    ):
        for leaf in (q, q.clone().requires_grad_()):
            messages = []
            for function in (jetkernels.chunk_gated_delta_rule, jetkernels.fused_recurrent_gated_delta_rule):
                with pytest.raises(RuntimeError, match=f"^{function.__name__}: initial_state ") as caught:
                    function(leaf, k, v, g, beta, initial_state=state)
                messages.append(str(caught.value).partition(": ")[2])
            assert messages[0] == messages[1]


def test_verify_without_value_heads_writes_keys():
    k = torch.randn(2, 3, 2, 4)
    for l2norm in (False, True):
        for rows in (None, torch.tensor([1, -1])):
            keys = torch.full(k.shape, float("nan"))
            none = torch.zeros(2, 3, 0, 5), torch.zeros(2, 3, 0), torch.zeros(2, 3, 0), torch.zeros(2, 0, 4, 5)
            jetkernels.recurrent_gated_delta_rule_verify(k, k, *none, keys, torch.zeros(2, 3, 0, 5), rows, None, l2norm)
            expected = k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if l2norm else k.clone()
            if rows is not None:
                expected[1] = 0
            torch.testing.assert_close(keys, expected)
