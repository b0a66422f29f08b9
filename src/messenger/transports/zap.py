"""Who is let in: libzmq asks during each CURVE handshake (ZAP, https://rfc.zeromq.org/spec/27/), and this answers.

libzmq asks one place per context, so one thread of this process answers for all messengers. It is no messenger's own
thread, because a callback that blocks must keep nobody out. Each messenger with an allow-list has a `Gate`, and its
sockets carry the gate's domain. Everything fails closed: a domain that nobody answers for, a request that is not
understood, an answer that does not come. `prove_refusal` shows that before a listener is used.

The answer also **gives** each connection its routing id, in place of what the peer has chosen. Of two connections that
chose the same, libzmq would never read the second one, and keep what it sends until the listener closes; and when the
first one ended, what was meant for it would go to whoever chose that next. libzmq looks for our answer once before it
reads what the peer has chosen, and of the two the later one counts; so the answer waits for `GIVE_S`.

What must never happen here: an answer that lets in whose key is not on the list now; a wait for a messenger's lock.
"""

import itertools
import logging
import os
import secrets
import struct
import threading
import time
from collections import deque

import zmq
from zmq.utils import z85

from ..errors import SecurityError
from ..limits import GIVE_S, REFUSAL_LOG_KEYS_MAX, REFUSAL_LOG_S, SELF_TEST_S
from ..security import KeyPair, Security
from .sockets import Monitor, context

logger = logging.getLogger("messenger")
KEY_BYTES, KEY_CHARS = 32, 40
# Of a connection's name: its key, and 8 random bytes.
NAME_CHARS = KEY_CHARS + 16
_ENDPOINT = "inproc://zeromq.zap.01"
_gates: dict[bytes, "Gate"] = {}
_domains = itertools.count(1)
_lock = threading.Lock()
_is_served = False


class Gate:
    """What answers for the listeners of one messenger.

    Attributes:
        domain: By which libzmq's questions name it.
        key: Of the messenger.
        refused_count: Handshakes that were refused. Written by one thread.
    """

    def __init__(self, security: Security, key: KeyPair, owner: str) -> None:
        self.domain = b"messenger-%d" % next(_domains)
        self.key = key
        self.refused_count = 0
        self._security = security
        self._owner = owner
        self._test_keys: set[str] = set()
        # Two threads log refusals.
        self._log_lock = threading.Lock()
        self._logged_at: dict[str, float] = {}

    def open(self) -> None:
        """Answer for the domain from now on; the first of a process starts the thread."""
        global _is_served
        with _lock:
            _gates[self.domain] = self
            if not _is_served:
                server = context().socket(zmq.ROUTER)
                server.setsockopt(zmq.LINGER, 0)
                server.bind(_ENDPOINT)
                threading.Thread(target=_serve, args=(server,), name="messenger-zap", daemon=True).start()
                _is_served = True

    def close(self) -> None:
        """Refuse everybody from now on."""
        with _lock:
            _gates.pop(self.domain, None)

    def identity_of(self, key: str) -> str | None:
        """Return the identity that goes with a key now, None if the key is not on the list."""
        return self._security.allowed.get(key)

    def admit(self, key: str, address: str) -> str | None:
        """Return the name of a new connection, unless its key is not on the list; then count that and log it."""
        if key in self._security.allowed:
            return key + secrets.token_hex(8)
        if key not in self._test_keys:
            self.refused_count += 1
            self.log_refused(key, "the key %s from %s, which is not on the allow-list", key, address)
        return None

    def log_refused(self, about: str, text: str, *values: object) -> None:
        """Log a refusal, but not the same again and again: whoever is refused may try for ever."""
        if self._may_log(about):
            logger.warning(f"! %s refused {text}", self._owner, *values)

    def log_plain(self, key: str, identity: str) -> None:
        """Log who a plain peer is taken for, as seldom: what it claims by its routing id nobody sees, nor believes."""
        if self._may_log(f"plain {key}"):
            text = "= %s takes a program without a session, by its key %s, for %r, whatever its routing id claims"
            logger.info(text, self._owner, key, identity)

    def _may_log(self, about: str) -> bool:
        now = time.monotonic()
        with self._log_lock:
            if self._logged_at.get(about, now) > now:
                return False
            if len(self._logged_at) >= REFUSAL_LOG_KEYS_MAX:
                self._logged_at = {key: until for key, until in self._logged_at.items() if until > now}
                if len(self._logged_at) >= REFUSAL_LOG_KEYS_MAX:
                    return False
            self._logged_at[about] = now + REFUSAL_LOG_S
        return True

    def prove_refusal(self, endpoint: str) -> None:
        """Knock at a listener of this gate with a random key, which must be refused.

        Raises:
            SecurityError: It was let in, or nothing came of it in time.
        """
        pair = KeyPair.generate()
        self._test_keys.add(pair.public)
        try:
            event = _knock(
                endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"), pair, self.key
            )
        finally:
            self._test_keys.discard(pair.public)
        if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            what = "was let in" if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else f"was not refused in {SELF_TEST_S} s"
            raise SecurityError(f"{endpoint} was closed again: in its self-test a random key {what}")


def _knock(endpoint: str, pair: KeyPair, server: KeyPair) -> int:
    """Return the event that a connection ends with, 0 if nothing happens in time."""
    socket = context().socket(zmq.DEALER)
    monitor = Monitor(socket, zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server.public.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, pair.reveal())
        socket.connect(endpoint)
        news = monitor.wait(SELF_TEST_S)
        return news[0][0] if news else 0
    finally:
        socket.close(0)
        monitor.wait_stop(0.05)
        monitor.close()


def key_in(name: str) -> str:
    """Return the key in the name of a connection."""
    return name[:KEY_CHARS]


def _serve(server: "zmq.Socket[bytes]") -> None:
    # Who asked and may come in, and when to say so; the list may be another one by then.
    waiting: deque[tuple[float, bytes, list[bytes]]] = deque()

    def answer(asker: bytes, question: list[bytes], is_due: bool) -> None:
        try:
            words = _answer(question)
        except Exception:
            logger.exception("! the question whether to let somebody in failed, so the answer is no")
            words = [b"500", b"error", b"", b""]
        if words[0] == b"200" and not is_due:
            waiting.append((time.monotonic() + GIVE_S, asker, question))
        else:
            server.send_multipart([asker, b"", b"1.0", *question[1:2], *words])

    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            answer(*waiting.popleft()[1:], is_due=True)
        if server.poll(int((waiting[0][0] - now) * 1000) + 1 if waiting else None):
            asker, _, *question = server.recv_multipart()
            answer(asker, question, is_due=False)


def _answer(frames: list[bytes]) -> list[bytes]:
    """Return status, its text, the user's id and metadata, for version, request id, domain, address, …, key."""
    if len(frames) == 7 and frames[0] == b"1.0" and frames[5] == b"CURVE" and len(frames[6]) == KEY_BYTES:
        gate = _gates.get(frames[2])
        key = z85.encode(frames[6]).decode()
        name = gate.admit(key, frames[3].decode(errors="replace")) if gate is not None else None
        if name is not None:
            return [b"200", b"OK", name.encode(), b"\x08Identity" + struct.pack(">I", len(name)) + name.encode()]
    return [b"400", b"the key is not on the allow-list", b"", b""]


def _forget() -> None:
    """The thread does not exist in the child of a fork, nor the context that it served."""
    global _is_served, _lock
    _is_served = False
    _lock = threading.Lock()
    _gates.clear()


os.register_at_fork(after_in_child=_forget)
