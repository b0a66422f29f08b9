"""Our server alone: whatever it is sent, it answers once, and goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from messenger import Messenger
from messenger.models.jobs import Training
from messenger.models.protocol import Answer, decode_answer
from messenger.models.server import ModelServer
from messenger.models.table import Request
from messenger.models.trainer import Task
from tests.conftest import Inbox, free_port
from tests.models.conftest import make_linear


class Sent:
    """A message as the server sees it; it keeps what it is answered with."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.source_callback_id, self.dest_callback_id = 1024, 0
        self.reply: Inbox[bytes] = Inbox()


@pytest.fixture
def server(folder: Path) -> Iterator[ModelServer]:
    make_linear(folder)
    with Messenger() as messenger:
        server = ModelServer(messenger, free_port(), folder=folder)
        yield server
        server.close()


def ask(server: ModelServer, contents: bytes) -> Answer:
    sent = Sent(contents)
    server._take(sent)  # type: ignore[arg-type]  # It has what the server uses of a message.
    (answer,) = sent.reply.wait()
    return decode_answer(answer)[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["sum", "../sum", "nothing", ""]) | values
fields = st.fixed_dictionaries(
    {},
    optional={
        "name": names,
        "version": st.integers(-2, 3) | values,
        "rows": st.lists(st.lists(st.floats(allow_nan=False), min_size=2, max_size=2), max_size=3) | values,
        "parts": st.lists(st.integers(-1, 3), max_size=3) | values,
        "job": values,
        "message": values,
        "method": st.just("linear"),
        "data": values,
        "target": values,
    },
)
commands = st.sampled_from(["PRINT", "INFER", "LOAD", "UNLOAD", "LIST", "STATUS", "CANCEL", "JOB", "TRAIN", "x", ""])


@given(cmd=commands, data=fields | values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_is_answered_once(server: ModelServer, cmd: str, data: Any) -> None:
    if cmd == "TRAIN" and isinstance(data, dict):
        data.pop("name", None)  # So that it is refused, and no process is started for it.
    answer = ask(server, msgspec.json.encode({"cmd": cmd, "data": data}))
    assert answer.success or answer.err
    after = ask(server, b'{"cmd": "INFER", "data": {"name": "sum", "version": 1, "rows": [[1, 2]]}}')
    assert after.result == {"name": "sum", "version": 1, "predictions": [3.0]}


@given(contents=st.binary(max_size=100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_answered_once(server: ModelServer, contents: bytes) -> None:
    assert not ask(server, contents).success


def test_quit_is_not_answered(server: ModelServer) -> None:
    sent = Sent(b'{"cmd": "QUIT", "data": ""}')
    server._take(sent)  # type: ignore[arg-type]
    assert server.ended.is_set()
    assert len(sent.reply) == 0


@pytest.mark.parametrize("activate", [True, False])
def test_a_training_is_told_when_its_model_is_loaded(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, activate: bool
) -> None:
    """The first model of a kind imports its library, which took the first inference after a training 4 s."""
    sent: Any = Sent(b"")
    loaded: list[tuple[str, int, int]] = []

    def load(name: str, version: int) -> None:
        loaded.append((name, version, len(sent.reply)))
        raise OSError("planted")

    monkeypatch.setattr(server._loaded, "load", load)
    training = Training(
        name="sum", version=1, method="linear", task="regression", metrics={}, rows=9, features=[], elapsed_s=1, job="j"
    )
    request = Request(name="sum", method="linear", data="", target="t", activate=activate)
    server._tell_end(sent, Task(request=request, on_progress=lambda _: None, state="DONE", training=training))
    assert loaded == ([("sum", 1, 0)] if activate else [])
    assert len(sent.reply) == 1
