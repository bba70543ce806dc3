"""Measure this queue against those that a user would pick instead.

    pip install '.[bench]'          # from the project's folder
    python benchmarks/run.py        # prints a table; takes about 15 minutes

Every column of a row is measured in a process of its own, round by round (A B C,
A B C, …), each time with a fresh file of the same durability, payload and number of
rows. A figure is the median of its rounds; a ratio is taken within each round, where
both were measured under the same load, and its median and spread are shown. A queue
that cannot do something has a dash, and the reason stands below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers
import workers
import workloads
from peers import PEERS, CannotError
from report import Outcome, as_json, plot, print_outcome, print_table
from workloads import QUICK, ROWS, Row, Sample, Size

CALL_TIMEOUT = 120.0
"""Seconds that one measurement may take before its process is ended."""

BUILD_TIMEOUT = 1_200.0
"""Seconds for what is made or done once, with a million rows."""


# =============================================================================
# Processes
# =============================================================================


def _serve(connection: Connection) -> None:
    """Answer calls in a process of its own, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends its own children
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(_answer(*connection.recv()))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return a call's value and None, or None and why there is no value."""
    try:
        return function(*arguments), None
    except CannotError as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 - it becomes a dash with a reason
        return None, f"{type(error).__name__}: {error}"


class Station:
    """A process for one column, kept for its rounds: it imports its queue once."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call."""
        self.connection.send((function, arguments))

    def receive(self, timeout: float) -> Any:
        """Return the outcome of the call that was begun.

        Raises: `CannotError` if it cannot be done, failed or took too long.
        """
        if not self.connection.poll(timeout):
            self.process.kill()
            raise CannotError(f"took longer than {timeout:.0f} s")
        try:
            value, reason = self.connection.recv()
        except EOFError:
            raise CannotError("its process died") from None
        if reason is not None:
            raise CannotError(reason)
        return value

    def call(
        self, function: Callable[..., Any], *arguments: Any, timeout: float
    ) -> Any:
        """Run a function there and return its value."""
        self.send(function, *arguments)
        return self.receive(timeout)

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


# =============================================================================
# Measuring
# =============================================================================


Round = dict[str, Sample | CannotError]

_measuring: list[Any] = []
"""In a station: the measurement that is under way."""


def _begin_slices(measure: Callable[..., Any], *arguments: Any) -> None:
    _measuring[:] = [measure(*arguments)]
    next(_measuring[0])


def _send(more: bool) -> Any:
    """Let a station's measurement give its next slice, or end."""
    piece = _measuring[0].send(more)
    if not more:
        next(_measuring[0], None)  # it closes and checks
    return piece


def _resume(station: Station, column: str) -> Any:
    return station.call(_send, True, timeout=CALL_TIMEOUT)


def _finish(station: Station, column: str) -> Any:
    return station.call(_send, False, timeout=CALL_TIMEOUT)


class Bench:
    """The stations, the files made for several rows, and the rounds."""

    def __init__(self, root: Path, size: Size, repeats: int) -> None:
        self.root = root
        self.size = size
        self.repeats = repeats
        self.stations: dict[str, list[Station]] = {}
        self.built: dict[str, tuple[Path, Sample]] = {}
        self.steps = workers.calibrate()

    def station(self, column: str, number: int = 0) -> Station:
        """Return a column's process, started anew if the last one was ended."""
        crew = self.stations.setdefault(column, [])
        while len(crew) <= number:
            crew.append(Station())
        if not crew[number].process.is_alive():
            crew[number].close()
            crew[number] = Station()
        return crew[number]

    def close(self, keep: int = 0) -> None:
        """End all processes, but for the first `keep` of each column."""
        for crew in self.stations.values():
            for station in crew[keep:]:
                station.close()
            del crew[keep:]

    def build(self, builder: Callable[..., Sample]) -> tuple[Path, Sample]:
        """Return a file for several rounds, and what is known of it."""
        name = builder.__name__
        if name not in self.built:
            folder = Path(tempfile.mkdtemp(dir=self.root))
            facts = self.station("omniq_sqlite").call(
                builder, folder, self.size, timeout=BUILD_TIMEOUT
            )
            self.built[name] = folder, facts
        return self.built[name]

    def measure(self, row: Row) -> Outcome:
        """Measure all columns of a row, round by round."""
        outcome = Outcome(row)
        for column in set(row.columns) & set(PEERS):
            if peers.version(PEERS[column]) is None:
                outcome.dashes[column] = "not installed"
        take_round = self.take_slices if "slice" in row.kind else self.take_turns
        for _ in range(1 if row.kind in ("once", "built") else self.repeats):
            columns = [c for c in row.columns if c not in outcome.dashes]
            for column, sample in take_round(row, columns).items():
                if isinstance(sample, CannotError):
                    outcome.dashes[column] = str(sample)
                    outcome.samples.pop(column, None)
                else:
                    outcome.samples.setdefault(column, []).append(sample)
        self.close(keep=1)
        return outcome

    def take_turns(self, row: Row, columns: list[str]) -> Round:
        """Measure each column in one piece."""
        step: Callable[[Row, str], Sample] = getattr(self, f"measure_{row.kind}")
        done: Round = {}
        for column in columns:
            try:
                done[column] = step(row, column)
            except CannotError as reason:
                done[column] = reason
        return done

    def take_slices(self, row: Row, columns: list[str]) -> Round:
        """Measure all columns in many short turns, so that all see the same load."""
        slices: dict[str, list[tuple[int, float]]] = {c: [] for c in columns}
        done: Round = {}

        def each(
            columns: list[str], send: Callable[[Station, str], Any]
        ) -> Iterator[tuple[str, Any]]:
            for column in columns:
                try:
                    yield column, send(self.station(column), column)
                except CannotError as reason:
                    done[column] = reason

        def left() -> list[str]:
            return [c for c in columns if c not in done]

        for _ in each(columns, partial(self._begin, row)):
            pass
        share = self.size.slices * self.size.slice
        for _ in range(self.size.slices):
            # One whose single step is long does not get as many.
            short = [c for c in left() if sum(s for _, s in slices[c]) < share]
            for column, piece in each(short, _resume):
                slices[column].append(piece)
        for column, sample in each(left(), _finish):
            operations, seconds = map(sum, zip(*slices[column], strict=True))
            value = operations / seconds
            if row.fewer_is_better:
                value = 1e6 / value  # microseconds for each
            done[column] = {"value": value, **sample}
        return done

    def _begin(self, row: Row, station: Station, column: str) -> None:
        where: tuple[Any, ...] = (column, self.root)
        if row.kind == "sliced_variants":
            where = self.build(row.builders[row.columns.index(column)])[:1]
        arguments = (row.measure, *where, self.size, *row.arguments)
        station.call(_begin_slices, *arguments, timeout=CALL_TIMEOUT)

    def measure_station(self, row: Row, column: str) -> Sample:
        """Call the function with the queue's name."""
        sample: Sample = self.station(column).call(
            row.measure,
            column,
            self.root,
            self.size,
            *row.arguments,
            timeout=CALL_TIMEOUT,
        )
        return sample

    def measure_once(self, row: Row, column: str) -> Sample:
        """Do what takes minutes."""
        sample: Sample = self.station(column).call(
            row.measure,
            column,
            self.root,
            self.size,
            *row.arguments,
            timeout=BUILD_TIMEOUT,
        )
        return sample

    def measure_built(self, row: Row, column: str) -> Sample:
        """Take what was seen while a file was made."""
        _, facts = self.build(row.builders[0])
        return {"value": facts["bytes"]}

    def measure_variants(self, row: Row, column: str) -> Sample:
        """Call the function with a file that was made before."""
        folder, _ = self.build(row.builders[row.columns.index(column)])
        sample: Sample = self.station("omniq_sqlite").call(
            row.measure, folder, self.size, *row.arguments, timeout=CALL_TIMEOUT
        )
        return sample

    def measure_crowd(self, row: Row, column: str) -> Sample:
        """Run the function in 8 processes at once."""
        mode = row.arguments[0]
        present = self.size.crowd_present if mode == "work" else 20
        crew = [self.station(column, number) for number in range(self.size.crowd)]
        with workloads.fresh_folder(self.root) as folder:
            arguments = (column, folder, present)
            crew[0].call(workloads.fill_copy, *arguments, timeout=CALL_TIMEOUT)
            for station in crew:  # all have started
                station.call(time.time, timeout=CALL_TIMEOUT)
            with workloads.worn_in(folder / PEERS[column].file_name):
                start_at = time.time() + 0.5
                for station in crew:
                    station.send(row.measure, column, folder, self.size, mode, start_at)
                parts = [station.receive(CALL_TIMEOUT) for station in crew]
        return workloads.sum_up_crowd(parts, start_at)

    def measure_pair(self, row: Row, column: str) -> Sample:
        """Let one process wait and another one send."""
        waiting, sending = (self.station(column, number) for number in (0, 1))
        with workloads.fresh_folder(self.root) as folder:
            arguments = (column, folder, 0)
            waiting.call(workloads.fill_copy, *arguments, timeout=CALL_TIMEOUT)
            with workloads.worn_in(folder / PEERS[column].file_name):
                waiting.send(row.measure, column, folder, self.size)
                sending.call(
                    workloads.send, column, folder, self.size, timeout=CALL_TIMEOUT
                )
                sample: Sample = waiting.receive(CALL_TIMEOUT)
        return sample

    def measure_spin(self, row: Row, column: str) -> Sample:
        """Run the worker, or the same computing in as many bare processes."""
        window = self.size.crowd_window
        if column in PEERS:
            sample: Sample = self.station(column).call(
                row.measure,
                column,
                self.root,
                self.size,
                self.steps,
                ("--processes", "4"),
                timeout=CALL_TIMEOUT,
            )
            return sample
        crew = [self.station(column, number) for number in range(4)]
        for station in crew:
            station.call(time.time, timeout=CALL_TIMEOUT)
        start_at = time.time() + 0.1
        for station in crew:
            station.send(workloads.spin, self.root, self.steps, start_at, window)
        return {"value": sum(s.receive(CALL_TIMEOUT) for s in crew) / window}


# =============================================================================
# The program
# =============================================================================


def slow_down_flushes(milliseconds: float, folder: Path) -> None:
    """Let the stations flush as on a slower disk: all of them, and what they start.

    Raises: `CannotError` where there is no C compiler, or the library does not act.
    """
    library = str(folder / "slow_flush.so")
    source = str(Path(__file__).with_name("slow_flush.c"))
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
    before = time_flush(folder)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotError("flushes cannot be slowed without a C compiler") from error
    except subprocess.CalledProcessError as error:
        raise CannotError(f"flushes cannot be slowed here: {error.stderr}") from error
    os.environ["LD_PRELOAD"] = library
    os.environ["OMNIQ_BENCHMARK_FLUSH_US"] = str(int(milliseconds * 1_000))
    after = time_flush(folder)
    if after < 0.8 * (before + milliseconds):
        raise CannotError(f"flushes are not slowed here: {before:.2f}, {after:.2f} ms")


def time_flush(folder: Path) -> float:
    """Return the milliseconds in which a process like the stations flushes a page."""
    station = Station()
    try:
        milliseconds: float = station.call(
            workloads.time_flush, folder, timeout=CALL_TIMEOUT
        )
        return milliseconds
    finally:
        station.close()


def describe(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Return what the figures depend on."""
    names = ("aiosqlite", "anyio")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/run.py " + shlex.join(options.given),
        "flush": f"{time_flush(root):.2f} ms",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "filesystem": filesystem(root),
        "load": os.getloadavg()[0],
        "versions": {n: peers.version(p) for n, p in PEERS.items()}
        | {n: importlib.metadata.version(n) for n in names},
        "repeats": options.repeats,
        "rows": options.rows,
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [
        line.split(":")[1].strip() for line in lines if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def filesystem(folder: Path) -> str:
    """Return the type of the file system that holds a folder."""
    try:
        mounts = [
            line.split() for line in Path("/proc/mounts").read_text().splitlines()
        ]
    except OSError:
        return "unknown"
    path = str(folder.resolve())
    holding = [
        m for m in mounts if path == m[1] or path.startswith(m[1].rstrip("/") + "/")
    ]
    return max(holding, key=lambda m: len(m[1]))[2] if holding else "unknown"


def choose_root(given: Path | None) -> Path:
    """Return the folder for the files: on a disk, not in memory, unless asked for."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    on_disk = [
        c for c in candidates if c.is_dir() and filesystem(c) not in ("tmpfs", "ramfs")
    ]
    parent = given or (on_disk or candidates)[0]
    return Path(tempfile.mkdtemp(prefix="omniq-benchmark-", dir=parent))


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what says where the figures go, and where they are measured."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw them (.svg or .png)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the files are made (default: a disk)",
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="workloads: " + " ".join(r.name for r in ROWS),
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="tiny sizes, one round, for correctness alone",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="WORKLOAD",
        help="may be repeated",
    )
    add("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    add(
        "--rows",
        type=int,
        default=1_000_000,
        metavar="N",
        help="rows of the large files",
    )
    add(
        "--flush-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="let each flush take this much longer, for all alike, as on a slower"
        " disk (Linux, needs a C compiler)",
    )
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.given = list(arguments)
    unknown = [name for name in options.only if name not in {r.name for r in ROWS}]
    if unknown:
        parser.error(f"unknown workload: {' '.join(unknown)}")
    return options


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure what was asked for and print it."""
    size = QUICK if options.quick else Size(large=options.rows)
    facts = describe(options, root)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    bench = Bench(root, size, 1 if options.quick else options.repeats)
    outcomes = []
    try:
        for row in rows:
            outcomes.append(bench.measure(row))
            print_outcome(outcomes[-1], timed=not options.quick)
    except KeyboardInterrupt:
        print("\ninterrupted: the rows from here on are left out")
    finally:
        bench.close()
    failed = [
        o.row.name for o in outcomes if set(o.dashes) & {"omniq_sqlite", *_ours(o.row)}
    ]
    return {"facts": facts, "rows": [as_json(o) for o in outcomes], "failed": failed}


def _ours(row: Row) -> Iterable[str]:
    return [column for column in row.columns if column not in PEERS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 if a workload of ours could not be done."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    root = choose_root(options.folder)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.flush_ms:
            slow_down_flushes(options.flush_ms, root)
        results = run(options, root)
    except CannotError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if not options.quick:
        print_table(results)
    if options.json:
        options.json.write_text(
            json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        )
    if options.plot:
        plot(results, options.plot)
    print(f"\ntook {time.monotonic() - began:.0f} s")
    if results["failed"]:
        print(f"not done: {', '.join(results['failed'])}", file=sys.stderr)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
