"""What compiles in the background from the first second on: the peers that tune themselves. No row comes of it."""

from benchmarks.gpu_run import versus
from benchmarks.gpu_run.supervisor import Job

NEEDS_LIBRARY = False


def jobs(settings: dict) -> list[Job]:
    return [Job("peers")] if settings.get("peers_path") else []


def run(context) -> None:
    versus.warm(context)
