"""Trust: what is looked at, and how it is calibrated."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from build_samples import toy
from hypothesis import given
from hypothesis import strategies as st
from oracles_metrics import correlation

from embedcam import Recipe
from embedcam.errors import InputError
from embedcam.index.calibration import Calibration, evidence, fall
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.trust import LEAST, fit_calibration, leave_out, trust_rows


def literal_evidence(
    raw: np.ndarray, shares: np.ndarray, norm: float, distances: np.ndarray
) -> list[float]:
    n, height, width = raw.shape
    cells = [(i, j) for i in range(height) for j in range(width)]
    signed = [sum(shares[k] * raw[k, i, j] for k in range(n)) for i, j in cells]
    size, mean = sum(abs(value) for value in signed), sum(signed) / len(signed)
    spread = math.sqrt(sum((value - mean) ** 2 for value in signed) / len(signed))
    peak = math.log(max(abs(value) for value in signed) / spread) if spread > 1e-6 else 0.0
    shape = [peak, sum(max(value, 0.0) for value in signed) / size if size else 0.0]
    apart = [math.sqrt(value) for value in distances]
    if n == 1:
        return [-apart[0], *shape]
    each = [correlation([raw[k, i, j] for i, j in cells], signed) for k in range(n)]
    return [sum(each) / n, norm, -sum(apart) / n, -min(apart), *shape]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mixed", "positive", "negative", "flat", "zero"])
def test_the_evidence_is_the_literal_one(n: int, kind: str) -> None:
    generator = np.random.default_rng(n)
    raw = generator.normal(size=(n, 3, 4))
    kinds = {"mixed": raw, "positive": abs(raw), "negative": -abs(raw), "flat": raw**0}
    raw = kinds.get(kind, 0 * raw)
    shares, distances = generator.random(n), generator.random(n)
    found = evidence(raw, shares, 0.7, distances)
    np.testing.assert_allclose(found, literal_evidence(raw, shares, 0.7, distances), atol=1e-12)
    assert np.isfinite(found).all()
    broken = literal_evidence(raw, shares, 0.7, distances + 0.1)
    assert np.abs(found - broken).max() > 1e-3


def some(width: int = 3, **changes: Any) -> Calibration:
    generator = np.random.default_rng(3)
    made = Calibration(
        mean=tuple(generator.normal(size=width)),
        scale=tuple(0.5 + generator.random(width)),
        linear=tuple(generator.normal(size=width)),
        intercept=0.25,
        scores=(-1.0, 0.0, 2.0),
        correlations=(0.1, 0.4, 0.9),
        lows=(0.0, 0.3, 0.35),
        largest_distance=0.5,
        neighbors=1 if width == 3 else 5,
        images=64,
    )
    return replace(made, **changes)


def literal_trust(of: Calibration, seen: np.ndarray, nearest: float) -> tuple[float, float]:
    x = [(value - of.mean[i]) / of.scale[i] for i, value in enumerate(seen)]
    score = of.intercept + sum(of.linear[a] * x[a] for a in range(len(x)))
    beyond = max(0.0, min(1.0, 2 - nearest / of.largest_distance))
    expected, low = (beyond * np.interp(score, of.scores, y) for y in (of.correlations, of.lows))
    return expected, min(expected, low)


@pytest.mark.parametrize("width", [3, 6])
def test_trust_is_the_literal_one(width: int) -> None:
    calibration, generator = some(width), np.random.default_rng(8)
    seen, nearest = generator.normal(size=(40, width)), generator.random(40)
    found = trusts(calibration, seen, nearest)
    expected = [literal_trust(calibration, *each) for each in zip(seen, nearest, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(set(np.round(found[:, 0], 6))) > 20
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.3
    turned = replace(calibration, linear=calibration.linear[::-1])
    assert np.abs(trusts(turned, seen, nearest) - expected).max() > 0.05


def trusts(of: Calibration, seen: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    return np.array([of.trust(*each) for each in zip(seen, nearest, strict=True)])


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 3))
def test_beyond_what_was_calibrated_trust_falls_to_nothing(one, other, largest) -> None:
    near, far = sorted((one, other))
    assert 0 <= fall(far, largest) <= fall(near, largest) <= 1
    assert fall(largest, largest) == 1
    assert fall(1.5 * largest, largest) == pytest.approx(0.5)
    assert fall(2 * largest, largest) == 0
    # An index of one picture over and over trusts that picture alone.
    assert [fall(one, 0.0) for one in (0.0, 1e-9)] == [1.0, 0.0]


APART = [
    ("scale", [1.0, 0.0, 1.0]), ("linear", [1.0]), ("scores", [1.0, 0.0, 2.0]), ("neighbors", 5),
    ("correlations", [0.1, 0.4, 1.1]), ("correlations", [0.4, 0.1, 0.9]), ("lows", [0.3, 0.2, 0.4]),
    ("lows", [-0.1, 0.2, 0.4]), ("largest_distance", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "mean is None, not of type list"),
        ({"mean": [1.0, "2", 3.0]}, r"mean\[1\] is '2'; expected a number"),
        ({"intercept": math.nan}, "intercept is nan; expected a number"),
        ({"intercept": 10**400}, "intercept is 1000.*; expected a number"),
        ({"images": True}, "images is True, not of type int"),
        ({"images": 0}, "images = 0 is impossible"),
        ({"scores": [], "correlations": [], "lows": []}, "do not fit together"),
        *(({key: value}, "do not fit together") for key, value in APART),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration.from_dict({**some().to_dict(), **changes})
    with pytest.raises(InputError, match="not of type dict"):
        Calibration.from_dict([1])


def test_what_a_forged_calibration_makes_overflow_is_still_a_share() -> None:
    for linear, scale in ((some().linear, 1e-300), ((1e308, -1e308, 1e308), 1e-9)):
        made = some(linear=linear, scale=(scale,) * 3)
        expected, low = made.trust(np.array([3.0, -7.0, 5.0]), 0.1)
        assert 0 <= low <= expected <= 1


def test_a_known_relation_is_found_and_nine_in_ten_reach_the_low_one() -> None:
    generator = np.random.default_rng(1)
    seen = generator.normal(size=(2400, 6))
    clear = 1 / (1 + np.exp(-1.5 * seen[:, 0] + seen[:, 3]))
    true = np.clip(clear + 0.1 * generator.normal(size=2400), -1, 1)
    made = fit_calibration(seen[:400], true[:400], np.ones(400), neighbors=5)
    found, low = trusts(made, seen[400:], np.zeros(2000)).T
    wrong = trusts(made, seen[400:, ::-1], np.zeros(2000))[:, 0]
    error = np.abs(found - clear[400:]).mean()
    assert 2 * error < np.abs(wrong - clear[400:]).mean()
    assert error < 0.4 * np.abs(clear - np.median(clear)).mean()
    assert 0.06 < (true[400:] < low).mean() < 0.16


def literal_ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients of columns of unit spread and, last, the intercept; left out one at a time."""

    def solved(rows: np.ndarray, penalty: float) -> np.ndarray:
        each = np.column_stack([x[rows], np.ones(len(rows))])
        normal = each.T @ each
        normal[np.arange(x.shape[1]), np.arange(x.shape[1])] += penalty
        return np.linalg.solve(normal, each.T @ y[rows])

    rows, errors = np.arange(len(y)), {}
    for penalty in np.logspace(-2, 4, 13):
        errors[penalty] = 0.0
        for row in rows:
            made = solved(rows[rows != row], penalty)
            errors[penalty] += (y[row] - x[row] @ made[:-1] - made[-1]) ** 2
    return solved(rows, min(errors, key=errors.__getitem__))


def literal_rising(scores: np.ndarray, y: np.ndarray) -> list[float]:
    """The best rising values at the scores: neighbours that fall are pooled until none does."""
    pools: list[list[float]] = []
    for place in np.argsort(scores):
        pools.append([float(y[place]), 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            value, weight = pools.pop()
            before, other = pools.pop()
            total = weight + other
            pools.append([(value * weight + before * other) / total, total])
    worth = [value for value, weight in pools for _ in range(int(weight))]
    return list(np.clip(worth, 0, 1)[np.argsort(np.argsort(scores))])


def test_a_fit_is_the_literal_one() -> None:
    generator = np.random.default_rng(1)
    n, width = 93, 3
    seen = generator.normal(size=(n, width)) * [1, 30, 0.02] + [0, 5, 1]
    y = 0.5 + np.tanh(seen[:, 0]) * 0.3 + 0.003 * seen[:, 1] + 0.1 * generator.normal(size=n)
    made = fit_calibration(seen, y, np.arange(n) / n, neighbors=1, seed=5)
    assert (made.largest_distance, made.neighbors, made.images) == ((n - 1) / n, 1, n)
    np.testing.assert_allclose(made.mean, seen.mean(0))
    np.testing.assert_allclose(made.scale, seen.std(0))
    x = (seen - seen.mean(0)) / seen.std(0)

    def scored(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
        centre, spread = x[known].mean(0), x[known].std(0)
        fitted = literal_ridge((x[known] - centre) / spread, y[known])
        return (x[asked] - centre) / spread @ fitted[:-1] + fitted[-1]

    fold = np.random.default_rng(5).permutation(n) % 5
    unseen = np.empty(n)
    for part in range(5):
        unseen[fold == part] = scored(np.flatnonzero(fold != part), np.flatnonzero(fold == part))
    everything = np.arange(n)
    np.testing.assert_allclose(made.score(seen), scored(everything, everything), atol=1e-8)
    worth = np.array(literal_rising(unseen, y))
    knots = sorted({round(value, 9) for value in worth})
    np.testing.assert_allclose(made.correlations, knots, atol=1e-8)
    pools = [unseen[np.abs(worth - value) < 1e-8].mean() for value in knots]
    np.testing.assert_allclose(made.scores, pools, atol=1e-8)
    # Two halves by score, each with its 10th percentile, joined by a line.
    order = np.argsort(unseen)
    halves = order[:47], order[47:]
    centres = [sum(unseen[half]) / len(half) for half in halves]
    lows = []
    for half in halves:
        values, at = sorted(y[half]), 0.1 * (len(half) - 1)
        lows.append(values[int(at)] + (at % 1) * (values[int(at) + 1] - values[int(at)]))
    assert 0 < lows[0] < lows[1]
    np.testing.assert_allclose(made.lows, np.interp(made.scores, centres, lows), atol=1e-8)


def test_a_fit_is_repeatable_and_takes_evidence_that_never_changes() -> None:
    generator = np.random.default_rng(4)
    seen, y = generator.normal(size=(60, 6)), generator.random(60)
    seen[:, 2] = 0.5
    first, second = (fit_calibration(seen, y, np.ones(60), neighbors=5, seed=3) for _ in range(2))
    assert first == second
    assert Calibration.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert np.isfinite(trusts(first, seen, np.ones(60))).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_left_out_is_neither_found_nor_a_negative(metric: str, labelled: bool) -> None:
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(60, 6)).astype(np.float32)
    labels = [f"k{at // 6}" if labelled else None for at in range(60)]
    rows, recipe = np.arange(60), Recipe(target="margin", metric=metric)
    both = leave_out(recipe, vectors, labels, rows, closed_form=False, normalized=False)
    found = both["several"]
    assert [one.near.tolist() for one in both["one"]] == [one.near[:1].tolist() for one in found]
    assert [one.row for one in found] == rows.tolist()
    part = np.random.default_rng(0).permutation(60) % 10
    for place, one in enumerate(found):
        left = [at for at in range(60) if part[at] != part[place]]
        own = vectors[one.row].astype(float)
        squares = {at: float(((own - vectors[at]) ** 2).sum()) for at in left}
        products = {at: -float(own @ vectors[at]) for at in left}
        expected = sorted(left, key=(squares if metric == "l2" else products).__getitem__)[:5]
        assert one.near.tolist() == expected
        np.testing.assert_allclose(one.distances, [squares[at] for at in expected], rtol=1e-5)
        others = set(one.negatives.tolist())
        assert others <= set(left) - set(expected)
        if labelled:
            assert not {labels[at] for at in others} & {labels[at] for at in expected}
        else:
            assert len(others) == min(50, len(left) - 5)


def test_an_image_has_no_part_in_the_answers_to_itself() -> None:
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(60, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"k{at % 4}" for at in range(60)]
    given_ = (Recipe(), vectors, labels, np.array([7]))
    (one,) = leave_out(*given_, closed_form=True, normalized=True)["several"]
    without, codes = np.delete(np.arange(60), 7), np.arange(60) % 4
    few = vectors[without]
    anchors = AnchorCotangents(Recipe(), few, codes[without], few.mean(0))
    expected = anchors.of(np.searchsorted(without, one.near)).values
    np.testing.assert_allclose(one.codes, expected, rtol=1e-5, atol=1e-6)
    # With it they are others, as weights of an index that holds it would be.
    every = AnchorCotangents(Recipe(), vectors, codes, vectors.mean(0))
    assert np.abs(every.of(one.near).values - expected).max() > 1e-2


def test_few_images_are_no_sample() -> None:
    network = toy().network
    ids = [f"{row}.png" for row in range(5000)]
    assert len(trust_rows(ids[: LEAST - 1], Recipe(), network)) == 0
    assert trust_rows(ids[:LEAST], Recipe(), network).tolist() == list(range(LEAST))
    chosen = trust_rows(ids, Recipe(), network)
    assert len(np.unique(chosen)) == 512
    assert not np.array_equal(chosen, trust_rows(ids, Recipe(seed=1), network))
