"""The authorities that are trusted now, and how one follows the other without anybody noticing.

    prepare ──▶ next      trusted by us and told to every agent, signs nothing
    activate ─▶ active    signs agents; the one before it is retired
    drop ─────▶ (gone)    AUTHORITY_OVERLAP after it was retired: all it signed is over; or at an admin's word

The controller's own certificate is signed by the oldest that is trusted: an agent that was away during the whole
rotation knows no other. Agents hear of new ones when they say hello and with each renewal.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

from controller.identity.authority import AUTHORITY_LIFETIME, CertificateAuthority
from controller.identity.keys import AuthorityKeys
from controller.identity.model import AGENT_LIFETIME, AUTHORITY_OVERLAP, Authority, AuthorityState
from controller.identity.store import IdentityRecords, IdentityStore
from core.clock import Clock
from core.errors import Conflict, NotFound, Unavailable

_log = logging.getLogger(__name__)

# Derived: within half a lifetime every agent that is online has renewed, and so was told.
PREPARED_FOR = AGENT_LIFETIME / 2

# Told what was decided: an action, its target, and a short reason.
OnDecided: TypeAlias = Callable[[str, str, str], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    record: Authority
    signer: CertificateAuthority


class Authorities:
    """Call `load` before anything else. One task at a time may change what is trusted; reading never waits."""

    def __init__(self, store: IdentityStore, keys: AuthorityKeys, *, trust_domain: str, clock: Clock) -> None:
        self._store = store
        self._trust_domain = trust_domain
        self._keys = keys
        self._clock = clock
        self._loaded: tuple[_Loaded, ...] = ()
        # What was done because its time had come: action, authority, reason.
        self.on_decided: OnDecided | None = None

    async def load(self) -> None:
        """Load what is stored; on the first start make the first authority.

        Raises:
            Unavailable: a private key is missing or damaged.
            Conflict: they are those of another trust domain.
        """
        if not await self._store.read(lambda records: records.authorities()):
            made = await self._made(AuthorityState.ACTIVE)
            await self._store.run(lambda records: records.save_authority(made))
        await self._reload()
        self._require_own_domain()

    @property
    def records(self) -> Sequence[Authority]:
        """Every authority that is trusted, the oldest first."""
        return [each.record for each in self._loaded]

    @property
    def trust_bundle(self) -> bytes:
        return b"".join(each.signer.certificate_pem for each in self._loaded)

    @property
    def active(self) -> CertificateAuthority:
        """The one that signs."""
        return next(each.signer for each in self._loaded if each.record.state is AuthorityState.ACTIVE)

    @property
    def oldest(self) -> CertificateAuthority:
        """The one that whoever was away knows too."""
        return self._loaded[0].signer

    async def prepare(self) -> None:
        """Make the next authority.

        Raises:
            Conflict: there is one already.
        """
        if self._of(AuthorityState.NEXT) is not None:
            raise Conflict("authority: a next one is prepared already; activate it")
        made = await self._made(AuthorityState.NEXT)
        await self._store.run(lambda records: records.save_authority(made))
        await self._reload()
        _log.info("next certificate authority prepared", extra={"authority": made.sha256})

    async def activate(self) -> None:
        """Let the next authority sign instead of the active one.

        Raises:
            Conflict: none is prepared.
        """
        following, signing = self._of(AuthorityState.NEXT), self._of(AuthorityState.ACTIVE)
        if following is None or signing is None:
            raise Conflict("authority: no next one is prepared; prepare it first")
        now = self._clock.now()

        def swap(records: IdentityRecords) -> None:
            records.save_authority(replace(signing, state=AuthorityState.RETIRED, retired_at=now))
            records.save_authority(replace(following, state=AuthorityState.ACTIVE))

        await self._store.run(swap)
        await self._reload()
        _log.info("certificate authority activated", extra={"authority": following.sha256})

    async def advance(self) -> None:
        """Do what is due: prepare, activate, or drop what nobody needs any more."""
        now = self._clock.now()
        following, signing = self._of(AuthorityState.NEXT), self._of(AuthorityState.ACTIVE)
        if following is not None and now >= following.created_at + PREPARED_FOR:
            await self.activate()
            self._decided("authority.activate", following.sha256, "its time had come")
        elif following is None and signing is not None and now >= signing.created_at + AUTHORITY_LIFETIME / 2:
            await self.prepare()
            self._decided("authority.prepare", signing.sha256, "half of its life is over; the next one is prepared")
        for record in self.records:
            if is_over(record, now=now):
                await self._drop(record)
                _log.info("certificate authority dropped: all it signed is over", extra={"authority": record.sha256})
                self._decided("authority.drop", record.sha256, "all that it signed is over")

    async def drop(self, sha256: str) -> None:
        """Trust an authority no more that does not sign, though certificates of it may be in use.

        Raises:
            NotFound: no such authority is trusted.
            Conflict: it is the one that signs.
        """
        record = next((each for each in self.records if each.sha256 == sha256), None)
        if record is None:
            raise NotFound(f"authority {sha256[:80]!r}: not trusted here; see `nanofleet authority status`")
        if record.state is AuthorityState.ACTIVE:
            raise Conflict(f"authority {sha256[:16]}: expected one that does not sign; rotate until another does")
        await self._drop(record)
        _log.warning("certificate authority dropped by an admin", extra={"authority": sha256})

    def _decided(self, action: str, target: str, detail: str) -> None:
        if self.on_decided is not None:
            self.on_decided(action, target, detail)

    async def _drop(self, record: Authority) -> None:
        await self._store.run(lambda records: records.delete_authority(record.sha256))
        await self._reload()
        self._keys.delete(record.sha256)

    async def _made(self, state: AuthorityState) -> Authority:
        """Make an authority whose key is stored before anybody hears of it."""
        now = self._clock.now()
        signer = CertificateAuthority.make(trust_domain=self._trust_domain, now=now)
        record = Authority(signer.sha256.hex(), signer.certificate_pem.decode(), state, now)
        await asyncio.to_thread(self._keys.save, record.sha256, signer.key_pem)
        return record

    def _require_own_domain(self) -> None:
        domain = self.oldest.trust_domain
        if domain != self._trust_domain:
            raise Conflict(
                f"trust_domain: expected {domain or 'the one'} for which every certificate of this fleet was "
                f"made, got {self._trust_domain}; set it back, or start a new fleet in another data_dir"
            )

    async def _reload(self) -> None:
        records = await self._store.read(lambda records: records.authorities())
        self._loaded = tuple(_Loaded(record, self._signer(record)) for record in records)

    def _signer(self, record: Authority) -> CertificateAuthority:
        try:
            return CertificateAuthority.load(record.certificate.encode(), self._keys.load(record.sha256))
        except ValueError as error:
            raise Unavailable(
                f"certificate authority {record.sha256}: {error}; restore its key file from a backup"
            ) from error

    def _of(self, state: AuthorityState) -> Authority | None:
        return next((record for record in self.records if record.state is state), None)


def is_over(record: Authority, *, now: datetime) -> bool:
    return record.retired_at is not None and now >= record.retired_at + AUTHORITY_OVERLAP
