"""Times of calls.

On a CPU: callables side by side, interleaved in one run, so that all see the same machine. On a GPU: device events.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch

Function = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    median: float  # seconds of one call
    fastest: float
    slowest: float
    n: int  # samples of the median
    method: str = "clock"


def summary(seconds: Sequence[float], method: str = "clock") -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), method)


def side_by_side(functions: dict[Name, Function], repeats: int, warmup: int = 2, inner: int = 1) -> dict[Name, Timing]:
    """Each function's time over ``repeats`` interleaved rounds of ``inner`` calls, by the host's clock."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: summary(s) for name, s in seconds.items()}


# On a GPU.

GRAPH_BELOW = 1e-3  # s: shorter calls are timed as a replayed graph, so that no launch from the host is in the number
LONGEST_GRAPH = 256  # calls in a graph
CACHES = 3  # inputs are rotated until the calls between two uses of one touch this many times the L2


def rotations(bytes_per_call: float, l2_bytes: int) -> int:
    """How many sets of inputs keep a call from finding its own in the L2."""
    return max(1, min(LONGEST_GRAPH, -(-CACHES * l2_bytes // max(int(bytes_per_call), 1))))


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _events(run: Function, samples: int) -> list[float]:
    """Seconds of each of ``samples`` runs, between two events on the current stream."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def _capture(calls: Sequence[Function]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def device_time(calls: Sequence[Function], seconds: float = 0.15) -> Timing:
    """The time of one call, from calls that do the same on different inputs; about ``seconds`` are spent on samples.

    Short calls are captured into one graph, which is replayed; its time is divided by its calls. Where nothing can be
    captured, and for long calls, each call lies between two events.
    """
    for call in calls[: max(3, min(len(calls), 8))]:
        call()
    torch.cuda.synchronize()
    once = min(_events(calls[0], 3))
    if once < GRAPH_BELOW:
        count = len(calls) if len(calls) > 16 else len(calls) * -(-16 // len(calls))
        repeated = list(itertools.islice(itertools.cycle(calls), count))
        stream = torch.cuda.current_stream()
        try:
            graph = _capture(repeated)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that breaks off may leave its own stream current
            torch.cuda.synchronize()
            method = f"events, not capturable: {str(error).splitlines()[0][:80]}"
        else:
            per_replay = min(_events(graph.replay, 3))
            samples = max(10, min(200, int(seconds / per_replay)))
            return summary([s / count for s in _events(graph.replay, samples)], f"graph of {count}")
    else:
        method = "events"
    samples = max(7, min(100, int(seconds / max(once, 1e-6))))
    order = itertools.cycle(calls)
    return summary(_events(lambda: next(order)(), samples), method)
