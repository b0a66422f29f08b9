"""Bytes to messages, and to the frames of sessions, and back: pure functions, nothing else.

A message is, byte for byte, what `b"%d-%d-%b" % (source_callback_id, dest_callback_id, contents)` gives. The contents
may hold anything, dashes included, so only the first two dashes separate. Nothing here may raise anything but
`MalformedMessage` on any bytes whatever, or take time that grows with the digits of an id.

A session frame is a fixed header and a body that depends on its kind; a DATA frame holds a batch of messages in this
very format, back to back, their sizes in front of them.

Source: docs/protocol.md, "Messages" and "Session dialect".
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from types import FunctionType
from typing import Final, NamedTuple

from .blocks import CONTROLS, COUNT_MAX, OPTIONS, Control, Option, decode_block, encode_block
from .compiled import i64
from .errors import MalformedMessage
from .limits import REFUSAL_BYTES_MAX

# What contents may be; all of these are bytes-like.
Buffer = bytes | bytearray | memoryview

ID_MAX: Final = 2**64 - 1
# Ids from 64 can be registered by users; below are built-ins, above are message-specific callbacks.
REGISTERED_ID_MIN: Final = 64
REGISTERED_ID_MAX: Final = 1023
MSC_ID_MIN: Final = 1024
_DIGITS_MAX: Final = 20  # of 2**64 - 1
# An id of so many digits is a small integer everywhere.
_SHORT_DIGITS_MAX: Final = 18
_DASH: Final = 45
_ZERO: Final = 48
_NINE: Final = 57


class BuiltinCallback(IntEnum):
    """Destination ids that every messenger understands without registering anything."""

    NOOP = 0  # Run nothing: the start of a conversation.
    ECHO = 1  # Answer with the same contents.


NOOP: Final = BuiltinCallback.NOOP
ECHO: Final = BuiltinCallback.ECHO


def encode_message(source_callback_id: int, dest_callback_id: int, contents: Buffer) -> bytes:
    """Return the message as it stands on the wire."""
    return b"%d-%d-%b" % (source_callback_id, dest_callback_id, contents)  # type: ignore[str-format]


def decode_message(data: bytes) -> tuple[int, int, bytes]:
    """Return (source_callback_id, dest_callback_id, contents).

    Raises:
        MalformedMessage: A field is missing, is not ASCII digits, has more than 20 digits, or is above 2**64 - 1.
    """
    if _IS_COMPILED:
        # Of names of their own, since these are no longer than 64 bits.
        short_source_id, start = decode_short_id(data, 0)
        if start:
            short_dest_id, start = decode_short_id(data, start)
            if start:
                return short_source_id, short_dest_id, data[start:]
    parts = data.split(b"-", 2)
    if len(parts) != 3:
        raise MalformedMessage("the header is not source_callback_id-dest_callback_id-")
    first, second, contents = parts
    # The lengths come first: int() takes time quadratic in the digits.
    if len(first) > _DIGITS_MAX or len(second) > _DIGITS_MAX or not (first.isdigit() and second.isdigit()):
        raise MalformedMessage(f"a callback id is not 1 to {_DIGITS_MAX} ASCII digits")
    source_callback_id = int(first)
    dest_callback_id = int(second)
    if source_callback_id > ID_MAX or dest_callback_id > ID_MAX:
        raise MalformedMessage(f"a callback id is above {ID_MAX}")
    return source_callback_id, dest_callback_id, contents


def decode_short_id(data: bytes, start: i64) -> tuple[i64, i64]:
    """Return the id that begins at `start`, and where what follows its dash begins: 0 if that is no short id."""
    position = start
    end: i64 = min(len(data), start + _SHORT_DIGITS_MAX + 1)
    value: i64 = 0
    while position < end:
        character: i64 = data[position]
        position += 1
        if _ZERO <= character <= _NINE:
            value = 10 * value + character - _ZERO
        elif character == _DASH and position > start + 1:
            return value, position
        else:
            break
    return 0, 0


# Digit by digit is the fastest way in C, and the slowest in the interpreter.
_IS_COMPILED: Final = not isinstance(decode_short_id, FunctionType)


def encode_identity(identity: str) -> bytes:
    """Return the routing id of a peer from its identity; the inverse of `decode_identity`."""
    if identity.startswith("0x"):
        try:
            routing_id = bytes.fromhex(identity[2:])
        except ValueError:
            return identity.encode()
        if decode_identity(routing_id) == identity:
            return routing_id
    return identity.encode()


def decode_identity(routing_id: bytes) -> str:
    """Return a peer's identity from its routing id: its UTF-8 text, or `0x` and hex if it is none.

    Text that reads like the hex of another routing id is shown as hex too, so that each routing id has a name of its
    own.
    """
    try:
        identity = routing_id.decode()
    except UnicodeDecodeError:
        return "0x" + routing_id.hex()
    # Each turn of this recursion halves the length.
    if identity.startswith("0x") and encode_identity(identity) != routing_id:
        return "0x" + routing_id.hex()
    return identity


# Session frames. All integers are little-endian.

MAGIC: Final = 0x4D
VERSION: Final = 1
_HEADER = struct.Struct("<BBBBQQ")
# Of HELLO and CHALLENGE what stands in front of the identity; of RESPONSE and GOODBYE the whole body.
_INTRODUCTION = struct.Struct("<QQIQQ")
_NUMBER = struct.Struct("<Q")
# The header and the numbers at once, for the frames that are many.
_DATA_FRAME = struct.Struct("<BBBBQQQQQI")
DATA_HEADER_BYTES: Final = _DATA_FRAME.size
# In a message's size: its contents follow as a frame of their own.
_LARGE: Final = 1 << 31
_SIZE = struct.Struct("<I")
_SIZES = [struct.Struct(f"<{count}I") for count in range(COUNT_MAX + 1)]


class Kind(IntEnum):
    """What a session frame is for."""

    HELLO = 1
    CHALLENGE = 2
    RESPONSE = 3
    DATA = 4
    UNKNOWN = 5
    REFUSED = 6
    GOODBYE = 7


_DATA_KIND: Final = int(Kind.DATA)
_DATA_START: Final = bytes((MAGIC, VERSION, _DATA_KIND))


class Flag:
    """What a DATA frame asks for, or has. Plain integers: each test of an enumeration costs 2 microseconds."""

    ASK: Final = 1  # Answer with your acknowledgements now.
    RESEND: Final = 2  # Something is missing behind `received_through`; send from there again.
    OPTIONS: Final = 4  # A block of options stands in front of the messages.
    CONTROLS: Final = 8  # A block of controls stands in place of messages.
    DEADLINES: Final = 16  # The time that each message has left follows the sizes.


_BLOCKS: Final = Flag.OPTIONS | Flag.DEADLINES


class Reason(IntEnum):
    """Why a session is refused."""

    VERSION = 1
    IDENTITY_IN_USE = 2
    LIMIT = 3
    KEY = 4


# In place of the milliseconds that a message has left.
NO_DEADLINE_MS: Final = 2**32 - 1


class Header(NamedTuple):
    """What every session frame starts with."""

    version: int
    kind: int
    flags: int
    source_incarnation: int
    dest_incarnation: int


# A size that nothing exceeds.
ANY_SIZE: Final = 2**64 - 1


class Hello(NamedTuple):
    """HELLO: who wants a session."""

    nonce: int
    process: int
    window_msgs: int
    window_bytes: int
    identity: bytes
    message_bytes_max: int = ANY_SIZE


class Challenge(NamedTuple):
    """CHALLENGE: the other side, alive (it echoes the nonce of a HELLO), asks the same of us."""

    echo: int
    nonce: int
    window_msgs: int
    window_bytes: int
    identity: bytes
    message_bytes_max: int = ANY_SIZE


# Of a DATA frame: first, received_through, processed_through, msg_count. That is acknowledgements, and a batch which
# starts with message number `first`. Each frame has these, and a tuple without names costs less to make.
Numbers = tuple[int, int, int, int]


def encode_header(kind: int, source_incarnation: int, dest_incarnation: int, flags: int = 0) -> bytes:
    """Return a whole UNKNOWN frame, or the start of any other."""
    return _HEADER.pack(MAGIC, VERSION, kind, flags, source_incarnation, dest_incarnation)


def decode_header(frame: bytes) -> Header:
    """Return the header of a session frame.

    Raises:
        MalformedMessage: It is none.
    """
    if len(frame) < _HEADER.size or frame[0] != MAGIC:
        raise MalformedMessage("the first frame is no session header")
    return Header(*_HEADER.unpack_from(frame)[1:])


def encode_hello(source_incarnation: int, dest_incarnation: int, hello: Hello) -> bytes:
    """Return a HELLO frame."""
    header = encode_header(Kind.HELLO, source_incarnation, dest_incarnation)
    return header + _INTRODUCTION.pack(*hello[:4], hello.message_bytes_max) + hello.identity


def decode_hello(frame: bytes) -> Hello:
    """Return the body of a HELLO frame."""
    nonce, process, window_msgs, window_bytes, most = _unpack(_INTRODUCTION, frame)
    return Hello(nonce, process, window_msgs, window_bytes, frame[_HEADER.size + _INTRODUCTION.size :], most)


def encode_challenge(source_incarnation: int, dest_incarnation: int, challenge: Challenge) -> bytes:
    """Return a CHALLENGE frame."""
    header = encode_header(Kind.CHALLENGE, source_incarnation, dest_incarnation)
    return header + _INTRODUCTION.pack(*challenge[:4], challenge.message_bytes_max) + challenge.identity


def decode_challenge(frame: bytes) -> Challenge:
    """Return the body of a CHALLENGE frame."""
    echo, nonce, window_msgs, window_bytes, most = _unpack(_INTRODUCTION, frame)
    return Challenge(echo, nonce, window_msgs, window_bytes, frame[_HEADER.size + _INTRODUCTION.size :], most)


def encode_response(source_incarnation: int, dest_incarnation: int, echo: int) -> bytes:
    """Return a RESPONSE frame."""
    return encode_header(Kind.RESPONSE, source_incarnation, dest_incarnation) + _NUMBER.pack(echo)


def decode_response(frame: bytes) -> int:
    """Return the nonce that a RESPONSE frame echoes."""
    return _unpack(_NUMBER, frame)[0]


def encode_goodbye(source_incarnation: int, dest_incarnation: int, received_through: int) -> bytes:
    """Return a GOODBYE frame."""
    return encode_header(Kind.GOODBYE, source_incarnation, dest_incarnation) + _NUMBER.pack(received_through)


def decode_goodbye(frame: bytes) -> int:
    """Return the number of the last message that the sender of a GOODBYE has received."""
    return _unpack(_NUMBER, frame)[0]


def encode_refusal(dest_incarnation: int, reason: Reason, text: str, source_incarnation: int = 0) -> bytes:
    """Return a REFUSED frame; the text is for people."""
    return encode_header(Kind.REFUSED, source_incarnation, dest_incarnation, reason) + text.encode()


def decode_refusal(frame: bytes) -> str:
    """Return the text of a REFUSED frame; its reason is the header's flags."""
    return frame[_HEADER.size : _HEADER.size + REFUSAL_BYTES_MAX].decode(errors="replace")


def encode_data(
    source_incarnation: int,
    dest_incarnation: int,
    flags: int,
    numbers: Numbers,
    messages: Sequence[bytes],
    large: Sequence[bool] = (),
    options: Sequence[Option] = (),
    left_ms: Sequence[int] = (),
) -> bytes:
    """Return a DATA frame.

    Args:
        messages: Whole messages, or of large ones only what stands in front of their contents; at most 256.
        large: For each message whether its contents follow as a frame of their own; none does if this is empty.
        options: Of single messages.
        left_ms: For each message the milliseconds until its sender gives it up; its deadline does not travel if this
            is empty.
    """
    if options:
        flags |= Flag.OPTIONS
    if left_ms:
        flags |= Flag.DEADLINES
    header = _DATA_FRAME.pack(MAGIC, VERSION, _DATA_KIND, flags, source_incarnation, dest_incarnation, *numbers)
    if len(messages) == 1 and not large and not options and not left_ms:
        message = messages[0]
        return b"%b%b%b" % (header, _SIZE.pack(len(message)), message)
    sizes: Sequence[int] = [len(message) for message in messages]
    block = _SIZES[len(sizes)].pack(*left_ms) if left_ms else b""
    if large:
        sizes = [size | _LARGE if is_large else size for size, is_large in zip(sizes, large, strict=True)]
    if options:
        block += encode_block(options)
    return b"".join((header, _SIZES[len(sizes)].pack(*sizes), block, *messages))


def encode_left_ms(left_s: float) -> int:
    """Return what a message has left in milliseconds, rounded up, so that the receiver does not give it up early."""
    if left_s <= 0:
        return 0
    return int(left_s * 1000) + 1 if left_s < NO_DEADLINE_MS // 1000 else NO_DEADLINE_MS


def encode_controls(
    source_incarnation: int, dest_incarnation: int, flags: int, numbers: Numbers, controls: Sequence[Control]
) -> bytes:
    """Return a DATA frame without messages and with at most 256 controls."""
    return encode_data(source_incarnation, dest_incarnation, flags | Flag.CONTROLS, numbers, ()) + encode_block(
        controls
    )


def decode_controls(frame: bytes, count: int) -> list[Control]:
    """Return the controls of a DATA frame with CONTROLS.

    Raises:
        MalformedMessage: It has messages, or its controls do not decode.
    """
    if count:
        raise MalformedMessage("a frame with controls has messages")
    controls, end = decode_block(CONTROLS, frame, DATA_HEADER_BYTES)
    if end != len(frame):
        raise MalformedMessage("the controls do not fit their frame")
    return controls


def decode_data_frame(frame: bytes) -> tuple[int, int, int, Numbers] | None:
    """Return (flags, source incarnation, dest incarnation, numbers) of a DATA frame of our version, None of others."""
    if len(frame) < DATA_HEADER_BYTES or frame[:3] != _DATA_START:
        return None
    fields = _DATA_FRAME.unpack_from(frame)
    return *fields[3:6], fields[6:]


def decode_batch(
    frame: bytes, flags: int, count: int, extra: Sequence[bytes]
) -> tuple[list[bytes], dict[int, bytes], list[Option], int, Sequence[int]]:
    """Return what a DATA frame has: messages, large contents by index, options, bytes, and the milliseconds left.

    Args:
        extra: The frames behind it: the contents of its large messages, in order.

    Raises:
        MalformedMessage: The sizes do not fit the frame or the frames behind it, or the options do not decode.
    """
    end = DATA_HEADER_BYTES + 4 * count
    if count > COUNT_MAX or end > len(frame):
        raise MalformedMessage("the sizes of a batch exceed its frame")
    if count == 1 and not (flags & _BLOCKS or extra):
        if int.from_bytes(frame[DATA_HEADER_BYTES:end], "little") != len(frame) - end:
            raise MalformedMessage("the size of a message does not fit its frame")
        return [frame[end:]], {}, [], len(frame) - end, ()
    sizes: tuple[int, ...] = _SIZES[count].unpack_from(frame, DATA_HEADER_BYTES)
    left_ms: Sequence[int] = ()
    if flags & Flag.DEADLINES:
        if end + 4 * count > len(frame):
            raise MalformedMessage("the deadlines of a batch exceed its frame")
        left_ms = _SIZES[count].unpack_from(frame, end)
        end += 4 * count
    options: list[Option] = []
    if flags & Flag.OPTIONS:
        options, end = decode_block(OPTIONS, frame, end)
    size_bytes = len(frame) - end
    large: dict[int, bytes] = {}
    if extra or max(sizes, default=0) >= _LARGE:
        large = {index: b"" for index, size in enumerate(sizes) if size & _LARGE}
        if len(large) != len(extra):
            raise MalformedMessage("the large messages of a batch do not fit the frames behind it")
        large = dict(zip(large, extra, strict=True))
        size_bytes += sum(map(len, extra))
        sizes = tuple(size & ~_LARGE for size in sizes)
    messages: list[bytes] = []
    for size in sizes:
        start = end
        end += size
        messages.append(frame[start:end])
    if end != len(frame):
        raise MalformedMessage("the sizes of a batch do not fit its frame")
    return messages, large, options, size_bytes, left_ms


def _unpack(body: struct.Struct, frame: bytes) -> tuple[int, ...]:
    try:
        return body.unpack_from(frame, _HEADER.size)
    except struct.error as error:
        raise MalformedMessage("a session frame is too short for its kind") from error
