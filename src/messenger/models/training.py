"""Trains one model, in a process of its own: `python -m messenger.models.training`, a JSON object on standard input.

Standard output gets a JSON object a line: reports of progress, then what came of it. The model's file is written into
the folder that the server named, and the server makes a version of it; so a training can be killed at any time.

What must never happen here: a score that was measured on rows which the model has seen; a file whose predictions are
not those of the model that was trained.
"""

import os
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from .errors import TrainingDataInvalid
from .limits import PROGRESS_S
from .methods import train_lightgbm, train_sklearn
from .protocol import show_error
from .store import FILE_NAMES, Format, Task
from .table import METHODS, Report, Request, prepare


class Made(msgspec.Struct, kw_only=True):
    """What a training came to; the rest of the manifest is the server's to fill in."""

    task: Task
    format: Format
    features: list[str]
    classes: list[str | int | float | bool]
    metrics: dict[str, float]
    rows: int
    versions: dict[str, str]


class Line(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of standard output: progress, the result, or an error, of the data unless `is_local`, as a full disk."""

    step: int = 0
    of: int = 0
    metric: str = ""
    value: float | None = None
    made: Made | None = None
    error: str = ""
    is_local: bool = False


def train(request: Request, path: Path, report: Report) -> Made:
    """Train, check and write one model into a folder.

    Raises:
        TrainingDataInvalid: No model can be trained of this.
    """
    import lightgbm
    import onnxruntime
    import sklearn

    if request.method not in METHODS:
        raise TrainingDataInvalid(f"the method is {request.method!r}, it must be one of {', '.join(METHODS)}")
    table = prepare(request)
    fit = train_lightgbm if request.method == "lightgbm" else train_sklearn
    file_format: Format = "lightgbm" if request.method == "lightgbm" else "onnx"
    data, metrics = fit(request, table, report)
    (path / FILE_NAMES[file_format]).write_bytes(data)
    return Made(
        task=table.task,
        format=file_format,
        features=table.features,
        classes=table.classes,
        metrics=metrics,
        rows=table.rows,
        versions={
            "python": sys.version.split()[0],
            "scikit-learn": sklearn.__version__,
            "lightgbm": lightgbm.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    )


def main() -> Literal[0, 1]:
    """Train what standard input says; the exit status is 1 if that could not be done."""
    # What libraries print must not get between the lines, so they print where errors go.
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    reported_at = -PROGRESS_S

    def report(step: int, of: int, metric: str, value: float | None) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if now - reported_at >= PROGRESS_S or step == of:
            reported_at = now
            say(Line(step=step, of=of, metric=metric, value=value))

    def say(line: Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")

    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        say(Line(made=train(request, Path(sys.argv[1]), report)))
    except Exception as error:
        # Whatever a library raises on some data, the caller is told.
        say(Line(error=show_error(error), is_local=isinstance(error, OSError | MemoryError)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
