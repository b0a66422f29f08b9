"""What the tests of the models share: real managers with real server processes, and small data."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_diabetes, load_wine

from messenger.models import ModelServerManager
from messenger.models.protocol import ANSWER, Answer
from messenger.models.store import Manifest, Store
from tests.conftest import MessengerFactory, NewDestination

NewManager = Callable[..., ModelServerManager]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def new_manager(messenger: MessengerFactory, new_destination: NewDestination, folder: Path) -> Iterator[NewManager]:
    """Makes managers, by default on a free port with one of our servers, and stops them."""
    made: list[ModelServerManager] = []

    def make(destination: Any = None, **options: Any) -> ModelServerManager:
        where = new_destination("port") if destination is None else destination
        manager = ModelServerManager(messenger(), where, **{"folder": folder, **options})
        made.append(manager)
        return manager

    yield make
    for manager in made:
        manager.stop(timeout=1)


def write_csv(path: Path, names: list[str], rows: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


class Data:
    """A data set that comes with scikit-learn, as a CSV and as rows."""

    def __init__(self, path: Path, load: Callable[..., Any], target: str) -> None:
        loaded = load()
        self.target = target
        self.features: list[str] = [str(name) for name in loaded.feature_names]
        self.rows: list[list[float]] = loaded.data.tolist()
        self.answers: list[Any] = loaded.target.tolist()
        self.path = write_csv(
            path, [*self.features, target], [[*row, y] for row, y in zip(self.rows, self.answers, strict=True)]
        )

    def as_dicts(self) -> list[dict[str, Any]]:
        return [
            {**dict(zip(self.features, row, strict=True)), self.target: y}
            for row, y in zip(self.rows, self.answers, strict=True)
        ]


@pytest.fixture(scope="session")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """178 rows, 13 features, 3 classes."""
    return Data(tmp_path_factory.mktemp("data") / "wine.csv", load_wine, "class")


@pytest.fixture(scope="session")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """442 rows, 10 features, a number."""
    return Data(tmp_path_factory.mktemp("data") / "diabetes.csv", load_diabetes, "progression")


def make_linear(folder: Path, name: str = "sum", factor: float = 1.0, width: int = 2) -> Manifest:
    """Puts an ONNX model into a store whose prediction is `factor` times the sum of the row, without a training."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((width, 1), factor, np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "weights"], ["Y"])],
        "sum",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, 1])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    store = Store(folder)
    made = store.make_temporary()
    (made / "model.onnx").write_bytes(model.SerializeToString())
    manifest = store.publish(
        made,
        Manifest(
            name=name,
            version=0,
            method="linear",
            task="regression",
            target="y",
            features=[f"x{number}" for number in range(width)],
            format="onnx",
            bytes=0,
            sha256="",
        ),
    )
    store.activate(name, manifest.version)
    return manifest


def ok(result: Any) -> Answer:
    return Answer(action=ANSWER, result=result, success=True, err="")
