"""What a training is asked for, and the data that it is made of: read, checked, ordered, and split.

What must never happen here: a row of the part that is held back among those that a model is trained on; a column that
is taken for another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import TrainingDataInvalid
from .store import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHODS = ("lightgbm", "linear", "random_forest", "gradient_boosting", "neural_network")
# A target of whole numbers is a class up to so many different ones; text and booleans always are.
CLASSES_GUESSED_MAX = 20
CLASSES_MAX = 1_000
ROWS_MIN = 10
# Called with the step, of how many, and the name and value of a metric.
Report = Callable[[int, int, str, float | None], None]


class Request(msgspec.Struct, kw_only=True):
    """What is to be trained; the data of the command `TRAIN`.

    Attributes:
        name: Of the model.
        method: One of `METHODS`.
        data: The path of a CSV or Parquet file, a list of objects, or an object of columns.
        target: The column to predict.
        features: Columns to predict from; by default all others.
        task: What the target is; by default guessed from its values.
        params: Of the method, as its library calls them; `steps` is the number of trees or passes.
        validation: The part of the rows that is held back.
        seed: Of all random numbers.
        activate: Whether the version is served when it is done.
        job: The id of the training.
    """

    name: str
    method: str
    data: str | list[dict[str, Any]] | dict[str, list[Any]]
    target: str
    features: list[str] | None = None
    task: Task | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    validation: float = 0.2
    seed: int = 0
    activate: bool = True
    job: str = ""


class Table(msgspec.Struct):
    """Data to train on, as numbers; classes are numbered as in `classes`."""

    features: list[str]
    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any
    task: Task
    classes: list[str | int | float | bool]

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.train_x) + len(self.test_x)


def read_columns(data: str | list[dict[str, Any]] | dict[str, list[Any]]) -> dict[str, Any]:
    """Return columns by name.

    Raises:
        TrainingDataInvalid: There are none; the text says why.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if isinstance(data, str):
            suffix = Path(data).suffix.lower()
            if suffix not in (".csv", ".parquet"):
                raise TrainingDataInvalid(f"{data!r} ends in neither .csv nor .parquet")
            table = pyarrow.csv.read_csv(data) if suffix == ".csv" else pyarrow.parquet.read_table(data)
        elif isinstance(data, list):
            table = pyarrow.Table.from_pylist(data)
        else:
            table = pyarrow.table(data)
        names = table.column_names
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise TrainingDataInvalid(f"the data cannot be read: {error}") from error
    if len(set(names)) < len(names):
        raise TrainingDataInvalid(f"two columns have one name: {sorted(names)}")
    return {name: table.column(name).to_numpy() for name in names}


def prepare(request: Request) -> Table:
    """Read the data, name and order the features, number the classes, and hold rows back.

    Raises:
        TrainingDataInvalid: It cannot be trained on; the text says why.
    """
    import numpy as np
    from sklearn.model_selection import train_test_split

    columns = read_columns(request.data)
    names = request.features or [name for name in columns if name != request.target]
    if missing := [name for name in [request.target, *names] if name not in columns]:
        raise TrainingDataInvalid(f"there is no column {missing[0]!r}, only {', '.join(columns)}")
    if not names or request.target in names:
        raise TrainingDataInvalid(f"the features are {names}, the target is {request.target!r}: that leaves nothing")
    target = columns[request.target]
    if (count := len(target)) < ROWS_MIN:
        raise TrainingDataInvalid(f"the data have {count} rows, at least {ROWS_MIN} are needed")
    matrix = np.empty((count, len(names)))
    for index, name in enumerate(names):
        try:
            refuse_dates(columns[name])
            matrix[:, index] = columns[name]
        except (TypeError, ValueError) as error:
            raise TrainingDataInvalid(
                f"column {name!r} is not of numbers ({error}); encode it, or leave it out with features=[…]"
            ) from error
    task = request.task or guess_task(target)
    classes, goal = number_classes(target) if task == "classification" else ([], as_numbers(target, request.target))
    if not 0 < request.validation < 1:
        raise TrainingDataInvalid(f"validation is {request.validation}, it must be between 0 and 1")
    is_even = bool(classes) and np.bincount(goal).min() > 1 and min(request.validation, 0.5) * count >= len(classes)
    train_x, test_x, train_y, test_y = train_test_split(
        matrix, goal, test_size=request.validation, random_state=request.seed, stratify=goal if is_even else None
    )
    return Table(names, train_x, train_y, test_x, test_y, task, classes)


def refuse_dates(column: "NDArray[Any]") -> None:
    """Raise if a column is of dates or times: NumPy would count them in a unit that nobody has named.

    Raises:
        ValueError: It is.
    """
    if column.dtype.kind in "mM":
        raise ValueError(f"it is of dates or times, {column.dtype}")


def guess_task(target: "NDArray[Any]") -> Task:
    """Return what a target is: text, booleans and few different whole numbers are classes."""
    import numpy as np

    if target.dtype.kind in "OUb":
        return "classification"
    is_whole = target.dtype.kind in "iu"
    return "classification" if is_whole and len(np.unique(target)) <= CLASSES_GUESSED_MAX else "regression"


def number_classes(target: "NDArray[Any]") -> "tuple[list[str | int | float | bool], NDArray[Any]]":
    """Return the classes in order, and the number of each row's."""
    import numpy as np

    try:
        classes, goal = np.unique(target, return_inverse=True)
    except TypeError as error:
        raise TrainingDataInvalid(f"the target mixes types, or values are missing: {error}") from error
    values = classes.tolist()
    kinds = {type(value) for value in values}
    is_missing = "" in values or any(value != value for value in values)
    if not kinds <= {str, int, float, bool} or len(kinds) > 1 or is_missing:
        raise TrainingDataInvalid("the target mixes types, or values are missing")
    if not 2 <= len(values) <= CLASSES_MAX:
        raise TrainingDataInvalid(f"the target has {len(values)} classes, it must be 2 to {CLASSES_MAX}")
    return values, goal


def as_numbers(target: "NDArray[Any]", name: str) -> "NDArray[np.float64]":
    """Return the target of a regression."""
    import numpy as np

    try:
        refuse_dates(target)
        numbers = target.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TrainingDataInvalid(f"the target {name!r} is not of numbers: {error}") from error
    if not np.isfinite(numbers).all():
        raise TrainingDataInvalid(f"the target {name!r} has values that are missing or not finite")
    return numbers
