"""The methods of training: what each library is asked to do, a step at a time, and the file that comes of it."""

import warnings
from typing import TYPE_CHECKING, Any

from .errors import TrainingDataInvalid
from .table import Report, Request, Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS_MAX = 100_000
STEPS_DEFAULT = {"lightgbm": 100, "linear": 1, "random_forest": 100, "gradient_boosting": 100, "neural_network": 50}
# What ONNX computes in single precision may differ so much from what scikit-learn does in double.
AGREEMENT_MIN = 0.99
RELATIVE_ERROR_MAX = 1e-3
PARALLEL_VALUES_MIN = 1_000_000
# Trees of a forest that grow between two reports.
FOREST_STRIDE = 10


def train_lightgbm(request: Request, table: Table, report: Report) -> tuple[bytes, dict[str, float]]:
    """Return LightGBM's text model and its metrics."""
    import lightgbm
    import numpy as np

    params, steps = split_params(request)
    class_count = len(table.classes)
    goal: dict[str, Any] = {"objective": "regression", "metric": "rmse"}
    if class_count == 2:
        goal = {"objective": "binary", "metric": "binary_logloss"}
    elif class_count:
        goal = {"objective": "multiclass", "num_class": class_count, "metric": "multi_logloss"}
    # Small data need small leaves; LightGBM's own default of 20 suits thousands of rows.
    small = {"min_data_in_leaf": max(1, min(20, len(table.train_x) // 20)), "verbosity": -1}
    # Threads that wait for each other cost more than they save on data like these, above all on a busy machine.
    if table.train_x.size < PARALLEL_VALUES_MIN:
        small["num_threads"] = 1
    params = small | goal | {"seed": request.seed, "deterministic": True, "force_row_wise": True} | params

    def on_iteration(env: Any) -> None:
        value = float(env.evaluation_result_list[0][2]) if env.evaluation_result_list else None
        report(env.iteration + 1, steps, goal["metric"], value)

    try:
        train = lightgbm.Dataset(table.train_x, table.train_y)
        test = lightgbm.Dataset(table.test_x, table.test_y, reference=train)
        booster = lightgbm.train(params, train, steps, valid_sets=[test], callbacks=[on_iteration])
    except lightgbm.basic.LightGBMError as error:
        raise TrainingDataInvalid(f"LightGBM: {error}") from error
    text = booster.model_to_string()
    scores = np.asarray(booster.predict(table.test_x, num_threads=1))
    kept = np.asarray(lightgbm.Booster(model_str=text).predict(table.test_x, num_threads=1))
    if not np.array_equal(scores, kept):
        raise TrainingDataInvalid("LightGBM's text model does not predict what the trained model does")
    if class_count == 2:
        scores = np.column_stack([1 - scores, scores])
    return text.encode(), measure(table, scores)


def train_sklearn(request: Request, table: Table, report: Report) -> tuple[bytes, dict[str, float]]:
    """Return an ONNX model of what scikit-learn has trained, and its metrics."""
    import numpy as np
    from skl2onnx import to_onnx

    if not np.isfinite(table.train_x).all() or not np.isfinite(table.test_x).all():
        raise TrainingDataInvalid("values are missing or not finite; of the methods only lightgbm takes such data")
    params, steps = split_params(request)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of convergence: the metrics tell.
            model = fit(request, table, params, steps, report)
            options = {"zipmap": False} if table.classes else None
            data = to_onnx(model, table.train_x[:1].astype(np.float32), options=options).SerializeToString()
    except TypeError as error:
        raise TrainingDataInvalid(f"{request.method} does not take these params: {error}") from error
    scores = model.predict(table.test_x)
    if table.classes:
        # A class of few rows may be among those held back alone. Then the model does not know it.
        scores = np.zeros((len(table.test_x), len(table.classes)))
        scores[:, model.classes_] = model.predict_proba(table.test_x)
    check_same(data, table, model.predict(table.test_x))
    report(steps, steps, "", None)
    return data, measure(table, scores)


def split_params(request: Request) -> tuple[dict[str, Any], int]:
    """Return the params of the library, and the number of steps."""
    params = dict(request.params)
    steps = params.pop("steps", STEPS_DEFAULT[request.method])
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= STEPS_MAX:
        raise TrainingDataInvalid(f"steps is {steps!r}, it must be a whole number of 1 to {STEPS_MAX}")
    return params, steps


def fit(request: Request, table: Table, params: dict[str, Any], steps: int, report: Report) -> Any:
    """Return a fitted estimator, and report each step on the way."""
    from sklearn import ensemble, linear_model
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_class, seed = bool(table.classes), request.seed
    x, y = table.train_x, table.train_y
    if request.method == "linear":
        kind = linear_model.LogisticRegression if is_class else linear_model.Ridge
        return make_pipeline(StandardScaler(), kind(**{"max_iter": 1_000, **params})).fit(x, y)
    if request.method == "random_forest":
        kind = ensemble.RandomForestClassifier if is_class else ensemble.RandomForestRegressor
        forest = kind(n_estimators=0, warm_start=True, random_state=seed, **params)
        for grown in [*range(FOREST_STRIDE, steps, FOREST_STRIDE), steps]:
            forest.set_params(n_estimators=grown).fit(x, y)
            report(grown, steps, *progress_metric(forest, table))
        return forest
    if request.method == "gradient_boosting":
        kind = ensemble.GradientBoostingClassifier if is_class else ensemble.GradientBoostingRegressor

        def monitor(step: int, model: Any, _: object) -> bool:
            report(step + 1, steps, "train_loss", float(model.train_score_[step]))
            return False

        return kind(n_estimators=steps, random_state=seed, **params).fit(x, y, monitor=monitor)
    scaler = StandardScaler().fit(x)
    return make_pipeline(scaler, fit_network(request, table, params, steps, report, scaler.transform(x)))


def fit_network(
    request: Request, table: Table, params: dict[str, Any], steps: int, report: Report, scaled: "NDArray[Any]"
) -> Any:
    """Return a network that was trained on scaled features, a step for each pass over them."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    y = table.train_y
    mean, spread = 0.0, 1.0
    if table.classes:
        network = MLPClassifier(random_state=request.seed, **params)
    else:
        network = MLPRegressor(random_state=request.seed, **params)
        # A network learns slowly to give large numbers, so it learns the target scaled; its last layer undoes that.
        mean, spread = float(y.mean()), float(y.std()) or 1.0
        y = (y - mean) / spread
    for step in range(1, steps + 1):
        if table.classes:
            network.partial_fit(scaled, y, classes=range(len(table.classes)))
        else:
            network.partial_fit(scaled, y)
        report(step, steps, "train_loss", float(network.loss_))
    if not table.classes:
        network.coefs_[-1] *= spread
        network.intercepts_[-1] = network.intercepts_[-1] * spread + mean
    return network


def progress_metric(model: Any, table: Table) -> tuple[str, float]:
    """Return the name and value of scikit-learn's own score on the rows held back."""
    return ("accuracy" if table.classes else "r2"), float(model.score(table.test_x, table.test_y))


def check_same(data: bytes, table: Table, predicted: "NDArray[Any]") -> None:
    """Raise if the ONNX model predicts something else than the model that it was made of."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    served = np.asarray(session.run(None, {given: table.test_x.astype(np.float32)})[0]).reshape(len(predicted))
    if table.classes:
        agreement = float((served == predicted).mean())
    else:
        spread = float(np.abs(predicted).max()) or 1.0
        agreement = float((np.abs(served - predicted) <= RELATIVE_ERROR_MAX * spread).mean())
    if agreement < AGREEMENT_MIN:
        raise TrainingDataInvalid(
            f"in single precision, which ONNX models use, only {agreement:.1%} of the predictions are those of the "
            "trained model; scale the features"
        )


def measure(table: Table, scores: "NDArray[Any]") -> dict[str, float]:
    """Return metrics on the rows that were held back, without those that are no number, as r2 of a single row.

    Args:
        table: What they were held back from.
        scores: For each such row a probability of each class, or the value.
    """
    import numpy as np
    from sklearn import metrics

    if table.classes:
        labels = range(len(table.classes))
        predicted = scores.argmax(axis=1)
        found = {
            "accuracy": metrics.accuracy_score(table.test_y, predicted),
            "f1_macro": metrics.f1_score(table.test_y, predicted, average="macro", zero_division=0.0),
            "log_loss": metrics.log_loss(table.test_y, scores, labels=labels),
        }
    else:
        found = {
            "rmse": np.sqrt(metrics.mean_squared_error(table.test_y, scores)),
            "mae": metrics.mean_absolute_error(table.test_y, scores),
        }
        if len(table.test_y) > 1:
            found["r2"] = metrics.r2_score(table.test_y, scores)
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}
