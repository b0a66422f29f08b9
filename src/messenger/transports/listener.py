"""A listener's socket: who comes and goes, and what is given to plain peers.

What must never happen here: one peer that holds up another, or takes all descriptors.

Source: docs/protocol.md, "Basic dialect".
"""

import contextlib
import errno
import logging
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import zmq

from ..errors import DestinationInUse, DestinationInvalid, MessengerError
from ..exchange import Exchange
from ..limits import CROWDED_LOG_S, CUT_IDS_MAX, ROUTING_ID_BYTES_MAX, Limits
from ..link import Link
from ..message import Callback
from ..outgoing import Outgoing
from .local import IpcLock, inproc_names
from .outflow import Outflows
from .sockets import cut, scramble_routing_ids
from .zeromq import ACCEPTED, BAD_PROTOCOL, DOWN, HUNG_UP, NOBLOCK, SNDMORE_NOBLOCK, SocketLink

logger = logging.getLogger("messenger")
# Of all messengers of the process, which share its descriptors.
_tcp_listeners: "set[ListenerLink]" = set()


class ListenerLink(SocketLink):
    """A ROUTER that is bound to one endpoint."""

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        handle: object,
        callback: Callback | None,
        exchange: Exchange,
        limits: Limits,
    ) -> None:
        """Bind.

        Raises:
            DestinationInUse, DestinationInvalid: Nothing is left open.
        """
        is_tcp = endpoint.startswith("tcp:")
        scramble_routing_ids()
        super().__init__(
            zmq.ROUTER, ACCEPTED | DOWN | BAD_PROTOCOL | HUNG_UP if is_tcp else 0, handle, callback, exchange, limits
        )
        self.is_shared = True
        self._warned_at = -CROWDED_LOG_S
        self._limits = limits
        # Hashes of the routing ids whose connections were cut last.
        self._cut: set[int] = set()
        self._outflows = Outflows()
        # The routing ids of plain peers that do not have their identity as routing id (transports/curve.py).
        self._routing_ids: dict[bytes, bytes] = {}
        self._ipc_lock: IpcLock | None = None
        try:
            if endpoint.startswith("ipc:"):
                self._ipc_lock = IpcLock(Path(endpoint.removeprefix("ipc://")))
            self.is_up = True
            self.identity = identity
            self._set_options(endpoint, is_tcp)
            self._guard(endpoint)
            self._bind(endpoint)
            if is_tcp:
                _tcp_listeners.add(self)
        except MessengerError:
            super().close(0)
            raise
        except (zmq.ZMQError, OSError) as error:
            super().close(0)
            if self._ipc_lock is not None:
                self._ipc_lock.release()
            if error.errno == errno.EADDRINUSE:
                raise DestinationInUse(f"{endpoint}: another listener has it") from error
            raise DestinationInvalid(f"cannot listen on {endpoint}: {error}") from error
        if endpoint.startswith("inproc:"):
            inproc_names.add(endpoint)

    def _set_options(self, endpoint: str, is_tcp: bool) -> None:
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A heartbeat at a connection that libzmq has stopped to read aborts the process, so only connections send them,
        # and say how long to wait for the next. The kernel tells of plain peers over tcp that are cut off.
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
        if is_tcp:
            for option in (zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_KEEPALIVE_INTVL):
                self.socket.setsockopt(option, 1)
            self.socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
            self.socket.setsockopt(zmq.TCP_MAXRT, 2_300)
        else:
            # Only this user's processes come here, and a slow listener slows them down.
            self.socket.setsockopt(zmq.RCVHWM, self._limits.queue_msgs_max)
        # With it, libzmq shows IPv4 addresses in the form of IPv6.
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))

    def _guard(self, endpoint: str) -> None:
        """Set what says who may connect and be whom, before the socket is bound."""
        # A plain peer that restarts under its routing id is served at once, even if its old link is not known dead.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if endpoint.startswith("ipc:"):
            # Beside the modes of the folder and of the file, which somebody may change.
            self.socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())

    def _handle_news(self, event: int, value: int) -> None:
        """Count the connections of peers, and cut those that are too many."""
        if event == DOWN:
            self._end_inflow(value)
        elif event == ACCEPTED:
            self._begin_inflow(value)
            all_count = sum(len(link.inflows) for link in list(_tcp_listeners))
            if (
                len(self.inflows) > self._limits.peer_connections_max
                or all_count > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
            ):
                self._exchange.drop("too_many_connections")
                cut(value, self.port)
                self._warn_crowded()
            elif self.left_bytes > self._limits.unread_bytes_max:
                # Those that came and went have left so much; it is not known whose this one will be.
                self._exchange.drop("too_far_ahead")
                cut(value, self.port)
        else:
            self._exchange.drop("failed_handshakes")

    def _warn_crowded(self) -> None:
        """Say once a minute that connections are cut."""
        now = time.monotonic()
        if now >= self._warned_at + CROWDED_LOG_S:
            self._warned_at = now
            logger.warning(
                "! %s: too many connections, the newest are cut; limits.peer_connections_max allows %d, and half of "
                "ulimit -n those of all listeners here",
                self.endpoint,
                self._limits.peer_connections_max,
            )

    def _bind(self, endpoint: str) -> None:
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT).strip(b"\0").decode()  # type: ignore[union-attr]
        if self._ipc_lock is not None:
            # Its folder is ours alone, or the user's own choice; in either case only this user may connect.
            Path(endpoint.removeprefix("ipc://")).chmod(0o600)

    def siblings(self) -> Iterable[Link]:
        """Return all links of the listener."""
        return self.handle.links  # type: ignore[no-any-return]

    def _receive_one(self) -> None:
        socket = self.socket
        peer = socket.recv(NOBLOCK)
        # A frame of pyzmq knows whether more follow. To make one costs less than to ask the socket.
        first = socket.recv(NOBLOCK, copy=False)
        if self.watched:
            self._note_taken(first)
        if len(peer) > ROUTING_ID_BYTES_MAX:
            self._refuse_routing_id(peer, first)
        elif len(first):
            self._receive_session(peer, first)
        elif not first.more:
            self._exchange.drop("malformed_frames")
        else:
            self._receive_last(peer)

    def _refuse_routing_id(self, routing_id: bytes, first: zmq.Frame) -> None:
        """Cut a peer whose routing id is longer than ZeroMQ's own sockets allow.

        libzmq takes one of any size, and copies it for each message; so the turn ends here, and others have theirs.
        """
        self._exchange.drop("malformed_frames")
        self._is_dropping = True
        if self.endpoint.startswith("tcp:"):
            self._cut_once(routing_id, first)

    def _cut_once(self, routing_id: bytes, frame: zmq.Frame) -> None:
        """Cut the connection that a frame came by, but not whoever has its descriptor when the next frame is taken."""
        mark = hash(routing_id)
        if mark not in self._cut:
            if len(self._cut) >= CUT_IDS_MAX:
                self._cut.clear()
            self._cut.add(mark)
            with contextlib.suppress(zmq.ZMQError):  # Peers older than ZMTP 3, of which libzmq does not tell.
                cut(int(frame.get(zmq.SRCFD)), self.port)

    def flush(self, now: float) -> None:
        """Give the queue to ZeroMQ; what it refuses goes back to the exchange."""
        queue = self.queue
        send, routing_ids = self.socket.send, self._routing_ids
        if queue:
            self.touch(self)
        while queue:
            outgoing: Outgoing = queue.popleft()
            self.queue_bytes -= outgoing.size_bytes
            data = outgoing.whole()
            peer = outgoing.peer
            outflow = self._outflows.of(peer)
            if outflow.held_bytes() >= self._limits.queue_bytes_max:
                self._exchange.handle_unsendable(self, outgoing, "peer_full")
                continue
            try:
                send(routing_ids.get(peer, peer), SNDMORE_NOBLOCK)
            except zmq.Again:
                self._exchange.handle_unsendable(self, outgoing, "peer_full")
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                self._exchange.handle_unsendable(self, outgoing, "peer_gone")
            else:
                send(self.identity, SNDMORE_NOBLOCK)
                send(b"", SNDMORE_NOBLOCK)
                given = outflow.add(data)
                send(given, NOBLOCK, copy=given is data)

    def begin_close(self, linger_s: float) -> float:
        """Close the socket."""
        if self.endpoint.startswith("inproc:"):
            # Frees the name at once; after a close libzmq's own thread would do that some time later.
            self.socket.unbind(self.endpoint)
        return super().begin_close(linger_s)

    def end_close(self) -> None:
        """Free the endpoint for others."""
        super().end_close()
        _tcp_listeners.discard(self)
        if self.endpoint.startswith("inproc:"):
            inproc_names.remove(self.endpoint)
        if self._ipc_lock is not None:
            self._ipc_lock.release()
