"""What everything else stands on: the database, who may connect, what may run, who may operate.

Made by the controller when it starts, and by `nanofleet controller init` before there is one: the first of them makes
the fleet's authority, the catalogue and all of their keys, as files below `data_dir/keys`.
"""

import hashlib
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from controller.access.service import Access
from controller.api.audited import AccessWitness
from controller.audit.service import Audit, Bounds
from controller.fleet.service import Fleet
from controller.identity.keys import AuthorityKeys
from controller.identity.service import Identity
from controller.settings import Settings
from controller.signing.keys import EnvironmentKeys, KeyFiles, KeyRing
from controller.signing.service import Catalogue
from controller.storage.access import SqlAccessStore
from controller.storage.audit import SqlAuditStore
from controller.storage.catalogue import SqlCatalogueStore
from controller.storage.database import Database
from controller.storage.identity import SqlIdentityStore
from core import folder_lock
from core.clock import Clock
from core.errors import NotFound


@dataclass(frozen=True, slots=True)
class Foundation:
    database: Database
    identity: Identity
    catalogue: Catalogue
    access: Access
    audit: Audit

    async def trust_root(self, sha256: bytes = b"") -> bytes:
        """Return the catalogue's root with which a new machine begins to trust: the newest, unless one is named.

        An older one comes only to whom a token from before a rotation names it: keys that were rotated out can sign
        another future of the roots of their time.

        Raises:
            NotFound: none with that digest was published.
        """
        newest = self.catalogue.export_root()
        if not sha256 or hashlib.sha256(newest).digest() == sha256:
            return newest
        for version in range(self.catalogue.versions().root - 1, 0, -1):
            older = await self.catalogue.metadata(f"{version}.root.json")
            if hashlib.sha256(older).digest() == sha256:
                return older
        raise NotFound("catalogue: the token names a root that this controller never had; make another token")


async def lay(settings: Settings, stack: AsyncExitStack, *, clock: Clock) -> Foundation:
    """Open, or make, what stands in `settings.data_dir`; `stack` closes it.

    Raises:
        Conflict: a controller runs on it or on its database, or it is that of another trust domain.
        InvalidRequest: the database cannot serve us the way it was made.
        Unavailable: a database cannot be opened, or a key that signs online is missing.
    """
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Also one that somebody made before: what agents may run, and what is sent to them, is nobody else's to read.
    settings.data_dir.chmod(0o700)
    stack.enter_context(folder_lock.held(settings.data_dir / "controller.lock", what="controller"))
    database = await opened(settings.database_url, stack, password_file=settings.database_password_file)
    identity = Identity(
        SqlIdentityStore(database),
        AuthorityKeys(settings.keys_dir / "authorities"),
        clock=clock,
        trust_domain=settings.trust_domain,
    )
    await identity.prepare()
    keys = KeyRing(KeyFiles(settings.keys_dir), EnvironmentKeys(os.environ))
    catalogue = Catalogue(SqlCatalogueStore(database), keys, clock=clock)
    await catalogue.prepare()
    audit = Audit(SqlAuditStore(database), clock=clock, bounds=_audit_bounds(settings))
    await audit.prepare()
    return Foundation(database, identity, catalogue, Access(SqlAccessStore(database), clock=clock), audit)


def record_decisions(foundation: Foundation, fleet: Fleet, stack: AsyncExitStack) -> None:
    """Have sign-ins, and what the controller decides by itself, written down; `stack` writes the last of it."""
    audit = foundation.audit
    foundation.identity.on_decided(audit.decided)
    fleet.on_decided(audit.decided)
    foundation.access.watched_by(AccessWitness(audit))
    stack.push_async_callback(audit.flush)
    if (restored := fleet.restoration) is not None and restored.is_open:
        backup_at = restored.backup_at.isoformat(timespec="seconds")
        audit.decided("restore.watch", f"epoch {restored.epoch}", f"state of {backup_at}, nothing is pushed")


def _audit_bounds(settings: Settings) -> Bounds:
    return Bounds(settings.audit.max_entries, timedelta(days=settings.audit.kept_days))


async def opened(url: str, stack: AsyncExitStack, *, password_file: Path | None = None) -> Database:
    """Open a database at this release's schema; see `Database`."""
    database = Database(url, password_file=password_file)
    stack.push_async_callback(database.close)
    await database.migrate()
    return database
