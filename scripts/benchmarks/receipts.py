"""What a receipt adds to the forward passes of its two pictures, and what a point costs."""

from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from embedcam import EmbeddingNetwork, Explainer, PairExplainer

from .cases import frozen_network, linear_network, query_input
from .explaining import make_index
from .timing import Case, alternate, milliseconds, table

BAR_MS = 3.0
POINT_BAR_MS = 50.0
CONTROL = "the two forward passes again (A/A)"


def report(name: str, rounds: int, folder: Path) -> str:
    """The tables of one network, frozen and with a linear head of 128."""
    return "\n".join(
        [
            _report(
                f"{name}, frozen", frozen_network(name), rounds, folder / f"{name}-frozen-receipts"
            ),
            _report(
                f"{name}, linear head",
                linear_network(name, folder),
                rounds,
                folder / f"{name}-head-receipts",
            ),
        ]
    )


def _report(title: str, network: EmbeddingNetwork, rounds: int, path: Path) -> str:
    pairs = PairExplainer(Explainer(make_index(network, path, rows=100), network))
    first = np.asarray(query_input())
    second = np.ascontiguousarray(first[:, ::-1])
    both = np.stack([first, second])
    made = pairs.receipt(first, second)
    cases = {
        "the two forward passes": Case(lambda: network.forward(both)),
        CONTROL: Case(lambda: network.forward(both)),
        "receipt": Case(lambda: pairs.receipt(first, second)),
        "receipt, as JSON with 10 lines and 5 links": Case(
            lambda: pairs.receipt(first, second).to_dict()
        ),
        "one point": Case(lambda: made.point(3, 3)),
        "every point": Case(made.matrix),
    }
    points = {name: cases.pop(name) for name in ("one point", "every point")}
    # As the service has it: on few cores BLAS's threads and torch's come to a stop over each other.
    with threadpool_limits(limits=1, user_api="blas"):
        seconds = alternate(cases, rounds, warmup=2) | alternate(points, rounds, warmup=2)
    base = seconds["the two forward passes"]
    rows = []
    for case, took in seconds.items():
        alone = "point" in case
        added = 1e3 * float(np.median(took if alone else took - base))
        bar = POINT_BAR_MS if alone else BAR_MS if "receipt" in case else None
        met = "" if bar is None else f"<= {bar:g}: {'met' if added <= bar else '**not met**'}"
        rows.append([case, milliseconds(took), "" if took is base else f"{added:.2f}", met])
    note = "NumPy on one thread, as `embedcam serve` has it.\n\n"
    head = ["", "ms", "ms beyond the passes, or alone", "bar"]
    return f"## Receipts of a pair: {title}\n\n{note}{table(head, rows)}"
