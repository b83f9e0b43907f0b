"""Pictures: maps laid over images, panels of a query and its results, and pages of panels.

Pillow draws; matplotlib lends fonts and all color maps but the default ones, and may be missing.
"""

from .overlay import overlay
from .page import Block, Chart, Notice, PageLink, Row, Table, drawn_blocks, in_notebook, page
from .receipts import Matched, receipt_picture, window
from .tiles import CHANGED, Tile, draw_on_axes, panel, shrunk, top_value

__all__ = [
    "CHANGED",
    "Block",
    "Chart",
    "Matched",
    "Notice",
    "PageLink",
    "Row",
    "Table",
    "Tile",
    "draw_on_axes",
    "drawn_blocks",
    "in_notebook",
    "overlay",
    "page",
    "panel",
    "receipt_picture",
    "shrunk",
    "top_value",
    "window",
]
