"""`wire`: the format to the letter, and nothing but `MalformedMessage` on any other bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.errors import MalformedMessage
from messenger.wire import (
    ECHO,
    ID_MAX,
    NOOP,
    BuiltinCallback,
    decode_identity,
    decode_message,
    encode_identity,
    encode_message,
)

IDS = st.integers(0, ID_MAX)


@given(IDS, IDS, st.binary())
def test_a_message_is_what_the_expression_gives_and_comes_back(source: int, dest: int, contents: bytes) -> None:
    data = encode_message(source, dest, contents)
    assert data == f"{source}-{dest}-".encode() + contents
    assert decode_message(data) == (source, dest, contents)


@pytest.mark.parametrize("contents", [bytearray(b"a-b"), memoryview(b"a-b")])
def test_contents_are_any_bytes_like(contents: bytearray | memoryview) -> None:
    assert encode_message(1, 2, contents) == b"1-2-a-b"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"-", b"--", b"---", b"hello", b"5-1", b"7", b"-1-0-x", b" 1-0-x", b"1 -0-x", b"+5-0-x", b"1-+0-x", b"1-0",
        b"1-0 -x", b"1_0-0-x", b"0x1-0-x", b"1--x", b"\xd9\xa1-0-x", "\u0661-0-x".encode(), b"1.0-0-x", b"1\n-0-x",
        b"1-99999999999999999999-x", b"99999999999999999999-0-x", b"18446744073709551616-0-x",
        b"000000000000000000001-0-x", b"9" * 1_000_000 + b"-0-x", b"1-" + b"9" * 1_000_000 + b"-x",
    ],
)  # fmt: skip
def test_what_is_no_header_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_message(data)


@pytest.mark.parametrize(
    ("data", "decoded"),
    [
        (b"0-0-", (0, 0, b"")),
        (b"18446744073709551615-18446744073709551615---", (ID_MAX, ID_MAX, b"--")),
        (b"00-007-x", (0, 7, b"x")),
        (b"1-2-\0\0-\0", (1, 2, b"\0\0-\0")),
    ],
)
def test_the_edges_of_what_is_a_header(data: bytes, decoded: tuple[int, int, bytes]) -> None:
    assert decode_message(data) == decoded


@given(st.binary())
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        source, dest, contents = decode_message(data)
    except MalformedMessage:
        return
    assert 0 <= source <= ID_MAX
    assert 0 <= dest <= ID_MAX
    assert data.endswith(b"-" + contents)


@given(st.binary(min_size=1) | st.binary().map(lambda data: b"0x" + data.hex().encode()))
def test_every_routing_id_has_an_identity_that_leads_back_to_it(routing_id: bytes) -> None:
    assert encode_identity(decode_identity(routing_id)) == routing_id


@pytest.mark.parametrize(
    ("routing_id", "identity"),
    [
        (b"replica1", "replica1"),
        (b"\0\x80abc", "0x0080616263"),
        (b"0x41", "0x41"),
        (b"0xzz", "0xzz"),
        (b"0xff", "0x30786666"),
        (b"\xff", "0xff"),
    ],
)
def test_identities(routing_id: bytes, identity: str) -> None:
    assert decode_identity(routing_id) == identity
    assert encode_identity(identity) == routing_id


def test_the_built_ins() -> None:
    assert (int(NOOP), int(ECHO)) == (0, 1)
    assert list(BuiltinCallback) == [NOOP, ECHO]
