"""The sizes of a JetBlock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from . import checks


@dataclass(frozen=True)
class JetBlockConfig:
    """Sizes of a JetBlock; names as under `efficient_attention_config.jet` of a published config.

    Args:
        num_heads: H.
        head_dim: K, of queries and keys.
        expand_v: V = int(K * expand_v), of values.
        conv_size: W, taps of the convolution, 2 to 4.
        dconv_generator_reduction: R = H*V // dconv_generator_reduction.
        norm_eps: of the gated norm; a string such as "1e-5" is read too.

    Raises:
        ValueError: a size is out of its range.
    """

    num_heads: int = 12
    head_dim: int = 96
    expand_v: float = 2.6666666667
    conv_size: int = 4
    dconv_generator_reduction: int = 8
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            name, got = f"jet: {field.name}", getattr(self, field.name)
            value: float
            if field.name in ("expand_v", "norm_eps"):
                value = checks.number(name, got, text=True)
                if value <= 0:
                    raise ValueError(f"{name} must be a positive float, got {checks.shown(got)}")
            else:
                value = checks.count(name, got, "positive int")
            object.__setattr__(self, field.name, value)
        if self.norm_eps >= 1:
            raise ValueError(f"jet: norm_eps must be below 1, got {self.norm_eps}")
        if not 2 <= self.conv_size <= 4:
            raise ValueError(f"jet: conv_size must be 2, 3 or 4, got {self.conv_size}")
        # Before it is rounded: the product may be infinite.
        if not 1 <= self.head_dim * self.expand_v <= checks.MAX_SIZE:
            raise ValueError(
                f"jet: head_dim * expand_v must be at least 1 and at most {checks.MAX_SIZE}, "
                f"got {self.head_dim} * {self.expand_v}"
            )
        checks.below_limit("jet: num_heads * head_dim", self.key_dim)
        checks.below_limit("jet: num_heads * head_dim * expand_v", self.value_dim)
        if self.dconv_generator_reduction > self.value_dim:
            raise ValueError(
                f"jet: dconv_generator_reduction must be at most {self.value_dim}, got {self.dconv_generator_reduction}"
            )

    @property
    def head_v_dim(self) -> int:
        """V."""
        return int(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        """H*K."""
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """D = H*V."""
        return self.num_heads * self.head_v_dim

    @classmethod
    def from_dict(cls, values: Mapping) -> JetBlockConfig:
        """Reads the published `efficient_attention_config.jet`.

        Its `mode` and `dconv_implementation` choose between implementations of one result; here the device does that.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"efficient_attention_config.jet must be a mapping, got {checks.shown(values)}")
        sizes = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        missing = [name for name in ("num_heads", "head_dim", "expand_v") if name not in sizes]
        if missing:
            raise ValueError(f"efficient_attention_config.jet must have {', '.join(missing)}")
        return cls(**sizes)

    def to_dict(self) -> dict:
        """The sizes by name, as `from_dict` reads them."""
        return asdict(self)
