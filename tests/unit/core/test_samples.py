"""Wire forms of hard examples: there and back, and nothing of a hostile peer gets through."""

import io
import json
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from core.digest import digest_of
from core.errors import IntegrityError, InvalidName, InvalidRequest
from core.ids import ModelName, checked_pull_id
from core.sample_file import MAX_DESCRIPTION_BYTES, read_description
from core.sample_folder import INDEX, SampleFolder
from core.samples import (
    MAX_COUNT_ROWS,
    MAX_LIMIT,
    MAX_SAMPLE_BYTES,
    SampleCount,
    SampleCounts,
    SampleName,
    SampleOffer,
    SampleOrder,
    decode_counts,
    decode_offer,
    decode_order,
    encode_counts,
    encode_offer,
    encode_order,
)
from protos.samples.v1 import samples_pb2 as pb
from tests.support.fuzzed import nearly
from tests.support.hard_examples import made_file

DIGEST = digest_of(b"sample")
PULL = "0123456789abcdef" * 2
INSTANTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
COUNTS = st.builds(
    SampleCount,
    st.sampled_from(["digits", "faces-2"]),
    st.none() | st.integers(0, (1 << 32) - 1),
    st.sampled_from(["low_confidence", "tied"]),
    st.integers(0, (1 << 63) - 1),
)


@given(limit=st.integers(1, MAX_LIMIT), since=st.none() | INSTANTS, expires_at=INSTANTS, permits_metered=st.booleans())
def test_orders_survive_the_wire(
    limit: int, since: datetime | None, expires_at: datetime, permits_metered: bool
) -> None:
    order = SampleOrder(PULL, ModelName("digits"), limit, since, expires_at, permits_metered)
    assert decode_order(pb.Order.FromString(encode_order(order).SerializeToString())) == order


@given(rows=st.lists(COUNTS, max_size=MAX_COUNT_ROWS), other=st.integers(0, 1 << 40))
def test_counts_survive_the_wire(rows: list[SampleCount], other: int) -> None:
    counts = SampleCounts(tuple(rows), other, 12345)
    assert decode_counts(pb.Counts.FromString(encode_counts(counts).SerializeToString())) == counts


@given(sizes=st.lists(st.integers(1, MAX_SAMPLE_BYTES), max_size=20), declined=st.sampled_from(["", "metered"]))
def test_offers_survive_the_wire(sizes: list[int], declined: str) -> None:
    offer = SampleOffer(PULL, tuple(SampleName(DIGEST, size) for size in sizes), declined)
    assert decode_offer(pb.OfferRequest.FromString(encode_offer(offer).SerializeToString())) == offer


GENUINE = [
    encode_offer(SampleOffer(PULL, (SampleName(DIGEST, 5),), "off")),
    encode_counts(SampleCounts((SampleCount("digits", 7, "tied", 3),), 1, 2)),
    encode_order(SampleOrder(PULL, ModelName("digits"), 5, None, datetime(2026, 1, 1, tzinfo=UTC))),
]


@given(content=nearly(GENUINE))
def test_whatever_a_peer_sends_is_taken_or_refused_as_invalid(content: bytes) -> None:
    decoders: list[Callable[[bytes], object]] = [
        lambda content: decode_offer(pb.OfferRequest.FromString(content)),
        lambda content: decode_counts(pb.Counts.FromString(content)),
        lambda content: decode_order(pb.Order.FromString(content)),
    ]
    for decode in decoders:
        try:
            decode(content)
        except (InvalidRequest, DecodeError):
            continue


@pytest.mark.parametrize(
    "message",
    [
        pb.OfferRequest(pull_id="..", samples=[]),
        pb.OfferRequest(pull_id=PULL, samples=[pb.SampleName(digest="sha256:x", size_bytes=1)]),
        pb.OfferRequest(pull_id=PULL, samples=[pb.SampleName(digest=DIGEST, size_bytes=0)]),
        pb.OfferRequest(pull_id=PULL, samples=[pb.SampleName(digest=DIGEST, size_bytes=MAX_SAMPLE_BYTES + 1)]),
        pb.OfferRequest(pull_id=PULL, samples=[pb.SampleName(digest=DIGEST, size_bytes=1)] * (MAX_LIMIT + 1)),
        pb.OfferRequest(pull_id=PULL, declined="<b>"),
    ],
)
def test_an_offer_beyond_the_bounds_is_refused(message: pb.OfferRequest) -> None:
    with pytest.raises(InvalidRequest):
        decode_offer(message)


def test_more_rows_than_promised_are_refused() -> None:
    row = pb.Count(model="digits", reason="tied", samples=1)
    with pytest.raises(InvalidRequest, match="at most 64 rows"):
        decode_counts(pb.Counts(rows=[row] * (MAX_COUNT_ROWS + 1)))


@pytest.mark.parametrize("text", ["", "../x", "0" * 31, "G" * 32, "0" * 33])
def test_what_is_no_id_of_a_pull_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        checked_pull_id(text)


# ---- the file -------------------------------------------------------------------------------------------------


@given(at=st.integers(0, 2000), cut=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_file_with_wrong_bytes_gives_a_description_or_is_refused(at: int, cut: int, byte: int) -> None:
    content = bytearray(made_file()[1])
    content[at % len(content)] = byte
    try:
        read_description(bytes(content[: max(1, cut)]))
    except IntegrityError:
        return


@given(content=st.binary(max_size=200))
def test_bytes_that_are_no_sample_are_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        read_description(content)


def test_a_description_that_inflates_beyond_the_bound_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sample.json", b" " * (MAX_DESCRIPTION_BYTES + 1))
    with pytest.raises(IntegrityError, match="description of at most"):
        read_description(buffer.getvalue())


# ---- the folder -----------------------------------------------------------------------------------------------


def test_a_folder_gets_files_and_an_index_the_oldest_first(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path / "hard")
    for mark, year in ((0.1, 2027), (0.2, 2026)):
        _, content = made_file(mark=mark, taken_at=datetime(year, 1, 1, tzinfo=UTC), label=year % 10)
        folder.add("gate-1", digest_of(content), content)
    assert folder.write_index() == 2
    lines = [json.loads(line) for line in (tmp_path / "hard" / INDEX).read_text().splitlines()]
    assert [(line["label"], line["agent"]) for line in lines] == [(6, "gate-1"), (7, "gate-1")]
    assert all((tmp_path / "hard" / line["file"]).is_file() for line in lines)


def test_bytes_of_another_digest_are_not_written(tmp_path: Path) -> None:
    _, content = made_file()
    with pytest.raises(IntegrityError):
        SampleFolder(tmp_path).add("gate-1", DIGEST, content)
    assert not list(tmp_path.iterdir())


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    _, content = made_file()
    with pytest.raises(InvalidName):
        SampleFolder(tmp_path / "hard").add("../gate-1", digest_of(content), content)
