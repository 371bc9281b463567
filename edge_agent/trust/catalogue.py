"""The catalogue on this machine's disk, brought up to date by python-tuf and read back for the verifier.

Layout of the folder: python-tuf's own (`root.json`, `timestamp.json`, …, `root_history/`). Two of its habits are made
up for here: it neither syncs what it writes, so `keep` does, and it replaces the `root.json` link in two steps, so we
always start from the embedded root and never from the cache. A cache that cannot even be opened is wiped and verified
again. One that merely contradicts what the network says is not: it is what protects from older metadata (TUF 5.4.3).
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import (
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from core.atomic_files import sync_folder
from core.catalogue import family_role, target_path
from core.errors import DiskFull, NotFound, Unavailable, Untrusted
from core.fleet_state import CatalogueVersions, Slot
from edge_agent.trust.fetchers import BASE_URL
from edge_agent.trust.verifier import TopLevel

# A folder where a file belongs, a loop of links and the like: power was lost, or somebody tidied up.
_BROKEN = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENOENT}
_FULL = {errno.ENOSPC, errno.EDQUOT}

# Chosen: a catalogue of 200 families stays below a tenth of each.
CONFIG = UpdaterConfig(snapshot_max_length=1_000_000, targets_max_length=4_000_000)


class Catalogue:
    """The metadata in `folder`, rooted in `root`; one writer at a time."""

    def __init__(self, folder: Path, root: bytes, *, base_url: str = BASE_URL) -> None:
        self._folder = folder
        self._root = root
        self._base_url = base_url
        self._updater: Updater | None = None

    def held_timestamp(self) -> bytes | None:
        """Return the timestamp that is held, unverified."""
        with suppress(OSError):
            return (self._folder / "timestamp.json").read_bytes()
        return None

    def refresh(self, fetcher: FetcherInterface) -> TopLevel:
        """Bring the top-level roles up to date (TUF 5.3 to 5.6).

        Raises:
            Untrusted: a signature, version, length or type does not hold.
            Unavailable: a file could not be had, or what there is has expired.
            DiskFull: there is no room for the metadata.
        """
        try:
            with _errors_translated():
                self._updater = self._refreshed(fetcher)
        except OSError as error:
            if error.errno not in _BROKEN:
                raise _disk_error(error) from error
            self.wipe()
            with _errors_translated(), _disk_errors_translated():
                self._updater = self._refreshed(fetcher)
        return self._top_level()

    def family(self, slot: Slot) -> Metadata[Targets] | None:
        """Return the role of the slot's model, as it lies in the cache after it was brought up to date; None: no role.

        Call it after `refresh`, which see for what it raises.
        """
        assert self._updater is not None, "refresh comes first"
        with _errors_translated(), _disk_errors_translated():
            self._updater.get_targetinfo(target_path(slot.model, slot.version, slot.variant))
            path = self._folder / f"{quote(family_role(slot.model), '')}.json"
            return Metadata[Targets].from_file(str(path)) if path.is_file() else None

    def download(self, target: str, folder: Path, *, base_url: str) -> None:
        """Fetch `target` into `folder` unless it lies there already; call it after `refresh`.

        Raises:
            NotFound: no role lists it.
        """
        assert self._updater is not None, "refresh comes first"
        with _errors_translated(), _disk_errors_translated():
            found = self._updater.get_targetinfo(target)
            if found is None:
                raise NotFound(f"{target}: expected a target of the repository, no role lists it")
            # One flat folder: a target's path, and what is hostile in it, becomes one file name.
            path = str(folder / quote(found.path, ""))
            if self._updater.find_cached_target(found, path) is None:
                self._updater.download_target(found, path, base_url)

    def keep(self) -> None:
        """Make everything that was verified durable.

        Raises:
            DiskFull, Unavailable: the disk did not take it.
        """
        with _disk_errors_translated():
            for folder in (self._folder / "root_history", self._folder):
                for path in folder.iterdir():
                    if path.is_file():
                        _sync_file(path)
                sync_folder(folder)
            sync_folder(self._folder.parent)

    def wipe(self) -> None:
        """Forget everything but the embedded root."""
        with _disk_errors_translated():
            if not self._folder.is_dir():
                self._folder.unlink(missing_ok=True)
                return
            for path in (self._folder / "root_history", *self._folder.glob("*.json")):
                _remove(path)

    def _refreshed(self, fetcher: FetcherInterface) -> Updater:
        self._folder.mkdir(parents=True, exist_ok=True)
        updater = Updater(
            str(self._folder), self._base_url, fetcher=fetcher, config=replace(CONFIG), bootstrap=self._root
        )
        updater.refresh()
        return updater

    def _top_level(self) -> TopLevel:
        def path(role: str) -> str:
            return str(self._folder / f"{role}.json")

        with _errors_translated(), _disk_errors_translated():
            return TopLevel(
                Metadata[Root].from_file(path(Root.type)).signed,
                Metadata[Timestamp].from_file(path(Timestamp.type)).signed,
                Metadata[Snapshot].from_file(path(Snapshot.type)).signed,
                Metadata[Targets].from_file(path(Targets.type)).signed,
            )


def versions_of(top: TopLevel) -> CatalogueVersions:
    return CatalogueVersions(top.root.version, top.timestamp.version)


@contextmanager
def _errors_translated() -> Iterator[None]:
    try:
        yield
    except ExpiredMetadataError as error:
        raise Unavailable(f"catalogue: {error}; nothing new is installed before it is signed again") from error
    except (RepositoryError, DownloadLengthMismatchError) as error:
        raise Untrusted(f"catalogue: {error}") from error
    except DownloadError as error:
        raise Unavailable(f"catalogue: {error}") from error


@contextmanager
def _disk_errors_translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError) -> DiskFull | Unavailable:
    if error.errno in _FULL:
        return DiskFull(f"catalogue: no room for the metadata at {error.filename}; free some space")
    return Unavailable(f"catalogue: disk: {error.strerror or error}")


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
