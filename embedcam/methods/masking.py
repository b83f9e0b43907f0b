"""Score-CAM: how much of the target each channel's own region shows."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from .masks import fill_like, flat, masked, pictures_only, unit_masks
from .subject import Found, Subject

WEIGHTS = ("raw", "softmax")


def scorecam(subject: Subject, *, weights: str = "raw", temperature: float = 1.0) -> Found:
    """Score-CAM: w_k = f(X m_k) - f(X_b), m_k = N(U(A_k)) (Wang et al. 2020, definitions 2 and 3).

    The paper's algorithm 1 also puts the K scores through a softmax: `weights="softmax"`. It is not
    the default because scores of embeddings span little, cosines at most 2 and in practice a few
    tenths, while the softmax is over hundreds of channels: every weight comes out near 1 / K, the
    map is the mean activation whatever the target, and the baseline cancels. Raw weights are mostly
    of one sign too, so their map keeps much of the mean activation; a softmax with a temperature of
    the size of the scores' spread (about 0.1 for cosines) keeps least of it. The authors' code has
    neither baseline nor softmax over channels.

    Masked pixels fade to the subject's fill, which is also the baseline X_b: X m + X_b (1 - m).
    A flat channel masks nothing in particular: its weight is 0, it is not put through the network
    and is left out of the softmax. Masks are made a batch at a time; at most K + 2 forward passes
    an image.

    Args:
        subject: pictures.
        weights: "raw" (the paper's definition) or "softmax" (its algorithm).
        temperature: T > 0 of softmax(w / T); only for "softmax".

    Returns:
        weights `[B K]`: raw ones of either sign, a softmax's sum to 1, or to 0 where all channels
        are flat.

    Raises:
        InputError: unknown `weights`, or a temperature that is not > 0 or not used.
        NetworkError: inputs that are not pictures.
    """
    _check(weights, temperature)
    pictures_only(subject, "Score-CAM", "ablationcam")
    activations = subject.activations
    found = torch.zeros_like(activations[:, :, 0, 0])
    for row, maps in enumerate(activations):
        kept = (~flat(maps)).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        scores = _increases(subject, row, maps, kept)
        if weights == "softmax":
            scores = torch.softmax(scores / temperature, 0)
        found[row, kept] = scores.to(found)
    return Found(found)


def _increases(subject: Subject, row: int, maps: Tensor, kept: Tensor) -> Tensor:
    """f(X m_k) - f(X_b) of the channels kept."""
    image = subject.images[row]
    fill = fill_like(image, subject.fill, subject.network.preprocess)

    def pictures() -> Iterator[Tensor]:
        yield fill[None]
        for part in subject.batches(len(kept)):
            masks = unit_masks(maps[kept[part]], (image.shape[1], image.shape[2]))
            yield masked(image, fill, masks)

    scores = subject.scores(row, pictures())
    return scores[1:] - scores[0]


def _check(weights: str, temperature: float) -> None:
    if weights not in WEIGHTS:
        raise InputError(f"weights = {weights!r} is unknown; use {' or '.join(map(repr, WEIGHTS))}")
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise InputError(f"temperature = {temperature!r}; give a number greater than 0")
    if weights == "raw" and temperature != 1:
        raise InputError(
            f"temperature = {temperature!r} divides the scores before a softmax; give "
            "weights='softmax' with it"
        )
