"""`nanofleet controller init`: what must be there before a controller can be asked anything, made without one.

    data_dir ─▶ foundation: lock, database, authority, catalogue and their keys ─▶ first admin ─▶ credential file

Whoever may write data_dir is the controller's owner, so the same command makes another admin when all secrets are lost
(`--reset-admin`). Every step may be repeated: what is there already stays.
"""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from pydantic import BaseModel

from controller.cli.credential import Credential, checked_url, read_credential, write_credential
from controller.cli.screen import Output, OutputOption, show
from core.addresses import parse_address
from core.errors import Conflict, InvalidRequest
from core.spiffe import CONTROLLER_DNS_NAME

if TYPE_CHECKING:
    from controller.access.service import Access, IssuedSecret
    from controller.foundation import Foundation
    from controller.settings import Settings


class MakeAdmin(Protocol):
    async def __call__(self, access: "Access", *, credential_path: Path) -> "IssuedSecret": ...


class InitialisedView(BaseModel):
    name: str
    controller: str
    credential: Path


def init(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML file; environment variables win over it.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the first admin.")] = "admin",
    credential: Annotated[
        Path | None,
        typer.Option(help="Where the admin's credential is written; without it, where every command looks for it."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Address under which operators reach the HTTP port; as the settings say otherwise."),
    ] = None,
    reset_admin: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make this admin anew, for when its secret is lost.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Set up a new controller and its first admin, without one running."""
    from controller.settings import load_settings

    settings = load_settings(config)
    make_admin = partial(first_admin, name=name) if reset_admin is None else partial(admin_anew, name=reset_admin)
    made = asyncio.run(
        initialise(
            settings,
            make_admin=make_admin,
            url=checked_url(url or url_of(settings)),
            credential_path=credential or context.obj.wanted_credential_path,
        )
    )
    show(
        made,
        f"admin {made.name} of {made.controller}: credential is in {made.credential}\n"
        f"start the controller with `nanofleet controller run{f' --config {config}' if config else ''}`",
        output=output,
    )


async def initialise(
    settings: "Settings", *, make_admin: MakeAdmin, url: str, credential_path: Path
) -> InitialisedView:
    """Prepare `settings.data_dir` and write the credential of the admin that `make_admin` makes.

    Raises:
        Conflict: a controller runs there, or `make_admin` refuses.
        Unavailable: something in data_dir cannot be opened.
    """
    from controller import foundation
    from controller.audit.model import CONSOLE, Act
    from core.clock import SystemClock

    async with AsyncExitStack() as stack:
        laid = await foundation.lay(settings, stack, clock=SystemClock())
        issued = await make_admin(laid.access, credential_path=credential_path)
        await laid.audit.record(Act(CONSOLE, "operator.secret", issued.operator.name, "admin, by `controller init`"))
        credential = _credential(settings, laid, issued, url=url)
    name = issued.operator.name
    try:
        write_credential(credential_path, credential)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{error}; admin {name} is made: run `nanofleet controller init --reset-admin {name}` with another file"
        ) from error
    return InitialisedView(name=name, controller=url, credential=credential_path)


def url_of(settings: "Settings") -> str:
    """Return how operators reach the HTTP port.

    Raises:
        InvalidRequest: it is bound to every address, and none is said to be the one.
    """
    bind = parse_address(settings.http_bind)
    return f"https://{settings.advertised(bind)}" if settings.http_speaks_tls else f"http://{bind}"


async def first_admin(access: "Access", *, name: str, credential_path: Path) -> "IssuedSecret":
    """Make an admin.

    Raises:
        Conflict: there is one already, or another credential stands where this one shall.
    """
    from controller.access.model import OperatorRole

    admins = [operator.name for operator in await access.operators() if operator.role is OperatorRole.ADMIN]
    if admins:
        raise Conflict(
            f"expected a controller without an admin, found {', '.join(admins)}; make others with `nanofleet operators "
            f"add`, or, when the secret is lost, `nanofleet controller init --reset-admin {admins[0]}`"
        )
    _refuse_to_overwrite(credential_path, owner=None)
    return await access.create(name, OperatorRole.ADMIN)


async def admin_anew(access: "Access", *, name: str, credential_path: Path) -> "IssuedSecret":
    """Give an admin another secret, or make one of that name.

    Raises:
        Conflict: it is no admin, or another credential stands where this one shall.
    """
    from controller.access.model import OperatorRole

    _refuse_to_overwrite(credential_path, owner=name)
    role = next((operator.role for operator in await access.operators() if operator.name == name), None)
    match role:
        case None:
            return await access.create(name, OperatorRole.ADMIN)
        case OperatorRole.ADMIN:
            return await access.rotate(name)
        case _:
            raise Conflict(f"operator {name}: expected an admin or a new name, got the role {role.value}")


def _refuse_to_overwrite(path: Path, *, owner: str | None) -> None:
    """Refuse unless there is no file yet, or the credential that `owner` had before."""
    found = read_credential(path).credential
    if found is not None and found.name != owner:
        raise Conflict(
            f"{path}: there is a credential of {found.name} at {found.controller} already; "
            "move it away, or name another file with --credential"
        )


def _credential(settings: "Settings", laid: "Foundation", issued: "IssuedSecret", *, url: str) -> Credential:
    """Return the credential, with whom to believe where the port shows a certificate of the fleet's authority."""
    made = Credential(controller=url, name=issued.operator.name, secret=issued.secret)
    if not settings.http_speaks_tls or settings.http_certificate is not None:
        return made
    bundle = laid.identity.server_identity().trust_bundle.decode()
    return made.model_copy(update={"trust_bundle": bundle, "server_name": CONTROLLER_DNS_NAME})
