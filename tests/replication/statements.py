"""Random statements at a primary; after each transaction the replica must hold the same, whatever SQLite refused.

`python -m tests.replication.statements --seconds 60` prints the seed of each run that ends in a difference.
"""

# ruff: noqa: S608  # Names of tables.

import argparse
import contextlib
import random
import tempfile
import time
from pathlib import Path

import apsw

from messenger.replication import ReplicationError
from tests.replication.direct import Direct, new_direct

STEP_COUNT = 60
NAMES = ["a", "b", '"Ä"', '"x y"']
COLUMNS = ["p", "q", "r", "s"]
VALUES = [
    *("NULL", "0", "1", "2", "1.0", "2.5", "-1", "9223372036854775807", "1e300", "random() % 4", "'1'", "''"),
    *("'a'", "'A'", "'b'", "'a '", "x'00'", "zeroblob(3)"),
]
TYPES = ["", "INTEGER", "TEXT", "REAL", "BLOB", "NUMERIC"]
COLLATIONS = ["", "", "COLLATE NOCASE", "COLLATE RTRIM"]
CLAUSES = ["", "", "ON CONFLICT REPLACE", "ON CONFLICT IGNORE", "ON CONFLICT ROLLBACK", "ON CONFLICT FAIL"]
LAST_COLUMNS = [
    *("s", "s AS (q || 'x')", "s AS (q || 'x') STORED UNIQUE", "s REFERENCES a ON DELETE CASCADE"),
    *("s REFERENCES b ON DELETE SET NULL", "s REFERENCES a ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED"),
]
WHOLE = [
    *("ANALYZE", "REINDEX", "PRAGMA user_version = 5", "DELETE FROM sqlite_sequence", "DROP VIEW v"),
    *(
        "UPDATE sqlite_sequence SET seq = seq + 5",
        "CREATE VIEW v AS SELECT * FROM a",
        "DROP TRIGGER one",
        "DROP INDEX i",
    ),
    *("CREATE VIRTUAL TABLE f USING fts5 (w)", "INSERT INTO f VALUES ('hello'), ('world')", "UPDATE f SET w = 'x'"),
    *("INSERT INTO f (f) VALUES ('optimize')", "DELETE FROM f WHERE rowid = 1", "DROP TABLE f"),
]


class Statements:
    """Makes them, always the same ones from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def create_table(self) -> str:
        """Return what makes a table of some kind."""
        pick = self._rng.choice
        column = f"p {pick(TYPES)} {pick(COLLATIONS)}"
        key, more, options = pick(
            [
                (f"p INTEGER PRIMARY KEY {pick(CLAUSES)}", "", ""),
                ("p INTEGER PRIMARY KEY AUTOINCREMENT", "", ""),
                ("p INTEGER PRIMARY KEY DESC", "", ""),
                (f"{column} PRIMARY KEY {pick(CLAUSES)}", "", ""),
                (column, "", ""),
                (column, f", PRIMARY KEY (p, q) {pick(CLAUSES)}", ""),
                (f"{column} PRIMARY KEY {pick(CLAUSES)}", "", "WITHOUT ROWID"),
            ]
        )
        unique = f", UNIQUE (q, r) {pick(CLAUSES)}" if self._rng.random() < 0.3 else ""
        columns = f"{key}, q {pick(TYPES)} {pick(['', 'UNIQUE ' + pick(CLAUSES)])}, r DEFAULT 5, {pick(LAST_COLUMNS)}"
        return f"CREATE {pick(['', '', '', 'TEMP'])} TABLE {pick(NAMES)} ({columns}{more}{unique}) {options}"

    def one(self) -> str:
        """Return a statement of some kind."""
        pick = self._rng.choice
        name, other, column, value = pick(NAMES), pick(NAMES), pick(COLUMNS), pick(VALUES)
        where = pick(["", f"WHERE {pick(COLUMNS)} = {pick(VALUES)}", f"WHERE {pick(COLUMNS)} > {pick(VALUES)}"])
        new = pick([value, f"{column} + 1", "q", f"upper({column})", f"CAST({column} AS REAL)"])
        rows = ", ".join(f"({pick(VALUES)}, {pick(VALUES)}, {pick(VALUES)})" for _ in range(self._rng.randint(1, 4)))
        verb = pick(["INSERT", "INSERT OR REPLACE", "INSERT OR IGNORE", "REPLACE"])
        insert = f"{verb} INTO {name} (p, q, r) VALUES {rows}"
        update = f"UPDATE {pick(['', 'OR IGNORE', 'OR REPLACE'])} {name} SET {column} = {new} {where}"
        delete = f"DELETE FROM {name} {where}"
        rare = [
            f"ALTER TABLE {name} RENAME TO {other}",
            f"ALTER TABLE {name} ADD COLUMN t {pick(['', 'DEFAULT 3', 'AS (q)'])}",
            f"ALTER TABLE {name} DROP COLUMN {column}",
            f"CREATE {pick(['', 'UNIQUE'])} INDEX i ON {name} ({pick([column, 'lower(q)'])})",
            f"CREATE {pick(['', 'TEMP'])} TRIGGER one AFTER {pick(['INSERT', 'UPDATE', 'DELETE'])} ON {name} "
            f"BEGIN INSERT OR IGNORE INTO {other} (p, q) VALUES ({value}, 1); END",
            f"INSERT INTO {name} SELECT * FROM {other}",
            f"DROP TABLE {name}",
            pick(WHOLE),
        ]
        return pick([insert, insert, insert, update, update, delete, pick(rare), pick([*rare, self.create_table()])])

    def some(self) -> str:
        """Return what is one transaction."""
        return "; ".join(self.one() for _ in range(self._rng.choice([1, 1, 2, 3])))


def run(direct: Direct, seed: int) -> int:
    """Return how many transactions were done, after which both are alike."""
    statements = Statements(seed)
    direct.writer.set(f"PRAGMA foreign_keys = {seed % 2}")
    done_count = 0
    for number in range(STEP_COUNT):
        with contextlib.suppress(apsw.Error, ReplicationError):
            direct.run(statements.create_table() if number < len(NAMES) else statements.some())
            done_count += 1
        direct.assert_equal()
    return done_count


def main() -> None:
    """Run for as long as the words say."""
    parser = argparse.ArgumentParser(prog="tests.replication.statements", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end_at, seed, done_count = time.monotonic() + options.seconds, options.seed, 0
    while time.monotonic() < end_at:
        with tempfile.TemporaryDirectory() as folder, new_direct(Path(folder)) as direct:
            try:
                done_count += run(direct, seed)
            except Exception as error:
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        seed += 1
    print(f"{seed - options.seed} runs, {done_count} transactions")


if __name__ == "__main__":
    main()
