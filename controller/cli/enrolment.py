"""`nanofleet devices token|identity|ban|unban` and `nanofleet authority`: who gets into the fleet, and who vouches.

The device commands are functions that the root adds to `devices`; `app` is the group `authority`.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controller.api import identity_views as views
from controller.cli import completion
from controller.cli.client import ControllerClient
from controller.cli.credential import write_credential
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, age_text, peer_text, show
from controller.cli.watching import WatchOption, present
from core.atomic_files import write_atomically
from core.errors import InvalidRequest
from core.spiffe import CONTROLLER_DNS_NAME

app = typer.Typer(help="Look after the authority that certifies agents.", no_args_is_help=True)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")
# As in `nanofleet signing`: enough to tell them apart, short enough for a table.
_DIGEST_CHARS = 16

AgentArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The agent's name.", autocompletion=completion.device_names)
]


def token(
    context: typer.Context,
    site: Annotated[str, typer.Option(help="The site that the device is at.", autocompletion=completion.site_names)],
    agent: Annotated[
        str | None, typer.Option(help="The only name it is good for; also replaces or unbans that agent.")
    ] = None,
    lifetime: Annotated[str, typer.Option(metavar="TIME", help="How long it may be used: 30m, 1h, 2d.")] = "1h",
    uses: Annotated[int, typer.Option(min=1, help="How many devices it lets in.")] = 1,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a token that lets a device in: give it to `nanofleet-agent enrol` there. It is shown once."""
    with usage_errors():
        body = views.TokenBody(site=site, agent=agent, lifetime_s=_seconds(lifetime), uses=uses)
    with client_of(context) as client:
        issued = client.create_token(body)
    show(issued, issued.text, output=output)


def identity(
    context: typer.Context, name: AgentArgument, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """Show what an agent was certified for last, until when, and whether it is banned."""

    def look(client: ControllerClient, _seen: views.IdentityView | None) -> views.IdentityView:
        return client.identity(name)

    present(context, look, _identity, output=output, is_watched=watch)


def _identity(found: views.IdentityView) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("agent", found.agent)
    table.add_row("site", found.site)
    table.add_row("key", found.key_sha256[:_DIGEST_CHARS])
    table.add_row("enrolled", f"{found.enrolled_at.astimezone():%Y-%m-%d %H:%M}")
    table.add_row("renewed", f"{found.renewed_at.astimezone():%Y-%m-%d %H:%M}")
    table.add_row("good until", f"{found.not_after.astimezone():%Y-%m-%d %H:%M}")
    if found.ban is not None:
        table.add_row("banned", peer_text(f"{found.ban.banned_at.astimezone():%Y-%m-%d %H:%M}: {found.ban.reason}"))
    return table


def ban(
    context: typer.Context,
    name: AgentArgument,
    reason: Annotated[str, typer.Option(help="Why; the device and other operators are told.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Throw an agent out: its session ends, and none of its keys counts any more."""
    with usage_errors():
        body = views.BanBody(reason=reason)
    with client_of(context) as client:
        identity = client.ban(name, body)
    remedy = (
        f"`nanofleet devices token --site {identity.site} --agent {identity.agent}` lets it in again, with a new key"
    )
    show(identity, f"{identity.agent} is banned; {remedy}", output=output)


def unban(context: typer.Context, name: AgentArgument, output: OutputOption = Output.TABLE) -> None:
    """Let a banned agent's last key count again, when the ban was a mistake."""
    with client_of(context) as client:
        identity = client.unban(name)
    show(identity, f"{identity.agent} may connect again, with the key that it has", output=output)


@app.command(epilog=examples("nanofleet authority status"))
def status(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List the authorities that are trusted, the oldest first."""
    present(context, lambda client, _seen: client.authorities(), _authorities, output=output, is_watched=watch)


@app.command(epilog=examples("nanofleet authority rotate"))
def rotate(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Take the next step of a rotation: prepare an authority, or let the prepared one sign.

    Without a second call the prepared one signs by itself once every agent that is online has heard of it.
    """
    with client_of(context) as client:
        found = client.rotate_authority()
    show(found, _authorities(found), output=output)


@app.command(epilog=examples("nanofleet authority drop 3f2a99c1 --yes"))
def drop(
    context: typer.Context,
    authority: Annotated[str, typer.Argument(metavar="SHA256", help="As `status` shows it, or in full.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Trust a next or retired authority no more: its key was stolen, and 98 days are too long.

    Agents that a retired one certified come back when they renew, within 4.2 days; those that were away during the
    rotation need a token, and every application and replica a new certificate. Tokens that were given out are void.
    Connections that stand are not ended: restart the controller. See "A stolen controller" in docs/security.md.
    """
    with client_of(context) as client:
        found = [each for each in client.authorities().authorities if each.sha256.startswith(authority)]
        if len(found) != 1:
            raise InvalidRequest(
                f"authority {authority!r}: expected one that is trusted, found {len(found)}; see `authority status`"
            )
        if not yes:
            typer.confirm(f"Refuse all that {found[0].sha256[:_DIGEST_CHARS]} certified?", abort=True, err=True)
        left = client.drop_authority(found[0].sha256)
    show(left, _authorities(left), output=output)


@app.command(epilog=examples("nanofleet authority trust", "nanofleet authority trust --save"))
def trust(
    context: typer.Context,
    is_saved: Annotated[
        bool, typer.Option("--save", help="Write them into the credential file, in the place of those in it.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the certificates that vouch for the controller: whom its clients shall believe.

    After every `rotate`, run it with --save wherever there is a credential file: once the old authority is dropped, a
    file that knows no other lets nobody connect any more.
    """
    with client_of(context) as client:
        found = client.authorities()
        file = client.credential_file
    if not is_saved:
        show(found, found.trust_bundle.rstrip(), output=output)
        return
    if file is None or file.credential is None or file.credential.server_name != CONTROLLER_DNS_NAME:
        raise InvalidRequest(
            "trust: expected a credential that believes the fleet's authorities; without one there is nothing to save: "
            "plain HTTP on this machine and an operator's own certificate do not rest on them"
        )
    write_credential(file.path, file.credential.model_copy(update={"trust_bundle": found.trust_bundle}))
    show(found, f"written to {file.path}", output=output)


@app.command(epilog=examples("nanofleet authority certify shop --folder shop"))
def certify(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the application, device, broker or replica is called.")],
    folder: Annotated[Path, typer.Option(help="Where identity.pem and trust.pem are written.")],
    request: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="PKCS #10 in PEM, for a P-256 key of your own; certificate.pem is written then, without a key.",
        ),
    ] = None,
    role: Annotated[views.CertifiedRoleText, typer.Option(help="What it may do.")] = "application",
    site: Annotated[str | None, typer.Option(help="The site that a device is at.")] = None,
    host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A DNS name or address of a broker; may be repeated.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Certify whoever does not enrol. Its key is made here and stays here.

    An application asks models over gRPC and sends spans; a device asks agents through the broker of its --site; a
    broker shows that it is the one at its --host names; a heavy replica fetches models.
    """
    # Here: no other command needs cryptography, and none may import gRPC before `controller run` has set it up.
    from controller.identity.authority import csr_pem, key_pem, new_key
    from core.grpc_transport import TlsIdentity
    from core.tls_files import TRUST_FILE, write_tls_identity

    key = new_key()
    csr = csr_pem(key) if request is None else request.read_text(errors="replace")
    with usage_errors():
        body = views.CertificateBody(csr=csr, role=role, name=name, site=site, hosts=tuple(host or ()))
    with client_of(context) as client:
        issued = client.certify(body)
    chain, trust = issued.certificate_chain.encode(), issued.trust_bundle.encode()
    if request is None:
        write_tls_identity(folder, TlsIdentity(chain, key_pem(key), trust))
    else:
        write_atomically(folder / "certificate.pem", chain)
        write_atomically(folder / TRUST_FILE, trust)
    show(issued, f"written to {folder}; good until {issued.not_after:%Y-%m-%d}", output=output)


def _seconds(text: str) -> float:
    """Return `90s`, `30m`, `1h` or `2d` in seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"lifetime: expected a number and one of s, m, h or d, such as 1h, got {text!r}")
    return float(int(match[1]) * _UNITS_S[match[2]])


def _authorities(found: views.AuthoritiesView) -> Table:
    now = datetime.now(UTC)
    table = Table("authority", "state", "made", "retired")
    for authority in found.authorities:
        retired = "-" if authority.retired_at is None else age_text(authority.retired_at, now=now)
        made = age_text(authority.created_at, now=now)
        table.add_row(authority.sha256[:_DIGEST_CHARS], authority.state, made, retired)
    return table
