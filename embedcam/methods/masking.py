"""Methods that mask pixels or take channels away, and watch the score; masks and fills.

Score-CAM, Ablation-CAM and Poly-CAM weigh channels; RISE, LIME and SBSM know nothing of the layer
and draw maps at the size of the input.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_sides, one_of, whole
from .._options import Setting
from ..errors import InputError, NetworkError
from ..network.runner import listed, not_finite
from ..ops import sharpen
from ..preprocess import AnyPreprocess
from ..recipe.registry import FILLS
from .subject import Fill, Layers, MethodOutput, Subject

BLUR_SIZE, BLUR_SIGMA = 51, 50.0
Masks = Callable[[slice], Tensor]
MaskedScores = Callable[[int, Masks], Tensor]
"""Scores `[n]` of one image through n masks `[n H W]`, made a slice at a time."""


def fill_like(image: Tensor, fill: Fill, preprocess: AnyPreprocess | None = None) -> Tensor:
    """Return what masked pixels of one input become, of its shape `[C H W]`.

    "mean" is 0, the mean color; "black" -mean/std of the `preprocess`; "blur" the blurred image; a
    number, tensor or array as it is, broadcast.
    """
    if isinstance(fill, str) and fill in FILLS:
        if fill == "mean":
            return torch.zeros_like(image)
        if image.ndim != 3:
            raise InputError(
                f"fill {fill!r} is for pictures [C H W], and this network's inputs are "
                f"{list(image.shape)}; use 'mean' or a number"
            )
        if fill == "blur":
            return blurred(image)
        mean, std = (getattr(preprocess, name, None) for name in ("mean", "std"))
        if mean is None or std is None:
            raise InputError("fill 'black' needs a preprocessing with mean and std; use 'mean'")
        fill = (-image.new_tensor(mean) / image.new_tensor(std))[:, None, None]
    known = isinstance(fill, Tensor | np.ndarray | np.generic | int | float)
    if not known or isinstance(fill, bool | np.bool_ | str):
        names = ", ".join(FILLS)
        raise InputError(f"fill = {fill!r} is unknown; use {names}, a number, a tensor or an array")
    try:
        numbers = fill if isinstance(fill, Tensor) else torch.as_tensor(np.array(fill))
    except TypeError as error:
        given = np.asarray(fill).dtype
        raise InputError(f"fill is an array of {given}, unknown to torch; give float32") from error
    if numbers.is_complex():
        raise InputError(f"fill is of {numbers.dtype}; give real numbers")
    try:
        whole = numbers.to(image).expand_as(image)
    except RuntimeError as error:
        fits = [len(image), *[1] * (image.ndim - 1)]
        raise InputError(
            f"fill has shape {list(numbers.shape)}, which does not broadcast to one input "
            f"{list(image.shape)}; give a number, or a tensor such as {fits}"
        ) from error
    if not bool(torch.isfinite(whole).all()):
        raise InputError(f"fill holds NaN or infinity in {image.dtype}; give finite numbers")
    return whole


def fill_of(subject: Subject, row: int) -> Tensor:
    """Return the subject's fill for one of its images, `[C H W]`."""
    return fill_like(subject.images[row], subject.fill, subject.network.preprocess)


def blurred(image: Tensor, size: int = BLUR_SIZE, sigma: float = BLUR_SIGMA) -> Tensor:
    """Blur `[C H W]`, Gaussian with reflected borders; the kernel shrinks to fit small inputs."""
    for axis in (-2, -1):
        reach = min(size // 2, image.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        down = axis == -2
        padding = (0, 0, reach, reach) if down else (reach, reach, 0, 0)
        padded = F.pad(image[None], padding, mode="reflect")[0][:, None]
        image = F.conv2d(padded, kernel.reshape(1, 1, *((-1, 1) if down else (1, -1))))[:, 0]
    return image


def unit_masks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return m = N(U(A)): maps `[n h w]` resized, min-max to [0, 1]; flat ones become zeros."""
    resized = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = resized.amin((-2, -1), keepdim=True), resized.amax((-2, -1), keepdim=True)
    span = high - low
    uneven = (span > 0) & ~flat(maps)[:, None, None]
    return (resized - low) / torch.where(span > 0, span, 1) * uneven


def flat(maps: Tensor) -> Tensor:
    """Return which of the maps `[... h w]` have one value everywhere, `[...]`."""
    return maps.amin((-2, -1)) == maps.amax((-2, -1))


def pictures_only(subject: Subject, title: str) -> None:
    """Refuse inputs without a height and a width, whose regions cannot be masked."""
    if subject.network.layout_options[0] == "bkl" or subject.images.ndim != 4:
        raise NetworkError(
            f"{title} masks regions of a picture [C H W], and this network's inputs are "
            f"{list(subject.images.shape[1:])}; use 'ablationcam'"
        )


def masked_scores(
    subject: Subject, row: int, shown: Tensor, hidden: Tensor, total: int, masks: Masks
) -> Tensor:
    """Return y `[total]` of X m + F (1 - m), `masks` making m `[n H W]` of each slice."""
    pieces = (hidden + (shown - hidden) * masks(part)[:, None] for part in subject.batches(total))
    return subject.scores(row, pieces)


def map_scores(subject: Subject, row: int, maps: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
    """Return y `[n]` of `shown` over `hidden` through N(U(map)) `[n h w]`; 0 for flat maps."""
    scores, seen = maps.new_zeros(len(maps)), ~flat(maps)
    if seen.any():
        uneven, size = maps[seen], (shown.shape[-2], shown.shape[-1])
        scores[seen] = masked_scores(
            subject, row, shown, hidden, len(uneven), lambda part: unit_masks(uneven[part], size)
        ).to(scores)
    return scores


def pixel_maps(subject: Subject, draw: Callable[[int, MaskedScores], Tensor]) -> MethodOutput:
    """Return a map of each image at its size, which `draw` makes of scores through masks."""
    maps = subject.features.embedding.new_zeros(len(subject), *subject.images.shape[-2:])
    for row, image in enumerate(subject.images):
        maps[row] = draw(row, partial(masked_scores, subject, row, image, fill_of(subject, row)))
    return MethodOutput(maps=maps.clamp(min=0))


# Numbers of activations put through the head at once; each piece may cost a run of the trunk.
_AT_ONCE = 1 << 24


def scorecam(
    subject: Subject,
    *,
    weights: Annotated[str, Setting(kind=str, choices=("raw", "softmax"))] = "raw",
    temperature: Annotated[float, Setting(kind=float, above=0)] = 1.0,
) -> MethodOutput:
    """Score-CAM: w_k = f(X m_k) - f(X_b), m_k = N(U(A_k)) (Wang et al. 2020, definitions 2 and 3).

    The baseline X_b is the fill; `weights="softmax"` is algorithm 1's, of w / `temperature`.
    """
    if weights == "raw" and temperature != 1:
        what = f"temperature = {temperature!r} is for a softmax"
        raise InputError(f"{what}; give weights='softmax' with it")
    pictures_only(subject, "Score-CAM")
    activations = subject.activations
    result = torch.zeros_like(activations[:, :, 0, 0])
    for row, maps in enumerate(activations):
        seen = ~flat(maps)
        if not seen.any():
            continue
        fill = fill_of(subject, row)
        scores = map_scores(subject, row, maps[seen], subject.images[row], fill)
        scores = scores - subject.scores(row, [fill[None]]).to(scores)
        if weights == "softmax":
            scores = torch.softmax(scores / temperature, 0)
        result[row, seen] = scores
    return MethodOutput(result)


def ablationcam(subject: Subject) -> MethodOutput:
    """Ablation-CAM: w_k = y - y_k, y_k with channel k set to 0 (Desai and Ramaswamy 2020, eq. 3).

    In closed form z - p_k W_k behind average pooling and an affine head, else by the head alone.
    """
    features = subject.features
    subject.passes.forwards += subject.network.check_tokens(subject.images)
    matrix = _affine_head(subject)
    weights = torch.zeros_like(features.activations[:, :, 0, 0])
    for row, maps in enumerate(features.activations):
        kept = maps.flatten(1).any(1).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        target, score = subject.target.at(row), subject.score(row)
        for channels, z in _ablated(subject, row, kept, matrix):
            usable = _usable(z, channels, row, emptied=len(kept) == 1)
            if subject.network.normalize:
                length = torch.linalg.vector_norm(usable, dim=1, keepdim=True)
                usable = usable / torch.where(length > 0, length, 1)
            weights[row, channels] = (score - target.score(usable)).to(weights)
    return MethodOutput(weights)


def _affine_head(subject: Subject) -> Tensor | None:
    """Return W `[D K]`, where the head is affine behind average pooling."""
    try:
        kind = subject.network.head_kind
    except NetworkError:
        return None  # a network that the probe picture does not fit still runs on its own inputs
    if not kind.affine:
        return None
    return torch.as_tensor(kind.matrix, device=subject.activations.device).to(subject.activations)


def _ablated(
    subject: Subject, row: int, kept: Tensor, matrix: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some of the channels kept, and z `[n D]` of the head without each of them."""
    features, maps = subject.features, subject.activations[row]
    if matrix is not None:
        z = features.embedding[row]
        z = z * features.norm[row] if subject.network.normalize else z
        pooled = maps.mean((-2, -1))
        for part in subject.batches(len(kept)):
            channels = kept[part]
            yield channels, z - pooled[channels, None] * matrix[:, channels].mT
        return
    head = subject.network.head_alone(subject.images[row : row + 1], subject.batch_size)
    spent = 0
    for channels in torch.split(kept, max(1, _AT_ONCE // maps.numel())):
        piece = maps.expand(len(channels), *maps.shape).clone()
        piece[torch.arange(len(channels), device=maps.device), channels] = 0
        z = head(piece)
        subject.passes.forwards += head.inputs - spent
        spent = head.inputs
        subject.passes.heads += len(channels)
        subject.progress(len(channels))
        yield channels, z


def _usable(z: Tensor, channels: Tensor, row: int, *, emptied: bool) -> Tensor:
    """Return z `[n D]` of finite numbers; where nothing is left of the activations 0 for others."""
    infinite = ~torch.isfinite(torch.linalg.vector_norm(z, dim=1))
    if not bool(infinite.any()):
        return z
    if emptied:
        return torch.where(infinite[:, None], 0, z)
    flags = torch.zeros(int(channels.max()) + 1, dtype=torch.bool, device=z.device)
    flags[channels[infinite]] = True
    raise not_finite(f"without channels {listed(flags)} of the image at position {row}")


def polycam(
    subject: Subject,
    *,
    layers: Layers = None,
    variant: Annotated[str, Setting(kind=str, choices=("plus", "minus", "both"))] = "both",
    baseline: Annotated[bool, Setting(kind=bool)] = True,
) -> MethodOutput:
    """Poly-CAM: from the deepest layer up P = R, then R / U(D(R)) U(P), R = ReLU(sum_k w_k A_k).

    With m = N(U(A_k)) "plus" w_k = y(X through m) - y(F), "minus" ReLU(y(X) - y(X through 1 - m)),
    "both" ReLU of their sum (Englebert, Cornu and De Vleeschouwer 2022, arXiv 2204.13359).
    """
    if not layers:
        what = f"Poly-CAM draws from several layers and layers = {layers!r}; give their names"
        raise InputError(f"{what}, such as layers=['layer1', 'layer2', 'layer3', 'layer4']")
    pictures_only(subject, "Poly-CAM")
    with subject.several(layers) as run:
        names, depth, activations = run.layers, run.depth, run.activations
        embedding = run.features.embedding
    rows, nothing = range(len(subject)), [0.0] * len(subject)
    if variant != "minus" and baseline:
        nothing = [float(subject.scores(row, [fill_of(subject, row)[None]])) for row in rows]
    weights: dict[str, Tensor] = {}
    maps: Tensor | None = None

    def weights_of(row: int, channels: Tensor) -> Tensor:
        picture, fill, seen = subject.images[row], fill_of(subject, row), ~flat(channels)
        total = channels.new_zeros(len(channels))
        if variant != "minus":
            total += map_scores(subject, row, channels, picture, fill)
            total -= nothing[row]
        if variant != "plus":
            # Through 1 - m picture and fill change places.
            without = map_scores(subject, row, channels, fill, picture)
            score = subject.target.at(row).score(embedding[row : row + 1])
            total = (total + (score.to(total) - without)).clamp(min=0)
        return torch.where(seen, total, 0)

    for place in sorted(range(len(names)), key=lambda place: -depth[place]):
        of_layer = activations[place]
        weights[names[place]] = torch.stack([weights_of(row, of_layer[row]) for row in rows])
        layer_map = (weights[names[place]][:, :, None, None] * of_layer).sum(1).clamp(min=0)
        maps = layer_map if maps is None else sharpen(layer_map, maps)
    return MethodOutput(maps=maps, layers={name: weights[name] for name in names})


KINDS = ("grid", "slic")
Superpixels = str | np.ndarray | Tensor
Sides = int | Sequence[int] | None
# The windows of published implementations of SBSM: 50 pixels every 20, on pictures of 224.
_WINDOW, _STRIDE = 50 / 224, 20 / 224
_Samples = Annotated[int, Setting(kind=int, least=2, most=1_000_000)]
_Positive = Annotated[float, Setting(kind=float, above=0)]


def rise(
    subject: Subject,
    *,
    masks: _Samples = 2000,
    cells: Annotated[int, Setting(kind=int, least=1, most=256)] = 7,
    probability: Annotated[float, Setting(kind=float, above=0, below=1)] = 0.5,
) -> MethodOutput:
    """RISE: ReLU(sum_i (f(X M_i) - mean f) M_i / (n p)) (Petsiuk et al. 2018, eq. 6).

    M_i: `cells` x `cells`, each 1 with `probability` p, enlarged bilinearly, cropped at random.
    """
    pictures_only(subject, "RISE")
    like, (height, width) = subject.features.embedding, subject.images.shape[-2:]
    cell = (math.ceil(height / cells), math.ceil(width / cells))
    generator = subject.generator()
    is_shown = torch.rand(masks, cells, cells, generator=generator) < probability
    rows = torch.randint(cell[0], (masks,), generator=generator)
    columns = torch.randint(cell[1], (masks,), generator=generator)
    shown, offsets = is_shown.to(like), torch.stack([rows, columns], 1).tolist()
    large = ((cells + 1) * cell[0], (cells + 1) * cell[1])

    def masks_of(part: slice) -> Tensor:
        whole = F.interpolate(shown[part][:, None], large, mode="bilinear")[:, 0]
        pairs = zip(whole, offsets[part], strict=True)
        return torch.stack([one[y : y + height, x : x + width] for one, (y, x) in pairs])

    def draw(row: int, scores_of: MaskedScores) -> Tensor:
        scores = scores_of(masks, masks_of)
        shifted = scores - scores[0]  # exactly 0 where all are equal
        above, total = shifted - shifted.mean(), like.new_zeros(height, width)
        for part in subject.batches(masks):
            total += torch.tensordot(above[part], masks_of(part), 1)
        return total / (masks * probability)

    return pixel_maps(subject, draw)


def lime(
    subject: Subject,
    *,
    samples: _Samples = 1000,
    superpixels: Superpixels = "grid",
    segments: Annotated[int, Setting(kind=int, least=1, most=1_000_000)] = 50,
    kernel: _Positive = 0.25,
    ridge: _Positive = 1.0,
) -> MethodOutput:
    """LIME: a ridge regression of f on which superpixels are present (Ribeiro et al. 2016, eq. 1).

    `superpixels` are "grid", "slic" (scikit-image), both about `segments`, or labels `[H W]`.
    """
    pictures_only(subject, "LIME")
    like = subject.features.embedding

    def draw(row: int, scores_of: MaskedScores) -> Tensor:
        labels = superpixels_of(subject.images[row], superpixels, segments)
        count = int(labels.max()) + 1
        present = torch.randint(2, (samples, count), generator=subject.generator())
        present[0] = 1
        masks = present.to(like)
        scores = scores_of(samples, lambda part: masks[part][:, labels])
        return _ridge(present, scores, kernel, ridge).to(like)[labels]

    return pixel_maps(subject, draw)


def _ridge(present: Tensor, scores: Tensor, kernel: float, penalty: float) -> Tensor:
    """Return the coefficients `[d]` of the scores `[n]` on presence `[n d]`."""
    from sklearn.linear_model import Ridge

    vectors = present.double().numpy()
    distance = 1 - (vectors.mean(1) ** 0.5)  # the cosine of m ones among d to d ones is sqrt(m / d)
    weights = torch.exp(-(torch.from_numpy(distance) ** 2) / kernel**2).numpy()
    # Around the first score: equal scores then give coefficients of exactly 0.
    values = (scores - scores[0]).double().cpu().numpy()
    fitted = Ridge(alpha=penalty).fit(vectors, values, sample_weight=weights)
    return torch.from_numpy(fitted.coef_)


def sbsm(subject: Subject, *, window: Sides = None, stride: Sides = None) -> MethodOutput:
    """SBSM: sum_i max(y - y_i, 0) (1 - M_i) / sum_i (1 - M_i) (Dong et al. 2019).

    M_i is 0 in window i, y_i the score with it filled. `window` and `stride` are (height, width)
    in pixels, or one number; None: 50/224 and 20/224 of the picture.
    """
    pictures_only(subject, "SBSM")
    size, like = subject.images.shape[-2:], subject.features.embedding
    sides, steps = _pair("window", window, size, _WINDOW), _pair("stride", stride, size, _STRIDE)
    if sides[0] > size[0] or sides[1] > size[1]:
        what = "window = {} x {} is larger than the picture, {} x {} pixels".format(*sides, *size)
        raise InputError(f"{what}; give a smaller one")
    # Which rows, and which columns, each window covers: [n H] and [n W].
    rows, columns = (_covered(*axis).to(like) for axis in zip(size, sides, steps, strict=True))
    across, covering = len(columns), rows.sum(0)[:, None] * columns.sum(0)

    def masks_of(part: slice) -> Tensor:
        each = torch.arange(part.start, part.stop, device=rows.device)
        return 1 - rows[each // across][:, :, None] * columns[each % across][:, None]

    def draw(row: int, scores_of: MaskedScores) -> Tensor:
        scores = scores_of(len(rows) * across, masks_of)
        drops = (subject.score(row) - scores).clamp(min=0).reshape(len(rows), across)
        return rows.mT @ drops.to(like) @ columns / covering.clamp(min=1)

    return pixel_maps(subject, draw)


def _covered(side: int, window: int, stride: int) -> Tensor:
    """Return which pixels of a side each window covers, `[n side]`."""
    starts = list(range(0, side - window + 1, stride))
    if starts[-1] < side - window:
        starts.append(side - window)
    begin, pixel = torch.tensor(starts)[:, None], torch.arange(side)
    return (begin <= pixel) & (pixel < begin + window)


def _pair(name: str, value: Sides, size: Sequence[int], share: float) -> tuple[int, int]:
    if value is None:
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))
    if isinstance(value, tuple | list):
        return check_sides(name, value)
    return (whole(name, value, 1),) * 2


def superpixels_of(image: Tensor, kind: Superpixels, wanted: int) -> Tensor:
    """Return labels 0 .. d - 1 of the pixels `[H W]` of an image `[C H W]`, d about `wanted`."""
    size = (image.shape[1], image.shape[2])
    if isinstance(kind, str):
        one_of("superpixels", kind, KINDS)
        labels = grid(*size, wanted) if kind == "grid" else _slic(image, wanted)
    else:
        labels = np.asarray(kind.cpu() if isinstance(kind, Tensor) else kind)
        if labels.shape != size or labels.dtype.kind not in "iu":
            raise InputError(
                f"superpixels are {list(labels.shape)} of {labels.dtype}; give a whole number for "
                f"each pixel [{size[0]} {size[1]}], or 'grid' or 'slic'"
            )
    # Without gaps, so that every label is a column of the regression that something moves.
    numbered = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return torch.from_numpy(numbered).to(image.device)


def grid(height: int, width: int, wanted: int) -> np.ndarray:
    """Return a grid of nearly square regions, about `wanted`, at most one a pixel."""
    side = (height * width / wanted) ** 0.5
    rows, columns = (min(n, max(1, round(n / side))) for n in (height, width))
    of_row, of_column = np.arange(height) * rows // height, np.arange(width) * columns // width
    return np.asarray(of_row[:, None] * columns + of_column)


def _slic(image: Tensor, wanted: int) -> np.ndarray:
    """Return SLIC's regions of the image scaled to [0, 1], in Lab where it has three channels."""
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        what = "superpixels = 'slic' needs scikit-image, which is not installed"
        advice = "pip install embedcam[lime], or use superpixels='grid'"
        raise InputError(f"{what}; {advice}") from error
    pixels = image.double().cpu().numpy().transpose(1, 2, 0)
    pixels = (pixels - pixels.min()) / (np.ptp(pixels) or 1)
    # Unsmoothed (sigma 0), pixel noise breaks the regions into specks that are merged, down to one.
    lab = len(image) == 3
    return np.asarray(
        slic(pixels, wanted, sigma=1, convert2lab=lab, channel_axis=-1, start_label=0)
    )
