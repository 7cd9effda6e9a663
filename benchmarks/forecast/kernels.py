"""The kernels: the roles of their warps, the loop that is timed, and the conditions that the walk cannot know."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.floors import CHUNK
from benchmarks.forecast.layout import FIRST, constants
from benchmarks.forecast.machine import A, Multiprocessor, Role, event_of, is_load
from benchmarks.forecast.sass import Graph, Instruction, Loop, code_of, find_kernel, registers_of
from benchmarks.forecast.walk import Walker, Way, Work
from benchmarks.shapes import Shape

FP32, BF16 = 0, 2  # Dtype
IMAGE = 2 * 5120 + 6 * 256  # bytes that prepare hands to sweep for a chunk and head
BACKWARD_IMAGE = IMAGE + 3 * 256
BEHIND_MAPS = 0x280 + 3 * 128  # three tensor maps, aligned to 128 bytes
VALUES = 64  # value columns of a consumer of sweep


class Timed(NamedTuple):
    """What a multiprocessor does for a unit of work."""

    cycles: float
    instructions: dict[str, int]  # of a warp of each role
    busy: dict[str, float]  # cycles of schedulers, pipes, shared memory, tensor cores, memory
    waits: dict[str, float] = {}  # share of the time that the warps of a role wait for others
    latency: float = 0  # of a CTA alone, where CTAs are the unit
    total: float = 0  # of all CTAs of the multiprocessor

    @property
    def limit(self) -> str:
        """What is busy, or else who keeps the others waiting."""
        unit = max(self.busy, key=self.busy.get)
        if self.busy[unit] > 0.85 * self.cycles:
            return unit
        return (
            f"latency of {min(self.waits, key=self.waits.get)}"
            if self.waits
            else f"latency; {unit} {self.busy[unit] / self.cycles:.0%}"
        )


class Build(NamedTuple):
    """Objects and the sources that they are of."""

    files: tuple[Path, ...]
    csrc: Path

    def find(self, pattern: str) -> tuple[Graph, int]:
        """A kernel and its registers."""
        file, name = find_kernel(pattern, list(self.files))
        return _graph(file, name), registers_of(file, name)

    def arguments(self, struct: str, first: int = FIRST, **values: int) -> dict[int, int]:
        return constants(self.csrc, struct, values, first)

    def chunked(self, struct: str, shape: Shape, T: int = 4096, segments: int = 1) -> dict[int, int]:
        """Arguments of a kernel of the chunked rule: sequences of T tokens, in so many segments."""
        chunks = -(-T // CHUNK)
        plan = {"T": T, "N": 8, "cu_seqlens.data": 0, "first_chunk": 0, "first_cut": 0}
        plan |= {"segment_chunks": 0, "most_cuts": 0, "row_chunks": chunks, "row_segments": segments}
        values = {f"plan.{name}": value for name, value in plan.items()}
        values |= {
            "dtype": BF16,
            "l2norm": 1,
            "H": shape.H,
            "Hk": shape.Hk,
            "K": shape.K,
            "V": shape.V,
            "slices": -(-shape.V // 128),
        }
        return self.arguments(struct, **values, heads_per_key=shape.H // shape.Hk)


@cache
def _graph(file: Path, name: str) -> Graph:
    return Graph(code_of(file, name))


def one_turn(graph: Graph, loop, way: Way, warp: int) -> list[Instruction]:
    """Of a loop that the warp comes to."""
    walker = Walker(graph, way, warp)
    walker.to(0, frozenset([loop.header]))
    return walker.turn(loop)


def whole(graph: Graph, way: Way, warps: int) -> list[Role]:
    """Warps from the kernel's first instruction to its last. Loops with a barrier turn as often as those of warp 0."""
    roles = []
    for warp in range(warps):
        walker = Walker(graph, way, warp)
        walker.to_exit()
        roles.append(Role(walker.out, [warp], warp // 4))
        if warp == 0:
            shared = {
                h: walker.visits[h]
                for h, loop in graph.loops.items()
                if any(x.name == "BAR" for b in loop.blocks for x in graph.body(b))
            }
            way = way._replace(turns=shared)
    return roles


def resident_ctas(registers: int, warps: int) -> int:
    return 65536 // (-(-registers // 8) * 8 * 32 * warps)


def together(roles: dict[str, list[Role]], turns: int, skip: int = 4) -> Timed:
    """Roles that turn together, where memory is never late.

    The first turns are not counted. The unit is a turn of the first role.
    """
    machine = Multiprocessor(share=1e9)
    machine.add([role for many in roles.values() for role in many])
    machine.run()
    last = [w for w in machine.warps if any(w.role is role for role in next(iter(roles.values())))][-1]
    cycles = (last.ends[-1] - last.ends[skip]) / (turns - 1 - skip)
    waits = {
        name: min(w.waited for w in machine.warps if any(w.role is r for r in many)) / machine.now
        for name, many in roles.items()
    }
    instructions = {name: max(len(role.stream) for role in many) for name, many in roles.items()}
    return Timed(cycles, instructions, {unit: n / turns for unit, n in machine.busy.items()}, waits)


def one_after_another(
    roles: list[Role], resident: int, count: int, clock: str = "light clock", share: float = 1.0
) -> Timed:
    """CTAs that come and go on one multiprocessor, `count` of them in all. The unit is a CTA."""
    alone = Multiprocessor(clock, share)
    latency = alone.run_many(roles, 1, 1)
    machine, tried = Multiprocessor(clock, share), min(count, 5 * resident)
    cycles = machine.run_many(roles, tried, resident)
    total = max(machine.now, machine.memory_free) + (count - tried) * cycles  # stores included
    streams = {f"warp {role.warps[0]}": len(role.stream) for role in roles}
    return Timed(cycles, streams, {unit: n / tried for unit, n in machine.busy.items()}, latency=latency, total=total)


SWEEPS = {
    "outputs": "chunk_sweep_kernel.*SweepConfigILi{K}ELNS0_9SweepPassE0E",
    "cuts": "chunk_sweep_kernel.*SweepConfigILi{K}ELNS0_9SweepPassE1E",
    "states": "chunk_sweep_kernel.*SweepConfigILi{K}ELNS0_9SweepPassE2E",
    "reverse": r"chunk_reverse_kernel.*ReverseConfigILi{K}E\w+bf16E",
}


def sweep(build: Build, shape: Shape, which: str, turns: int = 40) -> Timed:
    """Cycles per chunk of a CTA, of a pass of the forward or the backward over the chunks of a sequence."""
    K, q_too = shape.K, which in ("outputs", "reverse")
    graph, _ = build.find(SWEEPS[which].format(K=K))
    way = Way(
        "F2FP|UTMALDG|UBLKCP|UTMASTG|STSM", r"^STG|^ST ", (Work("UTMALDG", 8),), build.chunked("SweepArguments", shape)
    )
    products, loads = graph.find_loop(["HGMMA"]), graph.find_loop(["UTMALDG"])
    normalises = graph.find_loop(["F2FP", "SYNCS.ARRIVE"], "HGMMA")
    stream = one_turn(graph, loads, way, 0)
    copies = sum(x.name in ("UTMALDG", "UBLKCP") for x in stream)
    size = (4 if q_too else 2) * CHUNK * K + 2 * CHUNK * 2 * VALUES + (IMAGE if q_too else IMAGE - 5120)
    # Per bulk store of a consumer: outputs, or the mean of two tiles.
    stored = VALUES * (CHUNK if which == "outputs" else (CHUNK + K) // 2) * 2
    row_units = 8 if K % 64 == 0 else 4  # 16 bytes wide, in a panel
    panels = K // 8 // row_units * (2 if which == "outputs" else 1)  # reverse normalises q alone

    def rows_of(w: int) -> Way:
        rows = len(range((w - 1) * 32 // row_units, CHUNK, 96 // row_units))  # of the first lane of a warp
        return way._replace(through="F2FP", around=r"STS\.128.*RZ", loops=(Work(r"LDS\.128", rows * panels),))

    acquired = next(event_of(x) for x in stream if "TRYWAIT" in x.opcode)
    stages = 3 if K <= (96 if which == "reverse" else 128) else 2
    roles = {
        "consumers": [Role(one_turn(graph, products, way, w), [w], w // 4, turns, stored=stored) for w in range(4, 12)],
        "normalisers": [Role(one_turn(graph, normalises, rows_of(w), w), [w], turns=turns) for w in range(1, 4)],
        "loader": [Role(stream, [0], turns=turns, copied=size / copies, free={acquired: stages})],
    }
    return together(roles, turns)


def prepare(build: Build, shape: Shape, count: int = 12, backward: bool = False) -> Timed:
    """Cycles per CTA, of a chunk and a key head; `count` on each multiprocessor."""
    graph, registers = build.find(rf"chunk_prepare_kernel.*PrepareConfigILi{shape.K}E\w+bf16ELb{int(backward)}E")
    heads = shape.H // shape.Hk
    way = Way("HGMMA|LDG|UBLKCP", "(?!)", (Work(r"UBLKCP\.G", heads),), build.chunked("PrepareArguments", shape))
    copied = 2 * CHUNK * shape.K * 2
    roles = whole(graph, way, 4)
    loads = sum(x.name == "UTMALDG" for x in roles[0].stream)
    roles[0].copied, roles[0].stored = copied / loads if loads else 0, BACKWARD_IMAGE if backward else IMAGE
    return one_after_another(roles, min(resident_ctas(registers, 4), 4), count, "clock")


def gradients(build: Build, shape: Shape, turns: int = 10) -> Timed:
    """Cycles of a chunk and key head whose copies are there when they are needed."""
    graph, _ = build.find(rf"chunk_gradients_kernel.*GradientConfigILi{shape.K}E\w+bf16E")
    tiles = -(-shape.V // VALUES)

    def way_of(item: Loop) -> Way:
        inner = {h: loop for h, loop in graph.loops.items() if h != item.header and loop.blocks < item.blocks}

        def has(loop: Loop, pattern: str) -> bool:
            return any(re.search(pattern, x.text) for b in loop.blocks for x in graph.body(b))

        turned = {}
        for h, loop in inner.items():
            if has(loop, "TRYWAIT") and has(loop, "HGMMA|FFMA") and not has(loop, r"BAR\.SYNC|SHFL|UTMALDG"):
                turned[h] = tiles  # the value columns
            elif has(loop, r"STG\S*\.128") and has(loop, r"LDS\.128") and not has(loop, r"BAR\.SYNC"):
                turned[h] = CHUNK * shape.K // 8 // 128  # rows of dq or dk
            elif has(loop, r"LDS\.128") and has(loop, "FFMA") and not has(loop, "TRYWAIT"):
                turned[h] = -(-shape.K * 128 // (96 * 16) // 2)  # <S0, dS>, two units at a time
        return Way("HGMMA|STSM|STG|FFMA", r"STS\.128.*RZ", (), build.chunked("GradientArguments", shape), turned)

    groups = {
        "query": (graph.find_loop(["HGMMA.*tnspB", r"BAR\.SYNC"], "tnspA"), range(4, 8)),
        "key": (graph.find_loop(["HGMMA.*tnspA", r"BAR\.SYNC"]), range(8, 12)),
        "states": (graph.find_loop(["FFMA", "TRYWAIT", "SHFL"], r"HGMMA|UTMALDG|BAR\.SYNC"), range(1, 4)),
    }
    roles = {
        name: [Role(one_turn(graph, loop, way_of(loop), w), [w], w // 4, turns) for w in warps]
        for name, (loop, warps) in groups.items()
    }
    for role in roles["states"]:  # the sums of the head before are read
        role.free = {event_of([x for x in role.stream if "TRYWAIT" in x.opcode][-1]): 1}
    return together(roles, turns, 2)


def join(build: Build, shape: Shape, sequences: int, cuts: int) -> Timed:
    """Cycles of a CTA, for all cuts of a sequence but the first and 16 columns of a head."""
    graph, registers = build.find(rf"chunk_join_kernel(?!.*JoinConfigILi(?!{shape.K}E))")
    way = Way("LDG|STG|HMMA|FFMA|UTMALDG", constants=build.chunked("JoinArguments", shape, segments=cuts + 2))
    roles = whole(graph, way, 8)
    if (found := sum(x.name == "FFMA" for x in roles[0].stream)) < shape.K**2 * 16 * cuts / 256:
        raise LookupError(f"{found} products of a warp of join for {cuts} cuts")
    take_copies(roles[0], shape.K * 4 * shape.K * cuts, 3)
    ctas = sequences * shape.H * shape.V // 16
    resident = min(resident_ctas(registers, 8), 2 if shape.K <= 128 else 1)
    return one_after_another(roles, resident, per_multiprocessor(ctas), share=share_of_memory(ctas))


def take_copies(role: Role, size: int, stages: int) -> None:
    """Bytes of all its bulk copies; it finds that many stages empty."""
    copies = sum(is_load(x) for x in role.stream)
    if copies:
        role.copied = size / copies
        role.free = {next(event_of(x) for x in role.stream if "TRYWAIT" in x.opcode): stages}


def products_and_epilogue(stream: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """Of a turn that waits for its products once: what stands before that wait and what stands behind."""
    last = max(i for i, x in enumerate(stream) if x.name == "HGMMA")
    end = next(
        i for i, x in enumerate(stream) if i > last and "DEPBAR.LE" in x.opcode and re.search("0x0$", x.operands)
    )
    return stream[: end + 1], stream[end + 1 :]


def signal(opcode: str, event: int) -> Instruction:
    return Instruction(0, "", f"SYNCS.{opcode}.A1T0", f"[{event:#x}]", 1, 7, 7, 0)


def conv(build: Build, shape: Shape, turns: int = 8) -> tuple[Timed, float]:
    """Cycles per tile of 128 tokens and 32 channels, and those of the epilogue alone.

    The weights are there when they are needed.
    """
    graph, _ = build.find(r"pingpong_dynamic_conv_kernel.*PingpongConfigINS\w+bf16ELi4E")
    panels = -(-shape.R // 64)
    way = Way(r"HGMMA|MUFU\.EX2|MUFU\.TANH|FFMA", r"LDG\.E\.128", (Work("HGMMA", 8 * panels),))
    return ping_pong(graph, way, panels, turns)


def input_gradient(build: Build, shape: Shape, turns: int = 8) -> tuple[Timed, float]:
    """The same of the first pass of the backward; no sequence begins or ends in the tile."""
    graph, _ = build.find(r"input_gradient_kernel.*InputGradientConfigINS\w+bf16ELi4ELb1E")
    panels = -(-shape.R // 64)
    way = Way(r"HGMMA|MUFU\.EX2|SHFL|STS\.128", r"LDG\.E\.U16", (Work("HGMMA", 8 * panels),))
    return ping_pong(graph, way, panels, turns, "WARPGROUP.ARRIVE")


def gradient_tile(build: Build, kernel: str, columns: int, consumers: int, products: int, turns: int = 12) -> Timed:
    """Cycles per tile of the second or third pass of the backward, of which a turn of the loop has two.

    The operands are there when they are needed, and no sequence begins in the tile.
    """
    graph, _ = build.find(rf"{kernel}_kernel.*ConfigINS\w+bf16ELi4ELi{columns}E")
    way = Way("HGMMA|LDS|LDSM|HMUL2", r"LDS\.U16|LDG\.E\.U16", (Work("HGMMA", 2 * products),))
    loop = graph.find_loop(["HGMMA"])
    groups: dict[str, list[Role]] = {}
    for g in range(1, consumers + 1):
        groups[f"consumer {g}"] = many = []
        for w in range(4 * g, 4 * g + 4):
            stream = [x for x in one_turn(graph, loop, way, w) if x.name != "SYNCS"]
            if (found := sum(x.name == "HGMMA" for x in stream)) != 2 * products:
                raise LookupError(f"{found} products of two tiles, not {2 * products}")
            many.append(Role(stream, [w], g, turns))
    pair = together(groups, turns, 2)
    return pair._replace(cycles=pair.cycles / 2, busy={unit: n / 2 for unit, n in pair.busy.items()})


def ping_pong(graph: Graph, way: Way, panels: int, turns: int, turn_before: str = "") -> tuple[Timed, float]:
    """Two warpgroups with the tensor cores in turns: cycles per tile, and those of the epilogue alone.

    A turn is waited for before the first instruction, or before the first `turn_before`.
    """
    loop = graph.find_loop(["HGMMA", r"STG\.E\.128"])
    groups: dict[str, list[Role]] = {}
    epilogues = []
    for g in (1, 2):
        groups[f"consumer {g}"] = many = []
        for w in range(4 * g, 4 * g + 4):
            stream = [x for x in one_turn(graph, loop, way, w) if x.name != "SYNCS"]
            products, epilogue = products_and_epilogue(stream)
            if (found := sum(x.name == "HGMMA" for x in products)) != 8 * panels:
                raise LookupError(f"{found} products of a tile, not {8 * panels}")
            at = next(i for i, x in enumerate(products) if x.opcode.startswith(turn_before))
            products.insert(at, signal("TRYWAIT", g))
            # The one whose products have been issued lets the other one's begin.
            stream = [*products[:-1], signal("ARRIVE", 3 - g), products[-1], *epilogue]
            many.append(Role(stream, [w], g, turns, free={"0x1": 1} if g == 1 else {}))
            epilogues.append(Role(epilogue, [w], g))
    pair = together(groups, turns, 2)
    alone = Multiprocessor()
    alone.add(epilogues[:4])
    alone.run()
    return pair._replace(cycles=pair.cycles / 2, busy={unit: n / 2 for unit, n in pair.busy.items()}), alone.now


def conv_step(build: Build, shape: Shape, rows: int) -> Timed:
    """Of one multiprocessor's CTAs, each a tile of 64 tokens and 16 channels, or 128 and 32 beyond 64 rows."""
    tokens, channels = (64, 16) if rows <= 64 else (128, 32)
    # The last argument of the template: without silu of hidden, which is jet_block_step's.
    graph, _ = build.find(
        rf"single_tile_dynamic_conv_kernel.*SingleTileConfigINS\w+bf16ELi4ELi{channels // 4}ELi{tokens // 64}ELb0E"
    )
    panels, consumers, stages = -(-shape.R // 64), tokens // 64, 6
    ctas = -(-rows // tokens) * shape.D // channels
    sequences = {"sequences.tokens": rows, "sequences.N": rows, "sequences.T": 1, "sequences.cu_seqlens.data": 0}
    arguments = build.arguments("DynamicConvArguments", BEHIND_MAPS, panels=panels, D=shape.D, silu=1, **sequences)
    way = Way(r"HGMMA|UTMALDG|MUFU\.EX2", "(?!)", (Work("HGMMA", 4 * panels), Work(r"UTMALDG\.5D", panels)), arguments)
    roles = whole(graph, way, 4 * consumers + 1)
    loader = roles[-1]
    # hidden comes from the L2, and its rows that are not there from nowhere
    take_copies(loader, 128 * panels * channels * shape.W, stages)
    resident = 2 if consumers == 1 else 1
    return one_after_another(roles, resident, per_multiprocessor(ctas), share=share_of_memory(ctas))


def per_multiprocessor(ctas: float) -> int:
    return int(-(-ctas // A["multiprocessors"]))


def share_of_memory(ctas: float) -> float:
    """Of the multiprocessor that has most to do: memory that is always busy is done with all CTAs when this one is."""
    most = A["bytes per multiprocessor"] * A["light clock"] * A["multiprocessors"] / A["bandwidth"]
    return min(per_multiprocessor(ctas) * A["multiprocessors"] / ctas, most)


def recurrent(build: Build, shape: Shape, item: int, N: int) -> Timed:
    H, K, V = shape.H, shape.K, shape.V
    tile, slices = recurrent_tiles(item, N, shape)
    state = "f" if item == 4 else "NS_4bf16E"
    graph, registers = build.find(rf"recurrent_kernel.*RecurrentConfigI{state}Li{tile}E.*ModeE0ELb0E")
    accesses = tile * item // 16 // 2 * slices  # of a thread, 16 bytes wide
    loops = (Work(r"STG\.E\.128.*STRONG", accesses), Work(r"LDG\.E\.128", accesses))
    values = {
        "dtype": BF16,
        "o_dtype": BF16,
        "g_dtype": FP32,
        "beta_dtype": FP32,
        "N": N,
        "T": 1,
        "H": H,
        "Hk": shape.Hk,
        "K": K,
        "V": V,
    }
    values |= {f"{x}.dtype": FP32 if x in ("g", "beta") else BF16 for x in ("q", "k", "v", "g", "beta")}
    heads, columns = max(slices * tile // V, 1), slices * tile
    values |= {"tokens": 1, "slices": slices, "columns": columns, "heads": heads, "l2norm_qk": 1}
    values |= (
        divisor("parts", max(V // columns, 1))
        | divisor("head_groups", H // heads)
        | divisor("group", H // shape.Hk)
        | divisor("width", V)
    )
    values |= {"pool.rows.data": 1 << 40, "pool.rows.type": 0}
    way = Way(r"LDG|SHFL|STG\.E\.128", "(?!)", loops, {0x0: 2 * K} | build.arguments("RecurrentArguments", **values))
    warps, ctas = 2 * K // 32, N * H * V / (slices * tile)
    return one_after_another(
        whole(graph, way, warps), resident_ctas(registers, warps), per_multiprocessor(ctas), share=share_of_memory(ctas)
    )


def divisor(name: str, d: int) -> dict[str, int]:
    """Members of a Divisor of csrc/gated_delta_rule/recurrent/kernel_arguments.h."""
    shift = 31 + (d - 1).bit_length()
    return {f"{name}.d": d, f"{name}.factor": -(-(1 << shift) // d), f"{name}.shift": shift}


def recurrent_tiles(item: int, N: int, shape: Shape) -> tuple[int, int]:
    """choose_recurrent_tiles of csrc/gated_delta_rule for one token: columns of a slice, slices of a CTA."""
    H, V, sms = shape.H, shape.V, int(A["multiprocessors"])
    tile = 64 if V % 64 == 0 else 32

    def most(columns: int) -> int:
        return (N * H * V // columns + sms - 1) // sms * columns

    if tile == 64 and N * H * (V // 64) < 3 * sms and most(32) < most(64):
        tile = 32
    if V % tile:
        return tile, 1
    per_head = V // tile
    per_key_head = H // shape.Hk * per_head

    def ctas(slices: int) -> int:
        return N * H * per_head // slices

    def cost(slices: int) -> int:
        return -(-ctas(slices) // sms) * (2 * slices + 3)

    best = 1
    if item == 2:
        for slices in (*(n for n in range(2, per_head + 1) if per_head % n == 0), per_key_head):
            if slices * tile <= 1024 and 4 * ctas(slices) >= 7 * sms and cost(slices) <= cost(best):
                best = slices
        return tile, best
    for slices in (per_head, per_key_head):
        if slices * tile <= 1024 and ctas(slices) >= 3 * sms and 16 * most(slices * tile) <= 17 * most(tile):
            best = slices
    return tile, best
