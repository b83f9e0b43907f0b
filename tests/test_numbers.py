"""Labels that are numbers: who is near and far, weights, match, and a CSV from end to end."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from cli_samples import NAMED, NETWORK
from photo_samples import network_of, picture

import embedcam
from embedcam import Explainer, Index, Recipe, add_images, build_index, find_images
from embedcam.errors import InputError, RecipeError
from embedcam.evaluate import Settings, evaluate_index
from embedcam.images.number_labels import Values, number_of
from embedcam.index.calibration import MatchCalibration, alike, kinship, match_evidence
from embedcam.offline import indexed_images
from embedcam.offline.cotangents import AnchorCotangents
from embedcam.offline.match import calibrate_match
from embedcam.offline.merge import plain
from embedcam.offline.triplets import NearestOthers, TripletSampler, label_codes
from embedcam.offline.trust import leave_out

N, D = 26, 4
IDS = [str(row) for row in range(1000)]
NUMBERS = Recipe(labels="numbers", target="margin")


def sides(values: list[float], a: int, positives: float, negatives: float) -> tuple[set, set]:
    """Positives and negatives of one image, from its sorted distances to all the others."""
    others = [i for i, v in enumerate(values) if i != a and not math.isnan(v)]
    apart = {i: abs(values[i] - values[a]) for i in others}
    ranked = sorted(apart.values())
    within = ranked[max(1, round(positives * len(others))) - 1]
    beyond = ranked[-max(1, round(negatives * len(others)))]
    near = {i for i in others if apart[i] <= within}
    return near, {i for i in others if apart[i] >= beyond} - near


def prices(kind: str, n: int = N) -> np.ndarray:
    """Numbers of n images: all different, many alike, or some without one."""
    rng = np.random.default_rng(4)
    made = rng.lognormal(3, 1, n) if kind == "different" else rng.integers(0, 6, n) * 0.1
    if kind == "some":
        made[[0, 7, 8, 20]] = np.nan
    return made


def table(n: int = N) -> np.ndarray:
    """Embeddings on a grid, of length about 1: distances are exact in single precision."""
    return np.random.default_rng(0).integers(-8, 9, (n, D)).astype(np.float32) / 16


KINDS = ("different", "alike", "some")
SHARES = [(0.1, 0.5), (0.3, 0.7), (0.01, 0.01), (0.5, 0.2)]


@pytest.mark.parametrize(("positives", "negatives"), SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_near_and_far_are_those_of_sorted_distances(kind, positives, negatives) -> None:
    values = prices(kind)
    found = Values(values, positives, negatives)
    for a in np.flatnonzero(found.ranks < 0):  # one as far from all others counts as unlabelled
        assert np.isnan(values[a]) or not sides(values.tolist(), a, positives, negatives)[1]
    for a in np.flatnonzero(found.ranks >= 0):
        near, far = sides(values.tolist(), a, positives, negatives)
        assert set(found.order[slice(*found.near[found.ranks[a]])]) - {a} == near
        assert set(np.delete(found.order, slice(*found.far[found.ranks[a]]))) == far != set()
    assert (found.ranks >= 0).sum() >= 20
    assert Values(np.array([0.0, -1, 1, np.nan]), 0.5, 0.5).ranks.tolist() == [-1, 0, 2, -1]


def pairs(values: np.ndarray, a: int, recipe: Recipe = NUMBERS) -> list[tuple[int, int]]:
    """Every (positive, negative) of an image; without a number its nearest ten and the rest."""
    if np.isnan(values[a]):
        near = oracles.nearest(table(), a, range(len(values)), min(10, (len(values) - 1) // 3))
        return [(p, n) for p in near for n in range(len(values)) if n not in (*near, a)]
    near, far = sides(values.tolist(), a, recipe.positives, recipe.negatives)
    return [(p, n) for p in sorted(near) for n in sorted(far)]


@pytest.mark.parametrize(("positives", "negatives"), SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_every_pair(kind, positives, negatives) -> None:
    recipe, rows = replace(NUMBERS, positives=positives, negatives=negatives), table()
    values = prices(kind)
    anchors = AnchorCotangents(recipe, rows, values, rows.mean(0))
    assert anchors.sampler is not None
    asked = [a for a in range(N) if np.isnan(values[a]) or anchors.sampler.labelled(np.array([a]))]
    assert len(asked) >= 20
    found = anchors.of(np.array(asked))
    for place, a in enumerate(asked):
        every = pairs(values, a, recipe)
        assert found.counts[place] == len(every) > 0
        wanted = oracles.mean_cotangent(rows, every)
        np.testing.assert_allclose(found.values[place], wanted, atol=1e-5)
        np.testing.assert_array_equal(anchors.of(np.array([a])).values[0], found.values[place])


def test_the_default_target_is_that_margin_whitened_with_the_images_own_part() -> None:
    values, rows = prices("different"), table()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean = rows.mean(0)
    recipe = Recipe(labels="numbers")
    assert recipe.resolved_target == "distinctive"
    found = AnchorCotangents(recipe, rows, values, mean).of(np.arange(N)).values
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    covariance = centred.T @ centred / N
    ridge = 10 * np.trace(covariance) / D
    for a in range(N):
        margin = oracles.mean_cotangent(rows, pairs(values, a, recipe))
        kind = np.linalg.solve(covariance + ridge * np.eye(D), margin)
        kind -= 0.5 * rows[a] * (rows[a] @ kind)
        own = rows[a] - mean
        wanted = kind / np.linalg.norm(kind) + 0.2 * own / np.linalg.norm(own)
        np.testing.assert_allclose(found[a], wanted, atol=1e-4)


@pytest.mark.parametrize("sampling", ["random", "semihard", "hard"])
@pytest.mark.parametrize("kind", ["different", "some"])
def test_draws_are_of_the_near_and_the_far(kind, sampling) -> None:
    values, rows = prices(kind), table()
    recipe = replace(NUMBERS, positives=0.2, sampling=sampling, triplets=400)
    found = TripletSampler(rows, values, NearestOthers(rows), recipe).draw(np.arange(N))
    for a in range(N):
        near, far = (set(side) for side in zip(*pairs(values, a, recipe), strict=True))
        assert set(found[a, :, 0]) == near
        drawn = set(found[a, :, 1])
        assert drawn == far if sampling != "semihard" else drawn <= far


def test_numbers_are_read_from_text() -> None:
    assert [number_of(text) for text in ("1.5", " -2e3 ", "0")] == [1.5, -2000, 0]
    for text in ("", None, "nan", "inf", "-inf", "cheap", "1e301", "1,5"):
        assert math.isnan(number_of(text))


def test_labels_are_alike_within_reach() -> None:
    reach = ((0.0, 10.0, 20.0), (1.0, 1.0, 5.0))
    found = alike("15", ["15", "12.1", "11.9", "18", "18.1", None, "x"], reach)
    assert found.tolist() == [True, True, False, True, False, False, False]
    assert alike("-5", ["-4", "-3.9"], reach).tolist() == [True, False]
    assert alike("a", ["a", "b", None]).tolist() == [True, False, False]
    assert not alike(None, ["1", None], reach).any()


def test_reach_is_that_of_the_positives_at_quantiles_of_the_values() -> None:
    values = prices("different", 100)
    knots, reaches = Values(values, 0.1, 0.5).reach()
    ranked = sorted(values.tolist())
    assert list(knots) == [ranked[round(q * 99 / 32)] for q in range(33)]
    for knot, reach in zip(knots, reaches, strict=True):
        near, _ = sides(values.tolist(), values.tolist().index(knot), 0.1, 0.5)
        assert reach == max(abs(values[i] - knot) for i in near)


def made_match(seed: int = 0, n: int = 200) -> tuple[np.ndarray, list[str | None], dict]:
    """Embeddings on a curve whose place, a little blurred, is the number of each image."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, 3, n)
    noise = rng.normal(0, 0.02 + 0.15 * (place > 1.5), (2, n))
    points = np.column_stack([np.cos(place), np.sin(place)]).astype(np.float32)
    labels = [f"{v:.4f}" for v in 100 * (place + noise[0])]
    made = calibrate_match(IDS[: len(points)], points, labels, NUMBERS)
    return points, labels, json.loads(json.dumps(plain(made)))


def test_match_says_how_likely_the_first_result_is_near_in_value() -> None:
    points, labels, made = made_match()
    calibration = MatchCalibration.from_dict(made["several"])
    values = np.array([float(label) for label in labels])
    told, right = [], []
    for a in range(len(points)):
        apart = ((points - points[a]) ** 2).sum(1)
        near = [i for i in np.argsort(apart, kind="stable") if i != a][:10]
        named, first = [labels[i] for i in near], values[near[0]]
        told.append(calibration.match(apart[near], named))
        right.append(abs(first - values[a]) <= np.interp(values[a], *calibration.reach))
        same = np.abs(values[near] - first) <= np.interp(first, *calibration.reach)
        x = (match_evidence(apart[near], same) - calibration.mean) / calibration.scale
        wanted = 1 / (1 + math.exp(-(calibration.intercept + x @ calibration.linear)))
        if apart[near[0]] <= calibration.far:
            assert told[-1] == pytest.approx(wanted, rel=1e-6)
    told, right = np.array(told), np.array(right)
    assert 0.2 < right.mean() < 0.95
    assert abs(told.mean() - right.mean()) < 0.05
    assert told[right].mean() > told[~right].mean() + 0.1
    # As classes no two of these labels are equal, and every result would be wrong.
    classes = calibrate_match(IDS[: len(points)], points, labels, Recipe())["several"]
    assert "values" not in classes.to_dict()
    assert classes.match(apart[near], named) < 0.05


def test_a_forged_reach_is_refused() -> None:
    made = made_match(n=30)[2]["one"]
    for values, reaches in ((None, [1.0]), ([2.0, 1.0], [0.0] * 2), ([1.0], [-1.0]), ([None], [1])):
        wrong = {"reaches": reaches} | ({} if values is None else {"values": values})
        with pytest.raises(InputError, match="the calibration's"):
            MatchCalibration.from_dict({**made, **wrong})


def test_few_numbers_leave_match_to_the_distance_and_spellings_do_not_count() -> None:
    points = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    unlabelled = calibrate_match(
        [str(row) for row in range(len(points))], points, [None] * 30, NUMBERS
    )
    assert "values" not in unlabelled["one"].to_dict()
    told = []
    for labels in (["7"] * 30, ["7", "7.0", "07"] * 10):
        found = calibrate_match(IDS[: len(points)], points, labels, NUMBERS)["one"]
        assert found.reach == ((7.0,), (0.0,))
        told.append(found.match(np.array([0.01]), ["7.0"]))
    assert told[0] == told[1] > 0.5


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours whose prices rise with the colour, two of them without a price."""
    folder, listed = tmp_path_factory.mktemp("shop"), "path,label\n"
    for number in range(26):
        picture(number % 3, number).save(folder / f"{number:02d}.png")
        price = "" if number in (4, 11) else 100 * (number % 3) + number * 0.5
        listed += f"{number:02d}.png,{price}\n"
    (folder / "prices.csv").write_text(listed)
    (folder / "more.csv").write_text("path,label,id\n00.png,3.25,again\n01.png,,none\n")
    (folder / "cli_toy_network.py").write_text(NETWORK)
    return folder


@pytest.fixture
def run(say: Callable[..., Any], shop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(shop)
    monkeypatch.syspath_prepend(str(shop))
    yield partial(say, unasked=False)
    sys.modules.pop("cli_toy_network", None)


def test_a_csv_of_prices_is_built_explained_matched_and_added_to(run, shop, tmp_path) -> None:
    index = tmp_path / "index"
    code, _, noted = run("build", "prices.csv", index, "--labels", "numbers", *NAMED)
    assert "labels: numbers from 0 to 211.5; 2 images without a label\n" in noted
    assert "2 images without a label: the nearest neighbours stand in as positives" in noted
    with Index.open(index) as opened:
        recipe = Recipe.of_index(opened.manifest)
        assert (recipe.labels, recipe.positives, recipe.negatives) == ("numbers", 0.1, 0.5)
        assert opened.manifest.match_calibration["several"].reaches
        assert opened.labels[5] == "202.5"
        kin = kinship(opened.manifest)
    assert (kin("202.5", "204"), kin("202.5", "102")) == (True, False)
    (found,) = json.loads(run("explain", index, "05.png", "--json", "-n", 3, *NAMED[:2])[1])
    assert found["neighbors"][0]["label"] == "202.5"
    assert 0 < found["match"] < 1
    # By an index of numbers no result stands for its label.
    code, told, noted = run("explain", index, "05.png", "--result", "02.png", *NAMED[:2])
    assert (code, "what matched 02.png" in told, "share" in noted) == (0, True, False)
    before = Index.open(index).manifest.match_calibration
    assert run("calibrate", index, "--no-trust")[0] == 0
    assert Index.open(index).manifest.match_calibration == before
    noted = run("add", index, "more.csv", *NAMED[:2])[2]
    assert "labels: numbers from 3.25 to 3.25; 1 images without a label" in noted
    assert "28, 25 numbers; 2 added after the fit" in run("info", index)[1]


def test_a_report_begins_with_results_that_are_far_in_value(shop: Path, tmp_path: Path) -> None:
    network, source = network_of(), find_images(shop / "prices.csv", "numbers")
    build_index(source, network, tmp_path / "index", progress=False, workers=0)
    (shop / "asked.csv").write_text("path,label\n00.png,0.1\n01.png,9999\n02.png,201\n")
    with Explainer(tmp_path / "index", network) as explainer:
        asked = find_images(shop / "asked.csv", "numbers")
        embedcam.write_report(explainer, asked, tmp_path / "out")
        again = indexed_images(explainer.index)
    assert (again.numbers, again.labels) == (True, source.labels)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "First result of another label: 1 of 3 queries" in page
    table = page[page.index("All queries") :]
    assert table.index("01.png") < min(table.index("00.png"), table.index("02.png"))
    # An evaluation takes numbers for no classes.
    settings = Settings(measures=("retrieval", "objects"), controls=False, limit=4)
    quiet = {"settings": settings, "workers": 0, "progress": False}
    notes = evaluate_index(tmp_path / "index", source, network, **quiet).summary["notes"]
    assert "no retrieval quality: the index's labels are numbers, not classes" in notes
    assert any("pairs of pictures need" in note for note in notes)


def test_trust_leaves_images_out_of_an_index_of_numbers() -> None:
    values, rows, asked = prices("different", 60), table(60), np.arange(0, 60, 5)
    labels = [repr(float(value)) for value in values]
    recipe = Recipe(labels="numbers", target="margin", norm="around")
    found = leave_out(recipe, rows, labels, asked, closed_form=True, normalized=False)["one"]
    near = np.concatenate([one.near for one in found])
    codes = np.concatenate([one.codes for one in found])
    whole = AnchorCotangents(recipe, rows, values, rows.mean(0)).of(near).values
    classes = replace(recipe, labels="classes")
    other = AnchorCotangents(classes, rows, label_codes(labels), rows.mean(0)).of(near).values
    # A few images less in the index change numbers' codes a little; codes of classes are others.
    assert np.abs(codes - whole).mean() < 0.5 * np.abs(codes - other).mean()


def test_a_label_that_is_no_number_is_refused_with_its_line(run, tmp_path) -> None:
    listed = tmp_path / "bad.csv"
    for label in ("cheap", "nan", "-inf"):
        listed.write_text(f"path,label\na.png,1\nb.png,{label}\n")
        code, _, noted = run("build", listed, tmp_path / "i", "--labels", "numbers", *NAMED)
        assert code == 2
        assert noted.startswith(f"embedcam: {listed}, line 3: ")
        assert f"the label '{label}' is not a finite number; correct it, leave it empty" in noted


def test_what_numbers_cannot_be_is_said(run, shop: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes the label column of a CSV, and this is a folder"):
        find_images(shop, "numbers")
    network, source = network_of(), find_images(shop / "prices.csv")
    build_index(source, network, tmp_path / "classes", progress=False, workers=0)
    with pytest.raises(InputError, match="labels are classes and those given are numbers"):
        add_images(find_images(shop / "more.csv", "numbers"), network, tmp_path / "classes")
    (shop / "words.csv").write_text("path,label,id\n00.png,cheap,x\n")
    recipe, rows = Recipe(labels="numbers"), table()
    build_index(source, network, tmp_path / "i", recipe, progress=False, workers=0)
    with pytest.raises(InputError, match="image 'x': the label 'cheap' is not a finite number"):
        add_images(find_images(shop / "words.csv"), network, tmp_path / "i")
    asked = [tmp_path / "i", tmp_path / "c", "--prototypes", 2, "--per-class"]
    code, _, noted = run("compress", *asked)
    assert (code, "the labels are numbers, so prototypes cannot be made for each" in noted) == (
        2,
        True,
    )
    for shares in ({"positives": 0.0}, {"negatives": math.nan}, {"positives": 0.6}):
        with pytest.raises(RecipeError, match=r"give (a number|numbers) above 0"):
            Recipe(labels="numbers", **shares)
    with pytest.raises(InputError, match="all 24 labels are the number 7, so none is far"):
        AnchorCotangents(recipe, rows, np.array([7.0] * 24 + [np.nan] * 2), rows.mean(0))


def test_features_take_numbers_too(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((30, 5), np.float32)
    labels = [None if i == 3 else f"{i / 7:.3f}" for i in range(30)]
    recipe = replace(NUMBERS, norm="around", encoding="dense", dtype="float32")
    settings = {"grid": (1, 1), "normalize": False, "labels": labels}
    made = embedcam.build_from_features(rows, rows, tmp_path / "index", recipe, **settings)
    assert (made.n_single, made.numbers, made.labels) == (1, (0.0, 4.143), {})
    values = np.array([number_of(label) for label in labels])
    with Index.open(tmp_path / "index") as index:
        weights = index.encoding(0).decode(index.select(np.arange(30)).fields(0))
    for a in (0, 12, 29):
        wanted = 2 * (np.mean([rows[p] - rows[n] for p, n in pairs(values, a)], axis=0))
        np.testing.assert_allclose(weights[a], wanted, atol=1e-5)
