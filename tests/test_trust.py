"""Trust: what is looked at, how it is calibrated, what an index keeps of it, and the fallback."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_samples import Toy, inputs, interrupt, opened, pictures, quicken, toy
from hypothesis import given
from hypothesis import strategies as st
from test_index_corrupt import edit

from embedcam import (
    DirectWeights,
    Explainer,
    Index,
    Recipe,
    TripletMargin,
    add_images,
    build_index,
    cam_for,
)
from embedcam.build import calibrate_index, jobs
from embedcam.calibration import Calibration, evidence, fall
from embedcam.cam import cam, resize, sharpen, signed_cam
from embedcam.cotangents import AnchorCotangents
from embedcam.errors import ImageError, IndexFormatError, InputError, NetworkMismatch
from embedcam.images import ImageSource
from embedcam.index import remove
from embedcam.neighbors import draw_negatives
from embedcam.targets import Direction
from embedcam.trust import LEAST, fit_calibration, leave_out, sample_rows

# --- what is looked at ---


def literal_correlation(a: list[float], b: list[float]) -> float:
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    size_a = sum((x - mean_a) ** 2 for x in a)
    size_b = sum((y - mean_b) ** 2 for y in b)
    return over / math.sqrt(size_a * size_b) if size_a * size_b > 0 else 0.0


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
    each = [literal_correlation([raw[k, i, j] for i, j in cells], signed) for k in range(n)]
    return [sum(each) / n, norm, -sum(apart) / n, -min(apart), *shape]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["mixed", "positive", "negative", "flat", "zero"])
def test_the_evidence_is_the_literal_one(n: int, kind: str) -> None:
    generator = np.random.default_rng(n)
    raw = generator.normal(size=(n, 3, 4))
    raw = {
        "mixed": raw,
        "positive": abs(raw),
        "negative": -abs(raw),
        "flat": np.ones_like(raw),
        "zero": 0 * raw,
    }[kind]
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
    found = []
    for knots in (of.correlations, of.lows):
        worth = knots[0]
        for k in range(len(of.scores) - 1):
            low, high = of.scores[k], of.scores[k + 1]
            if score >= low:
                part = min(1.0, (score - low) / (high - low))
                worth = knots[k] + part * (knots[k + 1] - knots[k])
        found.append(worth * beyond)
    return found[0], min(found)


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
def test_beyond_what_was_calibrated_trust_falls_to_nothing(
    one: float, other: float, largest: float
) -> None:
    near, far = sorted((one, other))
    assert 0 <= fall(np.array(far), largest) <= fall(np.array(near), largest) <= 1
    assert fall(np.array(largest), largest) == 1
    assert fall(np.array(1.5 * largest), largest) == pytest.approx(0.5)
    assert fall(np.array(2 * largest), largest) == 0


def test_an_index_of_one_picture_over_and_over_trusts_that_picture_alone() -> None:
    assert fall(np.array([0.0, 1e-9]), 0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("width", [3, 6])
def test_a_calibration_survives_json(width: int) -> None:
    calibration = some(width)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "mean should hold finite numbers"),
        ({"mean": [1.0, "2", 3.0]}, "mean should hold finite numbers"),
        ({"intercept": math.nan}, "intercept should hold finite numbers"),
        ({"images": True}, "images should hold finite numbers"),
        ({"scale": [1.0, 0.0, 1.0]}, "do not fit together"),
        ({"linear": [1.0]}, "do not fit together"),
        ({"scores": [1.0, 0.0, 2.0]}, "do not fit together"),
        ({"correlations": [0.1, 0.4, 1.1]}, "do not fit together"),
        ({"correlations": [0.4, 0.1, 0.9]}, "do not fit together"),
        ({"lows": [0.1, 0.4]}, "do not fit together"),
        ({"lows": [0.3, 0.2, 0.4]}, "do not fit together"),
        ({"lows": [-0.1, 0.2, 0.4]}, "do not fit together"),
        ({"lows": None}, "lows should hold finite numbers"),
        ({"scores": [], "correlations": [], "lows": []}, "do not fit together"),
        ({"largest_distance": -1.0}, "do not fit together"),
        ({"neighbors": 5}, "do not fit together"),
        ({"neighbors": 2.5}, "neighbors should be a whole number from 1"),
        ({"images": 0}, "images should be a whole number from 1"),
        ({"intercept": 10**400}, "intercept should hold finite numbers"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration.from_dict({**some().to_dict(), **changes})
    with pytest.raises(InputError, match="finite numbers"):
        Calibration.from_dict([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"scale": (1e-300,) * 3}, {"linear": (1e308, -1e308, 1e308), "scale": (1e-9,) * 3}],
    ids=["scale", "coefficients"],
)
def test_what_a_forged_calibration_makes_overflow_is_still_a_share(changes: dict[str, Any]) -> None:
    expected, low = some(**changes).trust(np.array([3.0, -7.0, 5.0]), 0.1)
    assert 0 <= low <= expected <= 1


# --- fitting ---


def known(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Evidence, a correlation that is a function of it with noise, and that function."""
    generator = np.random.default_rng(seed)
    seen = generator.normal(size=(n, 6))
    clear = 1 / (1 + np.exp(-1.5 * seen[:, 0] + seen[:, 3]))
    return seen, np.clip(clear + 0.1 * generator.normal(size=n), -1, 1), clear


def test_a_known_relation_is_found() -> None:
    seen, y, _ = known(400, 1)
    made = fit_calibration(seen, y, np.ones(400), neighbors=5)
    fresh, true, clear = known(2000, 2)
    found, low = trusts(made, fresh, np.zeros(2000)).T
    bins = np.array_split(np.argsort(found, kind="stable"), 10)
    off = [abs(found[part].mean() - clear[part].mean()) for part in bins]
    assert np.mean(off) < 0.04
    assert np.abs(found - clear).mean() < 0.4 * np.abs(clear - np.median(clear)).mean()
    # Nine in ten reach the low one, wherever it lies.
    assert 0.06 < (true < low).mean() < 0.16
    assert all((true[part] < low[part]).mean() < 0.2 for part in bins[2:])
    # It can be wrong: of other evidence nothing can be told.
    turned = trusts(made, fresh[:, ::-1], np.zeros(2000))[:, 0]
    assert np.abs(turned - clear).mean() > 2 * np.abs(found - clear).mean()


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
    ordered: np.ndarray = np.empty(len(y))
    ordered[np.argsort(scores)] = np.clip(worth, 0, 1)
    return list(ordered)


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
    seen, y, _ = known(60, 4)
    seen[:, 2] = 0.5
    given_ = (seen, y, np.ones(60))
    first, second = (fit_calibration(*given_, neighbors=5, seed=3) for _ in range(2))
    assert first == second
    assert np.isfinite(trusts(first, seen, np.ones(60))).all()


@pytest.mark.parametrize(
    ("n", "change", "message"),
    [
        (39, None, "39 images calibrate no trust; give at least 40"),
        (50, "nan", "hold NaN or infinity"),
        (50, "fewer", "must be of the same images"),
    ],
)
def test_a_fit_of_nothing_is_refused(n: int, change: str | None, message: str) -> None:
    seen, y, _ = known(n, 1)
    if change == "nan":
        y[3] = np.nan
    nearest = np.ones(n - (change == "fewer"))
    with pytest.raises(InputError, match=message):
        fit_calibration(seen, y, nearest, neighbors=5)


# --- who explains whom ---


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_left_out_is_neither_found_nor_a_negative(metric: str, labelled: bool) -> None:
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(60, 6)).astype(np.float32)
    labels = [f"k{at // 6}" if labelled else None for at in range(60)]
    rows, recipe = sample_rows(60, 1), Recipe(target="margin", metric=metric)
    both = leave_out(recipe, vectors, labels, rows, closed_form=False, normalized=False)
    found = both["several"]
    assert [one.near.tolist() for one in both["one"]] == [one.near[:1].tolist() for one in found]
    assert [one.row for one in found] == rows.tolist()
    part = np.random.default_rng(0).permutation(60) % 10
    for place, one in enumerate(found):
        left = [at for at in range(60) if part[at] != part[place]]
        squares = {at: float(((vectors[one.row].astype(float) - vectors[at]) ** 2).sum())
                   for at in left}  # fmt: skip
        order = {at: -float(vectors[one.row].astype(float) @ vectors[at]) for at in left}
        key = squares if metric == "l2" else order
        expected = sorted(left, key=lambda at, key=key: key[at])[:5]
        assert one.near.tolist() == expected
        np.testing.assert_allclose(one.distances, [squares[at] for at in expected], rtol=1e-5)
        others = set(one.negatives.tolist())
        assert others <= set(left) - set(expected)
        if labelled:
            assert not {labels[at] for at in others} & {labels[at] for at in expected}
        else:
            assert len(others) == min(50, len(left) - 5)


def test_an_image_has_no_part_in_the_answers_to_itself() -> None:
    """Its own embedding may be anything: what its neighbours store does not know it."""
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(60, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"k{at % 4}" for at in range(60)]
    given_ = (Recipe(), vectors, labels, np.array([7]))
    (one,) = leave_out(*given_, closed_form=True, normalized=True)["several"]
    without = np.delete(np.arange(60), 7)
    names = np.array([int(labels[at][1]) for at in without])
    few = vectors[without]
    anchors = AnchorCotangents(Recipe(), few, names, few.mean(0))
    expected = anchors.of(np.searchsorted(without, one.near)).values
    np.testing.assert_allclose(one.codes, expected, rtol=1e-5, atol=1e-6)
    # With it they are others, as weights of an index that holds it would be.
    every = AnchorCotangents(
        Recipe(), vectors, np.array([int(name[1]) for name in labels]), vectors.mean(0)
    )
    assert np.abs(every.of(one.near).values - expected).max() > 1e-2


def test_few_images_are_no_sample() -> None:
    assert len(sample_rows(LEAST - 1, 0)) == 0
    assert sample_rows(LEAST, 0).tolist() == list(range(LEAST))
    chosen = sample_rows(5000, 0)
    assert len(chosen) == 512
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, sample_rows(5000, 1))


# --- in an index ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return pictures(tmp_path_factory.mktemp("photos"), n=48, classes=4)


def built(
    source: ImageSource, made_of: Toy, path: Path, recipe: Recipe | None = None, **options: Any
) -> Path:
    build_index(source, made_of.network, path, recipe, progress=False, **options)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


RECIPES = {
    "low-rank": Recipe(),
    "top-m": Recipe(encoding="top-m", m=3),
    "centred": Recipe(target="centred", norm="around"),
    "margin": Recipe(target="margin"),
    "gradcam++": Recipe(method="gradcam++"),
    "eigencam": Recipe(method="eigencam"),
}


@pytest.mark.parametrize("kind", ["affine", "identity"])
@pytest.mark.parametrize("own_maps", [True, False])
def test_a_build_calibrates_what_indexes_without_the_queries_answer(
    quick: None,
    source: ImageSource,
    tmp_path: Path,
    kind: str,
    own_maps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_in_smaller_indexes(source, toy(kind), tmp_path, Recipe(), own_maps, monkeypatch)


@pytest.mark.parametrize("name", ["top-m", "centred", "margin"])
def test_so_does_every_recipe_of_a_closed_form(
    quick: None,
    source: ImageSource,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_in_smaller_indexes(source, toy("affine"), tmp_path, RECIPES[name], True, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("other", "low-rank"), ("tokens", "low-rank"), ("pooled", "low-rank"), ("affine", "gradcam++"),
     ("affine", "eigencam")],
)  # fmt: skip
def test_elsewhere_the_stored_weights_are_held_against_direct_ones(
    quick: None,
    source: ImageSource,
    tmp_path: Path,
    kind: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where weights are no closed form those near keep what they store of the whole index."""
    made_of, kept = toy(kind), noted(monkeypatch)
    path = built(source, made_of, tmp_path / "index", RECIPES[name])
    part = np.random.default_rng(0).permutation(40) % 9
    rows = sample_rows(48, 0, 40)
    with opened(path) as (index, live):
        vectors, weights = index.embeddings(live), index.weights(live)
        direct = DirectWeights(made_of.network, Recipe.of_index(index.manifest))
        for count in (1, 5):
            expected = []
            for place, row in enumerate(rows):
                out = set(rows[part == part[place]].tolist())
                left = [at for at in range(48) if at not in out]
                near = sorted(left, key=lambda at: ((vectors[row] - vectors[at]) ** 2).sum())[
                    :count
                ]
                others = draw_negatives(
                    np.setdiff1d(left, near),
                    index.labels[live[near]],
                    lambda at: index.labels[live[at]],
                )
                image = inputs(made_of, source)[row]
                (own,) = direct.weights(image, vectors[near], vectors[others])
                maps = made_of.network.forward(image[None]).activations[0].numpy()
                lengths = [float(np.linalg.norm(weights[at])) for at in near]
                mixed = sum(
                    weights[at] / length if count > 1 and length else weights[at]
                    for at, length in zip(near, lengths, strict=True)
                )
                both = [np.tensordot(each, maps, 1).ravel().tolist() for each in (mixed, own)]
                expected.append(literal_correlation(*both))
            np.testing.assert_allclose(kept[count][1], expected, atol=5e-3)
            assert np.std(expected) > 0.005


def noted(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Evidence and correlations that calibrations are fitted to, by number of neighbours."""
    kept = {}

    def fit(seen: Any, agreed: Any, nearest: Any, *, neighbors: int, **more: Any) -> Any:
        kept[neighbors] = (seen, agreed)
        return fit_calibration(seen, agreed, nearest, neighbors=neighbors, **more)

    monkeypatch.setattr("embedcam.build.calibrating.fit_calibration", fit)
    return kept


def check_in_smaller_indexes(
    source: ImageSource,
    made_of: Toy,
    folder: Path,
    recipe: Recipe,
    own_maps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An index is built without each tenth of the images, and asked with them."""
    kept = noted(monkeypatch)
    built(source, made_of, folder / "index", recipe, own_maps=own_maps)
    part = np.random.default_rng(0).permutation(48) % 10
    images, found = inputs(made_of, source), {1: {}, 5: {}}
    for number in range(10):
        rest = source.only(np.flatnonzero(part != number).tolist())
        path = built(rest, made_of, folder / str(number), recipe, trust=False, own_maps=own_maps)
        with opened(path) as (index, _):
            fallback = DirectWeights(made_of.network, Recipe.of_index(index.manifest))
            explainer = Explainer(index, made_of.network)
            for row in np.flatnonzero(part == number):
                activations = made_of.network.forward(images[row][None]).activations[0].numpy()
                for count, rows in found.items():
                    explained = explainer.explain(images[row], n_neighbors=count)
                    near, labels = index.positions(explained.ids), index.labels
                    others = draw_negatives(
                        np.setdiff1d(np.arange(len(index)), near), labels[near],
                        lambda at, labels=labels: labels[at],
                    )  # fmt: skip
                    weights = index.weights(near)
                    lengths = np.linalg.norm(weights, axis=1)
                    shares = np.ones(1) if count == 1 else 1 / count / lengths
                    raw = np.tensordot(weights, activations, 1)
                    (own,) = fallback.weights(
                        images[row], index.embeddings(near), index.embeddings(others)
                    )
                    drawn = np.tensordot(shares, raw, 1).ravel().tolist()
                    direct = np.tensordot(own, activations, 1).ravel().tolist()
                    norm = float(np.linalg.norm(shares @ weights))
                    rows[row] = (
                        literal_evidence(raw, shares, norm, explained.distances),
                        literal_correlation(drawn, direct),
                    )
    for count, rows in found.items():
        seen, agreed = kept[count]
        np.testing.assert_allclose(seen, [rows[row][0] for row in range(48)], atol=5e-3)
        np.testing.assert_allclose(agreed, [rows[row][1] for row in range(48)], atol=5e-3)
        assert np.std(agreed) > 0.005


def test_maps_of_several_layers_are_compared_as_they_are_explained(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_methods_index import LAYERS, dense, layered

    kept = noted(monkeypatch)
    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    rows, part = sample_rows(44, 0, 40), np.random.default_rng(0).permutation(40) % 10
    with Index.open(tmp_path / "index") as index:
        explainer, names = Explainer(index), [layer["name"] for layer in index.manifest["layers"]]
        images = np.stack([network.preprocess(source.open(place)) for place in range(44)])
        features, maps = network.forward_layers(images, names)
        vectors, direct = features.embedding.numpy(), DirectWeights(network, recipe)
        for count in (1, 5):
            expected = []
            for place, row in enumerate(rows):
                left = np.setdiff1d(np.arange(44), rows[part == part[place]])
                apart = ((vectors[row] - vectors[left]) ** 2).sum(1)
                near = left[np.argsort(apart)[:count]]
                others = draw_negatives(
                    np.setdiff1d(left, near), index.labels[near], lambda at: index.labels[at]
                )
                own = direct.weights(images[row], vectors[near], vectors[others])
                ids = [index.ids[at] for at in near]
                layers = [one[row].numpy() for one in maps]
                drawn = explainer.explain_features(vectors[row], layers, neighbors=ids).signed_cam
                signed = signed_cam(own[0], layers[0])
                found = np.maximum(signed, 0)
                for each, one in zip(own[1:], layers[1:], strict=True):
                    found = sharpen(cam(each, one), found)
                below = np.minimum(resize(signed, found.shape), 0)
                signed = np.where(found > 0, found, below)
                expected.append(
                    literal_correlation(drawn.ravel().tolist(), signed.ravel().tolist())
                )
            np.testing.assert_allclose(kept[count][1], expected, atol=5e-3)
            assert np.std(expected) > 0.01


def test_too_few_images_calibrate_nothing_and_so_can_the_user(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    few = pictures(tmp_path / "few", n=LEAST - 1)
    for name, images, options in (("few", few, {}), ("none", source, {"trust": False})):
        made_of = toy()
        path = built(images, made_of, tmp_path / name / "index", **options)
        with Index.open(path) as index:
            assert "trust_calibration" not in index.manifest
            found = Explainer(index, made_of.network).explain(inputs(made_of, images)[0])
            assert (found.trust, found.trusted, found.direct) == (None, None, False)
            assert "trust" not in found._transfer_note()


def test_an_index_without_the_calibration_asked_for_is_not_called_complete(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index", trust=False)
    built(source, made_of, path, trust=False)
    with pytest.raises(InputError, match=r"finished index with another choice of trust.*--refit"):
        built(source, made_of, path)
    built(source, made_of, path, replace=True)
    built(source, made_of, path)
    with pytest.raises(InputError, match="another choice of trust"):
        built(source, made_of, path, trust=False)
    few = pictures(tmp_path / "few", n=LEAST - 1)
    for _ in range(2):  # too few for one: there is none to ask for
        built(few, made_of, tmp_path / "small")


def test_an_explanation_says_how_far_to_trust_it(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    queries = inputs(made_of, source)
    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=0.3)
        calibrations = {
            n: Calibration.from_dict(v) for n, v in index.manifest["trust_calibration"].items()
        }
        activations = made_of.network.forward(queries[:1]).activations[0].numpy()
        for asked in ({}, {"n_neighbors": 1}, {"result": index.ids[7]}):
            found = explainer.explain(queries[0], **asked)
            positions = index.positions(found.explained)
            weights = index.weights(positions)
            one = len(positions) == 1
            norms = np.linalg.norm(weights, axis=1)
            shares = np.ones(1) if one else 1 / len(norms) / norms
            raw = np.tensordot(weights, activations, 1)
            own = index.embeddings(positions).astype(np.float64)
            embedding = made_of.network.forward(queries[:1]).embedding[0].numpy()
            apart = ((own - embedding) ** 2).sum(1)
            seen = literal_evidence(raw, shares, float(np.linalg.norm(shares @ weights)), apart)
            expected = literal_trust(
                calibrations["one" if one else "several"], np.array(seen), min(apart)
            )
            assert (found.trust, found.trust_low) == pytest.approx(expected, abs=2e-3)
            assert found.trusted == (found.trust_low >= 0.3)
            assert found.to_dict()["trust"] == found.trust
            assert found.to_dict()["trusted"] == found.trusted
        far = explainer.explain(queries[0] * 0 + 40 * np.sign(queries[0] - 0.3))
        assert far.trust <= explainer.explain(queries[0]).trust + 0.5
    for wrong in (1.5, -0.1, True, math.nan):
        with pytest.raises(InputError, match=r"trusted_from = .*; give a number from 0 to 1"):
            Explainer(path, trusted_from=wrong)


def test_where_all_images_have_one_label_none_is_strange(quick: None, tmp_path: Path) -> None:
    made_of, alike = toy(), pictures(tmp_path / "photos", n=42, classes=1)
    path = built(alike, made_of, tmp_path / "index", Recipe(target="centred", norm="around"))
    with Index.open(path) as index:
        found = Calibration.from_dict(index.manifest["trust_calibration"]["several"])
        vectors = index.embeddings(np.arange(42))
        near = index.search(vectors, 2).distances.max(1)
    assert found.images == 42
    assert found.largest_distance == pytest.approx(float(near.max()), rel=1e-3)


def test_what_is_added_leaves_the_calibration(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    with Index.open(path) as index:
        before = index.manifest["trust_calibration"]
    more = pictures(tmp_path / "more", n=3)
    items = [replace(item, id=f"new/{item.id}") for item in more.items]
    add_images(ImageSource(items, more.root), made_of.network, path, progress=False)
    with Index.open(path) as index:
        assert len(index) == 51
        assert index.manifest["trust_calibration"] == before


def test_an_index_with_a_broken_calibration_is_refused(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    path = built(source, toy(), tmp_path / "index")
    with Index.open(path) as index:
        good = index.manifest["trust_calibration"]
    for broken, message in (
        ({**good, "many": {}}, "trust_calibration has the unknown entry 'many'"),
        (
            {"one": {**good["one"], "scale": [0] * 3}},
            r"trust_calibration\.one: .*do not fit together",
        ),
        (
            {"several": good["one"]},
            r"trust_calibration\.several is of explanations by 1 neighbours",
        ),
        ({"one": good["several"]}, r"trust_calibration\.one is of explanations by 5 neighbours"),
        ([1], "trust_calibration"),
    ):
        edit(lambda manifest, broken=broken: manifest.update(trust_calibration=broken))(path)
        with pytest.raises(IndexFormatError, match=message):
            Index.open(path)


def test_an_earlier_trust_is_not_read_and_the_note_names_what_calibrates_it_again(
    quick: None, source: ImageSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index")
    with Index.open(path) as index:
        expected = index.manifest["trust_calibration"]
    # As an index of an earlier version has it, and as none may be: nothing reads it.
    edit(lambda m: m.update(trust={"one": "?"}, trust_calibration=None))(path)
    query = inputs(made_of, source)[0]
    with Explainer(path, made_of.network) as explainer:
        found = explainer.explain(query)
        explainer.explain(query)
    assert (found.trust, found.trust_low, found.trusted) == (None, None, None)
    told = [each.message for each in caplog.records if "earlier definition" in each.message]
    assert len(told) == 1
    assert f"`embedcam calibrate {path}` makes it again, without building the index" in told[0]
    assert calibrate_index(path, progress=False) == {"match": 48}
    assert calibrate_index(path, made_of.network, progress=False) == {"match": 48, "trust": 48}
    with opened(path) as (index, _):
        index.verify()
        made = index.manifest["trust_calibration"]
    for name, one in expected.items():
        # The build drew with activations that it kept in half precision.
        np.testing.assert_allclose(made[name]["mean"], one["mean"], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(
            made[name]["correlations"][-1], one["correlations"][-1], atol=0.01
        )
    with Explainer(path, made_of.network) as explainer:
        assert explainer.explain(query).trust > 0.5


def test_what_changes_while_it_is_calibrated_is_not_vouched_for(
    quick: None, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(source, toy("affine"), tmp_path / "index")
    fit = jobs.calibrate_match

    def changed(*given_: Any) -> Any:
        remove(path, [str(Index.open(path).ids[0])])
        return fit(*given_)

    monkeypatch.setattr(jobs, "calibrate_match", changed)
    with pytest.raises(InputError, match="changed while it was being calibrated, so nothing was w"):
        calibrate_index(path, progress=False)
    with Index.open(path) as index:
        assert len(index) == 47
        assert index.manifest["match_calibration"]["several"]["images"] == 48


def test_of_inner_products_the_nearest_counts_not_the_first(quick: None, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(60, 8)) * generator.uniform(0.1, 5, (60, 1))
    recipe = Recipe(metric="ip", target="margin")
    labels = [f"k{at % 3}" for at in range(60)]
    found = leave_out(
        recipe, vectors.astype(np.float32), labels, sample_rows(60, 0), closed_form=False,
        normalized=False,
    )["several"]  # fmt: skip
    assert any(one.distances.min() < one.distances[0] for one in found)
    made_of, photos = toy("affine"), pictures(tmp_path / "photos", n=44)
    path = built(photos, made_of, tmp_path / "index", Recipe(metric="ip"))
    with opened(path) as (index, live):
        largest = index.manifest["trust_calibration"]["several"]["largest_distance"]
        expected = leave_out(
            Recipe(metric="ip"), index.embeddings(live), list(index.labels[live]),
            sample_rows(44, 0), closed_form=False, normalized=True,
        )["several"]  # fmt: skip
    assert largest == pytest.approx(max(float(one.distances.min()) for one in expected))


def test_what_cannot_be_calibrated_again_says_why(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy("affine")
    path = built(pictures(tmp_path / "few", n=LEAST - 1), made_of, tmp_path / "index")
    with pytest.raises(InputError, match=r"39 images calibrate no trust; add images .* least 40"):
        calibrate_index(path, made_of.network, progress=False)
    with pytest.raises(NetworkMismatch):
        calibrate_index(path, toy("identity").network, progress=False)
    whole = built(source, made_of, tmp_path / "whole")
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(ImageError, match=r"no such file|cannot be read|does not exist"):
        calibrate_index(whole, made_of.network, images=tmp_path / "nowhere", progress=False)
    assert (whole / "manifest.json").read_bytes() == before


def test_a_build_is_the_same_bytes_again(quick: None, source: ImageSource, tmp_path: Path) -> None:
    kept = []
    for name, batch in (("a", 32), ("b", 32), ("c", 5)):
        path = built(source, toy("other"), tmp_path / name, batch_size=batch)
        kept.append(json.loads((path / "manifest.json").read_text())["trust_calibration"])
    assert kept[0] == kept[1]
    for name in ("one", "several"):
        np.testing.assert_allclose(kept[2][name]["mean"], kept[0][name]["mean"], rtol=1e-3)


@pytest.mark.parametrize("own_maps", [True, False])
def test_a_build_that_is_stopped_while_it_calibrates_goes_on(
    quick: None,
    source: ImageSource,
    tmp_path: Path,
    own_maps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_of, given_ = toy("other"), {"own_maps": own_maps, "progress": False}
    passes = [0]
    forward = type(made_of.network).forward

    def counted(self: Any, images: Any, **more: Any) -> Any:
        passes[-1] += len(images)
        return forward(self, images, **more)

    monkeypatch.setattr(type(made_of.network), "forward", counted)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    build_index(source, made_of.network, whole, **given_)
    passes.append(0)
    interrupt(monkeypatch, "calibrate_build", build_index, source, made_of.network, cut, **given_)
    assert not (cut / "manifest.json").exists()
    passes.append(0)
    build_index(source, made_of.network, cut, **given_)
    assert passes[2] <= passes[0] - 48  # what was finished is used again
    manifests = [json.loads((one / "manifest.json").read_text()) for one in (whole, cut)]
    assert manifests[0]["trust_calibration"]["several"]["images"] == 40
    for key in ("trust_calibration", "parts", "fitted"):
        assert manifests[0][key] == manifests[1][key]


# --- what is computed instead ---


@pytest.mark.parametrize(
    "recipe",
    [Recipe(target="margin"), Recipe(method="gradcam++"), Recipe(target="centred", norm="around"),
     Recipe(method="scorecam", encoding="dense"),
     Recipe(method="scorecam", encoding="dense", fill="black"),
     Recipe(method="smoothgradcam++", encoding="dense", seed=7, options={"samples": 3})],
    ids=lambda r: f"{r.method}, {r.target}, {r.fill}",
)  # fmt: skip
def test_an_explanation_that_is_not_trusted_is_computed_on_the_query(
    quick: None, source: ImageSource, tmp_path: Path, recipe: Recipe
) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index", recipe)
    query = inputs(made_of, source)[5] * 1.1
    with Index.open(path) as index, torch.inference_mode():
        plain = Explainer(index, made_of.network, trusted_from=1.0).explain(query)
        assert (plain.direct, plain.trusted) == (False, False)
        asked: list[tuple[np.ndarray, np.ndarray]] = []

        class Noted(DirectWeights):
            def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
                asked.append((positives, negatives))
                return super().weights(inputs, positives, negatives)

        fallback = Noted(made_of.network, Recipe.from_dict(index.manifest["recipe"]))
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=fallback)
        found = explainer.explain(query)
        again = explainer.explain(query)
        positives, negatives = asked[0]
        near = {index.labels[p] for p in index.positions(found.ids)}
        rows = {tuple(v): index.labels[i] for i, v in enumerate(index.embeddings(np.arange(48)))}
    assert (found.direct, found.trusted, found.trust) == (True, True, plain.trust)
    assert np.array_equal(found.cam, again.cam)
    assert found.to_dict()["direct"] is True
    assert "computed on the query:\ntransfer not trusted" in found._transfer_note()
    np.testing.assert_array_equal(positives, index_vectors(path, found.ids))
    assert not {rows[tuple(v)] for v in negatives} & near
    own = made_of.network.forward(query[None]).embedding[0].numpy()
    norm = recipe.norm
    if recipe.target == "centred":
        aim: Any = Direction(own - np.concatenate([positives, negatives]).mean(0))
    elif recipe.resolved_target == "distinctive":
        aim = Direction(of_its_neighbors(own, positives, negatives))
        norm = norm if recipe.entry.scored else "around"
    else:
        pairs_ = [(p, n) for p in positives for n in negatives]
        aim = TripletMargin(*map(np.array, zip(*pairs_, strict=True)))
    if recipe.per_triplet:
        drawn = np.random.default_rng(recipe.seed)
        first, second = (drawn.integers(len(v), size=50) for v in (positives, negatives))
        aim = TripletMargin(positives[first], negatives[second])
    expected = cam_for(
        made_of.network, query, aim, recipe.method, norm=norm, progress=False,
        fill=recipe.fill, seed=recipe.seed, **dict(recipe.options),
    )  # fmt: skip
    scale = np.abs(expected.weights).max()
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(found.cam, expected.cam, rtol=1e-3, atol=1e-4 * expected.cam.max())
    assert np.abs(found.weights - plain.weights).max() > 1e-3 * np.abs(plain.weights).max()


def of_its_neighbors(own: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The distinctive target at a query `[D]`, its neighbours in place of a label."""
    others = np.concatenate([positives, negatives]).astype(np.float64)
    covariance = np.cov(others.T, bias=True)
    load = 10 * np.trace(covariance) / len(own) * np.eye(len(own))
    kind = np.linalg.solve(covariance + load, 2 * (positives.mean(0) - negatives.mean(0)))
    kind -= 0.5 * (kind @ own) * own
    centred = own - others.mean(0)
    found: np.ndarray = kind / np.linalg.norm(kind) + 0.2 * centred / np.linalg.norm(centred)
    return found.astype(np.float32)


def test_what_is_explained_by_one_result_is_not_told_from_that_result(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index")
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    class Noted:
        def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
            asked.append((positives, negatives))
            return [np.ones(8, np.float32)]

    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=Noted())
        query = inputs(made_of, source)[5] * 1.1
        near = explainer.explain(query, n_neighbors=2)
        labels = {name: label for name, label in zip(index.ids, index.labels, strict=True)}
        far = next(n for n in labels if labels[n] not in near.labels and n not in near.ids)
        asked.clear()
        rival = explainer.explain(query, n_neighbors=2, result=far, above=near.ids[0])
        assert (rival.trust, rival.trusted, rival.direct, asked) == (None, None, False, [])
        assert explainer.explain(query, n_neighbors=2, result=far).direct
        ((positives, negatives),) = asked
        of = {tuple(v): labels[index.ids[i]] for i, v in enumerate(index.embeddings(range(48)))}
    np.testing.assert_array_equal(positives, index_vectors(path, [far]))
    assert len(negatives)
    assert not {of[tuple(v)] for v in negatives} & {labels[far], *near.labels}


def test_without_labels_neighbours_and_the_result_are_still_no_negatives(
    quick: None, tmp_path: Path
) -> None:
    made_of = toy("affine")
    photos = pictures(tmp_path / "photos", n=42)
    bare = ImageSource([replace(item, label=None) for item in photos.items], photos.root)
    path = built(bare, made_of, tmp_path / "index")
    asked: list[np.ndarray] = []

    class Noted:
        def weights(self, inputs: Any, positives: Any, negatives: Any) -> Any:
            asked.append(negatives)
            return [np.ones(8, np.float32)]

    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=1.0, fallback=Noted())
        query = inputs(made_of, bare)[5] * 1.1
        far = Explainer(index, made_of.network).explain(query, n_neighbors=42).ids[-1]
        found = explainer.explain(query, n_neighbors=3, result=far)
        left_out = index.embeddings(index.positions([*found.ids, far]))
        (negatives,) = asked
        assert len(negatives) == 42 - 4
        assert not {tuple(v) for v in negatives} & {tuple(v) for v in left_out}


def test_beyond_what_was_calibrated_it_is_the_nearest_that_counts(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    query = inputs(made_of, source)[0] * 1.1
    with Index.open(path) as index:
        near = Explainer(index, made_of.network).explain(query)
    nearest, farthest = float(near.distances[0]), float(near.distances[-1])
    assert farthest > 1.1 * nearest
    edit(lambda m: m["trust_calibration"]["several"].update(largest_distance=nearest / 1.5))(path)
    with Index.open(path) as index:
        far = Explainer(index, made_of.network).explain(query)
    assert far.trust == pytest.approx(near.trust / 2, rel=1e-3)
    assert near.trust > 0.1


def index_vectors(path: Path, ids: list[str]) -> np.ndarray:
    with Index.open(path) as index:
        return index.embeddings(index.positions(ids))


def test_direct_weights_of_several_layers(quick: None, tmp_path: Path) -> None:
    from test_methods_index import LAYERS, dense, layered

    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    with Index.open(tmp_path / "index") as index:
        query = network.preprocess(source.open(3))
        fallback = DirectWeights(network, recipe)
        found = Explainer(index, network, trusted_from=1.0, fallback=fallback).explain(query)
        assert found.direct
        names = [layer["name"] for layer in index.manifest["layers"]]
        maps = network.forward_layers(query[None], names)[1]
        drawn = cam(found.layer_weights[names[0]], maps[0][0].numpy())
        for name, one in zip(names[1:], maps[1:], strict=True):
            drawn = sharpen(cam(found.layer_weights[name], one[0].numpy()), drawn)
        assert drawn.max() > 0


def test_a_fallback_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="DirectWeights takes the index's network and recipe"):
        DirectWeights(toy().network, "gradcam")  # type: ignore[arg-type]


def test_features_alone_are_not_computed_again(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    made_of = toy()
    # An image that is not indexed, whose weights are its own: transfer is not exact.
    recipe = Recipe(method="gradcam++")
    path = built(source, made_of, tmp_path / "index", recipe)
    fallback = DirectWeights(made_of.network, recipe)
    explainer = Explainer(path, trusted_from=1.0, fallback=fallback)
    features = made_of.network.forward(inputs(made_of, source)[5:6] * 1.1)
    found = explainer.explain_features(
        features.embedding[0].numpy(), features.activations[0].numpy()
    )
    assert found.direct is False
    assert found.trusted is False
    assert 0 < found.trust < 1
    explainer.index.close()
