"""SQL as text: statements out of lines, and rows as lines.

What must never happen here: a statement that is cut inside a string or a trigger, or passed over; a row that commands
the terminal.

A semicolon outside of quotation marks and comments may end a statement, and SQLite itself says whether it does
(`sqlite3_complete`): in a trigger it does not. Everything up to there is one call of `execute`.
"""

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import apsw

from messenger import MessengerError

from .terminal import printable

STATEMENT_CHARS_MAX = 64 * 1024 * 1024  # More than any message may hold; a quote that is never closed ends here.

_BLANK = re.compile(r"(\s|;|--[^\n]*(\n|\Z)|/\*.*?(\*/|\Z))*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
_TO_SAVEPOINT = re.compile(r"ROLLBACK\s+(TRANSACTION\s+)?TO\b", re.IGNORECASE)
# What may end a statement or begin what hides semicolons, and what ends that.
_MARK = re.compile(r"[;'\"`\[]|--|/\*")
_CLOSERS = {"'": "'", '"': '"', "`": "`", "[": "]", "--": "\n", "/*": "*/"}

Kind = Literal["begin", "commit", "rollback", ""]
_KINDS: dict[str, Kind] = {"BEGIN": "begin", "COMMIT": "commit", "END": "commit", "ROLLBACK": "rollback"}


class Failed(MessengerError):
    """SQLite said no, or what was to be run is no SQL."""


class Statement(NamedTuple):
    """One statement.

    Attributes:
        text: With all that stood in front of it.
        line: The number of its last line, from 1.
    """

    text: str
    line: int

    @property
    def word(self) -> str:
        """Its first word, in capitals."""
        word = _WORD.match(self.text, _blank_end(self.text))
        return word[0].upper() if word else ""

    @property
    def kind(self) -> Kind:
        """What it does to the transaction; a ROLLBACK TO a savepoint does nothing to it."""
        return "" if _TO_SAVEPOINT.match(self.text, _blank_end(self.text)) else _KINDS.get(self.word, "")


def decode_lines(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines as text, each with the very line end that it has, because it may stand in a string.

    Raises:
        Failed: A line is no UTF-8, or holds the character NUL, which SQLite takes for the end.
    """
    for number, line in enumerate(lines, start=1):
        try:
            # Some programs put a mark in front of the first line.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Failed(f"line {number}: byte {line[error.start]:#04x} is no UTF-8 text") from error
        if "\0" in text:
            raise Failed(f"line {number}: the character NUL cannot stand in SQL")
        yield text


def split_statements(lines: Iterable[str]) -> Iterator[Statement]:
    """Yield each statement as soon as the line that ends it has come; at the end also one without its semicolon.

    Raises:
        Failed: A statement does not end within `STATEMENT_CHARS_MAX` characters.
    """
    text = closer = ""
    number = seen = 0
    for number, line in enumerate(lines, start=1):
        text += line
        start = 0
        while seen < len(text):
            if closer:
                end = text.find(closer, seen)
                seen, closer = (end + len(closer), "") if end >= 0 else (len(text), closer)
                continue
            mark = _MARK.search(text, seen)
            seen = mark.end() if mark else len(text)
            closer = _CLOSERS.get(mark[0], "") if mark else ""
            if mark and mark[0] == ";" and apsw.complete(text[start:seen]):
                if not is_empty(text[start:seen]):
                    yield Statement(text[start:seen], number)
                start = seen
        text, seen = text[start:], seen - start
        if len(text) > STATEMENT_CHARS_MAX:
            raise Failed(f"line {number}: the statement has more than {STATEMENT_CHARS_MAX} characters: no end?")
    if not is_empty(text):
        yield Statement(text, number)


def is_empty(text: str) -> bool:
    """Whether there is nothing but space, comments and semicolons."""
    return _blank_end(text) == len(text)


def _blank_end(text: str) -> int:
    # Not `fullmatch`, which would try whether a comment can end later than where it ends.
    blank = _BLANK.match(text)
    return blank.end() if blank else 0


def show_row(row: Sequence[object], as_json: bool) -> str:
    """Return a row as a line: values with `|` between them, as SQLite's own shell does, or a JSON array.

    In JSON a blob is an object with the one key `base64`, and infinity a number that is read as it.
    """
    if not as_json:
        return "|".join(map(_show_value, row)) + "\n"
    return f"[{', '.join(map(_show_json, row))}]\n"


def _show_json(value: object) -> str:
    if isinstance(value, bytes):
        value = {"base64": base64.b64encode(value).decode()}
    elif isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return json.dumps(value)


def _show_value(value: object) -> str:
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    return "NULL" if value is None else printable(str(value))
