"""What is owed is looked for by provider, each of which is paid by workers of its own

Runs before the code that needs it; the code before it finds what it looks for without it, more slowly.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

OWED = sa.text("state IN ('revoking', 'stuck')")


def upgrade() -> None:
    op.drop_index("leases_owed_idx", table_name="leases")
    columns = ["provider", "urgency", "next_attempt_at"]
    op.create_index("leases_owed_idx", "leases", columns, postgresql_where=OWED, sqlite_where=OWED)
