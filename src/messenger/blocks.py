"""What is rare, in blocks of DATA frames: options of single messages, and controls. MessagePack, by msgspec.

Source: docs/protocol.md, "Session dialect" and "Controls".
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec

from .errors import MalformedMessage

T = TypeVar("T")

# Of the messages of a frame, and of its controls.
COUNT_MAX = 256


class OptionKind(IntEnum):
    """What an option says of one message of a batch."""

    HANDLER_ERROR = 1  # It is an error response; name and text of the exception.
    NO_HANDLER = 2  # It is an error response: nothing ran.
    REDELIVERED = 3  # An earlier process may have run it.
    MORE = 4  # It is a part of a response; more parts follow.
    STREAM = 5  # Its response may come in parts.
    TOO_LARGE = 6  # It is an error response: nothing ran, the receiver takes no contents of that size.


class Option(msgspec.Struct, array_like=True, frozen=True):
    """What is rare, of one message of a batch."""

    index: int
    kind: int
    name: str = ""
    text: str = ""


class ControlKind(IntEnum):
    """What an end says beside the numbered messages, so that it waits for no window; said twice, it changes nothing."""

    CANCEL = 1  # I have given up my message; nobody waits for its response.
    CREDIT = 2  # Of the parts that answer my message, I have taken so many, and so many bytes.


class Control(msgspec.Struct, array_like=True, frozen=True):
    """Something about a message of the end that says it, named by its `source_callback_id`."""

    kind: int
    message_id: int
    taken_msgs: int = 0
    taken_bytes: int = 0


# A list that names more messages than a batch has is refused before it is built.
OPTIONS = msgspec.msgpack.Decoder(Annotated[list[Option], msgspec.Meta(max_length=COUNT_MAX)])
CONTROLS = msgspec.msgpack.Decoder(Annotated[list[Control], msgspec.Meta(max_length=COUNT_MAX)])


def encode_block(values: Sequence[Option] | Sequence[Control]) -> bytes:
    """Return a block: its size, and what stands in it."""
    encoded = msgspec.msgpack.encode(values)
    return len(encoded).to_bytes(4, "little") + encoded


def decode_block(decoder: msgspec.msgpack.Decoder[list[T]], frame: bytes, start: int) -> tuple[list[T], int]:
    """Return what stands in the block of a frame that begins at `start`, and where it ends.

    Raises:
        MalformedMessage: It does not decode.
    """
    end = start + 4 + int.from_bytes(frame[start : start + 4], "little")
    try:
        return decoder.decode(frame[start + 4 : end]), end
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage("a block of a session frame does not decode") from error
