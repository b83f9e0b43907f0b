"""The offline job: its values against the literal loop."""

import os

import numpy as np
import oracles
import pytest
import torch
from build_samples import (
    DENSE,
    WIDTH,
    activations_of,
    dense,
    drawn,
    everything,
    inputs,
    interrupt,
    literal_centred,
    literal_weights,
    off,
    opened,
    toy,
)

import embedcam.offline.strategies as strategies
from embedcam.images import find_images
from embedcam.index import verify
from embedcam.offline import build_index
from embedcam.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick")


def telling_margin(it, source) -> float:
    """A margin that satisfies some of the hinges of the triplets drawn, and not others."""
    f = it.network.forward(inputs(it, source)).embedding.numpy()
    wide = sorted(
        gap
        for row, pairs in enumerate(drawn(DENSE, f, source.labels))
        for p, n in pairs
        if (gap := oracles.margin(f[row], f[p], f[n])) > 0
    )
    middle = len(wide) // 2
    return float(wide[middle - 1] + wide[middle]) / 2


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("kind", ["affine", "signed", "pooled", "other", "tokens"])
@pytest.mark.parametrize(
    ("norm", "normalize", "hinge"),
    [("through", True, False), ("around", True, True), ("through", False, True)],
)
def test_the_index_holds_the_literal_loops_weights(
    tmp_path, source, kind, method, norm, normalize, hinge
) -> None:
    it = toy(kind, normalize=normalize)
    recipe = dense(method=method, norm=norm, hinge=hinge, margin=telling_margin(it, source))
    report = build_index(source, it.network, tmp_path / "i", recipe, batch_size=5)
    with opened(tmp_path / "i") as (index, live):
        embeddings = index.embeddings(live)
        triplets = drawn(recipe, embeddings, source.labels)
        expected, counts = literal_weights(it, source, recipe, embeddings, triplets)
        assert off(index.weights(live), expected) < 2e-5
        assert index.triplets_used(live).tolist() == counts.tolist()
        assert list(index.ids[live]) == source.ids
        features = it.network.forward(inputs(it, source))
        np.testing.assert_allclose(embeddings, features.embedding, atol=1e-6)
        assert report.n_without_triplets == (counts == 0).sum()
        assert hinge == (counts.sum() < 48)
        assert verify(tmp_path / "i").problems == []


@pytest.mark.parametrize("kind", ["affine", "other"])
@pytest.mark.parametrize(
    ("sampling", "triplets", "labels"),
    [("semihard", 4, "folders"), ("hard", 4, "folders"), ("random", 4, "none"),
     ("semihard", 4, "none"), ("hard", 4, "none"), ("all", None, "folders"),
     ("auto", None, "folders")],
)  # fmt: skip
def test_every_sampling_ends_in_the_same_literal_loop(
    tmp_path, source, kind, sampling, triplets, labels
) -> None:
    source = find_images(source.root, labels)
    recipe, it = dense(target="margin", sampling=sampling, triplets=triplets), toy(kind)
    build_index(source, it.network, tmp_path / "i", recipe)
    with opened(tmp_path / "i") as (index, live):
        embeddings = index.embeddings(live)
        about = index.manifest.triplets
        assert (about.sampling, about.count) == ((sampling, 4) if triplets else ("all", 0))
        if triplets:
            used = drawn(recipe, embeddings, source.labels)
        else:
            used = np.array([oracles.every_triplet(source.labels, row) for row in range(12)])
            assert used.shape[1] == 3 * 8
        expected, counts = literal_weights(it, source, recipe, embeddings, used)
        assert off(index.weights(live), expected) < 2e-5
        assert index.triplets_used(live).tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["affine", "pooled", "tokens"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_the_centred_target_needs_no_labels(tmp_path, source, kind, method) -> None:
    recipe, it = dense(target="centred", norm="around", method=method), toy(kind)
    build_index(find_images(source.root, "none"), it.network, tmp_path / "i", recipe)
    with opened(tmp_path / "i") as (index, live):
        expected = literal_centred(it, source, recipe, index.embeddings(live))
        assert off(index.weights(live), expected) < 2e-5
        assert index.triplets_used(live).tolist() == [1] * 12


@pytest.mark.parametrize("kind", ["affine", "identity"])
@pytest.mark.parametrize("norm", ["through", "around"])
def test_exact_low_rank_is_dense_to_half_rounding(tmp_path, source, kind, norm) -> None:
    it = toy(kind)
    for name, recipe in (
        ("dense", dense(norm=norm)),
        ("half", Recipe(triplets=4, norm=norm)),
        ("single", Recipe(triplets=4, norm=norm, dtype="float32")),
    ):
        build_index(source, it.network, tmp_path / name, recipe)
    with opened(tmp_path / "dense") as (index, live):
        expected = index.weights(live)
    with opened(tmp_path / "half") as (index, live):
        spec = index.encoding().spec()
        assert (spec["origin"], spec["codes"], spec["rank"]) == ("head", "stored", index.width)
        assert 0 < off(index.weights(live), expected) < 2.0**-10
    with opened(tmp_path / "single") as (index, live):
        assert off(index.weights(live), expected) < 1e-6
    build_index(source, it.network, tmp_path / "fewer", Recipe(triplets=4, rank=WIDTH - 1))
    with opened(tmp_path / "fewer") as (index, _):
        assert index.encoding().spec()["origin"] == "pca"


@pytest.mark.parametrize("normalize", [True, False])
def test_the_derived_encoding_stores_no_codes_and_equals_dense(tmp_path, source, normalize) -> None:
    it = toy(normalize=normalize)
    recipe = {"target": "centred", "norm": "around"}
    build_index(source, it.network, tmp_path / "dense", dense(**recipe))
    build_index(source, it.network, tmp_path / "derived", Recipe(**recipe))
    with opened(tmp_path / "dense") as (index, live):
        expected = index.weights(live)
    with opened(tmp_path / "derived") as (index, live):
        assert index.encoding().bytes_per_image() == 0
        assert off(index.weights(live), expected) < 1e-5


ENCODINGS = {
    "dense": DENSE,
    "half": dense(dtype="float16"),
    "top-m": dense(encoding="top-m", m=3),
    "low-rank": Recipe(triplets=4),
    "derived": Recipe(target="centred", norm="around"),
}


@pytest.mark.parametrize("kind", ["affine", "identity", "other", "tokens", "fine"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_own_maps_are_drawn_from_the_stored_weights(tmp_path, source, kind, encoding, small_chunks):
    it = toy(kind)
    for name, gigabytes in (("kept", 50.0), ("again", 0)):
        asked = {"batch_size": 3, "scratch_gb": gigabytes}
        build_index(source, it.network, tmp_path / name, ENCODINGS[encoding], **asked)
    assert everything(tmp_path / "kept") == everything(tmp_path / "again")
    with opened(tmp_path / "kept") as (index, live):
        weights, maps = index.weights(live), index.coarse(live)
        activations = activations_of(it, source).numpy()
        assert maps.shape[1:] == ((8, 8) if kind == "fine" else activations.shape[2:])
        for row in range(0, len(live), 4 if kind == "fine" else 1):
            expected = oracles.cam(weights[row], activations[row])
            if kind == "fine":
                expected = oracles.area_average(expected, 8, 8)
            # Bytes, and the half precision in which activations wait.
            np.testing.assert_allclose(maps[row], expected, atol=expected.max() * (0.5 + 0.3) / 255)


def test_activations_beyond_half_precision_make_no_infinite_map(tmp_path, source) -> None:
    it = toy("identity")
    with torch.no_grad():
        for parameter in it.network.module[0][0].parameters():
            parameter.mul_(1e7)
    build_index(source, it.network, tmp_path / "i", DENSE)
    with opened(tmp_path / "i") as (index, live):
        activations = activations_of(it, source).numpy()
        assert activations.max() > 1e6
        for weights, maps, found in zip(
            index.weights(live), activations, index.coarse(live), strict=True
        ):
            expected = oracles.cam(weights, maps)
            np.testing.assert_allclose(found, expected, atol=expected.max() * 0.8 / 255)


@pytest.mark.parametrize(
    ("grid", "coarse"),
    [((7, 7), (7, 7)), ((8, 8), (8, 8)), ((14, 14), (8, 8)), ((1, 100), (1, 64)),
     ((100, 1), (64, 1)), ((9, 8), (8, 8)), ((28, 7), (16, 4))],
)  # fmt: skip
def test_the_coarse_grid_keeps_the_shape_in_64_cells(grid, coarse) -> None:
    assert strategies.coarse_grid(grid) == coarse


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize(
    ("kind", "most"), [("affine", 1), ("pooled", 1), ("identity", 1), ("other", 2), ("tokens", 2)]
)
def test_each_image_is_forwarded_once_behind_a_pool_else_twice(
    tmp_path, source, kind, method, most
) -> None:
    seen: list[bytes] = []
    it = toy(kind)
    forward = it.network.runner.trunk

    def watched(images):
        seen.extend(one.numpy().tobytes() for one in images.detach())
        return forward(images)

    it.network.runner.trunk = watched
    build_index(source, it.network, tmp_path / "i", dense(method=method), batch_size=5)
    assert [seen.count(one.tobytes()) for one in inputs(it, source)] == [most] * 12
    assert len(seen) - most * 12 < 40  # probes, however many images there are


@pytest.mark.parametrize("kind", ["affine", "other"])
def test_the_same_command_gives_the_same_bytes(tmp_path, source, kind, small_chunks) -> None:
    for name, workers in (("a", 0), ("b", 3)):
        given, asked = (source, toy(kind).network), {"batch_size": 4, "workers": workers}
        build_index(*given, tmp_path / name, Recipe(triplets=4), **asked)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    left = [".lock", "faiss-000001.index", "fitted", "manifest.json", "parts"]
    assert sorted(os.listdir(tmp_path / "a")) == left


@pytest.mark.parametrize("kind", ["affine", "pooled", "other"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_the_batch_size_changes_nothing_beyond_rounding(
    tmp_path, source, kind, method, small_chunks
) -> None:
    recipe = dense(method=method, sampling="semihard")
    for size in (1, 5, 32):
        build_index(source, toy(kind).network, tmp_path / str(size), recipe, batch_size=size)
    with opened(tmp_path / "1") as (one, live):
        for size in ("5", "32"):
            with opened(tmp_path / size) as (index, _):
                assert off(index.embeddings(live), one.embeddings(live)) < 1e-6
                assert off(index.weights(live), one.weights(live)) < 1e-5
                step = one.coarse(live).max() / 255
                np.testing.assert_allclose(index.coarse(live), one.coarse(live), atol=1.01 * step)


def test_a_bar_counts_every_image_also_of_a_resumed_build(
    tmp_path, source, capsys, monkeypatch, small_chunks
) -> None:
    given = (source, toy("other").network, tmp_path / "i", DENSE)
    interrupt(monkeypatch, "merge.fit_encodings", build_index, *given, progress=False)
    assert capsys.readouterr().err == ""
    report = build_index(*given, progress=True)
    bars = capsys.readouterr().err
    assert bars.count("12/12") >= 2
    assert list(report.seconds) == ["embed", "weights", "encode", "trust", "write", "faiss"]
