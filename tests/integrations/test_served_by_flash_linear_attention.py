"""Calls of the delta rule that no kernel of this library takes, on flash-linear-attention's kernels.

Those run in Triton's interpreter (``support/triton_interpreter.py``); which calls they get is tested without them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from support.arguments import cotangents, delta_inputs, recurrent_call
from support.comparison import assert_bitwise
from support.paths import ROOT
from support.shapes import DeltaShape
from support.triton_interpreter import CASES, CHUNK, ENVIRONMENT, RECURRENT

import jetkernels
from jetkernels import _library
from jetkernels.ops import _flash_linear_attention, _register
from jetkernels.plain import chunk_gated_delta_rule as plain

NAME = "flash-linear-attention 0.6.0"
PACKAGES = ("fla", "einops", "triton")
CEILING = 2e-3  # in fp16: that of gradients here, also for the outputs
NOT_HOPPER = 1  # PlainReason::not_hopper
REASON = _library.plain_reason_text(NOT_HOPPER)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What the program has printed; one for all tests, as the library's import takes half of its time."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs the packages flash-linear-attention 0.6, fla-core, triton and einops; no {missing[0]}")
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_interpreter"],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_definition(case, interpreted):
    errors = interpreted["errors"][case]
    assert errors and not {name: error for name, error in errors.items() if not error <= CEILING}


def test_it_is_announced_once(interpreted):
    ops = (CHUNK, f"{CHUNK}_backward", RECURRENT)
    asked = "JETKERNELS_BACKEND=plain asks for it"
    assert sorted(interpreted["announced"]) == sorted(f"jetkernels: {op} runs on {NAME}: {asked}" for op in ops)
    assert interpreted["asked"] == dict.fromkeys(ops, ["plain", asked])
    assert interpreted["let in"] == dict.fromkeys(ops, ["fla", f"{NAME}; {asked}"])


# ---- which calls it gets


@pytest.fixture
def library(monkeypatch):
    """As if it were installed, and every tensor on a GPU without a kernel of this library. Returns its two rules."""
    rules = _flash_linear_attention._Rules(types.SimpleNamespace(), types.SimpleNamespace(), NAME)
    monkeypatch.delenv("JETKERNELS_FLA", raising=False)
    monkeypatch.setattr(_flash_linear_attention, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(_flash_linear_attention, "_load", lambda: rules)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_register, "_announced", set())
    return rules


def arguments(op: str, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> tuple:
    shape = DeltaShape("", **{"T": 3, **sizes})
    if op == RECURRENT:
        return recurrent_call(shape, dtype)
    x = delta_inputs(shape, dtype)
    return (*cotangents(x), *x) if op.endswith("_backward") else x


def offer(op: str, reason: str = REASON, **call) -> tuple[bool, str]:
    function, text = _flash_linear_attention.offer(op, arguments(op, **call), reason)
    return function is not None, text


SERVED = (True, NAME)
NOTHING = (False, "")
OPS = (CHUNK, f"{CHUNK}_backward", RECURRENT)


@pytest.mark.parametrize("op", OPS)
def test_what_it_takes(op, library, monkeypatch):
    assert offer(op) == offer(op, dtype=torch.float16) == offer(op, K=256, V=300) == SERVED
    single = (False, "flash-linear-attention does not take float32")
    assert offer(op, dtype=torch.float32) == (SERVED if op == RECURRENT else single)
    assert offer(op, dtype=torch.float64) == (False, "flash-linear-attention does not take float64")
    assert offer(op, K=257) == (False, "flash-linear-attention takes K up to 256")
    assert offer(op, B=2**15, T=1, K=1, V=1) == (False, "flash-linear-attention takes up to 65535 heads in a batch")
    assert offer(op, B=0) == offer(op, T=0) == NOTHING
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert offer(op) == (False, "flash-linear-attention is not captured into a CUDA graph")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert offer(op) == (False, "Triton needs compute capability 8.0")


def test_where_it_is_not_asked(library, monkeypatch):
    def imported():
        raise AssertionError("flash-linear-attention is imported")

    asked = _library.plain_reason_text(_library.PLAIN_ASKED)
    assert "JETKERNELS_BACKEND=plain" in asked
    monkeypatch.setattr(_flash_linear_attention, "_load", imported)
    assert offer(CHUNK, asked) == NOTHING
    assert _flash_linear_attention.offer("rms_norm", (torch.ones(1, 8),), REASON) == (None, "")
    monkeypatch.setenv("JETKERNELS_FLA", "0")
    assert offer(CHUNK) == NOTHING
    monkeypatch.delenv("JETKERNELS_FLA")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert offer(CHUNK) == NOTHING
    monkeypatch.undo()
    monkeypatch.setattr(_flash_linear_attention, "_load", imported)
    assert offer(CHUNK) == NOTHING  # tensors on a CPU


def test_what_it_does_not_take_is_plain_and_says_why(library):
    x = arguments(CHUNK, torch.float32)
    text = f"chunk_gated_delta_rule runs as plain PyTorch: {REASON}; flash-linear-attention does not take float32$"
    with pytest.warns(UserWarning, match=text):
        outs = torch.ops.jet_plain.chunk_gated_delta_rule(*x, NOT_HOPPER)
    for out, ref in zip(outs, plain.chunk_gated_delta_rule(*x)):
        assert_bitwise(out, ref)


@pytest.mark.filterwarnings("ignore:.* runs on")
def test_a_failure_says_what_failed(library):

    def forward(context, **arguments):
        raise MemoryError("out of shared memory")

    library.chunk.forward = forward
    with pytest.raises(RuntimeError, match=f"{NAME} failed, and JETKERNELS_FLA=0 .*MemoryError: out of shared memory"):
        with pytest.warns(UserWarning, match=f"runs on {NAME}"):
            torch.ops.jet_plain.chunk_gated_delta_rule(*arguments(CHUNK), NOT_HOPPER)


def fla(version: str = "0.6.0", **utils: bool) -> dict[str, types.SimpleNamespace]:
    flags = {"IS_NVIDIA_HOPPER": False, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": True, **utils}
    rules = {"ChunkGatedDeltaRuleFunction": 1, "FusedRecurrentFunction": 2}
    return {
        "fla": types.SimpleNamespace(__version__=version),
        "fla.utils": types.SimpleNamespace(**flags),
        **dict.fromkeys(
            (f"fla.ops.gated_delta_rule.{name}" for name in ("chunk", "fused_recurrent")),
            types.SimpleNamespace(**rules),
        ),
    }


@pytest.mark.parametrize(
    "modules, name, refused",
    (
        (fla(), NAME, ""),
        (fla("0.6.3"), "flash-linear-attention 0.6.3", ""),
        (fla("0.5.2"), "", "flash-linear-attention 0.5.2 is not used, only 0.6 is"),
        (fla(IS_NVIDIA_HOPPER=True), NAME, ""),
        (fla(IS_NVIDIA_HOPPER=True, TRITON_ABOVE_3_7_1=False), "", f"{NAME} is not used on Hopper with Triton 3.4"),
        ({}, "", "flash-linear-attention is installed and does not import (KeyError: 'fla')"),
    ),
)
def test_which_library_is_used(modules, name, refused, monkeypatch):
    monkeypatch.setattr(_flash_linear_attention.importlib, "import_module", modules.__getitem__)
    rules = _flash_linear_attention._load.__wrapped__()
    assert rules.name == name and rules.refused.startswith(refused) and bool(rules.refused) == bool(refused)
    assert (rules.chunk, rules.recurrent) == ((1, 2) if name else (None, None))


def test_backend_of_says_why_not(library, monkeypatch):
    monkeypatch.setattr(_library, "ask_backend", lambda call: {"name": "plain", "detail": REASON})
    assert jetkernels.backend_of(CHUNK, *arguments(CHUNK)) == ("fla", f"{NAME}; {REASON}")
    single = jetkernels.backend_of(CHUNK, *arguments(CHUNK, torch.float32))
    assert single == ("plain", f"{REASON}; flash-linear-attention does not take float32")
