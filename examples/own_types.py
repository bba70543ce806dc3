"""Pydantic models and dataclasses as arguments and results, through `serializer=`."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, TypeAdapter

from omniq_sqlite import JSONSerializer, SQLiteBackend, TaskRegistry, Worker


class TypesByName:
    """The default's rules, and beside them classes that the file knows by name.

    Nothing that the file names is imported: an unknown name is a `KeyError`.
    """

    def __init__(self, *types: type) -> None:
        self.adapters = {kind.__name__: TypeAdapter[Any](kind) for kind in types}
        self.default = JSONSerializer()

    def dumps(self, value: Any) -> str:
        """Return `value` as JSON text."""
        return self.default.dumps(self.pack(value))

    def loads(self, text: str) -> Any:
        """Return the value whose text this is, its classes validated anew."""
        return self.unpack(self.default.loads(text))

    def pack(self, value: Any) -> Any:
        """Replace each instance of our classes by a dictionary."""
        name = type(value).__name__
        if name in self.adapters:
            fields = self.adapters[name].dump_python(value, mode="json")
            return {"$type": name, "fields": fields}
        if isinstance(value, list | tuple):
            return type(value)(map(self.pack, value))
        if isinstance(value, dict):
            return {key: self.pack(item) for key, item in value.items()}
        return value

    def unpack(self, value: Any) -> Any:
        """Make the instances again."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.unpack, value))
        if isinstance(value, dict):
            if "$type" in value:
                return self.adapters[value["$type"]].validate_python(value["fields"])
            return {key: self.unpack(item) for key, item in value.items()}
        return value


class Order(BaseModel):
    """What a customer wants, and since when."""

    item: str
    placed_at: datetime


@dataclass(frozen=True)
class Parcel:
    """What is sent."""

    orders: tuple[Order, ...]


tasks = TaskRegistry()


@tasks.register()
def pack_up(orders: list[Order], at: datetime) -> Parcel:
    """Put into one parcel what was ordered before `at`."""
    return Parcel(tuple(order for order in orders if order.placed_at < at))


def main() -> None:
    """Pack two orders."""
    noon = datetime(2026, 11, 25, 12, tzinfo=UTC)
    orders = [Order(item=name, placed_at=noon) for name in ("lamp", "chair")]
    serializer = TypesByName(Order, Parcel)
    with SQLiteBackend("parcels.db", serializer=serializer) as backend:
        task_id = backend.enqueue(pack_up.task(orders, at=noon.replace(hour=13)))
        Worker(backend, tasks).run(until_empty=True)
        parcel = backend.result(task_id).value
    assert parcel == Parcel(tuple(orders))
    print(type(parcel).__name__, [order.item for order in parcel.orders])


if __name__ == "__main__":
    main()
