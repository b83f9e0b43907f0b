"""What evaluating costs: the metrics' own time, memory, and the same metrics of torch-cam."""

import csv
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedcam import EmbeddingNetwork, Recipe, build_index, evaluate_index, find_images
from embedcam.images import ImageSource
from embedcam.methods.weights import gradcam
from embedcam.metrics import average_drop, average_increase, curve_area, deletion_steps
from embedcam.ops import cam, normalize, resize
from embedcam.targets import head_cotangent

from .cases import SIZE, frozen_network, write_pictures
from .timing import Run, alternate, compared, peak_of, ratio, section, verdict
from .zoo import Score

SHARE_BAR, MEMORY_BAR, PEER_BAR = 0.2, 1.1, 1.0
BATCH, STEPS = 8, 20
PARTS = {"limit": 5, "faithfulness": 50, "scenes": 25, "fidelity": 25}
"""One of so many pictures is measured: of 500, a fifth of `evaluate`'s own samples."""
INDEXED = 64
METRICS = ("average drop and increase", "deletion and insertion")


def share_report(networks: list[str], images: int, rounds: int, folder: Path) -> str:
    """The metrics' own seconds as a share of the forward passes'."""
    source = find_images(write_pictures(folder / f"evaluated-{images}", images))
    boxes = write_boxes(folder / "boxes.csv", source)
    rows = []
    for name in networks:
        network, path = frozen_network(name), folder / f"evaluated-{name}"
        build_index(source, network, path, Recipe(), batch_size=BATCH, progress=False)
        found = [seconds(path, source, network, boxes) for _ in range(rounds)]
        parts = ("forward", "metrics", "explaining", "reading", "total")
        spent = {part: np.array([one[part] for one in found]) for part in parts}
        share = ratio(spent["metrics"], spent["forward"])
        middle = [f"{np.median(each):.2f}" for each in spent.values()]
        rows.append([name, *middle, share, verdict(share.median, SHARE_BAR)])
    few = [max(1, images // part) for part in PARTS.values()]
    return section(
        "Evaluating",
        f"`evaluate_index` with boxes and all measures: {few[0]} of {images} "
        "pictures of 320 x 240, their pooled vector as embedding; controls and removed pixels of "
        f"{few[1]}, scenes and fidelity of {few[2]}; {rounds} rounds, seconds. *Share*: of the "
        "metrics over the forward passes of the same run.",
        ["network", *parts, "share", "bar"],
        rows,
    )


def seconds(
    path: Path, source: ImageSource, network: EmbeddingNetwork, boxes: Path
) -> dict[str, float]:
    samples = {name: max(1, len(source) // part) for name, part in PARTS.items()}
    found = evaluate_index(path, source, network, boxes=boxes, progress=False, **samples)
    spent: dict[str, float] = found.summary["seconds"]
    return spent


def write_rows(path: Path, head: str, rows: Iterable[Sequence[object]]) -> Path:
    """A CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *rows])
    return path


def write_boxes(path: Path, source: ImageSource) -> Path:
    """A box for each picture, a quarter of its area."""
    rows = ((item.path, 80, 60, 240, 180) for item in source.items)
    return write_rows(path, "path,x0,y0,x1,y1", rows)


def write_queries(path: Path, source: ImageSource, count: int) -> Path:
    """So many queries from a few files, each with an id of its own."""
    assert source.root is not None
    root, items = source.root.resolve(), islice(cycle(source.items), count)
    rows = ((root / one.path, one.label, f"query-{n}") for n, one in enumerate(items))
    return write_rows(path, "path,label,id", rows)


def memory_report(name: str, few: int, many: int, folder: Path) -> str:
    """Peak memory of `embedcam evaluate`, which must not grow with the pictures."""
    if not Path("/proc/self/status").exists():
        return "\n## Peak memory of an evaluation\n\nNot measured: this system has no /proc.\n"
    source = find_images(write_pictures(folder / "few", INDEXED))
    path = folder / "few.index"
    build_index(source, frozen_network(name), path, Recipe(), batch_size=BATCH, progress=False)
    peaks = {}
    for count in (few, many):
        given = write_queries(folder / f"queries-{count}.csv", source, count)
        arguments = ["evaluate", str(path), "--images", str(given), "--quiet",
                     "--html", f"{folder}/page.html", "--csv", f"{folder}/numbers.csv",
                     "--faithfulness", "1", "--scenes", "5", "--fidelity", "5"]  # fmt: skip
        peaks[count] = peak_of(f"from embedcam.cli import main\nassert not main({arguments})")
    over = peaks[many] / peaks[few]
    return (
        f"\n## Peak memory of an evaluation, {name}\n\n`embedcam evaluate` with a page and a table "
        f"of each picture's numbers, in a process of its own: {peaks[few]:.0f} MB with {few:,} "
        f"pictures, {peaks[many]:.0f} MB with {many:,}, {over:.3f} times as much "
        f"({verdict(over, MEMORY_BAR)}).\n"
    )


def peers_report(name: str, rounds: int) -> str:
    """The same metrics of the same maps and pictures by torch-cam, in alternating runs."""
    network = frozen_network(name)
    generator = torch.Generator().manual_seed(0)
    rows, missing = [], ""
    for (metric, ours), count in zip(OURS.items(), (32, 4), strict=True):
        images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
        # Not an embedding of theirs: the similarity to itself has no gradient.
        reference = network.forward(images[:1]).embedding[0].roll(1)
        cases: dict[str, Run] = {"embedcam": partial(ours, network, images, reference)}
        peer = torch_cam(metric, network, images, reference)
        if peer is None:
            missing = "\ntorch-cam is missing or has none (`pip install torchcam`).\n"
        else:
            cases["torch-cam"] = peer
        took = alternate(cases, rounds, control=True)
        before = f"{metric}, {count} pictures: "
        rows += compared(took, before, {"torch-cam": PEER_BAR}, at_least=True)
    return (
        section(
            f"Metrics beside torch-cam's, {name}",
            f"Pictures of {SIZE} x {SIZE}, similarity to "
            "one embedding, the map each package's Grad-CAM of it, which is within the "
            f"time; batches of {BATCH}, {STEPS} steps, each package's own way of a forward pass "
            "(embedcam's evaluation: channels last). *Ratio*: over embedcam's, above 1 the peer is "
            "slower.",
            ["metric", "ms", "ratio", "bar"],
            rows,
        )
        + missing
    )


def drop_and_increase(
    network: EmbeddingNetwork, images: Tensor, reference: Tensor
) -> tuple[float, float]:
    """Average drop and increase of Grad-CAM's maps as masks; what is masked is the mean colour."""
    full, masked = [], []
    for batch in images.split(BATCH):
        scores, maps = explained(network, batch, reference)
        full.append(scores)
        soft = torch.from_numpy(np.asarray(normalize(maps), np.float32))
        masked.append(scored(network, batch * soft[:, None], reference))
    base = scored(network, torch.zeros_like(images[:1]), reference)
    whole, shown = np.concatenate(full), np.concatenate(masked)
    return (
        average_drop(whole, shown, np.broadcast_to(base, whole.shape)),
        average_increase(whole, shown),
    )


def deletion_and_insertion(
    network: EmbeddingNetwork, images: Tensor, reference: Tensor, steps: int = STEPS
) -> tuple[float, float]:
    """Mean areas under both curves of Grad-CAM's maps."""
    base = scored(network, torch.zeros_like(images[:1]), reference)
    deleted, inserted = [], []
    for batch in images.split(BATCH):
        scores, maps = explained(network, batch, reference)
        for image, whole, drawn in zip(batch, scores, maps, strict=True):
            masks = torch.from_numpy(deletion_steps(drawn[None], steps)[1][0, 1:-1, None])
            less, more = (torch.where(kept, image, 0.0) for kept in (~masks, masks))
            shown = torch.cat([less, more]).split(BATCH)
            curve = np.concatenate([scored(network, some, reference) for some in shown])
            down, up = np.split(curve, 2)
            deleted.append(np.concatenate([[whole], down, base]))
            inserted.append(np.concatenate([base, up, [whole]]))
    return float(curve_area(deleted).mean()), float(curve_area(inserted).mean())


OURS: dict[str, Callable[..., tuple[float, float]]] = dict(
    zip(METRICS, (drop_and_increase, deletion_and_insertion), strict=True)
)


def explained(
    network: EmbeddingNetwork, batch: Tensor, reference: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities `[b]` and Grad-CAM's maps of them `[b H W]`, from one forward pass."""
    with closing(network.head_pass(channels_last(batch))) as head_pass:
        features = head_pass.features
        embeddings = features.embedding.numpy()
        aim = np.broadcast_to(reference.numpy(), embeddings.shape)
        cotangent = head_cotangent(aim, embeddings, features.norm.numpy(), "through", True)
        weights = gradcam(head_pass.vjp(cotangent))
        drawn = cam(weights.numpy(), features.activations.numpy())
    height, width = batch.shape[-2:]
    return embeddings @ reference.numpy(), resize(drawn, (height, width))


def scored(network: EmbeddingNetwork, batch: Tensor, reference: Tensor) -> np.ndarray:
    """Similarities `[b]` of inputs to one embedding."""
    embeddings = network.forward(channels_last(batch), allow_zero=True).embedding.numpy()
    found: np.ndarray = embeddings @ reference.numpy()
    return found


def channels_last(batch: Tensor) -> Tensor:
    """The same numbers as convolutions on CPUs like them."""
    return batch.contiguous(memory_format=torch.channels_last)


def torch_cam(
    metric: str, network: EmbeddingNetwork, images: Tensor, reference: Tensor, steps: int = STEPS
) -> Callable[[], dict[str, float]] | None:
    """The same metric of torch-cam with its Grad-CAM; None where it is missing."""
    try:
        from torchcam import metrics
        from torchcam.methods import GradCAM

        if metric == METRICS[0]:
            made = metrics.ClassificationMetric
        else:
            made = partial(metrics.DeletionInsertionMetric, steps=steps, batch_size=BATCH)
    except (ImportError, AttributeError):
        return None
    layer = network.module.get_submodule(network.layer)
    model = Score(network, reference).eval()

    def run() -> dict[str, float]:
        with GradCAM(model, target_layer=layer) as extractor:
            peer = made(extractor)
            for batch in images.split(BATCH):
                peer.update(batch.clone().requires_grad_(), 0)
            found: dict[str, float] = peer.summary()
        return found

    return run
