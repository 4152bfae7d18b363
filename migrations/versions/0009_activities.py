"""What was done with grants, as their holders and verifiers tell it

Runs before the code that needs it; the code before it does not see what is new.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "activities",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("grant_id", sa.String(length=32), nullable=False),
        sa.Column("reporter", sa.String(length=255), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("report_sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("action", sa.String(length=255), nullable=False),
        sa.Column("resource", sa.String(length=1000), nullable=False),
        sa.Column("scope", sa.String(length=200), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("trace_id", sa.String(length=32), nullable=True),
        sa.Column("attributes", JSON, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("received_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("activities_pkey")),
    )
    op.create_index("activities_report_idx", "activities", ["report_sha256"], unique=True)
    op.create_index("activities_task_idx", "activities", ["task_id", "at", "id"])
    op.create_table(
        "activity_tallies",
        sa.Column("grant_id", sa.String(length=32), nullable=False),
        sa.Column("kept", sa.Integer(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("last_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("grant_id", name=op.f("activity_tallies_pkey")),
    )
    op.create_index(op.f("activity_tallies_last_at_idx"), "activity_tallies", ["last_at"])
    op.create_table(
        "activity_reporters",
        sa.Column("reporter", sa.String(length=255), nullable=False),
        sa.Column("minute_at", INSTANT, nullable=False),
        sa.Column("told", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("reporter", name=op.f("activity_reporters_pkey")),
    )
    op.create_index("grants_trace_idx", "grants", ["trace_id"])
