"""Hard examples as values: what a controller orders of an agent, what an agent says it keeps, and their wire forms.

The file that a sample is stored, sent and handed out as is in `core.sample_file`. Decoding checks everything a peer can
send; what does not fit raises InvalidRequest.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from core.digest import Digest, parse_digest
from core.errors import InvalidRequest
from core.ids import ModelName, checked_name, checked_pull_id
from protos.samples.v1 import samples_pb2 as pb

# Chosen: retraining takes hundreds; more come with the next pull.
MAX_LIMIT = 2000
# As promised in samples.proto.
MAX_COUNT_ROWS = 64
MAX_CHUNK_BYTES = 1 << 18
# Derived: the largest request that an agent takes by default, its outputs, and those of the heavy tier.
MAX_SAMPLE_BYTES = 16 << 20
# What fits into a signed 64-bit column.
_MAX_NUMBER = (1 << 63) - 1
_WORD = re.compile(r"[a-z_]{1,32}")


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """What an agent shall deliver: at most `limit` samples of `model`, the newest, taken at `since` or later."""

    pull_id: str
    model: ModelName
    limit: int
    since: datetime | None
    expires_at: datetime
    # A person's word that a metered agent may upload whole samples.
    permits_metered: bool = False


class SampleName(NamedTuple):
    digest: Digest
    size_bytes: int


class SampleCount(NamedTuple):
    """`label` is the class that the edge model predicted; None: its outputs named none."""

    model: str
    label: int | None
    reason: str
    samples: int


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What an agent keeps; `other` is the sum of what has no row."""

    rows: tuple[SampleCount, ...] = ()
    other: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SampleOffer:
    """What an agent has for a pull; `declined` says why nothing will come, and is empty otherwise."""

    pull_id: str
    samples: tuple[SampleName, ...] = ()
    declined: str = ""


NO_SAMPLES = SampleCounts()


def encode_order(order: SampleOrder) -> pb.Order:
    message = pb.Order(
        pull_id=order.pull_id, model=order.model, limit=order.limit, permits_metered=order.permits_metered
    )
    message.expires_at.FromDatetime(order.expires_at)
    if order.since is not None:
        message.since.FromDatetime(order.since)
    return message


def decode_order(message: pb.Order) -> SampleOrder:
    if not 1 <= message.limit <= MAX_LIMIT:
        raise InvalidRequest(f"order: expected a limit of 1 to {MAX_LIMIT}, got {message.limit}")
    try:
        since = message.since.ToDatetime(UTC) if message.HasField("since") else None
        expires_at = message.expires_at.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest("order: expected instants of this era in since and expires_at") from error
    return SampleOrder(
        checked_pull_id(message.pull_id),
        ModelName(checked_name(message.model, kind="model")),
        message.limit,
        since,
        expires_at,
        message.permits_metered,
    )


def encode_counts(counts: SampleCounts) -> pb.Counts:
    rows = [pb.Count(model=row.model, label=row.label, reason=row.reason, samples=row.samples) for row in counts.rows]
    return pb.Counts(rows=rows, other=counts.other, size_bytes=counts.size_bytes)


def decode_counts(message: pb.Counts) -> SampleCounts:
    if len(message.rows) > MAX_COUNT_ROWS:
        raise InvalidRequest(f"counts: expected at most {MAX_COUNT_ROWS} rows, got {len(message.rows)}")
    return SampleCounts(
        tuple(_decode_count(row) for row in message.rows),
        _number("other", message.other),
        _number("size_bytes", message.size_bytes),
    )


def encode_offer(offer: SampleOffer) -> pb.OfferRequest:
    return pb.OfferRequest(
        pull_id=offer.pull_id, samples=[encode_name(each) for each in offer.samples], declined=offer.declined
    )


def decode_offer(message: pb.OfferRequest) -> SampleOffer:
    if len(message.samples) > MAX_LIMIT:
        raise InvalidRequest(f"offer: expected at most {MAX_LIMIT} samples, got {len(message.samples)}")
    declined = "" if not message.declined else _word("declined", message.declined)
    return SampleOffer(checked_pull_id(message.pull_id), tuple(decode_name(each) for each in message.samples), declined)


def encode_name(name: SampleName) -> pb.SampleName:
    return pb.SampleName(digest=name.digest, size_bytes=name.size_bytes)


def decode_name(message: pb.SampleName) -> SampleName:
    if not 1 <= message.size_bytes <= MAX_SAMPLE_BYTES:
        raise InvalidRequest(f"sample: expected 1 to {MAX_SAMPLE_BYTES} bytes, got {message.size_bytes}")
    return SampleName(parse_digest(message.digest), message.size_bytes)


def _decode_count(row: pb.Count) -> SampleCount:
    return SampleCount(
        checked_name(row.model, kind="model"),
        row.label if row.HasField("label") else None,
        _word("reason", row.reason),
        _number("samples", row.samples),
    )


def _word(where: str, text: str) -> str:
    if _WORD.fullmatch(text) is None:
        raise InvalidRequest(f"{where}: expected a word of up to 32 small letters and _, got {text[:80]!r}")
    return text


def _number(where: str, value: int) -> int:
    if value > _MAX_NUMBER:
        raise InvalidRequest(f"{where}: expected at most {_MAX_NUMBER}, got {value}")
    return value
