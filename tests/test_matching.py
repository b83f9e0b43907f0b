"""Match: the probability that the first result is of the query's kind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from embedcam import Explainer, Index, Recipe, build_from_features
from embedcam.cli import main
from embedcam.errors import InputError
from embedcam.index import put_calibrations
from embedcam.index.calibration import MatchCalibration, match_evidence
from embedcam.offline.match import calibrate_match, fit_logistic


def oracle_evidence(distances: list[float], same: list[bool]) -> list[float]:
    """The evidence, literally and one result at a time."""
    apart = [math.sqrt(one) for one in distances]
    weights = [1 / one**2 for one in apart[1:]]
    alike = sum(w for w, s in zip(weights, same[1:], strict=True) if s)
    others = [one for one, s in zip(apart, same, strict=True) if not s]
    other = min(others) if others else max(apart[1:])
    gap = max(0.0, 1 - apart[0] / other)
    return [-apart[0], -sum(apart) / len(apart), alike / sum(weights), gap]


def clouds(n: int = 60) -> tuple[np.ndarray, list[str | None]]:
    """Two overlapping clouds `[2 n 4]` and their labels."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2 * n, 4)).astype(np.float32)
    points[n:, 0] += 2.5
    return points, ["a"] * n + ["b"] * n


def numbered(n: int) -> list[str]:
    return [str(number) for number in range(n)]


def fitted(labels: bool = True) -> MatchCalibration:
    points, names = clouds()
    of = numbered(len(points)), points
    made = calibrate_match(*of, names if labels else [None] * len(points), Recipe())
    return MatchCalibration.from_dict(json.loads(json.dumps(made["several"].to_dict())))


@pytest.mark.parametrize("seed", range(5))
def test_evidence_is_the_literal_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.uniform(0.1, 2, 10))
    same = np.array([True, *(rng.random(9) < 0.5)])
    expected = oracle_evidence(distances.tolist(), same.tolist())
    np.testing.assert_allclose(match_evidence(distances, same), expected, rtol=1e-9)
    alone = match_evidence(distances[:1], same[:1])
    np.testing.assert_allclose(alone, [-math.sqrt(distances[0])], rtol=1e-12)
    copies = match_evidence(np.array([0.0, 0.0, 4.0]), np.array([True, False, True]))
    np.testing.assert_allclose(copies, [0, -2 / 3, 0, 0], atol=1e-12)


def test_the_logistic_function_solves_its_equations() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = rng.random(200) < 1 / (1 + np.exp(-x[:, 0]))
    mean, scale, linear, intercept = fit_logistic(x, y)
    z = (x - mean) / scale
    expected = 1 / (1 + np.exp(-(intercept + z @ linear)))
    middle = 1 / (1 + math.exp(-intercept))
    # The gradient of the penalised likelihood, with one right and one wrong average image more.
    np.testing.assert_allclose(z.T @ (y - expected), linear, atol=1e-6)
    assert (y - expected).sum() + 1 - 2 * middle == pytest.approx(0, abs=1e-6)
    *_, linear, intercept = fit_logistic(np.zeros((50, 4)), np.ones(50, bool))  # all right
    assert (linear, 1 / (1 + math.exp(-intercept))) == ((0, 0, 0, 0), pytest.approx(51 / 52))


def test_agreeing_neighbours_match_and_far_queries_do_not() -> None:
    one, ten = fitted(), np.linspace(0.3, 0.6, 10)
    agreed, alone = one.match(ten, ["a"] * 10), one.match(ten, ["a", *["b"] * 9])
    assert agreed > 0.8 > 0.5 > alone
    assert one.match(ten + 2 * one.far, ["a"] * 10) == 0


def test_without_labels_match_is_how_usual_the_distance_is() -> None:
    points, _ = clouds()
    apart = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    own, one = apart.min(axis=1), fitted(labels=False)
    for distance in np.quantile(own, [0.1, 0.5, 0.9]):
        expected = (own >= distance).mean()
        assert one.match(np.array([distance]), [None]) == pytest.approx(expected, abs=0.05)
    falling = [one.match(np.array([d]), [None]) for d in np.linspace(0, 3 * one.far, 50)]
    assert falling == sorted(falling, reverse=True)
    assert (falling[0], falling[-1]) == (1, 0)


def test_few_images_calibrate_nothing_and_copies_are_not_their_own_result() -> None:
    assert calibrate_match(numbered(10), *clouds(n=5), Recipe()) is None
    made = calibrate_match(numbered(40), np.zeros((40, 3), np.float32), ["a"] * 40, Recipe())
    assert made["several"].match(np.zeros(10), ["a"] * 10) > 0.9


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", [0.0] * 4), ("linear", [1.0]), ("shares", [2.0]), ("far", -1.0), ("far", None),
     ("images", 0), ("mean", [1.0, 2.0]), ("intercept", True), ("distances", [])],
)  # fmt: skip
def test_a_calibration_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match="the calibration's"):
        MatchCalibration.from_dict({**fitted().to_dict(), key: value})


def test_an_index_says_how_likely_its_first_result_is_right(tmp_path: Path) -> None:
    points, labels = clouds()
    maps = np.ones((4, 2, 2), np.float32)
    given = {"labels": labels, "normalize": False, "grid": (2, 2), "progress": False}
    build_from_features(points, points, tmp_path / "i", **given)
    query = points[0] + 0.01
    with Explainer(tmp_path / "i") as explainer:
        found = [explainer.explain_features(query, maps, n_neighbors=n) for n in (1, 5, 30)]
        named = explainer.explain_features(query, maps, neighbors=["0", "1"])
        far = explainer.explain_features(query + 100, maps)
    assert [len(one.ids) for one in found] == [1, 5, 30]
    assert found[0].match == found[1].match == found[2].match > 0.5
    assert found[0].to_dict()["match"] == found[0].match
    assert named.match is not None
    assert far.match == 0
    assert far.match_in_words == "DOUBTFUL RESULT, match 0.00"
    assert far.tiles()[0].warning == "DOUBTFUL RESULT, match 0.00"
    assert "match" not in far.tiles()[0].subcaption
    assert found[1].tiles()[0].subcaption.startswith(f"match {found[1].match:.2f}\n")
    with Index.open(tmp_path / "i") as index:
        made = index.manifest.match_calibration
    put_calibrations(tmp_path / "i", {"match_calibration": None})
    with Explainer(tmp_path / "i") as explainer:
        assert explainer.explain_features(query, maps).match is None
    assert main(["calibrate", str(tmp_path / "i"), "--quiet"]) == 0
    with Index.open(tmp_path / "i") as index:
        assert index.manifest.match_calibration == made
