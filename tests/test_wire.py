"""`wire`: the format to the letter, and nothing but `MalformedMessage` on any other bytes."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.blocks import Control, ControlKind, Option, OptionKind
from messenger.errors import MalformedMessage
from messenger.wire import (
    ECHO,
    ID_MAX,
    MAGIC,
    NO_DEADLINE_MS,
    NOOP,
    VERSION,
    BuiltinCallback,
    Challenge,
    Flag,
    Header,
    Hello,
    Kind,
    Reason,
    decode_batch,
    decode_challenge,
    decode_controls,
    decode_data_frame,
    decode_goodbye,
    decode_header,
    decode_hello,
    decode_identity,
    decode_message,
    decode_refusal,
    decode_response,
    decode_short_id,
    encode_challenge,
    encode_controls,
    encode_data,
    encode_goodbye,
    encode_header,
    encode_hello,
    encode_identity,
    encode_left_ms,
    encode_message,
    encode_refusal,
    encode_response,
)
from tests.conftest import Data

IDS = st.integers(0, ID_MAX)


@given(IDS, IDS, st.binary())
def test_a_message_is_what_the_expression_gives_and_comes_back(source: int, dest: int, contents: bytes) -> None:
    data = encode_message(source, dest, contents)
    assert data == f"{source}-{dest}-".encode() + contents
    assert decode_message(data) == (source, dest, contents)


@given(st.binary(max_size=24) | st.builds(b"%d-%b".__mod__, st.tuples(IDS, st.binary(max_size=3))), st.integers(0, 3))
def test_a_short_id_is_read_as_any_other_is(data: bytes, start: int) -> None:
    """What is compiled reads ids of at most 18 digits so, and leaves all others to `decode_message`."""
    digits, dash, _ = data[start:].partition(b"-")
    is_short = dash and digits.isdigit() and len(digits) <= 18
    assert decode_short_id(data, start) == ((int(digits), start + len(digits) + 1) if is_short else (0, 0))


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


# Session frames.

NUMBERS = st.integers(0, 2**64 - 1)
SMALL_NUMBERS = st.integers(0, 2**32 - 1)
OPTIONS = st.builds(Option, NUMBERS, NUMBERS, st.text(max_size=5), st.text(max_size=5))
# Of each message its bytes, and the contents behind it if it is large.
BATCHES = st.lists(st.tuples(st.binary(max_size=9), st.none() | st.binary(max_size=9)), max_size=256)


def decode_frame(frame: bytes, extra: Sequence[bytes] = ()) -> tuple[object, ...]:
    """Decode a whole frame, whatever its kind, as a messenger does."""
    header = decode_header(frame)
    if header.kind == Kind.HELLO:
        return header, decode_hello(frame)
    if header.kind == Kind.CHALLENGE:
        return header, decode_challenge(frame)
    if header.kind == Kind.RESPONSE:
        return header, decode_response(frame)
    if header.kind == Kind.REFUSED:
        return header, decode_refusal(frame)
    if header.kind == Kind.DATA:
        decoded = decode_data_frame(frame)
        if decoded is None:
            raise MalformedMessage("it is too short")
        data = Data(*decoded[3])
        if header.flags & Flag.CONTROLS:
            return header, data, decode_controls(frame, data.msg_count)
        return header, data, decode_batch(frame, header.flags, data.msg_count, extra)
    if header.kind == Kind.GOODBYE:
        return header, decode_goodbye(frame)
    return (header,)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, SMALL_NUMBERS, NUMBERS, st.binary())
def test_hello_and_challenge_come_back(
    source: int, dest: int, first: int, second: int, window_msgs: int, window_bytes: int, identity: bytes
) -> None:
    hello = Hello(first, second, window_msgs, window_bytes, identity, dest)
    assert decode_frame(encode_hello(source, dest, hello)) == (Header(VERSION, Kind.HELLO, 0, source, dest), hello)
    challenge = Challenge(first, second, window_msgs, window_bytes, identity, dest)
    header = Header(VERSION, Kind.CHALLENGE, 0, source, dest)
    assert decode_frame(encode_challenge(source, dest, challenge)) == (header, challenge)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_response_unknown_and_goodbye_come_back(source: int, dest: int, echo: int) -> None:
    header = Header(VERSION, Kind.RESPONSE, 0, source, dest)
    assert decode_frame(encode_response(source, dest, echo)) == (header, echo)
    assert decode_frame(encode_header(Kind.UNKNOWN, source, dest)) == (Header(VERSION, Kind.UNKNOWN, 0, source, dest),)
    header = Header(VERSION, Kind.GOODBYE, 0, source, dest)
    assert decode_frame(encode_goodbye(source, dest, echo)) == (header, echo)


@given(NUMBERS, st.sampled_from(Reason), st.text(), NUMBERS)
def test_a_refusal_comes_back(dest: int, reason: Reason, text: str, source: int) -> None:
    header, decoded = decode_frame(encode_refusal(dest, reason, text, source))
    assert header == Header(VERSION, Kind.REFUSED, reason, source, dest)
    assert isinstance(decoded, str)
    assert text.startswith(decoded)  # It may be cut.
    assert len(decoded) >= min(len(text), 200)


def test_a_refusal_of_any_bytes_is_a_text_and_a_short_one() -> None:
    """It goes into the error text of every message that waits."""
    assert decode_refusal(encode_refusal(1, Reason.LIMIT, "") + b"\xff!") == "\ufffd!"
    assert len(decode_refusal(encode_refusal(1, Reason.LIMIT, "x" * 1_000_000))) <= 10_000


@given(
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    BATCHES,
    st.lists(OPTIONS, max_size=4),
    st.sampled_from([0, Flag.ASK, Flag.RESEND, Flag.ASK | Flag.RESEND]),
    st.booleans(),
)
def test_a_batch_comes_back(
    numbers: tuple[int, int, int],
    batch: list[tuple[bytes, bytes | None]],
    options: list[Option],
    flags: int,
    is_timed: bool,
) -> None:
    messages = [message for message, _ in batch]
    is_large = [contents is not None for _, contents in batch]
    extra = [contents for _, contents in batch if contents is not None]
    data = Data(*numbers, len(batch))
    left_ms = tuple(range(NO_DEADLINE_MS, NO_DEADLINE_MS - len(batch), -1)) if is_timed else ()
    frame = encode_data(1, 2, flags, data, messages, is_large if extra else (), options, left_ms)
    header, decoded, parts = decode_frame(frame, extra)
    flags |= (Flag.OPTIONS if options else 0) | (Flag.DEADLINES if left_ms else 0)
    assert header == Header(VERSION, Kind.DATA, flags, 1, 2)
    assert decoded == data
    large = {index: contents for index, (_, contents) in enumerate(batch) if contents is not None}
    assert parts == (messages, large, options, sum(map(len, messages + extra)), left_ms)
    assert decode_data_frame(frame) == (header.flags, 1, 2, data)


# Byte for byte. Who changes one of these changes the format, and from the first release on must raise VERSION.
GOLDEN: list[tuple[bytes, str]] = [
    (
        encode_hello(0x0102030405060708, 9, Hello(0xA, 0xB, 0xC, 0xD, b"me", 0xE)),
        "4d010100 0807060504030201 0900000000000000 0a00000000000000 0b00000000000000 0c000000 0d00000000000000"
        "0e00000000000000 6d65",
    ),
    (
        encode_challenge(1, 2, Challenge(0xA, 0xB, 0xC, 0xD, b"you", 0xE)),
        "4d010200 0100000000000000 0200000000000000 0a00000000000000 0b00000000000000 0c000000 0d00000000000000"
        "0e00000000000000 796f75",
    ),
    (encode_response(1, 2, 3), "4d010300 0100000000000000 0200000000000000 0300000000000000"),
    (
        encode_data(1, 2, Flag.ASK | Flag.RESEND, Data(3, 4, 5, 0), ()),
        "4d010403 0100000000000000 0200000000000000 0300000000000000 0400000000000000 0500000000000000 00000000",
    ),
    (
        encode_data(1, 2, 0, Data(3, 4, 5, 2), (b"0-0-", b"1-2-x"), (True, False)),
        "4d010400 0100000000000000 0200000000000000 0300000000000000 0400000000000000 0500000000000000 02000000"
        "04000080 05000000 302d302d 312d322d78",
    ),
    (
        encode_data(
            1, 2, 0, Data(3, 4, 5, 1), (b"0-7-",), (), (Option(0, OptionKind.HANDLER_ERROR, "E", "t"),)
        ),
        "4d010404 0100000000000000 0200000000000000 0300000000000000 0400000000000000 0500000000000000 01000000"
        "04000000 08000000 91 94 00 01 a145 a174 302d372d",
    ),
    (
        encode_data(1, 2, 0, Data(3, 4, 5, 1), (b"0-7-",), (), (Option(0, 4),), (258,)),
        "4d010414 0100000000000000 0200000000000000 0300000000000000 0400000000000000 0500000000000000 01000000"
        "04000000 02010000 06000000 91 94 00 04 a0 a0 302d372d",
    ),
    (
        encode_controls(1, 2, Flag.ASK, Data(3, 4, 5, 0), (Control(ControlKind.CANCEL, 1024),)),
        "4d010409 0100000000000000 0200000000000000 0300000000000000 0400000000000000 0500000000000000 00000000"
        "08000000 91 94 01 cd0400 00 00",
    ),
    (encode_header(Kind.UNKNOWN, 0, 2), "4d010500 0000000000000000 0200000000000000"),
    (encode_refusal(2, Reason.IDENTITY_IN_USE, "no"), "4d010602 0000000000000000 0200000000000000 6e6f"),
    (encode_refusal(2, Reason.LIMIT, "no", 1), "4d010603 0100000000000000 0200000000000000 6e6f"),
    (encode_goodbye(1, 2, 3), "4d010700 0100000000000000 0200000000000000 0300000000000000"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "golden"), GOLDEN, ids=[Kind(frame[2]).name for frame, _ in GOLDEN])
def test_each_frame_to_the_byte(frame: bytes, golden: str) -> None:
    assert frame.hex() == golden.replace(" ", "")


def test_the_numbers_that_stand_on_the_wire() -> None:
    assert {kind.name: int(kind) for kind in Kind} == {
        "HELLO": 1, "CHALLENGE": 2, "RESPONSE": 3, "DATA": 4, "UNKNOWN": 5, "REFUSED": 6, "GOODBYE": 7
    }  # fmt: skip
    flags = {name: value for name, value in vars(Flag).items() if name.isupper()}
    assert flags == {"ASK": 1, "RESEND": 2, "OPTIONS": 4, "CONTROLS": 8, "DEADLINES": 16}
    # Plain integers, since each operation on an enumeration of flags is slow.
    assert {type(flag) for flag in flags.values()} == {int}
    assert {reason.name: int(reason) for reason in Reason} == {
        "VERSION": 1, "IDENTITY_IN_USE": 2, "LIMIT": 3, "KEY": 4
    }  # fmt: skip
    assert {kind.name: int(kind) for kind in OptionKind} == {
        "HANDLER_ERROR": 1, "NO_HANDLER": 2, "REDELIVERED": 3, "MORE": 4, "STREAM": 5, "TOO_LARGE": 6
    }  # fmt: skip
    assert {kind.name: int(kind) for kind in ControlKind} == {"CANCEL": 1, "CREDIT": 2}
    assert (MAGIC, VERSION) == (0x4D, 1)


# What may be cut off at the end of a frame without anybody being able to tell: an identity or a text, which end it.
OPEN_ENDED_BYTES = {Kind.HELLO: 2, Kind.CHALLENGE: 3, Kind.REFUSED: 2}


@pytest.mark.parametrize("frame", [frame for frame, _ in GOLDEN], ids=[Kind(frame[2]).name for frame, _ in GOLDEN])
def test_every_truncation_of_every_kind_is_malformed(frame: bytes) -> None:
    extra = [b"contents"] if b"\x04\0\0\x80" in frame else []
    assert decode_frame(frame, extra)
    for length in range(len(frame) - OPEN_ENDED_BYTES.get(Kind(frame[2]), 0)):
        with pytest.raises(MalformedMessage):
            decode_frame(frame[:length], extra)


def test_a_batch_longer_than_its_sizes_is_malformed() -> None:
    for frame, _ in GOLDEN:
        if frame[2] == Kind.DATA:
            with pytest.raises(MalformedMessage):
                decode_frame(frame + b"\0", [b"contents"] if b"\x04\0\0\x80" in frame else [])


@pytest.mark.parametrize("extra", [[], [b"one", b"too many"]])
def test_large_messages_and_the_frames_behind_must_be_as_many(extra: list[bytes]) -> None:
    frame = encode_data(1, 2, 0, Data(1, 0, 0, 1), (b"0-0-",), (True,))
    with pytest.raises(MalformedMessage):
        decode_frame(frame, extra)


@pytest.mark.parametrize("count", [257, 2**31, 2**32 - 1])
def test_a_batch_of_absurdly_many_messages_is_malformed(count: int) -> None:
    frame = encode_data(1, 2, 0, Data(1, 0, 0, count), ())
    with pytest.raises(MalformedMessage):
        decode_frame(frame + b"\0" * 5_000)


def with_options(block: bytes) -> bytes:
    """Return a DATA frame of one message, with these bytes as its options."""
    head = encode_data(1, 2, Flag.OPTIONS, Data(1, 0, 0, 1), (b"0-0-",))
    return head[:-4] + len(block).to_bytes(4, "little") + block + b"0-0-"


def test_options_of_a_newer_sender_are_taken_as_far_as_they_are_understood() -> None:
    *_, parts = decode_frame(with_options(b"\x91\x95\0\x03\xa0\xa0\x07"))
    assert parts == ([b"0-0-"], {}, [Option(0, OptionKind.REDELIVERED)], 4, ())


@pytest.mark.parametrize("position", [0, 1, 2])
def test_only_a_data_frame_of_our_version_is_one(position: int) -> None:
    frame = bytearray(encode_data(1, 2, 0, Data(1, 0, 0, 1), [b"0-0-x"]))
    assert decode_data_frame(bytes(frame[:47])) is None
    frame[position] += 1
    assert decode_data_frame(bytes(frame)) is None


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x91\xa1x", id="no option"),
        pytest.param(b"\x91\x91\0", id="a field is missing"),
        pytest.param(b"\x91\x93\0\x01\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\x91\x92\0\xcb" + b"\0" * 8, id="a float"),
        pytest.param(b"\xdd\xff\xff\xff\xff\x92\0\0", id="a list that ends early"),
        pytest.param(b"\x91\x95\0\x01\xa0\xa0" + b"\x91" * 100_000 + b"\xc0", id="lists in lists"),
        pytest.param(b"\x91\x95\0\x01\xa0\xa0" + b"\x81\xc0" * 100_000 + b"\xc0", id="maps in maps"),
        pytest.param(b"\xdd\0\x01\0\0" + b"\x92\0\x01" * 2**16, id="more options than a batch has messages"),
    ],
)
def test_options_that_are_none_are_malformed(block: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_frame(with_options(block))


def with_controls(block: bytes) -> bytes:
    """Return a DATA frame with these bytes as its controls."""
    return encode_data(1, 2, Flag.CONTROLS, Data(1, 0, 0, 0), ()) + len(block).to_bytes(4, "little") + block


def test_controls_of_a_newer_sender_are_taken_as_far_as_they_are_understood() -> None:
    *_, controls = decode_frame(with_controls(b"\x92\x95\x01\x05\0\0\xa1x\x92\x7f\x06"))
    assert controls == [Control(ControlKind.CANCEL, 5), Control(127, 6)]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(with_controls(b""), id="nothing"),
        pytest.param(with_controls(b"\x91\x91\x01"), id="a field is missing"),
        pytest.param(with_controls(b"\x91\x92\x01\xa1\xff"), id="text"),
        pytest.param(with_controls(b"\x91\x94\x02\x05\x01\xc0"), id="nothing in place of a number"),
        pytest.param(with_controls(b"\x90") + b"x", id="something behind them"),
        pytest.param(with_controls(b"\xdc\x01\x01" + b"\x92\x01\x05" * 257), id="more than fit a frame"),
        pytest.param(encode_data(1, 2, Flag.CONTROLS, Data(1, 0, 0, 1), (b"0-0-",)), id="beside messages"),
    ],
)
def test_controls_that_are_none_are_malformed(frame: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_frame(frame)


def test_deadlines_that_exceed_their_frame_are_malformed() -> None:
    frame = encode_data(1, 2, Flag.DEADLINES, Data(1, 0, 0, 2), ())
    with pytest.raises(MalformedMessage, match="deadlines"):
        decode_frame(frame + b"\0" * 15)


@given(st.floats(-1e9, 1e12))
def test_what_a_message_has_left_is_never_less_than_it_has(left_s: float) -> None:
    left_ms = encode_left_ms(left_s)
    assert 0 <= left_ms <= NO_DEADLINE_MS
    assert left_ms == NO_DEADLINE_MS or max(0.0, left_s) <= left_ms / 1000 <= max(0.0, left_s) + 0.001 + 1e-9
    assert left_ms < NO_DEADLINE_MS or left_s > 4e6


def is_decoded(frame: bytes, extra: Sequence[bytes] = ()) -> bool:
    try:
        decode_frame(frame, extra)
    except MalformedMessage:
        return False
    return True


@given(st.binary(max_size=100))
def test_any_bytes_are_a_frame_or_malformed(data: bytes) -> None:
    is_decoded(data)
    for kind in Kind:
        assert is_decoded(encode_header(kind, 1, 2) + data) or len(data) < 36 or kind == Kind.DATA


@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 255), st.lists(st.binary(max_size=3), max_size=3))
def test_any_bytes_behind_the_numbers_of_a_batch_are_a_batch_or_malformed(
    body: bytes, count: int, flags: int, extra: list[bytes]
) -> None:
    is_decoded(encode_data(1, 2, flags, Data(1, 0, 0, count), ()) + body, extra)


@given(st.binary(max_size=60))
def test_any_bytes_as_controls_are_controls_or_malformed(block: bytes) -> None:
    is_decoded(with_controls(block))


@given(st.binary(max_size=60))
def test_any_bytes_as_options_are_options_or_malformed(block: bytes) -> None:
    is_decoded(with_options(block))


@given(st.sampled_from([frame for frame, _ in GOLDEN]), st.integers(0, 200), st.integers(0, 255))
def test_any_changed_byte_gives_a_frame_or_malformed(frame: bytes, position: int, value: int) -> None:
    position %= len(frame)
    changed = frame[:position] + bytes((value,)) + frame[position + 1 :]
    is_decoded(changed)
    is_decoded(changed, [b"contents"])
