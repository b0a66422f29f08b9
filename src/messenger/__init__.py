"""Messages with callbacks between the parts of a system: in this process, on this machine, on another."""

from .destination import Destination
from .endpoint import Connection, Listener, Security
from .errors import (
    CalledFromCallback,
    DeliveryError,
    DestinationInUse,
    DestinationInvalid,
    ForkedError,
    LimitReached,
    MessageTooLarge,
    MessengerClosed,
    MessengerError,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from .exchange import Message, Statistics
from .limits import Limits
from .messenger import Messenger
from .wire import ECHO, NOOP, BuiltinCallback

__version__ = "0.1.0"

__all__ = [
    "ECHO",
    "NOOP",
    "BuiltinCallback",
    "CalledFromCallback",
    "Connection",
    "DeliveryError",
    "Destination",
    "DestinationInUse",
    "DestinationInvalid",
    "ForkedError",
    "LimitReached",
    "Limits",
    "Listener",
    "Message",
    "MessageTooLarge",
    "Messenger",
    "MessengerClosed",
    "MessengerError",
    "NotDelivered",
    "OutcomeUnknown",
    "QueueFull",
    "Security",
    "Statistics",
    "__version__",
]
