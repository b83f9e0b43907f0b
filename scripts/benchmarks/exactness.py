"""Is one backward pass with the mean cotangent the same as the loop over triplets?

The production path is what a build runs: cached embeddings -> `AnchorCotangents` ->
`head_cotangent` -> `weights_from_pooled` or `weights_from_head`. The loop differentiates each
triplet's margin by autograd from the picture on, trunk and head and norm, at the same precision.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

from embedcam import EmbeddingNetwork
from embedcam.methods.weights import weights_from_head, weights_from_pooled
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.recipe.recipe import Recipe
from embedcam.targets import head_cotangent

from .cases import GeM, seeded, trunk_of
from .timing import section, verdict

BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
GALLERY = 24


@dataclass(frozen=True)
class Subject:
    """A network whose weights are compared."""

    name: str
    module: nn.Module
    layer: str
    size: int
    maps: Callable[[Tensor], Tensor] = lambda raw: raw


def subjects() -> list[Subject]:
    """A CNN behind average pooling, one behind GeM, and a transformer."""
    trunk, width = trunk_of("resnet18")
    pooled = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 64))
    vit = seeded(lambda: models.VisionTransformer(64, 16, 3, 4, 48, 96, num_classes=32))
    nn.init.normal_(vit.heads.head.weight, generator=torch.Generator().manual_seed(0))
    return [
        Subject("ResNet-18, average pooling", pooled.eval(), "0", 96),
        Subject("ResNet-18, GeM", seeded(lambda: GeM(trunk, width, 64)), "trunk", 96),
        Subject(
            "ViT, class token",
            vit,
            "encoder.layers.encoder_layer_2.ln_1",
            64,
            lambda raw: raw[:, 1:].transpose(1, 2).reshape(1, 48, 4, 4),
        ),
    ]


def report(anchors: int, triplets: int, chosen: list[Subject] | None = None) -> str:
    rows = []
    for subject in subjects() if chosen is None else chosen:
        for dtype, bar in BARS.items():
            subject.module.to(dtype)
            if dtype == torch.float64:
                _shake(subject.module)
            for method, normalize in product(("gradcam", "gradcam++"), (True, False)):
                off = largest_difference(subject, method, normalize, dtype, anchors, triplets)
                norm = "L2 norm" if normalize else "no norm"
                kind = str(dtype).removeprefix("torch.")
                rows.append([subject.name, kind, method, norm, f"{off:.1e}", verdict(off, bar)])
        subject.module.to(torch.float32)
    return section(
        "Exactness",
        f"The largest |w - w_ref| / |w_ref| over {anchors} images with "
        f"{triplets} triplets each; w_ref: the loop over triplets, autograd from the picture on, "
        "at the same precision.",
        ["network", "precision", "method", "norm", "difference", "bar"],
        rows,
    )


def _shake(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter *= 1 + 1e-6 * noise


def largest_difference(
    subject: Subject, method: str, normalize: bool, dtype: torch.dtype, n: int, triplets: int
) -> float:
    network = EmbeddingNetwork(
        subject.module, subject.layer, normalize=normalize, input_size=(subject.size, subject.size)
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(GALLERY, 3, subject.size, subject.size, generator=generator).to(dtype)
    features = network.forward(images)
    embeddings = features.embedding.numpy()
    anchors = AnchorCotangents(
        Recipe(method=method, triplets=triplets),
        embeddings,
        np.arange(GALLERY) % 4,
        embeddings.mean(0),
    )
    found = production(network, images[:n], anchors, features.norm[:n].numpy(), method)
    assert anchors.sampler is not None
    drawn = anchors.sampler.draw(np.arange(n))
    worst = 0.0
    for image in range(n):
        pairs = drawn[image].tolist()
        expected = literal(subject, images[image : image + 1], embeddings, pairs, method, normalize)
        off = torch.linalg.vector_norm(found[image] - expected)
        worst = max(worst, float(off / torch.linalg.vector_norm(expected)))
    return worst


def production(
    network: EmbeddingNetwork,
    images: Tensor,
    anchors: AnchorCotangents,
    lengths: np.ndarray,
    method: str,
) -> Tensor:
    """Averaged weights `[n K]` of the first images as a build computes them."""
    places = np.arange(len(images))
    cotangents = anchors.of(places)
    values = head_cotangent(
        cotangents.values, anchors.embeddings[places], lengths, "through", network.normalize
    )
    at_head = torch.from_numpy(values)
    used = None if cotangents.used is None else torch.from_numpy(cotangents.used)
    if network.pooled_replay:
        maps = network.forward(images).activations
        pooled, positive = (one.mean((-2, -1)) for one in (maps, maps.clamp(min=0)))
        positions = maps.shape[-2] * maps.shape[-1]
        return weights_from_pooled(network, pooled, positive, at_head, used, positions, method)
    with closing(network.head_pass(images)) as head_pass:
        return weights_from_head(head_pass, at_head, used, method)


def literal(
    subject: Subject,
    image: Tensor,
    embeddings: np.ndarray,
    pairs: list[tuple[int, int]],
    method: str,
    normalize: bool,
) -> Tensor:
    """The mean over triplets of each one's weights `[K]`, one backward pass a triplet."""
    kept: list[Tensor] = []
    handle = subject.module.get_submodule(subject.layer).register_forward_hook(
        lambda module, arguments, output: kept.append(output)
    )
    try:
        z = subject.module(image)[0]
    finally:
        handle.remove()
    f = z / z.norm() if normalize else z
    total = torch.zeros(())
    for positive, negative in pairs:
        p, n = (torch.from_numpy(embeddings[place]) for place in (positive, negative))
        margin = ((f - n) ** 2).sum() - ((f - p) ** 2).sum()
        (gradient,) = torch.autograd.grad(margin, kept[0], retain_graph=True)
        total = total + weights_of(subject.maps(gradient)[0], subject.maps(kept[0])[0], method)
    return (total / len(pairs)).detach()


def weights_of(gradient: Tensor, activations: Tensor, method: str) -> Tensor:
    """Grad-CAM, or Grad-CAM++ as the paper's fraction with G^2 cancelled, `[K]`."""
    if method == "gradcam":
        return gradient.mean((1, 2))
    sums = activations.relu().sum((1, 2), keepdim=True)
    positive = gradient.relu()
    return (positive / (2 + sums * positive)).sum((1, 2))
