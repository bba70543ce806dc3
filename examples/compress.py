"""Compress every file of a folder in worker processes: compress.py FOLDER.

The queue is `compress.db` in the current folder. After an interruption run it
again: it goes on where it stopped.
"""

import gzip
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from omniq_sqlite import SQLiteBackend, Task, TaskRegistry, Worker

DATABASE = "compress.db"

tasks = TaskRegistry()


@tasks.register(max_attempts=3)
def compress(path: Path) -> tuple[int, int]:
    """Write `path` with `.gz` added; return its size before and after."""
    target = path.with_name(path.name + ".gz")
    partial = path.with_name(path.name + ".gz.partial")
    with path.open("rb") as source, gzip.open(partial, "wb") as packed:
        shutil.copyfileobj(source, packed)
    partial.replace(target)  # a worker that is killed leaves no half a target
    return path.stat().st_size, target.stat().st_size


def wants_compressing(path: Path) -> bool:
    """Tell whether `path` is a file that has no compressed copy yet."""
    return (
        path.is_file()
        and not path.name.startswith(DATABASE)  # never open it beside SQLite
        and ".gz" not in path.suffixes
        and not path.with_name(path.name + ".gz").exists()
    )


def make_task(path: Path) -> Task:
    """Return the task for a file; by its key there is only one at a time."""
    return replace(compress.task(path), unique_key=str(path))


def main(folder: Path) -> int:
    """Enqueue what is not done yet, work it off, and print the sums."""
    files = filter(wants_compressing, folder.resolve().iterdir())
    with SQLiteBackend(DATABASE) as backend:
        ids = backend.enqueue_many(map(make_task, files))
        Worker(backend, tasks).run(until_empty=True, processes=os.cpu_count() or 1)
        results = [backend.result(task_id) for task_id in ids]
    sizes = [result.value for result in results if result.status == "success"]
    before = sum(size for size, _ in sizes)
    after = sum(size for _, size in sizes)
    print(f"{len(sizes)} files, {before} bytes before, {after} after")
    for result in results:
        if result.error is not None:
            print(result.error, file=sys.stderr)
    return 0 if len(sizes) == len(results) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: compress.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
