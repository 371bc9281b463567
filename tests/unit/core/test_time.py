"""Clock and deadline: instants on the monotonic clock of the process."""

import time
from datetime import UTC

from core.clock import SystemClock
from core.deadline import Deadline


def test_the_system_clock_tells_utc_and_the_monotonic_time_of_event_loops() -> None:
    clock = SystemClock()
    assert clock.now().tzinfo is UTC
    before = time.monotonic()
    assert before <= clock.monotonic_s() <= time.monotonic()


def test_a_deadline_leaves_less_and_less_until_it_has_passed() -> None:
    deadline = Deadline.after(2.0, now_s=10.0)
    assert [deadline.remaining_s(now_s) for now_s in (10.0, 11.5, 12.0, 13.0)] == [2.0, 0.5, 0.0, -1.0]
