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
FORMAT_VERSION = 1


def fingerprint(facts: Mapping) -> str:
    """A digest of what a run depends on (JSON values): equal facts, equal digest."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_state(path: str | Path, stage: str, run: str, state: Mapping) -> None:
    """Writes `state` (tensors, numbers, strings, lists, dicts) for `load_state`.

    stage: which step of the search it belongs to.  run: `fingerprint` of what the run depends on.
    The file: a line that names the format, a JSON line (version, stage, run, size and SHA-256 of the rest), then torch.save's bytes.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()
    header = {"version": FORMAT_VERSION, "stage": stage, "run": run, "bytes": len(body)}
    header["sha256"] = hashlib.sha256(body).hexdigest()
    write_atomic(path, MAGIC + json.dumps(header).encode() + b"\n" + body)


def load_state(path: str | Path, stage: str, run: str) -> dict:
    """What `save_state` wrote, whole and unchanged, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of a search, of another version, stage or run, or damaged.
    """
    path = Path(path)
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise ValueError(f"resume: {path} is not a checkpoint of a search")
    line, found, body = content[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        got = {key: header[key] for key in ("version", "stage", "run", "bytes", "sha256")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"resume: {path} is damaged: its header cannot be read") from None
    if got["version"] != FORMAT_VERSION:
        raise ValueError(f"resume: {path} must have format version {FORMAT_VERSION}, got {got['version']}")
    if not found or len(body) != got["bytes"]:
        raise ValueError(f"resume: {path} is damaged: must hold {got['bytes']} bytes of state, got {len(body)}")
    if hashlib.sha256(body).hexdigest() != got["sha256"]:
        raise ValueError(f"resume: {path} is damaged: its state does not have the digest that its header names")
    if got["stage"] != stage:
        raise ValueError(f"resume: {path} must be of stage {stage}, got {got['stage']}")
    if got["run"] != run:
        raise ValueError(
            f"resume: {path} belongs to a run with other options, another base or other text; "
            "give those again, or another output folder"
        )
    return torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
