"""A copy of the whole file for a replica: made beside the primary's file, sent in parts, put in place at the replica.

The copy is made by SQLite's backup within one read transaction, so it is the database at one LSN while writes go on;
it is complete before its first part leaves, so that a slow replica holds up nothing at the primary. At the replica the
parts go into a file beside its own. A replica that has no file yet gets it by a rename; one that has gets it through
SQLite, in one transaction, so that readers in other processes see the old content or the new.

What must never happen here: a file that is half a snapshot.
"""

import logging
import os
import re
import secrets
import shutil
import time
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

import apsw

from .database import open_reader
from .limits import (
    MESSAGE_ROOM_BYTES,
    SNAPSHOT_IN_FLIGHT_BYTES,
    SNAPSHOT_PART_BYTES,
    SNAPSHOT_STEP_PAGES,
    SNAPSHOT_SYNC_BYTES,
)
from .log import read_head
from .records import CHECKSUM_BYTES, Head, SnapshotBegin, SnapshotEnd, SnapshotPart, encode

if TYPE_CHECKING:
    from .feed import Feed

logger = logging.getLogger("messenger.replication")

# The names are such that no copy of the user's own is ever taken for one of these.
_SUFFIX = "-snapshot-"
_RANDOM_BYTES = 16
_LEFTOVER = re.compile(rf"{_SUFFIX}[0-9a-f]{{{2 * _RANDOM_BYTES}}}(?:-journal|-wal|-shm)?")


class SnapshotFailed(OSError):
    """A snapshot could not be made, or what arrived is not what was sent."""


def remove_leftovers(path: str) -> None:
    """Remove copies that a process left when it was killed. Called with the file's lock held."""
    folder, name = os.path.split(path)
    for leftover in Path(folder).iterdir():
        if leftover.name.startswith(name) and _LEFTOVER.fullmatch(leftover.name, len(name)):
            leftover.unlink(missing_ok=True)


class SnapshotSource:
    """Makes and sends one snapshot, on the feed's thread. One is made at a time: each takes the disk's time."""

    def __init__(self, feed: "Feed") -> None:
        self._feed = feed
        self._source = feed.source
        self._path = f"{feed.source.path}{_SUFFIX}{secrets.token_hex(_RANDOM_BYTES)}"
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        Path(self._path).unlink(missing_ok=True)

    def send(self) -> Head | None:
        """Return where the copy's history ends, once it is sent and received; None if the feed was stopped."""
        while not self._source.snapshot_lock.acquire(timeout=0.1):
            self._feed.beat()
            if self._feed.is_stopped:
                return None
        try:
            head = self._copy()
        finally:
            self._source.snapshot_lock.release()
        return head if head is not None and self._send_parts(head.lsn) else None

    def _copy(self) -> Head | None:
        reader = open_reader(self._source.path)
        target = None
        try:
            reader.execute("BEGIN")
            head = read_head(reader)  # The first read: from here on this connection sees no later commit.
            size_bytes = reader.pragma("page_count") * reader.pragma("page_size")
            free_bytes = shutil.disk_usage(os.path.dirname(self._path)).free
            if free_bytes < 2 * size_bytes:
                raise SnapshotFailed(
                    f"a snapshot needs {size_bytes} bytes beside {self._source.path} and must leave as many for the "
                    f"database, {free_bytes} are free"
                )
            target = apsw.Connection(self._path)
            target.pragma("journal_mode", "off")
            target.pragma("synchronous", "off")
            self._descriptor = os.open(self._path, os.O_RDONLY)
            started_at = time.monotonic()
            if not self._back_up(reader, target):
                return None
            logger.info("= copied %d bytes in %.1f s", size_bytes, time.monotonic() - started_at)
            self._source.snapshot_count += 1
            return head
        finally:
            if target is not None:
                target.close(force=True)
            reader.close(force=True)

    def _back_up(self, reader: apsw.Connection, target: apsw.Connection) -> bool:
        unsynced_bytes = 0
        page_bytes = reader.pragma("page_size")
        with target.backup("main", reader, "main") as backup:
            while not backup.done:
                backup.step(SNAPSHOT_STEP_PAGES)
                unsynced_bytes += SNAPSHOT_STEP_PAGES * page_bytes
                if unsynced_bytes >= SNAPSHOT_SYNC_BYTES:
                    os.fdatasync(self._descriptor)
                    unsynced_bytes = 0
                self._feed.beat()
                if self._feed.is_stopped:
                    return False
        return True

    def _send_parts(self, lsn: int) -> bool:
        feed, peer, lock = self._feed, self._feed.peer, self._source.lock
        total = os.fstat(self._descriptor).st_size
        digest = blake2b(digest_size=CHECKSUM_BYTES)
        feed.snapshot_acked = offset = 0
        part_bytes = min(SNAPSHOT_PART_BYTES, self._source.messenger.limits.message_bytes_max - MESSAGE_ROOM_BYTES)
        with lock:
            peer.snapshot_bytes, peer.snapshot_bytes_total = 0, total
        feed.send(SnapshotBegin(feed.stream, total))
        while offset < total or feed.snapshot_acked < total:
            feed.beat()
            if feed.is_stopped:
                return False
            if offset == total or offset - feed.snapshot_acked >= SNAPSHOT_IN_FLIGHT_BYTES:
                feed.news.wait(0.05)
                feed.news.clear()
                continue
            data = os.pread(self._descriptor, part_bytes, offset)
            digest.update(data)
            feed.ask(encode(SnapshotPart(feed.stream, offset, data)))
            offset += len(data)
        feed.send(SnapshotEnd(feed.stream, digest.digest(), lsn))
        with lock:
            peer.snapshot_bytes = peer.snapshot_bytes_total = 0
        return True


class SnapshotSink:
    """Takes the parts of one snapshot into a file beside the replica's own.

    Attributes:
        bytes_done, bytes_total: How far it is.
    """

    def __init__(self, path: str, bytes_total: int) -> None:
        self.path = f"{path}{_SUFFIX}{secrets.token_hex(_RANDOM_BYTES)}"
        self.bytes_done = 0
        self.bytes_total = bytes_total
        self._digest = blake2b(digest_size=CHECKSUM_BYTES)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, part: SnapshotPart) -> None:
        """Append a part.

        Raises:
            SnapshotFailed: It is not the next one. OSError: The disk is full.
        """
        if part.offset != self.bytes_done or part.offset + len(part.data) > self.bytes_total:
            raise SnapshotFailed(
                f"a part of {len(part.data)} bytes came for offset {part.offset}, not {self.bytes_done} "
                f"of {self.bytes_total}"
            )
        view = memoryview(part.data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._digest.update(part.data)
        self.bytes_done += len(part.data)

    def finish(self, checksum: bytes) -> None:
        """Check that all is there, and make it durable.

        Raises:
            SnapshotFailed, OSError.
        """
        if self.bytes_done != self.bytes_total or self._digest.digest() != checksum:
            raise SnapshotFailed(f"{self.bytes_done} of {self.bytes_total} bytes came, or others than were sent")
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Remove the file, unless it was put in place. Twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        Path(self.path).unlink(missing_ok=True)
