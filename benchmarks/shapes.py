"""The shapes that are measured: the JetBlock of the published 2B and 4B models (arXiv 2508.15884, table 9), and 128/128."""

from typing import NamedTuple


class Shape(NamedTuple):
    name: str
    H: int  # value heads
    Hk: int  # query/key heads
    K: int
    V: int
    D: int  # convolution channels, H * V
    R: int  # generator width
    W: int  # taps


SHAPES = (
    Shape("2b", H=12, Hk=12, K=96, V=256, D=3072, R=384, W=4),
    Shape("4b", H=16, Hk=16, K=128, V=256, D=4096, R=512, W=4),
    Shape("128/128", H=32, Hk=16, K=128, V=128, D=4096, R=512, W=4),
)
