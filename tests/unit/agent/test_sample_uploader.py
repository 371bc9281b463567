"""SampleUploader: orders, offers, what may leave, and what happens when the controller goes away meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from core.digest import Digest, digest_of
from core.errors import Forbidden, NanofleetError, Unavailable
from core.ids import ModelName
from core.samples import SampleName, SampleOffer, SampleOrder
from edge_agent.samples.store import KeptSample, SampleStore, StoreBounds
from edge_agent.samples.uploader import MAX_ATTEMPTS, MAX_ORDERS, SampleUploader, UploadTerms
from tests.support.clocks import HeldClock
from tests.support.hard_examples import TAKEN_AT, made_file

PULL = "0" * 32


class FakeCalls:
    """A controller that wants whatever it has not got; `faults` are raised first, one a call."""

    def __init__(self) -> None:
        self.offers: list[SampleOffer] = []
        self.spooled: dict[str, bytes] = {}
        self.faults: list[NanofleetError] = []
        self.fails_every = 0
        self.uploads = 0

    async def offer(self, offer: SampleOffer) -> Sequence[Digest]:
        self.offers.append(offer)
        self._fail()
        return [name.digest for name in offer.samples if name.digest not in self.spooled]

    async def upload(self, pull_id: str, name: SampleName, content: bytes) -> None:
        self._fail()
        self.uploads += 1
        if self.fails_every and self.uploads % self.fails_every == 0:
            raise Unavailable("cut off")
        assert pull_id == PULL
        assert digest_of(content) == name.digest
        self.spooled[name.digest] = content

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)


@pytest.fixture
def disk() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(tmp_path, StoreBounds(reserve_bytes=0))


@pytest.fixture
async def calls() -> FakeCalls:
    return FakeCalls()


def put(store: SampleStore, second: int = 0, *, privacy: str = "any", model: str = "digits") -> KeptSample:
    at = TAKEN_AT + timedelta(seconds=second)
    return store.put(*made_file(taken_at=at, mark=second / 10, privacy=privacy, model=model), now=at)


def order(*, limit: int = 10, permits_metered: bool = False, valid_s: float = 60.0) -> SampleOrder:
    expires_at = HeldClock().now() + timedelta(seconds=valid_s)
    return SampleOrder(PULL, ModelName("digits"), limit, None, expires_at, permits_metered)


async def _at_once(_seconds: float) -> None:
    return None


FREE = UploadTerms(lambda _: True)


@asynccontextmanager
async def running(
    calls: FakeCalls,
    store: SampleStore,
    disk: Executor,
    *,
    terms: UploadTerms = FREE,
    paused_s: list[float] | None = None,
) -> AsyncIterator[SampleUploader]:
    def pause(seconds: float) -> "asyncio.Future[None]":
        if paused_s is not None:
            paused_s.append(seconds)
        return asyncio.ensure_future(_at_once(seconds))

    subject = SampleUploader(calls, store, terms, disk=disk, clock=HeldClock(), pause=pause)
    task = asyncio.create_task(subject.run())
    try:
        async with asyncio.timeout(10):
            yield subject
    finally:
        task.cancel()
        await asyncio.wait([task])


async def idle(subject: SampleUploader) -> None:
    while subject._orders:
        await asyncio.sleep(0)


async def test_what_is_ordered_is_uploaded_and_the_last_offer_says_that_all_is_there(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    kept = [put(store, second) for second in range(3)]
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert calls.spooled.keys() == {each.digest for each in kept}
    assert len(calls.offers) == 2
    assert subject.uploaded == 3
    # They stay for whoever pulls next.
    assert len(store.all()) == 3


async def test_only_the_newest_go_when_the_order_wants_fewer(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    kept = [put(store, second) for second in range(5)]
    async with running(calls, store, disk) as subject:
        subject.order(order(limit=2))
        await idle(subject)
    assert calls.spooled.keys() == {each.digest for each in kept[3:]}


async def test_what_may_not_leave_the_site_is_neither_offered_nor_uploaded(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    put(store, 0, privacy="site")
    open_ = put(store, 1)
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert calls.spooled.keys() == {open_.digest}
    assert [name.digest for name in calls.offers[0].samples] == [open_.digest]


async def test_a_site_sample_under_the_name_of_an_open_one_stays(
    calls: FakeCalls, store: SampleStore, disk: Executor, tmp_path: Path
) -> None:
    kept = put(store, 0, privacy="site")
    path = tmp_path / kept.file_name
    path.rename(tmp_path / kept.file_name.replace("~site~", "~any~"))
    store.look()
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert not calls.spooled


async def test_a_metered_agent_delivers_only_with_a_persons_word(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    put(store)
    async with running(calls, store, disk, terms=UploadTerms(lambda _: True, is_metered=True)) as subject:
        subject.order(order())
        await idle(subject)
        assert [offer.declined for offer in calls.offers] == ["metered"]
        assert not calls.spooled
        subject.order(order(permits_metered=True))
        await idle(subject)
    assert len(calls.spooled) == 1


async def test_what_was_kept_before_a_model_was_switched_off_stays_and_that_is_said(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    put(store)
    async with running(calls, store, disk, terms=UploadTerms(lambda model: model != "digits")) as subject:
        subject.order(order())
        await idle(subject)
    assert calls.offers == [SampleOffer(PULL, declined="off")]


async def test_a_transfer_that_broke_off_goes_on_where_it_was(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    for second in range(3):
        put(store, second)
    async with running(calls, store, disk) as subject:
        calls.faults = [Unavailable("away")]
        subject.order(order())
        await idle(subject)
        assert len(calls.spooled) == 3
        uploads_before = subject.uploaded
        subject.order(order())
        await idle(subject)
    assert subject.uploaded == uploads_before == 3


async def test_a_controller_that_stays_away_is_left_alone_until_the_next_session(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    put(store)
    calls.faults = [Unavailable("away") for _ in range(50)]
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert len(calls.offers) == MAX_ATTEMPTS


async def test_whoever_gets_on_between_the_failures_gets_to_the_end(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    for second in range(3 * MAX_ATTEMPTS):
        put(store, second)
    async with running(calls, store, disk) as subject:
        # Every second upload breaks off.
        calls.fails_every = 2
        subject.order(order(limit=100))
        await idle(subject)
    assert len(calls.spooled) == 3 * MAX_ATTEMPTS


async def test_a_refusal_for_good_is_not_tried_again(calls: FakeCalls, store: SampleStore, disk: Executor) -> None:
    put(store)
    calls.faults = [Forbidden("this pull is over")]
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert len(calls.offers) == 1


async def test_an_order_that_nobody_waits_for_any_more_is_dropped(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    put(store)
    async with running(calls, store, disk) as subject:
        subject.order(order(valid_s=0.0))
        await idle(subject)
    assert not calls.offers


async def test_a_damaged_sample_is_left_out_and_the_others_go(
    calls: FakeCalls, store: SampleStore, disk: Executor, tmp_path: Path
) -> None:
    damaged, whole = put(store, 0), put(store, 1)
    (tmp_path / damaged.file_name).write_bytes(b"half")
    async with running(calls, store, disk) as subject:
        subject.order(order())
        await idle(subject)
    assert calls.spooled.keys() == {whole.digest}


async def test_orders_are_bounded(calls: FakeCalls, store: SampleStore, disk: Executor) -> None:
    subject = SampleUploader(calls, store, FREE, disk=disk, clock=HeldClock())
    for number in range(MAX_ORDERS + 3):
        subject.order(SampleOrder(f"{number:032x}", ModelName("digits"), 1, None, HeldClock().now()))
    assert len(subject._orders) == MAX_ORDERS


async def test_uploads_leave_room_on_the_link_for_requests(
    calls: FakeCalls, store: SampleStore, disk: Executor
) -> None:
    kept = [put(store, second) for second in range(3)]
    paused_s: list[float] = []
    terms = UploadTerms(lambda _: True, bytes_per_s=100.0)
    async with running(calls, store, disk, terms=terms, paused_s=paused_s) as subject:
        subject.order(order())
        await idle(subject)
    assert sum(paused_s) == pytest.approx(sum(each.size_bytes for each in kept) / 100)
