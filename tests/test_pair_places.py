"""Places that match: literal sums over pairs of positions, caps, and parts of a query."""

import json

import numpy as np
import pytest
from build_samples import WIDTH, pictures, quicken, toy
from hypothesis import given
from hypothesis import strategies as st
from oracles_pairs import cell_vector, contributions
from oracles_places import is_connected, pair_of_positions
from test_pairs import KINDS, inputs, side_of

from embedcam import Explainer, build_index
from embedcam.errors import InputError
from embedcam.pairs import PairExplainer, Place, PooledSide, covered, make_receipt
from embedcam.pairs.places import REGION, TOGETHER, find_places, products

GRIDS = st.tuples(st.integers(1, 11), st.integers(1, 11))


def pooled(rng: np.random.Generator, shape: tuple[int, int], W: np.ndarray, bias: np.ndarray):
    A = rng.random((W.shape[1], *shape)).astype(np.float32) ** 3
    z = W.astype(np.float64) @ A.astype(np.float64).mean((1, 2)) + bias
    return PooledSide(A, z / np.linalg.norm(z), np.linalg.norm(z), W)


@pytest.mark.parametrize("kind", ["affine", "other", "tokens"])
def test_pairs_of_regions_are_the_literal_loop(kind: str) -> None:
    made = toy(kind)
    query, (J, A, norm, f) = side_of(made, inputs(1))
    result, (J2, A2, norm2, f2) = side_of(made, inputs(2))
    rng = np.random.default_rng(0)
    mean = rng.normal(size=WIDTH) * 0.2
    ours, theirs = rng.random((2, *A.shape[1:])), rng.random((3, *A2.shape[1:]))
    each = [cell_vector(J, A, norm, *at) for at in np.ndindex(A.shape[1:])]
    other = [cell_vector(J2, A2, norm2, *at) for at in np.ndindex(A2.shape[1:])]
    expected = np.zeros((2, 3))
    for one, two in np.ndindex(2, 3):
        for i, j in np.ndindex(len(each), len(other)):
            weight = ours[one].ravel()[i] * theirs[two].ravel()[j]
            expected[one, two] += weight * pair_of_positions(each, other, f, f2, mean, i, j)
    found = products(query, result, mean, ours, theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_that_cover_all_add_up_to_the_receipt(kind: str) -> None:
    made = toy(kind)
    (query, _), (result, _) = side_of(made, inputs(3)), side_of(made, inputs(4))
    rng = np.random.default_rng(1)
    mean = rng.normal(size=len(query.embedding)) * 0.3
    receipt = make_receipt(query, result, mean)
    covers = [
        (rng.integers(0, 3, side.activations.shape[1:]) == np.arange(3)[:, None, None]) * 1.0
        for side in (query, result)
    ]
    total = products(query, result, mean, *covers).sum()
    assert total == pytest.approx(receipt.beyond, abs=1e-5)
    left = receipt.shared + receipt.remainder + sum(receipt.parts.values())
    assert total + left == pytest.approx(receipt.similarity, abs=1e-5)


@given(st.integers(0, 2**32 - 1), GRIDS, GRIDS, st.booleans())
def test_regions_keep_to_their_caps(seed, shape, other, part) -> None:
    rng = np.random.default_rng(seed)
    W, bias = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4) * 0.1
    query, result = pooled(rng, shape, W, bias), pooled(rng, other, W, bias)
    height, width = shape
    box = np.sort(rng.random((2, 2)), axis=0) * (width, height)
    mean, within = (
        rng.normal(size=4) * 0.3,
        covered(box.ravel(), shape, (0, 0, width, height), shape),
    )
    places = find_places(query, result, mean, 5, within if part else None)
    assert len(places) <= 5
    for of, grid in (("query", shape), ("result", other)):
        regions = [place.region(of) for place in places]
        for region in regions:
            assert region.shape == grid
            assert 0 < region.sum() <= REGION * region.size
            assert is_connected(region)
            for one in regions:
                assert (region == one).all() or not (region & one).any()
        assert np.any([np.zeros(grid, bool), *regions], axis=0).mean() <= TOGETHER
    if part:
        assert not any(place.query[within == 0].any() for place in places)
    given_ = [place.contribution for place in places]
    assert given_ == sorted(given_, reverse=True)
    assert all(one > 0 for one in given_)
    assert len({(p.query.tobytes(), p.result.tobytes()) for p in places}) == len(places)
    for place in places:
        mine = place.query * (within if part else 1.0)
        literal = products(query, result, mean, mine[None], place.result[None] * 1.0)
        assert place.contribution == pytest.approx(float(literal[0, 0]), abs=1e-6)


def planted(*spots: tuple[tuple[int, int], int], shape=(7, 7)) -> PooledSide:
    """Channel k shines on 2 x 2 positions from a spot on; channel 0 a little everywhere."""
    A = np.zeros((6, *shape), np.float32)
    A[0] = 0.3
    for (row, column), channel in spots:
        A[channel, row : row + 2, column : column + 2] = 4
    z = A.mean((1, 2)).astype(np.float64)
    return PooledSide(A, z / np.linalg.norm(z), np.linalg.norm(z), None)


def test_what_matches_is_found() -> None:
    query = planted(((0, 0), 1), ((5, 4), 2), ((0, 5), 3))
    result = planted(((4, 5), 1), ((0, 0), 2), ((5, 0), 4))
    receipt = make_receipt(query, result, np.eye(6)[0] * 0.3)
    first, second, *rest = receipt.places()
    assert all(one.contribution < second.contribution / 5 for one in rest)
    boxes = {(first.box("query"), first.box("result")), (second.box("query"), second.box("result"))}
    in_sevenths = {tuple(tuple(round(7 * end) for end in box) for box in pair) for pair in boxes}
    assert in_sevenths == {((0, 0, 2, 2), (5, 4, 7, 6)), ((4, 5, 6, 7), (0, 0, 2, 2))}
    words = {place.words(receipt.unshared).partition(":")[0] for place in (first, second)}
    assert words == {
        "the upper left of the query matches the lower right of the result",
        "the lower right of the query matches the upper left of the result",
    }
    body = json.loads(json.dumps(receipt.to_dict()))["places"]
    assert body[0]["query"]["box"] == list(first.box("query"))
    assert [tuple(cell) for cell in body[0]["result"]["cells"]] == list(
        zip(*map(list, np.nonzero(first.result)), strict=True)
    )
    assert body[0]["share"] == pytest.approx(first.contribution / receipt.unshared)
    assert receipt.to_dict(places=0)["places"] == []


def test_places_that_are_called_the_same_are_said_once() -> None:
    query, result = (planted(((0, 0), 1), ((3, 3), 2), shape=(15, 15)) for _ in range(2))
    receipt = make_receipt(query, result, np.eye(6)[0] * 0.3)
    places, (said, *others) = receipt.places(2), receipt.in_words(2)
    assert [(place.where("query"), place.where("result")) for place in places] == [
        ("upper left", "upper left")
    ] * 2
    share = sum(place.share(receipt.unshared) for place in places)
    assert said.startswith("the upper left of the query matches the upper left of the result: ")
    assert said.endswith(f" {share:.0%} of what they share beyond the average")
    assert len(others) == 1
    assert others[0].startswith(f"It carries {share:.0%}")


def test_where_a_region_lies() -> None:
    region = np.zeros((7, 7), bool)
    words = []
    for row, column in np.ndindex(3, 3):
        region[:] = False
        region[3 * row, 3 * column] = True
        words.append(Place(region, region, 0.1).where("query"))
    above, below = ["upper left", "top", "upper right"], ["lower left", "bottom", "lower right"]
    assert words == [*above, "left", "middle", "right", *below]
    told = Place(region, region, 0.1)
    assert told.words(0.4) == (
        "the lower right of the query matches the lower right of the result: "
        "25% of what they share beyond the average"
    )
    assert told.words(-0.1).endswith("of the result: +0.100")


# Parts of a query


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_of_all_is_the_receipt_without_one(kind: str) -> None:
    made = toy(kind)
    (query, _), (result, _) = side_of(made, inputs(1)), side_of(made, inputs(2))
    mean = np.random.default_rng(0).normal(size=len(query.embedding)) * 0.2
    plain = make_receipt(query, result, mean)
    boxed = make_receipt(query, result, mean, within=np.ones(query.activations.shape[1:]))
    for side in ("query", "result"):
        one, other = getattr(plain, side), getattr(boxed, side)
        np.testing.assert_allclose(other.cells, one.cells, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other.channels, one.channels, rtol=1e-4, atol=1e-6)
        assert other.outside == pytest.approx(0, abs=1e-6)
    for place, other in zip(plain.places(), boxed.places(), strict=True):
        np.testing.assert_array_equal(place.query, other.query)
        np.testing.assert_array_equal(place.result, other.result)
        assert other.contribution == pytest.approx(place.contribution, abs=1e-6)
    assert boxed.links(3) == plain.links(3)


@pytest.mark.parametrize("kind", ["affine", "tokens"])
def test_a_part_is_the_literal_loop_and_still_adds_up(kind: str) -> None:
    made = toy(kind)
    query, (J, A, norm, f) = side_of(made, inputs(1))
    result, (J2, A2, norm2, f2) = side_of(made, inputs(2))
    rng = np.random.default_rng(0)
    mean, within = rng.normal(size=WIDTH) * 0.2, rng.random(A.shape[1:])
    receipt = make_receipt(query, result, mean, within=within)
    ours = contributions(J, A, norm, f2 - mean) * within
    np.testing.assert_allclose(receipt.query.cells, ours.sum(0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(receipt.query.channels, ours.sum((1, 2)), rtol=1e-3, atol=1e-6)
    vectors = {at: np.array(cell_vector(J, A, norm, *at)) for at in np.ndindex(A.shape[1:])}
    part = sum(within[at] * vector for at, vector in vectors.items())
    apart = f - sum(vectors.values()) - mean
    theirs = contributions(J2, A2, norm2, part + within.mean() * apart)
    np.testing.assert_allclose(receipt.result.cells, theirs.sum(0), rtol=1e-3, atol=1e-6)
    for one in (receipt.query, receipt.result):
        total = one.cells.sum() + one.shared + one.outside + one.remainder
        assert total + sum(one.parts.values()) == pytest.approx(receipt.similarity, abs=1e-5)
    told = dict(receipt.amounts(3))
    assert told["outside the box"] == pytest.approx(receipt.outside)
    assert sum(told.values()) == pytest.approx(receipt.similarity, abs=2e-3)
    ones = np.ones((1, *A2.shape[1:]))
    total = products(query, result, mean, within[None], ones).sum()
    assert receipt.beyond == pytest.approx(total, abs=1e-6)


def test_a_position_counts_by_the_share_that_is_covered() -> None:
    # Positions of 10 x 5 pixels from (20, 10) on.
    weights = covered((25, 0, 45, 12), (100, 80), (20, 10, 60, 25), (3, 4))
    np.testing.assert_allclose(weights, np.outer([0.4, 0, 0], [0.5, 1, 0.5, 0]))
    np.testing.assert_allclose(covered((-9, -9, 999, 999), (8, 6), (0, 0, 8, 6), (2, 2)), 1)


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ((10, 10, 10, 40), r"box = \(10, 10, 10, 40\); give x0 y0 x1 y1 in pixels of the query"),
        ((40, 10, 10, 40), "x0 left of x1"),
        ((0, 0, float("nan"), 4), "give x0 y0 x1 y1"),
        ((1, 2, 3), "give x0 y0 x1 y1"),
        (
            (0, 0, 19, 80),
            "nothing of what the network saw of the query, 20 to 60 x 10 to 25 of 100",
        ),
    ],
)
def test_a_box_that_holds_nothing(box, says) -> None:
    with pytest.raises(InputError, match=says):
        covered(box, (100, 80), (20, 10, 60, 25), (3, 4))


def test_a_box_is_asked_of_every_result(tmp_path, monkeypatch) -> None:
    quicken(monkeypatch)
    made = toy("affine")
    build_index(pictures(tmp_path / "pictures"), made.network, tmp_path / "index", progress=False)
    pairs = PairExplainer(Explainer(tmp_path / "index", made.network))
    ids = pairs.explainer.index.ids[1:4]
    query = tmp_path / "pictures" / "c0" / "000.png"
    plain, boxed = pairs.receipts(query, ids), pairs.receipts(query, ids, box=(0, 0, 12, 24))
    for one, part in zip(plain, boxed, strict=True):
        left = one.query.cells * ([1, 1, 0, 0])
        np.testing.assert_allclose(part.query.cells, left, rtol=1e-5, atol=1e-7)
        assert all(not place.query[:, 2:].any() for place in part.places())
        assert all(link.query[1] < 2 for link in part.links())
    raw = np.random.default_rng(0).random((3, 16, 16), np.float32)
    (whole,) = pairs.receipts(raw, ids[:1], box=(0, 0, 16, 16))
    assert whole.outside == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="holds nothing of what the network saw"):
        pairs.receipts(query, ids, box=(30, 0, 40, 9))
