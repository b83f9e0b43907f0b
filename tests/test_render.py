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
from embedcam.ops import resize
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


def changed(picture, original):
    """Where a picture differs from its original, `[H W]`."""
    return (np.asarray(picture) != np.asarray(original)).any(axis=-1)


@pytest.mark.parametrize("name", ["inferno", "viridis", "magma", "cividis"])
def test_colours_are_matplotlibs(name):
    from matplotlib import colormaps

    values = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    expected = colormaps[name](np.arange(256).reshape(16, 16))[..., :3]
    np.testing.assert_allclose(colormap(values, name), expected, atol=1e-7)
    assert colormap(values).dtype == np.float32


def test_the_default_colours_grow_evenly_lighter():
    """Perceptually uniform: lightness (CIE L*) is a straight line in the value."""
    luminance = colormap(np.linspace(0, 1, 256)).astype(float) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    light = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert (np.diff(light) > -0.1).all()
    assert np.abs(light - np.linspace(light[0], light[-1], 256)).max() < 6


def test_colours_of_values_beyond_the_ends():
    np.testing.assert_array_equal(colormap(np.array([-1.0, 2.0])), colormap(np.array([0.0, 1.0])))
    with pytest.raises(InputError, match="colour map 'jets' is not known; take inferno"):
        colormap(np.zeros(1), "jets")


@pytest.mark.parametrize("size", [(8, 12), (7, 7), (31, 17), (3, 2), (1, 1)])
def test_the_oracle_is_the_usual_resizing(size):
    cam = np.random.default_rng(0).random((7, 5), dtype=np.float32)
    np.testing.assert_allclose(stretch(cam, size), resize(cam, size), atol=1e-6)


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
    """The cell of a feature in the network's input is drawn over that feature in the original."""
    from embedcam.preprocess import Preprocess

    preprocess = Preprocess((64, 64), "crop", 80, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = np.zeros((170, 311, 3), dtype=np.uint8)
    pixels[60:75, 180:195] = 255
    cam = preprocess(Image.fromarray(pixels))[0]
    black = Image.new("RGB", (311, 170))
    drawn = overlay(black, cam, preprocess.extent(311, 170), vmax=1, alpha=1, cmap="gray")
    rows, columns = np.nonzero(np.asarray(drawn)[..., 0] > 64)
    assert abs(rows.mean() - 67) < 0.6
    assert abs(columns.mean() - 187) < 0.6


@pytest.mark.parametrize("cmap", ["inferno", "viridis"])
@pytest.mark.parametrize("shade", [0, GREY, 250, 255])
def test_overlay_by_hand(cmap, shade):
    """Colour and opacity both by value; in float, so nothing wraps around at 255."""
    image = Image.new("RGB", (4, 1), (shade,) * 3)
    cam = np.array([[0.0, 0.25, 0.5, 1.0]])
    drawn = np.asarray(overlay(image, cam, alpha=0.8, cmap=cmap)).astype(float)
    opacity = 0.8 * cam[0][:, None]
    expected = shade * (1 - opacity) + 255 * colormap(cam[0], cmap) * opacity
    np.testing.assert_allclose(drawn[0], expected, atol=0.501)


def test_no_evidence_leaves_the_picture_as_it_is():
    image = photo()
    for cam, vmax in [
        (np.zeros((7, 7)), None),
        (np.zeros((7, 7)), 1.0),
        (np.full((7, 7), -1.0), None),
        (np.ones((7, 7)), 0.0),
        (np.ones((7, 7)), -1.0),
    ]:
        drawn = overlay(image, cam, vmax=vmax)
        assert not changed(drawn, image).any()
        assert drawn is not image


def test_weak_evidence_looks_weak():
    cam = np.ones((2, 2))
    apart = [
        np.abs(np.asarray(overlay(grey(), cam * s, vmax=1.0)).astype(int) - GREY).sum()
        for s in (5.0, 1.0, 0.5, 0.1, 0.01)
    ]
    assert apart[0] == apart[1] > 2 * apart[2] > 4 * apart[3]
    assert apart[4] <= 3 * 12 * 8


def test_a_tall_picture_is_coloured_without_seams():
    ramp = np.linspace(0, 1, 5)[:, None]
    image = Image.new("RGB", (2, 700), (GREY,) * 3)
    drawn = np.asarray(overlay(image, ramp, (0, 13.2, 2, 690.7)))[:, 0]
    strength = stretch(ramp, (700, 2), (0, 13.2, 2, 690.7))[:, :1]
    expected = GREY + 0.7 * strength * (255 * colormap(strength[:, 0]) - GREY)
    np.testing.assert_allclose(drawn, expected, atol=0.51)


def test_overlay_keeps_the_callers_picture_and_takes_every_mode():
    image = photo()
    before = np.asarray(image).copy()
    assert overlay(image, np.ones((2, 2))).size == image.size
    np.testing.assert_array_equal(np.asarray(image), before)
    assert overlay(image.convert("L"), np.ones((2, 2))).mode == "RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cam": np.array([[np.nan, 1.0]])}, "cam: 1 of 2 values are NaN or infinite"),
        ({"cam": np.array([[np.inf]])}, "NaN or infinite"),
        ({"cam": np.zeros((1, 2, 2))}, r"expected a map \[h w\], given \[1, 2, 2\]"),
        ({"cam": np.zeros((0, 2))}, r"given \[0, 2\]"),
        ({"cam": np.array([["a"]])}, "expected numbers"),
        ({"vmax": float("nan")}, "vmax = nan; give a number"),
        ({"alpha": 1.5}, "alpha = 1.5; give a number from 0 to 1"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"extent": (0, 0, 0, 5)}, "expected x0 < x1 and y0 < y1"),
        ({"extent": (0, 0, 5)}, "four finite numbers"),
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
    assert drawn.mode == "RGB"
    full = (pixels == strongest()).all(axis=-1)
    plain = (pixels == GREY).all(axis=-1)
    # Four columns of plain tiles and of coloured ones, with corners rounded.
    for shown in (full, plain):
        assert abs(shown.sum() / (4 * 240 * 240) - 1) < 0.01
    assert np.flatnonzero(plain.any(axis=1)).max() < np.flatnonzero(full.any(axis=1)).min()


def test_results_share_a_scale_and_the_query_has_its_own():
    query, results = tile(100.0), [tile(2.0), tile(1.0)]
    half = np.rint(GREY + 0.35 * (255 * colormap(np.array([0.5]))[0] - GREY)).astype(int)
    joint = np.asarray(panel(query, results))
    each = np.asarray(panel(query, results, scale="each"))
    share = lambda pixels, c: (pixels == c).all(axis=-1).sum() / (240 * 240)  # noqa: E731
    assert round(share(joint, strongest()), 1) == 2.0  # the query and the stronger result
    assert round(share(joint, half), 1) == 1.0
    assert round(share(each, strongest()), 1) == 3.0
    assert round(share(each, half), 1) == 0.0
    assert top_value(results) == 2.0
    assert top_value([Tile(grey())]) == 0.0


def test_a_panel_wraps_its_results_and_is_the_same_every_time():
    seven = [tile(name=str(i), image=photo(seed=i)) for i in range(7)]
    short, long, again = (panel(tile(), some) for some in (seven[:5], seven, seven))
    assert long.width == short.width
    assert long.height > short.height + 2 * 120
    np.testing.assert_array_equal(np.asarray(long), np.asarray(again))


def test_panels_of_tiles_that_lack_something():
    lone = panel(tile(), [])
    assert strongest() in colours(lone)
    gone = panel(tile(), [Tile(None, np.ones((3, 3)), caption="gone"), Tile(None, None)])
    # Without its picture the map is shown by itself, opaque.
    assert tuple(np.rint(255 * colormap(np.ones(1))[0]).astype(int)) in colours(gone)
    no_maps = panel(Tile(grey()), [Tile(grey())])
    assert no_maps.height < gone.height
    empty = panel(tile(0.0), [tile(0.0)])
    assert (GREY,) * 3 in colours(empty)
    tiny = panel(tile(image=Image.new("RGB", (1, 900))), [tile(image=Image.new("RGB", (900, 1)))])
    assert tiny.size == panel(tile(image=Image.new("RGB", (1, 900))), [tile()]).size


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
    assert [shorten("abcdefghij", n, middle=True) for n in (10, 7, 1, 0)] == [
        "abcdefghij", "abc…hij", "…", "…"
    ]  # fmt: skip
    assert (shorten("abc defghi", 5), shorten("ab", 2)) == ("abc…", "ab")
    lines = wrap("one two three four", (13, False), 60)
    assert (" ".join(lines), len(lines) > 1) == ("one two three four", True)
    assert wrap("", (13, False), 100) == []


VOID = {"meta", "img", "wbr", "br"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that every tag is closed."""

    def __init__(self, document):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
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
    links = Table(["a", "b"], [[PageLink(NASTY, "q3"), 0.5]], "All", folded=True)
    tables = [Table([NASTY], [[NASTY]], NASTY, NASTY), links]
    read = Reader(page([row], title=NASTY, intro=NASTY, tables=tables))
    assert read.all("script") == []
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
    assert "prefers-color-scheme: dark" in document
    assert read.all("html") == [{"lang": "en"}]
    assert [a["class"] for a in read.all("p")].count("intro") == 2
    assert "Two lines." in read.text
    document.encode("utf-8")


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
    assert any("share one colour scale" in text for text in read.text)
    assert "Each map on its own scale" in page([Row(query, [tile(2.0), tile(1.0)])], scale="each")


def test_tables_on_a_page():
    table = Table(["map", "energy", "note"], [["a", 0.5, "x"], ["b", "0.25 (0.9)", "-"]], "Energy")
    read = Reader(page([], tables=[table]))
    assert read.text.count("0.25 (0.9)") == 1
    assert [a.get("class") for a in read.all("td")] == [None, "number", None] * 2
    assert read.all("img") == []


def test_a_page_in_pieces_is_the_page():
    cropped = Tile(photo(), np.ones((2, 2)), (10, 0, 50, 40), caption="c")
    rows = [Row(tile(), [tile(2.0)], title="a", notes="n"), Row(cropped, [])]
    table = Table(["a"], [["b"]])
    pieces = [page_head("T", "I", [table], cropped=True), *map(page_row, rows), PAGE_FOOT]
    assert "".join(pieces) == page(rows, title="T", intro="I", tables=[table])
    look = Look("each")
    pieces = [page_head("T", look=look), page_row(rows[0], look), PAGE_FOOT]
    assert "".join(pieces) == page(rows[:1], title="T", scale="each")
    assert "no evidence" not in page_head("T", maps=False)
    with pytest.raises(InputError, match=r'scale is \'all\'; give "joint"'):
        page([], scale="all")


def test_a_long_page_leaves_what_is_out_of_sight_for_later():
    look, row = Look(side=32, long=True), Row(tile(), [tile()], title="t", anchor="q7")
    document = page_head("T", look=look) + page_row(row, look) + PAGE_FOOT
    read = Reader(document)
    assert all((a["loading"], a["decoding"]) == ("lazy", "async") for a in read.all("img"))
    assert "section { content-visibility: auto;" in document
    assert read.all("section")[0]["id"] == "q7"
    assert "content-visibility" not in page([row])
    small = Look(side=32, quality=30)
    assert len(page_row(Row(tile(image=photo()), []), small)) < len(
        page_row(Row(tile(image=photo()), []), Look(side=32))
    )


@pytest.mark.parametrize("size", [(300, 200), (40, 90), (64, 64)])
def test_a_shrunk_tile_draws_the_same(size):
    full = Tile(photo(*size), np.eye(3), (10, 0, 30, 25), "c", "s")
    small = shrunk(full, 64)
    assert max(small.image.size) == 64
    assert (small.caption, small.subcaption, small.cropped) == ("c", "s", True)
    np.testing.assert_allclose(
        np.array(small.extent) / (*small.image.size, *small.image.size),
        np.array(full.extent) / (*size, *size),
    )
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
    """What a process of its own prints on both streams."""
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
        "sys.stdout.buffer.write(r.overlay(image, cam).tobytes());\n"
        "try: r.overlay(image, cam, cmap='viridis')\n"
        "except ValueError as error: sys.stderr.write(str(error))"
    )
    drawn = np.asarray(overlay(image, cam))
    assert_same_picture(np.frombuffer(found, np.uint8).reshape(40, 60, 3), drawn)
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
