"""The agent's own faces, as the settings say: Open Inference over HTTP and gRPC, beside `/metrics` and `/healthz`."""

from contextlib import AsyncExitStack

from core.addresses import Address, parse_address
from core.clock import Clock
from core.exposition import exposed
from core.grpc_transport import TransportCredentials
from core.metrics import Registry
from core.open_inference.service import EXTENSIONS
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.grpc import GrpcFront
from edge_agent.front.http.inference import OpenInferenceRoutes
from edge_agent.front.http.messages import Answer, Request, text_answer
from edge_agent.front.http.routes import Tasks, get_route, routing
from edge_agent.front.http.server import HttpFront
from edge_agent.front.tls import FacesTls
from edge_agent.settings import AgentSettings

SERVER_NAME = "nanofleet-agent"
# What this plane adds: requests have priorities and timeouts, and are counted.
AGENT_EXTENSIONS = (*EXTENSIONS, "schedule_policy", "statistics")


class LocalFaces:
    """`tls` None: in the clear, on loopback. What `open` opens is closed by the stack that it is given."""

    def __init__(
        self,
        settings: AgentSettings,
        plane: EdgeDataPlane,
        *,
        metrics: Registry,
        version: str,
        clock: Clock,
        tls: FacesTls | None,
    ) -> None:
        self._settings = settings
        self._plane = plane
        self._metrics = metrics
        self._version = version
        self._clock = clock
        self._tls = tls

    async def open(self, closing: AsyncExitStack) -> dict[str, str]:
        """Listen, and return the address of each face by its name.

        Raises:
            Unavailable: an address is taken.
        """
        return {**await self._open_grpc(closing), **await self._open_http(closing)}

    async def _open_grpc(self, closing: AsyncExitStack) -> dict[str, str]:
        if self._settings.grpc_bind is None:
            return {}
        tls = self._tls
        face = GrpcFront(
            self._plane,
            bind=parse_address(self._settings.grpc_bind),
            credentials=TransportCredentials.local().server if tls is None else tls.server_credentials(),
            caller_of=None if tls is None else tls.caller_of,
            clock=self._clock,
            name=SERVER_NAME,
            version=self._version,
            extensions=AGENT_EXTENSIONS,
            statistics=self._plane,
            metrics=self._metrics,
        )
        address: Address = await face.start()
        closing.push_async_callback(face.stop, self._settings.drain_timeout_s)
        return {"grpc": str(address)}

    async def _open_http(self, closing: AsyncExitStack) -> dict[str, str]:
        if self._settings.http_bind is None:
            return {}
        tasks = Tasks()
        closing.push_async_callback(tasks.close)
        protocol = OpenInferenceRoutes(
            self._plane,
            server_name=SERVER_NAME,
            server_version=self._version,
            extensions=AGENT_EXTENSIONS,
            statistics=self._plane,
            tasks=tasks,
        )
        fixed = dict([get_route("/metrics", self._expose, tasks), get_route("/healthz", _say_well, tasks)])
        face = HttpFront(
            parse_address(self._settings.http_bind),
            routing(protocol.find, fixed=fixed),
            clock=self._clock,
            tls=self._tls,
            metrics=self._metrics,
        )
        address = await face.start()
        closing.push_async_callback(face.stop, self._settings.drain_timeout_s)
        return {"http": str(address)}

    async def _expose(self, request: Request) -> Answer:
        exposition = await exposed(self._metrics, accept=request.headers.get("accept", ""))
        return Answer(exposition.body, content_type=exposition.content_type)


async def _say_well(_request: Request) -> Answer:
    """Answer that the process lives and its loop turns; what it runs is in its status and its metrics."""
    return text_answer("ok")
