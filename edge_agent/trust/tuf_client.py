"""`nanofleet-agent tuf-client`: the agent's TUF client on the command line of the public TUF conformance suite.

    tuf-client --metadata-dir D init TRUSTED_ROOT
    tuf-client --metadata-dir D --metadata-url URL refresh
    tuf-client --metadata-dir D --metadata-url URL --target-name N … --target-base-url U --target-dir T download

The store, the bounds and the fetcher interface are the agent's; files come from a plain HTTP server. See CLIENT-CLI.md
of theupdateframework/tuf-conformance for the contract: exit code 0 when all of it succeeded, 1 otherwise.
"""

import argparse
from pathlib import Path

from core.atomic_files import write_atomically
from core.errors import InvalidRequest, NotFound

# Not `.json`: the suite takes every such file for metadata.
_ANCHOR = "trusted-root"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metadata-dir", type=Path, required=True, metavar="FOLDER", help="what is trusted lies here")
    parser.add_argument("--metadata-url", metavar="URL", help="where the repository's metadata is")
    parser.add_argument("--target-name", action="append", default=[], metavar="PATH", help="target; may be repeated")
    parser.add_argument("--target-base-url", metavar="URL", help="where the repository's targets are")
    parser.add_argument("--target-dir", type=Path, metavar="FOLDER", help="where verified targets go")
    commands = parser.add_subparsers(dest="tuf_command", required=True)
    init = commands.add_parser("init", help="trust a root")
    init.add_argument("trusted_root", type=Path)
    commands.add_parser("refresh", help="bring the top-level metadata up to date")
    commands.add_parser("download", help="fetch targets")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Raises:
        NanofleetError: it did not succeed; the message says why.
    """
    folder: Path = options.metadata_dir
    if options.tuf_command == "init":
        _init(folder, options.trusted_root)
        return 0
    # Here: the command's help must not wait for TUF and its cryptography.
    from edge_agent.trust.catalogue import Catalogue
    from edge_agent.trust.fetchers import FromHttp, Pace

    catalogue = Catalogue(folder, _anchor(folder), base_url=_required(options.metadata_url, "--metadata-url"))
    catalogue.refresh(FromHttp(pace=Pace()))
    if options.tuf_command == "download":
        base_url = _required(options.target_base_url, "--target-base-url")
        target_dir = Path(_required(options.target_dir, "--target-dir"))
        for target in options.target_name:
            catalogue.download(target, target_dir, base_url=base_url)
    catalogue.keep()
    return 0


def _init(folder: Path, trusted_root: Path) -> None:
    try:
        content = trusted_root.read_bytes()
    except OSError as error:
        raise NotFound(f"{trusted_root}: {error.strerror}; expected a TUF root") from error
    write_atomically(folder / _ANCHOR, content)
    write_atomically(folder / "root.json", content)


def _anchor(folder: Path) -> bytes:
    try:
        return (folder / _ANCHOR).read_bytes()
    except OSError as error:
        raise NotFound(f"{folder}: {error.strerror}; run init with a trusted root first") from error


def _required(value: str | Path | None, option: str) -> str:
    if value is None:
        raise InvalidRequest(f"expected {option}")
    return str(value)
