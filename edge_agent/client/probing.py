"""Which agents to probe now, so that a better one is found again: few, seldom, and only while something is asked.

A probe is a request that an agent answers at once with its load, without a model. Each device probes at times of its
own, so that the devices of a site do not probe together.
"""

from collections.abc import Callable, Sequence

# Chosen: a way that got shorter is noticed within half a minute, at the cost of a few hundred bytes.
PERIOD_S = 15.0
# Chosen: at a site with more agents each is probed less often, so that a device's traffic does not grow with it.
MAX_PER_PERIOD = 8
# Devices that start together do not probe together.
FIRST_WITHIN_S = 0.25
# A device that asked nothing for so long stays silent.
ACTIVE_S = 60.0
# Chosen: many times any round trip on a site's network.
TIMEOUT_S = 2.0
# Between two looks at what is due; a busy device's network loop turns thousands of times a second.
_LOOK_S = 0.05


class Probing:
    """Time comes in as an argument; `uniform` gives numbers from 0 to 1."""

    def __init__(self, *, uniform: Callable[[], float]) -> None:
        self._uniform = uniform
        self._due_s: dict[str, float] = {}
        self._active_until_s = 0.0
        self._look_s = 0.0

    def active(self, *, now_s: float) -> None:
        """Something is asked, or the device has just connected."""
        self._active_until_s = now_s + ACTIVE_S

    def soon(self, agent: str) -> None:
        """What is known of `agent` is old: probe it next."""
        self._due_s.pop(agent, None)

    def is_time(self, *, now_s: float) -> bool:
        """Say, at little cost, whether to look at what is `due`."""
        return self._look_s <= now_s < self._active_until_s

    def due(self, agents: Sequence[str], *, now_s: float) -> list[str]:
        """Return those of `agents` to probe now; they are taken as probed."""
        self._look_s = now_s + _LOOK_S
        stretch = max(1.0, len(agents) / MAX_PER_PERIOD)
        first_s = now_s + FIRST_WITHIN_S * stretch * self._uniform()
        self._due_s = {agent: self._due_s.get(agent, first_s) for agent in agents}
        found = [agent for agent in agents if self._due_s[agent] <= now_s]
        for agent in found:
            self._due_s[agent] = now_s + PERIOD_S * stretch * (0.5 + self._uniform())
        return found
