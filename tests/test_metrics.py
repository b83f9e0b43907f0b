"""Metrics by their laws and their errors; test_oracles_metrics.py holds them beside loops."""

import metrics_cases
import numpy as np
import oracles
import oracles_metrics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import (
    average_drop,
    average_precision,
    best_iou,
    bootstrap_interval,
    box_from_map,
    box_iou,
    box_mask,
    correlations,
    cosines,
    curve_area,
    deletion_steps,
    energy_share,
    equal_area_share,
    hottest_precision,
    iou_at,
    leaves_top,
    localisation_accuracy,
    map_at_r,
    map_iou,
    noisy_linear_imputation,
    paired_difference,
    pixel_auc,
    pointing_hit,
    rank_correlations,
    rank_drop,
    rank_of,
    recall_at_k,
    recalls_at,
    removal_masks,
    retrieval,
    score_drops,
)

ONES, TWO = np.ones((1, 3, 3)), np.eye(2)
BOX = (1.0, 0.0, 4.0, 3.0)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
MAPS = SHAPES.flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.5, 2.0, 3.25]))
)
TWO_MAPS = hnp.arrays(
    np.float64, (2, 2, 3, 5), elements=st.sampled_from([-1.5, 0.0, 0.1, 1.0, 2.0])
)
OF_MAPS = [correlations, rank_correlations, lambda a, b: map_iou(a, b, 0.3)]
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(3, 2, 9, 7))
MASKS = RNG.random((3, 9, 7)) < 0.7


@st.composite
def maps_and_parts(draw) -> tuple[np.ndarray, np.ndarray]:
    """Maps with ties and zeros, and regions of parts of pixels."""
    maps = draw(MAPS)
    parts = st.sampled_from([0.0, 0.25, 1.0])
    return maps, draw(hnp.arrays(np.float64, maps.shape, elements=parts))


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    levels = st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0])
    maps = draw(hnp.arrays(np.float64, shape, elements=levels))
    return maps, draw(hnp.arrays(np.bool_, shape))


@settings(max_examples=40)
@given(maps_and_parts())
def test_the_energy_share_is_the_loop(pair) -> None:
    maps, masks = pair
    got = energy_share(maps, masks)
    wanted = [oracles.energy_in_mask(m, i) for m, i in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize(
    "score",
    [energy_share, pointing_hit, lambda m, i: iou_at(m, i, 0.2), lambda m, i: best_iou(m, i)[0]],
)
def test_the_scores_of_a_box(score) -> None:
    inside = np.stack([box_mask(BOX, (6, 5))] * 2)
    assert score(inside, inside).tolist() == [1.0, 1.0]
    assert score(inside * 7, inside.astype(bool)).tolist() == [1.0, 1.0]
    for level in (0.0, 0.1, 5e-324, 1e308):
        np.testing.assert_allclose(score(np.full((2, 6, 5), level), inside), 9 / 30, rtol=1e-15)
    assert score(np.ones((1, 1, 1)), np.ones((1, 1, 1))).tolist() == [1.0]
    assert score(np.ones((1, 2, 2)), np.zeros((1, 2, 2))).tolist() == [0.0]


@settings(max_examples=40)
@given(
    maps_and_parts(),
    st.sampled_from([1e-320, 1e-30, 3.0, 1e307]),
    st.sampled_from([0.05, 0.2, 1.0]),
)
def test_scale_changes_nothing(pair, scale, threshold) -> None:
    maps, inside = np.round(pair[0] * 4), pair[1]  # a subnormal number has few digits
    scaled = maps * scale
    np.testing.assert_allclose(energy_share(scaled, inside), energy_share(maps, inside), rtol=1e-12)
    np.testing.assert_array_equal(pointing_hit(scaled, inside), pointing_hit(maps, inside))
    np.testing.assert_array_equal(box_from_map(scaled * 1.0), box_from_map(maps))
    np.testing.assert_array_equal(
        iou_at(maps * 2, inside, threshold), iou_at(maps, inside, threshold)
    )


@settings(max_examples=40)
@given(st.tuples(*[st.floats(-3, 9, width=32)] * 4), st.integers(1, 6), st.integers(1, 6))
def test_a_box_is_the_covered_part_of_each_pixel(box, height, width) -> None:
    got = box_mask(box, (height, width))
    np.testing.assert_allclose(got, oracles.box_mask(box, height, width), atol=1e-12)


def test_the_box_of_a_box_is_that_box() -> None:
    boxes = np.array([BOX, (0, 0, 5, 6), (4, 5, 5, 6), (0, 2, 1, 3)])
    maps = np.stack([box_mask(tuple(box), (6, 5)) for box in boxes])
    np.testing.assert_array_equal(box_from_map(maps), boxes)
    assert localisation_accuracy(box_from_map(maps), boxes, 1.0) == 1.0
    assert box_from_map(np.zeros((2, 3, 4))).tolist() == [[0, 0, 4, 3]] * 2
    assert box_iou([[0, 0, 1e300, 1e300]], [[0, 0, 1e300, 5e299]]).tolist() == [0.5]
    # One half is enough.
    assert localisation_accuracy([[0, 0, 2, 1], [0, 0, 3, 1]], [[0, 0, 1, 1]] * 2) == 0.5


CONTRAST = {
    "offset": lambda m: m - 0.7,
    "scale": lambda m: m * 3.5,
    "power": lambda m: np.sign(m) * np.abs(m) ** 3,
    "exponential": np.exp,
    "threshold that keeps the order": lambda m: m + 10 * (m > 0),
}


@pytest.mark.parametrize("change", CONTRAST.values(), ids=CONTRAST.keys())
@settings(max_examples=30)
@given(cases())
def test_a_change_of_contrast_changes_nothing(change, case) -> None:
    maps, inside = case
    changed = change(maps)
    for score in (pixel_auc, average_precision, hottest_precision):
        np.testing.assert_allclose(score(changed, inside), score(maps, inside), atol=1e-12)
    halves = inside, ~inside & (maps > -3)
    np.testing.assert_allclose(pixel_auc(changed, *halves), pixel_auc(maps, *halves), atol=1e-12)


def test_a_change_of_contrast_raises_the_energy_and_the_equal_area_share() -> None:
    maps = np.array([[[4.0, 3.0, 2.0, 1.0]]])
    inside = np.array([[[True, True, False, False]]])
    assert energy_share(np.maximum(maps - 2, 0), inside) > energy_share(maps, inside)
    sharper = equal_area_share(np.maximum(maps - 2, 0), inside, ~inside)
    assert sharper > equal_area_share(maps, inside, ~inside)
    # A larger object does not win by its size.
    large = np.arange(10)[None, None] < 8
    assert equal_area_share(np.ones((1, 1, 10)), large, ~large).tolist() == [0.5]


@settings(max_examples=30)
@given(cases())
def test_what_is_chance_and_what_its_opposite(case) -> None:
    maps, inside = case
    np.testing.assert_allclose(pixel_auc(-maps, inside), 1 - pixel_auc(maps, inside))
    np.testing.assert_allclose(pixel_auc(maps, ~inside), 1 - pixel_auc(maps, inside))
    constant = np.full_like(maps, -2.0)
    chance = inside.mean((1, 2))
    np.testing.assert_allclose(pixel_auc(constant, inside), 0.5)
    np.testing.assert_allclose(average_precision(constant, inside), chance, atol=1e-12)
    np.testing.assert_allclose(hottest_precision(constant, inside, 0.3), chance, atol=1e-12)
    np.testing.assert_allclose(hottest_precision(inside, inside), inside.any((1, 2)))
    drawn = np.maximum(maps, 0)
    one, other = equal_area_share(drawn, inside, ~inside), equal_area_share(drawn, ~inside, inside)
    np.testing.assert_allclose(one + other, 1)


@settings(max_examples=40)
@given(MAPS, st.data())
def test_the_order_of_removal(maps, data) -> None:
    steps = data.draw(st.integers(1, maps[0].size))
    order, masks = deletion_steps(maps, steps)
    assert masks.dtype == bool
    # Any increasing change of the values leaves the order alone.
    for changed in (np.sqrt(maps), maps * 1e-300, maps**3 + 1):
        np.testing.assert_array_equal(deletion_steps(changed, steps)[0], order)
    for j, count in enumerate(masks[0].sum((1, 2))):
        if count:
            np.testing.assert_array_equal(removal_masks(maps, count / maps[0].size), masks[:, j])
    # A fraction takes at least one pixel.
    assert [removal_masks(np.eye(10)[None], part).sum() for part in (1e-9, 0.29)] == [1, 29]


def test_a_perfect_fall() -> None:
    before, after = rank_of([[9, 1, 2, 3]], [0]), rank_of([[0, 1, 2, 3]], [0])
    assert (before.tolist(), after.tolist()) == ([1.0], [4.0])
    assert rank_drop(before, after).tolist() == [3.0]
    assert rank_drop(after, before).tolist() == [-3.0]
    assert leaves_top(before, after, 3).tolist() == [True]
    assert leaves_top(before, after, 4).tolist() == [False]
    # What was not there cannot leave, and extreme numbers are numbers.
    assert leaves_top([5.0, 2.0], [9.0, 1.0], 2).tolist() == [False, False]
    drops, _ = score_drops([1e308, 5e-324], [0.0, 0.0], [-1e308, 0.0])
    np.testing.assert_allclose(drops, [0.5, 1.0])
    assert curve_area([[1e308] * 4]).tolist() == [1e308]


def test_what_was_not_removed_stays_bit_for_bit() -> None:
    for kind in (np.float16, np.float32, np.float64):
        images = PIXELS.astype(kind)
        before = images.copy()
        filled = noisy_linear_imputation(images, MASKS)
        assert filled.dtype == kind
        np.testing.assert_array_equal(images, before)
        keep = np.broadcast_to(~MASKS[:, None], images.shape)
        np.testing.assert_array_equal(filled[keep], images[keep])
        assert (filled[~keep] != images[~keep]).mean() > 0.9
    nothing = noisy_linear_imputation(PIXELS, np.zeros_like(MASKS))
    np.testing.assert_array_equal(nothing, PIXELS)


def test_batches_of_any_size_give_the_same() -> None:
    masks = MASKS.copy()
    masks[2] = masks[0]
    together = noisy_linear_imputation(PIXELS, masks, seed=5)
    alone = [noisy_linear_imputation(PIXELS[i : i + 1], masks[i : i + 1], seed=5) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-9)
    assert (noisy_linear_imputation(PIXELS, masks, seed=6) != together).any()


def test_the_noise_is_gaussian_and_as_large_as_said() -> None:
    images, masks = np.zeros((1, 3, 40, 40)), np.ones((1, 40, 40), bool)
    masks[0, 0, 0] = False
    noise = noisy_linear_imputation(images, masks, noise=0.25)[:, :, masks[0]].ravel()
    assert noise.mean() == pytest.approx(0, abs=4 * 0.25 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.25, rel=0.04)
    assert (np.abs(noise) < 0.25).mean() == pytest.approx(0.683, abs=0.03)


@pytest.mark.peers
def test_it_is_what_the_peer_computes() -> None:
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    filled = noisy_linear_imputation(PIXELS, MASKS, noise=0)
    # Its system alone: what is around it mixes tensors and arrays, which NumPy 2 warns about.
    for image, mask, got in zip(PIXELS, MASKS, filled, strict=True):
        system = road.NoisyLinearImputer.setup_sparse_system
        matrix, right = system((~mask).astype(float), image, road.neighbors_weights)
        wanted = np.linalg.solve(matrix.toarray(), right).T
        np.testing.assert_allclose(got[:, mask], wanted, atol=1e-10)


@settings(max_examples=60)
@given(TWO_MAPS, st.sampled_from([0.25, 2.0, 2.0**-1000, 2.0**1000]))
def test_what_each_does_not_see(pair, scale) -> None:
    a, b = pair
    flat = a.reshape(2, -1), b.reshape(2, -1)
    np.testing.assert_allclose(cosines(flat[0] * scale, flat[1]), cosines(*flat))
    for agreement in OF_MAPS:
        np.testing.assert_allclose(agreement(a * scale, b), agreement(a, b), atol=1e-12)
    np.testing.assert_allclose(correlations(a * 2 + 3, b), correlations(a, b), atol=1e-12)
    np.testing.assert_allclose(correlations(-a, b), -correlations(a, b), atol=1e-12)
    for agreement in OF_MAPS[1:]:
        np.testing.assert_array_equal(agreement(np.exp(a), b), agreement(a, b))


@pytest.mark.parametrize("level", [0.0, 0.1, -3.3, 5e-324, 1e308])
def test_what_does_not_vary_agrees_with_nothing(level) -> None:
    constant = np.full((2, 3, 7), level)
    other = np.random.default_rng(0).random((2, 3, 7))
    for agreement in OF_MAPS:
        for a, b in [(constant, other), (other, constant), (constant, constant)]:
            assert agreement(a, b).tolist() == [0.0, 0.0]
    assert cosines(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0.0]


def test_the_bootstrap_interval_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(np.full(5, 2.0)) == (2.0, 2.0)
    low, high = bootstrap_interval(np.arange(101.0), np.median)
    assert 35 < low < 50 < high < 65


@settings(max_examples=40)
@given(hnp.arrays(np.float64, (2, 9), elements=st.integers(-4, 4)))
def test_a_difference_turned_around(pair) -> None:
    a, b = pair
    got, turned = (paired_difference(*x, draws=100) for x in [(a, b), (b, a)])
    assert got.mean == -turned.mean
    assert got.low == pytest.approx(-turned.high)
    assert got.high == pytest.approx(-turned.low)
    assert got.win_rate + turned.win_rate == pytest.approx(1)
    assert (a - b).min() <= got.low <= got.high <= (a - b).max()
    assert paired_difference(a * 2 + 1, b * 2 + 1, draws=100).mean == pytest.approx(2 * got.mean)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    a, b = hard + 1 + rng.normal(0, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    found = paired_difference(a, b)
    assert 0.9 < found.low < found.mean < found.high < 1.1
    alone = bootstrap_interval(a)
    assert alone[1] - alone[0] > 10 * (found.high - found.low)
    assert paired_difference(a, b, seed=1) != found
    assert paired_difference(a, b, level=0.5).low > found.low


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(4, 14))
def test_laws_of_both(seed, n) -> None:
    rng = np.random.default_rng(seed)
    # Random numbers hardly tie, so that the order of storage does not matter.
    embeddings, labels = rng.normal(size=(n, 3)), rng.integers(0, 2, n)
    labels[:2] = 0
    both = recalls_at(embeddings, labels, [1, 2]), map_at_r(embeddings, labels)
    assert 0 <= both[1] <= 1
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = rng.permutation(n)
    for other, names in [
        (embeddings @ turn * 4, labels),
        (embeddings[moved], labels[moved]),
        (embeddings, np.array(["a", "b"])[labels]),
        (embeddings * 2.0**600, labels),
    ]:
        assert recalls_at(other, names, [1, 2]) == pytest.approx(both[0])
        assert map_at_r(other, names) == pytest.approx(both[1])


def test_blocks_change_nothing(monkeypatch) -> None:
    rows, labels = metrics_cases.some_items(3, 40)
    whole = recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)
    monkeypatch.setattr(retrieval, "BLOCK", 7 * 40)
    assert (recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)) == whole
    metrics_cases.compare_recall(oracles_metrics)
    metrics_cases.compare_map_at_r(oracles_metrics)
    # A gallery larger than a block still goes, one query at a time.
    monkeypatch.setattr(retrieval, "BLOCK", 3)
    assert (recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)) == whole


def test_recall_over_many_images() -> None:
    labels = np.repeat(np.arange(600), 2)
    embeddings = np.stack([labels * 10.0, np.tile([0.0, 1.0], 600)], axis=1)
    assert recall_at_k(embeddings, labels) == 1.0
    assert map_at_r(embeddings, labels) == 1.0
    assert recall_at_k(embeddings, np.arange(1200)) == 0.0
    # Only the last class is torn apart: 2 of 1200 miss.
    embeddings[-1] = [-5.0, 0.0]
    assert recall_at_k(embeddings, labels) == pytest.approx(1198 / 1200)
    assert map_at_r(embeddings, labels) == pytest.approx(1198 / 1200)
    # An image never finds itself, but in a gallery that holds it, it does.
    assert recall_at_k(np.zeros((3, 2)), np.arange(3), 2) == 0.0
    assert recall_at_k(np.eye(3), np.arange(3), 1, np.eye(3), np.arange(3)) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_share(np.zeros((2, 3, 3)), np.zeros((1, 3, 3))), r"^maps \[2, 3, 3\] and "),
        (lambda: pointing_hit(ONES[0], ONES[0]), r"maps \[3, 3\] and regions \[3, 3\] must both"),
        (lambda: energy_share(-ONES, ONES), r"must be >= 0 everywhere; got a NaN or a negative"),
        (lambda: pointing_hit(ONES * np.inf, ONES), "maps must be finite; got a NaN or an infinit"),
        (lambda: iou_at(ONES, ONES * 255, 0.2), r"regions must lie in \[0, 1\].*255 must be divid"),
        (lambda: energy_share(ONES[:0], ONES[:0]), r"maps \[0, 3, 3\] must be \[B H W\] with no e"),
        (lambda: box_from_map("map"), r"maps must be an array of numbers \[B H W\]"),
        (lambda: iou_at(ONES, ONES, 0), r"threshold = 0; it must lie in \(0, 1\]: 0.2 means"),
        (lambda: best_iou(ONES, ONES, []), r"no thresholds; give one or more, each in \(0, 1\]"),
        (lambda: box_mask((0, 0, np.nan, 1), (2, 2)), "must be four numbers: x0, y0, x1, y1"),
        (lambda: box_iou([[0, 0, 1]], [[0, 0, 1]]), r"boxes \[1, 3\] must be \[B 4\]: x0, y0"),
        (lambda: box_iou([[3, 0, 1, 2]], [[0, 0, 1, 1]]), r"box \[3.0, 0.0, 1.0, 2.0\] has its ed"),
        (lambda: localisation_accuracy([BOX], [BOX], 0.0), r"least = 0.0; it must lie in \(0, 1\]"),
        (lambda: deletion_steps(ONES, 10), "steps = 10; give a whole number from 1 to 9"),
        (lambda: deletion_steps(ONES, 2.5), "steps = 2.5; give a whole number"),
        (lambda: removal_masks(ONES, 0.0), r"fraction = 0.0; it must lie in \(0, 1\]: 0.2 means"),
        (lambda: curve_area([[1.0]]), r"scores \[B 1\] are no curve; give the score before and"),
        (lambda: rank_of([[1.0, 2.0]], [2]), "items 2 to 2 of a gallery of 2; give places from 0 "),
        (lambda: rank_of([[1.0, 2.0]], [0.0]), "of type float64 .* give one whole number a query"),
        (lambda: rank_of([[1.0, 2.0]], [0, 1]), r"items \[2\] of type int64 with scores \[1, 2\]"),
        (lambda: rank_drop([0.0], [1.0]), "a rank of 0; ranks begin at 1, as `rank_of` counts"),
        (lambda: leaves_top([1.0], [2.0], 0), "k = 0; give a whole number of at least 1"),
        (lambda: score_drops([1.0], [1.0], [0.0, 0.0]), "full and base scores have shapes"),
        (lambda: average_drop([1.0], [0.0], [2.0]), "none of 1 images .* give other images or ano"),
        (lambda: noisy_linear_imputation(PIXELS[0], MASKS), r"images \[2, 9, 7\] must be "),
        (lambda: noisy_linear_imputation(PIXELS.astype(np.uint8), MASKS), "of type uint8 must be "),
        (lambda: noisy_linear_imputation(PIXELS, MASKS[:1]), r"masks \[1, 9, 7\] of type bool wit"),
        (lambda: noisy_linear_imputation(PIXELS, MASKS * 1.0), "of type float64 .* give booleans"),
        (lambda: noisy_linear_imputation(PIXELS, MASKS | True), "removes the whole picture; leave"),
        (lambda: noisy_linear_imputation(PIXELS, MASKS, noise=-1), "noise = -1; it must be a stan"),
        (lambda: noisy_linear_imputation(PIXELS, MASKS, seed=-1), "seed = -1; give a whole num"),
        (lambda: map_iou(ONES, ONES, 0.0), r"fraction = 0.0; it must lie in \(0, 1"),
        (lambda: bootstrap_interval([1.0], level=95), "level = 95; give a number between 0 and 1"),
        (lambda: bootstrap_interval([1.0], draws=0), "draws = 0; give a whole number of at least "),
        (lambda: recall_at_k(np.zeros((3, 2)), np.zeros(3), 3), "k = 3 with 3 images; k must be 1"),
        (lambda: recall_at_k(TWO, [0, 1], 3, TWO, [0, 1]), "k = 3 with 2 images; k must be 1 to G"),
        (lambda: recalls_at(TWO, [0, 1], []), r"no k; give one or more, as \[1, 5, 10\]"),
        (lambda: recalls_at(TWO, [0, 1], [0.5]), "k = 0.5 with 2 images; k must be"),
        (lambda: recall_at_k(TWO, [0]), r"labels \[1\] with embeddings \[2, 2\]; give one label a"),
        (lambda: map_at_r(TWO, [0, np.nan]), "a label is NaN, which equals nothing"),
        (lambda: map_at_r(TWO, [0, 1]), "none of 2 images has another of its label; .* not ids"),
        (lambda: map_at_r(TWO, [0, 1], TWO), "a gallery needs its labels, .* give both"),
        (lambda: map_at_r(TWO, [0, 1], np.eye(3), [0, 1, 2]), "differ in width; take both from on"),
        (lambda: map_at_r(TWO, [0, 1], TWO, ["0", "1"]), "never match; give both as strings or as"),
        (lambda: equal_area_share(-ONES, ONES, ONES), "not a signed map"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
