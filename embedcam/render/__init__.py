"""Pictures: maps laid over images, panels of a query and its results, and pages of panels.

Pillow draws, matplotlib lends its colour maps and fonts (imported when first needed, never pyplot).
`overlay` is one picture, `panel` and `receipt_picture` one PNG, `page` one self-contained HTML
file.
"""

from embedcam.render.chart import Chart
from embedcam.render.overlay import colormap, overlay, stretch
from embedcam.render.page import Notice, Row, Table, page
from embedcam.render.panel import panel
from embedcam.render.receipt import Mark, receipt_picture
from embedcam.render.tiles import Tile, top_value

__all__ = [
    "Chart",
    "Mark",
    "Notice",
    "Row",
    "Table",
    "Tile",
    "colormap",
    "overlay",
    "page",
    "panel",
    "receipt_picture",
    "stretch",
    "top_value",
]
