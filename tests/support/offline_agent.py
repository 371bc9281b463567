"""A real agent in a process of its own, on models that were put into its state folder: no controller is needed.

    with offline_agent(folder, models=[mlp], broker=broker) as agent:
        ask(agent.site, agent.agent_id, …)

The agent starts as it would after a power cut with the controller away, and serves what was active.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from controller.demo.ports import free_port
from core.addresses import Address
from core.clock import SystemClock
from core.digest import Digest
from core.fleet_state import DesiredState, Position, Slot
from core.ids import AgentId, ModelName, VariantName
from edge_agent.activation.journal import Journal
from edge_agent.health.state_folder import StateFolder
from edge_agent.sync.store import ContentStore
from tests.support.edge_models import BuiltModel
from tests.support.enrolled import enrolled
from tests.support.mosquitto import Mosquitto

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class OfflineAgent:
    agent_id: str
    site: str
    state_dir: Path
    process: subprocess.Popen[bytes]

    def status(self) -> Mapping[str, Any]:
        """Return what the agent last wrote about itself."""
        return dict(json.loads(StateFolder(self.state_dir).status.read_bytes()))

    def faces(self) -> Mapping[str, str]:
        """Return the addresses of its local faces; none: they are not open yet."""
        try:
            return dict(json.loads(StateFolder(self.state_dir).endpoints.read_bytes()))
        except FileNotFoundError:
            return {}

    def is_connected(self) -> bool:
        """Say whether it has reached its broker."""
        try:
            broker = self.status().get("broker") or {}
        except FileNotFoundError:
            return False
        return bool(broker.get("is_connected"))


@contextmanager
def offline_agent(
    state_dir: Path,
    *,
    models: Sequence[BuiltModel],
    broker: Mosquitto | None,
    agent_id: str = "gate-1",
    site: str = "berlin",
    environment: Mapping[str, str] | None = None,
    is_enrolled: bool = False,
) -> Iterator[OfflineAgent]:
    """Yield an agent that is connected to `broker` and serves `models`; it is gone afterwards.

    `broker` None: its local faces are all that there is.

    With `is_enrolled` its identity is in `state_dir` already.
    """
    put_models(state_dir, agent_id, models)
    if not is_enrolled:
        # Nobody listens there: the agent must do without.
        enrolled(state_dir, controller=Address("127.0.0.1", free_port()), agent_id=agent_id, site=site)
    settings = {
        "STATE_DIR": str(state_dir),
        "GRPC_BIND": "127.0.0.1:0",
        **({"MQTT__ENABLED": "false"} if broker is None else {"MQTT__PORT": str(broker.port)}),
        "LOGS__LEVEL": "error",
        **(environment or {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "run"],
        env={**os.environ, **{f"NANOFLEET_AGENT_{key}": value for key, value in settings.items()}},
    )
    try:
        agent = OfflineAgent(agent_id, site, state_dir, process)
        _await(agent, agent.faces if broker is None else agent.is_connected)
        yield agent
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def put_models(state_dir: Path, agent_id: str, models: Sequence[BuiltModel]) -> None:
    """Make `models` what the agent ran last."""
    StateFolder(state_dir).store.mkdir(parents=True, exist_ok=True)
    store = ContentStore(StateFolder(state_dir).store)
    slots = []
    for model in models:
        _put(store, model.digest, model.manifest.to_bytes())
        for file in model.manifest.files:
            _put(store, Digest(file.digest), (model.folder / file.path).read_bytes())
        manifest = model.manifest
        slots.append(Slot(ModelName(manifest.model), manifest.version, VariantName(manifest.variant), model.digest))
    journal = Journal(StateFolder(state_dir).journal, clock=SystemClock())
    journal.save_active(DesiredState(AgentId(agent_id), Position(1, 1), datetime.now(UTC), tuple(slots)))


def _put(store: ContentStore, digest: Digest, content: bytes) -> None:
    if not store.has(digest):
        store.put(digest, content)


def _await(agent: OfflineAgent, is_up: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if agent.process.poll() is not None:
            break
        if is_up():
            return
        time.sleep(0.05)
    raise RuntimeError(f"agent {agent.agent_id} was not up within {START_TIMEOUT_S:g} s")
