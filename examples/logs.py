"""Logging: one JSON object a line, with the fields that the library adds.

Imported by the module that `omniq-sqlite worker --app` names, this is what the
worker and its child processes use.
"""

import json
import logging

from jobs import count_words, divide, tasks
from omniq_sqlite import SQLiteBackend, Worker

FIELDS = ("worker", "task_id", "queue", "func", "attempt")


class JSONLines(logging.Formatter):
    """A record as one line: its message, the library's fields, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        facts = {"level": record.levelname, "message": record.getMessage()}
        facts |= {name: vars(record)[name] for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)


handler = logging.StreamHandler()
handler.setFormatter(JSONLines())
logging.basicConfig(level=logging.INFO, handlers=[handler])

if __name__ == "__main__":
    with SQLiteBackend("jobs.db") as backend:
        backend.enqueue(count_words.task("no line: all went well"))
        backend.enqueue(divide.task(1, 0))
        Worker(backend, tasks).run(until_empty=True)
