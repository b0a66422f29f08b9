"""Messages with callbacks between the parts of a system: in this process, on this machine, on another."""

from typing import TYPE_CHECKING

from .destination import Destination
from .endpoint import Connection, Listener
from .errors import (
    CalledFromCallback,
    Cancelled,
    ContentsInvalid,
    DeliveryError,
    DestinationInUse,
    DestinationInvalid,
    ForkedError,
    HandlerError,
    IdentityInUse,
    LimitReached,
    MessageTooLarge,
    MessengerClosed,
    MessengerError,
    NoHandler,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
    SecurityError,
)
from .limits import Limits
from .message import Message, Statistics
from .messenger import Messenger, Stream
from .security import KeyPair, Security
from .typed import typed
from .wire import ECHO, NOOP, BuiltinCallback

if TYPE_CHECKING:
    from .aio import AsyncMessenger

__version__ = "0.1.0"

__all__ = [
    "ECHO",
    "NOOP",
    "AsyncMessenger",
    "BuiltinCallback",
    "CalledFromCallback",
    "Cancelled",
    "Connection",
    "ContentsInvalid",
    "DeliveryError",
    "Destination",
    "DestinationInUse",
    "DestinationInvalid",
    "ForkedError",
    "HandlerError",
    "IdentityInUse",
    "KeyPair",
    "LimitReached",
    "Limits",
    "Listener",
    "Message",
    "MessageTooLarge",
    "Messenger",
    "MessengerClosed",
    "MessengerError",
    "NoHandler",
    "NotDelivered",
    "OutcomeUnknown",
    "QueueFull",
    "Security",
    "SecurityError",
    "Statistics",
    "Stream",
    "__version__",
    "typed",
]


def __getattr__(name: str) -> object:
    """Import `AsyncMessenger` at its first use: programs without asyncio do not pay for it."""
    if name == "AsyncMessenger":
        from .aio import AsyncMessenger

        return AsyncMessenger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
