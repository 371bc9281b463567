"""Named, supervised tasks: a loop that must run as long as its owner, started again with backoff when it fails.

Use it inside an `asyncio.TaskGroup`; cancelling the group ends the loops. A loop that fails is logged (WARNING the
first time, DEBUG for repeats, INFO on recovery) and started again; it never takes its siblings down with it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from core.backoff import Backoff, BackoffPolicy

_log = logging.getLogger(__name__)


async def supervise(name: str, run: Callable[[], Awaitable[None]], *, policy: BackoffPolicy | None = None) -> None:
    """Run `run` for ever: again at once when it returns, after a backoff when it raises.

    A failure after a run of at least the policy's cap counts as the first of its kind again.
    """
    policy = policy or BackoffPolicy(base_s=0.1, cap_s=10.0)
    backoff = Backoff(policy)
    loop = asyncio.get_running_loop()
    failing = False
    while True:
        started_s = loop.time()
        try:
            await run()
            backoff.reset()
            if failing:
                _log.info("task recovered", extra={"task": name})
            failing = False
            # A run that never waits must not keep the loop, and its own cancellation, out.
            await asyncio.sleep(0)
        except Exception:
            if loop.time() - started_s >= policy.cap_s:
                backoff.reset()
                failing = False
            _log.log(
                logging.DEBUG if failing else logging.WARNING,
                "task failed and will be started again",
                extra={"task": name},
                exc_info=True,
            )
            failing = True
            await asyncio.sleep(backoff.next_delay_s())
