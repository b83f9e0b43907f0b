"""One network tried: loaded, an index built with it, a query explained, a receipt, an ONNX file."""

import json
import logging
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from embedcam import EmbedcamError, Explainer, PairExplainer, build_index, find_images, load_network
from embedcam.export import export_onnx
from embedcam.network import EmbeddingNetwork
from embedcam.pairs import Receipt

_PICTURES = 8
_SIDES = (120, 96)


@dataclass
class Tried:
    """What came of one network.

    failed: the step that did not work, empty where all did; said: the sentence it was refused
    with, or how a traceback ended; crashed: whether it was a traceback; kind: of the head;
    positions, parts, remainder: what receipts give to positions, to what is none, and to neither,
    as shares of the similarity, nothing put apart; medians of three; seconds: by step.
    """

    name: str
    layer: str = ""
    grid: tuple[int, int] | None = None
    channels: int = 0
    width: int = 0
    kind: str = ""
    exact: bool | None = None
    held: tuple[str, ...] = ()
    positions: float = 0.0
    parts: float = 0.0
    remainder: float = 0.0
    chosen: str = ""
    failed: str = ""
    said: str = ""
    crashed: bool = False
    onnx: str = ""
    parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether every step but the export did, without any option."""
        return not self.failed

    def line(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self))


def read(line: str) -> Tried:
    """Return what `Tried.line` wrote."""
    values = json.loads(line)
    for name in ("grid", "held"):
        values[name] = values[name] and tuple(values[name])
    return Tried(**values)


def draw_pictures(folder: Path) -> None:
    """Write a few scenes of disks or bars on colored grounds, of two kinds."""
    generator = np.random.default_rng(0)
    for number in range(_PICTURES):
        ground, shape = (tuple(generator.integers(0, 256, 3).tolist()) for _ in range(2))
        picture = Image.new("RGB", _SIDES, ground)
        pen = ImageDraw.Draw(picture)
        for _ in range(2):
            x, y = (int(generator.integers(0, side - 40)) for side in _SIDES)
            if number % 2:
                pen.ellipse((x, y, x + 36, y + 36), shape)
            else:
                pen.rectangle((x, y, x + 14, y + 38), shape)
        kind = folder / ("disks" if number % 2 else "bars")
        kind.mkdir(exist_ok=True)
        noise = generator.integers(-12, 13, (*_SIDES[::-1], 3))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(kind / f"{number}.png")


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Yield a list of what is said when a network is loaded."""
    said: list[str] = []
    logger, handler = logging.getLogger("embedcam.network"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Trial:
    """The steps of one network, each timed, the first that fails the last."""

    def __init__(self, name: str, settings: dict[str, object], export: bool) -> None:
        self.tried, self._settings, self._export = Tried(name), settings, export

    def run(self) -> Tried:
        """Return what came of all the steps."""
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder) / "pictures"
            pictures.mkdir()
            draw_pictures(pictures)
            try:
                self._steps(pictures, Path(folder) / "index")
            except EmbedcamError as error:
                self.tried.said = str(error)
            except Exception as error:
                self.tried.crashed = True
                self.tried.said = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
                traceback.print_exc()
        return self.tried

    def _steps(self, pictures: Path, index: Path) -> None:
        tried = self.tried
        with self._step("load"):
            with _logged() as said:
                network = load_network(tried.name, **self._settings)
            tried.layer, tried.chosen = network.layer, " ".join(said)
            tried.parameters = sum(one.numel() for one in network.module.parameters())
        with self._step("build"):
            build_index(find_images(pictures), network, index, progress=False, workers=1)
            self._describe(network)
        paths = sorted(pictures.rglob("*.png"))
        with Explainer(index, network) as explainer:
            with self._step("explain"):
                # Not an indexed picture: upside down.
                query = Image.open(paths[0]).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
                explanation = explainer.explain(query)
                if not np.isfinite(explanation.signed_cam).all():
                    raise ArithmeticError("the map is not finite")
            with self._step("receipt"):
                results = [one.id for one in explanation.neighbors()[:3]]
                receipts = PairExplainer(explainer).receipts(query, results, centred=False)
            self._read(receipts)
        if self._export:
            self._try_export(index, network)

    def _describe(self, network: EmbeddingNetwork) -> None:
        features = network.forward(network.probe_images())
        maps, kind = features.activations[0], network.head_kind
        self.tried.grid = (maps.shape[1], maps.shape[2])
        self.tried.channels, self.tried.width = len(maps), features.embedding.shape[1]
        others = {"pooled, affine": kind.affine, "pooled, norm, affine": kind.normed is not None}
        others["pooled"] = kind.pooled
        self.tried.kind = next((words for words, so in others.items() if so), "other")

    def _read(self, receipts: Sequence[Receipt]) -> None:
        tried, shares = self.tried, []
        for one in receipts:
            parts = (one.channels.sum(), sum(one.parts.values()), one.remainder)
            shares.append([part / one.similarity for part in parts])
        tried.positions, tried.parts, tried.remainder = np.median(shares, 0).tolist()
        tried.exact, tried.held = receipts[0].exact, receipts[0].held

    def _try_export(self, index: Path, network: EmbeddingNetwork) -> None:
        begun = time.perf_counter()
        try:
            written = export_onnx(index, network, index.with_suffix(".onnx"), progress=False)
            self.tried.onnx = f"{written.difference:.0e}"
        except EmbedcamError as error:
            self.tried.onnx = f"refused: {error}"
        self.tried.seconds["export"] = round(time.perf_counter() - begun, 2)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.tried.failed, begun = name, time.perf_counter()
        yield
        self.tried.seconds[name] = round(time.perf_counter() - begun, 2)
        self.tried.failed = ""
