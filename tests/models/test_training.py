"""Trainings, without a server: data, methods, metrics, files; and a process of its own at the end."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from messenger.models.errors import CommandFailed, TrainingDataInvalid
from messenger.models.scoring import Model
from messenger.models.store import FILE_NAMES, Manifest
from messenger.models.table import METHODS, Request, Table, prepare, read_columns
from messenger.models.training import Line, Made, train
from tests.models.conftest import Data, write_csv

Reports = list[tuple[int, int, str, float | None]]


def run(folder: Path, **fields: Any) -> tuple[Made, Model, Reports]:
    reports: Reports = []
    request = Request(name="m", **fields)
    made = train(request, folder, lambda *report: reports.append(report))
    manifest = Manifest(
        name="m",
        version=1,
        method=request.method,
        task=made.task,
        target=request.target,
        features=made.features,
        classes=made.classes,
        format=made.format,
        bytes=0,
        sha256="",
    )
    return made, Model(manifest, (folder / FILE_NAMES[made.format]).read_bytes()), reports


@pytest.mark.parametrize("method", METHODS)
def test_classification_learns(method: str, tmp_path: Path, wine: Data) -> None:
    made, model, reports = run(tmp_path, method=method, data=str(wine.path), target="class")
    assert made.task == "classification"
    assert made.metrics["accuracy"] > 0.9
    assert made.metrics["log_loss"] < 0.6
    predictions = model.predict(wine.rows)
    assert (predictions == np.array(wine.answers)).mean() > 0.9
    step, of, _, _ = reports[-1]
    assert step == of > 0
    assert [report[0] for report in reports] == sorted(report[0] for report in reports)


@pytest.mark.parametrize("method", METHODS)
def test_regression_learns(method: str, tmp_path: Path, diabetes: Data) -> None:
    params = {"steps": 30} if method in ("lightgbm", "gradient_boosting") else {}
    made, model, _ = run(
        tmp_path, method=method, data=str(diabetes.path), target="progression", task="regression", params=params
    )
    assert made.metrics["r2"] > 0.15  # The mean of the target would give 0.
    assert made.metrics["rmse"] < 80
    assert np.corrcoef(model.predict(diabetes.rows), diabetes.answers)[0, 1] > 0.5


@pytest.mark.parametrize("method", ["lightgbm", "linear"])
def test_two_classes_of_text(method: str, tmp_path: Path, wine: Data) -> None:
    rows = [{**row, "class": "ja" if row["class"] else "nein"} for row in wine.as_dicts()]
    made, model, _ = run(tmp_path, method=method, data=rows, target="class")
    assert made.classes == ["ja", "nein"]
    wanted = [row["class"] for row in rows]
    assert np.mean([one == other for one, other in zip(model.predict(wine.rows), wanted, strict=True)]) > 0.9


def test_columns_are_named_and_ordered(tmp_path: Path, wine: Data) -> None:
    features = [wine.features[3], wine.features[0], wine.features[6]]
    made, model, _ = run(tmp_path, method="lightgbm", data=str(wine.path), target="class", features=features)
    assert made.features == features
    rows = wine.as_dicts()
    in_order = [[row[feature] for feature in features] for row in rows]
    np.testing.assert_array_equal(model.predict(rows), model.predict(in_order))


def test_csv_parquet_rows_and_columns_give_the_same(tmp_path: Path, wine: Data) -> None:
    table = pyarrow.csv.read_csv(wine.path)
    pyarrow.parquet.write_table(table, tmp_path / "wine.parquet")
    sources = [str(wine.path), str(tmp_path / "wine.parquet"), wine.as_dicts(), table.to_pydict()]
    tables = [prepare(Request(name="m", method="linear", data=data, target="class")) for data in sources]
    for each in tables:
        np.testing.assert_array_equal(each.train_x, tables[0].train_x)
        np.testing.assert_array_equal(each.test_y, tables[0].test_y)
    assert (len(tables[0].train_x), len(tables[0].test_x)) == (142, 36)


def test_the_rows_held_back_are_not_trained_on() -> None:
    data = {"x": list(range(100)), "y": list(range(100))}
    table = prepare(Request(name="m", method="linear", data=data, target="y", validation=0.3))
    assert sorted([*table.train_x[:, 0], *table.test_x[:, 0]]) == list(range(100))
    assert len(table.test_x) == 30


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ([0, 1] * 10, "classification"),
        (list(range(20)), "classification"),
        (list(range(21)), "regression"),
        ([0.5, 1.5] * 10, "regression"),
        (["a", "b"] * 10, "classification"),
        ([True, False] * 10, "classification"),
    ],
)
def test_the_task_is_guessed(values: list[Any], task: str) -> None:
    data = {"x": [float(number) for number in range(len(values))], "y": values}
    assert prepare(Request(name="m", method="linear", data=data, target="y")).task == task


def test_missing_values_are_lightgbms(tmp_path: Path, wine: Data) -> None:
    rows = wine.as_dicts()
    for row in rows[::7]:
        row[wine.features[0]] = None
    _, model, _ = run(tmp_path, method="lightgbm", data=rows, target="class")
    assert model.predict([[None, *wine.rows[0][1:]]]).tolist() == [0]
    with pytest.raises(TrainingDataInvalid, match="only lightgbm"):
        run(tmp_path, method="linear", data=rows, target="class")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lightgbm"])
def test_rows_with_missing_values_are_refused_where_they_mean_nothing(
    method: str, tmp_path: Path, diabetes: Data
) -> None:
    """ONNX computes with NaN, and some class came of it."""
    params = {} if method == "linear" else {"steps": 2}
    _, model, _ = run(tmp_path, method=method, data=str(diabetes.path), target=diabetes.target, params=params)
    for value in (None, float("inf")):
        with pytest.raises(CommandFailed, match="missing, or not finite in float32"):
            model.predict([[value, *diabetes.rows[0][1:]]])


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_only_the_rows_held_back_have(method: str, tmp_path: Path) -> None:
    """The metrics took the second class that the model knew for the second of all, or failed."""
    answers = ["a", *["b", "c"] * 29, "b"]
    data = {"x": [0.0 if answer == "c" else 1.0 for answer in answers], "y": answers}
    params = {} if method in ("linear", "neural_network") else {"steps": 10}
    held_back = [seed for seed in range(20) if 0 not in prepare_seed(data, seed).train_y]
    made, model, _ = run(tmp_path, method=method, data=data, target="y", seed=held_back[0], params=params)
    assert made.classes == ["a", "b", "c"]
    assert made.metrics["accuracy"] == 11 / 12
    assert model.predict([[0.0], [1.0]]).tolist() == ["c", "b"]


def prepare_seed(data: dict[str, Any], seed: int) -> Table:
    return prepare(Request(name="m", method="linear", data=data, target="y", seed=seed))


@pytest.mark.parametrize("method", ["lightgbm", "linear"])
def test_a_metric_that_is_no_number_is_left_out(method: str, tmp_path: Path) -> None:
    """There is no r2 of one row; as NaN it was null on its way to the server, which then lost the training."""
    data = {"x": [float(number) for number in range(10)], "y": [number + 0.5 for number in range(10)]}
    made, _, _ = run(tmp_path, method=method, data=data, target="y", validation=0.1)
    assert set(made.metrics) == {"rmse", "mae"}
    assert msgspec.json.decode(msgspec.json.encode(made), type=Made) == made


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x,y\n2020-01-01,1\n2020-01-02,0\n", "column 'x' is not of numbers .*dates"),
        ("x,y\n2020-01-01 10:00:00,1\n2020-01-02 10:00:00,0\n", "column 'x' is not of numbers .*dates"),
        ("x,y\n1,2020-01-01\n2,2020-01-02\n", "target 'y' is not of numbers: .*dates"),
        ("é,y\n1,0\n2,1\n", "cannot be read: 'utf-8'"),
    ],
)
def test_files_that_mean_something_else_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    header, first, second, _ = text.split("\n")
    path = tmp_path / "d.csv"
    path.write_text("\n".join([header, *[first, second] * 10, ""]), encoding="latin-1")
    with pytest.raises(TrainingDataInvalid, match=reason):
        run(tmp_path, method="lightgbm", data=str(path), target="y")


COLUMNS: dict[str, list[Any]] = {"x": [float(number) for number in range(20)], "y": [0, 1] * 10}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"method": "quantum"}, "must be one of lightgbm"),
        ({"target": "z"}, "no column 'z'"),
        ({"features": ["x", "w"]}, "no column 'w'"),
        ({"features": ["y"]}, "leaves nothing"),
        ({"data": {"y": [0, 1] * 10}}, "leaves nothing"),
        ({"data": {"x": [1.0], "y": [0]}}, "at least 10"),
        ({"data": {**COLUMNS, "t": ["a"] * 20}}, "column 't' is not of numbers"),
        ({"data": {**COLUMNS, "y": ["a"] * 20}}, "1 classes"),
        ({"data": {**COLUMNS, "y": ["a", None] * 10}}, "missing"),
        ({"data": {**COLUMNS, "y": [0.5, None] * 10}}, "missing"),
        ({"data": {**COLUMNS, "y": ["a", "b", "", "a"] * 5}}, "missing"),
        ({"data": {**COLUMNS, "y": ["a", "b"] * 10}, "task": "regression"}, "not of numbers"),
        ({"data": {"x": [1.0], "y": [1, 2]}}, "cannot be read"),
        ({"data": "nowhere.csv"}, "cannot be read"),
        ({"data": "/etc/passwd"}, "neither .csv nor .parquet"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"params": {"steps": 0}}, "steps is 0"),
        ({"params": {"steps": True}}, "steps is True"),
        ({"params": {"colour": 1}}, "does not take these params"),
        ({"method": "lightgbm", "params": {"objective": "nonsense"}}, "LightGBM"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_say_why(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    request = {"method": "linear", "data": COLUMNS, "target": "y", **fields}
    with pytest.raises(TrainingDataInvalid, match=reason):
        run(tmp_path, **request)
    assert not list(tmp_path.iterdir())


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", ["x", "x", "y"], [[1, 2, 0], [3, 4, 1]] * 10)
    with pytest.raises(TrainingDataInvalid, match="two columns have one name"):
        read_columns(str(path))


def run_process(request: bytes, folder: Path) -> tuple[int, list[Line]]:
    command = [sys.executable, "-m", "messenger.models.training", str(folder)]
    finished = subprocess.run(command, input=request, capture_output=True, timeout=50, check=False)
    return finished.returncode, [msgspec.json.decode(line, type=Line) for line in finished.stdout.splitlines()]


def test_a_process_reports_and_ends(tmp_path: Path, wine: Data) -> None:
    request = Request(name="m", method="lightgbm", data=str(wine.path), target="class", params={"verbosity": 2})
    status, lines = run_process(msgspec.json.encode(request), tmp_path)
    assert status == 0
    *progress, last = lines
    assert progress[-1].step == progress[-1].of == 100
    assert progress[-1].metric == "multi_logloss"
    assert last.made is not None
    assert last.made.rows == 178


def test_a_model_that_cannot_be_written_is_no_fault_of_the_data(tmp_path: Path) -> None:
    request = Request(name="m", method="lightgbm", data=COLUMNS, target="y", params={"steps": 1})
    status, lines = run_process(msgspec.json.encode(request), tmp_path / "vanished")
    assert status == 1
    assert lines[-1].is_local
    assert "No such file" in lines[-1].error


@pytest.mark.parametrize("request_bytes", [b"", b"{}", b"[", b'{"name": 1}'])
def test_a_process_that_is_told_nonsense_says_so(tmp_path: Path, request_bytes: bytes) -> None:
    status, lines = run_process(request_bytes, tmp_path)
    assert status == 1
    assert lines[-1].error
