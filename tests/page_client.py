"""A service on a free port of this machine, and a browser that looks at its page."""

import base64
import io
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image
from service_client import data_of

from embedcam import EmbeddingNetwork, Explainer, Recipe, build_index, find_images
from embedcam.demo.digits_network import LAYER, digits_preprocess, initialise
from embedcam.demo.scenes import SceneMaker
from embedcam.service import create_app
from embedcam.service.server import address_of, bind

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)


SCENES = SceneMaker(0, 96)
QUERY = data_of(Image.fromarray(SCENES.scene("pair", 3).pixels[16:80]))
"""Wider than high."""


def scenes_index(folder, texts=None):
    """Thirty scenes, labelled by their digit; a small network, its maps of 6 x 6."""
    for number in range(30):
        path = folder / "scenes" / str(number % 10) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(SCENES.scene("gallery", number).pixels).save(path)
    module = initialise(channels=24, embedding_size=8, seed=3).eval()
    settings = {"preprocess": digits_preprocess(48), "name": "digits", "texts": texts}
    made = EmbeddingNetwork(module, LAYER, **settings)
    source, recipe = find_images(folder / "scenes"), Recipe(triplets=4)
    build_index(source, made, folder / "index", recipe, progress=False)
    return Explainer(folder / "index", made)


class Service:
    """A running service; `stop` and `start` keep its port."""

    def __init__(self, explainer):
        self._explainer, self._port = explainer, 0
        self.start()

    def start(self):
        self.app = create_app(self._explainer)
        bound = bind("127.0.0.1", self._port)
        self._port, self.address = bound.getsockname()[1], address_of(bound)
        config = uvicorn.Config(self.app, log_config=None, ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]})
        self._thread.start()
        while not self.app.state.pipeline.ready:
            time.sleep(0.01)

    def stop(self):
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def served(explainer):
    service = Service(explainer)
    try:
        yield service
    finally:
        service.stop()


class Page:
    """A page that is looked at, and everything it said and asked for."""

    def __init__(self, page, address):
        self.page, self.address = page, address
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(address)
        self.wait("document.getElementById('about').textContent !== ''")

    def wait(self, script, given=None):
        """Until a script is true. Playwright's own waiting needs `eval`, which the page forbids."""
        self.until(lambda: bool(self.page.evaluate(script, given)), script)

    def until(self, true, what=""):
        for _ in range(1000):
            if true():
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never true: {what}")

    def pick(self, data, name="query.png"):
        kind = "image/png" if name.endswith("png") else "text/plain"
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})

    def settle(self, cards=5):
        self.settle_words(cards)
        self.wait("document.querySelector('.cells') && !document.querySelector('.panel .busy')")

    def settle_words(self, cards=5):
        self.page.wait_for_selector("body[data-stage=answered]")
        self.wait(
            """(cards) => document.querySelectorAll('.card').length === cards
                && [...document.querySelectorAll('.card img')].every((one) => !one.hidden)""",
            cards,
        )

    def ask(self, data):
        self.pick(data)
        self.settle()

    def text(self, selector):
        return str(self.page.inner_text(selector))

    def texts(self, selector):
        return list(self.page.locator(selector).all_inner_texts())

    def pixels(self, selector):
        drawn = self.page.eval_on_selector(selector, "(canvas) => canvas.toDataURL()")
        data = base64.b64decode(drawn.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))

    def style(self, selector, name):
        script = "(one, name) => getComputedStyle(one)[name]"
        return str(self.page.eval_on_selector(selector, script, name))

    def of_each(self, selector, script):
        return self.page.eval_on_selector_all(selector, f"(all) => all.map((one) => {script})")

    def ring(self, place):
        """The middle of a card's ring in percent, (y, x)."""
        ring = self.page.locator(f".card:nth-child({place}) .ring").first
        return [float(ring.get_attribute(name).rstrip("%")) for name in ("cy", "cx")]

    def problems(self):
        """Of every image, button and field that cannot be told by its name, a line."""
        return list(self.page.evaluate(PROBLEMS))


PROBLEMS = """() => {
  const seen = (one) => one.checkVisibility();
  const lines = [];
  for (const one of document.querySelectorAll('img')) {
    if (!one.hasAttribute('alt')) lines.push('no alt: ' + one.outerHTML);
    if (seen(one) && !one.alt && !one.closest('.brand')) lines.push('empty alt: ' + one.outerHTML);
  }
  for (const one of document.querySelectorAll('button, a, select, input, [role=gridcell]')) {
    if (!seen(one) || one.getAttribute('aria-hidden')) continue;
    const name = one.getAttribute('aria-label') || one.textContent.trim()
      || [...(one.labels ?? [])].map((label) => label.textContent).join();
    if (!name) lines.push('no name: ' + one.outerHTML);
  }
  const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
  for (const id of ids.filter((one, place) => ids.indexOf(one) !== place)) lines.push('two ' + id);
  for (const one of document.querySelectorAll('[aria-labelledby]')) {
    if (!document.getElementById(one.getAttribute('aria-labelledby'))) lines.push(one.outerHTML);
  }
  if (document.documentElement.scrollWidth > innerWidth) lines.push('wider than the window');
  return lines;
}"""
