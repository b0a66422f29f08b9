"""`transports/sockets.py`: what is cut is a connection of ours to the right port, and nothing else."""

import os
import resource
import socket
import sys
from contextlib import suppress

from messenger.transports.sockets import Kernel, context, cut


def test_a_connection_is_cut_by_its_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            with accepted:
                # Another listener's, and the listening socket itself, are left alone.
                assert not cut(accepted.fileno(), port + 1)
                assert not cut(server.fileno(), port)
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
                assert cut(accepted.fileno(), port)
                assert client.recv(1) == b""


def test_what_the_kernel_knows_of_a_connection() -> None:
    kernel = Kernel()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            with accepted:
                descriptor = accepted.fileno()
                client.sendall(bytes(1_000))
                accepted.recv(300, socket.MSG_WAITALL)
                assert kernel.received_bytes(descriptor) == 1_000
                assert kernel.unread_bytes(descriptor) == 700
                cookie = kernel.cookie_of(descriptor)
                assert cookie not in (0, kernel.cookie_of(client.fileno()))
                # Another socket, and another port, are left alone.
                assert not kernel.cut(descriptor, cookie + 1, port)
                assert not kernel.cut(client.fileno(), cookie, port)
                assert not kernel.cut(descriptor, cookie, 1)
                client.sendall(b"x")
                assert accepted.recv(701, socket.MSG_WAITALL).endswith(b"x")
                assert kernel.cut(descriptor, cookie, port)
                assert client.recv(1) == b""


def test_what_the_kernel_does_not_tell() -> None:
    kernel = Kernel()
    context()
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX) as unix:
        for descriptor in (file.fileno(), unix.fileno(), 1_000_000):
            assert kernel.received_bytes(descriptor) == 0
        for descriptor in (file.fileno(), 1_000_000):
            assert kernel.cookie_of(descriptor) == 0
            assert kernel.unread_bytes(descriptor) == sys.maxsize
            assert not kernel.cut(descriptor, 0, 1)


def test_what_is_no_connection_is_left_alone() -> None:
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX) as unix:
        assert not cut(file.fileno(), 1)
        assert not cut(unix.fileno(), 1)
        closed = os.dup(file.fileno())
        os.close(closed)
        assert not cut(closed, 1)
        assert file.read() == ""


def test_what_is_looked_at_is_let_go_of() -> None:
    """Also if the descriptor is by now a file's, of which no Python socket can be made."""
    with open(os.devnull) as file, socket.create_server(("127.0.0.1", 0)) as server:
        before = os.listdir("/proc/self/fd")
        for descriptor in (file.fileno(), server.fileno(), 1_000_000):
            assert not cut(descriptor, server.getsockname()[1])
        assert os.listdir("/proc/self/fd") == before


def test_a_connection_is_cut_when_there_are_no_more_descriptors() -> None:
    """Else those that are too many would keep them all."""
    context()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            taken: list[int] = []
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))
            try:
                with suppress(OSError):
                    while True:
                        taken.append(os.dup(0))
                is_cut = cut(accepted.fileno(), port)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for descriptor in taken:
                    os.close(descriptor)
            assert is_cut
            assert client.recv(1) == b""
