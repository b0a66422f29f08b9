"""What a caller names, and the transport addresses that it stands for.

A destination is a URL (`tcp://host:port`, `ipc://path`, `inproc://name`), a bare port, or `"host:port"`. The last two
stand for three endpoints at once, best first: inproc, ipc, tcp. A listener opens all of them, a connection takes the
first that has a listener. So the same two lines work when a component moves to another process or machine.
"""

import ipaddress
import os
import tempfile
from pathlib import Path
from typing import Literal, Self, get_args

import msgspec

from .errors import DestinationInvalid
from .limits import IPC_PATH_BYTES_MAX

Transport = Literal["tcp", "ipc", "inproc"]
LOOPBACK = "127.0.0.1"
PORT_MAX = 65_535


class Destination(msgspec.Struct, frozen=True):
    """A parsed destination; equal destinations name the same place.

    Attributes:
        transport: `"tcp"`, `"ipc"`, `"inproc"`, or None for a port on whichever transport reaches it best.
        host: Of tcp and of a port. An IPv6 address stands without its brackets.
        port: 1 to 65535; 0 lets a listener take any free one.
        name: The path of ipc, the name of inproc.
    """

    transport: Transport | None
    host: str = ""
    port: int = 0
    name: str = ""

    @classmethod
    def parse(cls, value: "int | str | Destination") -> Self:
        """Return the destination that `value` names.

        Args:
            value: A port (`15445` or `"15445"`), `"host:port"`, a URL, or a destination.

        Raises:
            DestinationInvalid: It names none; the text says what is wrong.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(None, LOOPBACK, _parse_port(str(value), value))
        if not isinstance(value, str):
            raise DestinationInvalid(f"a destination is a port, a host:port or a URL, not {type(value).__name__}")
        scheme, separator, rest = value.partition("://")
        if not separator:
            if value.isascii() and value.isdigit():
                return cls(None, LOOPBACK, _parse_port(value, value))
            return cls(None, *_parse_host_port(value, value))
        if scheme not in get_args(Transport):
            raise DestinationInvalid(f"{value!r}: the transport {scheme!r} is unknown, use tcp, ipc or inproc")
        if scheme == "tcp":
            return cls("tcp", *_parse_host_port(rest, value))
        if not rest or "\0" in rest:
            raise DestinationInvalid(f"{value!r}: the {'path' if scheme == 'ipc' else 'name'} is empty or holds a NUL")
        if scheme == "ipc":
            _check_ipc_path(rest, value)
            return cls("ipc", name=os.path.abspath(rest))
        return cls("inproc", name=rest)

    def endpoints(self) -> list[str]:
        """Return the ZeroMQ endpoints it stands for, best first."""
        if self.transport == "ipc" or self.transport == "inproc":
            return [f"{self.transport}://{self.name}"]
        # libzmq itself wants the port of a listener that takes any as *.
        tcp = f"tcp://{_bracketed(self.host)}:{self.port or '*'}"
        if self.transport == "tcp":
            return [tcp]
        # Two addresses of one machine are two places; the usual one needs no host in its name.
        name = str(self.port) if self.host == LOOPBACK else f"{self.host}_{self.port}"
        path = str(runtime_folder() / f"{name}.ipc")
        _check_ipc_path(path, str(self))
        return [f"inproc://{name}", f"ipc://{path}", tcp]

    def is_loopback(self) -> bool:
        """Return whether only this machine can reach it."""
        if self.transport in ("ipc", "inproc") or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def unresolved_name(self) -> str:
        """Return the host if it is a name that the network has to resolve, else an empty text."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return "" if self.is_loopback() else self.host
        return ""

    def __str__(self) -> str:
        if self.transport in ("ipc", "inproc"):
            return f"{self.transport}://{self.name}"
        address = f"{_bracketed(self.host)}:{self.port}"
        if self.transport == "tcp":
            return f"tcp://{address}"
        return str(self.port) if self.host == LOOPBACK else address


def runtime_folder() -> Path:
    """Return the user's own folder for ipc endpoints (it need not exist yet)."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and Path(base).is_dir():
        return Path(base) / "messenger"
    return Path(tempfile.gettempdir()) / f"messenger-{os.getuid()}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parse_port(text: str, value: object) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 5 or int(text) > PORT_MAX:
        raise DestinationInvalid(f"{value!r}: the port is {text!r}, it must be 0 to {PORT_MAX}")
    return int(text)


def _parse_host_port(text: str, value: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host:
        raise DestinationInvalid(f"{value!r} is no destination: give a port, host:port, tcp://…, ipc://… or inproc://…")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise DestinationInvalid(f"{value!r}: an IPv6 address stands in brackets, as in [::1]:15445")
    if not host or any(character in "/@;[]" or character.isspace() for character in host):
        raise DestinationInvalid(f"{value!r}: {host!r} is no host name or address")
    # Both names mean the same address, and the same ipc path must come out of both.
    return LOOPBACK if host == "localhost" else host, _parse_port(port, value)


def _check_ipc_path(path: str, value: str) -> None:
    if path.startswith("@"):
        raise DestinationInvalid(
            f"{value!r}: abstract ipc names have no file mode, so anybody could connect; use a path"
        )
    length = len(os.fsencode(os.path.abspath(path)))
    if length > IPC_PATH_BYTES_MAX:
        raise DestinationInvalid(f"{value!r}: the path is {length} bytes, a Unix socket takes {IPC_PATH_BYTES_MAX}")
