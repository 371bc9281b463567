"""`nanofleet signing`: the catalogue's keys, what they signed, and what waits for keys that are elsewhere.

    on this side            where the keys are            on this side again
    signing stage FILE ──▶  signing sign FILE --key … ──▶ signing publish FILE

`new-key`, `keys` and `sign` ask no controller: they run on a machine that has no network. All others speak REST.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from controller.api import signing_views as views
from controller.cli import completion
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, age_text, peer_text, show
from controller.cli.watching import WatchOption, present
from core.atomic_files import write_atomically
from core.errors import Conflict

if TYPE_CHECKING:
    from controller.signing.keys import Signer
    from controller.signing.model import PublicKey

app = typer.Typer(help="Look after the keys that say what may run.", no_args_is_help=True)

# As in status: enough to tell keys apart, short enough for a table.
_KEY_CHARS = 16
_SOON_DAYS = 14
_STAGED = "staged: run `nanofleet signing stage`, sign the file where the keys are, and `nanofleet signing publish` it"

BundleArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The file that is carried to the keys and back.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of the model.", autocompletion=completion.model_names)
]
ExistingBundle = Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False)]


class BundleView(BaseModel):
    """A file on its way to the keys, or back."""

    file: Path
    changes: tuple[str, ...]
    missing_keys: tuple[str, ...] = ()
    """Keys one of which must sign too."""


class KeyFileView(BaseModel):
    file: Path
    key_id: str
    director_id: str
    """Its id where it is a director key."""
    public_key: str


class KeyFilesView(BaseModel):
    keys: tuple[KeyFileView, ...]


@app.command(epilog=examples("nanofleet signing status", "nanofleet signing status --watch"))
def status(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """Show every role with its version, expiry and keys, and what waits for signatures."""
    present(context, lambda client, _seen: client.signing(), _status, output=output, is_watched=watch)


@app.command("export-root", epilog=examples("nanofleet signing export-root root.json"))
def export_root(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Where to write it; without it, to standard output.")] = None,
) -> None:
    """Write the root of trust: what an agent begins with, and what everything else is verified against."""
    with client_of(context) as client:
        root = client.signing_root()
    if file is None:
        typer.echo(root)
    else:
        write_atomically(file, root)


@app.command(epilog=examples("nanofleet signing rotate targets", "nanofleet signing rotate director"))
def rotate(
    context: typer.Context,
    role: Annotated[views.KeyRoleText, typer.Argument(help="Whose key.")],
    replaces: Annotated[str | None, typer.Option(help="Beginning of the old key's id; without it, the first.")] = None,
    public_key: Annotated[
        str | None, typer.Option(help="The new key, from `signing new-key`; without it the controller makes one.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Replace a key by a new one, and sign anew whatever depends on it."""
    with usage_errors():
        body = views.RotationBody(role=role, replaces=replaces, public_key=public_key)
    with client_of(context) as client:
        rotation = client.rotate_key(body)
    line = f"{role}: key {rotation.removed[:_KEY_CHARS]} replaced by {rotation.added[:_KEY_CHARS]}, "
    show(rotation, line + ("published" if rotation.is_published else _STAGED), output=output)


@app.command(epilog=examples("nanofleet signing revoke digits-nano --version 2"))
def revoke(
    context: typer.Context,
    model: ModelArgument,
    version: Annotated[list[int] | None, typer.Option(help="A version to take back; may be given again.")] = None,
    below: Annotated[int | None, typer.Option(help="Take back every version below this one.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take versions of a model back: no agent installs them any more. What runs is replaced by `nanofleet deploy`."""
    with usage_errors():
        body = views.RevocationBody(versions=tuple(version or ()), below=below)
    with client_of(context) as client:
        revocation = client.revoke(model, body)
    show(revocation, f"{model}: " + ("revoked" if revocation.is_published else _STAGED), output=output)


@app.command(epilog=examples("nanofleet signing stage bundle.json"))
def stage(context: typer.Context, file: BundleArgument, output: OutputOption = Output.TABLE) -> None:
    """Write what waits for signatures to a file, to be signed where the keys are."""
    with client_of(context) as client:
        content = client.staged_metadata()
    from controller.signing.bundle import Bundle

    bundle = Bundle.from_bytes(content)
    write_atomically(file, content)
    changes = bundle.changes()
    lines = [*changes, f"Written to {file}. Where the keys are: nanofleet signing sign {file} --key KEY.pem"]
    show(BundleView(file=file, changes=tuple(changes)), _lines(lines), output=output)


@app.command(epilog=examples("nanofleet signing sign bundle.json --key targets.pem"))
def sign(
    file: ExistingBundle,
    key: Annotated[
        list[Path],
        typer.Option("--key", "--keys", exists=True, help="A key's PEM file, or a folder of them; may be given again."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask after showing what is signed.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a file from `signing stage` changes, and sign it, without network or controller."""
    from controller.signing.bundle import Bundle

    bundle = Bundle.from_bytes(file.read_bytes())
    changes = bundle.changes()
    # Before the question; for a program it stands in the result.
    Console(stderr=output is Output.JSON).print(_lines(changes), soft_wrap=True)
    if not yes:
        typer.confirm("Sign this?", abort=True, err=output is Output.JSON)
    now = datetime.now(UTC)
    signed = bundle.signed(_signers(key), now=now)
    write_atomically(file, signed.to_bytes())
    missing = sorted({key_id[:_KEY_CHARS] for key_ids in signed.missing(now=now).values() for key_id in key_ids})
    said = (
        f"Signed; one of {', '.join(missing)} must sign too."
        if missing
        else f"Signed. At the controller: nanofleet signing publish {file}"
    )
    show(BundleView(file=file, changes=tuple(changes), missing_keys=tuple(missing)), said, output=output)


@app.command(epilog=examples("nanofleet signing publish bundle.json"))
def publish(context: typer.Context, file: ExistingBundle, output: OutputOption = Output.TABLE) -> None:
    """Upload a signed file; the controller verifies it and publishes what was staged."""
    with client_of(context) as client:
        found = client.publish_signed(file.read_bytes())
    show(found, _status(found), output=output)


@app.command("new-key", epilog=examples("nanofleet signing new-key targets.pem"))
def new_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the private key.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a key, to be put in place by `signing rotate --public-key`; the private half stays in the file."""
    from controller.signing.keys import PrivateKey, write_key

    if file.exists():
        raise Conflict(f"{file}: there is a file already; name another, or remove it if it is no key in use")
    key = PrivateKey.generate()
    write_key(file, key)
    show(_key_file(file, key.public_key), key.public_key.hex, output=output)


@app.command("keys", epilog=examples("nanofleet signing keys targets.pem"))
def keys_in(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, help="Keys, or folders of them.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Say what keys are in files, to check copies of them; `signing status` at the controller names the same ids."""
    from controller.signing.keys import read_key

    table = Table("file", "key", "id of a director key", "public key")
    found = KeyFilesView(keys=tuple(_key_file(file, read_key(file).public_key) for file in _key_files(paths)))
    for key in found.keys:
        table.add_row(str(key.file), key.key_id[:_KEY_CHARS], key.director_id[:_KEY_CHARS], key.public_key)
    if output is Output.JSON:
        show(found, table, output=output)
    else:
        # Not folded: the whole of it is compared and copied.
        Console().print(table, soft_wrap=True)


def _key_file(file: Path, key: "PublicKey") -> KeyFileView:
    return KeyFileView(file=file, key_id=key.key_id, director_id=key.director_id, public_key=key.hex)


def _key_files(paths: list[Path]) -> list[Path]:
    return [file for path in paths for file in (sorted(path.rglob("*.pem")) if path.is_dir() else [path])]


def _signers(paths: list[Path]) -> "dict[str, Signer]":
    from controller.signing.keys import read_key

    keys = [read_key(file) for file in _key_files(paths)]
    return {key.public_key.key_id: key for key in keys}


def _lines(lines: list[str]) -> Text:
    # What stands in it came from another machine.
    return peer_text("\n".join(lines))


def _status(found: views.SigningView) -> Group:
    now = datetime.now(UTC)
    roles = Table("role", "version", "expires", "keys", "here")
    for role in found.roles:
        here = sum(key.is_here for key in role.keys)
        ids = "\n".join(key.id[:_KEY_CHARS] for key in role.keys)
        needs = f"{here} of {len(role.keys)}" + (f", {role.threshold} sign" if len(role.keys) > 1 else "")
        roles.add_row(role.role, str(role.version), _expiry(role.expires_at, now), ids, needs)
    return Group(roles, *_staged(found, now), f"keys: {'; '.join(found.key_places)}")


def _staged(found: views.SigningView, now: datetime) -> list[Table | str]:
    if not found.staged:
        return []
    table = Table("waits for signatures", "version", "since", "signed", "keys that may sign")
    for role in found.staged:
        ids = "\n".join(key[:_KEY_CHARS] for key in role.missing_keys)
        since = age_text(role.created_at, now=now)
        table.add_row(role.role, str(role.version), since, f"{role.signatures} of {role.threshold}", ids)
    return [table, _STAGED]


def _expiry(expires_at: datetime, now: datetime) -> Text:
    days = (expires_at - now).days
    style = "red" if days < 0 else "yellow" if days < _SOON_DAYS else ""
    return Text(f"{expires_at.astimezone():%Y-%m-%d} ({days} d)", style=style)
