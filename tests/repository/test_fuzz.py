"""The random driver: a short run of it, and that it finds what is wrong."""

import sys

import pytest
import torch
from fuzz import campaign
from fuzz.__main__ import main
from fuzz.draw import OPS, SEQUENCE_OPS, case_of
from support.arguments import PrefillCall
from support.prefill_properties import marks_of, rows_of


@pytest.mark.parametrize("backend", ("cpu", "plain"))
def test_short_run_is_clean(backend):
    summary = campaign.Summary()
    for number in range(70):
        row = campaign.run_case(number, None, backend)
        summary.add(backend, number, row)
    assert not summary.failures
    assert {op for op, *_ in summary.cases} == set(OPS)
    assert "70 cases, 0 failed" in summary.text()


class Faulty:
    """A backend whose every output is changed by ``fault``."""

    def __init__(self, backend, fault):
        self.backend, self.fault, self.name = backend, fault, backend.name

    def _changed(self, outs):
        if isinstance(outs, torch.Tensor):
            return self.fault(outs)
        return outs and tuple(self.fault(out) for out in outs)

    def __call__(self, op, *args):
        return self._changed(self.backend(op, *args))

    def gradients(self, op, inputs, grads):
        return {name: self.fault(grad) for name, grad in self.backend.gradients(op, inputs, grads).items()}


def _last_element_forgotten(t):
    return t.flatten().index_fill(0, torch.tensor([t.numel() - 1]), 0).view(t.shape) if t.numel() else t


def _a_little_off(t):
    return t * (1 + 4e-2) if t.is_floating_point() else t


def _another_each_time(t):
    return t + torch.rand(()).to(t.dtype) * 1e-6 * t.abs().max() if t.numel() else t


def _nan_passed_on(t):
    return torch.full_like(t, torch.nan) if t.isnan().any() else t


FAULTS = {
    "last element": _last_element_forgotten,
    "4%": _a_little_off,
    "not deterministic": _another_each_time,
    "NaN everywhere": _nan_passed_on,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_found(fault):
    found = [
        campaign.run_case(number, "apply_dynamic_conv", "cpu", change=lambda backend: Faulty(backend, fault)).reason
        for number in range(20)
    ]
    assert any(found)


def test_write_outside_the_elements_is_found():
    def fault(backend):
        class Writes(type(backend)):
            def __call__(self, op, *args):
                out = super().__call__(op, *args)
                pool = args[4]
                pool.as_strided((1,), (1,), 0).zero_()  # of the storage, whatever of it the pool shows
                return out

        return Writes()

    found = [campaign.run_case(number, "dynamic_conv_step", "cpu", change=fault).reason for number in range(40)]
    assert any(reason and "what lies between" in reason for reason in found)


def _reads_rows_without_an_initial_state(call, run):
    run(call._replace(has_initial_state=None))


def _writes_the_row_of_a_sequence_without_one(call, run):
    run(call)
    if call.state_indices is not None and (call.state_indices < 0).any():
        call.state[-1] = 0


def _leaves_marks_out(call, run):
    run(call._replace(mark_tokens=None, mark_indices=None))


def _keeps_marks_too_late(call, run):
    """The state at the end of the sequence."""
    run(call)
    for n, row in marks_of(call).values():
        call.state[row] = call.state[rows_of(call)[n]]


PREFILL_FAULTS = (
    _reads_rows_without_an_initial_state,
    _writes_the_row_of_a_sequence_without_one,
    _leaves_marks_out,
    _keeps_marks_too_late,
)


@pytest.mark.parametrize("fault", PREFILL_FAULTS, ids=lambda fault: fault.__name__[1:])
def test_planted_fault_of_prefill_is_found(fault):
    def change(backend):
        class Wrong(type(backend)):
            def __call__(self, op, *args):
                outs = []
                run = lambda call: outs.append(super(Wrong, self).__call__(op, *call))
                if op != "prefill_gated_delta_rule":
                    return super().__call__(op, *args)
                fault(PrefillCall(*args), run)
                return outs[0]

        return Wrong()

    found = [campaign.run_case(number, "prefill_gated_delta_rule", "cpu", change=change).reason for number in range(60)]
    assert any(found)
    assert all(reason is None or reason.startswith("AssertionError") for reason in found)


@pytest.mark.parametrize("op", OPS)
def test_case_follows_from_its_number(op):
    first, again, other = case_of(7, op), case_of(7, op), case_of(8, op)
    assert first.what == again.what != other.what
    assert (first.grads is not None) == (op in SEQUENCE_OPS)
    for a, b in zip(first.inputs, again.inputs):
        assert a is b is None or (
            torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
        )


@pytest.mark.parametrize("op", OPS)
def test_case_for_the_kernels_is_one_that_they_take(op):
    for number in range(20):
        case = case_of(number, op, kernel=True)
        assert (case.grads is not None) == (op in SEQUENCE_OPS) and case.dtype != torch.float64
        if "conv" in op:
            assert case.inputs.x.shape[-1] % 8 == 0 and (op != "dynamic_conv_step" or case.inputs.pool.is_contiguous())
        else:
            k, v = case.inputs[:2] if op.endswith("commit") else case.inputs[1:3]
            assert k.shape[-1] in (64, 96, 128, 192, 256) and v.shape[-1] % 16 == 0


def test_process_that_dies_names_its_case(monkeypatch, capfd):
    """The cases behind it are run by another process."""
    stand_in = (
        "import json, os, sys\n"
        "first = int(sys.argv[sys.argv.index('--seed') + 1])\n"
        "for number in range(first, 5):\n"
        "    print(json.dumps({'case': number}), flush=True)\n"
        "    if number == 2: os.abort()\n"
        "    print(json.dumps({'row': ['dynamic_conv', 'float32', [], None, '']}), flush=True)\n"
    )
    summary = campaign.run(["plain"], None, 0, 5, 60.0, campaign.Process(before=(sys.executable, "-c", stand_in)))
    assert sum(summary.cases.values()) == 4
    (failure,) = summary.failures
    assert failure.command == "python -m tests.fuzz --case 2 --backend plain"


def test_command(capsys):
    assert main(["--case", "3", "--backend", "plain", "--op", "dynamic_conv_step"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dynamic_conv_step ") and said.endswith("right\n")
    with pytest.raises(SystemExit):
        main(["--op", "dynamic_convolution"])
    assert "--op must be one of" in capsys.readouterr().err
