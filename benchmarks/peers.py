"""The queues that are compared, each behind the same few calls.

An adapter uses what a user of that queue would use: its public call for "add this
task", "claim the next one", "it is done". Where a queue has no option for the
durability that a column asks for, the adapter sets `PRAGMA synchronous` on the
queue's own connection; `synchronous()` reads it back from there, and the program
prints it. An adapter's constructor imports its queue, so that one that is not
installed is a dash and nothing else. (They are imported by name, so that type
checkers ask neither for all of them nor for types that some of them do not ship.)

`Bare` is the limit: `sqlite3` alone, writing the same rows in the same transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import sqlite3
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

# What is measured is the module beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

T = TypeVar("T")

LEVELS = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}


STAMPS = "stamps"
"""The file, in the folder of the queue, that a payload "@..." makes a task write."""

STAMPS_FOLDER = "OMNIQ_BENCHMARK_FOLDER"


def burn(steps: int) -> int:
    """Keep one core busy."""
    total = 0
    for step in range(steps):
        total += step & 3
    return total


def noop(payload: str) -> int:
    """Do nothing; with "@..." note the time; with "#..." compute.

    The one task function, for all workers.
    """
    kind, rest = payload[:1], payload[1:]
    if kind == "@":
        os.write(_stamps(), b"%s %.6f\n" % (rest.encode(), time.time()))
    elif kind == "#":
        burn(int(rest))
    return 1


@functools.cache
def _stamps() -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.open(os.environ[STAMPS_FOLDER] + "/" + STAMPS, flags)


class CannotError(Exception):
    """The queue has no way to do this; the text says why, and the cell is a dash."""


class Peer(ABC):
    """One open queue. Payloads are strings; a claim is whatever completes it."""

    name: ClassVar[str]
    package: ClassVar[str] = ""
    file_name: ClassVar[str] = "queue.db"
    crash_safe: ClassVar[bool] = True
    """Whether a task outlives a crash of whoever claimed it."""
    python_only: ClassVar[bool] = True
    threads: ClassVar[str] = ""
    """Why one object cannot be used by several threads; empty: it can."""
    busy: tuple[type[Exception], ...] = (sqlite3.OperationalError,)
    """What it raises when it has waited too long for other processes."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        self.folder = folder
        self.file = folder / self.file_name
        self.open(synchronous)

    @abstractmethod
    def open(self, synchronous: str) -> None:
        """Open or create the file at this durability."""

    @abstractmethod
    def enqueue(self, payload: str) -> None:
        """Add one task; it is durable on return."""

    def claim(self) -> Any:
        """Claim the next task, or return None."""
        raise CannotError("only its own worker can claim")

    def complete(self, claimed: Any) -> None:
        """Say that a claimed task is done; nothing where claiming deletes it."""
        return

    @abstractmethod
    def payload(self, claimed: Any) -> str:
        """Return what was enqueued."""

    @abstractmethod
    def count(self) -> int:
        """Count the tasks that wait."""

    @abstractmethod
    def synchronous(self) -> str:
        """Read the durability from the queue's own connection."""

    def close(self) -> None:
        """Close the file, where the queue can."""
        return

    def wait(self, timeout: float) -> Any:
        """Claim the next task, waiting for one."""
        raise CannotError("no call that waits for another process")

    # -- The loops that are timed; an async queue runs its own inside one loop --

    def enqueue_each(self, payloads: Sequence[str]) -> None:
        """Add tasks one by one."""
        for payload in payloads:
            self.enqueue(payload)

    def work_each(self, count: int) -> list[str]:
        """Claim and complete tasks one by one; return their payloads."""
        done = []
        for _ in range(count):
            claimed = self.claim()
            if claimed is None:
                break
            self.complete(claimed)
            done.append(self.payload(claimed))
        return done

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        """Add many tasks in one transaction."""
        raise CannotError("no bulk call")

    def work_bulk(self, count: int) -> list[str]:
        """Claim many tasks in one transaction, complete them in another."""
        raise CannotError("no bulk call")

    def fill(self, payloads: Sequence[str]) -> None:
        """Add tasks that are to be there before the clock starts."""
        try:
            self.enqueue_bulk(payloads)
        except CannotError:
            self.enqueue_each(payloads)


def _level(connection: sqlite3.Connection) -> str:
    return LEVELS[connection.execute("PRAGMA synchronous").fetchone()[0]]


def _set_level(connection: sqlite3.Connection, synchronous: str) -> None:
    connection.execute(f"PRAGMA synchronous = {synchronous}")


class Bare(Peer):
    """`sqlite3` alone: the columns that a task fills, the two indexes it needs."""

    name = "sqlite3"
    threads = "measured with one connection"

    def open(self, synchronous: str) -> None:
        self.connection = sqlite3.connect(
            self.file, isolation_level=None, timeout=30.0, check_same_thread=False
        )
        self.connection.execute("PRAGMA journal_mode = WAL")
        _set_level(self.connection, synchronous)
        for statement in self.SCHEMA:
            self.connection.execute(statement)

    SCHEMA = (
        """
        CREATE TABLE IF NOT EXISTS task (
            seq INTEGER PRIMARY KEY, id TEXT, queue TEXT, func TEXT, args TEXT,
            kwargs TEXT, metadata TEXT, status TEXT, priority INTEGER,
            max_attempts INTEGER, retry_delay REAL, created_at REAL,
            lease_id TEXT, lease_until REAL, worker TEXT
        )
        """,
        "CREATE UNIQUE INDEX IF NOT EXISTS task_id ON task (id)",
        """
        CREATE INDEX IF NOT EXISTS task_ready ON task (queue, priority DESC, seq)
        WHERE status = 'pending'
        """,
    )
    INSERT = """
        INSERT INTO task (id, queue, func, args, kwargs, metadata, status, priority,
            max_attempts, retry_delay, created_at)
        VALUES (?, 'default', 'noop', ?, '{}', '{}', 'pending', 0, 3, 1.0, ?)
    """
    CLAIM = """
        UPDATE task SET status = 'running', lease_id = ?, lease_until = ?, worker = ?
        WHERE seq IN (
            SELECT seq FROM task WHERE queue = 'default' AND status = 'pending'
            ORDER BY priority DESC, seq LIMIT ?
        )
        RETURNING seq, args
    """
    DELETE = "DELETE FROM task WHERE seq = ?"

    def row(self, payload: str) -> tuple[Any, ...]:
        return uuid.uuid4().hex, json.dumps([payload]), time.time()

    def enqueue(self, payload: str) -> None:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        execute(self.INSERT, self.row(payload))
        execute("COMMIT")

    def claim_rows(self, limit: int) -> list[tuple[int, str]]:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        lease = (uuid.uuid4().hex, time.time() + 60, "bench", limit)
        rows = execute(self.CLAIM, lease).fetchall()
        execute("COMMIT")
        return rows

    def claim(self) -> Any:
        rows = self.claim_rows(1)
        return rows[0] if rows else None

    def complete(self, claimed: Any) -> None:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        execute(self.DELETE, claimed[:1])
        execute("COMMIT")

    def payload(self, claimed: Any) -> str:
        return str(json.loads(claimed[1])[0])

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(self.INSERT, [self.row(p) for p in payloads])
        self.connection.execute("COMMIT")

    def work_bulk(self, count: int) -> list[str]:
        rows = self.claim_rows(count)
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(self.DELETE, [row[:1] for row in rows])
        self.connection.execute("COMMIT")
        return [self.payload(row) for row in rows]

    def count(self) -> int:
        sql = "SELECT count(*) FROM task WHERE status = 'pending'"
        return int(self.connection.execute(sql).fetchone()[0])

    def synchronous(self) -> str:
        return _level(self.connection)

    def close(self) -> None:
        self.connection.close()


class OmniQ(Peer):
    """This project: the blocking queue, with its defaults."""

    name = "omniq_sqlite"

    def open(self, synchronous: str) -> None:
        import omniq_sqlite

        self.module = omniq_sqlite
        self.busy = (omniq_sqlite.DatabaseBusyError,)
        self.queue = omniq_sqlite.SQLiteQueue(self.file, synchronous=synchronous)
        self.queue.count_tasks()

    def enqueue(self, payload: str) -> None:
        self.queue.enqueue(self.module.Task("noop", (payload,)))

    def claim(self) -> Any:
        return self.queue.dequeue()

    def wait(self, timeout: float) -> Any:
        return self.queue.dequeue(timeout=timeout)

    def complete(self, claimed: Any) -> None:
        self.queue.complete(claimed)

    def payload(self, claimed: Any) -> str:
        return str(claimed.args[0])

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.queue.enqueue_many([self.module.Task("noop", (p,)) for p in payloads])

    def work_bulk(self, count: int) -> list[str]:
        claimed = self.queue.dequeue_many(count)
        self.queue.complete_many(claimed)
        return [self.payload(task) for task in claimed]

    def count(self) -> int:
        return self.queue.count_tasks(status=self.module.TaskStatus.PENDING)

    def synchronous(self) -> str:
        # Right after an enqueue or complete: at FULL it commits at NORMAL, and has
        # then opened the WAL to flush it before it returns. (That it does so each
        # time is what the suite counts with strace.)
        database = self.queue._async._gateway.database
        level = _level(database.writer.idle[0])
        return "FULL" if level == "NORMAL" and database.wal is not None else level

    def close(self) -> None:
        self.queue.close()


class Huey(Peer):
    """SqliteHuey, through its task and `dequeue`."""

    name = "huey"
    package = "huey"
    crash_safe = False  # `dequeue` deletes the row before the work

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("huey")
        self.huey = module.SqliteHuey(
            "bench", filename=str(self.file), fsync=synchronous == "FULL", timeout=30
        )
        if synchronous == "NORMAL":  # its option knows only FULL and OFF
            _set_level(self.huey.storage.conn, synchronous)
        self.noop = self.huey.task(name="noop")(noop)

    def enqueue(self, payload: str) -> None:
        self.noop(payload)

    def claim(self) -> Any:
        return self.huey.dequeue()

    def payload(self, claimed: Any) -> str:
        return str(claimed.args[0])

    def count(self) -> int:
        return int(self.huey.storage.queue_size())

    def synchronous(self) -> str:
        return _level(self.huey.storage.conn)

    def close(self) -> None:
        self.huey.storage.close()


class Potatoq(Peer):
    """Its SQLite broker, `durable` for FULL, through a task and a consumer."""

    name = "potatoq"
    package = "potatoq"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("potatoq")
        self.message: Any = importlib.import_module("potatoq.message").Message
        self.app = module.Potatoq(
            "bench",
            broker=f"sqlite:///{self.file}",
            broker_transport_options={"durable": synchronous == "FULL"},
        )
        self.noop = self.app.task(name="noop")(noop)
        self.broker: Any = self.app.broker
        self.consumer = self.broker.consumer(["default"], "bench")

    def enqueue(self, payload: str) -> None:
        self.noop.delay(payload)

    def claim(self) -> Any:
        return self.consumer.fetch(0.0)

    def wait(self, timeout: float) -> Any:
        return self.consumer.fetch(timeout)

    def complete(self, claimed: Any) -> None:
        self.consumer.complete(claimed, None, [])

    def payload(self, claimed: Any) -> str:
        return str(claimed.message.args[0])

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.broker.enqueue([self.message(task="noop", args=[p]) for p in payloads])

    def count(self) -> int:
        return int(self.broker.queue_sizes().get("default", 0))

    def synchronous(self) -> str:
        return _level(self.broker.conn)

    def close(self) -> None:
        self.broker.close()


class PulseQueue(Peer):
    """Its store, as its worker calls it."""

    name = "pulse-queue"
    package = "pulse-queue"
    threads = "one connection without a lock of its own"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("pulse_queue")
        self.busy = (module.StoreError,)
        self.store = module.Store(self.file)
        _set_level(self.store._conn, synchronous)  # no option; NORMAL by default

    def enqueue(self, payload: str) -> None:
        self.store.enqueue(payload)

    def claim(self) -> Any:
        return self.store.lease_next_task("bench")

    def complete(self, claimed: Any) -> None:
        assert self.store.complete_task(claimed.id, "bench", claimed.lease_epoch)

    def payload(self, claimed: Any) -> str:
        return str(claimed.payload)

    def count(self) -> int:
        sql = "SELECT count(*) FROM tasks WHERE state = 'PENDING'"
        return int(self.store._conn.execute(sql).fetchone()[0])

    def synchronous(self) -> str:
        return _level(self.store._conn)

    def close(self) -> None:
        self.store.close()


class CairnQ(Peer):
    """Its client and store, on an event loop that runs only while it is used."""

    name = "cairnq"
    package = "cairnq"
    threads = "asyncio only"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("cairnq")
        self.loop = asyncio.new_event_loop()
        self.client = module.CairnQ.sqlite(str(self.file), busy_timeout_ms=30_000)
        self.store = self.client.store
        self.run(self.client.connect())
        # No option; SQLite's own default is FULL.
        self.run(self.store._conn.execute(f"PRAGMA synchronous = {synchronous}"))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def submit(self, payload: str) -> None:
        await self.client.submit("noop", {"payload": payload})

    async def take(self, limit: int) -> list[Any]:
        queues, worker = ["default"], "bench"
        return list(
            await self.store.claim(queues=queues, worker_id=worker, limit=limit)
        )

    async def settle(self, task: Any) -> None:
        await self.store.succeed(task_id=task.id, worker_id="bench", result=None)

    def enqueue(self, payload: str) -> None:
        self.run(self.submit(payload))

    def enqueue_each(self, payloads: Sequence[str]) -> None:
        async def each() -> None:
            for payload in payloads:
                await self.submit(payload)

        self.run(each())

    def claim(self) -> Any:
        tasks = self.run(self.take(1))
        return tasks[0] if tasks else None

    def complete(self, claimed: Any) -> None:
        self.run(self.settle(claimed))

    def work_each(self, count: int) -> list[str]:
        async def each() -> list[str]:
            done: list[str] = []
            while len(done) < count and (tasks := await self.take(1)):
                await self.settle(tasks[0])
                done.append(self.payload(tasks[0]))
            return done

        return self.run(each())

    def payload(self, claimed: Any) -> str:
        return str(claimed.payload["payload"])

    # Its bulk form is its group commit: many calls awaited at once.

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.run(_gather(self.submit(payload) for payload in payloads))

    def work_bulk(self, count: int) -> list[str]:
        tasks = self.run(self.take(count))
        self.run(_gather(self.settle(task) for task in tasks))
        return [self.payload(task) for task in tasks]

    def count(self) -> int:
        stats: Any = self.run(self.client.stats())
        return int(stats.get("default", {}).get("queued", 0))

    def synchronous(self) -> str:
        async def read() -> int:
            cursor = await self.store._conn.execute("PRAGMA synchronous")
            row = await cursor.fetchone()
            await cursor.close()
            return int(row[0])

        return LEVELS[self.run(read())]

    def close(self) -> None:
        self.run(self.client.close())
        self.loop.close()


async def _gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*work))


class Dura(Peer):
    """Its engine; a task is two rows there, which are kept when it is done."""

    name = "dura"
    package = "dura"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("dura")
        self.level = synchronous
        self.engine = module.DurableEngine(self.file)

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection; SQLite's own default is FULL."""
        connection: sqlite3.Connection = self.engine._conn()
        if self.level != "FULL":
            _set_level(connection, self.level)
        return connection

    def enqueue(self, payload: str) -> None:
        self.engine.spawn_task(name="noop", params=[payload])

    def enqueue_each(self, payloads: Sequence[str]) -> None:
        self.connection()
        super().enqueue_each(payloads)

    def claim(self) -> Any:
        return self.engine.claim_task(worker_id="bench")

    def complete(self, claimed: Any) -> None:
        self.engine.complete_run(run_id=claimed.run_id)

    def payload(self, claimed: Any) -> str:
        return str(claimed.params[0])

    def count(self) -> int:
        sql = "SELECT count(*) FROM tasks WHERE state = 'pending'"
        return int(self.connection().execute(sql).fetchone()[0])

    def synchronous(self) -> str:
        return _level(self.connection())

    def close(self) -> None:
        self.engine.close()


class LiteQueue(Peer):
    """`put`, `pop`, `done`; rows are kept until `prune`."""

    name = "litequeue"
    package = "litequeue"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("litequeue")
        self.queue = module.LiteQueue(str(self.file), timeout=30.0)
        _set_level(self.queue.conn, synchronous)  # no option; NORMAL by default

    def enqueue(self, payload: str) -> None:
        self.queue.put(payload)

    def claim(self) -> Any:
        return self.queue.pop()

    def complete(self, claimed: Any) -> None:
        assert self.queue.done(claimed.message_id, claim_id=claimed.claim_id)

    def payload(self, claimed: Any) -> str:
        return str(claimed.data)

    def count(self) -> int:
        return int(self.queue.qsize())

    def synchronous(self) -> str:
        return _level(self.queue.conn)

    def close(self) -> None:
        self.queue.close()


class PersistQueue(Peer):
    """SQLiteAckQueue; rows are kept until `clear_acked_data`."""

    name = "persist-queue"
    package = "persist-queue"

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("persistqueue")
        self.empty: type[Exception] = module.exceptions.Empty
        self.queue = module.SQLiteAckQueue(
            str(self.folder),
            db_file_name=self.file.name,
            multithreading=True,
            timeout=30.0,
            auto_resume=False,
        )
        # No option; SQLite's own default is FULL.
        _set_level(self.queue._putter, synchronous)

    def enqueue(self, payload: str) -> None:
        self.queue.put(payload)

    def claim(self) -> Any:
        with contextlib.suppress(self.empty):
            return self.queue.get(block=False, raw=True)
        return None

    def complete(self, claimed: Any) -> None:
        self.queue.ack(id=claimed["pqid"])

    def payload(self, claimed: Any) -> str:
        return str(claimed["data"])

    def count(self) -> int:
        return int(self.queue._count())

    def synchronous(self) -> str:
        return _level(self.queue._putter)

    def close(self) -> None:
        self.queue.close()


class LocalQueue(Peer):
    """SimpleQueue (Rust); rows are kept until `purge`."""

    name = "localqueue"
    package = "localqueue"
    file_name = "localqueue.db"
    python_only = False

    def open(self, synchronous: str) -> None:
        module: Any = importlib.import_module("localqueue")
        self.empty: type[Exception] = module.Empty
        self.busy = (module.LocalQueueError,)
        modes = module.DurabilityMode
        mode = modes.DURABLE if synchronous == "FULL" else modes.RELAXED
        self.queue = module.SimpleQueue(str(self.folder), durability=mode)

    def enqueue(self, payload: str) -> None:
        self.queue.put(payload)

    def claim(self) -> Any:
        return self.wait(0.0)

    def wait(self, timeout: float) -> Any:
        # `block=False` would report "empty" whenever another process writes.
        with contextlib.suppress(self.empty):
            return self.queue.get(block=True, timeout=timeout)
        return None

    def complete(self, claimed: Any) -> None:
        self.queue.ack(claimed)

    def payload(self, claimed: Any) -> str:
        return str(claimed.data)

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.queue.put_many(list(payloads))

    def count(self) -> int:
        return int(self.queue.stats()["ready"])

    def synchronous(self) -> str:
        return LEVELS[self.queue.diagnostics().synchronous]

    def close(self) -> None:
        self.queue.close()


class FlexiQ(Peer):
    """Its queue (Rust), NORMAL only; the worker alone can claim."""

    name = "flexiq"
    package = "flexiq"
    python_only = False

    def open(self, synchronous: str) -> None:
        if synchronous != "NORMAL":
            raise CannotError("synchronous=NORMAL is compiled in")
        module: Any = importlib.import_module("flexiq")
        self.queue = module.Queue(db_path=str(self.file))
        self.noop = self.queue.task(name="noop")(noop)

    def enqueue(self, payload: str) -> None:
        self.noop.delay(payload)

    def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        self.queue.enqueue_many("noop", [(payload,) for payload in payloads])

    def payload(self, claimed: Any) -> str:
        raise CannotError("only its own worker can claim")

    def count(self) -> int:
        return int(self.queue.stats()["pending"])

    def synchronous(self) -> str:
        return "NORMAL"  # compiled in; its connections cannot be asked


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Bare,
        OmniQ,
        Huey,
        Potatoq,
        PulseQueue,
        CairnQ,
        Dura,
        LiteQueue,
        PersistQueue,
        LocalQueue,
        FlexiQ,
    )
}


def version(peer: type[Peer]) -> str | None:
    """Return the installed version, or None."""
    if peer is OmniQ:
        return str(importlib.import_module("omniq_sqlite").__version__)
    if peer is Bare:
        return sqlite3.sqlite_version
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the database and of its WAL."""
    sizes = {path.name: os.stat(path).st_size for path in folder.iterdir()}
    wal = sum(size for name, size in sizes.items() if name.endswith("-wal"))
    shm = sum(size for name, size in sizes.items() if name.endswith("-shm"))
    return sum(sizes.values()) - wal - shm, wal
