"""The replicas of a primary: the listener that they join at, what is known of each, and who waits for them.

Runs in three kinds of threads: the messenger's, where messages arrive; those that commit, which send to the replicas
that stream, and take the answers while they wait; and one feed per replica (`feed.py`). One lock guards what they share
and is held for moments only; nothing is sent and no file is read under it.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from messenger import CalledFromCallback, Destination, Message, Messenger, MessengerError

from .check import PrimaryCheck
from .confirm import Confirmations, Level, Waiter
from .copies import Known
from .feed import CATCHING_UP, DIVERGED, DOWN, STREAMING, Feed, Peer
from .limits import BEAT_S, COMMIT_SAMPLE_S, COMMIT_SAMPLES, ReplicationLimits
from .records import (
    PROTOCOL_VERSION,
    Ack,
    AskBucket,
    BucketRows,
    CheckEnd,
    CheckSums,
    Claim,
    DivergedReport,
    Entries,
    Entry,
    FromReplica,
    Head,
    Hello,
    Join,
    Knock,
    MalformedRecord,
    NotPrimary,
    SnapshotAck,
    StatusQuery,
    Welcome,
    decode_from_replica,
    encode,
)
from .status import ReplicaStatus
from .writer import Written

logger = logging.getLogger("messenger.replication")


class Hub:
    """The replicas of one primary.

    Args:
        messenger: Listens, and stays the caller's.
        destination: Where replicas join.
        path, database, head: The primary's file, the random name of its database, and where its history ends.
        known: What was remembered of the replicas, as `kept_replicas` gave it.
        age_of: Returns for how long (seconds) the oldest entry that follows an LSN has been committed.
        on_claim: Called on the messenger's thread with what another primary says; returns what it is to be told.
        make_status: Returns the status, as a structure, for whoever asks.

    Attributes:
        malformed_count: Messages that could not be read.
    """

    def __init__(
        self,
        messenger: Messenger,
        destination: Destination | str | int,
        path: str,
        database: str,
        head: Head,
        known: Iterable[Known],
        age_of: Callable[[int], float | None],
        limits: ReplicationLimits,
        on_claim: Callable[[Claim], Claim | None],
        make_status: Callable[[], msgspec.Struct],
    ) -> None:
        self.messenger = messenger
        self.path = path
        self.database = database
        self.head = head
        self.limits = limits
        self.lock = threading.Lock()
        self.snapshot_count = 0
        self.snapshot_lock = threading.Lock()
        self.malformed_count = 0
        # In the order in which they joined last.
        self.peers: dict[str, Peer] = {}
        commits = [(0, time.monotonic())]
        for each in sorted(known, key=lambda replica: replica.applied):
            peer = self.peers[each.name] = Peer(each.name)
            peer.begin(min(each.applied, head.lsn))
            peer.diverged, peer.copy = each.diverged, each.copy
            peer.state = DIVERGED if each.diverged else DOWN
            if (age_s := age_of(each.applied)) is not None:
                commits.append((each.applied + 1, time.monotonic() - age_s))
        self._note_peers()
        # When which LSN was committed, a sample now and then.
        self._commits: deque[tuple[int, float]] = deque(commits, maxlen=COMMIT_SAMPLES)
        self.check: PrimaryCheck | None = None
        # Whether what is remembered of the replicas has changed.
        self.must_keep = False
        self.confirmations = Confirmations()
        self.is_closed = True
        # Who asked for the status before it was known whether this is the primary; None from then on.
        self._early: list[Message] | None = []
        # The term and the destinations of the primary that was promoted over this one.
        self.gone_to: tuple[int, tuple[str, ...]] | None = None
        self._on_claim = on_claim
        self._make_status = make_status
        self._by_stream: dict[int, Peer] = {}
        self.listener = messenger.listen_for_connection(destination, self.handle_message, responses=False)

    def open(self, head: Head) -> None:
        """Serve replicas from here on."""
        with self.lock:
            self.head = head
            self.is_closed = False
            early, self._early = self._early or [], None
        for message in early:
            message.reply(msgspec.json.encode(self._make_status()))

    def leave(self, term: int, destinations: tuple[str, ...]) -> None:
        """Serve replicas no more, because another primary leads; tell them where."""
        with self.lock:
            self.gone_to = term, destinations
            feeds = [peer.feed for peer in self.peers.values() if peer.feed is not None]
            self.confirmations.wake_all()
        for feed in feeds:
            feed.stop()
            try:
                feed.send(NotPrimary(feed.stream, term, destinations))
            except MessengerError as error:
                logger.debug("! replica %s cannot be told of the new primary: %s", feed.peer.name, error)

    def close(self) -> None:
        """Serve nobody any more, and tell those who wait."""
        with self.lock:
            self.is_closed = True
            feeds = [peer.feed for peer in self.peers.values() if peer.feed is not None]
            self.confirmations.wake_all()
        for feed in feeds:
            feed.stop()
        for feed in feeds:
            feed.thread.join()
        self.listener.close()

    # Commits.

    def publish(self, written: Written) -> None:
        """Let transactions wait, and send them to the replicas that stream. Called in the order of LSNs."""
        entries = written.entries
        streaming: list[Feed] = []
        with self.lock:
            if entries:
                last = entries[-1]
                self.head = Head(last.term, last.lsn, last.checksum)
                now = time.monotonic()
                if now - self._commits[-1][1] > COMMIT_SAMPLE_S:
                    self._commits.append((entries[0].lsn, now))
                streaming += [peer.feed for peer in self.peers.values() if peer.feed and peer.state is STREAMING]
            for waiter, level, count in written.waiters:
                self.confirmations.add(waiter, level, count)
            if self.is_closed or self.gone_to is not None:
                self.confirmations.wake_all()
        if streaming:
            must_answer = any(level is Level.RECEIVED for _, level, _ in written.waiters)
            for feed in streaming:
                self._stream(feed, entries, must_answer)

    def _stream(self, feed: Feed, entries: list[Entry], must_answer: bool = False) -> None:
        """Send entries to a replica that streams, or keep them until it has applied what is under way to it.

        So a replica that is busy gets, when it is done, all that came meanwhile in one message, which costs it, and us,
        much less than one message each.
        """
        peer = feed.peer
        with feed.order:
            with self.lock:
                if peer.feed is not feed or peer.state is not STREAMING:
                    return
                if not peer.take(entries, self.limits):
                    peer.state = CATCHING_UP
                    feed.news.set()
                    return
                ready = peer.take_ready(must_answer)
            if ready:
                try:
                    feed.asked_id = feed.ask(encode(Entries(feed.stream, ready, must_answer)))
                except MessengerError as error:
                    feed.stop()
                    self.handle_down(feed, str(error))

    def note_durable(self, lsn: int) -> None:
        """All up to an LSN is on the primary's own disk."""
        with self.lock:
            if lsn > self.confirmations.durable_lsn:
                self.confirmations.durable_lsn = lsn
                self.confirmations.settle(self._counted)

    def wait_for(self, waiter: Waiter, level: Level, count: int) -> None:
        """Let a transaction wait that was committed earlier."""
        with self.lock:
            self.confirmations.add_earlier(waiter, level, count)
            self.confirmations.settle(self._counted)
            if self.is_closed or self.gone_to is not None:
                self.confirmations.wake_all()

    def take_answers(self, waiter: Waiter, count: int, deadline_at: float) -> None:
        """Take the answers that a transaction waits for off the network in this thread: no other need be woken.

        Only where all replicas that stream are needed, and not for long, because who waits for an answer does not hear
        what else settles the transaction: another replica, one that has joined anew, or the end.
        """
        with self.lock:
            feeds = [peer.feed for peer in self.peers.values() if peer.feed and peer.state is STREAMING]
        if len(feeds) <= count:
            for feed in feeds:
                if not waiter.is_settled:
                    with contextlib.suppress(CalledFromCallback):
                        self.messenger.wait(feed.asked_id, min(BEAT_S, max(0.0, deadline_at - time.monotonic())))

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """Return how each replica stands."""
        now = time.monotonic()
        with self.lock:
            return tuple(self._status_of(peer, now) for _, peer in sorted(self.peers.items()))

    def kept_replicas(self) -> list[Known]:
        """Return what is to be remembered of each replica."""
        ago = time.time() - time.monotonic()
        with self.lock:
            self.must_keep = False
            return [
                Known(
                    name=peer.name,
                    applied=peer.durable,
                    contact_at=0.0 if peer.contact_at is None else ago + peer.contact_at,
                    diverged=peer.diverged,
                    copy=peer.copy,
                )
                for peer in self.peers.values()
            ]

    def _status_of(self, peer: Peer, now: float) -> ReplicaStatus:
        return ReplicaStatus(
            name=peer.name,
            state=peer.state,
            sent_lsn=peer.sent,
            received_lsn=peer.received,
            durable_lsn=peer.durable,
            applied_lsn=peer.applied,
            lag_transactions=self.head.lsn - peer.applied,
            lag_s=self._lag_s(peer, now),
            contact_s=None if peer.contact_at is None else now - peer.contact_at,
            snapshot_bytes=peer.snapshot_bytes,
            snapshot_bytes_total=peer.snapshot_bytes_total,
            diverged=peer.diverged,
        )

    def _lag_s(self, peer: Peer, now: float) -> float:
        """Return for how long the oldest that it has not applied has been committed. Called with the lock held."""
        if peer.applied >= self.head.lsn:
            return 0.0
        return now - next((at for lsn, at in reversed(self._commits) if lsn <= peer.applied + 1), self._commits[0][1])

    def give_up(self) -> None:
        """The primary's own disk failed, so nothing is confirmed any more."""
        with self.lock:
            self.confirmations.wake_all(Level.LOCAL)

    def forget(self, waiter: Waiter) -> None:
        """A thread waits no longer."""
        with self.lock:
            self.confirmations.discard(waiter)

    # Messages, on the messenger's thread, or on one that waits for an answer.

    def handle_message(self, message: Message) -> None:
        """A replica, or somebody who asks, said something."""
        if not message.contents and message.dest_callback_id:
            return  # The answer to one of several, the last of which says all.
        try:
            record = decode_from_replica(message.contents)
        except MalformedRecord as error:
            with self.lock:
                self.malformed_count += 1
            logger.debug("! dropped a message of %s: %s", message.sender, error)
            return
        self._handle(record, message)

    def _handle(self, record: FromReplica, message: Message) -> None:
        if isinstance(record, Ack):
            self._handle_ack(record, message)
        elif isinstance(record, SnapshotAck):
            self._handle_snapshot_ack(record)
        elif isinstance(record, Join):
            self._handle_join(record, message)
        elif isinstance(record, Knock):
            self._handle_knock(record, message)
        elif isinstance(record, DivergedReport):
            self._handle_diverged(record)
        elif isinstance(record, CheckSums | BucketRows):
            self._handle_check(record)
        elif isinstance(record, Claim):
            own = self._on_claim(record)
            if own is not None:
                message.reply(encode(own))
        elif isinstance(record, StatusQuery):
            self._handle_status_query(message)
        else:
            message.reply(msgspec.json.encode({"error": "this is the primary already"}))

    def _handle_ack(self, ack: Ack, message: Message) -> None:
        idle: Feed | None = None
        with self.lock:
            peer = self._by_stream.get(ack.stream)
            if peer is not None:
                peer.contact_at = time.monotonic()
                peer.echo_s = ack.at_s
                peer.note_positions(ack.received, ack.durable, ack.applied)
                self.confirmations.settle(self._counted)
                if peer.state is not STREAMING and peer.feed is not None:
                    peer.feed.news.set()
                elif peer.pending and not peer.is_busy:
                    idle = peer.feed
        if idle is not None:
            self._stream(idle, [])
        if peer is None:
            # Of an earlier join, which we have given up.
            message.reply(encode(Welcome(ack.stream, "rejoin", self.database, self.head.term, 0, b"")))

    def _handle_snapshot_ack(self, ack: SnapshotAck) -> None:
        with self.lock:
            peer = self._by_stream.get(ack.stream)
            if peer is None or peer.feed is None:
                return
            peer.contact_at = time.monotonic()
            peer.snapshot_bytes = min(ack.bytes_done, peer.snapshot_bytes_total)
            peer.feed.snapshot_acked = ack.bytes_done
            peer.feed.news.set()

    def _handle_check(self, record: CheckSums | BucketRows) -> None:
        with self.lock:
            peer, check = self._by_stream.get(record.stream), self.check
        if peer is None or check is None or check.lsn != record.lsn:
            return
        if isinstance(record, CheckSums):
            check.note_sums(peer.name, record.sums)
        else:
            check.note_rows(peer.name, record)

    def compare(self, check: PrimaryCheck, deadline_at: float) -> dict[str, str]:
        """Return what a check found at each replica that answers in time, empty if nothing; those are told."""
        found: dict[str, str] = {}
        for name in check.wait_sums(partial(self._taking, check.lsn), deadline_at):
            with self.lock:
                feed = peer.feed if (peer := self.peers.get(name)) is not None else None
            if feed is None:
                continue
            stream, lsn = feed.stream, check.lsn
            try:
                difference = check.compare(name, partial(_ask_bucket, feed, lsn), deadline_at)
                found[name] = "" if difference is None else str(difference)
                if difference is None:
                    feed.send(CheckEnd(stream, lsn))
                else:
                    feed.send(CheckEnd(stream, lsn, difference.table, difference.key, difference.what))
            except MessengerError as error:
                logger.warning("! replica %s is gone during a check: %s", name, error)
        return found

    def _taking(self, lsn: int) -> set[str]:
        """Return the names of the replicas that are there and are sent the entry with an LSN, or were."""
        with self.lock:
            return {peer.name for peer in self.peers.values() if peer.feed is not None and peer.began < lsn}

    def _handle_diverged(self, report: DivergedReport) -> None:
        with self.lock:
            peer = self._by_stream.get(report.stream)
            if peer is None:
                return
            peer.state = DIVERGED
            peer.diverged = report.reason
            if peer.feed is not None:
                peer.feed.stop()
        logger.error("! replica %s has DIVERGED: %s", peer.name, report.reason)

    def _handle_status_query(self, message: Message) -> None:
        with self.lock:
            if self._early is not None and len(self._early) < self.limits.replicas_max:
                self._early.append(message)
                return
        message.reply(msgspec.json.encode(self._make_status()))

    def _handle_knock(self, knock: Knock, message: Message) -> None:
        with self.lock:
            gone_to, is_closed = self.gone_to, self.is_closed
        if gone_to is not None:
            message.reply(encode(NotPrimary(knock.stream, *gone_to)))
        elif not is_closed:
            message.reply(encode(Hello(knock.stream)))

    def _handle_join(self, join: Join, message: Message) -> None:
        refusal = self._refusal(join, message.sender)
        if refusal:
            message.reply(encode(Welcome(join.stream, "refused", self.database, self.head.term, 0, b"", refusal)))
            return
        if join.database == self.database and join.term > self.head.term:
            self._on_claim(Claim(join.database, join.term, b"", ()))
        with self.lock:
            if self.is_closed:
                return
            gone_to = self.gone_to
            if gone_to is None:
                self._begin_feed(join, message)
        if gone_to is not None:
            message.reply(encode(NotPrimary(join.stream, *gone_to)))

    def _begin_feed(self, join: Join, message: Message) -> None:
        """Serve a replica anew. Called with the lock held."""
        peer = self.peers.pop(join.name, Peer(join.name))
        self.peers[join.name] = peer
        peer.copy = join.copy
        self._forget_former(peer)
        self._note_peers()
        old = peer.feed
        if old is not None:
            self._by_stream.pop(old.stream, None)
            old.stop()
        # What it had received and not on its disk may be lost with its process.
        peer.received = peer.durable
        peer.state = DOWN
        peer.contact_at = time.monotonic()
        peer.echo_s = 0.0  # Its clock may be another one: it was started anew, or is on another machine now.
        self._by_stream[join.stream] = peer
        self.must_keep = True
        peer.feed = Feed(self, peer, join, message)

    def _forget_former(self, peer: Peer) -> None:
        """Forget the replica that a file was before it came under another name: what it had, it has but once."""
        for other in list(self.peers.values()):
            if other is peer or not peer.copy or other.copy != peer.copy:
                continue
            if other.feed is None:
                del self.peers[other.name]
                logger.info("= replica %s has become %s: it is the same file", other.name, peer.name)
            else:
                logger.warning(
                    "! replica %s is of the same file as %s, which is not known to be gone: together they confirm what "
                    "one does; if somebody made one file of the other, remove one, and it takes a snapshot",
                    *(peer.name, other.name),
                )

    def _note_peers(self) -> None:
        """Find out which replicas confirm anything: of those of one file the one that joined last."""
        self._counted = list({peer.copy or (peer.name,): peer for peer in self.peers.values()}.values())

    def _refusal(self, join: Join, sender: str) -> str:
        if join.version != PROTOCOL_VERSION:
            return f"it speaks version {join.version} of the protocol, this primary {PROTOCOL_VERSION}"
        with self.lock:
            peer = self.peers.get(join.name)
            if peer is not None and peer.feed is not None and peer.feed.sender != sender:
                # Each would take the other's place, over and over. One that was started anew is soon known to be gone.
                return f"{peer.feed.sender} has a replica named {join.name} here; give each a name of its own"
            if join.name not in self.peers and len(self.peers) >= self.limits.replicas_max:
                gone = [peer for peer in self.peers.values() if peer.feed is None]
                if not gone:
                    return f"{len(self.peers)} replicas are there, that is replicas_max"
                # One that came under another name each time must not keep the others out.
                del self.peers[min(gone, key=lambda peer: peer.contact_at or 0.0).name]
                self._note_peers()
        return ""

    def handle_down(self, feed: Feed, why: str) -> None:
        """A replica is gone, or its feed has ended."""
        with self.lock:
            peer = feed.peer
            if peer.feed is not feed:
                return
            self._by_stream.pop(feed.stream, None)
            peer.feed = None
            self.must_keep = True
            if peer.state is not DIVERGED:
                peer.state = DOWN
            peer.received = peer.durable
            peer.snapshot_bytes = peer.snapshot_bytes_total = 0
            if any(other.copy == peer.copy != "" and other.feed is not None for other in self.peers.values()):
                del self.peers[peer.name]
                self._note_peers()
            is_news = not self.is_closed
        if is_news:
            logger.warning("= replica %s is %s: %s", peer.name, peer.state, why or "its feed ended")


def _ask_bucket(feed: Feed, lsn: int, table: str, bucket: int) -> None:
    feed.send(AskBucket(feed.stream, lsn, table, bucket))
