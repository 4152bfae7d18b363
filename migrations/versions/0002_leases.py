"""What is owed to outside providers, when each was last compared with our rows, and whom to tell

Runs before the code that needs it; the code before it does not see what is new.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")

HELD = sa.text("state IN ('approved', 'active')")
OWED = sa.text("state IN ('revoking', 'stuck')")
INTENDED = sa.text("state = 'intended'")
OPEN = sa.text("state <> 'released'")


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("grant_id", sa.String(length=32), nullable=True),
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("revocation_class", sa.String(length=16), nullable=True),
        sa.Column("bound_s", sa.Integer(), nullable=True),
        sa.Column("handle", sa.String(length=1000), nullable=True),
        sa.Column("reference", sa.String(length=1000), nullable=True),
        sa.Column("unknown", sa.Boolean(), nullable=False),
        sa.Column("facts", JSON, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("issue_by", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.Column("settles_at", INSTANT, nullable=True),
        sa.Column("urgency", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", INSTANT, nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.String(length=1000), nullable=True),
        sa.Column("dead_at", INSTANT, nullable=True),
        sa.Column("abandoned_at", INSTANT, nullable=True),
        sa.Column("abandoned_by", sa.String(length=255), nullable=True),
        sa.Column("abandoned_reason", sa.String(length=1000), nullable=True),
        sa.CheckConstraint(
            "state IN ('intended', 'held', 'revoking', 'released', 'stuck')", name=op.f("leases_state_is_known")
        ),
        sa.CheckConstraint("state <> 'released' OR dead_at IS NOT NULL", name=op.f("leases_released_was_confirmed")),
        sa.CheckConstraint(
            "state NOT IN ('revoking', 'stuck') OR next_attempt_at IS NOT NULL", name=op.f("leases_owed_is_tried")
        ),
        sa.ForeignKeyConstraint(["grant_id"], ["grants.id"], name=op.f("leases_grant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("leases_pkey")),
    )
    op.create_index("leases_grant_idx", "leases", ["grant_id"])
    op.create_index("leases_reference_idx", "leases", ["reference"])
    op.create_index(
        "leases_owed_idx", "leases", ["urgency", "next_attempt_at"], postgresql_where=OWED, sqlite_where=OWED
    )
    op.create_index("leases_intended_idx", "leases", ["issue_by"], postgresql_where=INTENDED, sqlite_where=INTENDED)
    op.create_index("leases_open_idx", "leases", ["provider"], postgresql_where=OPEN, sqlite_where=OPEN)
    op.create_table(
        "provider_looks",
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("began_at", INSTANT, nullable=True),
        sa.Column("wanted_at", INSTANT, nullable=True),
        sa.PrimaryKeyConstraint("provider", name=op.f("provider_looks_pkey")),
    )
    op.create_table(
        "alerts",
        sa.Column("event_id", sa.String(length=32), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", INSTANT, nullable=False),
        sa.Column("taken_at", INSTANT, nullable=True),
        sa.ForeignKeyConstraint(["event_id"], ["events.id"], name=op.f("alerts_event_id_fkey")),
        sa.PrimaryKeyConstraint("event_id", name=op.f("alerts_pkey")),
    )
    waiting = sa.text("taken_at IS NULL")
    op.create_index("alerts_due_idx", "alerts", ["next_attempt_at"], postgresql_where=waiting, sqlite_where=waiting)
    op.drop_index("grants_live_of_agent_idx", table_name="grants")
    op.create_index(
        "grants_held_by_agent_idx", "grants", ["agent", "expires_at"], postgresql_where=HELD, sqlite_where=HELD
    )
