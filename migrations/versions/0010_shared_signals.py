"""Shared Signals: streams of receivers, what they do not want to hear of, and what they have not taken yet

Runs before the code that needs it; the code before it knows none of these tables.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "event_streams",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("receiver", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.Column("set_by", sa.String(length=16), nullable=False),
        sa.Column("method", sa.String(length=8), nullable=False),
        sa.Column("endpoint_url", sa.String(length=2048), nullable=True),
        sa.Column("sealed_authorization", sa.LargeBinary(), nullable=True),
        sa.Column("events_requested", JSON, nullable=True),
        sa.Column("description", sa.String(length=1000), nullable=True),
        sa.Column("feed_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("trouble", sa.String(length=255), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("next_attempt_at", INSTANT, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("active_at", INSTANT, nullable=False),
        sa.Column("progress_at", INSTANT, nullable=False),
        sa.Column("verified_at", INSTANT, nullable=True),
        sa.CheckConstraint("state IN ('enabled', 'paused', 'disabled')", name=op.f("event_streams_state_is_known")),
        sa.CheckConstraint("method IN ('push', 'poll')", name=op.f("event_streams_method_is_known")),
        sa.CheckConstraint(
            "(method = 'push') = (endpoint_url IS NOT NULL)", name=op.f("event_streams_pushed_to_somewhere")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("event_streams_pkey")),
        sa.UniqueConstraint("receiver", name=op.f("event_streams_receiver_key")),
    )
    op.create_table(
        "removed_subjects",
        sa.Column("stream_id", sa.String(length=32), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("subject", JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["stream_id"], ["event_streams.id"], name=op.f("removed_subjects_stream_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("stream_id", "sha256", name=op.f("removed_subjects_pkey")),
    )
    op.create_table(
        "event_deliveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("jti", sa.String(length=32), nullable=False),
        sa.Column("stream_id", sa.String(length=32), nullable=False),
        sa.Column("claims", JSON, nullable=False),
        sa.Column("made_at", INSTANT, nullable=False),
        sa.Column("always", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["stream_id"], ["event_streams.id"], name=op.f("event_deliveries_stream_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("event_deliveries_pkey")),
        sa.UniqueConstraint("jti", name=op.f("event_deliveries_jti_key")),
    )
    op.create_index("event_deliveries_stream_idx", "event_deliveries", ["stream_id", "id"])
