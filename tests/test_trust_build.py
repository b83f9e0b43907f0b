"""Trust in an index: what a build calibrates, and what explanations say of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_samples import built, inputs, interrupt, opened, pictures, toy
from oracles_metrics import correlation
from test_index_corrupt import edit
from test_methods_index import LAYERS, dense, layered
from test_trust import literal_evidence, literal_trust

from embedcam import DirectWeights, Explainer, Index, Recipe, add_images, build_index
from embedcam.errors import ImageError, IndexFormatError, InputError, NetworkMismatch
from embedcam.images import ImageSource
from embedcam.index import remove
from embedcam.index.search import draw_negatives
from embedcam.offline import build as jobs
from embedcam.offline import calibrate_index
from embedcam.offline.triplets import sample_of
from embedcam.offline.trust import LEAST, fit_calibration, leave_out
from embedcam.ops import cam, resize, sharpen, signed_cam

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return pictures(tmp_path_factory.mktemp("photos"), n=48, classes=4)


def noted(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Evidence and correlations that calibrations are fitted to, by number of neighbours."""
    kept = {}

    def fit(seen: Any, agreed: Any, nearest: Any, *, neighbors: int, **more: Any) -> Any:
        kept[neighbors] = (seen, agreed)
        return fit_calibration(seen, agreed, nearest, neighbors=neighbors, **more)

    monkeypatch.setattr("embedcam.offline.trust.fit_calibration", fit)
    return kept


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def combined(weights: np.ndarray) -> np.ndarray:
    """The mean of the unit vectors of several weights, or the only ones."""
    if len(weights) == 1:
        return weights[0]
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    return (weights / np.where(lengths > 0, lengths, 1)).mean(0)


@pytest.mark.parametrize(
    ("kind", "recipe", "own_maps"),
    [("affine", {}, True), ("affine", {}, False), ("identity", {}, True), ("identity", {}, False),
     ("affine", {"encoding": "top-m", "m": 3}, True), ("affine", {"target": "margin"}, True),
     ("affine", {"target": "centred", "norm": "around"}, True)],
)  # fmt: skip
def test_a_build_calibrates_what_indexes_without_the_queries_answer(
    source, tmp_path, kind, recipe, own_maps, monkeypatch
) -> None:
    """Of each closed form; an index is built without each tenth of the images, and asked."""
    recipe, made_of = Recipe(**recipe), toy(kind)
    kept = noted(monkeypatch)
    built(source, made_of, tmp_path / "index", recipe, own_maps=own_maps)
    part = np.random.default_rng(0).permutation(48) % 10
    images, found = inputs(made_of, source), {1: {}, 5: {}}
    for number in range(10):
        rest = source.only(np.flatnonzero(part != number).tolist())
        path = built(rest, made_of, tmp_path / str(number), recipe, trust=False, own_maps=own_maps)
        with opened(path) as (index, _):
            fallback = DirectWeights(made_of.network, Recipe.of_index(index.manifest))
            explainer, labels = Explainer(index, made_of.network), index.labels
            for row in np.flatnonzero(part == number):
                maps = made_of.network.forward(images[row][None]).activations[0].numpy()
                for count, rows in found.items():
                    explained = explainer.explain(images[row], n_neighbors=count)
                    near = index.positions(explained.ids)
                    rest_of = np.setdiff1d(np.arange(len(index)), near)
                    others = draw_negatives(rest_of, labels[near], labels.__getitem__)
                    weights, vectors = index.weights(near), map(index.embeddings, (near, others))
                    (own,) = fallback.weights(images[row], *vectors)
                    lengths = np.linalg.norm(weights, axis=1)
                    shares = np.ones(1) if count == 1 else 1 / count / lengths
                    raw, norm = np.tensordot(weights, maps, 1), np.linalg.norm(shares @ weights)
                    seen = literal_evidence(raw, shares, float(norm), explained.distances)
                    rows[row] = seen, agreement(combined(weights), own, maps)
    for count, rows in found.items():
        for place in (0, 1):
            expected = [rows[row][place] for row in range(48)]
            np.testing.assert_allclose(kept[count][place], expected, atol=5e-3)
        assert np.std(kept[count][1]) > 0.005


@pytest.mark.parametrize(
    ("kind", "method"),
    [("other", "gradcam"), ("tokens", "gradcam"), ("pooled", "gradcam"), ("affine", "gradcam++"),
     ("affine", "eigencam")],
)  # fmt: skip
def test_elsewhere_the_stored_weights_are_held_against_direct_ones(
    source, tmp_path, kind, method, monkeypatch
) -> None:
    made_of, kept = toy(kind), noted(monkeypatch)
    path = built(source, made_of, tmp_path / "index", Recipe(method=method))
    images, rows = inputs(made_of, source), sample_of(source.ids, 0, 40)
    with opened(path) as (index, live):
        vectors, weights = index.embeddings(live), index.weights(live)
        direct = DirectWeights(made_of.network, Recipe.of_index(index.manifest))
        for count in (1, 5):
            expected = []
            for row, near, others in left_out(rows, vectors, index.labels, count, 9):
                (own,) = direct.weights(images[row], vectors[near], vectors[others])
                maps = made_of.network.forward(images[row][None]).activations[0].numpy()
                expected.append(agreement(combined(weights[near]), own, maps))
            np.testing.assert_allclose(kept[count][1], expected, atol=5e-3)
            assert np.std(expected) > 0.005


def agreement(one: np.ndarray, other: np.ndarray, maps: np.ndarray) -> float:
    """The correlation of the signed maps of two weights."""
    return correlation(*(np.tensordot(each, maps, 1).ravel().tolist() for each in (one, other)))


def left_out(rows: np.ndarray, vectors: np.ndarray, labels: Any, count: int, parts: int) -> Any:
    """Each row of a sample with its nearest images and others, in an index without its part."""
    part = np.random.default_rng(0).permutation(len(rows)) % parts
    for place, row in enumerate(rows):
        left = np.setdiff1d(np.arange(len(vectors)), rows[part == part[place]])
        near = left[np.argsort(((vectors[row] - vectors[left]) ** 2).sum(1), kind="stable")[:count]]
        yield row, near, draw_negatives(np.setdiff1d(left, near), labels[near], labels.__getitem__)


def test_maps_of_several_layers_are_compared_as_they_are_explained(tmp_path, monkeypatch) -> None:
    kept = noted(monkeypatch)
    network, source = layered(), pictures(tmp_path / "photos", n=44)
    recipe = dense(method="polycam", layers=LAYERS)
    build_index(source, network, tmp_path / "index", recipe, progress=False)
    rows = sample_of(source.ids, 0, 40)
    with Index.open(tmp_path / "index") as index:
        explainer, names = Explainer(index), index.manifest.layer_names
        images = np.stack([network.preprocess(source.open(place)) for place in range(44)])
        features, maps = network.forward_layers(images, names)
        vectors, direct = features.embedding.numpy(), DirectWeights(network, recipe)
        for count in (1, 5):
            expected = []
            for row, near, others in left_out(rows, vectors, index.labels, count, 10):
                own = direct.weights(images[row], vectors[near], vectors[others])
                ids = [index.ids[at] for at in near]
                layers = [one[row].numpy() for one in maps]
                drawn = explainer.explain_features(vectors[row], layers, neighbors=ids).signed_cam
                signed = signed_cam(own[0], layers[0])
                found = np.maximum(signed, 0)
                for each, one in zip(own[1:], layers[1:], strict=True):
                    found = sharpen(cam(each, one), found)
                below = np.minimum(resize(signed, found.shape), 0)
                both = drawn, np.where(found > 0, found, below)
                expected.append(correlation(*(one.ravel().tolist() for one in both)))
            np.testing.assert_allclose(kept[count][1], expected, atol=5e-3)
            assert np.std(expected) > 0.01


def test_too_few_images_calibrate_nothing_and_so_can_the_user(source, tmp_path) -> None:
    few = pictures(tmp_path / "few", n=LEAST - 1)
    for name, images, options in (("few", few, {}), ("none", source, {"trust": False})):
        made_of = toy()
        path = built(images, made_of, tmp_path / name / "index", **options)
        with Index.open(path) as index:
            assert index.manifest.trust_calibration is None
            found = Explainer(index, made_of.network).explain(inputs(made_of, images)[0])
            assert (found.trust, found.trusted, found.direct) == (None, None, False)
            assert "trust" not in found.tiles()[0].subcaption


def test_an_index_without_the_calibration_asked_for_is_not_called_complete(source, tmp_path):
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


def test_an_explanation_says_how_far_to_trust_it(source, tmp_path) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    queries = inputs(made_of, source)
    with Index.open(path) as index:
        explainer = Explainer(index, made_of.network, trusted_from=0.3)
        calibrations = index.manifest.trust_calibration
        features = made_of.network.forward(queries[:1])
        activations, embedding = features.activations[0].numpy(), features.embedding[0].numpy()
        for asked in ({}, {"n_neighbors": 1}, {"result": index.ids[7]}):
            found = explainer.explain(queries[0], **asked)
            positions = index.positions(found.explained)
            weights = index.weights(positions)
            one = len(positions) == 1
            shares = np.ones(1) if one else 1 / len(weights) / np.linalg.norm(weights, axis=1)
            raw, norm = np.tensordot(weights, activations, 1), np.linalg.norm(shares @ weights)
            apart = ((index.embeddings(positions).astype(np.float64) - embedding) ** 2).sum(1)
            seen = np.array(literal_evidence(raw, shares, float(norm), apart))
            expected = literal_trust(calibrations["one" if one else "several"], seen, min(apart))
            assert (found.trust, found.trust_low) == pytest.approx(expected, abs=2e-3)
            assert found.trusted == (found.trust_low >= 0.3)
            said = found.to_dict()
            assert (said["trust"], said["trusted"]) == (found.trust, found.trusted)
    for wrong in (1.5, -0.1, True, math.nan):
        with pytest.raises(InputError, match=r"trusted_from = .*; give a number from 0 to 1"):
            Explainer(path, trusted_from=wrong)


def test_where_all_images_have_one_label_none_is_strange(tmp_path: Path) -> None:
    made_of, alike = toy(), pictures(tmp_path / "photos", n=42, classes=1)
    path = built(alike, made_of, tmp_path / "index", Recipe(target="centred", norm="around"))
    with opened(path) as (index, live):
        found = index.manifest.trust_calibration["several"]
        farthest = index.search(index.embeddings(live), 2).distances.max()
    assert (found.images, found.largest_distance) == (42, pytest.approx(farthest, rel=1e-3))


def test_what_is_added_leaves_the_calibration(source, tmp_path) -> None:
    made_of = toy()
    path = built(source, made_of, tmp_path / "index")
    before = manifest(path)["trust_calibration"]
    more = pictures(tmp_path / "more", n=3)
    items = [replace(item, id=f"new/{item.id}") for item in more.items]
    add_images(ImageSource(items, more.root), made_of.network, path, progress=False)
    assert manifest(path)["trust_calibration"] == before
    assert manifest(path)["counts"]["rows"] == 51


def test_an_index_with_a_broken_calibration_is_refused(source, tmp_path) -> None:
    path = built(source, toy(), tmp_path / "index")
    good = manifest(path)["trust_calibration"]
    for broken, message in (
        ({**good, "many": {}}, "trust_calibration has the unknown entry 'many'"),
        ({"one": {**good["one"], "scale": [0] * 3}}, r"\.one.*do not fit together"),
        ({"one": good["several"]}, r"\.one is of explanations by 5 neighbours"),
        ([1], "trust_calibration"),
    ):
        edit(lambda m, broken=broken: m.update(trust_calibration=broken))(path)
        with pytest.raises(IndexFormatError, match=message):
            Index.open(path)


def test_an_earlier_trust_is_not_read_and_the_note_names_what_calibrates_it_again(
    source, tmp_path, caplog
) -> None:
    made_of = toy("affine")
    path = built(source, made_of, tmp_path / "index")
    expected = manifest(path)["trust_calibration"]
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
    made = manifest(path)["trust_calibration"]
    for name, one in expected.items():
        # The build drew with activations that it kept in half precision.
        np.testing.assert_allclose(made[name]["mean"], one["mean"], rtol=2e-3, atol=2e-3)
        assert made[name]["correlations"][-1] == pytest.approx(one["correlations"][-1], abs=0.01)
    with Explainer(path, made_of.network) as explainer:
        assert explainer.explain(query).trust > 0.5


def test_what_changes_while_it_is_calibrated_is_not_vouched_for(source, tmp_path, monkeypatch):
    path = built(source, toy("affine"), tmp_path / "index")
    fit = jobs.calibrate_match

    def changed(*given_: Any) -> Any:
        remove(path, [str(Index.open(path).ids[0])])
        return fit(*given_)

    monkeypatch.setattr(jobs, "calibrate_match", changed)
    with pytest.raises(InputError, match="changed while it was being calibrated, so nothing was w"):
        calibrate_index(path, progress=False)
    assert manifest(path)["match_calibration"]["several"]["images"] == 48


def test_of_inner_products_the_nearest_counts_not_the_first(tmp_path: Path) -> None:
    photos, recipe = pictures(tmp_path / "photos", n=44), Recipe(metric="ip", target="margin")
    path = built(photos, toy("affine", normalize=False), tmp_path / "index", recipe)
    with opened(path) as (index, live):
        largest = index.manifest.trust_calibration["several"].largest_distance
        of = index.embeddings(live), list(index.labels[live]), np.arange(44)
        found = leave_out(recipe, *of, closed_form=False, normalized=False)["several"]
    assert any(one.distances.min() < one.distances[0] for one in found)
    assert largest == pytest.approx(max(float(one.distances.min()) for one in found))


def test_what_cannot_be_calibrated_again_says_why(source, tmp_path) -> None:
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


@pytest.mark.parametrize("own_maps", [True, False])
def test_a_build_that_is_stopped_while_it_calibrates_goes_on(
    source, tmp_path, own_maps, monkeypatch
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
    job = (build_index, source, made_of.network, cut)
    interrupt(monkeypatch, "merge.calibrate_build", *job, **given_)
    assert not (cut / "manifest.json").exists()
    passes.append(0)
    build_index(source, made_of.network, cut, **given_)
    assert passes[2] <= passes[0] - 48  # what was finished is used again
    assert manifest(whole)["trust_calibration"]["several"]["images"] == 40
    for key in ("trust_calibration", "parts", "fitted"):
        assert manifest(whole)[key] == manifest(cut)[key]
