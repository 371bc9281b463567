"""The schema. Every change here comes with an Alembic migration under `migrations/`.

Times are UTC, stored as microseconds since the epoch: one representation on every database, and it sorts.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine.interfaces import Dialect

# Named constraints, so that migrations can drop them on every database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class FreeText(TypeDecorator[str]):
    """What peers, models and people say in their own words, and so with characters that PostgreSQL keeps in no text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\N{SYMBOL FOR NULL}")


NAME = String(64)
DIGEST = String(71)

# ---- registry -------------------------------------------------------------------------------------------------

models = Table(
    "models",
    metadata,
    Column("name", NAME, primary_key=True),
    Column("created_us", BigInteger, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("model", NAME, ForeignKey("models.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("created_us", BigInteger, nullable=False),
    CheckConstraint("version >= 1", name="version_positive"),
)

variants = Table(
    "variants",
    metadata,
    Column("model", NAME, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("variant", NAME, primary_key=True),
    Column("manifest_digest", DIGEST, nullable=False),
    # The canonical bytes; their digest is manifest_digest. The same bytes stand in the blob store.
    Column("manifest", LargeBinary, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # Share of right answers on the held-out data given at publish; null when none was given.
    Column("accuracy_ratio", Float),
    Column("evaluated_samples", Integer),
    Column("latency_p50_us", Float, nullable=False),
    Column("latency_p90_us", Float, nullable=False),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
    UniqueConstraint("manifest_digest"),
)

# A publish in progress or done; what a crash leaves RUNNING is marked FAILED at the next start.
publications = Table(
    "publications",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("model", NAME, nullable=False),
    Column("state", String(16), nullable=False),
    Column("stage", String(64), nullable=False),
    Column("done_ratio", Float, nullable=False),
    Column("version", Integer),
    Column("error_code", String(32)),
    Column("error_message", FreeText),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    CheckConstraint("state IN ('running', 'done', 'failed')", name="state_known"),
)

# ---- fleet ----------------------------------------------------------------------------------------------------

agents = Table(
    "agents",
    metadata,
    Column("id", NAME, primary_key=True),
    Column("site", NAME, nullable=False),
    Column("software_version", FreeText, nullable=False),
    Column("boot_id", FreeText, nullable=False),
    Column("tags", Text, nullable=False),
    Column("first_seen_us", BigInteger, nullable=False),
    Column("last_seen_us", BigInteger, nullable=False),
    # Desired state: the position pushed to the agent, and its slots as JSON.
    Column("epoch", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("desired_slots", Text, nullable=False),
    Column("issued_us", BigInteger, nullable=False),
    # Reported state: what the agent last said, as JSON; the position it has applied; why it refused the last push.
    Column("applied_epoch", BigInteger, nullable=False),
    Column("applied_generation", BigInteger, nullable=False),
    Column("reported_slots", Text, nullable=False),
    Column("rejection", Text),
    # Manifests that left the desired state, as JSON.
    Column("former_manifests", Text, nullable=False, server_default="[]"),
    Index("ix_agents_site", "site"),
)

# What an operator asked for: run this variant of this model everywhere the target says. The most specific target
# (agent, then site, then fleet) decides for an agent.
deployments = Table(
    "deployments",
    metadata,
    Column("target_kind", String(8), primary_key=True),
    # Site or agent name; empty for the fleet.
    Column("target", NAME, primary_key=True),
    Column("model", NAME, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("variant", NAME, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["model", "version", "variant"], ["variants.model", "variants.version", "variants.variant"]),
    CheckConstraint("target_kind IN ('fleet', 'site', 'agent')", name="target_kind_known"),
)

# When this state was brought back from a backup; the newest row gives the epoch of all positions.
restorations = Table(
    "restorations",
    metadata,
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("restored_us", BigInteger, nullable=False),
    Column("backup_us", BigInteger, nullable=False),
    # Null until an operator has looked.
    Column("confirmed_us", BigInteger),
)

# ---- identity -------------------------------------------------------------------------------------------------

# Certificate authorities by the SHA-256 of their certificate; private keys are files, never here. `next` is trusted and
# signs nothing yet, `active` signs, `retired` is trusted until its last certificate has expired.
authorities = Table(
    "authorities",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("certificate", Text, nullable=False),
    Column("state", String(8), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    # When it stopped signing; null before that.
    Column("retired_us", BigInteger),
    CheckConstraint("state IN ('next', 'active', 'retired')", name="state_known"),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    # What an operator calls it by; the secret itself is only ever shown once.
    Column("id", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False, unique=True),
    Column("site", NAME, nullable=False),
    # The one name it is good for; null: whichever the agent asks for or the controller chooses.
    Column("agent", NAME),
    Column("uses_left", Integer, nullable=False),
    Column("created_by", NAME, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    CheckConstraint("uses_left >= 0", name="uses_left_counted"),
)

# One row per agent that was ever enrolled: the key it was certified for last, and whether it may come back.
identities = Table(
    "identities",
    metadata,
    Column("agent", NAME, primary_key=True),
    Column("site", NAME, nullable=False),
    # Public key in DER (SubjectPublicKeyInfo), and its SHA-256.
    Column("public_key", LargeBinary, nullable=False),
    Column("key_sha256", String(64), nullable=False),
    # The key before it, until the new one was seen in use; null after that.
    Column("previous_key", LargeBinary),
    Column("serial", String(40), nullable=False),
    Column("not_after_us", BigInteger, nullable=False),
    Column("enrolled_us", BigInteger, nullable=False),
    Column("renewed_us", BigInteger, nullable=False),
    # The token that let it in.
    Column("token_id", String(16), nullable=False),
    # Both null or both set.
    Column("banned_us", BigInteger),
    Column("ban_reason", FreeText),
    # One key, one agent.
    UniqueConstraint("key_sha256"),
)

# ---- access ---------------------------------------------------------------------------------------------------

operators = Table(
    "operators",
    metadata,
    Column("name", NAME, primary_key=True),
    Column("role", String(8), nullable=False),
    # SHA-256 of the 256-bit secret: nothing to be guessed, so no slow hash is needed.
    Column("secret_sha256", String(64), nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
    CheckConstraint("role IN ('viewer', 'operator', 'admin')", name="role_known"),
)

browser_sessions = Table(
    "browser_sessions",
    metadata,
    Column("token_sha256", String(64), primary_key=True),
    Column("operator", NAME, ForeignKey("operators.name", ondelete="CASCADE"), nullable=False),
    Column("csrf_token", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

# ---- audit ----------------------------------------------------------------------------------------------------


def _act_columns() -> tuple[Column[Any], ...]:
    """Return what a table says of an act: who asked for what, and when."""
    return (
        Column("at_us", BigInteger, nullable=False),
        Column("operator", NAME, nullable=False),
        Column("role", String(16), nullable=False),
        Column("source", String(64), nullable=False),
        Column("action", String(64), nullable=False),
        Column("target", Text, nullable=False),
        Column("detail", Text, nullable=False),
    )


# Who changed what: a chain of hashes, the oldest go first when the bound is passed. Rows are never changed.
audit_entries = Table(
    "audit_entries",
    metadata,
    # Counted by us, without gaps.
    Column("id", Integer, primary_key=True, autoincrement=False),
    *_act_columns(),
    Column("outcome", String(8), nullable=False),
    # Empty when all is well.
    Column("code", String(32), nullable=False),
    Column("previous_sha256", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    CheckConstraint("outcome IN ('ok', 'refused', 'failed')", name="outcome_known"),
    Index("ix_audit_entries_at_us", "at_us"),
)

# What was asked for and has not ended; what stands here at a start was cut off.
audit_open = Table(
    "audit_open",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    *_act_columns(),
)

# ---- catalogue ------------------------------------------------------------------------------------------------

# TUF metadata as signed; rows are never changed. Kept are all roots, the newest `timestamp`, some dozens of the rest.
catalogue_metadata = Table(
    "catalogue_metadata",
    metadata,
    Column("role", String(80), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

# What waits for signatures from keys that are not on this machine.
catalogue_staged = Table(
    "catalogue_staged",
    metadata,
    Column("role", String(80), primary_key=True),
    Column("content", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)

# ---- what agents write down -----------------------------------------------------------------------------------

# One row per hour, model and process of an agent; numbers only grow. `hour_us` is what the agent calls the hour,
# `believed_us` which one it was.
agent_usage = Table(
    "agent_usage",
    metadata,
    Column("agent", NAME, primary_key=True),
    Column("boot_id", String(64), primary_key=True),
    Column("hour_us", BigInteger, primary_key=True, autoincrement=False),
    # Empty for requests to models that were not there.
    Column("model", NAME, primary_key=True),
    Column("believed_us", BigInteger, nullable=False),
    Column("answered_edge", BigInteger, nullable=False),
    Column("answered_heavy", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    CheckConstraint(
        "answered_edge >= 0 AND answered_heavy >= 0 AND refused >= 0 AND failed >= 0", name="counts_not_negative"
    ),
    Index("ix_agent_usage_believed_us", "believed_us"),
    Index("ix_agent_usage_agent_believed_us", "agent", "believed_us"),
)

# What happened to agents, as they tell it; `at_us` is believed, `received_us` is by our own clock.
agent_events = Table(
    "agent_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("agent", NAME, nullable=False),
    Column("dedupe_id", String(128), nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("received_us", BigInteger, nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", FreeText, nullable=False),
    Column("detail", FreeText, nullable=False),
    Column("count", BigInteger, nullable=False),
    # Told again, it is no other.
    UniqueConstraint("agent", "dedupe_id"),
    Index("ix_agent_events_agent_id", "agent", "id"),
    Index("ix_agent_events_received_us", "received_us"),
)

# ---- traces ---------------------------------------------------------------------------------------------------

# The most recent spans; the oldest rows go first when the bound is passed.
spans = Table(
    "spans",
    metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("trace_id", String(32), nullable=False),
    Column("span_id", String(16), nullable=False),
    Column("parent_span_id", String(16)),
    Column("name", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("service", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("duration_us", BigInteger, nullable=False),
    Column("is_error", Integer, nullable=False),
    Column("attributes", Text, nullable=False),
    UniqueConstraint("trace_id", "span_id"),
    Index("ix_spans_start_us", "start_us"),
)
