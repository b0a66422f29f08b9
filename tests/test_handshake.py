"""`handshake`: the tables of `session.py` and `handshake.py`, row by row; first one side alone, then both."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.blocks import Control
from messenger.handshake import Decoded, Handshake
from messenger.limits import (
    ACK_DELAY_S,
    CHALLENGE_S,
    CHALLENGES_MAX,
    CHALLENGES_PER_IDENTITY_MAX,
    HELLO_S_MAX,
    IDENTITY_BYTES_MAX,
    IDLE_PROBE_S,
    TIMER_TICK_S,
    Limits,
)
from messenger.link import FOREVER, Link
from messenger.outgoing import Outgoing
from messenger.session import Session, State
from messenger.wire import (
    Challenge,
    Flag,
    Header,
    Hello,
    Kind,
    Reason,
    decode_challenge,
    decode_header,
    decode_hello,
    decode_refusal,
    decode_response,
    encode_challenge,
    encode_data,
    encode_goodbye,
    encode_header,
    encode_hello,
    encode_refusal,
    encode_response,
)
from tests.conftest import Data, data_of

Frames = list[bytes]


class FakeRandom:
    """Counts up; 0.5 leaves durations as they are."""

    def __init__(self, start: int) -> None:
        self.number = 0.5
        self.drawn = start

    def random(self) -> float:
        return self.number

    def getrandbits(self, k: int, /) -> int:
        self.drawn += 1
        return self.drawn


class FakeLink(Link):
    """A connection's link, or one of a listener: then it keeps for whom a frame is."""

    def __init__(self, handle: object = "handle") -> None:
        super().__init__(handle, None)
        self.sent: list[tuple[bytes, Frames]] = []
        self.is_up = True
        self.gone: set[bytes] = set()
        # With keys: whom a routing id's key belongs to.
        self.identities: dict[bytes, bytes] = {}

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        return super().may_speak_for(routing_id, identity) and self.identities.get(routing_id, identity) == identity

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        if not self.is_up or routing_id in self.gone:
            return False
        self.sent.append((routing_id, list(frames)))
        return True

    def take(self) -> Frames:
        """Return the first frames of what was sent since the last time."""
        taken, self.sent = self.sent, []
        return [frames[0] for _, frames in taken]

    def kinds(self) -> list[Kind]:
        return [Kind(decode_header(frame).kind) for frame in self.take()]


class Owner:
    """Does with sessions what the exchange does, and keeps what it was told."""

    def __init__(self) -> None:
        self.is_urgent = False
        self.large_was_refused = False
        # Whether the callbacks of a batch return at once.
        self.processes = True
        # Of the last refusal: whether what was sent is known not to have run.
        self.did_not_run = False
        self.dropped: Counter[str] = Counter()
        self.told: list[tuple[object, ...]] = []
        self.received: list[bytes] = []
        self.lost: list[bytes] = []
        self.dirty: list[Session] = []

    def drop(self, kind: str) -> None:
        self.dropped[kind] += 1

    def handle_controls(self, session: Session, controls: Sequence[Control]) -> None:
        self.told.append(("controls", list(controls)))

    def handle_batch(self, session: Session, first: int, batch: Decoded, skipped: int) -> None:
        messages, *_ = batch
        self.received += [message[4:] for message in messages[skipped:]]
        if self.processes:
            session.note_processed(first + len(messages) - 1)

    def handle_ended(self, session: Session, why: str) -> None:
        self.told.append(("ended", why))
        self.lost += [outgoing.data[4:] for outgoing in session.end()]

    def refuse_too_large(self, session: Session) -> None:
        self.large_was_refused = True

    def handle_refused(self, session: Session, reason: Reason, text: str, did_not_run: bool) -> None:
        self.told.append(("refused", reason, text))
        self.did_not_run = did_not_run
        session.end()

    def mark_dirty(self, session: Session) -> None:
        self.dirty.append(session)

    def take(self) -> list[tuple[object, ...]]:
        taken, self.told = self.told, []
        return taken


class Side:
    """One messenger's handshake, its owner and the time."""

    def __init__(self, identity: bytes, start: int, limits: Limits | None = None) -> None:
        self.owner = Owner()
        self.rng = FakeRandom(start)
        self.identity = identity
        self.handshake = Handshake(self.owner, identity, limits or Limits(), self.rng)
        self.now = 0.0

    def receive(self, link: Link, frame: bytes, *extra: bytes, routing_id: bytes = b"") -> None:
        self.handshake.receive(link, routing_id, frame, list(extra), self.now)
        self.flush()

    def flush(self) -> None:
        dirty, self.owner.dirty = self.owner.dirty, []
        for session in dirty:
            session.flush(self.now)
            if session.is_overlooked and not session.is_closed:
                self.handshake.plan(session)

    def tick(self, now: float) -> None:
        """Let a time come, and the tick that is the first one after it."""
        self.now = now
        self.handshake.handle_deadline(now + 1.01 * TIMER_TICK_S)
        self.flush()

    def send(self, session: Session, contents: bytes) -> None:
        data = b"0-0-" + contents
        outgoing = Outgoing(message_id=1, data=data, size_bytes=len(data), deadline_at=FOREVER)
        session.queue.append(outgoing)
        session.queue_bytes += outgoing.size_bytes
        self.owner.mark_dirty(session)
        self.flush()


def data_frame(source: int, dest: int, first: int = 1, messages: Sequence[bytes] = (), flags: int = 0) -> bytes:
    return encode_data(source, dest, flags, Data(first, 0, 0, len(messages)), messages)


# A connection, alone.

LISTENER = 900  # The incarnation that the listener claims.
OTHER_LISTENER = 901


class Connecting:
    """A connection; the test plays the listener."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.side = Side(b"me", 1_000, limits)
        self.link = FakeLink()
        self.session = self.side.handshake.open(self.link)

    def connect(self) -> Hello:
        """Let the link come up; return the HELLO."""
        self.side.handshake.handle_link_up(self.link, self.side.now)
        self.side.flush()
        return self.take_hello()

    def take_hello(self) -> Hello:
        (frame,) = self.link.take()
        header = decode_header(frame)
        assert header.kind == Kind.HELLO
        assert header.source_incarnation == self.session.incarnation
        assert header.dest_incarnation == self.session.peer_incarnation
        return decode_hello(frame)

    def challenge(self, echo: int, nonce: int = 77, *, incarnation: int = LISTENER, identity: bytes = b"you") -> None:
        challenge = Challenge(echo, nonce, 100, 10_000, identity)
        self.receive(encode_challenge(incarnation, self.session.incarnation, challenge))

    def receive(self, frame: bytes, *extra: bytes) -> None:
        self.side.receive(self.link, frame, *extra)

    def establish(self, incarnation: int = LISTENER) -> None:
        """Go through the whole handshake; nothing of it is left to be looked at."""
        hello = self.connect()
        self.challenge(hello.nonce, incarnation=incarnation)
        assert self.session.state is State.ESTABLISHED
        assert self.link.kinds() == [Kind.RESPONSE]
        assert self.side.owner.take() == []


def test_a_connection_says_hello_with_all_that_the_listener_must_know() -> None:
    connecting = Connecting(Limits(window_msgs=5, window_bytes=6))
    hello = connecting.connect()
    assert (hello.window_msgs, hello.window_bytes, hello.identity) == (5, 6, b"me")
    assert hello.nonce > 0
    assert hello.process > 0
    other_link = FakeLink()
    other = connecting.side.handshake.open(other_link)
    connecting.side.handshake.handle_link_up(other_link, 0.0)
    (frame,) = other_link.take()
    # One process, and two sessions.
    assert decode_hello(frame).process == hello.process
    assert decode_hello(frame).nonce != hello.nonce
    assert other.incarnation != connecting.session.incarnation


def test_row_connecting_a_challenge_that_echoes_our_nonce_establishes() -> None:
    connecting = Connecting()
    session = connecting.session
    hello = connecting.connect()
    connecting.challenge(hello.nonce)
    assert session.state is State.ESTABLISHED
    assert (session.peer_incarnation, session.peer) == (LISTENER, b"you")
    assert session.link is connecting.link
    (response,) = connecting.link.take()
    assert decode_header(response) == Header(1, Kind.RESPONSE, 0, session.incarnation, LISTENER)
    assert decode_response(response) == 77
    assert session.next_deadline_at == IDLE_PROBE_S
    connecting.side.send(session, b"a")
    assert connecting.link.kinds() == [Kind.DATA]


def test_the_windows_of_the_challenge_count() -> None:
    connecting = Connecting()
    connecting.establish()
    for _ in range(101):
        connecting.side.send(connecting.session, b"a")
    assert len(connecting.session.queue) == 1


def test_row_established_the_same_incarnation_on_a_new_link_resends() -> None:
    connecting = Connecting()
    connecting.establish()
    connecting.side.send(connecting.session, b"a")
    assert connecting.link.kinds() == [Kind.DATA]
    connecting.side.handshake.handle_link_down(connecting.link)
    assert connecting.session.link is None
    assert connecting.session.state is State.ESTABLISHED
    hello = connecting.connect()
    connecting.challenge(hello.nonce, nonce=0)
    # It knows us, so it wants no RESPONSE.
    assert connecting.link.kinds() == [Kind.DATA]
    assert connecting.side.owner.take() == []
    assert connecting.session.next_number == 2


def test_row_established_another_incarnation_ends_the_old_one() -> None:
    connecting = Connecting()
    connecting.establish()
    connecting.side.send(connecting.session, b"a")
    connecting.side.handshake.handle_link_down(connecting.link)
    connecting.link.take()
    hello = connecting.connect()
    connecting.challenge(hello.nonce, incarnation=OTHER_LISTENER)
    ((event, why),) = connecting.side.owner.take()
    assert event == "ended"
    assert "another one is there" in str(why)
    assert connecting.side.owner.lost == [b"a"]
    assert connecting.session.state is State.ESTABLISHED
    assert connecting.session.peer_incarnation == OTHER_LISTENER
    assert connecting.session.next_number == 1
    assert connecting.link.kinds() == [Kind.RESPONSE]


def test_row_established_a_goodbye_ends_it_and_says_hello() -> None:
    connecting = Connecting()
    connecting.establish()
    connecting.receive(encode_goodbye(LISTENER, connecting.session.incarnation, 1))
    assert connecting.side.owner.take() == [("ended", "the other end has closed")]
    assert connecting.session.state is State.CONNECTING
    assert connecting.link.kinds() == [Kind.HELLO]


@pytest.mark.parametrize("state", [State.CONNECTING, State.ESTABLISHED])
@pytest.mark.parametrize("event", ["link up", "UNKNOWN", "strange CHALLENGE"])
def test_row_any_says_hello_with_a_fresh_nonce_until_it_is_echoed(state: State, event: str) -> None:
    connecting = Connecting()
    nonces = {0}
    if state is State.ESTABLISHED:
        connecting.establish()
    if event == "link up":
        nonces.add(connecting.connect().nonce)
    elif event == "UNKNOWN":
        connecting.receive(encode_header(Kind.UNKNOWN, 0, connecting.session.incarnation))
        nonces.add(connecting.take_hello().nonce)
    else:
        connecting.challenge(12345, incarnation=OTHER_LISTENER)
        nonces.add(connecting.take_hello().nonce)
    assert connecting.session.state is state
    assert len(nonces) == 2
    # The same nonce each time: a nonce that changes never gets its echo if the way is long.
    waits, now = [], connecting.side.now
    for _ in range(5):
        waits.append(connecting.session.hello_at - now)
        now = connecting.session.hello_at
        connecting.side.tick(now)
        nonces.add(connecting.take_hello().nonce)
    assert waits == pytest.approx([0.25, 0.5, 1.0, 2.0, 2.0], abs=1.1 * TIMER_TICK_S)
    assert len(nonces) == 2
    connecting.challenge(max(nonces))
    assert connecting.session.hello_at == FOREVER
    assert connecting.session.nonce == 0


def test_while_a_hello_is_open_nothing_makes_another_one() -> None:
    connecting = Connecting()
    connecting.connect()
    connecting.side.handshake.handle_link_up(connecting.link, 0.0)
    connecting.receive(encode_header(Kind.UNKNOWN, 0, connecting.session.incarnation))
    connecting.challenge(12345)
    assert connecting.link.take() == []


def test_the_time_between_two_hellos_has_a_jitter() -> None:
    connecting = Connecting()
    connecting.side.rng.number = 0.9
    connecting.connect()
    assert connecting.session.hello_at == pytest.approx(0.25 * (0.75 + 0.5 * 0.9))


@pytest.mark.parametrize("state", [State.CONNECTING, State.ESTABLISHED])
def test_row_any_a_refusal_is_told_and_tried_again_later(state: State) -> None:
    connecting = Connecting()
    if state is State.ESTABLISHED:
        connecting.establish()
        connecting.side.handshake.handle_link_down(connecting.link)
    first = connecting.connect()
    source = LISTENER if state is State.ESTABLISHED else 0
    connecting.receive(encode_refusal(connecting.session.incarnation, Reason.LIMIT, "no room", source))
    assert connecting.side.owner.take() == [("refused", Reason.LIMIT, "no room")]
    # Who refuses the incarnation that was established never made it a session of its own.
    assert connecting.side.owner.did_not_run is (state is State.ESTABLISHED)
    assert connecting.session.state is State.CONNECTING
    assert connecting.session.peer_incarnation == 0
    assert connecting.session.nonce == 0
    assert connecting.session.next_deadline_at == HELLO_S_MAX
    connecting.side.tick(1.0)  # When it would have said the first HELLO again.
    assert connecting.link.take() == []
    assert connecting.side.handshake.next_deadline_at == pytest.approx(HELLO_S_MAX, abs=TIMER_TICK_S)
    connecting.side.tick(HELLO_S_MAX)
    assert connecting.take_hello().nonce != first.nonce


@pytest.mark.parametrize("source", [0, OTHER_LISTENER])
@pytest.mark.parametrize("is_asking", [False, True])
def test_a_refusal_by_another_incarnation_than_the_established_one_is_stale(source: int, is_asking: bool) -> None:
    """What was sent in the session may have run, and may be answered yet."""
    connecting = Connecting()
    connecting.establish()
    nonce = 0
    if is_asking:
        connecting.side.handshake.handle_link_down(connecting.link)
        nonce = connecting.connect().nonce
    connecting.receive(encode_refusal(connecting.session.incarnation, Reason.IDENTITY_IN_USE, "taken", source))
    assert connecting.side.owner.take() == []
    assert connecting.side.owner.dropped == {"stale_session": 1}
    assert connecting.session.state is State.ESTABLISHED
    if is_asking:
        # Nor is the question taken back.
        connecting.challenge(nonce, nonce=0)
    connecting.side.send(connecting.session, b"a")
    assert connecting.link.kinds() == [Kind.DATA]


@pytest.mark.parametrize("source", [0, LISTENER])
def test_a_refusal_of_what_was_not_asked_is_stale(source: int) -> None:
    """A session that has not said HELLO, or was refused before, has nothing to be refused."""
    connecting = Connecting()
    refusal = encode_refusal(connecting.session.incarnation, Reason.LIMIT, "no room", source)
    connecting.receive(refusal)
    assert connecting.side.owner.dropped == {"stale_session": 1}
    connecting.connect()
    connecting.receive(refusal)
    connecting.receive(refusal)
    assert connecting.side.owner.dropped == {"stale_session": 2}
    assert len(connecting.side.owner.take()) == 1


def test_a_connection_whose_link_took_nothing_says_hello_and_resumes() -> None:
    """The transport may have mended the link before it told that it was down."""
    connecting = Connecting()
    connecting.establish()
    connecting.link.is_up = False
    connecting.side.send(connecting.session, b"a")
    assert connecting.link.take() == []
    connecting.link.is_up = True
    assert connecting.side.handshake.next_deadline_at <= 5.0
    connecting.side.tick(5.0)
    hello = connecting.take_hello()
    assert connecting.side.handshake.next_deadline_at > 5.0
    connecting.challenge(hello.nonce, nonce=0)
    assert connecting.link.kinds() == [Kind.DATA]
    assert connecting.session.next_number == 2


def test_a_refusal_after_the_challenge_makes_the_session_connect_anew() -> None:
    """So it is refused when the RESPONSE shows that the identity is in use."""
    connecting = Connecting()
    connecting.establish()
    connecting.receive(
        encode_header(Kind.REFUSED, LISTENER, connecting.session.incarnation, Reason.IDENTITY_IN_USE) + b"taken"
    )
    assert connecting.side.owner.take() == [("refused", Reason.IDENTITY_IN_USE, "taken")]
    assert connecting.side.owner.did_not_run
    assert connecting.session.state is State.CONNECTING
    connecting.side.send(connecting.session, b"a")
    assert connecting.link.take() == []
    connecting.side.tick(connecting.session.next_deadline_at)
    connecting.challenge(connecting.take_hello().nonce, incarnation=OTHER_LISTENER)
    assert connecting.link.kinds() == [Kind.RESPONSE, Kind.DATA]


def test_a_refusal_for_an_unknown_reason_is_a_refusal() -> None:
    connecting = Connecting()
    connecting.connect()
    frame = encode_header(Kind.REFUSED, 0, connecting.session.incarnation, 99) + b"why\xff"
    connecting.receive(frame)
    assert connecting.side.owner.take() == [("refused", Reason.LIMIT, "why\ufffd")]


def test_row_any_a_closed_session_does_nothing_any_more() -> None:
    connecting = Connecting()
    connecting.establish()
    session, incarnation = connecting.session, connecting.session.incarnation
    session.say_goodbye()
    connecting.side.handshake.discard(session)
    assert connecting.link.kinds() == [Kind.DATA, Kind.GOODBYE]
    assert not connecting.side.handshake.sessions
    for frame in (
        encode_header(Kind.UNKNOWN, 0, incarnation),
        encode_refusal(incarnation, Reason.LIMIT, "no"),
        encode_challenge(LISTENER, incarnation, Challenge(5, 6, 7, 8, b"you")),
        encode_goodbye(LISTENER, incarnation, 1),
        data_frame(LISTENER, incarnation, 1, [b"0-0-x"]),
    ):
        connecting.receive(frame)
    assert session.state is State.CLOSED
    assert connecting.link.take() == []
    assert connecting.side.owner.take() == []
    assert connecting.side.owner.received == []
    connecting.side.tick(1_000.0)
    assert connecting.link.take() == []


def test_a_challenge_is_answered_again_because_the_response_was_lost() -> None:
    connecting = Connecting()
    connecting.establish()
    connecting.challenge(0, nonce=78)
    (response,) = connecting.link.take()
    assert decode_response(response) == 78
    # Without a nonce, and without a HELLO of ours, it is for nothing.
    connecting.challenge(0, nonce=0)
    assert connecting.link.take() == []


def test_an_echo_counts_once() -> None:
    connecting = Connecting()
    hello = connecting.connect()
    connecting.challenge(hello.nonce)
    connecting.link.take()
    # The same CHALLENGE again, or one of another incarnation with the old echo, establishes nothing.
    connecting.challenge(hello.nonce)
    assert connecting.link.kinds() == [Kind.RESPONSE]
    connecting.challenge(hello.nonce, incarnation=OTHER_LISTENER)
    assert connecting.link.kinds() == [Kind.HELLO]
    assert connecting.session.peer_incarnation == LISTENER
    assert connecting.side.owner.take() == []


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("is_established", [False, True])
def test_a_frame_for_another_incarnation_of_ours_is_dropped(kind: Kind, is_established: bool) -> None:
    connecting = Connecting()
    if is_established:
        connecting.establish()
    else:
        connecting.connect()
    connecting.receive(encode_header(kind, LISTENER, connecting.session.incarnation + 1) + b"\0" * 100)
    assert connecting.side.owner.dropped == {"stale_session": 1}
    assert connecting.side.owner.take() == []
    assert connecting.link.take() == []
    assert connecting.session.state is (State.ESTABLISHED if is_established else State.CONNECTING)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (Kind.HELLO, LISTENER),
        (Kind.RESPONSE, LISTENER),
        (Kind.DATA, OTHER_LISTENER),
        (Kind.GOODBYE, OTHER_LISTENER),
        (99, LISTENER),
        (0, LISTENER),
    ],
)
def test_what_fits_no_row_of_a_connection_is_dropped(kind: Kind, source: int) -> None:
    for is_established in (False, True):
        connecting = Connecting()
        if is_established:
            connecting.establish()
        connecting.receive(encode_header(kind, source, connecting.session.incarnation) + b"\0" * 100)
        assert connecting.side.owner.dropped == {"stale_session": 1}
        assert connecting.side.owner.take() == []
        assert connecting.link.take() == []


def test_data_and_goodbye_before_there_is_a_session_are_dropped() -> None:
    connecting = Connecting()
    connecting.connect()
    connecting.receive(data_frame(LISTENER, connecting.session.incarnation, 1, [b"0-0-x"]))
    connecting.receive(encode_goodbye(LISTENER, connecting.session.incarnation, 1))
    # What `peer_incarnation` is before anything was established.
    connecting.receive(data_frame(0, connecting.session.incarnation, 1, [b"0-0-x"]))
    assert connecting.side.owner.dropped == {"stale_session": 3}
    assert connecting.side.owner.received == []


def test_data_is_processed_once_and_acknowledged() -> None:
    connecting = Connecting()
    connecting.establish()
    frame = data_frame(LISTENER, connecting.session.incarnation, 1, [b"0-0-a", b"0-0-b"])
    connecting.receive(frame)
    connecting.receive(frame)
    longer = data_frame(LISTENER, connecting.session.incarnation, 2, [b"0-0-b", b"0-0-c"])
    connecting.receive(longer)
    assert connecting.side.owner.received == [b"a", b"b", b"c"]
    assert connecting.session.processed_through == 3


def test_an_unknown_version_is_refused_with_a_clear_error_at_the_connection() -> None:
    connecting = Connecting()
    connecting.connect()
    newer = bytearray(encode_refusal(connecting.session.incarnation, Reason.VERSION, "old!"))
    newer[1] = 2
    connecting.receive(bytes(newer))
    ((event, reason, text),) = connecting.side.owner.take()
    assert (event, reason) == ("refused", Reason.VERSION)
    assert "session version 2 is not understood here, version 1 is" in str(text)
    assert connecting.side.owner.dropped == {"unknown_version": 1}
    assert connecting.link.take() == []
    # It may be replaced by an older one.
    connecting.side.tick(connecting.session.hello_at)
    connecting.challenge(connecting.take_hello().nonce)
    assert connecting.session.state is State.ESTABLISHED


@pytest.mark.parametrize("length", [0, 1, IDENTITY_BYTES_MAX, IDENTITY_BYTES_MAX + 1, 100_000])
def test_the_identity_of_a_listener_has_a_limit(length: int) -> None:
    """It stands in the error text of every message that waits."""
    connecting = Connecting()
    hello = connecting.connect()
    connecting.challenge(hello.nonce, identity=b"x" * length)
    if 0 < length <= IDENTITY_BYTES_MAX:
        assert connecting.session.state is State.ESTABLISHED
    else:
        assert connecting.session.state is State.CONNECTING
        assert connecting.side.owner.dropped == {"malformed_frames": 1}


def test_a_deadline_of_a_connection_without_a_link_is_forgotten() -> None:
    connecting = Connecting()
    connecting.connect()
    connecting.side.handshake.handle_link_down(connecting.link)
    connecting.side.tick(100.0)
    assert connecting.link.take() == []
    assert connecting.side.handshake.next_deadline_at == FOREVER


# A listener, alone.

CONNECTION = 500  # The incarnation that the connection claims.
PROCESS = 50


class Listening:
    """A listener; the test plays the connections."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.side = Side(b"server", 2_000, limits)
        self.owner = self.side.owner
        self.handshake = self.side.handshake
        self.link = FakeLink()

    def receive(self, frame: bytes, *extra: bytes, routing_id: bytes = b"r1", link: Link | None = None) -> None:
        self.side.receive(link or self.link, frame, *extra, routing_id=routing_id)

    def hello(
        self,
        nonce: int = 7,
        *,
        source: int = CONNECTION,
        process: int = PROCESS,
        identity: bytes = b"client",
        routing_id: bytes = b"r1",
        link: FakeLink | None = None,
    ) -> tuple[int, Challenge]:
        """Say HELLO; return the incarnation that the listener claims in its CHALLENGE, and that."""
        (link or self.link).sent.clear()
        frame = encode_hello(source, 0, Hello(nonce, process, 100, 10_000, identity))
        self.receive(frame, routing_id=routing_id, link=link)
        ((to, (answer,)), *_) = (link or self.link).sent
        (link or self.link).sent.clear()
        header = decode_header(answer)
        assert to == routing_id
        assert (header.kind, header.dest_incarnation) == (Kind.CHALLENGE, source)
        return header.source_incarnation, decode_challenge(answer)

    def establish(self, **who: object) -> Session:
        """Go through the whole handshake; return the session."""
        before = set(self.handshake.sessions)
        incarnation, challenge = self.hello(**who)  # type: ignore[arg-type]
        assert set(self.handshake.sessions) == before
        source = who.get("source", CONNECTION)
        routing_id = who.get("routing_id", b"r1")
        assert isinstance(source, int)
        assert isinstance(routing_id, bytes)
        self.receive(encode_response(source, incarnation, challenge.nonce), routing_id=routing_id)
        (session,) = set(self.handshake.sessions) - before
        assert session.incarnation == incarnation
        return session

    def take_refusal(self) -> tuple[Reason, str]:
        (frame,) = self.link.take()[-1:]
        header = decode_header(frame)
        assert header.kind == Kind.REFUSED
        assert header.dest_incarnation
        return Reason(header.flags), decode_refusal(frame)


def test_row_none_a_response_that_echoes_our_nonce_establishes() -> None:
    listening = Listening()
    session = listening.establish()
    assert session.state is State.ESTABLISHED
    assert (session.peer_incarnation, session.peer, session.process) == (CONNECTION, b"client", PROCESS)
    assert (session.link, session.routing_id) == (listening.link, b"r1")
    assert session.connection_link is None
    listening.side.send(session, b"a")
    ((to, _),) = listening.link.sent
    assert to == b"r1"


def test_a_challenge_says_all_that_the_connection_must_know() -> None:
    listening = Listening(Limits(window_msgs=5, window_bytes=6, message_bytes_max=8))
    incarnation, challenge = listening.hello(nonce=7)
    assert challenge == Challenge(7, challenge.nonce, 5, 6, b"server", 8)
    assert challenge.nonce > 0
    assert incarnation > 0
    assert not listening.handshake.sessions


def test_a_listener_with_an_identity_of_its_own_shows_that() -> None:
    listening = Listening()
    listening.link.identity = b"its own"
    assert listening.hello()[1].identity == b"its own"


def test_the_windows_of_the_hello_count() -> None:
    listening = Listening()
    session = listening.establish()
    for _ in range(101):
        listening.side.send(session, b"a")
    assert len(session.queue) == 1


def test_a_session_of_a_listener_with_workers_knows_it() -> None:
    listening = Listening()
    listening.link.has_workers = True
    assert listening.establish().has_workers


def test_one_nonce_is_kept_for_each_claimed_incarnation_until_it_expires() -> None:
    listening = Listening()
    incarnation, first = listening.hello(nonce=7)
    again, second = listening.hello(nonce=8)
    assert (again, second.nonce, second.echo) == (incarnation, first.nonce, 8)
    assert listening.handshake.next_deadline_at == CHALLENGE_S
    listening.side.tick(CHALLENGE_S)
    assert listening.handshake.next_deadline_at == FOREVER
    listening.receive(encode_response(CONNECTION, incarnation, first.nonce))
    assert not listening.handshake.sessions
    assert listening.owner.dropped == {"stale_session": 1}
    later, third = listening.hello(nonce=9)
    assert later != incarnation
    assert third.nonce != first.nonce


def test_an_expired_challenge_does_not_count_even_if_nobody_has_swept_it() -> None:
    listening = Listening()
    incarnation, challenge = listening.hello()
    listening.side.now = CHALLENGE_S
    listening.receive(encode_response(CONNECTION, incarnation, challenge.nonce))
    assert not listening.handshake.sessions


@pytest.mark.parametrize("wrong", ["nonce", "incarnation", "source"])
def test_a_wrong_response_establishes_nothing(wrong: str) -> None:
    listening = Listening()
    incarnation, challenge = listening.hello()
    listening.receive(
        encode_response(
            CONNECTION + (wrong == "source"),
            incarnation + (wrong == "incarnation"),
            challenge.nonce + (wrong == "nonce"),
        )
    )
    assert not listening.handshake.sessions
    if wrong == "nonce":
        # It may have been one to an older CHALLENGE, so it is told the present one.
        assert listening.link.kinds() == [Kind.CHALLENGE]
    else:
        assert listening.owner.dropped == {"stale_session": 1}
        assert listening.link.take() == []
    listening.receive(encode_response(CONNECTION, incarnation, challenge.nonce))
    assert len(listening.handshake.sessions) == 1


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.GOODBYE, Kind.UNKNOWN, Kind.CHALLENGE, Kind.REFUSED])
def test_a_connection_whose_response_was_lost_is_challenged_again(kind: Kind) -> None:
    listening = Listening()
    incarnation, challenge = listening.hello()
    listening.receive(encode_header(kind, CONNECTION, incarnation) + b"\0" * 100)
    assert not listening.handshake.sessions
    assert listening.owner.received == []
    (frame,) = listening.link.take()
    assert decode_header(frame) == Header(1, Kind.CHALLENGE, 0, incarnation, CONNECTION)
    assert decode_challenge(frame)[:2] == (0, challenge.nonce)


def test_a_second_response_is_ignored() -> None:
    listening = Listening()
    incarnation, challenge = listening.hello()
    for _ in range(2):
        listening.receive(encode_response(CONNECTION, incarnation, challenge.nonce))
    assert len(listening.handshake.sessions) == 1
    assert not listening.owner.dropped
    assert listening.link.take() == []


def test_a_hello_on_a_new_link_resumes_the_session() -> None:
    listening = Listening()
    session = listening.establish()
    listening.side.send(session, b"a")
    listening.link.sent.clear()
    listening.link.gone.add(b"r1")
    new_link = FakeLink()
    incarnation, challenge = listening.hello(nonce=8, routing_id=b"r2", link=new_link)
    assert incarnation == session.incarnation
    # It is known to live by what it echoes later, if it does; a nonce is not needed.
    assert challenge[:2] == (8, 0)
    assert (session.link, session.routing_id) == (new_link, b"r2")
    assert len(listening.handshake.sessions) == 1


def test_data_on_a_new_link_moves_the_session_there() -> None:
    listening = Listening()
    session = listening.establish()
    listening.receive(data_frame(CONNECTION, session.incarnation, 1, [b"0-0-a"]), routing_id=b"r1")
    listening.receive(data_frame(CONNECTION, session.incarnation, 2, [b"0-0-b"]), routing_id=b"r2")
    assert session.routing_id == b"r2"
    other = FakeLink()
    listening.receive(data_frame(CONNECTION, session.incarnation, 3, [b"0-0-c"]), routing_id=b"r2", link=other)
    assert session.link is other
    listening.link.sent.clear()
    assert listening.owner.received == [b"a", b"b", b"c"]
    listening.side.tick(ACK_DELAY_S)
    assert listening.link.take() == []
    assert [to for to, _ in other.sent] == [b"r2"]


def test_a_session_moves_there_even_when_its_first_link_is_gone() -> None:
    listening = Listening()
    session = listening.establish()
    listening.link.gone.add(b"r1")
    listening.side.send(session, b"a")
    assert session.link is None
    listening.receive(data_frame(CONNECTION, session.incarnation, 1, (), Flag.ASK), routing_id=b"r2")
    assert [to for to, _ in listening.link.sent] == [b"r2"]
    assert listening.link.kinds() == [Kind.DATA]


def test_row_established_a_goodbye_ends_the_session() -> None:
    listening = Listening()
    session = listening.establish()
    listening.side.send(session, b"a")
    listening.receive(encode_goodbye(CONNECTION, session.incarnation, 1))
    assert session.state is State.CLOSED
    assert listening.owner.take() == [("ended", "the other end has closed")]
    assert listening.owner.lost == [b"a"]
    assert not listening.handshake.sessions
    assert listening.handshake.find("handle", b"client") is None
    assert listening.handshake.next_deadline_at == FOREVER


def test_row_established_a_new_process_takes_over_when_the_old_one_cannot_be_reached() -> None:
    listening = Listening()
    old = listening.establish()
    listening.side.send(old, b"a")
    listening.link.gone.add(b"r1")
    new = listening.establish(source=CONNECTION + 1, process=PROCESS + 1, routing_id=b"r2")
    ((event, why),) = listening.owner.take()
    assert event == "ended"
    assert "a new one has its identity" in str(why)
    assert listening.owner.lost == [b"a"]
    assert old.state is State.CLOSED
    assert set(listening.handshake.sessions) == {new}
    assert listening.handshake.find("handle", b"client") is new


def test_a_second_living_process_is_refused_and_the_first_is_still_served() -> None:
    listening = Listening()
    first = listening.establish()
    listening.link.take()
    incarnation, challenge = listening.hello(source=CONNECTION + 1, process=PROCESS + 1, routing_id=b"r2")
    response = encode_response(CONNECTION + 1, incarnation, challenge.nonce)
    listening.receive(response, routing_id=b"r2")
    ((asked, (question,)), (refused, _)) = listening.link.sent
    assert (asked, refused) == (b"r1", b"r2")
    assert decode_header(question)[1:3] == (Kind.DATA, Flag.ASK)
    assert decode_header(listening.link.sent[-1][1][0]).source_incarnation == incarnation
    reason, text = listening.take_refusal()
    assert reason is Reason.IDENTITY_IN_USE
    assert text == "another living messenger is 'client' here; take another identity"
    assert listening.owner.dropped == {"identity_in_use": 1}
    assert set(listening.handshake.sessions) == {first}
    assert listening.owner.take() == []
    # Told so, it never becomes a session by the same challenge: what it sent ended as not delivered.
    listening.link.gone.add(b"r1")
    listening.receive(response, routing_id=b"r2")
    assert set(listening.handshake.sessions) == {first}


def test_several_connections_of_one_process_have_a_session_each() -> None:
    listening = Listening()
    first = listening.establish()
    second = listening.establish(source=CONNECTION + 1, routing_id=b"r2")
    assert set(listening.handshake.sessions) == {first, second}
    listening.handshake.discard(first)
    assert listening.handshake.find("handle", b"client") is second
    # All of them end when the process is another one and none of them can be reached.
    third = listening.establish(source=CONNECTION + 2, routing_id=b"r3")
    listening.link.gone |= {b"r2", b"r3"}
    listening.establish(source=CONNECTION + 3, process=PROCESS + 1, routing_id=b"r4")
    assert (second.state, third.state) == (State.CLOSED, State.CLOSED)
    assert len(listening.owner.take()) == 2


def test_the_session_that_is_found_is_the_one_that_can_be_reached() -> None:
    listening = Listening()
    first = listening.establish()
    second = listening.establish(source=CONNECTION + 1, routing_id=b"r2")
    find = listening.handshake.find
    first.attach(None)
    assert find("handle", b"client") is second
    second.attach(None)
    first.attach(listening.link, b"r1")
    assert find("handle", b"client") is first
    second.attach(listening.link, b"r2")
    second.heard_at = 5.0
    assert find("handle", b"client") is second
    assert find("another listener", b"client") is None
    assert find("handle", b"somebody else") is None


@pytest.mark.parametrize("kind", [Kind.CHALLENGE, Kind.UNKNOWN, Kind.REFUSED, 99])
def test_what_fits_no_row_of_a_listener_is_dropped(kind: Kind) -> None:
    listening = Listening()
    session = listening.establish()
    listening.receive(encode_header(kind, CONNECTION, session.incarnation) + b"\0" * 100)
    listening.receive(encode_header(kind, 1, 2) + b"\0" * 100)
    assert listening.owner.dropped == {"stale_session": 2}
    assert listening.link.take() == []
    assert session.state is State.ESTABLISHED


@pytest.mark.parametrize("kind", [Kind.RESPONSE, Kind.GOODBYE])
def test_an_end_of_nothing_is_dropped(kind: Kind) -> None:
    listening = Listening()
    listening.receive(encode_header(kind, CONNECTION, 5) + b"\0" * 100)
    session = listening.establish()
    listening.receive(encode_header(kind, CONNECTION, session.incarnation + 1) + b"\0" * 100)
    assert listening.owner.dropped == {"stale_session": 2}
    assert session.state is State.ESTABLISHED


def test_data_of_an_unknown_session_is_answered_with_unknown() -> None:
    listening = Listening()
    listening.receive(data_frame(CONNECTION, 5, 1, [b"0-0-a"]), routing_id=b"r9")
    ((to, (frame,)),) = listening.link.sent
    assert to == b"r9"
    assert decode_header(frame) == Header(1, Kind.UNKNOWN, 0, 0, CONNECTION)
    assert listening.owner.dropped == {"unknown_session": 1}
    assert listening.owner.received == []
    # So is data for an older incarnation of ours.
    session = listening.establish()
    listening.receive(data_frame(CONNECTION, session.incarnation - 1, 1, [b"0-0-a"]))
    assert listening.owner.received == []


# Limits.


@pytest.mark.parametrize("length", [0, IDENTITY_BYTES_MAX + 1])
def test_an_identity_that_is_empty_or_too_long_is_malformed(length: int) -> None:
    listening = Listening()
    listening.receive(encode_hello(CONNECTION, 0, Hello(7, PROCESS, 1, 1, b"x" * length)))
    assert listening.owner.dropped == {"malformed_frames": 1}
    assert listening.link.take() == []


def test_the_longest_identity_is_none_too_long() -> None:
    Listening().establish(identity=b"x" * IDENTITY_BYTES_MAX)


def test_one_identity_has_few_open_challenges() -> None:
    listening = Listening()
    for number in range(CHALLENGES_PER_IDENTITY_MAX):
        listening.hello(source=number + 1)
    listening.receive(encode_hello(99, 0, Hello(7, PROCESS, 1, 1, b"client")))
    assert listening.link.take() == []
    assert listening.owner.dropped == {"too_many_challenges": 1}
    # Those that are known are still served, and so are others.
    listening.hello(source=1)
    listening.hello(source=100, identity=b"another")
    listening.side.now = CHALLENGE_S
    listening.hello(source=99)


def test_all_identities_together_have_a_bounded_number_of_open_challenges() -> None:
    listening = Listening()
    for number in range(CHALLENGES_MAX):
        listening.hello(source=number + 1, identity=b"%d" % number)
    listening.receive(encode_hello(9_999, 0, Hello(7, PROCESS, 1, 1, b"one more")))
    assert listening.link.take() == []
    assert listening.owner.dropped == {"too_many_challenges": 1}


def test_more_sessions_than_the_limit_are_refused_with_it() -> None:
    listening = Listening(Limits(sessions_max=1))
    listening.establish()
    incarnation, challenge = listening.hello(source=CONNECTION + 1, identity=b"another", routing_id=b"r2")
    listening.receive(encode_response(CONNECTION + 1, incarnation, challenge.nonce), routing_id=b"r2")
    assert decode_header(listening.link.sent[-1][1][0]).source_incarnation == incarnation
    reason, text = listening.take_refusal()
    assert reason is Reason.LIMIT
    assert text == "1 sessions are open here, that is sessions_max"
    assert listening.owner.dropped == {"too_many_sessions": 1}
    assert len(listening.handshake.sessions) == 1


def test_more_sessions_of_one_identity_than_the_limit_are_refused_with_it() -> None:
    listening = Listening(Limits(sessions_per_identity_max=1))
    listening.establish()
    incarnation, challenge = listening.hello(source=CONNECTION + 1, routing_id=b"r2")
    listening.receive(encode_response(CONNECTION + 1, incarnation, challenge.nonce), routing_id=b"r2")
    reason, text = listening.take_refusal()
    assert reason is Reason.LIMIT
    assert text == "1 sessions of 'client' are open, that is sessions_per_identity_max"
    assert listening.owner.dropped == {"too_many_sessions": 1}
    listening.establish(source=CONNECTION + 2, routing_id=b"r3", identity=b"another")


# Identities that a key proves.


def thief_of(listening: "Listening") -> None:
    """From now on what comes by r2 comes with a key of somebody else."""
    listening.link.identities[b"r2"] = b"thief"


def take_key_refusal(listening: "Listening") -> None:
    """It went to the thief, and to nobody else."""
    assert {routing_id for routing_id, _ in listening.link.sent} == {b"r2"}
    reason, text = listening.take_refusal()
    assert reason is Reason.KEY
    assert text == "its key here is not that of 'client'; take the identity that goes with the key"


def test_a_hello_with_an_identity_that_is_not_the_keys_is_refused() -> None:
    listening = Listening()
    thief_of(listening)
    hello = encode_hello(CONNECTION, 0, Hello(7, PROCESS, 1, 1, b"client"))
    listening.receive(hello, routing_id=b"r2")
    take_key_refusal(listening)
    assert listening.owner.dropped == {"foreign_identity": 1}
    listening.establish()


def test_a_response_by_another_key_establishes_nothing() -> None:
    listening = Listening()
    thief_of(listening)
    incarnation, challenge = listening.hello()
    listening.receive(encode_response(CONNECTION, incarnation, challenge.nonce), routing_id=b"r2")
    take_key_refusal(listening)
    assert not listening.handshake.sessions
    listening.receive(encode_response(CONNECTION, incarnation, challenge.nonce), routing_id=b"r1")
    assert len(listening.handshake.sessions) == 1


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.GOODBYE, Kind.HELLO, Kind.RESPONSE])
def test_a_frame_by_another_key_moves_and_ends_no_session(kind: Kind) -> None:
    listening = Listening()
    thief_of(listening)
    session = listening.establish()
    frames = {
        Kind.DATA: data_frame(CONNECTION, session.incarnation, 1, [b"0-0-a"]),
        Kind.GOODBYE: encode_goodbye(CONNECTION, session.incarnation, 0),
        Kind.HELLO: encode_hello(CONNECTION, session.incarnation, Hello(7, PROCESS, 1, 1, b"client")),
        Kind.RESPONSE: encode_response(CONNECTION, session.incarnation, 1),
    }
    listening.receive(frames[kind], routing_id=b"r2")
    take_key_refusal(listening)
    assert listening.owner.dropped == {"foreign_identity": 1}
    assert (listening.owner.received, listening.owner.take()) == ([], [])
    assert (session.state, session.routing_id) == (State.ESTABLISHED, b"r1")


def test_a_server_whose_identity_is_not_its_keys_is_refused() -> None:
    connecting = Connecting()
    connecting.link.identities[b""] = b"bank"
    hello = connecting.connect()
    connecting.challenge(hello.nonce)
    ((event, reason, text),) = connecting.side.owner.take()
    assert (event, reason) == ("refused", Reason.KEY)
    assert text == "the other end calls itself 'you', which is not the identity that goes with its key"
    assert connecting.side.owner.dropped == {"foreign_identity": 1}
    assert connecting.session.state is State.CONNECTING
    # It may have another key, and name, some time later.
    assert connecting.session.hello_at == HELLO_S_MAX
    connecting.side.tick(HELLO_S_MAX)
    hello = connecting.take_hello()
    connecting.challenge(hello.nonce, identity=b"bank")
    assert (connecting.session.peer, connecting.session.peer_incarnation) == (b"bank", LISTENER)


def test_who_is_expelled_is_told_and_forgotten() -> None:
    listening = Listening()
    session = listening.establish()
    listening.side.send(session, b"a")
    listening.link.take()
    listening.handshake.expel(session, "its key was taken off the list")
    assert listening.link.kinds() == [Kind.DATA, Kind.GOODBYE]
    assert listening.owner.take() == [("ended", "its key was taken off the list")]
    assert listening.owner.lost == [b"a"]
    assert not listening.handshake.sessions
    listening.receive(data_frame(CONNECTION, session.incarnation, 1, [b"0-0-a"]))
    assert listening.owner.dropped == {"unknown_session": 1}


def test_connections_are_no_sessions_of_a_listener() -> None:
    """`sessions_max` is of the peers that listeners know; connections have a limit of their own."""
    listening = Listening(Limits(sessions_max=1))
    listening.handshake.open(FakeLink())
    listening.establish()
    assert not listening.owner.dropped


def test_a_session_that_nothing_is_heard_of_is_forgotten() -> None:
    listening = Listening(Limits(session_idle_s_max=60))
    session = listening.establish()
    listening.side.now = 30.0
    listening.receive(data_frame(CONNECTION, session.incarnation))
    session.attach(None)
    listening.side.tick(89.9)
    assert listening.handshake.next_deadline_at == pytest.approx(90.0, abs=TIMER_TICK_S)
    assert set(listening.handshake.sessions) == {session}
    listening.side.tick(90.0)
    assert not listening.handshake.sessions
    assert listening.owner.take() == [("ended", "nothing was heard of it for 60 s")]
    assert listening.handshake.next_deadline_at == FOREVER


def test_discarding_twice_or_what_was_replaced_harms_nobody() -> None:
    listening = Listening()
    session = listening.establish()
    listening.handshake.discard(session)
    listening.handshake.discard(session)
    again = listening.establish()
    listening.handshake.discard(session)
    listening.receive(data_frame(CONNECTION, again.incarnation, 1, [b"0-0-a"]))
    assert listening.owner.received == [b"a"]


# What is no frame, or of another version.


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (b"", "unknown_header"),
        (b"hello", "unknown_header"),
        (b"N" + b"\x01" * 40, "unknown_header"),
        (b"M", "malformed_frames"),
        (encode_header(Kind.DATA, 1, 2)[:-1], "malformed_frames"),
    ],
)
def test_what_is_no_header_is_counted_at_either_side(frame: bytes, kind: str) -> None:
    connecting, listening = Connecting(), Listening()
    connecting.receive(frame)
    listening.receive(frame)
    assert connecting.side.owner.dropped == {kind: 1}
    assert listening.owner.dropped == {kind: 1}


@pytest.mark.parametrize("kind", [Kind.CHALLENGE, Kind.DATA])
def test_malformed_frames_of_each_kind_at_a_connection(kind: Kind) -> None:
    connecting = Connecting()
    connecting.establish()
    frame = encode_header(kind, LISTENER, connecting.session.incarnation)
    for length in range(28):
        connecting.receive(frame + b"\0" * length)
    assert connecting.side.owner.dropped == {"malformed_frames": 28}
    assert connecting.session.state is State.ESTABLISHED


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.RESPONSE, Kind.DATA])
def test_malformed_frames_of_each_kind_at_a_listener(kind: Kind) -> None:
    listening = Listening()
    if kind == Kind.DATA:
        incarnation = listening.establish().incarnation
    else:
        incarnation, _ = listening.hello()
    for length in range(8):
        listening.receive(encode_header(kind, CONNECTION, incarnation) + b"\0" * length)
    assert listening.owner.dropped == {"malformed_frames": 8}
    assert len(listening.handshake.sessions) == (kind == Kind.DATA)


def test_a_batch_that_does_not_decode_is_not_acknowledged() -> None:
    listening = Listening()
    session = listening.establish()
    good = data_frame(CONNECTION, session.incarnation, 1, [b"0-0-a"])
    listening.receive(good + b"more", routing_id=b"r1")
    listening.receive(good, b"a frame too many", routing_id=b"r1")
    assert listening.owner.dropped == {"malformed_frames": 2}
    assert session.received_through == 0
    listening.receive(good)
    assert listening.owner.received == [b"a"]


@pytest.mark.parametrize(
    ("data", "messages", "extra"),
    [
        pytest.param(Data(1, 1, 0, 1), [b"0-0-a"], [], id="what was never sent was received"),
        pytest.param(Data(1, 0, 1, 1), [b"0-0-a"], [], id="what was never received was processed"),
        pytest.param(Data(1, 0, 0, 4), [b"0-0-a"] * 4, [], id="messages"),
        pytest.param(Data(2, 0, 0, 1), [b"0-0-" + b"x" * 17], [], id="bytes"),
        pytest.param(Data(2, 0, 0, 1), [b"0-0-"], [b"x" * 17], id="bytes of large contents"),
    ],
)
def test_a_frame_that_claims_too_much_is_malformed_and_not_acknowledged(
    data: Data, messages: list[bytes], extra: list[bytes]
) -> None:
    listening = Listening(Limits(window_msgs=3, window_bytes=30))
    session = listening.establish()
    listening.owner.processes = False
    if data.first > 1:
        listening.receive(data_frame(CONNECTION, session.incarnation, 1, [b"0-0-" + b"x" * 6]))
        listening.owner.received.clear()
    session.flush(0.0)
    deadline_at = session.next_deadline_at
    frame = encode_data(CONNECTION, session.incarnation, Flag.ASK, data, messages, [True] if extra else [])
    listening.receive(frame, *extra)
    assert listening.owner.dropped == {"malformed_frames": 1}
    assert listening.owner.received == []
    assert session.received_through == data.first - 1
    assert session.next_deadline_at == deadline_at
    assert listening.link.take() == []
    # What fits is taken.
    listening.receive(data_frame(CONNECTION, session.incarnation, data.first, [b"0-0-" + b"x" * 16]))
    assert listening.owner.received == [b"x" * 16]


@pytest.mark.parametrize("flags", [0, Flag.ASK])
def test_the_owner_learns_when_the_other_end_waits_for_an_answer(flags: int) -> None:
    listening = Listening()
    session = listening.establish()
    frame = data_frame(CONNECTION, session.incarnation, 1, [b"0-0-a"], flags)
    # As a driver does it, which flushes at the end of the turn.
    listening.handshake.receive(listening.link, b"r1", frame, [], 0.0)
    assert listening.owner.is_urgent is bool(flags)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.DATA, 99])
def test_an_unknown_version_is_refused_with_a_clear_error_at_the_listener(kind: Kind) -> None:
    listening = Listening()
    newer = bytearray(encode_header(kind, CONNECTION, 0) + b"anything")
    newer[1] = 2
    listening.receive(bytes(newer), routing_id=b"r5")
    ((to, (frame,)),) = listening.link.sent
    assert to == b"r5"
    assert decode_header(frame)[1:] == (Kind.REFUSED, Reason.VERSION, 0, CONNECTION)
    assert decode_refusal(frame) == "session version 2 is not understood here, version 1 is"
    assert listening.owner.dropped == {"unknown_version": 1}


def test_a_refusal_of_another_version_is_not_refused() -> None:
    """Two that do not understand each other must not go on for ever."""
    listening = Listening()
    newer = bytearray(encode_refusal(CONNECTION, Reason.VERSION, "old!"))
    newer[1] = 2
    listening.receive(bytes(newer))
    assert listening.link.take() == []
    assert listening.owner.dropped == {"unknown_version": 1}


@given(st.binary(max_size=80), st.sampled_from(Kind), st.booleans(), st.lists(st.binary(max_size=4), max_size=2))
def test_no_bytes_raise_at_either_side(body: bytes, kind: Kind, is_established: bool, extra: list[bytes]) -> None:
    connecting, listening = Connecting(), Listening()
    theirs = 5
    if is_established:
        connecting.establish()
        theirs = listening.establish().incarnation
    connecting.receive(body, *extra)
    listening.receive(body, *extra)
    connecting.receive(encode_header(kind, LISTENER, connecting.session.incarnation) + body, *extra)
    listening.receive(encode_header(kind, CONNECTION, theirs) + body, *extra)
    assert len(listening.handshake.sessions) == (is_established and not (kind == Kind.GOODBYE and len(body) >= 8))


# Two of them.


class Pair:
    """A client with one connection, and a server; a network between them that a test looks into.

    `links` are numbered: each time that the link comes up anew the server sees another routing id.
    """

    def __init__(self, server_limits: Limits | None = None) -> None:
        self.now = 0.0
        self.server_limits = server_limits
        self.started_count = 0
        self.link_number = 0
        self.start_server()
        self.start_client()

    def start_server(self) -> None:
        self.started_count += 1
        self.server = Side(b"server", 10_000 * self.started_count, self.server_limits)
        self.listener_link = FakeLink("listener")

    def start_client(self, identity: bytes = b"client") -> None:
        self.started_count += 1
        self.client = Side(identity, 10_000 * self.started_count)
        self.connection_link = FakeLink("connection")
        self.session = self.client.handshake.open(self.connection_link)

    @property
    def routing_id(self) -> bytes:
        return b"r%d" % self.link_number

    def link_up(self) -> None:
        self.link_number += 1
        self.connection_link.is_up = True
        self.client.handshake.handle_link_up(self.connection_link, self.now)

    def link_down(self) -> None:
        """Cut the link; what was under way is lost."""
        self.listener_link.gone.add(self.routing_id)
        self.connection_link.is_up = False
        self.connection_link.sent.clear()
        self.listener_link.sent.clear()
        self.client.handshake.handle_link_down(self.connection_link)

    def deliver(self, lost: Sequence[Kind] = ()) -> list[Kind]:
        """Deliver until nothing is under way, but for some kinds; return the kinds that were delivered."""
        delivered = []
        for side in (self.client, self.server):
            side.now = self.now
            side.flush()
        while self.connection_link.sent or self.listener_link.sent:
            to_server, self.connection_link.sent = self.connection_link.sent, []
            to_client, self.listener_link.sent = self.listener_link.sent, []
            for _, (frame, *extra) in to_server:
                if decode_header(frame).kind not in lost:
                    delivered.append(Kind(decode_header(frame).kind))
                    self.server.receive(self.listener_link, frame, *extra, routing_id=self.routing_id)
            for routing_id, (frame, *extra) in to_client:
                if decode_header(frame).kind not in lost and routing_id == self.routing_id:
                    delivered.append(Kind(decode_header(frame).kind))
                    self.client.receive(self.connection_link, frame, *extra)
        return delivered

    def run(self, until: float, lost: Sequence[Kind] = ()) -> None:
        """Let time pass."""
        self.deliver(lost)
        while True:
            due_at = min(side.handshake.next_deadline_at for side in (self.client, self.server))
            if due_at > until:
                break
            self.now = max(self.now, due_at)
            for side in (self.client, self.server):
                side.tick(self.now)
                assert side.handshake.next_deadline_at > self.now
            self.deliver(lost)
        self.now = until

    def server_session(self) -> Session:
        (session,) = self.server.handshake.sessions
        return session


def test_three_frames_establish_both_ends() -> None:
    pair = Pair()
    pair.link_up()
    assert pair.deliver() == [Kind.HELLO, Kind.CHALLENGE, Kind.RESPONSE]
    assert pair.session.state is State.ESTABLISHED
    session = pair.server_session()
    assert session.state is State.ESTABLISHED
    assert (session.incarnation, session.peer_incarnation) == (
        pair.session.peer_incarnation,
        pair.session.incarnation,
    )
    assert (pair.session.peer, session.peer) == (b"server", b"client")
    pair.client.send(pair.session, b"there")
    pair.server.send(session, b"and back")
    pair.run(1.0)
    assert pair.server.owner.received == [b"there"]
    assert pair.client.owner.received == [b"and back"]
    assert pair.session.unprocessed_count == session.unprocessed_count == 0


@pytest.mark.parametrize("lost", [Kind.HELLO, Kind.CHALLENGE, Kind.RESPONSE, Kind.DATA])
def test_a_handshake_of_which_one_kind_is_lost_for_a_time_comes_to_its_end(lost: Kind) -> None:
    pair = Pair()
    pair.link_up()
    pair.client.send(pair.session, b"a")
    pair.run(5.0, [lost])
    assert pair.server.owner.received == []
    pair.run(20.0)
    assert pair.server.owner.received == [b"a"]
    assert pair.session.unprocessed_count == 0
    assert pair.client.owner.take() == []
    assert len(pair.server.handshake.sessions) == 1


def test_a_lost_response_is_said_again_as_soon_as_there_is_data() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver([Kind.RESPONSE])
    assert not pair.server.handshake.sessions
    pair.client.send(pair.session, b"a")
    assert pair.deliver() == [Kind.DATA, Kind.CHALLENGE, Kind.RESPONSE]
    pair.run(5.0)
    assert pair.server.owner.received == [b"a"]


def test_a_lost_response_is_said_again_even_if_there_is_nothing_to_say() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver([Kind.RESPONSE])
    pair.run(30.0)
    assert len(pair.server.handshake.sessions) == 1
    assert pair.session.state is State.ESTABLISHED


def test_a_new_link_loses_and_repeats_nothing() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver()
    session = pair.server_session()
    for number in range(1, 6):
        pair.client.send(pair.session, b"%d" % number)
        pair.server.send(session, b"%d" % number)
        pair.link_down()
        pair.now += 1.0
        pair.link_up()
        pair.run(pair.now + 1.0)
        assert pair.server_session() is session
    expected = [b"%d" % number for number in range(1, 6)]
    assert pair.server.owner.received == expected
    assert pair.client.owner.received == expected
    assert pair.client.owner.take() == pair.server.owner.take() == []


def test_a_restart_of_the_server_is_told_at_the_client_and_the_new_one_serves_it() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver()
    pair.client.send(pair.session, b"sent to the old one")
    pair.link_down()
    pair.start_server()
    pair.client.send(pair.session, b"queued")
    pair.link_up()
    pair.run(5.0)
    ((event, _),) = pair.client.owner.take()
    assert event == "ended"
    assert pair.client.owner.lost == [b"sent to the old one"]
    assert pair.server.owner.received == [b"queued"]


def test_a_restart_of_the_server_on_the_same_link_is_noticed_by_its_unknown() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver()
    pair.start_server()
    pair.client.send(pair.session, b"a")
    assert pair.deliver() == [Kind.DATA, Kind.UNKNOWN, Kind.HELLO, Kind.CHALLENGE, Kind.RESPONSE]
    assert pair.client.owner.lost == [b"a"]
    pair.client.send(pair.session, b"b")
    pair.run(5.0)
    assert pair.server.owner.received == [b"b"]


def test_a_restart_of_the_client_is_told_at_the_server_and_the_new_one_is_served() -> None:
    pair = Pair()
    for number in range(1, 101):
        pair.link_up()
        pair.deliver()
        pair.server.send(pair.server_session(), b"to %d" % number)
        pair.client.send(pair.session, b"from %d" % number)
        pair.link_down()
        pair.start_client()
        pair.now += 1.0
    assert pair.server.owner.lost == [b"to %d" % number for number in range(1, 100)]
    assert {why for _, why in pair.server.owner.take()} == {"its process has ended, and a new one has its identity"}
    assert len(pair.server.handshake.sessions) == 1


def test_a_packet_of_a_dead_incarnation_that_was_long_under_way_revives_nothing() -> None:
    pair = Pair()
    pair.link_up()
    pair.client.flush()
    ((_, (old_hello,)),) = pair.connection_link.sent
    pair.client.send(pair.session, b"x")
    pair.deliver()
    pair.client.send(pair.session, b"old")
    ((_, (old_data,)),) = pair.connection_link.sent
    pair.link_down()
    pair.start_client()
    pair.link_up()
    pair.deliver()
    new = pair.server_session()
    received = list(pair.server.owner.received)
    for frame in (old_hello, old_data, old_hello):
        pair.server.receive(pair.listener_link, frame, routing_id=b"long gone")
    assert pair.server.owner.received == received
    assert pair.server_session() is new
    assert new.state is State.ESTABLISHED
    pair.client.send(pair.session, b"new")
    pair.run(5.0)
    assert pair.server.owner.received[-1] == b"new"


def test_a_second_process_is_refused_until_the_first_is_gone() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver()
    first, first_link = pair.client, pair.connection_link
    first_routing_id = pair.routing_id
    pair.start_client()
    pair.link_up()
    pair.run(1.0)
    assert [event[:2] for event in pair.client.owner.take()] == [("refused", Reason.IDENTITY_IN_USE)]
    assert pair.server_session().routing_id == first_routing_id
    assert first.owner.take() == []
    # It is asked again every two seconds, and not more often.
    pair.run(10.0)
    assert 4 <= len(pair.client.owner.take()) <= 6
    pair.listener_link.gone.add(first_routing_id)
    pair.client.send(pair.session, b"at last")
    pair.run(15.0)
    assert pair.server.owner.received == [b"at last"]
    assert pair.server_session().routing_id == pair.routing_id
    assert first_link is not pair.connection_link


def test_a_server_that_forgot_an_idle_client_serves_it_anew() -> None:
    pair = Pair(Limits(session_idle_s_max=5))
    pair.link_up()
    pair.deliver()
    pair.link_down()
    pair.run(100.0)
    assert not pair.server.handshake.sessions
    assert pair.server.owner.take() == [("ended", "nothing was heard of it for 5 s")]
    pair.link_up()
    pair.client.send(pair.session, b"a")
    pair.run(101.0)
    assert pair.client.owner.take()[0][0] == "ended"
    pair.client.send(pair.session, b"b")
    pair.run(102.0)
    assert pair.server.owner.received[-1] == b"b"


def test_an_idle_client_is_not_forgotten() -> None:
    pair = Pair(Limits(session_idle_s_max=30))
    pair.link_up()
    pair.run(1_000.0)
    assert len(pair.server.handshake.sessions) == 1
    assert pair.client.owner.take() == pair.server.owner.take() == []


def test_a_goodbye_of_the_server_is_followed_by_a_hello_to_its_successor() -> None:
    pair = Pair()
    pair.link_up()
    pair.deliver()
    session = pair.server_session()
    session.say_goodbye()
    pair.server.handshake.discard(session)
    pair.deliver([Kind.HELLO])
    assert pair.client.owner.take() == [("ended", "the other end has closed")]
    pair.start_server()
    pair.run(3.0)
    assert pair.session.state is State.ESTABLISHED
    assert len(pair.server.handshake.sessions) == 1


def test_the_tables_know_every_kind() -> None:
    """A new kind needs a row, and its tests here."""
    assert [kind.name for kind in Kind] == ["HELLO", "CHALLENGE", "RESPONSE", "DATA", "UNKNOWN", "REFUSED", "GOODBYE"]


def test_what_a_data_frame_of_a_connection_says() -> None:
    connecting = Connecting()
    connecting.establish()
    connecting.side.send(connecting.session, b"a")
    (frame,) = connecting.link.take()
    assert data_of(frame) == Data(1, 0, 0, 1)
