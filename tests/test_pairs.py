"""Receipts: values against literal loops over the Jacobian, and sums that are the similarity."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from build_samples import CHANNELS, SIDE, WIDTH, pictures, quicken, toy
from hypothesis import given
from hypothesis import strategies as st
from oracles_pairs import (
    cell_vector,
    contributions,
    greedy_links,
    pair_product,
    slopes_of,
)
from PIL import Image
from torch import nn
from toys import seeded

from embedcam import EmbeddingNetwork, Explainer, Preprocess, Recipe, build_index
from embedcam.errors import ImageError, InputError, NetworkError
from embedcam.export import export_onnx
from embedcam.pairs import (
    HeldSide,
    PairExplainer,
    PooledSide,
    Shown,
    make_comparison,
    make_receipt,
)
from embedcam.prototypes import compress

KINDS = ["affine", "signed", "identity", "normed", "pooled", "other", "tokens"]
DIRECT = {"affine", "signed", "identity"}


def inputs(number: int, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(1, 3, side, side, generator=generator)


def side_of(made, image: torch.Tensor):
    """A side as `PairExplainer` makes it, and what the oracle needs of it."""
    network = made.network
    if (head := network.affine_head(lambda: np.empty(0))) is not None:
        found = network.forward(image)
        norm = float(found.norm[0]) if network.normalize else 1.0
        given = found.activations[0].numpy(), found.embedding[0].numpy(), norm
        side = PooledSide(*given, head.matrix, head.held)
    else:
        side = HeldSide(network.held_pass(image), network.normalize)
    A = side.activations.astype(np.float64)
    z = made.head(torch.tensor(A)[None])[0].detach().numpy()
    norm = float(np.sqrt((z**2).sum())) if network.normalize else 1.0
    return side, (slopes_of(made, A)[0], A, norm, z / norm)


def pair_of(kind: str = "affine") -> list[PooledSide | HeldSide]:
    return [side_of(toy(kind), inputs(number))[0] for number in (1, 2)]


def uncounted(made) -> EmbeddingNetwork:
    """The toy without what counts its batches, which no exporter can follow."""
    module = made.network.module
    return EmbeddingNetwork.from_parts(*module, module=module, preprocess=made.network.preprocess)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_receipt_is_the_literal_loop(kind: str, normalize: bool) -> None:
    made = toy(kind, normalize=normalize)
    query, (J, A, norm, f) = side_of(made, inputs(1))
    result, (J2, A2, norm2, f2) = side_of(made, inputs(2))
    mean = np.random.default_rng(0).normal(size=len(f)) * 0.2
    receipt = make_receipt(query, result, mean)
    assert receipt.exact
    assert bool(receipt.held) == (kind not in DIRECT)
    assert receipt.similarity == pytest.approx(sum(a * b for a, b in zip(f, f2, strict=True)))
    ours, theirs = contributions(J, A, norm, f2 - mean), contributions(J2, A2, norm2, f - mean)
    for values, literal in (
        (receipt.query.channels, ours.sum((1, 2))),
        (receipt.query.cells, ours.sum(0)),
        (receipt.result.channels, theirs.sum((1, 2))),
        (receipt.result.cells, theirs.sum(0)),
        (receipt.channels, (ours + theirs).sum((1, 2)) / 2),
    ):
        np.testing.assert_allclose(values, literal, rtol=1e-4, atol=1e-6)
    assert receipt.query.shared == pytest.approx(float(f @ mean), abs=1e-6)
    assert receipt.result.shared == pytest.approx(float(f2 @ mean), abs=1e-6)


@pytest.mark.parametrize("kind", ["affine", "other", "tokens"])
def test_point_to_point_is_the_literal_loop(kind: str) -> None:
    made = toy(kind)
    query, (J, A, norm, _) = side_of(made, inputs(1))
    result, (J2, A2, norm2, _) = side_of(made, inputs(2))
    mean = np.random.default_rng(0).normal(size=WIDTH) * 0.2
    receipt = make_receipt(query, result, mean)
    (h, w), (h2, w2) = A.shape[1:], A2.shape[1:]
    expected = np.zeros((h, w, h2, w2))
    for i, j, k, m in np.ndindex(expected.shape):
        expected[i, j, k, m] = pair_product(
            cell_vector(J, A, norm, i, j), cell_vector(J2, A2, norm2, k, m), mean, h * w, h2 * w2
        )
    np.testing.assert_allclose(receipt.matrix(), expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(receipt.point(1, 2), expected[1, 2], rtol=1e-3, atol=1e-6)
    point = receipt.point(2, 0, of="result")
    np.testing.assert_allclose(point, expected[:, :, 2, 0], rtol=1e-3, atol=1e-6)
    # All cells of a 4 x 4 grid are among the sixteen that links begin at.
    links = receipt.links(16)
    literal = greedy_links(expected, 16)
    assert [(*a.query, *a.result) for a in links] == [place for place, _ in literal]
    assert [a.contribution for a in links] == pytest.approx([v for _, v in literal], rel=1e-3)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_side_of_a_receipt_sums_to_the_similarity(kind: str, centred: bool) -> None:
    made = toy(kind)
    (query, _), (result, _) = side_of(made, inputs(3)), side_of(made, inputs(4))
    mean = np.random.default_rng(1).normal(size=len(query.embedding)) * 0.3
    receipt = make_receipt(query, result, mean, centred=centred)
    shown = float(query.embedding @ result.embedding)
    for one in (receipt.query, receipt.result, receipt):
        total = one.channels.sum() + sum(one.parts.values()) + one.shared + one.remainder
        assert total == pytest.approx(shown, abs=1e-9)
    for one in (receipt.query, receipt.result):
        total = one.cells.sum() + sum(one.parts.values()) + one.shared + one.remainder
        assert total == pytest.approx(shown, abs=1e-6)
    assert centred or receipt.shared == 0


@given(st.integers(0, 2**32 - 1), st.booleans(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_behind_an_affine_head_the_remainder_is_the_bias(seed, bias, size) -> None:
    rng = np.random.default_rng(seed)
    W, b = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4) * bias

    def side(shape):
        A = rng.random((6, *shape)).astype(np.float32)
        z = W.astype(np.float64) @ A.astype(np.float64).mean((1, 2)) + b
        return PooledSide(A, z / np.linalg.norm(z), np.linalg.norm(z), W)

    query, result = side(size), side((2, 3))
    mean = rng.normal(size=4) * 0.1
    receipt = make_receipt(query, result, mean)
    expected = float(b @ (result.embedding - mean)) / query.norm
    assert receipt.query.remainder == pytest.approx(expected, abs=1e-5)
    if not bias:
        # Rows of the pairs are then all that is not shared with the average image.
        specific = (query.embedding - mean) @ (result.embedding - mean)
        assert receipt.matrix().sum() == pytest.approx(specific, abs=1e-5)
    turned = make_receipt(result, query, mean)
    assert turned.similarity == pytest.approx(receipt.similarity, abs=1e-6)
    np.testing.assert_allclose(turned.channels, receipt.channels, atol=1e-6)
    swapped = receipt.matrix().transpose(2, 3, 0, 1)
    np.testing.assert_allclose(turned.matrix(), swapped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["affine", "tokens"])
def test_a_comparison_divides_half_the_margin(kind: str, normalize: bool, metric: str) -> None:
    made = toy(kind, normalize=normalize)
    (query, (J, A, norm, f)), *others = (side_of(made, inputs(n)) for n in (1, 2, 3))
    (first, _), (second, _) = others
    mean = np.zeros(WIDTH)
    result, rival = make_receipt(query, first, mean), make_receipt(query, second, mean)
    found = make_comparison(query, result, rival, metric)
    g, h = first.embedding, second.embedding
    if metric == "l2":
        margin = sum((f[d] - h[d]) ** 2 - (f[d] - g[d]) ** 2 for d in range(WIDTH)) / 2
    else:
        margin = sum(f[d] * (g[d] - h[d]) for d in range(WIDTH))
    assert found.score == pytest.approx(margin, abs=1e-6)
    if normalize:
        assert found.score == pytest.approx(result.similarity - rival.similarity, abs=1e-6)
    literal = contributions(J, A, norm, g - h)
    mine = found.query
    np.testing.assert_allclose(mine.cells, literal.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mine.channels, literal.sum((1, 2)), rtol=1e-4, atol=1e-6)
    parts = sum(mine.parts.values())
    assert mine.channels.sum() + parts + mine.remainder == pytest.approx(found.score, abs=1e-9)


@pytest.mark.parametrize("kind", ["signed", "tokens"])
def test_what_lengths_give_is_not_called_the_bias(kind: str) -> None:
    made = toy(kind, normalize=False)
    (query, _), (first, _), (second, _) = (side_of(made, inputs(n)) for n in (1, 2, 3))
    pair = [make_receipt(query, one, np.zeros(WIDTH)) for one in (first, second)]
    found = make_comparison(query, *pair, "l2")
    g, h = first.embedding, second.embedding
    lengths = sum(h[d] ** 2 - g[d] ** 2 for d in range(WIDTH)) / 2
    told = dict(found.amounts(3))
    assert abs(lengths) > 1e-3
    assert told.pop("the embeddings' lengths") == pytest.approx(lengths)
    left = "the head's bias"
    rest = found.query.remainder - lengths
    assert told.get(left, 0.0) == pytest.approx(rest, abs=5e-4)
    assert ("class and register tokens" in told) == (kind == "tokens")
    assert sum(told.values()) + lengths == pytest.approx(found.score, abs=5e-4)
    assert "the embeddings' lengths" not in dict(make_comparison(query, *pair, "ip").amounts())


def test_lines_are_the_largest_by_magnitude_and_the_rest_is_told() -> None:
    receipt = make_receipt(*pair_of(), np.full(WIDTH, 0.1))
    lines, largest = receipt.lines(3), sorted(receipt.channels, key=abs)[-3:]
    assert [a.contribution for a in lines] == sorted(largest, reverse=True)
    assert [receipt.channels[a.channel] for a in lines] == [a.contribution for a in lines]
    body = json.loads(json.dumps(receipt.to_dict(lines=3)))
    told = sum(line["contribution"] for line in body["channels"]) + body["other_channels"]
    assert told + body["shared"] + body["remainder"] == pytest.approx(body["similarity"], abs=1e-9)


def test_links_are_drawn_from_the_middles_of_cells(monkeypatch) -> None:
    shown = Shown(Image.new("RGB", (100, 80)), (10.0, 20.0, 50.0, 60.0))
    receipt = make_receipt(*pair_of(), np.zeros(WIDTH), query_shown=shown)
    drawn = Mock()
    monkeypatch.setattr("embedcam.pairs.receipt.receipt_picture", drawn)
    receipt.plot(links=3)
    links = receipt.links(3)
    assert links
    for (start, end), link in zip(drawn.call_args.kwargs["links"], links, strict=True):
        (row, column), (down, across) = link.query, link.result
        x, y = 10 + 40 * (column + 0.5) / 4, 20 + 40 * (row + 0.5) / 4
        assert start == pytest.approx((x / 100, y / 80))
        assert end == pytest.approx(((across + 0.5) / 4, (down + 0.5) / 4))


def test_a_cell_costs_one_pass_however_often_it_is_asked_for(monkeypatch) -> None:
    side, (J, A, norm, _) = side_of(toy("other"), inputs(1))
    first = side.cell_vectors([0, 3])
    asked = Mock(wraps=side._passed.vectors)
    monkeypatch.setattr(side._passed, "vectors", asked)
    again = side.cell_vectors([3, 5, 0, 7])
    (masks,) = asked.call_args.args
    assert asked.call_count == 1
    assert np.argwhere(masks).tolist() == [[0, 1, 1], [1, 1, 3]]
    np.testing.assert_array_equal(again[[2, 0]], first)
    np.testing.assert_allclose(again[1], cell_vector(J, A, norm, 1, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda a: a.point(4, 0), r"cell \(4, 0\) is not on the query's grid of 4 x 4"),
        (lambda a: a.point(0, -1, of="result"), r"\(0, -1\) is not on the result's grid of 4 x 4"),
        (lambda a: a.point(0, 0, of="both"), "of = 'both' is unknown; known: query, result"),
        (lambda a: a.lines(-1), "lines = -1; give a whole number"),
        (lambda a: a.links(-1), "links = -1; give a whole number"),
    ],
)
def test_what_a_receipt_does_not_have(ask, says) -> None:
    with pytest.raises(InputError, match=says):
        ask(make_receipt(*pair_of(), np.zeros(WIDTH)))


@pytest.fixture
def built(tmp_path, monkeypatch):
    quicken(monkeypatch)

    def build(kind: str = "affine", **settings):
        made = toy(kind, **settings)
        source = pictures(tmp_path / "pictures")
        build_index(source, made.network, tmp_path / "index", progress=False)
        return made, Explainer(tmp_path / "index", made.network), tmp_path / "pictures"

    return build


@pytest.mark.parametrize("kind", ["affine", "other", "tokens"])
def test_similarity_is_the_one_that_is_shown(built, kind) -> None:
    _, explainer, folder = built(kind)
    query = folder / "c0/000.png"
    why = explainer.explain(query)
    receipts = PairExplainer(explainer).receipts(query, why.ids)
    assert [a.similarity for a in receipts] == pytest.approx(why.similarities, abs=1e-5)
    assert [a.result.shown.name for a in receipts] == why.ids
    assert [a.result.shown.label for a in receipts] == why.labels
    assert receipts[0].query.shown.image.size == (24, 24)


@pytest.mark.parametrize("kind", ["affine", "normed"])
def test_an_affine_head_takes_one_pass_and_no_gradient(built, monkeypatch, kind) -> None:
    made, explainer, folder = built(kind)
    pairs = PairExplainer(explainer)
    made.batches.clear()
    monkeypatch.setattr(torch.autograd, "grad", Mock(side_effect=AssertionError("a gradient")))
    receipt = pairs.receipt(folder / "c0/000.png", explainer.index.ids[1])
    receipt.links()
    receipt.point(0, 0)
    assert made.batches == [2]


def test_a_prototype_is_shown_by_the_picture_in_its_middle(built, tmp_path, monkeypatch) -> None:
    # These pictures are alike; photographs of one group are not.
    monkeypatch.setattr("embedcam.pairs.explainer._SAME", 0.9999)
    made, explainer, folder = built("signed")
    query = folder / "c0/000.png"
    compress(tmp_path / "index", tmp_path / "small", prototypes=1)
    with Explainer(tmp_path / "small", made.network) as small:
        (row,) = small.index.select([0]).paths
        stored = small.index.embeddings([0])[0]
        (name,) = small.index.ids
        middle = PairExplainer(explainer).receipt(query, row)
        assert float(stored @ middle.sides[1].embedding) < 0.999
        receipt = PairExplainer(small).receipt(query, name)
        assert receipt.similarity == pytest.approx(middle.similarity, abs=1e-6)
        assert receipt.result.shown.name == name


def test_an_index_without_its_mean(built, monkeypatch) -> None:
    _, explainer, folder = built("affine")
    pairs, query = PairExplainer(explainer), folder / "c0/000.png"
    plain = pairs.receipt(query, "c1/001.png", centred=False)
    monkeypatch.delitem(explainer.index._shared, "embedding_mean")
    again = pairs.receipt(query, "c1/001.png", centred=False)
    np.testing.assert_array_equal(again.query.cells, plain.query.cells)
    with pytest.raises(InputError, match=r"no mean embedding.*ask for receipts that are not"):
        pairs.receipt(query, "c1/001.png")


def test_an_index_of_several_layers_has_receipts_of_the_deepest(tmp_path, monkeypatch) -> None:
    quicken(monkeypatch)

    def deep() -> nn.Module:
        trunk = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, CHANNELS, 3, 2, 1), nn.ReLU()
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, WIDTH)
        return nn.Sequential(*trunk, *head).eval()

    network = EmbeddingNetwork(seeded(deep), "2", preprocess=Preprocess((SIDE, SIDE)))
    recipe = Recipe(method="polycam", layers=("0", "2"))
    photos, index = pictures(tmp_path / "photos"), tmp_path / "index"
    build_index(photos, network, index, recipe=recipe, progress=False)
    with Explainer(index, network) as explainer:
        query = tmp_path / "photos/c0/000.png"
        why = explainer.explain(query)
        receipt = PairExplainer(explainer).receipt(query, why.ids[1])
        assert receipt.similarity == pytest.approx(float(why.similarities[1]), abs=1e-5)
        assert receipt.query.cells.shape == (SIDE // 4, SIDE // 4)


def test_pictures_of_different_sizes(built) -> None:
    made, explainer, _ = built("affine")
    first = inputs(1)[0].numpy()
    second = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(2)).numpy()
    receipt = PairExplainer(explainer).receipt(first, second)
    assert (receipt.query.cells.shape, receipt.result.cells.shape) == ((4, 4), (6, 8))
    assert receipt.point(0, 0).shape == (6, 8)
    one, other = (made.network.forward(x[None]).embedding[0] for x in (first, second))
    assert receipt.similarity == pytest.approx(float(one @ other), abs=1e-6)


def test_above_is_the_difference_of_two_receipts(built) -> None:
    _, explainer, folder = built("affine")
    query = folder / "c0/000.png"
    why = explainer.explain(query, n_neighbors=12)
    found = PairExplainer(explainer).above(query, why.ids[1], why.ids[-1])
    margin = float(why.distances[-1] - why.distances[1]) / 2
    assert found.score == pytest.approx(margin, abs=1e-5)
    assert margin > 0
    with pytest.raises(InputError, match=r"both 'c0/000.png'; name two images"):
        PairExplainer(explainer).above(query, "c0/000.png", "c0/000.png")


def test_refusals(built, tmp_path) -> None:
    _, explainer, folder = built("affine")
    pairs = PairExplainer(explainer)
    query = folder / "c0/000.png"
    with pytest.raises(InputError, match=r"the index has no image 'c0/00.png'; did you mean"):
        pairs.receipt(query, "c0/00.png")
    with pytest.raises(InputError, match="expected a list of results, got one"):
        pairs.receipts(query, "c0/000.png")
    (folder / "c1/001.png").unlink()
    with pytest.raises(ImageError, match=r"001.png: does not exist"):
        pairs.receipt(query, "c1/001.png")
    with pytest.raises(InputError, match=r"this Explainer has no network; give it one"):
        PairExplainer(Explainer(tmp_path / "index"))


@pytest.mark.parametrize("kind", ["affine", "identity", "normed", "other"])
def test_an_onnx_file_gives_the_same_receipts_or_says_what_it_lacks(built, tmp_path, kind) -> None:
    pytest.importorskip("onnxruntime")
    made, explainer, folder = built(kind)
    export_onnx(explainer.index, uncounted(made), tmp_path / "network.onnx")
    other = Explainer(tmp_path / "index", onnx=tmp_path / "network.onnx")
    if kind == "other":
        with pytest.raises(InputError, match=r"network.onnx has none that is average pooling and"):
            PairExplainer(other)
        return
    pair = folder / "c0/000.png", explainer.index.ids[1]
    expected, found = (PairExplainer(one).receipt(*pair) for one in (explainer, other))
    assert (found.exact, found.held) == (True, expected.held)
    assert found.similarity == pytest.approx(expected.similarity, abs=1e-5)
    np.testing.assert_allclose(found.query.channels, expected.query.channels, atol=1e-5)
    np.testing.assert_allclose(found.result.cells, expected.result.cells, atol=1e-5)
    np.testing.assert_allclose(found.matrix(), expected.matrix(), atol=1e-5)


def test_a_rival_s_own_map_has_the_rival_s_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """What in it matches the query speaks for it, and is drawn as the query's blue is."""
    maps = np.random.default_rng(0).random((3, 3, 2, 2))
    sides = [PooledSide(maps[n], np.eye(3)[n], 1.0, None) for n in range(3)]
    result, rival = (make_receipt(sides[0], one, np.zeros(3)) for one in sides[1:])
    drawn = Mock()
    monkeypatch.setattr("embedcam.pairs.receipt.receipt_picture", drawn)
    made = make_comparison(sides[0], result, rival, "l2")
    made.plot()
    query, ours, theirs = drawn.call_args.args[0]
    np.testing.assert_array_equal(query.cam, made.query.cells)
    np.testing.assert_array_equal(ours.cam, result.result.cells)
    np.testing.assert_array_equal(theirs.cam, -rival.result.cells)
    assert theirs.cam.any()


def test_sides_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"\[6, 2, 2\] and an embedding of 4 numbers"):
        PooledSide(np.ones((6, 2, 2)), np.ones(4), 2.0, np.ones((5, 6)))
    # Numbers that pass the check one by one: the head is what makes them too large.
    maps, matrix = np.full((3, 2, 2), 1e15, np.float32), np.full((4, 3), 1e15, np.float32)
    side = PooledSide(maps, np.full(4, 1e15), 1.0, matrix)
    with pytest.raises(NetworkError, match="a receipt overflows"):
        make_receipt(side, side, np.zeros(4))
