"""Every limit of replication, with its unit and its reason."""

import msgspec

KIB = 1024
MIB = 1024 * KIB


class ReplicationLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one primary or replica. All are at least 1.

    A transaction is an entry of the log here and below: single statements that were committed together count once.

    Attributes:
        log_transactions_max: Transactions that the log keeps. A replica that fell further behind takes a snapshot.
        log_bytes_max: The same in bytes of changes; the newest transaction is always kept.
        in_flight_transactions_max: Transactions sent to one replica that it has not applied. Bounds its memory; what
            is beyond waits in the log.
        in_flight_bytes_max: The same in bytes; at least one transaction.
        transaction_bytes_max: Changes of one transaction. They travel as one message, so at most what the messenger's
            `message_bytes_max` leaves.
        replicas_max: Replicas that a primary knows, gone ones included. Each that is there has a thread.
    """

    log_transactions_max: int = 100_000
    log_bytes_max: int = 64 * MIB
    in_flight_transactions_max: int = 4_096
    in_flight_bytes_max: int = 16 * MIB
    transaction_bytes_max: int = 32 * MIB
    replicas_max: int = 64

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"limits.{field} is {value!r}, it must be an integer of at least 1")


# A primary asks each replica so often whether it is there; a replica that hears nothing for the second time joins anew,
# and a replica that says nothing for it counts as down. A machine that is busy for a second loses nobody.
BEAT_S = 0.2
CONTACT_S_MAX = 3.0
# Seconds for an answer that comes when the replica is done, however long that takes; one that is gone is told earlier.
ANSWER_S = 86_400.0
# A replica asks the next destination if nobody answered its last question for so long.
JOIN_S = 1.0
# A primary tells other places so often that it leads, and waits so long for an answer.
CLAIM_S = 1.0
# Destinations that a replica asks in turn, those included that it was told of.
DESTINATIONS_MAX = 16
# The lag in seconds is known to within the first, back to as many samples.
COMMIT_SAMPLE_S = 0.05
COMMIT_SAMPLES = 20_000
# A replica keeps the moment of a check so long for questions of its primary; its WAL grows meanwhile.
CHECK_PINNED_S = 30.0
# Transactions that wait together are written together, at most so many: the first must not wait long for the last.
GROUP_MAX = 64
# What a message has besides the changes of one transaction, at most.
MESSAGE_ROOM_BYTES = 1 * KIB
# And for each further transaction in it.
ENTRY_ROOM_BYTES = 64
# One message to a replica that catches up holds at most about so much, and so many transactions.
CATCH_UP_BYTES = 256 * KIB
CATCH_UP_TRANSACTIONS = 512
# A replica applies together what is there, up to so much: readers see it all at once, and the answer waits for it.
APPLY_TRANSACTIONS = 1_024
APPLY_BYTES = 4 * MIB
# So few bytes of changes are applied by the thread that receives them, if the last took less than so many seconds, as
# other callbacks wait meanwhile. To hand them to another thread was a tenth of a commit's time.
APPLY_HERE_BYTES = 16 * KIB
APPLY_HERE_S = 0.001
# So many messages of entries are under way to a replica that streams; what comes meanwhile waits for the next one.
STREAM_MSGS = 4
# The log is trimmed when it is so many transactions longer than it may be, so that not every commit pays for it.
TRIM_TRANSACTIONS = 256
# A snapshot travels in parts, at most so many bytes of it unanswered; it is copied in steps of pages.
SNAPSHOT_PART_BYTES = 256 * KIB
SNAPSHOT_IN_FLIGHT_BYTES = 4 * MIB
SNAPSHOT_STEP_PAGES = 256
# What was copied reaches the disk in pieces, because a commit's fsync can have to wait for what is not written yet.
SNAPSHOT_SYNC_BYTES = 4 * MIB
# A Ctrl-C waits at most so many seconds while the main thread waits for other transactions.
INTERRUPTED_S = 0.05
# Milliseconds that SQLite waits for another process's lock on the file.
BUSY_MS = 5_000
# Transactions of an `AsyncPrimary` that are open or wait, each with a thread; and as many other calls.
ASYNC_TRANSACTIONS_MAX = 32
# A thread that reads is interrupted when the file is closed, and has so many seconds to notice.
CLOSE_READER_S = 1.0
