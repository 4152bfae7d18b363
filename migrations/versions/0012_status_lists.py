"""A status list is made of what is out of it alone, and not of every token that it has a place for

Runs before the code that needs it; the code before it finds what it looks for without it, more slowly.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

OUT = sa.text("state <> 'active' AND status_list IS NOT NULL")
UPHELD = sa.text("state = 'active' AND upheld_until IS NOT NULL")


def upgrade() -> None:
    op.create_index("grants_out_idx", "grants", ["status_list", "status_index"], postgresql_where=OUT, sqlite_where=OUT)
    op.create_index("tasks_upheld_idx", "tasks", ["upheld_until"], postgresql_where=UPHELD, sqlite_where=UPHELD)
