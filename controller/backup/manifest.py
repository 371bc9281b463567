"""What a backup holds: every file with its digest."""

import hashlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from core.errors import IntegrityError, InvalidRequest

MANIFEST = "manifest.json"
# Derived: a million blobs at some 200 bytes each.
MAX_MANIFEST_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20

# Told the bytes that were done since the last time.
Progress = Callable[[int], None]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"expected a path inside the backup, got {path[:80]!r}")
    return path


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(_inside)]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    created_at: AwareDatetime
    software_version: str
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def made_manifest(folder: Path, *, now: datetime, software_version: str) -> Manifest:
    """Return the manifest of all that stands in `folder`."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = [
        FileEntry(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in found
    ]
    return Manifest(created_at=now, software_version=software_version, files=tuple(files))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a backup.

    Raises:
        InvalidRequest: `folder` is no backup, or one of a newer release.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InvalidRequest(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes")
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InvalidRequest(f"{folder}: expected a backup with {MANIFEST}; name its folder") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise InvalidRequest(f"{path}: expected a manifest of format 1: {where}: {fault['msg']}") from error


def verify(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Look at every byte that the manifest names.

    Raises:
        IntegrityError: a file is missing, or is not what it was.
    """
    for file in manifest.files:
        path = folder / file.path
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(f"{path}: expected a file of the backup, it is missing; use another backup")
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            raise IntegrityError(f"{path}: is not what was backed up; use another backup")
        progress(file.size_bytes)


def sha256_of(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
