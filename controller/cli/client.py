"""The controller's REST as methods; see `controller.api.operator_rest` for what each call does.

Every request shows the secret of our credential, over TLS or to this machine only.
"""

import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from controller.api import (
    access_views,
    audit_views,
    identity_views,
    records_views,
    restoration_views,
    sample_views,
    signing_views,
)
from controller.api import operator_views as views
from controller.api.restoration_views import NOTICE_HEADER, RESTORED
from controller.cli.credential import CredentialFile
from controller.cli.screen import warn
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


class Busy(Refused):
    """The controller says that the same call may succeed later."""


class ControllerAway(NanofleetError):
    """Nothing answers at the controller's address."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for a connection, and for every part of an answer."""

    connect_s: float = CONNECT_TIMEOUT_S
    read_s: float = READ_TIMEOUT_S


class ControllerClient:
    """One controller; a context manager, because it keeps a connection."""

    def __init__(
        self,
        url: str,
        *,
        credential_file: CredentialFile | None = None,
        patience: Patience = Patience(),
    ) -> None:
        """Take who we are to the controller at `url`; None stands for nobody.

        Raises:
            Refused: the secret would cross the network in clear.
            InvalidRequest: the credential's trust bundle is none.
        """
        self.url = url
        self._has_warned = False
        self.credential_file = credential_file
        self.credential = None if credential_file is None else credential_file.credential
        address = httpx.URL(url)
        is_here, is_tls = is_loopback(address.host), address.scheme == "https"
        if self.credential is not None and not is_tls and not is_here:
            raise Refused(f"{url}: expected https for a controller on another machine: the secret would cross in clear")
        # The address is checked against the certificate, unless the credential says which name stands there.
        name = None if self.credential is None else self.credential.server_name
        self._extensions = {} if name is None else {"sni_hostname": name}
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(patience.read_s, connect=patience.connect_s),
            verify=credential_file.tls() if credential_file is not None and is_tls else True,
            headers={} if self.credential is None else {"authorization": f"Bearer {self.credential.secret}"},
            # A proxy from the environment knows nothing of this machine.
            trust_env=not is_here,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    # ---- the controller itself ------------------------------------------------------------------------------------

    def health(self) -> views.HealthView:
        return self._get("/api/health", views.HealthView)

    def me(self) -> access_views.MeView:
        return self._get("/api/me", access_views.MeView)

    def now(self) -> datetime | None:
        """Return what time it is there, to the second, by the header of an answer; None: it does not say."""
        said = self._send("GET", "/api/health").headers.get("date")
        return None if said is None else parsedate_to_datetime(said)

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

    def publication(self, publication_id: str, *, seen_at: datetime | None) -> views.PublicationView:
        """Return how it stands: at once, or as soon as that is not what was seen, or after LONG_POLL_S."""
        parameters: Parameters = {} if seen_at is None else {"wait_s": LONG_POLL_S, "seen_at": seen_at.isoformat()}
        return self._get(f"/api/publications/{_segment(publication_id)}", views.PublicationView, parameters)

    # ---- fleet ----------------------------------------------------------------------------------------------------

    def agents(self) -> views.AgentsView:
        return self._get("/api/agents", views.AgentsView)

    def agents_after(self, revision: int, *, wait_s: float) -> views.AgentsView:
        """Return the agents as soon as something changed after `revision`, or after `wait_s`."""
        return self._get("/api/agents", views.AgentsView, {"after": revision, "wait_s": wait_s})

    def agent(self, agent_id: str) -> views.AgentView:
        return self._get(f"/api/agents/{_segment(agent_id)}", views.AgentView)

    def permit_transfer(self, agent_id: str, body: views.TransferBody) -> views.SlotView:
        return self._put("POST", f"/api/agents/{_segment(agent_id)}/transfers", body, views.SlotView)

    def deployments(self) -> views.DeploymentsView:
        return self._get("/api/deployments", views.DeploymentsView)

    def deploy(self, body: views.DeploymentBody) -> views.DeployedView:
        return self._put("PUT", "/api/deployments", body, views.DeployedView)

    # ---- hard examples --------------------------------------------------------------------------------------------

    def sample_counts(self) -> sample_views.SampleCountsView:
        return self._get("/api/samples", sample_views.SampleCountsView)

    def pull_samples(self, model: str, body: sample_views.PullBody) -> sample_views.SamplePullView:
        return self._put("POST", f"/api/models/{_segment(model)}/sample-pulls", body, sample_views.SamplePullView)

    def sample_pulls(self) -> sample_views.SamplePullsView:
        return self._get("/api/sample-pulls", sample_views.SamplePullsView)

    def sample_pull(
        self, pull_id: str, *, start: int = 0, after: int | None = None, wait_s: float = 0.0
    ) -> sample_views.SamplePullDetailView:
        """Return what came, from the `start`-th sample on: at once, or when something changed after `after`."""
        waiting: Parameters = {} if after is None else {"after": after, "wait_s": wait_s}
        path = f"/api/sample-pulls/{_segment(pull_id)}"
        return self._get(path, sample_views.SamplePullDetailView, {"start": start, **waiting})

    def sample(self, pull_id: str, agent: str, digest: str) -> bytes:
        path = f"/api/sample-pulls/{_segment(pull_id)}/samples/{_segment(agent)}/{_segment(digest)}"
        return self._send("GET", path).content

    def drop_sample_pull(self, pull_id: str) -> None:
        self._send("DELETE", f"/api/sample-pulls/{_segment(pull_id)}")

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

    # ---- operators ------------------------------------------------------------------------------------------------

    def operators(self) -> access_views.OperatorsView:
        return self._get("/api/operators", access_views.OperatorsView)

    def add_operator(self, body: access_views.OperatorBody) -> access_views.IssuedSecretView:
        return self._put("POST", "/api/operators", body, access_views.IssuedSecretView)

    def rotate_operator(self, name: str) -> access_views.IssuedSecretView:
        response = self._send("POST", f"/api/operators/{_segment(name)}/secret")
        return self._parsed(response, access_views.IssuedSecretView)

    def remove_operator(self, name: str) -> None:
        self._send("DELETE", f"/api/operators/{_segment(name)}")

    # ---- after a restore ------------------------------------------------------------------------------------------

    def restoration(self) -> restoration_views.RestorationView:
        return self._get("/api/restoration", restoration_views.RestorationView)

    def confirm_restore(self) -> restoration_views.ConfirmedView:
        return self._parsed(self._send("POST", "/api/restoration/confirmation"), restoration_views.ConfirmedView)

    # ---- what agents write down -----------------------------------------------------------------------------------

    def usage(self, parameters: Parameters) -> records_views.UsageReportView:
        return self._get("/api/usage", records_views.UsageReportView, parameters)

    def events(self, agent: str, parameters: Parameters) -> records_views.AgentEventsView:
        return self._get(f"/api/agents/{_segment(agent)}/events", records_views.AgentEventsView, parameters)

    # ---- audit ----------------------------------------------------------------------------------------------------

    def audit(self, parameters: Parameters) -> audit_views.AuditView:
        return self._get("/api/audit", audit_views.AuditView, parameters)

    def verify_audit(self, parameters: Parameters) -> audit_views.AuditVerificationView:
        return self._get("/api/audit/verification", audit_views.AuditVerificationView, parameters)

    # ---- identity -------------------------------------------------------------------------------------------------

    def create_token(self, body: identity_views.TokenBody) -> identity_views.IssuedTokenView:
        return self._put("POST", "/api/enrolment-tokens", body, identity_views.IssuedTokenView)

    def tokens(self) -> identity_views.TokensView:
        return self._get("/api/enrolment-tokens", identity_views.TokensView)

    def remove_token(self, token_id: str) -> None:
        self._send("DELETE", f"/api/enrolment-tokens/{_segment(token_id)}")

    def identity(self, agent: str) -> identity_views.IdentityView:
        return self._get(f"/api/agents/{_segment(agent)}/identity", identity_views.IdentityView)

    def ban(self, agent: str, body: identity_views.BanBody) -> identity_views.IdentityView:
        return self._put("POST", f"/api/agents/{_segment(agent)}/ban", body, identity_views.IdentityView)

    def unban(self, agent: str) -> identity_views.IdentityView:
        response = self._send("DELETE", f"/api/agents/{_segment(agent)}/ban")
        return self._parsed(response, identity_views.IdentityView)

    def authorities(self) -> identity_views.AuthoritiesView:
        return self._get("/api/authority", identity_views.AuthoritiesView)

    def rotate_authority(self) -> identity_views.AuthoritiesView:
        return self._parsed(self._send("POST", "/api/authority/rotation"), identity_views.AuthoritiesView)

    def drop_authority(self, sha256: str) -> identity_views.AuthoritiesView:
        return self._parsed(self._send("DELETE", f"/api/authority/{_segment(sha256)}"), identity_views.AuthoritiesView)

    def certify(self, body: identity_views.CertificateBody) -> identity_views.CertificateView:
        return self._put("POST", "/api/certificates", body, identity_views.CertificateView)

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
            response = self._http.request(
                method, path, params=parameters, content=content, headers=headers, extensions=self._extensions
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if (reason := _tls_reason(error)) is not None:
                raise Refused(
                    f"{self.url}: expected the controller of our credential, got a peer that does not prove to be it "
                    f"({reason}); check its address, and trust_bundle and server_name in the credential file"
                ) from error
            raise ControllerAway(
                f"no controller answers at {self.url}: start one with `nanofleet controller run`, "
                "or name another with --controller or NANOFLEET_CONTROLLER"
            ) from error
        except httpx.TransportError as error:
            raise ControllerAway(f"the controller at {self.url} stopped answering ({error}); see its log") from error
        self._show_notice(response)
        if response.is_success or response.status_code in accept:
            return response
        if response.status_code == 401:
            # What answers HEAD has no body.
            said = _refusal(response) if response.content else "the controller does not know who asks"
            raise Refused(f"{said}; {self._remedy()}")
        raise (Busy if response.status_code in {429, 503} else Refused)(_refusal(response))

    def _show_notice(self, response: httpx.Response) -> None:
        """Warn, once for a command, that the controller waits for a person."""
        if response.headers.get(NOTICE_HEADER) == RESTORED and not self._has_warned:
            self._has_warned = True
            warn(
                "this controller was restored from a backup and pushes nothing: see `nanofleet controller drift`, then "
                "run `nanofleet controller confirm-restore`"
            )

    def _remedy(self) -> str:
        """Say what to do about a controller that does not know us."""
        if self.credential_file is None or self.credential is None:
            return (
                f"no credential was shown to {self.url}: name the one for it with --credential or "
                "NANOFLEET_CREDENTIAL; the first is made by `nanofleet controller init` on the controller's machine"
            )
        return f"shown was that of {self.credential.name} in {self.credential_file.path}"

    def _parsed(self, response: httpx.Response, view: type[View]) -> View:
        try:
            return view.model_validate_json(response.content)
        except ValidationError as error:
            raise Refused(
                f"expected a nanofleet controller of this version at {self.url}, got another answer: "
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


def _tls_reason(error: BaseException) -> str | None:
    """Return what the TLS handshake failed for, if that is why there is no connection."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    match cause:
        case ssl.SSLCertVerificationError():
            return cause.verify_message
        case ssl.SSLError():
            return cause.reason or "TLS failed"
        case _:
            return None
