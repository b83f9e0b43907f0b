"""Methods that differentiate several versions of an image: noisy ones, or a path from a fill."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import cam as draw
from .masks import fill_like
from .options import whole_number
from .subject import Found, Subject
from .weights import gradcam as gradcam_weights

# Gradients held at once: noisy inputs times triplets.
_AT_ONCE = 256


def smooth_gradcam_plus_plus(subject: Subject, *, samples: int = 25, sigma: float = 0.15) -> Found:
    """Smooth Grad-CAM++: w = sum_ij a ReLU(m1), a = m2 / (2 m2 + (sum_ij A) m3).

    Omeiza et al. 2019, eq. 6-8; m1, m2, m3 are the means of G, G^2 and G^3 over noisy inputs, A is
    the clean image's. Not linear in the target: each triplet has its own weights, which are then
    averaged. With sigma 0 it is Grad-CAM++.

    Departures: the paper prints m1 in a's numerator, which is no Grad-CAM++ even without noise;
    m2 stands there. The sum over A takes positive activations, as Grad-CAM++ does. Where m3 < 0 the
    fraction has a pole, so its denominator is at least m2 and a at most 1. Where m2 = 0, a = 0.

    Args:
        subject: what is explained.
        samples: n, noisy inputs, each one forward and one backward pass (one a triplet).
        sigma: standard deviation of the noise, as a share of the image's own range max X - min X;
            an image of one value has no range and gets no noise.

    Returns:
        Weights `[B K]`, >= 0.

    Raises:
        InputError: wrong options, or inputs that are numbers of words.
    """
    samples = whole_number("samples", samples)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma < math.inf:
        raise InputError(f"sigma = {sigma!r}; give a share of the image's range, such as 0.15")
    _refuse_words(subject, "Smooth Grad-CAM++ adds noise to its input")
    # The clean image is not differentiated, so its forward need keep no graph.
    features = subject.features
    used = subject.cotangents(features)[1]
    rows = []
    for row in range(len(subject)):
        sums = features.activations[row].clamp(min=0).sum((-2, -1), keepdim=True)
        first, second, third = _moments(subject, row, samples, sigma)
        each = _smooth_weights(first, second, third, sums)
        counted = used[row].to(each.dtype)[:, None]
        rows.append((each * counted).sum(0) / counted.sum().clamp(min=1))
    return Found(torch.stack(rows))


def _smooth_weights(first: Tensor, second: Tensor, third: Tensor, sums: Tensor) -> Tensor:
    """w `[S K]` of moments `[S K H W]` and sums of activations `[K 1 1]`."""
    below = torch.maximum(2 * second + sums * third, second)
    shares = second / torch.where(below > 0, below, 1)
    return (shares * first.clamp(min=0)).sum((-2, -1))


def _moments(subject: Subject, row: int, samples: int, sigma: float) -> tuple[Tensor, ...]:
    """Means of G, G^2 and G^3 over noisy inputs of one image, `[S K H W]` each."""
    noisy = _noisy(subject, subject.images[row], samples, sigma)
    at_once = max(1, min(subject.batch_size, _AT_ONCE // subject.target.parts))
    totals: tuple[Tensor, ...] | None = None
    for start in range(0, samples, at_once):
        piece = torch.stack([next(noisy) for _ in range(min(at_once, samples - start))])
        gradients = subject.differentiate(piece, row, each=True)[1]
        found = tuple((gradients**power).sum(1) for power in (1, 2, 3))
        totals = found if totals is None else tuple(map(torch.add, totals, found))
    assert totals is not None
    return tuple(total / samples for total in totals)


def _noisy(subject: Subject, image: Tensor, samples: int, sigma: float) -> Iterator[Tensor]:
    generator, spread = subject.generator(), sigma * (image.max() - image.min())
    for _ in range(samples):
        # One at a time and in double precision: neither the batch nor the precision changes draws.
        noise = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        yield image + spread * noise.to(image)


def integrated_gradcam(subject: Subject, *, steps: int = 20) -> Found:
    """Integrated Grad-CAM: mean over t of ReLU(sum_k alpha_k(t) (A_k(t) - A_k(0))).

    Sattarzadeh et al. 2021, eq. 6, as a Riemann sum; t runs over 1/m, 2/m, ..., 1 along the line
    from the baseline (t = 0) to the image (t = 1), alpha_k(t) = mean_ij G(t) are Grad-CAM's weights
    there. The baseline is the subject's fill: the paper's black picture is "black", its blurred one
    "blur"; the default "mean" is 0 in the normalised input.

    The weights are ours: mean over t of alpha_k(t), drawn with the image's own A, so that an index
    can hold them; the map that they draw is not the paper's, which is in `maps`.

    Args:
        subject: what is explained.
        steps: m; m + 1 forward passes, m backward. The baseline is not differentiated: alpha(0) is
            no part of the sum, and a baseline that is embedded as zeros has none.

    Returns:
        Weights `[B K]`, and the paper's maps `[B h w]`, >= 0; zero where the image is its baseline.

    Raises:
        InputError: wrong options, or inputs that are numbers of words.
        NetworkError: a step's embedding is zero and cannot be normalised; use another fill.
    """
    steps = whole_number("steps", steps)
    _refuse_words(subject, "Integrated Grad-CAM mixes its input with a baseline")
    last = gradcam_weights(subject.gradients)
    weights, maps = [], []
    for row in range(len(subject)):
        alpha, total = _path(subject, row, steps, last[row])
        weights.append(alpha / steps)
        maps.append(total / steps)
    return Found(torch.stack(weights), torch.stack(maps))


def _path(subject: Subject, row: int, steps: int, last: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over t of the weights `[K]` and of the maps `[h w]`; t = 1 is the image itself."""
    image = subject.images[row]
    baseline = fill_like(image, subject.fill, subject.network.preprocess)
    start = _start(subject, baseline)
    alphas, total = last, draw(last, subject.activations[row] - start)
    for part in subject.batches(steps - 1):
        shares = torch.arange(part.start + 1, part.stop + 1, device=image.device).to(image) / steps
        shares = shares.reshape(-1, *[1] * image.ndim)
        features, gradients = subject.differentiate(baseline + shares * (image - baseline), row)
        alpha = gradcam_weights(gradients)
        alphas = alphas + alpha.sum(0)
        total = total + draw(alpha, features.activations - start).sum(0)
    return alphas, total


def _start(subject: Subject, baseline: Tensor) -> Tensor:
    """A(0), `[K h w]`, of a baseline that may be embedded as zeros; one forward."""
    subject.passes.forwards += 1
    activations = subject.network.forward(baseline[None], allow_zero=True).activations[0]
    subject.tick(1)
    return activations


def _refuse_words(subject: Subject, what: str) -> None:
    if not subject.images.is_floating_point():
        raise InputError(
            f"{what}, and this network's input is numbers of words ({subject.images.dtype}), which "
            "lie on no line; use a method of one gradient, such as 'gradcam'"
        )
