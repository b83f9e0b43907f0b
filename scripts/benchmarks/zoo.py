"""Every method beside the same one of pytorch-grad-cam and torch-cam, and online beside itself."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcam import METHODS, EmbeddingNetwork, Explainer, Similarity, cam_for
from embedcam.methods import Subject
from embedcam.recipe.registry import WeightMethod

from .cases import SIZE, frozen_network, query_input
from .explaining import make_index
from .timing import Case, alternate, milliseconds, peak_of, ratio, table, verdict

GRADCAM_BAR, MEMORY_BAR, SVD_BAR = 2.5, 0.25, 3
SLOW = ("scorecam", "ablationcam")
GRAD_CAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
}
TORCH_CAM = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMpp",
    "smoothgradcam++": "SmoothGradCAMpp",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "scorecam": "ScoreCAM",
}


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
    for name in sorted(GRAD_CAM | TORCH_CAM, key=list(METHODS).index):
        model, repeat = (slow, 2) if name in SLOW else (fast, rounds)
        rows += _beside_peers(name, model, repeat)
    return (
        f"\n## Methods beside their peers\n\nOne picture of {SIZE} x {SIZE}, the similarity to one "
        f"embedding; {fast}, and {slow} for methods of a pass a channel. *Ratio*: peer / embedcam, "
        "above 1 the peer is slower.\n\n"
        + table(["method", "network", "embedcam, ms", "peer", "ms", "ratio", "bar"], rows)
    )


def _beside_peers(name: str, model: str, rounds: int) -> list[list[Any]]:
    network = frozen_network(model)
    image = query_input()
    reference = network.forward(image[None]).embedding[0].roll(1)
    options = {"samples": 4} if name == "smoothgradcam++" else {}

    def ours() -> Any:
        return cam_for(network, image, Similarity(reference), name, progress=False, **options)

    with warnings.catch_warnings():
        # Peers warn of hooks and ours of methods that ignore the target.
        warnings.simplefilter("ignore")
        cases = {"embedcam": ours, **_peers(name, network, image, reference)}
        took = alternate({case: Case(run) for case, run in cases.items()}, rounds, warmup=1)
    rows = []
    for peer in list(cases)[1:]:
        over = ratio(took[peer], took["embedcam"])
        bar = GRADCAM_BAR if (name, peer) == ("gradcam", "pytorch-grad-cam") else 1.0
        rows.append(
            [METHODS[name].title, model, milliseconds(took["embedcam"]), peer,
             milliseconds(took[peer]), over, verdict(over.median, bar, at_least=True)]
        )  # fmt: skip
    return rows


def _peers(
    name: str, network: EmbeddingNetwork, image: Tensor, reference: Tensor, batch: int = 32
) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    layer = network.module.get_submodule(network.layer)
    scored = Score(network, reference).eval()
    if name in GRAD_CAM:
        try:
            import pytorch_grad_cam
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            peer = getattr(pytorch_grad_cam, GRAD_CAM[name])(model=scored, target_layers=[layer])
            if hasattr(peer, "batch_size"):
                peer.batch_size = batch
            aims = [ClassifierOutputTarget(0)]
            found["pytorch-grad-cam"] = lambda: peer(input_tensor=image[None], targets=aims)
        except ImportError:
            pass
    if name in TORCH_CAM:
        try:
            from torchcam import methods

            made = getattr(methods, TORCH_CAM[name])

            def run() -> Any:
                with made(scored, target_layer=layer) as extractor:
                    batch = image[None].clone().requires_grad_(name != "scorecam")
                    scores = scored(batch)
                    return extractor(0, scores)

            found["torch-cam"] = run
        except ImportError:
            pass
    return found


def decomposition_report(rounds: int) -> str:
    """Eigen-CAM's truncated decomposition beside a thin and a full SVD."""
    rows = []
    for channels, grid in ((2048, (7, 7)), (1280, (7, 7)), (512, (28, 28)), (2048, (14, 14))):
        activations = torch.randn(1, channels, *grid).relu()
        trunk, head = (lambda x, a=activations: a), (lambda a: a.mean((2, 3)))
        network = EmbeddingNetwork.from_parts(trunk, head)
        image = torch.zeros(1, 3, SIZE, SIZE)

        target = Similarity(np.ones(channels))

        def ours(
            network: EmbeddingNetwork = network, image: Tensor = image, target: Similarity = target
        ) -> Any:
            with Subject(network, image, target) as subject, torch.no_grad():
                return METHODS["eigencam"].load()(subject)

        def svd(full: bool, activations: Tensor = activations) -> Any:
            return torch.linalg.svd(activations.flatten(2).mT, full_matrices=full)

        cases = {"full": partial(svd, True), "thin": partial(svd, False), "embedcam": ours}
        took = alternate({name: Case(run) for name, run in cases.items()}, rounds, warmup=2)
        for name in ("full", "thin"):
            over = ratio(took[name], took["embedcam"])
            rows.append(
                [f"{channels} x {grid[0]} x {grid[1]}", name, milliseconds(took[name]),
                 milliseconds(took["embedcam"]), over,
                 verdict(over.median, SVD_BAR, at_least=True) if name == "full" else ""]
            )  # fmt: skip
    return (
        "\n## Eigen-CAM\n\nBeside `torch.linalg.svd` with full matrices and without (thin).\n\n"
        + table(["activations", "SVD", "SVD, ms", "Eigen-CAM, ms", "ratio", "bar"], rows)
    )


def memory_report(model: str) -> str:
    """Peak memory of Score-CAM in a process of its own, beside pytorch-grad-cam's."""
    grown = {
        which: peak_of(f"from scripts.benchmarks.zoo import once\nonce({model!r}, {which!r})")
        for which in ("none", "embedcam", "embedcam, 16", "pytorch-grad-cam")
    }
    own, alike, peer = (
        grown[which] - grown["none"] for which in ("embedcam", "embedcam, 16", "pytorch-grad-cam")
    )
    share = own / peer if peer else float("nan")
    return (
        f"\n## Peak memory of Score-CAM, {model}\n\nGrowth of the resident set over one embedding "
        f"in a process of its own, each with its own batches (8 and 16): embedcam {own:.0f} MB, "
        f"pytorch-grad-cam {peer:.0f} MB, share {share:.2f} ({verdict(share, MEMORY_BAR)}). "
        f"embedcam with batches of 16 too: {alike:.0f} MB, {alike / peer if peer else peer:.2f}.\n"
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
    explainers = {}
    for name in (n for n, m in METHODS.items() if isinstance(m, WeightMethod) and not m.trained):
        path = make_index(network, folder / f"online-{name}", method=name)
        explainers[name] = Explainer(path, network, n_neighbors=10)
    cases = {name: Case(lambda e=e: e.explain(image)) for name, e in explainers.items()}
    first = next(iter(cases))
    took = alternate(
        {first: cases[first], f"{first} again (A/A)": cases[first], **cases}, rounds, 3
    )
    for explainer in explainers.values():
        explainer.index.close()
    rows = []
    for name, seconds in took.items():
        over = ratio(seconds, took[first])
        rows.append([name, milliseconds(seconds), over, _within(over.median)])
    return (
        f"\n## Online, every storable method, {model}\n\nExplaining one query, search included, "
        "from indexes that name each method, low-rank 128.\n\n"
        + table(["method", "ms", f"/ {first}", "bar"], rows)
    )


def _within(value: float) -> str:
    return f"within 5%: {'met' if abs(value - 1) <= 0.05 else '**not met**'}"
