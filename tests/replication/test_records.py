"""What is logged and sent: bytes that are no record are refused, and a history has one continuation."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from messenger.replication.records import (
    NO_CHECKSUM,
    Ack,
    Beat,
    Entries,
    Head,
    MalformedRecord,
    Part,
    PartKind,
    Position,
    decode_from_primary,
    decode_from_replica,
    decode_parts,
    decode_sequences,
    does_follow,
    encode,
    follow,
)

DECODERS = (decode_from_replica, decode_from_primary, decode_parts, decode_sequences)
START = Head(1, 0, NO_CHECKSUM)
HEADS = st.builds(Head, st.integers(1, 2**32), st.integers(0, 2**62), st.binary(min_size=16, max_size=16))


@pytest.mark.parametrize("decode", DECODERS)
@given(st.binary(max_size=200))
@example(b"\x91\xa3\x00\x00\x80")
@example(b"\x92\xa5claim\xa1\xff")
def test_any_bytes_are_a_record_or_refused(decode: Callable[[bytes], object], data: bytes) -> None:
    try:
        decode(data)
    except MalformedRecord:
        return


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "data", [b"\x81" * 10_000, b"\x91" * 10_000, b"\x91\xa1\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_bombs_are_refused(decode: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(MalformedRecord):
        decode(data)


@given(st.lists(st.tuples(st.sampled_from(PartKind), st.binary(max_size=20))))
def test_records_come_back(items: list[tuple[PartKind, bytes]]) -> None:
    parts = [Part(kind, data) for kind, data in items]
    assert decode_parts(encode(parts)) == parts
    entry = follow(START, 3, 4, encode(parts))
    assert decode_from_primary(encode(Entries(5, [entry], True))) == Entries(5, [entry], True)
    assert decode_from_replica(encode(Ack(1, 2, 3, 4, 0.5))) == Ack(1, 2, 3, 4, 0.5)
    with pytest.raises(MalformedRecord):
        decode_from_replica(encode(Beat(1, 2, 3, 0.5)))  # Only a primary says that.


@given(HEADS, st.integers(0, 5), st.integers(0, 2**50), st.binary(max_size=50))
def test_an_entry_follows_one_place_only(head: Head, more: int, at_us: int, body: bytes) -> None:
    entry = follow(head, head.term + more, at_us, body)
    assert does_follow(head, entry)
    for changed in (
        msgspec.structs.replace(entry, lsn=entry.lsn + 1),
        msgspec.structs.replace(entry, term=entry.term + 1),
        msgspec.structs.replace(entry, at_us=at_us + 1),
        msgspec.structs.replace(entry, body=body + b"x"),
    ):
        assert not does_follow(head, changed)
    assert not does_follow(head._replace(lsn=head.lsn + 1), entry)
    assert not does_follow(head._replace(checksum=bytes(reversed(head.checksum + b"x"))), entry)
    assert not does_follow(head._replace(term=entry.term + 1), entry)


def test_positions_are_ordered_and_shown() -> None:
    assert Position(2, 1) > Position(1, 9)
    assert str(Position(1, 9)) == "(1, 9)"
    assert START.position == (1, 0)
