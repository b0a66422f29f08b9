"""A connection's socket, and what its monitor tells: that somebody is there, or why nobody lets us in.

Only events of a monitor tell why a handshake failed, and libzmq may make no other try then. So a refusal ends what
waits to be sent here, with the reason, and the link tries again some time later.

A link that breaks may be a network that was cut, or a process that was killed. On this machine the kernel knows: if
nobody listens there any more, what that process had ends at once, not at its deadline.

What must never happen here: a message given to a server that has not shown the key that was asked for, or to another
user's ipc socket.
"""

import errno
import logging
import time

import zmq

from ..destination import Destination
from ..errors import DestinationInvalid
from ..exchange import Exchange
from ..limits import (
    DESERTED_S,
    HANDSHAKE_FAILURES_MAX,
    HANDSHAKE_FAILURES_S,
    HELLO_S_MIN,
    OUTFLOW_LOOK_S,
    RETRY_S,
    Limits,
)
from ..message import Callback
from ..security import KeyPair, ServerKey
from ..wire import encode_identity
from .local import inproc_names, is_deserted, is_own_socket
from .outflow import Outflow
from .sockets import CURVE_WRAP_BYTES
from .zeromq import (
    BAD_PROTOCOL,
    CONNECTED,
    DOWN,
    HUNG_UP,
    NOBLOCK,
    NOT_ALLOWED,
    RCVMORE,
    SNDMORE_NOBLOCK,
    UP,
    SocketLink,
)

logger = logging.getLogger("messenger")


class ConnectionLink(SocketLink):
    """A DEALER that is connected to one endpoint.

    Args:
        keys: Ours and the server's, with which it speaks CURVE on tcp.
    """

    def __init__(
        self,
        routing_id: bytes,
        handle: object,
        callback: Callback | None,
        exchange: Exchange,
        limits: Limits,
        keys: tuple[KeyPair, ServerKey] | None = None,
    ) -> None:
        super().__init__(
            zmq.DEALER, CONNECTED | UP | DOWN | NOT_ALLOWED | BAD_PROTOCOL | HUNG_UP, handle, callback, exchange, limits
        )
        # A session's routing id is ZeroMQ's own and means nothing; in the basic dialect it is the identity.
        if routing_id:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.setsockopt(zmq.IPV6, 1)
        self._inproc_binding = 0
        self._keys = keys
        if keys is not None:
            self.wrap_bytes = CURVE_WRAP_BYTES
        # In the basic dialect.
        self._outflow = Outflow()
        self._outflow_bytes_max = limits.queue_bytes_max
        self._failure_count = 0
        self._hung_up_at = 0.0
        self._has_been_up = False
        # Whether somebody took a connection and did not say then that it speaks ZeroMQ.
        self._is_mute = False
        self._is_refused = False
        # Whether the link broke and libzmq connects again by itself.
        self._is_broken = False

    def _handle_news(self, event: int, value: int) -> None:
        if event == CONNECTED:
            self._is_mute = True
            self._end_inflows()
            if self.endpoint.startswith("tcp:"):
                self._begin_inflow(value)
            return
        if event == DOWN:
            self._end_inflow(value)
        if event == UP and self.endpoint.startswith("ipc:") and not (is_own := is_own_socket(self.endpoint)):
            self._detach()
            if is_own is None:
                self._exchange.revive_later(self, time.monotonic() + HELLO_S_MIN)
            else:
                self._take_refusal("the socket is not this user's, so whoever listens there gets nothing", True)
        elif event in (UP, DOWN):
            if event == UP:
                self._failure_count, self._hung_up_at, self._is_refused = 0, 0.0, False
                self._has_been_up, self._is_mute = True, False
            was_up = self.is_up
            self.note_up(event == UP)
            if event == UP:
                self._is_broken = False
            elif was_up and self.session is not None:
                # A refused handshake ends like this too, and libzmq may make no other try.
                self._is_broken = True
                self._exchange.revive_later(self, time.monotonic() + DESERTED_S)
        elif event == NOT_ALLOWED:
            key = self._keys[0].public if self._keys else ""
            self._take_refusal(f"our key {key} is not on the allow-list there", True)
        elif event == HUNG_UP and self._keys is not None:
            self._note_hung_up(self._keys[1].public)
        elif event == BAD_PROTOCOL and self._keys is not None:
            self._take_refusal(f"it does not speak CURVE, so it has not the key {self._keys[1].public}", True)
        elif event == BAD_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            text = "it lets in only who has a key: Security(key=…, servers=…), or --key and --server-key"
            self._take_refusal(text, True)

    def _note_hung_up(self, key: str) -> None:
        """The other end has closed the link in the handshake, and said nothing, as a server with another key does.

        So does one that is in trouble, or a proxy in front of one. It counts as a refusal if it goes on for a while,
        and if the key was never proven to be right.
        """
        now = time.monotonic()
        self._hung_up_at = self._hung_up_at or now
        self._failure_count += 1
        is_lasting = self._failure_count >= HANDSHAKE_FAILURES_MAX and now >= self._hung_up_at + HANDSHAKE_FAILURES_S
        if is_lasting and not self._has_been_up:
            text = f"it hung up {self._failure_count} times in the handshake, so it probably has not the key {key}"
            self._take_refusal(text, False)

    def _take_refusal(self, text: str, is_over: bool) -> None:
        """End what waits to be sent, and have another try later; libzmq itself makes none if it `is_over`."""
        if not self._is_refused:
            logger.warning("! %s refused a connection: %s", self.endpoint, text)
        self._is_refused = True
        self._is_broken = False
        self._exchange.handle_link_refused(self, text)
        if is_over:
            self._exchange.revive_later(self, time.monotonic() + RETRY_S)

    def revive(self) -> None:
        """Connect anew, unless that has happened meanwhile, or see whether there is anybody left to connect to."""
        if self._is_broken and is_deserted(self.endpoint):
            self._exchange.handle_deserted(self)
        elif not (self.is_up or self._is_broken):
            self.attach(self.endpoint)

    def why_unsent(self) -> str:
        """Return what is known of why its queue, or that of its session, did not leave, for people."""
        if self.is_up and self.session is None:
            return "who is there does not read what it is sent"
        if self.is_up:
            return "who is there did not answer as a messenger does: it is another program, or busy in a callback"
        if self._is_mute:
            return f"what takes connections at {self.endpoint} did not answer as ZeroMQ does, or is a stopped process"
        if self.endpoint.startswith("tcp:") and (name := Destination.parse(self.endpoint).unresolved_name()):
            return f"nobody was there to take it, or the name {name!r} does not resolve"
        return super().why_unsent()

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        """Return whether the server may have an identity: that which its key was given with, if there was one."""
        name = self._keys[1].name if self._keys is not None and self.endpoint.startswith("tcp:") else ""
        return not name or identity == encode_identity(name)

    def _is_up_now(self) -> bool:
        """Read what the monitor has, without telling anybody."""
        states = [event == UP for event, _ in self._monitor.read() if event in (UP, DOWN)]
        return states[-1] if states else self.is_up

    def attach(self, endpoint: str) -> None:
        """Connect to an endpoint, in place of the present one if there is one; what is queued here goes there.

        Raises:
            DestinationInvalid: ZeroMQ cannot use the endpoint.
        """
        self._detach()
        self.endpoint = endpoint
        if endpoint.startswith("inproc:"):
            # No monitor tells of inproc; the names that are bound do.
            self._inproc_binding = inproc_names.binding(endpoint)
            if not self._inproc_binding:
                return
        self._take_keys(endpoint.startswith("tcp:"))
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise DestinationInvalid(f"cannot connect to {endpoint}: {error}") from error
        if self._inproc_binding:
            self.note_up(True)

    def _take_keys(self, is_tcp: bool) -> None:
        """Speak CURVE from the next connect on, or do not."""
        if self._keys is None:
            return
        own, server = self._keys
        if is_tcp:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, server.public.encode())
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public.encode())
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, own.reveal())
        else:
            self.socket.setsockopt(zmq.CURVE_SERVER, 0)  # This unsets the mechanism.

    def _detach(self) -> None:
        # To disconnect would throw away what an inproc listener that is gone has sent, its goodbye too.
        self._busy = bool(self._inproc_binding)
        while self._busy:
            self.receive()
        if self.endpoint and (self._inproc_binding or not self.endpoint.startswith("inproc:")):
            try:
                self.socket.disconnect(self.endpoint)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:  # An inproc link is gone already when its listener is.
                    raise
        self._inproc_binding = 0
        self._is_broken = False
        self._end_inflows()  # libzmq does not tell of an end that we asked for.
        if self.is_up:
            self.note_up(False)

    def _end_inflows(self) -> None:
        for descriptor in list(self.inflows):
            self._end_inflow(descriptor)

    def must_attach(self) -> bool:
        """Return whether the present endpoint leads nowhere, so that it is time to choose again."""
        if self.endpoint.startswith("inproc:"):
            return self._inproc_binding != inproc_names.binding(self.endpoint) or not self._inproc_binding
        return not self.is_up

    def _receive_one(self) -> None:
        first = self.socket.recv(NOBLOCK, copy=False)
        if self.watched:
            self._note_taken(first)
        if self.session is not None:
            self._receive_session(b"", first)
        elif not first.more:
            self._exchange.drop("malformed_frames")
        elif self.socket.recv(NOBLOCK) != b"" or not self.socket.getsockopt(RCVMORE):
            self._drop_rest("malformed_frames")
        else:
            if self.watched:
                self._count_frame(0)
            self._receive_last(first.bytes)

    def flush(self, now: float) -> None:
        """Give the queue to ZeroMQ, as far as it takes it; the descriptor tells when somebody comes."""
        queue = self.queue
        while queue and self.is_up:
            if self._outflow.held_bytes() >= self._outflow_bytes_max or not self._send_plain(queue[0].whole()):
                # Whoever is there does not read; libzmq does not tell when it has room again.
                self._exchange.look_at = min(self._exchange.look_at, now + OUTFLOW_LOOK_S)
                return
            self.queue_bytes -= queue.popleft().size_bytes

    def _send_plain(self, data: bytes) -> bool:
        self.touch(self)
        try:
            self._send(b"", SNDMORE_NOBLOCK)
        except zmq.Again:
            return False
        given = self._outflow.add(data)
        self._send(given, NOBLOCK, given is data)
        return True
