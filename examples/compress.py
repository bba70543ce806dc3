"""Compress every file of a folder in worker processes: compress.py FOLDER.

Run it again after an interruption: it goes on where it stopped.
"""

import gzip
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from omniq_sqlite import SQLiteBackend, Task, TaskRegistry, Worker

tasks = TaskRegistry()


@tasks.register(max_attempts=3)
def compress(path: Path) -> tuple[int, int]:
    """Write `path` with `.gz` added; return its size before and after."""
    target = path.with_name(path.name + ".gz")
    partial = path.with_name(path.name + ".gz.partial")
    with path.open("rb") as source, gzip.open(partial, "wb") as packed:
        shutil.copyfileobj(source, packed)
    partial.replace(target)  # a killed worker leaves no half a target
    return path.stat().st_size, target.stat().st_size


def make_task(path: Path) -> Task:
    """Return the task for one file; its key makes it the only one of the file."""
    return replace(compress.task(path), unique_key=str(path))


def main() -> None:
    """Enqueue what is not done yet, work it off, and print the sum."""
    folder = Path(sys.argv[1]).resolve()
    todo = [
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.with_name(path.name + ".gz").exists()
        and ".gz" not in path.suffixes
    ]
    with SQLiteBackend("compress.db") as backend:
        ids = backend.enqueue_many(make_task(path) for path in todo)
        Worker(backend, tasks).run(until_empty=True, processes=os.cpu_count() or 1)
        sizes = [backend.result(task_id).value for task_id in ids]
    before = sum(size for size, _ in sizes)
    after = sum(size for _, size in sizes)
    print(f"{len(sizes)} files, {before} bytes before, {after} after")


if __name__ == "__main__":
    main()
