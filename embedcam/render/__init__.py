"""Pictures: maps laid over images, panels of a query and its results, and pages of panels.

Pillow draws; matplotlib lends fonts and all colour maps but the default ones (imported when first
needed, never pyplot), and may be missing.
`overlay` is one picture, `panel` and `receipt_picture` one PNG, `page` one self-contained HTML
file, and `page_head`, `page_row` and `page_foot` its pieces.
"""

from .blocks import Block, Link, Notice, Table, drawn_blocks
from .chart import Chart
from .overlay import colormap, overlay, stretch
from .page import Look, Row, in_notebook, page, page_foot, page_head, page_row
from .panel import panel
from .receipt import Mark, receipt_picture
from .tiles import CHANGED, Tile, shrunk, top_value

__all__ = [
    "CHANGED",
    "Block",
    "Chart",
    "Link",
    "Look",
    "Mark",
    "Notice",
    "Row",
    "Table",
    "Tile",
    "colormap",
    "drawn_blocks",
    "in_notebook",
    "overlay",
    "page",
    "page_foot",
    "page_head",
    "page_row",
    "panel",
    "receipt_picture",
    "shrunk",
    "stretch",
    "top_value",
]
