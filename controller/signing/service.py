"""`Catalogue`: what may ever run, as signed TUF metadata; who may ask for changes and who reads it.

    release · revoke · rotate · renew ──▶ Revision ──▶ keys are here?  yes ──▶ publish, with snapshot and timestamp
                                                                       no ───▶ staged ──▶ signed elsewhere ──▶ publish

One writer at a time; a publish is one transaction, and what is read comes from the edition in memory.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from controller.signing.bundle import Bundle
from controller.signing.edition import NO_EDITION, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, Edition, sealed
from controller.signing.expiry import Expiries
from controller.signing.keys import KeyRing, Signer
from controller.signing.model import (
    KEY_COUNTS,
    KeyRole,
    Lifetimes,
    PublicKey,
    Releasable,
    RoleFile,
    Rotation,
    SigningStatus,
    StagedFile,
)
from controller.signing.revision import Revision
from controller.signing.status import status_of
from controller.signing.store import CatalogueStore
from core.catalogue import family_role
from core.clock import Clock
from core.digest import Digest, hex_of
from core.errors import Conflict, InvalidRequest, NotFound, Untrusted
from core.fleet_state import CatalogueVersions, MetadataFile, Slot
from core.fleet_wire import MAX_METADATA_BYTES, MAX_METADATA_FILES
from core.ids import ModelName

_log = logging.getLogger(__name__)

ONLINE_ROLES = frozenset({KeyRole.SNAPSHOT, KeyRole.TIMESTAMP, KeyRole.DIRECTOR})
# Chosen: expiries are days away.
RENEWAL_CHECK_S = 3600.0
# `1.root.json`; a role's name is at most 71 characters, a version of ours at most ten digits.
_FILE_NAME = re.compile(r"([1-9][0-9]{0,9})\.(root|targets|snapshot|family-[A-Za-z0-9][A-Za-z0-9._-]{0,63})\.json")


class _Next(NamedTuple):
    """What a revision leads to: files to store, and the state with them."""

    files: Sequence[RoleFile]
    edition: Edition
    staged: dict[str, StagedFile]


class Catalogue:
    """Call `prepare` before use, and keep `run` running in a task of the owner: it renews what expires."""

    def __init__(
        self, store: CatalogueStore, keys: KeyRing, *, clock: Clock, lifetimes: Lifetimes | None = None
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._lifetimes = lifetimes or Lifetimes()
        # Held while an edition is made of the one before and stored.
        self._writing = asyncio.Lock()
        self._edition = NO_EDITION
        self._staged: dict[str, StagedFile] = {}
        # A write whose end we did not see may have happened.
        self._is_in_doubt = True
        self._withdrawals = 0
        self._withdrawn = asyncio.Event()
        self._expiries = Expiries(self._lifetimes)
        # Older roots, which never change: a fleet that comes back after a rotation asks for them all at once.
        self._roots: dict[int, RoleFile] = {}

    async def prepare(self) -> None:
        """Load the catalogue, or make it with its keys at the first start; then renew what expired meanwhile.

        Raises:
            Unavailable: it exists, but the keys that sign online are not on this machine.
        """
        async with self._writing:
            await self._load()
        if self._edition.is_empty:
            await self._begin()
        await self.renew()

    async def run(self) -> None:
        """Renew what expires, for ever."""
        while True:
            await asyncio.sleep(RENEWAL_CHECK_S)
            await self.renew()

    # ---- what is released ------------------------------------------------------------------------------------

    async def release(self, variants: Sequence[Releasable]) -> None:
        """Let agents install variants: at once when the keys are here, else after they were signed elsewhere.

        Those that are listed, staged or taken back already are left as they are.

        Raises:
            Conflict: there are too many models, or a listed variant would change its bytes.
            Unavailable: the keys that sign online are not on this machine.
        """
        await self._revise(lambda revision: revision.release(variants))

    async def revoke(self, model: ModelName, *, versions: Collection[int] = (), below: int | None = None) -> bool:
        """Take versions back: agents install them no more. Return whether that is published; otherwise it is staged.

        Raises:
            NotFound: nothing of the model was released.
            InvalidRequest: a version was not released, or nothing is named.
        """
        if (below is None) == (not versions):
            raise InvalidRequest("revoke: expected versions, or the first version that stays (below), and not both")

        def edit(revision: Revision) -> None:
            if below is None:
                revision.revoke(model, versions=versions)
            else:
                revision.revoke_below(model, below)

        return await self._revise(edit)

    def is_released(self, manifest_digest: Digest) -> bool:
        return manifest_digest in self._edition.released

    def require_released(self, slot: Slot) -> None:
        """Raise Conflict, saying what to do, unless agents may install the slot's variant."""
        if self.is_released(slot.manifest_digest):
            return
        name = f"model {slot.model} version {slot.version}"
        staged = self._staged.get(family_role(slot.model))
        if staged is not None and hex_of(slot.manifest_digest).encode() in staged.content:
            raise Conflict(
                f"{name}: waits for signatures; run `nanofleet signing stage`, sign the file where the keys are, and "
                "`nanofleet signing publish` it"
            )
        raise Conflict(f"{name}: not in the catalogue: it was revoked, or published before signing; publish it anew")

    # ---- what agents read ------------------------------------------------------------------------------------

    def versions(self) -> CatalogueVersions:
        return CatalogueVersions(self._edition.file(ROOT).version, self._edition.file(TIMESTAMP).version)

    async def metadata(self, name: str) -> bytes:
        """Return a file by its TUF name: `timestamp.json`, `3.snapshot.json`, `2.family-digits.json`.

        Raises:
            NotFound: there is none of that name.
        """
        if name == "timestamp.json":
            return self._edition.file(TIMESTAMP).content
        if (match := _FILE_NAME.fullmatch(name)) is None:
            raise NotFound(f"catalogue: no file {name[:80]!r}")
        return (await self._file(match[2], int(match[1]))).content

    async def newer_than(self, held: CatalogueVersions, models: Iterable[ModelName]) -> tuple[MetadataFile, ...]:
        """Return what a machine needs to verify slots of `models`, as far as it fits into one message.

        A machine asks for what is left out by name. Families come always: which of them it holds is not known.
        """
        edition = self._edition
        roots = [
            await self._file(ROOT, version)
            for version in range(held.root + 1, edition.file(ROOT).version + 1)[:MAX_METADATA_FILES]
        ]
        above = [] if held.timestamp == edition.file(TIMESTAMP).version else [TIMESTAMP, SNAPSHOT, TARGETS]
        families = [role for role in map(family_role, models) if role in edition.files]
        files = [*roots, *(edition.files[role] for role in (*above, *families))]
        return tuple(_fitting(files))

    def export_root(self) -> bytes:
        """Return the newest root."""
        return self._edition.file(ROOT).content

    # ---- keys ------------------------------------------------------------------------------------------------

    async def director_signer(self) -> Signer:
        """Return what may sign assignments: a key that is here and that the published catalogue lists.

        Raises:
            Untrusted: there is none.
        """
        listed = self._edition.director_ids
        signers = await asyncio.to_thread(self._keys.signers, KeyRole.DIRECTOR)
        for key_id in listed:
            if key_id in signers:
                return signers[key_id]
        raise Untrusted(
            f"signing: expected one of the director keys {', '.join(key_id[:16] for key_id in listed)} on this "
            "machine; bring it back, or run `nanofleet signing rotate director`"
        )

    def lists_director(self, key_id: str) -> bool:
        return key_id in self._edition.director_ids

    async def rotate(
        self, role: KeyRole, *, replaces: str | None = None, public_key: PublicKey | None = None
    ) -> Rotation:
        """Put a new key in the place of an old one, and sign anew whatever depends on it.

        Args:
            replaces: id of the old key, or the beginning of it; None is the first of the role.
            public_key: the new key when it is kept elsewhere; None makes one among this machine's key files.

        Raises:
            NotFound: the role has no such key.
            Conflict: the role has the new key already.
            InvalidRequest: the role's keys are kept elsewhere and no new one is named, or the director's is not here.
        """
        changed: list[str] = []

        def edit(revision: Revision) -> None:
            old = _chosen(revision.key_ids(role), replaces, role)
            new = public_key or self._new_key(role, revision.key_ids(role))
            if new.id_for(role) in revision.key_ids(role):
                raise Conflict(f"rotate: {role} has the key {new.id_for(role)[:16]} already")
            if role in ONLINE_ROLES and new.id_for(role) not in self._keys.signers(role):
                raise InvalidRequest(f"rotate: expected the new {role} key on this machine, because it signs online")
            revision.replace_key(role, old, new)
            changed.extend((old, new.id_for(role)))

        is_published = await self._revise(edit)
        old, new = changed
        _log.warning("signing key replaced", extra={"role": role, "removed": old, "added": new})
        return Rotation(role, old, new, is_published)

    async def status(self) -> SigningStatus:
        return await asyncio.to_thread(
            status_of, self._edition, tuple(self._staged.values()), self._keys, now=self._clock.now()
        )

    def expiries(self) -> Mapping[str, datetime]:
        """Return when each published role ends."""
        return {role: self._edition.expires_at(role) for role in self._edition.files}

    # ---- signatures from elsewhere ---------------------------------------------------------------------------

    def bundle(self) -> Bundle:
        """Return what waits for signatures.

        Raises:
            NotFound: nothing does.
        """
        if not self._staged:
            raise NotFound("signing: nothing waits for signatures")
        return Bundle.of(self._edition, self._staged_contents())

    async def publish_signed(self, bundle: Bundle) -> None:
        """Publish what was staged, with signatures made elsewhere; those that are not enough yet are kept.

        Raises:
            NotFound: nothing is staged.
            Conflict: what was signed is not what is staged now.
            Untrusted: signatures are missing or do not hold.
        """
        self.bundle()
        signed = bundle.metadata()
        await self._revise(lambda revision: revision.adopt(signed))
        if self._staged:
            missing = (await self.status()).staged
            keys = sorted({key_id[:16] for role in missing for key_id in role.missing_key_ids})
            raise Untrusted(f"signed metadata: expected more valid signatures; missing are some of {', '.join(keys)}")

    # ---- renewal ---------------------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Sign anew what has a third of its life left; roles whose keys are elsewhere are staged, and alarmed."""
        due = self._expiries.due(self._edition, now=self._clock.now())
        # What is staged is looked at as well: a draft may expire, and its keys may have come back.
        if due or self._staged:
            await self._revise(self._renew_drafts, reseals=not due.isdisjoint({SNAPSHOT, TIMESTAMP}))
        self._expiries.alarm(self._edition, now=self._clock.now())

    async def withdrawn(self, *, after: int, timeout_s: float) -> int:
        """Wait until something was taken back or a director key changed, or for `timeout_s`.

        Returns:
            How often that happened since the start, to be the next `after`: none goes by while its caller is busy.
        """
        if self._withdrawals != after:
            return self._withdrawals
        try:
            async with asyncio.timeout(timeout_s):
                await self._withdrawn.wait()
        except TimeoutError:
            pass  # Nothing happened, which is an answer.
        return self._withdrawals

    # ---- inside ----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        keys = await asyncio.to_thread(self._first_keys)
        await self._revise(lambda revision: revision.begin(keys))
        if self._edition.is_empty:
            raise Untrusted("signing: the first catalogue needs every key on this machine; move them away afterwards")
        _log.warning("a new catalogue was begun", extra={"keys": "; ".join(self._keys.places)})

    def _first_keys(self) -> dict[KeyRole, list[PublicKey]]:
        """Return a first set of keys: those that are here, and new ones for the rest."""
        keys = {}
        for role, count in KEY_COUNTS.items():
            present = [signer.public_key for signer in self._keys.signers(role).values()][:count]
            keys[role] = present + [self._keys.create(role) for _ in range(count - len(present))]
        return keys

    def _new_key(self, role: KeyRole, key_ids: Sequence[str]) -> PublicKey:
        if role in (KeyRole.ROOT, KeyRole.TARGETS) and self._keys.signers(role).keys().isdisjoint(key_ids):
            raise InvalidRequest(
                f"rotate: the {role} keys are kept elsewhere, and so should the new one be: make it there with "
                "`nanofleet signing new-key` and name it with --public-key"
            )
        return self._keys.create(role)

    async def _revise(self, edit: Callable[[Revision], None], *, reseals: bool = False) -> bool:
        """Edit, sign and store; return whether all that the edit changed is published."""
        async with self._writing:
            if self._is_in_doubt:
                await self._load()
            now = self._clock.now()
            next_ = await asyncio.to_thread(self._revised, edit, now, reseals)
            before = self._staged
            if next_.files or next_.staged != before:
                await self._commit(next_)
            return all(before.get(role) == file for role, file in next_.staged.items())

    def _revised(self, edit: Callable[[Revision], None], now: datetime, reseals: bool) -> "_Next":
        revision = Revision(self._edition, self._staged_contents(), now=now, lifetimes=self._lifetimes)
        edit(revision)
        signers = self._keys.metadata_signers()
        revision.sign(signers)
        settled = revision.settled()
        files, edition = list(settled.files), self._edition
        if files or reseals:
            edition = Edition.of(files, after=edition)
            online = sealed(edition, now=now, lifetimes=self._lifetimes, signers=signers)
            files, edition = files + online, Edition.of(online, after=edition)
        staged = {role: self._staged_file(role, content, now) for role, content in settled.waiting.items()}
        return _Next(files, edition, staged)

    def _staged_file(self, role: str, content: bytes, now: datetime) -> StagedFile:
        known = self._staged.get(role)
        return known if known is not None and known.content == content else StagedFile(role, content, now)

    async def _commit(self, next_: "_Next") -> None:
        self._is_in_doubt = True
        await self._store.publish(next_.files, staged=tuple(next_.staged.values()))
        self._adopt(next_.edition, next_.staged)

    async def _load(self) -> None:
        edition = Edition.of(await self._store.newest())
        self._adopt(edition, {file.role: file for file in await self._store.staged()})

    def _adopt(self, edition: Edition, staged: dict[str, StagedFile]) -> None:
        """Go on from what is stored, whether we saw the end of storing it or found it there afterwards."""
        before, self._edition, self._staged = self._edition, edition, staged
        self._is_in_doubt = False
        if edition.withdraws_from(before):
            self._withdrawals += 1
            self._withdrawn.set()
            self._withdrawn = asyncio.Event()

    async def _file(self, role: str, version: int) -> RoleFile:
        newest = self._edition.files.get(role)
        if newest is not None and newest.version == version:
            return newest
        if newest is None or version > newest.version:
            raise NotFound(f"catalogue: no version {version} of {role[:80]}")
        if role != ROOT:
            return await self._store.file(role, version)
        if version not in self._roots:
            self._roots[version] = await self._store.file(ROOT, version)
        return self._roots[version]

    def _staged_contents(self) -> dict[str, bytes]:
        return {role: file.content for role, file in self._staged.items()}

    def _renew_drafts(self, revision: Revision) -> None:
        """Draft anew what has no fresh draft yet: one that waits keeps the signatures that it has."""
        for role in revision.roles():
            if self._expiries.is_due(role, revision.expires_at(role), now=self._clock.now()):
                revision.renew(role)


def _chosen(key_ids: Sequence[str], replaces: str | None, role: KeyRole) -> str:
    found = [key_id for key_id in key_ids if replaces is None or key_id.startswith(replaces)]
    if not found or (replaces is not None and len(found) > 1):
        known = ", ".join(key_id[:16] for key_id in key_ids)
        raise NotFound(f"rotate: expected one key of {role} that begins with {replaces!r}; it has {known}")
    return found[0]


def _fitting(files: Iterable[RoleFile]) -> Iterable[MetadataFile]:
    size_bytes = 0
    for count, file in enumerate(files):
        size_bytes += len(file.content)
        if count >= MAX_METADATA_FILES or size_bytes > MAX_METADATA_BYTES:
            return
        yield MetadataFile(file.name, file.content)
