"""A shop's orders on a primary and its replicas, one process each: python replicated_shop.py primary | replica NAME

The primary takes an order a second and says how its replicas stand. A replica reads, and waits for the primary's word
where it must not miss anything. Kill either and start it again.
"""

import itertools
import sys
import time

from messenger import Messenger
from messenger.replication import NotConfirmed, Primary, Replica

PORT = 15445


def take_orders(primary: Primary, count: int) -> None:
    """Commit orders that are durable at one replica, and go on when there is none."""
    primary.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, book TEXT)", commit="local")
    for number, book in zip(range(count), itertools.cycle(["Dune", "Emma", "Ulysses"]), strict=False):
        try:
            primary.execute("INSERT INTO orders (book) VALUES (?)", (book,))
        except NotConfirmed as error:
            print("not confirmed:", error)
        told = ", ".join(f"{r.name} {r.state} at {r.applied_lsn}" for r in primary.status().replicas)
        print(f"order {number + 1} at {primary.position}; {told or 'no replica yet'}", flush=True)
        time.sleep(1)


def show_orders(replica: Replica, count: int) -> None:
    """Print the number of orders whenever it has changed, until there are so many."""
    replica.wait_for((1, 1), timeout=60)  # The first transaction makes the table.
    seen = 0
    while seen < count:
        replica.wait_for((replica.position.term, replica.position.lsn + 1), timeout=60)
        (seen,) = replica.execute("SELECT count(*) FROM orders").fetchone()
        print(f"{seen} orders at {replica.position}", flush=True)


if __name__ == "__main__":
    role, *rest = sys.argv[1:] or ["primary"]
    if role == "primary":
        with (
            Messenger("primary") as messenger,
            Primary("shop.db", messenger, PORT, commit="durable", timeout=1) as shop,
        ):
            take_orders(shop, int(rest[0]) if rest else 1_000_000)
    else:
        name = rest[0] if rest else "replica1"
        with Messenger(name) as messenger, Replica(f"{name}.db", messenger, PORT) as copy:
            show_orders(copy, int(rest[1]) if len(rest) > 1 else 1_000_000)
