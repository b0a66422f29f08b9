"""ZeroMQ sockets as links of the core: what those of connections and listeners have in common.

A connection is a DEALER (`connection.py`), a listener a ROUTER for each of its endpoints (`listener.py`). All calls are
made under the messenger's lock, by any thread.

The traps of ZeroMQ that this file is about:

* Its descriptor is edge-triggered: after every send or receive the events must be read again before anybody sleeps on
  it. A link that was used tells the loop by `touch`; `has_input` reads them.
* A check costs more than a message, so a quiet link takes one message and then checks once; a busy link takes many
  before that.
* A ROUTER drops what it cannot route unless it is MANDATORY, and then it raises for one peer; that never stops others.
* A DEALER takes messages while nobody is there. With IMMEDIATE it does not, but then it throws away what it has
  received when its link breaks. So a monitor tells when somebody is there; until then messages wait in our own queue.

Source: docs/protocol.md, "Basic dialect".
"""

import errno
import logging
import time
from collections.abc import Callable as Function
from collections.abc import Sequence
from functools import partial

import zmq
from zmq.backend import zmq_poll

from ..exchange import Exchange
from ..limits import (
    BATCH_FRAME_BYTES_MAX,
    BATCH_MSGS_MAX,
    HANDSHAKE_S,
    HEADER_BYTES_MAX,
    LARGE_BYTES_MIN,
    LOOK_S,
    TURN_DROPPED_FRAMES_MAX,
    TURN_MSGS_MAX,
    TURN_NEWS_MAX,
    Limits,
)
from ..link import FOREVER, Link
from ..message import Callback
from .inflow import Inflow
from .sockets import POLLIN, Monitor, context
from .wakeup import check_descriptors

logger = logging.getLogger("messenger")
# libzmq takes milliseconds in 31 bits.
LINGER_S_MAX = 1_000_000.0
NOBLOCK = int(zmq.NOBLOCK)
SNDMORE_NOBLOCK = int(zmq.SNDMORE | zmq.NOBLOCK)
RCVMORE = zmq.RCVMORE
ACCEPTED, CONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_CONNECTED)
UP, DOWN = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_DISCONNECTED)
NOT_ALLOWED, BAD_PROTOCOL, HUNG_UP = (
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH),
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL),
)
# Beyond twice the largest message, and the largest batch, libzmq cuts the peer off itself; up to there we drop the
# message and count it.
FRAME_BYTES_FACTOR = 2


def _touch_nothing(link: "SocketLink") -> None:
    """Stand in until a loop has adopted the link."""


class SocketLink(Link):
    """What a DEALER and a ROUTER have in common.

    Attributes:
        endpoint: What it is bound or connected to.
        is_up: Whether somebody may be there to take a message.
        descriptor, monitor_descriptor: Readable when there may be input, or news of the link.
        inflows: What came by its tcp connections, by descriptor.
        watched: Those of which each message must be noticed.
        taken_count: Messages that were taken while there were any such.
        emptied_at: When there was nothing to take, the last time while there were any such.
        left_bytes: What waited of connections that have ended; 0 again when there is nothing to take.
        whole_bytes_max: More than all frames of a message together may have.
        held_bytes_max: More than may wait here of what one connection has sent.
        wrap_bytes: What each frame has on the wire beside its contents and their length.
    """

    wrap_bytes = 0

    def __init__(
        self, kind: int, events: int, handle: object, callback: Callback | None, exchange: Exchange, limits: Limits
    ) -> None:
        super().__init__(handle, callback)
        self.endpoint = ""
        self.is_up = False
        self._exchange = exchange
        self._busy = False
        # Whether the monitor may have more to tell.
        self._has_news = False
        # Whether frames of a message that goes no further are still to be taken off the socket.
        self._is_dropping = False
        # Set by the loop: has the events read before anybody sleeps.
        self.touch: Function[[SocketLink], None] = _touch_nothing
        self._frame_bytes_max = limits.message_bytes_max + HEADER_BYTES_MAX
        zmq_bytes_max = max(FRAME_BYTES_FACTOR * self._frame_bytes_max, BATCH_FRAME_BYTES_MAX)
        # A session's message is a batch, or one large message and a header.
        self.whole_bytes_max = zmq_bytes_max + BATCH_FRAME_BYTES_MAX
        self.held_bytes_max = self.whole_bytes_max + max(limits.queue_bytes_max, limits.window_bytes)
        self.inflows: dict[int, Inflow] = {}
        self.watched: dict[int, Inflow] = {}
        # Whose frames are being taken, if it is watched.
        self._giver: Inflow | None = None
        self.taken_count = self.left_bytes = 0
        self.emptied_at = 0.0
        check_descriptors()
        self.socket = context().socket(kind)
        options = {
            zmq.LINGER: 0,
            # ZeroMQ's marks bound only what a plain peer can make us hold; they are in messages, a peer each. A session
            # must never reach them, its window is what bounds it.
            zmq.SNDHWM: limits.queue_msgs_max + 2 * limits.window_msgs,
            # No mark: the process aborts if a connection breaks while libzmq does not read for it. `inflow.py` bounds
            # what is held. Nor may it be set later, which crashes libzmq.
            zmq.RCVHWM: 0,
            zmq.MAXMSGSIZE: zmq_bytes_max,
            zmq.HANDSHAKE_IVL: int(HANDSHAKE_S * 1000),
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 500,
            zmq.CONNECT_TIMEOUT: 3_000,
            zmq.BACKLOG: 1_024,
            # A cut link is noticed within 3.3 s, the first two together. libzmq answers while a callback runs.
            zmq.HEARTBEAT_IVL: 1_000,
            zmq.HEARTBEAT_TIMEOUT: 2_300,
            zmq.HEARTBEAT_TTL: 2_300,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        # pyzmq's own `send` first looks at arguments for draft sockets, which costs as much as to send.
        self._send = partial(zmq.backend.Socket.send, self.socket)
        self._poll_items = [(self.socket, POLLIN)]
        self.descriptor: int = self.socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._monitor = Monitor(self.socket, events)
        self.monitor_descriptor = self._monitor.descriptor

    @property
    def port(self) -> int:
        """The port of tcp that is bound or connected to."""
        return int(self.endpoint.rpartition(":")[2])

    def has_input(self) -> bool:
        """Read the socket's events, as must be done before anybody sleeps on its descriptor."""
        # As `getsockopt(EVENTS)`, which takes twice as long: pyzmq makes an enumeration of each option asked for.
        self._busy = bool(zmq_poll(self._poll_items, 0))
        if not self._busy and (self.watched or self.left_bytes):
            self._note_empty()
        return self._busy or self._has_news

    def read_news(self) -> None:
        """Take some of what the monitor tells; thousands of peers may come or go at once, and others wait."""
        news = self._monitor.read(TURN_NEWS_MAX)
        for event, value in news:
            self._handle_news(event, value)
        self._has_news = len(news) == TURN_NEWS_MAX
        if self._has_news:
            self.touch(self)

    def _handle_news(self, event: int, value: int) -> None:
        """Take one event of the monitor."""

    def _begin_inflow(self, descriptor: int) -> None:
        """Look from now on how much comes by a tcp connection."""
        self._end_inflow(descriptor)
        now = time.monotonic()
        self.inflows[descriptor] = Inflow(self, descriptor, now)
        if self._exchange.look_at == FOREVER:
            self._exchange.look_at = now + LOOK_S

    def _end_inflow(self, descriptor: int) -> None:
        """The connection has ended."""
        inflow = self.inflows.pop(descriptor, None)
        if inflow is not None:
            self.left_bytes += inflow.held_bytes + inflow.unseen_bytes
            inflow.end_watch()

    def _note_empty(self) -> None:
        """There is nothing to take: so of those that have given a message nothing waits, but for a part of the next."""
        self.emptied_at = time.monotonic()
        self.left_bytes = 0
        for inflow in list(self.watched.values()):
            if inflow.taken_bytes:
                inflow.end_watch()

    def _note_taken(self, frame: zmq.Frame) -> None:
        """Note by which connection a message came, by its first frame."""
        self.taken_count += 1
        self._giver = None
        try:
            inflow = self.watched.get(frame.get(zmq.SRCFD))
        except zmq.ZMQError:
            # libzmq does not tell it for peers older than ZMTP 3. It may be any that is watched, and who is honest must
            # not be cut; the price is that an old peer's messages shield an endless one at the same socket.
            for watched in list(self.watched.values()):
                watched.end_watch()
            return
        if inflow is not None:
            self._giver = inflow
            inflow.note_message()
            self._count_frame(len(frame))

    def _count_frame(self, size: int) -> None:
        """Note that a frame was taken off the socket, as long as anybody is watched."""
        if self._giver is not None:
            wrapped = size + self.wrap_bytes
            self._giver.note_frame(wrapped + (2 if wrapped < 256 else 9))

    def note_up(self, is_up: bool) -> None:
        """Note that somebody is there now, or that nobody is."""
        self.is_up = is_up
        handshake = self._exchange.handshake
        if self.session is None:
            self._exchange.mark_dirty(self)
        elif is_up:
            handshake.handle_link_up(self, time.monotonic())
        else:
            handshake.handle_link_down(self)

    def receive(self) -> None:
        """Give what has arrived to the exchange: one message if the link was quiet, many if it was busy."""
        if self._has_news:
            self.read_news()
        for _ in range(TURN_MSGS_MAX if self._busy else 1):
            if self._is_dropping:
                self._drop_frames()
                return
            try:
                self._receive_one()
            except zmq.Again:
                self._busy = False
                return

    def _receive_one(self) -> None:
        raise NotImplementedError

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        """Send one ZeroMQ message, to a peer of a listener or by a connection; return False if there is no way."""
        if not self.is_up:
            return False
        send = self._send
        self.touch(self)
        last = frames[-1]
        try:
            if routing_id:
                send(routing_id, SNDMORE_NOBLOCK)
            if len(frames) > 1:
                for frame in frames[:-1]:
                    send(frame, SNDMORE_NOBLOCK, len(frame) < LARGE_BYTES_MIN)
            send(last, NOBLOCK, len(last) < LARGE_BYTES_MIN)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return False
        return True

    def _receive_session(self, routing_id: bytes, first: zmq.Frame) -> None:
        """Take the frames behind a session's first frame, and give all to the exchange."""
        extra: list[bytes] = []
        if first.more:
            while self.socket.getsockopt(RCVMORE):
                if len(extra) == BATCH_MSGS_MAX:
                    self._drop_rest("malformed_frames")
                    return
                extra.append(self.socket.recv(NOBLOCK))
                if self.watched:
                    self._count_frame(len(extra[-1]))
        self._exchange.handshake.receive(self, routing_id, first.bytes, extra, time.monotonic())

    def _receive_last(self, peer: bytes) -> None:
        """Take the frame that must be a message's last, and drop the message if it is not."""
        data = self.socket.recv(NOBLOCK)
        if self.watched:
            self._count_frame(len(data))
        if self.socket.getsockopt(RCVMORE):
            self._drop_rest("malformed_frames")
        elif len(data) > self._frame_bytes_max:
            self._exchange.drop("message_too_large")
        else:
            self._exchange.receive(self, peer, data)

    def _drop_rest(self, kind: str) -> None:
        self._exchange.drop(kind)
        self._drop_frames()

    def _drop_frames(self) -> None:
        """Take frames of a dropped message off the socket, so many that others have their turn in between."""
        for _ in range(TURN_DROPPED_FRAMES_MAX):
            if not self.socket.getsockopt(RCVMORE):
                self._is_dropping = False
                return
            data = self.socket.recv(NOBLOCK)
            if self.watched:
                self._count_frame(len(data))
        self._is_dropping = True

    def close(self, linger_s: float) -> None:
        """Close the socket; wait at most `linger_s` until what was given to it is sent and its endpoints are free."""
        self._monitor.wait_stop(self.begin_close(linger_s))
        self.end_close()

    def begin_close(self, linger_s: float) -> float:
        """Close the socket; return how many seconds to wait at most until it has stopped, and then to end the close."""
        # Where nobody is, nothing can be flushed to.
        linger_ms = int(min(linger_s, LINGER_S_MAX) * 1000) if self._is_up_now() else 0
        self.socket.close(linger=linger_ms)
        # An inproc socket stops only when its peers have noticed, which this thread may have to do for them.
        return 0.0 if self.endpoint.startswith("inproc:") else linger_ms / 1000 + 0.05

    def has_stopped(self) -> bool:
        """Return whether what was given to the closed socket is sent and its endpoint is free."""
        return self._monitor.has_stopped()

    def end_close(self) -> None:
        """Let go of what only the open socket needed."""
        self._monitor.close()

    def _is_up_now(self) -> bool:
        return self.is_up
