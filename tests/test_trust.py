"""Trust: what is looked at, how it is calibrated, what an index keeps of it, and the fallback."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build_samples import HEADS, Toy, inputs, interrupt, opened, pictures, quicken, toy
from hypothesis import given, settings
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
from embedcam.calibration import Calibration, evidence, fall, pairs
from embedcam.cam import cam, sharpen
from embedcam.errors import IndexFormatError, InputError
from embedcam.images import ImageSource
from embedcam.targets import Direction
from embedcam.trust import LEAST, Twice, _smallest, fit_calibration, sample_rows

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
    drawn = [max(value, 0.0) for value in signed]
    total = sum(drawn)
    peak, spread = math.log(len(cells)), 0.0
    if total > 0:
        peak = math.log(max(drawn) / (total / len(cells)))
        spread = -sum(v / total * math.log(v / total) for v in drawn if v > 0)
    size = sum(abs(value) for value in signed)
    shape = [peak, total / size if size else 0.0, spread]
    if n == 1:
        return [-distances[0], *shape]
    each = [
        literal_correlation([max(raw[k, i, j], 0.0) for i, j in cells], drawn) for k in range(n)
    ]
    return [sum(each) / n, norm, -sum(distances) / n, -min(distances), *shape]


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


def some(width: int = 4, **changes: Any) -> Calibration:
    generator = np.random.default_rng(3)
    made = Calibration(
        mean=tuple(generator.normal(size=width)),
        scale=tuple(0.5 + generator.random(width)),
        linear=tuple(generator.normal(size=width)),
        quadratic=tuple(generator.normal(size=width * (width + 1) // 2)),
        intercept=0.25,
        scores=(-1.0, 0.0, 2.0),
        correlations=(0.1, 0.4, 0.9),
        largest_distance=0.5,
        neighbors=1 if width == 4 else 5,
        images=64,
    )
    return replace(made, **changes)


def literal_trust(of: Calibration, seen: np.ndarray, nearest: float) -> float:
    x = [(value - of.mean[i]) / of.scale[i] for i, value in enumerate(seen)]
    score, place = of.intercept, 0
    for a in range(len(x)):
        score += of.linear[a] * x[a]
        for b in range(a, len(x)):
            score += of.quadratic[place] * x[a] * x[b]
            place += 1
    worth = of.correlations[0]
    for k in range(len(of.scores) - 1):
        low, high = of.scores[k], of.scores[k + 1]
        if score >= low:
            part = min(1.0, (score - low) / (high - low))
            worth = of.correlations[k] + part * (of.correlations[k + 1] - of.correlations[k])
    beyond = max(0.0, min(1.0, 2 - nearest / of.largest_distance))
    return worth * beyond


@pytest.mark.parametrize("width", [4, 7])
def test_trust_is_the_literal_one(width: int) -> None:
    calibration, generator = some(width), np.random.default_rng(8)
    seen, nearest = generator.normal(size=(40, width)), generator.random(40)
    found = calibration.trust(seen, nearest)
    expected = [literal_trust(calibration, *each) for each in zip(seen, nearest, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(set(np.round(found, 6))) > 20
    turned = replace(calibration, linear=calibration.linear[::-1])
    assert np.abs(turned.trust(seen, nearest) - expected).max() > 0.05


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


@pytest.mark.parametrize("width", [4, 7])
def test_a_calibration_survives_json(width: int) -> None:
    calibration = some(width)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "mean should hold finite numbers"),
        ({"mean": [1.0, "2", 3.0, 4.0]}, "mean should hold finite numbers"),
        ({"intercept": math.nan}, "intercept should hold finite numbers"),
        ({"images": True}, "images should hold finite numbers"),
        ({"scale": [1.0, 0.0, 1.0, 1.0]}, "do not fit together"),
        ({"linear": [1.0]}, "do not fit together"),
        ({"quadratic": [1.0]}, "do not fit together"),
        ({"scores": [1.0, 0.0, 2.0]}, "do not fit together"),
        ({"correlations": [0.1, 0.4, 1.1]}, "do not fit together"),
        ({"correlations": [0.4, 0.1, 0.9]}, "do not fit together"),
        ({"scores": [], "correlations": []}, "do not fit together"),
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
    [{"scale": (1e-300,) * 4}, {"linear": (1e308,) * 4, "quadratic": (-1e308,) * 10}],
    ids=["scale", "coefficients"],
)
def test_what_a_forged_calibration_makes_overflow_is_still_a_share(changes: dict[str, Any]) -> None:
    found = some(**changes).trust(np.array([[3.0, -7.0, 5.0, 1.0]]), np.array([0.1]))
    assert 0 <= found[0] <= 1


# --- fitting ---


def known(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Evidence, a correlation that is a function of it with noise, and that function."""
    generator = np.random.default_rng(seed)
    seen = generator.normal(size=(n, 7))
    clear = 1 / (1 + np.exp(-1.5 * seen[:, 0] + seen[:, 3] * seen[:, 4]))
    return seen, np.clip(clear + 0.1 * generator.normal(size=n), -1, 1), clear


def test_a_known_relation_is_found() -> None:
    seen, y, _ = known(400, 1)
    none = np.empty((0, 7))
    made = fit_calibration(seen, y, none, np.empty(0), np.ones(400), neighbors=5)
    fresh, _, clear = known(2000, 2)
    found = made.trust(fresh, np.zeros(2000))
    bins = np.array_split(np.argsort(found, kind="stable"), 10)
    off = [abs(found[part].mean() - clear[part].mean()) for part in bins]
    assert np.mean(off) < 0.04
    assert np.abs(found - clear).mean() < 0.4 * np.abs(clear - np.median(clear)).mean()
    # It can be wrong: of other evidence nothing can be told.
    turned = made.trust(fresh[:, ::-1], np.zeros(2000))
    assert np.abs(turned - clear).mean() > 2 * np.abs(found - clear).mean()


def test_what_is_new_teaches_the_score_and_not_its_meaning() -> None:
    seen, y, _ = known(300, 1)
    far = seen - np.array([0, 0, 0, 6, 0, 0, 0.0])
    made = fit_calibration(seen, y, far, np.zeros(300), np.ones(300), neighbors=5)
    alone = fit_calibration(seen, y, far[:0], np.empty(0), np.ones(300), neighbors=5)
    fresh, true, _ = known(1000, 2)
    strange = fresh - np.array([0, 0, 0, 6, 0, 0, 0.0])
    assert made.trust(strange, np.zeros(1000)).mean() < 0.15
    assert alone.trust(strange, np.zeros(1000)).mean() > 0.3
    assert abs(made.trust(fresh, np.zeros(1000)).mean() - true.mean()) < 0.03


def literal_ridge(x: np.ndarray, y: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Coefficients of columns of unit spread and, last, the intercept; left out one at a time."""

    def solved(rows: np.ndarray, penalty: float) -> np.ndarray:
        each = np.column_stack([x[rows], np.ones(len(rows))])
        normal = each.T @ (counted[rows, None] * each)
        normal[np.arange(x.shape[1]), np.arange(x.shape[1])] += penalty
        return np.linalg.solve(normal, each.T @ (counted[rows] * y[rows]))

    rows, errors = np.arange(len(y)), {}
    for penalty in np.logspace(-2, 4, 13):
        errors[penalty] = 0.0
        for row in rows:
            made = solved(rows[rows != row], penalty)
            errors[penalty] += counted[row] * (y[row] - x[row] @ made[:-1] - made[-1]) ** 2
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


@pytest.mark.parametrize("guises", [0, 1, 2])
def test_a_fit_is_the_literal_one(guises: int) -> None:
    """Scores of images that the regression saw in no guise; strangers at three tenths."""
    generator = np.random.default_rng(guises)
    n, width = 42, 4
    seen = generator.normal(size=(n, width)) * [1, 30, 0.02, 1] + [0, 5, 1, -2]
    y = np.tanh(seen[:, 0]) * 0.5 + 0.02 * seen[:, 1] - 0.1 + 0.2 * generator.normal(size=n)
    new = generator.normal(size=(guises * n, width)) * [1, 60, 0.02, 1] + [-2, 5, 1, 0]
    new_y = 0.3 * generator.normal(size=guises * n)
    made = fit_calibration(seen, y, new, new_y, np.arange(n) / n, neighbors=1, seed=5)
    assert (made.largest_distance, made.neighbors, made.images) == ((n - 1) / n, 1, n)

    both = np.concatenate([seen, new])
    np.testing.assert_allclose(made.mean, both.mean(0))
    np.testing.assert_allclose(made.scale, both.std(0))
    x = (both - both.mean(0)) / both.std(0)
    design = np.column_stack(
        [x, *(x[:, a] * x[:, b] for a in range(width) for b in range(a, width))]
    )
    target, counted = np.concatenate([y, new_y]), np.r_[np.ones(n), np.full(guises * n, 0.3)]
    image = np.tile(np.arange(n), 1 + guises)

    def scored(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
        centre, spread = design[known].mean(0), design[known].std(0)
        fitted = literal_ridge((design[known] - centre) / spread, target[known], counted[known])
        return (design[asked] - centre) / spread @ fitted[:-1] + fitted[-1]

    fold = np.random.default_rng(5).permutation(n) % 5
    unseen = np.empty(n)
    for part in range(5):
        unseen[fold == part] = scored(
            np.flatnonzero(fold[image] != part), np.flatnonzero(fold == part)
        )
    everything = np.arange(len(target))
    np.testing.assert_allclose(made.score(both), scored(everything, everything), atol=1e-8)
    worth = np.interp(unseen, made.scores, made.correlations)
    np.testing.assert_allclose(worth, literal_rising(unseen, y), atol=1e-8)


def test_a_fit_is_repeatable_and_takes_evidence_that_never_changes() -> None:
    seen, y, _ = known(60, 4)
    seen[:, 2] = 0.5
    given_ = (seen, y, seen[:0], np.empty(0), np.ones(60))
    first, second = (fit_calibration(*given_, neighbors=5, seed=3) for _ in range(2))
    assert first == second
    assert np.isfinite(first.trust(seen, np.ones(60))).all()


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
        fit_calibration(seen, y, seen[:0], y[:0], nearest, neighbors=5)


# --- who explains whom ---


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("labelled", [True, False])
def test_neighbours_are_the_literal_ones(
    metric: str, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcam.trust._BLOCK", 17)
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(60, 6)).astype(np.float32)
    labels = generator.integers(0, 4, 60) if labelled else None
    rows = sample_rows(60, 1)
    twice = Twice(vectors, labels, rows, metric, 1)
    guises = dict(zip(["far", "alike"], twice.strangers, strict=False))
    assert len(guises) == 1 + labelled
    for guise, (near, apart) in {"itself": twice.neighbors, **guises}.items():
        for place, row in enumerate(rows):
            squares = [float(((vectors[row].astype(float) - v) ** 2).sum()) for v in vectors]
            order = [-float(vectors[row].astype(float) @ v) for v in vectors]
            border = np.median(squares)
            left = [
                at
                for at in range(60)
                if at != row
                and not (guise == "far" and squares[at] <= border)
                and not (guise == "alike" and labels[at] == labels[row])
            ]
            key = squares if metric == "l2" else order
            expected = sorted(left, key=lambda at, key=key: key[at])[:5]
            assert near[place].tolist() == expected
            np.testing.assert_allclose(apart[place], [squares[at] for at in expected], rtol=1e-9)


@given(st.data())
def test_the_smallest_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    n, wide = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    value = st.sampled_from([0.0, 1.0, 2.0, math.inf])
    rows = st.lists(value, min_size=wide, max_size=wide)
    keys = np.array(data.draw(st.lists(rows, min_size=n, max_size=n)))
    count = data.draw(st.integers(1, wide))
    found = _smallest(keys, count)
    assert found.tolist() == np.argsort(keys, axis=1, kind="stable")[:, :count].tolist()


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
    "gradcam++": Recipe(method="gradcam++"),
    "eigencam": Recipe(method="eigencam"),
}


@pytest.mark.parametrize("kind", ["affine", "identity", "other", "tokens", "pooled"])
@pytest.mark.parametrize("own_maps", [True, False])
def test_a_build_calibrates_what_the_literal_loop_finds(
    quick: None, source: ImageSource, tmp_path: Path, kind: str, own_maps: bool
) -> None:
    assert kind in HEADS
    check_literally(source, toy(kind), tmp_path / "index", Recipe(), own_maps)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_calibrated(
    quick: None, source: ImageSource, tmp_path: Path, name: str
) -> None:
    check_literally(source, toy("affine"), tmp_path / "index", RECIPES[name], True)


def check_literally(
    source: ImageSource, made_of: Toy, path: Path, recipe: Recipe, own_maps: bool
) -> None:
    built(source, made_of, path, recipe, own_maps=own_maps)
    with opened(path) as (index, live):
        index.verify()
        kept = index.manifest["trust"]
        vectors, weights = index.embeddings(live).astype(np.float64), index.weights(live)
        labels = list(index.labels[live])
    activations = made_of.network.forward(inputs(made_of, source)).activations.numpy()
    squares = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    for name, count in (("one", 1), ("several", 5)):
        both: dict[str, list[list[Any]]] = {"usual": [], "far": [], "alike": []}
        for guise in both:
            for row in range(48):
                border = np.median(squares[row])
                left = [
                    at
                    for at in range(48)
                    if at != row
                    and not (guise == "far" and squares[row, at] <= border)
                    and not (guise == "alike" and labels[at] == labels[row])
                ]
                near = sorted(left, key=lambda at, row=row: squares[row, at])[:count]
                raw = np.stack([np.tensordot(weights[at], activations[row], 1) for at in near])
                lengths = [float(np.linalg.norm(weights[at])) for at in near]
                alive = [length > 0 for length in lengths]
                shares = [
                    ok / sum(alive) / length if ok else 0.0
                    for ok, length in zip(alive, lengths, strict=True)
                ]
                shares = [1.0] if count == 1 else shares
                mixed = sum(s * weights[at] for s, at in zip(shares, near, strict=True))
                norm = float(np.linalg.norm(mixed))
                apart = squares[row, near]
                seen = literal_evidence(raw, np.array(shares), norm, apart)
                own = np.maximum(np.tensordot(weights[row], activations[row], 1), 0).ravel()
                both[guise].append(
                    [seen, literal_correlation(
                        np.maximum(np.tensordot(mixed, activations[row], 1), 0).ravel().tolist(),
                        own.tolist(),
                    ), min(apart)]
                )  # fmt: skip
        (seen, y, nearest), (far_seen, far_y, _), (new_seen, new_y, _) = (
            [np.array(column) for column in zip(*rows, strict=True)] for rows in both.values()
        )
        new_seen, new_y = np.concatenate([far_seen, new_seen]), np.concatenate([far_y, new_y])
        expected = fit_calibration(seen, y, new_seen, new_y, nearest, neighbors=count)
        found = Calibration.from_dict(kept[name])
        assert found.images == 48
        np.testing.assert_allclose(found.mean, expected.mean, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(found.largest_distance, expected.largest_distance, rtol=1e-4)
        close = np.abs(found.trust(seen, nearest) - expected.trust(seen, nearest))
        assert np.quantile(close, 0.9) < 0.05


def test_maps_of_several_layers_are_compared_as_they_are_explained(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_methods_index import LAYERS, dense, layered

    agreed: dict[int, np.ndarray] = {}

    def noted(seen: Any, correlations: np.ndarray, *rest: Any, neighbors: int, **more: Any) -> Any:
        agreed[neighbors] = correlations
        return fit_calibration(seen, correlations, *rest, neighbors=neighbors, **more)

    monkeypatch.setattr("embedcam.trust.fit_calibration", noted)
    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    with Index.open(tmp_path / "index") as index:
        explainer, names = Explainer(index), [layer["name"] for layer in index.manifest["layers"]]
        images = np.stack([network.preprocess(source.open(place)) for place in range(44)])
        features, maps = network.forward_layers(images, names)
        near = index.search(features.embedding.numpy(), 6).positions
        for count in (1, 5):
            expected = []
            for row in range(44):
                given_ = (features.embedding[row].numpy(), [one[row].numpy() for one in maps])
                own, theirs = (
                    explainer.explain_features(*given_, neighbors=[index.ids[p] for p in places])
                    for places in ([row], [p for p in near[row] if p != row][:count])
                )
                expected.append(
                    literal_correlation(own.cam.ravel().tolist(), theirs.cam.ravel().tolist())
                )
            np.testing.assert_allclose(agreed[count], expected, atol=1e-4)
            assert np.std(expected) > 0.01


def test_too_few_images_calibrate_nothing_and_so_can_the_user(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    few = pictures(tmp_path / "few", n=LEAST - 1)
    for name, images, options in (("few", few, {}), ("none", source, {"trust": False})):
        made_of = toy()
        path = built(images, made_of, tmp_path / name / "index", **options)
        with Index.open(path) as index:
            assert "trust" not in index.manifest
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
        calibrations = {n: Calibration.from_dict(v) for n, v in index.manifest["trust"].items()}
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
            assert found.trust == pytest.approx(expected, abs=2e-3)
            assert found.trusted == (found.trust >= 0.3)
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
        found = Calibration.from_dict(index.manifest["trust"]["several"])
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
        before = index.manifest["trust"]
    more = pictures(tmp_path / "more", n=3)
    items = [replace(item, id=f"new/{item.id}") for item in more.items]
    add_images(ImageSource(items, more.root), made_of.network, path, progress=False)
    with Index.open(path) as index:
        assert len(index) == 51
        assert index.manifest["trust"] == before


def test_an_index_with_a_broken_calibration_is_refused(
    quick: None, source: ImageSource, tmp_path: Path
) -> None:
    path = built(source, toy(), tmp_path / "index")
    with Index.open(path) as index:
        good = index.manifest["trust"]
    for broken, message in (
        ({**good, "many": {}}, "trust has the unknown entry 'many'"),
        ({"one": {**good["one"], "scale": [0] * 4}}, r"trust\.one: .*do not fit together"),
        ({"several": good["one"]}, r"trust\.several is of explanations by 1 neighbours"),
        ({"one": good["several"]}, r"trust\.one is of explanations by 5 neighbours"),
        ([1], "trust"),
    ):
        edit(lambda manifest, broken=broken: manifest.update(trust=broken))(path)
        with pytest.raises(IndexFormatError, match=message):
            Index.open(path)


def test_a_build_is_the_same_bytes_again(quick: None, source: ImageSource, tmp_path: Path) -> None:
    kept = []
    for name, batch in (("a", 32), ("b", 32), ("c", 5)):
        path = built(source, toy("other"), tmp_path / name, batch_size=batch)
        kept.append(json.loads((path / "manifest.json").read_text())["trust"])
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
    interrupt(monkeypatch, "calibrate", build_index, source, made_of.network, cut, **given_)
    assert not (cut / "manifest.json").exists()
    passes.append(0)
    build_index(source, made_of.network, cut, **given_)
    assert passes[2] <= passes[0] - 48  # what was finished is used again
    manifests = [json.loads((one / "manifest.json").read_text()) for one in (whole, cut)]
    assert manifests[0]["trust"]["several"]["images"] == 48
    for key in ("trust", "parts", "fitted"):
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
    edit(lambda m: m["trust"]["several"].update(largest_distance=nearest / 1.5))(path)
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


@settings(max_examples=20)
@given(st.integers(1, 9))
def test_pairs_are_all_pairs(width: int) -> None:
    first, second = pairs(width)
    assert [(a, b) for a in range(width) for b in range(a, width)] == list(
        zip(first.tolist(), second.tolist(), strict=True)
    )
