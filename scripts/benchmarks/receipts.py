"""What a receipt adds to the forward passes of its two pictures, and what a point costs."""

from pathlib import Path

import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

from embedcam import EmbeddingNetwork, Explainer, PairExplainer, build_index
from embedcam.images import from_dataset

from .cases import frozen_network, linear_network, query_input
from .timing import alternate, milliseconds, section, verdict

BAR_MS, POINT_BAR_MS = 5.0, 50.0
LABELS = 2


def report(name: str, rounds: int, folder: Path) -> str:
    """The tables of one network, frozen and with a linear head of 128."""
    return "\n".join(
        _report(f"{name}, {kind}", network, rounds, folder / f"{name}-{kind}-receipts")
        for kind, network in (
            ("frozen", frozen_network(name)),
            ("linear head", linear_network(name, folder)),
        )
    )


def _index_with_concepts(network: EmbeddingNetwork, path: Path) -> Path:
    """Build an index of random pictures, so that it has concepts and exemplars."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(256, size=(LABELS * 20, 7, 7, 3), dtype=np.uint8)
    pictures = coarse.repeat(32, axis=1).repeat(32, axis=2)
    labelled = [(Image.fromarray(one), str(n % LABELS)) for n, one in enumerate(pictures)]
    build_index(
        from_dataset(labelled), network, path, own_maps=False, trust=False,
        progress=False,
    )  # fmt: skip
    return path


def _report(title: str, network: EmbeddingNetwork, rounds: int, path: Path) -> str:
    pairs = PairExplainer(Explainer(_index_with_concepts(network, path), network))
    first = np.asarray(query_input())
    second = np.ascontiguousarray(first[:, ::-1])
    both, made = np.stack([first, second]), pairs.receipt(first, second)
    base = "the two forward passes"
    as_json = "receipt, as JSON with 5 places, 10 channels, 8 concepts, exemplars and 5 links"
    # As the service has it: on few cores BLAS's threads and torch's come to a stop over each other.
    with threadpool_limits(limits=1, user_api="blas"):
        passes = alternate(
            {
                base: lambda: network.forward(both),
                "receipt": lambda: pairs.receipt(first, second),
                as_json: lambda: pairs.receipt(first, second).to_dict(),
            },
            rounds,
            warmup=2,
            control=True,
        )
        points = {"one point": lambda: made.point(3, 3), "every point": made.matrix}
        alone = alternate(points, rounds, warmup=2)
    rows = []
    for case, took in (passes | alone).items():
        added = 1e3 * float(np.median(took if case in alone else took - passes[base]))
        bar = POINT_BAR_MS if case in alone else BAR_MS if "receipt" in case else None
        rows.append(
            [case, milliseconds(took), "" if case == base else f"{added:.2f}", verdict(added, bar)]
        )
    return section(
        f"Receipts of a pair: {title}",
        "NumPy on one thread, as `embedcam serve` has it.",
        ["", "ms", "ms beyond the passes, or alone", "bar"],
        rows,
    )
