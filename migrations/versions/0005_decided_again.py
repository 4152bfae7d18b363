"""What a decision looked at beside a grant's other columns, and deciding live grants again

Runs before the code that needs it; the code before it does not see what is new. A grant made by that code has no terms.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("grants", sa.Column("terms", JSON, nullable=True))
    op.create_table(
        "redecisions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("era", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("agent", sa.String(length=255), nullable=True),
        sa.Column("user", sa.String(length=255), nullable=True),
        sa.Column("cause", sa.String(length=255), nullable=False),
        sa.Column("ordered_at", INSTANT, nullable=False),
        sa.Column("ordered_by", sa.String(length=255), nullable=False),
        sa.Column("planned_at", INSTANT, nullable=True),
        sa.Column("undecided_at", INSTANT, nullable=True),
        sa.Column("finished_at", INSTANT, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("redecisions_pkey")),
    )
    unfinished = sa.text("finished_at IS NULL")
    op.create_index("redecisions_open_idx", "redecisions", ["id"], postgresql_where=unfinished, sqlite_where=unfinished)
    op.create_table(
        "redecision_shares",
        sa.Column("redecision_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first_id", sa.String(length=32), nullable=False),
        sa.Column("last_id", sa.String(length=32), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("due_at", INSTANT, nullable=False),
        sa.Column("done_at", INSTANT, nullable=True),
        sa.Column("looked_at", sa.Integer(), nullable=False),
        sa.Column("ended", sa.Integer(), nullable=False),
        sa.Column("shortened", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["redecision_id"], ["redecisions.id"], name=op.f("redecision_shares_redecision_id_fkey")
        ),
        sa.PrimaryKeyConstraint("redecision_id", "number", name=op.f("redecision_shares_pkey")),
    )
    op.create_table(
        "signals",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("axis", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=255), nullable=False),
        sa.Column("level", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=1000), nullable=False),
        sa.Column("source", sa.String(length=255), nullable=False),
        sa.Column("sent_at", INSTANT, nullable=False),
        sa.Column("sent_by", sa.String(length=255), nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("signals_pkey")),
    )
    op.create_index(op.f("signals_expires_at_idx"), "signals", ["expires_at"])
