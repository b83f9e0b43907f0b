"""Targets as objects: scores, their derivatives, one image of a batch, and refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo_cases
from torch import Tensor, nn

from embedcam import ClassProxy, EmbeddingNetwork, NegativeDistance, PairContribution, cam_for
from embedcam.errors import InputError
from embedcam.methods.direct import as_target
from embedcam.targets import Coordinate, Direction, Similarity, Target, TripletMargin

B, S, D = 3, 4, 5
draw = np.random.default_rng(0)
F_ = draw.standard_normal((B, D))
ONE, MANY = draw.standard_normal(D), draw.standard_normal((B, D))
P, N = draw.standard_normal((2, S, D))
EACH_P, EACH_N = draw.standard_normal((2, B, S, D))
USED = np.array([[True, False, True, True], [False] * 4, [True] * 4])
POINTS = draw.standard_normal((6, D))

Score = Callable[[np.ndarray, int], float]


def squared(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def margin(p: np.ndarray, n: np.ndarray) -> Callable[[np.ndarray], float]:
    pairs = list(zip(p, n, strict=True))
    return lambda f: float(np.mean([squared(f, b) - squared(f, a) for a, b in pairs]))


def proxy(points: np.ndarray) -> np.ndarray:
    mean = np.mean([point / np.linalg.norm(point) for point in points], axis=0)
    return mean / np.linalg.norm(mean)


def mean_dot(directions: np.ndarray, used: np.ndarray) -> Callable[[np.ndarray], float]:
    kept = [c for c, counts in zip(directions, used, strict=True) if counts]
    return lambda f: float(sum(f @ c for c in kept) / max(len(kept), 1))


TARGETS: dict[str, tuple[Target, Score]] = {
    "margin of one": (TripletMargin(P[0], N[0]), lambda f, i: margin(P[:1], N[:1])(f)),
    "margin": (TripletMargin(P, N), lambda f, i: margin(P, N)(f)),
    "margin each": (TripletMargin(EACH_P, EACH_N), lambda f, i: margin(EACH_P[i], EACH_N[i])(f)),
    "direction": (Direction(ONE), lambda f, i: float(f @ ONE)),
    "directions": (Direction(P, USED[0]), lambda f, i: mean_dot(P, USED[0])(f)),
    "directions each": (Direction(EACH_P, USED), lambda f, i: mean_dot(EACH_P[i], USED[i])(f)),
    "cosine": (Similarity(ONE), lambda f, i: cosine(f, ONE)),
    "cosine each": (Similarity(MANY), lambda f, i: cosine(f, MANY[i])),
    "dot": (Similarity(ONE, "dot"), lambda f, i: float(f @ ONE)),
    "dot each": (Similarity(MANY, kind="dot"), lambda f, i: float(f @ MANY[i])),
    "distance": (NegativeDistance(ONE), lambda f, i: -squared(f, ONE)),
    "distance each": (NegativeDistance(MANY), lambda f, i: -squared(f, MANY[i])),
    "proxy": (ClassProxy(POINTS), lambda f, i: float(f @ proxy(POINTS))),
    "proxy of one": (ClassProxy(ONE), lambda f, i: float(f @ proxy(ONE[None]))),
    "pair": (PairContribution(ONE), lambda f, i: cosine(f, ONE)),
    "pair each": (PairContribution(MANY), lambda f, i: cosine(f, MANY[i])),
    "coordinate": (Coordinate(2), lambda f, i: float(f[2])),
    "last coordinate": (Coordinate(-1), lambda f, i: float(f[D - 1])),
}
LIBRARIES: list[Callable[[np.ndarray], Any]] = [lambda a: a.copy(), lambda a: torch.from_numpy(a)]


def differences(score: Callable[[np.ndarray], float], f: np.ndarray) -> np.ndarray:
    """The derivative by central differences, one coordinate at a time."""
    out, step = np.zeros(len(f)), 1e-6
    for i in range(len(f)):
        up, down = f.copy(), f.copy()
        up[i] += step
        down[i] -= step
        out[i] = (score(up) - score(down)) / (2 * step)
    return out


def mean_cotangent(target: Target, embeddings: Any) -> np.ndarray:
    each, used = target.cotangents(embeddings)
    values = np.asarray(each)
    counts = np.ones(values.shape[:2]) if used is None else np.asarray(used, float)
    return (values * counts[..., None]).sum(1) / np.maximum(counts.sum(1), 1)[:, None]


@pytest.mark.parametrize("library", LIBRARIES, ids=["numpy", "torch"])
@pytest.mark.parametrize("name", TARGETS)
def test_scores_and_their_derivatives(name: str, library: Callable[[np.ndarray], Any]) -> None:
    target, score = TARGETS[name]
    target.check(B, D)
    embeddings = library(F_)
    found = target.score(embeddings)
    assert type(found) is type(embeddings)
    assert found.dtype == embeddings.dtype
    np.testing.assert_allclose(found, [score(f, i) for i, f in enumerate(F_)], rtol=1e-12)
    each, used = target.cotangents(embeddings)
    assert type(each) is type(embeddings)
    assert each.dtype == embeddings.dtype
    assert each.shape == (B, target.parts, D)
    assert used is None or used.shape == (B, target.parts)
    mean = mean_cotangent(target, embeddings)
    for i, f in enumerate(F_):
        if target.holds_norm:  # |f| is held, so only the numerator is differentiated
            numeric = differences(lambda x, f=f, i=i: score(x, i) * np.linalg.norm(x), f)
            numeric /= np.linalg.norm(f)
        else:
            numeric = differences(lambda x, i=i: score(x, i), f)
        np.testing.assert_allclose(mean[i], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_of_one_image_is_its_row_of_the_batch(name: str) -> None:
    target, _ = TARGETS[name]
    whole, cotangents = target.score(F_), mean_cotangent(target, F_)
    for row in range(B):
        alone = target.at(row)
        alone.check(1, D)
        np.testing.assert_allclose(alone.score(F_[row : row + 1]), whole[row : row + 1], rtol=1e-12)
        own = mean_cotangent(alone, F_[row : row + 1])[0]
        np.testing.assert_allclose(own, cotangents[row], rtol=1e-12)
        # Many variations of that image, all against its own references.
        three = np.stack([F_[row], F_[0], 2 * F_[row]])
        assert alone.score(three)[0] == pytest.approx(whole[row])


def test_references_come_as_tensors_lists_and_arrays() -> None:
    expected = Similarity(ONE).score(F_)
    for given in (ONE.tolist(), torch.from_numpy(ONE).requires_grad_(), ONE[::-1][::-1]):
        np.testing.assert_allclose(Similarity(given).score(F_), expected)
    half = Similarity(torch.from_numpy(ONE).bfloat16()).score(F_)
    np.testing.assert_allclose(half, expected, atol=0.02)


@pytest.mark.parametrize("normalize", [True, False])
def test_behind_plain_pooling_contributions_add_up_to_the_cosine(normalize: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        module = nn.Sequential(zoo_cases.trunk(), *pooling).double().eval()
        one, other = torch.randn(2, 3, *zoo_cases.SIZE, dtype=torch.float64)
    network = EmbeddingNetwork(module, "0", normalize=normalize)
    z, reference = (network.forward(x[None]).embedding[0].numpy() for x in (one, other))
    target, expected = PairContribution(reference), cosine(z, reference)
    found = cam_for(network, one, target, "cam", progress=False)
    assert found.grid_cam.mean() == pytest.approx(expected, rel=1e-5)
    for method in ("gradcam", "hirescam"):  # their weights are a position's part of CAM's
        found = cam_for(network, one, target, method, progress=False)
        assert found.grid_cam.sum() == pytest.approx(expected, rel=1e-5)
    found = cam_for(network, one, target, "gradcam", progress=False)
    pooled = module(one[None])[0].detach().numpy()
    shares = found.weights * pooled * found.grid_cam.size
    each = pooled * reference / (np.linalg.norm(pooled) * np.linalg.norm(reference))
    np.testing.assert_allclose(shares, each, rtol=1e-5, atol=1e-7)
    # Through the norm they would sum to nothing.
    through = cam_for(network, one, Similarity(reference), "gradcam", progress=False)
    assert (through.weights * pooled).sum() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("head", ["pooled", "curved"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "scorecam"])
def test_a_function_is_the_target_that_it_writes_out(head: str, method: str) -> None:
    case = zoo_cases.make(head, "similarity", signed=True, seed=1)
    reference = torch.from_numpy(case.target.reference)

    def similarity(f: Tensor) -> Tensor:
        return (f @ reference) / f.norm(dim=1)

    batch = torch.stack([case.image, case.image.flip(-1)])
    built_in = cam_for(case.network, batch, case.target, method, progress=False)
    own = cam_for(case.network, batch, similarity, method, progress=False)
    close = 1e-7 * np.abs(built_in.weights).max()
    np.testing.assert_allclose(own.weights, built_in.weights, rtol=1e-5, atol=close)


def test_a_functions_derivative_is_autograds_and_works_without_gradients() -> None:
    f = torch.from_numpy(F_)
    target = as_target(lambda e: (e**3).sum(1))
    assert as_target(target) is target
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            each, used = target.cotangents(f)
            np.testing.assert_allclose(each[:, 0], 3 * F_**2)
            assert used is None
    assert not f.requires_grad
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    unrelated, _ = as_target(lambda e: parameter.expand(len(e))).cotangents(f)
    assert not unrelated.any()
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda e: e, r"the target returned \[3, 5\] for embeddings \[3, 5\]; expected one sco"),
        (lambda e: e.sum(), r"the target returned \[\] for .* a tensor \[3\]"),
        (lambda e: e.sum(1, keepdim=True), r"the target returned \[3, 1\]"),
        (lambda e: None, "the target returned NoneType"),
        (lambda e: e.detach().sum(1), "does not depend on the embedding, or was cut from it"),
        (lambda e: torch.zeros(len(e)), "compute it with torch from the embeddings it is given"),
    ],
)
def test_functions_that_cannot_be_targets_are_refused(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_target(function).cotangents(torch.from_numpy(F_))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Similarity(ONE, "euclid"), "similarity = 'euclid' is unknown; known: cosine, dot"),
        (lambda: Similarity(np.zeros(D)), "reference holds a vector of length 0, which points now"),
        (lambda: ClassProxy([[1.0, 0], [0, 0]]), "points holds a vector of length 0"),
        (lambda: ClassProxy([[1.0, 0], [-1, 0]]), "the mean of points holds a vector of length 0"),
        (lambda: ClassProxy(EACH_P), r"points have shape \[3, 4, 5\]; expected \[n D\] or \[D\]"),
        (lambda: NegativeDistance([1.0, np.nan]), "reference holds a NaN or an infinity"),
        (lambda: NegativeDistance("far"), "reference cannot be read as an array of numbers"),
        (lambda: NegativeDistance(3.0), r"reference has shape \[\]; expected embeddings"),
        (lambda: TripletMargin(P, N[:2]), r"positives \[4, 5\] and negatives \[2, 5\] must have"),
        (lambda: TripletMargin(P, None), "negatives"),
        (lambda: Coordinate(1.5), "index = 1.5; give a whole number"),
        (lambda: Coordinate(True), "index = True; give a whole number"),
        (lambda: as_target(None), "target is None; give one such as Similarity"),
        (lambda: as_target(Similarity), "target is <class"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Similarity(ONE), r"Similarity: reference has shape \[5\]; .* 7 numbers, so give \[7\]"),
        (NegativeDistance(MANY), r"\[3, 5\]; .* or \[2 7\], one for each of the 2 images"),
        (TripletMargin(P, N), r"TripletMargin: positives has shape \[4, 5\]; .* give \[S 7\]"),
        (TripletMargin(EACH_P, EACH_N), r"\[3, 4, 5\]; .* or \[2 S 7\], one for each"),
        (ClassProxy(POINTS), r"ClassProxy: reference has shape \[5\]"),
        (Coordinate(7), "coordinate 7 of an embedding of 7 numbers; give 0 to 6"),
    ],
)
def test_references_that_do_not_fit_the_embeddings_are_refused(target, message) -> None:
    with pytest.raises(InputError, match=message):
        target.check(2, 7)
