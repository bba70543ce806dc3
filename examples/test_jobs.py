"""pytest: test code that enqueues, and its tasks, without a file and without waiting.

Run it with `pytest test_jobs.py`.
"""

from collections.abc import Iterator

import pytest

from jobs import count_words, divide, tasks
from omniq_sqlite import SQLiteBackend, Task, Worker


class Jobs:
    """A backend in memory whose time stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.backend = SQLiteBackend(":memory:", clock=lambda: self.now, events=True)

    def is_due(self, task: Task) -> bool:
        """Tell whether a task that waits may run now."""
        return task.run_at is None or task.run_at.timestamp() <= self.now

    def run(self, *, after: float = 0.0) -> None:
        """Let `after` seconds pass; run each task that is due then once, right here.

        Without `max_tasks=` the worker would wait for a retry in the future, and
        for ever, as this clock does not go on by itself.
        """
        self.now += after
        queue = self.backend.queue
        waiting = queue.list_tasks(status="pending")
        waiting += queue.list_tasks(status="scheduled")
        if due := len(list(filter(self.is_due, waiting))):
            Worker(self.backend, tasks).run(until_empty=True, max_tasks=due)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    """Give a test its own queue."""
    jobs = Jobs()
    with jobs.backend:
        yield jobs


def test_words_are_counted(jobs: Jobs) -> None:
    """A task runs where the test runs."""
    task_id = jobs.backend.enqueue(count_words.task("to be or not to be"))
    jobs.run()
    assert jobs.backend.result(task_id, timeout=0).value == 6


def test_tomorrow_comes_at_once(jobs: Jobs) -> None:
    """A delay is a matter of the clock, and the clock is the test's."""
    task_id = jobs.backend.enqueue(count_words.task("tomorrow"), delay=86_400)
    jobs.run()
    assert jobs.backend.status(task_id) == "scheduled"
    jobs.run(after=86_400)
    assert jobs.backend.status(task_id) == "completed"


def test_a_division_by_zero_fails_for_good_at_the_second_try(jobs: Jobs) -> None:
    """A retry is a delay like any other."""
    task_id = jobs.backend.enqueue(divide.task(1, 0))
    jobs.run()
    assert jobs.backend.status(task_id) == "scheduled"
    jobs.run(after=3600)
    assert jobs.backend.result(task_id, timeout=0).error_type == "ZeroDivisionError"
