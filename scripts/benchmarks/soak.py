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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import load as hostile
from .cases import write_pictures
from .load import Call, closed_loop, until_ready
from .timing import table, verdict, written

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
            run = Soak(server.pid, options.good, 60 * options.minutes)
            run.go(port, options.concurrency)
        finally:
            server.send_signal(signal.SIGTERM)
            ended = server.wait(60)
        said = (folder / "log").read_text(errors="replace")
    text, failed = report(options, run, ended, said)
    print(text)
    written(text, options.output)
    return int(failed)


class Soak:
    """The load, what was answered, and the server's memory twice a second."""

    def __init__(self, process: int, share: float, seconds: float) -> None:
        self.process, self.share, self.until = process, share, time.monotonic() + seconds
        self.good, self.bad = good_calls(), hostile_calls()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.memory: list[tuple[float, int]] = []
        self.over = threading.Event()

    def go(self, port: int, concurrency: int) -> None:
        """Run it: clients in a closed loop, and one that drips."""
        dripping = threading.Thread(target=self.drip, args=(port,))
        dripping.start()
        try:
            closed_loop(port, concurrency, self.calls(), self.told)
        finally:
            self.over.set()
            dripping.join()

    def calls(self) -> Iterator[Call]:
        """A seeded mix until the time is over; reads the memory in passing."""
        chance, start = random.Random(0), time.monotonic()
        while (now := time.monotonic()) < self.until:
            if now - start >= 0.5 * len(self.memory):
                self.memory.append((now - start, resident(self.process)))
            yield chance.choice(self.good if chance.random() < self.share else self.bad)

    def told(self, call: Call, status: int, body: bytes, took: float) -> None:
        """Count an answer."""
        self.answers[call.name, status] += 1
        if status != call.expected:
            self.wrong.append(f"{call.name}: {status} {body[:200]!r}")
        if call in self.good:
            self.seconds.append(took)

    def drip(self, port: int) -> None:
        """Upload a byte at a time until the server has had enough, again and again."""
        head = b"POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        while not self.over.is_set():
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(head + b"Content-Length: 100000\r\n\r\n")
                client.settimeout(0.5)
                answer = b""
                while not answer and not self.over.is_set():
                    try:
                        client.sendall(b"x")
                        answer = client.recv(1000)
                    except TimeoutError:
                        continue
            if answer:
                slow = Call("POST", "/explain", expected=408, name="a slow upload")
                self.told(slow, int(answer.split()[1]), answer, 0)


def good_calls() -> list[Call]:
    rng = np.random.default_rng(0)
    bodies = []
    for side in (224, 640, 1200, 4000):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        large = coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        bodies.append(hostile.data_of(large, "JPEG"))
    item, png, webp = "/items/class-0/000000.jpg", {"Accept": "image/png"}, {"Accept": "image/webp"}
    return [
        *(Call("POST", "/explain", body, JPEG, name="explain") for body in bodies),
        Call("POST", "/explain?n_neighbors=20", bodies[0], JPEG, name="explain"),
        Call("POST", "/explain", bodies[1], JPEG | png, name="overlay"),
        Call("POST", "/explain", bodies[1], JPEG | webp, name="overlay"),
        Call("POST", "/search", bodies[1], JPEG, name="search"),
        Call("POST", "/compare?result=class-0/000000.jpg", bodies[0], JPEG, name="compare"),
        Call("GET", f"{item}/image", name="image"),
        Call("GET", f"{item}/image?size=64", headers=webp, name="image"),
        Call("GET", f"{item}/cam", name="cam"),
        Call("GET", f"{item}/cam", headers=png, name="cam"),
        *(Call("GET", f"/{name}", name=name) for name in ("healthz", "readyz", "metrics")),
    ]


def hostile_calls() -> list[Call]:
    """Requests that are to be refused, with the status each is refused with."""
    whole = hostile.data_of(Image.new("RGB", (300, 200), 9), "JPEG")
    near = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + b"\r\n--" * 200_000
    png, form = "image/png", "multipart/form-data; boundary=b"
    posts: list[tuple[str, str, bytes, str, int]] = [
        ("claims 100,000 x 100,000", "/explain", hostile.claimed(), png, 413),
        ("a bomb", "/explain", hostile.bomb(), png, 413),
        ("many scans", "/explain", hostile.scans(200), png, 422),
        ("a JPEG that is a ZIP", "/explain", hostile.archive(), png, 422),
        ("a truncated JPEG", "/explain", whole[: len(whole) // 2], png, 422),
        ("SVG", "/explain", hostile.SVG, png, 422),
        ("a long strip", "/explain", hostile.png(200_000, 1, b""), png, 422),
        ("zeros", "/explain", bytes(1_000_000), png, 422),
        ("a body over the limit", "/explain", bytes(MAX_BODY + 1), png, 413),
        ("near boundaries", "/explain", near + b"\r\n--b--\r\n", form, 422),
        ("a broken form", "/explain", b"--b\r\n", form, 422),
        ("JSON", "/explain", b"{}", "application/json", 415),
        ("a million neighbours", "/explain?n_neighbors=1000000", whole, "image/jpeg", 422),
        ("NaN", "/explain?n_neighbors=nan", whole, "image/jpeg", 422),
        ("an unknown result", "/explain?result=../../etc/passwd", whole, "image/jpeg", 404),
        ("an unknown result", "/compare?result=x", whole, "image/jpeg", 404),
        ("a row of NaN", "/compare?result=class-0/000000.jpg&cell=nan,0", whole, "image/jpeg", 422),
    ]
    gets = {
        "/items/../../etc/passwd/image": ("a traversal", 404),
        "/items/%2e%2e%2fetc%2fpasswd/image": ("a traversal", 404),
        "/items/%00/image": ("NUL", 404),
        "/items/class-0/000000.jpg/image?size=99999999": ("a size", 422),
        "/" + "a" * 5000: ("a long address", 404),
    }
    return [
        *(Call("POST", path, body, {"Content-Type": kind}, status, name)
          for name, path, body, kind, status in posts),
        *(Call("GET", path, expected=status, name=name) for path, (name, status) in gets.items()),
        Call("DELETE", "/explain", expected=405, name="a method"),
    ]  # fmt: skip


def build(folder: Path) -> None:
    from embedcam import build_index, find_images, load_network

    write_pictures(folder / "photos", 200)
    network = load_network("torchvision:mobilenet_v2", weights="random")
    build_index(find_images(folder / "photos"), network, folder / "soak.index", progress=False)


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


def report(options: argparse.Namespace, run: Soak, ended: int, said: str) -> tuple[str, bool]:
    """Markdown, and whether something was not as it should be."""
    first, last, ratio = growth(run.memory)
    failed = bool(run.wrong) or ratio > GROWTH or ended != 0 or "Traceback" in said
    good = {call.name for call in run.good}
    rows = [
        [name, "good" if name in good else "hostile", status, count]
        for (name, status), count in sorted(run.answers.items())
    ]
    p50, p99 = (1e3 * np.percentile(run.seconds, share) for share in (50, 99))
    highest = max(held for _, held in run.memory) / 1e6
    lines = [
        "# A service under load\n",
        f"`python -m scripts.benchmarks soak`: {options.minutes:g} minutes, "
        f"{options.concurrency} clients and one that drips, {options.good:.0%} good requests, "
        f"MobileNetV2 with random weights; {run.answers.total():,} requests.\n",
        f"- answered otherwise than they should be: {len(run.wrong)}",
        *(f"  - {line}" for line in run.wrong[:10]),
        f"- good requests: p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        f"- resident memory: {first:.0f} MB after warming up, {last:.0f} MB at the end, ratio "
        f"{ratio:.3f} ({verdict(ratio, GROWTH)}), highest {highest:.0f} MB",
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
