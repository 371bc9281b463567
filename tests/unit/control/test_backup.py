"""A backup is whole or not there; a restore takes nothing that is not what it was, and loses nothing that was there."""

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controller import foundation
from controller.access.model import OperatorRole
from controller.backup.making import make_backup
from controller.backup.manifest import MANIFEST, Manifest, read_manifest
from controller.backup.restoring import restore_backup
from controller.fleet.restoration import Restoration
from controller.registry.blobs import BlobStore
from controller.settings import Settings
from controller.storage.fleet import SqlFleetStore
from core.clock import SystemClock
from core.digest import Digest
from core.errors import Conflict, IntegrityError, InvalidRequest

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Place:
    """A controller's state with one operator and one blob."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(data_dir=folder / "data")
        self.target = folder / "backup"
        self.done_bytes: list[int] = []

    async def fill(self, operator: str = "ada") -> None:
        async with AsyncExitStack() as stack:
            laid = await foundation.lay(self.settings, stack, clock=SystemClock())
            await laid.access.create(operator, OperatorRole.ADMIN)
            blobs = BlobStore(self.settings.blobs_dir)
            await blobs.prepare()
            self.blob: Digest = await blobs.put_bytes(b"weights")
            self.blob_path = blobs.path(self.blob)
            await blobs.close()

    async def operators(self) -> tuple[list[str], Restoration | None]:
        """Open it as a controller would; return who may operate, and whether it was restored."""
        async with AsyncExitStack() as stack:
            laid = await foundation.lay(self.settings, stack, clock=SystemClock())
            restoration = await SqlFleetStore(laid.database).read(lambda records: records.restoration())
            return [operator.name for operator in await laid.access.operators()], restoration

    async def backup(self) -> Manifest:
        return await asyncio.to_thread(
            make_backup,
            self.settings,
            self.target,
            config=None,
            now=NOW,
            software_version="1",
            progress=self.done_bytes.append,
        )

    async def restore(self, *, replaces: bool = False, days_later: int = 1) -> Path | None:
        _, aside = await asyncio.to_thread(
            restore_backup,
            self.settings,
            self.target,
            replaces=replaces,
            now=NOW + timedelta(days=days_later),
            progress=self.done_bytes.append,
        )
        return aside


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    await made.fill()
    return made


async def test_what_was_backed_up_comes_back_marked_as_restored(place: Place) -> None:
    manifest = await place.backup()
    await place.fill("eve")
    aside = await place.restore(replaces=True)

    names, restoration = await place.operators()
    assert names == ["ada"]
    assert restoration == Restoration(NOW + timedelta(days=1), NOW, 2)
    assert place.blob_path.read_bytes() == b"weights"
    assert aside is not None
    assert (aside / "controller.sqlite").exists()
    assert sum(place.done_bytes) >= manifest.size_bytes


async def test_a_backup_is_taken_while_the_controller_runs(place: Place) -> None:
    async with AsyncExitStack() as stack:
        laid = await foundation.lay(place.settings, stack, clock=SystemClock())
        taking = asyncio.create_task(place.backup())
        for number in range(20):
            await laid.access.create(f"op-{number}", OperatorRole.VIEWER)
        await taking
    await place.restore(replaces=True)

    assert "ada" in (await place.operators())[0]


async def test_every_restore_has_a_higher_epoch_than_the_one_before(place: Place) -> None:
    await place.backup()
    for days in (1, 2):
        await place.restore(replaces=True, days_later=days)

    restoration = (await place.operators())[1]
    assert restoration is not None
    assert restoration.epoch == 3


async def test_a_state_that_is_there_is_not_replaced_unless_told(place: Place) -> None:
    await place.backup()
    with pytest.raises(Conflict, match="--replace"):
        await place.restore()

    assert (await place.operators())[1] is None


async def test_a_running_controller_is_not_restored_under_its_feet(place: Place) -> None:
    await place.backup()
    async with AsyncExitStack() as stack:
        await foundation.lay(place.settings, stack, clock=SystemClock())
        with pytest.raises(Conflict, match="only controller"):
            await place.restore(replaces=True)


async def test_a_backup_is_never_written_over(place: Place) -> None:
    await place.backup()
    with pytest.raises(Conflict, match="new folder"):
        await place.backup()


async def test_a_backup_that_was_cut_off_has_no_name_and_does_not_stop_the_next(place: Place) -> None:
    partial = place.target.with_name("backup.partial")
    (partial / "keys").mkdir(parents=True)
    (partial / "keys" / "left.pem").write_text("half")
    await place.backup()

    assert not partial.exists()
    assert "keys/left.pem" not in {file.path for file in read_manifest(place.target).files}


async def test_a_blob_that_is_not_what_its_name_says_fails_the_backup(place: Place) -> None:
    place.blob_path.chmod(0o600)
    place.blob_path.write_bytes(b"rotten!")
    with pytest.raises(IntegrityError, match="not what its name says"):
        await place.backup()

    assert not place.target.exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "linked"])
async def test_a_damaged_backup_is_refused_before_anything_is_touched(place: Place, damage: str) -> None:
    manifest = await place.backup()
    victim = place.target / next(file.path for file in manifest.files if file.path.startswith("keys/"))
    content = victim.read_bytes()
    victim.unlink()
    if damage == "changed":
        victim.write_bytes(b"x" * len(content))
    if damage == "linked":
        outside = place.folder / "outside"
        outside.write_bytes(content)
        victim.symlink_to(outside)
    with pytest.raises(IntegrityError, match="another backup"):
        await place.restore(replaces=True)

    assert (await place.operators()) == (["ada"], None)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "keys/../../evil", ""])
async def test_a_manifest_that_names_what_is_outside_is_refused(place: Place, path: str) -> None:
    await place.backup()
    manifest = json.loads((place.target / MANIFEST).read_bytes())
    manifest["files"][0]["path"] = path
    (place.target / MANIFEST).write_text(json.dumps(manifest))

    with pytest.raises(InvalidRequest, match="manifest of format 1"):
        await place.restore(replaces=True)


async def test_what_is_no_backup_is_refused(place: Place) -> None:
    place.target.mkdir()
    with pytest.raises(InvalidRequest, match="expected a backup"):
        await place.restore(replaces=True)
    with pytest.raises(InvalidRequest, match="expected a controller's data_dir"):
        make_backup(
            Settings(data_dir=place.folder / "none"),
            place.folder / "other",
            config=None,
            now=NOW,
            software_version="1",
            progress=place.done_bytes.append,
        )


async def test_keys_and_the_backup_are_for_their_owner_alone(place: Place) -> None:
    manifest = await place.backup()

    assert place.target.stat().st_mode & 0o077 == 0
    keys = [place.target / file.path for file in manifest.files if file.path.startswith("keys/")]
    assert keys
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys)
    await place.restore(replaces=True)
    assert all(path.stat().st_mode & 0o077 == 0 for path in place.settings.keys_dir.rglob("*.pem"))


async def test_what_the_controller_writes_after_a_restore_does_not_change_the_backup(place: Place) -> None:
    before = await place.backup()
    await place.restore(replaces=True)
    await place.fill("eve")

    assert read_manifest(place.target) == before
    assert (
        place.blob_path.stat().st_ino
        != (place.target / "blobs" / place.blob_path.relative_to(place.settings.blobs_dir)).stat().st_ino
    )


async def test_a_state_that_cannot_be_read_any_more_is_replaced_all_the_same(place: Place) -> None:
    await place.backup()
    (place.settings.data_dir / "controller.sqlite").write_bytes(b"no database at all" * 1000)
    for beside in ("-wal", "-shm"):
        (place.settings.data_dir / f"controller.sqlite{beside}").unlink(missing_ok=True)
    await place.restore(replaces=True)

    assert (await place.operators())[0] == ["ada"]
