"""The identity on disk: what counts, what is kept beside it, and what a damaged folder says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import IntegrityError
from core.grpc_transport import TlsIdentity
from edge_agent.identity.folder import MAX_EARLIER, Identity, IdentityFolder, NotEnrolled
from tests.support.identity_crash_points import NEW, OLD


@pytest.fixture
def folder(tmp_path: Path) -> IdentityFolder:
    return IdentityFolder(tmp_path / "identity")


def numbered(number: int) -> Identity:
    name = str(number).encode()
    return replace(OLD, tls=TlsIdentity(b"certificate " + name, b"key " + name, b"trust"))


def test_what_was_written_is_what_is_read(folder: IdentityFolder) -> None:
    folder.replace(OLD)
    assert folder.load() == OLD


def test_a_machine_without_an_identity_is_told_how_to_get_one(folder: IdentityFolder) -> None:
    with pytest.raises(NotEnrolled, match="nanofleet-agent enrol TOKEN"):
        folder.load()


def test_what_counted_before_is_kept_until_the_new_one_was_seen_to_work(folder: IdentityFolder) -> None:
    folder.replace(OLD)
    folder.replace(NEW)
    assert folder.load() == NEW
    assert folder.earlier() == (OLD,)
    folder.confirm()
    assert folder.earlier() == ()
    assert folder.load() == NEW


def test_identities_that_are_never_confirmed_do_not_pile_up(folder: IdentityFolder) -> None:
    for number in range(10):
        folder.replace(numbered(number))
    assert folder.earlier() == tuple(numbered(8 - back) for back in range(MAX_EARLIER))


def test_a_pending_key_is_forgotten_with_its_certificate(folder: IdentityFolder) -> None:
    folder.replace(OLD)
    folder.keep_pending(NEW.tls.private_key)
    assert folder.pending_key() == NEW.tls.private_key
    folder.replace(NEW)
    assert folder.pending_key() is None


def test_a_pending_key_outlives_a_change_of_the_authorities(folder: IdentityFolder) -> None:
    folder.replace(OLD)
    folder.keep_pending(NEW.tls.private_key)
    folder.replace(replace(OLD, tls=replace(OLD.tls, trust_bundle=b"others")))
    assert folder.pending_key() == NEW.tls.private_key


def test_only_the_owner_reads_keys(folder: IdentityFolder, tmp_path: Path) -> None:
    folder.replace(OLD)
    folder.keep_pending(b"key")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.pem")}
    assert set(modes) == {"key.pem", "certificate.pem", "trust.pem", "pending.pem"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("damaged", "content"),
    [("current", b"\xff"), ("current", b"seven"), ("1/identity.json", b"{}"), ("1/key.pem", None)],
)
def test_a_damaged_identity_is_told_from_a_missing_one(
    folder: IdentityFolder, tmp_path: Path, damaged: str, content: bytes | None
) -> None:
    folder.replace(OLD)
    path = tmp_path / "identity" / damaged
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match="enrol again"):
        folder.load()


def test_a_damaged_identity_can_be_replaced(folder: IdentityFolder, tmp_path: Path) -> None:
    folder.replace(OLD)
    (tmp_path / "identity" / "current").write_bytes(b"\xff")
    folder.replace(NEW)
    assert folder.load() == NEW


def test_an_identity_that_knows_more_than_this_version_is_read(folder: IdentityFolder, tmp_path: Path) -> None:
    folder.replace(OLD)
    path = tmp_path / "identity" / "1" / "identity.json"
    path.write_bytes(path.read_bytes().replace(b"{", b'{"later": 1,', 1))
    assert folder.load() == OLD


def test_a_power_loss_at_any_step_leaves_one_identity_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.identity_crash_points", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60
