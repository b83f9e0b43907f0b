"""Build the documentation as a site: prepare its pages, run zensical strictly, check every link.

    python scripts/docs.py

The pages are docs/ with the README, the index format, CONTRIBUTING and CHANGELOG beside them, and a
page for every example. The site is written to `site/`; a broken link or a warning is an error.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from architecture import drawing

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / ".site-source", ROOT / "site"
BESIDE = {
    "README.md": "index.md",
    "index/README.md": "index-format.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages that lie elsewhere in the repository, and where they stand in the site."""
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def place_of(file: str) -> str:
    """Return where a file of the repository stands in the site; empty where it is not shown."""
    if file in BESIDE:
        return BESIDE[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return f"files/{file}.md" if (ROOT / file).is_file() else ""


def page(file: str) -> str:
    """Return a page's text with its links as the site has them."""
    folder, here = posixpath.dirname(file), posixpath.dirname(place_of(file))

    def moved(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        place = place_of(target)
        if not place:
            raise SystemExit(f"{file}: the link to {link[2]} leads nowhere")
        if place.startswith("files/"):
            write_listing(target)
        return f"{link[1]}{posixpath.relpath(place, here or '.')}{link[3] or ''}{link[4]}"

    return _LINK.sub(moved, (ROOT / file).read_text(encoding="utf-8"))


def write_listing(file: str) -> None:
    """Write a page that shows a file of the repository."""
    target = SOURCE / place_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    language = {".py": "python", ".toml": "toml"}.get(Path(file).suffix, "text")
    text = (ROOT / file).read_text(encoding="utf-8")
    target.write_text(f"# {file}\n\n````{language}\n{text}````\n", encoding="utf-8")


def prepare() -> None:
    """Write the pages of the site."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE)
    pages = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "docs").rglob("*.md"))]
    for file in [*pages, *BESIDE]:
        (SOURCE / place_of(file)).write_text(page(file), encoding="utf-8")
    (SOURCE / "images" / "architecture.svg").write_text(drawing(), encoding="utf-8")


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.anchors = set[str](), set[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag names and where it leads."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links |= {values[name] for name in ("href", "src") if name in values}


def broken_links() -> list[str]:
    """Return the links of the site that lead nowhere, with their pages."""
    pages = {file: Links(file) for file in sorted(SITE.rglob("*.html")) if file.name != "404.html"}
    broken = []
    for file, found in pages.items():
        for link in sorted(found.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith(("#__", "/")):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            lost = (
                target in pages and parts.fragment and parts.fragment not in pages[target].anchors
            )
            if not target.exists() or lost:
                broken.append(f"{file.relative_to(SITE)}: {link}")
    return broken


def main() -> int:
    """Build the site."""
    prepare()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--clean", "--strict"]
    code = subprocess.run(command, cwd=ROOT).returncode
    broken = broken_links() if code == 0 else []
    for line in broken:
        print(f"a link leads nowhere: {line}", file=sys.stderr)
    return int(code != 0 or bool(broken))


if __name__ == "__main__":
    sys.exit(main())
