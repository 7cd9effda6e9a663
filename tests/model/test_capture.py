"""What `Repeated` asks of CUDA, in which order, on a stand-in for torch.cuda; the graph itself is tested on a GPU."""

import contextlib
import gc
import weakref

import pytest
import torch

from jetkernels.model import capture
from jetkernels.model.capture import WARM_UP_CALLS, Repeated

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, device: int):
        self.device, self.waited_for = device, []

    def wait_stream(self, other):
        self.waited_for.append(other)


class FakeCuda:
    """Streams, and a graph that remembers in which of them it was captured."""

    def __init__(self, monkeypatch):
        fake = self
        self.device, self.current, self.capturing, self.graphs, self.fails = 0, Stream(0), False, [], False
        self.generators = [torch.Generator().manual_seed(n) for n in range(2)]

        class Graph:
            registered, replays = None, 0

            def register_generator_state(self, generator):
                self.registered = generator

            def replay(self):
                self.replays += 1

        @contextlib.contextmanager
        def device(device):
            before, fake.device = fake.device, device.index
            yield
            fake.device = before

        @contextlib.contextmanager
        def stream(stream):
            before, fake.current = fake.current, stream
            try:
                yield
            finally:
                fake.current = before

        @contextlib.contextmanager
        def graph(graph, stream, capture_error_mode):
            assert graph.registered is not None and capture_error_mode == "thread_local"
            fake.graphs.append(graph)
            graph.stream, fake.capturing = stream, True
            fake.current = stream  # and stays so if the end of the capture raises, as with torch
            yield
            fake.capturing = False
            if fake.fails:
                raise RuntimeError("operation failed due to a previous error during capture")

        fakes = {"Stream": Stream, "CUDAGraph": Graph, "device": device, "stream": stream, "graph": graph}
        fakes |= {"current_stream": lambda: fake.current, "current_device": lambda: fake.device}
        for name, value in (fakes | {"default_generators": self.generators}).items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    capture._stream.cache_clear()
    yield FakeCuda(monkeypatch)
    capture._stream.cache_clear()


def test_warmed_up_undone_captured_replayed(cuda):
    calls, first = [], cuda.current

    def function():
        torch.rand(1, generator=cuda.generators[0])
        calls.append(("capture" if cuda.capturing else "run", cuda.current))

    state = cuda.generators[0].get_state()
    repeated = Repeated(function, DEVICE, undo=lambda: calls.append(("undo", cuda.current)))
    (graph,) = cuda.graphs
    assert [what for what, _ in calls] == ["run"] * WARM_UP_CALLS + ["undo", "capture"]
    assert {stream for _, stream in calls} == {graph.stream} != {first}, "libraries keep a workspace for each stream"
    assert graph.stream.waited_for == [first] and first.waited_for == [graph.stream] and cuda.current is first
    assert graph.registered is cuda.generators[0]
    before_capture = torch.Generator()
    before_capture.set_state(state)
    torch.rand(1, generator=before_capture)  # the stand-in's draw while it captures
    assert torch.equal(cuda.generators[0].get_state(), before_capture.get_state())
    repeated(), repeated()
    assert graph.replays == 2 and len(calls) == WARM_UP_CALLS + 2


def test_a_device_has_one_stream_for_all_captures(cuda):
    for index in (0, 0, 1, 0):
        Repeated(lambda: None, torch.device("cuda", index), undo=lambda: None)
    streams = [graph.stream for graph in cuda.graphs]
    assert streams[0] is streams[1] is streams[3] and [stream.device for stream in streams] == [0, 0, 1, 0]
    assert [graph.registered for graph in cuda.graphs] == [cuda.generators[i] for i in (0, 0, 1, 0)]


def test_an_error_leaves_stream_and_generator_as_they_were(cuda):
    generator, first = torch.Generator(), cuda.current
    state = generator.get_state()

    def out_of_memory():
        torch.rand(1, generator=generator)
        raise MemoryError

    with pytest.raises(MemoryError):
        Repeated(out_of_memory, DEVICE, undo=lambda: None, generator=generator)
    assert cuda.current is first and torch.equal(generator.get_state(), state)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="during capture"):
        Repeated(lambda: None, DEVICE, undo=lambda: None, generator=generator)
    assert cuda.current is first
    cuda.fails = False
    Repeated(lambda: None, DEVICE, undo=lambda: None, generator=generator)  # nobody holds the lock


def test_what_the_graph_points_to_is_kept(cuda):
    def make():
        x = torch.zeros(3)
        return Repeated(lambda: x.add_(1), DEVICE, undo=x.zero_), weakref.ref(x)

    repeated, x = make()
    gc.collect()
    assert x() is not None
    del repeated
    gc.collect()
    assert x() is None


@pytest.mark.parametrize("options", [{"device": torch.device("cpu")}, {"device": DEVICE, "capture": False}], ids=str)
def test_without_a_graph_the_function_is_called(cuda, options):
    calls = []
    repeated = Repeated(lambda: calls.append(1), undo=lambda: calls.append(-1), **options)
    repeated(), repeated()
    assert calls == [1, 1] and not cuda.graphs
