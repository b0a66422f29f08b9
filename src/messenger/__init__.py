"""Messages with callbacks between the parts of a system: in this process, on this machine, on another."""

from .destination import Destination
from .endpoint import Connection, Listener
from .errors import (
    CalledFromCallback,
    Cancelled,
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
from .wire import ECHO, NOOP, BuiltinCallback

__version__ = "0.1.0"

__all__ = [
    "ECHO",
    "NOOP",
    "BuiltinCallback",
    "CalledFromCallback",
    "Cancelled",
    "Connection",
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
]
