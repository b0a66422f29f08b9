"""A model in memory: rows in, predictions out.

What must never happen here: a row that is predicted with its columns in another order than the model was trained with;
a model that runs code of its file (operators that ONNX itself does not define, data outside of the file).
"""

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

from .errors import CommandFailed, ModelFileInvalid
from .limits import LOADED_MODELS_MAX, ROWS_MAX
from .protocol import is_numeric
from .store import Manifest, Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Domains of the operators that are part of ONNX.
ONNX_DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}
ONNX_INPUTS = ("tensor(float)", "tensor(double)")
# From so many rows on LightGBM may use all processors.
PARALLEL_ROWS_MIN = 50_000


class Model:
    """One version of a model in memory. Thread: any, also several at a time."""

    def __init__(self, manifest: Manifest, data: bytes) -> None:
        import numpy as np

        self.manifest = manifest
        self.width = len(manifest.features)
        self._classes: NDArray[Any] | None = np.array(manifest.classes) if manifest.classes else None
        self._class_list: list[Any] = list(manifest.classes)
        if len({type(value) for value in manifest.classes}) > 1:
            raise ModelFileInvalid(f"the classes of model {manifest.name!r} are of several types")
        load = _load_lightgbm if manifest.format == "lightgbm" else _load_onnx
        self._score, self._dtype = load(manifest, data)

    def predict(self, rows: Any) -> "NDArray[Any]":
        """Return a prediction for each row.

        Args:
            rows: A matrix, a list of lists in the order of the features, or a list of dictionaries by their names.

        Raises:
            CommandFailed: They are no rows for this model; the text says why.
        """
        return self.as_array(self.score(rows))

    def score(self, rows: Any) -> "NDArray[Any]":
        """Return for each row its value, or the number of its class; `rows` and errors as in `predict`."""
        scores: NDArray[Any] = self._score(self.matrix(rows))
        return scores

    def as_array(self, scores: "NDArray[Any]") -> "NDArray[Any]":
        """Return predictions for what `score` has returned."""
        if self._classes is None:
            return scores
        classes: NDArray[Any] = self._classes[scores]
        return classes

    def as_list(self, scores: "NDArray[Any]") -> list[Any]:
        """Return predictions as plain values; for few rows that takes less time than an array."""
        values: list[Any] = scores.tolist()
        classes = self._class_list
        return [classes[value] for value in values] if classes else values

    def matrix(self, rows: Any) -> "NDArray[np.floating[Any]]":
        """Return rows as a matrix of the model's floats, one column for each feature; what is missing is NaN."""
        import numpy as np

        if isinstance(rows, list):
            if not rows:
                raise CommandFailed("there are no rows")
            if isinstance(rows[0], dict):
                rows = self._order(rows)
            try:
                matrix: NDArray[Any] = np.array(rows, self._dtype)
            except (TypeError, ValueError) as error:
                raise CommandFailed(f"the rows are no table of numbers: {error}") from error
        elif isinstance(rows, np.ndarray) and is_numeric(rows):
            matrix = np.asarray(rows, self._dtype)
        else:
            raise CommandFailed("rows must be a list of lists, a list of objects, or a matrix of numbers")
        if matrix.ndim != 2 or matrix.shape[1] != self.width:
            features = ", ".join(self.manifest.features[:20]) + (", …" if self.width > 20 else "")
            raise CommandFailed(
                f"the rows have the shape {matrix.shape}; model {self.manifest.name!r} takes {self.width} columns: "
                f"{features}"
            )
        if not 0 < len(matrix) <= ROWS_MAX:
            raise CommandFailed(f"{len(matrix)} rows; a call takes 1 to {ROWS_MAX}")
        return matrix

    def _order(self, rows: list[Any]) -> list[list[Any]]:
        try:
            return [[row[feature] for feature in self.manifest.features] for row in rows]
        except (KeyError, TypeError) as error:
            raise CommandFailed(f"a row lacks the feature {error}, or is no object as the first one is") from error


def _load_lightgbm(manifest: Manifest, data: bytes) -> tuple[Any, Any]:
    import lightgbm
    import numpy as np

    try:
        booster = lightgbm.Booster(model_str=data.decode())
    except (lightgbm.basic.LightGBMError, UnicodeDecodeError) as error:
        raise ModelFileInvalid(f"model {manifest.name!r} is no LightGBM text model: {error}") from error
    if booster.num_feature() != len(manifest.features):
        raise ModelFileInvalid(f"model {manifest.name!r} has {booster.num_feature()} features, not as its manifest")
    predict, has_classes = booster.predict, bool(manifest.classes)
    class_count = booster.num_model_per_iteration()
    if has_classes and max(2, class_count) != len(manifest.classes):
        raise ModelFileInvalid(f"model {manifest.name!r} has {class_count} classes, not as its manifest")

    def score(matrix: "NDArray[Any]") -> Any:
        scores: Any = predict(matrix, num_threads=1 if len(matrix) < PARALLEL_ROWS_MIN else 0)
        if not has_classes:
            return scores
        return scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0.5).astype(np.intp)

    return score, np.float64


def _load_onnx(manifest: Manifest, data: bytes) -> tuple[Any, Any]:
    import numpy as np
    import onnx
    import onnxruntime

    try:
        parsed = onnx.load_model_from_string(data)
        _refuse_strange_parts(manifest.name, parsed)
        onnx.checker.check_model(parsed)
    except ModelFileInvalid:
        raise
    except Exception as error:
        # protobuf and the checker have exceptions of many kinds, and all mean that this is no model.
        raise ModelFileInvalid(f"model {manifest.name!r} is no ONNX model: {str(error)[:300]}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelFileInvalid(f"model {manifest.name!r} cannot be run: {str(error)[:300]}") from error
    inputs = session.get_inputs()
    given = inputs[0] if inputs else None
    if given is None or len(inputs) > 1 or len(given.shape) != 2 or given.type not in ONNX_INPUTS:
        takes = ", ".join(f"{each.type} {each.shape}" for each in inputs) or "nothing"
        raise ModelFileInvalid(f"model {manifest.name!r} takes {takes}, not one matrix of floats")
    if given.shape[-1] != len(manifest.features):
        raise ModelFileInvalid(f"model {manifest.name!r} takes {given.shape[-1]} features, not as its manifest")
    run, input_name, outputs = session.run, given.name, [session.get_outputs()[0].name]

    def score(matrix: "NDArray[Any]") -> "NDArray[Any]":
        if not np.isfinite(matrix).all():
            raise CommandFailed(
                f"values are missing, or not finite in {matrix.dtype}; model {manifest.name!r}, of the method "
                f"{manifest.method!r}, does not take such rows"
            )
        scores: NDArray[Any] = run(outputs, {input_name: matrix})[0]
        return scores if scores.ndim == 1 else scores.reshape(len(matrix))

    return score, np.float64 if given.type == "tensor(double)" else np.float32


def _refuse_strange_parts(name: str, parsed: Any) -> None:
    """Raise if an ONNX model has an operator that ONNX does not define, or data in another file.

    Such parts may stand anywhere: in the graphs within an `If`, in a constant, in a sparse tensor.
    """
    parts = [parsed]
    while parts:
        part = parts.pop()
        kind = part.DESCRIPTOR.name
        if kind == "FunctionProto" or (kind == "NodeProto" and part.domain not in ONNX_DOMAINS):
            raise ModelFileInvalid(f"model {name!r} uses operators that are not ONNX's own: {part.domain!r}")
        if kind == "TensorProto" and (part.external_data or part.data_location):
            raise ModelFileInvalid(f"model {name!r} keeps data in other files")
        for field, value in part.ListFields():
            if field.message_type is not None:
                parts += [value] if hasattr(value, "DESCRIPTOR") else value


class LoadedModels:
    """The models that a server has in memory; the one that was not used for longest is dropped first. Thread: any."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = Lock()
        self._models: OrderedDict[tuple[str, int], Model] = OrderedDict()

    def find(self, name: str, version: int) -> Model | None:
        """Return a model if it is in memory."""
        with self._lock:
            model = self._models.get((name, version))
            if model is not None:
                self._models.move_to_end((name, version))
            return model

    def load(self, name: str, version: int) -> Model:
        """Return a model, from disk if it is not in memory yet."""
        model = self.find(name, version)
        if model is None:
            model = Model(*self._store.read(name, version))
            with self._lock:
                self._models[name, version] = model
                while len(self._models) > LOADED_MODELS_MAX:
                    self._models.popitem(last=False)
        return model

    def unload(self, name: str, version: int = 0) -> int:
        """Drop a version, or with 0 all, of a model from memory; return how many there were."""
        with self._lock:
            keys = [key for key in self._models if key[0] == name and version in (0, key[1])]
            for key in keys:
                del self._models[key]
        return len(keys)

    def keys(self) -> list[tuple[str, int]]:
        """Return what is in memory, that which was used last at the end."""
        with self._lock:
            return list(self._models)
