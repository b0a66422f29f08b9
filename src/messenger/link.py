"""Where messages leave and arrive, as the core sees it: the ports that transports fill in.

A `Link` is one socket. A message leaves by an outlet: by a link itself, in the basic dialect, or by a session, which
finds a link.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from .compiled import mypyc_attr
from .outgoing import Outgoing
from .wire import ANY_SIZE

FOREVER: Final = float("inf")
_NONE_CANCELLED: Mapping[int, None] = MappingProxyType({})


class Random(Protocol):
    """What the core needs of a source of random numbers; `random.Random` is one."""

    def random(self) -> float:
        """Return a number of at least 0 and below 1."""

    def getrandbits(self, k: int, /) -> int:
        """Return a number of k bits."""


# Transports have classes of their own on top of these two.
@mypyc_attr(allow_interpreted_subclasses=True)
class Outlet:
    """What messages are queued at.

    Attributes:
        handle: The connection or listener that it belongs to, which users hold.
        callback: Run on every message that arrives here: a listener's SLC, or a connection's callback.
        hears_responses: Whether `callback` also runs on responses, after their own callbacks.
        queue: What has not been given to the network yet.
        given_up_count: Messages that were given up since the queue was last looked through for them.
        is_plain: Whether no message in the queue is large, has an option, or another deadline than the default.
        is_dirty: Whether it is to be flushed at the end of the turn.
        has_workers: Whether `callback` only hands messages to threads, so that its return does not mean that they ran.
        peer_incarnation: Of the other end of a session, 0 in the basic dialect.
        contents_max: What the other end of a session takes in one message, as far as it has said so.
        cancelled: The messages of a session's other end that it has given up, by `source_callback_id`, oldest first.
        is_shared: Whether several peers are reached by it, so that a message needs its peer's routing id.
    """

    def __init__(self, handle: Any, callback: Callable[[Any], object] | None) -> None:
        self.handle = handle
        self.callback = callback
        self.hears_responses = True
        self.queue: deque[Outgoing] = deque()
        self.queue_bytes = 0
        self.given_up_count = 0
        self.is_plain = True
        self.is_dirty = False
        self.has_workers = False
        self.is_shared = False
        self.peer_incarnation = 0
        self.contents_max = ANY_SIZE
        self.cancelled: Mapping[int, None] = _NONE_CANCELLED

    @property
    def owner(self) -> object:
        """Who may answer messages that leave here: the handle in the basic dialect, else the session."""
        return self.handle

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that was sent here is still on its way, as far as is known."""
        return True

    @property
    def is_closed(self) -> bool:
        """Whether nothing will ever leave here again."""
        return False

    def why_unsent(self) -> str:
        """Return what is known of why its queue did not leave, for people."""
        return "nobody was there to take it"

    def flush(self, now: float) -> None:
        """Give the queue to the network, as far as it takes it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.handle)


class GoneOutlet(Outlet):
    """Where answers go whose asker is gone: nowhere."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle, None)

    @property
    def owner(self) -> object:
        """Itself: the handle owns what was sent to its plain peers, which has nothing to do with this."""
        return self

    @property
    def is_closed(self) -> bool:
        """Always."""
        return True

    def flush(self, now: float) -> None:
        """Do nothing; the exchange ends what is queued."""


@mypyc_attr(allow_interpreted_subclasses=True)
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

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        """Return whether a peer of this link may have an identity: where there are no keys, any peer may."""
        return True

    def revive(self) -> None:
        """Try again to reach somebody, some time after a refusal."""

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        """Send one ZeroMQ message to a peer; return False if there is no way to it now."""
        raise NotImplementedError
