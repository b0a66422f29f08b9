"""What each tcp connection has received, looked at now and then, so that libzmq holds only so much of each.

libzmq keeps the frames of a message until the last has come; it bounds each, not all of them, and shows us none before.
And it reads as fast as a peer sends: its high-water mark is no way to stop that, because the process aborts if a
connection breaks while it does not read for that mark ("Assertion failed: !_io_error"). So memory would have no bound.
But the kernel tells how many bytes a connection has received. One that has received a good deal is **watched**: from
then on whoever takes a message off its socket asks by which connection it came, and counts its bytes. The watch ends
when the socket is empty after that, or by a message of which libzmq does not tell by which connection it came. Under
the watch it is cut if more is received since a message came than any whole one may have (`endless_message`), or if more
than `held_bytes_max` waits here, or what waits of all is more than `unread_bytes_max` and it has no less of it than the
average (`too_far_ahead`).

What must never happen here: a cut of a peer because its messages wait for us, as long as they are not that many, or for
libzmq. So

* only what libzmq has taken from the kernel counts;
* a peer is cut at a later look than that which found it to have sent too much, and only if its socket was empty in
  between, or gave so many messages that each peer had its turn: one of its own would have been among them;
* an idle peer's heartbeats are bytes too, so a trickle is forgiven;
* libzmq may close a descriptor at any time, and another connection may have its number, so the kernel is asked each
  time whether it is still the same, and at last for its port.

It tells, too, how many bytes a peer has acknowledged, and so whether libzmq has let in who has to show a key: a
**stranger** that is not let in within `HANDSHAKE_S` is cut. libzmq could do that itself, but it looks through the
timers of all connections whenever a handshake ends, which took a third of its time in a flood.

While a callback holds up the loop nobody takes messages, but `threads.py` has somebody look.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..exchange import Exchange
from ..limits import (
    CROWDED_LOG_S,
    HANDSHAKE_S,
    INFLOW_FORGIVEN_BYTES_PER_S,
    INFLOW_UNWATCHED_BYTES_MAX,
    INFLOW_UNWATCHED_SHARE,
    LOOK_S,
    LOOK_S_MIN,
    LOOK_WATCHED_S,
    TURN_CUTS_MAX,
    TURN_LOOKS_MAX,
)
from ..link import FOREVER
from .sockets import CURVE_REFUSAL_BYTES, Kernel

if TYPE_CHECKING:
    from .zeromq import SocketLink

logger = logging.getLogger("messenger")


class Inflow:
    """One tcp connection.

    Attributes:
        link: By whose socket its messages come.
        descriptor: libzmq's own.
        cookie: The kernel's name of it while it is watched, else 0.
        base: How many bytes it had received when the watch began or a message was last seen to have come, or at first,
            and of what came since those that are forgiven.
        looked_at: When that was last brought up to date.
        held_base: The same, but of the time when the watch began.
        taken_bytes: What was taken of it since, as it was on the wire.
        held_bytes: What waited at the last look, and may be a part of a message.
        unseen_bytes: What came just before the watch began, so that nobody knows how much of it was taken.
        has_given: Whether a message came since the last look.
        over_at, over_count: When it was found to have sent too much, and after how many messages of the socket.
        is_stranger: Whether it has to show a key, and was not seen to be let in.
        stranger_cookie, stranger_since: The kernel's name of it until then, and since when it had it.
    """

    __slots__ = (
        "base",
        "cookie",
        "descriptor",
        "has_given",
        "held_base",
        "held_bytes",
        "is_stranger",
        "link",
        "looked_at",
        "over_at",
        "over_count",
        "stranger_cookie",
        "stranger_since",
        "taken_bytes",
        "unseen_bytes",
    )

    def __init__(self, link: "SocketLink", descriptor: int, now: float) -> None:
        self.link = link
        self.descriptor = descriptor
        self.cookie = 0
        self.base = 0
        self.looked_at = now
        self.over_at = FOREVER
        self.over_count = 0
        self.held_base = self.held_bytes = self.unseen_bytes = self.taken_bytes = 0
        self.has_given = False
        self.is_stranger = False
        self.stranger_cookie = 0
        self.stranger_since = now

    def begin_watch(self, received: int, cookie: int) -> None:
        """Have asked of each message whether it came by this connection."""
        self.unseen_bytes = received - self.base
        self.base = self.held_base = received
        self.cookie = cookie
        self.held_bytes = self.taken_bytes = 0
        self.has_given = False
        self.link.watched[self.descriptor] = self

    def end_watch(self) -> None:
        """All that it sent was taken, but for a part of a message, or nobody knows by whom a message came."""
        self.cookie = self.held_bytes = self.unseen_bytes = 0
        self.over_at = FOREVER
        self.link.watched.pop(self.descriptor, None)

    def note_message(self) -> None:
        """A message has come, so what comes now may be the next one."""
        self.has_given = True
        self.over_at = FOREVER

    def note_frame(self, wire_bytes: int) -> None:
        """A frame of it was taken."""
        self.taken_bytes += wire_bytes

    def is_too_far_ahead(self) -> bool:
        """Return whether more waits than may. In how many frames that is, nobody knows, so only bytes count."""
        return self.taken_bytes > 0 and self.held_bytes > self.link.held_bytes_max

    def is_surely_endless(self) -> bool:
        """Return whether a whole message would have been taken since it was found to have sent too much."""
        link = self.link
        # A ROUTER takes from those that have something in turn; twice, because peers that go change the order.
        turns_count = 2 * len(link.inflows) + 1
        return link.emptied_at > self.over_at or link.taken_count > self.over_count + turns_count


class Lookout:
    """Looks at the connections of a messenger, some at a time.

    Args:
        links: Whose connections; they may come and go.
        kernel: Asked what it knows of them.
        unread_bytes_max: What may wait of all of them together.
    """

    def __init__(
        self, exchange: Exchange, links: Iterable["SocketLink"], kernel: Kernel, unread_bytes_max: int
    ) -> None:
        self._exchange = exchange
        self._links = links
        self._kernel = kernel
        self._unread_bytes_max = unread_bytes_max
        # What waits of those that are watched, how many they are, and what those have left that ended.
        self._unread_bytes = self._watched_count = self._left_bytes = 0
        self._unwatched_bytes_max = INFLOW_UNWATCHED_BYTES_MAX
        # Whom the present round has still to look at, and the pause before each portion of it.
        self._left: list[Inflow] = []
        self._pause_s = LOOK_S
        self._next_at = 0.0
        # Strangers that were cut in this turn.
        self._turn_cuts_count = 0
        self._warned_at = -CROWDED_LOG_S

    def look(self, now: float) -> float:
        """Look at the next ones, if it is time; return when to look again."""
        if now < self._next_at:
            return self._next_at
        self._turn_cuts_count = 0
        for _ in range(min(TURN_LOOKS_MAX, len(self._left))):
            if self._turn_cuts_count == TURN_CUTS_MAX:
                break
            inflow = self._left.pop()
            # Its connection may have ended, or its link, since the round began.
            if inflow.link.inflows.get(inflow.descriptor) is inflow:
                self._look_at(inflow, now)
        if not self._left:
            self._begin_round()
        self._next_at = now + self._pause_s if self._left else 0.0
        return self._next_at or FOREVER

    def _begin_round(self) -> None:
        links = self._links
        self._left = [inflow for link in links for inflow in link.inflows.values()]
        held = [inflow.held_bytes for link in links for inflow in link.watched.values()]
        self._unread_bytes, self._watched_count = sum(held), len(held)
        self._left_bytes = sum(link.left_bytes for link in links)
        if self._left:
            share = int(self._unread_bytes_max * INFLOW_UNWATCHED_SHARE) // len(self._left)
            self._unwatched_bytes_max = min(INFLOW_UNWATCHED_BYTES_MAX, share)
            round_s = LOOK_WATCHED_S if any(link.watched for link in links) else LOOK_S
            self._pause_s = max(LOOK_S_MIN, round_s * min(1.0, TURN_LOOKS_MAX / len(self._left)))

    def _look_at(self, inflow: Inflow, now: float) -> None:
        kernel, descriptor = self._kernel, inflow.descriptor
        if inflow.is_stranger:
            self._look_at_stranger(inflow, now)
        received = kernel.received_bytes(descriptor)
        if inflow.cookie and inflow.cookie != kernel.cookie_of(descriptor):
            inflow.end_watch()
            inflow.base = received
        forgiven = int((now - inflow.looked_at) * INFLOW_FORGIVEN_BYTES_PER_S)
        inflow.looked_at = now
        inflow.base = min(received, inflow.base + forgiven)
        if inflow.cookie:
            inflow.held_base += forgiven
            self._look_at_watched(inflow, received, now)
        elif received - inflow.base > self._unwatched_bytes_max:
            cookie = kernel.cookie_of(descriptor)
            if cookie:
                inflow.begin_watch(received, cookie)
            else:
                inflow.base = received

    def _look_at_stranger(self, inflow: Inflow, now: float) -> None:
        kernel, descriptor = self._kernel, inflow.descriptor
        cookie = kernel.cookie_of(descriptor)
        if kernel.acknowledged_bytes(descriptor) > CURVE_REFUSAL_BYTES:
            inflow.is_stranger = False
        elif cookie != inflow.stranger_cookie:
            inflow.stranger_cookie, inflow.stranger_since = cookie, now
        elif now >= inflow.stranger_since + HANDSHAKE_S:
            # libzmq notices, and tells it as it does of whoever hangs up in a handshake.
            self._turn_cuts_count += 1
            kernel.cut(descriptor, cookie, inflow.link.port)

    def _look_at_watched(self, inflow: Inflow, received: int, now: float) -> None:
        link = inflow.link
        arrived = received - self._kernel.unread_bytes(inflow.descriptor)
        held_bytes = max(0, arrived - inflow.held_base - inflow.taken_bytes)
        self._unread_bytes += held_bytes - inflow.held_bytes
        inflow.held_bytes = held_bytes
        is_too_much = self._unread_bytes + self._left_bytes > self._unread_bytes_max
        if is_too_much and 0 < held_bytes * self._watched_count >= self._unread_bytes:
            self._unread_bytes -= held_bytes
            text = "others, before they could be taken: of all there were more than %d bytes"
            self._cut(inflow, now, "too_far_ahead", text, self._unread_bytes_max)
        elif inflow.is_too_far_ahead():
            text = "%d bytes before they could be taken"
            self._cut(inflow, now, "too_far_ahead", text, link.held_bytes_max)
        elif inflow.has_given:
            inflow.has_given = False
            inflow.base = received
        elif inflow.over_at < FOREVER:
            if inflow.is_surely_endless():
                text = "%d bytes of which no whole message could be taken"
                self._cut(inflow, now, "endless_message", text, link.whole_bytes_max)
        elif arrived - inflow.base > link.whole_bytes_max:
            inflow.over_at, inflow.over_count = now, link.taken_count
            # Has the socket looked at, also if nothing else comes by it.
            link.touch(link)

    def _cut(self, inflow: Inflow, now: float, kind: str, text: str, bytes_max: int) -> None:
        link = inflow.link
        if not self._kernel.cut(inflow.descriptor, inflow.cookie, link.port):
            return
        inflow.end_watch()
        del link.inflows[inflow.descriptor]
        self._exchange.drop(kind)
        if now >= self._warned_at + CROWDED_LOG_S:
            self._warned_at = now
            logger.warning(f"! %s: a peer was cut that sent more than {text}", link.endpoint, bytes_max)
