"""The feed: an outbox, numbered events, and grants that end before their tokens say so

Runs before the code that needs it; the code before it writes nothing there, and what it ends is told by no feed.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("feed_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("head", sa.String(length=64), nullable=False),
        sa.Column("lists_seq", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("feed_is_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("feed_pkey")),
    )
    op.execute("INSERT INTO feed (id, feed_id, seq, head, lists_seq) VALUES (1, '', 0, '', 0)")
    op.create_table(
        "feed_outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("members", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("feed_outbox_pkey")),
    )
    op.create_table(
        "feed_events",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("head", sa.String(length=64), nullable=False),
        sa.Column("numbered_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("feed_events_pkey")),
    )
    op.create_table(
        "shortened_grants",
        sa.Column("grant_id", sa.String(length=32), nullable=False),
        sa.Column("ends_at", INSTANT, nullable=False),
        sa.Column("token_ends_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["grant_id"], ["grants.id"], name=op.f("shortened_grants_grant_id_fkey")),
        sa.PrimaryKeyConstraint("grant_id", name=op.f("shortened_grants_pkey")),
    )
    op.create_index(op.f("shortened_grants_ends_at_idx"), "shortened_grants", ["ends_at"])
