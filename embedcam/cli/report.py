"""How things are printed; and the commands that only tell: info and verify."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any


def emit(options: argparse.Namespace, values: Mapping[str, Any], text: str) -> None:
    """Print JSON where asked for, else the text."""
    print(json.dumps(values, indent=2, ensure_ascii=False) if options.json else text)


def note(options: argparse.Namespace, text: str) -> None:
    """Something worth knowing, on the error stream, so that output stays clean."""
    if not options.quiet:
        print(text, file=sys.stderr)


def info(options: argparse.Namespace) -> None:
    """What an index holds."""
    from ..index import Index

    with Index.open(options.index) as index:
        manifest = index.manifest
        n_single, n_empty = _evidence(index)
    layer, counts = manifest["layers"][0], manifest["counts"]
    triplets, encoding = manifest["triplets"], layer["encoding"]
    network = manifest["network"] or {}
    shown = {
        "images": f"{counts['live']} ({counts['rows'] - counts['live']} removed, "
        f"{counts['added_after_fit']} added after the fit)",
        "network": (network.get("name") or "not named")
        + f", layer {layer['name']}, K = {layer['channels']}, grid {_grid(layer['grid'])}",
        "embedding": f"D = {manifest['embedding']['width']}, "
        + ("L2-normalised" if manifest["embedding"]["normalized"] else "not normalised"),
        "weights": _weights_line(manifest, triplets),
        "encoding": _encoding_line(encoding, layer),
        "no evidence": f"{n_empty} images whose every triplet was satisfied",
        "single": f"{n_single} labels of one image, whose positives are nearest neighbours",
        "search": "none"
        if manifest["faiss"] is None
        else f"FAISS {manifest['faiss']['factory']}"
        f", {'squared L2' if manifest['metric'] == 'l2' else 'inner product'}",
        "recipe": manifest["recipe_sha256"][:16],
        "generation": str(manifest["generation"]),
    }
    if not n_empty:
        del shown["no evidence"]
    if not n_single:
        del shown["single"]
    width = max(map(len, shown))
    lines = [f"{name:<{width}}  {value}" for name, value in shown.items()]
    if counts["added_after_fit"]:
        lines.append(
            "\n`embedcam build --refit` fits again on all images and redoes their weights."
        )
    summary = {
        key: manifest[key]
        for key in ("format_version", "generation", "counts", "recipe", "recipe_sha256", "images",
                    "embedding", "metric", "layers", "libraries")
    }  # fmt: skip
    summary |= {"labels_of_one_image": n_single, "images_without_evidence": n_empty}
    emit(options, summary, "\n".join(lines))


def verify(options: argparse.Namespace) -> None:
    """Check every promise of an index; the error names the file and what is wrong."""
    from ..index import Index

    with Index.open(options.index) as index:
        checks = index.verify()
        n_live = len(index)
    emit(
        options,
        {"whole": True, "images": n_live, "checks": checks},
        f"{options.index}: whole; {n_live} images, {len(checks)} checks",
    )


def _evidence(index: Any) -> tuple[int, int]:
    """Labels of one image, and images without a triplet that counted."""
    import numpy as np

    live = index.live_positions()
    labels = [label for label in index.labels[live] if label is not None]
    sizes = np.unique(np.array(labels, dtype=object).astype(str), return_counts=True)[1]
    return int((sizes == 1).sum()), int((index.triplets_used(live) == 0).sum())


def _weights_line(manifest: Mapping[str, Any], triplets: Mapping[str, Any]) -> str:
    line = f"{manifest['method']} of the {manifest['target']} target, {manifest['norm']} the norm"
    if manifest["target"] == "centred":
        return line
    drawn = (
        "all triplets"
        if triplets["sampling"] == "all"
        else (f"{triplets['count']} {triplets['sampling']} triplets an image")
    )
    hinge = f", hinge at {triplets['margin']}" if triplets["hinge"] else ""
    return f"{line}, {drawn}{hinge}, seed {triplets['seed']}"


def _encoding_line(encoding: Mapping[str, Any], layer: Mapping[str, Any]) -> str:
    about = {
        "top-m": lambda: f"top {encoding['m']} channels by {encoding['by']} value",
        "low-rank": lambda: (
            f"rank {encoding['rank']}, basis from {encoding['origin']}, codes "
            + ("stored" if encoding["codes"] == "stored" else "derived from the embedding")
        ),
        "dense": lambda: "all channels",
    }[encoding["name"]]()
    coarse = layer["coarse_grid"]
    maps = "no own maps" if coarse is None else f"own maps {_grid(coarse)}"
    return f"{encoding['name']} ({about}), {encoding['dtype']}; {maps}"


def _grid(grid: Any) -> str:
    return "unknown" if grid is None else f"{grid[0]} x {grid[1]}"
