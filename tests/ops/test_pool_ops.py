"""The ops on a pool of states: which rows they read and write, and that nothing else matters or changes."""

import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from support import draft_properties, pool_properties
from support.arguments import recurrent_call, step_call, with_rows
from support.backends import PAIRS, each_backend
from support.comparison import DTYPES, assert_bitwise
from support.pool_properties import run
from support.shapes import ConvShape, DeltaShape, ids

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
RECURRENT, VERIFY, STEP = "recurrent_gated_delta_rule", "recurrent_gated_delta_rule_verify", "dynamic_conv_step"
SHAPES = {
    RECURRENT: DeltaShape("", B=3, T=1),
    VERIFY: DeltaShape("", B=3, T=5, Hk=2, H=4, K=13, V=70),
    STEP: ConvShape("", B=3),
}


class Case(NamedTuple):
    op: str
    dtype: torch.dtype
    state: torch.dtype

    @property
    def reason(self) -> str:
        return f"{self.op}-{ids(self.dtype)}-{ids(self.state)}"

    def call(self, P: int | None = None, **changes):
        """Of three sequences, in a pool of five rows. A call of verify is one of recurrent_gated_delta_rule."""
        shape = SHAPES[self.op]._replace(**changes)
        if self.op == STEP:
            return step_call(shape, self.dtype, P=P)
        return recurrent_call(shape, self.dtype, self.state, P=P)

    @property
    def properties(self) -> ModuleType:
        return draft_properties if self.op == VERIFY else pool_properties


BOTH = (*(Case(RECURRENT, *pair) for pair in PAIRS), *(Case(STEP, dtype, dtype) for dtype in DTYPES))
ALL = (
    *(case for case in BOTH if case.op == STEP or case.dtype == F32),
    Case(VERIFY, F32, F32),
    Case(VERIFY, F32, BF16),
)
each_of_both = pytest.mark.parametrize("case", BOTH, ids=ids)
each_of_all = pytest.mark.parametrize("case", ALL, ids=ids)
each_in_fp32 = pytest.mark.parametrize(
    "case", [case for case in ALL if (case.dtype, case.state) == (F32, F32)], ids=ids
)


@each_backend
@each_of_all
def test_index_minus_one_is_not_row_zero(backend, case):
    case.properties.negative_index_is_not_a_row(backend, case.call())


@each_backend
@pytest.mark.parametrize("rows", ((3, 0, 1), (-1, 2, -1)), ids=str)
@each_of_all
def test_other_rows_do_not_matter(backend, case, rows):
    case.properties.other_rows_do_not_matter(backend, case.call(), rows)


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
@each_in_fp32
def test_nan_stays_in_its_sequence(backend, case, n, value):
    for changes in {RECURRENT: ({"T": 1}, {"T": 3}), STEP: ({"D": 33},), VERIFY: ({},)}[case.op]:
        call = with_rows(case.call(**changes), (4, 0, 2))
        case.properties.nan_stays_in_its_sequence(backend, call, n, value)


@each_backend
@each_of_both
def test_rows_do_not_depend_on_others(backend, case):
    pool_properties.rows_do_not_depend_on_others(backend, with_rows(case.call(), (4, 0, 2)))


@each_backend
@pytest.mark.parametrize("rows", (None, (4, -1, 2)), ids=str)
@each_of_both
def test_every_element_is_written(backend, case, rows):
    call = case.call(D=37) if case.op == STEP else case.call()
    pool_properties.every_element_is_written(backend, with_rows(call, rows))


@each_backend
def test_repeated_runs_are_equal(backend):
    for call in (Case(RECURRENT, F32, F32).call(T=4, K=96, V=256), Case(STEP, F32, F32).call(D=300, R=40)):
        pool_properties.repeated_runs_are_equal(backend, with_rows(call, (4, 0, 2)))


@each_backend
def test_updates_in_place(backend):
    for op in (RECURRENT, STEP):
        pool_properties.updates_in_place(backend, Case(op, F32, F32).call())


@each_backend
@pytest.mark.parametrize("state", (F32, BF16), ids=ids)
def test_row_beyond_32_bits(backend, state):
    pool_properties.row_beyond_32_bits(backend, Case(RECURRENT, F32, state).call(P=2, B=2, K=64, V=64))


@each_backend
def test_row_of_conv_state_beyond_32_bits(backend):
    pool_properties.row_beyond_32_bits(backend, Case(STEP, BF16, BF16).call(P=2, B=2, D=4096, R=2))


@each_backend
@pytest.mark.parametrize("indexed", (False, True), ids=("rows in order", "indices"))
@pytest.mark.parametrize(
    "op, sizes", ((RECURRENT, {"B": 2, "T": 0}), (RECURRENT, {"B": 0, "T": 3}), (STEP, {"B": 0})), ids=str
)
def test_nothing_to_do(backend, op, sizes, indexed):
    """No token, or no sequence, leaves the pool as it is, to the bit."""
    call = Case(op, F32, F32).call(P=5, **sizes)
    call = with_rows(call, range(sizes["B"])) if indexed else call
    out, pool = run(backend, call)
    assert out.shape == (call.x if op == STEP else call.v).shape
    assert_bitwise(pool, call.pool, "pool")
