"""What SQLite's session extension would pass over without a word is recorded, refused, or a conflict all the same."""

# ruff: noqa: S608  # Names of tables.

import itertools

import apsw
import pytest

from messenger.replication import StatementRefused
from messenger.replication.applier import DivergenceFound
from tests.replication.direct import Direct
from tests.replication.pairs import Cluster, assert_equal

CLAUSES = ["", "ON CONFLICT REPLACE", "ON CONFLICT IGNORE", "ON CONFLICT ROLLBACK"]
# The columns of a table, and the row that is in the way of (1, 'p').
TABLES = [
    ("id INTEGER PRIMARY KEY {}, u", "1, 'x'"),
    ("id TEXT PRIMARY KEY {}, u", "1, 'x'"),
    ("id, u, v, PRIMARY KEY (id, u) {}", "1, 'p'"),
    ("id TEXT PRIMARY KEY {}, u) WITHOUT ROWID; --", "1, 'x'"),
    ("id INTEGER PRIMARY KEY, u UNIQUE {}", "2, 'p'"),
    ("id, u UNIQUE /* */ {}", "2, 'p'"),
    ("id TEXT PRIMARY KEY, u UNIQUE {}) WITHOUT ROWID; --", "2, 'p'"),
    ("id TEXT PRIMARY KEY, u TEXT COLLATE NOCASE, UNIQUE (u COLLATE RTRIM) {}", "2, 'p '"),
    ("id TEXT PRIMARY KEY, u, g AS (u || 'x') UNIQUE {}", "2, 'p'"),
]


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_row_that_is_in_the_way_is_a_conflict_whatever_the_clause(direct: Direct, clause: str) -> None:
    ways = [
        ["INSERT INTO {} (rowid, id, u) VALUES (7, 1, 'p')"],  # One row, which a statement inserts that stays prepared.
        ["INSERT INTO {} (rowid, id, u) VALUES (7, 1, 'p'), (8, 3, 'q')"],
        ["INSERT INTO {} (rowid, id, u) VALUES (7, 1, 'a')", "UPDATE {} SET u = 'p'"],
    ]
    for number, ((columns, other), statements) in enumerate(itertools.product(TABLES, ways)):
        if other.startswith("1") and len(statements) == 2:
            continue  # A key that does not change.
        table = f"t{number}"
        direct.run(f"CREATE TABLE {table} ({columns.format(clause)})")
        if "id INTEGER" in columns or "ROWID" in columns:
            statements = [sql.replace("rowid, ", "").replace("(7, ", "(").replace("(8, ", "(") for sql in statements]
        *first, last = (sql.format(table) for sql in statements)
        direct.run(*first)
        direct.apply()
        direct.tamper(f"INSERT INTO {table} (id, u) VALUES ({other})")
        before = direct.rows(f"SELECT * FROM {table}")
        direct.run(last)
        with pytest.raises(DivergenceFound, match=f"in table {table}, key '?[17]"):
            direct.apply()
        assert direct.rows(f"SELECT * FROM {table}") == before
        direct.tamper(f"DELETE FROM {table} WHERE (id, u) = ({other})")
        direct.assert_equal()


@pytest.mark.parametrize("clause", CLAUSES)
def test_rows_of_a_transaction_are_in_nobodys_way_for_good(direct: Direct, clause: str) -> None:
    """A changeset has its rows in no order, so what is there for a moment must be neither replaced nor kept."""
    for number, columns in enumerate(columns for columns, other in TABLES if other == "2, 'p'"):
        table = f"t{number}"
        direct.run(
            f"CREATE TABLE {table} ({columns.format(clause)})",
            f"INSERT INTO {table} (id, u) VALUES (1, 'a'), (2, 'b')",
            f"UPDATE {table} SET u = 'c' WHERE id = 1; UPDATE {table} SET u = 'a' WHERE id = 2",
            f"UPDATE {table} SET u = 'd' WHERE id = 2; UPDATE {table} SET u = 'a' WHERE id = 1",
        )
        for row in range(3, 12):
            direct.run(f"DELETE FROM {table} WHERE u = 'a'; INSERT INTO {table} (id, u) VALUES ({row}, 'a')")
        direct.assert_equal()


def test_guards_follow_the_schema(direct: Direct) -> None:
    direct.run(
        "CREATE TABLE t (id INTEGER PRIMARY KEY ON CONFLICT IGNORE, a)",
        "INSERT INTO t VALUES (1, 1)",
        "ALTER TABLE t RENAME TO u",
        "CREATE TABLE t (id INTEGER PRIMARY KEY ON CONFLICT IGNORE, a)",
        "ALTER TABLE u RENAME COLUMN id TO k; INSERT INTO u VALUES (2, 2)",
        "ALTER TABLE u DROP COLUMN a",
        "INSERT INTO t VALUES (1, 1)",
    )
    direct.assert_equal()
    for table in ("t", "u"):
        direct.tamper(f"INSERT INTO {table} VALUES (5{', 5' if table == 't' else ''})")
        direct.run(f"INSERT INTO {table} VALUES (5{', 6' if table == 't' else ''})")
        with pytest.raises(DivergenceFound, match=f"in table {table}, key 5: INSERT: the row is there already"):
            direct.apply()
        direct.tamper(f"DELETE FROM {table} WHERE rowid = 5")
        direct.assert_equal()


NULL = "NULL in its primary key"
EQUAL = "takes the place of an equal one"
COUNTED = ["CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, v)", "INSERT INTO t (v) VALUES (1)"]
NOCASE = ["CREATE TABLE t (k TEXT PRIMARY KEY COLLATE NOCASE, v)", "INSERT INTO t VALUES ('a', 1), ('b', 1)"]
RECORDED = {
    "temporary table": ["CREATE TEMP TABLE x (y); INSERT INTO x VALUES (1); INSERT INTO t SELECT y FROM x"],
    "temporary table is dropped": ["CREATE TEMP TABLE x (y)", "ANALYZE x", "REINDEX x", "DROP TABLE x"],
    "temporary table hides another": ["CREATE TEMP TABLE t (y)", "ALTER TABLE t ADD COLUMN z", "DROP TABLE t"],
    "temporary index": ["CREATE TEMP TABLE t (y)", "CREATE INDEX i ON t (y)"],
    "temporary in other words": ['CREATE TABLE "temp".t (x)', "INSERT INTO t VALUES (1)", "DROP TABLE t"],
    "comment in the middle": ["CREATE/**/TEMP TABLE t (x)", "INSERT INTO t VALUES (1)", "DROP TABLE t"],
    "nothing to create": ["CREATE TABLE IF NOT EXISTS t (y)", "CREATE TABLE IF NOT EXISTS new (y)"],
    "name that is not ASCII": ['CREATE TABLE "Ärzte" (k PRIMARY KEY)', 'INSERT INTO "Ärzte" VALUES (1), (2)'],
    "column rowid": ["CREATE TABLE u (rowid, v)", "INSERT INTO u VALUES (7, 1)", "UPDATE u SET v = 2"],
    "counter left behind": [COUNTED[0].replace("t (", "u ("), "INSERT INTO u (v) VALUES (1)", "UPDATE u SET id = 9"],
    "counters of temporary tables": [
        COUNTED[0].replace("t (", "u ("),
        COUNTED[0].replace("t (", "temp.v ("),
        "INSERT INTO v (v) VALUES (1), (2); INSERT INTO u (v) VALUES (1)",
        "INSERT OR IGNORE INTO u VALUES (1, 1); UPDATE main.sqlite_sequence SET seq = 7",
    ],
    "all rows, behind the schema": [
        "INSERT INTO t VALUES (1)",
        "CREATE INDEX i ON t (x); DELETE FROM t",
        "INSERT INTO t VALUES (1)",
        "DELETE FROM t",
    ],
    "counters of any kind": [
        COUNTED[0].replace("t (", "u ("),
        "INSERT INTO u (v) VALUES (1)",
        "INSERT INTO sqlite_sequence VALUES ('u', 5), ('u', 1.5), ('u', 'x'), (NULL, NULL)",
        "DELETE FROM sqlite_sequence WHERE seq = 1",
    ],
}


@pytest.mark.parametrize("statements", RECORDED.values(), ids=RECORDED.keys())
def test_what_is_easily_missed_is_recorded(direct: Direct, statements: list[str]) -> None:
    direct.run("CREATE TABLE t (x)")
    for sql in statements:
        direct.run(sql)
        direct.assert_equal()


REFUSED = {
    "rowid by a hidden name": (
        ["CREATE TABLE t (_ROWID_, v)"],
        "INSERT INTO t VALUES (7, 1)",
        "a column named _rowid_",
    ),
    "two collations": (
        ["CREATE TABLE t (k TEXT COLLATE NOCASE, PRIMARY KEY (k COLLATE BINARY))"],
        "INSERT INTO t VALUES ('a')",
        "column k has another collation than the primary key",
    ),
    "NULL in a descending key": (["CREATE TABLE t (a INTEGER PRIMARY KEY DESC)"], "INSERT INTO t VALUES (NULL)", NULL),
    "NULL after a rename": (
        ["CREATE TABLE t (k TEXT PRIMARY KEY)", "ALTER TABLE t RENAME TO u", "CREATE TABLE t (k TEXT PRIMARY KEY)"],
        "INSERT INTO t VALUES (NULL)",
        NULL,
    ),
    "NULL below a temporary table": (
        ["CREATE TEMP TABLE t (x)", "CREATE TABLE main.t (k TEXT PRIMARY KEY)"],
        "INSERT INTO main.t VALUES (NULL)",
        NULL,
    ),
    "other case": (NOCASE, "UPDATE t SET k = 'A' WHERE k = 'a'", EQUAL),
    "other case, replaced": (NOCASE, "REPLACE INTO t VALUES ('A', 2)", EQUAL),
    "other case, in two steps": (NOCASE, "DELETE FROM t WHERE k = 'a'; INSERT INTO t VALUES ('A', 1)", EQUAL),
    "other case, new": (NOCASE, "INSERT INTO t VALUES ('C', 1); UPDATE t SET k = 'c' WHERE k = 'C'", EQUAL),
    "1 and 1.0": (
        ["CREATE TABLE t (k PRIMARY KEY) WITHOUT ROWID", "INSERT INTO t VALUES (1), (2), ('a'), (x'00')"],
        "UPDATE t SET k = 1.0 WHERE k = 1",
        EQUAL,
    ),
    "blob as a counter": (COUNTED, "UPDATE sqlite_sequence SET seq = x'00'", "a blob there"),
    "AS SELECT behind a name": ([], 'CREATE TABLE "t(" AS SELECT random() AS r', "then INSERT INTO"),
    "AS SELECT behind a comment": ([], "CREATE TABLE t /*(*/ AS -- (\n SELECT random() AS r", "then INSERT INTO"),
}


@pytest.mark.parametrize(("before", "sql", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_recorded_is_refused(direct: Direct, before: list[str], sql: str, why: str) -> None:
    direct.run(*before)
    with pytest.raises((StatementRefused, apsw.ConstraintError), match=why):
        direct.run(sql)
    direct.assert_equal()


@pytest.mark.parametrize("columns", ["name TEXT, id INTEGER PRIMARY KEY", "id INTEGER PRIMARY KEY"])
@pytest.mark.parametrize("is_quick", [True, False])
def test_a_table_with_another_key_is_not_passed_over(direct: Direct, columns: str, is_quick: bool) -> None:
    direct.run("CREATE TABLE books (id INTEGER PRIMARY KEY, name TEXT); CREATE TABLE more (x)")
    direct.apply()
    direct.tamper(f"DROP TABLE books; CREATE TABLE books ({columns})")
    other = "" if is_quick else "INSERT INTO more VALUES (1);"
    direct.run(f"{other} INSERT INTO books VALUES (1, 'a'); {other}")
    with pytest.raises(DivergenceFound, match="in table books: its columns are others than at the primary"):
        direct.apply()
    assert direct.rows("SELECT * FROM books") == direct.rows("SELECT * FROM more") == []


def test_equal_keys_may_come_one_after_the_other(direct: Direct) -> None:
    direct.run(
        *NOCASE, "UPDATE t SET v = 2 WHERE k = 'A'", "DELETE FROM t WHERE k = 'A'", "INSERT INTO t VALUES ('A', 1)"
    )
    direct.assert_equal()
    assert direct.rows("SELECT k FROM t ORDER BY rowid") == [("b",), ("A",)]


def test_triggers_of_a_cascade_fire_once(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute("PRAGMA foreign_keys = on")
    with primary.transaction() as tx:
        tx.execute("CREATE TABLE shelf (id INTEGER PRIMARY KEY); CREATE TABLE gone (book)")
        tx.execute("CREATE TABLE book (id INTEGER PRIMARY KEY, shelf REFERENCES shelf ON DELETE CASCADE)")
        tx.execute("CREATE TRIGGER t AFTER DELETE ON book BEGIN INSERT INTO gone VALUES (OLD.id); END")
        tx.execute("INSERT INTO shelf VALUES (1), (2); INSERT INTO book VALUES (1, 1), (2, 2)")
    primary.execute("DELETE FROM shelf WHERE id = 1")
    assert_equal(primary, replica)
    with primary.transaction() as tx:
        tx.execute("DROP TABLE shelf; INSERT INTO gone VALUES (3)")
    assert_equal(primary, replica)
    assert replica.execute("SELECT book FROM gone").fetchall() == [(1,), (2,), (3,)]


@pytest.mark.parametrize("setting", ["PRAGMA foreign_keys = on", "PRAGMA cache_size = 100; PRAGMA cache_size"])
def test_nothing_rides_on_a_setting(cluster: Cluster, setting: str) -> None:
    primary, replica = cluster.pair()
    primary.execute(setting)
    with pytest.raises(StatementRefused, match="behind a PRAGMA that sets: execute each by itself"):
        primary.execute(f"{setting}; INSERT INTO books VALUES (1, 'a')")
    with pytest.raises(StatementRefused, match="are allowed here"):
        primary.execute(f"{setting}; PRAGMA journal_mode = delete")
    primary.execute("CREATE TEMP TABLE x (y); INSERT INTO books VALUES (2, 'b')")
    assert_equal(primary, replica)
    assert replica.execute("SELECT id FROM books").fetchall() == [(2,)]
