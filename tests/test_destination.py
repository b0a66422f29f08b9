"""`destination`: what a caller may name, and the endpoints that it stands for."""

from pathlib import Path

import pytest

from messenger import Destination, DestinationInvalid
from messenger.destination import runtime_folder


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")


@pytest.mark.parametrize("value", [15445, "15445", "127.0.0.1:15445", "localhost:15445"])
def test_a_bare_port_is_inproc_ipc_and_tcp_on_this_machine(value: int | str) -> None:
    destination = Destination.parse(value)
    assert destination == Destination(None, "127.0.0.1", 15445)
    assert destination.endpoints() == ["inproc://15445", "ipc:///tmp/messenger/15445.ipc", "tcp://127.0.0.1:15445"]
    assert str(destination) == "15445"
    assert destination.is_loopback()
    assert Destination.parse(destination) is destination


@pytest.mark.parametrize(
    ("value", "endpoints", "text", "is_loopback"),
    [
        ("tcp://10.0.0.7:1", ["tcp://10.0.0.7:1"], "tcp://10.0.0.7:1", False),
        ("tcp://[::1]:80", ["tcp://[::1]:80"], "tcp://[::1]:80", True),
        ("tcp://*:80", ["tcp://*:80"], "tcp://*:80", False),
        ("tcp://localhost:80", ["tcp://127.0.0.1:80"], "tcp://127.0.0.1:80", True),
        ("tcp://127.0.0.1:0", ["tcp://127.0.0.1:*"], "tcp://127.0.0.1:0", True),
        ("ipc:///tmp/x", ["ipc:///tmp/x"], "ipc:///tmp/x", True),
        ("inproc://a b", ["inproc://a b"], "inproc://a b", True),
        (
            "db1.example:15445",
            ["inproc://db1.example_15445", "ipc:///tmp/messenger/db1.example_15445.ipc", "tcp://db1.example:15445"],
            "db1.example:15445",
            False,
        ),
        (
            "[::1]:7",
            ["inproc://::1_7", "ipc:///tmp/messenger/::1_7.ipc", "tcp://[::1]:7"],
            "[::1]:7",
            True,
        ),
    ],
)
def test_the_endpoints_of_a_destination(value: str, endpoints: list[str], text: str, is_loopback: bool) -> None:
    destination = Destination.parse(value)
    assert destination.endpoints() == endpoints
    assert str(destination) == text
    assert destination.is_loopback() is is_loopback
    assert Destination.parse(text) == destination


def test_a_relative_ipc_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    assert Destination.parse("ipc://x").endpoints() == ["ipc:///tmp/x"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (65536, "the port is '65536', it must be 0 to 65535"),
        (-1, "the port is '-1'"),
        ("tcp://host:", "the port is ''"),
        ("tcp://host:http", "the port is 'http'"),
        ("tcp://host:123456", "the port is '123456'"),
        ("host:\u0661", "the port is '\u0661'"),
        ("", "is no destination"),
        ("replica", "is no destination"),
        (":15445", "is no destination"),
        ("tcp://:1", "is no destination"),
        ("tcp://a b:1", "no host name"),
        ("tcp://[]:1", "no host name"),
        ("tcp://a/b:1", "no host name"),
        ("::1:15445", "stands in brackets"),
        ("udp://h:1", "the transport 'udp' is unknown"),
        ("ipc://", "the path is empty"),
        ("ipc://a\0b", "the path is empty or holds a NUL"),
        ("inproc://", "the name is empty"),
        ("ipc://@abstract", "abstract ipc names have no file mode"),
        ("ipc:///" + "x" * 107, "the path is 108 bytes, a Unix socket takes 107"),
        (1.5, "not float"),
        (True, "not bool"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_destination_is_refused_with_a_reason(value: object, text: str) -> None:
    with pytest.raises(DestinationInvalid) as raised:
        Destination.parse(value)  # type: ignore[arg-type]
    assert text in str(raised.value)


def test_a_runtime_folder_that_makes_the_path_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    with pytest.raises(DestinationInvalid, match="a Unix socket takes 107"):
        Destination.parse(1).endpoints()


def test_the_runtime_folder_without_one_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere/at/all")
    assert runtime_folder().name.startswith("messenger-")


@pytest.mark.parametrize(
    ("value", "name"),
    [("tcp://example.org:5", "example.org"), ("tcp://[::1]:5", ""), ("10.0.0.1:5", ""), ("localhost:5", "")],
)
def test_which_hosts_are_names(value: str, name: str) -> None:
    assert Destination.parse(value).unresolved_name() == name
