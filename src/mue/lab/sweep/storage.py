"""The database of a sweep: an Optuna storage that any number of machines share, SQLite or PostgreSQL.

    database = Database("sqlite:///runs/s/optuna.db")             # or postgresql://user@host/name
    study = database.study("a sweep's name")                      # made if there is none, by whoever comes first
    database.run(lambda execute: execute("SELECT ... :x", x=1))   # one transaction, tried again when the connection drops

Optuna makes the tables and reads them (``optuna.load_study``, its dashboard). Claims and leases are our own transactions
on the same tables (``mue.lab.sweep.trials``), because Optuna's do not hold: its heartbeat needs ``optimize()``, a stale
trial is failed and enqueued again in two steps, on SQLite two processes can win one claim, and reading 10,000 trials takes
tens of seconds (docs/LOG.md). Optuna is imported only to make a study: a start on one that exists does without.
"""

from __future__ import annotations

import math
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from mue.util.errors import extra
from mue.util.files import FileLock

T = TypeVar("T")
Rows = list[tuple[Any, ...]]
Trouble = Callable[[str, float], None]
"""Called with (what failed, seconds since the connection last worked) as a lost connection is tried again."""

PATIENCE = 3600.0  # seconds that a lost connection is tried again: a cluster's database may be down for a while
_OPENING = 60.0  # ... and at the start, where the URL may be wrong
_UNHEARD = 5.0  # ... and there, where nobody is told what is waited for
_TELL = 30.0  # seconds between two messages about it
_BUSY_SECONDS = 30.0  # that a transaction on SQLite waits for another process's, before it counts as a lost connection
_SQLITE_BUSY = (5, 6)  # SQLITE_BUSY and SQLITE_LOCKED: somebody else is writing
_SQLITE_BROKEN = (11, 26)  # SQLITE_CORRUPT and SQLITE_NOTADB
# One that writes locks before it reads, so that what it read is still so when it writes; one that reads sees one moment.
_BEGIN = {
    True: {True: "BEGIN IMMEDIATE", False: "BEGIN"},
    False: {True: "BEGIN", False: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"},
}
_TABLE = "trial_heartbeats"  # of those that Optuna makes, all of them before it makes a study: without it there is none
_MAKING = 0x6D7565  # "mue": key of the advisory lock on PostgreSQL under which tables and studies are made
# A peer that vanished without a word is noticed within seconds on both sides, and holds no lock for longer: 5 + 3 × 2 s
# by keepalives where nothing is under way, 15 s by tcp_user_timeout where something is (Linux takes two hours and a
# quarter of one), and the server ends a transaction in which nothing is said. Our times are UTC, hence the session's.
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "options": "-c idle_in_transaction_session_timeout=15000 -c statement_timeout=60000 -c timezone=UTC",
}
_FORMS = "sqlite:///FILE or postgresql://USER@HOST/NAME"


class StorageError(RuntimeError):
    """The storage could not be reached for longer than our patience, or cannot do what was asked: a full disk, a damaged file."""


class MissingError(ValueError):
    """There is no such storage, or nothing of this sweep in it."""


class Execute(Protocol):
    """Runs one statement with ``:name`` parameters; with ``many``, once for each of its rows of parameters."""

    def __call__(self, query: str, many: Sequence[dict[str, Any]] | None = None, **values: Any) -> Rows: ...


class Database:
    """The database at ``url``; safe to use from several threads, each of which has a connection of its own.

    Args:
        patience: seconds that a lost connection is tried again. trouble: told of it meanwhile.
        make: an SQLite file that is not there is made.

    Raises:
        MissingError: there is no such file, and ``make`` is false.
        ValueError: neither SQLite nor PostgreSQL, the driver is missing, or it cannot be opened; names the fix.
    """

    def __init__(
        self, url: str, *, patience: float = PATIENCE, trouble: Trouble | None = None, make: bool = True
    ) -> None:
        self.url, self.name, self.trouble = url, without_password(url), trouble
        self.sqlite = url.startswith("sqlite:")
        self._begin = _BEGIN[self.sqlite]
        self._tables = (
            "FROM sqlite_master WHERE name = :table" if self.sqlite else "WHERE to_regclass(:table) IS NOT NULL"
        )
        self._local = threading.local()
        if self.sqlite:
            if not make and not Path(_file(url)).exists():
                raise MissingError(f"there is no storage {self.name}: check its path")
            Path(_file(url)).parent.mkdir(parents=True, exist_ok=True)
            self.errors: tuple[type[Exception], ...] = (sqlite3.Error,)
        else:
            try:
                import psycopg
            except ImportError as error:
                raise ValueError(
                    f"{self.name} needs its driver, in the cluster extra: {extra('cluster')} ({error})"
                ) from error
            self.errors = (psycopg.Error,)
        self.patience = min(patience, _OPENING if trouble else _UNHEARD)
        try:
            self.find("")  # opens the connection: a wrong URL is an error here, not in the middle of a sweep
        except (*self.errors, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            remedy = _remedy(cause) if cause else ""
            raise ValueError(f"cannot open the storage {self.name}: {_first_line(cause)}{remedy}") from error
        self.patience = patience

    def run(self, work: Callable[[Execute], T], *, write: bool = True) -> T:
        """Run ``work`` in one transaction.

        It must bear being run again: a lost connection may hide that it was committed.

        Args:
            work: called with a function that executes a statement; what it returns is passed on.
            write: it writes, so it takes its locks before it reads; else it sees one moment and holds nobody up.

        Raises:
            StorageError: the connection stayed lost for longer than ``patience``.
        """
        return self._patiently(lambda: self._transaction(work, write))

    def study(self, name: str) -> int:
        """The id of the study of this name; tables and study are made where they are missing, once."""
        found = self.find(name)
        if found is None:
            self._patiently(lambda: self._make(name))
            found = self.find(name)
        assert found is not None
        return found

    def studies(self, key: str) -> dict[str, str]:
        """The studies that say something under ``key``: by name, what they say, as JSON."""
        query = (
            "SELECT s.study_name, a.value_json FROM studies s JOIN study_user_attributes a ON a.study_id = s.study_id"
            " WHERE a.key = :key ORDER BY s.study_id"
        )
        made = f"SELECT 1 {self._tables}"
        return dict(
            self.run(lambda execute: execute(query, key=key) if execute(made, table=_TABLE) else [], write=False)
        )

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Try until it works, as long as what fails may pass by itself and our patience lasts."""
        failing, told, wait = None, -math.inf, 0.1
        while True:
            try:
                return attempt()
            except Exception as error:
                cause = self._cause(error)
                if cause is None:
                    raise
                if not _passing(cause):
                    raise StorageError(
                        f"the storage {self.name} failed: {_first_line(cause)}{_remedy(cause)}"
                    ) from error
                now = time.monotonic()
                failing = failing or now
                if now - failing > self.patience:
                    raise StorageError(
                        f"the storage {self.name} cannot be reached ({_first_line(cause)}): start this again when it can"
                    ) from error
                if self.trouble and now - told > _TELL:
                    told = now
                    self.trouble(_first_line(cause), now - failing)
                # Jittered, and doubled up to a few seconds: all workers lost the same server, and must not come back as
                # one.
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, 3.0)

    def _cause(self, error: BaseException | None) -> Exception | None:
        """The driver's error behind an error, through Optuna's and SQLAlchemy's."""
        while error is not None and not isinstance(error, self.errors):
            error = error.__cause__
        return error

    def _transaction(self, work: Callable[[Execute], T], write: bool) -> T:
        """One try on this thread's connection; whatever goes wrong, the next try has a new one."""
        connection = getattr(self._local, "connection", None) or self._connect()
        self._local.connection = connection
        execute = _sqlite_execute(connection) if self.sqlite else _postgres_execute(connection)
        try:
            execute(self._begin[write])
            found = work(execute)
            execute("COMMIT")
            return found
        except BaseException:  # an interrupt too: closing rolls back, in whatever state the connection is
            self._local.connection = None
            with suppress(*self.errors):
                connection.close()
            raise

    def _connect(self) -> Any:
        # Both drivers without their own transactions: sqlite3 would begin one late, before the first write only.
        if self.sqlite:
            return sqlite3.connect(_file(self.url), timeout=_BUSY_SECONDS, isolation_level=None)
        import psycopg

        return psycopg.connect(self.url, autocommit=True, **_POSTGRES)

    def find(self, name: str) -> int | None:
        """The id of the study of this name; None where there is none. Nothing is written."""

        def work(execute: Execute) -> int | None:
            if not execute(f"SELECT 1 {self._tables}", table=_TABLE):
                return None
            found = execute("SELECT study_id FROM studies WHERE study_name = :name", name=name)
            return found[0][0] if found else None

        return self.run(work, write=False)

    def _make(self, name: str) -> None:
        """Have Optuna make its tables and the study, so that its own tools read them."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A file's name is taken as it is: in a URL SQLAlchemy would end it at a "?" and read "%20" as a blank, and Optuna
        # would fill in what stands in braces.
        file: dict[str, Any] = {"creator": lambda: sqlite3.connect(_file(self.url), timeout=_BUSY_SECONDS)}
        how = ("sqlite://", file) if self.sqlite else (for_optuna(self.url), None)
        with self._making():
            storage = optuna.storages.RDBStorage(*how)
            optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            storage.engine.dispose()  # SQLAlchemy's pool would keep its connections as long as we live

    @contextmanager
    def _making(self) -> Iterator[None]:
        """One maker at a time; the lock dies with its holder."""
        if self.sqlite:
            with FileLock(Path(_file(self.url) + ".lock")):
                yield
        else:
            with self._connect() as connection:
                connection.execute("SELECT pg_advisory_lock(%s)", [_MAKING])
                yield  # the lock ends with its connection


def for_optuna(url: str) -> str:
    """The URL as ``optuna.load_study`` takes it: with our driver named."""
    return url if url.startswith("sqlite:") else "postgresql+psycopg:" + url.partition(":")[2]


def without_password(url: str) -> str:
    """The URL as messages show it and files keep it, a file's with its whole path. Passwords come from PGPASSWORD or ~/.pgpass.

    Raises:
        ValueError: it is none of ours.
    """
    if url.startswith("sqlite:///") and _file(url).strip("/"):
        return f"sqlite:///{Path(_file(url)).absolute()}"
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError(f"--storage takes {_FORMS}, not {parts.scheme or url!r}")
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host))


def _file(url: str) -> str:
    return url.removeprefix("sqlite:///")


def _sqlite_execute(connection: sqlite3.Connection) -> Execute:
    def execute(query: str, many: Sequence[dict[str, Any]] | None = None, **values: Any) -> Rows:
        done = connection.execute(query, values) if many is None else connection.executemany(query, many)
        return done.fetchall()

    return execute


def _postgres_execute(connection: Any) -> Execute:
    def execute(query: str, many: Sequence[dict[str, Any]] | None = None, **values: Any) -> Rows:
        with connection.cursor() as cursor:
            query = re.sub(r"(?<!:):(\w+)", r"%(\1)s", query)  # :name is sqlite3's, %(name)s psycopg's; :: is a cast
            if many is not None:
                cursor.executemany(query, many)
            else:
                cursor.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    return execute


def _passing(error: Exception) -> bool:
    """Whether to try again: a lost connection, a database that starts up, a deadlock, another process's lock."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BUSY  # the low byte is the primary code
    import psycopg

    if "FATAL" in str(error):  # the server's own no: a wrong password stays wrong
        return any(words in str(error) for words in ("starting up", "shutting down", "too many", "terminating"))
    lost = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.IdleInTransactionSessionTimeout)
    return isinstance(error, lost)


def _remedy(error: BaseException) -> str:
    """What to do about an error that trying again does not mend; empty where there is nothing to say."""
    broken = getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BROKEN
    return (
        "; remove the file and start the sweep again: results in its folder are found and told anew" if broken else ""
    )


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
