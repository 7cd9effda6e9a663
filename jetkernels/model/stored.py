"""A stored model, in whatever kind of file: its config, its tensors by the names that the model gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# The kinds of stored weights, by their names in safetensors files, that are numbers as they stand.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredModel(ABC):
    """What loading asks of the files of a model.

    Attributes:
        path: where it lies, for messages.
        config_path: where its config stands.
        companions: name -> content of the files that go where the model goes: tokenizer, chat template.
        values: its config, by the names of a config.json.
        holders: name of each tensor -> what holds it at that path, a file or a tensor of another name.
    """

    companions: Mapping[str, bytes]
    values: Mapping
    holders: Mapping[str, str]

    def __init__(self, path: Path, config_path: Path):
        self.path = path
        self.config_path = config_path

    @abstractmethod
    def facts(self, name: str) -> tuple[list[int], str]:
        """Shape and kind of a tensor, the latter one of FLOATING if it holds weights."""

    @abstractmethod
    def stored(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    def parse(self, read: Callable[[Mapping], T]) -> T:
        """What `read` makes of the values in config.json; a ValueError names the file."""
        try:
            return read(self.values)
        except ValueError as error:
            raise ValueError(f"{short(error, 1000)} ({self.config_path})") from None

    def __len__(self) -> int:
        return len(self.holders)

    def check(self, wanted: Mapping[str, Tensor], tied: bool) -> None:
        """Raises ValueError unless the folder has exactly these tensors, in shape, and of a floating kind.

        Args:
            wanted: name -> tensor, whose shape counts.
            tied: a head may be stored beside the embedding.
        """
        found = misfits(self.holders, self.facts, wanted, tied)
        if found:
            raise ValueError(f"checkpoint: {self.path} does not fit the config: {found}")

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stored tensor in `dtype`. Raises ValueError if a finite number is too large for it; inf and NaN stay."""
        stored = self.stored(name)
        found = stored.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not found.isfinite().all():
            lost = stored[found.isinf() & stored.isfinite()]
            if lost.numel():
                raise ValueError(
                    f"checkpoint: {name} ({self.holders[name]} in {self.path}) holds {lost[0].item():g}, "
                    f"too large for {str(dtype).removeprefix('torch.')}; load in a wider dtype"
                )
        return found

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.holders

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self.holders)


def misfits(
    found: Mapping[str, str], facts: Callable[[str], tuple[list[int], str]], wanted: Mapping[str, Tensor], tied: bool
) -> str:
    """How tensors differ from those of a model in name, or else in shape or kind; "" if they do not.

    Args:
        found: names of the tensors -> what holds them.
        facts: name -> shape and kind, one of FLOATING if it fits.
        wanted: name -> tensor of the model, whose shape counts.
        tied: a head may lie beside the embedding.
    """
    names = found.keys() - ({TIED_HEAD} if tied else set())
    missing, unexpected = sorted(wanted.keys() - names), sorted(names - wanted.keys())
    if missing or unexpected:
        return "; ".join(f"{what} {some(n)}" for what, n in (("missing", missing), ("unexpected", unexpected)) if n)
    wrong = []
    for name, holder in found.items():
        shape, kind = facts(name)
        need = list(wanted[EMBEDDING if tied and name == TIED_HEAD else name].shape)
        if shape != need:
            wrong.append(f"{name} must be {need}, got {shape}")
        elif kind not in FLOATING:
            wrong.append(
                f"{name} in {holder} must be one of {', '.join(FLOATING)}, got {kind}, which is no weight as it stands"
            )
    return some(wrong, "; ")


def short(text: object, most: int = 300) -> str:
    """What comes from a file may be long, or not fit a line."""
    text = str(text) if str(text).isprintable() else repr(str(text))
    return text if len(text) <= most else text[:most] + "..."


def some(names: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    shown = separator.join(map(short, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
