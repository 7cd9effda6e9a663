"""Floors: the least bytes and tensor-core FLOP of each op, and the time that follows from a machine's ceilings."""

from typing import NamedTuple

from benchmarks.shapes import Shape

CHUNK = 64  # tokens of a chunk of the chunked algorithm
HALF, SINGLE = 2, 4  # bytes of bf16 or fp16, and of fp32


class Ceilings(NamedTuple):
    bandwidth: float  # bytes read and written per second, by a large copy
    tensor: float  # FLOP/s of an 8192^3 bf16 product


H200 = Ceilings(bandwidth=4.3e12, tensor=790e12)  # measured once on one H200; a run on a GPU measures its own


NORM_TENSORS = {"rms_norm": 2, "add_rms_norm": 4, "gated_rms_norm": 3}  # that are read or written, beside the weight
# The same of the backward, beside the weight and its gradient: x, dy and dx, and what the others have.
NORM_BACKWARD_TENSORS = {"rms_norm": 3, "add_rms_norm": 6, "gated_rms_norm": 5}


class Work(NamedTuple):
    bytes: float  # every input read once, every output written once
    flop: float  # on tensor cores

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.flop / ceilings.tensor)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flop + other.flop)

    def times(self, count: float) -> "Work":
        return Work(self.bytes * count, self.flop * count)


def token_bytes(shape: Shape) -> int:
    """q, k, v, o in 16 bits, g and beta in fp32, of one token of the delta rule."""
    return 2 * HALF * (shape.Hk * shape.K + shape.H * shape.V) + 2 * SINGLE * shape.H


def state_bytes(shape: Shape, itemsize: int = SINGLE) -> int:
    """The state of one sequence."""
    return shape.H * shape.K * shape.V * itemsize


def chunk_token(shape: Shape) -> Work:
    """One token of the chunked delta rule, forward."""
    K, V = shape.K, shape.V
    per_head = 2 * 2 * CHUNK * K  # K Kᵀ, Q Kᵀ
    per_head += 2 * CHUNK**2 / 3  # the triangular inverse
    per_head += 3 * 2 * K * V  # K S, Q S, Kᵀ U
    per_head += 2 * 2 * CHUNK * V  # T R, P U
    return Work(token_bytes(shape), shape.H * per_head)


def chunk(shape: Shape, B: int, T: int) -> Work:
    """Without an initial state, with the final one."""
    return chunk_token(shape).times(B * T) + Work(B * state_bytes(shape), 0)


def prefill(shape: Shape, N: int, T: int) -> Work:
    """Of N sequences on a pool in fp32: states read and written."""
    return chunk_token(shape).times(N * T) + Work(2 * N * state_bytes(shape), 0)


def chunk_backward_token(shape: Shape) -> Work:
    """One token of its backward, which recomputes what it needs of the forward: dO, dQ, dK, dV, dg, dbeta beside it."""
    K, V = shape.K, shape.V
    per_head = 2 * 2 * CHUNK * K + 2 * CHUNK**2 / 3  # K Kᵀ, Q Kᵀ, the triangular inverse
    per_head += 8 * 2 * K * V  # K S and Kᵀ U again; K dS, Qᵀ dO, Kᵀ dV; dO S0ᵀ, dV S0ᵀ, U dSᵀ
    per_head += 5 * 2 * CHUNK * V  # T R again; Pᵀ dO, Tᵀ dU; dO Uᵀ, dV Uᵀ
    per_head += 4 * 2 * CHUNK * K  # dP K, dM K, dMᵀ K, dPᵀ Q
    moved = 4 * HALF * shape.Hk * K + 3 * HALF * shape.H * V + 4 * SINGLE * shape.H
    return Work(moved, shape.H * per_head)


def chunk_backward(shape: Shape, B: int, T: int) -> Work:
    """Without an initial state, whose gradient is written all the same."""
    return chunk_backward_token(shape).times(B * T) + Work(B * state_bytes(shape), 0)


def recurrent(shape: Shape, B: int, T: int, itemsize: int) -> Work:
    """The state read and written once, whatever T."""
    return Work(B * (2 * state_bytes(shape, itemsize) + T * token_bytes(shape)), 0)


def _resume_bytes(shape: Shape) -> int:
    """k and u of one token in fp32: what verify leaves for commit."""
    return SINGLE * (shape.Hk * shape.K + shape.H * shape.V)


def verify(shape: Shape, B: int, T: int, itemsize: int) -> Work:
    return Work(B * (state_bytes(shape, itemsize) + T * (token_bytes(shape) + _resume_bytes(shape))), 0)


def commit(shape: Shape, B: int, T: float, itemsize: int) -> Work:
    """T: accepted tokens of a row, on average."""
    return Work(B * (2 * state_bytes(shape, itemsize) + T * (_resume_bytes(shape) + SINGLE * shape.H)), 0)


def _weight_bytes(shape: Shape) -> int:
    return HALF * shape.D * shape.W * (shape.R + 1)


def conv_token(shape: Shape) -> Work:
    """One token of the fused dynamic convolution: x, hidden, y; the generator's product."""
    return Work(HALF * (2 * shape.D + shape.R), 2 * shape.R * shape.D * shape.W)


def conv(shape: Shape, B: int, T: int) -> Work:
    return conv_token(shape).times(B * T) + Work(_weight_bytes(shape), 0)


def conv_backward(shape: Shape, B: int, T: int) -> Work:
    """x, hidden, dy, dx, dhidden; the weight and its gradient; three products: the taps again, dhidden, dweight."""
    token = Work(HALF * (3 * shape.D + 2 * shape.R), 3 * conv_token(shape).flop)
    return token.times(B * T) + Work(2 * _weight_bytes(shape), 0)


def stored_taps(shape: Shape) -> int:
    """Bytes per token that the generated taps cost where they are written and read again."""
    return 2 * HALF * shape.D * shape.W


def apply_conv(shape: Shape, B: int, T: int) -> Work:
    return Work(B * T * HALF * shape.D * (2 + shape.W), 0)


def apply_conv_backward(shape: Shape, B: int, T: int) -> Work:
    """x, dy, dx, taps and their gradient."""
    return Work(B * T * HALF * shape.D * (3 + 2 * shape.W), 0)


def conv_step(shape: Shape, B: int) -> Work:
    state = 2 * HALF * shape.D * (shape.W - 1)
    return conv_token(shape).times(B) + Work(_weight_bytes(shape) + B * state, 0)


def norm(op: str, rows: int, columns: int) -> Work:
    return Work(HALF * columns * (NORM_TENSORS[op] * rows + 1), 0)


def norm_backward(op: str, rows: int, columns: int) -> Work:
    return Work(HALF * columns * (NORM_BACKWARD_TENSORS[op] * rows + 2), 0)


def swiglu(shape: Shape, rows: int) -> Work:
    """gate, up, y in 16 bits."""
    return Work(3 * HALF * rows * shape.F, 0)


def swiglu_backward(shape: Shape, rows: int) -> Work:
    """dy, gate, up, dgate, dup in 16 bits."""
    return Work(5 * HALF * rows * shape.F, 0)


def delta_gates(shape: Shape, tokens: int) -> Work:
    """a, b in 16 bits, g, beta in fp32; A_log and dt_bias."""
    return Work((2 * HALF + 2 * SINGLE) * tokens * shape.H + 2 * SINGLE * shape.H, 0)


def delta_gates_backward(shape: Shape, tokens: int) -> Work:
    """a, b, da, db in 16 bits, dg, dbeta in fp32; A_log, dt_bias and their gradients."""
    return Work((4 * HALF + 2 * SINGLE) * tokens * shape.H + 4 * SINGLE * shape.H, 0)


def jet_block_step(shape: Shape, N: int, itemsize: int) -> Work:
    """What the projections give and y in 16 bits; the generator's weight, both states and the small parameters."""
    token = HALF * (2 * shape.H * shape.K + 3 * shape.D + shape.R + 2 * shape.H)
    states = 2 * (HALF * shape.D * (shape.W - 1) + state_bytes(shape, itemsize))
    parameters = _weight_bytes(shape) + 2 * SINGLE * shape.H + HALF * shape.V
    return Work(N * (token + states) + parameters, 2 * N * shape.R * shape.D * shape.W)


def attention_step(heads: tuple[int, int, int], N: int, L: int) -> Work:
    """(H, Hkv, d); L - 1 old keys and values read, one of each written, in 16 bits; q, k, v, o and the fp32 angles."""
    H, Hkv, d = heads
    cache = 2 * HALF * Hkv * d * L
    token = 2 * HALF * (H + Hkv) * d + 2 * SINGLE * d
    return Work(N * (cache + token), 4.0 * N * H * L * d)
