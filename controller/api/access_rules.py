"""Which role each endpoint of the HTTP port needs: one table, and nothing outside it is served.

    reads                                    viewer
    models asked through the gateway (/v2)   viewer
    publishing, deploying, letting agents in operator
    operators, authority, signing            admin

A test holds the table against the routes of the application, in both directions.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Literal, TypeAlias

from controller.access.model import OperatorRole

INFERENCE_PREFIX = "/v2"
INFER_ROUTE = "/v2/models/{model}/infer"


class Nobody(Enum):
    """For what is served to anybody."""

    OPEN = "open"


Need: TypeAlias = OperatorRole | Literal[Nobody.OPEN]

_OPEN = Nobody.OPEN
_VIEWER, _OPERATOR, _ADMIN = OperatorRole.VIEWER, OperatorRole.OPERATOR, OperatorRole.ADMIN

# `{…}` stands for one segment of the path. Where several match, the strictest counts.
RULES: Mapping[str, Mapping[str, Need]] = {
    # Load balancers have no credentials.
    "/api/health": {"GET": _OPEN},
    "/metrics": {"GET": _VIEWER},
    "/v2/health/live": {"GET": _OPEN, "HEAD": _OPEN},
    "/v2/health/ready": {"GET": _OPEN, "HEAD": _OPEN},
    # Public code; the page to sign in on is made of it.
    "/assets/{name}": {"GET": _OPEN},
    # These ask for the secret themselves, or for the session's CSRF token in a form.
    "/sign-in": {"GET": _OPEN, "POST": _OPEN},
    "/sign-out": {"POST": _OPEN},
    "/api/sessions": {"POST": _OPEN},
    "/api/sessions/current": {"DELETE": _VIEWER},
    # Pages.
    "/": {"GET": _VIEWER},
    "/latency": {"GET": _VIEWER},
    "/traces": {"GET": _VIEWER},
    "/traces/{trace_id}": {"GET": _VIEWER},
    "/devices": {"GET": _VIEWER},
    "/devices/{agent_id}": {"GET": _VIEWER},
    "/models": {"GET": _VIEWER},
    "/models/{name}": {"GET": _VIEWER},
    "/audit": {"GET": _VIEWER},
    "/dashboard/events": {"GET": _VIEWER},
    "/dashboard/latency": {"GET": _VIEWER},
    "/api/me": {"GET": _VIEWER},
    "/api/openapi.json": {"GET": _VIEWER, "HEAD": _VIEWER},
    "/api/blobs/{digest}": {"HEAD": _VIEWER, "PUT": _OPERATOR},
    "/api/models": {"GET": _VIEWER},
    "/api/models/{name}": {"GET": _VIEWER},
    "/api/models/{name}/versions": {"POST": _OPERATOR},
    "/api/publications/{publication_id}": {"GET": _VIEWER},
    "/api/agents": {"GET": _VIEWER},
    "/api/agents/{agent_id}": {"GET": _VIEWER},
    "/api/agents/{agent_id}/identity": {"GET": _VIEWER},
    "/api/agents/{agent_id}/ban": {"POST": _OPERATOR, "DELETE": _OPERATOR},
    "/api/agents/{agent_id}/events": {"GET": _VIEWER},
    "/api/usage": {"GET": _VIEWER},
    "/api/enrolment-tokens": {"GET": _VIEWER, "POST": _OPERATOR},
    "/api/enrolment-tokens/{token_id}": {"DELETE": _OPERATOR},
    "/api/agents/{agent_id}/transfers": {"POST": _OPERATOR},
    "/api/deployments": {"GET": _VIEWER, "PUT": _OPERATOR},
    "/api/samples": {"GET": _VIEWER},
    # What devices sent, not only figures about it.
    "/api/models/{name}/sample-pulls": {"POST": _OPERATOR},
    "/api/sample-pulls": {"GET": _OPERATOR},
    "/api/sample-pulls/{pull_id}": {"GET": _OPERATOR, "DELETE": _OPERATOR},
    "/api/sample-pulls/{pull_id}/samples/{agent_id}/{digest}": {"GET": _OPERATOR},
    "/api/traces": {"GET": _VIEWER},
    "/api/traces/{trace_id}": {"GET": _VIEWER},
    "/api/authority": {"GET": _VIEWER},
    "/api/authority/rotation": {"POST": _ADMIN},
    "/api/authority/{sha256}": {"DELETE": _ADMIN},
    "/api/certificates": {"POST": _ADMIN},
    "/api/signing": {"GET": _VIEWER},
    "/api/signing/root": {"GET": _VIEWER},
    "/api/signing/staged": {"GET": _ADMIN},
    "/api/signing/signed": {"POST": _ADMIN},
    "/api/signing/rotations": {"POST": _ADMIN},
    "/api/models/{name}/revocations": {"POST": _ADMIN},
    # It has names, and addresses that requests came from.
    "/api/audit": {"GET": _OPERATOR},
    "/api/audit/verification": {"GET": _OPERATOR},
    "/api/restoration": {"GET": _VIEWER},
    "/api/restoration/confirmation": {"POST": _ADMIN},
    "/api/operators": {"GET": _ADMIN, "POST": _ADMIN},
    "/api/operators/{name}": {"DELETE": _ADMIN},
    "/api/operators/{name}/secret": {"POST": _ADMIN},
}


def need(method: str, path: str) -> Need | None:
    """Return what a request needs; None: no endpoint of ours."""
    found = [methods[method] for methods in _rules_of(path) if method in methods]
    roles = [role for role in found if isinstance(role, OperatorRole)]
    if roles:
        return max(roles)
    if found:
        return _OPEN
    # That face has its own answers for what it does not know.
    return _VIEWER if is_inference(path) else None


def route_of(path: str) -> str:
    """Return the rule's path that `path` falls under, for counting: a small set of words, whatever peers ask for."""
    if path in RULES:
        return path
    if is_inference(path):
        return INFER_ROUTE if path.endswith("/infer") else INFERENCE_PREFIX
    segments = path.split("/")
    for template in _TEMPLATES_BY_LENGTH.get(len(segments), ()):
        if all(part.startswith("{") or part == segment for part, segment in zip(template, segments, strict=True)):
            return "/".join(template)
    return ""


def methods_of(path: str) -> frozenset[str]:
    """Return what may be asked of `path` below /api; none: it does not exist."""
    return frozenset(method for methods in _rules_of(path) for method in methods)


def is_page(method: str, path: str) -> bool:
    """Say whether a person's browser asks for a page, which may lead to where one signs in."""
    for_programs = is_inference(path) or path.startswith(("/api/", "/dashboard/"))
    return method == "GET" and not for_programs and need(method, path) is _VIEWER


def is_inference(path: str) -> bool:
    return path == INFERENCE_PREFIX or path.startswith(f"{INFERENCE_PREFIX}/")


def _rules_of(path: str) -> Iterator[Mapping[str, Need]]:
    if path in RULES:
        yield RULES[path]
    segments = path.split("/")
    for template, methods in _TEMPLATES.get(len(segments), ()):
        if all(part == segment or (part is None and segment) for part, segment in zip(template, segments, strict=True)):
            yield methods


def _templates() -> Mapping[int, list[tuple[tuple[str | None, ...], Mapping[str, Need]]]]:
    """Return the rules with placeholders by their number of segments; None stands for any segment."""
    by_length: dict[int, list[tuple[tuple[str | None, ...], Mapping[str, Need]]]] = {}
    for path, methods in RULES.items():
        if "{" in path:
            template = tuple(None if part.startswith("{") else part for part in path.split("/"))
            by_length.setdefault(len(template), []).append((template, methods))
    return by_length


_TEMPLATES = _templates()
_TEMPLATES_BY_LENGTH: dict[int, list[list[str]]] = {}
for _path in RULES:
    _TEMPLATES_BY_LENGTH.setdefault(len(_path.split("/")), []).append(_path.split("/"))
