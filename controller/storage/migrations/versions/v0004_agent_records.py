"""What agents write down: hours of usage, and what happened to them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "agent_usage",
        sa.Column("agent", sa.String(length=64), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("hour_us", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("believed_us", sa.BigInteger(), nullable=False),
        sa.Column("answered_edge", sa.BigInteger(), nullable=False),
        sa.Column("answered_heavy", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "answered_edge >= 0 AND answered_heavy >= 0 AND refused >= 0 AND failed >= 0",
            name=op.f("ck_agent_usage_counts_not_negative"),
        ),
        sa.PrimaryKeyConstraint("agent", "boot_id", "hour_us", "model", name=op.f("pk_agent_usage")),
    )
    op.create_index("ix_agent_usage_believed_us", "agent_usage", ["believed_us"])
    op.create_index("ix_agent_usage_agent_believed_us", "agent_usage", ["agent", "believed_us"])
    op.create_table(
        "agent_events",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("agent", sa.String(length=64), nullable=False),
        sa.Column("dedupe_id", sa.String(length=128), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("received_us", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agent_events")),
        sa.UniqueConstraint("agent", "dedupe_id", name=op.f("uq_agent_events_agent")),
    )
    op.create_index("ix_agent_events_agent_id", "agent_events", ["agent", "id"])
    op.create_index("ix_agent_events_received_us", "agent_events", ["received_us"])
