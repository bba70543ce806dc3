"""Outbox with plain sqlite3: an order and its task are committed together or not."""

import sqlite3
from contextlib import closing

from jobs import send_receipt
from omniq_sqlite import SQLiteQueue


def place_order(shop: sqlite3.Connection, queue: SQLiteQueue, item: str) -> None:
    """Add an order and the task to send its receipt, in one transaction."""
    with shop:  # commits at the end, rolls back after an exception
        added = shop.execute("INSERT INTO orders (item) VALUES (?)", [item])
        queue.enqueue_on(shop, send_receipt.task(added.lastrowid or 0))
        if item == "a chair":
            raise ValueError("out of chairs")


def main() -> None:
    """Place an order that is committed and one that is rolled back."""
    with closing(sqlite3.connect("shop.db", timeout=30)) as shop:
        shop.execute(
            "PRAGMA wal_autocheckpoint=0"
        )  # the queue does it, README says why
        shop.execute(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, item TEXT)"
        )
        queue = SQLiteQueue("shop.db")
        place_order(shop, queue, "a lamp")
        try:
            place_order(shop, queue, "a chair")
        except ValueError as error:
            print(error)
        orders = shop.execute("SELECT count(*) FROM orders").fetchone()[0]
        print(f"orders: {orders}, tasks: {queue.count_tasks()}")
        queue.close()


if __name__ == "__main__":
    main()
