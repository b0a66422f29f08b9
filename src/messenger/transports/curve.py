"""A listener's tcp socket where only those are let in whose key is on the allow-list.

libzmq checks the key once, in the handshake (`zap.py`); here every ZeroMQ message is checked again, since it carries
the name of the connection that it came by, which begins with its key. The same name is the routing id that the
connection was given, whatever its peer has chosen, and the core's label of it. So nobody can show the routing id of
another connection, and the core asks `may_speak_for` whenever a session begins, or moves to another connection.

A plain peer is known to the core by the identity of its key; if several connections of plain peers have the same, the
others by that with `#2`, `#3`, … behind it, as long as they last.

What must never happen here: a frame that reaches the core without a key that is on the list now.
"""

from typing import Any

import zmq

from ..limits import NAMES_PER_KEY_MAX
from ..wire import encode_identity
from .sockets import CURVE_WRAP_BYTES, cut
from .zap import Gate, key_in
from .zeromq import BAD_PROTOCOL, NOBLOCK, ListenerLink


class CurveListenerLink(ListenerLink):
    """A ROUTER on tcp that speaks CURVE and nothing else.

    Args:
        gate: Whom it asks.
        others: As `ListenerLink` takes them.
    """

    wrap_bytes = CURVE_WRAP_BYTES

    def __init__(self, gate: Gate, *others: Any) -> None:
        self._gate = gate
        # Of plain peers: who each connection is, and the connection of each descriptor.
        self._peers: dict[bytes, bytes] = {}
        self._plain: dict[int, bytes] = {}
        super().__init__(*others)

    def _guard(self, endpoint: str) -> None:
        # Nobody may take the routing id of a peer that is there.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, self._gate.key.public.encode())
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, self._gate.key.reveal())
        self.socket.setsockopt(zmq.ZAP_DOMAIN, self._gate.domain)
        # Without it libzmq lets everybody in when nobody answers.
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _bind(self, endpoint: str) -> None:
        super()._bind(endpoint)
        self._gate.prove_refusal(self.endpoint)

    # Receiving.

    def _receive_one(self) -> None:
        socket = self.socket
        frame = socket.recv(NOBLOCK, copy=False)
        label = frame.bytes
        name = _name_of(frame)
        identity = self._gate.identity_of(key_in(name))
        first = socket.recv(NOBLOCK, copy=False)
        if self.watched:
            self._note_taken(first)
        if identity is None:
            self._drop_rest("refused_key")
            self._cut_off(frame, "the key %s, which is not on the allow-list any more", key_in(name))
        elif label != name.encode():
            self._drop_rest("foreign_identity")
            self._cut_off(frame, "a routing id that was not given to it, of the key %s", key_in(name))
        elif len(first):
            self._receive_session(label, first)
        elif not first.more:
            self._exchange.drop("malformed_frames")
        else:
            peer = self._peers.get(label) or self._name_plain(label, identity, frame)
            if peer:
                self._receive_last(peer)
            else:
                self._drop_rest("too_many_names")

    def _name_plain(self, label: bytes, identity: str, frame: zmq.Frame) -> bytes:
        """Return who a plain peer is whose connection has sent nothing before, nothing if there are too many."""
        # What has ended meanwhile keeps no name, and gives back what it had.
        self.read_news()
        while self._has_news:
            self.read_news()
        first, descriptor = encode_identity(identity), int(frame.get(zmq.SRCFD))
        others = (b"%b#%d" % (first, number) for number in range(2, NAMES_PER_KEY_MAX + 1))
        peer = next((peer for peer in (first, *others) if peer not in self._routing_ids), b"")
        if peer and descriptor in self.inflows:
            # It may be another connection's by now, which ends later than this one; then the name goes with that.
            self._forget_plain(descriptor)
            self._plain[descriptor] = label
            self._peers[label] = peer
            self._routing_ids[peer] = label
        return peer

    def _forget_plain(self, descriptor: int) -> None:
        peer = self._peers.pop(self._plain.pop(descriptor, b""), b"")
        self._routing_ids.pop(peer, None)

    def _end_inflow(self, descriptor: int) -> None:
        super()._end_inflow(descriptor)
        self._forget_plain(descriptor)

    def _cut_off(self, frame: zmq.Frame, text: str, key: str) -> None:
        """End the connection of a peer; if that is for its key, it is told when it comes again."""
        self._gate.log_refused(key, text, key)
        cut(int(frame.get(zmq.SRCFD)), self.port)

    # What the core asks.

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        """Return whether the key in a label is that of an identity; if not, log that."""
        key = key_in(routing_id.decode())
        own = self._gate.identity_of(key)
        if own is not None and encode_identity(own) == identity:
            return True
        text = "a message that claims to be of %r, by the key %s of %r"
        self._gate.log_refused(f"{key} {identity!r}", text, identity, key, own)
        return False

    def flush(self, now: float) -> None:
        """Send what is queued for plain peers, but only to those whose key is on the list now."""
        refused = [outgoing for outgoing in self.queue if not self._may_get(outgoing.peer)]
        for outgoing in refused:
            self.queue.remove(outgoing)
            self.queue_bytes -= outgoing.size_bytes
            self._exchange.handle_unsendable(self, outgoing, "peer_gone")
        super().flush(now)

    def _may_get(self, peer: bytes) -> bool:
        label = self._routing_ids.get(peer)
        return label is not None and not self.is_revoked(label)

    def _handle_news(self, event: int, value: int) -> None:
        super()._handle_news(event, value)
        if event == BAD_PROTOCOL:
            self._gate.log_refused("", "somebody who has no key, or knows another key of ours")

    def is_revoked(self, label: bytes) -> bool:
        """Return whether the key in a label is not on the list any more."""
        return self._gate.identity_of(key_in(label.decode())) is None


def _name_of(frame: zmq.Frame) -> str:
    """Return the name of the connection that a frame came by, nothing if libzmq does not say."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
