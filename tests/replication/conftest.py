from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replication.pairs import Cluster, new_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with new_cluster(tmp_path) as made:
        yield made
