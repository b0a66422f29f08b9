"""Commands and answers: JSON, and beside it, where both sides can, one array in NumPy's `.npy` format.

    manager to server   {"cmd": "PRINT", "data": {"message": "hello"}}
    server to manager   {"action": 0, "result": "MODEL_REPLY_hello", "success": true, "err": ""}

`action` is 0 in an answer, 1 in the first message of a server, 2 in a report of progress. Further fields are ignored by
whoever does not know them. Contents with an array start with the byte 1, which no JSON does:

    1 byte 0x01 · 4 bytes length of the JSON, little-endian · JSON, padded with spaces · .npy, version 1.0

What must never happen here: an array of objects, which would have to be unpickled; an array whose size is believed
before it was compared with the bytes that came.

Source: docs/models.md, "The protocol".
"""

import io
import struct
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .errors import BadAnswer
from .limits import ERROR_CHARS_MAX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

ANSWER, CONNECTED, PROGRESS = 0, 1, 2
REPLY_PREFIX = "MODEL_REPLY_"
BINARY = 1
PREFIX = struct.Struct("<BI")
# So that the array's data is aligned: the header of .npy is a multiple of 64 bytes already.
ALIGNMENT = 16
# Kinds of NumPy's types that hold plain values: booleans, signed and unsigned integers, floats, text.
NUMERIC_KINDS, VALUE_KINDS = "biuf", "biufU"


class Command(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a manager asks of a server, or a client of a manager.

    Attributes:
        cmd: Such as `"PRINT"`.
        data: What the command needs.
        npy: Whether the sender can take arrays as binary.
    """

    cmd: str
    data: Any = ""
    npy: bool = False


class ReceivedCommand(msgspec.Struct, kw_only=True):
    """A command that arrived; its data are decoded by whoever knows what they should be."""

    cmd: str
    data: msgspec.Raw = msgspec.Raw(b'""')
    npy: bool = False

    def data_as(self, kind: type[T]) -> T:
        """Return the data.

        Raises:
            ValueError: They are something else; the text says why.
        """
        decoder = _data_decoders.get(kind)
        if decoder is None:
            decoder = _data_decoders[kind] = msgspec.json.Decoder(kind)
        try:
            data: T = decoder.decode(self.data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the data of {self.cmd} are not what it takes: {error}") from error
        return data


class Answer(msgspec.Struct, kw_only=True):
    """What comes back. All of the first four must be there.

    Attributes:
        action: `ANSWER`, `CONNECTED` or `PROGRESS`.
        result: What was asked for.
        success: Whether it could be done.
        err: Why not.
        kind: The name of the error's class, for those that mean something to a caller.
        retry_after_s: Of `Overloaded`.
        server: In a server's first message: what it tells of itself.
    """

    action: int
    result: Any
    success: bool
    err: str
    kind: str = ""
    retry_after_s: float = 0.0
    server: "ServerHello | None" = None


class ServerHello(msgspec.Struct, kw_only=True):
    """What our servers tell of themselves in their first message.

    Attributes:
        pid: Of its process.
        life: Random, drawn when the process starts.
        slot: The number that the manager which started it gave it; -1 if it was started by hand.
        npy: Whether it can take arrays as binary.
        batches: Whether it can take several calls in one `INFER`, and answers pings.
    """

    pid: int = 0
    life: str = ""
    slot: int = -1
    npy: bool = False
    batches: bool = False


# By the type of the data; there are as many as types of data in this package.
_data_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_encode_json = msgspec.json.Encoder(enc_hook=lambda value: _plain(value)).encode
_decode_command = msgspec.json.Decoder(ReceivedCommand).decode
_decode_answer = msgspec.json.Decoder(Answer).decode


def _plain(value: Any) -> Any:
    """Return NumPy's scalars and arrays, which callers have in their rows, as what JSON knows."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def encode(contents: Command | Answer, array: "NDArray[Any] | None" = None) -> bytes:
    """Return the bytes of a command or an answer.

    Raises:
        TypeError: Something in it cannot be sent.
    """
    if array is None:
        return _encode_json(contents)
    import numpy as np

    if array.dtype.kind not in VALUE_KINDS:
        raise TypeError(f"an array of {array.dtype} cannot be sent, only numbers and text")
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    text = _encode_json(contents)
    text += b" " * (-(PREFIX.size + len(text)) % ALIGNMENT)
    data: Any = array.view("u1") if array.size else b""
    return b"".join((PREFIX.pack(BINARY, len(text)), text, header.getvalue(), data))


def encode_value(value: Any) -> bytes:
    """Return the JSON of a value.

    Raises:
        TypeError: Something in it cannot be sent.
    """
    return _encode_json(value)


def as_builtins(value: Any) -> Any:
    """Return the dictionaries, sequences and plain values of which `encode_value` makes JSON."""
    return msgspec.to_builtins(value, enc_hook=_plain, str_keys=True)


def encode_failure(text: str, kind: str = "", retry_after_s: float = 0.0) -> bytes:
    """Return an answer that says why something could not be done."""
    answer = Answer(
        action=ANSWER, result="", success=False, err=text[:ERROR_CHARS_MAX], kind=kind, retry_after_s=retry_after_s
    )
    return _encode_json(answer)


def decode_command(contents: bytes) -> "tuple[ReceivedCommand, NDArray[Any] | None]":
    """Return a command and its array.

    Raises:
        ValueError: It is none; the text says why.
    """
    text, array = _split(contents)
    return _decode_command(text), array


def decode_answer(contents: bytes) -> "tuple[Answer, NDArray[Any] | None]":
    """Return an answer and its array.

    Raises:
        BadAnswer: It is none; the text says why.
    """
    try:
        text, array = _split(contents)
        return _decode_answer(text), array
    except (ValueError, RecursionError) as error:
        shown = repr(contents[:80]) + ("…" if len(contents) > 80 else "")
        raise BadAnswer(f"{shown} is no answer: {error}") from error


def _split(contents: bytes) -> "tuple[bytes | memoryview, NDArray[Any] | None]":
    if contents[:1] != b"\x01":
        return contents, None
    if len(contents) < PREFIX.size:
        raise ValueError(f"{len(contents)} bytes are too few for contents with an array")
    _, length = PREFIX.unpack_from(contents)
    end = PREFIX.size + length
    if end > len(contents):
        raise ValueError(f"the JSON should be {length} bytes, {len(contents) - PREFIX.size} came")
    buffer = memoryview(contents)
    return buffer[PREFIX.size : end], decode_array(buffer[end:])


def decode_array(buffer: memoryview) -> "NDArray[Any]":
    """Return the array of `.npy` bytes, without a copy; it is read-only.

    Raises:
        ValueError: The bytes are no such array, or it holds something else than numbers and text.
    """
    import numpy as np

    # A header of numbers or text takes less than this, and a longer one is not worth parsing.
    head = io.BytesIO(buffer[:4096])
    try:
        version = np.lib.format.read_magic(head)
        if version != (1, 0):
            raise ValueError(f"the array is in version {version} of .npy, only 1.0 is taken")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
    except Exception as error:
        # Besides ValueError, NumPy lets through what its parser of Python literals raises.
        raise ValueError(f"the array cannot be read: {str(error)[:200]}") from error
    if dtype.kind not in VALUE_KINDS:
        raise ValueError(f"the array is of {dtype}, only numbers and text are taken")
    data = buffer[head.tell() :]
    count = 1
    for length in shape:
        count *= length
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data):
        raise ValueError(f"an array of {shape} {dtype} is not {len(data)} bytes")
    array: NDArray[Any] = np.frombuffer(data, dtype, count) if count else np.empty(0, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C")


def is_numeric(array: "NDArray[np.generic]") -> bool:
    """Return whether an array holds numbers."""
    return array.dtype.kind in NUMERIC_KINDS


def show_error(error: BaseException) -> str:
    """Return an error as one text of limited length, with its class unless it is ours."""
    text = str(error) or type(error).__name__
    if not isinstance(error, ValueError | OSError) and type(error).__module__.partition(".")[0] != "messenger":
        text = f"{type(error).__name__}: {text}"
    return text[:ERROR_CHARS_MAX]
