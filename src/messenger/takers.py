"""Who takes an outcome in place of a callback: a thread or a task that waits, or reads a stream.

The core makes none of these; drivers do, and say how whoever waits is woken.
"""

from collections import deque

from .errors import DeliveryError
from .message import Message
from .session import Session


class Taker:
    """Takes an outcome in place of a callback, at once, inside the core: it only notes it and wakes who waits."""

    __slots__ = ()

    def __call__(self, response: Message) -> None:
        """Take the response, where a callback would be called."""
        self.settle(response, None)

    def settle(self, response: Message | None, error: DeliveryError | None) -> None:
        """Note the outcome. Called once, by the core."""
        raise NotImplementedError


class Waiter(Taker):
    """Notes the outcome, for a thread that waits for it."""

    __slots__ = ("done", "error", "response")

    def __init__(self) -> None:
        self.done = False
        self.response: Message | None = None
        self.error: DeliveryError | None = None

    def settle(self, response: Message | None, error: DeliveryError | None) -> None:
        """Note the outcome. Called once, by the core."""
        self.response = response
        self.error = error
        self.done = True


class Parts(Taker):
    """The parts of one response that have arrived and were not taken, and its end.

    Attributes:
        message_id: Of the message that they answer; 0 until it is sent.
        done: Whether there is something to take now: a part, or the end.
        is_over: Whether nothing more comes.
        session: Where they come from.
        error: What it ended with, if not with a last part.
        waiting_bytes: Of the parts that wait here.
    """

    __slots__ = (
        *("session", "_told_bytes", "_told_msgs", "done", "error", "is_over", "message_id"),
        *("taken_bytes", "taken_msgs", "waiting", "waiting_bytes"),
    )

    def __init__(self) -> None:
        self.message_id = 0
        self.done = False
        self.is_over = False
        self.error: DeliveryError | None = None
        self.waiting: deque[Message] = deque()
        self.waiting_bytes = 0
        self.taken_msgs = self.taken_bytes = 0
        self._told_msgs = self._told_bytes = 0
        self.session: Session

    def join(self, session: Session, message_id: int) -> None:
        """Note what they answer."""
        self.session = session
        self.message_id = message_id

    def wake_up(self) -> None:
        """Wake whoever waits; a driver says how. Called by the core, with the lock held."""

    def add(self, part: Message) -> None:
        """Note a part that has arrived."""
        self.waiting.append(part)
        self.waiting_bytes += len(part.contents)
        self.done = True
        self.wake_up()

    def settle(self, response: Message | None, error: DeliveryError | None) -> None:
        """Note the last part, or what there is instead. Called once, by the core."""
        self.is_over = True
        self.error = error
        self.session.controls.end_stream(self.message_id)
        if response is not None:
            self.add(response)
        self.done = True
        self.wake_up()

    def take(self) -> Message | None:
        """Return the next part, if there is one, and tell the other end, if it may wait for that."""
        if not self.waiting:
            return None
        part = self.waiting.popleft()
        self.done = bool(self.waiting) or self.is_over
        size_bytes = len(part.contents)
        self.waiting_bytes -= size_bytes
        self.taken_msgs += 1
        self.taken_bytes += size_bytes
        if not self.is_over:
            msgs_max, bytes_max = self.session.controls.stream_limits
            owed_msgs, owed_bytes = self.taken_msgs - self._told_msgs, self.taken_bytes - self._told_bytes
            if 2 * owed_msgs >= msgs_max or 2 * owed_bytes >= bytes_max:
                self._told_msgs, self._told_bytes = self.taken_msgs, self.taken_bytes
                self.session.controls.tell_credit(self.message_id, self.taken_msgs, self.taken_bytes)
        return part
