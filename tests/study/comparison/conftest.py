"""Studies whose databases need not outlive the machine."""

import pytest
import sqlalchemy


@pytest.fixture(autouse=True, scope="session")
def _databases_are_not_synchronised():
    """A test's database is not read after a power failure, and waiting for the disk is what most of them do."""

    def connected(connection, _):
        if "sqlite" in type(connection).__module__:
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", connected)
