"""Places that match once more, one pair of positions at a time."""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def pair_of_positions(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    f: Array,
    g: Array,
    mean: Array,
    i: int,
    j: int,
) -> float:
    """v_i . v'_j + (v_i . (p' - m) / n' + v'_j . (p - m) / n) / 2, p what no position gives."""
    n, m = len(ours), len(theirs)
    total = 0.0
    for d in range(len(mean)):
        p = f[d] - sum(one[d] for one in ours)
        q = g[d] - sum(one[d] for one in theirs)
        v, w = ours[i][d], theirs[j][d]
        total += v * w + (v * (q - mean[d]) / m + w * (p - mean[d]) / n) / 2
    return float(total)


def is_connected(region: Array) -> bool:
    """Whether every position is reached from the first, from neighbor to neighbor."""
    left = {(int(row), int(column)) for row, column in np.argwhere(region)}
    waiting = [left.pop()]
    while waiting:
        row, column = waiting.pop()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if near in left:
                left.remove(near)
                waiting.append(near)
    return not left
