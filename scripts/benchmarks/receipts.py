"""What a receipt adds to the forward passes of its two pictures, and what a point costs."""

from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from embedcam import EmbeddingNetwork, Explainer, PairExplainer

from .cases import frozen_network, index_of, linear_network, query_input
from .timing import alternate, milliseconds, section, verdict

BAR_MS, POINT_BAR_MS = 5.0, 50.0


def report(name: str, rounds: int, folder: Path) -> str:
    """The tables of one network, frozen and with a linear head of 128."""
    return "\n".join(
        _report(f"{name}, {kind}", network, rounds, folder / f"{name}-{kind}-receipts")
        for kind, network in (
            ("frozen", frozen_network(name)),
            ("linear head", linear_network(name, folder)),
        )
    )


def _report(title: str, network: EmbeddingNetwork, rounds: int, path: Path) -> str:
    pairs = PairExplainer(Explainer(index_of(network, path, rows=100), network))
    first = np.asarray(query_input())
    second = np.ascontiguousarray(first[:, ::-1])
    both, made = np.stack([first, second]), pairs.receipt(first, second)
    base, as_json = "the two forward passes", "receipt, as JSON with 5 places, 10 lines and 5 links"
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
