"""The HTTP face with all that it serves: Open Inference, `/metrics` for Prometheus, `/healthz`."""

from collections.abc import Sequence

from core.addresses import Address
from core.clock import Clock
from core.exposition import exposed
from core.metrics import Registry
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.http.inference import OpenInferenceRoutes
from edge_agent.front.http.messages import Answer, Request, text_answer
from edge_agent.front.http.routes import Tasks, get_route, routing
from edge_agent.front.http.server import HttpFront
from edge_agent.front.tls import FacesTls


def made_front(
    bind: Address,
    plane: EdgeDataPlane,
    *,
    server_name: str,
    server_version: str,
    extensions: Sequence[str],
    metrics: Registry,
    clock: Clock,
    tls: FacesTls | None,
) -> tuple[HttpFront, Tasks]:
    """Return a face that is to be started, and the tasks behind it, which are to be closed after it."""
    tasks = Tasks()
    protocol = OpenInferenceRoutes(
        plane,
        server_name=server_name,
        server_version=server_version,
        extensions=extensions,
        statistics=plane,
        tasks=tasks,
    )

    async def expose(request: Request) -> Answer:
        exposition = await exposed(metrics, accept=request.headers.get("accept", ""))
        return Answer(exposition.body, content_type=exposition.content_type)

    fixed = dict([get_route("/metrics", expose, tasks), get_route("/healthz", _say_well, tasks)])
    return HttpFront(bind, routing(protocol.find, fixed=fixed), clock=clock, tls=tls, metrics=metrics), tasks


async def _say_well(_request: Request) -> Answer:
    """Answer that the process lives and its loop turns; what it runs is in its status and its metrics."""
    return text_answer("ok")
