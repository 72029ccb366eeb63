"""The ledger's database: SQLite in the plant folder by default, PostgreSQL by URL.

SQLite runs with a write-ahead log and full sync, waits for another writer, and begins a transaction that
writes by BEGIN IMMEDIATE: the driver's own BEGIN would let two processes read the same due row before either
writes. It must lie on a local disk: SQLite's locks do not hold on NFS or SMB.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, USAGE, UserError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from rollsight.inspect.plant import Plant

T = TypeVar("T")

LEDGER_FILE = "ledger.db"
LEDGER_VARIABLE = "ROLLSIGHT_LEDGER"
BUSY_S = 30.0  # how long a writer waits for another one
CONNECT_S = 10
PATIENCE_S = 120.0  # with a server that is started anew
MIGRATIONS = Path(__file__).parent / "migrations"
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "fuse.sshfs", "afs")
_MIGRATING = 0x526F6C6C  # PostgreSQL advisory lock: one process at a time changes the schema
# A server that is gone without a word (power, firewall) is given up after a minute; TCP waits two hours.
# PostgreSQL 17, 32.1.2, Parameter Key Words: in s, the last one in ms.
_SILENCE = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_RAISED = "P0001"  # PostgreSQL: a trigger's own exception
_READ_ONLY = ("readonly", "read-only", "read only")


class LedgerAwayError(UserError):
    """The database is busy, its disk full, or it does not answer: exit code 75, worth another try."""

    def __init__(self, message: str) -> None:
        super().__init__(message, LOCKED)


@dataclass(frozen=True, slots=True)
class Ledger:
    """An open ledger of the newest schema; one per process, used from any thread."""

    engine: Engine = field(repr=False)
    backend: str  # "sqlite" | "postgresql"
    where: str  # for a line to a person: file or URL, without the password

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction that writes: all of it is kept, or nothing.

        UserError 75 where the database is busy or away, 78 where it may not be written.
        """
        with self._translated(), Session(self.engine) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """One transaction that only reads, and waits for no writer. UserError as for `write`."""
        reading = self.engine.execution_options(reads_only=True)
        with self._translated(), Session(reading) as session, session.begin():
            yield session

    def keep(self, work: Callable[[Session], T], patience_s: float = PATIENCE_S) -> T:
        """Do `work` in one transaction, again and again while the database is busy or away.

        For what must not be lost, such as the end of a run: `work` must bear being done twice, since an
        answer may be lost after a commit. UserError 75 when patience ends.
        """
        until, wait_s = time.monotonic() + patience_s, 0.2
        while True:
            try:
                with self.write() as session:
                    return work(session)
            except LedgerAwayError:
                if time.monotonic() + wait_s > until:
                    raise
            time.sleep(wait_s)
            wait_s = min(5.0, wait_s * 2)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # a row that is there already, or an event that was to be changed: a matter of the caller
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _RAISED:
                raise
            raise fault_of(error, self.where) from error


def ledger_url(asked: str | None, home: Path, configured: str | None = None) -> URL:
    """Which ledger: as asked for, else $ROLLSIGHT_LEDGER, else as configured, else in the plant folder."""
    told = asked or os.environ.get(LEDGER_VARIABLE) or configured
    if not told:
        return URL.create("sqlite", database=str(home / LEDGER_FILE))
    try:
        url = make_url(told)
    except ArgumentError:
        raise _unknown(told) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or not url.database:
        raise _unknown(url.render_as_string(hide_password=True))
    return url


def open_ledger(url: str | None, plant: "Plant", *, configured: str | None = None) -> Ledger:
    """Open the ledger and bring its schema up to date; SQLite's file is made on first use.

    url: as --ledger gives it, `postgresql+psycopg://USER@HOST/NAME` or `sqlite:///FILE`; `configured` is what
    line.yaml says. UserError 78 where the schema is newer than this code, the file is none of ours or may not
    be written; 75 where the server does not answer or another process holds the file for too long.
    """
    place = ledger_url(url, plant.home, configured)
    where = place.render_as_string(hide_password=True)
    if place.drivername == "sqlite":
        where = str(place.database)
        if not where.startswith("file:"):
            check_disk(Path(where))
            with _made(Path(where).parent):
                Path(where).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(place, connect_args={"timeout": BUSY_S})
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = _postgresql(place, where)
    ledger = Ledger(engine, place.get_backend_name(), where)
    try:
        _migrate(ledger)
    except DBAPIError as error:
        engine.dispose()
        raise fault_of(error, where) from error
    except BaseException:
        engine.dispose()
        raise
    return ledger


def check_disk(file: Path, mounts: Sequence[tuple[str, str]] | None = None) -> None:
    """UserError 78 where the file would lie on a network share, on which SQLite's locks do not hold.

    mounts: mount point and kind of each file system, by default those of this machine.
    """
    if mounts is None:
        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    place = file.absolute()
    over = [(Path(point), kind) for point, kind in mounts if place.is_relative_to(point)]
    kind = max(over, key=lambda mount: len(mount[0].parts), default=(place, ""))[1].lower()
    if kind in NETWORK_DISKS:
        raise UserError(
            f"ledger {file} would lie on a network share ({kind}), where SQLite loses data: name a local "
            "file or a PostgreSQL database with --ledger",
            CONFIG,
        )


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema to `revision`, inside the connection's own transaction."""
    script = _script()

    def steps(current: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs(revision, current)  # as alembic.command.upgrade does

    with EnvironmentContext(Config(), script, fn=steps, destination_rev=revision) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()


def schema_version(connection: Connection) -> str | None:
    """The revision of the schema; None where there is no ledger yet."""
    return MigrationContext.configure(connection).get_current_revision()


def revisions() -> list[str]:
    """All schema versions, oldest first."""
    return [step.revision for step in reversed(list(_script().walk_revisions()))]


def fault_of(error: DBAPIError, where: str) -> UserError:
    """What a person is told of a fault of the database, with the exit code that says what to do."""
    said = " ".join(str(error.orig).split())[:300]
    lower = said.lower()
    if any(word in lower for word in _READ_ONLY):
        return UserError(
            f"ledger {where} may not be written ({said}): give this user the right to, or name another "
            "with --ledger",
            CONFIG,
        )
    if isinstance(error.orig, sqlite3.Error):
        if "locked" in lower or "busy" in lower:
            return LedgerAwayError(f"ledger {where} is held by another process: try again later")
        if "full" in lower:
            return LedgerAwayError(f"ledger {where}: {said}: make room on its disk")
        if "disk i/o" in lower:
            return UserError(f"ledger {where}: {said}: make room on its disk", FAILED)
        if "not a database" in lower or "malformed" in lower:
            return UserError(
                f"ledger {where} is no ledger or is damaged ({said}): move it away; `inspect jobs doctor` "
                "makes a new one from the receipts",
                CONFIG,
            )
        return UserError(f"ledger {where}: {said}: check path and rights", CONFIG)
    state = getattr(error.orig, "sqlstate", None) or ""
    if state.startswith("22"):  # a value that the server does not take: waiting cures nothing
        return UserError(f"ledger {where}: {said}: this is a fault of Rollsight, please report it", FAILED)
    if state.startswith(("28", "3D", "42")):  # authorisation, unknown database, missing right or table
        return UserError(f"ledger {where}: {said}: check the URL and the rights of its user", CONFIG)
    if isinstance(error, ProgrammingError) or any(
        word in lower for word in ("authentication", "does not exist", "no password")
    ):
        return UserError(f"ledger {where}: {said}: check the URL and the rights of its user", CONFIG)
    return LedgerAwayError(f"ledger {where} does not answer ({said}): try again later")


def _postgresql(place: URL, where: str) -> Engine:
    try:
        return create_engine(
            place,
            pool_pre_ping=True,  # a server that was started anew drops every connection
            connect_args={"connect_timeout": CONNECT_S, "application_name": "rollsight"} | _SILENCE,
        )
    except ImportError:
        raise UserError(
            f"ledger {where} needs psycopg: pip install 'rollsight[postgresql]'", CONFIG
        ) from None


def _migrate(ledger: Ledger) -> None:
    known = revisions()
    with ledger.engine.connect().execution_options(reads_only=True) as connection, connection.begin():
        current = schema_version(connection)
    if current == known[-1]:
        return
    if current is not None and current not in known:
        raise UserError(
            f"ledger {ledger.where} has the schema {current} of a newer version; this one knows {known[-1]}: "
            "install the newer version",
            CONFIG,
        )
    with ledger.engine.begin() as connection:
        if ledger.backend == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})
        upgrade(connection)


def _script() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS / "versions")])


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing: _begin_sqlite does
    cursor = connection.cursor()
    for setting in (f"busy_timeout = {int(BUSY_S * 1000)}", "foreign_keys = ON", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {setting}")
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        # A database that may not be written is told of by the first statement that writes.
        with contextlib.suppress(sqlite3.OperationalError):
            cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}): choose another plant folder with --home", CONFIG
        ) from None


def _unknown(told: str) -> UserError:
    return UserError(
        f"ledger {told[:120]!r} is none that is known: it is postgresql+psycopg://USER@HOST/NAME or "
        "sqlite:///FILE",
        USAGE if "://" not in told else CONFIG,
    )
