"""The fuzzer's targets in every test run: over the corpus, and over what hypothesis finds."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messenger import wire
from messenger.exchange import Exchange
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, RuleBroken, fuzz_exchange, fuzz_wire

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    cases = sorted((CORPUS / name).iterdir())
    assert cases, f"the corpus of {name} is empty"
    for case in cases:
        TARGETS[name](case.read_bytes())


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_wire(data: bytes) -> None:
    fuzz_wire(data)
    fuzz_wire(bytes((wire.MAGIC, wire.VERSION, wire.Kind.DATA)) + data)


STEPS = st.lists(st.tuples(st.integers(0, 11), st.binary(max_size=40)), max_size=30)


@given(STEPS)
@settings(max_examples=300)
def test_exchange(steps: list[tuple[int, bytes]]) -> None:
    fuzz_exchange(b"".join(bytes([kind]) + data for kind, data in steps))


# A target that finds nothing could be one that looks at nothing.


def test_wire_target_finds_a_decoder_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "decode_message", lambda data: data.decode("ascii").split("-"))
    with pytest.raises(UnicodeDecodeError):
        fuzz_wire(b"\xff")


@pytest.mark.replaces_core
def test_exchange_target_finds_an_outcome_that_is_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Exchange._fail

    def fail_twice(self: Exchange, message_id: int, *others: object) -> None:
        entry = self._outstanding.get(message_id)
        fail(self, message_id, *others)  # type: ignore[arg-type]
        if entry is not None:
            self._outstanding[message_id] = entry
            fail(self, message_id, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Exchange, "_fail", fail_twice)
    with pytest.raises(RuleBroken, match="two outcomes"):
        fuzz_exchange(bytes([7, 5, 0, 1, 65]))
