"""Each stage of the chunked Hopper kernels alone, against the reference's stages of the same names."""

from typing import NamedTuple

import pytest
import torch
from support.arguments import delta_inputs
from support.comparison import assert_bitwise, assert_error
from support.device_backends import hoppersim, simulated
from support.shapes import DeltaShape
from torch import Tensor

from reference import chunk_gated_delta_rule as chunk

C, BLOCK, K = 64, 16, 64
ROW_BYTES, TRIANGLE_BYTES, VECTORS = 32, 5120, ("read_k", "write", "read_q", "output", "inverse_k", "inverse_q")
IMAGE_BYTES = 2 * TRIANGLE_BYTES + len(VECTORS) * C * 4
each_timing = pytest.mark.parametrize("timing, seed", (("early", 0), ("late", 3)))


def library() -> "hoppersim.Library":
    import kernel_library  # beside the simulator's tests

    return kernel_library.library("chunk_stages")


def triangle_index() -> tuple[Tensor, Tensor]:
    """(positions in a [C, C] matrix, positions in fp16 elements of an image's triangle) of all stored elements."""
    at, stored = [], []
    for i in range(C):
        for j in range((i // BLOCK + 1) * BLOCK):
            panel = j // BLOCK
            begin = (panel * C - BLOCK * panel * (panel - 1) // 2) * ROW_BYTES
            offset = begin + (i - BLOCK * panel) * ROW_BYTES + j % BLOCK * 2
            at.append(i * C + j)
            stored.append((offset ^ (offset >> 7 & 1) << 4) // 2)
    return torch.tensor(at), torch.tensor(stored)


class Image(NamedTuple):
    T: Tensor  # (I + kk diag(beta))^-1
    P: Tensor  # of rows of norm 1, times |k_j| beta_j
    vectors: dict[str, Tensor]


def decode(image: Tensor) -> Image:
    at, stored = triangle_index()
    squares = []
    for begin in (0, TRIANGLE_BYTES):
        square = torch.zeros(C * C, dtype=torch.float64)
        square[at] = image[begin : begin + TRIANGLE_BYTES].view(torch.float16)[stored].double()
        squares.append(square.view(C, C))
    return Image(*squares, dict(zip(VECTORS, image[2 * TRIANGLE_BYTES :].view(torch.float32).view(-1, C).double())))


def encode(image: Image) -> Tensor:
    at, stored = triangle_index()
    out = torch.zeros(IMAGE_BYTES, dtype=torch.uint8)
    for begin, square in zip((0, TRIANGLE_BYTES), image[:2]):
        out[begin : begin + TRIANGLE_BYTES].view(torch.float16)[stored] = square.flatten()[at].half()
    out[2 * TRIANGLE_BYTES :].view(torch.float32).copy_(torch.cat([image.vectors[name] for name in VECTORS]))
    return out


def expected_image(q, k, g, beta, scale: float, l2norm: bool) -> Image:
    """Of one chunk and head: q, k [n, K], g, beta [n], fp64; n <= C."""
    pad = C - q.shape[0]
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k))
    g, beta = (torch.nn.functional.pad(x, (0, pad)) for x in (g, beta))
    norms = [((x * x).sum(-1) + (1e-6 if l2norm else 0)).sqrt() for x in (q, k)]
    q_one, k_one = (torch.where(norm[:, None] > 0, x / norm[:, None], 0) for x, norm in zip((q, k), norms))
    q_norm, k_norm = (torch.ones(C, dtype=torch.float64) if l2norm else norm for norm in norms)
    c = chunk.gate_cumsum(g)
    Γ = chunk.decays(c)
    kk = chunk.key_products(k_one * k_norm[:, None], Γ)
    P = chunk.query_key_products(q_one, k_one * k_norm[:, None], Γ, 1.0) * beta
    vectors = {
        "read_k": c.exp() * k_norm,
        "write": beta * (c[-1] - c).exp() * k_norm,
        "read_q": c.exp(),
        "output": scale * q_norm,
        "inverse_k": torch.where(norms[1] > 0, 1 / norms[1], 0),
        "inverse_q": torch.where(norms[0] > 0, 1 / norms[0], 0),
    }
    return Image(chunk.column_inverse(kk, beta), P, vectors)


def images_of(x, h: int) -> list[Image]:
    """Of all chunks of value head h."""
    hk = h // (x.v.shape[2] // x.q.shape[2])
    tokens = [t.double() for t in (x.q[0, :, hk], x.k[0, :, hk], x.g[0, :, h], x.beta[0, :, h])]
    return [expected_image(*(t[i : i + C] for t in tokens), x.scale, x.l2norm_qk) for i in range(0, x.q.shape[1], C)]


@simulated
@each_timing
@pytest.mark.parametrize("l2norm", (True, False))
def test_prepare(timing, seed, l2norm):
    x = delta_inputs(DeltaShape("", T=100, Hk=2, H=4, K=K, V=16, l2norm=l2norm), torch.bfloat16)
    images = torch.empty(2, 4, IMAGE_BYTES, dtype=torch.uint8)
    with hoppersim.simulate(timing=timing, seed=seed):
        library().call("run_prepare", x.q, x.k, x.g, x.beta, images, 100, 4, 2, x.scale, int(l2norm), restype=None)
    for h in range(4):
        for i, expected in enumerate(images_of(x, h)):
            found = decode(images[i, h])
            assert_error("T'", found.T, expected.T, 5e-4)
            assert_error("P'", found.P, expected.P, 1e-3)
            for name in VECTORS:
                assert_error(name, found.vectors[name], expected.vectors[name], 1e-5)
            assert not found.T.triu(1).any() and not found.P.triu(1).any()
            assert (found.T.diagonal() == 1).all()


@simulated
@each_timing
@pytest.mark.parametrize("T", (64, 100, 192))
def test_sweep(timing, seed, T):
    """With images made of the reference's stages."""
    x = delta_inputs(DeltaShape("", T=T, H=1, K=K, V=144), torch.bfloat16)
    images = torch.cat([encode(image) for image in images_of(x, 0)])
    o, S = torch.full((T, 144), torch.nan, dtype=torch.bfloat16), torch.full((K, 144), torch.nan)
    with hoppersim.simulate(timing=timing, seed=seed):
        library().call("run_sweep", x.q, x.k, x.v, images, x.initial_state, S, o, T, 144, restype=None)
    expected = chunk.chunk_gated_delta_rule(*x)
    assert_error("o", o, expected[0][0, :, 0], 2.5e-3)
    assert_error("final_state", S, expected[1][0, 0], 1e-3)


@simulated
@each_timing
@pytest.mark.parametrize("cuts", (1, 2, 4))
@pytest.mark.parametrize("K, V", ((64, 16), (96, 80), (128, 32), (256, 48)))
def test_join(timing, seed, cuts, K, V):
    """S_{s+1} = M_s S_s + N_s, and nothing before the second cut."""
    torch.manual_seed(0)
    states, transfers = torch.randn(cuts, 2, K, V), torch.randn(cuts, 2, K, K) * K**-0.5
    transfers[0] = torch.nan  # of the first segment, never read
    expected = states.double()
    for s in range(1, cuts):
        expected[s] += transfers[s].double() @ expected[s - 1]
    found = states.clone()
    with hoppersim.simulate(timing=timing, seed=seed):
        library().call("run_join", found, transfers, cuts, 2, K, V, restype=None)
    assert_bitwise(found[0], states[0], "the state behind the first segment")
    assert_error("states", found, expected, 1e-6)


class Call(NamedTuple):
    """What choose_segments() looks at."""

    B: int
    T: int
    H: int
    K: int
    V: int
    packed: bool = False
    N: int = 1
    multiprocessors: int = 132


def segments(call: Call) -> list[int]:
    """Segments of a row, chunks of a segment with cu_seqlens, most cuts."""
    found = torch.zeros(3, dtype=torch.int64)
    N = call.N if call.packed else call.B
    library().call(
        "segments",
        call.B,
        call.T,
        N,
        call.H,
        call.K,
        call.V,
        int(call.packed),
        call.multiprocessors,
        found,
        restype=None,
    )
    return found.tolist()


MODEL_2B, MODEL_4B = dict(H=12, K=96, V=256), dict(H=16, K=128, V=256)


@simulated
@pytest.mark.parametrize(
    "call, expected",
    (
        (Call(1, 32768, **MODEL_2B), 5),  # 120 CTAs with outputs, 132 without: a wave each
        (Call(1, 8192, **MODEL_2B), 5),
        (Call(1, 32768, **MODEL_4B), 4),  # 128, 128
        (Call(8, 4096, **MODEL_2B), 1),  # fills the device as it is
        (Call(2, 16384, **MODEL_2B), 5),  # 240, 264: two waves each
        (Call(1, 32768, H=2, K=128, V=256), 23),  # a longer join would cost more than shorter segments save
        (Call(1, 3009, H=1, K=64, V=16), 3),
        (Call(1, 3008, H=1, K=64, V=16), 1),  # too short
        (Call(1, 1 << 20, H=264, K=128, V=128), 1),
        (Call(1, 0, **MODEL_2B), 1),
    ),
)
def test_segments_of_a_row(call, expected):
    chunks = -(-call.T // 64)
    assert segments(call) == [expected, chunks // expected if expected > 1 else 0, call.B * (expected - 1)]


@simulated
@pytest.mark.parametrize("T", (3072, 8192, 8229, 32768, 100_000))
@pytest.mark.parametrize("heads", (MODEL_2B, MODEL_4B, dict(H=1, K=64, V=16)), ids=str)
def test_packed_sequences_have_no_more_cuts_than_room(T, heads):
    """One sequence is cut as a row is; any others need no more room."""
    of_row, _, _ = segments(Call(1, T, **heads))
    for lengths in ([T], [T - 1, 1], [T // 2, T - T // 2], [T // 7] * 7, [1] * 63 + [T - 63]):
        _, length, most = segments(Call(1, sum(lengths), **heads, packed=True, N=len(lengths)))
        cuts = [-(-n // 64) // length - 1 for n in lengths if length and -(-n // 64) >= 2 * length]
        assert sum(cuts) <= most
        if lengths == [T]:
            assert sum(cuts) == of_row - 1
