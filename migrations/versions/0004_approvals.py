"""What waits for people, what they said, and whom to tell

Runs before the code that needs it; the code before it does not see what is new.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")

OPEN = sa.text("state = 'open'")
UNCOLLECTED = sa.text("state = 'approved' AND collected_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "approvals",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("grant_id", sa.String(length=32), nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("agent", sa.String(length=255), nullable=False),
        sa.Column("orchestrator", sa.String(length=255), nullable=False),
        sa.Column("resource", sa.String(length=1000), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("ttl_s", sa.Integer(), nullable=False),
        sa.Column("groups", sa.Text(), nullable=False),
        sa.Column("needs", JSON, nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("parameters_sha256", sa.String(length=64), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.Column("ended_at", INSTANT, nullable=True),
        sa.Column("ended_by", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.Column("collected_at", INSTANT, nullable=True),
        sa.Column("polled_at", INSTANT, nullable=True),
        sa.CheckConstraint(
            "state IN ('open', 'approved', 'denied', 'expired', 'withdrawn')", name=op.f("approvals_state_is_known")
        ),
        sa.CheckConstraint("(state = 'open') = (ended_at IS NULL)", name=op.f("approvals_ended_has_a_time")),
        sa.CheckConstraint("collected_at IS NULL OR state = 'approved'", name=op.f("approvals_collected_was_approved")),
        sa.ForeignKeyConstraint(["grant_id"], ["grants.id"], name=op.f("approvals_grant_id_fkey")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("approvals_task_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("approvals_pkey")),
    )
    op.create_index("approvals_grant_idx", "approvals", ["grant_id"], unique=True)
    op.create_index("approvals_agent_idx", "approvals", ["agent", "id"])
    op.create_index("approvals_open_idx", "approvals", ["agent"], postgresql_where=OPEN, sqlite_where=OPEN)
    op.create_index(
        "approvals_uncollected_idx",
        "approvals",
        ["agent"],
        postgresql_where=UNCOLLECTED,
        sqlite_where=UNCOLLECTED,
    )
    op.create_table(
        "votes",
        sa.Column("approval_id", sa.String(length=32), nullable=False),
        sa.Column("voter", sa.String(length=255), nullable=False),
        sa.Column("issuer", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=2048), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("scopes", JSON, nullable=True),
        sa.Column("ttl_s", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.Column("voted_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["approval_id"], ["approvals.id"], name=op.f("votes_approval_id_fkey")),
        sa.PrimaryKeyConstraint("approval_id", "voter", name=op.f("votes_pkey")),
    )
    op.create_table(
        "notices",
        sa.Column("approval_id", sa.String(length=32), nullable=False),
        sa.Column("channel", sa.String(length=255), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", INSTANT, nullable=False),
        sa.Column("taken_at", INSTANT, nullable=True),
        sa.ForeignKeyConstraint(["approval_id"], ["approvals.id"], name=op.f("notices_approval_id_fkey")),
        sa.PrimaryKeyConstraint("approval_id", "channel", name=op.f("notices_pkey")),
    )
    waiting = sa.text("taken_at IS NULL")
    op.create_index("notices_due_idx", "notices", ["next_attempt_at"], postgresql_where=waiting, sqlite_where=waiting)
