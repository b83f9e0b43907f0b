"""What a build without labels costs as the collection grows, in CPU time.

Clustered vectors of 128 numbers (1,000 seeded centres) stand in for pooled activations and
embeddings; `build_from_features` by the default recipe, on one thread. *CPU* is of the whole build:
neighbours, weights, encoding and writing. *agreement* is of the weights with those of exact
neighbours, for 500 seeded images: cosine, median and 5th percentile.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from embedcam import Recipe, build_from_features
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.triplets import NearestOthers

from ..benchmarks.timing import table

WIDTH, CENTRES = 128, 1000


def vectors(n: int) -> np.ndarray:
    """Unit vectors around seeded centres, `[n 128]`, all >= 0 as pooled activations are."""
    generator = np.random.default_rng(0)
    centres = generator.random((CENTRES, WIDTH), np.float32)
    found = centres[generator.integers(CENTRES, size=n)]
    found += 0.2 * generator.random((n, WIDTH), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def measured(n: int) -> list[str]:
    made = vectors(n)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        build_from_features(made, made, Path(folder) / "index", grid=(7, 7), progress=False)
        seconds = time.process_time() - begun
    cells = [f"{n:,}", f"{seconds:.1f}", f"{1e3 * seconds / n:.3f}"]
    sample = np.sort(np.random.default_rng(1).permutation(n)[:500])
    anchors = AnchorCotangents(Recipe(), made, None, made.mean(0))
    assert anchors.sampler is not None
    ours = anchors.of(sample).values
    anchors.sampler.nearest = NearestOthers(made, exact=n)
    exact = anchors.of(sample).values
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = (ours * exact).sum(1) / lengths
    return [*cells, f"{np.median(cosine):.4f}, {np.percentile(cosine, 5):.4f}"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=int, help="sizes of collections")


def measure(options: argparse.Namespace) -> Iterator[str]:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    head = ("images", "CPU s", "CPU ms an image", "agreement")
    yield table(head, [measured(n) for n in options.images])
