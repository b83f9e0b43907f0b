"""Explaining a query beside only embedding it, beside a lean Grad-CAM and beside a peer."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from embedcam import EmbeddingNetwork, Explainer, Index
from embedcam.methods.weights import gradcam
from embedcam.ops import cam, resize
from embedcam.targets import head_cotangent

from .cases import ROWS, SIZE, frozen_network, index_of, linear_network, query_input
from .timing import Run, alternate, compared, milliseconds, ratio, section, verdict

NEIGHBORS = 10
BARS = {
    "search, trust, match": {"resnet50": 1.04, "mobilenet_v2": 1.08},
    "the same, detail 2": {"resnet50": 4.8, "mobilenet_v2": 5.4},
}
PEER, PEER_BAR = "pytorch-grad-cam", 2.5


class Query:
    """One preprocessed picture and the ways to treat it."""

    def __init__(self, network: EmbeddingNetwork, path: Path, image: Tensor) -> None:
        self.network, self.image = network, image
        self.explainer = Explainer(path, network, n_neighbors=NEIGHBORS)
        # Search apart: this one is told what a search found, as positions, and explains the rest.
        self.apart = Explainer(Index.open(path), network, n_neighbors=NEIGHBORS)
        self.embedding = network.forward(image[None]).embedding.numpy()
        self.found = self.explainer.index.search(self.embedding, NEIGHBORS)
        self.apart.index.search = lambda queries, count, **_: self.found  # type: ignore[method-assign]
        self.ids = self.explainer.index.ids[self.found.positions[0]]

    def embed(self) -> np.ndarray:
        """A plain forward pass: `[1 D]`."""
        with torch.inference_mode():
            z = self.network.module(self.image[None])
            return (z / torch.linalg.vector_norm(z, dim=1, keepdim=True)).numpy()

    def explain(self) -> np.ndarray:
        """The map `[H W]` at the picture's size, the neighbours already found."""
        return self.apart.explain(self.image).cam

    def explain_and_search(self) -> np.ndarray:
        """The same with the search."""
        return self.explainer.explain(self.image).cam

    def explain_finer(self) -> np.ndarray:
        """The same with a map at twice the side."""
        return self.explainer.explain(self.image, detail=2).cam

    def explain_ids(self) -> np.ndarray:
        """The same with ids that another search engine found."""
        return self.explainer.explain(self.image, neighbors=self.ids).cam

    def lean_gradcam(self) -> np.ndarray:
        """Grad-CAM of the similarity to one embedding: trunk without gradients, head alone back."""
        target = np.roll(self.embedding, 1, axis=1)
        with closing(self.network.head_pass(self.image[None])) as head_pass:
            features = head_pass.features
            cotangent = head_cotangent(
                target, features.embedding.numpy(), features.norm.numpy(), "through", True
            )
            weights = gradcam(head_pass.vjp(cotangent))[0]
            drawn = cam(weights.numpy(), features.activations[0].numpy())
        return resize(drawn, (SIZE, SIZE))

    def close(self) -> None:
        """Let go of the index."""
        self.explainer.index.close()
        self.apart.index.close()


def explain_report(name: str, rounds: int, folder: Path) -> str:
    rows = []
    for title, network in (
        ("frozen pooled vector", frozen_network(name)),
        ("linear head, 128", linear_network(name, folder)),
    ):
        path = index_of(network, folder / f"{name}-{title}")
        with closing(Query(network, path, query_input())) as query:
            cases = {
                "embedding": query.embed,
                "search apart": query.explain,
                "ids given": query.explain_ids,
                "search, trust, match": query.explain_and_search,
                "the same, detail 2": query.explain_finer,
            }
            took = alternate(cases, rounds, warmup=5, control=True)
        rows += compared(took, f"{title}: ", {case: bars.get(name) for case, bars in BARS.items()})
    return section(
        f"Explain / embedding at batch 1, {name}",
        f"From a preprocessed tensor to the map at {SIZE} x {SIZE}, {NEIGHBORS} neighbours of "
        f"{ROWS:,} rows, no rendering, {rounds} rounds, milliseconds. *Search apart*: the index is "
        "told the rows a search found before; *ids given*: `neighbors=`; *search*: FAISS Flat. All "
        "with trust and match.",
        ["case", "ms", "ratio", "bar"],
        rows,
    )


def peers_report(name: str, rounds: int, folder: Path) -> str:
    """Explain beside pytorch-grad-cam and beside a lean Grad-CAM of our own."""
    network, base = frozen_network(name), "explain, search apart"
    path = index_of(network, folder / f"{name}-peers")
    with closing(Query(network, path, query_input())) as query:
        cases = {
            "embedding": query.embed,
            base: query.explain,
            "lean Grad-CAM, head only": query.lean_gradcam,
            **_pytorch_grad_cam(network, query.image, query.embedding[0]),
        }
        took = alternate(cases, rounds, warmup=5, control=True)
    rows = []
    for case, seconds in took.items():
        over = ratio(seconds, took[base])
        told = verdict(over.median, PEER_BAR if case == PEER else None, at_least=True)
        rows.append([case, milliseconds(seconds), ratio(seconds, took["embedding"]), over, told])
    missing = "" if PEER in took else f"\n{PEER} is not installed (`pip install grad-cam`).\n"
    return (
        section(
            f"Beside other ways to a map, {name}",
            f"One picture, its pooled vector as embedding, {rounds} rounds. Both Grad-CAMs "
            "differentiate the similarity to one stored embedding.",
            ["case", "ms", "/ embedding", "/ explain", "bar"],
            rows,
        )
        + missing
    )


def _pytorch_grad_cam(
    network: EmbeddingNetwork, image: Tensor, embedding: np.ndarray
) -> dict[str, Run]:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError:
        return {}
    target = torch.from_numpy(np.roll(embedding, 1))
    peer = GradCAM(network.module, [network.module.get_submodule(network.layer)])
    aims = [lambda output: cosine_similarity(output, target, dim=-1)]
    return {PEER: lambda: peer(input_tensor=image[None], targets=aims)}
