"""Models on disk: what is refused before it is parsed, and what a process leaves behind that dies on the way."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from messenger.models.errors import ModelFileInvalid
from messenger.models.scoring import LoadedModels, Model
from messenger.models.store import Listed, Store, default_folder
from tests.models.conftest import make_linear

EXPLODED = "exploded"


class Bomb:
    """Makes a file where it stands when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def rewrite(folder: Path, **fields: Any) -> None:
    """Changes fields of the manifest of `sum`, version 1."""
    path = folder / "sum/1/manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | fields))


def put_file(folder: Path, data: bytes, name: str = "model.onnx", **fields: Any) -> None:
    """Puts a file in place of the model's, and makes the manifest fit it, as an attacker would."""
    import hashlib

    (folder / "sum/1" / name).write_bytes(data)
    rewrite(folder, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **fields)


def load(folder: Path) -> Model:
    return LoadedModels(Store(folder)).load("sum", 1)


def test_a_model_is_loaded_as_it_was_made(folder: Path) -> None:
    make_linear(folder)
    assert load(folder).predict([[1.0, 2.0], [3.0, 4.0]]).tolist() == [3.0, 7.0]
    assert (folder / "sum/1").stat().st_mode & 0o777 == 0o700


def test_versions_rise_and_one_is_served(folder: Path) -> None:
    for _ in range(3):
        make_linear(folder)
    store = Store(folder)
    assert store.list_all() == [Listed(name="sum", version=3, versions=[1, 2, 3])]
    store.activate("sum", 1)
    assert store.current("sum") == 1
    with pytest.raises(ModelFileInvalid, match="no version 9"):
        store.activate("sum", 9)


def test_a_changed_byte_is_refused(folder: Path) -> None:
    make_linear(folder)
    path = folder / "sum/1/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileInvalid, match="SHA-256"):
        load(folder)


def test_a_cut_file_is_refused(folder: Path) -> None:
    make_linear(folder)
    path = folder / "sum/1/model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileInvalid, match="its manifest says"):
        load(folder)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("name", "file_format"), [("model.onnx", "onnx"), ("model.txt", "lightgbm")])
def test_a_renamed_pickle_is_refused_and_not_run(folder: Path, protocol: int, name: str, file_format: str) -> None:
    make_linear(folder)
    fired = folder / EXPLODED
    put_file(folder, pickle.dumps(Bomb(fired), protocol), name, format=file_format)
    with pytest.raises(ModelFileInvalid):
        load(folder)
    assert not fired.exists()


@pytest.mark.parametrize("name", ["..", "../sum", "/etc", "a/b", ".hidden", "", "a" * 65, "a\0", "sum\n", 5, None])
def test_a_name_cannot_leave_the_folder(folder: Path, name: Any) -> None:
    store = Store(folder)
    for call in (store.versions, store.current, lambda given: store.read(given, 1)):
        with pytest.raises(ModelFileInvalid, match="is no name of a model"):
            call(name)


@pytest.mark.parametrize("linked", ["sum", "sum/1", "sum/1/model.onnx", "sum/1/manifest.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, linked: str) -> None:
    make_linear(folder)
    outside = folder.parent / "outside"
    (folder / linked).rename(outside)
    (folder / linked).symlink_to(outside)
    with pytest.raises(ModelFileInvalid):
        load(folder)


def test_a_device_is_not_read(folder: Path) -> None:
    make_linear(folder)
    path = folder / "sum/1/model.onnx"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelFileInvalid, match="is no file"):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "other"},
        {"version": 2},
        {"format": "pickle"},
        {"format": "../../model"},
        {"features": []},
        {"features": ["x0"]},
        {"classes": [1, 2]},
        {"task": "classification"},
        {"task": "classification", "classes": ["a", 1]},
        {"bytes": "5"},
        {"sha256": None},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    make_linear(folder)
    rewrite(folder, **fields)
    with pytest.raises(ModelFileInvalid):
        load(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"[" * 100_000], ids=lambda text: str(text[:4]))
def test_garbage_for_a_manifest_is_refused(folder: Path, text: bytes) -> None:
    make_linear(folder)
    (folder / "sum/1/manifest.json").write_bytes(text)
    with pytest.raises(ModelFileInvalid, match="is no manifest"):
        load(folder)


def test_garbage_for_the_current_version_is_refused(folder: Path) -> None:
    make_linear(folder)
    (folder / "sum/current").write_text("../../1")
    with pytest.raises(ModelFileInvalid, match="names no version"):
        Store(folder).current("sum")


def test_a_switch_that_fails_leaves_nothing(folder: Path) -> None:
    make_linear(folder)
    spoil_with_a_folder(folder / "sum")
    before = sorted(folder.rglob("*"))
    with pytest.raises(IsADirectoryError):
        Store(folder).activate("sum", 1)
    assert sorted(folder.rglob("*")) == before


def spoil_with_garbage(model: Path) -> None:
    (model / "current").write_text("garbage")


def spoil_with_a_folder(model: Path) -> None:
    (model / "current").unlink()
    (model / "current").mkdir()


def spoil_with_a_link(model: Path) -> None:
    (model / "current").unlink()
    (model / "current").symlink_to("1")


@pytest.mark.parametrize("spoil", [spoil_with_garbage, spoil_with_a_folder, spoil_with_a_link])
def test_a_bad_model_hides_no_other(folder: Path, spoil: Callable[[Path], None]) -> None:
    make_linear(folder, "bad")
    make_linear(folder)
    spoil(folder / "bad")
    descriptors = len(os.listdir("/proc/self/fd"))
    assert Store(folder).list_all() == [
        Listed(name="bad", version=0, versions=[1]),
        Listed(name="sum", version=1, versions=[1]),
    ]
    with pytest.raises(ModelFileInvalid):
        Store(folder).current("bad")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_beside_the_models_is_none(folder: Path) -> None:
    make_linear(folder)
    (folder / "wine.csv").write_text("x,y\n1,2\n")
    assert [listed.name for listed in Store(folder).list_all()] == ["sum"]


@pytest.mark.parametrize("data", [b"", b"garbage", b"tree\n", b"tree\nversion=v4\nnum_class=1\n" + b"x" * 1000])
@pytest.mark.parametrize(("name", "file_format"), [("model.onnx", "onnx"), ("model.txt", "lightgbm")])
def test_garbage_that_fits_its_manifest_is_refused(folder: Path, data: bytes, name: str, file_format: str) -> None:
    make_linear(folder)
    put_file(folder, data, name, format=file_format)
    with pytest.raises(ModelFileInvalid):
        load(folder)


def strange_onnx(domain: str = "", external: str = "") -> bytes:
    from onnx import TensorProto, helper

    weights = helper.make_tensor("weights", TensorProto.FLOAT, [2, 1], [1.0, 1.0])
    if external:
        weights.ClearField("float_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=external)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "weights"], ["Y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, 1])],
        [weights],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


def nested_onnx(node: Any = None, initializer: Any = None) -> bytes:
    """Returns a model with something in the graph of a branch, which runs always."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    ones = numpy_helper.from_array(np.ones((2, 1), np.float32), "ones")
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 1])
    identity = helper.make_node("Identity", ["ones"], ["out"])
    branch = helper.make_graph([node or identity], "then", [], [out], [initializer or ones])
    other = helper.make_graph([identity], "else", [], [out], [ones])
    graph = helper.make_graph(
        [
            helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=other),
            helper.make_node("MatMul", ["X", "w"], ["Y"]),
        ],
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


def elsewhere(name: str, *dims: int) -> Any:
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def nested_cases() -> dict[str, bytes]:
    import numpy as np
    from onnx import SparseTensorProto, helper, numpy_helper

    indices = numpy_helper.from_array(np.array([0, 1]), "indices")
    sparse = SparseTensorProto(values=elsewhere("values", 2), indices=indices, dims=[2, 1])
    return {
        "data of a branch": nested_onnx(initializer=elsewhere("ones", 2, 1)),
        "a constant": nested_onnx(node=helper.make_node("Constant", [], ["out"], value=elsewhere("w", 2, 1))),
        "a sparse constant": nested_onnx(node=helper.make_node("Constant", [], ["out"], sparse_value=sparse)),
        "an operator": nested_onnx(node=helper.make_node("Gelu", ["ones"], ["out"], domain="com.microsoft")),
    }


NESTED = nested_cases()


@pytest.mark.parametrize(
    "data",
    [strange_onnx(domain="com.evil"), strange_onnx(external="../../../../etc/passwd"), *NESTED.values()],
    ids=["domain", "external", *NESTED],
)
def test_an_onnx_model_stays_within_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """In the graphs of branches, and in constants, files beside the process were read as a model's weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(8))
    make_linear(folder)
    put_file(folder, data)
    with pytest.raises(ModelFileInvalid, match=r"not ONNX's own|other files"):
        load(folder)


def test_a_model_with_a_branch_is_loaded(folder: Path) -> None:
    make_linear(folder)
    put_file(folder, nested_onnx())
    assert load(folder).predict([[1.0, 2.0]]).tolist() == [3.0]


@pytest.mark.parametrize("shapes", [[], [[None, 2], [None, 2]], [[]], [[2]]], ids=str)
def test_an_onnx_model_that_takes_no_matrix_is_refused(folder: Path, shapes: list[list[int | None]]) -> None:
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info(f"X{n}", TensorProto.FLOAT, shape) for n, shape in enumerate(shapes)]
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["one"], ["Y"])],
        "g",
        inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1])],
        [one],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    make_linear(folder)
    put_file(folder, model.SerializeToString())
    with pytest.raises(ModelFileInvalid, match="not one matrix of floats"):
        load(folder)


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_makes_is_not(folder: Path) -> None:
    store = Store(folder)
    mine = store.make_temporary()
    script = "import sys; from messenger.models.store import Store; print(Store(sys.argv[1]).make_temporary())"
    made = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    theirs = Path(made.stdout.strip())
    assert theirs.is_dir()
    store.remove_stale()
    assert not theirs.exists()
    assert mine.is_dir()
    assert store.list_all() == []


def test_two_servers_never_get_one_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is taken between the look and the rename."""
    make_linear(folder)
    monkeypatch.setattr(Store, "versions", lambda self, name: [])
    store = Store(folder)
    made = store.make_temporary()
    (made / "model.onnx").write_bytes((folder / "sum/1/model.onnx").read_bytes())
    manifest = msgspec.json.decode((folder / "sum/1/manifest.json").read_bytes())
    from messenger.models.store import Manifest

    assert store.publish(made, msgspec.convert(manifest, Manifest)).version == 2


def test_the_models_not_used_for_longest_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messenger.models.scoring.LOADED_MODELS_MAX", 2)
    for name in ("a", "b", "c"):
        make_linear(folder, name)
    loaded = LoadedModels(Store(folder))
    for name in ("a", "b", "a", "c"):
        loaded.load(name, 1)
    assert loaded.keys() == [("a", 1), ("c", 1)]
    assert loaded.unload("a") == 1
    assert loaded.unload("a") == 0
    assert loaded.find("a", 1) is None


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "messenger/models"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local/share/messenger/models"
