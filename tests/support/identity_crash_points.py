"""Die before every step by which an identity is replaced: `python -m tests.support.identity_crash_points FOLDER`.

Each child starts on a folder that holds the old identity, or none, keeps a pending key, replaces the identity and
confirms the new one; it ends at its n-th change of the file system, as a power cut would end it. The parent then
demands what was there or the new identity, whole, and that the same work can be done on what is left. Prints the number
of crash points of both.
"""

import os
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from core.addresses import Address
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId
from edge_agent.identity.folder import Identity, IdentityFolder, NotEnrolled
from tests.support.crash_points import COMPLETED, crash_at

OLD = Identity(
    AgentId("gate-1"),
    SiteId("berlin"),
    "fleet.test",
    Address("127.0.0.1", 7443),
    Address("127.0.0.1", 7444),
    "ab" * 32,
    datetime(2026, 1, 1, tzinfo=UTC),
    datetime(2026, 1, 8, tzinfo=UTC),
    TlsIdentity(b"old certificate", b"old key", b"old trust"),
)
NEW = replace(
    OLD,
    not_before=datetime(2026, 1, 4, tzinfo=UTC),
    not_after=datetime(2026, 1, 11, tzinfo=UTC),
    tls=TlsIdentity(b"new certificate", b"new key", b"new trust"),
)


def renew(folder: IdentityFolder) -> None:
    """Do all that a renewal does with the folder."""
    folder.keep_pending(NEW.tls.private_key)
    folder.replace(NEW)
    folder.confirm()


def present_in(folder: IdentityFolder) -> Identity | None:
    try:
        return folder.load()
    except NotEnrolled:
        return None


def require_whole(path: Path, *, before: Identity | None) -> None:
    """Raise AssertionError unless `before` or the new identity, whole, is in `path`, and can be gone on from."""
    folder = IdentityFolder(path)
    present = present_in(folder)
    assert present in (before, NEW), f"a mix: {present}"
    assert folder.pending_key() in (None, NEW.tls.private_key)
    if present is not None:
        assert all(identity in (OLD, NEW) for identity in folder.earlier())
    renew(folder)
    assert folder.load() == NEW
    assert folder.earlier() == ()
    assert folder.pending_key() is None
    left = sorted(entry.name for entry in path.iterdir())
    assert len(left) == 2, f"expected the pointer and one folder, got {left}"


def sweep(root: Path, *, before: Identity | None) -> int:
    template = root / "template"
    template.mkdir(parents=True)
    if before is not None:
        IdentityFolder(template).replace(before)
    number = 0
    while True:
        path = root / f"crash-{number}"
        shutil.copytree(template, path)
        child = os.fork()
        if child == 0:
            crash_at(number)
            renew(IdentityFolder(path))
            os._exit(COMPLETED)
        _, status = os.waitpid(child, 0)
        require_whole(path, before=before)
        if os.waitstatus_to_exitcode(status) == COMPLETED:
            return number
        number += 1


def main(root: Path) -> int:
    return sweep(root / "renewal", before=OLD) + sweep(root / "enrolment", before=None)


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
