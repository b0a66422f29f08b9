from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replication.direct import Direct, new_direct
from tests.replication.pairs import Cluster, new_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with new_cluster(tmp_path) as made:
        yield made


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Direct]:
    with new_direct(tmp_path) as made:
        yield made
