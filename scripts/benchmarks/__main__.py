"""What does it cost? Every bar of the package as a ratio within one run, with its noise beside it.

    python scripts/benchmark.py --network resnet50 mobilenet_v2 --output docs/results/benchmark.md
    python scripts/benchmark.py explain peers --quick

Needs no data: random weights and synthetic pictures in a temporary folder. Cases of one table run
in one process and strictly alternate, A B A B; each ratio is the median over rounds of (this case /
the first case of the same round), with the smallest and largest beside it; garbage collection is
off while a case is timed. The control row is the first case run a second time in each round: how
far it lies from 1 is how far any other ratio can be believed.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

import torch
from benchmark import (
    building,
    evaluating,
    exactness,
    explaining,
    features,
    indexes,
    onnx,
    receipts,
    trusting,
    zoo,
)

SECTIONS = ("exactness", "build", "explain", "peers", "storage", "open", "search", "zoo", "memory",
            "eigencam", "online", "evaluate", "trust", "receipts", "features",
            "onnx")  # fmt: skip


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = [preface(options)]
    print(report[0], flush=True)
    with tempfile.TemporaryDirectory(prefix="embedcam-benchmark-", dir=options.folder) as folder:
        for name in SECTIONS:
            if name in options.sections:
                text = section(name, options, Path(folder))
                print(text, flush=True)
                report.append(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(report), encoding="utf-8")
        print(f"written to {options.output}")


def section(name: str, options: argparse.Namespace, folder: Path) -> str:
    """One section's Markdown."""
    rounds, images = options.rounds, options.images
    rows = 20_000 if options.quick else 100_000
    if name == "exactness":
        return exactness.report(anchors=1 if options.quick else 4, triplets=50)
    if name == "build":
        text = [
            building.report(network, images, rounds, options.batch_size, folder, options.heads)
            for network in options.network
        ]
        return "\n".join(text)
    if name in ("explain", "peers"):
        make = explaining.explain_report if name == "explain" else explaining.peers_report
        return "\n".join(make(network, 20 * rounds, folder) for network in options.network)
    if name == "storage":
        return indexes.storage_report(4096, folder)
    if name == "open":
        return indexes.open_report(100_000 if options.quick else 1_000_000, rounds, folder)
    fast = options.network[0]
    if name == "zoo":
        return zoo.peers_report(fast, "resnet18", 4 * rounds)
    if name == "memory":
        return "\n".join(map(zoo.memory_report, ("resnet18", "mobilenet_v2")))
    if name == "eigencam":
        return zoo.decomposition_report(20 * rounds)
    if name == "onnx":
        return "\n".join(onnx.onnx_report(each, 4 * rounds, folder) for each in options.network)
    if name == "online":
        return zoo.online_report(fast, 4 * rounds, folder)
    if name == "evaluate":
        counts = (64, 256) if options.quick else (500, 10_000)
        return "\n".join(
            (
                evaluating.share_report(options.network, images, rounds, folder),
                evaluating.memory_report("mobilenet_v2", *counts, folder),
                evaluating.peers_report("mobilenet_v2", rounds),
            )
        )
    if name == "receipts":
        return "\n".join(receipts.report(each, 20 * rounds, folder) for each in options.network)
    if name == "trust":
        return "\n".join(trusting.report(each, images, rounds, folder) for each in options.network)
    if name == "features":
        return features.report(rows, 100 * rounds, folder)
    return indexes.search_report(rows, 100 * rounds, folder)


def preface(options: argparse.Namespace) -> str:
    """What the figures were measured with."""
    return (
        "# What it costs\n\n"
        f"`scripts/benchmark.py {' '.join(options.sections)}`: random weights, synthetic "
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
    return options


if __name__ == "__main__":
    sys.exit(main())
