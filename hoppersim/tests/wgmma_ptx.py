"""PTX of kernels with one warpgroup that multiply tiles in shared memory by wgmma, and the shared-memory images they
read.

The operand layouts are written here from the picture of a swizzle atom (rows of W 16-byte units, the unit index XORed
with the row), not from the formulas of the simulator.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

SWIZZLES = {0: 1, 32: 2, 64: 4, 128: 8}  # bytes: units of an atom's row
_LAYOUT_FIELD = {0: 0, 128: 1, 64: 2, 32: 3}
SPAN_K = {
    "f16": 16,
    "bf16": 16,
    "tf32": 8,
    "e4m3": 32,
    "e5m2": 32,
    "s8": 32,
    "u8": 32,
}  # elements in 32 bytes: K of an instruction


ACCUMULATORS = {"f16": np.float16, "f32": np.float32, "s32": np.int32}


def to_bits(values: np.ndarray, element: str) -> np.ndarray:
    """The operand format's bits of values that are exact in it."""
    if element in ("s8", "u8"):
        return values.astype(np.int64).astype(np.uint8)
    values = values.astype(np.float32)
    if element in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if element == "e4m3" else torch.float8_e5m2
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.uint8).numpy()
    if element == "f16":
        return values.astype(np.float16).view(np.uint16)
    if element == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint32)


@dataclass
class Tile:
    """An operand in shared memory: its bytes, and the start offset and descriptor constants of each step along K."""

    image: np.ndarray
    starts: list[int]
    constants: int


def tile(matrix: np.ndarray, element: str, swizzle: int, mn_major: bool, step: int | None = None) -> Tile:
    """``matrix``: [rows of M or N, K]. Atoms of 8 rows (or 8 values of K) by W units, tiled along K (or MN), then the
    other way.

    ``step``: elements of K that an instruction reads of a row (B of a sparse product: twice as many as usual).
    """
    bits = to_bits(matrix, element)
    size, width = bits.itemsize, SWIZZLES[swizzle]
    per_unit = 16 // size
    lines = bits.T if mn_major else bits  # a line is contiguous in memory
    count, length = lines.shape
    across = -(-length // (per_unit * width))  # atoms along a line
    atom = 8 * width * 16
    image = np.zeros(count // 8 * across * atom, np.uint8)
    raw = np.ascontiguousarray(lines).view(np.uint8)
    for line in range(count):
        for unit in range(length // per_unit):
            column, row = unit % width, line % 8
            place = column ^ (row * width // 8)
            # Atoms: along the line outermost, so that both byte offsets of the descriptor are needed.
            begin = ((unit // width) * (count // 8) + line // 8) * atom + row * width * 16 + place * 16
            image[begin : begin + 16] = raw[line, unit * 16 : unit * 16 + 16]
    along_line, along_count = count // 8 * atom, atom  # bytes from atom to atom
    step = step or SPAN_K[element]
    k_size = matrix.shape[1]
    if mn_major:
        starts = [k // 8 * along_count for k in range(0, k_size, step)]
        leading, stride = (along_count, along_line) if swizzle == 0 else (along_line, along_count)
    else:
        units = range(0, k_size // per_unit, step // per_unit)
        starts = [u // width * along_line + u % width * 16 for u in units]
        leading, stride = along_line if swizzle == 0 else 16, along_count
    return Tile(image, starts, leading >> 4 << 16 | stride >> 4 << 32 | _LAYOUT_FIELD[swizzle] << 62)


@dataclass
class Wgmma:
    """One kernel: ``a`` is a Tile (shared) or None (registers, loaded from the fragment argument)."""

    n: int
    element: str
    b: Tile
    a: Tile | None = None
    accumulator: str = "f32"
    trans: tuple[int, int] = (0, 0)
    scale: tuple[int, int] = (1, 1)
    first_scale_d: bool = True
    # Lines put in at a place: after_fence, between (after each wgmma), after_commit, after_wait, before_fence
    extra: dict[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()

    @property
    def registers(self) -> int:
        return self.n // 4 if self.accumulator == "f16" else self.n // 2

    sparse = False  # the metadata register follows the A registers in the fragments

    @property
    def fragment_words(self) -> int:
        return (4 * self.steps if self.a is None else 0) + self.sparse

    @property
    def steps(self) -> int:
        return len(self.b.starts)

    @property
    def image(self) -> np.ndarray:
        a = np.zeros(0, np.uint8) if self.a is None else self.a.image
        pad = np.zeros(-len(a) % 1024, np.uint8)
        return np.concatenate([a, pad, self.b.image])

    def instruction(self, step: int, scale_d: str) -> str:
        k = SPAN_K[self.element]
        d = ", ".join(f"%d{r}" for r in range(self.registers))
        a = f"%rd{10 + step}" if self.a is not None else "{" + ", ".join(f"%a{4 * step + r}" for r in range(4)) + "}"
        trans = (
            ""
            if SPAN_K[self.element] != 16
            else f", {self.trans[1]}"
            if self.a is None
            else f", {self.trans[0]}, {self.trans[1]}"
        )
        scales = "" if self.accumulator == "s32" else f", {self.scale[0]}, {self.scale[1]}"
        types = f"{self.accumulator}.{self.element}.{self.element}"
        return (
            f"wgmma.mma_async.sync.aligned.m64n{self.n}k{k}.{types} {{{d}}}, {a}, %rd{40 + step}, {scale_d}"
            f"{scales}{trans};"
        )

    def line(self, name: str, text: str) -> str:
        return ("" if name in self.leave_out else text) + "\n" + self.extra.get(name, "")

    def ptx(self) -> str:
        offset_b = 0 if self.a is None else -(-len(self.a.image) // 1024) * 1024
        descriptors = []
        for step in range(self.steps):
            for first, operand, base in ((10, self.a, 0), (40, self.b, offset_b)):
                if operand is not None:
                    constant = operand.constants + (base + operand.starts[step] >> 4)
                    descriptors.append(
                        f"add.s64 %rd{first + step}, %rd1, {constant if constant < 1 << 63 else constant - (1 << 64)};"
                    )
        loads = [f"ld.global.b32 %d{r}, [%rd4+{4 * r}];" for r in range(self.registers)]
        if self.a is None:
            loads += [f"ld.global.b32 %a{r}, [%rd5+{4 * r}];" for r in range(4 * self.steps)]
        if self.sparse:
            loads.append(f"ld.global.b32 %e0, [%rd5+{4 * (self.fragment_words - 1)}];")
        stores = [f"st.global.b32 [%rd4+{4 * r}], %d{r};" for r in range(self.registers)]
        body = []
        for step in range(self.steps):
            body += [self.instruction(step, "%p2" if step == 0 else "%p3"), self.extra.get(f"between{step}", "")]
        newline = "\n  "
        return f""".version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 image, .param .u64 accumulators, .param .u64 fragments)
{{
  .reg .pred %p<8>;
  .reg .b32 %r<20>;
  .reg .b32 %d<130>;
  .reg .b32 %a<40>;
  .reg .b32 %e<10>;
  .reg .b64 %rd<80>;
  .shared .align 1024 .b8 tiles[{len(self.image)}];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, tiles;
  ld.param.u64 %rd2, [image];
  ld.param.u64 %rd4, [accumulators];
  ld.param.u64 %rd5, [fragments];
  mul.wide.u32 %rd6, %r1, {4 * self.registers};
  add.s64 %rd4, %rd4, %rd6;
  mul.wide.u32 %rd6, %r1, {4 * self.fragment_words};
  add.s64 %rd5, %rd5, %rd6;
  shl.b32 %r3, %r1, 4;
COPY:
  setp.ge.u32 %p1, %r3, {len(self.image)};
  @%p1 bra COPIED;
  cvt.u64.u32 %rd7, %r3;
  add.s64 %rd8, %rd2, %rd7;
  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd8];
  add.s32 %r8, %r2, %r3;
  st.shared.v4.b32 [%r8], {{%r4, %r5, %r6, %r7}};
  add.s32 %r3, %r3, 2048;
  bra.uni COPY;
COPIED:
  {self.line("proxy_fence", "fence.proxy.async.shared::cta;")}
  bar.sync 0;
  shr.u32 %r9, %r2, 4;
  cvt.u64.u32 %rd1, %r9;
  setp.ne.u32 %p2, {int(self.first_scale_d)}, 0;
  setp.eq.u32 %p3, 0, 0;
  mov.u32 %r10, {int(self.first_scale_d)};
  {newline.join(descriptors)}
  {newline.join(loads)}
  {self.line("fence", "wgmma.fence.sync.aligned;")}
  {newline.join(body)}
  {self.line("commit", "wgmma.commit_group.sync.aligned;")}
  {self.line("wait", "wgmma.wait_group.sync.aligned 0;")}
  {newline.join(stores)}
  ret;
}}
"""


def rows_and_columns(n: int, accumulator: str):
    """Row and column of each accumulator element [128 threads, registers, elements of a register]."""
    halves = 2 if accumulator == "f16" else 1
    thread, register, half = np.meshgrid(np.arange(128), np.arange(n // 2 // halves), np.arange(halves), indexing="ij")
    value = register * halves + half  # number of the thread's element
    row = thread // 32 * 16 + thread % 32 // 4 + value // 2 % 2 * 8
    column = value // 4 * 8 + thread % 4 * 2 + value % 2
    return row, column


def spread(matrix: np.ndarray, accumulator: str) -> np.ndarray:
    """[64, n] -> bits of the accumulator registers [128, registers]."""
    row, column = rows_and_columns(matrix.shape[1], accumulator)
    values = matrix[row, column].astype(ACCUMULATORS[accumulator])
    return np.ascontiguousarray(values).view(np.uint32)[..., 0].copy()


def gather(bits: np.ndarray, n: int, accumulator: str) -> np.ndarray:
    """Bits of the accumulator registers [128, registers] -> [64, n]."""
    row, column = rows_and_columns(n, accumulator)
    values = np.ascontiguousarray(bits)[..., None].view(ACCUMULATORS[accumulator])
    matrix = np.empty((64, n), values.dtype)
    matrix[row, column] = values
    return matrix


def fragments(a: np.ndarray, element: str) -> np.ndarray:
    """A [64, K] -> bits of the A registers [128, 4 * steps]."""
    bits = to_bits(a, element)
    per_word = 4 // bits.itemsize
    words = np.ascontiguousarray(bits).view(np.uint32)  # [64, K / per_word]: 8 words in a step
    thread, register = np.meshgrid(np.arange(128), np.arange(4 * (a.shape[1] // (8 * per_word))), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
    return np.ascontiguousarray(words[row, register // 4 * 8 + register // 2 % 2 * 4 + thread % 4])
