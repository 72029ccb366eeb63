"""A real PostgreSQL server in a temporary folder, for benchmarks and tests. It refuses root, so it runs as
its own user then; it listens on a Unix socket alone.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from sqlalchemy.engine import URL

USER = "ledger"


def binaries() -> Path | None:
    """The newest server's programs; None where there is no PostgreSQL here."""
    found = shutil.which("pg_config")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found is not None:
        told = subprocess.run([found, "--bindir"], capture_output=True, text=True, check=True).stdout
        places.append(Path(told.strip()))
    return next((place for place in reversed(places) if (place / "initdb").is_file()), None)


class Server:
    """A server that was started; `close` ends it and takes its files away."""

    def __init__(self, *, durable: bool = True) -> None:
        """durable: what is committed survives a power cut, which tests do without."""
        place = binaries()
        if place is None:
            raise FileNotFoundError("no PostgreSQL server is installed")
        self._bin = place
        self._user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-pg-"))
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        self._data = self.folder / "data"
        self._options = "" if durable else "-c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        self._run(
            "initdb", "-D", str(self._data), "-A", "trust", "-U", USER, "-N", "--locale=C", "-E", "UTF8"
        )
        self.start()

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' {self._options}"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", log, "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        """`immediate` ends it as a crash does: it recovers from its log when it starts again."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", how, "stop")

    def database(self, name: str) -> str:
        """Make a database; its URL, as --ledger takes it."""
        self._run("createdb", "-h", str(self.folder), "-U", USER, name)
        return self.url(name)

    def schema(self, name: str) -> str:
        """Make a schema, which is faster to come by than a database; its URL."""
        told = ["-h", str(self.folder), "-U", USER, "-d", "postgres", "-c", f'CREATE SCHEMA "{name}"']
        self._run("psql", *told)
        return self.url("postgres", options=f"-csearch_path={name}")

    def url(self, name: str, **options: str) -> str:
        place = {"host": str(self.folder), **options}
        return URL.create("postgresql+psycopg", USER, database=name, query=place).render_as_string()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            user=self._user,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a server that is started keeps a pipe open for ever
            stderr=subprocess.DEVNULL,
        )
