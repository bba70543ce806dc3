"""A task queue, result store and event log in one SQLite file.

`omniq_sqlite` turns an SQLite file into a task queue that any number of
processes, threads and event loops share. There is no server and no broker;
the dependencies are `aiosqlite` and `anyio`. Vendor it by copying this file.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> tasks = TaskRegistry()
    >>> @tasks.register(max_attempts=5)
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> with SQLiteBackend(folder.name + "/jobs.db") as backend:
    ...     task_id = backend.enqueue(add.task(2, b=3))
    ...     status = Worker(backend, tasks).run(until_empty=True, signals=False)
    ...     backend.result(task_id).value
    5
    >>> folder.cleanup()

What it guarantees:

- What was acknowledged is durable (`synchronous="FULL"` is the default).
- Delivery is at least once. A task is handed to one claim at a time; a claim
  that was lost cannot complete, fail or extend the task (`LeaseLostError`).
- A write waits for other writers, fairly, for at most `busy_timeout` seconds.
  Reads wait for no writer.
- Ctrl-C, cancellation, `fork` and exit without `close()` lose nothing and
  hang nothing.

What it does not do: several machines on one file (WAL needs shared memory, so
network file systems are refused), exactly-once execution (nothing can), and
isolation of task code (functions run in the worker's process).

Where several processes share the work, the functions stand in a module that all
of them import, here `jobs`, and workers run beside the program:

    omniq-sqlite worker jobs.db --app jobs:tasks --processes 2

Each class exists twice: `AsyncSQLiteQueue` is for `await`, its twin
`SQLiteQueue` blocks; names, parameters and meaning are the same. The whole of it
is written down once, with the async one. Where to look:

- `TaskRegistry`, `TaskFunction`, `Task`: functions, and tasks made of their calls.
- `AsyncSQLiteBackend`: enqueue, ask for results, back up; `.queue`, `.results` and
  `.events` are `AsyncSQLiteQueue` (list, cancel, retry, pause, purge; `enqueue_on`
  for your own transaction), `AsyncSQLiteResultStorage`, `AsyncSQLiteEventStorage`.
- `AsyncWorker`; inside its functions `current_task`, `progress`, `Retry`, `Reject`.
- `OmniQError`: the errors that derive from it each say what to do.
- `Serializer`, `JSONSerializer`: what may travel, and types of your own.
- `logging.getLogger("omniq_sqlite")`: starts and stops of workers, failed attempts;
  with `task_id`, `queue`, `func`, `attempt` and `worker` as fields of a record.
- `python -m omniq_sqlite --help`: the command line.

The file from top to bottom: Defaults, Errors, Data model, Interfaces, SQL,
Serialization and time, Connection, Queue, Results, Events, Blocking twins,
Backend, Worker, Command line. Each section uses only what stands above it.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import errno
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import select
import signal
import socket
import sqlite3
import stat
import string
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)
from uuid import UUID

if __name__ == "__main__":  # the bare file, perhaps where nothing is installed
    import importlib.util

    needed = {"aiosqlite": "'aiosqlite>=0.20'", "anyio": "'anyio>=4.11'"}
    missing = [needed[name] for name in needed if not importlib.util.find_spec(name)]
    if missing:
        sys.stderr.write(f"omniq_sqlite needs: pip install {' '.join(missing)}\n")
        sys.exit(2)

import aiosqlite

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection


__version__ = "0.1.0"

__all__ = [
    "AsyncBackend",
    "AsyncEventFollower",
    "AsyncEventStorage",
    "AsyncResultStorage",
    "AsyncResultStream",
    "AsyncSQLiteBackend",
    "AsyncSQLiteEventStorage",
    "AsyncSQLiteQueue",
    "AsyncSQLiteResultStorage",
    "AsyncTaskQueue",
    "AsyncWorker",
    "Backend",
    "CorruptDatabaseError",
    "DatabaseAccessError",
    "DatabaseBusyError",
    "DatabaseFullError",
    "DatabaseReplacedError",
    "DuplicateTaskError",
    "EventFollower",
    "EventStorage",
    "EventType",
    "Finding",
    "JSONSerializer",
    "LeaseLostError",
    "NetworkFilesystemError",
    "OmniQError",
    "QueueStats",
    "ReadOnlyDatabaseError",
    "Reject",
    "ResultStatus",
    "ResultStorage",
    "ResultStream",
    "Retry",
    "SQLiteBackend",
    "SQLiteEventStorage",
    "SQLiteQueue",
    "SQLiteResultStorage",
    "SchemaVersionError",
    "SerializationError",
    "Serializer",
    "StorageClosedError",
    "Task",
    "TaskEvent",
    "TaskFunction",
    "TaskNotFoundError",
    "TaskOptions",
    "TaskQueue",
    "TaskRegistry",
    "TaskResult",
    "TaskStatus",
    "TaskTimeout",
    "UnknownTaskError",
    "UnsupportedSQLiteError",
    "Worker",
    "WorkerInfo",
    "current_task",
    "main",
    "new_id",
    "progress",
]

T = TypeVar("T")
P = ParamSpec("P")


# =============================================================================
# Defaults
# =============================================================================

DEFAULT_BUSY_TIMEOUT = 30.0
"""Seconds that a write waits for other writers."""

DEFAULT_LEASE = 60.0
"""Seconds that a claim lasts unless it is extended."""

DEFAULT_RESULT_TTL = 7 * 86_400.0
"""Seconds that a result is kept."""

DEFAULT_EVENT_RETENTION = 30 * 86_400.0
"""Seconds that an event is kept; `cleanup()` deletes older ones."""

DEFAULT_READERS = 4
"""Read connections of one object at the most; opened when first needed."""

POLL_INTERVAL = 0.006
"""Seconds between two looks for other processes' commits, where nothing tells of them
(everywhere but on Linux)."""

MAX_RETRY_DELAY = 3600.0
"""Seconds between two attempts at the most."""

MAX_ERROR_LENGTH = 4_000
"""Characters of an error text that are kept with a task."""

logger = logging.getLogger("omniq_sqlite")
logger.addHandler(logging.NullHandler())


# =============================================================================
# Errors
# =============================================================================
#
# One class per thing that a caller can do something about. Each builds its
# message from facts, keeps them as attributes and survives pickling, and is also
# the built-in exception that a caller would expect in its place, if there is one.


class OmniQError(Exception):
    """Something went wrong in the queue; the base of every error here."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as `cls(*args)`, but `args` is the message here.
        cls = type(self)
        return cls.__new__, (cls,), {"args": self.args, **self.__dict__}


class _FileError(OmniQError):
    """Something about the file at `path`."""

    message = "file {path!r}: {detail}"

    def __init__(self, path: str, detail: str = "") -> None:
        self.path = path
        self.detail = detail
        super().__init__(self.message.format(path=path, detail=detail))


class StorageClosedError(_FileError, RuntimeError):
    """The object was closed; make a new one.

    Also raised in a child that was forked in the middle of an operation of the
    forking thread (a signal handler that forks): such a child cannot use the
    file; let it exec or exit.
    """

    message = "storage on {path!r} cannot be used: {detail}"

    def __init__(self, path: str, detail: str = "it was closed") -> None:
        super().__init__(path, detail)


class DatabaseBusyError(OmniQError, TimeoutError):
    """Another writer held the file too long; nothing was changed, try again.

    Raise `busy_timeout`, or shorten the transactions of whoever holds it.
    """

    def __init__(self, path: str, waited: float, detail: str = "") -> None:
        self.path = path
        self.waited = waited
        self.detail = detail
        super().__init__(
            f"database {path!r} is in use by another writer (waited {waited:.1f} s)"
            + (f": {detail}" if detail else "")
        )


class DatabaseFullError(_FileError, OSError):
    """The disk or a quota is full; nothing was changed. Free space, try again."""

    message = "no space (or quota) left for database {path!r}; free some and try again"


class ReadOnlyDatabaseError(_FileError, PermissionError):
    """The file, one beside it or their folder cannot be written. Mend that."""

    message = (
        "database {path!r} is read-only; it, its -wal and -shm if there are any, and"
        " the folder must be writable"
    )


class CorruptDatabaseError(_FileError):
    """The file is damaged or not a database. Restore a backup; keep a copy."""

    message = "file {path!r} is damaged or not an SQLite database: {detail}"


class DatabaseReplacedError(_FileError):
    """The file was deleted or replaced under the open object.

    Nothing that this call wrote is in the file of that name. Put the file back,
    or close the object and open a new one.
    """

    message = "database {path!r} was deleted or replaced while it was open"


class DatabaseAccessError(_FileError, OSError):
    """The operating system refused to open, read or write the file."""

    message = "cannot use database {path!r}: {detail}"


class SchemaVersionError(OmniQError):
    """The tables were written by a newer version, or are not OmniQ's.

    Update this module, or choose another file.
    """

    def __init__(self, path: str, component: str, detail: str) -> None:
        self.path = path
        self.component = component
        self.detail = detail
        super().__init__(
            f"database {path!r} has {component} tables that cannot be used: {detail}"
        )


class UnsupportedSQLiteError(OmniQError, RuntimeError):
    """The SQLite library is too old. Use a Python that is linked to a newer one."""

    def __init__(self, found: str, needed: str) -> None:
        self.found = found
        self.needed = needed
        super().__init__(f"SQLite {found} is too old: {needed} or newer is needed")


class NetworkFilesystemError(OmniQError, OSError):
    """The file is on a network file system, where WAL corrupts databases.

    Move it to a local disk. If the mount was misread, pass
    `allow_network_fs=True`. See https://sqlite.org/wal.html (Overview).
    """

    def __init__(self, path: str, filesystem: str) -> None:
        self.path = path
        self.filesystem = filesystem
        super().__init__(
            f"database {path!r} is on a network file system ({filesystem}); move it to"
            " a local disk, or pass allow_network_fs=True if that is wrong"
        )


class SerializationError(OmniQError, ValueError):
    """A value cannot be stored so that it comes back equal.

    Convert it first, or pass a `serializer=`.
    """

    def __init__(self, where: str, detail: str) -> None:
        self.where = where
        self.detail = detail
        super().__init__(f"cannot serialize {where}: {detail}")


class TaskNotFoundError(OmniQError, LookupError):
    """There is no such task, or nothing of it is left."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(f"there is no task {task_id!r} and no result of it")


class DuplicateTaskError(OmniQError, ValueError):
    """A task with this id exists, or its `unique_key` is held by another."""

    def __init__(self, task_id: str, unique_key: str | None = None) -> None:
        self.task_id = task_id
        self.unique_key = unique_key
        super().__init__(
            f"a task with id {task_id!r} exists already"
            if unique_key is None
            else f"task {task_id!r}: its unique_key {unique_key!r} is held by another"
        )


class LeaseLostError(OmniQError):
    """The claim is no longer yours: claimed again, cancelled or settled.

    Nothing was changed for `task_ids`. Stop working on them.
    """

    def __init__(self, task_ids: Sequence[str]) -> None:
        self.task_ids = list(task_ids)
        shown = ", ".join(self.task_ids[:3])
        more = f" and {len(self.task_ids) - 3} more" if len(self.task_ids) > 3 else ""
        super().__init__(f"the lease is lost for task {shown}{more}")


class TaskTimeout(OmniQError, TimeoutError):
    """A task ran longer than its `timeout`; raised inside a plain function."""

    def __init__(self, task_id: str = "", timeout: float = 0.0) -> None:
        if not task_id and (run := _current_run.get(None)):  # raised in its thread
            task_id, timeout = run.task.id, run.task.timeout or 0.0
        self.task_id = task_id
        self.timeout = timeout
        super().__init__(f"task {task_id!r} ran longer than its timeout of {timeout} s")


class UnknownTaskError(OmniQError, LookupError):
    """The worker has no function of that name. Register it, or mend the name."""

    def __init__(self, func: str) -> None:
        self.func = func
        super().__init__(f"no function is registered under the name {func!r}")


# =============================================================================
# Data model
# =============================================================================


class TaskStatus(StrEnum):
    """Where a task stands."""

    SCHEDULED = "scheduled"  # waits for its time: delayed, or between attempts
    PENDING = "pending"  # can be claimed
    RUNNING = "running"  # claimed, under a lease
    COMPLETED = "completed"  # done; kept only with `retention`
    FAILED = "failed"  # out of attempts or rejected: a dead letter
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # not started by its `expires_at`


class ResultStatus(StrEnum):
    """How a task ended."""

    SUCCESS = "success"
    ERROR = "error"
    CANCELLED = "cancelled"


class EventType(StrEnum):
    """What happened to a task. A user's own events may have any other type."""

    ENQUEUED = "enqueued"
    DEQUEUED = "dequeued"
    COMPLETED = "completed"
    FAILED = "failed"
    RETRY = "retry"  # failed, and runs again later; or retried by hand
    RELEASED = "released"  # given back unharmed
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LEASE_LOST = "lease_lost"  # its lease ended or its worker died


_EVENT_TYPES: dict[str, EventType] = {kind.value: kind for kind in EventType}
_TASK_STATUSES: dict[str, TaskStatus] = {kind.value: kind for kind in TaskStatus}

LIVE_STATUSES = (TaskStatus.SCHEDULED, TaskStatus.PENDING, TaskStatus.RUNNING)
FINAL_STATUSES = (
    TaskStatus.COMPLETED,
    TaskStatus.FAILED,
    TaskStatus.CANCELLED,
    TaskStatus.EXPIRED,
)

_MAX_INTEGER = 2**63 - 1


def _storable(text: str) -> bool:
    if text.isascii():
        return "\0" not in text
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _show(value: object) -> str:
    """Return a short `repr`, also of what has none."""
    try:
        return _shorten(repr(value), 100)
    except Exception as error:  # noqa: BLE001 -- whatever a foreign repr raises
        return f"a {type(value).__name__} without a repr ({type(error).__name__})"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _shorten(text: str, maximum: int) -> str:
    return text if len(text) <= maximum else text[: maximum - 1] + "…"


def _clean_text(text: str, maximum: int = MAX_ERROR_LENGTH) -> str:
    """Return `text` as it can be stored: shortened, NUL and surrogates replaced."""
    text = _shorten(text, maximum)
    if _storable(text):
        return text
    return (
        text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        .encode(errors="replace")
        .decode()
    )


_Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be: in words, and as a test."""


def _number(minimum: float = 0.0) -> _Rule:
    """Rule of a duration or another float; the bound keeps dates within a year 9999."""
    maximum = 1e11
    return (
        f"a number from {minimum:g} to {maximum:g}",
        lambda value: (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and minimum <= value <= maximum
        ),
    )


def _integer(minimum: int = 0, maximum: int = _MAX_INTEGER) -> _Rule:
    return (
        f"an integer from {minimum} to {maximum}",
        lambda value: (
            isinstance(value, int)
            and not isinstance(value, bool)
            and minimum <= value <= maximum
        ),
    )


def _one_of(choices: type[StrEnum]) -> _Rule:
    values = frozenset(choices)
    rule = "one of " + ", ".join(choices)
    return rule, lambda value: isinstance(value, str) and value in values


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1_000 and _storable(value)


def _is_instant(value: object) -> bool:
    """Also at the ends of the calendar, a zone or a rounding must not leave it."""
    if not isinstance(value, datetime) or value.utcoffset() is None:
        return False
    return 2 <= value.year <= 9998


def _is_mapping(value: object) -> bool:
    return type(value) is dict or isinstance(value, Mapping)


def _rules(names: str, rule: str, holds: Callable[[Any], bool]) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), (rule, holds))


# A parameter means the same wherever it occurs, except for those of one class.
_RULES = {
    **_rules(
        "func queue unique_key id lease_id task_id worker type name",
        "a string of 1 to 1000 characters without NUL or lone surrogates",
        _is_name,
    ),
    **_rules(
        "at created_at run_at expires_at started_at finished_at lease_until"
        " since until",
        "an aware datetime (with tzinfo) of the years 2 to 9998",
        _is_instant,
    ),
    **_rules("kwargs metadata details", "a mapping", _is_mapping),
    **_rules(
        "delay retry_delay timeout older_than ttl retention busy_timeout grace",
        *_number(),
    ),
    **_rules("limit offset attempt claims claim", *_integer()),
    **_rules("max_attempts concurrency processes max_tasks", *_integer(1)),
    **_rules(
        "message error error_type traceback",
        "a string",
        lambda value: isinstance(value, str),
    ),
    "args": ("a tuple", lambda value: isinstance(value, (tuple, list))),
    "priority": _integer(-_MAX_INTEGER),
    "lease": _number(0.001),
    "readers": _integer(1, 1_000),
    "clock": ("callable", callable),
    "synchronous": (
        "'OFF', 'NORMAL', 'FULL' or 'EXTRA'",
        lambda value: value in ("OFF", "NORMAL", "FULL", "EXTRA"),
    ),
    "status": _one_of(TaskStatus),
    "TaskResult.status": _one_of(ResultStatus),
    "Task.timeout": _number(1e-6),
}


_PAYLOADS = frozenset("args kwargs metadata details message error values".split())
"""Parameters that may hold secrets: errors tell the type of a value, not the value."""


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        shown = (
            f"one of type {type(value).__name__}" if name in _PAYLOADS else _show(value)
        )
        raise ValueError(f"{name} must be {rule}, not {shown}")


def _check_values(**values: object) -> None:
    """Check parameters by the rules of their names."""
    for name, value in values.items():
        rule, holds = _RULES[name]
        if not holds(value):
            _check(False, name, rule, value)


def _check_optional(**values: object) -> None:
    """Check parameters that may be `None`."""
    for name, value in values.items():
        rule, holds = _RULES[name]
        if value is not None and not holds(value):
            _check(False, name, rule + " or None", value)


@functools.cache
def _rules_of(cls: Any) -> list[tuple[str, str, Callable[[Any], bool], object]]:
    """Return (name, rule, test, default) for the fields of a class that have a rule."""
    found = []
    for each in fields(cls):
        own = (_RULES.get(f"{c.__name__}.{each.name}") for c in cls.__mro__)
        rule = next(filter(None, own), _RULES.get(each.name))
        if rule is not None:
            found.append((each.name, *rule, each.default))
    return found


def _check_fields(value: object) -> None:
    """Check the fields of a value by the rules of their names; a default is fine."""
    for name, rule, holds, default in _rules_of(cast(Any, type(value))):
        content = getattr(value, name)
        if content is not default and not holds(content):
            _check(False, name, rule + " or None" * (default is None), content)


_id_lock = threading.Lock()
_last_id = 0


def new_id() -> str:
    """Return a new UUID version 7 as 32 hex digits; ids of a process ascend.

    Time in milliseconds, then 74 bits that start at random in each one and grow by
    random strides (RFC 9562, section 6.2, method 2). A clock that steps back does
    not make ids descend: they go on from the last one.
    """
    global _last_id  # noqa: PLW0603 -- one counter for the process
    random_bits = int.from_bytes(os.urandom(10))
    candidate = (time.time_ns() // 1_000_000) << 74 | random_bits >> 6
    with _id_lock:
        if candidate <= _last_id:  # a tie or a step back; nobody can guess the stride
            candidate = _last_id + (random_bits & 0xFFFF_FFFF) + 1
        _last_id = candidate
    milliseconds, rest = candidate >> 74, candidate & (1 << 74) - 1
    high, low = rest >> 62, rest & (1 << 62) - 1
    return f"{milliseconds << 80 | 7 << 76 | high << 64 | 2 << 62 | low:032x}"


# -- How values show: short in a shell, as a table in a notebook --


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    return str(value) if isinstance(value, str) else _show(value)


def _notebook_table(headers: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return an HTML table in which everything is escaped."""
    from html import escape  # 1 ms that few need

    def line(tag: str, cells: Iterable[object]) -> str:
        style = ' style="text-align: left; white-space: pre-wrap"'
        texts = (escape(_cell(cell)) for cell in cells)
        return f"<tr>{''.join(f'<{tag}{style}>{text}</{tag}>' for text in texts)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', headers)}</thead><tbody>{body}</tbody></table>"


class _Shown:
    """Shows a value by what sets it apart: what is empty or a default is left out."""

    __slots__ = ()
    _brief: ClassVar[tuple[str, ...]]  # the fields that a shell shows

    def _facts(self, *names: str) -> Iterator[tuple[str, object]]:
        defaults = {each.name: each.default for each in fields(cast(Any, self))}
        for name in names or defaults:
            value = getattr(self, name)
            simple = isinstance(value, (str, int, float))
            empty = value is None or (
                isinstance(value, (str, tuple, dict)) and not value
            )
            if not empty and not (simple and value == defaults[name]):
                yield name, value

    def __repr__(self) -> str:
        facts = ", ".join(f"{n}={_in_brief(v)}" for n, v in self._facts(*self._brief))
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return _notebook_table((type(self).__name__, ""), self._facts())


def _in_brief(value: object) -> str:
    return (
        repr(_cell(value)) if isinstance(value, (StrEnum, datetime)) else _show(value)
    )


@dataclass(frozen=True, slots=True, repr=False)
class Task(_Shown):
    """A call to be made: the name of a function, its arguments and its terms.

    `func` is a name that the worker's `TaskRegistry` knows; nothing is imported.
    `priority`: higher first; within one, first in first out. `run_at` and
    `expires_at` are aware datetimes. `retry_delay`: seconds before the first
    retry, doubled at each further one, at most an hour. `timeout`: seconds, or
    `None` for no limit. `max_attempts=1` is at most once. `unique_key`: while a
    task of this key is live in this queue, another one is not added.

    The fields after `id` are set by the queue and ignored on enqueue.

    Raises: `ValueError` naming the parameter, the rule and the value.
    """

    _brief = ("func", "id", "queue", "status", "attempt", "worker", "error")

    func: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    queue: str = "default"
    priority: int = 0
    run_at: datetime | None = None
    expires_at: datetime | None = None
    max_attempts: int = 3
    retry_delay: float = 1.0
    timeout: float | None = None
    unique_key: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=new_id)

    status: TaskStatus | None = None
    attempt: int = 0
    """The number of this run, 1 at the first; 0 before it."""
    created_at: datetime | None = None
    started_at: datetime | None = None
    """When the present or last claim was made."""
    finished_at: datetime | None = None
    lease_until: datetime | None = None
    lease_id: str | None = None
    worker: str | None = None
    error: str | None = None
    """Why the last attempt failed."""
    progress: Any = None
    claims: int = 0
    """How often it was claimed, `retry()` or not; orders results."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if type(self.args) is not tuple:
            object.__setattr__(self, "args", tuple(self.args))

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True, slots=True, repr=False)
class TaskResult(_Shown):
    """How a task ended: its value or its error.

    `value`: what the function returned. `error`: the message of what it raised,
    `error_type` the name of its class, `traceback` the text; `None` after a success.
    `started_at` and `finished_at` are of the last attempt, whose number is
    `attempt`; `metadata` is the task's. `claim` is the `Task.claims` of the claim that
    made it: a result of an older claim never replaces a newer one's.
    """

    _brief = ("task_id", "status", "value", "error_type", "error")

    task_id: str
    status: ResultStatus
    value: Any = None
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker: str | None = None
    attempt: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    claim: int | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        object.__setattr__(self, "status", ResultStatus(self.status))

    def __hash__(self) -> int:
        return hash(self.task_id)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, repr=False)
class TaskEvent(_Shown):
    """Something that happened, to a task or not. `id` is set by the storage.

    `type`: an `EventType`, or a text of your own. In the events of tasks `message`
    is the error, and `details` has, where who claimed it was the cause, the
    `attempt`, at a claim the `func`, and of a retry its `delay` in seconds. `id` is
    an opaque cursor: good for `after=`, never used twice.
    """

    _brief = ("id", "at", "type", "task_id", "queue", "worker", "message")

    type: str
    task_id: str | None = None
    queue: str | None = None
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    worker: str | None = None
    at: datetime = field(default_factory=_now)
    id: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        object.__setattr__(self, "type", _EVENT_TYPES.get(self.type, self.type))

    def __hash__(self) -> int:
        return hash((self.id, self.type, self.task_id, self.at))


@dataclass(frozen=True, slots=True, repr=False)
class QueueStats(_Shown):
    """How many tasks of one queue are in each status."""

    _brief = ()

    queue: str
    scheduled: int = 0
    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    paused: bool = False
    oldest_pending_at: datetime | None = None
    """When the oldest task that waits for a worker was enqueued."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A consumer that gave its name to `dequeue`, as last seen."""

    name: str
    host: str
    pid: int
    queues: tuple[str, ...]
    started_at: datetime
    seen_at: datetime
    """Updated by its claims, waits and heartbeats, every ten seconds or so."""
    running: int = 0
    """Tasks that it holds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that `check()` found: `severity` is "warning" or "error"."""

    check: str
    severity: str
    message: str


# =============================================================================
# Interfaces
# =============================================================================
#
# What a worker and a backend rely on. Another engine that has these methods can
# stand in for the SQLite one; parameters mean what the classes below say. The
# table is laid out by hand: one method after the other, no line for each parameter.

# fmt: off
# ruff: disable[D102]

QueueNames = str | Sequence[str]


class AsyncTaskQueue(Protocol):
    """A task queue; `AsyncSQLiteQueue` documents each method."""

    async def enqueue(self, task: Task, *, delay: float = 0.0) -> str: ...
    async def enqueue_many(self, tasks: Iterable[Task]) -> list[str]: ...
    async def dequeue(self, queues: QueueNames = "default", *,
        timeout: float | None = 0.0, lease: float = DEFAULT_LEASE,
        worker: str | None = None) -> Task | None: ...
    async def dequeue_many(self, limit: int, queues: QueueNames = "default", *,
        timeout: float | None = 0.0, lease: float = DEFAULT_LEASE,
        worker: str | None = None) -> list[Task]: ...
    async def complete(self, task: Task) -> None: ...
    async def complete_many(self, tasks: Iterable[Task]) -> None: ...
    async def fail(self, task: Task, error: str | BaseException, *, retry: bool = True,
        delay: float | None = None) -> TaskStatus: ...
    async def release(self, task: Task, *, delay: float = 0.0) -> None: ...
    async def extend(self, task: Task, lease: float = DEFAULT_LEASE, *,
        progress: Any = None) -> Task: ...
    async def reclaim(self, worker: str) -> int: ...
    async def cancel(self, task_id: str) -> bool: ...
    async def retry(self, task_id: str) -> bool: ...
    async def get_task(self, task_id: str) -> Task | None: ...
    async def list_tasks(self, *, queue: str | None = None, status: str | None = None,
        func: str | None = None, unique_key: str | None = None, limit: int = 100,
        offset: int = 0) -> list[Task]: ...
    async def count_tasks(self, *, queue: str | None = None,
        status: str | None = None) -> int: ...
    async def stats(self) -> list[QueueStats]: ...
    async def list_queues(self) -> list[str]: ...
    async def list_workers(self) -> list[WorkerInfo]: ...
    async def pause(self, queue: str) -> None: ...
    async def resume(self, queue: str) -> None: ...
    async def cancel_all(self, *, queue: str | None = None, func: str | None = None,
        status: str | None = None) -> int: ...
    async def retry_all(self, *, queue: str | None = None,
        func: str | None = None) -> int: ...
    async def purge(self, *, queue: str | None = None, status: str | None = None,
        older_than: float | None = None) -> int: ...
    async def close(self) -> None: ...


class AsyncResultStorage(Protocol):
    """A result store; `AsyncSQLiteResultStorage` documents each method."""

    async def store(self, result: TaskResult, *, ttl: float | None = None) -> None: ...
    async def store_many(self, results: Iterable[TaskResult]) -> None: ...
    async def get(self, task_id: str) -> TaskResult | None: ...
    async def get_many(self, ids: Iterable[str]) -> dict[str, TaskResult]: ...
    async def wait(self, task_id: str, *,
        timeout: float | None = None) -> TaskResult: ...
    async def delete(self, task_id: str) -> bool: ...
    async def list_results(self, *, status: str | None = None, limit: int = 100,
        offset: int = 0) -> list[TaskResult]: ...
    async def purge(self, *, older_than: float | None = None) -> int: ...
    async def close(self) -> None: ...


class AsyncEventStorage(Protocol):
    """An event log; `AsyncSQLiteEventStorage` documents each method."""

    async def log(self, event: TaskEvent) -> None: ...
    async def log_many(self, events: Iterable[TaskEvent]) -> None: ...
    async def query(self, *, task_id: str | None = None, queue: str | None = None,
        type: str | None = None, since: datetime | None = None,
        until: datetime | None = None, after: str | None = None, limit: int = 100,
        newest_first: bool = False) -> list[TaskEvent]: ...
    async def count(self, *, task_id: str | None = None, queue: str | None = None,
        type: str | None = None, since: datetime | None = None,
        until: datetime | None = None, after: str | None = None) -> int: ...
    def follow(self, *, after: str | None = None) -> AsyncIterator[TaskEvent]: ...
    async def purge(self, *, older_than: float) -> int: ...
    async def close(self) -> None: ...


class AsyncBackend(Protocol):
    """Queue, results and events together; `AsyncSQLiteBackend` documents it."""

    @property
    def queue(self) -> AsyncTaskQueue: ...
    @property
    def results(self) -> AsyncResultStorage | None: ...
    @property
    def events(self) -> AsyncEventStorage | None: ...
    async def enqueue(self, task: Task, *, delay: float = 0.0) -> str: ...
    async def enqueue_many(self, tasks: Iterable[Task]) -> list[str]: ...
    async def complete(self, task: Task, value: Any = None, *,
        enqueue: Iterable[Task] = ()) -> None: ...
    async def fail(self, task: Task, exception: BaseException, *, retry: bool = True,
        delay: float | None = None) -> TaskStatus: ...
    async def status(self, task_id: str) -> TaskStatus | None: ...
    async def result(self, task_id: str, *,
        timeout: float | None = None) -> TaskResult: ...
    async def cleanup(self) -> dict[str, int]: ...
    async def close(self) -> None: ...


class TaskQueue(Protocol):
    """A task queue; `SQLiteQueue` documents each method."""

    def enqueue(self, task: Task, *, delay: float = 0.0) -> str: ...
    def enqueue_many(self, tasks: Iterable[Task]) -> list[str]: ...
    def dequeue(self, queues: QueueNames = "default", *, timeout: float | None = 0.0,
        lease: float = DEFAULT_LEASE, worker: str | None = None) -> Task | None: ...
    def dequeue_many(self, limit: int, queues: QueueNames = "default", *,
        timeout: float | None = 0.0, lease: float = DEFAULT_LEASE,
        worker: str | None = None) -> list[Task]: ...
    def complete(self, task: Task) -> None: ...
    def complete_many(self, tasks: Iterable[Task]) -> None: ...
    def fail(self, task: Task, error: str | BaseException, *, retry: bool = True,
        delay: float | None = None) -> TaskStatus: ...
    def release(self, task: Task, *, delay: float = 0.0) -> None: ...
    def extend(self, task: Task, lease: float = DEFAULT_LEASE, *,
        progress: Any = None) -> Task: ...
    def reclaim(self, worker: str) -> int: ...
    def cancel(self, task_id: str) -> bool: ...
    def retry(self, task_id: str) -> bool: ...
    def get_task(self, task_id: str) -> Task | None: ...
    def list_tasks(self, *, queue: str | None = None, status: str | None = None,
        func: str | None = None, unique_key: str | None = None, limit: int = 100,
        offset: int = 0) -> list[Task]: ...
    def count_tasks(self, *, queue: str | None = None,
        status: str | None = None) -> int: ...
    def stats(self) -> list[QueueStats]: ...
    def list_queues(self) -> list[str]: ...
    def list_workers(self) -> list[WorkerInfo]: ...
    def pause(self, queue: str) -> None: ...
    def resume(self, queue: str) -> None: ...
    def cancel_all(self, *, queue: str | None = None, func: str | None = None,
        status: str | None = None) -> int: ...
    def retry_all(self, *, queue: str | None = None,
        func: str | None = None) -> int: ...
    def purge(self, *, queue: str | None = None, status: str | None = None,
        older_than: float | None = None) -> int: ...
    def close(self) -> None: ...


class ResultStorage(Protocol):
    """A result store; `SQLiteResultStorage` documents each method."""

    def store(self, result: TaskResult, *, ttl: float | None = None) -> None: ...
    def store_many(self, results: Iterable[TaskResult]) -> None: ...
    def get(self, task_id: str) -> TaskResult | None: ...
    def get_many(self, ids: Iterable[str]) -> dict[str, TaskResult]: ...
    def wait(self, task_id: str, *, timeout: float | None = None) -> TaskResult: ...
    def delete(self, task_id: str) -> bool: ...
    def list_results(self, *, status: str | None = None, limit: int = 100,
        offset: int = 0) -> list[TaskResult]: ...
    def purge(self, *, older_than: float | None = None) -> int: ...
    def close(self) -> None: ...


class EventStorage(Protocol):
    """An event log; `SQLiteEventStorage` documents each method."""

    def log(self, event: TaskEvent) -> None: ...
    def log_many(self, events: Iterable[TaskEvent]) -> None: ...
    def query(self, *, task_id: str | None = None, queue: str | None = None,
        type: str | None = None, since: datetime | None = None,
        until: datetime | None = None, after: str | None = None, limit: int = 100,
        newest_first: bool = False) -> list[TaskEvent]: ...
    def count(self, *, task_id: str | None = None, queue: str | None = None,
        type: str | None = None, since: datetime | None = None,
        until: datetime | None = None, after: str | None = None) -> int: ...
    def follow(self, *, after: str | None = None) -> Iterator[TaskEvent]: ...
    def purge(self, *, older_than: float) -> int: ...
    def close(self) -> None: ...


class Backend(Protocol):
    """Queue, results and events together; `SQLiteBackend` documents it."""

    @property
    def queue(self) -> TaskQueue: ...
    @property
    def results(self) -> ResultStorage | None: ...
    @property
    def events(self) -> EventStorage | None: ...
    def enqueue(self, task: Task, *, delay: float = 0.0) -> str: ...
    def enqueue_many(self, tasks: Iterable[Task]) -> list[str]: ...
    def complete(self, task: Task, value: Any = None, *,
        enqueue: Iterable[Task] = ()) -> None: ...
    def fail(self, task: Task, exception: BaseException, *, retry: bool = True,
        delay: float | None = None) -> TaskStatus: ...
    def status(self, task_id: str) -> TaskStatus | None: ...
    def result(self, task_id: str, *, timeout: float | None = None) -> TaskResult: ...
    def cleanup(self) -> dict[str, int]: ...
    def close(self) -> None: ...


# ruff: enable[D102]
# fmt: on


# =============================================================================
# SQL
# =============================================================================
#
# Every statement on a table stands here and can be pasted into the `sqlite3` shell.
# Values are always parameters; a list travels as a JSON array through `json_each`.
# Tables are named with `main.`, because a temporary table of the application
# could shadow ours (https://sqlite.org/lang_naming.html). Instants are REAL unix
# seconds; a NULL one means "never" or "not yet".

CREATE_SCHEMA_TABLE = """
-- schema: which components live in this file, and in which version
CREATE TABLE IF NOT EXISTS main.omniq_schema (
    component TEXT NOT NULL PRIMARY KEY,   -- 'queue', 'results' or 'events'
    version   INTEGER NOT NULL
) STRICT
"""

SELECT_SCHEMA = """
-- schema: the versions in this file
SELECT CAST(component AS BLOB), version
FROM main.omniq_schema
"""

SELECT_TABLE_NAMES = """
-- schema: tables and views of our names, and whether types are enforced in them
SELECT CAST(name AS BLOB), rtrim(sql, char(10)) LIKE '%) STRICT'
FROM main.sqlite_schema
WHERE name IN (
    'omniq_schema', 'omniq_task', 'omniq_pause', 'omniq_worker',
    'omniq_result', 'omniq_event'
)
"""

SELECT_OBJECT_NAMES = """
-- check: the tables, indexes and views that are there
SELECT name FROM main.sqlite_schema
"""

UPSERT_SCHEMA = """
-- schema: record the version of a component
INSERT INTO main.omniq_schema (component, version)
VALUES (:component, :version)
ON CONFLICT (component) DO UPDATE SET version = excluded.version
"""

CREATE_TASK_TABLE = """
-- queue: one row for each task
CREATE TABLE main.omniq_task (
    seq          INTEGER PRIMARY KEY,      -- order of insertion
    id           TEXT NOT NULL,
    queue        TEXT NOT NULL,
    func         TEXT NOT NULL,            -- a name in the worker's registry
    args         TEXT NOT NULL,            -- JSON array
    kwargs       TEXT NOT NULL,            -- JSON object
    metadata     TEXT NOT NULL,            -- JSON object
    status       TEXT NOT NULL,
    priority     INTEGER NOT NULL,         -- higher first
    attempt      INTEGER NOT NULL DEFAULT 0,
    claims       INTEGER NOT NULL DEFAULT 0,   -- never reset
    max_attempts INTEGER NOT NULL,
    retry_delay  REAL NOT NULL,            -- seconds
    timeout      REAL,                     -- seconds; NULL: no limit
    unique_key   TEXT,                     -- NULL: not deduplicated
    created_at   REAL NOT NULL,
    run_at       REAL,                     -- NULL: at once
    expires_at   REAL,                     -- NULL: never
    lease_id     TEXT,                     -- NULL: not claimed
    lease_until  REAL,
    worker       TEXT,                     -- who claimed it last
    started_at   REAL,                     -- of the last claim
    finished_at  REAL,                     -- NULL: not ended
    keep_until   REAL,                     -- completed: deleted afterwards
    error        TEXT,                     -- why the last attempt failed
    progress     TEXT,                     -- JSON
    -- When time alone changes this row; NULL: never.
    due_at REAL GENERATED ALWAYS AS (
        CASE status
            WHEN 'scheduled' THEN min(run_at, coalesce(expires_at, run_at))
            WHEN 'pending' THEN expires_at
            WHEN 'running' THEN lease_until
        END
    ) VIRTUAL,
    -- In pairs: of a longer list every write makes a table first (3 of 12 µs).
    CONSTRAINT omniq_task_status_is_known CHECK (
        status IN ('pending', 'running') OR status IN ('scheduled', 'completed')
        OR status IN ('failed', 'cancelled') OR status = 'expired'),
    CONSTRAINT omniq_task_running_has_lease CHECK (
        (status = 'running') = (lease_id IS NOT NULL)
        AND (lease_id IS NULL) = (lease_until IS NULL)),
    CONSTRAINT omniq_task_scheduled_has_time CHECK (
        status <> 'scheduled' OR run_at IS NOT NULL),
    CONSTRAINT omniq_task_counts_are_sane CHECK (
        attempt >= 0 AND claims >= 0 AND max_attempts >= 1 AND retry_delay >= 0)
) STRICT
"""

CREATE_TASK_ID_INDEX = """
-- queue: which task has this id?
CREATE UNIQUE INDEX main.omniq_task_by_id ON omniq_task (id)
"""

CREATE_TASK_KEY_INDEX = """
-- queue: which live task holds this key?
CREATE UNIQUE INDEX main.omniq_task_by_key ON omniq_task (queue, unique_key)
WHERE unique_key IS NOT NULL AND status IN ('scheduled', 'pending', 'running')
"""

CREATE_TASK_READY_INDEX = """
-- queue: what is claimed next? (holds nothing but claimable rows)
CREATE INDEX main.omniq_task_ready ON omniq_task (queue, priority DESC, seq)
WHERE status = 'pending'
"""

CREATE_TASK_DUE_INDEX = """
-- queue: what has its time come for?
CREATE INDEX main.omniq_task_due ON omniq_task (queue, due_at)
WHERE due_at IS NOT NULL
"""

CREATE_TASK_KEPT_INDEX = """
-- queue: whose retention is over?
CREATE INDEX main.omniq_task_kept ON omniq_task (keep_until)
WHERE keep_until IS NOT NULL
"""

CREATE_PAUSE_TABLE = """
-- queue: the queues that hand out nothing
CREATE TABLE main.omniq_pause (
    queue     TEXT NOT NULL PRIMARY KEY,
    paused_at REAL NOT NULL
) STRICT
"""

CREATE_WORKER_TABLE = """
-- queue: consumers that gave a name
CREATE TABLE main.omniq_worker (
    name       TEXT NOT NULL PRIMARY KEY,
    host       TEXT NOT NULL,
    pid        INTEGER NOT NULL,
    queues     TEXT NOT NULL,              -- JSON array
    started_at REAL NOT NULL,
    seen_at    REAL NOT NULL
) STRICT
"""

CREATE_TASK_VIEW = """
-- queue: tasks with readable times, newest first
CREATE VIEW main.omniq_task_view AS
SELECT
    id, queue, func, status, priority, attempt, max_attempts,
    strftime('%Y-%m-%d %H:%M:%f', created_at, 'unixepoch') AS created,
    strftime('%Y-%m-%d %H:%M:%f', run_at, 'unixepoch') AS run_at,
    strftime('%Y-%m-%d %H:%M:%f', started_at, 'unixepoch') AS started,
    strftime('%Y-%m-%d %H:%M:%f', finished_at, 'unixepoch') AS finished,
    round(coalesce(started_at, finished_at) - created_at, 3) AS waited_seconds,
    round(finished_at - started_at, 3) AS ran_seconds,
    strftime('%Y-%m-%d %H:%M:%f', lease_until, 'unixepoch') AS lease_until,
    strftime('%Y-%m-%d %H:%M:%f', expires_at, 'unixepoch') AS expires,
    worker, unique_key, error, progress, args, kwargs, metadata
FROM omniq_task
ORDER BY seq DESC
"""

CREATE_RESULT_TABLE = """
-- results: one row for each task that ended
CREATE TABLE main.omniq_result (
    task_id     TEXT NOT NULL PRIMARY KEY,
    status      TEXT NOT NULL,
    value       TEXT NOT NULL,             -- JSON
    error       TEXT,
    error_type  TEXT,
    traceback   TEXT,
    started_at  REAL,
    finished_at REAL,
    worker      TEXT,
    attempt     INTEGER,
    claim       INTEGER,                   -- the claim that made it
    metadata    TEXT NOT NULL,             -- JSON object
    stored_at   REAL NOT NULL,
    expires_at  REAL,                      -- NULL: kept for ever
    CONSTRAINT omniq_result_status_is_known CHECK (  -- in pairs, as above
        status IN ('success', 'error') OR status = 'cancelled')
) STRICT
"""

CREATE_RESULT_EXPIRY_INDEX = """
-- results: whose life is over?
CREATE INDEX main.omniq_result_expiry ON omniq_result (expires_at)
WHERE expires_at IS NOT NULL
"""

CREATE_RESULT_VIEW = """
-- results: with readable times, newest first
CREATE VIEW main.omniq_result_view AS
SELECT
    task_id, status, value, error_type, error, attempt, worker,
    strftime('%Y-%m-%d %H:%M:%f', started_at, 'unixepoch') AS started,
    strftime('%Y-%m-%d %H:%M:%f', finished_at, 'unixepoch') AS finished,
    round(finished_at - started_at, 3) AS ran_seconds,
    strftime('%Y-%m-%d %H:%M:%f', expires_at, 'unixepoch') AS expires,
    traceback, metadata
FROM omniq_result
ORDER BY rowid DESC
"""

CREATE_EVENT_TABLE = """
-- events: one row for each thing that happened; ids are never used again
CREATE TABLE main.omniq_event (
    event_id INTEGER PRIMARY KEY AUTOINCREMENT,
    at       REAL NOT NULL,
    type     TEXT NOT NULL,
    task_id  TEXT,
    queue    TEXT,
    worker   TEXT,
    message  TEXT NOT NULL,
    details  TEXT NOT NULL                 -- JSON object
) STRICT
"""

CREATE_EVENT_TASK_INDEX = """
-- events: what happened to this task?
CREATE INDEX main.omniq_event_by_task ON omniq_event (task_id, event_id)
WHERE task_id IS NOT NULL
"""

CREATE_EVENT_TIME_INDEX = """
-- events: what happened between two instants?
CREATE INDEX main.omniq_event_by_time ON omniq_event (at)
"""

CREATE_EVENT_VIEW = """
-- events: with readable times, newest first
CREATE VIEW main.omniq_event_view AS
SELECT
    event_id,
    strftime('%Y-%m-%d %H:%M:%f', at, 'unixepoch') AS at,
    type, task_id, queue, worker, message, details
FROM omniq_event
ORDER BY event_id DESC
"""

# The history of each component's tables: statements that lead from version
# n - 1 to version n. A released entry is never edited; a change is a new entry.
MIGRATIONS: dict[str, list[tuple[str, ...]]] = {
    "queue": [
        (
            CREATE_TASK_TABLE,
            CREATE_TASK_ID_INDEX,
            CREATE_TASK_KEY_INDEX,
            CREATE_TASK_READY_INDEX,
            CREATE_TASK_DUE_INDEX,
            CREATE_TASK_KEPT_INDEX,
            CREATE_PAUSE_TABLE,
            CREATE_WORKER_TABLE,
            CREATE_TASK_VIEW,
        )
    ],
    "results": [(CREATE_RESULT_TABLE, CREATE_RESULT_EXPIRY_INDEX, CREATE_RESULT_VIEW)],
    "events": [
        (
            CREATE_EVENT_TABLE,
            CREATE_EVENT_TASK_INDEX,
            CREATE_EVENT_TIME_INDEX,
            CREATE_EVENT_VIEW,
        )
    ],
}

COMPONENT_TABLE = {
    "queue": "omniq_task",
    "results": "omniq_result",
    "events": "omniq_event",
}

# -- Tasks, in the order of a task's life --

INSERT_TASK = """
-- enqueue: add a task
INSERT INTO main.omniq_task (
    id, queue, func, args, kwargs, metadata, status, priority, max_attempts,
    retry_delay, timeout, unique_key, created_at, run_at, expires_at
) VALUES (
    :id, :queue, :func, :args, :kwargs, :metadata, :status, :priority,
    :max_attempts, :retry_delay, :timeout, :unique_key, :created_at, :run_at,
    :expires_at
)
"""

SELECT_KEY_HOLDER = """
-- enqueue: the live task that holds a key, and whether its time has come
SELECT
    seq, id, queue, worker, status,
    due_at <= :now AND (:leases OR status <> 'running')
FROM main.omniq_task
WHERE queue = :queue AND unique_key = :unique_key
    AND status IN ('scheduled', 'pending', 'running')
"""

LOOK = """
-- look: is a task of each queue ready, is it paused, when is one due next?
SELECT
    value,
    EXISTS (
        SELECT 1 FROM main.omniq_task WHERE queue = value AND status = 'pending'
    ),
    EXISTS (SELECT 1 FROM main.omniq_pause WHERE queue = value),
    (
        SELECT due_at
        FROM main.omniq_task
        WHERE queue = value AND due_at IS NOT NULL
            AND (:leases OR status <> 'running')
        ORDER BY due_at
        LIMIT 1
    )
FROM json_each(:queues)
"""

# The same for one queue, without the JSON: half the price.
LOOK_ONE = LOOK.replace("json_each(:queues)", "(SELECT :queue AS value)")

SELECT_DUE = """
-- settle: tasks of one queue whose time has come
SELECT seq, id, queue, worker, status
FROM main.omniq_task
WHERE queue = :queue AND due_at <= :now AND (:leases OR status <> 'running')
ORDER BY due_at
LIMIT :limit
"""

SETTLE = """
-- settle: end what time has ended, and free what may run
UPDATE main.omniq_task
SET status = CASE
        WHEN expires_at <= :now THEN 'expired'
        WHEN status = 'running' AND attempt >= max_attempts THEN 'failed'
        ELSE 'pending'
    END,
    finished_at = CASE
        WHEN expires_at <= :now
            OR status = 'running' AND attempt >= max_attempts THEN :now
    END,
    error = CASE
        WHEN status <> 'running' THEN error
        WHEN attempt >= max_attempts
            THEN 'the lease of its worker ended, and no attempts are left'
        ELSE 'the lease of its worker ended'
    END,
    lease_id = NULL,
    lease_until = NULL
WHERE due_at <= :now AND seq IN (SELECT value FROM json_each(:seqs))
RETURNING seq, status, error
"""

CLAIM = """
-- claim: lease the best ready tasks of one queue
WITH ready AS (
    SELECT seq
    FROM main.omniq_task
    WHERE queue = :queue AND status = 'pending'
        AND (expires_at IS NULL OR expires_at > :now)
    ORDER BY priority DESC, seq
    LIMIT :limit
)
UPDATE main.omniq_task
SET status = 'running',
    attempt = min(attempt, 9007199254740991) + 1,  -- somebody else's may overflow
    claims = min(claims, 9007199254740991) + 1,
    lease_id = :claim_id || '.' || CAST(seq AS TEXT),
    lease_until = :lease_until,
    worker = :worker,
    started_at = :now,
    progress = NULL
WHERE status = 'pending' AND seq IN (SELECT seq FROM ready)
    AND NOT EXISTS (SELECT 1 FROM main.omniq_pause WHERE queue = :queue)
RETURNING
    id, queue, func, args, kwargs, metadata, status, priority, attempt, claims,
    max_attempts, retry_delay, timeout, unique_key, created_at, run_at,
    expires_at, lease_id, lease_until, worker, started_at, finished_at, error,
    progress, seq
"""

# The same for a limit of 1, where SQLite needs no table of the rows to change: a sixth.
CLAIM_ONE = CLAIM.replace("seq IN (", "seq = (")

SELECT_CLAIMED_TEXT = """
-- claim: the text of what was just claimed, of which some is not UTF-8
SELECT seq, id, func, args, kwargs, metadata, unique_key, error
FROM main.omniq_task
WHERE queue = :queue AND status = 'running' AND due_at = :lease_until
    AND lease_id GLOB :claim_id || '.*'
"""

MEND_CLAIMED = """
-- claim: give a task text that can be read
UPDATE main.omniq_task
SET id = :id, func = :func, args = :args, kwargs = :kwargs, metadata = :metadata,
    unique_key = :unique_key, error = :error
WHERE seq = :seq
RETURNING
    id, queue, func, args, kwargs, metadata, status, priority, attempt, claims,
    max_attempts, retry_delay, timeout, unique_key, created_at, run_at,
    expires_at, lease_id, lease_until, worker, started_at, finished_at, error,
    progress, seq
"""

DELETE_COMPLETED = """
-- complete: the tasks are done and go
DELETE FROM main.omniq_task
WHERE status = 'running'
    AND id IN (SELECT value FROM json_each(:ids))
    AND lease_id IN (SELECT value FROM json_each(:lease_ids))
RETURNING id
"""

DELETE_COMPLETED_ONE = """
-- complete: the task is done and goes
DELETE FROM main.omniq_task
WHERE status = 'running' AND id = :id AND lease_id = :lease_id
RETURNING id
"""

KEEP_COMPLETED = """
-- complete: the tasks are done and are kept for a while
UPDATE main.omniq_task
SET status = 'completed',
    finished_at = :now,
    keep_until = :keep_until,
    lease_id = NULL,
    lease_until = NULL,
    error = NULL
WHERE status = 'running'
    AND id IN (SELECT value FROM json_each(:ids))
    AND lease_id IN (SELECT value FROM json_each(:lease_ids))
RETURNING id
"""

FAIL = """
-- fail: again later while attempts remain, else a dead letter
UPDATE main.omniq_task
SET status = CASE
        WHEN :retry AND attempt < max_attempts THEN 'scheduled' ELSE 'failed'
    END,
    run_at = CASE WHEN :retry AND attempt < max_attempts THEN :run_at ELSE run_at END,
    finished_at = CASE WHEN :retry AND attempt < max_attempts THEN NULL ELSE :now END,
    error = :error,
    lease_id = NULL,
    lease_until = NULL
WHERE status = 'running' AND id = :id AND lease_id = :lease_id
RETURNING status
"""

RELEASE = """
-- release: give back unharmed, the attempt not counted
UPDATE main.omniq_task
SET status = CASE WHEN :run_at IS NULL THEN 'pending' ELSE 'scheduled' END,
    run_at = coalesce(:run_at, run_at),
    attempt = attempt - 1,
    lease_id = NULL,
    lease_until = NULL
WHERE status = 'running' AND id = :id AND lease_id = :lease_id
RETURNING id
"""

EXTEND = """
-- extend: a new end of the lease; progress is kept where none is given
UPDATE main.omniq_task
SET lease_until = :lease_until,
    progress = coalesce(:progress, progress)
WHERE status = 'running' AND id = :id AND lease_id = :lease_id
RETURNING id
"""

END_LEASES = """
-- reclaim: end the leases of a worker that is gone
UPDATE main.omniq_task
SET lease_until = 0
WHERE due_at IS NOT NULL AND status = 'running' AND worker = :worker
RETURNING seq, id, queue, worker, status
"""

CANCEL = """
-- cancel: a live task never runs again
UPDATE main.omniq_task
SET status = 'cancelled',
    finished_at = :now,
    lease_id = NULL,
    lease_until = NULL
WHERE id = :id AND status IN ('scheduled', 'pending', 'running')
RETURNING id, queue
"""

CANCEL_ALL = """
-- cancel all: every live task that matches never runs again
UPDATE main.omniq_task
SET status = 'cancelled',
    finished_at = :now,
    lease_id = NULL,
    lease_until = NULL
WHERE status IN ('scheduled', 'pending', 'running')
    AND (:queue IS NULL OR queue = :queue)
    AND (:func IS NULL OR func = :func)
    AND (:status IS NULL OR status = :status)
RETURNING id, queue
"""

SELECT_RETRYABLE = """
-- retry: the key of a task that can run again
SELECT queue, unique_key
FROM main.omniq_task
WHERE id = :id AND status IN ('failed', 'cancelled', 'expired')
"""

SELECT_ALL_RETRYABLE = """
-- retry all: the tasks that can run again unless their key is held
SELECT id
FROM main.omniq_task
WHERE status IN ('failed', 'cancelled', 'expired')
    AND unique_key IS NOT NULL
    AND (:queue IS NULL OR queue = :queue)
    AND (:func IS NULL OR func = :func)
ORDER BY seq
"""

_RUN_AGAIN = """
UPDATE main.omniq_task
SET status = 'pending',
    attempt = 0,
    run_at = NULL,
    finished_at = NULL,
    progress = NULL,
    expires_at = CASE WHEN expires_at > :now THEN expires_at END
WHERE status IN ('failed', 'cancelled', 'expired')
"""

RETRY = f"""
-- retry: runs again with fresh attempts; an expiry that has passed is dropped
{_RUN_AGAIN}
    AND id = :id
"""

RETRY_ALL = f"""
-- retry all: those without a key run again
{_RUN_AGAIN}
    AND unique_key IS NULL
    AND (:queue IS NULL OR queue = :queue)
    AND (:func IS NULL OR func = :func)
RETURNING id, queue
"""

SELECT_TASK = """
-- one task
SELECT
    id, queue, func, args, kwargs, metadata, status, priority, attempt, claims,
    max_attempts, retry_delay, timeout, unique_key, created_at, run_at,
    expires_at, lease_id, lease_until, worker, started_at, finished_at, error,
    progress, seq
FROM main.omniq_task
WHERE id = :id
"""

SELECT_LIVE = """
-- wait: which of these tasks live, and when does time change them?
SELECT id, CASE WHEN :leases OR status <> 'running' THEN due_at ELSE :later END
FROM main.omniq_task
WHERE id IN (SELECT value FROM json_each(:ids))
    AND status IN ('scheduled', 'pending', 'running')
"""

SELECT_TASKS = """
-- tasks in order of insertion
SELECT
    id, queue, func, args, kwargs, metadata, status, priority, attempt, claims,
    max_attempts, retry_delay, timeout, unique_key, created_at, run_at,
    expires_at, lease_id, lease_until, worker, started_at, finished_at, error,
    progress, seq
FROM main.omniq_task
WHERE (:queue IS NULL OR queue = :queue)
    AND (:status IS NULL OR status = :status)
    AND (:func IS NULL OR func = :func)
    AND (:unique_key IS NULL OR unique_key = :unique_key)
ORDER BY seq
LIMIT :limit OFFSET :offset
"""

COUNT_TASKS = """
-- how many tasks
SELECT count(*)
FROM main.omniq_task
WHERE (:queue IS NULL OR queue = :queue) AND (:status IS NULL OR status = :status)
"""

SELECT_STATS = """
-- stats: tasks by queue and status
SELECT queue, status, count(*), min(created_at)
FROM main.omniq_task
GROUP BY queue, status
"""

SELECT_QUEUES = """
-- queues that have tasks or are paused
SELECT queue FROM main.omniq_task
UNION
SELECT queue FROM main.omniq_pause
ORDER BY queue
"""

SELECT_PAUSES = """
-- the paused queues
SELECT queue FROM main.omniq_pause
"""

INSERT_PAUSE = """
-- pause: the queue hands out nothing
INSERT INTO main.omniq_pause (queue, paused_at)
VALUES (:queue, :now)
ON CONFLICT (queue) DO NOTHING
"""

DELETE_PAUSE = """
-- resume: the queue hands out tasks again
DELETE FROM main.omniq_pause WHERE queue = :queue
"""

UPSERT_WORKER = """
-- note a worker: it was seen now
INSERT INTO main.omniq_worker (name, host, pid, queues, started_at, seen_at)
VALUES (:name, :host, :pid, :queues, :now, :now)
ON CONFLICT (name) DO UPDATE
SET host = excluded.host,
    queues = excluded.queues,
    started_at = CASE
        WHEN pid = excluded.pid THEN started_at ELSE excluded.started_at
    END,
    pid = excluded.pid,
    seen_at = excluded.seen_at
"""

TOUCH_WORKER = """
-- note a worker: its heartbeat was seen now
UPDATE main.omniq_worker SET seen_at = :now WHERE name = :name
"""

DELETE_WORKER = """
-- forget a worker that is gone
DELETE FROM main.omniq_worker WHERE name = :name
"""

DELETE_OLD_WORKERS = """
-- cleanup: forget workers that were not seen for long
DELETE FROM main.omniq_worker WHERE seen_at < :before
"""

SELECT_WORKERS = """
-- workers, and how many tasks each one holds
SELECT name, host, pid, queues, started_at, seen_at, coalesce(running, 0)
FROM main.omniq_worker
LEFT JOIN (
    SELECT worker, count(*) AS running
    FROM main.omniq_task
    WHERE due_at IS NOT NULL AND status = 'running'
    GROUP BY worker
) ON worker = name
ORDER BY name
"""

SELECT_OVERDUE = """
-- check: leases that ended before now, by queue
SELECT queue, count(*)
FROM main.omniq_task
WHERE due_at < :before AND status = 'running'
GROUP BY queue
"""

SELECT_DUE_QUEUES = """
-- cleanup: the queues in which time has changed something
SELECT DISTINCT queue FROM main.omniq_task WHERE due_at <= :now
"""

PURGE_TASKS = """
-- purge: delete ended tasks; live ones only where their status is named
DELETE FROM main.omniq_task
WHERE seq IN (
    SELECT seq FROM main.omniq_task
    WHERE seq > :after
        AND (:queue IS NULL OR queue = :queue)
        AND CASE
            WHEN :status IS NULL
                THEN status IN ('completed', 'failed', 'cancelled', 'expired')
            ELSE status = :status
        END
        AND (:before IS NULL OR coalesce(finished_at, created_at) <= :before)
    ORDER BY seq
    LIMIT :limit
)
RETURNING seq
"""

DELETE_KEPT = """
-- cleanup: delete completed tasks whose retention is over
DELETE FROM main.omniq_task
WHERE seq IN (
    SELECT seq FROM main.omniq_task
    WHERE keep_until <= :now
    LIMIT :limit
)
RETURNING seq
"""

# -- Results --

UPSERT_RESULT = """
-- store: a result of an older claim never replaces a newer one's
INSERT INTO main.omniq_result (
    task_id, status, value, error, error_type, traceback, started_at,
    finished_at, worker, attempt, claim, metadata, stored_at, expires_at
) VALUES (
    :task_id, :status, :value, :error, :error_type, :traceback, :started_at,
    :finished_at, :worker, :attempt, :claim, :metadata, :stored_at, :expires_at
)
ON CONFLICT (task_id) DO UPDATE
SET status = excluded.status,
    value = excluded.value,
    error = excluded.error,
    error_type = excluded.error_type,
    traceback = excluded.traceback,
    started_at = excluded.started_at,
    finished_at = excluded.finished_at,
    worker = excluded.worker,
    attempt = excluded.attempt,
    claim = excluded.claim,
    metadata = excluded.metadata,
    stored_at = excluded.stored_at,
    expires_at = excluded.expires_at
WHERE coalesce(
    excluded.claim >= omniq_result.claim,
    excluded.attempt >= omniq_result.attempt,
    TRUE
) OR excluded.started_at > omniq_result.finished_at  -- a later task of the same id
"""

SELECT_RESULTS_BY_ID = """
-- get: the results of these tasks
SELECT
    task_id, status, value, error, error_type, traceback, started_at,
    finished_at, worker, attempt, metadata, claim
FROM main.omniq_result
WHERE task_id IN (SELECT value FROM json_each(:ids))
    AND (expires_at IS NULL OR expires_at > :now)
"""

SELECT_RESULTS = """
-- list: results in the order in which tasks first ended
SELECT
    task_id, status, value, error, error_type, traceback, started_at,
    finished_at, worker, attempt, metadata, claim
FROM main.omniq_result
WHERE (:status IS NULL OR status = :status)
    AND (expires_at IS NULL OR expires_at > :now)
ORDER BY rowid
LIMIT :limit OFFSET :offset
"""

DELETE_RESULT = """
-- delete: one result
DELETE FROM main.omniq_result WHERE task_id = :task_id
RETURNING expires_at
"""

PURGE_EXPIRED_RESULTS = """
-- purge: results whose life is over
DELETE FROM main.omniq_result
WHERE rowid IN (
    SELECT rowid FROM main.omniq_result WHERE expires_at <= :now LIMIT :limit
)
RETURNING rowid
"""

PURGE_OLD_RESULTS = """
-- purge: results that were stored before an instant
DELETE FROM main.omniq_result
WHERE rowid IN (
    SELECT rowid FROM main.omniq_result
    WHERE rowid > :after AND (stored_at <= :before OR expires_at <= :now)
    ORDER BY rowid
    LIMIT :limit
)
RETURNING rowid
"""

# -- Events --

INSERT_EVENT = """
-- log: one event
INSERT INTO main.omniq_event (at, type, task_id, queue, worker, message, details)
VALUES (:at, :type, :task_id, :queue, :worker, :message, :details)
"""

_EVENT_FILTER = """
    AND event_id > :after
    AND (:queue IS NULL OR queue = :queue)
    AND (:type IS NULL OR type = :type)
    AND (:since IS NULL OR at >= :since)
    AND (:until IS NULL OR at < :until)
"""

# Ways to find events. SQLite would rather walk all ids than sort, so the last one
# names the index, to start at the instant.
_EVENTS_BY = {
    "id": "FROM main.omniq_event WHERE :task_id IS NULL",
    "task": "FROM main.omniq_event WHERE task_id = :task_id",
    "time": """FROM main.omniq_event INDEXED BY omniq_event_by_time
WHERE at >= :since AND :task_id IS NULL""",
}

SELECT_EVENTS = {
    (way, newest_first): """
-- query: events
SELECT event_id, at, type, task_id, queue, worker, message, details
"""
    + source
    + _EVENT_FILTER
    + order
    for way, source in _EVENTS_BY.items()
    for newest_first, order in (
        (False, "ORDER BY event_id LIMIT :limit"),
        (True, "ORDER BY event_id DESC LIMIT :limit"),
    )
}

MANY_SINCE = """
-- query: are more than ten thousand events as new as this?
SELECT 1
FROM main.omniq_event INDEXED BY omniq_event_by_time
WHERE at >= :since
LIMIT 1 OFFSET 10000
"""

COUNT_EVENTS = {
    way: "\n-- count: events\nSELECT count(*)\n" + source + _EVENT_FILTER
    for way, source in _EVENTS_BY.items()
}

SELECT_LAST_EVENT = """
-- follow: where the log ends now
SELECT coalesce(max(event_id), 0) FROM main.omniq_event
"""

PURGE_EVENTS = """
-- purge: events before an instant
DELETE FROM main.omniq_event
WHERE event_id IN (
    SELECT event_id FROM main.omniq_event WHERE at < :before LIMIT :limit
)
RETURNING event_id
"""

# -- Command line and report --

SELECT_MATCHING = """
-- list, cancel, retry, purge: tasks by id or filter; age counts from the end
SELECT seq, id, status, queue, func
FROM main.omniq_task
WHERE seq > :after
    AND (:ids IS NULL OR id IN (SELECT value FROM json_each(:ids)))
    AND (:queue IS NULL OR queue = :queue)
    AND (:func IS NULL OR func = :func)
    AND status IN (SELECT value FROM json_each(:statuses))
    AND (:before IS NULL OR coalesce(finished_at, created_at) <= :before)
    AND (:since IS NULL OR coalesce(finished_at, created_at) >= :since)
ORDER BY seq
LIMIT :limit OFFSET :offset
"""

DELETE_TASK = """
-- purge: delete one task
DELETE FROM main.omniq_task WHERE id = :id
RETURNING id
"""

SELECT_EVENT_PAST = """
-- report: what the newest events say of the past
SELECT at, type, task_id, NULL, details, event_id
FROM main.omniq_event INDEXED BY omniq_event_by_time
WHERE at >= :since AND task_id IS NOT NULL
ORDER BY at DESC, event_id DESC
LIMIT :limit
"""

SELECT_TASK_PAST = """
-- report: what the tasks that are still there say of the past, as if by events
SELECT created_at, 'enqueued', id, func, ''
FROM main.omniq_task
WHERE created_at >= :since
UNION ALL
SELECT started_at, 'dequeued', id, func, iif(attempt > 1, 'again', '')
FROM main.omniq_task
WHERE started_at >= :since AND status NOT IN ('scheduled', 'pending')
UNION ALL
SELECT finished_at, status, id, func, ''
FROM main.omniq_task
WHERE finished_at >= :since
ORDER BY 1 DESC
LIMIT :limit
"""

SELECT_RESULT_PAST = """
-- report: what results say of the past, as if by events
SELECT started_at, 'dequeued', task_id, NULL, ''
FROM main.omniq_result
WHERE started_at >= :since
UNION ALL
SELECT finished_at, CASE status
        WHEN 'success' THEN 'completed' WHEN 'error' THEN 'failed' ELSE status
    END, task_id, NULL, ''
FROM main.omniq_result
WHERE finished_at >= :since
ORDER BY 1 DESC
LIMIT :limit
"""

SELECT_RUNNING = """
-- report: what runs, with the lease that ended or ends first in front
SELECT
    id, queue, func, attempt || ' of ' || max_attempts, worker, started_at,
    lease_until, progress
FROM main.omniq_task
WHERE due_at IS NOT NULL AND status = 'running'
ORDER BY lease_until
LIMIT :limit
"""

SELECT_FAILED_TASKS = """
-- report: the tasks that failed last
SELECT id, finished_at, func, coalesce(error, '')
FROM main.omniq_task
WHERE status = 'failed' AND finished_at >= :since
ORDER BY finished_at DESC
LIMIT :limit
"""

SELECT_FAILED_RESULTS = """
-- report: the results that were stored last for tasks that failed
SELECT task_id, coalesce(finished_at, stored_at), NULL,
    coalesce(error_type || ': ', '') || coalesce(error, '')
FROM main.omniq_result
WHERE status = 'error' AND coalesce(finished_at, stored_at) >= :since
ORDER BY rowid DESC
LIMIT :limit
"""

SELECT_TRACEBACKS = """
-- report: where these tasks failed; what else was stored may not be readable here
SELECT task_id, traceback
FROM main.omniq_result
WHERE task_id IN (SELECT value FROM json_each(:ids))
"""


# =============================================================================
# Serialization and time
# =============================================================================
#
# What goes in comes back equal, or is refused where it goes in. JSON has no
# tuples, sets, bytes or dates, so these travel as objects of one key that
# starts with a dollar sign; a dictionary that looks like one is wrapped in
# {"$dict": …}. Decoding calls the few functions below and imports nothing.


class Serializer(Protocol):
    """Turns values into JSON text and back; pass one as `serializer=`."""

    def dumps(self, value: Any) -> str:
        """Return `value` as JSON text."""
        ...

    def loads(self, text: str) -> Any:
        """Return the value of such a text."""
        ...


class _Refused(Exception):
    """A value cannot travel; the way to it is added while unwinding."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        self.where = ""


_MAX_DEPTH = 200  # well below what the JSON parser can read back on any stack


_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda value: base64.b64encode(value).decode()),
    datetime: ("$datetime", datetime.isoformat),
    date: ("$date", date.isoformat),
    time_of_day: ("$time", time_of_day.isoformat),
    timedelta: ("$timedelta", lambda t: [t.days, t.seconds, t.microseconds]),
    Decimal: ("$decimal", str),
    UUID: ("$uuid", str),
    type(Path()): ("$path", str),
}

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time_of_day.fromisoformat,
    "$timedelta": lambda parts: timedelta(*parts),
    "$decimal": Decimal,
    "$uuid": UUID,
    "$path": Path,
}


_PLAIN = frozenset({str, int, bool, type(None)})


def _encode(value: Any, depth: int = 0) -> Any:
    """Return `value` made of JSON's own types."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _Refused(f"{value!r} is not a number that JSON has")
        return float(value)
    if depth > _MAX_DEPTH:
        raise _Refused(f"nested deeper than {_MAX_DEPTH} levels, or contains itself")
    if isinstance(value, list):
        # One look in C for all: a list of 1,000 numbers costs 30 µs instead of 150.
        if kind is list and _PLAIN.issuperset(map(type, value)):
            return value
        return _encode_items(value, depth)
    if isinstance(value, dict):
        return _encode_dict(value, depth)
    if isinstance(value, tuple):
        return {"$tuple": _encode_items(value, depth)}
    if isinstance(value, (set, frozenset)):
        name = "$set" if isinstance(value, set) else "$frozenset"
        return {name: _encode_items(value, depth)}
    return _encode_other(value)


def _encode_items(values: Iterable[Any], depth: int) -> list[Any]:
    encoded: list[Any] = []
    try:
        for value in values:
            encoded.append(_encode(value, depth + 1))
    except _Refused as refused:
        refused.where = f"[{len(encoded)}]{refused.where}"
        raise
    return encoded


def _encode_dict(values: dict[Any, Any], depth: int) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise _Refused(f"a key of type {type(key).__name__} is not a string")
        try:
            encoded[str.__str__(key)] = _encode(value, depth + 1)  # also of an enum
        except _Refused as refused:
            refused.where = f"[{_shorten(repr(key), 50)}]{refused.where}"
            raise
    if len(encoded) == 1 and next(iter(encoded)).startswith("$"):
        return {"$dict": encoded}
    return encoded


def _encode_other(value: Any) -> Any:
    """Encode the types with a tag, and `StrEnum`, `IntEnum` and their like."""
    known = _ENCODERS.get(type(value))
    if known is not None:
        tag, encode = known
        encoded = encode(value)
        try:
            equal = _DECODERS[tag](encoded) == value
        except ArithmeticError:  # a signalling NaN
            equal = False
        if not equal:  # NaN; an hour that comes twice
            raise _Refused(f"this {type(value).__name__} would not come back equal")
        return {tag: encoded}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    raise _Refused(f"a value of type {type(value).__name__} has no JSON form")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(key, item)] = value.items()
        if key == "$dict" and isinstance(item, dict):
            return {inner: _decode(content) for inner, content in item.items()}
        if key in _DECODERS:
            return _DECODERS[key](_decode(item))
    return {key: _decode(item) for key, item in value.items()}


_to_json = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, separators=(",", ":")
).encode
_to_ascii_json = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


class JSONSerializer:
    """The default: JSON text, with tags for a few common types of Python."""

    def dumps(self, value: Any) -> str:
        """Return `value` as JSON text.

        Raises: `SerializationError` naming the place of what cannot travel.
        """
        try:
            encoded = _encode(value)
            text = _to_json(encoded)
        except _Refused as refused:
            raise SerializationError(f"value{refused.where}", refused.detail) from None
        except (RecursionError, ValueError) as error:  # an integer of 4,300 digits
            raise SerializationError("value", str(error)) from None
        if _storable(text):
            return text
        text = _to_ascii_json(encoded)
        if json.loads(text) != encoded:  # two surrogates side by side become one
            detail = "text with two lone surrogates that make a character"
            raise SerializationError("value", detail)
        return text

    def loads(self, text: str) -> Any:
        """Return the value whose JSON text this is."""
        value = json.loads(text)
        return _decode(value) if '"$' in text else value


_JSON = JSONSerializer()


def _find_serializer(serializer: str | Serializer) -> Serializer:
    found: Any = _JSON if serializer == "json" else serializer
    fine = all(callable(getattr(found, name, None)) for name in ("dumps", "loads"))
    rule = "'json' or an object with dumps() and loads()"
    _check(fine, "serializer", rule, serializer)
    return cast(Serializer, found)


def _dump(serializer: Serializer, where: str, value: Any) -> str:
    """Return the text of `value`; every failure names `where` it sits."""
    try:
        text = serializer.dumps(value)
    except SerializationError as error:
        inner = error.where.removeprefix("value")
        raise SerializationError(where + inner, error.detail) from None
    except Exception as error:
        detail = f"{type(error).__name__}: {_shorten(str(error), 200)}"
        raise SerializationError(where, detail) from error
    if not isinstance(text, str) or not _storable(text):
        raise SerializationError(where, "dumps() must return text without NUL")
    return text


def _dump_mapping(serializer: Serializer, where: str, value: Mapping[str, Any]) -> str:
    return _dump(serializer, where, dict(value)) if value else "{}"


def _load(serializer: Serializer, where: str, text: str) -> Any:
    try:
        return serializer.loads(text)
    except Exception as error:
        detail = f"the stored text cannot be read ({type(error).__name__})"
        raise SerializationError(where, detail) from error


def _load_as(kind: Any, serializer: Serializer, where: str, text: str) -> Any:
    value = _load(serializer, where, text)
    if not isinstance(value, kind):
        raise SerializationError(where, f"the stored text is no {kind.__name__}")
    return value


def _load_mapping(serializer: Serializer, where: str, text: str) -> Any:
    return {} if text == "{}" else _load_as(Mapping, serializer, where, text)


def _to_unix(instant: datetime | None) -> float | None:
    return None if instant is None else instant.timestamp()


def _from_unix(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


Row = tuple[Any, ...]


def _read(
    what: str,
    build: Callable[[Row, Serializer], T],
    rows: Iterable[Row],
    serializer: Serializer,
) -> list[T]:
    """Build values from rows; in one that somebody else wrote, the fault is named."""
    values: list[T] = []
    row: Row = ("",)
    try:
        for row in rows:
            values.append(build(row, serializer))
    except SerializationError as error:
        where = f"{what} {row[0]}: {error.where}"
        raise SerializationError(where, error.detail) from error.__cause__
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        raise SerializationError(f"{what} {row[0]}", str(error)) from error
    return values


def _task_parameters(
    task: Task, serializer: Serializer, now: float, delay: float
) -> dict[str, Any]:
    """Return the parameters of `INSERT_TASK`."""
    run_at = _to_unix(task.run_at)
    if delay > 0:
        run_at = max(now + delay, run_at or 0.0)
    return {
        "id": task.id,
        "queue": task.queue,
        "func": task.func,
        "args": _dump(serializer, "args", list(task.args)) if task.args else "[]",
        "kwargs": _dump_mapping(serializer, "kwargs", task.kwargs),
        "metadata": _dump_mapping(serializer, "metadata", task.metadata),
        "status": "scheduled" if run_at is not None and run_at > now else "pending",
        "priority": task.priority,
        "max_attempts": task.max_attempts,
        "retry_delay": float(task.retry_delay),
        "timeout": None if task.timeout is None else float(task.timeout),
        "unique_key": task.unique_key,
        "created_at": now,
        "run_at": run_at,
        "expires_at": _to_unix(task.expires_at),
    }


# In the order of the columns of `CLAIM` and the selects, but for the last one.
_SET_FIELDS: list[Callable[[Task, Any], None]] = [
    Task.__dict__[name].__set__
    for name in (
        "id queue func args kwargs metadata status priority attempt claims"
        " max_attempts retry_delay timeout unique_key created_at run_at expires_at"
        " lease_id lease_until worker started_at finished_at error progress"
    ).split()
]


def _task_of(row: Row, serializer: Serializer) -> Task:
    """Build a `Task` from the columns of `CLAIM` and the selects.

    Its fields are set as they are: they were checked when the task went in, and the
    table's constraints hold them. To check them again took 6 of 10 µs.
    """
    (
        task_id, queue, func, args, kwargs, metadata, status, priority, attempt,
        claims, max_attempts, retry_delay, timeout, unique_key, created_at, run_at,
        expires_at, lease_id, lease_until, worker, started_at, finished_at, error,
        progress, _,
    ) = row  # fmt: skip
    values = (
        task_id,
        queue,
        func,
        () if args == "[]" else tuple(_load_as(list, serializer, "args", args)),
        _load_mapping(serializer, "kwargs", kwargs),
        _load_mapping(serializer, "metadata", metadata),
        _TASK_STATUSES[status],
        priority,
        attempt,
        claims,
        max_attempts,
        float(retry_delay),  # RETURNING hands out 1.0 as 1
        timeout and float(timeout),
        unique_key,
        _from_unix(created_at),
        _from_unix(run_at),
        _from_unix(expires_at),
        lease_id,
        _from_unix(lease_until),
        worker,
        _from_unix(started_at),
        _from_unix(finished_at),
        error,
        progress and _load(serializer, "progress", progress),
    )
    task = object.__new__(Task)
    for set_field, value in zip(_SET_FIELDS, values, strict=True):
        set_field(task, value)
    return task


# =============================================================================
# Connection
# =============================================================================
#
# Everything that touches SQLite's file is in this section. Before changing it,
# know these things; most were learned by losing data.
#
# WAL and IMMEDIATE. The file is in WAL mode: one writer at a time, and readers
# that see a snapshot and wait for nobody (https://sqlite.org/wal.html). Every
# write transaction is BEGIN IMMEDIATE. A deferred one that reads first and then
# writes fails with SQLITE_BUSY_SNAPSHOT, whatever the timeout.
#
# Operations. The classes above this layer never see a transaction. They hand
# over an `_Operation`: a function that runs on a connection inside one. It has
# no effect outside the database, so it can be run again when its transaction
# was rolled back. Its ids are drawn before it is handed over.
#
# Group commit. To wait for the disk is most of the cost of a durable commit.
# While one transaction is flushed, the operations that arrive wait in a list;
# the next transaction takes them all. Each that may fail half-way runs in a
# savepoint of its own, so that it takes nobody along, and each caller gets its
# own result or error, after the flush where it needs one. Nothing waits for
# company: an operation that comes alone is committed alone.
#
# Flushes. At synchronous=FULL SQLite flushes the WAL inside the commit, with the
# write lock held. Here every commit is made at NORMAL, which flushes nothing, and
# the WAL is flushed right after it, before anybody is told: other processes
# commit meanwhile, and 16 of them do 1.8 times as much. (Early lock release:
# DeWitt et al., "Implementation techniques for main memory database systems",
# 1984.) A flush takes along all that was committed before, so what is built on
# another one's commit never outlives it. But others can see a commit for the
# moment that its flush takes; so an operation that finds what it wants done
# already, as an enqueue of an id that exists, flushes as well. Behind a flush that
# failed nothing durable is acknowledged by this connection any more.
#
# A claim, a heartbeat or a release that a power cut takes back does no harm, for
# nobody holds it afterwards. A group of nothing else is not flushed; the next
# flush writes the same WAL. The exception is a claim that uses the last attempt:
# if it were forgotten, the task would run once more than it may.
#
# Fairness. SQLite's busy handler sleeps up to 100 ms while whoever just
# committed takes the lock again: of 8 busy processes one made 13,146 commits
# and another made 1. So `timeout=0`, and a retry of our own with short random
# sleeps, that get shorter the longer one has waited. All get nearly the same
# share, because nobody holds the lock while the disk works. A lock file in front
# was rejected: a stopped holder would block everyone.
#
# Two forms, one engine. `_Database` holds the connections and commits groups.
# `_DirectGateway` uses it from the calling threads: one of them leads, commits
# for all that wait, and hands leadership on. `_AsyncGateway` lets the thread of
# an aiosqlite connection do that, and delivers outcomes to whichever loop asked.
# A whole transaction is one function on that thread: nothing can be cancelled
# in the middle, and no loop that ends leaves a transaction open.
#
# Fork. POSIX locks belong to a process and are not inherited, but SQLite's
# record of them is copied. A child that opens the file again believes that it
# holds locks that it does not hold, and the parent's last close then deletes
# the WAL under it; what the child committed is gone. So before a fork every
# connection of this process is brought to rest and closed; both sides open
# again when they next need to (https://sqlite.org/howtocorrupt.html, 2.6).
#
# File descriptors. Closing any descriptor of the database file drops all POSIX
# locks of this process on it (the same page, 2.2). Nothing here ever opens the
# file except SQLite; `stat` is harmless, and so is a descriptor of the WAL, on
# which there are no locks.
#
# Checkpoints. SQLite 3.7.0 to 3.51.2 can corrupt the file when a checkpoint
# meets a commit that resets the WAL (https://sqlite.org/wal.html, "The WAL-reset
# bug"). On such a library the automatic checkpoint is off, and every few
# hundred commits a checkpoint runs on one connection while another one of ours
# holds the write lock, so that nobody can commit beside it. Checkpointing in a
# background thread was rejected (it starves, the WAL grew to 2.2 GB), and so
# was checkpointing at the start of a write transaction (the WAL never resets).
#
# While a reader holds a snapshot, no library can reset the WAL: six writers made
# 400 MiB of it in 10 s. So from a length on they pause after each commit, with
# nothing held, as long as makes it grow slowly; what is written rarely, or in
# bulk, hardly notices.
#
# Interrupts. A KeyboardInterrupt between COMMIT and the caller would look like
# a failure of something that happened. In the main thread a blocking call
# records SIGINT, and raises it once its outcome is known. A claim whose caller
# is gone is given back (`undo`).
#
# Waiting. `PRAGMA data_version` on an idle connection tells whether another
# connection committed. It costs 3 µs, but to wake a thread for it 60, so looking
# often enough to be quick costs 2 % of a core. On Linux the kernel tells when
# somebody writes to the WAL, and one waiter of an object looks for all of them
# shortly after that, for the commit shows a little later; elsewhere it looks
# every few milliseconds. Commits of the same object wake them directly.

_MAX_GROUP = 1_024  # operations in one transaction
_MAX_GROUP_SECONDS = 0.025  # after which other processes get a turn
_CHECKPOINT_COMMITS = 256  # own commits between two guarded checkpoints
_CHECKPOINT_BYTES = 4 * 2**20  # growth of the WAL that brings one forward
_LONG_WAL_FRAMES = 2_048  # in a WAL that is to be checkpointed again soon
_QUICK = 0.001  # seconds in which it can hardly grow (not to look saves 3 of 90 µs)
_QUICK_COMMITS = 16  # commits as quick as that between two looks at its size
_WAL_KEPT_BYTES = 16 * 2**20  # size to which a WAL that was reset is cut
_HELD_WAL_BYTES = 40 * 2**20  # size from which writes are slowed: a reader holds it
_HELD_WAL_PACE = 2 * 2**20  # bytes a second by which all together let it grow then
_HELD_WAL_PAUSE = 0.25  # seconds after one transaction at most
_INTERRUPT_INTERVAL = 0.05  # seconds between two looks for a recorded SIGINT
_FORK_PATIENCE = 1.0  # seconds for which a fork inside a blocking call waits for others
_LEAST_REST = 0.001  # seconds between two looks of a waiter, for each other one
_LONGEST_REST = 1.0  # seconds
_LOST_WAKE = 2.0  # seconds until a thread looks whether an exception hit its waker
_FIRST_LOOK = 0.0005  # seconds after a write to the WAL; the next at double distances
_LAST_LOOK = 0.05  # seconds between two looks when nobody writes, in case one is missed
_LOOKS_APART = 0.006  # seconds between two looks when others write all the time
_LOOKS_AT_ONCE = 4  # after some time without any
_CLOCK_SET = 1.0  # seconds by which the clock is ahead at once: the machine slept
_TIME_TO_EXTEND = 5.0  # seconds for all holders of leases, after they stood still
_STOPS_APART = 60.0  # seconds, at least

_NETWORK_FILESYSTEMS = frozenset(
    "9p acfs afp afpfs afs beegfs ceph cifs coda davfs fuse.ceph fuse.cephfs"
    " fuse.davfs fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.rclone fuse.s3fs"
    " fuse.smbnetfs fuse.sshfs gfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2"
    " orangefs panfs prl_fs pvfs2 smb2 smb3 smbfs vboxsf virtiofs vmhgfs webdav".split()
)


def _has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Tell whether this library corrupts a WAL that is checkpointed unguarded."""
    if version[:2] == (3, 50):
        return version < (3, 50, 7)
    if version[:2] == (3, 44):
        return version < (3, 44, 6)
    return version < (3, 51, 3)


def _filesystem_of(path: str, mounts: str) -> str:
    """Return the type of the file system of `path` by the text of mountinfo."""
    best, found = "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, right.split(" ")[0]
    return found


def _network_filesystem(path: str) -> str | None:
    """Return the name of the network file system that `path` is on, or `None`."""
    real = os.path.realpath(path)
    if sys.platform == "win32":
        return "UNC path" if real.startswith(("\\\\", "//")) else None
    try:
        if sys.platform == "darwin":
            # "server:/export on /mnt (nfs, …)" in the form of a mountinfo line
            listing = subprocess.run(
                ["/sbin/mount"], capture_output=True, text=True, timeout=10, check=False
            ).stdout
            mounts = ""
            for line in listing.splitlines():
                point, _, options = line.partition(" on ")[2].rpartition(" (")
                mounts += f"0 0 0 / {point} - {options.split(',')[0].rstrip(')')}\n"
        else:
            mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except (OSError, subprocess.TimeoutExpired):
        return None
    name = _filesystem_of(real, mounts)
    return name if name in _NETWORK_FILESYSTEMS else None


def _create_folders(folder: Path) -> None:
    """Create what is missing of a path, each for its owner only.

    `os.makedirs` gives those in between what the umask allows.
    """
    missing = itertools.takewhile(lambda f: not f.exists(), (folder, *folder.parents))
    for new in reversed(list(missing)):
        with contextlib.suppress(FileExistsError):  # another process was faster
            new.mkdir(mode=0o700)
            new.chmod(0o700)


def _create_file(path: str) -> None:
    """Create an empty database that only its owner can read, if there is none.

    It appears under its name in one step with its mode set. SQLite gives the
    `-wal` and `-shm` beside it the same mode. The descriptor is closed before
    the name exists, so that no lock is dropped (but for where there are no links).
    """
    _create_folders(Path(path).parent)
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        os.chmod(temporary, 0o600)  # a umask may have taken rights of the owner
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was faster
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    finally:
        os.unlink(temporary)


def _wal_of(path: str) -> str:
    """Return the path of the WAL: beside the file itself, not beside a link to it."""
    return os.path.realpath(path) + "-wal"


def _reason_of(error: Exception) -> str:
    """Return why, without the number and the name that the system adds."""
    return getattr(error, "strerror", None) or str(error)


def _is_alien(error: BaseException) -> bool:
    """Tell whether no operation raised it, but a signal handler of the program.

    Such an error is of the main thread, whoever's operation it has hit there.
    """
    if not isinstance(error, Exception):
        return True
    ours = (OmniQError, sqlite3.Error, UnicodeDecodeError, MemoryError)
    in_main = threading.get_ident() == threading.main_thread().ident
    return in_main and not isinstance(error, ours)


def _raise_alarm(error: Exception) -> None:
    """Raise an error that only looks like the system's, which always has a number.

    As a `TimeoutError` by the program's handler of SIGALRM.
    """
    if isinstance(error, OmniQError):
        return
    if isinstance(error, OSError) and error.errno is None:
        raise error


def _is_undecodable(error: BaseException) -> bool:
    """Tell whether a text in the file is not UTF-8: SQLite lets anybody store such."""
    return isinstance(error, UnicodeDecodeError) or "decode to UTF-8" in str(error)


def _is_busy(error: BaseException) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


@dataclass(frozen=True, slots=True)
class _Options:
    """What all classes of one object share; see the constructor of a queue."""

    path: str
    synchronous: str = "FULL"
    busy_timeout: float = DEFAULT_BUSY_TIMEOUT
    allow_network_fs: bool = False
    clock: Callable[[], float] = time.time
    readers: int = DEFAULT_READERS

    def __post_init__(self) -> None:
        _check_fields(self)


def _absolute(path: str | os.PathLike[str]) -> str:
    """Return the path by which a file stays the same wherever the process goes."""
    text = os.fspath(path)
    _check(
        isinstance(text, str) and text != "" and "\0" not in text,
        "path",
        "a str or os.PathLike of str, not empty, without NUL",
        path,
    )
    _check("://" not in text, "path", "no URL (that is for from_url())", path)
    return text if text == ":memory:" else os.path.abspath(text)


class _Operation(Generic[T]):
    """A write on its way, who waits for it, and what became of it.

    `run` is called inside a transaction, perhaps again after a rollback. `wake` is
    called when it is this operation's turn to have a group committed, and without
    a `future` also when it is done.
    """

    wake: Callable[[], None]
    future: asyncio.Future[None] | None = None  # of a loop that waits
    awaited = True  # whether its caller is still there
    undo: Callable[[T], None] | None = None  # takes a result whose caller has gone
    looked = True  # the transaction will tell whether there is something to write
    taken = False  # off the list, into a transaction
    alone = False  # its group was lost: runs in a transaction of its own
    done = False
    unflushed = False  # committed, but perhaps not for ever: `error` says so
    result: Any = None
    error: BaseException | None = None

    def __init__(
        self,
        run: Callable[[sqlite3.Connection], T],
        *,
        flush: bool = True,
        savepoint: bool = True,
    ) -> None:
        self.run = run
        self.flush = flush  # whether it must outlive a power cut once acknowledged
        # Whether it may fail with an error of ours after it has changed something.
        # An operation whose first statement decides does without (a quarter less).
        self.savepoint = savepoint
        self.since = time.monotonic()

    def look(self, connection: sqlite3.Connection) -> T | None:
        """Read before the transaction; return the result if nothing is to write.

        Called where `looked` is false at first.
        """
        raise NotImplementedError

    def must_flush(self) -> bool:
        """Tell whether the outcome must outlive a power cut; a broken file's not."""
        return self.flush and not isinstance(self.error, _FileError)

    @property
    def succeeded(self) -> bool:
        return self.taken and self.done and (self.error is None or self.unflushed)

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        result: T = self.result
        return result

    def is_gone(self) -> bool:
        """Tell whether nobody waits, as after a cancellation."""
        return not self.awaited or (self.future is not None and self.future.done())

    def arrive(self) -> None:
        """Answer the caller, in its loop."""
        if self.future is None or self.is_gone():
            self.drop()
        else:
            self.future.set_result(None)

    def drop(self) -> None:
        """Undo what nobody waits for any more, and log what nobody ever did."""
        if self.undo is not None and self.succeeded:
            self.undo(self.result)
        elif self.future is None and self.error is not None:
            logger.warning("a write that nobody waits for failed: %s", self.error)


class _Latch:
    """Lets a thread wait until another one calls it; half the price of an event."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        try:  # noqa: SIM105 -- `suppress` costs as much as the rest
            self._lock.release()
        except RuntimeError:
            pass  # called before, and not yet noticed

    def wait(self, timeout: float = math.inf) -> bool:
        return self._lock.acquire(timeout=-1 if timeout == math.inf else timeout)


class _Pool:
    """Up to `size` connections, each used by one thread at a time, opened lazily.

    `with pool as connection` is the only way to a connection. A fork waits until
    none is in use, closes them all, and they open again.
    """

    def __init__(self, database: _Database, size: int, *, writable: bool) -> None:
        self.database = database
        self.size = size
        self.writable = writable
        self.idle: list[sqlite3.Connection] = []
        self.used: dict[int, sqlite3.Connection | None] = {}  # by thread
        self.turn: threading.Condition  # of one that waits
        self.waiting = 0

    def __enter__(self) -> sqlite3.Connection:
        database, ident = self.database, threading.get_ident()
        try:
            with database.gate:
                if ident in self.used:
                    self.__exit__()  # an exception of a signal had hit this
                if len(self.used) >= self.size or self.waiting or database.resting:
                    self._wait_for_turn(ident)
                if database.ended:
                    database.check_open()
                self.used[ident] = self.idle.pop() if self.idle else None
            connection = self.used[ident]
            if connection not in database.connections:  # none, or closed for a fork
                connection = database.connect(writable=self.writable)
                self.used[ident] = connection
            return connection
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        database = self.database
        with database.gate:
            connection = self.used.pop(threading.get_ident(), None)
            if connection is not None:
                self.idle.append(connection)
            if database.ended:
                self.close()
            self.turn.notify(self.waiting if database.resting else 1)
            database.freed.notify_all()

    def _wait_for_turn(self, ident: int) -> None:
        """Wait for a connection, behind those who wait already.

        Else who gives one back takes it again: of 16 threads that read without a
        pause, one made a single call in 4 s, and another 29,000.
        """
        pools, first = self.database.pools, True
        nested = any(ident in pool.used for pool in pools)  # others may wait for it
        while len(self.used) >= self.size or (
            not nested
            and (self.database.resting or (first and self.waiting and self.used))
        ):
            first = False
            self.waiting += 1
            try:
                self.turn.wait()
            finally:
                self.waiting -= 1
        if self.waiting and len(self.used) + 1 < self.size:  # there is one more
            self.turn.notify()

    def discard(self) -> None:
        """Close the connection that this thread uses; the next one is new."""
        ident = threading.get_ident()
        connection = self.used.get(ident)
        if connection is not None:
            self.used[ident] = None
            self.database.disconnect(connection)

    def close(self) -> None:
        """Close what nobody uses."""
        while self.idle:
            self.database.disconnect(self.idle.pop())

    def reset(self) -> None:
        """In a forked child: forget what other threads used, they are not here."""
        ident = threading.get_ident()
        mine = self.used.get(ident)
        self.used = {}
        self.turn, self.waiting = threading.Condition(self.database.gate), 0
        if mine is not None and self.database.memory:
            self.used[ident] = mine  # a copy of the parent's
        elif mine is not None:
            self.database.leave_alone(mine)


class _Descriptor:
    """A file descriptor of ours, closed at the latest when it is forgotten."""

    _fd = -1

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # first: an exception must not close it twice
        if fd >= 0:
            os.close(fd)

    __del__ = close


class _UnflushedError(DatabaseAccessError):
    """A flush has failed before: behind that hole nothing durable can be written."""


class _Wal(_Descriptor):
    """The WAL of a connection, to flush it. Nobody locks it: it can be closed."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self.connection = connection
        self._fd = os.open(path, os.O_RDWR)

    def flush(self) -> None:
        if sys.platform == "darwin":  # there fsync alone does not reach the disk
            import fcntl

            fcntl.fcntl(self._fd, fcntl.F_FULLFSYNC)
        elif sys.platform == "win32":
            os.fsync(self._fd)
        else:
            os.fdatasync(self._fd)


class _WalWatch(_Descriptor):
    """Tells when any process writes to a WAL, which only Linux can.

    Raises: `OSError` where the user has used up the instances that one may have.
    """

    def __init__(self, path: str) -> None:
        import ctypes  # costs import time

        libc = ctypes.CDLL(None)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        in_modify = 2
        if libc.inotify_add_watch(self._fd, os.fsencode(path), in_modify) < 0:
            raise OSError(f"inotify cannot watch {path!r}")

    def wait(self, timeout: float) -> bool:
        """Return when it was written to since the last call, or at the latest then."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        written = bool(poll.poll(math.ceil(timeout * 1e3)))
        if written and self._fd >= 0:  # else it was closed in a child
            os.read(self._fd, 65_536)
        return written


class _Bell:
    """Wakes waiters on commits: at once on this object's, by looking on others'."""

    def __init__(self, database: _Database) -> None:
        self.database = database
        self.pool = _Pool(database, 1, writable=False)
        self.wal: _WalWatch | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all waiters; in a forked child they are threads of the parent."""
        self.lock = threading.RLock()  # the collector may close a waiter in here
        # What wakes each waiter, and the time on the clock when that is due.
        self.waiters: dict[Callable[[], object], float | None] = {}
        self.generation = 0
        self.version: tuple[sqlite3.Connection | None, int] = (None, 0)
        self.polled = False  # whether somebody polls
        self.distance = _FIRST_LOOK  # seconds to the next look if nobody writes
        self.look_at = -math.inf  # of the last look that a write has brought
        if self.wal is not None:
            self.wal.close()  # the stack of a lost thread may refer to it for ever
            self.wal = None

    def register(
        self, wake: Callable[[], object], due: float | None, seen: int
    ) -> bool:
        """Add a waiter unless something happened since `seen`."""
        with self.lock:
            if self.generation != seen:
                return False
            self.waiters[wake] = due
            return True

    def unregister(self, wake: Callable[[], object]) -> None:
        with self.lock:
            self.waiters.pop(wake, None)

    def take_over(self) -> bool:
        """Become the one that polls; `False` if somebody does."""
        with self.lock:
            mine = not self.polled
            self.polled = True
            return mine

    def hand_over(self) -> None:
        """Stop polling; the others look again, and one of them takes over.

        Waking one would not do: it may be about to leave as well.
        """
        with self.lock:
            self.polled = False
        self.ring()

    def ring(self) -> None:
        """Wake everybody: something was committed."""
        with self.lock:
            self.generation += 1
            woken, self.waiters = self.waiters, {}
        for wake in woken:
            wake()

    def poll(self) -> None:
        """Look once for a commit of another connection and for due waiters."""
        try:
            changed = not self.database.memory and self._version_moved()
            now = self.database.options.clock()
        except Exception as error:
            if _is_alien(error):
                raise
            changed, now = True, 0.0  # whoever looks gets the error
        if changed:
            self.distance = _FIRST_LOOK
            self.ring()
            return
        with self.lock:
            waiters = self.waiters.items()
            woken = [wake for wake, due in waiters if due is not None and due <= now]
            for wake in woken:
                del self.waiters[wake]
        for wake in woken:
            wake()

    def _version_moved(self) -> bool:
        # The first look at a connection has nothing to compare with, so it counts
        # as a change: what was committed just before must not be missed.
        with self.pool as connection:
            if connection is not self.version[0]:
                self._watch_wal()
            [(number,)] = connection.execute("PRAGMA data_version").fetchall()
        self.database.check_identity()
        before, self.version = self.version, (connection, number)
        return before != self.version

    def _watch_wal(self) -> None:
        """Watch the WAL of a connection that has just been opened, where possible."""
        self.wal = None
        if sys.platform == "linux":
            try:
                self.wal = _WalWatch(self.database.wal_path)
            except (ImportError, OSError) as error:
                logger.debug("%r is polled: %s", self.database.path, error)

    def pause(self, sleep: Callable[[float], T], timeout: float) -> T:
        """Wait until it is worth looking again; return what `sleep` does at the end.

        A write to the WAL shows before the commit does, so there are several looks
        after one. Writers that never rest do not keep the one that looks busy.
        """
        wal = self.wal  # a close takes it away
        if wal is None:
            return sleep(min(timeout, POLL_INTERVAL))
        if not wal.wait(min(timeout, self.distance)):
            self.distance = min(2 * self.distance, _LAST_LOOK)
            return sleep(0.0)
        self.distance = _FIRST_LOOK
        now = time.monotonic()
        # Some may come at once: a claim and its outcome are two commits.
        self.look_at = max(self.look_at, now - _LOOKS_AT_ONCE * _LOOKS_APART)
        self.look_at += _LOOKS_APART
        return sleep(max(_FIRST_LOOK, self.look_at - now))


class _Standstill:
    """Notices that this process stood still: a laptop that slept, a Ctrl-Z.

    Then leases look over whose holders stood still as well. So for a moment no lease
    is ended by its time, and they extend them; else their tasks would run twice.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all; in a forked child nobody calls `expect` yet."""
        self._asleep = time.time() - time.monotonic()
        self._expected_at = math.inf
        self._worked = 0.0  # seconds on a processor
        self.ended_at = -math.inf  # monotonic

    def expect(self, at: float) -> None:
        """Say when this is called again at the latest, unless the process stops."""
        self._worked = time.process_time()
        self._expected_at = at

    def left(self) -> float:
        """Return the seconds for which leases are spared; mostly 0."""
        now = time.monotonic()
        # On Linux and macOS the monotonic time does not go on while a machine sleeps.
        asleep = time.time() - now
        if asleep > self._asleep + _CLOCK_SET:  # or another thread ran between the two
            asleep = time.time() - time.monotonic()
        if asleep > self._asleep + _CLOCK_SET or self._was_stopped(now):
            self.ended_at = now  # first: other threads come here, too
        self._asleep = asleep
        return max(0.0, self.ended_at + _TIME_TO_EXTEND - now)

    def _was_stopped(self, now: float) -> bool:
        # Functions in C may keep the interpreter for themselves, one after the other:
        # those that compute are no stop, and those that wait are one, now and then.
        late = now - self._expected_at
        return (
            late > 0
            and now > self.ended_at + _STOPS_APART
            and time.process_time() - self._worked < late / 2
        )


_standstill = _Standstill()


_FORKED = "the process was forked inside an operation"

_connection_factory: Callable[..., sqlite3.Connection] = sqlite3.connect
"""What opens a connection; replaced by tests that inject faults."""


class _Database:
    """One file for one object: its connections, its schema and its commits.

    Used from any thread. At most one thread at a time, the leader, calls
    `serve()`; the gateways below see to that.
    """

    def __init__(self, options: _Options, components: Sequence[str]) -> None:
        self.options = options
        self.path = options.path
        self.memory = options.path == ":memory:"
        self.components = tuple(components)
        self.connections: set[sqlite3.Connection] = set()
        self.threads: list[_ConnectionThread] = []
        self.identity: tuple[int, int] | None = None
        self.wal_path = _wal_of(self.path)  # once more when the file is open
        self.closed_reason: str | None = None
        self.ended = False  # closed, and what was begun before has ended, too
        self.generation = 0  # of processes: a forked child is the next one
        self.commits_since_checkpoint = 0
        self.wal_size = 0  # after the last checkpoint
        self.wal_seen = 0  # its size when last looked at
        self.slowed = False  # whether a reader holds it, as far as is known
        self.paces: weakref.WeakSet[_Pace] = weakref.WeakSet()  # of waiters
        bug = _has_wal_reset_bug(sqlite3.sqlite_version_info)
        self.guarded = bug and not self.memory  # whether checkpoints must be
        self.flushes = options.synchronous in ("FULL", "EXTRA") and not self.memory
        self.wal: _Wal | None = None
        self.flush_failed = False
        self.writer = _Pool(self, 1, writable=True)
        self.checkpointer = _Pool(self, 1, writable=True)
        self.readers = _Pool(self, options.readers, writable=False)
        self.bell = _Bell(self)
        self.pools = (self.writer, self.checkpointer, self.readers, self.bell.pool)
        self.reset()
        weakref.finalize(self, _dispose, self.connections, self.threads).atexit = False
        with _databases_lock:
            _databases.add(self)

    def reset(self) -> None:
        """Begin with new locks and nothing under way: at first, and in a child."""
        self.generation += 1
        self.gate = threading.RLock()
        self.freed = threading.Condition(self.gate)  # a connection is
        self.resting = False
        self.queue_lock = threading.Lock()
        self.pending: collections.deque[_Operation[Any]] = collections.deque()
        self.leader: _Operation[Any] | None = None
        self.committing = False
        self.reads = 0  # that were asked for, and have not ended
        self.threads.clear()
        self.bell.reset()
        for pool in self.pools:
            pool.reset()

    # -- Opening --

    def check_open(self) -> None:
        """Refuse what is begun after `close()`."""
        if self.closed_reason is not None:
            if _exiting and threading.current_thread().daemon:
                raise SystemExit  # a forgotten thread ends without a traceback
            raise StorageClosedError(self.path, self.closed_reason)

    def connect(self, *, writable: bool) -> sqlite3.Connection:
        """Open, set up and check one connection, waiting for others as long as asked.

        With a busy timeout of 0 most simultaneous first opens fail, so all of it
        goes through the same retry as a write.
        """
        connection = self.retry(partial(self._try_connect, writable))
        self.connections.add(connection)
        return connection

    def close_unused(self) -> None:
        """Close what nobody uses, also what an exception has kept from its pool."""
        for pool in self.pools:
            pool.close()
        used = {id(c) for pool in self.pools for c in pool.used.values()}
        for connection in list(self.connections):
            if id(connection) not in used:
                self.disconnect(connection)

    def disconnect(self, connection: sqlite3.Connection) -> None:
        self.connections.discard(connection)
        if self.wal is not None and self.wal.connection is connection:
            self.wal.close()  # first: Windows does not delete what is open
            self.wal = None
        try:
            connection.close()
        except sqlite3.Error as error:
            logger.warning("closing %r: %s", self.path, error)

    def retry(self, attempt: Callable[[], T], patience: float | None = None) -> T:
        """Call `attempt` until it is not busy; translate what else it raises."""
        limit = self.options.busy_timeout if patience is None else patience
        since = time.monotonic()
        while True:
            try:
                return attempt()
            except OmniQError:
                raise
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                _raise_alarm(error)
                waited = time.monotonic() - since
                if not _is_busy(error) or waited >= limit:
                    raise self.translate(error, waited) from error
            self.pause(waited)

    def patience(self, timeout: float | None, due: float | None) -> float:
        """Return the seconds to wait for until a timeout or a time on the clock."""
        if due is None:
            return math.inf if timeout is None else timeout
        left = max(_FIRST_LOOK, due - self.options.clock())
        return left if timeout is None else min(timeout, left)

    @staticmethod
    def pause(waited: float) -> None:
        """Sleep between two attempts: at random, less after a long wait.

        Bounded, or a crowd behind a holder that is slow would take its processor.
        """
        _check_interrupts()
        time.sleep(random.uniform(0.0005, 0.002) / (1.0 + 10.0 * min(waited, 0.5)))

    def _try_connect(self, writable: bool) -> sqlite3.Connection:
        connection = self._open_file()
        try:
            self._configure(connection)
            self._ensure_schema(connection)
            if self.identity is None and not self.memory:
                self.identity = self._stat()
                self.wal_path = _wal_of(self.path)
                self.wal_seen = self.wal_bytes()
            self.check_identity()
            if not writable:
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_file(self) -> sqlite3.Connection:
        if self.memory:
            return self._sqlite_connect(":memory:")
        if self.identity is None:
            if sqlite3.sqlite_version_info < (3, 37):
                raise UnsupportedSQLiteError(sqlite3.sqlite_version, "3.37")
            if not self.options.allow_network_fs:
                name = _network_filesystem(os.path.dirname(self.path))
                if name is not None:
                    raise NetworkFilesystemError(self.path, name)
            if os.path.isdir(self.path):
                raise DatabaseAccessError(self.path, "it is a directory")
            if not os.path.exists(self.path):
                _create_file(self.path)
        self.check_identity()
        # mode=rw: SQLite never creates the file, so a deleted one is noticed.
        location = Path(self.path).as_uri() + "?mode=rw"
        return self._sqlite_connect(location)

    def _sqlite_connect(self, location: str) -> sqlite3.Connection:
        return _connection_factory(
            location,
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )

    def _configure(self, connection: sqlite3.Connection) -> None:
        """Set what holds for every connection, each with its reason."""
        for pragma in (
            "PRAGMA trusted_schema = OFF",  # a hostile file's views run no functions
            "PRAGMA foreign_keys = ON",  # an application's tables may refer to ours
            f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}",
        ):
            connection.execute(pragma)
        if sys.version_info >= (3, 12):
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        if self.memory:
            return
        [(mode,)] = connection.execute("PRAGMA journal_mode").fetchall()
        if mode != "wal":
            self._make_wal(connection)
        off = self.options.synchronous == "OFF"
        connection.execute(f"PRAGMA synchronous = {'OFF' if off else 'NORMAL'}")
        if self.guarded:
            connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        if sys.platform == "darwin":  # there fsync alone does not reach the disk
            connection.execute("PRAGMA fullfsync = ON")
            connection.execute("PRAGMA checkpoint_fullfsync = ON")

    def _make_wal(self, connection: sqlite3.Connection) -> None:
        [(pages,)] = connection.execute("PRAGMA page_count").fetchall()
        if pages == 0:  # a new file is ours: give free pages back bit by bit
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        [(mode,)] = connection.execute("PRAGMA journal_mode = WAL").fetchall()
        if mode != "wal":
            raise DatabaseAccessError(self.path, f"WAL mode is refused (got {mode!r})")

    def _stat(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError as error:
            _raise_alarm(error)
            return None
        return status.st_dev, status.st_ino

    def check_identity(self) -> None:
        """Refuse to go on with a file that is no longer the one at its path."""
        if self.identity is not None and self._stat() != self.identity:
            raise DatabaseReplacedError(self.path)

    # -- Schema --

    def _ensure_schema(self, connection: sqlite3.Connection) -> None:
        """Create or migrate the tables of the components that this object uses.

        Reads first, so that opening a file that is up to date writes nothing.
        Any number of processes may do this at once: whoever gets the write lock
        looks again and does what is left. After a failure the connection is closed,
        which rolls back.
        """
        if missing_migrations(connection, self.components, self.path):
            connection.execute("BEGIN IMMEDIATE")
            migrate(connection, self.components, self.path)
            connection.execute("COMMIT")

    # -- Errors --

    def translate(self, error: BaseException, waited: float = 0.0) -> BaseException:
        """Return the error of ours that says what to do about one of SQLite's."""
        if isinstance(error, OmniQError):
            return error
        if isinstance(error, PermissionError):
            return ReadOnlyDatabaseError(self.path)
        if isinstance(error, OSError):
            return DatabaseAccessError(self.path, _reason_of(error))
        if _is_undecodable(error):
            # The message may have the text, which may be an argument.
            return CorruptDatabaseError(self.path, "a text in it is not UTF-8")
        if not isinstance(error, sqlite3.Error):
            return error
        if _is_busy(error):
            return DatabaseBusyError(self.path, waited)
        try:
            self.check_identity()
        except DatabaseReplacedError as replaced:
            return replaced
        return self._translate_code(error)

    def _translate_code(self, error: sqlite3.Error) -> BaseException:
        code, text = getattr(error, "sqlite_errorcode", None) or 0, str(error)
        match code & 0xFF:
            case sqlite3.SQLITE_FULL:
                return DatabaseFullError(self.path)
            case sqlite3.SQLITE_READONLY:
                return ReadOnlyDatabaseError(self.path)
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return CorruptDatabaseError(self.path, text)
            case sqlite3.SQLITE_IOERR if self._is_out_of_space():
                return DatabaseFullError(self.path)
            case sqlite3.SQLITE_CANTOPEN if not os.access(self.path, os.R_OK):
                return DatabaseAccessError(self.path, "it may not be read")
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR:
                return DatabaseAccessError(self.path, text)
            case sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
                return DatabaseAccessError(self.path, text)
            case sqlite3.SQLITE_TOOBIG:
                return SerializationError("value", "it is larger than SQLite can store")
            case sqlite3.SQLITE_ERROR if "no such" in text or "already" in text:
                return SchemaVersionError(self.path, "OmniQ", text)
        return OmniQError(f"database {self.path!r}: {text}")

    def _is_out_of_space(self) -> bool:
        """Tell whether a quota or a limit is why a file cannot grow.

        SQLite calls that a failed write, as it calls a broken disk; so a file that
        has no name is written at the place where the larger of ours ends.
        """
        import tempfile  # rare; costs import time

        try:
            size = max(map(os.path.getsize, (self.path, self.wal_path)))
            folder = os.path.dirname(self.path)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                file.seek(size)
                file.write(bytes(65_536))
                file.write(bytes(1))  # the first one may have been cut short
        except OSError as error:
            return error.errno in (errno.EFBIG, errno.EDQUOT, errno.ENOSPC)
        return False

    # -- Reading --

    def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a read on a connection of the pool; it waits for no writer.

        SQLITE_BUSY can still come from another process's recovery or last close.
        """
        self.check_open()
        return self._read(function)

    def accept(self, function: Callable[[sqlite3.Connection], T]) -> Callable[[], T]:
        """Return a call that reads, for which a `shut()` waits; the gate is held."""
        self.reads += 1

        def call() -> T:
            try:
                return self._read(function)
            finally:
                with self.gate:
                    self.reads -= 1

        return call

    def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        pool = self.writer if self.memory else self.readers

        def attempt() -> T:
            with pool as connection:
                result = function(connection)
                self.check_identity()
                return result

        return self.retry(attempt)

    # -- Writing --

    def enlist(self, operation: _Operation[Any]) -> bool:
        """Queue an operation; `True` if there is no leader and it is the leader now."""
        with self.queue_lock:
            operation.done = self.ended  # refused; false again if it was withdrawn
            if self.ended:
                self.check_open()
            self.pending.append(operation)
            leads = self.leader is None
            if leads:
                self.leader = operation
            return leads

    def withdraw(self, operation: _Operation[Any]) -> bool:
        """Take back an operation that is in no transaction yet; tell whether it was."""
        with self.queue_lock:
            withdrawn = not operation.taken
            if withdrawn:
                if operation in self.pending:  # else an exception hit `enlist`
                    self.pending.remove(operation)
                operation.done = True  # last: it is what ends further attempts
            return withdrawn

    def hand_over(self) -> None:
        """Make who waits longest the leader, once the leader has led enough."""
        with self.queue_lock:
            while self.pending and self.pending[0].done:  # an exception left it there
                self.pending.popleft()
            heir = self.leader = self.pending[0] if self.pending else None
        if heir is not None:
            heir.wake()

    def serve(self) -> None:
        """Commit one group of the operations that wait, if any does."""
        began, commits = time.monotonic(), self.commits_since_checkpoint
        while self.pending:
            group: list[_Operation[Any]] = []
            try:
                with self.writer as connection:
                    group = self._look(connection)
                    if not group or self._commit(connection, group):
                        break
            except Exception as error:
                if _is_alien(error):
                    raise
                self._refuse(group or list(self.pending), error)
                break
            since = group[0].since
            self._refuse_late(group)
            self.pause(time.monotonic() - since)
        if self.commits_since_checkpoint != commits and not self.memory:
            self._tend_wal(time.monotonic() - began)

    def _look(self, connection: sqlite3.Connection) -> list[_Operation[Any]]:
        """Let the operations look that have to; return those that will write.

        Those that find nothing to do are answered without a transaction. Looking
        first keeps idle waiters from taking the write lock from producers.
        """
        self.check_identity()
        with self.queue_lock:
            waiting = list(itertools.islice(self.pending, _MAX_GROUP))
        if waiting and waiting[0].alone:
            del waiting[1:]
        answered = [
            o for o in waiting if not o.looked and not self._look_one(connection, o)
        ]
        if answered:
            self._end(answered)
        return [o for o in waiting if not o.done]

    def _look_one(
        self, connection: sqlite3.Connection, operation: _Operation[Any]
    ) -> bool:
        """Tell whether there is something to write; else set the outcome."""
        try:
            operation.result = operation.look(connection)
        except Exception as error:
            if _is_alien(error):
                raise
            if _is_busy(error):
                return True  # the transaction will tell
            self._set_error(operation, error)
            return False
        return operation.result is None

    def _take(self, group: list[_Operation[Any]]) -> None:
        """Take operations off the list; those that were withdrawn leave the group."""
        with self.queue_lock:
            group[:] = [o for o in group if not o.taken and not o.done]
            for operation in group:
                operation.taken = True
            if len(group) == len(self.pending):
                self.pending.clear()
            else:
                self.pending = collections.deque(o for o in self.pending if not o.taken)

    def _put_back(self, group: Iterable[_Operation[Any]]) -> None:
        """Let them wait for the next transaction; what they saw still counts.

        Otherwise 1,000 claims at once made 6,486 looks.
        """
        with self.queue_lock:
            waiting = [o for o in group if o.taken and not o.done]
            for operation in waiting:
                operation.taken, operation.looked = False, True
                operation.result = operation.error = None
            # One whose taking an exception has hit is still there.
            here = set(map(id, self.pending))
            self.pending.extendleft(o for o in reversed(waiting) if id(o) not in here)

    def _commit(
        self, connection: sqlite3.Connection, group: list[_Operation[Any]]
    ) -> bool:
        """Run a group in one transaction; `False` if another writer has the lock."""
        try:
            if not self._begin(connection):
                return False
            self._take(group)
            self._run_group(connection, group)
            self._finish(connection, group)
        except BaseException as error:
            # One that is not SQLite's was raised by a signal handler or a mistake of
            # an operation, and may come at any place, also after the commit.
            sqlites = isinstance(error, sqlite3.Error)
            if self.committing and not connection.in_transaction and not sqlites:
                self._finish(connection, group)
            else:
                self._roll_back(connection)
                self._break_up(group, error)
            if _is_alien(error):
                raise
        finally:
            self.committing = False
        return True

    def _begin(self, connection: sqlite3.Connection) -> bool:
        try:
            if connection.in_transaction:  # a second exception hit a clean-up
                self._roll_back(connection)
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if _is_busy(error):
                return False
            raise
        return True

    def _run_group(
        self, connection: sqlite3.Connection, group: list[_Operation[Any]]
    ) -> None:
        limit = time.monotonic() + _MAX_GROUP_SECONDS
        alone = len(group) == 1
        for ran, operation in enumerate(group, 1):
            self._run_one(connection, operation, alone=alone)
            if ran < len(group) and time.monotonic() > limit:
                self._put_back(group[ran:])  # they wait for the next transaction
                del group[ran:]
                break
        if None in [operation.error for operation in group]:
            if self.flushes and any(o.must_flush() for o in group):
                self._open_wal(connection)  # while nothing is lost if that fails
            self.committing = True
            try:
                connection.execute("COMMIT")
            except MemoryError as error:  # SQLite had none, and has rolled back
                raise sqlite3.OperationalError("out of memory") from error
        else:
            self._roll_back(connection)

    def _run_one(
        self, connection: sqlite3.Connection, operation: _Operation[Any], *, alone: bool
    ) -> None:
        savepoint = operation.savepoint and not alone
        try:
            if savepoint:
                connection.execute("SAVEPOINT omniq")
            operation.result = operation.run(connection)
        except Exception as error:
            if _is_alien(error):
                raise
            # SQLite may have ended the whole transaction (a full disk does that).
            clean = savepoint or alone or isinstance(error, OmniQError)
            if not clean or not connection.in_transaction:
                raise
            self._set_error(operation, error)
            if savepoint:
                connection.execute("ROLLBACK TO omniq")
        if savepoint:
            connection.execute("RELEASE omniq")

    def _set_error(self, operation: _Operation[Any], error: BaseException) -> None:
        operation.error = self.translate(error)
        if operation.error is not error:
            operation.error.__cause__ = error

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """Undo what is open; a connection that cannot even do that is closed."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.writer.discard()

    def _break_up(self, group: list[_Operation[Any]], error: BaseException) -> None:
        """Run each alone after a failed transaction: each gets its own error."""
        alien = _is_alien(error)
        if not alien and not any(o.taken for o in group):
            self._refuse(group, error)  # it did not even begin
        elif not alien and len(group) == 1:
            self._set_error(group[0], error)
            self._deliver(group)
        else:
            for operation in group:
                operation.alone = True
            self._put_back(group)

    def _finish(
        self, connection: sqlite3.Connection, group: list[_Operation[Any]]
    ) -> None:
        """Tell everybody what was done: at once, or when the disk has it.

        A worker that gets its claims before the flush starts them meanwhile, and
        does a fifth more.
        """
        if self.committing:
            self.commits_since_checkpoint += 1
            self.bell.ring()
        at_once: list[_Operation[Any]] = []
        durable: list[_Operation[Any]] = []
        for operation in group:
            if not operation.done:  # else told before an exception came
                waits = self.flushes and operation.must_flush()
                (durable if waits else at_once).append(operation)
        if at_once:
            self._answer(at_once)
        if durable:
            self._answer(durable, flush=connection)

    def _answer(
        self,
        group: list[_Operation[Any]],
        flush: sqlite3.Connection | None = None,
    ) -> None:
        """Hand out outcomes, unless the file was replaced or cannot be flushed."""
        try:
            if flush is not None:
                self._flush(flush)
            self.check_identity()
        except OmniQError as error:
            for operation in group:
                operation.unflushed |= operation.error is None
                operation.error = copy.copy(error)
                operation.error.__cause__ = error.__cause__
        self._deliver(group)

    def _open_wal(self, connection: sqlite3.Connection) -> _Wal:
        """Return what flushes the WAL of a connection, unless that failed before.

        The system tells of such a failure once, and may take what it could not
        write for written. What comes behind such a hole would be lost with it.
        """
        if self.wal is None or self.wal.connection is not connection:
            try:
                self.wal = _Wal(connection, self.wal_path)
            except OSError as error:
                _raise_alarm(error)
                raise self.translate(error) from error
        if self.flush_failed:
            reason = "its WAL could not be flushed; when the disk is well again, close"
            raise _UnflushedError(self.path, f"{reason} this object and open a new one")
        return self.wal

    def _flush(self, connection: sqlite3.Connection) -> None:
        """Wait until the disk has the WAL with all that was committed."""
        wal = self._open_wal(connection)
        try:
            wal.flush()
        except OSError as error:
            _raise_alarm(error)
            self.flush_failed = True
            reason = "what was just written may not outlive a power cut, as its WAL"
            reason += f" cannot be flushed: {error.strerror}"
            raise DatabaseAccessError(self.path, reason) from error

    def _refuse(self, group: list[_Operation[Any]], error: BaseException) -> None:
        """Tell everybody that the database cannot be used."""
        translated = self.translate(error)
        cause = error.__cause__ if translated is error else error

        def refuse(_operation: _Operation[Any]) -> BaseException:
            own = copy.copy(translated)  # raising one changes its traceback
            own.__cause__ = cause
            return own

        self._end(group, refuse)

    def _refuse_late(self, group: list[_Operation[Any]]) -> None:
        """Nothing was changed for those that have waited long enough."""
        now = time.monotonic()
        late = [o for o in group if now - o.since >= self.options.busy_timeout]
        self._end(late, lambda o: DatabaseBusyError(self.path, now - o.since))

    def _end(
        self,
        group: list[_Operation[Any]],
        error_of: Callable[[_Operation[Any]], BaseException] | None = None,
    ) -> None:
        """Take operations that are in no transaction off the list, and answer them."""
        try:
            self._take(group)
            for operation in group:
                if error_of is not None:
                    operation.error = error_of(operation)
            self._deliver(group)
        except BaseException:  # of a signal handler of the program
            self._put_back(group)
            raise

    @staticmethod
    def _deliver(group: list[_Operation[Any]]) -> None:
        """Hand out outcomes: by its latch to a thread, in one call to each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Operation[Any]]] = {}
        for operation in group:
            operation.done = True
            if operation.is_gone():
                operation.drop()
            elif operation.future is None:
                operation.wake()
            else:
                by_loop.setdefault(operation.future.get_loop(), []).append(operation)
        for loop, operations in by_loop.items():
            if loop.is_closed():
                for operation in operations:
                    operation.drop()
            else:
                _call_soon(loop, _Arrival(operations))

    # -- The WAL --

    def _tend_wal(self, took: float) -> None:
        """Look, now and then, at the size of the WAL; checkpoint, or slow down."""
        due = self.guarded and self.commits_since_checkpoint >= _CHECKPOINT_COMMITS
        often = due or self.wal_seen > _HELD_WAL_BYTES or took >= _QUICK
        if not often and self.commits_since_checkpoint % _QUICK_COMMITS:
            return
        size = self.wal_bytes()
        self.wal_size = min(self.wal_size, size)  # a reset may have cut it
        if self.guarded and (due or size - self.wal_size > _CHECKPOINT_BYTES):
            self._checkpoint()
        seen, self.wal_seen = self.wal_seen, size
        if seen > _HELD_WAL_BYTES:  # and is not only one transaction that is as large
            self._slow_down(size - seen)

    def _slow_down(self, grown: int) -> None:
        """Wait as long as the WAL should have taken to grow by so many bytes.

        Every process waits for the growth by all of them, so that is the pace of
        all together.
        """
        if grown <= 0:  # it was reset
            self.slowed = False
            return
        if not self.slowed:
            self.slowed = True
            text = (
                "the WAL of %r has %d MiB; while a reader holds it, writes are slowed"
            )
            logger.warning(text, self.path, self.wal_seen // 2**20)
        time.sleep(min(grown / _HELD_WAL_PACE, _HELD_WAL_PAUSE))

    def wal_bytes(self) -> int:
        """Return the size of the WAL; 0 if there is none."""
        try:
            return os.stat(self.wal_path).st_size
        except OSError as error:
            _raise_alarm(error)
            return 0

    def _checkpoint(self) -> None:
        """Copy the WAL into the file while nobody can commit (see the essay)."""
        self.commits_since_checkpoint = 0
        try:
            with self.writer as guard:
                try:
                    self.retry(lambda: guard.execute("BEGIN IMMEDIATE"), patience=1.0)
                    with self.checkpointer as connection:
                        [(_, frames, _)] = connection.execute(
                            "PRAGMA wal_checkpoint(PASSIVE)"
                        ).fetchall()
                finally:
                    self._roll_back(guard)
            self.wal_size = self.wal_bytes()
            if frames > _LONG_WAL_FRAMES:  # a reader may have kept it from a reset
                self.commits_since_checkpoint = _CHECKPOINT_COMMITS - _QUICK_COMMITS
        except (sqlite3.Error, OSError, OmniQError) as error:
            _raise_alarm(error)
            logger.debug("checkpoint of %r was put off: %s", self.path, error)

    # -- Rest, fork and close --

    def rest(self, patience: float = math.inf) -> bool:
        """Close all connections, with the gate held, once none is in use.

        Only the one of an operation of this very thread is left (it can only be
        a signal handler that forks). Tells whether they came to rest in time.
        """
        ident, limit = threading.get_ident(), time.monotonic() + patience
        self.resting = True
        try:
            while any(other != ident for pool in self.pools for other in pool.used):
                if time.monotonic() >= limit:
                    return False
                self.freed.wait(None if patience == math.inf else patience)
        finally:
            self.resting = False
            for pool in self.pools:
                pool.turn.notify_all()
        if self.memory:
            return True
        self.close_unused()
        for thread in [t for t in self.threads if t.outstanding == 0]:
            thread.stop()
            self.threads.remove(thread)
        return True

    def leave_alone(self, connection: sqlite3.Connection) -> None:
        """In a child that was forked inside an operation: never use it again.

        The connection believes that it holds locks, but they are the parent's:
        to go on with it, or to close it, would damage the file. So every further
        statement is refused, and it is kept for ever.
        """
        import ctypes  # rare; costs import time

        self.closed_reason = _FORKED
        self.ended = True
        self.connections.discard(connection)
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))

    def shut(self, timeout: float) -> None:
        """Refuse what comes, and close once what was begun has ended."""
        with self.gate:
            if self.ended:
                return
            self.closed_reason = "it was closed"
        self.bell.ring()
        limit = time.monotonic() + timeout
        with self.gate:
            while self._is_in_use() and time.monotonic() < limit:
                self.freed.wait(0.01)
            self.ended = True
            self.close_unused()
            self.bell.wal = None
        error = SystemExit() if _exiting else StorageClosedError(self.path)
        self._refuse(list(self.pending), error)
        for thread in list(self.threads):
            thread.stop()
        self.threads.clear()
        if not self.connections:  # else a fork must wait for what is still used
            with _databases_lock:
                _databases.discard(self)

    def _is_in_use(self) -> bool:
        used = any(pool.used or pool.waiting for pool in self.pools)
        return used or bool(self.pending or self.reads)


# -- Schema --


def _plain_cursor(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Return a cursor whose rows are tuples, whatever the connection's factory is.

    Neither factory is touched. The connection may be of a subclass.
    """
    cursor = sqlite3.Connection.cursor(connection)
    cursor.row_factory = None
    return cursor


def _ascii(name: object) -> str:
    """Return a name of ours that was read as a BLOB, also from a file in UTF-16."""
    return bytes(cast(bytes, name)).replace(b"\0", b"").decode()


def schema_versions(connection: sqlite3.Connection, path: str) -> dict[str, int]:
    """Return the versions of the components in a file, of which it has tables.

    Raises: `SchemaVersionError` where a table of our name is not ours.
    """
    cursor = _plain_cursor(connection)
    tables = cursor.execute(SELECT_TABLE_NAMES).fetchall()
    names = {_ascii(name): is_strict for name, is_strict in tables}
    for name, is_strict in names.items():
        if not is_strict:
            raise SchemaVersionError(path, name, f"its table {name} is not OmniQ's")
    versions: dict[str, int] = {}
    if "omniq_schema" in names:
        try:
            rows = cursor.execute(SELECT_SCHEMA).fetchall()
            versions = {_ascii(name): int(number) for name, number in rows}
        except (sqlite3.OperationalError, TypeError, ValueError) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if code & 0xFF != sqlite3.SQLITE_ERROR:  # busy, or a broken disk
                raise
            detail = "its table omniq_schema is not OmniQ's"
            raise SchemaVersionError(path, "omniq_schema", detail) from error
    for component, table in COMPONENT_TABLE.items():
        if table in names and component not in versions:
            detail = f"its table {table} is not OmniQ's"
            raise SchemaVersionError(path, component, detail)
    return versions


def missing_migrations(
    connection: sqlite3.Connection, components: Sequence[str], path: str
) -> list[tuple[str, int]]:
    """Return (component, version) of each step that the file still needs.

    Raises: `SchemaVersionError` for a file that a newer version wrote.
    """
    versions = schema_versions(connection, path)
    steps: list[tuple[str, int]] = []
    for component in components:
        found, newest = versions.get(component, 0), len(MIGRATIONS[component])
        if found > newest:
            detail = f"version {found} was written by a newer omniq_sqlite than this"
            detail += f" one ({__version__}), which knows up to {newest}; update it"
            raise SchemaVersionError(path, component, detail)
        steps += [(component, version) for version in range(found + 1, newest + 1)]
    return steps


def migrate(
    connection: sqlite3.Connection, components: Sequence[str], path: str
) -> None:
    """Bring the tables up to date, inside the transaction that is open."""
    steps = missing_migrations(connection, components, path)
    if not steps:
        return
    cursor = _plain_cursor(connection)
    cursor.execute(CREATE_SCHEMA_TABLE)
    for component, version in steps:
        for statement in MIGRATIONS[component][version - 1]:
            cursor.execute(statement)
        cursor.execute(UPSERT_SCHEMA, {"component": component, "version": version})


# -- Fork and exit --

_databases: weakref.WeakSet[_Database] = weakref.WeakSet()
_databases_lock = threading.RLock()
_disposing = threading.RLock()
"""Held while what was forgotten is closed: no fork may come between."""
_exiting = False
_shields: dict[int, _ForkShield] = {}  # by thread


class _ForkShield:
    """Keeps exceptions away from before a fork until after it, and holds the locks.

    An exception in a hook of a fork does not stop that, but is printed, and would
    leave locks behind. So what the program's signal handlers do is put off, and a
    task's timeout comes later.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.outer = _shields.get(self.thread)  # of a hook that forks itself
        self.inside = self.thread in _operating
        self.handlers: dict[int, Any] = {}
        self.came: list[int] = []
        self.held: list[threading.RLock] = []
        self.prepared = False  # an exception may be faster

    def begin(self) -> None:
        while self.thread == threading.main_thread().ident:
            try:
                self._record_all()
                break
            except ValueError:  # no thread of this interpreter may set handlers
                break
            except BaseException as error:  # noqa: BLE001 (of one not yet recorded)
                logger.warning("dropped, because a fork is under way: %r", error)
        with _operating_lock:
            _operating.add(self.thread)

    def hold(self, lock: threading.RLock, patience: float = math.inf) -> bool:
        held = lock.acquire(timeout=-1 if patience == math.inf else patience)
        if held:
            self.held.append(lock)
        return held

    def _record_all(self) -> None:
        for number in range(1, signal.NSIG):
            handler = _signal.getsignal(number)
            # An event loop's own does nothing: the loop has heard of the signal.
            loops = getattr(handler, "__name__", "") == "_sighandler_noop"
            if callable(handler) and not loops and handler != self._record:
                self.handlers[number] = handler
                _signal.signal(number, self._record)

    def _record(self, number: int, _frame: object) -> None:
        self.came.append(number)

    def end(self) -> None:
        if not self.inside:
            _operating.discard(self.thread)
        try:
            for number, handler in list(self.handlers.items()):
                if _signal.getsignal(number) == self._record:  # else set meanwhile
                    _signal.signal(number, handler)
                del self.handlers[number]
        except BaseException:  # of one that came just now
            self.end()
            raise

    def repeat(self) -> None:
        """Send again what came, once the hooks are over and can be interrupted."""
        over = threading.Lock()

        def send() -> None:
            with over:
                for number in self.came:
                    signal.pthread_kill(self.thread, number)

        if self.came:
            with over:
                threading.Thread(target=send, daemon=True).start()


def _before_fork() -> None:
    _shields[threading.get_ident()] = shield = _ForkShield()
    shield.begin()
    # A signal handler inside a blocking call may fork while that has what another
    # thread waits for, which has what is waited for here.
    patience = _FORK_PATIENCE if shield.inside else math.inf
    if not shield.hold(_databases_lock, patience):
        return
    for database in sorted(_databases, key=id):
        if not (shield.hold(database.gate, patience) and database.rest(patience)):
            return
    shield.hold(_disposing)
    shield.prepared = True


def _after_fork_in_parent() -> None:
    ident = threading.get_ident()
    shield = _shields.get(ident) or _ForkShield()
    while shield.held:
        shield.held.pop().release()
    try:
        shield.end()
    finally:
        if shield.outer is None:
            _shields.pop(ident, None)
        else:
            _shields[ident] = shield.outer
        shield.repeat()


def _after_fork_in_child() -> None:
    global _databases_lock, _disposing, _id_lock, _operating_lock  # noqa: PLW0603
    _databases_lock, _disposing = threading.RLock(), threading.RLock()
    _id_lock = threading.Lock()
    _operating_lock = threading.RLock()
    _standstill.reset()
    _operating.intersection_update({threading.get_ident()})
    for ident in set(_undo) - {threading.get_ident()}:
        del _undo[ident]  # a claim of the parent's
    own = _shields.get(threading.get_ident())
    for database in list(_databases):
        if own is None or not own.prepared:
            for connection in list(database.connections):
                database.leave_alone(connection)
        database.reset()
    for shield in list(_shields.values()):
        shield.end()  # what came was meant for the parent
    _shields.clear()
    current = _interrupts
    if current is not None and current.thread != threading.get_ident():
        # The call of a main thread that is not here; what came was meant for that.
        current.pending = False
        current.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def _dispose(
    connections: set[sqlite3.Connection], threads: list[_ConnectionThread]
) -> None:
    """Close what an object left open that nobody refers to any more."""
    # The collector may call this anywhere; a fork may hold locks that are needed there.
    locked = _disposing.acquire(timeout=1.0)
    try:
        for connection in list(connections):
            connection.close()
        for thread in list(threads):
            thread.stop()
    finally:
        if locked:
            _disposing.release()


@atexit.register
def _close_at_exit() -> None:
    """Close what was forgotten, so that the WAL is folded in; never wait long."""
    global _exiting  # noqa: PLW0603 -- the process exits once
    _exiting = True
    with _databases_lock:
        databases = list(_databases)
    for database in databases:
        database.shut(timeout=0.5)


# -- Blocking calls and Ctrl-C --

_operating: set[int] = set()
"""Threads inside a blocking call, where an exception would tear something apart."""

_operating_lock = threading.RLock()  # a signal handler may take it once more
"""Held while such a call begins, and by whoever throws an exception."""

_undo: dict[int, Callable[[], None]] = {}
"""By thread: how to give back what the call under way has claimed."""


try:  # without the enums of `signal`, which cost more than all else that is done here
    _signal: Any = importlib.import_module("_signal")
except ImportError:
    _signal = signal

_interrupts: _Interrupts | None = None
"""What records SIGINT now. As an attribute of the class it cost 4 µs: to set one
makes the interpreter forget what it has learned about the class."""


class _Interrupts:
    """Records SIGINT in the main thread, from construction to `restore()`.

    The handler of another signal may raise while this one's is changed.
    """

    def __init__(self) -> None:
        global _interrupts  # noqa: PLW0603 -- one main thread
        self.pending = False
        self.deaf = False
        self.thread = threading.get_ident()
        self.outer = _interrupts
        self.previous: Any = None
        if self.thread == threading.main_thread().ident:
            handler = _signal.getsignal(signal.SIGINT)
            stale = getattr(handler, "__self__", None)
            if isinstance(stale, _Interrupts) and not _is_nested():  # hit at its end
                handler, self.outer = stale.previous, stale.outer
                self.pending = stale.pending
            if callable(handler):
                try:
                    _signal.signal(signal.SIGINT, self._record)
                except BaseException as error:
                    recorded = _signal.getsignal(signal.SIGINT) == self._record
                    if isinstance(error, ValueError) and not recorded:
                        return  # no thread of this interpreter may set handlers
                    _signal.signal(signal.SIGINT, handler)
                    raise
                self.previous = handler
                _interrupts = self

    def _record(self, _number: int, _frame: object) -> None:
        self.pending = True

    def check(self) -> None:
        """Do now what the recorded signal asks for, usually raise."""
        if self.pending:
            self.pending = False
            self.previous(signal.SIGINT, None)

    def restore(self) -> None:
        global _interrupts  # noqa: PLW0603 -- as above
        if self.previous is not None:
            _interrupts = self.outer
            try:
                self._put_back()
            except BaseException:
                self._put_back()
                raise
            self.check()

    def _put_back(self) -> None:
        if _signal.getsignal(signal.SIGINT) == self._record:  # else set meanwhile
            _signal.signal(signal.SIGINT, self.previous)


def _recorded() -> _Interrupts | None:
    """Return what records SIGINT for this thread and may raise it, if anything."""
    current = _interrupts
    if current is None or current.deaf or current.thread != threading.get_ident():
        return None
    return current


def _check_interrupts() -> None:
    """Raise a recorded Ctrl-C, where nothing is half done."""
    current = _recorded()
    if current is not None:
        current.check()


def _shielded(call: Callable[[], T], *, deaf: bool = False) -> T:
    """Make a blocking call whose outcome is known before a Ctrl-C is raised.

    Raised inside, so that a claim is given back while further signals are still
    recorded. One that arrives in the last moment is raised by `restore()`; no
    call may come between that and `return`, or it could lose a claim.
    """
    ident = threading.get_ident()
    if ident in _operating and _is_nested():
        raise RuntimeError(
            "a blocking call cannot be made inside another one of the same thread"
            " (from a signal handler or a serializer); set a flag and call later"
        )
    undo: Callable[[], None] | None = None
    interrupts = _Interrupts()
    interrupts.deaf = deaf
    try:
        try:
            with _operating_lock:
                _operating.add(ident)
            value = call()
            interrupts.check()
        except BaseException:
            interrupts.deaf = True
            _undo.pop(ident, _nothing)()
            raise
        finally:
            try:
                undo = _undo.pop(ident, None)
                _operating.discard(ident)
            finally:
                interrupts.restore()
        return value
    except BaseException:
        if undo is not None:
            try:
                _shielded(undo, deaf=True)
            except BaseException:  # the next Ctrl-C, maybe before there was a shield
                _shielded(undo, deaf=True)
                raise
        raise


def _is_nested() -> bool:
    """Tell whether this thread is inside `_shielded` in truth.

    It is noted there, but a signal handler of the program that raises, in the
    last moment of a call, leaves the note behind.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _shielded.__code__:
            return True
    return False


def _throw(ident: int, error: type[BaseException]) -> bool:
    """Raise in another thread, unless it is inside a blocking call; tell whether.

    It raises as soon as it goes on, at the latest where the next function begins:
    a call that waits for the lock ends there, before it has begun anything.
    """
    import ctypes  # rare; costs import time

    with _operating_lock:
        if ident in _operating:
            return False
        thread, thrown = ctypes.c_ulong(ident), ctypes.py_object(error)
        return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, thrown))


def _nothing(*_: object) -> None:
    """Do nothing."""


def _drive(
    method: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a coroutine over a direct gateway to its end in this thread.

    It never suspends, because nothing below it awaits a loop.
    """
    coroutine = method(*args, **kwargs)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise RuntimeError("a blocking call was suspended; this is a bug in omniq_sqlite")


# -- The two gateways --


class _DirectGateway:
    """Runs everything in the calling thread. Used by the blocking twins.

    The classes above need a write, also one that nobody waits for, a read, a wait, a
    sleep and a close, and no more.
    """

    def __init__(self, database: _Database) -> None:
        self.database = database

    async def write(
        self, operation: _Operation[T], *, undo: Callable[[T], None] | None = None
    ) -> T:
        """Commit an operation; `undo` takes a result whose caller has gone."""
        self.database.check_open()
        operation.wake = woken = _Latch()
        try:
            self._serve_until_done(operation, woken)
            return operation.outcome()
        finally:
            if undo is not None and operation.succeeded:
                _undo[threading.get_ident()] = partial(undo, operation.result)

    def _serve_until_done(self, operation: _Operation[Any], woken: _Latch) -> None:
        """Wait for the leader, or lead: commit groups until ours is among them.

        Leadership is passed on also when an exception is raised in here, as by a
        signal handler of the program; the second `finally` covers one that hits
        the first.
        """
        database = self.database
        generation = database.generation
        try:
            try:
                database.enlist(operation)
                while not operation.done:
                    if database.generation != generation:
                        operation.done = True
                        raise StorageClosedError(database.path, _FORKED)
                    if database.leader is operation:
                        database.serve()
                    else:
                        self._follow(operation, woken)
            finally:
                self._leave(operation, woken)
        finally:
            if not operation.done or database.leader is operation:
                self._leave(operation, woken)

    def _follow(self, operation: _Operation[Any], woken: _Latch) -> None:
        """Wait for the outcome or the lead; a Ctrl-C takes back what has not begun."""
        interrupts = _recorded()
        if interrupts is None:
            woken.wait(_LOST_WAKE)
        elif (
            not woken.wait(_INTERRUPT_INTERVAL)
            and interrupts.pending
            and self.database.withdraw(operation)
        ):
            interrupts.check()
            self.database.enlist(operation)  # the handler did not raise: as before

    def _leave(self, operation: _Operation[Any], woken: _Latch) -> None:
        """Leave nothing behind that nobody waits for, and let the next one lead."""
        database = self.database
        ident = threading.get_ident()
        for pool in (database.checkpointer, database.writer):
            if ident in pool.used:
                pool.__exit__()  # an exception had hit this
        while not (
            operation.done
            or database.leader is operation
            or database.withdraw(operation)
        ):
            woken.wait(_LOST_WAKE)  # it is in a transaction of another thread
        if database.leader is operation:
            if not operation.done:
                database.withdraw(operation)
            database.hand_over()

    def submit(self, operation: _Operation[Any]) -> None:
        """Commit an operation that nobody waits for; a failure is logged."""
        operation.wake = woken = _Latch()
        try:
            self._serve_until_done(operation, woken)
            operation.outcome()
        except OmniQError as error:
            logger.warning("a write that nobody waits for failed: %s", error)

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        return self.database.read(function)

    async def wait(
        self, seen: int, timeout: float | None, due: float | None = None
    ) -> None:
        """Return when something was committed since `seen`, or at the latest then.

        `timeout`: seconds; `due`: the time on the clock; `None` (or inf): never. May
        return early: look again. Read `seen` (`bell.generation`) before looking.
        """
        woken = _Latch()
        patience = min(_LOST_WAKE, self.database.patience(timeout, due))
        bell = self.database.bell
        if not bell.register(woken, due, seen):
            return
        polls = False
        try:
            polls = bell.take_over()
            self._wait(woken, patience, polls=polls)
        finally:
            bell.unregister(woken)
            if polls:
                bell.hand_over()

    def _wait(self, woken: _Latch, timeout: float, *, polls: bool) -> None:
        """Wait in slices, of which each sees a Ctrl-C and a fork."""
        bell = self.database.bell
        limit = time.monotonic() + timeout
        longest = math.inf if _recorded() is None else _INTERRUPT_INTERVAL
        generation = self.database.generation
        while self.database.generation == generation:  # else a child looks again
            _check_interrupts()
            if polls:
                bell.poll()
                if woken.wait(0.0):
                    return
            length = max(0.0, min(longest, limit - time.monotonic()))
            woke = bell.pause(woken.wait, length) if polls else woken.wait(length)
            if woke or length == 0.0:
                return

    async def sleep(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            _check_interrupts()
            time.sleep(min(left, _INTERRUPT_INTERVAL))  # noqa: ASYNC251 -- no loop here

    async def close(self) -> None:
        self.database.shut(self.database.options.busy_timeout)


class _NoFuture:
    """Stands where aiosqlite expects a future, and needs no event loop.

    aiosqlite delivers each outcome through the loop of a future; if that loop
    was closed in the meantime its thread dies, and every later call hangs. Our
    functions deliver their own outcomes, so there is nothing to do here.
    """

    def get_loop(self) -> Self:
        return self

    def call_soon_threadsafe(self, *_: object) -> None:
        pass


_NO_FUTURE: Any = _NoFuture()


class _ConnectionThread:
    """The thread of one aiosqlite connection, for whole functions at a time.

    aiosqlite has no public call for "run this function there"; `_put` is the
    one place that uses its queue. A test runs against the oldest and the newest
    supported version. The thread is a daemon: one that is not keeps a program
    from exiting that forgot to close. The functions take their connections from
    the pools, where a fork finds them and closes them.
    """

    def __init__(self) -> None:
        self._connection = aiosqlite.Connection(cast(Any, None), 64)  # opens none
        self._lock = threading.Lock()
        self.outstanding = 0
        # aiosqlite 0.22 has a thread, older ones are one.
        thread = getattr(self._connection, "_thread", self._connection)
        self._thread: threading.Thread = cast(threading.Thread, thread)
        self._thread.daemon = True
        self._thread.start()

    def submit(self, function: Callable[[], None]) -> None:
        """Queue a function that raises nothing."""
        with self._lock:
            self.outstanding += 1
        self._put(partial(self._run, [function]))

    def _put(self, function: Callable[[], object]) -> None:
        self._connection._tx.put_nowait((_NO_FUTURE, function))

    def _run(self, functions: list[Callable[[], None]]) -> None:
        try:
            # Taken out of its list, because the thread keeps what it did last: an
            # object that is forgotten would never be closed.
            functions.pop()()
        finally:
            with self._lock:
                self.outstanding -= 1

    def stop(self) -> None:
        """End the thread behind what was submitted; wait for it if it is idle."""
        if hasattr(self._connection, "stop"):  # aiosqlite 0.22
            self._put(lambda: aiosqlite.core._STOP_RUNNING_SENTINEL)
        else:
            cast(Any, self._connection)._stop_running()
        if self.outstanding == 0 and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)


class _AsyncGateway:
    """Runs transactions and reads on the threads of aiosqlite connections.

    It belongs to no event loop: each call is answered in the loop it came from,
    so two `asyncio.run` in a row, or two loops in two threads, use one object.
    """

    def __init__(self, database: _Database) -> None:
        self.database = database
        self._direct = _DirectGateway(database)  # for `:memory:`, see `write`
        self._writer: _ConnectionThread | None = None
        self._watcher: _ConnectionThread | None = None
        self._readers: list[_ConnectionThread] = []

    async def write(
        self, operation: _Operation[T], *, undo: Callable[[T], None] | None = None
    ) -> T:
        if self.database.memory:  # microseconds under a lock: no thread is needed
            result = await self._direct.write(operation)
        else:
            result = await self._write(operation, undo)
        if undo is not None and (call := _loop_call.get(None)) is not None:
            call.undo = partial(undo, result)
        return result

    async def _write(
        self, operation: _Operation[T], undo: Callable[[T], None] | None
    ) -> T:
        self.database.check_open()
        operation.undo = undo
        operation.future = future = _running_loop().create_future()
        self._enlist(operation)
        try:
            await future
        except BaseException as error:
            operation.awaited = False  # the caller goes; what is to come is undone
            if future.done() and not future.cancelled():  # it has come already
                if isinstance(error, GeneratorExit):  # perhaps by the collector
                    _drop_elsewhere([operation])
                else:
                    operation.drop()
            raise
        if operation.unflushed:
            operation.drop()
        return operation.outcome()

    def _enlist(self, operation: _Operation[Any]) -> None:
        """Queue an operation and see that it is served.

        Nothing is awaited here: a caller that is cancelled before its operation is
        queued has asked for nothing; what becomes of a later one, `_Arrival` knows.
        """
        operation.wake = self._lead
        with self.database.gate:  # not while a fork is under way
            self._writer = self._running(self._writer)
            if self.database.enlist(operation):
                self._writer.submit(self._serve)

    def _lead(self) -> None:
        """Go on leading, or take over from a thread that did."""
        with self.database.gate:
            self._writer = self._running(self._writer)
            self._writer.submit(self._serve)

    def _serve(self) -> None:
        """Commit a group and let the next one lead; on the writer's thread."""
        try:
            self.database.serve()
        finally:
            self.database.hand_over()

    def submit(self, operation: _Operation[Any]) -> None:
        if self.database.memory:
            self._direct.submit(operation)
            return
        operation.awaited = False
        try:
            self._enlist(operation)
        except StorageClosedError as error:
            logger.warning("a write that nobody waits for failed: %s", error)

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        database = self.database
        if database.memory:
            return database.read(function)
        with database.gate:  # a fork or a close in between would end the thread
            database.check_open()
            loop, reader = _running_loop(), self._reader()  # which may raise
            answer = _answer(loop, reader, database.accept(function))
        return await answer

    def _reader(self) -> _ConnectionThread:
        """Return the reader with the least to do; start one if all are busy."""
        alive = self.database.threads
        self._readers = [t for t in self._readers if t in alive]
        best = min(self._readers, key=lambda t: t.outstanding, default=None)
        full = len(self._readers) >= self.database.options.readers
        if best is not None and (best.outstanding == 0 or full):
            return best
        self._readers.append(self._running(None))
        return self._readers[-1]

    def _running(self, thread: _ConnectionThread | None) -> _ConnectionThread:
        """Return this thread, or a new one where a fork has ended it."""
        if thread is not None and thread in self.database.threads:
            return thread
        if self.database.ended:
            self.database.check_open()
        thread = _ConnectionThread()
        self.database.threads.append(thread)
        return thread

    async def wait(
        self, seen: int, timeout: float | None, due: float | None = None
    ) -> None:
        loop = _running_loop()
        future: asyncio.Future[None] = loop.create_future()
        wake = partial(_call_soon, loop, _set_result, future, None)
        bell = self.database.bell
        self.database.check_open()
        patience = self.database.patience(timeout, due)
        if self.database.memory and due is not None:
            patience = min(patience, POLL_INTERVAL)  # the clock may be moved
        if not bell.register(wake, due, seen):
            return
        timer = None
        try:
            if patience != math.inf:
                timer = loop.call_later(patience, _set_result, future, None)
            if not self.database.memory:
                self._start_watching()
            await future
        finally:
            if timer is not None:
                timer.cancel()
            bell.unregister(wake)

    def _start_watching(self) -> None:
        with self.database.gate:
            self._watcher = self._running(self._watcher)  # it may not start
            if self.database.bell.take_over():
                self._watcher.submit(self._keep_watching)

    def _keep_watching(self) -> None:
        """Poll for as long as anybody waits; on the watcher's thread."""
        bell = self.database.bell
        while True:
            bell.poll()
            bell.pause(time.sleep, _LAST_LOOK)
            with bell.lock:
                if not bell.waiters:
                    bell.polled = False
                    return

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close on a thread, because it waits for what was asked for before."""
        database = self.database
        if database.closed_reason is not None:
            return
        timeout = database.options.busy_timeout
        if not database.threads:
            database.shut(timeout)
            return
        try:
            for _ in range(2):  # who was cancelled just now gives back its claim first
                await asyncio.sleep(0)
        finally:
            with database.gate:
                closed = None
                if database.closed_reason is None:  # else another one was faster
                    call = partial(database.shut, timeout)
                    closed = _answer(_running_loop(), self._running(None), call)
        if closed is not None:
            await closed


_Gateway = _DirectGateway | _AsyncGateway


_NO_LOOP = (
    "the Async classes need a running asyncio event loop, because aiosqlite does;"
    " under trio or without a loop use the blocking twin (in a thread)"
)


def _running_loop(otherwise: str = _NO_LOOP) -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(otherwise) from None


def _answer(
    loop: asyncio.AbstractEventLoop, thread: _ConnectionThread, call: Callable[[], T]
) -> asyncio.Future[T]:
    """Make a call on a thread; return what brings its outcome to a loop."""
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 (delivered)
            _call_soon(loop, _set_exception, future, error)
        else:
            _call_soon(loop, _set_result, future, result)

    thread.submit(run)
    return future


def _call_soon(loop: asyncio.AbstractEventLoop, *call: Any) -> None:
    """Call in a loop from any thread, unless that loop was closed."""
    try:  # noqa: SIM105 -- as in `_Latch`
        loop.call_soon_threadsafe(*call)
    except RuntimeError:
        pass


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


_loop_call: contextvars.ContextVar[_LoopCall[Any]]
_loop_call = contextvars.ContextVar("omniq_loop_call")


class _LoopCall(Generic[T]):
    """A call in the event loop of an async object, for a thread that waits for it.

    As `anyio.from_thread.run`, but a Ctrl-C ends it there, too, and a claim that was
    made nevertheless is given back.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        path: str,
        call: Callable[[], Coroutine[Any, Any, T]],
    ) -> None:
        self.undo: Callable[[], None] = _nothing
        self._loop = loop
        self._path = path
        self._call = call
        self._ended = _Latch()
        self._job: asyncio.Task[T] | None = None

    def run(self) -> T:
        """Return the outcome; in the waiting thread, under `_shielded`."""
        _call_soon(self._loop, self._begin)
        try:
            while not (self._ended.wait(_INTERRUPT_INTERVAL) or self._loop.is_closed()):
                _check_interrupts()
        except BaseException:
            _call_soon(self._loop, self._cancel)
            while self._loop.is_running() and not self._ended.wait(_INTERRUPT_INTERVAL):
                pass
            raise
        finally:
            _undo[threading.get_ident()] = self.undo
        if self._job is None or not self._job.done() or self._job.cancelled():
            raise StorageClosedError(self._path, "its event loop has ended")
        return self._job.result()

    # In the loop.

    def _begin(self) -> None:
        self._job = self._loop.create_task(self._await())
        self._job.add_done_callback(lambda _: self._ended())

    async def _await(self) -> T:
        _loop_call.set(self)
        return await self._call()

    def _cancel(self) -> None:
        if self._job is not None:
            self._job.cancel()


class _Arrival:
    """Outcomes on their way to a loop; undone if the loop is closed before.

    Sent from the connection's thread, never by a task of some caller, which could
    be cancelled and leave the others of its group waiting.
    """

    __slots__ = ("operations",)

    def __init__(self, operations: list[_Operation[Any]]) -> None:
        self.operations = operations

    def __call__(self) -> None:
        operations, self.operations = self.operations, []
        for operation in operations:
            operation.arrive()

    def __del__(self) -> None:
        if self.operations:
            _drop_elsewhere(self.operations)


def _drop_elsewhere(operations: Sequence[_Operation[Any]]) -> None:
    """Drop operations in a thread; the collector runs anywhere, also inside locks."""

    def drop() -> None:
        for operation in operations:
            operation.drop()

    threading.Thread(target=drop, daemon=True).start()


# =============================================================================
# Queue
# =============================================================================
#
# Each method prepares its values, hands one operation to the gateway and reads
# the outcome. What happened to tasks is noted while the operation runs; with
# the event log on the same file the notes become rows of the same transaction,
# elsewhere they are logged after the commit.

_SETTLE_LIMIT = 500  # tasks that are settled, or go after retention, in one transaction
_STEP_LIMIT = 1_000  # rows that are deleted in one transaction
_NOTE_WORKER_INTERVAL = 10.0  # seconds between two notes that a worker was seen
_FORGET_WORKER_AFTER = 86_400.0  # seconds

_SHARED_OPTIONS = [each.name for each in fields(_Options) if each.name != "path"]
_PARTS = ("queue", "results", "events")  # of a backend: objects, paths or neither


def _arguments_of(scope: dict[str, Any]) -> dict[str, Any]:
    """Return a constructor's keyword arguments, from its `locals()`."""
    others = {"self", "path", "__class__"}
    arguments = {name: value for name, value in scope.items() if name not in others}
    for name in arguments.keys() & _PARTS:
        if isinstance(arguments[name], (str, os.PathLike)):
            arguments[name] = _absolute(arguments[name])
    return arguments


def _new_gateway(
    path: str | os.PathLike[str], arguments: dict[str, Any], *components: str
) -> _AsyncGateway:
    """Return the connections of a new object; nothing is opened yet."""
    shared = {name: arguments[name] for name in _SHARED_OPTIONS}
    options = _Options(_absolute(path), **shared)
    return _AsyncGateway(_Database(options, components))


async def _in_steps(limit: int, step: Callable[[], Awaitable[int]]) -> int:
    """Repeat a short transaction until it finds less than its limit; add up.

    Short, so that nobody waits long for the lock.
    """
    total = count = await step()
    while count >= limit:
        count = await step()
        total += count
    return total


class _AsyncStorage:
    """What the async classes share: a gateway, opening, closing, pickling."""

    _gateway: _Gateway
    _serializer: Serializer
    _arguments: dict[str, Any]
    _owned = True
    """Whether closing this object closes the connections; a backend's parts share."""

    def _set_up(self, gateway: _Gateway, arguments: dict[str, Any]) -> None:
        """Take what the constructor was given; the classes add their own."""
        self._gateway = gateway
        self._arguments = arguments
        self._serializer = _find_serializer(arguments["serializer"])

    @classmethod
    def _over(cls, gateway: _Gateway, arguments: dict[str, Any]) -> Self:
        """Make a part of a backend, which shares that one's connections."""
        self = cls.__new__(cls)
        self._owned = False
        self._set_up(gateway, arguments)
        return self

    def _clock(self) -> float:
        return self._gateway.database.options.clock()

    async def _rows(self, statement: str, **parameters: Any) -> list[Row]:
        return await self._gateway.read(
            lambda connection: connection.execute(statement, parameters).fetchall()
        )

    async def _put(self, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute a statement for all rows in one transaction."""

        def run(connection: sqlite3.Connection) -> None:
            _write_rows(connection.cursor(), statement, rows)

        self._gateway.database.check_open()
        if rows:
            await self._gateway.write(_Operation(run, savepoint=False))

    async def _delete(self, statement: str, **parameters: Any) -> int:
        """Delete the rows that match, a thousand in a transaction; return how many.

        The statement returns their keys; it may take those `:after` one only.
        """
        parameters |= {"after": -1, "limit": _STEP_LIMIT}

        async def step() -> int:
            operation = _Operation[list[Row]](
                lambda connection: connection.execute(statement, parameters).fetchall()
            )
            keys = await self._gateway.write(operation)
            [parameters["after"]] = max(keys, default=(-1,))
            return len(keys)

        return await _in_steps(_STEP_LIMIT, step)

    @property
    def path(self) -> str:
        """The absolute path of the file, or ":memory:"."""
        return self._gateway.database.path

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if _is_in_memory(self.path, self._arguments):
            raise TypeError(f"{type(self).__name__} on ':memory:' cannot be pickled")
        return partial(cast(Any, type(self)), self.path, **self._arguments), ()

    async def close(self) -> None:
        """Close what this object opened; what was asked for before is finished.

        For that it waits at most `busy_timeout` seconds. To close again does nothing.
        """
        if self._owned:
            await self._gateway.close()

    async def _open(self) -> None:
        await self._gateway.read(_nothing)

    def _databases(self) -> list[_Database]:
        """Return what a plain `with` opens and closes."""
        return [self._gateway.database]

    def _use_directly(self) -> None:
        """Let a blocking twin drive this object."""
        self._gateway = _DirectGateway(self._gateway.database)

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        """Check and create the file where no loop runs."""
        _refuse_loop(self)
        for database in self._databases():
            _shielded(partial(database.read, _nothing))
        return self

    def __exit__(self, *_: object) -> None:
        _refuse_loop(self)
        for database in self._databases() if self._owned else ():
            _shielded(partial(database.shut, database.options.busy_timeout))


def _refuse_loop(storage: object) -> None:
    if asyncio._get_running_loop() is not None:
        raise RuntimeError(
            f"'with {type(storage).__name__}' would block the running event loop;"
            " use 'async with'"
        )


def _are_one_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Tell whether two paths, of files that may not be there yet, lead to one."""
    paths = {_absolute(one), _absolute(other)}
    return ":memory:" not in paths and len(set(map(os.path.realpath, paths))) == 1


def _is_event_log_of(events: object, path: str | os.PathLike[str]) -> bool:
    """Tell whether an event storage is ours and on this very file."""
    return isinstance(events, _AsyncStorage) and _are_one_file(events.path, path)


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout


def _message_of(error: BaseException) -> str:
    """Return an exception's text, also of one that cannot tell it."""
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 -- whatever a foreign __str__ raises
        return f"(its message cannot be read: {type(second).__name__})"


def _error_text(error: str | BaseException) -> str:
    """Return what is kept of an error: its type and message, shortened."""
    if isinstance(error, BaseException):
        message = _message_of(error)
        name = type(error).__name__
        error = f"{name}: {message}" if message else name
    _check(isinstance(error, str), "error", "a string or an exception", error)
    return _clean_text(error)


def _wanted_id(task_id: str) -> str:
    """Return an id to look for; one that cannot be stored is simply not there."""
    _check(isinstance(task_id, str), "task_id", "a string", task_id)
    return task_id if _storable(task_id) else ""  # no task has that


def _wanted_ids(ids: Iterable[object]) -> str:
    """Return ids to look for as a JSON array, without those that cannot be there."""
    return _to_json([i for i in ids if isinstance(i, str) and _storable(i)])


def _check_task(task: object, name: str = "task") -> Task:
    if not isinstance(task, Task):
        raise TypeError(f"{name} must be a Task, not {type(task).__name__}")
    return task


def _check_lease(task: object) -> Task:
    task = _check_task(task)
    if task.lease_id is None:
        raise LeaseLostError([task.id])
    return task


def _queue_names(queues: QueueNames) -> tuple[str, ...]:
    """Return the queues of a claim in order of preference, each once."""
    names = (queues,) if isinstance(queues, str) else tuple(queues)
    _check(len(names) > 0, "queues", "a name or a sequence of names", queues)
    for name in names:
        _check_values(queue=name)
    return tuple(dict.fromkeys(names))


def _retry_delay(task: Task) -> float:
    """Seconds before the next attempt: doubled at each, ±10 %, at most an hour."""
    doublings = min(max(task.attempt - 1, 0), 62)
    delay = task.retry_delay * 2.0**doublings
    return min(delay * random.uniform(0.9, 1.1), MAX_RETRY_DELAY)


# -- Inside the transaction --


class _Change:
    """A write under way: where and when it happens, and what it did to tasks."""

    __slots__ = ("cursor", "notes", "noting", "now")

    def __init__(self, cursor: sqlite3.Cursor, now: float, *, noting: bool) -> None:
        self.cursor = cursor
        self.now = now
        self.noting = noting
        self.notes: list[dict[str, Any]] = []  # parameters of `INSERT_EVENT`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Results and errors go to other threads. A cursor that ended there would
        # reset a statement that this thread is about to use (SQLITE_MISUSE).
        self.cursor.close()

    def rows(self, statement: str, **parameters: Any) -> list[Row]:
        """Execute a statement, which may use `:now`, and read all that it returns."""
        parameters["now"] = self.now
        return self.cursor.execute(statement, parameters).fetchall()

    def note(
        self,
        kind: EventType,
        task_id: str,
        queue: str,
        worker: str | None = None,
        message: str = "",
        **details: Any,
    ) -> None:
        if self.noting:
            note = {
                "at": self.now,
                "type": kind.value,
                "task_id": task_id,
                "queue": queue,
                "worker": worker,
                "message": message,
                "details": _to_json(details) if details else "{}",
            }
            self.notes.append(note)

    def note_run(
        self, kind: EventType, task: Task, message: str = "", **details: Any
    ) -> None:
        details["attempt"] = task.attempt
        self.note(kind, task.id, task.queue, task.worker, message, **details)

    def end(self, statement: str, task: Task, **parameters: Any) -> Row:
        """Change a task that must still be under this claim; return the row."""
        lease = {"id": task.id, "lease_id": task.lease_id}
        rows = self.rows(statement, **lease, **parameters)
        if not rows:
            raise LeaseLostError([task.id])
        return rows[0]

    @contextlib.contextmanager
    def all_or_nothing(self) -> Generator[None]:
        self.cursor.execute("SAVEPOINT omniq_part")
        try:
            yield
        except BaseException:
            # Some errors, as a full disk, have ended the whole transaction.
            if self.cursor.connection.in_transaction:
                self.cursor.execute("ROLLBACK TO omniq_part")
                self.cursor.execute("RELEASE omniq_part")
            raise
        self.cursor.execute("RELEASE omniq_part")


@contextlib.contextmanager
def _undecoded(connection: sqlite3.Connection) -> Generator[None]:
    """Let text be read as bytes: SQLite lets anybody store what is not UTF-8."""
    connection.text_factory = bytes
    try:
        yield
    finally:
        connection.text_factory = str


def _text(value: Any) -> str:
    """Return text that was read as bytes, as a caller's connection may do, too."""
    return value if isinstance(value, str) else bytes(value).decode(errors="replace")


def _settle(change: _Change, due: Sequence[Row]) -> int:
    """End what time has ended among these tasks, and free what may run.

    `due` has `seq`, `id`, `queue`, `worker` and `status` as they are before.
    """
    if not due:
        return 0
    settled = change.rows(SETTLE, seqs=_to_json([row[0] for row in due]))
    now = {
        seq: (_text(status), error and _text(error)) for seq, status, error in settled
    }
    for seq, task_id, name, worker, before in due:
        status, error = now.get(seq, ("", ""))
        who = (_text(task_id), _text(name), worker and _text(worker))
        if status and _text(before) == "running":
            change.note(EventType.LEASE_LOST, *who, error)
        if status == "failed":
            change.note(EventType.FAILED, *who, error)
        if status == "expired":
            change.note(EventType.EXPIRED, *who)
    return len(settled)


def _key_holder(change: _Change, queue: str, key: str | None) -> str | None:
    """Return the task that holds a key, after settling one that is over."""
    if key is None:
        return None
    for _ in range(2):
        terms = {"unique_key": key, "leases": not _standstill.left()}
        for *task, is_due in change.rows(SELECT_KEY_HOLDER, queue=queue, **terms):
            if not is_due:
                return _text(task[1])
            _settle(change, [tuple(task)])
    return None


@functools.cache
def _places(statement: str) -> tuple[str, Callable[[Mapping[str, Any]], Row]]:
    """Return a statement that takes its parameters by place, and what sorts a row.

    By name, `sqlite3` looks each one up again for each row: a third of an insert.
    """
    names = re.findall(r":(\w+)", statement)
    return re.sub(r":\w+", "?", statement), operator.itemgetter(*names)


def _by_place(statement: str, row: Mapping[str, Any]) -> tuple[str, Row]:
    """Return what `execute` takes."""
    statement, values_of = _places(statement)
    return statement, values_of(row)


def _write_rows(
    cursor: sqlite3.Cursor, statement: str, rows: Iterable[Mapping[str, Any]]
) -> None:
    """Execute a statement for each row."""
    statement, values_of = _places(statement)
    cursor.executemany(statement, map(values_of, rows))


def _insert(change: _Change, row: dict[str, Any]) -> str:
    """Add a task, unless a live one holds its key; return the id that is there."""
    try:
        change.cursor.execute(*_by_place(INSERT_TASK, row))
    except sqlite3.IntegrityError:
        holder = _key_holder(change, row["queue"], row["unique_key"])
        if holder is not None:
            return holder
        try:
            change.cursor.execute(*_by_place(INSERT_TASK, row))
        except sqlite3.IntegrityError as error:
            raise DuplicateTaskError(row["id"]) from error
    task_id: str = row["id"]
    change.note(EventType.ENQUEUED, task_id, row["queue"])
    return task_id


def _insert_many(change: _Change, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Add tasks in one statement, or one by one where a key or an id is taken."""
    if len(rows) < 2:
        return [_insert(change, row) for row in rows]
    try:
        with change.all_or_nothing():
            _write_rows(change.cursor, INSERT_TASK, rows)
    except sqlite3.IntegrityError:
        return [_insert(change, row) for row in rows]
    for row in rows:
        change.note(EventType.ENQUEUED, row["id"], row["queue"])
    return [row["id"] for row in rows]


def _cancel(change: _Change, statement: str, **filters: Any) -> int:
    """Cancel the live tasks that match; return how many."""
    rows = change.rows(statement, **filters)
    for task_id, name in rows:
        change.note(EventType.CANCELLED, task_id, name)
    return len(rows)


def _retry(change: _Change, task_id: str) -> bool:
    """Let an ended task run again, unless its key is held; return whether it does."""
    for name, unique_key in change.rows(SELECT_RETRYABLE, id=task_id):
        if _key_holder(change, name, unique_key) is not None:
            raise DuplicateTaskError(task_id, unique_key)
        change.rows(RETRY, id=task_id)
        change.note(EventType.RETRY, task_id, name)
        return True
    return False


@dataclass(slots=True)
class _Claimed:
    """The outcome of a claim."""

    tasks: list[Task]
    notes: list[dict[str, Any]]
    next_due: float | None = None
    more: bool = False
    """Whether another look is worth it at once: more was due than one takes."""


class _Claim(_Operation[_Claimed]):
    """Claim up to `limit` tasks of some queues, after settling what is due."""

    def __init__(
        self,
        queue: AsyncSQLiteQueue,
        names: tuple[str, ...],
        limit: int,
        lease: float,
        worker: str | None,
    ) -> None:
        # `run` is a method here: bound in an attribute it would be a cycle, which only
        # the garbage collector frees.
        self.flush = self.savepoint = self.looked = False
        self.since = time.monotonic()
        self.queue = queue
        self.names = names
        self.limit = limit
        self.lease = lease
        self.worker = worker
        self.claim_id = os.urandom(12).hex()
        # Where to claim, and whether something is due there; until a look all.
        self.plan = [(name, True) for name in names]
        self.next_due: float | None = None

    def look(self, connection: sqlite3.Connection) -> _Claimed | None:
        now = self.queue._clock()
        plan: list[tuple[str, bool]] = []
        later: list[float] = []
        spared = _standstill.left()
        terms: dict[str, object] = {"leases": not spared}
        if len(self.names) == 1:
            terms["queue"] = self.names[0]
            rows = connection.execute(LOOK_ONE, terms).fetchall()
        else:
            terms["queues"] = _to_json(self.names)
            rows = connection.execute(LOOK, terms).fetchall()
        if spared:
            later.append(now + spared)
        found = {name: state for name, *state in rows}
        for name in self.names:
            ready, paused, due_at = found[name]
            due = due_at is not None and due_at <= now
            if not paused and (ready or due):
                plan.append((name, due))
            elif not paused and due_at is not None:
                later.append(due_at)
        self.plan, self.next_due = plan, min(later, default=None)
        return None if plan else _Claimed([], [], self.next_due)

    def must_flush(self) -> bool:
        return self.error is None and any(
            task.attempt >= task.max_attempts for task in self.result.tasks
        )

    def run(self, connection: sqlite3.Connection) -> _Claimed:
        with self.queue._change(connection.cursor()) as change:
            claimed = _Claimed([], change.notes, self.next_due)
            for name, due in self.plan:
                if due:
                    count = _settle_due(change, name)
                    claimed.more |= count == _SETTLE_LIMIT
                self._claim(change, name, claimed)
                if len(claimed.tasks) >= self.limit:
                    break
            self.queue._log_inside(change)
        return claimed

    def _claim(self, change: _Change, name: str, claimed: _Claimed) -> None:
        terms = {
            "queue": name,
            "claim_id": self.claim_id,
            "lease_until": change.now + self.lease,
        }
        limit = self.limit - len(claimed.tasks)
        try:
            statement = CLAIM_ONE if limit == 1 else CLAIM
            rows = change.rows(statement, limit=limit, worker=self.worker, **terms)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not _is_undecodable(error):
                raise
            rows = self._mend(change, **terms)  # they are claimed, but not read
        rows.sort(key=lambda row: (-row[7], row[-1]))  # RETURNING has no order
        for row in rows:
            try:
                [task] = _read("task", _task_of, [row], self.queue._serializer)
            except SerializationError as error:
                # It fails at once: others must not wait behind it.
                _bury(change, row, _error_text(error))
                claimed.more = True
            else:
                claimed.tasks.append(task)
                change.note_run(EventType.DEQUEUED, task, func=task.func)

    @staticmethod
    def _mend(change: _Change, **terms: Any) -> list[Row]:
        """Read claimed tasks whose text somebody else wrote, not all of it in UTF-8.

        Such text becomes text that says so, and is no JSON; an id is drawn anew.
        """
        with _undecoded(change.cursor.connection):
            found = change.rows(SELECT_CLAIMED_TEXT, **terms)
        rows: list[Row] = []
        for seq, task_id, func, args, kwargs, metadata, unique_key, error in found:
            rows += change.rows(
                MEND_CLAIMED,
                seq=seq,
                id=_from_utf_8(task_id) or new_id(),
                func=_from_utf_8(func, f"not UTF-8: {func!r}"),
                args=_from_utf_8(args, f"not UTF-8: {args!r}"),
                kwargs=_from_utf_8(kwargs, f"not UTF-8: {kwargs!r}"),
                metadata=_from_utf_8(metadata, f"not UTF-8: {metadata!r}"),
                unique_key=_from_utf_8(unique_key),
                error=_from_utf_8(error),
            )
        return rows


def _from_utf_8(stored: object, otherwise: str | None = None) -> object:
    try:
        return stored.decode() if isinstance(stored, bytes) else stored
    except UnicodeDecodeError:
        return otherwise


def _settle_due(change: _Change, queue: str) -> int:
    """Settle what is due in a queue, a bounded number; return how many."""
    terms = {"queue": queue, "leases": not _standstill.left()}
    with _undecoded(change.cursor.connection):
        due = change.rows(SELECT_DUE, limit=_SETTLE_LIMIT, **terms)
        return _settle(change, due)


def _bury(change: _Change, row: Row, error: str) -> None:
    """Fail a claimed task that cannot be read."""
    task_id, queue, lease_id = row[0], row[1], row[17]
    terms = {"retry": False, "run_at": None, "error": error}
    change.rows(FAIL, id=task_id, lease_id=lease_id, **terms)
    change.note(EventType.FAILED, task_id, queue, None, error)


class AsyncSQLiteQueue(_AsyncStorage):
    """A task queue in an SQLite file, for asyncio.

    Opens at first use; `async with` opens at once and closes at the end.

    `path`: the file, created where missing (readable by its owner only), or
    ":memory:". `synchronous`: "FULL" survives a power cut, "NORMAL" a crash of
    the process. `busy_timeout`: seconds that a write waits for other writers.
    `serializer`: "json" or an object with `dumps` and `loads` of JSON text.
    `events`: an event storage that gets an event for each change of a task; in
    the same transaction when it is on the same file. `retention`: seconds that
    completed tasks are kept. `allow_network_fs`: open files on what looks like
    a network file system. `clock`: the time of day in unix seconds. `readers`:
    read connections at the most.

    Raises: on every call `StorageClosedError` after `close()`,
    `DatabaseBusyError` when other writers held the file for `busy_timeout`, and
    the other errors of this module that say what is wrong with the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        events: AsyncEventStorage | None = None,
        retention: float = 0.0,
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        inside = _is_event_log_of(events, path)
        components = ("queue", "events") if inside else ("queue",)
        self._set_up(_new_gateway(path, arguments, *components), arguments)

    def _set_up(self, gateway: _Gateway, arguments: dict[str, Any]) -> None:
        super()._set_up(gateway, arguments)
        _check_values(retention=arguments["retention"])
        self._retention = float(arguments["retention"])
        events = arguments["events"]
        self._events: AsyncEventStorage | None = None
        if events is not None:
            _check(hasattr(events, "log_many"), "events", "an event storage", events)
            self._events = cast(AsyncEventStorage, _check_part(events, "events"))
        here = "events" in gateway.database.components
        self._events_inside = here and self._events is not None
        self._noted: dict[str, float] = {}

    # -- Shared by the methods --

    def _change(self, cursor: sqlite3.Cursor, now: float | None = None) -> _Change:
        now = self._clock() if now is None else now
        return _Change(cursor, now, noting=self._events is not None)

    def _log_inside(self, change: _Change) -> None:
        if self._events_inside and change.notes:
            _write_rows(change.cursor, INSERT_EVENT, change.notes)

    async def _log_outside(self, notes: Sequence[dict[str, Any]]) -> None:
        """Log what was committed to an event log elsewhere; never fail for it."""
        if not notes or self._events is None or self._events_inside:
            return
        try:
            await self._events.log_many([_event_of_note(note) for note in notes])
        except Exception:
            logger.warning("could not log %d task events", len(notes), exc_info=True)

    async def _write(
        self,
        run: Callable[[_Change], T],
        *,
        flush: bool = True,
        savepoint: bool = True,
    ) -> T:
        """Commit what `run` does, and log what it noted.

        The other parameters are those of `_Operation`.
        """
        now = self._clock()

        def run_and_log(connection: sqlite3.Connection) -> tuple[T, list[Any]]:
            with self._change(connection.cursor(), now) as change:
                result = run(change)
                self._log_inside(change)
            return result, change.notes

        operation = _Operation(run_and_log, flush=flush, savepoint=savepoint)
        result, notes = await self._gateway.write(operation)
        await self._log_outside(notes)
        return result

    # -- In --

    async def enqueue(self, task: Task, *, delay: float = 0.0) -> str:
        """Add a task and return its id, or the id of the live one with its key.

        Durable when it returns. `delay`: seconds before it may run. One
        transaction.

        Raises: `DuplicateTaskError` if the id exists; `SerializationError`.
        """
        _check_values(delay=delay)
        row = self._row_of(task, "task", delay)
        # Only a key's holder may be settled before the task is refused.
        savepoint = task.unique_key is not None
        return await self._write(
            lambda change: _insert(change, row), savepoint=savepoint
        )

    async def enqueue_many(self, tasks: Iterable[Task]) -> list[str]:
        """Add tasks in one transaction, all or nothing, and return their ids.

        Raises: `DuplicateTaskError`, `SerializationError`; then none was added.
        """
        rows = [self._row_of(task) for task in tasks]
        if not rows:
            self._gateway.database.check_open()
            return []
        return await self._write(lambda change: _insert_many(change, rows))

    def _row_of(
        self, task: Task, name: str = "tasks", delay: float = 0.0
    ) -> dict[str, Any]:
        _check_task(task, name)
        return _task_parameters(task, self._serializer, self._clock(), delay)

    async def enqueue_on(
        self, connection: sqlite3.Connection | aiosqlite.Connection, *tasks: Task
    ) -> list[str]:
        """Add tasks inside the caller's own transaction and return their ids.

        `connection` is open on the same file. The tasks are committed or rolled
        back with the caller's rows; they stand under one savepoint. Without an
        open transaction a connection in `sqlite3`'s legacy mode gets a BEGIN
        IMMEDIATE. Missing tables are created in that transaction. An event storage
        on another file is told nothing, as only the caller knows of the commit.

        Raises: what `enqueue_many` does, then none was added; `ValueError` in
        autocommit mode without a transaction, for a connection to another file or
        of another thread; `DatabaseBusyError` at once when the transaction's
        snapshot is too old: roll back, begin again.
        """
        if isinstance(connection, aiosqlite.Connection):
            execute = cast(Any, connection)._execute  # on the thread that it belongs to
            ids = await execute(self._enqueue_on, connection._conn, tasks)
            return cast(list[str], ids)
        return self._enqueue_on(connection, tasks)

    def _enqueue_on(
        self, connection: sqlite3.Connection, tasks: Sequence[Task]
    ) -> list[str]:
        database = self._gateway.database
        database.check_open()
        rows = [self._row_of(task) for task in tasks]
        try:
            cursor = _foreign_cursor(connection, database)
            with (
                self._change(cursor) as change,
                _foreign_transaction(connection, cursor),
                change.all_or_nothing(),
            ):
                migrate(connection, database.components, database.path)
                ids = _insert_many(change, rows)
                self._log_inside(change)
        except sqlite3.Error as error:
            if _is_busy(error):
                detail = "roll your transaction back and begin it with BEGIN IMMEDIATE"
                raise DatabaseBusyError(database.path, 0.0, detail) from error
            raise database.translate(error) from error
        return ids

    # -- Out --

    async def dequeue(
        self,
        queues: QueueNames = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = DEFAULT_LEASE,
        worker: str | None = None,
    ) -> Task | None:
        """Claim the next task, or return `None` after `timeout` seconds.

        `queues`: a name, or names in order of preference; a preferred queue wins
        over any priority in a later one. `timeout`: `None` waits for ever.
        `lease`: seconds until the claim ends by itself. `worker`: a name for the
        claim, shown by `list_workers()`. A claim whose caller was cancelled is
        given back at once.
        """
        tasks = await self.dequeue_many(
            1, queues, timeout=timeout, lease=lease, worker=worker
        )
        return tasks[0] if tasks else None

    async def dequeue_many(
        self,
        limit: int,
        queues: QueueNames = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = DEFAULT_LEASE,
        worker: str | None = None,
    ) -> list[Task]:
        """Claim up to `limit` tasks in one transaction; return when there is one.

        Empty after `timeout` seconds. The parameters are those of `dequeue`.
        """
        _check_values(limit=limit, lease=lease)
        _check(limit > 0, "limit", "at least 1", limit)
        _check_optional(timeout=timeout, worker=worker)
        names = _queue_names(queues)
        deadline = _deadline(timeout)
        while True:
            if worker is not None:
                self._note_worker(worker, names)
            seen = self._gateway.database.bell.generation
            claimed = await self._claim(_Claim(self, names, limit, lease, worker))
            left = deadline - time.monotonic()
            if claimed.tasks or (left <= 0 and not claimed.more):
                return claimed.tasks
            if not claimed.more:
                if worker is not None:
                    left = min(left, _NOTE_WORKER_INTERVAL)
                await self._gateway.wait(seen, left, claimed.next_due)

    async def _claim(self, claim: _Claim) -> _Claimed:
        claimed = await self._gateway.write(claim, undo=self._give_back)
        try:
            await self._log_outside(claimed.notes)
        except BaseException:
            self._give_back(claimed)
            raise
        return claimed

    def _give_back(self, claimed: _Claimed) -> None:
        """Return the tasks of a claim whose caller has gone, unharmed.

        Queued, not awaited: the caller was cancelled and would be again.
        """
        tasks = claimed.tasks

        def run(connection: sqlite3.Connection) -> None:
            with self._change(connection.cursor()) as change:
                for task in tasks:
                    with contextlib.suppress(LeaseLostError):
                        change.end(RELEASE, task, run_at=None)
                        change.note_run(EventType.RELEASED, task, "given up")
                self._log_inside(change)

        if tasks:
            self._gateway.submit(_Operation(run, flush=False))

    def _note_worker(self, worker: str, names: Sequence[str]) -> None:
        """Let others see that this worker lives, every ten seconds."""
        if not self._note_is_due(worker):
            return
        parameters = {
            "name": worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "queues": _to_json(list(names)),
            "now": self._clock(),
        }

        def run(connection: sqlite3.Connection) -> None:
            connection.execute(UPSERT_WORKER, parameters)

        self._gateway.submit(_Operation(run, flush=False))

    def _note_is_due(self, worker: str) -> bool:
        now = time.monotonic()
        due = now - self._noted.get(worker, -math.inf) >= _NOTE_WORKER_INTERVAL
        if due:
            self._noted[worker] = now
        return due

    # -- Ends of a claim --

    async def complete(self, task: Task) -> None:
        """End a task as done; its row is deleted, or kept for `retention` seconds.

        Raises: `LeaseLostError` when the claim is no longer yours.
        """
        await self.complete_many([_check_lease(task)])

    async def complete_many(self, tasks: Iterable[Task]) -> None:
        """End tasks as done in one transaction.

        Raises: `LeaseLostError` with the `task_ids` whose claim is no longer
        yours, after the others were completed.
        """
        checked = [_check_task(task, "tasks") for task in tasks]
        if not checked:
            self._gateway.database.check_open()
            return
        lost = await self._write(
            lambda change: self._complete_all(change, checked), savepoint=False
        )
        if lost:
            raise LeaseLostError([task.id for task in lost])

    def _complete_all(self, change: _Change, tasks: Sequence[Task]) -> list[Task]:
        """Complete the tasks whose lease holds; return the others."""
        done: set[str | None] = set()
        left = list({task.lease_id: task for task in tasks}.values())
        while left:
            batch = {task.id: task for task in left}  # one claim of each task
            for task_id in self._complete_batch(change, list(batch.values())):
                done.add(batch[task_id].lease_id)
                change.note_run(EventType.COMPLETED, batch[task_id])
            left = [task for task in left if batch[task.id] is not task]
        return [task for task in tasks if task.lease_id not in done]

    def _complete_batch(self, change: _Change, tasks: Sequence[Task]) -> list[str]:
        """Complete different tasks whose lease holds; return their ids."""
        if self._retention or len(tasks) > 1:
            rows = change.rows(
                KEEP_COMPLETED if self._retention else DELETE_COMPLETED,
                ids=_to_json([task.id for task in tasks]),
                lease_ids=_to_json([task.lease_id for task in tasks]),
                keep_until=change.now + self._retention,
            )
            if self._retention:  # without a backend nothing else would delete them
                change.rows(DELETE_KEPT, limit=len(tasks) + 1)
        else:
            [task] = tasks
            claim = {"id": task.id, "lease_id": task.lease_id}
            rows = change.rows(DELETE_COMPLETED_ONE, **claim)
        return [task_id for (task_id,) in rows]

    async def fail(
        self,
        task: Task,
        error: str | BaseException,
        *,
        retry: bool = True,
        delay: float | None = None,
    ) -> TaskStatus:
        """End an attempt as failed; return `SCHEDULED` (runs again) or `FAILED`.

        It runs again while attempts remain and `retry` is true, after `delay`
        seconds or, with `None`, after the task's backoff. Failed tasks are kept
        until purged.

        Raises: `LeaseLostError` when the claim is no longer yours.
        """
        return await self._fail(task, error, retry, delay, _nothing)

    async def _fail(
        self,
        task: Task,
        error: str | BaseException,
        retry: bool,
        delay: float | None,
        at_last: Callable[[_Change], object],
    ) -> TaskStatus:
        """End an attempt as failed; if it was the last one, also do `at_last`."""
        _check_lease(task)
        _check_optional(delay=delay)
        text = _error_text(error)
        seconds = _retry_delay(task) if delay is None else delay

        def run(change: _Change) -> TaskStatus:
            terms = {"retry": bool(retry), "run_at": change.now + seconds}
            [found] = change.end(FAIL, task, error=text, **terms)
            status = TaskStatus(found)
            if status is TaskStatus.FAILED:
                change.note_run(EventType.FAILED, task, text)
                at_last(change)
            else:
                change.note_run(EventType.RETRY, task, text, delay=seconds)
            return status

        return await self._write(run, savepoint=False)

    async def release(self, task: Task, *, delay: float = 0.0) -> None:
        """Give a task back for `delay` seconds; the attempt is not counted.

        Raises: `LeaseLostError` when the claim is no longer yours.
        """
        _check_lease(task)
        _check_values(delay=delay)

        def run(change: _Change) -> None:
            run_at = change.now + delay if delay > 0 else None
            change.end(RELEASE, task, run_at=run_at)
            change.note_run(EventType.RELEASED, task)

        await self._write(run, flush=False, savepoint=False)

    async def extend(
        self, task: Task, lease: float = DEFAULT_LEASE, *, progress: Any = None
    ) -> Task:
        """Set the lease to end in `lease` seconds and return the task with it.

        `progress`: stored with the task; `None` keeps what is there.

        Raises: `LeaseLostError` when the claim is no longer yours: stop working;
        `SerializationError` of the progress.
        """
        _check_lease(task)
        _check_values(lease=lease)
        kept, text = task.progress, None
        if progress is not None:
            kept, text = progress, _dump(self._serializer, "progress", progress)
        seen = task.worker is not None and self._note_is_due(task.worker)

        def run(change: _Change) -> float:
            until = change.now + lease
            change.end(EXTEND, task, lease_until=until, progress=text)
            if seen:
                change.rows(TOUCH_WORKER, name=task.worker)
            return until

        until = await self._write(run, flush=False, savepoint=False)
        extended = copy.copy(task)  # not checked: somebody else may have written it
        object.__setattr__(extended, "lease_until", _from_unix(until))
        object.__setattr__(extended, "progress", kept)
        return extended

    async def reclaim(self, worker: str) -> int:
        """End the leases of a worker that is gone; return how many there were.

        Its tasks can be claimed at once, with the attempt counted.
        """
        _check_values(worker=worker)

        def run(change: _Change) -> int:
            change.rows(DELETE_WORKER, name=worker)
            with _undecoded(change.cursor.connection):
                return _settle(change, change.rows(END_LEASES, worker=worker))

        self._noted.pop(worker, None)
        return await self._write(run)

    # -- From outside --

    async def cancel(self, task_id: str) -> bool:
        """Cancel a live task; return whether this call did.

        Scheduled or pending, it never runs. Running, its next `extend` or
        `complete` raises `LeaseLostError`; its key is free at once.
        """
        wanted = _wanted_id(task_id)
        return await self._write(lambda change: _cancel(change, CANCEL, id=wanted) > 0)

    async def cancel_all(
        self,
        *,
        queue: str | None = None,
        func: str | None = None,
        status: str | None = None,
    ) -> int:
        """Cancel every live task that matches; return how many. One transaction."""
        filters = {"queue": queue, "func": func, "status": status}
        _check_optional(**filters)
        return await self._write(lambda change: _cancel(change, CANCEL_ALL, **filters))

    async def retry(self, task_id: str) -> bool:
        """Let a failed, cancelled or expired task run again; return whether it does.

        It starts with fresh attempts; an `expires_at` that has passed is dropped.

        Raises: `DuplicateTaskError` while another task holds its key.
        """
        wanted = _wanted_id(task_id)
        return await self._write(lambda change: _retry(change, wanted))

    async def retry_all(
        self, *, queue: str | None = None, func: str | None = None
    ) -> int:
        """Let every ended task that matches run again; return how many do.

        Completed ones do not, nor those whose key is held. One transaction.
        """
        filters = {"queue": queue, "func": func}
        _check_optional(**filters)

        def run(change: _Change) -> int:
            rows = change.rows(RETRY_ALL, **filters)
            for task_id, name in rows:
                change.note(EventType.RETRY, task_id, name)
            count = len(rows)
            for (task_id,) in change.rows(SELECT_ALL_RETRYABLE, **filters):
                with contextlib.suppress(DuplicateTaskError):
                    count += _retry(change, task_id)
            return count

        return await self._write(run)

    async def pause(self, queue: str) -> None:
        """Let a queue hand out nothing, in every process, until `resume()`."""
        _check_values(queue=queue)
        await self._write(lambda change: change.rows(INSERT_PAUSE, queue=queue))

    async def resume(self, queue: str) -> None:
        """Let a paused queue hand out tasks again."""
        _check_values(queue=queue)
        await self._write(lambda change: change.rows(DELETE_PAUSE, queue=queue))

    async def purge(
        self,
        *,
        queue: str | None = None,
        status: str | None = None,
        older_than: float | None = None,
    ) -> int:
        """Delete ended tasks and return how many; live ones only by their `status`.

        `older_than`: seconds since the end. One transaction for each thousand.
        """
        _check_optional(queue=queue, status=status, older_than=older_than)
        before = None if older_than is None else self._clock() - older_than
        filters = {"queue": queue, "status": status, "before": before}
        return await self._delete(PURGE_TASKS, **filters)

    # -- Reads --

    async def get_task(self, task_id: str) -> Task | None:
        """Return a task as it stands, or `None`."""
        rows = await self._rows(SELECT_TASK, id=_wanted_id(task_id))
        return next(iter(_read("task", _task_of, rows, self._serializer)), None)

    async def list_tasks(
        self,
        *,
        queue: str | None = None,
        status: str | None = None,
        func: str | None = None,
        unique_key: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Task]:
        """Return the tasks that match, in order of insertion.

        Status as stored: what time has changed shows after the next claim or
        `cleanup()`.
        """
        filters = {"queue": queue, "status": status, "func": func}
        filters["unique_key"] = unique_key
        _check_optional(**filters)
        _check_values(limit=limit, offset=offset)
        rows = await self._rows(SELECT_TASKS, **filters, limit=limit, offset=offset)
        return _read("task", _task_of, rows, self._serializer)

    async def count_tasks(
        self, *, queue: str | None = None, status: str | None = None
    ) -> int:
        """Return how many tasks match."""
        _check_optional(queue=queue, status=status)
        [(count,)] = await self._rows(COUNT_TASKS, queue=queue, status=status)
        return int(count)

    async def stats(self) -> list[QueueStats]:
        """Return the number of tasks in each status, for each queue by name."""
        return await self._gateway.read(_read_stats)

    def _repr_html_(self) -> str:
        """Show the stats, read at once in the calling thread, as `follow` does."""
        names = [each.name for each in fields(QueueStats)]
        try:
            stats = self._gateway.database.read(_read_stats)
        except OmniQError as error:
            return _notebook_table([repr(self)], [[str(error)]])
        rows = [[getattr(queue, name) for name in names] for queue in stats]
        return _notebook_table(names, rows)

    async def list_queues(self) -> list[str]:
        """Return the names of the queues that hold tasks or are paused."""
        return [name for (name,) in await self._rows(SELECT_QUEUES)]

    async def list_workers(self) -> list[WorkerInfo]:
        """Return the consumers that gave a name to `dequeue`, as last seen."""
        return _read("worker", _worker_of, await self._rows(SELECT_WORKERS), _JSON)

    # -- Upkeep, for the backend --

    async def _clean_up(self) -> dict[str, int]:
        """Settle what is due, delete what was kept long enough; in small steps."""
        settled = 0

        def find(connection: sqlite3.Connection) -> list[Row]:
            with _undecoded(connection):
                return connection.execute(SELECT_DUE_QUEUES, now).fetchall()

        now = {"now": self._clock()}
        for (name,) in await self._gateway.read(find):
            with contextlib.suppress(UnicodeDecodeError):  # no call can name that one
                settled += await self._settle_queue(name.decode())
        deleted = await _in_steps(_SETTLE_LIMIT, partial(self._write, _delete_old))
        return {"settled": settled, "tasks": deleted}

    async def _settle_queue(self, name: str) -> int:
        settle = partial(_settle_due, queue=name)
        return await _in_steps(_SETTLE_LIMIT, partial(self._write, settle))


def _delete_old(change: _Change) -> int:
    """Forget workers that were not seen for long, and delete tasks past retention."""
    change.rows(DELETE_OLD_WORKERS, before=change.now - _FORGET_WORKER_AFTER)
    return len(change.rows(DELETE_KEPT, limit=_SETTLE_LIMIT))


def _read_stats(connection: sqlite3.Connection) -> list[QueueStats]:
    pauses = connection.execute(SELECT_PAUSES).fetchall()
    counts = connection.execute(SELECT_STATS).fetchall()
    found: dict[str, dict[str, Any]] = {name: {"paused": True} for (name,) in pauses}
    for name, values in _read("queue", _counts_of, counts, _JSON):
        found.setdefault(name, {}).update(values)
    return [QueueStats(name, **values) for name, values in sorted(found.items())]


def _counts_of(row: Row, _serializer: Serializer) -> tuple[str, dict[str, Any]]:
    name, status, count, oldest = row
    known = status in _TASK_STATUSES  # another one is of somebody else's making
    values: dict[str, Any] = {status: count} if known else {}
    if status == "pending":
        values["oldest_pending_at"] = _from_unix(oldest)
    return name, values


def _worker_of(row: Row, serializer: Serializer) -> WorkerInfo:
    name, host, pid, queues, started_at, seen_at, running = row
    names = tuple(_load(serializer, "queues", queues))
    start, seen = (datetime.fromtimestamp(at, UTC) for at in (started_at, seen_at))
    return WorkerInfo(name, host, pid, names, start, seen, running)


def _event_of_note(note: Mapping[str, Any]) -> TaskEvent:
    values = {"at": _from_unix(note["at"]), "details": json.loads(note["details"])}
    return TaskEvent(**{**note, **values})


# -- The caller's own connection --


def _foreign_cursor(
    connection: sqlite3.Connection, database: _Database
) -> sqlite3.Cursor:
    """Return a cursor on the caller's connection, which must be to our file."""
    if not isinstance(connection, sqlite3.Connection):
        raise TypeError(
            f"connection must be a sqlite3.Connection, not {type(connection).__name__}"
        )
    try:
        cursor = _plain_cursor(connection)
        file = _main_file(cursor)
    except sqlite3.ProgrammingError as error:  # closed, or of another thread
        raise ValueError(f"connection cannot be used here: {error}") from error
    if database.memory or not _is_same_file(file, database.path):
        raise ValueError(f"connection must be open on {database.path!r}, not {file!r}")
    return cursor


def _main_file(cursor: sqlite3.Cursor) -> str:
    """Return the file that a connection is open on; "" for one in memory."""
    rows = cursor.execute("PRAGMA database_list").fetchall()
    return next((os.fsdecode(row[2]) for row in rows if _text(row[1]) == "main"), "")


def _is_same_file(file: str, path: str) -> bool:
    try:
        return os.path.samefile(file, path)
    except OSError:
        return False


@contextlib.contextmanager
def _foreign_transaction(
    connection: sqlite3.Connection, cursor: sqlite3.Cursor
) -> Generator[None]:
    """See that a transaction is open; one that was begun here ends with an error."""
    began = not connection.in_transaction
    if began:
        legacy = getattr(connection, "autocommit", -1) == -1  # Python 3.12 has it
        if not legacy or connection.isolation_level is None:
            raise ValueError(
                "connection is in autocommit mode without a transaction; begin one"
            )
        cursor.execute("BEGIN IMMEDIATE")
    try:
        if _has_wal_reset_bug(sqlite3.sqlite_version_info):
            cursor.execute("PRAGMA main.wal_autocheckpoint = 0").fetchall()
        yield
    except BaseException:
        if began and connection.in_transaction:
            cursor.execute("ROLLBACK")
        raise


# =============================================================================
# Results
# =============================================================================


_MAX_TRACEBACK_LENGTH = 50_000  # characters


def _result_parameters(
    result: TaskResult, serializer: Serializer, now: float, ttl: float | None
) -> dict[str, Any]:
    """Return the parameters of `UPSERT_RESULT`."""
    if not isinstance(result, TaskResult):
        raise TypeError(f"result must be a TaskResult, not {type(result).__name__}")
    trace = result.traceback
    return {
        "task_id": result.task_id,
        "status": result.status.value,
        "value": _dump(serializer, "value", result.value),
        "error": result.error and _clean_text(result.error),
        "error_type": result.error_type and _clean_text(result.error_type, 1_000),
        "traceback": trace and _clean_text(trace, _MAX_TRACEBACK_LENGTH),
        "started_at": _to_unix(result.started_at),
        "finished_at": _to_unix(result.finished_at),
        "worker": result.worker,
        "attempt": result.attempt,
        "claim": result.claim,
        "metadata": _dump_mapping(serializer, "metadata", result.metadata),
        "stored_at": now,
        "expires_at": None if ttl is None or ttl == math.inf else now + ttl,
    }


def _result_of(row: Row, serializer: Serializer) -> TaskResult:
    """Build a `TaskResult` from the columns of the selects."""
    (
        task_id, status, value, error, error_type, trace, started_at, finished_at,
        worker, attempt, metadata, claim,
    ) = row  # fmt: skip
    return TaskResult(
        task_id,
        status,
        _load(serializer, "value", value),
        error,
        error_type,
        trace,
        _from_unix(started_at),
        _from_unix(finished_at),
        worker,
        attempt,
        _load_mapping(serializer, "metadata", metadata),
        claim,
    )


def _check_ttl(ttl: float | None) -> None:
    if ttl != math.inf:
        _check_optional(ttl=ttl)


class AsyncSQLiteResultStorage(_AsyncStorage):
    """A store for the results of tasks in an SQLite file, for asyncio.

    `ttl`: seconds that a result is kept, `None` for ever. The other parameters
    are those of `AsyncSQLiteQueue`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ttl: float | None = DEFAULT_RESULT_TTL,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        self._set_up(_new_gateway(path, arguments, "results"), arguments)

    def _set_up(self, gateway: _Gateway, arguments: dict[str, Any]) -> None:
        super()._set_up(gateway, arguments)
        _check_ttl(arguments["ttl"])
        self._ttl: float | None = arguments["ttl"]

    def _row_of(self, result: TaskResult, ttl: float | None = None) -> dict[str, Any]:
        life = self._ttl if ttl is None else ttl
        return _result_parameters(result, self._serializer, self._clock(), life)

    async def store(self, result: TaskResult, *, ttl: float | None = None) -> None:
        """Store a result; it replaces one of the same task, unless that is newer.

        `ttl`: seconds that it is kept, `math.inf` for ever, `None` for the
        storage's own.

        Raises: `SerializationError` naming the place in the value.
        """
        _check_ttl(ttl)
        await self._put(UPSERT_RESULT, [self._row_of(result, ttl)])

    async def store_many(self, results: Iterable[TaskResult]) -> None:
        """Store results in one transaction, all or nothing.

        Raises: `SerializationError`, then none was stored.
        """
        await self._put(UPSERT_RESULT, [self._row_of(result) for result in results])

    async def get(self, task_id: str) -> TaskResult | None:
        """Return the result of a task, or `None`; it stays there."""
        return (await self.get_many([_wanted_id(task_id)])).get(task_id)

    async def get_many(self, ids: Iterable[str]) -> dict[str, TaskResult]:
        """Return the results that there are, by task id."""
        sought = {"ids": _wanted_ids(ids), "now": self._clock()}
        rows = await self._rows(SELECT_RESULTS_BY_ID, **sought)
        results = _read("result of task", _result_of, rows, self._serializer)
        return {result.task_id: result for result in results}

    async def wait(self, task_id: str, *, timeout: float | None = None) -> TaskResult:
        """Return the result of a task once it is there.

        Wakes within milliseconds of a commit by any process. `timeout`: seconds,
        `None` waits for ever.

        Raises: `TimeoutError`.
        """
        _check_optional(timeout=timeout)
        deadline = _deadline(timeout)
        pace = _Pace(self._gateway, deadline)
        while True:
            await pace.rest()
            seen = self._gateway.database.bell.generation
            if (result := await self.get(task_id)) is not None:
                return result
            pace.looked()
            left = _time_left(deadline, task_id, timeout)
            await self._gateway.wait(seen, left)

    async def delete(self, task_id: str) -> bool:
        """Delete the result of a task; return whether there was one."""
        parameters = {"task_id": _wanted_id(task_id)}
        now = self._clock()

        def run(connection: sqlite3.Connection) -> bool:
            rows = connection.execute(DELETE_RESULT, parameters).fetchall()
            return any(end is None or end > now for (end,) in rows)

        return await self._gateway.write(_Operation(run))

    async def list_results(
        self, *, status: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[TaskResult]:
        """Return results in the order in which their tasks first ended."""
        rule, holds = _RULES["TaskResult.status"]
        _check(status is None or holds(status), "status", rule + " or None", status)
        _check_values(limit=limit, offset=offset)
        page = {"limit": limit, "offset": offset, "now": self._clock()}
        rows = await self._rows(SELECT_RESULTS, status=status, **page)
        return _read("result of task", _result_of, rows, self._serializer)

    async def purge(self, *, older_than: float | None = None) -> int:
        """Delete expired results, or also those older; return how many.

        `older_than`: seconds since they were stored. One transaction for each
        thousand.
        """
        _check_optional(older_than=older_than)
        now = self._clock()
        if older_than is None:
            return await self._delete(PURGE_EXPIRED_RESULTS, now=now)
        times = {"now": now, "before": now - older_than}
        return await self._delete(PURGE_OLD_RESULTS, **times)


class _Pace:
    """How often a waiter looks: for no more than a fifth of its time.

    Every commit of anybody wakes everybody. So where many wait, those that have
    waited for long look less often, by no more than a tenth of that time: 200 threads
    that waited for results slowed others down to a tenth.
    """

    def __init__(self, gateway: _Gateway, deadline: float) -> None:
        self._gateway = gateway
        self._deadline = deadline
        self._since = self._rest_until = time.monotonic()
        self._took = 0.0
        gateway.database.paces.add(self)

    async def rest(self) -> None:
        """Wait before a look, but not past the deadline."""
        pause = min(self._rest_until, self._deadline) - time.monotonic()
        if pause > _LEAST_REST:
            await self._gateway.sleep(pause)
        self._began = time.monotonic()

    def looked(self) -> None:
        now, others = time.monotonic(), len(self._gateway.database.paces) - 1
        fair = min(others * _LEAST_REST, (now - self._since) / 10)
        # Two looks have to be slow: one may be because the loop was blocked.
        took, self._took = min(now - self._began, self._took), now - self._began
        rest = max(4 * took, fair)
        self._rest_until = now + min(rest, _LONGEST_REST)


def _time_left(deadline: float, task_id: str, timeout: float | None) -> float:
    """Return for how long a result may still be waited for."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"no result of task {task_id!r} after {timeout} s")
    return left


# =============================================================================
# Events
# =============================================================================

_FOLLOW_BATCH = 256  # events that a follower reads at once


def _event_parameters(event: TaskEvent, serializer: Serializer) -> dict[str, Any]:
    """Return the parameters of `INSERT_EVENT`."""
    if not isinstance(event, TaskEvent):
        raise TypeError(f"event must be a TaskEvent, not {type(event).__name__}")
    return {
        "at": _to_unix(event.at),
        "type": str(event.type),
        "task_id": event.task_id,
        "queue": event.queue,
        "worker": event.worker,
        "message": _clean_text(event.message),
        "details": _dump_mapping(serializer, "details", event.details),
    }


def _event_of(row: Row, serializer: Serializer) -> TaskEvent:
    event_id, at, kind, task_id, queue, worker, message, details = row
    details = _load_mapping(serializer, "details", details)
    when = cast(datetime, _from_unix(at))
    return TaskEvent(
        kind, task_id, queue, message, details, worker, when, str(event_id)
    )


def _cursor_number(after: str | None) -> int:
    """Return the number behind an event's id."""
    if after is None:
        return 0
    fine = isinstance(after, str) and after.isascii() and after.isdigit()
    _check(fine and int(after) <= _MAX_INTEGER, "after", "the id of an event", after)
    return int(after)


def _event_filter(
    after: str | None, since: datetime | None, until: datetime | None, **others: Any
) -> tuple[str, dict[str, Any]]:
    """Return the way to find these events, and its parameters."""
    _check_optional(since=since, until=until, **others)
    times = {"since": _to_unix(since), "until": _to_unix(until)}
    way = "time" if since is not None else "id"
    if others["task_id"] is not None:
        way = "task"
    return way, {"after": _cursor_number(after), **times, **others}


class AsyncSQLiteEventStorage(_AsyncStorage):
    """A log of what happened to tasks in an SQLite file, for asyncio.

    `retention`: seconds that events are kept, `None` for ever; a backend's
    `cleanup()` deletes older ones. The other parameters are those of
    `AsyncSQLiteQueue`. Pass it as `events=` to a queue that shall log.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        retention: float | None = DEFAULT_EVENT_RETENTION,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        self._set_up(_new_gateway(path, arguments, "events"), arguments)

    def _set_up(self, gateway: _Gateway, arguments: dict[str, Any]) -> None:
        super()._set_up(gateway, arguments)
        self._retention: float | None = arguments["retention"]
        _check_optional(retention=self._retention)

    async def log(self, event: TaskEvent) -> None:
        """Add an event."""
        await self.log_many([event])

    async def log_many(self, events: Iterable[TaskEvent]) -> None:
        """Add events in one transaction, all or nothing, in this order.

        Raises: `SerializationError` of their details, then none was added.
        """
        rows = [_event_parameters(event, self._serializer) for event in events]
        await self._put(INSERT_EVENT, rows)

    async def query(
        self,
        *,
        task_id: str | None = None,
        queue: str | None = None,
        type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[TaskEvent]:
        """Return the events that match, in the order in which they were logged.

        `since` is inclusive, `until` exclusive; `after`: the id of an event.
        """
        _check_values(limit=limit)
        others = {"task_id": task_id, "queue": queue, "type": type}
        way, filters = _event_filter(after, since, until, **others)
        if way == "time" and await self._rows(MANY_SINCE, since=filters["since"]):
            way = "id"  # to walk past others is quicker than to sort so many
        statement = SELECT_EVENTS[way, bool(newest_first)]
        return self._read(await self._rows(statement, limit=limit, **filters))

    def _read(self, rows: Iterable[Row]) -> list[TaskEvent]:
        return _read("event", _event_of, rows, self._serializer)

    async def count(
        self,
        *,
        task_id: str | None = None,
        queue: str | None = None,
        type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: str | None = None,
    ) -> int:
        """Return how many events match."""
        others = {"task_id": task_id, "queue": queue, "type": type}
        way, filters = _event_filter(after, since, until, **others)
        [(count,)] = await self._rows(COUNT_EVENTS[way], **filters)
        return int(count)

    def follow(self, *, after: str | None = None) -> AsyncEventFollower:
        """Return an iterator that waits for new events.

        From this call on, for which it reads the end of the log at once, in the
        calling thread (some microseconds); or from after the event `after`, where
        "0" is before the first. `aclose()` ends it.
        """
        if after is None:
            return AsyncEventFollower(self, self._gateway.database.read(_last_event))
        return AsyncEventFollower(self, _cursor_number(after))

    async def purge(self, *, older_than: float) -> int:
        """Delete events older than so many seconds; return how many.

        One transaction for each thousand.
        """
        _check_values(older_than=older_than)
        before = self._clock() - older_than
        return await self._delete(PURGE_EVENTS, before=before)


def _last_event(connection: sqlite3.Connection) -> int:
    [(last,)] = connection.execute(SELECT_LAST_EVENT).fetchall()
    return int(last)


class AsyncEventFollower:
    """Yields events as they are logged, by any process; made by `follow()`.

    A class and not a generator: an abandoned generator is finalised by
    whichever loop happens to run.
    """

    def __init__(self, storage: AsyncSQLiteEventStorage, after: int) -> None:
        self._storage = storage
        self._after = after
        self._ready: collections.deque[Row] = collections.deque()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskEvent:
        event = await self._next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def _next(self) -> TaskEvent | None:
        gateway = self._storage._gateway
        while not self._closed:
            if self._ready:
                row = self._ready.popleft()
                self._after = row[0]  # also of one that cannot be read
                [event] = self._storage._read([row])
                return event
            seen = gateway.database.bell.generation
            any_of = dict.fromkeys(("task_id", "queue", "type", "since", "until"))
            terms = {"after": self._after, "limit": _FOLLOW_BATCH, **any_of}
            self._ready += await self._storage._rows(
                SELECT_EVENTS["id", False], **terms
            )
            if not self._ready:
                await gateway.wait(seen, None)
        return None

    async def aclose(self) -> None:
        """End the iteration, also one that waits at this moment."""
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._storage._gateway.database.bell.ring()


# =============================================================================
# Blocking twins
# =============================================================================
#
# Each has an async object and runs its coroutines: to their end in the calling
# thread over a direct gateway, or, when made by `from_async`, in the loop of the
# async object. The methods are written out, so that editors and type checkers
# see them; a test compares them with the async ones. What is needed of anyio is
# imported where it is needed: it takes 8 ms that most programs never spend.

A = TypeVar("A", bound="_AsyncStorage")


class _Twin(Generic[A]):
    """What the blocking classes share."""

    _async: A
    _arguments: dict[str, Any]
    _loop: asyncio.AbstractEventLoop | None = None  # of `from_async`
    _loop_thread = 0
    _detached = False

    @classmethod
    def _over(cls, storage: A, arguments: dict[str, Any]) -> Self:
        """Make a twin over an async object that is driven directly."""
        self = cls.__new__(cls)
        self._async = storage
        self._arguments = arguments
        return self

    def _set_up(self, storage: A, arguments: dict[str, Any]) -> None:
        storage._use_directly()
        self._async = storage
        self._arguments = arguments

    @classmethod
    def from_async(cls, storage: A) -> Self:
        """Return a twin over a live async object, for threads beside its loop.

        Call it where that loop runs; use the twin in any other thread. Closing it
        leaves the async object open.
        """
        self = cls._over(storage, getattr(storage, "_arguments", {}))
        self._loop = _running_loop("from_async() must be called where the loop runs")
        self._loop_thread = threading.get_ident()
        return self

    def _check_usable(self) -> None:
        if self._detached:
            raise StorageClosedError(self.path)

    def _run(
        self,
        method: Callable[P, Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        if self._loop is None:
            return _shielded(lambda: _drive(method, *args, **kwargs))
        self._check_usable()
        if threading.get_ident() == self._loop_thread and not self._loop.is_closed():
            raise RuntimeError(
                "a twin made by from_async() would block its own event loop here;"
                " await the async object, or use the twin in another thread"
            )
        call = partial(method, *args, **kwargs)
        return _shielded(_LoopCall(self._loop, self.path, call).run)

    @property
    def path(self) -> str:
        """The absolute path of the file, or ":memory:"."""
        return getattr(self._async, "path", repr(self._async))  # of another engine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if _is_in_memory(self.path, self._arguments):
            raise TypeError(f"{type(self).__name__} on ':memory:' cannot be pickled")
        if self._loop is not None:
            raise TypeError(f"{type(self).__name__} of from_async() is of one loop")
        return partial(cast(Any, type(self)), self.path, **self._arguments), ()

    def close(self) -> None:
        """Close what this object opened; what was asked for before is finished."""
        if self._loop is not None:
            self._detached = True
        else:
            self._run(self._async.close)

    def __enter__(self) -> Self:
        self._run(self._async._open)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        from anyio import to_thread

        return await to_thread.run_sync(self.__enter__)

    async def __aexit__(self, *_: object) -> None:
        from anyio import CancelScope, to_thread

        with CancelScope(shield=True):  # also where the block was cancelled
            await to_thread.run_sync(self.close)


class _Unblocked:
    """Gives a blocking storage of another engine the form that the core awaits.

    It may be built on one of ours. So it is called as outside of the call under way,
    which holds nothing at this moment, and whose claim is still given back.
    """

    def __init__(self, storage: object) -> None:
        self._storage = storage

    def __repr__(self) -> str:
        return repr(self._storage)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self._storage, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            ident = threading.get_ident()
            inside, undo = ident in _operating, _undo.pop(ident, _nothing)
            _operating.discard(ident)
            try:
                return method(*args, **kwargs)
            finally:
                if inside:
                    with _operating_lock:
                        _operating.add(ident)
                    _undo[ident] = undo

        return call


def _unblocked(storage: Any) -> Any:
    """Return what the core awaits in the place of a blocking storage."""
    if storage is None:
        return None
    if isinstance(storage, _Twin) and storage._loop is None:
        return storage._async
    if isinstance(storage, _AsyncStorage):
        raise TypeError(
            f"a blocking object needs blocking parts, not {type(storage).__name__}"
        )
    return _Unblocked(storage)


class SQLiteQueue(_Twin[AsyncSQLiteQueue]):
    """A task queue in an SQLite file; blocking twin of `AsyncSQLiteQueue`.

    The parameters are the same, and each method does what the async one's docstring
    says. Any number of threads may use one object, also beside a running event loop.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        events: EventStorage | None = None,
        retention: float = 0.0,
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        awaited = arguments | {"events": _unblocked(events)}
        self._set_up(AsyncSQLiteQueue(path, **awaited), arguments)

    def enqueue(self, task: Task, *, delay: float = 0.0) -> str:
        """Add a task and return its id, or the id of the live one with its key."""
        return self._run(self._async.enqueue, task, delay=delay)

    def enqueue_many(self, tasks: Iterable[Task]) -> list[str]:
        """Add tasks in one transaction, all or nothing, and return their ids."""
        return self._run(self._async.enqueue_many, tasks)

    def enqueue_on(
        self, connection: sqlite3.Connection | aiosqlite.Connection, *tasks: Task
    ) -> list[str]:
        """Add tasks inside the caller's own transaction and return their ids."""
        if isinstance(connection, aiosqlite.Connection):
            raise TypeError("connection must be a sqlite3.Connection here")
        self._check_usable()
        # In this thread in every case: the connection belongs to it.
        return self._async._enqueue_on(connection, tasks)

    def dequeue(
        self,
        queues: QueueNames = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = DEFAULT_LEASE,
        worker: str | None = None,
    ) -> Task | None:
        """Claim the next task, or return `None` after `timeout` seconds."""
        return self._run(
            self._async.dequeue, queues, timeout=timeout, lease=lease, worker=worker
        )

    def dequeue_many(
        self,
        limit: int,
        queues: QueueNames = "default",
        *,
        timeout: float | None = 0.0,
        lease: float = DEFAULT_LEASE,
        worker: str | None = None,
    ) -> list[Task]:
        """Claim up to `limit` tasks in one transaction; return when there is one."""
        return self._run(
            self._async.dequeue_many,
            limit,
            queues,
            timeout=timeout,
            lease=lease,
            worker=worker,
        )

    def complete(self, task: Task) -> None:
        """End a task as done; its row is deleted, or kept for `retention` seconds."""
        return self._run(self._async.complete, task)

    def complete_many(self, tasks: Iterable[Task]) -> None:
        """End tasks as done in one transaction."""
        return self._run(self._async.complete_many, tasks)

    def fail(
        self,
        task: Task,
        error: str | BaseException,
        *,
        retry: bool = True,
        delay: float | None = None,
    ) -> TaskStatus:
        """End an attempt as failed; return `SCHEDULED` (runs again) or `FAILED`."""
        return self._run(self._async.fail, task, error, retry=retry, delay=delay)

    def release(self, task: Task, *, delay: float = 0.0) -> None:
        """Give a task back for `delay` seconds; the attempt is not counted."""
        return self._run(self._async.release, task, delay=delay)

    def extend(
        self, task: Task, lease: float = DEFAULT_LEASE, *, progress: Any = None
    ) -> Task:
        """Set the lease to end in `lease` seconds and return the task with it."""
        return self._run(self._async.extend, task, lease, progress=progress)

    def reclaim(self, worker: str) -> int:
        """End the leases of a worker that is gone; return how many there were."""
        return self._run(self._async.reclaim, worker)

    def cancel(self, task_id: str) -> bool:
        """Cancel a live task; return whether this call did."""
        return self._run(self._async.cancel, task_id)

    def cancel_all(
        self,
        *,
        queue: str | None = None,
        func: str | None = None,
        status: str | None = None,
    ) -> int:
        """Cancel every live task that matches; return how many. One transaction."""
        return self._run(self._async.cancel_all, queue=queue, func=func, status=status)

    def retry(self, task_id: str) -> bool:
        """Let a failed, cancelled or expired task run again; return whether it does."""
        return self._run(self._async.retry, task_id)

    def retry_all(self, *, queue: str | None = None, func: str | None = None) -> int:
        """Let every ended task that matches run again; return how many do."""
        return self._run(self._async.retry_all, queue=queue, func=func)

    def pause(self, queue: str) -> None:
        """Let a queue hand out nothing, in every process, until `resume()`."""
        return self._run(self._async.pause, queue)

    def resume(self, queue: str) -> None:
        """Let a paused queue hand out tasks again."""
        return self._run(self._async.resume, queue)

    def purge(
        self,
        *,
        queue: str | None = None,
        status: str | None = None,
        older_than: float | None = None,
    ) -> int:
        """Delete ended tasks and return how many; live ones only by their `status`."""
        return self._run(
            self._async.purge, queue=queue, status=status, older_than=older_than
        )

    def get_task(self, task_id: str) -> Task | None:
        """Return a task as it stands, or `None`."""
        return self._run(self._async.get_task, task_id)

    def list_tasks(
        self,
        *,
        queue: str | None = None,
        status: str | None = None,
        func: str | None = None,
        unique_key: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Task]:
        """Return the tasks that match, in order of insertion."""
        return self._run(
            self._async.list_tasks,
            queue=queue,
            status=status,
            func=func,
            unique_key=unique_key,
            limit=limit,
            offset=offset,
        )

    def count_tasks(
        self, *, queue: str | None = None, status: str | None = None
    ) -> int:
        """Return how many tasks match."""
        return self._run(self._async.count_tasks, queue=queue, status=status)

    def stats(self) -> list[QueueStats]:
        """Return the number of tasks in each status, for each queue by name."""
        return self._run(self._async.stats)

    def list_queues(self) -> list[str]:
        """Return the names of the queues that hold tasks or are paused."""
        return self._run(self._async.list_queues)

    def list_workers(self) -> list[WorkerInfo]:
        """Return the consumers that gave a name to `dequeue`, as last seen."""
        return self._run(self._async.list_workers)

    def _repr_html_(self) -> str:
        return self._async._repr_html_()


class SQLiteResultStorage(_Twin[AsyncSQLiteResultStorage]):
    """A store for results; blocking twin of `AsyncSQLiteResultStorage`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ttl: float | None = DEFAULT_RESULT_TTL,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        self._set_up(AsyncSQLiteResultStorage(path, **arguments), arguments)

    def store(self, result: TaskResult, *, ttl: float | None = None) -> None:
        """Store a result; it replaces one of the same task, unless that is newer."""
        return self._run(self._async.store, result, ttl=ttl)

    def store_many(self, results: Iterable[TaskResult]) -> None:
        """Store results in one transaction, all or nothing."""
        return self._run(self._async.store_many, results)

    def get(self, task_id: str) -> TaskResult | None:
        """Return the result of a task, or `None`; it stays there."""
        return self._run(self._async.get, task_id)

    def get_many(self, ids: Iterable[str]) -> dict[str, TaskResult]:
        """Return the results that there are, by task id."""
        return self._run(self._async.get_many, ids)

    def wait(self, task_id: str, *, timeout: float | None = None) -> TaskResult:
        """Return the result of a task once it is there."""
        return self._run(self._async.wait, task_id, timeout=timeout)

    def delete(self, task_id: str) -> bool:
        """Delete the result of a task; return whether there was one."""
        return self._run(self._async.delete, task_id)

    def list_results(
        self, *, status: str | None = None, limit: int = 100, offset: int = 0
    ) -> list[TaskResult]:
        """Return results in the order in which their tasks first ended."""
        return self._run(
            self._async.list_results, status=status, limit=limit, offset=offset
        )

    def purge(self, *, older_than: float | None = None) -> int:
        """Delete expired results, or also those older; return how many."""
        return self._run(self._async.purge, older_than=older_than)


class SQLiteEventStorage(_Twin[AsyncSQLiteEventStorage]):
    """A log of what happened; blocking twin of `AsyncSQLiteEventStorage`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        retention: float | None = DEFAULT_EVENT_RETENTION,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        self._set_up(AsyncSQLiteEventStorage(path, **arguments), arguments)

    def log(self, event: TaskEvent) -> None:
        """Add an event."""
        return self._run(self._async.log, event)

    def log_many(self, events: Iterable[TaskEvent]) -> None:
        """Add events in one transaction, all or nothing, in this order."""
        return self._run(self._async.log_many, events)

    def query(
        self,
        *,
        task_id: str | None = None,
        queue: str | None = None,
        type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[TaskEvent]:
        """Return the events that match, in the order in which they were logged."""
        return self._run(
            self._async.query,
            task_id=task_id,
            queue=queue,
            type=type,
            since=since,
            until=until,
            after=after,
            limit=limit,
            newest_first=newest_first,
        )

    def count(
        self,
        *,
        task_id: str | None = None,
        queue: str | None = None,
        type: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: str | None = None,
    ) -> int:
        """Return how many events match."""
        return self._run(
            self._async.count,
            task_id=task_id,
            queue=queue,
            type=type,
            since=since,
            until=until,
            after=after,
        )

    def follow(self, *, after: str | None = None) -> EventFollower:
        """Return an iterator that waits for new events."""
        self._check_usable()
        return EventFollower(self, self._async.follow(after=after))

    def purge(self, *, older_than: float) -> int:
        """Delete events older than so many seconds; return how many."""
        return self._run(self._async.purge, older_than=older_than)


class _Stream(Generic[T]):
    """A blocking iterator over an async one."""

    def __init__(self, storage: _Twin[Any], stream: Any) -> None:
        self._storage = storage
        self._async = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        item: T | None = self._storage._run(self._async._next)
        if item is None:
            raise StopIteration
        return item


class EventFollower(_Stream[TaskEvent]):
    """Yields events as they are logged, by any process; made by `follow()`."""

    def close(self) -> None:
        """End the iteration, also one that waits at this moment in another thread."""
        self._async._end()


# =============================================================================
# Backend
# =============================================================================
#
# Queue, results and events, each on the backend's file, on a file of its own, or
# any object of that interface. Those on the backend's file share one connection
# manager, so that ending a task and storing its result is one commit.

Where = bool | str | os.PathLike[str] | None
"""Where a part is: `True` (the backend's file), a path, `False` (nowhere)."""

_VACUUM_PAGES = 500  # free pages that one cleanup gives back
_WORKER_STALE_AFTER = 60.0  # seconds without a sign of life

_RESULT_OF_STATUS = {
    TaskStatus.COMPLETED: (ResultStatus.SUCCESS, None, None),
    TaskStatus.FAILED: (ResultStatus.ERROR, "TaskFailed", None),
    TaskStatus.CANCELLED: (ResultStatus.CANCELLED, None, "the task was cancelled"),
    TaskStatus.EXPIRED: (
        ResultStatus.ERROR,
        "TaskExpired",
        "the task expired before it was started",
    ),
}
_STATUS_OF_RESULT = {
    ResultStatus.SUCCESS: TaskStatus.COMPLETED,
    ResultStatus.ERROR: TaskStatus.FAILED,
    ResultStatus.CANCELLED: TaskStatus.CANCELLED,
}


def _result_of_run(
    task: Task, status: ResultStatus, finished_at: datetime | None, **values: Any
) -> TaskResult:
    """Return the result of a task's present or last run."""
    return TaskResult(
        task.id,
        status,
        started_at=task.started_at,
        finished_at=finished_at,
        worker=task.worker,
        attempt=task.attempt,
        metadata=task.metadata,
        claim=task.claims,
        **values,
    )


def _result_of_row(task: Task, stored: TaskResult | None) -> TaskResult:
    """Return what was stored by the claim that ended a task, or make it from the row.

    One of another claim does not count: the task was retried since, or an earlier
    task had the same id.
    """
    ended = task.status in (TaskStatus.COMPLETED, TaskStatus.FAILED)
    if ended and stored:
        claim = (stored.claim, stored.started_at)
        if stored.claim is None or claim == (task.claims, task.started_at):
            return stored
    status, kind, error = _RESULT_OF_STATUS[cast(TaskStatus, task.status)]
    if task.status is TaskStatus.EXPIRED and task.error:
        error = f"{error} again; before that: {task.error}"
    terms = {"error": error or task.error, "error_type": kind}
    return _result_of_run(task, status, task.finished_at, **terms)


def _store(change: _Change, rows: Sequence[dict[str, Any]]) -> None:
    if rows:  # else there may be no such table
        _write_rows(change.cursor, UPSERT_RESULT, rows)


def _is_here(where: Any, path: str | os.PathLike[str]) -> bool:
    """Tell whether a part, also an event storage given, is on a backend's own file."""
    if isinstance(where, (str, os.PathLike)):
        return _are_one_file(where, path)
    return where is True or _is_event_log_of(where, path)


def _is_ready(part: object) -> bool:
    """Tell whether a part is an object already, and not a place or nothing."""
    return part is not None and not isinstance(part, (bool, str, os.PathLike))


def _has_ready_parts(arguments: Mapping[str, object]) -> bool:
    """Tell whether a backend of these arguments has objects that were given."""
    return any(_is_ready(arguments[name]) for name in _PARTS)


def _is_in_memory(path: str, arguments: Mapping[str, object]) -> bool:
    """Tell whether `path`, or the place of a part, is this object's alone."""
    places = (path, *(arguments.get(name) for name in _PARTS))
    return ":memory:" in [str(p) for p in places if isinstance(p, str | os.PathLike)]


class AsyncSQLiteBackend(_AsyncStorage):
    """Queue, results and events together, for asyncio.

    `queue`, `results`, `events`: each `True` for a place on `path`, a path for a
    file of its own, a ready object of the interface, `False` for none, or `None`
    for the default: queue and results on `path`, no events. `result_ttl` and
    `event_retention`: seconds, `None` for ever. The other options are those of
    `AsyncSQLiteQueue`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queue: Where | AsyncTaskQueue = None,
        results: Where | AsyncResultStorage = None,
        events: Where | AsyncEventStorage = None,
        result_ttl: float | None = DEFAULT_RESULT_TTL,
        event_retention: float | None = DEFAULT_EVENT_RETENTION,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        retention: float = 0.0,
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        queue = True if queue is None else queue
        results = True if results is None else results
        _check(queue is not False, "queue", "True, a path or a queue", queue)
        parts = {"queue": queue, "results": results, "events": events}
        here = [name for name, where in parts.items() if _is_here(where, path)]
        self._set_up(_new_gateway(path, arguments, *here), arguments)
        self._closable: list[_AsyncStorage] = []
        self._events: AsyncEventStorage | None = self._part(
            AsyncSQLiteEventStorage, "events", events, retention=event_retention
        )
        self._results: AsyncResultStorage | None = self._part(
            AsyncSQLiteResultStorage, "results", results, ttl=result_ttl
        )
        terms = {"retention": retention, "events": self._events}
        self._queue: AsyncTaskQueue = self._part(
            AsyncSQLiteQueue, "queue", queue, **terms
        )

    # -- Parts --

    @property
    def queue(self) -> AsyncSQLiteQueue:
        """The queue."""
        return cast(AsyncSQLiteQueue, self._queue)

    @property
    def results(self) -> AsyncSQLiteResultStorage | None:
        """The result storage, or `None`."""
        return cast("AsyncSQLiteResultStorage | None", self._results)

    @property
    def events(self) -> AsyncSQLiteEventStorage | None:
        """The event storage, or `None`."""
        return cast("AsyncSQLiteEventStorage | None", self._events)

    def _part(self, cls: Any, name: str, where: Any, **own: Any) -> Any:
        """Return a part: on our file, on a file of its own, or the object given."""
        if where is None or where is False:
            return None
        if _is_ready(where):
            return _check_part(where, name)
        shared = (*_SHARED_OPTIONS, "serializer")
        options = {name: self._arguments[name] for name in shared} | own
        if _is_here(where, self.path):
            return cls._over(self._gateway, options)
        for other in self._closable:
            if _are_one_file(where, other.path):
                database = other._gateway.database
                both = _is_event_log_of(own.get("events"), where)
                wanted = (name, "events") if both else (name,)
                database.components += tuple(set(wanted) - set(database.components))
                return cls._over(other._gateway, options)
        self._closable.append(cls(where, **options))
        return self._closable[-1]

    def _own_parts(self) -> list[_AsyncStorage]:
        """Return the parts of this module's classes."""
        parts: tuple[object, ...] = (self._queue, self._results, self._events)
        return [part for part in parts if isinstance(part, _AsyncStorage)]

    def _use_directly(self) -> None:
        """Let a blocking twin drive this object and all its parts."""
        for part in self._own_parts():
            part._use_directly()
        super()._use_directly()

    def _shared(self, *, in_loops: bool) -> AsyncSQLiteBackend:
        """Return a backend on the same connections, which closes none of them.

        `in_loops`: for event loops, where this one is driven directly.
        """
        shared = _share(self)
        if in_loops:
            gateway_of = functools.cache(_AsyncGateway)
            shared._gateway = gateway_of(self._gateway.database)
            for name, part in vars(self).items():
                if isinstance(part, _AsyncStorage):
                    copied = _share(part)
                    copied._gateway = gateway_of(part._gateway.database)
                    setattr(shared, name, copied)
        return shared

    def _shares_file(self) -> bool:
        """Tell whether queue and results are committed together."""
        return (
            isinstance(self._queue, AsyncSQLiteQueue)
            and isinstance(self._results, AsyncSQLiteResultStorage)
            and self._queue._gateway.database is self._results._gateway.database
        )

    def _now(self) -> datetime:
        return cast(datetime, _from_unix(self._clock()))

    # -- Making one --

    @classmethod
    def from_url(cls, url: str) -> Any:
        """Make a backend from a URL, such as "sqlite:///jobs.db?events=true".

        Three slashes for a relative path, four for an absolute one. The options
        are those of the constructor but for `serializer` and `clock`. A URL of
        another scheme is looked up in the entry-point group `omniq.backends`.

        Raises: `ValueError` for an unknown option or scheme.
        """
        return _backend_from_url(cls, url, asynchronous=True)

    @classmethod
    def from_env(cls) -> Any:
        """Make a backend from `OMNIQ_TASK_QUEUE_URL` and two optional variables.

        `OMNIQ_RESULT_STORAGE_URL`: where results are, else on the same file;
        `OMNIQ_EVENT_STORAGE_URL`: where events are, else off.

        Raises: `ValueError` naming what is missing or wrong.
        """
        return _backend_from_env(cls, asynchronous=True)

    # -- Life --

    async def close(self) -> None:
        """Close what this object opened; what was asked for before is finished.

        Ready objects that it was given stay open.
        """
        if not self._owned:
            return
        async with contextlib.AsyncExitStack() as stack:  # each, if one cannot
            for storage in (self._gateway, *self._closable):
                stack.push_async_callback(storage.close)

    async def _open(self) -> None:
        if self._gateway.database.components:
            await self._gateway.read(_nothing)
        for storage in self._closable:
            await storage._open()

    def _databases(self) -> list[_Database]:
        own = [self._gateway.database] if self._gateway.database.components else []
        return own + [storage._gateway.database for storage in self._closable]

    # -- Tasks --

    async def enqueue(self, task: Task, *, delay: float = 0.0) -> str:
        """Add a task and return its id, or the id of the live one with its key.

        Durable when it returns. Parameters and errors are those of the queue's
        `enqueue`.
        """
        return await self._queue.enqueue(task, delay=delay)

    async def enqueue_many(self, tasks: Iterable[Task]) -> list[str]:
        """Add tasks in one transaction, all or nothing, and return their ids.

        Raises: `DuplicateTaskError`, `SerializationError`; then none was added.
        """
        return await self._queue.enqueue_many(tasks)

    async def complete(
        self, task: Task, value: Any = None, *, enqueue: Iterable[Task] = ()
    ) -> None:
        """End a task as done, store its result and add follow-up tasks.

        One commit where queue and results share a file. Where they do not, the
        result is stored before the task ends, so that a crash repeats work and
        never loses it. It completes first and enqueues then, so a follow-up may
        carry the same `unique_key`.

        Raises: `LeaseLostError` when the claim is no longer yours;
        `SerializationError`; `DuplicateTaskError`. Where queue and results share a
        file, nothing was changed then.
        """
        _check_lease(task)
        await self._complete([(task, value)], enqueue)

    async def complete_many(self, values: Iterable[tuple[Task, Any]]) -> None:
        """End tasks as done, each with the value to store; as `complete` does.

        Raises: `LeaseLostError` with the `task_ids` whose claim is no longer yours,
        after the others were completed; `SerializationError`, then none was.
        """
        pairs = list(values)
        for pair in pairs:
            fine = isinstance(pair, tuple) and len(pair) == 2
            _check(fine, "values", "pairs of a task and its value", pair)
            _check_task(pair[0], "values")
        self._gateway.database.check_open()
        if pairs:
            await self._complete(pairs, ())

    async def _complete(
        self, pairs: Sequence[tuple[Task, Any]], enqueue: Iterable[Task]
    ) -> None:
        followers = [_check_task(follower, "enqueue") for follower in enqueue]
        queue, now = self._queue, self._now()
        ours = queue if isinstance(queue, AsyncSQLiteQueue) else None
        # What cannot be serialized is found before anything is stored.
        new_rows = [ours._row_of(follower) for follower in followers] if ours else []
        results = [
            _result_of_run(task, ResultStatus.SUCCESS, now, value=value)
            for task, value in pairs
        ]
        rows = self._rows_to_store(results)
        every = [task for task, _ in pairs]
        lost = await self._store_elsewhere(every, results)
        lost_leases = {task.lease_id for task in lost}
        tasks = [task for task in every if task.lease_id not in lost_leases]

        def run(change: _Change) -> list[Task]:
            assert ours is not None
            gone = ours._complete_all(change, tasks)
            if len(gone) == len(tasks):
                raise LeaseLostError([task.id for task in gone])
            leases = {task.lease_id for task in gone}
            ended = zip(every, rows, strict=False)  # there may be no rows
            _store(change, [row for task, row in ended if task.lease_id not in leases])
            _insert_many(change, new_rows)
            return gone

        ids = [task.id for task in lost]
        try:
            if ours is not None:
                gone = await ours._write(run, savepoint=bool(new_rows))
                ids += [task.id for task in gone]
            else:
                await queue.complete_many(tasks)
        except LeaseLostError as error:
            ids += error.task_ids
        if ids:
            raise LeaseLostError(ids)
        if ours is None and followers:
            await queue.enqueue_many(followers)

    def _rows_to_store(self, results: Iterable[TaskResult]) -> list[dict[str, Any]]:
        """Return the rows of results that are stored by the commit that ends a task."""
        if not self._shares_file():
            return []
        storage = cast(AsyncSQLiteResultStorage, self._results)
        return [storage._row_of(result) for result in results]

    async def _store_elsewhere(
        self, tasks: Sequence[Task], results: Iterable[TaskResult]
    ) -> list[Task]:
        """Store results that are not on the queue's file, before their tasks end.

        Only those whose lease holds; return the other tasks.

        Raises: `LeaseLostError` if it holds for none.
        """
        if self._results is None or self._shares_file():
            return []
        lost, held = [], []
        for task, result in zip(tasks, results, strict=True):
            current = await self._queue.get_task(task.id)
            holds = current and current.lease_id == task.lease_id is not None
            held.append(result) if holds else lost.append(task)
        if not held:
            raise LeaseLostError([task.id for task in lost])
        await self._results.store_many(held)
        return lost

    async def fail(
        self,
        task: Task,
        exception: BaseException,
        *,
        retry: bool = True,
        delay: float | None = None,
    ) -> TaskStatus:
        """End an attempt as failed; store a result if it was the last one.

        Returns `SCHEDULED` (runs again) or `FAILED`. The parameters are those of
        the queue's `fail`. One commit, or the result first, as in `complete`.

        Raises: `LeaseLostError` when the claim is no longer yours.
        """
        _check_lease(task)
        _check_optional(delay=delay)
        given: object = exception
        if not isinstance(given, BaseException):
            raise TypeError(f"exception must be one, not {type(given).__name__}")
        rows: list[dict[str, Any]] = []
        if not retry or task.attempt >= task.max_attempts:
            terms = {
                "error": _clean_text(_message_of(exception)),
                "error_type": type(exception).__name__,
                "traceback": "".join(traceback.format_exception(exception)),
            }
            error = _result_of_run(task, ResultStatus.ERROR, self._now(), **terms)
            rows = self._rows_to_store([error])
            await self._store_elsewhere([task], [error])

        if isinstance(self._queue, AsyncSQLiteQueue):
            store = partial(_store, rows=rows)
            return await self._queue._fail(task, exception, retry, delay, store)
        return await self._queue.fail(task, exception, retry=retry, delay=delay)

    async def status(self, task_id: str) -> TaskStatus | None:
        """Return how a task stands by the queue, else by its result, else `None`."""
        task = await self._queue.get_task(task_id)
        if task is not None:
            return task.status
        result = await self._results.get(task_id) if self._results else None
        return None if result is None else _STATUS_OF_RESULT[result.status]

    async def result(self, task_id: str, *, timeout: float | None = None) -> TaskResult:
        """Return the result of a task once it has ended, however it ended.

        A task that was cancelled, expired or ran out of attempts without storing
        a result gets one made from its row. `timeout`: seconds; 0 looks once, `None`
        waits for ever.

        Raises: `TimeoutError`; `TaskNotFoundError` when there is neither a task
        nor a result of that id.
        """
        stream = AsyncResultStream(self, [task_id], timeout)
        return cast(TaskResult, await stream._next())

    def wait_all(
        self, ids: Iterable[str], *, timeout: float | None = None
    ) -> AsyncResultStream:
        """Return an iterator over the results of tasks as they end.

        Each is what `result()` returns. On a terminal (standard error) and in a
        notebook a line shows the progress. `timeout`: seconds for all of them.

        Raises: while iterating `TimeoutError`; `TaskNotFoundError` for an id of which
        there is neither a task nor a result, after which it can go on.
        """
        return AsyncResultStream(self, ids, timeout, progress=_Progress())

    async def _live(self, ids: Iterable[str]) -> dict[str, float]:
        """Return which tasks live, and when time changes each."""
        if isinstance(self._queue, AsyncSQLiteQueue):
            spared = _standstill.left()
            later = self._queue._clock() + spared
            terms = {"ids": _wanted_ids(ids), "leases": not spared, "later": later}
            rows = await self._queue._rows(SELECT_LIVE, **terms)
            return {task_id: math.inf if due is None else due for task_id, due in rows}
        tasks = [await self._queue.get_task(task_id) for task_id in ids]
        return {t.id: math.inf for t in tasks if t and t.status in LIVE_STATUSES}

    async def _look(self, task_id: str) -> TaskResult | None:
        """Return the result of a task, unless it lives."""
        task = await self._queue.get_task(task_id)
        if task and task.status in LIVE_STATUSES:
            # Time may have ended it, and nobody else may be there to settle it.
            ours = self._queue if isinstance(self._queue, AsyncSQLiteQueue) else None
            if ours is None or not await ours._settle_queue(task.queue):
                return None
            task = await ours.get_task(task_id)
        if task and task.status in LIVE_STATUSES:
            return None
        stored = await self._results.get(task_id) if self._results else None
        if task is None and stored is None:
            raise TaskNotFoundError(task_id)
        return _result_of_row(task, stored) if task else stored

    def _main_gateway(self) -> _Gateway:
        """Return the gateway of the queue, or of this object for another engine's."""
        queue = self._queue
        return (queue if isinstance(queue, AsyncSQLiteQueue) else self)._gateway

    async def _wait_for(
        self, live: Mapping[str, float], seen: int, left: float
    ) -> None:
        """Wait for a change of live tasks; a result comes in the same commit."""
        if isinstance(self._queue, AsyncSQLiteQueue):
            due = min(live.values())
            gateway = self._queue._gateway
            await gateway.wait(seen, left, None if due == math.inf else due)
            return
        pause = 0.1
        if self._results is not None:
            pause = 0.01  # an old result may be there, which is no reason to spin
            with contextlib.suppress(TimeoutError):
                await self._results.wait(next(iter(live)), timeout=min(left, 0.1))
        await self._gateway.sleep(min(left, pause))

    # -- Upkeep --

    async def cleanup(self) -> dict[str, int]:
        """Do what is due, in small transactions, and return how much of each.

        Tasks that time has ended are settled, completed tasks past `retention`,
        expired results, old events and workers that were not seen for a day are
        deleted, and free pages of files that this module made are given back, some
        at a time.
        """
        done = {"settled": 0, "tasks": 0, "results": 0, "events": 0, "pages": 0}
        if isinstance(self._queue, AsyncSQLiteQueue):
            done |= await self._queue._clean_up()
        if self._results is not None:
            done["results"] = await self._results.purge()
        events, retention = self._events, self._arguments["event_retention"]
        if isinstance(events, AsyncSQLiteEventStorage):  # which may have been given
            retention = events._retention
        if events is not None and retention is not None:
            done["events"] = await events.purge(older_than=retention)
        for gateway in self._gateways():
            done["pages"] += await gateway.write(_Operation(_give_back_pages))
        return done

    def _gateways(self) -> list[_Gateway]:
        """Return the gateways of our own parts, each once."""
        parts = self._own_parts()
        return list({id(p._gateway.database): p._gateway for p in parts}.values())

    async def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the queue's file to a new one while everybody goes on working.

        The copy is the file as it was at one instant, readable by its owner only.
        Parts on other files are not in it.

        Raises: `FileExistsError` if `path` exists; another `OSError` if it cannot
        be written.
        """
        target = _absolute(path)
        _check(target != ":memory:", "path", "the path of a new file", path)
        _create_target(target)
        try:
            await self._main_gateway().read(lambda source: _back_up(source, target))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)  # half a copy
            raise

    async def check(self) -> list[Finding]:
        """Look for what is wrong with the files and the queue; empty if nothing is.

        Integrity, schema, size of the WAL, overdue leases, workers that are gone, and
        other connections of this process that checkpoint outside the guard, where
        the library has the WAL-reset bug (those of other processes cannot be seen).
        """
        findings: list[Finding] = []
        for gateway in self._gateways():
            findings += await gateway.read(partial(_check_file, gateway.database))
            # In the calling thread, which its own connections answer to.
            if (count := _count_unguarded(gateway.database.path)) > 0:
                text = f"{_counted(count, 'connection')} of this process may checkpoint"
                text += " outside the guard; execute PRAGMA wal_autocheckpoint=0 there"
                findings.append(Finding("checkpoints", "warning", text))
        try:
            await self._check_claims(findings)
        except OmniQError as error:  # of what was found before, or somebody's row
            findings.append(Finding("queue", "error", str(error)))
        return findings

    async def _check_claims(self, findings: list[Finding]) -> None:
        if isinstance(self._queue, AsyncSQLiteQueue):
            rows = await self._queue._rows(SELECT_OVERDUE, before=self._clock())
            for queue, count in rows:
                text = f"{_counted(count, 'lease')} over in {queue!r}"
                findings.append(Finding("leases", "warning", text))
        for worker in await self._queue.list_workers():
            if (reason := _why_gone(worker, self._now())) is not None:
                text = f"worker {worker.name!r} {reason}, with"
                text += f" {_counted(worker.running, 'task')}"
                findings.append(Finding("workers", "warning", text))


class AsyncResultStream:
    """Yields the results of tasks as they end; made by `wait_all()`."""

    def __init__(
        self,
        backend: AsyncSQLiteBackend,
        ids: Iterable[str],
        timeout: float | None,
        progress: _Progress | None = None,
    ) -> None:
        _check_optional(timeout=timeout)
        _check(not isinstance(ids, (str, bytes)), "ids", "several ids", ids)
        self._backend = backend
        self._waiting = dict.fromkeys(ids)
        self._ended: collections.deque[str] = collections.deque()  # or so it seemed
        self._timeout = timeout
        self._deadline = _deadline(timeout)
        self._over = False  # a look after the deadline has still found something
        self._pace = _Pace(backend._gateway, self._deadline)
        self._progress = progress

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskResult:
        result = await self._next()
        if result is None:
            raise StopAsyncIteration
        return result

    async def _next(self) -> TaskResult | None:
        while self._waiting:
            while self._ended:
                result = await self._take(self._ended[0])
                if result is not None:
                    return result
            await self._wait()
        return None

    async def _take(self, task_id: str) -> TaskResult | None:
        """Return the result of a task that has ended, unless it lives after all."""
        result: TaskResult | None = None
        try:
            result = await self._backend._look(task_id)
        except BaseException as error:
            self._over = False  # what else has ended still comes
            if isinstance(error, (TaskNotFoundError, SerializationError)):
                del self._waiting[task_id]
            raise
        finally:  # a call that was cancelled looks again
            self._ended.clear() if result is None else self._ended.popleft()
        if result is not None:
            del self._waiting[task_id]
            if self._progress is not None:
                self._progress.count(result, len(self._waiting))
        return result

    async def _wait(self) -> None:
        """Find out what has ended; wait for a commit or a due time if nothing has."""
        backend = self._backend
        database = backend._main_gateway().database
        if self._over:  # and another one might, for ever
            self._over = False
            _time_left(self._deadline, next(iter(self._waiting)), self._timeout)
        await self._pace.rest()
        late = time.monotonic() >= self._deadline
        seen = database.bell.generation
        live = await backend._live(self._waiting)
        self._pace.looked()
        now = database.options.clock()  # as what settles them
        self._ended.extend(i for i in self._waiting if live.get(i, 0.0) <= now)
        if self._ended:
            self._over = late
        else:
            left = _time_left(self._deadline, next(iter(live)), self._timeout)
            await backend._wait_for(live, seen, left)


class _Progress:
    """One line that says how many results have come, where somebody may look."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()
        self._done = 0
        self._failed = 0
        self._display: Any = None

    def count(self, result: TaskResult, left: int) -> None:
        self._done += 1
        self._failed += result.status is not ResultStatus.SUCCESS
        now = time.monotonic()
        if now - self._shown < 0.1 and left:
            return
        self._shown = now
        rate = self._done / max(now - self._began, 1e-9)
        text = f"{self._done:,} of {self._done + left:,} ended, {self._failed:,}"
        text += f" without success, {rate:,.0f}/s, {left / rate:,.0f} s left"
        self._show(text, last=not left)

    def _show(self, text: str, *, last: bool) -> None:
        # IPython is used where it runs, and never imported.
        ipython: Any = sys.modules.get("IPython")
        shell = ipython and ipython.get_ipython()
        if hasattr(shell, "kernel"):
            show = self._display.update if self._display else ipython.display.display
            more = {} if self._display else {"display_id": True}
            self._display = (
                show({"text/plain": text}, raw=True, **more) or self._display
            )
        elif sys.stderr is not None and sys.stderr.isatty():
            end = "\n" if last else ""
            print(f"\r{text}\x1b[K", end=end, file=sys.stderr, flush=True)


def _share(original: A) -> A:
    """Return an object over the same connections that does not close them."""
    shared = object.__new__(type(original))
    shared.__dict__.update(original.__dict__)
    shared._owned = False
    return shared


_PART_METHODS = {"queue": "dequeue_many", "results": "store", "events": "log_many"}


def _check_part(part: object, name: str) -> object:
    """Return a ready object that was passed as a part, if it is async."""
    method = _PART_METHODS[name]
    function = getattr(part, method, None)
    if function and (
        inspect.iscoroutinefunction(function) or isinstance(part, _Unblocked)
    ):
        return part
    raise TypeError(
        f"{name} must be True, a path or an object of the same kind (async or"
        f" blocking) with {method}(), not {type(part).__name__}"
    )


_INCREMENTAL_VACUUM = f"PRAGMA main.incremental_vacuum({_VACUUM_PAGES})"


def _give_back_pages(connection: sqlite3.Connection) -> int:
    """Give free pages back where this module made the file; return how many."""
    [(mode,)] = connection.execute("PRAGMA main.auto_vacuum").fetchall()
    [(free,)] = connection.execute("PRAGMA main.freelist_count").fetchall()
    if mode != 2 or free == 0:  # 2: incremental
        return 0
    connection.execute(_INCREMENTAL_VACUUM).fetchall()
    return min(int(free), _VACUUM_PAGES)


def _create_target(path: str) -> None:
    if os.path.exists(path):
        raise FileExistsError(f"{path!r} exists; give the backup another name")
    try:
        _create_file(path)
    except OSError as error:
        raise DatabaseAccessError(path, _reason_of(error)) from error


def _back_up(connection: sqlite3.Connection, target: str) -> None:
    # mode=rw: it does not come into being again when the call was cancelled.
    location = Path(target).as_uri() + "?mode=rw"
    opened = sqlite3.connect(location, uri=True, isolation_level=None)
    with contextlib.closing(opened) as copy_of:
        try:
            connection.backup(copy_of)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                raise DatabaseFullError(target) from error
            raise


def _check_file(database: _Database, connection: sqlite3.Connection) -> list[Finding]:
    lines = connection.execute("PRAGMA main.integrity_check(20)").fetchall()
    findings = [Finding("integrity", "error", t) for (t,) in lines if t != "ok"]
    try:
        missing = missing_migrations(connection, database.components, database.path)
        faults = [f"{part} tables are not at version {n}" for part, n in missing]
        faults += _missing_objects(connection, database.components)
    except SchemaVersionError as error:
        faults = [str(error)]
    findings += [Finding("schema", "error", fault) for fault in faults]
    size = database.wal_bytes()
    if size > _HELD_WAL_BYTES:
        text = f"the WAL has {size // 2**20} MiB; a reader may hold it and slow writes"
        findings.append(Finding("wal", "warning", text))
    return findings


def _count_unguarded(path: str) -> int:
    """Count the application's own connections to a file that checkpoint by themselves.

    They are found as objects of this process. One that belongs to another thread
    alone, or is closed, refuses to answer and is not counted.
    """
    if path == ":memory:" or not _has_wal_reset_bug(sqlite3.sqlite_version_info):
        return 0
    ours = {id(c) for database in list(_databases) for c in [*database.connections]}
    count = 0
    for found in gc.get_objects():
        if issubclass(type(found), sqlite3.Connection) and id(found) not in ours:
            with contextlib.suppress(sqlite3.Error):
                cursor = _plain_cursor(found)
                [(pages,)] = cursor.execute("PRAGMA wal_autocheckpoint").fetchall()
                count += pages > 0 and _is_same_file(_main_file(cursor), path)
    return count


_CREATED = re.compile(r"^CREATE [A-Z ]+ main\.(\w+)", re.MULTILINE)


def _missing_objects(
    connection: sqlite3.Connection, components: Sequence[str]
) -> list[str]:
    """Return a sentence for each table, index and view that somebody dropped."""
    statements = [s for c in components for step in MIGRATIONS[c] for s in step]
    wanted = {_CREATED.findall(statement)[0] for statement in statements}
    rows = connection.execute(SELECT_OBJECT_NAMES).fetchall()
    return [f"{name} is missing" for name in sorted(wanted - {n for (n,) in rows})]


def _is_dead(pid: int) -> bool:
    """Tell whether a process of this machine has ended, as far as one can see."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or a system without /proc
        return False
    return status.rpartition(") ")[2][:1] in ("Z", "X")  # ended, not yet reaped


def _why_gone(worker: WorkerInfo, now: datetime) -> str | None:
    """Return why a worker counts as gone, or `None` if it seems to live."""
    if worker.host == socket.gethostname() and _is_dead(worker.pid):
        return "is dead"
    silent = (now - worker.seen_at).total_seconds()
    if silent > _WORKER_STALE_AFTER:
        return f"was not seen for {silent:.0f} s"
    return None


# -- URLs --

_BOOLEANS = {"true": True, "1": True, "yes": True}
_BOOLEANS |= {"false": False, "0": False, "no": False}

_URL_OPTIONS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_PARTS, lambda text: _BOOLEANS.get(text.lower(), text)),
    "result_ttl": float,
    "event_retention": float,
    "synchronous": str,
    "busy_timeout": float,
    "retention": float,
    "allow_network_fs": lambda text: _BOOLEANS[text.lower()],
    "readers": int,
}


def _scheme_of(url: str) -> str:
    return urllib.parse.urlsplit(url).scheme


def _read_url(url: str) -> tuple[str, dict[str, Any]]:
    """Return path and options of an URL: three slashes relative, four absolute."""
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path)
    rule = "sqlite:///relative.db or sqlite:////absolute.db"
    _check(parts.netloc == "" and path[:1] == "/" and path != "/", "url", rule, url)
    _check(parts.fragment == "", "url", "without '#'; in a path it is %23", url)
    options = {}
    known = "one of " + ", ".join(sorted(_URL_OPTIONS))
    for name, text in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        _check(name in _URL_OPTIONS, "url option", known, name)
        try:
            options[name] = _URL_OPTIONS[name](text)
        except (KeyError, ValueError):
            kind = "true or false" if name == "allow_network_fs" else "a number"
            _check(False, f"url option {name}", kind, text)
    return path[1:], options


def _backend_from_url(cls: Callable[..., Any], url: str, *, asynchronous: bool) -> Any:
    _check(isinstance(url, str), "url", "a string", url)
    if _scheme_of(url) != "sqlite":
        return _find_backend(url, asynchronous=asynchronous)
    path, options = _read_url(url)
    return cls(path, **options)


def _find_backend(url: str, *, asynchronous: bool) -> Any:
    from importlib.metadata import entry_points  # 20 ms that few need

    points = {point.name: point for point in entry_points(group="omniq.backends")}
    point: Any = points.get(_scheme_of(url))
    schemes = "a URL of one of the schemes " + ", ".join(["sqlite", *sorted(points)])
    _check(point is not None, "url", schemes, url)
    return point.load()(url, asynchronous=asynchronous)


def _backend_from_env(cls: Callable[..., Any], *, asynchronous: bool) -> Any:
    names = {"results": "OMNIQ_RESULT_STORAGE_URL", "events": "OMNIQ_EVENT_STORAGE_URL"}
    urls = {part: os.environ.get(name, "") for part, name in names.items()}
    url = os.environ.get("OMNIQ_TASK_QUEUE_URL", "")
    _check(url != "", "OMNIQ_TASK_QUEUE_URL", "set to the URL of the queue", url)
    if _scheme_of(url) != "sqlite":
        for part, other in urls.items():
            _check(
                other == "", names[part], "unset beside a queue not in SQLite", other
            )
        return _backend_from_url(cls, url, asynchronous=asynchronous)
    path, options = _read_url(url)
    for part, other in urls.items():
        if _scheme_of(other) == "sqlite":
            place, more = _read_url(other)
            _check(not more, f"URL of {part}", "without options", other)
            options[part] = place
        elif other:
            backend = _find_backend(other, asynchronous=asynchronous)
            options[part] = getattr(backend, part)
            wanted = f"the URL of a backend with {part}"
            _check(options[part] is not None, names[part], wanted, other)
    return cls(path, **options)


class SQLiteBackend(_Twin[AsyncSQLiteBackend]):
    """Queue, results and events together; blocking twin of `AsyncSQLiteBackend`.

    The parameters are the same, except that ready objects are blocking ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queue: Where | TaskQueue = None,
        results: Where | ResultStorage = None,
        events: Where | EventStorage = None,
        result_ttl: float | None = DEFAULT_RESULT_TTL,
        event_retention: float | None = DEFAULT_EVENT_RETENTION,
        synchronous: str = "FULL",
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT,
        serializer: str | Serializer = "json",
        retention: float = 0.0,
        allow_network_fs: bool = False,
        clock: Callable[[], float] = time.time,
        readers: int = DEFAULT_READERS,
    ) -> None:
        arguments = _arguments_of(locals())
        parts = {"queue": queue, "results": results, "events": events}
        awaited = {n: _unblocked(p) if _is_ready(p) else p for n, p in parts.items()}
        backend = AsyncSQLiteBackend(path, **(arguments | awaited))
        self._set_up(backend, arguments)
        self._events = _twin_of(SQLiteEventStorage, backend._events, events)
        self._results = _twin_of(SQLiteResultStorage, backend._results, results)
        self._queue = _twin_of(SQLiteQueue, backend._queue, queue)
        if self._queue is not queue:
            self._queue._arguments = self._queue._arguments | {"events": self._events}

    @classmethod
    def from_async(cls, storage: AsyncSQLiteBackend) -> Self:
        """Return a twin over a live async object, for threads beside its loop."""
        self = super().from_async(storage)
        self._queue = SQLiteQueue.from_async(storage.queue)
        self._results = storage.results and SQLiteResultStorage.from_async(
            storage.results
        )
        self._events = storage.events and SQLiteEventStorage.from_async(storage.events)
        return self

    def to_async(self) -> AsyncSQLiteBackend:
        """Return an async backend of the same arguments.

        On ":memory:", or with ready objects, it shares the connections of this one
        and its `close()` leaves them open.

        Raises: `StorageClosedError` after `close()`.
        """
        self._check_usable()
        for database in self._async._databases():
            database.check_open()
        in_memory = _is_in_memory(self.path, self._arguments)
        alone = self._loop is None and not in_memory
        if alone and not _has_ready_parts(self._arguments):
            return AsyncSQLiteBackend(self.path, **self._arguments)
        return self._async._shared(in_loops=self._loop is None)

    @property
    def queue(self) -> SQLiteQueue:
        """The queue."""
        return cast(SQLiteQueue, self._queue)

    @property
    def results(self) -> SQLiteResultStorage | None:
        """The result storage, or `None`."""
        return cast("SQLiteResultStorage | None", self._results)

    @property
    def events(self) -> SQLiteEventStorage | None:
        """The event storage, or `None`."""
        return cast("SQLiteEventStorage | None", self._events)

    @classmethod
    def from_url(cls, url: str) -> Any:
        """Make a backend from a URL, such as "sqlite:///jobs.db?events=true"."""
        return _backend_from_url(cls, url, asynchronous=False)

    @classmethod
    def from_env(cls) -> Any:
        """Make a backend from `OMNIQ_TASK_QUEUE_URL` and two optional variables."""
        return _backend_from_env(cls, asynchronous=False)

    def enqueue(self, task: Task, *, delay: float = 0.0) -> str:
        """Add a task and return its id, or the id of the live one with its key."""
        return self._run(self._async.enqueue, task, delay=delay)

    def enqueue_many(self, tasks: Iterable[Task]) -> list[str]:
        """Add tasks in one transaction, all or nothing, and return their ids."""
        return self._run(self._async.enqueue_many, tasks)

    def complete(
        self, task: Task, value: Any = None, *, enqueue: Iterable[Task] = ()
    ) -> None:
        """End a task as done, store its result and add follow-up tasks."""
        return self._run(self._async.complete, task, value, enqueue=enqueue)

    def complete_many(self, values: Iterable[tuple[Task, Any]]) -> None:
        """End tasks as done, each with the value to store; as `complete` does."""
        return self._run(self._async.complete_many, values)

    def fail(
        self,
        task: Task,
        exception: BaseException,
        *,
        retry: bool = True,
        delay: float | None = None,
    ) -> TaskStatus:
        """End an attempt as failed; store a result if it was the last one."""
        return self._run(self._async.fail, task, exception, retry=retry, delay=delay)

    def status(self, task_id: str) -> TaskStatus | None:
        """Return how a task stands by the queue, else by its result, else `None`."""
        return self._run(self._async.status, task_id)

    def result(self, task_id: str, *, timeout: float | None = None) -> TaskResult:
        """Return the result of a task once it has ended, however it ended."""
        return self._run(self._async.result, task_id, timeout=timeout)

    def wait_all(
        self, ids: Iterable[str], *, timeout: float | None = None
    ) -> ResultStream:
        """Return an iterator over the results of tasks as they end."""
        return ResultStream(self, self._async.wait_all(ids, timeout=timeout))

    def cleanup(self) -> dict[str, int]:
        """Do what is due, in small transactions, and return how much of each."""
        return self._run(self._async.cleanup)

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the queue's file to a new one while everybody goes on working."""
        return self._run(self._async.backup, path)

    def check(self) -> list[Finding]:
        """Look for what is wrong with the files and the queue; empty if nothing is."""
        return self._run(self._async.check)


class ResultStream(_Stream[TaskResult]):
    """Yields the results of tasks as they end; made by `wait_all()`."""


def _twin_of(cls: Any, storage: Any, given: Any) -> Any:
    """Return the blocking form of a part: the very object that was given, if any."""
    if storage is None:
        return None
    return given if _is_ready(given) else cls._over(storage, storage._arguments)


# =============================================================================
# Worker
# =============================================================================
#
# A worker claims tasks, calls the functions that a registry knows by the tasks'
# names, and writes how they ended. It uses the interfaces only.
#
# - `_Run` is one claimed task on its way to one `_Outcome`. That is written until
#   it is written or the lease is lost: a busy or full database slows a worker
#   down, it never ends it.
# - `_Threads` call plain functions. They are daemons, because a function that
#   never returns must not keep the process from ending. Quick ones share a thread.
# - `_Heartbeat` is a thread with an event loop and database connections of its
#   own. It extends leases, writes progress and keeps time, so that a function
#   that blocks the worker's loop loses no lease.
# - `_Shift` is one run of a worker in one process. On its event loop it claims as
#   many tasks as it has free slots, starts them (async functions right there) and
#   settles them. It makes its slots as it finds use for them, and keeps one free
#   while there is nothing to claim. A slot is free as soon as its function ends, so
#   the next claim travels in the same commit as the outcomes of the last ones: for
#   no-op tasks that is one flush for each batch. Whatever ends while a commit is
#   under way joins the next batch, and values that end in one turn of the loop are
#   one write. Nothing waits for a batch to fill, but for a quarter of a millisecond
#   while quick functions end.
# - `_Crew` runs shifts in child processes and replaces those that end, or that
#   do not answer for a whole lease.
# - `AsyncWorker` is what the user holds; it has one of the last two while it
#   runs. `Worker` is its blocking twin.

DEFAULT_CONCURRENCY = 8
"""Tasks that one worker process runs at once, at most."""

STUCK_STATUS = 75
"""Exit status of a worker with a function that did not end: start it anew.

`EX_TEMPFAIL` of sysexits.h; supervisors restart on it.
"""

_RENEW_STATUS = 76  # of a child process that has run its `max_tasks`
_CLEANUP_INTERVAL = 60.0  # seconds
_CLEANUP_PATIENCE = 0.25  # seconds for the first one, before the first claim
_PROGRESS_INTERVAL = 1.0  # seconds
_QUICK_CALL = 0.001  # seconds in which one thread goes on to the next function
_GATHER = 0.000_25  # seconds that a claim waits for quick functions, to fill all slots
_LOOK = 0.005  # seconds after which the worker looks whether the interpreter is free
_POLITE_PAUSE = 0.25  # seconds for others to claim what a busy worker could
_SHORT_RUN = 0.01  # seconds: for each task that takes less there is one slot more
_LEAST_GRACE = 0.1  # seconds in which a function may end after its timeout, at least
_LAST_WRITES = 1.0  # seconds for outcomes to be written after the grace has passed
_QUICK_DEATH = 10.0  # seconds: a child that fails sooner is replaced ever more slowly
_LONGEST_PAUSE = 5.0  # seconds between two tries
_LONGEST_BEAT = 20.0  # seconds between two heartbeats: they also show that one lives
_TICK = 0.1  # seconds until the heartbeat looks whether the machine slept
_IDLE_TICK = 1.0  # while nothing runs

_AnyContext = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]

# -- Registry --


class TaskOptions(TypedDict, total=False):
    """What a registered function's tasks may be given; see `Task`."""

    queue: str
    priority: int
    run_at: datetime | None
    expires_at: datetime | None
    max_attempts: int
    retry_delay: float
    timeout: float | None
    unique_key: str | None
    metadata: Mapping[str, Any]


class TaskFunction(Generic[P, T]):
    """A registered function. Call it as itself, or make a task of a call.

        thumbnail("a.png", size=64)                              # runs here, now
        thumbnail.task("a.png", size=64)                         # a `Task`
        thumbnail.options(priority=5, queue="slow").task("a.png")

    It pickles as a reference, as functions do.
    """

    def __init__(
        self, function: Callable[P, T], name: str, options: TaskOptions
    ) -> None:
        functools.update_wrapper(self, function)
        for taken in ("task", "options"):  # as another queue's decorator sets them
            self.__dict__.pop(taken, None)
        self.function = function
        self.name = name
        calls = function, type(function).__call__
        self.is_async = any(map(inspect.iscoroutinefunction, calls))
        self._options = options
        self._signature = inspect.signature(function)
        Task(name, **options)  # refuses a wrong option here and now

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function here and now."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<TaskFunction {self.name}{self._signature}>"

    def __reduce__(self) -> str:
        return self.function.__qualname__

    def task(self, /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Return a task that calls this function with these arguments.

        Raises: `TypeError` if they do not fit the function's signature.
        """
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None
        return Task(self.name, args, kwargs, **self._options)

    def options(self, **options: Unpack[TaskOptions]) -> TaskFunction[P, T]:
        """Return the same function with other options for the tasks made of it."""
        return TaskFunction(self.function, self.name, {**self._options, **options})


class TaskRegistry:
    """The functions that a worker may call, by name.

        tasks = TaskRegistry()

        @tasks.register(max_attempts=5, timeout=30)
        def thumbnail(path: str, size: int = 128) -> str: ...

    A name is the function's own (its `__name__`, without the module, so that it
    survives a move to another file) unless `name=` gives another one. A registry
    pickles as references to its functions, which child processes import.
    """

    def __init__(self) -> None:
        self._functions: dict[str, TaskFunction[..., Any]] = {}

    @overload
    def register(
        self,
        function: Callable[P, T],
        /,
        *,
        name: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskFunction[P, T]: ...
    @overload
    def register(
        self, /, *, name: str | None = None, **options: Unpack[TaskOptions]
    ) -> Callable[[Callable[P, T]], TaskFunction[P, T]]: ...
    def register(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Any:
        """Register a function, plain or async; a decorator with or without options.

        Raises: `ValueError` if the name is taken or an option is out of range.
        """
        add = partial(self._add, name, options)
        return add if function is None else add(function)

    def _add(
        self, name: str | None, options: TaskOptions, function: Callable[..., Any]
    ) -> TaskFunction[..., Any]:
        if isinstance(function, TaskFunction):
            function = function.function
        name = name or getattr(function, "__name__", None)
        _check(name is not None, "name", "given for what has no `__name__`", name)
        added = TaskFunction(function, cast(str, name), options)
        if added.name in self._functions:
            raise ValueError(
                f"name must be new to the registry, not {added.name!r}:"
                " give this function another one with name="
            )
        self._functions[added.name] = added
        return added

    def __getitem__(self, name: str) -> TaskFunction[..., Any]:
        try:
            return self._functions[name]
        except KeyError:
            raise UnknownTaskError(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __repr__(self) -> str:
        return f"<TaskRegistry {', '.join(self) or 'empty'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        functions = self._functions.values()
        return _restore_registry, (
            [(f.name, f._options, *_reference(f.function)) for f in functions],
        )


def _reference(function: Callable[..., Any]) -> tuple[str, str]:
    """Return module and name by which a child process finds `function`."""
    module, path = function.__module__, function.__qualname__
    main = sys.modules["__main__"]
    is_file = module != "__main__" or main.__spec__ or hasattr(main, "__file__")
    with contextlib.suppress(ImportError, AttributeError):
        if is_file and _look_up(module, path) is function:
            return module, path
    raise TypeError(
        f"function {path!r} cannot reach a child process: it must be importable from"
        f" module {module!r} under this name, at the top level; from a session"
        " without a file, move the function to a module"
    )


def _look_up(module: str, path: str) -> Any:
    found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    return found.function if isinstance(found, TaskFunction) else found


def _restore_registry(entries: list[tuple[str, TaskOptions, str, str]]) -> TaskRegistry:
    registry = TaskRegistry()
    for name, options, module, path in entries:
        registry._add(name, options, _look_up(module, path))
    return registry


# -- A run and its outcome --


class Retry(Exception):
    """Raise it in a function to run its task again in `delay` seconds.

    `None` is the task's usual backoff. The attempt counts: without one left, the
    task fails. Raised `from` another exception, that one is what is recorded.
    """

    def __init__(self, delay: float | None = None) -> None:
        _check_optional(delay=delay)
        super().__init__(delay)
        self.delay = delay

    def __str__(self) -> str:
        return "run again" + ("" if self.delay is None else f" in {self.delay:g} s")


class Reject(Exception):
    """Raise it in a function to fail its task for good, whatever attempts remain."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class _Outcome:
    """How a run ended: with a value, with an error, or given back unharmed."""

    value: Any = None
    _: KW_ONLY
    error: BaseException | None = None
    retry: bool = True
    delay: float | None = None
    released: bool = False


def _finished(value: T) -> T:
    """Return what a plain function returned, unless that has not run yet."""
    if inspect.iscoroutine(value) or inspect.isgenerator(value):
        value.close()
    elif not inspect.isasyncgen(value):
        return value
    kind = type(value).__name__
    raise Reject(f"a plain function returned a {kind}, whose body has not run")


def _log(
    level: int,
    worker: str,
    message: str,
    *args: object,
    task: Task | None = None,
    error: BaseException | None = None,
) -> None:
    """Log one line with its facts as fields; never an argument or a result."""
    extra: dict[str, Any] = {"worker": worker}
    if task is not None:
        message, args = f"task %s (%s) {message}", (task.id, task.func, *args)
        extra |= {"task_id": task.id, "queue": task.queue}
        extra |= {"func": task.func, "attempt": task.attempt}
    try:
        logger.log(level, message, *args, exc_info=error, extra=extra)
    except KeyError:  # the program's own record factory sets such a field
        logger.log(level, message, *args, exc_info=error)


class _Run:
    """A claimed task in this worker's hands, from its claim to its outcome.

    Three threads look at it: the loop's, the function's and the heartbeat's. Each
    field is written by one of them at a time, with one bytecode. The `_at` fields
    are monotonic times; all but the first say when the heartbeat is to do what.
    """

    def __init__(self, task: Task, heartbeat: _Heartbeat) -> None:
        self.task = task
        self.heartbeat = heartbeat
        self.extended_at = time.monotonic()
        self.extend_at = self.extended_at + heartbeat.interval
        self.interrupt_at = self.give_up_at = math.inf
        self.job: asyncio.Task[None] | None = None  # not while a thread has it
        self.call: Callable[[], Any] = _nothing  # what a thread is to do
        self.thread: int | None = None  # where an exception can be raised
        self.cancelled_for = ""
        self.progress: dict[str, Any] | None = None
        self.outcome: _Outcome | None = None
        self.lost = False  # no longer ours; what comes of it is dropped
        self._pid = os.getpid()

    def begin(self, grace: float) -> None:
        """Start the clock of the task's timeout."""
        if self.task.timeout is not None:
            self.interrupt_at = time.monotonic() + self.task.timeout
            self.give_up_at = self.interrupt_at + grace
            self.heartbeat.wake(self.interrupt_at)

    def is_done(self) -> bool:
        """Tell whether it ended with a value that is still ours to write."""
        outcome = self.outcome
        fine = outcome is not None and outcome.error is None and not outcome.released
        return fine and not self.lost

    def end_fork(self) -> None:
        """End a process that the function forked and came back in: no worker."""
        if os.getpid() != self._pid:
            text = "has come back in a process that it forked; that one ends here"
            _log(logging.ERROR, self.task.worker or "", text, task=self.task)
            os._exit(1)

    def judge(self, error: BaseException) -> _Outcome:
        """Return what an exception out of the function means for the task."""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # show where the function begins, not the way to it
        trace = trace or error.__traceback__
        # A class of somebody's may be frozen, or not call `super().__init__()`.
        if isinstance(error, TaskTimeout) and not getattr(error, "task_id", "?"):
            error = TaskTimeout(self.task.id, self.task.timeout or 0.0)  # raised by us
        BaseException.with_traceback(error, trace)
        if isinstance(error, Retry):
            delay = getattr(error, "delay", None)  # a subclass may set what it likes
            delay = delay if _RULES["delay"][1](delay) else None
            return _Outcome(error=error.__cause__ or error, delay=delay)
        return _Outcome(error=error, retry=not isinstance(error, Reject))


_current_run: contextvars.ContextVar[_Run] = contextvars.ContextVar("omniq_run")


def current_task() -> Task:
    """Return the task that is being run here, as it was when it was claimed.

    Raises: `RuntimeError` outside a function that a worker runs.
    """
    run = _current_run.get(None)
    if run is None:
        raise RuntimeError("current_task() works only inside a task that a worker runs")
    return run.task


def progress(done: float, total: float | None = None, message: str = "") -> None:
    """Show in `Task.progress` how far the running task is; cheap, never waits.

    Stored as `{"done": …, "total": …, "message": …}`, with the next heartbeat or
    within a second. Outside a worker it does nothing, so that a function that
    reports progress can be called directly.

    Raises: `LeaseLostError` once the task was cancelled or is another worker's.
    """
    for name, value in (("done", done), ("total", total)):
        fine = (value is None and name == "total") or (
            isinstance(value, (int, float)) and abs(value) < math.inf
        )
        _check(fine, name, "a finite number", value)
    run = _current_run.get(None)
    if run is None:
        return
    if run.lost:
        raise LeaseLostError([run.task.id])
    text = _clean_text(str(message))
    run.progress = {"done": done, "total": total, "message": text}
    soon = run.extended_at + _PROGRESS_INTERVAL
    if soon < run.extend_at < math.inf:
        run.extend_at = soon
        run.heartbeat.wake(soon)


class _Threads:
    """Calls plain functions in daemon threads, at most one for each slot.

    To wake a thread costs more than a short function does. So one thread takes all
    that ends at once, and the others join in when a task has waited for a moment
    (no-op tasks on Python 3.13: 170 µs each, not 330).
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[_Run], object],
    ) -> None:
        self._name = name
        self._loop = loop
        self._on_end = on_end  # called on that loop
        self._jobs: collections.deque[_Run] = collections.deque()
        self._ready = threading.Condition(threading.Lock())
        self._closed = self._spreading = self._noted = False
        self._ended: collections.deque[_Run] = collections.deque()
        self._count = self._idle = self._busy = 0
        self._taken_at = -math.inf

    def start(self, run: _Run) -> None:
        with self._ready:
            self._busy += 1
            self._jobs.append(run)
            all_idle = self._idle >= self._count
            if all_idle or time.monotonic() - self._taken_at > _QUICK_CALL:
                self._wake()
            elif not self._spreading:
                self._spreading = True
                self._loop.call_later(_QUICK_CALL, self._spread)

    def quick(self) -> float:
        """Return the seconds that it is worth waiting for functions under way.

        Else two halves of the slots take turns, with twice the commits (4,400
        no-ops a second in place of 6,000).
        """
        left = self._taken_at + _GATHER - time.monotonic()
        return max(0.0, left) if self._busy else 0.0

    def _spread(self) -> None:
        """Give each of those that still wait a thread; report those that do not."""
        with self._ready:
            self._spreading = False
            for _ in range(len(self._jobs)):
                self._wake()
        self._report()

    def _wake(self) -> None:
        """Let one thread more look for a task; without an idle one, a new one."""
        self._taken_at = time.monotonic()
        if self._idle:
            self._idle -= 1
            self._ready.notify()
        elif self._count < self._busy:  # else one will look before it is idle
            name = f"{self._name}-{self._count + 1}"
            try:
                threading.Thread(target=self._serve, name=name, daemon=True).start()
            except RuntimeError as error:  # those that are there go on, or it may later
                _log(logging.WARNING, self._name, "no thread for a task: %s", error)
                self._loop.call_later(_LONGEST_PAUSE, self._spread)
            else:
                self._count += 1

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._jobs.clear()  # what has not begun is left to its lease
            self._ready.notify_all()

    def _next(self) -> _Run | None:
        with self._ready:
            while not self._jobs:
                if self._closed:
                    return None
                self._idle += 1
                self._ready.wait()
            self._taken_at = time.monotonic()
            return self._jobs.popleft()

    def _serve(self) -> None:
        while (run := self._next()) is not None:
            self._perform(run)
            self._ended.append(run)
            del run  # an idle thread keeps no task alive
            if self._is_worth_a_report():
                _call_soon(self._loop, self._report)

    def _is_worth_a_report(self) -> bool:
        """Report all at once that end one after the other, or before it is heard."""
        with self._ready:
            worth = not (self._noted or (self._spreading and self._jobs))
            if worth:
                self._noted = True
            return worth

    def _report(self) -> None:
        self._noted = False
        while self._ended:
            self._busy -= 1
            self._on_end(self._ended.popleft())

    def _perform(self, run: _Run) -> None:
        """Call the function of `run`; a timeout may be raised at any bytecode."""
        try:
            try:
                run.thread = threading.get_ident()
                run.outcome = _Outcome(run.call())
            except BaseException as error:  # noqa: BLE001 -- SystemExit is a failure too
                run.outcome = run.judge(error)
            run.end_fork()
            # A thread that was interrupted raises as soon as it goes on, so after
            # this line nothing is left to be raised in what it does next.
            with _operating_lock:
                run.thread = None
        except TaskTimeout as error:  # while another error was looked at
            run.thread = None
            run.outcome = run.outcome or run.judge(error)

    def interrupt(self, run: _Run) -> bool:
        """Raise `TaskTimeout` in the thread of `run`; False: not at this moment."""
        with _operating_lock:  # it cannot end in between
            return run.thread is not None and _throw(run.thread, TaskTimeout)


# -- Heartbeat --


class _Heartbeat:
    """Extends leases, writes progress and keeps time, in a thread of its own."""

    def __init__(self, shift: _Shift, worker: AsyncWorker, runs: set[_Run]) -> None:
        self._shift = shift
        self._worker = worker
        self._runs = runs
        self.interval = min(worker.lease / 3, _LONGEST_BEAT)
        self._jobs: set[asyncio.Task[None]] = set()
        self._look_at = math.inf
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done = _running_loop().create_future()

    def start(self) -> None:
        name = f"{self._worker.name}-heartbeat"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def end(self) -> None:
        self._ended = True
        self.wake(-math.inf)

    def call_later(self, delay: float, call: Callable[[], object]) -> None:
        """Call in its thread; for any thread."""
        if self._loop is not None:
            _call_soon(self._loop, self._loop.call_later, delay, call)

    async def stop(self) -> None:
        self.end()
        await asyncio.wait({self._done}, timeout=_LAST_WRITES)

    def wake(self, at: float) -> None:
        """Look at the runs at `at`, unless that happens anyway; for any thread."""
        if at < self._look_at and self._loop is not None:
            _call_soon(self._loop, self._woken.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:
            logger.exception("the heartbeat of worker %s has ended", self._worker.name)
        finally:
            _call_soon(self._done.get_loop(), _set_result, self._done, None)

    async def _main(self) -> None:
        self._backend, copied = _own_copy(self._worker.backend)
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            while not self._ended:
                await self._look()
        finally:
            _standstill.expect(math.inf)
            for job in self._jobs:
                job.cancel()
            if copied:
                await self._backend.close()

    async def _look(self) -> None:
        # In this order, so that a wake during the look is not lost: until the
        # next time is known, every wake counts.
        self._look_at = math.inf
        self._woken.clear()
        now = time.monotonic()
        next_at = now + min(self.interval, _TICK if self._runs else _IDLE_TICK)
        _standstill.left()
        _standstill.expect(next_at + max(self.interval, _IDLE_TICK))
        for run in tuple(self._runs):
            if run.extended_at < _standstill.ended_at and run.extend_at < math.inf:
                run.extend_at = now
            self._attend(run, now)
            next_at = min(next_at, run.extend_at, run.interrupt_at, run.give_up_at)
        self._look_at = next_at
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(next_at):
                await self._woken.wait()

    def _attend(self, run: _Run, now: float) -> None:
        """Begin what is due for one run; the database may take its time."""
        if run.outcome is not None:
            run.interrupt_at = run.give_up_at = math.inf
        if run.extend_at <= now:
            run.extend_at = math.inf
            self._begin(self._extend(run))
        if run.interrupt_at <= now:
            if self._shift.interrupt(run):  # perhaps late: the process was stopped
                run.interrupt_at = math.inf
                run.give_up_at = now + max(self._worker.grace, _LEAST_GRACE)
            else:
                run.interrupt_at = now + 0.005
        if run.give_up_at <= now:
            run.interrupt_at = run.give_up_at = math.inf
            self._begin(self._give_up(run))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.ensure_future(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _extend(self, run: _Run) -> None:
        sent = run.progress
        run.extended_at = now = time.monotonic()  # or tried to
        extend = self._backend.queue.extend
        try:
            await extend(run.task, self._worker.lease, progress=sent)
        except LeaseLostError:
            self._shift.lose(run)
        except Exception as error:  # noqa: BLE001 -- a heartbeat never gives up
            if isinstance(error, SerializationError):
                run.progress = None
            self._shift.warn(run, "cannot be extended: %s", error)
            run.extend_at = time.monotonic() + min(1.0, self.interval / 3)
        else:
            wait = self.interval if run.progress is sent else _PROGRESS_INTERVAL
            run.extend_at = now + min(self.interval, wait)
        self._woken.set()

    async def _give_up(self, run: _Run) -> None:
        """Fail the attempt of a function that does not end, in its stead."""
        error = TaskTimeout(run.task.id, run.task.timeout or 0.0)
        if run.outcome is not None:  # it has ended just now
            return
        try:
            await self._backend.fail(run.task, error)
        except LeaseLostError:
            pass
        except Exception as failure:  # noqa: BLE001 -- as above
            self._shift.warn(run, "cannot be failed: %s", failure)
            run.give_up_at = time.monotonic() + 1.0
            self._woken.set()
            return
        self._shift.give_up(run)


def _own_copy(backend: AsyncBackend) -> tuple[AsyncBackend, bool]:
    """Return a backend with connections of its own, where it pickles; else itself."""
    import pickle  # here, because it costs import time

    try:
        if isinstance(backend, AsyncSQLiteBackend) and not _has_ready_parts(
            backend._arguments
        ):
            return copy.copy(backend), True  # with the same clock
        return pickle.loads(pickle.dumps(backend)), True  # noqa: S301 -- our own bytes
    except Exception:  # noqa: BLE001 -- another engine may fail in any way
        return backend, False


# -- One process --


async def _enter(stack: contextlib.AsyncExitStack, context: _AnyContext) -> None:
    """Enter a context manager of either kind; async, if it is both."""
    if isinstance(context, AbstractAsyncContextManager):
        await stack.enter_async_context(context)
    else:
        stack.enter_context(context)


def _longer(pause: float) -> float:
    """Return the next pause between tries: from 50 ms, doubled, with jitter."""
    return min(max(0.05, pause * 2), _LONGEST_PAUSE) * random.uniform(0.8, 1.2)


_UNUSABLE = (
    StorageClosedError, DatabaseReplacedError, CorruptDatabaseError, SchemaVersionError,
    _UnflushedError,
)  # fmt: skip
"""What no waiting mends: the object has to be made anew, or the file restored."""


async def _insist(
    work: Callable[[], Awaitable[T]], report: Callable[[Exception], object]
) -> T:
    """Try until it succeeds, ever more slowly: a database may recover.

    Raises: `LeaseLostError` and `_UNUSABLE`, which no other try mends.
    """
    pause = 0.0
    while True:
        try:
            return await work()
        except (LeaseLostError, *_UNUSABLE):
            raise
        except Exception as error:  # noqa: BLE001 -- reported, and tried again
            report(error)
        pause = _longer(pause)
        await asyncio.sleep(pause)


@dataclass(frozen=True, slots=True)
class _ShiftTerms:
    """What `run` was asked for, as far as one process is concerned."""

    until_empty: bool = False
    max_tasks: float = math.inf
    owns_process: bool = False  # may end it, when its loop is blocked for ever


class _Shift:
    """One run of a worker in one process: it claims, starts and settles."""

    def __init__(
        self,
        worker: AsyncWorker,
        terms: _ShiftTerms,
        on_ready: Callable[[], object] = _nothing,
    ) -> None:
        self._worker = worker
        self._terms = terms
        self._on_ready = on_ready
        self._left = terms.max_tasks
        self._slots = self._free = 1
        self._runs: set[_Run] = set()
        self._loop = _running_loop()
        self._threads = _Threads(worker.name, self._loop, self._end)
        self._heartbeat = _Heartbeat(self, worker, self._runs)
        self._changed = asyncio.Event()
        self._ended: list[_Run] = []  # their outcomes are to be written
        # Not in the interface: an engine may do without it.
        self._complete_many: Any = getattr(worker.backend, "complete_many", None)
        self._claimer: asyncio.Task[None] | None = None
        self._cleaned = False  # or could not be
        self._claims = True  # until the claimer is cancelled
        self._job: asyncio.Task[Any] | None = None  # which runs `run`
        self._stopped_at = math.inf
        self._failure: Exception | None = None  # an outcome could not be written
        self._stuck = False

    async def run(self) -> int:
        """Work until stopped, out of tasks or stuck; return the exit status."""
        self._job = asyncio.current_task()
        async with contextlib.AsyncExitStack() as stack:
            if self._worker.lifespan is not None:
                await _enter(stack, self._worker.lifespan())
            self._context = contextvars.copy_context()
            self._heartbeat.start()
            try:
                await self._work()
            finally:
                await self._heartbeat.stop()
                self._threads.close()
        if self._stuck:
            return STUCK_STATUS
        return 0 if self._left else _RENEW_STATUS

    async def _work(self) -> None:
        self._claimer = asyncio.create_task(self._claim())
        if self._stopped_at < math.inf:
            self._claimer.cancel()
        jobs = [self._claimer, asyncio.create_task(self._clean_now_and_then())]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
            await self._drain()
            await self._sign_off()
        for job in jobs:
            if not job.cancelled():
                job.result()
        if self._failure is not None:
            raise self._failure

    # Stopping; the first three are for any thread.

    def stop(self) -> None:
        """Claim no more; what runs gets the grace."""
        _call_soon(self._loop, self._stop)
        if self._terms.owns_process:
            patience = self._worker.grace + _LAST_WRITES
            self._heartbeat.call_later(patience, self._check_stopped)

    def abandon(self) -> None:
        """Stop, and give the async functions no grace."""
        _call_soon(self._loop, self._stop)
        _call_soon(self._loop, self._cancel_all)

    def kill(self) -> None:
        """Do what must be done before the process ends at once: nothing."""

    def _stop(self) -> None:
        if self._stopped_at == math.inf:
            self._stopped_at = time.monotonic()
            if running := len(self._ours()):
                text = "worker %s stops; %s may run for %g s more"
                facts = self._worker.name, _counted(running, "task"), self._worker.grace
                self._log(logging.INFO, text, *facts)
        self._claim_no_more()

    def _claim_no_more(self) -> None:
        self._changed.set()
        if self._claimer is not None and self._claims:
            self._claims = False  # `cancelling` may be a timeout's, which is no stop
            self._claimer.cancel()

    async def _drain(self) -> None:
        """Let what runs end, within the grace if the worker was stopped."""
        await self._until(lambda: self._stopped_at < math.inf or not self._ours())
        left = self._stopped_at + self._worker.grace - time.monotonic()
        await self._until(lambda: not self._ours(), left)
        self._cancel_all()
        for run in self._ours():
            if run.outcome is not None and run.job is not None:
                self._loop.call_soon(run.job.cancel)  # after its first step
        await self._until(
            lambda: not any(run.job or run.outcome for run in self._ours()),
            _LAST_WRITES,
        )
        for run in self._ours():
            self.warn(run, "is left to its lease: it has not ended")

    async def _sign_off(self) -> None:
        """Be forgotten: who stops in peace must not be taken for dead later."""
        if not self._ours():
            with contextlib.suppress(Exception):  # another engine's may be any
                async with asyncio.timeout(_LAST_WRITES):
                    # A claim that was cancelled may be under way. When the first of
                    # these two writes is done, what gives it back is in line.
                    await self._worker.backend.queue.cancel("")
                    await self._worker.backend.queue.reclaim(self._worker.name)

    async def _until(
        self, holds: Callable[[], object], timeout: float = math.inf
    ) -> None:
        """Wait, no longer than `timeout`, until something holds that runs change."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout if timeout < math.inf else None):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()

    def _ours(self) -> list[_Run]:
        return [run for run in self._runs if not run.lost]

    def _cancel_all(self) -> None:
        for run in self._ours():
            self._cancel(run, "stop")

    def _cancel(self, run: _Run, why: str) -> None:
        if run.outcome is None and run.job is not None:
            run.cancelled_for = run.cancelled_for or why
            self._loop.call_soon(run.job.cancel)  # after its first step

    # Claiming.

    async def _claim(self) -> None:
        """Claim what there are free slots for, until stopped."""
        await self._until(lambda: self._cleaned, _CLEANUP_PATIENCE)
        self._on_ready()
        report = partial(self._log, logging.WARNING, "cannot claim: %s")
        while self._left and self._claims:
            await self._find_room()
            if gather := self._threads.quick():
                await self._until(lambda: not self._threads.quick(), gather)
                if not self._room():
                    continue
            tasks = await _insist(self._dequeue, report)
            if tasks is None:
                return
            for task in tasks:
                self._take(task)

    async def _find_room(self) -> None:
        """Wait for a free slot; while all are taken, make more.

        One to begin with, or eight long computations would all be the worker's that
        was a moment earlier, and the other cores idle. Where the interpreter is free,
        there are as many as may be in a few milliseconds; where it is busy, one more
        now and then, so that what is short does not wait behind what is long.
        """
        while not self._room():
            if self._free or self._slots == self._worker.concurrency:
                await self._until(self._room)
                continue
            if busy := await self._is_busy():
                await self._until(self._room, _POLITE_PAUSE)
            if not self._free:
                self._make_slots(1 if busy else self._slots)

    async def _is_busy(self) -> bool:
        """Look twice whether the interpreter is: threads that start look like it."""
        for _ in range(2):
            due = self._loop.time() + _LOOK
            await self._until(self._room, _LOOK)
            if self._loop.time() - due < sys.getswitchinterval() / 2:
                return False
        return True

    def _make_slots(self, count: int) -> None:
        count = min(count, self._worker.concurrency - self._slots)
        self._slots += count
        self._free_slots(count)

    def _room(self) -> int:
        # Ended runs whose outcome is not written yet hold no slot, but they are
        # bounded: a database that stalls stops the claims. Twice the slots, so that a
        # claim goes with the outcomes before it, while earlier ones are flushed (then
        # 8 no-ops take one commit, not 1.5). All free slots at once or none: claims
        # of one task each would cost a transaction each.
        unwritten = len(self._runs) - (self._slots - self._free)
        if unwritten > 2 * self._worker.concurrency:
            return 0
        return int(min(self._free, self._left))

    async def _dequeue(self) -> list[Task] | None:
        """Claim what there is room for; `None`: there will be no more."""
        if tasks := await self._dequeue_within(0.0):
            return tasks
        # What comes next may be long: one slot, as at the beginning.
        self._slots -= self._free - 1
        self._free = 1
        if not self._terms.until_empty:
            return await self._dequeue_within(None)
        if self._runs:  # they may fail and come back, or enqueue others
            free = self._free
            await self._until(lambda: not self._runs or self._free > free, 0.05)
            return []
        began = time.monotonic()
        if not _standstill.left() and await self._is_empty():
            return None
        took = time.monotonic() - began  # it counts all there is
        return await self._dequeue_within(max(0.5, 4 * took))

    async def _dequeue_within(self, timeout: float | None) -> list[Task]:
        worker = self._worker
        await self._until(self._room)  # at another try it may have become less
        return await worker.backend.queue.dequeue_many(
            self._room(),
            worker.queues,
            timeout=timeout,
            lease=worker.lease,
            worker=worker.name,
        )

    async def _is_empty(self) -> bool:
        """Return whether no task waits in our queues, but for paused ones."""
        tasks, names = self._worker.backend.queue, self._worker.queues
        try:
            found = [stats for stats in await tasks.stats() if stats.queue in names]
        except CorruptDatabaseError:  # the name of another one cannot be read
            waits = (TaskStatus.SCHEDULED, TaskStatus.PENDING)
            return not any(
                [
                    await tasks.count_tasks(queue=name, status=status)
                    for name in names
                    for status in waits
                ]
            )
        return not any((s.scheduled or s.pending) and not s.paused for s in found)

    async def _clean_now_and_then(self) -> None:
        # Fail at once on a file that cannot be used; be patient otherwise.
        with contextlib.suppress(DatabaseBusyError, DatabaseFullError):
            await self._worker.backend.cleanup()
        self._cleaned = True
        self._changed.set()
        while True:
            # Jitter, so that a fleet of workers does not clean up in step.
            await asyncio.sleep(_CLEANUP_INTERVAL * random.uniform(0.75, 1.25))
            try:
                await self._worker.backend.cleanup()
            except Exception as error:  # noqa: BLE001 -- the next one may do better
                self._log(logging.WARNING, "cleanup failed: %s", error)

    # Running.

    def _take(self, task: Task) -> None:
        """Start a task that was claimed; nothing is awaited in between."""
        self._left -= 1
        self._free -= 1
        run = _Run(task, self._heartbeat)
        self._runs.add(run)
        function = self._worker.tasks._functions.get(task.func)
        if function is None:
            run.outcome = self._refuse(run)
            self._end(run)
        elif self._is_fresh(task):
            self._start(run, function)
        else:
            run.job = self._loop.create_task(self._confirm(run, function))

    def _refuse(self, run: _Run) -> _Outcome:
        if self._terms.until_empty:
            return _Outcome(error=UnknownTaskError(run.task.func), retry=False)
        self.warn(run, "is given back: this worker does not know its function")
        return _Outcome(released=True, delay=60.0)

    def _is_fresh(self, task: Task) -> bool:
        # The claim may have been delivered late, because a function blocked the
        # loop; its lease may be over. By another clock than ours every claim
        # looks stale: that costs one more heartbeat, and no harm.
        until = task.lease_until
        left = self._worker.lease if until is None else until.timestamp() - time.time()
        return left > self._worker.lease / 2

    async def _confirm(self, run: _Run, function: TaskFunction[..., Any]) -> None:
        """Start a run whose lease may have ended, if it is still ours."""
        try:
            await self._worker.backend.queue.extend(run.task, self._worker.lease)
        except asyncio.CancelledError:
            run.outcome = _Outcome(released=True)
            self._end(run)
        except Exception as error:  # noqa: BLE001 -- it may be another worker's
            self.warn(run, "is left to its lease: %s", error)
            self._forget(run)
            self._free_slots(1)
        else:
            self._start(run, function)

    def _start(self, run: _Run, function: TaskFunction[..., Any]) -> None:
        context = self._context.copy()
        if function.is_async:
            work = self._run_async(run, function)
            run.job = self._loop.create_task(work, context=context)
        else:
            run.job = None
            run.call = lambda: context.run(self._call, run, function)
            self._threads.start(run)
        run.begin(self._worker.grace)

    def _call(self, run: _Run, function: TaskFunction[..., Any]) -> Any:
        """Call a plain function; in its thread."""
        task, wrap = run.task, self._worker.wrap
        _current_run.set(run)
        with wrap(task) if wrap else contextlib.nullcontext():  # type: ignore[union-attr]
            return _finished(function.function(*task.args, **task.kwargs))

    async def _await(self, run: _Run, function: TaskFunction[..., Any]) -> Any:
        """Call an async function; on the loop."""
        task, wrap = run.task, self._worker.wrap
        _current_run.set(run)
        if wrap is None:
            return await function.function(*task.args, **task.kwargs)
        async with contextlib.AsyncExitStack() as stack:
            await _enter(stack, wrap(task))
            return await function.function(*task.args, **task.kwargs)

    async def _run_async(self, run: _Run, function: TaskFunction[..., Any]) -> None:
        try:
            run.outcome = _Outcome(await self._await(run, function))
        except asyncio.CancelledError as error:
            run.outcome = self._judge_cancelled(run, error)
        except BaseException as error:  # SystemExit is a failure too
            if self._loop.is_closed():  # which it has outlived
                raise
            run.outcome = run.judge(error)
        run.end_fork()
        self._end(run)

    def _judge_cancelled(self, run: _Run, error: asyncio.CancelledError) -> _Outcome:
        if run.cancelled_for == "timeout":
            return run.judge(TaskTimeout().with_traceback(error.__traceback__))
        # Whoever ends the loop cancels all its tasks. A function that cancels itself
        # has failed: given back, it would run again at once and for ever.
        ends = self._job is None or self._job.done() or self._job.cancelling() > 0
        if run.cancelled_for or ends or not self._claims:
            return _Outcome(released=True)
        return run.judge(error)

    # Called by the heartbeat, in its thread.

    def interrupt(self, run: _Run) -> bool:
        """End a run that is over its time; False: not at this moment."""
        if run.job is None:
            return self._threads.interrupt(run)
        _call_soon(self._loop, self._cancel, run, "timeout")
        return True

    def lose(self, run: _Run) -> None:
        """Take note that a run is no longer ours."""
        if run.outcome is None and not run.lost:  # else its outcome finds out
            run.lost = True
            self.warn(run, "has lost its lease while it runs")
            _call_soon(self._loop, self._cancel, run, "lost")

    def give_up(self, run: _Run) -> None:
        """Leave a run alone that does not end."""
        run.lost = True
        text = "does not end; its attempt has failed, and the worker stops"
        self._log(logging.ERROR, text, task=run.task)
        _call_soon(self._loop, self._wind_up)
        patience = self._worker.grace + _LAST_WRITES
        asyncio.get_running_loop().call_later(patience, self._check_loop)

    def _check_loop(self) -> None:
        """End what cannot wind up: an async function blocks the loop for ever."""
        if self._stuck:
            return
        text = "the worker's event loop is blocked; its tasks are left to others"
        self._log(logging.ERROR, text)
        if self._terms.owns_process:
            os._exit(STUCK_STATUS)
        self._heartbeat.end()

    def _check_stopped(self) -> None:
        if self._stopped_at == math.inf:  # the loop has not heard of it
            self._check_loop()

    def _wind_up(self) -> None:
        self._stuck = True
        self._claim_no_more()

    # Settling.

    def _end(self, run: _Run) -> None:
        """See that an outcome is written, together with those that end meanwhile.

        Slots are free when that begins, not earlier: outcomes must be on their way
        before the next claim is, or more would be claimed than there are slots.
        """
        if not self._ended:
            self._loop.call_soon(self._settle_ended)
        self._ended.append(run)

    def _settle_ended(self) -> None:
        ended, self._ended = self._ended, []
        done = [run for run in ended if run.is_done()]
        if len(done) > 1 and self._complete_many is not None:
            job = self._loop.create_task(self._settle_many(done))
            for run in done:
                run.job = job
        else:
            done = []
        for run in set(ended).difference(done):
            run.job = self._loop.create_task(self._settle(run))
        short = time.monotonic() - _SHORT_RUN
        self._make_slots(sum(run.extended_at > short for run in ended))
        self._free_slots(len(ended))

    async def _settle_many(self, runs: Sequence[_Run]) -> None:
        """Write the values of runs in one commit, or each alone if that fails."""
        values = [(run.task, cast(_Outcome, run.outcome).value) for run in runs]
        try:
            await self._complete_many(values)
        except LeaseLostError as error:
            for run in runs:
                if run.task.id in error.task_ids:
                    self.warn(run, "has lost its lease; its outcome is dropped")
        except Exception:  # noqa: BLE001 -- each finds out what is wrong
            await asyncio.gather(*map(self._settle, runs))
        finally:
            self._forget(*runs)

    async def _settle(self, run: _Run) -> None:
        """Write the outcome until it is written, or no longer ours to write."""
        report = partial(self.warn, run, "cannot be settled yet: %s")
        try:
            await _insist(partial(self._write, run), report)
        except LeaseLostError:
            self.warn(run, "has lost its lease; its outcome is dropped")
        except _UNUSABLE as error:
            self.warn(run, "is left to its lease: %s", error)
            self._failure = error
            self._claim_no_more()
        finally:
            self._forget(run)

    def _forget(self, *runs: _Run) -> None:
        self._runs.difference_update(runs)
        self._changed.set()

    def _free_slots(self, count: int) -> None:
        self._free += count
        self._changed.set()

    async def _write(self, run: _Run) -> None:
        backend, task, outcome = self._worker.backend, run.task, run.outcome
        assert outcome is not None
        if run.lost:
            return
        if outcome.released:
            await backend.queue.release(task, delay=outcome.delay or 0.0)
        elif outcome.error is None:
            await self._complete(run, outcome.value)
        else:
            status = await backend.fail(
                task, outcome.error, retry=outcome.retry, delay=outcome.delay
            )
            self._report(run, status, outcome.error)

    async def _complete(self, run: _Run, value: Any) -> None:
        try:
            await self._worker.backend.complete(run.task, value)
        except (TypeError, ValueError, RecursionError) as error:
            # The value cannot be stored, and at another try would be the same.
            run.outcome = _Outcome(error=error, retry=False)
            await self._write(run)

    def _report(self, run: _Run, status: TaskStatus, error: BaseException) -> None:
        task = run.task
        if status == TaskStatus.FAILED:
            self._log(logging.ERROR, "has failed for good", task=task, error=error)
        else:
            text = "failed in attempt %d of %d and runs again: %s"
            reason = _shorten(_error_text(error), 200)
            self.warn(run, text, task.attempt, task.max_attempts, reason)

    def warn(self, run: _Run, message: str, *args: object) -> None:
        self._log(logging.WARNING, message, *args, task=run.task)

    def _log(self, level: int, message: str, *args: object, **facts: Any) -> None:
        _log(level, self._worker.name, message, *args, **facts)


# -- Many processes --


class _Child:
    """One worker process, and the pipe through which it is told to stop.

    The process also stops when the pipe breaks, because this one has ended. It
    says when its worker is ready, and answers to whatever else it is told.
    """

    def __init__(
        self, make: Callable[[], AsyncWorker], name: str, terms: _ShiftTerms
    ) -> None:
        import multiprocessing  # here, because it costs import time

        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self.started_at = time.monotonic()
        self.status = 0
        self.ready = False
        self.ended: asyncio.Future[None] = _running_loop().create_future()
        self._pipe, far_end = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve_as_child, args=(make, far_end, terms), name=name
        )
        with _blocked(signal.SIGINT):
            self._process.start()
        far_end.close()
        threading.Thread(target=self._await_end, daemon=True).start()

    def _await_end(self) -> None:
        # By its process id: a pipe may be held open by what the child forked.
        for _ in range(100):  # another thread may be about to note how it ended
            self._process.join()
            if self._process.exitcode is not None:
                break
            time.sleep(0.01)
        # Not known where the program collects all children as they end.
        self.status = self._process.exitcode or 0
        _call_soon(self.ended.get_loop(), _set_result, self.ended, None)

    def tell(self, word: str) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(word)

    def has_answered(self) -> bool:
        """Return whether it said anything since this was last asked."""
        answered = False
        with contextlib.suppress(EOFError, OSError):
            while self._pipe.poll():
                self._pipe.recv()
                self.ready = answered = True
        return answered

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._pipe.close()


@contextlib.contextmanager
def _blocked(signum: signal.Signals) -> Generator[None]:
    """Hold a signal back, also in a process that is started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would let the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve_as_child(
    make: Callable[[], AsyncWorker], pipe: Connection, terms: _ShiftTerms
) -> None:
    """Be a worker process."""
    # A Ctrl-C in the terminal reaches parent and children: the parent decides.
    # A handler, not SIG_IGN, which programs started by tasks would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    worker = make()
    threading.Thread(target=_obey, args=(worker, pipe), daemon=True).start()

    def tell() -> None:
        with contextlib.suppress(OSError):
            pipe.send("ready")

    async def serve() -> int:
        try:
            return await worker._perform(_Shift(worker, terms, tell), [signal.SIGTERM])
        finally:
            await worker.backend.close()

    status = 1
    try:
        status = _run_loop(serve())
    finally:
        end = partial(_end_process, status, worker.grace + _LAST_WRITES)
        threading.Thread(target=end, daemon=True).start()
    sys.exit(status)


def _end_process(status: int, patience: float) -> None:
    """End a process whose exit waits for a thread, as one of an executor, for ever."""
    time.sleep(patience)
    os._exit(status)


def _obey(worker: AsyncWorker, pipe: Connection) -> None:
    """Answer the parent until it says to stop, or has ended; then stop."""
    with contextlib.suppress(EOFError, OSError):
        while pipe.recv() != "stop":
            pipe.send("alive")
    worker.stop()
    _end_process(1, worker.grace + 2 * _LAST_WRITES)


def _ignores_ends() -> bool:
    """Tell whether nobody learns how a child ends, as may be inherited over exec."""
    number = getattr(signal, "SIGCHLD", None)
    return number is not None and signal.getsignal(number) == signal.SIG_IGN


_KILLED = -9  # by SIGKILL, from outside: says nothing about the program


class _Crew:
    """Child processes that run a shift each; one that ends is replaced."""

    def __init__(self, worker: AsyncWorker, processes: int, terms: _ShiftTerms) -> None:
        self._worker = worker
        self._places = range(1, processes + 1)
        self._terms = replace(terms, owns_process=True)
        self._children: set[_Child] = set()
        self._loop = _running_loop()
        self._stopped = asyncio.Event()
        self._proven = False

    async def run(self) -> int:
        """Keep every place filled until stopped, or until the work is done."""
        # `multiprocessing` joins its children at exit. What is registered later
        # is called first.
        import multiprocessing.util  # noqa: F401 -- registers that

        atexit.register(self.stop)
        if threading.current_thread() is threading.main_thread() and _ignores_ends():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        jobs = [asyncio.ensure_future(self._keep(place)) for place in self._places]
        try:
            await asyncio.gather(*jobs)
        finally:
            self._stop()
            await asyncio.wait(jobs)
            atexit.unregister(self.stop)
        return 0

    def stop(self) -> None:
        """Tell the children to stop; they have the grace. For any thread."""
        _call_soon(self._loop, self._stop)

    abandon = stop

    def kill(self) -> None:
        """End the children at once."""
        for child in self._children:
            child.kill()

    def _stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._loop.call_later(self._worker.grace + 2 * _LAST_WRITES, self.kill)
        for child in self._children:
            child.tell("stop")

    async def _keep(self, place: int) -> None:
        """Keep one place filled, with a new name for each child in it."""
        pause = 0.0
        for life in itertools.count(1):
            if self._stopped.is_set():
                return
            suffix = f"-{place}" if life == 1 else f"-{place}.{life}"
            name = self._worker.name + suffix
            try:
                child = _Child(self._worker._copy(name), name, self._terms)
            except OSError as error:
                if not self._proven:
                    raise
                text = "worker process %s cannot be started: %s"
                _log(logging.WARNING, name, text, name, error)
                pause = _longer(pause)
            else:
                self._children.add(child)
                await self._watch(child)
                await self._bury(child)
                if self._terms.until_empty and child.status == 0:
                    return
                quick = time.monotonic() - child.started_at < _QUICK_DEATH
                planned = child.status in (0, STUCK_STATUS, _RENEW_STATUS)
                pause = _longer(pause) if quick and not planned else 0.0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopped.wait()

    async def _watch(self, child: _Child) -> None:
        """Await a child's end, and end one that gives no answer for a whole lease.

        It is stopped, or a function in C holds the interpreter's lock for good; so
        nothing extends its leases either. A child that does not answer yet because
        this process itself was stopped has the time of three more looks.
        """
        silent, pause = 0, self._worker.lease / 3
        while not (await asyncio.wait({child.ended}, timeout=pause))[0]:
            fine = child.has_answered() or not child.ready or self._stopped.is_set()
            silent = 0 if fine else silent + 1
            if silent == 4:
                text = "worker process %s gives no sign of life and is killed"
                _log(logging.ERROR, child.name, text, child.name)
                child.kill()
            if child.ready:
                child.tell("answer")

    async def _bury(self, child: _Child) -> None:
        """Free the tasks of a child that has ended; without waiting for leases."""
        self._children.discard(child)
        child.has_answered()
        self._proven = self._proven or child.ready
        child.close()
        await self._reclaim(child.name)
        if self._stopped.is_set() or child.status in (0, _RENEW_STATUS):
            return
        if not self._proven and child.status != _KILLED:
            raise RuntimeError(
                f"worker process {child.name} ended with status {child.status} before"
                " it was ready; its own message says why"
            )
        text = "worker process %s ended with status %s and is replaced"
        _log(logging.WARNING, child.name, text, child.name, child.status)

    async def _reclaim(self, name: str) -> None:
        def report(error: Exception) -> None:
            text = "cannot reclaim the tasks of %s: %s"
            _log(logging.WARNING, name, text, name, error)
            if self._stopped.is_set():  # their leases end by themselves
                raise StorageClosedError(name) from error

        with contextlib.suppress(StorageClosedError):
            await _insist(partial(self._worker.backend.queue.reclaim, name), report)


# -- What the user holds --


@contextlib.contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None],
    signums: Sequence[signal.Signals],
) -> Generator[None]:
    """Handle signals meanwhile."""
    # Not `loop.add_signal_handler`: that one waits for a function that blocks the
    # loop, and a second Ctrl-C must end just such a process.
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier or signal.SIG_DFL)


class AsyncWorker:
    """Run tasks in this event loop, in threads, or in child processes.

    `queues` in order of preference; at most `concurrency` tasks at once in each
    process (8 by default; async functions are cheap to run in hundreds). So many
    begin within some milliseconds, but while the interpreter is busy only one more
    every quarter of a second: processes that are free come first. `lease`: seconds
    after which another worker takes the tasks of one that has died; it is extended
    while a function runs. `grace`: seconds that running tasks are given at a stop,
    and a function to end after its timeout. `name` must be unique; by default it
    is made of host, process id and a random part.

    `wrap(task)` returns a context manager that is entered around each run, in the
    function's thread or on the loop; `lifespan()` one around the worker, in each
    process. Both may be plain or, where they are entered on the loop (around async
    functions and the worker), async.

    Raises: `TypeError` for a blocking backend: that is for `Worker`.
    """

    def __init__(
        self,
        backend: AsyncBackend,
        tasks: TaskRegistry,
        *,
        queues: QueueNames = ("default",),
        concurrency: int = DEFAULT_CONCURRENCY,
        lease: float = DEFAULT_LEASE,
        grace: float = 10.0,
        name: str | None = None,
        wrap: Callable[[Task], _AnyContext] | None = None,
        lifespan: Callable[[], _AnyContext] | None = None,
    ) -> None:
        self._arguments = _arguments_of(locals())
        _check_backend(backend)
        if not isinstance(tasks, TaskRegistry):
            raise TypeError(f"tasks must be a TaskRegistry, not {_show(tasks)}")
        if not inspect.iscoroutinefunction(backend.complete):
            raise TypeError("AsyncWorker needs an async backend; Worker takes this one")
        _check_values(concurrency=concurrency, lease=lease, grace=grace)
        _check_optional(name=name)
        self.backend = backend
        self.tasks = tasks
        self.queues = _queue_names(queues)
        self.concurrency = concurrency
        self.lease = lease
        self.grace = grace
        self.name = name or _worker_name()
        self.wrap = wrap
        self.lifespan = lifespan
        self._job: _Shift | _Crew | None = None
        self._stopping = False
        self._signals = 0

    async def run(
        self,
        *,
        until_empty: bool = False,
        max_tasks: int | None = None,
        processes: int = 1,
        signals: bool = True,
    ) -> int:
        """Work until stopped and return the exit status for the process.

        That is 0, or 75 when a function did not end within `grace` after its
        timeout and the process should be replaced (one whose event loop is blocked
        by such a function ends itself so, where `signals` says that the process is
        the worker's). `until_empty`: return when no task of our queues can be
        claimed or is scheduled (tasks that other workers run and queues that are
        paused do not count; one of an unknown name fails for good); it waits for a
        retry in the future, by the backend's clock. `max_tasks`: return after so
        many. `processes`: more than one runs the worker in as many child processes
        named `NAME-1` and so on, which are replaced when they end (with `max_tasks`
        after so many each, against what functions leak), or give no sign of life for
        a lease (stopped, or stuck in C); functions must then be importable.
        `signals`: stop at SIGINT or SIGTERM, and end at once at the second (main
        thread only).

        Cancelled, it releases async functions at once and waits for plain ones; in
        child processes both have the grace.
        """
        _check_values(processes=processes)
        _check_optional(max_tasks=max_tasks)
        self._check_idle()
        ours = signals and threading.current_thread() is threading.main_thread()
        terms = _ShiftTerms(until_empty, max_tasks or math.inf, owns_process=ours)
        job = _Crew(self, processes, terms) if processes > 1 else _Shift(self, terms)
        signums = (signal.SIGINT, signal.SIGTERM) if ours else ()
        status = await self._perform(job, signums)
        return status if status == STUCK_STATUS else 0

    def stop(self) -> None:
        """End `run` as the first signal does; from any thread, at any time.

        Before `run`, it makes the next `run` return at once.
        """
        self._stopping = True
        if (job := self._job) is not None:
            job.stop()

    def _check_idle(self) -> None:
        if self._job is not None:
            raise RuntimeError(f"worker {self.name!r} runs already")

    def _abandon(self) -> None:
        self._stopping = True
        if (job := self._job) is not None:
            job.abandon()

    async def _perform(
        self, job: _Shift | _Crew, signums: Sequence[signal.Signals]
    ) -> int:
        self._job = job
        self._signals = 0
        if self._stopping:
            job.stop()
        _log(logging.INFO, self.name, "worker %s starts", self.name)
        try:
            with _handling(self._on_signal, signums):
                return await _unbroken(job)
        finally:
            self._job = None
            self._stopping = False
            _log(logging.INFO, self.name, "worker %s stops", self.name)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            return self.stop()
        if self._job is not None:
            self._job.kill()
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
        os._exit(128 + signum)  # process 1 of a container is not killed by it

    def _copy(self, name: str) -> partial[AsyncWorker]:
        """Return what makes this worker anew in a child process."""
        changed: dict[str, Any] = {"backend": self.backend, "name": name}
        return partial(AsyncWorker, **(self._arguments | changed))


def _check_backend(backend: object) -> None:
    if not (hasattr(backend, "complete") and hasattr(backend, "queue")):
        raise TypeError(
            f"a worker needs a backend, as SQLiteBackend(path), not {_show(backend)}"
        )


def _worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"


async def _unbroken(job: _Shift | _Crew) -> int:
    """Await a job to its end, also when the caller is cancelled meanwhile."""
    work = asyncio.ensure_future(job.run())
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        import anyio  # here, because it costs import time

        job.abandon()
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({work})
        raise


def _run_loop(work: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine in a new event loop in this thread.

    In the main thread Ctrl-C cancels it, and is raised at its end. Not with
    `asyncio.run`, which at last waits for tasks that ignore cancellation.
    """
    runner = asyncio.Runner()
    try:
        return runner.run(work)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # one traceback, not the cancellation's too
    finally:
        loop = runner.get_loop()
        if left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


class _InThreads:
    """A blocking object of another engine, in async form: a thread for each call."""

    def __init__(self, blocking: Any) -> None:
        self._blocking = blocking

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        return partial(asyncio.to_thread, getattr(self._blocking, name))


class _QueueInThreads(_InThreads):
    async def dequeue_many(
        self, *args: Any, timeout: float | None, **terms: Any
    ) -> list[Task]:
        # In slices: a thread that waits cannot be told that nobody waits for it.
        ends_at = _deadline(timeout)
        while True:
            terms["timeout"] = max(0.0, min(ends_at - time.monotonic(), 0.25))
            call = asyncio.to_thread(self._blocking.dequeue_many, *args, **terms)
            claim = asyncio.ensure_future(call)
            try:
                tasks: list[Task] = await asyncio.shield(claim)
            except asyncio.CancelledError:
                with contextlib.suppress(Exception):  # else the stop would be lost
                    for task in await claim:
                        with contextlib.suppress(Exception):  # nor the next ones
                            await self.release(task)
                raise
            if tasks or time.monotonic() >= ends_at:
                return tasks


class _BackendInThreads(_InThreads):
    def __init__(self, blocking: Backend, *, copied: bool = False) -> None:
        super().__init__(blocking)
        self._copied = copied
        self.queue = _QueueInThreads(blocking.queue)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), copied=True), (self._blocking,)

    async def close(self) -> None:
        """Close a copy; what was given is the caller's."""
        if self._copied:
            await asyncio.to_thread(self._blocking.close)


def _to_async(backend: Backend) -> AsyncBackend:
    _check_backend(backend)
    if inspect.iscoroutinefunction(backend.complete):
        raise TypeError("Worker needs a blocking backend; AsyncWorker takes this one")
    to_async = getattr(backend, "to_async", partial(_BackendInThreads, backend))
    return cast("AsyncBackend", to_async())


class Worker:
    """Run tasks in this thread, in further threads, or in child processes.

    The blocking twin of `AsyncWorker`, which documents the parameters; async
    functions run on an event loop of the worker's own, in the thread that calls
    `run`, or in one beside it where that thread has a running loop (a notebook).

    Raises: `TypeError` for an async backend: that is for `AsyncWorker`.
    """

    def __init__(
        self,
        backend: Backend,
        tasks: TaskRegistry,
        *,
        queues: QueueNames = ("default",),
        concurrency: int = DEFAULT_CONCURRENCY,
        lease: float = DEFAULT_LEASE,
        grace: float = 10.0,
        name: str | None = None,
        wrap: Callable[[Task], _AnyContext] | None = None,
        lifespan: Callable[[], _AnyContext] | None = None,
    ) -> None:
        arguments = _arguments_of(locals())
        arguments["backend"] = _to_async(backend)
        self._async = AsyncWorker(**arguments)
        self._backend = backend
        self.name = self._async.name

    def run(
        self,
        *,
        until_empty: bool = False,
        max_tasks: int | None = None,
        processes: int = 1,
        signals: bool = True,
    ) -> int:
        """Work until stopped and return the exit status for the process.

        See `AsyncWorker.run`. With `signals=False`, Ctrl-C in the main thread
        stops it too, and is raised at the end.
        """
        work = partial(self._run, **_arguments_of(locals()))
        if asyncio._get_running_loop() is None:
            return _run_loop(work())
        return self._run_beside(work)

    def stop(self) -> None:
        """End `run` as the first signal does; from any thread, at any time.

        Before `run`, it makes the next `run` return at once.
        """
        self._async.stop()

    async def _run(self, **terms: Any) -> int:
        self._async._check_idle()
        self._async.backend = _to_async(self._backend)
        try:
            return await self._async.run(**terms)
        finally:
            await self._async.backend.close()

    def _run_beside(self, work: Callable[[], Coroutine[Any, Any, int]]) -> int:
        """Run in a new thread, because this one has a loop that runs."""
        ended: concurrent.futures.Future[int] = concurrent.futures.Future()

        def serve() -> None:
            try:
                ended.set_result(_run_loop(work()))
            except BaseException as error:  # noqa: BLE001 -- raised in the caller
                ended.set_exception(error)

        threading.Thread(target=serve, name=self.name, daemon=True).start()
        try:
            return ended.result()
        except KeyboardInterrupt:
            self._async._abandon()
            ended.exception()
            raise


# =============================================================================
# Command line
# =============================================================================
#
# `python -m omniq_sqlite COMMAND FILE` or the script `omniq-sqlite`. A command is
# a function from its options to the exit status. What is typed in is JSON or else
# a plain string; the only code that is imported is what the operator names with
# `--app`. What comes out of a file is escaped before it reaches a terminal.
# First how things are shown, then the demo, the other commands, the page on a
# file, and at the end the tables of options and commands.


class _CommandError(OmniQError):
    """A command cannot do what it was asked to; the text is the one line shown."""


# -- showing --


def _printable(text: str) -> str:
    """Return `text` without anything that a terminal would act on."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _show_cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "milliseconds")[:23]
    if isinstance(value, timedelta) and value.days:
        return f"{value.days} d {value.seconds // 3_600} h"
    return _printable(str(value))


def _age_of(instant: datetime | None) -> timedelta | None:
    if instant is None:
        return None
    return timedelta(seconds=max(0, int((_now() - instant).total_seconds())))


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for line in _table(headers, rows):
        print(line)


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table that fits the terminal, without empty columns.

    The widest columns give way first, but never the first one: it is what gets
    copied into the next command. Where there is no terminal, nothing is cut.
    """
    columns = [
        (header, *cells)
        for header, *cells in zip(headers, *rows, strict=True)
        if any(cell not in (None, "", 0) for cell in cells)
    ]
    table = [[_show_cell(cell) for cell in column] for column in columns]
    widths = [max(map(_width, column)) for column in table]
    while sum(widths) + 2 * len(widths) - 2 > _terminal_size()[0]:
        widest = max(widths[1:], default=0)
        if widest <= 3:
            break
        widths[widths.index(widest, 1)] -= 1
    right = [type(column[1]) is int for column in columns]
    colours = [["bold", *map(_colour_of, column[1:])] for column in columns]
    for line in zip(zip(*table, strict=True), zip(*colours, strict=True), strict=True):
        cells = map(_align, *line, widths, right)
        yield "  ".join(cells).rstrip()


def _terminal_size() -> tuple[int, int]:
    import shutil  # here, as below: only the command line pays for it

    return shutil.get_terminal_size((1_000_000, 1_000_000))


def _width(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _align(text: str, colour: str, width: int, right: bool) -> str:
    cut = _shorten(text, width)
    while _width(cut) > width:
        cut = _shorten(cut, len(cut) - 1)
    space = " " * (width - _width(cut))
    return space + _paint(cut, colour) if right else _paint(cut, colour) + space


_COLOURS = {"bold": 1, "red": 31, "green": 32, "yellow": 33, "blue": 34}
_COLOUR_OF = {
    "completed": "green", "running": "blue", "dequeued": "blue",
    "retry": "yellow", "released": "yellow", "cancelled": "yellow",
    "expired": "yellow", "failed": "red", "lease_lost": "red",
}  # fmt: skip


def _colour_of(value: object) -> str:
    return _COLOUR_OF.get(value, "") if isinstance(value, StrEnum) else ""


def _paint(text: str, colour: str) -> str:
    """Return `text` in a colour where that is wanted: https://no-color.org."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    wanted = terminal and os.environ.get("TERM") != "dumb"
    if not colour or not wanted or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _print_facts(value: Task | TaskResult) -> None:
    """Print the fields that say something, a line each; nothing is cut.

    What the program stored is shown as Python writes it.
    """
    returned = isinstance(value, TaskResult) and value.status == ResultStatus.SUCCESS
    for item in fields(value):
        name, content = item.name, getattr(value, item.name)
        said = content not in (None, (), {}) or (name == "value" and returned)
        if name != "traceback" and said:
            stored = name in ("args", "kwargs", "metadata", "progress", "value")
            shown = _printable(repr(content)) if stored else _show_cell(content)
            print(f"{name:<14} {shown}")


def _print_json(values: Iterable[Any]) -> None:
    """Print an object a line, in ASCII, which every terminal and pipe takes."""
    for value in values:
        print(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    try:
        return _encode(value)
    except _Refused:  # another serializer's
        return repr(value)


def _note(message: str) -> None:
    """Say something beside the output, which stays fit for a pipe."""
    with contextlib.suppress(OSError):
        print(_printable(message), file=sys.stderr)


def _nothing_found(what: str, options: argparse.Namespace) -> int:
    """Say that there is nothing to show; return the exit status for it."""
    _note(f"no {what} in {options.file!r}")
    return 1


def _program() -> str:
    """Return how this program was started, as typed in a shell."""
    import shlex
    import shutil

    if __name__ == "__main__":
        name = ["-m", __spec__.name] if __spec__ else sys.argv[:1]
        return shlex.join([sys.orig_argv[0], *name])
    script, path = "omniq-sqlite", sys.argv[0]
    called_by_path = os.path.basename(path) == script and shutil.which(script) != path
    return shlex.quote(path) if called_by_path else script


def _components(path: str, *wanted: str) -> frozenset[str]:
    """Return which tables of ours a file has; creates and changes nothing.

    What has none of those that are wanted is refused: opening it would create them.
    """
    if path == ":memory:":
        raise _CommandError("':memory:' ends with the command; name a file")
    if not os.path.exists(path):
        if wanted:
            raise _CommandError(f"there is no file {path!r}")
        return frozenset()
    database = _Database(_Options(_absolute(path)), ())

    def look() -> frozenset[str]:
        with contextlib.closing(database._open_file()) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            return frozenset(schema_versions(connection, path))

    found = database.retry(look)
    if wanted and found.isdisjoint(wanted):
        raise _CommandError(f"{path!r} has no OmniQ table of {' or '.join(wanted)}")
    return found


def _open(options: argparse.Namespace, *wanted: str) -> SQLiteBackend:
    """Open a file of ours with what it has; it gets no table that it has not."""
    found = _components(options.file, *wanted)
    # A file of results alone gets no queue: an empty one elsewhere stands in.
    queue = True if "queue" in found else SQLiteQueue(":memory:")
    return SQLiteBackend(
        options.file, queue=queue, results="results" in found, events="events" in found
    )


# -- demo --
#
# The id of a file's task follows from its path and version, and is its key, too.
# So of two runs beside each other the second adds neither what is under way (the
# key) nor what was finished a moment ago (the id, which `retention` keeps taken),
# and a later run knows by the results what was done before.

_DEMO_QUEUE = "demo"
_DEMO_CHUNK = 1_000  # tasks in one transaction, results in one look
_DEMO_READ = 1 << 20  # bytes; a worker that stops looks up between two reads

_demo_tasks = TaskRegistry()


def _version_of(status: os.stat_result) -> tuple[int, int, int]:
    """Return what tells versions of a file apart."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _file_id(path: str, version: tuple[int, int, int] | None) -> str:
    import hashlib

    known = repr((os.fsencode(path), version)).encode()
    return hashlib.sha256(known).hexdigest()[:32]


def _media_type(path: str) -> str:
    import mimetypes

    # Not the bare name: "data:…" would be taken for a URL.
    kind, encoding = mimetypes.guess_type("./" + os.path.basename(path), strict=False)
    if encoding is not None:
        return f"application/{'' if encoding == 'gzip' else 'x-'}{encoding}"
    return kind or "application/octet-stream"


def _is_database(status: os.stat_result, database: str) -> bool:
    """Tell whether a file is a database, or one beside it, under whatever name.

    Written to, it is destroyed. Closing any descriptor of it drops this process's
    locks on it: https://sqlite.org/howtocorrupt.html, section 2.2.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.lstat(database + suffix)):
                return True
    return False


def _open_regular(name: str, flags: int) -> int:
    # The name may have become a link or a FIFO since it was listed.
    for flag in ("O_NOFOLLOW", "O_NONBLOCK"):  # which Windows has not
        flags |= getattr(os, flag, 0)
    return os.open(name, flags)


async def _hash_file(name: str) -> tuple[str, int]:
    """Return digest and size of a regular file that does not change meanwhile.

    Async, so that a worker that stops takes it back between two reads and
    releases the task unharmed.
    """
    import hashlib

    digest = hashlib.sha256()
    with io.FileIO(name, opener=_open_regular) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError("no regular file any more")
        while chunk := file.read(_DEMO_READ):
            digest.update(chunk)
            await asyncio.sleep(0)
    if _version_of(os.lstat(name)) != _version_of(status):
        raise OSError("changed while it was read")
    return digest.hexdigest(), status.st_size


@_demo_tasks.register(name="fingerprint")
async def _fingerprint(path: str) -> dict[str, Any]:
    """Return SHA-256, size and media type of a file; an error names the file."""
    try:
        digest, size = await _hash_file(path)
    except OSError as error:
        reason = f"{error.strerror or error}: {path!r}"
        if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)):
            # That will be no better in a second, so there is no other attempt.
            raise Reject(reason) from error
        raise OSError(reason) from error
    return {"path": path, "sha256": digest, "size": size, "type": _media_type(path)}


class _Demo:
    """One run of the demo: what it found, and what came of it."""

    def __init__(self, backend: SQLiteBackend, database: str) -> None:
        self.backend = backend
        self.results = cast(ResultStorage, backend.results)
        self.database = os.path.realpath(database)
        self.unread: list[OSError] = []  # why folders could not be listed
        self.tasks: dict[str, str] = {}  # id by path, of a file's newest version
        self.before: set[str] = set()  # ids of tasks that an earlier run has done

    def run(self, folder: str, processes: int) -> None:
        """Fingerprint all files, then once more those that were replaced meanwhile."""
        self.backend.queue.retry_all(queue=_DEMO_QUEUE)  # what failed in earlier runs
        self.started_at = _now()
        for _ in range(2):
            if queued := self.queue_files(folder):
                over = threading.Event()
                progress = partial(self.show_progress, queued, over)
                thread = threading.Thread(target=progress)
                thread.start()
                try:
                    self.work(processes)
                finally:
                    over.set()
                    thread.join()

    # -- Queueing --

    def queue_files(self, folder: str) -> int:
        """Enqueue the files that have no digest yet; return how many these are."""
        files, queued = self.find_files(folder), 0
        while chunk := dict(itertools.islice(files, _DEMO_CHUNK)):
            queued += self.enqueue(chunk)
        return queued

    def find_files(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield id and path of each regular file whose version is new to this run."""
        for parent, _, names in os.walk(folder, onerror=self.unread.append):
            for name in names:
                path, version = os.path.join(parent, name), None
                with contextlib.suppress(OSError):  # its task will say why
                    status = os.lstat(path)
                    ours = _is_database(status, self.database)
                    if ours or not stat.S_ISREG(status.st_mode):
                        continue
                    version = _version_of(status)
                task_id = _file_id(path, version)
                if self.tasks.get(path) != task_id:
                    self.tasks[path] = task_id
                    yield task_id, path

    def enqueue(self, paths: dict[str, str]) -> int:
        """Enqueue by id what has no digest yet; return how many files that are."""
        results = self.results.get_many(paths)
        done = {i for i, r in results.items() if r.status is ResultStatus.SUCCESS}
        self.before |= done
        task = partial(Task, "fingerprint", max_attempts=5, retry_delay=0.2)
        tasks = {
            i: task((path,), queue=_DEMO_QUEUE, unique_key=i, id=i)
            for i, path in paths.items()
            if i not in done
        }
        while tasks:
            try:
                self.backend.enqueue_many(tasks.values())
                break
            except DuplicateTaskError as error:  # another run has just done it
                del tasks[error.task_id]
        return len(paths) - len(done)

    # -- Working --

    def stats(self) -> QueueStats:
        found = {stats.queue: stats for stats in self.backend.queue.stats()}
        return found.get(_DEMO_QUEUE, QueueStats(_DEMO_QUEUE))

    def count_left(self) -> int:
        stats = self.stats()
        return stats.scheduled + stats.pending + stats.running

    def work(self, processes: int) -> None:
        """Run workers until no file is left.

        What another run has claimed is waited for; should it die, it is ours.
        """
        for info in self.backend.queue.list_workers():
            if info.queues == (_DEMO_QUEUE,) and _why_gone(info, _now()):
                self.backend.queue.reclaim(info.name)
        while left := self.count_left():
            stats = self.stats()
            if stats.paused:
                advice = f"see {_program()} resume --help"
                raise _CommandError(f"the queue {_DEMO_QUEUE!r} is paused; {advice}")
            if not stats.scheduled and not stats.pending:
                time.sleep(0.2)
                self.backend.cleanup()
                continue
            worker = Worker(
                self.backend,
                _demo_tasks,
                queues=[_DEMO_QUEUE],
                # Many are quick together, but a few large files want all processes.
                concurrency=max(1, min(16, left // (4 * processes))),
                lease=10.0,
                grace=0.5,
            )
            # Without its own handling of signals, Ctrl-C is raised here.
            worker.run(until_empty=True, processes=processes, signals=False)

    def show_progress(self, total: int, over: threading.Event) -> None:
        """Show on a terminal how far it is."""
        if sys.stderr is None or not sys.stderr.isatty():
            return
        started = time.monotonic()
        while not over.wait(0.25):
            done = max(0, total - self.count_left())
            rate = done / (time.monotonic() - started)
            left = f"{(total - done) / rate:,.0f} s left" if done else ""
            line = f"{done:,} of {total:,} files  {rate:,.1f} files/s  {left}"
            print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)
        print(f"\r{'':70}", end="\r", file=sys.stderr, flush=True)

    # -- Reporting --

    def outcomes(self) -> Iterator[tuple[str, TaskResult | None]]:
        """Yield each file's path and result."""
        files = iter(self.tasks.items())
        while chunk := list(itertools.islice(files, _DEMO_CHUNK)):
            results = self.results.get_many([task_id for _, task_id in chunk])
            yield from ((path, results.get(task_id)) for path, task_id in chunk)

    def report(self) -> int:
        """Print what came of it; return the exit status."""
        seconds = (_now() - self.started_at).total_seconds()
        events = cast(EventStorage, self.backend.events)
        failed = {error.filename: error.strerror or "" for error in self.unread}
        shares: dict[str, list[int]] = {"": []}  # by worker: the sizes of its files
        for path, result in self.outcomes():
            if result is None or result.status is not ResultStatus.SUCCESS:
                error = (result and result.error) or "no result"
                failed[path] = error.removesuffix(f": {path!r}")
            else:
                worker = "" if result.task_id in self.before else result.worker or "-"
                shares.setdefault(worker, []).append(result.value["size"])
        before = shares.pop("")
        rows = [(name, len(sizes), sum(sizes)) for name, sizes in shares.items()]
        now = sum(count for _, count, _ in rows)
        for name, fact in (
            ("files", len(self.tasks)),
            ("  done before", len(before)),
            ("  done now", now),
            ("  failed", len(failed)),
            ("bytes", sum(before) + sum(size for _, _, size in rows)),
            ("seconds", f"{seconds:,.2f}"),
            ("tasks/s", f"{now / seconds:,.0f}"),
            ("retries", events.count(type=EventType.RETRY, since=self.started_at)),
        ):
            print(f"{name:<14} {_show_cell(fact)}")
        if rows:
            print()
            _print_table(["worker", "files", "bytes"], sorted(rows))
        if failed:
            self.report_failures(failed)
        return 1 if failed else 0

    def report_failures(self, failed: dict[str, str]) -> None:
        reasons = collections.Counter(failed.values()).most_common()
        print()
        _print_table(["failed because of", "files"], reasons)
        print()
        for path, reason in itertools.islice(failed.items(), 50):
            print(_printable(f"{reason}: {path!r}  {self.tasks.get(path, '')}"))
        if len(failed) > 50:
            print(f"and {len(failed) - 50:,} more: see the failed tasks")


def _print_next_commands(path: str) -> None:
    import shlex

    print(f"\ndatabase: {_printable(os.path.realpath(path))}\nlook into it:")
    commands = "stats {}", "list {} --status failed", "show {} TASK_ID"
    for command in (*commands, "events {} --follow", "serve {}"):
        print(_printable(f"  {_program()} {command.format(shlex.quote(path))}"))


def _run_demo(options: argparse.Namespace) -> int:
    """Compute SHA-256, size and media type of every file under a folder.

    Run again with the same --db it goes on where it stopped and does no finished
    file again; a file is the same while its path, inode, size and time of
    modification are. Symbolic links, what is no regular file, and the database
    itself are left out.
    """
    if not os.path.isdir(options.folder):
        raise _CommandError(f"there is no folder {options.folder!r}")
    _components(options.db)  # refuses what is no file
    with SQLiteBackend(
        options.db, events=True, result_ttl=None, retention=7 * 86_400.0
    ) as backend:
        demo = _Demo(backend, options.db)
        try:
            demo.run(os.path.realpath(options.folder), options.workers)
        except KeyboardInterrupt:
            _note(f"stopped, {demo.count_left():,} files left; run it again to go on")
            raise
        status = demo.report()
    _print_next_commands(options.db)
    return status


# -- worker, enqueue --


def _import_registry(name: str) -> Any:
    """Return the registry that the operator named as MODULE:ATTRIBUTE."""
    module, _, attribute = name.partition(":")
    if not module or not attribute or "/" in module or module.endswith(".py"):
        rule = "MODULE:REGISTRY, such as jobs:tasks for jobs.py in this folder"
        raise _CommandError(f"--app must be {rule}, not {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename != __file__ and os.path.exists(last.filename):
            reason += f" ({os.path.basename(last.filename)}, line {last.lineno})"
        raise _CommandError(f"cannot import {name!r}: {reason}") from error


def _module_of(registry: object, name: str) -> Any:
    """Return the copy of this module that made `registry`.

    `-m omniq_sqlite` runs beside the `omniq_sqlite` that the application imports, or
    its copy under another name; `current_task` and `Retry` work in their own copy.
    """
    for base in type(registry).__mro__:
        if base.__name__ == "TaskRegistry":
            return sys.modules[base.__module__]
    raise _CommandError(f"{name!r} is no TaskRegistry: {_show(registry)}")


@contextlib.contextmanager
def _log_to_terminal(level: str) -> Generator[None]:
    """Show this process's log on standard error."""
    form = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form)
    yield


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; the others keep the library's default."""
    values: dict[str, Any] = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _run_worker(options: argparse.Namespace) -> int:
    """Run the tasks of a file until stopped by Ctrl-C or SIGTERM.

    Events are logged if the file holds some.
    """
    registry = _import_registry(options.app)
    module = _module_of(registry, options.app)
    log = partial(_log_to_terminal, options.log_level)
    terms = _given(options, "concurrency", "lease", "grace", "name", "queues")
    events = "events" in _components(options.file)
    with log(), module.SQLiteBackend(options.file, events=events) as backend:
        worker = module.Worker(backend, registry, lifespan=log, **terms)
        limits = _given(options, "max_tasks", "processes")
        status: int = worker.run(until_empty=options.until_empty, **limits)
    return status


def _parse_value(text: str) -> Any:
    """Return `text` as JSON, or else as it is; nothing is ever evaluated."""
    try:
        return json.loads(text, parse_constant=int)  # raises: NaN is no JSON
    except (ValueError, RecursionError):
        return text


def _parse_object(text: str) -> dict[str, Any]:
    value = _parse_value(text)
    if not isinstance(value, dict):
        raise _CommandError("--kwargs must be a JSON object, such as '{\"size\": 3}'")
    return value


def _run_enqueue(options: argparse.Namespace) -> int:
    """Add a task and print its id; an argument is JSON or else a plain string.

    Events are logged if the file holds some.
    """
    names = ["kwargs", "queue", "priority", "max_attempts", "retry_delay"]
    terms = _given(options, *names, "timeout", "unique_key")
    task = Task(options.func, tuple(map(_parse_value, options.args)), **terms)
    events = "events" in _components(options.file)
    with SQLiteBackend(options.file, events=events) as backend:
        task_id = backend.enqueue(task, delay=options.delay)
    print(_printable(task_id))
    if task_id != task.id:
        _note(f"nothing added: this task holds the key {task.unique_key!r}")
    return 0


# -- what goes on in a file, for `stats --watch`, `report` and `serve` --

_PAST_LIMIT = 100_000  # events that are looked at, so that a page costs no minute
_RUNNING_LIMIT = 200  # tasks that are shown

# A task waits (scheduled or pending), runs, or is not there ("").
_STATE_AFTER = {
    "enqueued": "waiting", "dequeued": "running", "retry": "waiting",
    "released": "waiting", "lease_lost": "waiting",
}  # fmt: skip
# What it did before the first event that is known of it; else it ran.
_STATE_BEFORE = {
    "enqueued": "", "dequeued": "waiting", "cancelled": "waiting", "expired": "waiting"
}  # fmt: skip
_OUTCOMES = (EventType.COMPLETED, EventType.RETRY, EventType.FAILED)  # of an attempt


class _History:
    """What happened to tasks, replayed event by event.

    `steps`: instant, event, and state of the task before and after; `waits`:
    seconds from enqueue to first start; `runs`: function, how it ended, seconds.
    """

    def __init__(self, source: str, rows: Iterable[Row]) -> None:
        self.source = source
        self.steps: list[tuple[float, str, str, str]] = []
        self.waits: list[float] = []
        self.runs: list[tuple[str, str, float]] = []
        self.funcs: dict[str, str] = {}  # by task
        self._last: dict[str, tuple[float, str]] = {}  # by task: its last event
        for row in rows:
            if row[1] in _EVENT_TYPES and row[0] < 1e11:  # a year that dates know
                self._replay(*row)
        self._last.clear()

    def _replay(
        self, at: float, kind: str, task_id: str, func: str | None, details: str
    ) -> None:
        since, last = self._last.get(task_id, (at, ""))
        before = _STATE_AFTER.get(last, "")
        by_hand = kind == EventType.RETRY and details == "{}"  # it had ended
        if not last and not by_hand:
            before = _STATE_BEFORE.get(kind, "running")
        if kind == EventType.DEQUEUED:
            self.funcs[task_id] = func or _func_of(details)
            if last == EventType.ENQUEUED and details != "again":
                self.waits.append(at - since)
        elif last == EventType.DEQUEUED and kind in _OUTCOMES:
            self.runs.append((self.funcs[task_id], kind, at - since))
        what = "" if by_hand else kind
        self.steps.append((at, what, before, _STATE_AFTER.get(kind, "")))
        self._last[task_id] = at, kind

    def outcomes(self) -> dict[str, int]:
        """Return how often an attempt ended in each way."""
        counts = collections.Counter(kind for _, kind, _, _ in self.steps)
        return {str(kind): counts[kind] for kind in _OUTCOMES}


def _func_of(details: str) -> str:
    try:
        return str(json.loads(details)["func"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return "?"  # logged by something else


@dataclass(frozen=True, slots=True)
class _Running:
    """A row of `SELECT_RUNNING`."""

    id: str
    queue: str
    func: str
    attempts: str
    worker: str | None
    started_at: float | None
    lease_until: float
    progress: str | None


@dataclass(frozen=True, slots=True)
class _Failure:
    """A row of `SELECT_FAILED_TASKS` or `SELECT_FAILED_RESULTS`."""

    task_id: str
    at: float
    func: str | None
    error: str


@dataclass(frozen=True, slots=True)
class _Overview:
    """What a file said at one instant."""

    at: datetime
    queues: list[QueueStats]
    workers: list[WorkerInfo]
    running: list[_Running]
    overdue: int
    failures: list[_Failure]
    history: _History


_Rows = Callable[..., list[Row]]  # executes a statement with its parameters


def _look(
    backend: SQLiteBackend,
    since: float,
    failed_since: float = 0.0,
    failed_limit: int = 10,
) -> _Overview:
    """Look at a file, what happened in it since an instant, and what failed last."""
    failed: dict[str, Any] = {"since": failed_since, "limit": failed_limit}

    def look(connection: sqlite3.Connection) -> _Overview:
        def rows(statement: str, **terms: object) -> list[Row]:
            return connection.execute(statement, terms).fetchall()

        connection.execute("BEGIN")  # all of it is of one instant
        try:
            history = _read_history(backend, rows, since)
            return _Overview(
                _now(),
                _read_stats(connection),
                _read("worker", _worker_of, rows(SELECT_WORKERS), _JSON),
                [_Running(*row) for row in rows(SELECT_RUNNING, limit=_RUNNING_LIMIT)],
                sum(count for _, count in rows(SELECT_OVERDUE, before=time.time())),
                _read_failures(backend, partial(rows, **failed), history.funcs),
                history,
            )
        finally:
            connection.execute("COMMIT")

    return backend._run(backend.queue._async._gateway.read, look)


def _read_history(backend: SQLiteBackend, rows: _Rows, since: float) -> _History:
    """Read the past from the events, or else from what the tables say of it."""
    past = partial(rows, since=since, limit=_PAST_LIMIT)
    if backend.events is not None and rows(SELECT_LAST_EVENT) != [(0,)]:
        # In the order of their commits: clocks may have been set.
        found = sorted(past(SELECT_EVENT_PAST), key=lambda row: row[5])
        return _History("events", (row[:5] for row in found))
    found = past(SELECT_TASK_PAST)
    known = {row[2] for row in found}
    if backend.results is not None:
        found += [row for row in past(SELECT_RESULT_PAST) if row[2] not in known]
    # Of one instant: in the order of a task's life.
    order = list(EventType).index
    return _History("tables", sorted(found, key=lambda r: (r[0], order(r[1]))))


def _read_failures(
    backend: SQLiteBackend, last: _Rows, funcs: Mapping[str, str]
) -> list[_Failure]:
    """Read what failed, the last one first: results, and tasks without one."""
    rows = [] if backend.results is None else last(SELECT_FAILED_RESULTS)
    failed = {
        task_id: _Failure(task_id, at, func or funcs.get(task_id), error)
        for task_id, at, func, error in rows + last(SELECT_FAILED_TASKS)
    }
    return sorted(failed.values(), key=lambda failure: failure.at, reverse=True)


# -- stats, list, show, events --


def _run_stats(options: argparse.Namespace) -> int:
    """Show how many tasks each queue has in which status, and the workers.

    With --watch every second anew, with what was done in the last minute, what
    runs, and what failed last.
    """
    with _open(options, "queue") as backend:
        while options.watch:
            began = time.monotonic()
            _show_frame(backend, options)
            took = time.monotonic() - began
            time.sleep(max(1.0 - took, took))  # a large file is not read all the time
        queues, workers = backend.queue.stats(), backend.queue.list_workers()
    if not queues and not workers:
        return _nothing_found("tasks", options)
    if options.json:
        _print_stats_json(queues, workers)
    else:
        print("\n".join(_lines_of_stats(queues, workers)))
    return 0


def _print_stats_json(queues: list[QueueStats], workers: list[WorkerInfo]) -> None:
    _print_json({"kind": "queue"} | _as_json(stats) for stats in queues)
    _print_json({"kind": "worker"} | _as_json(worker) for worker in workers)


def _lines_of_stats(
    queues: list[QueueStats], workers: list[WorkerInfo]
) -> Iterator[str]:
    headers = ["queue", *TaskStatus, "paused", "oldest"]
    yield from _table(headers, list(map(_row_of_queue, queues)))
    if queues and workers:
        yield ""
    headers = ["worker", "host", "pid", "queues", "running", "seen"]
    yield from _table(headers, list(map(_row_of_worker, workers)))


def _show_frame(backend: SQLiteBackend, options: argparse.Namespace) -> None:
    """Show what goes on now; on a terminal in place of what was shown before."""
    seen = _look(backend, time.time() - 60.0)
    if options.json:
        _print_stats_json(seen.queues, seen.workers)
        _print_json([{"kind": "minute", "at": seen.at, **seen.history.outcomes()}])
    else:
        lines = [*_lines_of_frame(seen), ""]
        if sys.stdout.isatty():
            # Home, each line up to its end, and what is left below it.
            lines = [line + "\x1b[K" for line in lines[: _terminal_size()[1] - 1]]
            lines = ["\x1b[H" + lines[0], *lines[1:], "\x1b[J"]
        print("\n".join(lines), end="")
    sys.stdout.flush()


def _lines_of_frame(seen: _Overview) -> Iterator[str]:
    text = f"{seen.at.astimezone():%H:%M:%S}  last minute: "
    text += "{completed:,} completed, {retry:,} retried, {failed:,} failed"
    text = text.format_map(seen.history.outcomes()) + f"  (by {seen.history.source})"
    yield _shorten(text, _terminal_size()[0])
    yield ""
    yield from _lines_of_stats(seen.queues, seen.workers)
    if seen.running:
        yield ""
        headers = ["running", "function", "for", "lease", "worker"]
        yield from _table(headers, [_row_of_running(r, seen.at) for r in seen.running])
    if seen.failures:
        yield ""
        rows = [
            (f.task_id, _age_of(_from_unix(f.at)), f.func, f.error)
            for f in seen.failures[:10]
        ]
        yield from _table(["failed last", "ago", "function", "error"], rows)


def _row_of_running(task: _Running, now: datetime) -> list[object]:
    left = int(task.lease_until - now.timestamp())
    lease = f"{'' if left > 0 else 'over '}{_show_cell(timedelta(seconds=abs(left)))}"
    age = _age_of(_from_unix(task.started_at))
    return [task.id, task.func, age, lease, task.worker]


def _row_of_queue(stats: QueueStats) -> list[object]:
    depth = [getattr(stats, status) for status in TaskStatus]
    paused = "yes" if stats.paused else ""
    return [stats.queue, *depth, paused, _age_of(stats.oldest_pending_at)]


def _row_of_worker(w: WorkerInfo) -> list[object]:
    queues = ", ".join(w.queues)
    return [w.name, w.host, str(w.pid), queues, w.running, _age_of(w.seen_at)]


def _run_list(options: argparse.Namespace) -> int:
    """List tasks in the order in which they were enqueued.

    The age of a task that has ended counts from its end.
    """
    chosen = _filters(options, TaskStatus)
    chosen |= {"limit": options.limit + 1, "offset": options.offset}
    with _open(options, "queue") as backend:
        rows = backend._run(backend.queue._async._rows, SELECT_MATCHING, **chosen)
        tasks = [_read_task(backend, row) for row in rows[: options.limit]]
    shown = [task for task in tasks if task is not None]
    if not shown:
        return _nothing_found("such tasks", options)
    if options.json:
        _print_json(shown)
    else:
        # Blank, and so left out, is what the filters make the same in all of them.
        same = dict.fromkeys(n for n in ("status", "queue") if getattr(options, n))
        table = [_row_of_task(task) | same for task in shown]
        _print_table(list(table[0]), [list(row.values()) for row in table])
    if len(rows) > options.limit:
        _note(f"there are more than {options.limit:,}: see --limit and --offset")
    return 0


def _read_task(backend: SQLiteBackend, row: Row) -> Task | None:
    """Return a task, or one that says why it cannot be read, so that others show."""
    _, task_id, status, queue, func = row
    try:
        return backend.queue.get_task(task_id)
    except SerializationError as error:
        stored = TaskStatus(status)
        return Task(func, queue=queue, id=task_id, status=stored, error=str(error))


def _row_of_task(task: Task) -> dict[str, object]:
    values = [*map(repr, task.args), *(f"{k}={v!r}" for k, v in task.kwargs.items())]
    return {
        "id": task.id,
        "status": task.status,
        "queue": task.queue,
        "try": task.attempt,
        "age": _age_of(task.finished_at or task.created_at),
        "call": _shorten(f"{task.func}({', '.join(values)})", 200),
        "error": _shorten(task.error or "", 200),
    }


def _run_show(options: argparse.Namespace) -> int:
    """Show the whole life of a task: payload, attempts, events, result, traceback."""
    with _open(options, *COMPONENT_TABLE) as backend:
        task = backend.queue.get_task(options.id)
        result = backend.results.get(options.id) if backend.results else None
        log = backend.events
        events = log.query(task_id=options.id, limit=1_000) if log else []
    if not task and not result and not events:
        return _nothing_found(f"task {options.id!r}", options)
    if options.json:
        _print_json([{"task": task, "result": result, "events": events}])
        return 0
    if task is not None:
        print(_paint("TASK", "bold"))
        _print_facts(task)
    if events:
        print(_paint("EVENTS", "bold"))
        rows = [
            (e.at, e.type, e.details.get("attempt"), e.worker, e.message)
            for e in events
        ]
        _print_table(["at", "event", "attempt", "worker", "message"], rows)
    if result is not None:
        print(_paint("RESULT", "bold"))
        _print_facts(result)
        for line in (result.traceback or "").splitlines():
            print(_printable(line))
    return 0


def _run_check(options: argparse.Namespace) -> int:
    """Look for what is wrong with a file; status 1 if something is.

    Integrity, schema, size of the WAL, leases that are over, workers that are
    gone. With --worker only whether this one lives and was seen within a minute:
    a health probe, which does not read the file through.
    """
    with _open(options, *COMPONENT_TABLE) as backend:
        if options.worker is not None:
            return _check_worker(backend.queue.list_workers(), options)
        findings = backend.check()
    if options.json:
        _print_json(findings)
    elif findings:
        rows = [(f.check, f.severity, f.message) for f in findings]
        _print_table(["check", "severity", "message"], rows)
    else:
        print("nothing is wrong")
    return 1 if findings else 0


def _check_worker(workers: Sequence[WorkerInfo], options: argparse.Namespace) -> int:
    """Tell whether a worker lives; the children of `--processes` are one worker."""
    children = re.compile(re.escape(options.worker) + r"(-\d+(\.\d+)?)?")
    ours = [worker for worker in workers if children.fullmatch(worker.name)]
    gone = {worker.name: _why_gone(worker, _now()) for worker in ours}
    if options.json:
        _print_json(_as_json(w) | {"gone": gone[w.name]} for w in ours)
    else:
        for name, reason in gone.items():
            print(_printable(f"worker {name!r} {reason or 'lives'}"))
    if not ours:
        return _nothing_found(f"worker {options.worker!r}", options)
    return 0 if None in gone.values() else 1


def _run_events(options: argparse.Namespace) -> int:
    """Show the last events; with --follow also what happens from now on."""
    if options.follow and options.until is not None:
        raise _CommandError("--until means nothing with --follow, which goes on")
    filters = {"task_id": options.task, "queue": options.queue, "type": options.type}
    period = {"since": options.since, "until": options.until}
    with _open(options, *COMPONENT_TABLE) as backend:
        events = backend.events
        if events is None:
            hint = "a backend with events=True keeps them"
            raise _CommandError(f"no events are kept in {options.file!r}: {hint}")
        # It begins before the last ones are read: what is logged between the two
        # is seen twice and shown once.
        following = events.follow() if options.follow else ()
        newest = {"limit": options.limit, "newest_first": True}
        last = events.query(**filters, **period, **newest)
        for event in reversed(last):
            _print_event(event, options)
        shown = {event.id for event in last}
        for event in following:
            fits = all(v in (None, getattr(event, k)) for k, v in filters.items())
            if fits and event.id not in shown:
                _print_event(event, options)
    return 0 if last else _nothing_found("such events", options)


def _print_event(event: TaskEvent, options: argparse.Namespace) -> None:
    if options.json:
        _print_json([event])
    else:
        kind = _paint(_printable(event.type), _colour_of(event.type))
        facts = (event.queue, event.task_id, event.worker, event.message)
        print("  ".join((_show_cell(event.at), kind, *map(_show_cell, facts))).rstrip())
    if options.follow:
        sys.stdout.flush()


# -- retry, cancel, purge, pause, resume, backup --

_CHANGED_AT_ONCE = 1_000  # tasks in one transaction, so that others get their turn
_Verb = Callable[[_Change, str], object]  # falsy: it has changed nothing


def _run_retry(options: argparse.Namespace) -> int:
    """Let failed, cancelled or expired tasks run again, with fresh attempts.

    Name them by id, by filters that all hold, or say --all.
    """
    statuses = (TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.EXPIRED)
    return _change_tasks(options, _retry, "queued again", statuses)


def _run_cancel(options: argparse.Namespace) -> int:
    """Cancel tasks that are scheduled, pending or running.

    A running one learns of it at its next heartbeat. Name them by id, by filters
    that all hold, or say --all.
    """

    def cancel(change: _Change, task_id: str) -> int:
        return _cancel(change, CANCEL, id=task_id)

    return _change_tasks(options, cancel, "cancelled", LIVE_STATUSES)


def _run_purge(options: argparse.Namespace) -> int:
    """Delete tasks that have ended; live ones only if --status names theirs.

    Their results and events stay for as long as those are kept. Name them by id, by
    filters that all hold, or say --all.
    """

    def delete(change: _Change, task_id: str) -> list[Row]:
        return change.rows(DELETE_TASK, id=task_id)

    statuses = FINAL_STATUSES if options.status is None else tuple(TaskStatus)
    return _change_tasks(options, delete, "deleted", statuses)


def _filters(
    options: argparse.Namespace, statuses: Iterable[TaskStatus], ids: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the parameters of `SELECT_MATCHING` that options stand for."""
    if options.status is not None:
        statuses = [options.status]
    return {
        "ids": _to_json(list(map(_clean_text, ids))) if ids else None,
        "queue": options.queue,
        "func": options.func,
        "statuses": _to_json(list(statuses)),
        "before": _to_unix(options.older_than),
        "since": _to_unix(options.newer_than),
        "after": 0,
        "offset": 0,
    }


def _change_tasks(
    options: argparse.Namespace,
    verb: _Verb,
    done: str,
    statuses: tuple[TaskStatus, ...],
) -> int:
    """Change the tasks that are meant, and say what was done with how many."""
    if options.status not in (None, *statuses):
        raise _CommandError(f"a task that is {options.status} cannot be {done}")
    chosen = _filters(options, statuses, options.ids)
    named = ("ids", "queue", "func", "before", "since")
    if not options.all and options.status is None and not any(map(chosen.get, named)):
        raise _CommandError("name tasks by id or by a filter, or say --all")
    with _open(options, "queue") as backend:
        refusal = f"not {done}"
        if options.dry_run:
            refusal, done = f"would not be {done}", f"would be {done}"
        dry_run = options.dry_run
        changed = list(_change_matching(backend, chosen, verb, dry_run=dry_run))
        refused = set(options.ids).difference(row[1] for row in changed)
        for task_id in sorted(refused):
            why = _why_refused(backend.queue, task_id, statuses)
            _note(f"{refusal}: {task_id!r}: {why}")
    if options.dry_run:
        _print_table(["id", "status", "queue", "func"], [r[1:] for r in changed[:100]])
    if not changed:
        return 1 if refused else _nothing_found("such tasks", options)
    counts = collections.Counter(row[2] for row in changed)
    kinds = ", ".join(f"{counts[s]:,} {s}" for s in TaskStatus if counts[s])
    print(f"{done}: {_counted(len(changed), 'task')} ({kinds} before)")
    return 1 if refused else 0


class _Undone(OmniQError):
    """Takes back what was only tried; `args` is what it came to."""


def _change_matching(
    backend: SQLiteBackend, chosen: dict[str, Any], verb: _Verb, *, dry_run: bool
) -> Iterator[Row]:
    """Change the tasks that match, some in each commit; yield what they were."""

    def run(change: _Change) -> tuple[list[Row], list[Row]]:
        rows = change.rows(SELECT_MATCHING, **chosen)
        changed = []
        for row in rows:
            with contextlib.suppress(DuplicateTaskError):  # another holds its key
                if verb(change, row[1]):
                    changed.append(row)
        if dry_run:
            raise _Undone(rows, changed)
        return rows, changed

    chosen["limit"] = _CHANGED_AT_ONCE
    while True:
        try:
            rows, changed = backend._run(backend.queue._async._write, run)
        except _Undone as undone:
            rows, changed = undone.args
        yield from changed
        if len(rows) < _CHANGED_AT_ONCE:
            return
        chosen["after"] = rows[-1][0]


def _why_refused(
    queue: SQLiteQueue, task_id: str, statuses: Sequence[TaskStatus]
) -> str:
    """Return why a task that was named was not changed."""
    try:
        task = queue.get_task(task_id)
    except SerializationError as error:
        return str(error)
    if task is None:
        return "there is no such task"
    if task.status not in statuses:
        return f"it is {task.status}"
    if task.unique_key is None:
        return "the filters leave it out"
    return (
        f"another task holds its key {task.unique_key!r}, or the filters leave it out"
    )


def _run_pause(options: argparse.Namespace) -> int:
    """Let queues hand out nothing, in every process, until they are resumed."""
    return _switch_queues(options, SQLiteQueue.pause, "is paused")


def _run_resume(options: argparse.Namespace) -> int:
    """Let paused queues hand out tasks again."""
    return _switch_queues(options, SQLiteQueue.resume, "hands out tasks")


def _switch_queues(
    options: argparse.Namespace, switch: Callable[[SQLiteQueue, str], None], now: str
) -> int:
    with _open(options, "queue") as backend:
        for name in options.queues:
            switch(backend.queue, name)
            count = backend.queue.count_tasks(queue=name, status=TaskStatus.PENDING)
            print(_printable(f"{name!r} {now}, {count:,} pending"))
    return 0


def _run_backup(options: argparse.Namespace) -> int:
    """Copy a file to a new one while everybody goes on working with it."""
    with _open(options, *COMPONENT_TABLE) as backend:
        backend.backup(options.target)
    size = os.stat(options.target).st_size
    print(_printable(f"{options.target!r} has {size:,} bytes"))
    return 0


# -- report, serve --
#
# The page is markup of `_Html`; whatever else gets into it is escaped on the way.
# It loads nothing, and its own policy forbids it to.

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 style-src 'unsafe-inline'; img-src data:; connect-src 'self'; script-src $script_hash;
 base-uri 'none'; form-action 'none'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { --back: #fff; --card: #f6f8fa; --line: #d1d9e0; --text: #1f2328;
  --quiet: #59636e; --link: #0550ae; --blue: #0969da; --amber: #bc6c00;
  --red: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --card: #161b22; --line: #3d444d; --text: #e6edf3;
    --quiet: #9aa4af; --link: #79b8ff; --blue: #4493f8; --amber: #d9a03c;
    --red: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.1rem; }
p { margin: .3rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav { margin: .6rem 0; line-height: 2; }
nav a, nav button { margin-right: .9rem; }
nav a[aria-current] { color: var(--text); font-weight: 600; text-decoration: none; }
button { padding: .1rem .7rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: inherit; font: inherit; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.quiet { color: var(--quiet); font-size: .875rem; overflow-wrap: anywhere; }
.bad { color: var(--red); font-weight: 600; }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
section { min-width: 0; padding: 1rem; border: 1px solid var(--line);
  border-radius: 8px; }
.wide { grid-column: 1 / -1; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr));
  gap: .6rem; margin: 0; }
dl div { padding: .5rem .6rem; border-radius: 6px; background: var(--card); }
dt { color: var(--quiet); font-size: .8rem; white-space: nowrap; }
dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; max-height: 26rem; background:
  linear-gradient(var(--back), var(--back)) right / 1rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
td { max-width: 30rem; font-variant-numeric: tabular-nums; }
td:first-child { min-width: 7rem; overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; }
code, pre { font: .85em/1.45 ui-monospace, monospace; }
pre { margin: .5rem 0; padding: .7rem; border-radius: 6px; background: var(--card);
  overflow-x: auto; max-height: 26rem; }
summary { padding: .25rem 0; cursor: pointer; overflow-wrap: anywhere; }
#failures details { border-bottom: 1px solid var(--line); }
figure { margin: 0; }
.plot { position: relative; height: 11rem; margin: .6rem 0 0 3.2rem;
  border-bottom: 1px solid var(--quiet); }
.plot svg { position: absolute; width: 100%; height: 100%; }
.plot span { position: absolute; right: calc(100% + .4rem); transform: translateY(-50%);
  color: var(--quiet); font-size: .75rem; white-space: nowrap; }
.plot line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.ticks { position: relative; height: 1.3rem; margin-left: 3.2rem; }
.ticks span { position: absolute; color: var(--quiet); font-size: .75rem;
  white-space: nowrap; }
.blue { fill: var(--blue); } .amber { fill: var(--amber); } .red { fill: var(--red); }
g rect:first-of-type { fill: transparent; }
g:hover rect:first-of-type { fill: var(--line); fill-opacity: .6; }
.key { margin-right: 1rem; white-space: nowrap; font-size: .875rem; }
.key svg { width: .8em; height: .8em; }
@media (max-width: 46rem) {
  body { padding: .7rem; } main { grid-template-columns: minmax(0, 1fr); }
  section { padding: .7rem; } dd { font-size: 1.1rem; }
  dl { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .4rem; } }
@media print { nav, .skip { display: none; } section { break-inside: avoid; } }
</style>
</head>
<body>
<a class="skip" href="#now">Skip to the content</a>
<header>
<h1>$title</h1>
$header
</header>
<main>
$main
</main>
$script
</body>
</html>
"""

# Fetches the page again and again, and puts each new section in place of the old
# one, without moving what is looked at: place, open details, focus, selection.
_SCRIPT = """
const state = document.getElementById('state');
const pause = document.getElementById('pause');
function swap(old, next) {
  const keyed = () => [...old.querySelectorAll('[data-key]')];
  const was = new Map(keyed().map(e =>
    [e.dataset.key, [e.open, e.scrollLeft, e.scrollTop]]));
  const focus = old.contains(document.activeElement)
    && document.activeElement.closest('[data-key]')?.dataset.key;
  old.replaceChildren(...next.childNodes);
  for (const e of keyed()) {
    const [open, x, y] = was.get(e.dataset.key) ?? [];
    if (open) e.open = true;
    e.scrollTo(x ?? 0, y ?? 0);
    if (e.dataset.key === focus)
      (e.querySelector('summary') ?? e).focus({preventScroll: true});
  }
}
async function refresh() {
  const answer = await fetch(location.href, {cache: 'no-store'});
  if (!answer.ok) throw Error((await answer.text()).trim());
  const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
  const marked = getSelection();
  for (const next of page.querySelectorAll('section, #asof')) {
    const old = document.getElementById(next.id);
    if (!marked.isCollapsed && old.contains(marked.anchorNode)) continue;
    swap(old, next);
  }
}
let paused = false;
pause.onclick = () => {
  paused = !paused;
  pause.setAttribute('aria-pressed', paused);
};
(async () => {
  for (let rest = 2000;;) {
    await new Promise(done => setTimeout(done, rest));
    if (paused || document.hidden) continue;
    const began = performance.now();
    try { await refresh(); state.textContent = ''; }
    catch (error) { state.textContent = 'No answer: ' + error.message; }
    rest = Math.max(2000, 3 * (performance.now() - began));
  }
})();
"""


class _Html(str):
    """Markup; any other text is escaped before it becomes part of one."""

    __slots__ = ()


def _escape(value: object) -> _Html:
    import html

    return value if isinstance(value, _Html) else _Html(html.escape(_show_cell(value)))


def _join(parts: Iterable[object]) -> _Html:
    return _Html("".join(map(_escape, parts)))


def _element(name: str, *content: object, **attributes: object) -> _Html:
    """Return an element; `_` in an attribute's name stands for `-`, or for nothing."""
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.strip("_").replace("_", "-")}="{_escape(value)}"')
    return _Html(f"<{' '.join(words)}>{_join(content)}</{name}>")


def _quiet(*content: object) -> _Html:
    return _element("p", *content, class_="quiet")


def _section(key: str, title: str, *content: object, wide: bool = True) -> _Html:
    heading = _element("h2", title, id=f"{key}-title")
    terms = {"id": key, "aria-labelledby": f"{key}-title"}
    terms |= {"class": "wide"} if wide else {}
    return _element("section", heading, *content, **terms)


def _html_table(
    key: str, headers: Sequence[str], rows: Sequence[Sequence[object]]
) -> _Html:
    """Return a table that scrolls by itself where it is too wide."""
    if not rows:
        return _quiet("none")
    kinds = [{"class": "n"} if header[:1] == ">" else {} for header in headers]

    def line(name: str, cells: Iterable[object], **terms: object) -> _Html:
        pairs = zip(cells, kinds, strict=True)
        return _element("tr", *(_element(name, c, **terms, **k) for c, k in pairs))

    head = line("th", (header.lstrip(">") for header in headers), scope="col")
    table = _element("table", head, *(line("td", row) for row in rows))
    place = {"class": "scroll", "data-key": key, "tabindex": 0, "role": "region"}
    return _element("div", table, aria_label=key, **place)


# -- charts --

_Series = Sequence[tuple[str, str]]  # name and colour
_Column = tuple[str, Sequence[float]]  # label and a value for each of the series
_Tick = tuple[float, str]  # place from 0 to 1, and label


def _chart(
    key: str, note: str, series: _Series, columns: Sequence[_Column], ticks: list[_Tick]
) -> _Html:
    """Return stacked columns, and the same as a table.

    The drawing stretches to the width that there is; what is to be read stands
    beside it and keeps its size.
    """
    top = _round_up(max(sum(values) for _, values in columns))
    drawn = [_draw(i, column, series, top) for i, column in enumerate(columns)]
    grid = _element("line", x1=0, x2=len(columns), y1=50, y2=50)
    box = {"viewBox": f"0 0 {len(columns)} 100", "preserveAspectRatio": "none"}
    scale = [
        _element("span", _show_count(top * part), style=f"top: {1 - part:.0%}")
        for part in (1, 0.5, 0)
    ]
    svg = _element("svg", grid, *drawn, role="img", aria_label=f"{key}. {note}", **box)
    plot = _element(
        "div", _element("div", *scale, aria_hidden="true"), svg, class_="plot"
    )
    places = itertools.starmap(_draw_tick, ticks)
    keys = [
        _element("span", _swatch(colour), f" {name}", class_="key")
        for name, colour in series
    ]
    rows = [
        (label, *map(_show_count, values)) for label, values in columns if any(values)
    ]
    table = _html_table(f"{key}, numbers", ["", *(f">{n}" for n, _ in series)], rows)
    return _element(
        "figure",
        _element("figcaption", *keys, _quiet(note)),
        plot,
        _element("div", *places, class_="ticks", aria_hidden="true"),
        _element("details", _element("summary", "Numbers"), table, data_key=key),
    )


def _draw_tick(at: float, text: str) -> _Html:
    shift = 0 if at < 0.03 else 100 if at > 0.97 else 50  # stay within the chart
    style = f"left: {at:.1%}; transform: translateX(-{shift}%)"
    return _element("span", text, style=style)


def _swatch(colour: str) -> _Html:
    square = _element("rect", width=10, height=10, class_=colour)
    return _element("svg", square, viewBox="0 0 10 10", aria_hidden="true")


def _draw(place: int, column: _Column, series: _Series, top: float) -> _Html:
    """Return one column, which tells its numbers to a mouse that points at it."""
    label, values = column
    told = ", ".join(
        f"{_show_count(value)} {name}"
        for value, (name, _) in zip(values, series, strict=True)
    )
    parts = [_element("title", f"{label}: {told}")]
    parts.append(_element("rect", x=place, width=1, y=0, height=100))
    base = 100.0
    for value, (_, colour) in zip(values, series, strict=True):
        if value:
            height = 100 * value / top
            base -= height
            shape = {"x": f"{place + 0.06:g}", "y": f"{base:.2f}", "width": 0.88}
            parts.append(
                _element("rect", height=f"{height:.2f}", class_=colour, **shape)
            )
    return _element("g", *parts)


def _round_up(value: float) -> float:
    """Return the top of a scale: the next number that is easy to read, also halved."""
    if value <= 0:
        return 2.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 4, 6, 8, 10) if m * power >= value * 0.999)


def _show_count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.2g}"


def _show_seconds(seconds: float) -> str:
    if seconds < 0.0995:
        return f"{seconds * 1_000:.2g} ms"
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    for unit, length in (("h", 3_600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds / length:.0f} {unit}"
    return _show_cell(timedelta(seconds=round(seconds)))


_SPANS = [1, 2, 5, 10, 15, 30]  # seconds
_SPANS += [m * 60 for m in (1, 2, 3, 5, 10, 15, 30, 60, 120, 180, 360, 720)]


def _span(least: float) -> int:
    """Return a length of time that is easy to read, of at least so many seconds."""
    return next((s for s in _SPANS if s >= least), math.ceil(least / 86_400) * 86_400)


class _Spans:
    """The time between two instants, cut into at most 120 equal spans."""

    def __init__(self, since: float, until: float) -> None:
        self.width = _span(max(until - since, 60.0) / 119)
        self.start = math.floor(since / self.width) * self.width
        self.count = max(1, math.ceil((until - self.start) / self.width))
        self.length = self.width * self.count

    def sort(self, history: _History) -> list[collections.Counter[str]]:
        """Count the events of each span, and by how much each state grew."""
        counts = [collections.Counter[str]() for _ in range(self.count)]
        for at, kind, before, after in history.steps:
            place = int((at - self.start) / self.width)
            found = counts[min(max(place, 0), self.count - 1)]
            found[kind] += 1
            found[after] += 1
            found[before] -= 1
        return counts

    def label(self, place: int) -> str:
        local = datetime.fromtimestamp(self.start + place * self.width).astimezone()
        date = f"{local:%m-%d} " if self.length > 86_400 else ""
        return f"{date}{local:%H:%M:%S}" if self.width < 60 else f"{date}{local:%H:%M}"

    def ticks(self) -> list[_Tick]:
        """Return a few round times of the day, or dates, and where they stand."""
        step = _span(self.length / 5)
        shift = datetime.fromtimestamp(self.start).astimezone().utcoffset()
        zone = shift.total_seconds() if shift else 0.0
        first = math.ceil((self.start + zone) / step) * step - zone
        ticks = []
        for number in range(int((self.start + self.length - first) / step) + 1):
            local = datetime.fromtimestamp(first + number * step).astimezone()
            text = f"{local:%H:%M:%S}" if step < 60 else f"{local:%H:%M}"
            if text == "00:00":
                text = f"{local:%m-%d}"
            ticks.append(((local.timestamp() - self.start) / self.length, text))
        return ticks


def _chart_depth(seen: _Overview, spans: _Spans) -> _Html:
    """Draw how many tasks were there, reckoned back from those that are there now."""
    waiting = sum(q.scheduled + q.pending for q in seen.queues)
    running = sum(q.running for q in seen.queues)
    columns: list[_Column] = []
    for place, change in reversed(list(enumerate(spans.sort(seen.history)))):
        columns.append((spans.label(place), (max(0, running), max(0, waiting))))
        waiting -= change["waiting"]
        running -= change["running"]
    peak = max(sum(values) for _, values in columns)
    note = f"Now {_show_count(sum(columns[0][1]))}, at most {_show_count(peak)}; what"
    note += " waits is scheduled or pending."
    series = [("running", "amber"), ("waiting", "blue")]
    return _chart("Depth over time", note, series, columns[::-1], spans.ticks())


_THROUGHPUT = "Throughput and failures"


def _chart_throughput(seen: _Overview, spans: _Spans) -> _Html:
    columns = [
        (spans.label(i), [change[kind] * 60 / spans.width for kind in _OUTCOMES])
        for i, change in enumerate(spans.sort(seen.history))
    ]
    series = [("completed", "blue"), ("failed, run again", "amber"), ("failed", "red")]
    counts = zip(seen.history.outcomes().values(), series, strict=True)
    note = "; ".join(f"{count:,} {name}" for count, (name, _) in counts)
    note = f"Attempts that ended, for each minute. In all: {note}."
    return _chart(_THROUGHPUT, note, series, columns, spans.ticks())


_EDGES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
_EDGES += [60, 120, 300, 900, 3_600, 14_400, 86_400]  # seconds


def _chart_times(key: str, seconds: list[float]) -> _Html:
    """Draw how many times lie between any two edges of a scale."""
    if not seconds:
        return _quiet("none known")
    counts = collections.Counter(bisect.bisect_left(_EDGES, s) for s in seconds)
    first, last = min(counts), max(counts)
    edges = ["0", *map(_show_seconds, _EDGES), "more"]
    columns = [
        (f"{edges[i]} to {edges[i + 1]}", [counts[i]]) for i in range(first, last + 1)
    ]
    step = math.ceil(len(columns) / 4)
    ticks = [
        (i / len(columns), edges[first + i]) for i in range(0, len(columns) + 1, step)
    ]
    median, high, longest = map(_show_seconds, _quantiles(seconds))
    note = f"{len(seconds):,} times: half within {median}, 95 % within {high},"
    note += f" longest {longest}."
    return _chart(key, note, [("tasks", "blue")], columns, ticks)


def _quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return median, 95th percentile and maximum."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[last // 2], ordered[round(last * 0.95)], ordered[last]


# -- sections --


def _render_now(seen: _Overview) -> _Html:
    def total(name: str) -> int:
        return sum(getattr(queue, name) for queue in seen.queues)

    waits = [q.oldest_pending_at for q in seen.queues if q.oldest_pending_at]
    facts: dict[str, object] = {name: total(name) for name in LIVE_STATUSES}
    facts["overdue"] = seen.overdue
    facts["oldest wait"] = _age_of(min(waits, default=None))
    facts |= {name: total(name) for name in FINAL_STATUSES if total(name)}
    tiles = []
    for name, value in facts.items():
        bad = value and name in ("failed", "overdue")
        number = _element("dd", value, class_="bad" if bad else "")
        tiles.append(_element("div", _element("dt", name), number))
    return _section("now", "Now", _element("dl", *tiles))


def _render_charts(seen: _Overview, spans: _Spans) -> Iterator[_Html]:
    history = seen.history
    yield _section("depth", "Depth over time", _chart_depth(seen, spans))
    yield _section("throughput", _THROUGHPUT, _chart_throughput(seen, spans))
    waits = _chart_times("Wait times", history.waits)
    yield _section("waits", "Time from enqueue to first start", waits, wide=False)
    runs = _chart_times("Run times", [seconds for _, _, seconds in history.runs])
    yield _section("runs", "Run time of attempts", runs, wide=False)


def _render_queues(seen: _Overview) -> _Html:
    headers = ["queue", *(f">{s}" for s in TaskStatus), "paused", ">oldest pending"]
    table = _html_table("Queues", headers, list(map(_row_of_queue, seen.queues)))
    return _section("queues", "Queues", table)


def _render_running(seen: _Overview) -> _Html:
    rows = []
    for task in seen.running:
        task_id, func, age, lease, worker = _row_of_running(task, seen.at)
        late = "bad" if task.lease_until < seen.at.timestamp() else ""
        shown = _element("span", lease, class_=late)
        facts = (task.attempts, _progress_of(task), task.queue, worker)
        rows.append((func, age, shown, *facts, _element("code", task_id)))
    headers = "function for lease attempt progress queue worker id".split()
    note = "An overdue lease is handed out again by the next claim from its queue."
    table = _html_table("Running", headers, rows)
    return _section("running", "Running and leases", table, _quiet(note))


def _progress_of(task: _Running) -> str:
    try:
        facts = json.loads(task.progress or "{}")
        done, total, message = facts["done"], facts["total"], facts["message"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return _shorten(task.progress or "", 60)
    return f"{done}{f' of {total}' if total else ''} {message}"


def _render_workers(seen: _Overview) -> _Html:
    rows = []
    for worker in seen.workers:
        gone = _why_gone(worker, seen.at)
        state = _element("span", gone or "lives", class_="bad" if gone else "")
        name, *facts = _row_of_worker(worker)
        rows.append((name, state, *facts))
    headers = ["worker", "state", "host", ">pid", "queues", ">running", ">seen"]
    return _section("workers", "Workers", _html_table("Workers", headers, rows))


def _render_functions(seen: _Overview) -> _Html:
    runs: dict[str, list[float]] = collections.defaultdict(list)
    ends: collections.Counter[tuple[str, str]] = collections.Counter()
    for func, kind, seconds in seen.history.runs:
        runs[func].append(seconds)
        ends[func, kind] += 1
    slowest = sorted(runs, key=lambda func: _quantiles(runs[func]), reverse=True)
    rows = [
        (
            func,
            len(runs[func]),
            ends[func, EventType.RETRY],
            ends[func, EventType.FAILED],
            *map(_show_seconds, (*_quantiles(runs[func]), sum(runs[func]))),
        )
        for func in slowest[:50]
    ]
    headers = ["function", ">attempts", ">run again", ">failed"]
    headers += [">median", ">95 %", ">longest", ">in all"]
    table = _html_table("Functions", headers, rows)
    return _section("functions", "Slowest functions", table)


def _render_failures(seen: _Overview, backend: SQLiteBackend) -> _Html:
    groups: dict[str, list[_Failure]] = collections.defaultdict(list)
    for failure in seen.failures:
        groups[_kind_of(failure.error)].append(failure)
    frequent = sorted(groups.values(), key=len, reverse=True)[:50]
    ids = _to_json([group[0].task_id for group in frequent])
    stored = backend.results and backend.results._async
    rows = backend._run(stored._rows, SELECT_TRACEBACKS, ids=ids) if stored else []
    traces = dict(rows)
    parts = [_render_group(group, traces.get(group[0].task_id)) for group in frequent]
    return _section("failures", "Failures by error", *(parts or [_quiet("none")]))


_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|/\S+|\b0x[0-9a-f]+\b|\d+")


def _kind_of(error: str) -> str:
    """Return what errors of one kind have in common: names and numbers left out."""
    return _VARYING.sub("…", error.partition("\n")[0][:400])


def _render_group(group: list[_Failure], trace: str | None) -> _Html:
    """Return failures of one kind, the last of which stands for all."""
    last = group[0]
    funcs = ", ".join(sorted({f.func or "?" for f in group}))
    count = _element("strong", f"{len(group):,} \N{MULTIPLICATION SIGN} ")
    summary = _element("summary", count, _shorten(last.error, 300))
    where = f"In {funcs}; last at {_show_cell(_from_unix(last.at))[:19]}, task "
    about = _quiet(where, _element("code", last.task_id))
    key = f"failure {_kind_of(last.error)}"
    shown = _quiet("No traceback was stored.")
    if trace:
        text = _Html("\n".join(map(_escape, trace.splitlines())))
        place = {"tabindex": 0, "role": "region", "data-key": f"trace {key}"}
        shown = _element("pre", text, aria_label="Traceback", **place)
    return _element("details", summary, about, shown, data_key=key)


def _render_health(backend: SQLiteBackend, findings: Sequence[Finding]) -> _Html:
    rows = [
        (_element("span", f.severity, class_="bad"), f.check, f.message)
        for f in findings
    ]
    state = _html_table("Findings", ["severity", "check", "finding"], rows)
    if not rows:
        state = _element("p", "check() found nothing wrong.")
    wal = backend._async._gateway.database.wal_bytes()
    note = f"File {os.path.getsize(backend.path):,} bytes, WAL {wal:,} bytes;"
    note += f" SQLite {sqlite3.sqlite_version}, omniq_sqlite {__version__}."
    return _section("health", "Health of the file", state, _quiet(note))


# -- the page --

_RANGES = {"15m": "15 minutes", "1h": "1 hour", "24h": "24 hours", "7d": "7 days"}


def _render_page(
    backend: SQLiteBackend,
    findings: Sequence[Finding],
    since: datetime | None,
    navigation: _Html | None = None,
) -> bytes:
    """Return the page on a file: what goes on now, and what happened since then.

    Without an instant it shows the time in which something happened. With a
    navigation it is the live page, which refreshes itself.
    """
    begun = since.timestamp() if since else 0.0
    seen = _look(backend, begun, begun, _PAST_LIMIT)
    spans = _Spans(*_period(seen, since))
    sections = [
        _render_now(seen),
        *_render_charts(seen, spans),
        _render_failures(seen, backend),
        _render_functions(seen),
        _render_running(seen),
        _render_queues(seen),
        _render_workers(seen),
        _render_health(backend, findings),
    ]
    page = string.Template(_PAGE).substitute(
        title=_escape(os.path.basename(backend.path)),
        header=_join([_render_header(seen, backend, spans), navigation or ""]),
        main=_join(sections),
        script=_element("script", _Html(_SCRIPT)) if navigation else "",
        script_hash=_hash_of_script() if navigation else "'none'",
    )
    return page.encode()


def _render_navigation(since: str) -> _Html:
    """Return what the live page has to be steered by, and a place for trouble."""
    parts = []
    for age, text in _RANGES.items():
        here = {"aria-current": "page"} if age == since else {}
        parts.append(_element("a", text, href=f"?since={age}", **here))
    pressed = {"type": "button", "aria-pressed": "false"}
    parts.append(_element("button", "Pause", id="pause", **pressed))
    parts.append(_element("span", id="state", role="alert", class_="bad"))
    return _element("nav", *parts, aria_label="Time shown")


def _period(seen: _Overview, since: datetime | None) -> tuple[float, float]:
    """Return the instants between which the charts are drawn."""
    now = seen.at.timestamp()
    if since is not None:
        return since.timestamp(), now
    instants = [at for at, _, _, _ in seen.history.steps] or [now - 3_600, now]
    first, last = min(instants), max(instants)
    return first, min(now, last + (last - first) / 20)


def _render_header(seen: _Overview, backend: SQLiteBackend, spans: _Spans) -> _Html:
    where = f"{backend.path}, as of {seen.at.astimezone():%Y-%m-%d %H:%M:%S UTC%z}."
    history = seen.history
    begun = datetime.fromtimestamp(spans.start).astimezone()
    if history.source == "events":
        count = len(history.steps)
        newest = "the newest " if count >= _PAST_LIMIT else ""
        text = f"The past is drawn from {newest}{count:,} events since"
        text += f" {begun:%Y-%m-%d %H:%M}."
    else:
        text = "No events are logged in this file, so the past is drawn from the tasks"
        text += " and results that are still there: retries, and most of what was"
        text += " deleted, are missing."
    return _element("div", _quiet(where), _quiet(text), id="asof")


def _hash_of_script() -> str:
    import hashlib

    digest = hashlib.sha256(_SCRIPT.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _run_report(options: argparse.Namespace) -> int:
    """Write a page on a file: what goes on in it, what was done and what failed.

    It is one file of HTML that loads nothing, readable by its owner only: error
    messages and tracebacks are in it, arguments and results are not.
    """
    with _open(options, "queue") as backend:
        page = _render_page(backend, backend.check(), options.since)
        if options.output != "-":
            _write_private(options.output, page, backend.path)
    if options.output == "-":
        sys.stdout.buffer.write(page)
    else:
        print(_printable(f"{options.output!r} has {len(page):,} bytes"))
    return 0


def _write_private(path: str, content: bytes, database: str) -> None:
    """Write a file for its owner only, but never over the database."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if _is_database(os.stat(path), os.path.realpath(database)):
                raise _CommandError(f"{path!r} is the database")
        with open(path, "wb", opener=partial(os.open, mode=0o600)) as file:
            if hasattr(os, "fchmod") and os.path.isfile(path):
                os.fchmod(file.fileno(), 0o600)  # it may have been there
            file.write(content)
    except OSError as error:
        raise _CommandError(f"cannot write {path!r}: {_reason_of(error)}") from error


class _LivePage:
    """The page on a file as it is now, made at most once a second."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._backend: SQLiteBackend | None = None
        self._findings: list[Finding] = []
        self._check_at = 0.0  # on the monotonic clock
        self._pages: dict[str, tuple[float, bytes]] = {}

    def render(self, since: str) -> bytes:
        """Return the page with the past since that age, such as "1h"."""
        with self._lock:
            made_at, page = self._pages.get(since, (-math.inf, b""))
            if time.monotonic() < made_at + 1.0:
                return page
            try:
                page = self._render(since)
            except OmniQError:
                self.close()  # the file may have been replaced: open it anew
                raise
            self._pages[since] = time.monotonic(), page
            return page

    def _render(self, since: str) -> bytes:
        backend = self._backend = self._backend or _open(self._options, "queue")
        began = time.monotonic()
        if began >= self._check_at:
            self._findings = backend.check()
            took = time.monotonic() - began
            self._check_at = began + max(60.0, 100 * took)  # it reads the whole file
        navigation = _render_navigation(since)
        return _render_page(backend, self._findings, _parse_instant(since), navigation)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        self._backend = None
        self._check_at = 0.0


def _run_serve(options: argparse.Namespace) -> int:
    """Show the page of `report` live in a browser, until Ctrl-C.

    It changes nothing. Only this machine can reach it, unless --host names another
    address: then whoever reaches that one can read it, and nothing is encrypted.
    """
    page = _LivePage(options)
    page.render("1h")  # what is wrong with the file is said now
    host = f"[{options.host}]" if ":" in options.host else options.host
    try:
        server = _make_server(options.host, options.port, page)
    except (OSError, UnicodeError) as error:
        page.close()
        reason = f"cannot serve on {host}:{options.port}: {_reason_of(error)}"
        raise _CommandError(f"{reason}; see --host and --port") from error
    with server:
        print(f"http://{host}:{server.server_address[1]}/", flush=True)
        try:
            server.serve_forever()
        finally:
            page.close()
    return 0


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _is_our_host(header: str | None, host: str) -> bool:
    """Tell whether a request was meant for us, by its `Host`.

    A page elsewhere may have its own name resolve to our address, and then read
    ours (DNS rebinding); so no name counts but `localhost` and what was asked for.
    """
    import ipaddress

    name = re.sub(r":\d*$", "", header or "").strip("[]").lower()
    if name in ("localhost", host.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or host not in _LOOPBACK


def _make_server(host: str, port: int, page: _LivePage) -> Any:
    import http.server
    import socketserver

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing of browsers that left early."""

        # Without HTTPServer's look-up of our name, which may take seconds.
        server_bind = socketserver.TCPServer.server_bind

    return Server((host, port), _make_handler(host, page))


_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def _make_handler(host: str, page: _LivePage) -> Any:
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers GET for the one page that there is."""

        timeout = 10.0  # seconds for a request

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            asked = urllib.parse.parse_qs(url.query).get("since", ["1h"])[0]
            if not _is_our_host(self.headers.get("Host"), host):
                self.answer(403, b"this name is not served here\n")
            elif url.path != "/" or asked not in _RANGES:
                self.answer(404, b"there is only one page here: /\n")
            else:
                self.show(asked)

        do_HEAD = do_GET  # noqa: N815 -- named by http.server

        def show(self, since: str) -> None:
            try:
                body = page.render(since)
            except Exception as error:  # noqa: BLE001 -- a file may hold anything
                self.answer(503, _printable(str(error)).encode())
            else:
                self.answer(200, body, "text/html")

        def answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request."""

    return Handler


# -- options --


def _parse_number(
    text: str, what: str = "a count", least: int = 1, most: int = 10**9
) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        rule = f"a number from {least} to {most}"
        raise _CommandError(f"{what} must be {rule}, not {text!r}")
    return int(text)


def _parse_host(text: str) -> str:
    if not text.strip():  # which would be every address
        raise _CommandError("--host must name an address, such as 127.0.0.1")
    return text


def _parse_name(text: str) -> str:
    if not _storable(text):
        raise _CommandError(f"a name must be valid text, not {_printable(text)}")
    return text


def _parse_queue(text: str) -> str:
    if not text.strip():
        raise _CommandError("the name of a queue must not be empty")
    return text.strip()


def _parse_queues(text: str) -> list[str]:
    return list(map(_parse_queue, text.split(",")))


_AN_INSTANT = "an instant such as 2026-01-31T12:00, or an age such as 90s, 10m, 2h, 7d"


def _parse_instant(text: str) -> datetime:
    """Return an ISO 8601 instant, in local time unless it says, or an age as one."""
    units = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
    refusal = _CommandError(f"a time must be {_AN_INSTANT}, not {text!r}")
    age = 0.0
    try:
        if text[-1:] in units:
            age = float(text[:-1]) * units[text[-1]]
            instant = _now() - timedelta(seconds=age)
        else:
            instant = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError):
        raise refusal from None
    if age < 0 or not 1970 <= instant.year < 9999:
        raise refusal
    return instant


def _option(help: str, **terms: Any) -> dict[str, Any]:
    """Return an option in the terms of argparse's `add_argument`."""
    default = " (default: %(default)s)" if terms.get("default") else ""
    return {"help": help + default, **terms}


_flag = partial(_option, action="store_true")
_count = partial(_option, metavar="N", type=_parse_number)
_seconds = partial(_option, metavar="SECONDS", type=float)
_when = partial(_option, metavar="WHEN", type=_parse_instant)
_parse_offset = partial(_parse_number, least=0)
_parse_port = partial(_parse_number, what="--port", least=0, most=65_535)

# Each option means the same in all commands.
_OPTIONS = {
    "file": _option("the database", metavar="FILE"),
    "folder": _option("where the files are", metavar="FOLDER"),
    "id": _option("of the task", metavar="ID"),
    "ids": _option("of tasks", metavar="ID", nargs="*", default=[]),
    "queues": _option("names", metavar="QUEUE", nargs="+", type=_parse_queue),
    "target": _option("the path of a new file", metavar="COPY"),
    "func": _option("a name that the worker knows", metavar="FUNC"),
    "args": _option(
        "JSON, or else a plain string; after -- where one begins with -",
        metavar="ARG",
        nargs="*",
        default=[],  # without one, an error would call them required
    ),
    "-o": _option(
        "the page; - for standard output", dest="output", default="report.html"
    ),
    "--all": _flag("without any filter"),
    "--app": _option("the functions", metavar="MODULE:REGISTRY", required=True),
    "--concurrency": _count(f"tasks at once (default: {DEFAULT_CONCURRENCY})"),
    "--db": _option("the database", metavar="FILE", default="omniq-demo.db"),
    "--delay": _seconds("not before", default=0.0),
    "--dry-run": _flag("change nothing, show what would be"),
    "--follow": _flag("wait for more, until Ctrl-C"),
    "--func": _option("only this function", type=_parse_name),
    "--grace": _seconds("for running tasks at the end (default: 10)"),
    "--host": _option("the address", type=_parse_host, default="127.0.0.1"),
    "--json": _flag("print an object a line"),
    "--kwargs": _option("an object", metavar="JSON", type=_parse_object),
    "--lease": _seconds(f"of a claim (default: {DEFAULT_LEASE:g})"),
    "--limit": _count("at the most", default=100),
    "--log-level": _option(
        "debug, info, warning or error",
        metavar="LEVEL",
        type=str.lower,
        default="info",
        choices=["debug", "info", "warning", "error"],
    ),
    "--max-attempts": _count("before it has failed (default: 3)"),
    "--max-tasks": _count("stop after so many"),
    "--name": _option("of this worker, as others see it"),
    "--newer-than": _when(f"ended, or else enqueued, since {_AN_INSTANT}"),
    "--offset": _count("skip the first", type=_parse_offset, default=0),
    "--older-than": _when(f"ended, or else enqueued, before {_AN_INSTANT}"),
    "--port": _count("0: any", type=_parse_port, default=8765),
    "--priority": _count("higher first", type=int),
    "--processes": _count("child processes"),
    "--queue": _option("this queue", type=_parse_queue),
    "--queues": _option("in order of preference", metavar="A,B", type=_parse_queues),
    "--retry-delay": _seconds("before the first retry (default: 1)"),
    "--since": _when(_AN_INSTANT),
    "--status": _option(
        "only this status: " + ", ".join(TaskStatus),
        metavar="STATUS",
        choices=[str(status) for status in TaskStatus],  # else shown as members
    ),
    "--task": _option("only this task", metavar="ID"),
    "--timeout": _seconds("of one attempt (default: none)"),
    "--type": _option("only this type, such as failed"),
    "--unique-key": _option("add nothing while a task holds it", metavar="KEY"),
    "--until": _when(_AN_INSTANT),
    "--until-empty": _flag("stop when no task is left"),
    "--watch": _flag("again every second, until Ctrl-C"),
    "--worker": _option("only this worker", metavar="NAME"),
    "--workers": _count("processes", default=os.cpu_count() or 1),
}

_FILTERS = "--queue --status --func --older-than --newer-than"
_CHANGING = f"file ids {_FILTERS} --all --dry-run"

# What runs it (its docstring is the help), its options, and an example.
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, str]] = {
    "demo": (_run_demo, "folder --db --workers", "~/Pictures --workers 4"),
    "worker": (
        _run_worker,
        """file --app --queues --concurrency --processes --name --lease --grace
        --until-empty --max-tasks --log-level""",
        "jobs.db --app myapp.tasks:registry --queues mail,default --processes 2",
    ),
    "enqueue": (
        _run_enqueue,
        """file func args --kwargs --queue --priority --delay --max-attempts
        --retry-delay --timeout --unique-key""",
        "jobs.db thumbnail a.png 128 --kwargs '{\"crop\": true}' --delay 60",
    ),
    "stats": (_run_stats, "file --watch --json", "jobs.db --watch"),
    "list": (
        _run_list,
        f"file {_FILTERS} --limit --offset --json",
        "jobs.db --status failed --func thumbnail --newer-than 2h",
    ),
    "show": (_run_show, "file id --json", "jobs.db 0197c0de5f2e7a10b1c2d3e4f5061728"),
    "events": (
        _run_events,
        "file --task --queue --type --since --until --limit --follow --json",
        "jobs.db --type failed --since 2h --follow",
    ),
    "retry": (_run_retry, _CHANGING, "jobs.db --func thumbnail --newer-than 2h"),
    "cancel": (_run_cancel, _CHANGING, "jobs.db --queue mail --dry-run"),
    "purge": (_run_purge, _CHANGING, "jobs.db --status failed --older-than 30d"),
    "pause": (_run_pause, "file queues", "jobs.db mail"),
    "resume": (_run_resume, "file queues", "jobs.db mail"),
    "backup": (_run_backup, "file target", "jobs.db jobs-2026-01-31.db"),
    "report": (_run_report, "file -o --since", "jobs.db -o jobs.html --since 24h"),
    "serve": (_run_serve, "file --host --port", "jobs.db --port 8080"),
    "check": (_run_check, "file --worker --json", "jobs.db --worker mail-1"),
}


# -- main --


def _build_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog=_program(),
        description="A task queue in one SQLite file.",
        epilog="COMMAND --help shows an example. Exit status: 0 done (also of a worker"
        " whose tasks failed), 1 found nothing, or something that is wrong, 2 an error,"
        " 75 a worker that should be started anew, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=__version__)

    class Command(argparse.ArgumentParser):
        """Takes options before, between and behind the arguments."""

        intermixes = False

        def parse_known_args(self, *args: Any, **terms: Any) -> Any:
            if self.intermixes:
                return super().parse_known_args(*args, **terms)
            self.intermixes = True
            try:
                return self.parse_known_intermixed_args(*args, **terms)
            finally:
                self.intermixes = False

    commands = parser.add_subparsers(
        metavar="COMMAND", required=True, parser_class=Command
    )
    for name, (run, options, example) in _COMMANDS.items():
        about = inspect.getdoc(run) or ""
        command = commands.add_parser(
            name,
            help=about.partition(".\n")[0].rstrip("."),
            description=about,
            epilog=f"example:\n  {_program()} {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        for option in options.split():
            command.add_argument(option, **_OPTIONS[option])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; raises nothing.

    0 done (also of a worker whose tasks failed); 1 found nothing, or what is wrong:
    `check`, a task that was named but not changed, a file of the demo that failed;
    2 an error, in one line on standard error; 75 a worker with a function that did
    not end; 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may not fit its encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run_command(argv)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads it has seen enough: `| head`
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 -- never a traceback
        text = str(error)
        if not isinstance(error, (OmniQError, OSError, ValueError)):
            text = f"{type(error).__name__}: {text}"
        _discard_output()
        _note(f"{_program()}: {text}")
        return 2
    return status


def _run_command(argv: Sequence[str] | None) -> int:
    try:
        options = _build_parser().parse_args(argv)
    except SystemExit as ending:  # help, or wrong usage
        return 2 if ending.code else 0
    status: int = options.run(options)
    return status


def _discard_output() -> None:
    """Let what is still buffered not fail once more when the interpreter ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
