"""The file that says who we are to which controller; made by `controller init` and `operators add --save`.

    {"controller": "https://10.0.0.5:7080", "name": "ada", "secret": "nfo1.…",
     "trust_bundle": "-----BEGIN CERTIFICATE-----…", "server_name": "controller.nanofleet.internal"}

`trust_bundle` (PEM, or the path of a PEM file beside this one) is whom to believe that it is the controller; without
it, the authorities of this machine. `server_name` is the name in the controller's certificate, if that is not its
address.

Whoever can read the file may do what its operator may, so a file that others can read is refused.
"""

import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.atomic_files import write_atomically
from core.errors import InvalidRequest

MODE = 0o600
_MAX_BYTES = 1 << 20
_PEM = "-----BEGIN"
EXAMPLE = "http://127.0.0.1:7080"


def checked_url(text: str) -> str:
    """Return the address of a controller.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"expected an address such as {EXAMPLE}, got {text[:200]!r}: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment or url.userinfo:
        raise InvalidRequest(f"expected an address such as {EXAMPLE}, got {text[:200]!r}")
    return text


def _url(text: str) -> str:
    try:
        return checked_url(text)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error


class Credential(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    controller: Annotated[str, AfterValidator(_url)]
    name: str
    # In ASCII, so that it fits into a header.
    secret: Annotated[str, Field(pattern=r"^[!-~]{1,256}$", repr=False)]
    trust_bundle: str | None = None
    server_name: str | None = None

    def is_for(self, url: str) -> bool:
        """Say whether `url` is the controller that this was made for."""
        ours, other = httpx.URL(self.controller), httpx.URL(url)
        return (ours.scheme, ours.host, ours.port) == (other.scheme, other.host, other.port)


@dataclass(frozen=True, slots=True)
class CredentialFile:
    """Where a credential stands, and what it says; None: there is no such file."""

    path: Path
    credential: Credential | None

    def trust_bundle(self) -> str | None:
        """Return whom to believe that it is the controller, in PEM; None: the authorities of this machine.

        Raises:
            InvalidRequest: the file cannot be read.
        """
        bundle = None if self.credential is None else self.credential.trust_bundle
        if bundle is None or bundle.lstrip().startswith(_PEM):
            return bundle
        try:
            return (self.path.parent / bundle).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise self._bad_bundle(error) from error

    def tls(self) -> ssl.SSLContext:
        """Return how to check that a peer is the controller.

        Raises:
            InvalidRequest: the trust bundle is none.
        """
        try:
            return ssl.create_default_context(cadata=self.trust_bundle())
        except ssl.SSLError as error:
            raise self._bad_bundle(error) from error

    def _bad_bundle(self, error: Exception) -> InvalidRequest:
        return InvalidRequest(
            f"{self.path}: trust_bundle: expected certificates in PEM, or the path of a file of them, "
            f"got something else ({error}); ask whoever gave you the credential for it again"
        )


def default_path(environment: Mapping[str, str]) -> Path:
    """Return where credentials stand when nobody says otherwise (XDG Base Directory Specification)."""
    base = environment.get("XDG_CONFIG_HOME", "")
    # Relative ones are to be ignored, says the specification.
    folder = Path(base) if base.startswith("/") else Path.home() / ".config"
    return folder / "nanofleet" / "credential.json"


def read_credential(path: Path) -> CredentialFile:
    """Return the credential in `path`, if there is a file.

    Raises:
        InvalidRequest: it is no credential, or others can read it.
    """
    try:
        content = _read_private(path)
    except FileNotFoundError:
        return CredentialFile(path, None)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}; name a credential file that you may read") from error
    try:
        return CredentialFile(path, Credential.model_validate_json(content))
    except ValidationError as error:
        # Not its words: they repeat what was found, a secret perhaps.
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"])) or "content"
        raise InvalidRequest(
            f"{path}: expected a credential as `nanofleet controller init` writes it; {where}: {fault['msg']}"
        ) from None


def write_credential(path: Path, credential: Credential) -> None:
    """Write it so that only we can read it.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        write_atomically(path, credential.model_dump_json(indent=2, exclude_none=True).encode() + b"\n", mode=MODE)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}; name a file that can be written") from error


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        # Of the file that was opened, not of what stands there by now.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise InvalidRequest(f"{path}: expected a credential file, got something else")
        if status.st_mode & 0o077:
            raise InvalidRequest(
                f"{path}: expected a file that only you can read (mode 0600), got {stat.S_IMODE(status.st_mode):04o}; "
                f"run `chmod 600 {path}`, and `nanofleet operators rotate` if somebody may have read it"
            )
        return file.read()
