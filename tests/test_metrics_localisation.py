"""Localisation metrics by their laws and closed forms; the loops are in test_oracles_metrics.py."""

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedcam.errors import InputError
from embedcam.metrics import (
    best_iou,
    box_from_map,
    box_iou,
    box_mask,
    energy_share,
    iou_at,
    localisation_accuracy,
    pointing_hit,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
BOX = (1.0, 0.0, 4.0, 3.0)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Maps with ties and zeros, and regions of parts of pixels."""
    shape = draw(SHAPES)
    maps = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.5, 2.0, 3.25])))
    masks = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 1.0])))
    return maps, masks


@settings(max_examples=40)
@given(pairs())
def test_the_energy_share_is_the_loop(pair) -> None:
    maps, masks = pair
    got = energy_share(maps, masks)
    wanted = [oracles.energy_in_mask(m, i) for m, i in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_allclose(got + energy_share(maps, 1 - masks), 1, atol=1e-12)
    np.testing.assert_allclose(energy_share(maps * 4, masks), got, atol=1e-12)


@pytest.mark.parametrize(
    "score",
    [
        energy_share,
        pointing_hit,
        lambda m, i: iou_at(m, i, 0.2),
        lambda m, i: best_iou(m, i)[0],
    ],
)
def test_the_scores_of_a_box(score) -> None:
    """The box itself scores 1; nothing and everything score the region's share of the area."""
    inside = np.stack([box_mask(BOX, (6, 5))] * 2)
    assert score(inside, inside).tolist() == [1.0, 1.0]
    assert score(inside * 7, inside.astype(bool)).tolist() == [1.0, 1.0]
    for level in (0.0, 0.1, 5e-324, 1e308):
        np.testing.assert_allclose(score(np.full((2, 6, 5), level), inside), 9 / 30, rtol=1e-15)
    assert score(np.ones((1, 1, 1)), np.ones((1, 1, 1))).tolist() == [1.0]
    assert score(np.ones((1, 2, 2)), np.zeros((1, 2, 2))).tolist() == [0.0]


@settings(max_examples=40)
@given(pairs(), st.sampled_from([1e-320, 1e-30, 3.0, 1e307]), st.sampled_from([0.05, 0.2, 1.0]))
def test_scale_changes_nothing(pair, scale, threshold) -> None:
    # Whole numbers of the scale, as a subnormal number has few digits of its own.
    maps, inside = np.round(np.float64(pair[0]) * 4), pair[1]
    scaled = maps * scale
    np.testing.assert_allclose(energy_share(scaled, inside), energy_share(maps, inside), rtol=1e-12)
    np.testing.assert_array_equal(pointing_hit(scaled, inside), pointing_hit(maps, inside))
    np.testing.assert_array_equal(box_from_map(scaled * 1.0), box_from_map(maps))
    np.testing.assert_array_equal(
        iou_at(maps * 2, inside, threshold), iou_at(maps, inside, threshold)
    )


@settings(max_examples=40)
@given(pairs(), st.sampled_from([0.05, 0.3, 1.0]))
def test_ranges_and_what_bounds_what(pair, threshold) -> None:
    maps, inside = pair
    at = iou_at(maps, inside, threshold)
    best, where = best_iou(maps, inside, [0.5, threshold])
    assert ((at >= 0) & (at <= 1)).all()
    assert (best >= at).all()
    assert set(where.tolist()) <= {0.5, threshold}
    hit = pointing_hit(maps, inside)
    assert ((hit >= 0) & (hit <= 1)).all()
    # An increasing change moves no maximum.
    np.testing.assert_array_equal(pointing_hit(np.sqrt(maps), inside), hit)
    # With booleans, intersection over union asks both sides the same.
    if maps.any((1, 2)).all() and (inside == 1).any((1, 2)).all():
        a, b = maps > 0, inside == 1
        np.testing.assert_array_equal(iou_at(a, b, 1.0), iou_at(b, a, 1.0))


def test_equally_large_pixels_share_the_pointing_game() -> None:
    image = np.array([[[3.0, 3.0, 3.0, 1.0]]])
    assert pointing_hit(image, [[[1, 0, 0, 1]]]).tolist() == [pytest.approx(1 / 3)]
    assert pointing_hit(image, [[[0.5, 0, 0, 1]]]).tolist() == [pytest.approx(1 / 6)]


def test_the_threshold_is_part_of_what_it_marks() -> None:
    image, inside = np.array([[[10.0, 5.0, 2.0, 1.0]]]), np.array([[[1, 1, 0, 0]]])
    assert iou_at(image, inside, 0.5).tolist() == [1.0]
    assert iou_at(image, inside, 0.51).tolist() == [0.5]
    assert iou_at(image, inside, 0.2).tolist() == [pytest.approx(2 / 3)]
    score, threshold = best_iou(image, inside)
    assert (score.tolist(), threshold.tolist()) == ([1.0], [0.25])


@settings(max_examples=40)
@given(st.tuples(*[st.floats(-3, 9, width=32)] * 4), st.integers(1, 6), st.integers(1, 6))
def test_a_box_is_the_covered_part_of_each_pixel(box, height, width) -> None:
    got = box_mask(box, (height, width))
    np.testing.assert_allclose(got, oracles.box_mask(box, height, width), atol=1e-12)


def test_a_box_of_whole_pixels_covers_them_and_no_other() -> None:
    got = box_mask((1, 0, 3, 2), (3, 4))
    np.testing.assert_array_equal(got, [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert box_mask((0.25, 0, 3, 2.5), (9, 9)).sum() == pytest.approx(2.75 * 2.5)


def test_the_box_of_a_box_is_that_box() -> None:
    boxes = np.array([BOX, (0, 0, 5, 6), (4, 5, 5, 6), (0, 2, 1, 3)])
    maps = np.stack([box_mask(tuple(box), (6, 5)) for box in boxes])
    np.testing.assert_array_equal(box_from_map(maps), boxes)
    assert localisation_accuracy(box_from_map(maps), boxes, 1.0) == 1.0


def test_the_box_goes_around_the_largest_part_alone() -> None:
    image = np.array([[9, 0, 0, 4, 0], [0, 0, 0, 0, 4], [1, 0, 0, 4, 0]], float)
    # Corners connect: three cells on the right outweigh the stronger single one on the left.
    assert box_from_map(image[None]).tolist() == [[3, 0, 5, 3]]
    # Strictly more than 4/9 leaves the left one alone.
    assert box_from_map(image[None], 0.5).tolist() == [[0, 0, 1, 1]]
    # Two parts of one size: the first in reading order.
    assert box_from_map([[[1, 0, 1], [1, 0, 1]]]).tolist() == [[0, 0, 1, 2]]


def test_a_map_without_energy_gives_the_whole_picture() -> None:
    assert box_from_map(np.zeros((2, 3, 4))).tolist() == [[0, 0, 4, 3]] * 2


@settings(max_examples=60)
@given(hnp.arrays(np.float64, (2, 3, 2, 2), elements=st.integers(-4, 4)), st.floats(1e-3, 1e3))
def test_box_iou_is_symmetric_and_knows_no_unit(corners, scale) -> None:
    a, b = np.concatenate([corners.min(2), corners.max(2)], axis=2)
    got = box_iou(a, b)
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_array_equal(box_iou(b, a), got)
    np.testing.assert_allclose(box_iou(a * scale, b * scale), got, atol=1e-9)
    np.testing.assert_allclose(box_iou(a + 3, b + 3), got, atol=1e-12)
    area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    np.testing.assert_array_equal(box_iou(a, a), area > 0)


def test_box_iou_in_closed_form() -> None:
    assert box_iou([[0, 0, 2, 2]], [[1, 1, 3, 3]]).tolist() == [pytest.approx(1 / 7)]
    assert box_iou([[0, 0, 1, 1]], [[1, 0, 2, 1]]).tolist() == [0.0]
    assert box_iou([[0, 0, 1, 1]], [[2, 2, 3, 3]]).tolist() == [0.0]
    assert box_iou([[0, 0, 1e300, 1e300]], [[0, 0, 1e300, 5e299]]).tolist() == [0.5]
    # One half is enough.
    assert localisation_accuracy([[0, 0, 2, 1], [0, 0, 3, 1]], [[0, 0, 1, 1]] * 2) == 0.5


ONES = np.ones((1, 3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_share(np.zeros((2, 3, 3)), np.zeros((1, 3, 3))), r"^maps \[2, 3, 3\] and "),
        (lambda: pointing_hit(ONES[0], ONES[0]), r"maps \[3, 3\] and regions \[3, 3\] must both"),
        (lambda: energy_share(-ONES, ONES), r"must be >= 0 everywhere; got a NaN or a negative"),
        (lambda: energy_share(ONES * np.nan, ONES), r"got a NaN or a negative value: give it as R"),
        (lambda: pointing_hit(ONES * np.inf, ONES), "maps must be finite; got a NaN or an infinit"),
        (lambda: iou_at(ONES, ONES * 255, 0.2), r"regions must lie in \[0, 1\].*255 must be divid"),
        (lambda: iou_at(ONES, ONES * np.nan, 0.2), "regions must be finite"),
        (lambda: energy_share(ONES[:0], ONES[:0]), r"maps \[0, 3, 3\] must be \[B H W\] with no e"),
        (lambda: box_from_map(ONES[0]), r"maps \[3, 3\] must be \[B H W\].*in a batch of one"),
        (lambda: box_from_map("map"), r"maps must be an array of numbers \[B H W\]"),
        (lambda: box_iou("ab", "cd"), r"boxes must be an array of numbers \[B 4\]"),
        (lambda: iou_at(ONES, ONES, 0), r"threshold = 0; it must lie in \(0, 1\]: 0.2 means"),
        (lambda: box_from_map(ONES, 1.5), r"threshold = 1.5; it must lie in \(0, 1\]"),
        (lambda: box_from_map(ONES, np.nan), r"threshold = nan; it must lie in \(0, 1\]"),
        (lambda: best_iou(ONES, ONES, []), r"no thresholds; give one or more, each in \(0, 1\]"),
        (lambda: box_mask((0, 0, np.nan, 1), (2, 2)), "must be four numbers: x0, y0, x1, y1"),
        (lambda: box_mask((0, 0, 1), (2, 2)), "must be four numbers: x0, y0, x1, y1"),  # type: ignore[arg-type]
        (lambda: box_mask(BOX, (0, 2)), "height = 0; give a whole number of at least 1"),
        (lambda: box_iou([[0, 0, 1]], [[0, 0, 1]]), r"boxes \[1, 3\] must be \[B 4\]: x0, y0"),
        (lambda: box_iou([[3, 0, 1, 2]], [[0, 0, 1, 1]]), r"box \[3.0, 0.0, 1.0, 2.0\] has its ed"),
        (lambda: box_iou([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]]), r"boxes have shapes \[2, 4\] and "),
        (lambda: localisation_accuracy([BOX], [BOX], 0.0), r"least = 0.0; it must lie in \(0, 1\]"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
