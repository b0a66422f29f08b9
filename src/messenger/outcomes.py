"""What became of each message that was sent: the table of who waits, the queues, the deadlines.

Whatever settles a message (its response, an error, its deadline) takes its entry out of the table first, so the
second to come finds nothing and is counted. There is no deadline queue: the table is swept when the earliest deadline
is reached, because nearly every message is answered long before its own, and a sweep of a thousand entries each 30 s
costs less than a queue operation a message. Sweeps of a large table are spaced so that they take a small part of the
time.

What must never happen here: an outcome that is told twice, or not at all, or that is guessed.

Source: docs/guarantees.md, "Outcomes".
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .blocks import Control, ControlKind, Option, OptionKind
from .compiled import mypyc_attr
from .errors import Cancelled, DeliveryError, IdentityInUse, NotDelivered, OutcomeUnknown
from .failures import readable
from .handshake import Handshake
from .limits import BATCH_MSGS_MAX, ERROR_TEXT_MAX, SILENT_LOG_S, UNHEARD_LOG_MAX
from .link import FOREVER, Link, Outlet
from .message import ErrorCallback, Message
from .outgoing import Outgoing
from .session import ESTABLISHED, Session
from .takers import Taker
from .wire import NOOP, Reason, decode_identity

# A sweep looks at an entry in about 0.05 microseconds; spaced so, sweeps take at most a twentieth of the time.
SWEEP_SPACING_S_PER_ENTRY = 1e-6
SWEEP_SPACING_S = 0.001


@mypyc_attr(allow_interpreted_subclasses=True)
class Outcomes:
    """The half of the exchange that knows what is under way.

    Attributes:
        calls: (function, argument) pairs to run with no lock held, oldest first.
        links: All links that are open.
        dropped: What goes no further, counted by kind.
    """

    handshake: Handshake

    def __init__(self, on_unheard: ErrorCallback) -> None:
        self.calls: deque[tuple[Callable[[Any], object], Any]] = deque()
        self.links: set[Link] = set()
        self.dropped: Counter[str] = Counter()
        self._on_unheard = on_unheard
        self._outstanding: dict[int, Outgoing] = {}
        # Whether a flush should not wait for the end of the turn.
        self.is_urgent = False
        self._dirty: list[Outlet] = []
        self._sweep_at = FOREVER
        self._sessions_at = FOREVER
        # When the transports want to look at their connections, and how; returns when they want to again.
        self.look_at = FOREVER
        self.on_look: Callable[[float], float] | None = None
        # When links that were refused are to try again.
        self._revive_at: dict[Link, float] = {}
        # When `drop_expired` may have something to do.
        self.expires_at = FOREVER
        # Told, with the lock held, of each message of a peer that was cancelled, by session and source id; 0 stands for
        # all of them, because the peer is gone.
        self.on_cancelled: Callable[[Session, int], None] | None = None
        self._not_delivered_msgs = 0
        self._outcome_unknown_msgs = 0
        # Of messages whose sender hears of no error: how many are to be reported, by kind and what they had not, of
        # each the last, and when; and how many were told one by one since the last report.
        self._silent_counts: Counter[tuple[type[DeliveryError], str]] = Counter()
        self._silent_last: dict[tuple[type[DeliveryError], str], str] = {}
        self._silent_at = 0.0
        self._unheard_count = 0

    # Queues.

    def _enqueue(self, outlet: Outlet, outgoing: Outgoing) -> None:
        queue = outlet.queue
        queue.append(outgoing)
        outlet.queue_bytes += outgoing.size_bytes
        if not outlet.is_dirty:
            outlet.is_dirty = True
            self._dirty.append(outlet)
        elif len(queue) % BATCH_MSGS_MAX == 0:
            # A batch is full; the other end works on it meanwhile.
            self.is_urgent = True

    def mark_dirty(self, outlet: Outlet) -> None:
        """Have an outlet flushed at the end of the turn."""
        if not outlet.is_dirty:
            outlet.is_dirty = True
            self._dirty.append(outlet)

    def flush(self, now: float) -> None:
        """Send what outlets have to send."""
        self.is_urgent = False
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for outlet in dirty:
                outlet.is_dirty = False
                outlet.flush(now)
                if outlet.queue and outlet.is_closed:
                    self._drop_queue(outlet, "the peer is gone")
                if isinstance(outlet, Session) and outlet.is_overlooked and not outlet.is_closed:
                    self.handshake.plan(outlet)
                    self._sessions_at = min(self._sessions_at, self.handshake.next_deadline_at)

    # Outcomes other than a response.

    def cancel(self, message_id: int) -> bool:
        """Give a message up: its outcome is `Cancelled`, unless it has one. Return whether it had none."""
        entry = self._outstanding.get(message_id)
        if entry is None:
            return False
        self._give_up(entry)
        self._fail(message_id, Cancelled, "it was cancelled")
        return True

    def find_unclaimed(self, message_id: int) -> Outgoing | None:
        """Return the entry of a message whose outcome is to run callbacks and is not there yet, None otherwise."""
        entry = self._outstanding.get(message_id)
        return None if entry is None or isinstance(entry.callback, Taker) else entry

    def _give_up(self, entry: Outgoing) -> None:
        """Tell the receiver that nobody waits any more, and if it has not got the message yet, that it is over."""
        outlet = entry.outlet
        if isinstance(outlet, Session):
            entry.deadline_at = 0.0
            outlet.is_plain = False
            if outlet.state is ESTABLISHED:  # Else it has never left.
                outlet.controls.tell_cancelled(entry.message_id)
            self.mark_dirty(outlet)
            self.is_urgent = True  # It leaves before callbacks run.
            outlet.given_up_count += 1
            if 2 * outlet.given_up_count > len(outlet.queue):
                # Not each time, since it takes as long as the queue is.
                self._drop_given_up(outlet)

    def _drop_given_up(self, session: Session) -> None:
        """Take out of a queue what was given up; its outcomes are told already, and the other end never had it."""
        session.given_up_count = 0
        if not session.queue:
            return
        queue, session.queue = session.queue, deque()
        given_up: list[Outgoing] = []
        for outgoing in queue:
            (session.queue if outgoing.deadline_at else given_up).append(outgoing)
        self._discard(session, given_up, "it was cancelled")
        for outgoing in given_up:
            session.controls.pending.pop((ControlKind.CANCEL, outgoing.message_id), None)

    def drop(self, kind: str) -> None:
        """Count something that a peer sent, or that was for a peer, and that goes no further."""
        self.dropped[kind] += 1

    def handle_controls(self, session: Session, controls: Sequence[Control]) -> None:
        """Take what the other end says beside its messages. A kind that is not known here says nothing."""
        for control in controls:
            if control.kind == ControlKind.CANCEL:
                session.controls.note_cancelled(control.message_id)
                self.expires_at = -FOREVER
                if self.on_cancelled is not None:
                    self.on_cancelled(session, control.message_id)
            elif control.kind == ControlKind.CREDIT:
                session.controls.note_credit(control)

    def drop_expired(self, now: float) -> None:
        """Take out of `calls` what was given up before its turn came; only the thread that runs them calls this."""
        calls = list(self.calls)
        self.calls.clear()
        self.expires_at = FOREVER
        for callback, argument in calls:
            if isinstance(argument, Message) and not argument.is_response and argument.source_callback_id:
                if argument.is_given_up(now):
                    self.drop("expired")
                    if callback is argument.link.callback and isinstance(argument.link, Session):
                        argument.link.note_unrun(argument.number)
                        self.mark_dirty(argument.link)
                    continue
                self.expires_at = min(self.expires_at, argument.deadline_at)
            self.calls.append((callback, argument))

    def handle_unsendable(self, link: Link, outgoing: Outgoing, kind: str) -> None:
        """Take back what the network refuses: the peer is gone (`peer_gone`) or does not read (`peer_full`)."""
        if outgoing.roams:
            siblings = list(link.siblings())
            position = siblings.index(link) + 1
            if position < len(siblings):
                self._enqueue(siblings[position], outgoing)
                return
        self.drop(kind)
        why = "is not connected" if kind == "peer_gone" else "does not read what it is sent"
        self._fail(outgoing.message_id, NotDelivered, f"the peer {decode_identity(outgoing.peer)!r} {why}")

    def handle_deadline(self, now: float) -> None:
        """Do what is due; afterwards `next_deadline_at` is later than `now`."""
        if self._sweep_at <= now:
            self._sweep(now)
        if self.look_at <= now and self.on_look is not None:
            self.look_at = self.on_look(now)
        if self._sessions_at <= now:
            for link in [link for link, revive_at in self._revive_at.items() if revive_at <= now]:
                del self._revive_at[link]
                link.revive()
            self.handshake.handle_deadline(now)
            self.flush(now)
            revive_at = min(self._revive_at.values(), default=FOREVER)
            self._sessions_at = max(min(self.handshake.next_deadline_at, revive_at), now + SWEEP_SPACING_S)
        if self._sweep_at <= now:
            self._sweep(now)  # What ended just now is to be reported.

    def _sweep(self, now: float) -> None:
        """End every message whose deadline has passed."""
        held = self._take_expired(now)
        expired = [message_id for message_id, entry in self._outstanding.items() if entry.deadline_at <= now]
        for message_id in expired:
            if message_id in held:
                self._fail(message_id, NotDelivered, f"not delivered before its deadline: {held[message_id]}")
            else:
                self._give_up(self._outstanding[message_id])
                self._fail(message_id, OutcomeUnknown, "no response came before the deadline")
        if self._silent_at <= now:
            self._report_silent(now)
        earliest = min((entry.deadline_at for entry in self._outstanding.values()), default=FOREVER)
        if self._silent_counts:
            earliest = min(earliest, self._silent_at)
        for outlet in self._outlets():
            earliest = min(earliest, min((outgoing.deadline_at for outgoing in outlet.queue), default=FOREVER))
        spacing_s = SWEEP_SPACING_S + len(self._outstanding) * SWEEP_SPACING_S_PER_ENTRY
        self._sweep_at = FOREVER if earliest == FOREVER else max(earliest, now + spacing_s)

    def _outlets(self) -> Iterable[Outlet]:
        yield from self.links
        yield from self.handshake.sessions

    def _take_expired(self, now: float) -> dict[int, str]:
        """Remove what expired from the queues and return its ids, with what is known of why it waited there."""
        held: dict[int, str] = {}
        for outlet in self._outlets():
            if not outlet.queue or min(outgoing.deadline_at for outgoing in outlet.queue) > now:
                continue
            expired = _take_out(outlet, lambda outgoing: outgoing.deadline_at <= now)
            why = outlet.why_unsent()
            held |= dict.fromkeys(self._discard(outlet, expired, why), why)
        return held

    def _drop_queue(self, outlet: Outlet, why: str) -> None:
        """End what was queued at an outlet where nothing leaves any more: answers to who is gone."""
        queue, outlet.queue = outlet.queue, deque()
        self.dropped["peer_gone"] += len(queue)
        self._end_queued(outlet, queue, why)

    def _end_queued(self, outlet: Outlet, queue: Iterable[Outgoing], why: str) -> None:
        """Tell of what leaves a queue unsent; what an earlier process of the peer had may have run there."""
        held = self._discard(outlet, queue, why)
        for outgoing in queue:
            self._fail(outgoing.message_id, NotDelivered if outgoing.message_id in held else OutcomeUnknown, why)

    def _discard(self, outlet: Outlet, queue: Iterable[Outgoing], why: str) -> set[int]:
        """Count what leaves a queue unsent; return its ids, and report those that nobody waits for together."""
        held: set[int] = set()
        silent_count = redelivered_count = 0
        for outgoing in queue:
            outlet.queue_bytes -= outgoing.size_bytes
            is_silent = outgoing.is_silent and outgoing.message_id > 0  # The core's own answers are nobody's message.
            if not outgoing.may_have_run:
                held.add(outgoing.message_id)
                silent_count += is_silent
            else:
                redelivered_count += is_silent  # It may have run.
        self._note_silent(NotDelivered, silent_count, outlet, why)
        self._note_silent(OutcomeUnknown, redelivered_count, outlet, why)
        return held

    def _note_silent(self, kind: type[DeliveryError], count: int, outlet: Outlet, why: str) -> None:
        """Count messages that nobody waits for, and have them reported."""
        if count:
            self.dropped["not_delivered" if kind is NotDelivered else "outcome_unknown"] += count
            self._report_later(kind, "a callback", count, f"to {outlet}: {why}")

    def _report_later(self, kind: type[DeliveryError], lack: str, count: int, last: str) -> None:
        """Have messages reported together and not too often: peers can cause it, so they must not fill a log."""
        self._silent_counts[kind, lack] += count
        self._silent_last[kind, lack] = last
        self._sweep_at = min(self._sweep_at, self._silent_at)

    def _report_silent(self, now: float) -> None:
        """Report what was noted of messages whose sender hears of no error."""
        for (kind, lack), count in self._silent_counts.items():
            what = f"1 message without {lack}" if count == 1 else f"{count} messages without {lack}, the last"
            self.calls.append((self._on_unheard, kind(f"{what} {self._silent_last[kind, lack]}", NOOP)))
            self._silent_at = now + SILENT_LOG_S
        self._silent_counts.clear()
        self._unheard_count = 0

    def abandon(self, outlet: Outlet, why: str, kind: type[DeliveryError] = NotDelivered) -> None:
        """End every message of an outlet, because it is closed for good; what was queued ends as `kind`."""
        held = self._discard(outlet, outlet.queue, why)
        outlet.queue.clear()
        for message_id in [key for key, entry in self._outstanding.items() if entry.outlet.owner is outlet.owner]:
            self._fail(message_id, kind if message_id in held else OutcomeUnknown, why)

    def close_link(self, link: Link, why: str, now: float) -> None:
        """Send what a link and its sessions have, say goodbye to their peers, and end every message."""
        self.links.discard(link)
        self._revive_at.pop(link, None)
        link.flush(now)
        for session in [s for s in self.handshake.sessions if s.handle is link.handle]:
            session.flush(now)
            session.say_goodbye()
            self.abandon(session, why)
            self.handshake.discard(session)
        self.abandon(link, why)
        self.expires_at = -FOREVER
        self._report_silent(now)

    def end_all(self, why: str) -> None:
        """End every message that is still open, whatever has become of its outlet."""
        for message_id in list(self._outstanding):
            self._fail(message_id, OutcomeUnknown, why)
        self._report_silent(FOREVER)  # There is no later.

    # What the handshake tells.

    def handle_ended(self, session: Session, why: str) -> None:
        """The other end's incarnation is gone: what was sent to it and not answered has an unknown outcome."""
        self.expires_at = -FOREVER  # What it has asked is not started any more.
        if self.on_cancelled is not None:
            self.on_cancelled(session, NOOP)
        # To another incarnation, queued answers would be answers to other questions.
        self._end_queued(session, _take_out(session, lambda outgoing: outgoing.is_answer), why)
        queued = {outgoing.message_id for outgoing in session.queue}
        again: list[Outgoing] = []
        silent_count = 0
        for outgoing in session.end():
            if outgoing.is_silent:
                if outgoing.redeliver and not outgoing.is_answer:
                    again.append(outgoing)
                elif outgoing.message_id:
                    silent_count += 1
        for entry in [entry for entry in self._outstanding.values() if entry.outlet is session]:
            if entry.message_id in queued:
                continue
            if entry.redeliver and session.connection_link is not None and not entry.is_answer:
                again.append(entry)
            else:
                self._fail(entry.message_id, OutcomeUnknown, why)
        for outgoing in sorted(again, key=lambda outgoing: outgoing.message_id, reverse=True):
            outgoing.option = Option(0, OptionKind.REDELIVERED)
            session.is_plain = False
            session.queue.appendleft(outgoing)
            session.queue_bytes += outgoing.size_bytes
        if session.connection_link is None:
            # A peer of a listener; if it comes back, it has another session.
            self.abandon(session, why)
        self._note_silent(OutcomeUnknown, silent_count, session, why)

    def handle_refused(self, session: Session, reason: Reason, text: str, did_not_run: bool) -> None:
        """The other end does not want this connection.

        What is queued certainly does not run, and what was sent neither if `did_not_run`.
        """
        self.drop("refused")
        sent = session.end()
        if did_not_run:
            session.queue.extendleft(reversed(sent))
            session.queue_bytes += sum(outgoing.size_bytes for outgoing in sent)
        text = readable(text, ERROR_TEXT_MAX)
        self.abandon(session, f"refused: {text}", IdentityInUse if reason == Reason.IDENTITY_IN_USE else NotDelivered)

    def handle_link_refused(self, link: Link, text: str) -> None:
        """A connection's link was refused before anything could be sent on it."""
        if link.session is not None:
            self.handle_refused(link.session, Reason.KEY, text, False)
            self.handshake.renew(link.session)
        else:
            self.drop("refused")
            self.abandon(link, f"refused: {text}")

    def refuse_too_large(self, session: Session) -> None:
        """End what waits for the other end of a session, and is larger than what that takes."""
        most = session.contents_max
        refused = _take_out(session, lambda outgoing: outgoing.large is not None and len(outgoing.large) > most)
        why = f"the contents are larger than message_bytes_max of the receiver, {most}"
        self._end_queued(session, refused, why)

    def handle_deserted(self, link: Link) -> None:
        """Nobody listens any more where a connection's link led, so the process there has probably ended.

        What was sent and not answered is given up, as at its deadline. The session stays: should the process live after
        all, it goes on where it was.
        """
        queued = {outgoing.message_id for outgoing in link.session.queue}
        for entry in [entry for entry in self._outstanding.values() if entry.outlet is link.session]:
            if entry.message_id not in queued and not entry.redeliver:
                self._give_up(entry)
                self._fail(entry.message_id, OutcomeUnknown, "the process there has ended")

    def revive_later(self, link: Link, revive_at: float) -> None:
        """Have a link try again at an instant."""
        self._revive_at[link] = revive_at
        self._sessions_at = min(self._sessions_at, revive_at)

    def forget(self, waiter: Taker) -> None:
        """Drop the entry of a waiter that nobody waits on any more (an interrupted `request`)."""
        for entry in [entry for entry in self._outstanding.values() if entry.callback is waiter]:
            self._give_up(entry)
            self._fail(entry.message_id, Cancelled, "nobody waits for it any more")

    def _fail(self, message_id: int, kind: type[DeliveryError], why: str, *details: str) -> None:
        entry = self._outstanding.pop(message_id, None)
        if entry is None:
            return
        if issubclass(kind, NotDelivered):
            self._not_delivered_msgs += 1
        elif kind is OutcomeUnknown:
            self._outcome_unknown_msgs += 1
        error = kind(f"message {message_id} to {entry.outlet.owner}: {why}", message_id, *details)
        if isinstance(entry.callback, Taker):
            entry.callback.settle(None, error)
        elif entry.on_error is not None:
            self.calls.append((entry.on_error, error))
        elif self._unheard_count < UNHEARD_LOG_MAX:
            self._unheard_count += 1
            self.calls.append((self._on_unheard, error))
        else:
            self._report_later(kind, "on_error", 1, f"to {entry.outlet.owner}: {why}")

    # What a driver asks.

    @property
    def is_dirty(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._dirty)

    @property
    def next_deadline_at(self) -> float:
        """When `handle_deadline` has something to do."""
        deadline_at = self._sweep_at if self._sweep_at < self._sessions_at else self._sessions_at
        return deadline_at if deadline_at < self.look_at else self.look_at

    @property
    def outstanding_count(self) -> int:
        """Messages that wait for their outcome."""
        return len(self._outstanding)

    @property
    def queued_count(self) -> int:
        """Messages that wait to be sent."""
        return sum(len(outlet.queue) for outlet in self._outlets())

    def ask_all(self) -> None:
        """Ask those that have not acknowledged all, as before a close; who is found to be gone is not waited for."""
        for session in list(self.handshake.sessions):
            if session.unreceived_count:
                session.is_reachable()
                self.mark_dirty(session)  # It may have lost its link, and want to say HELLO.

    @property
    def is_settled(self) -> bool:
        """Whether nothing is queued, outstanding, or sent and not known to have arrived."""
        # A peer of a listener that is gone will acknowledge nothing; a connection may reach its listener again.
        is_under_way = any(
            session.unreceived_count and (session.link is not None or session.connection_link is not None)
            for session in self.handshake.sessions
        )
        return not (is_under_way or self._outstanding or self.queued_count or self.calls)


def _take_out(outlet: Outlet, is_out: Callable[[Outgoing], bool]) -> list[Outgoing]:
    """Take what fits a condition out of a queue and return it, for `_discard`, which counts its bytes off."""
    kept: deque[Outgoing] = deque()
    taken: list[Outgoing] = []
    for outgoing in outlet.queue:
        (taken if is_out(outgoing) else kept).append(outgoing)
    outlet.queue = kept
    return taken
