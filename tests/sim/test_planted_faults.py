"""Breaks of the protocol, made on purpose: the simulator must catch each, by a rule that it breaks."""

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from messenger import handshake
from messenger.batch import Batch
from messenger.control import Controls, Credit
from messenger.errors import NotDelivered, OutcomeUnknown
from messenger.exchange import Exchange
from messenger.handshake import Handshake
from messenger.limits import HELLO_S_MIN
from messenger.link import FOREVER
from messenger.outgoing import Outgoing
from messenger.session import Session, State
from messenger.wire import Kind, encode_left_ms, encode_response
from tests.sim.simulator import simulate

Plant = Callable[[pytest.MonkeyPatch], None]


def wrap(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, fault: Callable[..., Any]) -> None:
    """Replace a method by `fault`, which gets the real one first."""
    real = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *arguments, **options: fault(real, *arguments, **options))


def keep_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have messages keep their bytes, so that a fault which sends them once more than it should can."""
    monkeypatch.setattr("messenger.batch.KEPT_BYTES_MAX", 1 << 40)
    monkeypatch.setattr(Batch, "forget_bytes", lambda batch: None)


def no_dedup(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(real: Any, session: Session, flags: int, data: Any, *rest: Any) -> int | None:
        first, _, _, count = data
        is_old = count and first + count <= session.received_through + 1
        skipped: int | None = real(session, flags, data, *rest)
        return 0 if is_old else skipped

    wrap(monkeypatch, Session, "receive", receive)


def ack_before_processing(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle_batch(real: Any, exchange: Exchange, session: Session, *rest: Any) -> None:
        real(exchange, session, *rest)
        session.note_processed(session.received_through)

    wrap(monkeypatch, Exchange, "handle_batch", handle_batch)


def no_resend(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(real: Any, session: Session, *arguments: Any) -> None:
        real(session, *arguments)
        session._resending = deque()

    wrap(monkeypatch, Session, "attach", forget)
    wrap(monkeypatch, Session, "_resend", forget)


def resend_of_the_wrong_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_first(real: Any, session: Session, *arguments: Any) -> None:
        real(session, *arguments)
        session._resending = deque(list(session._resending)[1:])

    wrap(monkeypatch, Session, "attach", skip_first)
    wrap(monkeypatch, Session, "_resend", skip_first)


def incarnation_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever arrives on the link is taken for the present session's."""

    def find(real: Any, shake: Handshake, link: Any, routing_id: bytes, source: int, dest: int) -> Session | None:
        session = link.session or shake._by_incarnation.get(source)
        if session is not None and session.state is State.ESTABLISHED:
            source, dest = session.peer_incarnation, session.incarnation
        found: Session | None = real(shake, link, routing_id, source, dest)
        return found

    wrap(monkeypatch, Handshake, "_find_established", find)


def nonce_unchecked_at_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle_challenge(
        real: Any, shake: Handshake, session: Session, link: Any, header: Any, challenge: Any, *rest: Any
    ) -> None:
        session.nonce = session.nonce or 1
        real(shake, session, link, header, challenge._replace(echo=session.nonce), *rest)

    wrap(monkeypatch, Handshake, "_handle_challenge", handle_challenge)


def nonce_unchecked_at_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any RESPONSE of a challenged connection is believed, also one to an earlier challenge, from a process that died.

    The nonce and the incarnation that a challenge names are both fresh, so both checks must go for one to be missed.
    """

    def at_listener(real: Any, shake: Handshake, link: Any, routing_id: bytes, header: Any, *rest: Any) -> None:
        challenged = shake._challenged.get(header.source_incarnation)
        if header.kind == Kind.RESPONSE and challenged is not None:
            _, now = rest
            header = header._replace(dest_incarnation=challenged.incarnation)
            rest = (encode_response(header.source_incarnation, challenged.incarnation, challenged.nonce), now)
        real(shake, link, routing_id, header, *rest)

    wrap(monkeypatch, Handshake, "_receive_at_listener", at_listener)


def hello_believed_by_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session begins with the HELLO; no nonce is asked for."""

    def handle_hello(
        real: Any, shake: Handshake, link: Any, routing_id: bytes, source_incarnation: int, hello: Any, now: float
    ) -> None:
        real(shake, link, routing_id, source_incarnation, hello, now)
        challenged = shake._challenged.get(source_incarnation)
        if challenged is not None:
            shake._establish(link, routing_id, source_incarnation, challenged, now)

    wrap(monkeypatch, Handshake, "_handle_hello", handle_hello)


def nonce_changes_with_every_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round trip of some runs is longer than the time between two HELLOs, if that does not grow."""

    def say_hello(real: Any, shake: Handshake, session: Session, *rest: Any) -> None:
        session.nonce = shake._draw()
        real(shake, session, *rest)

    monkeypatch.setattr(handshake, "HELLO_S_MAX", HELLO_S_MIN)
    wrap(monkeypatch, Handshake, "_say_hello", say_hello)


def gap_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(real: Any, session: Session, flags: int, data: Any, *rest: Any) -> int | None:
        session.received_through = max(session.received_through, data[0] - 1)
        skipped: int | None = real(session, flags, data, *rest)
        return skipped

    wrap(monkeypatch, Session, "receive", receive)


def window_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(real: Any, session: Session, *arguments: Any) -> None:
        real(session, *arguments)
        session.window_msgs = 1_000_000

    wrap(monkeypatch, Session, "_reset", reset)


def outcome_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(real: Any, exchange: Exchange, message_id: int, *rest: Any) -> None:
        is_open = message_id in exchange._outstanding
        real(exchange, message_id, *rest)
        if is_open:
            exchange.calls.append(exchange.calls[-1])

    wrap(monkeypatch, Exchange, "_fail", fail)


def sent_given_to_the_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_bytes(monkeypatch)

    def end(real: Any, session: Session) -> list[Any]:
        lost = real(session)
        if session.connection_link is not None:
            session.is_plain = False
            session.queue.extendleft(reversed(lost))
            session.queue_bytes += sum(outgoing.size_bytes for outgoing in lost)
        return []

    wrap(monkeypatch, Session, "end", end)


def not_delivered_told_for_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(real: Any, exchange: Exchange, message_id: int, kind: Any, *rest: Any) -> None:
        real(exchange, message_id, NotDelivered if kind is OutcomeUnknown else kind, *rest)

    wrap(monkeypatch, Exchange, "_fail", fail)


def deadline_not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(real: Any, exchange: Exchange, now: float) -> None:
        exchange._sweep_at = FOREVER

    wrap(monkeypatch, Exchange, "_sweep", sweep)


def deadline_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle_deadline(real: Any, exchange: Exchange, now: float) -> None:
        real(exchange, now)
        exchange._sessions_at = now

    wrap(monkeypatch, Exchange, "handle_deadline", handle_deadline)


def probe_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle_deadline(real: Any, session: Session, now: float) -> None:
        session.probe_at = FOREVER
        real(session, now)

    wrap(monkeypatch, Session, "handle_deadline", handle_deadline)


def redelivered_unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle_ended(real: Any, exchange: Exchange, session: Session, why: str) -> None:
        real(exchange, session, why)
        for outgoing in session.queue:
            outgoing.option = None

    wrap(monkeypatch, Exchange, "handle_ended", handle_ended)


def redelivered_said_undelivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def discard(real: Any, exchange: Exchange, outlet: Any, queue: Any, why: str) -> set[int]:
        queue = list(queue)
        real(exchange, outlet, queue, why)
        return {outgoing.message_id for outgoing in queue}

    wrap(monkeypatch, Exchange, "_discard", discard)


def never_redelivered(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(real: Any, session: Session) -> list[Any]:
        return [outgoing for outgoing in real(session) if not outgoing.redeliver]

    wrap(monkeypatch, Session, "end", end)


def received_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says goodbye is believed to have received nothing but what was acknowledged as processed."""
    keep_bytes(monkeypatch)

    def take_back(real: Any, session: Session, received_through: int) -> None:
        session.peer_received_through = session.peer_processed_through
        real(session, session.peer_processed_through)

    wrap(monkeypatch, Session, "take_back", take_back)


def answers_given_to_the_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outgoing, "is_answer", False)


def processed_of_another_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of the old incarnation returns when the new one is there."""

    def note_processed(real: Any, exchange: Exchange, session: Session, peer_incarnation: int, number: int) -> None:
        session.note_processed(number)
        exchange.mark_dirty(session)

    wrap(monkeypatch, Exchange, "note_processed", note_processed)


def identity_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "is_reachable", lambda session: False)


def lost_link_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose link went down and came up before anybody looked says no HELLO."""
    monkeypatch.setattr(Session, "_lose_link", lambda session: session.attach(None))


def acks_never_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_owes_much", lambda session: True)


def worker_acknowledges_all_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message that a worker is done with is taken for the last one that was not."""

    def note_one_processed(real: Any, exchange: Exchange, message: Any) -> None:
        if isinstance(message.link, Session):
            message.link.note_processed(message.number)
        real(exchange, message)

    wrap(monkeypatch, Exchange, "note_one_processed", note_one_processed)


def worker_never_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "note_one_processed", lambda exchange, message: None)


def cancelled_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(real: Any, exchange: Exchange, message_id: int) -> bool:
        entry = exchange._outstanding.get(message_id)
        is_open: bool = real(exchange, message_id)
        if entry is not None:
            exchange._outstanding[message_id] = entry
        return is_open

    wrap(monkeypatch, Exchange, "cancel", cancel)


def dead_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(real: Any, shake: Handshake, session: Session, why: str) -> None:
        if why.startswith("nothing was heard"):
            session.heard_at = FOREVER
        else:
            real(shake, session, why)

    wrap(monkeypatch, Handshake, "_end", end)


def sessions_max_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def establish(real: Any, shake: Handshake, *rest: Any) -> None:
        limits = shake._limits
        shake._limits = msgspec.structs.replace(limits, sessions_max=1_000_000)
        real(shake, *rest)
        shake._limits = limits

    wrap(monkeypatch, Handshake, "_establish", establish)


def deadline_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messenger.session.encode_left_ms", lambda left_s: encode_left_ms(left_s / 2))


def expired_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_expired(real: Any, exchange: Exchange, now: float) -> None:
        exchange.expires_at = FOREVER

    wrap(monkeypatch, Exchange, "drop_expired", drop_expired)


def expired_never_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listener with workers does not start does not count as processed."""

    monkeypatch.setattr(Session, "note_unrun", lambda session, number: None)


def credit_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Credit, "has_room", True)


def credit_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controls, "tell_credit", lambda controls, *taken: None)


def credit_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Controls, "repeat_credits", lambda controls: None)


def first_part_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part ends its stream, as a response does."""

    def add_part(real: Any, exchange: Exchange, entry: Any, message: Any) -> None:
        del exchange._outstanding[entry.message_id]
        entry.callback.settle(message, None)

    wrap(monkeypatch, Exchange, "_add_part", add_part)


def deserted_said_undelivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process had that is taken for dead is said not to have run."""

    def fail(real: Any, exchange: Exchange, message_id: int, kind: type, why: str, *details: str) -> None:
        real(exchange, message_id, NotDelivered if "the process there has ended" in why else kind, why, *details)

    wrap(monkeypatch, Exchange, "_fail", fail)


def deserted_gives_up_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It even gives up what was to go to the next process again."""

    def handle_deserted(real: Any, exchange: Exchange, link: Any) -> None:
        real(exchange, link)
        exchange.abandon(link.session, "the process there has ended")

    wrap(monkeypatch, Exchange, "handle_deserted", handle_deserted)


# Each with the rules of which one must be broken, and the seeds within which that must happen: the first so many, or,
# where it takes a hundred or a thousand to meet the one case that shows it, some around that.
FAULTS: list[tuple[Plant, set[str], int | range]] = [
    (no_dedup, {"processed twice"}, 50),
    (ack_before_processing, {"acknowledged too early"}, 50),
    (no_resend, {"no progress", "message vanished"}, 50),
    (resend_of_the_wrong_batch, {"no progress", "message vanished"}, 50),
    (incarnation_unchecked, {"no progress", "window exceeded", "false response"}, range(1_160, 1_500)),
    (nonce_unchecked_at_connection, {"the dead established", "no progress"}, range(100, 600)),
    (nonce_unchecked_at_listener, {"the dead established"}, range(810, 1_000)),
    (hello_believed_by_listener, {"the dead established"}, 500),
    (worker_acknowledges_all_before, {"acknowledged too early"}, 50),
    (worker_never_acknowledges, {"no progress", "message vanished"}, 50),
    (cancelled_not_forgotten, {"outcome told twice"}, 50),
    (dead_never_forgotten, {"the dead not forgotten"}, 500),
    (sessions_max_ignored, {"sessions not bounded"}, 500),
    (nonce_changes_with_every_hello, {"no progress"}, 50),
    (gap_accepted, {"message vanished", "no outcome"}, 50),
    (window_ignored, {"window exceeded"}, 50),
    (outcome_told_twice, {"outcome told twice"}, 20),
    (sent_given_to_the_successor, {"given to a successor"}, 200),
    (not_delivered_told_for_sent, {"false outcome"}, 20),
    (deadline_not_swept, {"deadline not swept"}, 20),
    (deadline_stays, {"deadline not later"}, 20),
    (probe_never_sent, {"no progress", "message vanished"}, 100),
    (redelivered_unmarked, {"redelivered is wrong"}, range(140, 440)),
    (redelivered_said_undelivered, {"false outcome"}, 500),
    (never_redelivered, {"not redelivered"}, range(60, 360)),
    (received_taken_back, {"false outcome", "given to a successor"}, range(80, 580)),
    (answers_given_to_the_successor, {"false response", "given to a successor", "out of order"}, range(780, 1_000)),
    (processed_of_another_incarnation, {"acknowledged too early", "no progress"}, range(1_160, 3_000)),
    (identity_given_away, {"identity taken from the living"}, 200),
    (lost_link_forgotten, {"no progress"}, 200),
    (acks_never_stop, {"storm"}, 20),
    (deadline_shortened, {"dropped before its deadline"}, 50),
    (expired_started, {"started too late"}, 200),
    (credit_ignored, {"false outcome"}, 100),
    (credit_never_told, {"no outcome"}, 100),
    (credit_never_repeated, {"no outcome"}, range(180, 1_680)),
    (first_part_taken_for_all, {"parts are missing"}, 50),
    (deserted_said_undelivered, {"false outcome"}, 200),
    (deserted_gives_up_what_waits, {"false outcome", "message vanished", "not redelivered"}, range(80, 280)),
    (expired_never_acknowledged, {"no progress", "message vanished"}, 500),
]


@pytest.mark.replaces_core
@pytest.mark.parametrize(("plant", "rules", "seeds"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_fault_is_caught(
    plant: Plant,
    rules: set[str],
    seeds: int | range,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch)
    seen: set[str] = set()
    tried = range(seeds) if isinstance(seeds, int) else seeds
    for seed in tried:
        result = simulate(seed)
        seen |= result.rules
        if rules & seen:
            with capsys.disabled():
                print(f"\n{plant.__name__}: caught by {sorted(seen)} at seed {seed}", end="")
            return
    pytest.fail(
        f"{len(tried)} seeds with {plant.__name__} broke {sorted(seen) or 'nothing'}, not one of {sorted(rules)}"
    )
