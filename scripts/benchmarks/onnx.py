"""The ONNX path beside torch: seconds on as many threads, and how far its maps are off."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from embedcam import EmbeddingNetwork, Explainer
from embedcam.export import export_onnx
from embedcam.onnx import OnnxNetwork

from .cases import ROWS, SIZE, frozen_network, index_of
from .explaining import NEIGHBORS
from .timing import alternate, compared, section, verdict

BATCHES = (1, 8)
BAR, MAPS_BAR = 1.0, 1e-3
QUERIES = 8


def onnx_report(
    name: str, rounds: int, folder: Path, make: Callable[[str], EmbeddingNetwork] = frozen_network
) -> str:
    """Ratios to torch at every batch, forward pass and whole explanation; the maps' difference."""
    network = make(name)
    path = index_of(network, folder / f"{name}-onnx")
    written = export_onnx(path, network, folder / f"{name}.onnx")
    threads = torch.get_num_threads()
    onnx_network, rows = OnnxNetwork(written.path, threads=threads), []
    with (
        Explainer(path, network, n_neighbors=NEIGHBORS) as torchs,
        Explainer(path, onnx=onnx_network, n_neighbors=NEIGHBORS) as ours,
    ):
        for batch in BATCHES:
            pictures = inputs(network, batch)
            for what, by_torch, by_onnx in (
                ("forward", network.embed, onnx_network.embed),
                ("explain", torchs.explain_batch, ours.explain_batch),
            ):
                cases = {
                    "torch": partial(by_torch, pictures),
                    "ONNX Runtime": partial(by_onnx, pictures),
                }
                took = alternate(cases, rounds, warmup=3, control=True)
                rows += compared(took, f"batch {batch}, {what}: ", {"ONNX Runtime": BAR})
        off = maps_off(torchs, ours, inputs(network, QUERIES))
    return section(
        f"ONNX Runtime / torch, {name}",
        f"Both on {threads} threads, float32, the same prepared pictures at {SIZE} x {SIZE}, "
        f"{rounds} rounds, milliseconds. *Forward*: embedding and activations. *Explain*: with the "
        f"search among {ROWS:,} rows and the maps by {NEIGHBORS} neighbours' weights. The file "
        f"has {written.bytes / 1e6:.0f} MB and took {written.seconds:.0f} s.",
        ["case", "ms", "ratio", "bar"],
        rows,
    ) + (
        f"\nLargest difference of {QUERIES} queries' maps, of each map's largest value: "
        f"{off:.1e} ({verdict(off, MAPS_BAR)}); of any output, held against torch when it was "
        f"written: {written.difference:.1e}.\n"
    )


def maps_off(expected: Explainer, found: Explainer, pictures: np.ndarray) -> float:
    """The largest difference of two explainers' maps, of each map's largest value."""
    pairs = zip(expected.explain_batch(pictures), found.explain_batch(pictures), strict=True)
    return max(
        float(np.abs(mine.cam - torchs.cam).max() / max(float(torchs.cam.max()), 1e-30))
        for torchs, mine in pairs
    )


def inputs(network: EmbeddingNetwork, count: int) -> np.ndarray:
    """Prepared pictures `[count 3 H W]`: the probe's, with seeded noise so that they differ."""
    probe = network.probe_images(count)
    noise = np.random.default_rng(0).standard_normal(probe.shape).astype(np.float32)
    return probe + np.float32(0.5) * noise
