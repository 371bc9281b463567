"""What the root command hands to every other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from pydantic import ValidationError

from controller.cli.client import ControllerClient, Patience
from controller.cli.credential import EXAMPLE, Credential, CredentialFile, default_path, read_credential
from core.errors import InvalidRequest

DEFAULT_CONTROLLER = EXAMPLE


@dataclass(frozen=True, slots=True)
class Options:
    """None: not named on the command line, nor in the environment."""

    controller_url: str | None
    credential_path: Path | None = None

    @property
    def wanted_credential_path(self) -> Path:
        return self.credential_path or default_path(os.environ)

    def credential_file(self) -> CredentialFile:
        """Return who we are.

        Raises:
            InvalidRequest: the file that was named is not there, or no credential.
        """
        file = read_credential(self.wanted_credential_path)
        if self.credential_path is not None and file.credential is None:
            raise InvalidRequest(
                f"{file.path}: no such file; name one that `nanofleet controller init` or `nanofleet operators add "
                "--save` wrote"
            )
        return file

    def shown_to(self, url: str, file: CredentialFile) -> Credential | None:
        """Return the credential if it may go to `url`: whoever listens there learns the secret.

        It goes to another controller than its own only when both were named.
        """
        credential = file.credential
        if credential is None or (self.credential_path is None and not credential.is_for(url)):
            return None
        return credential


def client_of(context: typer.Context) -> ControllerClient:
    """Return a client of the controller that the command line or our credential names; use it as a context manager."""
    options: Options = context.obj
    return client_for(options)


def client_for(options: Options, *, patience: Patience = Patience()) -> ControllerClient:  # noqa: B008 (frozen)
    file = options.credential_file()
    own = DEFAULT_CONTROLLER if file.credential is None else file.credential.controller
    url = options.controller_url or own
    credential = options.shown_to(url, file)
    return ControllerClient(url, credential_file=CredentialFile(file.path, credential), patience=patience)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Let a body that does not fit be an error of the command line, naming the field."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise typer.BadParameter(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
