"""The command line: what each command does, prints and returns, and how it says what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_samples import picture, write_photos
from PIL import Image
from rounding import assert_same_picture, same_values
from safetensors.torch import save_file

from embedcam import Explainer, Index, PairExplainer, load_network
from embedcam.cli import main
from embedcam.cli.online import picture_names
from embedcam.cli.parser import COMMANDS, parser
from embedcam.index import lock

NETWORK = """
import torch
from torch import nn
from embedcam import Preprocess

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU()
        self.linear = nn.Linear(8, 5)

    def forward(self, images):
        return self.linear(self.relu(self.conv(images)).mean((2, 3)))

def make():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        return Net().eval(), Preprocess(size=(32, 32), resize="crop", resize_to=36)

def broken():
    raise KeyError("the shelf")
"""
NAMED = ["--network", "cli_toy_network:make", "--layer", "relu"]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with photos and, importable from nowhere else, a module with a network."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_toy_network.py").write_text(NETWORK)
    write_photos(folder / "photos")
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    sys.modules.pop("cli_toy_network", None)


@pytest.fixture(scope="module")
def built(here: Path) -> Path:
    """An index that tests only read."""
    assert main(["build", "photos", "built", "--quiet", *NAMED]) == 0
    return here / "built"


@pytest.fixture
def index(built: Path, tmp_path: Path) -> str:
    """An index of the test's own."""
    return str(shutil.copytree(built, tmp_path / "my.index"))


def trusted(words: list[str]) -> list[str]:
    """What names the code of an index of these tests, where a command loads it unnamed."""
    loads = words[:1] in (["explain"], ["compare"], ["add"], ["export"]) or "--refit" in words
    manifests = [Path(word) / "manifest.json" for word in words]
    ours = any(file.is_file() and NAMED[1] in file.read_text() for file in manifests)
    said = {"--network", "--onnx"} & set(words)
    return NAMED[:2] if loads and ours and not said else []


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*arguments: object, trusting: bool = True) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        code = main([*words, *(trusted(words) if trusting else [])])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def refused(say: Say) -> Callable[..., None]:
    """One sentence on the error stream, nothing on the other, and the code."""

    def check(code: int, message: str, *arguments: object) -> None:
        found, out, err = say(*arguments)
        assert (found, out) == (code, ""), err
        assert err.count("\n") == 1
        assert err.startswith("embedcam")
        assert message in err
        assert "Traceback" not in err

    return check


def answer(say: Say, *arguments: object) -> Any:
    code, out, err = say(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


# --- the main job --------------------------------------------------------------------------------


def test_build_add_remove_compact_refit(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    report = answer(say, "build", "photos", path, *NAMED)
    assert (report["path"], report["n_images"], report["skipped"]) == (str(path), 12, [])
    code, out, err = say("build", "photos", path, *NAMED)
    assert (code, out, err) == (0, f"{path}: holds these images already; nothing to do\n", "")

    (tmp_path / "more/0").mkdir(parents=True)
    picture(0, 90).save(tmp_path / "more/0/new.png")
    code, out, _ = say("add", path, tmp_path / "more")
    assert code == 0
    assert out.startswith(f"{path}: 1 image added in ")
    told = answer(say, "info", path)
    assert told["counts"] == {"added_after_fit": 1, "live": 13, "rows": 13}
    assert "1 added after the fit" in say("info", path)[1]
    assert "`embedcam build --refit`" in say("info", path)[1]

    assert answer(say, "remove", path, "0/new.png", "1/0.png") == {"removed": 2, "images": 11}
    assert "2 removed, not yet compacted" in say("info", path)[1]
    assert answer(say, "compact", path) == {"dropped": 2, "images": 11}
    assert answer(say, "compact", path) == {"dropped": 0, "images": 11}

    next(path.glob("faiss-*.index")).unlink()
    code, _, err = say("verify", path)
    assert (code, "`embedcam compact --rebuild-faiss`" in err) == (5, True)
    assert answer(say, "compact", path, "--rebuild-faiss") == {"dropped": 0, "images": 11}
    assert "FAISS Flat" in say("info", path)[1]
    assert say("compact", path, "--rebuild-faiss", "HNSW8")[0] == 0
    assert "FAISS HNSW8" in say("info", path)[1]
    assert say("verify", path)[1].startswith(f"{path}: whole; 11 images, ")

    # Without images: those that the index knows, with its own network and recipe.
    report = answer(say, "build", path, "--refit")
    assert report["n_images"] == 11
    # With images: those; the network is still the index's own.
    report = answer(say, "build", "photos", path, "--refit", "--triplets", 7)
    assert report["n_images"] == 12
    told = answer(say, "info", path)
    assert (told["triplets"]["sampling"], told["triplets"]["count"]) == ("random", 7)
    assert "through the norm; 7 random triplets an image, seed 0" in say("info", path)[1]
    assert told["network"]["name"] == "cli_toy_network:make"
    assert answer(say, "verify", path)["whole"] is True
    with Index.open(path) as opened:
        explainer = Explainer(opened, load_network("cli_toy_network:make", layer="relu"))
        assert explainer.explain("photos/1/0.png").ids[0] == "1/0.png"


def test_code_that_an_index_names_is_not_run_unasked(say: Say, index: str) -> None:
    for command in (
        ["explain", index, "photos/0/0.png"],
        ["add", index, "photos"],
        ["build", index, "--refit"],
    ):
        code, out, err = say(*command, trusting=False)
        assert (code, out) == (2, "")
        assert "if you trust it, say so with --network cli_toy_network:make" in err
        assert err.count("\n") == 1


def test_refit_builds_where_nothing_is(say: Say, tmp_path: Path) -> None:
    assert answer(say, "build", "photos", tmp_path / "i", "--refit", *NAMED)["n_images"] == 12


def test_explain_prints_what_the_explainer_finds(say: Say, built: Path, tmp_path: Path) -> None:
    network = load_network("cli_toy_network:make", layer="relu")
    explainer = Explainer(built, network, n_neighbors=3)
    expected = explainer.explain("photos/2/1.png")
    (told,) = answer(say, "explain", built, "photos/2/1.png", "-n", 3)
    assert told.pop("query") == "photos/2/1.png"
    assert same_values(told, json.loads(json.dumps(expected.to_dict((14, 14)))))

    code, out, err = say("explain", built, "photos/2/1.png", "-n", 3, "-o", tmp_path / "why.png")
    assert (code, err) == (0, "")
    first, header, *rows = out.splitlines()
    assert first == f"photos/2/1.png -> {tmp_path / 'why.png'}"
    assert header.split() == ["distance", "result", "label"]
    assert [row.split() for row in rows] == [
        [
            str(place),
            f"{distance:.3f}" if distance == 0 or distance >= 1e-3 else f"{distance:.3g}",
            name,
            label,
        ]
        for place, (name, label, distance) in enumerate(
            zip(expected.ids, expected.labels, expected.distances, strict=True), 1
        )
    ]
    with Image.open(tmp_path / "why.png") as written:
        assert_same_picture(written, expected.plot(title="1.png"))


def test_explain_by_one_result_by_named_neighbours_and_by_distance(say: Say, built: Path) -> None:
    network = load_network("cli_toy_network:make", layer="relu")
    query = "photos/0/0.png"
    (told,) = answer(say, "explain", built, query, "--result", "2/3.png")
    expected = Explainer(built, network).explain(query, result="2/3.png")
    assert told["explained"] == ["2/3.png"]
    assert same_values(told["cam"], expected.to_dict((14, 14))["cam"])
    assert "(what speaks for 2)" in say("explain", built, query, "--result", "2/3.png")[1]
    named = ["2/3.png", "1/0.png"]
    expected = Explainer(built, network, transfer="distance").explain(query, neighbors=named)
    for given in (
        ["--neighbors", "2/3.png,1/0.png"],
        ["--neighbors", "2/3.png", "--neighbors=1/0.png"],
    ):
        (told,) = answer(say, "explain", built, query, *given, "--transfer", "distance")
        assert [one["id"] for one in told["neighbors"]] == named
        assert same_values(told["cam"], expected.to_dict((14, 14))["cam"])


def test_a_refit_says_whose_recipe_it_kept(say: Say, index: str) -> None:
    assert say("build", index, "--refit", "--target", "margin")[0] == 0
    code, _, err = say("build", index, "--refit")
    assert (code, err.splitlines()[-1].partition(";")[0]) == (
        0,
        "note: the recipe was the index's (target margin, method gradcam) but for what the "
        "command said",
    )
    assert say("build", index, "--refit", "--recipe", "default")[0] == 0
    assert answer(say, "info", index)["target"] == "distinctive"


def test_compare_prints_what_adds_up(say: Say, built: Path, tmp_path: Path) -> None:
    network = load_network("cli_toy_network:make", layer="relu")
    pairs = PairExplainer(Explainer(built, network))
    query, result, rival = "photos/0/0.png", "0/1.png", "2/3.png"
    expected = pairs.receipt(query, result)
    told = answer(say, "compare", built, query, result, "--lines", "3")
    assert same_values(told, {"query": query, "pair": expected.to_dict(3)})
    code, out, _ = say("compare", built, query, result, "--lines", "3", "-o", tmp_path / "r.png")
    head, *rows = out.splitlines()
    assert (code, head) == (0, f"{query} and {result}")
    numbers = [float(row.rpartition(" ")[2]) for row in rows]
    assert len(rows) == len(expected.amounts(3)) + 1
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.005)
    assert rows[-1].split() == ["similarity", f"{expected.similarity:+.3f}"]
    with Image.open(tmp_path / "r.png") as written:
        assert_same_picture(written, expected.plot(lines=3))

    above = pairs.above(query, result, rival, centred=False)
    given = ["compare", built, query, result, "--above", rival, "--not-centred"]
    assert same_values(answer(say, *given)["pair"], above.to_dict())
    out = say(*given)[1]
    assert out.startswith(f"{query} and {result}, above {rival}\n")
    assert out.splitlines()[-1].split() == ["more", "similar", "by", f"{above.score:+.3f}"]


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (3, "photos/none.png: does not exist", ["photos/none.png", "0/1.png"]),
        (2, "no image '0/9.png'; did you mean '0/", ["photos/0/0.png", "0/9.png"]),
        (2, "no image 'x'", ["photos/0/0.png", "0/1.png", "--above", "x"]),
        (2, "--above 0/1.png is the result itself",
         ["photos/0/0.png", "0/1.png", "--above", "0/1.png"]),
        (2, "is a query itself", ["photos/0/0.png", "0/1.png", "-o", "photos/0/0.png"]),
        (2, "no picture format", ["photos/0/0.png", "0/1.png", "-o", "receipt.doc"]),
        (2, "there is no such folder", ["photos/0/0.png", "0/1.png", "--images", "nowhere"]),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(
    refused: Callable[..., None], built: Path, code: int, message: str, arguments: list[str]
) -> None:
    refused(code, message, "compare", built, *arguments)


def test_an_id_may_hold_a_comma(say: Say, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", labels=2, each=3)
    (tmp_path / "photos/0/0.png").rename(tmp_path / "photos/0/a,b.png")
    assert say("build", tmp_path / "photos", tmp_path / "i", *NAMED)[0] == 0
    query = tmp_path / "photos/0/1.png"
    (told,) = answer(say, "explain", tmp_path / "i", query, "--neighbors", "0/a,b.png")
    assert told["explained"] == ["0/a,b.png"]


def test_several_queries_write_pictures_of_different_names(
    say: Say, built: Path, tmp_path: Path
) -> None:
    queries = ["photos/0/1.png", "photos/1/1.png", "photos/1/2.png"]
    page = tmp_path / "why.html"
    code, out, err = say(
        "explain", built, *queries, "-o", tmp_path / "out", "--html", page, "-n", 2
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0-1.png", "1-1.png", "2.png"]
    assert out.count(" -> ") == 3
    assert err == f"page: {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/") >= 9
    assert "http://" not in text
    assert "https://" not in text
    told = answer(say, "explain", built, *queries, "-o", tmp_path / "out")
    assert [one["picture"] for one in told] == [
        str(tmp_path / "out" / name) for name in ("0-1.png", "1-1.png", "2.png")
    ]
    assert say("explain", built, queries[0], "--html", page, "--quiet")[2] == ""


def test_names_of_pictures_are_all_different() -> None:
    assert picture_names(["a.jpg", "b.png"]) == ["a.png", "b.png"]
    assert picture_names(["a/1.jpg", "b/1.jpg", "2.jpg"]) == ["a-1.png", "b-1.png", "2.png"]
    assert picture_names(["1.jpg", "1.png", "1.jpg"]) == ["1.png", "1-2.png", "1-3.png"]
    names = picture_names(["x/a/1.jpg", "y/a/1.jpg", "a-1.jpg", "A-1.gif", "a-1-2.jpg"])
    assert len({name.casefold() for name in names}) == 5


def test_options_stand_anywhere(say: Say, index: str) -> None:
    query = "photos/0/0.png"
    assert say("explain", index, query, "-n", 1, "photos/1/1.png")[1].count("photos/") == 2
    assert answer(say, "remove", "--quiet", index, "--json", "0/0.png")["removed"] == 1
    assert say("explain", "-n", "1", index, "--transfer", "mean", query)[0] == 0
    known = parser().parse_args(["build", "photos", "--network", "a:b", "x.index"])
    assert (known.images, known.index, known.network) == ("photos", "x.index", "a:b")
    known = parser().parse_args(["build", "--network", "a:b", "x.index"])
    assert (known.images, known.index) == (None, "x.index")
    known = parser().parse_args(["remove", "x.index", "--", "-5.jpg", "--json"])
    assert (known.ids, known.json) == (["-5.jpg", "--json"], False)


def test_ids_to_remove_come_from_a_file_or_a_pipe(
    say: Say, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids").write_text("0/0.png\r\n\n1/1.png\n")
    assert answer(say, "remove", index, "--from", tmp_path / "ids", "2/2.png")["removed"] == 3
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("0/1.png\n"))
    assert answer(say, "remove", index, "--from", "-")["images"] == 8


def test_a_named_network_tells_its_layer(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    code, out, err = say(
        "build", "photos", path, "--network", "torchvision:squeezenet1_1", "--weights", "random",
        "--size", "64", "--no-normalize", "--rank", 4,
    )  # fmt: skip
    assert code == 0
    assert err == (
        "torchvision:squeezenet1_1: explaining layer features (--layer takes another)\n"
        "labels: 3 (0, 1, 2), of 4 images each\n"
        "the crop leaves out more than a quarter of 12 of 12 pictures; --resize squash shows all "
        "of each\n"
    )
    assert out.startswith(f"{path}: built, 12 images in ")
    shown = say("info", path)[1]
    for line in (
        "network     torchvision:squeezenet1_1, random weights",
        "layer       features: 512 channels on a grid of 3 x 3",
        "input       64 x 64, centre crop",
        "embedding   512 numbers, not normalised",
        "stored as   low-rank 4, basis by PCA, float16",
        "own maps    3 x 3",
    ):
        assert f"  {line}\n" in shown
    # Loaded again as it was, down to the seed of its random weights.
    (told,) = answer(say, "explain", path, "photos/0/2.png", "-n", 1)
    assert told["neighbors"][0]["id"] == "0/2.png"
    assert np.shape(told["cam"]) == (14, 14)


def test_half_precision_is_remembered(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    assert say("build", "photos", path, *NAMED, "--autocast", "bf16")[0] == 0
    assert say("explain", path, "photos/0/0.png", "--quiet")[2] == ""
    code, _, err = say("explain", path, "photos/0/0.png", "--autocast", "off", "--quiet")
    assert code == 0
    assert err.count("\n") == 1
    assert err.startswith("embedcam: warning: parameters ")
    assert "(bfloat16) in the index" in err


def test_info_says_what_the_manifest_holds(say: Say, built: Path) -> None:
    code, out, err = say("info", built)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == str(built)
    shown = {line[2:14].strip(): line[14:] for line in lines[1:]}
    with Index.open(built) as opened:
        manifest = opened.manifest.to_dict()
        files = [f for part in manifest["parts"] for f in part["files"].items()]
    assert shown["images"] == "12, 3 labels"
    assert shown["network"] == "cli_toy_network:make"
    assert shown["layer"] == "relu: 8 channels on a grid of 8 x 8"
    assert shown["embedding"] == "5 numbers, L2-normalised"
    assert shown["weights"] == (
        "Grad-CAM of the distinctive target, through the norm; the exact mean of all triplets"
    )
    assert shown["stored as"] == "low-rank 5, the head's own basis, float16"
    assert shown["own maps"] == "8 x 8"
    assert shown["search"] == "FAISS Flat, squared L2"
    assert shown["recipe"] == manifest["recipe_sha256"][:16]
    assert shown["made with"].endswith("; generation 1")
    told = answer(say, "info", built)
    for key in ("recipe", "network", "layers", "metric", "sign", "counts", "faiss"):
        assert told[key] == manifest[key]
    assert (told["labels"], told["labels_of_one_image"]) == (3, 0)
    own = ("ids.", "labels.", "paths.", "embeddings.", "marks.")
    expected = sum(f["bytes"] for name, f in files if not name.startswith(own)) / 12
    assert told["bytes_an_image"] == pytest.approx(expected, abs=0.05)
    # 5 halves, their scale, the count of triplets, 64 bytes of map and its scale.
    assert told["bytes_an_image"] == 10 + 4 + 4 + 64 + 4
    on_disk = sum(f.stat().st_size for f in built.rglob("*") if f.is_file())
    assert told["bytes"] == on_disk - (built / "manifest.json").stat().st_size


def test_info_tells_of_lone_labels_and_other_encodings(say: Say, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", labels=2, each=3)
    (tmp_path / "photos/alone").mkdir()
    picture(2, 2).save(tmp_path / "photos/alone/1.png")
    path = tmp_path / "index"
    code, _, err = say("build", tmp_path / "photos", path, *NAMED, "--encoding", "top-m",
                       "--top-m", 3, "--by", "magnitude", "--faiss", "none")  # fmt: skip
    assert code == 0
    assert "1 image alone with a label: the nearest neighbours stand in as positives" in err
    shown = say("info", path)[1]
    assert "1 image alone in its class, with nearest neighbours as positives" in shown
    assert "top 3 channels by magnitude, float16" in shown
    assert "none; neighbours are named by the caller" in shown
    assert say("explain", path, "photos/0/0.png")[0] == 2
    assert say("explain", path, "photos/0/0.png", "--neighbors", "alone/1.png")[0] == 0


def test_info_counts_unlabelled_images_as_classes_of_one(say: Say, tmp_path: Path) -> None:
    lines = [f"{Path('photos').resolve()}/{c}/{i}.png,{c}\n" for c in (0, 1) for i in range(3)]
    lines += [f"{Path('photos').resolve()}/2/{i}.png,{'alone' * (i == 0)}\n" for i in range(3)]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    for name, options, said in (
        ("margin", [], True),
        ("centred", ["--target", "centred", "--norm", "around"], False),
    ):
        path = tmp_path / name
        assert say("build", tmp_path / "list.csv", path, *NAMED, *options)[0] == 0
        shown = say("info", path)[1]
        line = (
            "3 images alone in their class (2 of them without a label), with nearest neighbours "
            "as positives"
        )
        assert (line in shown, "alone" in shown) == (said, said)
        told = answer(say, "info", path)
        assert told["labels"] == 3
        assert (told["labels_of_one_image"], told["unlabelled_images"]) == (1, 2)
    assert (told["triplets"]["sampling"], told["triplets"]["count"]) == ("none", 0)
    assert "Grad-CAM of the centred target, around the norm\n" in shown


def test_a_refit_keeps_the_choice_of_own_maps(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    assert say("build", "photos", path, *NAMED, "--no-own-maps")[0] == 0
    for images in ([], ["photos"]):
        assert answer(say, "build", *images, path, "--refit")["n_images"] == 12
        assert answer(say, "info", path)["layers"][0]["coarse_grid"] is None
    assert say("build", "photos", tmp_path / "j", *NAMED)[0] == 0
    assert answer(say, "build", tmp_path / "j", "--refit")["n_images"] == 12
    assert answer(say, "info", tmp_path / "j")["layers"][0]["coarse_grid"] == [8, 8]
    assert answer(say, "build", tmp_path / "j", "--refit", "--no-own-maps")["n_images"] == 12
    assert answer(say, "info", tmp_path / "j")["layers"][0]["coarse_grid"] is None


def test_other_triplets_and_changed_pictures_are_not_complete_already(
    say: Say, refused: Callable[..., None], tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos")
    rows = np.arange(12)
    for step in (1, 2):
        given = np.stack([(rows[:, None] + [5]) % 12, (rows[:, None] + [step]) % 12], -1)
        np.save(tmp_path / f"{step}.npy", given)
    there = ["build", tmp_path / "photos", tmp_path / "i", *NAMED, "--triplets"]
    assert say(*there, tmp_path / "1.npy")[0] == 0
    assert "triplets of the user's own" in say("info", tmp_path / "i")[1]
    assert (
        say(*there, tmp_path / "1.npy")[1]
        == f"{tmp_path / 'i'}: holds these images already; nothing to do\n"
    )
    refused(2, "with another array of given triplets;", *there, tmp_path / "2.npy")
    picture(1, 77).save(tmp_path / "photos/0/0.png")
    refused(2, "with image files changed since;", *there, tmp_path / "1.npy")


def test_a_recipe_file_with_the_command_line_over_it(say: Say, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[weights]\nsampling = "hard"\ntriplets = 9\n[encoding]\nname = "dense"\n'
        '[images]\npath = "photos"\n[network]\nnetwork = "cli_toy_network:make"\n'
        'layer = "relu"\nsize = [16, 32]\nresize = "squash"\n'
    )
    path = tmp_path / "index"
    assert answer(say, "build", path, "--recipe", recipe, "--triplets", 4)["n_images"] == 12
    told = answer(say, "info", path)
    assert told["triplets"]["sampling"] == "hard"
    assert told["triplets"]["count"] == 4
    assert told["network"]["preprocess"]["size"] == [16, 32]
    assert "dense, all channels, float16" in say("info", path)[1]


def test_an_index_from_features(say: Say, refused: Callable[..., None], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pooled = rng.random((12, 6)).astype(np.float32)
    np.save(tmp_path / "p.npy", pooled)
    np.save(tmp_path / "e.npy", pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    (tmp_path / "ids.csv").write_text("id,label\n" + "".join(f"i{i},{i % 3}\n" for i in range(12)))
    features = ["--embeddings", tmp_path / "e.npy", "--pooled", tmp_path / "p.npy"]
    path = tmp_path / "index"
    refused(2, "needs --embeddings, --pooled and --grid", "build", path, *features)
    grid = [*features, "--grid", "2x3", "--ids", tmp_path / "ids.csv"]
    assert answer(say, "build", path, *grid)["n_images"] == 12
    assert "not known: built from features" in say("info", path)[1]
    refused(2, "built from features alone", "explain", path, "photos/0/0.png")
    refused(2, "either IMAGES or --embeddings", "build", "photos", path, *grid)
    (tmp_path / "ids.csv").write_text("name\n1\n")
    refused(2, "the header lacks id; expected id[,label]", "build", tmp_path / "x", *grid)
    pooled[3, 2] = np.nan
    np.save(tmp_path / "p.npy", pooled)
    (tmp_path / "ids.csv").write_text("id\n" + "".join(f"i{i}\n" for i in range(12)))
    refused(2, "pooled: row 3 holds a NaN", "build", tmp_path / "x", *grid)
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    refused(2, "p.npy: not a .npy array of numbers", "build", tmp_path / "x", *grid)


def test_compress_explain_and_what_prototypes_do_not_take(
    say: Say, refused: Callable[..., None], built: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    told = answer(say, "compress", built, small, "--prototypes", 2, "--per-class")
    about = told["compressed"]
    assert (told["path"], told["n_images"], told["n_prototypes"]) == (str(small), 12, 6)
    shown = say("info", small)[1]
    assert "  prototypes  2 for each label asked for, 6 made of 12 images, seed 0\n" in shown
    assert answer(say, "info", small)["compressed"] == about
    assert answer(say, "info", small)["bytes"] == told["bytes"]
    assert answer(say, "info", built)["compressed"] is None
    assert answer(say, "info", built)["bytes"] == about["from_bytes"]
    assert say("verify", small)[0] == 0
    (why,) = answer(say, "explain", small, "photos/2/1.png", "-n", 1, "-o", tmp_path / "w.png")
    (nearest,) = why["neighbors"]
    assert nearest["id"].startswith(f"{nearest['label']}/000")
    assert Path(nearest["path"]).is_file()

    code, out, err = say("compress", built, tmp_path / "one", "--prototypes", 1, "--seed", 3)
    assert (code, err) == (0, "")
    first, header, *rows = out.splitlines()
    assert first.startswith(f"{tmp_path / 'one'}: 1 prototype of 12 images in ")
    assert " kB before, " in first
    assert header.split() == ["12", "images", "left", "out", "in", "turn", "prototypes", "all",
                              "images", "lost"]  # fmt: skip
    with Index.open(tmp_path / "one") as opened:
        lost = opened.manifest.to_dict()["compressed"]["fidelity"]
    for row, (what, one) in zip(
        rows,
        [("cosine of weights from 1", lost["cosine"]["1"]),
         ("cosine of weights from 5", lost["cosine"]["5"]), ("Recall@1", lost["recall_at_1"])],
        strict=False,
    ):  # fmt: skip
        figures = [f"{one[key]:.3f}" for key in ("prototypes", "index", "loss")]
        assert row.split() == [*what.split(), *figures]
    assert "alone in its class" not in say("info", tmp_path / "one")[1]
    assert "1 asked for, 1 made of 12 images, seed 3" in say("info", tmp_path / "one")[1]

    before = sorted(tmp_path.rglob("*"))
    there = ["compress", built, tmp_path / "x", "--prototypes"]
    refused(
        2, "prototypes = 13; give a whole number from 1 to 12, the number of images", *there, 13
    )
    refused(2, "seed = 4294967296; give", *there, 3, "--seed", 1 << 32)
    refused(2, "--replace swaps it for the new one, or choose another folder",
            "compress", built, small, "--prototypes", 3)  # fmt: skip
    refused(2, "holds prototypes, each merged from several images; compress the index it was made",
            "compress", small, tmp_path / "x", "--prototypes", 3)  # fmt: skip
    refused(2, "add images to the index it was compressed from", "add", small, "photos")
    refused(2, "refit the index it was compressed from", "build", small, "--refit")
    assert sorted(tmp_path.rglob("*")) == before
    told = answer(say, "compress", built, small, "--prototypes", 1, "--replace")
    assert (told["n_prototypes"], answer(say, "info", small)["counts"]["rows"]) == (1, 1)


# --- where a network's files lie -----------------------------------------------------------------


def test_weights_are_found_from_any_folder_and_missed_in_words(
    say: Say,
    refused: Callable[..., None],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert say("build", "photos", tmp_path / "a", *NAMED)[0] == 0  # imports the module
    module = sys.modules["cli_toy_network"].make()[0]
    other = {key: 2 * value for key, value in module.state_dict().items()}
    save_file(other, here / "net.safetensors")
    path = tmp_path / "index"
    assert say("build", "photos", path, *NAMED, "--weights", "net.safetensors")[0] == 0
    query = here / "photos/0/0.png"
    monkeypatch.chdir(tmp_path)
    assert answer(say, "explain", path, query)[0]["neighbors"][0]["id"] == "0/0.png"
    assert f"weights {here / 'net.safetensors'}\n" in say("info", path)[1]

    (here / "net.safetensors").rename(tmp_path / "moved.safetensors")
    gone = f"--weights {here / 'net.safetensors'}, which is not there any more"
    refused(4, gone, "explain", path, query)
    refused(4, "say where it lies now with --weights FILE", "add", path, here / "photos")
    assert say("explain", path, query, "--weights", "moved.safetensors")[0] == 0
    refused(4, "is not a file", "explain", path, query, "--weights", "nothing.safetensors")
    # Other parameters: both values are named.
    refused(4, "differ by", "explain", path, query, "--weights", "random")
    refused(4, "its layer is 'relu', given is one with 'conv'", "explain", path, query,
            "--weights", "moved.safetensors", "--layer", "conv")  # fmt: skip


def test_a_network_that_no_name_loads_is_asked_for(
    say: Say, refused: Callable[..., None], tmp_path: Path
) -> None:
    from photo_samples import build, network_of

    path = build(Path("photos"), tmp_path / "index", network_of())
    refused(2, "was not loaded by name; write a function", "explain", path, "photos/0/0.png")
    refused(2, "was not loaded by name", "build", path, "--refit")
    refused(4, "not the input of the index", "explain", path, "photos/0/0.png", *NAMED)


# --- everything that can go wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "name a command: build, add, ", []),
        (2, "there is no command 'expalin'; did you mean explain?", ["expalin"]),
        (2, "there is no command 'zzz'; known: build, add, ", ["zzz"]),
        (2, "required: INDEX, IMAGE", ["explain"]),
        (2, "required: INDEX", ["build"]),
        (2, "did you mean --recipe?", ["build", "photos", "x", "--reciep", "y"]),
        (2, "did you mean --transfer?", ["explain", "x", "y", "--transfr=mean"]),
        (2, "'--tar margin' means nothing here", ["build", "photos", "x", "--tar", "margin"]),
        (2, "an empty name was given", ["build", "photos", ""]),
        (2, "'0' is not a whole number of at least 1", ["explain", "x", "y", "-n", "0"]),
        (2, "'many' is not a whole number", ["build", "p", "x", "--batch-size", "many"]),
        (2, "'nan' is not a number of at least 0", ["build", "p", "x", "--scratch-gb", "nan"]),
        (2, "'7y7' is not a size; give 224 or 224x320", ["build", "p", "x", "--size", "7y7"]),
        (5, "nothing: there is no index here; build one", ["info", "nothing"]),
        (5, "photos: not an embedcam index", ["info", "photos"]),
        (5, "photos: not an embedcam index", ["verify", "photos"]),
        (5, "photos: not an embedcam index", ["explain", "photos", "photos/0/0.png"]),
        (5, "photos: not an embedcam index", ["add", "photos", "photos"]),
        (5, "photos: not an embedcam index", ["remove", "photos", "x"]),
        (5, "photos: not an embedcam index", ["compact", "photos"]),
        (5, "there is no index here", ["remove", "nothing", "x"]),
        (5, "there is no index here", ["compact", "nothing"]),
        (5, "photos: not an embedcam index", ["compress", "photos", "x", "--prototypes", "3"]),
        (5, "there is no index here", ["compress", "nothing", "x", "--prototypes", "3"]),
        (2, "required: --prototypes", ["compress", "nothing", "x"]),
        (2, "'0' is not a whole number of at least 1",
         ["compress", "nothing", "x", "--prototypes", "0"]),
        (5, "there is no index here", ["build", "nothing", "--refit"]),
        (2, "nowhere: does not exist", ["build", "nowhere", "x", *NAMED]),
        (2, "empty: contains no images", ["build", "empty", "x", *NAMED]),
        (2, "no network was named; give --network torchvision:NAME", ["build", "photos", "x"]),
        (2, "no images were given; name a folder", ["build", "x", *NAMED]),
        (4, "did you mean resnet50", ["build", "photos", "x", "--network", "torchvision:resnt50"]),
        (4, "did you mean make?", ["build", "photos", "x", "--network", "cli_toy_network:mak"]),
        (4, "cannot be imported", ["build", "photos", "x", "--network", "no_such_package:make"]),
        (4, "is not a network; give torchvision:NAME", ["build", "photos", "x", "--network", "y"]),
        (4, "broken failed with KeyError: 'the shelf'",
         ["build", "photos", "x", "--network", "cli_toy_network:broken", "--layer", "relu"]),
        (4, "did you mean relu?", ["build", "photos", "x", *NAMED[:2], "--layer", "rleu"]),
        (4, "give one with --layer", ["build", "photos", "x", *NAMED[:2]]),
        (4, "head ", ["build", "photos", "x", *NAMED, "--head", "photos/0/0.png"]),
        (2, "--device nonsense cannot be used here",
         ["build", "photos", "x", *NAMED, "--device", "nonsense"]),
        (2, "--triplets lots: give a number, or a .npy",
         ["build", "photos", "x", *NAMED, "--triplets", "lots"]),
        (6, "none.npy: there is no such file",
         ["build", "photos", "x", *NAMED, "--triplets", "none.npy"]),
        (2, "did you mean 'gradcam'?", ["build", "photos", "x", *NAMED, "--method", "gradcm"]),
        (2, "--rank means nothing here: it goes with --encoding low-rank",
         ["build", "photos", "x", *NAMED, "--encoding", "dense", "--rank", "3"]),
        (2, "--top-m means nothing here", ["build", "photos", "x", *NAMED, "--encoding", "dense",
                                           "--top-m", "3"]),
        (2, "--margin means nothing here", ["build", "photos", "x", *NAMED, "--margin", "0.3"]),
        (2, "triplets = 7 means nothing", ["build", "photos", "x", *NAMED, "--sampling", "all",
                                           "--triplets", "7"]),
        (2, "drop the hinge", ["build", "photos", "x", *NAMED, "--hinge", "--sampling", "all"]),
        (2, "FAISS factory 'Falt'", ["build", "photos", "x", *NAMED, "--faiss", "Falt"]),
        (6, "none.toml: the recipe cannot be read",
         ["build", "photos", "x", "--recipe", "none.toml"]),
        (2, "which is no part of an index", ["build", "photos", "photos", *NAMED]),
    ],
)  # fmt: skip
def test_what_cannot_be_done(
    refused: Callable[..., None], here: Path, code: int, message: str, arguments: list[str]
) -> None:
    (here / "empty").mkdir(exist_ok=True)
    refused(code, message, *arguments)
    assert not (here / "x").exists()
    assert not (here / "nothing").exists()
    assert not (here / "photos/.lock").exists()


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (3, "photos/0: is a folder; name the pictures in it, as in photos/0/*.png", ["photos/0"]),
        (3, "nothing.png: does not exist", ["nothing.png"]),
        (3, "broken.jpg: is not an image of a known kind", ["broken.jpg"]),
        (3, "zero.jpg: is empty (0 bytes)", ["zero.jpg"]),
        (2, "is one file and there are 2 queries; give a folder",
         ["photos/0/0.png", "photos/0/1.png", "-o", "why.png"]),
        (2, "why.txt: .txt is no picture format", ["photos/0/0.png", "-o", "why.txt"]),
        (2, "there is no folder nowhere; make it first", ["photos/0/0.png", "-o", "nowhere/w.png"]),
        (2, "there is no folder nowhere", ["photos/0/0.png", "--html", "nowhere/w.html"]),
        (2, "--html photos is a folder", ["photos/0/0.png", "--html", "photos"]),
        (6, "not a folder (File exists)", ["photos/0/0.png", "-o", "plain"]),
        (2, "is a query itself and would be replaced", ["photos/0/0.png", "-o", "photos/0"]),
        (2, "is a query itself", ["photos/0/0.png", "-o", "photos/0/0.png"]),
        (2, "is a query itself", ["photos/0/0.png", "--html", "photos/0/0.png"]),
        (2, "no image '0/9.png'; did you mean '0/", ["photos/0/0.png", "--result", "0/9.png"]),
        (2, "no image '0/9.png'; did you mean '0/", ["photos/0/0.png", "--neighbors", "0/9.png"]),
        (2, "--neighbors names the results and -n searches",
         ["photos/0/0.png", "--neighbors", "0/1.png", "-n", "2"]),
        (2, "invalid choice: 'median'", ["photos/0/0.png", "--transfer", "median"]),
        (4, "normalize is True", ["photos/0/0.png", "--no-normalize"]),
        (4, 'built with {"size": [32, 32]}, and given is {"size": [64, 64]}; leave out --size',
         ["photos/0/0.png", "--size", "64"]),
        (4, "that is cli_toy_network:make with layer relu, given is torchvision:squeezenet1_1 with",
         ["photos/0/0.png", "--network", "torchvision:squeezenet1_1", "--weights", "random"]),
    ],
)  # fmt: skip
def test_what_cannot_be_explained(
    refused: Callable[..., None],
    here: Path,
    built: Path,
    code: int,
    message: str,
    arguments: list[str],
) -> None:
    (here / "broken.jpg").write_bytes(b"no picture")
    (here / "zero.jpg").touch()
    (here / "plain").touch()
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*") if file.is_file()}
    refused(code, message, "explain", built, *arguments)
    after = {file: file.stat().st_mtime_ns for file in here.rglob("*") if file.is_file()}
    assert after == before


def test_a_broken_image_stops_a_build_or_is_left_out(
    say: Say, refused: Callable[..., None], tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", labels=2)
    (tmp_path / "photos/1/bad.png").write_bytes(b"no picture")
    there = ["build", tmp_path / "photos", tmp_path / "index", *NAMED]
    refused(3, f"{tmp_path / 'photos/1/bad.png'}: is not an image", *there)
    code, out, err = say(*there, "--on-unreadable", "skip")
    assert code == 0
    assert "built, 8 images" in out
    assert err.startswith("skipped 1/bad.png: ")
    assert "1/bad.png" not in say("info", tmp_path / "index")[1]


def test_ids_that_cannot_be_removed(
    say: Say, refused: Callable[..., None], index: str, tmp_path: Path
) -> None:
    refused(2, "no id was given; name some", "remove", index)
    refused(2, "no image '0/O.png'; did you mean '0/", "remove", index, "0/1.png", "0/O.png")
    assert answer(say, "info", index)["counts"]["live"] == 12
    assert say("remove", index, "0/1.png")[0] == 0
    refused(2, "'0/1.png' is not in the index any more", "remove", index, "0/1.png")
    refused(
        2,
        "it was removed; add it again first",
        "explain",
        index,
        "photos/0/0.png",
        "--result",
        "0/1.png",
    )
    refused(6, "the ids cannot be read", "remove", index, "--from", tmp_path / "none")
    refused(2, "11 of 12 images are in the index already", "add", index, "photos")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: next(p.rglob("layer0.codes*")).unlink(), "layer0.codes"),
        (lambda p: os.truncate(next(p.rglob("embeddings*")), 7), "truncated to 7 bytes"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: is not a readable JSON"),
        (lambda p: (p / "manifest.json").unlink(), "unfinished"),
    ],
)
def test_damaged_indexes(
    refused: Callable[..., None], index: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(Path(index))
    for command in (["verify"], ["info"], ["explain", "photos/0/0.png"]):
        refused(5, message, command[0], index, *command[1:])


def test_a_flipped_bit_is_verify_s_to_find(
    say: Say, refused: Callable[..., None], index: str
) -> None:
    file = next(Path(index).rglob("layer0.codes*"))
    data = bytearray(file.read_bytes())
    data[3] ^= 16
    file.write_bytes(data)
    refused(5, f"{file.name}: does not match its checksum", "verify", index)
    assert say("info", index)[0] == 0


def test_a_busy_index(refused: Callable[..., None], index: str) -> None:
    with lock(index):
        code = "import sys; from embedcam.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "remove", index, "0/0.png"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr == (
        f"embedcam: {index}: another process is writing to this index; wait until it is done\n"
    )


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[weights]\nsamplng = 'hard'", "[weights] has no entry 'samplng'"),
        ("[wieghts]\nsampling = 'hard'", "unknown table [wieghts]"),
        ("[network]\nlayr = 'relu'", "[network] has no entry 'layr'; did you mean 'layer'?"),
        ("[network]\nsize = 'big'", "[network] size = 'big' should be of type int or list"),
        ("[network]\nseed = true", "[network] seed = True should be of type int"),
        ("[network]\nautocast = 'fp8'", "autocast = 'fp8' is unknown; use bf16, fp16 or off"),
        ("[images]\npaht = 'photos'", "[images] has no entry 'paht'; did you mean 'path'?"),
        ("[images]\npath = 3", "[images] path = 3 should be of type str"),
        ("[images]\nlabels = 'some'", "labels: expected"),
        ("not toml", "not a TOML file"),
    ],
)
def test_recipes_that_mean_nothing(
    refused: Callable[..., None], tmp_path: Path, toml: str, message: str
) -> None:
    (tmp_path / "r.toml").write_text(toml)
    images = [] if "path =" in toml else ["photos"]
    refused(2, message, "build", *images, tmp_path / "i", "--recipe", tmp_path / "r.toml", *NAMED)


# --- the process ---------------------------------------------------------------------------------


def test_an_interruption_is_130_and_says_how_to_go_on(
    say: Say, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "explain", interrupted)
    build = ("build", "photos", f"{index}2", *NAMED)
    told = "going on: 12 of 12 images are embedded\ngoing on: weights of 12 of 12 images are done\n"
    with monkeypatch.context() as patch:
        patch.setattr("embedcam.offline.build.embed_chunks", interrupted)
        assert say(*build) == (130, "", "embedcam: interrupted\n")  # nothing is kept yet
        patch.undo()
        patch.setattr("embedcam.offline.build.fit_encodings", interrupted)
        code, out, err = say(*build)
        assert (code, out) == (130, "")
        assert err == "embedcam: interrupted; run the same command again to go on\n"
        _, _, err = say(*build)
        assert err == f"{told}embedcam: interrupted; run the same command again to go on\n"
    assert say(*build, "--quiet")[::2] == (0, "")
    with monkeypatch.context() as patch:
        patch.setattr("embedcam.demo.run_demo", interrupted)
        assert say("demo", f"{index}3")[2] == "embedcam: interrupted\n"
        Path(f"{index}3").mkdir()
        (Path(f"{index}3") / "stages.json").write_text('{"scenes": "digest"}')
        assert say("demo", f"{index}3")[2].endswith("; run the same command again to go on\n")
    code, _, err = say("explain", index, "photos/0/0.png")
    assert (code, err) == (130, "embedcam: interrupted\n")


def test_faults_of_our_own_are_70_and_show_themselves_with_debug(
    refused: Callable[..., None], index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(Index, "verify", fault)
    refused(70, "unexpected ZeroDivisionError: a b; run again with --debug", "verify", index)
    with pytest.raises(ZeroDivisionError):
        main(["verify", index, "--debug"])


def test_a_disk_that_gives_up_is_6(
    refused: Callable[..., None], index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(Index, "verify", full)
    refused(6, "embedcam: /somewhere: No space left on device", "verify", index)


PROCESS = "import sys; from embedcam.cli import main; sys.exit(main())"


def test_a_reader_that_goes_away_is_no_error(built: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for command in (["info", str(built)], ["info", str(built), "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, *command],
            stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=buffered,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writing)


def test_python_m_embedcam_is_the_command_line(built: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedcam", "info", str(built), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["counts"]["live"] == 12


HELP = """
import contextlib, io, json, sys
from embedcam.cli import main

told = {}
for command in ["", *sys.argv[1:]]:
    held = io.StringIO()
    with contextlib.redirect_stdout(held):
        code = main([*([command] if command else []), "--help"])
    told[command] = [code, held.getvalue()]
heavy = [name for name in ("torch", "numpy", "faiss", "PIL", "matplotlib") if name in sys.modules]
print(json.dumps([told, heavy]))
"""


def test_help_is_quick_and_shows_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HELP, *COMMANDS],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, heavy = json.loads(done.stdout)
    assert heavy == []
    for command, (code, text) in told.items():
        assert code == 0
        assert f"\n  embedcam {command}" in text
        assert "example" in text
        assert all(len(line) <= 100 for line in text.splitlines())
    assert "exit codes: 0 done" in told[""][1]
    assert all(f"    {command} " in told[""][1] for command in COMMANDS)


def test_the_examples_of_help_parse() -> None:
    from embedcam.cli import examples as texts

    lines = [
        line.strip()
        for name in (
            "EPILOG",
            "BUILD",
            "ADD",
            "REMOVE",
            "COMPACT",
            "COMPRESS",
            "EXPLAIN",
            "SERVE",
            "EXPORT",
            "INFO",
            "VERIFY",
            "DEMO",
        )
        for line in getattr(texts, name).replace("\\\n", " ").splitlines()
        if line.startswith("  embedcam ")
    ]
    assert len(lines) >= 18
    for line in lines:
        words = line.split("  ")[0] if "--weights" not in line else line
        parser().parse_args(words.split("&&")[0].split()[1:])


def test_quiet_says_nothing_but_the_result(say: Say, tmp_path: Path) -> None:
    options = ["--network", "torchvision:squeezenet1_1", "--weights", "random", "--size", "64"]
    code, out, err = say("build", "photos", tmp_path / "i", *options, "--quiet")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1


def test_the_demo_is_handed_its_options(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_demo(folder: str, *, seed: int, progress: bool) -> dict[str, Any]:
        calls.append((folder, seed, progress))
        return {"recall_at_1": 1.0}

    monkeypatch.setattr("embedcam.demo.run_demo", run_demo)
    assert say("demo")[0] == 0
    assert answer(say, "demo", "out", "--seed", 3) == {"recall_at_1": 1.0}
    assert say("demo", "--quiet")[1] == ""
    assert calls == [("demo-output", 0, True), ("out", 3, False), ("demo-output", 0, False)]


def test_nothing_of_torch_is_left_changed(say: Say, built: Path) -> None:
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    assert say("explain", built, "photos/0/0.png")[0] == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# --- explain --method ----------------------------------------------------------------------------


def test_explain_by_a_method_computed_on_the_query(say: Say, built: Path, tmp_path: Path) -> None:
    import numpy as np
    from cli_toy_network import make

    from embedcam import EmbeddingNetwork, Index, Similarity, cam_for

    module, preprocess = make()
    network = EmbeddingNetwork(module, "relu", preprocess=preprocess)
    query = sorted(Path("photos").rglob("*.png"))[0]
    picture = tmp_path / "why.png"
    with Index.open(built) as index:
        name = index.ids[3]
        reference = index.embeddings([3])[0]
    code, out, err = say(
        "explain", built, query, "--result", name, "--method", "Layer-CAM", "--json", "-o", picture
    )
    assert (code, err) == (0, "")
    record = json.loads(out)[0]
    assert record["method"] == "Layer-CAM"
    assert picture.stat().st_size > 1000
    expected = cam_for(network, query, Similarity(reference), "layercam").cam
    from embedcam.ops import area_average

    drawn = np.array(record["cam"])
    np.testing.assert_allclose(
        drawn, area_average(expected, drawn.shape), rtol=1e-4, atol=1e-6 * expected.max()
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("scorcam", "method 'scorcam' is unknown; did you mean 'scorecam'"),
        ("abn", "ABN draws with a branch that is trained with the network"),
        ("polycam", "Poly-CAM draws with several layers and this index has one"),
    ],
)
def test_a_method_the_command_line_cannot_run_is_refused(
    refused: Any, built: Path, method: str, message: str
) -> None:
    query = sorted(Path("photos").rglob("*.png"))[0]
    refused(2, message, "explain", built, query, "--method", method)


def test_a_build_by_a_method_without_weights_is_refused(refused: Any, tmp_path: Path) -> None:
    refused(
        2,
        "RISE cannot be put in an index: it works on pixels and never sees the layer's channels",
        "build", "photos", tmp_path / "index", "--method", "rise", *NAMED,
    )  # fmt: skip


def test_a_build_by_a_method_of_several_layers_and_its_explanation(
    say: Say, tmp_path: Path
) -> None:
    index, query = tmp_path / "index", sorted(Path("photos").rglob("*.png"))[0]
    code, _, err = say(
        "build", "photos", index, "--method", "polycam", "--layers", "conv,relu", "--quiet", *NAMED
    )
    assert (code, err) == (0, "")
    assert say("verify", index)[0] == 0
    code, out, _ = say("explain", index, query, "--json")
    assert code == 0
    assert json.loads(out)[0]["neighbors"]
    assert say("explain", index, query, "--method", "polycam", "--json", "--quiet")[0] == 0
    assert say("add", index, "photos", "--quiet")[0] == 2  # the same ids again


def test_a_methods_fill_and_options_can_be_said(say: Say, built: Path, tmp_path: Path) -> None:
    from cli_toy_network import make

    from embedcam import EmbeddingNetwork, Similarity, cam_for
    from embedcam.ops import area_average

    index, query = tmp_path / "index", sorted(Path("photos").rglob("*.png"))[0]
    chosen = ["--method", "scorecam", "--fill", "blur", "--option", "weights=softmax"]
    chosen += ["--option", "temperature=0.5"]
    assert say("build", "photos", index, *chosen, "--quiet", *NAMED)[0] == 0
    with Index.open(index) as opened:
        recipe, name, reference = opened.manifest.recipe, opened.ids[3], opened.embeddings([3])
        assert recipe["fill"] == "blur"
        assert recipe["options"] == {"weights": "softmax", "temperature": 0.5}
    record = answer(say, "explain", built, query, "--result", name, *chosen, "--quiet")[0]
    module, preprocess = make()
    network = EmbeddingNetwork(module, "relu", preprocess=preprocess)
    expected = cam_for(
        network, query, Similarity(reference[0]), "scorecam", fill="blur", weights="softmax",
        temperature=0.5,
    ).cam  # fmt: skip
    drawn = np.array(record["cam"])
    np.testing.assert_allclose(
        drawn, area_average(expected, drawn.shape), rtol=1e-4, atol=1e-6 * expected.max()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fill", "black"], "--fill and --option are a method's; name it with --method"),
        (["--method", "gradcam", "--fill", "black"], "Grad-CAM fills nothing in; leave out --fill"),
        (["--method", "rise", "--fill", "white"], "fill = 'white' is unknown"),
        (["--method", "rise", "--option", "masks"], "'masks' is not NAME=VALUE, such as samples"),
        (["--method", "rise", "--option", "masks=none"], "masks = None; give a whole number"),
        (["--method", "rise", "--option", "mask=5"], "RISE has no option 'mask'; its options are"),
    ],
)
def test_a_fill_or_an_option_that_means_nothing_is_refused(
    refused: Any, built: Path, options: list[str], message: str
) -> None:
    query = sorted(Path("photos").rglob("*.png"))[0]
    refused(2, message, "explain", built, query, *options)


# --- trust ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(here: Path) -> Path:
    """An index of enough images to calibrate."""
    from build_samples import pictures

    pictures(here / "many", n=44, classes=4)
    assert main(["build", "many", "calibrated", "--quiet", *NAMED]) == 0
    return here / "calibrated"


def test_what_is_not_trusted_is_said_and_computed_on_demand(
    say: Say, refused: Any, calibrated: Path, built: Path, tmp_path: Path
) -> None:
    query = sorted(Path("many").rglob("*.png"))[0]
    assert "calibrated on 44 images that queried it" in say("info", calibrated)[1]
    record = answer(say, "explain", calibrated, query)[0]
    assert 0 <= record["trust"] <= 1
    assert record["trusted"] == (record["trust_low"] >= 0.5)
    assert record["trust_low"] <= record["trust"]
    assert record["trust_low"] < 1
    err = say("explain", calibrated, query, "--trusted-from", "1", "--json")[2]
    assert "its map is not to be trusted: one in ten such maps correlates below " in err
    assert "--fallback computes that one, which answers for the neighbours that came back" in err
    asked = ("explain", calibrated, query, "--trusted-from", "1", "--fallback")
    direct = answer(say, *asked)[0]
    note = f"note: {query}: computed on the query itself, for one in ten transferred maps "
    assert say(*asked, "--json")[2].startswith(note)
    assert (direct["direct"], direct["trusted"]) == (True, True)
    # A map that a method draws on the query is no transfer, so nothing is said of one.
    drawn = answer(say, "explain", calibrated, query, "--method", "gradcam")[0]
    assert [drawn[name] for name in ("trust", "trust_low", "trusted")] == [None] * 3
    assert "trust       not calibrated" in say("info", built)[1]
    for option in (["--fallback"], ["--trusted-from", "0.3"]):
        refused(2, "holds no calibration of trust", "explain", built, query, *option)
    refused(2, "'1.5' is not a number from 0 to 1", "explain", calibrated, query,
            "--trusted-from", "1.5")  # fmt: skip
    index = tmp_path / "plain"
    assert say("build", "many", index, "--no-trust", "--quiet", *NAMED)[0] == 0
    assert "trust       not calibrated" in say("info", index)[1]


# --- export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(built: Path) -> Path:
    """The network of `built` as an ONNX file."""
    target = built.parent / "exported.onnx"
    assert main(["export", str(built), "-o", str(target), "--quiet", *NAMED]) == 0
    return target


def test_export_says_what_it_wrote_and_explain_runs_it(
    say: Say, built: Path, exported: Path, tmp_path: Path
) -> None:
    query = "photos/2/1.png"
    with_torch = answer(say, "explain", built, query)
    without = answer(say, "explain", built, query, "--onnx", exported)
    assert [one["id"] for one in without[0]["neighbors"]] == [
        one["id"] for one in with_torch[0]["neighbors"]
    ]
    expected = np.array(with_torch[0]["cam"])
    np.testing.assert_allclose(without[0]["cam"], expected, atol=1e-5 * expected.max())

    pair = [built, query, "2/2.png", "--lines", "4"]
    with_torch = answer(say, "compare", *pair)["pair"]
    without = answer(say, "compare", *pair, "--onnx", exported)["pair"]
    assert without["exact"]
    for one, expected in zip(without["channels"], with_torch["channels"], strict=True):
        assert one["channel"] == expected["channel"]
        assert one["contribution"] == pytest.approx(expected["contribution"], abs=1e-5)

    other = tmp_path / "other.onnx"
    told = answer(say, "export", built, "-o", other)
    assert told["path"] == str(other)
    assert told["bytes"] == other.stat().st_size == exported.stat().st_size
    assert (told["layers"], told["head"]) == (["relu"], "affine")
    assert 0 < told["difference"] < 1e-5


def test_export_prints_one_line(say: Say, built: Path, tmp_path: Path) -> None:
    code, out, err = say("export", "-o", tmp_path / "n.onnx", built)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/n\.onnx: [0-9.]+ kB, layer relu, affine head; "
        r"off from torch by [0-9]e-0[6-9]; [0-9.]+ s\n",
        out,
    )


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "required: -o/--output", ["export", "built"]),
        (2, "an empty name was given", ["export", "built", "-o", ""]),
        (2, "did you mean --weights?", ["export", "built", "-o", "x.onnx", "--wieghts", "y"]),
        (5, "there is no index here", ["export", "nothing", "-o", "x.onnx"]),
        (2, "photos is a folder; give a file, such as photos/network.onnx",
         ["export", "built", "-o", "photos"]),
        (2, "there is no folder nowhere; make it first",
         ["export", "built", "-o", "nowhere/x.onnx"]),
        (2, "is not a regular file", ["export", "built", "-o", os.devnull]),
        (4, "its layer is 'relu', given is one with 'conv'",
         ["export", "built", "-o", "x.onnx", *NAMED[:2], "--layer", "conv"]),
        (4, "its normalize is True", ["export", "built", "-o", "x.onnx", "--no-normalize"]),
        (4, "is not a file", ["export", "built", "-o", "x.onnx", "--weights", "none.pt"]),
        (4, "none.onnx: there is no such ONNX file",
         ["explain", "built", "photos/0/0.png", "--onnx", "none.onnx"]),
        (4, "ONNX Runtime cannot read it",
         ["explain", "built", "photos/0/0.png", "--onnx", "photos/0/0.png"]),
        (2, "leave out --network, --no-normalize, --method",
         ["explain", "built", "photos/0/0.png", "--onnx", "exported.onnx", "--network", "x:y",
          "--no-normalize", "--method", "rise"]),
        (2, "leave out --fallback",
         ["explain", "built", "photos/0/0.png", "--onnx", "exported.onnx", "--fallback"]),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(
    refused: Callable[..., None], exported: Path, code: int, message: str, arguments: list[str]
) -> None:
    refused(code, message, *arguments)
    assert not (exported.parent / "x.onnx").exists()


def test_an_index_from_features_has_no_network_to_export(
    refused: Callable[..., None], say: Say, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for name in ("e", "p"):
        np.save(tmp_path / f"{name}.npy", rng.random((8, 4), np.float32))
    path = tmp_path / "index"
    made = say("build", path, "--embeddings", tmp_path / "p.npy", "--pooled", tmp_path / "p.npy",
               "--grid", "3x3")  # fmt: skip
    assert made[0] == 0
    refused(2, "does not know its network", "export", path, "-o", tmp_path / "x.onnx")
    refused(2, "does not know its network", "export", path, "-o", tmp_path / "x.onnx", *NAMED)
