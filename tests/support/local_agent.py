"""A real agent as a process: started, asked over its local gRPC face, killed, started again; a broker is optional."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import orjson

from core.addresses import Address, parse_address
from core.errors import NanofleetError
from core.grpc_transport import TransportCredentials, open_channel
from core.open_inference import protobuf_body
from core.open_inference.messages import InferRequest, InferResponse, ParameterValue
from core.status import error_from_grpc
from core.tensors import Datatype, Tensor
from edge_agent.health.status_file import AgentStatus, read_status
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.enrolled import Realm

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.02

CONFIG = """\
state_dir = "{folder}/state"
grpc_bind = "127.0.0.1:0"
[mqtt]
enabled = {has_broker}
port = {broker_port}
[link]
first_delay_s = 0.0
reconnect_base_s = 0.05
reconnect_cap_s = 0.5
[sync]
chunk_timeout_s = 2.0
retry_base_s = 0.05
retry_cap_s = 0.5
"""


class AgentProcess:
    """Enrols in `realm` if its folder has no identity yet."""

    def __init__(
        self,
        folder: Path,
        *,
        realm: Realm,
        controller: Address,
        broker_port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state_dir = folder / "state"
        if not (self.state_dir / "identity").exists():
            realm.enrol(self.state_dir, controller=controller)
        self._config = folder / "agent.toml"
        self._environment = {**os.environ, **(environment or {})}
        self._log = folder / "agent.log"
        self._process: Process | None = None
        self._config.write_text(
            CONFIG.format(
                folder=folder,
                has_broker="false" if broker_port is None else "true",
                broker_port=broker_port or 1883,
            )
        )

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def start(self, *interpreter_options: str) -> None:
        """Start the process and wait until its local face is up."""
        (self.state_dir / "endpoints.json").unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *interpreter_options, "-m", "edge_agent", "run", "--config", str(self._config)),
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (self.state_dir / "endpoints.json").exists():
                assert self._process.returncode is None, f"the agent ended:\n{self.log}"
                await asyncio.sleep(_POLL_S)

    async def kill(self) -> None:
        """End it at once, as a power cut would."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None:
            os.kill(process.pid, number)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await process.wait()

    async def shown_status(self) -> str:
        """Return what `nanofleet-agent status` prints."""
        command = [sys.executable, "-m", "edge_agent", "status", "--state-dir", str(self.state_dir)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode()

    def status(self) -> AgentStatus:
        return read_status(self.state_dir / "status.json")

    async def ask(self, model: str = "digits", *, value: float = 1.0, **parameters: ParameterValue) -> InferResponse:
        """Ask the model over the local gRPC face, with `value` in every place of its input.

        Raises:
            NanofleetError: what the agent refused with.
        """
        bind = parse_address(orjson.loads((self.state_dir / "endpoints.json").read_bytes())["grpc"])
        given = Tensor("x", Datatype.FP32, np.full((1, 8), value, np.float32))
        request = InferRequest(model, (given,), parameters=parameters)
        async with open_channel(bind, TransportCredentials.local()) as channel:
            try:
                message = await GRPCInferenceServiceStub(channel).ModelInfer(
                    protobuf_body.encode_request(request), timeout=5
                )
            except grpc.aio.AioRpcError as error:
                raise error_from_grpc(error.code(), error.details() or "") from error
        return protobuf_body.decode_response(message)

    async def answers(self, model: str = "digits") -> bool:
        try:
            await self.ask(model)
        except NanofleetError:
            return False
        return True


@asynccontextmanager
async def running_agent(
    folder: Path, *, realm: Realm, controller: Address, broker_port: int | None = None
) -> AsyncIterator[AgentProcess]:
    """Yield a running agent whose files are in `folder`; it is gone afterwards."""
    agent = AgentProcess(folder, realm=realm, controller=controller, broker_port=broker_port)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.kill()
