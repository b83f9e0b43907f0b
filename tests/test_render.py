"""Pictures: the pixels of an overlay, what a panel shows, and pages that are safe and whole."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rounding import assert_same_picture, stretch

from embedcam.errors import InputError
from embedcam.render import (
    PageLink,
    Row,
    Table,
    Tile,
    draw_on_axes,
    overlay,
    page,
    panel,
    shrunk,
    top_value,
)
from embedcam.render.overlay import colormap
from embedcam.render.page import PAGE_FOOT, Look, page_head, page_row
from embedcam.render.tiles import shorten, wrap

GREY = 100


def grey(width=12, height=8):
    return Image.new("RGB", (width, height), (GREY,) * 3)


def photo(width=60, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["inferno", "coolwarm", "viridis"])
def test_colours_are_matplotlibs(name):
    from matplotlib import colormaps

    values = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    expected = colormaps[name](np.arange(256).reshape(16, 16))[..., :3]
    np.testing.assert_allclose(colormap(values, name), expected, atol=1e-7)
    assert colormap(values).dtype == np.float32


def test_colours_of_values_beyond_the_ends():
    np.testing.assert_array_equal(colormap(np.array([-1.0, 2.0])), colormap(np.array([0.0, 1.0])))


@pytest.mark.parametrize(
    "extent",
    [
        None, (2, 1, 10, 7), (2.3, 0.7, 9.49, 7.51), (2.5, 1.5, 3.5, 2.5), (-4.0, -2.5, 16.0, 9.0),
        (5.0, -3.0, 40.0, 4.2), (20.0, 0.0, 30.0, 8.0), (-9.0, 0.0, 0.2, 8.0), (3, 2, 9, 6),
    ],
)  # fmt: skip
def test_each_pixel_is_coloured_by_what_lies_there(extent):
    cam = np.random.default_rng(1).random((3, 4), dtype=np.float32)
    drawn = overlay(grey(), cam, extent, vmax=1)
    value = stretch(cam, (8, 12), extent)
    expected = GREY + 0.7 * value[..., None] * (255 * colormap(value) - GREY)
    np.testing.assert_allclose(np.asarray(drawn), expected, atol=1)


def test_a_map_lands_where_the_network_looked():
    from embedcam.preprocess import Preprocess

    preprocess = Preprocess((64, 64), "crop", 80, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = np.zeros((170, 311, 3), dtype=np.uint8)
    pixels[60:75, 180:195] = 255
    cam = preprocess(Image.fromarray(pixels))[0]
    black = Image.new("RGB", (311, 170))
    drawn = overlay(black, cam, preprocess.extent(311, 170), vmax=1, alpha=1, cmap="gray")
    middle = np.argwhere(np.asarray(drawn)[..., 0] > 64).mean(axis=0)
    np.testing.assert_allclose(middle, [67, 187], atol=0.6)


@pytest.mark.parametrize("cmap", ["inferno", "viridis"])
@pytest.mark.parametrize("shade", [0, GREY, 250, 255])
def test_overlay_by_hand(cmap, shade):
    image = Image.new("RGB", (4, 1), (shade,) * 3)
    cam = np.array([[0.0, 0.25, 0.5, 1.0]])
    drawn = np.asarray(overlay(image, cam, alpha=0.8, cmap=cmap)).astype(float)
    opacity = 0.8 * cam[0][:, None]
    expected = shade * (1 - opacity) + 255 * colormap(cam[0], cmap) * opacity
    np.testing.assert_allclose(drawn[0], expected, atol=0.501)


@pytest.mark.parametrize(("value", "vmax"), [(0, None), (0, 1), (-1, None), (1, 0), (1, -1)])
def test_no_evidence_leaves_the_picture_as_it_is(value, vmax):
    image = photo()
    drawn = overlay(image, np.full((7, 7), float(value)), vmax=vmax)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))
    assert drawn is not image
    assert overlay(image.convert("L"), np.ones((2, 2))).mode == "RGB"


def test_a_tall_picture_is_coloured_without_seams():
    ramp, extent = np.linspace(0, 1, 5)[:, None], (0, 13.2, 2, 690.7)
    drawn = np.asarray(overlay(grey(2, 700), ramp, extent))[:, 0]
    strength = stretch(ramp, (700, 2), extent)[:, :1]
    expected = GREY + 0.7 * strength * (255 * colormap(strength[:, 0]) - GREY)
    np.testing.assert_allclose(drawn, expected, atol=0.51)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cam": np.array([[np.nan, 1.0]])}, "cam: 1 of 2 values are NaN or infinite"),
        ({"cam": np.zeros((1, 2, 2))}, r"expected a map \[h w\], given \[1, 2, 2\]"),
        ({"cam": np.array([["a"]])}, "expected numbers"),
        ({"vmax": float("nan")}, "vmax = nan; give a number"),
        ({"alpha": 1.5}, "alpha = 1.5; give a number from 0 to 1"),
        ({"extent": (0, 0, 0, 5)}, "expected x0 < x1 and y0 < y1"),
        ({"extent": (0, 0, 5, float("inf"))}, "four finite numbers"),
        ({"image": np.zeros((4, 4, 3))}, "expected a Pillow image, given ndarray"),
        ({"cmap": "none"}, "colour map 'none' is not known"),
    ],
)
def test_overlays_that_cannot_be_drawn(options, message):
    given = {"image": grey(), "cam": np.ones((2, 2)), **options}
    with pytest.raises(InputError, match=message):
        overlay(**given)


def tile(value=1.0, name="a.png", image=None, **options):
    return Tile(image or grey(40, 40), np.full((2, 2), value), caption=name, **options)


def colours(picture):
    return {tuple(c) for c in np.asarray(picture).reshape(-1, 3)}


def strongest(alpha=0.7):
    """The colour of full evidence over `grey()`."""
    return tuple(np.rint(GREY + alpha * (255 * colormap(np.ones(1))[0] - GREY)).astype(int))


def test_a_panel_shows_pictures_and_maps():
    drawn = panel(tile(), [tile(name=str(i)) for i in range(3)], title="Why?")
    pixels = np.asarray(drawn)
    full = (pixels == strongest()).all(axis=-1)
    plain = (pixels == GREY).all(axis=-1)
    # Four columns of plain tiles and of coloured ones, with corners rounded.
    for shown in (full, plain):
        assert abs(shown.sum() / (4 * 240 * 240) - 1) < 0.01
    assert np.flatnonzero(plain.any(axis=1)).max() < np.flatnonzero(full.any(axis=1)).min()


def test_results_share_a_scale_and_the_query_has_its_own():
    query, results = tile(100.0), [tile(2.0), tile(1.0)]
    half = np.rint(GREY + 0.35 * (255 * colormap(np.array([0.5]))[0] - GREY)).astype(int)
    for scale, full, halves in (("joint", 2, 1), ("each", 3, 0)):
        pixels = np.asarray(panel(query, results, scale=scale))
        for colour, tiles in ((strongest(), full), (half, halves)):
            assert round((pixels == colour).all(axis=-1).sum() / 240**2, 1) == tiles
    assert top_value(results) == 2.0
    assert top_value([Tile(grey())]) == 0.0


def test_a_panel_wraps_its_results_and_is_the_same_every_time():
    seven = [tile(name=str(i), image=photo(seed=i)) for i in range(7)]
    short, long, again = (panel(tile(), some) for some in (seven[:5], seven, seven))
    assert long.width == short.width
    assert long.height > short.height + 2 * 120
    np.testing.assert_array_equal(np.asarray(long), np.asarray(again))


def test_panels_of_tiles_that_lack_something():
    assert strongest() in colours(panel(tile(), []))
    gone = panel(tile(), [Tile(None, np.ones((3, 3)), caption="gone"), Tile(None, None)])
    # Without its picture the map is shown by itself, opaque.
    assert tuple(np.rint(255 * colormap(np.ones(1))[0]).astype(int)) in colours(gone)
    assert panel(Tile(grey()), [Tile(grey())]).height < gone.height
    assert (GREY,) * 3 in colours(panel(tile(0.0), [tile(0.0)]))
    thin = tile(image=grey(1, 900))
    assert panel(thin, [tile(image=grey(900, 1))]).size == panel(thin, [tile()]).size


def test_a_cropped_extent_gets_a_frame():
    black, empty = Image.new("RGB", (240, 240)), np.zeros((2, 2))
    maps = slice(40 + 28 + 240 + 8, 40 + 28 + 240 + 8 + 240)

    def light(extent):
        shown = np.asarray(panel(Tile(black, empty, extent), []))[maps, :, 0]
        return np.argwhere(shown == 190)

    found = light((40, 40, 200, 200))
    assert [*found.min(axis=0), *found.max(axis=0)] == [40, 40 + 40, 199, 40 + 199]
    for extent in ((0, 0, 240, 240), (-5, -5, 300, 300)):
        assert len(light(extent)) == 0
        assert not Tile(black, empty, extent).cropped
    assert not Tile(black, None, (40, 40, 200, 200)).cropped


def test_words_of_any_kind_fit():
    name = "фото/写真/a\nb\0\ud800/" + "x" * 400
    long = tile(name=name, subcaption="label " * 99 + "\ndistance 0.1")
    drawn = panel(long, [long], title="title " * 60 + "y" * 900)
    assert drawn.width == panel(tile(), [tile()]).width
    assert [shorten("abcdefgh", n, middle=True) for n in (8, 7, 0)] == ["abcdefgh", "abc…fgh", "…"]
    assert (shorten("abc defghi", 5), shorten("ab", 2)) == ("abc…", "ab")
    lines = wrap("one two three four", (13, False), 60)
    assert (" ".join(lines), len(lines) > 1) == ("one two three four", True)
    assert wrap("", (13, False), 100) == []


class Reader(HTMLParser):
    def __init__(self, document):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


NASTY = "<script>alert(1)</script>\"'&<img src=x onerror=y>"


def test_everything_on_a_page_is_escaped():
    nasty = tile(name=NASTY, subcaption=NASTY)
    row = Row(nasty, [nasty], notes=NASTY, title=NASTY)
    links = Table(["a", "b"], [[PageLink(NASTY, "q3"), "0.25 (0.9)"]], "All", folded=True)
    tables = [Table([NASTY], [[NASTY]], NASTY, NASTY), links]
    read = Reader(page([row], title=NASTY, intro=NASTY, tables=tables))
    assert read.all("script") == []
    assert [a.get("class") for a in read.all("td")] == [None, None, "number"]
    attributes = {tuple(sorted(a)) for a in read.all("img")}
    assert attributes == {("alt", "class", "height", "src", "width")}
    assert sum(NASTY in text for text in read.text) >= 6
    assert all(NASTY in a["alt"] for a in read.all("img"))
    assert read.all("a") == [{"href": "#q3"}]
    assert (len(read.all("details")), len(read.all("caption"))) == (1, 1)
    assert "All" in read.text


def test_a_page_is_whole_by_itself():
    document = page([Row(tile(), [tile(), tile()])], intro="One.\n\nTwo\nlines.")
    read = Reader(document)
    assert document.startswith("<!DOCTYPE html>")
    # Nothing is fetched: no address anywhere but data.
    assert not re.search(r"(https?:|url\(|@import|<link|<script|<iframe)", document)
    assert all(a["src"].startswith("data:image/jpeg;base64,") for a in read.all("img"))
    assert read.all("html") == [{"lang": "en"}]
    assert [a["class"] for a in read.all("p")].count("intro") == 2
    assert "Two lines." in read.text


def test_the_pictures_on_a_page():
    query = tile(name="q", image=grey(80, 40))
    row = Row(query, [tile(2.0, "strong"), tile(1.0, "weak")])
    read = Reader(page_head("T") + page_row(row, Look(side=64)) + PAGE_FOOT)
    images, shown = read.all("img"), []
    names = ["query: q", "map over query q", "result: strong", "map over result strong"]
    assert [a["alt"] for a in images] == [*names, "result: weak", "map over result weak"]
    for attributes in images:
        data = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert [str(n) for n in image.size] == [attributes["width"], attributes["height"]]
            shown.append(np.asarray(image).mean(axis=(0, 1)))
    assert (images[0]["width"], images[0]["height"]) == ("64", "32")
    np.testing.assert_allclose(shown[2], GREY, atol=2)
    np.testing.assert_allclose(shown[3], strongest(), atol=4)
    assert np.abs(shown[5] - GREY).sum() < np.abs(shown[3] - GREY).sum()


def test_a_page_in_pieces_is_the_page():
    cropped = Tile(photo(), np.ones((2, 2)), (10, 0, 50, 40), caption="c")
    rows = [Row(tile(), [tile(2.0)], title="a", notes="n"), Row(cropped, [])]
    tables = [Table(["a"], [["b"]])]
    pieces = [page_head("T", "I", tables, cropped=True), *map(page_row, rows), PAGE_FOOT]
    assert "".join(pieces) == page(rows, title="T", intro="I", tables=tables)
    look = Look("each")
    pieces = [page_head("T", look=look), page_row(rows[0], look), PAGE_FOOT]
    assert "".join(pieces) == page(rows[:1], title="T", scale="each")
    with pytest.raises(InputError, match=r'scale is \'all\'; give "joint"'):
        page([], scale="all")


def test_a_long_page_leaves_what_is_out_of_sight_for_later():
    look, row = Look(side=32, long=True), Row(tile(image=photo()), [], title="t", anchor="q7")
    document = page_head("T", look=look) + page_row(row, look) + PAGE_FOOT
    read = Reader(document)
    assert all((a["loading"], a["decoding"]) == ("lazy", "async") for a in read.all("img"))
    assert "section { content-visibility: auto;" in document
    assert read.all("section")[0]["id"] == "q7"
    assert "content-visibility" not in page([row])
    coarse, fine = (page_row(row, Look(side=32, quality=quality)) for quality in (30, 80))
    assert len(coarse) < len(fine)


@pytest.mark.parametrize("size", [(300, 200), (40, 90), (64, 64)])
def test_a_shrunk_tile_draws_the_same(size):
    full = Tile(photo(*size), np.eye(3), (10, 0, 30, 25), "c", "s")
    small = shrunk(full, 64)
    assert max(small.image.size) == 64
    assert (small.caption, small.subcaption, small.cropped) == ("c", "s", True)
    look = Look(side=64)
    assert page_row(Row(small, []), look) == page_row(Row(full, []), look)
    assert shrunk(Tile(None, np.eye(2)), 64).image is None


def test_pages_of_tiles_that_lack_something():
    row = Row(Tile(grey()), [Tile(None, np.ones((2, 2)), caption="gone"), Tile(None)])
    read = Reader(page([row], title="a\ud800b"))
    assert len(read.all("img")) == 2
    assert "picture not found" in read.text
    assert "no evidence" not in Reader(page([Row(Tile(grey()), [])])).text


def run(code):
    start = "import sys, embedcam.render as r, numpy as np; from PIL import Image;"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, check=True)
    return done.stdout, done.stderr


def test_rendering_needs_no_pyplot_and_only_then_matplotlib():
    run(
        "assert 'matplotlib' not in sys.modules;"
        "r.panel(r.Tile(Image.new('RGB', (9, 9)), np.ones((2, 2)), caption='a'), []);"
        "assert not {'matplotlib.pyplot', 'torch', 'cv2'} & set(sys.modules)"
    )


def test_without_matplotlib_the_default_colours_are_the_same_and_others_are_refused():
    image, cam = photo(), np.arange(12.0).reshape(3, 4)
    found, said = run(
        "sys.modules['matplotlib'] = None;"
        "p = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8);"
        "cam = np.arange(12.0).reshape(3, 4); image = Image.fromarray(p);"
        "out = r.panel(r.Tile(image, cam, caption='owls/1.jpg'), []);"
        "assert out.size[0] > 500 and len(out.getcolors(1 << 20)) > 1000;"
        "sys.stdout.buffer.write(r.overlay(image, cam).tobytes());"
        "sys.stdout.buffer.write(r.overlay(image, cam - 6, signed=True).tobytes());\n"
        "try: r.overlay(image, cam, cmap='viridis')\n"
        "except ValueError as error: sys.stderr.write(str(error))"
    )
    drawn = [np.asarray(overlay(image, cam)), np.asarray(overlay(image, cam - 6, signed=True))]
    for mine, other in zip(
        np.frombuffer(found, np.uint8).reshape(2, 40, 60, 3), drawn, strict=True
    ):
        assert_same_picture(mine, other)
    assert b"'viridis' is matplotlib's, which is not installed; take inferno" in said


def test_maps_are_drawn_into_axes_with_words_as_text(tmp_path):
    from matplotlib import pyplot, rc_context

    figure, (left, right) = pyplot.subplots(1, 2)
    image = photo()
    mapped = Tile(image, np.eye(3), (5, 0, 50, 40))
    assert draw_on_axes(left, mapped, "Why & <what>") is left
    drawn = np.asarray(left.images[0].get_array())
    np.testing.assert_array_equal(drawn, np.asarray(mapped.drawn(image.size, 1.0)[1]))
    draw_on_axes(right, Tile(None, -np.eye(3), signed=True), "b")
    with rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(tmp_path / "a.svg")
        figure.savefig(tmp_path / "a.pdf")
    pyplot.close(figure)
    assert "Why &amp; &lt;what&gt;</text>" in (tmp_path / "a.svg").read_text()
    assert b"/Font" in (tmp_path / "a.pdf").read_bytes()
    with pytest.raises(InputError, match="ax = 'here'; give the Axes that matplotlib's"):
        draw_on_axes("here", mapped)


def test_everything_that_is_plotted_is_plotted_into_axes(explainer):
    from matplotlib.figure import Figure
    from photo_samples import picture

    from embedcam import PairExplainer, cam_for

    query = picture(0, 1)
    pairs, (one, other) = PairExplainer(explainer), explainer.index.ids[:2]
    for plotted in (
        explainer.explain(query),
        pairs.receipt(query, one),
        pairs.above(query, one, other),
        cam_for(explainer.network, query, lambda embedding: embedding.sum(1)),
    ):
        ax = Figure().subplots()
        assert plotted.plot(ax=ax, title="a caption") is ax
        assert (ax.get_title(), len(ax.images)) == ("a caption", 1)
    with pytest.raises(InputError, match="title = 'a' is drawn into matplotlib axes; give ax"):
        plotted.plot(title="a")
