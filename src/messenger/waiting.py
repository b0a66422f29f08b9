"""What a thread waits with: outcomes are noted in it under the lock, and wake the thread."""

import threading

from .errors import DeliveryError
from .message import Message
from .takers import Parts, Waiter


class ThreadWaiter(Waiter):
    """A thread that waits for an outcome. It leads, or it follows: then it sleeps on `wake`."""

    __slots__ = ("wake",)

    def __init__(self) -> None:
        super().__init__()
        self.wake: threading.Lock | None = None

    def settle(self, response: Message | None, error: DeliveryError | None) -> None:
        """Note the outcome and wake the thread."""
        super().settle(response, error)
        self.wake_up()

    def wake_up(self) -> None:
        """Wake the thread, if it follows."""
        if self.wake is not None:
            self.wake.release()
            self.wake = None


class ThreadParts(Parts):
    """The parts of a stream that a thread reads; it leads or follows as one that waits for an outcome does."""

    __slots__ = ("wake",)

    def __init__(self) -> None:
        super().__init__()
        self.wake: threading.Lock | None = None

    def wake_up(self) -> None:
        """Wake the thread, if it follows."""
        if self.wake is not None:
            self.wake.release()
            self.wake = None
