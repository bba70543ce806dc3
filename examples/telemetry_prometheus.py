"""Prometheus: what happens to tasks, and how many wait, at 127.0.0.1:9464/metrics.

Run it beside the workers, once for each file.
"""

import sys
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, Counter, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from omniq_sqlite import SQLiteBackend, SQLiteQueue, TaskEvent, TaskStatus

EVENTS = Counter("omniq_events", "Events of tasks", ["queue", "type"])


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
    """Count events as they come."""
    for event in events:
        EVENTS.labels(event.queue, event.type).inc()


if __name__ == "__main__":
    backend = SQLiteBackend(sys.argv[1], events=True)
    assert backend.events is not None
    REGISTRY.register(Depth(backend.queue))
    start_http_server(9464, "127.0.0.1")
    count(backend.events.follow())
