"""The pages as a browser gets them: rendered from real features, refused where they must be, events and assets."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from starlette.requests import Request

from controller.access.model import Caller, OperatorRole
from controller.dashboard.events import Events
from core.errors import InvalidRequest, Overloaded
from core.fleet_state import Energy, EnergyMethod, Problem
from tests.support.guarded import OWN_ORIGIN, GuardedSide, guarded_side
from tests.support.operator_side import ScriptedAgent
from tests.support.trace_store import made_span
from tests.support.vitals_values import made_vitals

HERE = {"origin": OWN_ORIGIN}
PAGES = ("/", "/latency", "/traces", "/devices", "/models", "/audit")


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedSide]:
    async with guarded_side(tmp_path) as made:
        yield made


async def signed_in(guarded: GuardedSide, role: OperatorRole = OperatorRole.VIEWER) -> httpx.AsyncClient:
    browser = guarded.browser()
    response = await browser.post("/sign-in", data={"secret": guarded.secrets[role]}, headers=HERE)
    assert response.status_code == 303
    return browser


@pytest.mark.parametrize("path", PAGES)
async def test_every_page_of_an_empty_controller_says_what_to_do(guarded: GuardedSide, path: str) -> None:
    response = await (await signed_in(guarded)).get(path)

    assert response.status_code == 200
    assert "<main" in response.text
    policy = response.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "style-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert ("unsafe-inline" in policy) is (path == "/latency")
    assert response.headers["cache-control"] == "no-store"


async def test_no_page_holds_a_script_or_a_style_of_its_own(guarded: GuardedSide) -> None:
    browser = await signed_in(guarded)

    for path in PAGES:
        text = (await browser.get(path)).text
        assert "<style" not in text
        assert " style=" not in text
        assert text.count("<script") == text.count('<script src="/assets/') + text.count(
            '<script type="module" src="/assets/'
        ) + text.count('<script defer src="/assets/')


async def test_a_device_with_a_failure_shows_the_reason_and_its_remedy(guarded: GuardedSide) -> None:
    agent = ScriptedAgent("gate-1", "north")
    await agent.connect(guarded.side)
    browser = await signed_in(guarded)

    listed, shown = await browser.get("/devices?q=gate"), await browser.get("/devices/gate-1")

    assert "gate-1" in listed.text
    assert "online" in shown.text
    assert "It shall run nothing" in shown.text
    await agent.disconnect(guarded.side)


@pytest.mark.parametrize(
    ("energy", "said"),
    [
        (Energy(EnergyMethod.RAPL, 50.0, 100, 0.5, 8.0, 10), "0.5 W, 0.8 J an answer, last minute; 0.5 J an answer"),
        (Energy(EnergyMethod.MODEL, 50.0, 0, 0.5, 8.0, 0), "0.5 W, no answers, last minute; no answers"),
        (None, ""),
    ],
    ids=["measured", "without answers", "unknown"],
)
async def test_what_an_agent_s_work_takes_is_shown_with_its_method(
    guarded: GuardedSide, energy: Energy | None, said: str
) -> None:
    agent = ScriptedAgent("gate-1", "north", vitals=made_vitals(energy=energy))
    await agent.connect(guarded.side)

    shown = (await (await signed_in(guarded)).get("/devices/gate-1")).text

    assert said in shown
    assert ("Energy (" in shown) is (energy is not None)
    if energy is not None:
        assert f"Energy ({energy.method.value})" in shown
    await agent.disconnect(guarded.side)


async def test_what_an_agent_says_is_shown_without_its_markup(guarded: GuardedSide) -> None:
    agent = ScriptedAgent("gate-1", "north", refuses_with=Problem("<b>", "<script>alert(1)</script>"))
    await agent.connect(guarded.side)
    guarded.side.traces.take_in([made_span(1, "process <script>", attributes={"<b>": "<i>"})])
    await guarded.side.traces.flush()
    browser = await signed_in(guarded)

    for path in ("/", "/devices", "/devices/gate-1", "/latency", "/traces", f"/traces/{1:032x}"):
        text = (await browser.get(path)).text
        assert "<script>" not in text
        assert "<i>" not in text
    assert "process &lt;script&gt;" in text
    await agent.disconnect(guarded.side)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/devices/nobody", 404, "never seen here"),
        ("/models/nothing", 404, "nothing"),
        (f"/traces/{7:032x}", 404, "not among the recent spans"),
        ("/latency?stage=edge.lunch", 400, "stage: expected one of"),
        ("/devices?page=x", 400, "the address of this page"),
        ("/devices?state=asleep", 400, "state: expected one of"),
        ("/traces?from_us=-1", 400, "the address of this page"),
    ],
)
async def test_what_is_refused_is_a_page_that_says_why(
    guarded: GuardedSide, path: str, status: int, words: str
) -> None:
    response = await (await signed_in(guarded)).get(path)

    assert response.status_code == status
    assert response.headers["content-type"].startswith("text/html")
    assert words in response.text.replace("no model", "nothing")


async def test_the_figures_of_the_charts_come_as_json(guarded: GuardedSide) -> None:
    now_us = int(time.time() * 1e6)
    guarded.side.traces.take_in([made_span(n, "process m", start_us=now_us, duration_us=n * 100) for n in range(1, 9)])
    await guarded.side.traces.flush()

    figures = (await (await signed_in(guarded)).get("/dashboard/latency?range=1h&model=m")).json()

    assert figures["count"] == 8


async def test_actions_are_off_for_a_viewer_and_on_for_an_operator(guarded: GuardedSide) -> None:
    for role, may in ((OperatorRole.VIEWER, False), (OperatorRole.OPERATOR, True)):
        agent = ScriptedAgent(f"gate-{role.value}", "north")
        await agent.connect(guarded.side)
        text = (await (await signed_in(guarded, role)).get(f"/devices/gate-{role.value}")).text
        assert ("may look" in text) is not may
        await agent.disconnect(guarded.side)


# ---- assets -----------------------------------------------------------------------------------------------------


async def test_assets_are_kept_for_long_when_asked_for_by_digest_and_looked_at_again_otherwise(
    guarded: GuardedSide,
) -> None:
    page = (await (await signed_in(guarded)).get("/latency")).text
    addresses = [part.split('"')[0] for part in page.split('"/assets/')[1:]]
    assert any(address.startswith("plotly.js") for address in addresses)

    for address in addresses:
        exact = await guarded.browser().get(f"/assets/{address}")
        assert exact.status_code == 200
        assert "immutable" in exact.headers["cache-control"]
        name = address.partition("?")[0]
        loose = await guarded.browser().get(f"/assets/{name}")
        assert loose.headers["cache-control"] == "no-cache"
        again = await guarded.browser().get(f"/assets/{name}", headers={"if-none-match": loose.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        plain = await guarded.browser().get(f"/assets/{name}", headers={"accept-encoding": "identity"})
        assert plain.content == exact.content


async def test_there_is_no_way_out_of_the_folder_of_assets(guarded: GuardedSide) -> None:
    browser = await signed_in(guarded)
    for name in ("nothing.js", "..%2Fpages.py", "%2e%2e%2fpages.py", "%2Fetc%2Fpasswd"):
        response = await browser.get(f"/assets/{name}")
        assert "import" not in response.text
        assert "root:" not in response.text
    assert (await browser.get("/assets/nothing.js")).status_code == 404


# ---- events -----------------------------------------------------------------------------------------------------


class Told:
    """A stream of events, read message by message."""

    def __init__(self, events: Events, request: Request) -> None:
        self._events = events
        self._request = request

    async def __aenter__(self) -> "Told":
        response = await self._events.stream(self._request)
        self._messages = response.body_iterator  # type: ignore[attr-defined]  # it streams
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._messages.aclose()

    async def next(self) -> str:
        return str(await asyncio.wait_for(anext(self._messages), 5))

    async def is_over(self) -> bool:
        try:
            await self.next()
        except StopAsyncIteration:
            return True
        return False


async def a_request(guarded: GuardedSide) -> tuple[Request, str]:
    """Return a request of a browser that is signed in, and the token of its session."""
    done = await guarded.access.sign_in(guarded.secrets[OperatorRole.VIEWER], source="here")
    headers = [(b"cookie", f"nanofleet-session={done.token}".encode())]
    caller = Caller(done.operator, done.session)
    return Request({"type": "http", "headers": headers, "state": {"caller": caller}, "client": None}), done.token


def events_of(guarded: GuardedSide, numbers: list[int], *, max_streams: int = 8) -> Events:
    return Events(
        guarded.access,
        fleet=lambda: numbers[0],
        traces=lambda: numbers[1],
        tick_s=0.001,
        heartbeat_s=0.003,
        max_streams=max_streams,
    )


async def test_a_stream_tells_what_changed_and_beats_meanwhile(guarded: GuardedSide) -> None:
    numbers = [1, 1]
    request, _ = await a_request(guarded)
    async with Told(events_of(guarded, numbers), request) as told:
        assert (await told.next()).startswith("retry:")
        assert await told.next() == 'event: changed\ndata: {"fleet":1,"traces":1}\n\n'
        assert await told.next() == ":\n\n"
        numbers[1] = 2
        while (message := await told.next()) == ":\n\n":
            pass
        assert '{"fleet":1,"traces":2}' in message


async def test_a_stream_ends_with_its_session(guarded: GuardedSide) -> None:
    request, _ = await a_request(guarded)
    caller: Caller = request.scope["state"]["caller"]
    async with Told(events_of(guarded, [1, 1]), request) as told:
        for _ in range(3):
            await told.next()
        assert caller.session is not None
        await guarded.access.sign_out(caller.session)
        while (message := await told.next()) == ":\n\n":
            pass
        assert message.startswith("event: ended\ndata: session:")
        assert await told.is_over()


async def test_every_stream_ends_when_the_controller_stops(guarded: GuardedSide) -> None:
    request, _ = await a_request(guarded)
    events = events_of(guarded, [1, 1])
    async with Told(events, request) as told:
        await told.next()
        events.end()
        assert await told.is_over()


async def test_streams_are_bounded_and_one_that_ends_makes_room(guarded: GuardedSide) -> None:
    request, _ = await a_request(guarded)
    events = events_of(guarded, [1, 1], max_streams=1)
    async with Told(events, request) as told:
        await told.next()
        with pytest.raises(Overloaded, match="at most 1 streams"):
            await events.stream(request)
    async with Told(events, request) as told:
        assert await told.next()


async def test_a_program_gets_no_stream(guarded: GuardedSide) -> None:
    request, _ = await a_request(guarded)
    caller: Caller = request.scope["state"]["caller"]
    request.scope["state"]["caller"] = Caller(caller.operator)

    with pytest.raises(InvalidRequest, match="wait_s"):
        await events_of(guarded, [1, 1]).stream(request)
