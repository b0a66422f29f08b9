"""The commands `messenger replication …` as users run them: real processes, what they print, how they end."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from messenger import interrupts
from messenger.cli import main, terminal
from messenger.cli.sql import decode_lines, split_statements
from tests.conftest import free_port, wait_until

COMMAND = [sys.executable, "-m", "messenger", "replication"]
TIMEOUT_S = 20.0
ORDERS = "CREATE TABLE orders (id INTEGER PRIMARY KEY, book TEXT);\n"

Running = subprocess.Popen[bytes]
Start = Callable[..., Running]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in the test's folder; what still runs at the end of the test is killed."""
    with contextlib.ExitStack() as stack:

        def start_command(
            *words: object, stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
        ) -> Running:
            command = [*COMMAND, *map(str, words)]
            process = subprocess.Popen(command, cwd=tmp_path, stdin=stdin, stdout=stdout, stderr=stderr)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_command


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command to its end."""

    def run_command(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    return run_command


def write_line(process: Running, text: str) -> None:
    assert process.stdin
    process.stdin.write(text.encode() + b"\n")
    process.stdin.flush()


def read_line(process: Running) -> str:
    assert process.stdout
    return process.stdout.readline().decode().rstrip("\n")


def read_errors(process: Running, until: str) -> str:
    """Returns what comes on stderr up to the first line that contains a text."""
    assert process.stderr
    text = ""
    while line := process.stderr.readline().decode():
        text += line
        if until in line:
            return text
    raise AssertionError(f"{until!r} did not come: {text}")


def end(process: Running, number: int = signal.SIGTERM) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.decode(), err.decode()


def end_idle(process: Running, number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Ends it when it waits for input: a row is there before its statement has ended."""
    waits_for = Path(f"/proc/{process.pid}/syscall")
    wait_until(lambda: waits_for.read_text().startswith("0 0x0 "))
    return end(process, number)


def start_pair(start: Start, port: int, *options: object) -> tuple[Running, Running]:
    primary = start("primary", "shop.db", "--at", port, *options)
    read_errors(primary, "is the primary of shop.db")
    replica = start("replica", "copy.db", "--from", port, "--identity", "replica1")
    read_errors(replica, "streaming")
    return primary, replica


# Two terminals.


def test_row_appears_at_the_replica(start: Start) -> None:
    primary, replica = start_pair(start, free_port(), "--commit", "applied")
    write_line(primary, ORDERS)
    write_line(primary, "INSERT INTO orders (book) VALUES ('Dune'), ('a;b'); SELECT count(*) FROM orders;")
    assert read_line(primary) == "2"
    write_line(replica, "SELECT * FROM orders;")
    assert [read_line(replica), read_line(replica)] == ["1|Dune", "2|a;b"]
    for process in (replica, primary):
        status, out, err = end_idle(process)
        assert (status, out) == (0, "")
        # A primary tells that the replica has gone, and nobody tells more.
        assert re.fullmatch(r"(messenger: replica replica1 is down: [^\n]+\n)?", err)


@pytest.mark.parametrize("killed", ["primary", "replica"])
def test_killed_one_is_started_again(start: Start, run: Run, tmp_path: Path, killed: str) -> None:
    port = free_port()
    primary, replica = start_pair(start, port, "--commit", "applied")
    write_line(primary, ORDERS)
    write_line(primary, "INSERT INTO orders (book) VALUES ('Dune'); SELECT 'done';")
    assert read_line(primary) == "done"
    (primary if killed == "primary" else replica).kill()
    if killed == "primary":
        primary = start("primary", "shop.db", "--at", port, "--commit", "applied", "--timeout", 20)
    else:
        replica = start("replica", "copy.db", "--from", port, "--identity", "replica1")
        read_errors(replica, "streaming")
    write_line(primary, "INSERT INTO orders (book) VALUES ('Emma'); SELECT 'done';")
    assert read_line(primary) == "done"
    write_line(replica, "SELECT book FROM orders;")
    assert [read_line(replica), read_line(replica)] == ["Dune", "Emma"]
    result = run("verify", "shop.db", "copy.db")
    assert (result.returncode, result.stdout.partition(":")[0]) == (0, "equal")


def test_serves_on_after_standard_input_ends(start: Start) -> None:
    port = free_port()
    primary = start("primary", "shop.db", "--at", port, stdin=subprocess.DEVNULL)
    read_errors(primary, "is the primary")
    replica = start("replica", "copy.db", "--from", port)
    read_errors(replica, "streaming")
    assert primary.poll() is None


def test_ctrl_c_ends(start: Start) -> None:
    primary, replica = start_pair(start, free_port())
    assert end(replica, signal.SIGINT)[0] == 0
    assert end(primary, signal.SIGINT)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_once_does_not_end_as_success(start: Start, number: int) -> None:
    """What was to be run on standard input was not."""
    replica = start("replica", "copy.db", "--from", free_port(), "--once")
    read_errors(replica, "connecting")
    assert end(replica, number)[0] == 130
    primary = start("primary", "shop.db", "--at", free_port(), "--once")
    read_errors(primary, "is the primary")
    assert end(primary, number)[0] == 130


# SQL.


def test_rows_as_json(run: Run) -> None:
    sql = "SELECT 1, 1.5, 'a\x1b|b', NULL, x'00ff'; SELECT 2"
    result = run("primary", "shop.db", "--at", free_port(), "--once", "--json", stdin=sql)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [[1, 1.5, "a\x1b|b", None, {"base64": "AP8="}], [2]]
    result = run("primary", "shop.db", "--at", free_port(), "--once", stdin=sql)
    assert result.stdout == "1|1.5|a\\x1b|b|NULL|x'00ff'\n2\n"


def test_transactions(run: Run) -> None:
    sql = """BEGIN; INSERT INTO orders (book) VALUES ('kept'); COMMIT;
        BEGIN; INSERT INTO orders (book) VALUES ('undone'); ROLLBACK;
        BEGIN; INSERT INTO orders (book) VALUES ('never committed'); SELECT count(*) FROM orders;"""
    result = run("primary", "shop.db", "--at", free_port(), "--once", stdin=ORDERS + sql)
    assert (result.returncode, result.stdout) == (0, "2\n")
    assert "still open is rolled back" in result.stderr
    result = run("primary", "shop.db", "--at", free_port(), "--once", stdin="SELECT book FROM orders")
    assert result.stdout == "kept\n"


def test_first_error_ends_a_script(run: Run) -> None:
    sql = f"{ORDERS}BEGIN;\nINSERT INTO orders (book) VALUES ('x');\nINSERT INTO nowhere VALUES (1);\nSELECT 'on';\n"
    result = run("primary", "shop.db", "--at", free_port(), stdin=sql)
    assert (result.returncode, result.stdout) == (4, "")
    assert "messenger: line 4: no such table: nowhere" in result.stderr
    result = run("primary", "shop.db", "--at", free_port(), "--once", stdin="SELECT count(*) FROM orders")
    assert result.stdout == "0\n"


def test_not_confirmed_has_a_status_of_its_own(run: Run) -> None:
    result = run("primary", "shop.db", "--at", free_port(), "--commit", "applied", "--timeout", 0.2, stdin=ORDERS)
    assert result.returncode == 1
    assert "is committed here, but" in result.stderr
    result = run("primary", "shop.db", "--at", free_port(), "--once", stdin="SELECT count(*) FROM orders")
    assert result.stdout == "0\n"


def test_replica_refuses_to_write(start: Start) -> None:
    _, replica = start_pair(start, free_port())
    write_line(replica, "CREATE TABLE t (x);")
    assert "readonly" in read_errors(replica, "line 1").replace(" ", "").replace("-", "")
    assert replica.wait(TIMEOUT_S) == 4


def test_statements_are_split_where_they_end() -> None:
    text = (
        "-- a comment; with a semicolon\nBEGIN;\nINSERT INTO t VALUES ('a;b\nc'); SELECT 1; /* x; */ ;\n"
        "CREATE TRIGGER x AFTER INSERT ON t BEGIN SELECT 1; SELECT 2; END;\nROLLBACK TO s; rollback; end"
    )
    statements = list(split_statements(text.splitlines(keepends=True)))
    assert [(statement.text.strip()[-12:], statement.line, statement.kind) for statement in statements] == [
        ("colon\nBEGIN;", 2, "begin"),
        ("S ('a;b\nc');", 4, ""),
        ("SELECT 1;", 4, ""),
        ("LECT 2; END;", 5, ""),
        ("LLBACK TO s;", 6, ""),
        ("rollback;", 6, "rollback"),
        ("end", 6, "commit"),
    ]


@pytest.mark.parametrize("count", [1, 30])
def test_comments_in_front_of_a_statement_hide_nothing(count: int) -> None:
    """The end of a comment was sought behind the statement too, and then there was none to run."""
    sql = "/* a dump; of today */\n" * count + "CREATE TABLE t (x);\n/* end */"
    assert [statement.word for statement in split_statements(sql.splitlines(keepends=True))] == ["CREATE"]
    (statement,) = split_statements(["/* back\n", "to */ -- to\n", "ROLLBACK;\n"])
    assert statement.kind == "rollback"


def test_statements_with_many_semicolons_are_split_at_once() -> None:
    """Text of web pages, say. SQLite was asked at each of them, from the start."""
    sql = f"SELECT '{'&lt;b&gt;' * 200_000}');"
    assert len(list(split_statements([sql]))) == 1
    lines = ["SELECT '\n", *["&nbsp;\n"] * 100_000, "');\n"]
    assert len(list(split_statements(lines))) == 1


def test_text_is_taken_as_it_is(start: Start, tmp_path: Path) -> None:
    """Line ends in a string were changed, and the mark of some programs hid the BEGIN."""
    sql = b"\xef\xbb\xbfBEGIN;\r\nCREATE TABLE t (x);\r\nINSERT INTO t VALUES ('a\r\nb\rc\xe2\x80\xa8');\r\nCOMMIT;\r\n"
    (tmp_path / "dump.sql").write_bytes(sql)
    show = b"SELECT hex(x) FROM t;"
    loaded = start("primary", "loaded.db", "--at", free_port(), "--once", "--load", "dump.sql")
    assert loaded.communicate(show, TIMEOUT_S)[0] == b"610D0A620D63E280A8\n"
    typed = start("primary", "typed.db", "--at", free_port(), "--once")
    assert typed.communicate(sql + show, TIMEOUT_S)[0] == b"610D0A620D63E280A8\n"
    assert list(decode_lines([b"\xef\xbb\xbfa\r\n", b"b"])) == ["a\r\n", "b"]


def test_infinity_is_json_too(run: Run) -> None:
    result = run("primary", "shop.db", "--at", free_port(), "--once", "--json", stdin="SELECT 9e999, -9e999, 0.5")
    assert result.stdout == "[1e999, -1e999, 0.5]\n"
    assert json.loads(result.stdout) == [float("inf"), float("-inf"), 0.5]


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (b"SELECT 1;\nSELECT CAST(x'ff' AS TEXT);\n", "line 2: a value is text that is no UTF-8; CAST"),
        (b"SELECT 1;\n\n'\xff';\n", "line 3: byte 0xff is no UTF-8 text"),
        (b"SELECT 1;\n\0;\n", "line 2: the character NUL cannot stand in SQL"),
        (b"SELECT 1;\nCOMMIT;\n", "line 2: no transaction is open, so COMMIT ends none"),
        (b"SELECT 1;\n-- back to\nROLLBACK;\n", "line 3: no transaction is open, so ROLLBACK ends none"),
        (b"SELECT 1; BEGIN;\nBEGIN;\n", "line 2: a transaction is open already; COMMIT or ROLLBACK ends it"),
    ],
)
def test_an_error_names_the_line(start: Start, sql: bytes, said: str) -> None:
    process = start("primary", "shop.db", "--at", free_port())
    out, err = process.communicate(sql, TIMEOUT_S)
    assert (process.returncode, out) == (4, b"1\n")
    assert f"messenger: {said}" in err.decode()


def test_interrupted_statement_does_not_end_as_success(start: Start, run: Run) -> None:
    primary = start("primary", "shop.db", "--at", free_port(), "--commit", "applied", "--timeout", 60)
    write_line(primary, f"SELECT 1; {ORDERS}")
    assert read_line(primary) == "1"
    status, _, err = end(primary)
    assert status == 130
    assert "line 1: interrupted; it may be committed here or not" in err


def test_ctrl_c_rolls_back_what_is_open(start: Start, run: Run) -> None:
    """Behind a ROLLBACK the next transaction was lost sight of, and the end failed."""
    primary = start("primary", "shop.db", "--at", free_port())
    write_line(primary, ORDERS)
    write_line(primary, "BEGIN; ROLLBACK; BEGIN; INSERT INTO orders (book) VALUES ('x'); SELECT 'open';")
    assert read_line(primary) == "open"
    waits_for_input = Path(f"/proc/{primary.pid}/syscall")
    wait_until(
        lambda: waits_for_input.read_text().startswith("0 0x0 ")
    )  # The row was there before its statement ended.
    status, _, err = end(primary, signal.SIGINT)
    assert status == 0
    assert "the transaction that was still open is rolled back" in err


def test_a_signal_waits_until_the_library_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came while a commit took from its queue left a traceback; that it waits delays the end no more."""
    handlers: dict[int, Any] = {}
    alarms: list[int] = []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    monkeypatch.setattr(signal, "alarm", alarms.append)
    monkeypatch.setattr(interrupts, "_send_again", lambda: None)

    @interrupts.shields
    def commit() -> str:
        terminal._interrupt(signal.SIGTERM, sys._getframe())
        return "whole"

    assert commit() == "whole"
    assert interrupts.take()
    with pytest.raises(KeyboardInterrupt):
        terminal._interrupt(signal.SIGINT, sys._getframe())
    assert alarms == [terminal.END_S_MAX]
    assert {signal.SIGINT, signal.SIGTERM} < set(handlers)


def test_ctrl_c_ends_a_statement_that_would_take_for_ever(start: Start) -> None:
    primary = start("primary", "shop.db", "--at", free_port())
    write_line(primary, "SELECT 1; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n;")
    assert read_line(primary) == "1"
    assert end(primary, signal.SIGINT)[0] == 130


# Loading.


def test_load_of_a_dump(run: Run, tmp_path: Path) -> None:
    rows = "".join(f"INSERT INTO orders VALUES({number},'book {number}; it''s');\n" for number in range(2_500))
    dump = f"PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n{ORDERS}{rows}CREATE INDEX i ON orders (book);\nCOMMIT;\n"
    (tmp_path / "dump.sql").write_text(dump)
    sql = "SELECT count(*), max(id), min(book) FROM orders"
    result = run("primary", "shop.db", "--at", free_port(), "--once", "--load", "dump.sql", stdin=sql)
    assert (result.returncode, result.stdout) == (0, "2500|2499|book 0; it's\n"), result.stderr
    assert "dump.sql: 2503 statements were run, (1, 3)" in result.stderr


def test_load_says_where_it_failed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.sql").write_text(f"{ORDERS}\nINSERT INTO orders\nVALUES ('x', 'y');\n")
    result = run("primary", "shop.db", "--at", free_port(), "--load", "bad.sql")
    assert result.returncode == 4
    assert re.search(
        r"^messenger: bad.sql, line 4: datatype mismatch; nothing of it is committed$", result.stderr, re.MULTILINE
    ), result.stderr


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("-- d\nPRAGMA user_version=2;\nSELECT x;\n", "line 3: no such column: x; committed are 1 of its statements, "),
        (f"{ORDERS}BEGIN;\nROLLBACK;\n", "line 3: ROLLBACK cannot be done, as BEGIN bounds nothing in a load; nothing"),
        ("SELECT 1;\n'\udcff';\n", "line 2: byte 0xff is no UTF-8 text; nothing of it is"),
        (
            f"{ORDERS}PRAGMA foreign_keys=ON; "
            "CREATE TABLE t (x INTEGER PRIMARY KEY REFERENCES orders DEFERRABLE INITIALLY DEFERRED);\n"
            "INSERT INTO t VALUES (7);",
            "line 3: FOREIGN KEY constraint failed; committed are 2 of its statements, up to line 2",
        ),
    ],
)
def test_load_says_what_is_committed(run: Run, tmp_path: Path, sql: str, said: str) -> None:
    (tmp_path / "bad.sql").write_text(sql, errors="surrogateescape")
    result = run("primary", "shop.db", "--at", free_port(), "--load", "bad.sql")
    assert result.returncode == 4
    assert f"messenger: bad.sql, {said}" in result.stderr


def test_interrupted_load_does_not_end_as_success(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.sql")
    primary = start("primary", "shop.db", "--at", free_port(), "--load", "endless.sql")
    with (tmp_path / "endless.sql").open("w") as pipe:
        pipe.write(f"{ORDERS}PRAGMA user_version=2;\n")
        pipe.flush()
        read_errors(primary, "is the primary")
        status, _, err = end(primary)
    assert status == 130
    assert "endless.sql: interrupted; " in err


def test_load_commits_before_a_transaction_gets_too_large(run: Run, tmp_path: Path) -> None:
    row = f"INSERT INTO orders (book) VALUES ('{'x' * 1_000_000}');\n"  # noqa: S608
    (tmp_path / "dump.sql").write_text(ORDERS + row * 70)
    sql = "SELECT count(*) FROM orders"
    result = run("primary", "shop.db", "--at", free_port(), "--once", "--load", "dump.sql", stdin=sql)
    assert (result.returncode, result.stdout) == (0, "70\n"), result.stderr


# status, promote, verify.


def test_status(start: Start, run: Run) -> None:
    port = free_port()
    start_pair(start, port)
    told = json.loads(run("status", port, "--json").stdout)
    assert (told["role"], told["term"], [replica["name"] for replica in told["replicas"]]) == (
        "primary",
        1,
        ["replica1"],
    )
    shown = run("status", port).stdout
    assert re.search(r"^role +primary$", shown, re.MULTILINE)
    assert re.search(r"^replica1 +streaming ", shown, re.MULTILINE)


def test_status_of_nobody(run: Run) -> None:
    result = run("status", free_port(), "--timeout", 0.3)
    assert (result.returncode, result.stdout) == (3, "")
    assert "nobody" in result.stderr


def test_status_of_something_else(start: Start, run: Run, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "messenger", "listen", str(port), "--reply", "hello"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as other:
        assert other.stderr
        other.stderr.readline()
        result = run("status", port)
        other.kill()
    assert result.returncode == 4
    assert "is no primary and no replica" in result.stderr


def test_promotion(start: Start, run: Run) -> None:
    port, other_port = free_port(), free_port()
    primary = start("primary", "shop.db", "--at", port)
    write_line(primary, ORDERS)
    write_line(primary, "INSERT INTO orders (book) VALUES ('Dune');")
    replica = start("replica", "copy.db", "--from", port, "--listen", other_port)
    read_errors(replica, "streaming")
    primary.kill()
    result = run("promote", other_port, "--timeout", 15)
    assert result.returncode == 0, result.stderr
    assert "copy.db is the primary at (2, " in result.stdout
    read_errors(replica, "promoted")
    write_line(replica, "INSERT INTO orders (book) VALUES ('Emma'); SELECT count(*) FROM orders;")
    assert read_line(replica) == "2"
    assert run("promote", other_port).returncode == 4
    # The old primary comes back as a replica of the new one.
    old = start("replica", "shop.db", "--from", other_port)
    read_errors(old, "streaming")
    write_line(old, "SELECT book FROM orders;")
    assert [read_line(old), read_line(old)] == ["Dune", "Emma"]


def test_replica_that_listens_to_nobody_is_not_promoted(start: Start, run: Run) -> None:
    port = free_port()
    start_pair(start, port)
    result = run("promote", port)
    assert (result.returncode, result.stdout) == (4, "")
    assert "the primary already" in result.stderr


def test_verify_names_what_differs(run: Run) -> None:
    for name, book in (("a.db", "Dune"), ("b.db", "Emma")):
        sql = "INSERT INTO orders VALUES (1, 'same'), (7, '?');".replace("?", book)
        assert run("primary", name, "--at", free_port(), "--once", stdin=ORDERS + sql).returncode == 0
    result = run("verify", "a.db", "b.db")
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].startswith("different: ")
    assert re.search(r"orders.*7.*Dune.*Emma", result.stdout.splitlines()[1])
    told = json.loads(run("verify", "a.db", "b.db", "--json").stdout)
    assert (told["is_equal"], told["differences"][0]["table"]) == (False, "orders")
    assert json.loads(run("verify", "a.db", "a.db", "--json").stdout)["is_equal"] is True


def test_verify_of_a_missing_file(run: Run, tmp_path: Path) -> None:
    result = run("verify", "missing.db", "missing.db")
    assert result.returncode == 4
    assert re.fullmatch(r"messenger: [^\n]+\n", result.stderr)
    assert not (tmp_path / "missing.db").exists()


# Usage and terminals.


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["primary", "shop.db", "--at", "inproc://x"], "stays within one process"),
        (["primary", "shop.db", "--commit", "sometimes"], "'sometimes' is not one of"),
        (["primary"], "Missing argument 'FILE'"),
        (["replica", "copy.db", "--from", "tcp://nowhere"], "tcp://nowhere"),
        (["unknown"], "No such command 'unknown'"),
    ],
)
def test_wrong_usage(run: Run, words: list[str], complaint: str) -> None:
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert complaint in result.stderr


def test_file_in_use(start: Start, run: Run) -> None:
    start_pair(start, free_port())
    result = run("primary", "shop.db", "--at", free_port())
    assert result.returncode == 4
    assert "is open as a primary or replica already" in result.stderr


def test_missing_extra_is_told(tmp_path: Path) -> None:
    source = "import sys; sys.modules['apsw'] = None; from messenger.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", source]
    result = subprocess.run([*command, "replication", "status"], capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert "needs apsw, which is not installed: pip install 'messenger-zmq[replication]'" in result.stderr
    assert subprocess.run([*command, "--help"], capture_output=True, check=False).returncode == 0


def read_terminal(master: int, until: str) -> str:
    text = ""
    while until not in text:
        text += os.read(master, 65_536).decode(errors="replace")
    return text


def test_terminal_shows_a_prompt_and_goes_on_after_an_error(start: Start) -> None:
    master, slave = pty.openpty()
    primary = start("primary", "shop.db", "--at", free_port(), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    read_terminal(master, "sql> ")
    os.write(master, b"nonsense;\n")
    assert "syntax error" in read_terminal(master, "sql> ")
    os.write(master, b"SELECT '\xff';\n")
    assert "is no UTF-8 text" in read_terminal(master, "sql> ")
    os.write(master, b"SELECT 6 * 7;\n")
    assert "\n42\r\n" in read_terminal(master, "42\r\nsql> ")
    os.write(master, b"\x04")
    assert primary.wait(TIMEOUT_S) == 0
    os.close(master)


def test_terminal_shows_bars(start: Start, run: Run) -> None:
    """A database large enough that its snapshot takes a moment."""
    port = free_port()
    fill = "INSERT INTO orders (book) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40) "
    fill += "SELECT hex(randomblob(200000)) FROM n;"
    primary = start("primary", "shop.db", "--at", port)
    write_line(primary, f"{ORDERS}{fill} SELECT 'done';")
    assert read_line(primary) == "done"
    master, slave = pty.openpty()
    replica = start("replica", "copy.db", "--from", port, "--once", stdin=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    shown = read_terminal(master, "streaming")
    assert "━" in shown
    assert "snapshot" in shown
    assert replica.wait(TIMEOUT_S) == 0
    os.close(master)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("replication verify no.db no.db", "no.db: unable to open database file"),
        ("replication verify table.csv table.csv", "table.csv: file is not a database"),
        ("replication primary table.csv --at 0 --once", "table.csv: file is not a database"),
        ("models infer m no.csv", "no.csv: No such file or directory"),
    ],
)
def test_an_error_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("a,b\n1,2\n")
    assert main(words.split()) == 4
    assert capsys.readouterr().err == f"messenger: {text}\n"


def test_a_new_replica_that_finds_no_primary_says_so(run: Run) -> None:
    result = run("replica", "new.db", "--from", free_port(), "--once")
    assert result.returncode == 3
    assert "no primary answered at " in result.stderr.splitlines()[-1]
