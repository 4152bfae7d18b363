"""Grants asked for as a break-glass, the reviews owed for them, whom to tell, and what a task knows of its user

Runs before the code that needs it; the code before it does not see what is new.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")

BROKEN = sa.text("break_glass IS NOT NULL")
OPEN = sa.text("state <> 'completed'")
WAITING = sa.text("taken_at IS NULL")
DENIAL = sa.text(
    "type IN ('grant.denied', 'grant.refused', 'grant.renewal_refused', 'approval.refused', 'break_glass.refused') AND "
    "outcome IN ('denied', 'forbidden', 'role_missing', 'not_found', 'invalid_target', 'invalid_scope')"
)


def upgrade() -> None:
    # As one column with its constraint: SQLite adds none to a table that is there already, except so.
    op.execute(
        "ALTER TABLE grants ADD COLUMN break_glass VARCHAR(1000) "
        "CONSTRAINT grants_break_glass_is_short CHECK (break_glass IS NULL OR ttl_s <= 900)"
    )
    op.create_index("grants_break_glass_idx", "grants", ["id"], postgresql_where=BROKEN, sqlite_where=BROKEN)
    # A break-glass that is refused is a denial like any other.
    op.drop_index("events_denials_idx", "events")
    op.create_index("events_denials_idx", "events", ["agent", "id"], postgresql_where=DENIAL, sqlite_where=DENIAL)
    op.add_column("tasks", sa.Column("user_attributes", JSON, nullable=True))
    op.create_table(
        "reviews",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("grant_id", sa.String(length=32), nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.Column("due_at", INSTANT, nullable=False),
        sa.Column("completed_at", INSTANT, nullable=True),
        sa.Column("completed_by", sa.String(length=255), nullable=True),
        sa.Column("note", sa.String(length=1000), nullable=True),
        sa.CheckConstraint("state IN ('owed', 'overdue', 'completed')", name=op.f("reviews_state_is_known")),
        sa.CheckConstraint(
            "(state = 'completed') = (completed_at IS NOT NULL)", name=op.f("reviews_completed_has_a_time")
        ),
        sa.CheckConstraint("(state = 'completed') = (note IS NOT NULL)", name=op.f("reviews_completed_has_a_note")),
        sa.ForeignKeyConstraint(["grant_id"], ["grants.id"], name=op.f("reviews_grant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("reviews_pkey")),
    )
    op.create_index("reviews_grant_idx", "reviews", ["grant_id"], unique=True)
    op.create_index("reviews_open_idx", "reviews", ["due_at"], postgresql_where=OPEN, sqlite_where=OPEN)
    op.create_table(
        "announcements",
        sa.Column("event_id", sa.String(length=32), nullable=False),
        sa.Column("channel", sa.String(length=255), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", INSTANT, nullable=False),
        sa.Column("taken_at", INSTANT, nullable=True),
        sa.ForeignKeyConstraint(["event_id"], ["events.id"], name=op.f("announcements_event_id_fkey")),
        sa.PrimaryKeyConstraint("event_id", "channel", name=op.f("announcements_pkey")),
    )
    op.create_index(
        "announcements_due_idx",
        "announcements",
        ["next_attempt_at"],
        postgresql_where=WAITING,
        sqlite_where=WAITING,
    )
