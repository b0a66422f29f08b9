"""Replication: an SQLite database and its live replicas, inside the processes that use it (docs/replication.md)."""

from .compare import Comparison, Difference, verify
from .errors import (
    DatabaseRefused,
    DiskFailed,
    Diverged,
    Fenced,
    NotConfirmed,
    ReplicationClosed,
    ReplicationError,
    Stale,
    StatementRefused,
    WriterBusy,
)
from .limits import ReplicationLimits
from .primary import Primary
from .records import Position
from .remote import query_status, request_promotion
from .replica import Replica
from .rows import Rows
from .status import PrimaryStatus, ReplicaSelfStatus, ReplicaState, ReplicaStatus
from .transaction import Transaction

__all__ = [
    "Comparison",
    "DatabaseRefused",
    "Difference",
    "DiskFailed",
    "Diverged",
    "Fenced",
    "NotConfirmed",
    "Position",
    "Primary",
    "PrimaryStatus",
    "Replica",
    "ReplicaSelfStatus",
    "ReplicaState",
    "ReplicaStatus",
    "ReplicationClosed",
    "ReplicationError",
    "ReplicationLimits",
    "Rows",
    "Stale",
    "StatementRefused",
    "Transaction",
    "WriterBusy",
    "query_status",
    "request_promotion",
    "verify",
]
