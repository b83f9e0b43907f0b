"""Pictures whose embedding is no vector: named by their file, or skipped."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from build_samples import quicken
from PIL import Image
from torch import Tensor, nn

from embedcam import EmbeddingNetwork, Explainer, Preprocess, build_index, find_images
from embedcam.errors import EmbeddingError, InputError
from embedcam.evaluate import evaluate_index
from embedcam.index import Index
from embedcam.methods import cam_for
from embedcam.offline import add_images
from embedcam.pairs import PairExplainer
from embedcam.recipe.recipe import Recipe
from embedcam.report import write_report
from embedcam.targets import Coordinate

SIDE = 16
BLANK, WHITE = "c1/blank.png", "c2/white.png"
SIMPLE = Recipe(encoding="dense", sampling="random", triplets=4)


class Spoil(nn.Module):
    def forward(self, a: Tensor, x: Tensor) -> Tensor:
        a = a.clone()
        a[x.flatten(1).mean(1) == 1, 0, 0, 0] = float("nan")
        return a


class Bare(nn.Module):
    """Zeros of a black picture; NaN of a white one, in its activations alone where `hidden`."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.c, self.spoil, self.hidden = nn.Conv2d(3, 8, 3, 2, 1, bias=False), Spoil(), hidden

    def forward(self, x: Tensor) -> Tensor:
        a = self.spoil(self.c(x).relu(), x)
        return a.nanmean((2, 3)) if self.hidden else a.mean((2, 3))


def network(hidden: bool = False) -> EmbeddingNetwork:
    torch.manual_seed(0)
    plain = Preprocess(size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1))
    return EmbeddingNetwork(Bare(hidden).eval(), "spoil", preprocess=plain)


def paint(where: Path, seed: int) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 120, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(where)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, and one of each that cannot be embedded."""
    made = tmp_path_factory.mktemp("bad") / "photos"
    for number in range(12):
        paint(made / f"c{number % 3}" / f"{number}.png", number)
    Image.new("RGB", (20, 20)).save(made / BLANK)
    Image.new("RGB", (20, 20), "white").save(made / WHITE)
    return made


@pytest.fixture(scope="module")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, source = tmp_path_factory.mktemp("index") / "i", find_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        build_index(source, network(), path, SIMPLE, on_unreadable="skip", progress=False)
    return path


pytestmark = pytest.mark.usefixtures("quick")


ZERO = r"c1/blank\.png: the embedding is zero and cannot be normalised; leave the picture out"


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_build_names_the_first_and_skips_both(folder, index, tmp_path, batch_size) -> None:
    given = find_images(folder), network(), tmp_path / "i", SIMPLE
    choices = {"batch_size": batch_size, "progress": False}
    with pytest.raises(EmbeddingError, match=ZERO):
        build_index(*given, **choices)
    skipped = dict(build_index(*given, on_unreadable="skip", **choices).skipped)
    assert list(skipped) == [BLANK, WHITE]
    assert skipped[BLANK].endswith("blank.png: the embedding is zero and cannot be normalised")
    assert skipped[WHITE].endswith("white.png: the embedding holds NaN or infinity")
    with Index.open(tmp_path / "i") as made, Index.open(index) as same:
        assert list(made.ids[:]) == list(same.ids[:])
        rows = np.arange(len(same))
        np.testing.assert_allclose(made.embeddings(rows), same.embeddings(rows), atol=1e-6)
        np.testing.assert_allclose(made.weights(rows), same.weights(rows), atol=2e-3)
    # Run again, it is known to be done: what cannot be embedded is not missing.
    again = build_index(*given, on_unreadable="skip", **choices)
    assert (again.n_images, list(dict(again.skipped))) == (0, [BLANK, WHITE])


def test_activations_that_are_not_finite_count_the_same(folder: Path, tmp_path: Path) -> None:
    source = find_images(folder, exclude="blank.png")
    given = source, network(hidden=True), tmp_path / "i", SIMPLE
    message = r"white\.png: the layer's activations hold NaN or infinity"
    with pytest.raises(EmbeddingError, match=message):
        build_index(*given, progress=False)
    report = build_index(*given, on_unreadable="skip", progress=False)
    assert [name for name, _ in report.skipped] == [WHITE]


@pytest.mark.parametrize("method", ["scorecam", "gradcam++"])
def test_passes_that_read_pictures_again_leave_them_out(folder, tmp_path, method) -> None:
    recipe = Recipe(method=method, encoding="dense", sampling="random", triplets=2)
    report = build_index(find_images(folder), network(), tmp_path / "i", recipe, batch_size=4,
                         on_unreadable="skip", progress=False, scratch_gb=0)  # fmt: skip
    assert [name for name, _ in report.skipped] == [BLANK, WHITE]
    assert report.n_images == 12


def test_where_nothing_is_left_the_first_is_named(folder: Path, tmp_path: Path) -> None:
    source = find_images(folder, "none", exclude="[0-9]*.png")
    recipe, skip = Recipe(target="centred", norm="around", encoding="dense"), "skip"
    with pytest.raises(InputError, match=r"none of the 2 images could be used; the first: .*blank"):
        build_index(source, network(), tmp_path / "i", recipe, on_unreadable=skip, progress=False)


def test_additions(folder: Path, index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "i")
    paint(tmp_path / "more/c0/new.png", 50)
    Image.new("RGB", (20, 20)).save(tmp_path / "more/c0/black.png")
    source = find_images(tmp_path / "more")
    with pytest.raises(EmbeddingError, match=r"c0/black\.png: the embedding is zero"):
        add_images(source, network(), tmp_path / "i", progress=False)
    added = add_images(source, network(), tmp_path / "i", on_unreadable="skip", progress=False)
    assert (added.n_images, [name for name, _ in added.skipped]) == (1, ["c0/black.png"])


def test_queries_are_named(folder: Path, index: Path) -> None:
    good, bad = folder / "c0/0.png", folder / WHITE
    with Explainer(index, network()) as explainer:
        inputs = [np.ones((3, SIDE, SIDE), "f4") * share for share in (0.5, 0)]
        with pytest.raises(EmbeddingError, match=r"^query 1: the embedding is zero"):
            explainer.explain_batch(inputs)
        pairs = PairExplainer(explainer)
        for ask in (
            lambda: explainer.explain(bad),
            lambda: explainer.explain_batch([good, Image.open(good), bad]),
            lambda: pairs.receipt(bad, "c0/0.png"),
            lambda: pairs.receipt(good, bad),
            lambda: cam_for(network(), bad, Coordinate(0)),
        ):
            with pytest.raises(EmbeddingError, match=f"^{bad}: the embedding holds NaN"):
                ask()


def test_a_report_lists_them_and_stops_at_none(folder: Path, index: Path, tmp_path: Path) -> None:
    source, told = find_images(folder, "none"), []
    for size in (1, 16):
        choices = {"n_neighbors": 2, "batch_size": size, "progress": False}
        with Explainer(index, network()) as explainer:
            found = write_report(explainer, source, tmp_path / f"{size}", **choices)
        told.append(found.unreadable)
    assert [name for name, _ in told[0]] == [BLANK, WHITE]
    assert told[0][0][1].startswith(f"{folder / BLANK}: the embedding is zero")
    assert told[0] == told[1]


def test_an_evaluation_names_or_skips_them(folder: Path, index: Path) -> None:
    given = index, find_images(folder), network()
    choices = {"measures": ("retrieval",), "progress": False, "workers": 0}
    with pytest.raises(EmbeddingError, match=ZERO):
        evaluate_index(*given, **choices)
    for size in (1, 8):
        found = evaluate_index(*given, on_unreadable="skip", batch_size=size, **choices)
        images = found.summary["images"]
        assert (images["measured"], len(images["skipped"])) == (12, 2)
        assert "white.png: the embedding holds NaN" in images["skipped"][1]


@pytest.fixture
def say(say, monkeypatch, tmp_path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command line with the network of this file."""
    (tmp_path / "bad_factory.py").write_text("from test_bad_embeddings import network as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda *arguments: say(*arguments, "--network", "bad_factory:make")
    sys.modules.pop("bad_factory", None)


def test_the_command_line_names_what_helps(say, folder, tmp_path) -> None:
    build = "build", folder, tmp_path / "i", "--exclude", "white.png"
    code, _, err = say(*build, "--quiet")
    assert code == 4
    assert err.endswith("blank.png: the embedding is zero and cannot be normalised; leave the "
                        "picture out, or check the network's weights, or use --no-normalize; "
                        "--on-unreadable skip leaves such files out\n")  # fmt: skip
    code, _, err = say(*build, "--exclude", "*.gif", "--on-unreadable", "skip")
    assert code == 0, err
    assert err.splitlines() == [
        "bad_factory:make: explaining layer spoil (--layer takes another)",
        "forward passes: batches of 8, channels last, torch",
        f"skipped {BLANK}: the embedding is zero and cannot be normalised",
        "labels: 3 (c0, c1, c2), of 4 images each",
        "not taken: 1 excluded by white.png, 0 excluded by *.gif, 1 skipped",
    ]
    again = say(*build, "--on-unreadable", "skip", "--json", "--quiet")
    assert json.loads(again[1])["left_out"]["excluded"] == {"white.png": 1}


def test_a_limit_of_pixels_wherever_pictures_are_read(say, folder, index, tmp_path) -> None:
    good, low = folder / "c0/0.png", ("--max-pixels", 399)
    message = "has 20 x 20 pixels, above the limit of 399; raise --max-pixels if you trust it"
    for command in (
        ("build", folder, tmp_path / "i"),
        ("add", index, folder / "c0", "--labels", "none"),
        ("explain", index, good),
        ("compare", index, good, "c0/0.png"),
        ("evaluate", index, "--images", folder, "--measures", "retrieval"),
    ):
        code, _, err = say(*command, *low, "--quiet")
        assert (code, message in err) == (3, True), (command, err)
    report = say("explain", index, folder, "--report", tmp_path / "r", *low)
    assert report[0] == 0
    assert message in report[2]
    assert say("explain", index, good, "--max-pixels", 400, "--quiet")[0] == 0
    for option in ("--exclude", "--labels"):
        code, _, err = say("explain", index, good, option, "folders")
        assert (code, f"{option} is of a report; give" in err) == (2, True)
