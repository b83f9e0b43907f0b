"""The ONNX path beside torch: seconds on as many threads, and how far its maps are off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcam import EmbeddingNetwork, Explainer
from embedcam.export import export_onnx
from embedcam.onnx import OnnxNetwork

from .cases import SIZE, frozen_network
from .explaining import NEIGHBORS, ROWS, make_index
from .timing import Case, alternate, compared, table, verdict

BATCHES = (1, 8)
BAR, MAPS_BAR = 1.0, 1e-3
CONTROL = "torch again (A/A)"
QUERIES = 8


def onnx_report(
    name: str, rounds: int, folder: Path, make: Callable[[str], EmbeddingNetwork] = frozen_network
) -> str:
    """Ratios to torch at every batch, forward pass and whole explanation; the maps' difference."""
    network = make(name)
    path = make_index(network, folder / f"{name}-onnx")
    written = export_onnx(path, network, folder / f"{name}.onnx")
    threads = torch.get_num_threads()
    torchs = Explainer(path, network, n_neighbors=NEIGHBORS)
    onnx_network = OnnxNetwork(written.path, threads=threads)
    ours = Explainer(path, onnx=onnx_network, n_neighbors=NEIGHBORS)
    rows: list[list[Any]] = []
    for batch in BATCHES:
        pictures = inputs(network, batch)
        for what, cases in (
            ("forward", (network.embed, onnx_network.embed)),
            ("explain", (torchs.explain_batch, ours.explain_batch)),
        ):
            rows += _rows(f"batch {batch}, {what}", pictures, *cases, rounds)
    off = maps_off(torchs, ours, inputs(network, QUERIES))
    for explainer in (torchs, ours):
        explainer.index.close()
    return (
        f"\n## ONNX Runtime / torch, {name}\n\n"
        f"Both on {threads} threads, float32, the same prepared pictures at {SIZE} x {SIZE}, "
        f"{rounds} rounds, milliseconds. *Forward*: embedding and activations. *Explain*: with the "
        f"search among {ROWS:,} rows and the maps by {NEIGHBORS} neighbours' weights. The file "
        f"has {written.bytes / 1e6:.0f} MB and took {written.seconds:.0f} s.\n\n"
        + table(["case", "ms", "ratio", "bar"], rows)
        + f"\nLargest difference of {QUERIES} queries' maps, of each map's largest value: "
        f"{off:.1e} ({verdict(off, MAPS_BAR)}); of any output, held against torch when it was "
        f"written: {written.difference:.1e}.\n"
    )


def _rows(
    title: str,
    pictures: np.ndarray,
    by_torch: Callable[[Any], Any],
    by_onnx: Callable[[Any], Any],
    rounds: int,
) -> list[list[Any]]:
    took = alternate(
        {
            "torch": Case(lambda: by_torch(pictures)),
            CONTROL: Case(lambda: by_torch(pictures)),
            "ONNX Runtime": Case(lambda: by_onnx(pictures)),
        },
        rounds,
        warmup=3,
    )
    return compared(took, f"{title}: ", {"ONNX Runtime": BAR})


def maps_off(expected: Explainer, found: Explainer, pictures: np.ndarray) -> float:
    """The largest difference of two explainers' maps, of each map's largest value."""
    off = [
        float(np.abs(mine.cam - torchs.cam).max() / max(float(torchs.cam.max()), 1e-30))
        for torchs, mine in zip(
            expected.explain_batch(pictures), found.explain_batch(pictures), strict=True
        )
    ]
    return max(off)


def inputs(network: EmbeddingNetwork, count: int) -> np.ndarray:
    """Prepared pictures `[count 3 H W]`: the probe's, with seeded noise so that they differ."""
    probe = network.probe_images(count)
    noise = np.random.default_rng(0).standard_normal(probe.shape).astype(np.float32)
    return probe + np.float32(0.5) * noise
