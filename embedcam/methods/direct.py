"""Any method, directly on a picture or a query, with any target: `cam_for` and `DirectWeights`."""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._checks import check_sides, whole
from .._options import Setting
from ..errors import EmbedcamWarning, EmbeddingError, InputError
from ..images import MAX_PIXELS, ImageLike, read_image
from ..images.progress import progress_of
from ..network import EmbeddingNetwork, read_by
from ..ops import cam, resize
from ..preprocess import Extent
from ..recipe.recipe import Recipe
from ..recipe.registry import LayersMethod, Method, find_method
from ..render import Tile, draw_on_axes, in_notebook, overlay
from ..targets import Direction, Target, TripletMargin, query_cotangent
from .subject import Fill, MethodOutput, Passes, Subject, inputs_a_pass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Callable[[Tensor], Tensor]
Pictures = ImageLike | Tensor | Sequence[ImageLike]


class MethodWarning(EmbedcamWarning):
    """A method that cannot answer what it is asked."""


@dataclass(frozen=True, eq=False, repr=False)
class MethodMap:
    """A method's map of one input, or of a batch of B.

    Attributes
    ----------
    cam, grid_cam
        Float32 map at the input's size, `[H W]` or `[B H W]` (over positions `[B L]`), and before
        it was resized. >= 0 but for the two guided methods, not normalized.
    weights, layer_weights
        Channel weights `[K]` or `[B K]` (of HiResCAM `[K h w]`), or those of each layer by its
        name; None for methods that have none.
    method, passes
        Its entry in `METHODS`, and the forward and backward passes spent.
    image, extent
        The upright picture and the crop box of it that the map covers; None but for one picture.
    """

    cam: np.ndarray
    grid_cam: np.ndarray
    weights: np.ndarray | None
    layer_weights: dict[str, np.ndarray] | None
    method: Method
    passes: Passes = field(default_factory=Passes)
    image: Image.Image | None = None
    extent: Extent | None = None

    def __repr__(self) -> str:
        size, grid = (" x ".join(map(str, one.shape)) for one in (self.cam, self.grid_cam))
        shape = () if self.weights is None else self.weights.shape
        channels = f"{shape[-3 if len(shape) > 2 else -1]:,}" if shape else "no"
        return f"<MethodMap: {self.method.title}, {size} from {grid}, {channels} channel weights>"

    @overload
    def plot(
        self, picture: ImageLike | None = ..., extent: Extent | None = ..., *, max_pixels: int = ...
    ) -> Image.Image: ...
    @overload
    def plot(
        self, picture: ImageLike | None = ..., extent: Extent | None = ..., *,
        max_pixels: int = ..., ax: "Axes", title: str | None = ...,
    ) -> "Axes": ...  # fmt: skip
    def plot(
        self,
        picture: ImageLike | None = None,
        extent: Extent | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
        ax: "Axes | None" = None,
        title: str | None = None,
    ) -> "Image.Image | Axes":
        """Draw the map over a picture (path, bytes, PIL, `uint8 [H W 3]`; None: grey), at its size.

        `extent` is the crop box (x0, y0, x1, y1) of the map, in the picture's pixels; None: all.
        With matplotlib axes `ax` it is drawn into them, `title` above; they are returned.
        """
        if self.cam.ndim != 2 or self.grid_cam.ndim != 2:
            shape = list(self.cam.shape)
            raise InputError(f"the map is {shape}, and one [H W] is drawn; use render.overlay")
        if picture is None:
            canvas = Image.new("RGB", self.cam.shape[::-1], (128, 128, 128))
        else:
            canvas = read_image(picture, max_pixels=max_pixels)
        signed = bool((self.cam < 0).any())
        if ax is not None:
            return draw_on_axes(ax, Tile(canvas, self.cam, extent, signed=signed), title)
        if title is not None:
            raise InputError(f"title = {title!r} is drawn into matplotlib axes; give ax, too")
        return overlay(canvas, self.cam, extent, signed=signed)

    def _repr_html_(self) -> str | None:
        if self.cam.ndim != 2 or self.grid_cam.ndim != 2:
            return None
        return in_notebook(self.plot(self.image, self.extent), self.method.title)

    def save(
        self,
        path: str | Path,
        picture: ImageLike | None = None,
        extent: Extent | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> Path:
        """Write the picture of `plot`; the file's ending chooses the format."""
        image = self.plot(picture, extent, max_pixels=max_pixels)
        try:
            image.save(path)
        except (OSError, ValueError) as error:
            reason = f"the picture cannot be written ({getattr(error, 'strerror', None) or error})"
            raise InputError(f"{path}: {reason}; name it .png or .jpg") from error
        return Path(path)


def cam_for(
    network: EmbeddingNetwork,
    images: Pictures,
    target: Target | Score,
    method: str = "gradcam",
    *,
    norm: str = "through",
    size: tuple[int, int] | int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    fill: Fill = "mean",
    progress: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> MethodMap:
    """Compute the class activation map of a target, by any method of `METHODS`.

    Parameters
    ----------
    network
        The network and the layer to explain.
    images
        The network's input as floats, `[C H W]` or a batch `[B C H W]`, an array or tensor; or a
        picture (path, bytes, PIL image, `uint8 [H W 3]`) or a list of them, preprocessed as the
        network says. With layout "bkl" always a batch: `[B C L]` or `[B L]`.
    target
        A target such as `Similarity`, or a function from embeddings `[B D]` to scores `[B]`.
    method
        A name in `METHODS`.
    norm
        The gradient "through" the L2 norm or "around" it; of a cosine both differ by a factor only.
    size
        (H, W) of the map, over positions a number; None takes the input's.
    batch_size
        Inputs a forward pass; changes nothing beyond float rounding. None: 8 on a CPU, else 32.
    seed
        Of everything random, >= 0; each image of a batch draws the same.
    fill
        What masked pixels become, and the baseline: "mean", "black", "blur", a number or a tensor.
    progress
        A bar; None shows it on a terminal or in a notebook, else logs how far it is.
    max_pixels
        A picture of more pixels is refused.
    **options
        The method's own, listed in docs/methods.md.

    Raises
    ------
    InputError
        An unknown method or option, or inputs and targets that do not fit.
    NetworkError
        A method that makes no sense for this network, with the reason.
    """
    entry, target = find_method(method), as_target(target)
    checked_options(entry, options)
    network = read_by(network, entry.reading)
    if not entry.targeted:
        warnings.warn(
            f"{entry.title} ignores the target: it shows what stands out, not what matched",
            MethodWarning,
            stacklevel=2,
        )
    if norm == "around" and (entry.scored or not entry.targeted):
        what = f"norm 'around' changes the gradient, and {entry.title} never asks for one"
        raise InputError(f"{what}; leave it out")
    usual = inputs_a_pass(network.device)
    batch_size = whole("batch_size", usual if batch_size is None else batch_size, 1)
    over_positions = network.layout_options[0] == "bkl"
    if size is not None:
        one_number = over_positions and isinstance(size, int | np.integer)
        size = check_sides("size", (1, size) if one_number else size)
    batch, single, picture = _inputs(network, images, max_pixels)
    target.check(len(batch), None)
    passes, parts = Passes(), []
    with progress_of(entry.title, None, "passes", shown=progress) as advance:
        for start in range(0, len(batch), batch_size):
            part = slice(start, start + batch_size)
            try:
                with Subject(
                    network, batch[part], target.at(part), norm=norm, batch_size=batch_size,
                    seed=seed, fill=fill, progress=advance, passes=passes,
                ) as subject:  # fmt: skip
                    parts.append(_drawn(subject, run_method(subject, entry, **options), size))
            except EmbeddingError as error:
                if not isinstance(images, str | os.PathLike):
                    raise
                raise error.of_one(os.fspath(images)) from None
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays = {name: array[0] if single else array for name, array in arrays.items()}
    extent = None
    if picture is not None and network.preprocess is not None:
        try:
            extent = network.preprocess.extent(*picture.size)
        except InputError:  # a map over the wrong part of a picture would be worse than on grey
            picture = None
    drawn, grid, weights = arrays.pop("cam"), arrays.pop("grid"), arrays.pop("weights", None)
    layers = {name.removeprefix("layer "): array for name, array in arrays.items()} or None
    return MethodMap(drawn, grid, weights, layers, entry, passes, picture, extent)


def _drawn(
    subject: Subject, output: MethodOutput, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Return a `MethodMap`'s arrays `[B ...]` by name, each layer's weights as "layer NAME"."""
    arrays = {f"layer {name}": _numpy(values) for name, values in (output.layers or {}).items()}
    if output.weights is not None:
        arrays["weights"] = _numpy(output.weights)
    if output.maps is None:
        grid = cam(arrays["weights"], _numpy(subject.activations))
    else:
        grid = _numpy(output.maps)
    sides, over_positions = subject.images.shape, subject.network.layout == "bkl"
    resized = resize(grid, size or (1 if over_positions else sides[-2], sides[-1]))
    if over_positions:
        resized, grid = resized[:, 0], grid[:, 0]
    return {**arrays, "cam": resized, "grid": grid}


def run_method(subject: Subject, method: Method, **options: Any) -> MethodOutput:
    """Run a method with its own options, checked."""
    checked = checked_options(method, options)
    with torch.inference_mode(False), torch.no_grad():
        output: MethodOutput = method.load()(subject, **checked)
    return output


def checked_options(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's own options, checked as its function's annotations declare them."""
    parameters = list(inspect.signature(method.load()).parameters.values())[1:]
    known, checked = {one.name: one.annotation for one in parameters}, {}
    for name, value in options.items():
        if name not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{method.title} has no option {name!r}; {listed}")
        for declared in getattr(known[name], "__metadata__", ()):
            if isinstance(declared, Setting):
                value = declared.checked(name, value)
        checked[name] = value
    return checked


def _inputs(
    network: EmbeddingNetwork, images: Any, max_pixels: int
) -> tuple[Tensor, bool, Image.Image | None]:
    """Return the batch of inputs, whether it was one alone, and that one where it was a picture."""
    over_positions = network.layout_options[0] == "bkl"
    if isinstance(images, Tensor | np.ndarray) and ("float" in str(images.dtype) or over_positions):
        batch = torch.as_tensor(images)
        # Signals have one axis less than pictures, tables and words one less than signals: a single
        # one of those cannot be told from a batch of the next, so positions always come in batches.
        single = batch.ndim == 3 and not over_positions
        if len(batch) == 0:
            raise InputError(f"the batch {list(batch.shape)} holds no input; give at least one")
        if single and batch.shape[0] > 4 >= batch.shape[2]:
            what = f"the input is {list(batch.shape)}, floats with channels last"
            advice = "give the network's input [C H W], or a picture as uint8 [H W 3]"
            raise InputError(f"{what}; {advice}")
        return (batch[None] if single else batch).to(network.device), single, None
    if network.preprocess is None:
        what = "the network has no preprocessing, so a picture cannot be turned into its input"
        advice = "give a float array [C H W], or EmbeddingNetwork(..., preprocess=...)"
        raise InputError(f"{what}; {advice}")
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    pictures = [read_image(one, max_pixels=max_pixels) for one in (images if several else [images])]
    if not pictures:
        raise InputError("the list of pictures is empty; give at least one")
    prepared = [np.asarray(network.preprocess(picture)) for picture in pictures]
    if len({one.shape for one in prepared}) > 1:
        raise InputError("the pictures of one batch must have one size after preprocessing")
    batch = torch.from_numpy(np.stack(prepared)).to(network.device)
    return batch, not several, None if several else pictures[0]


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu())


class FunctionTarget(Target):
    """y = function(f), any function of embeddings `[B D]` to scores `[B]`, by autograd."""

    def __init__(self, function: Score) -> None:
        self.function = function

    def score(self, embeddings: Any) -> Any:
        """Return y `[B]`, refusing anything but one finite number an image."""
        scores = self.function(embeddings)
        if not isinstance(scores, Tensor) or scores.shape != embeddings.shape[:1]:
            what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            given, n = f"{what} for embeddings {list(embeddings.shape)}", len(embeddings)
            raise InputError(f"the target returned {given}; expected one score, a tensor [{n}]")
        if not bool(torch.isfinite(scores).all()):
            raise InputError("the target returned a NaN or an infinity; give finite scores")
        return scores

    def cotangents(self, embeddings: Any) -> tuple[Any, None]:
        """Return dy/df, `[B 1 D]`."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = embeddings.detach().clone().requires_grad_()
            score = self.score(leaf)
            if not score.requires_grad:
                what = "the target's score does not depend on the embedding, or was cut from it"
                raise InputError(f"{what}; compute it with torch from the embeddings it is given")
            gradient = torch.autograd.grad(score.sum(), leaf, allow_unused=True)[0]
        return (torch.zeros_like(embeddings) if gradient is None else gradient)[:, None], None


def as_target(target: Target | Score) -> Target:
    """Return a target as it is, a callable as one."""
    if isinstance(target, Target):
        return target
    if callable(target) and not isinstance(target, type):
        return FunctionTarget(target)
    advice = "give one such as Similarity(reference), or a function from embeddings to scores"
    raise InputError(f"target is {target!r}; {advice}")


class DirectWeights:
    """Weights of a query by the recipe's own method and target, with the query as anchor.

    Its neighbors are the positives and stand for its label, which a query has none of; seeded
    random other images are the negatives. Works inside inference mode too.

    Parameters
    ----------
    network, recipe
        The network the index was built with, and its `Recipe.of_index(index.manifest)`.
    """

    def __init__(self, network: EmbeddingNetwork, recipe: Recipe) -> None:
        if not isinstance(network, EmbeddingNetwork) or not isinstance(recipe, Recipe):
            given = f"{type(network).__name__} and {type(recipe).__name__}"
            raise InputError(f"DirectWeights takes the index's network and recipe; given {given}")
        self.network, self.recipe = network, recipe

    def weights(
        self, inputs: np.ndarray | Tensor, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Return weights `[K]` of each layer, in the manifest's order, for one input `[3 H W]`.

        `positives` `[P D]` are embeddings of the neighbors, `negatives` `[Q D]` of other images.
        """
        recipe, entry, options = self.recipe, self.recipe.entry, self.recipe.method_options
        if isinstance(entry, LayersMethod):
            options["layers"] = list(recipe.layers)
        batch = torch.as_tensor(inputs)[None].to(self.network.device)
        norm = "through" if self.network.already_normalized else recipe.head_norm
        target, seed = self._target(positives, negatives, batch), recipe.seed % (1 << 63)
        with Subject(
            self.network, batch.float(), target, norm=norm, seed=seed, fill=recipe.fill
        ) as subject:
            output = run_method(subject, entry, **options)
        if output.layers is not None:
            run = self.network.run_several(batch, recipe.layers, differentiable=False)
            order = sorted(range(len(run.names)), key=lambda place: -run.depth[place])
            return [_numpy(output.layers[run.names[place]][0]) for place in order]
        return [] if output.weights is None else [_numpy(output.weights[0])]

    def _target(self, positives: np.ndarray, negatives: np.ndarray, batch: Tensor) -> Target:
        recipe = self.recipe
        if recipe.per_triplet:
            generator = np.random.default_rng(recipe.seed)
            first, second = (
                generator.integers(len(each), size=recipe.n_triplets)
                for each in (positives, negatives)
            )
            return TripletMargin(positives[first], negatives[second])
        # Affine in the anchor, so the mean over all triplets is one direction.
        query = self.network.forward(batch).embedding[0].cpu().numpy()
        target, norm = recipe.resolved_target, recipe.norm
        return Direction(query_cotangent(target, norm, query, positives, negatives))
