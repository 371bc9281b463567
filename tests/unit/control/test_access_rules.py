"""The table of roles, held against the routes that there are."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from controller.access.model import OperatorRole
from controller.api.access_rules import RULES, Nobody, methods_of, need, route_of
from controller.api.http_app import create_operator_app
from controller.api.open_inference_http import routes as inference_routes
from controller.dashboard.pages import Dashboard
from core.clock import SystemClock
from tests.support.echo_plane import EchoPlane
from tests.support.operator_side import operator_side


def endpoints(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Yield method and path of every route, those of included routers too."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from endpoints(included.routes)
        else:
            yield from ((method, route.path) for method in route.methods)  # type: ignore[attr-defined]  # every kind of route here has both


def entered() -> set[tuple[str, str]]:
    return {(method, path) for path, methods in RULES.items() for method in methods}


async def test_every_route_of_the_operator_has_a_rule_and_every_rule_a_route(tmp_path: Path) -> None:
    async with operator_side(tmp_path) as side:
        app = create_operator_app(
            registry=side.registry,
            fleet=side.fleet,
            traces=side.traces,
            records=side.records,
            clock=SystemClock(),
            pulls=side.pulls,
            trust=side.trust,
            pages=Dashboard(side.sources, side.access, version="0").router(),
            server_version="0",
        )
        served = set(endpoints(app.routes))

    assert ("GET", "/api/models") in served
    assert served == {(method, path) for method, path in entered() if not path.startswith("/v2")}


def test_every_route_of_inference_needs_a_caller_except_health() -> None:
    face = Starlette(routes=inference_routes(EchoPlane(), server_name="n", server_version="1", clock=SystemClock()))
    needs = {(method, path): need(method, path) for method, path in endpoints(face.routes)}

    opened = {key for key, needed in needs.items() if needed is Nobody.OPEN}
    assert opened == {(method, path) for method, path in entered() if path.startswith("/v2")}
    assert {needed for key, needed in needs.items() if key not in opened} == {OperatorRole.VIEWER}


def test_only_health_and_signing_in_or_out_is_open() -> None:
    opened = {path for path, methods in RULES.items() if Nobody.OPEN in methods.values()}

    assert opened == {
        "/api/health", "/v2/health/live", "/v2/health/ready", "/sign-in", "/sign-out", "/api/sessions",
        "/assets/{name}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/metrics", OperatorRole.VIEWER),
        ("GET", "/api/models/digits", OperatorRole.VIEWER),
        ("PUT", "/api/deployments", OperatorRole.OPERATOR),
        ("POST", "/api/enrolment-tokens", OperatorRole.OPERATOR),
        ("POST", "/api/signing/rotations", OperatorRole.ADMIN),
        ("POST", "/api/operators", OperatorRole.ADMIN),
        ("POST", "/v2/models/digits/infer", OperatorRole.VIEWER),
        ("BREW", "/v2/anything", OperatorRole.VIEWER),
        ("GET", "/v2x", None),
        ("GET", "/api/models/", None),
        ("GET", "/api/models/a/b", None),
        ("GET", "/api/operators\n", None),
        ("GET", "//api/health", None),
        ("POST", "/api/models", None),
        ("get", "/api/health", None),
        ("GET", "", None),
    ],
)
def test_the_rule_of_a_request(method: str, path: str, expected: OperatorRole | None) -> None:
    assert need(method, path) is expected


def test_the_methods_of_a_path_are_those_in_the_table() -> None:
    assert methods_of("/api/blobs/sha256:0") == {"HEAD", "PUT"}
    assert methods_of("/api/nothing") == frozenset()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/metrics", "/metrics"),
        ("/api/models", "/api/models"),
        ("/api/models/digits", "/api/models/{name}"),
        ("/api/agents/cam/ban", "/api/agents/{agent_id}/ban"),
        ("/v2/models/digits/versions/1/infer", "/v2/models/{model}/infer"),
        ("/v2/models/made-up", "/v2"),
        ("/made/up", ""),
        ("", ""),
    ],
)
def test_the_route_of_a_request_is_the_path_of_its_rule(path: str, expected: str) -> None:
    assert route_of(path) == expected
