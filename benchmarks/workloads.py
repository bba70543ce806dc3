"""What is measured: one small function for each workload, and the table of rows.

Each function runs in a process of its own (a `Station` of run.py), opens a fresh
file, warms up, measures for a bounded time, checks that no task was lost or handed
out twice, and returns its figure as `value`, with whatever else is worth knowing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import peers
import workers
from peers import PEERS, Bare, CannotError, OmniQ, Peer

from omniq_sqlite import (
    AsyncSQLiteQueue,
    SQLiteEventStorage,
    SQLiteQueue,
    Task,
    TaskEvent,
)

Sample = dict[str, Any]
Slice = tuple[int, float]
"""Operations, and the seconds that they took."""
Measuring = Generator[Slice | Sample, bool, None]
"""Prepares, gives a slice for each `True` that it is sent, at last a sample."""

SMALL, LARGE = 100, 10_000  # bytes of payload


@dataclass(frozen=True)
class Size:
    """How much is done; `QUICK` is for correctness alone."""

    slice: float = 0.06  # seconds before the next column has its turn
    slices: int = 8  # of each column in one round
    window: float = 0.4  # seconds of what is measured in one piece
    present: int = 2_000  # tasks that are there before
    bulk: int = 1_000  # tasks in one call
    concurrent: int = 1_000
    crowd: int = 8  # processes
    crowd_window: float = 3.0  # seconds of several processes
    crowd_present: int = 24_000
    wakes: int = 40
    queues: int = 500
    large: int = 1_000_000  # rows of the large files


QUICK = Size(
    slice=0.01,
    slices=2,
    window=0.05,
    present=50,
    bulk=50,
    concurrent=50,
    crowd=2,
    crowd_window=0.3,
    crowd_present=200,
    wakes=5,
    queues=20,
    large=2_000,
)


# =============================================================================
# Tools
# =============================================================================


@contextlib.contextmanager
def fresh_folder(root: Path) -> Generator[Path]:
    """Make a folder for one measurement."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def time_flush(root: Path) -> float:
    """Return the milliseconds that it takes to flush a page that is overwritten."""
    flush = getattr(os, "fdatasync", os.fsync)
    took: list[float] = []
    with fresh_folder(root) as folder, (folder / "page").open("wb", 0) as file:
        for _ in range(50):
            file.seek(0)
            file.write(bytes(4_096))
            began = time.perf_counter()
            flush(file.fileno())
            took.append(time.perf_counter() - began)
    return 1e3 * statistics.median(took)


@contextlib.contextmanager
def opened(name: str, folder: Path, level: str) -> Generator[Peer]:
    """Open the queue of that name."""
    try:
        peer = PEERS[name](folder, level)
    except ImportError as error:
        raise CannotError(f"not installed ({error})") from error
    try:
        yield peer
    finally:
        peer.close()


def payloads(count: int, size: int = SMALL, first: int = 0) -> list[str]:
    """Make payloads of `size` bytes; each is another one."""
    return [f"{number:08d}".ljust(size, "x") for number in range(first, first + count)]


def fill(name: str, folder: Path, texts: list[str]) -> None:
    """Put tasks into a file; at NORMAL, as this is not measured."""
    with opened(name, folder, "NORMAL") as peer:
        for start in range(0, len(texts), 1_000):
            peer.fill(texts[start : start + 1_000])


def fill_copy(name: str, folder: Path, count: int, size: int = SMALL) -> None:
    """Copy a file with tasks, which is made at the first time."""
    template = folder.parent / f"template-{name}-{count}-{size}"
    if not template.exists():
        template.mkdir()
        fill(name, template, payloads(count, size))
    # The shared memory is what SQLite makes anew, should it have been left open.
    ignored = shutil.ignore_patterns("*-shm")
    shutil.copytree(template, folder, ignore=ignored, dirs_exist_ok=True)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def worn_in(path: Path) -> Generator[None]:
    """Give a file a WAL of the size that it has in the long run, and keep it.

    Flushing a file that grows takes several times as long as flushing one that is
    overwritten, on this and other file systems. Every WAL grows to some 1,000 pages
    and is overwritten from then on; what is measured shall not depend on how soon.
    An idle connection keeps it from being deleted; queues do not notice it.
    """
    keeper = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    with contextlib.closing(keeper):
        keeper.execute("PRAGMA journal_mode = WAL")
        keeper.execute("PRAGMA wal_autocheckpoint = 0")
        keeper.execute("PRAGMA synchronous = OFF")
        [[version]] = keeper.execute("PRAGMA user_version").fetchall()
        for _ in range(1_100):  # each writes one page, which stays as it is
            keeper.execute(f"PRAGMA user_version = {version}")
        keeper.execute("PRAGMA synchronous = FULL")
        keeper.execute(f"PRAGMA user_version = {version}")
        keeper.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        yield


@contextlib.contextmanager
def filled(name: str, root: Path, count: int, size: int = SMALL) -> Generator[Path]:
    """Make a fresh file with that many tasks, worn in."""
    with fresh_folder(root) as folder:
        fill_copy(name, folder, count, size)
        with worn_in(folder / PEERS[name].file_name):
            yield folder


def nothing() -> None:
    """Prepare nothing."""


def slices(
    size: Size, step: Callable[[], int], prepare: Callable[[], None] = nothing
) -> Generator[Slice, bool, None]:
    """Warm up, then give slices in which `step` is timed, as long as wanted."""
    prepare()
    step()
    more = yield 0, 0.0
    while more:
        prepare()
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < size.slice or not done:
            done += step()
        more = yield done, elapsed


def environment() -> dict[str, str]:
    """Return an environment in which Python keeps what it compiled, as users do."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def expect(holds: bool, what: str) -> None:
    """Fail the measurement if a queue lost or repeated something."""
    if not holds:
        raise AssertionError(what)


# =============================================================================
# One caller
# =============================================================================


def enqueue_one_by_one(
    name: str, root: Path, size: Size, level: str, bytes_: int
) -> Measuring:
    """Add tasks, each in its own transaction."""
    texts, added = payloads(5, bytes_), 0
    with (
        filled(name, root, size.present, bytes_) as folder,
        opened(name, folder, level) as peer,
    ):

        def step() -> int:
            nonlocal added
            peer.enqueue_each(texts)
            added += len(texts)
            return len(texts)

        yield from slices(size, step)
        seen = peer.synchronous()
        expect(peer.count() == size.present + added, "tasks are missing")
        yield {"synchronous": seen}


def work_one_by_one(
    name: str, root: Path, size: Size, level: str, bytes_: int
) -> Measuring:
    """Claim a task and complete it, each in its own transaction."""
    with (
        filled(name, root, size.present, bytes_) as folder,
        opened(name, folder, level) as peer,
    ):
        done: list[str] = []
        added = size.present

        def step() -> int:
            some = peer.work_each(5)
            expect(len(some) == 5, "tasks are missing")
            done.extend(some)
            return len(some)

        def prepare() -> None:
            nonlocal added
            if added - len(done) < size.present // 2:  # more than a slice can take
                peer.fill(payloads(size.present, bytes_, added))
                added += size.present

        yield from slices(size, step, prepare)
        expect(len(set(done)) == len(done), "a task was handed out twice")
        expect(peer.count() == added - len(done), "tasks are missing")
        yield {"synchronous": peer.synchronous()}


def enqueue_in_bulk(name: str, root: Path, size: Size) -> Measuring:
    """Add many tasks in one transaction."""
    texts, added = payloads(size.bulk), 20
    with filled(name, root, added) as folder, opened(name, folder, "FULL") as peer:

        def step() -> int:
            nonlocal added
            peer.enqueue_bulk(texts)
            added += len(texts)
            return len(texts)

        yield from slices(size, step)
        expect(peer.count() == added, "tasks are missing")
        yield {"synchronous": peer.synchronous()}


def work_in_bulk(name: str, root: Path, size: Size) -> Measuring:
    """Claim many tasks in one transaction, complete them in a second."""
    if PEERS[name].work_bulk is Peer.work_bulk:
        raise CannotError("no bulk call")
    with filled(name, root, 20) as folder, opened(name, folder, "FULL") as peer:

        def step() -> int:
            done = peer.work_bulk(size.bulk)
            expect(len(done) == size.bulk, "tasks are missing")
            return len(done)

        def prepare() -> None:
            while peer.count() < 15 * size.bulk:  # more than a slice can take
                peer.fill(payloads(size.bulk))

        yield from slices(size, step, prepare)
        yield {"synchronous": peer.synchronous()}


# =============================================================================
# Many callers in one process
# =============================================================================


class Concurrently:
    """Many calls of an async queue awaited at once, on a loop of its own."""

    def __init__(self, queue: AsyncSQLiteQueue, texts: list[str]) -> None:
        self.queue = queue
        self.texts = texts
        self.loop = asyncio.new_event_loop()

    async def pair(self) -> str:
        """Claim a task and complete it."""
        task = await self.queue.dequeue()
        assert task is not None
        await self.queue.complete(task)
        return task.id

    async def enqueue(self) -> list[str]:
        """Add all texts, each with a call of its own."""
        calls = (self.queue.enqueue(Task("noop", (text,))) for text in self.texts)
        return await asyncio.gather(*calls)

    async def work(self) -> list[str]:
        """Claim and complete as many tasks."""
        return await asyncio.gather(*(self.pair() for _ in self.texts))

    def run(self, work: Coroutine[Any, Any, list[str]]) -> int:
        """Run one burst; return its operations."""
        ids = self.loop.run_until_complete(work)
        expect(len(set(ids)) == len(self.texts), "a task was handed out twice")
        return len(ids)

    def close(self) -> None:
        """Close queue and loop."""
        self.loop.run_until_complete(self.queue.close())
        self.loop.close()


def enqueue_concurrently(name: str, root: Path, size: Size) -> Measuring:
    """Await many enqueues at once; a queue without `await` does them in a row."""
    many = payloads(size.concurrent)
    with filled(name, root, 20) as folder:
        if name == OmniQ.name:
            calls = Concurrently(AsyncSQLiteQueue(folder / "queue.db"), many)
            yield from slices(size, lambda: calls.run(calls.enqueue()))
            calls.close()
            yield {"synchronous": "FULL"}
            return
        with opened(name, folder, "FULL") as peer:
            awaits = isinstance(peer, peers.CairnQ)
            texts = many if awaits else many[:5]

            def step() -> int:
                (peer.enqueue_bulk if awaits else peer.enqueue_each)(texts)
                return len(texts)

            yield from slices(size, step)
            yield {"synchronous": peer.synchronous()}


def work_concurrently(name: str, root: Path, size: Size) -> Measuring:
    """Await many claim + complete pairs at once."""
    if name == OmniQ.name:
        yield from _omniq_pairs(root, size)
    elif name == peers.CairnQ.name:
        yield from _cairnq_pairs(root, size)
    else:
        yield from work_one_by_one(name, root, size, "FULL", SMALL)


def _omniq_pairs(root: Path, size: Size) -> Measuring:
    name = OmniQ.name
    with filled(name, root, 20) as folder, SQLiteQueue(folder / "queue.db") as filler:
        queue = AsyncSQLiteQueue(folder / "queue.db")
        calls = Concurrently(queue, payloads(size.concurrent))

        def prepare() -> None:
            while filler.count_tasks() < 6 * size.concurrent:
                add_tasks(filler, size.concurrent)

        yield from slices(size, lambda: calls.run(calls.work()), prepare)
        calls.close()
        yield {"synchronous": "FULL"}


def _cairnq_pairs(root: Path, size: Size) -> Measuring:
    name = peers.CairnQ.name
    with filled(name, root, 20) as folder, opened(name, folder, "FULL") as peer:
        assert isinstance(peer, peers.CairnQ)

        async def pair() -> None:
            [task] = await peer.take(1)
            await peer.settle(task)

        async def burst() -> int:
            await asyncio.gather(*(pair() for _ in range(size.concurrent)))
            return size.concurrent

        def prepare() -> None:
            if peer.count() < size.concurrent:
                peer.fill(payloads(size.concurrent))

        yield from slices(size, lambda: peer.run(burst()), prepare)
        yield {"synchronous": peer.synchronous()}


def enqueue_from_threads(name: str, root: Path, size: Size) -> Measuring:
    """Add tasks from 16 threads through one object."""
    if PEERS[name].threads:
        raise CannotError(PEERS[name].threads)
    with filled(name, root, 20) as folder, opened(name, folder, "FULL") as peer:
        counts = [0] * 16

        def step() -> int:
            before, deadline = sum(counts), time.perf_counter() + size.slice

            def run(number: int) -> None:
                while time.perf_counter() < deadline:
                    peer.enqueue("x" * SMALL)
                    counts[number] += 1

            threads = [threading.Thread(target=run, args=(n,)) for n in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(counts) - before

        yield from slices(size, step)
        expect(peer.count() == 20 + sum(counts), "tasks are missing")
        fairness = min(counts) / max(counts)
        yield {"fairness": fairness, "synchronous": peer.synchronous()}


# =============================================================================
# Many processes
# =============================================================================


def hammer(name: str, folder: Path, size: Size, mode: str, start_at: float) -> Sample:
    """Enqueue or work in this process for a while; 8 of them run at once."""
    deadline = start_at + size.crowd_window
    with opened(name, folder, "FULL") as peer:
        while (pause := start_at - time.time()) > 0:
            time.sleep(pause)
        late = max(0.0, time.time() - start_at)
        done: list[str] = []
        count, last, error = 0, start_at, ""
        try:
            while time.time() < deadline:
                if mode == "enqueue":
                    peer.enqueue("x" * SMALL)
                    count += 1
                else:
                    some = peer.work_each(1)
                    if not some and peer.count() == 0:
                        break
                    done += some
                    count += len(some)
                last = time.time()
        except peer.busy as exception:
            error = str(exception)
        return {
            "count": count,
            "last": last,
            "late": late,
            "done": done,
            "error": error,
        }


def sum_up_crowd(parts: list[Sample], start_at: float) -> Sample:
    """Join what 8 processes did."""
    counts = [part["count"] for part in parts]
    done = [text for part in parts for text in part["done"]]
    errors = [part["error"] for part in parts if part["error"]]
    elapsed = max(part["last"] for part in parts) - start_at
    sample: Sample = {
        "value": sum(counts) / max(elapsed, 0.001),
        "fairness": min(counts) / max(1, *counts),
        "synchronous": "FULL",
    }
    if len(set(done)) != len(done):
        sample["remark"] = f"{len(done) - len(set(done))} tasks handed out twice"
    elif errors:
        sample["remark"] = f"{len(errors)} of 8 gave up: {errors[0]}"
    return sample


def spin(folder: Path, steps: int, start_at: float, window: float) -> int:
    """Compute without any queue: what the cores can do."""
    while (pause := start_at - time.time()) > 0:
        time.sleep(pause)
    count = 0
    while time.time() < start_at + window:
        peers.burn(steps)
        count += 1
    return count


# =============================================================================
# Large files
# =============================================================================


def build_pending(folder: Path, size: Size) -> Sample:
    """Make a file with many pending tasks; measure it; add delayed ones."""
    with SQLiteQueue(folder / "queue.db") as queue:
        add_tasks(queue, size.large)
    file, _ = peers.file_sizes(folder)
    with SQLiteQueue(folder / "queue.db") as queue:
        add_tasks(queue, size.large // 10, priority=9, delay=timedelta(days=1))
    return {"bytes": file / size.large}


def add_tasks(
    queue: SQLiteQueue,
    count: int,
    *,
    priority: int = 0,
    delay: timedelta | None = None,
    name: str = "default",
) -> None:
    """Add tasks of 100 bytes, 1,000 in each transaction."""
    run_at = None if delay is None else datetime.now(UTC) + delay
    text = "x" * SMALL
    for start in range(0, count, 1_000):
        queue.enqueue_many(
            Task("noop", (text,), queue=name, priority=priority, run_at=run_at)
            for _ in range(min(1_000, count - start))
        )


def build_completed(folder: Path, size: Size) -> Sample:
    """Make a file with many completed tasks that are kept."""
    with SQLiteQueue(folder / "queue.db", retention=86_400.0) as queue:
        for start in range(0, size.large, 10_000):
            add_tasks(queue, min(10_000, size.large - start))
            while some := queue.dequeue_many(1_000):
                queue.complete_many(some)
        add_tasks(queue, 1_000)
    return {}


def build_queues(folder: Path, size: Size) -> Sample:
    """Make a file with 500 queues of which each holds tasks."""
    with SQLiteQueue(folder / "queue.db") as queue:
        for number in range(size.queues):
            add_tasks(queue, max(2, size.large // 20_000), name=f"queue-{number}")
        add_tasks(queue, 1_000)
    return {}


def build_small(folder: Path, size: Size) -> Sample:
    """Make a file with 1,000 pending tasks."""
    with SQLiteQueue(folder / "queue.db") as queue:
        add_tasks(queue, 1_000)
    return {}


def time_pairs(folder: Path, size: Size, retention: float = 0.0) -> Measuring:
    """Time claim + complete in a file that was made before; add what was taken."""
    file = folder / "queue.db"
    with worn_in(file), SQLiteQueue(file, retention=retention) as queue:
        taken = 0

        def step() -> int:
            nonlocal taken
            for _ in range(5):
                task = queue.dequeue()
                assert task is not None
                queue.complete(task)
            taken += 5
            return 5

        def prepare() -> None:
            nonlocal taken
            add_tasks(queue, taken)  # as many as before
            taken = 0

        yield from slices(size, step, prepare)
        prepare()
        yield {}


def pass_through(name: str, root: Path, size: Size) -> Sample:
    """Put a million tasks through a file, 10,000 at a time; look at its size."""
    batch = min(10_000, size.large // 10)
    sizes = []
    with fresh_folder(root) as folder, SQLiteQueue(folder / "queue.db") as queue:
        for _ in range(0, size.large, batch):
            add_tasks(queue, batch)
            while some := queue.dequeue_many(1_000):
                queue.complete_many(some)
            sizes.append(peers.file_sizes(folder)[0])
        expect(queue.count_tasks() == 0, "tasks are left")
    high = max(sizes[: max(1, len(sizes) // 10)])
    return {"value": sizes[-1] / high, "bytes": sizes[-1]}


# =============================================================================
# Waiting
# =============================================================================


def receive(name: str, folder: Path, size: Size) -> Sample:
    """Wait for tasks that another process adds; note how old each is."""
    ages = []
    with opened(name, folder, "FULL") as peer:
        for _ in range(size.wakes):
            claimed = peer.wait(10.0)
            expect(claimed is not None, "a waiting call did not wake")
            ages.append(time.time() - float(peer.payload(claimed)))
            peer.complete(claimed)
    ages = ages[2:]
    return {
        "value": statistics.median(ages) * 1e3,
        "samples": [age * 1e3 for age in ages],
        "synchronous": "FULL",
    }


def send(name: str, folder: Path, size: Size) -> Sample:
    """Add tasks now and then, each with the time just before the call."""
    with opened(name, folder, "FULL") as peer:
        time.sleep(0.2)
        for _ in range(size.wakes):
            time.sleep(random.uniform(0.02, 0.06))
            peer.enqueue(repr(time.time()))
    return {}


def wait_idly(name: str, root: Path, size: Size) -> Sample:
    """Wait for a task that never comes; return the percentage of one core."""
    with fresh_folder(root) as folder, opened(name, folder, "FULL") as peer:
        peer.wait(0.1)
        start, wall = time.process_time(), time.perf_counter()
        peer.wait(5 * size.window)
        used = time.process_time() - start
        return {"value": 100 * used / (time.perf_counter() - wall)}


# =============================================================================
# Workers
# =============================================================================


@contextlib.contextmanager
def running_worker(name: str, folder: Path, *options: str) -> Iterator[int]:
    """Start the worker of that name; yield its process id; end all of it."""
    if name not in workers.WORKERS:
        raise CannotError("no worker")
    command = [sys.executable, str(Path(workers.__file__)), name, str(folder)]
    child = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    try:
        yield child.pid
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def watch_drain(peer: Peer, window: float) -> float:
    """Return tasks per second from the first one that is taken."""
    total = count = peer.count()
    deadline = time.perf_counter() + 20
    while (count := peer.count()) == total:
        expect(time.perf_counter() < deadline, "the worker does nothing")
        time.sleep(0.01)
    start, first = time.perf_counter(), count
    while count > 0 and time.perf_counter() - start < window:
        time.sleep(min(0.04, window / 10))
        count = peer.count()
    return (first - count) / (time.perf_counter() - start)


def drain_with_worker(
    name: str, root: Path, size: Size, steps: int = 0, options: Sequence[str] = ()
) -> Sample:
    """Let a worker drain a queue, and watch from another process."""
    level = "NORMAL" if name == peers.FlexiQ.name else "FULL"
    count = size.crowd_present * 2
    with filled(name, root, 0 if steps else count) as folder:
        if steps:
            fill(name, folder, [f"#{steps}"] * count)
        with (
            opened(name, folder, level) as peer,
            running_worker(name, folder, *options),
        ):
            rate = watch_drain(peer, size.crowd_window)
    return {"value": rate, "synchronous": level}


def start_latency(name: str, root: Path, size: Size) -> Sample:
    """Time from before `enqueue` to the function's first line, worker idle."""
    level = "NORMAL" if name == peers.FlexiQ.name else "FULL"
    with filled(name, root, 0) as folder, opened(name, folder, level) as peer:
        stamps = folder / peers.STAMPS
        with running_worker(name, folder):
            sent = []
            for number in range(size.wakes + 3):
                if number == 1:
                    wait_for_lines(stamps, 1, 20)
                time.sleep(random.uniform(0.03, 0.07))
                sent.append(time.time())
                peer.enqueue(f"@{number}")
            lines = wait_for_lines(stamps, len(sent), 30)
    began = {int(line.split()[0]): float(line.split()[1]) for line in lines}
    ages = [(began[n] - at) * 1e3 for n, at in enumerate(sent)][3:]
    return {"value": statistics.median(ages), "samples": ages, "synchronous": level}


def wait_for_lines(path: Path, count: int, timeout: float) -> list[str]:
    """Wait until a file has that many lines."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.01)
    raise AssertionError("the worker does not run its tasks")


def resident(pid: int) -> float:
    """Return the resident memory of a process and its children, in MB."""
    if not Path("/proc/self/statm").exists():
        raise CannotError("read from /proc, which this system has not")
    total = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total = pages * resource.getpagesize() / 1e6
        total += sum(resident(int(child)) for child in children.read_text().split())
    return total


def idle_memory(name: str, root: Path, size: Size) -> Sample:
    """Start a worker, let it run one task, and look at its memory."""
    with fresh_folder(root) as folder:
        fill(name, folder, ["@0"])
        with running_worker(name, folder) as pid:
            wait_for_lines(folder / peers.STAMPS, 1, 20)
            time.sleep(2.5 * size.window)
            return {"value": resident(pid)}


def drain_memory(name: str, root: Path, size: Size) -> Sample:
    """Drain a large file with one worker; compare its memory early and late."""
    with fresh_folder(root) as folder:
        with SQLiteQueue(folder / "queue.db") as queue:
            add_tasks(queue, size.large)
        memory: list[tuple[int, float]] = []
        with opened(name, folder, "FULL") as peer, running_worker(name, folder) as pid:
            deadline = time.monotonic() + 900
            while (left := peer.count()) > 0:
                expect(time.monotonic() < deadline, "not drained in 15 minutes")
                memory.append((left, resident(pid)))
                time.sleep(0.05 if size.large < 100_000 else 0.5)
    early = [mb for left, mb in memory if 0.8 < left / size.large < 0.9]
    late = [mb for left, mb in memory if left / size.large < 0.1]
    if not early or not late:  # too few to tell
        return {"value": 1.0, "peak": max(mb for _, mb in memory)}
    value = statistics.median(late) / statistics.median(early)
    return {"value": value, "peak": max(mb for _, mb in memory)}


# =============================================================================
# Events and import
# =============================================================================


def log_in_bulk(name: str, root: Path, size: Size) -> Measuring:
    """Log many events in one transaction."""
    with fresh_folder(root) as folder, worn_in(folder / "events.db"):
        if name == Bare.name:
            yield from _log_bare(folder, size)
            return
        with SQLiteEventStorage(folder / "events.db") as storage:

            def step() -> int:
                storage.log_many(some_events(size.bulk))
                return size.bulk

            yield from slices(size, step)
            yield {"synchronous": "FULL"}


def some_events(count: int, first: int = 0) -> list[TaskEvent]:
    """Make events of `count` tasks."""
    return [
        TaskEvent(
            "completed", task_id=f"task-{first + n}", queue="default", message="ok"
        )
        for n in range(count)
    ]


def _log_bare(folder: Path, size: Size) -> Measuring:
    connection = sqlite3.connect(folder / "events.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(
        "CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, type TEXT,"
        " task_id TEXT, queue TEXT, worker TEXT, message TEXT, details TEXT)"
    )
    connection.execute("CREATE INDEX event_task ON event (task_id, id)")
    connection.execute("CREATE INDEX event_at ON event (at)")

    def step() -> int:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO event (at, type, task_id, queue, worker, message, details)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (time.time(), "completed", f"task-{n}", "default", None, "ok", "{}")
                for n in range(size.bulk)
            ],
        )
        connection.execute("COMMIT")
        return size.bulk

    yield from slices(size, step)
    connection.close()
    yield {"synchronous": "FULL"}


def build_events(folder: Path, size: Size) -> Sample:
    """Make a file with a million events, ten for each task."""
    with SQLiteEventStorage(folder / "events.db", synchronous="NORMAL") as storage:
        tasks = size.large // 10
        for number in range(10):
            for first in range(0, tasks, 1_000):
                storage.log_many(some_events(min(1_000, tasks - first), first))
            expect(storage.count() == (number + 1) * tasks, "events are missing")
    return {}


def query_events(folder: Path, size: Size) -> Sample:
    """Read the events of one task out of a million."""
    times = []
    with SQLiteEventStorage(folder / "events.db") as storage:
        for _ in range(100):
            task_id = f"task-{random.randrange(size.large // 10)}"
            start = time.perf_counter()
            found = storage.query(task_id=task_id)
            times.append((time.perf_counter() - start) * 1e3)
            expect(len(found) == 10, "events are missing")
    return {"value": statistics.median(times)}


def import_time(name: str, root: Path, size: Size) -> Sample:
    """Time `import omniq_sqlite` after aiosqlite and anyio, in a new process."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import aiosqlite, anyio;"
        "t = time.perf_counter(); import omniq_sqlite; print(time.perf_counter() - t)"
    )
    folder = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", program, folder]
    run = partial(
        subprocess.run,
        command,
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    run()  # the first one may have to compile
    return {"value": float(run().stdout) * 1e3}


# =============================================================================
# The table
# =============================================================================

ALL = tuple(PEERS)
FULL = tuple(name for name in ALL if name != peers.FlexiQ.name)
WORKERS = tuple(workers.WORKERS)
CROWD = tuple(name for name in FULL if name != Bare.name)


@dataclass(frozen=True)
class Check:
    """A threshold. `of` and `to` are columns; `to` may also name a group.

    Without `to` it bounds the figure itself (or what `key` names). Ratios are
    taken pair by pair within a round.
    """

    limit: float
    to: str = ""
    of: str = OmniQ.name
    key: str = "value"
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    """One workload: columns, how to measure each, and what must come out."""

    name: str
    title: str
    unit: str
    columns: tuple[str, ...]
    checks: tuple[Check, ...]
    measure: Callable[..., Sample | Measuring]
    arguments: tuple[Any, ...] = ()
    kind: str = "slices"  # how run.py measures it: `measure_<kind>` there
    fewer_is_better: bool = False
    builders: tuple[Callable[..., Sample], ...] = ()


def one_by_one_rows() -> Iterator[Row]:
    """Yield the rows of one blocking caller."""
    for level, bytes_ in (
        ("FULL", SMALL),
        ("FULL", LARGE),
        ("NORMAL", SMALL),
        ("NORMAL", LARGE),
    ):
        full = level == "FULL"
        yield Row(
            f"enqueue-{level.lower()}" + ("-10k" if bytes_ == LARGE else ""),
            f"blocking enqueue one by one, {level}, {bytes_:,} bytes",
            "tasks/s",
            FULL if full else ALL,
            (Check(0.9, "sqlite3"), Check(1.0, "huey"))
            if full
            else (Check(0.5, "sqlite3"), Check(1.0, "python peers")),
            enqueue_one_by_one,
            (level, bytes_),
        )
    for bytes_ in (SMALL, LARGE):
        yield Row(
            "work-full" + ("-10k" if bytes_ == LARGE else ""),
            f"blocking claim + complete one by one, FULL, {bytes_:,} bytes",
            "tasks/s",
            FULL,
            (Check(1.15, "sqlite3"), Check(1.15, "crash-safe peers")),
            work_one_by_one,
            ("FULL", bytes_),
        )


ROWS: tuple[Row, ...] = (
    *one_by_one_rows(),
    Row(
        "enqueue-bulk",
        "enqueue_many, 1,000 tasks a call, FULL",
        "tasks/s",
        FULL,
        (Check(0.35, "sqlite3"),),
        enqueue_in_bulk,
    ),
    Row(
        "work-bulk",
        "dequeue_many + complete_many, 1,000 tasks a call, FULL",
        "tasks/s",
        FULL,
        (Check(0.35, "sqlite3"),),
        work_in_bulk,
    ),
    Row(
        "enqueue-async",
        "1,000 concurrent async enqueues, FULL (huey: one by one)",
        "tasks/s",
        ("sqlite3", "omniq_sqlite", "huey", "cairnq"),
        (Check(12.0, "huey"),),
        enqueue_concurrently,
    ),
    Row(
        "work-async",
        "1,000 concurrent async claim + complete pairs, FULL (huey: one by one)",
        "tasks/s",
        ("sqlite3", "omniq_sqlite", "huey", "cairnq"),
        (Check(8.0, "huey"),),
        work_concurrently,
    ),
    Row(
        "enqueue-threads",
        "16 threads enqueue through one blocking object, FULL",
        "tasks/s",
        CROWD,
        (Check(4.0, "huey"),),
        enqueue_from_threads,
    ),
    *(
        Row(
            f"{mode}-processes",
            f"8 processes {verb}, FULL",
            "tasks/s",
            ("sqlite3", *CROWD),
            (
                Check(1.0, "fair peers"),
                Check(0.8, "unfair peers"),
                Check(0.5, key="fairness"),
            ),
            hammer,
            (mode,),
            kind="crowd",
        )
        for mode, verb in (
            ("enqueue", "enqueue one by one"),
            ("work", "claim + complete"),
        )
    ),
    Row(
        "backlog",
        "claim + complete beside 1,000,000 pending and 100,000 delayed tasks",
        "µs",
        ("1,000 pending", "1,000,000 pending"),
        (Check(1.3, "1,000 pending", of="1,000,000 pending", at_most=True),),
        time_pairs,
        kind="sliced_variants",
        fewer_is_better=True,
        builders=(build_small, build_pending),
    ),
    Row(
        "queues",
        "claim + complete with 500 queues in the file",
        "µs",
        ("1 queue", "500 queues"),
        (Check(1.3, "1 queue", of="500 queues", at_most=True),),
        time_pairs,
        kind="sliced_variants",
        fewer_is_better=True,
        builders=(build_small, build_queues),
    ),
    Row(
        "completed",
        "claim + complete beside 1,000,000 kept completed tasks",
        "µs",
        ("none", "1,000,000 completed"),
        (Check(1.3, "none", of="1,000,000 completed", at_most=True),),
        time_pairs,
        (86_400.0,),
        kind="sliced_variants",
        fewer_is_better=True,
        builders=(build_small, build_completed),
    ),
    Row(
        "wake",
        "a waiting call wakes on another process's enqueue",
        "ms",
        ("omniq_sqlite", "potatoq", "localqueue"),
        (Check(3.0, at_most=True), Check(15.0, key="p99", at_most=True)),
        receive,
        kind="pair",
        fewer_is_better=True,
    ),
    Row(
        "wait-idle",
        "processor time of a waiting call",
        "% of a core",
        ("omniq_sqlite", "potatoq", "localqueue"),
        (Check(1.0, at_most=True),),
        wait_idly,
        kind="station",
        fewer_is_better=True,
    ),
    Row(
        "worker",
        "worker, no-op tasks, results stored (ours: and events), FULL",
        "tasks/s",
        WORKERS,
        (Check(8_000.0), Check(5.0, "worker peers")),
        drain_with_worker,
        kind="station",
    ),
    Row(
        "worker-100",
        "the same with concurrency=100 (the others as they start)",
        "tasks/s",
        WORKERS,
        (Check(8_000.0), Check(5.0, "worker peers")),
        drain_with_worker,
        kind="station",
        arguments=(0, ("--concurrency", "100")),
    ),
    Row(
        "worker-cpu",
        "worker, 4 processes, tasks of 1 ms of computing",
        "tasks/s",
        ("4 processes without a queue", "omniq_sqlite"),
        (Check(0.85, "4 processes without a queue"),),
        drain_with_worker,
        kind="spin",
    ),
    Row(
        "start",
        "from enqueue to the function's first line, idle worker",
        "ms",
        WORKERS,
        (Check(4.0, at_most=True),),
        start_latency,
        kind="station",
        fewer_is_better=True,
    ),
    Row(
        "events-bulk",
        "log_many, 1,000 events a call, FULL",
        "events/s",
        ("sqlite3", "omniq_sqlite"),
        (Check(0.35, "sqlite3"),),
        log_in_bulk,
    ),
    Row(
        "events-query",
        "query one task's events among 1,000,000",
        "ms",
        ("omniq_sqlite",),
        (Check(1.0, at_most=True),),
        query_events,
        kind="variants",
        fewer_is_better=True,
        builders=(build_events,),
    ),
    Row(
        "memory-idle",
        "resident memory of an idle worker",
        "MB",
        WORKERS,
        (Check(45.0, at_most=True),),
        idle_memory,
        kind="station",
        fewer_is_better=True,
    ),
    Row(
        "memory-drain",
        "memory while one worker drains 1,000,000 tasks: last tenth / second tenth",
        "x",
        ("omniq_sqlite",),
        (Check(1.1, at_most=True),),
        drain_memory,
        kind="once",
        fewer_is_better=True,
    ),
    Row(
        "file-size",
        "file size for each of 1,000,000 pending tasks of 100 bytes",
        "bytes",
        ("omniq_sqlite",),
        (Check(400.0, at_most=True),),
        build_pending,
        kind="built",
        fewer_is_better=True,
        builders=(build_pending,),
    ),
    Row(
        "file-growth",
        "file size after 1,000,000 tasks passed through / high-water mark before",
        "x",
        ("omniq_sqlite",),
        (Check(1.02, at_most=True),),
        pass_through,
        kind="once",
        fewer_is_better=True,
    ),
    Row(
        "import",
        "import beyond aiosqlite and anyio",
        "ms",
        ("omniq_sqlite",),
        (Check(30.0, at_most=True),),
        import_time,
        kind="station",
        fewer_is_better=True,
    ),
)
