"""What Alembic executes to run migrations: over the connection, and inside the transaction, of `Database.migrate`.

Alembic runs this file itself, so it works at import, alone among our modules.
"""

from alembic import context

from controller.storage.tables import metadata

# SQLite cannot alter most things in place; batch mode copies the table instead.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
