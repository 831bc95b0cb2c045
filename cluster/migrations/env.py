"""Alembic's entry: runs inside the caller's transaction (``cluster.database.migrate``), or, from the
``alembic`` command line, on the configured database."""

from alembic import context

from cluster.config import load_settings
from cluster.database import connect
from cluster.tables import Row

connection = context.config.attributes.get("connection")
if connection is not None:
    context.configure(connection=connection, target_metadata=Row.metadata)
    context.run_migrations()
else:
    with connect(load_settings().database_url).begin() as own:
        context.configure(connection=own, target_metadata=Row.metadata, compare_type=True)
        context.run_migrations()
