"""A service under good and hostile load for minutes: no good request fails, no memory is kept.

    python -m scripts.benchmarks soak --minutes 10 --output docs/results/soak.md

Needs no data: MobileNetV2 with random weights and synthetic pictures in a temporary folder, served
by `embedcam serve` in a process of its own. Clients in a closed loop send a seeded mix of good
requests and of hostile ones, each with the status it is to be answered with; one more client
uploads a byte at a time. The resident memory of the server is read all the while. The exit code is
1 where a request was answered otherwise than it should be, or where memory at the end lies more
than 5% above what it was after warming up.
"""

import argparse
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from . import load as hostile
from .cases import write_pictures
from .load import Call, Caller
from .timing import table, written

TIMEOUT, MAX_BODY = 10, 3_000_000
GROWTH = 1.05
JPEG = {"Content-Type": "image/jpeg"}


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="embedcam-soak-") as name:
        folder = Path(name)
        build(folder)
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "embedcam", "serve", "soak.index", "--port", "0", "--json",
                 "--quiet", "--timeout", str(TIMEOUT), "--max-body", str(MAX_BODY)],
                cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        try:
            assert server.stdout is not None
            told = server.stdout.readline()
            if not told:
                raise RuntimeError(f"the server ended: {(folder / 'log').read_text()}")
            port = int(json.loads(told)["address"].rpartition(":")[2])
            until_ready(port)
            run = Soak(port, options)
            memory = run.go(server.pid, 60 * options.minutes)
        finally:
            server.send_signal(signal.SIGTERM)
            ended = server.wait(60)
        said = (folder / "log").read_text(errors="replace")
    text, failed = report(options, run, memory, ended, said)
    print(text)
    written(text, options.output)
    return int(failed)


class Soak:
    """The load."""

    def __init__(self, port: int, options: argparse.Namespace) -> None:
        self.port, self.options = port, options
        self.good, self.bad = good_calls(), hostile_calls()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self._lock, self._over = threading.Lock(), threading.Event()

    def go(self, process: int, seconds: float) -> list[tuple[float, int]]:
        """Run it; (seconds since the beginning, bytes resident) of the server, twice a second."""
        clients = [
            threading.Thread(target=self._client, args=(seed,))
            for seed in range(self.options.concurrency)
        ]
        clients.append(threading.Thread(target=self._drip))
        for one in clients:
            one.start()
        start, memory = time.monotonic(), list[tuple[float, int]]()
        while (gone := time.monotonic() - start) < seconds:
            memory.append((gone, resident(process)))
            time.sleep(0.5)
        self._over.set()
        for one in clients:
            one.join()
        return memory

    def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        with closing(Caller(self.port)) as caller:
            while not self._over.is_set():
                is_good = chance.random() < self.options.good
                call = chance.choice(self.good if is_good else self.bad)
                try:
                    status, body, took = caller(call)
                except OSError as error:
                    self._count(call.name, 0, f"{call.name}: {error!r}")
                    continue
                wrong = status not in call.expected
                self._count(call.name, status, f"{call.name}: {status} {body[:200]!r}" if wrong
                            else None)  # fmt: skip
                if is_good:
                    with self._lock:
                        self.seconds.append(took)

    def _drip(self) -> None:
        head = b"POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        while not self._over.is_set():
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
                client.sendall(head + b"Content-Length: 100000\r\n\r\n")
                client.settimeout(0.5)
                answer = b""
                while not answer and not self._over.is_set():
                    try:
                        client.sendall(b"x")
                        answer = client.recv(1000)
                    except TimeoutError:
                        continue
            if answer:
                status = int(answer.split()[1])
                wrong = None if status == 408 else f"a slow upload: {answer[:100]!r}"
                self._count("a slow upload", status, wrong)

    def _count(self, name: str, status: int, wrong: str | None) -> None:
        with self._lock:
            self.answers[name, status] += 1
            if wrong:
                self.wrong.append(wrong)


def good_calls() -> list[Call]:
    rng = np.random.default_rng(0)
    bodies = []
    for side in (224, 640, 1200, 4000):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        held = io.BytesIO()
        coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(held, "JPEG")
        bodies.append(held.getvalue())
    item = "/items/class-0/000000.jpg"
    calls = [Call("POST", "/explain", body, JPEG, name="explain") for body in bodies]
    calls += [
        Call("POST", "/explain?n_neighbors=20", bodies[0], JPEG, name="explain"),
        Call("POST", "/explain", bodies[1], {**JPEG, "Accept": "image/png"}, name="overlay"),
        Call("POST", "/explain", bodies[1], {**JPEG, "Accept": "image/webp"}, name="overlay"),
        Call("POST", "/search", bodies[1], JPEG, name="search"),
        Call("POST", "/compare?result=class-0/000000.jpg", bodies[0], JPEG, name="compare"),
        Call("GET", f"{item}/image", name="image"),
        Call("GET", f"{item}/image?size=64", headers={"Accept": "image/webp"}, name="image"),
        Call("GET", f"{item}/cam", name="cam"),
        Call("GET", f"{item}/cam", headers={"Accept": "image/png"}, name="cam"),
        Call("GET", "/healthz", name="healthz"),
        Call("GET", "/readyz", name="readyz"),
        Call("GET", "/metrics", name="metrics"),
    ]  # fmt: skip
    return calls


def hostile_calls() -> list[Call]:
    """Requests that are to be refused, with the status each is refused with."""
    whole = hostile.data_of(Image.new("RGB", (300, 200), 9), "JPEG")
    png = {"Content-Type": "image/png"}
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    bodies: Mapping[str, tuple[bytes, int]] = {
        "claims 100,000 x 100,000": (hostile.claimed(), 413),
        "a bomb": (hostile.bomb(), 413),
        "many scans": (hostile.scans(200), 422),
        "a JPEG that is a ZIP": (hostile.archive(), 422),
        "a truncated JPEG": (whole[: len(whole) // 2], 422),
        "SVG": (hostile.SVG, 422),
        "a long strip": (hostile.png(200_000, 1, b""), 422),
        "zeros": (bytes(1_000_000), 422),
        "a body over the limit": (bytes(MAX_BODY + 1), 413),
    }
    calls = [
        Call("POST", "/explain", body, png, (status,), name)
        for name, (body, status) in bodies.items()
    ]
    near = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + b"\r\n--" * 200_000
    calls += [
        Call("POST", "/explain", near + b"\r\n--b--\r\n", form, (422,), "near boundaries"),
        Call("POST", "/explain", b"--b\r\n", form, (422,), "a broken form"),
        Call("POST", "/explain", b"{}", {"Content-Type": "application/json"}, (415,), "JSON"),
        Call("POST", "/explain?n_neighbors=1000000", whole, JPEG, (422,), "a million neighbours"),
        Call("POST", "/explain?n_neighbors=nan", whole, JPEG, (422,), "NaN"),
        Call("POST", "/explain?result=../../etc/passwd", whole, JPEG, (404,), "an unknown result"),
        Call("POST", "/compare?result=x", whole, JPEG, (404,), "an unknown result"),
        Call(
            "POST",
            "/compare?result=class-0/000000.jpg&cell=nan,0",
            whole,
            JPEG,
            (422,),
            "a row of NaN",
        ),
        Call("GET", "/items/../../etc/passwd/image", expected=(404,), name="a traversal"),
        Call("GET", "/items/%2e%2e%2fetc%2fpasswd/image", expected=(404,), name="a traversal"),
        Call("GET", "/items/%00/image", expected=(404,), name="NUL"),
        Call(
            "GET", "/items/class-0/000000.jpg/image?size=99999999", expected=(422,), name="a size"
        ),
        Call("GET", "/" + "a" * 5000, expected=(404,), name="a long address"),
        Call("DELETE", "/explain", expected=(405,), name="a method"),
    ]
    return calls


def build(folder: Path) -> None:
    from embedcam import build_index, find_images, load_network

    write_pictures(folder / "photos", 200)
    network = load_network("torchvision:mobilenet_v2", weights="random")
    build_index(find_images(folder / "photos"), network, folder / "soak.index", progress=False)


def until_ready(port: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            with closing(Caller(port)) as caller:
                if caller(Call("GET", "/readyz"))[0] == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server is not ready after two minutes")


def resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(memory: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Median megabytes after warming up and at the end, and the ratio."""
    whole = memory[-1][0]
    after = [held for gone, held in memory if 0.25 * whole <= gone < 0.5 * whole]
    end = [held for gone, held in memory if gone >= 0.75 * whole]
    first, last = float(np.median(after)), float(np.median(end))
    return first / 1e6, last / 1e6, last / first


def report(
    options: argparse.Namespace,
    run: Soak,
    memory: Sequence[tuple[float, int]],
    ended: int,
    said: str,
) -> tuple[str, bool]:
    """Markdown, and whether something was not as it should be."""
    first, last, ratio = growth(memory)
    failed = bool(run.wrong) or ratio > GROWTH or ended != 0 or "Traceback" in said
    good = {call.name for call in run.good}
    rows = [
        [name, "good" if name in good else "hostile", status, count]
        for (name, status), count in sorted(run.answers.items())
    ]
    p50, p99 = (1e3 * np.percentile(run.seconds, share) for share in (50, 99))
    highest = max(held for _, held in memory) / 1e6
    lines = [
        "# A service under load\n",
        f"`python -m scripts.benchmarks soak`: {options.minutes:g} minutes, "
        f"{options.concurrency} clients and one that drips, {options.good:.0%} good requests, "
        "MobileNetV2 with random weights; "
        f"{sum(run.answers.values()):,} requests.\n",
        f"- answered otherwise than they should be: {len(run.wrong)}",
        *(f"  - {line}" for line in run.wrong[:10]),
        f"- good requests: p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        f"- resident memory: {first:.0f} MB after warming up, {last:.0f} MB at the end, ratio "
        f"{ratio:.3f} (bar {GROWTH}: {'met' if ratio <= GROWTH else '**not met**'}), highest "
        f"{highest:.0f} MB",
        f"- ended with {ended} on SIGTERM; log: {len(said.splitlines())} lines, "
        f"{said.count('Traceback')} tracebacks\n",
        table(["request", "kind", "status", "times"], rows),
    ]
    return "\n".join(lines), failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="(10)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients (8)")
    parser.add_argument("--good", type=float, default=0.6, help="share of good requests (0.6)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    return parser.parse_args()
