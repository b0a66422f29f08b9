"""What ZeroMQ sockets of this process share: one context, and monitors that tell what happens to their connections.

A socket is really closed, and its port free, only when its monitor says that it stopped. That is told by a send that
blocks the thread which closes all sockets of the process, so a monitor that was not told is kept until it is.
"""

import ctypes
import fcntl
import itertools
import os
import secrets
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable

import zmq

from ..limits import SOCKETS_MAX

POLLIN = int(zmq.POLLIN)
NOBLOCK = int(zmq.NOBLOCK)
# CurveZMQ puts a name of 8 bytes, a nonce of 8, an authenticator of 16 and flags of 1 around each frame.
CURVE_WRAP_BYTES = 33
# A listener with keys has sent so much to whom it refuses: greeting, WELCOME, ERROR. READY is longer than ERROR.
CURVE_REFUSAL_BYTES = 64 + 170 + 12
_NEWS = struct.Struct("=Hi")
_INT = struct.Struct("=i")
_COOKIE = struct.Struct("=Q")
_SOL_SOCKET, _IPPROTO_TCP, _TCP_INFO = int(socket.SOL_SOCKET), int(socket.IPPROTO_TCP), int(socket.TCP_INFO)
# Python has no names for these of Linux: the own name of a socket, 8 bytes; and the places in `struct tcp_info`, which
# only ever grew at its end, of how many bytes the peer has acknowledged, and how many were received.
_SO_COOKIE = 57
_ACKNOWLEDGED_OFFSET, _RECEIVED_OFFSET = 120, 128
_context: zmq.Context[zmq.Socket[bytes]] | None = None
_lock = threading.Lock()
_libc = ctypes.CDLL(None)
# Does not let go of the interpreter, which another thread might then keep for milliseconds; a call takes 1 microsecond.
_getsockopt = ctypes.PyDLL(None).getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_monitor_numbers = itertools.count(1)
# Two that lead nowhere. A connection must be cut also when there are no more; its descriptor is put onto the first one.
_spares: tuple[int, int] | None = None
# Of closed sockets that have not stopped yet.
_untold: "list[Monitor]" = []


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the context of this process, made at first use: inproc reaches only within one context."""
    global _context
    with _lock:
        if _context is None:
            if _spares is None:
                _open_spares()
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
    return _shut(descriptor, lambda it: it.family in (socket.AF_INET, socket.AF_INET6) and it.getsockname()[1] == port)


def _shut(descriptor: int, is_it: Callable[[socket.socket], bool]) -> bool:
    with _lock:
        spare, nowhere = _spares or _open_spares()
        try:
            os.dup2(descriptor, spare, inheritable=False)
            connection = socket.socket(fileno=spare)
            try:
                is_ours = is_it(connection)
                if is_ours:
                    connection.getpeername()  # The listening socket has none.
                    connection.shutdown(socket.SHUT_RDWR)
                return is_ours
            finally:
                connection.detach()
        except OSError:
            return False
        finally:
            os.dup2(nowhere, spare, inheritable=False)


def _open_spares() -> tuple[int, int]:
    global _spares
    spare, nowhere = (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2))
    _spares = spare, nowhere
    return _spares


class Kernel:
    """What the kernel knows of sockets, by descriptors that stay libzmq's, whatever happens here.

    A Python socket would close them if an exception came at the wrong time. For one thread at a time.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(_RECEIVED_OFFSET + 8)
        self._length = ctypes.c_uint32()
        self._first = ctypes.c_uint64.from_buffer(self._buffer)
        self._acknowledged = ctypes.c_uint64.from_buffer(self._buffer, _ACKNOWLEDGED_OFFSET)
        self._received = ctypes.c_uint64.from_buffer(self._buffer, _RECEIVED_OFFSET)
        self._where = (ctypes.addressof(self._buffer), ctypes.addressof(self._length))

    def received_bytes(self, descriptor: int) -> int:
        """Return what a tcp connection has received, whether or not libzmq has taken it; 0 if that is not told."""
        return self._received.value if self._ask(descriptor, _IPPROTO_TCP, _TCP_INFO, _RECEIVED_OFFSET + 8) else 0

    def acknowledged_bytes(self, descriptor: int) -> int:
        """Return how much of what was sent by a tcp connection has reached its peer; 0 if that is not told."""
        return self._acknowledged.value if self._ask(descriptor, _IPPROTO_TCP, _TCP_INFO, _RECEIVED_OFFSET) else 0

    def cookie_of(self, descriptor: int) -> int:
        """Return the name of a socket, which no other one ever has; 0 if that is not told."""
        return self._first.value if self._ask(descriptor, _SOL_SOCKET, _SO_COOKIE, 8) else 0

    def unread_bytes(self, descriptor: int) -> int:
        """Return how much of the received libzmq has not taken; more than there can be if that is not told."""
        try:
            unread: int = _INT.unpack(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]
        except OSError:
            return sys.maxsize
        return unread

    def cut(self, descriptor: int, cookie: int, port: int) -> bool:
        """End the connection from or to a port that has this cookie; return whether the descriptor is still its own."""

        def is_it(connection: socket.socket) -> bool:
            ports = (connection.getsockname()[1], connection.getpeername()[1])
            return port in ports and connection.getsockopt(_SOL_SOCKET, _SO_COOKIE, 8) == _COOKIE.pack(cookie)

        return _shut(descriptor, is_it)

    def _ask(self, descriptor: int, level: int, option: int, size: int) -> bool:
        length = self._length
        length.value = size
        return _getsockopt(descriptor, level, option, *self._where) == 0 and length.value == size


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

    def read(self, count_max: int = sys.maxsize) -> list[tuple[int, int]]:
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
