"""What ZeroMQ sockets of this process share: one context, and monitors that tell what happens to their connections.

A socket is really closed, and its port free, only when its monitor says that it stopped. That is told by a send that
blocks the thread which closes all sockets of the process, so a monitor that was not told is kept until it is.
"""

import ctypes
import itertools
import os
import secrets
import socket
import struct
import threading
import time

import zmq

from ..limits import SOCKETS_MAX

POLLIN = int(zmq.POLLIN)
NOBLOCK = int(zmq.NOBLOCK)
COUNT_MAX = 1_000_000
_NEWS = struct.Struct("=Hi")
_context: zmq.Context[zmq.Socket[bytes]] | None = None
_lock = threading.Lock()
_libc = ctypes.CDLL(None)
_monitor_numbers = itertools.count(1)
# Of closed sockets that have not stopped yet.
_untold: "list[Monitor]" = []


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the context of this process, made at first use: inproc reaches only within one context."""
    global _context
    with _lock:
        if _context is None:
            _context = zmq.Context(io_threads=1)
            _context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        return _context


def _forget() -> None:
    """Drop the parent's context in the child of a fork: its threads do not exist here."""
    global _context, _lock
    _context = None
    _untold.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def scramble_routing_ids() -> None:
    """Have the next ROUTER draw an unpredictable number for the routing ids that it gives to peers without one.

    libzmq counts up from `rand()`, which it never seeds, so the first ROUTER of each process would start at the same
    number. Who knows the next one can show it as its own routing id, and the process aborts when libzmq gives it out;
    or can take over the link of a peer.
    """
    _libc.srand(secrets.randbits(32))


def cut(descriptor: int, port: int) -> bool:
    """End a connection of a tcp listener of ours, by the descriptor that libzmq told; return whether it was there.

    libzmq has no call for this. It may have closed the descriptor meanwhile, and another file may have its number, so
    what it is now is looked at first.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            is_ours = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == port
            if is_ours:
                connection.getpeername()  # The listening socket has none.
                connection.shutdown(socket.SHUT_RDWR)
            return is_ours
    except OSError:
        return False


class Monitor:
    """What happens to the connections of one socket.

    Attributes:
        descriptor: Readable when there may be news.
    """

    def __init__(self, watched: zmq.Socket[bytes], events: int) -> None:
        self._socket = context().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        # libzmq's own threads must never wait for us to read.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # libzmq frees a name some time after its socket was closed, so each is used once.
        name = f"inproc://messenger-monitor-{next(_monitor_numbers)}"
        watched.monitor(name, events | zmq.EVENT_MONITOR_STOPPED)
        self._socket.connect(name)
        self.descriptor: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._is_stopped = False

    def read(self, count_max: int = COUNT_MAX) -> list[tuple[int, int]]:
        """Return the events that came, each with its value; if there are `count_max`, there may be more."""
        news: list[tuple[int, int]] = []
        receive = self._socket.recv
        try:
            while len(news) < count_max:
                news.append(_NEWS.unpack(receive(NOBLOCK)))
                receive(NOBLOCK)  # The endpoint.
        except zmq.Again:
            return news
        return news

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Return the events that came, as soon as there are some, none after `timeout_s` seconds."""
        self._socket.poll(int(timeout_s * 1000) + 1)
        return self.read()

    def has_stopped(self) -> bool:
        """Read what there is; return whether the watched socket, which was closed before, has stopped."""
        if not self._is_stopped:
            self._is_stopped = any(event == zmq.EVENT_MONITOR_STOPPED for event, _ in self.read())
        return self._is_stopped

    def wait_stop(self, timeout_s: float) -> None:
        """Wait until the watched socket has stopped, at most so long."""
        ends_at = time.monotonic() + timeout_s
        while (left_s := ends_at - time.monotonic()) > 0 and not self.has_stopped():
            self._socket.poll(int(left_s * 1000) + 1)

    def close(self) -> None:
        """Close, now or once the watched socket has stopped."""
        with _lock:
            _untold.append(self)
            for monitor in [other for other in _untold if other.has_stopped()]:
                _untold.remove(monitor)
                monitor._socket.close()
