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
from ..session import Session
from ..wire import decode_identity, encode_identity
from .listener import ListenerLink
from .sockets import CURVE_WRAP_BYTES
from .zap import NAME_CHARS, Gate, key_in
from .zeromq import BAD_PROTOCOL, NOBLOCK


class CurveListenerLink(ListenerLink):
    """A ROUTER on tcp that speaks CURVE and nothing else.

    Args:
        gate: Whom it asks.
        others: As `ListenerLink` takes them.
    """

    wrap_bytes = CURVE_WRAP_BYTES

    def __init__(self, gate: Gate, *others: Any) -> None:
        self._gate = gate
        # Of plain peers: who each connection is, and the connections of each descriptor, which are several if one has
        # ended and left messages before another got its number.
        self._peers: dict[bytes, bytes] = {}
        self._plain: dict[int, list[bytes]] = {}
        super().__init__(*others)

    def _guard(self, endpoint: str) -> None:
        # Nobody may take the routing id of a peer that is there.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        # The lookout cuts who takes too long (`inflow.py`).
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, 0)
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
            self._cut_off(label, frame, "the key %s, which is not on the allow-list any more", key_in(name))
        elif label != name.encode():
            self._drop_rest("foreign_identity")
            self._cut_off(label, frame, "a routing id that was not given to it, of the key %s", key_in(name))
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
            self._plain.setdefault(descriptor, []).append(label)
            self._peers[label] = peer
            self._routing_ids[peer] = label
            self._gate.log_plain(key_in(label.decode()), identity)
        return peer

    def _begin_inflow(self, descriptor: int) -> None:
        super()._begin_inflow(descriptor)
        self.inflows[descriptor].is_stranger = True

    def _end_inflow(self, descriptor: int) -> None:
        super()._end_inflow(descriptor)
        for label in self._plain.pop(descriptor, ()):
            self._forget_plain(label)

    def _forget_plain(self, label: bytes) -> None:
        self._routing_ids.pop(self._peers.pop(label, b""), None)

    def _cut_off(self, label: bytes, frame: zmq.Frame, text: str, key: str) -> None:
        """End the connection of a peer; if that is for its key, it is told when it comes again."""
        self._gate.log_refused(key, text, key)
        self._cut_once(label, frame)

    # What the core asks.

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        """Return whether the key in a label is that of an identity; if not, log that."""
        key = key_in(routing_id.decode(errors="replace"))
        if self._is_key_of(key, identity):
            return True
        name, text = decode_identity(identity), "a message that claims to be of %r, by the key %s of %r"
        self._gate.log_refused(f"{key} {name}", text, name, key, self._gate.identity_of(key))
        return False

    def _is_key_of(self, key: str, identity: bytes) -> bool:
        own = self._gate.identity_of(key)
        return own is not None and encode_identity(own) == identity

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
        return label is not None and self._gate.identity_of(key_in(label.decode())) is not None

    def forget_revoked(self) -> None:
        """Forget the plain peers whose keys are not those of their identities any more."""
        for label, peer in list(self._peers.items()):
            identity = self._gate.identity_of(key_in(label.decode()))
            if identity is None or not f"{decode_identity(peer)}#".startswith(f"{identity}#"):
                self._forget_plain(label)

    def _handle_news(self, event: int, value: int) -> None:
        super()._handle_news(event, value)
        if event == BAD_PROTOCOL:
            self._gate.log_refused("", "somebody who has no key, or knows another key of ours")

    def is_revoked(self, session: Session) -> bool:
        """Return whether a session that came by this link, though it may have none now, has no key of its identity."""
        if session.handle is not self.handle or len(session.routing_id) != NAME_CHARS:
            return False
        key = key_in(session.routing_id.decode())
        return session.link in (self, None) and not self._is_key_of(key, session.peer)


def _name_of(frame: zmq.Frame) -> str:
    """Return the name of the connection that a frame came by, nothing if libzmq does not say."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
