"""Servers of metadata that never come to an end: A11 and A12 with real sockets. Everything ends within its bound."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError

from core.errors import NanofleetError, Unavailable
from edge_agent.trust.fetchers import FromController, FromHttp, Pace
from tests.support.catalogue_port import CataloguePort, catalogue_source, http_server
from tests.support.catalogue_side import CatalogueSide
from tests.support.trusting_device import AGENT, TrustingDevice, desired_of, release_of

MADE = release_of()
BRISK = Pace(min_bytes_per_s=10_000, grace_s=0.2, idle_s=0.3, message_s=0.3)
BOUND_S = 5.0


@pytest.fixture
def side() -> CatalogueSide:
    side = CatalogueSide()
    side.add_family("digits")
    side.release(MADE)
    side.publish()
    return side


def test_A11_an_http_body_without_end_is_cut_off() -> None:
    with (
        http_server(pieces=itertools.repeat(bytes(1 << 16))) as url,
        pytest.raises(DownloadLengthMismatchError, match="exceeding"),
    ):
        FromHttp(pace=BRISK).download_bytes(f"{url}/timestamp.json", 16_384)


async def test_A11_a_message_that_is_too_large_is_refused(side: CatalogueSide, tmp_path: Path) -> None:
    side.files["timestamp.json"] = bytes(6_000_000)
    with pytest.raises(NanofleetError):
        await _asked_of(CataloguePort(side.files), side, tmp_path, pace=Pace())


def test_A12_an_http_server_that_drips_is_given_up() -> None:
    started_s = time.monotonic()
    with http_server(pieces=_drops()) as url, pytest.raises(SlowRetrievalError, match="expected at least 10000 bytes"):
        FromHttp(pace=BRISK).download_bytes(f"{url}/timestamp.json", 16_384)
    assert time.monotonic() - started_s < BOUND_S


def test_A12_an_http_server_that_falls_silent_is_given_up() -> None:
    silence = threading.Event()
    with http_server(pieces=_silence(silence)) as url:
        with pytest.raises(SlowRetrievalError, match="silent"):
            FromHttp(pace=BRISK).download_bytes(f"{url}/timestamp.json", 16_384)
        silence.set()


async def test_A12_a_controller_that_does_not_answer_is_given_up(side: CatalogueSide, tmp_path: Path) -> None:
    port = CataloguePort(side.files)
    port.answers.clear()
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="deadline_exceeded"):
        await _asked_of(port, side, tmp_path, pace=BRISK)
    assert time.monotonic() - started_s < BOUND_S


async def test_a_controller_that_answers_is_all_that_is_needed(side: CatalogueSide, tmp_path: Path) -> None:
    port = CataloguePort(side.files)
    await _asked_of(port, side, tmp_path, pace=Pace())
    version = side.snapshot.version
    assert port.asked[:3] == ["2.root.json", "timestamp.json", f"{version}.snapshot.json"]


def test_a_truncated_body_is_no_file() -> None:
    with http_server(pieces=iter([b"{}"]), length=20) as url, pytest.raises(DownloadError):
        FromHttp(pace=BRISK).download_bytes(f"{url}/timestamp.json", 16_384)


def test_a_scheme_that_reads_local_files_is_refused() -> None:
    with pytest.raises(DownloadError, match="expected http or https"):
        FromHttp(pace=BRISK).download_bytes("file:///etc/hostname", 16_384)


def test_a_server_that_is_away_is_a_failed_download() -> None:
    with http_server(pieces=iter(())) as url:
        pass
    with pytest.raises(DownloadError) as caught:
        FromHttp(pace=BRISK).download_bytes(f"{url}/timestamp.json", 16_384)
    assert not isinstance(caught.value, DownloadHTTPError)


def _drops() -> Iterator[bytes]:
    for _ in range(200):
        time.sleep(0.02)
        yield b"x"


def _silence(until: threading.Event) -> Iterator[bytes]:
    yield b"x"
    until.wait(BOUND_S)


async def _asked_of(port: CataloguePort, side: CatalogueSide, folder: Path, *, pace: Pace) -> None:
    signed = replace(side.assignment(desired_of(MADE, now=side.now)), catalogue=())
    device = TrustingDevice(folder / "trust", side)
    async with catalogue_source(port, agent=AGENT) as source:
        fetcher = FromController(source, pace=pace)
        try:
            answer = await asyncio.to_thread(device.admits, signed, live=fetcher)
        finally:
            fetcher.close()
    assert MADE.digest in answer.allowed
