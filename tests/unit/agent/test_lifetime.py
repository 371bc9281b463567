"""What is done for the loop to have its turn, seen from outside, in a process of its own."""

import asyncio
import gc
import json
import os
import subprocess
import sys

import pytest

from edge_agent.lifetime import keep_collected

PROGRAM = """
import gc, json, os, threading
from edge_agent.lifetime import prefer_the_loop
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
prefer_the_loop()
later = threading.Thread(target=threading.Event().wait, daemon=True)
later.start()
of = lambda thread: os.sched_getscheduler(thread.native_id)
print(json.dumps([of(threading.main_thread()), of(thread), of(later), gc.get_freeze_count() > 0, gc.isenabled()]))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="classes of scheduling are Linux's")
def test_threads_that_are_there_do_not_interrupt_the_loop_and_what_the_start_made_is_not_looked_through_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, timeout=60)
    loop, before, later, has_frozen, is_collecting = json.loads(done.stdout)
    assert (loop, before, later) == (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_OTHER)
    assert (has_frozen, is_collecting) == (True, True)


async def test_cycles_are_collected_while_nobody_waits() -> None:
    class Node:
        myself: "Node"

    def left() -> int:
        return sum(isinstance(found, Node) for found in gc.get_objects())

    node = Node()
    node.myself = node
    del node
    is_idle = False
    collecting = asyncio.create_task(keep_collected(lambda: is_idle, interval_s=0.0, look_s=0.001))
    gc.disable()
    try:
        await asyncio.sleep(0.05)
        assert left() == 1
        is_idle = True
        async with asyncio.timeout(10):
            while left():
                await asyncio.sleep(0.001)
    finally:
        gc.enable()
        collecting.cancel()
