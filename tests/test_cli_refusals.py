"""What the command line cannot do is said in one sentence; and how its process ends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_samples import NAMED, TRUSTED, Say, answer

from embedcam import Explainer, Index
from embedcam.cli import main
from embedcam.cli.parser import COMMANDS, examples, parser
from embedcam.index import lock

QUERY = "photos/0/0.png"


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Path:
    """A working folder with an index, its network as a file, and files that are no pictures."""
    assert main(["build", "photos", "built", "--quiet", *NAMED]) == 0
    assert main(["export", "built", "-o", "exported.onnx", "--quiet", *TRUSTED]) == 0
    (cli_folder / "empty").mkdir()
    (cli_folder / "broken.jpg").write_bytes(b"no picture")
    (cli_folder / "zero.jpg").touch()
    (cli_folder / "plain").touch()
    return cli_folder


@pytest.fixture
def index(here: Path, tmp_path: Path) -> str:
    """An index of the test's own."""
    return str(shutil.copytree(here / "built", tmp_path / "my.index"))


def files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "name a command: build, add, ", []),
        (2, "there is no command 'expalin'; did you mean explain?", ["expalin"]),
        (2, "there is no command 'zzz'; known: build, add, ", ["zzz"]),
        (2, "required: INDEX, IMAGE", ["explain"]),
        (2, "did you mean --recipe?", ["build", "photos", "x", "--reciep", "y"]),
        (2, "did you mean --transfer?", ["explain", "x", "y", "--transfr=mean"]),
        (2, "'--tar margin' means nothing here", ["build", "photos", "x", "--tar", "margin"]),
        (2, "an empty name was given", ["build", "photos", ""]),
        (2, "'many' is not a whole number", ["build", "p", "x", "--batch-size", "many"]),
        (2, "'7y7' is not a size; give 224 or 224x320", ["build", "p", "x", "--size", "7y7"]),
        (5, "nothing: there is no index here; build one", ["info", "nothing"]),
        (5, "photos: not an embedcam index", ["info", "photos"]),
        (5, "photos: not an embedcam index", ["remove", "photos", "x"]),
        (5, "photos: not an embedcam index", ["compact", "photos"]),
        (5, "photos: not an embedcam index", ["compress", "photos", "x", "--prototypes", "3"]),
        (2, "required: --prototypes", ["compress", "nothing", "x"]),
        (5, "there is no index here", ["build", "nothing", "--refit"]),
        (2, "nowhere: does not exist", ["build", "nowhere", "x", *NAMED]),
        (2, "empty: contains no images", ["build", "empty", "x", *NAMED]),
        (2, "no network was named; give --network torchvision:NAME", ["build", "photos", "x"]),
        (2, "no images were given; name a folder", ["build", "x", *NAMED]),
        (4, "did you mean resnet50", ["build", "photos", "x", "--network", "torchvision:resnt50"]),
        (4, "broken failed with KeyError: 'the shelf'",
         ["build", "photos", "x", "--network", "cli_toy_network:broken", "--layer", "relu"]),
        (4, "give one with --layer", ["build", "photos", "x", *NAMED[:2]]),
        (4, "head ", ["build", "photos", "x", *NAMED, "--head", QUERY]),
        (2, "--device nonsense cannot be used here",
         ["build", "photos", "x", *NAMED, "--device", "nonsense"]),
        (2, "'lots' is no number and no .npy file of shape [N S 2]",
         ["build", "photos", "x", *NAMED, "--triplets", "lots"]),
        (6, "none.npy: there is no such file",
         ["build", "photos", "x", *NAMED, "--triplets", "none.npy"]),
        (2, "--rank means nothing here: it goes with --encoding low-rank",
         ["build", "photos", "x", *NAMED, "--encoding", "dense", "--rank", "3"]),
        (2, "--top-m means nothing here", ["build", "photos", "x", *NAMED, "--encoding", "dense",
                                           "--top-m", "3"]),
        (2, "--margin means nothing here", ["build", "photos", "x", *NAMED, "--margin", "0.3"]),
        (2, "FAISS factory 'Falt'", ["build", "photos", "x", *NAMED, "--faiss", "Falt"]),
        (4, "did you mean make?", ["build", "photos", "x", "--network", "cli_toy_network:mak"]),
        (6, "none.toml: the recipe cannot be read",
         ["build", "photos", "x", "--recipe", "none.toml"]),
        (2, "which is no part of an index", ["build", "photos", "photos", *NAMED]),
    ],
)  # fmt: skip
def test_what_cannot_be_done(refused, here: Path, code: int, message: str, arguments: list) -> None:
    before = files(here)
    refused(code, message, *arguments)
    assert files(here) == before
    assert not (here / "x").exists()


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (3, "photos/0: is a folder; name the pictures in it, as in photos/0/*.png", ["photos/0"]),
        (3, "nothing.png: does not exist", ["nothing.png"]),
        (3, "broken.jpg: is not an image of a known kind", ["broken.jpg"]),
        (3, "zero.jpg: is empty (0 bytes)", ["zero.jpg"]),
        (2, "is one file and there are 2 queries; give a folder",
         [QUERY, "photos/0/1.png", "-o", "why.png"]),
        (2, "why.txt: .txt is no picture format", [QUERY, "-o", "why.txt"]),
        (2, "there is no folder nowhere; make it first", [QUERY, "-o", "nowhere/w.png"]),
        (2, "--html photos is a folder", [QUERY, "--html", "photos"]),
        (6, "not a folder (File exists)", [QUERY, "-o", "plain"]),
        (2, "is a query itself and would be replaced", [QUERY, "-o", "photos/0"]),
        (2, "is a query itself", [QUERY, "--html", QUERY]),
        (2, "no image '0/9.png'; did you mean '0/", [QUERY, "--result", "0/9.png"]),
        (2, "--neighbors names the results and -n searches",
         [QUERY, "--neighbors", "0/1.png", "-n", "2"]),
        (4, "normalize is True", [QUERY, "--no-normalize"]),
        (4, 'built with {"size": [32, 32]}, and given is {"size": [64, 64]}; leave out --size',
         [QUERY, "--size", "64"]),
        (4, "that is cli_toy_network:make with layer relu, given is torchvision:squeezenet1_1 with",
         [QUERY, "--network", "torchvision:squeezenet1_1", "--weights", "random"]),
    ],
)  # fmt: skip
def test_what_cannot_be_explained(
    refused, here: Path, code: int, message: str, arguments: list[str]
) -> None:
    before = files(here)
    refused(code, message, "explain", "built", *arguments)
    assert files(here) == before


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (3, "photos/none.png: does not exist", ["compare", "built", "photos/none.png", "0/1.png"]),
        (2, "no image '0/9.png'; did you mean '0/", ["compare", "built", QUERY, "0/9.png"]),
        (2, "--above 0/1.png is the result itself",
         ["compare", "built", QUERY, "0/1.png", "--above", "0/1.png"]),
        (5, "there is no index here", ["export", "nothing", "-o", "x.onnx"]),
        (2, "photos is a folder; give a file, such as photos/network.onnx",
         ["export", "built", "-o", "photos"]),
        (2, "there is no folder nowhere; make it first",
         ["export", "built", "-o", "nowhere/x.onnx"]),
        (2, "is not a regular file", ["export", "built", "-o", os.devnull]),
        (4, "its layer is 'relu', given is one with 'conv'",
         ["export", "built", "-o", "x.onnx", *NAMED[:2], "--layer", "conv"]),
        (4, "none.onnx: there is no such ONNX file",
         ["explain", "built", QUERY, "--onnx", "none.onnx"]),
        (4, "ONNX Runtime cannot read it",
         ["explain", "built", QUERY, "--onnx", QUERY]),
        (2, "leave out --network, --no-normalize, --method",
         ["explain", "built", QUERY, "--onnx", "exported.onnx", "--network", "x:y",
          "--no-normalize", "--method", "rise"]),
        (2, "leave out --fallback",
         ["explain", "built", QUERY, "--onnx", "exported.onnx", "--fallback"]),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_or_exported(
    refused, here: Path, code: int, message: str, arguments: list[str]
) -> None:
    refused(code, message, *arguments)
    assert not (here / "x.onnx").exists()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("method 'scorcam' is unknown; did you mean 'scorecam'", ["--method", "scorcam"]),
        ("ABN draws with a branch that is trained with the network", ["--method", "abn"]),
        ("Poly-CAM draws with several layers and this index has one", ["--method", "polycam"]),
        ("--fill and --option are a method's; name it with --method", ["--fill", "black"]),
        ("Grad-CAM fills nothing in; leave out --fill", ["--method", "gradcam", "--fill", "black"]),
        ("'masks' is not NAME=VALUE, such as samples", ["--method", "rise", "--option", "masks"]),
        ("masks = None; give a whole number", ["--method", "rise", "--option", "masks=none"]),
        ("RISE has no option 'mask'; its options are", ["--method", "rise", "--option", "mask=5"]),
    ],
)
def test_a_method_or_an_option_that_means_nothing(
    refused, message: str, options: list[str]
) -> None:
    refused(2, message, "explain", "built", QUERY, *options)


def test_ids_that_cannot_be_removed(say: Say, refused, index: str, tmp_path: Path) -> None:
    refused(2, "no id was given; name some", "remove", index)
    refused(2, "no image '0/O.png'; did you mean '0/", "remove", index, "0/1.png", "0/O.png")
    assert answer(say, "info", index)["counts"]["live"] == 12
    assert say("remove", index, "0/1.png")[0] == 0
    refused(2, "'0/1.png' is not in the index any more", "remove", index, "0/1.png")
    refused(2, "it was removed; add it again", "explain", index, QUERY, "--result", "0/1.png")
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
    refused, index: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(Path(index))
    for command in (["verify"], ["info"], ["explain", QUERY]):
        refused(5, message, command[0], index, *command[1:])


def test_a_flipped_bit_is_verify_s_to_find(say: Say, refused, index: str) -> None:
    file = next(Path(index).rglob("layer0.codes*"))
    data = bytearray(file.read_bytes())
    data[3] ^= 16
    file.write_bytes(data)
    refused(5, f"{file.name}: does not match its checksum", "verify", index)
    assert say("info", index)[0] == 0


def test_a_busy_index(refused, index: str) -> None:
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
        ("[network]\nlayr = 'relu'", "[network] has no entry 'layr'; did you mean 'layer'?"),
        ("[network]\nsize = 'big'", "[network] size = 'big'; give (height, width), whole numbers"),
        ("[network]\nautocast = 'fp8'", "[network] autocast = 'fp8' is unknown; did you mean"),
        ("[images]\npaht = 'photos'", "[images] has no entry 'paht'; did you mean 'path'?"),
        ("[images]\nexclude = 3", "[images] exclude = 3; give a text or a list of texts"),
        ("[images]\nlabels = 'some'", "[images] labels = 'some' is unknown; did you mean 'none'?"),
    ],
)
def test_recipes_that_mean_nothing(refused, tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(toml)
    images = [] if "path =" in toml else ["photos"]
    refused(2, message, "build", *images, tmp_path / "i", "--recipe", tmp_path / "r.toml", *NAMED)


# --- the process


def test_options_stand_anywhere(say: Say, index: str) -> None:
    assert say("explain", index, QUERY, "-n", 1, "photos/1/1.png")[1].count("photos/") == 2
    assert answer(say, "remove", "--quiet", index, "--json", "0/0.png")["removed"] == 1
    assert say("explain", "-n", "1", index, "--transfer", "mean", QUERY)[0] == 0
    known = parser().parse_args(["build", "photos", "--network", "a:b", "x.index"])
    assert (known.images, known.index, known.network) == ("photos", "x.index", "a:b")
    known = parser().parse_args(["build", "--network", "a:b", "x.index"])
    assert (known.images, known.index) == (None, "x.index")
    known = parser().parse_args(["remove", "x.index", "--", "-5.jpg", "--json"])
    assert (known.ids, known.json) == (["-5.jpg", "--json"], False)


def test_an_interruption_is_130_and_says_how_to_go_on(
    say: Say, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "explain", interrupted)
    build = ("build", "photos", f"{index}2", *NAMED)
    told = "going on: 12 of 12 images are embedded\ngoing on: weights of 12 of 12 images are done\n"
    with monkeypatch.context() as patch:
        patch.setattr("embedcam.offline.shard.embed_chunks", interrupted)
        assert say(*build) == (130, "", "embedcam: interrupted\n")  # nothing is kept yet
        patch.undo()
        patch.setattr("embedcam.offline.merge.fit_encodings", interrupted)
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
    code, _, err = say("explain", index, QUERY)
    assert (code, err) == (130, "embedcam: interrupted\n")


def test_faults_of_our_own_are_70_and_show_themselves_with_debug(
    refused, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(Index, "verify", fault)
    refused(70, "unexpected ZeroDivisionError: a b; run again with --debug", "verify", index)
    with pytest.raises(ZeroDivisionError):
        main(["verify", index, "--debug"])


def test_a_disk_that_gives_up_is_6(refused, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(Index, "verify", full)
    refused(6, "embedcam: /somewhere: No space left on device", "verify", index)


PROCESS = "import sys; from embedcam.cli import main; sys.exit(main())"


def test_a_reader_that_goes_away_is_no_error(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for command in (["info", "built"], ["info", "built", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, *command],
            stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=buffered,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writing)


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
    lines = [
        line.strip()
        for text in examples().values()
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("  embedcam ")
    ]
    assert len(lines) >= 40
    for line in lines:
        words = line.split("  ")[0] if "--weights" not in line else line
        parser().parse_args(words.split("&&")[0].partition("  without ")[0].split()[1:])
