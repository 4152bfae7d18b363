"""The tables of tasks, grants, keys, proofs and audit

Runs before the code that needs it.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Frozen here: a later change of a model's type must not change what this revision once did.
INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "bulk_revocations",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("axis", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=1000), nullable=False),
        sa.Column("era", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=1000), nullable=False),
        sa.Column("revoked_at", INSTANT, nullable=False),
        sa.Column("revoked_by", sa.String(length=255), nullable=False),
        sa.Column("rows_followed_at", INSTANT, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("bulk_revocations_pkey")),
    )
    op.create_table(
        "configuration_versions",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("document", JSON, nullable=False),
        sa.Column("applied_at", INSTANT, nullable=False),
        sa.Column("applied_by", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("configuration_versions_pkey")),
    )
    op.create_table(
        "consumed_proofs",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("forget_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("kind", "key_sha256", name=op.f("consumed_proofs_pkey")),
    )
    op.create_index(op.f("consumed_proofs_forget_at_idx"), "consumed_proofs", ["forget_at"], unique=False)

    op.create_table(
        "events",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("outcome", sa.String(length=32), nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=True),
        sa.Column("grant_id", sa.String(length=32), nullable=True),
        sa.Column("agent", sa.String(length=255), nullable=True),
        sa.Column("user", sa.String(length=255), nullable=True),
        sa.Column("resource", sa.String(length=1000), nullable=True),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.Column("policy_version", sa.Integer(), nullable=True),
        sa.Column("trace_id", sa.String(length=32), nullable=True),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("events_pkey")),
    )
    op.create_index("events_agent_idx", "events", ["agent", "id"], unique=False)
    op.create_index("events_grant_idx", "events", ["grant_id", "id"], unique=False)
    op.create_index("events_task_idx", "events", ["task_id", "id"], unique=False)
    op.create_index("events_type_idx", "events", ["type", "id"], unique=False)

    op.create_table(
        "gate",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("era", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("gate_is_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("gate_pkey")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("principal", sa.String(length=255), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("made_id", sa.String(length=32), nullable=False),
        sa.Column("forget_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("principal", "key_sha256", name=op.f("idempotency_keys_pkey")),
    )
    op.create_index(op.f("idempotency_keys_forget_at_idx"), "idempotency_keys", ["forget_at"], unique=False)

    op.create_table(
        "lockdowns",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("axis", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=1000), nullable=False),
        sa.Column("reason", sa.String(length=1000), nullable=False),
        sa.Column("set_at", INSTANT, nullable=False),
        sa.Column("set_by", sa.String(length=255), nullable=False),
        sa.Column("lifted_at", INSTANT, nullable=True),
        sa.Column("lifted_by", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("lockdowns_pkey")),
    )
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.String(length=64), nullable=False),
        sa.Column("algorithm", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("public_jwk", JSON, nullable=False),
        sa.Column("sealed_private_key", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("activated_at", INSTANT, nullable=True),
        sa.Column("retired_at", INSTANT, nullable=True),
        sa.CheckConstraint(
            "state IN ('next', 'current', 'retired', 'compromised')", name=op.f("signing_keys_state_is_known")
        ),
        sa.PrimaryKeyConstraint("kid", name=op.f("signing_keys_pkey")),
    )
    op.create_index(
        "signing_keys_one_current_idx",
        "signing_keys",
        ["algorithm"],
        unique=True,
        postgresql_where=sa.text("state = 'current'"),
        sqlite_where=sa.text("state = 'current'"),
    )

    op.create_table(
        "status_lists",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("next_index", sa.Integer(), nullable=False),
        sa.Column("last_expiry_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("status_lists_pkey")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("purpose", sa.String(length=1000), nullable=False),
        sa.Column("orchestrator", sa.String(length=255), nullable=False),
        sa.Column("on_behalf_of", sa.String(length=255), nullable=True),
        sa.Column("parent_task_id", sa.String(length=32), nullable=True),
        sa.Column("ceiling", JSON, nullable=True),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("deadline_at", INSTANT, nullable=False),
        sa.Column("heartbeat_s", sa.Integer(), nullable=True),
        sa.Column("heartbeat_due_at", INSTANT, nullable=True),
        sa.Column("implicit", sa.Boolean(), nullable=False),
        sa.Column("ended_at", INSTANT, nullable=True),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.CheckConstraint("(state = 'active') = (ended_at IS NULL)", name=op.f("tasks_ended_has_a_time")),
        sa.CheckConstraint(
            "state IN ('active', 'completed', 'failed', 'cancelled', 'expired')", name=op.f("tasks_state_is_known")
        ),
        sa.ForeignKeyConstraint(["parent_task_id"], ["tasks.id"], name=op.f("tasks_parent_task_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("tasks_pkey")),
    )
    op.create_index(
        "tasks_due_idx",
        "tasks",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("state = 'active'"),
        sqlite_where=sa.text("state = 'active'"),
    )
    op.create_index(
        "tasks_heartbeat_idx",
        "tasks",
        ["heartbeat_due_at"],
        unique=False,
        postgresql_where=sa.text("state = 'active'"),
        sqlite_where=sa.text("state = 'active'"),
    )
    op.create_index("tasks_orchestrator_idx", "tasks", ["orchestrator", "id"], unique=False)
    op.create_index(op.f("tasks_parent_task_id_idx"), "tasks", ["parent_task_id"], unique=False)

    op.create_table(
        "grants",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("era", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("agent", sa.String(length=255), nullable=False),
        sa.Column("issuer", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=2048), nullable=False),
        sa.Column("orchestrator", sa.String(length=255), nullable=False),
        sa.Column("on_behalf_of", sa.String(length=255), nullable=True),
        sa.Column("parent_grant_id", sa.String(length=32), nullable=True),
        sa.Column("resource", sa.String(length=1000), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("jti", sa.String(length=64), nullable=True),
        sa.Column("kids", sa.Text(), nullable=False),
        sa.Column("jkt", sa.String(length=64), nullable=True),
        sa.Column("credential_sha256", sa.String(length=64), nullable=True),
        sa.Column("status_list", sa.Integer(), nullable=True),
        sa.Column("status_index", sa.Integer(), nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("issued_at", INSTANT, nullable=True),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.Column("renewable_until", INSTANT, nullable=True),
        sa.Column("ttl_s", sa.Integer(), nullable=False),
        sa.Column("ttl_decided_by", sa.String(length=64), nullable=False),
        sa.Column("intent", sa.String(length=1000), nullable=True),
        sa.Column("claimed", JSON, nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("decision", JSON, nullable=False),
        sa.Column("policies", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=True),
        sa.Column("trace_id", sa.String(length=32), nullable=True),
        sa.Column("revoked_at", INSTANT, nullable=True),
        sa.Column("revoked_by", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.String(length=1000), nullable=True),
        sa.CheckConstraint("(state = 'revoked') = (revoked_at IS NOT NULL)", name=op.f("grants_revoked_has_a_time")),
        sa.CheckConstraint(
            "state IN ('pending', 'approved', 'active', 'denied', 'failed', 'revoked', 'expired')",
            name=op.f("grants_state_is_known"),
        ),
        sa.CheckConstraint("issued_at IS NULL OR expires_at > issued_at", name=op.f("grants_expires_after_issue")),
        sa.ForeignKeyConstraint(["parent_grant_id"], ["grants.id"], name=op.f("grants_parent_grant_id_fkey")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("grants_task_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("grants_pkey")),
    )
    op.create_index("grants_agent_idx", "grants", ["agent", "id"], unique=False)
    op.create_index(
        "grants_due_idx",
        "grants",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('pending', 'approved', 'active')"),
        sqlite_where=sa.text("state IN ('pending', 'approved', 'active')"),
    )
    op.create_index(
        "grants_live_of_agent_idx",
        "grants",
        ["agent", "expires_at"],
        unique=False,
        postgresql_where=sa.text("state = 'active'"),
        sqlite_where=sa.text("state = 'active'"),
    )
    op.create_index(op.f("grants_parent_grant_id_idx"), "grants", ["parent_grant_id"], unique=False)
    op.create_index("grants_status_idx", "grants", ["status_list", "status_index"], unique=True)
    op.create_index("grants_task_idx", "grants", ["task_id", "state"], unique=False)

    op.create_table(
        "task_agents",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("agent", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("task_agents_task_id_fkey")),
        sa.PrimaryKeyConstraint("task_id", "agent", name=op.f("task_agents_pkey")),
    )
    op.create_index(op.f("task_agents_agent_idx"), "task_agents", ["agent"], unique=False)

    op.execute("INSERT INTO gate (id, era) VALUES (1, 1)")
