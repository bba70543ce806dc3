"""The workers that are compared, each a program of its own.

`python benchmarks/workers.py NAME FOLDER` works on the queue in that folder until
SIGTERM, at full durability where the queue can, with results stored, and with as much
in parallel as its own documentation starts with (huey: eight threads; potatoq: two
children; flexiq: its default; this project: its default of eight, or --concurrency).
All of them run `peers.noop`.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers


def calibrate(seconds: float = 0.001) -> int:
    """Return how many steps of `burn` take this long on an idle core."""
    steps, best = 2_000, float("inf")
    for _ in range(50):
        start = time.thread_time()
        peers.burn(steps)
        best = min(best, time.thread_time() - start)
    return int(steps * seconds / best)


def work_omniq(folder: Path, processes: int, concurrency: int) -> None:
    """Run this project's worker, with results and events in the same file."""
    from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

    tasks = TaskRegistry()
    tasks.register(name="noop")(peers.noop)
    with SQLiteBackend(folder / "queue.db", events=True) as backend:
        Worker(backend, tasks, concurrency=concurrency).run(processes=processes)


def work_huey(folder: Path, processes: int, concurrency: int) -> None:
    """Run huey's consumer, as `huey_consumer -w 8` does."""
    huey = peers.Huey(folder, "FULL").huey
    huey.create_consumer(workers=8).run()


def work_potatoq(folder: Path, processes: int, concurrency: int) -> None:
    """Run potatoq's worker, as `potatoq worker -c 2` does."""
    from importlib import import_module

    app = peers.Potatoq(folder, "FULL").app
    supervisor: Any = import_module("potatoq.worker.supervisor")
    supervisor.Supervisor(app, concurrency=2, loglevel="ERROR").start()


def work_flexiq(folder: Path, processes: int, concurrency: int) -> None:
    """Run flexiq's worker; its durability is NORMAL."""
    queue = peers.FlexiQ(folder, "NORMAL").queue
    queue.run_worker()


WORKERS: dict[str, Callable[[Path, int, int], None]] = {
    peers.OmniQ.name: work_omniq,
    peers.Huey.name: work_huey,
    peers.Potatoq.name: work_potatoq,
    peers.FlexiQ.name: work_flexiq,
}


def main() -> None:
    """Work until told to stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=WORKERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8, help="of this project's")
    options = parser.parse_args()
    os.environ[peers.STAMPS_FOLDER] = str(options.folder)
    logging.disable(logging.WARNING)
    WORKERS[options.name](options.folder, options.processes, options.concurrency)


if __name__ == "__main__":
    main()
