"""Slow, literal forms of the metrics: loops over pixels, images and pairs, without embedcam.

`metrics_cases.py` holds them beside the fast code, `test_oracles_metrics.py` breaks each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product

import numpy as np

Array = np.ndarray
Box = tuple[float, float, float, float]
Pixels = set[tuple[int, int]]


def pointing(image: Array, mask: Array) -> float:
    """The region's mean over the pixels of the largest value."""
    best = max(float(v) for v in image.ravel())
    hits = count = 0.0
    for place in np.ndindex(image.shape):
        if float(image[place]) == best:
            hits += float(mask[place])
            count += 1
    return hits / count


def marked(image: Array, threshold: float) -> Pixels:
    """Pixels >= threshold times the largest."""
    limit = threshold * max(float(v) for v in image.ravel())
    return {place for place in np.ndindex(image.shape) if float(image[place]) >= limit}


def iou(image: Array, mask: Array, threshold: float) -> float:
    """Area of both over area of either, a pixel partly covered counting by its part."""
    pixels = marked(image, threshold)
    both = either = 0.0
    for place in np.ndindex(image.shape):
        m, r = float(place in pixels), float(mask[place])
        both += m * r
        either += m + r - m * r
    return both / either


def best_iou(image: Array, mask: Array, thresholds: Sequence[float]) -> tuple[float, float]:
    """The largest, and the first threshold that reaches it."""
    best, at = -1.0, 0.0
    for threshold in thresholds:
        score = iou(image, mask, threshold)
        if score > best + 1e-12:
            best, at = score, threshold
    return best, at


def largest_box(image: Array, threshold: float) -> Box:
    """Flood fill from each pixel in reading order; the first of the largest parts, boxed."""
    left = marked(image, threshold)
    largest: Pixels = set()
    for place in np.ndindex(image.shape):
        part, ahead = set[tuple[int, int]](), [place]
        while ahead:
            r, c = ahead.pop()
            if (r, c) in left:
                left.remove((r, c))
                part.add((r, c))
                ahead += [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]
        if len(part) > len(largest):
            largest = part
    rows, columns = [r for r, _ in largest], [c for _, c in largest]
    return (min(columns), min(rows), max(columns) + 1, max(rows) + 1)


def boxes_iou(a: Box, b: Box) -> float:
    """Area of both over area of either; 0 where neither has any."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = width * height if width > 0 and height > 0 else 0.0
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


def found_share(boxes: Sequence[Box], truth: Sequence[Box], least: float) -> float:
    """Share of pairs with that IoU or more."""
    return sum(boxes_iou(a, b) >= least for a, b in zip(boxes, truth, strict=True)) / len(boxes)


def auc(image: Array, mask: Array, other: Array) -> float:
    """Every pair of a pixel inside and one outside: how often the first is larger, ties a half."""
    won = pairs = 0.0
    for i, j in np.ndindex(image.size, image.size):
        weight = float(mask.flat[i]) * float(other.flat[j])
        pairs += weight
        if float(image.flat[i]) > float(image.flat[j]):
            won += weight
        elif float(image.flat[i]) == float(image.flat[j]):
            won += weight / 2
    return won / pairs if pairs else 0.5


def ap(image: Array, mask: Array) -> float:
    """Precision of all pixels >= each pixel's value, averaged over the region's pixels."""
    total = recalled = 0.0
    for i in range(image.size):
        inside = reached = 0.0
        for j in range(image.size):
            if float(image.flat[j]) >= float(image.flat[i]):
                inside += float(mask.flat[j])
                reached += 1
        total += float(mask.flat[i]) * inside / reached
        recalled += float(mask.flat[i])
    return total / recalled if recalled else 0.0


def hottest(image: Array, mask: Array, area: float) -> float:
    """Larger values are taken whole; those of the last value share what is left of the area."""
    left, inside = area, 0.0
    for value in sorted({float(v) for v in image.flat}, reverse=True):
        same = [j for j in range(image.size) if float(image.flat[j]) == value]
        part = min(1.0, left / len(same))
        for j in same:
            inside += part * float(mask.flat[j])
        left = max(0.0, left - len(same))
    return inside / area if area else 0.0


def equal_areas(image: Array, mask: Array, other: Array) -> float:
    """Mean value in one region over the sum of the means in both."""
    means = []
    for region in (mask, other):
        total = area = 0.0
        for j in range(image.size):
            total += float(image.flat[j]) * float(region.flat[j])
            area += float(region.flat[j])
        means.append(total / area if area else None)
    if None in means or sum(means) == 0:
        return 0.5
    return means[0] / sum(means)


def order(image: Array) -> list[int]:
    """Flat positions, the largest value first, then the one that is read first."""
    values = [float(v) for v in image.ravel()]
    return sorted(range(len(values)), key=lambda p: (-values[p], p))


def first_pixels(image: Array, share: Fraction) -> Array:
    """Booleans [H W]: the first share of the order, to the nearest whole number, halves up."""
    count = math.floor(share * image.size + Fraction(1, 2))
    out = np.zeros(image.shape, bool)
    for position in order(image)[:count]:
        out.flat[position] = True
    return out


def area_under(scores: Sequence[float]) -> float:
    """Trapezoids of width 1 / S."""
    steps = len(scores) - 1
    return sum((left + right) / 2 / steps for left, right in pairwise(scores))


def place(scores: Sequence[float], item: int) -> float:
    """Mean place, from 1, of the items that score as this one in a sorted gallery."""
    ranked = sorted(scores, reverse=True)
    places = [i + 1 for i, score in enumerate(ranked) if score == scores[item]]
    return sum(places) / len(places)


def drop(y: float, y_masked: float, y_base: float) -> float | None:
    """max(0, y - y_masked) / (y - y_base), at most 1; None where y <= y_base."""
    if y <= y_base:
        return None
    return min(max(0.0, y - y_masked) / (y - y_base), 1.0)


def mean_drop(y: Sequence[float], y_masked: Sequence[float], y_base: Sequence[float]) -> float:
    """Mean over those that have one."""
    drops = [drop(*row) for row in zip(y, y_masked, y_base, strict=True)]
    counted = [d for d in drops if d is not None]
    return sum(counted) / len(counted)


def increase(y: Sequence[float], y_masked: Sequence[float]) -> float:
    """Share that scores higher when masked."""
    return sum(after > before for before, after in zip(y, y_masked, strict=True)) / len(y)


def impute(image: Array, mask: Array) -> Array:
    """One dense equation a removed pixel: its value less its neighbours' weighted mean is zero."""
    C, H, W = image.shape
    removed = [(i, j) for i in range(H) for j in range(W) if mask[i, j]]
    out = image.astype(np.float64)
    for c in range(C):
        matrix, right = np.zeros((len(removed), len(removed))), np.zeros(len(removed))
        for n, (i, j) in enumerate(removed):
            around = {}
            for di, dj in product((-1, 0, 1), repeat=2):
                if (di, dj) != (0, 0) and 0 <= i + di < H and 0 <= j + dj < W:
                    around[i + di, j + dj] = 1 / 6 if di == 0 or dj == 0 else 1 / 12
            total = sum(around.values())
            matrix[n, n] = 1.0
            for where, weight in around.items():
                if mask[where]:
                    matrix[n, removed.index(where)] -= weight / total
                else:
                    right[n] += weight / total * float(image[(c, *where)])
        if removed:
            for (i, j), value in zip(removed, np.linalg.solve(matrix, right), strict=True):
                out[c, i, j] = value
    return out


def found_by(query: Array, gallery: Array, without: int | None) -> list[int]:
    """The gallery in order of squared distance, then of position, one of it left out."""
    ranked = []
    for i, row in enumerate(gallery):
        pairs = zip(query.tolist(), row.tolist(), strict=True)
        total = sum((x - y) * (x - y) for x, y in pairs)
        ranked.append((total, i))
    return [i for _, i in sorted(ranked) if i != without]


def labels_found(queries, labels, gallery, gallery_labels) -> list[list[object]]:
    """The labels of what each query finds, the nearest first."""
    if gallery is None or gallery_labels is None:
        return [[labels[i] for i in found_by(v, queries, q)] for q, v in enumerate(queries)]
    return [[gallery_labels[i] for i in found_by(v, gallery, None)] for v in queries]


def recall(queries, labels, k, gallery=None, gallery_labels=None) -> float:
    """Share of queries with one of their label among the k nearest."""
    hits = 0
    for q, near in enumerate(labels_found(queries, labels, gallery, gallery_labels)):
        hits += labels[q] in near[:k]
    return hits / len(queries)


def precision_at_r(hits: Sequence[bool]) -> float | None:
    """1/R sum_{i=1..R} P(i) [the i-th is right]; None for R = 0."""
    r = sum(hits)
    total = sum(sum(hits[:i]) / i for i in range(1, r + 1) if hits[i - 1])
    return total / r if r else None


def map_r(queries, labels, gallery=None, gallery_labels=None) -> float:
    """Mean over the queries that have others of their label."""
    found = enumerate(labels_found(queries, labels, gallery, gallery_labels))
    each = [precision_at_r([label == labels[q] for label in near]) for q, near in found]
    scores = [score for score in each if score is not None]
    return sum(scores) / len(scores)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """a . b / |a| |b|; 0 for a zero vector."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm_a, norm_b = (sum(x * x for x in one) for one in (a, b))
    return dot / math.sqrt(norm_a * norm_b) if norm_a > 0 and norm_b > 0 else 0.0


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson; 0 where either is constant."""
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    return cosine([x - mean_a for x in a], [y - mean_b for y in b])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson of ranks, each counted pixel by pixel: those below, and half of its equals."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(u < v for u in values) + (sum(u == v for u in values) + 1) / 2 for v in values]

    return correlation(ranks(a), ranks(b))


def top_iou(a: Array, b: Array, fraction: float) -> float:
    """IoU of the first pixels of the order, those at the map's smallest value left out."""
    tops = []
    for image in (a, b):
        count = max(1, math.floor(fraction * image.size + 0.5))
        values = [float(v) for v in image.ravel()]
        tops.append({p for p in order(image)[:count] if values[p] > min(values)})
    either = tops[0] | tops[1]
    return len(tops[0] & tops[1]) / len(either) if either else 0.0


def interval_of_mean(values, level, draws, seed) -> tuple[float, float]:
    """Means of resamples, sorted, read off between the two nearest."""
    n = len(values)
    picks = np.random.default_rng(seed).integers(0, n, (draws, n))
    means = sorted(sum(values[i] for i in row) / n for row in picks.tolist())
    ends = []
    for q in ((1 - level) / 2, (1 + level) / 2):
        at = q * (draws - 1)
        low = min(math.floor(at), draws - 1)
        high = min(low + 1, draws - 1)
        ends.append(means[low] + (at - low) * (means[high] - means[low]))
    return ends[0], ends[1]


def win_rate(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of pairs won, one half for an equal pair."""
    pairs = zip(a, b, strict=True)
    return sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(a)
