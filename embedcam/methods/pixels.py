"""Black-box methods that mask pixels and watch the score: RISE, LIME and SBSM.

They know nothing of the layer and draw maps at the size of the input. What replaces masked pixels
is the subject's fill. Pictures only.
"""

import math
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_sides, one_of, whole
from .._options import Setting
from ..errors import InputError
from .masks import fill_of, masked_scores, pictures_only
from .subject import MethodOutput, Subject

KINDS = ("grid", "slic")
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

    M_i: `cells` x `cells` cells, each 1 with probability p, enlarged bilinearly to (cells + 1)
    cells' worth of pixels and cropped to the picture at a random offset of up to a cell. 7 cells
    and p = 0.5 are the paper's; it uses 4000 masks or 8000. Drawn are first all cells, then all
    rows, then all columns of the offsets; every image of a batch gets the same masks.

    Departures: the paper's f is a probability. A score with a large offset, such as a cosine near
    1, adds that many times the (random) sum of the masks, so its mean over the masks is subtracted:
    the map is then 1 / p times the covariance of score and mask, which can be negative and is cut
    at 0. Cells measure the picture's side over `cells`, rounded up and not down, or the masks would
    not cover it.
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
        # Made twice, which is little beside the passes, and never held.
        whole = F.interpolate(shown[part][:, None], large, mode="bilinear")[:, 0]
        pairs = zip(whole, offsets[part], strict=True)
        return torch.stack([one[y : y + height, x : x + width] for one, (y, x) in pairs])

    maps = like.new_zeros(len(subject), height, width)
    for row, image in enumerate(subject.images):
        scores = masked_scores(subject, row, image, fill_of(subject, row), masks, masks_of)
        shifted = scores - scores[0]  # exactly 0 where all are equal
        above = shifted - shifted.mean()
        for part in subject.batches(masks):
            maps[row] += torch.tensordot(above[part], masks_of(part), 1)
    return MethodOutput(maps=(maps / (masks * probability)).clamp(min=0))


def lime(
    subject: Subject,
    *,
    samples: _Samples = 1000,
    superpixels: Any = "grid",
    segments: Annotated[int, Setting(kind=int, least=1, most=1_000_000)] = 50,
    kernel: _Positive = 0.25,
    ridge: _Positive = 1.0,
) -> MethodOutput:
    """LIME: a ridge regression of f on which superpixels are present (Ribeiro et al. 2016, eq. 1).

    Samples switch each superpixel off with probability 1/2, the first has them all; a sample weighs
    exp(-d^2 / s^2), s = `kernel`, d = 1 - cosine of its presence vector to all-ones. Intercept
    free, L2 penalty `ridge`. Each pixel gets its superpixel's coefficient, negative ones are cut at
    0. Every image of a batch draws the same numbers.

    `superpixels` are "grid" (the default, as a map must not depend on what is installed), "slic"
    (follows edges; scikit-image: `pip install embedcam[lime]`), both of about `segments`, or labels
    `[H W]`.

    Departures: the paper's K-Lasso for choosing a few superpixels is left out; all are fitted, by
    ridge, as the authors' image code does when given as many features as superpixels.
    """
    pictures_only(subject, "LIME")
    maps = subject.features.embedding.new_zeros(len(subject), *subject.images.shape[-2:])
    for row, image in enumerate(subject.images):
        labels = superpixels_of(image, superpixels, segments)
        count = int(labels.max()) + 1
        present = torch.randint(2, (samples, count), generator=subject.generator())
        present[0] = 1
        masks = present.to(maps)

        def masks_of(part: slice, masks: Tensor = masks, labels: Tensor = labels) -> Tensor:
            return masks[part][:, labels]

        scores = masked_scores(subject, row, image, fill_of(subject, row), samples, masks_of)
        maps[row] = _ridge(present, scores, kernel, ridge).to(maps)[labels]
    return MethodOutput(maps=maps.clamp(min=0))


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


def sbsm(subject: Subject, *, window: Any = None, stride: Any = None) -> MethodOutput:
    """SBSM: sum_i max(d(q, r_i) - d(q, r), 0) (1 - M_i) / sum_i (1 - M_i) (Dong et al. 2019).

    r_i is the picture with window i filled, M_i is 0 in that window and 1 elsewhere: how much
    farther the picture gets without each window, averaged over the windows a pixel is in. The
    distance is d = -y for any target, so d(q, r_i) - d(q, r) = y - y_i: with `NegativeDistance(q)`
    it is the paper's, with squared Euclidean distances.

    `window` and `stride` are (height, width) in pixels, or one number for both; None takes 50/224
    and 20/224 of the picture. Windows start every `stride` pixels from the upper left, and once
    more flush with the lower and the right border. A pixel that no window covers is 0.
    """
    pictures_only(subject, "SBSM")
    embeddings, size = subject.features.embedding, (*subject.images.shape[-2:],)
    sides, steps = _pair("window", window, size, _WINDOW), _pair("stride", stride, size, _STRIDE)
    if sides[0] > size[0] or sides[1] > size[1]:
        raise InputError(
            f"window = {sides[0]} x {sides[1]} is larger than the picture, {size[0]} x {size[1]} "
            "pixels; give a smaller one"
        )
    # Which rows, and which columns, each window covers: [n H] and [n W].
    rows, columns = (
        _covered(*axis).to(embeddings) for axis in zip(size, sides, steps, strict=True)
    )
    across = len(columns)

    def masks_of(part: slice) -> Tensor:
        each = torch.arange(part.start, part.stop, device=rows.device)
        return 1 - rows[each // across][:, :, None] * columns[each % across][:, None]

    maps = embeddings.new_zeros(len(subject), *size)
    covering, total = rows.sum(0)[:, None] * columns.sum(0), len(rows) * across
    for row, image in enumerate(subject.images):
        scores = masked_scores(subject, row, image, fill_of(subject, row), total, masks_of)
        drops = (subject.score(row) - scores).clamp(min=0).reshape(len(rows), across)
        maps[row] = rows.mT @ drops.to(maps) @ columns / covering.clamp(min=1)
    return MethodOutput(maps=maps)


def _covered(side: int, window: int, stride: int) -> Tensor:
    """Return which pixels of a side each window covers, `[n side]`."""
    starts = list(range(0, side - window + 1, stride))
    if starts[-1] < side - window:
        starts.append(side - window)
    begin, pixel = torch.tensor(starts)[:, None], torch.arange(side)
    return (begin <= pixel) & (pixel < begin + window)


def _pair(name: str, value: Any, size: tuple[int, ...], share: float) -> tuple[int, int]:
    if value is None:
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))
    if isinstance(value, tuple | list):
        return check_sides(name, value)
    return (whole(name, value, 1),) * 2


def superpixels_of(image: Tensor, kind: Any, wanted: int) -> Tensor:
    """Return labels 0 .. d - 1 of the pixels `[H W]` of an image `[C H W]`, d about `wanted`.

    `kind` is "grid", "slic", or labels `[H W]`, an array or tensor of whole numbers.
    """
    size = (image.shape[1], image.shape[2])
    if isinstance(kind, str):
        one_of("superpixels", kind, KINDS)
        labels = grid(*size, wanted) if kind == "grid" else _slic(image, wanted)
    else:
        labels = np.asarray(kind.cpu() if isinstance(kind, Tensor) else kind)
        if labels.shape != size or labels.dtype.kind not in "iu":
            raise InputError(
                f"superpixels are {list(labels.shape)} of {labels.dtype}; expected a label, a "
                f"whole number, for each pixel [{size[0]} {size[1]}], or 'grid' or 'slic'"
            )
    # Numbered without gaps: every label then is a column of the regression that something moves.
    numbered = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    return torch.from_numpy(numbered).to(image.device)


def grid(height: int, width: int, wanted: int) -> np.ndarray:
    """Return a grid of nearly square regions, about `wanted`, at most one a pixel."""
    side = (height * width / wanted) ** 0.5
    rows, columns = (min(n, max(1, round(n / side))) for n in (height, width))
    of_row, of_column = np.arange(height) * rows // height, np.arange(width) * columns // width
    labels: np.ndarray = of_row[:, None] * columns + of_column
    return labels


def _slic(image: Tensor, wanted: int) -> np.ndarray:
    """Return SLIC's regions of the image scaled to [0, 1], in Lab where it has three channels."""
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise InputError(
            "superpixels = 'slic' needs scikit-image, which is not installed; "
            "pip install embedcam[lime], or use superpixels='grid'"
        ) from error
    pixels = image.double().cpu().numpy().transpose(1, 2, 0)
    span = pixels.max() - pixels.min()
    pixels = (pixels - pixels.min()) / (span if span > 0 else 1)
    # Unsmoothed (sigma 0), pixel noise breaks the regions into specks that are merged, down to one.
    labels: np.ndarray = slic(
        pixels,
        n_segments=wanted,
        sigma=1,
        convert2lab=len(image) == 3,
        channel_axis=-1,
        start_label=0,
    )
    return labels
