"""What a primary and a replica say of themselves."""

from enum import StrEnum

import msgspec


class ReplicaState(StrEnum):
    """Of a replica, as its primary sees it, or as it sees itself."""

    CONNECTING = "connecting"  # Only as it sees itself: no primary answers.
    SNAPSHOT = "snapshot"
    CATCHING_UP = "catching up"
    STREAMING = "streaming"
    DOWN = "down"  # Only as the primary sees it.
    DIVERGED = "diverged"
    PROMOTED = "promoted"  # Only as it sees itself: it is a primary now.


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as its primary sees it.

    Attributes:
        name: The replica's.
        state: What it does now.
        sent_lsn, received_lsn, durable_lsn, applied_lsn: Up to which LSN transactions were sent to it, and it said to
            have them, to have them on its disk, to show them to readers. The last two hold for a replica that is gone.
        lag_transactions: Entries committed here and not known to be applied there.
        lag_s: For how long the oldest of these has been committed, in seconds; 0 if there is none.
        contact_s: Seconds since it last said anything; None if it has not since the primary started.
        snapshot_bytes, snapshot_bytes_total: Of the snapshot that it takes, done and in all; else 0.
        diverged: Why it takes nothing more, or empty.
    """

    name: str
    state: ReplicaState
    sent_lsn: int
    received_lsn: int
    durable_lsn: int
    applied_lsn: int
    lag_transactions: int
    lag_s: float
    contact_s: float | None
    snapshot_bytes: int
    snapshot_bytes_total: int
    diverged: str


class PrimaryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A primary and all replicas that it knows.

    Attributes:
        path, database: The file, and the random name that the database has at all replicas.
        role: `primary`, or `fenced` once another primary was promoted over it.
        term, lsn: Where its history ends.
        durable_lsn: Up to where that is on this disk.
        log_first_lsn, log_bytes: Where the log begins, and how large it is.
        transaction_count, group_count: Transactions committed since it started, and in how many groups, each of which
            is one entry if nothing in it failed.
        not_confirmed_count: Of these, not confirmed in time.
        foreign_write_count: Times that somebody else was found to have written to the file, which is not replicated.
        snapshot_count: Snapshots made since it started.
        malformed_count: Messages that could not be read, and were dropped.
        replicas: In the order of their names, gone ones included.
    """

    path: str
    database: str
    role: str
    term: int
    lsn: int
    durable_lsn: int
    log_first_lsn: int
    log_bytes: int
    transaction_count: int
    group_count: int
    not_confirmed_count: int
    foreign_write_count: int
    snapshot_count: int
    malformed_count: int
    replicas: tuple[ReplicaStatus, ...]


class ReplicaSelfStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica, as it sees itself.

    Attributes:
        path, database: The file, and the random name of the database; empty before the first snapshot.
        role: `replica`.
        state: What it does now.
        primary: The destination that it follows, or asks now.
        term, lsn: Where its history ends, readable here.
        durable_lsn: Up to where that is on this disk.
        primary_lsn: The newest LSN of the primary that it heard of.
        lag_transactions: How many of these are not applied here.
        lag_s: Seconds since this replica was last known to have all that the primary had; None if it never was.
        contact_s: Seconds since the primary was last heard; None if never.
        snapshot_bytes, snapshot_bytes_total: Of the snapshot that it takes, done and in all; else 0.
        transaction_count, group_count: Entries applied since it started, and in how many commits.
        snapshot_count: Snapshots installed since it started.
        malformed_count: Messages that could not be read, or did not fit, and were dropped.
        trouble: The last thing that went wrong and is being tried again, or empty.
        diverged: Why it takes nothing more, or empty.
        lost_path: Where transactions that no other has were saved, or empty.
    """

    path: str
    database: str
    role: str
    state: ReplicaState
    primary: str
    term: int
    lsn: int
    durable_lsn: int
    primary_lsn: int
    lag_transactions: int
    lag_s: float | None
    contact_s: float | None
    snapshot_bytes: int
    snapshot_bytes_total: int
    transaction_count: int
    group_count: int
    snapshot_count: int
    malformed_count: int
    trouble: str
    diverged: str
    lost_path: str
