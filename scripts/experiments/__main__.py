"""Experiments: what docs/results/ was measured by.

    python -m scripts.experiments truth DATA/birds20 DATA/objects24 DATA/natural --weights FILE
    python -m scripts.experiments frontier DATA/birds20 DATA/objects24 DATA/natural --weights FILE
    python -m scripts.experiments trust DATA/birds20 DATA/objects24 DATA/natural/single --weights FILE
    python -m scripts.experiments match DATA/birds20 DATA/objects24 DATA/natural/single --weights FILE
    python -m scripts.experiments pairs DATA/birds20 DATA/objects24 --weights FILE
    python -m scripts.experiments places DATA/birds20 DATA/objects24 DATA/natural --weights FILE
    python -m scripts.experiments concepts DATA/birds20 DATA/objects24 DATA/natural --weights FILE
    python -m scripts.experiments positions [--natural DATA/natural --weights FILE]
    python -m scripts.experiments attended NETWORKS
    python -m scripts.experiments small_vit TOYS
    python -m scripts.experiments transformers TOYS
    python -m scripts.experiments unlabelled 10000 40000 1000000
    python -m scripts.experiments shards DATA/objects24 --weights FILE

DATA is made by examples/prepare_data.py, FILE holds MobileNetV2's ImageNet weights. With --output
the tables are written as Markdown, under the experiment's own description.
"""  # noqa: E501

import argparse
import importlib
import logging
import sys
from pathlib import Path

from embedcam import EmbedcamError

from ..benchmarks.timing import written

EXPERIMENTS = (
    "truth",
    "frontier",
    "trust",
    "match",
    "pairs",
    "places",
    "concepts",
    "positions",
    "attended",
    "small_vit",
    "transformers",
    "unlabelled",
    "shards",
)


def main(given: list[str] | None = None) -> None:
    """Run an experiment, print its tables as they come, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name in EXPERIMENTS:
        module = importlib.import_module(f"{__package__}.{name}")
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.arguments(command)
        command.add_argument("--output", type=Path, help="Markdown file to write")
        command.set_defaults(module=module)
    options = parser.parse_args(given)
    logging.basicConfig(format="%(message)s")
    for name in ("embedcam.progress", __package__):
        logging.getLogger(name).setLevel(logging.INFO)
    texts = []
    try:
        for text in options.module.measure(options):
            print(text, flush=True)
            texts.append(text)
    except EmbedcamError as error:
        sys.exit(f"{options.experiment}: {error}")
    if options.output:
        title, _, rules = options.module.__doc__.partition("\n\n")
        made_by = f"Made by `python -m scripts.experiments {options.experiment}`."
        head = f"# {title}\n\n{made_by}\n\n{rules}"
        written("\n".join([head, *texts]) + "\n", options.output)


if __name__ == "__main__":
    main()
