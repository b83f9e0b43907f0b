"""What the method zoo is tested on: small networks, a picture that is not square, and targets.

An oracle gets a `Case` and returns an `Expected`. It is written as slow loops from the paper, in
float64, and uses nothing of embedcam: only `case.trunk`, `case.head`, `case.embedding` and
`case.score`. Each file zoo_<family>.py has a dict `ORACLES` of its methods' oracles by name.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcam import METHODS, EmbeddingNetwork, cam_for
from embedcam.methods import MethodOutput, MethodWarning, Subject, run_method
from embedcam.targets import Direction, Similarity, Target, TripletMargin

SIZE = (12, 18)
WIDTH = 3
CHANNELS = 6


@dataclass
class Expected:
    """What a method should find for one image: weights `[K]` or `[K h w]`, map `[h w]`, or both."""

    weights: np.ndarray | None = None
    map: np.ndarray | None = None
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def parts(self) -> list[np.ndarray]:
        """All there is: weights, map, weights of layers by name."""
        kept = [part for part in (self.weights, self.map) if part is not None]
        return [*kept, *(self.layers[name] for name in sorted(self.layers))]


class Pooled(nn.Module):
    """Average pooling, a linear map with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((-2, -1)))


class Curved(nn.Module):
    """A head that is neither pooled nor affine: a convolution, a bend, a power mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS, 5, 3, padding=1)
        self.linear = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        bent = torch.nn.functional.softplus(self.mix(x))
        return self.linear((bent**3).mean((-2, -1)) ** (1 / 3))


def trunk(signed: bool = False) -> nn.Sequential:
    """`[B 3 12 18]` -> `[B 6 4 6]`; stages 0-1 and 2-3 for methods of several layers."""
    last: nn.Module = nn.Tanh() if signed else nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=1, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3),
        nn.Conv2d(5, CHANNELS, 3, padding=1),
        last,
    )


@dataclass
class Case:
    """One network, one picture, one target; `scores` are the target's triplets, y their mean."""

    network: EmbeddingNetwork
    module: Any
    image: Tensor
    target: Target
    scores: list[Callable[[Tensor], Tensor]]

    def trunk(self, image: Tensor) -> Tensor:
        """A `[K h w]` of an input `[C H W]`."""
        return self.module.features(image[None])[0]

    def head(self, activations: Tensor) -> Tensor:
        """z `[D]` of activations `[K h w]`, before the norm."""
        return self.module.head(activations[None])[0]

    def embedding(self, z: Tensor) -> Tensor:
        """f = z / |z| where the network normalises."""
        return z / z.norm() if self.network.normalize else z

    def score(self, z: Tensor) -> Tensor:
        """y of a head output `[D]`, through the norm."""
        f = self.embedding(z)
        return torch.stack([score(f) for score in self.scores]).mean()

    def score_of_image(self, image: Tensor) -> float:
        """y of an input `[C H W]`."""
        with torch.no_grad():
            return float(self.score(self.head(self.trunk(image))))

    def gradient(self, image: Tensor, triplet: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A and dy/dA `[K h w]` by full autograd, of y or of one of its triplets."""
        leaf = self.trunk(image).detach().clone().requires_grad_()
        z = self.head(leaf)
        y = self.score(z) if triplet is None else self.scores[triplet](self.embedding(z))
        (found,) = torch.autograd.grad(y, leaf)
        return leaf.detach().numpy(), found.numpy()

    def with_image(self, image: Tensor) -> "Case":
        """The same with another picture."""
        return replace(self, image=image)


def make(
    head: str = "pooled",
    target: str = "similarity",
    *,
    normalize: bool = True,
    signed: bool = False,
    seed: int = 0,
) -> Case:
    """A case with a "pooled" or "curved" head and a "similarity", "dot" or "triplets" target."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    module = nn.Sequential()
    module.add_module("features", trunk(signed))
    module.add_module("head", Pooled() if head == "pooled" else Curved())
    module.double().eval()
    image = torch.randn(3, *SIZE, dtype=torch.float64)
    points = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    torch.random.set_rng_state(state)
    points = points / points.norm(dim=-1, keepdim=True)
    network = EmbeddingNetwork(module, "features", normalize=normalize)
    reference = points[0, 0]
    if target == "triplets":
        aim: Target = TripletMargin(points[0], points[1])
        scores = [
            lambda f, p=p, n=n: ((f - n) ** 2).sum() - ((f - p) ** 2).sum()
            for p, n in zip(points[0], points[1], strict=True)
        ]
    elif target == "dot":
        aim, scores = Direction(reference), [lambda f: (f * reference).sum()]
    else:
        aim, scores = Similarity(reference), [lambda f: (f * reference).sum() / f.norm()]
    return Case(network, module, image, aim, scores)


# Enough for the law at hand; a mask, a sample or a step more changes no law.
QUICK: dict[str, dict[str, Any]] = {"rise": {"masks": 20}, "lime": {"samples": 30}}


def made(name: str, network: Any, images: Any, target: Any, **options: Any) -> Any:
    """A map without the warning of methods that ignore the target."""
    if name == "polycam":
        options.setdefault("layers", ["features.1", "features"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)
        return cam_for(
            network, images, target, name, progress=False, **{**QUICK.get(name, {}), **options}
        )


def run_on(
    network: Any, images: Any, target: Any, name: str, **options: Any
) -> tuple[MethodOutput, Subject]:
    """What a method returns for a batch, and the subject with its passes."""
    settings = {k: options.pop(k) for k in ("batch_size", "seed", "fill", "norm") if k in options}
    if name == "polycam":
        options.setdefault("layers", ["features.1", "features"])
    with Subject(network, images, target, **settings) as subject:
        return run_method(subject, METHODS[name], **options), subject


def run(case: Case, name: str, images: Any = None, **options: Any) -> tuple[MethodOutput, Subject]:
    """`run_on` a case's own network and target, and its picture or others."""
    images = case.image[None] if images is None else images
    return run_on(case.network, images, case.target, name, **options)


def parts(output: MethodOutput, row: int = 0) -> list[np.ndarray]:
    """What a method returned for one image, in the order of `Expected.parts`."""
    kept = [part for part in (output.weights, output.maps) if part is not None]
    kept += [output.layers[name] for name in sorted(output.layers or {})]
    return [part[row].detach().numpy() for part in kept]


def distance(expected: Expected, output: MethodOutput, row: int = 0) -> float:
    """The largest difference, relative to the largest number of weights or map."""
    found = parts(output, row)
    assert [part.shape for part in expected.parts] == [part.shape for part in found]
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))
        for a, b in zip(expected.parts, found, strict=True)
    )
