"""Draw the architecture from the imports: packages in layers, each above all that it imports.

python scripts/architecture.py > docs/images/architecture.svg
"""

import ast
import sys
from functools import cache
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "embedcam"
COLORS = {"offline": "#fde8d7", "explain": "#dcebf7"}
BOX, GAP, HEIGHT, ROW = 112, 14, 34, 84


@cache
def below() -> dict[str, set[str]]:
    """Return for every package of embedcam the packages that it imports."""
    files = {
        file: file.relative_to(PACKAGE).with_suffix("").parts
        for file in sorted(PACKAGE.rglob("*.py"))
        if not (file.parent == PACKAGE and file.stem.startswith("__"))
    }
    imports: dict[str, set[str]] = {parts[0]: set() for parts in files.values()}
    for file, parts in files.items():
        depth = len(parts) - 1
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing_only or not isinstance(node, ast.ImportFrom):
                continue
            if node.level != depth + 1:
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            imports[parts[0]] |= {name.split(".")[0] for name in names}
    return {name: (found & imports.keys()) - {name} for name, found in imports.items()}


@cache
def layer(package: str) -> int:
    """Return the length of the longest chain of imports below a package."""
    return max((1 + layer(name) for name in below()[package]), default=0)


def drawing() -> str:
    """Return the drawing as SVG: an arrow for each import that no longer chain implies."""
    rows: dict[int, list[str]] = {}
    for name in sorted(below()):
        rows.setdefault(layer(name), []).append(name)
    width = max(map(len, rows.values())) * (BOX + GAP) + GAP
    height = len(rows) * ROW + 10
    places = {
        name: (
            (width - len(names) * (BOX + GAP) + GAP) / 2 + at * (BOX + GAP),
            height - (row + 1) * ROW + 20,
        )
        for row, names in rows.items()
        for at, name in enumerate(names)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The packages of embedcam in layers" font-family="sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for name, imported in sorted(below().items()):
        for other in sorted(imported):
            if any(other in reached(third) for third in imported if third != other):
                continue
            (x, y), (to_x, to_y) = places[name], places[other]
            parts.append(
                f'<path d="M{x + BOX / 2:g} {y + HEIGHT:g} C{x + BOX / 2:g} {y + ROW / 2 + 20:g} '
                f'{to_x + BOX / 2:g} {to_y - 26:g} {to_x + BOX / 2:g} {to_y:g}" fill="none" '
                'stroke="#9aa5b1"/>'
            )
    for name, (x, y) in places.items():
        color = COLORS.get(name, "#f2f4f7")
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{color}" '
            'stroke="#5b6876"/>'
            f'<text x="{x + BOX / 2:g}" y="{y + 22:g}" text-anchor="middle">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


@cache
def reached(package: str) -> frozenset[str]:
    """Return all packages below a package."""
    direct = below()[package]
    return frozenset(direct).union(*(reached(name) for name in direct))


if __name__ == "__main__":
    sys.stdout.write(drawing())
