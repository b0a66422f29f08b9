"""No secret key may show in any output of the tests: a test that shows one fails, even if it passed.

Two kinds of keys are looked for, in what each test printed, logged and raised: every secret key that was made in this
process, and the canary, one fixed key that also programs are given which tests start. `.ci/run` looks for the canary
once more, in the output of the whole run.
"""

import logging
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from messenger import KeyPair

CANARY = (Path(__file__).parent / "canary.secret").read_text().strip()
_secrets = {CANARY}
_init = KeyPair.__init__


def _note_secret(self: KeyPair, secret: str, name: str = "") -> None:
    _init(self, secret, name)
    _secrets.add(secret)


KeyPair.__init__ = _note_secret  # type: ignore[method-assign]
# What is logged only for developers must not hold a secret either.
logging.getLogger("messenger").setLevel(logging.DEBUG)


def canary(name: str) -> KeyPair:
    """Returns the pair whose secret key is looked for."""
    return KeyPair(CANARY, name)


def shown_secrets(texts: Iterable[str]) -> int:
    """Returns how many secrets stand in these texts, as they are or escaped as Python and JSON do."""
    whole = "\n".join(texts)
    return sum(any(form in whole for form in (secret, repr(secret)[1:-1])) for secret in _secrets)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    shown_count = shown_secrets([report.longreprtext, *(text for _, text in report.sections)])
    if shown_count:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} ({report.when}): its output holds {shown_count} secret keys, so it is left out"
        )
        report.sections = []
    return report
