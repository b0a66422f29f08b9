"""What a transaction changes arrives at the replica: every kind of table, the schema, and nothing that was undone."""

import apsw
import pytest

from messenger.replication import StatementRefused
from messenger.replication.capture import Kind, classify
from tests.replication.pairs import BOOKS, Cluster, assert_equal, content_of

TABLES = {
    "integer key": ["CREATE TABLE t (id INTEGER PRIMARY KEY, v)", "INSERT INTO t (v) VALUES (1), ('two'), (x'03')"],
    "no key": ["CREATE TABLE t (a, b)", "INSERT INTO t VALUES (1, 2), (1, 2)", "DELETE FROM t WHERE rowid = 1"],
    "text key": ["CREATE TABLE t (k TEXT PRIMARY KEY, v)", "INSERT INTO t VALUES ('a', 1)", "UPDATE t SET k = 'b'"],
    "two columns": ["CREATE TABLE t (a, b, v, PRIMARY KEY (a, b)) WITHOUT ROWID", "INSERT INTO t VALUES (1, 2, 3)"],
    "without rowid": ["CREATE TABLE t (k TEXT PRIMARY KEY) WITHOUT ROWID", "INSERT INTO t VALUES ('a')"],
    "generated": [
        "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b AS (a * 2) STORED, c AS (a + 1))",
        "INSERT INTO t (a) VALUES (5)",
        "UPDATE t SET a = 6",
    ],
    "autoincrement": [
        "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, v)",
        "INSERT INTO t (v) VALUES (1), (2), (3)",
        "DELETE FROM t",
        "DELETE FROM sqlite_sequence",
        "INSERT INTO t (v) VALUES (4)",
    ],
    "full text": [
        "CREATE VIRTUAL TABLE t USING fts5 (words)",
        "INSERT INTO t VALUES ('hello world'), ('more words')",
        "DELETE FROM t WHERE rowid = 1",
    ],
    "rtree": ["CREATE VIRTUAL TABLE t USING rtree (id, low, high)", "INSERT INTO t VALUES (1, 2, 3)"],
    "odd name": ['CREATE TABLE "o\'d ""name" (k TEXT PRIMARY KEY)', 'INSERT INTO "o\'d ""name" VALUES (\'x\')'],
    "unique swap": [
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE)",
        "INSERT INTO t VALUES (1, 'a'), (2, 'b')",
        "UPDATE t SET u = CASE u WHEN 'a' THEN 'c' ELSE 'a' END WHERE id = 1; UPDATE t SET u = 'd' WHERE id = 2",
        "DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (3, 'c')",
    ],
    "trigger": [
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE TABLE log (what)",
        "CREATE TRIGGER tr AFTER INSERT ON t BEGIN INSERT INTO log VALUES (NEW.v); END",
        "INSERT INTO t (v) VALUES (1), (2)",
    ],
    "schema": [
        "CREATE TABLE t (id INTEGER PRIMARY KEY, a)",
        "INSERT INTO t VALUES (1, 2)",
        "ALTER TABLE t ADD COLUMN b DEFAULT 7",
        "UPDATE t SET b = 8",
        "ALTER TABLE t DROP COLUMN a",
        "CREATE INDEX i ON t (b)",
        "CREATE VIEW w AS SELECT b FROM t",
        "ALTER TABLE t RENAME TO u",
        "INSERT INTO u VALUES (2, 9)",
        "PRAGMA user_version = 5",
        "DROP INDEX i; DROP VIEW w",
    ],
}


@pytest.mark.parametrize("statements", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("together", [False, True], ids=["each", "in one"])
def test_tables_arrive(cluster: Cluster, statements: list[str], together: bool) -> None:
    primary, replica = cluster.pair()
    if together:
        with primary.transaction() as tx:
            for sql in statements:
                tx.execute(sql)
    else:
        for sql in statements:
            primary.execute(sql)
    assert_equal(primary, replica)
    assert replica.status().diverged == ""
    assert replica.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert replica.execute("PRAGMA user_version").fetchall() == primary.execute("PRAGMA user_version").fetchall()


def test_cascades_arrive_once(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute("PRAGMA foreign_keys = on")
    with primary.transaction() as tx:
        tx.execute("CREATE TABLE shelf (id INTEGER PRIMARY KEY)")
        tx.execute("CREATE TABLE book (id INTEGER PRIMARY KEY, shelf REFERENCES shelf ON DELETE CASCADE)")
        tx.execute("INSERT INTO shelf VALUES (1), (2)")
        tx.execute("INSERT INTO book (shelf) VALUES (1), (1), (2)")
    primary.execute("DELETE FROM shelf WHERE id = 1")
    assert primary.execute("SELECT shelf FROM book").fetchall() == [(2,)]
    assert_equal(primary, replica)
    primary.execute("DROP TABLE shelf")
    assert primary.execute("SELECT count(*) FROM book").fetchall() == [(0,)]
    assert_equal(primary, replica)


def test_what_was_undone_does_not_arrive(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with pytest.raises(ZeroDivisionError), primary.transaction() as tx:  # noqa: PT012  # All of it is one.
        tx.execute("INSERT INTO books (name) VALUES ('Dune')")
        tx.execute("CREATE TABLE other (x)")
        raise ZeroDivisionError
    with pytest.raises(apsw.SQLError):
        primary.execute("INSERT INTO other VALUES (1)")
    with primary.transaction() as tx:
        with pytest.raises(apsw.SQLError, match="already exists"):
            tx.execute(BOOKS)
        with pytest.raises(apsw.ConstraintError):
            tx.execute("INSERT INTO books VALUES (1, 'a'), (1, 'b')")
        tx.execute("INSERT INTO books (name) VALUES ('Emma')")
    assert_equal(primary, replica)
    assert replica.execute("SELECT id, name FROM books").fetchall() == [(1, "Emma")]


def test_a_transaction_without_changes_takes_no_position(cluster: Cluster) -> None:
    primary, _ = cluster.pair()
    before = primary.position
    with primary.transaction() as tx:
        tx.execute("UPDATE books SET name = 'x' WHERE id = 99")
        assert tx.execute("SELECT count(*) FROM books").fetchone() == (0,)
    primary.execute("DELETE FROM books")
    assert primary.position == before
    assert tx.position == before


@pytest.mark.parametrize(
    "sql", ["INSERT INTO t VALUES (NULL, 1)", "UPDATE t SET k = NULL", "REPLACE INTO t VALUES (NULL, 2)"]
)
def test_null_in_a_primary_key_is_refused(cluster: Cluster, sql: str) -> None:
    """SQLite's session extension passes over such rows without a word."""
    primary, replica = cluster.pair()
    primary.execute("CREATE TABLE t (k TEXT PRIMARY KEY, v)")
    primary.execute("INSERT INTO t VALUES ('a', 1)")
    with pytest.raises(apsw.ConstraintError, match="table t: a row with NULL in its primary key cannot be replicated"):
        primary.execute(sql)
    with pytest.raises(apsw.ConstraintError), primary.transaction() as tx:  # noqa: PT012  # All of it is one.
        tx.execute("CREATE TABLE u (k TEXT PRIMARY KEY, v)")
        tx.execute("INSERT INTO u VALUES (NULL, 1)")
    assert_equal(primary, replica)


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("BEGIN", "primary.transaction"),
        ("COMMIT", "primary.transaction"),
        ("/* x */ -- y\n SAVEPOINT a", "primary.transaction"),
        ("VACUUM", "rowids"),
        ("ATTACH 'x.db' AS x", "another file"),
        ("PRAGMA journal_mode = delete", "are allowed here"),
        ("PRAGMA synchronous(0)", "are allowed here"),
        ("CREATE TABLE t AS SELECT 1", "INSERT INTO"),
        ("DELETE FROM _messenger_log", "are replication's"),
        ("DROP TABLE _MESSENGER_STATE", "are replication's"),
    ],
)
def test_refused_statements_change_nothing(cluster: Cluster, sql: str, why: str) -> None:
    primary = cluster.primary()
    before = content_of(primary.path)
    with pytest.raises(StatementRefused, match=why):
        primary.execute(sql)
    with pytest.raises(StatementRefused, match=why), primary.transaction() as tx:
        tx.execute(f"CREATE TABLE gone (x); {sql}")
    assert content_of(primary.path) == before


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("insert into t values (1)", Kind.DATA),
        ("WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x", Kind.DATA),
        ("", Kind.DATA),
        (" -- why\n/* because */ ; select 1", Kind.READ),
        ("SELECT * FROM _messenger_log", Kind.READ),
        ("PRAGMA table_info(t)", Kind.READ),
        ("PRAGMA user_version", Kind.READ),
        ("PRAGMA main.user_version = 3", Kind.SCHEMA),
        ("PRAGMA foreign_keys = ON", Kind.SETTING),
        ("create temp table x (y)", Kind.TEMPORARY),
        ("CREATE TABLE t (x TEXT DEFAULT ' AS SELECT ')", Kind.SCHEMA),
        ("CREATE TRIGGER t AFTER INSERT ON x BEGIN SELECT 1; END", Kind.SCHEMA),
    ],
)
def test_statements_are_told_apart(sql: str, kind: Kind) -> None:
    assert classify(sql) is kind


def test_temporary_tables_stay_here(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with primary.transaction() as tx:
        tx.execute("CREATE TEMP TABLE names (name)")
        tx.execute("INSERT INTO names VALUES ('Dune'), ('Emma')")
        tx.execute("INSERT INTO books (name) SELECT name FROM names")
    assert_equal(primary, replica)
    assert replica.execute("SELECT name FROM books ORDER BY id").fetchall() == [("Dune",), ("Emma",)]
