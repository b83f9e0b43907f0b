"""Inputs of the metrics, and the fast code held beside a module of oracles.

A comparison takes the oracles as an argument, so that a broken copy can be handed to it.
"""

from collections.abc import Callable
from fractions import Fraction
from types import ModuleType

import numpy as np

from embedcam import metrics

Array = np.ndarray
SHAPES = [(1, 1, 1), (1, 5, 7), (4, 7, 5), (3, 1, 6), (6, 8, 8)]
THRESHOLDS = [0.05, 0.2, 0.5, 0.75, 1.0]


def maps_like(shape: tuple[int, int, int], seed: int, *, signed: bool = False) -> Array:
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


def by_row(loop: Callable[..., object], *arrays: Array) -> list[object]:
    """A loop of the oracles on each row."""
    return [loop(*row) for row in zip(*arrays, strict=True)]


def near(got: Array | float, wanted: object) -> None:
    np.testing.assert_allclose(got, np.array(wanted, np.float64), rtol=0, atol=1e-12)


def compare_pointing(o: ModuleType) -> None:
    for maps, inside in all_maps():
        near(metrics.pointing_hit(maps, inside), by_row(o.pointing, maps, inside))


def compare_iou(o: ModuleType) -> None:
    for maps, inside in all_maps():
        pairs = list(zip(maps, inside, strict=True))
        for threshold in THRESHOLDS:
            near(metrics.iou_at(maps, inside, threshold), [o.iou(*p, threshold) for p in pairs])


def compare_best_iou(o: ModuleType) -> None:
    for maps, inside in all_maps():
        wanted = [o.best_iou(*pair, THRESHOLDS) for pair in zip(maps, inside, strict=True)]
        scores, thresholds = metrics.best_iou(maps, inside, THRESHOLDS)
        near(scores, [score for score, _ in wanted])
        near(thresholds, [threshold for _, threshold in wanted])


def compare_boxes(o: ModuleType) -> None:
    for maps, _ in all_maps():
        for threshold in THRESHOLDS:
            wanted = [o.largest_box(one, threshold) for one in maps]
            near(metrics.box_from_map(maps, threshold), wanted)


def some_boxes(seed: int, count: int) -> Array:
    """Boxes on a coarse grid: many touch, coincide, hold one another or have no area."""
    corners = np.random.default_rng(seed).integers(0, 5, (count, 2, 2)) / 2
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def compare_box_iou(o: ModuleType) -> None:
    a, b = some_boxes(0, 300), some_boxes(1, 300)
    near(metrics.box_iou(a, b), [o.boxes_iou(*p) for p in zip(a.tolist(), b.tolist(), strict=True)])


def compare_found(o: ModuleType) -> None:
    a, b = some_boxes(2, 200), some_boxes(3, 200)
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
        pairs = list(zip(maps, inside, strict=True))
        near(metrics.hottest_precision(maps, inside), [o.hottest(*p, p[1].sum()) for p in pairs])
        for fraction in (0.01, 0.2, 1.0):
            wanted = [o.hottest(*p, fraction * maps[0].size) for p in pairs]
            near(metrics.hottest_precision(maps, inside, fraction), wanted)


def compare_equal_areas(o: ModuleType) -> None:
    for maps, inside, other in signed_cases()[::2]:
        wanted = by_row(o.equal_areas, maps, inside, other)
        near(metrics.equal_area_share(maps, inside, other), wanted)


def compare_deletion(o: ModuleType) -> None:
    for maps, _ in all_maps():
        for steps in {1, min(3, maps[0].size), maps[0].size}:
            order, masks = metrics.deletion_steps(maps, steps)
            assert order.tolist() == [o.order(one) for one in maps]
            for one, drawn in zip(maps, masks, strict=True):
                wanted = [o.first_pixels(one, Fraction(j, steps)) for j in range(steps + 1)]
                np.testing.assert_array_equal(drawn, wanted)


def compare_removal(o: ModuleType) -> None:
    for maps, _ in all_maps():
        if maps[0].size > 1:
            for fraction in (0.125, 0.5, 1.0):
                wanted = [o.first_pixels(one, Fraction(fraction)) for one in maps]
                np.testing.assert_array_equal(metrics.removal_masks(maps, fraction), wanted)


def compare_curves(o: ModuleType) -> None:
    for shape in [(1, 2), (5, 3), (4, 12)]:
        scores = np.random.default_rng(shape[0]).normal(size=shape)
        near(metrics.curve_area(scores), [o.area_under(row) for row in scores.tolist()])


def compare_ranks(o: ModuleType) -> None:
    for seed, (batch, count) in enumerate([(1, 1), (1, 9), (30, 6)]):
        rng = np.random.default_rng(seed)
        scores, item = rng.integers(-2, 2, (batch, count)), rng.integers(0, count, batch)
        wanted = [o.place(*pair) for pair in zip(scores.tolist(), item.tolist(), strict=True)]
        near(metrics.rank_of(scores, item), wanted)


def some_scores(seed: int, count: int = 60) -> tuple[Array, Array, Array]:
    """Scores of either sign, whole, masked and of the base, equal ones among them."""
    return tuple(np.random.default_rng(seed).integers(-3, 4, (3, count)) / 2)  # type: ignore[return-value]


def compare_drops(o: ModuleType) -> None:
    for count in (1, 60):
        y, masked, base = some_scores(4, count)
        wanted = [o.drop(*row) for row in zip(y, masked, base, strict=True)]
        drops, counted = metrics.score_drops(y, masked, base)
        assert counted.tolist() == [one is not None for one in wanted]
        near(drops, [one or 0.0 for one in wanted])


def compare_average_drop(o: ModuleType) -> None:
    scores = some_scores(5)
    near(metrics.average_drop(*scores), o.mean_drop(*(s.tolist() for s in scores)))


def compare_increase(o: ModuleType) -> None:
    y, masked, _ = some_scores(6)
    near(metrics.average_increase(y, masked), o.increase(y.tolist(), masked.tolist()))


def compare_imputation(o: ModuleType) -> None:
    for seed, (batch, channels, h, w) in enumerate([(1, 1, 1, 5), (3, 2, 5, 4), (2, 3, 6, 7)]):
        rng = np.random.default_rng(seed)
        images, masks = rng.normal(size=(batch, channels, h, w)), rng.random((batch, h, w)) < 0.6
        masks[0] = masks[-1]
        masks[:, 0, 0] = False
        wanted = [o.impute(*pair) for pair in zip(images, masks, strict=True)]
        np.testing.assert_allclose(
            metrics.noisy_linear_imputation(images, masks, noise=0), wanted, atol=1e-10
        )


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
    return [
        (maps_like(s, n, signed=n % 2 == 0), maps_like(s, n + m, signed=n % 2 == 0))
        for s in SHAPES
        for n in range(5)
        for m in range(2)
    ]


def compare_cosines(o: ModuleType) -> None:
    for pair in pairs_of_maps():
        flat = [m.reshape(len(m), -1) for m in pair]
        near(metrics.cosines(*flat), by_row(o.cosine, *(f.tolist() for f in flat)))


def compare_correlations(o: ModuleType) -> None:
    for a, b in pairs_of_maps():
        flat = [m.reshape(len(m), -1).tolist() for m in (a, b)]
        near(metrics.correlations(a, b), by_row(o.correlation, *flat))


def compare_rank_correlations(o: ModuleType) -> None:
    for a, b in pairs_of_maps():
        flat = [m.reshape(len(m), -1).tolist() for m in (a, b)]
        near(metrics.rank_correlations(a, b), by_row(o.rank_correlation, *flat))


def compare_map_iou(o: ModuleType) -> None:
    for a, b in pairs_of_maps():
        for fraction in (0.01, 0.2, 0.5, 1.0):
            wanted = [o.top_iou(*pair, fraction) for pair in zip(a, b, strict=True)]
            near(metrics.map_iou(a, b, fraction), wanted)


def compare_interval(o: ModuleType) -> None:
    for count, level, seed in [(1, 0.95, 0), (12, 0.95, 1), (30, 0.5, 2)]:
        values = np.random.default_rng(seed).normal(size=count)
        wanted = o.interval_of_mean(values.tolist(), level, 200, seed)
        got = metrics.bootstrap_interval(values, level=level, draws=200, seed=seed)
        near(np.array(got), wanted)


def compare_win_rate(o: ModuleType) -> None:
    y, other, _ = some_scores(8)
    near(metrics.paired_difference(y, other).win_rate, o.win_rate(y.tolist(), other.tolist()))


COMPARISONS = [value for name, value in sorted(globals().items()) if name.startswith("compare_")]
