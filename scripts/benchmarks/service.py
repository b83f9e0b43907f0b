"""What does explaining add to a search service? POST /explain beside POST /search on loopback.

    python -m scripts.benchmarks service --output docs/results/service.md
    python -m scripts.benchmarks service --rounds 2 --requests 20       a minute

Needs no data: random weights and synthetic pictures in a temporary folder. The server is a process
of its own, the clients are threads of this one, in a closed loop: the next request leaves as soon
as one is answered. Both endpoints are of one application and share every step (upload, decoding,
batching, the network, the search); /search leaves the explanation out. Blocks of requests strictly
alternate. The null endpoint takes the same upload and answers with as many bytes as /explain does,
at once: what it takes is the client's, HTTP's and the loopback's share. The A/A row is /search a
second time: how far it lies from 1 is how far any other ratio can be believed.
"""

import argparse
import io
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from .cases import write_pictures
from .load import Call, Caller, closed_loop
from .timing import table, verdict, written

BARS = {"p50": 1.10, "p99": 1.15}
CASES = {
    "search": "/search",
    "search again (A/A)": "/search",
    "explain": "/explain",
    "null": "/null",
}
QUERIES = 16


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="embedcam-service-") as name:
        folder = Path(name)
        bodies = pictures(folder)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(
            target=serve, args=(options.network, options.threads, folder, theirs), daemon=True
        )
        server.start()
        theirs.close()  # so that a server that fails is noticed
        try:
            port, about = ours.recv()
            text = preface(options, about)
            print(text, flush=True)
            for concurrency in options.concurrency:
                part = section(port, concurrency, options, bodies)
                print(part, flush=True)
                text += part
        finally:
            server.terminate()
            server.join(60)
    written(text, options.output)


def serve(name: str, threads: int | None, folder: Path, told: Connection) -> None:
    """The server's process: an index of that network with random rows, and the null endpoint."""
    import torch
    from fastapi import Request
    from starlette.responses import Response

    from embedcam import Explainer
    from embedcam.service import create_app, server
    from embedcam.service.pictures import read_upload

    from .cases import linear_network
    from .explaining import NEIGHBORS, ROWS, make_index

    if threads:
        torch.set_num_threads(threads)
    network = linear_network(name, folder)
    index = make_index(network, folder / "index", ROWS)
    explainer = Explainer(index, network, n_neighbors=NEIGHBORS)
    app = create_app(explainer)
    pipeline = app.state.pipeline

    @app.post("/null")
    async def null(request: Request, size: int) -> Response:
        await read_upload(request, pipeline.limits)
        return Response(b" " * size, media_type="application/json")

    bound = server.bind("127.0.0.1", 0)
    told.send(
        (
            bound.getsockname()[1],
            f"{ROWS:,} images, {NEIGHBORS} neighbours, torch {torch.__version__} on "
            f"{torch.get_num_threads()} threads",
        )
    )
    server.serve(app, bound, seconds=pipeline.limits.seconds)


def section(port: int, concurrency: int, options: argparse.Namespace, bodies: list[bytes]) -> str:
    sizes = _answer_sizes(port, bodies)
    took: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(1 + options.rounds):
        for name, path in CASES.items():
            target = f"{path}?size={sizes}" if path == "/null" else path
            seconds = closed_loop(
                port,
                concurrency,
                max(options.requests, concurrency),
                partial(_next, target, bodies),
            )
            if number:  # the first round is warming up
                took[name] += seconds
    return report(concurrency, {name: 1e3 * np.array(each) for name, each in took.items()})


def report(concurrency: int, took: Mapping[str, np.ndarray]) -> str:
    """Milliseconds of each case, and ratios to /search, as Markdown."""
    base, null = took["search"], took["null"]
    rows = []
    for name, each in took.items():
        row = [name, len(each)]
        for share, bar in ((50, "p50"), (99, "p99")):
            value, search = np.percentile(each, share), np.percentile(base, share)
            # What the client takes is no part of the service: without it the ratio is larger.
            client = np.percentile(null, 50)
            inner = (value - client) / (search - client) if name != "null" else np.nan
            row += [f"{value:.1f}", f"{value / search:.3f}", f"{inner:.3f}"]
            row.append(verdict(inner, BARS[bar]) if name == "explain" else "")
        rows.append(row)
    head = ["case", "requests"]
    for name in ("p50", "p99"):
        head += [f"{name}, ms", "/ search", "without the client", "bar"]
    return f"\n## {concurrency} at a time\n\n" + table(head, rows)


def preface(options: argparse.Namespace, about: str) -> str:
    return (
        "# What explaining adds to a service\n\n"
        f"`python -m scripts.benchmarks service`: {options.network} with random weights and a "
        f"linear head of 128, JPEG uploads of 640 x 480; {about}; {options.rounds} rounds of "
        f"{options.requests} requests a case, {platform.machine()}, Python "
        f"{platform.python_version()}.\n\n"
        "Blocks of a case alternate against one server. `/ search` is the ratio of the same "
        "percentile; *without the client* takes the null endpoint's median from both first. The "
        "A/A row is /search measured twice and shows the noise.\n"
    )


def pictures(folder: Path) -> list[bytes]:
    bodies = []
    for path in sorted(write_pictures(folder / "queries", QUERIES).rglob("*.jpg")):
        held = io.BytesIO()
        Image.open(path).resize((640, 480)).save(held, "JPEG", quality=90)
        bodies.append(held.getvalue())
    return bodies


def _answer_sizes(port: int, bodies: list[bytes]) -> int:
    until = time.monotonic() + 120
    while True:
        try:
            status, body, _ = Caller(port)(_post("/explain", bodies[0]))
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            continue
        if status != 200:
            raise RuntimeError(f"/explain answered {status}: {body[:300]!r}")
        return len(body)


def _next(path: str, bodies: list[bytes], place: int) -> Call:
    return _post(path, bodies[place % len(bodies)])


def _post(path: str, body: bytes) -> Call:
    return Call("POST", path, body, {"Content-Type": "image/jpeg"})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50", metavar="NAME", help="torchvision model")
    parser.add_argument("--rounds", type=int, default=20, help="of alternating blocks (20)")
    parser.add_argument("--requests", type=int, default=32, help="of a block (32)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    return parser.parse_args()
