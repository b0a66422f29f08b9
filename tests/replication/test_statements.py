"""Whatever a primary did, its replica holds the same: a few runs of `statements.py`."""

import pytest

from tests.replication.direct import Direct
from tests.replication.statements import run


# Each of these found a fault that was planted.
@pytest.mark.parametrize("seed", [0, 16, 24, 32])
def test_random_statements_leave_both_alike(direct: Direct, seed: int) -> None:
    assert run(direct, seed) > 5
