"""`cam_for`: any method, directly on a picture, with any target. No index needed."""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._checks import check_sides
from ..errors import EmbedcamWarning, EmbeddingError, InputError
from ..images import MAX_PIXELS, read_image
from ..images.progress import progress_of
from ..network import EmbeddingNetwork
from ..ops import cam, resize
from ..preprocess import Extent
from ..recipe.registry import Method, PositionMethod, WeightMethod, find_method
from ..render import in_notebook, overlay
from ..targets import Target
from .custom import as_target
from .options import whole_number
from .subject import Found, Passes, Subject, inputs_a_pass


class MethodWarning(EmbedcamWarning):
    """A method that cannot answer what it is asked."""


@dataclass(frozen=True, eq=False, repr=False)
class MethodMap:
    """What a method says of one input, or of a batch of B.

    Attributes:
        cam: the map at the input's size, float32 `[H W]`, or `[B H W]` for a batch; over positions
            `[B L]`. >= 0 for every method but the two guided ones, not normalised.
        grid_cam: the map before it was resized.
        weights: channel weights float32 `[K]` or `[B K]`, of HiResCAM by position, `[K h w]` or
            `[B K h w]`; None for methods that have none.
        layer_weights: for methods of several layers, each layer's weights by its name.
        method: its entry in `METHODS`.
        passes: forward and backward passes spent.
        image: the upright picture it was made of, where that was one picture; else None.
        extent: the rectangle of that picture that the map covers, as `plot` takes it.
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
        """The method and the sizes; the arrays would fill the screen."""
        drawn, grid = (" x ".join(map(str, one.shape)) for one in (self.cam, self.grid_cam))
        shape = () if self.weights is None else self.weights.shape
        channels = None if not shape else shape[-3 if len(shape) > 2 else -1]  # or by position
        return (
            f"<MethodMap: {self.method.title}, {drawn} from {grid}, "
            f"{'no' if channels is None else f'{channels:,}'} channel weights>"
        )

    def plot(
        self,
        picture: Any = None,
        extent: Extent | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> Image.Image:
        """The map over its picture, at the picture's size.

        Args:
            picture: a path, bytes, a PIL image or `uint8 [H W 3]`; None draws on grey.
            extent: (x0, y0, x1, y1) in pixels of the picture that the map covers, as
                `network.preprocess.extent(width, height)` says; None for all of it.
            max_pixels: a picture of more pixels is refused.

        Raises:
            InputError: a batch, or a map over positions.
        """
        if self.cam.ndim != 2 or self.grid_cam.ndim != 2:
            raise InputError(
                f"the map is {list(self.cam.shape)}, and one [H W] is drawn; draw those of a batch "
                "one by one with embedcam.render.overlay"
            )
        if picture is None:
            drawn = Image.new("RGB", self.cam.shape[::-1], (128, 128, 128))
        else:
            drawn = read_image(picture, max_pixels=max_pixels)
        return overlay(drawn, self.cam, extent, signed=bool((self.cam < 0).any()))

    def _repr_html_(self) -> str | None:
        """The map over its picture in notebooks; of a batch or over positions the words alone."""
        if self.cam.ndim != 2 or self.grid_cam.ndim != 2:
            return None
        return in_notebook(self.plot(self.image, self.extent), self.method.title)

    def save(
        self,
        path: str | Path,
        picture: Any = None,
        extent: Extent | None = None,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> Path:
        """Write the picture of `plot`; the file's ending chooses the format.

        Raises:
            InputError: as `plot`, or a file that cannot be written.
        """
        drawn = self.plot(picture, extent, max_pixels=max_pixels)
        try:
            drawn.save(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{path}: the picture cannot be written ({reason}); name it .png or .jpg"
            ) from error
        return Path(path)


def cam_for(
    network: EmbeddingNetwork,
    images: Any,
    target: Target | Callable[[Tensor], Tensor],
    method: str = "gradcam",
    *,
    norm: str = "through",
    size: tuple[int, int] | int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    fill: Any = "mean",
    progress: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> MethodMap:
    """The class activation map of a target, by any method of `METHODS`.

    Args:
        network: the network and the layer to explain.
        images: the network's input as floats, `[C H W]` or a batch `[B C H W]`, an array or tensor;
            or a picture (path, bytes, PIL image, `uint8 [H W 3]`) or a list of them, preprocessed
            as the network says. With layout "bkl" always a batch: `[B C L]` or `[B L]`.
        target: a score of the embedding: `Similarity`, `TripletMargin`, `NegativeDistance`,
            `ClassProxy`, `PairContribution`, `Coordinate`, or a function from embeddings `[B D]` to
            scores `[B]`.
        method: a name in `METHODS`.
        norm: the gradient "through" the L2 norm or "around" it. A cosine does not change with the
            length, so with it both differ by a factor only.
        size: (H, W) of the map, over positions a number; None takes the input's.
        batch_size: inputs a forward pass; changes nothing beyond float rounding. None takes 8 on a
            CPU, where they fit its caches, and 32 elsewhere.
        seed: of everything random; each image of a batch draws the same.
        fill: what masked pixels become, and the baseline: "mean", "black", "blur", a number or a
            tensor.
        progress: a bar; None shows it on a terminal or in a notebook, else logs how far it is.
        max_pixels: a picture of more pixels is refused.
        **options: the method's own, see its function.

    Raises:
        InputError: an unknown method or option, or inputs and targets that do not fit.
        NetworkError: a method that makes no sense for this network, with the reason.
    """
    entry, wanted = find_method(method), as_target(target)
    function = entry.load()
    check_options(entry, function, options)
    if not entry.targeted:
        warnings.warn(
            f"{entry.title} ignores the target: it shows what stands out, not what matched",
            MethodWarning,
            stacklevel=2,
        )
    if norm == "around" and (entry.scored or not entry.targeted):
        raise InputError(
            f"norm 'around' changes the gradient, and {entry.title} never asks for one; leave it "
            "out"
        )
    if batch_size is None:
        batch_size = inputs_a_pass(network.device)
    batch_size = whole_number("batch_size", batch_size, most=1 << 62)
    if size is not None:
        positions = network.layout_options[0] == "bkl" and isinstance(size, int | np.integer)
        size = check_sides("size", (1, size) if positions else size)
    batch, single, picture = _inputs(network, images, max_pixels)
    wanted.check(len(batch), None)
    made = []
    with progress_of(entry.title, None, "passes", shown=progress) as advance:
        for start in range(0, len(batch), batch_size):
            part = slice(start, start + batch_size)
            try:
                with Subject(
                    network, batch[part], wanted.at(part), norm=norm, batch_size=batch_size,
                    seed=seed, fill=fill, tick=advance,
                ) as subject:  # fmt: skip
                    made.append(_drawn(entry, subject, found_for(subject, entry, **options), size))
            except EmbeddingError as error:
                # Of a changed picture, perhaps: its place is that among many of one picture.
                if not isinstance(images, str | os.PathLike):
                    raise
                raise error.of_one(os.fspath(images)) from None
    joined = _joined(made, single)
    if picture is None or network.preprocess is None:
        return joined
    try:
        extent = network.preprocess.extent(*picture.size)
    except InputError:  # a map over the wrong part of a picture would be worse than one on grey
        return joined
    return replace(joined, image=picture, extent=extent)


def weights_for(subject: Subject, method: WeightMethod | PositionMethod, **options: Any) -> Tensor:
    """Weights of a storable method of one layer, for an index: `[B K]`, or `[B K h w]`."""
    found = found_for(subject, method, **options)
    assert found.weights is not None
    return found.weights


def found_for(subject: Subject, method: Method, **options: Any) -> Found:
    """All that a method finds, for an index."""
    function = method.load()
    check_options(method, function, options)
    with torch.inference_mode(False), torch.no_grad():
        found: Found = function(subject, **options)
    return found


def _joined(made: list[MethodMap], single: bool) -> MethodMap:
    """The pieces of a batch as one, or the only image of a batch of one."""

    def together(name: str) -> Any:
        whole = np.concatenate([getattr(one, name) for one in made])
        return whole[0] if single else whole

    first = made[0]
    layers = None
    if first.layer_weights is not None:
        layers = {
            name: np.concatenate([one.layer_weights[name] for one in made if one.layer_weights])
            for name in first.layer_weights
        }
        layers = {name: values[0] for name, values in layers.items()} if single else layers
    return MethodMap(
        together("cam"),
        together("grid_cam"),
        None if first.weights is None else together("weights"),
        layers,
        first.method,
        sum((one.passes for one in made), Passes()),
    )


def _drawn(
    entry: Method, subject: Subject, found: Found, size: tuple[int, int] | None
) -> MethodMap:
    """What was found for a piece of a batch, drawn."""
    weights = None if found.weights is None else _numpy(found.weights)
    if found.maps is None:
        assert weights is not None
        grid = cam(weights, _numpy(subject.activations))
    else:
        grid = _numpy(found.maps)
    over_positions = subject.network.layout == "bkl"
    sides = subject.images.shape[-1:] if over_positions else subject.images.shape[-2:]
    wanted = (1, sides[0]) if over_positions else (sides[0], sides[1])
    drawn = resize(grid, wanted if size is None else size)
    layers = None
    if found.layers is not None:
        layers = {name: _numpy(values) for name, values in found.layers.items()}
    if over_positions:
        drawn, grid = drawn[:, 0], grid[:, 0]
    return MethodMap(drawn, grid, weights, layers, entry, subject.passes)


def check_options(entry: Method, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse options that a method's function does not have.

    Raises:
        InputError: with those it has.
    """
    known = list(inspect.signature(function).parameters)[1:]
    for name in options:
        if name not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise InputError(f"{entry.title} has no option {name!r}; {listed}")


def _inputs(
    network: EmbeddingNetwork, images: Any, max_pixels: int
) -> tuple[Tensor, bool, Image.Image | None]:
    """The batch of inputs, whether it was one alone, and that one where it was a picture."""
    over_positions = network.layout_options[0] == "bkl"
    kind = str(getattr(images, "dtype", ""))
    if isinstance(images, Tensor | np.ndarray) and ("float" in kind or over_positions):
        batch = torch.as_tensor(images)
        # Signals have one axis less than pictures, tables and words one less than signals: a single
        # one of those cannot be told from a batch of the next, so positions always come in batches.
        single = batch.ndim == 3 and not over_positions
        if len(batch) == 0:
            raise InputError(f"the batch {list(batch.shape)} holds no input; give at least one")
        if single and batch.shape[0] > 4 >= batch.shape[2]:
            raise InputError(
                f"the input is {list(batch.shape)}, floats with channels last; give the network's "
                "input [C H W], or a picture as uint8 [H W 3]"
            )
        return (batch[None] if single else batch).to(network.device), single, None
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    if network.preprocess is None:
        raise InputError(
            "the network has no preprocessing, so a picture cannot be turned into its input; give "
            "a float array [C H W], or EmbeddingNetwork(..., preprocess=...)"
        )
    listed = list(images) if several else [images]
    if not listed:
        raise InputError("the list of pictures is empty; give at least one")
    read = [read_image(picture, max_pixels=max_pixels) for picture in listed]
    prepared = [np.asarray(network.preprocess(picture)) for picture in read]
    if len({one.shape for one in prepared}) > 1:
        raise InputError("the pictures of one batch must have one size after preprocessing")
    batch = torch.from_numpy(np.stack(prepared)).to(network.device)
    return batch, not several, None if several else read[0]


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy()
    return found
