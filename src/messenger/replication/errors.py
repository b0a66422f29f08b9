"""Every exception of replication. Errors of SQLite itself pass through as apsw raises them."""

from messenger import MessengerError


class ReplicationError(MessengerError):
    """Base of every error that replication raises on purpose."""


class NotConfirmed(ReplicationError):
    """The transaction is committed here, but too few replicas confirmed it in time. It may be there, or come there.

    Attributes:
        position: The transaction's (term, LSN). `Primary.wait_confirmed` waits for it again.
    """

    def __init__(self, text: str, position: tuple[int, int]) -> None:
        super().__init__(text)
        self.position = position


class Stale(ReplicationError):
    """The replica has not, in time, what was asked for, or may be further behind than its `max_lag`."""


class Diverged(ReplicationError):
    """The replica holds something else than the primary, and takes nothing more until it is resynced."""


class Fenced(ReplicationError):
    """Another primary was promoted over this one. Nothing was committed.

    Attributes:
        term: Of the other primary.
        destinations: Where it may be, as far as it said.
    """

    def __init__(self, text: str, term: int, destinations: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.term = term
        self.destinations = destinations


class StatementRefused(ReplicationError, ValueError):
    """The statement cannot be replicated. Nothing of it was done."""


class WriterBusy(ReplicationError):
    """Other transactions, or another check, took all the time. Nothing of this one was done."""


class DatabaseRefused(ReplicationError):
    """The file is in use, or is not what it would have to be. Nothing in it was changed."""


class DiskFailed(ReplicationError):
    """The disk did not confirm a write, so nothing more is promised; open the file anew once the disk is sound."""


class ReplicationClosed(ReplicationError):
    """The primary or replica is closed. Nothing was done."""
