"""Do the maps point at the right object? Every setting on unseen classes, with intervals.

    python scripts/truth.py DATA/birds20 DATA/objects24 --weights mobilenet_v2_imagenet.safetensors

A data folder is as scripts/prepare_data.py makes it. Protocol (seeds 0, nothing tuned on this):

- classes in alphabetical order; the first half trains the head, the second half is measured;
- pictures resized to 224 x 224; frozen MobileNetV2, layer `features`, average pool, then
  *reference*: Linear(1280, 128, bias=False) from the training half's principal directions, 100
  Adam steps, lr 1e-4, 128 triplets a step, margin 0.2, L2-normalised; *frozen*: the pooled vector;
- one object, drawn with the picture's own stored weights. *Single*: pixel AUC of its box or mask
  against the rest, of the signed map; *energy*: share of ReLU(sum w A), bilinearly up-sampled,
  inside, nothing else done to it; no energy scores chance;
- two objects: 500 pairs of pictures of different classes side by side (224 x 448), each also
  mirrored, drawn with the stored weights of the nearest *other* picture of the first one's class to
  the first one alone. *Pasted*: AUC of its side against the other, of the signed map; *share*: of
  the map as drawn on its side, and how often the larger half is the right one.

A change of contrast moves energy and share and not the AUCs. Pasted pairs flatter every row:
scripts/frontier.py measures real pictures of several objects, and chose the default;
scripts/paper_tables.py measures what a transfer keeps.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from paper.bench import Bench, Row, read_bench
from paper.report import table
from photographs import SIZE

from embedcam import EmbedcamError
from embedcam.metrics import recall_at_k
from embedcam.recipe.recipe import Recipe
from embedcam.targets import WHITENED


def main() -> None:
    options = _arguments()
    texts, valid = [], True
    try:
        for folder in options.data:
            bench = read_bench(folder, options.weights, options.cache)
            for name, one in (("reference", bench), ("frozen", bench.frozen())):
                text, counts = measure(name, one)
                print(text, flush=True)
                texts.append(text)
                valid &= counts
    except EmbedcamError as error:
        sys.exit(f"truth: {error}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(_preface(options) + "\n".join(texts), encoding="utf-8")
        print(f"written to {options.output}")
    if not valid:
        sys.exit("truth: Recall@1 is not within 0.02 of the frozen features': no table counts")


SETTINGS: dict[str, Recipe] = {}
for _target, _sampling, _count in (
    ("margin", "random", 1),
    ("margin", "random", 50),
    ("margin", "all", 50),
    ("centred", "random", 1),
):
    for _norm in ("through", "around"):
        for _method in ("gradcam", "gradcam++"):
            if _sampling == "all" and _method == "gradcam++":
                continue
            _name = {1: "one triplet", 50: "50 triplets"}[_count]
            _name = "all triplets" if _sampling == "all" else _name
            _name = "centred" if _target == "centred" else _name
            SETTINGS[f"{_method}, {_name}, {_norm}"] = Recipe(
                method=_method,
                target=_target,
                norm=_norm,
                sampling=_sampling,
                triplets=None if _sampling == "all" else _count,
            )
for _norm in ("through", "around"):
    for _target in WHITENED:
        SETTINGS[f"gradcam, {_target}, {_norm}"] = Recipe(target=_target, norm=_norm)
ENCODINGS = {
    "dense": {"encoding": "dense"},
    "low-rank 128": {"encoding": "low-rank"},
    "top 50 signed": {"encoding": "top-m", "by": "signed"},
    "top 50 magnitude": {"encoding": "top-m", "by": "magnitude"},
}


def measure(embedding: str, bench: Bench) -> tuple[str, bool]:
    """One embedding's table, and whether it counts: it must retrieve like the frozen features."""
    labels = bench.unseen.labels
    recall, usual = (recall_at_k(one.embeddings, labels) for one in (bench, bench.frozen()))
    head = (
        f"### {bench.name}, {embedding} embedding\n\n{len(labels)} pictures of "
        f"{len(set(labels))} unseen classes; Recall@1 {recall:.3f} (frozen features {usual:.3f}).\n"
    )
    rows = table(("weights", "encoding"), list(_rows(bench)), sizes=True, bases=False)
    return f"{head}\n{rows}", abs(recall - usual) <= 0.02


def _rows(bench: Bench) -> Iterator[Row]:
    area = bench.unseen.regions.sum((1, 2)) / SIZE**2
    half = np.full((2, len(bench.scenes.left) // 2), 0.5)
    yield Row(("chance (area)", ""), np.full(len(area), 0.5), half, area, half)
    yield bench.mean_activation(2)
    for name, recipe in SETTINGS.items():
        found = bench.cotangents(recipe)
        for encoding, changes in ENCODINGS.items():
            yield bench.row((name, encoding), replace(recipe, **changes), found)
        print(f"{bench.name}: {name}", file=sys.stderr, flush=True)


def _preface(options: argparse.Namespace) -> str:
    names = " ".join(f"DATA/{folder.name}" for folder in options.data)
    rules = (__doc__ or "").partition("imagenet.safetensors\n\n")[2]
    return (
        "# Truth: do the maps point at the right object?\n\n"
        f"Made by `python scripts/truth.py {names} --weights mobilenet_v2_imagenet.safetensors "
        f"--output docs/results/truth.md`. {rules}\n"
        "*Bytes*: an image, beside id, label, path and embedding, own map included. Brackets: 95% "
        "bootstrap intervals over pictures, or over scenes with their mirror images.\n\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="folders with annotations.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of MobileNetV2")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--cache", type=Path, help="folder where frozen features are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
