"""Files that a search resumes from: written in one step, checked before they are read, refused if not ours."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from jetkernels.files import write_atomic

MAGIC = b"jetkernels postnas checkpoint\n"
FORMAT_VERSION = 3


class DifferentRun(ValueError):
    """A checkpoint is of a run that depends on something else.

    Attributes:
        path: of the checkpoint.
        differences: (name, value in its run, value now); None where a run has no such fact.
    """

    def __init__(self, path: Path, differences: list[tuple[str, object, object]]):
        self.path, self.differences = path, differences
        named = "; ".join(f"{name} was {_brief(old)}, now {_brief(new)}" for name, old, new in differences)
        super().__init__(
            f"resume: {path} belongs to a run with other options, another base or other text: {named}; "
            "give those again, or another output folder"
        )


def _brief(value: object, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _leaves(facts: Mapping) -> dict[str, object]:
    """Facts of all levels by their own names; of the same name, the one at the higher level, then the earlier one."""
    found: dict[str, object] = {}
    for value in facts.values():
        if isinstance(value, Mapping):
            found = _leaves(value) | found
    return found | {name: value for name, value in facts.items() if not isinstance(value, Mapping)}


def differences(old: Mapping, new: Mapping) -> list[tuple[str, object, object]]:
    """(name, old value, new value) of the facts that differ."""
    old, new = _leaves(old), _leaves(new)
    return [(name, old.get(name), new.get(name)) for name in (old | new) if old.get(name) != new.get(name)]


def save_state(path: str | Path, stage: str, run: Mapping, state: Mapping) -> None:
    """Writes `state` for `load_state`.

    The file: a line that names the format, a JSON line (version, stage, run, size and SHA-256 of the rest), then
    torch.save's bytes.

    Args:
        path: of the file.
        stage: which step of the search it belongs to.
        run: what the run depends on, JSON values by name.
        state: tensors, numbers, strings, lists, dicts.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getbuffer()  # no copy: of a large network it would be a good part of the memory
    header = {"version": FORMAT_VERSION, "stage": stage, "run": run, "bytes": len(body)}
    header["sha256"] = hashlib.sha256(body).hexdigest()
    write_atomic(path, b"".join((MAGIC, json.dumps(header).encode(), b"\n", body)))


def load_state(path: str | Path, stage: str, run: Mapping) -> dict:
    """What `save_state` wrote, whole and unchanged, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of a search, of another version or stage, or damaged.
        DifferentRun: it is of another run.
    """
    path = Path(path)
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise ValueError(f"resume: {path} is not a checkpoint of a search")
    end = content.find(b"\n", len(MAGIC))
    body = memoryview(content)[end + 1 :]
    try:
        header = json.loads(content[len(MAGIC) : max(end, 0)])
        got = {key: header[key] for key in ("version", "stage", "run", "bytes", "sha256")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"resume: {path} is damaged: its header cannot be read") from None
    if got["version"] != FORMAT_VERSION:
        raise ValueError(f"resume: {path} must have format version {FORMAT_VERSION}, got {got['version']}")
    if not isinstance(got["run"], dict):
        raise ValueError(f"resume: {path} is damaged: its header names no run")
    if len(body) != got["bytes"]:
        raise ValueError(f"resume: {path} is damaged: must hold {got['bytes']} bytes of state, got {len(body)}")
    if hashlib.sha256(body).hexdigest() != got["sha256"]:
        raise ValueError(f"resume: {path} is damaged: its state does not have the digest that its header names")
    if got["stage"] != stage:
        raise ValueError(f"resume: {path} must be of stage {stage}, got {got['stage']}")
    # As JSON gives it back: tuples become lists.
    run = json.loads(json.dumps(run))
    if got["run"] != run:
        raise DifferentRun(path, differences(got["run"], run))
    return torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
