"""Work on a device that is done again and again, replayed from a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import torch

WARM_UP_CALLS = 2
# One capture at a time: work that another thread gives to the stream meanwhile would become a part of the graph.
_capturing = threading.Lock()


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device.

    A new one each time would cost a workspace of cuBLAS each time: PyTorch keeps one for every stream that a product
    was ever computed in. The stream that `torch.cuda.graph` makes belongs to the device that was captured on first.
    """
    return torch.cuda.Stream(device)


class Repeated:
    """A function of tensors on a device, without arguments or results, that is called many times.

    On a GPU it is captured in a CUDA graph and replayed: a call costs one launch. Elsewhere it is called.

    Args:
        function: reads nothing on the host, and always reads and writes the same tensors. It is kept, and with it the
            tensors, whose addresses are in the graph.
        device: of the tensors.
        undo: called after the function has run to warm up, before it is captured.
        generator: of its random draws; torch's default if None. It is left as it was found.
        capture: whether to capture, where that is possible.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        *,
        undo: Callable[[], object],
        generator: torch.Generator | None = None,
        capture: bool = True,
    ):
        self._function = function
        self._call: Callable[[], object] = function
        if capture and device.type == "cuda":
            with torch.cuda.device(device), _capturing:
                self._call = _captured(function, undo, generator).replay

    def __call__(self) -> None:
        """Does the work once more."""
        self._call()


def _captured(
    function: Callable[[], object], undo: Callable[[], object], generator: torch.Generator | None
) -> torch.cuda.CUDAGraph:
    """The graph of a function on the current device."""
    device = torch.cuda.current_device()
    if generator is None:
        generator = torch.cuda.default_generators[device]
    graph, stream, before = torch.cuda.CUDAGraph(), _stream(device), generator.get_state()
    stream.wait_stream(torch.cuda.current_stream())
    # Also around the capture: `torch.cuda.graph` leaves its stream the current one if a capture fails.
    with torch.cuda.stream(stream):
        try:
            for _ in range(WARM_UP_CALLS):
                function()
            undo()
        finally:
            generator.set_state(before)
        graph.register_generator_state(generator)
        # Other threads may allocate memory meanwhile, as those that load data do.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
