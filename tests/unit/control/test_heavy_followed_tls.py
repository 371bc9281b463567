"""A replica that outlives its certificate goes on with the next one."""

from pathlib import Path

import pytest

from controller.heavy.followed_tls import LOOK_S, FollowedTls
from core.grpc_transport import TlsIdentity
from core.tls_files import IDENTITY_FILE, read_tls_identity, write_tls_identity
from tests.support.fleet_values import HeldClock

OLD, NEW = TlsIdentity(b"old chain", b"old key", b"trust"), TlsIdentity(b"new chain", b"new key", b"trust")


class Replica:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = HeldClock()
        self.heard: list[TlsIdentity] = []
        write_tls_identity(folder, OLD)
        shown = read_tls_identity(folder)
        self.followed = FollowedTls(folder, self.heard.append, shown=shown, clock=self.clock)

    def look_an_hour_later(self) -> None:
        self.clock.advance(LOOK_S)
        self.followed.look()


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return Replica(tmp_path)


def test_a_renewed_certificate_is_handed_on_once(replica: Replica) -> None:
    write_tls_identity(replica.folder, NEW)

    replica.look_an_hour_later()
    replica.look_an_hour_later()

    assert replica.heard == [read_tls_identity(replica.folder)]


def test_nothing_is_read_before_an_hour_has_passed(replica: Replica) -> None:
    write_tls_identity(replica.folder, NEW)

    replica.followed.look()

    assert replica.heard == []


def test_a_missing_file_leaves_the_old_certificate(replica: Replica) -> None:
    (replica.folder / IDENTITY_FILE).unlink()
    replica.look_an_hour_later()
    assert replica.heard == []

    write_tls_identity(replica.folder, NEW)
    replica.look_an_hour_later()

    assert len(replica.heard) == 1
