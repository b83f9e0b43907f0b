"""How a build finds weights: behind the pooled vector, by the head's derivative, or by the zoo.

A strategy is asked twice: what to keep of a batch's activations as images are embedded, and for
the weights once all embeddings are known.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from ..index import quantize_coarse
from ..methods import Subject, inputs_a_pass, run_method
from ..methods.weights import PooledHead, weights_from_head, weights_from_pooled
from ..network import EmbeddingNetwork
from ..ops import area_average, cam
from ..recipe.recipe import Recipe
from ..targets import Direction, head_cotangent
from .cotangents import Cotangents

POOLED_METHODS = ("cam", "gradcam", "gradcam++")
"""Methods whose weights, behind a global average pool, are functions of the pooled vector."""
_CELLS = 64
"""Positions of a stored map, at most."""

Arrays = Mapping[str, np.ndarray]
Layers = tuple[tuple[str, tuple[int, int]], ...]
"""Names and grids of the layers a method of several draws with, deepest first."""


@dataclass
class Strategy(ABC):
    """Find the weights of images.

    `caches` says whether activations are cached for the images' stored maps, `mixed` whether those
    are the head's D combinations of the K channels.
    """

    recipe: Recipe
    normalize: bool
    device: torch.device
    layers: Layers = field(default=(), kw_only=True)
    mixed: bool = field(default=False, kw_only=True)
    caches = False
    stage = "weights"
    """The pass that caches activations: "embed" where no second look at the images is needed."""

    def by(self, network: EmbeddingNetwork) -> Self:
        """Return the same strategy by another thread's network."""
        return self

    def embedded(self, activations: Tensor) -> dict[str, np.ndarray]:
        """Return what the embedding pass keeps of a batch's activations `[B K H W]`."""
        return {}

    @abstractmethod
    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return weights of some rows of an embedded chunk, and cached activations."""

    def cached(self, activations: Tensor) -> dict[str, np.ndarray]:
        """Return activations for stored maps, `[B C H W]` in half precision, and peaks `[B]`."""
        # Divided by the peak, so that neither large nor tiny ones leave half precision's range.
        peaks = activations.abs().amax((1, 2, 3))
        safe = torch.where(peaks > 0, peaks, 1)[:, None, None, None]
        halves = (activations / safe).to(torch.float16)
        return {"activations": to_numpy(halves), "peaks": to_numpy(peaks.float())}

    def map_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of stored maps of a layer `grid`; of several the shallowest decides."""
        return coarse_grid(self.layers[-1][1] if self.layers else grid)

    def _at_head(self, kept: Arrays, rows: slice, c: Cotangents) -> tuple[Tensor, Tensor | None]:
        """Return dy/dz, and which triplets count."""
        f, length = (np.array(kept[name][rows]) for name in ("embedding", "length"))
        values = head_cotangent(c.values, f, length, self.recipe.head_norm, self.normalize)
        at_head = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)
        return at_head, None if c.used is None else torch.from_numpy(c.used).to(self.device)

    def _with_cached(self, weights: Tensor, activations: Tensor) -> dict[str, np.ndarray]:
        cached = self.cached(activations.detach()) if self.caches else {}
        return {"weights": to_numpy(weights), **cached}


@dataclass
class PooledClosedForm(Strategy):
    """Weights as a function of the pooled vector, which stands in for a second look."""

    head: PooledHead
    stage = "embed"

    def embedded(self, activations: Tensor) -> dict[str, np.ndarray]:
        """Return the pooled vectors, and cached activations."""
        arrays = {"pooled": to_numpy(activations.mean((-2, -1)))}
        if self.recipe.method == "gradcam++":
            arrays["positive_pooled"] = to_numpy(activations.clamp(min=0).mean((-2, -1)))
        return arrays | (self.cached(activations) if self.caches else {})

    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return weights `[n K]`; no image is looked at."""
        at_head, used = self._at_head(kept, rows, along)
        pooled, positive = (
            torch.from_numpy(np.array(kept[name][rows])).to(self.device)
            for name in ("pooled", "positive_pooled" if "positive_pooled" in kept else "pooled")
        )
        of = (pooled, positive, at_head, used, int(np.prod(kept["grid"])))
        return {"weights": to_numpy(weights_from_pooled(self.head, *of, self.recipe.entry.formula))}


@dataclass
class HeadCodes(PooledClosedForm):
    """dy/dz, the code of Grad-CAM in the matrix W `[D K]` of an affine head: W^T dy/dz / Z."""

    matrix: np.ndarray

    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return dy/dz `[n D]`."""
        return {"weights": to_numpy(self._at_head(kept, rows, along)[0])}

    def cached(self, activations: Tensor) -> dict[str, np.ndarray]:
        """Return W A: a stored map needs the D combinations, not all K channels."""
        if self.mixed:
            matrix = torch.from_numpy(self.matrix).to(activations)
            activations = torch.einsum("dk,bkhw->bdhw", matrix, activations)
        return super().cached(activations)


@dataclass
class SecondLook(Strategy):
    """Weights that take another pass of the network, once all embeddings are known."""

    network: EmbeddingNetwork

    def by(self, network: EmbeddingNetwork) -> Self:
        """Return the same strategy by another thread's network."""
        other = copy.copy(self)
        other.network = network
        return other


@dataclass
class HeadDerivative(SecondLook):
    """Weights by vector-Jacobian products through the head alone, after one more forward."""

    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return weights `[n K]`, and cached activations."""
        at_head, used = self._at_head(kept, rows, along)
        with closing(self.network.head_pass(images)) as head_pass:
            weights = weights_from_head(head_pass, at_head, used, self.recipe.entry.formula)
            return self._with_cached(weights, head_pass.features.activations)


@dataclass
class ZooMethod(SecondLook):
    """Weights by any method of the zoo of one layer, by some `[n K H W]` by position."""

    batch_size: int

    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return weights, and cached activations."""
        entry = self.recipe.entry
        with self._subject(images, along) as subject:
            weights = run_method(subject, entry, **self.recipe.method_options).weights
            activations = subject.activations
        if weights is None:
            raise TypeError(f"{entry.title} has no weights of one layer")
        return self._with_cached(weights, activations)

    def _subject(self, images: np.ndarray, along: Cotangents) -> Subject:
        """Return a batch with its target as one direction an image, or a triplet."""
        # The margin is affine in the anchor's embedding: the mean over triplets is one direction.
        values = along.values if along.values.ndim == 3 else along.values[:, None]
        # A module that normalises itself knows no way but through the norm.
        norm = "through" if self.network.already_normalized else self.recipe.head_norm
        return Subject(
            self.network,
            torch.from_numpy(images).to(self.device),
            Direction(values, along.used),
            norm=norm,
            batch_size=inputs_a_pass(self.device, self.batch_size),
            seed=self.recipe.seed % (1 << 63),
            fill=self.recipe.fill,
        )


class SeveralLayers(ZooMethod):
    """Weights of each of several layers, and the stored maps they make together."""

    def weigh(self, images: np.ndarray, kept: Arrays, rows: slice, along: Cotangents) -> Arrays:
        """Return weights by layer, and stored maps."""
        names = [name for name, _ in self.layers]
        with self._subject(images, along) as subject:
            options = self.recipe.method_options
            result = run_method(subject, self.recipe.entry, layers=names, **options)
        assert result.layers is not None
        assert result.maps is not None
        found = {weights_of_layer(n): to_numpy(result.layers[name]) for n, name in enumerate(names)}
        found["own"], found["own_scales"] = stored_maps(to_numpy(result.maps.float()))
        return found


def strategy_for(
    network: EmbeddingNetwork, recipe: Recipe, *, exact: bool, batch_size: int
) -> Strategy:
    """Return the strategy of a network and a recipe; `exact` keeps dy/dz in place of weights."""
    shared, kind = (recipe, network.normalize, network.device, network), network.head_kind
    if recipe.layers:
        return SeveralLayers(*shared, batch_size, layers=_layers(network, recipe))
    if recipe.entry.formula not in POOLED_METHODS:
        return ZooMethod(*shared, batch_size)
    if exact and kind.matrix is not None:
        return HeadCodes(*shared, kind.matrix, mixed=not kind.identity)
    return PooledClosedForm(*shared) if network.pooled_replay else HeadDerivative(*shared)


def _layers(network: EmbeddingNetwork, recipe: Recipe) -> Layers:
    """Return names and grids of a recipe's layers, the deepest, the network's own, first."""
    run = network.run_several(network.probe_images(), recipe.layers, differentiable=False)
    order = sorted(range(len(run.names)), key=lambda place: -run.depth[place])
    layers = tuple((run.names[place], run.layouts[place].grid) for place in order)
    deepest = layers[0][0]
    if deepest != network.layer:
        raise RecipeError(
            f"the deepest of layers = {list(recipe.layers)!r} is {deepest!r}, and the network "
            f"explains {network.layer!r}; name that one as the deepest, or load the network with "
            f"layer {deepest!r}"
        )
    return layers


def is_derived(recipe: Recipe, normalize: bool) -> bool:
    """Return whether dy/dz is the stored embedding less the mean: centred, not through a norm."""
    return recipe.resolved_target == "centred" and (recipe.norm == "around" or not normalize)


def is_exact(recipe: Recipe, matrix: np.ndarray | None, normalize: bool = True) -> bool:
    """Return whether dy/dz in the head's own matrix W `[D K]`, if it has one, is all there is."""
    # Grad-CAM behind a pooled affine head is W^T dy/dz / Z, also averaged over triplets. A code
    # that is derived from the stored embedding takes no room, whatever its width.
    if matrix is None or recipe.encoding != "low-rank" or recipe.entry.formula != "gradcam":
        return False
    return is_derived(recipe, normalize) or len(matrix) <= recipe.rank


def weights_of_layer(number: int) -> str:
    """Return the name of a layer's array in a chunk of weights."""
    return "weights" if number == 0 else f"weights{number}"


def stored_maps(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coarse maps as bytes `[n h w]` with one scale each: map = bytes * scale / 255."""
    return quantize_coarse(area_average(maps, coarse_grid(maps.shape[1:])))


def maps_of(weights: np.ndarray, cached: Arrays) -> np.ndarray:
    """Draw maps `[n H W]` of some cached activations by what multiplies them."""
    # NumPy widens halves twenty times slower than torch does.
    activations = torch.from_numpy(np.array(cached["activations"])).float().numpy()
    # Times the peaks afterwards: a map scales with its activations.
    maps = cam(np.asarray(weights, np.float32), activations)
    return np.asarray(maps * np.asarray(cached["peaks"])[:, None, None])


def coarse_grid(grid: tuple[int, ...]) -> tuple[int, int]:
    """Return the layer's own grid, or the largest of its shape with at most 64 positions."""
    height, width = grid
    if height * width <= _CELLS:
        return height, width
    shrink = (_CELLS / (height * width)) ** 0.5
    rows = max(1, min(height, _CELLS, int(height * shrink)))
    return rows, max(1, min(width, _CELLS // rows, round(width * shrink) or 1))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array in main memory."""
    return tensor.detach().cpu().numpy()
