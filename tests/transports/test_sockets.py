"""`transports/sockets.py`: what is cut is a connection of ours to the right port, and nothing else."""

import os
import socket

from messenger.transports.sockets import cut


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


def test_what_is_no_connection_is_left_alone() -> None:
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX) as unix:
        assert not cut(file.fileno(), 1)
        assert not cut(unix.fileno(), 1)
        closed = os.dup(file.fileno())
        os.close(closed)
        assert not cut(closed, 1)
        assert file.read() == ""
