"""What each changing endpoint is called in the audit record: one table, beside the one of `access_rules`.

A test holds it against the rules: an endpoint that changes something is recorded, or stands in UNRECORDED with its
reason.
"""

from collections.abc import Mapping
from typing import NamedTuple

from core.logs import peer_text

ACTIONS: Mapping[str, Mapping[str, str]] = {
    "/api/models/{name}/versions": {"POST": "model.publish"},
    "/api/models/{name}/revocations": {"POST": "model.revoke"},
    "/api/agents/{agent_id}/ban": {"POST": "agent.ban", "DELETE": "agent.unban"},
    "/api/agents/{agent_id}/transfers": {"POST": "agent.allow-transfer"},
    "/api/enrolment-tokens": {"POST": "token.issue"},
    "/api/enrolment-tokens/{token_id}": {"DELETE": "token.delete"},
    "/api/deployments": {"PUT": "deployment.put"},
    "/api/models/{name}/sample-pulls": {"POST": "samples.pull"},
    "/api/sample-pulls/{pull_id}": {"DELETE": "samples.drop"},
    "/api/authority/rotation": {"POST": "authority.rotate"},
    "/api/authority/{sha256}": {"DELETE": "authority.drop"},
    "/api/certificates": {"POST": "certificate.issue"},
    "/api/signing/signed": {"POST": "signing.publish"},
    "/api/signing/rotations": {"POST": "signing.rotate"},
    "/api/restoration/confirmation": {"POST": "restore.confirm"},
    "/api/operators": {"POST": "operator.add"},
    "/api/operators/{name}": {"DELETE": "operator.remove"},
    "/api/operators/{name}/secret": {"POST": "operator.rotate"},
}

UNRECORDED: Mapping[tuple[str, str], str] = {
    ("PUT", "/api/blobs/{digest}"): "bytes under their own digest change nothing until a publish names them",
    ("POST", "/sign-in"): "reported by `Access`: session.open, or credential.show when refused",
    ("POST", "/sign-out"): "reported by `Access`: session.close",
    ("POST", "/api/sessions"): "as /sign-in",
    ("DELETE", "/api/sessions/current"): "as /sign-out",
}


class Asked(NamedTuple):
    action: str
    # What stands in the path for its placeholder; empty without one.
    target: str


def asked_by(method: str, path: str) -> Asked | None:
    """Return what a request is recorded as; None: it is not."""
    segments = path.split("/")
    for template, methods in ACTIONS.items():
        if method in methods and (target := _filled(template.split("/"), segments)) is not None:
            return Asked(methods[method], peer_text(target))
    return None


def _filled(template: list[str], segments: list[str]) -> str | None:
    """Return what stands at the placeholders of `template`; None: the path is another."""
    if len(template) != len(segments):
        return None
    pairs = [*zip(template, segments, strict=True)]
    if any(part != segment for part, segment in pairs if not part.startswith("{")):
        return None
    return "/".join(segment for part, segment in pairs if part.startswith("{"))
