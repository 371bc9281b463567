"""Private keys of the authorities: one file each, readable by the owner only, never in the database or its backups."""

from pathlib import Path

from core.atomic_files import sync_folder, write_atomically
from core.errors import Unavailable

_MODE = 0o600


class AuthorityKeys:
    """The files `<folder>/<sha256 of the certificate>.pem`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, sha256: str, key: bytes) -> None:
        """Store a key in PEM; it is durable afterwards."""
        _make_private(self._folder)
        write_atomically(self._path(sha256), key, mode=_MODE)

    def load(self, sha256: str) -> bytes:
        """Return a key in PEM.

        Raises:
            Unavailable: the file is missing or unreadable, or others may read it.
        """
        path = self._path(sha256)
        try:
            if path.stat().st_mode & 0o077:
                raise Unavailable(f"{path}: others may read this private key; run `chmod 600` on it")
            return path.read_bytes()
        except OSError as error:
            raise Unavailable(
                f"{path}: the private key of a certificate authority cannot be read ({error.strerror}); "
                "restore it from the backup of the data folder's keys"
            ) from error

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.pem"


def _make_private(folder: Path) -> None:
    """Make a folder and its missing parents for the owner only, durable: a key is lost with the folder around it."""
    if folder.is_dir():
        return
    _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)
