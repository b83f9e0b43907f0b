"""Black-box methods that mask pixels and watch the score: RISE, LIME and SBSM.

They know nothing of the layer and draw maps at the size of the input. What replaces masked pixels
is the subject's fill. Pictures only.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .masks import fill_like, masked, pictures_only
from .options import whole_number
from .subject import Found, Subject
from .superpixels import superpixels_of

_INSTEAD = "ablationcam"
# The windows of published implementations of SBSM: 50 pixels every 20, on pictures of 224.
_WINDOW, _STRIDE = 50 / 224, 20 / 224


def rise(subject: Subject, *, masks: int = 2000, cells: int = 7, probability: float = 0.5) -> Found:
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

    Args:
        subject: pictures.
        masks: n.
        cells: of a mask, along either side.
        probability: p, of a cell to show the picture.

    Returns:
        maps `[B H W]` >= 0, at the input's size; 0 where every mask has the same score.

    Raises:
        InputError: options out of range.
        NetworkError: inputs that are not pictures.
    """
    pictures_only(subject, "RISE", _INSTEAD)
    total, side = whole_number("masks", masks, 2), whole_number("cells", cells, 1, 256)
    if not isinstance(probability, int | float) or not 0 < probability < 1:
        raise InputError(f"probability = {probability!r}; give a number between 0 and 1")
    like, (height, width) = subject.features.embedding, _size(subject)
    cell = (math.ceil(height / side), math.ceil(width / side))
    generator = subject.generator()
    drawn = torch.rand(total, side, side, generator=generator) < probability
    rows = torch.randint(cell[0], (total,), generator=generator)
    columns = torch.randint(cell[1], (total,), generator=generator)
    shown, offsets = drawn.to(like), torch.stack([rows, columns], 1).tolist()

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        # Made twice, which is little beside the passes, and never held.
        for part in subject.batches(total):
            large = ((side + 1) * cell[0], (side + 1) * cell[1])
            whole = F.interpolate(shown[part][:, None], large, mode="bilinear")[:, 0]
            crops = [
                one[y : y + height, x : x + width]
                for one, (y, x) in zip(whole, offsets[part], strict=True)
            ]
            yield part, torch.stack(crops)

    maps = like.new_zeros(len(subject), height, width)
    for row, (image, fill) in enumerate(_with_fills(subject)):
        scores = subject.scores(row, (masked(image, fill, piece) for _, piece in pieces()))
        above = _above_mean(scores)
        for part, piece in pieces():
            maps[row] += torch.tensordot(above[part], piece, 1)
    return Found(maps=(maps / (total * probability)).clamp(min=0))


def lime(
    subject: Subject,
    *,
    samples: int = 1000,
    superpixels: Any = "grid",
    segments: int = 50,
    kernel: float = 0.25,
    ridge: float = 1.0,
) -> Found:
    """LIME: a ridge regression of f on which superpixels are present (Ribeiro et al. 2016, eq. 1).

    Samples switch each superpixel off with probability 1/2, the first has them all; a sample weighs
    exp(-d^2 / s^2), d = 1 - cosine of its presence vector to all-ones (1 where nothing is present).
    Intercept free, L2 penalty `ridge`. Each pixel gets its superpixel's coefficient, negative ones
    are cut at 0. Every image of a batch draws the same numbers.

    Departures: the paper's K-Lasso for choosing a few superpixels is left out; all are fitted, by
    ridge, as the authors' image code does when given as many features as superpixels.

    Args:
        subject: pictures.
        samples: masked pictures, one pass each.
        superpixels: "grid" (a regular grid of cells), "slic" (follows edges; scikit-image:
            `pip install embedcam[lime]`), or labels `[H W]`. The grid is the default because a map
            must not depend on what is installed.
        segments: superpixels wanted; slic and grid come near it.
        kernel: s.
        ridge: weight of the penalty.

    Returns:
        maps `[B H W]` >= 0, at the input's size; 0 where all samples have the same score.

    Raises:
        InputError: options out of range, labels of another size, or "slic" without scikit-image.
        NetworkError: inputs that are not pictures.
    """
    pictures_only(subject, "LIME", _INSTEAD)
    total, wanted = whole_number("samples", samples, 2), whole_number("segments", segments, 1)
    _positive("kernel", kernel)
    _positive("ridge", ridge)
    maps = subject.features.embedding.new_zeros(len(subject), *_size(subject))
    for row, (image, fill) in enumerate(_with_fills(subject)):
        labels = superpixels_of(image, superpixels, wanted)
        count = int(labels.max()) + 1
        present = torch.randint(2, (total, count), generator=subject.generator())
        present[0] = 1
        masks = present.to(maps)
        scores = subject.scores(
            row,
            (masked(image, fill, masks[part][:, labels]) for part in subject.batches(total)),
        )
        fitted = _ridge(present, scores, float(kernel), float(ridge))
        maps[row] = fitted.to(maps)[labels]
    return Found(maps=maps.clamp(min=0))


def sbsm(
    subject: Subject,
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
) -> Found:
    """SBSM: sum_i max(d(q, r_i) - d(q, r), 0) (1 - M_i) / sum_i (1 - M_i) (Dong et al. 2019).

    r_i is the picture with window i filled, M_i is 0 in that window and 1 elsewhere: how much
    farther the picture gets without each window, averaged over the windows a pixel is in.

    The distance is d = -y for any target, so d(q, r_i) - d(q, r) = y - y_i: with
    `NegativeDistance(q)` it is the paper's, with squared Euclidean distances.

    Windows start every `stride` pixels from the upper left, and once more flush with the lower and
    the right border. A pixel that no window covers (a stride larger than the window) is 0.

    Args:
        subject: pictures.
        window: (height, width) in pixels, or one number for both; None: 50/224 of the picture.
        stride: the same; None: 20/224 of the picture.

    Returns:
        maps `[B H W]` >= 0, at the input's size.

    Raises:
        InputError: a window or stride that is not a whole number of pixels, or a window larger than
            the picture.
        NetworkError: inputs that are not pictures.
    """
    pictures_only(subject, "SBSM", _INSTEAD)
    embeddings, size = subject.features.embedding, _size(subject)
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

    def shown() -> Iterator[Tensor]:
        for part in subject.batches(len(rows) * across):
            each = torch.arange(part.start, part.stop, device=rows.device)
            yield 1 - rows[each // across][:, :, None] * columns[each % across][:, None]

    maps = embeddings.new_zeros(len(subject), *size)
    covering = rows.sum(0)[:, None] * columns.sum(0)
    for row, (image, fill) in enumerate(_with_fills(subject)):
        score = subject.target.at(row).score(embeddings[row : row + 1])
        scores = subject.scores(row, (masked(image, fill, masks) for masks in shown()))
        drops = (score - scores).clamp(min=0).reshape(len(rows), across)
        maps[row] = rows.mT @ drops.to(maps) @ columns / covering.clamp(min=1)
    return Found(maps=maps)


def _with_fills(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image and what its masked pixels become, `[C H W]`."""
    for image in subject.images:
        yield image, fill_like(image, subject.fill, subject.network.preprocess)


def _size(subject: Subject) -> tuple[int, int]:
    return subject.images.shape[-2], subject.images.shape[-1]


def _above_mean(scores: Tensor) -> Tensor:
    """Scores less their mean; exactly 0 where all are equal."""
    shifted = scores - scores[0]
    return shifted - shifted.mean()


def _ridge(present: Tensor, scores: Tensor, kernel: float, penalty: float) -> Tensor:
    """Coefficients `[d]` of the scores `[n]` on presence `[n d]`."""
    from sklearn.linear_model import Ridge

    vectors = present.double().numpy()
    distance = 1 - (vectors.mean(1) ** 0.5)  # the cosine of m ones among d to d ones is sqrt(m / d)
    weights = torch.exp(-(torch.from_numpy(distance) ** 2) / kernel**2).numpy()
    # Around the first score: equal scores then give coefficients of exactly 0.
    values = (scores - scores[0]).double().cpu().numpy()
    fitted = Ridge(alpha=penalty).fit(vectors, values, sample_weight=weights)
    return torch.from_numpy(fitted.coef_)


def _covered(side: int, window: int, stride: int) -> Tensor:
    """Which pixels of a side each window covers, `[n side]`."""
    starts = list(range(0, side - window + 1, stride))
    if starts[-1] < side - window:
        starts.append(side - window)
    begin, pixel = torch.tensor(starts)[:, None], torch.arange(side)
    return (begin <= pixel) & (pixel < begin + window)


def _pair(name: str, value: Any, size: tuple[int, int], share: float) -> tuple[int, int]:
    if value is None:
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise InputError(f"{name} = {value!r}; give (height, width) or one number of pixels")
        return whole_number(name, value[0], 1), whole_number(name, value[1], 1)
    return whole_number(name, value, 1), whole_number(name, value, 1)


def _positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"{name} = {value!r}; give a number greater than 0")
