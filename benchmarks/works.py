"""What is measured, who takes part, and what is asked of Messenger (the least, and what it aims at)."""

from typing import NamedTuple

from . import asynchronous, curve, models, ours, peers, plain, postgresql, transactions
from .contender import Contender

CONTENDERS: dict[str, Contender] = {
    **ours.CONTENDERS,
    **plain.CONTENDERS,
    **curve.CONTENDERS,
    **peers.CONTENDERS,
    **asynchronous.CONTENDERS,
    **transactions.CONTENDERS,
    **postgresql.CONTENDERS,
    **models.CONTENDERS,
}


class Target(NamedTuple):
    """A ratio that is asked for.

    Attributes:
        contender: Who is held to it.
        against: Whom its figure is divided by, the best of them, round by round; with none, the figure itself counts.
        limit: At least, where more is better; at most, where less is better.
        aim: What would be good.
    """

    contender: str
    against: tuple[str, ...]
    limit: float
    aim: float


class Work(NamedTuple):
    """One thing to measure.

    Attributes:
        unit: `GB/s`, `µs` (the median of each round trip or commit), `bytes` (each message), what a contender's own
            figure is in, or else how many a second.
        window: Messages in flight, of all sessions together, or threads that commit.
        message_count: Of a fast contender; slow ones make fewer. Of transactions, too.
        baseline: The contender that the table shows ratios to.
        pinned: Whether all processes run on one CPU.
    """

    title: str
    unit: str
    size_bytes: int
    window: int
    message_count: int
    contenders: tuple[str, ...]
    baseline: str
    targets: tuple[Target, ...]
    pinned: bool = False

    @property
    def less_is_better(self) -> bool:
        """Whether the figure is a cost."""
        return self.unit in ("µs", "µs of CPU", "bytes", "echoes", "× idle")


PEERS = ("asyncio streams, uvloop", "zmq.asyncio", "nats-py", "RPyC", "grpc.aio")
OURS = ("messenger", "messenger basic")
OURS_ONE = ("messenger, request", "messenger", "messenger basic, request", "messenger basic")
PYZMQ = ("pyzmq idiomatic", "pyzmq best")
ONE_IN_FLIGHT = (
    Target("messenger, request", ("pyzmq best",), 1.8, 1.1),
    Target("messenger", ("pyzmq best",), 1.4, 1.0),
    Target("messenger, request", ("messenger basic, request",), 1.15, 1.0),
    Target("messenger", ("messenger basic",), 1.15, 1.0),
)
ASYNC_OURS = ("AsyncMessenger, uvloop", "AsyncMessenger, asyncio", "AsyncMessenger, coroutine callback")
ASYNC_PEERS = ("zmq.asyncio", "nats-py", "grpc.aio")

ADDED = ("messenger, added by CURVE", "pyzmq best, added by CURVE")
PYZMQ_CURVE = ("pyzmq idiomatic, CURVE", "pyzmq best, CURVE")
CURVE = (
    Work(
        *("64 bytes, 1,000 in flight, CURVE", "round trips/s", 64, 1_000, 50_000),
        contenders=("messenger, CURVE", *PYZMQ_CURVE),
        baseline="pyzmq best, CURVE",
        targets=(Target("messenger, CURVE", PYZMQ_CURVE, 1.0, 2.0),),
    ),
    Work(
        *("64 bytes, one in flight, CURVE", "µs", 64, 1, 3_000),
        contenders=("messenger, request, CURVE", "messenger, CURVE", *PYZMQ_CURVE),
        baseline="pyzmq best, CURVE",
        targets=(
            Target("messenger, CURVE", ("pyzmq best, CURVE",), 1.4, 1.0),
            Target("messenger, request, CURVE", ("pyzmq best, CURVE",), 1.8, 1.0),
        ),
    ),
    Work(
        *("1 MiB echo, 4 in flight, CURVE", "GB/s", 2**20, 4, 300),
        contenders=("messenger, CURVE", *PYZMQ_CURVE),
        baseline="pyzmq best, CURVE",
        targets=(Target("messenger, CURVE", PYZMQ_CURVE, 1.0, 1.0),),
    ),
    Work(
        *("what CURVE adds: 64 bytes, 1,000 in flight", "µs of CPU", 64, 1_000, 200_000),
        contenders=ADDED,
        baseline="pyzmq best, added by CURVE",
        targets=(Target("messenger, added by CURVE", ("pyzmq best, added by CURVE",), 1.0, 0.5),),
    ),
    Work(
        *("what CURVE adds: 1 MiB echo, 4 in flight", "µs of CPU", 2**20, 4, 500),
        contenders=ADDED,
        baseline="pyzmq best, added by CURVE",
        targets=(Target("messenger, added by CURVE", ("pyzmq best, added by CURVE",), 1.0, 1.0),),
    ),
)

ROW_BYTES = 8 * 30
SERVERS = ("FastAPI + uvicorn", "LitServe")
MODELS = (
    Work(
        *("models: one row a call, one caller", "calls/s", ROW_BYTES, 1, 3_000),
        contenders=("messenger models", *SERVERS),
        baseline="FastAPI + uvicorn",
        targets=(Target("messenger models", SERVERS, 3.0, 5.0),),
    ),
    Work(
        *("models: one row a call, one caller, above the bare call", "µs", ROW_BYTES, 1, 3_000),
        contenders=("messenger models, above the bare call", "the bare call"),
        baseline="the bare call",
        targets=(Target("messenger models, above the bare call", (), 150, 100),),
    ),
    Work(
        *("models: one row a call, 64 callers", "calls/s", ROW_BYTES, 64, 20_000),
        contenders=("messenger models", "messenger models, callbacks", *SERVERS, "LitServe, batches of 64"),
        baseline="FastAPI + uvicorn",
        targets=(Target("messenger models", (*SERVERS, "LitServe, batches of 64"), 3.0, 6.0),),
    ),
    Work(
        *("models: 10,000 rows a call, one caller", "rows/s", ROW_BYTES, 0, 500_000),
        contenders=("messenger models", *SERVERS, "the bare call"),
        baseline="FastAPI + uvicorn",
        targets=(Target("messenger models", SERVERS, 1.0, 3.0),),
    ),
)
DATABASES = (
    "apsw alone",
    *(f"messenger {level}" for level in transactions.LEVELS),
    *(f"PostgreSQL {setting}" for setting in postgresql.LEVELS.values()),
)

WORKS = (
    Work(
        *("64 bytes, 1,000 in flight", "round trips/s", 64, 1_000, 200_000),
        contenders=(*OURS, *PYZMQ, *PEERS),
        baseline="pyzmq best",
        targets=(
            Target("messenger", ("pyzmq idiomatic",), 3.5, 6.0),
            Target("messenger", ("pyzmq best",), 1.2, 2.0),
            Target("messenger", PEERS, 1.0, 1.0),
            Target("messenger", (), 0, 600_000),
        ),
    ),
    Work(
        *("1 KiB, 1,000 in flight", "round trips/s", 1_024, 1_000, 100_000),
        contenders=(*OURS, *PYZMQ),
        baseline="pyzmq best",
        targets=(Target("messenger", ("pyzmq idiomatic",), 2.0, 3.0),),
    ),
    Work(
        *("64 bytes, one in flight", "µs", 64, 1, 3_000),
        contenders=(*OURS_ONE, *PYZMQ, *PEERS),
        baseline="pyzmq best",
        targets=ONE_IN_FLIGHT,
    ),
    Work(
        *("64 bytes, one in flight, all on one CPU", "µs", 64, 1, 3_000),
        contenders=(*OURS_ONE, *PYZMQ),
        baseline="pyzmq best",
        targets=ONE_IN_FLIGHT,
        pinned=True,
    ),
    Work(
        *("asyncio: 64 bytes, one in flight", "µs", 64, 1, 3_000),
        contenders=(*ASYNC_OURS, "messenger, request", "pyzmq best", *ASYNC_PEERS),
        baseline="pyzmq best",
        targets=(
            Target("AsyncMessenger, uvloop", ("pyzmq best",), 1.6, 1.0),
            Target("AsyncMessenger, asyncio", ("pyzmq best",), 2.0, 1.5),
            Target("AsyncMessenger, uvloop", ASYNC_PEERS, 1.0, 0.6),
        ),
    ),
    Work(
        *("asyncio: 64 bytes, 1,000 in flight by gather", "round trips/s", 64, 1_000, 200_000),
        contenders=(*ASYNC_OURS, "messenger", "pyzmq best", "zmq.asyncio, gather", *ASYNC_PEERS),
        baseline="zmq.asyncio, gather",
        targets=(
            Target("AsyncMessenger, uvloop", ("zmq.asyncio, gather",), 5.0, 10.0),
            Target("AsyncMessenger, asyncio", ("zmq.asyncio, gather",), 5.0, 10.0),
            Target("AsyncMessenger, uvloop", ASYNC_PEERS, 1.0, 5.0),
        ),
    ),
    Work(
        *("64 bytes, one way", "messages/s", 64, 0, 300_000),
        contenders=(
            *("messenger, one way", "messenger basic, one way"),
            *("pyzmq PUSH/PULL", "pyzmq DEALER/ROUTER", "nats-py publish"),
        ),
        baseline="pyzmq PUSH/PULL",
        targets=(
            Target("messenger, one way", ("pyzmq DEALER/ROUTER",), 1.0, 1.5),
            Target("messenger, one way", ("pyzmq PUSH/PULL",), 1.0, 1.5),
        ),
    ),
    Work(
        *("1 MiB echo, 4 in flight", "GB/s", 2**20, 4, 1_000),
        contenders=("messenger", *PYZMQ, "pyzmq zero-copy"),
        baseline="pyzmq best",
        targets=(Target("messenger", PYZMQ, 1.0, 2.0),),
    ),
    *CURVE,
    Work(
        *("64 bytes, 1,000 in flight, inproc", "round trips/s", 64, 1_000, 100_000),
        contenders=("messenger, inproc", "messenger", "pyzmq idiomatic, inproc", "pyzmq best, inproc"),
        baseline="pyzmq best, inproc",
        targets=(
            Target("messenger, inproc", ("pyzmq best, inproc",), 2.0, 6.0),
            Target("messenger, inproc", ("pyzmq idiomatic, inproc",), 2.0, 6.0),
            Target("messenger, inproc", ("messenger",), 1.0, 1.0),
        ),
    ),
    Work(
        *("64 bytes, 1,000 in flight, many sessions on one listener", "round trips/s", 64, 1_000, 50_000),
        contenders=(
            *("messenger, 1,000 sessions × 1", "messenger, 10 sessions × 100"),
            *("pyzmq best, 1,000 × 1", "pyzmq best, 10 × 100"),
        ),
        baseline="messenger, 10 sessions × 100",
        targets=(Target("messenger, 1,000 sessions × 1", ("messenger, 10 sessions × 100",), 0.7, 1.0),),
    ),
    Work(
        *("memory of a message that waits for its response", "bytes", 64, 0, 1_000_000),
        contenders=("messenger, outstanding MSC", "asyncio.Future in a dict"),
        baseline="asyncio.Future in a dict",
        targets=(Target("messenger, outstanding MSC", (), 500, 300),),
    ),
    *MODELS,
    Work(
        *("replication: one row a transaction, 8 threads", "transactions/s", 64, 8, 10_000),
        contenders=DATABASES,
        baseline="apsw alone",
        targets=(
            Target("messenger applied", ("PostgreSQL remote_apply",), 1.0, 3.0),
            Target("messenger applied", ("apsw alone",), 0.6, 0.9),
        ),
    ),
    Work(
        *("replication: one row a transaction, one thread", "µs", 64, 1, 2_000),
        contenders=DATABASES,
        baseline="apsw alone",
        targets=(),
    ),
    Work(
        *("replication: latency that `applied` adds to a commit, in round trips of an echo", "echoes", 64, 1, 2_000),
        contenders=("messenger, added to a commit",),
        baseline="messenger, added to a commit",
        targets=(Target("messenger, added to a commit", (), 2.0, 1.0),),
    ),
    Work(
        *("replication: speed of the replica, beside 8 threads that commit locally", "of the primary's", 64, 8, 20_000),
        contenders=("messenger, replica keeps up", "PostgreSQL, standby keeps up"),
        baseline="messenger, replica keeps up",
        targets=(Target("messenger, replica keeps up", (), 0.95, 1.0),),
    ),
    Work(
        *("replication: p99 of reads at the replica, beside 8 threads that commit", "× idle", 64, 8, 1_000),
        contenders=(
            *("messenger, reads at the replica", "messenger, reads in a third process"),
            "PostgreSQL, reads at the standby",
        ),
        baseline="messenger, reads at the replica",
        targets=(
            Target("messenger, reads at the replica", (), 2.0, 1.0),
            Target("messenger, reads in a third process", (), 2.0, 1.0),
        ),
    ),
)
