"""OpenTelemetry: a span for each attempt of a task, made from the event log.

Run it beside the workers, once for each file, as
`opentelemetry-instrument python telemetry_opentelemetry.py jobs.db`. To have spans
of your functions inside of it, use the worker's `wrap=` instead.
"""

import sys
from collections.abc import Iterable
from datetime import datetime

from opentelemetry.trace import StatusCode, Tracer, get_tracer

from omniq_sqlite import EventType, SQLiteEventStorage, TaskEvent


def nanoseconds(instant: datetime) -> int:
    """Return an instant as OpenTelemetry counts time."""
    return int(instant.timestamp() * 1e9)


def record(events: Iterable[TaskEvent], tracer: Tracer) -> None:
    """Make a span from each claim and the event that ends it."""
    begun: dict[str | None, TaskEvent] = {}
    for event in events:
        if event.type == EventType.DEQUEUED:
            begun[event.task_id] = event
        elif begin := begun.pop(event.task_id, None):
            facts = {"task": str(event.task_id), "queue": str(event.queue)}
            span = tracer.start_span(
                begin.details["func"],
                start_time=nanoseconds(begin.at),
                attributes=facts | {"attempt": begin.details["attempt"]},
            )
            if event.type != EventType.COMPLETED:
                span.set_status(StatusCode.ERROR, event.message)
            span.end(nanoseconds(event.at))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: telemetry_opentelemetry.py DATABASE")
    log = SQLiteEventStorage(sys.argv[1])
    record(log.follow(), get_tracer("omniq_sqlite"))
