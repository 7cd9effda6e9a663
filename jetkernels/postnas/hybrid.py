"""Hybrids whose linear layers no config of a model can say: kept for a later stage, not for `generate`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from jetkernels.files import write_atomic
from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.config import CONFIG_FILE

from .checkpoints import load_state, save_state
from .linear_path import LinearPath
from .shapes import Shape
from .super_network import Placement, SuperNetwork

DESCRIPTION, WEIGHTS, STAGE = "hybrid.json", "hybrid.ckpt", "hybrid"


def is_hybrid(folder: Path) -> bool:
    """Whether `save_hybrid` wrote to this folder; ValueError where an exported model lies there too."""
    found = (folder / DESCRIPTION).is_file()
    if found:
        _check_no_model(folder)
    return found


def _check_no_model(folder: Path) -> None:
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"hybrid: {folder} must hold a model or the weights of a hybrid, not both: take away {CONFIG_FILE} and "
            f"model weights, or {DESCRIPTION} and {WEIGHTS}"
        )


def read_path(folder: Path) -> LinearPath:
    """What the linear layers of a saved hybrid are; ValueError where the file does not say it."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[dict[str, Any], LinearPath]:
    """The description of a saved hybrid, and what its linear layers are."""
    needed = ("placement", "shape", "block", "design", "window_size")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        shape, block, design = (description[name] for name in needed[1:4])
        if missing := [name for name in needed if name not in description]:
            raise KeyError(*missing)
        return description, LinearPath(Shape.from_name(shape), block, design)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"hybrid: {folder / DESCRIPTION} must name {', '.join(needed)}; {error!r}") from None


def save_hybrid(
    folder: Path, model: JetNemotronForCausalLM, placement: Placement, path: LinearPath, window_size: int
) -> None:
    """Writes the weights of a hybrid, and what it takes to build it again beside its base.

    Args:
        folder: where they go.
        model: as `SuperNetwork.assemble` made it.
        placement: that it was made of.
        path: what its linear layers are.
        window_size: of its windowed layers.

    Raises:
        ValueError: an exported model lies in the folder.
    """
    _check_no_model(folder)
    description = {
        "placement": list(placement),
        "shape": path.shape.name,
        "block": path.block,
        "design": path.design,
        "window_size": window_size,
    }
    save_state(folder / WEIGHTS, STAGE, description, {"weights": model.state_dict()})
    write_atomic(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def load_hybrid(folder: Path, base: JetNemotronForCausalLM) -> JetNemotronForCausalLM:
    """The hybrid that `save_hybrid` wrote; it shares no tensor with the base.

    Raises:
        OSError: a file is missing.
        ValueError: one is damaged, or the hybrid is not of this base's sizes.
    """
    description, path = _read(folder)
    weights = load_state(folder / WEIGHTS, STAGE, description)["weights"]
    network = SuperNetwork(copy.deepcopy(base), path.paths(), description["window_size"])
    model = network.assemble(description["placement"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"hybrid: {folder / WEIGHTS} must be of a base of these sizes; {error}") from None
    return model


def load_student(folder: Path, base: JetNemotronForCausalLM) -> JetNemotronForCausalLM:
    """The hybrid that a stage left in a folder, in fp32 on the base's device: exported, or kept where it could not be.

    Raises:
        OSError: a file is missing.
        ValueError: one is damaged, or a kept hybrid is not of this base's sizes.
    """
    if is_hybrid(folder):
        return load_hybrid(folder, base)
    return JetNemotronForCausalLM.from_pretrained(folder, dtype=torch.float32, device=base.device)
