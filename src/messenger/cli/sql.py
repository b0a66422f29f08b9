"""SQL as text: statements out of lines, and rows as lines.

What must never happen here: a statement that is cut inside a string or a trigger; a row that commands the terminal.

SQLite itself says where a statement ends (`sqlite3_complete`); everything up to there is one call of `execute`.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import apsw

from .terminal import printable

STATEMENT_CHARS_MAX = 64 * 1024 * 1024  # More than any message may hold; a quote that is never closed ends here.

_EMPTY = re.compile(r"(\s|;|--[^\n]*(\n|\Z)|/\*.*?(\*/|\Z))*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")

Kind = Literal["begin", "commit", "rollback", ""]
_KINDS: dict[str, Kind] = {"BEGIN": "begin", "COMMIT": "commit", "END": "commit", "ROLLBACK": "rollback"}


class Statement(NamedTuple):
    """One statement.

    Attributes:
        text: With all that stood in front of it.
        line: The number of its last line, from 1.
    """

    text: str
    line: int

    @property
    def kind(self) -> Kind:
        """What it does to the transaction; a ROLLBACK TO a savepoint does nothing to it."""
        start = _EMPTY.match(self.text)
        word = _WORD.match(self.text, start.end() if start else 0)
        kind = _KINDS.get(word[0].upper(), "") if word else ""
        return "" if kind == "rollback" and re.search(r"\bTO\b", self.text, re.IGNORECASE) else kind


def split_statements(lines: Iterable[str]) -> Iterator[Statement]:
    """Yield each statement as soon as the line that ends it has come; at the end also one without its semicolon.

    Raises:
        ValueError: A statement does not end within `STATEMENT_CHARS_MAX` characters.
    """
    text = ""
    number = 0
    for number, line in enumerate(lines, start=1):
        seen = len(text)
        text += line
        while (end := text.find(";", seen) + 1) > 0:
            seen = end
            if apsw.complete(text[:end]):
                if not is_empty(text[:end]):
                    yield Statement(text[:end], number)
                text, seen = text[end:], 0
        if len(text) > STATEMENT_CHARS_MAX:
            raise ValueError(f"line {number}: the statement has more than {STATEMENT_CHARS_MAX} characters: no end?")
    if not is_empty(text):
        yield Statement(text, number)


def is_empty(text: str) -> bool:
    """Whether there is nothing but space, comments and semicolons."""
    return _EMPTY.fullmatch(text) is not None


def show_row(row: Sequence[object], as_json: bool) -> str:
    """Return a row as a line: values with `|` between them, as SQLite's own shell does, or a JSON array.

    In JSON a blob is an object with the one key `base64`.
    """
    if not as_json:
        return "|".join(map(_show_value, row)) + "\n"
    values = [{"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value for value in row]
    return json.dumps(values) + "\n"


def _show_value(value: object) -> str:
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    return "NULL" if value is None else printable(str(value))
