"""What hypothesis draws: seeds, lengths, layouts, shapes."""

from hypothesis import strategies as st
from support.layouts import LAYOUTS
from support.shapes import LENGTHS, ConvShape, DeltaShape

seeds = st.integers(0, 2**31 - 1)
tokens = st.one_of(st.integers(1, 20), st.sampled_from(LENGTHS))
layouts = st.lists(st.sampled_from(LAYOUTS), min_size=7, max_size=7)


@st.composite
def splits(draw, T: int, most: int = 4) -> list[int]:
    """Lengths that sum to T, zeros among them."""
    cuts = sorted(draw(st.lists(st.integers(0, T), max_size=most)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, T])]


@st.composite
def offsets(draw, longest: int = 70, most: int = 5) -> tuple[int, ...]:
    """cu_seqlens of up to ``most`` sequences, empty ones among them."""
    lengths = draw(
        st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(0, longest)), min_size=1, max_size=most)
    )
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


# Which the CPU may compute in tiles.
wide_keys, wide_values = st.sampled_from((32, 64)), st.sampled_from((64, 70, 128))


@st.composite
def delta_shapes(draw, packed: bool | None = None) -> DeltaShape:
    Hk = draw(st.integers(1, 2))
    cu_seqlens = draw(offsets()) if packed or (packed is None and draw(st.booleans())) else None
    return DeltaShape(
        "drawn",
        B=draw(st.integers(1, 3)) if cu_seqlens is None else 1,
        T=draw(tokens) if cu_seqlens is None else cu_seqlens[-1],
        Hk=Hk,
        H=Hk * draw(st.integers(1, 3)),
        K=draw(st.integers(3, 20) | wide_keys),
        V=draw(st.integers(1, 20) | wide_values),
        cu_seqlens=cu_seqlens,
        l2norm=draw(st.booleans()),
        state=draw(st.booleans()),
    )


@st.composite
def conv_shapes(draw, packed: bool | None = None) -> ConvShape:
    cu_seqlens = draw(offsets()) if packed or (packed is None and draw(st.booleans())) else None
    return ConvShape(
        "drawn",
        B=draw(st.integers(1, 3)) if cu_seqlens is None else 1,
        T=draw(tokens) if cu_seqlens is None else cu_seqlens[-1],
        D=draw(st.integers(1, 40)),
        R=draw(st.integers(1, 20)),
        W=draw(st.integers(2, 4)),
        cu_seqlens=cu_seqlens,
        silu=draw(st.booleans()),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
    )
