"""Receipts: values against literal loops over the Jacobian, and sums that are the similarity."""

import json

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
    jacobian,
    pair_product,
)
from PIL import Image
from torch import nn
from toys import seeded

from embedcam import EmbeddingNetwork, Explainer, Preprocess, Recipe, build_index
from embedcam.errors import ImageError, InputError, NetworkError
from embedcam.pairs import (
    DifferentiatedSide,
    PairExplainer,
    PooledSide,
    Shown,
    make_comparison,
    make_receipt,
)
from embedcam.prototypes import compress
from embedcam.render import Tile

KINDS = ["affine", "signed", "identity", "pooled", "other", "tokens"]
EXACT = {"affine", "signed", "identity"}


def inputs(number: int, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(1, 3, side, side, generator=generator)


def side_of(made, image: torch.Tensor):
    """A side as `PairExplainer` makes it, and what the oracle needs of it."""
    network = made.network
    kind = network.head_kind
    if kind.affine:
        features = network.forward(image)
        matrix = None if kind.identity else kind.matrix
        norm = float(features.norm[0]) if network.normalize else 1.0
        side = PooledSide(
            features.activations[0].numpy(), features.embedding[0].numpy(), norm, matrix
        )
    else:
        side = DifferentiatedSide(network.head_pass(image, twice=True), network.normalize)
    A = side.activations.astype(np.float64)
    z = made.head(torch.tensor(A)[None])[0].detach().numpy()
    norm = float(np.sqrt((z**2).sum())) if network.normalize else 1.0
    return side, (jacobian(made.head, A), A, norm, z / norm)


def pair_of(kind: str = "affine") -> list[PooledSide | DifferentiatedSide]:
    made = toy(kind)
    return [side_of(made, inputs(number))[0] for number in (1, 2)]


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

    assert receipt.exact == (kind in EXACT)
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
    np.testing.assert_allclose(
        receipt.point(2, 0, of="result"), expected[:, :, 2, 0], rtol=1e-3, atol=1e-6
    )
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
        total = one.channels.sum() + one.shared + one.remainder
        assert total == pytest.approx(shown, abs=1e-9)
    for one in (receipt.query, receipt.result):
        assert one.cells.sum() + one.shared + one.remainder == pytest.approx(shown, abs=1e-6)
    if not centred:
        assert receipt.shared == 0


vectors = st.integers(0, 2**32 - 1)


@given(seed=vectors, bias=st.booleans(), size=st.tuples(st.integers(1, 4), st.integers(1, 4)))
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
        pairs = receipt.matrix().sum()
        specific = (query.embedding - mean) @ (result.embedding - mean)
        assert pairs == pytest.approx(specific, abs=1e-5)
    turned = make_receipt(result, query, mean)
    assert turned.similarity == pytest.approx(receipt.similarity, abs=1e-6)
    np.testing.assert_allclose(turned.channels, receipt.channels, atol=1e-6)
    np.testing.assert_allclose(
        turned.matrix(), receipt.matrix().transpose(2, 3, 0, 1), rtol=1e-9, atol=1e-12
    )


def test_a_power_mean_without_bias_leaves_no_remainder() -> None:
    """Euler: a head that grows as its input is the sum of its first-order parts."""
    made = toy("other")
    with torch.no_grad():
        made.network.module[1][1].bias.zero_()
    (query, _), (result, _) = side_of(made, inputs(1)), side_of(made, inputs(2))
    receipt = make_receipt(query, result, np.zeros(WIDTH))
    assert not receipt.exact
    # Up to the least activation that the power mean takes, 0.001.
    assert abs(receipt.remainder) < 1e-3


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["affine", "tokens"])
def test_a_comparison_divides_half_the_margin(kind: str, normalize: bool, metric: str) -> None:
    made = toy(kind, normalize=normalize)
    (query, (J, A, norm, f)), (first, _), (second, _) = (
        side_of(made, inputs(n)) for n in (1, 2, 3)
    )
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
    np.testing.assert_allclose(found.query.cells, literal.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.query.channels, literal.sum((1, 2)), rtol=1e-4, atol=1e-6)
    total = found.query.channels.sum() + found.query.remainder
    assert total == pytest.approx(found.score, abs=1e-9)


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
    left = "the head's bias" if kind == "signed" else "not of first order"
    rest = found.query.remainder - lengths
    assert told.get(left, 0.0) == pytest.approx(rest, abs=5e-4)
    assert sum(told.values()) + lengths == pytest.approx(found.score, abs=5e-4)
    assert "the embeddings' lengths" not in dict(make_comparison(query, *pair, "ip").amounts())


def test_lines_are_the_largest_by_magnitude_and_the_rest_is_told() -> None:
    receipt = make_receipt(*pair_of(), np.full(WIDTH, 0.1))
    lines = receipt.lines(3)
    largest = sorted(receipt.channels, key=abs)[-3:]
    assert [a.contribution for a in lines] == sorted(largest, reverse=True)
    assert [receipt.channels[a.channel] for a in lines] == [a.contribution for a in lines]
    body = json.loads(json.dumps(receipt.to_dict(lines=3)))
    told = sum(line["contribution"] for line in body["channels"]) + body["other_channels"]
    assert told + body["shared"] + body["remainder"] == pytest.approx(body["similarity"], abs=1e-9)
    with pytest.raises(InputError, match="lines = -1; give a whole number"):
        receipt.lines(-1)
    with pytest.raises(InputError, match="links = -1; give a whole number"):
        receipt.links(-1)


def test_links_are_drawn_from_the_middles_of_cells(monkeypatch) -> None:
    shown = Shown(Image.new("RGB", (100, 80)), (10.0, 20.0, 50.0, 60.0))
    receipt = make_receipt(*pair_of(), np.zeros(WIDTH), query_shown=shown)
    given = {}
    monkeypatch.setattr(
        "embedcam.pairs.receipt.receipt_picture", lambda *_, **named: given.update(named)
    )
    receipt.plot(links=3)
    links = receipt.links(3)
    assert len(given["links"]) == len(links) > 0
    for (start, end), link in zip(given["links"], links, strict=True):
        (row, column), (down, across) = link.query, link.result
        x, y = 10 + 40 * (column + 0.5) / 4, 20 + 40 * (row + 0.5) / 4
        assert start == pytest.approx((x / 100, y / 80))
        assert end == pytest.approx(((across + 0.5) / 4, (down + 0.5) / 4))


def test_a_cell_costs_one_pass_however_often_it_is_asked_for(monkeypatch) -> None:
    side, (J, A, norm, _) = side_of(toy("other"), inputs(1))
    first = side.cell_vectors([0, 3])
    passed, asked = side._passed, []
    jvp = passed.jvp
    monkeypatch.setattr(passed, "jvp", lambda one: (asked.append(one), jvp(one))[1])
    again = side.cell_vectors([3, 5, 0])
    assert len(asked) == 1
    np.testing.assert_array_equal(again[[2, 0]], first)
    np.testing.assert_allclose(again[1], cell_vector(J, A, norm, 1, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("cell", "of", "says"),
    [
        ((4, 0), "query", r"cell \(4, 0\) is not on the query's grid of 4 x 4"),
        ((0, -1), "result", r"cell \(0, -1\) is not on the result's grid of 4 x 4"),
        ((0, 0), "both", "of = 'both' is unknown; known: query, result"),
    ],
)
def test_cells_that_are_not_there(cell, of, says) -> None:
    with pytest.raises(InputError, match=says):
        make_receipt(*pair_of(), np.zeros(WIDTH)).point(*cell, of=of)


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(InputError, match=r"\[6, 2, 2\] and an embedding of 4 numbers"):
        PooledSide(np.ones((6, 2, 2)), np.ones(4), 2.0, np.ones((5, 6)))


class TestPairExplainer:
    @pytest.fixture
    def built(self, tmp_path, monkeypatch):
        quicken(monkeypatch)

        def build(kind: str = "affine", **settings):
            made = toy(kind, **settings)
            source = pictures(tmp_path / "pictures")
            build_index(source, made.network, tmp_path / "index", progress=False)
            return made, Explainer(tmp_path / "index", made.network), tmp_path / "pictures"

        return build

    @pytest.mark.parametrize("kind", ["affine", "other", "tokens"])
    def test_similarity_is_the_one_that_is_shown(self, built, kind) -> None:
        _, explainer, folder = built(kind)
        query = folder / "c0" / "000.png"
        why = explainer.explain(query)
        pairs = PairExplainer(explainer)
        receipts = pairs.receipts(query, why.ids)
        assert [a.similarity for a in receipts] == pytest.approx(why.similarities, abs=1e-5)
        for place, receipt in enumerate(receipts):
            assert receipt.result.shown.name == why.ids[place]
            assert receipt.result.shown.label == why.labels[place]
            assert receipt.query.shown.image.size == (24, 24)

    def test_an_affine_head_takes_one_pass_and_no_gradient(self, built, monkeypatch) -> None:
        made, explainer, folder = built("affine")
        pairs = PairExplainer(explainer)
        made.batches.clear()

        def forbidden(*_, **__):
            raise AssertionError("a gradient was taken")

        monkeypatch.setattr(torch.autograd, "grad", forbidden)
        receipt = pairs.receipt(folder / "c0" / "000.png", explainer.index.ids[1])
        receipt.links()
        receipt.point(0, 0)
        assert made.batches == [2]

    def test_a_prototype_is_shown_by_the_picture_in_its_middle(
        self, built, tmp_path, monkeypatch
    ) -> None:
        # These pictures are alike; photographs of one group are not.
        monkeypatch.setattr("embedcam.pairs.explainer._SAME", 0.9999)
        made, explainer, folder = built("signed")
        query = folder / "c0" / "000.png"
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

    def test_an_index_without_its_mean(self, built, monkeypatch) -> None:
        _, explainer, folder = built("affine")
        pairs, query = PairExplainer(explainer), folder / "c0" / "000.png"
        plain = pairs.receipt(query, "c1/001.png", centred=False)
        monkeypatch.delitem(explainer.index._shared, "embedding_mean")
        again = pairs.receipt(query, "c1/001.png", centred=False)
        np.testing.assert_array_equal(again.query.cells, plain.query.cells)
        with pytest.raises(InputError, match=r"no mean embedding.*ask for receipts that are not"):
            pairs.receipt(query, "c1/001.png")

    def test_an_index_of_several_layers(self, tmp_path, monkeypatch) -> None:
        """Receipts are of the deepest one, behind which the embedding is made."""
        quicken(monkeypatch)

        def deep() -> nn.Module:
            module = nn.Sequential()
            module.add_module("fine", nn.Conv2d(3, 6, 3, 2, 1))
            module.add_module("coarse", nn.Conv2d(6, CHANNELS, 3, 2, 1))
            module.add_module("relu", nn.ReLU())
            module.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
            module.add_module("project", nn.Linear(CHANNELS, WIDTH))
            return module.eval()

        network = EmbeddingNetwork(seeded(deep), "relu", preprocess=Preprocess((SIDE, SIDE)))
        source = pictures(tmp_path / "photos")
        recipe = Recipe(method="polycam", layers=("fine", "relu"))
        build_index(source, network, tmp_path / "index", recipe=recipe, progress=False)
        with Explainer(tmp_path / "index", network) as explainer:
            query = tmp_path / "photos" / "c0" / "000.png"
            why = explainer.explain(query)
            receipt = PairExplainer(explainer).receipt(query, why.ids[1])
            assert receipt.similarity == pytest.approx(float(why.similarities[1]), abs=1e-5)
            _, inputs_of = explainer.prepared(query)
            maps = network.forward(inputs_of[None]).activations
            assert receipt.query.cells.shape == tuple(maps.shape[2:])

    def test_pictures_of_different_sizes(self, built) -> None:
        made, explainer, _ = built("affine")
        pairs = PairExplainer(explainer)
        first = np.asarray(inputs(1, 16)[0])
        second = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(2)).numpy()
        receipt = pairs.receipt(first, second)
        assert receipt.query.cells.shape == (4, 4)
        assert receipt.result.cells.shape == (6, 8)
        assert receipt.point(0, 0).shape == (6, 8)
        one, other = (made.network.forward(x[None]).embedding[0] for x in (first, second))
        assert receipt.similarity == pytest.approx(float(one @ other), abs=1e-6)

    def test_above_is_the_difference_of_two_receipts(self, built) -> None:
        _, explainer, folder = built("affine")
        query = folder / "c0" / "000.png"
        why = explainer.explain(query, n_neighbors=12)
        first, last = why.ids[1], why.ids[-1]
        found = PairExplainer(explainer).above(query, first, last)
        assert found.score > 0
        assert found.score == pytest.approx(
            float(why.distances[-1] - why.distances[1]) / 2, abs=1e-5
        )
        with pytest.raises(InputError, match=r"both 'c0/000.png'; name two images"):
            PairExplainer(explainer).above(query, "c0/000.png", "c0/000.png")

    def test_refusals(self, built, tmp_path) -> None:
        _, explainer, folder = built("affine")
        pairs = PairExplainer(explainer)
        query = folder / "c0" / "000.png"
        with pytest.raises(InputError, match=r"the index has no image 'c0/00.png'; did you mean"):
            pairs.receipt(query, "c0/00.png")
        with pytest.raises(InputError, match="expected a list of results, got one"):
            pairs.receipts(query, "c0/000.png")
        Image.new("RGB", (24, 24), (255, 0, 0)).save(folder / "c1" / "001.png")
        with pytest.raises(ImageError, match=r"c1/001.png: the picture has changed since it was"):
            pairs.receipt(query, "c1/001.png")
        (folder / "c1" / "001.png").unlink()
        with pytest.raises(ImageError, match=r"001.png: does not exist"):
            pairs.receipt(query, "c1/001.png")
        with pytest.raises(InputError, match=r"this Explainer has no network; give it one"):
            PairExplainer(Explainer(tmp_path / "index"))

    @pytest.mark.parametrize("kind", ["affine", "identity"])
    def test_an_onnx_file_gives_the_same_receipts(self, built, tmp_path, kind) -> None:
        pytest.importorskip("onnxruntime")
        from embedcam.export import export_onnx

        made, explainer, folder = built(kind)
        export_onnx(explainer.index, uncounted(made), tmp_path / "network.onnx")
        query, result = folder / "c0" / "000.png", explainer.index.ids[1]
        expected = PairExplainer(explainer).receipt(query, result)
        other = Explainer(tmp_path / "index", onnx=tmp_path / "network.onnx")
        found = PairExplainer(other).receipt(query, result)
        assert found.exact
        assert found.similarity == pytest.approx(expected.similarity, abs=1e-5)
        for one, other in ((found.query, expected.query), (found.result, expected.result)):
            np.testing.assert_allclose(one.cells, other.cells, atol=1e-5)
            np.testing.assert_allclose(one.channels, other.channels, atol=1e-5)
        np.testing.assert_allclose(found.matrix(), expected.matrix(), atol=1e-5)

    def test_an_onnx_file_without_its_head_says_so(self, built, tmp_path) -> None:
        pytest.importorskip("onnxruntime")
        from embedcam.export import export_onnx

        made, explainer, _ = built("other")
        export_onnx(explainer.index, uncounted(made), tmp_path / "network.onnx")
        other = Explainer(tmp_path / "index", onnx=tmp_path / "network.onnx")
        with pytest.raises(InputError, match=r"network.onnx has none that is average pooling and"):
            PairExplainer(other)


def test_a_rival_s_own_map_has_the_rival_s_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """What in it matches the query speaks for it, and is drawn as the query's blue is."""
    sides = [
        PooledSide(np.random.default_rng(n).random((3, 2, 2)), np.eye(3)[n], 1.0, None)
        for n in range(3)
    ]
    result, rival = (make_receipt(sides[0], one, np.zeros(3)) for one in sides[1:])
    drawn: list[Tile] = []
    monkeypatch.setattr(
        "embedcam.pairs.receipt.receipt_picture", lambda tiles, *_, **__: drawn.extend(tiles)
    )
    made = make_comparison(sides[0], result, rival, "l2")
    made.plot()
    query, ours, theirs = drawn
    np.testing.assert_array_equal(query.cam, made.query.cells)
    np.testing.assert_array_equal(ours.cam, result.result.cells)
    np.testing.assert_array_equal(theirs.cam, -rival.result.cells)
    assert theirs.cam.any()


def test_a_receipt_that_overflows_is_refused() -> None:
    """Its numbers pass the check one by one: the head is what makes them too large."""
    maps, matrix = np.full((3, 2, 2), 1e15, np.float32), np.full((4, 3), 1e15, np.float32)
    side = PooledSide(maps, np.full(4, 1e15), 1.0, matrix)
    with pytest.raises(NetworkError, match="a receipt overflows"):
        make_receipt(side, side, np.zeros(4))
