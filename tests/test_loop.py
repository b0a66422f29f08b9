"""`loop`: an error in the loop itself ends its messenger, at once, loudly, and once. It is not left looking alive."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from messenger import AsyncMessenger, DeliveryError, Message, Messenger, MessengerClosed
from tests.conftest import TIMEOUT_S, Inbox, wait_until


def fail(*_: object) -> None:
    raise ZeroDivisionError("planted")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]


def test_an_error_in_the_loop_of_a_thread(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    outcomes: Inbox[Any] = Inbox()
    with Messenger("broken") as broken, Messenger() as silent:
        silent.listen_for_connection("inproc://silent", lambda _: None)
        listener = broken.listen_for_connection("inproc://broken", lambda _: None)
        broken.send_message("inproc://silent", b"", outcomes, on_error=outcomes)

        def ask() -> None:
            try:
                broken.request("inproc://silent", b"", timeout=60)
            except DeliveryError as error:
                outcomes(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: broken.statistics().outstanding_msgs == 2)
        started_at = time.monotonic()
        monkeypatch.setattr(broken._loop, "_note_processed", fail)
        broken._loop._wakeup.announce_calls()
        errors = outcomes.wait(2)
        asking.join(TIMEOUT_S)
        assert all("ZeroDivisionError('planted')" in str(error) for error in errors)
        assert time.monotonic() - started_at < TIMEOUT_S
        with pytest.raises(MessengerClosed, match=r"'broken' has ended by an error of its own, ZeroDivisionError"):
            broken.send_message("inproc://silent", b"")
        wait_until(lambda: listener.closed)
        assert repr(broken) == "<Messenger 'broken', closed>"
        assert told(caplog) == ["! messenger-broken has ended by an error of its own, please report it"]


@pytest.mark.replaces_core
def test_an_error_in_a_turn_of_an_event_loop(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AsyncMessenger("broken") as broken, AsyncMessenger() as silent:
            silent.listen_for_connection("inproc://silent", lambda _: None)
            outcome = broken.request("inproc://silent", b"", timeout=60)
            await asyncio.sleep(0)
            monkeypatch.setattr(broken._loop, "_take_input", fail)
            broken._loop.ask_attention()
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(DeliveryError, match="ZeroDivisionError"):
                    await outcome
                with pytest.raises(MessengerClosed, match="ended by an error of its own, ZeroDivisionError"):
                    await broken.send_message("inproc://silent", b"")
                await broken.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert told(caplog) == ["! messenger-broken has ended by an error of its own, please report it"]


@pytest.mark.replaces_core
@pytest.mark.parametrize("broken_part", ["close_link", "abandon"])
def test_a_core_that_cannot_even_be_closed(
    broken_part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every message has its outcome all the same."""
    outcomes: Inbox[Any] = Inbox()
    with Messenger("broken") as broken, Messenger() as silent:
        silent.listen_for_connection("inproc://silent", lambda _: None)
        broken.send_message("inproc://silent", b"", outcomes, on_error=outcomes)
        monkeypatch.setattr(broken._exchange, broken_part, fail)
        broken.close(timeout=0)
        assert len(outcomes.wait()) == 1
        assert told(caplog)


def test_a_log_handler_that_raises_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        if record.levelno == logging.ERROR:
            raise ZeroDivisionError("planted")
        return True

    def answer(message: Message) -> None:
        if message.contents:
            fail()
        message.reply(b"")

    logging.getLogger("messenger").addFilter(refuse)
    try:
        with Messenger() as server, Messenger() as client:
            server.listen_for_connection("inproc://server", answer)
            with pytest.raises(DeliveryError, match="planted"):
                client.request("inproc://server", b"fail")
            assert client.request("inproc://server", b"").contents == b""
    finally:
        logging.getLogger("messenger").removeFilter(refuse)
    assert told(caplog) == []
