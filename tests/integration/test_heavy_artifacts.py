"""A replica's fetches over mutual TLS: with the certificate that lies there at that moment, and from our controller."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from controller.heavy.artifacts import GrpcArtifacts
from core.addresses import Address
from core.digest import Digest, digest_of
from core.errors import Unavailable, UnknownModel
from core.grpc_transport import CHANNEL_OPTIONS, MUTUAL_TLS_OPTIONS
from core.spiffe import Role
from core.tls_files import read_tls_identity, write_tls_identity
from tests.support.certified import FleetAuthority
from tests.support.heavy_tier import BLOCK_BYTES, MemoryBlobs, SpanCollector, controller_side

BLOB = bytes(range(256)) * (BLOCK_BYTES // 100)
TIMEOUT_S = 10.0


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
async def controller(blobs: MemoryBlobs, tmp_path: Path) -> AsyncIterator[Address]:
    async with controller_side(blobs, SpanCollector(), tls_dir=tmp_path) as address:
        yield address


def artifacts(controller: Address, tls_dir: Path) -> GrpcArtifacts:
    def open_channel() -> grpc.Channel:
        credentials = read_tls_identity(tls_dir).channel_credentials()
        return grpc.secure_channel(str(controller), credentials, options=[*CHANNEL_OPTIONS, *MUTUAL_TLS_OPTIONS])

    return GrpcArtifacts(open_channel, fetch_timeout_s=TIMEOUT_S)


async def fetch(source: GrpcArtifacts, digest: Digest) -> bytes:
    return await asyncio.to_thread(lambda: b"".join(source.fetch(digest)))


async def test_a_blob_comes_in_order(controller: Address, blobs: MemoryBlobs, tmp_path: Path) -> None:
    assert await fetch(artifacts(controller, tmp_path), blobs.add(BLOB)) == BLOB


async def test_a_blob_that_is_nowhere_is_an_unknown_model(controller: Address, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no model has the digest"):
        await fetch(artifacts(controller, tmp_path), digest_of(b"nowhere"))


async def test_each_blob_is_fetched_with_the_certificate_of_the_moment(
    controller: Address, blobs: MemoryBlobs, tmp_path: Path
) -> None:
    source, ours = artifacts(controller, tmp_path), read_tls_identity(tmp_path)
    write_tls_identity(tmp_path, FleetAuthority().identity(Role.HEAVY))
    with pytest.raises(Unavailable, match="fetching sha256"):
        await fetch(source, blobs.add(BLOB))
    write_tls_identity(tmp_path, ours)
    assert await fetch(source, blobs.add(BLOB)) == BLOB
