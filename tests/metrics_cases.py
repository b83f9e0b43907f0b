"""Inputs of the metrics, and the fast code held beside a module of oracles, or a broken copy."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import repeat
from types import ModuleType
from typing import Any

import numpy as np

from embedcam import metrics

Array = np.ndarray
SHAPES = [(1, 1, 1), (1, 5, 7), (4, 7, 5), (3, 1, 6), (6, 8, 8)]
THRESHOLDS = [0.05, 0.2, 0.5, 0.75, 1.0]


def maps_like(shape: tuple[int, int, int], seed: int, *, signed: float = 0) -> Array:
    """Maps of every sort in turn: smooth numbers, many ties, mostly zeros, all zeros, constant."""
    rng = np.random.default_rng(seed)
    out = np.zeros(shape)
    for number, one in enumerate(out):
        sort = (number + seed) % 5
        if sort == 0:
            one[:] = rng.random(one.shape)
        elif sort == 1:
            one[:] = rng.integers(0, 4, one.shape) / 4
        elif sort == 2:
            one[:] = rng.random(one.shape) * (rng.random(one.shape) < 0.2)
        elif sort == 4:
            one[:] = 0.1
    return out - 0.3 * signed


def regions_like(shape: tuple[int, int, int], seed: int) -> Array:
    """Regions: booleans, and parts of pixels."""
    rng = np.random.default_rng(seed + 100)
    parts = rng.integers(0, 5, shape) / 4
    parts[::2] = rng.random(parts[::2].shape) < 0.4
    return parts


def all_maps() -> list[tuple[Array, Array]]:
    return [(maps_like(s, n), regions_like(s, n)) for s in SHAPES for n in range(5)]


def by_row(loop: Callable[..., object], *given: Any) -> list[object]:
    """A loop of the oracles on each row, and on the numbers among what is given."""
    rows = [repeat(one, len(given[0])) if np.ndim(one) == 0 else one for one in given]
    return [loop(*row) for row in zip(*rows, strict=True)]


def near(got: Array | float, wanted: object) -> None:
    np.testing.assert_allclose(got, np.array(wanted, np.float64), rtol=0, atol=1e-12)


def compare_localisation(o: ModuleType) -> None:
    for maps, inside in all_maps():
        near(metrics.pointing_hit(maps, inside), by_row(o.pointing, maps, inside))
        for at in THRESHOLDS:
            near(metrics.iou_at(maps, inside, at), by_row(o.iou, maps, inside, at))
            near(metrics.box_from_map(maps, at), by_row(o.largest_box, maps, at))
        best = by_row(partial(o.best_iou, thresholds=THRESHOLDS), maps, inside)
        near(np.stack(metrics.best_iou(maps, inside, THRESHOLDS), 1), best)


def some_boxes(seed: int, count: int) -> Array:
    """Boxes on a coarse grid: many touch, coincide, hold one another or have no area."""
    corners = np.random.default_rng(seed).integers(0, 5, (count, 2, 2)) / 2
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def compare_boxes(o: ModuleType) -> None:
    a, b = some_boxes(0, 300), some_boxes(1, 300)
    near(metrics.box_iou(a, b), by_row(o.boxes_iou, a.tolist(), b.tolist()))
    for least in (0.25, 0.5, 1.0):
        wanted = o.found_share(a.tolist(), b.tolist(), least)
        near(metrics.localisation_accuracy(a, b, least), wanted)


def signed_cases() -> list[tuple[Array, Array, Array]]:
    """Signed maps with two regions, empty and full ones among them."""
    cases = []
    for number, (maps, inside) in enumerate(all_maps()):
        other = regions_like(maps.shape, number + 1)
        if number % 4 == 1:
            inside[0] = 0
        if number % 4 == 2:
            inside[-1], other[-1] = 1, 0
        cases.append((maps - 0.3 * (number % 2), inside, other))
    return cases


def compare_auc(o: ModuleType) -> None:
    for maps, inside, other in signed_cases():
        near(metrics.pixel_auc(maps, inside, other), by_row(o.auc, maps, inside, other))
        near(metrics.pixel_auc(maps, inside), by_row(o.auc, maps, inside, 1 - inside))


def compare_ap(o: ModuleType) -> None:
    for maps, inside, _ in signed_cases():
        near(metrics.average_precision(maps, inside), by_row(o.ap, maps, inside))


def compare_hottest(o: ModuleType) -> None:
    for maps, inside, _ in signed_cases():
        wanted = by_row(o.hottest, maps, inside, inside.sum((1, 2)))
        near(metrics.hottest_precision(maps, inside), wanted)
        for part in (0.01, 0.2, 1.0):
            wanted = by_row(o.hottest, maps, inside, part * maps[0].size)
            near(metrics.hottest_precision(maps, inside, part), wanted)


def compare_equal_areas(o: ModuleType) -> None:
    for maps, inside, other in signed_cases()[::2]:
        wanted = by_row(o.equal_areas, maps, inside, other)
        near(metrics.equal_area_share(maps, inside, other), wanted)


def compare_removal(o: ModuleType) -> None:
    for maps, _ in all_maps():
        for steps in {1, min(3, maps[0].size), maps[0].size}:
            order, masks = metrics.deletion_steps(maps, steps)
            assert order.tolist() == by_row(o.order, maps)
            for one, drawn in zip(maps, masks, strict=True):
                wanted = [o.first_pixels(one, Fraction(j, steps)) for j in range(steps + 1)]
                np.testing.assert_array_equal(drawn, wanted)
        for fraction in (0.125, 0.5, 1.0):
            if fraction * maps[0].size >= 0.5:  # a fraction takes at least one pixel
                wanted = by_row(o.first_pixels, maps, Fraction(fraction))
                np.testing.assert_array_equal(metrics.removal_masks(maps, fraction), wanted)


def compare_curves(o: ModuleType) -> None:
    for shape in [(1, 2), (5, 3), (4, 12)]:
        scores = np.random.default_rng(shape[0]).normal(size=shape)
        near(metrics.curve_area(scores), by_row(o.area_under, scores.tolist()))


def compare_ranks(o: ModuleType) -> None:
    for seed, (batch, count) in enumerate([(1, 1), (1, 9), (30, 6)]):
        rng = np.random.default_rng(seed)
        scores, item = rng.integers(-2, 2, (batch, count)), rng.integers(0, count, batch)
        near(metrics.rank_of(scores, item), by_row(o.place, scores.tolist(), item))


def compare_scores(o: ModuleType) -> None:
    for count in (1, 60):
        # Of either sign, whole, masked and of the base, equal ones among them.
        scores = np.random.default_rng(4).integers(-3, 4, (3, count)) / 2
        wanted = by_row(o.drop, *scores)
        drops, counted = metrics.score_drops(*scores)
        assert counted.tolist() == [one is not None for one in wanted]
        near(drops, [one or 0.0 for one in wanted])
    y, masked, base = (one.tolist() for one in scores)
    near(metrics.average_drop(y, masked, base), o.mean_drop(y, masked, base))
    near(metrics.average_increase(y, masked), o.increase(y, masked))
    near(metrics.paired_difference(y, masked).win_rate, o.win_rate(y, masked))


def compare_imputation(o: ModuleType) -> None:
    for seed, (batch, channels, h, w) in enumerate([(1, 1, 1, 5), (3, 2, 5, 4), (2, 3, 6, 7)]):
        rng = np.random.default_rng(seed)
        images, masks = rng.normal(size=(batch, channels, h, w)), rng.random((batch, h, w)) < 0.6
        masks[0] = masks[-1]
        masks[:, 0, 0] = False
        filled = metrics.noisy_linear_imputation(images, masks, noise=0)
        np.testing.assert_allclose(filled, by_row(o.impute, images, masks), atol=1e-10)


def some_items(seed: int, count: int, kinds: int = 4) -> tuple[Array, list[str]]:
    """Embeddings on a grid, so that distances are exact and many tie; labels are strings."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, 2, (count, 3)), [f"kind{n}" for n in rng.integers(0, kinds, count)]


def compare_recall(o: ModuleType) -> None:
    for seed, count in enumerate([2, 7, 30]):
        rows, labels = some_items(seed, count)
        ks = sorted({1, min(2, count - 1), count - 1})
        got = metrics.recalls_at(rows, labels, ks)
        near([got[k] for k in ks], [o.recall(rows, labels, k) for k in ks])
        near(metrics.recall_at_k(rows, labels, ks[-1]), got[ks[-1]])
        queries, asked = some_items(seed + 50, 9, kinds=6)
        got = metrics.recalls_at(queries, asked, [1, count], rows, labels)
        near([got[k] for k in (1, count)], [o.recall(queries, asked, k, rows, labels) for k in got])


def compare_map_at_r(o: ModuleType) -> None:
    for seed, count in enumerate([9, 30, 50]):
        rows, labels = some_items(seed, count)
        near(metrics.map_at_r(rows, labels), o.map_r(rows, labels))
        queries, asked = some_items(seed + 50, 9, kinds=6)
        near(metrics.map_at_r(queries, asked, rows, labels), o.map_r(queries, asked, rows, labels))


def pairs_of_maps() -> list[tuple[Array, Array]]:
    many = [[maps_like(s, n, signed=sign) for n in range(6)] for s in SHAPES for sign in (0, 1)]
    return [(row[n], row[n + m]) for row in many for n in range(5) for m in range(2)]


def compare_agreement(o: ModuleType) -> None:
    for pair in pairs_of_maps():
        flat = [one.reshape(len(one), -1) for one in pair]
        rows = [one.tolist() for one in flat]
        near(metrics.cosines(*flat), by_row(o.cosine, *rows))
        near(metrics.correlations(*pair), by_row(o.correlation, *rows))
        near(metrics.rank_correlations(*pair), by_row(o.rank_correlation, *rows))
        for part in (0.01, 0.2, 0.5, 1.0):
            near(metrics.map_iou(*pair, part), by_row(o.top_iou, *pair, part))


def compare_interval(o: ModuleType) -> None:
    for count, level, seed in [(1, 0.95, 0), (12, 0.95, 1), (30, 0.5, 2)]:
        values = np.random.default_rng(seed).normal(size=count)
        got = metrics.bootstrap_interval(values, level=level, draws=200, seed=seed)
        near(np.array(got), o.interval_of_mean(values.tolist(), level, 200, seed))


COMPARISONS = [value for name, value in sorted(globals().items()) if name.startswith("compare_")]
