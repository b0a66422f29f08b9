"""Inference: a manager with one of our servers, beside LitServe and FastAPI under uvicorn, one worker each.

All serve the same ONNX model by the same function (`messenger.models.scoring.Model`), so what differs is the way there.
Callers are threads of one process: for us they call the manager, for the others each has an HTTP connection of its own
that is kept open, by the standard library, which takes less time than clients with more comfort. 10,000 rows travel in
NumPy's format, single rows as JSON, everywhere.
"""

import http.client
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from messenger import Messenger

from .contender import ANSWER_TIMEOUT_S, Contender, Measured, port_of, serve_nothing, wait_until_open

NAME = "cancer"
ARRAY_ROWS = 10_000
WARM_UP_COUNT = 50
NEEDS = ("lightgbm", "onnxruntime", "pyarrow", "scikit-learn", "skl2onnx")


def make_model(folder: Path) -> Any:
    """Train gradient boosting on a data set that comes with scikit-learn, put it into a store, and load it."""
    from sklearn.datasets import load_breast_cancer

    from messenger.models.scoring import LoadedModels
    from messenger.models.store import Manifest, Store
    from messenger.models.table import Request
    from messenger.models.training import train

    columns = {name: list(values) for name, values in zip(features(), load_breast_cancer().data.T, strict=True)}
    columns["target"] = load_breast_cancer().target.tolist()
    store = Store(folder)
    made = store.make_temporary()
    request = Request(name=NAME, method="gradient_boosting", data=columns, target="target", params={"steps": 50})
    about = train(request, made, lambda *_: None)
    manifest = Manifest(
        name=NAME,
        version=0,
        method=request.method,
        task=about.task,
        target=request.target,
        features=about.features,
        classes=about.classes,
        format=about.format,
        bytes=0,
        sha256="",
    )
    manifest = store.publish(made, manifest)
    store.activate(NAME, manifest.version)
    return LoadedModels(store).load(NAME, manifest.version)


@cache
def features() -> list[str]:
    """Return the names of the columns."""
    from sklearn.datasets import load_breast_cancer

    return [str(name) for name in load_breast_cancer().feature_names]


@cache
def table() -> Any:
    """Return the rows that are asked for, a matrix of 10,000."""
    import numpy as np
    from sklearn.datasets import load_breast_cancer

    return np.ascontiguousarray(np.resize(load_breast_cancer().data, (ARRAY_ROWS, len(features()))))


def expected(model: Any) -> list[Any]:
    """Return what must come back for each row."""
    predictions: list[Any] = model.predict(table()).tolist()
    return predictions


# What is called: `infer(row numbers)` returns predictions for single rows, `infer_all()` for the 10,000.


class Calls:
    """What a contender gives to one of the callers."""

    def __init__(self, one: Callable[[list[float]], list[Any]], many: Callable[[Any], Any]) -> None:
        self.one = one
        self.many = many


def measure_calls(open_calls: Callable[[], Calls], wanted: list[Any], caller_count: int, count: int) -> Measured:
    """Let callers ask for one row at a time, all at once; each answer is compared."""
    rows = table().tolist()
    each_s: list[float] = []
    wrong: list[str] = []
    barrier = threading.Barrier(caller_count + 1)

    def call(caller: int) -> None:
        calls = open_calls()
        for number in range(WARM_UP_COUNT if caller_count == 1 else 2):
            calls.one(rows[number])
        barrier.wait(ANSWER_TIMEOUT_S)
        for number in range(caller, count, caller_count):
            started_at = time.perf_counter()
            answer = calls.one(rows[number % ARRAY_ROWS])
            each_s.append(time.perf_counter() - started_at)
            if answer != [wanted[number % ARRAY_ROWS]]:
                wrong.append(f"row {number}: {answer}")
                break
        barrier.wait(ANSWER_TIMEOUT_S)

    for caller in range(caller_count):
        threading.Thread(target=call, args=(caller,), daemon=True).start()
    barrier.wait(ANSWER_TIMEOUT_S)
    started_at = time.perf_counter()
    barrier.wait(ANSWER_TIMEOUT_S)
    total_s = time.perf_counter() - started_at
    if wrong or len(each_s) != count:
        raise RuntimeError(f"{len(each_s)} of {count} answers came, wrong: {wrong[:3]}")
    return Measured(total_s, each_s if caller_count == 1 else [])


def measure_arrays(calls: Calls, wanted: list[Any], count: int) -> Measured:
    """Ask for 10,000 rows at a time, `count` rows in all."""
    rows = table()
    calls.many(rows)
    started_at = time.perf_counter()
    for _ in range(max(1, count // ARRAY_ROWS)):
        if list(calls.many(rows)) != wanted:
            raise RuntimeError("the predictions are wrong")
    return Measured(time.perf_counter() - started_at, [])


def measure_with(
    open_calls: Callable[[], Calls], wanted: list[Any], size_bytes: int, window: int, count: int
) -> Measured:
    """Measure what the work is: a window of 0 means arrays, else it is the number of callers."""
    if window == 0:
        return measure_arrays(open_calls(), wanted, count)
    return measure_calls(open_calls, wanted, window, count)


# Ours: the server is started by the manager, in the client's process.


def measure_manager(endpoint: str, size_bytes: int, window: int, count: int, above_bare: bool = False) -> Measured:
    """Call a manager; `above_bare` takes away what the bare call takes here, at the median."""
    from messenger.models import ModelServerManager

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        wanted = expected(model)
        bare_s = sorted(measure_with(partial(open_bare, model), wanted, 0, 1, count).each_s)[count // 2]
        with Messenger() as messenger, ModelServerManager(messenger, 0, folder=folder) as manager:
            manager.infer(NAME, table()).result(ANSWER_TIMEOUT_S)

            def infer(rows: Any) -> Any:
                return manager.infer(NAME, rows).result(ANSWER_TIMEOUT_S).predictions

            measured = measure_with(lambda: Calls(lambda row: infer([row]), infer), wanted, size_bytes, window, count)
    if above_bare:
        return Measured(measured.total_s, [each_s - bare_s for each_s in measured.each_s])
    return measured


def measure_callbacks(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Call a manager from callbacks: each answer's callback makes the next call."""
    from messenger.models import ModelServerManager

    rows, ended = table().tolist(), threading.Event()
    wrong: list[str] = []
    started_count = ended_count = 0

    def start() -> None:
        nonlocal started_count
        number = started_count
        started_count += 1
        manager.infer(NAME, [rows[number % ARRAY_ROWS]]).add_done_callback(partial(on_end, number))

    def on_end(number: int, job: Any) -> None:
        nonlocal ended_count
        if job.exception() or job.result().predictions != [wanted[number % ARRAY_ROWS]]:
            wrong.append(f"row {number}: {job}")
        ended_count += 1
        if started_count < count:
            start()
        elif ended_count == count:
            ended.set()

    with tempfile.TemporaryDirectory() as folder:
        wanted = expected(make_model(Path(folder)))
        with Messenger() as messenger, ModelServerManager(messenger, 0, folder=folder) as manager:
            manager.infer(NAME, table()).result(ANSWER_TIMEOUT_S)
            started_at = time.perf_counter()
            for _ in range(window):
                start()
            is_over = ended.wait(ANSWER_TIMEOUT_S)
            total_s = time.perf_counter() - started_at
    if wrong or not is_over:
        raise RuntimeError(f"{ended_count} of {count} answers came, wrong: {wrong[:3]}")
    return Measured(total_s, [])


def open_bare(model: Any) -> Calls:
    """Call the model itself."""
    return Calls(lambda row: model.predict([row]).tolist(), model.predict)


def measure_bare(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Call the model in this process."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
    return measure_with(partial(open_bare, model), expected(model), size_bytes, window, count)


# HTTP.


def read_matrix(body: bytes) -> Any:
    """Return the matrix of a body in NumPy's format."""
    import numpy as np

    return np.load(io.BytesIO(body), allow_pickle=False)


def as_npy(array: Any) -> bytes:
    """Return an array in NumPy's format."""
    import numpy as np

    body = io.BytesIO()
    np.save(body, array, allow_pickle=False)
    return body.getvalue()


def serve_fastapi(endpoint: str) -> None:
    """Serve by FastAPI under uvicorn, one worker; uvloop and httptools if they are there, as uvicorn does by itself."""
    import uvicorn
    from fastapi import FastAPI, Request, Response

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
    app = FastAPI()

    async def predict(request: Request) -> Response:
        rows = json.loads(await request.body())["rows"]
        return Response(json.dumps({"predictions": model.predict(rows).tolist()}), media_type="application/json")

    async def predict_array(request: Request) -> Response:
        predictions = model.predict(read_matrix(await request.body()))
        return Response(as_npy(predictions), media_type="application/octet-stream")

    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/array", predict_array, methods=["POST"])
    uvicorn.run(app, host="127.0.0.1", port=port_of(endpoint), log_level="error", access_log=False)


def serve_litserve(endpoint: str, batch_size: int) -> None:
    """Serve by LitServe, one worker; with a batch size it joins calls. It takes JSON only, so arrays are base64."""
    import litserve

    from .litserve_api import Api

    api = Api(max_batch_size=batch_size, batch_timeout=0.002 if batch_size > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1", port=port_of(endpoint), num_api_servers=1, generate_client_file=False, log_level="error"
    )


def open_http(endpoint: str, is_base64: bool) -> Calls:
    """Open a connection to an HTTP server, kept open."""
    import base64

    connection = http.client.HTTPConnection("127.0.0.1", port_of(endpoint))

    def post(path: str, body: bytes, kind: str) -> bytes:
        connection.request("POST", path, body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {answer[:200]!r}")
        return answer

    def one(row: list[float]) -> list[Any]:
        answer = post("/predict", json.dumps({"rows": [row]}).encode(), "application/json")
        predictions: list[Any] = json.loads(answer)["predictions"]
        return predictions

    def many(rows: Any) -> Any:
        if not is_base64:
            return read_matrix(post("/array", as_npy(rows), "application/octet-stream"))
        body = json.dumps({"npy": base64.b64encode(as_npy(rows)).decode()}).encode()
        return read_matrix(base64.b64decode(json.loads(post("/predict", body, "application/json"))["npy"]))

    return Calls(one, many)


def measure_http(endpoint: str, size_bytes: int, window: int, count: int, is_base64: bool = False) -> Measured:
    """Call a server over HTTP, once it serves."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = expected(make_model(Path(folder)))
    wait_until_open(port_of(endpoint))
    for _ in range(200):
        try:
            open_http(endpoint, is_base64).one(table()[0].tolist())
        except (RuntimeError, OSError):
            time.sleep(0.1)  # LitServe listens before its worker is there.
        else:
            break
    return measure_with(partial(open_http, endpoint, is_base64), wanted, size_bytes, window, count)


LITSERVE = ("litserve", *NEEDS)
CONTENDERS = {
    "messenger models": Contender(serve_nothing, measure_manager, "none", NEEDS),
    "messenger models, callbacks": Contender(serve_nothing, measure_callbacks, "none", NEEDS),
    "messenger models, above the bare call": Contender(
        serve_nothing, partial(measure_manager, above_bare=True), "none", NEEDS
    ),
    "the bare call": Contender(serve_nothing, measure_bare, "none", NEEDS),
    "FastAPI + uvicorn": Contender(serve_fastapi, measure_http, needs=("fastapi", "uvicorn", *NEEDS), share=0.4),
    "LitServe": Contender(
        partial(serve_litserve, batch_size=1), partial(measure_http, is_base64=True), needs=LITSERVE, share=0.2
    ),
    "LitServe, batches of 64": Contender(
        partial(serve_litserve, batch_size=64), partial(measure_http, is_base64=True), needs=LITSERVE, share=0.2
    ),
}
