"""Log lines: constant message, fields beside it, and one line per record whatever is in them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from core.logs import MAX_PEER_TEXT_CHARS, JsonFormatter, TextFormatter, peer_text, withheld


def record(message: str = "request refused", **fields: Any) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "edge_agent.front", "levelno": logging.INFO, "levelname": "INFO", "msg": message}
    )
    vars(made).update(fields)
    return made


def json_line(made: logging.LogRecord) -> dict[str, Any]:
    text = JsonFormatter().format(made)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_json_line_has_message_and_fields() -> None:
    line = json_line(record(model="digits", size_bytes=7))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO", "logger": "edge_agent.front", "message": "request refused", "model": "digits", "size_bytes": 7,
    }  # fmt: skip


def test_a_field_cannot_pose_as_the_level_or_the_time() -> None:
    line = json_line(record(level="ERROR", time="never", logger="other"))
    assert (line["level"], line["logger"]) == ("INFO", "edge_agent.front")
    assert line["time"] != "never"


@pytest.mark.parametrize("value", ["\ud800", 1 << 80, object(), Path("a"), b"\xff", {1: 2}, float("nan"), "two\nlines"])
def test_no_value_of_a_field_loses_the_line(value: Any) -> None:
    assert "field" in json_line(record(field=value))


def test_a_traceback_stands_in_one_field() -> None:
    error = LookupError("why")
    made = record(exc_info=(type(error), error, None))
    assert "LookupError: why" in json_line(made)["exception"]
    assert "LookupError: why" in TextFormatter().format(made)


def test_a_text_line_has_its_fields_in_brackets() -> None:
    assert TextFormatter().format(record(model="digits")).endswith("edge_agent.front: request refused [model=digits]")
    assert TextFormatter().format(record()).endswith("edge_agent.front: request refused")


def test_text_of_a_peer_is_bounded_and_printable() -> None:
    assert peer_text("a\nb\x1b[31m\u202e") == "a?b?[31m?"
    assert len(peer_text("x" * 10_000)) == MAX_PEER_TEXT_CHARS


def fail_on(payload: str) -> None:
    try:
        int(payload)
    except ValueError as error:
        raise RuntimeError(payload) from error


def test_an_error_is_logged_with_where_and_what_it_was_but_without_its_text() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_on("secret-42")
    line = JsonFormatter().format(record(exc_info=withheld(caught.value)))
    assert "RuntimeError from ValueError" in line
    assert "in fail_on" in line
    assert "secret-42" not in line.replace('fail_on(\\"secret-42\\")', "")


def test_a_chain_of_errors_is_named_within_a_bound() -> None:
    error: BaseException = ValueError()
    for _ in range(100):
        behind, error = error, KeyError()
        error.__cause__ = behind
    assert str(withheld(error)[1]).count("KeyError") == 8
