"""Every exception of the Messenger.

Two families, kept apart: mistakes that the caller can mend stand directly below `MessengerError`; what became of one
message stands below `DeliveryError`, and exactly one of those (or the response) reaches the caller of each message.
"""


class MessengerError(Exception):
    """Base of every error that this library raises on purpose."""


class DestinationInvalid(MessengerError, ValueError):
    """The destination cannot be parsed, or may not be used like this."""


class SecurityError(MessengerError, ValueError):
    """A key, an allow-list, or the way in which they are used is not safe. Nothing was opened."""


class DestinationInUse(MessengerError):
    """Another listener, here or in another process, already has this destination. Nothing was opened."""


class MessageTooLarge(MessengerError, ValueError):
    """The contents exceed `limits.message_bytes_max`, ours or the receiver's. Nothing was sent."""


class QueueFull(MessengerError):
    """The queue to the receiver, or to the reader of a stream, stayed full for the whole timeout. Nothing was sent.

    In a callback, which cannot wait: is full now.
    """


class LimitReached(MessengerError):
    """A limit of `Limits` other than a queue's or a message's size is reached. Nothing was opened or sent."""


class MessengerClosed(MessengerError):
    """The messenger, connection or listener is closed, or is closing. Nothing was sent."""


class CalledFromCallback(MessengerError):
    """A call that waits was made on the messenger's own thread, which would then wait for itself."""


class ForkedError(MessengerError):
    """The messenger was made before a fork and belongs to the parent; make a new one in the child."""


class MalformedMessage(MessengerError, ValueError):
    """Bytes of a peer that are no message. The loop counts it and drops the bytes; it never leaves the loop."""


class ContentsInvalid(MessengerError, ValueError):
    """The contents of a typed message do not decode as the type that is wanted; the text names the field."""


class DeliveryError(MessengerError):
    """What became of one message that got no response.

    Attributes:
        message_id: The id that `send_message` returned.
    """

    def __init__(self, text: str, message_id: int) -> None:
        super().__init__(text)
        self.message_id = message_id


class NotDelivered(DeliveryError):
    """It is certain that the message did not run at the receiver."""


class OutcomeUnknown(DeliveryError):
    """No response came before the deadline, or before one of both ends was gone; the message may have run."""


class IdentityInUse(NotDelivered):
    """Another living messenger, here or in another process, has our identity there. The message did not run."""


class NoHandler(NotDelivered):
    """The message arrived, but there is nothing to run at the receiver: no callback, and no such callback id."""


class HandlerError(DeliveryError):
    """A callback at the receiver raised.

    Attributes:
        type_name: Of the exception, such as `"ValueError"`.
    """

    def __init__(self, text: str, message_id: int, type_name: str = "") -> None:
        super().__init__(text, message_id)
        self.type_name = type_name


class Cancelled(DeliveryError):
    """The sender gave the message up with `cancel`. It may have run. Raised by `reply(…, more=True)`: nobody reads."""
