"""Every method beside the same one of pytorch-grad-cam and torch-cam, and online beside itself."""

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedcam import METHODS, EmbeddingNetwork, Explainer, Similarity, cam_for
from embedcam.methods import Subject
from embedcam.recipe.registry import WeightMethod

from .cases import SIZE, frozen_network, index_of, query_input
from .timing import Run, alternate, milliseconds, peak_of, ratio, section, verdict

GRADCAM_BAR, MEMORY_BAR, SVD_BAR = 2.5, 0.25, 3
SLOW = ("scorecam", "ablationcam")
PEERS = {
    "gradcam": ("GradCAM", "GradCAM"),
    "gradcam++": ("GradCAMPlusPlus", "GradCAMpp"),
    "smoothgradcam++": (None, "SmoothGradCAMpp"),
    "xgradcam": ("XGradCAM", "XGradCAM"),
    "hirescam": ("HiResCAM", None),
    "layercam": ("LayerCAM", "LayerCAM"),
    "eigencam": ("EigenCAM", None),
    "eigengradcam": ("EigenGradCAM", None),
    "scorecam": ("ScoreCAM", "ScoreCAM"),
    "ablationcam": ("AblationCAM", None),
}
"""What pytorch-grad-cam and torch-cam call each method."""


class Score(nn.Module):
    """The cosine similarity to one embedding as the only class of a classifier."""

    def __init__(self, network: EmbeddingNetwork, reference: Tensor) -> None:
        super().__init__()
        self.network, self.reference = network.module, reference

    def forward(self, images: Tensor) -> Tensor:
        """Scores `[B 1]`."""
        z = self.network(images)
        return nn.functional.cosine_similarity(z, self.reference, dim=-1)[:, None]


def peers_report(fast: str, slow: str, rounds: int) -> str:
    """Each method beside its peers, in alternating runs."""
    rows = []
    for name in sorted(PEERS, key=list(METHODS).index):
        model, repeat = (slow, 2) if name in SLOW else (fast, rounds)
        rows += _beside_peers(name, model, repeat)
    return section(
        "Methods beside their peers",
        f"One picture of {SIZE} x {SIZE}, the similarity to one embedding; {fast}, and {slow} for "
        "methods of a pass a channel. *Ratio*: peer / embedcam, above 1 the peer is slower.",
        ["method", "network", "embedcam, ms", "peer", "ms", "ratio", "bar"],
        rows,
    )


def _beside_peers(name: str, model: str, rounds: int) -> list[list[object]]:
    network, image = frozen_network(model), query_input()
    reference = network.forward(image[None]).embedding[0].roll(1)
    options = {"samples": 4} if name == "smoothgradcam++" else {}
    ours = partial(cam_for, network, image, Similarity(reference), name, progress=False, **options)
    with warnings.catch_warnings():
        # Peers warn of hooks and ours of methods that ignore the target.
        warnings.simplefilter("ignore")
        peers = _peers(name, network, image, reference)
        took = alternate({"embedcam": ours, **peers}, rounds)
    rows: list[list[object]] = []
    for peer in peers:
        over = ratio(took[peer], took["embedcam"])
        bar = GRADCAM_BAR if (name, peer) == ("gradcam", "pytorch-grad-cam") else 1.0
        rows.append(
            [METHODS[name].title, model, milliseconds(took["embedcam"]), peer,
             milliseconds(took[peer]), over, verdict(over.median, bar, at_least=True)]
        )  # fmt: skip
    return rows


def _peers(
    name: str, network: EmbeddingNetwork, image: Tensor, reference: Tensor, batch: int = 32
) -> dict[str, Run]:
    found: dict[str, Run] = {}
    layer = network.module.get_submodule(network.layer)
    scored = Score(network, reference).eval()
    grad_cam, torch_cam = PEERS[name]
    try:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        if grad_cam:
            peer = getattr(pytorch_grad_cam, grad_cam)(model=scored, target_layers=[layer])
            if hasattr(peer, "batch_size"):
                peer.batch_size = batch
            aims = [ClassifierOutputTarget(0)]
            found["pytorch-grad-cam"] = lambda: peer(input_tensor=image[None], targets=aims)
    except ImportError:
        pass
    try:
        from torchcam import methods

        if torch_cam:
            made = getattr(methods, torch_cam)

            def run() -> None:
                with made(scored, target_layer=layer) as extractor:
                    batch = image[None].clone().requires_grad_(name != "scorecam")
                    extractor(0, scored(batch))

            found["torch-cam"] = run
    except ImportError:
        pass
    return found


def decomposition_report(rounds: int) -> str:
    """Eigen-CAM's truncated decomposition beside a thin and a full SVD."""
    rows: list[list[object]] = []
    for channels, grid in ((2048, (7, 7)), (1280, (7, 7)), (512, (28, 28)), (2048, (14, 14))):
        activations = torch.randn(1, channels, *grid).relu()
        matrix, target = activations.flatten(2).mT, Similarity(np.ones(channels))
        trunk, head = (lambda x, a=activations: a), (lambda a: a.mean((2, 3)))
        network = EmbeddingNetwork.from_parts(trunk, head)
        subject = Subject(network, torch.zeros(1, 3, SIZE, SIZE), target)
        subject.features  # noqa: B018  # the forward pass is no part of what is timed
        cases: dict[str, Run] = {
            "full": partial(torch.linalg.svd, matrix, full_matrices=True),
            "thin": partial(torch.linalg.svd, matrix, full_matrices=False),
            "embedcam": partial(METHODS["eigencam"].load(), subject),
        }
        with torch.no_grad():
            took = alternate(cases, rounds, warmup=2)
        for name in ("full", "thin"):
            over = ratio(took[name], took["embedcam"])
            rows.append(
                [f"{channels} x {grid[0]} x {grid[1]}", name, milliseconds(took[name]),
                 milliseconds(took["embedcam"]), over,
                 verdict(over.median, SVD_BAR if name == "full" else None, at_least=True)]
            )  # fmt: skip
    return section(
        "Eigen-CAM",
        "Beside `torch.linalg.svd` with full matrices and without (thin).",
        ["activations", "SVD", "SVD, ms", "Eigen-CAM, ms", "ratio", "bar"],
        rows,
    )


def memory_report(model: str) -> str:
    """Peak memory of Score-CAM in a process of its own, beside pytorch-grad-cam's."""
    none, own, alike, peer = (
        peak_of(f"from scripts.benchmarks.zoo import once\nonce({model!r}, {which!r})")
        for which in ("none", "embedcam", "embedcam, 16", "pytorch-grad-cam")
    )
    own, alike, peer = own - none, alike - none, (peer - none) or float("nan")
    return (
        f"\n## Peak memory of Score-CAM, {model}\n\nGrowth of the resident set over one embedding "
        f"in a process of its own, each with its own batches (8 and 16): embedcam {own:.0f} MB, "
        f"pytorch-grad-cam {peer:.0f} MB, share {own / peer:.2f} "
        f"({verdict(own / peer, MEMORY_BAR)}). "
        f"embedcam with batches of 16 too: {alike:.0f} MB, {alike / peer:.2f}.\n"
    )


def once(model: str, which: str) -> None:
    """Compute one Score-CAM or, with "none", one embedding."""
    network, image = frozen_network(model), query_input()
    reference = network.forward(image[None]).embedding[0].roll(1)
    if which.startswith("embedcam"):
        batch = 16 if which.endswith("16") else None
        cam_for(network, image, Similarity(reference), "scorecam", batch_size=batch, progress=False)
    elif which != "none":
        _peers("scorecam", network, image, reference, batch=16)[which]()


def online_report(model: str, rounds: int, folder: Path) -> str:
    """Explaining from indexes built with different methods costs the same: only bytes differ."""
    network, image = frozen_network(model), query_input()
    names = [
        n
        for n, m in METHODS.items()
        if isinstance(m, WeightMethod) and not (m.trained or m.attends)
    ]
    explainers = {
        name: Explainer(
            index_of(network, folder / f"online-{name}", method=name), network, n_neighbors=10
        )
        for name in names
    }
    cases = {name: partial(one.explain, image) for name, one in explainers.items()}
    took = alternate(cases, rounds, 3, control=True)
    for explainer in explainers.values():
        explainer.close()
    rows: list[list[object]] = []
    for name, seconds in took.items():
        over = ratio(seconds, took[names[0]])
        met = "met" if abs(over.median - 1) <= 0.05 else "**not met**"
        rows.append([name, milliseconds(seconds), over, f"within 5%: {met}"])
    return section(
        f"Online, every storable method, {model}",
        "Explaining one query, search included, from indexes that name each method, low-rank 128.",
        ["method", "ms", f"/ {names[0]}", "bar"],
        rows,
    )
