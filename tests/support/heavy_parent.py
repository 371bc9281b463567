"""A controller reduced to its heavy tier, as a process that a test can kill.

    python -m tests.support.heavy_parent DATA_DIR TLS_DIR HTTP_PORT

Prints the child's address when the tier is ready, then waits to be killed.
"""

import asyncio
import sys
from pathlib import Path

from controller.heavy.client import HeavyClient
from controller.heavy.local import LocalHeavy
from controller.settings import HeavySettings
from core.addresses import Address
from core.clock import SystemClock


async def main(data_dir: Path, tls_dir: Path, port: int) -> None:
    settings, clock = HeavySettings(port=port, max_replicas=1), SystemClock()
    # Nothing is asked of the tier, so nobody has to be at the controller's address.
    controller = Address("127.0.0.1", 1)
    async with HeavyClient(f"http://127.0.0.1:{port}", clock=clock) as client, asyncio.TaskGroup() as group:
        local = LocalHeavy(
            settings, data_dir=data_dir, controller=controller, tls_dir=tls_dir, readiness=client, clock=clock
        )
        group.create_task(client.run())
        group.create_task(local.run())
        await client.wait_answer()
        print(local.url, flush=True)


asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
