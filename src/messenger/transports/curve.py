"""A listener's tcp socket where only those are let in whose key is on the allow-list.

libzmq checks the key once, in the handshake (`zap.py`); here every ZeroMQ message is checked again, since it carries
the key of the connection that it came by. A routing id proves nothing: a peer chooses it. So the core is given a
**label** in its place, the routing id and the key together. A frame of another key then never looks as if it came by
the link of a session, however its sender came to the routing id, and the core asks `may_speak_for` whenever a session
begins, or moves to another label.

A plain peer is known to the core by its identity, and here by the routing id and key that it was last seen with. One
that chooses a routing id must choose its identity, or that with `#2`, `#3`, … behind it.

What must never happen here: a frame that reaches the core without a key that is on the list now.
"""

from typing import Any

import zmq

from ..limits import NAMES_PER_KEY_MAX, ROUTING_ID_BYTES_MAX
from ..wire import encode_identity
from .sockets import CURVE_WRAP_BYTES, cut
from .zap import Gate
from .zeromq import BAD_PROTOCOL, NOBLOCK, ListenerLink

LABEL_KEY_BYTES = 40


class CurveListenerLink(ListenerLink):
    """A ROUTER on tcp that speaks CURVE and nothing else.

    Args:
        gate: Whom it asks.
        others: As `ListenerLink` takes them.
    """

    wrap_bytes = CURVE_WRAP_BYTES

    def __init__(self, gate: Gate, *others: Any) -> None:
        self._gate = gate
        # Of each plain peer.
        self._plain_keys: dict[bytes, str] = {}
        super().__init__(*others)

    def _guard(self, endpoint: str) -> None:
        # Nobody may take the routing id of a peer that is there; who comes back after a cut has another one.
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
        key = _key_of(frame)
        identity = self._gate.identity_of(key)
        first = socket.recv(NOBLOCK, copy=False)
        if self.watched:
            self._note_taken(first)
        if identity is None:
            self._cut_off(frame, key)
            return
        if len(frame) > ROUTING_ID_BYTES_MAX:
            self._refuse_routing_id(first)
            self._gate.log_refused(key, "a routing id of %d bytes, by the key %s of %r", len(frame), key, identity)
            return
        routing_id = frame.bytes
        if len(first):
            self._receive_session(routing_id + key.encode(), first)
        elif not first.more:
            self._exchange.drop("malformed_frames")
        else:
            self._receive_plain(key, encode_identity(identity), routing_id)

    def _receive_plain(self, key: str, identity: bytes, routing_id: bytes) -> None:
        # libzmq's own routing ids, which nobody else can choose in time, start with a NUL.
        name, _, number = routing_id.partition(b"#")
        is_numbered = number.isdigit() and len(number) < 4 and 1 < int(number) <= NAMES_PER_KEY_MAX
        if routing_id.startswith(b"\0") or routing_id == identity:
            peer = identity
        elif name == identity and is_numbered:
            peer = b"%b#%d" % (identity, int(number))
        else:
            self._drop_rest("foreign_identity")
            self._log_claim(key, routing_id)
            return
        self._plain_keys[peer] = key
        self._routing_ids[peer] = routing_id
        self._receive_last(peer)

    def _cut_off(self, frame: zmq.Frame, key: str) -> None:
        """End the connection of a peer whose key was on the list when it connected; it is told when it comes again."""
        self._drop_rest("refused_key")
        self._gate.log_refused(key, "the key %s, which is not on the allow-list any more", key)
        cut(int(frame.get(zmq.SRCFD)), self.port)

    # What the core asks.

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        """Return whether the key in a label is that of an identity; if not, log that."""
        key = key_in(routing_id)
        own = self._gate.identity_of(key)
        if own is not None and encode_identity(own) == identity:
            return True
        self._log_claim(key, identity)
        return False

    def _log_claim(self, key: str, claimed: bytes) -> None:
        text = "a message that claims to be of %r, by the key %s of %r"
        self._gate.log_refused(f"{key} {claimed!r}", text, claimed, key, self._gate.identity_of(key))

    def send_frames(self, routing_id: bytes, frames: Any) -> bool:
        """Send one ZeroMQ message to the peer with a label."""
        return super().send_frames(routing_id[:-LABEL_KEY_BYTES], frames)

    def flush(self, now: float) -> None:
        """Send what is queued for plain peers, but only to those that were seen with a key that is on the list now."""
        refused = [outgoing for outgoing in self.queue if not self._may_get(outgoing.peer)]
        for outgoing in refused:
            self.queue.remove(outgoing)
            self.queue_bytes -= outgoing.size_bytes
            self._exchange.handle_unsendable(self, outgoing, "peer_gone")
        super().flush(now)

    def _may_get(self, peer: bytes) -> bool:
        return self._gate.identity_of(self._plain_keys.get(peer, "")) is not None

    def forget_revoked(self) -> None:
        """Forget the plain peers whose keys are not on the list any more."""
        for peer in [peer for peer in self._plain_keys if not self._may_get(peer)]:
            del self._plain_keys[peer], self._routing_ids[peer]

    def _handle_news(self, event: int, value: int) -> None:
        super()._handle_news(event, value)
        if event == BAD_PROTOCOL:
            self._gate.log_refused("", "somebody who has no key, or knows another key of ours")

    def is_revoked(self, label: bytes) -> bool:
        """Return whether the key in a label is not on the list any more."""
        return self._gate.identity_of(key_in(label)) is None


def key_in(label: bytes) -> str:
    """Return the key in a label."""
    return label[-LABEL_KEY_BYTES:].decode()


def _key_of(frame: zmq.Frame) -> str:
    """Return the key of the connection that a frame came by, nothing if libzmq does not say."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
