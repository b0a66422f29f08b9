"""Telling other places that this primary leads, and hearing of one that leads under a higher term.

A primary that was promoted tells the places where an old primary may come back, again and again; an old primary that
comes back and knows other places asks them before its first commit. Whoever has the lower term is fenced. Two that
were promoted at the same time to the same term are told apart by the checksums with which their terms began: the
higher one stays.
"""

import threading
from collections.abc import Callable, Sequence

from messenger import Destination, Message, Messenger, MessengerError

from .limits import CLAIM_S
from .records import Claim, MalformedRecord, decode_from_replica, encode


class Claims:
    """Asks other places, on a thread of its own, until `stop`.

    Args:
        others: The places.
        make_claim: Returns what is told.
        on_claim: Called on the messenger's thread with what another primary answers.
    """

    def __init__(
        self,
        messenger: Messenger,
        others: Sequence[Destination | str | int],
        make_claim: Callable[[], Claim],
        on_claim: Callable[[Claim], object],
    ) -> None:
        self._messenger = messenger
        self._others = list(others)
        self._make_claim = make_claim
        self._on_claim = on_claim
        self._is_stopped = threading.Event()
        self.unanswered_count = 0
        # Places whose first answer, or silence, is still to come.
        self._open_count = len(self._others)
        self._first = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="replication-claims", daemon=True)
        self._thread.start()

    def wait_first(self) -> None:
        """Return once each place has answered, or was silent for as long as is waited for an answer."""
        self._first.wait(2 * CLAIM_S)

    def stop(self) -> None:
        """Ask no more. Not on the messenger's thread."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            for other in self._others:
                try:
                    self._messenger.send_message(
                        other, encode(self._make_claim()), self._on_answer, on_error=self._on_silence, timeout=CLAIM_S
                    )
                except MessengerError as error:
                    self._on_silence(error)
            self._is_stopped.wait(CLAIM_S)

    def _on_silence(self, error: MessengerError) -> None:
        self.unanswered_count += 1
        self._note_first()

    def _on_answer(self, message: Message) -> None:
        try:
            record = decode_from_replica(message.contents)
        except MalformedRecord:
            self.unanswered_count += 1
        else:
            if isinstance(record, Claim):
                self._on_claim(record)
        self._note_first()

    def _note_first(self) -> None:
        with self._lock:
            self._open_count -= 1
            if self._open_count <= 0:
                self._first.set()
