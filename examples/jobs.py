"""The functions of the other examples, imported by who enqueues and who works."""

from omniq_sqlite import TaskRegistry, progress

tasks = TaskRegistry()


@tasks.register(max_attempts=5, timeout=30)
def count_words(text: str) -> int:
    """Return how many words `text` has."""
    return len(text.split())


@tasks.register()
async def total(numbers: list[int]) -> int:
    """Return the sum of `numbers`, and show how far it is."""
    so_far = 0
    for done, number in enumerate(numbers, start=1):
        so_far += number
        progress(done, len(numbers))
    return so_far


@tasks.register()
def send_receipt(order: int) -> str:
    """Stand for a mail about an order."""
    return f"receipt for order {order}"


@tasks.register(max_attempts=2, retry_delay=0.01)
def divide(dividend: int, divisor: int) -> float:
    """Return a quotient, or fail as functions do."""
    return dividend / divisor
