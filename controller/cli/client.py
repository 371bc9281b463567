"""The controller's REST as methods; see `controller.api.operator_rest` for what each call does."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from controller.api import operator_views as views
from controller.api import signing_views
from core.addresses import is_loopback
from core.digest import Digest
from core.errors import NanofleetError

View = TypeVar("View", bound=BaseModel)
Parameters = Mapping[str, str | int | float]
_NO_PARAMETERS: Parameters = {}

CONNECT_TIMEOUT_S = 5.0
# Beyond the longest long poll, so that a slow answer is not taken for none.
READ_TIMEOUT_S = 30.0
LONG_POLL_S = 5.0
_BLOCK_BYTES = 1 << 18
_MAX_SHOWN_CHARS = 300


class Refused(NanofleetError):
    """The controller answered and said no; the message is its own."""


class ControllerAway(NanofleetError):
    """Nothing answers at the controller's address."""


class ControllerClient:
    """One controller; a context manager, because it keeps a connection."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # A proxy from the environment knows nothing of this machine.
            trust_env=not is_loopback(httpx.URL(url).host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    # ---- models ---------------------------------------------------------------------------------------------------

    def models(self) -> views.ModelsView:
        return self._get("/api/models", views.ModelsView)

    def model(self, name: str) -> views.ModelDetailView:
        return self._get(f"/api/models/{_segment(name)}", views.ModelDetailView)

    def has_blob(self, digest: Digest) -> bool:
        return self._send("HEAD", f"/api/blobs/{digest}", accept=frozenset({404})).is_success

    def put_blob(self, digest: Digest, file: Path, *, on_sent: Callable[[int], None]) -> None:
        """Upload a file; `on_sent` is told the bytes of every block that went out."""
        headers = {"content-length": str(file.stat().st_size), "content-type": "application/octet-stream"}
        self._send("PUT", f"/api/blobs/{digest}", content=_blocks(file, on_sent), headers=headers)

    def publish(self, name: str, body: views.PublishBody) -> views.PublicationView:
        return self._put("POST", f"/api/models/{_segment(name)}/versions", body, views.PublicationView)

    def publication(self, publication_id: str, *, seen_at: datetime) -> views.PublicationView:
        """Return how it stands as soon as that is not what was seen, or after LONG_POLL_S."""
        parameters: Parameters = {"wait_s": LONG_POLL_S, "seen_at": seen_at.isoformat()}
        return self._get(f"/api/publications/{publication_id}", views.PublicationView, parameters)

    # ---- fleet ----------------------------------------------------------------------------------------------------

    def agents(self) -> views.AgentsView:
        return self._get("/api/agents", views.AgentsView)

    def agents_after(self, revision: int, *, wait_s: float) -> views.AgentsView:
        """Return the agents as soon as something changed after `revision`, or after `wait_s`."""
        return self._get("/api/agents", views.AgentsView, {"after": revision, "wait_s": wait_s})

    def agent(self, agent_id: str) -> views.AgentView:
        return self._get(f"/api/agents/{_segment(agent_id)}", views.AgentView)

    def deployments(self) -> views.DeploymentsView:
        return self._get("/api/deployments", views.DeploymentsView)

    def deploy(self, body: views.DeploymentBody) -> views.DeployedView:
        return self._put("PUT", "/api/deployments", body, views.DeployedView)

    # ---- signing --------------------------------------------------------------------------------------------------

    def signing(self) -> signing_views.SigningView:
        return self._get("/api/signing", signing_views.SigningView)

    def signing_root(self) -> bytes:
        return self._send("GET", "/api/signing/root").content

    def staged_metadata(self) -> bytes:
        return self._send("GET", "/api/signing/staged").content

    def publish_signed(self, bundle: bytes) -> signing_views.SigningView:
        headers = {"content-type": "application/json"}
        return self._parsed(
            self._send("POST", "/api/signing/signed", content=iter([bundle]), headers=headers),
            signing_views.SigningView,
        )

    def rotate_key(self, body: signing_views.RotationBody) -> signing_views.RotationView:
        return self._put("POST", "/api/signing/rotations", body, signing_views.RotationView)

    def revoke(self, model: str, body: signing_views.RevocationBody) -> signing_views.RevocationView:
        return self._put("POST", f"/api/models/{_segment(model)}/revocations", body, signing_views.RevocationView)

    # ---- traces ---------------------------------------------------------------------------------------------------

    def traces(self, *, limit: int, service: str | None, model: str | None) -> views.TracesView:
        named = {"service": service, "model": model}
        chosen = {key: value for key, value in named.items() if value is not None}
        return self._get("/api/traces", views.TracesView, {"limit": limit, **chosen})

    def trace(self, trace_id: str) -> views.TraceView:
        return self._get(f"/api/traces/{_segment(trace_id)}", views.TraceView)

    # ---- transport ------------------------------------------------------------------------------------------------

    def _get(self, path: str, view: type[View], parameters: Parameters = _NO_PARAMETERS) -> View:
        return self._parsed(self._send("GET", path, parameters=parameters), view)

    def _put(self, method: str, path: str, body: BaseModel, view: type[View]) -> View:
        content, headers = body.model_dump_json(), {"content-type": "application/json"}
        return self._parsed(self._send(method, path, content=content, headers=headers), view)

    def _send(
        self,
        method: str,
        path: str,
        *,
        parameters: Parameters = _NO_PARAMETERS,
        content: str | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, params=parameters, content=content, headers=headers)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ControllerAway(
                f"no controller answers at {self._url}: start one with `nanofleet controller run`, "
                "or name another with --controller or NANOFLEET_CONTROLLER"
            ) from error
        except httpx.TransportError as error:
            raise ControllerAway(f"the controller at {self._url} stopped answering ({error}); see its log") from error
        if response.is_success or response.status_code in accept:
            return response
        raise Refused(_refusal(response))

    def _parsed(self, response: httpx.Response, view: type[View]) -> View:
        try:
            return view.model_validate_json(response.content)
        except ValidationError as error:
            raise Refused(
                f"expected a nanofleet controller of this version at {self._url}, got another answer: "
                f"{response.text[:_MAX_SHOWN_CHARS]!r}"
            ) from error


def _segment(name: str) -> str:
    """Return a name as one path segment, whatever somebody typed."""
    return quote(name, safe="")


def _blocks(file: Path, on_sent: Callable[[int], None]) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            yield block
            on_sent(len(block))


def _refusal(response: httpx.Response) -> str:
    """Return what the controller said, or what came instead."""
    try:
        return views.ProblemView.model_validate_json(response.content).detail
    except ValidationError:
        return f"the controller answered {response.status_code}: {response.text[:_MAX_SHOWN_CHARS]!r}"
