"""The command line: what each command does, prints and returns."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from build_samples import pictures
from cli_samples import NAMED, TRUSTED, Say, answer
from photo_samples import picture, write_photos
from PIL import Image
from rounding import assert_same_picture, same_values
from safetensors.torch import save_file

from embedcam import Explainer, Index, PairExplainer, Similarity, cam_for, load_network
from embedcam.cli import main
from embedcam.cli.online import picture_names
from embedcam.ops import area_average

QUERY = "photos/0/0.png"


@pytest.fixture(scope="module", autouse=True)
def built(cli_folder: Path) -> Path:
    """An index that tests only read."""
    assert main(["build", "photos", "built", "--quiet", *NAMED]) == 0
    return cli_folder / "built"


@pytest.fixture
def index(built: Path, tmp_path: Path) -> str:
    """An index of the test's own."""
    return str(shutil.copytree(built, tmp_path / "my.index"))


def network() -> object:
    return load_network(NAMED[1], layer="relu")


def test_build_add_remove_compact_refit(say: Say, refused, tmp_path: Path) -> None:
    path, more = tmp_path / "index", tmp_path / "more"
    report = answer(say, "build", "photos", path, *NAMED)
    assert (report["path"], report["n_images"], report["skipped"]) == (str(path), 12, [])
    told = f"{path}: holds these images already; nothing to do\n"
    assert say("build", "photos", path, *NAMED) == (0, told, "")

    (more / "0").mkdir(parents=True)
    picture(0, 90).save(more / "0/new.png")
    code, out, _ = say("add", path, more)
    assert (code, out.startswith(f"{path}: 1 image added in ")) == (0, True)
    assert "1 added after the fit" in say("info", path)[1]

    assert answer(say, "remove", path, "0/new.png", "1/0.png") == {"removed": 2, "images": 11}
    assert "2 removed, not yet compacted" in say("info", path)[1]
    assert answer(say, "compact", path) == {"dropped": 2, "images": 11}

    next(path.glob("faiss-*.index")).unlink()
    refused(5, "`embedcam compact --rebuild-faiss`", "verify", path)
    assert answer(say, "compact", path, "--rebuild-faiss") == {"dropped": 0, "images": 11}
    assert say("compact", path, "--rebuild-faiss", "HNSW8")[0] == 0
    assert "FAISS HNSW8" in say("info", path)[1]
    assert say("verify", path)[1].startswith(f"{path}: whole; 11 images, ")

    # Without images: those that the index knows; with images: those; the network is its own.
    assert answer(say, "build", path, "--refit")["n_images"] == 11
    assert answer(say, "build", "photos", path, "--refit", "--triplets", 7)["n_images"] == 12
    told = answer(say, "info", path)
    assert (told["triplets"]["sampling"], told["triplets"]["count"]) == ("random", 7)
    assert Explainer(path, network()).explain("photos/1/0.png").ids[0] == "1/0.png"


def test_code_that_an_index_names_is_not_run_unasked(say: Say, index: str) -> None:
    for command in (["explain", index, QUERY], ["add", index, "photos"],
                    ["build", index, "--refit"]):  # fmt: skip
        code, out, err = say(*command, unasked=False)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "if you trust it, say so with --network cli_toy_network:make" in err


def test_a_refit_says_whose_recipe_it_kept(say: Say, index: str) -> None:
    assert say("build", index, "--refit", "--target", "margin")[0] == 0
    told = "note: the recipe was the index's (target margin, method gradcam) but for what the comma"
    assert say("build", index, "--refit")[2].splitlines()[-1].startswith(told)
    assert say("build", index, "--refit", "--recipe", "default")[0] == 0
    assert answer(say, "info", index)["target"] == "distinctive"


def test_explain_prints_what_the_explainer_finds(say: Say, built: Path, tmp_path: Path) -> None:
    expected = Explainer(built, network(), n_neighbors=3).explain("photos/2/1.png")
    (told,) = answer(say, "explain", built, "photos/2/1.png", "-n", 3)
    assert told.pop("query") == "photos/2/1.png"
    assert same_values(told, json.loads(json.dumps(expected.to_dict((14, 14)))))

    code, out, err = say("explain", built, "photos/2/1.png", "-n", 3, "-o", tmp_path / "why.png")
    assert (code, err) == (0, "")
    first, _, *rows = out.splitlines()
    assert first == f"photos/2/1.png -> {tmp_path / 'why.png'}"
    near = zip(expected.ids, expected.labels, expected.distances, strict=True)
    assert [row.split() for row in rows] == [
        [str(place), f"{away:.3f}" if away == 0 or away >= 1e-3 else f"{away:.3g}", name, label]
        for place, (name, label, away) in enumerate(near, 1)
    ]
    with Image.open(tmp_path / "why.png") as written:
        assert_same_picture(written, expected.plot(title="1.png"))


def test_explain_by_one_result_by_named_neighbours_and_by_distance(say: Say, built: Path) -> None:
    def same(told: dict, **asked: object) -> bool:
        expected = Explainer(built, network(), transfer="distance").explain(QUERY, **asked)
        return same_values(told, {"query": QUERY, **expected.to_dict((14, 14))})

    asked = ("explain", built, QUERY, "--transfer", "distance")
    (told,) = answer(say, *asked, "--result", "2/3.png")
    assert told["explained"] == ["2/3.png"]
    assert same(told, result="2/3.png")
    named = ["2/3.png", "1/0.png"]
    for words in (["--neighbors", ",".join(named)], [f"--neighbors={name}" for name in named]):
        (told,) = answer(say, *asked, *words)
        assert [one["id"] for one in told["neighbors"]] == named
        assert same(told, neighbors=named)


def test_compare_prints_what_adds_up(say: Say, built: Path, tmp_path: Path) -> None:
    pairs, result, rival = PairExplainer(Explainer(built, network())), "0/1.png", "2/3.png"
    expected = pairs.receipt(QUERY, result)
    told = answer(say, "compare", built, QUERY, result, "--lines", "3")
    assert same_values(told, {"query": QUERY, "pair": expected.to_dict(3)})
    code, out, _ = say("compare", built, QUERY, result, "--lines", "3", "-o", tmp_path / "r.png")
    head, *rows = out.splitlines()
    assert (code, head) == (0, f"{QUERY} and {result}")
    places, rows = rows[: rows.index("")], rows[rows.index("") + 1 :]
    assert [row.strip() for row in places] == expected.in_words()
    assert "of the result: " in places[0]
    numbers = [float(row.rpartition(" ")[2]) for row in rows]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.005)
    assert rows[-1].split() == ["similarity", f"{expected.similarity:+.3f}"]
    assert (tmp_path / "r.png").stat().st_size > 1000
    above = pairs.above(QUERY, result, rival, centred=False)
    words = ["compare", built, QUERY, result, "--above", rival, "--not-centred"]
    assert same_values(answer(say, *words)["pair"], above.to_dict())
    assert say(*words)[1].startswith(f"{QUERY} and {result}, above {rival}\n")
    box = ["--box", "-1", "0", "20", "30.5"]
    (part,) = pairs.receipts(QUERY, [result], box=(-1, 0, 20, 30.5))
    told = answer(say, "compare", built, QUERY, result, *box)
    assert same_values(told["pair"], part.to_dict())
    assert "outside the box" in say("compare", built, QUERY, result, *box)[1]
    for more, says in (
        (["--box", "900", "900", "999", "999"], "holds nothing of what the network saw"),
        ([*box, "--above", rival], "leave out it or --above"),
    ):
        code, _, err = say("compare", built, QUERY, result, *more)
        assert (code, says in err) == (2, True)


def test_an_id_may_hold_a_comma(say: Say, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", labels=2, each=3)
    (tmp_path / "photos/0/0.png").rename(tmp_path / "photos/0/a,b.png")
    assert say("build", tmp_path / "photos", tmp_path / "i", *NAMED)[0] == 0
    query = tmp_path / "photos/0/1.png"
    (told,) = answer(say, "explain", tmp_path / "i", query, "--neighbors", "0/a,b.png")
    assert told["explained"] == ["0/a,b.png"]


def test_several_queries_write_pictures_of_different_names(say, built, tmp_path):
    queries, page = ["photos/0/1.png", "photos/1/1.png", "photos/1/2.png"], tmp_path / "why.html"
    asked = ("explain", built, *queries, "-o", tmp_path / "out")
    code, out, err = say(*asked, "--html", page, "-n", 2)
    names = ["0-1.png", "1-1.png", "2.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert (code, out.count(" -> "), err) == (0, 3, f"page: {page}\n")
    assert page.read_text(encoding="utf-8").count("data:image/") >= 9
    assert [one["picture"] for one in answer(say, *asked)] == [
        str(tmp_path / "out" / name) for name in names
    ]


def test_names_of_pictures_are_all_different() -> None:
    given = ["x/a/1.jpg", "y/a/1.jpg", "a-1.jpg", "A-1.gif", "a-1-2.jpg", "2.jpg", "2.png", "2.jpg"]
    assert len({name.casefold() for name in picture_names(given)}) == len(given)


def test_ids_to_remove_come_from_a_file_or_a_pipe(say, index, tmp_path, monkeypatch):
    (tmp_path / "ids").write_text("0/0.png\r\n\n1/1.png\n")
    assert answer(say, "remove", index, "--from", tmp_path / "ids", "2/2.png")["removed"] == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("0/1.png\n"))
    assert answer(say, "remove", index, "--from", "-")["images"] == 8


def test_the_demo_is_handed_its_options(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    told = {"recall_at_1": 1.0}
    monkeypatch.setattr("embedcam.demo.run_demo", lambda *a, **k: calls.append((*a, k)) or told)
    assert say("demo")[0] == 0
    assert answer(say, "demo", "out", "--seed", 3) == told
    assert say("demo", "--quiet")[1] == ""
    assert calls == [
        ("demo-output", {"seed": 0, "progress": True}),
        ("out", {"seed": 3, "progress": False}),
        ("demo-output", {"seed": 0, "progress": False}),
    ]


def test_a_named_network_tells_its_layer(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    named = ("--network", "torchvision:squeezenet1_1", "--weights", "random", "--size", "64")
    code, out, err = say("build", "photos", path, *named, "--no-normalize", "--rank", 4)
    assert code == 0
    assert err == (
        "torchvision:squeezenet1_1: explaining layer features (--layer takes another)\n"
        "forward passes: batches of 8, channels last, torch\n"
        "labels: 3 (0, 1, 2), of 4 images each\n"
        "the crop leaves out more than a quarter of 12 of 12 pictures; --resize squash shows all "
        "of each\n"
    )
    assert out.startswith(f"{path}: built, 12 images in ")
    shown = say("info", path)[1]
    for line in (
        "network     torchvision:squeezenet1_1, random weights",
        "input       64 x 64, centre crop",
        "embedding   512 numbers, not normalised",
        "stored as   low-rank 4, basis by PCA, float16",
    ):
        assert f"  {line}\n" in shown
    # Loaded again as it was, down to the seed of its random weights.
    (told,) = answer(say, "explain", path, "photos/0/2.png", "-n", 1)
    assert (told["neighbors"][0]["id"], np.shape(told["cam"])) == ("0/2.png", (14, 14))


def test_half_precision_is_remembered(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "index"
    assert say("build", "photos", path, *NAMED, "--autocast", "bf16")[0] == 0
    assert say("explain", path, QUERY, "--quiet")[2] == ""
    err = say("explain", path, QUERY, "--autocast", "off", "--quiet")[2]
    assert err.startswith("embedcam: warning: parameters ")


def test_info_says_what_the_manifest_holds(say: Say, built: Path) -> None:
    code, out, err = say("info", built)
    assert (code, err) == (0, "")
    _, *lines = out.splitlines()
    shown = {line[2:14].strip(): line[14:] for line in lines}
    with Index.open(built) as opened:
        manifest = opened.manifest.to_dict()
    expected = {
        "images": "12, 3 labels",
        "network": "cli_toy_network:make",
        "layer": "relu: 8 channels on a grid of 8 x 8",
        "embedding": "5 numbers, L2-normalised",
        "weights": "Grad-CAM of the distinctive target, through the norm; the exact mean of all "
        "triplets",
        "stored as": "low-rank 5, the head's own basis, float16",
        "own maps": "8 x 8",
        "concepts": "none",
        "exemplars": "5 of each channel",
        "texts": "no mean of theirs, so maps of words show what any words would, too",
        "search": "FAISS Flat, squared L2",
        "recipe": manifest["recipe_sha256"][:16],
    }
    assert {name: shown[name] for name in expected} == expected
    told = answer(say, "info", built)
    for key in ("recipe", "network", "layers", "metric", "sign", "counts", "faiss"):
        assert told[key] == manifest[key]
    assert (told["concepts"], told["exemplars"], told["text_mean"]) == (0, 5, False)
    golden = Path(__file__).parent / "data" / "golden-concepts-1"
    for line in (
        "  concepts    2 parts of the activations\n",
        "  exemplars   2 of each channel and concept\n",
        "  texts       their mean is kept, which maps of words leave out\n",
    ):
        assert line in say("info", golden)[1]
    # 5 halves, their scale, the count of triplets, 64 bytes of map and its scale.
    assert told["bytes_an_image"] == 10 + 4 + 4 + 64 + 4
    on_disk = sum(f.stat().st_size for f in built.rglob("*") if f.is_file())
    assert told["bytes"] == on_disk - (built / "manifest.json").stat().st_size


def test_info_counts_unlabelled_and_lone_images(say: Say, tmp_path: Path) -> None:
    photos, rows = Path("photos").resolve(), tmp_path / "list.csv"
    lines = [f"{photos}/{c}/{i}.png,{c}\n" for c in (0, 1) for i in range(3)]
    lines += [f"{photos}/2/{i}.png,{'alone' * (i == 0)}\n" for i in range(3)]
    rows.write_text("path,label\n" + "".join(lines))
    top_m = ["--encoding", "top-m", "--top-m", 3, "--by", "magnitude"]
    lone = "1 image alone with a label: the nearest neighbours stand in as positives"
    shown = {}
    for name, options, noted in (
        ("margin", top_m, True),
        ("centred", ["--target", "centred", "--norm", "around"], False),
    ):
        code, _, err = say("build", rows, tmp_path / name, *NAMED, *options)
        assert (code, lone in err) == (0, noted)
        shown[name] = say("info", tmp_path / name)[1]
        assert ("alone" in shown[name]) == noted
        told = answer(say, "info", tmp_path / name)
        counts = ("labels", "labels_of_one_image", "unlabelled_images")
        assert [told[count] for count in counts] == [3, 1, 2]
    assert "3 images alone in their class (2 of them without a label), with" in shown["margin"]
    assert "top 3 channels by magnitude, float16" in shown["margin"]
    assert "Grad-CAM of the centred target, around the norm\n" in shown["centred"]


def test_a_refit_keeps_the_choice_of_own_maps(say: Say, tmp_path: Path) -> None:
    def grid(*words: object) -> object:
        assert answer(say, "build", *words)["n_images"] == 12
        return answer(say, "info", path)["layers"][0]["coarse_grid"]

    path = tmp_path / "i"
    assert grid("photos", path, *NAMED) == grid(path, "--refit") == [8, 8]
    assert grid(path, "--refit", "--no-own-maps") is grid("photos", path, "--refit") is None


def test_other_triplets_are_not_complete_already(say: Say, refused, tmp_path: Path) -> None:
    rows = np.arange(12)
    for step in (1, 2):
        pairs = np.stack([(rows[:, None] + [5]) % 12, (rows[:, None] + [step]) % 12], -1)
        np.save(tmp_path / f"{step}.npy", pairs)
    there = ["build", "photos", tmp_path / "i", *NAMED, "--triplets"]
    assert say(*there, tmp_path / "1.npy")[0] == 0
    assert "triplets of the user's own" in say("info", tmp_path / "i")[1]
    assert say(*there, tmp_path / "1.npy")[1].endswith("these images already; nothing to do\n")
    refused(2, "with another array of given triplets;", *there, tmp_path / "2.npy")


def test_a_recipe_file_with_the_command_line_over_it(say: Say, tmp_path: Path) -> None:
    recipe, path = tmp_path / "r.toml", tmp_path / "index"
    recipe.write_text(
        '[weights]\nsampling = "hard"\ntriplets = 9\n[encoding]\nname = "dense"\n'
        '[images]\npath = "photos"\nexclude = "3.png"\n[network]\n'
        'network = "cli_toy_network:make"\nlayer = "relu"\nsize = [16, 32]\nresize = "squash"\n'
    )
    assert answer(say, "build", path, "--recipe", recipe, "--triplets", 4)["n_images"] == 9
    told = answer(say, "info", path)
    assert (told["triplets"]["sampling"], told["triplets"]["count"]) == ("hard", 4)
    assert told["network"]["preprocess"]["size"] == [16, 32]
    assert "dense, all channels, float16" in say("info", path)[1]


def test_an_index_from_features(say: Say, refused, tmp_path: Path) -> None:
    pooled = np.random.default_rng(0).random((12, 6)).astype(np.float32)
    ids, path = tmp_path / "ids.csv", tmp_path / "index"
    np.save(tmp_path / "p.npy", pooled)
    np.save(tmp_path / "e.npy", pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    ids.write_text("id,label\n" + "".join(f"i{i},{i % 3}\n" for i in range(12)))
    features = ["--embeddings", tmp_path / "e.npy", "--pooled", tmp_path / "p.npy"]
    refused(2, "needs --embeddings, --pooled and --grid", "build", path, *features)
    grid = [*features, "--grid", "2x3", "--ids", ids]
    assert answer(say, "build", path, *grid)["n_images"] == 12
    assert "not known: built from features" in say("info", path)[1]
    refused(2, "built from features alone", "explain", path, QUERY)
    refused(2, "does not know its network", "export", path, "-o", tmp_path / "x.onnx", *NAMED)
    refused(2, "either IMAGES or --embeddings", "build", "photos", path, *grid)
    ids.write_text("name\n1\n")
    refused(2, "the header lacks id; expected id[,label]", "build", tmp_path / "new", *grid)


def test_compress_explain_and_what_prototypes_do_not_take(say, refused, built, tmp_path):
    small, one = tmp_path / "small", tmp_path / "one"
    told = answer(say, "compress", built, small, "--prototypes", 2, "--per-class")
    assert (told["path"], told["n_images"], told["n_prototypes"]) == (str(small), 12, 6)
    shown = say("info", small)[1]
    assert "  prototypes  2 for each label asked for, 6 made of 12 images, seed 0\n" in shown
    info = answer(say, "info", small)
    assert (info["compressed"], info["bytes"]) == (told["compressed"], told["bytes"])
    (why,) = answer(say, "explain", small, "photos/2/1.png", "-n", 1, "-o", tmp_path / "w.png")
    (nearest,) = why["neighbors"]
    assert nearest["id"].startswith(f"{nearest['label']}/000")
    assert Path(nearest["path"]).is_file()

    code, out, err = say("compress", built, one, "--prototypes", 1, "--seed", 3)
    assert (code, err) == (0, "")
    first, _, row, *_ = out.splitlines()
    assert re.match(rf"{one}: 1 prototype of 12 images in .* kB before, ", first)
    cosine = answer(say, "info", one)["compressed"]["fidelity"]["cosine"]["1"]
    assert row.split()[-3:] == [f"{cosine[key]:.3f}" for key in ("prototypes", "index", "loss")]
    assert "1 asked for, 1 made of 12 images, seed 3" in say("info", one)[1]
    before = sorted(tmp_path.rglob("*"))
    again = ["compress", built, small, "--prototypes", 1]
    refused(2, "--replace swaps it for the new one, or choose another folder", *again)
    refused(2, "add images to the index it was compressed from", "add", small, "photos")
    refused(2, "refit the index it was compressed from", "build", small, "--refit")
    assert sorted(tmp_path.rglob("*")) == before
    assert answer(say, *again, "--replace")["n_prototypes"] == 1
    assert answer(say, "info", small)["counts"]["rows"] == 1


def test_weights_are_found_from_any_folder_and_missed_in_words(
    say: Say, refused, cli_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert say("build", "photos", tmp_path / "a", *NAMED)[0] == 0  # imports the module
    module = sys.modules["cli_toy_network"].make()[0]
    save_file({k: 2 * v for k, v in module.state_dict().items()}, cli_folder / "net.safetensors")
    path, query = tmp_path / "index", cli_folder / QUERY
    assert say("build", "photos", path, *NAMED, "--weights", "net.safetensors")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert answer(say, "explain", path, query)[0]["neighbors"][0]["id"] == "0/0.png"
    assert f"weights {cli_folder / 'net.safetensors'}\n" in say("info", path)[1]

    (cli_folder / "net.safetensors").rename(tmp_path / "moved.safetensors")
    gone = f"--weights {cli_folder / 'net.safetensors'}, which is not there any more"
    refused(4, gone, "explain", path, query)
    refused(4, "say where it lies now with --weights FILE", "add", path, cli_folder / "photos")
    asked = ["explain", path, query, "--weights"]
    assert say(*asked, "moved.safetensors")[0] == 0
    refused(4, "is not a file", *asked, "nothing.safetensors")
    refused(4, "differ by", *asked, "random")


def test_a_network_that_no_name_loads_is_asked_for(say: Say, refused, tmp_path: Path) -> None:
    from photo_samples import build, network_of

    path = build(Path("photos"), tmp_path / "index", network_of())
    refused(2, "was not loaded by name; write a function", "explain", path, QUERY)
    refused(2, "was not loaded by name", "build", path, "--refit")
    refused(4, "not the input of the index", "explain", path, QUERY, *NAMED)


def test_explain_by_a_method_computed_on_the_query(say: Say, built: Path, tmp_path: Path) -> None:
    with Index.open(built) as opened:
        name, reference = opened.ids[3], opened.embeddings([3])[0]
    asked = ("explain", built, QUERY, "--quiet", "--result", name, "--method")
    (record,) = answer(say, *asked, "Layer-CAM", "-o", tmp_path / "why.png")
    assert record["method"] == "Layer-CAM"
    assert (tmp_path / "why.png").stat().st_size > 1000
    chosen = ["scorecam", "--fill", "blur", "--option=weights=softmax", "--option=temperature=0.5"]
    options = {"weights": "softmax", "temperature": 0.5}
    drawn = np.array(answer(say, *asked, *chosen)[0]["cam"])
    found = cam_for(network(), QUERY, Similarity(reference), "scorecam", fill="blur", **options).cam
    small = area_average(found, drawn.shape)
    np.testing.assert_allclose(drawn, small, rtol=1e-4, atol=1e-6 * found.max())
    index = tmp_path / "index"
    assert say("build", "photos", index, "--method", *chosen, "--quiet", *NAMED)[0] == 0
    recipe = answer(say, "info", index)["recipe"]
    assert (recipe["fill"], recipe["options"]) == ("blur", options)


def test_a_build_by_a_method_of_several_layers_and_its_explanation(say: Say, tmp_path: Path):
    words = ["--method", "polycam", "--layers", "conv,relu", "--quiet", *NAMED]
    assert say("build", "photos", tmp_path / "i", *words)[::2] == (0, "")
    asked = ("explain", tmp_path / "i", QUERY, "--method", "polycam", "--quiet")
    assert answer(say, *asked)[0]["neighbors"]


def test_what_is_not_trusted_is_said_and_computed_on_demand(
    say, refused, cli_folder, built, tmp_path
):
    pictures(cli_folder / "many", n=44, classes=4)
    query, build = sorted(Path("many").rglob("*.png"))[0], ("build", "many", "--quiet", *NAMED)
    assert say(*build, "calibrated")[0] == 0
    asked = ("explain", "calibrated", query)
    assert "calibrated on 44 images that queried it" in say("info", "calibrated")[1]
    (record,) = answer(say, *asked)
    assert 0 <= record["trust_low"] <= record["trust"] <= 1
    assert record["trusted"] == (record["trust_low"] >= 0.5)
    doubted = (*asked, "--json", "--trusted-from", "1")
    err = say(*doubted)[2]
    assert "its map is not to be trusted: one in ten such maps correlates below " in err
    assert "--fallback computes that one, which answers for the neighbours that came back" in err
    _, out, err = say(*doubted, "--fallback")
    assert err.startswith(
        f"note: {query}: computed on the query itself, for one in ten transferred maps "
    )
    assert json.loads(out)[0]["direct"]
    assert answer(say, *asked, "--method", "gradcam")[0]["trust"] is None  # no transfer
    for option in (["--fallback"], ["--trusted-from", "0.3"]):
        refused(2, "holds no calibration of trust", "explain", built, query, *option)
    assert say(*build, tmp_path / "i", "--no-trust")[0] == 0
    for path in (built, tmp_path / "i"):
        assert "trust       not calibrated" in say("info", path)[1]


def test_export_says_what_it_wrote_and_explain_runs_it(say, built, tmp_path):
    file, other, query = tmp_path / "n.onnx", tmp_path / "other.onnx", "photos/2/1.png"
    code, out, err = say("export", "-o", file, built)
    assert (code, err) == (0, "")
    told = r"[0-9.]+ kB, layer relu, affine head; off from torch by [0-9]e-0[6-9]; [0-9.]+ s\n"
    assert re.fullmatch(f"{re.escape(str(file))}: {told}", out)
    with_torch, without = (
        np.array(answer(say, "explain", built, query, *more)[0]["cam"])
        for more in ([], ["--onnx", file])
    )
    np.testing.assert_allclose(without, with_torch, atol=1e-5 * with_torch.max())
    assert answer(say, "compare", built, query, "2/2.png", "--onnx", file)["pair"]["exact"]
    assert answer(say, "export", built, "-o", other, *TRUSTED)["bytes"] == other.stat().st_size
