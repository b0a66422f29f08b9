"""Disks that fail, and processes that die: at the n-th call of the file system, or of a method of replication."""

import errno
import functools
import importlib
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import apsw

REAL = "unix"


def die() -> NoReturn:
    """kill -9, by the process itself."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("unreachable")


def fail() -> NoReturn:
    raise apsw.IOError("the disk failed, as the test wants it")


def be_full() -> NoReturn:
    raise apsw.FullError("the disk is full, as the test wants it")


ACTIONS: dict[str, Callable[[], NoReturn]] = {"kill": die, "fail": fail, "full": be_full}


class Point(NamedTuple):
    """A place in the code where a process is killed.

    Attributes:
        role: Whose process.
        module, method: Of `messenger.replication`; a method as `Class.method`.
        when: `before` or `after` it runs.
        number: At which call.
    """

    role: str
    module: str
    method: str
    when: str
    number: int

    def arm(self) -> None:
        """Kill this process when it comes there."""
        name, _, attribute = self.method.partition(".")
        owner = getattr(importlib.import_module(f"messenger.replication.{self.module}"), name)
        method = getattr(owner, attribute)
        call_count = 0

        @functools.wraps(method)
        def call(*args: Any, **named: Any) -> Any:
            nonlocal call_count
            call_count += 1
            is_it = call_count == self.number
            if is_it and self.when == "before":
                die()
            result = method(*args, **named)
            if is_it:
                die()
            return result

        setattr(owner, attribute, call)


POINTS = {
    # A commit, from its beginning to the confirmation.
    "before the entry is in the log": Point("primary", "log", "Log.append", "before", 20),
    "the entry is in the log, not committed": Point("primary", "log", "Log.append", "after", 20),
    "committed, not sent": Point("primary", "hub", "Hub.publish", "before", 20),
    "sent, not on the primary's disk": Point("primary", "hub", "Hub.publish", "after", 20),
    "on the primary's disk, not confirmed": Point("primary", "database", "WalSync.sync", "after", 20),
    "an answer came, nobody was told": Point("primary", "hub", "Hub._handle_ack", "before", 20),
    "received, not applied": Point("replica", "applier", "Applier.apply", "before", 5),
    "applied, not committed": Point("replica", "log", "Log.append", "after", 5),
    "committed, not on the replica's disk": Point("replica", "applier", "Applier.apply", "after", 5),
    "on the replica's disk, not answered": Point("replica", "applier", "Applier.sync", "after", 5),
    "answered": Point("replica", "follower", "Follower._answer", "after", 5),
    # A snapshot, from its beginning until it is in place.
    "before the copy is made": Point("primary", "snapshot", "SnapshotSource._copy", "before", 1),
    "the copy is made, not sent": Point("primary", "snapshot", "SnapshotSource._copy", "after", 1),
    "the copy is sent": Point("primary", "snapshot", "SnapshotSource._send_parts", "after", 1),
    "the snapshot has begun": Point("replica", "applier", "Applier.begin_snapshot", "after", 1),
    "a part of it came": Point("replica", "snapshot", "SnapshotSink.write", "after", 1),
    "all of it came": Point("replica", "snapshot", "SnapshotSink.finish", "after", 1),
    "it is prepared, not in place": Point("replica", "applier", "Applier._prepare", "after", 1),
    "it is in place, not open": Point("replica", "applier", "Applier._open", "before", 1),
    # The same where a file is there already (`resync`).
    "before it replaces what is there": Point("replica", "applier", "Applier._replace_content", "before", 1),
    "it has replaced what was there": Point("replica", "applier", "Applier._replace_content", "after", 1),
}


class Fault:
    """Acts at the n-th call of some kind, counted from when it is armed; a failing disk fails from then on.

    Args:
        kinds: Of `write`, `sync`, `read`, `open`, `truncate`, `delete`, with commas between them.
        mend_after: So many failures, then the disk works again; 0 for never.
        only: What the name of a file must contain.
    """

    def __init__(self, action: str, kinds: str, number: int, mend_after: int = 1, only: str = "") -> None:
        self._act = ACTIONS[action]
        self._kinds = frozenset(kinds.split(","))
        self._number = number
        self._mend_after = mend_after
        self.only = only
        self.is_armed = False
        self.call_count = 0
        self.acted_count = 0

    def note(self, kind: str) -> None:
        """Count a call, and act if it is the one."""
        if not self.is_armed or kind not in self._kinds:
            return
        self.call_count += 1
        has_begun = self.call_count >= self._number
        if has_begun and (not self._mend_after or self.acted_count < self._mend_after):
            self.acted_count += 1
            self._act()


class _File(apsw.VFSFile):
    def __init__(self, fault: Fault, name: Any, flags: list[int]) -> None:
        super().__init__(REAL, name, flags)
        self._fault = fault

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802  # apsw's names.
        self._fault.note("write")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._fault.note("sync")
        super().xSync(flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._fault.note("read")
        return super().xRead(amount, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._fault.note("truncate")
        super().xTruncate(size)


class FaultyDisk(apsw.VFS):
    """The real file system, but for one fault, until `remove`: for SQLite, and for who asks the disk past it."""

    def __init__(self, fault: Fault) -> None:
        super().__init__("faulty", REAL, makedefault=True)
        self.fault = fault
        self._real = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        for name, sync in self._real.items():
            setattr(os, name, functools.partial(self._sync, sync))

    def remove(self) -> None:
        """Be the real file system again."""
        for name, sync in self._real.items():
            setattr(os, name, sync)
        self.unregister()

    def _sync(self, sync: Callable[[int], None], descriptor: int) -> None:
        if self._concerns(os.readlink(f"/proc/self/fd/{descriptor}")):
            try:
                self.fault.note("sync")
            except apsw.Error as error:
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        sync(descriptor)

    def _concerns(self, name: Any) -> bool:
        text = name.filename() if isinstance(name, apsw.URIFilename) else name
        return self.fault.only in (text or "")  # A temporary file has no name.

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        if not self._concerns(name):
            return apsw.VFSFile(REAL, name, flags)
        self.fault.note("open")
        return _File(self.fault, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802
        if self._concerns(name):
            self.fault.note("delete")
        super().xDelete(name, sync_directory)
