"""The paths of the Open Inference Protocol over HTTP: one table, from which every HTTP face of ours routes.

Source: https://github.com/kserve/open-inference-protocol (REST), and Triton's extensions "model repository" and
"statistics".
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple
from urllib.parse import unquote

PREFIX = "/v2"
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
_IN_REPOSITORY = "/v2/repository/models/{model}"


class Operation(Enum):
    """What may be asked; the values are words for people and metrics."""

    LIVE = "live"
    READY = "ready"
    SERVER_METADATA = "server metadata"
    MODEL_METADATA = "model metadata"
    MODEL_READY = "model ready"
    INFER = "infer"
    INDEX = "index"
    LOAD = "load"
    UNLOAD = "unload"
    STATISTICS = "statistics"


class Endpoint(NamedTuple):
    """`paths` are templates; what answers GET answers HEAD too."""

    method: str
    paths: Sequence[str]


ENDPOINTS: Mapping[Operation, Endpoint] = {
    Operation.LIVE: Endpoint("GET", ("/v2/health/live",)),
    Operation.READY: Endpoint("GET", ("/v2/health/ready",)),
    Operation.SERVER_METADATA: Endpoint("GET", ("/v2", "/v2/")),
    Operation.STATISTICS: Endpoint("GET", ("/v2/models/stats", f"{_MODEL}/stats", f"{_VERSION}/stats")),
    Operation.MODEL_METADATA: Endpoint("GET", (_MODEL, _VERSION)),
    Operation.MODEL_READY: Endpoint("GET", (f"{_MODEL}/ready", f"{_VERSION}/ready")),
    Operation.INFER: Endpoint("POST", (f"{_MODEL}/infer", f"{_VERSION}/infer")),
    Operation.INDEX: Endpoint("POST", ("/v2/repository/index",)),
    Operation.LOAD: Endpoint("POST", (f"{_IN_REPOSITORY}/load",)),
    Operation.UNLOAD: Endpoint("POST", (f"{_IN_REPOSITORY}/unload",)),
}


class Target(NamedTuple):
    """What a path names; `version` empty: the latest. `template` is its path in ENDPOINTS."""

    operation: Operation
    template: str
    model: str = ""
    version: str = ""


def target_of(path: str) -> Target | None:
    """Return what `path`, as it stands in the request line, names; None: nothing of the protocol."""
    found = _FIXED.get(path)
    if found is not None:
        return found
    segments = path.split("/")
    for template, operation, parts in _TEMPLATES.get(len(segments), ()):
        if all(part is None or part == segment for part, segment in zip(parts, segments, strict=True)):
            names = [unquote(segment) for part, segment in zip(parts, segments, strict=True) if part is None]
            return Target(operation, template, *names) if all(names) else None
    return None


def _fixed() -> Mapping[str, Target]:
    return {
        path: Target(operation, path)
        for operation, endpoint in ENDPOINTS.items()
        for path in endpoint.paths
        if "{" not in path
    }


def _templates() -> Mapping[int, list[tuple[str, Operation, list[str | None]]]]:
    """Return the paths with placeholders by their number of segments; None stands for any segment."""
    by_length: dict[int, list[tuple[str, Operation, list[str | None]]]] = {}
    for operation, endpoint in ENDPOINTS.items():
        for path in endpoint.paths:
            if "{" in path:
                parts = [None if part.startswith("{") else part for part in path.split("/")]
                by_length.setdefault(len(parts), []).append((path, operation, parts))
    return by_length


_FIXED = _fixed()
_TEMPLATES = _templates()
