"""Error responses: what an end says of a message that it could not answer, and what the other makes of that.

They travel as an option of an empty message (docs/protocol.md). The text is a peer's, so it is cut, and what a terminal
would obey is written out.
"""

from .blocks import Option, OptionKind
from .errors import DeliveryError, HandlerError, NoHandler, NotDelivered
from .limits import ERROR_NAME_MAX, ERROR_TEXT_MAX

_DID_NOT_RUN: dict[int, tuple[type[DeliveryError], str]] = {
    OptionKind.NO_HANDLER: (NoHandler, "there is nothing to run at the receiver: no callback, no such callback id"),
    OptionKind.TOO_LARGE: (NotDelivered, "the contents are larger than the receiver's limits.message_bytes_max"),
}
FAILURES = frozenset({OptionKind.HANDLER_ERROR, *_DID_NOT_RUN})


def encode_failure(error: BaseException) -> Option:
    """Return what is said of an exception that a callback raised."""
    return Option(0, OptionKind.HANDLER_ERROR, _printable(type(error).__name__), _text_of(error))


def decode_failure(option: Option) -> tuple[type[DeliveryError], str, tuple[str, ...]]:
    """Return the kind of error that an option of `FAILURES` tells, its text, and the name of what was raised."""
    if option.kind == OptionKind.HANDLER_ERROR:
        name, text = readable(option.name, ERROR_NAME_MAX), readable(option.text, ERROR_TEXT_MAX)
        return HandlerError, f"the callback raised {name}: {text}", (name,)
    return *_DID_NOT_RUN[option.kind], ()


def _text_of(error: BaseException) -> str:
    """Return an exception's text, and of a group, such as a `TaskGroup` raises, what was raised in it."""
    text = _own_text_of(error)
    inner = [error]
    while inner and len(text) < ERROR_TEXT_MAX:
        each = inner.pop(0)
        if isinstance(each, BaseExceptionGroup):
            inner[:0] = each.exceptions
        elif each is not error:
            text += f"; {type(each).__name__}: {_own_text_of(each)}"
    return _printable(text[:ERROR_TEXT_MAX])


def _own_text_of(error: BaseException) -> str:
    """Return an exception's text as far as it has one: its `__str__` is a user's, and may raise."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be shown)"


def _printable(text: str) -> str:
    """Return text that can be encoded: a file's name may have surrogates in it."""
    return text.encode(errors="backslashreplace").decode()


def readable(text: str, length_max: int) -> str:
    """Return as much of a peer's text as we would send, without what a terminal would obey."""
    text = text[:length_max]
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
