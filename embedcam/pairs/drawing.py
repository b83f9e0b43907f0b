"""Receipts as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..render import Mark, Tile, receipt_picture

if TYPE_CHECKING:
    from PIL import Image

    from .receipt import Comparison, Receipt, Shown
    from .sides import Evidence

SIMILARITY, NEARER = "similarity", "more similar by"
"""What the amounts of a receipt, and of a comparison, sum to."""


def draw_receipt(receipt: Receipt, lines: int, links: int, title: str | None) -> Image.Image:
    """The two pictures with their maps, the cells that match best, and the sum."""
    tiles = [
        _tile(receipt.query, receipt.query_shown),
        _tile(receipt.result, receipt.result_shown),
    ]
    return receipt_picture(
        tiles,
        receipt.amounts(lines),
        (SIMILARITY, receipt.similarity),
        apart=int(receipt.centred),
        headings=["Query", "Result"],
        links=[_mark(receipt, link.query, link.result) for link in receipt.links(links)],
        title=title,
        note="Red speaks for the match, blue against it; each map has its own scale. Links join "
        "the cells that match best. " + _how(receipt.exact),
    )


def draw_comparison(comparison: Comparison, lines: int, title: str | None) -> Image.Image:
    """The query between its two results, and the sum."""
    result, rival = comparison.result, comparison.rival
    ours, query, theirs = (
        _tile(result.result, result.result_shown),
        _tile(comparison.query, comparison.query_shown),
        _tile(rival.result, rival.result_shown, rival=True),
    )
    ours.subcaption += f"\nsimilarity {result.similarity:.3f}"
    theirs.subcaption += f"\nsimilarity {rival.similarity:.3f}"
    return receipt_picture(
        [query, ours, theirs],
        comparison.amounts(lines),
        (NEARER, comparison.score),
        headings=["Query", "Result", "Rival"],
        title=title,
        note="In all three red speaks for the result, blue for the rival: the maps of the two show "
        "what in them matches the query. Each map has its own scale. " + _how(comparison.exact),
    )


def _how(exact: bool) -> str:
    if exact:
        return "Contributions are exact: behind average pooling and an affine head all add up."
    return "Contributions are of first order; what is not is the last amount."


def _tile(evidence: Evidence, shown: Shown, rival: bool = False) -> Tile:
    """A picture with what in it speaks for (red) and against; a rival's speaks the other way."""
    name = shown.name.rpartition("/")[2]
    return Tile(
        shown.image,
        -evidence.cells if rival else evidence.cells,
        shown.extent,
        name or "query",
        shown.label or "",
        signed=True,
    )


def _mark(receipt: Receipt, query: tuple[int, int], result: tuple[int, int]) -> Mark:
    return Mark(
        _centre(query, receipt.query, receipt.query_shown),
        _centre(result, receipt.result, receipt.result_shown),
    )


def _centre(cell: tuple[int, int], evidence: Evidence, shown: Shown) -> tuple[float, float]:
    """The middle of a cell as shares of the picture's width and height."""
    height, width = evidence.cells.shape
    x, y = (cell[1] + 0.5) / width, (cell[0] + 0.5) / height
    if shown.image is None or shown.extent is None:
        return x, y
    x0, y0, x1, y1 = shown.extent
    found = (x0 + x * (x1 - x0)) / shown.image.width, (y0 + y * (y1 - y0)) / shown.image.height
    return min(max(found[0], 0.0), 1.0), min(max(found[1], 0.0), 1.0)
