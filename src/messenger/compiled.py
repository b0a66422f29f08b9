"""What is said to mypyc, which may compile the core (hatch_build.py), and means nothing to the interpreter."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from mypy_extensions import i64 as i64
    from mypy_extensions import mypyc_attr as mypyc_attr
else:
    i64 = int

    def mypyc_attr(**_: bool) -> Callable[[T], T]:
        """Say something about a class. The real one is in a package that only compiling needs."""
        return lambda described: described
