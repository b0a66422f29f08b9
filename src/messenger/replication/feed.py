"""One replica, as its primary sees it, and the thread that feeds it while it is there.

A replica that joins is judged by its position: what follows comes from the log if the log holds it, else from a
snapshot. While it catches up, its thread reads the log and sends; once it has all, whoever commits sends to it
directly. If it is slower than the commits, it falls back to catching up, so what is under way to it is bounded.

| state | who sends | ends when |
|---|---|---|
| SNAPSHOT | the thread, from a copy of the file | the replica has installed it: CATCHING_UP |
| CATCHING_UP | the thread, from the log | all was sent: STREAMING; the log does not hold it any more: SNAPSHOT |
| STREAMING | whoever commits | too much is under way: CATCHING_UP |
| DOWN | nobody | it joins again |
| DIVERGED | nobody | it asks for a snapshot |
"""

import contextlib
import logging
import threading
import time
from collections import deque
from typing import Protocol

import apsw

from messenger import DeliveryError, Message, Messenger, MessengerError

from .database import open_reader
from .limits import (
    ANSWER_S,
    BEAT_S,
    CATCH_UP_BYTES,
    CATCH_UP_TRANSACTIONS,
    CONTACT_S_MAX,
    STREAM_MSGS,
    ReplicationLimits,
)
from .log import end_of_term, find_head, read_entries
from .records import Beat, Entries, Entry, FromPrimary, Head, Join, Welcome, encode
from .snapshot import SnapshotSource
from .status import ReplicaState

logger = logging.getLogger("messenger.replication")

SNAPSHOT, CATCHING_UP, STREAMING = ReplicaState.SNAPSHOT, ReplicaState.CATCHING_UP, ReplicaState.STREAMING
DOWN, DIVERGED = ReplicaState.DOWN, ReplicaState.DIVERGED


class Peer:
    """What a primary knows of one replica. Read and changed with the hub's lock held."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = DOWN
        self.sent = self.received = self.durable = self.applied = 0
        # What it had when it joined, or was filled from a snapshot of; it is sent only what comes after.
        self.began = 0
        self.contact_at: float | None = None
        self.echo_s = 0.0
        self.snapshot_bytes = self.snapshot_bytes_total = 0
        self.diverged = ""
        # The id of its file, if it said one.
        self.copy = ""
        self.feed: Feed | None = None
        # What was sent and is not applied: LSNs, and the bytes sent up to there since the join.
        self.under_way: deque[tuple[int, int]] = deque()
        self.sent_bytes = self.applied_bytes = 0
        # While it streams: what is to be sent when nothing is under way any more.
        self.pending: list[Entry] = []
        self._pending_bytes = 0
        # The last LSN of each message that is under way.
        self._marks: deque[int] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether it is better to wait with more."""
        return len(self._marks) >= STREAM_MSGS

    def begin(self, lsn: int) -> None:
        """It has all up to an LSN on its disk, and nothing is under way."""
        self.began = self.sent = self.received = self.durable = self.applied = lsn
        self.under_way.clear()
        self.sent_bytes = self.applied_bytes = 0
        self.pending = []
        self._pending_bytes = 0
        self._marks.clear()

    def take(self, entries: list[Entry], limits: ReplicationLimits) -> bool:
        """Let entries wait that follow what it was sent; return False, and let none wait, if that is too much."""
        after = self.pending[-1].lsn if self.pending else self.sent
        news = [entry for entry in entries if entry.lsn > after]
        self._pending_bytes += sum(len(entry.body) for entry in news)
        self.pending += news
        fits = (
            len(self.under_way) + len(self.pending) <= limits.in_flight_transactions_max
            and self.sent_bytes - self.applied_bytes + self._pending_bytes <= limits.in_flight_bytes_max
        ) or len(self.under_way) + len(self.pending) <= 1
        if not fits or (self.pending and self.pending[0].lsn != self.sent + 1):
            self.pending = []
            self._pending_bytes = 0
            return False
        return True

    def take_ready(self, is_urgent: bool) -> list[Entry]:
        """Return what is to be sent now, and note that it is."""
        if not self.pending or (self.is_busy and not is_urgent):
            return []
        self._marks.append(self.pending[-1].lsn)
        ready, self.pending = self.pending, []
        self._pending_bytes = 0
        for entry in ready:
            self.note_sent(entry)
        return ready

    def note_sent(self, entry: Entry) -> None:
        """An entry is about to be sent."""
        self.sent = entry.lsn
        self.sent_bytes += len(entry.body)
        self.under_way.append((entry.lsn, self.sent_bytes))

    def note_positions(self, received: int, durable: int, applied: int) -> None:
        """It said how far it is. What it cannot have is not believed."""
        self.received = max(self.received, min(received, self.sent))
        self.durable = max(self.durable, min(durable, self.sent))
        self.applied = max(self.applied, min(applied, self.sent))
        while self._marks and self._marks[0] <= self.applied:
            self._marks.popleft()
        while self.under_way and self.under_way[0][0] <= self.applied:
            self.applied_bytes = self.under_way.popleft()[1]

    def room(self, limits: ReplicationLimits) -> int:
        """Return how many transactions more may be under way to it."""
        if self.under_way and self.sent_bytes - self.applied_bytes >= limits.in_flight_bytes_max:
            return 0
        return max(0, limits.in_flight_transactions_max - len(self.under_way))


class Source(Protocol):
    """What a feed needs of the primary."""

    path: str
    database: str
    messenger: Messenger
    limits: ReplicationLimits
    lock: threading.Lock
    head: Head
    snapshot_count: int
    snapshot_lock: threading.Lock

    def handle_message(self, message: Message) -> None:
        """A replica said something."""

    def handle_down(self, feed: "Feed", why: str) -> None:
        """A replica is gone."""


class Feed:
    """Serves one join of one replica, on a thread of its own, until `stop` or the replica is gone.

    Args:
        message: The replica's Join, by which it can be answered.
    """

    def __init__(self, source: Source, peer: Peer, join: Join, message: Message) -> None:
        self.source = source
        self.peer = peer
        self.stream = join.stream
        self.sender = message.sender
        self._join = join
        self._message = message
        self._is_stopped = False
        self._beat_at = 0.0
        # Set when there may be something to do before the next beat.
        self.news = threading.Event()
        # Held while entries are taken and sent, so that they leave in order.
        self.order = threading.Lock()
        # The id of the last message of entries that was sent while it streams.
        self.asked_id = 0
        self.snapshot_acked = 0
        self.thread = threading.Thread(target=self._run, name=f"replication-feed-{peer.name}", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread soon; does not wait."""
        self._is_stopped = True
        self.news.set()

    @property
    def is_stopped(self) -> bool:
        """Whether it is to end."""
        return self._is_stopped

    def send(self, record: FromPrimary) -> None:
        """Send what the replica does not answer. MessengerError: it certainly does not arrive."""
        self.source.messenger.send_message(self._message, encode(record), timeout=CONTACT_S_MAX)

    def ask(self, data: bytes, timeout: float = ANSWER_S) -> int:
        """Send an encoded record that the replica answers, each by itself, once it has done what it says.

        An answer carries the acknowledgements of the session, so both ways together take two frames; and that there
        will be none is told at once when the replica is gone.

        Returns:
            The message's id, by which a thread can wait for the answer.

        Raises:
            MessengerError: It certainly does not arrive.
        """
        source = self.source
        return source.messenger.send_message(
            self._message, data, source.handle_message, on_error=self._on_lost, timeout=timeout
        )

    # The thread.

    def _run(self) -> None:
        why = ""
        reader: apsw.Connection | None = None
        try:
            reader = open_reader(self.source.path)
            welcome = self._judge(reader)
            self.send(welcome)
            if welcome.mode == "log":
                self._start(CATCHING_UP, welcome.lsn)
            elif welcome.mode == "snapshot":
                self._start(SNAPSHOT, 0)
            else:
                why = welcome.reason
                self._is_stopped = True
                if welcome.mode == "diverged":
                    self._note_diverged(why)
            while not self._is_stopped:
                self._step(reader)
        except (MessengerError, apsw.Error, OSError) as error:
            why = f"{type(error).__name__}: {error}"
            logger.warning("! replica %s cannot be fed: %s", self.peer.name, why)
            self._refuse(why)
        finally:
            try:
                if reader is not None:
                    reader.close(force=True)
            except apsw.Error as error:
                # It only read, so nothing is lost; but the end must be told all the same.
                logger.warning("! the reader for replica %s is closed, but: %s", self.peer.name, error)
            self.source.handle_down(self, why)

    def _refuse(self, why: str) -> None:
        """Let the replica know why it gets nothing, so that it need not find out by silence, and can say it."""
        source = self.source
        with contextlib.suppress(MessengerError):
            self.send(Welcome(self.stream, "refused", source.database, source.head.term, 0, b"", why))

    def _judge(self, reader: apsw.Connection) -> Welcome:
        """Return what the replica is to do."""
        join, source = self._join, self.source
        head = source.head

        def answer(mode: str, lsn: int = 0, checksum: bytes = b"", reason: str = "") -> Welcome:
            return Welcome(join.stream, mode, source.database, head.term, lsn, checksum, reason)

        if not join.database:
            return answer("snapshot")
        if join.database != source.database:
            return answer("refused", reason=f"this primary has database {source.database}, not {join.database}")
        end = end_of_term(reader, join.term)
        if end is not None and join.lsn > end:
            fork = find_head(reader, end)
            return answer("rewind", end, fork.checksum if fork else b"", f"term {join.term} ended at LSN {end}")
        if join.lsn > head.lsn:
            return answer("diverged", reason=f"it is at LSN {join.lsn}, the primary only at {head.lsn}")
        known = find_head(reader, join.lsn)
        if known is None:
            return answer("snapshot", reason=f"the log does not hold LSN {join.lsn} any more")
        if known != (join.term, join.lsn, join.checksum):
            return answer("diverged", reason=f"its history up to LSN {join.lsn} is another one")
        return answer("log", join.lsn, join.checksum)

    @property
    def _is_current(self) -> bool:
        """Whether what is known of the replica is for this feed to change. Asked with the hub's lock held.

        Not once the replica has joined anew, when another feed serves it, and not once it has diverged or is lost.
        """
        return self.peer.feed is self and not self._is_stopped

    def _start(self, state: ReplicaState, lsn: int) -> None:
        with self.source.lock:
            if not self._is_current:
                return
            self.peer.diverged = ""
            self.peer.state = state
            self.peer.begin(lsn)
        logger.info("= replica %s joined at LSN %d: %s", self.peer.name, lsn, state)

    def _note_diverged(self, why: str) -> None:
        with self.source.lock:
            if self.peer.feed is self:
                self.peer.state = DIVERGED
                self.peer.diverged = why

    def _step(self, reader: apsw.Connection) -> None:
        """Do what there is to do, or sleep until the next beat."""
        self.beat()
        state = self.peer.state
        if state is SNAPSHOT:
            self._send_snapshot()
        elif state is not CATCHING_UP or not self._send_some(reader):
            self.news.wait(max(0.0, self._beat_at - time.monotonic()))
            self.news.clear()

    def beat(self) -> None:
        """Ask whether the replica is there, if it is time to."""
        now = time.monotonic()
        if now < self._beat_at:
            return
        self._beat_at = now + BEAT_S
        source, peer = self.source, self.peer
        with source.lock:
            contact_at, lsn, term = peer.contact_at, source.head.lsn, source.head.term
            beat = Beat(self.stream, term, lsn, peer.echo_s)
        if contact_at is not None and now - contact_at > CONTACT_S_MAX:
            self._lose(f"it said nothing for {now - contact_at:.1f} s")
            return
        self.ask(encode(beat), CONTACT_S_MAX)

    def _on_lost(self, error: DeliveryError) -> None:
        if not self._is_stopped:
            self._lose(str(error))

    def _lose(self, why: str) -> None:
        self.stop()
        self.source.handle_down(self, why)

    def _send_some(self, reader: apsw.Connection) -> bool:
        """Send some of what the replica has not; return whether there may be more that it can take now."""
        source, peer = self.source, self.peer
        with source.lock:
            if not self._is_current:
                return False
            if peer.sent >= source.head.lsn:
                peer.state = STREAMING
                return False
            room = peer.room(source.limits)
            if not room:
                return False
            after_lsn = peer.sent
        bytes_max = min(CATCH_UP_BYTES, source.limits.in_flight_bytes_max)
        entries = read_entries(reader, after_lsn, min(room, CATCH_UP_TRANSACTIONS), bytes_max)
        if not entries:
            return False  # Only the writer has it yet.
        if entries[0].lsn != after_lsn + 1:
            logger.warning("= replica %s fell behind the log, it takes a snapshot", peer.name)
            self._start(SNAPSHOT, 0)
            self.send(Welcome(self.stream, "snapshot", source.database, source.head.term, 0, b"", "it fell behind"))
            return True
        with source.lock:
            if not self._is_current:
                return False
            for entry in entries:
                peer.note_sent(entry)
        self.ask(encode(Entries(self.stream, entries)))
        return True

    def _send_snapshot(self) -> None:
        with SnapshotSource(self) as snapshot:
            head = snapshot.send()
        if head is None:
            return
        with self.source.lock:
            if not self._is_current:
                return
            self.peer.began = self.peer.sent = head.lsn
        while self.peer.applied < head.lsn and not self._is_stopped:
            self.beat()  # Its answer tells when the snapshot is in place.
            self.news.wait(BEAT_S / 4)
            self.news.clear()
        with self.source.lock:
            if self._is_current:
                self.peer.state = CATCHING_UP
        logger.info("= replica %s has the snapshot of LSN %d", self.peer.name, head.lsn)
