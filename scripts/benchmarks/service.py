"""What does explaining add to a search service? POST /explain beside POST /search on loopback.

    python -m scripts.benchmarks service --output docs/results/service.md
    python -m scripts.benchmarks service --rounds 2 --requests 20       a minute
    python -m scripts.benchmarks service --stored 100000 --network mobilenet_v2

Needs no data: random weights and synthetic pictures in a temporary folder. The server is a process
of its own, the clients are threads of this one, in a closed loop: the next request leaves as soon
as one is answered. Both endpoints are of one application and share every step (upload, decoding,
batching, the network, the search); /search leaves the explanation out. Blocks of requests strictly
alternate. The null endpoint takes the same upload and answers with as many bytes as /explain does,
at once: what it takes is the client's, HTTP's and the loopback's share. The A/A row is /search a
second time: how far it lies from 1 is how far any other ratio can be believed.
"""

import argparse
import multiprocessing
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .cases import ROWS, index_of, linear_network, write_pictures
from .explaining import NEIGHBORS
from .load import Call, Caller, closed_loop, data_of, until_ready
from .timing import AGAIN, table, verdict, written

if TYPE_CHECKING:
    from fastapi import FastAPI

    from embedcam import EmbeddingNetwork
    from embedcam.service.pictures import Prepared

BARS = {"p50": 1.10, "p99": 1.15}
QUERIES = 16
PLAIN = "embed and search"


def cases_of(stored: bool) -> dict[str, str]:
    """Addresses by the names of cases, of which the first is what the others are compared with."""
    plain = {PLAIN: "/plain", AGAIN.format(PLAIN): "/plain", "search": "/search"}
    whole = {"search": "/search", AGAIN.format("search"): "/search"}
    return {**(plain if stored else whole), "explain": "/explain", "null": "/null"}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="embedcam-service-") as name:
        files = sorted(write_pictures(Path(name) / "queries", QUERIES).rglob("*.jpg"))
        bodies = [data_of(Image.open(p).resize((640, 480)), "JPEG", quality=90) for p in files]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(
            target=serve,
            args=(options.network, options.threads, options.stored, Path(name), theirs),
            daemon=True,
        )
        server.start()
        theirs.close()  # so that a server that fails is noticed
        try:
            port, about = ours.recv()
            until_ready(port)
            text = preface(options, about)
            print(text, flush=True)
            for concurrency in options.concurrency:
                part = measured(port, concurrency, options, bodies)
                print(part, flush=True)
                text += part
        finally:
            server.terminate()
            server.join(60)
    written(text, options.output)


def serve(
    name: str, threads: int | None, stored: int | None, folder: Path, told: Connection
) -> None:
    """The server's process: an index of that network with random rows, and the other endpoints."""
    import torch
    from fastapi import Request
    from starlette.responses import Response

    from embedcam import Explainer
    from embedcam.service import create_app, server
    from embedcam.service.pictures import read_upload

    if threads:
        torch.set_num_threads(threads)
    network, stack = linear_network(name, folder), ExitStack()
    index = index_of(network, folder / "index", stored or ROWS)
    if stored:
        app = stack.enter_context(over_pgvector(index, network))
    else:
        app = create_app(Explainer(index, network, n_neighbors=NEIGHBORS))
    limits = app.state.pipeline.limits

    @app.post("/null")
    async def null(request: Request, size: int) -> Response:
        await read_upload(request, limits)
        return Response(b" " * size, media_type="application/json")

    bound = server.bind("127.0.0.1", 0)
    where = "rows of pgvector (HNSW)" if stored else "images"
    about = f"{stored or ROWS:,} {where}, {NEIGHBORS} neighbours, torch {torch.__version__} on "
    with stack:
        told.send((bound.getsockname()[1], f"{about}{torch.get_num_threads()} threads"))
        server.serve(app, bound, seconds=limits.seconds)


@contextmanager
def over_pgvector(path: Path, network: "EmbeddingNetwork") -> "Iterator[FastAPI]":
    """A service of an index's model and its rows, with what a team has already at /plain."""
    import psycopg
    from fastapi import Request
    from starlette.responses import JSONResponse, Response

    from embedcam import Explainer, Index
    from embedcam.index.model import write_model
    from embedcam.service import create_app
    from embedcam.stores import Table, copy_rows, open_store
    from embedcam.stores.postgres import PostgresStore, packed

    from .stores import postgres

    with ExitStack() as stack:
        url = stack.enter_context(postgres())
        with Index.open(path, with_faiss=False) as index:
            with closing(open_store(url, Table.of(index, "full"))) as written:
                copy_rows(index, written)
            model, table = write_model(index, path.with_suffix(".embedcam")), Table.of(index)
        with psycopg.connect(url, autocommit=True) as own:
            own.execute("CREATE INDEX ON embedcam_rows USING hnsw (embedding vector_l2_ops)")
            own.execute("VACUUM ANALYZE")
        store = stack.enter_context(closing(PostgresStore(url, table, 2.0)))
        explainer = Explainer.from_model(model, network, store=store, n_neighbors=NEIGHBORS)
        app = create_app(explainer)
        pipeline = app.state.pipeline
        near = (
            "SELECT id, embedding <-> %(query)s AS far FROM embedcam_rows "
            f"WHERE generation = '{table.generation}' ORDER BY far LIMIT {NEIGHBORS}"
        ).encode()

        def embedded(_: None, pictures: "Sequence[Prepared]") -> list[np.ndarray]:
            return [*network.embed(np.stack([one.inputs for one in pictures])).embedding]

        def searched(embedding: np.ndarray) -> list[tuple[object, ...]]:
            return store._link.rows(near, {"query": packed(embedding[None], "vector")[0]})

        @app.post("/plain")
        async def plain(request: Request) -> Response:
            async with pipeline.admitted(request) as upload:
                _, embedding = await pipeline.ask(embedded, None, pipeline.reading(upload))
                return JSONResponse(await pipeline.in_thread(searched, embedding))

        yield app


def measured(port: int, concurrency: int, options: argparse.Namespace, bodies: list[bytes]) -> str:
    def post(path: str, place: int = 0) -> Call:
        return Call("POST", path, bodies[place % QUERIES], {"Content-Type": "image/jpeg"})

    with closing(Caller(port)) as caller:
        status, body, _ = caller(post("/explain"))
    if status != 200:
        raise RuntimeError(f"/explain answered {status}: {body[:300]!r}")
    cases = cases_of(options.stored is not None)
    took: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(1 + options.rounds):
        for name, path in cases.items():
            target = f"{path}?size={len(body)}" if path == "/null" else path
            calls = (post(target, n) for n in range(max(options.requests, concurrency)))
            seconds = answered(port, concurrency, calls)
            if number:  # the first round is warming up
                took[name] += seconds
    return report(concurrency, {name: 1e3 * np.array(each) for name, each in took.items()})


def answered(port: int, concurrency: int, calls: Iterator[Call]) -> list[float]:
    """Seconds of each call of a closed loop, all answered as they should be."""
    seconds: list[float] = []

    def told(call: Call, status: int, body: bytes, took: float) -> None:
        if status != call.expected:
            raise RuntimeError(f"{call.method} {call.path}: {status} {body[:200]!r}")
        seconds.append(took)

    closed_loop(port, concurrency, calls, told)
    return seconds


def report(concurrency: int, took: Mapping[str, np.ndarray]) -> str:
    """Milliseconds of each case, and ratios to the first, as Markdown."""
    first = next(iter(took))
    base, null = took[first], took["null"]
    rows = []
    for name, each in took.items():
        row = [name, len(each)]
        for share, bar in ((50, "p50"), (99, "p99")):
            value, search = np.percentile(each, share), np.percentile(base, share)
            # What the client takes is no part of the service: without it the ratio is larger.
            client = np.percentile(null, 50)
            inner = (value - client) / (search - client) if name != "null" else np.nan
            row += [f"{value:.1f}", f"{value / search:.3f}", f"{inner:.3f}"]
            barred = name == "explain" or (first == PLAIN and name == "search")
            row.append(verdict(inner, BARS[bar]) if barred else "")
        rows.append(row)
    head = ["case", "requests"]
    for name in ("p50", "p99"):
        head += [f"{name}, ms", f"/ {first}", "without the client", "bar"]
    return f"\n## {concurrency} at a time\n\n" + table(head, rows)


def preface(options: argparse.Namespace, about: str) -> str:
    first = next(iter(cases_of(options.stored is not None)))
    return (
        "# What explaining adds to a service\n\n"
        f"`python -m scripts.benchmarks service`: {options.network} with random weights and a "
        f"linear head of 128, JPEG uploads of 640 x 480; {about}; {options.rounds} rounds of "
        f"{options.requests} requests a case, {platform.machine()}, Python "
        f"{platform.python_version()}.\n\n"
        f"Blocks of a case alternate against one server. `/ {first}` is the ratio of the same "
        "percentile; *without the client* takes the null endpoint's median from both first. The "
        "A/A row is the first case measured twice and shows the noise.\n"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50", metavar="NAME", help="torchvision model")
    parser.add_argument("--rounds", type=int, default=20, help="of alternating blocks (20)")
    parser.add_argument("--requests", type=int, default=32, help="of a block (32)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="(1 8)")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    text = "serve so many rows of pgvector, and no index"
    parser.add_argument("--stored", type=int, metavar="ROWS", help=text)
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    return parser.parse_args()
