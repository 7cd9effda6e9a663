"""The demo: how it plans by the speed it sees, that it goes on until the loss is reached, and a short one from start to
end.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from jetkernels import _machine
from jetkernels.__main__ import main
from jetkernels.cli import demo
from jetkernels.cli.info import OPS
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

# Ops that the model does not call.
# A JetBlock's step is one op, and the demo's weights are fp32.
UNUSED = (
    "apply_dynamic_conv",
    "dynamic_conv_step",
    "linear_int4",
    "linear_int8",
    "prefill_gated_delta_rule",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_commit",
    "recurrent_gated_delta_rule_verify",
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_schedule(step_seconds, seconds=150.0, fewest=80):
    """(schedule, its clock's seconds, progress behind each step) when step i takes step_seconds(i)."""
    clock = Clock()
    schedule = demo.Schedule(seconds, fewest, clock)
    progress = []
    while not schedule.done:
        clock.now += step_seconds(schedule.steps)
        schedule.step()
        progress.append(schedule.progress)
        assert len(progress) < 100_000
    return schedule, clock.now - 100, progress


SPEEDS = {
    "fast": lambda i: 0.14,
    "slow": lambda i: 1.2,
    "hopeless": lambda i: 24.0,
    "turns slow": lambda i: 0.14 if i < 500 else 3.0,
    "turns fast": lambda i: 3.0 if i < 20 else 0.14,
    "now and then disturbed": lambda i: 5.0 if i % 50 == 7 else 0.2,
}


@pytest.mark.parametrize("speed", SPEEDS)
def test_schedule_is_a_whole_cosine_at_any_speed(speed):
    schedule, _, progress = run_schedule(SPEEDS[speed])
    assert progress[-1] == 1.0 and schedule.factor == pytest.approx(0.02)
    moves = [b - a for a, b in zip([0.0, *progress], progress)]
    assert 0 < min(moves) and max(moves) <= 1 / 80 + 1e-9
    assert len(progress) >= 80


def test_a_fast_machine_trains_as_long_as_was_asked_for():
    schedule, seconds, progress = run_schedule(SPEEDS["fast"])
    assert seconds == pytest.approx(150, abs=0.5) and schedule.steps == pytest.approx(150 / 0.14, abs=3)
    assert progress[len(progress) // 2] == pytest.approx(0.5, abs=0.01)  # as a cosine over time


def test_a_slow_machine_trains_fewer_bytes_in_the_same_time():
    schedule, seconds, _ = run_schedule(SPEEDS["slow"])
    assert seconds == pytest.approx(150, abs=3) and schedule.steps == pytest.approx(125, abs=3)


def test_a_hopeless_machine_makes_the_fewest_steps():
    schedule, _, _ = run_schedule(SPEEDS["hopeless"])
    assert schedule.steps == 80


def test_a_machine_that_turns_slow_ends_soon_after_the_time():
    schedule, seconds, _ = run_schedule(SPEEDS["turns slow"])
    assert schedule.steps < 500 + 80 and 150 <= seconds < 150 + 80 * 3


def test_a_machine_that_turns_fast_uses_the_time():
    schedule, seconds, _ = run_schedule(SPEEDS["turns fast"])
    assert seconds == pytest.approx(150, abs=1) and schedule.steps > 500


def test_seconds_left_are_what_the_fewest_steps_take():
    clock = Clock()
    schedule = demo.Schedule(10, 80, clock)
    clock.now += 2
    schedule.step()
    assert schedule.seconds_left == pytest.approx(79 * 2)


# Until the loss is reached


def fake_trainer():
    runs = []
    return SimpleNamespace(
        runs=runs, run=lambda schedule, peak=1.0: runs.append((schedule.end - schedule.last, schedule.fewest, peak))
    )


@pytest.mark.parametrize(
    "losses, schedules", [([2.0], 1), ([3.0, 2.4], 2), ([3.0, 2.9, 2.8, 2.4], 4), ([3.0, 2.9, 2.8, 2.7], 4)]
)
def test_training_goes_on_until_the_loss_is_reached(capsys, losses, schedules):
    trainer, found = fake_trainer(), iter(losses)
    assert demo.train(trainer, 150, lambda: next(found), enough=2.5) == losses[-1]
    assert len(trainer.runs) == schedules and trainer.runs[0] == (pytest.approx(150), demo.FEWEST_STEPS, 1.0)
    assert all(run == (pytest.approx(0), demo.FEWEST_STEPS, demo.RESTART) for run in trainer.runs[1:])
    assert capsys.readouterr().out.count(f"trains {demo.FEWEST_STEPS} steps more") == schedules - 1


@pytest.mark.parametrize(
    "difference, loss, said",
    [
        (2e-3, 2.0, "decode and prefill"),
        (math.nan, 2.0, "decode and prefill"),
        (1e-5, 2.6, "held-out loss"),
        (1e-5, math.nan, "held-out loss"),
    ],
)
def test_checks_are_real(difference, loss, said):
    demo.check(1e-5, 2.5, enough=2.5)
    with pytest.raises(RuntimeError, match=said):
        demo.check(difference, loss, enough=2.5)


def test_unigram_entropy_is_that_of_the_bytes():
    assert demo.unigram_entropy(torch.tensor([7, 7, 7, 7], dtype=torch.uint8)) == 0
    assert demo.unigram_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(math.log(256))


# Decode


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    return JetNemotronForCausalLM(
        JetNemotronConfig(**{**demo.CONFIG, "hidden_size": 48, "intermediate_size": 64, "layer_types": ["jet", "swa"]})
    )


@pytest.mark.parametrize("seconds_per_byte, count", [(0.0, demo.NEW), (0.3, 41), (24.0, demo.FEWEST_NEW)])
def test_a_completion_is_as_long_as_the_speed_allows(tiny_model, seconds_per_byte, count):
    clock = Clock()

    def tick():
        clock.now += seconds_per_byte
        return clock.now

    found = demo.complete(tiny_model, b"def f(x):\n", 0, torch.device("cpu"), tick)
    assert len(found.new) == pytest.approx(count, abs=16 if 16 < count < demo.NEW else 0)
    assert found.difference <= demo.WORST_DIFFERENCE


def test_decode_that_differs_from_prefill_is_seen(tiny_model, monkeypatch):
    monkeypatch.setattr(demo, "NEW", 20)
    calls = iter(range(100))

    class Disturbed:
        new_cache = tiny_model.new_cache

        def __call__(self, tokens, cache=None):
            found = tiny_model(tokens, cache=cache)
            return SimpleNamespace(logits=found.logits + (0.01 if next(calls) == 5 else 0))

    assert demo.complete(Disturbed(), b"def f(x):\n", 0, torch.device("cpu")).difference > demo.WORST_DIFFERENCE


# From start to end


def test_demo_trains_saves_and_completes_on_a_busy_machine(capsys, tmp_path, monkeypatch):
    """The whole demo in a few seconds; so short a training does not reach the loss of a full one."""
    monkeypatch.setattr(demo, "WORST_LOSS", math.inf)
    monkeypatch.setattr(demo, "FEWEST_STEPS", 3)
    monkeypatch.setattr(demo, "NEW", 20)
    monkeypatch.setattr(_machine, "processors", lambda: _machine.Processors(0.6, 2))
    assert main(["demo", "--minutes", "0.01", "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for op in OPS:
        used = op.removesuffix("_backward") not in UNUSED
        assert (re.search(rf"\b{op}\b", text) is not None) == used, op
    assert "decode against prefill" in text
    assert "this machine is busy: a program gets 0.6 of 2 processors" in text
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "def ", "--max-new-tokens", "4"]) == 0


def test_a_model_that_does_not_learn_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(demo, "FEWEST_STEPS", 1)
    monkeypatch.setattr(demo, "SCHEDULES", 2)
    monkeypatch.setattr(demo, "NEW", 16)
    assert main(["demo", "--minutes", "0.001", "--output", str(tmp_path / "out")]) == 1
    assert "the held-out loss must fall to" in capsys.readouterr().err
