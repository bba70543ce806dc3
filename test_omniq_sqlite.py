"""The test suite: the contract on both twins, attacks, worker, commands, README."""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import contextvars
import ctypes
import dataclasses
import doctest
import enum
import fcntl
import functools
import gc
import gzip
import hashlib
import html.parser
import http
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import pty
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.parse
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as clock_time
from decimal import Decimal
from functools import partial
from pathlib import Path
from select import select as wait_readable
from typing import Any, ClassVar, NoReturn, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import aiosqlite
import anyio
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import omniq_sqlite
from omniq_sqlite import (
    AsyncSQLiteBackend,
    AsyncSQLiteEventStorage,
    AsyncSQLiteQueue,
    AsyncSQLiteResultStorage,
    AsyncWorker,
    CorruptDatabaseError,
    DatabaseAccessError,
    DatabaseBusyError,
    DatabaseFullError,
    DatabaseReplacedError,
    DuplicateTaskError,
    EventType,
    Finding,
    LeaseLostError,
    NetworkFilesystemError,
    OmniQError,
    QueueStats,
    ReadOnlyDatabaseError,
    Reject,
    ResultStatus,
    Retry,
    SchemaVersionError,
    SerializationError,
    SQLiteBackend,
    SQLiteEventStorage,
    SQLiteQueue,
    SQLiteResultStorage,
    StorageClosedError,
    Task,
    TaskEvent,
    TaskNotFoundError,
    TaskRegistry,
    TaskResult,
    TaskStatus,
    TaskTimeout,
    UnknownTaskError,
    UnsupportedSQLiteError,
    Worker,
    WorkerInfo,
    current_task,
    main,
    progress,
)

pytestmark = pytest.mark.anyio

# A shell that starts something in the background lets it ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run: what fails, fails for everybody. To look for more:
# `HYPOTHESIS_PROFILE=random` and a larger `max_examples`.
settings.register_profile("random", deadline=None, database=None)
settings.register_profile("same", settings.get_profile("random"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

MODULE = Path(omniq_sqlite.__file__)

DEADLINE = 30.0
"""Seconds after which something that should have ended fails its test."""

SOON = 10.0
"""Seconds within which what waits for nothing ends, however busy the machine is."""

NOW = 1_800_000_000.0
"""What the clock of every test says at its start: 2027-01-15 08:00:00 UTC."""

NAIVE = datetime.fromisoformat("2026-01-01T12:00:00")

KINDS = ("Queue", "ResultStorage", "EventStorage", "Backend")


# =============================================================================
# Fixtures
# =============================================================================


def at(seconds: float) -> datetime:
    """Return the instant that many seconds after the start of the test."""
    return datetime(2027, 1, 15, 8, tzinfo=UTC) + timedelta(seconds=seconds)


class Clock:
    """A time of day that moves when a test says so."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


async def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of either twin; a blocking one runs inside the loop."""
    outcome = method(*args, **kwargs)
    return await outcome if inspect.isawaitable(outcome) else outcome


async def aside(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of either twin while the loop goes on, with a deadline."""
    if inspect.iscoroutinefunction(method):
        return await asyncio.wait_for(method(*args, **kwargs), DEADLINE)
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(method(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 -- delivered to who awaits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(future), DEADLINE)


def pickled(thing: Any) -> Any:
    """Return what another process would get."""
    return pickle.loads(pickle.dumps(thing))


def started(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(awaitable)


async def settled_in() -> None:
    """Give what was started aside the time to do something wrong."""
    await asyncio.sleep(0.03)


def database_of(thing: Any) -> Any:
    """Return the connection manager of an object of either form."""
    gateway = getattr(thing, "_gateway", None) or thing._async._gateway
    return gateway.database


async def in_wait(thing: Any, count: int = 1) -> None:
    """Go on once so many calls of this object wait for a commit."""
    bell = database_of(thing).bell
    await soon(lambda: len(bell.waiters) >= count)


class Api:
    """One family of classes, so that a test is written once for both twins."""

    def __init__(self, form: str, folder: Path, clock: Clock) -> None:
        self.is_async = form == "async"
        self.folder = folder
        self.path = folder / "jobs.db"
        self.clock = clock
        self._opened: list[Any] = []

    def get_class(self, kind: str) -> Any:
        prefix = "AsyncSQLite" if self.is_async else "SQLite"
        return getattr(omniq_sqlite, prefix + kind)

    def make(self, kind: str, path: Any = None, **options: Any) -> Any:
        options.setdefault("clock", self.clock)
        made = self.get_class(kind)(self.path if path is None else path, **options)
        self._opened.append(made)
        return made

    def queue(self, path: Any = None, **options: Any) -> Any:
        return self.make("Queue", path, **options)

    def results(self, path: Any = None, **options: Any) -> Any:
        return self.make("ResultStorage", path, **options)

    def events(self, path: Any = None, **options: Any) -> Any:
        return self.make("EventStorage", path, **options)

    def backend(self, path: Any = None, **options: Any) -> Any:
        return self.make("Backend", path, **options)

    def keep(self, made: Any) -> Any:
        """Have `made` closed at the end of the test."""
        self._opened.append(made)
        return made

    async def close(self) -> None:
        for made in reversed(self._opened):
            await call(made.close)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["async", "blocking"])
async def api(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> AsyncIterator[Api]:
    made = Api(request.param, tmp_path, clock)
    yield made
    await made.close()


@pytest.fixture
def queue(api: Api) -> Any:
    return api.queue()


@pytest.fixture
def results(api: Api) -> Any:
    return api.results()


@pytest.fixture
def events(api: Api) -> Any:
    return api.events()


@pytest.fixture
def backend(api: Api) -> Any:
    return api.backend(events=True)


def present(task: Task | None) -> Task:
    """Return a task that is there."""
    assert task is not None
    return task


async def claim(queue: Any, *args: Any, **kwargs: Any) -> Task:
    task = await call(queue.dequeue, *args, **kwargs)
    assert isinstance(task, Task), "there was nothing to claim"
    return task


async def claim_names(queue: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Claim everything that can be claimed; return the functions in order."""
    names = []
    while task := await call(queue.dequeue, *args, **kwargs):
        names.append(task.func)
    return names


async def get(queue: Any, task_id: str) -> Task:
    task = await call(queue.get_task, task_id)
    assert isinstance(task, Task)
    return task


async def get_status(queue: Any, task_id: str) -> str:
    return str((await get(queue, task_id)).status)


async def get_types(events: Any, **filters: Any) -> list[str]:
    return [str(event.type) for event in await call(events.query, **filters)]


async def make_failed(queue: Any, task: Task) -> str:
    task_id: str = await call(queue.enqueue, task)
    await call(queue.fail, await claim(queue, task.queue), "no", retry=False)
    return task_id


async def take(following: Any, number: int) -> list[Any]:
    """Read `number` events of a `follow()` of either twin, with a deadline."""
    if hasattr(following, "__anext__"):

        async def read() -> list[Any]:
            return [await anext(following) for _ in range(number)]

        return await asyncio.wait_for(read(), DEADLINE)
    taken: list[Any] = await aside(lambda: [next(following) for _ in range(number)])
    return taken


async def take_rest(following: Any) -> list[Any]:
    """Read the events of a `follow()` until it ends."""
    if hasattr(following, "__anext__"):
        return [event async for event in following]
    taken: list[Any] = await aside(list, following)
    return taken


async def close_follow(following: Any) -> None:
    await call(following.aclose if hasattr(following, "aclose") else following.close)


@contextlib.contextmanager
def raw(path: Any, **options: Any) -> Iterator[sqlite3.Connection]:
    """Open a plain connection, in autocommit mode unless told otherwise."""
    options.setdefault("isolation_level", None)
    with closing(sqlite3.connect(path, timeout=10, **options)) as connection:
        yield connection


@contextlib.contextmanager
def write_lock(path: Any) -> Iterator[None]:
    """Hold the write lock of the file, as another program would."""
    with raw(path, check_same_thread=False) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def read_rows(path: Any, sql: str) -> list[dict[str, Any]]:
    with raw(path) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(sql)]


def get_names(path: Any) -> set[str]:
    """Return the names of the tables, views and indexes in the file."""
    rows = read_rows(path, "SELECT name FROM sqlite_schema")
    return {row["name"] for row in rows if not row["name"].startswith("sqlite_")}


def refuse_inserts(path: Any, table: str) -> None:
    """Make every later insert into the table fail, whoever does it."""
    with raw(path) as connection:
        connection.execute(
            f"CREATE TRIGGER refused BEFORE INSERT ON {table}"
            " BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
        )


def refuse_ends(path: Any) -> None:
    """Make every later end of a running task fail, whoever does it."""
    with raw(path) as connection:
        connection.execute(
            "CREATE TRIGGER refused_delete BEFORE DELETE ON omniq_task"
            " BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
        )
        connection.execute(
            "CREATE TRIGGER refused_update BEFORE UPDATE ON omniq_task"
            " WHEN new.status <> 'running'"
            " BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
        )


POSIX = pytest.mark.skipif(os.name != "posix", reason="no fork and no signals here")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "jobs.db")


# -- Children --

PRELUDE = """
import asyncio, multiprocessing, os, random, signal, sqlite3, sys, threading, time
import omniq_sqlite
from omniq_sqlite import *
if hasattr(signal, "alarm"):
    signal.alarm({deadline})  # ends a program that hangs; never a faulthandler timer
path, arguments = sys.argv[1], sys.argv[2:]

def fork(function):
    "Run a function in a forked child; return its pid."
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.alarm({deadline})
            function()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid

def join(*pids):
    for pid in pids:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, f"child {{pid}} ended with {{status}}"

def reading(database):
    "Read in a thread until told to end; return the thread and what tells it."
    inside, over = threading.Event(), threading.Event()
    def read(connection):
        inside.set()
        over.wait()
    thread = threading.Thread(target=database.read, args=(read,))
    thread.start()
    inside.wait()
    return thread, over.set

def wait_for_a_fork(database):
    "Return when a fork waits until the connections are at rest."
    while not database.resting:
        time.sleep(0.001)

def lock():
    "Hold the write lock in a process of its own; return what gives it up."
    import subprocess
    holder = subprocess.Popen([sys.executable, "-c", "import sqlite3, sys;"
        "c = sqlite3.connect(sys.argv[1], timeout=9, isolation_level=None);"
        "c.execute('BEGIN IMMEDIATE'); print(flush=True); sys.stdin.read()", path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    def unlock():
        holder.kill()
        holder.communicate()
    return unlock

def rows(sql="SELECT func FROM omniq_task ORDER BY func"):
    "Read in a process of its own: two SQLite handles for a file are one too many."
    command = [sys.executable, "-c", "import sqlite3, sys;"
        "c = sqlite3.connect(sys.argv[1], timeout=9);"
        "assert c.execute('PRAGMA integrity_check').fetchall() == [('ok',)];"
        "print(repr([r[0] for r in c.execute(sys.argv[2])])); c.close()", path, sql]
    import subprocess
    return eval(subprocess.check_output(command, text=True))
"""


def environment() -> dict[str, str]:
    """Return the environment of a child: it finds the module, compiled once for all."""
    found = {"PYTHONPATH": str(MODULE.parent), "PYTHONDONTWRITEBYTECODE": ""}
    return {**os.environ, **found}


def command(code: str, *args: object, deadline: float = DEADLINE) -> list[str]:
    """Return the command of a program; forks beside threads are what is tested."""
    text = PRELUDE.format(deadline=int(deadline)) + textwrap.dedent(code)
    ignored = "ignore:This process:DeprecationWarning"
    flags = ["-W", "error", "-W", ignored, "-c"]
    return [sys.executable, *flags, text, *map(str, args)]


def run_program(code: str, *args: object, deadline: float = DEADLINE) -> str:
    """Run a program to its end, which must be quiet; return what it printed."""
    done = subprocess.run(
        command(code, *args, deadline=deadline),
        capture_output=True,
        text=True,
        timeout=deadline + 10,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.strip()


RunHere = Callable[[str], str]


@pytest.fixture
def run_here(path: str) -> RunHere:
    """Run a program on the file of the test to its end; return what it printed."""
    return lambda code: run_program(code, path)


class Programs:
    """Programs that run beside a test; none survives it."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []

    def start(self, code: str, *args: object) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            command(code, *args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.running.append(program)
        return program

    @staticmethod
    def read(program: subprocess.Popen[str]) -> str:
        """Return the next line that a program prints; it has a deadline itself."""
        assert program.stdout is not None
        return program.stdout.readline().strip()

    @staticmethod
    def go(program: subprocess.Popen[str]) -> None:
        """Let a program go on that reads a line."""
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()

    @staticmethod
    def finish(program: subprocess.Popen[str], status: int = 0) -> str:
        """Wait for the end of a program and return what else it printed."""
        out, err = program.communicate(timeout=DEADLINE)
        assert program.returncode == status, err
        assert status != 0 or err == ""
        return out.strip()

    def end(self) -> None:
        for program in self.running:
            if program.poll() is None:
                program.kill()
            program.communicate()


@pytest.fixture
def programs() -> Iterator[Programs]:
    made = Programs()
    yield made
    made.end()


# -- Looking inside --


def select(path: object, sql: str) -> list[Any]:
    """Return the rows of a query; those of one column as plain values."""
    with raw(path) as connection:
        rows = connection.execute(sql).fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def statuses(path: object) -> list[str]:
    return select(path, "SELECT status FROM omniq_task ORDER BY seq")


def is_whole(path: object) -> bool:
    return select(path, "PRAGMA integrity_check") == ["ok"]


def brief(sql: str) -> str:
    """Return the name of a statement, or the statement if it has none."""
    line = sql.strip().splitlines()[0]
    return line.removeprefix("-- ").partition(":")[0] if line[0] == "-" else line


class Spied(sqlite3.Connection):
    """A connection that writes down what it executes."""

    log: ClassVar[list[str]] = []
    opened: ClassVar[list[sqlite3.Connection]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Spied.opened.append(self)
        self.set_trace_callback(lambda sql: Spied.log.append(brief(sql)))


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Write down every statement of the module's connections."""
    Spied.log.clear()
    Spied.opened.clear()
    factory = partial(sqlite3.connect, factory=Spied)
    monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
    yield Spied.log
    Spied.opened.clear()


def nothing() -> None:
    """Wake nobody."""


def is_pending(queue: SQLiteQueue, count: int) -> bool:
    return len(database_of(queue).pending) == count


def until(condition: Callable[[], object], *, pause: float = 0.001) -> None:
    """Wait for something that has to happen soon."""
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(pause)


async def soon(condition: Callable[[], object]) -> None:
    """Wait for something that has to happen soon, while the loop goes on."""
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        await asyncio.sleep(0.001)


def all_in_line(thing: Any, count: int) -> None:
    """Wait until so many operations are tried as one group, behind another's lock."""
    database, groups = database_of(thing), [0]
    look = database._look

    def counting(connection: sqlite3.Connection) -> Any:
        group = look(connection)
        groups.append(len(group))
        return group

    database._look = counting
    until(lambda: groups[-1] == count)
    del database._look


class Threads:
    """Threads whose failures fail the test, and which end in time."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.started: list[threading.Thread] = []

    def start(self, function: Callable[..., object], *args: object) -> None:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 -- raised by `join`
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.started.append(thread)
        thread.start()

    def have_ended(self) -> bool:
        return not any(thread.is_alive() for thread in self.started)

    def join(self) -> None:
        for thread in self.started:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a thread hangs"
        for error in self.errors:
            raise error


def spin(seconds: float) -> None:
    """Use up time in bytecodes, where an exception can be raised."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        pass


class MemoryQueue:
    """A queue of another engine: a dictionary, for the threads of one process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.rows: dict[str, Task] = {}
        self.due: dict[str, float] = {}
        self.paused: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.faults: list[tuple[str, Exception]] = []
        """Calls that are to fail, once for each entry: name and error."""
        self._leases = itertools.count(1)

    def note(self, name: str, *facts: object) -> None:
        self.calls.append((name, threading.current_thread().name, *facts))
        for fault in self.faults:
            if fault[0] == name:
                self.faults.remove(fault)
                raise fault[1]

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)

    def put(self, task: Task, **changes: Any) -> Task:
        changed = self.rows[task.id] = dataclasses.replace(task, **changes)
        return changed

    def enqueue(self, task: Task, *, delay: float = 0.0) -> str:
        with self.lock:
            status = TaskStatus.SCHEDULED if delay else TaskStatus.PENDING
            self.put(task, status=status)
            self.due[task.id] = time.time() + delay
        return task.id

    def _is_ready(self, task: Task, names: Sequence[str]) -> bool:
        waits = task.status in (TaskStatus.PENDING, TaskStatus.SCHEDULED)
        return (
            task.queue in names
            and task.queue not in self.paused
            and waits
            and self.due[task.id] <= time.time()
        )

    def claim(
        self, limit: int, queues: str | Sequence[str], lease: float, worker: str | None
    ) -> list[Task]:
        names = [queues] if isinstance(queues, str) else queues
        with self.lock:
            self.note("dequeue_many", limit)
            ready = [t for t in self.rows.values() if self._is_ready(t, names)]
            until = datetime.fromtimestamp(time.time() + lease, UTC)
            return [
                self.put(
                    task,
                    status=TaskStatus.RUNNING,
                    attempt=task.attempt + 1,
                    worker=worker,
                    lease_id=str(next(self._leases)),
                    lease_until=until,
                )
                for task in ready[:limit]
            ]

    def dequeue_many(
        self,
        limit: int,
        queues: str | Sequence[str] = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = 60.0,
        worker: str | None = None,
    ) -> list[Task]:
        ends_at = math.inf if timeout is None else time.monotonic() + timeout
        while not (claimed := self.claim(limit, queues, lease, worker)):
            if time.monotonic() >= ends_at:
                break
            time.sleep(0.002)
        return claimed

    def held(self, task: Task) -> Task:
        row = self.rows[task.id]
        if row.status is not TaskStatus.RUNNING or row.lease_id != task.lease_id:
            raise LeaseLostError([task.id])
        return row

    def release(self, task: Task, *, delay: float = 0.0) -> None:
        with self.lock:
            self.note("release")
            row = self.held(task)
            self.enqueue(dataclasses.replace(row, attempt=row.attempt - 1), delay=delay)

    def extend(self, task: Task, lease: float = 60.0, *, progress: Any = None) -> Task:
        with self.lock:
            self.note("extend", progress)
            row = self.held(task)
            until = datetime.fromtimestamp(time.time() + lease, UTC)
            return self.put(row, lease_until=until, progress=progress or row.progress)

    def reclaim(self, worker: str) -> int:
        return 0

    def cancel(self, task_id: str) -> bool:
        with self.lock:
            if task_id in self.rows:
                self.put(self.rows[task_id], status=TaskStatus.CANCELLED)
            return task_id in self.rows

    def stats(self) -> list[QueueStats]:
        waits = (TaskStatus.PENDING, TaskStatus.SCHEDULED)
        with self.lock:
            waiting = Counter(t.queue for t in self.rows.values() if t.status in waits)
        return [
            QueueStats(name, pending=waiting[name], paused=name in self.paused)
            for name in waiting.keys() | self.paused
        ]


class MemoryBackend:
    """A blocking backend of another engine: no more than what a worker needs."""

    def __init__(self) -> None:
        self.queue = MemoryQueue()
        self.outcomes: dict[str, Any] = {}

    def __reduce__(self) -> NoReturn:
        raise TypeError("this lives in one process")

    def complete(self, task: Task, value: Any = None) -> None:
        with self.queue.lock:
            self.queue.note("complete")
            row = self.queue.held(task)
            self.outcomes[task.id] = value
            self.queue.put(row, status=TaskStatus.COMPLETED)

    def fail(
        self,
        task: Task,
        exception: BaseException,
        *,
        retry: bool = True,
        delay: float | None = None,
    ) -> TaskStatus:
        with self.queue.lock:
            self.queue.note("fail")
            row = self.queue.held(task)
            self.outcomes[task.id] = exception
            if not retry or task.attempt >= task.max_attempts:
                self.queue.put(row, status=TaskStatus.FAILED)
                return TaskStatus.FAILED
            self.queue.enqueue(row, delay=task.retry_delay if delay is None else delay)
            return TaskStatus.SCHEDULED

    def cleanup(self) -> dict[str, int]:
        self.queue.note("cleanup")
        return {}

    def close(self) -> None:
        self.queue.note("close")


class Awaited:
    """The async form of a blocking object of another engine."""

    def __init__(self, blocking: Any) -> None:
        self.blocking = blocking

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.blocking, name)

        async def forward(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return forward


class AsyncMemoryQueue(Awaited):
    async def dequeue_many(
        self,
        limit: int,
        queues: str | Sequence[str] = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = 60.0,
        worker: str | None = None,
    ) -> list[Task]:
        ends_at = math.inf if timeout is None else time.monotonic() + timeout
        while not (claimed := self.blocking.claim(limit, queues, lease, worker)):
            if time.monotonic() >= ends_at:
                break
            await asyncio.sleep(0.002)
        return cast(list[Task], claimed)


class AsyncMemoryBackend(Awaited):
    def __init__(self, blocking: MemoryBackend) -> None:
        super().__init__(blocking)
        self.queue = AsyncMemoryQueue(blocking.queue)


# =============================================================================
# Names
# =============================================================================

PAIRS = [
    ("AsyncSQLiteQueue", "SQLiteQueue"),
    ("AsyncSQLiteResultStorage", "SQLiteResultStorage"),
    ("AsyncSQLiteEventStorage", "SQLiteEventStorage"),
    ("AsyncSQLiteBackend", "SQLiteBackend"),
    ("AsyncWorker", "Worker"),
]

INTERFACES = [
    ("AsyncTaskQueue", "AsyncSQLiteQueue"),
    ("AsyncResultStorage", "AsyncSQLiteResultStorage"),
    ("AsyncEventStorage", "AsyncSQLiteEventStorage"),
    ("AsyncBackend", "AsyncSQLiteBackend"),
    ("TaskQueue", "SQLiteQueue"),
    ("ResultStorage", "SQLiteResultStorage"),
    ("EventStorage", "SQLiteEventStorage"),
    ("Backend", "SQLiteBackend"),
]

FIXED_NAMES = """
    AsyncBackend AsyncEventStorage AsyncResultStorage AsyncSQLiteBackend
    AsyncSQLiteEventStorage AsyncSQLiteQueue AsyncSQLiteResultStorage AsyncTaskQueue
    AsyncWorker Backend CorruptDatabaseError DatabaseBusyError DatabaseFullError
    DatabaseReplacedError DuplicateTaskError EventStorage EventType Finding
    LeaseLostError NetworkFilesystemError OmniQError QueueStats
    ReadOnlyDatabaseError Reject ResultStatus ResultStorage Retry SQLiteBackend
    SQLiteEventStorage SQLiteQueue SQLiteResultStorage SchemaVersionError
    SerializationError StorageClosedError Task TaskEvent TaskNotFoundError TaskQueue
    TaskRegistry TaskResult TaskStatus TaskTimeout UnknownTaskError
    UnsupportedSQLiteError Worker WorkerInfo current_task progress
""".split()

SIGNATURES = {
    "SQLiteQueue.enqueue": "(task, *, delay=0.0)",
    "SQLiteQueue.enqueue_many": "(tasks)",
    "SQLiteQueue.enqueue_on": "(connection, *tasks)",
    "SQLiteQueue.dequeue": (
        "(queues='default', *, timeout=0.0, lease=60.0, worker=None)"
    ),
    "SQLiteQueue.dequeue_many": (
        "(limit, queues='default', *, timeout=0.0, lease=60.0, worker=None)"
    ),
    "SQLiteQueue.complete": "(task)",
    "SQLiteQueue.complete_many": "(tasks)",
    "SQLiteQueue.fail": "(task, error, *, retry=True, delay=None)",
    "SQLiteQueue.release": "(task, *, delay=0.0)",
    "SQLiteQueue.extend": "(task, lease=60.0, *, progress=None)",
    "SQLiteQueue.reclaim": "(worker)",
    "SQLiteQueue.cancel": "(task_id)",
    "SQLiteQueue.retry": "(task_id)",
    "SQLiteQueue.cancel_all": "(*, queue=None, func=None, status=None)",
    "SQLiteQueue.retry_all": "(*, queue=None, func=None)",
    "SQLiteQueue.get_task": "(task_id)",
    "SQLiteQueue.list_tasks": (
        "(*, queue=None, status=None, func=None, unique_key=None, limit=100, offset=0)"
    ),
    "SQLiteQueue.count_tasks": "(*, queue=None, status=None)",
    "SQLiteQueue.stats": "()",
    "SQLiteQueue.list_queues": "()",
    "SQLiteQueue.list_workers": "()",
    "SQLiteQueue.pause": "(queue)",
    "SQLiteQueue.resume": "(queue)",
    "SQLiteQueue.purge": "(*, queue=None, status=None, older_than=None)",
    "SQLiteQueue.close": "()",
    "SQLiteResultStorage.store_many": "(results)",
    "SQLiteResultStorage.get": "(task_id)",
    "SQLiteResultStorage.get_many": "(ids)",
    "SQLiteResultStorage.wait": "(task_id, *, timeout=None)",
    "SQLiteResultStorage.delete": "(task_id)",
    "SQLiteResultStorage.list_results": "(*, status=None, limit=100, offset=0)",
    "SQLiteResultStorage.purge": "(*, older_than=None)",
    "SQLiteResultStorage.close": "()",
    "SQLiteEventStorage.log": "(event)",
    "SQLiteEventStorage.log_many": "(events)",
    "SQLiteEventStorage.query": (
        "(*, task_id=None, queue=None, type=None, since=None, until=None,"
        " after=None, limit=100, newest_first=False)"
    ),
    "SQLiteEventStorage.follow": "(*, after=None)",
    "SQLiteEventStorage.purge": "(*, older_than)",
    "SQLiteEventStorage.close": "()",
    "SQLiteBackend.complete": "(task, value=None, *, enqueue=())",
    "SQLiteBackend.status": "(task_id)",
    "SQLiteBackend.cleanup": "()",
    "SQLiteBackend.backup": "(path)",
    "SQLiteBackend.check": "()",
    "SQLiteBackend.close": "()",
}


def get_public(cls: Any) -> dict[str, Any]:
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def without_annotations(method: Any) -> str:
    signature = inspect.signature(method)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return str(
        signature.replace(
            parameters=parameters, return_annotation=inspect.Signature.empty
        )
    )


def as_blocking(text: object) -> str:
    """Return an annotation as its blocking twin would have it."""
    found = str(text).replace(" | aiosqlite.Connection", "")
    return found.replace("Async", "").replace("Awaitable", "")


def get_parameters(method: Any) -> list[tuple[str, object, object, str]]:
    return [
        (parameter.name, parameter.kind, parameter.default, as_blocking(annotation))
        for parameter in inspect.signature(method).parameters.values()
        for annotation in [parameter.annotation]
    ]


def first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


class TestNames:
    def test_all_is_sorted_and_names_nothing_twice(self) -> None:
        assert list(omniq_sqlite.__all__) == sorted(set(omniq_sqlite.__all__))

    def test_every_name_of_the_contract_is_public(self) -> None:
        assert set(FIXED_NAMES) - set(omniq_sqlite.__all__) == set()

    def test_every_public_name_exists(self) -> None:
        missing = [n for n in omniq_sqlite.__all__ if not hasattr(omniq_sqlite, n)]
        assert missing == []

    def test_every_public_class_and_function_has_a_docstring(self) -> None:
        things = {name: getattr(omniq_sqlite, name) for name in omniq_sqlite.__all__}
        assert [
            name
            for name, thing in things.items()
            if (inspect.isclass(thing) or inspect.isfunction(thing))
            and not (thing.__doc__ or "").strip()
        ] == []

    def test_every_public_method_of_a_public_class_has_a_docstring(self) -> None:
        assert [
            f"{name}.{method}"
            for name in omniq_sqlite.__all__
            if inspect.isclass(cls := getattr(omniq_sqlite, name))
            and not getattr(cls, "_is_protocol", False)
            and cls.__module__ == omniq_sqlite.__name__
            for method, value in vars(cls).items()
            if not method.startswith("_")
            and (
                inspect.isfunction(value)
                or isinstance(value, (property, classmethod, staticmethod))
            )
            and not first_line(getattr(cls, method))
        ] == []

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            (
                "TaskStatus",
                "scheduled pending running completed failed cancelled expired",
            ),
            ("ResultStatus", "success error cancelled"),
            (
                "EventType",
                (
                    "enqueued dequeued completed failed retry released cancelled"
                    " expired lease_lost"
                ),
            ),
        ],
    )
    def test_an_enum_has_exactly_these_values(self, name: str, values: str) -> None:
        members = getattr(omniq_sqlite, name)
        assert issubclass(members, enum.StrEnum)
        assert [str(member) for member in members] == values.split()

    @pytest.mark.parametrize(
        "value", [Task, TaskResult, TaskEvent, QueueStats, WorkerInfo, Finding]
    )
    def test_a_value_is_a_frozen_slotted_dataclass(self, value: Any) -> None:
        assert dataclasses.is_dataclass(value)
        assert vars(value)["__dataclass_params__"].frozen
        assert "__slots__" in vars(value)

    @pytest.mark.parametrize(("name", "signature"), sorted(SIGNATURES.items()))
    def test_a_method_takes_what_the_contract_says(
        self, name: str, signature: str
    ) -> None:
        cls, method = name.split(".")
        found = getattr(getattr(omniq_sqlite, cls), method)
        assert without_annotations(found) == signature

    @pytest.mark.parametrize(
        ("cls", "expected"),
        [
            (
                "SQLiteQueue",
                {
                    "synchronous": "FULL",
                    "busy_timeout": 30.0,
                    "serializer": "json",
                    "events": None,
                    "retention": 0.0,
                    "allow_network_fs": False,
                    "clock": time.time,
                },
            ),
            ("SQLiteResultStorage", {"ttl": 604_800.0, "clock": time.time}),
            ("SQLiteEventStorage", {"synchronous": "FULL", "clock": time.time}),
            (
                "SQLiteBackend",
                {
                    "queue": None,
                    "results": None,
                    "events": None,
                    "result_ttl": 604_800.0,
                    "event_retention": 2_592_000.0,
                },
            ),
        ],
    )
    def test_a_constructor_has_the_defaults_of_the_contract(
        self, cls: str, expected: dict[str, object]
    ) -> None:
        parameters = inspect.signature(getattr(omniq_sqlite, cls)).parameters
        first, *others = parameters.values()
        assert first.name == "path"
        assert {p.name: p.default for p in others if p.name in expected} == expected
        kinds = {p.kind for p in others}
        keyword_only = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
        assert kinds <= keyword_only


@pytest.mark.parametrize(("async_name", "blocking_name"), PAIRS)
class TestTwins:
    def test_they_have_the_same_public_names(
        self, async_name: str, blocking_name: str
    ) -> None:
        only_blocking = {"from_async", "to_async"}
        async_names = set(get_public(getattr(omniq_sqlite, async_name)))
        blocking_names = set(get_public(getattr(omniq_sqlite, blocking_name)))
        assert async_names == blocking_names - only_blocking

    def test_methods_take_the_same_parameters_and_return_the_same(
        self, async_name: str, blocking_name: str
    ) -> None:
        async_class = getattr(omniq_sqlite, async_name)
        blocking_class = getattr(omniq_sqlite, blocking_name)
        for name, method in get_public(async_class).items():
            if not callable(method):
                continue
            twin = getattr(blocking_class, name)
            assert get_parameters(method) == get_parameters(twin), name
            assert as_blocking(
                inspect.signature(method).return_annotation
            ) == as_blocking(inspect.signature(twin).return_annotation), name

    def test_constructors_take_the_same_parameters(
        self, async_name: str, blocking_name: str
    ) -> None:
        assert get_parameters(getattr(omniq_sqlite, async_name)) == get_parameters(
            getattr(omniq_sqlite, blocking_name)
        )

    def test_methods_have_the_same_first_docstring_line(
        self, async_name: str, blocking_name: str
    ) -> None:
        async_methods = get_public(getattr(omniq_sqlite, async_name))
        blocking_methods = get_public(getattr(omniq_sqlite, blocking_name))
        assert {n: first_line(m) for n, m in async_methods.items()} == {
            n: first_line(blocking_methods[n]) for n in async_methods
        }

    def test_what_returns_at_once_on_one_is_never_awaited_on_the_other(
        self, async_name: str, blocking_name: str
    ) -> None:
        methods = get_public(getattr(omniq_sqlite, blocking_name)).values()
        assert not any(inspect.iscoroutinefunction(method) for method in methods)
        at_once = {
            name
            for name, method in get_public(getattr(omniq_sqlite, async_name)).items()
            if inspect.isfunction(method) and not inspect.iscoroutinefunction(method)
        }
        assert at_once <= {"follow", "stop", "wait_all"}

    def test_every_class_has_all_four_context_manager_methods(
        self, async_name: str, blocking_name: str
    ) -> None:
        for name in (async_name, blocking_name):
            for method in ("__enter__", "__exit__", "__aenter__", "__aexit__"):
                if "Worker" not in name:
                    assert hasattr(getattr(omniq_sqlite, name), method), (name, method)


@pytest.mark.parametrize(("protocol", "cls"), INTERFACES)
def test_a_class_has_what_its_interface_names(protocol: str, cls: str) -> None:
    engine = getattr(omniq_sqlite, cls)
    for name, method in get_public(getattr(omniq_sqlite, protocol)).items():
        if inspect.isfunction(method):
            found = get_parameters(getattr(engine, name))
            wanted = get_parameters(method)
            assert [(p[0], p[1]) for p in found] == [(p[0], p[1]) for p in wanted], name
        else:
            assert hasattr(engine, name), name


ERRORS = [
    (StorageClosedError("a.db"), RuntimeError, {"path": "a.db"}),
    (
        DatabaseBusyError("a.db", 30.0, "roll back"),
        TimeoutError,
        {"path": "a.db", "waited": 30.0, "detail": "roll back"},
    ),
    (DatabaseFullError("a.db"), OSError, {"path": "a.db"}),
    (ReadOnlyDatabaseError("a.db"), PermissionError, {"path": "a.db"}),
    (CorruptDatabaseError("a.db", "why"), Exception, {"path": "a.db"}),
    (DatabaseReplacedError("a.db"), Exception, {"path": "a.db"}),
    (SchemaVersionError("a.db", "queue", "why"), Exception, {"component": "queue"}),
    (UnsupportedSQLiteError("3.1.0", "3.37.0"), RuntimeError, {"found": "3.1.0"}),
    (NetworkFilesystemError("a.db", "nfs4"), OSError, {"filesystem": "nfs4"}),
    (SerializationError("args[0]", "why"), ValueError, {"where": "args[0]"}),
    (TaskNotFoundError("a1"), LookupError, {"task_id": "a1"}),
    (DuplicateTaskError("a1"), ValueError, {"task_id": "a1"}),
    (LeaseLostError(["a1", "b2"]), Exception, {"task_ids": ["a1", "b2"]}),
    (TaskTimeout("a1", 3.0), TimeoutError, {"task_id": "a1", "timeout": 3.0}),
    (UnknownTaskError("resize"), LookupError, {"func": "resize"}),
]


@pytest.mark.parametrize(
    ("error", "base", "facts"), ERRORS, ids=[type(e[0]).__name__ for e in ERRORS]
)
class TestErrors:
    def test_it_is_an_omniq_error_and_the_built_in_it_is(
        self, error: OmniQError, base: type[Exception], facts: dict[str, object]
    ) -> None:
        assert isinstance(error, OmniQError)
        assert isinstance(error, base)

    def test_it_keeps_its_facts_as_attributes(
        self, error: OmniQError, base: type[Exception], facts: dict[str, object]
    ) -> None:
        assert {name: getattr(error, name) for name in facts} == facts

    def test_it_survives_pickling(
        self, error: OmniQError, base: type[Exception], facts: dict[str, object]
    ) -> None:
        copy = pickled(error)
        assert type(copy) is type(error)
        assert str(copy) == str(error) != ""
        assert {name: getattr(copy, name) for name in facts} == facts


# =============================================================================
# SQL
# =============================================================================


class Nothing(dict[str, None]):
    """Binds NULL to any named parameter."""

    def __missing__(self, key: str) -> None:
        return None


def statements_of_the_module() -> dict[str, str]:
    found = {}
    for name, value in vars(omniq_sqlite).items():
        if name.isupper() and not name.startswith("_"):
            if isinstance(value, str) and value.lstrip().startswith("--"):
                found[name] = value
            elif isinstance(value, dict) and name in ("SELECT_EVENTS", "COUNT_EVENTS"):
                found |= {f"{name} {key}": sql for key, sql in value.items()}
    return found


STATEMENTS = statements_of_the_module()


@pytest.fixture(scope="module")
def schema() -> Iterator[sqlite3.Connection]:
    """A database in memory with all tables of the newest version."""
    with raw(":memory:") as connection:
        components = list(omniq_sqlite.MIGRATIONS)
        omniq_sqlite.migrate(connection, components, ":memory:")
        yield connection


class TestStatements:
    def test_there_are_statements_to_test(self) -> None:
        assert len(STATEMENTS) > 60

    @pytest.mark.parametrize("name", STATEMENTS)
    def test_each_compiles_against_the_schema(
        self, name: str, schema: sqlite3.Connection
    ) -> None:
        sql = STATEMENTS[name]
        if sql.split("\n")[2 if sql[0] == "\n" else 1].startswith("CREATE"):
            with raw(":memory:") as empty:
                if "ON omniq_" in sql:
                    table = sql.partition("ON omniq_")[2].split()[0]
                    empty.execute(
                        getattr(omniq_sqlite, f"CREATE_{table.upper()}_TABLE")
                    )
                empty.execute(sql)
        else:
            schema.execute("EXPLAIN " + sql, Nothing()).fetchall()

    @pytest.mark.parametrize("name", STATEMENTS)
    def test_each_takes_its_values_by_name_and_stays_on_main(self, name: str) -> None:
        sql = STATEMENTS[name]
        assert "?" not in "".join(
            line for line in sql.splitlines() if not line.startswith("--")
        )
        for word in ("FROM", "INTO", "UPDATE"):
            for table in ("task", "result", "event", "pause", "worker", "schema"):
                if "CREATE VIEW" not in sql:
                    assert f"{word} omniq_{table}" not in sql


HOT = {
    "LOOK": ["omniq_task_ready", "omniq_task_due"],
    "LOOK_ONE": ["omniq_task_ready", "omniq_task_due"],
    "SELECT_DUE": ["omniq_task_due"],
    "SETTLE": ["INTEGER PRIMARY KEY"],
    "CLAIM": ["omniq_task_ready", "INTEGER PRIMARY KEY"],
    "CLAIM_ONE": ["omniq_task_ready", "INTEGER PRIMARY KEY"],
    "DELETE_COMPLETED_ONE": ["omniq_task_by_id"],
    "DELETE_COMPLETED": ["omniq_task_by_id"],
    "KEEP_COMPLETED": ["omniq_task_by_id"],
    "FAIL": ["omniq_task_by_id"],
    "RELEASE": ["omniq_task_by_id"],
    "EXTEND": ["omniq_task_by_id"],
    "CANCEL": ["omniq_task_by_id"],
    "RETRY": ["omniq_task_by_id"],
    "SELECT_TASK": ["omniq_task_by_id"],
    "SELECT_KEY_HOLDER": ["omniq_task_by_key"],
    "SELECT_RESULTS_BY_ID": ["sqlite_autoindex_omniq_result_1"],
    "PURGE_EXPIRED_RESULTS": ["omniq_result_expiry"],
    "PURGE_EVENTS": ["omniq_event_by_time"],
    "SELECT_EVENTS ('task', False)": ["omniq_event_by_task"],
    "SELECT_EVENTS ('task', True)": ["omniq_event_by_task"],
    "SELECT_EVENTS ('id', False)": ["INTEGER PRIMARY KEY"],
    "COUNT_EVENTS task": ["omniq_event_by_task"],
}


class TestQueryPlans:
    @pytest.mark.parametrize("name", HOT)
    def test_a_hot_statement_uses_its_index_and_sorts_nothing(
        self, name: str, schema: sqlite3.Connection
    ) -> None:
        sql = "EXPLAIN QUERY PLAN " + STATEMENTS[name]
        plan = [row[3] for row in schema.execute(sql, Nothing()).fetchall()]
        for index in HOT[name]:
            assert any(index in line for line in plan), plan
        for line in plan:
            assert "TEMP B-TREE" not in line
            assert not line.startswith(("SCAN main.omniq", "SCAN omniq")), plan


def fill(connection: sqlite3.Connection, pending: int, delayed: int) -> None:
    """Put rows into an empty task table; the delayed ones are more urgent."""
    connection.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        " INSERT INTO omniq_task (id, queue, func, args, kwargs, metadata, status,"
        " priority, max_attempts, retry_delay, created_at, run_at)"
        " SELECT 'id' || i, 'default', 'f', '[]', '{}', '{}',"
        " iif(i <= ?, 'pending', 'scheduled'), iif(i <= ?, i % 3, 9), 3, 1, 0,"
        " iif(i <= ?, NULL, 4e9 + i) FROM n",
        (pending + delayed, pending, pending, pending),
    )


def steps(connection: sqlite3.Connection, call: Callable[[], object]) -> int:
    """Return how many instructions SQLite's virtual machine takes for a call."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    connection.set_progress_handler(step, 1)
    call()
    connection.set_progress_handler(None, 1)
    return count


class TestCosts:
    def test_claim_and_complete_cost_the_same_at_any_length(self, spied: Any) -> None:
        costs = []
        for pending, delayed in ((1_000, 0), (100_000, 20_000)):
            with SQLiteQueue(":memory:") as queue:
                connection = Spied.opened[-1]
                connection.set_trace_callback(None)
                fill(connection, pending, delayed)
                assert queue.count_tasks() == pending + delayed
                got: list[Any] = []

                def work(queue: SQLiteQueue = queue, got: list[Any] = got) -> None:
                    got.append(queue.dequeue())
                    queue.complete(got[-1])

                costs.append(steps(connection, work))
                assert got[0].priority == 2
        assert costs[1] <= 1.3 * costs[0]

    def test_a_blocking_enqueue_is_one_statement_in_a_transaction(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            spied.clear()
            queue.enqueue(Task("f"))
            assert spied == ["BEGIN IMMEDIATE", "enqueue", "COMMIT"]

    def test_a_claim_is_one_statement_in_a_transaction_after_a_look(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue_many([Task("f"), Task("f")])
            assert queue.dequeue() is not None
            spied.clear()
            task = queue.dequeue()
            assert task is not None
            assert spied == ["look", "BEGIN IMMEDIATE", "claim", "COMMIT"]
            spied.clear()
            queue.extend(task)
            assert spied == ["BEGIN IMMEDIATE", "extend", "COMMIT"]
            spied.clear()
            queue.complete(task)
            assert spied == ["BEGIN IMMEDIATE", "complete", "COMMIT"]

    def test_an_idle_look_opens_no_transaction(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f", queue="other"), delay=100)
            spied.clear()
            assert queue.dequeue() is None
            assert queue.dequeue(["default", "other"]) is None
            assert spied == ["look", "look"]

    def test_to_purge_takes_the_lock_for_short_times(
        self, path: str, spied: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_STEP_LIMIT", 4)
        with SQLiteBackend(path) as backend:
            for number in range(11):
                backend.enqueue(Task(f"f{number % 2}"))
            for task in backend.queue.dequeue_many(10):
                backend.fail(task, ValueError(), retry=task.func == "f1")
            for purge, count in (
                (partial(backend.queue.purge, older_than=0), 5),
                (partial(cast(Any, backend.results).purge, older_than=0), 5),
            ):
                spied.clear()
                assert purge() == count
                assert spied.count("BEGIN IMMEDIATE") == 2
            assert backend.queue.count_tasks() == 6

    def test_to_retry_all_costs_a_statement_for_those_with_a_key_only(
        self, path: str, spied: list[str]
    ) -> None:
        keys = [None, None, None, "a", "b"]
        with SQLiteQueue(path) as queue:
            queue.enqueue_many([Task("f", unique_key=key) for key in keys])
            queue.cancel_all()
            queue.enqueue(Task("f", unique_key="a"))
            spied.clear()
            assert queue.retry_all() == 4
            assert spied.count("retry all") == 2
            assert spied.count("retry") == 3

    async def test_an_async_call_costs_the_same_statements(
        self, path: str, spied: list[str]
    ) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            spied.clear()
            await queue.enqueue(Task("f"))
            assert spied == ["BEGIN IMMEDIATE", "enqueue", "COMMIT"]

    def test_ending_a_task_with_its_result_is_two_statements(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteBackend(path) as backend:
            backend.enqueue(Task("f"))
            task = backend.queue.dequeue()
            assert task is not None
            spied.clear()
            backend.complete(task, 42)
            assert [word for word in spied if not word.startswith("PRAGMA")] == [
                "BEGIN IMMEDIATE",
                "complete",
                "store",
                "COMMIT",
            ]

    def test_ending_a_task_with_its_result_is_one_commit(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteBackend(path, events=True) as backend:
            backend.enqueue(Task("f"))
            task = backend.queue.dequeue()
            assert task is not None
            spied.clear()
            backend.complete(task, 42, enqueue=[Task("g")])
            assert spied.count("COMMIT") == 1
            assert spied.count("BEGIN IMMEDIATE") == 1


# =============================================================================
# Values that travel
# =============================================================================

BERLIN = ZoneInfo("Europe/Berlin")

TRAVELLERS: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    -(2**200),
    0.1,
    -0.0,
    1e308,
    5e-324,
    "",
    "naïve 🐟 \u2028",
    "nul \0 inside",
    [],
    [1, [2, [3]]],
    {},
    {"": {"a": [None]}},
    (),
    (1,),
    (1, (2, [3])),
    set(),
    {1, 2},
    {(1, 2), frozenset({3})},
    frozenset(),
    frozenset({"a"}),
    b"",
    b"\0\xff",
    NAIVE.replace(second=15, microsecond=123456),
    datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
    datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
    datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(seconds=4521))),
    NAIVE.min,
    NAIVE.max,
    date(2026, 3, 1),
    date.max,
    clock_time(12, 30, 15, 123456),
    clock_time(12, 30, tzinfo=UTC),
    timedelta(0),
    timedelta(days=-1, microseconds=1),
    timedelta.max,
    timedelta.min,
    Decimal("1.10"),
    Decimal("-0"),
    Decimal("1E+400"),
    Decimal("Infinity"),
    UUID("12345678-1234-5678-1234-567812345678"),
    Path("/srv/odd name.txt"),
    Path("relative/x"),
    {"$datetime": "2026-03-01"},
    {"$datetime": NAIVE},
    {"$tuple": [1, 2]},
    {"$": 1},
    {"$$": 1},
    {"$$tuple": [1]},
    {"$escape": {"$escape": {}}},
    {"$unheard of": None},
    {"$bytes": "AA==", "more": 1},
    {"$set": {"$set": []}},
]

REFUSED: list[tuple[Any, str]] = [
    (float("nan"), "args[0]"),
    (float("inf"), "args[0]"),
    (float("-inf"), "args[0]"),
    ([1, float("nan")], "args[0][1]"),
    ({1: "a"}, "args[0]"),
    ({"a": {None: 1}}, "args[0]['a']"),
    ({"a": [0, object()]}, "args[0]['a'][1]"),
    ((0, {"b": 1j}), "args[0][1]['b']"),
    ({object()}, "args[0][0]"),
    (object, "args[0]"),
    (len, "args[0]"),
    (Decimal("NaN"), "args[0]"),
    (Decimal("sNaN"), "args[0]"),
]


def shape(value: Any) -> Any:
    """Return the value with every type beside it: 1 is not True, () is not []."""
    if isinstance(value, Mapping):
        return "dict", [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [shape(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(repr(shape(item)) for item in value)
    if isinstance(value, (datetime, clock_time)):
        return type(value).__name__, value, value.utcoffset()
    return type(value).__name__, repr(value)


HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | st.dates()
    | st.datetimes().map(lambda value: value.replace(fold=0))
    | st.datetimes(timezones=st.just(UTC)).map(lambda value: value.replace(fold=0))
    | st.times().map(lambda value: value.replace(fold=0))
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
KEYS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["$", "$$", "$tuple", "$$tuple", "$datetime", "$dict", "$escape", "$path"]
)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=10,
)


class ComplexNumbers:
    """A serializer for one more type, as a user would write it."""

    def dumps(self, value: Any) -> str:
        def default(found: Any) -> Any:
            if isinstance(found, complex):
                return {"complex": [found.real, found.imag]}
            raise TypeError(f"what is {type(found).__name__}?")

        return json.dumps(value, default=default)

    def loads(self, text: str) -> Any:
        def revive(found: dict[str, Any]) -> Any:
            return complex(*found["complex"]) if "complex" in found else found

        return json.loads(text, object_hook=revive)


class TestValuesThatTravel:
    @pytest.mark.parametrize("value", TRAVELLERS, ids=repr)
    async def test_it_comes_back_equal_and_of_the_same_type(
        self, api: Api, value: Any
    ) -> None:
        queue = api.queue(":memory:")
        await call(queue.enqueue, Task("f", (value,), {"k": value}))
        task = await claim(queue)
        assert task.args == (value,)
        assert shape(task.args[0]) == shape(value)
        assert shape(task.kwargs) == shape({"k": value})

    @given(value=VALUES)
    @settings(
        max_examples=60,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    def test_any_value_comes_back_equal_and_of_the_same_type(self, value: Any) -> None:
        with SQLiteQueue(":memory:") as queue:
            queue.enqueue(Task("f", (value,)))
            task = queue.dequeue()
            assert task is not None
            assert shape(task.args[0]) == shape(value)

    @pytest.mark.parametrize(
        ("value", "where"), REFUSED, ids=[f"{n}" for n in range(len(REFUSED))]
    )
    async def test_anything_else_is_refused_with_its_place(
        self, api: Api, value: Any, where: str
    ) -> None:
        queue = api.queue(":memory:")
        with pytest.raises(SerializationError) as caught:
            await call(queue.enqueue, Task("f", (value,)))
        assert caught.value.where == where
        assert where in str(caught.value)
        assert await call(queue.count_tasks) == 0

    async def test_the_place_in_a_keyword_argument_is_named(self, queue: Any) -> None:
        with pytest.raises(SerializationError) as caught:
            await call(queue.enqueue, Task("f", kwargs={"size": [1, {2}, object()]}))
        assert caught.value.where == "kwargs['size'][2]"

    async def test_the_metadata_of_a_task_travel_too(self, queue: Any) -> None:
        metadata = {"trace": (1, 2), "when": datetime(2026, 3, 1, tzinfo=UTC)}
        await call(queue.enqueue, Task("f", metadata=metadata))
        assert (await claim(queue)).metadata == metadata

    @pytest.mark.parametrize(
        "value",
        [
            10**5000,
            "lone \ud800 surrogate",
            datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
            datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN),
            datetime(2026, 3, 1, 12, tzinfo=BERLIN),
            bytearray(b"abc"),
            http.HTTPStatus.OK,
        ],
        ids=[
            "huge integer",
            "lone surrogate",
            "first of an hour that comes twice",
            "second of an hour that comes twice",
            "named zone",
            "bytearray",
            "integer of an enum",
        ],
    )
    async def test_a_doubtful_value_comes_back_equal_or_is_refused(
        self, queue: Any, value: Any
    ) -> None:
        try:
            await call(queue.enqueue, Task("f", (value,)))
        except SerializationError:
            assert await call(queue.count_tasks) == 0
        else:
            assert (await claim(queue)).args[0] == value

    async def test_a_value_that_holds_itself_is_refused(self, queue: Any) -> None:
        value: list[Any] = []
        value.append(value)
        with pytest.raises(SerializationError):
            await call(queue.enqueue, Task("f", (value,)))

    async def test_a_value_that_is_nested_too_deep_is_refused(self, queue: Any) -> None:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        try:
            with pytest.raises(SerializationError):
                await call(queue.enqueue, Task("f", (value,)))
        finally:
            while value:
                value = value.pop()

    async def test_one_bad_task_among_many_adds_none(self, queue: Any) -> None:
        with pytest.raises(SerializationError):
            await call(queue.enqueue_many, [Task("f"), Task("g", (object(),))])
        assert await call(queue.count_tasks) == 0

    async def test_values_are_json_text_in_the_file(self, api: Api, queue: Any) -> None:
        when = datetime(2026, 3, 1, 12, tzinfo=UTC)
        await call(queue.enqueue, Task("f", (when, 7), {"a": None}))
        (row,) = read_rows(api.path, "SELECT args, kwargs FROM omniq_task")
        assert json.loads(row["args"]) == [
            {"$datetime": "2026-03-01T12:00:00+00:00"},
            7,
        ]
        assert json.loads(row["kwargs"]) == {"a": None}

    async def test_nothing_named_in_a_payload_is_imported(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", ("x",)))
        payload = '[{"$object": "antigravity.x"}, {"$antigravity": 1}]'
        with raw(api.path) as connection:
            connection.execute("UPDATE omniq_task SET args = ?", [payload])
        with contextlib.suppress(OmniQError):
            await call(queue.list_tasks)
        assert "antigravity" not in sys.modules

    async def test_other_types_travel_through_a_serializer_of_ones_own(
        self, api: Api
    ) -> None:
        backend = api.backend(serializer=ComplexNumbers())
        task_id = await call(backend.enqueue, Task("f", (1 + 2j,), {"k": [3j]}))
        task = await claim(backend.queue)
        assert task.args == (1 + 2j,)
        assert task.kwargs == {"k": [3j]}
        await call(backend.complete, task, {"sum": 4j})
        assert (await call(backend.result, task_id, timeout=0)).value == {"sum": 4j}

    async def test_what_such_a_serializer_refuses_is_refused_at_enqueue(
        self, api: Api
    ) -> None:
        queue = api.queue(serializer=ComplexNumbers())
        with pytest.raises(SerializationError, match="what is object"):
            await call(queue.enqueue, Task("f", (object(),)))
        assert await call(queue.count_tasks) == 0

    async def test_a_serializer_without_both_methods_is_refused(self, api: Api) -> None:
        with pytest.raises(ValueError, match="serializer"):
            api.queue(serializer=object())

    async def test_a_result_that_cannot_be_serialized_is_refused(
        self, results: Any
    ) -> None:
        with pytest.raises(SerializationError) as caught:
            await call(
                results.store, TaskResult("a1", ResultStatus.SUCCESS, [0, object()])
            )
        assert caught.value.where == "value[1]"
        assert await call(results.get, "a1") is None


# =============================================================================
# Opening
# =============================================================================

TOUCH: dict[str, Callable[[Any], Any]] = {
    "Queue": lambda queue: queue.count_tasks(),
    "ResultStorage": lambda results: results.list_results(),
    "EventStorage": lambda events: events.count(),
    "Backend": lambda backend: backend.status("unknown"),
}


async def touch(kind: str, thing: Any) -> Any:
    return await call(TOUCH[kind], thing)


class TestSubclassesOfValues:
    def test_they_are_checked_as_their_bases(self) -> None:
        class MyResult(TaskResult):
            pass

        class MyTask(Task):
            pass

        assert MyResult("id", ResultStatus.SUCCESS).status == "success"
        with pytest.raises(ValueError, match="timeout"):
            MyTask("f", timeout=0)

    @pytest.mark.parametrize(
        "value",
        ["\ud83d\ude00", {"\ud83d\ude00": 1, "\U0001f600": 2}, ["\ud800\udc00"]],
    )
    def test_two_surrogates_that_would_become_one_character(self, value: Any) -> None:
        with pytest.raises(SerializationError, match="surrogates"):
            omniq_sqlite.JSONSerializer().dumps(value)


@pytest.mark.parametrize("kind", KINDS)
class TestOpening:
    async def test_making_an_object_touches_no_file(self, api: Api, kind: str) -> None:
        api.make(kind)
        assert list(api.folder.iterdir()) == []

    async def test_the_first_use_creates_the_file(self, api: Api, kind: str) -> None:
        await touch(kind, api.make(kind))
        assert api.path.exists()

    async def test_a_path_like_object_and_a_string_name_the_same_file(
        self, api: Api, kind: str
    ) -> None:
        await touch(kind, api.make(kind, str(api.path)))
        await touch(kind, api.make(kind, Path(api.path)))
        files = {path.name for path in api.folder.iterdir()}
        assert {name for name in files if not name.endswith(("-wal", "-shm"))} == {
            "jobs.db"
        }

    async def test_a_name_full_of_odd_characters_is_just_a_name(
        self, api: Api, kind: str
    ) -> None:
        name = "file:odd ?mode=memory&cache=shared#1%41é.db"
        await touch(kind, api.make(kind, api.folder / name))
        assert (api.folder / name).exists()

    async def test_a_relative_path_means_the_folder_of_its_making(
        self, api: Api, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(api.folder)
        made = api.make(kind, "relative.db")
        (api.folder / "elsewhere").mkdir()
        await touch(kind, made)
        monkeypatch.chdir(api.folder / "elsewhere")
        await touch(kind, made)
        assert (api.folder / "relative.db").exists()
        assert list((api.folder / "elsewhere").iterdir()) == []

    async def test_two_objects_may_have_the_same_file_open(
        self, api: Api, kind: str
    ) -> None:
        one, other = api.make(kind), api.make(kind)
        await touch(kind, one)
        await touch(kind, other)
        await call(one.close)
        await touch(kind, other)

    async def test_close_is_idempotent(self, api: Api, kind: str) -> None:
        made = api.make(kind)
        await touch(kind, made)
        await call(made.close)
        await call(made.close)

    @pytest.mark.parametrize("steps", range(6))
    async def test_two_tasks_may_close(self, api: Api, kind: str, steps: int) -> None:
        made = api.make(kind)
        await touch(kind, made)

        async def close_later() -> None:
            for _ in range(steps):
                await asyncio.sleep(0)
            await call(made.close)

        await asyncio.gather(call(made.close), close_later())

    async def test_an_unused_object_can_be_closed(self, api: Api, kind: str) -> None:
        await call(api.make(kind).close)
        assert list(api.folder.iterdir()) == []

    async def test_closing_leaves_no_wal_behind(self, api: Api, kind: str) -> None:
        made = api.make(kind)
        await touch(kind, made)
        await call(made.close)
        assert [path.name for path in api.folder.iterdir()] == ["jobs.db"]

    async def test_use_after_close_is_refused(self, api: Api, kind: str) -> None:
        made = api.make(kind)
        await touch(kind, made)
        await call(made.close)
        with pytest.raises(StorageClosedError) as caught:
            await touch(kind, made)
        assert caught.value.path.endswith("jobs.db")

    async def test_an_object_closed_before_its_first_use_is_refused_too(
        self, api: Api, kind: str
    ) -> None:
        made = api.make(kind)
        await call(made.close)
        with pytest.raises(StorageClosedError):
            await touch(kind, made)
        assert not api.path.exists()

    async def test_async_with_opens_at_once_and_closes_at_the_end(
        self, api: Api, kind: str
    ) -> None:
        made = api.make(kind)
        async with made as entered:
            assert entered is made
            assert api.path.exists()
        with pytest.raises(StorageClosedError):
            await touch(kind, made)

    async def test_async_with_does_not_block_the_loop_while_it_opens(
        self, api: Api, kind: str
    ) -> None:
        # The file is new, so that opening has to write and waits for the lock.
        made = api.make(kind, busy_timeout=DEADLINE)

        async def use() -> None:
            async with made:
                await touch(kind, made)

        with write_lock(api.path):
            using = started(use())
            for _ in range(10):
                await asyncio.sleep(0.005)
            assert not using.done()
        await asyncio.wait_for(using, DEADLINE)

    async def test_the_application_may_own_the_file(self, api: Api, kind: str) -> None:
        with raw(api.path) as connection:
            connection.executescript(
                "PRAGMA user_version = 7; PRAGMA application_id = 4242;"
                "CREATE TABLE orders (id INTEGER PRIMARY KEY);"
                "INSERT INTO orders VALUES (1);"
            )
        await touch(kind, api.make(kind))
        with raw(api.path) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (7,)
            assert connection.execute("PRAGMA application_id").fetchone() == (4242,)
            assert connection.execute("PRAGMA auto_vacuum").fetchone() == (0,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("SELECT id FROM orders").fetchall() == [(1,)]

    async def test_everything_in_the_file_carries_the_prefix(
        self, api: Api, kind: str
    ) -> None:
        await touch(kind, api.make(kind))
        names = get_names(api.path)
        assert names != set()
        assert {name for name in names if not name.startswith("omniq_")} == set()

    async def test_a_table_of_our_name_that_is_not_ours_is_refused(
        self, api: Api, kind: str
    ) -> None:
        table = {"ResultStorage": "omniq_result", "EventStorage": "omniq_event"}
        with raw(api.path) as connection:
            connection.execute(f"CREATE TABLE {table.get(kind, 'omniq_task')} (x)")
        with pytest.raises(SchemaVersionError):
            await touch(kind, api.make(kind))

    async def test_a_table_with_the_name_of_our_view_is_refused_and_left_alone(
        self, api: Api, kind: str
    ) -> None:
        view = {
            "ResultStorage": "omniq_result_view",
            "EventStorage": "omniq_event_view",
        }
        name = view.get(kind, "omniq_task_view")
        with raw(api.path) as connection:
            connection.execute(f"CREATE TABLE {name} (x)")
        with pytest.raises(SchemaVersionError, match=name):
            await touch(kind, api.make(kind))
        assert get_names(api.path) == {name}

    async def test_a_file_of_a_newer_version_is_refused(
        self, api: Api, kind: str
    ) -> None:
        await touch(kind, api.make(kind))
        await api.close()
        with raw(api.path) as connection:
            connection.execute("UPDATE omniq_schema SET version = 999")
        before = api.path.read_bytes()
        with pytest.raises(SchemaVersionError, match="newer") as caught:
            await touch(kind, api.make(kind))
        assert "999" in str(caught.value)
        assert api.path.read_bytes() == before

    async def test_a_path_that_cannot_be_is_named(self, api: Api, kind: str) -> None:
        (api.folder / "letter").write_text("Dear grandmother")
        made = api.make(kind, api.folder / "letter" / "jobs.db")
        with pytest.raises(OmniQError, match="letter") as caught:
            await touch(kind, made)
        assert isinstance(caught.value, OSError)

    async def test_it_pickles_as_its_constructor_arguments(
        self, api: Api, kind: str
    ) -> None:
        made = api.make(kind, clock=time.time, synchronous="NORMAL")
        await touch(kind, made)
        copy = api.keep(pickled(made))
        assert type(copy) is type(made)
        await touch(kind, copy)

    async def test_an_object_in_memory_does_not_pickle(
        self, api: Api, kind: str
    ) -> None:
        with pytest.raises(TypeError, match="memory"):
            pickle.dumps(api.make(kind, ":memory:", clock=time.time))

    async def test_an_object_in_memory_makes_no_file(
        self, api: Api, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(api.folder)
        await touch(kind, api.make(kind, ":memory:"))
        assert list(api.folder.iterdir()) == []

    async def test_an_unknown_option_is_refused(self, api: Api, kind: str) -> None:
        with pytest.raises(TypeError, match="colour"):
            api.make(kind, colour="red")

    @pytest.mark.parametrize(
        ("option", "value", "rule"),
        [
            ("synchronous", "SOMETIMES", "FULL"),
            ("busy_timeout", -1.0, "0"),
            ("busy_timeout", float("nan"), "0"),
            ("serializer", "pickle", "json"),
            ("readers", 0, "1"),
        ],
    )
    async def test_an_option_out_of_range_is_named(
        self, api: Api, kind: str, option: str, value: Any, rule: str
    ) -> None:
        with pytest.raises(ValueError, match=option) as caught:
            api.make(kind, **{option: value})
        assert repr(value) in str(caught.value)
        assert rule in str(caught.value)

    async def test_an_empty_path_is_refused(self, api: Api, kind: str) -> None:
        with pytest.raises(ValueError, match="path"):
            api.make(kind, "")

    async def test_a_url_is_no_path(
        self, api: Api, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(api.folder)
        with pytest.raises(ValueError, match="from_url"):
            api.make(kind, "sqlite:///x.db")
        assert list(api.folder.iterdir()) == []


FILES = ("", "-shm", "-wal")
"""What SQLite adds to the name of a database for its files."""


@POSIX
@pytest.mark.parametrize("umask", [0o000, 0o277, 0o777])
async def test_new_files_belong_to_their_owner_only(api: Api, umask: int) -> None:
    folder = api.folder / "new" / "nested"
    before = os.umask(umask)
    try:
        backend = api.backend(folder / "jobs.db", results=folder / "results.db")
        await call(backend.enqueue, Task("f"))
        await call(backend.results.store, TaskResult("a1", ResultStatus.SUCCESS))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    names = [name + end for name in ("jobs.db", "results.db") for end in FILES]
    assert modes == dict.fromkeys(names, 0o600)
    for new in (folder, folder.parent):
        assert new.stat().st_mode & 0o777 == 0o700


def make_async(kind: str, path: Path | str) -> Any:
    return getattr(omniq_sqlite, "AsyncSQLite" + kind)(path)


@pytest.mark.parametrize("kind", KINDS)
class TestPlainWith:
    def test_a_blocking_object_opens_at_once_and_closes_at_the_end(
        self, kind: str, tmp_path: Path
    ) -> None:
        made = getattr(omniq_sqlite, "SQLite" + kind)(tmp_path / "jobs.db")
        with made as entered:
            assert entered is made
            assert (tmp_path / "jobs.db").exists()
        with pytest.raises(StorageClosedError):
            TOUCH[kind](made)

    def test_an_async_object_creates_the_file_where_no_loop_runs(
        self, kind: str, tmp_path: Path
    ) -> None:
        made = make_async(kind, tmp_path / "jobs.db")
        with made as entered:
            assert entered is made
            assert any(name.startswith("omniq_") for name in get_names(made_path(made)))
        with pytest.raises(StorageClosedError):
            asyncio.run(TOUCH[kind](made))

    def test_an_async_object_closes_without_a_loop_after_a_loop_used_it(
        self, kind: str, tmp_path: Path
    ) -> None:
        with make_async(kind, tmp_path / "jobs.db") as made:
            asyncio.run(TOUCH[kind](made))
            asyncio.run(TOUCH[kind](made))
        assert [path.name for path in tmp_path.iterdir()] == ["jobs.db"]

    def test_an_async_object_checks_the_file(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "jobs.db").write_bytes(b"this is a letter to grandmother\n" * 100)
        made = make_async(kind, tmp_path / "jobs.db")
        with pytest.raises(CorruptDatabaseError), made:
            pass

    async def test_an_async_object_is_refused_inside_a_running_loop(
        self, kind: str, tmp_path: Path
    ) -> None:
        made = make_async(kind, tmp_path / "jobs.db")
        with pytest.raises(RuntimeError, match="async with"), made:
            pass
        await made.close()

    def test_under_trio_an_async_object_says_what_is_wrong(
        self, kind: str, tmp_path: Path
    ) -> None:
        made = make_async(kind, tmp_path / "jobs.db")

        async def use() -> None:
            await TOUCH[kind](made)

        for function in (use, made.__aenter__):
            with pytest.raises(RuntimeError) as caught:
                trio.run(function)
            assert str(caught.value) == (
                "the Async classes need a running asyncio event loop, because aiosqlite"
                " does; under trio or without a loop use the blocking twin (in a"
                " thread)"
            )
        asyncio.run(made.close())

    async def test_a_blocking_object_works_inside_a_running_loop(
        self, kind: str, tmp_path: Path
    ) -> None:
        with getattr(omniq_sqlite, "SQLite" + kind)(tmp_path / "jobs.db") as made:
            TOUCH[kind](made)


def made_path(made: Any) -> Path:
    return Path(made.path)


CLOSED_CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "Queue": {
        "enqueue": (Task("f"),),
        "enqueue_many": ([Task("f")],),
        "dequeue": (),
        "dequeue_many": (3,),
        "complete": (Task("f", lease_id="x"),),
        "complete_many": ([Task("f", lease_id="x")],),
        "fail": (Task("f", lease_id="x"), "no"),
        "release": (Task("f", lease_id="x"),),
        "extend": (Task("f", lease_id="x"),),
        "reclaim": ("w1",),
        "cancel": ("a1",),
        "retry": ("a1",),
        "cancel_all": (),
        "retry_all": (),
        "get_task": ("a1",),
        "list_tasks": (),
        "count_tasks": (),
        "stats": (),
        "list_queues": (),
        "list_workers": (),
        "pause": ("default",),
        "resume": ("default",),
        "purge": (),
    },
    "ResultStorage": {
        "store": (TaskResult("a1", ResultStatus.SUCCESS),),
        "store_many": ([TaskResult("a1", ResultStatus.SUCCESS)],),
        "get": ("a1",),
        "get_many": (["a1"],),
        "wait": ("a1",),
        "delete": ("a1",),
        "list_results": (),
        "purge": (),
    },
    "EventStorage": {
        "log": (TaskEvent("note"),),
        "log_many": ([TaskEvent("note")],),
        "query": (),
        "count": (),
        "purge": (),
    },
    "Backend": {
        "enqueue": (Task("f"),),
        "enqueue_many": ([Task("f")],),
        "complete": (Task("f", lease_id="x"),),
        "complete_many": ([(Task("f", lease_id="x"), 1)],),
        "fail": (Task("f", lease_id="x"), ValueError("no")),
        "status": ("a1",),
        "result": ("a1",),
        "cleanup": (),
        "check": (),
        "backup": ("copy.db",),
    },
}
OLDER_THAN = {("EventStorage", "purge")}
"""What cannot be called without this argument."""


class TestClosed:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_every_method_of_a_closed_object_says_so(
        self, api: Api, kind: str
    ) -> None:
        made = api.make(kind)
        await call(made.close)
        left_out = {"close", "enqueue_on", "follow", "from_async", "to_async"}
        left_out |= {"from_env", "from_url", "wait_all"}
        methods = get_public(type(made))
        callables = {name for name, method in methods.items() if callable(method)}
        assert callables - left_out == set(CLOSED_CALLS[kind])
        for name, arguments in CLOSED_CALLS[kind].items():
            keywords = {"older_than": 1.0} if (kind, name) in OLDER_THAN else {}
            with pytest.raises(StorageClosedError):
                await call(getattr(made, name), *arguments, **keywords)

    @pytest.mark.parametrize(
        ("kind", "method"),
        [
            ("Queue", "enqueue_many"),
            ("Queue", "complete_many"),
            ("ResultStorage", "store_many"),
            ("EventStorage", "log_many"),
            ("Backend", "enqueue_many"),
            ("Backend", "complete_many"),
        ],
    )
    async def test_a_call_with_nothing_to_do_says_so_too(
        self, api: Api, kind: str, method: str
    ) -> None:
        made = api.make(kind)
        await call(getattr(made, method), [])
        await call(made.close)
        with pytest.raises(StorageClosedError):
            await call(getattr(made, method), [])

    async def test_a_closed_queue_takes_no_tasks_on_a_connection(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.close)
        with raw(api.path) as connection:
            connection.execute("BEGIN")
            with pytest.raises(StorageClosedError):
                await call(queue.enqueue_on, connection, Task("f"))

    async def test_the_parts_of_a_closed_backend_are_closed(self, backend: Any) -> None:
        await call(backend.enqueue, Task("f"))
        await call(backend.close)
        with pytest.raises(StorageClosedError):
            await call(backend.queue.count_tasks)
        with pytest.raises(StorageClosedError):
            await call(backend.results.list_results)
        with pytest.raises(StorageClosedError):
            await call(backend.events.count)
        with pytest.raises(StorageClosedError):
            await gather_results(backend.wait_all(["a1"]))


class TestBusyTimeout:
    async def test_a_write_gives_up_after_it_and_nothing_was_changed(
        self, api: Api
    ) -> None:
        queue = api.queue(busy_timeout=0.05)
        await call(queue.enqueue, Task("before"))
        with write_lock(api.path), pytest.raises(DatabaseBusyError) as caught:
            await call(queue.enqueue, Task("during"))
        assert caught.value.path.endswith("jobs.db")
        assert 0.05 <= caught.value.waited < SOON
        await call(queue.enqueue, Task("after"))
        assert await claim_names(queue) == ["before", "after"]

    async def test_a_write_waits_for_a_writer_that_ends_in_time(self, api: Api) -> None:
        queue = api.queue()
        await call(queue.enqueue, Task("before"))
        with write_lock(api.path):
            writing = started(aside(queue.enqueue, Task("during")))
            await settled_in()
            assert not writing.done()
        await writing
        assert await claim_names(queue) == ["before", "during"]

    async def test_a_read_waits_for_no_writer(self, api: Api) -> None:
        backend = api.backend(events=True, busy_timeout=0.0)
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.results.store, TaskResult("a1", ResultStatus.SUCCESS, 7))
        with write_lock(api.path):
            assert (await get(backend.queue, task_id)).func == "f"
            assert len(await call(backend.queue.list_tasks)) == 1
            assert await call(backend.queue.count_tasks) == 1
            assert len(await call(backend.queue.stats)) == 1
            assert await call(backend.queue.list_queues) == ["default"]
            assert await call(backend.queue.list_workers) == []
            assert (await call(backend.results.get, "a1")).value == 7
            assert len(await call(backend.results.list_results)) == 1
            assert len(await call(backend.events.query)) == 1
            assert await call(backend.status, task_id) == "pending"

    async def test_looking_for_a_task_where_there_is_none_waits_for_no_writer(
        self, api: Api
    ) -> None:
        queue = api.queue(busy_timeout=0.0)
        await call(queue.enqueue_many, [Task("f", queue="paused"), Task("g")])
        await call(queue.enqueue, Task("h", queue="ready"))
        await call(queue.pause, "paused")
        await claim(queue)
        with write_lock(api.path):
            assert await call(queue.dequeue, ["default", "paused"]) is None
            assert await call(queue.dequeue_many, 5, "paused") == []
            with pytest.raises(DatabaseBusyError):
                await call(queue.dequeue, "ready")


class TestThreads:
    async def test_objects_in_memory_are_apart(self, api: Api) -> None:
        one, other = api.queue(":memory:"), api.queue(":memory:")
        await call(one.enqueue, Task("f"))
        assert await call(other.count_tasks) == 0

    async def test_the_parts_of_a_backend_in_memory_are_one(self, api: Api) -> None:
        backend = api.backend(":memory:", events=True)
        await call(backend.queue.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert [r.value for r in await call(backend.results.list_results)] == [7]
        assert await get_types(backend.events) == ["enqueued", "dequeued", "completed"]

    async def test_a_waiting_call_in_memory_is_woken_by_another_thread(
        self, api: Api
    ) -> None:
        queue = api.queue(":memory:")
        waiting = started(aside(queue.dequeue, timeout=DEADLINE))
        await in_wait(queue)
        begun = time.monotonic()
        await call(queue.enqueue, Task("f"))
        assert (await waiting).func == "f"
        assert time.monotonic() - begun < SOON

    def test_those_that_wait_for_a_connection_get_one_in_turn(self, path: str) -> None:
        threads, together = Threads(), threading.Barrier(8)
        calls = [0] * 8

        def read(queue: SQLiteQueue, number: int) -> None:
            together.wait(DEADLINE)
            while sum(calls) < 4_000:
                queue.get_task("x")
                calls[number] += 1

        with SQLiteQueue(path, readers=2) as queue:
            for number in range(len(calls)):
                threads.start(read, queue, number)
            threads.join()
        assert min(calls) >= 20, calls

    def test_a_close_waits_for_those_that_wait_for_a_connection(
        self, path: str
    ) -> None:
        threads = Threads()
        with SQLiteQueue(path, readers=1) as queue:
            queue.enqueue(Task("f"))
            database = database_of(queue)
            with database.readers:
                for _ in range(4):
                    threads.start(queue.count_tasks)
                until(lambda: database.readers.waiting == 4)
                threads.start(queue.close)
                until(lambda: database.closed_reason)
            threads.join()

    def test_a_rest_does_not_hold_up_who_has_a_connection(self, path: str) -> None:
        threads = Threads()
        rested: list[bool] = []

        def rest(database: Any) -> None:
            with database.gate:
                rested.append(database.rest(DEADLINE))

        def read(database: Any) -> None:
            with database.readers:
                pass

        with SQLiteQueue(path, readers=1) as queue:
            queue.count_tasks()
            database = database_of(queue)
            with database.writer:
                threads.start(rest, database)
                until(lambda: database.resting)
                threads.start(read, database)
                until(lambda: database.readers.waiting)
                with database.readers:
                    assert not rested
            threads.join()
        assert rested == [True]

    @pytest.mark.parametrize("name", ["jobs.db", ":memory:"])
    def test_an_async_object_lives_through_several_loops(
        self, tmp_path: Path, name: str
    ) -> None:
        queue = AsyncSQLiteQueue(tmp_path / name if name == "jobs.db" else name)
        task_id = asyncio.run(queue.enqueue(Task("f")))
        for _ in range(2):
            task = asyncio.run(queue.dequeue(timeout=DEADLINE))
            assert task is not None
            assert task.id == task_id
            asyncio.run(queue.release(task))
        asyncio.run(queue.close())

    def test_an_async_object_serves_two_loops_in_two_threads_at_once(
        self, tmp_path: Path
    ) -> None:
        for path in (tmp_path / "jobs.db", ":memory:"):
            queue = AsyncSQLiteQueue(path)

            async def work(number: int, queue: AsyncSQLiteQueue = queue) -> None:
                await queue.enqueue_many([Task("f", (number, n)) for n in range(20)])
                for _ in range(20):
                    task = await queue.dequeue(timeout=DEADLINE)
                    assert task is not None
                    await queue.complete(task)

            def run(number: int, work: Callable[[int], Any] = work) -> None:
                asyncio.run(work(number))

            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                list(pool.map(run, range(2)))
            assert asyncio.run(queue.count_tasks()) == 0
            asyncio.run(queue.close())

    def test_a_twin_wakes_another_loop(self, tmp_path: Path) -> None:
        queue = AsyncSQLiteQueue(tmp_path / "jobs.db")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(asyncio.run, queue.dequeue(timeout=DEADLINE))
            asyncio.run(queue.enqueue(Task("f")))
            task = waiting.result(DEADLINE)
        assert task is not None
        assert task.func == "f"
        asyncio.run(queue.close())

    def test_a_blocking_object_starts_no_thread(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starters: list[threading.Thread] = []
        start = threading.Thread.start

        def noting(thread: threading.Thread) -> None:
            starters.append(threading.current_thread())
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", noting)
        with SQLiteBackend(path, events=True) as backend:
            assert backend.results is not None
            for _ in range(2):
                backend.enqueue(Task("f"))
                task = present(backend.queue.dequeue(timeout=None))
                backend.complete(task, 1)
                assert backend.result(task.id, timeout=None).value == 1
            assert backend.queue.dequeue(timeout=0.02) is None
            with pytest.raises(TimeoutError):
                backend.results.wait("none", timeout=0.02)
            backend.cleanup()
            backend.check()
        assert threading.current_thread() not in starters


class TestProcesses:
    async def test_two_processes_share_a_file(self, api: Api, queue: Any) -> None:
        await call(queue.enqueue, Task("f", ("from the parent",)))
        found = run_program(
            """
            with SQLiteQueue(path, clock=lambda: 1_800_000_000.0) as queue:
                task = queue.dequeue(worker="child")
                print(task.args[0], task.attempt)
                queue.complete(task)
                queue.enqueue(Task("g", ("from the child",)))
            """,
            api.path,
        )
        assert found == "from the parent 1"
        assert (await claim(queue)).args == ("from the child",)

    async def test_an_object_travels_to_a_process_as_a_pickle(self, api: Api) -> None:
        queue = api.queue(clock=time.time, retention=60.0)
        code = """
            import inspect, pickle
            queue = pickle.loads(bytes.fromhex(sys.argv[1]))
            async def use():
                for made in (queue.enqueue(Task("f")), queue.close()):
                    if inspect.isawaitable(made):
                        await made
            asyncio.run(use())
            """
        run_program(code, pickle.dumps(queue).hex())
        await call(queue.complete, await claim(queue))
        assert await call(queue.count_tasks, status="completed") == 1

    def test_a_spawned_process_uses_the_object_it_was_given(
        self, tmp_path: Path
    ) -> None:
        with (
            SQLiteQueue(tmp_path / "jobs.db") as queue,
            concurrent.futures.ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn")
            ) as pool,
        ):
            task_id = pool.submit(queue.enqueue, Task("f")).result(DEADLINE)
            task = queue.get_task(task_id)
            assert task is not None
            assert task.func == "f"


def make_twin(made: Any) -> Any:
    name = type(made).__name__.removeprefix("Async")
    return getattr(omniq_sqlite, name).from_async(made)


@pytest.mark.parametrize("kind", KINDS)
class TestFromAsync:
    @pytest.mark.parametrize(
        "run", [asyncio.to_thread, anyio.to_thread.run_sync, aside]
    )
    async def test_a_twin_works_in_any_other_thread(
        self, kind: str, tmp_path: Path, run: Callable[..., Awaitable[Any]]
    ) -> None:
        async with make_async(kind, tmp_path / "jobs.db") as made:
            await run(TOUCH[kind], make_twin(made))

    async def test_a_twin_is_refused_in_the_thread_of_the_loop(
        self, kind: str, tmp_path: Path
    ) -> None:
        async with make_async(kind, tmp_path / "jobs.db") as made:
            twin = make_twin(made)
            with pytest.raises(RuntimeError, match="loop"):
                TOUCH[kind](twin)

    async def test_closing_a_twin_leaves_the_async_object_open(
        self, kind: str, tmp_path: Path
    ) -> None:
        async with make_async(kind, tmp_path / "jobs.db") as made:
            twin = make_twin(made)
            await asyncio.to_thread(twin.close)
            await TOUCH[kind](made)
            with pytest.raises(StorageClosedError):
                await asyncio.to_thread(TOUCH[kind], twin)

    async def test_a_twin_in_memory_sees_what_the_async_object_sees(
        self, kind: str
    ) -> None:
        async with make_async(kind, ":memory:") as made:
            await asyncio.to_thread(TOUCH[kind], make_twin(made))

    def test_a_twin_whose_loop_has_ended_says_so_in_any_thread(
        self, kind: str, tmp_path: Path
    ) -> None:
        made = make_async(kind, tmp_path / "jobs.db")

        async def use() -> Any:
            await TOUCH[kind](made)
            return make_twin(made)

        twin, threads = asyncio.run(use()), Threads()
        with pytest.raises(StorageClosedError, match="loop has ended"):
            TOUCH[kind](twin)
        threads.start(TOUCH[kind], twin)
        with pytest.raises(StorageClosedError, match="loop has ended"):
            threads.join()
        asyncio.run(made.close())


class TestFromAsyncTwins:
    async def test_a_twin_and_its_async_object_share_the_tasks(
        self, tmp_path: Path
    ) -> None:
        async with AsyncSQLiteQueue(tmp_path / "jobs.db") as queue:
            twin = SQLiteQueue.from_async(queue)
            task_id = await asyncio.to_thread(twin.enqueue, Task("f"))
            task = await queue.dequeue()
            assert task is not None
            assert task.id == task_id
            await asyncio.to_thread(twin.complete, task)
            assert await queue.count_tasks() == 0

    async def test_the_errors_of_a_twin_are_the_same(self, tmp_path: Path) -> None:
        async with AsyncSQLiteQueue(tmp_path / "jobs.db") as queue:
            twin = SQLiteQueue.from_async(queue)
            await queue.enqueue(Task("f", id="a1"))
            with pytest.raises(DuplicateTaskError, match="a1"):
                await asyncio.to_thread(twin.enqueue, Task("f", id="a1"))

    async def test_a_twin_puts_tasks_into_a_transaction_of_its_thread(
        self, tmp_path: Path
    ) -> None:
        async with AsyncSQLiteQueue(tmp_path / "jobs.db") as queue:
            twin = SQLiteQueue.from_async(queue)

            def use() -> list[str]:
                with raw(tmp_path / "jobs.db", isolation_level="") as connection:
                    ids = twin.enqueue_on(connection, Task("f", id="a1"))
                    connection.commit()
                    return ids

            assert await asyncio.to_thread(use) == ["a1"]
            assert await queue.count_tasks() == 1

    async def test_a_waiting_twin_does_not_block_the_loop(self, tmp_path: Path) -> None:
        async with AsyncSQLiteQueue(tmp_path / "jobs.db") as queue:
            twin = SQLiteQueue.from_async(queue)
            waiting = started(asyncio.to_thread(twin.dequeue, timeout=DEADLINE))
            await in_wait(queue)
            await queue.enqueue(Task("f"))
            task = await asyncio.wait_for(waiting, DEADLINE)
            assert task is not None

    def test_a_twin_waits_no_longer_than_its_loop_runs(self, path: str) -> None:
        """`asyncio.run` cancels what is left; nobody cancelled the twin's call."""
        queue, threads = AsyncSQLiteQueue(path), Threads()

        async def leave_it() -> None:
            twin = SQLiteQueue.from_async(queue)
            threads.start(partial(twin.dequeue, timeout=None))
            await in_wait(queue)

        asyncio.run(leave_it())
        with pytest.raises(StorageClosedError, match="loop has ended"):
            threads.join()
        asyncio.run(queue.close())

    async def test_a_twin_of_a_backend_has_its_parts(self, tmp_path: Path) -> None:
        async with AsyncSQLiteBackend(tmp_path / "jobs.db", events=True) as backend:
            twin = SQLiteBackend.from_async(backend)

            def use() -> tuple[Any, list[str]]:
                assert twin.events is not None
                task_id = twin.enqueue(Task("f"))
                task = twin.queue.dequeue()
                assert task is not None
                twin.complete(task, 7)
                value = twin.result(task_id, timeout=0).value
                return value, [str(event.type) for event in twin.events.query()]

            value, types = await asyncio.to_thread(use)
            assert value == 7
            assert types == ["enqueued", "dequeued", "completed"]

    async def test_a_twin_of_an_event_storage_follows(self, tmp_path: Path) -> None:
        async with AsyncSQLiteEventStorage(tmp_path / "jobs.db") as events:
            twin = SQLiteEventStorage.from_async(events)
            await events.log(TaskEvent("first"))

            def use() -> str:
                following = twin.follow(after="0")
                event = next(following)
                following.close()
                return str(event.type)

            assert await aside(use) == "first"

    async def test_a_twin_of_a_result_storage_waits(self, tmp_path: Path) -> None:
        async with AsyncSQLiteResultStorage(tmp_path / "jobs.db") as results:
            twin = SQLiteResultStorage.from_async(results)
            waiting = started(aside(twin.wait, "a1", timeout=DEADLINE))
            await in_wait(results)
            await results.store(TaskResult("a1", ResultStatus.SUCCESS, 7))
            assert (await waiting).value == 7


# =============================================================================
# Connection
# =============================================================================


def pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


class TestSettings:
    @pytest.fixture
    def opened(self, path: str, spied: Any) -> Iterator[list[sqlite3.Connection]]:
        """All connections of an object: the writer's, a reader's, the waiter's."""
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            queue.dequeue()
            until(lambda: queue.dequeue(timeout=0.01) or len(Spied.opened) >= 3)
            yield Spied.opened

    def test_the_file_is_in_wal_mode(self, path: str, opened: Any) -> None:
        assert {pragma(c, "journal_mode") for c in opened} == {"wal"}

    def test_foreign_keys_are_checked(self, opened: Any) -> None:
        assert {pragma(c, "foreign_keys") for c in opened} == {1}

    def test_sqlite_never_waits_itself(self, opened: Any) -> None:
        assert {pragma(c, "busy_timeout") for c in opened} == {0}

    def test_the_schema_is_not_trusted(self, opened: Any) -> None:
        assert {pragma(c, "trusted_schema") for c in opened} == {0}

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="Python cannot set it")
    def test_the_schema_cannot_be_written_to_by_hand(self, opened: Any) -> None:
        for connection in opened:
            connection.execute("PRAGMA writable_schema = ON")
            with pytest.raises(sqlite3.OperationalError, match="may not be modified"):
                connection.execute("DELETE FROM sqlite_schema")

    def test_only_the_writer_can_write(self, opened: Any) -> None:
        assert sorted(pragma(c, "query_only") for c in opened)[:2] == [0, 1]
        assert [pragma(c, "query_only") for c in opened].count(0) == 1

    def test_a_wal_that_was_reset_is_cut(self, opened: Any) -> None:
        assert {pragma(c, "journal_size_limit") for c in opened} == {16_777_216}

    def test_a_new_file_gives_pages_back_bit_by_bit(self, opened: Any) -> None:
        assert {pragma(c, "auto_vacuum") for c in opened} == {2}

    def test_a_trigger_of_a_hostile_file_runs_no_function(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called = []

        class Armed(sqlite3.Connection):
            """As if the application had registered a function everywhere."""

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.create_function("evil", 0, lambda: called.append("evil"))

        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        with raw(path, factory=Armed) as connection:
            connection.execute(
                "CREATE TRIGGER hostile AFTER INSERT ON omniq_task"
                " BEGIN SELECT evil(); END"
            )
        factory = partial(sqlite3.connect, factory=Armed)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        with SQLiteQueue(path) as queue, pytest.raises(OmniQError, match="unsafe use"):
            queue.enqueue(Task("g"))
        assert called == []
        assert statuses(path) == ["pending"]

    def test_an_old_library_is_refused(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 9))
        with pytest.raises(UnsupportedSQLiteError):
            SQLiteQueue(path).enqueue(Task("f"))
        assert not os.path.exists(path)

    def test_on_macos_every_flush_reaches_the_disk(
        self, path: str, spied: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There fsync alone does not."""
        flushed: list[tuple[int, int]] = []

        def noting(fd: int, command: int) -> None:
            flushed.append((os.fstat(fd).st_ino, command))

        monkeypatch.setattr(omniq_sqlite, "_network_filesystem", lambda _: None)
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", noting)
        monkeypatch.setattr(sys, "platform", "darwin")
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            assert flushed == [(os.stat(path + "-wal").st_ino, 51)]
            assert len(Spied.opened) == 2
            assert {pragma(c, "fullfsync") for c in Spied.opened} == {1}
            assert {pragma(c, "checkpoint_fullfsync") for c in Spied.opened} == {1}


def refuse_flush(_: omniq_sqlite._Wal) -> None:
    raise OSError(5, "Input/output error")


class TestFlushes:
    """What must outlive a power cut is flushed before anybody is told."""

    @pytest.fixture
    def log(self, spied: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Every statement, and the flushes among them."""
        flush = omniq_sqlite._Wal.flush

        def spy(wal: omniq_sqlite._Wal) -> None:
            flush(wal)
            spied.append("FLUSH")

        monkeypatch.setattr(omniq_sqlite._Wal, "flush", spy)
        return spied

    @staticmethod
    def ends(log: list[str]) -> list[str]:
        """Return how each transaction ended: with a commit or with a flush of it."""
        commits = "\n".join(log).split("COMMIT")[1:]
        return ["FLUSH" if "FLUSH" in rest else "COMMIT" for rest in commits]

    def run(self, path: str, log: list[str], synchronous: str) -> list[str]:
        with SQLiteQueue(path, synchronous=synchronous) as queue:
            queue.count_tasks()
            log.clear()
            queue.enqueue_many([Task("f"), Task("f"), Task("once", max_attempts=1)])
            first = queue.dequeue()
            second = queue.dequeue()
            assert first is not None
            assert second is not None
            queue.extend(first)
            queue.release(first)
            first = queue.dequeue()
            assert first is not None
            queue.complete(first)
            queue.fail(second, "e", retry=False)
            assert queue.dequeue() is not None  # its last attempt
            queue.cancel_all()
            return self.ends(log)

    @pytest.mark.parametrize("synchronous", ["FULL", "EXTRA"])
    def test_a_claim_a_heartbeat_and_a_release_wait_for_no_disk(
        self, path: str, log: list[str], synchronous: str
    ) -> None:
        assert self.run(path, log, synchronous)[-10:] == [
            "FLUSH",  # enqueue_many
            *["COMMIT"] * 5,  # two claims, extend, release, claim
            *["FLUSH"] * 4,  # complete, fail, the claim of a last attempt, cancel_all
        ]

    @pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
    def test_a_weaker_setting_flushes_nothing(
        self, path: str, log: list[str], synchronous: str
    ) -> None:
        assert self.run(path, log, synchronous)[-10:] == ["COMMIT"] * 10
        assert f"PRAGMA synchronous = {synchronous}" in log

    def test_a_group_with_one_durable_operation_is_flushed(
        self, path: str, log: list[str]
    ) -> None:
        threads = Threads()
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            log.clear()
            with write_lock(path):
                threads.start(queue.dequeue)
                until(lambda: is_pending(queue, 1))
                threads.start(queue.enqueue, Task("g"))
                all_in_line(queue, 2)
            threads.join()
            assert self.ends(log) == ["FLUSH"]

    def test_what_is_found_done_already_is_flushed_too(
        self, path: str, log: list[str]
    ) -> None:
        """Whoever did it may still wait for the disk."""
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f", id="there"))
            log.clear()
            with pytest.raises(DuplicateTaskError):
                queue.enqueue(Task("f", id="there"))
            assert log[-2:] == ["ROLLBACK", "FLUSH"]

    def test_nobody_is_told_of_what_the_disk_refused(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f", id="before"))
            with monkeypatch.context() as patch:
                patch.setattr(omniq_sqlite._Wal, "flush", refuse_flush)
                with pytest.raises(DatabaseAccessError, match="not outlive a power"):
                    queue.enqueue(Task("f", id="unsure"))
            found = {task.id for task in queue.list_tasks()}
            assert found == {"before", "unsure"}

    async def test_behind_a_flush_that_failed_nothing_is_acknowledged(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its frames may be a hole in the WAL, where a recovery would stop."""
        flush, failing = omniq_sqlite._Wal.flush, [True]

        def fail_once(wal: omniq_sqlite._Wal) -> None:
            if failing:
                failing.clear()
                refuse_flush(wal)
            flush(wal)

        monkeypatch.setattr(omniq_sqlite._Wal, "flush", fail_once)
        queue = api.queue()
        for text in ("not outlive a power cut", "open a new one"):
            with pytest.raises(DatabaseAccessError, match=text):
                await call(queue.enqueue, Task("f"))
        assert statuses(api.path) == ["pending"]
        task = await call(queue.dequeue)  # that promises nothing
        with pytest.raises(DatabaseAccessError, match="open a new one"):
            await call(queue.complete, task)
        await call(queue.release, task)
        await call(queue.close)
        await call(api.queue().enqueue, Task("f"))
        assert statuses(api.path) == ["pending"] * 2

    async def test_a_claim_whose_flush_failed_is_given_back(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = api.queue()
        await call(queue.enqueue, Task("f", max_attempts=1))
        monkeypatch.setattr(omniq_sqlite._Wal, "flush", refuse_flush)
        with pytest.raises(DatabaseAccessError):
            await call(queue.dequeue)
        await soon(lambda: statuses(api.path) == ["pending"])
        assert select(api.path, "SELECT attempt FROM omniq_task") == [0]

    async def test_a_wal_that_cannot_be_opened_refuses_before_the_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(24, "Too many open files")

        queue = api.queue()
        await call(queue.count_tasks)
        with monkeypatch.context() as patch:
            patch.setattr(omniq_sqlite, "_Wal", fail)
            with pytest.raises(DatabaseAccessError, match="Too many"):
                await call(queue.enqueue, Task("f", id="a1"))
        assert statuses(api.path) == []
        await call(queue.enqueue, Task("f", id="a1"))

    async def test_what_cannot_be_written_is_not_said_to_be_unflushed(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def open_to_read(location: str, **options: Any) -> sqlite3.Connection:
            location = location.replace("mode=rw", "mode=ro")
            opened: sqlite3.Connection = sqlite3.connect(location, **options)
            return opened

        def deny(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        await call(api.queue().enqueue, Task("f"))  # and keeps the WAL
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", open_to_read)
        monkeypatch.setattr(omniq_sqlite, "_Wal", deny)
        with pytest.raises(ReadOnlyDatabaseError):
            await call(api.queue().enqueue, Task("f"))

    async def test_a_commit_without_memory_is_no_commit(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`sqlite3` raises MemoryError for it, no error of its own."""
        scarce: list[None] = []

        class Scarce(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                if sql == "COMMIT" and scarce:
                    super().execute("ROLLBACK")
                    raise MemoryError
                return super().execute(sql, *parameters)

        factory = partial(sqlite3.connect, factory=Scarce)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        queue = api.queue()
        await call(queue.enqueue, Task("f"))
        scarce.append(None)
        with pytest.raises(OmniQError, match="out of memory"):
            await call(queue.enqueue, Task("f"))
        scarce.clear()
        assert statuses(api.path) == ["pending"]
        await call(queue.enqueue, Task("f"))

    def test_the_write_lock_is_free_while_one_flushes(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flush = omniq_sqlite._Wal.flush
        found: list[Any] = []

        def spy(wal: omniq_sqlite._Wal) -> None:
            with closing(sqlite3.connect(path, timeout=0.0)) as other:
                other.execute("BEGIN IMMEDIATE")
                found.extend(other.execute("SELECT id FROM omniq_task").fetchall())
                other.rollback()
            flush(wal)

        with SQLiteQueue(path) as queue:
            monkeypatch.setattr(omniq_sqlite._Wal, "flush", spy)
            queue.enqueue(Task("f", id="first"))
        assert found == [("first",)]

    def test_the_wal_of_another_connection_is_not_flushed(
        self, path: str, log: list[str]
    ) -> None:
        """As when one had to be given up, and its WAL went with it."""
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            database = database_of(queue)
            before = database.wal
            with raw(path) as stranger:
                database.wal = omniq_sqlite._Wal(stranger, database.wal_path)
                queue.enqueue(Task("f"))
            assert log[-1] == "FLUSH"
            assert before is not None
            assert database.wal is not None
            assert database.wal.connection is before.connection

    @pytest.mark.parametrize("linked", ["file", "folder"])
    def test_the_wal_of_a_link_is_beside_the_file(
        self, tmp_path: Path, log: list[str], linked: str
    ) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with SQLiteBackend(folder / "jobs.db") as backend:
            backend.enqueue(Task("f"))
        if linked == "file":
            path = tmp_path / "other.db"
            path.symlink_to(folder / "jobs.db")
        else:
            (tmp_path / "link").symlink_to(folder)
            path = tmp_path / "link" / "jobs.db"
        log.clear()
        with SQLiteBackend(path) as backend:
            backend.enqueue(Task("g"))
            assert log[-2:] == ["COMMIT", "FLUSH"]
            database = database_of(backend.queue)
            assert database.wal_path == str(folder / "jobs.db-wal")
            assert backend.queue.count_tasks() == 2
            assert backend.check() == []
        assert [p.name for p in folder.iterdir()] == ["jobs.db"]

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
    def test_the_wal_is_closed_with_its_connection(self, path: str) -> None:
        def opened() -> list[str]:
            folder = Path("/proc/self/fd")
            links = [os.readlink(f) for f in folder.iterdir() if f.is_symlink()]
            return [link for link in links if link.startswith(path)]

        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            before = len(opened())
            pid = os.fork()
            if pid == 0:
                os._exit(len(opened()))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            queue.enqueue(Task("f"))
            assert len(opened()) <= before
        assert opened() == []

    @pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
    def test_the_system_calls_agree(self, tmp_path: Path) -> None:
        program = command(
            """
            queue = SQLiteQueue(path)
            queue.enqueue_many([Task("f")] + [Task("f") for _ in range(99)])
            os.write(2, b"MARK")
            claimed = [queue.dequeue() for _ in range(20)]
            os.write(2, b"MARK")
            for task in claimed:
                queue.complete(task)
            os.write(2, b"MARK")
            os._exit(0)
            """,
            tmp_path / "jobs.db",
        )
        calls = "trace=fsync,fdatasync,write"
        traced = ["strace", "-f", "-o", str(tmp_path / "calls"), "-e", calls, *program]
        done = subprocess.run(traced, env=environment(), timeout=DEADLINE, check=False)
        if done.returncode != 0:
            pytest.skip("strace may not trace here")
        parts = (tmp_path / "calls").read_text().split("MARK")
        flushes = [part.count("fsync(") + part.count("fdatasync(") for part in parts]
        assert flushes[0] > 0
        assert flushes[1] == 0
        assert flushes[2] >= 20


class TestGroupCommit:
    async def test_no_open_cursor_ends_in_another_thread_than_it_began_in(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would reset a statement that the connection's thread is about to use."""
        astray: list[str] = []

        class Marked(sqlite3.Cursor):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.thread = threading.get_ident()

            def close(self) -> None:
                self.thread = 0
                super().close()

            def __del__(self) -> None:
                if self.thread not in (0, threading.get_ident()):
                    astray.append("a cursor")

        class Marking(sqlite3.Connection):
            def cursor(self, *_: Any, **__: Any) -> Any:
                return super().cursor(Marked)

            def executemany(self, sql: str, *args: Any) -> Any:
                return self.cursor().executemany(sql, *args)

        factory = partial(sqlite3.connect, factory=Marking)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        async with AsyncSQLiteBackend(path, events=True) as backend:
            assert backend.results is not None
            assert backend.events is not None
            await backend.enqueue_many([Task("f", id="a"), Task("g"), Task("h")])
            tasks = await backend.queue.dequeue_many(2)
            await backend.complete(tasks[0], 1, enqueue=[Task("next")])
            for call_again in (
                backend.enqueue_many([Task("x"), Task("x", id=tasks[1].id)]),
                backend.complete(tasks[0], 1, enqueue=[Task("next")]),
                backend.queue.extend(tasks[0]),
            ):
                with pytest.raises((DuplicateTaskError, LeaseLostError)):
                    await call_again
            await backend.fail(tasks[1], ValueError(), retry=False)
            await backend.queue.retry_all()
            await backend.results.store(TaskResult("a", ResultStatus.SUCCESS))
            await backend.events.log_many([TaskEvent("a"), TaskEvent("b")])
            await backend.cleanup()
            await backend.check()
        gc.collect()
        assert astray == []

    async def test_each_of_many_gets_its_own_answer_or_error(
        self, path: str, spied: list[str]
    ) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue_many(
                [Task("old", id="taken0"), Task("old", id="taken1")]
            )
            spied.clear()
            tasks = [Task("f", id=f"new{i}") for i in range(98)]
            tasks[30:30] = [Task("f", id="taken0"), Task("f", id="taken1")]
            with write_lock(path):
                calls = [asyncio.ensure_future(queue.enqueue(task)) for task in tasks]
                await asyncio.to_thread(all_in_line, queue, 100)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for task, outcome in zip(tasks, outcomes, strict=True):
                if task.id.startswith("taken"):
                    assert isinstance(outcome, DuplicateTaskError)
                    assert outcome.task_id == task.id
                else:
                    assert outcome == task.id
            assert spied.count("COMMIT") == 1
            assert await queue.count_tasks() == 100

    def test_threads_that_write_at_once_share_a_commit(
        self, path: str, spied: list[str]
    ) -> None:
        threads = Threads()
        with SQLiteQueue(path) as queue:
            spied.clear()
            with write_lock(path):
                for _ in range(16):
                    threads.start(queue.enqueue, Task("f"))
                all_in_line(queue, 16)
            threads.join()
            assert spied.count("COMMIT") == 1
            assert queue.count_tasks() == 16

    def test_one_that_fails_takes_nobody_along(self, path: str) -> None:
        threads, lost = Threads(), []

        def complete(queue: SQLiteQueue, task: Task) -> None:
            try:
                queue.complete(task)
            except LeaseLostError as error:
                lost.append(error.task_ids)

        with SQLiteQueue(path) as queue:
            queue.enqueue_many([Task("f", id=f"t{i}") for i in range(6)])
            tasks = queue.dequeue_many(6)
            queue.cancel("t2")
            with write_lock(path):
                for task in tasks:
                    threads.start(complete, queue, task)
                all_in_line(queue, 6)
            threads.join()
            assert lost == [["t2"]]
            assert statuses(path) == ["cancelled"]

    def test_one_that_fails_in_the_middle_leaves_nothing_behind(
        self, path: str
    ) -> None:
        threads, refused = Threads(), []

        def complete(backend: SQLiteBackend, task: Task) -> None:
            try:
                backend.complete(task, 1, enqueue=[Task("g", id="taken")])
            except DuplicateTaskError as error:
                refused.append(error.task_id)

        with SQLiteBackend(path) as backend:
            backend.enqueue_many([Task("f"), Task("f", id="taken")])
            task = present(backend.queue.dequeue())
            with write_lock(path):
                threads.start(backend.enqueue, Task("f"))
                threads.start(complete, backend, task)
                all_in_line(backend, 2)
            threads.join()
            assert refused == ["taken"]
            assert statuses(path) == ["running", "pending", "pending"]
            assert backend.results is not None
            assert backend.results.list_results() == []

    @pytest.mark.parametrize("name", ["_MAX_GROUP", "_MAX_GROUP_SECONDS"])
    def test_a_group_is_bounded_so_that_others_get_a_turn(
        self, path: str, spied: list[str], monkeypatch: Any, name: str
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, name, 1 if name == "_MAX_GROUP" else -1)
        threads = Threads()
        with SQLiteQueue(path, synchronous="OFF") as queue:
            spied.clear()
            with write_lock(path):
                for i in range(9):
                    threads.start(queue.enqueue, Task("f", id=f"t{i}"))
                    until(partial(is_pending, queue, i + 1))
            threads.join()
            assert spied.count("COMMIT") == 9
            assert select(path, "SELECT id FROM omniq_task ORDER BY seq") == [
                f"t{i}" for i in range(9)
            ]

    def test_a_group_that_takes_long_is_cut_after_25_milliseconds(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path) as queue:
            database = database_of(queue)
            database.read(lambda _: None)
            requests = [
                omniq_sqlite._Operation(lambda _: time.sleep(0.005)) for _ in range(20)
            ]
            for request in requests:
                request.wake = nothing
                database.enlist(request)
            while database.pending:
                spied.clear()
                before = len(database.pending)
                database.serve()
                assert spied.count("COMMIT") == 1
                assert 1 <= before - len(database.pending) <= 6
            assert all(request.succeeded for request in requests)
            database.hand_over()

    def test_who_leads_commits_one_group_and_passes_on(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_MAX_GROUP", 1)
        threads, leaders = Threads(), []
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            database, run_group = database_of(queue), database_of(queue)._run_group

            def noting(*args: Any) -> None:
                leaders.append(threading.current_thread())
                run_group(*args)

            monkeypatch.setattr(database, "_run_group", noting)
            with write_lock(path):
                for i in range(6):
                    threads.start(queue.enqueue, Task("f"))
                    until(partial(is_pending, queue, i + 1))
            threads.join()
        assert leaders == threads.started

    async def test_a_claim_that_waits_for_its_transaction_looks_once(
        self, path: str, spied: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_MAX_GROUP_SECONDS", -1)  # one each
        async with AsyncSQLiteQueue(path, synchronous="OFF") as queue:
            await queue.enqueue_many([Task("f") for _ in range(30)])
            spied.clear()
            claimed = await asyncio.gather(*(queue.dequeue() for _ in range(30)))
        assert None not in claimed
        assert spied.count("look") == 30

    def test_a_group_that_a_full_disk_ended_is_run_again_one_by_one(
        self, path: str
    ) -> None:
        threads, full, ran = Threads(), [], []

        def enqueue(queue: SQLiteQueue, text: str) -> None:
            try:
                ran.append(queue.enqueue(Task("f", (text,))))
            except DatabaseFullError as error:
                full.append(error)

        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            [writer] = database_of(queue).writer.idle
            pages = pragma(writer, "page_count") + 20
            writer.execute(f"PRAGMA max_page_count = {pages}")
            with write_lock(path):
                for i in range(10):
                    threads.start(enqueue, queue, "x" * (200_000 if i == 4 else 10))
                all_in_line(queue, 10)
            threads.join()
            assert len(full) == 1
            assert len(ran) == 9
            assert statuses(path) == ["pending"] * 10
            writer.execute("PRAGMA max_page_count = 100000")
            queue.enqueue(Task("f", ("x" * 200_000,)))  # the same object works on

    def test_an_operation_that_waits_behind_a_lost_group_keeps_its_turn(
        self, path: str
    ) -> None:
        """Requests that were put back stand before those that came later."""
        with SQLiteQueue(path) as queue:
            database = database_of(queue)
            order: list[str] = []

            def note(name: str, _: object) -> None:
                order.append(name)

            requests = [omniq_sqlite._Operation(partial(note, n)) for n in "abc"]
            database.pending.extend(requests[2:])
            for request in requests[:2]:
                request.taken = True
            database._put_back(requests[:2])
            database.leader = requests[0]
            requests[0].wake = requests[1].wake = requests[2].wake = lambda: None
            database.serve()
            database.hand_over()
            assert order == ["a", "b", "c"]

    async def test_a_blocking_leader_hands_over_to_an_async_caller(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_MAX_GROUP", 1)
        threads = Threads()
        blocking = SQLiteBackend(path, queue=SQLiteQueue(path))
        shared = blocking.to_async()
        database = database_of(blocking.queue)
        with write_lock(path):
            threads.start(blocking.enqueue, Task("f"))
            await soon(lambda: len(database.pending) == 1)
            second = asyncio.ensure_future(shared.enqueue(Task("g")))
            await soon(lambda: len(database.pending) == 2)
            threads.start(blocking.enqueue, Task("h"))
            await soon(lambda: len(database.pending) == 3)
        await asyncio.wait_for(second, DEADLINE)
        await asyncio.to_thread(threads.join)
        assert select(path, "SELECT func FROM omniq_task ORDER BY seq") == list("fgh")
        blocking.queue.close()
        await shared.close()
        blocking.close()

    def test_one_that_comes_while_the_object_is_closed_is_refused(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = SQLiteQueue(path)
        queue.enqueue(Task("f"))
        queue.close()
        gateway: Any = queue._async._gateway
        woken = omniq_sqlite._Latch()
        request = omniq_sqlite._Operation(lambda _: None)
        request.wake = woken
        monkeypatch.setattr(omniq_sqlite._Latch, "wait", None)  # nobody would wake it
        with pytest.raises(StorageClosedError):
            gateway._serve_until_done(request, woken)

    def test_who_leaves_in_the_middle_is_neither_run_nor_the_leader(
        self, path: str
    ) -> None:
        with SQLiteQueue(path) as queue:
            gateway: Any = queue._async._gateway
            database = database_of(queue)
            latches = [omniq_sqlite._Latch() for _ in range(3)]
            first, second, third = (
                omniq_sqlite._Operation(lambda _: None) for _ in latches
            )
            third.wake = latches[2]
            assert database.enlist(first)
            assert not database.enlist(second)
            assert not database.enlist(third)
            gateway._leave(second, latches[1])
            assert list(database.pending) == [first, third]
            gateway._leave(first, latches[0])
            assert list(database.pending) == [third]
            assert database.leader is third
            assert latches[2].wait(0.0)
            third.taken = True  # and what has come of it was lost
            database.pending.clear()
            gateway._leave(third, latches[2])
            assert database.leader is None

    def test_an_exception_right_after_the_commit_undoes_nothing(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As of a signal handler; the others of the group are not run again."""

        class Raised(BaseException):
            pass

        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            database, real = database_of(queue), database_of(queue)._finish
            ran: list[str] = []

            def note(name: str, _: object) -> None:
                ran.append(name)

            requests = [omniq_sqlite._Operation(partial(note, name)) for name in "ab"]
            for request in requests:
                request.wake = lambda: None
                database.enlist(request)

            def raise_once(*_: object) -> None:
                monkeypatch.setattr(database, "_finish", real)
                raise Raised

            monkeypatch.setattr(database, "_finish", raise_once)
            with pytest.raises(Raised):
                database.serve()
            assert ran == ["a", "b"]
            assert all(request.succeeded for request in requests)
            assert not database.pending
            database.hand_over()

    def test_an_exception_while_leaving_keeps_nobody_from_leading(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As of a signal handler, at the first statement of the clean-up."""

        class Raised(BaseException):
            pass

        with SQLiteQueue(path) as queue:
            gateway: Any = queue._async._gateway
            real = gateway._leave

            def raise_once(*_: object) -> None:
                monkeypatch.setattr(gateway, "_leave", real)
                raise Raised

            monkeypatch.setattr(gateway, "_leave", raise_once)
            with pytest.raises(Raised):
                queue.enqueue(Task("f"))
            assert database_of(queue).leader is None
            queue.enqueue(Task("g"))

    def test_who_leaves_waits_for_the_transaction_that_has_it(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            gateway: Any = queue._async._gateway
            database, woken = database_of(queue), omniq_sqlite._Latch()
            request = omniq_sqlite._Operation(lambda _: None)
            request.wake = woken
            request.taken = True  # by another thread, which puts it back

            def put_back() -> None:
                database._put_back([request])
                woken()
                woken()  # twice, as by a leader and a close

            later = threading.Timer(0.05, put_back)
            later.start()
            gateway._leave(request, woken)
            assert request.done
            assert not database.pending
            later.join()

    def test_an_error_keeps_what_caused_it(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f", id="t"))
            with pytest.raises(DuplicateTaskError) as caught:
                queue.enqueue(Task("f", id="t"))
            assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)

    async def test_a_write_that_nothing_is_in_the_way_of_never_sleeps(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[int] = []
        sleep = time.sleep

        def noting(seconds: float) -> None:
            slept.append(threading.get_ident())
            sleep(seconds)

        queue = api.queue()
        await call(queue.count_tasks)
        monkeypatch.setattr(time, "sleep", noting)
        await call(queue.enqueue, Task("f"))
        await call(queue.complete, await claim(queue))
        threads = database_of(queue).threads
        ours = {threading.get_ident(), *(each._thread.ident for each in threads)}
        assert ours.isdisjoint(slept)


class TestBusyFile:
    @pytest.fixture
    def slept(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """What the module would have slept, in seconds."""
        slept: list[float] = []
        sleeper = types.SimpleNamespace(sleep=slept.append)
        monkeypatch.setattr(omniq_sqlite, "time", sleeper)
        return slept

    def test_a_long_wait_for_the_lock_does_not_spin(self, slept: list[float]) -> None:
        for waited in (0.0, 0.1, 30.0):
            omniq_sqlite._Database.pause(waited)
        assert 0.000_5 <= slept[0] <= 0.002
        assert 0.000_25 <= slept[1] <= 0.001
        assert slept[2] >= 0.000_08

    async def test_opening_a_file_that_is_up_to_date_waits_for_no_writer(
        self, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("f"))
        with write_lock(path):
            with SQLiteQueue(path, busy_timeout=0.0) as queue:
                assert queue.count_tasks() == 1
            async with AsyncSQLiteQueue(path, busy_timeout=0.0) as other:
                assert await other.count_tasks() == 1

    def test_what_waits_for_the_lock_looks_again(
        self, path: str, spied: list[str]
    ) -> None:
        """Else it would claim by what it saw up to `busy_timeout` ago."""
        threads = Threads()
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            with write_lock(path):
                threads.start(queue.dequeue)
                until(lambda: spied.count("look") >= 5)
            threads.join()
            assert statuses(path) == ["running"]

    def test_a_claim_that_finds_nothing_any_more_waits_no_longer(
        self, path: str
    ) -> None:
        threads, got = Threads(), []
        with SQLiteQueue(path, busy_timeout=DEADLINE) as queue:
            queue.enqueue(Task("f"))
            with raw(path, check_same_thread=False) as other:
                other.execute("BEGIN IMMEDIATE")
                threads.start(lambda: got.append(queue.dequeue()))
                until(lambda: database_of(queue).pending)
                other.execute("DELETE FROM omniq_task")
                other.execute("COMMIT")
                other.execute("BEGIN IMMEDIATE")
                threads.join()
        assert got == [None]

    def test_a_write_that_opens_the_file_waits_for_whoever_has_it_to_themselves(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody can even look at a file that is not in WAL mode yet."""
        threads, paused = Threads(), []
        pause = omniq_sqlite._Database.pause

        def noting(waited: float) -> None:
            paused.append(waited)
            pause(waited)

        monkeypatch.setattr(omniq_sqlite._Database, "pause", staticmethod(noting))
        queue = SQLiteQueue(path)
        with raw(path, check_same_thread=False) as other, closing(queue):
            other.execute("CREATE TABLE mine (x)")
            other.execute("BEGIN EXCLUSIVE")
            threads.start(queue.enqueue, Task("f"))
            until(lambda: len(paused) >= 3 or threads.have_ended())
            other.execute("COMMIT")
            threads.join()
        assert statuses(path) == ["pending"]


PRODUCER = """
queue = SQLiteQueue(path, synchronous="NORMAL")
queue.enqueue(Task("ready", queue="other"))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    time.sleep(0.02)
    queue.enqueue(Task("f"))
    print(time.monotonic(), flush=True)
queue.close()
"""


class TestWaking:
    def latencies(self, programs: Programs, path: str, dequeue: Any) -> list[float]:
        """Return how much later than a line in a pipe a commit elsewhere arrives.

        Without the pipe this would measure how busy the machine is.
        """
        program = programs.start(PRODUCER, path)
        assert programs.read(program) == "ready"
        committed: list[float] = []
        heard: list[float] = []

        def listen() -> None:
            for _ in range(30):
                committed.append(float(programs.read(program)))
                heard.append(time.monotonic())

        threads, had = Threads(), []
        threads.start(listen)
        programs.go(program)
        for _ in range(30):
            dequeue()
            had.append(time.monotonic())
        threads.join()
        programs.finish(program)
        return sorted(
            mine - max(pipe, at)
            for mine, pipe, at in zip(had, heard, committed, strict=True)
        )

    @pytest.mark.parametrize("form", ["blocking", "async", "polled"])
    def test_a_waiter_wakes_within_milliseconds_of_a_commit_elsewhere(
        self,
        programs: Programs,
        path: str,
        form: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if form == "polled":  # as where the system does not tell of writes
            monkeypatch.setattr(omniq_sqlite._Bell, "_watch_wal", lambda _: None)
        if form != "async":
            with SQLiteQueue(path) as queue:
                self.judge(programs, path, partial(queue.dequeue, timeout=DEADLINE))
            return
        with asyncio.Runner() as runner:
            other = AsyncSQLiteQueue(path)
            self.judge(
                programs,
                path,
                lambda: runner.run(other.dequeue(timeout=DEADLINE)),
            )
            runner.run(other.close())

    def judge(self, programs: Programs, path: str, dequeue: Any) -> None:
        """The best of some rounds counts: other programs use this machine, too."""
        median = late = 0.0
        for _ in range(6):
            found = self.latencies(programs, path, dequeue)
            median, late = found[len(found) // 2], found[int(len(found) * 0.95)]
            if median <= 0.005 and late <= 0.020:
                return
        pytest.fail(f"median {median * 1e3:.1f} ms, 95 % {late * 1e3:.1f} ms")

    def test_waiting_costs_less_than_one_percent_of_a_core(self, path: str) -> None:
        threads = Threads()
        with SQLiteQueue(path) as queue:
            for _ in range(5):
                threads.start(partial(queue.dequeue, timeout=None))
            until(lambda: len(database_of(queue).bell.waiters) == 5)
            self.judge_cost(time.sleep)
        with pytest.raises(StorageClosedError):
            threads.join()

    async def test_waiting_in_a_loop_costs_as_little(self, path: str) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            waiting = [
                asyncio.ensure_future(queue.dequeue(timeout=None)) for _ in range(5)
            ]
            await soon(lambda: len(database_of(queue).bell.waiters) == 5)
            self.judge_cost(time.sleep)  # the polling is another thread's
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(error) for error in done} == {StorageClosedError}

    @staticmethod
    def judge_cost(sleep: Callable[[float], None]) -> None:
        """On a busy machine a bare loop of sleeps costs more, too: two of those.

        Where the system does not tell of writes, waiting costs up to two percent.
        """
        factor = 1 if sys.platform == "linux" else 4
        used = 0.0
        for _ in range(6):
            began = time.process_time()
            sleep(0.4)
            used = time.process_time() - began
            began = time.process_time()
            for _ in range(int(0.4 / omniq_sqlite.POLL_INTERVAL)):
                sleep(omniq_sqlite.POLL_INTERVAL)
            both = time.process_time() - began  # the waiters go on meanwhile
            if used < 0.004 * factor or used < 2 * factor * (both - used):
                return
        pytest.fail(f"{used / 0.4:.1%} of a core")

    class Wal:
        """Stands for what tells of writes to the WAL: always, or never."""

        def __init__(self, written: bool) -> None:
            self.written = written
            self.asked: list[float] = []

        def wait(self, timeout: float) -> bool:
            self.asked.append(timeout)
            return self.written

        def close(self) -> None: ...

    def test_writers_that_never_rest_do_not_keep_a_waiter_busy(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        bell = database_of(SQLiteQueue(path)).bell
        bell.wal = self.Wal(written=True)
        with monkeypatch.context() as patch:  # nobody sleeps in truth
            patch.setattr(time, "monotonic", lambda: 100.0)
            for _ in range(6):
                bell.pause(slept.append, 1.0)
        # The first ones are looked for at once.
        assert slept == pytest.approx([*[0.0005] * 4, 0.006, 0.012])

    def test_looks_grow_rare_when_nobody_writes(self, path: str) -> None:
        bell = database_of(SQLiteQueue(path)).bell
        bell.wal = wal = self.Wal(written=False)
        for _ in range(9):
            bell.pause(lambda _: None, 1.0)
        assert wal.asked[:4] == [0.0005, 0.001, 0.002, 0.004]
        assert wal.asked[7:] == [0.05, 0.05]
        bell.pause(lambda _: None, 0.01)  # whoever has to leave earlier does
        assert wal.asked[-1] == 0.01
        wal.written = True
        bell.pause(lambda _: None, 1.0)
        bell.pause(lambda _: None, 1.0)
        assert wal.asked[-1] == 0.0005

    def test_a_change_that_nothing_told_of_makes_them_frequent_again(
        self, path: str
    ) -> None:
        with SQLiteQueue(path) as queue:
            bell = database_of(queue).bell
            bell.poll()
            bell.distance = 0.05
            bell.poll()
            assert bell.distance == 0.05
            queue.enqueue(Task("f"))
            bell.poll()
            assert bell.distance == 0.0005

    def test_a_waiter_that_rang_itself_does_not_sleep_on(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.count_tasks()
            bell = database_of(queue).bell
            monkeypatch.setattr(bell, "poll", bell.ring)
            monkeypatch.setattr(bell, "pause", None)
            gateway = queue._async._gateway
            gateway.wait(bell.generation, DEADLINE).close()
            omniq_sqlite._drive(gateway.wait, bell.generation, DEADLINE)

    def test_how_long_a_waiter_has_patience(self, path: str) -> None:
        patience = database_of(SQLiteQueue(path, clock=lambda: 100.0)).patience
        assert patience(None, None) == float("inf")
        assert patience(5.0, None) == 5.0
        assert patience(None, 103.0) == 3.0
        assert patience(1.0, 103.0) == 1.0
        assert patience(5.0, 103.0) == 3.0
        assert patience(None, 99.0) == 0.0005

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
    def test_the_system_tells_of_writes_to_the_wal(self, tmp_path: Path) -> None:
        file = tmp_path / "jobs.db-wal"
        with pytest.raises(OSError, match="cannot watch"):
            omniq_sqlite._WalWatch(str(file))
        with file.open("wb", buffering=0) as wal:
            watch = omniq_sqlite._WalWatch(str(file))
            assert watch.wait(0.0) is False
            wal.write(b"x")
            wal.write(b"y")
            assert watch.wait(DEADLINE) is True
            assert watch.wait(0.0) is False
        number = watch._fd
        watch.close()
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(number)
        watch.close()

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
    def test_where_no_watch_is_left_waiters_poll(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def used_up(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(omniq_sqlite, "_WalWatch", used_up)
        threads, got = Threads(), []
        with SQLiteQueue(path) as queue, SQLiteQueue(path) as other:
            threads.start(lambda: got.append(queue.dequeue(timeout=9.0)))
            until(lambda: database_of(queue).bell.waiters)
            other.enqueue(Task("f"))
            threads.join()
            assert got[0] is not None

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
    def test_each_connection_that_looks_has_a_watch_of_its_own(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.count_tasks()
            bell = queue._async._gateway.database.bell
            bell.poll()
            first, number = bell.wal, bell.wal._fd
            def child():
                assert bell.wal is None
                assert first._fd == -1
                bell.poll()
                assert bell.wal is not None
            join(fork(child))
            assert first._fd == number
            bell.poll()
            assert bell.wal is not first
            del first
            assert len(os.listdir("/proc/self/fd")) < 20
            """)

    def test_idle_waiters_take_no_write_lock(self, path: str, spied: list[str]) -> None:
        threads = Threads()
        with SQLiteQueue(path) as queue:
            for _ in range(3):
                threads.start(partial(queue.dequeue, "other", timeout=None))
            until(lambda: len(database_of(queue).bell.waiters) == 3)
            with raw(path) as connection:
                connection.execute("CREATE TABLE noise (x)")
                spied.clear()

                def looked() -> bool:
                    connection.execute("INSERT INTO noise VALUES (1)")
                    return spied.count("look") >= 9

                until(looked)
            assert "BEGIN IMMEDIATE" not in spied
        with pytest.raises(StorageClosedError):
            threads.join()

    @pytest.mark.parametrize("where", ["file", "memory"])
    def test_a_commit_of_the_same_object_wakes_without_a_poll(
        self, path: str, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite._Bell, "_watch_wal", lambda _: None)
        monkeypatch.setattr(omniq_sqlite, "POLL_INTERVAL", 60.0)
        threads, got = Threads(), []
        with SQLiteQueue(path if where == "file" else ":memory:") as queue:
            threads.start(lambda: got.append(queue.dequeue(timeout=DEADLINE)))
            until(lambda: database_of(queue).bell.waiters)
            time.sleep(0.02)
            began = time.monotonic()
            queue.enqueue(Task("f"))
            threads.join()
            assert time.monotonic() - began < SOON
            assert got[0] is not None
            assert got[0].func == "f"

    def test_when_the_one_that_polls_leaves_another_goes_on(self, path: str) -> None:
        """Two leave at the same moment; the third must not wait for ever."""
        leaving, staying, got = Threads(), Threads(), []
        with SQLiteQueue(path) as queue:
            for _ in range(8):
                leaving.start(partial(queue.dequeue, timeout=0.2))
            until(lambda: database_of(queue).bell.polled or leaving.have_ended())
            staying.start(lambda: got.append(queue.dequeue(timeout=DEADLINE)))
            leaving.join()
            with SQLiteQueue(path) as other:
                other.enqueue(Task("f"))
            staying.join()
            assert got[0] is not None
            assert got[0].func == "f"

    def test_every_waiter_that_leaves_may_be_the_last_that_polled(
        self, path: str
    ) -> None:
        """The same, looking at the bell itself: no heir is trusted to go on."""
        with SQLiteQueue(path) as queue:
            bell = database_of(queue).bell
            woken: list[str] = []
            for name in ("leaving", "staying"):
                wake = partial(woken.append, name)
                assert bell.register(wake, None, bell.generation)
            assert bell.take_over()
            assert not bell.take_over()
            bell.hand_over()
            assert sorted(woken) == ["leaving", "staying"]
            assert bell.take_over()

    def test_what_happened_after_the_look_is_not_missed(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            bell = database_of(queue).bell
            seen = bell.generation
            queue.enqueue(Task("f"))
            assert not bell.register(nothing, None, seen)

    async def test_a_clock_that_moves_is_seen_in_memory_too(self) -> None:
        now = [1e9]
        async with AsyncSQLiteQueue(":memory:", clock=lambda: now[0]) as queue:
            await queue.enqueue(Task("f"), delay=3600)
            waiting = asyncio.ensure_future(queue.dequeue(timeout=DEADLINE))
            await soon(lambda: database_of(queue).bell.waiters)
            now[0] += 3601
            assert await asyncio.wait_for(waiting, DEADLINE / 2) is not None

    def test_a_paused_queue_does_not_spin(self, path: str, spied: list[str]) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"), delay=0.01)
            queue.pause("default")
            time.sleep(0.02)
            spied.clear()
            assert queue.dequeue(timeout=0.2) is None
            assert spied.count("look") <= 5

    def test_a_clock_that_fails_is_the_waiters_error(self, path: str) -> None:
        broken = False

        def clock() -> float:
            if broken:
                raise ZeroDivisionError
            return 1e9

        threads = Threads()
        with SQLiteQueue(path, clock=clock) as queue:
            queue.enqueue(Task("f"), delay=9)
            threads.start(partial(queue.dequeue, timeout=DEADLINE))
            until(lambda: database_of(queue).bell.waiters)
            broken = True
            with pytest.raises(ZeroDivisionError):
                threads.join()


class TestClose:
    def test_close_finishes_what_was_begun_and_refuses_what_comes(
        self, path: str
    ) -> None:
        threads = Threads()
        queue = SQLiteQueue(path)
        queue.enqueue(Task("f"))
        with write_lock(path):
            threads.start(queue.enqueue, Task("before"))
            until(lambda: len(database_of(queue).pending) == 1)
            threads.start(queue.close)
            until(lambda: database_of(queue).closed_reason)
            with pytest.raises(StorageClosedError):
                queue.enqueue(Task("after"))
            with pytest.raises(StorageClosedError):
                queue.count_tasks()
        threads.join()
        assert select(path, "SELECT func FROM omniq_task ORDER BY seq") == [
            "f",
            "before",
        ]
        assert not os.path.exists(path + "-wal")

    def test_close_does_not_wait_for_threads_that_go_on_calling(
        self, path: str
    ) -> None:
        threads, refused = Threads(), []

        def hammer(queue: SQLiteQueue) -> None:
            try:
                while True:
                    queue.enqueue(Task("f"))
            except StorageClosedError as error:
                refused.append(error)

        queue = SQLiteQueue(path, synchronous="NORMAL")
        for _ in range(6):
            threads.start(hammer, queue)
        until(lambda: os.path.exists(path) and len(database_of(queue).connections))
        time.sleep(0.1)
        began = time.monotonic()
        queue.close()
        assert time.monotonic() - began < SOON
        threads.join()
        assert len(refused) == 6
        assert not os.path.exists(path + "-wal")

    async def test_async_close_does_neither(self, path: str) -> None:
        queue = AsyncSQLiteQueue(path, synchronous="NORMAL")
        acknowledged: list[str] = []

        async def hammer() -> None:
            with contextlib.suppress(StorageClosedError):
                while True:
                    acknowledged.append(await queue.enqueue(Task("f")))

        busy = [asyncio.ensure_future(hammer()) for _ in range(20)]
        await soon(lambda: len(acknowledged) > 100)
        await asyncio.wait_for(queue.close(), DEADLINE)
        await asyncio.gather(*busy)
        assert select(path, "SELECT id FROM omniq_task") == acknowledged

    @pytest.mark.parametrize("form", ["blocking", "async"])
    async def test_close_wakes_everybody_who_waits(self, path: str, form: str) -> None:
        if form == "async":
            queue = AsyncSQLiteQueue(path)
            waiting = [
                asyncio.ensure_future(queue.dequeue(timeout=None)) for _ in range(5)
            ]
            await soon(lambda: len(database_of(queue).bell.waiters) == 5)
            await queue.close()
            done = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(error) for error in done] == [StorageClosedError] * 5
            return
        threads = Threads()
        other = SQLiteQueue(path)
        for _ in range(5):
            threads.start(partial(other.dequeue, timeout=None))
        await soon(lambda: len(database_of(other).bell.waiters) == 5)
        other.close()
        with pytest.raises(StorageClosedError):
            threads.join()
        assert len(threads.errors) == 5

    async def test_a_claim_that_is_given_back_while_closing_is_not_lost(
        self, path: str
    ) -> None:
        queue = AsyncSQLiteQueue(path)
        await queue.enqueue(Task("f"))
        with write_lock(path):
            waiting = asyncio.ensure_future(queue.dequeue())
            await soon(lambda: database_of(queue).pending)
            closing = asyncio.ensure_future(queue.close())
            await soon(lambda: database_of(queue).closed_reason)
            waiting.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait_for(closing, DEADLINE)
        assert statuses(path) == ["pending"]

    def test_an_object_that_is_forgotten_closes_its_connections(
        self, path: str, spied: Any
    ) -> None:
        queue = SQLiteQueue(path)
        queue.enqueue(Task("f"))
        del queue
        gc.collect()
        for connection in Spied.opened:
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                connection.execute("SELECT 1")

    async def test_an_async_object_that_is_forgotten_ends_its_threads(
        self, path: str
    ) -> None:
        queue = AsyncSQLiteQueue(path)
        await queue.enqueue(Task("f"))
        assert await queue.count_tasks() == 1
        threads = [t._thread for t in database_of(queue).threads]
        assert len(threads) == 2
        del queue

        def ended() -> bool:
            gc.collect()  # again: a thread may hold its last request for a moment
            return not any(thread.is_alive() for thread in threads)

        await soon(ended)
        assert not os.path.exists(path + "-wal")


@POSIX
class TestFork:
    """What a child commits is gone unless connections are closed."""

    def test_what_a_child_commits_stays_when_the_parent_closes_first(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("parent"))
            go, done = os.pipe(), os.pipe()
            def child():
                os.read(go[0], 1)
                queue.enqueue(Task("child"))
            pid = fork(child)
            queue.close()
            os.write(go[1], b"x")
            join(pid)
            assert rows() == ["child", "parent"], rows()
            """)

    @pytest.mark.parametrize("last", ["child", "parent"])
    def test_both_sides_open_again_and_go_on(self, path: str, last: str) -> None:
        run_program(
            """
            queue = SQLiteQueue(path)
            queue.enqueue(Task("before"))
            pause = {"child": 0.0, "parent": 0.2}[arguments[0]]
            pid = fork(lambda: (queue.enqueue(Task("child")), queue.count_tasks()))
            time.sleep(pause)
            queue.enqueue(Task("parent"))
            join(pid)
            queue.enqueue(Task("zzz"))
            assert queue.count_tasks() == 4
            assert rows() == ["before", "child", "parent", "zzz"], rows()
            """,
            path,
            last,
        )

    def test_no_connection_is_open_during_a_fork(self, run_here: RunHere) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            database = queue._async._gateway.database
            while len(database.connections) < 2:
                queue.dequeue("none", timeout=0.01)
            def child():
                assert database.connections == set()
                here = os.path.realpath(path)
                held = [os.path.realpath(f"/proc/self/fd/{n}") for n in
                        os.listdir("/proc/self/fd")] if os.path.isdir("/proc") else []
                assert not any(name.startswith(here) for name in held), held
            join(fork(child))
            """)

    def test_a_fork_before_the_first_use(self, run_here: RunHere) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            pids = [fork(lambda: queue.enqueue(Task("child"))) for _ in range(4)]
            queue.enqueue(Task("parent"))
            join(*pids)
            assert rows() == ["child"] * 4 + ["parent"], rows()
            """)

    def test_forks_while_other_threads_are_inside_transactions(
        self, run_here: RunHere
    ) -> None:
        """Nothing is lost, nothing written twice, and no fork is starved."""
        run_here("""
            queue = SQLiteQueue(path, synchronous="NORMAL")
            stop, counts = threading.Event(), []
            def hammer(name):
                count = 0
                while not stop.is_set():
                    queue.enqueue(Task(name))
                    queue.count_tasks()
                    count += 1
                counts.append(count)
            threads = [threading.Thread(target=hammer, args=("thread",))
                       for _ in range(4)]
            for thread in threads:
                thread.start()
            pids, slowest = [], 0.0
            for _ in range(15):
                began = time.monotonic()
                pids.append(fork(lambda: queue.enqueue(Task("child"))))
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.01)
            join(*pids)
            stop.set()
            for thread in threads:
                thread.join()
            assert slowest < 10.0, slowest
            found = rows()
            assert found.count("child") == 15, found.count("child")
            assert found.count("thread") == sum(counts) > 0
            """)

    def test_a_child_does_not_write_what_threads_of_the_parent_wait_to_write(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("first"))
            unlock = lock()
            threads = [threading.Thread(target=queue.enqueue, args=(Task("thread"),))
                       for _ in range(8)]
            for thread in threads:
                thread.start()
            database = queue._async._gateway.database
            while len(database.pending) < 8:
                time.sleep(0.001)
            def child():
                assert len(database.pending) == 0
                queue.enqueue(Task("child"))
            pid = fork(child)
            time.sleep(0.1)
            unlock()
            for thread in threads:
                thread.join()
            join(pid)
            assert rows() == ["child", "first"] + ["thread"] * 8, rows()
            """)

    def test_inside_a_running_loop_with_async_and_blocking_objects_open(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            async def main():
                blocking = SQLiteQueue(path, synchronous="NORMAL")
                async with AsyncSQLiteQueue(path, synchronous="NORMAL") as queue:
                    busy = [asyncio.ensure_future(queue.enqueue(Task("task")))
                            for _ in range(50)]
                    waiting = asyncio.ensure_future(queue.dequeue("w", timeout=None))
                    await asyncio.sleep(0.01)
                    blocking.enqueue(Task("blocking"))
                    def child():
                        blocking.enqueue(Task("child blocking"))
                        async def again():
                            await queue.enqueue(Task("child async"))
                            assert await queue.dequeue("none", timeout=0.02) is None
                            await queue.close()
                        asyncio.run(again())
                    pids = []
                    for _ in range(3):
                        pids.append(fork(child))
                        await asyncio.sleep(0.005)
                    await asyncio.gather(*busy)
                    await asyncio.to_thread(join, *pids)
                    await queue.enqueue(Task("w", queue="w"))
                    assert (await asyncio.wait_for(waiting, 20)).func == "w"
                blocking.close()
            asyncio.run(main())
            found = rows()
            assert found == (["blocking"] + ["child async"] * 3
                + ["child blocking"] * 3 + ["task"] * 50 + ["w"]), found
            """)

    def test_an_async_object_whose_loop_has_ended_stops_no_fork(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = AsyncSQLiteQueue(path)
            asyncio.run(queue.enqueue(Task("first")))
            join(fork(lambda: asyncio.run(queue.enqueue(Task("child")))))
            asyncio.run(queue.enqueue(Task("parent")))
            assert rows() == ["child", "first", "parent"], rows()
            """)

    def test_an_async_writer_that_waits_for_the_lock_stops_no_fork(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            async def main():
                queue = AsyncSQLiteQueue(path)
                await queue.enqueue(Task("first"))
                unlock = lock()
                waiting = asyncio.ensure_future(queue.enqueue(Task("waited")))
                await asyncio.sleep(0.05)
                began = time.monotonic()
                pid = fork(lambda: None)
                assert time.monotonic() - began < 10.0
                unlock()
                await asyncio.wait_for(waiting, 20)
                join(pid)
                await queue.close()
            asyncio.run(main())
            assert rows() == ["first", "waited"], rows()
            """)

    def test_open_in_a_master_and_use_in_workers(self, path: str) -> None:
        """As gunicorn does with --preload: each task is worked by one worker."""
        run_program(
            """
            queue = SQLiteQueue(path, synchronous="NORMAL")
            queue.enqueue_many([Task(f"t{i:03}") for i in range(100)])
            def worker():
                while (task := queue.dequeue()) is not None:
                    os.write(log, task.func.encode() + b"\\n")
                    queue.complete(task)
            log = os.open(arguments[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            pids = [fork(worker) for _ in range(3)]
            join(*pids)
            assert queue.count_tasks() == 0
            with open(arguments[0]) as file:
                assert sorted(file.read().split()) == [f"t{i:03}" for i in range(100)]
            """,
            path,
            path + ".log",
        )

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    def test_every_way_in_which_multiprocessing_starts(
        self, tmp_path: Path, path: str, method: str
    ) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent(
                """
                import multiprocessing, os, signal, sys
                from omniq_sqlite import SQLiteQueue, Task
                def child(queue):
                    queue.enqueue(Task("child"))
                    pid = os.fork()
                    if pid == 0:
                        queue.enqueue(Task("grandchild"))
                        os._exit(0)
                    assert os.waitpid(pid, 0)[1] == 0
                if __name__ == "__main__":
                    signal.alarm(30)
                    queue = SQLiteQueue(sys.argv[1])
                    queue.enqueue(Task("parent"))
                    context = multiprocessing.get_context(sys.argv[2])
                    process = context.Process(target=child, args=(queue,))
                    process.start()
                    process.join()
                    assert process.exitcode == 0
                """
            )
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", str(program), path, method],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
            env=environment(),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(select(path, "SELECT func FROM omniq_task")) == [
            "child",
            "grandchild",
            "parent",
        ]

    def test_a_database_in_memory_is_copied(self, run_here: RunHere) -> None:
        run_here("""
            queue = SQLiteQueue(":memory:")
            queue.enqueue(Task("both"))
            def child():
                assert queue.count_tasks() == 1
                queue.enqueue(Task("child"))
                assert queue.count_tasks() == 2
            join(fork(child))
            assert queue.count_tasks() == 1
            queue.enqueue(Task("parent"))
            assert [t.func for t in queue.list_tasks()] == ["both", "parent"]
            """)

    def test_a_fork_inside_an_operation_leaves_the_parents_alone(
        self, run_here: RunHere
    ) -> None:
        """Only a signal handler can do that; its child may not touch the file."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("before", (1,)))
            pids = []
            def handler(number, frame):
                pids.append(os.fork())
                if pids[-1] == 0:
                    signal.alarm(20)
            class Slow:
                def dumps(self, value): return "0"
                def loads(self, text):
                    signal.raise_signal(signal.SIGUSR1)
                    return [1]
            signal.signal(signal.SIGUSR1, handler)
            slow = SQLiteQueue(path, serializer=Slow())
            try:
                task = slow.dequeue()
            except BaseException as error:
                if 0 not in pids:
                    raise
                try:
                    slow.count_tasks()
                except StorageClosedError:
                    sys.exit(0)  # with all destructors: they may not touch it either
                os._exit(71)
            if 0 in pids:
                os._exit(72)
            join(*pids)
            assert len(pids) >= 1
            slow.complete(task)
            slow.enqueue(Task("after"))
            slow.close()
            assert rows() == ["after"], rows()
            """)

    def test_ctrl_c_works_in_a_child_of_another_thread(self, run_here: RunHere) -> None:
        """The main thread was in a call that records SIGINT; the child has none."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f", queue="other"))
            def child():
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(5)
                except KeyboardInterrupt:
                    return
                raise AssertionError("the signal was swallowed")
            pids = []
            def start():
                while not queue._async._gateway.database.bell.waiters:
                    time.sleep(0.001)
                pids.append(fork(child))
                SQLiteQueue(path).enqueue(Task("wake"))
            thread = threading.Thread(target=start)
            thread.start()
            assert queue.dequeue(timeout=20).func == "wake"
            thread.join()
            join(*pids)
            """)

    def test_ctrl_c_during_a_fork_leaves_nothing_locked(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path, synchronous="NORMAL")
            queue.enqueue(Task("f"))
            database = queue._async._gateway.database
            thread, go = reading(database)
            def interrupt():
                wait_for_a_fork(database)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                go()
            other = threading.Thread(target=interrupt)
            other.start()
            try:
                pid = fork(lambda: queue.enqueue(Task("child")))
                time.sleep(20)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the signal was swallowed")
            thread.join()
            other.join()
            queue.enqueue(Task("parent"))
            os.wait()
            assert rows() == ["child", "f", "parent"], rows()
            """)

    def test_a_handler_that_raises_during_a_fork_leaves_nothing_locked(
        self, run_here: RunHere
    ) -> None:
        """At each line of what is done before and after it; other threads hung."""
        run_here("""
            class Stop(BaseException):
                pass
            def stop(number, frame):
                raise Stop
            signal.signal(signal.SIGTERM, stop)
            queue = SQLiteQueue(path, synchronous="NORMAL")
            parent = os.getpid()
            raised = refused = came = when = 0
            def trace(frame, event, argument):
                global line, came
                ours = frame.f_code.co_filename == omniq_sqlite.__file__
                if ours and event == "line" and os.getpid() == parent:
                    line += 1
                    if line == when:
                        came += 1
                        signal.raise_signal(signal.SIGTERM)
                return trace if ours else None
            printed = []  # of the first and the last lines
            sys.unraisablehook = printed.append
            omniq_sqlite.logger.warning = lambda *text: printed.append(text)
            while came == when:
                when, line, pid = when + 1, 0, None
                printed.clear()
                queue.enqueue(Task("both"))  # opens the file
                sys.settrace(trace)
                try:
                    pid = os.fork()
                    sys.settrace(None)
                    if pid == 0:
                        try:
                            queue.enqueue(Task("child"))
                        except StorageClosedError:
                            os._exit(3)
                        os._exit(0)
                    for _ in range(5000 * (came == when)):
                        time.sleep(0.001)  # what came is sent again
                        if printed:
                            break
                    else:
                        assert came < when, (when, "it was swallowed")
                except Stop:
                    raised += 1
                sys.settrace(None)
                thread = threading.Thread(target=queue.enqueue, args=(Task("parent"),))
                thread.start()
                thread.join(10)
                assert not thread.is_alive(), when
                _, status = os.wait()
                refused += status >> 8 == 3
                assert status in (0, 3 << 8), (when, status)
            assert signal.getsignal(signal.SIGTERM) is stop
            assert when > 80, when
            assert refused < 12, refused  # before the shield is up
            assert raised > 0.7 * when, (raised, when)
            funcs = rows()
            assert funcs.count("parent") == funcs.count("both") == when
            assert funcs.count("child") == when - refused
            """)

    def test_a_lock_that_another_thread_held_stops_no_child(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("parent"))
            database = queue._async._gateway.database
            held, over = threading.Event(), threading.Event()
            def hold():
                with database.queue_lock, database.bell.lock:
                    held.set()
                    over.wait()
            thread = threading.Thread(target=hold, daemon=True)
            thread.start()
            held.wait()
            join(fork(lambda: queue.enqueue(Task("child"))))
            over.set()
            thread.join()
            assert rows() == ["child", "parent"], rows()
            """)

    def test_it_waits_for_the_closing_of_what_was_forgotten(
        self, run_here: RunHere
    ) -> None:
        """By the collector in another thread, where SQLite may hold locks."""
        run_here("""
            closing, closed = threading.Event(), threading.Event()
            class Forgotten:
                def close(self):
                    closing.set()
                    time.sleep(0.2)
                    closed.set()
            dispose = omniq_sqlite._dispose
            thread = threading.Thread(target=dispose, args=([Forgotten()], []))
            thread.start()
            closing.wait()
            def look():
                assert closed.is_set()
                dispose([Forgotten()], [])  # the child's lock is free
            join(fork(look))
            thread.join()
            dispose([Forgotten()], [])
            """)


class TestForksOfEveryKind:
    def test_a_handler_that_forks_while_another_thread_does(
        self, run_here: RunHere
    ) -> None:
        """Each waited for what the other one had, for ever."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            children = []
            def forked():
                children.append(fork(lambda: None))
            signal.signal(signal.SIGUSR1, lambda *_: forked())
            other = threading.Thread(target=forked)
            database = queue._async._gateway.database
            def read(connection):
                other.start()
                wait_for_a_fork(database)
                signal.raise_signal(signal.SIGUSR1)
            omniq_sqlite._FORK_PATIENCE = 0.2
            omniq_sqlite._shielded(lambda: database.read(read))
            other.join()
            join(*children)
            queue.enqueue(Task("g"))
            assert rows() == ["f", "g"], rows()
            """)

    def test_a_child_of_a_second_thread_has_the_programs_handlers(
        self, run_here: RunHere
    ) -> None:
        """It was forked before the first one had put them back: SIGTERM did nothing."""
        run_here("""
            def stop(*_):
                os._exit(7)
            signal.signal(signal.SIGTERM, stop)
            parent, main = os.getpid(), threading.get_ident()
            end = omniq_sqlite._ForkShield.end
            def slow_end(self):
                if self.thread == main and os.getpid() == parent:
                    time.sleep(0.3)
                end(self)
            omniq_sqlite._ForkShield.end = slow_end
            queue = SQLiteQueue(path)
            queue.count_tasks()
            database = queue._async._gateway.database
            rest = database.rest
            def slow_rest(patience):
                time.sleep(0.1)  # so that the other one waits for the lock
                return rest(patience)
            database.rest = slow_rest
            children = []
            def look():
                assert signal.getsignal(signal.SIGTERM) is stop
            def other():
                time.sleep(0.05)
                children.append(fork(look))
            thread = threading.Thread(target=other)
            thread.start()
            children.append(fork(look))
            thread.join()
            join(*children)
            """)

    def test_a_handler_that_is_set_meanwhile_stays(self, run_here: RunHere) -> None:
        run_here("""
            def reset():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            def late():
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.signal(signal.SIGUSR1, lambda *_: None)
            os.register_at_fork(before=late)  # called first, so: is recorded as it is
            begin = omniq_sqlite._ForkShield.begin
            def begin_and_reset(self):
                begin(self)
                reset()
            omniq_sqlite._ForkShield.begin = begin_and_reset
            def look():
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
                assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            join(fork(look))
            look()
            """)

    def test_where_no_handler_may_be_set(self, run_here: RunHere) -> None:
        """As in a subinterpreter: no call worked, and a fork tried for ever."""
        run_here("""
            import types
            def refuse(number, handler):
                raise ValueError("signal only works in main thread")
            omniq_sqlite._signal = types.SimpleNamespace(
                getsignal=signal.getsignal, signal=refuse
            )
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            join(fork(lambda: queue.enqueue(Task("g"))))
            assert rows() == ["f", "g"], rows()
            """)

    def test_near_the_limit_of_recursion_no_lock_stays_behind(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.count_tasks()
            database = queue._async._gateway.database
            sys.unraisablehook = [].append
            def deep(left):
                if left:
                    return deep(left - 1)
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
            free = []
            def take(lock):
                free.append(lock.acquire(timeout=5) and not lock.release())
            for room in range(30, -3, -1):
                queue.count_tasks()
                try:
                    deep(sys.getrecursionlimit() - 3 - room)
                except RecursionError:
                    pass
                for lock in (omniq_sqlite._databases_lock, database.gate):
                    thread = threading.Thread(target=take, args=(lock,))
                    thread.start()
                    thread.join()
                assert not database.resting
            assert all(free)
            """)

    def test_a_child_of_a_handler_inside_a_wait_goes_on(
        self, run_here: RunHere
    ) -> None:
        """Its descriptor of the WAL was closed under it: a bare OSError."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.count_tasks()
            pids = []
            signal.signal(signal.SIGUSR1, lambda *_: pids.append(os.fork()))
            def interrupt():
                while not queue._async._gateway.database.bell.polled:
                    time.sleep(0.001)
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGUSR1)
            threading.Thread(target=interrupt).start()
            try:
                assert queue.dequeue(timeout=0.5) is None
            except BaseException:
                if 0 in pids:
                    os._exit(1)
                raise
            if 0 in pids:
                os._exit(0)
            join(*pids)
            """)


class TestEventLoops:
    def test_a_loop_that_ends_with_an_operation_under_way_hangs_nobody(
        self, path: str
    ) -> None:
        queue = AsyncSQLiteQueue(path)
        asyncio.run(queue.enqueue(Task("first")))

        async def leave_it() -> None:
            left = asyncio.ensure_future(queue.enqueue(Task("cancelled", id="c")))
            assert left
            await asyncio.sleep(0.02)

        with write_lock(path):
            asyncio.run(leave_it())
        asyncio.run(queue.enqueue(Task("second")))
        assert "second" in select(path, "SELECT func FROM omniq_task")
        asyncio.run(queue.close())

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_claim_of_a_loop_that_was_closed_is_given_back(self, path: str) -> None:
        queue = AsyncSQLiteQueue(path)
        asyncio.run(queue.enqueue(Task("f")))
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # its task is destroyed pending
        with write_lock(path):
            task = loop.create_task(queue.dequeue())
            loop.run_until_complete(asyncio.sleep(0.02))
            loop.close()
        until(lambda: statuses(path) == ["pending"])
        asyncio.run(queue.close())
        assert statuses(path) == ["pending"]
        task.get_coro().close()
        del task

    def test_a_claim_is_given_back_when_its_loop_ends_around_the_delivery(
        self, path: str
    ) -> None:
        """`asyncio.run` cancels what is left; the outcome may come at any moment."""
        queue = AsyncSQLiteQueue(path, synchronous="OFF")

        async def leave(delay: float) -> asyncio.Future[Task | None]:
            waiting = asyncio.ensure_future(queue.dequeue())
            await asyncio.sleep(delay)
            return waiting

        asyncio.run(queue.enqueue(Task("f")))
        for step in range(150):
            waiting = asyncio.run(leave(step * 1e-5))
            if not waiting.cancelled() and (task := waiting.result()) is not None:
                asyncio.run(queue.release(task))  # it was not cancelled in time
        asyncio.run(queue.close())
        assert statuses(path) == ["pending"]

    async def test_memory_is_shared_by_threads_and_loops(self) -> None:
        threads = Threads()
        async with AsyncSQLiteQueue(":memory:") as queue:

            async def produce(number: int) -> None:
                for _ in range(20):
                    await queue.enqueue(Task(f"t{number}"))

            for number in range(4):
                threads.start(lambda n=number: asyncio.run(produce(n)))
            got = []
            for _ in range(80):
                got.append(
                    await asyncio.wait_for(queue.dequeue(timeout=None), DEADLINE)
                )
            await asyncio.to_thread(threads.join)
            assert len({task.id for task in got if task is not None}) == 80
            assert await queue.count_tasks(status="running") == 80

    @pytest.mark.parametrize("where", ["file", "memory"])
    async def test_sixteen_threads_on_a_blocking_object_beside_a_running_loop(
        self, path: str, where: str
    ) -> None:
        threads = Threads()
        queue = SQLiteQueue(path if where == "file" else ":memory:")

        def work(number: int) -> None:
            for _ in range(6):
                queue.enqueue(Task(f"t{number}"))
                task = queue.dequeue()
                assert task is not None
                queue.complete(task)

        for number in range(16):
            threads.start(work, number)
        while not threads.have_ended():
            queue.count_tasks()  # in the thread of the loop itself
            await asyncio.sleep(0.001)
        threads.join()
        assert queue.count_tasks() == 0
        queue.close()


class TestConnectionThread:
    """The one place that uses what aiosqlite does not promise."""

    def test_it_runs_functions_in_order_on_a_thread_that_holds_up_nobody(self) -> None:
        thread = omniq_sqlite._ConnectionThread()
        ran: list[object] = []
        for number in range(3):
            thread.submit(partial(ran.append, number))
        thread.submit(lambda: ran.append(threading.current_thread()))
        until(lambda: thread.outstanding == 0)
        assert ran[:3] == [0, 1, 2]
        worker = ran[3]
        assert isinstance(worker, threading.Thread)
        assert worker.daemon
        assert worker is not threading.current_thread()
        thread.stop()
        worker.join(DEADLINE)
        assert not worker.is_alive()

    def test_it_outlives_a_function_that_raises(self) -> None:
        thread = omniq_sqlite._ConnectionThread()
        thread.submit(lambda: 1 / 0)  # type: ignore[arg-type]
        ran: list[int] = []
        thread.submit(partial(ran.append, 1))
        until(lambda: ran)
        thread.stop()

    def test_it_stops_behind_what_was_submitted(self) -> None:
        thread = omniq_sqlite._ConnectionThread()
        ran: list[int] = []
        thread.submit(partial(time.sleep, 0.05))
        thread.submit(partial(ran.append, 1))
        thread.stop()
        until(lambda: not thread._thread.is_alive())
        assert ran == [1]

    def test_it_may_stop_itself(self) -> None:
        thread = omniq_sqlite._ConnectionThread()
        thread.submit(thread.stop)
        until(lambda: not thread._thread.is_alive())


EXITS = {
    "blocking": 'SQLiteQueue(path).enqueue(Task("f"))',
    "blocking and kept": 'q = SQLiteQueue(path); q.enqueue(Task("f"))',
    "backend": 'b = SQLiteBackend(path, events=True); b.enqueue(Task("f"))',
    "async": """
        q = AsyncSQLiteQueue(path)
        async def main():
            await q.enqueue(Task("f"))
            await q.dequeue("none", timeout=0.01)
            await q.count_tasks()
        asyncio.run(main())
        asyncio.run(main())
    """,
    "waiting in a daemon thread": """
        q = SQLiteQueue(path)
        q.enqueue(Task("f"))
        threading.Thread(target=q.dequeue, args=("none",),
                         kwargs={"timeout": None}, daemon=True).start()
        time.sleep(0.1)
    """,
    "waiting in a loop that is left": """
        q = AsyncSQLiteQueue(path)
        async def main():
            await q.enqueue(Task("f"))
            asyncio.ensure_future(q.dequeue("none", timeout=None))
            await asyncio.sleep(0.05)
        asyncio.run(main())
    """,
    "writing in daemon threads": """
        q = SQLiteQueue(path, synchronous="NORMAL")
        q.enqueue(Task("f"))
        def hammer():
            try:
                while True:
                    q.enqueue(Task("f"))
            except StorageClosedError:
                pass
        for _ in range(3):
            threading.Thread(target=hammer, daemon=True).start()
        time.sleep(0.1)
    """,
    "in the middle of an async commit": """
        q = AsyncSQLiteQueue(path)
        async def main():
            await q.enqueue(Task("f"))
            for _ in range(50):
                asyncio.ensure_future(q.enqueue(Task("f")))
            await asyncio.sleep(0)
        asyncio.run(main())
    """,
    "a generator left half-way": """
        e = SQLiteEventStorage(path)
        e.log(TaskEvent("x"))
        f = e.follow(after="0")
        next(f)
        SQLiteQueue(path).enqueue(Task("f"))
    """,
}


class TestExit:
    """A forgotten `close()` hangs no process and prints nothing."""

    @pytest.mark.parametrize("name", EXITS)
    def test_a_program_that_never_closes_ends_by_itself(
        self, path: str, name: str
    ) -> None:
        code = textwrap.dedent(EXITS[name])
        out = run_program(
            f"{code}\nprint(time.monotonic())\nsys.stdout.flush()\n",
            path,
        )
        assert time.monotonic() - float(out) < SOON
        assert is_whole(path)
        assert "f" in select(path, "SELECT func FROM omniq_task")

    @pytest.mark.parametrize("form", ["blocking", "async"])
    def test_a_program_that_raises_shows_its_own_traceback_only(
        self, programs: Programs, path: str, form: str
    ) -> None:
        program = programs.start(
            """
            async def main():
                queue = AsyncSQLiteQueue(path)
                await queue.enqueue(Task("f"))
                1 / 0
            if arguments[0] == "async":
                asyncio.run(main())
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            1 / 0
            """,
            path,
            form,
        )
        _, err = program.communicate(timeout=DEADLINE)
        assert program.returncode == 1
        assert err.count("Traceback") == 1
        assert err.rstrip().endswith("ZeroDivisionError: division by zero")
        assert "Warning" not in err

    @POSIX
    @pytest.mark.parametrize("form", ["blocking", "async"])
    def test_a_program_that_is_interrupted_while_it_waits(
        self, programs: Programs, path: str, form: str
    ) -> None:
        program = programs.start(
            """
            async def main():
                async with AsyncSQLiteQueue(path) as queue:
                    print("ready", flush=True)
                    await queue.dequeue(timeout=None)
            try:
                if arguments[0] == "async":
                    asyncio.run(main())
                else:
                    with SQLiteQueue(path) as queue:
                        print("ready", flush=True)
                        queue.dequeue(timeout=None)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            """,
            path,
            form,
        )
        assert programs.read(program) == "ready"
        time.sleep(0.1)
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        assert programs.finish(program) == "interrupted"
        assert time.monotonic() - began < SOON

    def test_a_failure_to_close_is_logged_and_raises_nothing(
        self, path: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue = SQLiteQueue(path)
        queue.enqueue(Task("f"))

        class Stubborn:
            def close(self) -> None:
                raise sqlite3.OperationalError("unable to close")

        database = database_of(queue)
        database.disconnect(Stubborn())
        assert "unable to close" in caplog.text
        queue.close()


TWIN_PROGRAM = """
queue, loop = AsyncSQLiteQueue(path), asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()

async def make_twin():
    return SQLiteQueue.from_async(queue)

twin = asyncio.run_coroutine_threadsafe(make_twin(), loop).result(10)
"""
"""The start of a program: a twin for its main thread, of a loop in another one."""


@POSIX
class TestInterrupts:
    """A Ctrl-C neither tears a call apart nor loses its outcome."""

    def test_signals_into_claims_beside_busy_threads_strand_nothing(
        self, path: str
    ) -> None:
        out = run_program(
            """
            queue = SQLiteQueue(path, synchronous="NORMAL")
            stop, counts, errors = threading.Event(), [0] * 6, []
            def hammer(number):
                try:
                    while not stop.is_set():
                        queue.enqueue(Task("noise", queue="noise"))
                        task = queue.dequeue("noise")
                        if task is not None:
                            queue.complete(task)
                        counts[number] += 1
                except BaseException as error:
                    errors.append(error)
            threads = [threading.Thread(target=hammer, args=(n,)) for n in range(6)]
            for thread in threads:
                thread.start()
            queue.enqueue_many([Task("f") for _ in range(300)])
            parent = os.getpid()
            killer = os.fork()
            if killer == 0:
                random.seed(1)
                time.sleep(0.05)
                while os.getppid() == parent:
                    os.kill(parent, signal.SIGINT)
                    time.sleep(random.uniform(0.0003, 0.005))
                os._exit(0)
            interrupts, task = 0, None
            def work():
                "Claim and complete; an interrupt may come at any place."
                global interrupts, task
                while True:
                    try:
                        if task is None:
                            task = queue.dequeue()
                            if task is None:
                                left = queue.count_tasks(queue="default")
                                assert left == 0, "a claim was stranded"
                                if interrupts > 100 and min(counts) > 10:
                                    return
                                queue.enqueue_many([Task("f") for _ in range(50)])
                        else:
                            queue.complete(task)
                            task = None
                    except KeyboardInterrupt:
                        interrupts += 1
                    except LeaseLostError:
                        task = None  # an interrupt came after it was completed
            def outer():
                while True:
                    try:
                        return work()
                    except KeyboardInterrupt:
                        pass
            while True:
                try:
                    outer()
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    break
                except KeyboardInterrupt:
                    pass
            os.kill(killer, signal.SIGKILL)
            os.waitpid(killer, 0)
            stop.set()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive(), "a thread was stopped"
            assert errors == [], errors
            print(queue.count_tasks(queue="default"))
            queue.close()
            """,
            path,
            deadline=60,
        )
        assert out == "0"

    def test_a_signal_is_raised_after_the_outcome_is_known(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            class Stopping:
                def dumps(self, value): return "[]"
                def loads(self, text):
                    signal.raise_signal(signal.SIGINT)  # inside the transaction
                    return [1]
            queue.enqueue(Task("f", (1,)))
            other = SQLiteQueue(path, serializer=Stopping())
            try:
                other.dequeue()
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the signal was lost")
            assert rows("SELECT status FROM omniq_task") == ["pending"]
            assert rows("SELECT attempt FROM omniq_task") == [0]
            assert rows("SELECT claims FROM omniq_task") == [1]
            """)

    def test_a_handler_that_does_not_raise_changes_nothing(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            seen = []
            signal.signal(signal.SIGINT, lambda *_: seen.append(1))
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            unlock = lock()
            leader = threading.Thread(target=queue.enqueue, args=(Task("leader"),))
            leader.start()
            while not queue._async._gateway.database.pending:
                time.sleep(0.001)
            def interrupt():
                for _ in range(5):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.03)
                unlock()
            thread = threading.Thread(target=interrupt)
            thread.start()
            task = queue.dequeue()  # follows, is interrupted, and waits on
            assert task.func == "f"
            queue.complete(task)
            assert len(seen) >= 1
            leader.join()
            thread.join()
            assert rows() == ["leader"], rows()
            """)

    def test_a_follower_takes_back_what_has_not_begun(self, run_here: RunHere) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            database = queue._async._gateway.database
            unlock = lock()
            leader = threading.Thread(target=queue.enqueue, args=(Task("leader"),))
            leader.start()
            while len(database.pending) < 1:
                time.sleep(0.001)
            def interrupt():
                while len(database.pending) < 2:
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGINT)
            thread = threading.Thread(target=interrupt)
            thread.start()
            began = time.monotonic()
            try:
                queue.dequeue()
            except KeyboardInterrupt:
                assert time.monotonic() - began < 10
            else:
                raise AssertionError
            thread.join()
            unlock()
            leader.join()
            assert rows("SELECT status FROM omniq_task") == ["pending", "pending"]
            assert rows("SELECT claims FROM omniq_task") == [0, 0]
            """)

    def test_a_second_signal_does_not_stop_the_giving_back(
        self, run_here: RunHere
    ) -> None:
        """It comes while another process has the write lock."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            gateway = queue._async._gateway
            def submit(operation, original=gateway.submit):
                unlock = lock()
                threading.Timer(0.2, unlock).start()
                signal.raise_signal(signal.SIGINT)
                original(operation)
            gateway.submit = submit
            def must_flush(claim):
                signal.raise_signal(signal.SIGINT)
                return False
            omniq_sqlite._Claim.must_flush = must_flush
            try:
                queue.dequeue()
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError
            assert rows("SELECT status FROM omniq_task") == ["pending"]
            """)

    def test_a_second_signal_before_the_giving_back_does_not_stop_it(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both come at the end of a call, when none is recorded any more."""
        moments: list[str] = []
        set_in_truth, shielded = omniq_sqlite._signal.signal, omniq_sqlite._shielded

        def set_handler(number: int, handler: Any) -> None:
            set_in_truth(number, handler)
            if handler is signal.default_int_handler and not moments:
                moments.append("restored")
                raise KeyboardInterrupt

        def give_back(call: Callable[[], Any], *, deaf: bool = False) -> Any:
            if deaf and len(moments) == 1:
                moments.append("about to give back")
                raise KeyboardInterrupt
            return shielded(call, deaf=deaf)

        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(omniq_sqlite._signal, "signal", set_handler)
                patch.setattr(omniq_sqlite, "_shielded", give_back)
                queue.dequeue()
            assert moments == ["restored", "about to give back"]
            [task] = queue.list_tasks()
            assert (task.status, task.attempt) == ("pending", 0)

    @pytest.mark.parametrize("call", [1, 2])
    @pytest.mark.parametrize("before", [True, False])
    def test_the_handler_of_another_signal_leaves_no_deaf_program(
        self, path: str, monkeypatch: pytest.MonkeyPatch, call: int, *, before: bool
    ) -> None:
        """It raises when that of SIGINT is about to be changed, or just was."""
        calls: list[int] = []
        set_in_truth = omniq_sqlite._signal.signal

        def set_handler(number: int, handler: Any) -> None:
            calls.append(number)
            if before and len(calls) == call:
                raise TimeoutError
            set_in_truth(number, handler)
            if len(calls) == call:
                raise TimeoutError

        with SQLiteQueue(path) as queue:
            with monkeypatch.context() as patch, pytest.raises(TimeoutError):
                patch.setattr(omniq_sqlite._signal, "signal", set_handler)
                queue.enqueue(Task("f"))
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert omniq_sqlite._interrupts is None
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert queue.count_tasks() == call - 1

    def test_a_call_inside_a_call_is_refused(self, run_here: RunHere) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f", (1,)))
            refused = []
            class Nested:
                def dumps(self, value): return "[]"
                def loads(self, text):
                    try:
                        queue.count_tasks()
                    except RuntimeError as error:
                        refused.append(str(error))
                    return [1]
            assert SQLiteQueue(path, serializer=Nested()).dequeue() is not None
            assert "inside another one" in refused[0]
            assert queue.count_tasks() == 1
            """)

    def test_a_note_left_behind_does_not_refuse_the_next_call(self, path: str) -> None:
        """As by a handler of the program that raises at the very end of a call."""
        ident = threading.get_ident()
        with SQLiteQueue(path) as queue:
            omniq_sqlite._operating.add(ident)
            assert queue.count_tasks() == 0
            assert ident not in omniq_sqlite._operating

    def test_a_twin_of_a_loop_that_was_stopped_can_be_interrupted(
        self, path: str
    ) -> None:
        run_program(
            TWIN_PROGRAM
            + textwrap.dedent(
                """
                loop.call_soon_threadsafe(loop.stop)
                while loop.is_running():
                    time.sleep(0.001)
                kill = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
                kill.start()
                try:
                    twin.enqueue(Task("f"))
                except KeyboardInterrupt:
                    os._exit(0)
                """
            ),
            path,
        )

    def test_a_waiting_twin_of_from_async_waits_no_more_in_its_loop(
        self, path: str
    ) -> None:
        run_program(
            TWIN_PROGRAM
            + textwrap.dedent(
                """
                def interrupt():
                    while not queue._gateway.database.bell.waiters:
                        time.sleep(0.001)
                    os.kill(os.getpid(), signal.SIGINT)

                threading.Thread(target=interrupt).start()
                try:
                    twin.dequeue(timeout=None)
                except KeyboardInterrupt:
                    pass
                else:
                    raise AssertionError("the signal was lost")
                task_id = twin.enqueue(Task("f"))
                time.sleep(0.05)  # for a claim that goes on
                task = twin.get_task(task_id)
                assert (task.status, task.attempt) == ("pending", 0), task
                assert twin.dequeue() is not None
                os._exit(0)
                """
            ),
            path,
        )

    def test_signals_into_claims_of_a_twin_of_from_async_strand_nothing(
        self, path: str
    ) -> None:
        run_program(
            TWIN_PROGRAM
            + textwrap.dedent(
                """
                random.seed(1)
                pid = os.getpid()
                twin.enqueue(Task("f"))
                for _ in range(80):
                    task, seconds = None, random.uniform(0.001, 0.004)
                    shot = threading.Timer(seconds, os.kill, (pid, signal.SIGINT))
                    try:
                        shot.start()
                        while True:
                            task = twin.dequeue(timeout=10, lease=3600)
                            twin.release(task)
                            task = None
                    except KeyboardInterrupt:
                        shot.join()
                    try:
                        if task is not None:
                            twin.release(task)
                    except LeaseLostError:
                        pass  # the interrupt came when it was released
                assert twin.dequeue(timeout=10) is not None, "a claim was stranded"
                os._exit(0)
                """
            ),
            path,
        )

    def test_a_twin_of_from_async_in_memory_can_give_a_claim_back(self) -> None:
        async def use() -> None:
            queue = AsyncSQLiteQueue(":memory:")
            await queue.enqueue(Task("f"))
            twin = SQLiteQueue.from_async(queue)
            calls: list[Any] = []
            real = omniq_sqlite._LoopCall.run

            def run(one: Any) -> Any:
                calls.append(one)
                return real(one)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(omniq_sqlite._LoopCall, "run", run)
                task = await asyncio.to_thread(twin.dequeue)
            assert task is not None
            calls[0].undo()
            given_back = await queue.get_task(task.id)
            assert given_back is not None
            assert given_back.status == "pending"
            await queue.close()

        asyncio.run(use())


class Alarm(Exception):
    """What a signal handler of the program raises."""


def raising_once(method: Any, *, before: bool) -> Any:
    """Return `method`, at whose begin or end an exception comes at its first call."""
    calls: list[None] = []

    def wrapped(*args: Any, **terms: Any) -> Any:
        calls.append(None)
        if before and len(calls) == 1:
            raise Alarm
        result = method(*args, **terms)
        if len(calls) == 1:
            raise Alarm
        return result

    return wrapped


class TestRaisingHandlers:
    """An exception of a signal handler may come anywhere, and leaves nothing behind.

    Here it is raised where it once did harm.
    """

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(omniq_sqlite, "_LOST_WAKE", 0.05)

    @pytest.mark.parametrize(
        ("owner", "name", "before"),
        [
            (omniq_sqlite._Database, "enlist", True),
            (omniq_sqlite._Database, "enlist", False),
            (omniq_sqlite._Database, "hand_over", False),
            (omniq_sqlite._Pool, "__exit__", True),
            (omniq_sqlite._Pool, "__exit__", False),
            (omniq_sqlite._Pool, "__enter__", True),
        ],
    )
    def test_the_next_call_goes_on(
        self,
        path: str,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        before: bool,
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.count_tasks()
            with monkeypatch.context() as patch:
                hit = raising_once(getattr(owner, name), before=before)
                patch.setattr(owner, name, hit)
                with pytest.raises(Alarm):
                    queue.enqueue(Task("f"))
            threads = Threads()
            threads.start(queue.enqueue, Task("g"))
            threads.join()
            queue.enqueue(Task("h"))
            assert {"g", "h"} <= set(select(path, "SELECT func FROM omniq_task"))

    @pytest.mark.parametrize(
        ("owner", "name"),
        [(omniq_sqlite._Wal, "flush"), (os, "stat"), (omniq_sqlite._Wal, "__init__")],
    )
    def test_an_alarm_that_looks_like_the_systems_error_is_none(
        self, path: str, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
    ) -> None:
        """A TimeoutError is an OSError: a flush "failed", the file was "replaced"."""
        queue = SQLiteQueue(path)
        if name != "__init__":
            queue.enqueue(Task("f"))
        with monkeypatch.context() as patch:
            real = getattr(owner, name)
            left = [TimeoutError("the program's own")]

            def hit(*args: Any) -> Any:
                if left:
                    raise left.pop()
                return real(*args)

            patch.setattr(owner, name, hit)
            with pytest.raises(TimeoutError, match="the program's own") as caught:
                queue.enqueue(Task("g"))
            assert not isinstance(caught.value, OmniQError)
        queue.enqueue(Task("h"))
        queue.close()
        assert "h" in select(path, "SELECT func FROM omniq_task")

    def test_one_that_ends_a_call_early_leaves_ctrl_c_alone(self, path: str) -> None:
        """Python 3.11 raises it behind the constructor: Ctrl-C did nothing any more."""
        before = signal.getsignal(signal.SIGINT)
        with SQLiteQueue(path) as queue:
            omniq_sqlite._Interrupts()
            queue.count_tasks()
            assert signal.getsignal(signal.SIGINT) is before
            assert omniq_sqlite._interrupts is None

    def test_a_handler_that_changes_sigint_is_not_undone(self, path: str) -> None:
        before = signal.getsignal(signal.SIGINT)

        def ignore(_connection: sqlite3.Connection) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        with SQLiteQueue(path) as queue:
            database = queue._async._gateway.database
            try:
                omniq_sqlite._shielded(lambda: database.read(ignore))
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            finally:
                signal.signal(signal.SIGINT, before)

    def test_one_while_a_waiter_looks_is_raised(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path) as queue:
            hit = raising_once(omniq_sqlite._Bell._version_moved, before=True)
            monkeypatch.setattr(omniq_sqlite._Bell, "_version_moved", hit)
            with pytest.raises(Alarm):
                queue.dequeue(timeout=5)

    def test_a_connection_that_was_closed_behind_its_pool_is_made_anew(
        self, path: str
    ) -> None:
        """By a fork in a handler just when it had left the pool."""
        with SQLiteQueue(path) as queue:
            queue.count_tasks()
            database = queue._async._gateway.database
            [connection] = database.readers.idle
            database.disconnect(connection)
            assert queue.count_tasks() == 0

    def test_what_the_collector_drops_is_dropped_in_a_thread(self) -> None:
        """It may run while its thread holds the very lock that is needed for it."""
        threads: list[int] = []

        class Dropped:
            def drop(self) -> None:
                threads.append(threading.get_ident())

        operations: Any = [Dropped()]
        omniq_sqlite._Arrival(operations)
        until(lambda: threads)
        assert threads != [threading.get_ident()]

    async def test_a_read_that_could_not_begin_is_not_waited_for(
        self, path: str
    ) -> None:
        queue = AsyncSQLiteQueue(path)

        def start() -> None:
            with pytest.raises(RuntimeError, match="event loop"):
                queue.count_tasks().send(None)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert queue._gateway.database.reads == 0
        await queue.close()

    @pytest.mark.parametrize("name", ["_take", "_deliver"])
    @pytest.mark.parametrize("before", [True, False])
    def test_what_found_nothing_is_asked_again(
        self, path: str, monkeypatch: pytest.MonkeyPatch, name: str, before: bool
    ) -> None:
        """It was off the list, unanswered, and its threads waited for ever."""
        with SQLiteQueue(path) as queue:
            queue.count_tasks()
            with monkeypatch.context() as patch:
                hit = raising_once(getattr(omniq_sqlite._Database, name), before=before)
                wrapped = hit if name == "_take" else staticmethod(hit)
                patch.setattr(omniq_sqlite._Database, name, wrapped)
                with pytest.raises(Alarm):
                    queue.dequeue()
            queue.enqueue(Task("f"))
            assert queue.dequeue() is not None

    @pytest.mark.parametrize("before", [True, False])
    def test_who_was_refused_is_refused_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
    ) -> None:
        path = tmp_path / "jobs.db"
        path.write_text("this is not a database, and it is long enough to tell" * 20)
        queue = SQLiteQueue(path)
        with monkeypatch.context() as patch:
            hit = raising_once(omniq_sqlite._Database._deliver, before=before)
            patch.setattr(omniq_sqlite._Database, "_deliver", staticmethod(hit))
            with pytest.raises(Alarm):
                queue.enqueue(Task("f"))
        with pytest.raises(CorruptDatabaseError):
            queue.enqueue(Task("f"))
        queue.close()

    def test_a_checkpoint_leaves_no_lock(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: True)
        monkeypatch.setattr(omniq_sqlite, "_CHECKPOINT_COMMITS", 1)
        with SQLiteQueue(path) as queue:
            with monkeypatch.context() as patch:
                retry = omniq_sqlite._Database.retry
                hit = raising_once(retry, before=False)

                def retry_or_hit(*args: Any, **terms: Any) -> Any:
                    return (hit if "patience" in terms else retry)(*args, **terms)

                patch.setattr(omniq_sqlite._Database, "retry", retry_or_hit)
                with pytest.raises(Alarm):
                    queue.enqueue(Task("f"))
            with raw(path) as other:
                other.execute("PRAGMA busy_timeout = 0")
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")

    def test_a_pool_for_checkpoints_is_freed_as_well(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: True)
        monkeypatch.setattr(omniq_sqlite, "_CHECKPOINT_COMMITS", 1)
        with SQLiteQueue(path) as queue:
            database = database_of(queue)
            exit_pool = omniq_sqlite._Pool.__exit__
            hits: list[None] = []

            def exit_or_raise(pool: Any, *args: Any) -> None:
                if pool is database.checkpointer and not hits:
                    hits.append(None)
                    raise Alarm
                exit_pool(pool, *args)

            monkeypatch.setattr(omniq_sqlite._Pool, "__exit__", exit_or_raise)
            with pytest.raises(Alarm):
                queue.enqueue(Task("f"))
            threads = Threads()
            threads.start(queue.enqueue, Task("g"))
            threads.join()

    async def test_what_was_asked_for_before_a_close_is_answered(
        self, path: str
    ) -> None:
        queue = AsyncSQLiteQueue(path)
        await queue.enqueue(Task("f"))
        reads = [asyncio.ensure_future(queue.count_tasks()) for _ in range(40)]
        await asyncio.sleep(0)
        await queue.close()
        assert await asyncio.gather(*reads) == [1] * 40

    def test_a_descriptor_is_never_closed_twice(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[int] = []

        def close(fd: int) -> None:
            closed.append(fd)
            raise Alarm

        class Made(omniq_sqlite._Descriptor):
            _fd = 1_000_000

        made = Made()
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            with pytest.raises(Alarm):
                made.close()
            made.close()
        assert closed == [1_000_000]

    @POSIX
    def test_a_fork_waits_for_what_a_close_could_not_wait_for(self, path: str) -> None:
        """The child's commits were lost with the WAL that the parent deleted."""
        queue = SQLiteQueue(path, busy_timeout=0.05)
        queue.enqueue(Task("f"))
        reading, go_on = threading.Event(), threading.Event()
        database = database_of(queue)

        def read(connection: sqlite3.Connection) -> None:
            connection.execute("SELECT count(*) FROM omniq_task").fetchall()
            reading.set()
            go_on.wait(DEADLINE)

        threads = Threads()
        threads.start(database.read, read)
        reading.wait(DEADLINE)
        queue.close()
        assert database.connections
        assert database in omniq_sqlite._databases
        go_on.set()
        threads.join()
        assert not database.connections

    @POSIX
    def test_a_child_gives_no_claim_of_the_parent_back(self) -> None:
        called: list[None] = []
        thread = threading.get_ident() + 1
        omniq_sqlite._undo[thread] = lambda: called.append(None)
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(thread in omniq_sqlite._undo)
            assert os.waitpid(pid, 0)[1] == 0
            assert thread in omniq_sqlite._undo
        finally:
            del omniq_sqlite._undo[thread]

    def test_a_bell_may_be_used_by_the_collector_inside_itself(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            bell = database_of(queue).bell
            threads = Threads()

            def use_twice() -> None:
                with bell.lock:
                    bell.ring()

            threads.start(use_twice)
            threads.join()

    def test_a_connection_that_is_in_no_pool_is_closed_before_a_fork(
        self, path: str
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            database = database_of(queue)
            [lost] = database.writer.idle
            database.writer.idle.clear()
            with database.gate:
                database.rest()
            assert database.connections == set()
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                lost.execute("SELECT 1")
            queue.enqueue(Task("g"))

    def test_a_wake_that_was_lost_is_made_up_for(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path) as queue:
            with write_lock(path):
                threads = Threads()
                threads.start(queue.enqueue, Task("f"))
                until(lambda: is_pending(queue, 1))
                threads.start(queue.enqueue, Task("g"))
                all_in_line(queue, 2)
                monkeypatch.setattr(omniq_sqlite._Latch, "__call__", lambda _: None)
            threads.join()
            assert queue.count_tasks() == 2

    def test_a_ring_that_was_lost_is_made_up_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(":memory:") as queue:
            found: list[Any] = []
            threads = Threads()
            threads.start(lambda: found.append(queue.dequeue(timeout=DEADLINE)))
            until(lambda: database_of(queue).bell.waiters)
            monkeypatch.setattr(omniq_sqlite._Bell, "ring", lambda _: None)
            queue.enqueue(Task("f"))
            threads.join()
            assert found[0].func == "f"

    def test_it_is_raised_in_its_own_thread(self, path: str) -> None:
        """The main thread leads, and it comes while the other's claim is looked at."""
        armed = threading.Event()

        def clock() -> float:
            main = threading.current_thread() is threading.main_thread()
            if main and armed.is_set():
                armed.clear()
                raise Alarm
            return time.time()

        with SQLiteQueue(path, clock=clock) as queue:
            queue.enqueue(Task("f"))
            found: list[Any] = []
            threads = Threads()

            def claim_behind_it() -> None:
                until(lambda: is_pending(queue, 1))
                armed.set()
                found.append(queue.dequeue())

            with write_lock(path):
                threads.start(claim_behind_it)
                with pytest.raises(Alarm):
                    queue.enqueue(Task("g"))
            threads.join()
            assert found[0].func == "f"
            assert queue.count_tasks() == 1


class TestThrownExceptions:
    """A task's timeout is thrown into its thread, but never into a blocking call."""

    def test_none_reaches_a_call_and_all_threads_go_on(self, run_here: RunHere) -> None:
        run_here("""
            class Thrown(BaseException):
                pass
            queue = SQLiteQueue(path, synchronous="OFF")
            queue.enqueue(Task("f", queue="kept"))
            stop, counts, errors = threading.Event(), [0] * 4, []
            thrown, caught, ready = [0] * 4, [0] * 4, [False] * 4
            def enqueue(number):  # a loop's jump back may be outside of a `try`
                ready[number] = True  # from here on one is caught
                while not stop.is_set():
                    queue.enqueue(Task("f"))
                    counts[number] += 1
                    sum(range(20_000))  # where one may be hit
            def hammer(number):
                while not stop.is_set():
                    try:
                        enqueue(number)
                    except Thrown:
                        ready[number] = False
                        caught[number] += 1
                    except BaseException as error:
                        errors.append(error)
                        raise
            threads = [threading.Thread(target=hammer, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            random.seed(2)
            limit = time.monotonic() + 3
            while sum(thrown) < 300 and time.monotonic() < limit:
                time.sleep(random.uniform(0.0, 0.002))
                number = random.randrange(4)
                # One at a time, which is looked at first: it may be caught just now.
                if caught[number] == thrown[number] and ready[number]:
                    ident = threads[number].ident
                    thrown[number] += omniq_sqlite._throw(ident, Thrown)
            goals = [count + 2 for count in counts]
            while any(count < goal for count, goal in zip(counts, goals)):
                time.sleep(0.001)
            stop.set()
            for thread in threads:
                thread.join()
            assert errors == [], errors
            assert caught == thrown, (caught, thrown)
            assert sum(caught) > 0
            acknowledged, found = sum(counts), queue.count_tasks(queue="default")
            assert 0 <= found - acknowledged <= sum(caught), (found, acknowledged)
            """)

    def test_one_thrown_while_a_call_begins_ends_it_before_it_did_anything(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            import ctypes
            class Thrown(BaseException):
                pass
            class Lock:
                "Free as soon as somebody has thrown at who waits for it."
                def __enter__(self):
                    thread = ctypes.c_ulong(threading.get_ident())
                    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
                    throw(thread, ctypes.py_object(Thrown))
                def __exit__(self, *_):
                    pass
            queue = SQLiteQueue(path)
            real, omniq_sqlite._operating_lock = omniq_sqlite._operating_lock, Lock()
            try:
                queue.enqueue(Task("f"))
            except Thrown:
                pass
            else:
                raise AssertionError
            omniq_sqlite._operating_lock = real
            assert not omniq_sqlite._operating
            assert queue.count_tasks() == 0
            """)

    def test_a_function_ends_and_is_interrupted_under_the_lock(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noted: list[int | None] = []
        anything: Any = None
        threads = omniq_sqlite._Threads("w", anything, anything)
        heartbeat: Any = types.SimpleNamespace(interval=0.0)
        run = omniq_sqlite._Run(Task("f"), heartbeat)

        class Lock:
            """Given to a function that ends just then."""

            def __enter__(self) -> None:
                noted.append(run.thread)

            def __exit__(self, *_: object) -> None:
                noted.append(run.thread)
                run.thread = None

        monkeypatch.setattr(omniq_sqlite, "_operating_lock", Lock())
        threads._perform(run)
        assert noted == [threading.get_ident(), None]
        monkeypatch.setattr(Lock, "__enter__", Lock.__exit__)
        run.thread = threading.get_ident()
        assert threads.interrupt(run) is False

    def test_whoever_throws_looks_and_throws_under_the_lock(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ident, real = threading.get_ident(), omniq_sqlite._operating_lock

        class Lock:
            """Given to a call that has just begun."""

            def __enter__(self) -> None:
                omniq_sqlite._operating.add(ident)

            def __exit__(self, *_: object) -> None:
                omniq_sqlite._operating.discard(ident)

        monkeypatch.setattr(omniq_sqlite, "_operating_lock", Lock())
        assert omniq_sqlite._throw(ident, ZeroDivisionError) is False
        monkeypatch.setattr(omniq_sqlite, "_operating_lock", real)
        with pytest.raises(ZeroDivisionError):
            assert omniq_sqlite._throw(ident, ZeroDivisionError) is True

    @POSIX
    def test_the_lock_is_free_in_a_forked_child(self, run_here: RunHere) -> None:
        """Another thread takes it while the fork waits for a reader."""
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            database = queue._async._gateway.database
            reader, go = reading(database)
            release = threading.Event()
            def hold():
                wait_for_a_fork(database)
                with omniq_sqlite._operating_lock:
                    go()
                    release.wait()
            holder = threading.Thread(target=hold)
            holder.start()
            join(fork(lambda: queue.enqueue(Task("child"))))
            release.set()
            holder.join()
            reader.join()
            assert rows() == ["child", "f"], rows()
            """)

    def test_a_timeout_that_comes_during_a_fork_is_put_off(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            database = queue._async._gateway.database
            reader, go = reading(database)
            thrown = []
            def throw():
                wait_for_a_fork(database)
                thrown.append(omniq_sqlite._throw(forker.ident, TaskTimeout))
                go()
            forker = threading.Thread(target=lambda: join(fork(lambda: None)))
            thrower = threading.Thread(target=throw)
            for thread in (thrower, forker):
                thread.start()
            for thread in (thrower, forker, reader):
                thread.join()
            assert thrown == [False]
            assert not omniq_sqlite._operating
            """)


def given_back(path: str) -> bool:
    """Tell whether the only task was claimed once and is pending again."""
    rows = select(path, "SELECT status, attempt, claims FROM omniq_task")
    return rows == [("pending", 0, 1)]


class TestCancellation:
    """Cancelled at any moment, nothing is stranded or left open."""

    async def test_before_it_starts_nothing_is_asked_for(
        self, path: str, spied: list[str]
    ) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            spied.clear()
            claiming = asyncio.ensure_future(queue.dequeue())
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            assert await queue.dequeue("other") is None
            assert "claim" not in spied

    async def test_before_the_delivery_the_claim_is_given_back(self, path: str) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            with write_lock(path):
                claiming = asyncio.ensure_future(queue.dequeue())
                await soon(lambda: database_of(queue).pending)
                claiming.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await claiming
            await soon(lambda: given_back(path))
            task = await queue.dequeue()
            assert task is not None
            assert task.attempt == 1

    async def test_after_the_result_was_set_the_claim_is_given_back(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            claiming: asyncio.Future[Task | None]
            arrive = omniq_sqlite._Operation.arrive

            def arrive_and_cancel(self: Any) -> None:
                arrive(self)
                if isinstance(self, omniq_sqlite._Claim):
                    claiming.cancel()

            monkeypatch.setattr(omniq_sqlite._Operation, "arrive", arrive_and_cancel)
            claiming = asyncio.ensure_future(queue.dequeue())
            with pytest.raises(asyncio.CancelledError):
                await claiming
            monkeypatch.undo()
            await soon(lambda: given_back(path))

    async def test_a_coroutine_that_is_thrown_away_gives_its_claim_back(
        self, path: str
    ) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            with write_lock(path):
                coroutine = queue.dequeue()
                coroutine.send(None)
                coroutine.close()
            await soon(lambda: given_back(path))

    async def test_others_of_the_group_get_their_answers(self, path: str) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            with write_lock(path):
                calls = [
                    asyncio.ensure_future(queue.enqueue(Task("f", id=f"t{i}")))
                    for i in range(5)
                ]
                await soon(lambda: len(database_of(queue).pending) == 5)
                calls[0].cancel()  # the one that leads
                calls[3].cancel()
            done = await asyncio.wait_for(
                asyncio.gather(*calls, return_exceptions=True), DEADLINE
            )
            assert [done[i] for i in (1, 2, 4)] == ["t1", "t2", "t4"]

    async def test_no_transaction_is_left_open(self, path: str) -> None:
        random.seed(5)
        async with AsyncSQLiteQueue(path, synchronous="OFF") as queue:
            await queue.enqueue(Task("f"))
            for _ in range(100):
                calls = [
                    asyncio.ensure_future(queue.enqueue(Task("f"))) for _ in range(3)
                ]
                await asyncio.sleep(random.uniform(0, 0.0005))
                for each in calls:
                    each.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
            await soon(lambda: not database_of(queue).pending)
            with raw(path) as connection:
                connection.execute("BEGIN IMMEDIATE")  # nobody holds the lock
                connection.execute("ROLLBACK")

    async def test_four_hundred_dequeues_cancelled_while_tasks_arrive(
        self, path: str
    ) -> None:
        random.seed(3)
        owned: list[str] = []
        async with AsyncSQLiteQueue(path, synchronous="OFF") as queue:

            async def consume() -> None:
                task = await queue.dequeue(timeout=None)
                assert task is not None
                owned.append(task.id)

            waiting = [asyncio.ensure_future(consume()) for _ in range(400)]
            for number in range(200):
                await queue.enqueue(Task("f", id=f"t{number}"))
                for each in random.sample(waiting, 4):
                    each.cancel()
                if number % 3 == 0:
                    await asyncio.sleep(random.uniform(0, 0.001))
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        running = select(path, "SELECT id FROM omniq_task WHERE status = 'running'")
        assert sorted(running) == sorted(owned)
        assert len(statuses(path)) == 200

    async def test_timeouts_and_cancel_scopes_around_everything(
        self, path: str
    ) -> None:
        random.seed(4)
        owned: list[str] = []
        async with AsyncSQLiteQueue(path, synchronous="OFF") as queue:
            for number in range(60):
                await queue.enqueue(Task("f"))
                patience = random.uniform(0, 0.0008)
                if number % 2:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(patience):
                            task = await queue.dequeue()
                            owned.extend([task.id] if task else [])
                else:
                    with anyio.move_on_after(patience):
                        task = await queue.dequeue()
                        owned.extend([task.id] if task else [])
        running = select(path, "SELECT id FROM omniq_task WHERE status = 'running'")
        assert sorted(running) == sorted(owned)

    async def test_a_task_group_that_fails_beside_a_dequeue(self, path: str) -> None:
        async with AsyncSQLiteQueue(path) as queue:
            await queue.enqueue(Task("f"))
            with write_lock(path), pytest.raises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(queue.dequeue())
                    await soon(lambda: database_of(queue).pending)
                    raise ZeroDivisionError
            await soon(lambda: given_back(path))

    async def test_a_cancelled_close_closes_all_the_same(self, path: str) -> None:
        queue = AsyncSQLiteQueue(path)
        await queue.enqueue(Task("f"))
        closing = asyncio.ensure_future(queue.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await soon(lambda: not os.path.exists(path + "-wal"))

    async def test_while_its_event_is_logged_elsewhere_the_claim_is_given_back(
        self, path: str
    ) -> None:
        logging_it = asyncio.Event()

        class Slow(AsyncSQLiteEventStorage):
            async def log_many(self, events: Any) -> None:
                if events[0].type == "dequeued":
                    logging_it.set()
                    await asyncio.Event().wait()

        async with AsyncSQLiteQueue(path, events=Slow(path + ".events")) as queue:
            await queue.enqueue(Task("f"))
            claiming = asyncio.ensure_future(queue.dequeue())
            await asyncio.wait_for(logging_it.wait(), DEADLINE)
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            await soon(lambda: given_back(path))


class TestCheckpoints:
    """On an affected library only under the guard, and bounded."""

    def test_a_wal_that_was_cut_grows_no_further_than_before(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []
        with SQLiteQueue(path) as queue:
            database = database_of(queue)
            database.guarded = True
            database.wal_size = 2**40
            monkeypatch.setattr(database, "_checkpoint", lambda: made.append(1))
            for _ in range(2):
                queue.enqueue(Task("f", ("x" * 6_000_000,)))
        assert made == [1]

    @pytest.mark.parametrize(
        ("version", "affected"),
        [
            ((3, 37, 0), True),
            ((3, 40, 1), True),
            ((3, 44, 5), True),
            ((3, 44, 6), False),
            ((3, 45, 0), True),
            ((3, 50, 6), True),
            ((3, 50, 7), False),
            ((3, 51, 2), True),
            ((3, 51, 3), False),
            ((3, 52, 0), False),
            ((4, 0, 0), False),
        ],
    )
    def test_which_libraries_are_affected(
        self, version: tuple[int, ...], affected: bool
    ) -> None:
        assert omniq_sqlite._has_wal_reset_bug(version) is affected

    @pytest.fixture
    def affected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: True)
        monkeypatch.setattr(omniq_sqlite, "_CHECKPOINT_COMMITS", 10)

    @pytest.mark.usefixtures("affected")
    def test_no_connection_checkpoints_by_itself(self, path: str, spied: Any) -> None:
        with SQLiteQueue(path, synchronous="OFF") as queue:
            for _ in range(25):
                queue.enqueue(Task("f"))
            queue.count_tasks()
            # Four, with that which checkpoints.
            until(lambda: queue.dequeue("none", timeout=0.01) or len(Spied.opened) >= 4)
            for connection in Spied.opened:
                assert pragma(connection, "wal_autocheckpoint") == 0

    def test_a_mended_library_checkpoints_by_itself(
        self, path: str, spied: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: False)
        monkeypatch.setattr(omniq_sqlite, "_CHECKPOINT_COMMITS", 1)
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            queue.enqueue(Task("f"))
            assert pragma(Spied.opened[0], "wal_autocheckpoint") == 1000
        assert "PRAGMA wal_checkpoint(PASSIVE)" not in spied

    @pytest.mark.usefixtures("affected")
    def test_a_checkpoint_runs_while_another_connection_holds_the_write_lock(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked: list[bool] = []

        class Watching(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if "wal_checkpoint" in sql:
                    with raw(path, check_same_thread=False) as other:
                        other.execute("PRAGMA busy_timeout = 0")
                        try:
                            other.execute("BEGIN IMMEDIATE")
                        except sqlite3.OperationalError:
                            locked.append(not self.in_transaction)
                        else:
                            locked.append(False)
                return super().execute(sql, *args)

        factory = partial(sqlite3.connect, factory=Watching)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        with SQLiteQueue(path, synchronous="OFF") as queue:
            for _ in range(35):
                queue.enqueue(Task("f"))
        assert locked == [True] * 3

    @pytest.mark.usefixtures("affected")
    def test_a_checkpoint_leaves_no_lock_and_copies_the_wal(self, path: str) -> None:
        with SQLiteQueue(path, synchronous="OFF") as queue:
            for _ in range(10):
                queue.enqueue(Task("f", ("x" * 5_000,)))
            assert os.stat(path).st_size > 50_000
            with raw(path) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")

    @pytest.mark.usefixtures("affected")
    def test_large_commits_bring_a_checkpoint_forward(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path, synchronous="OFF") as queue:
            queue.enqueue(Task("f", ("x" * 5_000_000,)))
            queue.enqueue(Task("f"))
            assert spied.count("PRAGMA wal_checkpoint(PASSIVE)") == 1

    @pytest.mark.parametrize("affected", [True, False])
    def test_the_size_of_the_wal_is_not_looked_at_after_each_quick_commit(
        self, path: str, monkeypatch: pytest.MonkeyPatch, affected: bool
    ) -> None:
        looked, real = [], os.stat

        def stat_of(name: Any, **options: Any) -> os.stat_result:
            looked.extend([name] if str(name).endswith("-wal") else [])
            return real(name, **options)

        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: affected)
        monkeypatch.setattr(omniq_sqlite, "_CHECKPOINT_COMMITS", 256 if affected else 1)
        monkeypatch.setattr(omniq_sqlite, "_QUICK", 60.0)
        with SQLiteQueue(path, synchronous="OFF") as queue:
            queue.enqueue(Task("f"))
            monkeypatch.setattr(os, "stat", stat_of)
            for _ in range(32):
                queue.enqueue(Task("f"))
            assert len(looked) == 2
            monkeypatch.setattr(omniq_sqlite, "_QUICK", 0.0)
            queue.enqueue(Task("f"))
            assert len(looked) == 3
            monkeypatch.undo()

    @pytest.mark.usefixtures("affected")
    def test_a_checkpoint_that_finds_the_file_busy_is_put_off(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path, synchronous="OFF") as queue:
            queue.enqueue(Task("f"))
            with write_lock(path):
                database_of(queue)._checkpoint()
            queue.enqueue(Task("f"))
            assert statuses(path) == ["pending"] * 2

    def test_the_wal_stays_bounded_while_two_processes_commit(
        self, programs: Programs, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("f"))
        code = """
            queue = SQLiteQueue(path, synchronous="OFF")
            for _ in range(900):
                queue.enqueue(Task("f", ("x" * 8_000,)))
            queue.close()
        """
        started = [programs.start(code, path) for _ in range(2)]
        largest = 0
        while any(program.poll() is None for program in started):
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(path + "-wal").st_size)
            time.sleep(0.005)
        for program in started:
            programs.finish(program)
        assert 0 < largest < 16 * 2**20  # of 30 MB that were written
        assert is_whole(path)
        assert len(statuses(path)) == 1801

    def test_a_long_reader_stops_it_only_while_it_reads(self, path: str) -> None:
        with SQLiteQueue(path, synchronous="OFF") as queue:
            queue.enqueue(Task("f"))
            with raw(path) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM omniq_task").fetchall()
                for _ in range(40):
                    queue.enqueue(Task("f", ("x" * 300_000,)))
                grown = os.stat(path + "-wal").st_size
                assert grown > 10_000_000
                reader.execute("ROLLBACK")
            for _ in range(60):
                queue.enqueue(Task("f", ("x" * 300_000,)))
            assert os.stat(path + "-wal").st_size < grown + 12 * 2**20

    @pytest.mark.parametrize("affected", [True, False])
    def test_while_a_reader_holds_a_long_wal_writes_are_slowed(
        self,
        path: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        affected: bool,
    ) -> None:
        pauses: list[float] = []
        monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: affected)
        monkeypatch.setattr(omniq_sqlite, "_HELD_WAL_BYTES", 10 * 2**20)
        monkeypatch.setattr(omniq_sqlite, "_HELD_WAL_PACE", 1_000 * 2**20)
        with SQLiteQueue(path, synchronous="OFF") as queue:
            queue.enqueue(Task("f"))
            with raw(path) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM omniq_task").fetchall()
                queue.enqueue(Task("f", ("x" * 12 * 2**20,)))
                with monkeypatch.context() as patch:
                    patch.setattr(time, "sleep", pauses.append)
                    for _ in range(20):
                        queue.enqueue(Task("f", ("x" * 100_000,)))
                    with SQLiteQueue(path, synchronous="OFF") as other:
                        other.enqueue(Task("f", ("x" * 5 * 2**20,)))
                reader.execute("ROLLBACK")
            expected = [0.1 / 2**10] * 20 + [5 / 1_000]
            assert pauses == pytest.approx(expected, rel=0.5)
            assert [r.message for r in caplog.records] == [
                f"the WAL of {path!r} has 12 MiB; while a reader holds it, writes are"
                " slowed",
                f"the WAL of {path!r} has 19 MiB; while a reader holds it, writes are"
                " slowed",
            ]
            for _ in range(3):
                queue.enqueue(Task("f", ("x" * 300_000,)))
            with monkeypatch.context() as patch:
                patch.setattr(time, "sleep", pauses.append)
                queue.enqueue(Task("f", ("x" * 300_000,)))
            assert len(pauses) == 21

    def test_a_long_wal_slows_a_write_by_a_quarter_of_a_second_at_most(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses: list[float] = []
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            database = database_of(queue)
            monkeypatch.setattr(time, "sleep", pauses.append)
            database._slow_down(2**40)
        assert pauses == [0.25]


OLDER = """
    CREATE TABLE omniq_schema (
        component TEXT NOT NULL PRIMARY KEY, version INTEGER NOT NULL) STRICT;
    INSERT INTO omniq_schema VALUES ('results', 1);
    CREATE TABLE omniq_result (task_id TEXT PRIMARY KEY, old TEXT) STRICT;
    INSERT INTO omniq_result VALUES ('kept', 'value');
"""


class TestSchema:
    def test_a_component_can_come_later(self, path: str) -> None:
        with SQLiteResultStorage(path), SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        found = select(path, "SELECT component FROM omniq_schema ORDER BY component")
        assert found == ["queue", "results"]

    def test_opening_a_file_that_is_up_to_date_writes_nothing(
        self, path: str, spied: list[str]
    ) -> None:
        with SQLiteQueue(path):
            pass
        spied.clear()
        with SQLiteQueue(path):
            pass
        assert "BEGIN IMMEDIATE" not in spied

    def test_eight_processes_may_create_a_file_at_the_same_moment(
        self, programs: Programs, path: str
    ) -> None:
        self.open_at_once(programs, path, "", "AAAAAAAA")
        assert statuses(path) == ["pending"] * 8

    def test_eight_processes_may_migrate_an_older_file_at_the_same_moment(
        self, programs: Programs, path: str
    ) -> None:
        with raw(path) as connection:
            connection.executescript(OLDER)
        steps = """
            steps = omniq_sqlite.MIGRATIONS["results"]
            omniq_sqlite.MIGRATIONS["results"] = [
                ("CREATE TABLE omniq_result (task_id TEXT PRIMARY KEY, old TEXT)",),
                ("ALTER TABLE omniq_result RENAME TO made_up",
                 "CREATE TABLE counted (n INTEGER)"),
                steps[0] + ("INSERT INTO omniq_result (task_id, status, value, "
                 "metadata, stored_at) SELECT task_id, 'success', "
                 "json_quote(old), '{}', 0 FROM made_up",
                 "DROP TABLE made_up", "INSERT INTO counted VALUES (1)"),
            ]
        """
        self.open_at_once(programs, path, steps, "BBBBBBBB")
        assert select(path, "SELECT n FROM counted") == [1]
        versions = select(path, "SELECT component, version FROM omniq_schema")
        assert sorted(versions) == [("queue", 1), ("results", 3)]
        assert select(path, "SELECT value FROM omniq_result") == ['"value"']
        assert is_whole(path)

    def open_at_once(
        self, programs: Programs, path: str, steps: str, what: str
    ) -> None:
        code = textwrap.dedent(steps) + textwrap.dedent(
            """
            print("ready", flush=True)
            sys.stdin.readline()
            backend = SQLiteBackend(path) if arguments[0] == "B" else SQLiteQueue(path)
            with backend:
                backend.enqueue(Task("f"))
                if arguments[0] == "B":
                    assert backend.results.get("kept").value == "value"
            """
        )
        started = [programs.start(code, path, letter) for letter in what]
        for program in started:
            assert programs.read(program) == "ready"
        for program in started:
            programs.go(program)
        for program in started:
            programs.finish(program)

    def test_a_migration_that_fails_changes_nothing(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        steps = [*omniq_sqlite.MIGRATIONS["queue"]]
        steps.append(("CREATE TABLE half (x)", "SELECT * FROM nowhere"))
        monkeypatch.setitem(omniq_sqlite.MIGRATIONS, "queue", steps)
        with pytest.raises(OmniQError, match="nowhere"):
            SQLiteQueue(path).count_tasks()
        monkeypatch.undo()
        assert select(path, "SELECT name FROM sqlite_schema WHERE name = 'half'") == []
        assert SQLiteQueue(path).count_tasks() == 1

    @pytest.mark.parametrize(
        "foreign",
        [
            "CREATE TABLE omniq_task (mine TEXT)",
            "CREATE VIEW omniq_task AS SELECT 1",
            "CREATE TABLE omniq_schema (mine TEXT)",
            "CREATE TABLE omniq_schema (component, version);"
            "INSERT INTO omniq_schema VALUES ('queue', 'many')",
        ],
    )
    def test_a_table_of_our_name_that_is_not_ours_is_refused(
        self, path: str, foreign: str
    ) -> None:
        with raw(path) as connection:
            connection.executescript(foreign)
        tables = select(path, "SELECT sql FROM sqlite_schema")
        with pytest.raises(SchemaVersionError, match="not OmniQ's"):
            SQLiteQueue(path).count_tasks()
        assert select(path, "SELECT sql FROM sqlite_schema") == tables

    def test_a_temporary_table_of_our_name_shadows_nothing(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            [writer] = database_of(queue).writer.idle
            writer.execute("CREATE TEMP TABLE omniq_task (id TEXT)")
            queue.enqueue(Task("g"))
            assert statuses(path) == ["pending"] * 2


MOUNTS = """
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:25 / /proc rw - proc proc rw
40 22 0:40 / /mnt/share rw,relatime shared:5 - nfs4 server:/export rw,vers=4.2
41 40 8:2 / /mnt/share/local rw,relatime - xfs /dev/sdb1 rw
42 22 0:41 / /mnt/with\\040space rw,relatime - cifs //server/x rw
43 22 0:42 / /home/me/remote rw - fuse.sshfs me@server: rw
44 22 0:43 /sub /data rw master:3 - 9p drvfs rw
46 22 0:44 / /mnt/caf\u00e9\udcff rw - nfs server:/cafe rw
45 22 8:3 / /mnt/share rw,relatime - ext4 /dev/sdc1 rw
broken line
"""


class TestNetworkFilesystems:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("/var/lib/jobs.db", "ext4"),
            ("/mnt/shared/jobs.db", "ext4"),  # begins like the mount, is not in it
            ("/mnt/share/jobs.db", "ext4"),  # mounted over the share
            ("/mnt/share/local/jobs.db", "xfs"),
            ("/mnt/with space/jobs.db", "cifs"),
            ("/home/me/remote", "fuse.sshfs"),
            ("/data/deep/er/jobs.db", "9p"),
            ("/mnt/caf\u00e9\udcff/jobs.db", "nfs"),
        ],
    )
    def test_the_innermost_and_last_mount_counts(self, path: str, name: str) -> None:
        assert omniq_sqlite._filesystem_of(path, MOUNTS) == name

    def test_without_mounts_nothing_is_known(self) -> None:
        assert omniq_sqlite._filesystem_of("/x", "") == ""

    @pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's mountinfo")
    @pytest.mark.parametrize(
        "name", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "smb3"]
    )
    def test_it_is_refused_before_anything_is_created(
        self, path: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_filesystem_of", lambda *_: name)
        with pytest.raises(NetworkFilesystemError, match=name):
            SQLiteQueue(path).enqueue(Task("f"))
        assert not os.path.exists(path)
        with SQLiteQueue(path, allow_network_fs=True) as queue:
            queue.enqueue(Task("f"))

    def test_a_local_one_is_fine(self, path: str) -> None:
        assert omniq_sqlite._network_filesystem(path) is None

    def test_where_it_is_allowed_nothing_is_looked_at(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(omniq_sqlite, "_network_filesystem")
        SQLiteQueue(path, allow_network_fs=True).enqueue(Task("f"))

    @pytest.mark.parametrize(
        "error",
        [FileNotFoundError(2, "no mount"), subprocess.TimeoutExpired("mount", 1)],
    )
    def test_a_mac_whose_mounts_cannot_be_listed(
        self, path: str, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(subprocess, "run", run)
        assert omniq_sqlite._network_filesystem(path) is None


class TestFiles:
    def test_a_file_that_is_there_keeps_its_mode(self, path: str) -> None:
        with raw(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
        os.chmod(path, 0o640)
        SQLiteQueue(path).enqueue(Task("f"))
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640

    def test_a_file_system_without_hard_links(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", link)
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        assert os.listdir(os.path.dirname(path)) == ["jobs.db"]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

    @pytest.mark.parametrize("how", ["deleted", "replaced"])
    @pytest.mark.parametrize("form", ["blocking", "async"])
    async def test_a_file_that_went_away_is_noticed_by_every_call(
        self, path: str, how: str, form: str
    ) -> None:
        made = SQLiteQueue if form == "blocking" else AsyncSQLiteQueue
        queue = made(path)

        async def run(method: Any, *args: Any, **options: Any) -> Any:
            if isinstance(queue, AsyncSQLiteQueue):
                return await method(*args, **options)
            return await asyncio.to_thread(method, *args, **options)

        await run(queue.enqueue, Task("f"))
        task = await run(queue.dequeue)
        waiting = asyncio.ensure_future(run(queue.dequeue, "none", timeout=None))
        await soon(lambda: database_of(queue).bell.waiters)
        os.rename(path, path + ".old")
        if how == "replaced":
            other = SQLiteQueue(path)
            other.enqueue(Task("of the new file"))
            other.close()
        for call in (
            partial(queue.enqueue, Task("g")),
            queue.dequeue,
            partial(queue.complete, task),
            partial(queue.extend, task),
            queue.count_tasks,
        ):
            with pytest.raises(DatabaseReplacedError):
                await run(call)
        with pytest.raises(DatabaseReplacedError):
            await asyncio.wait_for(waiting, DEADLINE)
        assert os.path.exists(path) is (how == "replaced")
        if how == "replaced":
            assert statuses(path) == ["pending"]
        else:
            os.rename(path + ".old", path)  # it is put back
            await run(queue.complete, task)
        await run(queue.close)

    def test_an_error_of_a_file_that_went_away_says_so(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            os.rename(path, path + ".old")
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            translated = database_of(queue).translate(error)
            assert isinstance(translated, DatabaseReplacedError)
            os.rename(path + ".old", path)

    def test_a_commit_into_a_file_that_just_went_away_is_not_acknowledged(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Moving(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if sql == "COMMIT" and os.path.exists(path + ".now"):
                    os.rename(path, path + ".old")
                return super().execute(sql, *args)

        factory = partial(sqlite3.connect, factory=Moving)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        queue = SQLiteQueue(path)
        queue.enqueue(Task("f"))
        Path(path + ".now").touch()
        with pytest.raises(DatabaseReplacedError):
            queue.enqueue(Task("g"))
        queue.close()

    def test_a_directory_in_place_of_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(DatabaseAccessError, match="directory"):
            SQLiteQueue(tmp_path).enqueue(Task("f"))

    @pytest.mark.parametrize(
        "content",
        [b"garbage" * 1000, os.urandom(8192), b"SQLite format 3\0" + b"x" * 90],
    )
    def test_garbage_is_refused_and_left_alone(self, path: str, content: bytes) -> None:
        Path(path).write_bytes(content)
        with pytest.raises(CorruptDatabaseError) as caught:
            SQLiteQueue(path).enqueue(Task("f"))
        assert caught.value.path == path
        assert Path(path).read_bytes() == content

    async def test_damage_that_sqlite_cannot_tell_in_utf_8(self, path: str) -> None:
        """Python fails to decode such a message, with an error of its own."""
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        whole = Path(path).read_bytes()
        damaged = whole.replace(b"CREATE INDEX omniq", b"CREATE IND\x9aX omniq")
        assert damaged != whole
        Path(path).write_bytes(damaged)
        for attempt in (SQLiteQueue(path).count_tasks, SQLiteQueue(path).dequeue):
            with pytest.raises(CorruptDatabaseError):
                attempt()
        with pytest.raises(CorruptDatabaseError):
            await AsyncSQLiteQueue(path).enqueue(Task("f"))

    def test_a_truncated_file(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue_many([Task("f", ("x" * 1000,)) for _ in range(50)])
        os.truncate(path, os.stat(path).st_size // 2)
        with pytest.raises(CorruptDatabaseError), SQLiteQueue(path) as queue:
            queue.list_tasks()
            queue.enqueue_many([Task("f") for _ in range(50)])

    def test_an_empty_file_becomes_a_database(self, path: str) -> None:
        Path(path).touch()
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        assert statuses(path) == ["pending"]

    @POSIX
    def test_what_a_crash_left_in_the_wal_is_recovered(
        self, path: str, run_here: RunHere
    ) -> None:
        run_here("""
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            os._exit(0)
            """)
        assert os.stat(path + "-wal").st_size > 0
        with SQLiteQueue(path) as queue:
            assert queue.count_tasks() == 1

    @POSIX
    def test_a_read_only_file_can_be_read_and_says_why_it_cannot_be_written(
        self, path: str
    ) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        os.chmod(path, 0o444)
        os.chmod(os.path.dirname(path), 0o755)
        run_program(
            """
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            queue = SQLiteQueue(path)
            for call in (lambda: queue.enqueue(Task("g")), queue.dequeue):
                try:
                    call()
                except (ReadOnlyDatabaseError, DatabaseAccessError):
                    pass
                else:
                    raise AssertionError
            os._exit(0)
            """,
            self.open_to_others(path),
        )
        assert statuses(path) == ["pending"]

    @POSIX
    def test_a_file_that_may_not_be_read_is_told_as_such(self, path: str) -> None:
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
        os.chmod(path, 0o000)
        out = run_program(
            """
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            try:
                SQLiteQueue(path).count_tasks()
            except DatabaseAccessError as error:
                print(error)
            """,
            self.open_to_others(path),
        )
        assert out.endswith("it may not be read")

    @staticmethod
    def open_to_others(path: str) -> str:
        """Let every user go down to the file."""
        for folder in Path(path).parents:
            if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        return path

    def test_a_file_of_another_kind_of_error_names_the_file(self, path: str) -> None:
        database = database_of(SQLiteQueue(path))
        for code, kind in (
            (sqlite3.SQLITE_BUSY, DatabaseBusyError),
            (sqlite3.SQLITE_LOCKED, DatabaseBusyError),
            (sqlite3.SQLITE_FULL, DatabaseFullError),
            (sqlite3.SQLITE_READONLY, ReadOnlyDatabaseError),
            (sqlite3.SQLITE_CORRUPT, CorruptDatabaseError),
            (sqlite3.SQLITE_NOTADB, CorruptDatabaseError),
            (sqlite3.SQLITE_IOERR, DatabaseAccessError),
            (sqlite3.SQLITE_IOERR_FSYNC, DatabaseAccessError),
            (sqlite3.SQLITE_CANTOPEN, DatabaseAccessError),
            (sqlite3.SQLITE_INTERRUPT, OmniQError),
        ):
            error = sqlite3.OperationalError("why")
            error.sqlite_errorcode = code
            translated = database.translate(error)
            assert type(translated) is kind
            assert path in str(translated)
            assert pickle.loads(pickle.dumps(translated)).args == translated.args

    def test_nothing_but_sqlite_ever_opens_the_file(self, path: str) -> None:
        """To close another descriptor of it would drop the locks of the process."""
        code = """
            import contextlib, io, pickle
            opened = set()
            def note(event, args):
                if event == "open" and not isinstance(args[0], int):
                    opened.add(os.path.realpath(os.fsdecode(args[0])))
            sys.addaudithook(note)
            tasks = TaskRegistry()
            work = tasks.register(name="work")(lambda: progress(1))
            fine = pickle.loads(bytes.fromhex(arguments[0]))
            with SQLiteBackend(path, events=True) as backend:
                parts = {"Queue": backend.queue, "ResultStorage": backend.results,
                         "EventStorage": backend.events, "Backend": backend}
                for kind, methods in fine.items():
                    for name, terms in methods.items():
                        with contextlib.suppress(OmniQError):
                            getattr(parts[kind], name)(**terms)
                backend.queue.cancel_all()
                backend.enqueue_many([Task("work") for _ in range(5)])
                task, other, third = backend.queue.dequeue_many(3)
                backend.queue.extend(task)
                backend.complete(task, 1, enqueue=[Task("work", id="next")])
                backend.queue.fail(other, "no", retry=False)
                backend.queue.release(third)
                Worker(backend, tasks).run(until_empty=True, signals=False)
                assert len(list(backend.wait_all([task.id, "next"]))) == 2
                assert next(backend.events.follow(after="0")).id
                backend.queue.list_queues(), backend.queue.list_workers()
                backend.queue.stats(), backend.cleanup(), backend.check()
                backend.backup(path + ".copy")
            with contextlib.redirect_stdout(io.StringIO()):
                for command in (
                    "stats FILE", "list FILE", "show FILE next", "events FILE",
                    "enqueue FILE f 1", "pause FILE q", "resume FILE q",
                    "retry FILE --all", "cancel FILE --all", "purge FILE --all",
                    "check FILE", "backup FILE FILE.2", "report FILE -o FILE.html",
                ):
                    words = [w.replace("FILE", path) for w in command.split()]
                    assert main(words) == 0, words
            here = os.path.realpath(path)
            assert here + "-wal" in opened
            assert here not in opened
            """
        run_program(code, path, pickle.dumps(FINE).hex())


@POSIX
class TestFullDisk:
    def test_a_quota_names_itself_and_the_same_object_works_afterwards(
        self, run_here: RunHere
    ) -> None:
        run_here("""
            import resource
            queue = SQLiteQueue(path)
            queue.enqueue(Task("f"))
            task = queue.dequeue()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            size = os.stat(path + "-wal").st_size + 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            failed = []
            for _ in range(3):
                try:
                    queue.enqueue(Task("large", ("x" * 100_000,)))
                except DatabaseFullError as error:
                    failed.append(error)
            assert len(failed) == 3
            assert queue.count_tasks() == 1
            queue.complete(task)  # small enough
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            queue.enqueue(Task("large", ("x" * 100_000,)))
            queue.close()
            assert rows() == ["large"], rows()
            """)

    def test_a_full_disk_names_itself_and_the_same_object_works_afterwards(
        self, tmp_path: Path
    ) -> None:
        folder = tmp_path / "small"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(mount, capture_output=True, check=False)
        except OSError:
            pytest.skip("there is no mount command")
        if mounted.returncode != 0:
            pytest.skip("only root can mount a small disk")
        try:
            run_program(
                """
                queue = SQLiteQueue(path)
                queue.enqueue(Task("f"))
                ballast = os.path.join(os.path.dirname(path), "ballast")
                with open(ballast, "wb") as file:
                    try:
                        while True:
                            file.write(b"x" * 4096)
                            file.flush()
                    except OSError:
                        pass
                    finally:
                        try:
                            file.close()
                        except OSError:
                            pass
                for _ in range(3):
                    try:
                        queue.enqueue(Task("large", ("x" * 100_000,)))
                    except DatabaseFullError:
                        pass
                    else:
                        raise AssertionError
                assert queue.count_tasks() == 1
                os.unlink(ballast)
                queue.enqueue(Task("large", ("x" * 100_000,)))
                queue.close()
                assert rows() == ["f", "large"], rows()
                """,
                folder / "jobs.db",
            )
        finally:
            subprocess.run(["umount", str(folder)], check=True)


class Fault:
    """What happens at which statement; shared by the connections of a test."""

    at = 0
    code = 0
    ends_transaction = False
    hit = ""

    @classmethod
    def arm(cls, at: int, code: int, *, ends_transaction: bool) -> None:
        cls.at, cls.code, cls.hit = at, code, ""
        cls.ends_transaction = ends_transaction

    @classmethod
    def strike(cls, connection: sqlite3.Connection, sql: str) -> None:
        cls.at -= 1
        if cls.at != 0:
            return
        cls.hit = brief(sql)
        if cls.ends_transaction and connection.in_transaction:
            connection.rollback()
        error = sqlite3.OperationalError("a fault")
        error.sqlite_errorcode = cls.code
        raise error


class Faulty(sqlite3.Connection):
    """A connection whose n-th statement fails."""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        Fault.strike(self, sql)
        return super().execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        Fault.strike(self, sql)
        return super().executemany(sql, *args)

    def cursor(self, *_: Any, **__: Any) -> Any:
        return super().cursor(FaultyCursor)


class FaultyCursor(sqlite3.Cursor):
    def execute(self, sql: str, *args: Any) -> Any:
        Fault.strike(self.connection, sql)
        return super().execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> Any:
        Fault.strike(self.connection, sql)
        return super().executemany(sql, *args)


def contents(path: object) -> dict[str, list[Any]]:
    """Return the rows of all tables."""
    with raw(path) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("omniq_task", "omniq_result", "omniq_event", "omniq_pause")
        }


READS = ("get_task", "stats", "query")
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "enqueue": lambda b, _: b.enqueue(Task("new", unique_key="k")),
    "enqueue a duplicate": lambda b, _: b.enqueue(
        Task("new", queue="held", unique_key="held")
    ),
    "enqueue_many": lambda b, _: b.enqueue_many([Task("a"), Task("b"), Task("c")]),
    "dequeue": lambda b, _: b.queue.dequeue(),
    "dequeue the due": lambda b, _: b.queue.dequeue("due"),
    "complete": lambda b, task: b.queue.complete(task),
    "complete with a result": lambda b, task: b.complete(
        task, 42, enqueue=[Task("next", unique_key="mine"), Task("more")]
    ),
    "complete_many with results": lambda b, task: b.complete_many([(task, 42)]),
    "fail": lambda b, task: b.fail(task, ValueError("x"), retry=False),
    "release": lambda b, task: b.queue.release(task, delay=5),
    "extend": lambda b, task: b.queue.extend(task, progress=1),
    "cancel_all": lambda b, _: b.queue.cancel_all(),
    "pause": lambda b, _: b.queue.pause("default"),
    "get_task": lambda b, task: b.queue.get_task(task.id),
    "stats": lambda b, _: b.queue.stats(),
    "query": lambda b, _: b.events.query(),
}
CODES = {
    "IOERR": (sqlite3.SQLITE_IOERR, DatabaseAccessError),
    "FULL": (sqlite3.SQLITE_FULL, DatabaseFullError),
    "BUSY": (sqlite3.SQLITE_BUSY, DatabaseBusyError),
    "INTERRUPT": (sqlite3.SQLITE_INTERRUPT, OmniQError),
    "CORRUPT": (sqlite3.SQLITE_CORRUPT, CorruptDatabaseError),
}


class TestPowerCut:
    """What the disk has when a call returns: the file and its WAL at the last flush."""

    WRITES: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        name: call
        for name, call in CALLS.items()
        if name not in ("dequeue", "dequeue the due", "release", "extend", *READS)
    } | {
        "fail for now": lambda b, task: b.fail(task, ValueError("x")),
        "complete_many": lambda b, task: b.queue.complete_many([task]),
        "reclaim": lambda b, task: b.queue.reclaim(task.worker),
        "cancel": lambda b, task: b.queue.cancel(task.id),
        "retry": lambda b, _: b.queue.retry("failed"),
        "retry_all": lambda b, _: b.queue.retry_all(),
        "resume": lambda b, _: b.queue.resume("paused"),
        "purge": lambda b, _: b.queue.purge(),
        "claim for the last time": lambda b, _: b.queue.dequeue("once"),
        "store": lambda b, _: b.results.store(TaskResult("t", ResultStatus.SUCCESS, 1)),
        "delete": lambda b, _: b.results.delete("failed"),
        "purge results": lambda b, _: b.results.purge(older_than=0),
        "log": lambda b, _: b.events.log(TaskEvent("custom")),
        "purge events": lambda b, _: b.events.purge(older_than=0),
    }

    @pytest.fixture
    def disk(
        self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        """What would be left of the file."""
        disk = str(tmp_path / "disk.db")
        flush = omniq_sqlite._Wal.flush

        def spy(wal: omniq_sqlite._Wal) -> None:
            flush(wal)
            for end in ("", "-wal"):
                shutil.copy(path + end, disk + end)

        with monkeypatch.context() as patch:
            patch.setattr(omniq_sqlite._Wal, "flush", spy)
            yield disk

    @staticmethod
    def prepare(backend: SQLiteBackend) -> Task:
        backend.enqueue(Task("bad", queue="bad", id="failed", max_attempts=1))
        task = present(backend.queue.dequeue("bad"))
        backend.fail(task, ValueError("x"), retry=False)
        backend.enqueue_many([Task("mine", unique_key="mine"), Task("other")])
        backend.enqueue(Task("held", queue="held", unique_key="held"))
        backend.enqueue(Task("once", queue="once", max_attempts=1))
        backend.queue.pause("paused")
        return present(backend.queue.dequeue(worker="w"))

    @pytest.mark.parametrize("name", WRITES)
    def test_it_keeps_what_a_call_acknowledged(
        self, path: str, disk: str, name: str
    ) -> None:
        with SQLiteBackend(path, events=True) as backend:
            task = self.prepare(backend)
            before = contents(path)
            self.WRITES[name](backend, task)
            after = contents(path)
            assert contents(disk) == after
            assert (after == before) == (name == "enqueue a duplicate")
        assert is_whole(disk)

    @pytest.mark.parametrize("name", WRITES)
    async def test_and_of_the_async_form(self, path: str, disk: str, name: str) -> None:
        with SQLiteBackend(path, events=True) as backend:
            task = self.prepare(backend)
        async with AsyncSQLiteBackend(path, events=True) as twin:
            await self.WRITES[name](twin, task)
            assert contents(disk) == contents(path)

    def test_it_takes_back_a_claim_and_the_task_is_there(
        self, path: str, disk: str
    ) -> None:
        with SQLiteBackend(path) as backend:
            backend.enqueue(Task("f", id="t"))
            assert backend.queue.dequeue() is not None
            with SQLiteQueue(disk) as found:
                assert [t.status for t in found.list_tasks()] == ["pending"]

    def test_a_flush_takes_along_what_others_committed_before(
        self, path: str, disk: str
    ) -> None:
        """So nothing that is acknowledged can rest on what is lost."""
        with SQLiteBackend(path, events=True) as backend, SQLiteQueue(path) as other:
            backend.enqueue(Task("f"))
            task = present(backend.queue.dequeue())
            other.enqueue(Task("g"))
            assert contents(disk) == contents(path)
            assert backend.queue.get_task(task.id) == task


class TestFaults:
    """An error at the n-th statement of each call, for every n."""

    @pytest.fixture(autouse=True)
    def faulty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        factory = partial(sqlite3.connect, factory=Faulty)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        Fault.arm(0, 0, ends_transaction=False)

    @staticmethod
    def prepare(path: str) -> tuple[SQLiteBackend, Task]:
        now = [1e9]
        backend = SQLiteBackend(
            path, events=True, synchronous="OFF", clock=lambda: now[0]
        )
        backend.enqueue_many([Task("mine", unique_key="mine"), Task("other")])
        backend.enqueue(Task("held", queue="held", unique_key="held"))
        backend.enqueue(Task("due", queue="due"), delay=5)
        task = backend.queue.dequeue()
        assert task is not None
        now[0] += 10
        backend.queue.count_tasks()
        return backend, task

    @pytest.mark.parametrize("code", CODES)
    @pytest.mark.parametrize("name", CALLS)
    def test_a_named_error_nothing_half_done_and_the_object_works_on(
        self, tmp_path: Path, name: str, code: str
    ) -> None:
        number, kind = CODES[code]
        path = str(tmp_path / "jobs.db")
        backend, task = self.prepare(path)
        before, hits = contents(path), []
        for n in range(1, 100):
            Fault.arm(n, number, ends_transaction=code == "FULL" or n % 2 == 0)
            try:
                CALLS[name](backend, task)
            except OmniQError as error:
                assert type(error) is kind
                assert contents(path) == before, Fault.hit
            else:
                break
            assert Fault.hit
            hits.append(Fault.hit)
            Fault.arm(0, 0, ends_transaction=False)
        else:
            pytest.fail("it never succeeded")
        assert code == "BUSY" or hits or name in READS
        Fault.arm(0, 0, ends_transaction=False)
        assert is_whole(path)
        backend.enqueue(Task("afterwards", queue="afterwards"))
        assert backend.queue.dequeue("afterwards") is not None
        backend.close()

    @pytest.mark.parametrize("name", ["enqueue", "complete", "dequeue"])
    async def test_the_async_form_tells_it_as_well(
        self, tmp_path: Path, name: str
    ) -> None:
        path = str(tmp_path / "jobs.db")
        prepared, task = self.prepare(path)
        prepared.close()
        before = contents(path)
        async with AsyncSQLiteBackend(
            path, events=True, synchronous="OFF", clock=lambda: 1e9 + 10
        ) as backend:
            await backend.queue.extend(task)
            before = contents(path)
            hits = 0
            for n in range(1, 100):
                Fault.arm(n, sqlite3.SQLITE_IOERR, ends_transaction=n % 2 == 0)
                try:
                    await asyncio.wait_for(CALLS[name](backend, task), DEADLINE)
                except DatabaseAccessError:
                    hits += 1
                else:
                    break
                assert contents(path) == before, Fault.hit
            assert hits >= 3

    def test_a_rollback_that_fails_costs_the_connection_and_nothing_else(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stuck(sqlite3.Connection):
            broken = False

            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if Stuck.broken and sql in ("COMMIT", "ROLLBACK"):
                    raise sqlite3.OperationalError("stuck")
                return super().execute(sql, *args)

        factory = partial(sqlite3.connect, factory=Stuck)
        monkeypatch.setattr(omniq_sqlite, "_connection_factory", factory)
        with SQLiteQueue(path) as queue:
            queue.enqueue(Task("f"))
            Stuck.broken = True
            with pytest.raises(OmniQError, match="stuck"):
                queue.enqueue(Task("g"))
            Stuck.broken = False
            queue.enqueue(Task("h"))
            assert select(path, "SELECT func FROM omniq_task ORDER BY 1") == [
                "f",
                "h",
            ]

    def test_an_error_while_opening_leaves_nothing_open(
        self, path: str, spied: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise sqlite3.OperationalError("refused")

        monkeypatch.setattr(omniq_sqlite._Database, "_ensure_schema", refuse)
        queue = SQLiteQueue(path)
        with pytest.raises(OmniQError, match="refused"):
            queue.enqueue(Task("f"))
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            Spied.opened[0].execute("SELECT 1")
        monkeypatch.undo()
        queue.enqueue(Task("f"))
        queue.close()


# =============================================================================
# Task
# =============================================================================

OUT_OF_RANGE: list[tuple[dict[str, Any], str, str, str]] = [
    ({"func": ""}, "func", "string", "''"),
    ({"func": 7}, "func", "string", "7"),
    ({"func": "a\0b"}, "func", "NUL", r"'a\x00b'"),
    ({"args": 7}, "args", "tuple", "of type int"),
    ({"kwargs": [1]}, "kwargs", "mapping", "of type list"),
    ({"queue": ""}, "queue", "string", "''"),
    ({"priority": 1.5}, "priority", "integer", "1.5"),
    ({"priority": True}, "priority", "integer", "True"),
    ({"priority": 2**63}, "priority", "integer", "9223372036854775808"),
    ({"priority": 10**5000}, "priority", "integer", "not "),
    ({"run_at": NAIVE}, "run_at", "aware", "datetime.datetime(2026"),
    ({"run_at": 1.5}, "run_at", "aware", "1.5"),
    ({"expires_at": NAIVE}, "expires_at", "aware", "datetime.datetime("),
    ({"max_attempts": 0}, "max_attempts", "1", "not 0"),
    ({"retry_delay": -1.0}, "retry_delay", "0", "-1.0"),
    ({"retry_delay": float("nan")}, "retry_delay", "number", "nan"),
    ({"timeout": 0.0}, "timeout", "number", "not 0.0"),
    ({"timeout": float("inf")}, "timeout", "number", "inf"),
    ({"unique_key": ""}, "unique_key", "string", "''"),
    ({"unique_key": "\ud800"}, "unique_key", "surrogates", r"'\ud800'"),
    ({"metadata": 7}, "metadata", "mapping", "of type int"),
    ({"id": ""}, "id", "string", "''"),
]


class TestTask:
    def test_it_takes_what_the_contract_says(self) -> None:
        parameters = inspect.signature(Task).parameters
        assert " ".join(list(parameters)[:13]) == (
            "func args kwargs queue priority run_at expires_at max_attempts"
            " retry_delay timeout unique_key metadata id"
        )
        assert [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == [
            "func",
            "args",
            "kwargs",
        ]

    def test_it_has_the_defaults_of_the_contract(self) -> None:
        task = Task("f")
        assert (task.args, task.kwargs, task.metadata) == ((), {}, {})
        assert (task.queue, task.priority) == ("default", 0)
        assert (task.run_at, task.expires_at, task.timeout) == (None, None, None)
        assert (task.max_attempts, task.retry_delay) == (3, 1.0)
        assert task.unique_key is None
        assert (task.status, task.attempt, task.created_at) == (None, 0, None)
        assert (task.lease_until, task.lease_id, task.worker) == (None, None, None)
        assert (task.error, task.progress) == (None, None)

    def test_its_id_is_a_uuid_of_version_7_in_hex(self) -> None:
        task_id = Task("f").id
        assert re.fullmatch("[0-9a-f]{32}", task_id)
        parsed = UUID(task_id)
        assert (parsed.version, parsed.variant) == (7, "specified in RFC 4122")
        assert abs((parsed.int >> 80) / 1000 - time.time()) < 60

    def test_ids_are_distinct_and_ascend(self) -> None:
        ids = [Task("f").id for _ in range(1_000)]
        assert ids == sorted(set(ids))

    def test_it_hashes_by_its_id(self) -> None:
        one = Task("f", id="a1")
        other = Task("g", ([],), {"a": []}, id="a1")
        assert hash(one) == hash(other)
        assert len({one, Task("f", id="b2")}) == 2

    def test_it_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Task("f").queue = "other"  # type: ignore[misc]

    def test_it_can_be_changed_by_replace(self) -> None:
        assert dataclasses.replace(Task("f"), queue="other").queue == "other"

    def test_it_pickles(self) -> None:
        task = Task("f", (1,), {"a": 2}, run_at=at(5))
        assert pickled(task) == task

    @pytest.mark.parametrize(
        ("arguments", "name", "rule", "value"),
        OUT_OF_RANGE,
        ids=[f"{next(iter(a))}={v}" for a, _, _, v in OUT_OF_RANGE],
    )
    def test_a_value_out_of_range_is_refused_by_name_rule_and_value(
        self, arguments: dict[str, Any], name: str, rule: str, value: str
    ) -> None:
        with pytest.raises(ValueError, match=name) as caught:
            Task(**{"func": "f", **arguments})
        assert rule in str(caught.value)
        assert value in str(caught.value)

    async def test_everything_given_comes_back(self, queue: Any) -> None:
        given_task = Task(
            "f",
            (1,),
            {"a": 2},
            queue="mail",
            priority=-5,
            run_at=at(0.25),
            expires_at=at(60.5),
            max_attempts=7,
            retry_delay=2.5,
            timeout=9.75,
            unique_key="k",
            metadata={"who": "me"},
            id="a1",
        )
        await call(queue.enqueue, given_task)
        task = await get(queue, "a1")
        assert dataclasses.replace(task, status=None, created_at=None) == given_task
        assert task.status == "scheduled"
        assert task.created_at == at(0)

    async def test_what_the_queue_sets_is_ignored_on_enqueue(self, queue: Any) -> None:
        task = Task(
            "f",
            id="a1",
            status=TaskStatus.FAILED,
            attempt=9,
            created_at=at(-500),
            lease_until=at(500),
            lease_id="mine",
            worker="w9",
            error="no",
            progress=[1],
        )
        await call(queue.enqueue, task)
        found = await get(queue, "a1")
        assert (found.status, found.attempt) == ("pending", 0)
        assert found.created_at == at(0)
        assert (found.lease_until, found.lease_id) == (None, None)
        assert (found.worker, found.error, found.progress) == (None, None, None)

    async def test_a_claimed_task_can_be_enqueued_anew_under_another_id(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", ("x",), id="a1"))
        task = await claim(queue, worker="w1")
        await call(queue.enqueue, dataclasses.replace(task, id="b2"))
        found = await get(queue, "b2")
        assert (found.status, found.attempt, found.args) == ("pending", 0, ("x",))


class TestOrder:
    async def test_the_higher_priority_goes_first(self, queue: Any) -> None:
        for name, priority in [("low", -1), ("high", 5), ("normal", 0)]:
            await call(queue.enqueue, Task(name, priority=priority))
        assert await claim_names(queue) == ["high", "normal", "low"]

    async def test_within_one_priority_the_first_in_goes_first(
        self, queue: Any
    ) -> None:
        for name in "abc":
            await call(queue.enqueue, Task(name, priority=3))
        assert await claim_names(queue) == ["a", "b", "c"]

    async def test_in_is_the_order_of_insertion_not_of_ids(self, queue: Any) -> None:
        await call(queue.enqueue, Task("first", id="z"))
        await call(queue.enqueue_many, [Task("second", id="m"), Task("third", id="a")])
        assert await claim_names(queue) == ["first", "second", "third"]

    async def test_a_delayed_task_keeps_its_place(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("first"), delay=10.0)
        await call(queue.enqueue, Task("second", run_at=at(5)))
        await call(queue.enqueue, Task("third"))
        clock.advance(10)
        assert await claim_names(queue) == ["first", "second", "third"]

    async def test_a_retried_task_keeps_its_place(self, queue: Any) -> None:
        await call(queue.enqueue, Task("first"))
        task = await claim(queue)
        await call(queue.enqueue, Task("second"))
        await call(queue.fail, task, "no", delay=0.0)
        assert await claim_names(queue) == ["first", "second"]

    async def test_a_task_retried_by_hand_keeps_its_place(self, queue: Any) -> None:
        task_id = await make_failed(queue, Task("first"))
        await call(queue.enqueue, Task("second"))
        await call(queue.retry, task_id)
        assert await claim_names(queue) == ["first", "second"]

    async def test_a_released_task_keeps_its_place(self, queue: Any) -> None:
        await call(queue.enqueue, Task("first"))
        task = await claim(queue)
        await call(queue.enqueue, Task("second"))
        await call(queue.release, task)
        assert await claim_names(queue) == ["first", "second"]

    async def test_a_task_whose_lease_ended_keeps_its_place(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("first"))
        await claim(queue, lease=10.0)
        await call(queue.enqueue, Task("second"))
        clock.advance(11)
        assert await claim_names(queue) == ["first", "second"]

    async def test_the_order_of_insertion_outlives_deleted_tasks(
        self, queue: Any
    ) -> None:
        # SQLite gives the greatest row number again once its row is deleted.
        await call(queue.enqueue_many, [Task("first"), Task("gone", priority=1)])
        await call(queue.complete, await claim(queue))
        await call(queue.enqueue_many, [Task("second"), Task("third")])
        assert await claim_names(queue) == ["first", "second", "third"]

    async def test_a_preferred_queue_wins_over_any_priority_in_a_later_one(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("urgent", queue="later", priority=1_000))
        await call(queue.enqueue, Task("plain", queue="preferred", priority=-1_000))
        assert await claim_names(queue, ["preferred", "later"]) == ["plain", "urgent"]


class TestTimes:
    async def test_a_delayed_task_is_not_handed_out_before_its_time(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"), delay=10.0)
        assert await get_status(queue, task_id) == "scheduled"
        clock.advance(9.999)
        assert await call(queue.dequeue) is None
        clock.advance(0.001)
        assert (await claim(queue)).id == task_id

    async def test_run_at_is_the_earliest_time(self, queue: Any, clock: Clock) -> None:
        await call(queue.enqueue, Task("f", run_at=at(60)))
        clock.advance(59)
        assert await call(queue.dequeue) is None
        clock.advance(1)
        assert (await claim(queue)).run_at == at(60)

    async def test_a_run_at_in_the_past_is_at_once(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f", run_at=at(-60)))
        assert await get_status(queue, task_id) == "pending"

    async def test_run_at_counts_in_any_time_zone(
        self, queue: Any, clock: Clock
    ) -> None:
        zone = timezone(timedelta(hours=5, minutes=45))
        await call(queue.enqueue, Task("f", run_at=at(60).astimezone(zone)))
        clock.advance(59)
        assert await call(queue.dequeue) is None
        clock.advance(1)
        assert (await claim(queue)).run_at == at(60)

    async def test_times_come_back_aware_and_in_utc(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", run_at=at(0), expires_at=at(9)))
        task = await claim(queue)
        for instant in (
            task.created_at,
            task.run_at,
            task.expires_at,
            task.lease_until,
            task.started_at,
        ):
            assert instant is not None
            assert instant.utcoffset() == timedelta(0)

    async def test_a_task_past_its_expiry_is_never_handed_out(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", expires_at=at(10)))
        clock.advance(10.001)
        assert await call(queue.dequeue) is None
        assert await get_status(queue, task_id) == "expired"
        assert (await get(queue, task_id)).finished_at == at(10.001)

    async def test_none_of_very_many_expired_tasks_is_handed_out(
        self, queue: Any, clock: Clock
    ) -> None:
        tasks = [Task("f", expires_at=at(5)) for _ in range(1_200)]
        await call(queue.enqueue_many, tasks)
        await call(queue.enqueue, Task("g", priority=-1))
        clock.advance(6)
        assert await claim_names(queue) == ["g"]
        assert await call(queue.dequeue_many, 2_000) == []
        assert await call(queue.count_tasks, status="expired") == 1_200

    async def test_a_task_before_its_expiry_is_handed_out(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f", expires_at=at(10)))
        clock.advance(9.999)
        await claim(queue)

    async def test_a_task_that_was_claimed_in_time_may_end_after_its_expiry(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f", expires_at=at(10)))
        task = await claim(queue)
        clock.advance(20)
        await call(queue.complete, await call(queue.extend, task))
        assert await call(queue.count_tasks) == 0

    async def test_a_delayed_task_expires_while_it_waits(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", expires_at=at(10)), delay=100.0)
        clock.advance(11)
        assert await call(queue.dequeue) is None
        assert await get_status(queue, task_id) == "expired"

    async def test_a_retry_after_its_expiry_never_runs(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", expires_at=at(10)))
        await call(queue.fail, await claim(queue), "no", delay=20.0)
        clock.advance(21)
        assert await call(queue.dequeue) is None
        assert await get_status(queue, task_id) == "expired"

    async def test_a_task_that_is_expired_when_it_comes_never_runs(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", expires_at=at(-1)))
        assert await call(queue.dequeue) is None
        assert await get_status(queue, task_id) == "expired"

    async def test_of_many_that_are_due_500_are_promoted_at_once(
        self, api: Api, queue: Any, clock: Clock
    ) -> None:
        """The rest waits for the next claim, so that nobody waits long for the lock."""
        await call(queue.enqueue_many, [Task("f", run_at=at(5)) for _ in range(501)])
        clock.advance(5)
        await claim(queue)
        assert Counter(statuses(api.path)) == {
            "running": 1, "pending": 499, "scheduled": 1,
        }  # fmt: skip
        await claim(queue)
        assert Counter(statuses(api.path)) == {"running": 2, "pending": 499}


class TestUniqueKey:
    async def test_a_second_task_with_the_key_adds_nothing(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", (1,), unique_key="k"))
        second = await call(queue.enqueue, Task("g", (2,), unique_key="k"))
        assert second == first
        assert await claim_names(queue) == ["f"]

    async def test_a_scheduled_task_holds_its_key(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"), delay=10.0)
        assert await call(queue.enqueue, Task("f", unique_key="k")) == first
        assert await call(queue.count_tasks) == 1

    async def test_a_running_task_holds_its_key(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        await claim(queue)
        assert await call(queue.enqueue, Task("f", unique_key="k")) == first
        assert await call(queue.count_tasks) == 1

    async def test_a_task_between_attempts_holds_its_key(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        await call(queue.fail, await claim(queue), "no")
        assert await call(queue.enqueue, Task("f", unique_key="k")) == first

    async def test_another_queue_has_its_own_keys(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        second = await call(queue.enqueue, Task("f", queue="other", unique_key="k"))
        assert second != first
        assert await call(queue.count_tasks) == 2

    async def test_another_key_is_another_task(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", unique_key="k"))
        await call(queue.enqueue, Task("f", unique_key="K"))
        await call(queue.enqueue, Task("f"))
        await call(queue.enqueue, Task("f"))
        assert await call(queue.count_tasks) == 4

    async def test_a_completed_task_frees_its_key(self, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        await call(queue.complete, await claim(queue))
        assert await call(queue.enqueue, Task("f", unique_key="k")) != first

    async def test_a_kept_completed_task_holds_no_key(self, api: Api) -> None:
        queue = api.queue(retention=60.0)
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        await call(queue.complete, await claim(queue))
        assert await call(queue.enqueue, Task("f", unique_key="k")) != first

    async def test_a_failed_task_frees_its_key(self, queue: Any) -> None:
        first = await make_failed(queue, Task("f", unique_key="k"))
        assert await call(queue.enqueue, Task("f", unique_key="k")) != first

    async def test_cancelling_a_running_task_frees_its_key_at_once(
        self, queue: Any
    ) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        await claim(queue)
        await call(queue.cancel, first)
        second = await call(queue.enqueue, Task("f", unique_key="k"))
        assert second != first
        assert (await claim(queue)).id == second

    async def test_the_key_is_looked_at_before_the_id(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1", unique_key="k"))
        same = Task("f", id="a1", unique_key="k")
        assert await call(queue.enqueue, same) == "a1"
        await call(queue.enqueue, Task("f", id="b2"))
        assert await call(queue.enqueue, Task("f", id="b2", unique_key="k")) == "a1"

    async def test_an_id_that_exists_without_the_key_is_a_duplicate(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1", unique_key="k"))
        with pytest.raises(DuplicateTaskError) as caught:
            await call(queue.enqueue, Task("f", id="a1", unique_key="other"))
        assert caught.value.task_id == "a1"

    async def test_the_same_key_twice_in_one_call_adds_one(self, queue: Any) -> None:
        one, two, three = await call(
            queue.enqueue_many,
            [Task("f", unique_key="k"), Task("g"), Task("h", unique_key="k")],
        )
        assert one == three != two
        assert await claim_names(queue) == ["f", "g"]

    async def test_an_expired_holder_is_settled_and_swallows_nothing(
        self, queue: Any, clock: Clock
    ) -> None:
        first = await call(queue.enqueue, Task("f", expires_at=at(5), unique_key="k"))
        clock.advance(6)
        second = await call(queue.enqueue, Task("g", unique_key="k"))
        assert second != first
        assert await get_status(queue, first) == "expired"
        assert await claim_names(queue) == ["g"]

    async def test_an_expired_delayed_holder_swallows_nothing(
        self, queue: Any, clock: Clock
    ) -> None:
        first = await call(
            queue.enqueue, Task("f", expires_at=at(5), unique_key="k"), delay=100.0
        )
        clock.advance(6)
        assert await call(queue.enqueue, Task("g", unique_key="k")) != first
        assert await get_status(queue, first) == "expired"

    async def test_a_holder_whose_last_lease_ended_swallows_nothing(
        self, queue: Any, clock: Clock
    ) -> None:
        first = await call(queue.enqueue, Task("f", max_attempts=1, unique_key="k"))
        await claim(queue, lease=5.0)
        clock.advance(6)
        second = await call(queue.enqueue, Task("g", unique_key="k"))
        assert second != first
        assert await get_status(queue, first) == "failed"
        assert await claim_names(queue) == ["g"]

    async def test_a_holder_whose_lease_ended_with_attempts_left_keeps_its_key(
        self, queue: Any, clock: Clock
    ) -> None:
        first = await call(queue.enqueue, Task("f", max_attempts=2, unique_key="k"))
        await claim(queue, lease=5.0)
        clock.advance(6)
        assert await call(queue.enqueue, Task("g", unique_key="k")) == first
        assert await claim_names(queue) == ["f"]

    async def test_a_dead_holder_is_settled_in_a_bulk_enqueue_too(
        self, queue: Any, clock: Clock
    ) -> None:
        first = await call(queue.enqueue, Task("f", expires_at=at(5), unique_key="k"))
        clock.advance(6)
        ids = await call(
            queue.enqueue_many, [Task("g", unique_key="k"), Task("h", unique_key="k")]
        )
        assert ids[0] == ids[1] != first
        assert await claim_names(queue) == ["g"]

    async def test_a_dead_holder_stays_when_the_transaction_fails(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("x", queue="other", id="b2"))
        first = await call(queue.enqueue, Task("f", expires_at=at(5), unique_key="k"))
        clock.advance(6)
        with pytest.raises(DuplicateTaskError):
            await call(
                queue.enqueue_many, [Task("g", unique_key="k"), Task("h", id="b2")]
            )
        assert await get_status(queue, first) == "pending"

    async def test_keys_of_two_objects_are_the_same(self, api: Api) -> None:
        first = await call(api.queue().enqueue, Task("f", unique_key="k"))
        assert await call(api.queue().enqueue, Task("f", unique_key="k")) == first

    async def test_two_processes_share_the_keys(self, api: Api, queue: Any) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        found = run_program(
            """
            with SQLiteQueue(path, clock=lambda: 1_800_000_000.0) as queue:
                print(queue.enqueue(Task("f", unique_key="k")))
            """,
            api.path,
        )
        assert found == first

    async def test_many_at_once_add_one(self, api: Api, queue: Any) -> None:
        ids = await asyncio.gather(
            *(aside(queue.enqueue, Task("f", unique_key="k")) for _ in range(20))
        )
        assert len(set(ids)) == 1
        assert await call(queue.count_tasks) == 1


# =============================================================================
# Queue
# =============================================================================


class TestEnqueue:
    async def test_it_returns_the_id(self, queue: Any) -> None:
        assert await call(queue.enqueue, Task("f", id="a1")) == "a1"

    async def test_it_is_in_the_file_when_it_returns(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        rows = read_rows(api.path, "SELECT id, status FROM omniq_task_view")
        assert rows == [{"id": "a1", "status": "pending"}]

    async def test_an_id_that_exists_is_a_duplicate(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        with pytest.raises(DuplicateTaskError) as caught:
            await call(queue.enqueue, Task("g", id="a1"))
        assert caught.value.task_id == "a1"
        assert await claim_names(queue) == ["f"]

    async def test_an_id_of_a_finished_task_that_is_kept_exists(
        self, queue: Any
    ) -> None:
        await make_failed(queue, Task("f", id="a1"))
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue, Task("g", id="a1"))

    @pytest.mark.parametrize("delay", [-0.1, float("nan"), float("inf"), "soon"])
    async def test_a_delay_out_of_range_is_refused(
        self, queue: Any, delay: Any
    ) -> None:
        with pytest.raises(ValueError, match="delay") as caught:
            await call(queue.enqueue, Task("f"), delay=delay)
        assert repr(delay) in str(caught.value)
        assert await call(queue.count_tasks) == 0


class TestEnqueueMany:
    async def test_it_returns_the_ids_in_order(self, queue: Any) -> None:
        tasks = [Task("f", id="z"), Task("g", id="a"), Task("h", id="m")]
        assert await call(queue.enqueue_many, tasks) == ["z", "a", "m"]
        assert await claim_names(queue) == ["f", "g", "h"]

    async def test_it_takes_any_iterable(self, queue: Any) -> None:
        tasks = (Task(name) for name in "abc")
        assert len(await call(queue.enqueue_many, tasks)) == 3

    async def test_nothing_gives_nothing(self, queue: Any) -> None:
        assert await call(queue.enqueue_many, []) == []

    async def test_it_is_all_or_nothing(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        with pytest.raises(DuplicateTaskError) as caught:
            await call(queue.enqueue_many, [Task("g"), Task("h", id="a1"), Task("i")])
        assert caught.value.task_id == "a1"
        assert await claim_names(queue) == ["f"]

    async def test_the_same_id_twice_is_a_duplicate(self, queue: Any) -> None:
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue_many, [Task("f", id="a1"), Task("g", id="a1")])
        assert await call(queue.count_tasks) == 0

    async def test_it_respects_run_at(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("later", run_at=at(10)), Task("now")])
        assert await claim_names(queue) == ["now"]

    async def test_others_fail_alone_beside_it(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        outcomes = await asyncio.gather(
            *(
                aside(queue.enqueue, Task("g", id="a1" if n % 5 == 0 else f"n{n}"))
                for n in range(20)
            ),
            return_exceptions=True,
        )
        failed = [o for o in outcomes if isinstance(o, DuplicateTaskError)]
        assert len(failed) == 4
        assert await call(queue.count_tasks) == 17


class TestDequeue:
    async def test_it_claims_one_task(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", ("x",), {"k": 1}, id="a1"))
        task = await claim(queue, lease=30.0, worker="w1")
        assert (task.id, task.func, task.args, task.kwargs) == (
            "a1",
            "f",
            ("x",),
            {"k": 1},
        )
        assert (task.status, task.attempt, task.worker) == ("running", 1, "w1")
        assert task.lease_until == at(30)
        assert task.lease_id
        assert dataclasses.asdict(await get(queue, "a1")) == dataclasses.asdict(task)

    async def test_a_lease_is_a_minute_unless_told_otherwise(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        assert task.lease_until == at(60)
        assert task.worker is None

    async def test_nothing_there_is_none(self, queue: Any) -> None:
        assert await call(queue.dequeue) is None

    async def test_a_claimed_task_is_handed_out_once(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await claim(queue)
        assert await call(queue.dequeue) is None

    async def test_only_the_named_queue_is_looked_at(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", queue="mail"))
        assert await call(queue.dequeue) is None
        assert await call(queue.dequeue, ["default", "other"]) is None
        assert (await claim(queue, "mail")).queue == "mail"

    async def test_a_queue_named_twice_is_harmless(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        assert await claim_names(queue, ("default", "default")) == ["f"]

    async def test_every_claim_gets_a_new_lease_id(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("f"), Task("g")])
        seen = set()
        for _ in range(5):
            for task in await call(queue.dequeue_many, 2):
                seen.add(task.lease_id)
                await call(queue.release, task)
        assert len(seen) == 10

    async def test_a_task_whose_lease_ended_is_claimable_with_its_attempt_counted(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        first = await claim(queue, lease=10.0, worker="w1")
        clock.advance(9.999)
        assert await call(queue.dequeue) is None
        clock.advance(0.002)
        second = await claim(queue, worker="w2")
        assert (second.id, second.attempt, second.worker) == (first.id, 2, "w2")
        assert second.lease_id != first.lease_id
        assert "lease" in (second.error or "")

    async def test_out_of_attempts_it_fails_with_an_error_that_says_so(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=2))
        for _ in range(2):
            await claim(queue, lease=10.0)
            clock.advance(11)
        assert await call(queue.dequeue) is None
        task = await get(queue, task_id)
        assert (task.status, task.attempt) == ("failed", 2)
        assert "lease" in (task.error or "")
        assert "attempts" in (task.error or "")
        assert task.finished_at == at(22)

    async def test_max_attempts_of_one_is_at_most_once(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f", max_attempts=1))
        await claim(queue, lease=10.0)
        clock.advance(11)
        assert await call(queue.dequeue) is None

    async def test_many_ended_leases_are_settled(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue_many, [Task("f", max_attempts=1) for _ in range(700)])
        assert len(await call(queue.dequeue_many, 700, lease=10.0)) == 700
        await call(queue.enqueue, Task("g"))
        clock.advance(11)
        assert await claim_names(queue) == ["g"]
        for _ in range(20):
            await call(queue.dequeue)
        assert await call(queue.count_tasks, status="failed") == 700

    async def test_a_timeout_that_runs_out_gives_none(self, queue: Any) -> None:
        begun = time.monotonic()
        assert await aside(queue.dequeue, timeout=0.05) is None
        assert 0.045 <= time.monotonic() - begun < SOON

    @pytest.mark.parametrize("by", ["the same object", "another object"])
    async def test_a_waiting_call_wakes_on_a_commit(
        self, api: Api, queue: Any, by: str
    ) -> None:
        producer = queue if by == "the same object" else api.queue()
        waiting = started(aside(queue.dequeue, timeout=DEADLINE))
        await in_wait(queue)
        begun = time.monotonic()
        await call(producer.enqueue, Task("f"))
        assert (await waiting).func == "f"
        assert time.monotonic() - begun < SOON

    async def test_a_waiting_call_wakes_on_a_commit_of_a_process_that_goes_on(
        self, api: Api, queue: Any, programs: Programs
    ) -> None:
        waiting = started(aside(queue.dequeue, timeout=DEADLINE))
        await in_wait(queue)
        child = programs.start(
            """
            queue = SQLiteQueue(path, clock=lambda: 1_800_000_000.0)
            queue.enqueue(Task("f"))
            sys.stdin.read()
            """,
            api.path,
        )
        assert (await waiting).func == "f"
        assert child.poll() is None
        programs.finish(child)

    async def test_a_timeout_of_none_waits_for_ever(self, queue: Any) -> None:
        waiting = started(aside(queue.dequeue, timeout=None))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await call(queue.enqueue, Task("f"))
        assert (await waiting).func == "f"

    async def test_a_waiting_call_wakes_when_a_delayed_task_is_due(
        self, api: Api
    ) -> None:
        queue = api.queue(clock=time.time)
        await call(queue.enqueue, Task("f"), delay=0.1)
        begun = time.monotonic()
        assert (await aside(queue.dequeue, timeout=DEADLINE)).func == "f"
        assert time.monotonic() - begun < SOON

    async def test_a_waiting_call_sees_a_clock_that_was_moved(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"), delay=3600.0)
        waiting = started(aside(queue.dequeue, timeout=DEADLINE))
        await in_wait(queue)
        clock.advance(3600)
        assert (await waiting).func == "f"

    async def test_each_of_several_waiting_calls_gets_its_own_task(
        self, queue: Any
    ) -> None:
        waiting = [started(aside(queue.dequeue, timeout=DEADLINE)) for _ in range(4)]
        await in_wait(queue, 4)
        await call(queue.enqueue_many, [Task("f", (n,)) for n in range(4)])
        assert sorted([(await task).args[0] for task in waiting]) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"queues": []}, "queues"),
            ({"queues": ""}, "queues"),
            ({"queues": [""]}, "queues"),
            ({"timeout": -1.0}, "timeout"),
            ({"timeout": float("nan")}, "timeout"),
            ({"lease": 0.0}, "lease"),
            ({"lease": -1.0}, "lease"),
            ({"lease": float("inf")}, "lease"),
            ({"lease": None}, "lease"),
            ({"worker": ""}, "worker"),
            ({"worker": 7}, "worker"),
        ],
        ids=str,
    )
    async def test_an_argument_out_of_range_is_refused(
        self, api: Api, options: dict[str, Any], name: str
    ) -> None:
        queue = api.queue(":memory:")
        await call(queue.enqueue, Task("f"))
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            await call(queue.dequeue, **options)
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            await call(queue.dequeue_many, 1, **options)
        assert await claim_names(queue) == ["f"]


class TestDequeueMany:
    async def test_it_claims_up_to_the_limit_in_order(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task(name) for name in "abcde"])
        await call(queue.enqueue, Task("first", priority=1))
        claimed = await call(queue.dequeue_many, 4, worker="w1", lease=30.0)
        assert [task.func for task in claimed] == ["first", "a", "b", "c"]
        assert {task.worker for task in claimed} == {"w1"}
        assert {task.lease_until for task in claimed} == {at(30)}
        assert len({task.lease_id for task in claimed}) == 4

    async def test_nothing_there_is_an_empty_list(self, queue: Any) -> None:
        assert await call(queue.dequeue_many, 3) == []
        assert await aside(queue.dequeue_many, 3, timeout=0.02) == []

    async def test_it_fills_up_from_the_later_queues(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("a", queue="one", priority=-1)])
        await call(queue.enqueue_many, [Task(n, queue="two") for n in "bcd"])
        claimed = await call(queue.dequeue_many, 3, ["one", "two"])
        assert [task.func for task in claimed] == ["a", "b", "c"]

    async def test_it_returns_as_soon_as_there_is_one(self, queue: Any) -> None:
        waiting = started(aside(queue.dequeue_many, 10, timeout=None))
        await in_wait(queue)
        await call(queue.enqueue, Task("f"))
        assert [task.func for task in await waiting] == ["f"]

    @pytest.mark.parametrize("limit", [0, -1, 1.5, True, None])
    async def test_a_limit_out_of_range_is_refused(
        self, queue: Any, limit: Any
    ) -> None:
        with pytest.raises(ValueError, match="limit"):
            await call(queue.dequeue_many, limit)

    async def test_what_comes_between_the_look_and_the_wait_is_found_at_once(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue, waited = api.queue(":memory:"), []
        look, bell = AsyncSQLiteQueue._claim, database_of(queue).bell
        register = bell.register

        async def look_and_enqueue(self: AsyncSQLiteQueue, claim: Any) -> Any:
            claimed = await look(self, claim)
            if not claimed.tasks:
                await self.enqueue(Task("f"))
            return claimed

        def noting(*args: Any) -> Any:
            waited.append(register(*args))
            return waited[-1]

        monkeypatch.setattr(AsyncSQLiteQueue, "_claim", look_and_enqueue)
        monkeypatch.setattr(bell, "register", noting)
        [task] = await call(queue.dequeue_many, 1, timeout=1.0)
        assert task.func == "f"
        assert waited == [False]


class TestComplete:
    async def test_the_row_is_deleted(self, api: Api, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.complete, await claim(queue))
        assert await call(queue.get_task, task_id) is None
        assert read_rows(api.path, "SELECT id FROM omniq_task_view") == []

    async def test_with_retention_it_is_kept_for_so_long(
        self, api: Api, clock: Clock
    ) -> None:
        backend = api.backend(retention=60.0)
        task_id = await call(backend.enqueue, Task("f"))
        clock.advance(5)
        await call(backend.queue.complete, await claim(backend.queue, worker="w1"))
        task = await get(backend.queue, task_id)
        assert (task.status, task.attempt, task.worker) == ("completed", 1, "w1")
        assert task.finished_at == at(5)
        assert (task.lease_id, task.lease_until, task.error) == (None, None, None)
        clock.advance(59)
        await call(backend.cleanup)
        assert await get_status(backend.queue, task_id) == "completed"
        clock.advance(1)
        await call(backend.cleanup)
        assert await call(backend.queue.get_task, task_id) is None

    async def test_the_next_ones_delete_what_was_kept_a_few_at_a_time(
        self, api: Api, clock: Clock
    ) -> None:
        """A queue alone has no `cleanup()`, and no call may delete a million rows."""
        queue = api.queue(retention=60.0)

        async def kept() -> list[str]:
            tasks = await call(queue.list_tasks, status="completed")
            return sorted(task.func for task in tasks)

        await call(queue.enqueue_many, [Task("old") for _ in range(3)])
        await call(queue.complete_many, await call(queue.dequeue_many, 3))
        await call(queue.enqueue_many, [Task("new") for _ in range(3)])
        clock.advance(59)
        await call(queue.complete, await claim(queue))
        assert await kept() == ["new", "old", "old", "old"]
        clock.advance(1)
        await call(queue.complete, await claim(queue))
        assert await kept() == ["new", "new", "old"]
        await call(queue.complete, await claim(queue))
        assert await kept() == ["new", "new", "new"]

    async def test_a_kept_task_is_never_handed_out_again(
        self, api: Api, clock: Clock
    ) -> None:
        queue = api.queue(retention=1e6)
        await call(queue.enqueue, Task("f", expires_at=at(1000)))
        await call(queue.complete, await claim(queue))
        clock.advance(2000)
        assert await call(queue.dequeue) is None
        assert await call(queue.count_tasks, status="completed") == 1

    async def test_a_task_can_be_completed_once(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        task = await claim(queue)
        await call(queue.complete, task)
        with pytest.raises(LeaseLostError) as caught:
            await call(queue.complete, task)
        assert caught.value.task_ids == ["a1"]


class TestCompleteMany:
    async def test_it_completes_all(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("f") for _ in range(5)])
        await call(queue.complete_many, iter(await call(queue.dequeue_many, 5)))
        assert await call(queue.count_tasks) == 0

    async def test_it_completes_what_it_may_and_then_names_the_rest(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue_many, [Task("f", id=name) for name in "abcd"])
        claimed = await call(queue.dequeue_many, 4)
        await call(queue.cancel, "b")
        await call(queue.release, claimed[3])
        with pytest.raises(LeaseLostError) as caught:
            await call(queue.complete_many, claimed)
        assert caught.value.task_ids == ["b", "d"]
        left = {task.id: str(task.status) for task in await call(queue.list_tasks)}
        assert left == {"b": "cancelled", "d": "pending"}

    async def test_with_retention_they_are_kept(self, api: Api) -> None:
        queue = api.queue(retention=60.0)
        await call(queue.enqueue_many, [Task("f") for _ in range(3)])
        await call(queue.complete_many, await call(queue.dequeue_many, 3))
        assert await call(queue.count_tasks, status="completed") == 3

    async def test_nothing_is_nothing(self, queue: Any) -> None:
        assert await call(queue.complete_many, []) is None


class TestFail:
    async def test_it_is_scheduled_again_while_attempts_remain(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=2))
        assert await call(queue.fail, await claim(queue), "disk full") == "scheduled"
        task = await get(queue, task_id)
        assert (task.status, task.attempt, task.error) == ("scheduled", 1, "disk full")
        assert (task.lease_id, task.lease_until) == (None, None)

    async def test_out_of_attempts_it_is_failed_and_kept(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=2))
        await call(queue.fail, await claim(queue), "one", delay=0.0)
        task = await claim(queue)
        assert (task.attempt, task.error) == (2, "one")
        clock.advance(7)
        assert await call(queue.fail, task, "two", delay=0.0) == "failed"
        clock.advance(1e7)
        assert await call(queue.dequeue) is None
        task = await get(queue, task_id)
        assert (task.status, task.attempt, task.error) == ("failed", 2, "two")
        assert task.finished_at == at(7)

    async def test_without_retry_it_is_failed_at_once(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", max_attempts=5))
        status = await call(queue.fail, await claim(queue), "no", retry=False)
        assert status is TaskStatus.FAILED

    async def test_an_exception_is_told_with_its_type(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.fail, await claim(queue), ZeroDivisionError("by nought"))
        error = (await get(queue, task_id)).error or ""
        assert "ZeroDivisionError" in error
        assert "by nought" in error

    async def test_an_error_that_no_file_can_hold_is_kept_as_well_as_can_be(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.fail, await claim(queue), "odd \0 \ud800 " + "x" * 10**6)
        error = (await get(queue, task_id)).error or ""
        assert error.startswith("odd ")
        assert "\0" not in error
        assert len(error) < 100_000

    async def test_a_delay_is_kept_to(self, queue: Any, clock: Clock) -> None:
        await call(queue.enqueue, Task("f", retry_delay=1000.0))
        await call(queue.fail, await claim(queue), "no", delay=5.0)
        clock.advance(4.999)
        assert await call(queue.dequeue) is None
        clock.advance(0.001)
        assert (await claim(queue)).attempt == 2

    async def test_a_delay_of_nought_is_at_once(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", retry_delay=1000.0))
        assert await call(queue.fail, await claim(queue), "no", delay=0) == "scheduled"
        assert (await claim(queue)).attempt == 2

    async def test_the_delay_doubles_with_each_retry_up_to_an_hour(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(
            queue.enqueue_many,
            [Task("f", max_attempts=50, retry_delay=100.0) for _ in range(20)],
        )
        for expected in [100, 200, 400, 800, 1600, 3200, 3600, 3600]:
            for task in await call(queue.dequeue_many, 20):
                assert await call(queue.fail, task, "no") == "scheduled"
            delays = [
                task.run_at.timestamp() - clock.now
                for task in await call(queue.list_tasks)
            ]
            assert expected == 3600 or len(set(delays)) > 1, "there is no jitter"
            assert min(delays) >= expected * 0.5
            assert max(delays) <= min(expected * 1.5, 3600) + 1e-3
            clock.advance(3601)
            assert await call(queue.count_tasks) == 20

    async def test_a_long_first_delay_is_at_most_an_hour(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f", retry_delay=1e6))
        await call(queue.fail, await claim(queue), "no")
        clock.advance(3600.001)
        await claim(queue)

    async def test_the_thousandth_retry_works_like_the_first(self, api: Api) -> None:
        queue = api.queue(":memory:")
        for delay in (0.0, 1e-9, 1.0):
            task_id = await call(
                queue.enqueue, Task("f", max_attempts=2_000, retry_delay=delay)
            )
            for _ in range(1_100 if delay == 0.0 else 1):
                await call(queue.fail, await claim(queue), "no", delay=0.0)
            assert await call(queue.fail, await claim(queue), "no") == "scheduled"
            await call(queue.cancel, task_id)

    async def test_no_retry_delay_means_at_once(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", retry_delay=0.0))
        await call(queue.fail, await claim(queue), "no")
        assert (await claim(queue)).attempt == 2

    @pytest.mark.parametrize("delay", [-1.0, float("nan"), "soon"])
    async def test_a_delay_out_of_range_is_refused(
        self, queue: Any, delay: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        with pytest.raises(ValueError, match="delay"):
            await call(queue.fail, task, "no", delay=delay)
        await call(queue.complete, task)


class TestRelease:
    async def test_the_attempt_is_not_counted(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=1))
        for _ in range(3):
            task = await claim(queue)
            assert task.attempt == 1
            await call(queue.release, task)
        task = await get(queue, task_id)
        assert (task.status, task.attempt, task.error) == ("pending", 0, None)
        assert (task.lease_id, task.lease_until) == (None, None)

    async def test_with_a_delay_it_waits_for_so_long(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.release, await claim(queue), delay=10.0)
        assert await get_status(queue, task_id) == "scheduled"
        clock.advance(9.999)
        assert await call(queue.dequeue) is None
        clock.advance(0.001)
        assert (await claim(queue)).attempt == 1

    async def test_a_delay_out_of_range_is_refused(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        with pytest.raises(ValueError, match="delay"):
            await call(queue.release, task, delay=-1.0)


class TestExtend:
    async def test_it_gives_the_task_with_a_new_end_of_the_lease(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue, lease=10.0)
        clock.advance(8)
        extended = await call(queue.extend, task, 10.0)
        assert extended.lease_until == at(18)
        assert extended == dataclasses.replace(task, lease_until=at(18))
        clock.advance(8)
        assert await call(queue.dequeue) is None
        await call(queue.complete, extended)

    async def test_a_lease_is_a_minute_unless_told_otherwise(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue, lease=10.0)
        assert (await call(queue.extend, task)).lease_until == at(60)

    async def test_the_lease_may_be_shortened(self, queue: Any, clock: Clock) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.extend, await claim(queue), 5.0)
        clock.advance(6)
        assert (await claim(queue)).attempt == 2

    async def test_the_task_from_before_can_still_be_completed(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        await call(queue.extend, task)
        await call(queue.complete, task)
        assert await call(queue.count_tasks) == 0

    async def test_it_stores_the_progress(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        assert task.progress is None
        extended = await call(queue.extend, task, progress={"done": 3, "total": (7,)})
        assert extended.progress == {"done": 3, "total": (7,)}
        assert (await get(queue, task_id)).progress == {"done": 3, "total": (7,)}

    async def test_a_heartbeat_without_progress_keeps_the_last_one(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        await call(queue.extend, task, progress=0.5)
        await call(queue.extend, task)
        assert (await get(queue, task_id)).progress == 0.5

    async def test_progress_that_cannot_be_serialized_changes_nothing(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        task = await claim(queue, lease=10.0)
        with pytest.raises(SerializationError, match="progress"):
            await call(queue.extend, task, progress=object())
        assert (await get(queue, task_id)).lease_until == at(10)

    @pytest.mark.parametrize("lease", [0.0, -1.0, float("nan"), float("inf"), None])
    async def test_a_lease_out_of_range_is_refused(
        self, queue: Any, lease: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        with pytest.raises(ValueError, match="lease"):
            await call(queue.extend, task, lease)


async def take_again(queue: Any, task: Task, clock: Clock) -> None:
    clock.advance(61)
    await claim(queue)


async def cancel_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.cancel, task.id)


async def complete_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.complete, task)


async def fail_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.fail, task, "no", delay=100.0)


async def reject_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.fail, task, "no", retry=False)


async def release_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.release, task)


async def release_and_take_again(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.release, task)
    await claim(queue)


async def purge_it(queue: Any, task: Task, clock: Clock) -> None:
    await call(queue.purge, status="running")


STALE_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("complete", ()),
    ("fail", ("late",)),
    ("release", ()),
    ("extend", ()),
]


class TestFencing:
    @pytest.mark.parametrize(
        "lose",
        [
            take_again,
            cancel_it,
            complete_it,
            fail_it,
            reject_it,
            release_it,
            release_and_take_again,
            purge_it,
        ],
    )
    async def test_a_stale_lease_changes_nothing(
        self,
        queue: Any,
        clock: Clock,
        lose: Callable[[Any, Task, Clock], Awaitable[None]],
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        task = await claim(queue)
        await lose(queue, task, clock)
        before = await call(queue.list_tasks)
        for method, arguments in STALE_CALLS:
            with pytest.raises(LeaseLostError) as caught:
                await call(getattr(queue, method), task, *arguments)
            assert caught.value.task_ids == ["a1"]
            assert await call(queue.list_tasks) == before

    @pytest.mark.parametrize(("method", "arguments"), STALE_CALLS)
    async def test_time_alone_makes_no_lease_stale(
        self, queue: Any, clock: Clock, method: str, arguments: tuple[Any, ...]
    ) -> None:
        await call(queue.enqueue, Task("f", max_attempts=1))
        task = await claim(queue, lease=10.0)
        clock.advance(1_000)
        await call(queue.list_tasks)
        await call(getattr(queue, method), task, *arguments)

    async def test_a_late_heartbeat_keeps_the_task(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue, lease=10.0)
        clock.advance(20)
        await call(queue.extend, task, 10.0)
        assert await call(queue.dequeue) is None
        await call(queue.complete, task)

    async def test_a_lease_that_ended_out_of_attempts_is_stale_once_settled(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=1))
        task = await claim(queue, lease=10.0)
        clock.advance(11)
        assert await call(queue.dequeue) is None
        for method, arguments in STALE_CALLS:
            with pytest.raises(LeaseLostError):
                await call(getattr(queue, method), task, *arguments)
        assert await get_status(queue, task_id) == "failed"

    async def test_a_task_that_was_never_claimed_has_no_lease(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        for method, arguments in STALE_CALLS:
            with pytest.raises(LeaseLostError):
                await call(getattr(queue, method), await get(queue, "a1"), *arguments)
        assert await get_status(queue, "a1") == "pending"

    async def test_the_lease_of_a_retried_task_is_a_new_one(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        old = await claim(queue)
        await call(queue.cancel, "a1")
        await call(queue.retry, "a1")
        new = await claim(queue)
        with pytest.raises(LeaseLostError):
            await call(queue.complete, old)
        await call(queue.complete, new)

    async def test_the_lease_of_an_enqueued_id_that_came_back_is_a_new_one(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        old = await claim(queue)
        await call(queue.complete, old)
        await call(queue.enqueue, Task("f", id="a1"))
        await claim(queue)
        with pytest.raises(LeaseLostError):
            await call(queue.complete, old)
        assert await get_status(queue, "a1") == "running"

    async def test_a_claim_of_another_process_makes_the_lease_stale(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        found = run_program(
            """
            queue = SQLiteQueue(path, clock=lambda: 1_800_000_061.0)
            print(queue.dequeue(worker="child").attempt, flush=True)
            os._exit(0)
            """,
            api.path,
        )
        assert found == "2"
        with pytest.raises(LeaseLostError):
            await call(queue.complete, task)


class SleepingMachine:
    """Whose time of day goes on while it sleeps, and its monotonic clock does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.slept)
        monkeypatch.setattr(omniq_sqlite, "_standstill", omniq_sqlite._Standstill())

    def __call__(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


class TestStandstill:
    """What a laptop does to leases that is closed for longer than they are."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> SleepingMachine:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", 0.5)
        return SleepingMachine(monkeypatch)

    async def test_nobody_is_taken_for_dead_at_once(
        self, queue: Any, clock: SleepingMachine
    ) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await claim(queue)
        clock.sleep(3_600)
        began = time.monotonic()
        assert await call(queue.dequeue) is None
        again = await call(queue.dequeue, timeout=DEADLINE)
        assert (again.id, again.attempt) == (task_id, 2)
        assert time.monotonic() - began >= 0.5

    async def test_who_extends_meanwhile_keeps_the_task(
        self, queue: Any, clock: SleepingMachine
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue)
        clock.sleep(3_600)
        await call(queue.extend, task)
        assert await call(queue.dequeue, timeout=1.0) is None

    async def test_who_waits_does_not_spin(
        self, queue: Any, clock: SleepingMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", DEADLINE)
        looks = 0
        look = omniq_sqlite._Claim.look

        def counted(claim: Any, connection: Any) -> Any:
            nonlocal looks
            looks += 1
            return look(claim, connection)

        monkeypatch.setattr(omniq_sqlite._Claim, "look", counted)
        await call(queue.enqueue, Task("f"))
        await claim(queue)
        clock.sleep(3_600)
        assert await call(queue.dequeue, timeout=0.5) is None
        assert looks <= 5

    async def test_what_is_no_lease_is_settled_at_once(
        self, queue: Any, clock: SleepingMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", DEADLINE)
        await call(queue.enqueue, Task("running"))
        await claim(queue)
        delayed = await call(queue.enqueue, Task("delayed"), delay=60)
        soon = datetime.fromtimestamp(clock(), UTC) + timedelta(seconds=60)
        old = await call(queue.enqueue, Task("f", expires_at=soon, unique_key="k"))
        clock.sleep(3_600)
        new = await call(queue.enqueue, Task("f", unique_key="k"))
        assert new != old
        assert {(await claim(queue)).id for _ in range(2)} == {delayed, new}
        assert await call(queue.dequeue) is None

    async def test_who_waits_for_results_does_not_spin(
        self, api: Api, clock: SleepingMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", DEADLINE)
        backend = api.backend(clock=clock)
        await call(backend.enqueue, Task("f", id="a1"))
        await claim(backend.queue)
        clock.sleep(3_600)
        began = time.process_time()
        with pytest.raises(TimeoutError):
            await call(backend.result, "a1", timeout=1.0)
        assert time.process_time() - began < 0.5

    def test_a_worker_until_empty_awaits_its_end(
        self, path: str, clock: SleepingMachine
    ) -> None:
        tasks = TaskRegistry()
        plain = tasks.register(thumbnail)
        with SQLiteBackend(path, clock=clock) as backend:
            task_id = backend.enqueue(plain.task("a"))
            backend.queue.dequeue()
            clock.sleep(3_600)
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert backend.result(task_id, timeout=0).attempt == 2

    async def test_a_heartbeat_that_fails_then_does_not_spin(
        self, clock: SleepingMachine, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", 5.0)
        tasks = TaskRegistry()
        tries = 0

        async def extend(*_: Any, **__: Any) -> Task:
            nonlocal tries
            tries += 1
            raise omniq_sqlite.DatabaseFullError(path)

        @tasks.register
        async def long() -> None:
            clock.sleep(3_600)
            await asyncio.sleep(1.0)

        monkeypatch.setattr(omniq_sqlite.AsyncSQLiteQueue, "extend", extend)
        async with AsyncSQLiteBackend(path, clock=clock) as backend:
            await backend.enqueue(long.task())
            await AsyncWorker(backend, tasks, lease=60).run(until_empty=True)
        assert 1 <= tries <= 10

    async def test_a_key_is_still_held(
        self, queue: Any, clock: SleepingMachine
    ) -> None:
        holder = await call(queue.enqueue, Task("f", unique_key="k", max_attempts=1))
        task = await claim(queue)
        clock.sleep(3_600)
        assert await call(queue.enqueue, Task("f", unique_key="k")) == holder
        await call(queue.complete, task)

    def test_a_function_that_keeps_the_interpreter_is_no_standstill(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        for worked in (time.monotonic, lambda: 0.0):
            monkeypatch.setattr(time, "process_time", worked)
            standstill = omniq_sqlite._Standstill()
            standstill.expect(time.monotonic())
            time.sleep(0.1)
            found.append(standstill.left() > 0)
        assert found == [False, True]

    def test_functions_that_keep_it_and_wait_are_one_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_TIME_TO_EXTEND", 0.1)
        monkeypatch.setattr(time, "process_time", lambda: 0.0)
        standstill = omniq_sqlite._Standstill()
        found = []
        for _ in range(2):
            standstill.expect(time.monotonic())
            time.sleep(0.2)
            found.append(standstill.left() > 0)
        assert found == [True, False]

    @POSIX
    def test_a_forked_child_does_not_take_itself_for_stopped(
        self, run_here: RunHere
    ) -> None:
        code = """
            omniq_sqlite._standstill.expect(time.monotonic())
            time.sleep(0.1)
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
            print(omniq_sqlite._standstill.left() > 0, flush=True)
            """
        assert run_here(code).split() == ["False", "True"]


class TestReclaim:
    async def test_the_tasks_of_the_worker_are_claimable_at_once(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue_many, [Task(name) for name in "abc"])
        gone = await call(queue.dequeue_many, 2, lease=1_000.0, worker="w1")
        kept = await claim(queue, lease=1_000.0, worker="w2")
        assert await call(queue.reclaim, "w1") == 2
        again = await call(queue.dequeue_many, 5, worker="w3")
        assert [(task.func, task.attempt) for task in again] == [("a", 2), ("b", 2)]
        with pytest.raises(LeaseLostError):
            await call(queue.complete, gone[0])
        await call(queue.complete, kept)

    async def test_out_of_attempts_they_fail(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=1))
        await claim(queue, worker="w1")
        assert await call(queue.reclaim, "w1") == 1
        assert await call(queue.dequeue) is None
        assert await get_status(queue, task_id) == "failed"

    async def test_a_waiting_call_gets_them(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await claim(queue, lease=1_000.0, worker="w1")
        waiting = started(aside(queue.dequeue, timeout=None))
        await in_wait(queue)
        await call(queue.reclaim, "w1")
        assert (await waiting).attempt == 2

    async def test_a_worker_that_holds_nothing_has_nothing_to_reclaim(
        self, queue: Any
    ) -> None:
        assert await call(queue.reclaim, "w1") == 0

    async def test_the_tasks_of_a_process_that_died_are_reclaimed(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        run_program(
            """
            queue = SQLiteQueue(path, clock=lambda: 1_800_000_000.0)
            queue.dequeue(worker="child", lease=1_000.0)
            os._exit(0)
            """,
            api.path,
        )
        assert await call(queue.dequeue) is None
        assert await call(queue.reclaim, "child") == 1
        assert (await claim(queue)).attempt == 2


class TestCancel:
    async def test_a_pending_task_never_runs(self, queue: Any, clock: Clock) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        clock.advance(3)
        assert await call(queue.cancel, task_id) is True
        assert await call(queue.dequeue) is None
        task = await get(queue, task_id)
        assert (task.status, task.finished_at) == ("cancelled", at(3))

    async def test_a_scheduled_task_never_runs(self, queue: Any, clock: Clock) -> None:
        task_id = await call(queue.enqueue, Task("f"), delay=10.0)
        assert await call(queue.cancel, task_id) is True
        clock.advance(20)
        assert await call(queue.dequeue) is None

    async def test_a_running_task_is_cancelled_at_once(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await claim(queue)
        assert await call(queue.cancel, task_id) is True
        task = await get(queue, task_id)
        assert (task.status, task.lease_id, task.lease_until) == (
            "cancelled",
            None,
            None,
        )

    async def test_an_unknown_id_is_false(self, queue: Any) -> None:
        assert await call(queue.cancel, "unknown") is False

    async def test_a_finished_task_stays_what_it_is(self, queue: Any) -> None:
        task_id = await make_failed(queue, Task("f"))
        assert await call(queue.cancel, task_id) is False
        assert await get_status(queue, task_id) == "failed"

    async def test_cancelling_twice_changes_nothing(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.cancel, task_id)
        assert await call(queue.cancel, task_id) is False


class TestRetry:
    async def test_a_failed_task_runs_again_with_fresh_attempts(
        self, queue: Any
    ) -> None:
        task_id = await call(queue.enqueue, Task("f", max_attempts=2))
        for _ in range(2):
            await call(queue.fail, await claim(queue), "no", delay=0.0)
        assert await call(queue.retry, task_id) is True
        task = await get(queue, task_id)
        assert (task.status, task.attempt, task.finished_at) == ("pending", 0, None)
        for attempt in (1, 2):
            task = await claim(queue)
            assert task.attempt == attempt
            await call(queue.fail, task, "no", delay=0.0)
        assert await get_status(queue, task_id) == "failed"

    async def test_a_cancelled_task_runs_again(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.cancel, task_id)
        assert await call(queue.retry, task_id) is True
        assert (await claim(queue)).attempt == 1

    async def test_an_expired_task_runs_again(self, queue: Any, clock: Clock) -> None:
        task_id = await call(queue.enqueue, Task("f", expires_at=at(5)))
        clock.advance(6)
        assert await call(queue.dequeue) is None
        assert await call(queue.retry, task_id) is True
        assert (await claim(queue)).id == task_id

    async def test_a_failed_task_past_its_expiry_runs_again(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await make_failed(queue, Task("f", expires_at=at(5)))
        clock.advance(6)
        assert await call(queue.retry, task_id) is True
        assert (await claim(queue)).id == task_id

    async def test_a_waiting_call_gets_it(self, queue: Any) -> None:
        task_id = await make_failed(queue, Task("f"))
        waiting = started(aside(queue.dequeue, timeout=None))
        await in_wait(queue)
        await call(queue.retry, task_id)
        assert (await waiting).id == task_id

    async def test_an_unknown_id_is_false(self, queue: Any) -> None:
        assert await call(queue.retry, "unknown") is False

    async def test_a_live_task_stays_what_it_is(self, queue: Any) -> None:
        task_id = await call(queue.enqueue, Task("f"))
        assert await call(queue.retry, task_id) is False
        task = await claim(queue)
        assert await call(queue.retry, task_id) is False
        await call(queue.fail, task, "no")
        assert await call(queue.retry, task_id) is False
        assert await get_status(queue, task_id) == "scheduled"

    async def test_a_completed_task_stays_what_it_is(self, api: Api) -> None:
        queue = api.queue(retention=60.0)
        task_id = await call(queue.enqueue, Task("f"))
        await call(queue.complete, await claim(queue))
        assert await call(queue.retry, task_id) is False
        assert await get_status(queue, task_id) == "completed"

    async def test_while_its_key_is_held_it_is_a_duplicate(self, queue: Any) -> None:
        task_id = await make_failed(queue, Task("f", unique_key="k"))
        holder = await call(queue.enqueue, Task("g", unique_key="k"))
        with pytest.raises(DuplicateTaskError) as caught:
            await call(queue.retry, task_id)
        assert caught.value.task_id == task_id
        assert caught.value.unique_key == "k"
        assert await get_status(queue, task_id) == "failed"
        await call(queue.cancel, holder)
        assert await call(queue.retry, task_id) is True

    async def test_a_dead_holder_of_its_key_is_settled_first(
        self, queue: Any, clock: Clock
    ) -> None:
        task_id = await make_failed(queue, Task("f", unique_key="k"))
        holder = await call(queue.enqueue, Task("g", unique_key="k", expires_at=at(5)))
        clock.advance(6)
        assert await call(queue.retry, task_id) is True
        assert await get_status(queue, holder) == "expired"


class TestCancelAll:
    async def make(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("f", id="a"), Task("g", id="b")])
        await call(queue.enqueue, Task("f", queue="mail", id="c"))
        await call(queue.enqueue, Task("f", id="d"), delay=10.0)
        await call(queue.enqueue, Task("f", id="e", priority=9))
        await claim(queue)
        await make_failed(queue, Task("f", queue="other", id="z"))

    async def get_cancelled(self, queue: Any) -> str:
        tasks = await call(queue.list_tasks, status="cancelled")
        return "".join(sorted(task.id for task in tasks))

    @pytest.mark.parametrize(
        ("filters", "cancelled"),
        [
            ({}, "abcde"),
            ({"queue": "mail"}, "c"),
            ({"func": "g"}, "b"),
            ({"queue": "default", "func": "f"}, "ade"),
            ({"status": "running"}, "e"),
            ({"status": TaskStatus.PENDING}, "abc"),
            ({"status": "scheduled", "queue": "default"}, "d"),
            ({"queue": "nowhere"}, ""),
            ({"status": "scheduled", "func": "g"}, ""),
        ],
        ids=str,
    )
    async def test_it_cancels_every_live_task_that_matches(
        self, api: Api, filters: dict[str, Any], cancelled: str
    ) -> None:
        queue = api.queue(":memory:")
        await self.make(queue)
        assert await call(queue.cancel_all, **filters) == len(cancelled)
        assert await self.get_cancelled(queue) == cancelled

    async def test_a_status_that_does_not_exist_is_refused(self, queue: Any) -> None:
        with pytest.raises(ValueError, match="status"):
            await call(queue.cancel_all, status="lost")


class TestRetryAll:
    @pytest.mark.parametrize(
        ("filters", "retried"),
        [
            ({}, "abc"),
            ({"queue": "mail"}, "b"),
            ({"func": "g"}, "c"),
            ({"queue": "default", "func": "f"}, "a"),
            ({"func": "nothing"}, ""),
        ],
        ids=str,
    )
    async def test_it_retries_every_finished_task_that_matches(
        self, api: Api, filters: dict[str, Any], retried: str
    ) -> None:
        queue = api.queue(":memory:")
        await make_failed(queue, Task("f", id="a"))
        await make_failed(queue, Task("f", queue="mail", id="b"))
        await call(queue.enqueue, Task("g", id="c"))
        await call(queue.cancel, "c")
        assert await call(queue.retry_all, **filters) == len(retried)
        pending = await call(queue.list_tasks, status="pending")
        assert "".join(task.id for task in pending) == retried

    async def test_one_of_several_with_the_same_key_runs_again(
        self, queue: Any
    ) -> None:
        for name in "ab":
            await make_failed(queue, Task("f", id=name, unique_key="k"))
        await make_failed(queue, Task("f", id="c"))
        assert await call(queue.retry_all) == 2
        assert await call(queue.count_tasks, status="failed") == 1


class TestReads:
    async def make(self, queue: Any) -> None:
        await call(
            queue.enqueue_many,
            [
                Task("f", id="a"),
                Task("g", id="b", unique_key="k"),
                Task("f", id="c", queue="mail", unique_key="k"),
                Task("g", id="d", run_at=at(10)),
            ],
        )
        await claim(queue)

    async def test_an_unknown_id_is_none(self, queue: Any) -> None:
        assert await call(queue.get_task, "unknown") is None

    async def test_a_list_holds_what_matches_in_order_of_insertion(
        self, queue: Any
    ) -> None:
        await self.make(queue)
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "abcd"),
            ({"queue": "default"}, "abd"),
            ({"status": "pending"}, "bc"),
            ({"status": TaskStatus.RUNNING}, "a"),
            ({"func": "g"}, "bd"),
            ({"unique_key": "k"}, "bc"),
            ({"unique_key": "k", "queue": "mail"}, "c"),
            ({"limit": 2}, "ab"),
            ({"limit": 2, "offset": 1}, "bc"),
            ({"offset": 3}, "d"),
            ({"offset": 9}, ""),
            ({"func": "g", "limit": 1, "offset": 1}, "d"),
            ({"queue": "nowhere"}, ""),
        ]
        for filters, found in cases:
            tasks = await call(queue.list_tasks, **filters)
            assert "".join(task.id for task in tasks) == found, filters

    async def test_a_list_holds_a_hundred_unless_told_otherwise(
        self, queue: Any
    ) -> None:
        await call(queue.enqueue_many, [Task("f") for _ in range(150)])
        assert len(await call(queue.list_tasks)) == 100
        assert len(await call(queue.list_tasks, limit=1_000)) == 150

    async def test_a_count_counts_what_matches(self, queue: Any) -> None:
        await self.make(queue)
        cases: list[tuple[dict[str, Any], int]] = [
            ({}, 4),
            ({"queue": "default"}, 3),
            ({"status": "pending"}, 2),
            ({"queue": "default", "status": "pending"}, 1),
            ({"queue": "nowhere"}, 0),
        ]
        for filters, count in cases:
            assert await call(queue.count_tasks, **filters) == count, filters

    @pytest.mark.parametrize(
        ("method", "arguments", "name"),
        [
            ("list_tasks", {"status": "lost"}, "status"),
            ("list_tasks", {"limit": -1}, "limit"),
            ("list_tasks", {"limit": 1.5}, "limit"),
            ("list_tasks", {"offset": -1}, "offset"),
            ("count_tasks", {"status": "lost"}, "status"),
        ],
    )
    async def test_an_argument_out_of_range_is_refused(
        self, queue: Any, method: str, arguments: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            await call(getattr(queue, method), **arguments)

    async def test_the_status_is_as_stored(self, queue: Any, clock: Clock) -> None:
        await call(queue.enqueue, Task("f", id="a"), delay=5.0)
        await call(queue.enqueue, Task("f", id="b", expires_at=at(5)))
        clock.advance(6)
        stored = {task.id: str(task.status) for task in await call(queue.list_tasks)}
        assert stored == {"a": "scheduled", "b": "pending"}
        await claim(queue)
        stored = {task.id: str(task.status) for task in await call(queue.list_tasks)}
        assert stored == {"a": "running", "b": "expired"}

    async def test_stats_count_each_queue_by_status(
        self, api: Api, clock: Clock
    ) -> None:
        queue = api.queue(retention=60.0)
        await make_failed(queue, Task("f", queue="mail"))
        await call(queue.enqueue, Task("f", queue="mail", id="c"))
        await call(queue.cancel, "c")
        await call(queue.enqueue, Task("f", queue="mail", expires_at=at(-1)))
        await call(queue.dequeue, "mail")
        await call(queue.enqueue_many, [Task("f") for _ in range(2)])
        await call(queue.complete, await claim(queue))
        await claim(queue)
        clock.advance(3)
        await call(queue.enqueue, Task("f"))
        clock.advance(4)
        await call(queue.enqueue, Task("f"))
        await call(queue.enqueue, Task("f"), delay=10.0)
        await call(queue.pause, "mail")
        default, mail = await call(queue.stats)
        assert default == QueueStats(
            "default",
            scheduled=1,
            pending=2,
            running=1,
            completed=1,
            paused=False,
            oldest_pending_at=at(3),
        )
        assert mail == QueueStats("mail", failed=1, cancelled=1, expired=1, paused=True)

    async def test_an_empty_file_has_no_queues(self, queue: Any) -> None:
        assert await call(queue.stats) == []
        assert await call(queue.list_queues) == []
        assert await call(queue.list_workers) == []

    async def test_queues_are_listed_by_name(self, queue: Any) -> None:
        for name in ("mail", "default", "images", "mail"):
            await call(queue.enqueue, Task("f", queue=name))
        await call(queue.pause, "empty")
        names = await call(queue.list_queues)
        assert [name for name in names if name != "empty"] == [
            "default",
            "images",
            "mail",
        ]

    async def test_workers_are_those_that_gave_their_name(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue_many, [Task("f"), Task("f")])
        await call(queue.dequeue_many, 2, ["default", "mail"], worker="w1")
        clock.advance(30)
        await call(queue.dequeue, worker="w2")
        await call(queue.dequeue)
        one, two = await call(queue.list_workers)
        assert (one.name, one.pid, one.running) == ("w1", os.getpid(), 2)
        assert (one.started_at, one.seen_at) == (at(0), at(0))
        assert tuple(one.queues) == ("default", "mail")
        assert (two.name, two.running, two.seen_at) == ("w2", 0, at(30))
        assert isinstance(one, WorkerInfo)

    async def test_a_heartbeat_shows_that_a_worker_is_there(
        self, api: Api, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        task = await claim(queue, worker="w1")
        clock.advance(30)
        # An object notes a worker every ten real seconds; another one at once.
        await call(api.queue().extend, task)
        (worker,) = await call(queue.list_workers)
        assert (worker.started_at, worker.seen_at) == (at(0), at(30))

    async def test_a_reclaimed_worker_is_listed_no_more(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await claim(queue, worker="w1")
        await call(queue.reclaim, "w1")
        assert await call(queue.list_workers) == []


class TestPause:
    async def test_a_paused_queue_hands_out_nothing(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.pause, "default")
        assert await call(queue.dequeue) is None
        assert await call(queue.dequeue_many, 5) == []
        await call(queue.resume, "default")
        assert await claim_names(queue) == ["f"]

    async def test_other_queues_go_on(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("f"), Task("g", queue="mail")])
        await call(queue.pause, "default")
        assert await claim_names(queue, ["default", "mail"]) == ["g"]

    async def test_it_takes_tasks_all_the_same(self, queue: Any) -> None:
        await call(queue.pause, "default")
        await call(queue.enqueue, Task("f"))
        assert await call(queue.count_tasks) == 1

    async def test_what_was_claimed_before_can_be_ended(self, queue: Any) -> None:
        await call(queue.enqueue_many, [Task("f"), Task("g")])
        one, two = await call(queue.dequeue_many, 2)
        await call(queue.pause, "default")
        await call(queue.complete, await call(queue.extend, one))
        await call(queue.release, two)
        assert await call(queue.dequeue) is None

    async def test_due_and_ended_tasks_stay_where_they_are(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        await claim(queue, lease=10.0)
        await call(queue.enqueue, Task("g"), delay=10.0)
        await call(queue.pause, "default")
        clock.advance(20)
        assert await aside(queue.dequeue, timeout=0.05) is None
        await call(queue.resume, "default")
        assert await claim_names(queue) == ["f", "g"]

    async def test_it_is_kept_in_the_file(self, api: Api, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.pause, "default")
        await call(queue.close)
        assert await call(api.queue().dequeue) is None

    async def test_it_holds_in_every_process(self, api: Api, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.pause, "default")
        found = run_program(
            """
            with SQLiteQueue(path, clock=lambda: 1_800_000_000.0) as queue:
                print(queue.dequeue())
                queue.resume("default")
            """,
            api.path,
        )
        assert found == "None"
        assert await claim_names(queue) == ["f"]

    async def test_it_holds_for_a_claim_that_was_waiting_for_the_lock(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        with raw(api.path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            claiming = started(aside(queue.dequeue))
            await settled_in()
            assert not claiming.done()
            connection.execute("INSERT INTO omniq_pause VALUES ('default', 0)")
            connection.execute("COMMIT")
        assert await claiming is None

    async def test_both_may_be_called_twice(self, queue: Any) -> None:
        for _ in range(2):
            await call(queue.pause, "default")
        for _ in range(2):
            await call(queue.resume, "default")
        await call(queue.enqueue, Task("f"))
        await claim(queue)

    async def test_resuming_wakes_a_waiting_call(self, queue: Any) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.pause, "default")
        waiting = started(aside(queue.dequeue, timeout=None))
        await in_wait(queue)
        await call(queue.resume, "default")
        assert (await waiting).func == "f"

    async def test_the_stats_say_so(self, queue: Any) -> None:
        await call(queue.pause, "default")
        await call(queue.enqueue, Task("f"))
        (stats,) = await call(queue.stats)
        assert (stats.queue, stats.paused) == ("default", True)


class TestPurge:
    async def make(self, api: Api, clock: Clock) -> Any:
        """One task in each status; the finished ones ended 10 seconds apart."""
        queue = api.queue(":memory:", retention=1e6)
        await call(queue.enqueue, Task("f", id="completed"))
        await call(queue.complete, await claim(queue))
        clock.advance(10)
        await make_failed(queue, Task("f", id="failed"))
        clock.advance(10)
        await call(queue.enqueue, Task("f", id="cancelled"))
        await call(queue.cancel, "cancelled")
        clock.advance(10)
        await call(queue.enqueue, Task("f", id="expired", expires_at=at(-1)))
        await call(queue.dequeue)
        await call(queue.enqueue, Task("f", id="running"))
        await claim(queue, lease=1e6)
        await call(queue.enqueue, Task("f", id="pending"))
        await call(queue.enqueue, Task("f", id="scheduled"), delay=1e6)
        await make_failed(queue, Task("f", id="elsewhere", queue="mail"))
        return queue

    @pytest.mark.parametrize(
        ("filters", "purged"),
        [
            ({}, "cancelled completed elsewhere expired failed"),
            ({"queue": "mail"}, "elsewhere"),
            ({"queue": "default"}, "cancelled completed expired failed"),
            ({"status": "failed"}, "elsewhere failed"),
            ({"status": "failed", "queue": "default"}, "failed"),
            ({"status": TaskStatus.COMPLETED}, "completed"),
            ({"status": "pending"}, "pending"),
            ({"status": "scheduled"}, "scheduled"),
            ({"status": "running"}, "running"),
            ({"older_than": 0}, "cancelled completed elsewhere expired failed"),
            ({"older_than": 15}, "completed failed"),
            ({"older_than": 25}, "completed"),
            ({"older_than": 15, "status": "failed"}, "failed"),
            ({"older_than": 31}, ""),
        ],
        ids=str,
    )
    async def test_it_deletes_what_matches(
        self, api: Api, clock: Clock, filters: dict[str, Any], purged: str
    ) -> None:
        queue = await self.make(api, clock)
        before = {task.id for task in await call(queue.list_tasks)}
        assert len(before) == 8
        assert await call(queue.purge, **filters) == len(purged.split())
        after = {task.id for task in await call(queue.list_tasks)}
        assert sorted(before - after) == purged.split()

    async def test_older_counts_from_the_end_of_a_task(
        self, queue: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f"))
        clock.advance(20)
        await call(queue.fail, await claim(queue), "no", retry=False)
        clock.advance(10)
        assert await call(queue.purge, older_than=15.0) == 0
        assert await call(queue.purge, older_than=5.0) == 1

    @pytest.mark.parametrize(
        ("filters", "name"),
        [({"status": "lost"}, "status"), ({"older_than": -1.0}, "older_than")],
    )
    async def test_an_argument_out_of_range_is_refused(
        self, queue: Any, filters: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            await call(queue.purge, **filters)


@contextlib.asynccontextmanager
async def connect(api: Api, path: Any = None, **options: Any) -> AsyncIterator[Any]:
    """Open the caller's own connection: an aiosqlite one for the async twin."""
    path = api.path if path is None else path
    if api.is_async:
        async with aiosqlite.connect(path, **options) as connection:
            yield connection
    else:
        with closing(sqlite3.connect(path, **options)) as connection:
            yield connection


async def fetch(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    cursor = await call(connection.execute, sql)
    rows = await call(cursor.fetchall)
    await call(cursor.close)
    return [tuple(row) for row in rows]


@pytest.fixture
async def shop(api: Api, queue: Any) -> Path:
    """Return the path of a file with tasks' tables and the caller's own."""
    await call(queue.count_tasks)
    with raw(api.path) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY) STRICT")
    return api.path


@pytest.fixture
async def connection(request: pytest.FixtureRequest, shop: Path) -> AsyncIterator[Any]:
    """Return the caller's connection, in sqlite3's legacy transaction mode."""
    if request.param == "aiosqlite":
        async with aiosqlite.connect(shop, timeout=5) as opened:
            yield opened
    else:
        with raw(shop, isolation_level="") as plain:
            yield plain


@pytest.mark.parametrize(
    ("api", "connection"),
    [("async", "sqlite3"), ("async", "aiosqlite"), ("blocking", "sqlite3")],
    indirect=True,
)
class TestEnqueueOn:
    """The caller's own transaction; `orders` is the caller's own table."""

    async def test_it_is_committed_with_the_callers_rows(
        self, queue: Any, connection: Any
    ) -> None:
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        ids = await call(
            queue.enqueue_on, connection, Task("f", ("x",), id="z"), Task("g", id="a")
        )
        assert ids == ["z", "a"]
        assert await call(queue.count_tasks) == 0
        await call(connection.commit)
        assert await claim_names(queue) == ["f", "g"]
        assert await fetch(connection, "SELECT id FROM orders") == [(1,)]

    async def test_it_is_rolled_back_with_the_callers_rows(
        self, queue: Any, connection: Any
    ) -> None:
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        await call(queue.enqueue_on, connection, Task("f"))
        await call(connection.rollback)
        assert await call(queue.count_tasks) == 0
        assert await fetch(connection, "SELECT id FROM orders") == []

    async def test_in_legacy_mode_it_begins_a_transaction_where_there_is_none(
        self, queue: Any, connection: Any
    ) -> None:
        assert not connection.in_transaction
        await call(queue.enqueue_on, connection, Task("f"))
        assert connection.in_transaction
        assert await call(queue.count_tasks) == 0
        await call(connection.rollback)
        assert await call(queue.count_tasks) == 0
        await call(queue.enqueue_on, connection, Task("g"))
        await call(connection.commit)
        assert await claim_names(queue) == ["g"]

    async def test_the_transaction_it_begins_is_immediate(
        self, api: Api, queue: Any, connection: Any
    ) -> None:
        with write_lock(api.path):
            await call(connection.execute, "PRAGMA busy_timeout = 20")
            with pytest.raises(DatabaseBusyError):
                await call(queue.enqueue_on, connection, Task("f"))
        await call(queue.enqueue_on, connection, Task("g"))
        with raw(api.path) as other:
            other.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        await call(connection.commit)
        assert await claim_names(queue) == ["g"]

    async def test_a_transaction_of_the_callers_own_is_used(
        self, queue: Any, connection: Any
    ) -> None:
        await call(connection.execute, "BEGIN")
        await call(queue.enqueue_on, connection, Task("f"))
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        assert await call(queue.count_tasks) == 0
        await call(connection.commit)
        assert await claim_names(queue) == ["f"]

    async def test_several_calls_share_the_transaction(
        self, queue: Any, connection: Any
    ) -> None:
        for name in "abc":
            await call(queue.enqueue_on, connection, Task(name))
        await call(connection.rollback)
        assert await call(queue.count_tasks) == 0
        for name in "abc":
            await call(queue.enqueue_on, connection, Task(name))
        await call(connection.commit)
        assert await claim_names(queue) == ["a", "b", "c"]

    async def test_a_duplicate_leaves_none_of_the_tasks_and_all_of_the_callers_rows(
        self, queue: Any, connection: Any
    ) -> None:
        await call(queue.enqueue, Task("old", id="a1"))
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        with pytest.raises(DuplicateTaskError) as caught:
            await call(
                queue.enqueue_on, connection, Task("f"), Task("g", id="a1"), Task("h")
            )
        assert caught.value.task_id == "a1"
        assert connection.in_transaction
        await call(queue.enqueue_on, connection, Task("new"))
        await call(connection.commit)
        assert await fetch(connection, "SELECT id FROM orders") == [(1,)]
        assert await claim_names(queue) == ["old", "new"]

    async def test_a_value_that_cannot_be_serialized_leaves_nothing(
        self, queue: Any, connection: Any
    ) -> None:
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        with pytest.raises(SerializationError):
            await call(queue.enqueue_on, connection, Task("f"), Task("g", (object(),)))
        await call(connection.commit)
        assert await call(queue.count_tasks) == 0
        assert await fetch(connection, "SELECT id FROM orders") == [(1,)]

    async def test_unique_keys_count(
        self, queue: Any, connection: Any, clock: Clock
    ) -> None:
        first = await call(queue.enqueue, Task("f", unique_key="k"))
        dead = await call(queue.enqueue, Task("g", unique_key="d", expires_at=at(5)))
        clock.advance(6)
        one, two, three = await call(
            queue.enqueue_on,
            connection,
            Task("f", unique_key="k"),
            Task("h", unique_key="d"),
            Task("h", unique_key="d"),
        )
        assert one == first
        assert two == three != dead
        await call(connection.commit)
        assert await get_status(queue, dead) == "expired"
        assert await claim_names(queue) == ["f", "h"]

    async def test_no_task_is_no_change(self, queue: Any, connection: Any) -> None:
        assert await call(queue.enqueue_on, connection) == []

    async def test_a_row_factory_and_a_text_factory_are_left_alone(
        self, queue: Any, connection: Any
    ) -> None:
        def row_factory(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
            names = [column[0] for column in cursor.description]
            return dict(zip(names, row, strict=True))

        first = await call(queue.enqueue, Task("f", unique_key="k"))
        connection.row_factory = row_factory
        connection.text_factory = bytes
        ids = await call(
            queue.enqueue_on, connection, Task("g"), Task("h", unique_key="k")
        )
        assert ids[1] == first
        await call(connection.commit)
        assert connection.row_factory is row_factory
        assert connection.text_factory is bytes
        assert await claim_names(queue) == ["f", "g"]

    async def test_temporary_tables_of_our_names_do_not_matter(
        self, api: Api, queue: Any, connection: Any
    ) -> None:
        for row in read_rows(api.path, "SELECT name, type FROM sqlite_schema"):
            if row["type"] == "table" and row["name"].startswith("omniq_"):
                sql = f"CREATE TEMPORARY TABLE {row['name']} (x)"
                await call(connection.execute, sql)
        await call(queue.enqueue_on, connection, Task("f"))
        await call(connection.commit)
        assert await claim_names(queue) == ["f"]

    async def test_a_waiting_call_wakes_on_the_callers_commit(
        self, queue: Any, connection: Any
    ) -> None:
        waiting = started(aside(queue.dequeue, timeout=DEADLINE))
        await in_wait(queue)
        await call(queue.enqueue_on, connection, Task("f"))
        await settled_in()
        assert not waiting.done()
        begun = time.monotonic()
        await call(connection.commit)
        assert (await waiting).func == "f"
        assert time.monotonic() - begun < SOON

    async def test_it_never_commits_nor_runs_a_script(
        self, queue: Any, connection: Any
    ) -> None:
        statements: list[str] = []
        await call(connection.execute, "INSERT INTO orders VALUES (1)")
        await call(connection.set_trace_callback, statements.append)
        await call(queue.enqueue_on, connection, Task("f"), Task("g"))
        await call(connection.set_trace_callback, None)
        assert statements != []
        told = "\n".join(statements).upper()
        assert re.search(r"\bCOMMIT\b|^\s*END\b", told, re.MULTILINE) is None
        assert "BEGIN" not in told
        assert "SAVEPOINT" in told

    async def test_a_snapshot_that_cannot_be_upgraded_is_busy_at_once(
        self, queue: Any, connection: Any
    ) -> None:
        await call(connection.execute, "PRAGMA busy_timeout = 60000")
        await call(connection.execute, "BEGIN")
        await fetch(connection, "SELECT id FROM orders")
        await call(queue.enqueue, Task("meanwhile"))
        begun = time.monotonic()
        with pytest.raises(DatabaseBusyError):
            await call(queue.enqueue_on, connection, Task("f"))
        assert time.monotonic() - begun < SOON
        assert connection.in_transaction
        await call(connection.rollback)
        await call(queue.enqueue_on, connection, Task("g"))
        await call(connection.commit)
        assert await claim_names(queue) == ["meanwhile", "g"]

    async def test_its_events_are_committed_and_rolled_back_with_it(
        self, api: Api, connection: Any
    ) -> None:
        backend = api.backend(events=True)
        await call(backend.events.count)
        await call(backend.queue.enqueue_on, connection, Task("f"))
        await call(connection.rollback)
        assert await get_types(backend.events) == []
        await call(backend.queue.enqueue_on, connection, Task("f", id="a1"))
        await call(connection.commit)
        (event,) = await call(backend.events.query)
        assert (event.type, event.task_id, event.queue) == ("enqueued", "a1", "default")

    @pytest.mark.skipif(
        sqlite3.sqlite_version_info >= (3, 51, 3)
        or sqlite3.sqlite_version_info[:2] in {(3, 50), (3, 44)},
        reason="this library has no WAL-reset bug",
    )
    async def test_on_a_library_with_the_wal_reset_bug_it_stops_checkpoints(
        self, queue: Any, connection: Any
    ) -> None:
        await call(queue.enqueue_on, connection, Task("f"))
        await call(connection.commit)
        assert await fetch(connection, "PRAGMA wal_autocheckpoint") == [(0,)]


class TestEnqueueOnAnyConnection:
    async def test_a_missing_schema_is_created_in_the_callers_transaction(
        self, api: Api
    ) -> None:
        path = api.folder / "new.db"
        queue = api.queue(path)
        async with connect(api, path) as connection:
            await call(connection.execute, "CREATE TABLE orders (id INTEGER)")
            await call(queue.enqueue_on, connection, Task("f"))
            await call(connection.rollback)
            assert get_names(path) == {"orders"}
            await call(queue.enqueue_on, connection, Task("g"))
            await call(connection.commit)
        assert await claim_names(queue) == ["g"]

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
    async def test_it_opens_nothing_itself(self, api: Api) -> None:
        path = api.folder / "new.db"
        queue = api.queue(path)

        def count_open() -> int:
            found = 0
            for descriptor in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):
                    found += str(path) in str(descriptor.readlink())
            return found

        with raw(path, isolation_level="") as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            before = count_open()
            await call(queue.enqueue_on, connection, Task("f"))
            assert count_open() == before
            connection.commit()

    async def test_it_works_while_the_caller_holds_the_write_lock(
        self, api: Api, shop: Path
    ) -> None:
        queue = api.queue(busy_timeout=0.0)
        with raw(shop) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            await call(queue.enqueue_on, connection, Task("f"))
            connection.execute("COMMIT")
        assert await claim_names(queue) == ["f"]

    @pytest.mark.parametrize("name", ["link.db", "../jobs/jobs.db"])
    async def test_the_same_file_may_have_another_name(
        self, api: Api, name: str
    ) -> None:
        folder = api.folder / "jobs"
        folder.mkdir()
        queue = api.queue(folder / "jobs.db")
        await call(queue.count_tasks)
        (folder / "link.db").symlink_to(folder / "jobs.db")
        with raw(folder / name) as connection:
            connection.execute("BEGIN")
            await call(queue.enqueue_on, connection, Task("f"))
            connection.execute("COMMIT")
        assert await claim_names(queue) == ["f"]

    async def test_a_savepoint_of_the_callers_own_counts(
        self, queue: Any, shop: Path
    ) -> None:
        with raw(shop) as connection:
            connection.execute("BEGIN")
            await call(queue.enqueue_on, connection, Task("f"))
            connection.execute("SAVEPOINT mine")
            await call(queue.enqueue_on, connection, Task("g"))
            connection.execute("ROLLBACK TO mine")
            connection.execute("COMMIT")
        assert await claim_names(queue) == ["f"]

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": None},
            pytest.param(
                {"autocommit": True},
                marks=pytest.mark.skipif(
                    sys.version_info < (3, 12), reason="new in Python 3.12"
                ),
            ),
        ],
        ids=str,
    )
    async def test_in_autocommit_it_wants_an_open_transaction(
        self, queue: Any, shop: Path, options: dict[str, Any]
    ) -> None:
        with raw(shop, **options) as connection:
            with pytest.raises(ValueError, match="transaction"):
                await call(queue.enqueue_on, connection, Task("f"))
            assert not connection.in_transaction
            connection.execute("BEGIN")
            await call(queue.enqueue_on, connection, Task("g"))
            connection.execute("ROLLBACK")
            connection.execute("BEGIN")
            await call(queue.enqueue_on, connection, Task("h"))
            connection.execute("COMMIT")
        assert await claim_names(queue) == ["h"]

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12")
    async def test_with_autocommit_false_it_joins_the_open_transaction(
        self, queue: Any, shop: Path
    ) -> None:
        with raw(shop, autocommit=False) as connection:
            await call(queue.enqueue_on, connection, Task("f"))
            connection.rollback()
            assert await call(queue.count_tasks) == 0
            await call(queue.enqueue_on, connection, Task("g"))
            connection.execute("INSERT INTO orders VALUES (1)")
            assert await call(queue.count_tasks) == 0
            connection.commit()
            connection.rollback()
        assert await claim_names(queue) == ["g"]

    @pytest.mark.parametrize("level", ["DEFERRED", "IMMEDIATE", "EXCLUSIVE"])
    async def test_every_isolation_level_of_legacy_mode_works(
        self, queue: Any, shop: Path, level: str
    ) -> None:
        with raw(shop, isolation_level=level) as connection:
            await call(queue.enqueue_on, connection, Task("f"))
            connection.rollback()
            await call(queue.enqueue_on, connection, Task("g"))
            connection.execute("INSERT INTO orders VALUES (1)")
            connection.commit()
        assert await claim_names(queue) == ["g"]

    async def test_a_connection_to_another_file_is_refused(
        self, api: Api, queue: Any, shop: Path
    ) -> None:
        with raw(api.folder / "other.db") as connection:
            connection.execute("BEGIN")
            with pytest.raises(ValueError, match=r"other\.db"):
                await call(queue.enqueue_on, connection, Task("f"))
            connection.execute("COMMIT")
        assert get_names(api.folder / "other.db") == set()

    async def test_a_connection_to_a_database_in_memory_is_refused(
        self, api: Api, queue: Any, shop: Path
    ) -> None:
        for made in (queue, api.queue(":memory:")):
            with raw(":memory:") as connection:
                connection.execute("BEGIN")
                with pytest.raises(ValueError, match="connection"):
                    await call(made.enqueue_on, connection, Task("f"))

    async def test_a_connection_of_a_foreign_thread_is_refused(
        self, queue: Any, shop: Path
    ) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            foreign = pool.submit(sqlite3.connect, shop).result()
            try:
                with pytest.raises(ValueError, match="thread"):
                    await call(queue.enqueue_on, foreign, Task("f"))
            finally:
                pool.submit(foreign.close).result()

    async def test_something_else_than_a_connection_is_refused(
        self, queue: Any, shop: Path
    ) -> None:
        with pytest.raises(TypeError, match="connection"):
            await call(queue.enqueue_on, str(shop), Task("f"))

    async def test_an_object_in_the_file_that_was_never_used_may_be_first(
        self, api: Api
    ) -> None:
        queue = api.queue()
        with raw(api.path, isolation_level="") as connection:
            await call(queue.enqueue_on, connection, Task("f"))
            connection.commit()
        assert await claim_names(queue) == ["f"]


# What nobody should pass, for any parameter: other types, numbers out of range, text
# that SQLite cannot store, nested values.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**63, -(2**63), 10**400, -(10**400), 5.0]),
    st.sampled_from([-0.5, 1e12, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "\0", "a\0b", "\ud800", "x" * 1_001, "x" * 10**6, "default"]),
    st.sampled_from(["; DROP TABLE omniq_task", "'", "*", "running", "5"]),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.datetimes(),
    st.datetimes(timezones=st.just(UTC)),
    st.lists(st.none() | st.integers() | st.text(max_size=2), max_size=2),
    st.dictionaries(st.integers() | st.text(max_size=2), st.none(), max_size=2),
    st.builds(object),
    st.just(ValueError("no")),
    st.builds(lambda: Task("f")),
    st.builds(lambda: json.loads("[" * 250 + "]" * 250)),
)

# A call of every method, with arguments that are fine.
FINE: dict[str, dict[str, dict[str, Any]]] = {
    "Queue": {
        "enqueue": {"task": Task("f"), "delay": 0.0},
        "enqueue_many": {"tasks": [Task("f")]},
        "dequeue": {"queues": "q", "timeout": 0.0, "lease": 60.0, "worker": "w"},
        "dequeue_many": {
            "limit": 1, "queues": "q", "timeout": 0.0, "lease": 60.0, "worker": "w",
        },
        "complete": {"task": Task("f", lease_id="x")},
        "complete_many": {"tasks": [Task("f", lease_id="x")]},
        "fail": {
            "task": Task("f", lease_id="x"), "error": "no", "retry": True, "delay": 1.0,
        },
        "release": {"task": Task("f", lease_id="x"), "delay": 1.0},
        "extend": {"task": Task("f", lease_id="x"), "lease": 60.0, "progress": 1},
        "reclaim": {"worker": "w"},
        "cancel": {"task_id": "x"},
        "cancel_all": {"queue": "q", "func": "f", "status": "pending"},
        "retry": {"task_id": "x"},
        "retry_all": {"queue": "q", "func": "f"},
        "pause": {"queue": "q"},
        "resume": {"queue": "q"},
        "purge": {"queue": "q", "status": "failed", "older_than": 1.0},
        "get_task": {"task_id": "x"},
        "list_tasks": {
            "queue": "q", "status": "failed", "func": "f", "unique_key": "k",
            "limit": 1, "offset": 0,
        },
        "count_tasks": {"queue": "q", "status": "failed"},
    },
    "ResultStorage": {
        "store": {"result": TaskResult("x", ResultStatus.SUCCESS), "ttl": 1.0},
        "store_many": {"results": [TaskResult("x", ResultStatus.SUCCESS)]},
        "get": {"task_id": "x"},
        "get_many": {"ids": ["x"]},
        "wait": {"task_id": "x", "timeout": 0.0},
        "delete": {"task_id": "x"},
        "list_results": {"status": "error", "limit": 1, "offset": 0},
        "purge": {"older_than": 1.0},
    },
    "EventStorage": {
        "log": {"event": TaskEvent("x")},
        "log_many": {"events": [TaskEvent("x")]},
        "query": {
            "task_id": "x", "queue": "q", "type": "x", "since": at(0), "until": at(1),
            "after": "0", "limit": 1, "newest_first": True,
        },
        "count": {
            "task_id": "x", "queue": "q", "type": "x", "since": at(0), "until": at(1),
            "after": "0",
        },
        "follow": {"after": "0"},
        "purge": {"older_than": 1.0},
    },
    "Backend": {
        "enqueue": {"task": Task("f"), "delay": 0.0},
        "enqueue_many": {"tasks": [Task("f")]},
        "complete": {
            "task": Task("f", lease_id="x"), "value": 1, "enqueue": [Task("g")],
        },
        "complete_many": {"values": [(Task("f", lease_id="x"), 1)]},
        "fail": {
            "task": Task("f", lease_id="x"), "exception": ValueError("no"),
            "retry": True, "delay": 1.0,
        },
        "status": {"task_id": "x"},
        "result": {"task_id": "x", "timeout": 0.0},
        "wait_all": {"ids": ["x"], "timeout": 0.0},
        "from_url": {"url": "sqlite:///jobs.db"},
    },
}  # fmt: skip

# What a caller can expect of a call that was refused. Anything else, such as an
# `sqlite3.Error` or an `AttributeError` from inside, is a mistake of the module.
REFUSALS = (OmniQError, ValueError, TypeError, TimeoutError)

QUICK = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def run_to_end(outcome: Any) -> Any:
    """Run what an async method returned, in a loop of its own."""
    return asyncio.run(outcome) if inspect.iscoroutine(outcome) else outcome


def waits_long(name: str, value: object) -> bool:
    """Tell whether a value would be taken, and would make the call wait."""
    return name == "timeout" and (
        value is None or (isinstance(value, (int, float)) and value > 0)
    )


class TestBadInput:
    def test_every_parameter_of_every_method_is_tried(self) -> None:
        left_out = {
            "close", "enqueue_on", "path", "from_async", "to_async", "from_env",
            "backup", "check", "cleanup", "stats", "list_queues", "list_workers",
            "queue", "results", "events",
        }  # fmt: skip
        for kind, methods in FINE.items():
            public = get_public(getattr(omniq_sqlite, "SQLite" + kind))
            assert set(methods) == set(public) - left_out
            for method, terms in methods.items():
                parameters = inspect.signature(public[method]).parameters
                assert list(terms) == [n for n in parameters if n != "self"], method

    @pytest.mark.parametrize("form", ["AsyncSQLite", "SQLite"])
    @pytest.mark.parametrize(
        ("kind", "method"), [(kind, name) for kind in FINE for name in FINE[kind]]
    )
    def test_a_bad_value_is_refused_by_name_or_has_a_defined_result(
        self, form: str, kind: str, method: str
    ) -> None:
        made = getattr(omniq_sqlite, form + kind)(":memory:")
        terms = FINE[kind][method]

        @settings(QUICK, max_examples=15 * len(terms))
        @given(name=st.sampled_from(list(terms)), value=ODD)
        def attack(name: str, value: Any) -> None:
            if waits_long(name, value):
                return
            with contextlib.suppress(*REFUSALS):
                run_to_end(getattr(made, method)(**{**terms, name: value}))

        attack()
        # It works as before: nothing is half done, open or locked.
        if kind == "Queue":
            assert run_to_end(made.count_tasks()) >= 0
            task_id = run_to_end(made.enqueue(Task("f", queue="after")))
            assert run_to_end(made.dequeue("after")).id == task_id
        run_to_end(made.close())

    @pytest.mark.parametrize("cls", [Task, TaskResult, TaskEvent])
    def test_a_value_with_a_bad_field_is_refused_or_travels(self, cls: Any) -> None:
        needed = {Task: "func", TaskResult: "task_id status", TaskEvent: "type"}[cls]
        fine = dict.fromkeys(needed.split(), "success")
        names = [field.name for field in dataclasses.fields(cls)]

        @settings(QUICK, max_examples=300)
        @given(name=st.sampled_from(names), value=ODD)
        def attack(name: str, value: Any) -> None:
            try:
                made = cls(**{**fine, name: value})
            except ValueError as error:
                assert name in str(error)
                return
            assert isinstance(repr(made), str)
            assert made._repr_html_().startswith("<table>")
            with SQLiteBackend(":memory:", events=True) as backend:
                assert backend.results is not None
                assert backend.events is not None
                with contextlib.suppress(SerializationError):
                    if cls is Task:
                        backend.enqueue(made)
                        assert backend.queue.list_tasks()[0].id == made.id
                    elif cls is TaskResult:
                        backend.results.store(made)
                        [found] = backend.results.list_results()
                        assert (found.task_id, found.value) == (
                            made.task_id,
                            made.value,
                        )
                    else:
                        backend.events.log(made)
                        assert backend.events.count() == 1

        attack()

    @pytest.mark.parametrize("cls", ["SQLiteQueue", "AsyncSQLiteBackend"])
    def test_a_bad_option_is_refused_before_anything_is_opened(
        self, cls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        parameters = list(inspect.signature(getattr(omniq_sqlite, cls)).parameters)

        @settings(QUICK, max_examples=200)
        @given(name=st.sampled_from(parameters), value=ODD)
        def attack(name: str, value: Any) -> None:
            with contextlib.suppress(ValueError, TypeError):
                getattr(omniq_sqlite, cls)(**{"path": "jobs.db", name: value})

        attack()
        assert list(tmp_path.iterdir()) == []

    async def test_the_same_task_twice_in_one_call_adds_none(self, queue: Any) -> None:
        task = Task("f")
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue_many, [Task("g"), task, task])
        assert await call(queue.count_tasks) == 0

    async def test_the_same_key_twice_in_one_call_adds_one(self, queue: Any) -> None:
        tasks = [Task("f", unique_key="k"), Task("f", unique_key="k")]
        first, second = await call(queue.enqueue_many, tasks)
        assert first == second == tasks[0].id
        assert await call(queue.count_tasks) == 1

    async def test_nothing_to_do_is_done_at_once(self, backend: Any) -> None:
        assert await call(backend.queue.enqueue_many, []) == []
        assert await call(backend.queue.complete_many, []) is None
        assert await call(backend.results.store_many, []) is None
        assert await call(backend.results.get_many, []) == {}
        assert await call(backend.events.log_many, []) is None


@dataclass
class ModelTask:
    """What the model knows of a task."""

    id: str
    queue: str
    priority: int
    max_attempts: int
    unique_key: str | None
    expires_at: float | None
    run_at: float | None = None
    status: str = "pending"
    attempt: int = 0
    lease_until: float = 0.0
    lease_id: str | None = None
    worker: str | None = None

    @property
    def is_live(self) -> bool:
        return self.status in ("scheduled", "pending", "running")

    def is_due(self, now: float) -> bool:
        """Tell whether time has changed it."""
        until = math.inf if self.expires_at is None else self.expires_at
        due = {"pending": until, "running": self.lease_until}
        if self.run_at is not None:
            due["scheduled"] = min(self.run_at, until)
        return due.get(self.status, math.inf) <= now

    def settle(self, now: float) -> None:
        if not self.is_due(now):
            return
        out_of_attempts = self.attempt >= self.max_attempts
        if self.expires_at is not None and self.expires_at <= now:
            self.status = "expired"
        elif self.status == "running" and out_of_attempts:
            self.status = "failed"
        else:
            self.status = "pending"
        self.lease_id = None

    def end(self, status: str) -> None:
        self.status, self.lease_id = status, None


SOME_QUEUES = st.sampled_from(["a", "a", "b"])
SOME_SECONDS = st.sampled_from([0, 0, 5, 30])
SOME_TASKS = st.lists(
    st.fixed_dictionaries(
        {
            "queue": SOME_QUEUES,
            "priority": st.integers(0, 2),
            "max_attempts": st.integers(1, 3),
            "unique_key": st.sampled_from([None, None, "k1", "k2"]),
            "life": st.sampled_from([None, None, 5, 20]),
            "delay": SOME_SECONDS,
        }
    ),
    min_size=1,
    max_size=4,
)


class QueueModel(RuleBasedStateMachine):
    """Two queues on one file, an async one and a blocking one, beside a dictionary.

    Each step is made by one of the two; then both must show what the model has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.loop = asyncio.new_event_loop()
        path = self.folder.name + "/jobs.db"
        options: Any = {"clock": self.clock, "synchronous": "OFF"}
        self.queues: list[Any] = [
            AsyncSQLiteQueue(path, **options),
            SQLiteQueue(path, **options),
        ]
        self.tasks: dict[str, ModelTask] = {}  # in order of insertion
        self.paused: set[str] = set()
        self.claims: list[Task] = []

    def teardown(self) -> None:
        for queue in self.queues:
            self.run(queue.close())
        self.loop.close()
        self.folder.cleanup()

    def run(self, outcome: Any) -> Any:
        if inspect.iscoroutine(outcome):
            return self.loop.run_until_complete(outcome)
        return outcome

    def do(self, which: int, method: str, *args: Any, **terms: Any) -> Any:
        return self.run(getattr(self.queues[which], method)(*args, **terms))

    def holder(self, queue: str, key: str | None) -> ModelTask | None:
        """Return who holds a key, as a settled file would have it."""
        for task in self.tasks.values():
            if key and task.is_live and (task.queue, task.unique_key) == (queue, key):
                settled = dataclasses.replace(task)
                settled.settle(self.clock.now)
                if settled.is_live:
                    return task
        return None

    def settle_holders(self, queue: str, key: str | None) -> None:
        for task in self.tasks.values():
            if key and (task.queue, task.unique_key) == (queue, key):
                task.settle(self.clock.now)

    @initialize(which=st.integers(0, 1), some=SOME_TASKS)
    def begin(self, which: int, some: list[dict[str, Any]]) -> None:
        self.enqueue(which, some)

    @rule(which=st.integers(0, 1), some=SOME_TASKS)
    def enqueue(self, which: int, some: list[dict[str, Any]]) -> None:
        for terms in some:
            self.enqueue_one(which, **terms)

    def enqueue_one(
        self, which: int, *, life: float | None, delay: float, **terms: Any
    ) -> None:
        now = self.clock.now
        until = None if life is None else now + life
        expires_at = None if until is None else datetime.fromtimestamp(until, UTC)
        task = Task("f", expires_at=expires_at, **terms)
        task_id = self.do(which, "enqueue", task, delay=delay)
        self.settle_holders(task.queue, task.unique_key)
        holder = self.holder(task.queue, task.unique_key)
        assert task_id == (holder.id if holder else task.id)
        if holder is None:
            made = ModelTask(task.id, **terms, expires_at=until)
            if delay:
                made.status, made.run_at = "scheduled", now + delay
            self.tasks[task.id] = made

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 1), data=st.data())
    def enqueue_an_id_again(self, which: int, data: st.DataObject) -> None:
        old = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        with pytest.raises(DuplicateTaskError):
            self.do(which, "enqueue_many", [Task("g"), Task("f", id=old.id)])

    @rule(
        which=st.integers(0, 1),
        names=st.sampled_from([["a"], ["b"], ["a", "b"], ["b", "a"]]),
        limit=st.integers(1, 3),
        lease=st.sampled_from([5, 20]),
        worker=st.sampled_from([None, "w1", "w2"]),
    )
    def dequeue_many(
        self, which: int, names: list[str], limit: int, lease: float, worker: str | None
    ) -> None:
        terms = {"lease": lease, "worker": worker}
        claimed = self.do(which, "dequeue_many", limit, names, **terms)
        for task in claimed:
            expected = self.expect_claim([n for n in names if n not in self.paused])
            assert expected is not None
            assert task.id == expected.id
            expected.status = "running"
            expected.attempt += 1
            expected.lease_until = self.clock.now + lease
            expected.lease_id, expected.worker = task.lease_id, worker
            assert task.attempt == expected.attempt
        self.claims += claimed
        if len(claimed) < limit:
            left = self.expect_claim([n for n in names if n not in self.paused])
            assert left is None

    def expect_claim(self, names: list[str]) -> ModelTask | None:
        for name in names:
            here = [task for task in self.tasks.values() if task.queue == name]
            for task in here:
                task.settle(self.clock.now)
            ready = [task for task in here if task.status == "pending"]
            if ready:
                return max(ready, key=lambda task: task.priority)
        return None

    def end(self, data: st.DataObject) -> tuple[Task, ModelTask | None]:
        """Draw a claim; return it, and its task if the claim still holds."""
        claim = data.draw(st.sampled_from(self.claims))
        task = self.tasks.get(claim.id)
        held = task is not None and task.lease_id == claim.lease_id
        return claim, task if held else None

    def attempt(
        self, which: int, held: object, method: str, *args: Any, **terms: Any
    ) -> bool:
        """Do what needs a claim; return whether it held."""
        if held is None:
            with pytest.raises(LeaseLostError):
                self.do(which, method, *args, **terms)
            return False
        self.do(which, method, *args, **terms)
        return True

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 1), data=st.data(), many=st.booleans())
    def complete(self, which: int, data: st.DataObject, many: bool) -> None:
        claim, held = self.end(data)
        args = [[claim]] if many else [claim]
        method = "complete_many" if many else "complete"
        if self.attempt(which, held, method, *args):
            del self.tasks[claim.id]

    @precondition(lambda self: self.claims)
    @rule(
        which=st.integers(0, 1), data=st.data(), retry=st.booleans(), delay=SOME_SECONDS
    )
    def fail(self, which: int, data: st.DataObject, retry: bool, delay: float) -> None:
        claim, held = self.end(data)
        done = self.attempt(which, held, "fail", claim, "no", retry=retry, delay=delay)
        if held and done:
            again = retry and held.attempt < held.max_attempts
            held.end("scheduled" if again else "failed")
            held.run_at = self.clock.now + delay if again else held.run_at

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 1), data=st.data(), delay=SOME_SECONDS)
    def release(self, which: int, data: st.DataObject, delay: float) -> None:
        claim, held = self.end(data)
        if self.attempt(which, held, "release", claim, delay=delay) and held:
            held.end("scheduled" if delay else "pending")
            held.attempt -= 1
            held.run_at = self.clock.now + delay if delay else held.run_at

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 1), data=st.data(), lease=st.sampled_from([5, 20]))
    def extend(self, which: int, data: st.DataObject, lease: float) -> None:
        claim, held = self.end(data)
        if self.attempt(which, held, "extend", claim, lease) and held:
            held.lease_until = self.clock.now + lease

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 1), data=st.data())
    def cancel(self, which: int, data: st.DataObject) -> None:
        task = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        assert self.do(which, "cancel", task.id) is task.is_live
        if task.is_live:
            task.end("cancelled")

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 1), data=st.data())
    def retry(self, which: int, data: st.DataObject) -> None:
        task = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        ended = task.status in ("failed", "cancelled", "expired")
        if ended and self.holder(task.queue, task.unique_key):
            with pytest.raises(DuplicateTaskError):
                self.do(which, "retry", task.id)
            return
        assert self.do(which, "retry", task.id) is ended
        if ended:
            self.settle_holders(task.queue, task.unique_key)
            task.status, task.attempt, task.run_at = "pending", 0, None
            if task.expires_at is not None and task.expires_at <= self.clock.now:
                task.expires_at = None

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 1), worker=st.sampled_from(["w1", "w2"]))
    def reclaim(self, which: int, worker: str) -> None:
        gone = [
            task
            for task in self.tasks.values()
            if task.status == "running" and task.worker == worker
        ]
        assert self.do(which, "reclaim", worker) == len(gone)
        for task in gone:
            task.lease_until = 0
            task.settle(self.clock.now)

    @rule(
        which=st.integers(0, 1),
        queue=SOME_QUEUES,
        method=st.sampled_from(["pause", "resume", "resume", "purge", "cancel_all"]),
    )
    def change_a_queue(self, which: int, queue: str, method: str) -> None:
        if method in ("pause", "resume"):
            self.do(which, method, queue)
            (self.paused.add if method == "pause" else self.paused.discard)(queue)
            return
        chosen = [
            task
            for task in self.tasks.values()
            if task.queue == queue and task.is_live is (method == "cancel_all")
        ]
        assert self.do(which, method, queue=queue) == len(chosen)
        for task in chosen:
            if method == "purge":
                del self.tasks[task.id]
            else:
                task.end("cancelled")

    @rule(seconds=st.sampled_from([1, 5, 20]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def both_show_what_the_model_has(self) -> None:
        expected = [
            (t.id, t.queue, t.status, t.attempt, t.lease_id)
            for t in self.tasks.values()
        ]
        for which in (0, 1):
            found = self.do(which, "list_tasks", limit=1_000)
            shown = [(t.id, t.queue, t.status, t.attempt, t.lease_id) for t in found]
            assert shown == expected


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(
    QUICK,
    max_examples=60,
    stateful_step_count=50,
    phases=[Phase.generate],  # to shorten a failure takes minutes: add Phase.shrink
)


# =============================================================================
# Results
# =============================================================================


def success(task_id: str, value: Any = None, **fields: Any) -> TaskResult:
    return TaskResult(task_id, ResultStatus.SUCCESS, value, **fields)


class TestTaskResult:
    def test_it_takes_what_the_contract_says(self) -> None:
        parameters = inspect.signature(TaskResult).parameters
        assert " ".join(list(parameters)[:11]) == (
            "task_id status value error error_type traceback started_at finished_at"
            " worker attempt metadata"
        )
        result = TaskResult("a1", ResultStatus.ERROR)
        assert (result.value, result.error, result.error_type) == (None, None, None)
        assert (result.traceback, result.worker, result.attempt) == (None, None, None)
        assert (result.started_at, result.finished_at) == (None, None)
        assert result.metadata == {}

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"task_id": ""}, "task_id"),
            ({"status": "lost"}, "status"),
            ({"started_at": NAIVE}, "started_at"),
            ({"finished_at": NAIVE}, "finished_at"),
            ({"attempt": -1}, "attempt"),
            ({"metadata": 7}, "metadata"),
        ],
        ids=str,
    )
    def test_a_value_out_of_range_is_refused(
        self, fields: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            TaskResult(**{"task_id": "a1", "status": "success", **fields})


class TestStore:
    async def test_everything_given_comes_back(self, results: Any) -> None:
        result = TaskResult(
            "a1",
            ResultStatus.ERROR,
            value={"when": at(1)},
            error="by nought",
            error_type="ZeroDivisionError",
            traceback="Traceback …\n",
            started_at=at(1),
            finished_at=at(2.5),
            worker="w1",
            attempt=3,
            metadata={"tries": (1, 2, 3)},
        )
        await call(results.store, result)
        assert await call(results.get, "a1") == result

    async def test_storing_again_replaces(self, results: Any) -> None:
        await call(results.store, success("a1", "old"))
        await call(results.store, TaskResult("a1", ResultStatus.ERROR, error="no"))
        found = await call(results.get, "a1")
        assert (found.status, found.value, found.error) == ("error", None, "no")

    async def test_storing_again_begins_a_new_life(
        self, results: Any, clock: Clock
    ) -> None:
        await call(results.store, success("a1", 1), ttl=10.0)
        clock.advance(8)
        await call(results.store, success("a1", 2), ttl=10.0)
        clock.advance(8)
        assert (await call(results.get, "a1")).value == 2

    async def test_a_result_of_an_older_claim_never_replaces_a_newer_ones(
        self, results: Any
    ) -> None:
        await call(results.store, success("a1", "second", attempt=2, claim=2))
        await call(results.store, success("a1", "first", attempt=1, claim=1))
        assert (await call(results.get, "a1")).value == "second"
        await call(results.store, success("a1", "third", attempt=1, claim=3))
        assert (await call(results.get, "a1")).value == "third"

    async def test_a_result_of_an_older_attempt_never_replaces_a_newer_ones(
        self, results: Any
    ) -> None:
        await call(results.store, success("a1", "second", attempt=2))
        await call(results.store, success("a1", "first", attempt=1))
        assert (await call(results.get, "a1")).value == "second"
        await call(results.store, success("a1", "second again", attempt=2))
        assert (await call(results.get, "a1")).value == "second again"

    async def test_a_result_lives_as_long_as_told(
        self, results: Any, clock: Clock
    ) -> None:
        await call(results.store, success("a1"), ttl=10.0)
        clock.advance(9.999)
        assert await call(results.get, "a1") is not None
        clock.advance(0.002)
        assert await call(results.get, "a1") is None

    async def test_a_result_lives_seven_days_unless_told_otherwise(
        self, results: Any, clock: Clock
    ) -> None:
        await call(results.store, success("a1"))
        clock.advance(604_799)
        assert await call(results.get, "a1") is not None
        clock.advance(2)
        assert await call(results.get, "a1") is None

    async def test_the_default_life_is_an_option(self, api: Api, clock: Clock) -> None:
        results = api.results(ttl=5.0)
        await call(results.store_many, [success("a1"), success("b2")])
        clock.advance(4)
        assert len(await call(results.list_results)) == 2
        clock.advance(2)
        assert await call(results.list_results) == []

    async def test_with_a_life_of_none_it_is_kept_for_ever(
        self, api: Api, clock: Clock
    ) -> None:
        results = api.results(ttl=None)
        await call(results.store, success("a1"))
        clock.advance(1e9)
        assert await call(results.get, "a1") is not None
        assert await call(results.purge) == 0

    async def test_many_are_stored_at_once_or_not_at_all(self, results: Any) -> None:
        await call(results.store_many, (success(name, name) for name in "abc"))
        assert len(await call(results.list_results)) == 3
        with pytest.raises(SerializationError):
            await call(results.store_many, [success("d"), success("e", object())])
        assert len(await call(results.list_results)) == 3

    @pytest.mark.parametrize("ttl", [-1.0, float("nan"), "long"])
    async def test_a_life_out_of_range_is_refused(
        self, api: Api, results: Any, ttl: Any
    ) -> None:
        with pytest.raises(ValueError, match="ttl"):
            await call(results.store, success("a1"), ttl=ttl)
        with pytest.raises(ValueError, match="ttl"):
            api.results(ttl=ttl)


class TestGetResult:
    async def test_an_unknown_id_is_none(self, results: Any) -> None:
        assert await call(results.get, "unknown") is None

    async def test_reading_leaves_it_there(self, results: Any) -> None:
        await call(results.store, success("a1", 7))
        for _ in range(2):
            assert (await call(results.get, "a1")).value == 7

    async def test_many_are_found_by_id(self, results: Any, clock: Clock) -> None:
        await call(results.store_many, [success("a", 1), success("b", 2)])
        await call(results.store, success("c", 3), ttl=1.0)
        clock.advance(2)
        found = await call(results.get_many, iter(["b", "unknown", "a", "c", "a"]))
        assert {task_id: result.value for task_id, result in found.items()} == {
            "a": 1,
            "b": 2,
        }
        assert await call(results.get_many, []) == {}


class TestWaitForResult:
    async def test_one_that_is_there_is_returned_at_once(self, results: Any) -> None:
        await call(results.store, success("a1", 7))
        assert (await call(results.wait, "a1", timeout=0)).value == 7
        assert (await call(results.wait, "a1")).value == 7

    async def test_a_timeout_that_runs_out_is_an_error(self, results: Any) -> None:
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="a1"):
            await aside(results.wait, "a1", timeout=0.05)
        assert 0.045 <= time.monotonic() - begun < SOON
        with pytest.raises(TimeoutError):
            await call(results.wait, "a1", timeout=0)

    async def test_it_wakes_when_the_result_is_stored(
        self, api: Api, results: Any
    ) -> None:
        for storage in (results, api.results()):
            waiting = started(aside(results.wait, "a1"))
            await in_wait(results)
            begun = time.monotonic()
            await call(storage.store, success("b2", 0))
            await call(storage.store, success("a1", 7))
            assert (await waiting).value == 7
            assert time.monotonic() - begun < SOON
            await call(results.delete, "a1")

    async def test_it_wakes_when_a_process_that_goes_on_stores_it(
        self, api: Api, programs: Programs
    ) -> None:
        results = api.results(clock=time.time)
        waiting = started(aside(results.wait, "a1", timeout=DEADLINE))
        await in_wait(results)
        child = programs.start(
            """
            SQLiteResultStorage(path).store(TaskResult("a1", "success", 7))
            sys.stdin.read()
            """,
            api.path,
        )
        assert (await waiting).value == 7
        assert child.poll() is None
        programs.finish(child)

    @pytest.mark.parametrize("seconds", [-1.0, float("nan")])
    async def test_a_timeout_out_of_range_is_refused(
        self, results: Any, seconds: Any
    ) -> None:
        with pytest.raises(ValueError, match="timeout"):
            await call(results.wait, "a1", timeout=seconds)


class TestDeleteResult:
    async def test_it_says_whether_there_was_one(self, results: Any) -> None:
        await call(results.store, success("a1"))
        assert await call(results.delete, "a1") is True
        assert await call(results.get, "a1") is None
        assert await call(results.delete, "a1") is False


class TestListResults:
    async def test_a_list_holds_what_matches(self, results: Any) -> None:
        for name, status in zip(
            "abcd", ["success", "error", "success", "cancelled"], strict=True
        ):
            await call(results.store, TaskResult(name, ResultStatus(status)))
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "abcd"),
            ({"status": "success"}, "ac"),
            ({"status": ResultStatus.CANCELLED}, "d"),
            ({"limit": 2}, "ab"),
            ({"limit": 2, "offset": 1}, "bc"),
            ({"status": "success", "offset": 1}, "c"),
            ({"offset": 4}, ""),
        ]
        for filters, found in cases:
            listed = await call(results.list_results, **filters)
            assert "".join(result.task_id for result in listed) == found, filters

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [({"status": "lost"}, "status"), ({"limit": -1}, "limit")],
    )
    async def test_an_argument_out_of_range_is_refused(
        self, results: Any, arguments: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            await call(results.list_results, **arguments)


class TestPurgeResults:
    async def test_it_deletes_the_expired_ones(
        self, api: Api, results: Any, clock: Clock
    ) -> None:
        await call(results.store, success("a"), ttl=5.0)
        await call(results.store, success("b"), ttl=50.0)
        clock.advance(6)
        assert await call(results.purge) == 1
        rows = read_rows(api.path, "SELECT task_id FROM omniq_result_view")
        assert rows == [{"task_id": "b"}]

    async def test_it_deletes_the_older_ones(self, results: Any, clock: Clock) -> None:
        for name in "abc":
            await call(results.store, success(name))
            clock.advance(10)
        assert await call(results.purge, older_than=15.0) == 2
        assert [r.task_id for r in await call(results.list_results)] == ["c"]

    async def test_an_argument_out_of_range_is_refused(self, results: Any) -> None:
        with pytest.raises(ValueError, match="older_than"):
            await call(results.purge, older_than=-1.0)

    async def test_no_transaction_deletes_more_than_1000(
        self, api: Api, spied: list[str], clock: Clock
    ) -> None:
        results = api.results()
        many = [success(str(number)) for number in range(2_001)]
        await call(results.store_many, many)
        clock.advance(604_801)
        spied.clear()
        assert await call(results.purge) == 2_001
        assert spied.count("COMMIT") == 3


# =============================================================================
# Events
# =============================================================================


class TestTaskEvent:
    def test_it_takes_what_the_contract_says(self) -> None:
        assert " ".join(list(inspect.signature(TaskEvent).parameters)) == (
            "type task_id queue message details worker at id"
        )
        before = datetime.now(UTC)
        event = TaskEvent("note")
        assert before <= event.at <= datetime.now(UTC)
        assert (event.task_id, event.queue, event.worker) == (None, None, None)
        assert (event.message, event.details, event.id) == ("", {}, None)

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"type": ""}, "type"),
            ({"task_id": ""}, "task_id"),
            ({"queue": 7}, "queue"),
            ({"message": 7}, "message"),
            ({"details": 7}, "details"),
            ({"at": NAIVE}, "at"),
        ],
        ids=str,
    )
    def test_a_value_out_of_range_is_refused(
        self, fields: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            TaskEvent(**{"type": "note", **fields})


class TestLog:
    async def test_everything_given_comes_back(self, events: Any) -> None:
        event = TaskEvent(
            "stock counted",
            task_id="a1",
            queue="mail",
            message="nach dem Essen 🐟",
            details={"when": at(1), "left": (1, 2)},
            worker="w1",
            at=at(-5),
        )
        await call(events.log, event)
        (found,) = await call(events.query)
        assert dataclasses.replace(found, id=None) == event
        assert isinstance(found.id, str)
        assert found.id != ""

    async def test_the_id_given_is_ignored(self, events: Any) -> None:
        await call(events.log, TaskEvent("note", id="1000000"))
        await call(events.log, TaskEvent("note", id="1000000"))
        one, two = await call(events.query)
        assert one.id != two.id

    async def test_a_known_type_comes_back_as_such(self, events: Any) -> None:
        await call(events.log_many, [TaskEvent("enqueued"), TaskEvent("my own")])
        one, two = await call(events.query)
        assert one.type is EventType.ENQUEUED
        assert two.type == "my own"

    async def test_many_are_logged_in_order_or_not_at_all(self, events: Any) -> None:
        await call(events.log_many, (TaskEvent(name) for name in "abc"))
        with pytest.raises(SerializationError):
            await call(
                events.log_many,
                [TaskEvent("d"), TaskEvent("e", details={"x": object()})],
            )
        assert await get_types(events) == ["a", "b", "c"]


async def log_some(events: Any) -> None:
    await call(
        events.log_many,
        [
            TaskEvent("a", task_id="one", queue="default", at=at(0)),
            TaskEvent("b", task_id="two", queue="default", at=at(10)),
            TaskEvent("a", task_id="two", queue="mail", at=at(20)),
            TaskEvent("b", task_id="one", queue="mail", at=at(30)),
            TaskEvent("c", at=at(15)),
        ],
    )


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 1, 2, 3, 4]),
    ({"task_id": "one"}, [0, 3]),
    ({"queue": "mail"}, [2, 3]),
    ({"type": "a"}, [0, 2]),
    ({"type": "a", "task_id": "two"}, [2]),
    ({"type": "c", "task_id": "two"}, []),
    ({"since": at(10)}, [1, 2, 3, 4]),
    ({"since": at(10.001)}, [2, 3, 4]),
    ({"until": at(20)}, [0, 1, 4]),
    ({"until": at(20.001)}, [0, 1, 2, 4]),
    ({"since": at(10), "until": at(20)}, [1, 4]),
    ({"since": at(10), "task_id": "two"}, [1, 2]),
    ({"since": at(10).astimezone(timezone(timedelta(hours=-7)))}, [1, 2, 3, 4]),
    ({"after": "0"}, [0, 1, 2, 3, 4]),
]


class TestQuery:
    def test_the_newest_of_many_since_an_instant(self, path: str) -> None:
        with SQLiteEventStorage(path) as events:
            events.log(TaskEvent("old", at=at(0)))
            events.log_many([TaskEvent("x", at=at(10)) for _ in range(10_100)])
            events.log(TaskEvent("y", at=at(20)))
            newest = events.query(since=at(10), newest_first=True, limit=2)
            assert [event.type for event in newest] == ["y", "x"]
            [first] = events.query(since=at(10), limit=1)
            assert (first.type, first.id) == ("x", "2")
            assert events.query(since=at(10), type="old") == []
            assert events.count(since=at(10)) == 10_101

    async def test_it_gives_what_matches_oldest_first(self, events: Any) -> None:
        await log_some(events)
        everything = await call(events.query)
        for filters, found in FILTERS:
            expected = [everything[index] for index in found]
            assert await call(events.query, **filters) == expected, filters
            newest = await call(events.query, newest_first=True, **filters)
            assert newest == expected[::-1], filters
            assert await call(events.count, **filters) == len(found), filters

    async def test_after_an_event_come_the_later_ones(self, events: Any) -> None:
        await log_some(events)
        everything = await call(events.query)
        for index, event in enumerate(everything):
            later = everything[index + 1 :]
            assert await call(events.query, after=event.id) == later
            assert await call(events.count, after=event.id) == len(later)
            newest = await call(events.query, after=event.id, newest_first=True)
            assert newest == later[::-1]

    async def test_a_limit_cuts_the_end_off(self, events: Any) -> None:
        await log_some(events)
        everything = await call(events.query)
        assert await call(events.query, limit=2) == everything[:2]
        newest = await call(events.query, limit=2, newest_first=True)
        assert newest == everything[::-1][:2]
        page = await call(events.query, limit=2, after=everything[1].id)
        assert page == everything[2:4]

    async def test_it_gives_a_hundred_unless_told_otherwise(self, events: Any) -> None:
        await call(events.log_many, [TaskEvent("note") for _ in range(150)])
        assert len(await call(events.query)) == 100
        assert await call(events.count) == 150

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"since": NAIVE}, "since"),
            ({"until": NAIVE}, "until"),
            ({"after": "tomorrow"}, "after"),
            ({"after": 7}, "after"),
            ({"limit": -1}, "limit"),
        ],
        ids=str,
    )
    async def test_an_argument_out_of_range_is_refused(
        self, events: Any, arguments: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ValueError, match=name):
            await call(events.query, **arguments)


class TestUnreadableEvents:
    async def test_a_follower_tells_of_one_and_goes_on(
        self, api: Api, events: Any
    ) -> None:
        following = events.follow()
        await call(events.log, TaskEvent("one"))
        with raw(api.path) as connection:
            connection.execute(
                "INSERT INTO omniq_event (at, type, message, details)"
                " VALUES (0, '', '', '{}')"
            )
        await call(events.log, TaskEvent("three"))
        assert [event.type for event in await take(following, 1)] == ["one"]
        with pytest.raises(SerializationError, match="event 2"):
            await take(following, 1)
        assert [event.type for event in await take(following, 1)] == ["three"]
        await close_follow(following)


class TestFollow:
    async def test_it_gives_what_is_logged_from_the_call_on(self, events: Any) -> None:
        await call(events.log, TaskEvent("before"))
        following = events.follow()
        await call(events.log, TaskEvent("first"))
        assert [event.type for event in await take(following, 1)] == ["first"]
        await call(events.log_many, [TaskEvent("second"), TaskEvent("third")])
        assert [e.type for e in await take(following, 2)] == ["second", "third"]
        await close_follow(following)

    async def test_it_waits_for_new_events(self, api: Api, events: Any) -> None:
        following = events.follow()
        await call(events.count)
        for storage in (events, api.events()):
            taking = started(take(following, 1))
            await in_wait(events)
            begun = time.monotonic()
            await call(storage.log, TaskEvent("new"))
            assert [event.type for event in await taking] == ["new"]
            assert time.monotonic() - begun < SOON
        await close_follow(following)

    async def test_nought_is_before_the_first(self, events: Any) -> None:
        await call(events.log_many, [TaskEvent("a"), TaskEvent("b")])
        following = events.follow(after="0")
        assert [event.type for event in await take(following, 2)] == ["a", "b"]
        await call(events.log, TaskEvent("c"))
        assert [event.type for event in await take(following, 1)] == ["c"]
        await close_follow(following)

    async def test_it_goes_on_after_a_cursor(self, events: Any) -> None:
        await call(events.log_many, [TaskEvent("a"), TaskEvent("b"), TaskEvent("c")])
        first = (await call(events.query))[0]
        following = events.follow(after=first.id)
        assert [event.type for event in await take(following, 2)] == ["b", "c"]
        await close_follow(following)

    async def test_many_events_come_complete_and_in_order(self, events: Any) -> None:
        await call(
            events.log_many, [TaskEvent("n", details={"n": n}) for n in range(1_200)]
        )
        following = events.follow(after="0")
        taken = await take(following, 1_200)
        assert [event.details["n"] for event in taken] == list(range(1_200))
        await close_follow(following)

    async def test_it_is_woken_by_another_process(self, api: Api, events: Any) -> None:
        await call(events.count)
        following = events.follow()
        taking = started(take(following, 1))
        await in_wait(events)
        await asyncio.to_thread(
            run_program,
            """
            with SQLiteEventStorage(path) as events:
                events.log(TaskEvent("from the child"))
            """,
            api.path,
        )
        assert [event.type for event in await taking] == ["from the child"]
        await close_follow(following)

    async def test_closing_ends_it(self, events: Any) -> None:
        following = events.follow(after="0")
        await call(events.log, TaskEvent("a"))
        await take(following, 1)
        await close_follow(following)
        await close_follow(following)
        assert await take_rest(following) == []

    async def test_closing_it_before_its_first_event_ends_it(self, events: Any) -> None:
        following = events.follow()
        await close_follow(following)
        assert await take_rest(following) == []

    async def test_closing_it_from_elsewhere_ends_its_wait(self, events: Any) -> None:
        following = events.follow(after="0")
        await call(events.log, TaskEvent("a"))

        reading = started(take_rest(following))
        await in_wait(events)  # it has taken the first one
        await close_follow(following)
        taken = await asyncio.wait_for(reading, DEADLINE)
        assert [event.type for event in taken] == ["a"]

    async def test_a_following_call_that_was_cancelled_can_go_on(
        self, tmp_path: Path
    ) -> None:
        async with AsyncSQLiteEventStorage(tmp_path / "jobs.db") as events:
            following = events.follow()
            taking = started(anext(following))
            await in_wait(events)
            taking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await taking
            await events.log(TaskEvent("a"))
            assert [event.type for event in await take(following, 1)] == ["a"]
            await following.aclose()

    @pytest.mark.parametrize("after", ["tomorrow", 7, ""])
    async def test_a_cursor_that_is_none_is_refused(
        self, events: Any, after: Any
    ) -> None:
        with pytest.raises(ValueError, match="after"):
            events.follow(after=after)


class TestPurgeEvents:
    async def test_it_deletes_the_older_ones(self, events: Any, clock: Clock) -> None:
        await log_some(events)
        clock.advance(30)
        assert await call(events.purge, older_than=12.0) == 3
        assert await get_types(events) == ["a", "b"]
        assert await call(events.purge, older_than=12.0) == 0

    async def test_an_id_is_never_used_twice(
        self, api: Api, events: Any, clock: Clock
    ) -> None:
        await log_some(events)
        before = {event.id for event in await call(events.query)}
        last = (await call(events.query, newest_first=True))[0]
        clock.advance(100)
        assert await call(events.purge, older_than=0.0) == 5
        await call(events.close)
        events = api.events()
        await call(events.log, TaskEvent("new"))
        (event,) = await call(events.query)
        assert event.id not in before
        assert await call(events.query, after=last.id) == [event]

    async def test_a_cursor_outlives_a_purge(self, events: Any, clock: Clock) -> None:
        await log_some(events)
        first = (await call(events.query))[0]
        following = events.follow(after=first.id)
        clock.advance(12)
        await call(events.purge, older_than=0.0)
        assert [event.type for event in await take(following, 3)] == ["a", "b", "c"]
        await close_follow(following)

    async def test_an_argument_out_of_range_is_refused(self, events: Any) -> None:
        with pytest.raises(ValueError, match="older_than"):
            await call(events.purge, older_than=-1.0)

    async def test_no_transaction_deletes_more_than_1000(
        self, api: Api, spied: list[str]
    ) -> None:
        events = api.events()
        many = [TaskEvent("x", at=at(-1)) for _ in range(2_001)]
        await call(events.log_many, many)
        spied.clear()
        assert await call(events.purge, older_than=0.0) == 2_001
        assert spied.count("COMMIT") == 3


class TestEventsOfTasks:
    """Each change of a task logs its event, where an event storage is given."""

    @pytest.fixture(params=["same file", "own file"])
    def events(self, request: pytest.FixtureRequest, api: Api) -> Any:
        own = request.param == "own file"
        return api.events(api.folder / "events.db" if own else None)

    @pytest.fixture
    def queue(self, api: Api, events: Any) -> Any:
        return api.queue(events=events)

    async def get_new(self, events: Any) -> list[tuple[str, str | None, str | None]]:
        found = await call(events.query)
        return [(str(event.type), event.task_id, event.queue) for event in found]

    async def test_enqueue(self, queue: Any, events: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1", queue="mail"))
        await call(queue.enqueue_many, [Task("f", id="b2"), Task("f", id="c3")])
        assert await self.get_new(events) == [
            ("enqueued", "a1", "mail"),
            ("enqueued", "b2", "default"),
            ("enqueued", "c3", "default"),
        ]
        assert (await call(events.query))[0].at == at(0)

    async def test_a_task_that_was_not_added_logs_nothing(
        self, queue: Any, events: Any
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1", unique_key="k"))
        await call(queue.enqueue, Task("f", unique_key="k"))
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue, Task("f", id="a1"))
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue_many, [Task("f"), Task("f", id="a1")])
        assert await self.get_new(events) == [("enqueued", "a1", "default")]

    @pytest.mark.parametrize("value", [True, "events.db"])
    async def test_what_is_no_event_storage_is_refused(
        self, api: Api, value: Any
    ) -> None:
        with pytest.raises(ValueError, match="events must be an event storage"):
            api.queue(events=value)

    async def test_dequeue_and_complete(
        self, queue: Any, events: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue_many, [Task("f", id="a1"), Task("f", id="b2")])
        one, two = await call(queue.dequeue_many, 2, worker="w1")
        clock.advance(3)
        await call(queue.complete, one)
        await call(queue.complete_many, [two])
        found = await call(events.query)
        assert [(str(event.type), event.task_id) for event in found[2:]] == [
            ("dequeued", "a1"),
            ("dequeued", "b2"),
            ("completed", "a1"),
            ("completed", "b2"),
        ]
        assert found[2].worker == "w1"
        assert found[5].at == at(3)

    async def test_what_was_not_completed_logs_nothing(
        self, queue: Any, events: Any
    ) -> None:
        await call(queue.enqueue_many, [Task("f", id="a1"), Task("f", id="b2")])
        claimed = await call(queue.dequeue_many, 2)
        await call(queue.cancel, "a1")
        with pytest.raises(LeaseLostError):
            await call(queue.complete_many, claimed)
        assert (await self.get_new(events))[4:] == [
            ("cancelled", "a1", "default"),
            ("completed", "b2", "default"),
        ]

    async def test_fail(self, queue: Any, events: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1", max_attempts=2))
        await call(queue.fail, await claim(queue), "one", delay=0.0)
        await call(queue.fail, await claim(queue), "two", delay=0.0)
        types = [event[0] for event in await self.get_new(events)]
        assert types == ["enqueued", "dequeued", "retry", "dequeued", "failed"]

    async def test_release(self, queue: Any, events: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        await call(queue.release, await claim(queue))
        assert (await self.get_new(events))[2:] == [("released", "a1", "default")]

    async def test_cancel(self, queue: Any, events: Any) -> None:
        for name in ("a1", "b2", "c3"):
            await call(queue.enqueue, Task("f", id=name))
        await call(queue.cancel, "a1")
        await call(queue.cancel, "a1")
        await call(queue.cancel, "unknown")
        await call(queue.cancel_all)
        assert sorted((await self.get_new(events))[3:]) == [
            ("cancelled", "a1", "default"),
            ("cancelled", "b2", "default"),
            ("cancelled", "c3", "default"),
        ]

    async def test_retry(self, queue: Any, events: Any) -> None:
        await make_failed(queue, Task("f", id="a1"))
        await call(queue.retry, "a1")
        await call(queue.cancel, "a1")
        await call(queue.retry_all)
        types = [event[0] for event in await self.get_new(events)]
        assert types[2:] == ["failed", "retry", "cancelled", "retry"]

    async def test_expiry(self, queue: Any, events: Any, clock: Clock) -> None:
        await call(queue.enqueue, Task("f", id="a1", expires_at=at(5)))
        clock.advance(6)
        await call(queue.dequeue)
        assert (await self.get_new(events))[1:] == [("expired", "a1", "default")]

    async def test_the_end_of_a_lease(
        self, queue: Any, events: Any, clock: Clock
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1", max_attempts=2))
        await claim(queue, lease=10.0, worker="w1")
        clock.advance(11)
        await claim(queue, lease=10.0, worker="w2")
        clock.advance(11)
        await call(queue.dequeue)
        found = await call(events.query)
        types = [str(event.type) for event in found]
        assert types[:4] == ["enqueued", "dequeued", "lease_lost", "dequeued"]
        assert types[4:] in (["failed"], ["lease_lost", "failed"])
        assert found[2].worker == "w1"

    async def test_reclaim(self, queue: Any, events: Any) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        await claim(queue, worker="w1")
        await call(queue.reclaim, "w1")
        await claim(queue, worker="w2")
        types = [event[0] for event in await self.get_new(events)]
        assert types == ["enqueued", "dequeued", "lease_lost", "dequeued"]

    async def test_the_events_of_a_task_tell_its_life_in_order(
        self, queue: Any, events: Any
    ) -> None:
        await call(queue.enqueue, Task("f", id="a1"))
        await call(queue.release, await claim(queue))
        await call(queue.fail, await claim(queue), "no", delay=0.0)
        await call(queue.complete, await claim(queue))
        assert await get_types(events, task_id="a1") == [
            "enqueued",
            "dequeued",
            "released",
            "dequeued",
            "retry",
            "dequeued",
            "completed",
        ]


class TestEventsInTheTransaction:
    async def test_on_one_file_both_are_there_or_neither(self, api: Api) -> None:
        backend = api.backend(events=True)
        await call(backend.enqueue, Task("f", id="a1"))
        await call(backend.enqueue, Task("f", id="b2"))
        task = await claim(backend.queue)
        refuse_inserts(api.path, "omniq_event")
        before = await call(backend.queue.list_tasks)
        for method, arguments in [
            (backend.queue.enqueue, (Task("g"),)),
            (backend.queue.enqueue_many, ([Task("g"), Task("h")],)),
            (backend.queue.dequeue, ()),
            (backend.queue.complete, (task,)),
            (backend.queue.complete_many, ([task],)),
            (backend.queue.fail, (task, "no")),
            (backend.queue.release, (task,)),
            (backend.queue.cancel, ("b2",)),
            (backend.queue.cancel_all, ()),
            (backend.complete, (task, 7)),
        ]:
            with pytest.raises((sqlite3.Error, OmniQError)):
                await call(method, *arguments)
            assert await call(backend.queue.list_tasks) == before
        assert await get_types(backend.events) == ["enqueued", "enqueued", "dequeued"]
        assert await call(backend.results.list_results) == []

    async def test_separate_objects_on_one_file_share_the_transaction_too(
        self, api: Api
    ) -> None:
        events = api.events()
        queue = api.queue(events=events)
        await call(queue.enqueue, Task("f"))
        refuse_inserts(api.path, "omniq_event")
        with pytest.raises((sqlite3.Error, OmniQError)):
            await call(queue.enqueue, Task("g"))
        assert await call(queue.count_tasks) == 1
        assert await call(events.count) == 1

    async def test_elsewhere_a_failure_is_a_log_record_and_no_error(
        self, api: Api, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = api.folder / "events.db"
        events = api.events(path)
        queue = api.queue(events=events)
        await call(events.count)
        refuse_inserts(path, "omniq_event")
        with caplog.at_level(logging.DEBUG, logger="omniq_sqlite"):
            await call(queue.enqueue, Task("f", ("a secret",), {"key": "a secret"}))
            await call(queue.complete, await claim(queue))
        assert await call(queue.count_tasks) == 0
        assert await call(events.count) == 0
        records = [r for r in caplog.records if r.name == "omniq_sqlite"]
        assert any(record.levelno >= logging.WARNING for record in records)
        assert "a secret" not in caplog.text

    async def test_elsewhere_an_operation_that_failed_logs_no_event(
        self, api: Api
    ) -> None:
        events = api.events(api.folder / "events.db")
        queue = api.queue(events=events)
        await call(queue.enqueue, Task("f", id="a1"))
        with pytest.raises(DuplicateTaskError):
            await call(queue.enqueue, Task("f", id="a1"))
        task = await claim(queue)
        refuse_ends(api.path)
        with pytest.raises((sqlite3.Error, OmniQError)):
            await call(queue.complete, task)
        assert await get_types(events) == ["enqueued", "dequeued"]

    async def test_without_an_event_storage_there_are_no_events(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f"))
        await call(queue.complete, await claim(queue))
        assert "omniq_event" not in get_names(api.path)


class TestLogging:
    def test_the_library_is_silent_unless_asked(self) -> None:
        handlers = logging.getLogger("omniq_sqlite").handlers
        assert any(isinstance(handler, logging.NullHandler) for handler in handlers)

    async def test_a_payload_is_never_logged(
        self, api: Api, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = api.backend(events=True)
        payload = "hunter2"
        with caplog.at_level(logging.DEBUG):
            await call(
                backend.enqueue,
                Task("f", (payload,), {"k": payload}, metadata={"k": payload}),
            )
            task = await claim(backend.queue, lease=1.0)
            await call(backend.queue.extend, task, 1.0, progress=payload)
            clock.advance(2)
            task = await claim(backend.queue)
            await call(backend.complete, task, payload)
            with pytest.raises(LeaseLostError):
                await call(backend.complete, task, payload)
            await call(backend.cleanup)
            await call(backend.check)
        assert payload not in caplog.text


class TestViews:
    async def test_tasks_are_there_with_readable_times(
        self, api: Api, queue: Any
    ) -> None:
        await call(queue.enqueue, Task("f", (1,), id="a1"), delay=1.5)
        (row,) = read_rows(api.path, "SELECT * FROM omniq_task_view")
        assert (row["id"], row["func"], row["args"]) == ("a1", "f", "[1]")
        assert row["created"].startswith("2027-01-15 08:00:00")
        assert row["run_at"].startswith("2027-01-15 08:00:01.5")

    async def test_results_are_there_with_readable_times(
        self, api: Api, results: Any
    ) -> None:
        await call(results.store, success("a1", 7, finished_at=at(2)))
        (row,) = read_rows(api.path, "SELECT * FROM omniq_result_view")
        assert (row["task_id"], row["status"], row["value"]) == ("a1", "success", "7")
        assert row["finished"].startswith("2027-01-15 08:00:02")
        assert row["expires"].startswith("2027-01-22 08:00:00")

    async def test_events_are_there_with_readable_times(
        self, api: Api, events: Any
    ) -> None:
        await call(events.log, TaskEvent("note", task_id="a1", at=at(3)))
        (row,) = read_rows(api.path, "SELECT * FROM omniq_event_view")
        assert (row["type"], row["task_id"]) == ("note", "a1")
        assert row["at"].startswith("2027-01-15 08:00:03")

    @pytest.mark.parametrize(
        ("kind", "present"),
        [
            ("Queue", "omniq_task"),
            ("ResultStorage", "omniq_result"),
            ("EventStorage", "omniq_event"),
        ],
    )
    async def test_a_file_holds_only_what_it_was_opened_for(
        self, api: Api, kind: str, present: str
    ) -> None:
        await touch(kind, api.make(kind))
        tables = {"omniq_task", "omniq_result", "omniq_event"}
        views = {name + "_view" for name in tables}
        assert get_names(api.path) & tables == {present}
        assert get_names(api.path) & views == {present + "_view"}
        assert read_rows(api.path, "SELECT version FROM omniq_schema") == [
            {"version": 1}
        ]


# =============================================================================
# Backend
# =============================================================================


class TestBackendParts:
    async def test_queue_and_results_are_on_the_file_and_events_are_off(
        self, api: Api
    ) -> None:
        backend = api.backend(queue=None, results=None, events=None)
        assert backend.events is None
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        names = get_names(api.path)
        assert {"omniq_task", "omniq_result"} <= names
        assert "omniq_event" not in names

    async def test_a_part_may_have_a_file_of_its_own(self, api: Api) -> None:
        backend = api.backend(
            results=api.folder / "results.db", events=str(api.folder / "events.db")
        )
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert [r.value for r in await call(backend.results.list_results)] == [7]
        assert await get_types(backend.events) == ["enqueued", "dequeued", "completed"]
        tables = {"omniq_task", "omniq_result", "omniq_event"}
        assert get_names(api.path) & tables == {"omniq_task"}
        assert get_names(api.folder / "results.db") & tables == {"omniq_result"}
        assert get_names(api.folder / "events.db") & tables == {"omniq_event"}

    async def test_the_queue_may_have_a_file_of_its_own(self, api: Api) -> None:
        backend = api.backend(queue=api.folder / "tasks.db")
        await call(backend.enqueue, Task("f"))
        assert "omniq_task" in get_names(api.folder / "tasks.db")
        await call(backend.complete, await claim(backend.queue), 7)
        assert "omniq_task" not in get_names(api.path)
        assert "omniq_result" in get_names(api.path)

    async def test_a_part_may_be_a_ready_object(self, api: Api) -> None:
        results = api.results(api.folder / "results.db", ttl=None)
        events = api.events(api.folder / "events.db")
        queue = api.queue(api.folder / "tasks.db", events=events)
        backend = api.backend(queue=queue, results=results, events=events)
        assert backend.queue is queue
        assert backend.results is results
        assert backend.events is events
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert (await call(results.get, task_id)).value == 7
        assert await call(backend.status, task_id) == "completed"

    async def test_a_part_may_be_off(self, api: Api) -> None:
        backend = api.backend(results=False)
        assert backend.results is None
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert await call(backend.status, task_id) is None

    async def test_it_hands_its_options_to_its_parts(
        self, api: Api, clock: Clock
    ) -> None:
        backend = api.backend(
            events=True, retention=60.0, result_ttl=10.0, event_retention=20.0
        )
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert await get_status(backend.queue, task_id) == "completed"
        clock.advance(11)
        assert await call(backend.results.get, task_id) is None
        assert await call(backend.events.count) == 3
        clock.advance(10)
        await call(backend.cleanup)
        assert await call(backend.events.count) == 0

    @pytest.mark.parametrize("part", ["queue", "results", "events"])
    async def test_a_part_that_is_nothing_of_the_kind_is_refused(
        self, api: Api, part: str
    ) -> None:
        with pytest.raises((ValueError, TypeError), match=part):
            api.backend(**{part: 7})

    async def test_what_one_file_holds_is_changed_in_one_commit(self, api: Api) -> None:
        backend = api.backend(events=True)
        await call(backend.enqueue, Task("f"))
        task = await claim(backend.queue)
        refuse_inserts(api.path, "omniq_result")
        with pytest.raises((sqlite3.Error, OmniQError)):
            await call(backend.complete, task, 7, enqueue=[Task("next")])
        assert [t.id for t in await call(backend.queue.list_tasks)] == [task.id]
        assert await get_status(backend.queue, task.id) == "running"
        assert await get_types(backend.events) == ["enqueued", "dequeued"]


class TestBackendUrls:
    def make(self, api: Api, url: str) -> Any:
        return api.keep(api.get_class("Backend").from_url(url))

    async def test_three_slashes_are_relative(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(api.folder)
        backend = self.make(api, "sqlite:///relative.db?events=true")
        await call(backend.enqueue, Task("f"))
        assert await get_types(backend.events) == ["enqueued"]
        assert (api.folder / "relative.db").exists()

    async def test_four_slashes_are_absolute(self, api: Api) -> None:
        backend = self.make(api, f"sqlite:///{api.path}")
        await call(backend.enqueue, Task("f"))
        assert api.path.exists()
        assert backend.events is None

    async def test_a_path_may_be_percent_encoded(self, api: Api) -> None:
        backend = self.make(api, f"sqlite:///{api.folder}/my%20jobs%3F.db")
        await call(backend.enqueue, Task("f"))
        assert (api.folder / "my jobs?.db").exists()

    async def test_a_database_in_memory_has_a_url(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(api.folder)
        backend = self.make(api, "sqlite:///:memory:")
        await call(backend.enqueue, Task("f"))
        assert list(api.folder.iterdir()) == []

    async def test_options_are_in_the_query(self, api: Api) -> None:
        backend = self.make(
            api,
            f"sqlite:///{api.path}?results={api.folder}/results.db&events=false"
            "&retention=60&result_ttl=5&synchronous=NORMAL&busy_timeout=2.5",
        )
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert await call(backend.queue.count_tasks, status="completed") == 1
        assert (api.folder / "results.db").exists()
        assert backend.events is None

    @pytest.mark.parametrize(
        ("query", "named"),
        [
            ("colour=red", "colour"),
            ("retention=long", "retention"),
            ("synchronous=SOMETIMES", "synchronous"),
            ("clock=now", "clock"),
        ],
    )
    async def test_an_unknown_option_or_value_is_refused(
        self, api: Api, query: str, named: str
    ) -> None:
        with pytest.raises(ValueError, match=named):
            self.make(api, f"sqlite:///{api.path}?{query}")

    @pytest.mark.parametrize("url", ["sqlite://host/jobs.db", "sqlite:///", "jobs.db"])
    async def test_a_url_that_names_no_file_is_refused(
        self, api: Api, url: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(url)):
            self.make(api, url)

    async def test_another_scheme_is_looked_up_among_the_entry_points(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = api.folder / "fake_engine-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: fake-engine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[omniq.backends]\nfakesql = fake_engine:make\n"
        )
        (api.folder / "fake_engine.py").write_text(
            "def make(url, *, asynchronous):\n    return (url, asynchronous)\n"
        )
        monkeypatch.syspath_prepend(str(api.folder))
        made = api.get_class("Backend").from_url("fakesql://host/db?x=1")
        assert made == ("fakesql://host/db?x=1", api.is_async)
        sys.modules.pop("fake_engine")
        with pytest.raises(ValueError, match="nothing") as caught:
            api.get_class("Backend").from_url("nothing://host/db")
        assert "fakesql" in str(caught.value)
        assert "sqlite" in str(caught.value)

    async def test_the_environment_names_the_files(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMNIQ_TASK_QUEUE_URL", f"sqlite:///{api.path}")
        monkeypatch.delenv("OMNIQ_RESULT_STORAGE_URL", raising=False)
        monkeypatch.delenv("OMNIQ_EVENT_STORAGE_URL", raising=False)
        backend = api.keep(api.get_class("Backend").from_env())
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert backend.events is None
        assert {"omniq_task", "omniq_result"} <= get_names(api.path)

    async def test_the_environment_may_name_three_files(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = f"sqlite:///{api.folder}"
        monkeypatch.setenv("OMNIQ_TASK_QUEUE_URL", f"{base}/tasks.db?retention=60")
        monkeypatch.setenv("OMNIQ_RESULT_STORAGE_URL", f"{base}/results.db")
        monkeypatch.setenv("OMNIQ_EVENT_STORAGE_URL", f"{base}/events.db")
        backend = api.keep(api.get_class("Backend").from_env())
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert await call(backend.queue.count_tasks, status="completed") == 1
        assert "omniq_result" in get_names(api.folder / "results.db")
        assert await get_types(backend.events) == ["enqueued", "dequeued", "completed"]
        assert "omniq_event" in get_names(api.folder / "events.db")

    async def test_the_environment_may_name_another_engine(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMNIQ_TASK_QUEUE_URL", "nothing://host/db")
        with pytest.raises(ValueError, match="nothing"):
            api.get_class("Backend").from_env()

    async def test_the_environment_must_name_the_queue(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OMNIQ_TASK_QUEUE_URL", raising=False)
        with pytest.raises((ValueError, LookupError), match="OMNIQ_TASK_QUEUE_URL"):
            api.get_class("Backend").from_env()


@pytest.fixture(params=["same file", "own file"])
def split(request: pytest.FixtureRequest, api: Api) -> Any:
    """Return a backend whose results share the queue's file, or do not."""
    own = request.param == "own file"
    return api.backend(results=api.folder / "results.db" if own else True, events=True)


class TestBackendComplete:
    async def test_a_follower_that_cannot_be_serialized_leaves_no_result(
        self, split: Any
    ) -> None:
        await call(split.enqueue, Task("f"))
        task = await claim(split.queue)
        with pytest.raises(SerializationError):
            await call(split.complete, task, 1, enqueue=[Task("g", (object(),))])
        assert await call(split.results.get, task.id) is None
        assert await get_status(split.queue, task.id) == "running"

    async def test_the_result_tells_everything(self, split: Any, clock: Clock) -> None:
        task_id = await call(split.enqueue, Task("f", metadata={"who": "me"}))
        clock.advance(1)
        task = await claim(split.queue, worker="w1")
        clock.advance(2)
        await call(split.complete, task, {"answer": (42,)})
        result = await call(split.results.get, task_id)
        assert (result.task_id, result.status) == (task_id, "success")
        assert result.value == {"answer": (42,)}
        assert (result.error, result.error_type, result.traceback) == (None, None, None)
        assert (result.started_at, result.finished_at) == (at(1), at(3))
        assert (result.worker, result.attempt) == ("w1", 1)
        assert await call(split.queue.get_task, task_id) is None
        assert await get_types(split.events) == ["enqueued", "dequeued", "completed"]

    async def test_follow_up_tasks_are_enqueued(self, split: Any) -> None:
        await call(split.enqueue, Task("f"))
        task = await claim(split.queue)
        successors = (Task(name) for name in "gh")
        await call(split.complete, task, enqueue=successors)
        assert await claim_names(split.queue) == ["g", "h"]

    async def test_a_successor_may_carry_the_same_unique_key(self, split: Any) -> None:
        first = await call(split.enqueue, Task("f", unique_key="k"))
        task = await claim(split.queue)
        await call(split.complete, task, 7, enqueue=[Task("g", unique_key="k")])
        (successor,) = await call(split.queue.list_tasks)
        assert (successor.func, successor.unique_key) == ("g", "k")
        assert (await call(split.result, first, timeout=0)).value == 7

    async def test_a_kept_task_lets_a_successor_carry_its_key_too(
        self, api: Api
    ) -> None:
        backend = api.backend(retention=60.0)
        await call(backend.enqueue, Task("f", unique_key="k"))
        task = await claim(backend.queue)
        await call(backend.complete, task, enqueue=[Task("g", unique_key="k")])
        assert await claim_names(backend.queue) == ["g"]

    async def test_a_successor_that_cannot_be_added_undoes_all(
        self, backend: Any
    ) -> None:
        await call(backend.enqueue, Task("f"))
        await call(backend.enqueue, Task("x", id="a1", queue="other"))
        task = await claim(backend.queue)
        with pytest.raises(DuplicateTaskError):
            await call(backend.complete, task, 7, enqueue=[Task("g", id="a1")])
        assert await get_status(backend.queue, task.id) == "running"
        assert await call(backend.results.list_results) == []
        await call(backend.complete, task, 7)

    async def test_a_stale_lease_stores_no_result_and_adds_no_task(
        self, split: Any, clock: Clock
    ) -> None:
        await call(split.enqueue, Task("f"))
        old = await claim(split.queue, lease=5.0)
        clock.advance(6)
        await claim(split.queue)
        with pytest.raises(LeaseLostError) as caught:
            await call(split.complete, old, "old", enqueue=[Task("g")])
        assert caught.value.task_ids == [old.id]
        assert await call(split.results.get, old.id) is None
        assert await call(split.queue.count_tasks) == 1

    async def test_a_value_that_cannot_be_serialized_changes_nothing_but_its_task(
        self, split: Any
    ) -> None:
        task_id = await call(split.enqueue, Task("f"))
        task = await claim(split.queue)
        with pytest.raises(SerializationError) as caught:
            await call(split.complete, task, {"a": object()}, enqueue=[Task("g")])
        assert caught.value.where == "value['a']"
        assert await call(split.queue.count_tasks) == 1
        assert await get_status(split.queue, task_id) in {"running", "failed"}

    async def test_in_two_files_the_result_is_stored_before_the_status(
        self, api: Api
    ) -> None:
        backend = api.backend(results=api.folder / "results.db")
        task_id = await call(backend.enqueue, Task("f"))
        task = await claim(backend.queue)
        refuse_ends(api.path)
        with pytest.raises((sqlite3.Error, OmniQError)):
            await call(backend.complete, task, 7)
        assert await get_status(backend.queue, task_id) == "running"
        assert (await call(backend.results.get, task_id)).value == 7

    async def test_in_two_files_a_result_that_cannot_be_stored_leaves_it_running(
        self, api: Api
    ) -> None:
        backend = api.backend(results=api.folder / "results.db")
        task_id = await call(backend.enqueue, Task("f"))
        task = await claim(backend.queue)
        await call(backend.results.list_results)
        refuse_inserts(api.folder / "results.db", "omniq_result")
        with pytest.raises((sqlite3.Error, OmniQError)):
            await call(backend.complete, task, 7)
        assert await get_status(backend.queue, task_id) == "running"

    async def test_many_in_one_call(self, split: Any) -> None:
        await call(split.enqueue_many, [Task("f", (n,)) for n in range(4)])
        tasks = await call(split.queue.dequeue_many, 4)
        await call(split.queue.cancel, tasks[2].id)
        with pytest.raises(LeaseLostError) as caught:
            await call(split.complete_many, ((t, t.args[0]) for t in tasks))
        assert caught.value.task_ids == [tasks[2].id]
        stored = await call(split.results.get_many, [t.id for t in tasks])
        assert {r.value for r in stored.values()} == {0, 1, 3}
        assert {r.status for r in stored.values()} == {"success"}
        assert await call(split.queue.count_tasks, status="running") == 0
        completed = await call(split.events.query, type="completed")
        assert [e.task_id for e in completed] == [tasks[n].id for n in (0, 1, 3)]

    async def test_many_of_which_none_is_ours(self, split: Any) -> None:
        await call(split.enqueue_many, [Task("f") for _ in range(2)])
        tasks = await call(split.queue.dequeue_many, 2)
        for task in tasks:
            await call(split.queue.cancel, task.id)
        with pytest.raises(LeaseLostError) as caught:
            await call(split.complete_many, [(task, 1) for task in tasks])
        assert caught.value.task_ids == [task.id for task in tasks]
        assert await call(split.results.list_results) == []

    async def test_many_of_which_one_cannot_be_serialized(self, split: Any) -> None:
        await call(split.enqueue_many, [Task("f") for _ in range(2)])
        first, second = await call(split.queue.dequeue_many, 2)
        with pytest.raises(SerializationError):
            await call(split.complete_many, [(first, 1), (second, object())])
        assert await call(split.queue.count_tasks, status="running") == 2
        assert await call(split.results.list_results) == []

    async def test_none_in_one_call(self, backend: Any) -> None:
        await call(backend.complete_many, [])
        with pytest.raises(TypeError, match="values must be a Task"):
            await call(backend.complete_many, [("a1", 1)])
        with pytest.raises(ValueError, match="values must be pairs"):
            await call(backend.complete_many, [Task("f")])

    async def test_many_at_once_each_get_their_own_answer(self, backend: Any) -> None:
        await call(backend.enqueue_many, [Task("f", (n,)) for n in range(40)])
        tasks = await call(backend.queue.dequeue_many, 40)
        for task in tasks[::4]:
            await call(backend.queue.cancel, task.id)
        outcomes = await asyncio.gather(
            *(aside(backend.complete, task, task.args[0]) for task in tasks),
            return_exceptions=True,
        )
        assert [isinstance(o, LeaseLostError) for o in outcomes] == [
            True,
            False,
            False,
            False,
        ] * 10
        values = [r.value for r in await call(backend.results.list_results)]
        assert sorted(values) == [n for n in range(40) if n % 4]


def divide() -> None:
    raise ZeroDivisionError("by nought")


def make_error() -> BaseException:
    """Return an exception that was raised, with its traceback."""
    with pytest.raises(ZeroDivisionError) as caught:
        divide()
    return caught.value


class TestBackendFail:
    async def test_a_retry_stores_no_result(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=2))
        task = await claim(split.queue)
        assert await call(split.fail, task, make_error(), delay=5.0) == "scheduled"
        assert await call(split.results.get, task_id) is None
        found = await get(split.queue, task_id)
        assert found.run_at == at(5)
        assert "by nought" in (found.error or "")

    async def test_the_last_failure_stores_one(self, split: Any, clock: Clock) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=1))
        task = await claim(split.queue, worker="w1")
        clock.advance(2)
        assert await call(split.fail, task, make_error()) == "failed"
        result = await call(split.results.get, task_id)
        assert (result.status, result.value) == ("error", None)
        assert result.error_type == "ZeroDivisionError"
        assert "by nought" in result.error
        assert "divide" in result.traceback
        assert (result.started_at, result.finished_at) == (at(0), at(2))
        assert (result.worker, result.attempt) == ("w1", 1)
        assert await get_types(split.events) == ["enqueued", "dequeued", "failed"]

    async def test_without_retry_it_is_final(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=9))
        task = await claim(split.queue)
        assert await call(split.fail, task, make_error(), retry=False) == "failed"
        assert (await call(split.results.get, task_id)).status == "error"

    async def test_a_stale_lease_stores_no_result(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        task = await claim(split.queue)
        await call(split.queue.cancel, task_id)
        with pytest.raises(LeaseLostError):
            await call(split.fail, task, make_error(), retry=False)
        assert await call(split.results.get, task_id) is None

    async def test_an_exception_that_cannot_be_told_is_told_somehow(
        self, split: Any
    ) -> None:
        class OddError(Exception):
            def __str__(self) -> str:
                raise ValueError("not even that")

        for error in (OddError(), ValueError("\ud800 \0"), KeyError("x" * 10**6)):
            task_id = await call(split.enqueue, Task("f"))
            task = await claim(split.queue)
            assert await call(split.fail, task, error, retry=False) == "failed"
            result = await call(split.results.get, task_id)
            assert result.error_type == type(error).__name__


class TestBackendStatus:
    async def test_it_is_the_queues_while_the_row_is_there(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"), delay=5.0)
        assert await call(split.status, task_id) is TaskStatus.SCHEDULED
        task_id = await call(split.enqueue, Task("f"))
        assert await call(split.status, task_id) is TaskStatus.PENDING
        await claim(split.queue)
        assert await call(split.status, task_id) is TaskStatus.RUNNING
        await call(split.queue.cancel, task_id)
        assert await call(split.status, task_id) is TaskStatus.CANCELLED

    @pytest.mark.parametrize(
        ("result", "status"),
        [
            (ResultStatus.SUCCESS, TaskStatus.COMPLETED),
            (ResultStatus.ERROR, TaskStatus.FAILED),
            (ResultStatus.CANCELLED, TaskStatus.CANCELLED),
        ],
    )
    async def test_it_is_the_results_afterwards(
        self, split: Any, result: ResultStatus, status: TaskStatus
    ) -> None:
        await call(split.results.store, TaskResult("a1", result))
        assert await call(split.status, "a1") is status

    async def test_a_completed_task_is_completed(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await call(split.complete, await claim(split.queue))
        assert await call(split.status, task_id) is TaskStatus.COMPLETED

    async def test_an_unknown_id_is_none(self, split: Any) -> None:
        assert await call(split.status, "unknown") is None


class TestBackendResult:
    async def test_it_waits_for_the_result(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        waiting = started(aside(split.result, task_id, timeout=DEADLINE))
        await in_wait(split.queue)
        task = await claim(split.queue)
        await settled_in()
        assert not waiting.done()
        await call(split.complete, task, 7)
        assert (await waiting).value == 7

    async def test_a_timeout_that_runs_out_is_an_error(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        with pytest.raises(TimeoutError, match=task_id):
            await aside(split.result, task_id, timeout=0.03)
        with pytest.raises(TimeoutError):
            await call(split.result, task_id, timeout=0)

    async def test_an_unknown_id_is_an_error(self, split: Any) -> None:
        with pytest.raises(TaskNotFoundError) as caught:
            await call(split.result, "unknown", timeout=0)
        assert caught.value.task_id == "unknown"

    async def test_a_final_failure_ends_it(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await call(split.fail, await claim(split.queue), make_error(), retry=False)
        result = await call(split.result, task_id, timeout=0)
        assert (result.status, result.error_type) == ("error", "ZeroDivisionError")

    async def test_it_ends_when_the_task_is_cancelled(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        waiting = started(aside(split.result, task_id))
        await in_wait(split.queue)
        await call(split.queue.cancel, task_id)
        result = await waiting
        assert (result.task_id, result.status) == (task_id, "cancelled")

    async def test_it_ends_when_a_running_task_is_cancelled(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await claim(split.queue, worker="w1")
        await call(split.queue.cancel, task_id)
        result = await call(split.result, task_id, timeout=0)
        assert result.status == "cancelled"

    async def test_it_ends_when_the_task_expires(
        self, split: Any, clock: Clock
    ) -> None:
        task_id = await call(split.enqueue, Task("f", expires_at=at(5)))
        clock.advance(6)
        await call(split.queue.dequeue)
        result = await call(split.result, task_id, timeout=0)
        assert result.status in {"error", "cancelled"}
        assert "expire" in (result.error or "")

    async def test_it_ends_when_the_task_is_out_of_attempts(
        self, split: Any, clock: Clock
    ) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=1))
        await claim(split.queue, lease=5.0)
        clock.advance(6)
        await call(split.queue.dequeue)
        result = await call(split.result, task_id, timeout=0)
        assert (result.status, result.attempt) == ("error", 1)
        assert "attempts" in (result.error or "")

    @pytest.mark.parametrize("how", ["expired", "out of attempts"])
    async def test_it_ends_by_time_alone_where_nobody_claims(
        self, split: Any, clock: Clock, how: str
    ) -> None:
        task = Task("f", expires_at=at(5) if how == "expired" else None, max_attempts=1)
        task_id = await call(split.enqueue, task)
        if how == "out of attempts":
            await claim(split.queue, lease=5.0)
        waiting = started(aside(split.result, task_id, timeout=DEADLINE))
        await in_wait(split.queue)
        clock.advance(6)
        await call(split.cleanup)
        assert (await waiting).status in {"error", "cancelled"}

    async def test_it_ends_when_the_queue_fails_the_task(self, split: Any) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await call(split.queue.fail, await claim(split.queue), "rotten", retry=False)
        result = await call(split.result, task_id, timeout=0)
        assert (result.status, result.error) == ("error", "rotten")

    async def test_a_result_of_a_round_before_a_retry_does_not_count(
        self, split: Any
    ) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await call(split.fail, await claim(split.queue), make_error(), retry=False)
        assert await call(split.queue.retry, task_id)
        with pytest.raises(TimeoutError):
            await call(split.result, task_id, timeout=0)
        assert await call(split.status, task_id) == "pending"
        task = await claim(split.queue)
        with pytest.raises(TimeoutError):
            await call(split.result, task_id, timeout=0)
        await call(split.complete, task, 7)
        assert (await call(split.result, task_id, timeout=0)).value == 7

    async def test_a_result_of_a_round_before_a_cancelled_retry_does_not_count(
        self, split: Any
    ) -> None:
        task_id = await call(split.enqueue, Task("f"))
        await call(split.fail, await claim(split.queue), make_error(), retry=False)
        await call(split.queue.retry, task_id)
        await call(split.queue.cancel, task_id)
        result = await call(split.result, task_id, timeout=0)
        assert result.status == "cancelled"

    @pytest.mark.parametrize("how", ["lease ended", "failed by the queue"])
    async def test_a_round_that_stored_no_result_is_not_told_by_the_one_before(
        self, split: Any, clock: Clock, how: str
    ) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=1))
        await call(split.fail, await claim(split.queue), make_error())
        await call(split.queue.retry, task_id)
        task = await claim(split.queue, lease=5.0)
        if how == "lease ended":
            clock.advance(6)
            assert await call(split.queue.dequeue) is None
        else:
            await call(split.queue.fail, task, "no attempts left")
        result = await call(split.result, task_id, timeout=0)
        assert result.status == "error"
        assert "by nought" not in result.error
        assert "attempts" in result.error

    async def test_the_result_of_a_retried_round_replaces_the_older_one(
        self, split: Any
    ) -> None:
        task_id = await call(split.enqueue, Task("f", max_attempts=2))
        await call(split.fail, await claim(split.queue), make_error(), delay=0.0)
        await call(split.fail, await claim(split.queue), make_error())
        await call(split.queue.retry, task_id)
        task = await claim(split.queue)
        assert task.attempt == 1
        await call(split.complete, task, 7)
        assert (await call(split.results.get, task_id)).value == 7

    async def test_a_result_without_a_row_is_found(self, split: Any) -> None:
        await call(split.results.store, success("a1", 7))
        assert (await call(split.result, "a1", timeout=0)).value == 7

    async def test_without_a_result_storage_it_is_made_from_the_row(
        self, api: Api
    ) -> None:
        backend = api.backend(results=False, retention=60.0)
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        result = await call(backend.result, task_id, timeout=0)
        assert (result.task_id, result.status) == (task_id, "success")

    @pytest.mark.parametrize("seconds", [-1.0, float("nan")])
    async def test_a_timeout_out_of_range_is_refused(
        self, backend: Any, seconds: Any
    ) -> None:
        with pytest.raises(ValueError, match="timeout"):
            await call(backend.result, "a1", timeout=seconds)


async def gather_results(stream: Any, *found: list[TaskResult]) -> list[TaskResult]:
    """Read a `wait_all()` of either twin to its end, with a deadline.

    What has come so far is also in `found`.
    """
    [results] = found or ([],)
    if hasattr(stream, "__anext__"):

        async def read() -> None:
            async for result in stream:
                results.append(result)

        await asyncio.wait_for(read(), DEADLINE)
    else:
        await aside(lambda: results.extend(stream))
    return results


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestWaitAll:
    async def test_results_come_in_the_order_in_which_tasks_end(
        self, split: Any
    ) -> None:
        ids = await call(split.enqueue_many, [Task("f") for _ in range(4)])
        results: list[TaskResult] = []
        waiting = started(gather_results(split.wait_all(ids), results))
        await in_wait(split.queue)
        tasks = await call(split.queue.dequeue_many, 4)
        for number, task in enumerate(reversed(tasks), start=1):
            await call(split.complete, task, task.id)
            await soon(lambda: len(results) == number)  # noqa: B023
        await waiting
        assert [result.task_id for result in results] == ids[::-1]
        assert [result.value for result in results] == ids[::-1]

    async def test_it_ends_also_for_what_has_no_result_of_its_own(
        self, split: Any, clock: Clock
    ) -> None:
        tasks = [Task("f"), Task("f", expires_at=at(5)), Task("f"), Task("f")]
        ids = await call(split.enqueue_many, tasks)
        cancelled, expired, failed, kept = ids
        await call(split.queue.cancel, cancelled)
        clock.advance(10)
        for task in await call(split.queue.dequeue_many, 2):
            if task.id == failed:
                await call(split.fail, task, make_error(), retry=False)
            else:
                await call(split.complete, task)
        found = await gather_results(split.wait_all([*ids, kept]))
        assert {result.task_id: result.status for result in found} == {
            cancelled: "cancelled",
            expired: "error",
            failed: "error",
            kept: "success",
        }

    async def test_what_ends_by_time_alone_is_seen(
        self, backend: Any, clock: Clock
    ) -> None:
        task_id = await call(backend.enqueue, Task("f", expires_at=at(5)))
        waiting = started(gather_results(backend.wait_all([task_id])))
        await in_wait(backend.queue)
        clock.advance(6)
        [result] = await waiting
        assert result.error_type == "TaskExpired"

    async def test_after_an_unknown_id_what_has_ended_comes_also_at_the_end(
        self, backend: Any
    ) -> None:
        ids = await call(backend.enqueue_many, [Task("f") for _ in range(2)])
        for task in await call(backend.queue.dequeue_many, 2):
            await call(backend.complete, task)
        stream = backend.wait_all(["unknown", "none", *ids], timeout=0)
        for _ in range(2):
            with pytest.raises(TaskNotFoundError):
                await gather_results(stream)
        assert [r.task_id for r in await gather_results(stream)] == ids

    async def test_the_timeout_holds_also_while_one_after_the_other_ends(
        self, backend: Any
    ) -> None:
        ids = await call(backend.enqueue_many, [Task("f") for _ in range(3)])
        tasks = await call(backend.queue.dequeue_many, 3)
        stream = backend.wait_all(ids, timeout=0.05)

        async def get_next() -> TaskResult:
            step = (
                anext(stream) if hasattr(stream, "__anext__") else aside(next, stream)
            )
            return cast(TaskResult, await step)

        await asyncio.sleep(0.06)
        await call(backend.complete, tasks[0])
        assert (await get_next()).task_id == ids[0]  # what had ended by then
        await call(backend.complete, tasks[1])
        with pytest.raises(TimeoutError):
            await get_next()
        assert (await get_next()).task_id == ids[1]

    @pytest.mark.parametrize(
        ("age", "took", "waiting", "left", "pause"),
        [
            (60.0, 0.0, 1, math.inf, 0.0),
            (0.0, 0.05, 1, math.inf, 0.2),  # a fifth of the time
            (60.0, 0.0, 201, math.inf, 0.2),
            (0.5, 0.0, 201, math.inf, 0.05),
            (0.0, 9.0, 1, math.inf, 1.0),
            (0.0, 0.05, 1, 0.1, 0.1),
        ],
    )
    async def test_the_more_wait_the_less_often_each_of_them_looks(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        age: float,
        took: float,
        waiting: int,
        left: float,
        pause: float,
    ) -> None:
        now, slept = 100.0, [0.0]

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        database = types.SimpleNamespace(paces=set())
        gateway: Any = types.SimpleNamespace(database=database, sleep=sleep)
        monkeypatch.setattr(time, "monotonic", lambda: now)
        deadline = now + age + took + left
        paces = [omniq_sqlite._Pace(gateway, deadline) for _ in range(waiting)]
        pace = paces[0]
        await pace.rest()
        assert slept == [0.0]  # before the first look
        now += age
        await pace.rest()
        pace._took = took  # the last one was as slow
        now += took
        pace.looked()
        await pace.rest()
        assert slept[-1] == pytest.approx(pause)
        assert pause > 0 or slept == [0.0]

    async def test_an_unknown_id_is_an_error_and_the_others_still_come(
        self, backend: Any
    ) -> None:
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        stream = backend.wait_all(["unknown", task_id])
        with pytest.raises(TaskNotFoundError, match="unknown"):
            await gather_results(stream)
        [result] = await gather_results(stream)
        assert result.value == 7

    async def test_the_timeout_is_for_all_and_it_can_go_on_afterwards(
        self, backend: Any
    ) -> None:
        task_id = await call(backend.enqueue, Task("f"))
        stream = backend.wait_all([task_id], timeout=0.03)
        with pytest.raises(TimeoutError, match=task_id):
            await gather_results(stream)
        await call(backend.complete, await claim(backend.queue), 7)
        assert [r.value for r in await gather_results(stream)] == [7]

    async def test_no_ids_are_no_results(self, backend: Any) -> None:
        assert await gather_results(backend.wait_all([])) == []

    @pytest.mark.parametrize(
        ("ids", "terms"), [("abc", {}), ([], {"timeout": -1}), ([], {"timeout": "1"})]
    )
    async def test_a_wrong_argument_is_refused_at_once(
        self, backend: Any, ids: Any, terms: Any
    ) -> None:
        with pytest.raises(ValueError, match=r"ids|timeout"):
            backend.wait_all(ids, **terms)

    async def test_a_cancelled_wait_loses_no_result(self, tmp_path: Path) -> None:
        async with AsyncSQLiteBackend(tmp_path / "jobs.db") as backend:
            ids = await backend.enqueue_many([Task("f") for _ in range(20)])
            stream = backend.wait_all(ids)
            found: list[str] = []

            async def read() -> None:
                async for result in stream:
                    found.append(result.task_id)

            for task in await backend.queue.dequeue_many(20):
                reading = started(read())
                await backend.complete(task)
                await asyncio.sleep(random.random() / 500)
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
            await asyncio.wait_for(read(), DEADLINE)
            assert len(found) == len(set(found))
            # One that was on its way to a reader who left may be lost with it.
            assert set(found) <= set(ids)

    async def test_a_terminal_sees_one_line_that_changes(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.finish(backend, monkeypatch, terminal := FakeTerminal())
        last = terminal.getvalue().split("\r")[-1]
        assert last.startswith("2 of 2 ended, 1 without success, ")
        assert last.endswith("\n")

    async def test_the_line_ends_where_an_id_is_unknown(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue))
        monkeypatch.setattr(sys, "stderr", terminal := FakeTerminal())
        stream = backend.wait_all(["unknown", task_id])
        with pytest.raises(TaskNotFoundError):
            await gather_results(stream)
        assert len(await gather_results(stream)) == 1
        last = terminal.getvalue().split("\r")[-1]
        assert last.startswith("1 of 1 ended, 0 without success, ")
        assert last.endswith("\n")

    async def test_elsewhere_nothing_is_printed(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.finish(backend, monkeypatch, pipe := io.StringIO())
        assert pipe.getvalue() == ""

    async def test_a_notebook_sees_a_display_that_is_updated(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[tuple[str, bool]] = []

        def display(data: dict[str, str], *, raw: bool, **terms: object) -> Any:
            shown.append((data["text/plain"], raw))
            return types.SimpleNamespace(update=display)

        ipython: Any = types.ModuleType("IPython")
        ipython.display = types.SimpleNamespace(display=display)
        ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        await self.finish(backend, monkeypatch, terminal := FakeTerminal())
        assert terminal.getvalue() == ""
        assert shown[-1][0].startswith("2 of 2 ended, 1 without success")
        assert {raw for _, raw in shown} == {True}

    async def test_ipython_without_a_kernel_is_a_terminal(
        self, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ipython: Any = types.ModuleType("IPython")
        ipython.get_ipython = lambda: None
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        await self.finish(backend, monkeypatch, terminal := FakeTerminal())
        assert "2 of 2" in terminal.getvalue()

    def test_it_never_imports_ipython(self) -> None:
        printed = run_program(
            """
            import sys
            from omniq_sqlite import SQLiteBackend, Task
            with SQLiteBackend(":memory:") as backend:
                ids = backend.enqueue_many([Task("f")])
                backend.complete(backend.queue.dequeue(), 1)
                assert [r.value for r in backend.wait_all(ids)] == [1]
            print("IPython" in sys.modules)
        """,
            ":memory:",
        )
        assert printed == "False"

    @staticmethod
    async def finish(
        backend: Any, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO
    ) -> None:
        ids = await call(backend.enqueue_many, [Task("f"), Task("f")])
        await call(backend.complete, await claim(backend.queue))
        await call(backend.queue.cancel, ids[1])
        monkeypatch.setattr(sys, "stderr", stderr)
        assert len(await gather_results(backend.wait_all(ids))) == 2

    async def test_a_twin_over_an_async_backend_has_it_too(
        self, tmp_path: Path
    ) -> None:
        async with AsyncSQLiteBackend(tmp_path / "jobs.db") as backend:
            twin = SQLiteBackend.from_async(backend)
            ids = await backend.enqueue_many([Task("f"), Task("f")])
            for task in await backend.queue.dequeue_many(2):
                await backend.complete(task, 1)
            found = await asyncio.to_thread(lambda: list(twin.wait_all(ids)))
            assert [result.task_id for result in found] == ids


EVIL = '<img src=x onerror=alert(1)>&"'


class TestHowValuesShow:
    def test_a_repr_is_short_and_leaves_the_payload_out(self) -> None:
        task = Task("f", ("secret",), {"key": "secret"}, queue="mail", id="a1")
        assert repr(task) == "Task(func='f', id='a1', queue='mail')"
        result = TaskResult("a1", ResultStatus.ERROR, error="no", error_type="OSError")
        assert repr(result) == (
            "TaskResult(task_id='a1', status='error', error_type='OSError', error='no')"
        )
        event = TaskEvent("failed", "a1", "mail", at=at(0), worker="w1")
        assert repr(event) == (
            "TaskEvent(at='2027-01-15 08:00:00+00:00', type='failed', task_id='a1',"
            " queue='mail', worker='w1')"
        )
        assert repr(QueueStats("mail", pending=3)) == (
            "QueueStats(queue='mail', pending=3)"
        )

    def test_a_repr_never_fails_and_stays_short(self) -> None:
        class Odd:
            def __repr__(self) -> str:
                raise ValueError

        assert "without a repr" in repr(TaskResult("a1", ResultStatus.SUCCESS, Odd()))
        assert len(repr(TaskResult("a1", ResultStatus.SUCCESS, "x" * 10**6))) < 250

    @pytest.mark.parametrize(
        "value",
        [
            Task(EVIL, (EVIL,), {EVIL: EVIL}, queue=EVIL, metadata={EVIL: 1}),
            TaskResult("a1", ResultStatus.ERROR, error=EVIL, traceback=EVIL),
            TaskEvent(EVIL, EVIL, EVIL, EVIL, {EVIL: EVIL}),
            QueueStats(EVIL),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_notebook_sees_a_table_with_everything_escaped(self, value: Any) -> None:
        html = value._repr_html_()
        assert html.startswith("<table>")
        assert "&lt;img" in html
        assert "<img" not in html

    async def test_a_queue_shows_its_stats(self, api: Api) -> None:
        queue = api.queue()
        await call(queue.enqueue, Task("f", queue=EVIL))
        html = queue._repr_html_()
        assert "<th" in html
        assert ">pending</th>" in html
        assert ">1</td>" in html
        assert "<img" not in html
        assert repr(queue) == f"{type(queue).__name__}({str(api.path)!r})"

    async def test_a_queue_that_cannot_be_read_says_so(self, api: Api) -> None:
        queue = api.queue()
        await call(queue.close)
        assert "it was closed" in queue._repr_html_()


class TestReviewedBackends:
    """What a reading of the backend found, in the forms in which it was found."""

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("own_clock", [False, True])
    def test_a_clock_that_stands_at_the_due_time(self, own_clock: bool) -> None:
        """It was due by the row, not by its rounded copy: `result()` never ended."""
        now = [1_700_000_000.123_456_7]

        def clock() -> float:
            return now[0]

        with SQLiteQueue(":memory:", clock=clock) as queue:
            given: Any = queue if own_clock else None
            terms: Any = {} if own_clock else {"clock": clock}
            with SQLiteBackend(":memory:", queue=given, **terms) as backend:
                task_id = backend.enqueue(Task("f"), delay=10)
                now[0] += 10
                with pytest.raises(TimeoutError):
                    backend.result(task_id, timeout=0.05)

    def test_a_blocking_part_of_ones_own_may_be_built_on_ours(
        self, tmp_path: Path
    ) -> None:
        class Events:
            def __init__(self, inner: SQLiteEventStorage) -> None:
                self.inner = inner

            def log_many(self, events: Sequence[TaskEvent]) -> None:
                self.inner.log_many(events)

        with SQLiteEventStorage(tmp_path / "events.db") as log:
            events: Any = Events(log)
            with SQLiteQueue(tmp_path / "jobs.db", events=events) as queue:
                queue.enqueue(Task("f"))
                assert log.count() == 1
                task = queue.dequeue()
                assert task is not None
                queue.complete(task)
                assert log.count() == 3
        assert threading.get_ident() not in omniq_sqlite._operating
        assert omniq_sqlite._undo == {}

    @pytest.mark.parametrize(
        "statement",
        [
            "DROP TABLE omniq_worker",
            "INSERT INTO omniq_worker VALUES ('w', 'elsewhere', 1, 'no json', 0, 0)",
            "INSERT INTO omniq_worker VALUES ('w', '{host}', 1 << 40, '[]', 0, 0)",
        ],
    )
    def test_check_finds_where_it_raised(self, path: str, statement: str) -> None:
        with SQLiteBackend(path) as backend:
            backend.enqueue(Task("f"))
        with raw(path) as connection:
            connection.execute(statement.replace("{host}", socket.gethostname()))
        with SQLiteBackend(path) as backend:
            assert backend.check() != []

    def test_claims_of_an_id_that_was_enqueued_anew(self) -> None:
        """The number of claims begins anew with the row: the lost one's value won."""
        with SQLiteBackend(":memory:", events=True) as backend:

            def claimed() -> Task:
                task = backend.queue.dequeue()
                assert task is not None
                return task

            backend.enqueue(Task("f", id="nightly", max_attempts=9))
            backend.queue.release(claimed())
            old = claimed()
            backend.queue.cancel("nightly")
            backend.queue.purge()
            backend.enqueue(Task("f", id="nightly"))
            new = claimed()
            with pytest.raises(LeaseLostError):
                backend.complete_many([(old, "old"), (new, "new")])
            assert backend.result("nightly", timeout=0).value == "new"
            backend.enqueue(Task("f", id="twice"))
            task = claimed()
            backend.queue.complete_many([task, task])
            assert backend.events is not None
            log = backend.events.query(task_id="twice", type="completed")
            assert len(log) == 1

    def test_no_result_of_a_task_that_nobody_claimed(self, tmp_path: Path) -> None:
        results = tmp_path / "results.db"
        with SQLiteBackend(tmp_path / "jobs.db", results=results) as backend:
            task = Task("f")
            backend.enqueue(task)
            with pytest.raises(LeaseLostError):
                backend.complete_many([(task, "never ran")])
            assert backend.results is not None
            assert backend.results.get(task.id) is None

    def test_cleanup_settles_in_a_file_in_utf_16(self, path: str) -> None:
        with raw(path) as connection:
            connection.execute("PRAGMA encoding = 'UTF-16'")
            connection.execute("CREATE TABLE application (x)")
        with SQLiteBackend(path) as backend:
            past = datetime.now(UTC) - timedelta(days=1)
            task_id = backend.enqueue(Task("f", expires_at=past))
            assert backend.cleanup()["settled"] == 1
            assert backend.status(task_id) == "expired"

    async def test_a_closed_twin_of_a_live_object_is_closed_for_all_calls(
        self, path: str
    ) -> None:
        async with AsyncSQLiteBackend(path) as backend:
            queue = SQLiteQueue.from_async(backend.queue)
            twin = SQLiteBackend.from_async(backend)

            def use() -> None:
                queue.close()
                twin.close()
                with (
                    raw(path) as connection,
                    pytest.raises(StorageClosedError),
                ):
                    queue.enqueue_on(connection, Task("f"))
                with pytest.raises(StorageClosedError):
                    twin.to_async()

            await asyncio.to_thread(use)

    async def test_a_twin_of_a_backend_with_a_part_of_another_engine(
        self, path: str
    ) -> None:
        class Log:
            logged: ClassVar[list[TaskEvent]] = []

            async def log_many(self, events: Sequence[TaskEvent]) -> None:
                self.logged.extend(events)

        log: Any = Log()
        async with AsyncSQLiteBackend(path, events=log) as backend:
            twin = SQLiteBackend.from_async(backend)
            await asyncio.to_thread(twin.enqueue, Task("f"))
            assert [event.type for event in log.logged] == ["enqueued"]
            assert "Log" in repr(twin.events)

    async def test_a_cancelled_block_closes_a_blocking_object(self, path: str) -> None:
        queue = SQLiteQueue(path)
        with anyio.move_on_after(0.05):
            async with queue:
                await anyio.sleep(DEADLINE)
        with pytest.raises(StorageClosedError):
            queue.enqueue(Task("f"))

    def test_the_environments_urls_are_not_ignored(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make(url: str, *, asynchronous: bool) -> SQLiteBackend:
            return SQLiteBackend(":memory:", results=False)

        monkeypatch.setattr(omniq_sqlite, "_find_backend", make)
        monkeypatch.setenv("OMNIQ_TASK_QUEUE_URL", "mem://")
        monkeypatch.setenv("OMNIQ_RESULT_STORAGE_URL", "sqlite:///results.db")
        with pytest.raises(ValueError, match="OMNIQ_RESULT_STORAGE_URL"):
            SQLiteBackend.from_env()
        monkeypatch.setenv("OMNIQ_TASK_QUEUE_URL", "sqlite:///jobs.db")
        monkeypatch.setenv("OMNIQ_RESULT_STORAGE_URL", "mem://")
        with pytest.raises(ValueError, match="with results"):
            SQLiteBackend.from_env()

    def test_an_event_log_on_the_file_of_queue_and_results_shares_their_commit(
        self, tmp_path: Path
    ) -> None:
        here = str(tmp_path / "here.db")
        events = SQLiteEventStorage(here)
        with SQLiteBackend(
            tmp_path / "other.db", queue=here, results=here, events=events
        ) as backend:
            assert backend._async._queue._events_inside  # type: ignore[attr-defined]
            backend.enqueue(Task("f"))
            assert events.count() == 1
        events.close()

    def test_a_busy_file_is_not_taken_for_somebody_elses(self, path: str) -> None:
        SQLiteQueue(path).__enter__().close()
        with raw(path) as other, raw(path) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA busy_timeout = 0")

            def lock(statement: str) -> None:
                if "the versions in this file" in statement:
                    other.execute("BEGIN EXCLUSIVE")

            connection.set_trace_callback(lock)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                omniq_sqlite.schema_versions(connection, path)

    def test_relative_places_of_parts_stay_where_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker after a chdir, as of a daemon, stored results in another file."""
        tasks = TaskRegistry()
        plain = tasks.register(thumbnail)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "one")
        with SQLiteBackend("jobs.db", results="results.db") as backend:
            task_id = backend.enqueue(plain.task("a"))
            monkeypatch.chdir(tmp_path / "two")
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert backend.result(task_id, timeout=0).value == "a:128"
        assert list((tmp_path / "two").iterdir()) == []


class TestCleanup:
    async def test_what_ended_by_time_is_settled(
        self, backend: Any, clock: Clock
    ) -> None:
        await call(backend.enqueue, Task("f", id="a", max_attempts=1, queue="mail"))
        await claim(backend.queue, "mail", lease=5.0)
        await call(backend.enqueue, Task("f", id="b", expires_at=at(5)))
        await call(backend.enqueue, Task("f", id="c", queue="other", expires_at=at(50)))
        await call(backend.enqueue, Task("f", id="d"))
        clock.advance(6)
        done = await call(backend.cleanup)
        assert isinstance(done, dict)
        assert {
            task.id: str(task.status) for task in await call(backend.queue.list_tasks)
        } == {"a": "failed", "b": "expired", "c": "pending", "d": "pending"}
        assert "expired" in await get_types(backend.events, task_id="b")
        assert "failed" in await get_types(backend.events, task_id="a")

    async def test_expired_results_and_old_events_are_deleted(
        self, backend: Any, clock: Clock
    ) -> None:
        await call(backend.results.store, success("a"), ttl=5.0)
        await call(backend.results.store, success("b"))
        await call(backend.events.log, TaskEvent("old", at=at(-2_592_001)))
        await call(backend.events.log, TaskEvent("new", at=at(-2_591_000)))
        clock.advance(6)
        done = await call(backend.cleanup)
        assert sum(done.values()) >= 2
        assert [r.task_id for r in await call(backend.results.list_results)] == ["b"]
        assert await get_types(backend.events) == ["new"]

    async def test_where_there_is_nothing_to_do_it_does_nothing(
        self, api: Api, backend: Any
    ) -> None:
        await call(backend.enqueue, Task("f"))
        before = await call(backend.queue.list_tasks)
        done = await call(backend.cleanup)
        assert all(type(number) is int for number in done.values())
        assert sum(done.values()) == 0
        assert await call(backend.queue.list_tasks) == before

    async def test_free_pages_of_a_file_of_our_own_are_given_back_bit_by_bit(
        self, api: Api, backend: Any
    ) -> None:
        def count_free() -> int:
            with raw(api.path) as connection:
                (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            return int(free)

        await call(
            backend.enqueue_many, [Task("f", ("x" * 4_000,)) for _ in range(300)]
        )
        await call(backend.queue.purge, status="pending")
        before = count_free()
        assert before > 100
        for _ in range(50):
            await call(backend.cleanup)
        assert count_free() < before

    @pytest.mark.parametrize("encoding", ["UTF-16le", "UTF-16be"])
    async def test_an_applications_file_may_be_in_utf_16(
        self, api: Api, encoding: str
    ) -> None:
        with raw(api.path) as connection:
            connection.execute(f"PRAGMA encoding = '{encoding}'")
            connection.execute("CREATE TABLE app (a)")
        for _ in range(2):
            backend = api.backend(events=True)
            await call(backend.enqueue, Task("f", ("ü\U0001f600",), unique_key="ü"))
            task = await claim(backend.queue)
            assert task.args == ("ü\U0001f600",)
            await call(backend.complete, task, "ü")
            assert (await call(backend.result, task.id)).value == "ü"
            assert await call(backend.check) == []
            await call(backend.close)

    async def test_the_pages_of_an_applications_file_are_left_alone(
        self, api: Api, backend: Any
    ) -> None:
        with raw(api.path) as connection:
            connection.execute("CREATE TABLE orders (x)")
            connection.execute("INSERT INTO orders VALUES (zeroblob(1000000))")
        await call(backend.enqueue, Task("f"))
        with raw(api.path) as connection:
            connection.execute("DELETE FROM orders")
            before = connection.execute("PRAGMA freelist_count").fetchone()
            assert before > (100,)
            assert sum((await call(backend.cleanup)).values()) == 0
            assert connection.execute("PRAGMA freelist_count").fetchone() == before
            assert connection.execute("PRAGMA auto_vacuum").fetchone() == (0,)

    async def test_it_works_with_parts_in_files_of_their_own_and_parts_that_are_off(
        self, api: Api, clock: Clock
    ) -> None:
        backend = api.backend(
            results=api.folder / "results.db", events=api.folder / "events.db"
        )
        await call(backend.results.store, success("a"), ttl=5.0)
        await call(backend.events.log, TaskEvent("old", at=at(-2_592_001)))
        clock.advance(6)
        await call(backend.cleanup)
        assert await call(backend.events.count) == 0
        (row,) = read_rows(
            api.folder / "results.db", "SELECT count(*) AS n FROM omniq_result_view"
        )
        assert row["n"] == 0
        await call(api.backend(results=False).cleanup)

    async def test_no_transaction_settles_or_deletes_more_than_500_tasks(
        self, api: Api, spied: list[str], clock: Clock
    ) -> None:
        backend = api.backend(retention=5.0)
        await call(backend.enqueue_many, [Task("f") for _ in range(1_001)])
        tasks = await call(backend.queue.dequeue_many, 1_001)
        await call(backend.queue.complete_many, tasks)
        late = [Task("f", expires_at=at(5)) for _ in range(1_001)]
        await call(backend.enqueue_many, late)
        clock.advance(6)
        spied.clear()
        done = await call(backend.cleanup)
        assert (done["settled"], done["tasks"]) == (1_001, 1_001)
        # Twice three, one for the results and one for the free pages.
        assert spied.count("COMMIT") == 8


class TestCorners:
    @pytest.mark.parametrize("form", ["expires_at", "run_at"])
    @pytest.mark.parametrize("year", [1, 9999])
    def test_the_ends_of_the_calendar_are_refused(self, form: str, year: int) -> None:
        instant = datetime(year, 12, 31, 23, 59, 59, 999_999, UTC)
        with pytest.raises(ValueError, match="of the years 2 to 9998"):
            Task("f", **cast(Any, {form: instant}))
        Task("f", **cast(Any, {form: instant.replace(year=abs(year - 3))}))

    def test_a_key_of_a_string_enum_is_its_value(self) -> None:
        class Color(str, enum.Enum):  # noqa: UP042 -- whose str() is another
            RED = "red"

        serializer = omniq_sqlite.JSONSerializer()
        assert serializer.loads(serializer.dumps({Color.RED: 1})) == {"red": 1}

    async def test_an_id_that_cannot_be_stored_is_nobodys(self, api: Api) -> None:
        queue = api.queue()
        await call(queue.enqueue, Task("f", id="a?"))
        assert await call(queue.cancel, "a\udc80") is False
        assert await call(queue.get_task, "a\udc80") is None
        assert statuses(api.path) == ["pending"]

    async def test_a_result_has_the_tasks_metadata(self, backend: Any) -> None:
        task_id = await call(backend.enqueue, Task("f", metadata={"user": 7}))
        await call(backend.complete, await claim(backend.queue))
        assert (await call(backend.result, task_id)).metadata == {"user": 7}

    async def test_what_expired_after_a_failure_tells_both(
        self, backend: Any, clock: Clock
    ) -> None:
        task_id = await call(
            backend.enqueue,
            Task(
                "f",
                max_attempts=3,
                expires_at=datetime.fromtimestamp(clock() + 60, UTC),
            ),
        )
        error = ValueError("the reason")
        await call(backend.fail, await claim(backend.queue), error, delay=600)
        clock.advance(1_000)
        result = await call(backend.result, task_id, timeout=0)
        assert result.error_type == "TaskExpired"
        assert "the reason" in result.error

    async def test_what_is_no_exception_cannot_fail_a_task(self, backend: Any) -> None:
        await call(backend.enqueue, Task("f", max_attempts=5))
        task = await claim(backend.queue)
        with pytest.raises(TypeError, match="exception must be one, not str"):
            await call(backend.fail, task, "text")
        await call(backend.complete, task)

    async def test_a_lease_of_a_row_that_breaks_the_rules_is_extended(
        self, api: Api
    ) -> None:
        queue = api.queue()
        await call(queue.enqueue, Task("f"))
        with raw(api.path) as connection:
            connection.execute("UPDATE omniq_task SET timeout = 0")
        task = await claim(queue)
        extended = await call(queue.extend, task, 100.0, progress=7)
        assert extended.lease_until > task.lease_until
        assert extended.progress == 7
        assert task.progress is None

    def test_a_fragment_in_a_url_is_refused(self) -> None:
        with pytest.raises(ValueError, match="%23"):
            SQLiteBackend.from_url("sqlite:///a#b.db")

    async def test_an_event_storage_of_the_other_form_is_refused(
        self, tmp_path: Path
    ) -> None:
        with (
            SQLiteEventStorage(tmp_path / "events.db") as events,
            pytest.raises(TypeError, match="events must be"),
        ):
            AsyncSQLiteQueue(tmp_path / "jobs.db", events=cast(Any, events))

    @pytest.mark.parametrize("retention", [None, 3_600.0])
    async def test_an_event_storage_keeps_its_own_retention(
        self, api: Api, clock: Clock, retention: float | None
    ) -> None:
        events = api.events(api.folder / "events.db", retention=retention)
        backend = api.backend(events=events)
        await call(backend.enqueue, Task("f"))
        clock.advance(86_400 * 365)
        await call(backend.cleanup)
        assert await get_types(events) == (["enqueued"] if retention is None else [])

    @pytest.mark.parametrize("retention", [0.0, 60.0])
    @pytest.mark.parametrize("elsewhere", [False, True])
    async def test_of_two_claims_of_one_task_the_later_one_completes_it(
        self, api: Api, clock: Clock, retention: float, elsewhere: bool
    ) -> None:
        place = api.folder / "results.db" if elsewhere else True
        backend = api.backend(events=True, results=place, retention=retention)
        task_id = await call(backend.enqueue, Task("f"))
        stale = await claim(backend.queue, lease=1)
        clock.advance(10)
        fresh = await claim(backend.queue)
        with pytest.raises(LeaseLostError) as caught:
            await call(backend.complete_many, [(stale, "old"), (fresh, "new")])
        assert caught.value.task_ids == [task_id]
        assert (await call(backend.result, task_id, timeout=0)).value == "new"
        assert await call(backend.status, task_id) == "completed"
        assert (await get_types(backend.events)).count("completed") == 1

    async def test_after_an_unreadable_result_the_others_can_be_had(
        self, api: Api
    ) -> None:
        backend = api.backend()
        ids = [await call(backend.enqueue, Task("f")) for _ in range(2)]
        for _ in ids:
            await call(backend.complete, await claim(backend.queue), 7)
        with raw(api.path) as connection:
            connection.execute(
                "UPDATE omniq_result SET value = '{' WHERE task_id = ?", ids[:1]
            )
        stream = backend.wait_all(ids, timeout=5)
        following = stream.__anext__ if api.is_async else stream.__next__
        with pytest.raises(SerializationError):
            await call(following)
        assert (await call(following)).value == 7

    @pytest.mark.parametrize("results", [False, True])
    async def test_waiting_for_another_engine_does_not_spin(
        self, api: Api, results: bool
    ) -> None:
        """Nor where the result of an earlier round is there all the time."""
        looks: list[str] = []

        class Foreign:
            def dequeue_many(self) -> None: ...

            def get_task(self, task_id: str) -> Task:
                looks.append(task_id)
                return Task("f", id=task_id, status=TaskStatus.RUNNING)

        class AsyncForeign:
            async def dequeue_many(self) -> None: ...

            async def get_task(self, task_id: str) -> Task:
                return Foreign().get_task(task_id)

        foreign = AsyncForeign() if api.is_async else Foreign()
        backend = api.backend(queue=foreign, results=results)
        if results:
            await call(backend.results.store, success("x", 7))
        with pytest.raises(TimeoutError):
            await call(backend.result, "x", timeout=0.35)
        assert len(looks) < 60


class TestSecondLives:
    """An id that is free again may be used again."""

    @pytest.mark.parametrize("results", [True, "results.db"])
    async def test_its_result_is_that_of_the_later_task(
        self, api: Api, clock: Clock, results: Any
    ) -> None:
        place = results if results is True else api.folder / results
        backend = api.backend(results=place)
        await call(backend.enqueue, Task("f", id="x", max_attempts=2))
        await call(backend.fail, await claim(backend.queue), ValueError(), delay=0)
        clock.advance(1)
        await call(backend.complete, await claim(backend.queue), "first")
        clock.advance(1)
        await call(backend.enqueue, Task("f", id="x"))
        clock.advance(1)
        await call(backend.complete, await claim(backend.queue), "second")
        assert (await call(backend.result, "x")).value == "second"

    async def test_where_it_has_none_the_earlier_one_is_not_taken(
        self, api: Api, clock: Clock
    ) -> None:
        backend = api.backend()
        await call(backend.enqueue, Task("f", id="x"))
        await call(backend.complete, await claim(backend.queue), "first")
        clock.advance(1)
        await call(backend.enqueue, Task("f", id="x", max_attempts=1))
        await claim(backend.queue, lease=1, worker="w")
        clock.advance(1_000)
        result = await call(backend.result, "x", timeout=0)
        assert (result.status, result.value) == ("error", None)


class TestPartsOnOneFile:
    @pytest.mark.parametrize("link", [False, True])
    async def test_a_path_to_the_backends_own_file_is_that_file(
        self, api: Api, tmp_path: Path, link: bool
    ) -> None:
        path = tmp_path / "jobs.db"
        other = tmp_path / "link.db" if link else path
        if link:
            other.symlink_to(path)
        backend = api.backend(path, results=str(other), events=other)
        core = getattr(backend, "_async", backend)
        assert core._shares_file()
        assert core._queue._events_inside
        assert core._closable == []

    async def test_an_event_storage_on_it_is_written_in_the_same_commit(
        self, api: Api
    ) -> None:
        events = api.events()
        backend = api.backend(events=events)
        core = getattr(backend, "_async", backend)
        assert core._queue._events_inside
        await call(backend.enqueue, Task("f"))
        assert await get_types(events) == ["enqueued"]

    async def test_two_parts_may_share_another_file(self, api: Api) -> None:
        other = api.folder / "other.db"
        backend = api.backend(queue=other, results=other, events=other)
        core = getattr(backend, "_async", backend)
        assert core._shares_file()
        assert core._queue._events_inside
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert (await call(backend.result, task_id)).value == 7
        assert await get_types(backend.events) == ["enqueued", "dequeued", "completed"]
        assert not api.path.exists()


class TestBackup:
    async def test_a_copy_is_whole_and_can_be_opened(
        self, api: Api, backend: Any
    ) -> None:
        task_id = await call(backend.enqueue, Task("f", ("x",)))
        await call(backend.results.store, success("a1", 7))
        await call(backend.backup, api.folder / "copy.db")
        await call(backend.enqueue, Task("later"))
        copy = api.backend(api.folder / "copy.db", events=True)
        assert (await get(copy.queue, task_id)).args == ("x",)
        assert await call(copy.queue.count_tasks) == 1
        assert (await call(copy.results.get, "a1")).value == 7
        assert await get_types(copy.events) == ["enqueued"]
        assert await call(copy.check) == []

    async def test_it_is_made_while_others_write(self, api: Api, backend: Any) -> None:
        await call(backend.enqueue, Task("f"))
        with raw(api.path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM omniq_task")
            await aside(backend.backup, str(api.folder / "copy.db"))
            connection.execute("ROLLBACK")
        rows = read_rows(api.folder / "copy.db", "SELECT func FROM omniq_task_view")
        assert rows == [{"func": "f"}]

    @POSIX
    async def test_a_copy_belongs_to_its_owner_only(
        self, api: Api, backend: Any
    ) -> None:
        await call(backend.enqueue, Task("f"))
        before = os.umask(0)
        try:
            await call(backend.backup, api.folder / "copy.db")
        finally:
            os.umask(before)
        assert (api.folder / "copy.db").stat().st_mode & 0o777 == 0o600

    async def test_it_refuses_to_write_over_its_own_file(
        self, api: Api, backend: Any
    ) -> None:
        await call(backend.enqueue, Task("f"))
        with pytest.raises((ValueError, OSError), match=r"jobs\.db"):
            await call(backend.backup, api.path)
        assert await call(backend.queue.count_tasks) == 1

    def test_a_call_that_was_cancelled_makes_no_copy_later(
        self, tmp_path: Path
    ) -> None:
        copy = str(tmp_path / "copy.db")
        with raw(tmp_path / "jobs.db") as connection:
            connection.execute("CREATE TABLE t (a)")
            with pytest.raises(sqlite3.OperationalError, match="unable to open"):
                omniq_sqlite._back_up(connection, copy)
        assert not os.path.exists(copy)

    async def test_a_full_disk_under_the_copy_is_told_by_its_name(
        self, api: Api, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await call(backend.enqueue, Task("f"))
        real = sqlite3.connect

        def small(*args: Any, **terms: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = real(*args, **terms)
            connection.execute("PRAGMA max_page_count = 1")
            return connection

        monkeypatch.setattr(sqlite3, "connect", small)
        with pytest.raises(DatabaseFullError, match=r"copy\.db"):
            await call(backend.backup, api.folder / "copy.db")
        assert not (api.folder / "copy.db").exists()


class TestCheck:
    async def test_a_sound_file_has_no_findings(self, backend: Any) -> None:
        await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue, worker="w1"), 7)
        assert await call(backend.check) == []

    async def test_an_overdue_lease_is_found(self, backend: Any, clock: Clock) -> None:
        await call(backend.enqueue, Task("f"))
        await claim(backend.queue, lease=5.0)
        clock.advance(100_000)
        findings = await call(backend.check)
        assert findings != []
        assert all(isinstance(finding, Finding) for finding in findings)
        assert any("lease" in finding.message for finding in findings)

    async def test_a_dead_worker_is_found(self, backend: Any, clock: Clock) -> None:
        await call(backend.enqueue, Task("f"))
        await claim(backend.queue, lease=1e6, worker="w1")
        clock.advance(100_000)
        findings = await call(backend.check)
        assert any("w1" in finding.message for finding in findings)

    async def test_a_connection_that_checkpoints_outside_the_guard_is_found(
        self, api: Api, backend: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await call(backend.enqueue, Task("f"))
        with closing(sqlite3.connect(api.path)) as own:
            monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: True)
            [finding] = await call(backend.check)
            assert (finding.check, finding.severity) == ("checkpoints", "warning")
            assert "wal_autocheckpoint=0" in finding.message
            own.execute("PRAGMA wal_autocheckpoint = 0")
            assert await call(backend.check) == []
            own.execute("PRAGMA wal_autocheckpoint = 1000")
            monkeypatch.setattr(omniq_sqlite, "_has_wal_reset_bug", lambda _: False)
            assert await call(backend.check) == []

    async def test_a_missing_index_is_found(self, api: Api, backend: Any) -> None:
        await call(backend.enqueue, Task("f"))
        with raw(api.path) as connection:
            connection.execute("DROP INDEX omniq_task_ready")
        findings = await call(backend.check)
        assert any("omniq_task_ready" in finding.message for finding in findings)

    async def test_a_large_wal_is_found(self, api: Api, backend: Any) -> None:
        await call(backend.enqueue, Task("f"))
        with raw(api.path) as reader, raw(api.path) as writer:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM omniq_task").fetchall()
            writer.execute("PRAGMA synchronous = OFF")
            writer.execute("PRAGMA wal_autocheckpoint = 0")
            writer.execute("CREATE TABLE filler (x)")
            for _ in range(13):
                writer.execute("INSERT INTO filler VALUES (zeroblob(10000000))")
            findings = await call(backend.check)
        assert any("WAL" in finding.message for finding in findings)


class MemoryResults:
    """A blocking result storage of another engine: a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, TaskResult] = {}

    def store(self, result: TaskResult, *, ttl: float | None = None) -> None:
        self.kept[result.task_id] = result

    def store_many(self, results: Collection[TaskResult]) -> None:
        self.kept.update({result.task_id: result for result in results})

    def get(self, task_id: str) -> TaskResult | None:
        return self.kept.get(task_id)

    def get_many(self, ids: Collection[str]) -> dict[str, TaskResult]:
        return {i: self.kept[i] for i in ids if i in self.kept}

    def wait(self, task_id: str, *, timeout: float | None = None) -> TaskResult:
        if task_id not in self.kept:
            raise TimeoutError(task_id)
        return self.kept[task_id]

    def delete(self, task_id: str) -> bool:
        return self.kept.pop(task_id, None) is not None

    def list_results(self, **_: Any) -> list[TaskResult]:
        return list(self.kept.values())

    def purge(self, *, older_than: float | None = None) -> int:
        return 0

    def close(self) -> None:
        pass


def disguised(queue: AsyncSQLiteQueue) -> Any:
    """Return a queue that is not of our class, as another engine's is not."""

    class Forwarding:
        def __getattr__(self, name: str) -> Any:
            return getattr(queue, name)

    return Forwarding()


class TestForeignParts:
    async def test_the_results_may_be_another_engines(self, api: Api) -> None:
        results = MemoryResults()
        backend = api.backend(results=Awaited(results) if api.is_async else results)
        task_id = await call(backend.enqueue, Task("f"))
        await call(backend.complete, await claim(backend.queue), 7)
        assert results.kept[task_id].value == 7
        assert (await call(backend.result, task_id, timeout=0)).value == 7
        assert await call(backend.status, task_id) == "completed"
        await call(backend.cleanup)
        assert isinstance(await call(backend.check), list)

    async def test_the_queue_may_be_another_engines(self, tmp_path: Path) -> None:
        async with (
            AsyncSQLiteQueue(tmp_path / "q.db") as queue,
            AsyncSQLiteBackend(tmp_path / "r.db", queue=disguised(queue)) as backend,
        ):
            await backend.enqueue_many([Task("f", (n,)) for n in range(4)])
            tasks = await queue.dequeue_many(4)
            await backend.complete(tasks[0], 0, enqueue=[Task("g")])
            await queue.cancel(tasks[2].id)
            with pytest.raises(LeaseLostError) as caught:
                await backend.complete_many([(t, t.args[0]) for t in tasks[1:]])
            assert caught.value.task_ids == [tasks[2].id]
            with pytest.raises(LeaseLostError):
                await backend.complete(tasks[2], 2, enqueue=[Task("h")])
            assert backend.results is not None
            stored = await backend.results.list_results()
            assert sorted(result.value for result in stored) == [0, 1, 3]
            assert await claim_names(queue) == ["g"]

    async def test_a_result_of_theirs_comes_while_one_waits(self, api: Api) -> None:
        results = MemoryResults()
        backend = api.backend(results=Awaited(results) if api.is_async else results)
        task_id = await call(backend.enqueue, Task("f"))
        waiting = started(aside(backend.result, task_id, timeout=DEADLINE))
        await in_wait(backend.queue)
        await call(backend.complete, await claim(backend.queue), 7)
        assert (await waiting).value == 7


# =============================================================================
# Worker
# =============================================================================


class Rig:
    """A backend and workers of one form, so that a test is written for both."""

    def __init__(self, form: str, engine: str, folder: Path) -> None:
        self.is_async = form == "async"
        self.path = folder / "jobs.db"
        self.memory = MemoryBackend() if engine == "memory" else None
        self.backend: Any = self.memory or SQLiteBackend(self.path, events=True)
        self.queue: Any = self.backend.queue
        self.tasks = TaskRegistry()
        self.after_run: Callable[[], object] = lambda: None

    def close(self) -> None:
        self.backend.close()

    def enqueue(self, *tasks: Task, delay: float = 0.0) -> list[str]:
        return [self.queue.enqueue(task, delay=delay) for task in tasks]

    def get(self, task_id: str) -> Task:
        task = (
            self.memory.queue.rows[task_id]
            if self.memory
            else self.queue.get_task(task_id)
        )
        assert isinstance(task, Task)
        return task

    def value(self, task_id: str) -> Any:
        """Return what the function returned, or the text of its error."""
        if self.memory:
            value = self.memory.outcomes[task_id]
            return str(value) if isinstance(value, BaseException) else value
        result = self.backend.results.get(task_id)
        assert result is not None, "there is no result"
        return result.value if result.status is ResultStatus.SUCCESS else result.error

    def worker(self, **options: Any) -> Any:
        if not self.is_async:
            return Worker(self.backend, self.tasks, **options)
        if self.memory:
            backend: Any = AsyncMemoryBackend(self.memory)
        else:
            backend = AsyncSQLiteBackend(self.path, events=True)
        return AsyncWorker(backend, self.tasks, **options)

    def perform(self, worker: Any, **terms: Any) -> int:
        """Run a worker in this thread and return its status."""
        if isinstance(worker, Worker):
            return worker.run(signals=False, **terms)

        async def main() -> int:
            try:
                return cast(int, await worker.run(signals=False, **terms))
            finally:
                self.after_run()
                await worker.backend.close()

        return asyncio.run(main())

    def run(self, **options: Any) -> int:
        """Run a new worker until the queue is empty."""
        return self.perform(self.worker(**options), until_empty=True)

    @contextlib.contextmanager
    def at_work(self, **options: Any) -> Iterator[AtWork]:
        """Have a worker run in a thread meanwhile."""
        at_work = AtWork(self, self.worker(**options))
        at_work.thread.start()
        try:
            yield at_work
        finally:
            at_work.end()


class AtWork:
    def __init__(self, rig: Rig, worker: Any) -> None:
        self.worker = worker
        self.status: int | None = None

        def run() -> None:
            self.status = rig.perform(worker)

        self.thread = threading.Thread(target=run, daemon=True)

    def end(self) -> None:
        self.worker.stop()
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the worker did not stop"


def backend_of(worker: Any) -> Any:
    """Return the async backend with which a worker of either form works."""
    return (worker._async if isinstance(worker, Worker) else worker).backend


def make_rig(name: str, folder: Path) -> Iterator[Rig]:
    form, engine = name.split(" on ")
    rig = Rig(form, engine, folder)
    yield rig
    rig.close()


@pytest.fixture(params=["async on sqlite", "blocking on sqlite"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    yield from make_rig(request.param, tmp_path)


@pytest.fixture(params=["async on memory", "blocking on memory"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A rig on another engine, in which calls can be made to fail."""
    yield from make_rig(request.param, tmp_path)


class Program:
    """A program in a process of its own that prints lines, with a deadline."""

    def __init__(self, folder: Path, source: str, *args: object) -> None:
        path = folder / "program.py"
        path.write_text(textwrap.dedent(source))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", path, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=folder,
            env=environment(),
        )
        self.errors = ""
        self._timer = threading.Timer(DEADLINE, self.kill)
        self._timer.start()

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line and self.process.poll() is not None:
            pytest.fail(f"the program has ended: {self.process.stderr.read()}")  # type: ignore[union-attr]
        return line

    def expect(self, *lines: str) -> None:
        assert [self.line() for _ in lines] == list(lines)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end; return the status."""
        _, self.errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode

    def close(self) -> None:
        self._timer.cancel()
        self.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program; what is left of it ends with the test."""
    programs: list[Program] = []

    def start(source: str, *args: object) -> Program:
        programs.append(Program(tmp_path, source, *args))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def of_worker(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    return [
        r for r in caplog.records if r.name == "omniq_sqlite" and r.levelno == level
    ]


# -- Registry --


def thumbnail(path: str, size: int = 128) -> str:
    """Make a thumbnail."""
    return f"{path}:{size}"


class TestTaskRegistry:
    def test_a_function_is_known_by_its_own_name(self) -> None:
        tasks = TaskRegistry()
        registered = tasks.register(thumbnail)
        assert registered.name == "thumbnail"
        assert tasks["thumbnail"] is registered
        assert "thumbnail" in tasks
        assert list(tasks) == ["thumbnail"]

    def test_a_name_of_its_own_choice(self) -> None:
        tasks = TaskRegistry()
        tasks.register(thumbnail, name="images.thumbnail")
        assert list(tasks) == ["images.thumbnail"]

    def test_it_decorates_with_and_without_options(self) -> None:
        tasks = TaskRegistry()

        @tasks.register
        def plain(a: int) -> int:
            return a

        @tasks.register(queue="slow", priority=2, max_attempts=5, timeout=30)
        def with_options(a: int) -> int:
            return a

        assert plain.task(1).max_attempts == 3
        task = with_options.task(1)
        assert (task.queue, task.priority, task.max_attempts, task.timeout) == (
            "slow",
            2,
            5,
            30,
        )

    def test_a_name_that_is_taken_is_refused(self) -> None:
        tasks = TaskRegistry()
        tasks.register(thumbnail)
        with pytest.raises(ValueError, match="'thumbnail'"):
            tasks.register(thumbnail)

    def test_an_unknown_name_is_an_error_of_its_own(self) -> None:
        with pytest.raises(UnknownTaskError) as caught:
            TaskRegistry()["nobody"]
        assert caught.value.func == "nobody"

    def test_what_has_no_name_needs_one(self) -> None:
        tasks = TaskRegistry()
        with pytest.raises(ValueError, match="name must be given"):
            tasks.register(partial(thumbnail, "a"))
        assert tasks.register(partial(thumbnail, "a"), name="a").task().func == "a"

    def test_a_wrong_option_is_refused_at_once(self) -> None:
        tasks = TaskRegistry()
        with pytest.raises(ValueError, match="max_attempts"):
            tasks.register(thumbnail, max_attempts=0)
        with pytest.raises(TypeError, match="colour"):
            tasks.register(thumbnail, colour="red")  # type: ignore[call-overload]
        assert not list(tasks)

    def test_it_pickles_as_references_to_its_functions(self) -> None:
        tasks = TaskRegistry()
        tasks.register(thumbnail, name="small", priority=7)
        copy = pickle.loads(pickle.dumps(tasks))
        assert copy["small"].function is thumbnail
        assert copy["small"].task("a").priority == 7

    def test_a_function_that_cannot_be_imported_does_not_pickle(self) -> None:
        tasks = TaskRegistry()
        tasks.register(lambda: None, name="inner")
        with pytest.raises(TypeError, match="importable"):
            pickle.dumps(tasks)

    def test_a_function_of_a_session_without_a_file_does_not_pickle(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notebook = types.ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", notebook)
        exec("def inner(): pass", notebook.__dict__)  # noqa: S102 (as a cell would)
        tasks = TaskRegistry()
        tasks.register(notebook.inner)
        with pytest.raises(TypeError, match="move the function to a module"):
            pickle.dumps(tasks)


class TestTaskFunction:
    def test_it_is_called_as_the_function_itself(self) -> None:
        registered = TaskRegistry().register(thumbnail)
        assert registered("a.png", size=64) == "a.png:64"
        assert registered.__doc__ == "Make a thumbnail."
        assert str(inspect.signature(registered)) == str(inspect.signature(thumbnail))

    def test_an_object_with_an_async_call_runs_on_the_loop(self, rig: Rig) -> None:
        class Greet:
            async def __call__(self, name: str) -> str:
                await asyncio.sleep(0)
                return f"hello {name}"

        [task_id] = rig.enqueue(rig.tasks.register(Greet(), name="greet").task("you"))
        rig.run()
        assert rig.value(task_id) == "hello you"

    def test_attributes_of_the_function_hide_no_method(self) -> None:
        def taken(a: int) -> int:
            return a

        taken.task = taken.options = "another queue's"  # type: ignore[attr-defined]
        taken.author = "me"  # type: ignore[attr-defined]
        registered = TaskRegistry().register(taken)
        assert registered.options(priority=2).task(1).priority == 2
        assert registered.author == "me"  # type: ignore[attr-defined]

    def test_task_makes_a_task_of_a_call(self) -> None:
        task = TaskRegistry().register(thumbnail).task("a.png", size=64)
        assert (task.func, task.args, task.kwargs) == (
            "thumbnail",
            ("a.png",),
            {"size": 64},
        )

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((), {}), (("a", 1, 2), {}), (("a",), {"colour": 1})]
    )
    def test_task_checks_the_arguments_at_once(self, args: Any, kwargs: Any) -> None:
        registered = TaskRegistry().register(thumbnail)
        with pytest.raises(TypeError, match=r"thumbnail\(\): "):
            registered.task(*args, **kwargs)

    def test_options_leave_the_original_alone(self) -> None:
        registered = TaskRegistry().register(thumbnail, queue="slow")
        task = registered.options(priority=5, unique_key="k").task("a")
        assert (task.queue, task.priority, task.unique_key) == ("slow", 5, "k")
        assert registered.task("a").priority == 0

    def test_a_wrong_argument_is_a_type_error(self, tmp_path: Path) -> None:
        if importlib.util.find_spec("mypy") is None:
            pytest.skip("mypy is not installed")
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            from omniq_sqlite import TaskRegistry
            tasks = TaskRegistry()
            @tasks.register(max_attempts=5, timeout=30)
            def thumbnail(path: str, size: int = 128) -> str: return path
            @tasks.register
            async def send(to: str) -> None: ...
            thumbnail.task("a.png", size=64)
            thumbnail.options(priority=5).task("a.png")
            send.task("me")
            thumbnail("a.png").upper()
            thumbnail.task(1)
            thumbnail.task("a.png", colour="red")
            thumbnail.options(priority=5).task()
            send.task()
            thumbnail.options(colour="red")
            tasks.register(max_attempts="five")
            """)
        )
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                **os.environ,
                "MYPYPATH": str(MODULE.parent),
                "MYPY_CACHE_DIR": str(tmp_path / "cache"),
            },
        )
        found = [line for line in done.stdout.splitlines() if "error" in line]
        lines = sorted({int(line.split(":")[1]) for line in found})
        assert lines == [11, 12, 13, 14, 15, 16], done.stdout


# -- Running --


class TestRun:
    def test_it_runs_functions_of_both_kinds_and_stores_their_results(
        self, rig: Rig
    ) -> None:
        @rig.tasks.register
        def plain(a: int, b: int = 1) -> int:
            return a + b

        @rig.tasks.register
        async def waiting(a: int) -> int:
            await asyncio.sleep(0)
            return a * 10

        ids = rig.enqueue(plain.task(1, b=5), waiting.task(4))
        assert rig.run() == 0
        assert [rig.value(task_id) for task_id in ids] == [6, 40]
        assert rig.queue.count_tasks() == 0

    def test_it_uses_no_more_than_the_interfaces(self, other: Rig) -> None:
        ids = other.enqueue(other.tasks.register(thumbnail).task("a"))
        assert other.run() == 0
        assert other.value(ids[0]) == "a:128"

    def test_async_functions_run_on_the_loop_and_plain_ones_in_threads(
        self, rig: Rig
    ) -> None:
        threads: dict[str, int] = {}

        @rig.tasks.register
        def plain() -> None:
            threads["plain"] = threading.get_ident()
            assert not inspect.iscoroutinefunction(plain.function)

        @rig.tasks.register
        async def on_loop() -> None:
            threads["async"] = threading.get_ident()
            assert asyncio.get_running_loop()

        rig.enqueue(plain.task(), on_loop.task())
        rig.run()
        assert threads["async"] == threading.get_ident()
        assert threads["plain"] != threading.get_ident()

    def test_plain_functions_run_at_the_same_time(self, rig: Rig) -> None:
        together = threading.Barrier(3)

        @rig.tasks.register(max_attempts=1)
        def meet() -> int:
            return together.wait(DEADLINE)

        ids = rig.enqueue(*(meet.task() for _ in range(3)))
        rig.run(concurrency=3)
        assert sorted(rig.value(task_id) for task_id in ids) == [0, 1, 2]

    def test_its_threads_are_daemons_and_no_more_than_it_has_slots(
        self, rig: Rig
    ) -> None:
        threads = set()

        @rig.tasks.register
        def note() -> None:
            threads.add(threading.current_thread())

        rig.enqueue(*(note.task() for _ in range(40)))
        rig.run(concurrency=3)
        assert len(threads) <= 3
        assert all(thread.daemon for thread in threads)

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_it_never_claims_more_than_it_has_free_slots(
        self, other: Rig, concurrency: int
    ) -> None:
        ended: list[str] = []
        taken: list[int] = []  # slots, would all be claimed that is asked for

        @other.tasks.register(name="async")
        async def on_loop() -> None:
            await asyncio.sleep(0.001)
            ended.append("async")

        @other.tasks.register
        def plain() -> None:
            ended.append("plain")

        claim = other.queue.claim

        def count(limit: int, *args: Any) -> list[Task]:
            claimed = sum(task.attempt for task in other.queue.rows.values())
            taken.append(claimed - len(ended) + limit)
            return cast(list[Task], claim(limit, *args))

        other.queue.claim = count
        for _ in range(20):
            other.enqueue(Task("async"), plain.task())
        other.run(concurrency=concurrency)
        assert max(taken) == concurrency

    def test_it_claims_in_batches(self, other: Rig, monkeypatch: Any) -> None:
        monkeypatch.setattr(omniq_sqlite, "_SHORT_RUN", DEADLINE)
        monkeypatch.setattr(omniq_sqlite, "_LOOK", DEADLINE)
        claimed: list[int] = []
        claim = other.queue.claim

        def counted(*args: Any) -> list[Task]:
            tasks = cast(list[Task], claim(*args))
            claimed.append(len(tasks))
            return tasks

        @other.tasks.register
        async def nothing() -> None: ...

        other.queue.claim = counted
        other.enqueue(*(nothing.task() for _ in range(200)))
        other.run(concurrency=20)
        assert other.queue.count("complete") == 200
        batches = [count for count in claimed if count]
        assert batches == [1, 2, 4, 8, 16, *[20] * 8, 9]

    def test_a_claim_waits_for_quick_functions_to_fill_all_slots(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_GATHER", 30.0)
        monkeypatch.setattr(omniq_sqlite, "_SHORT_RUN", DEADLINE)
        wanted: list[int] = []
        dequeue_many = AsyncSQLiteQueue.dequeue_many

        async def noted(self: Any, limit: int, *args: Any, **terms: Any) -> list[Task]:
            wanted.append(limit)
            return await dequeue_many(self, limit, *args, **terms)

        @rig.tasks.register
        def short() -> None: ...

        @rig.tasks.register
        def longer() -> None:
            time.sleep(0.05)

        monkeypatch.setattr(AsyncSQLiteQueue, "dequeue_many", noted)
        rig.enqueue(*(f.task() for f in [short, longer] * 3))
        rig.run(concurrency=2)
        assert rig.queue.count_tasks() == 0
        assert wanted[:4] == [1, 2, 2, 2]

    def test_it_completes_in_batches(self, rig: Rig, monkeypatch: Any) -> None:
        settled: list[int] = []
        groups: list[int] = []
        settle = omniq_sqlite._Shift._settle_ended
        finish = omniq_sqlite._Database._finish
        free = threading.Event()
        begun: list[None] = []

        def noted(self: Any) -> None:
            settled.append(len(self._ended))
            settle(self)

        def counted(self: Any, connection: Any, group: Any) -> None:
            groups.append(len(group))
            finish(self, connection, group)

        @rig.tasks.register
        async def hold() -> None:
            begun.append(None)
            await asyncio.to_thread(free.wait, DEADLINE)

        rig.queue.enqueue_many([hold.task() for _ in range(20)])
        with rig.at_work(concurrency=20) as at_work:
            until(lambda: len(begun) == 20)  # so the claim has been delivered
            monkeypatch.setattr(omniq_sqlite._Shift, "_settle_ended", noted)
            monkeypatch.setattr(omniq_sqlite._Database, "_finish", counted)
            with write_lock(rig.path):
                free.set()
                until(lambda: sum(settled) == 20)
                all_in_line(backend_of(at_work.worker).queue, len(settled))
            until(lambda: rig.queue.count_tasks() == 0)
        # What ended together was one write, and all of it one commit; the other two
        # say at the end that it stops.
        assert groups == [len(settled), 1, 1]

    def end_together(self, rig: Rig, *functions: Any) -> list[str]:
        """Have async functions end in one turn of the loop; return the task ids."""
        free: list[asyncio.Event] = []
        began: list[object] = []

        def held(function: Any) -> Any:
            async def hold() -> Any:
                if not free:
                    free.append(asyncio.Event())
                began.append(hold)
                if len(began) == len(functions):
                    free[0].set()
                await free[0].wait()
                return function()

            return hold

        names = [f"held-{number}" for number in range(len(functions))]
        for name, function in zip(names, functions, strict=True):
            rig.tasks.register(held(function), name=name)
        ids = rig.enqueue(*(Task(name, max_attempts=1) for name in names))
        assert rig.run(concurrency=len(functions)) == 0
        return ids

    def test_what_ends_together_is_one_write(self, rig: Rig, monkeypatch: Any) -> None:
        calls: list[int] = []
        complete_many = AsyncSQLiteBackend.complete_many

        async def counted(self: Any, values: Any) -> None:
            calls.append(len(values))
            await complete_many(self, values)

        monkeypatch.setattr(AsyncSQLiteBackend, "complete_many", counted)
        ids = self.end_together(rig, *(partial(int, n) for n in range(5)))
        assert calls == [5]
        assert [rig.value(task_id) for task_id in ids] == [0, 1, 2, 3, 4]

    def test_a_value_that_cannot_be_stored_fails_its_task_alone(self, rig: Rig) -> None:
        ids = self.end_together(rig, lambda: "a", object, lambda: "c")
        values = [rig.value(task_id) for task_id in ids]
        assert (values[0], values[2]) == ("a", "c")
        assert "object" in values[1]
        assert rig.get(ids[1]).status is TaskStatus.FAILED

    def test_an_error_among_values_is_its_own(self, rig: Rig) -> None:
        ids = self.end_together(rig, lambda: "a", divide, lambda: "c")
        assert [rig.value(task_id) for task_id in ids] == ["a", "by nought", "c"]

    def test_a_lost_lease_among_values_drops_its_outcome_alone(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        def cancel_one() -> str:
            [task] = rig.queue.list_tasks(func="held-1")
            return str(rig.queue.cancel(task.id))

        ids = self.end_together(rig, lambda: "a", lambda: "b", cancel_one)
        assert (rig.value(ids[0]), rig.value(ids[2])) == ("a", "True")
        assert rig.get(ids[1]).status is TaskStatus.CANCELLED
        assert rig.backend.results.get(ids[1]) is None
        [record] = [r for r in caplog.records if "its outcome is dropped" in r.msg]
        assert ids[1] in record.getMessage()

    def test_a_busy_file_does_not_end_what_ended_together(
        self, rig: Rig, monkeypatch: Any
    ) -> None:
        async def busy(self: Any, values: Any) -> None:
            raise DatabaseBusyError(self.path, 0.0)

        monkeypatch.setattr(AsyncSQLiteBackend, "complete_many", busy)
        ids = self.end_together(rig, lambda: "a", lambda: "b")
        assert [rig.value(task_id) for task_id in ids] == ["a", "b"]

    def test_quick_functions_share_a_thread_and_slow_ones_have_their_own(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began: dict[str, str] = {}
        all_began = threading.Barrier(6)

        @rig.tasks.register
        def quick(name: str) -> None:
            began[name] = threading.current_thread().name

        @rig.tasks.register
        def slow(name: str) -> None:
            quick.function(name)
            all_began.wait(DEADLINE)

        rig.enqueue(*(quick.task(f"quick {n}") for n in range(6)))
        with monkeypatch.context() as patch:
            patch.setattr(omniq_sqlite, "_QUICK_CALL", DEADLINE)  # on a busy machine
            assert rig.run(concurrency=6) == 0
        assert len(set(began.values())) == 1
        rig.enqueue(*(slow.task(f"slow {n}") for n in range(6)))
        assert rig.run(concurrency=6) == 0
        assert len({began[f"slow {n}"] for n in range(6)}) == 6

    def test_an_outcome_does_not_wait_for_the_function_behind_it(
        self, rig: Rig
    ) -> None:
        free = threading.Event()

        @rig.tasks.register
        def quick() -> str:
            return "done"

        @rig.tasks.register
        def slow() -> bool:
            return free.wait(DEADLINE)

        ids = rig.enqueue(*(f.task() for f in (quick, slow) * 4))
        with rig.at_work(concurrency=8):
            until(lambda: len(rig.backend.results.list_results()) == 4)
            until(lambda: rig.queue.count_tasks(status="running") == 4)
            free.set()
            until(lambda: rig.queue.count_tasks() == 0)
        assert [rig.value(task_id) for task_id in ids] == ["done", True] * 4

    @pytest.mark.parametrize("computes", [False, True])
    def test_a_free_slot_is_used_while_others_are_busy(
        self, rig: Rig, computes: bool
    ) -> None:
        free = threading.Event()

        @rig.tasks.register
        def hold() -> bool:
            while computes and not free.is_set():
                pass
            return free.wait(DEADLINE)

        @rig.tasks.register
        def let_go() -> None:
            free.set()

        ids = rig.enqueue(hold.task(), let_go.task())
        with rig.at_work(concurrency=2):
            until(lambda: rig.backend.results.get(ids[0]))
        assert rig.value(ids[0]) is True

    @pytest.mark.parametrize("idle", [False, True])
    def test_a_busy_process_leaves_computations_to_others(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, idle: bool
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_POLITE_PAUSE", DEADLINE)
        began: list[None] = []
        free = threading.Event()

        @rig.tasks.register
        def compute() -> None:
            began.append(None)
            while not free.is_set():  # and hold the interpreter
                pass

        @rig.tasks.register
        def nothing() -> None: ...

        with rig.at_work(concurrency=8):
            if idle:  # after there was more to do
                rig.queue.enqueue_many([nothing.task() for _ in range(100)])
                until(lambda: rig.queue.count_tasks() == 0)
                time.sleep(0.05)
            rig.queue.enqueue_many([compute.task() for _ in range(8)])
            until(lambda: began)
            time.sleep(0.2)
            # One; more only as long as its thread had not begun.
            assert rig.queue.count_tasks(status="running") <= 4
            free.set()
            until(lambda: rig.queue.count_tasks() == 0)

    def test_a_long_cleanup_does_not_hold_up_the_first_task(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = threading.Event()

        async def clean_up(self: object) -> None:
            await asyncio.to_thread(free.wait, DEADLINE)

        @rig.tasks.register
        def let_go() -> None:
            free.set()

        monkeypatch.setattr(AsyncSQLiteBackend, "cleanup", clean_up)
        [task_id] = rig.enqueue(let_go.task())
        begun = time.monotonic()
        rig.run()
        assert time.monotonic() - begun < SOON
        assert rig.backend.status(task_id) == "completed"

    def test_the_name_of_another_queue_may_be_anything(self, rig: Rig) -> None:
        rig.queue.enqueue(Task("f", queue="other"))
        with raw(rig.path) as connection:
            connection.execute("UPDATE omniq_task SET queue = CAST(x'ff' AS TEXT)")

        @rig.tasks.register
        def nothing() -> None: ...

        [task_id] = rig.enqueue(nothing.task())
        rig.run()
        assert rig.backend.status(task_id) == "completed"

    def test_it_prefers_the_queues_that_are_named_first(self, rig: Rig) -> None:
        seen: list[str] = []

        @rig.tasks.register
        def note(name: str) -> None:
            seen.append(name)

        for name in ("low", "high", "other"):
            rig.enqueue(note.options(queue=name).task(name))
        rig.run(queues=["high", "low"], concurrency=1)
        assert seen == ["high", "low"]

    def test_an_idle_worker_begins_at_once_and_keeps_no_task_alive(
        self, rig: Rig
    ) -> None:
        began: list[float] = []

        @rig.tasks.register
        def note() -> None:
            began.append(time.monotonic())

        with rig.at_work():
            for number in range(1, 6):
                time.sleep(0.02)
                asked = time.monotonic()
                rig.enqueue(note.task())
                until(lambda: len(began) == number)  # noqa: B023
                assert began[-1] - asked < SOON

    def test_it_can_run_again(self, rig: Rig) -> None:
        plain = rig.tasks.register(thumbnail)
        worker = rig.worker()
        for _ in range(2):
            [task_id] = rig.enqueue(plain.task("a"))
            if rig.is_async:
                worker.backend = AsyncSQLiteBackend(rig.path)
            assert rig.perform(worker, until_empty=True) == 0
            assert rig.value(task_id) == "a:128"

    def test_no_thread_is_left_when_it_ends(self, rig: Rig) -> None:
        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        before = threading.active_count()
        rig.run(lease=0.1)
        until(lambda: threading.active_count() <= before)

    def test_it_runs_only_once_at_a_time(self, rig: Rig) -> None:
        with rig.at_work() as at_work:
            until(rig.queue.list_workers)
            run = functools.partial(at_work.worker.run, signals=False)
            with pytest.raises(RuntimeError, match="already"):
                asyncio.run(run()) if rig.is_async else run()
            [task_id] = rig.enqueue(rig.tasks.register(thumbnail).task("a"))
            until(lambda: rig.backend.results.get(task_id))

    def test_a_memory_database_outlives_the_worker(self) -> None:
        tasks = TaskRegistry()
        plain = tasks.register(thumbnail)
        with SQLiteBackend(":memory:") as backend:
            for _ in range(2):
                task_id = backend.enqueue(plain.task("a"))
                Worker(backend, tasks).run(until_empty=True, signals=False)
                assert backend.result(task_id, timeout=0).value == "a:128"

    @pytest.mark.parametrize("part", ["queue", "results", "events"])
    async def test_a_part_in_memory_is_the_workers_too(
        self, api: Api, part: str
    ) -> None:
        """It looked at memory of its own, and lost results without a word."""
        backend = api.backend(clock=time.time, **{"events": True, part: ":memory:"})
        with pytest.raises(TypeError, match="memory"):
            pickle.dumps(backend)
        tasks = TaskRegistry()

        @tasks.register
        def slow() -> str:
            time.sleep(1.2)
            return "slow"

        task_id = await call(backend.enqueue, slow.task())
        if api.is_async:
            await AsyncWorker(backend, tasks, lease=0.6).run(until_empty=True)
        else:
            Worker(backend, tasks, lease=0.6).run(until_empty=True, signals=False)
        result = await call(backend.result, task_id, timeout=0)
        assert (result.value, result.attempt) == ("slow", 1)
        events = await call(backend.events.query)
        assert [e.type for e in events] == ["enqueued", "dequeued", "completed"]

    def test_a_blocking_worker_runs_where_a_loop_runs(self, rig: Rig) -> None:
        [task_id] = rig.enqueue(rig.tasks.register(thumbnail).task("a"))

        async def cell() -> int:
            return Worker(rig.backend, rig.tasks).run(until_empty=True)

        assert asyncio.run(cell()) == 0
        assert rig.value(task_id) == "a:128"

    def test_a_file_that_cannot_be_used_ends_it_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "jobs.db"
        path.write_text("this is not a database, and it is long enough to tell" * 20)
        backend = SQLiteBackend(path)
        with pytest.raises(omniq_sqlite.CorruptDatabaseError):
            Worker(backend, TaskRegistry()).run(signals=False)

    @pytest.mark.parametrize(
        "column", ["id", "func", "args", "kwargs", "metadata", "unique_key", "error"]
    )
    @pytest.mark.parametrize("events", [False, True])
    def test_text_that_is_not_utf_8_does_not_stop_it(
        self, path: str, column: str, events: bool
    ) -> None:
        """As a producer of another language may write it; the worker tried for ever."""
        tasks = TaskRegistry()
        plain = tasks.register(thumbnail)
        with SQLiteBackend(path, events=events) as backend:
            first = backend.enqueue(plain.task("a"))
            backend.enqueue(Task(plain.name, ("secret",), unique_key="k"))
            text = "CAST(x'22ff' || 'secret' AS TEXT)"
            with raw(path) as connection:
                connection.execute(
                    f"UPDATE omniq_task SET {column} = {text} WHERE unique_key = 'k'"
                )
            last = backend.enqueue(plain.task("b"))
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert [backend.result(i, timeout=0).value for i in (first, last)] == [
                "a:128",
                "b:128",
            ]
        bad = column in ("func", "args", "kwargs", "metadata")
        assert statuses(path) == ["failed"] * bad
        if bad and column != "func":  # a name is told
            assert "secret" not in select(path, "SELECT error FROM omniq_task")[0]

    @pytest.mark.parametrize("column", ["id", "worker", "error"])
    @pytest.mark.parametrize("events", [False, True])
    def test_what_is_due_and_not_utf_8_does_not_stop_it(
        self, path: str, column: str, events: bool
    ) -> None:
        """A lease that was over ended the worker, for its task could not be read."""
        tasks = TaskRegistry()
        plain = tasks.register(thumbnail)
        with SQLiteBackend(path, events=events) as backend:
            backend.enqueue(plain.task("a"))
            assert backend.queue.dequeue(lease=0.01, worker="w") is not None
            with raw(path) as connection:
                connection.execute(
                    f"UPDATE omniq_task SET {column} = CAST(x'22ff' AS TEXT)"
                )
            last = backend.enqueue(plain.task("b"))
            time.sleep(0.02)
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert backend.result(last, timeout=0).value == "b:128"
            assert backend.results is not None
            assert len(backend.results.list_results()) == 2
        assert statuses(path) == []

    def test_a_queue_whose_name_is_not_utf_8_does_not_keep_others_from_a_cleanup(
        self, path: str
    ) -> None:
        with SQLiteBackend(path) as backend:
            for name in ("a", "b", "c"):
                backend.enqueue(Task("f", queue=name))
                assert backend.queue.dequeue(name, lease=0.01) is not None
            with raw(path) as connection:
                connection.execute(
                    "UPDATE omniq_task SET queue = CAST(x'62ff' AS TEXT) WHERE seq = 2"
                )
            time.sleep(0.02)
            assert backend.cleanup()["settled"] == 2

    def test_where_text_is_not_utf_8_other_queues_are_claimed_once(
        self, path: str
    ) -> None:
        with SQLiteQueue(path) as queue:
            for name in ("a", "a", "b", "b"):
                queue.enqueue(Task("f", queue=name))
            with raw(path) as connection:
                connection.execute(
                    "UPDATE omniq_task SET args = CAST(x'ff' AS TEXT) WHERE seq = 3"
                )
            found = queue.dequeue_many(10, ["a", "b"])
            assert [task.queue for task in found] == ["a", "a", "b"]
            assert len({task.id for task in found}) == 3

    def test_ids_and_keys_that_are_not_utf_8_do_not_collide(self, path: str) -> None:
        text = "CAST(x'6366ff' AS TEXT)"
        with SQLiteQueue(path) as queue:
            for _ in range(3):
                queue.enqueue(Task("f", unique_key="k"))
                with raw(path) as connection:
                    connection.execute(
                        f"UPDATE omniq_task SET id = {text}, unique_key = {text}"
                        " WHERE unique_key = 'k'"
                    )
                task = queue.dequeue()
                assert task is not None
                assert task.unique_key is None
            assert len({task.id for task in queue.list_tasks()}) == 3

    def test_any_exception_is_an_outcome(self, rig: Rig) -> None:
        """One that could not be looked at left the task running for ever."""

        @dataclasses.dataclass(frozen=True)
        class FrozenError(Exception):
            code: int

        class SpareError(Retry):
            def __init__(self) -> None:
                pass

        class SpareTimeout(TaskTimeout):
            def __init__(self) -> None:
                pass

        @rig.tasks.register(name="fail")
        def fail(kind: int) -> None:
            raise [FrozenError(7), SpareError(), SpareTimeout()][kind]

        @rig.tasks.register(name="fail_async")
        async def fail_async(kind: int) -> None:
            fail.function(kind)

        ids = rig.enqueue(
            *(fail.task(kind) for kind in range(3)),
            *(fail_async.task(kind) for kind in range(3)),
        )
        rig.run()
        assert {rig.get(task_id).status for task_id in ids} == {"failed"}

    def test_a_function_that_cancels_itself_has_failed(self, rig: Rig) -> None:
        """It was given back, and ran 600 times in half a second."""

        @rig.tasks.register(max_attempts=2, retry_delay=0)
        async def give_up() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

        [task_id] = rig.enqueue(give_up.task())
        rig.run()
        assert rig.get(task_id).attempt == 2

    def test_what_is_cancelled_before_its_first_step_is_settled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tasks = TaskRegistry()
        take = omniq_sqlite._Shift._take

        @tasks.register
        async def wait() -> None:
            await asyncio.sleep(60)

        def take_and_cancel(shift: Any, task: Task) -> None:
            take(shift, task)
            shift._stop()
            shift._cancel_all()

        async def main() -> float:
            async with AsyncSQLiteBackend(tmp_path / "jobs.db") as backend:
                await backend.enqueue(wait.task())
                began = time.monotonic()
                await AsyncWorker(backend, tasks, grace=0.0).run(signals=False)
                return time.monotonic() - began

        monkeypatch.setattr(omniq_sqlite._Shift, "_take", take_and_cancel)
        assert asyncio.run(main()) < 0.9  # the patience for what does not end is 1 s
        assert statuses(tmp_path / "jobs.db") == ["pending"]

    def test_a_progress_that_cannot_be_stored_costs_no_lease(self, path: str) -> None:
        class Choosy(omniq_sqlite.JSONSerializer):
            def dumps(self, value: Any) -> str:
                if isinstance(value, dict) and "done" in value:
                    raise ValueError("no progress here")
                return str(super().dumps(value))

        tasks = TaskRegistry()

        @tasks.register
        def slow() -> int:
            progress(1)
            time.sleep(1.0)
            return 7

        with SQLiteBackend(path, serializer=Choosy()) as backend:
            task_id = backend.enqueue(slow.task())
            worker = Worker(backend, tasks, lease=0.6)
            worker.run(until_empty=True, signals=False)
            result = backend.result(task_id, timeout=0)
        assert (result.value, result.attempt) == (7, 1)

    def test_a_worker_with_a_long_lease_is_seen_all_the_same(self, rig: Rig) -> None:
        worker = rig.worker(lease=3_600.0)
        core = worker._async if isinstance(worker, Worker) else worker

        async def interval() -> float:
            heartbeat = omniq_sqlite._Heartbeat(cast(Any, None), core, set())
            return heartbeat.interval

        assert asyncio.run(interval()) <= 20.0

    def test_a_flush_that_failed_ends_it(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Behind it no outcome can be written; the leases were extended for ever."""

        @rig.tasks.register
        def pull_the_plug() -> None:
            monkeypatch.setattr(omniq_sqlite._Wal, "flush", refuse_flush)

        rig.enqueue(pull_the_plug.task())
        with pytest.raises(DatabaseAccessError, match="open a new one"):
            rig.run()

    def test_text_that_is_not_utf_8_is_told_and_not_shown(self, rig: Rig) -> None:
        [task_id] = rig.enqueue(Task("f", ("secret",)))
        with raw(rig.path) as connection:
            connection.execute(
                "UPDATE omniq_task SET args = CAST(x'22ff' || args AS TEXT)"
            )
        with pytest.raises(omniq_sqlite.CorruptDatabaseError) as caught:
            rig.backend.queue.get_task(task_id)
        assert "not UTF-8" in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_where_one_not_utf_8_is_due_later_it_waits_for_that(self, rig: Rig) -> None:
        task = Task("f", run_at=datetime.now(UTC) + timedelta(seconds=0.5))
        rig.enqueue(task)
        with raw(rig.path) as connection:
            connection.execute("UPDATE omniq_task SET args = CAST(x'22ff' AS TEXT)")
        rig.run()
        assert rig.backend.queue.stats()[0].failed == 1

    def test_a_column_that_is_not_there_any_more_ends_it(self, rig: Rig) -> None:
        """As a newer version may leave the file, or damage."""
        rig.enqueue(Task("f"))
        with raw(rig.path) as connection:
            connection.execute("DROP VIEW omniq_task_view")
            connection.execute("ALTER TABLE omniq_task RENAME COLUMN progress TO moved")
        with pytest.raises(SchemaVersionError, match="no such column"):
            rig.run()

    def test_importing_loads_nothing_that_few_need(self) -> None:
        code = "import sys, omniq_sqlite; print('ctypes' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=True,
            env=environment(),
        )
        assert done.stdout.strip() == "False"


class TestReviewedWorkers:
    """What a reading of the worker found, in the forms in which it was found."""

    def test_one_that_cancels_itself_in_the_last_batch_has_failed(
        self, rig: Rig
    ) -> None:
        """It was given back unharmed for ever, where `max_tasks` was used up."""

        @rig.tasks.register(max_attempts=2, retry_delay=0)
        async def give_up() -> None:
            inner = asyncio.ensure_future(asyncio.sleep(DEADLINE))
            inner.cancel()
            await inner

        [task_id] = rig.enqueue(give_up.task())
        for _ in range(2):
            rig.perform(rig.worker(), max_tasks=1, until_empty=True)
        task = rig.get(task_id)
        assert (task.status, task.attempt) == ("failed", 2)

    def test_a_record_factory_that_sets_our_fields(
        self, other: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A KeyError of `logging` ended the claims, and the worker never returned."""
        factory = logging.getLogRecordFactory()

        def with_task_id(*args: Any, **terms: Any) -> logging.LogRecord:
            record = factory(*args, **terms)
            record.task_id = "-"
            return record

        logging.setLogRecordFactory(with_task_id)
        try:
            other.enqueue(Task("unknown"), other.tasks.register(thumbnail).task("a"))
            assert other.run() == 0
        finally:
            logging.setLogRecordFactory(factory)
        assert "unknown" in caplog.text

    def test_where_no_thread_can_be_started_tasks_wait(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_LONGEST_PAUSE", 0.05)
        start, refused = threading.Thread.start, list(range(5))

        def limited(thread: threading.Thread) -> None:
            if re.fullmatch(r"w-\d+", thread.name) and refused:
                refused.pop()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        [task_id] = rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        assert rig.run(name="w") == 0
        assert rig.value(task_id) == "a:128"
        assert refused == []

    @pytest.mark.parametrize("is_async", [False, True])
    def test_a_timeout_without_a_grace_ends_the_function(
        self, rig: Rig, is_async: bool
    ) -> None:
        """It was given up in the same moment, never interrupted: status 75."""
        seen: list[str] = []

        @rig.tasks.register(timeout=0.1, max_attempts=1)
        async def wait() -> None:
            try:
                await asyncio.sleep(DEADLINE)
            except BaseException as error:
                seen.append(type(error).__name__)
                raise

        @rig.tasks.register(timeout=0.1, max_attempts=1)
        def sleep() -> None:
            try:
                for _ in range(6_000):
                    time.sleep(0.01)
            except BaseException as error:
                seen.append(type(error).__name__)
                raise

        function: Any = wait if is_async else sleep
        rig.enqueue(function.task())
        assert rig.run(grace=0.0) == 0
        assert seen == ["CancelledError" if is_async else "TaskTimeout"]

    @pytest.mark.parametrize("results", [False, True])
    def test_a_plain_function_whose_body_has_not_run_fails(
        self, path: str, results: bool
    ) -> None:
        """Behind a decorator that knows nothing of async it was "completed"."""

        async def coroutine() -> None:
            raise AssertionError

        def generator() -> Iterator[int]:
            yield 1

        async def async_generator() -> AsyncIterator[int]:
            yield 1

        tasks = TaskRegistry()
        with SQLiteBackend(path, results=results, retention=60) as backend:
            for function in (coroutine, generator, async_generator):
                call_it: Any = function
                tasks.register(
                    lambda call_it=call_it: call_it(), name=function.__name__
                )
                backend.enqueue(Task(function.__name__))
            Worker(backend, tasks).run(until_empty=True, signals=False)
            for task in backend.queue.list_tasks():
                assert (task.status, task.attempt) == ("failed", 1)
                assert "has not run" in str(task.error)

    def test_a_retry_whose_delay_is_no_delay(self, rig: Rig) -> None:
        """Its outcome could never be written, and the lease was held for ever."""

        class LimitError(Retry):
            def __init__(self) -> None:
                super().__init__()
                self.delay = -1.0

        @rig.tasks.register(max_attempts=2, retry_delay=0)
        def limited() -> None:
            raise LimitError

        [task_id] = rig.enqueue(limited.task())
        assert rig.run() == 0
        assert rig.get(task_id).attempt == 2

    def test_sigterm_where_a_function_blocks_the_loop(
        self, start: Callable[..., Program]
    ) -> None:
        program = start("""
            import time
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

            tasks = TaskRegistry()

            @tasks.register
            async def block():
                print("blocks", flush=True)
                while True:
                    time.sleep(0.05)

            with SQLiteBackend("jobs.db") as backend:
                backend.enqueue(block.task())
                Worker(backend, tasks, grace=0.2).run()
            """)
        program.expect("blocks")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 75

    def test_leases_are_extended_by_the_given_clock(self, path: str) -> None:
        """The heartbeat had a pickled copy of it: a task ran three times at once."""
        clock = MovedClock()
        tasks = TaskRegistry()
        runs: list[int] = []

        @tasks.register
        def long() -> None:
            runs.append(1)
            for _ in range(35):
                clock.offset += 0.1
                time.sleep(0.1)

        with SQLiteBackend(path, clock=clock) as backend:
            backend.enqueue(long.task())
            worker = Worker(backend, tasks, lease=3)
            worker.run(until_empty=True, signals=False)
        assert runs == [1]

    def test_a_program_that_collects_all_children_itself(
        self, start: Callable[..., Program]
    ) -> None:
        program = start("""
            import os, signal, threading, time
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

            def reap(*_):
                try:
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                except ChildProcessError:
                    pass

            if __name__ == "__main__":
                signal.signal(signal.SIGCHLD, reap)
                with SQLiteBackend("jobs.db") as backend:
                    worker = Worker(backend, TaskRegistry(), grace=1, name="w")
                    def stop():
                        while len(backend.queue.list_workers()) < 2:
                            time.sleep(0.01)
                        worker.stop()
                    threading.Thread(target=stop).start()
                    worker.run(processes=2)
                print("ended", flush=True)
            """)
        program.expect("ended")
        assert program.end() == 0

    def test_a_generators_exit_that_comes_out_is_a_failure(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=1)
        async def close() -> None:
            raise GeneratorExit

        [task_id] = rig.enqueue(close.task())
        assert rig.run() == 0
        assert rig.get(task_id).status == "failed"

    def test_an_engine_that_fails_at_the_sign_off(self, other: Rig) -> None:
        other.queue.faults += [("reclaim", ConnectionError("gone"))]
        [task_id] = other.enqueue(other.tasks.register(thumbnail).task("a"))
        assert other.run() == 0
        assert other.value(task_id) == "a:128"

    def test_a_copy_of_a_blocking_engine_is_closed(self) -> None:
        closed: list[object] = []
        copied = pickle.loads(
            pickle.dumps(omniq_sqlite._BackendInThreads(cast(Any, ClosableEngine())))
        )
        copied._blocking.closed = closed
        asyncio.run(copied.close())
        assert closed == [copied._blocking]

    def test_a_disk_that_is_full_at_the_start_is_waited_for(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refuse(_self: Any) -> None:
            raise DatabaseFullError("jobs.db")

        monkeypatch.setattr(AsyncSQLiteBackend, "cleanup", refuse)
        [task_id] = rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        assert rig.run() == 0
        assert rig.value(task_id) == "a:128"

    def test_a_callable_with_an_attribute_of_that_name(self, rig: Rig) -> None:
        class Step:
            function = "linear"

            def __call__(self) -> int:
                return 2

        rig.tasks.register(Step(), name="step")
        [task_id] = rig.enqueue(Task("step"))
        assert rig.run() == 0
        assert rig.value(task_id) == 2


class MovedClock:
    """A clock that pickles, as an object of a test may."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


class ClosableEngine:
    """Stands for a blocking backend of another engine that pickles."""

    queue = None

    def close(self) -> None:
        cast(Any, self).closed.append(self)


class TestWorkerArguments:
    def test_each_worker_refuses_the_other_kind_of_backend(
        self, tmp_path: Path
    ) -> None:
        blocking: Any = SQLiteBackend(tmp_path / "a.db")
        asynchronous: Any = AsyncSQLiteBackend(tmp_path / "a.db")
        with pytest.raises(TypeError, match="AsyncWorker takes this one"):
            Worker(asynchronous, TaskRegistry())
        with pytest.raises(TypeError, match="Worker takes this one"):
            AsyncWorker(blocking, TaskRegistry())

    @pytest.mark.parametrize("tasks", [[thumbnail], None])
    def test_what_is_no_registry_is_refused(self, tmp_path: Path, tasks: Any) -> None:
        blocking = SQLiteBackend(tmp_path / "a.db")
        with pytest.raises(TypeError, match="TaskRegistry"):
            Worker(blocking, tasks)
        with pytest.raises(TypeError, match="TaskRegistry"):
            AsyncWorker(blocking.to_async(), tasks)

    def test_what_is_no_backend_is_refused(self, tmp_path: Path) -> None:
        blocking = SQLiteBackend(tmp_path / "a.db")
        wrong: Any
        for wrong in ("a.db", blocking.queue):
            with pytest.raises(TypeError, match="SQLiteBackend"):
                Worker(wrong, TaskRegistry())
        for wrong in ("a.db", blocking.to_async().queue):
            with pytest.raises(TypeError, match="SQLiteBackend"):
                AsyncWorker(wrong, TaskRegistry())

    @pytest.mark.parametrize("closed", ["before", "after"])
    def test_a_closed_backend_is_refused_and_nothing_runs(
        self, path: str, closed: str
    ) -> None:
        tasks = TaskRegistry()
        backend = SQLiteBackend(path)
        backend.enqueue(tasks.register(thumbnail).task("a"))
        worker = Worker(backend, tasks) if closed == "after" else None
        backend.close()
        with pytest.raises(StorageClosedError):
            (worker or Worker(backend, tasks)).run(until_empty=True, signals=False)
        assert statuses(path) == ["pending"]

    @pytest.mark.parametrize(
        "options",
        [{"concurrency": 0}, {"lease": 0}, {"grace": -1}, {"name": ""}, {"queues": []}],
    )
    def test_arguments_out_of_range_are_named(
        self, other: Rig, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            other.worker(**options)

    @pytest.mark.parametrize("terms", [{"max_tasks": 0}, {"processes": 0}])
    def test_terms_out_of_range_are_named(
        self, other: Rig, terms: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=next(iter(terms))):
            other.perform(other.worker(), **terms)

    def test_two_workers_have_two_names(self, other: Rig) -> None:
        assert other.worker().name != other.worker().name
        assert other.worker(name="web").name == "web"


class TestCurrentTask:
    def test_it_is_the_task_that_runs_here(self, rig: Rig) -> None:
        @rig.tasks.register
        def plain() -> str:
            return current_task().id

        @rig.tasks.register
        async def on_loop() -> str:
            await asyncio.sleep(0.001)
            return await asyncio.create_task(inner())

        async def inner() -> str:
            return current_task().id

        ids = rig.enqueue(*(f.task() for f in (plain, on_loop) * 5))
        rig.run()
        assert [rig.value(task_id) for task_id in ids] == ids

    def test_outside_a_task_there_is_none(self) -> None:
        with pytest.raises(RuntimeError, match="inside a task"):
            current_task()

    def test_each_run_has_a_context_of_its_own(self, rig: Rig) -> None:
        level: contextvars.ContextVar[int] = contextvars.ContextVar("level")

        @contextlib.contextmanager
        def lifespan() -> Iterator[None]:
            level.set(1)
            yield

        def raise_level() -> int:
            level.set(level.get() + 1)
            return level.get()

        @rig.tasks.register
        async def raise_async() -> int:
            return raise_level()

        plain = rig.tasks.register(raise_level)
        ids = rig.enqueue(*(f.task() for f in (plain, raise_async) * 3))
        rig.run(lifespan=lifespan, concurrency=1)
        assert [rig.value(task_id) for task_id in ids] == [2] * 6


class TestProgress:
    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_it_shows_in_the_task(self, rig: Rig, kind: str) -> None:
        free = threading.Event()

        @rig.tasks.register(name="plain")
        def plain() -> None:
            progress(3, 10, "reading")
            free.wait(DEADLINE)

        @rig.tasks.register(name="async")
        async def on_loop() -> None:
            progress(3, 10, "reading")
            await asyncio.to_thread(free.wait, DEADLINE)

        [task_id] = rig.enqueue(Task(kind))
        with rig.at_work():
            until(lambda: rig.get(task_id).progress)
            shown = rig.get(task_id).progress
            free.set()
        assert shown == {"done": 3, "total": 10, "message": "reading"}

    def test_it_is_written_at_most_once_in_an_interval(
        self, other: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert omniq_sqlite._PROGRESS_INTERVAL == 1.0
        monkeypatch.setattr(omniq_sqlite, "_PROGRESS_INTERVAL", 0.05)

        @other.tasks.register
        def count() -> float:
            began = time.monotonic()
            for number in itertools.count():
                progress(number)
                if other.queue.count("extend") == 4:
                    break
            return time.monotonic() - began

        [task_id] = other.enqueue(count.task())
        other.run(lease=60.0)
        assert other.value(task_id) > 3 * 0.05

    def test_outside_a_worker_it_does_nothing(self) -> None:
        progress(1, 2, "alone")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "half"])
    def test_a_wrong_number_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match="total"):
            progress(1, value)

    def test_what_was_done_is_a_number_and_the_total_may_be_unknown(
        self, rig: Rig
    ) -> None:
        @rig.tasks.register
        def unknown_total() -> str:
            progress(1, None)
            return "fine"

        @rig.tasks.register(max_attempts=1)
        def nothing_done() -> None:
            progress(cast("float", None))

        fine, wrong = rig.enqueue(unknown_total.task(), nothing_done.task())
        rig.run()
        assert rig.value(fine) == "fine"
        assert "done must be a finite number" in rig.value(wrong)


# -- Outcomes --


class TestOutcome:
    def test_an_exception_is_retried_while_attempts_remain(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=3, retry_delay=0.01)
        def third_time() -> int:
            if current_task().attempt < 3:
                raise ValueError("not yet")
            return current_task().attempt

        [task_id] = rig.enqueue(third_time.task())
        rig.run()
        assert rig.value(task_id) == 3

    def test_without_attempts_left_the_task_has_failed(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=2, retry_delay=0.01)
        async def never() -> None:
            raise ValueError("never")

        [task_id] = rig.enqueue(never.task())
        rig.run()
        task = rig.get(task_id)
        assert (task.status, task.attempt) == (TaskStatus.FAILED, 2)
        result = rig.backend.results.get(task_id)
        assert (result.status, result.error_type) == (ResultStatus.ERROR, "ValueError")
        assert "never" in result.error
        assert "in never" in result.traceback
        assert "_Shift" not in result.traceback
        assert omniq_sqlite.__file__ not in result.traceback

    def test_retry_sets_the_delay(self, rig: Rig) -> None:
        @rig.tasks.register(retry_delay=1000)
        def again() -> int:
            if current_task().attempt == 1:
                raise Retry(0.01)
            return current_task().attempt

        [task_id] = rig.enqueue(again.task())
        rig.run()
        assert rig.value(task_id) == 2

    def test_retry_without_a_delay_takes_the_usual_one(self, other: Rig) -> None:
        @other.tasks.register(retry_delay=0.02)
        def again() -> int:
            if current_task().attempt == 1:
                raise Retry
            return current_task().attempt

        [task_id] = other.enqueue(again.task())
        other.run()
        assert other.value(task_id) == 2

    def test_retry_uses_up_attempts_and_keeps_its_cause(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=2)
        async def again() -> None:
            raise Retry(0) from ConnectionError("unplugged")

        [task_id] = rig.enqueue(again.task())
        rig.run()
        assert rig.get(task_id).status is TaskStatus.FAILED
        assert rig.backend.results.get(task_id).error_type == "ConnectionError"

    def test_a_wrong_delay_is_refused(self) -> None:
        with pytest.raises(ValueError, match="delay"):
            Retry(-1)

    def test_reject_fails_for_good(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=5)
        def refuse() -> None:
            raise Reject("no such customer")

        [task_id] = rig.enqueue(refuse.task())
        rig.run()
        task = rig.get(task_id)
        assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)
        assert "no such customer" in str(task.error)

    def test_a_result_that_cannot_be_stored_fails_without_a_retry(
        self, rig: Rig
    ) -> None:
        @rig.tasks.register(max_attempts=5)
        def strange() -> object:
            return object()

        [task_id] = rig.enqueue(strange.task())
        rig.run()
        task = rig.get(task_id)
        assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)
        result = rig.backend.results.get(task_id)
        assert result.error_type == "SerializationError"

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_an_exit_is_a_failed_attempt(
        self, rig: Rig, kind: str, error: type[BaseException]
    ) -> None:
        @rig.tasks.register(name="plain", max_attempts=1)
        def plain() -> None:
            raise error

        @rig.tasks.register(name="async", max_attempts=1)
        async def on_loop() -> None:
            raise error

        after = rig.tasks.register(thumbnail)
        ids = rig.enqueue(Task(kind, max_attempts=1), after.task("a"))
        assert rig.run(concurrency=1) == 0
        assert rig.get(ids[0]).status is TaskStatus.FAILED
        assert rig.value(ids[1]) == "a:128"

    def test_a_cancellation_of_its_own_is_a_failed_attempt(self, rig: Rig) -> None:
        @rig.tasks.register(max_attempts=1)
        async def give_up() -> None:
            raise asyncio.CancelledError

        [task_id] = rig.enqueue(give_up.task())
        rig.run()
        assert rig.get(task_id).status is TaskStatus.FAILED

    def test_a_wrong_argument_in_the_task_is_a_failed_attempt(self, rig: Rig) -> None:
        rig.tasks.register(thumbnail)
        [task_id] = rig.enqueue(Task("thumbnail", max_attempts=1))
        rig.run()
        assert "path" in str(rig.get(task_id).error)


class TestUnknownName:
    def test_it_is_given_back_for_a_minute_with_a_warning(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        known = rig.tasks.register(thumbnail)
        [task_id, other_id] = rig.enqueue(Task("newer"), known.task("a"))
        before = datetime.now(UTC)
        with rig.at_work():
            until(lambda: rig.get(task_id).status is TaskStatus.SCHEDULED)
            until(lambda: rig.backend.results.get(other_id))
        task = rig.get(task_id)
        assert task.attempt == 0
        assert task.run_at is not None
        wait = task.run_at - before
        assert timedelta(seconds=59) < wait < timedelta(seconds=90)
        assert "newer" in of_worker(caplog, logging.WARNING)[0].getMessage()

    def test_it_fails_where_the_queue_is_to_be_emptied(self, rig: Rig) -> None:
        [task_id] = rig.enqueue(Task("newer", max_attempts=5))
        rig.run()
        assert rig.get(task_id).status is TaskStatus.FAILED
        assert rig.backend.results.get(task_id).error_type == "UnknownTaskError"


class TestUntilEmpty:
    def test_it_waits_for_what_is_scheduled(self, rig: Rig) -> None:
        [task_id] = rig.enqueue(rig.tasks.register(thumbnail).task("a"), delay=0.3)
        rig.run()
        assert rig.value(task_id) == "a:128"

    def test_it_runs_what_its_tasks_enqueue(self, rig: Rig) -> None:
        @rig.tasks.register
        def count_down(number: int) -> None:
            if number:
                rig.enqueue(count_down.task(number - 1))

        rig.enqueue(count_down.task(5))
        rig.run()
        assert rig.queue.count_tasks() == 0
        assert len(rig.backend.results.list_results()) == 6

    def test_a_paused_queue_does_not_count(self, rig: Rig) -> None:
        rig.queue.pause("default")
        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        assert rig.run() == 0
        assert rig.queue.count_tasks(status="pending") == 1

    def test_a_row_of_a_paused_queue_that_cannot_be_read_does_not_count(
        self, rig: Rig
    ) -> None:
        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        rig.queue.pause("default")
        with raw(rig.path) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("UPDATE omniq_task SET metadata = 'Inf'")
            connection.commit()
        assert rig.run() == 0
        assert rig.queue.count_tasks(status="pending") == 1

    def test_what_runs_elsewhere_does_not_count(self, rig: Rig) -> None:
        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        rig.queue.dequeue(worker="elsewhere")
        assert rig.run() == 0
        assert rig.queue.count_tasks(status="running") == 1

    def test_what_expired_does_not_count(self, rig: Rig) -> None:
        plain = rig.tasks.register(thumbnail)
        past = datetime.now(UTC) - timedelta(seconds=1)
        [task_id] = rig.enqueue(plain.options(expires_at=past).task("a"))
        assert rig.run() == 0
        assert rig.get(task_id).status is TaskStatus.EXPIRED

    def test_what_expires_meanwhile_does_not_count(self, rig: Rig) -> None:
        plain = rig.tasks.register(thumbnail)
        soon = datetime.now(UTC) + timedelta(seconds=0.3)
        later = soon + timedelta(hours=1)
        task = plain.options(expires_at=soon, run_at=later).task("a")
        [task_id] = rig.enqueue(task)
        assert rig.run() == 0
        assert rig.get(task_id).status is TaskStatus.EXPIRED


class TestMaxTasks:
    def test_it_ends_after_so_many(self, rig: Rig) -> None:
        plain = rig.tasks.register(thumbnail)
        rig.enqueue(*(plain.task("a") for _ in range(10)))
        assert rig.perform(rig.worker(), max_tasks=7) == 0
        assert len(rig.backend.results.list_results()) == 7
        assert rig.queue.count_tasks(status="pending") == 3


# -- Leases and time --


class TestHeartbeat:
    def test_a_function_that_blocks_the_loop_runs_once(self, rig: Rig) -> None:
        runs: list[int] = []

        @rig.tasks.register(max_attempts=1)
        async def block() -> str:
            runs.append(current_task().attempt)
            time.sleep(2.0)  # noqa: ASYNC251 (that is the point)
            return "done"

        [task_id] = rig.enqueue(block.task())
        with rig.at_work(lease=1.5, name="first"), rig.at_work(lease=1.5):
            until(lambda: rig.backend.results.get(task_id))
        assert runs == [1]
        assert rig.value(task_id) == "done"

    def test_it_runs_in_a_thread_of_its_own(self, other: Rig) -> None:
        @other.tasks.register
        async def block() -> None:
            until(lambda: other.queue.count("extend") >= 2)

        other.enqueue(block.task())
        other.run(lease=0.3, name="w")
        threads = {call[1] for call in other.queue.calls if call[0] == "extend"}
        assert threads
        assert threading.current_thread().name not in threads

    def test_it_has_connections_of_its_own(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gateways: set[int] = set()
        extend = omniq_sqlite.AsyncSQLiteQueue.extend

        async def noted(self: Any, *args: Any, **kwargs: Any) -> Task:
            gateways.add(id(self._gateway.database))
            return await extend(self, *args, **kwargs)

        @rig.tasks.register
        def wait() -> None:
            until(lambda: gateways)

        monkeypatch.setattr(omniq_sqlite.AsyncSQLiteQueue, "extend", noted)
        rig.enqueue(wait.task())
        worker = rig.worker(lease=0.3)
        rig.perform(worker, until_empty=True)
        assert len(gateways) == 1
        assert id(database_of(backend_of(worker).queue)) not in gateways

    def test_a_busy_database_does_not_make_it_give_up(self, other: Rig) -> None:
        busy = DatabaseBusyError("jobs.db", 30.0)
        other.queue.faults += [("extend", busy)] * 2 + [("extend", OSError("odd"))]

        @other.tasks.register
        def wait() -> None:
            until(lambda: other.queue.count("extend") >= 5)

        [task_id] = other.enqueue(wait.task())
        other.run(lease=0.3)
        assert other.get(task_id).status is TaskStatus.COMPLETED

    def test_a_short_task_costs_no_heartbeat(self, other: Rig) -> None:
        plain = other.tasks.register(thumbnail)
        other.enqueue(*(plain.task("a") for _ in range(50)))
        other.run(lease=60.0)
        assert other.queue.count("extend") == 0

    def test_a_claim_that_came_late_is_confirmed_first(self, other: Rig) -> None:
        # As when a function has blocked the loop while the claim was delivered.
        claim = other.queue.claim

        def late(*args: Any) -> list[Task]:
            past = datetime.now(UTC) - timedelta(seconds=1)
            return [other.queue.put(t, lease_until=past) for t in claim(*args)]

        other.queue.claim = late
        plain = other.tasks.register(thumbnail)
        [task_id] = other.enqueue(plain.task("a"))
        other.run()
        assert other.queue.count("extend") == 1
        assert other.value(task_id) == "a:128"

    def test_a_claim_that_came_too_late_is_not_run(self, other: Rig) -> None:
        claim = other.queue.claim
        lost: list[Task] = []

        def late(*args: Any) -> list[Task]:
            past = datetime.now(UTC) - timedelta(seconds=1)
            claimed = [dataclasses.replace(t, lease_until=past) for t in claim(*args)]
            for task in claimed[: 1 - len(lost)]:
                lost.append(task)
                other.queue.put(task, lease_id="another's", lease_until=past)
            return claimed

        other.queue.claim = late
        runs: list[str] = []

        @other.tasks.register
        def note() -> None:
            runs.append(current_task().id)

        ids = other.enqueue(note.task(), note.task())
        other.run(concurrency=1)
        assert runs == [ids[1]]


class TestLostLease:
    def test_it_cancels_an_async_function(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen: list[str] = []

        @rig.tasks.register
        async def wait() -> None:
            seen.append("began")
            try:
                await asyncio.sleep(DEADLINE)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        [task_id] = rig.enqueue(wait.task())
        with rig.at_work(lease=0.3, concurrency=1):
            until(lambda: seen)
            assert rig.queue.cancel(task_id)
            until(lambda: len(seen) == 2)
        assert seen == ["began", "cancelled"]
        assert rig.get(task_id).status is TaskStatus.CANCELLED
        assert rig.get(task_id).attempt == 1
        [record] = of_worker(caplog, logging.WARNING)
        assert "lost its lease" in record.getMessage()

    def test_a_plain_function_learns_of_it_from_progress(self, rig: Rig) -> None:
        seen: list[str] = []

        @rig.tasks.register
        def wait() -> None:
            seen.append("began")
            while True:
                try:
                    progress(1)
                except LeaseLostError as error:
                    seen.extend(error.task_ids)
                    raise
                time.sleep(0.005)

        [task_id] = rig.enqueue(wait.task())
        with rig.at_work(lease=0.3, concurrency=1):
            until(lambda: seen)
            rig.queue.cancel(task_id)
            until(lambda: len(seen) == 2)
        assert seen == ["began", task_id]
        assert rig.get(task_id).status is TaskStatus.CANCELLED

    def test_progress_finds_out_before_the_heartbeat(self, rig: Rig) -> None:
        seen: list[str] = []

        @rig.tasks.register
        def wait() -> None:
            with contextlib.suppress(LeaseLostError):
                while True:
                    progress(len(seen))
                    seen.append("going")
                    time.sleep(0.01)
            seen.clear()

        [task_id] = rig.enqueue(wait.task())
        with rig.at_work(lease=3600.0):
            until(lambda: seen)
            rig.queue.cancel(task_id)
            until(lambda: not seen)

    def test_an_outcome_that_comes_too_late_is_dropped_with_a_warning(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        @rig.tasks.register
        def settle_itself() -> None:
            rig.queue.cancel(current_task().id)

        after = rig.tasks.register(thumbnail)
        ids = rig.enqueue(settle_itself.task(), after.task("a"))
        assert rig.run() == 0
        assert rig.get(ids[0]).status is TaskStatus.CANCELLED
        assert rig.value(ids[1]) == "a:128"
        [record] = of_worker(caplog, logging.WARNING)
        assert "dropped" in record.getMessage()


class TestTimeout:
    def test_an_async_function_is_cancelled_and_retried(self, rig: Rig) -> None:
        @rig.tasks.register(timeout=0.1, retry_delay=0.01)
        async def wait() -> int:
            if current_task().attempt == 1:
                await asyncio.sleep(DEADLINE)
            return current_task().attempt

        [task_id] = rig.enqueue(wait.task())
        rig.run()
        assert rig.value(task_id) >= 2

    def test_a_plain_function_gets_an_exception_in_its_thread(self, rig: Rig) -> None:
        seen: list[tuple[str, float]] = []

        @rig.tasks.register(timeout=0.1, max_attempts=1)
        def wait() -> None:
            try:
                spin(DEADLINE)
            except TaskTimeout as error:
                seen.append((error.task_id, error.timeout))
                raise

        [task_id] = rig.enqueue(wait.task())
        rig.run()
        assert seen == [(task_id, 0.1)]
        result = rig.backend.results.get(task_id)
        assert result.error_type == "TaskTimeout"
        assert task_id in result.error
        assert "0.1 s" in result.error

    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_a_function_that_catches_it_may_still_succeed(
        self, rig: Rig, kind: str
    ) -> None:
        @rig.tasks.register(name="plain")
        def plain() -> str:
            with contextlib.suppress(TaskTimeout):
                spin(DEADLINE)
            return "saved what there was"

        @rig.tasks.register(name="async")
        async def on_loop() -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(DEADLINE)
            await asyncio.sleep(0)
            return "saved what there was"

        [task_id] = rig.enqueue(Task(kind, timeout=0.05))
        rig.run()
        assert rig.value(task_id) == "saved what there was"

    def test_it_does_not_strike_inside_an_operation_of_this_module(
        self, rig: Rig
    ) -> None:
        seen: list[str] = []

        @rig.tasks.register(timeout=0.05, max_attempts=1)
        def operate() -> None:
            omniq_sqlite._operating.add(threading.get_ident())
            try:
                spin(0.3)
            except TaskTimeout:
                seen.append("torn")
            omniq_sqlite._operating.discard(threading.get_ident())
            spin(DEADLINE)

        [task_id] = rig.enqueue(operate.task())
        rig.run()
        assert seen == []
        assert rig.backend.results.get(task_id).error_type == "TaskTimeout"

    def test_one_that_comes_too_late_hits_no_other_task(self, rig: Rig) -> None:
        # Functions that end just when their time is over, and in the same
        # thread others that have no timeout.
        @rig.tasks.register(timeout=0.01, max_attempts=1)
        def just_in_time() -> None:
            spin(0.01)

        @rig.tasks.register(max_attempts=1)
        def unlimited() -> int:
            spin(0.001)
            return 1

        tasks = [f.task() for _ in range(100) for f in (just_in_time, unlimited)]
        ids = rig.queue.enqueue_many(tasks)
        assert rig.run(concurrency=1) == 0
        results = rig.backend.results.get_many(ids)
        assert [results[task_id].value for task_id in ids[1::2]] == [1] * 100
        ended = [results[task_id] for task_id in ids[::2]]
        assert {r.error_type for r in ended} <= {None, "TaskTimeout"}

    def make_run(self, call: Callable[[], object]) -> Any:
        heartbeat: Any = types.SimpleNamespace(interval=1.0)

        class Run(omniq_sqlite._Run):
            """Of a type of its own, to be changed by a test."""

        run = Run(Task("f", timeout=1.0), heartbeat)
        run.call = call
        return run

    def test_it_does_not_strike_a_thread_that_has_gone_on(self) -> None:
        threads = omniq_sqlite._Threads("t", cast(Any, None), print)
        run = self.make_run(lambda: "done")
        threads._perform(run)
        assert not threads.interrupt(run)
        assert run.outcome.value == "done"

    def test_it_may_strike_while_another_error_is_looked_at(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judge = omniq_sqlite._Run.judge

        def strike(run: Any, error: BaseException) -> Any:
            if isinstance(error, ZeroDivisionError):
                raise TaskTimeout
            return judge(run, error)

        monkeypatch.setattr(omniq_sqlite._Run, "judge", strike)
        run = self.make_run(lambda: 1 / 0)
        omniq_sqlite._Threads("t", cast(Any, None), print)._perform(run)
        assert isinstance(run.outcome.error, TaskTimeout)
        assert run.outcome.error.task_id == run.task.id
        assert run.thread is None

    def test_it_may_strike_at_the_last_moment(self) -> None:
        struck: list[str] = []

        class OwnThread:
            @classmethod
            def from_param(cls, _run: object) -> ctypes.c_ulong:
                return ctypes.c_ulong(threading.get_ident())

        class Strike:
            @classmethod
            def from_param(cls, thread: int | None) -> Any:
                if thread is None and not struck:
                    struck.append("now")
                    return ctypes.py_object(TaskTimeout)
                return ctypes.c_void_p()

        # Called when `thread` is set, in C all through: it is raised afterwards.
        raise_in = ctypes.PYFUNCTYPE(
            ctypes.c_int, cast(Any, OwnThread), cast(Any, Strike)
        )
        at_the_end = raise_in(("PyThreadState_SetAsyncExc", ctypes.pythonapi))
        run = self.make_run(lambda: "done")
        type(run).thread = property(lambda run: None, at_the_end)
        omniq_sqlite._Threads("t", cast(Any, None), print)._perform(run)
        assert struck == ["now"]
        assert run.outcome.value == "done"

    def test_until_the_thread_ends_its_slot_and_lease_are_kept(
        self, other: Rig
    ) -> None:
        steps: list[str] = []

        @other.tasks.register(timeout=0.05, max_attempts=1)
        def stubborn() -> None:
            try:
                spin(DEADLINE)
            except TaskTimeout:
                before = other.queue.count("extend")
                until(lambda: other.queue.count("extend") >= before + 3)
                steps.append("ended")
                raise

        @other.tasks.register
        def next_one() -> None:
            steps.append("began")

        ids = other.enqueue(stubborn.task(), next_one.task())
        assert other.run(concurrency=1, lease=0.1, grace=DEADLINE) == 0
        assert steps == ["ended", "began"]
        assert isinstance(other.memory and other.memory.outcomes[ids[0]], TaskTimeout)

    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_a_function_that_does_not_end_ends_the_worker_with_status_75(
        self, rig: Rig, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        free = threading.Event()
        steps: list[str] = []

        @rig.tasks.register(name="plain")
        def plain() -> None:
            while not free.is_set():
                with contextlib.suppress(TaskTimeout):
                    free.wait(0.01)

        @rig.tasks.register(name="async")
        async def on_loop() -> None:
            while not free.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

        @rig.tasks.register
        def finish() -> str:
            steps.append("began")
            until(lambda: len(ids) == 3)
            return "finished"

        ids = rig.enqueue(Task(kind, timeout=0.05, max_attempts=1), finish.task())
        worker = rig.worker(concurrency=2, grace=0.2, lease=0.3)
        rig.after_run = free.set  # `asyncio.run` waits for what cannot be cancelled

        def add_more() -> None:
            until(lambda: of_worker(caplog, logging.ERROR))
            time.sleep(0.05)
            ids.extend(rig.enqueue(finish.task()))

        adding = threading.Thread(target=add_more, daemon=True)
        adding.start()
        try:
            assert rig.perform(worker) == 75
        finally:
            free.set()
        adding.join(DEADLINE)
        assert rig.backend.results.get(ids[0]).error_type == "TaskTimeout"
        assert rig.value(ids[1]) == "finished"
        assert rig.get(ids[2]).status is TaskStatus.PENDING
        assert any(ids[0] in r.getMessage() for r in of_worker(caplog, logging.ERROR))

    def test_a_process_with_status_75_exits_although_the_thread_hangs(
        self, start: Callable[..., Program]
    ) -> None:
        program = start("""
            import sys, threading
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

            tasks = TaskRegistry()

            @tasks.register(timeout=0.05, max_attempts=1)
            def hang():
                threading.Lock().acquire()
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()

            with SQLiteBackend("jobs.db") as backend:
                backend.enqueue(hang.task())
                sys.exit(Worker(backend, tasks, grace=0.1).run())
            """)
        assert program.end() == 75
        assert program.errors == ""

    def test_an_async_function_that_blocks_the_loop_for_ever_ends_the_process(
        self, start: Callable[..., Program]
    ) -> None:
        program = start("""
            import sys, time
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

            tasks = TaskRegistry()

            @tasks.register(timeout=0.05, max_attempts=1)
            async def block():
                while True:
                    time.sleep(0.01)

            with SQLiteBackend("jobs.db") as backend:
                backend.enqueue(block.task())
                sys.exit(Worker(backend, tasks, grace=0.1).run())
            """)
        assert program.end() == 75

    async def test_a_stop_counts_that_comes_together_with_a_timeout(
        self, path: str
    ) -> None:
        async with AsyncSQLiteBackend(path) as backend:
            worker = AsyncWorker(backend, TaskRegistry())
            shift = omniq_sqlite._Shift(worker, omniq_sqlite._ShiftTerms())

            async def claim() -> None:
                await shift._until(lambda: False, 0.01)
                await asyncio.sleep(DEADLINE)

            shift._claimer = asyncio.create_task(claim())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.02, shift._stop)
            spin(0.05)  # both are due when the loop goes on, the timeout first
            await asyncio.wait({shift._claimer}, timeout=1)
            assert shift._claimer.cancelled()

    def test_where_the_process_is_not_the_workers_its_leases_end(
        self, other: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_LAST_WRITES", 0.1)
        over = threading.Event()

        def is_quiet() -> bool:
            before: int = other.queue.count("extend")
            time.sleep(0.3)
            return before > 0 and other.queue.count("extend") <= before

        @other.tasks.register(timeout=0.05, max_attempts=1)
        async def block() -> None:
            until(is_quiet)
            over.set()

        @other.tasks.register
        def wait() -> None:
            over.wait(DEADLINE)

        other.enqueue(block.task(), wait.task())
        assert other.perform(other.worker(grace=0.1, lease=0.1)) == 75
        assert over.is_set()


# -- Around the runs --


class TestWrap:
    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_it_is_entered_around_each_run_where_the_function_runs(
        self, rig: Rig, kind: str
    ) -> None:
        seen: list[tuple[str, int]] = []

        @contextlib.contextmanager
        def wrap(task: Task) -> Iterator[None]:
            seen.append((f"enter {task.func}", threading.get_ident()))
            try:
                yield
            except ValueError:
                seen.append(("error", threading.get_ident()))
                raise
            seen.append(("exit", threading.get_ident()))

        def step() -> None:
            seen.append(("run", threading.get_ident()))
            if current_task().attempt == 1:
                raise ValueError("first")

        @rig.tasks.register(name="plain")
        def plain() -> None:
            step()

        @rig.tasks.register(name="async")
        async def on_loop() -> None:
            step()

        rig.enqueue(Task(kind, retry_delay=0.01))
        rig.run(wrap=wrap)
        names = [name for name, _ in seen]
        enter = f"enter {kind}"
        assert names == [enter, "run", "error", enter, "run", "exit"]
        first, second = ({i for _, i in part} for part in (seen[:3], seen[3:]))
        assert len(first) == len(second) == 1
        assert (first == {threading.get_ident()}) is (kind == "async")

    def test_an_async_one_is_for_async_functions(self, rig: Rig) -> None:
        seen: list[str] = []

        @contextlib.asynccontextmanager
        async def wrap(task: Task) -> AsyncIterator[None]:
            seen.append("enter")
            await asyncio.sleep(0)
            yield
            seen.append("exit")

        @rig.tasks.register
        async def run() -> None:
            seen.append("run")

        plain = rig.tasks.register(thumbnail, max_attempts=1)
        [_, plain_id] = rig.enqueue(run.task(), plain.task("a"))
        rig.run(wrap=wrap)
        assert seen == ["enter", "run", "exit"]
        assert "context manager" in str(rig.get(plain_id).error)

    def test_an_error_in_it_is_a_failed_attempt(self, rig: Rig) -> None:
        def wrap(task: Task) -> Any:
            raise RuntimeError("no connection")

        plain = rig.tasks.register(thumbnail, max_attempts=1)
        [task_id] = rig.enqueue(plain.task("a"))
        assert rig.run(wrap=wrap) == 0
        assert "no connection" in str(rig.get(task_id).error)


class TestLifespan:
    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_it_is_entered_around_the_worker(self, rig: Rig, kind: str) -> None:
        seen: list[str] = []

        @contextlib.contextmanager
        def plain() -> Iterator[None]:
            seen.append("enter")
            yield
            seen.append("exit")

        @contextlib.asynccontextmanager
        async def asynchronous() -> AsyncIterator[None]:
            with plain():
                await asyncio.sleep(0)
                yield

        @rig.tasks.register
        def run() -> None:
            seen.append("run")

        rig.enqueue(run.task(), run.task())
        rig.run(lifespan=plain if kind == "plain" else asynchronous)
        assert seen == ["enter", "run", "run", "exit"]

    def test_an_error_in_it_ends_the_worker(self, rig: Rig) -> None:
        def lifespan() -> Any:
            raise RuntimeError("no connection")

        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        with pytest.raises(RuntimeError, match="no connection"):
            rig.run(lifespan=lifespan)
        assert rig.queue.count_tasks(status="pending") == 1


# -- Stopping --


class TestStop:
    def test_an_idle_worker_stops_at_once(self, rig: Rig) -> None:
        with rig.at_work(grace=DEADLINE) as at_work:
            until(rig.queue.list_workers)
            began = time.monotonic()
            at_work.end()
        assert time.monotonic() - began < SOON
        assert at_work.status == 0

    def test_running_tasks_get_the_grace_and_no_more_are_claimed(
        self, rig: Rig
    ) -> None:
        free = threading.Event()
        began = threading.Semaphore(0)

        @rig.tasks.register
        def hold() -> str:
            began.release()
            free.wait(DEADLINE)
            return "held"

        ids = rig.enqueue(hold.task(), hold.task(), hold.task())
        with rig.at_work(concurrency=2, grace=DEADLINE) as at_work:
            for _ in range(2):
                assert began.acquire(timeout=DEADLINE)
            at_work.worker.stop()
            time.sleep(0.05)
            free.set()
        assert [rig.value(task_id) for task_id in ids[:2]] == ["held", "held"]
        assert rig.get(ids[2]).status is TaskStatus.PENDING
        assert at_work.status == 0

    def test_after_the_grace_async_functions_are_cancelled_and_released(
        self, rig: Rig
    ) -> None:
        began = threading.Event()

        @rig.tasks.register
        async def wait() -> None:
            began.set()
            await asyncio.sleep(DEADLINE)

        [task_id] = rig.enqueue(wait.task())
        with rig.at_work(grace=0.05):
            assert began.wait(DEADLINE)
        task = rig.get(task_id)
        assert (task.status, task.attempt) == (TaskStatus.PENDING, 0)

    def test_after_the_grace_plain_functions_are_left_to_their_lease(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        began, free = threading.Event(), threading.Event()

        @rig.tasks.register
        def hold() -> None:
            began.set()
            free.wait(DEADLINE)

        [task_id] = rig.enqueue(hold.task())
        with rig.at_work(grace=0.05):
            assert began.wait(DEADLINE)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < SOON
        free.set()
        assert rig.get(task_id).status is TaskStatus.RUNNING
        assert "lease" in of_worker(caplog, logging.WARNING)[0].getMessage()

    def test_before_run_it_makes_the_next_run_return(self, rig: Rig) -> None:
        rig.enqueue(rig.tasks.register(thumbnail).task("a"))
        worker = rig.worker()
        worker.stop()
        assert rig.perform(worker) == 0
        assert rig.queue.count_tasks(status="pending") == 1

    async def test_a_claim_under_way_is_given_back_unharmed(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the worker signs off, which ends its leases and counts an attempt."""
        async with AsyncSQLiteBackend(path) as backend:
            worker = AsyncWorker(backend, TaskRegistry())
            run = asyncio.create_task(worker.run(signals=False))
            database = database_of(backend.queue)
            await soon(lambda: database.bell.waiters)
            with monkeypatch.context() as patch:
                patch.setattr(database, "_begin", lambda _: False)  # as if it were busy
                SQLiteQueue(path).enqueue(Task("f"))
                await soon(lambda: database.pending)
                worker.stop()
                await soon(lambda: len(database.pending) > 1)
            await run
            [task] = await backend.queue.list_tasks()
            assert (task.status, task.attempt) == ("pending", 0)

    def test_nothing_is_stranded_by_stopping_at_any_moment(self, rig: Rig) -> None:
        plain = rig.tasks.register(thumbnail)
        rig.queue.enqueue_many([plain.task("a") for _ in range(300)])
        for number in range(10):
            with rig.at_work(concurrency=4):
                time.sleep(0.003 * number)
        left = rig.queue.count_tasks(status="pending")
        assert rig.queue.count_tasks(status="running") == 0
        assert left + len(rig.backend.results.list_results(limit=1000)) == 300

    def test_cancelling_run_releases_async_functions_and_awaits_plain_ones(
        self, tmp_path: Path
    ) -> None:
        tasks = TaskRegistry()
        began = threading.Semaphore(0)
        free = threading.Event()

        @tasks.register
        async def wait() -> None:
            began.release()
            await asyncio.sleep(DEADLINE)

        @tasks.register
        def hold() -> str:
            began.release()
            free.wait(DEADLINE)
            return "held"

        async def main() -> tuple[Task | None, Any]:
            async with AsyncSQLiteBackend(tmp_path / "jobs.db") as backend:
                ids = await backend.enqueue_many([wait.task(), hold.task()])
                worker = AsyncWorker(backend, tasks, grace=DEADLINE)
                running = asyncio.create_task(worker.run(signals=False))
                for _ in range(2):
                    await asyncio.to_thread(began.acquire)
                running.cancel()
                await asyncio.sleep(0.05)
                running.cancel()  # impatience does not lose a claim
                asyncio.get_running_loop().call_later(0.05, free.set)
                with pytest.raises(asyncio.CancelledError):
                    await running
                return (
                    await backend.queue.get_task(ids[0]),
                    (await backend.result(ids[1], timeout=0)).value,
                )

        released, value = asyncio.run(main())
        assert released is not None
        assert (released.status, released.attempt) == (TaskStatus.PENDING, 0)
        assert value == "held"


WORKER_PROGRAM = """
    import asyncio, signal, sys, threading, time
    from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

    tasks = TaskRegistry()

    @tasks.register
    async def wait():
        print("began", flush=True)
        await asyncio.sleep(60)

    @tasks.register
    def hold(seconds):
        print("began", flush=True)
        time.sleep(seconds)
        print("ended", flush=True)

    @tasks.register
    async def block():
        print("began", flush=True)
        while True:
            time.sleep(0.01)

    func, grace, signals = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "True"
    args = [float(a) for a in sys.argv[4:]]
    with SQLiteBackend("jobs.db") as backend:
        backend.enqueue(tasks[func].task(*args))
        worker = Worker(backend, tasks, grace=grace)
        status = worker.run(signals=signals)
    print("status", status, flush=True)
    sys.exit(status)
    """


@POSIX
class TestSignals:
    def left(self, folder: Path) -> list[tuple[str, int]]:
        with SQLiteBackend(folder / "jobs.db") as backend:
            return [(str(t.status), t.attempt) for t in backend.queue.list_tasks()]

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_gives_running_tasks_the_grace(
        self, start: Callable[..., Program], tmp_path: Path, signum: int
    ) -> None:
        program = start(WORKER_PROGRAM, "hold", 20, True, 0.5)
        program.expect("began")
        program.process.send_signal(signum)
        program.expect("ended", "status 0")
        assert program.end() == 0
        assert self.left(tmp_path) == []

    def test_then_async_ones_are_released(
        self, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        program = start(WORKER_PROGRAM, "wait", 0.1, True)
        program.expect("began")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
        assert self.left(tmp_path) == [("pending", 0)]

    def test_then_threads_are_left_to_their_lease_while_the_process_exits(
        self, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        program = start(WORKER_PROGRAM, "hold", 0.1, True, 60)
        program.expect("began")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0
        assert self.left(tmp_path) == [("running", 1)]

    @pytest.mark.parametrize("func", ["wait", "block"])
    def test_the_second_ends_at_once(
        self, start: Callable[..., Program], func: str
    ) -> None:
        program = start(WORKER_PROGRAM, func, 60, True)
        program.expect("began")
        program.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert program.process.poll() is None
        while program.process.poll() is None:  # one that comes too soon is lost
            program.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert program.end() == -signal.SIGINT

    def test_without_handling_ctrl_c_strands_nothing_and_is_raised(
        self, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        program = start(WORKER_PROGRAM, "wait", 60, False)
        program.expect("began")
        program.process.send_signal(signal.SIGINT)
        assert program.end() != 0
        assert program.errors.rstrip().endswith("KeyboardInterrupt")
        assert self.left(tmp_path) == [("pending", 0)]

    def test_handlers_are_put_back(self, rig: Rig) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        seen: list[Any] = []

        @rig.tasks.register
        def look() -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

        rig.enqueue(look.task())
        worker = Worker(rig.backend, rig.tasks)
        worker.run(until_empty=True)
        assert seen[0] not in (before[1], None)
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        assert after == before

    def test_none_are_handled_in_another_thread_or_unasked(self, rig: Rig) -> None:
        before = signal.getsignal(signal.SIGTERM)
        seen: list[Any] = []

        @rig.tasks.register
        def look() -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

        rig.enqueue(look.task())
        rig.run()
        rig.enqueue(look.task())
        worker = Worker(rig.backend, rig.tasks)
        thread = threading.Thread(target=worker.run, kwargs={"until_empty": True})
        thread.start()
        thread.join(DEADLINE)
        assert seen == [before, before]


# -- Child processes --


CREW_PROGRAM = """
    import asyncio, logging, multiprocessing, os, signal, sys, threading, time
    from omniq_sqlite import (
        AsyncSQLiteBackend, AsyncWorker, SQLiteBackend, TaskRegistry, Worker,
        current_task,
    )

    tasks = TaskRegistry()

    @tasks.register
    def who():
        return [current_task().worker, os.getpid()]

    @tasks.register
    def kill():
        if current_task().attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return current_task().worker

    @tasks.register(timeout=0.1, max_attempts=1)
    def hang():
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    @tasks.register
    def leave_a_thread():
        from concurrent.futures import ThreadPoolExecutor

        ThreadPoolExecutor().submit(time.sleep, 600)

    @tasks.register
    def slow():
        time.sleep(1.5)

    @tasks.register
    async def wait():
        os.write(1, f"{os.getpid()}\\n".encode())  # whole, beside other processes
        await asyncio.sleep(60)

    def main(run):
        with SQLiteBackend("jobs.db") as backend:
            run(backend, Worker(backend, tasks, name="crew", grace=0.5, concurrency=2))
    """


def crew_program(body: str) -> str:
    """Return a program that runs `body` with a backend and a worker."""
    text = textwrap.dedent(CREW_PROGRAM)
    text += "\ndef run(backend, worker):\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    return text + "\nif __name__ == '__main__':\n    main(run)\n"


Crew = Callable[[str], Program]


@pytest.fixture
def crew(start: Callable[..., Program]) -> Crew:
    return lambda body: start(crew_program(body))


class TestWorkerProcesses:
    def test_the_children_are_named_and_share_the_work(self, crew: Crew) -> None:
        program = crew("""
            ids = backend.enqueue_many([who.task() for _ in range(200)])
            print(worker.run(until_empty=True, processes=2))
            found = [r.value for r in backend.results.get_many(ids).values()]
            print(len(found), os.getpid() in {pid for _, pid in found})
            print(*sorted({name for name, _ in found} | {"crew-1", "crew-2"}))
            print(backend.queue.list_workers())
            """)
        program.expect("0", "200 False", "crew-1 crew-2", "[]")
        assert program.end() == 0
        assert program.errors == ""

    def test_a_child_that_dies_is_replaced_and_its_task_reclaimed_at_once(
        self, crew: Crew
    ) -> None:
        program = crew("""
            task_id = backend.enqueue(kill.task())
            started = time.monotonic()
            print(worker.run(until_empty=True, processes=1 + 1))
            print(backend.result(task_id, timeout=0).value.startswith("crew-"))
            print(time.monotonic() - started < 30, backend.result(task_id).attempt)
            """)
        program.expect("0", "True", "True 2")
        assert program.end() == 0

    def test_a_child_that_is_killed_while_it_starts_is_replaced_as_well(
        self, start: Callable[..., Program]
    ) -> None:
        killed_once = """
            import os, signal
            if __name__ == "__mp_main__" and not os.path.exists("killed"):
                open("killed", "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
            """
        program = start(
            textwrap.dedent(killed_once)
            + crew_program("""
            task_id = backend.enqueue(who.task())
            print(worker.run(until_empty=True, processes=2, max_tasks=9))
            print(os.path.exists("killed"), backend.status(task_id))
            """)
        )
        program.expect("0", "True completed")
        assert program.end() == 0

    def test_a_child_is_replaced_after_max_tasks_under_another_name(
        self, crew: Crew
    ) -> None:
        program = crew("""
            import logging

            logging.basicConfig()
            ids = backend.enqueue_many([who.task() for _ in range(6)])
            print(worker.run(until_empty=True, processes=2, max_tasks=2))
            found = [r.value for r in backend.results.get_many(ids).values()]
            print(len({tuple(who) for who in found}) >= 3)
            print(len({name for name, _ in found}) == len({pid for _, pid in found}))
            """)
        program.expect("0", "True", "True")
        assert program.end() == 0
        assert program.errors == ""  # as planned

    def test_a_child_whose_exit_waits_for_a_thread_ends_all_the_same(
        self, crew: Crew
    ) -> None:
        program = crew("""
            ids = backend.enqueue_many([leave_a_thread.task() for _ in range(4)])
            print(worker.run(until_empty=True, processes=2, max_tasks=1))
            print(len(backend.results.get_many(ids)))
            """)
        program.expect("0", "4")
        assert program.end() == 0

    @POSIX
    def test_the_ends_of_children_are_seen_where_they_were_ignored(
        self, crew: Crew
    ) -> None:
        program = crew("""
            import signal

            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as over exec
            task_id = backend.enqueue(who.task())
            print(worker.run(until_empty=True, processes=2))
            print(backend.status(task_id))
            """)
        program.expect("0", "completed")
        assert program.end() == 0

    def test_a_child_has_its_grace_also_where_that_is_longer_than_the_lease(
        self, crew: Crew
    ) -> None:
        program = crew("""
            task_id = backend.enqueue(slow.task())
            worker = Worker(backend, tasks, lease=0.4, grace=30)
            def stop():
                while backend.status(task_id) != "running":
                    time.sleep(0.01)
                time.sleep(0.2)
                worker.stop()
            threading.Thread(target=stop).start()
            print(worker.run(processes=2))
            print(backend.result(task_id, timeout=0).attempt)
            """)
        program.expect("0", "1")
        assert program.end() == 0
        assert "sign of life" not in program.errors

    def test_a_child_that_cannot_be_started_is_started_later(self, crew: Crew) -> None:
        program = crew("""
            ids = backend.enqueue_many([who.task() for _ in range(6)])
            import omniq_sqlite

            real, made = omniq_sqlite._Child.__init__, []
            def init(child, *args):
                made.append(args)
                if len(made) == 3:
                    raise OSError(11, "Resource temporarily unavailable")
                real(child, *args)
            omniq_sqlite._Child.__init__ = init
            print(worker.run(until_empty=True, processes=2, max_tasks=2))
            print(len(backend.results.get_many(ids)), len(made) > 3)
            """)
        program.expect("0", "6 True")
        assert program.end() == 0

    def test_a_child_with_a_function_that_hangs_is_replaced(self, crew: Crew) -> None:
        program = crew("""
            ids = [backend.enqueue(hang.task()), backend.enqueue(who.task(), delay=2)]
            print(worker.run(until_empty=True, processes=2))
            print(*(backend.result(i, timeout=0).error_type for i in ids))
            """)
        program.expect("0", "TaskTimeout None")
        assert program.end() == 0

    @POSIX
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_them_all(
        self, crew: Crew, tmp_path: Path, signum: int
    ) -> None:
        program = crew("""
            backend.enqueue_many([wait.task(), wait.task(), wait.task()])
            print("status", worker.run(processes=2))
            """)
        pids = {int(program.line()) for _ in range(3)}
        if signum == signal.SIGINT:
            os.killpg(program.process.pid, signum)  # as a terminal does
        else:
            program.process.send_signal(signum)
        program.expect("status 0")
        assert program.end() == 0
        assert program.errors == ""
        assert not any(is_alive(pid) for pid in pids)
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            tasks = backend.queue.list_tasks()
        assert [(t.status, t.attempt) for t in tasks] == [("pending", 0)] * 3

    @POSIX
    def test_ctrl_c_while_they_start_leaves_no_traceback(
        self, crew: Crew, start: Callable[..., Program]
    ) -> None:
        program = crew("""
            def tell():
                while not multiprocessing.active_children():
                    time.sleep(0.001)
                os.write(1, b"go\\n")

            threading.Thread(target=tell, daemon=True).start()
            print("status", worker.run(processes=2))
            """)
        program.expect("go")
        time.sleep(0.05)
        os.killpg(program.process.pid, signal.SIGINT)
        program.expect("status 0")
        assert program.end() == 0
        assert program.errors == ""

    @POSIX
    def test_ctrl_c_that_is_not_handled_stops_them_and_is_raised(
        self, crew: Crew, tmp_path: Path
    ) -> None:
        program = crew("""
            backend.enqueue_many([wait.task(), wait.task(), wait.task()])
            worker.run(processes=2, signals=False)
            """)
        pids = {int(program.line()) for _ in range(3)}
        began = time.monotonic()
        os.killpg(program.process.pid, signal.SIGINT)
        assert program.end() != 0
        assert time.monotonic() - began < SOON
        assert program.errors.rstrip().endswith("KeyboardInterrupt")
        assert program.errors.count("Traceback") == 1
        assert not any(is_alive(pid) for pid in pids)
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            assert backend.queue.count_tasks(status="pending") == 3

    @POSIX
    def test_they_do_not_outlive_a_parent_that_was_killed(
        self, crew: Crew, tmp_path: Path
    ) -> None:
        program = crew("""
            backend.enqueue_many([wait.task(), wait.task(), wait.task()])
            worker.run(processes=2)
            """)
        pids = {int(program.line()) for _ in range(3)}
        program.process.kill()
        until(lambda: not any(is_alive(pid) for pid in pids))
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            assert backend.queue.count_tasks(status="pending") == 3

    def test_an_async_worker_has_them_too_and_can_be_stopped(self, crew: Crew) -> None:
        program = crew("""
            async def main():
                async with AsyncSQLiteBackend("jobs.db") as backend:
                    ids = await backend.enqueue_many([who.task() for _ in range(9)])
                    worker = AsyncWorker(backend, tasks, name="async")
                    running = asyncio.create_task(worker.run(processes=2))
                    found = [(await backend.result(i, timeout=30)).value for i in ids]
                    worker.stop()
                    print(await running, {n[:6] for n, _ in found} == {"async-"})

            asyncio.run(main())
            """)
        program.expect("0 True")
        assert program.end() == 0

    def test_each_child_enters_the_lifespan(
        self, start: Callable[..., Program]
    ) -> None:
        source = crew_program("""
            worker = Worker(backend, tasks, lifespan=span)
            backend.enqueue_many([who.task() for _ in range(4)])
            worker.run(until_empty=True, processes=2)
            """)
        span = """
            import contextlib

            @contextlib.contextmanager
            def span():
                os.write(1, b"enter\\n")
                yield

            def run("""
        program = start(source.replace("def run(", textwrap.dedent(span), 1))
        program.expect("enter", "enter")
        assert program.end() == 0

    def test_a_function_that_they_cannot_import_is_an_error_at_once(
        self, rig: Rig
    ) -> None:
        rig.tasks.register(lambda: None, name="inner")
        with pytest.raises(TypeError, match="importable"):
            rig.perform(rig.worker(), processes=2)
        assert multiprocessing.active_children() == []

    def test_a_program_without_a_main_guard_is_told_so(
        self, start: Callable[..., Program]
    ) -> None:
        source = crew_program("worker.run(processes=2)")
        program = start(source.replace("if __name__ == '__main__':", "if True:"))
        assert program.end() == 1
        assert "before it was ready" in program.errors.splitlines()[-1]

    def test_a_program_that_forgets_to_stop_them_exits(
        self, crew: Crew, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        program = crew("""
            backend.enqueue(wait.task())
            run = lambda: worker.run(processes=2)
            threading.Thread(target=run, daemon=True).start()
            while not os.path.exists("end"):
                time.sleep(0.01)
            """)
        pid = int(program.line())
        (tmp_path / "end").touch()
        assert program.end() == 0
        until(lambda: not is_alive(pid))


# -- Trouble --


class TestTrouble:
    @pytest.mark.parametrize(
        "error", [DatabaseBusyError("jobs.db", 30.0), OSError("odd"), ConnectionError()]
    )
    def test_a_claim_that_fails_is_tried_again(
        self, other: Rig, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        other.queue.faults += [("dequeue_many", error)] * 2
        [task_id] = other.enqueue(other.tasks.register(thumbnail).task("a"))
        assert other.run() == 0
        assert other.value(task_id) == "a:128"
        assert len(of_worker(caplog, logging.WARNING)) == 2

    @pytest.mark.parametrize("name", ["complete", "fail", "release"])
    def test_an_outcome_is_written_until_it_is_written(
        self, other: Rig, name: str
    ) -> None:
        busy = DatabaseBusyError("jobs.db", 30.0)
        other.queue.faults += [(name, busy), (name, OSError("odd"))]
        plain = other.tasks.register(thumbnail)
        func = {"complete": "thumbnail", "fail": "thumbnail", "release": "newer"}[name]
        args = ("a",) if name == "complete" else ()
        [task_id] = other.enqueue(Task(func, args, max_attempts=1))
        assert plain
        with other.at_work():
            until(
                lambda: (
                    other.get(task_id).status
                    is {
                        "complete": TaskStatus.COMPLETED,
                        "fail": TaskStatus.FAILED,
                        "release": TaskStatus.SCHEDULED,
                    }[name]
                )
            )
        assert other.queue.count(name) == 3

    def test_a_lease_that_is_lost_meanwhile_ends_the_tries(self, other: Rig) -> None:
        busy = DatabaseBusyError("jobs.db", 30.0)
        other.queue.faults += [("complete", busy)]
        seen: list[str] = []

        @other.tasks.register
        def note() -> None:
            seen.append(current_task().id)
            other.queue.cancel(current_task().id)

        other.enqueue(note.task())
        assert other.run() == 0
        assert len(seen) == 1
        assert other.queue.count("complete") == 2

    @pytest.mark.parametrize("name", ["dequeue_many", "complete"])
    def test_a_damaged_file_ends_the_worker(self, other: Rig, name: str) -> None:
        damaged = CorruptDatabaseError("jobs.db", "malformed")
        other.queue.faults += [(name, damaged)]
        [task_id] = other.enqueue(other.tasks.register(thumbnail).task("a"))
        with pytest.raises(CorruptDatabaseError):
            other.run()
        still = "running" if name == "complete" else "pending"
        assert other.get(task_id).status == still

    def test_a_serializer_that_raises_anything_fails_the_task(self, other: Rig) -> None:
        other.queue.faults += [("complete", TypeError("not JSON serializable"))]
        [task_id] = other.enqueue(other.tasks.register(thumbnail).task("a"))
        other.run()
        assert other.get(task_id).status is TaskStatus.FAILED
        assert other.value(task_id) == "not JSON serializable"

    def test_outcomes_that_cannot_be_written_stop_the_claims(self, other: Rig) -> None:
        busy = DatabaseBusyError("jobs.db", 30.0)
        other.queue.faults += [("complete", busy)] * 1000

        @other.tasks.register
        async def nothing() -> None: ...

        other.enqueue(*(nothing.task() for _ in range(50)))
        with other.at_work(concurrency=4, grace=0.0):
            until(lambda: other.queue.count("complete") >= 20)
            claimed = sum(task.attempt for task in other.queue.rows.values())
            assert claimed <= 12

    def test_a_backend_that_was_closed_ends_it(self, other: Rig) -> None:
        closed = StorageClosedError("jobs.db")
        other.queue.faults += [("dequeue_many", closed)]
        with pytest.raises(StorageClosedError):
            other.run()

    def test_an_outcome_for_a_closed_backend_is_left_to_its_lease(
        self, other: Rig
    ) -> None:
        closed = StorageClosedError("jobs.db")

        @other.tasks.register
        def close() -> None:
            other.queue.faults += [("dequeue_many", closed)]
            other.queue.faults += [("complete", closed)] * 1000

        other.enqueue(close.task())
        with pytest.raises(StorageClosedError):
            other.run()

    def test_a_failure_that_cannot_be_written_does_not_end_it(self, other: Rig) -> None:
        other.queue.faults += [("complete", ValueError("odd")), ("fail", TypeError())]
        ids = other.enqueue(other.tasks.register(thumbnail).task("a"))
        assert other.run() == 0
        assert other.get(ids[0]).status is TaskStatus.FAILED

    def test_a_claim_that_comes_after_the_stop_is_given_back(self, other: Rig) -> None:
        plain = other.tasks.register(thumbnail)
        claim, asked, ended = other.queue.claim, threading.Event(), threading.Event()

        def slow(*args: Any) -> list[Task]:
            asked.set()
            time.sleep(0.1)
            claimed = cast(list[Task], claim(*args))
            ended.set()
            return claimed

        other.queue.claim = slow
        [task_id] = other.enqueue(plain.task("a"))
        with other.at_work():
            assert asked.wait(DEADLINE)
        assert ended.wait(DEADLINE)
        status = other.get(task_id).status
        assert status in (TaskStatus.PENDING, TaskStatus.COMPLETED)

    def test_a_busy_database_at_the_start_does_not_end_it(self, other: Rig) -> None:
        other.queue.faults += [("cleanup", DatabaseBusyError("jobs.db", 30.0))]
        [task_id] = other.enqueue(other.tasks.register(thumbnail).task("a"))
        assert other.run() == 0
        assert other.value(task_id) == "a:128"

    def test_it_cleans_up_now_and_then_and_survives_a_failure(
        self, other: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_CLEANUP_INTERVAL", 0.02)
        with other.at_work():
            until(lambda: other.queue.count("cleanup") >= 2)
            other.queue.faults += [("cleanup", OSError("odd"))]
            until(lambda: not other.queue.faults)
            count = other.queue.count("cleanup")
            until(lambda: other.queue.count("cleanup") > count)


class Unreadable(BaseException):
    def __str__(self) -> str:
        raise ValueError("no text")


class TestAttacks:
    """What functions and operators do to a worker; the long form is a benchmark."""

    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_an_exception_without_a_text_is_a_failed_attempt(
        self, rig: Rig, kind: str
    ) -> None:
        @rig.tasks.register(name="plain")
        def plain() -> None:
            raise Unreadable

        @rig.tasks.register(name="async")
        async def on_loop() -> None:
            raise Unreadable

        [task_id] = rig.enqueue(Task(kind, max_attempts=2, retry_delay=0.01))
        assert rig.run() == 0
        assert rig.get(task_id).status is TaskStatus.FAILED
        assert "Unreadable" in str(rig.get(task_id).error)

    def test_a_worker_over_a_deleted_file_ends_with_an_error_that_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "jobs.db"
        tasks = TaskRegistry()

        @tasks.register
        def delete() -> None:
            path.unlink()

        with SQLiteBackend(path) as backend:
            backend.queue.enqueue(delete.task())
            with pytest.raises(DatabaseReplacedError):
                Worker(backend, tasks).run()
        assert "is left to its lease" in caplog.text

    @POSIX
    @pytest.mark.parametrize(
        ("kind", "end"), [("plain", "return"), ("on_loop", "sys.exit(3)")]
    )
    def test_a_process_that_a_function_forks_is_no_second_worker(
        self, start: Callable[..., Program], kind: str, end: str
    ) -> None:
        program = start(f"""
            import os, sys, warnings
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker

            warnings.simplefilter("ignore")  # of a fork beside threads
            tasks = TaskRegistry()

            @tasks.register(max_attempts=1)
            def plain():
                pid = os.fork()
                if pid == 0:
                    {end}
                return pid

            @tasks.register(max_attempts=1)
            async def on_loop():
                return plain()

            @tasks.register
            def after():
                return os.getpid()

            with SQLiteBackend("jobs.db") as backend:
                ids = [backend.enqueue(tasks[{kind!r}].task())]
                ids += [backend.enqueue(after.task()) for _ in range(20)]
                worker = Worker(backend, tasks, concurrency=1)
                worker.run(until_empty=True)
                child, *pids = [backend.result(i, timeout=0).value for i in ids]
                print(set(pids) == {{os.getpid()}})
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            """)
        program.expect("True", "1")
        assert program.end() == 0

    def test_a_function_that_ends_its_process_uses_up_its_attempts(
        self, start: Callable[..., Program]
    ) -> None:
        source = crew_program("""
            task_id = backend.enqueue(leave.task())
            others = [backend.enqueue(who.task(), delay=0.5) for _ in range(3)]
            print(worker.run(until_empty=True, processes=2))
            task = backend.queue.get_task(task_id)
            print(task.status, task.attempt)
            print(len(backend.results.get_many(others)))
            """)
        leave = """
            @tasks.register(max_attempts=2)
            def leave():
                os._exit(7)

            def run("""
        program = start(source.replace("def run(", textwrap.dedent(leave), 1))
        program.expect("0", "failed 2", "3")
        assert program.end() == 0

    @POSIX
    @pytest.mark.parametrize("how", ["hold the lock", "stop"])
    def test_a_child_without_a_sign_of_life_is_replaced(
        self, start: Callable[..., Program], how: str
    ) -> None:
        source = crew_program(f"""
            logging.basicConfig(level=logging.ERROR, stream=sys.stdout)
            task_id = backend.enqueue(stall.task({how!r}))
            worker = Worker(backend, tasks, name="crew", lease=1.0, grace=0.5)
            print(worker.run(until_empty=True, processes=2))
            print(backend.queue.get_task(task_id).status)
            """)
        stall = """
            import re

            @tasks.register(max_attempts=1)
            def stall(how):
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                re.match("(a+)+$", "a" * 60 + "b")  # without end, in C

            def run("""
        program = start(source.replace("def run(", textwrap.dedent(stall), 1))
        assert "no sign of life" in program.line()
        program.expect("0", "failed")
        assert program.end() == 0

    @POSIX
    def test_a_worker_stopped_beyond_its_lease_changes_nothing_afterwards(
        self, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        program = start("""
            import logging, sys, time
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker, progress

            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            tasks = TaskRegistry()

            @tasks.register
            def hold():
                print("began", flush=True)
                while True:  # until its lease is lost
                    progress(1)
                    time.sleep(0.01)

            with SQLiteBackend("jobs.db") as backend:
                task_id = backend.enqueue(hold.task())
                Worker(backend, tasks, lease=0.5, name="zombie").run()
            """)
        program.expect("began")
        program.process.send_signal(signal.SIGSTOP)
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            task = backend.queue.dequeue(timeout=DEADLINE)
            assert task is not None
            program.process.send_signal(signal.SIGCONT)
            while "lost its lease" not in program.line():
                pass
            program.process.send_signal(signal.SIGTERM)
            assert program.end() == 0
            assert backend.results.get(task.id) is None  # type: ignore[union-attr]
            backend.complete(task, "ours")
            assert backend.result(task.id, timeout=0).value == "ours"

    @POSIX
    @pytest.mark.parametrize("how", ["sleep", "stop"])
    def test_what_runs_while_the_machine_sleeps_runs_once(
        self, start: Callable[..., Program], tmp_path: Path, how: str
    ) -> None:
        (tmp_path / "machine.py").write_text(
            textwrap.dedent("""
                import os, time

                awake = time.time

                def now():
                    return awake() + 3_600 * os.path.exists("slept")

                time.time = now
                """)
        )
        source = """
            import machine, sys, time
            from omniq_sqlite import SQLiteBackend, TaskRegistry, Worker, current_task

            tasks = TaskRegistry()

            @tasks.register
            def nap():
                with open("runs", "a") as file:
                    file.write(current_task().id + "\\n")
                time.sleep(6.5)

            if __name__ == "__main__":
                name, lease = sys.argv[1], float(sys.argv[2])
                with SQLiteBackend("jobs.db") as backend:
                    Worker(backend, tasks, name=name, lease=lease).run(processes=2)
            """
        lease = 60 if how == "sleep" else 2
        crews = [start(source, name, lease) for name in ("one", "two")]
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            assert backend.results is not None
            until(lambda: len(backend.queue.list_workers()) == 4)
            ids = backend.enqueue_many([Task("nap") for _ in range(6)])
            runs = tmp_path / "runs"
            until(lambda: runs.exists() and len(runs.read_text().split()) == 6)
            if how == "sleep":
                (tmp_path / "slept").touch()
            else:
                for crew in crews:
                    os.killpg(crew.process.pid, signal.SIGSTOP)
                time.sleep(4)
                for crew in crews:
                    os.killpg(crew.process.pid, signal.SIGCONT)
            backend.enqueue(Task("nap"))  # wakes all who wait
            for task_id in ids:
                result = backend.results.wait(task_id, timeout=DEADLINE)
                assert result.attempt == 1  # `result` would settle what is due
            assert set(Counter(runs.read_text().split()).values()) == {1}
        for crew in crews:
            crew.process.send_signal(signal.SIGTERM)

    @POSIX
    def test_kills_at_random_moments_leave_nothing_stuck_or_done_twice(
        self, start: Callable[..., Program], tmp_path: Path
    ) -> None:
        source = crew_program("worker.run(processes=2)")
        chance = random.Random(7)
        with SQLiteBackend(tmp_path / "jobs.db", events=True) as backend:
            ids = backend.enqueue_many(
                [Task("nap", max_attempts=100, retry_delay=0.01) for _ in range(300)]
            )
            nap = """
                @tasks.register
                def nap():
                    time.sleep(0.01)

                def run("""
            source = source.replace("def run(", textwrap.dedent(nap), 1)
            source = source.replace('"jobs.db"', '"jobs.db", events=True')
            for _ in range(2):
                program = start(source)
                done = backend.results.list_results  # type: ignore[union-attr]
                before = len(done(limit=1000))
                until(lambda: before < len(done(limit=1000)) or before == 300)  # noqa: B023
                time.sleep(chance.random() / 5)
                workers = [w.pid for w in backend.queue.list_workers()]
                victim = chance.choice([program.process.pid, *workers])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                time.sleep(chance.random() / 5)
                program.kill()
            for worker in backend.queue.list_workers():
                backend.queue.reclaim(worker.name)
            tasks = TaskRegistry()
            tasks.register(lambda: None, name="nap")
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert len(backend.results.get_many(ids)) == 300  # type: ignore[union-attr]
            events = backend.events.query(type="completed", limit=1000)  # type: ignore[union-attr]
            assert sorted(str(e.task_id) for e in events) == sorted(ids)
            assert backend.queue.count_tasks() == 0


class TestWorkerLogging:
    def test_start_and_stop_are_one_line_each(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "omniq_sqlite")
        rig.run(name="web")
        records = of_worker(caplog, logging.INFO)
        assert [r.getMessage() for r in records] == [
            "worker web starts",
            "worker web stops",
        ]
        assert {r.__dict__["worker"] for r in records} == {"web"}

    def test_a_stop_is_told_once_if_tasks_run(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "omniq_sqlite")
        began, free = threading.Semaphore(0), threading.Event()

        @rig.tasks.register
        def hold() -> None:
            began.release()
            free.wait(DEADLINE)

        with rig.at_work(name="idle"):
            until(rig.queue.list_workers)
        rig.enqueue(hold.task(), hold.task())
        with rig.at_work(name="web", grace=DEADLINE) as at_work:
            for _ in range(2):
                assert began.acquire(timeout=DEADLINE)
            at_work.worker.stop()
            at_work.worker.stop()
            until(lambda: len(of_worker(caplog, logging.INFO)) > 3)
            free.set()
        messages = [r.getMessage() for r in of_worker(caplog, logging.INFO)]
        [told] = [message for message in messages if "may run" in message]
        assert told.endswith("stops; 2 tasks may run for 30 s more")

    def test_a_retry_is_a_warning_and_a_final_failure_an_error_with_traceback(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        @rig.tasks.register(max_attempts=2, retry_delay=0.01)
        def never(password: str) -> None:
            raise ValueError("never")

        [task_id] = rig.enqueue(never.task("secret"))
        rig.run(name="web")
        [warning] = of_worker(caplog, logging.WARNING)
        [error] = of_worker(caplog, logging.ERROR)
        facts = {"task_id": task_id, "queue": "default", "func": "never"}
        assert facts.items() <= warning.__dict__.items()
        assert facts.items() <= error.__dict__.items()
        assert (warning.__dict__["attempt"], error.__dict__["attempt"]) == (1, 2)
        assert warning.__dict__["worker"] == error.__dict__["worker"] == "web"
        assert warning.exc_info is None
        assert error.exc_info
        assert error.exc_info[0] is ValueError
        assert "secret" not in caplog.text

    def test_a_lost_lease_is_a_warning(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        @rig.tasks.register
        async def wait(password: str) -> None:
            rig.queue.cancel(current_task().id)
            await asyncio.sleep(DEADLINE)

        [task_id] = rig.enqueue(wait.task("secret"))
        rig.run(name="web", lease=0.1)
        [warning] = of_worker(caplog, logging.WARNING)
        assert "lost its lease" in warning.getMessage()
        facts: dict[str, Any] = {"task_id": task_id, "queue": "default"}
        facts |= {"func": "wait", "attempt": 1, "worker": "web"}
        assert facts.items() <= warning.__dict__.items()
        assert "secret" not in caplog.text

    def test_what_concerns_no_task_names_the_worker(
        self, other: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        other.queue.faults += [("dequeue_many", OSError("odd"))]
        other.run(name="web")
        [warning] = of_worker(caplog, logging.WARNING)
        assert warning.__dict__["worker"] == "web"
        assert "task_id" not in warning.__dict__

    def test_a_parent_of_processes_starts_and_stops_too(
        self, start: Callable[..., Program]
    ) -> None:
        program = start(
            crew_program("""
            logging.basicConfig(level=logging.INFO, stream=sys.stdout)
            worker.run(until_empty=True, processes=2)
            """)
        )
        name = "INFO:omniq_sqlite:worker crew"
        program.expect(f"{name} starts", f"{name} stops")
        assert program.end() == 0


# =============================================================================
# Command line
# =============================================================================

READING = ["stats", "list", "show", "events", "check"]
PAGES = ["report", "serve"]
WRITING = ["demo", "worker", "enqueue", "retry", "cancel", "purge", "pause", "resume"]
WRITING += ["backup"]

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: its exit status, output and errors."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        return status, output, errors

    return run_main


def command_start(
    *arguments: object,
    cwd: Path,
    program: tuple[str, ...] = ("-m", "omniq_sqlite"),
    **terms: Any,
) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own, as a shell does."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env={**environment(), **terms.pop("env", {})},
        stdin=subprocess.DEVNULL,
        text=True,
        errors="surrogateescape",
        start_new_session=True,
        **{**pipes, **terms},
    )


def finish(process: subprocess.Popen[str], deadline: float = 60.0) -> tuple[str, str]:
    try:
        return process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def command_call(*arguments: object, cwd: Path, **terms: Any) -> tuple[int, str, str]:
    """Run the command line in a process: its exit status, output and errors."""
    process = command_start(*arguments, cwd=cwd, **terms)
    output, errors = finish(process)
    return process.returncode, output, errors


def is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture
def jobs(tmp_path: Path) -> str:
    """A file with a task in several states, events and results."""
    path = str(tmp_path / "jobs.db")
    with SQLiteBackend(path, events=True) as backend:
        backend.enqueue(Task("fail", queue="bad", max_attempts=1, id="failed"))
        task = backend.queue.dequeue("bad", worker="w1")
        assert task is not None
        try:
            int("no luck\nat all \x1b[31m")
        except ValueError as error:
            backend.fail(task, error)
        backend.enqueue(Task("add", (1, "two"), {"key": [3]}, id="waiting"))
        backend.enqueue(Task("add", id="late"), delay=3600)
        backend.enqueue(Task("add", queue="done", id="done"))
        task = backend.queue.dequeue("done", worker="w2")
        assert task is not None
        backend.complete(task, {"sum": 3})
    return path


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- demo --


def grow_tree(folder: Path, count: int) -> None:
    """Make `count` small files under odd names, and what must not be read."""
    names = [
        "plain.txt", "with space.md", "line\nbreak.html", "tab\there", "quote'\".json",
        "data:text,x", "-rf", "\x1b[31mred", "*?[x]", "\N{SNOWMAN}.png", "e\u0301",
        "archive.tar.gz", "percent%00", "back\\slash", ".hidden", "trailing ", "~",
    ]  # fmt: skip
    raw = [os.fsencode(name) for name in names] + [b"\xff\xfe latin \xe9.jpg", b"\x80"]
    folder.mkdir()
    for number in range(count):
        parent = os.fsencode(folder / f"d{number // 97}")
        if number % 97 == 0:
            parent += b"/"
            os.makedirs(parent)
        name = raw[number % len(raw)] + (b"" if number < 19 else b"%d" % number)
        with open(os.path.join(parent, name), "wb") as file:
            file.write(b"%d\n" % number * (number % 31))
    deep = folder / "deep" / "/".join("x" * 20 for _ in range(60))
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to("not there")
    os.mkfifo(folder / "fifo")


def expected_digests(folder: Path) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for parent, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def make_sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def stored_values(db: Path) -> list[dict[str, Any]]:
    with SQLiteResultStorage(db) as results:
        found = results.list_results(status="success", limit=100_000)
    return [result.value for result in found]


def stored_digests(db: Path) -> dict[bytes, str]:
    return {os.fsencode(v["path"]): v["sha256"] for v in stored_values(db)}


def count_events(db: Path, kind: str) -> Counter[str | None]:
    """How often this happened, by task."""
    with SQLiteBackend(db, events=True) as backend:
        assert backend.events is not None
        events = backend.events.query(type=kind, limit=1_000_000)
    return Counter(event.task_id for event in events)


def fact(output: str, name: str) -> str:
    """Return the value that a line of the first table gives for `name`."""
    table = output.partition("\n\n")[0]
    [line] = [line for line in table.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files in a folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a.txt", "b.bin", "c.tar.gz"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "d.db"


Demo = Callable[[], tuple[int, str, str]]


@pytest.fixture
def demo(folder: Path, db: Path, cli: Cli) -> Demo:
    """The demo over these files, with one worker in this process."""
    return lambda: cli("demo", folder, "--db", db, "--workers", 1)


class TestDemo:
    def test_its_digests_are_those_of_sha256sum_whatever_the_names(
        self, tmp_path: Path, db: Path
    ) -> None:
        grow_tree(tmp_path / "tree", 1_000)
        make_sparse(tmp_path / "tree" / "sparse", 50_000_000)
        expected = expected_digests(tmp_path / "tree")
        status, output, errors = command_call(
            "demo", "tree", "--db", "d.db", "--workers", "2", cwd=tmp_path
        )
        assert (status, errors) == (0, "")
        assert stored_digests(db) == expected
        assert len(expected) == 1_002
        assert fact(output, "files") == "1,002"
        assert "omniq_sqlite events d.db" in output
        if shutil.which("sha256sum") is None:
            return
        for path in list(expected)[:50]:
            with open(path, "rb") as file:
                line = subprocess.check_output(["sha256sum"], stdin=file, text=True)
            assert line.split()[0] == expected[path]

    def test_a_result_has_size_and_media_type_and_each_step_is_an_event(
        self, folder: Path, db: Path, demo: Demo
    ) -> None:
        assert demo()[0] == 0
        found = {v["path"]: (v["size"], v["type"]) for v in stored_values(db)}
        assert found == {
            str(folder / "a.txt"): (5, "text/plain"),
            str(folder / "b.bin"): (5, "application/octet-stream"),
            str(folder / "c.tar.gz"): (8, "application/gzip"),
        }
        for kind in ("enqueued", "dequeued", "completed"):
            assert sorted(count_events(db, kind).values()) == [1, 1, 1]

    def test_the_database_has_a_default(self, folder: Path, tmp_path: Path) -> None:
        assert command_call("demo", folder, cwd=tmp_path)[0] == 0
        assert len(stored_values(tmp_path / "omniq-demo.db")) == 3

    def test_a_second_run_does_what_is_new_and_no_finished_file_again(
        self, folder: Path, db: Path, demo: Demo
    ) -> None:
        assert demo()[0] == 0
        (folder / "new").write_text("new")
        (folder / "a.txt").write_text("another text")
        status, output, _ = demo()
        assert status == 0
        assert fact(output, "files") == "4"
        assert fact(output, "done before") == "2"
        assert fact(output, "done now") == "2"
        assert list(count_events(db, "dequeued").values()) == [1] * 5
        assert stored_digests(db) == expected_digests(folder)

    def test_ctrl_c_stops_it_within_two_seconds_and_the_next_run_goes_on(
        self, tmp_path: Path, db: Path
    ) -> None:
        grow_tree(tmp_path / "tree", 600)
        make_sparse(tmp_path / "tree" / "sparse", 20_000_000_000)
        command = ("demo", "tree", "--db", "d.db", "--workers", "2")
        took = 0.0
        for _ in range(3):  # the best counts: other programs use this machine, too
            process = command_start(*command, cwd=tmp_path)
            done = len(stored_values(db)) if db.exists() else 0
            enough = done + 50
            until(
                lambda: db.exists() and len(stored_values(db)) > enough,  # noqa: B023
                pause=0.02,
            )
            began = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            _, errors = finish(process)
            took = time.monotonic() - began
            assert process.returncode == 130
            assert "Traceback" not in errors
            began = time.monotonic()
            command_call("--version", cwd=tmp_path)
            if took < max(2.0, 5 * (time.monotonic() - began)):
                break
        else:
            pytest.fail(f"it took {took:.1f} s")
        make_sparse(tmp_path / "tree" / "sparse", 1_000_000)
        done_before = set(count_events(db, "completed"))
        assert 50 < len(done_before) < 603

        status, output, _ = command_call(*command, cwd=tmp_path)
        assert status == 0
        assert int(fact(output, "done before")) == len(done_before)
        assert set(count_events(db, "completed").values()) == {1}
        assert stored_digests(db) == expected_digests(tmp_path / "tree")

    def test_ctrl_c_in_the_middle_of_a_large_file_costs_no_attempt(
        self, tmp_path: Path, db: Path
    ) -> None:
        (tmp_path / "tree").mkdir()
        for name in ("a", "b"):
            make_sparse(tmp_path / "tree" / name, 20_000_000_000)
        process = command_start(
            "demo", "tree", "--db", "d.db", "--workers", "2", cwd=tmp_path
        )
        until(
            lambda: db.exists() and len(count_events(db, "dequeued")) == 2, pause=0.02
        )
        os.killpg(process.pid, signal.SIGINT)
        assert finish(process)[1] == "stopped, 2 files left; run it again to go on\n"
        assert process.returncode == 130
        with SQLiteBackend(db) as backend:
            tasks = backend.queue.list_tasks()
        assert [(task.status, task.attempt) for task in tasks] == [("pending", 0)] * 2

    def test_what_a_killed_run_has_left_is_taken_over_at_once(
        self, folder: Path, tmp_path: Path, db: Path, demo: Demo
    ) -> None:
        code = f"""
            import os
            from omniq_sqlite import SQLiteQueue, Task
            queue = SQLiteQueue("d.db")
            path = {str(folder / "a.txt")!r}
            queue.enqueue(Task("fingerprint", (path,), queue="demo"))
            assert queue.dequeue("demo", worker="w", lease=1_000.0)
            os._exit(0)
        """
        assert command_call(cwd=tmp_path, program=("-c", textwrap.dedent(code)))[0] == 0
        assert demo()[0] == 0
        assert len(stored_values(db)) == 4

    def test_what_was_cancelled_is_done_by_the_next_run(
        self, folder: Path, db: Path, demo: Demo
    ) -> None:
        version = omniq_sqlite._version_of((folder / "a.txt").stat())
        key = omniq_sqlite._file_id(str(folder / "a.txt"), version)
        with SQLiteBackend(db) as backend:
            task = Task("fingerprint", (str(folder / "a.txt"),), queue="demo", id=key)
            backend.queue.cancel(backend.enqueue(task))
        status, output, _ = demo()
        assert (status, fact(output, "done now")) == (0, "3")

    def test_a_second_run_beside_the_first_adds_nothing_twice_and_both_end(
        self, tmp_path: Path, db: Path
    ) -> None:
        grow_tree(tmp_path / "tree", 400)
        command = ("demo", "tree", "--db", "d.db", "--workers", "2")
        runs = [command_start(*command, cwd=tmp_path) for _ in range(2)]
        outputs = [finish(run)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0]
        assert [fact(output, "files") for output in outputs] == ["401", "401"]
        for kind in ("enqueued", "completed"):
            events = count_events(db, kind)
            assert (len(events), set(events.values())) == (401, {1})

    def test_a_vanished_file_fails_by_name_and_the_rest_goes_on(
        self, folder: Path, db: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = omniq_sqlite._Demo.work

        def vanish_first(demo: Any, processes: int) -> None:
            (folder / "b.bin").unlink(missing_ok=True)
            work(demo, processes)

        monkeypatch.setattr(omniq_sqlite._Demo, "work", vanish_first)
        status, output, _ = demo()
        assert (status, fact(output, "failed"), fact(output, "retries")) == (
            1,
            "1",
            "0",
        )
        assert f"No such file or directory: '{folder / 'b.bin'}'" in output
        assert len(stored_values(db)) == 2
        with SQLiteBackend(db) as backend:
            [task] = backend.queue.list_tasks(status="failed")
        assert str(folder / "b.bin") in str(task.error)

    def test_a_file_that_could_not_be_read_is_tried_again_by_the_next_run(
        self, folder: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "b.bin").rename(folder / "b\n\x1b")

        def refuse(name: str, flags: int) -> int:
            if "b\n" in name:
                raise PermissionError(13, "Permission denied", name)
            return os.open(name, flags)

        with monkeypatch.context() as patch:
            patch.setattr(omniq_sqlite, "_open_regular", refuse)
            status, output, _ = demo()
        assert status == 1
        assert "Permission denied" in output
        assert "b\\n\\x1b" in output
        assert "\x1b" not in output
        status, output, _ = demo()
        assert (status, fact(output, "done now")) == (0, "1")

    def test_a_folder_that_cannot_be_read_is_reported(
        self, folder: Path, db: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "closed").mkdir()
        scandir = os.scandir

        def refuse(path: str) -> Any:
            if path.endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        status, output, _ = demo()
        assert status == 1
        assert f"Permission denied: '{folder / 'closed'}'" in output
        assert len(stored_values(db)) == 3

    def test_a_file_replaced_while_it_is_read_is_read_again(
        self,
        folder: Path,
        tmp_path: Path,
        db: Path,
        demo: Demo,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "new").write_text("new content")

        def replace_once(name: str, flags: int) -> int:
            descriptor = os.open(name, flags)
            if name.endswith("b.bin") and (tmp_path / "new").exists():
                os.replace(tmp_path / "new", name)
            return descriptor

        monkeypatch.setattr(omniq_sqlite, "_open_regular", replace_once)
        status, output, _ = demo()
        assert (status, fact(output, "retries")) == (0, "1")
        assert stored_digests(db) == expected_digests(folder)
        assert fact(demo()[1], "done before") == "3"

    def test_a_file_replaced_after_it_was_read_is_done_again(
        self, folder: Path, db: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = omniq_sqlite._Demo.work

        def replace_at_last(demo: Any, processes: int) -> None:
            work(demo, processes)
            if not (folder / "late").exists():
                (folder / "late").write_text("came late")
                (folder / "b.bin").unlink()
                (folder / "b.bin").write_text("another content")

        monkeypatch.setattr(omniq_sqlite._Demo, "work", replace_at_last)
        status, output, _ = demo()
        assert (status, fact(output, "files"), fact(output, "done now")) == (
            0,
            "4",
            "4",
        )
        assert stored_digests(db) == expected_digests(folder)

    def test_a_file_written_to_while_it_is_read_has_no_digest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(omniq_sqlite, "_DEMO_READ", 4)
        path = tmp_path / "log"
        path.write_text("0123456789")

        async def write_meanwhile() -> None:
            reading = asyncio.create_task(omniq_sqlite._hash_file(str(path)))
            await asyncio.sleep(0)
            path.write_text("0123456789 and more")
            await reading

        with pytest.raises(OSError, match="changed while it was read"):
            asyncio.run(write_meanwhile())

    def test_the_database_in_the_folder_is_never_opened_as_a_file(
        self, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        db = folder / "d.db"
        opened: list[str] = []

        def note(name: str, flags: int) -> int:
            opened.append(name)
            return os.open(name, flags)

        monkeypatch.setattr(omniq_sqlite, "_open_regular", note)
        with SQLiteBackend(db):
            os.link(db, folder / "another name of it")
            os.link(f"{db}-wal", folder / "another name of its log")
            assert cli("demo", folder, "--db", db, "--workers", 1)[0] == 0
        assert sorted(map(os.path.basename, opened)) == ["a.txt", "b.bin", "c.tar.gz"]

    def test_a_name_that_became_a_link_or_a_fifo_is_refused(self, folder: Path) -> None:
        (folder / "link").symlink_to("a.txt")
        os.mkfifo(folder / "fifo")
        with pytest.raises(FileNotFoundError, match="no regular"):
            asyncio.run(omniq_sqlite._hash_file(str(folder / "fifo")))
        with pytest.raises(OSError, match="link"):
            asyncio.run(omniq_sqlite._hash_file(str(folder / "link")))

    def test_a_paused_queue_is_said_to_be_paused(self, db: Path, demo: Demo) -> None:
        with SQLiteBackend(db) as backend:
            backend.queue.pause("demo")
        status, _, errors = demo()
        assert status == 2
        assert "paused" in errors

    def test_a_folder_may_be_empty_but_not_missing(
        self, tmp_path: Path, db: Path, cli: Cli
    ) -> None:
        status, _, errors = cli("demo", tmp_path / "none", "--db", db)
        assert (status, db.exists()) == (2, False)
        assert "there is no folder" in errors
        (tmp_path / "empty").mkdir()
        status, output, _ = cli("demo", tmp_path / "empty", "--db", db)
        assert (status, fact(output, "files")) == (0, "0")

    def test_progress_shows_on_a_terminal_only(self, tmp_path: Path) -> None:
        grow_tree(tmp_path / "tree", 98)
        make_sparse(tmp_path / "tree" / "sparse", 500_000_000)
        ours, theirs = pty.openpty()
        process = command_start(
            "demo", "tree", "--db", "d.db", cwd=tmp_path, stderr=theirs
        )
        output, _ = finish(process)
        os.close(theirs)
        shown = os.read(ours, 100_000).decode()
        os.close(ours)
        assert " of 100 files" in shown
        assert "files/s" in shown
        assert " of 100 files" not in output

    @pytest.mark.parametrize("way", ["script", "copy", "entry point", "package"])
    def test_it_works_however_it_is_started(
        self, way: str, folder: Path, tmp_path: Path, db: Path
    ) -> None:
        program: tuple[str, ...] = (str(MODULE),)
        if way == "copy":
            shutil.copy(MODULE, tmp_path / "queue_tool.py")
            program = ("queue_tool.py",)
        elif way == "entry point":
            (tmp_path / "omniq-sqlite").write_text(
                "import sys\nfrom omniq_sqlite import main\n"
                "if __name__ == '__main__':\n    sys.exit(main())\n"
            )
            program = ("omniq-sqlite",)
        elif way == "package":
            (tmp_path / "app").mkdir()
            (tmp_path / "app" / "__init__.py").touch()
            shutil.copy(MODULE, tmp_path / "app" / "tasks.py")
            program = ("-m", "app.tasks")
        command = ("demo", folder, "--db", "d.db", "--workers", "2")
        status, _, errors = command_call(*command, cwd=tmp_path, program=program)
        assert (status, errors) == (0, "")
        assert stored_digests(db) == expected_digests(folder)


# -- worker --

APP = """
    import {module} as q

    tasks = q.TaskRegistry()
    not_a_registry = 5

    @tasks.register(name="add")
    def add(a, b):
        return [a + b, q.current_task().worker]

    @tasks.register(name="again", max_attempts=2, retry_delay=0.01)
    def again():
        if q.current_task().attempt == 1:
            raise q.Retry(0.01)
        return "second"
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(textwrap.dedent(APP.format(module="omniq_sqlite")))
    return tmp_path


WORK = ("worker", "jobs.db", "--app", "app:tasks")


class TestWorker:
    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_it_runs_the_tasks_of_a_registry(self, app: Path, processes: str) -> None:
        with SQLiteBackend(app / "jobs.db") as backend:
            first = backend.enqueue(Task("add", (1, 2)))
            second = backend.enqueue(Task("again"))
            done = command_call(
                *WORK, "--until-empty", "--processes", processes, cwd=app
            )
            assert done[0] == 0, done
            assert backend.result(first).value[0] == 3
            assert backend.result(second).value == "second"

    def test_a_copy_of_the_module_runs_the_tasks_registered_with_it(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "__init__.py").touch()
        shutil.copy(MODULE, tmp_path / "own" / "queueing.py")
        text = textwrap.dedent(APP.format(module="own.queueing"))
        (tmp_path / "app.py").write_text(text)
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            task_id = backend.enqueue(Task("add", (1, 2)))
            done = command_call(*WORK, "--until-empty", "--name", "w", cwd=tmp_path)
            assert done[0] == 0, done
            assert backend.result(task_id).value[0] == 3

    def test_it_stops_after_so_many_tasks_of_the_named_queues(self, app: Path) -> None:
        with SQLiteBackend(app / "jobs.db") as backend:
            for queue in ("a", "b", "b", "c"):
                backend.enqueue(Task("add", (1, 2), queue=queue))
            limits = ("--max-tasks", "2", "--concurrency", "1", "--queues", "b, a")
            done = command_call(*WORK, *limits, cwd=app)
            assert done[0] == 0, done
            left = Counter(task.queue for task in backend.queue.list_tasks())
        assert left == {"a": 1, "c": 1}

    def test_it_goes_on_logging_events_where_the_file_has_some(self, app: Path) -> None:
        with SQLiteBackend(app / "jobs.db", events=True) as backend:
            backend.enqueue(Task("add", (1, 2)))
        command_call(*WORK, "--until-empty", cwd=app)
        assert sum(count_events(app / "jobs.db", "completed").values()) == 1

    def test_its_status_is_0_although_a_task_failed(self, app: Path) -> None:
        with SQLiteBackend(app / "jobs.db") as backend:
            backend.enqueue(Task("add", (1, "two"), max_attempts=1))
            assert command_call(*WORK, "--until-empty", cwd=app)[0] == 0
            assert backend.queue.count_tasks(status="failed") == 1

    def test_an_unknown_log_level_is_answered_with_their_names(
        self, db: Path, cli: Cli
    ) -> None:
        status, _, errors = cli("worker", db, *WORK[2:], "--log-level", "loud")
        assert status == 2
        for level in ("'loud'", "debug", "info", "warning", "error"):
            assert level in errors.splitlines()[-1]

    def test_sigterm_ends_it_in_peace(self, app: Path) -> None:
        process = command_start(*WORK, "--processes", "2", cwd=app)
        with SQLiteBackend(app / "jobs.db") as backend:
            backend.result(backend.enqueue(Task("add", (1, 2))), timeout=30)
            process.terminate()
            _, errors = finish(process)
        assert process.returncode == 0
        assert "Traceback" not in errors

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("app", "must be MODULE:REGISTRY, such as jobs:tasks for jobs.py"),
            ("./app:tasks", "such as jobs:tasks for jobs.py"),
            ("app.py:tasks", "such as jobs:tasks for jobs.py"),
            ("nowhere:tasks", "ModuleNotFoundError: No module named 'nowhere'"),
            ("app:nothing", "has no attribute 'nothing'"),
            ("app:not_a_registry", "'app:not_a_registry' is no TaskRegistry: 5"),
            ("broken:tasks", "ZeroDivisionError: division by zero (broken.py, line 2)"),
        ],
    )
    def test_what_cannot_be_imported_is_one_clear_line(
        self, app: Path, name: str, message: str
    ) -> None:
        (app / "broken.py").write_text("\n1 / 0\n")
        status, _, errors = command_call("worker", "jobs.db", "--app", name, cwd=app)
        assert status == 2
        assert is_one_line(errors)
        assert message in errors
        assert not (app / "jobs.db").exists()


# -- enqueue --


class TestCommandEnqueue:
    def enqueue(self, db: Path, cli: Cli, *arguments: str) -> Task:
        status, output, _ = cli("enqueue", db, *arguments)
        assert status == 0
        with SQLiteBackend(db) as backend:
            task = backend.queue.get_task(output.strip())
        assert task is not None
        return task

    def test_an_argument_is_json_or_else_a_string(self, db: Path, cli: Cli) -> None:
        task = self.enqueue(
            db, cli, "f", "1", "-2.5", "true", "null", '"1"', '{"a": [1]}', "plain", "",
            "NaN", "__import__('os').getpid()", "[1", "1" * 5_000, "[" * 100_000,
            "not UTF-8: \udcff", '{"a": NaN}', "[-Infinity]",
        )  # fmt: skip
        assert task.func == "f"
        assert task.args == (
            1, -2.5, True, None, "1", {"a": [1]}, "plain", "",
            "NaN", "__import__('os').getpid()", "[1", "1" * 5_000, "[" * 100_000,
            "not UTF-8: \udcff", '{"a": NaN}', "[-Infinity]",
        )  # fmt: skip

    @pytest.mark.parametrize("wrong", ['{"secret', '["secret"]', '{"secret": NaN}'])
    def test_kwargs_are_a_json_object(self, db: Path, cli: Cli, wrong: str) -> None:
        status, output, errors = cli("enqueue", db, "f", "--kwargs", wrong)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert "--kwargs must be a JSON object" in errors
        assert "secret" not in errors
        assert not db.exists()

    def test_every_term_can_be_given(self, db: Path, cli: Cli) -> None:
        task = self.enqueue(
            db, cli,
            "f", "x", "--kwargs", '{"size": 3}', "--queue", "mail", "--priority", "-7",
            "--delay", "60", "--max-attempts", "9", "--retry-delay", "2.5",
            "--timeout", "30", "--unique-key", "k",
        )  # fmt: skip
        assert (task.args, task.kwargs, task.queue) == (("x",), {"size": 3}, "mail")
        assert (task.priority, task.max_attempts, task.retry_delay) == (-7, 9, 2.5)
        assert (task.timeout, task.unique_key) == (30.0, "k")
        assert task.status is TaskStatus.SCHEDULED

    def test_the_holder_of_the_key_is_named(self, db: Path, cli: Cli) -> None:
        first = cli("enqueue", db, "f", "--unique-key", "k")
        second = cli("enqueue", db, "f", "--unique-key", "k")
        assert first == (0, second[1], "")
        assert second[0] == 0
        assert "nothing added" in second[2]

    def test_it_logs_events_where_the_file_has_some(self, jobs: str, cli: Cli) -> None:
        before = sum(count_events(Path(jobs), "enqueued").values())
        assert cli("enqueue", jobs, "f")[0] == 0
        assert sum(count_events(Path(jobs), "enqueued").values()) == before + 1

    @pytest.mark.parametrize(
        "wrong",
        [
            ["f", "--kwargs", "[1]"],
            ["f", "--priority", "high"],
            ["f", "--delay", "-1"],
            ["f", "--max-attempts", "0"],
            ["f", "--queue", ""],
            ["\udcff"],
            [""],
            [],
        ],
    )
    def test_a_wrong_value_is_refused(
        self, db: Path, cli: Cli, wrong: list[str]
    ) -> None:
        status, output, errors = cli("enqueue", db, *wrong)
        assert (status, output) == (2, "")
        assert "Traceback" not in errors


# -- stats, list, show, events --


class TestStats:
    def test_it_counts_by_queue_and_status(self, jobs: str, cli: Cli) -> None:
        status, output, _ = cli("stats", jobs)
        assert status == 0
        header, *rows = [line.split() for line in output.splitlines() if line]
        counts = {row[0]: dict(zip(header, row, strict=False)) for row in rows}
        assert counts["bad"]["failed"] == "1"
        assert counts["default"]["pending"] == "1"
        assert counts["default"]["scheduled"] == "1"
        assert {"w1", "w2"} <= set(counts)

    def test_json_has_an_object_for_each_queue_and_worker(
        self, jobs: str, cli: Cli
    ) -> None:
        status, output, _ = cli("stats", jobs, "--json")
        assert status == 0
        queues = {r["queue"]: r for r in lines_of(output) if r["kind"] == "queue"}
        workers = {r["name"] for r in lines_of(output) if r["kind"] == "worker"}
        assert (queues["bad"]["failed"], workers) == (1, {"w1", "w2"})

    def test_a_file_without_tasks_is_nothing_found(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db):
            pass
        status, output, errors = cli("stats", db)
        assert (status, output, is_one_line(errors)) == (1, "", True)


class TestWatch:
    @pytest.fixture
    def busy(self, db: Path) -> Path:
        """A file with a task that was done, one that runs, and one that failed."""
        with SQLiteBackend(db, events=True) as backend:
            backend.enqueue_many(
                Task(f"f{n}", id=f"t{n}", max_attempts=1) for n in range(4)
            )
            done, failed, late = backend.queue.dequeue_many(3, worker="w1", lease=0.001)
            backend.complete(done)
            backend.fail(failed, ValueError("no luck"))
            assert late.id == "t2"
        return db

    def frames(self, db: Path, count: int, *options: str, **terms: Any) -> list[str]:
        """Return the lines of the first frames, which end at an empty output."""
        process = command_start(
            "stats", db, "--watch", *options, cwd=db.parent, **terms
        )
        assert process.stdout is not None
        lines: list[str] = []
        while sum("last minute" in line or "minute" in line for line in lines) < count:
            lines.append(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = finish(process)
        assert (process.returncode, errors) == (130, "")
        return [*lines, *rest.splitlines(keepends=True)]

    def test_it_shows_the_last_minute_what_runs_and_what_failed(
        self, busy: Path
    ) -> None:
        text = "".join(self.frames(busy, 2))
        assert "1 completed, 0 retried, 1 failed  (by events)" in text
        assert re.search(
            r"^t2 +f2 +\d:00:\d\d +over 0:00:\d\d +w1$", text, re.MULTILINE
        )
        assert re.search(
            r"^t1 +0:00:\d\d +f1 +ValueError: no luck$", text, re.MULTILINE
        )
        assert "\x1b" not in text

    def test_without_events_it_shows_what_the_tables_say(self, db: Path) -> None:
        with SQLiteBackend(db, retention=60) as backend:
            backend.enqueue_many([Task("f"), Task("g", max_attempts=1)])
            done, failed = backend.queue.dequeue_many(2)
            backend.complete(done)
            backend.fail(failed, ValueError("no luck"))
        text = "".join(self.frames(db, 1))
        assert "1 completed, 0 retried, 1 failed  (by tables)" in text

    def test_json_is_an_object_a_line(self, busy: Path) -> None:
        records = lines_of("".join(self.frames(busy, 2, "--json")))
        kinds = [record["kind"] for record in records]
        assert kinds[:6] == ["queue", "worker", "minute"] * 2
        counts = [records[2][kind] for kind in ("completed", "retry", "failed")]
        assert counts == [1, 0, 1]

    @pytest.mark.parametrize("size", [(24, 80), (50, 200), (6, 60)])
    def test_a_terminal_is_redrawn_in_place_and_no_line_is_too_long(
        self, busy: Path, size: tuple[int, int]
    ) -> None:
        lines, columns = size
        shown = on_terminal("stats", busy, "--watch", size=size, frames=3)
        frames = shown.split("\x1b[H")
        assert len(frames) >= 4
        assert frames[0] == ""
        for frame in frames[1:-1]:
            assert frame.endswith("\x1b[J")
            plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", frame).splitlines()
            assert len(plain) <= lines
            assert max(map(len, plain)) <= columns


def on_terminal(
    *arguments: object, size: tuple[int, int], frames: int = 0, **environment: str
) -> str:
    """Return what a command writes to a terminal of that many lines and columns.

    After so many frames it is interrupted; nought of them: it ends by itself.
    """
    leader, follower = pty.openpty()
    variables = {"LINES": str(size[0]), "COLUMNS": str(size[1]), "TERM": "xterm"}
    process = command_start(
        *arguments,
        cwd=Path.cwd(),
        stdout=follower,
        stderr=follower,
        env={"NO_COLOR": "", **variables, **environment},
    )
    os.close(follower)
    written = b""
    with contextlib.suppress(OSError):  # how a terminal tells its end
        while chunk := os.read(leader, 65_536):
            written += chunk
            if frames and written.count(b"\x1b[H") >= frames:
                os.killpg(process.pid, signal.SIGINT)
    os.close(leader)
    finish(process)
    return written.decode().replace("\r\n", "\n")


class TestColours:
    def test_a_terminal_gets_colours(self, jobs: str) -> None:
        shown = on_terminal("list", jobs, size=(24, 80))
        assert "\x1b[31mfailed\x1b[0m" in shown
        plain = re.sub(r"\x1b\[\d*m", "", shown)
        assert max(map(len, plain.splitlines())) <= 80

    @pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
    def test_one_that_wants_none_gets_none(
        self, jobs: str, variables: dict[str, Any]
    ) -> None:
        shown = on_terminal("list", jobs, size=(24, 80), **variables)
        assert "failed" in shown
        assert "\x1b" not in shown

    def test_a_pipe_gets_none(self, jobs: str, tmp_path: Path) -> None:
        assert "\x1b" not in command_call("list", jobs, cwd=tmp_path)[1]

    def test_wide_characters_take_two_columns(self, db: Path, cli: Cli) -> None:
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("\N{HIRAGANA LETTER A}" * 40, id="t"))
            queue.enqueue(Task("e\N{COMBINING ACUTE ACCENT}" * 40, id="u"))
        lines = cli("list", db)[1].splitlines()
        assert [omniq_sqlite._width(line) for line in lines[1:]] == [
            omniq_sqlite._width(lines[1]),
            omniq_sqlite._width(lines[1]) - 40,
        ]


class TestList:
    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ([], ["failed", "waiting", "late"]),
            (["--queue", "default"], ["waiting", "late"]),
            (["--status", "failed"], ["failed"]),
            (["--func", "add"], ["waiting", "late"]),
            (["--newer-than", "1h"], ["failed", "waiting", "late"]),
            (["--older-than", "1h"], []),
            (["--limit", "1", "--offset", "1"], ["waiting"]),
        ],
    )
    def test_it_lists_what_the_filters_let_through(
        self, jobs: str, cli: Cli, filters: list[str], expected: list[str]
    ) -> None:
        status, output, _ = cli("list", jobs, "--json", *filters)
        assert [r["id"] for r in lines_of(output)] == expected
        assert status == (0 if expected else 1)
        lines = cli("list", jobs, *filters)[1].splitlines()
        assert [line.split()[0] for line in lines[1:]] == expected

    def test_a_task_that_cannot_be_read_says_why_and_hides_no_other(
        self, jobs: str, cli: Cli
    ) -> None:
        with raw(jobs) as connection:
            connection.execute("UPDATE omniq_task SET args = '{' WHERE id = 'failed'")
        status, output, _ = cli("list", jobs, "--json")
        records = {record["id"]: record for record in lines_of(output)}
        assert (status, set(records)) == (0, {"failed", "waiting", "late"})
        assert "task failed: args" in records["failed"]["error"]
        assert records["failed"]["status"] == "failed"

    def test_an_unknown_status_is_answered_with_their_names(
        self, jobs: str, cli: Cli
    ) -> None:
        status, _, errors = cli("list", jobs, "--status", "bogus")
        assert status == 2
        assert "scheduled" in errors
        assert "TaskStatus" not in errors

    def test_nothing_found_is_status_1(self, jobs: str, cli: Cli) -> None:
        assert cli("list", jobs, "--queue", "none")[:2] == (1, "")

    def test_it_says_when_there_are_more(self, jobs: str, cli: Cli) -> None:
        assert "more than 1" in cli("list", jobs, "--limit", "1")[2]

    @pytest.mark.parametrize("columns", [60, 80, 200])
    def test_the_table_fits_the_terminal(
        self, db: Path, cli: Cli, columns: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SQLiteBackend(db) as backend:
            task_id = backend.enqueue(Task("function" * 9, ("x" * 300,)))
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = cli("list", db)[1].splitlines()
        assert lines[1].startswith(task_id)
        assert max(map(len, lines)) <= columns

    def test_without_a_terminal_nothing_is_cut_short_of_200_characters(
        self, jobs: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(sys, "__stdout__", None)
        with SQLiteBackend(jobs) as backend:
            backend.enqueue(Task("f", ("x" * 150,)))
        assert "x" * 150 in cli("list", jobs)[1]


class TestShow:
    def test_it_shows_the_whole_life_of_a_task(self, jobs: str, cli: Cli) -> None:
        status, output, _ = cli("show", jobs, "failed")
        assert status == 0
        for part in ("enqueued", "dequeued", "w1", "ValueError", "no luck\\nat all"):
            assert part in output
        assert "Traceback (most recent call last)" in output
        assert "\x1b" not in output

    def test_it_shows_the_payload(self, jobs: str, cli: Cli) -> None:
        output = cli("show", jobs, "waiting")[1]
        assert "(1, 'two')" in output
        assert "{'key': [3]}" in output

    def test_a_completed_task_lives_on_in_its_result_and_events(
        self, jobs: str, cli: Cli
    ) -> None:
        [record] = lines_of(cli("show", jobs, "done", "--json")[1])
        assert record["task"] is None
        assert record["result"]["value"] == {"sum": 3}
        kinds = [event["type"] for event in record["events"]]
        assert kinds == ["enqueued", "dequeued", "completed"]

    def test_json_shows_what_json_has_no_form_for(self, db: Path, cli: Cli) -> None:
        moment = datetime(2026, 1, 31, tzinfo=UTC)
        with SQLiteBackend(db) as backend:
            backend.enqueue(Task("f", (b"\xff", moment), run_at=moment, id="t"))
        [record] = lines_of(cli("show", db, "t", "--json")[1])
        instant = "2026-01-31T00:00:00+00:00"
        assert record["task"]["args"] == [{"$bytes": "/w=="}, instant]
        assert record["task"]["run_at"] == instant

    def test_a_file_of_results_alone_is_shown_and_gets_no_other_table(
        self, db: Path, cli: Cli
    ) -> None:
        with SQLiteResultStorage(db) as results:
            results.store(TaskResult("t", ResultStatus.SUCCESS, 5))
        status, output, _ = cli("show", db, "t")
        assert (status, "5" in output) == (0, True)
        with closing(sqlite3.connect(db)) as connection:
            names = connection.execute("SELECT name FROM sqlite_schema").fetchall()
        assert ("omniq_task",) not in names

    def test_an_unknown_task_is_status_1(self, jobs: str, cli: Cli) -> None:
        status, _, errors = cli("show", jobs, "unknown")
        assert status == 1
        assert "no task 'unknown'" in errors

    def test_the_age_of_a_task_counts_from_its_end(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db, clock=lambda: time.time() - 7_200) as early:
            early.enqueue_many([Task("f", id="old"), Task("f", id="ended")])
        with SQLiteBackend(db) as backend:
            backend.queue.cancel("ended")
        old = lines_of(cli("list", db, "--older-than", "1h", "--json")[1])
        new = lines_of(cli("list", db, "--newer-than", "1h", "--json")[1])
        assert ([t["id"] for t in old], [t["id"] for t in new]) == (["old"], ["ended"])


class TestEvents:
    def test_it_shows_the_last_ones_in_order(self, jobs: str, cli: Cli) -> None:
        status, output, _ = cli("events", jobs, "--json", "--limit", "3")
        kinds = [event["type"] for event in lines_of(output)]
        assert (status, kinds) == (0, ["enqueued", "dequeued", "completed"])

    @pytest.mark.parametrize(
        ("filters", "count"),
        [
            ([], 8),
            (["--task", "failed"], 3),
            (["--queue", "default"], 2),
            (["--type", "failed"], 1),
            (["--since", "10m"], 8),
            (["--until", "10m"], 0),
            (["--since", "2999-01-01"], 0),
            (["--type", "none"], 0),
        ],
    )
    def test_it_shows_what_the_filters_let_through(
        self, jobs: str, cli: Cli, filters: list[str], count: int
    ) -> None:
        status, output, _ = cli("events", jobs, *filters)
        assert status == (0 if count else 1)
        assert len(output.splitlines()) == count

    def test_a_file_that_holds_no_events_is_an_error(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db):
            pass
        status, _, errors = cli("events", db)
        assert (status, is_one_line(errors)) == (2, True)
        assert f"no events are kept in {str(db)!r}" in errors
        assert "events=True" in errors

    def test_follow_shows_each_new_event_once_and_ends_at_ctrl_c(
        self, jobs: str, tmp_path: Path
    ) -> None:
        filters = ("--json", "--task", "new", "--limit", "5")
        process = command_start("events", jobs, "--follow", *filters, cwd=tmp_path)
        assert process.stdout is not None
        with SQLiteBackend(jobs, events=True) as backend:
            assert backend.events is not None
            backend.events.log(TaskEvent("custom", "other"))
            for number in range(20):
                backend.events.log(TaskEvent(f"n{number}", "new"))
            seen: list[str] = []
            while not seen or seen[-1] != "n19":
                seen.append(json.loads(process.stdout.readline())["type"])
            backend.events.log(TaskEvent("last", "new"))
            assert json.loads(process.stdout.readline())["type"] == "last"
        assert seen == [f"n{number}" for number in range(20)][-len(seen) :]
        os.killpg(process.pid, signal.SIGINT)
        assert finish(process) == ("", "")
        assert process.returncode == 130

    @pytest.mark.parametrize("text", ["", "x", "10", "10y", "nanm", "1e99d"])
    def test_an_instant_that_is_none_is_refused(
        self, jobs: str, cli: Cli, text: str
    ) -> None:
        assert cli("events", jobs, "--since", text)[0] == 2

    def test_an_instant_without_zone_is_local_time(self) -> None:
        moment = omniq_sqlite._parse_instant("2026-01-31T12:00")
        assert moment == datetime(2026, 1, 31, 12).astimezone()
        age = datetime.now(UTC) - omniq_sqlite._parse_instant("1.5h")
        assert abs(age - timedelta(hours=1.5)) < timedelta(seconds=60)


# -- retry, cancel, purge, pause, resume, backup, check --


def status_by_id(path: str | Path) -> dict[str, str]:
    with SQLiteQueue(path) as queue:
        return {task.id: str(task.status) for task in queue.list_tasks()}


class TestChanging:
    def test_cancel_takes_ids(self, jobs: str, cli: Cli) -> None:
        outcome = cli("cancel", jobs, "waiting", "late")
        text = "cancelled: 2 tasks (1 scheduled, 1 pending before)\n"
        assert outcome == (0, text, "")
        after = {"failed": "failed", "waiting": "cancelled", "late": "cancelled"}
        assert status_by_id(jobs) == after

    def test_a_running_task_can_be_cancelled(self, jobs: str, cli: Cli) -> None:
        with SQLiteQueue(jobs) as queue:
            task = queue.dequeue()
            assert task is not None
            assert cli("cancel", jobs, task.id)[0] == 0
            with pytest.raises(LeaseLostError):
                queue.complete(task)

    def test_retry_gives_fresh_attempts(self, jobs: str, cli: Cli) -> None:
        outcome = cli("retry", jobs, "--func", "fail")
        assert outcome == (0, "queued again: 1 task (1 failed before)\n", "")
        with SQLiteQueue(jobs) as queue:
            task = queue.dequeue("bad")
        assert task is not None
        assert (task.id, task.attempt) == ("failed", 1)

    def test_purge_deletes_what_ended_and_the_rest_only_by_its_status(
        self, jobs: str, cli: Cli
    ) -> None:
        assert cli("purge", jobs, "--all")[1] == "deleted: 1 task (1 failed before)\n"
        assert set(status_by_id(jobs)) == {"waiting", "late"}
        assert cli("purge", jobs, "--all")[:2] == (1, "")
        assert cli("purge", jobs, "--status", "scheduled")[0] == 0
        assert set(status_by_id(jobs)) == {"waiting"}

    def test_one_that_cannot_be_read_is_refused_beside_what_was_done(
        self, jobs: str, cli: Cli
    ) -> None:
        with raw(jobs) as connection:
            connection.execute("UPDATE omniq_task SET args = '{' WHERE id = 'failed'")
        status, out, err = cli("cancel", jobs, "failed", "waiting")
        assert (status, out) == (1, "cancelled: 1 task (1 pending before)\n")
        assert "not cancelled: 'failed': cannot serialize" in err
        query = "SELECT status FROM omniq_task WHERE id = 'waiting'"
        assert select(jobs, query) == ["cancelled"]

    @pytest.mark.parametrize("command", ["cancel", "retry", "purge"])
    def test_filters_all_have_to_hold(self, jobs: str, cli: Cli, command: str) -> None:
        before = status_by_id(jobs)
        for filters in (
            ["--queue", "bad", "--func", "add"],
            ["--all", "--older-than", "1h"],
            ["--newer-than", "0s"],
            ["waiting", "failed", "--queue", "other"],
        ):
            assert cli(command, jobs, *filters)[:2] == (1, "")
        assert status_by_id(jobs) == before

    @pytest.mark.parametrize(
        ("command", "expected"), [("cancel", 2), ("retry", 1), ("purge", 1)]
    )
    def test_a_dry_run_shows_the_tasks_and_changes_nothing(
        self, jobs: str, cli: Cli, command: str, expected: int
    ) -> None:
        before = status_by_id(jobs)
        status, output, _ = cli(command, jobs, "--all", "--dry-run")
        header, *rows, total = output.splitlines()
        assert (status, header.split()[0], len(rows)) == (0, "id", expected)
        assert total.startswith("would be ")
        assert status_by_id(jobs) == before

    def test_a_dry_run_leaves_out_what_another_task_keeps_from_it(
        self, path: str, cli: Cli
    ) -> None:
        with SQLiteBackend(path, events=True) as backend:
            backend.enqueue(Task("f", id="first", unique_key="k", max_attempts=1))
            task = backend.queue.dequeue()
            assert task is not None
            backend.fail(task, ValueError("no"))
            backend.enqueue(Task("f", id="second", unique_key="k"))
            assert backend.events is not None
            events = backend.events.count()
            for dry in (["--dry-run"], []):
                status, output, _ = cli("retry", path, "--all", *dry)
                assert (status, output) == (1, "")
            assert cli("cancel", path, "--all", "--dry-run")[0] == 0
            assert backend.events.count() == events

    @pytest.mark.parametrize("command", ["cancel", "retry", "purge"])
    def test_without_any_filter_all_must_be_said(
        self, jobs: str, cli: Cli, command: str
    ) -> None:
        before = status_by_id(jobs)
        status, output, errors = cli(command, jobs)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert status_by_id(jobs) == before

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["cancel", "failed"], "not cancelled: 'failed': it is failed"),
            (["cancel", "none"], "not cancelled: 'none': there is no such task"),
            (["retry", "waiting"], "not queued again: 'waiting': it is pending"),
            (["purge", "late"], "not deleted: 'late': it is scheduled"),
            (["retry", "failed", "--queue", "x"], "'failed': the filters leave it out"),
        ],
    )
    def test_a_task_that_was_named_and_is_not_changed_says_why(
        self, jobs: str, cli: Cli, arguments: list[str], why: str
    ) -> None:
        command, *rest = arguments
        status, output, errors = cli(command, jobs, *rest)
        assert (status, output, is_one_line(errors)) == (1, "", True)
        assert why in errors

    def test_a_status_that_cannot_be_changed_is_an_error(
        self, jobs: str, cli: Cli
    ) -> None:
        for command, status in (("cancel", "failed"), ("retry", "completed")):
            errors = cli(command, jobs, "--status", status)[2]
            assert f"a task that is {status} cannot be" in errors

    def test_a_task_whose_key_is_held_is_left_alone(self, db: Path, cli: Cli) -> None:
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("f", unique_key="k", id="first"))
            queue.cancel("first")
            queue.enqueue(Task("f", unique_key="k", id="second"))
        assert "holds its key 'k'" in cli("retry", db, "first")[2]
        assert cli("retry", db, "--all")[0] == 1
        assert status_by_id(db) == {"first": "cancelled", "second": "pending"}

    def test_thousands_are_changed_in_several_commits(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db, events=True) as backend:
            backend.enqueue_many(Task("f") for _ in range(2_500))
        text = "cancelled: 2,500 tasks (2,500 pending before)\n"
        assert cli("cancel", db, "--all") == (0, text, "")
        assert sum(count_events(db, "cancelled").values()) == 2_500
        text = "queued again: 2,500 tasks (2,500 cancelled before)\n"
        assert cli("retry", db, "--all") == (0, text, "")


class TestPausing:
    def test_a_paused_queue_hands_out_nothing_until_it_is_resumed(
        self, jobs: str, cli: Cli
    ) -> None:
        assert cli("pause", jobs, "default", "x") == (
            0,
            "'default' is paused, 1 pending\n'x' is paused, 0 pending\n",
            "",
        )
        with SQLiteQueue(jobs) as queue:
            assert queue.dequeue() is None
            text = "'default' hands out tasks, 1 pending\n"
            assert cli("resume", jobs, "default") == (0, text, "")
            assert queue.dequeue() is not None


class TestCommandBackup:
    def test_it_copies_the_file_and_replaces_none(
        self, jobs: str, tmp_path: Path, cli: Cli
    ) -> None:
        copy_of = tmp_path / "copy.db"
        status, output, _ = cli("backup", jobs, copy_of)
        assert (status, "bytes" in output) == (0, True)
        assert status_by_id(copy_of) == status_by_id(jobs)
        status, output, errors = cli("backup", jobs, copy_of)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert "another name" in errors


class TestCommandCheck:
    def test_a_sound_file_is_status_0(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db, events=True):
            pass
        assert cli("check", db) == (0, "nothing is wrong\n", "")
        assert cli("check", db, "--json") == (0, "", "")

    def test_findings_are_status_1(self, jobs: str, cli: Cli) -> None:
        with closing(sqlite3.connect(jobs)) as connection:
            connection.execute("DROP INDEX omniq_task_kept")
        status, output, _ = cli("check", jobs)
        assert (status, "omniq_task_kept is missing" in output) == (1, True)
        found = lines_of(cli("check", jobs, "--json")[1])
        wanted = {
            "check": "schema",
            "severity": "error",
            "message": "omniq_task_kept is missing",
        }
        assert wanted in found

    def test_a_file_of_results_alone_is_checked(self, db: Path, cli: Cli) -> None:
        with SQLiteResultStorage(db) as results:
            results.store(TaskResult("t", ResultStatus.SUCCESS, 5))
        assert cli("check", db)[0] == 0
        with closing(sqlite3.connect(db)) as connection:
            names = connection.execute("SELECT name FROM sqlite_schema").fetchall()
        assert ("omniq_task",) not in names

    def make_worker(self, db: Path, name: str, ago: float = 0.0) -> None:
        with SQLiteQueue(db, clock=lambda: time.time() - ago) as queue:
            queue.dequeue(worker=name)

    def test_a_worker_that_lives_is_status_0(self, db: Path, cli: Cli) -> None:
        self.make_worker(db, "mail")
        assert cli("check", db, "--worker", "mail") == (0, "worker 'mail' lives\n", "")
        [found] = lines_of(cli("check", db, "--worker", "mail", "--json")[1])
        assert (found["name"], found["gone"]) == ("mail", None)

    def test_a_worker_that_is_unknown_or_stale_is_status_1(
        self, db: Path, cli: Cli
    ) -> None:
        self.make_worker(db, "mail", ago=90)
        assert "no worker 'mai'" in cli("check", db, "--worker", "mai")[2]
        status, output, _ = cli("check", db, "--worker", "mail")
        assert (status, "was not seen for 9" in output) == (1, True)

    def test_a_worker_that_was_killed_is_status_1(self, app: Path, cli: Cli) -> None:
        process = command_start(*WORK, "--name", "mail", cwd=app)
        probe = ("check", app / "jobs.db", "--worker", "mail")
        try:
            until(lambda: cli(*probe)[0] == 0)
        finally:
            process.kill()
            finish(process)
        status, output, _ = cli(*probe)
        assert (status, output) == (1, "worker 'mail' is dead\n")

    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_a_worker_that_stopped_in_peace_is_not_dead(
        self, app: Path, cli: Cli, processes: str
    ) -> None:
        with SQLiteBackend(app / "jobs.db") as backend:
            backend.enqueue(Task("add", (1, 2)))
        done = command_call(*WORK, "--until-empty", "--processes", processes, cwd=app)
        assert done[0] == 0
        assert cli("check", app / "jobs.db")[:2] == (0, "nothing is wrong\n")

    def test_one_living_child_is_a_living_worker(self, db: Path, cli: Cli) -> None:
        self.make_worker(db, "mail-1", ago=90)
        self.make_worker(db, "mail-other")
        assert cli("check", db, "--worker", "mail")[0] == 1
        self.make_worker(db, "mail-1.2")
        assert cli("check", db, "--worker", "mail")[0] == 0


# -- report --

CHROMIUM = "/usr/bin/chromium"
HOSTILE = """<script>window.pwned = 1</script>"><img src=x onerror=pwned=1>'{{}}$x"""


def make_history(path: Path, *, events: bool, name: str = "") -> None:
    """Make a file in which, within two hours, all sorts of things happened."""
    now = time.time() - 7_200
    with SQLiteBackend(
        path,
        events=events,
        clock=lambda: now,
        retention=0 if events else 9_999,
        synchronous="NORMAL",
    ) as backend:
        for number in range(60):
            task = Task(f"f{number % 3}{name}", queue=f"q{name}", max_attempts=2)
            backend.enqueue(task)
            now += 30
            claimed = backend.queue.dequeue(f"q{name}", worker=f"w{name}")
            assert claimed is not None
            now += 1 + 10 * int(claimed.func[1])
            if number % 5:
                backend.complete(claimed, "a secret")
            else:
                error = raised(f"no luck with '{number}'{name}")
                backend.fail(claimed, error, retry=number % 2 == 0, delay=1)
        now = time.time() - 60
        backend.enqueue_many(Task(f"later{name}") for _ in range(4))
        backend.enqueue(Task("far"), delay=9_999)
        backend.queue.dequeue("default", worker=f"w{name}", lease=10)
        backend.queue.pause(f"paused{name}")


def raised(message: str) -> ValueError:
    """Return an error with a traceback."""
    with pytest.raises(ValueError, match="no luck") as caught:
        raise ValueError(message)
    return caught.value


class Page(html.parser.HTMLParser):
    """A page as a browser would read it: its elements, and the text of each section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.sections[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "title" not in self._open and self._section:
            self.sections[self._section] += data + "|"

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def report_on(db: Path, cli: Cli, *options: str) -> Page:
    status, output, errors = cli("report", db, "-o", "-", *options)
    assert (status, errors) == (0, "")
    return Page(output)


class TestReport:
    @pytest.mark.parametrize("events", [True, False])
    def test_it_shows_what_goes_on_and_what_went_on(
        self, db: Path, cli: Cli, events: bool
    ) -> None:
        make_history(db, events=events)
        found = report_on(db, cli).sections
        assert list(found) == [
            "now", "depth", "throughput", "waits", "runs", "failures", "functions",
            "running", "queues", "workers", "health",
        ]  # fmt: skip
        assert "|overdue|1|" in found["now"]
        assert "|failed|6|" in found["now"]
        assert (
            f"48 completed; {6 if events else 0} failed, run again; 6 failed"
            in (found["throughput"])
        )
        assert "half within" in found["waits"]
        assert ">" not in found["functions"]
        order = re.findall(r"\bf\d\b", found["functions"])
        assert order == ["f2", "f1", "f0"]
        assert "|later|" in found["running"]
        assert "over 0:00:" in found["running"]
        assert "paused" in found["queues"]
        assert "1 lease over in 'default'" in found["health"]

    def test_failures_are_grouped_by_error_with_one_traceback_each(
        self, db: Path, cli: Cli
    ) -> None:
        make_history(db, events=True)
        text = report_on(db, cli).sections["failures"]
        assert re.findall(r"(\d+) \N{MULTIPLICATION SIGN}", text) == ["6"]
        assert text.count("Traceback (most recent call last)") == 1
        assert "ValueError: no luck with '55'" in text
        assert re.search(r"In f\d(, f\d)*; last at 20", text)

    def test_it_needs_no_serializer_of_the_program(self, db: Path, cli: Cli) -> None:
        make_history(db, events=True)
        with raw(db) as connection:
            connection.execute("UPDATE omniq_result SET metadata = '{', value = '{'")
        text = report_on(db, cli).sections["failures"]
        assert "Traceback (most recent call last)" in text

    def test_without_events_it_says_what_is_missing(self, db: Path, cli: Cli) -> None:
        make_history(db, events=False)
        text = cli("report", db, "-o", "-")[1]
        assert "No events are logged in this file" in text
        make_history(db.with_name("e.db"), events=True)
        text = cli("report", db.with_name("e.db"), "-o", "-")[1]
        assert "No events are logged in this file" not in text

    def test_it_takes_the_past_since_an_instant(self, db: Path, cli: Cli) -> None:
        make_history(db, events=True)
        found = report_on(db, cli, "--since", "10m").sections
        assert "0 completed" in found["throughput"]
        assert found["failures"].endswith("|none|")

    def test_it_says_when_it_looked_at_the_newest_events_only(
        self, db: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_history(db, events=True)
        monkeypatch.setattr(omniq_sqlite, "_PAST_LIMIT", 50)
        assert "the newest 50 events since" in cli("report", db, "-o", "-")[1]

    def test_an_empty_file_has_a_page(self, db: Path, cli: Cli) -> None:
        with SQLiteBackend(db):
            pass
        found = report_on(db, cli).sections
        assert found["failures"].endswith("|none|")
        assert "check() found nothing wrong." in found["health"]

    def test_it_is_one_page_that_loads_nothing(self, db: Path, cli: Cli) -> None:
        make_history(db, events=True)
        page = report_on(db, cli)
        assert page.tags.isdisjoint({"script", "img", "iframe", "object", "form"})
        links = {a.get("href") for _, a in page.elements} - {None}
        assert links == {"data:,", "#now"}
        assert not [a for _, a in page.elements if "src" in a]
        [policy] = [a["content"] for _, a in page.elements if "http-equiv" in a]
        assert policy is not None
        assert "default-src 'none'" in policy
        assert "script-src 'none'" in policy

    def test_arguments_and_results_are_not_in_it(self, db: Path, cli: Cli) -> None:
        make_history(db, events=True)
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("f", ("a secret",), metadata={"token": "a secret"}))
        assert "a secret" not in cli("report", db, "-o", "-")[1]

    @pytest.mark.parametrize("events", [True, False])
    def test_everything_is_escaped(self, db: Path, cli: Cli, events: bool) -> None:
        make_history(db, events=events, name=HOSTILE)
        page = report_on(db, cli)
        assert page.tags.isdisjoint({"script", "img"})
        for section in ("failures", "functions", "running", "queues", "workers"):
            assert HOSTILE in page.sections[section].replace("|", "")

    def test_it_is_readable_by_its_owner_only(
        self, jobs: str, tmp_path: Path, cli: Cli
    ) -> None:
        status, output, _ = cli("report", jobs, "-o", tmp_path / "r.html")
        assert (status, "r.html" in output) == (0, True)
        assert stat.S_IMODE((tmp_path / "r.html").stat().st_mode) == 0o600
        Page((tmp_path / "r.html").read_text())

    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            ("", "Is a directory"),
            ("nowhere/page.html", "No such file or directory"),
            ("jobs.db/page.html", "Not a directory"),
        ],
    )
    def test_a_page_that_cannot_be_written_is_one_clear_line(
        self, jobs: str, tmp_path: Path, cli: Cli, page: str, reason: str
    ) -> None:
        target = str(tmp_path / page)
        status, output, errors = cli("report", jobs, "-o", target)
        expected = f"omniq-sqlite: cannot write {target!r}: {reason}\n"
        assert (status, output, errors) == (2, "", expected)

    def test_it_is_never_written_over_the_database(
        self, jobs: str, tmp_path: Path, cli: Cli
    ) -> None:
        link = tmp_path / "link"
        link.symlink_to(jobs)
        before = status_by_id(jobs)
        with SQLiteQueue(jobs) as queue:
            queue.pause("other")  # so there is a WAL
            for file, target in itertools.product(
                (jobs, link), (jobs, link, jobs + "-wal")
            ):
                status, _, errors = cli("report", file, "-o", target)
                assert (status, is_one_line(errors)) == (2, True)
        assert status_by_id(jobs) == before

    def test_events_count_in_the_order_of_their_commits(
        self, db: Path, cli: Cli
    ) -> None:
        now = time.time()
        with SQLiteBackend(db, events=True, clock=lambda: now) as backend:
            backend.enqueue(Task("f"))
            now -= 600  # the clock is set
            task = backend.queue.dequeue()
            assert task is not None
            backend.complete(task)
        with omniq_sqlite._open(argparse.Namespace(file=str(db))) as backend:
            history = omniq_sqlite._look(backend, 0.0).history
        assert [step[2:] for step in history.steps] == [
            ("", "waiting"),
            ("waiting", "running"),
            ("running", ""),
        ]

    def test_the_depth_is_reckoned_back_from_what_is_there_now(self) -> None:
        rows = [
            (0.0, "enqueued", "a", None, "{}"),
            (30.0, "enqueued", "b", None, "{}"),
            (70.0, "dequeued", "a", None, '{"attempt": 1, "func": "f"}'),
            (80.0, "retry", "a", None, '{"attempt": 1, "delay": 1.0}'),
            (130.0, "dequeued", "a", None, '{"attempt": 2, "func": "f"}'),
            (131.5, "completed", "a", None, '{"attempt": 2}'),
            (150.0, "custom", "a", None, "{}"),
            (190.0, "cancelled", "b", None, "{}"),
            (191.0, "retry", "c", None, "{}"),  # by hand: it had ended
            (float("inf"), "failed", "b", None, "{}"),
            (192.0, "dequeued", "d", None, "not JSON"),
        ]
        history = omniq_sqlite._History("events", rows)
        assert history.waits == [70.0]
        assert history.runs == [("f", "retry", 10.0), ("f", "completed", 1.5)]
        assert history.outcomes() == {"completed": 1, "retry": 1, "failed": 0}
        spans = omniq_sqlite._Spans(0.0, 239.0)
        assert (spans.start, spans.width) == (0, 5)
        spans.width, spans.count = 60, 4
        seen = omniq_sqlite._Overview(
            at(0), [QueueStats("q", pending=3, running=1)], [], [], 0, [], history
        )
        page = Page(omniq_sqlite._chart_depth(seen, spans))
        titles = [a["aria-label"] for _, a in page.elements if "aria-label" in a]
        assert titles[0] == (
            "Depth over time. Now 4, at most 5; what waits is scheduled or pending."
        )
        depths = [(c["waiting"], c["running"]) for c in spans.sort(history)]
        assert depths == [(2, 0), (0, 0), (-1, 0), (-1, 1)]

    @pytest.mark.parametrize(
        ("since", "until", "width"),
        [(0, 1, 1), (0, 600, 10), (0, 3_600, 60), (1e9, 1e9 + 86_400, 900),
         (0, 30 * 86_400, 43_200), (0, 3_650 * 86_400, 31 * 86_400)],
    )  # fmt: skip
    def test_time_is_cut_into_spans_that_are_easy_to_read(
        self, since: float, until: float, width: float
    ) -> None:
        spans = omniq_sqlite._Spans(since, until)
        assert spans.width == width
        assert spans.count <= 120
        assert spans.start <= since
        assert spans.start + spans.count * spans.width >= until

    @pytest.mark.parametrize(
        ("since", "until", "expected"),
        [
            (3_600, 4_200, ["01:00", "01:02", "01:04", "01:06", "01:08", "01:10"]),
            (7, 100, ["00:00:30", "00:01:00", "00:01:30"]),
            (0, 86_400, ["01-01", "06:00", "12:00", "18:00", "01-02"]),
            (0, 29 * 86_400, ["01-01", "01-07", "01-13", "01-19", "01-25"]),
        ],
    )
    def test_a_scale_of_time_has_round_times_of_the_day(
        self, since: float, until: float, expected: list[str]
    ) -> None:
        program = "import omniq_sqlite, json, sys;"
        program += "spans = omniq_sqlite._Spans(*map(float, sys.argv[1:]));"
        program += "print(json.dumps(spans.ticks()))"
        for zone, shift in (("UTC", 0), ("UTC-5:30", -19_800)):  # east of Greenwich
            output = command_call(
                since + shift,
                until + shift,
                cwd=Path.cwd(),
                program=("-c", program),
                env={"TZ": zone},
            )[1]
            ticks = json.loads(output)
            assert [text for _, text in ticks] == expected
            assert all(0 <= at <= 1 for at, _ in ticks)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0 ms"), (0.0123, "12 ms"), (0.5, "0.5 s"), (12.3, "12 s"),
         (59.6, "0:01:00"),
         (60, "1 min"), (7_200, "2 h"), (3_725, "1:02:05"), (200_000, "2 d 7 h")],
    )  # fmt: skip
    def test_times_are_short(self, seconds: float, text: str) -> None:
        assert omniq_sqlite._show_seconds(seconds) == text

    @pytest.mark.parametrize(
        ("value", "top"), [(0, 2), (1, 1), (3, 4), (55, 60), (99, 100), (0.03, 0.04)]
    )
    def test_a_scale_ends_at_a_round_number(self, value: float, top: float) -> None:
        assert omniq_sqlite._round_up(value) == pytest.approx(top)

    def test_what_only_pages_need_is_imported_for_them(self) -> None:
        program = "import omniq_sqlite, sys; print(*sys.modules)"
        done = command_call(cwd=Path.cwd(), program=("-c", program))
        loaded = set(done[1].split())
        assert loaded.isdisjoint({"argparse", "html", "http.server"})


# -- serve --


@pytest.fixture
def served(db: Path) -> Iterator[str]:
    """The address of a live page on a file with a history."""
    make_history(db, events=True)
    process = command_start("serve", db, "--port", "0", cwd=db.parent)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    yield address
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == ("", "")
    assert process.returncode == 130


def ask(
    address: str, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, str, Any]:
    """Return status, text and headers of an answer."""
    url = urllib.parse.urlsplit(address)
    client = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    with closing(client):
        client.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            if value:
                client.putheader(name, value)
        client.endheaders()
        answer = client.getresponse()
        return answer.status, answer.read().decode(), answer.headers


class TestServe:
    def test_it_shows_the_page_of_the_report_live(self, served: str) -> None:
        assert served.startswith("http://127.0.0.1:")
        status, text, headers = ask(served, "/?since=24h")
        page = Page(text)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert "48 completed" in page.sections["throughput"]
        current = [a["href"] for _, a in page.elements if "aria-current" in a]
        assert current == ["?since=24h"]

    def test_another_name_for_our_address_is_refused(self, served: str) -> None:
        status, text, _ = ask(served, Host="evil.example")
        assert (status, "<html" in text) == (403, False)
        assert ask(served, Host="")[0] == 403
        assert ask(served, Host="localhost:99")[0] == 200

    @pytest.mark.parametrize(
        ("host", "ours"),
        [
            ("127.0.0.1:1", True),
            ("127.0.0.1", True),
            ("LOCALHOST:80", True),
            ("[::1]:5", True),
            ("[::1]", True),
            (None, False),
            ("evil.example:80", False),
            ("127.0.0.1.evil.example", False),
            ("localhost.evil.example", False),
            ("127.0.0.1@evil.example", False),
            ("0x7f000001", False),
            ("192.0.2.7", False),
        ],
    )
    def test_only_this_machine_is_our_host(self, host: str | None, ours: bool) -> None:
        assert omniq_sqlite._is_our_host(host, "127.0.0.1") is ours

    @pytest.mark.parametrize(
        ("host", "ours"),
        [("192.0.2.7:80", True), ("box.lan", True), ("evil.example", False)],
    )
    def test_an_address_that_was_asked_for_is_our_host(
        self, host: str, ours: bool
    ) -> None:
        assert omniq_sqlite._is_our_host(host, "box.lan") is ours

    def test_nothing_else_is_served(self, served: str) -> None:
        for path in ("/x", "/../../etc/passwd", "/?since=x", "//127.0.0.1/x"):
            assert ask(served, path)[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            assert ask(served, method=method)[0] == 501
        assert ask(served, method="HEAD")[:2] == (200, "")

    def test_another_address_is_served_when_asked(self, db: Path) -> None:
        with SQLiteBackend(db):
            pass
        everywhere = "0.0.0.0"  # noqa: S104 -- what is tested
        process = command_start(
            "serve", db, "--port", "0", "--host", everywhere, cwd=db.parent
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert ask(address, Host="192.0.2.7")[0] == 200
            assert ask(address, Host="evil.example")[0] == 403
        finally:
            os.killpg(process.pid, signal.SIGINT)
            finish(process)

    def test_a_port_that_is_taken_is_one_clear_line(
        self, served: str, db: Path, cli: Cli
    ) -> None:
        port = urllib.parse.urlsplit(served).port
        status, output, errors = cli("serve", db, "--port", port)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert f"cannot serve on 127.0.0.1:{port}: Address already in use" in errors
        assert "--port" in errors

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--port", "65536", "--port must be a number from 0 to 65535, not '65536'"),
            ("--port", "-1", "--port must be a number from 0 to 65535, not '-1'"),
            ("--host", "192.0.2.7", "cannot serve on 192.0.2.7:8765: "),
            ("--host", "no.invalid", "cannot serve on no.invalid:8765: "),
            ("--host", "a..b", "cannot serve on a..b:8765: "),
        ],
    )
    def test_what_cannot_be_served_on_is_one_clear_line(
        self, jobs: str, cli: Cli, option: str, value: str, message: str
    ) -> None:
        status, output, errors = cli("serve", jobs, f"{option}={value}")
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert message in errors
        assert "Errno" not in errors

    def test_a_file_that_was_replaced_is_opened_anew(
        self, served: str, db: Path
    ) -> None:
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("f", queue="old"))
        assert ask(served)[0] == 200
        away = db.with_name("away.db")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{db}{suffix}", f"{away}{suffix}")
        status, text, _ = ask(served, "/?since=15m")
        assert (status, "\n" in text) == (503, False)
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("f", queue="fresh"))
        until(lambda: "fresh" in ask(served, "/?since=7d")[1])

    def test_many_readers_cost_one_page_a_second(
        self, db: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_history(db, events=True)
        made: list[None] = []
        real = omniq_sqlite._render_page

        def render(*arguments: Any) -> bytes:
            made.append(None)
            return real(*arguments)

        monkeypatch.setattr(omniq_sqlite, "_render_page", render)
        live = omniq_sqlite._LivePage(argparse.Namespace(file=str(db)))
        with closing(live), concurrent.futures.ThreadPoolExecutor(8) as pool:
            started = time.monotonic()
            pages = list(pool.map(live.render, ["1h"] * 40))
            took = time.monotonic() - started
        assert len(pages) == 40
        assert len(made) <= 1 + took


# -- pages in a browser --


class Browser:
    """Chromium without a window, driven through a pipe by its DevTools protocol."""

    # The protocol is spoken on descriptors 3 and 4.
    LAUNCH = (
        "import os, sys; read, write = map(int, sys.argv[1:3]);"
        "read, write = os.dup(os.dup(read)), os.dup(os.dup(write));"
        "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-dev-shm-usage
        --disable-background-networking --disable-component-update --disable-sync
        --remote-debugging-pipe""".split()

    def __init__(self, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        launch = [sys.executable, "-c", self.LAUNCH, str(read), str(write), CHROMIUM]
        self._process = subprocess.Popen(
            [*launch, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        os.close(write)
        self._buffer = b""
        self._count = 0
        self._session: dict[str, str] = {}
        self.heard: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")
        session = self.call("Target.attachToTarget", flatten=True, **target)
        self._session = {"sessionId": session["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._write, json.dumps(message | self._session).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.heard.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert wait_readable([self._read], [], [], 60)[0], "no answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def run(self, script: str) -> Any:
        """Return the value of some JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, address: str, *, width: int = 1280, dark: bool = False) -> None:
        self.heard.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        ready = "document.readyState == 'complete' && location.href != 'about:blank'"
        until(lambda: self.run(ready))

    def complaints(self) -> list[dict[str, Any]]:
        kinds = (
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
        )
        return [event for event in self.heard if event.get("method") in kinds]

    def requests(self) -> list[str]:
        kind = "Network.requestWillBeSent"
        sent = [e["params"]["request"] for e in self.heard if e.get("method") == kind]
        return [request["url"] for request in sent]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"needs {CHROMIUM} (Debian: apt-get install chromium)")
    try:
        started = Browser(tmp_path_factory.mktemp("chromium"))
    except (AssertionError, OSError) as error:  # as in a container that forbids it
        pytest.skip(f"{CHROMIUM} does not start: {error}")
    with closing(started):
        yield started


# The lowest contrast of any text with what is behind it (WCAG 2: at least 4.5).
LOWEST_CONTRAST = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
    return [255, 255, 255];
  };
  let lowest = [21, ''];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || e.closest('script, style, svg')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, e.outerHTML.slice(0, 200)];
  }
  return lowest;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report on a file full of hostile names."""
    folder = tmp_path_factory.mktemp("report")
    make_history(folder / "d.db", events=True, name=HOSTILE)
    status = main(["report", str(folder / "d.db"), "-o", str(folder / "r.html")])
    assert status == 0
    return (folder / "r.html").as_uri()


class TestPagesInABrowser:
    @pytest.mark.parametrize("width", [360, 768, 1280])
    @pytest.mark.parametrize("dark", [False, True])
    def test_it_is_readable_in_both_schemes_at_any_width(
        self, browser: Browser, page: str, width: int, dark: bool
    ) -> None:
        browser.open(page, width=width, dark=dark)
        browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.run("document.documentElement.scrollWidth") <= width
        lowest, where = browser.run(LOWEST_CONTRAST)
        assert lowest >= 4.5, where
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        too_small = "[...document.querySelectorAll('main *:not(svg *)')].filter(e =>"
        too_small += " parseFloat(getComputedStyle(e).fontSize) < 11.5).length"
        assert browser.run(too_small) == 0

    def test_hostile_names_run_nothing_and_nothing_is_loaded(
        self, browser: Browser, page: str
    ) -> None:
        browser.open(page)
        assert browser.run("window.pwned === undefined") is True
        assert browser.run("document.querySelectorAll('script, img').length") == 0
        assert browser.complaints() == []
        assert browser.requests() == [page]

    def test_a_screen_reader_finds_names_for_all_there_is(
        self, browser: Browser, page: str
    ) -> None:
        browser.open(page)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = Counter(
            (node["role"]["value"], bool(node.get("name", {}).get("value")))
            for node in nodes
            if not node["ignored"]
        )
        assert named["image", True] == 4
        assert named["heading", True] == 12
        assert named["table", False] >= 5  # each within a region that has a name
        for role in ("image", "heading", "region", "link", "button"):
            assert named[role, False] == 0

    def test_the_keyboard_reaches_what_opens_and_what_scrolls(
        self, browser: Browser, page: str
    ) -> None:
        browser.open(page)
        reached = []
        for _ in range(40):
            for kind in ("keyDown", "keyUp"):
                browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                             windowsVirtualKeyCode=9)  # fmt: skip
            reached.append(browser.run("document.activeElement.localName"))
            if reached[-1] == "body":
                break
        wanted = "document.querySelectorAll('summary, main > section > div').length"
        assert reached[0] == "a"  # skips to the content
        assert reached.count("summary") + reached.count("div") == browser.run(wanted)

    def test_the_live_page_refreshes_and_leaves_what_is_looked_at(
        self, browser: Browser, served: str, db: Path
    ) -> None:
        browser.open(f"{served}?since=24h", width=360)
        pause = "document.getElementById('pause').click()"
        browser.run(pause)
        browser.run("document.querySelector('#failures details').open = true")
        browser.run("document.querySelector('#failures summary').focus()")
        browser.run("document.querySelector('#queues .scroll').scrollLeft = 40")
        browser.run("window.scrollTo(0, 1500)")
        browser.run("window.kept = 'this very page'")
        with SQLiteQueue(db) as queue:
            queue.enqueue(Task("f", queue="fresh"))
        browser.run(pause)
        shown = "document.querySelector('#queues').textContent.includes('fresh')"
        until(lambda: browser.run(shown))
        assert browser.run("window.kept") == "this very page"
        assert browser.run("window.scrollY") == 1500
        assert browser.run("document.querySelector('#queues .scroll').scrollLeft") == 40
        assert browser.run("document.querySelector('#failures details').open") is True
        assert browser.run("document.activeElement.localName") == "summary"
        assert browser.complaints() == []

    def test_a_live_page_can_be_paused_and_says_when_nobody_answers(
        self, browser: Browser, db: Path
    ) -> None:
        with SQLiteBackend(db):
            pass
        process = command_start("serve", db, "--port", "0", cwd=db.parent)
        assert process.stdout is not None
        browser.open(process.stdout.readline().strip())
        fails = "window.fetch = () => { throw Error('no way') }"
        browser.run(f"document.getElementById('pause').click(); {fails}")
        state = "document.getElementById('state').textContent"
        time.sleep(2.5)
        assert browser.run(state) == ""
        browser.run("document.getElementById('pause').click()")
        until(lambda: browser.run(state) == "No answer: no way")
        os.killpg(process.pid, signal.SIGINT)
        finish(process)


# -- main --


@pytest.mark.parametrize("command", [*READING, *PAGES])
class TestReading:
    def read(self, command: str, path: Path, cli: Cli) -> str:
        """Return the one line of an error."""
        identifier = ["some-id"] if command == "show" else []
        status, output, errors = cli(command, path, *identifier)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        return errors

    def test_a_missing_file_is_not_created(
        self, command: str, db: Path, cli: Cli
    ) -> None:
        assert "there is no file" in self.read(command, db, cli)
        assert not db.exists()

    def test_garbage_or_a_folder_is_one_clear_line(
        self, command: str, tmp_path: Path, db: Path, cli: Cli
    ) -> None:
        db.write_bytes(b"garbage " * 1_000)
        assert "not an SQLite database" in self.read(command, db, cli)
        assert "directory" in self.read(command, tmp_path, cli)

    def test_a_database_of_somebody_else_stays_as_it_is(
        self, command: str, db: Path, cli: Cli
    ) -> None:
        with closing(sqlite3.connect(db)) as connection:
            connection.execute("CREATE TABLE mine (x)")
            connection.commit()
        before = db.read_bytes()
        assert "OmniQ" in self.read(command, db, cli)
        assert db.read_bytes() == before


class TestReviewedCommands:
    """What a newcomer's round found."""

    def test_options_may_stand_before_and_between_the_arguments(
        self, cli: Cli, path: str
    ) -> None:
        status, output, _ = cli("enqueue", path, "f", "--queue", "mail", "x", "1")
        assert status == 0
        _, found, _ = cli("show", path, output.strip(), "--json")
        task = json.loads(found)["task"]
        assert (task["args"], task["queue"]) == (["x", 1], "mail")
        status, output, _ = cli("cancel", path, "--dry-run", output.strip())
        assert (status, "would be cancelled: 1 task" in output) == (0, True)
        assert cli("enqueue", path, "f", "--", "-x", "--y")[0] == 0
        assert cli("enqueue", path, "f", "-5")[0] == 0

    def test_an_empty_host_is_not_every_address(self, cli: Cli, jobs: str) -> None:
        status, _, errors = cli("serve", jobs, "--port", "0", "--host", "")
        assert status == 2
        assert "127.0.0.1" in errors

    @pytest.mark.parametrize(
        "value", [True, False, 1_234_567, {}, None, "6", [1, "a"], ""]
    )
    def test_a_value_is_shown_as_python_writes_it(
        self, cli: Cli, path: str, value: Any
    ) -> None:
        with SQLiteBackend(path) as backend:
            task_id = backend.enqueue(Task("f"))
            task = backend.queue.dequeue()
            assert task is not None
            backend.complete(task, value)
        _, output, _ = cli("show", path, task_id)
        assert f"value          {value!r}\n" in output

    @pytest.mark.parametrize(
        "command", [["enqueue", ":memory:", "f"], ["stats", ":memory:"]]
    )
    def test_memory_is_no_file_of_a_command(self, cli: Cli, command: list[str]) -> None:
        status, _, errors = cli(*command)
        assert status == 2
        assert "name a file" in errors

    def test_a_dry_run_says_what_would_not_be(self, cli: Cli, jobs: str) -> None:
        _, _, errors = cli("cancel", jobs, "nope", "--dry-run")
        assert errors.startswith("would not be cancelled: 'nope'")

    @pytest.mark.parametrize(
        "options",
        [
            ["--limit", "9223372036854775807"],
            ["--offset", "99999999999999999999"],
            ["--offset", "-1"],
            ["--older-than=-5m"],
            ["--newer-than", "0001-01-03"],
            ["--newer-than", "9999-12-31"],
            ["--func", "\udcff"],
        ],
    )
    def test_what_is_out_of_range_is_named(
        self, cli: Cli, jobs: str, options: list[str]
    ) -> None:
        status, _, errors = cli("list", jobs, *options)
        assert status == 2
        assert is_one_line(errors)
        assert "must be" in errors

    def test_output_may_be_closed(self, jobs: str, tmp_path: Path) -> None:
        shell = f"exec {sys.executable} -m omniq_sqlite stats {jobs} >&-"
        done = subprocess.run(
            ["sh", "-c", shell],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


class TestMain:
    @pytest.mark.parametrize("command", [*WRITING, *READING, *PAGES])
    def test_help_has_an_example(self, command: str, cli: Cli) -> None:
        status, output, _ = cli(command, "--help")
        assert status == 0
        assert f"example:\n  omniq-sqlite {command} " in output
        assert ("--json" in output) == (command in READING)

    def test_every_command_is_tested(self) -> None:
        tested = {*WRITING, *READING, *PAGES}
        assert set(omniq_sqlite._COMMANDS) == tested

    def test_every_option_is_used_and_the_same_in_all_commands(self) -> None:
        used = {
            o for _, terms, _ in omniq_sqlite._COMMANDS.values() for o in terms.split()
        }
        assert set(omniq_sqlite._OPTIONS) == used

    @pytest.mark.parametrize(
        "missing", [["aiosqlite"], ["anyio"], ["aiosqlite", "anyio"]]
    )
    def test_the_bare_file_says_which_packages_are_missing(
        self, missing: list[str], tmp_path: Path
    ) -> None:
        there = tmp_path / "packages"
        there.mkdir()
        for name in {"aiosqlite", "anyio"}.difference(missing):
            (there / f"{name}.py").touch()
        copy_of = shutil.copy(MODULE, tmp_path / "queue_of_ours.py")
        outcome = subprocess.run(
            [sys.executable, "-S", copy_of, "--help"],
            env={"PYTHONPATH": str(there), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (outcome.returncode, outcome.stdout) == (2, "")
        assert is_one_line(outcome.stderr)
        assert re.findall(r"'(\w+)>=[\d.]+'", outcome.stderr) == missing

    def test_the_bare_file_has_its_help(self, tmp_path: Path) -> None:
        shutil.copy(MODULE, tmp_path / "queue_of_ours.py")
        outcome = command_call("--help", cwd=tmp_path, program=("queue_of_ours.py",))
        assert (outcome[0], outcome[2]) == (0, "")
        words = " ".join(outcome[1].split())  # a long path is wrapped
        assert words.startswith(f"usage: {sys.executable} queue_of_ours.py [-h]")

    @pytest.mark.parametrize("is_on_path", [False, True])
    def test_the_script_is_shown_as_it_was_called(
        self, tmp_path: Path, is_on_path: bool
    ) -> None:
        script = tmp_path / "omniq-sqlite"  # as `pip install` makes it
        script.write_text("import sys, omniq_sqlite\nsys.exit(omniq_sqlite.main())\n")
        script.chmod(0o755)
        called = str(script) if is_on_path else "./omniq-sqlite"
        path = {"PATH": str(tmp_path)} if is_on_path else {}
        outcome = command_call(
            "stats", "--help", cwd=tmp_path, program=(called,), env=path
        )
        shown = "omniq-sqlite" if is_on_path else "./omniq-sqlite"
        assert outcome[1].startswith(f"usage: {shown} stats [-h]")

    def test_help_lists_the_commands_and_exit_statuses(self, cli: Cli) -> None:
        status, output, _ = cli("--help")
        assert status == 0
        assert re.findall(r"\b\d+\b", output.partition("Exit status:")[2]) == [
            "0", "1", "2", "75", "130"
        ]  # fmt: skip
        assert all(command in output for command in [*WRITING, *READING, *PAGES])

    def test_help_shows_defaults_and_what_an_instant_looks_like(self, cli: Cli) -> None:
        helps = {
            c: " ".join(cli(c, "--help")[1].split()) for c in omniq_sqlite._COMMANDS
        }
        parameters = inspect.signature(Worker).parameters
        for name in ("concurrency", "lease", "grace"):
            default = f"(default: {parameters[name].default:g})"
            assert re.search(
                rf"--{name} \w+ [^-]*{re.escape(default)}", helps["worker"]
            )
        assert "(default: 100)" in helps["list"]
        assert "(default: 8765)" in helps["serve"]
        for command in ("list", "events", "purge", "report"):
            assert "2026-01-31T12:00, or an age such as 90s, 10m" in helps[command]

    def test_it_tells_its_version(self, cli: Cli) -> None:
        assert cli("--version") == (0, f"{omniq_sqlite.__version__}\n", "")

    @pytest.mark.parametrize("wrong", [[], ["none"], ["stats"], ["list", "f", "--x"]])
    def test_wrong_usage_is_status_2(self, wrong: list[str], cli: Cli) -> None:
        status, _, errors = cli(*wrong)
        assert status == 2
        assert "usage:" in errors

    @pytest.mark.parametrize(
        ("wrong", "missing"),
        [("enqueue f", "FUNC"), ("enqueue", "FILE, FUNC"), ("retry", "FILE")],
    )
    def test_only_what_is_missing_is_called_required(
        self, wrong: str, missing: str, cli: Cli
    ) -> None:
        errors = cli(*wrong.split())[2]
        assert errors.endswith(f"arguments are required: {missing}\n")

    @pytest.mark.parametrize(
        ("command", "queue"),
        [
            ("pause {}", ""), ("resume {}", " "), ("list {} --queue", ""),
            ("events {} --queue", " "), ("enqueue {} f --queue", " "),
            ("worker {} --app app:tasks --queues", ""),
            ("worker {} --app app:tasks --queues", "a, ,b"),
        ],
    )  # fmt: skip
    def test_a_queue_without_a_name_is_refused(
        self, command: str, queue: str, jobs: str, cli: Cli
    ) -> None:
        status, output, errors = cli(*command.format(jobs).split(), queue)
        assert (status, output, is_one_line(errors)) == (2, "", True)
        assert "the name of a queue must not be empty" in errors

    def test_blanks_around_the_name_of_a_queue_do_not_count(
        self, jobs: str, cli: Cli
    ) -> None:
        assert cli("pause", jobs, " bad ")[1].startswith("'bad' is paused")
        assert cli("list", jobs, "--queue", "bad ")[0] == 0
        assert omniq_sqlite._parse_queues(" a b , c ") == ["a b", "c"]

    @pytest.mark.parametrize(
        ("error", "outcome"),
        [
            (KeyboardInterrupt(), (130, "", "")),
            (
                TypeError("wrong\n\x1btype"),
                (2, "", "omniq-sqlite: TypeError: wrong\\n\\x1btype\n"),
            ),
        ],
    )
    def test_an_interrupt_is_quiet_and_a_mistake_of_ours_one_line(
        self,
        error: BaseException,
        outcome: object,
        cli: Cli,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: str) -> frozenset[str]:
            raise error

        monkeypatch.setattr(omniq_sqlite, "_components", fail)
        assert cli("stats", "jobs.db") == outcome

    def test_a_reader_that_leaves_early_is_no_error(self, tmp_path: Path) -> None:
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            backend.enqueue_many(Task("f", ("x" * 900,)) for _ in range(2_000))
        process = command_start(
            "list", "jobs.db", "--json", "--limit", "2000", cwd=tmp_path
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        with process.stderr:
            assert process.stderr.read() == ""
        assert process.wait(60) == 0

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_full_disk_is_one_clear_line(self, jobs: str, tmp_path: Path) -> None:
        with open("/dev/full", "w") as full:
            status, _, errors = command_call("stats", jobs, cwd=tmp_path, stdout=full)
        assert (status, is_one_line(errors)) == (2, True)

    def test_it_writes_to_a_terminal_of_another_encoding(self, tmp_path: Path) -> None:
        with SQLiteBackend(tmp_path / "jobs.db") as backend:
            backend.enqueue(Task("\N{SNOWMAN}"))
        environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
        status, output, _ = command_call(
            "list", "jobs.db", cwd=tmp_path, env=environment
        )
        assert (status, "\\u2603" in output) == (0, True)

    def test_printable_escapes_what_a_terminal_would_act_on(self) -> None:
        text = "a b\N{SNOWMAN}\n\t\x1b[0m\x9b\udcff\ud800\u202e\u2028\0"
        expected = "a b\N{SNOWMAN}\\n\\t\\x1b[0m\\x9b\\udcff\\ud800\\u202e\\u2028\\x00"
        assert omniq_sqlite._printable(text) == expected


# =============================================================================
# Many processes
# =============================================================================

CONSUMER = """
queue = SQLiteQueue(path, synchronous="NORMAL")
log = os.open(arguments[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
print("ready", flush=True)
while (task := queue.dequeue(timeout=None)).func != "stop":
    os.write(log, task.func.encode() + b"\\n")
    queue.complete(task)
queue.complete(task)
queue.close()
"""

ASYNC_CONSUMER = """
log = os.open(arguments[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
async def main():
    async with AsyncSQLiteQueue(path, synchronous="NORMAL") as queue:
        print("ready", flush=True)
        while (task := await queue.dequeue(timeout=None)).func != "stop":
            os.write(log, task.func.encode() + b"\\n")
            await queue.complete(task)
        await queue.complete(task)
asyncio.run(main())
"""


class TestManyProcesses:
    def test_two_producers_and_four_consumers_work_each_task_once(
        self, programs: Programs, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("warm", queue="warm"))
        producer = """
            queue = SQLiteQueue(path, synchronous="NORMAL")
            name = arguments[0]
            for number in range(0, 450, 3):
                queue.enqueue(Task(f"{name}{number:03}"))
                queue.enqueue_many([Task(f"{name}{number + n:03}") for n in (1, 2)])
            queue.close()
        """
        consumers = [
            programs.start(code, path, f"{path}.{n}")
            for n, code in enumerate(
                [CONSUMER, CONSUMER, ASYNC_CONSUMER, ASYNC_CONSUMER]
            )
        ]
        for program in consumers:
            assert programs.read(program) == "ready"
        producers = [programs.start(producer, path, name) for name in "ab"]
        for program in producers:
            programs.finish(program)
        with SQLiteQueue(path) as queue:
            queue.enqueue_many([Task("stop", priority=-1) for _ in consumers])
        for program in consumers:
            programs.finish(program)
        worked: list[str] = []
        for n in range(4):
            worked += Path(f"{path}.{n}").read_text().split()
        wanted = [f"{name}{number:03}" for name in "ab" for number in range(450)]
        assert sorted(worked) == wanted
        assert statuses(path) == ["pending"]
        assert is_whole(path)

    def test_no_process_is_starved(self, programs: Programs, path: str) -> None:
        """SQLite's own busy wait gave one of eight a single commit in 4 seconds.

        The best of some rounds counts: the system may stop one of them, too.
        """
        SQLiteQueue(path).enqueue(Task("f"))
        code = """
            queue = SQLiteQueue(path)
            queue.count_tasks()
            print("ready", flush=True)
            while sys.stdin.readline():
                count, longest = 0, 0.0
                end = time.monotonic() + 1.0
                while (began := time.monotonic()) < end:
                    queue.enqueue(Task("f"))
                    longest = max(longest, time.monotonic() - began)
                    count += 1
                print(count, longest, flush=True)
        """
        started = [programs.start(code, path) for _ in range(4)]
        assert [programs.read(program) for program in started] == ["ready"] * 4
        rounds = []
        for _ in range(8):
            for program in started:
                programs.go(program)
            found = [programs.read(program).split() for program in started]
            counts = [int(count) for count, _ in found]
            longest = max(float(seconds) for _, seconds in found)
            rounds.append((counts, longest))
            if min(counts) / max(counts) > 0.2 and longest < 1.0:
                break
        else:
            pytest.fail(f"counts and the longest wait of each round: {rounds}")
        for program in started:
            programs.finish(program)

    def test_a_stopped_holder_of_the_lock_is_waited_for_by_name(
        self, programs: Programs, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("f"))
        holder = programs.start(
            """
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            print("ready", flush=True)
            sys.stdin.readline()
            connection.execute("COMMIT")
            """,
            path,
        )
        assert programs.read(holder) == "ready"
        if os.name == "posix":
            holder.send_signal(signal.SIGSTOP)
        with SQLiteQueue(path, busy_timeout=0.3) as queue:
            with pytest.raises(DatabaseBusyError):
                queue.enqueue(Task("g"))
            assert queue.count_tasks() == 1
            if os.name == "posix":
                holder.send_signal(signal.SIGCONT)
            programs.finish(holder) if holder.stdin is None else holder.communicate(
                "\n"
            )
            queue.enqueue(Task("h"))
        assert select(path, "SELECT func FROM omniq_task ORDER BY seq") == [
            "f",
            "h",
        ]

    def test_opening_and_closing_beside_writers_surfaces_nothing(
        self, programs: Programs, path: str
    ) -> None:
        """Reads and opens meet another process's first open and last close."""
        code = """
            for number in range(25):
                with SQLiteQueue(path, synchronous="OFF") as queue:
                    queue.enqueue(Task("f"))
                    queue.count_tasks()
                    queue.dequeue("none")
        """
        started = [programs.start(code, path) for _ in range(4)]
        for program in started:
            programs.finish(program)
        assert statuses(path) == ["pending"] * 100
        assert is_whole(path)


# =============================================================================
# Crashes
# =============================================================================

KILLS = """
import contextlib
template = path + ".template"
now = 1_800_000_000.0
def backend():
    return SQLiteBackend(path, events=True, clock=lambda: now)
calls = {
    "enqueue": lambda b, t: b.enqueue(Task("new")),
    "enqueue_many": lambda b, t: b.enqueue_many([Task("a"), Task("b"), Task("c")]),
    "dequeue": lambda b, t: b.queue.dequeue(),
    "dequeue the due": lambda b, t: b.queue.dequeue("due"),
    "complete": lambda b, t: b.queue.complete(t),
    "complete with a result": lambda b, t: b.complete(
        t, 42, enqueue=[Task("next", unique_key="mine"), Task("more")]),
    "fail": lambda b, t: b.fail(t, ValueError("x"), retry=False),
    "fail and retry": lambda b, t: b.fail(t, ValueError("x"), delay=1),
    "release": lambda b, t: b.queue.release(t),
    "cancel_all": lambda b, t: b.queue.cancel_all(),
}
def snapshot():
    connection = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(connection):
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [
            connection.execute("SELECT func, status, attempt, error IS NULL"
                               " FROM omniq_task ORDER BY seq").fetchall(),
            connection.execute("SELECT task_id, status FROM omniq_result").fetchall(),
            connection.execute("SELECT type FROM omniq_event ORDER BY 1").fetchall(),
        ]
def restore():
    for end in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + end)
    with open(template, "rb") as source, open(path, "wb") as target:
        target.write(source.read())
def prepare():
    with backend() as b:
        b.enqueue_many([Task("mine", unique_key="mine"), Task("other")])
        b.enqueue(Task("due", queue="due"), delay=-0.0)
        task = b.queue.dequeue()
    os.rename(path, template)
    import pickle
    return pickle.dumps(task)
def attempt(call, task, deadly):
    "Run a call in a child that dies before its n-th statement."
    import pickle
    count = 0
    def trace(sql):
        nonlocal count
        count += 1
        if count == deadly:
            os._exit(9)
    class Mortal(sqlite3.Connection):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.set_trace_callback(trace)
    import functools
    connect = functools.partial(sqlite3.connect, factory=Mortal)
    omniq_sqlite._connection_factory = connect
    b = backend()
    b.queue.count_tasks()
    count = 0
    call(b, pickle.loads(task))
    os._exit(0)
task, kills = prepare(), 0
for name, call in calls.items():
    restore()
    before = snapshot()
    outcomes = []
    for deadly in range(1, 60):
        restore()
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(20)
                attempt(call, task, deadly)
            finally:
                os._exit(70)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9), (name, deadly, status)
        outcomes.append(snapshot())
        if status == 0:
            break
        kills += 1
    after = outcomes[-1]
    assert after != before, name
    for deadly, outcome in enumerate(outcomes, 1):
        assert outcome in (before, after), (name, deadly, outcome)
    assert before in outcomes, name
print(kills)
"""


@POSIX
class TestCrashes:
    def test_a_kill_at_every_statement_leaves_all_or_nothing(self, path: str) -> None:
        assert int(run_program(KILLS, path, deadline=60)) > 60

    def test_kills_at_random_moments_lose_and_double_nothing(
        self, programs: Programs, path: str
    ) -> None:
        """Counts are kept in files, so that the judge is not the accused."""
        SQLiteQueue(path).enqueue(Task("warm", queue="warm"))
        producer = """
            queue = SQLiteQueue(path, synchronous="NORMAL")
            log = os.open(arguments[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            print("ready", flush=True)
            for number in range(100_000):
                task_id = queue.enqueue(Task("f"))
                os.write(log, task_id.encode() + b"\\n")
        """
        consumer = """
            queue = SQLiteQueue(path, synchronous="NORMAL")
            log = os.open(arguments[0], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            print("ready", flush=True)
            while True:
                task = queue.dequeue(timeout=None, lease=3600)
                queue.complete(task)
                os.write(log, task.id.encode() + b"\\n")
        """
        random.seed(6)
        for number in range(4):
            started = [
                programs.start(producer, path, path + ".in"),
                programs.start(consumer, path, path + ".out"),
            ]
            for program in started:
                assert programs.read(program) == "ready"
            before = os.stat(path + ".out").st_size
            until(lambda: os.stat(path + ".out").st_size > before)  # noqa: B023
            time.sleep(random.uniform(0.0, 0.2))
            for program in random.sample(started, 2):
                program.send_signal(signal.SIGKILL)
                program.communicate()
            assert is_whole(path), number
        acknowledged = Path(path + ".in").read_text().split()
        completed = Path(path + ".out").read_text().split()
        left = select(path, "SELECT id FROM omniq_task WHERE queue = 'default'")
        assert len(completed) == len(set(completed)) > 0
        assert not set(completed) & set(left)  # nothing complete can run again
        # At most one task of each killed consumer was completed without a note.
        missing = set(acknowledged) - set(completed) - set(left)
        assert len(missing) <= 4
        running = select(path, "SELECT id FROM omniq_task WHERE status = 'running'")
        assert len(running) <= 4

    def test_a_killed_holder_of_the_lock_blocks_nobody(
        self, programs: Programs, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("f"))
        holder = programs.start(
            """
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE omniq_task SET func = 'g'")
            print("ready", flush=True)
            sys.stdin.readline()
            """,
            path,
        )
        assert programs.read(holder) == "ready"
        threads = Threads()
        with SQLiteQueue(path) as queue:
            threads.start(queue.enqueue, Task("h"))
            until(lambda: database_of(queue).pending)
            holder.kill()
            threads.join()
        assert select(path, "SELECT func FROM omniq_task ORDER BY seq") == [
            "f",
            "h",
        ]


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
class TestTorture:
    """The short form of `benchmarks/torture.py`, which see."""

    @pytest.mark.parametrize(
        "attack", ["kill", "stop", "fork", "clock", "damage", "hostile"]
    )
    def test_a_short_round_finds_nothing(self, tmp_path: Path, attack: str) -> None:
        program = Path(__file__).parent / "benchmarks" / "torture.py"
        terms = ["0", "--round", "2", "--seed", "1", "--only", attack]
        done = subprocess.run(
            [sys.executable, str(program), *terms],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        nothing = "lost 0, doubled 0, stuck 0, corrupt 0, hung 0, surfaced 0"
        assert done.stdout.splitlines()[-1] == nothing


POISON = {
    "malformed JSON": "UPDATE omniq_task SET args = '[', metadata = '{'",
    "JSON of another kind": "UPDATE omniq_task SET kwargs = '3'",
    "arguments of another kind": """UPDATE omniq_task SET args = '{"a": 1}'""",
    "metadata of another kind": "UPDATE omniq_task SET metadata = '[]'",
    "numbers out of range": """
        UPDATE omniq_task SET retry_delay = 1e300, timeout = -1, run_at = -1e300,
            max_attempts = 9223372036854775807, priority = 9223372036854775807
    """,
    "infinite numbers": "UPDATE omniq_task SET retry_delay = 9e999, timeout = 9e999",
    "empty names": "UPDATE omniq_task SET func = '', queue = '', unique_key = ''",
    "nested too deep": (
        "UPDATE omniq_task SET args = replace(hex(zeroblob(9999)), '0', '[')"
    ),
    "a tag of nonsense": """UPDATE omniq_task SET args = '[{"$timedelta":"x"}]'""",
    "an instant past all years": "UPDATE omniq_task SET created_at = 1e300",
    "a priority out of range": "UPDATE omniq_task SET priority = -9223372036854775808",
    "an unknown status": "UPDATE omniq_task SET status = 'lost' WHERE seq = 1",
    "a name with NUL": "UPDATE omniq_task SET func = 'a' || char(0)",
    "a name to import": (
        "UPDATE omniq_task SET func = 'os.system', args = '[\"touch x\"]'"
    ),
    "counts that overflow": (
        "UPDATE omniq_task SET attempt = 9223372036854775807,"
        " claims = 9223372036854775807, max_attempts = 9223372036854775807"
    ),
    "a worker's malformed queues": "UPDATE omniq_worker SET queues = '['",
    "a worker's start past all years": "UPDATE omniq_worker SET started_at = 1e300",
    "a result of an unknown kind": "UPDATE omniq_result SET status = 'maybe'",
    "a result's malformed value": "UPDATE omniq_result SET value = '['",
    "an event's malformed details": "UPDATE omniq_event SET details = '['",
}


class TestHostileFile:
    """A file that somebody else has written."""

    @pytest.mark.parametrize("name", POISON)
    def test_what_cannot_be_read_is_an_error_by_name_and_the_worker_goes_on(
        self, tmp_path: Path, name: str
    ) -> None:
        path = tmp_path / "jobs.db"
        tasks = TaskRegistry()

        @tasks.register
        def fine() -> str:
            return "done"

        with SQLiteBackend(path, events=True) as backend:
            backend.enqueue_many([Task("fine"), Task("fine")])
            backend.complete(cast(Task, backend.queue.dequeue(worker="w")), 1)
            with raw(path) as connection:
                connection.execute("PRAGMA ignore_check_constraints = ON")
                connection.execute(POISON[name])
            assert backend.results is not None
            assert backend.events is not None
            for read in (
                backend.queue.list_tasks,
                backend.queue.stats,
                backend.queue.list_workers,
                backend.results.list_results,
                backend.events.query,
                backend.check,
                backend.cleanup,
            ):
                with contextlib.suppress(SerializationError):
                    read()
            after = backend.enqueue(fine.task())
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert backend.result(after, timeout=0).value == "done"
        assert not (tmp_path / "x").exists()

    def test_a_table_in_which_types_are_not_enforced_is_refused(
        self, path: str
    ) -> None:
        SQLiteQueue(path).enqueue(Task("f"))
        with raw(path) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_schema SET sql = replace(sql, ') STRICT', ')')"
                " WHERE name = 'omniq_task'"
            )
        with pytest.raises(SchemaVersionError, match="omniq_task is not OmniQ's"):
            SQLiteQueue(path).count_tasks()


class Unspeakable(Exception):
    """Its text cannot be read."""

    def __str__(self) -> NoReturn:
        raise RuntimeError


class TestSecrets:
    """No payload is in the text of an error or in a line of the log."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Task("f", cast(Any, "hunter2")),
            lambda: Task("f", (), cast(Any, ["hunter2"])),
            lambda: Task("f", metadata=cast(Any, "hunter2")),
            lambda: TaskResult(
                "id", ResultStatus.SUCCESS, metadata=cast(Any, "hunter2")
            ),
            lambda: TaskEvent("type", message=cast(Any, ["hunter2"])),
            lambda: TaskEvent("type", details=cast(Any, ["hunter2"])),
            lambda: SQLiteQueue(":memory:").enqueue(Task("f", ({("hunter2",): 1},))),
            lambda: SQLiteQueue(":memory:").enqueue(Task("f", (Decimal("NaN42"),))),
        ],
    )
    def test_a_refused_payload_is_told_by_its_type(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"str|list|tuple|Decimal") as caught:
            make()
        assert "hunter2" not in str(caught.value)
        assert "42" not in str(caught.value)

    def test_a_worker_logs_no_payload_and_no_long_text(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "omniq_sqlite")
        tasks = TaskRegistry()

        @tasks.register(max_attempts=2, retry_delay=0)
        def talk(_secret: str) -> None:
            raise ValueError("x" * 100_000)

        @tasks.register(max_attempts=2, retry_delay=0)
        def mumble(_secret: str) -> None:
            raise Unspeakable

        @tasks.register(max_attempts=2, retry_delay=0)
        def mistake() -> None: ...

        with SQLiteBackend(":memory:") as backend:
            backend.enqueue_many([talk.task("hunter2"), mumble.task("hunter2")])
            backend.enqueue(
                Task("mistake", ("hunter2",), max_attempts=2, retry_delay=0)
            )
            Worker(backend, tasks).run(until_empty=True, signals=False)
            assert [t.status for t in backend.queue.list_tasks()] == ["failed"] * 3
        lines = [record.getMessage() for record in caplog.records]
        assert len([line for line in lines if "runs again" in line]) == 3
        assert max(map(len, lines)) < 500
        assert "hunter2" not in caplog.text


# =============================================================================
# Documentation
# =============================================================================
#
# README's blocks run as they stand: those of a section one after the other in
# one child process and one empty folder. A block that begins with `# name.py`
# is that file, for its section and all later ones. A `text` block is what the
# Python blocks above it print. A section with `await` runs inside a loop, as in
# a notebook. A shell line marked `# until Ctrl-C` runs beside what follows it.

ROOT = Path(__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Runs the blocks of one section, given as JSON `[language, line, text]`.
BLOCK_RUNNER = r"""
import ast, asyncio, contextlib, importlib, inspect, io, json, shlex, shutil, signal
import subprocess, sys
from pathlib import Path

namespace = {"__name__": "__main__"}
others = "sqlite3", "sqlite-utils", "datasette"  # a machine may be without them
printed = io.StringIO()
beside = []


async def run_python(line, text):
    code = compile(
        "\n" * line + text, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    with contextlib.redirect_stdout(printed):
        outcome = eval(code, namespace)
        if inspect.iscoroutine(outcome):
            await outcome


def run_shell(text):
    for command in text.splitlines():
        words = shlex.split(command, comments=True)
        if not words or (words[0] in others and shutil.which(words[0]) is None):
            continue
        if command.endswith("# until Ctrl-C"):
            beside.append(subprocess.Popen(words))
        else:
            subprocess.run(words, check=True, timeout=30)


async def run(blocks):
    for language, line, text in blocks:
        if language == "python":
            await run_python(line, text)
        elif language == "sh":
            run_shell(text)
        else:
            shown = printed.getvalue()
            assert shown == text, f"README.md:{line} shows {text!r}, not {shown!r}"
            printed.seek(0)
            printed.truncate()


def end_what_runs_beside():
    for process in beside:
        process.send_signal(signal.SIGINT)
    for process in beside:
        assert process.wait(timeout=20) in (0, 130), process.args


blocks = json.loads(sys.argv[1])
try:
    if any("await " in text and "def " not in text for _, _, text in blocks):
        asyncio.run(run(blocks))
    else:
        try:
            run(blocks).send(None)  # no loop: nothing in it waits
        except StopIteration:
            pass
finally:
    end_what_runs_beside()
"""

# What `pip install` makes of the script's entry point, without its folder.
CONSOLE_SCRIPT = """\
#!/bin/sh
exec {python} -P -c 'import sys, omniq_sqlite; sys.exit(omniq_sqlite.main())' "$@"
"""

# A link to the program of a virtual environment would not find its packages.
PYTHON_SCRIPT = """\
#!/bin/sh
exec {python} "$@"
"""

# Runs the Python blocks, given as JSON, as the cells of a notebook.
NOTEBOOK_RUNNER = r"""
import json, sys
import nbclient, nbformat

cells = [nbformat.v4.new_code_cell(text) for text in json.loads(sys.argv[1])]
notebook = nbformat.v4.new_notebook(cells=cells)
nbclient.NotebookClient(notebook, timeout=40, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("text", ""), end="")  # tables are tested elsewhere
"""


@dataclass
class Section:
    """A second-level heading with the fenced blocks below it."""

    title: str
    blocks: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, str]:
        """Blocks that name the file that they are."""
        named = (re.match(r"# (\w+\.py)\n", text) for _, _, text in self.blocks)
        return {match[1]: match.string for match in named if match is not None}


def read_sections(markdown: str) -> list[Section]:
    sections = [Section("")]
    language = ""
    start = 0
    inside: list[str] | None = None
    for number, line in enumerate(markdown.splitlines(), start=1):
        if inside is not None:
            if line == "```":
                text = "\n".join(inside) + "\n"
                sections[-1].blocks.append((language, start, text))
                inside = None
            else:
                inside.append(line)
        elif line.startswith("```"):
            language, start, inside = line[3:], number, []
        elif line.startswith("## "):
            sections.append(Section(line[3:]))
    assert inside is None, "a block is not closed"
    return sections[1:]


SECTIONS = read_sections(README)
RUNNABLE = [section for section in SECTIONS if section.title != "Set up"]


def child_environment(folder: Path) -> dict[str, str]:
    """Return an environment with our console script on PATH and this module."""
    folder.mkdir(exist_ok=True)
    for name, text in (("omniq-sqlite", CONSOLE_SCRIPT), ("python", PYTHON_SCRIPT)):
        script = folder / name
        script.write_text(text.format(python=sys.executable))
        script.chmod(0o755)
    return environment() | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def find_section(title: str) -> Section:
    [section] = [section for section in SECTIONS if section.title == title]
    return section


def run_section(
    section: Section, tmp_path: Path, program: str, argument: object
) -> str:
    """Run `program` beside the files that `section` knows; return what it prints."""
    place = tmp_path / "place"
    place.mkdir()
    for earlier in SECTIONS[: SECTIONS.index(section) + 1]:
        for name, text in earlier.files.items():
            (place / name).write_text(text, encoding="utf-8")
    outcome = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)],
        cwd=place,
        env=child_environment(tmp_path / "bin"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_the_program_in_the_docstring_runs() -> None:
    found = doctest.testmod(omniq_sqlite)
    assert found.attempted > 0
    assert found.failed == 0


class TestReadme:
    @pytest.mark.parametrize(
        "section",
        [section for section in RUNNABLE if section.blocks],
        ids=lambda section: section.title,
    )
    def test_blocks_of_a_section_run_as_they_stand(
        self, section: Section, tmp_path: Path
    ) -> None:
        if any("fastapi" in text for _, _, text in section.blocks):
            pytest.importorskip("fastapi")
        run_section(section, tmp_path, BLOCK_RUNNER, section.blocks)

    def test_every_block_has_a_language_that_runs(self) -> None:
        languages = {language for s in SECTIONS for language, _, _ in s.blocks}
        assert languages == {"python", "sh", "text"}

    def test_set_up_is_two_commands_and_the_second_is_what_ci_runs(self) -> None:
        assert SECTIONS[0].title == "Set up"
        [(_, _, demo), (_, _, tests)] = SECTIONS[0].blocks
        prefix = "python3 -m venv .venv && .venv/bin/pip install "
        assert demo == prefix + ". && .venv/bin/omniq-sqlite demo .\n"
        assert tests.startswith(prefix)
        command = tests.rpartition(" && .venv/bin/")[2].strip()
        ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
        assert re.findall(r"^ *run (python .*)$", ci, re.MULTILINE) == [command]

    def test_the_table_of_contents_leads_to_every_section(self) -> None:
        contents = README.partition("**Contents:**")[2].partition("\n\n")[0]
        links = re.findall(r"\[(.+)\]\(#(.+)\)", contents)
        titles = [section.title for section in SECTIONS]
        assert links == [(t, t.lower().replace(" ", "-")) for t in titles]

    def test_links_inside_the_page_lead_somewhere(self) -> None:
        anchors = {s.title.lower().replace(" ", "-") for s in SECTIONS}
        assert set(re.findall(r"\]\(#([^)]+)\)", README)) == anchors

    def test_every_error_has_its_cure(self) -> None:
        row = re.compile(r"^\| `(\w+)` \| (?:`(\w+)`)? ?\|", re.MULTILINE)
        listed = dict(row.findall(README))
        errors = {
            name: ", ".join(
                base.__name__
                for base in value.__bases__
                if not issubclass(base, omniq_sqlite.OmniQError)
            )
            for name in omniq_sqlite.__all__
            if isinstance(value := getattr(omniq_sqlite, name), type)
            and issubclass(value, omniq_sqlite.OmniQError)
            and value is not omniq_sqlite.OmniQError
        }
        assert listed == errors

    def test_the_changelog_begins_with_this_version(self) -> None:
        changelog = README.partition("\n## Changelog\n")[2]
        versions = re.findall(r"^### (\S+)$", changelog, re.MULTILINE)
        assert versions[0] == omniq_sqlite.__version__

    def test_the_web_handler_counts_words(self, tmp_path: Path) -> None:
        pytest.importorskip("fastapi")
        pytest.importorskip("httpx")
        section = find_section("In a web handler")
        check = """
import asyncio
from httpx import ASGITransport, AsyncClient
from jobs import tasks
from omniq_sqlite import AsyncWorker

async def visit():
    transport = ASGITransport(app)
    client = AsyncClient(transport=transport, base_url="http://shop")
    async with lifespan(app), client:
        answer = await client.post("/counts", params={"text": "a b c"})
        assert answer.status_code == 202
        page = f"/counts/{answer.json()['id']}"
        answer = (await client.get(page)).json()
        assert answer == {"status": "pending"}, answer
        await AsyncWorker(backend, tasks).run(until_empty=True, signals=False)
        answer = (await client.get(page)).json()
        assert answer == {"status": "success", "words": 3}, answer
        assert (await client.get("/counts/unknown")).status_code == 404

asyncio.run(visit())
"""
        blocks = [*section.blocks, ("python", 0, check)]
        run_section(section, tmp_path, BLOCK_RUNNER, blocks)

    def test_the_serializer_takes_pydantic_as_the_page_says(
        self, tmp_path: Path
    ) -> None:
        pytest.importorskip("pydantic")
        section = find_section("Your own types")
        *_, (_, _, program), (_, _, shown) = section.blocks
        for before, after in (
            ("import dataclasses\n", "import pydantic\n"),
            (
                "@dataclasses.dataclass\nclass Order:",
                "class Order(pydantic.BaseModel):",
            ),
            ("dataclasses.asdict(value)", 'value.model_dump(mode="json")'),
            ("self.types[name](**value)", "self.types[name].model_validate(value)"),
            (
                "dataclasses.replace(order, count=2 * order.count)",
                "order.model_copy(update={'count': 2 * order.count})",
            ),
            ('Order("lamp", 2)', 'Order(item="lamp", count=2)'),
            ("result(task_id).value)", "result(task_id).value.__repr__())"),
        ):
            assert before in program
            program = program.replace(before, after)
        blocks = [("python", 0, program), ("text", 0, shown)]
        run_section(section, tmp_path, BLOCK_RUNNER, blocks)

    def test_the_notebook_section_runs_in_a_kernel(self, tmp_path: Path) -> None:
        pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        section = find_section("In a notebook")
        cells = [text for language, _, text in section.blocks if language == "python"]
        shown = [text for language, _, text in section.blocks if language == "text"]
        printed = run_section(section, tmp_path, NOTEBOOK_RUNNER, cells)
        assert printed == "".join(shown)


EXAMPLES = ROOT / "examples"

# Goes to a web example's pages as its users do, through the client of its framework.
VISITORS = {
    "fastapi": """
import asyncio
from httpx import ASGITransport, AsyncClient
from web_fastapi import app, backend, lifespan
from omniq_sqlite import AsyncWorker

async def visit_all():
    async with lifespan(app), AsyncClient(
        transport=ASGITransport(app), base_url="http://shop"
    ) as client:
        answer = await client.post("/counts", params={"text": "a b c"})
        show(answer.status_code)
        page = answer.json()["page"]
        show((await client.get(page)).json())
        await AsyncWorker(backend, tasks).run(until_empty=True, signals=False)
        show((await client.get(page)).json())
        show((await client.get("/counts/unknown")).status_code)

asyncio.run(visit_all())
""",
    "flask": """
from web_flask import app, backend
from omniq_sqlite import Worker

client = app.test_client()
answer = client.post("/counts", data={"text": "a b c"})
show(answer.status_code)
page = answer.json["page"]
show(client.get(page).json)
Worker(backend, tasks).run(until_empty=True)
show(client.get(page).json)
show(client.get("/counts/unknown").status_code)
""",
    "django": """
import web_django
from django.test import Client
from omniq_sqlite import Worker

client = Client()
answer = client.post("/counts", {"text": "a b c"})
show(answer.status_code)
page = answer.json()["page"]
show(client.get(page).json())
Worker(web_django.backend, tasks).run(until_empty=True)
show(client.get(page).json())
show(client.get("/counts/unknown").status_code)
""",
}

# Executes a notebook and prints the text that its cells put out.
NOTEBOOK_EXECUTER = r"""
import nbclient, nbformat

notebook = nbformat.read("notebook.ipynb", as_version=4)
nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.get("outputs", ()):
        text = output.get("text")  # a stream may come in pieces
        print(text or "\n".join(output["data"].values()), end="" if text else "\n")
"""


def example_run(
    tmp_path: Path, *command: str | Path, packages: str = "", status: int = 0
) -> str:
    """Run a command in an empty folder, the examples importable; return its output."""
    for package in packages.split():
        pytest.importorskip(package)
    environment = child_environment(tmp_path / "bin")
    environment["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
    (tmp_path / "place").mkdir(exist_ok=True)
    outcome = subprocess.run(
        command,
        cwd=tmp_path / "place",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    assert outcome.returncode == status, outcome.stdout
    return outcome.stdout


# What pip and uv say where no registry answers, or not in time.
NO_REGISTRY = (
    "dns error|Temporary failure|No matching dist|error sending request|Failed to fetch"
    "|Connection (?:refused|reset|aborted)|ProxyError|timed out"
)


def shell_lines(text: str, start: str) -> list[str]:
    """Return the commands of the lines of a file that begin with `start`."""
    return re.findall(rf"^{start}(.+)$", text, re.MULTILINE)


class TestExamples:
    def test_compress_makes_a_copy_of_each_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "place"  # the database stands among the files
        folder.mkdir()
        for number in range(5):
            (folder / f"{number}.txt").write_text(f"text {number}\n" * 100)
        shown = example_run(tmp_path, "python", EXAMPLES / "compress.py", ".")
        assert shown.startswith("5 files, 3500 bytes before, ")
        for number in range(5):
            packed = (folder / f"{number}.txt.gz").read_bytes()
            assert gzip.decompress(packed) == f"text {number}\n".encode() * 100

    @pytest.mark.parametrize(
        ("program", "packages"),
        [
            ("compress.py", ""),
            ("compress.py nowhere", ""),
            ("script.py", ""),
            ("telemetry_opentelemetry.py", "opentelemetry"),
            ("telemetry_prometheus.py", "prometheus_client"),
        ],
    )
    def test_a_wrong_use_of_a_program_is_one_line(
        self, tmp_path: Path, program: str, packages: str
    ) -> None:
        name, *arguments = program.split()
        shown = example_run(
            tmp_path, "python", EXAMPLES / name, *arguments, packages=packages, status=1
        )
        assert is_one_line(shown)
        assert shown.startswith(f"usage: {name} ")

    def test_the_script_has_status_1_where_a_file_is_missing(
        self, tmp_path: Path
    ) -> None:
        script = EXAMPLES / "script.py"
        shown = example_run(tmp_path, "python", script, script, "none", status=1)
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        assert f"{digest} {script}\n" in shown
        assert shown.endswith("No such file or directory: 'none' none\n")

    @pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
    def test_a_web_application_enqueues_and_shows_the_result(
        self, tmp_path: Path, framework: str
    ) -> None:
        packages = "fastapi httpx" if framework == "fastapi" else framework
        program = "from jobs import tasks\nshow = print\n" + VISITORS[framework]
        shown = example_run(tmp_path, "python", "-c", program, packages=packages)
        assert shown.splitlines()[:3] == [
            "202",
            "{'status': 'pending'}",
            "{'status': 'success', 'words': 3}",
        ]
        assert shown.splitlines()[-1] == "404"

    def test_a_web_application_needs_no_more_than_forty_lines(self) -> None:
        for program in EXAMPLES.glob("web_*.py"):
            assert len(program.read_text(encoding="utf-8").splitlines()) < 40, program

    @pytest.mark.parametrize("library", ["sqlite3", "sqlalchemy", "django"])
    def test_an_outbox_holds_the_task_if_and_only_if_the_order(
        self, tmp_path: Path, library: str
    ) -> None:
        program = EXAMPLES / f"outbox_{library}.py"
        for count in (1, 2):  # in the second run the table exists
            shown = example_run(tmp_path, "python", program, packages=library)
            assert shown == f"out of chairs\norders: {count}, tasks: {count}\n"

    def test_own_types_come_back_as_what_they_were(self, tmp_path: Path) -> None:
        program = EXAMPLES / "own_types.py"
        shown = example_run(tmp_path, "python", program, packages="pydantic")
        assert shown == "Parcel ['lamp', 'chair']\n"

    def test_the_fixture_runs_tasks_without_waiting(self, tmp_path: Path) -> None:
        options = ("-q", "-p", "no:cacheprovider", "-W", "error")
        shown = example_run(
            tmp_path, "python", "-m", "pytest", *options, EXAMPLES / "test_jobs.py"
        )
        assert "3 passed" in shown

    def test_prometheus_sees_events_and_queues(self, tmp_path: Path) -> None:
        program = """
from prometheus_client import REGISTRY, generate_latest
from telemetry_prometheus import Depth, count
from jobs import count_words, divide, tasks
from omniq_sqlite import SQLiteBackend, Worker

with SQLiteBackend("jobs.db", events=True) as backend:
    backend.enqueue_many([count_words.task("a b"), divide.task(1, 0)])
    Worker(backend, tasks).run(until_empty=True)
    REGISTRY.register(Depth(backend.queue))
    count(backend.events.query())
    print(generate_latest().decode())
"""
        shown = example_run(
            tmp_path, "python", "-c", program, packages="prometheus_client"
        )
        assert 'omniq_events_total{queue="default",type="completed"} 1.0' in shown
        assert 'omniq_events_total{queue="default",type="retry"} 1.0' in shown
        assert 'omniq_tasks{queue="default",status="failed"} 1.0' in shown
        assert 'omniq_run_seconds_count{func="divide"} 2.0' in shown

    def test_opentelemetry_gets_a_span_for_each_attempt(self, tmp_path: Path) -> None:
        program = """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from telemetry_opentelemetry import record
from jobs import count_words, divide, tasks
from omniq_sqlite import SQLiteBackend, Worker

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
with SQLiteBackend("jobs.db", events=True) as backend:
    backend.enqueue(count_words.task("a b"))
    Worker(backend, tasks).run(until_empty=True)
    backend.enqueue(divide.task(1, 0))
    Worker(backend, tasks).run(until_empty=True)
    record(backend.events.query(), provider.get_tracer("test"))
for span in exporter.get_finished_spans():
    assert span.start_time < span.end_time
    print(span.name, span.status.status_code.name, span.attributes["attempt"])
"""
        shown = example_run(
            tmp_path, "python", "-c", program, packages="opentelemetry.sdk"
        )
        assert shown.splitlines() == [
            "count_words UNSET 1",
            "divide ERROR 1",
            "divide ERROR 2",
        ]

    def test_a_log_line_is_an_object_with_the_facts(self, tmp_path: Path) -> None:
        shown = example_run(tmp_path, "python", EXAMPLES / "logs.py")
        lines = [json.loads(line) for line in shown.splitlines()]
        assert [(line["level"], line.get("attempt")) for line in lines] == [
            ("INFO", None),
            ("WARNING", 1),
            ("ERROR", 2),
            ("INFO", None),
        ]
        assert lines[2]["func"] == "divide"
        assert lines[2]["traceback"].endswith("ZeroDivisionError: division by zero")
        assert len({line["worker"] for line in lines}) == 1

    @pytest.mark.parametrize("runner", ["uv", "pipx"])
    def test_the_script_brings_its_packages_along(
        self, tmp_path: Path, runner: str
    ) -> None:
        """As `uv run` and `pipx run` say in its docstring; both ask the registry."""
        pytest.importorskip(runner)
        place = tmp_path / "place"
        place.mkdir()
        for file in (EXAMPLES / "script.py", ROOT / "omniq_sqlite.py"):
            shutil.copy(file, place)
        options = {
            "uv": ("uv", "run", "--no-project", "--python", sys.executable),
            "pipx": ("pipx", "run", "--python", sys.executable, "--path"),
        }
        try:
            shown = example_run(
                tmp_path, "python", "-m", *options[runner], "script.py", "script.py"
            )
        except (AssertionError, subprocess.TimeoutExpired) as error:
            if re.search(NO_REGISTRY, str(error)):
                pytest.skip("no package registry answers")
            raise
        digest = hashlib.sha256((EXAMPLES / "script.py").read_bytes()).hexdigest()
        assert shown.splitlines()[-1] == f"{digest} script.py"

    def test_the_notebook_runs_from_its_first_cell_to_its_last(
        self, tmp_path: Path
    ) -> None:
        place = tmp_path / "place"
        place.mkdir()
        for name in ("notebook.ipynb", "jobs.py"):
            shutil.copy(EXAMPLES / name, place)
        shown = example_run(
            tmp_path, "python", "-c", NOTEBOOK_EXECUTER, packages="nbclient ipykernel"
        )
        assert f"\n{list(range(20))}\n" in shown
        assert "ZeroDivisionError: division by zero" in shown
        assert "<iframe srcdoc=" in shown
        assert "exit status 0" in shown

    def test_the_notebook_is_short_and_carries_no_outputs(self) -> None:
        notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text("utf-8"))
        assert len(notebook["cells"]) < 15
        assert not any(cell.get("outputs") for cell in notebook["cells"])


class TestCopies:
    """`omniq_sqlite.py` under another name, in a package of the application."""

    PROGRAM = """
import pickle
import omniq_sqlite
from shop import _queue as copy
from shop.jobs import count_words, divide, tasks


def main():
    theirs = omniq_sqlite.SQLiteBackend("jobs.db")
    first = theirs.enqueue(omniq_sqlite.Task("count_words", ("a b c",)))
    with copy.SQLiteBackend("jobs.db") as backend:
        wrong = backend.enqueue(divide.task(1, 0))
        assert copy.Worker(backend, tasks).run(until_empty=True, processes=2) == 0
        assert theirs.result(first).value == 3
        for value in (
            backend, backend.queue, backend.result(wrong), copy.LeaseLostError(["x"]),
            tasks, count_words, count_words.task("a"),
        ):
            again = pickle.loads(pickle.dumps(value))
            print(type(again).__module__, type(again).__name__)


if __name__ == "__main__":
    main()
"""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        package = tmp_path / "place/shop"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        shutil.copy(ROOT / "omniq_sqlite.py", package / "_queue.py")
        jobs = (EXAMPLES / "jobs.py").read_text(encoding="utf-8")
        jobs = jobs.replace("from omniq_sqlite import", "from shop._queue import")
        (package / "jobs.py").write_text(jobs, encoding="utf-8")
        return package

    def test_spawn_pickle_and_a_second_copy_work(
        self, tmp_path: Path, package: Path
    ) -> None:
        (package.parent / "main.py").write_text(self.PROGRAM, encoding="utf-8")
        shown = example_run(tmp_path, sys.executable, "main.py")
        names = """SQLiteBackend SQLiteQueue TaskResult LeaseLostError TaskRegistry
            TaskFunction Task"""
        assert shown.splitlines() == [f"shop._queue {name}" for name in names.split()]

    def test_its_commands_run_under_its_name(
        self, tmp_path: Path, package: Path
    ) -> None:
        run = partial(example_run, tmp_path, sys.executable, "-m", "shop._queue")
        run("enqueue", "jobs.db", "count_words", "a b c")
        run("worker", "jobs.db", "--app", "shop.jobs:tasks", "--until-empty")
        run("list", "jobs.db", status=1)  # none is left

    def test_the_older_of_two_copies_says_that_it_is_too_old(
        self, tmp_path: Path, package: Path
    ) -> None:
        text = (package / "_queue.py").read_text(encoding="utf-8")
        step = '("CREATE INDEX main.omniq_task_by_func ON omniq_task (func)",)'
        text += f'\n__version__ = "99.0"\nMIGRATIONS["queue"].append({step})\n'
        (package / "newer.py").write_text(text, encoding="utf-8")
        program = """
from shop import _queue as older, newer

with older.SQLiteQueue("jobs.db") as queue:
    queue.enqueue(older.Task("x"))
with newer.SQLiteQueue("jobs.db") as queue:
    assert queue.dequeue().func == "x"
try:
    older.SQLiteQueue("jobs.db").count_tasks()
except older.SchemaVersionError as error:
    print(error.component, "|", error)
"""
        shown = example_run(tmp_path, sys.executable, "-c", program)
        assert shown.startswith("queue | database ")
        assert f"newer omniq_sqlite than this one ({omniq_sqlite.__version__})" in shown
        assert shown.endswith("which knows up to 1; update it\n")


class TestDeployment:
    """Files of `examples/deploy`: what they start works as they say."""

    @pytest.fixture
    def deploy(self) -> Callable[[str], str]:
        """Return the text of a file, with a place of this test for its places."""

        def read(name: str) -> str:
            text = (EXAMPLES / "deploy" / name).read_text(encoding="utf-8")
            for folder in ("/srv/shop/.venv/bin/", "/srv/shop/", "/data/"):
                text = text.replace(folder, "")
            return text

        return read

    def stops_when_told(
        self, tmp_path: Path, command: str, check: str, **variables: str
    ) -> None:
        """Start a worker, find it in health, and end it with SIGTERM."""
        place = tmp_path / "place"
        place.mkdir()
        environment = child_environment(tmp_path / "bin") | variables
        environment["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}"
        run = partial(subprocess.run, cwd=place, env=environment, timeout=DEADLINE)
        probe = ["sh", "-c", check]
        with closing(SQLiteQueue(place / "jobs.db")) as queue:
            queue.enqueue(Task("count_words", ("a b c",)))
            worker = subprocess.Popen(["sh", "-c", command], cwd=place, env=environment)
            try:
                until(lambda: not queue.count_tasks())
                assert run(probe, check=False).returncode == 0
                worker.terminate()
                assert worker.wait(timeout=DEADLINE) == 0
            finally:
                worker.kill()
                worker.wait()
            assert run(probe, check=False).returncode == 1

    def test_systemd_starts_a_worker_and_stops_it(
        self, tmp_path: Path, deploy: Callable[[str], str]
    ) -> None:
        [command] = shell_lines(deploy("omniq-worker.service"), "ExecStart=")
        check = "omniq-sqlite check jobs.db --worker shop"
        self.stops_when_told(tmp_path, f"exec {command}", check)

    def test_systemd_takes_the_unit(
        self, tmp_path: Path, deploy: Callable[[str], str]
    ) -> None:
        if shutil.which("systemd-analyze") is None:
            pytest.skip("no systemd-analyze on this machine")
        unit = tmp_path / "omniq-worker.service"
        text = deploy(unit.name).replace("=omniq-sqlite", f"={sys.executable}")
        unit.write_text(text.replace("User=shop", "User=root"))
        outcome = subprocess.run(
            ["systemd-analyze", "verify", unit],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")

    def test_a_container_starts_a_worker_and_stops_it(
        self, tmp_path: Path, deploy: Callable[[str], str]
    ) -> None:
        text = deploy("Dockerfile")
        [command] = shell_lines(text, "CMD ")
        [check] = shell_lines(text, r"HEALTHCHECK .*? CMD ")
        self.stops_when_told(tmp_path, command, check, HOSTNAME="box")

    def test_cron_enqueues_once_works_and_backs_up(
        self, tmp_path: Path, deploy: Callable[[str], str]
    ) -> None:
        lines = shell_lines(deploy("crontab"), r"\S+ \S+ \* \* \*  +")
        enqueue, work, backup = (
            line.replace(r"\%", "%")
            .replace("/srv/backup/", "copy-")
            .replace("cd /srv/shop && ", "")
            for line in lines
        )
        run = partial(example_run, tmp_path, "sh", "-c")
        added = run(enqueue)
        assert run(enqueue).startswith(added)  # the key holds a second one out
        run(work)
        run(backup)
        [copy] = (tmp_path / "place").glob("copy-jobs-*.db")
        with closing(SQLiteResultStorage(copy)) as results:
            assert [result.value for result in results.list_results()] == [3]

    def test_litestream_restores_what_was_there(
        self, tmp_path: Path, deploy: Callable[[str], str]
    ) -> None:
        """Its own checkpoints as often as it can, while tasks come and go."""
        litestream = Path(sys.executable).with_name("litestream")
        if not litestream.exists():
            pytest.skip("litestream is not installed")
        path = tmp_path / "jobs.db"
        config = tmp_path / "litestream.yml"
        often = "checkpoint-interval: 100ms\n    min-checkpoint-page-count: 10\n"
        config.write_text(
            deploy(config.name)
            .replace("path: jobs.db\n", f"path: {path}\n    {often}")
            .replace("/srv/backup/jobs.db", f"{tmp_path}/replica")
        )
        run: list[str | Path] = [litestream, "replicate", "-config", config]
        with SQLiteBackend(path, events=True) as backend:
            backend.enqueue(Task("first"))
            replica = subprocess.Popen(
                run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                until((tmp_path / "replica").exists)
                for _ in range(50):
                    backend.enqueue_many(Task("more", ("x" * 1000,)) for _ in range(20))
                    for task in backend.queue.dequeue_many(10):
                        backend.complete(task, "y" * 1000)
                replica.terminate()  # it takes what is there, and ends
                assert replica.wait(timeout=DEADLINE) == 0
            finally:
                replica.kill()
                replica.wait()
            copy = tmp_path / "restored.db"
            subprocess.run(
                [litestream, "restore", "-config", config, "-o", copy, path],
                check=True,
                capture_output=True,
                timeout=DEADLINE,
            )
            counts = backend.queue.stats()
            with SQLiteBackend(copy, events=True) as restored:
                assert restored.queue.stats() == counts
                assert restored.check() == []
                assert {finding.check for finding in backend.check()} <= {"wal"}


@pytest.mark.long
class TestBenchmarks:
    @staticmethod
    def run_quickly(folder: Path, *options: str, timeout: float = DEADLINE) -> Any:
        """Run the quick form of the benchmark; return what it has written."""
        results = folder / "results.json"
        outcome = subprocess.run(
            [
                sys.executable,
                ROOT / "benchmarks/run.py",
                "--quick",
                f"--folder={folder}",
                f"--json={results}",
                *options,
            ],
            env=child_environment(folder / "bin"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return json.loads(results.read_text())

    @pytest.mark.timeout(240)  # 30 s where nothing else runs
    def test_the_quick_form_does_every_workload_and_loses_no_task(
        self, tmp_path: Path
    ) -> None:
        rows = self.run_quickly(tmp_path, timeout=220)["rows"]
        assert len(rows) == 29
        for row in rows:
            assert any("omniq" in name or " " in name for name in row["columns"]), row

    @pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
    def test_a_slower_disk_is_slower_for_all(self, tmp_path: Path) -> None:
        """Which the program finds out itself, and says what a flush takes."""
        results = self.run_quickly(tmp_path, "--flush-ms=20", "--only=enqueue-full")
        assert float(results["facts"]["flush"].removesuffix(" ms")) >= 20
        [row] = results["rows"]
        for column in row["columns"].values():
            assert column["median"] < 50  # a second, one flush for each at least
