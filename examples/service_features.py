"""Explanations inside a search service that has its own embeddings and activations.

    python examples/service_features.py

Offline, once: an index is built from features. Online: what the service computed for a query goes
in, JSON comes out; no network is needed and torch is not imported. The features here are made up,
in place of a network's last feature map (H x W cells of K channels) and its pooled embedding.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from embedcam import Explainer

KINDS = ("heron", "kettle", "violin", "wagon")
CHANNELS, GRID = 48, (7, 7)


def features(label: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedding `[K]` of unit length and activations `[K 7 7]` of a made-up image.

    Each kind has channels of its own, which light up where its object is.
    """
    rng = np.random.default_rng([label, seed])
    activations = rng.random((CHANNELS, *GRID), np.float32) * np.float32(0.3)
    top, left = rng.integers(0, 5, 2)
    own = slice(12 * label, 12 * label + 12)
    activations[own, top : top + 3, left : left + 3] += rng.random((12, 3, 3), np.float32)
    pooled = activations.mean((1, 2))
    return pooled / np.linalg.norm(pooled), activations


def build(path: Path, each: int = 30) -> None:
    """Offline: an index from the features of a collection. This part needs torch."""
    from embedcam import build_from_features

    labels = [kind for kind in range(len(KINDS)) for _ in range(each)]
    pooled = [features(label, seed)[1].mean((1, 2)) for seed, label in enumerate(labels)]
    build_from_features(
        np.stack(pooled),  # the embedding is the pooled vector itself: no head
        np.stack(pooled),
        path,
        grid=GRID,
        ids=[f"{KINDS[label]}/{number}.jpg" for number, label in enumerate(labels)],
        labels=[KINDS[label] for label in labels],
    )


class Service:
    """What a search service would keep for its lifetime."""

    def __init__(self, path: Path) -> None:
        self.explainer = Explainer(path)

    def answer(self, embedding: np.ndarray, activations: np.ndarray) -> str:
        """The body of a response: the neighbours, and where the query shows what they have."""
        why = self.explainer.explain_features(embedding, activations, n_neighbors=5)
        return json.dumps(why.to_dict())

    def answer_for(self, embedding: np.ndarray, activations: np.ndarray, ids: list[str]) -> str:
        """The same for results that another search engine found."""
        why = self.explainer.explain_features(embedding, activations, neighbors=ids)
        return json.dumps(why.to_dict())


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--index", type=Path, help="made there if missing; default: temporary")
    path = parser.parse_args(given).index
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "my.index"
        if not path.exists():
            build(path)
        service = Service(path)
        embedding, activations = features(KINDS.index("violin"), seed=1000)
        told = json.loads(service.answer(embedding, activations))
        print("found:", *(one["id"] for one in told["neighbors"]))
        show(np.array(told["cam"]))
        named = json.loads(service.answer_for(embedding, activations, ["heron/3.jpg"]))
        print("named:", *(one["id"] for one in named["neighbors"]))


def show(cam: np.ndarray) -> None:
    """A map in characters: the darker, the more the cell speaks for the results."""
    shades = " .:-=+*#%@"
    for row in cam / max(float(cam.max()), 1e-12):
        print("   ", "".join(2 * shades[int(9 * value)] for value in row))


if __name__ == "__main__":
    sys.exit(main())
