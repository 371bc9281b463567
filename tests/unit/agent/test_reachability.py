"""What probes know: when one is sent, what it changes, and that an idle agent sends none."""

from core.clock import Clock
from edge_agent.link.reachability import Found, ProbePolicy, Reachability
from tests.support.clocks import HeldClock

THERE, AWAY, NO_HEAVY = Found(True, True), Found(False, False), Found(True, False)


class World:
    """A link, a breaker and a controller; time goes by in seconds."""

    def __init__(self) -> None:
        self.clock = HeldClock()
        self.found = AWAY
        self.is_open = False
        self.openings = 0
        self.probed_at_s: list[float] = []
        self.heard: list[bool] = []
        self.reachability = reachability_of(self, self.clock)
        self.reachability.on_change(self.heard.append)

    async def probe(self) -> Found:
        self.probed_at_s.append(self.clock.monotonic_s())
        return self.found

    async def pass_s(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.pass_s(1)
            await self.reachability.look()


def reachability_of(world: World, clock: Clock) -> Reachability:
    return Reachability(
        world.probe,
        is_link_open=lambda: world.is_open,
        breaker_openings=lambda: world.openings,
        clock=clock,
        policy=ProbePolicy(first_s=4.0, cap_s=60.0),
        uniform=lambda: 0.5,
    )


async def test_before_anything_is_known_a_request_may_try_and_what_was_kept_waits() -> None:
    world = World()

    assert world.reachability.is_reachable()
    assert not world.reachability.is_controller_reachable()
    assert not world.reachability.heavy.is_there.is_set()


async def test_an_open_session_is_proven_by_one_probe_and_then_costs_none() -> None:
    world = World()
    world.is_open, world.found = True, THERE
    await world.pass_s(7200)

    assert world.probed_at_s == [1.0]
    assert world.reachability.is_reachable()
    assert world.reachability.heavy.is_there.is_set()


async def test_a_session_that_ends_is_unreachable_at_once_without_anybodys_request() -> None:
    world = World()
    world.is_open, world.found = True, THERE
    await world.pass_s(2)
    world.is_open, world.found = False, AWAY
    await world.pass_s(1)

    assert not world.reachability.is_reachable()
    assert not world.reachability.controller.is_there.is_set()
    assert world.heard == [False]


async def test_probes_of_an_absent_controller_become_rare_and_go_on() -> None:
    world = World()
    world.is_open, world.found = True, THERE
    await world.pass_s(2)
    world.is_open, world.found = False, AWAY
    await world.pass_s(3600)

    intervals = [after - before for before, after in zip(world.probed_at_s[1:], world.probed_at_s[2:], strict=False)]
    assert intervals[0] <= 6
    assert intervals[-1] == 60
    assert 60 <= len(world.probed_at_s) <= 80


async def test_a_probe_finds_the_controller_again_also_without_a_session() -> None:
    world = World()
    await world.pass_s(30)
    assert not world.reachability.is_reachable()
    world.found = THERE
    await world.pass_s(60)

    assert world.reachability.is_reachable()
    assert world.heard == [False, True]


async def test_a_breaker_that_opens_closes_the_way_until_a_probe_says_ready() -> None:
    world = World()
    world.is_open, world.found = True, THERE
    await world.pass_s(2)
    world.openings, world.found = 1, NO_HEAVY
    await world.pass_s(20)
    assert not world.reachability.is_reachable()
    assert world.reachability.is_controller_reachable()
    assert world.reachability.controller.is_there.is_set()
    world.found = THERE
    await world.pass_s(30)

    assert world.reachability.is_reachable()
    assert world.reachability.heavy.is_there.is_set()


async def test_a_heavy_tier_that_is_away_when_the_session_opens_is_known_before_the_first_request() -> None:
    world = World()
    world.is_open, world.found = True, NO_HEAVY
    await world.pass_s(1)

    assert not world.reachability.is_reachable()
