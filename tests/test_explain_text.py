"""Words as queries: what comes back, and where it answers, against literal loops."""

import json

import numpy as np
import pytest
import torch
from build_samples import SIDE, WIDTH, pictures, toy
from hypothesis import given
from hypothesis import strategies as st
from oracles_pairs import slopes_of
from text_samples import PROMPTS, built_words, tower, tower_of

from embedcam import Explainer, Preprocess, build_index
from embedcam.errors import InputError, NetworkError

CLOSED = ("affine", "signed", "identity")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return built_words(tmp_path_factory.mktemp("words"))


def unit(vector):
    return np.asarray(vector, np.float64) / np.linalg.norm(np.asarray(vector, np.float64))


def literal_map(made, explainer, name, direction, average):
    """sum_k sum_d dz_d/dA_kij A_kij (t - m')_d / |z|, less the average's share of a position.

    With attention weights, norms and slopes held where the head is not affine.
    """
    image = made.network.preprocess(explainer.picture(name))
    A = made.network.forward(image[None]).activations[0].double().numpy()
    z, J = made.head(torch.tensor(A)[None])[0].detach().numpy(), slopes_of(made, A)[0]
    norm = float(np.sqrt((z**2).sum())) if made.network.normalize else 1.0
    K, H, W = A.shape
    cells = np.zeros((H, W))
    for i, j in np.ndindex(H, W):
        for k in range(K):
            for d in range(len(z)):
                cells[i, j] += J[d, k, i, j] * A[k, i, j] * direction[d] / norm
        cells[i, j] -= average / (H * W)
    return cells


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", [*CLOSED, "pooled", "other", "tokens"])
def test_maps_are_the_literal_loop(kind, normalize, tmp_path):
    embed = tower_of(kind)
    explainer, made = built_words(tmp_path, kind, normalize=normalize, tower=embed)
    told = explainer.explain_text("a red car", n_neighbors=3)
    scaled = [unit(one) if normalize else one.astype(float) for one in embed(PROMPTS)]
    mean = sum(scaled) / len(scaled)
    np.testing.assert_allclose(explainer.index.fitted("text_mean"), mean, atol=1e-6)
    text = embed(["a red car"])[0].astype(float)
    text = unit(text) if normalize else text
    average = float(explainer.index.fitted("embedding_mean").astype(float) @ (text - mean))
    assert (told.exact, told.centred, told.why_not_centred) == (kind in CLOSED, True, None)
    for name, found in zip(told.ids, told.signed_cams, strict=True):
        expected = literal_map(made, explainer, name, text - mean, average)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(told.cams[0], np.maximum(told.signed_cams[0], 0))


def test_pictures_are_ranked_by_the_text(words):
    explainer, _ = words
    index, text = explainer.index, unit(tower(["a red car"])[0])
    stored = index.embeddings(range(len(index))).astype(float)
    ranked = sorted(range(len(index)), key=lambda row: -float(stored[row] @ text))
    told = explainer.explain_text("a red car", n_neighbors=5)
    assert told.ids == [index.ids[row] for row in ranked[:5]]
    assert told.labels == [index.labels[row] for row in ranked[:5]]
    np.testing.assert_allclose(told.similarities, stored[ranked[:5]] @ text, atol=1e-6)
    distances = [one.distance for one in told.results]
    np.testing.assert_allclose(distances, ((stored[ranked[:5]] - text) ** 2).sum(1), atol=1e-5)


def test_two_texts_are_told_apart(words):
    explainer, made = words
    told = explainer.explain_text("a cat", above="a dog", n_neighbors=2)
    cat, dog = (unit(one) for one in tower(["a cat", "a dog"]))
    average = float(explainer.index.fitted("embedding_mean") @ (cat - dog))
    for one in told.results:
        stored = explainer.index.embeddings([explainer.index.position(one.id)])[0]
        assert one.rival_similarity == pytest.approx(float(stored @ dog), abs=1e-6)
        expected = literal_map(made, explainer, one.id, cat - dog, average)
        np.testing.assert_allclose(one.signed_cam, expected, atol=2e-5 * np.abs(expected).max())
    assert told.ids == explainer.explain_text("a cat", n_neighbors=2).ids
    other = explainer.explain_text("a dog", above="a cat", image=explainer.picture(told.ids[0]))
    np.testing.assert_allclose(other.signed_cams[0], -told.signed_cams[0], atol=1e-6)


def test_a_picture_that_is_given(words):
    explainer, _ = words
    near = explainer.explain_text("the sea", n_neighbors=1)
    told = explainer.explain_text("the sea", image=explainer.picture(near.ids[0]))
    assert told.ids == [""]
    np.testing.assert_allclose(told.signed_cams[0], near.signed_cams[0], atol=1e-6)
    assert told.similarities[0] == pytest.approx(near.similarities[0], abs=1e-5)
    assert told.results[0].distance == pytest.approx(near.results[0].distance, abs=1e-5)
    with pytest.raises(InputError, match="n_neighbors is of a search"):
        explainer.explain_text("the sea", image=explainer.picture(near.ids[0]), n_neighbors=2)


def test_several_texts_and_texts_embedded_elsewhere(words):
    explainer, _ = words
    one, other = explainer.explain_text(["a cat", "the sea"], n_neighbors=2)
    for given_texts in (
        tower,
        tower(["a cat", "the sea"]),
        torch.tensor(tower(["a cat", "the sea"])),
    ):
        again = explainer.explain_text(["a cat", "the sea"], texts=given_texts, n_neighbors=2)
        assert [told.ids for told in again] == [one.ids, other.ids]
        np.testing.assert_allclose(again[1].signed_cams[0], other.signed_cams[0], atol=1e-6)
    alone = explainer.explain_text("a cat", texts=tower(["a cat"])[0] * 7, n_neighbors=2)
    np.testing.assert_allclose(alone.signed_cams[1], one.signed_cams[1], atol=1e-6)
    both = explainer.explain_text("a cat", above="a dog", texts=tower(["a cat", "a dog"]))
    assert both.results[0].rival_similarity is not None
    assert explainer.explain_text([]) == []


@given(st.integers(0, 10_000), st.booleans())
def test_positions_add_up_to_the_similarity(seed, centred):
    """Of a head without a bias: cells, what the average has, and what all texts share."""
    from embedcam.explain.sides import PooledSide
    from embedcam.explain.texts import Direction, _cam, cells_of

    rng = np.random.default_rng(seed)
    K, D, H, W = rng.integers(1, 7, 4)
    A, matrix = rng.normal(size=(K, H, W)), rng.normal(size=(D, K))
    z = matrix @ A.mean((1, 2))
    norm = float(np.linalg.norm(z))
    text, mean, average = rng.normal(size=(3, D))
    mean = mean if centred else np.zeros(D)
    side = PooledSide(A, z / norm, norm, matrix)
    share = float(average @ (text - mean))
    cam = _cam(lambda direction: cells_of(side, direction), Direction(text - mean, share, centred))
    whole = cam.astype(float).sum() + share + float(z / norm @ mean)
    scale = np.abs(text).sum() + np.abs(mean).sum() + np.abs(cam).sum() + abs(share)
    assert abs(whole - float(z / norm @ text)) <= 1e-5 * max(scale, 1)


def test_an_index_without_a_mean_of_texts_says_so(tmp_path):
    made = toy()
    build_index(pictures(tmp_path / "photos"), made.network, tmp_path / "index", progress=False)
    explainer = Explainer(tmp_path / "index", made.network)
    assert "text_mean" not in explainer.index.shared()
    told = explainer.explain_text("a cat", texts=tower)
    assert not told.centred
    assert "no mean embedding of texts" in told.why_not_centred
    text = unit(tower(["a cat"])[0])
    np.testing.assert_allclose(told.direction, text, atol=1e-6)
    average = float(explainer.index.fitted("embedding_mean") @ text)
    expected = literal_map(made, explainer, told.ids[0], text, average)
    np.testing.assert_allclose(told.signed_cams[0], expected, atol=2e-5 * np.abs(expected).max())
    assert explainer.explain_text("a cat", texts=tower, above="a dog").why_not_centred is None
    with pytest.raises(NetworkError, match="tower for texts"):
        explainer.explain_text("a cat")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "the text is empty"),
        (" \n", {}, "the text is empty"),
        (["a cat", ""], {}, "the text is empty"),
        (7, {}, "is no text|give words"),
        ([b"a cat"], {}, "give words"),
        ("a" * 10_001, {}, "10,001 letters"),
        ("a \ud800 cat", {}, "lone surrogate"),
        ("a cat", {"above": "a cat"}, "is the text itself"),
        ("a cat", {"above": ""}, "the text is empty"),
        ("a cat", {"n_neighbors": 0}, "whole number"),
        ("a cat", {"texts": np.zeros(WIDTH)}, "is zero"),
        ("a cat", {"texts": np.full(WIDTH, np.nan)}, "NaN"),
        ("a cat", {"texts": np.ones(WIDTH + 1)}, r"float64 of shape \[1, 6\]; this index holds 5"),
        ("a cat", {"texts": np.ones((2, WIDTH))}, r"of shape \[2, 5\]"),
        ("a cat", {"texts": ["a", "b"]}, "the embedding of the text is <U1"),
        ("a cat", {"texts": lambda texts: np.ones((3, WIDTH))}, r"\[3, 5\]"),
        ("a cat", {"above": "a dog", "texts": np.ones(WIDTH)}, "above is the last"),
    ],
)
def test_wrong_words_are_refused(words, text, options, said):
    with pytest.raises(InputError, match=said):
        words[0].explain_text(text, **options)


def test_features_alone_do_not_answer_words(words):
    with (
        Explainer(words[0].index.path) as explainer,
        pytest.raises(InputError, match="no network"),
    ):
        explainer.explain_text("a cat", texts=tower)


def test_pictures_that_are_gone_come_without_a_map(tmp_path):
    explainer, _ = built_words(tmp_path)
    told = explainer.explain_text("a cat", n_neighbors=3)
    (tmp_path / "photos" / told.ids[1]).unlink()
    again = explainer.explain_text("a cat", n_neighbors=3)
    assert again.ids == told.ids
    assert [one is None for one in again.cams] == [False, True, False]
    assert again.not_found() == [told.ids[1]]
    assert [one["file"] for one in again.to_dict()["results"]] == ["same", "missing", "same"]
    again.plot()


def test_it_is_drawn_and_told(words, tmp_path):
    explainer, _ = words
    told = explainer.explain_text("a cat", above="a dog", n_neighbors=3)
    assert repr(told).startswith('<TextExplanation: "a cat" above "a dog"; 3 pictures: ')
    saved = told.save(tmp_path / "why.png")
    assert saved.stat().st_size > 1000
    assert "<img" in told._repr_html_()
    record = json.loads(json.dumps(told.to_dict()))
    assert (record["text"], record["above"], record["centred"]) == ("a cat", "a dog", True)
    assert np.shape(record["results"][0]["signed_cam"]) == (SIDE // 4, SIDE // 4)
    tile, plain = told.tiles()[0], explainer.explain_text("a cat").tiles()[0]
    assert (tile.signed, plain.signed) == (True, False)
    assert tile.subcaption.count("similarity") == 1
    assert Preprocess((SIDE, SIDE)).extent(*tile.image.size) == tile.extent
