"""The ONNX path beside torch and beside its session alone, and how far its maps are off."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from embedcam import EmbeddingNetwork, Explainer
from embedcam.export import export_onnx
from embedcam.onnx import OnnxNetwork

from .cases import ROWS, SIZE, frozen_network, index_of, write_pictures
from .explaining import NEIGHBORS
from .timing import alternate, compared, section, verdict

BATCHES = (1, 8)
BAR, MAPS_BAR = 1.0, 1e-3
ALONE, EXPLAIN, FROM_FILE = "session alone", "explain", "explain, from a file"
ALONE_BARS = {"resnet50": 1.15, "mobilenet_v2": 1.25}
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
        apart = beside_its_session(name, onnx_network, ours, inputs(network, 1), rounds, folder)
        off = maps_off(torchs, ours, inputs(network, QUERIES))
    return (
        section(
            f"ONNX Runtime / torch, {name}",
            f"Both on {threads} threads, float32, the same prepared pictures at {SIZE} x {SIZE}, "
            f"{rounds} rounds, milliseconds. *Forward*: embedding and activations. *Explain*: with "
            f"the search among {ROWS:,} rows and the maps by {NEIGHBORS} neighbours' weights. The "
            f"file has {written.bytes / 1e6:.0f} MB and took {written.seconds:.0f} s.",
            ["case", "ms", "ratio", "bar"],
            rows,
        )
        + (
            f"\nLargest difference of {QUERIES} queries' maps, of each map's largest value: "
            f"{off:.1e} ({verdict(off, MAPS_BAR)}); of any output, held against torch when it was "
            f"written: {written.difference:.1e}.\n"
        )
        + apart
    )


def beside_its_session(
    name: str,
    network: OnnxNetwork,
    explainer: Explainer,
    picture: np.ndarray,
    rounds: int,
    folder: Path,
) -> str:
    """Ratios of explaining one query to ONNX Runtime's own call, of a prepared `[1 3 H W]`."""
    session = network._session
    names, given = list(session.outputs), {session.input: picture}
    (file,) = write_pictures(folder / f"{name}-query", 1).glob("*/*.jpg")
    cases = {
        ALONE: lambda: session._session.run(names, given),
        EXPLAIN: lambda: explainer.explain(picture[0]),
        FROM_FILE: lambda: explainer.explain(file),
    }
    took = alternate(cases, 10 * rounds, warmup=5, control=True)
    return section(
        f"Explain / ONNX session alone, {name}",
        f"Batch 1, {10 * rounds} rounds. The first two of a prepared picture, the last of a JPEG "
        f"file of 320 x 240, decoded and prepared; search among {ROWS:,} rows, {NEIGHBORS} "
        "neighbours, trust and match included.",
        ["case", "ms", "ratio", "bar"],
        compared(took, bars={EXPLAIN: ALONE_BARS.get(name)}),
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
