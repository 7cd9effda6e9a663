"""Sizes that the op tests try, with a reason each."""

from typing import Any, NamedTuple

import torch


class DeltaShape(NamedTuple):
    """Of the gated delta rule, chunked or recurrent."""

    reason: str
    B: int = 1
    T: int = 70
    Hk: int = 1
    H: int = 2
    K: int = 8
    V: int = 12
    cu_seqlens: tuple[int, ...] | None = None
    l2norm: bool = True
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


class ConvShape(NamedTuple):
    """Of the convolutions; a step has B sequences and no T."""

    reason: str
    B: int = 2
    T: int = 20
    D: int = 12
    R: int = 5
    W: int = 4
    cu_seqlens: tuple[int, ...] | None = None
    silu: bool = True
    bias: bool = True
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


class AttentionShape(NamedTuple):
    """Of attention_step: a sequence per length."""

    reason: str
    lengths: tuple[int, ...] = (5, 0, 9)
    H: int = 6
    Hkv: int = 2
    d: int = 16
    L: int = 12


PACKED = (0, 0, 1, 4, 4, 68, 132, 133, 200, 200)  # empty first, middle and last; 1, 3, 64, 65 and 67 tokens

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129)
DELTA_SHAPES = (
    *(DeltaShape(f"T = {T}", T=T) for T in LENGTHS),
    DeltaShape("a batch, one head", B=3, H=1, V=8),
    DeltaShape("three value heads per key head", B=2, Hk=2, H=6),
    DeltaShape("without l2norm", l2norm=False),
    DeltaShape("without initial state", state=False),
    DeltaShape("K and V are no multiple of a vector, K > V", K=13, V=7),
    DeltaShape("K = V = 1", K=1, V=1, l2norm=False),
    DeltaShape("the 2B model's heads, K = 96, V = 256: unsupported or never tested elsewhere", K=96, V=256, Hk=2),
    DeltaShape("K = 128, V = 128, GVA", K=128, V=128),
    DeltaShape("the search's largest V", K=64, V=576, H=1, T=66),
    DeltaShape("the search's largest K", K=256, V=144, H=1, T=66),
    DeltaShape("packed, empty sequences among them", T=200, cu_seqlens=PACKED, Hk=2, H=4),
    DeltaShape("packed, without initial state", T=200, cu_seqlens=PACKED, state=False),
)

CONV_SHAPES = (
    *(ConvShape(f"T = {T}", T=T) for T in (1, 2, 3, 4, 17, 65)),
    *(ConvShape(f"W = {W}", W=W) for W in (2, 3, 4)),
    ConvShape("without bias, without activation", bias=False, silu=False),
    ConvShape("without state", state=False),
    ConvShape("D and R are no multiple of a vector", D=37, R=19, T=33),
    ConvShape("several tiles of channels and of tokens", D=272, R=70, T=150, B=1),
    ConvShape("one channel, one generator unit", D=1, R=1, T=9),
    ConvShape("several blocks of tokens, forward and backward", D=5, R=3, T=4200, B=1),
    ConvShape("packed over several blocks of tokens", D=20, R=9, T=1100, B=1, cu_seqlens=(0, 3, 530, 530, 1100)),
    ConvShape("packed, empty sequences among them", B=1, T=200, cu_seqlens=PACKED),
    ConvShape("packed, W = 2, without state", B=1, T=200, W=2, cu_seqlens=PACKED, state=False),
)

ROWS = (None, (0, 1, 2), (4, 0, 3), (2, -1, 0), (-1, -1, -1), (-7, 4, -1))  # state_indices of three sequences, P = 5


def ids(case: Any) -> str | None:
    """Pytest ids: the reason of a case, the name of a dtype."""
    if isinstance(case, torch.dtype):
        return str(case).removeprefix("torch.")
    return getattr(case, "reason", None)
