"""`Explainer`: values against the oracles, whatever the query is given as, and what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import index_samples
import numpy as np
import oracles
import pytest
import torch
from photo_samples import (
    CHANNELS,
    CROP,
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
from torch import nn

from embedcam import EmbeddingNetwork, Explainer, Index, Recipe
from embedcam._checks import LARGEST
from embedcam.errors import ImageError, InputError, NetworkError, NetworkMismatch
from embedcam.index import compact, create, remove
from embedcam.index.encoding import Dense

# --- the pinned equality: what was computed offline is what is drawn online ----------------------


@pytest.mark.parametrize("kind", [Pooled, Flat])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        ({"encoding": "dense", "dtype": "float32"}, 2e-6),
        ({"encoding": "dense", "dtype": "float16"}, 1e-3),
        ({"encoding": "low-rank", "dtype": "float32"}, 2e-6),
        ({"encoding": "low-rank", "dtype": "float16"}, 1e-3),
    ],
)
def test_a_training_image_gets_its_own_offline_map(
    photos: Path,
    tmp_path: Path,
    kind: type[nn.Module],
    normalize: bool,
    recipe: dict[str, Any],
    tolerance: float,
) -> None:
    network = network_of(kind, normalize=normalize)
    triplets = given_triplets()
    path = build(
        photos,
        tmp_path / "index",
        network,
        Recipe(sampling="given", triplets=3, **recipe),
        triplets=triplets,
    )
    head = seeded_head(kind)
    with Index.open(path) as index:
        explainer = Explainer(index, network)
        embeddings = index.embeddings(np.arange(len(index)))
        for place in (0, 7):
            name = index.ids[place]
            why = explainer.explain(photos / name, neighbors=[name])
            activations = network.forward(tensor_of(Image.open(photos / name))[None]).activations[0]
            weights, used = oracles.averaged_weights(
                head,
                activations,
                embeddings[place],
                embeddings,
                [(int(p), int(n)) for p, n in triplets[place]],
                normalize=normalize,
            )
            assert used == 3
            own = oracles.cam(weights, activations.numpy())
            expected = oracles.bilinear(own, SIDE, SIDE)
            assert expected.max() > 0
            assert why.cam.shape == (SIDE, SIDE)
            assert why.cam.dtype == np.float32
            assert np.abs(why.cam - expected).max() <= tolerance * expected.max()
            assert why.ids == why.explained == [name]
            # Bytes of the image's own coarse map: within half a step of its largest value.
            assert why.neighbor_cams is not None
            step = own.max() / 255
            assert np.abs(why.neighbor_cams[0] - own).max() <= 0.51 * step + 2e-3 * own.max()


def seeded_head(kind: type[nn.Module]) -> Any:
    module: Any = network_of(kind).module
    module = type(module)().double().eval()
    module.load_state_dict(network_of(kind).module.state_dict())
    return module.head


# --- transfer from the stored rows, with every encoding ------------------------------------------

KINDS = ["top-m", "low-rank", "embedding", "dense", "dense32"]


def query(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An embedding `[D]` of unit length and activations `[K H W]` for `index_samples`."""
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(index_samples.WIDTH).astype(np.float32)
    vector /= np.linalg.norm(vector)
    maps = rng.standard_normal((index_samples.CHANNELS, *index_samples.GRID)).astype(np.float32)
    return vector, maps


def brute_force(index: Index, vector: np.ndarray, k: int) -> list[int]:
    live = index.live_positions()
    rows = index.embeddings(live)
    far = [oracles.squared_distance(vector, row) for row in rows]
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
        decoded = index.weights(places)
        expected = (
            oracles.transfer_mean(decoded)
            if transfer == "mean"
            else oracles.transfer_distance(decoded, squared)
        )
        np.testing.assert_allclose(why.weights, expected, rtol=2e-5, atol=2e-6)
        drawn = oracles.cam(expected, maps)
        np.testing.assert_allclose(why.cam, drawn, rtol=2e-5, atol=1e-5)
        if kind == "top-m" and k > 1:
            # Never cut to M again.
            assert np.count_nonzero(why.weights) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_chosen_result_gives_its_weights_unscaled(tmp_path: Path, kind: str) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind=kind)) as index:
        vector, maps = query()
        explainer = Explainer(index, transfer="distance")
        far = index.ids[brute_force(index, vector, 12)[-1]]
        why = explainer.explain_features(vector, maps, result=far, n_neighbors=2)
        np.testing.assert_allclose(why.weights, index.weights([index.position(far)])[0], rtol=1e-6)
        assert why.explained == [far]
        assert why.ids == [index.ids[p] for p in brute_force(index, vector, 2)]
        both = explainer.explain_features(vector, maps, neighbors=[far, "image-0000"], result=far)
        np.testing.assert_allclose(both.weights, why.weights, rtol=1e-6)
        assert both.ids == [far, "image-0000"]


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
        assert why.asked is not None
        assert why.rival is not None
        assert (why.asked.id, why.rival.id, why.ids) == (one, other, ["image-0000"])
        assert why.explained == [one]
        assert why.trust is None
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
    part = replace(part, labels=[label] * 6)
    fitted = [encoding.fitted]
    path = create(tmp_path / "index", index_samples.header_of(encoding), fitted, {}, part)
    with Index.open(path) as index:
        why = Explainer(index).explain_features(*query(), result="image-0000", above="image-0001")
    assert not why.weights.any()
    assert why.empty
    both = "" if label is None else ", both owl,"
    assert why.why_empty == (
        f"image-0000 and image-0001{both} have the same weights in this index, so nothing tells "
        "one from the other"
    )
    assert why.tiles()[0].subcaption == "no map: both images\nhave the same weights"
    assert why.to_dict()["why_empty"] == why.why_empty


def test_a_rival_is_shown_after_the_result_and_told(tmp_path: Path) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind="dense32")) as index:
        vector, maps = query()
        one, other = "image-0003", "image-0007"
        explainer = Explainer(index, n_neighbors=12)
        why = explainer.explain_features(vector, maps, result=one, above=other)
        query_tile, tiles = why.tiles()
        assert query_tile.subcaption == f"what here speaks for\n{one}\nrather than\n{other}"
        assert [tile.caption for tile in tiles[:2]] == [one, other]
        assert tiles[0].subcaption.endswith("asked for")
        assert tiles[1].subcaption.endswith("its rival")
        assert len(tiles) == 12
        told = json.loads(json.dumps(why.to_dict()))
        assert told["result"]["id"] == one
        assert told["rival"]["id"] == other
        assert (told["trust"], told["why_empty"]) == (None, None)
        assert told["rival"].keys() == told["neighbors"][0].keys()
        shared = replace(why, shared=True)
        assert shared.told_apart == ("class 0", "class 1")
        assert shared.speaks_for is None
        words = "what here speaks for\nclass 0\nrather than\nclass 1"
        assert shared.tiles()[0].subcaption == words
        nothing = replace(why, cam=np.zeros_like(why.cam))
        expected = f"nothing in it speaks for {one} rather than {other}"
        assert nothing.why_empty == expected
        alone = explainer.explain_features(vector, maps, result=one)
        assert alone.rival is alone.told_apart is None
        assert alone.to_dict()["rival"] is None


def test_named_neighbours_keep_their_order_and_their_distances(tmp_path: Path) -> None:
    with Index.open(index_samples.make(tmp_path / "index", kind="dense32")) as index:
        vector, maps = query()
        named = ["image-0011", "image-0002", "image-0007"]
        why = Explainer(index).explain_features(vector, maps, neighbors=named)
        assert why.ids == why.explained == named
        squared = [oracles.squared_distance(vector, r) for r in index.embeddings([11, 2, 7])]
        np.testing.assert_allclose(why.distances, squared, rtol=1e-6)
        expected = oracles.transfer_mean(index.weights([11, 2, 7]))
        np.testing.assert_allclose(why.weights, expected, rtol=1e-5)
        searched = Explainer(index).explain_features(vector, maps, n_neighbors=12)
        some = dict(zip(searched.ids, searched.distances, strict=True))
        np.testing.assert_allclose(why.distances, [some[name] for name in named], rtol=1e-5)


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
            with pytest.raises(InputError, match=f"'{first.ids[0]}'"):
                explainer.explain_features(vector, maps, neighbors=first.ids[:1])
            with pytest.raises(InputError, match=f"'{first.ids[0]}'"):
                explainer.explain_features(vector, maps, result=first.ids[0])
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


# --- however a query is given --------------------------------------------------------------------


def test_every_form_of_a_query_gives_the_same(photos, explainer, network) -> None:
    path = photos / "1/2.png"
    image = Image.open(path)
    by_path = explainer.explain(path)
    assert by_path.ids[0] == "1/2.png"
    assert by_path.cam.shape == (SIDE, SIDE)
    tensor = tensor_of(image)
    features = network.forward(tensor[None])
    vector, maps = features.embedding[0].numpy(), features.activations[0].numpy()
    others = [
        explainer.explain(str(path)),
        explainer.explain(path.read_bytes()),
        explainer.explain(image),
        explainer.explain(np.asarray(image)),
        explainer.explain(tensor),
        explainer.explain(tensor.numpy()),
        explainer.explain(tensor.double()),
        explainer.explain(tensor.clone().requires_grad_()),
        explainer.explain_features(vector, maps, size=(SIDE, SIDE)),
        explainer.explain_features(vector[None], maps[None], size=(SIDE, SIDE))[0],
        explainer.explain_features(vector.tolist(), maps.tolist(), size=(SIDE, SIDE)),
    ]
    for why in others:
        same(why, by_path)
    for why in others[:4]:
        assert why.extent == (0, 0, 48, 40)
        assert why.image is not None
        assert why.image.size == (48, 40)
    for why in others[4:]:
        assert why.extent is None
        assert why.image is None


def test_a_batch_is_its_queries_one_at_a_time(photos, explainer, network) -> None:
    queries = [photos / "0/1.png", photos / "2/3.png", photos / "1/0.png"]
    alone = [explainer.explain(one) for one in queries]
    for why, other in zip(explainer.explain_batch(queries), alone, strict=True):
        same(why, other, rtol=1e-5)
        assert why.image is not None
    tensors = [tensor_of(Image.open(one)) for one in queries]
    mixed = explainer.explain_batch([tensors[0], tensors[1].numpy(), queries[2]])
    for why, other in zip(mixed, alone, strict=True):
        same(why, other, rtol=1e-5)
    features = network.forward(torch.stack(tensors))
    numpy = features.embedding.numpy(), features.activations.numpy()
    by_features = explainer.explain_features(*numpy, size=(SIDE, SIDE))
    named = explainer.explain_features(*numpy, neighbors=[why.ids for why in alone])
    for why, other, grid in zip(by_features, alone, named, strict=True):
        same(why, other, rtol=1e-5)
        assert grid.ids == other.ids
    one_each = explainer.explain_batch(queries, neighbors=[["0/0.png"], ["1/0.png"], ["2/0.png"]])
    assert [why.ids for why in one_each] == [["0/0.png"], ["1/0.png"], ["2/0.png"]]
    assert explainer.explain_batch([]) == []
    assert explainer.explain_features(np.empty((0, WIDTH)), np.empty((0, CHANNELS, *GRID))) == []


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("size", [None, (20, 30), (3, 5), (1, 1)])
def test_sizes(explainer: Explainer, shape: tuple[int, int], size: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((CHANNELS, *shape)).astype(np.float32)
    vector = explainer.index.embeddings([2])[0]
    why = explainer.explain_features(vector, maps, size=size)
    grid = oracles.cam(why.weights, maps)
    expected = grid if size is None else oracles.bilinear(grid, *size)
    np.testing.assert_allclose(why.cam, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_inputs_of_another_size_and_shape(explainer: Explainer, network: EmbeddingNetwork) -> None:
    wide = torch.rand(3, 24, 64, generator=torch.Generator().manual_seed(1))
    why = explainer.explain(wide)
    features = network.forward(wide[None])
    grid = oracles.cam(why.weights, features.activations[0].numpy())
    assert grid.shape == (6, 16)
    expected = oracles.bilinear(grid, 24, 64)
    np.testing.assert_allclose(why.cam, expected, rtol=1e-4, atol=1e-5 * expected.max())
    with pytest.raises(InputError, match=r"one shape, got \[3, 24, 64\], \[3, 32, 32\]"):
        explainer.explain_batch([wide, torch.rand(3, 32, 32)])


def test_tokens_with_their_grid(explainer: Explainer) -> None:
    rng = np.random.default_rng(2)
    maps = rng.random((2, CHANNELS, 3, 5)).astype(np.float32)
    tokens = maps.reshape(2, CHANNELS, 15).transpose(0, 2, 1)
    vectors = explainer.index.embeddings([1, 6])
    expected = explainer.explain_features(vectors, maps)
    batch = explainer.explain_features(vectors, tokens, grid=(3, 5))
    alone = explainer.explain_features(vectors[0], tokens[0], grid=(3, 5))
    for why, other in zip([*batch, alone], [*expected, expected[0]], strict=True):
        same(why, other)


# --- without gradients ------------------------------------------------------------


def test_no_gradient_is_asked_for_and_the_network_stays_as_it_was(
    photos: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was asked for")

    network = network_of()
    module = network.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plain = Explainer(dense, network).explain(photos / "0/0.png")
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    with torch.inference_mode():
        inside = Explainer(dense, network).explain(photos / "0/0.png")
        same(inside, plain)
        same(Explainer(dense, network).explain(tensor_of(picture(0, 0))), plain)
    with torch.no_grad():
        same(Explainer(dense, network).explain(photos / "0/0.png"), plain)
    with pytest.raises(ImageError):
        Explainer(dense, network).explain(photos / "nothing.png")
    for part in module.modules():
        assert not part.training
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
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


# --- refusals ------------------------------------------------------------------------------------


def tokens(grid: tuple[int, int], shape: tuple[int, ...] = (16, CHANNELS)) -> Any:
    return lambda v, a: (v, np.ones(shape), {"grid": grid})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, a: (v * 2, a), r"query 0 has length 2; .*length 1: divide it by its L2 norm"),
        (lambda v, a: (v * 0, a), r"query 0 has length 0"),
        (lambda v, a: (v * np.nan, a), r"embedding of query 0 holds a NaN or an infinity"),
        (lambda v, a: (v, a / 0), r"activations of query 0 holds a NaN or an infinity"),
        (lambda v, a: (v * 0 + 1e300, a), r"embedding of query 0 holds 1e\+300, .* up to 1e\+15 "),
        (lambda v, a: (v, -1.1e15 * a), r"activations of query 0 holds -1\.1e\+15, and numbers"),
        (lambda v, a: (v, a.astype("f") * 3e38), r"activations of query 0 holds 3e\+38"),
        (lambda v, a: (v[:4], a), r"embedding has shape \[4\]; .* 5 numbers .*\[5\] or \[B 5\]"),
        (lambda v, a: (v[None, None], a), r"embedding has shape \[1, 1, 5\]"),
        (lambda v, a: (v, a[:7]), r"shape \[7, 8, 8\]; this index needs \[8 H W\]"),
        (lambda v, a: (v, a[None]), r"shape \[1, 8, 8, 8\]; this index needs \[8 H W\] for one"),
        (lambda v, a: (v[None], a[0]), r"shape \[8, 8\]; .*\[T 8\] and \[B T 8\] with grid"),
        (lambda v, a: (v, a[:, :0]), r"shape \[8, 0, 8\]"),
        (lambda v, a: (np.stack([v, v]), a[None]), r"2 embeddings came with 1 activations"),
        (lambda v, a: ([v, 1.5 * v], [a, a]), r"query 1 has length 1\.5"),
        (lambda v, a: ("abc", a), r"the embedding cannot be read as an array of numbers"),
        (lambda v, a: (v, [[1], [2, 3]]), r"the activations cannot be read as an array"),
        (lambda v, a: (np.array([None] * 5), a), r"array of numbers \(type object\)"),
        (
            lambda v, a: ([v, v], [a, a], {"neighbors": [["0/0.png"]]}),
            "neighbors holds 1 lists of ids for 2 queries",
        ),
        (
            lambda v, a: ([v, v], [a, a], {"neighbors": ["0/0.png", "1/0.png"]}),
            "list of ids as neighbours, got the string",
        ),
        (tokens((3, 5)), r"16 tokens do not fill a grid of 3 x 5; drop class"),
        (tokens((0, 16)), r"grid = \(0, 16\)"),
        (tokens((4, 4), (CHANNELS, 4, 4)), r"shape \[8, 4, 4\]; .*tokens"),
        (
            lambda v, a: (v, a, {"size": (10**9, 7)}),
            r"\(1000000000, 7\): maps of more than 89478485",
        ),
        *(
            (lambda v, a, size=size: (v, a, {"size": size}), r"size = .*; give \(height, width\)")
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
        width, channels = explainer.index.width, explainer.index.encoding().n_channels
        vector = explainer.index.embeddings([3])[0]
        vector = vector if normalized else np.full(width, LARGEST)
        maps = LARGEST * np.sign(np.random.default_rng(0).standard_normal((channels, 3, 3)))
        found = explainer.explain_features(vector, maps)
        assert found.cam.max() > 1e14
        json.dumps(found.to_dict(), allow_nan=False)
        with pytest.raises(InputError, match=r"up to 1e\+15"):
            explainer.explain_features(vector, np.full((channels, 3, 3), 1.01 * LARGEST))


def test_weights_that_overflow_a_map_are_refused(explainer, monkeypatch) -> None:
    """Of an index from elsewhere: any finite number may lie in it."""
    vector, maps = explainer.index.embeddings([0])[0], np.full((CHANNELS, *GRID), 1e10)
    shown = Dense.combine
    monkeypatch.setattr(Dense, "combine", lambda *given: np.full_like(shown(*given), 3e38))
    with pytest.raises(InputError, match=r"activations up to 1e\+10 with weights up to 3e\+38"):
        explainer.explain_features(vector, maps)


@pytest.mark.parametrize("value", [np.nan, 2e15])
def test_what_a_network_makes_is_checked_too(explainer, monkeypatch, value) -> None:
    network: Any = explainer.network
    embed = network.embed

    def broken(*given: Any) -> Any:
        found = embed(*given)
        found.activations[0][-1] = value
        return found

    monkeypatch.setattr(network, "embed", broken)
    words = "holds a NaN" if value != value else r"holds 2e\+15"
    with pytest.raises(NetworkError, match=f"the network's activations of query 1 {words}"):
        explainer.explain_batch([picture(0, 0), picture(1, 0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors = 0; give a whole number of at least 1"),
        ({"n_neighbors": 2.5}, r"n_neighbors = 2\.5"),
        ({"n_neighbors": True}, "n_neighbors = True"),
        ({"n_neighbors": "3"}, "n_neighbors = '3'"),
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
        (b"", ImageError, "is empty"),
        (7, ImageError, "given int"),
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


def test_another_network_layer_or_preprocessing_is_refused(dense, monkeypatch) -> None:
    closed: list[Path] = []
    close = Index.close
    monkeypatch.setattr(Index, "close", lambda self: (closed.append(self.path), close(self)))
    plain = network_of()
    others = {
        r"differ by .*in the index, .* given": network_of(Flat),
        "layer is 'relu', given is one with 'conv'": EmbeddingNetwork(
            plain.module, "conv", preprocess=plain.preprocess
        ),
        r"with .*squash.*, and given is .*crop.*; leave out --resize": network_of(preprocess=CROP),
        "normalize is True, given is one with False": network_of(normalize=False),
    }
    for message, network in others.items():
        with pytest.raises(NetworkMismatch, match=message):
            Explainer(dense, network)
    assert closed[:4] == [dense] * 4
    with pytest.raises(InputError, match=r"a Pooled; expected an EmbeddingNetwork: wrap it"):
        Explainer(dense, plain.module)  # type: ignore[arg-type]


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


def test_an_index_without_faiss_explains_named_neighbours(tmp_path: Path) -> None:
    with Index.open(index_samples.make(tmp_path / "index", factory="none")) as index:
        explainer = Explainer(index)
        with pytest.raises(InputError, match="without FAISS; give neighbors= ids"):
            explainer.explain_features(*query())
        why = explainer.explain_features(*query(), neighbors=["image-0004"])
        np.testing.assert_allclose(why.weights, index.weights([4])[0])
