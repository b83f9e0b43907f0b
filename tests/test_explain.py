"""`Explainer`: values against the oracles, whatever the query is given as, and what is refused."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import index_samples
import numpy as np
import oracles
import pytest
import torch
from photo_samples import (
    CHANNELS,
    GRID,
    SIDE,
    WIDTH,
    Flat,
    Pooled,
    build,
    given_triplets,
    network_of,
    picture,
    same,
    tensor_of,
)
from PIL import Image

from embedcam import EmbeddingNetwork, Explainer, Index, Recipe
from embedcam._checks import LARGEST
from embedcam.errors import ImageError, InputError, NetworkError, NetworkMismatch
from embedcam.index import compact, create, remove
from embedcam.index.encoding import Dense


@pytest.mark.parametrize("kind", [Pooled, Flat])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 1e-3)])
@pytest.mark.parametrize("encoding", ["dense", "low-rank"])
def test_a_training_image_gets_its_own_offline_map(
    photos, tmp_path, kind, normalize, encoding, dtype, tolerance
) -> None:
    """The pinned equality: what was computed offline is what is drawn online."""
    network, triplets = network_of(kind, normalize=normalize), given_triplets()
    recipe = Recipe(sampling="given", triplets=3, encoding=encoding, dtype=dtype)
    path = build(photos, tmp_path / "index", network, recipe, triplets=triplets)
    double = copy.deepcopy(network.module).double()
    with Index.open(path) as index:
        explainer = Explainer(index, network)
        embeddings = index.embeddings(np.arange(len(index)))
        for place in (0, 7):
            name = index.ids[place]
            why = explainer.explain(photos / name, neighbors=[name])
            activations = network.forward(tensor_of(Image.open(photos / name))[None]).activations[0]
            pairs = [(int(p), int(n)) for p, n in triplets[place]]
            given = double.head, activations, embeddings[place], embeddings, pairs
            weights, used = oracles.averaged_weights(*given, normalize=normalize)
            assert used == 3
            own = oracles.cam(weights, activations.numpy())
            expected = oracles.bilinear(own, SIDE, SIDE)
            assert expected.max() > 0
            assert (why.cam.shape, why.cam.dtype) == ((SIDE, SIDE), np.float32)
            assert np.abs(why.cam - expected).max() <= tolerance * expected.max()
            assert why.ids == why.explained == [name]
            # Bytes of the image's own coarse map: within half a step of its largest value.
            step = own.max() / 255
            assert np.abs(why.neighbor_cams[0] - own).max() <= 0.51 * step + 2e-3 * own.max()


KINDS = ["top-m", "low-rank", "embedding", "dense", "dense32"]


def query() -> tuple[np.ndarray, np.ndarray]:
    """An embedding `[D]` of unit length and activations `[K H W]` for `index_samples`."""
    rng = np.random.default_rng(1)
    vector = rng.standard_normal(index_samples.WIDTH).astype(np.float32)
    maps = rng.standard_normal((index_samples.CHANNELS, *index_samples.GRID)).astype(np.float32)
    return vector / np.linalg.norm(vector), maps


def brute_force(index: Index, vector: np.ndarray, k: int) -> list[int]:
    live = index.live_positions()
    far = [oracles.squared_distance(vector, row) for row in index.embeddings(live)]
    return [int(live[i]) for i in sorted(range(len(far)), key=far.__getitem__)[:k]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transfer", ["mean", "distance"])
@pytest.mark.parametrize("k", [1, 4])
def test_transferred_weights_equal_the_oracle(tmp_path, kind, transfer, k) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind=kind)) as index:
        vector, maps = query()
        why = Explainer(index, transfer=transfer).explain_features(vector, maps, n_neighbors=k)
        places = brute_force(index, vector, k)
        assert why.ids == [f"image-{place:04d}" for place in places]
        assert why.labels == [None if p % 5 == 4 else f"class {p % 3}" for p in places]
        squared = [oracles.squared_distance(vector, row) for row in index.embeddings(places)]
        np.testing.assert_allclose(why.distances, squared, rtol=1e-6)
        inner = index.embeddings(places).astype(np.float64) @ vector
        np.testing.assert_allclose(why.similarities, inner, rtol=1e-6, atol=1e-7)
        # Decoded first and averaged then: low-rank codes are averaged the other way round.
        given = (index.weights(places), squared)[: 1 + (transfer == "distance")]
        expected = getattr(oracles, f"transfer_{transfer}")(*given)
        np.testing.assert_allclose(why.weights, expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(why.cam, oracles.cam(expected, maps), rtol=2e-5, atol=1e-5)
        if kind == "top-m" and k > 1:
            assert np.count_nonzero(why.weights) > 2  # never cut to M again


@pytest.mark.parametrize("kind", KINDS)
def test_one_chosen_result_gives_its_weights_unscaled(tmp_path: Path, kind: str) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind=kind)) as index:
        explainer = Explainer(index, transfer="distance")
        ids = [index.ids[place] for place in brute_force(index, query()[0], 12)]
        asked = {"n_neighbors": 2}, {"neighbors": [ids[-1], "image-0000"]}
        for given, expected in zip(asked, (ids[:2], [ids[-1], "image-0000"]), strict=True):
            why = explainer.explain_features(*query(), result=ids[-1], **given)
            assert (why.ids, why.explained) == (expected, ids[-1:])
            weights = index.weights([index.position(ids[-1])])[0]
            np.testing.assert_allclose(why.weights, weights, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rivals_weights_are_subtracted_at_equal_length(tmp_path: Path, kind: str) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind=kind)) as index:
        vector, maps = query()
        explainer = Explainer(index, transfer="distance")
        one, other = "image-0004", "image-0009"
        asked: dict[str, Any] = {"neighbors": ["image-0000"], "size": (9, 11)}
        why = explainer.explain_features(vector, maps, result=one, above=other, **asked)
        expected = oracles.rival_weights(*index.weights([4, 9]))
        close = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(why.weights, expected, rtol=1e-5, atol=close)
        drawn = oracles.bilinear(oracles.cam(expected, maps), 9, 11)
        np.testing.assert_allclose(why.cam, drawn, rtol=1e-4, atol=1e-5 * drawn.max())
        assert drawn.max() > 0
        assert (why.asked.id, why.rival.id, why.ids) == (one, other, ["image-0000"])
        assert (why.explained, why.trust) == ([one], None)
        squared = oracles.squared_distance(vector, index.embeddings([9])[0])
        np.testing.assert_allclose(why.rival.distance, squared, rtol=1e-6)
        # The other way round the same evidence counts with the other sign.
        back = explainer.explain_features(vector, maps, result=other, above=one, **asked)
        np.testing.assert_allclose(back.weights, -why.weights, rtol=1e-5, atol=close)


@pytest.mark.parametrize("kind", ["dense32", "low-rank"])
@pytest.mark.parametrize("label", [None, "owl"])
def test_a_rival_of_equal_weights_leaves_an_empty_map_that_says_why(tmp_path, kind, label) -> None:
    encoding = index_samples.encoding_of(kind)
    part = index_samples.part(0, 6, encoding)
    for values in part.fields[0].values():
        values[1] = values[0]
    given = [encoding.fitted], {}, replace(part, labels=[label] * 6)
    path = create(tmp_path / "index", index_samples.header_of(encoding), *given)
    with Index.open(path) as index:
        why = Explainer(index).explain_features(*query(), result="image-0000", above="image-0001")
    assert (why.empty, why.weights.any()) == (True, False)
    both = "" if label is None else ", both owl,"
    assert why.to_dict()["why_empty"] == why.why_empty
    assert why.why_empty == (
        f"image-0000 and image-0001{both} have the same weights in this index, so nothing tells "
        "one from the other"
    )
    assert why.tiles()[0].subcaption == "no map: both images\nhave the same weights"


def test_a_rival_is_shown_after_the_result_and_told(tmp_path: Path) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind="dense32")) as index:
        one, other = "image-0003", "image-0007"
        explainer = Explainer(index, n_neighbors=12)
        why = explainer.explain_features(*query(), result=one, above=other)
        alone = explainer.explain_features(*query(), result=one)
    query_tile, tiles = why.tiles()
    assert query_tile.subcaption == f"what here speaks for\n{one}\nrather than\n{other}"
    assert [tile.caption for tile in tiles[:2]] == [one, other]
    assert tiles[0].subcaption.endswith("asked for")
    assert tiles[1].subcaption.endswith("its rival")
    assert len(tiles) == 12
    told = json.loads(json.dumps(why.to_dict()))
    assert (told["result"]["id"], told["rival"]["id"]) == (one, other)
    assert (told["trust"], told["why_empty"]) == (None, None)
    assert told["rival"].keys() == told["neighbors"][0].keys()
    shared = replace(why, shared=True)
    assert (shared.told_apart, shared.speaks_for) == (("class 0", "class 1"), None)
    words = "what here speaks for\nclass 0\nrather than\nclass 1"
    assert shared.tiles()[0].subcaption == words
    nothing = replace(why, cam=np.zeros_like(why.cam))
    assert nothing.why_empty == f"nothing in it speaks for {one} rather than {other}"
    assert alone.rival is alone.told_apart is alone.to_dict()["rival"] is None


def test_named_neighbours_keep_their_order_and_their_distances(tmp_path: Path) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind="dense32")) as index:
        places, named = [11, 2, 7], ["image-0011", "image-0002", "image-0007"]
        why = Explainer(index).explain_features(*query(), neighbors=named)
        assert why.ids == why.explained == named
        squared = [oracles.squared_distance(query()[0], r) for r in index.embeddings(places)]
        np.testing.assert_allclose(why.distances, squared, rtol=1e-6)
        expected = oracles.transfer_mean(index.weights(places))
        np.testing.assert_allclose(why.weights, expected, rtol=1e-5)


def test_removed_images_never_come_back(tmp_path: Path) -> None:
    path = index_samples.make(tmp_path / "index", kind="dense32")
    vector, maps = query()
    with Index.open(path) as index:
        first = Explainer(index).explain_features(vector, maps, n_neighbors=3)
    remove(path, first.ids[:2])
    for _ in range(2):
        with Index.open(path) as index:
            explainer = Explainer(index, n_neighbors=1000)
            left = explainer.explain_features(vector, maps)
            assert left.ids[0] == first.ids[2]
            assert sorted([*left.ids, *first.ids[:2]]) == [f"image-{i:04d}" for i in range(12)]
            for asked in ({"neighbors": first.ids[:1]}, {"result": first.ids[0]}):
                with pytest.raises(InputError, match=f"'{first.ids[0]}'"):
                    explainer.explain_features(vector, maps, **asked)
        compact(path)


def test_neighbours_without_evidence(tmp_path: Path) -> None:
    encoding = Dense(index_samples.CHANNELS, "float32")
    part = index_samples.part(0, 6, encoding)
    weights = encoding.decode(part.fields[0]).copy()
    weights[:4] = 0
    part.fields[0].update(encoding.encode(weights))
    part.triplets_used[:4] = 0
    path = create(tmp_path / "index", index_samples.header_of(encoding), [{}], {}, part)
    vector, maps = query()
    ids = [f"image-{i:04d}" for i in range(6)]
    with Index.open(path) as index:
        for transfer in ("mean", "distance"):
            explainer = Explainer(index, transfer=transfer)
            for named in (ids[:4], ids[:1]):
                none = explainer.explain_features(vector, maps, neighbors=named, size=(16, 24))
                assert not none.weights.any()
                np.testing.assert_array_equal(none.cam, np.zeros((16, 24)))
                assert none.plot().width > 0
            # They take no share from those that know something.
            some = explainer.explain_features(vector, maps, neighbors=ids)
            two = explainer.explain_features(vector, maps, neighbors=ids[4:])
            np.testing.assert_allclose(some.weights, two.weights, rtol=1e-6)
            assert two.cam.max() > 0


def test_every_form_of_a_query_gives_the_same(photos, explainer, network) -> None:
    path = photos / "1/2.png"
    image = Image.open(path)
    by_path = explainer.explain(path)
    assert (by_path.ids[0], by_path.cam.shape) == ("1/2.png", (SIDE, SIDE))
    tensor = tensor_of(image)
    for given in (str(path), path.read_bytes(), image, np.asarray(image)):
        why = explainer.explain(given)
        same(why, by_path)
        assert (why.extent, why.image.size) == ((0, 0, 48, 40), (48, 40))
    features = network.forward(tensor[None])
    vector, maps = features.embedding[0].numpy(), features.activations[0].numpy()
    others = (tensor, tensor.numpy(), tensor.double(), tensor.clone().requires_grad_())
    for why in (
        *map(explainer.explain, others),
        explainer.explain_features(vector, maps, size=(SIDE, SIDE)),
        explainer.explain_features(vector[None], maps[None], size=(SIDE, SIDE))[0],
        explainer.explain_features(vector.tolist(), maps.tolist(), size=(SIDE, SIDE)),
    ):
        same(why, by_path)
        assert why.extent is why.image is None


def test_a_batch_is_its_queries_one_at_a_time(photos, explainer, network) -> None:
    queries = [photos / "0/1.png", photos / "2/3.png", photos / "1/0.png"]
    alone = [explainer.explain(one) for one in queries]
    tensors = [tensor_of(Image.open(one)) for one in queries]
    features = network.forward(torch.stack(tensors))
    numpy = features.embedding.numpy(), features.activations.numpy()
    named = [why.ids for why in alone]
    for batch in (
        explainer.explain_batch(queries),
        explainer.explain_batch([tensors[0], tensors[1].numpy(), queries[2]]),
        explainer.explain_features(*numpy, size=(SIDE, SIDE)),
        explainer.explain_features(*numpy, size=(SIDE, SIDE), neighbors=named),
    ):
        for why, other in zip(batch, alone, strict=True):
            same(why, other, rtol=1e-5)
    one_each = [["0/0.png"], ["1/0.png"], ["2/0.png"]]
    assert [why.ids for why in explainer.explain_batch(queries, neighbors=one_each)] == one_each
    assert explainer.explain_batch([]) == []
    assert explainer.explain_features(np.empty((0, WIDTH)), np.empty((0, CHANNELS, *GRID))) == []


def test_inputs_of_another_size_and_shape(explainer: Explainer, network: EmbeddingNetwork) -> None:
    wide = torch.rand(3, 24, 64, generator=torch.Generator().manual_seed(1))
    why = explainer.explain(wide)
    grid = oracles.cam(why.weights, network.forward(wide[None]).activations[0].numpy())
    assert grid.shape == (6, 16)
    expected = oracles.bilinear(grid, 24, 64)
    np.testing.assert_allclose(why.cam, expected, rtol=1e-4, atol=1e-5 * expected.max())
    with pytest.raises(InputError, match=r"one shape, got \[3, 24, 64\], \[3, 32, 32\]"):
        explainer.explain_batch([wide, torch.rand(3, 32, 32)])


def test_tokens_with_their_grid(explainer: Explainer) -> None:
    maps = np.random.default_rng(2).random((2, CHANNELS, 3, 5)).astype(np.float32)
    tokens = maps.reshape(2, CHANNELS, 15).transpose(0, 2, 1)
    vectors = explainer.index.embeddings([1, 6])
    expected = explainer.explain_features(vectors, maps)
    batch = explainer.explain_features(vectors, tokens, grid=(3, 5))
    alone = explainer.explain_features(vectors[0], tokens[0], grid=(3, 5))
    for why, other in zip([*batch, alone], [*expected, expected[0]], strict=True):
        same(why, other)


def test_no_gradient_is_taken_and_the_network_stays_as_it_was(photos, dense, monkeypatch) -> None:
    network, query = network_of(), photos / "0/0.png"
    module = network.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    explainer = Explainer(dense, network)
    plain = explainer.explain(query)
    for place in ("autograd.grad", "autograd.backward", "Tensor.backward"):
        monkeypatch.setattr(f"torch.{place}", Mock(side_effect=AssertionError("a gradient")))
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            same(Explainer(dense, network).explain(query), plain)
            same(explainer.explain(tensor_of(picture(0, 0))), plain)
    with pytest.raises(ImageError):
        explainer.explain(photos / "nothing.png")
    for part in module.modules():
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks
        assert not any((part.training, *hooks))
    for name, parameter in module.named_parameters():
        assert (parameter.grad, parameter.requires_grad) == (None, True)
        assert torch.equal(parameter, before[name])


def test_a_query_costs_nothing_that_grows_with_the_index(tmp_path: Path) -> None:
    vector, maps = query()
    calls: dict[tuple[str, int], int] = {}

    def count(frame: FrameType, event: str, _: object) -> None:
        calls[what, n] += event == "call" and "embedcam" in frame.f_code.co_filename

    asked: dict[str, dict[str, Any]] = {
        "search": {},
        "named": {"neighbors": ["image-0200", "image-0003"]},
        "result": {"result": "image-0111"},
    }
    for n in (400, 4000):
        with Explainer(index_samples.make(tmp_path / str(n), n=n)) as explainer:
            explainer.explain_features(vector, maps)
            for what, more in asked.items():
                calls[what, n] = 0
                sys.setprofile(count)
                explainer.explain_features(vector, maps, **more)
                sys.setprofile(None)
    for what in asked:
        # A bisection: four steps more for ten times the images, for each id.
        assert 0 < calls[what, 4000] < calls[what, 400] + 100


def tokens(grid: tuple[int, int], shape: tuple[int, ...] = (16, CHANNELS)) -> Any:
    return lambda v, a: (v, np.ones(shape), {"grid": grid})


def sized(size: object) -> Any:
    return lambda v, a: (v, a, {"size": size})


def two_named(ids: object) -> Any:
    return lambda v, a: ([v, v], [a, a], {"neighbors": ids})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, a: (v * 2, a), r"query 0 has length 2; .*length 1: divide it by its L2 norm"),
        (lambda v, a: (v * np.nan, a), r"embedding of query 0 holds a NaN or an infinity"),
        (lambda v, a: (v, a / 0), r"activations of query 0 holds a NaN or an infinity"),
        (lambda v, a: (v * 0 + 1e300, a), r"embedding of query 0 holds 1e\+300, .* up to 1e\+15 "),
        (lambda v, a: (v, -1.1e15 * a), r"activations of query 0 holds -1\.1e\+15, and numbers"),
        (lambda v, a: (v[:4], a), r"embedding has shape \[4\]; .* 5 numbers .*\[5\] or \[B 5\]"),
        (lambda v, a: (v, a[:7]), r"shape \[7, 8, 8\]; this index needs \[8 H W\]"),
        (lambda v, a: (v, a[None]), r"shape \[1, 8, 8, 8\]; this index needs \[8 H W\] for one"),
        (lambda v, a: (v[None], a[0]), r"shape \[8, 8\]; .*\[T 8\] and \[B T 8\] with grid"),
        (lambda v, a: (v, a[:, :0]), r"shape \[8, 0, 8\]"),
        (lambda v, a: (np.stack([v, v]), a[None]), r"2 embeddings came with 1 activations"),
        (lambda v, a: ([v, 1.5 * v], [a, a]), r"query 1 has length 1\.5"),
        (lambda v, a: ("abc", a), r"the embedding cannot be read as an array of numbers"),
        (lambda v, a: (v, [[1], [2, 3]]), r"the activations cannot be read as an array"),
        (lambda v, a: (np.array([None] * 5), a), r"array of numbers \(type object\)"),
        (two_named([["0/0.png"]]), "neighbors holds 1 lists of ids for 2 queries"),
        (two_named(["0/0.png", "1/0.png"]), "list of ids as neighbours, got the string"),
        (tokens((3, 5)), r"16 tokens do not fill a grid of 3 x 5; drop class"),
        (tokens((0, 16)), r"grid = \(0, 16\)"),
        (tokens((4, 4), (CHANNELS, 4, 4)), r"shape \[8, 4, 4\]; .*tokens"),
        (sized((10**9, 7)), r"\(1000000000, 7\): maps of more than 89478485"),
        *(
            (sized(size), r"size = .*; give \(height, width\)")
            for size in (5, (0, 3), (3,), (3, 4, 5), "ab", (2.5, 3))
        ),
    ],
)
def test_features_that_cannot_be_right(explainer: Explainer, change: Any, message: str) -> None:
    vector = explainer.index.embeddings([0])[0].astype(np.float64)
    with np.errstate(all="ignore"):
        *features, options = [*change(vector, np.ones((CHANNELS, *GRID))), {}][:3]
        with pytest.raises(InputError, match=message):
            explainer.explain_features(*features, **options)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_largest_numbers_are_answered_in_numbers(tmp_path: Path, normalized: bool) -> None:
    """What passes the check overflows nowhere on the way to JSON."""
    path = index_samples.make(tmp_path / "x", 12, "dense", normalized=normalized)
    with Explainer(path) as explainer:
        vector = explainer.index.embeddings([3])[0]
        vector = vector if normalized else np.full_like(vector, LARGEST)
        maps = LARGEST * np.sign(query()[1])
        found = explainer.explain_features(vector, maps)
        assert found.cam.max() > 1e14
        json.dumps(found.to_dict(), allow_nan=False)
        with pytest.raises(InputError, match=r"up to 1e\+15"):
            explainer.explain_features(vector, 1.01 * maps)


def test_weights_that_overflow_a_map_are_refused(explainer, monkeypatch) -> None:
    """Of an index from elsewhere: any finite number may lie in it."""
    vector, maps = explainer.index.embeddings([0])[0], np.full((CHANNELS, *GRID), 1e10)
    shown = Dense.combine
    monkeypatch.setattr(Dense, "combine", lambda *given: np.full_like(shown(*given), 3e38))
    with pytest.raises(InputError, match=r"activations up to 1e\+10 with weights up to 3e\+38"):
        explainer.explain_features(vector, maps)


@pytest.mark.parametrize("value", [np.nan, 2e15])
def test_what_a_network_makes_is_checked_too(explainer, monkeypatch, value) -> None:
    embed = explainer.network.embed

    def broken(*given: Any) -> Any:
        found = embed(*given)
        found.activations[0][-1] = value
        return found

    monkeypatch.setattr(explainer.network, "embed", broken)
    words = "holds a NaN" if value != value else r"holds 2e\+15"
    with pytest.raises(NetworkError, match=f"the network's activations of query 1 {words}"):
        explainer.explain_batch([picture(0, 0), picture(1, 0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors = 0; give a whole number of at least 1"),
        ({"n_neighbors": True}, "n_neighbors = True"),
        ({"neighbors": []}, "no neighbour was given; name at least one id"),
        ({"neighbors": "0/0.png"}, "list of ids as neighbours, got the string '0/0.png'"),
        ({"neighbors": [3]}, "ids are strings, as in `index.ids`; given int"),
        ({"neighbors": ["0/0.png", "0/0.png"]}, "'0/0.png' was given twice"),
        ({"neighbors": ["0/0.pgn"]}, r"no image '0/0\.pgn'; did you mean .*'0/0\.png'"),
        ({"neighbors": ["0/0.png"], "n_neighbors": 2}, "not both"),
        ({"result": "1/O.png"}, r"no image '1/O\.png'; did you mean '1/"),
        ({"above": "1/0.png"}, "'1/0.png' is a rival, and no result was named; give result"),
        ({"result": "1/0.png", "above": "1/0.png"}, "is the result itself; name another"),
        ({"result": "1/0.png", "above": "1/9.png"}, "the index has no image '1/9.png'"),
    ],
)
def test_arguments_that_mean_nothing(explainer, arguments, message) -> None:
    vector, maps = explainer.index.embeddings([0])[0], np.ones((CHANNELS, *GRID))
    with pytest.raises(InputError, match=message):
        explainer.explain_features(vector, maps, **arguments)
    with pytest.raises(InputError, match=message):
        explainer.explain(picture(0, 0), **arguments)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("nothing.png", ImageError, "nothing.png: does not exist"),
        (np.zeros((4, 4, 7), np.uint8), ImageError, r"\[H W 3\]"),
        (np.zeros((1, 3, 32, 32), np.float32), InputError, r"shape \[1, 3, 32, 32\].*\[3 H W\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), InputError, r"type torch\.uint8.*\[3 H W\]"),
    ],
)
def test_queries_that_are_none(explainer, given, kind, message) -> None:
    with pytest.raises(kind, match=message):
        explainer.explain(given)
    with pytest.raises(InputError, match=r"use explain\(\)"):
        explainer.explain_batch("0/0.png")


def test_another_network_is_refused(dense, monkeypatch) -> None:
    closed: list[Path] = []
    close = Index.close
    monkeypatch.setattr(Index, "close", lambda self: (closed.append(self.path), close(self)))
    with pytest.raises(NetworkMismatch, match=r"differ by .*in the index, .* given"):
        Explainer(dense, network_of(Flat))
    with pytest.raises(NetworkMismatch, match="normalize is True, given is one with False"):
        Explainer(dense, network_of(normalize=False))
    assert closed[:2] == [dense] * 2
    with pytest.raises(InputError, match=r"a Pooled; expected an EmbeddingNetwork: wrap it"):
        Explainer(dense, network_of().module)  # type: ignore[arg-type]


def test_indexes_and_networks_that_do_not_go_together(tmp_path, dense, network) -> None:
    without = index_samples.make(tmp_path / "index")
    with pytest.raises(InputError, match=r"built from features alone .*use explain_features"):
        Explainer(without, network)
    with pytest.raises(InputError, match="has no network, so it cannot embed a picture"):
        Explainer(dense).explain(picture(0, 0))
    with pytest.raises(InputError, match=r"'median' is unknown; .*known: mean, distance"):
        Explainer(dense, transfer="median")
    with pytest.raises(InputError, match="n_neighbors = 0"):
        Explainer(dense, n_neighbors=0)
    without_faiss = Explainer(index_samples.make(tmp_path / "none", factory="none"))
    with pytest.raises(InputError, match="without FAISS; give neighbors= ids"):
        without_faiss.explain_features(*query())
    why = without_faiss.explain_features(*query(), neighbors=["image-0004"])
    np.testing.assert_allclose(why.weights, without_faiss.index.weights([4])[0])
