"""Allowances of the limits, and what is counted of live grants and of denials

Runs before the code that needs it; the code before it does not see what is new.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
LIVE = sa.text("state IN ('approved', 'active')")
DENIAL = sa.text(
    "type IN ('grant.denied', 'grant.refused', 'grant.renewal_refused', 'approval.refused') AND outcome IN "
    "('denied', 'forbidden', 'role_missing', 'not_found', 'invalid_target', 'invalid_scope')"
)


def upgrade() -> None:
    op.create_table(
        "allowances",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("window_start", sa.BigInteger(), nullable=False),
        sa.Column("bound", sa.BigInteger(), nullable=False),
        sa.Column("asked", sa.BigInteger(), nullable=False),
        sa.Column("given", sa.BigInteger(), nullable=False),
        sa.Column("taken", sa.BigInteger(), nullable=False),
        sa.Column("forget_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("name", "key_sha256", name=op.f("allowances_pkey")),
    )
    op.create_index(op.f("allowances_forget_at_idx"), "allowances", ["forget_at"])
    for name, column in (("grants_live_on_resource_idx", "resource"), ("grants_live_of_issuer_idx", "issuer")):
        op.create_index(name, "grants", [column, "expires_at"], postgresql_where=LIVE, sqlite_where=LIVE)
    op.create_index("events_denials_idx", "events", ["agent", "id"], postgresql_where=DENIAL, sqlite_where=DENIAL)
