# /// script
# requires-python = ">=3.11"
# dependencies = ["aiosqlite>=0.20", "anyio>=4.11"]
# ///
"""Hash files in worker processes; `uv run script.py FILE …` installs what it needs.

So does `pipx run --path script.py FILE …`. Only `omniq_sqlite.py` stands beside it.
After an interruption the same command goes on where it stopped.
"""

import hashlib
import sys
from pathlib import Path

from omniq_sqlite import SQLiteBackend, Task, TaskRegistry, Worker

tasks = TaskRegistry()


@tasks.register()
def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_task(name: str) -> Task:
    """Return the task for a file; by its key there is only one at a time."""
    return sha256.options(unique_key=name).task(Path(name))


def main(names: list[str]) -> int:
    """Hash the files called `names` and print a line for each."""
    with SQLiteBackend("script.db") as backend:
        ids = backend.enqueue_many(map(make_task, names))
        Worker(backend, tasks).run(until_empty=True, processes=2)
        results = list(map(backend.result, ids))
    for name, result in zip(names, results, strict=True):
        print(result.value or result.error, name)
    return 0 if all(result.status == "success" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else "usage: script.py FILE …")
