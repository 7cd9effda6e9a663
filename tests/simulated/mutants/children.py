"""Work in processes of its own: a mutant may crash the simulator, write where it must not, or never end."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


class Lost(RuntimeError):
    """The process ended without an answer."""


def in_children(work: Callable[[T], R], tasks: Iterable[T], jobs: int, seconds: float) -> Iterator[tuple[T, R | Lost]]:
    """``work(task)`` of each task, in order, ``jobs`` at a time; Lost where a process crashed or took too long."""
    context = multiprocessing.get_context("fork")
    tasks, running = iter(tasks), []
    try:
        while True:
            while len(running) < jobs and (task := next(tasks, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, task, sender), daemon=True)
                process.start()
                sender.close()
                running.append((task, process, receiver, time.monotonic() + seconds))
            if not running:
                return
            task, process, receiver, end = running.pop(0)
            yield task, _answer(process, receiver, end)
    finally:
        for _, process, _, _ in running:
            process.kill()


def _child(work, task, sender) -> None:
    sender.send(work(task))


def _answer(process, receiver, end: float):
    try:
        if receiver.poll(max(0.0, end - time.monotonic())):
            return receiver.recv()
        process.kill()
        return Lost("it took too long")
    except EOFError:
        process.join()
        return Lost(f"the simulator ended with status {process.exitcode}")
    finally:
        receiver.close()
        process.join()
