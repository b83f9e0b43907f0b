"""The page, looked at by a browser: every way in, every question, and what goes wrong."""

import base64
import json
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from build_samples import quicken
from page_client import CHROMIUM, FLAGS, QUERY, Page, scenes_index, served
from rounding import stretch
from service_client import built
from service_client import explainer as explainer_of

from embedcam import PairExplainer
from embedcam.render.overlay import colormap

QUERY_SIZE = (96, 64)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on PATH")


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield scenes_index(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def service(explainer):
    with served(explainer) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def look(browser, service):
    """Opens the page; in the end nothing was complained of, and no other machine was asked."""
    seen: list[tuple[Page, bool]] = []

    def opened(at=service, *, refused=False, width=1280, **settings):
        page = browser.new_page(viewport={"width": width, "height": 800}, **settings)
        page.set_default_timeout(20_000)
        seen.append((Page(page, at.address), refused))
        return seen[-1][0]

    yield opened
    for page, refused in seen:
        page.page.close()
        # A refusal is answered with a 4xx, which the browser itself writes down.
        known = "Failed to load resource" if refused else "nothing"
        assert [one for one in page.complaints if known not in one] == []
        for url in page.asked:
            assert url.startswith((f"{page.address}/", f"blob:{page.address}/")), url


@pytest.fixture
def page(look):
    opened = look()
    opened.ask(QUERY)
    return opened


def transfer(page):
    script = """(bytes) => {
      const data = new DataTransfer();
      const raw = Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0));
      data.items.add(new File([raw], 'dropped.png', { type: 'image/png' }));
      return data;
    }"""
    return page.page.evaluate_handle(script, base64.b64encode(QUERY).decode())


def assert_shows(page, selector, cam, top=None, atol=0.006, signed=False):
    """The canvas shows a map: opacity is the value, or its magnitude, as a share of the top."""
    drawn, least = page.pixels(selector), min(float(np.min(cam)), 0.0)
    value = (stretch(cam - least, drawn.shape[:2]) + least) / (np.max(cam) if top is None else top)
    value = value if signed else np.maximum(value, 0)
    np.testing.assert_allclose(drawn[..., 3] / 255, np.abs(value), atol=atol)
    return drawn, value


def ring_of(values):
    """Where most matches, in the middle of that cell."""
    strongest = np.array(np.unravel_index(values.argmax(), values.shape))
    return pytest.approx(100 * (strongest + 0.5) / values.shape)


def numbers(page, selector):
    return [float(text.replace("\N{MINUS SIGN}", "-")) for text in page.texts(selector)]


def assert_adds_up(page, expected):
    *amounts, total = numbers(page, ".sum .value")
    assert total == round(expected, 3)
    assert total == pytest.approx(sum(amounts), abs=0.0005 * len(amounts) + 0.0005)
    return amounts


def test_a_picture_is_dropped(look, explainer):
    page = look()
    assert page.text("#about") == "30 images"
    data = transfer(page)
    page.page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    assert page.page.is_visible("#dropping")
    page.page.dispatch_event("body", "drop", {"dataTransfer": data})
    page.settle()
    assert page.page.is_hidden("#dropping")
    assert page.page.is_hidden("#intake")
    why = explainer.explain(QUERY)
    assert page.texts(".card .name") == why.labels
    assert page.texts(".card .id") == why.ids
    assert numbers(page, ".card .number") == [round(float(one), 3) for one in why.similarities]
    expected = f"result 2, label {why.labels[1]}, similarity {why.similarities[1]:.2f}"
    assert page.of_each(".card img", "one.alt")[1] == expected
    assert page.text("#status").startswith("5 results. Nearest: result 1, label ")
    assert page.problems() == []


def test_maps_are_drawn_as_python_draws_them(page, explainer):
    why = explainer.explain(QUERY)
    assert_shows(page, "#query-shot canvas", why.cam, atol=0.02)
    # Their own maps share one scale, each drawn with weights of one length.
    maps = [cam / norm for cam, norm in zip(why.neighbor_cams, why.neighbor_norms, strict=True)]
    top = max(cam.max() for cam in maps)
    for place, cam in enumerate(maps, 1):
        assert_shows(page, f".card:nth-child({place}) canvas", cam, top)
    before = page.pixels("#query-shot canvas")
    page.page.check("#finer")
    page.settle()
    cam = explainer.explain(QUERY, detail=2).cam
    drawn, _ = assert_shows(page, "#query-shot canvas", cam, atol=0.03)
    assert np.abs(drawn[..., 3].astype(int) - before[..., 3]).max() > 20


def test_colours_are_python_s(look):
    page = look()
    cam = np.linspace(-1, 1, 24).reshape(4, 6)
    filled = """async ([values, both]) => {
      const data = new Uint8ClampedArray(4 * 40 * 40);
      const { fill } = await import('./maps.js');
      fill(data, { rows: 4, columns: 6, values }, 0.8, both, 40);
      return [...data];
    }"""
    for both, name in ((False, "inferno"), (True, "coolwarm")):
        found = page.page.evaluate(filled, [cam.ravel().tolist(), both])
        drawn = np.reshape(found, (40, 40, 4))
        shown = cam if both else np.maximum(cam, -1)
        across = stretch(shown - shown.min(), (40, 40)) + shown.min()
        value = np.clip(across / 0.8, -1 if both else 0, 1)
        colours = colormap((1 + value) / 2 if both else value, name) * 255
        # One entry of the table either way, where a value falls between two.
        np.testing.assert_allclose(drawn[..., :3], colours, atol=6)
        assert np.mean(np.abs(drawn[..., :3] - colours) < 1) > 0.97
        np.testing.assert_allclose(drawn[..., 3], np.abs(value) * 255, atol=0.51)


def test_a_point_is_clicked(page, explainer):
    before = page.pixels(".card:nth-child(2) canvas")
    page.page.locator(".cells [role=gridcell]").nth(2 * 6 + 3).click()
    assert page.text("#note") == "What in the results matches row 3, column 4."
    ids = page.texts(".card .id")
    maps = [one.point(2, 3) for one in PairExplainer(explainer).receipts(QUERY, ids)]
    top = max(one.max() for one in maps)
    for place, values in enumerate(maps, 1):
        assert_shows(page, f".card:nth-child({place}) canvas", values, top)
        assert page.ring(place) == ring_of(values)
    asked = len(page.asked)
    page.page.locator(".cells [role=gridcell]").nth(5).click()
    assert len(page.asked) == asked  # without any request
    page.page.keyboard.press("Escape")
    np.testing.assert_array_equal(page.pixels(".card:nth-child(2) canvas"), before)
    assert page.page.is_hidden("#back")


def test_a_point_behind_a_head_with_slopes_held(look, tmp_path):
    why = explainer_of(built(tmp_path, "other"), "other")
    with served(why) as service:
        page = look(service)
        page.ask(QUERY)
        page.page.locator(".cells [role=gridcell]").nth(6).click()
        page.page.wait_for_selector(".card:nth-child(5) .ring")
        ids = page.texts(".card .id")
        assert page.ring(5) == ring_of(PairExplainer(why).receipt(QUERY, ids[4]).point(1, 2))
        page.page.hover(".card:nth-child(1) button.frame")
        assert "slopes of activation functions held" in page.text("#panel")
        page.page.wait_for_load_state("networkidle")  # or pictures are asked for in vain


def test_a_result_is_hovered(page, explainer):
    assert page.text("#panel-title") == "Ask why"
    page.page.hover(".card:nth-child(2) button.frame")
    assert page.text("#panel-title") == "Why result 2 matches"
    receipt = PairExplainer(explainer).receipt(QUERY, page.texts(".card .id")[1])
    assert assert_adds_up(page, receipt.similarity)[0] == round(receipt.shared, 3)
    assert page.texts(".sum tbody th")[0] == "shared with the average image"
    assert receipt.reasons(1)[0].words in page.texts(".sum tbody th span:first-child")
    page.wait("[...document.querySelectorAll('.exemplars img')].every((one) => one.complete)")
    assert all(page.of_each(".exemplars img", "one.naturalWidth > 0"))
    assert_tells_places(page, receipt)
    cells = receipt.query.cells
    assert_shows(page, "#query-shot canvas", cells, np.abs(cells).max(), signed=True)
    # It goes with the mouse; a click keeps it.
    page.page.mouse.move(5, 5)
    page.page.wait_for_selector(".card:nth-child(2):not(.lit)")
    page.page.click(".card:nth-child(2) button.frame")
    page.page.mouse.move(5, 5)
    page.page.hover(".card:nth-child(4) button.frame")
    assert page.text("#panel-title") == "Why result 2 matches"
    assert page.problems() == []
    page.page.click("#panel .close")
    assert page.text("#panel-title") == "Ask why"
    for what in (".name", ".far", ".pick", ".caption"):
        page.page.hover(f".card:nth-child(3) {what}")
        assert page.text("#panel-title") == "Why result 3 matches"
        page.page.mouse.move(5, 5)
        page.page.wait_for_selector(".card:nth-child(3):not(.lit)")
    page.page.focus(".card:nth-child(4) .pick")
    assert page.text("#panel-title") == "Why result 4 matches"


def assert_tells_places(page, receipt):
    """The list of places, in numbers and words, and their outlines in both pictures."""
    places, beyond = receipt.places(), receipt.unshared
    assert places
    assert page.texts(".place .share b") == [place.told(beyond) for place in places]
    assert page.texts(".place .unseen") == [
        f"The {place.where('query')} of your picture matches the {place.where('result')} of the "
        f"result: {place.told(beyond)} of what they share beyond the average"
        for place in places
    ]
    for at, of in enumerate(("query", "result"), 1):
        regions = {place.region(of).tobytes() for place in places}
        found = page.page.locator(f".pair figure:nth-child({at}) .outlines .link")
        assert found.count() == len(regions)
    assert all(page.of_each(".crop img", "one.complete && one.naturalWidth > 0"))


def boxed(page, explainer, box):
    """The receipts of a part of the query, in shares of it."""
    width, height = QUERY_SIZE
    ends = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return PairExplainer(explainer).receipts(QUERY, page.texts(".card .id"), box=ends)


def assert_answers_the_box(page, label, receipts):
    page.until(lambda: page.text("#status").startswith(f"{label}. Result"))
    assert page.text("#note") == "Red in the results matches what is in the box."
    top = max(np.abs(one.result.cells).max() for one in receipts)
    for place, one in enumerate(receipts, 1):
        shown = f".card:nth-child({place}) canvas"
        assert_shows(page, shown, one.result.cells, top, atol=0.012, signed=True)
    best = int(np.argmax([one.query.cells.sum() for one in receipts]))
    assert f"Result {best + 1} has most of it" in page.text("#status")


def test_a_part_is_asked_about_by_keyboard(page, explainer):
    before = page.pixels(".card:nth-child(1) canvas")
    page.page.focus("#box-button")
    page.page.keyboard.press("Enter")
    label = "document.activeElement.getAttribute('aria-label')"
    assert page.page.evaluate(label) == "Box from 25% to 75% across and 25% to 75% down"
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowLeft", "Shift+ArrowDown"):
        page.page.keyboard.press(key)
    assert page.page.evaluate(label) == "Box from 35% to 80% across and 20% to 75% down"
    receipts = boxed(page, explainer, (0.35, 0.2, 0.8, 0.75))
    assert_answers_the_box(page, page.page.evaluate(label), receipts)
    assert page.problems() == []
    page.page.hover(".card:nth-child(2) button.frame")
    assert page.text("#panel-title") == "What result 2 has of the box"
    assert_adds_up(page, receipts[1].similarity)
    assert "outside the box" in page.texts(".sum tbody th")
    assert_tells_places(page, receipts[1])
    page.page.focus(".box")
    page.page.keyboard.press("Escape")
    assert page.page.is_hidden(".box")
    assert page.page.evaluate("document.activeElement.id") == "box-button"
    page.page.mouse.move(5, 5)
    page.until(lambda: page.text("#note").startswith("Bright parts"))
    np.testing.assert_array_equal(page.pixels(".card:nth-child(1) canvas"), before)


def test_a_part_is_asked_about_by_mouse(page, explainer):
    page.page.click("#box-button")
    frame = page.page.locator("#query-shot .shot").bounding_box()

    def drag(*ends):
        x0, y0, x1, y1 = (
            frame["xy"[at % 2]] + end * frame["width" if at % 2 == 0 else "height"]
            for at, end in enumerate(ends)
        )
        page.page.mouse.move(x0, y0)
        page.page.mouse.down()
        page.page.mouse.move(x1, y1, steps=3)
        page.page.mouse.up()

    drag(0.7, 0.9, 0.3, 0.5)
    label = page.page.locator(".box").get_attribute("aria-label")
    assert label == "Box from 30% to 70% across and 50% to 90% down"
    assert_answers_the_box(page, label, boxed(page, explainer, (0.3, 0.5, 0.7, 0.9)))
    drag(0.5, 0.6, 0.5, 0.6)  # A click is no box.
    assert page.page.locator(".box").get_attribute("aria-label") == label
    page.page.click("#box-button")
    assert page.page.is_hidden(".box")
    page.page.locator(".cells [role=gridcell]").nth(2).click()
    assert page.text("#note") == "What in the results matches row 1, column 3."


def test_two_results_are_compared(page, explainer):
    page.page.click(".card:nth-child(4) .pick")
    assert "another result" in page.text("#panel")
    page.page.click(".card:nth-child(2) .pick")
    page.page.wait_for_selector("#panel .sum")
    assert page.text("#panel-title") == "Why 2 is above 4"
    ids = page.texts(".card .id")
    made = PairExplainer(explainer).above(QUERY, ids[1], ids[3])
    assert_adds_up(page, made.score)
    assert page.text("#note") == "Red speaks for result 2, blue for result 4."

    def is_red(selector, row, column):
        """Whether the middle of a cell is rather red than blue."""
        drawn = page.pixels(selector).astype(int)
        red, _, blue, _ = drawn[tuple(int((n + 0.5) * len(drawn) / 6) for n in (row, column))]
        return red > blue

    values = made.query.cells
    strongest = np.unravel_index(np.abs(values).argmax(), values.shape)
    assert is_red("#query-shot canvas", *strongest) == (values[strongest] > 0)
    # Either's own map in its own colour: where it matches the query best, that is.
    for place, own in ((2, made.result), (4, made.rival)):
        strongest = np.unravel_index(own.result.cells.argmax(), values.shape)
        for shown in (f".card:nth-child({place})", f".three figure:nth-child({place // 2 + 1})"):
            assert is_red(f"{shown} canvas", *strongest) == (place == 2), shown
        card = page.page.get_attribute(f".card:nth-child({place})", "class")
        assert ("for" if place == 2 else "against") in card
    assert page.page.locator(".pick[aria-pressed=true]").count() == 2
    assert page.problems() == []
    # And told apart by the stored weights.
    receipt = page.pixels("#query-shot canvas")
    assert page.text("#stored") == "Show the stored weights’ map"
    page.page.click("#stored")
    page.until(lambda: page.text("#stored") == "Show the map that adds up")
    assert page.text("#note") == "Bright parts speak for result 2 rather than result 4."
    assert not np.array_equal(page.pixels("#query-shot canvas"), receipt)
    assert page.page.evaluate("document.activeElement.id") == "stored"
    page.page.click("#stored")
    page.until(lambda: page.text("#stored") == "Show the stored weights’ map")
    np.testing.assert_array_equal(page.pixels("#query-shot canvas"), receipt)
    page.page.keyboard.press("Escape")
    assert page.page.locator(".pick[aria-pressed=true]").count() == 0


def test_one_of_the_index_is_tried_and_its_result_becomes_the_query(look, explainer):
    page = look()
    page.page.wait_for_selector("#tries .try")
    assert page.of_each(".try img", "one.alt") == list("013579")  # from all over the index
    page.wait("[...document.querySelectorAll('.try img')].every((one) => one.naturalWidth > 0)")
    page.page.locator(".try").nth(2).click()
    page.settle()
    assert page.texts(".card .id")[0] == explainer.index.ids[11]
    wanted = page.texts(".card .id")[1]
    page.page.click(".card:nth-child(2) button.frame")
    page.page.click("#panel .buttons button")
    page.wait("(id) => document.querySelector('.card .id')?.textContent === id", wanted)
    page.settle()
    assert page.text("#query-title") == f"From the index: {wanted}"
    assert page.page.url == f"{page.address}/#{urlencode({'id': wanted})}"


def test_an_address_is_an_indexed_query(look, explainer):
    page = look()
    first, second = explainer.index.ids[4], explainer.index.ids[17]

    def shows(name):
        page.wait("(id) => document.querySelector('.card .id')?.textContent === id", name)
        page.settle()

    for name in (first, second):  # one that is opened, and one that is typed over it
        page.page.goto(f"{page.address}/#{urlencode({'id': name})}")
        shows(name)
    page.page.reload()
    shows(second)
    page.page.go_back()
    shows(first)
    page.ask(QUERY)  # one's own picture has no address
    assert page.page.url == f"{page.address}/"
    assert page.text("#query-title") == "Your picture"
    page.page.go_back()
    shows(first)
    page.page.evaluate("location.hash = ''")
    page.page.wait_for_selector("#intake:visible")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere.png", "..", "//evil.example/x", "a?b=c#d", "%2e%2e/%00", "\0", "\u202e",
        "<img src=x onerror=document.title='owned'>", "javascript:alert(1)", "a\r\nSet-Cookie: b=c",
        "0/../../healthz?", "x" * 3000,
    ],
)  # fmt: skip
def test_a_strange_address_is_an_id_that_no_image_has(look, name):
    page = look(refused=True)
    page.page.goto(f"{page.address}/#{urlencode({'id': name})}")
    page.page.wait_for_selector("#problem")
    told = page.text("#problem-text")
    assert "no image of this id" in told or "nothing at this address" in told
    page.page.wait_for_selector("#query", state="hidden")
    page.ask(QUERY)  # and the page goes on


def test_how_many_and_how_strong(page):
    assert float(page.style("#query-shot canvas", "opacity")) == pytest.approx(0.7)
    page.page.fill("#strength", "0")
    assert page.style(".card canvas", "opacity") == "0"
    assert page.text("#strength-shown") == "0%"
    assert page.texts("#count option") == ["3", "5", "10", "15", "20", "30"]
    page.page.select_option("#count", "10")
    page.settle(10)
    page.page.select_option("#count", "3")
    page.settle(3)


def test_with_the_keyboard_alone(look):
    page = look()
    keys, choosers = page.page.keyboard, list[Any]()
    # Well before it is needed: the browser may otherwise open a dialog of its own.
    page.page.on("filechooser", lambda one: choosers.append(one))
    focused = lambda what: page.page.evaluate(f"document.activeElement.{what}")  # noqa: E731

    def tab_to(selector):
        for _ in range(30):
            keys.press("Tab")
            if page.page.evaluate("(one) => document.activeElement.matches(one)", selector):
                assert page.style(":focus", "outlineStyle") == "solid"
                return
        raise AssertionError(f"{selector} is not reached")

    keys.press("Tab")
    assert focused("textContent") == "Skip to the results"
    tab_to("#intake button")
    keys.press("Enter")
    page.until(lambda: bool(choosers))
    choosers[0].set_files({"name": "query.png", "mimeType": "image/png", "buffer": QUERY})
    page.settle()
    tab_to("[role=gridcell]")
    assert focused("ariaLabel") == "row 4, column 4"
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "Enter"):
        keys.press(key)
    assert page.text("#note") == "What in the results matches row 2, column 5."
    assert focused("ariaSelected") == "true"
    keys.press("Escape")
    assert focused("ariaSelected") == "false"
    for selector in ("#strength", "#count", "button.frame"):
        tab_to(selector)
    assert page.text("#panel-title") == "Why result 1 matches"
    keys.press("Enter")
    assert focused("id") == "panel-title"
    assert page.text("#status").startswith("Receipt of result 1: similarity 0.")
    keys.press("Escape")
    assert focused("ariaLabel").startswith("result 1, label ")
    for selector in (".pick", ".card:nth-child(3) .pick"):
        tab_to(selector)
        keys.press("Space")
    page.page.wait_for_selector("#panel .sum")
    page.wait("document.getElementById('status').textContent.includes('nearer')")


def luminance(colour):
    parts = [float(one) / 255 for one in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, *names):
    """WCAG's, of two colours of the style sheet."""
    script = """(names) => names.map((name) => {
      document.body.style.caretColor = `var(--${name})`;
      return getComputedStyle(document.body).caretColor;
    })"""
    low, high = sorted(map(luminance, page.page.evaluate(script, names)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(look, scheme):
    page = look(color_scheme=scheme)
    dark = lambda: luminance(page.style("body", "backgroundColor")) < 0.1  # noqa: E731
    assert dark() == (scheme == "dark")
    for ink, paper, least in (
        ("ink", "paper", 12), ("ink", "card", 12), ("quiet", "paper", 4.5), ("quiet", "card", 4.5),
        ("quiet", "mat", 4.5), ("on-accent", "accent", 4.5), ("accent", "paper", 4.5),
        ("bad", "bad-mat", 4.5), ("ink", "bad-mat", 7), ("for", "card", 4.5),
        ("against", "card", 4.5), ("good", "mat", 3),
    ):  # fmt: skip
        assert contrast(page, ink, paper) >= least, (ink, paper)
    other = "light" if scheme == "dark" else "dark"
    page.page.get_by_role("button", name=f"Use {other} colours").click()
    assert dark() == (scheme != "dark")
    page.page.reload()
    assert dark() == (scheme != "dark")


def test_a_narrow_window(look):
    page = look(width=360, has_touch=True, reduced_motion="reduce")
    assert page.problems() == []
    page.ask(QUERY)
    assert page.problems() == []
    assert page.page.is_hidden("#panel")
    page.page.locator(".card:nth-child(2) button.frame").tap()
    assert page.text("#panel-title") == "Why result 2 matches"
    assert page.problems() == []
    assert page.style("#panel", "animationName") == "none"
    page.page.locator("#panel .close").tap()
    assert page.page.is_hidden("#panel")
    page.page.locator(".cells [role=gridcell]").nth(0).tap()
    assert page.text("#note") == "What in the results matches row 1, column 1."


@pytest.mark.parametrize("width", [740, 1020, 1300])
def test_a_receipt_fits_its_panel(look, width):
    page = look(width=width)
    page.ask(QUERY)
    page.page.locator(".card:nth-child(2) button.frame").hover()
    page.page.wait_for_selector(".place .share")
    assert page.problems() == []
    sizes = page.page.evaluate(
        """() => [".share", ".crop"].map((name) => [...document.querySelectorAll(name)]
          .map((one) => one.getBoundingClientRect()).map((box) => [box.width, box.height]))"""
    )
    shares, crops = sizes
    assert max(height for _, height in shares) < 60  # two lines, and no number is broken
    assert min(side for crop in crops for side in crop) > 40
    inside = "(one) => one.scrollWidth <= one.clientWidth"
    assert page.page.locator("#panel").evaluate(inside)


def altered(page, change):
    """Answers of /explain as another index would give them."""

    def handle(route):
        answer = route.fetch()
        body = answer.json()
        change(body)
        route.fulfill(response=answer, body=json.dumps(body))

    page.page.route("**/explain?*", handle)


def test_what_is_not_to_be_trusted_says_so(look):
    page = look()
    altered(page, lambda body: body.update(trust=0.21, trusted=False, direct=False))
    page.ask(QUERY)
    assert page.text("#trust-number") == "0.21"
    assert "Not to be trusted" in page.text("#trust")
    meter = page.page.get_by_role("meter", name="Trust")
    assert meter.get_attribute("aria-valuenow") == "0.21"
    assert meter.get_attribute("aria-valuetext").startswith("0.21. Not to be trusted")
    page.page.unroute("**/explain?*")
    altered(page, lambda body: body.update(trust=None, trusted=None))
    page.ask(QUERY)
    assert page.page.is_hidden("#trust")


def test_a_replaced_picture_says_so_and_has_no_map_over_it(look):
    page = look()
    altered(page, lambda body: body["neighbors"][1].update(file="changed"))
    page.ask(QUERY)
    assert [text for text in page.texts(".card .strip") if text] == ["Changed since the build"]
    drawn = [page.pixels(f".card:nth-child({place}) canvas").any() for place in range(1, 6)]
    assert drawn == [True, False, True, True, True]
    names = page.of_each(".card button.frame", "one.ariaLabel")
    assert [", changed since the build." in name for name in names].index(True) == 1


def test_names_are_text_whatever_they_hold(look):
    page = look(width=360)
    nasty = "<img src=x onerror=document.title='owned'><script>1</script>\u202e\0\ud800"
    altered(page, lambda body: body["neighbors"][0].update(label=nasty + "x" * 3000))
    page.ask(QUERY)
    assert page.text(".card:nth-child(1) .name").startswith("<img src=x onerror=")
    assert page.page.locator(".card img[src=x]").count() == 0
    assert page.page.title().startswith("embedcam")
    assert page.problems() == []


def test_a_text_file_is_refused_kindly_and_a_picture_is_pasted(look):
    page = look(refused=True)
    page.ask(QUERY)
    page.pick(b"dear search engine", "letter.txt")
    page.page.wait_for_selector("#problem")
    assert page.text("#problem-text").startswith("The picture is not an image of a known kind")
    for hidden in ("#retry", "#query-shot", "#strength"):  # no empty frame, and nothing to slide
        assert page.page.is_hidden(hidden)
    assert page.page.locator(".card:visible").count() == 0
    assert page.problems() == []
    paste = "(data) => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))"
    page.page.evaluate(paste, transfer(page))
    page.settle()
    assert page.page.is_hidden("#problem")


def test_a_service_that_is_busy_or_gone(look, explainer):
    with served(explainer) as service:
        page = look(service, refused=True)
        page.page.wait_for_load_state("networkidle")  # the pictures to try have come
        pipeline = service.app.state.pipeline
        with ExitStack() as places:
            for _ in range(16):
                places.enter_context(pipeline.place())
            page.pick(QUERY)
            page.page.wait_for_selector("#problem")
            assert page.text("#problem-text").startswith("16 requests are being worked on")
        page.page.click("#retry")
        page.settle()
        service.stop()
        page.pick(QUERY)
        page.page.wait_for_selector("#problem")
        assert page.text("#problem-text") == "The service does not answer. Is it still running?"
        service.start()
        page.page.keyboard.press("Enter")  # the button has the focus
        page.settle()


def test_pictures_that_went_and_no_own_maps(look, tmp_path):
    why = explainer_of(built(tmp_path, own_maps=False))
    with served(why) as service:
        page = look(service, refused=True)
        (tmp_path / "photos" / why.explain(QUERY).ids[1]).unlink()
        page.pick(QUERY)
        page.page.wait_for_selector(".card:nth-child(2) .absent:visible")
        assert "cannot be read any more" in page.text(".card:nth-child(2)")
        page.page.wait_for_selector("#panel:not(:has(.busy))")
        assert page.pixels(".card:nth-child(3) canvas").max() == 0
        page.page.hover(".card:nth-child(2) button.frame")
        assert "leave it out" in page.text("#panel")
        page.page.hover(".card:nth-child(3) button.frame")
        assert page.page.locator("#panel .sum").count() == 1
        assert page.pixels(".card:nth-child(3) canvas").max() > 200
