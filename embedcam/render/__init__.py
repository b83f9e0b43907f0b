"""Pictures: maps laid over images, panels of a query and its results, and pages of panels.

Pillow draws; matplotlib lends fonts and all colour maps but the default one (imported when first
needed, never pyplot), and may be missing.
`overlay` is one picture, `panel` one PNG, `page` one self-contained HTML file.
"""

from embedcam.render.chart import Chart
from embedcam.render.overlay import colormap, overlay, stretch
from embedcam.render.page import Notice, Row, Table, page
from embedcam.render.panel import panel
from embedcam.render.tiles import Tile, top_value

__all__ = [
    "Chart",
    "Notice",
    "Row",
    "Table",
    "Tile",
    "colormap",
    "overlay",
    "page",
    "panel",
    "stretch",
    "top_value",
]
