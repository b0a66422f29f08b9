"""Bytes to messages and back: pure functions, nothing else.

A message is, byte for byte, what `b"%d-%d-%b" % (source_callback_id, dest_callback_id, contents)` gives. The contents
may hold anything, dashes included, so only the first two dashes separate. Nothing here may raise anything but
`MalformedMessage` on any bytes whatever, or take time that grows with the digits of an id.

Source: docs/protocol.md, "Messages".
"""

from enum import IntEnum

from .errors import MalformedMessage

# What contents may be; all of these are bytes-like.
Buffer = bytes | bytearray | memoryview

ID_MAX = 2**64 - 1
# Ids from 64 can be registered by users; below are built-ins, above are message-specific callbacks.
REGISTERED_ID_MIN = 64
REGISTERED_ID_MAX = 1023
MSC_ID_MIN = 1024
_DIGITS_MAX = 20  # of 2**64 - 1


class BuiltinCallback(IntEnum):
    """Destination ids that every messenger understands without registering anything."""

    NOOP = 0  # Run nothing: the start of a conversation.
    ECHO = 1  # Answer with the same contents.


NOOP = BuiltinCallback.NOOP
ECHO = BuiltinCallback.ECHO


def encode_message(source_callback_id: int, dest_callback_id: int, contents: Buffer) -> bytes:
    """Return the message as it stands on the wire."""
    return b"%d-%d-%b" % (source_callback_id, dest_callback_id, contents)  # type: ignore[str-format]


def decode_message(data: bytes) -> tuple[int, int, bytes]:
    """Return (source_callback_id, dest_callback_id, contents).

    Raises:
        MalformedMessage: A field is missing, is not ASCII digits, has more than 20 digits, or is above 2**64 - 1.
    """
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
