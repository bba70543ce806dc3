"""Outbox with Django's `transaction.atomic`: rows and task are committed together."""

# Only the plugin of django-stubs tells mypy what a model's fields are.
# mypy: disable-error-code="var-annotated"

import django
from django.conf import settings
from django.db import connection, models, transaction

from jobs import send_receipt
from omniq_sqlite import SQLiteQueue

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": "shop.db",
            "OPTIONS": {
                "timeout": 30,
                "transaction_mode": "IMMEDIATE",  # a read first is then no trap
                "init_command": "PRAGMA wal_autocheckpoint=0",  # README, "Traps"
            },
        }
    }
)
django.setup()
queue = SQLiteQueue("shop.db")


class Order(models.Model):
    """An order of the shop."""

    item = models.TextField()

    class Meta:
        """Where the model is, which is no application of its own here."""

        app_label = "shop"


@transaction.atomic
def place_order(item: str) -> None:
    """Add an order and the task to send its receipt, in one transaction."""
    order = Order.objects.create(item=item)
    queue.enqueue_on(connection.connection, send_receipt.task(order.pk))
    if item == "a chair":
        raise ValueError("out of chairs")


def main() -> None:
    """Place an order that is committed and one that is rolled back."""
    if Order._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:  # in an application: `migrate`
            editor.create_model(Order)
    place_order("a lamp")
    try:
        place_order("a chair")
    except ValueError as error:
        print(error)
    print(f"orders: {Order.objects.count()}, tasks: {queue.count_tasks()}")


if __name__ == "__main__":
    main()
