"""What does explaining words add to a search with them? POST /explain beside POST /search.

    python -m scripts.benchmarks words --output docs/results/words.md
    python -m scripts.benchmarks words --rounds 2 --requests 16     a minute

Needs no data: two towers of random weights, as CLIP's ViT-B/32 or small, and synthetic pictures in
a temporary folder, every one of them indexed. The server is a process of its own, the clients are
threads of this one, in a closed loop; blocks of cases strictly alternate. Both endpoints embed the
same texts and search the same index. *Cold* is every text for the first time after the server has
begun: pictures are read and go through the network; *warm* is what is kept of them.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedcam import EmbeddingNetwork, Explainer, Preprocess, build_index, find_images

from .cases import write_pictures
from .load import Call, Caller, until_ready
from .service import answered
from .timing import AGAIN, table, verdict, written

TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue", "small", "old") for thing in (
    "car", "house", "dog", "tree")]  # fmt: skip
BAR = 1.10


class Towers(nn.Module):
    """Two towers of CLIP's shape: a vision transformer with a class token, and one for words."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, words: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.pictures = VisionTransformer(
            224, patch, num_classes=512, embed_dim=width, depth=depth, num_heads=heads
        )
        self.letters = nn.Embedding(256, words)
        layer = nn.TransformerEncoderLayer(words, words // 64, 4 * words, 0.0, batch_first=True)
        self.words = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.last = nn.Linear(words, 512, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings `[B 512]`."""
        embedded: Tensor = self.pictures(images)
        return embedded

    def texts(self, texts: list[str]) -> Tensor:
        """Return embeddings `[n 512]` of texts, 77 tokens each as CLIP takes them."""
        rows = [[*text.encode()[:77], *[0] * 77][:77] for text in texts]
        embedded: Tensor = self.last(self.words(self.letters(torch.tensor(rows)))[:, -1])
        return embedded


def towers(kind: str) -> EmbeddingNetwork:
    """Return two towers of random weights, as ViT-B/32 or small."""
    torch.manual_seed(0)
    shape = {"ViT-B-32": (768, 12, 12, 32, 512), "small": (128, 2, 2, 32, 128)}[kind]
    module = Towers(*shape).eval()
    preprocess = Preprocess.imagenet(224)
    layer = f"pictures.blocks.{shape[1] - 1}.norm1"
    return EmbeddingNetwork(
        module, layer, preprocess=preprocess, prefix_tokens=1, texts=module.texts
    )


def serve(kind: str, pictures: int, folder: Path, threads: int | None, told: Connection) -> None:
    """The server's process: an index of that network, built here."""
    from embedcam.service import create_app, server

    if threads:
        torch.set_num_threads(threads)
    network = towers(kind)
    write_pictures(folder / "photos", pictures)
    source = find_images(folder / "photos")
    build_index(
        source, network, folder / "index", prompts=TEXTS, own_maps=False, trust=False,
        progress=False,
    )  # fmt: skip
    app = create_app(Explainer(folder / "index", network))
    bound = server.bind("127.0.0.1", 0)
    about = f"{pictures} images, torch {torch.__version__} on {torch.get_num_threads()} threads"
    told.send((bound.getsockname()[1], about))
    server.serve(app, bound, seconds=app.state.pipeline.limits.seconds)


def post(path: str, place: int = 0) -> Call:
    """Return a question in words."""
    body = json.dumps({"text": TEXTS[place % len(TEXTS)]}).encode()
    return Call("POST", path, body, {"Content-Type": "application/json"})


def measured(port: int, options: argparse.Namespace) -> str:
    """Return the table: cold once, then warm in alternating blocks."""
    search = "embed and search"
    cases = {search: "/search", AGAIN.format(search): "/search", "explain": "/explain"}
    with closing(Caller(port)) as caller:
        for place in range(len(TEXTS)):
            caller(post("/search", place))
        cold = []
        for place in range(len(TEXTS)):
            status, body, seconds = caller(post("/explain", place))
            if status != 200:
                raise RuntimeError(f"/explain answered {status}: {body[:300]!r}")
            cold.append(seconds)
    took: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(1 + options.rounds):
        for name, path in cases.items():
            seconds_each = answered(port, 1, (post(path, n) for n in range(options.requests)))
            if number:
                took[name] += seconds_each
    took = {**took, "explain, cold": cold}
    base, rows = np.median(took[search]), []
    for name, each in took.items():
        value = float(np.median(each))
        bar = verdict(value / base, BAR) if name == "explain" else ""
        rows.append([name, len(each), f"{1e3 * value:.1f}", f"{value / base:.3f}", bar])
    return table(["case", "requests", "p50, ms", f"/ {search}", "bar"], rows)


def main() -> None:
    options = arguments()
    context, parts = multiprocessing.get_context("spawn"), []
    for kind in options.networks:
        with tempfile.TemporaryDirectory(prefix="embedcam-words-") as name:
            ours, theirs = context.Pipe()
            given = (kind, options.pictures, Path(name), options.threads, theirs)
            server = context.Process(target=serve, args=given, daemon=True)
            server.start()
            theirs.close()
            try:
                port, about = ours.recv()
                until_ready(port)
                parts.append(f"## {kind}\n\n{about}.\n\n{measured(port, options)}")
                print(parts[-1], flush=True)
            finally:
                server.terminate()
                server.join(60)
    head = (
        "# What explaining words adds to a service\n\n`python -m scripts.benchmarks words`: two "
        f"towers of random weights; {options.rounds} rounds of {options.requests} requests a case, "
        f"one at a time, {platform.machine()}, Python {platform.python_version()}. *Cold* is each "
        "text for the first time: its five pictures are read and go through the network.\n\n"
    )
    written(head + "\n".join(parts), options.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["ViT-B-32", "small"])
    parser.add_argument("--pictures", type=int, default=200, help="indexed (200)")
    parser.add_argument("--rounds", type=int, default=10, help="of alternating blocks (10)")
    parser.add_argument("--requests", type=int, default=32, help="of a block (32)")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    return parser.parse_args()
