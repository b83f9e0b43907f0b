"""The Dockerfile of the service: linted where hadolint is, and read for what it promises."""

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from embedcam.cli.parser import parser

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "Dockerfile"
LINES = FILE.read_text(encoding="utf-8").replace("\\\n", "")
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


def words(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.*)$", LINES, re.MULTILINE)


def command(instruction: str) -> list[str]:
    """Return a command that no shell reads, so that signals reach it."""
    (line,) = words(instruction)
    found = json.loads(line.partition("CMD ")[2] if instruction == "HEALTHCHECK" else line)
    return [str(word) for word in found]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--failure-threshold", "style", FILE], capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"")


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    sent = {line[1:] for line in Path(f"{FILE}.dockerignore").read_text().split() if line[0] == "!"}
    copied = {name for line in words("COPY") if "--from" not in line for name in line.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    assert Path(f"{FILE}.dockerignore").read_text().startswith("*\n")


def test_its_packages_are_the_extras_and_no_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (chosen,) = [line.split('"')[1].split() for line in words("ARG") if line.startswith("EXTRAS")]
    needed = [line for name in chosen for line in extras[name]]
    needed += (ROOT / "requirements-online.txt").read_text().splitlines()
    assert not [line for line in needed if line.startswith("torch")]
    assert any(line.startswith("lancedb") for line in needed)  # of its usual store
    assert words("RUN")[-1].endswith("--no-deps .")


def test_it_serves_and_is_nobody() -> None:
    name, *rest = [*command("ENTRYPOINT"), *command("CMD")]
    options = parser().parse_args(rest)
    assert (name, options.port, options.host) == ("embedcam", 8000, "0.0.0.0")
    assert words("EXPOSE") == ["8000"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", words("USER")[-1])


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_whether_it_is_ready(status: int, code: int) -> None:
    asked = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        python, flag, asks = command("HEALTHCHECK")
        asks = asks.replace(":8000", f":{server.server_port}")
        done = subprocess.run([sys.executable, flag, asks], capture_output=True)
        server.shutdown()
    assert (python, asked, done.returncode) == ("python", ["/readyz"], code)
