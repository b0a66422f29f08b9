"""What callers give, checked: each refusal says which argument, its value, what it must be, and what to do.

Of what is given with every message only what is cheap is checked before it is used; what else is wrong fails by itself,
and is told here.
"""

import inspect
import sys
from operator import index
from typing import Any, TypeVar

import msgspec

from .limits import IDENTITY_BYTES_MAX
from .message import Contents
from .typed import encode
from .wire import ID_MAX, REGISTERED_ID_MAX, REGISTERED_ID_MIN, Buffer, encode_identity

T = TypeVar("T")
# Of a value in an error.
SHOWN_MAX = 100


def as_bytes(contents: Contents) -> Buffer:
    """Return contents as bytes, or something like bytes.

    Raises:
        TypeError: They are nothing that can be sent.
        ValueError: They are text that is not UTF-8, with surrogates.
    """
    if isinstance(contents, str):
        return contents.encode()
    if isinstance(contents, msgspec.Struct):
        return encode(contents)
    try:
        return contents if isinstance(contents, (bytes, bytearray)) else memoryview(contents).cast("B")
    except TypeError as error:
        raise TypeError(
            f"contents are {shown(contents)}, they must be bytes, something like bytes without gaps, str, or a "
            "msgspec.Struct; encode others, for example by json.dumps"
        ) from error


def as_numbers(timeout: float, remote_callback: int) -> tuple[float, int]:
    """Return a timeout and the id of a callback as what the core takes; refuse what is none."""
    try:
        is_in_range = 0 < timeout <= sys.float_info.max
    except TypeError as error:
        raise TypeError(f"timeout is {shown(timeout)}, it must be a number of seconds above 0") from error
    if not is_in_range:
        raise ValueError(f"timeout is {timeout!r}, it must be a finite number of seconds above 0")
    try:
        is_in_range = 0 <= index(remote_callback) <= ID_MAX
    except TypeError as error:
        raise TypeError(
            f"remote_callback is {shown(remote_callback)}, it must be an integer: ECHO, or the id that the receiver "
            "gave to register_callback"
        ) from error
    if not is_in_range:
        raise ValueError(f"remote_callback is {remote_callback}, it must be 0 to {ID_MAX}")
    return float(timeout), int(index(remote_callback))


def check_close_timeout(timeout: float) -> None:
    """Refuse what is no time to wait for."""
    try:
        is_in_range = timeout >= 0
    except TypeError as error:
        raise TypeError(f"timeout is {shown(timeout)}, it must be a number of seconds of at least 0") from error
    if not is_in_range:
        raise ValueError(f"timeout is {timeout!r}, it must be a number of seconds of at least 0")


def check_callable(name: str, value: object, *, may_be_none: bool = True, may_be_coroutine: bool = True) -> None:
    """Refuse what cannot be called, or where nothing would run it a coroutine function."""
    if value is None and may_be_none:
        return
    if not callable(value):
        raise TypeError(f"{name} is {shown(value)}, it must be callable{' or None' if may_be_none else ''}")
    call = getattr(type(value), "__call__", None)  # noqa: B004  # Whether it can be called is not the question.
    if any(kind(each) for each in (value, call) for kind in (inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise TypeError(
            f"{name} is {shown(value)}, a generator function, of which nothing would run; it must not yield: call "
            "message.reply(part, more=True) for each part"
        )
    if not may_be_coroutine and is_coroutine_function(value):
        raise TypeError(
            f"{name} is {shown(value)}, a coroutine function, which nothing would run here; give a plain function, or "
            "use AsyncMessenger"
        )


def is_coroutine_function(value: Any) -> bool:
    """Return whether a callable is a coroutine function, or an object with such a `__call__`."""
    call = getattr(type(value), "__call__", None)  # noqa: B004  # Whether it can be called is not the question.
    return inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(call)


def check_callback_id(callback_id: int) -> None:
    """Refuse what is no id at all; which ones there are the core says."""
    if not isinstance(callback_id, int):
        raise TypeError(
            f"callback id {shown(callback_id)} is not an integer, {REGISTERED_ID_MIN} to {REGISTERED_ID_MAX}"
        )


def check_identity(identity: str) -> None:
    """Refuse what is no identity."""
    if not isinstance(identity, str):
        raise TypeError(f"identity is {shown(identity)}, it must be str: the name that others see as message.sender")
    try:
        length = len(encode_identity(identity))
    except UnicodeEncodeError as error:
        raise ValueError(f"identity {identity!r} cannot be encoded as UTF-8") from error
    if not 0 < length <= IDENTITY_BYTES_MAX or "\0" in identity:
        raise ValueError(f"identity {identity!r} is {length} bytes, it must be 1 to {IDENTITY_BYTES_MAX} without NUL")


def check_workers(workers: int, workers_max: int | None) -> None:
    """Refuse what is no number of workers."""
    if type(workers) is not int:
        raise TypeError(f"workers is {shown(workers)}, it must be an integer of at least 0")
    if workers < 0:
        raise ValueError(f"workers is {workers}, it must be at least 0")
    if workers_max is not None and workers > workers_max:
        raise ValueError(
            f"workers is {workers}, limits.workers_max is {workers_max}, because each is a thread; those "
            "of AsyncMessenger are none"
        )


def given(name: str, value: T | None, kind: type[T], example: str) -> T:
    """Return an optional argument, made anew if it was not given.

    Raises:
        TypeError: It is of another type.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {shown(value)}, it must be {kind.__name__}, for example {example}")
    return value


def shown(value: object) -> str:
    """Return a value for people, not too long, whatever it is."""
    try:
        text = repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}… of type {type(value).__name__}"
