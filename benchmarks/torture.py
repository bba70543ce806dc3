"""Torture omniq_sqlite: kill, stop, fork, fill, cancel and lie to it, and count.

    python benchmarks/torture.py 10                # ten minutes of everything
    python benchmarks/torture.py 2 --only kill     # two minutes of one attack
    python benchmarks/torture.py 10 --seed 7       # the same plan once more

What happened is written down outside SQLite, in append-only files (one `write` a
line), so that the judge is not the accused. Each round gets a fresh folder, its
own random numbers, and is judged at its end. The last line counts what broke:

    lost      acknowledged as enqueued, then neither worked nor there
    doubled   completed twice, run after it was completed, or claimed by two
    stuck     a task that nobody can claim, although nobody works on it
    corrupt   `integrity_check` or a call says that the file is damaged
    hung      a call, a wait or a process that did not end in time
    surfaced  an error under mere load or of another name than documented; a
              bound (fairness, WAL, memory) that does not hold

The exit status is 1 if any of them is not 0. Folders of such rounds are kept.
POSIX only; run it where nothing else runs, for fairness is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import omniq_sqlite
from omniq_sqlite import (
    AsyncSQLiteBackend,
    CorruptDatabaseError,
    DatabaseBusyError,
    LeaseLostError,
    OmniQError,
    SQLiteBackend,
    Task,
    TaskRegistry,
    Worker,
    current_task,
)

KINDS = ("lost", "doubled", "stuck", "corrupt", "hung", "surfaced")
GRACE = 30.0
"""Seconds after the end of a round in which its processes have to end."""
LEASE = 2.0
"""Seconds after which the tasks of a killed process can be claimed again."""


# =============================================================================
# Ring: where one round takes place
# =============================================================================


class Journal:
    """An append-only file that many processes write, one `write` a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())

    def lines(self) -> Iterator[list[str]]:
        with self.path.open(errors="replace") as file:
            for line in file:
                yield line.split()


class Ring:
    """One round: its folder, random numbers, processes, and what was found.

    Forked children use it, too; what they find goes through a journal.
    """

    def __init__(self, folder: Path, seed: str, seconds: float) -> None:
        self.folder = folder
        self.path = str(folder / "jobs.db")
        self.random = random.Random(seed)
        self.seconds = seconds
        self.until = time.monotonic() + seconds
        self.journal = Journal(folder / "journal")
        self.findings = Journal(folder / "findings")
        self.counts = Journal(folder / "counts")
        self.running: dict[int, str] = {}
        self.options: dict[str, Any] = {"events": True}

    def is_open(self) -> bool:
        return time.monotonic() < self.until

    def found(self, kind: str, text: str) -> None:
        self.findings.note(kind, json.dumps(text))

    def check(self, holds: bool, kind: str, text: str) -> None:
        if not holds:
            self.found(kind, text)

    def count(self, what: str, number: int = 1) -> None:
        self.counts.note(number, what)

    def caught(self, error: BaseException) -> None:
        """Note an error that nobody should have seen."""
        kind = "corrupt" if isinstance(error, CorruptDatabaseError) else "surfaced"
        self.found(kind, "".join(traceback.format_exception(error)))

    def start(self, role: Callable[..., None], *args: Any) -> int:
        """Run a role in a forked child and return its process id."""
        seed = self.random.random()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._play(role, args, seed)
        self.running[pid] = f"{role.__name__}{args}"[:100]
        return pid

    def _play(
        self, role: Callable[..., None], args: tuple[Any, ...], seed: float
    ) -> NoReturn:
        status = 0
        try:
            self.random = random.Random(seed)
            self.running = {}
            stacks = (self.folder / f"stacks.{os.getpid()}").open("w")
            faulthandler.register(signal.SIGUSR1, file=stacks)
            role(self, *args)
        except BaseException as error:  # noqa: BLE001 (that is what is looked for)
            self.caught(error)
            status = 1
        finally:
            os._exit(status)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.running[pid]

    def wait(self, pid: int, seconds: float) -> bool:
        """Wait for the end of a child; what does not end in time has hung."""
        limit = time.monotonic() + seconds
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > limit:
                self._give_up(pid)
                return False
            time.sleep(0.002)
        del self.running[pid]
        return True

    def _give_up(self, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        stacks = (self.folder / f"stacks.{pid}").read_text()
        self.found("hung", f"{self.running[pid]} did not end\n{stacks}")
        self.kill(pid)

    def finish(self) -> None:
        """Wait for all that runs."""
        for pid in list(self.running):
            self.wait(pid, max(0.0, self.until - time.monotonic()) + GRACE)

    def play(self, role: Callable[..., None], *args: Any, seconds: float = 600) -> None:
        """Run a role in a child to its end."""
        self.wait(self.start(role, *args), seconds)


Attack = Callable[[Ring], None]
ATTACKS: dict[str, tuple[float, Attack]] = {}
"""By name: seconds that a round should take, and what it does."""


def attack(seconds: float) -> Callable[[Attack], Attack]:
    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = seconds, function
        return function

    return register


# =============================================================================
# Traffic: producers and consumers that write down what they do
# =============================================================================
#
# The words of the journal: `want ID` before and `have ID` after an enqueue;
# `run ID CLAIM` after a claim; `end ID CLAIM` before and `done ID CLAIM` after a
# complete; `gone ID CLAIM` when the lease was lost.


class Form:
    """One of the twins: a role is written once as a coroutine and runs on both."""

    def __init__(self, name: str) -> None:
        self.is_async = name == "async"

    def backend(self, path: str, **options: Any) -> Any:
        return (AsyncSQLiteBackend if self.is_async else SQLiteBackend)(path, **options)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if self.is_async:
            asyncio.run(coroutine)
            return
        with contextlib.suppress(StopIteration):
            coroutine.send(None)  # nothing in it ever waits for a loop
            raise AssertionError("a blocking role was suspended")

    async def sleep(self, seconds: float) -> None:
        if self.is_async:
            await asyncio.sleep(seconds)
        else:
            time.sleep(seconds)

    async def at_once(self, number: int, role: Callable[[], Any]) -> None:
        """Run a role, in the loop many times over."""
        if self.is_async:
            await asyncio.gather(*(role() for _ in range(number)))
        else:
            await role()


async def call(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    outcome = method(*args, **options)
    return await outcome if inspect.isawaitable(outcome) else outcome


def produce(ring: Ring, form_name: str, crowd: int = 3_000, pause: float = 0.0) -> None:
    """Enqueue one by one and many at once, at most `crowd` tasks ahead."""
    form = Form(form_name)

    async def enqueue(backend: Any) -> None:
        while ring.is_open():
            number = ring.random.choice([1, 1, 1, 1, 3, 40])
            tasks = [new_task(ring) for _ in range(number)]
            for task in tasks:
                ring.journal.note("want", task.id)
            ids = await send(ring, backend, tasks)
            for task_id in ids:
                ring.journal.note("have", task_id)
            await form.sleep(pause)
            while ring.is_open() and await call(backend.queue.count_tasks) > crowd:
                await form.sleep(0.05)

    async def main() -> None:
        backend = form.backend(ring.path, **ring.options)
        await form.at_once(8, lambda: enqueue(backend))
        await call(backend.close)

    form.run(main())


def new_task(ring: Ring) -> Task:
    rng = ring.random
    if rng.random() < 0.1:
        name, where = rng.choice(["note", "note_async"]), "work"
        return Task(name, (str(ring.journal.path),), queue=where, max_attempts=10**6)
    return Task(
        "f",
        ("x" * rng.choice([0, 10, 300]),),
        priority=rng.choice([0, 0, 0, 5]),
        max_attempts=10**6,
        retry_delay=0.01,
        unique_key=rng.choice([None] * 9 + [f"key {rng.randrange(20)}"]),
    )


async def send(ring: Ring, backend: Any, tasks: list[Task]) -> list[str]:
    if len(tasks) > 1:
        return list(await call(backend.enqueue_many, tasks))
    delay = ring.random.choice([0, 0, 0, 0.05])
    return [await call(backend.enqueue, tasks[0], delay=delay)]


def produce_beside_rows(ring: Ring) -> None:
    """Enqueue in the transactions of an application's own connection."""
    queue = omniq_sqlite.SQLiteQueue(ring.path)
    shop = sqlite3.connect(ring.path, timeout=GRACE)
    shop.execute("PRAGMA wal_autocheckpoint = 0")
    shop.execute("CREATE TABLE IF NOT EXISTS shop (id TEXT PRIMARY KEY)")
    while ring.is_open():
        task = new_task(ring)
        task = replace(task, unique_key=None)
        ring.journal.note("want", task.id)
        shop.execute("BEGIN IMMEDIATE")
        shop.execute("INSERT INTO shop VALUES (?)", [task.id])
        queue.enqueue_on(shop, task)
        if ring.random.random() < 0.3:
            shop.rollback()
            continue
        ring.journal.note("paid", task.id)
        shop.commit()
        ring.journal.note("have", task.id)
        time.sleep(0.002)
    shop.close()
    queue.close()


def consume(ring: Ring, form_name: str, lease: float = LEASE) -> None:
    """Claim one or many, and end each claim in one of all ways."""
    form = Form(form_name)

    async def work(backend: Any) -> None:
        while ring.is_open():
            limit = ring.random.choice([1, 1, 1, 20])
            tasks = await call(
                backend.queue.dequeue_many, limit, timeout=0.2, lease=lease
            )
            for task in tasks:
                ring.journal.note("run", task.id, task.claims)
            await end_all(ring, backend, tasks)

    async def main() -> None:
        backend = form.backend(ring.path, **ring.options)
        await form.at_once(8, lambda: work(backend))
        await call(backend.close)

    form.run(main())


async def end_all(ring: Ring, backend: Any, tasks: list[Task]) -> None:
    if len(tasks) > 1 and ring.random.random() < 0.7:
        await complete_many(ring, backend, tasks)
        return
    for task in tasks:
        try:
            await end_one(ring, backend, task)
        except LeaseLostError:
            ring.journal.note("gone", task.id, task.claims)


async def complete_many(ring: Ring, backend: Any, tasks: list[Task]) -> None:
    for task in tasks:
        ring.journal.note("end", task.id, task.claims)
    lost: set[str] = set()
    try:
        await call(backend.queue.complete_many, tasks)
    except LeaseLostError as error:
        lost = set(error.task_ids)
    for task in tasks:
        word = "gone" if task.id in lost else "done"
        ring.journal.note(word, task.id, task.claims)


async def end_one(ring: Ring, backend: Any, task: Task) -> None:
    chance = ring.random.random()
    if chance < 0.05:
        await call(backend.fail, task, ValueError("as planned"), delay=0.01)
    elif chance < 0.1:
        await call(backend.queue.release, task, delay=ring.random.choice([0, 0.01]))
    else:
        if chance < 0.2:
            task = await call(backend.queue.extend, task, LEASE, progress=chance)
        followers = [new_task(ring)] if chance > 0.9 else []
        for follower in followers:
            ring.journal.note("want", follower.id)
        ring.journal.note("end", task.id, task.claims)
        await call(backend.complete, task, task.id, enqueue=followers)
        ring.journal.note("done", task.id, task.claims)


registry = TaskRegistry()


@registry.register()
def note(journal: str) -> str:
    """Write down that a worker runs this task, and that it comes to its end."""
    task = current_task()
    book = Journal(Path(journal))
    book.note("run", task.id, task.claims)
    time.sleep(random.choice([0, 0, 0.01]))
    book.note("end", task.id, task.claims)
    os.close(book._descriptor)
    return task.id


@registry.register()
async def note_async(journal: str) -> str:
    """Do the same on the loop."""
    task = current_task()
    book = Journal(Path(journal))
    book.note("run", task.id, task.claims)
    await asyncio.sleep(random.choice([0, 0, 0.01]))
    book.note("end", task.id, task.claims)
    os.close(book._descriptor)
    return task.id


def crew(ring: Ring, processes: int = 2) -> None:
    """Run a worker with child processes until the round is over."""
    backend = SQLiteBackend(ring.path, **ring.options)
    worker = Worker(
        backend, registry, queues=["work"], concurrency=4, lease=LEASE, grace=2.0
    )
    threading.Timer(ring.until - time.monotonic(), worker.stop).start()
    worker.run(processes=processes)
    backend.close()


def maintain(ring: Ring) -> None:
    """Do what an operator does, all the time."""
    backend = SQLiteBackend(ring.path, **ring.options)
    while ring.is_open():
        backend.cleanup()
        backend.queue.stats()
        backend.queue.list_tasks(limit=10)
        backend.queue.list_workers()
        assert backend.events is not None
        backend.events.query(newest_first=True, limit=10)
        for finding in backend.check():
            kind = "corrupt" if finding.check == "integrity" else "surfaced"
            ring.check(finding.severity == "warning", kind, str(finding))
        time.sleep(0.3)
    backend.close()


def drain(ring: Ring, clock: Callable[[], float] = time.time) -> None:
    """Work off what is left, and end when no task is live."""
    backend = SQLiteBackend(ring.path, clock=clock)
    limit = time.monotonic() + 60
    queue = backend.queue
    while time.monotonic() < limit:
        names = queue.list_queues() or ["default"]
        tasks = queue.dequeue_many(500, names, timeout=0.2, lease=60)
        for task in tasks:
            ring.journal.note("run", task.id, task.claims)
            ring.journal.note("end", task.id, task.claims)
        queue.complete_many(tasks)
        for task in tasks:
            ring.journal.note("done", task.id, task.claims)
        if not tasks and not any(
            s.scheduled + s.pending + s.running for s in queue.stats()
        ):
            break
    backend.close()


# -- The judge --


def judge(ring: Ring, clock: Callable[[], float] = time.time) -> None:
    """Compare the journal with the file, work off the rest, and compare again."""
    ring.check(is_whole(ring.path), "corrupt", "integrity_check")
    found = read_journal(ring)
    live = live_ids(ring.path)
    for task_id in found.have - live - found.ended:
        ring.found("lost", f"{task_id} was acknowledged and is gone")
    for task_id in live & found.done.keys():
        ring.found("doubled", f"{task_id} is complete and can run again")
    shop = fetch(ring.path, "SELECT id FROM shop") if found.paid else []
    for task_id in {row[0] for row in shop} ^ (found.paid & (live | found.ended)):
        ring.found("lost", f"{task_id} and the application's row are not one")
    ring.play(drain, clock)
    for task_id in live_ids(ring.path):
        ring.found("stuck", f"{task_id} is live, and nothing can be claimed")
    judge_runs(ring)
    ring.count("tasks", len(found.have))
    ring.check(is_whole(ring.path), "corrupt", "integrity_check after the rest")


class Found:
    """What the journal says."""

    def __init__(self) -> None:
        self.have: set[str] = set()
        self.paid: set[str] = set()
        self.ended: set[str] = set()
        self.done: dict[str, int] = {}
        self.twice: list[str] = []


def read_journal(ring: Ring) -> Found:
    found, ending = Found(), defaultdict[str, set[str]](set)
    for word, task_id, *rest in ring.journal.lines():
        if word == "have":
            found.have.add(task_id)
        elif word == "paid":
            found.paid.add(task_id)
        elif word == "end":
            ending[task_id].add(rest[0])
        elif word == "gone":
            ending[task_id].discard(rest[0])
        elif word == "done":
            if task_id in found.done:
                found.twice.append(task_id)
            found.done[task_id] = int(rest[0])
    found.ended = {task_id for task_id, claims in ending.items() if claims}
    return found


def judge_runs(ring: Ring) -> None:
    """No claim belongs to two, and nothing runs after it was completed."""
    found = read_journal(ring)
    for task_id in found.twice:
        ring.found("doubled", f"{task_id} was completed twice")
    completed = dict(found.done)
    sql = "SELECT task_id, claim FROM omniq_result WHERE status = 'success'"
    completed |= dict(fetch(ring.path, sql))
    runs: set[tuple[str, str]] = set()
    for word, task_id, *rest in ring.journal.lines():
        if word != "run":
            continue
        if (task_id, rest[0]) in runs:
            ring.found("doubled", f"claim {rest[0]} of {task_id} was given to two")
        runs.add((task_id, rest[0]))
        if int(rest[0]) > completed.get(task_id, 10**9):
            ring.found("doubled", f"{task_id} ran after it was completed")


def fetch(path: str, sql: str) -> list[Any]:
    """Read beside the module; call it where no child is forked meanwhile."""
    with contextlib.closing(sqlite3.connect(path, timeout=GRACE)) as connection:
        return connection.execute(sql).fetchall()


def is_whole(path: str) -> bool:
    try:
        return fetch(path, "PRAGMA integrity_check") == [("ok",)]
    except sqlite3.DatabaseError:
        return False


def live_ids(path: str) -> set[str]:
    sql = (
        "SELECT id FROM omniq_task WHERE status IN ('scheduled', 'pending', 'running')"
    )
    return {row[0] for row in fetch(path, sql)}


# =============================================================================
# Attack 1: SIGKILL
# =============================================================================

CAST: list[tuple[Any, ...]] = [
    (produce, "blocking"),
    (produce, "async"),
    (produce_beside_rows,),
    (consume, "blocking"),
    (consume, "async"),
    (crew,),
    (maintain,),
]


@attack(seconds=12)
def kill(ring: Ring) -> None:
    """Kill producers, consumers, worker parents and children at random moments."""
    ring.play(prepare)
    members = [ring.start(*part) for part in CAST]
    seen: set[int] = set()
    while ring.is_open():
        time.sleep(ring.random.uniform(0.002, 0.06))
        number = ring.random.randrange(len(members))
        seen |= kill_one(ring, members, number)
    ring.finish()
    limit = time.monotonic() + GRACE
    while any(map(is_alive, seen)):
        if time.monotonic() > limit:
            ring.found("hung", "a worker's child outlived its parent")
            break
        time.sleep(0.05)
    judge(ring)


def prepare(ring: Ring) -> None:
    with SQLiteBackend(ring.path, **ring.options) as backend:
        backend.queue.count_tasks()


def kill_one(ring: Ring, members: list[int], number: int) -> set[int]:
    """Kill a member, or a child of it, and let another one take its place."""
    pid, part = members[number], CAST[number]
    children = children_of(pid) if part[0] is crew else set()
    if part[0] is crew and ring.random.random() < 0.6:
        return children  # they need some time to start
    if children and ring.random.random() < 0.7:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ring.random.choice(sorted(children)), signal.SIGKILL)
    else:
        ring.kill(pid)
        members[number] = ring.start(*part)
    ring.count("kills")
    return children


def children_of(parent: int) -> set[int]:
    """Return the worker processes that this one has started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                helper = b"resource_tracker" in (entry / "cmdline").read_bytes()
                if int(fields[1]) == parent and not helper:
                    found.add(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return False
    return status[0] not in "ZX"


# =============================================================================
# Every public call, on a file with something for each of them
# =============================================================================

NOW = 1_800_000_000.0
Contents = dict[str, Counter[Any]]


def stage(ring: Ring) -> None:
    """Make the file that each call of `CALLS` finds; it is kept as a template."""
    now = NOW - 100
    with SQLiteBackend(ring.path, events=True, clock=lambda: now) as backend:
        queue = backend.queue
        assert backend.results is not None
        for name, options in STAGED:
            queue.enqueue(Task(name, queue=name, max_attempts=2, **options))
        kept = SQLiteBackend(ring.path, retention=1.0, clock=lambda: now)
        kept.complete(claim(queue, "kept"))
        kept.close()
        queue.fail(claim(queue, "failed"), "no", retry=False)
        queue.cancel_all(queue="cancelled")
        claim(queue, "elsewhere", worker="gone")
        backend.results.store(omniq_sqlite.TaskResult("old", RESULT, 1), ttl=1)
        backend.results.store(omniq_sqlite.TaskResult("there", RESULT, 1))
        queue.enqueue(Task("due", queue="due"), delay=5)
        queue.pause("paused")
        task = claim(queue, "mine", worker="me")
    os.rename(ring.path, ring.folder / "template")
    (ring.folder / "task").write_text(f"{task.id} {task.lease_id}")


RESULT = omniq_sqlite.ResultStatus.SUCCESS
STAGED: list[tuple[str, dict[str, Any]]] = [
    ("mine", {"unique_key": "mine"}),
    ("default", {}),
    ("default", {}),
    ("held", {"unique_key": "held"}),
    ("kept", {}),
    ("failed", {}),
    ("cancelled", {}),
    ("elsewhere", {}),
]


def claim(queue: Any, name: str, **options: Any) -> Task:
    task = queue.dequeue(name, lease=3600, **options)
    assert isinstance(task, Task)
    return task


def set_stage(ring: Ring) -> str:
    """Put a copy of the template in place and return its path."""
    path = str(ring.folder / "stage.db")
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    shutil.copy(ring.folder / "template", path)
    return path


def claimed(ring: Ring) -> Task:
    """Return the task that was claimed before."""
    task_id, lease_id = (ring.folder / "task").read_text().split()
    task = Task("mine", queue="mine", id=task_id, max_attempts=2, unique_key="mine")
    return replace(task, lease_id=lease_id, attempt=1, claims=1, worker="me")


def contents(path: str) -> Contents:
    """Return what is in the file, without what differs from run to run."""
    connection = sqlite3.connect(path, timeout=GRACE)
    with contextlib.closing(connection):
        return {sql: Counter(connection.execute(sql)) for sql in CONTENTS}


CONTENTS = (
    "SELECT queue, func, status, attempt, claims, unique_key, error IS NULL,"
    " lease_id IS NULL, lease_until, finished_at, progress FROM omniq_task",
    "SELECT status, value, error_type, attempt FROM omniq_result",
    "SELECT type, message FROM omniq_event",
    "SELECT queue FROM omniq_pause",
    "SELECT name FROM omniq_worker",
)

new = Task  # what a call enqueues


def on_own_connection(backend: Any, _task: Task) -> Any:
    """Enqueue in a transaction of our own, and commit it."""
    connection = omniq_sqlite._connection_factory(backend.path, timeout=0)
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        outcome = backend.queue.enqueue_on(connection, new("a"), new("b"))
        if inspect.iscoroutine(outcome):
            with contextlib.suppress(StopIteration):
                outcome.send(None)
        connection.commit()


def event(kind: str) -> omniq_sqlite.TaskEvent:
    return omniq_sqlite.TaskEvent(kind)


def result(name: str) -> omniq_sqlite.TaskResult:
    return omniq_sqlite.TaskResult(name, RESULT, 2)


CALLS: dict[str, Callable[[Any, Task], Any]] = {
    "enqueue": lambda b, t: b.enqueue(new("new", unique_key="k")),
    "enqueue a held key": lambda b, t: b.enqueue(
        new("new", queue="held", unique_key="held")
    ),
    "enqueue_many": lambda b, t: b.enqueue_many([new("a"), new("b"), new("c")]),
    "enqueue_many with a held key": lambda b, t: b.enqueue_many(
        [new("a"), new("b", queue="held", unique_key="held"), new("c")]
    ),
    "enqueue_on": on_own_connection,
    "dequeue": lambda b, t: b.queue.dequeue(lease=60),
    "dequeue what is due": lambda b, t: b.queue.dequeue(["due", "default"]),
    "dequeue_many": lambda b, t: b.queue.dequeue_many(5, ["default", "held"]),
    "dequeue as a worker": lambda b, t: b.queue.dequeue(worker="me", timeout=0.01),
    "complete": lambda b, t: b.queue.complete(t),
    "complete_many": lambda b, t: b.queue.complete_many([t]),
    "complete with a result": lambda b, t: b.complete(
        t, 42, enqueue=[new("next", unique_key="mine"), new("more")]
    ),
    "fail": lambda b, t: b.queue.fail(t, "no", delay=5),
    "fail for good": lambda b, t: b.fail(t, ValueError("no"), retry=False),
    "release": lambda b, t: b.queue.release(t),
    "release for a while": lambda b, t: b.queue.release(t, delay=5),
    "extend": lambda b, t: b.queue.extend(t, 70, progress=[1, 2]),
    "reclaim": lambda b, t: b.queue.reclaim("gone"),
    "cancel": lambda b, t: b.queue.cancel(t.id),
    "cancel_all": lambda b, t: b.queue.cancel_all(),
    "retry_all": lambda b, t: b.queue.retry_all(),
    "pause": lambda b, t: b.queue.pause("default"),
    "resume": lambda b, t: b.queue.resume("paused"),
    "purge": lambda b, t: b.queue.purge(),
    "store": lambda b, t: b.results.store(result("there")),
    "store_many": lambda b, t: b.results.store_many([result("x"), result("y")]),
    "delete": lambda b, t: b.results.delete("there"),
    "purge results": lambda b, t: b.results.purge(older_than=1),
    "log_many": lambda b, t: b.events.log_many([event("a"), event("b")]),
    "purge events": lambda b, t: b.events.purge(older_than=1),
    "cleanup": lambda b, t: b.cleanup(),
    # reads
    "get_task": lambda b, t: b.queue.get_task(t.id),
    "list_tasks": lambda b, t: b.queue.list_tasks(),
    "count_tasks": lambda b, t: b.queue.count_tasks(),
    "stats": lambda b, t: b.queue.stats(),
    "list_queues": lambda b, t: b.queue.list_queues(),
    "list_workers": lambda b, t: b.queue.list_workers(),
    "get": lambda b, t: b.results.get("there"),
    "list_results": lambda b, t: b.results.list_results(),
    "wait": lambda b, t: b.results.wait("there", timeout=0.1),
    "query": lambda b, t: b.events.query(),
    "count": lambda b, t: b.events.count(),
    "status": lambda b, t: b.status(t.id),
    "result": lambda b, t: b.result("there", timeout=0.1),
    "check": lambda b, t: b.check(),
}
IN_STEPS = {"cleanup"}
"""Calls of several transactions: after a fault some of these may have happened."""


def open_stage(path: str, form: Form) -> Any:
    return form.backend(path, events=True, synchronous="OFF", clock=lambda: NOW)


def after_each(ring: Ring) -> dict[str, Contents]:
    """Return what the file holds after each call that nothing disturbs."""
    found = {}
    for name, function in CALLS.items():
        path = set_stage(ring)
        with open_stage(path, Form("blocking")) as backend:
            function(backend, claimed(ring))
        found[name] = contents(path)
    return found


# -- Attack 1, at every statement --


@attack(seconds=20)
def statement(ring: Ring) -> None:
    """End the process before the n-th statement of each public call, for all n."""
    ring.play(stage)
    ring.play(open_and_die)
    for name in CALLS:
        path = set_stage(ring)
        before, outcomes = contents(path), []
        for deadly in range(1, 200):
            path = set_stage(ring)
            pid = ring.start(die, name, deadly)
            survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            del ring.running[pid]
            ring.check(is_whole(path), "corrupt", f"{name}, statement {deadly}")
            outcomes.append(contents(path))
            if survived:
                break
            ring.count("kills")
        after = outcomes[-1]
        for deadly, outcome in enumerate(outcomes, 1):
            whole = name in IN_STEPS or outcome in (before, after)
            ring.check(whole, "lost", f"{name}, statement {deadly}: half done")


def die(ring: Ring, name: str, deadly: int) -> None:
    path = str(ring.folder / "stage.db")
    mortal = Mortal.count_down(deadly + 1)
    backend = open_stage(path, Form("blocking"))
    backend.queue.count_tasks()
    mortal.left = deadly
    CALLS[name](backend, claimed(ring))


def open_and_die(ring: Ring) -> None:
    """Do the same to the first opening, which makes the tables."""
    for deadly in range(1, 200):
        path = str(ring.folder / "new.db")
        for suffix in ("", "-wal", "-shm"):
            Path(path + suffix).unlink(missing_ok=True)
        pid = ring.start(die_while_opening, path, deadly)
        survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        del ring.running[pid]
        with SQLiteBackend(path, events=True) as backend:
            backend.enqueue(new("f"))
        ring.check(is_whole(path), "corrupt", f"opening, statement {deadly}")
        if survived:
            break
        ring.count("kills")


def die_while_opening(_ring: Ring, path: str, deadly: int) -> None:
    Mortal.count_down(deadly)
    with SQLiteBackend(path, events=True) as backend:
        backend.queue.count_tasks()


class Mortal(sqlite3.Connection):
    """A connection whose process ends before the n-th statement."""

    left = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_trace_callback(self._count)

    @classmethod
    def count_down(cls, number: int) -> type[Mortal]:
        cls.left = number
        replace_connections(cls)
        return cls

    @staticmethod
    def _count(_sql: str) -> None:
        Mortal.left -= 1
        if Mortal.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def replace_connections(cls: type[sqlite3.Connection]) -> None:
    """Let the module open connections of this class, in this process."""

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return sqlite3.connect(*args, factory=cls, **options)

    omniq_sqlite._connection_factory = connect


@attack(seconds=20)
def tear(ring: Ring) -> None:
    """End the process in the middle of a commit, at each of its writes to the WAL.

    A limit on the size of files lets a write stop short, and the next one kill.
    """
    ring.play(stage)
    for name in CALLS:
        before = contents(set_stage(ring))
        outcomes = []
        for frame, part in itertools.product(range(100), (1, 24, 2_000)):
            path = set_stage(ring)
            pid = ring.start(write_short, name, frame * WAL_FRAME + part)
            survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            del ring.running[pid]
            told = f"{name}, torn {part} bytes into frame {frame}"
            ring.check(is_whole(path), "corrupt", told)
            outcomes.append((told, contents(path)))
            if survived:
                break
            ring.count("kills")
        after = outcomes[-1][1]
        for told, outcome in outcomes:
            whole = name in IN_STEPS or outcome in (before, after)
            ring.check(whole, "lost", f"{told}: half done")


WAL_FRAME = 24 + 4096
"""Bytes that a page takes in the WAL: a header and its content."""


def write_short(ring: Ring, name: str, room: int) -> None:
    import resource

    backend = open_stage(str(ring.folder / "stage.db"), Form("blocking"))
    while wal_size(backend.path) * 2**20 < 40_000:  # more than the `-shm` file has
        backend.queue.pause("again")
        backend.queue.resume("again")
    limit = int(wal_size(backend.path) * 2**20) + room
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    CALLS[name](backend, claimed(ring))


# =============================================================================
# Attack 2: SIGSTOP
# =============================================================================


@attack(seconds=15)
def stop(ring: Ring) -> None:
    """Stop whoever holds the lock, works beyond a lease, or waits."""
    ring.play(prepare)
    while time.monotonic() < ring.until - ring.seconds / 2:
        ring.random.choice([stop_holder, stop_worker, stop_waiter])(ring)
    members = [ring.start(*part) for part in CAST]
    while ring.is_open():
        pid = ring.random.choice(members)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(ring.random.choice([0.001, 0.01, 0.1, 0.7]))
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.005)
        ring.count("stops")
    ring.finish()
    judge(ring)


def wait_for_stop(pid: int) -> None:
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "it ended before it stopped itself"


def stop_holder(ring: Ring) -> None:
    """Others wait for the lock by name and in time, reads do not wait at all."""
    holder = ring.start(hold, ring.random.randint(2, 5))
    wait_for_stop(holder)
    ring.play(meet_stopped_holder, ring.random.choice(["blocking", "async"]))
    patient = ring.start(wait_for_holder)
    time.sleep(0.2)
    os.kill(holder, signal.SIGCONT)
    ring.wait(holder, GRACE)
    ring.wait(patient, GRACE)
    ring.count("stops")


def hold(ring: Ring, number: int) -> None:
    """Stop before the n-th statement; the first ones are the begin and its pragma."""
    left = 0

    class Stopping(sqlite3.Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.set_trace_callback(self.count)

        def count(self, sql: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    replace_connections(Stopping)
    with SQLiteBackend(ring.path, **ring.options) as backend:
        backend.enqueue(new("warm", queue="warm"))
        left = number
        tasks = [new("f", max_attempts=10**6) for _ in range(3)]
        for task in tasks:
            ring.journal.note("want", task.id)
        for task_id in backend.enqueue_many(tasks):
            ring.journal.note("have", task_id)


def meet_stopped_holder(ring: Ring, form_name: str) -> None:
    form = Form(form_name)

    async def main() -> None:
        backend = form.backend(ring.path, busy_timeout=0.4, **ring.options)
        began = time.monotonic()
        await call(backend.queue.count_tasks)
        ring.check(
            time.monotonic() - began < 5, "hung", "a read beside a stopped holder"
        )
        began = time.monotonic()
        try:
            await call(backend.enqueue, new("never", queue="never"))
            ring.found("doubled", "wrote beside a stopped holder of the write lock")
        except DatabaseBusyError:
            waited = time.monotonic() - began
            ring.check(
                0.3 < waited < 5, "hung", f"busy after {waited} s instead of 0.4"
            )
        await call(backend.close)

    form.run(main())


def wait_for_holder(ring: Ring) -> None:
    with SQLiteBackend(ring.path, **ring.options) as backend:
        task = new("g", max_attempts=10**6)
        ring.journal.note("have", backend.enqueue(task))


ENDS: dict[str, Callable[[Any, Task], Any]] = {
    "complete": lambda b, t: b.queue.complete(t),
    "complete_many": lambda b, t: b.queue.complete_many([t]),
    "fail": lambda b, t: b.queue.fail(t, "late"),
    "release": lambda b, t: b.queue.release(t),
    "extend": lambda b, t: b.queue.extend(t),
    "backend.complete": lambda b, t: b.complete(t, 1, enqueue=[new("never")]),
    "backend.fail": lambda b, t: b.fail(t, ValueError("late")),
}


def stop_worker(ring: Ring) -> None:
    """Wake a worker whose claims were lost: nothing that it does counts."""
    ring.play(give_work)
    zombie = ring.start(be_zombie, ring.random.choice(["blocking", "async"]))
    wait_for_stop(zombie)
    time.sleep(0.25)
    ring.play(take_over, ring.random.random() < 0.3)
    before = contents(ring.path)
    os.kill(zombie, signal.SIGCONT)
    ring.wait(zombie, GRACE)
    ring.check(contents(ring.path) == before, "doubled", "a zombie changed something")
    ring.play(end_rest)
    ring.count("zombies")


def give_work(ring: Ring) -> None:
    with SQLiteBackend(ring.path, **ring.options) as backend:
        backend.enqueue_many([new(name, queue="zombie") for name in ENDS])


def be_zombie(ring: Ring, form_name: str) -> None:
    form = Form(form_name)

    async def main() -> None:
        backend = form.backend(ring.path, **ring.options)
        tasks = await call(backend.queue.dequeue_many, 99, "zombie", lease=0.2)
        os.kill(os.getpid(), signal.SIGSTOP)
        for task in tasks:
            try:
                await call(ENDS[task.func], backend, task)
                ring.found("doubled", f"a zombie's {task.func} was accepted")
            except LeaseLostError:
                pass
        await call(backend.close)

    form.run(main())


def take_over(ring: Ring, complete: bool) -> None:
    with SQLiteBackend(ring.path, **ring.options) as backend:
        tasks = backend.queue.dequeue_many(99, "zombie", lease=3600, worker="heir")
        ring.check(
            len(tasks) == len(ENDS), "stuck", f"{len(tasks)} could be taken over"
        )
        if complete:
            backend.queue.complete_many(tasks)


def end_rest(ring: Ring) -> None:
    with SQLiteBackend(ring.path, **ring.options) as backend:
        backend.queue.purge(queue="zombie", status="running")


def stop_waiter(ring: Ring) -> None:
    """Stop a waiter: it holds nobody up, and wakes when it goes on."""
    waiter = ring.start(wait_for_word, ring.random.choice(["blocking", "async"]))
    time.sleep(ring.random.uniform(0.05, 0.3))
    os.kill(waiter, signal.SIGSTOP)
    ring.play(go_about, ring.random.choice(["blocking", "async"]))
    os.kill(waiter, signal.SIGCONT)
    ring.wait(waiter, 5)
    ring.count("stops")


def wait_for_word(ring: Ring, form_name: str) -> None:
    form = Form(form_name)

    async def main() -> None:
        backend = form.backend(ring.path, **ring.options)
        task = await call(backend.queue.dequeue, "word", timeout=None)
        await call(backend.queue.complete, task)
        await call(backend.close)

    form.run(main())


def go_about(ring: Ring, form_name: str) -> None:
    form = Form(form_name)

    async def main() -> None:
        backend = form.backend(ring.path, **ring.options)
        longest = 0.0
        for _ in range(50):
            began = time.monotonic()
            await call(backend.enqueue, new("f", queue="aside"))
            task = await call(backend.queue.dequeue, "aside")
            await call(backend.queue.complete, task)
            longest = max(longest, time.monotonic() - began)
        ring.check(longest < 5, "hung", f"{longest} s beside a stopped waiter")
        await call(backend.enqueue, new("f", queue="word"))
        await call(backend.close)

    form.run(main())


# =============================================================================
# Attack 3: fork
# =============================================================================


@attack(seconds=12)
def fork(ring: Ring) -> None:
    """Fork at random moments, in every way, with everything open."""
    ring.play(prepare)
    while ring.is_open():
        ring.play(host, seconds=GRACE + 30)
    judge(ring)


def host(ring: Ring) -> None:
    """Open some objects, use them in threads, and fork children that use them."""
    rng = ring.random
    backend = SQLiteBackend(ring.path, **ring.options)
    if rng.random() < 0.8:
        backend.queue.count_tasks()
    ended = threading.Event()
    threads = [
        threading.Thread(target=keep_enqueueing, args=(ring, backend, ended))
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    for thread in threads:
        thread.start()
    if rng.random() < 0.5:
        asyncio.run(fork_in_loop(ring, backend))
    else:
        fork_some(ring, [backend])
    ended.set()
    for thread in threads:
        thread.join(GRACE)
        ring.check(not thread.is_alive(), "hung", "a thread of a process that forked")
    if rng.random() < 0.5:
        backend.close()  # first
    ring.finish()
    backend.close()


async def fork_in_loop(ring: Ring, backend: SQLiteBackend) -> None:
    """Fork inside a running loop, with async objects open beside blocking ones."""
    async with AsyncSQLiteBackend(ring.path, **ring.options) as awaited:
        jobs = [asyncio.ensure_future(put_async(ring, awaited)) for _ in range(3)]
        await asyncio.sleep(ring.random.uniform(0, 0.01))
        fork_some(ring, [backend, awaited])
        await asyncio.gather(*jobs)
        await put_async(ring, awaited)


def fork_some(ring: Ring, inherited: list[Any]) -> None:
    for _ in range(ring.random.randint(1, 4)):
        time.sleep(ring.random.uniform(0, 0.01))
        way = ring.random.choice(["fork", "fork", "fork", "spawn", "forkserver"])
        if way == "fork":
            ring.start(be_child, inherited, ring.random.choice([0, 0, 1]))
        else:
            start_by(ring, way)
        put(ring, inherited[0])
        ring.count("forks")


def start_by(ring: Ring, way: str) -> None:
    import multiprocessing

    context: Any = multiprocessing.get_context(way)
    child = context.Process(target=put_by_path, args=(ring.path, str(ring.folder)))
    child.start()
    if ring.random.random() < 0.5:
        put(ring, SQLiteBackend(ring.path, **ring.options))
    child.join(GRACE)
    ring.check(child.exitcode == 0, "hung", f"{way}: exit status {child.exitcode}")


def put_by_path(path: str, folder: str) -> None:
    journal = Journal(Path(folder) / "journal")
    with SQLiteBackend(path, events=True) as backend:
        for _ in range(3):
            journal.note("have", backend.enqueue(new("f", max_attempts=10**6)))


def put(ring: Ring, backend: Any) -> None:
    task = new("f", max_attempts=10**6)
    ring.journal.note("want", task.id)
    backend.enqueue(task)
    ring.journal.note("have", task.id)


async def put_async(ring: Ring, backend: AsyncSQLiteBackend) -> None:
    for _ in range(5):
        task = new("f", max_attempts=10**6)
        ring.journal.note("want", task.id)
        await backend.enqueue(task)
        ring.journal.note("have", task.id)


def keep_enqueueing(ring: Ring, backend: Any, ended: threading.Event) -> None:
    try:
        while not ended.is_set():
            put(ring, backend)
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        ring.caught(error)


def be_child(ring: Ring, inherited: list[Any], generations: int) -> None:
    """Use what the parent had open, or an object of its own; leave it open, too."""
    if generations:
        ring.start(be_child, inherited, generations - 1)
    backend = inherited[0]
    if ring.random.random() < 0.3:
        backend = SQLiteBackend(ring.path, **ring.options)
    for _ in range(ring.random.randint(1, 20)):
        put(ring, backend)
    if len(inherited) > 1 and ring.random.random() < 0.7:
        in_thread_of_its_own(ring, inherited[1])
    ring.finish()
    if ring.random.random() < 0.5:
        backend.close()


def in_thread_of_its_own(ring: Ring, awaited: AsyncSQLiteBackend) -> None:
    """Use an async object; the copy of the parent's loop counts as running here."""
    thread = threading.Thread(target=lambda: asyncio.run(put_async(ring, awaited)))
    thread.start()
    thread.join(GRACE)
    ring.check(not thread.is_alive(), "hung", "an async object in a forked child")


# =============================================================================
# Attack 4: faults of the file
# =============================================================================

FAULTS: dict[str, tuple[int, type[OmniQError]]] = {
    "IOERR": (sqlite3.SQLITE_IOERR, omniq_sqlite.DatabaseAccessError),
    "FULL": (sqlite3.SQLITE_FULL, omniq_sqlite.DatabaseFullError),
    "BUSY": (sqlite3.SQLITE_BUSY, DatabaseBusyError),
    "LOCKED": (sqlite3.SQLITE_LOCKED, DatabaseBusyError),
    "INTERRUPT": (sqlite3.SQLITE_INTERRUPT, OmniQError),
}


class Fault:
    """What happens at which execute or fetch; shared by all connections."""

    left = 0
    code = 0
    ends_transaction = False

    @classmethod
    def arm(cls, number: int, code: int, *, ends_transaction: bool) -> None:
        cls.left, cls.code, cls.ends_transaction = number, code, ends_transaction

    @classmethod
    def strike(cls, connection: sqlite3.Connection) -> None:
        cls.left -= 1
        if cls.left != 0:
            return
        if cls.ends_transaction and connection.in_transaction:
            connection.rollback()
        error = sqlite3.OperationalError("a fault")
        error.sqlite_errorcode = cls.code
        raise error


class FaultyCursor(sqlite3.Cursor):
    def execute(self, sql: str, *args: Any) -> Any:
        Fault.strike(self.connection)
        return super().execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> Any:
        Fault.strike(self.connection)
        return super().executemany(sql, *args)

    def fetchall(self) -> list[Any]:
        rows = super().fetchall()  # an error of SQLite's ends the statement, too
        Fault.strike(self.connection)
        return rows


class Faulty(sqlite3.Connection):
    def cursor(self, *_: Any, **__: Any) -> Any:
        return super().cursor(FaultyCursor)

    def execute(self, sql: str, *args: Any) -> Any:
        return self.cursor().execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> Any:
        return self.cursor().executemany(sql, *args)


@attack(seconds=30)
def fault(ring: Ring) -> None:
    """Let the n-th statement of each public call fail, for all n."""
    ring.play(stage)
    reference = after_each(ring)
    pairs = list(itertools.product(("blocking", "async"), FAULTS))
    for form_name, code in ring.random.sample(pairs, len(pairs)):
        ring.play(inject, form_name, code, reference)


def inject(
    ring: Ring, form_name: str, code: str, reference: dict[str, Contents]
) -> None:
    form = Form(form_name)
    replace_connections(Faulty)

    async def main() -> None:
        for name in CALLS:
            for number in range(1, 300):
                path = set_stage(ring)
                told = f"{form_name} {name} with {code} at {number}"
                struck = await inject_one(ring, form, name, code, number)
                ring.check(is_whole(path), "corrupt", told)
                if name not in IN_STEPS:
                    same = contents(path) == reference[name]
                    ring.check(same, "lost", f"{told}: not what it is without faults")
                if not struck:
                    break
                ring.count("faults")

    form.run(main())


async def inject_one(ring: Ring, form: Form, name: str, code: str, number: int) -> bool:
    """Call with a fault, then without one on the same object; tell if it struck."""
    told = f"{name} with {code} at {number}"
    path, (sqlite_code, kind) = str(ring.folder / "stage.db"), FAULTS[code]
    backend = open_stage(path, form)
    await call(backend.queue.count_tasks)
    before = contents(path)
    Fault.arm(number, sqlite_code, ends_transaction=ring.random.random() < 0.5)
    failed = True
    try:
        await call(CALLS[name], backend, claimed(ring))
        failed = False  # there was none, or it was tried again in silence
    except kind:
        pass
    except Exception as error:  # noqa: BLE001 (of another name)
        own = name == "enqueue_on" and isinstance(error, sqlite3.Error)
        ring.check(own, "surfaced", f"{told}: {error!r}")
    struck = Fault.left <= 0
    Fault.arm(0, 0, ends_transaction=False)
    if failed:
        whole = name in IN_STEPS or contents(path) == before
        ring.check(whole, "lost", f"{told}: half done")
        await call(CALLS[name], backend, claimed(ring))
    await call(backend.close)
    return struck


# -- Damage and obstacles --


@attack(seconds=15)
def damage(ring: Ring) -> None:
    """Damage the file in all ways; only errors of ours may come of it."""
    ring.play(stage)
    while ring.is_open():
        way = ring.random.choice(list(DAMAGES))
        seed = ring.random.random()
        path = set_stage(ring)
        if way == "WAL":
            ring.play(leave_wal, path)
        DAMAGES[way](path, random.Random(seed))
        ring.play(use_all, path, way, seconds=60)
        ring.count("damages")


def leave_wal(_ring: Ring, path: str) -> None:
    """Commit something that stays in the WAL, as a crash leaves it."""
    backend = open_stage(path, Form("blocking"))
    backend.enqueue_many([new("f", ("x" * 2_000,)) for _ in range(20)])
    os._exit(0)


def overwrite(path: str, rng: random.Random) -> None:
    size = os.stat(path).st_size
    with open(path, "r+b") as file:
        for _ in range(rng.choice([1, 10, 200])):
            file.seek(rng.randrange(size))
            file.write(rng.randbytes(rng.choice([1, 4, 100])))


def truncate(path: str, rng: random.Random) -> None:
    os.truncate(path, rng.choice([rng.randrange(os.stat(path).st_size), 4096, 100]))


def encrypt(path: str, rng: random.Random) -> None:
    Path(path).write_bytes(rng.randbytes(os.stat(path).st_size))


def leave_journal(path: str, rng: random.Random) -> None:
    """Put a rollback journal of another file beside it; SQLite ignores or plays it."""
    Path(path + "-journal").write_bytes(
        b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + rng.randbytes(5_000)
    )


def damage_wal(path: str, rng: random.Random) -> None:
    overwrite(path + "-wal", rng)
    if rng.random() < 0.5:
        Path(path + "-shm").unlink(missing_ok=True)


DAMAGES: dict[str, Callable[[str, random.Random], None]] = {
    "bytes": overwrite,
    "length": truncate,
    "encryption": encrypt,
    "journal": leave_journal,
    "WAL": damage_wal,
}


def use_all(ring: Ring, path: str, way: str) -> None:
    """Make each call; it ends in time, with its result or an error of ours."""
    backend = SQLiteBackend(path, events=True, busy_timeout=1.0, clock=lambda: NOW)
    for name in ring.random.sample(list(CALLS), len(CALLS)):
        if name == "enqueue_on":
            continue  # the connection is the caller's, and so are its errors
        with contextlib.suppress(OmniQError, TimeoutError):
            CALLS[name](backend, claimed(ring))
    with contextlib.suppress(OmniQError):
        worker = Worker(backend, registry, queues=["default", "held"], grace=0.5)
        worker.run(max_tasks=2, until_empty=True, signals=False)
    backend.close()
    for suffix in ("-journal", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)


@attack(seconds=15)
def full(ring: Ring) -> None:
    """Fill a small disk, or a quota, and free it while everybody goes on."""
    small = ring.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(small)]
    ring.play(run_into_quota, seconds=60)
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        print("          (a small disk cannot be mounted here)")
        return
    try:
        ring.path = str(small / "jobs.db")
        while ring.is_open():
            ring.play(run_into_full_disk, small, seconds=60)
        judge(ring)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def run_into_full_disk(ring: Ring, folder: Path) -> None:
    form = Form(ring.random.choice(["blocking", "async"]))

    async def main() -> None:
        backend = form.backend(ring.path, synchronous="OFF")
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        await call(backend.queue.count_tasks)
        fill(ballast)
        for _ in range(5):
            await enqueue_large(ring, backend)
        await call(backend.queue.count_tasks)
        ballast.unlink()
        ring.check(
            await enqueue_large(ring, backend), "stuck", "the disk is free again"
        )
        for task in await call(backend.queue.dequeue_many, 1_000):
            ring.journal.note("end", task.id, task.claims)
            await call(backend.queue.complete, task)
            ring.journal.note("done", task.id, task.claims)
        await call(backend.cleanup)
        await call(backend.close)

    form.run(main())


def fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


async def enqueue_large(ring: Ring, backend: Any) -> bool:
    """Enqueue some tasks; tell whether there was room."""
    tasks = [new("f", ("x" * 30_000,), max_attempts=10**6) for _ in range(3)]
    for task in tasks:
        ring.journal.note("want", task.id)
    try:
        for task_id in await call(backend.enqueue_many, tasks):
            ring.journal.note("have", task_id)
    except omniq_sqlite.DatabaseFullError:
        ring.count("full")
        return False
    return True


def run_into_quota(ring: Ring) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    backend = SQLiteBackend(ring.path, synchronous="OFF")
    backend.enqueue(new("f"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, -1))
    for _ in range(20):
        try:
            put_large(ring, backend)
        except omniq_sqlite.DatabaseFullError:
            ring.count("full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    put_large(ring, backend)
    backend.close()
    ring.check(is_whole(ring.path), "corrupt", "after a quota")


def put_large(ring: Ring, backend: Any) -> None:
    task_id = backend.enqueue(new("f", ("x" * 50_000,)))
    there = backend.queue.get_task(task_id) is not None
    ring.check(there, "lost", "acknowledged under a quota")


# =============================================================================
# Attack 5: fairness
# =============================================================================


@attack(seconds=70)
def fairness(ring: Ring) -> None:
    """Let many commit as fast as they can, and compare the slowest with the fastest.

    And all with one process alone just before; where both twins run, with the mean
    of one of each.
    """
    ring.play(prepare)
    fields = {
        "16 processes": [("blocking", 1)] * 16,
        "4 processes of 4 threads": [("blocking", 4)] * 4,
        "16 processes of both twins": [("blocking", 1), ("async", 1)] * 8,
    }
    for name, field in fields.items():
        forms = dict.fromkeys(form_name for form_name, _ in field)
        alone = [sum(race(ring, [(form_name, 1)]).commits) for form_name in forms]
        finish = race(ring, field)
        ratio = min(finish.commits) / max(finish.commits)
        share = sum(finish.commits) / statistics.mean(alone)
        told = (
            f"{name}: slowest/fastest {ratio:.2f}, longest wait {finish.longest:.3f} s,"
        )
        told += f" total {share:.2f} of one alone"
        print(f"          {told}")
        fair = ratio >= 0.5 and finish.longest <= 0.5 and share >= 0.7
        ring.check(fair, "surfaced", told)
    race_beside_bulk(ring)


class Finish:
    def __init__(self, lines: list[list[str]]) -> None:
        self.commits = [int(words[1]) for words in lines]
        self.longest = max(float(words[2]) for words in lines)


def race(ring: Ring, field: list[tuple[str, int]], seconds: float = 5.0) -> Finish:
    book = Journal(ring.folder / f"race {time.monotonic()}")
    start = time.monotonic() + 1 + 0.1 * len(field)
    for form_name, threads in field:
        ring.start(run_race, book, form_name, threads, start, seconds)
    ring.until = start + seconds
    ring.finish()
    return Finish(list(book.lines()))


def run_race(
    ring: Ring,
    book: Journal,
    form_name: str,
    threads: int,
    start: float,
    seconds: float,
) -> None:
    form = Form(form_name)
    backend = form.backend(ring.path)

    async def main() -> None:
        await call(backend.queue.count_tasks)
        await form.sleep(max(0.0, start - time.monotonic()))
        await compete(book, backend, start + seconds)
        if form.is_async:
            await backend.close()

    others = [threading.Thread(target=lambda: form.run(main())) for _ in range(threads)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()


async def compete(book: Journal, backend: Any, end: float) -> None:
    count, longest = 0, 0.0
    while (began := time.monotonic()) < end:
        await call(backend.enqueue, new("f"))
        longest = max(longest, time.monotonic() - began)
        count += 1
    book.note("ran", count, longest, type(backend).__name__)


def race_beside_bulk(ring: Ring) -> None:
    """Commit little beside bulk transactions: one is waited for, never two."""
    start = time.monotonic() + 2
    bulk = Journal(ring.folder / "bulk")
    small = Journal(ring.folder / "small")
    ring.start(write_bulk, bulk, start, 10.0)
    for _ in range(8):
        ring.start(run_race, small, "blocking", 1, start, 10.0)
    ring.until = start + 10
    ring.finish()
    longest = max(float(words[1]) for words in bulk.lines())
    waited = Finish(list(small.lines())).longest
    told = f"beside transactions of {longest:.2f} s small ones waited {waited:.2f} s"
    print(f"          {told}")
    ring.check(waited <= 2 * longest, "surfaced", told)


def write_bulk(ring: Ring, book: Journal, start: float, seconds: float) -> None:
    with SQLiteBackend(ring.path) as backend:
        backend.queue.count_tasks()
        time.sleep(max(0.0, start - time.monotonic()))
        while time.monotonic() < start + seconds:
            tasks = [new("f", queue="bulk") for _ in range(50_000)]
            began = time.monotonic()
            backend.enqueue_many(tasks)
            book.note("bulk", time.monotonic() - began)


# =============================================================================
# Attack 6: cancellation and interrupts
# =============================================================================


@attack(seconds=40)
def cancel(ring: Ring) -> None:
    """Cancel each public coroutine at each of its awaits; interrupt blocking calls."""
    ring.play(stage)
    reference = after_each(ring)
    ring.play(cancel_everywhere, reference)
    ring.play(time_out_everything)
    ring.play(abandon)
    ring.play(prepare)
    ring.play(interrupt, max(5.0, ring.until - time.monotonic()))


class Cancelled:
    """Await a coroutine and cancel it at its n-th suspension.

    `late`: after what it waited for has come, before it could go on.
    """

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], n: int, *, late: bool
    ) -> None:
        self.coroutine = coroutine
        self.n = n
        self.late = late
        self.suspensions = 0

    def __await__(self) -> Any:
        while True:
            try:
                future = self.coroutine.send(None)
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            if self.suspensions == self.n and not self.late:
                future.cancel()
                return self.coroutine.throw(asyncio.CancelledError())
            yield future
            if self.suspensions == self.n:
                return self.coroutine.throw(asyncio.CancelledError())


def cancel_everywhere(ring: Ring, reference: dict[str, Contents]) -> None:
    async def main() -> None:
        for name, late in itertools.product(CALLS, (False, True)):
            if name == "enqueue_on":
                continue  # it awaits nothing of ours
            for n in range(1, 100):
                if not await cancel_at(ring, name, n, reference, late=late):
                    break
                ring.count("cancels")

    asyncio.run(main())


async def cancel_at(
    ring: Ring, name: str, n: int, reference: dict[str, Contents], *, late: bool
) -> bool:
    """Cancel a call at its n-th suspension; `False` if it has none any more."""
    path = set_stage(ring)
    before = contents(path)
    told = f"{name}, cancelled at await {n}{', late' if late else ''}"
    async with open_stage(path, Form("async")) as backend:
        step = Cancelled(CALLS[name](backend, claimed(ring)), n, late=late)
        hit = False
        try:
            await asyncio.wait_for(waiting_for(step), GRACE)
        except asyncio.CancelledError:
            hit = True
        except TimeoutError:
            ring.found("hung", told)
        await backend.enqueue(new("afterwards", queue="afterwards"))
        ring.check(
            await backend.queue.purge(status="pending", queue="afterwards") == 1,
            "stuck",
            told,
        )
    after = contents(path)
    if not hit:
        return step.suspensions >= n
    if "dequeue" in name:
        ring.check(owners(after) == owners(before), "stuck", f"{told}: claim stranded")
    elif name not in IN_STEPS:
        plain = (without_events(c) for c in (before, reference[name]))
        ring.check(without_events(after) in plain, "lost", f"{told}: half done")
    return True


async def waiting_for(step: Cancelled) -> Any:
    return await step


def without_events(found: Contents) -> Contents:
    return {sql: rows for sql, rows in found.items() if "omniq_event" not in sql}


def owners(found: Contents) -> list[Any]:
    """Return what is claimed or not, without how often it was claimed."""
    rows = found[CONTENTS[0]].elements()
    return sorted((row[0], row[2] == "running", row[3]) for row in rows)


def time_out_everything(ring: Ring) -> None:
    """Let every call run into a timeout at random moments, many at once."""

    async def attempt(backend: Any, name: str) -> None:
        with contextlib.suppress(
            TimeoutError,
            LeaseLostError,
            omniq_sqlite.DuplicateTaskError,
            omniq_sqlite.TaskNotFoundError,  # of one that another attempt deleted
        ):
            async with asyncio.timeout(ring.random.uniform(0, 0.004)):
                await CALLS[name](backend, claimed(ring))

    async def main() -> None:
        names = [name for name in CALLS if name != "enqueue_on"]
        for _ in range(20):
            path = set_stage(ring)
            async with open_stage(path, Form("async")) as backend:
                chosen = ring.random.choices(names, k=60)
                await asyncio.gather(*(attempt(backend, name) for name in chosen))
                ring.count("timeouts", len(chosen))
                await backend.queue.purge(queue="mine")
                await backend.enqueue(new("afterwards", queue="afterwards"))
                task = await asyncio.wait_for(
                    backend.queue.dequeue("afterwards"), GRACE
                )
                ring.check(task is not None, "stuck", "after timeouts")
            ring.check(is_whole(path), "corrupt", "after timeouts")

    asyncio.run(main())


def abandon(ring: Ring) -> None:
    """Leave followers, waits and task groups half-way."""

    async def follow(backend: Any) -> None:
        follower = backend.events.follow(after="0")
        async for _ in follower:
            if ring.random.random() < 0.3:
                break
        if ring.random.random() < 0.5:
            await follower.aclose()

    async def fail_beside(backend: Any) -> None:
        async def fail() -> None:
            await asyncio.sleep(ring.random.uniform(0, 0.003))
            raise ZeroDivisionError

        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(backend.queue.dequeue("never", timeout=None))
                group.create_task(
                    backend.queue.dequeue("given", timeout=None, lease=3600)
                )
                group.create_task(fail())

    async def main() -> None:
        path = set_stage(ring)
        async with open_stage(path, Form("async")) as backend:
            for _ in range(100):
                await backend.enqueue(new("f", queue="given", max_attempts=10**6))
                await asyncio.gather(follow(backend), fail_beside(backend))
                ring.count("abandoned")
            await backend.queue.count_tasks()
            await asyncio.sleep(0.1)
            left = await backend.queue.count_tasks(queue="given", status="running")
            # A task group may fail after its dequeue has ended: that claim is its own.
            ring.check(left < 100, "stuck", f"{left} claims stranded")

    asyncio.run(main())


def interrupt(ring: Ring, seconds: float) -> None:
    """Send SIGINT every 0.3 to 5 ms into blocking calls beside busy threads."""
    backend = SQLiteBackend(ring.path, synchronous="NORMAL")
    ended, beats = threading.Event(), [0] * 4

    def hammer(number: int) -> None:
        try:
            while not ended.is_set():
                backend.enqueue(new("noise", queue="noise"))
                task = backend.queue.dequeue("noise")
                if task is not None:
                    backend.queue.complete(task)
                beats[number] += 1
        except BaseException as error:  # noqa: BLE001 (that is what is looked for)
            ring.caught(error)

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    killer = ring.start(send_interrupts, os.getpid(), end)
    hand: list[Task] = []
    while time.monotonic() < end + 1:
        with contextlib.suppress(KeyboardInterrupt):
            work_interrupted(backend, hand, end)
            break
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ring.wait(killer, GRACE)
    for task in hand:
        with contextlib.suppress(LeaseLostError):
            backend.queue.release(task)
    before = list(beats)
    time.sleep(0.3)
    ring.check(
        all(b > a for a, b in zip(before, beats, strict=True)), "hung", f"{beats}"
    )
    ended.set()
    for thread in threads:
        thread.join(GRACE)
        ring.check(not thread.is_alive(), "hung", "a thread beside interrupts")
    running = backend.queue.count_tasks(queue="default", status="running")
    ring.check(running == 0, "stuck", f"{running} claims were stranded")
    backend.close()


def send_interrupts(ring: Ring, pid: int, end: float) -> None:
    while time.monotonic() < end - 1:
        os.kill(pid, signal.SIGINT)
        ring.count("interrupts")
        time.sleep(ring.random.uniform(0.0003, 0.005))


def work_interrupted(backend: SQLiteBackend, hand: list[Task], end: float) -> None:
    """Enqueue, claim and complete; an interrupt may come at any place.

    `hand` holds the task that is claimed. That nothing comes between the claim and
    the list is the doing of one line: the call and the store are both in C.
    """
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                if not hand:
                    backend.enqueue(new("f", max_attempts=10**6))
                    hand.extend(backend.queue.dequeue_many(1, lease=3600))
                else:
                    backend.queue.complete(hand[0])
                    hand.clear()
        except KeyboardInterrupt:
            pass
        except LeaseLostError:
            hand.clear()  # an interrupt came after it was completed


# =============================================================================
# Attack 7: the WAL-reset bug
# =============================================================================


@attack(seconds=30)
def wal(ring: Ring) -> None:
    """Let six writers meet the checkpoints, stopped at random to widen windows."""
    ring.play(prepare)
    writers = [ring.start(write, 0.0) for _ in range(6)]
    ring.start(open_and_close)
    reader = ring.start(hold_snapshot, ring.until - 20, 10.0)
    writers = [pid for pid in writers if pid != reader]
    sizes: list[float] = []
    while ring.is_open():
        pid = ring.random.choice(writers)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(ring.random.uniform(0.0005, 0.02))
        os.kill(pid, signal.SIGCONT)
        time.sleep(ring.random.uniform(0.0, 0.1))
        sizes.append(wal_size(ring.path))
    ring.finish()
    ring.count("stops", len(sizes))
    ring.count("MiB of WAL at most", int(max(sizes)))
    ring.count("MiB of WAL at last", int(sizes[-1]))
    ring.check(max(sizes) < 61, "surfaced", f"the WAL had {max(sizes):.0f} MiB")
    ring.check(sizes[-1] < 32, "surfaced", f"the WAL has {sizes[-1]:.0f} MiB")
    judge_counts(ring)


def wal_size(path: str) -> float:
    try:
        return os.stat(path + "-wal").st_size / 2**20
    except OSError:
        return 0.0


def write(ring: Ring, pause: float) -> None:
    with SQLiteBackend(ring.path) as backend:
        while ring.is_open():
            put(ring, backend)
            time.sleep(pause)


def open_and_close(ring: Ring) -> None:
    while ring.is_open():
        with SQLiteBackend(ring.path) as backend:
            put(ring, backend)


def hold_snapshot(ring: Ring, start: float, seconds: float) -> None:
    time.sleep(max(0.0, start - time.monotonic()))
    connection = sqlite3.connect(ring.path, isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM omniq_task").fetchall()
    time.sleep(seconds)
    connection.close()


def judge_counts(ring: Ring) -> None:
    """Compare what was acknowledged with what is there; nothing was worked."""
    ring.check(is_whole(ring.path), "corrupt", "integrity_check")
    lost = read_journal(ring).have - live_ids(ring.path)
    ring.check(not lost, "lost", f"{len(lost)} tasks")
    ring.count("tasks", len(read_journal(ring).have))


# =============================================================================
# Attack 8: clocks
# =============================================================================


@attack(seconds=12)
def clock(ring: Ring) -> None:
    """Let each process's clock step an hour back and forth, all the time."""
    ring.play(prepare)
    ring.play(look_at_times)
    for part in CLOCK_CAST:
        ring.start(*part)
    ring.finish()
    judge(ring, clock=in_two_hours)


def in_two_hours() -> float:
    return time.time() + 7200


class Unsteady:
    """A time of day that steps by an hour now and then."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng
        self.offset = 0.0

    def __call__(self) -> float:
        if self.random.random() < 0.02:
            self.offset = self.random.choice([-3600.0, 0.0, 3600.0])
        return time.time() + self.offset


def unsteadily(ring: Ring, role: Callable[..., None], form_name: str) -> None:
    ring.options |= {"clock": Unsteady(ring.random)}
    role(ring, form_name)


CLOCK_CAST: list[tuple[Any, ...]] = [
    (unsteadily, role, form_name)
    for role in (produce, consume)
    for form_name in ("blocking", "async")
]


def look_at_times(ring: Ring) -> None:
    """Step a clock by hand: waits do not care, leases and delays follow it."""
    now = [NOW]
    path = str(ring.folder / "times.db")
    with SQLiteBackend(path, clock=lambda: now[0]) as backend:
        queue = backend.queue
        for step in (-3600, 3600):
            now[0] += step
            began = time.monotonic()
            assert queue.dequeue(timeout=0.2) is None
            waited = time.monotonic() - began
            ring.check(0.15 < waited < 5, "hung", f"a wait of 0.2 s took {waited} s")
        backend.enqueue(new("f"), delay=60)
        ring.check(queue.dequeue() is None, "doubled", "claimed before its time")
        now[0] += 3600
        first = claim_for(queue, 60)
        now[0] -= 3600
        ring.check(
            queue.dequeue() is None, "doubled", "handed out twice by a step back"
        )
        queue.extend(first, 60)
        ring.check(queue.dequeue() is None, "doubled", "handed out twice by an extend")
        now[0] += 3600
        second = claim_for(queue, 60)
        try:
            queue.complete(first)
            ring.found("doubled", "a stale claim was completed")
        except LeaseLostError:
            queue.complete(second)
    ids = [Task("f").id for _ in range(1_000)]
    ring.check(ids == sorted(ids), "surfaced", "ids of a process descend")


def claim_for(queue: Any, lease: float) -> Task:
    task = queue.dequeue(lease=lease)
    assert isinstance(task, Task), "nothing to claim"
    return task


# =============================================================================
# Attack 9: a file that somebody else has written
# =============================================================================


@attack(seconds=15)
def hostile(ring: Ring) -> None:
    """Put what nobody expects into the tables, and let everybody read it."""
    ring.play(stage)
    marker = ring.folder / "ran"
    while ring.is_open():
        path = set_stage(ring)
        ring.play(poison, path, str(marker))
        ring.play(use_all, path, "poison", seconds=60)
        ring.play(command_line, path, seconds=60)
        ring.check(not marker.exists(), "surfaced", "code of a hostile file was run")
        ring.count("poisons")


POISONS = (
    "NULL 1 -1 0 1.5 1e308 -1e308 9e999 '' 'x' '[' '{' '[]' '{}' 'null' '1' '\"x\"'"
    " x'00ff' x'' 9223372036854775807 -9223372036854775808 char(0) 'a'||char(0)||'b'"
    " cast(x'ff' AS TEXT) cast(x'eda080' AS TEXT) zeroblob(1000)"
    " '{\"$datetime\":\"x\"}' '{\"$path\":1}' '{\"$dict\":1}' '[1e999]' '[NaN]'"
    " '{\"$timedelta\":[1e308,0,0]}' '{\"$tuple\":3}' '{\"$set\":[[1]]}'"
    " 'os.system' '__import__(\"os\")' 'no such status' '../../etc/passwd'"
).split() + [f"replace(hex(zeroblob({n})),'0','[')" for n in (500, 100_000)]


def poison(ring: Ring, path: str, marker: str) -> None:
    """Change random values, and in a lax copy of the tables also their types."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    if ring.random.random() < 0.5:
        make_lax(connection)
    tables = (
        "omniq_task",
        "omniq_result",
        "omniq_event",
        "omniq_worker",
        "omniq_schema",
    )
    for _ in range(ring.random.choice([1, 3, 30])):
        table = ring.random.choice(
            tables[:4] if ring.random.random() < 0.95 else tables
        )
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        column, value = ring.random.choice(columns), ring.random.choice(POISONS)
        with contextlib.suppress(sqlite3.Error):
            connection.execute(f"UPDATE {table} SET {column} = {value}")
    add_traps(connection, marker)
    connection.close()


def make_lax(connection: sqlite3.Connection) -> None:
    """Take STRICT, NOT NULL and CHECKs away, as another program might write it."""
    connection.execute("PRAGMA writable_schema = ON")
    for kind in ("TEXT", "INTEGER", "REAL"):
        connection.execute(
            f"UPDATE sqlite_schema SET sql = replace(sql, '{kind} NOT NULL', '')"
            " WHERE type = 'table' AND name LIKE 'omniq%'"
        )
    connection.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, ') STRICT', ')')"
        " WHERE type = 'table' AND name LIKE 'omniq%'"
    )
    connection.execute("PRAGMA writable_schema = RESET")


def add_traps(connection: sqlite3.Connection, marker: str) -> None:
    for kind in ("INSERT", "UPDATE", "DELETE"):
        connection.execute(
            f"CREATE TRIGGER trap_{kind} AFTER {kind} ON omniq_task BEGIN"
            f" SELECT load_extension('{marker}'); END"
            if kind == "INSERT"
            else f"CREATE TRIGGER trap_{kind} AFTER {kind} ON omniq_pause BEGIN"
            " SELECT writefile('x', 'y'); END"
        )


def command_line(ring: Ring, path: str) -> None:
    """Let the commands show it; they end with a status and no traceback."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    for command in ("stats", "list", "show", "events"):
        words = [command, path, *(["x"] if command == "show" else [])]
        for more in ([], ["--json"]):
            status = omniq_sqlite.main([*words, *more])
            ring.check(status in (0, 1, 2), "surfaced", f"{words}: status {status}")


# =============================================================================
# Attack 10: a long time
# =============================================================================


@attack(seconds=40)
def soak(ring: Ring) -> None:
    """Run eight processes, kill half of them, and watch what the others take.

    A worker, a producer and two consumers live through it; memory, descriptors
    and threads of these, the WAL and the database have to stay as they are.
    """
    ring.options |= {"result_ttl": 20.0, "event_retention": 20.0}
    ring.play(prepare)
    elders = {
        "producer": ring.start(produce, "blocking", 500, 0.02),
        "async consumer": ring.start(consume, "async"),
        "consumer": ring.start(consume, "blocking"),
        "worker": ring.start(crew),
        "upkeep": ring.start(maintain),
    }
    parts: list[tuple[Any, ...]] = [
        (produce, "async", 500, 0.2),
        (consume, "async"),
        (consume, "blocking"),
    ]
    mortals = [ring.start(*part) for part in parts]
    series: dict[str, list[float]] = defaultdict(list)
    while ring.is_open():
        limit = time.monotonic() + ring.seconds / 200
        while time.monotonic() < limit:
            time.sleep(ring.random.uniform(0.2, 1.0))
            number = ring.random.randrange(len(parts))
            ring.kill(mortals[number])
            mortals[number] = ring.start(*parts[number])
            ring.count("kills")
        sample(ring, elders, series)
    ring.finish()
    report(ring, series)
    judge(ring)


def sample(ring: Ring, elders: dict[str, int], series: dict[str, list[float]]) -> None:
    worker = {
        f"worker child {n}": p
        for n, p in enumerate(sorted(children_of(elders["worker"])))
    }
    for name, pid in {**elders, **worker}.items():
        with contextlib.suppress(OSError, KeyError):  # it has ended
            status = Path(f"/proc/{pid}/status").read_text()
            values = dict(line.split(":", 1) for line in status.splitlines())
            series[f"{name}, MiB"].append(int(values["VmRSS"].split()[0]) / 1024)
            series[f"{name}, threads"].append(int(values["Threads"]))
            series[f"{name}, descriptors"].append(len(os.listdir(f"/proc/{pid}/fd")))
    for what, suffix in (("database", ""), ("WAL", "-wal")):
        with contextlib.suppress(OSError):
            series[f"{what}, MiB"].append(os.stat(ring.path + suffix).st_size / 2**20)


def report(ring: Ring, series: dict[str, list[float]]) -> None:
    """Compare the second quarter with the last one; the first is for warming up."""
    for name, values in sorted(series.items()):
        quarter = len(values) // 4
        early, late = values[quarter : 2 * quarter], values[-quarter:]
        if not early:
            continue
        before, after = statistics.median(early), statistics.median(late)
        print(f"          {name}: {before:.1f}, at the end {after:.1f}")
        slack = {"MiB": 0.15 * before + 8, "threads": 2, "descriptors": 4}
        text = f"{name}: grew from {before:.1f} to {after:.1f}"
        ring.check(after - before <= slack[name.rpartition(", ")[2]], "surfaced", text)


# =============================================================================
# The plan
# =============================================================================


def main() -> int:
    names = ", ".join(ATTACKS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minutes", type=float, help="after them no round begins")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=ATTACKS, metavar="ATTACK", help=names)
    parser.add_argument("--round", type=float, metavar="SECONDS", help="of each round")
    terms = parser.parse_args()
    # Forks beside threads are what is tested.
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)
    print(f"seed {terms.seed}, SQLite {sqlite3.sqlite_version}", flush=True)
    totals: Counter[str] = Counter()
    for name, number in plan(terms.only, terms.minutes):
        totals += play_round(name, f"{terms.seed} {name} {number}", terms)
    print(", ".join(f"{kind} {totals[kind]}" for kind in KINDS))
    return int(any(totals[kind] for kind in KINDS))


def plan(only: str | None, minutes: float) -> Iterator[tuple[str, int]]:
    """Yield the attacks in turn until the time is over, at least one."""
    until = time.monotonic() + 60 * minutes
    names = [only] if only else list(ATTACKS)
    for number in itertools.count():
        for name in names:
            yield name, number
            if time.monotonic() >= until:
                return


def play_round(name: str, seed: str, terms: argparse.Namespace) -> Counter[str]:
    """Play one round, say how it went, and return what broke in it."""
    seconds, function = ATTACKS[name]
    if name == "soak" and terms.only:
        seconds = max(seconds, 60 * terms.minutes)
    seconds = terms.round or seconds
    folder = Path(tempfile.mkdtemp(prefix=f"torture-{name}-"))
    ring = Ring(folder, seed, seconds)
    began = time.monotonic()
    try:
        function(ring)
        ring.finish()
    except Exception as error:  # noqa: BLE001 (the other rounds go on)
        ring.caught(error)
    counts = Counter[str]()
    for times, *what in ring.counts.lines():
        counts[" ".join(what)] += int(times)
    broken = Counter(words[0] for words in ring.findings.lines())
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    print(f"{time.monotonic() - began:6.1f} s  {seed}: {told}", flush=True)
    for line in ring.findings.path.read_text().splitlines()[:20]:
        kind, _, text = line.partition(" ")
        print(f"          {kind}: {json.loads(text)}", flush=True)
    if broken:
        print(f"          kept: {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    return broken


if __name__ == "__main__":
    sys.exit(main())
