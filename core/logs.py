"""Logging set-up for every process: one line per record, JSON for machines or plain text for a terminal.

Messages are constant; what varies stands in `extra` and becomes fields. Never payloads, tokens or keys.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

import orjson

LogFormat = Literal["text", "json"]
# Text that came from a peer is cut to this in log fields.
MAX_PEER_TEXT_CHARS = 256
# Chosen: deeper chains say no more.
_MAX_CAUSES = 8

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(*, level: str, log_format: LogFormat) -> None:
    """Send every record of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def peer_text(text: str) -> str:
    """Return text from a peer, made safe for a log line: printable and bounded."""
    cut = text[:MAX_PEER_TEXT_CHARS]
    return cut if cut.isprintable() else "".join(char if char.isprintable() else "?" for char in cut)


class Withheld(Exception):
    """Stands in a log for an error whose text may quote what a peer has sent."""


def withheld(error: BaseException) -> tuple[type[Withheld], Withheld, TracebackType | None]:
    """Return what to log as `exc_info` of an error from the path of a request: where it was raised, and its class.

    Its text stays out, and so do those of the errors behind it: ONNX Runtime, codecs and Python quote the values that
    they refuse.
    """
    names = [type(error).__qualname__]
    cause = error.__cause__ or error.__context__
    while cause is not None and len(names) < _MAX_CAUSES:
        names.append(type(cause).__qualname__)
        cause = cause.__cause__ or cause.__context__
    return Withheld, Withheld(" from ".join(names)), error.__traceback__


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _OWN_FIELDS}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        own: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # The first `own` gives the order, the second keeps a field from posing as one of them.
        line = own | _fields(record) | own
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:
            # A lone surrogate or an integer over 64 bits: rare, and no reason to lose the line.
            return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (overrides the standard library's name)
        fields = " ".join(f"{key}={value}" for key, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line} [{fields}]" if fields else line
