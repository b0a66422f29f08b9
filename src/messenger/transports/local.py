"""Who listens on this machine: locks in front of ipc paths, and the inproc names of this process.

ZeroMQ lets a second bind steal an ipc path, and leaves the file of a dead process behind. So each path has a lock file
beside it, which the listener holds locked as long as it lives: whoever gets the lock may remove a stale socket, and a
sender that finds it held knows that somebody listens. Lock files are never removed, since a lock on a removed file
protects nothing.
"""

import errno
import fcntl
import itertools
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from ..destination import Destination, runtime_folder
from ..errors import DestinationInUse, DestinationInvalid

LOCK_TRIES = 20
LOCK_PAUSE_S = 0.005


class IpcLock:
    """The right to bind one ipc path, from creation to `release`."""

    def __init__(self, path: Path) -> None:
        """Take the lock and remove what a dead process left.

        Raises:
            DestinationInUse: A living process has it.
            DestinationInvalid: The folder or what stands at the path is not ours to use.
        """
        self._path = path
        _check_folder(path.parent)
        # Before anything is made beside it.
        self._is_stale()
        try:
            self._descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DestinationInvalid(
                f"ipc://{path}: its lock file {_lock_path(path)} cannot be opened: {error}"
            ) from error
        try:
            self._take()
            self._remove_stale()
        except BlockingIOError:
            os.close(self._descriptor)
            raise DestinationInUse(f"ipc://{path}: another listener has it ({_lock_path(path)} is locked)") from None
        except (DestinationInvalid, OSError):
            os.close(self._descriptor)
            raise
        _held_locks.add(self)

    def _take(self) -> None:
        # A sender that looks whether somebody listens has a shared lock for some microseconds.
        for _ in range(LOCK_TRIES - 1):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S)
            else:
                return
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _remove_stale(self) -> None:
        if self._is_stale():
            self._path.unlink()

    def _is_stale(self) -> bool:
        """Return whether a socket stands at the path; nothing else may."""
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISSOCK(found.st_mode):
            raise DestinationInvalid(
                f"ipc://{self._path}: there is a file that is no socket; move it away or take another path"
            )
        return True

    def release(self) -> None:
        """Remove the socket's file and let others bind the path."""
        self._path.unlink(missing_ok=True)
        # A child of a fork may hold a copy of the descriptor, and with it the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        _held_locks.discard(self)

    def forget(self) -> None:
        """Close the copy of the descriptor in the child of a fork; the parent keeps the lock."""
        os.close(self._descriptor)


def has_ipc_listener(path: Path, *, if_unknown: bool = False) -> bool:
    """Return whether a living process of this user holds the path; `if_unknown` if that cannot be told."""
    try:
        descriptor = os.open(_lock_path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return if_unknown
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            return False
        # A shared lock, so that two senders that look at once do not take each other for a listener.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_own_socket(endpoint: str) -> bool | None:
    """Return whether the socket at an ipc endpoint is this user's, for another may have put one there; None if it is
    gone, as when its listener has just closed.
    """
    try:
        return os.lstat(endpoint.removeprefix("ipc://")).st_uid == os.getuid()
    except FileNotFoundError:
        return None
    except OSError:
        return False


def is_deserted(endpoint: str) -> bool:
    """Return whether it is certain that nobody listens any more at a tcp or ipc endpoint of this machine.

    Does not wait: of such a place the kernel knows at once.
    """
    destination = Destination.parse(endpoint)
    if destination.transport == "ipc":
        return not has_ipc_listener(Path(destination.name), if_unknown=True)
    if not destination.is_loopback():
        return False
    try:
        places = socket.getaddrinfo(destination.host, destination.port, type=socket.SOCK_STREAM)
        return all(_is_refused(family, place) for family, _, _, _, place in places)
    except OSError:  # No descriptor is left, or the name is known no more.
        return False


def _is_refused(family: int, place: tuple[Any, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refusal = (probe.connect_ex(place), probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        return errno.ECONNREFUSED in refusal


def best_endpoint(endpoints: list[str]) -> str:
    """Return the first endpoint that is known to have a listener, else the last (tcp finds out by itself)."""
    for endpoint in endpoints:
        if endpoint.startswith("inproc:") and inproc_names.binding(endpoint):
            return endpoint
        if endpoint.startswith("ipc:") and has_ipc_listener(Path(endpoint.removeprefix("ipc://"))):
            return endpoint
    return endpoints[-1]


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _check_folder(folder: Path) -> None:
    """Make our own runtime folder; refuse it if it is not ours alone. Other folders are the user's own choice."""
    if folder != runtime_folder():
        if not folder.is_dir():
            raise DestinationInvalid(f"the folder {folder} does not exist")
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationInvalid(f"the folder {folder} cannot be made: {error}") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DestinationInvalid(
            f"the folder {folder} must be a folder of user {os.getuid()} with mode 0700; remove it"
        )


class InprocWatcher(Protocol):
    """Somebody who wants to hear of inproc listeners that come and go."""

    def notice_change(self) -> None:
        """Called after each change, by any thread; must be quick and must not call back."""


class _InprocNames:
    """The inproc endpoints that have a listener in this process.

    ZeroMQ neither tells whether an inproc endpoint is bound nor connects again when it is bound anew, so each binding
    has a number, by which a connection sees that its own is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._bindings: dict[str, int] = {}
        self._watchers: set[InprocWatcher] = set()

    def add(self, endpoint: str) -> None:
        """Note a listener and tell the watchers."""
        with self._lock:
            self._bindings[endpoint] = next(self._numbers)
        self._tell()

    def remove(self, endpoint: str) -> None:
        """Note that a listener is gone and tell the watchers."""
        with self._lock:
            self._bindings.pop(endpoint, None)
        self._tell()

    def binding(self, endpoint: str) -> int:
        """Return the number of the present binding, 0 if there is none."""
        return self._bindings.get(endpoint, 0)

    def watch(self, watcher: InprocWatcher) -> None:
        """Tell `watcher` from now on."""
        with self._lock:
            self._watchers.add(watcher)

    def unwatch(self, watcher: InprocWatcher) -> None:
        """Tell `watcher` no more."""
        with self._lock:
            self._watchers.discard(watcher)

    def _tell(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.notice_change()


_held_locks: set[IpcLock] = set()


def _forget_locks() -> None:
    for lock in _held_locks:
        lock.forget()
    _held_locks.clear()


os.register_at_fork(after_in_child=_forget_locks)
inproc_names = _InprocNames()
# No listener of the parent lives in the child of a fork, and the lock may be held for ever there.
os.register_at_fork(after_in_child=inproc_names.__init__)  # type: ignore[misc]
