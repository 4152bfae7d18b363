"""What a decision looked at beside a grant's other columns, and deciding live grants again

Runs before the code that needs it; the code before it does not see what is new. A grant made by that code has no terms.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None

INSTANT = sa.DateTime(timezone=True).with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("grants", sa.Column("terms", JSON, nullable=True))
