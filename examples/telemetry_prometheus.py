"""Prometheus: what happens to tasks, how long they run, and how many wait.

At http://127.0.0.1:9464/metrics, for a file: `telemetry_prometheus.py jobs.db`.
"""

import sys
from collections.abc import Iterable, Iterator

from prometheus_client import (
    REGISTRY,
    Counter,
    Histogram,
    Metric,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from omniq_sqlite import (
    EventType,
    SQLiteBackend,
    SQLiteQueue,
    TaskEvent,
    TaskStatus,
)

EVENTS = Counter("omniq_events", "Events of tasks", ["queue", "type"])
SECONDS = Histogram("omniq_run_seconds", "Runs of tasks, however they ended", ["func"])


class Depth(Collector):
    """The tasks of each queue by status, counted when they are asked for."""

    def __init__(self, queue: SQLiteQueue) -> None:
        self.queue = queue

    def collect(self) -> Iterator[Metric]:
        """Yield one gauge."""
        gauge = GaugeMetricFamily("omniq_tasks", "Tasks", labels=["queue", "status"])
        for stats in self.queue.stats():
            for status in TaskStatus:
                gauge.add_metric([stats.queue, status], getattr(stats, status))
        yield gauge


def count(events: Iterable[TaskEvent]) -> None:
    """Count events as they come, and the time from a claim to what ended it."""
    begun: dict[str | None, TaskEvent] = {}
    for event in events:
        EVENTS.labels(event.queue, event.type).inc()
        if event.type == EventType.DEQUEUED:
            begun[event.task_id] = event
        elif begin := begun.pop(event.task_id, None):
            seconds = (event.at - begin.at).total_seconds()
            SECONDS.labels(begin.details["func"]).observe(seconds)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: telemetry_prometheus.py DATABASE")
    backend = SQLiteBackend(sys.argv[1], events=True)
    assert backend.events is not None
    REGISTRY.register(Depth(backend.queue))
    start_http_server(9464, "127.0.0.1")
    count(backend.events.follow())
