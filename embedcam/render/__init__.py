"""Pictures: maps laid over images, panels of a query and its results, and pages of panels.

Pillow draws; matplotlib lends fonts and all color maps but the default ones, and may be missing.
"""

from .overlay import colormap, overlay, scale_box, stretch
from .page import (
    Block,
    Chart,
    Look,
    Notice,
    PageLink,
    Row,
    Table,
    drawn_blocks,
    in_notebook,
    page,
    page_foot,
    page_head,
    page_row,
)
from .tiles import (
    CHANGED,
    Mark,
    Tile,
    draw_on_axes,
    panel,
    receipt_picture,
    shrunk,
    top_value,
)

__all__ = [
    "CHANGED",
    "Block",
    "Chart",
    "PageLink",
    "Look",
    "Mark",
    "Notice",
    "Row",
    "Table",
    "Tile",
    "colormap",
    "draw_on_axes",
    "drawn_blocks",
    "in_notebook",
    "overlay",
    "page",
    "page_foot",
    "page_head",
    "page_row",
    "panel",
    "receipt_picture",
    "scale_box",
    "shrunk",
    "stretch",
    "top_value",
]
