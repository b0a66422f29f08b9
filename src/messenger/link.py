"""Where messages leave and arrive, as the core sees it: the ports that transports fill in.

A `Link` is one socket. A message leaves by an outlet: by a link itself, in the basic dialect, or by a session, which
finds a link.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from .wire import MSC_ID_MIN, Option, decode_message

FOREVER = float("inf")


class Outgoing(msgspec.Struct, gc=False, eq=False):
    """A message on its way out.

    Attributes:
        message_id: What `send_message` returned; 0 for what the core itself answers.
        data: The whole message, or if it is large what stands in front of its contents.
        size_bytes: Of the whole message.
        deadline_at: When the sender gives it up; infinite for what the core itself answers.
        outlet: Where it was queued.
        callback: Run on the response, or the waiter that takes the outcome.
        on_error: Told of any other outcome.
        large: The contents of a large message, which are not copied.
        peer: The routing id that a plain peer has at a listener.
        roams: Whether another link of the same listener may reach the peer.
        redeliver: Whether a new process of the peer may get what an old one may have run.
        option: What goes beside the message, its index still 0.
    """

    message_id: int
    data: bytes
    size_bytes: int
    deadline_at: float
    outlet: Any = None
    callback: Any = None
    on_error: Any = None
    large: bytes | None = None
    peer: bytes = b""
    roams: bool = False
    redeliver: bool = False
    option: Option | None = None

    @property
    def is_silent(self) -> bool:
        """Whether nobody waits for its outcome, and nobody ever did."""
        return self.callback is None and self.on_error is None

    @property
    def is_answer(self) -> bool:
        """Whether it means something only to the incarnation that it was given to."""
        _, dest_callback_id, _ = decode_message(self.data)
        return dest_callback_id >= MSC_ID_MIN or not self.message_id

    def whole(self) -> bytes:
        """Return the whole message in one piece."""
        return self.data if self.large is None else self.data + self.large


class Outlet:
    """What messages are queued at.

    Attributes:
        handle: The connection or listener that it belongs to, which users hold.
        owner: Who may answer messages that leave here: the handle in the basic dialect, else the session.
        callback: Run on every message that arrives here: a listener's SLC, or a connection's callback.
        queue: What has not been given to the network yet.
        is_plain: Whether no message in the queue is large or has an option.
        is_dirty: Whether it is to be flushed at the end of the turn.
        has_workers: Whether `callback` only hands messages to threads, so that its return does not mean that they ran.
        peer_incarnation: Of the other end of a session, 0 in the basic dialect.
        is_shared: Whether several peers are reached by it, so that a message needs its peer's routing id.
    """

    def __init__(self, handle: Any, callback: Callable[[Any], object] | None) -> None:
        self.handle = handle
        self.owner: object = handle
        self.callback = callback
        self.queue: deque[Outgoing] = deque()
        self.queue_bytes = 0
        self.is_plain = True
        self.is_dirty = False
        self.has_workers = False
        self.is_shared = False
        self.peer_incarnation = 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that was sent here is still on its way, as far as is known."""
        return True

    @property
    def is_closed(self) -> bool:
        """Whether nothing will ever leave here again."""
        return False

    @property
    def next_deadline_at(self) -> float:
        """When it wants to be looked at again."""
        return FOREVER

    def flush(self, now: float) -> None:
        """Give the queue to the network, as far as it takes it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.handle)


class GoneOutlet(Outlet):
    """Where answers go whose asker is gone: nowhere."""

    def __init__(self, handle: Any, callback: Callable[[Any], object] | None) -> None:
        super().__init__(handle, callback)
        self.owner = self  # The handle owns what was sent to its plain peers, which has nothing to do with this.

    @property
    def is_closed(self) -> bool:
        """Always."""
        return True

    def flush(self, now: float) -> None:
        """Do nothing; the exchange ends what is queued."""


class Link(Outlet):
    """One socket: a connection's, or one of a listener's.

    Attributes:
        session: Of a connection that speaks sessions; None at a listener and in the basic dialect.
        identity: That a listener shows, as bytes; empty at a connection.
    """

    def __init__(self, handle: Any, callback: Callable[[Any], object] | None) -> None:
        super().__init__(handle, callback)
        self.session: Any = None
        self.identity = b""

    def siblings(self) -> Iterable["Link"]:
        """Return all links of the same handle, itself included, in order of preference."""
        return (self,)

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        """Send one ZeroMQ message to a peer; return False if there is no way to it now."""
        raise NotImplementedError
