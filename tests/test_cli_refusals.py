"""What the command line cannot do is said in one sentence; and how its process ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import NAMED, TRUSTED, Say, answer

from embedcam import Explainer, Index
from embedcam.cli import main
from embedcam.cli.parser import COMMANDS, examples, parser
from embedcam.index import lock

QUERY = "photos/0/0.png"
PROCESS = "import sys; from embedcam.cli import main; sys.exit(main())"


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


EXPLAIN = ["explain", "built", QUERY]
BUILD = ["build", "photos", "x"]


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "name a command: build, add, ", []),
        (2, "there is no command 'expalin'; did you mean explain?", ["expalin"]),
        (2, "there is no command 'zzz'; known: build, add, ", ["zzz"]),
        (2, "required: INDEX, IMAGE", ["explain"]),
        (2, "did you mean --recipe?", [*BUILD, "--reciep", "y"]),
        (2, "did you mean --transfer?", [*EXPLAIN, "--transfr=mean"]),
        (2, "'--tar margin' means nothing here", [*BUILD, "--tar", "margin"]),
        (2, "an empty name was given", ["build", "photos", ""]),
        (2, "'many' is not a whole number", [*BUILD, "--batch-size", "many"]),
        (2, "'7y7' is not a size; give 224 or 224x320", [*BUILD, "--size", "7y7"]),
        (5, "nothing: there is no index here; build one", ["info", "nothing"]),
        (5, "photos: not an embedcam index", ["remove", "photos", "x"]),
        (5, "photos: not an embedcam index", ["compact", "photos"]),
        (2, "required: --prototypes", ["compress", "nothing", "x"]),
        (5, "there is no index here", ["build", "nothing", "--refit"]),
        (2, "nowhere: does not exist", ["build", "nowhere", "x", *NAMED]),
        (2, "empty: contains no images", ["build", "empty", "x", *NAMED]),
        (2, "no network was named; give --network torchvision:NAME", BUILD),
        (2, "no images were given; name a folder", ["build", "x", *NAMED]),
        (4, "broken failed with KeyError: 'the shelf'",
         [*BUILD, "--network", "cli_toy_network:broken", "--layer", "relu"]),
        (4, "give one with --layer", [*BUILD, *NAMED[:2]]),
        (4, "head ", [*BUILD, *NAMED, "--head", QUERY]),
        (2, "--device nonsense cannot be used here", [*BUILD, *NAMED, "--device", "nonsense"]),
        (2, "'lots' is no number and no .npy file of shape [N S 2]",
         [*BUILD, *NAMED, "--triplets", "lots"]),
        (6, "none.npy: there is no such file", [*BUILD, *NAMED, "--triplets", "none.npy"]),
        (2, "--rank means nothing here: it goes with --encoding low-rank",
         [*BUILD, *NAMED, "--encoding", "dense", "--rank", "3"]),
        (2, "--top-m means nothing here", [*BUILD, *NAMED, "--encoding", "dense", "--top-m", "3"]),
        (2, "--margin means nothing here", [*BUILD, *NAMED, "--margin", "0.3"]),
        (2, "FAISS factory 'Falt'", [*BUILD, *NAMED, "--faiss", "Falt"]),
        (4, "did you mean make?", [*BUILD, "--network", "cli_toy_network:mak"]),
        (6, "none.toml: the recipe cannot be read", [*BUILD, "--recipe", "none.toml"]),
        (2, "which is no part of an index", ["build", "photos", "photos", *NAMED]),
        (3, "photos/0: is a folder; name the pictures in it, as in photos/0/*.jpg, or give --repor",
         ["explain", "built", "photos/0"]),
        (3, "nothing.png: does not exist", ["explain", "built", "nothing.png"]),
        (3, "broken.jpg: is not an image of a known kind", ["explain", "built", "broken.jpg"]),
        (3, "zero.jpg: is empty (0 bytes)", ["explain", "built", "zero.jpg"]),
        (2, "is one file and there are 2 queries; give a folder",
         [*EXPLAIN, "photos/0/1.png", "-o", "why.png"]),
        (2, "why.txt: .txt is no picture format", [*EXPLAIN, "-o", "why.txt"]),
        (2, "there is no folder nowhere; make it first", [*EXPLAIN, "-o", "nowhere/w.png"]),
        (2, "photos is a folder; give the name of a file in it", [*EXPLAIN, "--html", "photos"]),
        (6, "not a folder (File exists)", [*EXPLAIN, "-o", "plain"]),
        (2, "is read, and would be replaced; write", [*EXPLAIN, "-o", "photos/0"]),
        (2, "is read, and would be replaced", [*EXPLAIN, "--html", QUERY]),
        (2, "no image '0/9.png'; did you mean '0/", [*EXPLAIN, "--result", "0/9.png"]),
        (2, "-n/--n-neighbors: not allowed with argument --neighbors",
         [*EXPLAIN, "--neighbors", "0/1.png", "-n", "2"]),
        (4, "normalize is True", [*EXPLAIN, "--no-normalize"]),
        (4, 'built with {"size": [32, 32]}, and given is {"size": [64, 64]}; leave out --size',
         [*EXPLAIN, "--size", "64"]),
        (4, "that is cli_toy_network:make with layer relu, given is torchvision:squeezenet1_1 with",
         [*EXPLAIN, "--network", "torchvision:squeezenet1_1", "--weights", "random"]),
        (2, "--above 0/1.png is a rival, and no result was named; give --result, the image",
         [*EXPLAIN, "--above", "0/1.png"]),
        (3, "photos/none.png: does not exist", ["compare", "built", "photos/none.png", "0/1.png"]),
        (2, "--above 0/1.png is the result itself",
         ["compare", "built", QUERY, "0/1.png", "--above", "0/1.png"]),
        (5, "there is no index here", ["export", "nothing", "-o", "x"]),
        (2, "photos is a folder; give a file, such as photos/network.onnx",
         ["export", "built", "-o", "photos"]),
        (4, "its layer is 'relu', given is one with 'conv'",
         ["export", "built", "-o", "x", *NAMED[:2], "--layer", "conv"]),
        (4, "none.onnx: there is no such ONNX file", [*EXPLAIN, "--onnx", "none.onnx"]),
        (4, "ONNX Runtime cannot read it", [*EXPLAIN, "--onnx", QUERY]),
        (2, "leave out --network, --no-normalize, --method",
         [*EXPLAIN, "--onnx", "exported.onnx", "--network", "x:y", "--no-normalize", "--method",
          "rise"]),
        (2, "leave out --fallback", [*EXPLAIN, "--onnx", "exported.onnx", "--fallback"]),
        (2, "method = 'scorcam' is unknown; did you mean 'sc", [*EXPLAIN, "--method", "scorcam"]),
        (2, "ABN draws with a branch that is trained", [*EXPLAIN, "--method", "abn"]),
        (2, "Poly-CAM draws with several layers and this", [*EXPLAIN, "--method", "polycam"]),
        (2, "--fill and --option are a method's; name it with --method",
         [*EXPLAIN, "--fill", "black"]),
        (2, "Grad-CAM fills nothing in; leave out --fill",
         [*EXPLAIN, "--method", "gradcam", "--fill", "black"]),
        (2, "'masks' is not NAME=VALUE, such as samples",
         [*EXPLAIN, "--method", "rise", "--option", "masks"]),
        (2, "RISE has no option 'mask'; its options are",
         [*EXPLAIN, "--method", "rise", "--option", "mask=none"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done(refused, here: Path, code: int, message: str, arguments: list) -> None:
    before = files(here)
    refused(code, message, *arguments)
    assert files(here) == before
    assert not (here / "x").exists()


def test_ids_that_cannot_be_removed(say: Say, refused, index: str, tmp_path: Path) -> None:
    refused(2, "no id was given; name some", "remove", index)
    refused(2, "no image '0/O.png'; did you mean '0/", "remove", index, "0/1.png", "0/O.png")
    assert answer(say, "info", index)["counts"]["live"] == 12
    assert say("remove", index, "0/1.png")[0] == 0
    refused(2, "'0/1.png' is not in the index any more", "remove", index, "0/1.png")
    refused(2, "it was removed; add it again", "explain", index, QUERY, "--result", "0/1.png")
    refused(6, "the ids cannot be read", "remove", index, "--from", tmp_path / "none")
    refused(2, "11 of 12 images are in the index already", "add", index, "photos")


def test_a_damaged_index(say: Say, refused, index: str) -> None:
    file = next(Path(index).rglob("layer0.codes*"))
    data = bytearray(file.read_bytes())
    data[3] ^= 16
    file.write_bytes(data)
    refused(5, f"{file.name}: does not match its checksum", "verify", index)
    assert say("info", index)[0] == 0
    os.truncate(file, 7)
    refused(5, "truncated to 7 bytes", "explain", index, QUERY)
    (Path(index) / "manifest.json").write_text("{")
    refused(5, "manifest.json: is not a readable JSON", "info", index)


def test_a_busy_index(here: Path, index: str) -> None:
    with lock(index):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, "remove", index, "0/0.png"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    told = f"embedcam: {index}: another process is writing to this index; wait until it is done\n"
    assert (done.returncode, done.stderr) == (5, told)


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

    build, demo = ("build", "photos", f"{index}2", *NAMED), Path(f"{index}3")
    done = "going on: 12 of 12 images are embedded\ngoing on: weights of 12 of 12 images are done\n"
    said = "embedcam: interrupted{}\n".format
    again = said("; run the same command again to go on")
    with monkeypatch.context() as patch:
        patch.setattr("embedcam.offline.shard.embed_chunks", interrupted)
        assert say(*build) == (130, "", said(""))  # nothing is kept yet
        patch.undo()
        patch.setattr("embedcam.offline.merge.fit_encodings", interrupted)
        assert say(*build) == (130, "", again)
        assert say(*build)[2] == done + again
    assert say(*build, "--quiet")[::2] == (0, "")
    monkeypatch.setattr(Explainer, "explain", interrupted)
    monkeypatch.setattr("embedcam.demo.run_demo", interrupted)
    assert say("demo", demo)[2] == said("")
    demo.mkdir()
    (demo / "stages.json").write_text('{"scenes": "digest"}')
    assert say("demo", demo)[2] == again
    assert say("explain", index, QUERY)[::2] == (130, said(""))


def test_a_fault_of_our_own_is_70_and_a_disk_that_gives_up_is_6(
    refused, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Index, "verify", fail)

    fails(OSError(28, "No space left on device", "/somewhere"))
    refused(6, "embedcam: /somewhere: No space left on device", "verify", index)
    fails(ZeroDivisionError("a\nb"))
    refused(70, "unexpected ZeroDivisionError: a b; run again with --debug", "verify", index)
    with pytest.raises(ZeroDivisionError):
        main(["verify", index, "--debug"])


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
