"""Outbox with an SQLAlchemy 2 session: rows and task are committed together or not."""

import sqlite3

from sqlalchemy import create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from jobs import send_receipt
from omniq_sqlite import SQLiteQueue, Task

engine = create_engine("sqlite:///shop.db", connect_args={"timeout": 30})
queue = SQLiteQueue("shop.db")


@event.listens_for(engine, "connect")
def leave_checkpoints_to_the_queue(connection: sqlite3.Connection, _: object) -> None:
    """Set up each connection of the pool; README, "Traps", says why."""
    connection.execute("PRAGMA wal_autocheckpoint=0")


class Base(DeclarativeBase):
    """The application's tables."""


class Order(Base):
    """An order of the shop."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


def enqueue_in(session: Session, *tasks: Task) -> None:
    """Add tasks to the session's transaction."""
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    queue.enqueue_on(connection, *tasks)


def place_order(item: str) -> None:
    """Add an order and the task to send its receipt, in one transaction."""
    with Session(engine) as session, session.begin():
        order = Order(item=item)
        session.add(order)
        session.flush()  # gives it its id
        enqueue_in(session, send_receipt.task(order.id))
        if item == "a chair":
            raise ValueError("out of chairs")


def main() -> None:
    """Place an order that is committed and one that is rolled back."""
    Base.metadata.create_all(engine)
    place_order("a lamp")
    try:
        place_order("a chair")
    except ValueError as error:
        print(error)
    with Session(engine) as session:
        orders = session.scalar(select(func.count()).select_from(Order))
    print(f"orders: {orders}, tasks: {queue.count_tasks()}")


if __name__ == "__main__":
    main()
