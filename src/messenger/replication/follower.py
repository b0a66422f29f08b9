"""How a replica follows: it joins a primary, takes what comes, and says how far it is.

Three kinds of threads: the messenger's puts what arrives into one queue; the **apply thread** takes all that is there,
applies it together, makes it durable and answers once for all of it; the **join thread** looks whether a primary is
there and asks the next destination if not. A few changes that come while the apply thread has nothing to do are applied
by the messenger's thread itself, if the last took less than a millisecond. Each join draws a new stream number, and
what belongs to an older one is dropped. What is received and not applied is forgotten at each join: the primary sends
it again.

What must never happen here: an answer that says more than is so.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import apsw

from messenger import Connection, DeliveryError, Destination, Message, Messenger, MessengerError

from .applier import Applier, Divergence, DivergenceFound, NoCopy
from .check import ReplicaCheck
from .errors import DiskFailed
from .inbox import Batch, Inbox, Item, Part
from .limits import APPLY_HERE_BYTES, APPLY_HERE_S, BEAT_S, CONTACT_S_MAX, JOIN_S, ReplicationLimits
from .places import Places
from .records import (
    PROTOCOL_VERSION,
    Ack,
    AskBucket,
    Beat,
    CheckEnd,
    Claim,
    DivergedReport,
    Entries,
    FromPrimary,
    Head,
    Hello,
    Join,
    Knock,
    MalformedRecord,
    NotPrimary,
    SnapshotAck,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotPart,
    Welcome,
    decode_from_primary,
    encode,
    is_one_changeset,
)
from .status import ReplicaState

logger = logging.getLogger("messenger.replication")

# What was received, while what comes does not build on what is here.
NOTHING = -2


class Follower:
    """Follows whichever of some destinations has the primary, until `stop`.

    Args:
        applier: The replica's file; used by the apply thread only, once this is made.
        destinations: Where a primary may be; asked in turn.
        name: What the primary calls this replica.
        on_change: Called on any thread, without a lock, when a position or a state has changed.

    Attributes:
        state: What is going on.
        primary_lsn: The newest LSN of the primary that is known here.
        fresh_at: When (monotonic seconds) the primary certainly had nothing that was not applied here since.
        contact_at: When (monotonic seconds) the primary was last heard.
        trouble: What went wrong last, and is tried again.
    """

    def __init__(
        self,
        applier: Applier,
        messenger: Messenger,
        destinations: Sequence[Destination | str | int],
        name: str,
        limits: ReplicationLimits,
        on_change: Callable[[], None],
    ) -> None:
        self.applier = applier
        self.state = ReplicaState.CONNECTING if applier.diverged is None else ReplicaState.DIVERGED
        self.primary_lsn = 0
        self.fresh_at: float | None = None
        self.contact_at: float | None = None
        self.trouble = ""
        self.malformed_count = 0
        self.snapshot_count = 0
        self._messenger = messenger
        self._name = name
        self._limits = limits
        self._on_change = on_change
        self._places = Places(destinations)
        self._connections: dict[str, Connection] = {}
        self._lock = threading.Lock()
        self._inbox = Inbox()
        self._stream = 0
        self._join_at = 0.0
        self._received = 0
        # Up to where what is here is known to be of the history of the primary that was joined.
        self._joined_lsn = 0
        self._wants_snapshot = False
        self._is_replacing = False
        # Beats whose LSN is not applied yet: (LSN, when the primary had no more).
        self._beats: deque[tuple[int, float]] = deque(maxlen=64)
        self._check: ReplicaCheck | None = None
        # How long the last batch took, and what the messenger's thread holds while it applies one itself.
        self._apply_s = 0.0
        self._here = threading.Lock()
        self._is_stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._apply_all, name=f"replication-apply-{name}", daemon=True),
            threading.Thread(target=self._keep_joined, name=f"replication-join-{name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Follow no more; returns when what was being applied is."""
        self._is_stopped.set()
        with self._lock:
            self._stream = 0
            connections = list(self._connections.values())
        self._inbox.close()
        for thread in self._threads:
            thread.join()
        with self._here:
            self._end_check()
        for connection in connections:
            connection.close()

    @property
    def destination(self) -> str:
        """The destination that is followed, or asked now."""
        return str(self._places.current)

    @property
    def destinations(self) -> list[Destination]:
        """All that are asked."""
        return self._places.all

    def hear_claim(self, claim: Claim) -> None:
        """Another primary says that it leads; follow it, if its term is higher than what is here."""
        with self._lock:
            if claim.database == self.applier.database and claim.term > self.applier.head.term:
                self.malformed_count += self._places.add(claim.destinations)
                self._leave(self.state if self.state is ReplicaState.DIVERGED else ReplicaState.CONNECTING)

    def ask_snapshot(self) -> None:
        """Throw away what is here for a snapshot of the primary, at the next join, which is due now."""
        with self._lock:
            self._wants_snapshot = True
            self._leave(ReplicaState.CONNECTING)

    # Joining.

    def _keep_joined(self) -> None:
        while not self._is_stopped.wait(BEAT_S / 2):
            now = time.monotonic()
            with self._lock:
                if self._stream and self.contact_at is not None and now - self.contact_at > CONTACT_S_MAX:
                    logger.warning("= %s hears nothing of its primary at %s", self._name, self.destination)
                    self._leave(ReplicaState.CONNECTING)
                is_due = not self._stream and now >= self._join_at and self.state is not ReplicaState.DIVERGED
            if is_due:
                try:
                    self._knock()
                except MessengerError as error:
                    self._note_trouble(f"{self.destination}: {error}")
                    self._ask_next()

    def _leave(self, state: ReplicaState, after_s: float = 0.0) -> None:
        """Follow this join no more, and join anew. Called with the lock held."""
        self._stream = 0
        self._join_at = time.monotonic() + after_s
        self.state = state
        self._received = 0

    def _ask_next(self) -> None:
        with self._lock:
            self._places.go_on()
            self._leave(self.state, JOIN_S / 4)

    def _knock(self) -> None:
        """Ask whether a primary is there; the answer makes us join."""
        connection = self._connect()
        with self._lock:
            stream = self._stream = secrets.randbits(63) | 1
            self.contact_at = time.monotonic()

        def on_silence(error: DeliveryError) -> None:
            with self._lock:
                if self._stream == stream:
                    self.trouble = f"{self.destination}: {error}"
                    self._places.go_on()
                    self._leave(self.state, JOIN_S / 4)

        # The answer comes to the connection's callback, as all that the primary says.
        self._messenger.send_message(connection, encode(Knock(stream)), _ignore, on_error=on_silence, timeout=JOIN_S)

    def _join(self, stream: int, message: Message) -> None:
        """Say where we are. Sent without a callback, so that what is sent to us for it needs none either."""
        head = self.applier.durable_head
        with self._lock:
            if self._stream != stream:
                return
            self._received = self._joined_lsn = head.lsn
            self._is_replacing = False
            database = "" if self._wants_snapshot else self.applier.database
        place = head.term, head.lsn, head.checksum
        message.reply(encode(Join(stream, PROTOCOL_VERSION, self._name, database, *place, self.applier.copy)))

    def _connect(self) -> Connection:
        destination = self._places.current
        key = str(destination)
        connection = self._connections.get(key)
        if connection is None:
            connection = self._messenger.make_connection(destination, callback=self._on_message)
            with self._lock:
                self._connections[key] = connection
        return connection

    def _note_trouble(self, text: str) -> None:
        if text != self.trouble:
            logger.error("! %s: %s", self._name, text)
        self.trouble = text

    # Messages, on the messenger's thread.

    def _on_message(self, message: Message) -> None:
        try:
            record = decode_from_primary(message.contents)
        except MalformedRecord as error:
            self.malformed_count += 1
            logger.debug("! dropped a message of %s: %s", message.sender, error)
            return
        if isinstance(record, Entries):
            self._take_entries(record, message)
        elif isinstance(record, Hello):
            self._join(record.stream, message)
        else:
            self._take(record, message)

    def _take_entries(self, record: Entries, message: Message) -> None:
        size_bytes = sum(len(entry.body) for entry in record.entries)
        with self._lock:
            first = record.entries[0].lsn if record.entries else 0
            if not self._stream or record.stream != self._stream:
                return  # Of a join that was left, maybe of another primary with another history.
            if first != self._received + 1:
                self.malformed_count += 1
                if first > self._received + 1 and self._received != NOTHING:
                    self._leave(ReplicaState.CONNECTING)  # Something is missing; ask for it.
                return
            if self._inbox.bytes + size_bytes > 2 * (self._limits.in_flight_bytes_max + len(message.contents)):
                self.malformed_count += 1  # The primary keeps to its limit; whoever does not is not listened to.
                return
            self.contact_at = time.monotonic()
            self._received = record.entries[-1].lsn
            self.primary_lsn = max(self.primary_lsn, self._received)
            ack = self._make_ack() if record.must_answer else None
            stream, batch = self._stream, Batch(record.entries, message if ack is None else None, size_bytes)
            applies_here = ack is None and self._inbox.is_idle and self._is_quick(batch)
            if applies_here:
                self._here.acquire()
            else:
                self._inbox.put(stream, batch)
        if applies_here:
            try:
                with self.applier.impatient():
                    is_done = self._apply_or_retry(stream, batch, is_here=True)
            finally:
                self._here.release()
            if not is_done:
                self._inbox.put(stream, batch)
        elif ack is not None:
            message.reply(encode(ack))

    def _is_quick(self, batch: Batch) -> bool:
        """Return whether to apply it takes less time than a callback may."""
        return (
            self._apply_s < APPLY_HERE_S
            and batch.size_bytes <= APPLY_HERE_BYTES
            and all(is_one_changeset(entry.body) for entry in batch.entries)
        )

    def _make_ack(self) -> Ack:
        if self._is_replacing:
            # What is here is about to be thrown away, and need not be of the primary's history.
            return Ack(self._stream, 0, 0, 0, time.monotonic())
        # What was still applied of an earlier join, maybe of another primary, counts when it is sent for this one.
        durable = min(self.applier.durable_lsn, self._joined_lsn)
        return Ack(self._stream, max(self._received, durable), durable, durable, time.monotonic())

    def _take(self, record: FromPrimary, message: Message) -> None:
        if isinstance(record, AskBucket):
            if self._check is not None and self._check.lsn == record.lsn:
                self._check.ask(record)
        elif isinstance(record, NotPrimary | Welcome | Beat | SnapshotBegin | SnapshotPart | SnapshotEnd | CheckEnd):
            with self._lock:
                if record.stream != self._stream:
                    return
                self.contact_at = time.monotonic()
                if isinstance(record, NotPrimary):
                    self.trouble = f"{self.destination} is no primary"
                    is_first = not self._places.is_out_of_turn
                    self._places.go_on()
                    self.malformed_count += self._places.add(record.destinations, is_first=is_first)
                    self._leave(ReplicaState.CONNECTING, JOIN_S / 4)
                    return
                if isinstance(record, Beat):
                    self._note_beat(record)
                    ack = self._make_ack()
                else:
                    if isinstance(record, Welcome) and record.mode == "snapshot":
                        self._received = NOTHING  # Entries count again behind the snapshot.
                        self._is_replacing = True
                    elif isinstance(record, SnapshotEnd):
                        self._received = record.lsn
                    item = Part(record, message) if isinstance(record, SnapshotPart) else record
                    self._inbox.put(self._stream, item)
                    return
            message.reply(encode(ack))
            self._on_change()

    def _note_beat(self, beat: Beat) -> None:
        self.primary_lsn = max(self.primary_lsn, beat.lsn)
        if beat.echo_s:
            # When we said that, the primary had not more than it says now.
            self._beats.append((beat.lsn, beat.echo_s))
        self._note_fresh()
        head_lsn = min(self.applier.head.lsn, self._joined_lsn)
        if self.state is ReplicaState.CATCHING_UP and head_lsn >= beat.lsn:
            self.state = ReplicaState.STREAMING

    def _note_fresh(self) -> None:
        lsn = min(self.applier.head.lsn, self._joined_lsn)
        while self._beats and self._beats[0][0] <= lsn:
            self.fresh_at = max(self.fresh_at or 0.0, self._beats.popleft()[1])

    # The apply thread; `_apply` of a batch also on the messenger's.

    def _apply_all(self) -> None:
        while (taken := self._inbox.take()) is not None:
            self._apply_or_retry(*taken)

    def _apply_or_retry(self, stream: int, item: Item, *, is_here: bool = False) -> bool:
        """Return False if `is_here`, and the apply thread is to do it: it may wait for others who write to the file."""
        if stream != self._stream:
            return True  # Of a join that was left.
        try:
            self._apply(stream, item)
        except (apsw.BusyError, DivergenceFound) as error:
            if is_here:
                return False
            if isinstance(error, DivergenceFound):
                self._note_diverged(stream, error.divergence)
            else:
                self._retry(f"{type(error).__name__}: {error}", JOIN_S)
        except (MalformedRecord, NoCopy) as error:
            self._retry(f"what the primary sent does not fit: {error}", JOIN_S)
            self.malformed_count += 1
        except (apsw.Error, OSError, DiskFailed) as error:
            # The disk may be full, or another process in the way; nothing was acknowledged.
            self._retry(f"{type(error).__name__}: {error}", JOIN_S)
        except MessengerError as error:
            self._retry(str(error), JOIN_S)
        except Exception as error:  # Whatever it is, the replica must say so, and not stand still.
            logger.exception("! %s: an error that nobody expected", self._name)
            self._retry(f"{type(error).__name__}: {error}", JOIN_S)
        return True

    def _apply(self, stream: int, item: Item) -> None:
        applier = self.applier
        if isinstance(item, Batch):
            began_at = time.monotonic()
            applier.apply(item.entries)
            with self._lock:
                if stream == self._stream:
                    self._joined_lsn = item.entries[-1].lsn
                self._note_fresh()
            self._on_change()
            applier.sync()
            self._apply_s = time.monotonic() - began_at
            self._answer(stream, item.messages)
            if applier.pinned is not None:
                self._begin_check(stream)
        elif isinstance(item, Welcome):
            self._welcome(item)
        elif isinstance(item, CheckEnd):
            self._end_check()
            if item.reason:
                self._note_diverged(stream, Divergence(item.lsn, item.table, item.key, item.reason))
        elif isinstance(item, SnapshotBegin):
            applier.begin_snapshot(item.bytes_total)
            self.state = ReplicaState.SNAPSHOT
        elif isinstance(item, Part):
            if applier.sink is None:
                raise MalformedRecord("a part of a snapshot came without its beginning")
            applier.sink.write(item.part)
            item.message.reply(encode(SnapshotAck(stream, applier.sink.bytes_done)))
            self._on_change()
        else:
            applier.install_snapshot(item.checksum)
            self._note_installed(stream)

    def _begin_check(self, stream: int) -> None:
        pinned = self.applier.take_pinned()
        if pinned is not None:
            self._end_check()
            self._check = ReplicaCheck(stream, *pinned, lambda record: self._send(stream, encode(record)), self._name)
            self._check.start()

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.end()
            self._check = None

    def _note_installed(self, stream: int) -> None:
        with self._lock:
            self.snapshot_count += 1
            if stream == self._stream:
                self._joined_lsn = self.applier.head.lsn
            self._is_replacing = False
            self.trouble = ""
            self._wants_snapshot = False
            self.state = ReplicaState.CATCHING_UP
        logger.info("= %s installed a snapshot, it is at %s", self._name, self.applier.head.position)
        self._answer(stream)
        self._on_change()

    def _answer(self, stream: int, messages: Sequence[Message] = ()) -> None:
        """Say how far this replica is: in the answer to the last of some messages, or in a message of its own."""
        with self._lock:
            ack = self._make_ack()
        if ack.stream != stream:
            return
        for message in messages[:-1]:
            message.reply(b"")
        if messages:
            messages[-1].reply(encode(ack))
        else:
            self._send(stream, encode(ack))

    def _send(self, stream: int, data: bytes) -> None:
        connection = self._connect()
        if self._stream == stream:
            self._messenger.send_message(connection, data, timeout=CONTACT_S_MAX)

    def _leave_history(self, welcome: Welcome) -> None:
        """Some of what is here was lost when another was promoted: save it, and take a snapshot."""
        path = self.applier.save_lost(Head(welcome.term, welcome.lsn, welcome.checksum))
        logger.error(
            "! %s: LSNs %d to %d are not in the history of term %d; they were saved to %s",
            *(self._name, welcome.lsn + 1, self.applier.head.lsn, welcome.term, path),
        )
        self.ask_snapshot()

    def _welcome(self, welcome: Welcome) -> None:
        if welcome.term < self.applier.head.term:
            self._retry(f"{self.destination} has term {welcome.term}, lower than {self.applier.head.term}", JOIN_S)
            return
        if welcome.mode == "log":
            self.applier.become_replica()
        with self._lock:
            self.primary_lsn = max(self.primary_lsn, welcome.lsn)
            if welcome.mode == "log":
                self.state = ReplicaState.CATCHING_UP
                self.trouble = ""
            elif welcome.mode == "snapshot":
                self.state = ReplicaState.SNAPSHOT
            elif welcome.mode == "rejoin":
                self._leave(ReplicaState.CONNECTING)
        if welcome.mode == "diverged":
            self._note_diverged(welcome.stream, Divergence(self.applier.head.lsn, "", "", welcome.reason))
        elif welcome.mode == "rewind":
            self._leave_history(welcome)
        elif welcome.mode == "refused":
            self._retry(f"{self.destination} refuses: {welcome.reason}", JOIN_S)
        self._on_change()

    def _note_diverged(self, stream: int, divergence: Divergence) -> None:
        logger.error("! %s has DIVERGED %s", self._name, divergence)
        self.applier.note_diverged(divergence)
        self.state = ReplicaState.DIVERGED
        report = DivergedReport(stream, divergence.lsn, divergence.table, divergence.key, str(divergence))
        with contextlib.suppress(MessengerError):  # Then the primary sees that this replica is gone.
            self._send(stream, encode(report))
        with self._lock:  # Who saw it may have asked for a snapshot already.
            self._leave(ReplicaState.CONNECTING if self._wants_snapshot else ReplicaState.DIVERGED)
        self._on_change()

    def _retry(self, why: str, after_s: float) -> None:
        self._note_trouble(why)
        self.applier.drop_snapshot()
        with self._lock:
            if not self._is_stopped.is_set():
                self._leave(ReplicaState.CONNECTING, after_s)
                self._places.go_on()
        self._on_change()


def _ignore(message: Message) -> None:
    """Do nothing with a message that is handled elsewhere."""
