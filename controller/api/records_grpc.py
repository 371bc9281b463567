"""RecordService: what agents write down, from the agent that the connection's certificate names."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeAlias

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from controller.records.model import HOUR, Event, HourUsage, Told
from core.errors import InvalidRequest, NanofleetError, TooLarge
from core.fleet_state import Usage
from core.ids import AgentId
from core.status import STATUS
from protos.records.v1 import records_pb2 as pb
from protos.records.v1.records_pb2_grpc import RecordServiceServicer

# As the proto says.
MAX_RECORDS, MAX_REQUEST_BYTES = 256, 1 << 20
_MAX_DEDUPE_CHARS, _MAX_ACTION_CHARS, _MAX_TARGET_CHARS, _MAX_DETAIL_CHARS = 128, 64, 128, 512
_MAX_NAME_CHARS = 64
# Derived: what every database's integers hold, with room to add up a fleet's.
_MAX_COUNT = 1 << 53
# Chosen: longer than anything waits, and it can be taken from any instant of ours.
_MAX_AGE = timedelta(days=3650)
# Trailing metadata by which we say when to come back.
RETRY_AFTER_KEY = "retry-after-ms"

Context: TypeAlias = "grpc.aio.ServicerContext[pb.AppendRequest, pb.AppendReply]"


class Taker(Protocol):
    """What is used of `records.service.Records`."""

    async def append(self, agent_id: AgentId, hours: list[HourUsage], events: list[Event]) -> None: ...

    def note_refused(self, count: int) -> None: ...


class RecordServicer(RecordServiceServicer):
    """`agent_of` says who calls."""

    def __init__(self, records: Taker, *, agent_of: Callable[[Context], AgentId]) -> None:
        self._records = records
        self._agent_of = agent_of

    async def Append(self, request: pb.AppendRequest, context: Context) -> pb.AppendReply:  # noqa: N802
        try:
            _require_bounds(request)
            hours, events, refused = _sorted(request)
            await self._records.append(self._agent_of(context), hours, events)
        except NanofleetError as error:
            if error.retry_after_s is not None:
                context.set_trailing_metadata(((RETRY_AFTER_KEY, str(int(error.retry_after_s * 1e3))),))
            await context.abort(STATUS[error.code].grpc, str(error))
        self._records.note_refused(len(refused))
        return pb.AppendReply(refused=refused)


def _require_bounds(request: pb.AppendRequest) -> None:
    if len(request.records) > MAX_RECORDS:
        raise TooLarge(f"records: expected at most {MAX_RECORDS}, got {len(request.records)}")
    if (size_bytes := request.ByteSize()) > MAX_REQUEST_BYTES:
        raise TooLarge(f"records: expected at most {MAX_REQUEST_BYTES} bytes, got {size_bytes}")


def _sorted(request: pb.AppendRequest) -> tuple[list[HourUsage], list[Event], list[pb.Refusal]]:
    """Tell apart what has a meaning here and what has none."""
    hours: list[HourUsage] = []
    events: list[Event] = []
    refused: list[pb.Refusal] = []
    for index, record in enumerate(request.records):
        try:
            if record.WhichOneof("body") == "usage":
                hours.append(_usage(record))
            else:
                # Without a body it is an event that says nothing, which has no meaning either.
                events.append(_event(record))
        except InvalidRequest as refusal:
            refused.append(pb.Refusal(index=index, reason=str(refusal)))
    return hours, events, refused


def _usage(record: pb.Record) -> HourUsage:
    usage = record.usage
    hour = _instant(usage.hour, "hour")
    if hour.timestamp() % HOUR.total_seconds():
        raise InvalidRequest(f"hour: expected the beginning of one, got {hour.isoformat()}")
    return HourUsage(
        _text(usage.boot_id, "boot_id", at_most=_MAX_NAME_CHARS, at_least=1),
        hour,
        _text(usage.model, "model", at_most=_MAX_NAME_CHARS),
        Usage(
            _number(usage.answered_edge, "answered_edge"),
            _number(usage.answered_heavy, "answered_heavy"),
            _number(usage.refused, "refused"),
            _number(usage.failed, "failed"),
        ),
        _told(record),
    )


def _event(record: pb.Record) -> Event:
    event = record.event
    return Event(
        _text(record.dedupe_id, "dedupe_id", at_most=_MAX_DEDUPE_CHARS, at_least=1),
        _text(event.action, "action", at_most=_MAX_ACTION_CHARS, at_least=1),
        _free_text(event.target, "target", at_most=_MAX_TARGET_CHARS),
        _free_text(event.detail, "detail", at_most=_MAX_DETAIL_CHARS),
        max(1, _number(event.count, "count")),
        _told(record),
    )


def _told(record: pb.Record) -> Told:
    return Told(_instant(record.recorded_at, "recorded_at"), _age(record.age))


def _age(age: Duration) -> timedelta:
    return min(_MAX_AGE, max(timedelta(), timedelta(seconds=min(age.seconds, 1 << 32), microseconds=age.nanos // 1000)))


def _instant(stamp: Timestamp, name: str) -> datetime:
    try:
        return stamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name}: expected an instant, got {stamp.seconds} s") from error


def _number(number: int, name: str) -> int:
    if number > _MAX_COUNT:
        raise InvalidRequest(f"{name}: expected at most {_MAX_COUNT}, got {number}")
    return number


def _text(text: str, name: str, *, at_most: int, at_least: int = 0) -> str:
    if not at_least <= len(text) <= at_most or not (text.isascii() and text.isprintable()):
        raise InvalidRequest(f"{name}: expected {at_least} to {at_most} printable ASCII characters, got {text[:80]!r}")
    return text


def _free_text(text: str, name: str, *, at_most: int) -> str:
    if len(text) > at_most:
        raise InvalidRequest(f"{name}: expected at most {at_most} characters, got {len(text)}")
    return text
