"""Places that match: pairs of regions of two pictures, and what each pair gives to the similarity.

Position i of the query (of n) gives v_i to f, position j of the result (of n') v'_j to f'. What no
position holds (a bias, another token) is p = f - sum_i v_i, and p'. With m the mean embedding

    P_ij  =  v_i . v'_j  +  (v_i . (p' - m) / n'  +  v'_j . (p - m) / n) / 2

is what two positions have in common, less what each of them has with the average image; the
average image, like p, lies nowhere in particular, so that every position has its share of it. The
sum over all pairs is what a receipt divides among positions: the similarity less its `shared`, its
`parts` and its `remainder`. A pair of regions gives the sum over its positions, and pairs that
have no two positions in common add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from .._checks import one_of, whole
from ..errors import InputError, short
from ..explain.sides import Side
from ..index.records import Json

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1)."""

REGION, TOGETHER = 0.15, 0.4
"""Shares of its picture that one region, and all of them, take at most."""
BLOCKS = 8
"""Parts that a picture is divided into along a side, at most: regions are joined from them."""
_TURNS = 4
_COMPACT = 0.3
"""How much more a block counts for each that it touches, of what it gives."""
_LEAST = 0.1
"""What a block gives, of what the best of its region does, that it is joined to it."""
_THIRDS = (
    ("upper left", "top", "upper right"),
    ("left", "middle", "right"),
    ("lower left", "bottom", "lower right"),
)


@dataclass(frozen=True, eq=False)
class Place:
    """A region of the query and one of the result, bool `[H W]` and `[H' W']`, and what they give.

    `contribution` is signed, of the similarity. A region may be in several pairs; two that are not
    the same have no position in common.
    """

    query: np.ndarray
    result: np.ndarray
    contribution: float

    def region(self, of: Literal["query", "result"]) -> np.ndarray:
        """Return the positions of one picture, bool `[H W]`."""
        return self.query if one_of("of", of, ("query", "result")) == "query" else self.result

    def box(self, of: Literal["query", "result"]) -> Box:
        """Return what encloses a region, as shares of what the network saw of its picture."""
        region = self.region(of)
        rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
        height, width = region.shape
        return (
            float(columns[0] / width),
            float(rows[0] / height),
            float((columns[-1] + 1) / width),
            float((rows[-1] + 1) / height),
        )

    def where(self, of: Literal["query", "result"]) -> str:
        """Return which part of its picture a region is, in words: "upper left", "middle"."""
        region = self.region(of)
        middles = zip(np.nonzero(region), region.shape, strict=True)
        row, column = (int(3 * (at.mean() + 0.5) / size) for at, size in middles)
        return _THIRDS[row][column]

    def share(self, beyond: float) -> float | None:
        """Return the share of `beyond`, what a receipt has unshared; None where that is none."""
        return self.contribution / beyond if beyond > 0 else None

    def told(self, beyond: float) -> str:
        """Return the share in words, or where there is none the contribution."""
        share = self.share(beyond)
        return f"{self.contribution:+.3f}" if share is None else f"{share:.0%}"

    def words(self, beyond: float) -> str:
        """Say what matches what, and how much of what the two share beyond the average."""
        told, of = self.told(beyond), " of what they share beyond the average" * (beyond > 0)
        places = f"the {self.where('query')} of the query", f"the {self.where('result')}"
        return f"{places[0]} matches {places[1]} of the result: {told}{of}"

    def to_dict(self, beyond: float) -> Json:
        """Return plain lists and numbers; `beyond` is what a receipt has unshared."""
        sides: tuple[Literal["query", "result"], ...] = ("query", "result")
        told: Json = {
            side: {
                "box": list(self.box(side)),
                "cells": np.argwhere(self.region(side)).tolist(),
            }
            for side in sides
        }
        return told | {"contribution": self.contribution, "share": self.share(beyond)}


def covered(
    box: Sequence[float], size: tuple[int, int], extent: Box, grid: Sequence[int]
) -> np.ndarray:
    """Return the share of each position that a box covers, `[H W]`, 0 to 1.

    Parameters
    ----------
    box
        (x0, y0, x1, y1) in pixels of the picture
    size, extent
        Of the picture (width, height), and of it what the network saw
    grid
        H, W

    Raises
    ------
    InputError
        The box has no area, or none of what the network saw.
    """
    ends = np.asarray(box, np.float64)
    if ends.shape != (4,) or not np.isfinite(ends).all() or (ends[2:] <= ends[:2]).any():
        raise InputError(
            f"box = {short(box)}; give x0 y0 x1 y1 in pixels of the query, x0 left of x1 and y0 "
            "above y1"
        )
    sides = []
    for axis, cells in ((0, grid[1]), (1, grid[0])):
        edges = np.linspace(extent[axis], extent[axis + 2], cells + 1)
        inside = np.minimum(edges[1:], ends[axis + 2]) - np.maximum(edges[:-1], ends[axis])
        sides.append(np.maximum(inside, 0) / np.diff(edges))
    weights = np.outer(sides[1], sides[0])
    if not weights.any():
        seen = " x ".join(f"{extent[axis]:.0f} to {extent[axis + 2]:.0f}" for axis in (0, 1))
        raise InputError(
            f"box = {short(box)} holds nothing of what the network saw of the query, {seen} of "
            f"{size[0]} x {size[1]} pixels; give one inside"
        )
    return np.asarray(weights)


def products(
    query: Side, result: Side, mean: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> np.ndarray:
    """Return the sums of P_ij over pairs of sets of positions, `[n m]`.

    The sets are weights from 0 to 1, `[n H W]` of the query and `[m H' W']` of the result.
    """
    vectors, shares, apart = [], [], []
    for side, masks in ((query, ours), (result, theirs)):
        each = side.vectors(np.concatenate([masks, np.ones_like(masks[:1])]))
        vectors.append(each[:-1])
        shares.append(masks.mean((1, 2)))
        apart.append(side.embedding - each[-1] - mean)
    return _summed(vectors, vectors[0] @ vectors[1].T, apart, shares)


def products_of_positions(
    query: Side, result: Side, mean: np.ndarray, vectors: Sequence[np.ndarray], both: np.ndarray
) -> np.ndarray:
    """Return P_ij `[n n']`, of v `[n D]` and v' `[n' D]` and the products of all of them."""
    sides = zip((query, result), vectors, strict=True)
    apart = [side.embedding - each.sum(0) - mean for side, each in sides]
    return _summed(vectors, both, apart, [np.full(len(each), 1 / len(each)) for each in vectors])


def _summed(
    vectors: Sequence[np.ndarray],
    both: np.ndarray,
    apart: Sequence[np.ndarray],
    shares: Sequence[np.ndarray],
) -> np.ndarray:
    ends = vectors[0] @ apart[1], vectors[1] @ apart[0]
    linear = np.outer(ends[0], shares[1]) + np.outer(shares[0], ends[1])
    return np.asarray(both + linear / 2)


def find_places(
    query: Side,
    result: Side,
    mean: np.ndarray,
    n: int = 5,
    within: np.ndarray | None = None,
    matches: np.ndarray | None = None,
) -> list[Place]:
    """Return the pairs of regions that give most, at most n, most first.

    Regions are joined on their grid. One takes at most 15% of its picture and all of a picture at
    most 40%; a picture of fewer than seven positions has none that small. Each pair in turn is the
    best of a new region or one there is with another: two new ones are grown in turns, each to what
    the other matches. A picture of more than 8 x 8 positions is divided into so many blocks.

    Parameters
    ----------
    query, result, mean
        The pair, and what is put apart, `[D]`
    n
        Pairs, at most
    within
        Weights `[H W]` of the query's positions, 0 to 1: only what lies there
    matches
        P_ij of all positions, for pictures that are not divided, where it is known
    """
    boards = [_Board(side.activations.shape[1:]) for side in (query, result)]
    ours, theirs = (board.grid.masks for board in boards)
    if within is not None:
        ours = ours * within
        boards[0].free &= ours.any((1, 2))
    if matches is None:
        matches = products(query, result, mean, ours, theirs)
    elif within is not None:
        matches = within.reshape(-1, 1) * matches
    found = _best_pairs(matches, whole("places", n), *boards)
    places = [
        Place(ours[list(one)].any(0), theirs[list(other)].any(0), gain)
        for one, other, gain in found
    ]
    return sorted(places, key=lambda place: -place.contribution)


Region = tuple[int, ...]
"""Numbers of blocks that are joined."""


class _Grid:
    """A picture's positions, divided into blocks: `masks` `[n H W]`, and which are near which."""

    def __init__(self, shape: tuple[int, int]) -> None:
        rows, columns = (np.arange(size) * min(size, BLOCKS) // size for size in shape)
        count = (rows[-1] + 1) * (columns[-1] + 1)
        numbers = rows[:, None] * (columns[-1] + 1) + columns
        self.masks = (numbers == np.arange(count)[:, None, None]).astype(np.float64)
        at = np.stack(np.divmod(np.arange(count), columns[-1] + 1))
        apart = np.abs(at[:, :, None] - at[:, None])
        self.around = (apart.max(0) <= 1).astype(np.float64)
        self.beside = [np.flatnonzero(row).tolist() for row in apart.sum(0) == 1]
        self.areas = self.masks.sum((1, 2)).tolist()


_grid = lru_cache(maxsize=64)(_Grid)


class _Board:
    """A picture's blocks, and the regions that were made of them."""

    def __init__(self, shape: Sequence[int]) -> None:
        height, width = shape
        self.grid = _grid((height, width))
        self._most, self._left = REGION * height * width, TOGETHER * height * width
        self.free = np.ones(len(self.grid.masks), bool)
        self.regions: dict[Region, np.ndarray] = {}
        """Of each what it matches, by the other picture's blocks."""

    def take(self, region: Region, matched: np.ndarray) -> None:
        """Make blocks a region, which no other will share."""
        if region not in self.regions:
            self.regions[region] = matched
            self.free[list(region)] = False
            self._left -= sum(self.grid.areas[block] for block in region)

    def grown(self, gains: np.ndarray) -> tuple[float, Region]:
        """Join free blocks from the best on, always the best beside them that gives enough.

        Returns what they give, 0 where there is no room, and their numbers.
        """
        left, areas, beside = min(self._most, self._left), self.grid.areas, self.grid.beside
        if left < 1:
            return 0.0, ()
        free = np.where(self.free, gains, -1.0)
        first, values = int(free.argmax()), free.tolist()
        region: dict[int, None] = {}
        total, edge, least = 0.0, {first: values[first]}, max(_LEAST * values[first], 0.0)
        while edge:
            block = max(edge, key=edge.__getitem__)
            del edge[block]
            if values[block] <= least or areas[block] > left:
                break
            region[block] = None
            left -= areas[block]
            total += values[block]
            for other in beside[block]:
                if values[other] > least and other not in region:
                    # What it touches already counts too: rather a patch than a chain.
                    edge[other] = edge.get(other, values[other]) + _COMPACT * values[other]
        return total, tuple(region)


def _best_pairs(
    matches: np.ndarray, n: int, ours: _Board, theirs: _Board
) -> list[tuple[Region, Region, float]]:
    """Return regions of both and what they give, by sums over `matches` `[blocks blocks']`."""
    found: dict[tuple[Region, Region], float] = {}
    known: dict[tuple[Region, Region], float] = {}
    while len(found) < n:
        gains = _grown_in_turns(matches, ours, theirs)
        for one, matched in ours.regions.items():
            gain, other = theirs.grown(matched)
            gains[one, other] = gain
            for other in theirs.regions:
                if (one, other) not in known:
                    known[one, other] = float(matched[list(other)].sum())
        gains |= known
        for other, matched in theirs.regions.items():
            gain, one = ours.grown(matched)
            gains[one, other] = gain
        left = {pair: gain for pair, gain in gains.items() if gain > 0 and pair not in found}
        if not left:
            break
        best = max(left, key=left.__getitem__)
        found[best] = left[best]
        ours.take(best[0], matches[list(best[0])].sum(0))
        theirs.take(best[1], matches[:, list(best[1])].sum(1))
    return [(*pair, gain) for pair, gain in found.items()]


def _grown_in_turns(
    matches: np.ndarray, ours: _Board, theirs: _Board
) -> dict[tuple[Region, Region], float]:
    """Return two new regions, from where neighborhoods match best, and what they give."""
    free = np.where(np.outer(ours.free, theirs.free), matches, 0)
    near = ours.grid.around @ free @ theirs.grid.around
    end = int(near.argmax()) % near.shape[1]
    matched = free @ theirs.grid.around[end]
    best: dict[tuple[Region, Region], float] = {}
    most = 0.0
    for _ in range(_TURNS):
        _, one = ours.grown(matched)
        gain, other = theirs.grown(free[list(one)].sum(0))
        if gain <= most:
            break
        most, best = gain, {(one, other): gain}
        matched = free[:, list(other)].sum(1)
    return best
