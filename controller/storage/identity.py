"""Identity on SQL; see the port `controller.identity.store` for what each method promises."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, delete, select

from controller.identity.model import AgentIdentity, Authority, AuthorityState, Ban, PublicKey, TokenRecord
from controller.identity.store import IdentityReader, IdentityRecords
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import authorities, enrolment_tokens, identities
from controller.storage.upserts import save
from core.ids import AgentId, SiteId

T = TypeVar("T")


class SqlIdentityStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, use_case: Callable[[IdentityRecords], T]) -> T:
        return await self._database.run(lambda connection: use_case(_SqlIdentityRecords(connection)))

    async def read(self, query: Callable[[IdentityReader], T]) -> T:
        return await self._database.read(lambda connection: query(_SqlIdentityRecords(connection)))


class _SqlIdentityRecords:
    """One transaction's view."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def authorities(self) -> Sequence[Authority]:
        return [_authority(row) for row in self._rows(_AUTHORITIES)]

    def token(self, secret_sha256: str) -> TokenRecord | None:
        rows = self._rows(select(enrolment_tokens).where(enrolment_tokens.c.secret_sha256 == secret_sha256))
        return _token(rows[0]) if rows else None

    def tokens(self) -> Sequence[TokenRecord]:
        return [_token(row) for row in self._rows(_TOKENS)]

    def identity(self, agent: AgentId) -> AgentIdentity | None:
        rows = self._rows(select(identities).where(identities.c.agent == agent))
        return _identity(rows[0]) if rows else None

    def identity_of_key(self, key_sha256: str) -> AgentIdentity | None:
        rows = self._rows(select(identities).where(identities.c.key_sha256 == key_sha256))
        return _identity(rows[0]) if rows else None

    def identities(self) -> Sequence[AgentIdentity]:
        return [_identity(row) for row in self._rows(select(identities).order_by(identities.c.agent))]

    def save_authority(self, authority: Authority) -> None:
        save(self._connection, authorities, [_authority_row(authority)])

    def delete_authority(self, sha256: str) -> None:
        self._connection.execute(delete(authorities).where(authorities.c.sha256 == sha256))

    def save_token(self, token: TokenRecord) -> None:
        save(self._connection, enrolment_tokens, [_token_row(token)])

    def delete_token(self, token_id: str) -> bool:
        return self._connection.execute(delete(enrolment_tokens).where(enrolment_tokens.c.id == token_id)).rowcount > 0

    def delete_tokens_expired(self, before: datetime) -> None:
        before_us = microseconds_of(before)
        self._connection.execute(delete(enrolment_tokens).where(enrolment_tokens.c.expires_us < before_us))

    def save_identity(self, identity: AgentIdentity) -> None:
        save(self._connection, identities, [_identity_row(identity)])

    def _rows(self, statement: Select[Any]) -> Sequence[RowMapping]:
        return self._connection.execute(statement).mappings().all()


# ---- statements -----------------------------------------------------------------------------------------------

_AUTHORITIES = select(authorities).order_by(authorities.c.created_us, authorities.c.sha256)
_TOKENS = select(enrolment_tokens).order_by(enrolment_tokens.c.created_us, enrolment_tokens.c.id)


# ---- rows -----------------------------------------------------------------------------------------------------


def _authority(row: RowMapping) -> Authority:
    return Authority(
        sha256=row["sha256"],
        certificate=row["certificate"],
        state=AuthorityState(row["state"]),
        created_at=instant_of(row["created_us"]),
        retired_at=_instant(row["retired_us"]),
    )


def _authority_row(authority: Authority) -> dict[str, Any]:
    return {
        "sha256": authority.sha256,
        "certificate": authority.certificate,
        "state": authority.state.value,
        "created_us": microseconds_of(authority.created_at),
        "retired_us": None if authority.retired_at is None else microseconds_of(authority.retired_at),
    }


def _token(row: RowMapping) -> TokenRecord:
    return TokenRecord(
        id=row["id"],
        secret_sha256=row["secret_sha256"],
        site=SiteId(row["site"]),
        agent=None if row["agent"] is None else AgentId(row["agent"]),
        uses_left=row["uses_left"],
        created_by=row["created_by"],
        created_at=instant_of(row["created_us"]),
        expires_at=instant_of(row["expires_us"]),
    )


def _token_row(token: TokenRecord) -> dict[str, Any]:
    return {
        "id": token.id,
        "secret_sha256": token.secret_sha256,
        "site": token.site,
        "agent": token.agent,
        "uses_left": token.uses_left,
        "created_by": token.created_by,
        "created_us": microseconds_of(token.created_at),
        "expires_us": microseconds_of(token.expires_at),
    }


def _identity(row: RowMapping) -> AgentIdentity:
    banned_at = _instant(row["banned_us"])
    return AgentIdentity(
        agent=AgentId(row["agent"]),
        site=SiteId(row["site"]),
        key=PublicKey(row["public_key"]),
        previous_key=None if row["previous_key"] is None else PublicKey(row["previous_key"]),
        serial=row["serial"],
        not_after=instant_of(row["not_after_us"]),
        enrolled_at=instant_of(row["enrolled_us"]),
        renewed_at=instant_of(row["renewed_us"]),
        token_id=row["token_id"],
        ban=None if banned_at is None else Ban(banned_at, row["ban_reason"]),
    )


def _identity_row(identity: AgentIdentity) -> dict[str, Any]:
    ban = identity.ban
    return {
        "agent": identity.agent,
        "site": identity.site,
        "public_key": identity.key.der,
        "key_sha256": identity.key.sha256,
        "previous_key": None if identity.previous_key is None else identity.previous_key.der,
        "serial": identity.serial,
        "not_after_us": microseconds_of(identity.not_after),
        "enrolled_us": microseconds_of(identity.enrolled_at),
        "renewed_us": microseconds_of(identity.renewed_at),
        "token_id": identity.token_id,
        "banned_us": None if ban is None else microseconds_of(ban.banned_at),
        "ban_reason": None if ban is None else ban.reason,
    }


def _instant(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else instant_of(microseconds)
