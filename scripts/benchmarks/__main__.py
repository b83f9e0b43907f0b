"""What does it cost? Every bar of the package as a ratio within one run, with its noise beside it.

    python -m scripts.benchmarks --network resnet50 mobilenet_v2 --output docs/results/benchmark.md
    python -m scripts.benchmarks explain peers --quick
    python -m scripts.benchmarks service --output docs/results/service.md
    python -m scripts.benchmarks words --output docs/results/words.md
    python -m scripts.benchmarks soak --minutes 10 --output docs/results/soak.md
    python -m scripts.benchmarks forward --old CHECKOUT --output docs/results/forward.md

Needs no data: random weights and synthetic pictures in a temporary folder. Cases of one table run
in one process and strictly alternate, A B A B; each ratio is the median over rounds of (this case /
the first case of the same round), with the smallest and largest beside it; garbage collection is
off while a case is timed. The A/A row is the first case run a second time in each round: how
far it lies from 1 is how far any other ratio can be believed. `service`, `words`, `soak` and
`forward` have options of their own.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import (
    attention,
    building,
    evaluating,
    exactness,
    explaining,
    features,
    forward,
    indexes,
    large,
    onnx,
    receipts,
    scale,
    searching,
    service,
    soak,
    stores,
    trusting,
    words,
    zoo,
)
from .timing import written

Section = Callable[[argparse.Namespace, Path], Iterator[str]]


def _each(report: Callable[..., str], rounds: int) -> Section:
    return lambda o, folder: (report(name, rounds * o.rounds, folder) for name in o.network)


def _one(report: Callable[[argparse.Namespace, Path], str]) -> Section:
    return lambda o, folder: iter([report(o, folder)])


def _evaluate(o: argparse.Namespace, folder: Path) -> Iterator[str]:
    yield evaluating.share_report(o.network, o.images, o.rounds, folder)
    counts = (64, 256) if o.quick else (500, 10_000)
    yield evaluating.memory_report("mobilenet_v2", *counts, folder)
    yield evaluating.peers_report("mobilenet_v2", o.rounds)


SECTIONS: dict[str, Section] = {
    "exactness": _one(lambda o, _: exactness.report(1 if o.quick else 4, triplets=50)),
    "build": lambda o, folder: (
        building.report(name, o.images, o.rounds, o.batch_size, folder, o.heads)
        for name in o.network
    ),
    "explain": _each(explaining.explain_report, 20),
    "peers": _each(explaining.peers_report, 20),
    "storage": _one(lambda _, folder: indexes.storage_report(4096, folder)),
    "open": _one(
        lambda o, folder: indexes.open_report((5 if o.quick else 10) * o.rows, o.rounds, folder)
    ),
    "search": _one(lambda o, folder: indexes.search_report(o.rows, 100 * o.rounds, folder)),
    "auto": lambda o, folder: (
        searching.report(rows, folder) for rows in ((o.rows,) if o.quick else (100_000, 1_000_000))
    ),
    "first": _one(
        lambda o, folder: searching.first_report((1 if o.quick else 10) * o.rows, o.rounds, folder)
    ),
    "zoo": _one(lambda o, _: zoo.peers_report(o.network[0], "resnet18", 4 * o.rounds)),
    "memory": lambda o, _: map(zoo.memory_report, ("resnet18", "mobilenet_v2")),
    "eigencam": _one(lambda o, _: zoo.decomposition_report(20 * o.rounds)),
    "online": _one(lambda o, folder: zoo.online_report(o.network[0], 4 * o.rounds, folder)),
    "evaluate": _evaluate,
    "trust": lambda o, folder: (
        trusting.report(name, o.images, o.rounds, folder) for name in o.network
    ),
    "attention": _one(
        lambda o, folder: attention.report("torchvision:vit_b_16", 4 * o.rounds, folder)
    ),
    "receipts": _each(receipts.report, 20),
    "features": _one(lambda o, folder: features.report(o.rows, 100 * o.rounds, folder)),
    "onnx": _each(onnx.onnx_report, 4),
    "lancedb": _one(lambda o, folder: stores.lancedb_report(o.rows, o.rounds, folder)),
    "pgvector": _one(lambda o, folder: stores.pgvector_report(o.rows, o.rounds, folder)),
    "scale": lambda o, folder: (
        scale.report(n * o.rows // 1000, folder, labels, width)
        for n, labels, width in ((10_000, 1000, 128), (2_000, 0, 64))
    ),
    "large": _one(lambda o, folder: large.report(o.large, folder)),
}
OTHERS = {
    "service": service.main, "words": words.main, "soak": soak.main, "forward": forward.main,
}  # fmt: skip


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = [preface(options)]
    print(report[0], flush=True)
    with tempfile.TemporaryDirectory(prefix="embedcam-benchmark-", dir=options.folder) as folder:
        for name, section in SECTIONS.items():
            for text in section(options, Path(folder)) if name in options.sections else ():
                print(text, flush=True)
                report.append(text)
    written("\n".join(report), options.output)


def preface(options: argparse.Namespace) -> str:
    return (
        "# What it costs\n\n"
        f"`python -m scripts.benchmarks {' '.join(options.sections)}`: random weights, synthetic "
        f"pictures, 224 px, {options.rounds} rounds; torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads, {platform.machine()}, Python "
        f"{platform.python_version()}.\n\n"
        "Cases of a table alternate within one process. A ratio is the median over rounds of "
        "(case / first case in the same round), in brackets the smallest and the largest; the "
        "A/A row is the first case run twice a round and shows the noise.\n"
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--network", nargs="+", default=["resnet50", "mobilenet_v2"],
                        metavar="NAME", help="torchvision models")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N", help="images of a build (512)")
    parser.add_argument("--rounds", type=int, help="rounds of each table (5)")
    parser.add_argument("--heads", nargs="+", choices=building.HEADS, default=building.HEADS,
                        help="of the networks built with (all)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--large", type=int, default=10_000_000, metavar="N",
                        help="images of the section `large` (10,000,000)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--quick", action="store_true", help="64 images, 2 rounds, smaller indexes")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    options = parser.parse_args(given)
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    if options.images is not None and options.images < 32:
        parser.error(f"--images {options.images} is too few to time a build; give at least 32")
    options.sections = options.sections or list(SECTIONS)
    options.images = options.images or (64 if options.quick else 512)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.rows = 20_000 if options.quick else 100_000
    return options


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in OTHERS:
        sys.exit(OTHERS[sys.argv.pop(1)]())
    sys.exit(main())
