"""Who is there: how sessions begin, survive a new link, and end.

A connection says HELLO with a nonce. The listener's messenger answers with a CHALLENGE that echoes it, which proves
that this incarnation is alive now and not a packet of a dead one that was long under way, and that has a nonce of its
own; the RESPONSE that echoes that one proves the same of the connection. Only then does an incarnation count.

    connection                                          listener
    HELLO      my incarnation, nonce a       ──>        remembers a challenge, not a session
               establishes                   <──        CHALLENGE   its incarnation, echo a, nonce b
    RESPONSE   echo b                        ──>        establishes
    DATA …                                   <─>        DATA …

Rules, each of which a simulated network showed to be needed: one nonce is kept for each claimed incarnation until it
expires (a nonce that changes with every HELLO never gets its echo if the way is longer than the time between two
HELLOs); data for a session that a listener does not know is answered with UNKNOWN, and the connection says HELLO; a
CHALLENGE without an echo of an open nonce establishes nothing.

An identity belongs to one process. A new process of an identity is refused as long as a link to the old one is up,
and takes over when it is not.

What must never happen here: an incarnation that counts without an echo of a fresh nonce; state that grows with what a
peer claims.

Source: docs/protocol.md, "Session dialect".
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .blocks import Control, Option
from .errors import MalformedMessage
from .limits import (
    CHALLENGE_S,
    CHALLENGES_MAX,
    CHALLENGES_PER_IDENTITY_MAX,
    HELLO_S_MAX,
    HELLO_S_MIN,
    IDENTITY_BYTES_MAX,
    Limits,
)
from .link import FOREVER, Link, Random
from .session import ESTABLISHED, Session, State
from .timers import Timers
from .wire import (
    MAGIC,
    VERSION,
    Challenge,
    Flag,
    Header,
    Hello,
    Kind,
    Numbers,
    Reason,
    decode_batch,
    decode_challenge,
    decode_controls,
    decode_data_frame,
    decode_goodbye,
    decode_header,
    decode_hello,
    decode_identity,
    decode_refusal,
    decode_response,
    encode_challenge,
    encode_header,
    encode_hello,
    encode_refusal,
    encode_response,
)

# Messages, contents of large ones by index, options, bytes, milliseconds left (empty: the default).
Decoded = tuple[list[bytes], dict[int, bytes], list[Option], int, Sequence[int]]
_NO_MESSAGES: Decoded = ([], {}, [], 0, ())


class Owner(Protocol):
    """What the handshake tells the exchange."""

    is_urgent: bool

    def drop(self, kind: str) -> None:
        """Count something that goes no further."""

    def handle_batch(self, session: Session, first: int, batch: Decoded, skipped: int) -> None:
        """Process the messages of a batch but for the first `skipped`."""

    def handle_controls(self, session: Session, controls: Sequence[Control]) -> None:
        """Take what the other end says beside its messages."""

    def handle_ended(self, session: Session, why: str) -> None:
        """The other end's incarnation is gone: settle what was sent to it."""

    def refuse_too_large(self, session: Session) -> None:
        """The other end has said how large a message it takes: settle those in the queue that are larger."""

    def handle_refused(self, session: Session, reason: Reason, text: str, did_not_run: bool) -> None:
        """The other end does not want this connection: settle what waits for it."""

    def mark_dirty(self, session: Session) -> None:
        """Flush a session at the end of the turn."""


class _Challenged(NamedTuple):
    """A HELLO that was answered with a CHALLENGE."""

    incarnation: int  # That we shall have in this session.
    nonce: int
    hello: Hello
    expires_at: float


def _check_identity(identity: bytes) -> None:
    if not 0 < len(identity) <= IDENTITY_BYTES_MAX:
        raise MalformedMessage("the identity is empty or too long")


class Handshake:
    """All sessions of one messenger.

    Args:
        owner: The exchange.
        identity: Of this messenger, as bytes.
        rng: Draws incarnations and nonces; must not be predictable.
    """

    def __init__(self, owner: Owner, identity: bytes, limits: Limits, rng: Random) -> None:
        # Dictionaries instead of sets, for their order: what a seed of the simulator does must not hang on addresses.
        self.sessions: dict[Session, None] = {}
        self._timers = Timers()
        self._owner = owner
        self._identity = identity
        self._limits = limits
        self._rng = rng
        self._process = self._draw()
        # At listeners, by the connection's incarnation.
        self._by_incarnation: dict[int, Session] = {}
        self._by_identity: dict[bytes, dict[Session, None]] = {}
        self._challenged: dict[int, _Challenged] = {}

    def _draw(self) -> int:
        return self._rng.getrandbits(63) + 1

    # Sessions of connections.

    def open(self, link: Link) -> Session:
        """Return a new session for a connection's link; it says HELLO when the link is up."""
        session = Session(self._draw(), link.handle, link.callback, self._limits, self._rng)
        session.connection_link = link
        link.session = session
        self.sessions[session] = None
        return session

    def renew(self, session: Session) -> None:
        """Begin anew at a connection; the other end may still know the old numbering, so it must not be resumed."""
        session.incarnation = self._draw()

    def handle_link_up(self, link: Link, now: float) -> None:
        """A connection's link reaches somebody, perhaps anew."""
        self._start_hello(link.session, link, now)

    def handle_link_down(self, link: Link) -> None:
        """A connection's link reaches nobody."""
        link.session.attach(None)
        link.session.nonce = 0
        link.session.hello_at = FOREVER

    def _start_hello(self, session: Session, link: Link, now: float) -> None:
        """Introduce ourselves, with a fresh nonce unless one is under way."""
        if session.nonce:
            return
        session.nonce = self._draw()
        session.hello_count = 0
        self._say_hello(session, link, now)

    def _say_hello(self, session: Session, link: Link, now: float) -> None:
        limits = self._limits
        windows = limits.window_msgs, limits.window_bytes
        hello = Hello(session.nonce, self._process, *windows, self._identity, limits.message_bytes_max)
        link.send_frames(b"", [encode_hello(session.incarnation, session.peer_incarnation, hello)])
        wait_s = min(HELLO_S_MIN * 2 ** min(session.hello_count, 10), HELLO_S_MAX)
        session.hello_count += 1
        session.hello_at = now + wait_s * (0.75 + 0.5 * self._rng.random())
        self._owner.mark_dirty(session)

    # Receiving.

    def receive(self, link: Link, routing_id: bytes, frame: bytes, extra: list[bytes], now: float) -> None:
        """Take one session frame, and the frames behind it, off the network."""
        try:
            data_frame = decode_data_frame(frame)
            if data_frame is not None:
                flags, source, dest, numbers = data_frame
                session = self._find_established(link, routing_id, source, dest)
                if session is not None:
                    self._receive_data(session, flags, numbers, frame, extra, now)
                    return
            header = decode_header(frame)
            if header.version != VERSION:
                self._refuse_version(link, routing_id, header)
            elif header.kind == Kind.DATA and data_frame is None:
                self._owner.drop("malformed_frames")
            elif link.session is not None:
                self._receive_at_connection(link, header, frame, now)
            else:
                self._receive_at_listener(link, routing_id, header, frame, now)
        except MalformedMessage:
            self._owner.drop("unknown_header" if not frame or frame[0] != MAGIC else "malformed_frames")

    def _find_established(self, link: Link, routing_id: bytes, source: int, dest: int) -> Session | None:
        """Return the session between two incarnations, if it stands."""
        session: Session | None = link.session
        if session is not None:
            is_it = session.peer_incarnation == source and session.incarnation == dest
            return session if is_it and session.state is ESTABLISHED else None
        session = self._by_incarnation.get(source)
        if session is None or session.incarnation != dest:
            return None
        if session.link is not link or session.routing_id != routing_id:
            if not link.may_speak_for(routing_id, session.peer):
                return None
            session.attach(link, routing_id)
        return session

    def _refuse_version(self, link: Link, routing_id: bytes, header: Header) -> None:
        self._owner.drop("unknown_version")
        text = f"session version {header.version} is not understood here, version {VERSION} is"
        if link.session is not None:
            self._owner.handle_refused(link.session, Reason.VERSION, f"the other end speaks it: {text}", False)
        elif header.kind != Kind.REFUSED:
            link.send_frames(routing_id, [encode_refusal(header.source_incarnation, Reason.VERSION, text)])

    def _receive_at_connection(self, link: Link, header: Header, frame: bytes, now: float) -> None:
        session: Session = link.session
        is_known = session.state is ESTABLISHED and header.source_incarnation == session.peer_incarnation
        if header.dest_incarnation != session.incarnation or session.state is State.CLOSED:
            self._owner.drop("stale_session")
        elif header.kind == Kind.CHALLENGE:
            self._handle_challenge(session, link, header, decode_challenge(frame), is_known, now)
        elif header.kind == Kind.UNKNOWN:
            self._start_hello(session, link, now)
        elif header.kind == Kind.REFUSED and (is_known or (session.nonce and session.state is State.CONNECTING)):
            session.nonce = 0
            session.hello_at = now + HELLO_S_MAX
            reason = Reason(header.flags) if header.flags in set(Reason) else Reason.LIMIT
            # It names the incarnation of the challenge, which will never be a session: what was sent to it did not run.
            self._owner.handle_refused(session, reason, decode_refusal(frame), is_known)
            self._owner.mark_dirty(session)
        elif header.kind == Kind.GOODBYE and is_known:
            session.take_back(decode_goodbye(frame))
            self._owner.handle_ended(session, "the other end has closed")
            self._start_hello(session, link, now)
        else:
            self._owner.drop("stale_session")

    def _handle_challenge(
        self, session: Session, link: Link, header: Header, challenge: Challenge, is_known: bool, now: float
    ) -> None:
        _check_identity(challenge.identity)
        if not link.may_speak_for(b"", challenge.identity):
            self._owner.drop("foreign_identity")
            name = decode_identity(challenge.identity)
            text = f"the other end calls itself {name!r}, which is not the identity that goes with its key"
            session.nonce, session.hello_at = 0, now + HELLO_S_MAX
            self._owner.handle_refused(session, Reason.KEY, text, False)
            return
        if session.nonce and challenge.echo == session.nonce:
            session.nonce = 0
            session.hello_at = FOREVER
            if not is_known:
                if session.state is ESTABLISHED:
                    self._owner.handle_ended(
                        session, "its process has ended, or has forgotten us; another one is there"
                    )
                session.peer = challenge.identity
                session.establish(header.source_incarnation, challenge.window_msgs, challenge.window_bytes, now)
                session.contents_max = challenge.message_bytes_max
                self._owner.refuse_too_large(session)
            session.attach(link)
        elif not is_known:
            self._start_hello(session, link, now)
            return
        if challenge.nonce:
            link.send_frames(b"", [encode_response(session.incarnation, header.source_incarnation, challenge.nonce)])
        self._owner.mark_dirty(session)

    def _receive_at_listener(self, link: Link, routing_id: bytes, header: Header, frame: bytes, now: float) -> None:
        source, dest = header.source_incarnation, header.dest_incarnation
        session, challenged = self._by_incarnation.get(source), self._challenged.get(source)
        hello = decode_hello(frame) if header.kind == Kind.HELLO else challenged and challenged.hello
        # Whoever names the incarnation of a session, which is a secret, must be its peer.
        claimed = [] if session is None else [session.peer]
        if hello is not None:
            _check_identity(hello.identity)
            claimed.append(hello.identity)
        if not all(self._may_speak(link, routing_id, source, identity) for identity in claimed):
            return
        if hello is not None and header.kind == Kind.HELLO:
            self._handle_hello(link, routing_id, source, hello, now)
            return
        known = session if session is not None and session.incarnation == dest else None
        if known is not None and header.kind == Kind.GOODBYE:
            known.take_back(decode_goodbye(frame))
            self._end(known, "the other end has closed")
        elif challenged is not None and challenged.expires_at > now and challenged.incarnation == dest:
            if header.kind == Kind.RESPONSE and decode_response(frame) == challenged.nonce:
                self._establish(link, routing_id, source, challenged, now)
            else:
                # Its RESPONSE is missing.
                self._send_challenge(link, routing_id, source, challenged, 0)
        elif header.kind == Kind.DATA:
            self._owner.drop("unknown_session")
            link.send_frames(routing_id, [encode_header(Kind.UNKNOWN, 0, source)])
        elif known is None or header.kind != Kind.RESPONSE:
            self._owner.drop("stale_session")

    def _may_speak(self, link: Link, routing_id: bytes, source_incarnation: int, identity: bytes) -> bool:
        """Return whether a peer of a listener is whom its frame claims; if it is not, tell it."""
        if link.may_speak_for(routing_id, identity):
            return True
        self._owner.drop("foreign_identity")
        text = f"its key here is not that of {decode_identity(identity)!r}; take the identity that goes with the key"
        link.send_frames(routing_id, [encode_refusal(source_incarnation, Reason.KEY, text)])
        return False

    def _handle_hello(self, link: Link, routing_id: bytes, source_incarnation: int, hello: Hello, now: float) -> None:
        session = self._by_incarnation.get(source_incarnation)
        if session is not None:
            session.attach(link, routing_id)
            challenged = _Challenged(session.incarnation, 0, hello, now)
            self._send_challenge(link, routing_id, source_incarnation, challenged, hello.nonce)
            self._owner.mark_dirty(session)
            return
        known = self._challenged.get(source_incarnation)
        if known is None or known.expires_at <= now:
            self._forget_expired(now)
            same_count = sum(other.hello.identity == hello.identity for other in self._challenged.values())
            if same_count >= CHALLENGES_PER_IDENTITY_MAX or len(self._challenged) >= CHALLENGES_MAX:
                self._owner.drop("too_many_challenges")
                return
            known = _Challenged(self._draw(), self._draw(), hello, now + CHALLENGE_S)
            self._challenged[source_incarnation] = known
        self._send_challenge(link, routing_id, source_incarnation, known, hello.nonce)

    def _send_challenge(
        self, link: Link, routing_id: bytes, dest_incarnation: int, challenged: _Challenged, echo: int
    ) -> None:
        limits = self._limits
        identity = link.identity or self._identity
        windows = limits.window_msgs, limits.window_bytes
        challenge = Challenge(echo, challenged.nonce, *windows, identity, limits.message_bytes_max)
        link.send_frames(routing_id, [encode_challenge(challenged.incarnation, dest_incarnation, challenge)])

    def _establish(
        self, link: Link, routing_id: bytes, peer_incarnation: int, challenged: _Challenged, now: float
    ) -> None:
        """The connection is alive: begin its session, unless another living process has its identity."""
        hello = challenged.hello
        # Established or refused, this incarnation of ours never gets a second chance.
        del self._challenged[peer_incarnation]
        others = [s for s in self._by_identity.get(hello.identity, ()) if s.process != hello.process]
        if any(other.is_reachable() for other in others):
            self._owner.drop("identity_in_use")
            text = f"another living messenger is {decode_identity(hello.identity)!r} here; take another identity"
            link.send_frames(
                routing_id, [encode_refusal(peer_incarnation, Reason.IDENTITY_IN_USE, text, challenged.incarnation)]
            )
            return
        for other in others:
            self._end(other, "its process has ended, and a new one has its identity")
        text = self._why_too_many(hello.identity)
        if text:
            self._owner.drop("too_many_sessions")
            link.send_frames(routing_id, [encode_refusal(peer_incarnation, Reason.LIMIT, text, challenged.incarnation)])
            return
        session = Session(challenged.incarnation, link.handle, link.callback, self._limits, self._rng)
        session.peer, session.process = hello.identity, hello.process
        session.has_workers, session.hears_responses = link.has_workers, link.hears_responses
        session.establish(peer_incarnation, hello.window_msgs, hello.window_bytes, now)
        session.contents_max = hello.message_bytes_max
        session.attach(link, routing_id)
        self.sessions[session] = None
        self._by_incarnation[peer_incarnation] = session
        self._by_identity.setdefault(hello.identity, {})[session] = None
        self._owner.mark_dirty(session)

    def _why_too_many(self, identity: bytes) -> str:
        if len(self._by_incarnation) >= self._limits.sessions_max:
            return f"{len(self._by_incarnation)} sessions are open here, that is sessions_max"
        own_count = len(self._by_identity.get(identity, ()))
        if own_count >= self._limits.sessions_per_identity_max:
            return f"{own_count} sessions of {decode_identity(identity)!r} are open, that is sessions_per_identity_max"
        return ""

    def _receive_data(
        self, session: Session, flags: int, numbers: Numbers, frame: bytes, extra: list[bytes], now: float
    ) -> None:
        owner = self._owner
        first, _, _, count = numbers
        # A batch that does not decode must not be acknowledged.
        if flags & Flag.CONTROLS:
            batch = _NO_MESSAGES
            owner.handle_controls(session, decode_controls(frame, count))
        else:
            batch = decode_batch(frame, flags, count, extra)
        skipped = session.receive(flags, numbers, batch[3], now)
        if skipped is not None:
            owner.handle_batch(session, first, batch, skipped)
        owner.mark_dirty(session)
        if session.is_urgent:
            owner.is_urgent = True

    # Ends and time.

    def find(self, handle: object, identity: bytes) -> Session | None:
        """Return the session of a listener with a peer, the one that can be reached now if there are several."""
        found = [session for session in self._by_identity.get(identity, ()) if session.handle is handle]
        return max(found, key=lambda session: (session.link is not None, session.heard_at), default=None)

    def expel(self, session: Session, why: str) -> None:
        """Say goodbye to a peer of a listener, and forget it."""
        session.say_goodbye()
        self._end(session, why)

    def _end(self, session: Session, why: str) -> None:
        """Forget a peer of a listener."""
        self._owner.handle_ended(session, why)
        self.discard(session)

    def discard(self, session: Session) -> None:
        """Forget a session, after its outcomes were settled."""
        session.end()
        session.state = State.CLOSED
        session.hello_at = FOREVER
        self._timers.plan(session, FOREVER)
        self.sessions.pop(session, None)
        if self._by_incarnation.get(session.peer_incarnation) is session:
            del self._by_incarnation[session.peer_incarnation]
        same = self._by_identity.get(session.peer)
        if same is not None:
            same.pop(session, None)
            if not same:
                del self._by_identity[session.peer]

    @property
    def next_deadline_at(self) -> float:
        """When `handle_deadline` has something to do."""
        challenged_at = min((known.expires_at for known in self._challenged.values()), default=FOREVER)
        return min(self._timers.next_at, challenged_at)

    def plan(self, session: Session) -> None:
        """Have a session get attention when it wants it, or when it is to be forgotten, whichever is first."""
        idle_at = self._idle_at(session)
        deadline_at = session.next_deadline_at
        self._timers.plan(session, deadline_at if deadline_at < idle_at else idle_at)

    def _idle_at(self, session: Session) -> float:
        """Return when a listener forgets a peer that it hears nothing of."""
        return FOREVER if session.connection_link is not None else session.heard_at + self._limits.session_idle_s_max

    def handle_deadline(self, now: float) -> None:
        """Say HELLO again, ask for acknowledgements, forget who is gone."""
        for session in self._timers.take_due(now):
            link = session.connection_link
            if link is not None and session.hello_at <= now:
                session.nonce = session.nonce or self._draw()
                self._say_hello(session, link, now)
            session.handle_deadline(now)
            if self._idle_at(session) <= now:
                self._end(session, f"nothing was heard of it for {self._limits.session_idle_s_max} s")
            else:
                self.plan(session)
        self._forget_expired(now)

    def _forget_expired(self, now: float) -> None:
        self._challenged = {key: known for key, known in self._challenged.items() if known.expires_at > now}
