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


def imports(text: str, file: Path) -> set[str]:
    """Return the dotted names a module imports when it runs, functions included, typing aside."""
    names: set[str] = set()
    tree = ast.parse(text)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


@cache
def modules() -> dict[Path, set[str]]:
    """Return for every file of embedcam, but for the package's own, the names it imports."""
    files = sorted(f for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE or f.stem[:2] != "__")
    return {file: imports(file.read_text(encoding="utf-8"), file) for file in files}


def package_of(file: Path) -> str:
    """Return the entry at the package's root that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def below() -> dict[str, set[str]]:
    """Return for every package of embedcam the packages that it imports."""
    found: dict[str, set[str]] = {}
    for file, names in modules().items():
        of_ours = {name.split(".")[1] for name in names if name.startswith("embedcam.")}
        found.setdefault(package_of(file), set()).update(of_ours)
    return {name: (others & found.keys()) - {name} for name, others in found.items()}


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
