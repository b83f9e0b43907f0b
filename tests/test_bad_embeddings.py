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
from embedcam.cli import main
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
FACTORY = "from test_bad_embeddings import network as make\n"


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
    path = tmp_path_factory.mktemp("index") / "i"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        build_index(find_images(folder), network(), path, SIMPLE, on_unreadable="skip",
                    progress=False)  # fmt: skip
    return path


pytestmark = pytest.mark.usefixtures("quick")


ZERO = r"c1/blank\.png: the embedding is zero and cannot be normalised; leave the picture out"


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_build_names_the_first_and_skips_both(folder, index, tmp_path, batch_size) -> None:
    source = find_images(folder)

    def build(path: Path, **options: object) -> object:
        return build_index(source, network(), path, SIMPLE, batch_size=batch_size, progress=False,
                           **options)  # type: ignore[arg-type]  # fmt: skip

    with pytest.raises(EmbeddingError, match=ZERO):
        build(tmp_path / "i")
    report = build(tmp_path / "i", on_unreadable="skip")
    skipped = dict(report.skipped)  # type: ignore[attr-defined]
    assert list(skipped) == [BLANK, WHITE]
    assert skipped[BLANK].endswith("blank.png: the embedding is zero and cannot be normalised")
    assert skipped[WHITE].endswith("white.png: the embedding holds NaN or infinity")
    with Index.open(tmp_path / "i") as made, Index.open(index) as same:
        assert list(made.ids[:]) == list(same.ids[:])
        rows = np.arange(len(same))
        np.testing.assert_allclose(made.embeddings(rows), same.embeddings(rows), atol=1e-6)
        fields, others = (one.select(rows).fields(0) for one in (made, same))
        for name in fields:
            np.testing.assert_allclose(fields[name], others[name], atol=2e-3)
    # Run again, it is known to be done: what cannot be embedded is not missing.
    again = build(tmp_path / "i", on_unreadable="skip")
    assert (again.n_images, list(dict(again.skipped))) == (0, [BLANK, WHITE])  # type: ignore[attr-defined]


def test_activations_that_are_not_finite_count_the_same(folder: Path, tmp_path: Path) -> None:
    source, hidden = find_images(folder, exclude="blank.png"), network(hidden=True)
    message = r"white\.png: the layer's activations hold NaN or infinity"
    with pytest.raises(EmbeddingError, match=message):
        build_index(source, hidden, tmp_path / "i", SIMPLE, progress=False)
    report = build_index(source, hidden, tmp_path / "i", SIMPLE, on_unreadable="skip",
                         progress=False)  # fmt: skip
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
        with Explainer(index, network()) as explainer:
            found = write_report(explainer, source, tmp_path / f"{size}", n_neighbors=2,
                                 batch_size=size, progress=False)  # fmt: skip
        assert [name for name, _ in found.unreadable] == [BLANK, WHITE]
        assert found.unreadable[0][1].startswith(f"{folder / BLANK}: the embedding is zero")
        told.append(found.unreadable)
    assert told[0] == told[1]


def test_an_evaluation_names_or_skips_them(folder: Path, index: Path) -> None:
    def measured(**options: object) -> object:
        return evaluate_index(index, find_images(folder), network(), measures=("retrieval",),
                              progress=False, workers=0, **options)  # type: ignore[arg-type]  # fmt: skip

    with pytest.raises(EmbeddingError, match=ZERO):
        measured()
    for size in (1, 8):
        summary = measured(on_unreadable="skip", batch_size=size).summary  # type: ignore[attr-defined]
        assert summary["images"]["measured"] == 12
        assert len(summary["images"]["skipped"]) == 2
        assert "white.png: the embedding holds NaN" in summary["images"]["skipped"][1]


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    (tmp_path / "bad_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--network", "bad_factory:make"])
        told = capsys.readouterr()
        return code, told.out, told.err

    yield run
    sys.modules.pop("bad_factory", None)


def test_the_command_line_names_what_helps(say, folder, tmp_path) -> None:
    code, _, err = say("build", folder, tmp_path / "i", "--exclude", "white.png", "--quiet")
    assert code == 4
    assert err.endswith("blank.png: the embedding is zero and cannot be normalised; leave the "
                        "picture out, or check the network's weights, or use --no-normalize; "
                        "--on-unreadable skip leaves such files out\n")  # fmt: skip
    code, _, err = say("build", folder, tmp_path / "i", "--exclude", "white.png",
                         "--exclude", "*.gif", "--on-unreadable", "skip")  # fmt: skip
    assert code == 0, err
    assert err.splitlines() == [
        "bad_factory:make: explaining layer spoil (--layer takes another)",
        f"skipped {BLANK}: the embedding is zero and cannot be normalised",
        "labels: 3 (c0, c1, c2), of 4 images each",
        "not taken: 1 excluded by white.png, 0 excluded by *.gif, 1 skipped",
    ]
    again = say("build", folder, tmp_path / "i", "--exclude", "white.png", "--on-unreadable",
                "skip", "--json", "--quiet")  # fmt: skip
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
    code, _, err = say("explain", index, good, "--exclude", "x")
    assert (code, "--exclude is of a report; give" in err) == (2, True)
    code, _, err = say("explain", index, good, "--labels", "folders")
    assert (code, "--labels is of a report; give" in err) == (2, True)
    with (
        Explainer(index, network(), max_pixels=399) as explainer,
        pytest.raises(InputError, match="raise max_pixels if you trust it"),
    ):
        explainer.picture("c0/0.png")


def test_images_without_a_label_are_said_apart_from_those_alone(say, folder, tmp_path) -> None:
    lines = ["path,label"] + [
        f"{folder}/c{n % 3}/{n}.png,{'' if n < 3 else 'alone' if n == 3 else n % 3}"
        for n in range(12)
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    code, _, err = say("build", tmp_path / "list.csv", tmp_path / "i")
    assert code == 0, err
    stand_in = "the nearest neighbours stand in as positives"
    assert f"1 image alone with a label: {stand_in}\n3 images without a label: {stand_in}\n" in err
    assert "; 3 images without a label\n" in err
