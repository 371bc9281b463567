"""What goes to the controller's RecordService: how records are written down here, and how they are delivered.

The body of a row of kind `audit` or `usage` is a Record without its age, which is told when it leaves.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from core.errors import NanofleetError, Unavailable
from core.logs import peer_text
from core.status import error_from_grpc
from edge_agent.outbox.rows import Row
from protos.records.v1 import records_pb2 as pb
from protos.records.v1.records_pb2_grpc import RecordServiceStub

SEND_TIMEOUT_S = 20.0
# Trailing metadata by which a controller says when to come back, in milliseconds.
RETRY_AFTER_KEY = "retry-after-ms"
# Chosen: a controller may not send an agent away for longer than this.
MAX_RETRY_AFTER_S = 3600.0
# Derived: what the proto says of texts.
MAX_ACTION_CHARS, MAX_TARGET_CHARS, MAX_DETAIL_CHARS = 64, 128, 512


def event_body(action: str, target: str, detail: str, *, count: int, dedupe_id: str, at: datetime) -> bytes:
    event = pb.Event(
        action=action[:MAX_ACTION_CHARS],
        target=target[:MAX_TARGET_CHARS],
        detail=detail[:MAX_DETAIL_CHARS],
        count=count,
    )
    return _record(dedupe_id, at, event=event)


def usage_body(usage: pb.Usage, *, dedupe_id: str, at: datetime) -> bytes:
    return _record(dedupe_id, at, usage=usage)


def _record(dedupe_id: str, at: datetime, *, usage: pb.Usage | None = None, event: pb.Event | None = None) -> bytes:
    record = pb.Record(dedupe_id=dedupe_id, usage=usage, event=event)
    record.recorded_at.FromDatetime(at.astimezone(UTC))
    return record.SerializeToString()


class RecordReceiver:
    """The controller, over a borrowed channel; `age_s` says how old a row is now."""

    def __init__(self, channel: grpc.aio.Channel, *, age_s: Callable[[Row], float]) -> None:
        self._stub = RecordServiceStub(channel)
        self._age_s = age_s

    async def send(self, rows: Sequence[Row]) -> Sequence[int]:
        records = [self._aged(row) for row in rows]
        # A body that does not parse was damaged on disk: nobody would take it.
        places = [place for place, record in enumerate(records) if record is not None]
        request = pb.AppendRequest(records=[record for record in records if record is not None])
        damaged = sorted(frozenset(range(len(rows))) - frozenset(places))
        if not places:
            return damaged
        try:
            reply = await self._stub.Append(request, timeout=SEND_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        return [*damaged, *(places[refusal.index] for refusal in reply.refused if refusal.index < len(places))]

    def _aged(self, row: Row) -> pb.Record | None:
        try:
            record = pb.Record.FromString(row.body)
        except DecodeError:
            return None
        record.age.FromMicroseconds(int(self._age_s(row) * 1e6))
        return record


def _failure(error: grpc.aio.AioRpcError) -> NanofleetError:
    text = f"records: {peer_text(error.details() or error.code().name)}"
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        # A controller of an older release, which will be upgraded.
        return Unavailable(text)
    failure = error_from_grpc(error.code(), text)
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY and isinstance(value, str) and value.isdecimal() and len(value) < 10:
            failure.retry_after_s = min(MAX_RETRY_AFTER_S, int(value) / 1e3)
    return failure
