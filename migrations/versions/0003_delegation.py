"""Which agents handed a grant down, so that what is revoked of one of them covers it too; and how long the tasks
above a subtask uphold it

Runs before the code that needs it; the code before it does not see what is new, and hands nothing down.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    handed_down = sa.text("chain <> ''")
    in_parts = sa.text("tasks_above <> ''")
    for table, name in (
        ("grants", "chain"),
        ("grants", "tasks_above"),
        ("grants", "orchestrators_above"),
        ("grants", "hand_to"),
        ("tasks", "tasks_above"),
        ("tasks", "orchestrators_above"),
    ):
        op.add_column(table, sa.Column(name, sa.Text(), nullable=False, server_default=sa.text("''")))
    op.create_index("grants_in_parts_idx", "grants", ["tasks_above"], postgresql_where=in_parts, sqlite_where=in_parts)
    op.add_column("tasks", sa.Column("upheld_until", INSTANT, nullable=True))
    op.create_index(
        "grants_handed_down_idx", "grants", ["chain"], postgresql_where=handed_down, sqlite_where=handed_down
    )


def downgrade() -> None:
    op.drop_index("grants_handed_down_idx", table_name="grants")
    op.drop_index("grants_in_parts_idx", table_name="grants")
    for name in ("upheld_until", "tasks_above", "orchestrators_above"):
        op.drop_column("tasks", name)
    for name in ("chain", "tasks_above", "orchestrators_above", "hand_to"):
        op.drop_column("grants", name)
