"""The database of a sweep: an Optuna storage that any number of machines share, SQLite or PostgreSQL.

    database = Database("sqlite:///runs/s/optuna.db")             # or postgresql://user@host/name
    study = database.study("a sweep's name")                      # made if there is none, by whoever comes first
    database.run(lambda connection: ...)                          # one transaction, tried again when the connection drops

Optuna makes the tables and reads them (``optuna.load_study``, its dashboard, its samplers). Claims and leases are our own
transactions on the same tables (``mue.lab.storage_trials``), because Optuna's do not hold: its heartbeat needs
``optimize()``, a stale trial is failed and enqueued again in two steps, and on SQLite two processes can win one claim
(docs/LOG.md). Optuna is imported only to make a study: a start on one that exists does without.
"""

from __future__ import annotations

import fcntl
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, ProgrammingError

T = TypeVar("T")
Trouble = Callable[[str, float], None]
"""Called with (what failed, seconds since the connection last worked) as a lost connection is tried again."""

PATIENCE = 3600.0  # seconds that a lost connection is tried again: a cluster's database may be down for a while
_TELL = 30.0  # seconds between two words about it
_BUSY_SECONDS = 30.0  # that a transaction on SQLite waits for another process's
_SQLITE_BUSY = (5, 6)  # SQLITE_BUSY and SQLITE_LOCKED: somebody else is writing
_MAKING = 0x6D7565  # key of the advisory lock on PostgreSQL under which tables and studies are made
# A peer that vanished without a word is noticed within seconds on both sides, and holds no lock for longer.
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "options": "-c idle_in_transaction_session_timeout=15000 -c statement_timeout=60000 -c timezone=UTC",
}


class StorageError(RuntimeError):
    """The storage could not be reached for longer than our patience."""


class Database:
    """A connection to the database at ``url``; safe to use from several threads.

    Raises:
        ValueError: neither SQLite nor PostgreSQL, the driver is missing, or it cannot be opened; names the fix.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE, trouble: Trouble | None = None) -> None:
        self.patience, self.trouble = patience, trouble
        self.url = _parsed(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        try:
            if self.sqlite:
                assert self.url.database is not None
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
                self.engine = sa.create_engine(self.url, connect_args={"timeout": _BUSY_SECONDS})
                sa.event.listen(self.engine, "connect", _manual_transactions)
                sa.event.listen(self.engine, "begin", _begin)
            else:
                self.engine = sa.create_engine(self.url, connect_args=_POSTGRES, pool_pre_ping=True)
            with self._engine(write=False).connect() as connection:
                sa.inspect(connection).has_table("studies")
        except ImportError as error:
            raise ValueError(f"{self.name} needs its driver: pip install 'mue[cluster]' ({error})") from error
        except DBAPIError as error:
            raise ValueError(f"cannot open the storage {self.name}: {_first_line(error)}") from error

    @property
    def name(self) -> str:
        """The URL without its password: what messages show and files keep."""
        return without_password(self.url)

    def run(self, work: Callable[[sa.Connection], T], *, write: bool = True) -> T:
        """``work`` in one transaction. It must bear being run again: a lost connection may hide that it was committed.

        Raises:
            StorageError: the connection stayed lost for longer than ``patience``.
        """
        failing, told, wait = None, -math.inf, 0.1
        while True:
            try:
                with self._engine(write=write).begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not _passing(error):
                    raise
                now = time.monotonic()
                failing = failing or now
                if now - failing > self.patience:
                    raise StorageError(
                        f"the storage {self.name} cannot be reached ({_first_line(error)}): start this again when it can"
                    ) from error
                if self.trouble and now - told > _TELL:
                    told = now
                    self.trouble(_first_line(error), now - failing)
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, 3.0)

    def study(self, name: str) -> int:
        """The id of the study of this name; tables and study are made where they are missing, once."""
        found = self._find(name)
        if found is None:
            with self._making():
                self._make(name)
            found = self._find(name)
        assert found is not None
        return found

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def _engine(self, *, write: bool) -> sa.Engine:
        return self.engine if write else self.engine.execution_options(mue_read=True)

    def _find(self, name: str) -> int | None:
        query = sa.text("SELECT study_id FROM studies WHERE study_name = :name")

        def work(c: sa.Connection) -> int | None:
            made = sa.inspect(c).has_table("trial_heartbeats")  # the last of Optuna's tables
            return c.execute(query, {"name": name}).scalar() if made else None

        return self.run(work, write=False)

    def _make(self, name: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = {} if self.sqlite else {"connect_args": _POSTGRES}
        storage = optuna.storages.RDBStorage(self.url.render_as_string(hide_password=False), settings)
        optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        storage.engine.dispose()

    @contextmanager
    def _making(self) -> Iterator[None]:
        """One maker at a time; the lock dies with its holder."""
        if self.sqlite:
            with Path(f"{self.url.database}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            with self.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _MAKING})
                yield
                connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _MAKING})


def without_password(url: str | sa.URL) -> str:
    """The URL as messages show it and files keep it. The password then comes from PGPASSWORD or ~/.pgpass."""
    parsed = _parsed(url)
    return sa.URL.create(
        **{**parsed._asdict(), "drivername": parsed.get_backend_name(), "password": None}
    ).render_as_string()


def _parsed(url: str | sa.URL) -> sa.URL:
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except ArgumentError as error:
        raise ValueError(f"--storage {url!r} is not a URL: sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise ValueError(f"--storage takes sqlite:///FILE or postgresql://USER@HOST/NAME, not {backend}")


def _manual_transactions(connection: Any, record: Any) -> None:
    """Python's sqlite3 must not begin transactions by itself: it would read first and lock only at the first write."""
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    """A writing transaction locks before it reads, so that what it read is still so when it writes."""
    reads = connection.get_execution_options().get("mue_read", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _passing(error: DBAPIError) -> bool:
    """Whether to try again: a lost connection, a database that starts up, a deadlock, another process's lock."""
    if isinstance(error, ProgrammingError):
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _SQLITE_BUSY
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def _first_line(error: DBAPIError) -> str:
    return (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
