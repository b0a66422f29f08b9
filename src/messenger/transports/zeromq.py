"""ZeroMQ sockets as links of the core, in the basic dialect.

A connection is a DEALER, a listener a ROUTER for each of its endpoints. All calls are made under the messenger's
lock, by any thread.

The traps of ZeroMQ that this file is about (numbers of the project's measurements in docs/design.md):

* Its descriptor is edge-triggered: after every send or receive the events must be read again before anybody sleeps on
  it. A link that needs that is `touched`; `has_input` reads them.
* A check costs more than a message, so a quiet link takes one message and then checks once; a busy link takes many
  and checks never.
* A ROUTER drops what it cannot route unless it is MANDATORY, and then it raises for one peer; that never stops the
  others.
* A DEALER takes messages for nobody unless it is IMMEDIATE; ours waits in our own queue, so that "not delivered" is
  certain.
* A socket is really closed, and its port free, only when its monitor says that it stopped.

Source: docs/protocol.md, "Basic dialect".
"""

import errno
import os
import threading
from pathlib import Path

import zmq

from ..errors import DestinationInUse, DestinationInvalid
from ..exchange import Callback, Exchange, Link, Outgoing
from ..limits import HEADER_BYTES_MAX, SOCKETS_MAX, TURN_MSGS_MAX, ZERO_COPY_BYTES_MIN, Limits
from .local import IpcLock, inproc_names

NOBLOCK = int(zmq.NOBLOCK)
SNDMORE_NOBLOCK = int(zmq.SNDMORE | zmq.NOBLOCK)
RCVMORE = zmq.RCVMORE
# Beyond twice the largest message libzmq cuts the peer off itself; up to there we drop the message and count it.
FRAME_BYTES_FACTOR = 2

_context: zmq.Context[zmq.Socket[bytes]] | None = None
_context_lock = threading.Lock()


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the context of this process, made at first use: inproc reaches only within one context."""
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context(io_threads=1)
            _context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        return _context


def _forget_context() -> None:
    """Drop the parent's context in the child of a fork: its threads do not exist here."""
    global _context, _context_lock
    _context = None
    _context_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_context)


class SocketLink(Link):
    """What a DEALER and a ROUTER have in common."""

    def __init__(self, kind: int, owner: object, callback: Callback | None, exchange: Exchange, limits: Limits) -> None:
        super().__init__(owner, callback)
        self._exchange = exchange
        self._busy = False
        self._frame_bytes_max = limits.message_bytes_max + HEADER_BYTES_MAX
        self.socket = context().socket(kind)
        options = {
            zmq.LINGER: 0,
            # ZeroMQ's marks bound only what a plain peer can make us hold; they are in messages, a peer each.
            zmq.SNDHWM: limits.queue_msgs_max,
            zmq.RCVHWM: limits.queue_msgs_max,
            zmq.MAXMSGSIZE: FRAME_BYTES_FACTOR * self._frame_bytes_max,
            zmq.HANDSHAKE_IVL: 5_000,
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 500,
            zmq.CONNECT_TIMEOUT: 3_000,
            zmq.BACKLOG: 1_024,
            # A cut link is noticed within two heartbeats and a bit. libzmq answers them while a callback runs.
            zmq.HEARTBEAT_IVL: 1_000,
            zmq.HEARTBEAT_TIMEOUT: 3_000,
            zmq.IPV6: 1,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        self.descriptor: int = self.socket.getsockopt(zmq.FD)  # type: ignore[assignment]

    def has_input(self) -> bool:
        """Read the socket's events, as must be done before anybody sleeps on its descriptor."""
        self._busy = bool(self._events() & zmq.POLLIN)
        return self._busy

    def _events(self) -> int:
        return self.socket.getsockopt(zmq.EVENTS)  # type: ignore[return-value]

    def receive(self) -> None:
        """Give what has arrived to the exchange: one message if the link was quiet, many if it was busy."""
        for _ in range(TURN_MSGS_MAX if self._busy else 1):
            try:
                self._receive_one()
            except zmq.Again:
                self._busy = False
                return

    def _receive_one(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Give the queue to ZeroMQ, as far as it takes it."""
        raise NotImplementedError

    def _receive_last(self, peer: bytes) -> None:
        """Take the frame that must be a message's last, and drop the message if it is not."""
        data = self.socket.recv(NOBLOCK)
        if self.socket.getsockopt(RCVMORE):
            self._drop_rest("malformed_frames")
        elif len(data) > self._frame_bytes_max:
            self._exchange.drop("message_too_large")
        else:
            self._exchange.receive(self, peer, data)

    def _drop_rest(self, kind: str) -> None:
        while self.socket.getsockopt(RCVMORE):
            self.socket.recv(NOBLOCK)
        self._exchange.drop(kind)

    def close(self, linger_s: float) -> None:
        """Close the socket; wait at most `linger_s` until what was given to it is sent and its endpoints are free."""
        endpoint = f"inproc://monitor-{id(self)}"
        self.socket.monitor(endpoint, zmq.EVENT_MONITOR_STOPPED)
        with context().socket(zmq.PAIR) as monitor:
            monitor.setsockopt(zmq.LINGER, 0)
            monitor.connect(endpoint)
            self.socket.close(linger=int(linger_s * 1000))
            monitor.poll(int(linger_s * 1000) + 50)


class ConnectionLink(SocketLink):
    """A DEALER that is connected to one endpoint."""

    def __init__(
        self,
        endpoint: str,
        routing_id: bytes,
        owner: object,
        callback: Callback | None,
        exchange: Exchange,
        limits: Limits,
    ) -> None:
        super().__init__(zmq.DEALER, owner, callback, exchange, limits)
        self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.endpoint = ""
        self._inproc_binding = 0
        self.attach(endpoint)

    def attach(self, endpoint: str) -> None:
        """Connect to an endpoint, in place of the present one if there is one; what is queued here goes there.

        Raises:
            DestinationInvalid: ZeroMQ cannot use the endpoint.
        """
        self._detach()
        self.endpoint = endpoint
        if endpoint.startswith("inproc:"):
            # libzmq would queue for an inproc name that nobody has bound, whatever IMMEDIATE says.
            self._inproc_binding = inproc_names.binding(endpoint)
            if not self._inproc_binding:
                return
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise DestinationInvalid(f"cannot connect to {endpoint}: {error}") from error

    def _detach(self) -> None:
        if self.endpoint and (self._inproc_binding or not self.endpoint.startswith("inproc:")):
            try:
                self.socket.disconnect(self.endpoint)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:  # An inproc link is gone already when its listener is.
                    raise
        self._inproc_binding = 0

    def must_attach(self) -> bool:
        """Return whether the present endpoint leads nowhere, so that it is time to choose again."""
        if self.endpoint.startswith("inproc:"):
            return self._inproc_binding != inproc_names.binding(self.endpoint) or not self._inproc_binding
        return not self._events() & zmq.POLLOUT

    def _receive_one(self) -> None:
        peer = self.socket.recv(NOBLOCK)
        if not self.socket.getsockopt(RCVMORE):
            self._exchange.drop("malformed_frames")
        elif self.socket.recv(NOBLOCK) != b"" or not self.socket.getsockopt(RCVMORE):
            self._drop_rest("malformed_frames")
        else:
            self._receive_last(peer)

    def flush(self) -> None:
        """Give the queue to ZeroMQ, as far as it takes it."""
        queue = self.queue
        send = self.socket.send
        while queue:
            data = queue[0].data
            try:
                send(b"", SNDMORE_NOBLOCK)
            except zmq.Again:
                return  # Nobody is there. The descriptor tells when that changes.
            send(data, NOBLOCK, copy=len(data) < ZERO_COPY_BYTES_MIN)
            queue.popleft()
            self.queue_bytes -= len(data)


class ListenerLink(SocketLink):
    """A ROUTER that is bound to one endpoint."""

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        owner: object,
        callback: Callback | None,
        exchange: Exchange,
        limits: Limits,
    ) -> None:
        """Bind.

        Raises:
            DestinationInUse, DestinationInvalid: Nothing is left open.
        """
        self._identity = identity
        self._ipc_lock = IpcLock(Path(endpoint.removeprefix("ipc://"))) if endpoint.startswith("ipc:") else None
        super().__init__(zmq.ROUTER, owner, callback, exchange, limits)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A plain peer that restarts under its routing id is served at once, even if its old link is not known dead yet.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._bind(endpoint)
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            if self._ipc_lock is not None:
                self._ipc_lock.release()
            if error.errno == errno.EADDRINUSE:
                raise DestinationInUse(f"{endpoint}: another listener has it") from error
            raise DestinationInvalid(f"cannot listen on {endpoint}: {error}") from error
        self.endpoint: str = self.socket.getsockopt(zmq.LAST_ENDPOINT).strip(b"\0").decode()  # type: ignore[union-attr]
        if endpoint.startswith("inproc:"):
            inproc_names.add(endpoint)

    def _bind(self, endpoint: str) -> None:
        self.socket.bind(endpoint)
        if self._ipc_lock is None:
            return
        # Its folder is ours alone, or the user's own choice; in either case only this user may connect.
        Path(endpoint.removeprefix("ipc://")).chmod(0o600)

    def _receive_one(self) -> None:
        socket = self.socket
        peer = socket.recv(NOBLOCK)
        first = socket.recv(NOBLOCK)
        if first != b"":
            self._drop_rest("unknown_header")
        elif not socket.getsockopt(RCVMORE):
            self._exchange.drop("malformed_frames")
        else:
            self._receive_last(peer)

    def flush(self) -> None:
        """Give the queue to ZeroMQ; what it refuses goes back to the exchange."""
        queue = self.queue
        send = self.socket.send
        while queue:
            outgoing: Outgoing = queue.popleft()
            data = outgoing.data
            self.queue_bytes -= len(data)
            try:
                send(outgoing.peer, SNDMORE_NOBLOCK)
            except zmq.Again:
                self._exchange.handle_unsendable(self, outgoing, "peer_full")
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                self._exchange.handle_unsendable(self, outgoing, "peer_gone")
            else:
                send(self._identity, SNDMORE_NOBLOCK)
                send(b"", SNDMORE_NOBLOCK)
                send(data, NOBLOCK, copy=len(data) < ZERO_COPY_BYTES_MIN)

    def close(self, linger_s: float) -> None:
        """Close the socket and free its endpoint for others."""
        if self.endpoint.startswith("inproc:"):
            # An inproc socket stops only when its peers have noticed, which this thread may have to do for them.
            self.socket.close(linger=0)
            inproc_names.remove(self.endpoint)
            return
        super().close(linger_s)
        if self._ipc_lock is not None:
            self._ipc_lock.release()
