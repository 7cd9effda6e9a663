"""What a config.json says of the rotary positions: the base of the frequencies, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from jetkernels.modules import checks


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3's frequencies: the slow ones are lower by a factor, the fast ones as they are, a ramp is between them.

    Attributes:
        factor: of the slow ones, at least 1.
        low_freq_factor: a frequency is slow if it turns less often than this in the original positions.
        high_freq_factor: it is fast if it turns more often than this.
        original_max_position_embeddings: tokens that the model was made for before it was scaled.

    Source: the published config.json files of Llama 3.1 (`rope_type` llama3).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_dict(cls, values: Mapping) -> RotaryScaling:
        """Reads a `rope_scaling` of config.json, its kind left out.

        Raises:
            ValueError: a value is missing, or not one that there can be; or there are others.
        """
        where = "config: rope_scaling"
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (checks.number(f"{where}.{name}", values.get(name)) for name in names)
        last = "original_max_position_embeddings"
        original = checks.count(f"{where}.{last}", values.get(last))
        if factor < 1:
            raise ValueError(f"{where}.factor must be at least 1, got {factor:g}")
        if not 0 <= low < high:
            raise ValueError(f"{where}.high_freq_factor must be above low_freq_factor = {low:g}, got {high:g}")
        if others := sorted(set(values) - {*names, last}):
            raise ValueError(f"{where} must have {', '.join((*names, last))} alone, got {checks.shown(others)} too")
        return cls(factor, low, high, original)

    def to_dict(self) -> dict[str, object]:
        """As config.json has it."""
        return {"rope_type": "llama3", **asdict(self)}

    def scale(self, frequencies: Tensor) -> Tensor:
        """Frequencies in radians per token -> the scaled ones."""
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (fast + (1 - fast) / self.factor)


def scaling_of(section: object, key: str = "rope_scaling") -> RotaryScaling | None:
    """The scaling that a `rope_scaling` or `rope_parameters` of a config.json asks for; None for none.

    Raises:
        ValueError: it asks for one that is not computed, or for partial rotations.
    """
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ValueError(f"config: {key} must be None, got {checks.shown(section)}")
    kinds = [section[name] for name in ("rope_type", "type") if name in section]
    rest = {name: value for name, value in section.items() if name not in ("rope_type", "type", "rope_theta")}
    if checks.same(rest.get("partial_rotary_factor"), 1.0):
        del rest["partial_rotary_factor"]
    if kinds and all(kind == "llama3" for kind in kinds):
        return RotaryScaling.from_dict(rest)
    if rest or any(kind != "default" for kind in kinds):
        raise ValueError(
            f"config: {key} must be None, got {checks.shown(section)}; "
            "of its kinds only rope_type 'default' and 'llama3' are computed"
        )
    return None


def rotary_fields(values: Mapping) -> dict[str, object]:
    """`rope_theta` of a config.json, if it has one, and `rope_scaling`, None or as `RotaryScaling.to_dict` gives it.

    The former stands at the top, or, as transformers writes it since version 5, in `rope_parameters` (`rope_scaling` in
    older files), which has the latter too.

    Raises:
        ValueError: two places do not agree, or one asks for rotations that are not computed.
    """
    found: dict[str, object] = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    scalings = {}
    for key in ("rope_scaling", "rope_parameters"):
        section = values.get(key)
        if section is None:
            continue
        scalings[key] = scaling_of(section, key)
        if "rope_theta" in section:
            theta = checks.number(f"config: {key}.rope_theta", section["rope_theta"])
            if found and found["rope_theta"] != theta:
                raise ValueError(
                    f"config: rope_theta and {key}.rope_theta must agree, "
                    f"got {checks.shown(found['rope_theta'])} and {theta:g}"
                )
            found["rope_theta"] = theta
    if len(set(scalings.values())) > 1:
        raise ValueError(
            f"config: rope_scaling and rope_parameters must ask for one scaling, got {checks.shown(scalings)}"
        )
    scaling = next(iter(scalings.values()), None)
    return found | {"rope_scaling": None if scaling is None else scaling.to_dict()}
