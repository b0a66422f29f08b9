"""What is logged and what is sent: positions, entries, and the messages between a primary and its replicas.

Everything is MessagePack of typed structures, validated when it is decoded. An **entry** is one transaction: its parts
in order, changesets and SQL of the schema. Entries form a chain: the checksum of each covers the one before it, so an
equal (term, LSN, checksum) means an equal history up to there.

What must never happen here: bytes of a peer that raise anything but `MalformedRecord`.
"""

from enum import IntEnum
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple, TypeVar

import msgspec

PROTOCOL_VERSION = 1
CHECKSUM_BYTES = 16
# The checksum before the first entry.
NO_CHECKSUM = bytes(CHECKSUM_BYTES)
_LINK = Struct(">QQQ")
T = TypeVar("T")
# A name and a value, as a rule a number; but a user may write nearly anything there.
SequenceRow = tuple[str | int | float | None, str | int | float | None]


class MalformedRecord(ValueError):
    """Bytes that are no record."""


class Position(NamedTuple):
    """A place in the history of a database: a leadership number and a log sequence number."""

    term: int
    lsn: int

    def __str__(self) -> str:
        return f"({self.term}, {self.lsn})"


class PartKind(IntEnum):
    """What a part of a transaction is."""

    CHANGES = 0  # A changeset of SQLite's session extension.
    SQL = 1  # A statement that changes the schema.
    SQL_FOREIGN_KEYS = 2  # The same, run with foreign keys enforced.
    SEQUENCES = 3  # All rows of `sqlite_sequence`, the counters of AUTOINCREMENT.
    CHECK = 4  # The content is to be compared here.


class Part(msgspec.Struct, array_like=True, frozen=True):
    """A part of a transaction."""

    kind: PartKind
    data: bytes


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One transaction in the log.

    Attributes:
        lsn, term: Its position.
        at_us: When it was committed: microseconds since 1970, by the primary's clock.
        checksum: Of this entry and, through the one before it, of all before.
        body: Its parts, encoded.
    """

    lsn: int
    term: int
    at_us: int
    checksum: bytes
    body: bytes


class Head(NamedTuple):
    """The end of a history: all that must be known to continue it."""

    term: int
    lsn: int
    checksum: bytes

    @property
    def position(self) -> Position:
        """The (term, LSN)."""
        return Position(self.term, self.lsn)


def follow(head: Head, term: int, at_us: int, body: bytes) -> Entry:
    """Return the entry that follows a head."""
    return Entry(head.lsn + 1, term, at_us, _checksum(head, term, at_us, body), body)


def does_follow(head: Head, entry: Entry) -> bool:
    """Return whether an entry continues the history that ends here."""
    return (
        entry.lsn == head.lsn + 1
        and entry.term >= head.term
        and entry.checksum == _checksum(head, entry.term, entry.at_us, entry.body)
    )


def _checksum(head: Head, term: int, at_us: int, body: bytes) -> bytes:
    digest = blake2b(head.checksum, digest_size=CHECKSUM_BYTES)
    digest.update(_LINK.pack(head.lsn + 1, term, at_us))
    digest.update(body)
    return digest.digest()


# Messages. All are tagged arrays; `stream` is the random number of the replica's last Join, so that what belongs to an
# earlier life or attempt of it is known and dropped.


class Knock(msgspec.Struct, array_like=True, frozen=True, tag="knock"):
    """Replica: are you a primary? Answered with Hello or NotPrimary."""

    stream: int


class Hello(msgspec.Struct, array_like=True, frozen=True, tag="hello"):
    """Primary: I am, you may join."""

    stream: int


class Join(msgspec.Struct, array_like=True, frozen=True, tag="join"):
    """Replica: send me what follows this position. An empty `database` means that there is none yet.

    `copy` is the id of the replica's file, whatever its name; one of an earlier version sends none.
    """

    stream: int
    version: int
    name: str
    database: str
    term: int
    lsn: int
    checksum: bytes
    copy: str = ""


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag="welcome"):
    """Primary: what comes next. `mode` is log, snapshot, diverged, rewind (to `lsn`) or refused (`reason`)."""

    stream: int
    mode: str
    database: str
    term: int
    lsn: int
    checksum: bytes
    reason: str = ""


class NotPrimary(msgspec.Struct, array_like=True, frozen=True, tag="not-primary"):
    """Not a primary, or no longer: the highest term known here, and where to ask."""

    stream: int
    term: int
    destinations: tuple[str, ...]


class Entries(msgspec.Struct, array_like=True, frozen=True, tag="entries"):
    """Primary: transactions in order. `must_answer`: say at once that they were received."""

    stream: int
    entries: list[Entry]
    must_answer: bool = False


class Beat(msgspec.Struct, array_like=True, frozen=True, tag="beat"):
    """Primary: my end is at this LSN; `echo_s` is the clock reading of the replica's last answer."""

    stream: int
    term: int
    lsn: int
    echo_s: float


class Ack(msgspec.Struct, array_like=True, frozen=True, tag="ack"):
    """Replica: received, on disk, and readable up to these LSNs; `at_s` is my own clock."""

    stream: int
    received: int
    durable: int
    applied: int
    at_s: float


class SnapshotBegin(msgspec.Struct, array_like=True, frozen=True, tag="snapshot"):
    """Primary: a copy of the whole file follows."""

    stream: int
    bytes_total: int


class SnapshotPart(msgspec.Struct, array_like=True, frozen=True, tag="part"):
    """Primary: bytes of the copy, in order."""

    stream: int
    offset: int
    data: bytes


class SnapshotEnd(msgspec.Struct, array_like=True, frozen=True, tag="snapshot-end"):
    """Primary: the copy is complete, this is its checksum, and its history ends at this LSN."""

    stream: int
    checksum: bytes
    lsn: int


class SnapshotAck(msgspec.Struct, array_like=True, frozen=True, tag="snapshot-ack"):
    """Replica: so many bytes of the copy are written."""

    stream: int
    bytes_done: int


class DivergedReport(msgspec.Struct, array_like=True, frozen=True, tag="diverged"):
    """Replica: I differ from you, and take nothing more."""

    stream: int
    lsn: int
    table: str
    key: str
    reason: str


class CheckSums(msgspec.Struct, array_like=True, frozen=True, tag="sums"):
    """Replica: what I held at the check of this LSN: sums of the buckets of each table."""

    stream: int
    lsn: int
    sums: dict[str, dict[int, bytes]]


class AskBucket(msgspec.Struct, array_like=True, frozen=True, tag="ask-bucket"):
    """Primary: which rows were in this bucket?"""

    stream: int
    lsn: int
    table: str
    bucket: int


class BucketRows(msgspec.Struct, array_like=True, frozen=True, tag="bucket"):
    """Replica: these, by their keys, with their checksums."""

    stream: int
    lsn: int
    table: str
    bucket: int
    rows: dict[str, bytes]


class CheckEnd(msgspec.Struct, array_like=True, frozen=True, tag="check-end"):
    """Primary: the check of this LSN is over; with a reason, you have diverged."""

    stream: int
    lsn: int
    table: str = ""
    key: str = ""
    reason: str = ""


class Claim(msgspec.Struct, array_like=True, frozen=True, tag="claim"):
    """Primary, to who may think to be one: I lead this database, under this term, which began with this checksum."""

    database: str
    term: int
    checksum: bytes
    destinations: tuple[str, ...]


class StatusQuery(msgspec.Struct, array_like=True, frozen=True, tag="status"):
    """Anybody: what is your status? Answered with JSON."""


class PromoteQuery(msgspec.Struct, array_like=True, frozen=True, tag="promote"):
    """Anybody: become the primary. Answered with JSON."""


FromReplica = (
    Knock | Join | Ack | SnapshotAck | DivergedReport | CheckSums | BucketRows | Claim | StatusQuery | PromoteQuery
)
FromPrimary = (
    Hello | Welcome | NotPrimary | Entries | Beat | SnapshotBegin | SnapshotPart | SnapshotEnd | AskBucket | CheckEnd
)

_encoder = msgspec.msgpack.Encoder()
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)
_from_primary: msgspec.msgpack.Decoder[FromPrimary] = msgspec.msgpack.Decoder(FromPrimary)
_parts = msgspec.msgpack.Decoder(list[Part])
_sequences = msgspec.msgpack.Decoder(list[SequenceRow])

# What precedes the length of the only part.
_ONE_CHANGESET = _encoder.encode([Part(PartKind.CHANGES, b"")])[:3]


def encode(record: FromReplica | FromPrimary | list[Part] | list[SequenceRow]) -> bytes:
    """Return a record as bytes."""
    return _encoder.encode(record)


def decode_from_replica(data: bytes) -> FromReplica:
    """Return what a replica, or somebody who asks, sent. Raises `MalformedRecord`."""
    return _decode(_from_replica, data)


def decode_from_primary(data: bytes) -> FromPrimary:
    """Return what a primary sent. Raises `MalformedRecord`."""
    return _decode(_from_primary, data)


def decode_parts(data: bytes) -> list[Part]:
    """Return the parts of an entry. Raises `MalformedRecord`."""
    return _decode(_parts, data)


def is_one_changeset(data: bytes) -> bool:
    """Return whether encoded parts are one that holds changes, and nothing else."""
    return data.startswith(_ONE_CHANGESET)


def decode_sequences(data: bytes) -> list[SequenceRow]:
    """Return the rows of `sqlite_sequence`. Raises `MalformedRecord`."""
    return _decode(_sequences, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:
        # msgspec's own errors are ValueErrors; text that is not UTF-8 raises a UnicodeDecodeError at some places.
        raise MalformedRecord(str(error)) from error
