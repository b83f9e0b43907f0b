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


def imports(file: Path, text: str | None = None) -> set[str]:
    """Return the dotted names a module imports when it runs, functions included, typing aside."""
    tree = ast.parse(file.read_text(encoding="utf-8") if text is None else text)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    names, parts = set[str](), ("embedcam", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = parts[: len(parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


@cache
def modules() -> dict[str, list[Path]]:
    """Return the files of every package and module at embedcam's root."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent != PACKAGE or not file.stem.startswith("__"):
            name = file.relative_to(PACKAGE).with_suffix("").parts[0]
            found.setdefault(name, []).append(file)
    return found


@cache
def below() -> dict[str, set[str]]:
    """Return for every package of embedcam the packages that it imports."""
    names = {name: set().union(*map(imports, files)) for name, files in modules().items()}
    return {
        name: {one.split(".")[1] for one in found if one.startswith("embedcam.")}
        & names.keys() - {name}
        for name, found in names.items()
    }


def reached(package: str) -> set[str]:
    """Return the packages a package reaches through every import, itself included."""
    found, ahead = set[str](), [package]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += below()[name]
    return found


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


if __name__ == "__main__":
    sys.stdout.write(drawing())
