"""Words on the page: typed, shown, compared, by keyboard and for who does not see it."""

import numpy as np
import pytest
from build_samples import quicken
from page_client import CHROMIUM, FLAGS, QUERY, Page, scenes_index, served
from test_page import assert_shows, numbers
from text_samples import tower

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on PATH")


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield scenes_index(tmp_path_factory.mktemp("page"), lambda texts: tower(texts, 8))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def service(explainer):
    with served(explainer) as running:
        yield running


@pytest.fixture
def page(browser, service):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(20_000)
    opened = Page(page, service.address)
    yield opened
    page.close()
    assert opened.complaints == []


def typed(page, text, above=None):
    first = page.page.is_visible("#text-first")
    page.page.fill("#text-first" if first else "#text-again", text)
    if above is not None:
        page.page.fill("#text-above", above)
    page.page.keyboard.press("Enter")
    page.settle_words()


def test_words_are_typed_and_their_maps_drawn(page, explainer):
    page.page.wait_for_selector("#text-first")
    typed(page, "a seven <b>")
    expected = explainer.explain_text("a seven <b>")
    assert page.texts(".card .name") == expected.labels
    assert page.texts(".card .id") == expected.ids
    assert numbers(page, ".card .number") == [round(float(n), 3) for n in expected.similarities]
    top = max(cam.max() for cam in expected.cams)
    for place, cam in enumerate(expected.cams, 1):
        assert_shows(page, f".card:nth-child({place}) canvas", cam, top, atol=0.02)
    quoted = "\N{LEFT DOUBLE QUOTATION MARK}a seven <b>\N{RIGHT DOUBLE QUOTATION MARK}"
    assert page.text("#words-note") == f"Bright parts answer {quoted}."
    assert page.page.is_hidden("#query")
    assert page.page.is_hidden("#panel")
    assert page.problems() == []
    # For who does not see it: how many came, which is nearest, and where it answers.
    best = np.unravel_index(expected.cams[0].argmax(), (6, 6))
    where = f"answers most at row {best[0] + 1}, column {best[1] + 1} of 6 by 6"
    said = page.text("#status")
    assert said.startswith("5 results. Nearest: result 1, label ")
    assert where in said
    assert where in page.page.get_attribute(".card:nth-child(1) button.frame", "aria-label")


def test_two_texts_are_compared(page, explainer):
    typed(page, "a seven")
    typed(page, "a seven", "a four")
    expected = explainer.explain_text("a seven", above="a four")
    top = max(np.abs(cam).max() for cam in expected.signed_cams)
    for place, cam in enumerate(expected.signed_cams, 1):
        assert_shows(page, f".card:nth-child({place}) canvas", cam, top, atol=0.02, signed=True)
    assert "Red speaks for" in page.text("#words-note")
    assert (page.text("#words-low"), page.text("#words-high")) == ("a four", "a seven")
    first = expected.results[0]
    above = f"{first.similarity:.3f} above {first.rival_similarity:.3f}"
    assert page.texts(".card .number")[0].replace("\N{MINUS SIGN}", "-") == above
    assert page.problems() == []


def test_an_address_names_words_and_back_leads_out(page, service):
    typed(page, "a seven")
    assert page.page.evaluate("location.hash") == "#text=a+seven"
    typed(page, "a cat", "a dog")
    page.page.go_back()
    page.wait("document.getElementById('text-again').value === 'a seven'")
    page.settle_words()
    page.page.go_back()
    page.page.wait_for_selector("body[data-stage=empty]")
    assert page.page.is_visible("#text-first")
    page.page.goto(f"{service.address}/#text=a+cat&above=a+dog")
    page.page.reload()
    page.settle_words()
    assert page.page.input_value("#text-above") == "a dog"


def test_by_keyboard_alone_and_on_to_a_picture(page):
    page.page.focus("#text-first")
    page.page.keyboard.type("a seven")
    page.page.keyboard.press("Enter")
    page.settle_words()
    assert page.page.evaluate("document.activeElement.id") == "text-again"
    for _ in range(8):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.className") == "frame":
            break
    assert "Search with this picture" in page.page.evaluate("document.activeElement.ariaLabel")
    page.page.keyboard.press("Enter")
    page.settle()
    assert page.text("#query-title").startswith("From the index: ")
    assert page.page.is_hidden("#words")
    page.ask(QUERY)
    assert page.page.is_visible("#panel")


def test_a_refusal_is_said_and_asked_again(page, service, explainer):
    tower_of, network = explainer.network.texts, explainer.network
    typed(page, "a seven")
    network.texts = None
    try:
        page.page.fill("#text-again", "a cat")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("body[data-stage=failed]")
        assert "embeds pictures alone" in page.text("#problem-text")
        page.complaints.clear()  # the browser writes a 501 down
        assert page.page.input_value("#text-again") == "a cat"
    finally:
        network.texts = tower_of
    page.page.keyboard.press("Enter")
    page.settle_words()


def test_without_a_tower_no_box_is_offered(browser, service, explainer):
    tower_of, explainer.network.texts = explainer.network.texts, None
    try:
        page = browser.new_page()
        Page(page, service.address)
        assert page.is_hidden("#text-first")
        page.close()
    finally:
        explainer.network.texts = tower_of


@pytest.mark.parametrize("width", [360, 800])
def test_it_fits_narrow_windows(browser, service, width):
    page = browser.new_page(viewport={"width": width, "height": 700})
    opened = Page(page, f"{service.address}/#text=a+seven&above=a+four")
    opened.settle_words()
    assert opened.problems() == []
    page.close()
