"""Commands and answers as bytes, alone."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.models.errors import BadAnswer, CommandFailed, Overloaded, ServerLost, error_of
from messenger.models.protocol import (
    Answer,
    Command,
    decode_answer,
    decode_command,
    encode,
    encode_failure,
    show_error,
)
from tests.models.conftest import ok


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def binary(text: bytes, array: bytes) -> bytes:
    return b"\x01" + len(text).to_bytes(4, "little") + text + array


def test_a_command_is_the_json_of_the_contract() -> None:
    contents = encode(Command(cmd="PRINT", data={"message": "hello"}))
    assert json.loads(contents) == {"cmd": "PRINT", "data": {"message": "hello"}}
    assert json.loads(encode(ok("MODEL_REPLY_hello"))) == {
        "action": 0,
        "result": "MODEL_REPLY_hello",
        "success": True,
        "err": "",
        "kind": "",
        "retry_after_s": 0.0,
        "server": None,
    }


def test_fields_that_nobody_knows_are_ignored() -> None:
    command, _ = decode_command(b'{"cmd": "PRINT", "data": 1, "trace": [1, 2]}')
    assert (command.cmd, command.data_as(int)) == ("PRINT", 1)
    answer, _ = decode_answer(b'{"action": 0, "result": 1, "success": true, "err": "", "color": "red"}')
    assert answer.result == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float64).reshape(4, 3),
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3)),
        np.arange(10)[::2],
        np.array(["one", "zwölf"]),
        np.array([True, False]),
        np.empty((0, 3)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_comes_back(array: Any) -> None:
    contents = encode(Command(cmd="INFER", data={"name": "m"}), array)
    command, decoded = decode_command(contents)
    assert command.data_as(dict) == {"name": "m"}
    assert decoded is not None
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


def test_what_numpy_writes_is_read() -> None:
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    _, decoded = decode_command(binary(b'{"cmd": "INFER"}', npy(array)))
    np.testing.assert_array_equal(decoded, array)


def test_numpy_values_among_the_rows_are_sent() -> None:
    contents = encode(Command(cmd="INFER", data={"rows": [[np.float64(1.5), np.int64(2)], np.array([3.0, 4.0])]}))
    assert json.loads(contents)["data"]["rows"] == [[1.5, 2], [3.0, 4.0]]


def test_an_array_of_objects_is_not_sent() -> None:
    with pytest.raises(TypeError, match="only numbers and text"):
        encode(Command(cmd="INFER"), np.array([object()]))


GOOD = b'{"cmd": "INFER"}'
MATRIX = npy(np.zeros((2, 3)))


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\x01",
        b"\x01\xff\xff\xff\xff{}",
        b"not JSON",
        b"[]",
        b"{}",
        b'{"cmd": 1}',
        b"\x80\x04\x95.",
        binary(GOOD, b""),
        binary(GOOD, MATRIX[:-1]),
        binary(GOOD, MATRIX + b"\0"),
        binary(GOOD, MATRIX.replace(b"(2, 3)", b"(9, 3)")),
        binary(GOOD, MATRIX.replace(b"(2, 3)", b"(-2,3)")),
        binary(GOOD, MATRIX[:6] + b"\x02\x00" + MATRIX[8:]),
        binary(GOOD, MATRIX.replace(b"(2, 3)", b"(2,((")),
        binary(GOOD, MATRIX.replace(b"(2, 3)", b"      ")),
        binary(GOOD, npy(np.array([{"a": 1}]), allow_pickle=True)),
        binary(GOOD, npy(np.zeros(2, "datetime64[s]"))),
    ],
)
def test_bad_commands_are_refused(contents: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_command(contents)


@pytest.mark.parametrize(
    "contents",
    [
        b"not JSON",
        b'{"action": 0, "result": 1, "success": true}',
        b'{"action": 0, "success": true, "err": ""}',
        b'{"action": "0", "result": 1, "success": true, "err": ""}',
        b'{"action": 0, "result": 1, "success": 1, "err": ""}',
        b'{"action": 0, "result": 1, "success": true, "err": null}',
        b'{"action": 0, "result": ' + b"[" * 200_000 + b"]" * 200_000 + b', "success": true, "err": ""}',
    ],
)
def test_bad_answers_are_refused_with_their_start(contents: bytes) -> None:
    with pytest.raises(BadAnswer, match="is no answer"):
        decode_answer(contents)


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(contents: bytes) -> None:
    for given_contents in (contents, b"\x01\x02\0\0\0{}" + contents, b"\x01\x02\0\0\0{}\x93NUMPY\x01\0" + contents):
        try:
            decode_command(given_contents)
        except ValueError:
            continue


def test_errors_travel() -> None:
    answer, _ = decode_answer(encode_failure("too much", "Overloaded", 0.25))
    error = error_of(answer.kind, answer.err, answer.retry_after_s)
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after_s) == ("too much", 0.25)
    assert isinstance(error_of("ServerLost", "x", 0), ServerLost)
    assert type(error_of("SystemExit", "x", 0)) is CommandFailed


def test_an_error_is_shown_short_and_with_its_kind() -> None:
    assert show_error(KeyError("x")) == "KeyError: 'x'"
    assert show_error(ValueError("a plain one")) == "a plain one"
    assert show_error(CommandFailed("ours")) == "ours"
    assert len(show_error(TypeError("x" * 100_000))) == 2_000
    assert isinstance(decode_answer(encode_failure("x" * 100_000))[0], Answer)
