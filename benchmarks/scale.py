"""See how far one machine goes: 1,000 to 10,000,000 tasks, 1 to 16 processes.

    python benchmarks/scale.py              # what fits into ten minutes
    python benchmarks/scale.py --up-to 10_000_000 --seconds 3600

For each number of tasks one file is filled; then single tasks are enqueued, claimed
and completed beside them, and the latency of each call is noted. For each number of
processes, all of them do so on one file at once. All of it at full durability, with
payloads of 100 bytes; one plot each of throughput, latency, and size of file and WAL.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import run
import workloads
from report import percentile

from omniq_sqlite import DatabaseBusyError, SQLiteQueue, Task

PROCESSES = (1, 2, 4, 8, 16)
WINDOW = 2.0
"""Seconds that are measured for each size and each number of processes."""

Point = dict[str, float]


def cycle(queue: SQLiteQueue, deadline: float) -> dict[str, list[float]]:
    """Enqueue, claim and complete single tasks; return each call's seconds."""
    seconds: dict[str, list[float]] = {"enqueue": [], "claim": [], "complete": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = call()
        seconds[name].append(time.perf_counter() - start)
        return value

    while time.time() < deadline:
        task = Task("noop", ("x" * workloads.SMALL,))
        timed("enqueue", partial(queue.enqueue, task))
        claimed = timed("claim", queue.dequeue)
        timed("complete", partial(queue.complete, claimed))
    return seconds


def cycle_in_process(file: Path, start_at: float) -> dict[str, list[float]]:
    """Do so in a process of its own, from an instant on.

    One that waited in vain has that wait alone to show.
    """
    with SQLiteQueue(file) as queue:
        queue.count_tasks()
        time.sleep(max(0.0, start_at - time.time()))
        try:
            return cycle(queue, start_at + WINDOW)
        except DatabaseBusyError as error:
            return {"enqueue": [error.waited], "claim": [], "complete": []}


def summarize(parts: list[dict[str, list[float]]], folder: Path) -> Point:
    """Return throughput, latencies in milliseconds, and sizes in megabytes."""
    point: Point = {"cycles/s": sum(len(part["complete"]) for part in parts) / WINDOW}
    for name in ("enqueue", "claim", "complete"):
        calls = [value for part in parts for value in part[name]]
        if calls:
            point[f"{name} p50"] = percentile(calls, 0.5) * 1e3
            point[f"{name} p99"] = percentile(calls, 0.99) * 1e3
            point[f"{name} longest"] = max(calls) * 1e3
    file, wal = peers.file_sizes(folder)
    return point | {"file MB": file / 1e6, "WAL MB": wal / 1e6}


def grow(root: Path, up_to: int, ends_at: float) -> dict[int, Point]:
    """Measure one process with more and more tasks in the file."""
    points: dict[int, Point] = {}
    folder = root / "sizes"
    folder.mkdir()
    with SQLiteQueue(folder / "queue.db") as queue:
        count, size = 0, 1_000
        while size <= up_to and time.monotonic() < ends_at:
            start = time.monotonic()
            workloads.add_tasks(queue, size - count)
            filled = time.monotonic() - start
            added, count = size - count, size
            points[size] = summarize([cycle(queue, time.time() + WINDOW)], folder)
            points[size]["enqueue_many tasks/s"] = added / filled
            show(f"{size:,} tasks", points[size])
            size *= 10
            if filled * 10 > ends_at - time.monotonic():
                break  # the next size would not fit into the time
    return points


def crowd(root: Path) -> dict[int, Point]:
    """Measure more and more processes on a file with 1,000 tasks."""
    points: dict[int, Point] = {}
    context = multiprocessing.get_context("spawn")
    for count in PROCESSES:
        with (
            workloads.fresh_folder(root) as folder,
            context.Pool(count) as pool,
            SQLiteQueue(folder / "queue.db") as queue,
        ):
            workloads.add_tasks(queue, 1_000)
            pool.map(time.sleep, [0.05] * count, chunksize=1)
            work = [(folder / "queue.db", time.time() + 0.5)] * count
            parts = pool.starmap(cycle_in_process, work, chunksize=1)
            points[count] = summarize(parts, folder)
        show(f"{count} processes", points[count])
    return points


def show(label: str, point: Point) -> None:
    """Print one point."""
    facts = ", ".join(f"{name} {value:,.4g}" for name, value in point.items())
    print(f"{label}: {facts}", flush=True)


def plot(results: dict[str, dict[int, Point]], path: Path) -> None:
    """Draw throughput, latency and sizes over tasks and over processes."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    for row, (label, points) in zip(axes, results.items(), strict=True):
        for axis, title, names in zip(
            row,
            ("throughput [1/s]", "latency [ms]", "size [MB]"),
            (
                ("cycles/s", "enqueue_many tasks/s"),
                [
                    f"{c} {p}"
                    for c in ("enqueue", "claim", "complete")
                    for p in QUANTILES
                ],
                ("file MB", "WAL MB"),
            ),
            strict=True,
        ):
            for name in names:
                xs = [x for x in points if name in points[x]]
                style = "--" if name.endswith("p99") else "-"
                if xs:
                    axis.plot(
                        xs, [points[x][name] for x in xs], style, marker="o", label=name
                    )
            axis.set(xscale="log", yscale="log", xlabel=label, title=title)
            if title.startswith("throughput"):
                axis.set_ylim(100, 100_000)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


QUANTILES = ("p50", "p99")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--up-to",
        type=int,
        default=10_000_000,
        metavar="N",
        help="most tasks in a file",
    )
    add(
        "--seconds",
        type=float,
        default=600.0,
        help="sizes that would take longer are left out",
    )
    run.add_output_options(parser)
    options = parser.parse_args()
    root = run.choose_root(options.folder)
    print(f"Python {sys.version.split()[0]}, {run.filesystem(root)}")
    try:
        sizes = grow(root, options.up_to, time.monotonic() + options.seconds)
        results = {"tasks in the file": sizes, "processes": crowd(root)}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
