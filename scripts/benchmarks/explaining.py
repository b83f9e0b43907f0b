"""Explaining a query beside only embedding it, beside a lean Grad-CAM and beside a peer."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedcam import EmbeddingNetwork, Explainer, Index
from embedcam.index import PartData, create, quantize_coarse
from embedcam.index.encoding import Encoding, LowRank, fit_pca
from embedcam.methods.weights import gradcam
from embedcam.offline import calibrate_index
from embedcam.offline.merge import header, layer_entry
from embedcam.ops import cam, resize
from embedcam.recipe.recipe import Recipe
from embedcam.targets import head_cotangent

from .cases import SIZE, frozen_network, linear_network, query_input
from .features import TRUST
from .timing import Case, alternate, compared, milliseconds, ratio, table, verdict

NEIGHBORS = 10
ROWS = 2000
BARS = {
    "search, trust, match": {"resnet50": 1.04, "mobilenet_v2": 1.08},
    "the same, detail 2": {"resnet50": 4.8, "mobilenet_v2": 5.4},
}
PEER_BAR = 2.5
CONTROL = "embedding again (A/A)"


def make_index(
    network: EmbeddingNetwork, path: Path, rows: int = ROWS, method: str = "gradcam"
) -> Path:
    """An index of that network whose rows are random, own maps and calibrations included."""
    features = network.forward(network.probe_images())
    channels, *grid = features.activations.shape[1:]
    coarse = (min(8, grid[0]), min(8, grid[1]))  # an index keeps at most 64 cells
    width = features.embedding.shape[1]
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    matrix = network.head_kind.matrix
    encoding: Encoding
    if matrix is not None and len(matrix) <= 128:
        encoding = LowRank(matrix, np.zeros(channels), "head")
        fields = encoding.encode_codes(rng.standard_normal((rows, len(matrix))))
    else:
        weights = rng.standard_normal((rows, channels)).astype(np.float32)
        encoding = fit_pca(weights[:256], 128)
        fields = encoding.encode(weights)
    identity = network.identity()
    described = header(
        Recipe(method=method), {**identity.to_dict(), "loading": None}, None, width,
        network.normalize,
        [layer_entry(network.layer, (grid[0], grid[1]), encoding, coarse)],
    )  # fmt: skip
    part = PartData(
        ids=[f"folder/{row:06d}.jpg" for row in range(rows)],
        labels=[f"class {row % 20}" for row in range(rows)],
        paths=[f"folder/{row:06d}.jpg" for row in range(rows)],
        embeddings=vectors,
        triplets_used=np.full(rows, 50, np.uint32),
        fields=[fields],
        coarse=[quantize_coarse(rng.random((rows, *coarse), np.float32))],
    )
    shared = {**identity.arrays(), "embedding_mean": vectors.mean(0)}
    create(path, {**described, "trust_calibration": TRUST}, [encoding.fitted], shared, part)
    calibrate_index(path)
    return path


class Query:
    """One preprocessed picture and the ways to treat it."""

    def __init__(self, network: EmbeddingNetwork, path: Path, image: Tensor) -> None:
        self.network, self.image = network, image
        self.explainer = Explainer(path, network, n_neighbors=NEIGHBORS)
        # Search apart: this one is told what a search found, as positions, and explains the rest.
        self.apart = Explainer(Index.open(path), network, n_neighbors=NEIGHBORS)
        embedding = network.forward(image[None]).embedding.numpy()
        self.embedding = embedding
        self.found = self.explainer.index.search(embedding, NEIGHBORS)
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
        query = Query(network, make_index(network, folder / f"{name}-{title}"), query_input())
        took = alternate(
            {
                "embedding": Case(query.embed),
                CONTROL: Case(query.embed),
                "search apart": Case(query.explain),
                "ids given": Case(query.explain_ids),
                "search, trust, match": Case(query.explain_and_search),
                "the same, detail 2": Case(query.explain_finer),
            },
            rounds,
            warmup=5,
        )
        query.close()
        rows += compared(took, f"{title}: ", {case: bars.get(name) for case, bars in BARS.items()})
    return (
        f"\n## Explain / embedding at batch 1, {name}\n\n"
        f"From a preprocessed tensor to the map at {SIZE} x {SIZE}, {NEIGHBORS} neighbours of "
        f"{ROWS:,} rows, no rendering, {rounds} rounds, milliseconds. *Search apart*: the index is "
        "told the rows a search found before; *ids given*: `neighbors=`; *search*: FAISS Flat. All "
        "with trust and match.\n\n" + table(["case", "ms", "ratio", "bar"], rows)
    )


def peers_report(name: str, rounds: int, folder: Path) -> str:
    """Explain beside pytorch-grad-cam and beside a lean Grad-CAM of our own."""
    network = frozen_network(name)
    query = Query(network, make_index(network, folder / f"{name}-peers"), query_input())
    cases: dict[str, Callable[[], Any]] = {
        "embedding": query.embed,
        CONTROL: query.embed,
        "explain, search apart": query.explain,
        "lean Grad-CAM, head only": query.lean_gradcam,
    }
    peer = _pytorch_grad_cam(network, query.image, query.embedding[0])
    if peer is not None:
        cases["pytorch-grad-cam"] = peer
    took = alternate({case: Case(run) for case, run in cases.items()}, rounds, warmup=5)
    query.close()
    rows = []
    for case, seconds in took.items():
        over = ratio(seconds, took["explain, search apart"])
        bar = PEER_BAR if case == "pytorch-grad-cam" else None
        rows.append(
            [
                case,
                milliseconds(seconds),
                ratio(seconds, took["embedding"]),
                over,
                verdict(over.median, bar, at_least=True),
            ]
        )
    missing = "" if peer else "\npytorch-grad-cam is not installed (`pip install grad-cam`).\n"
    return (
        f"\n## Beside other ways to a map, {name}\n\nOne picture, its pooled vector as embedding, "
        f"{rounds} rounds. Both Grad-CAMs differentiate the similarity to one stored embedding.\n\n"
        + table(["case", "ms", "/ embedding", "/ explain", "bar"], rows)
        + missing
    )


def _pytorch_grad_cam(
    network: EmbeddingNetwork, image: Tensor, embedding: np.ndarray
) -> Callable[[], Any] | None:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError:
        return None
    target = torch.from_numpy(np.roll(embedding, 1))

    def similarity(output: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(output, target, dim=-1)

    layer = network.module.get_submodule(network.layer)
    peer = GradCAM(model=network.module, target_layers=[layer])

    def run() -> Any:
        return peer(input_tensor=image[None], targets=[similarity])

    return run
