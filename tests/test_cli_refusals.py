"""What the command line cannot do is said in one sentence; and how its process ends."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import NAMED, TRUSTED, Say, answer

from embedcam import Explainer, Index
from embedcam.cli import main
from embedcam.cli.parser import COMMANDS, examples, parser

QUERY = "photos/0/0.png"
PROCESS = "import sys; from embedcam.cli import main; sys.exit(main())"


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Path:
    """A working folder with an index, its network as a file, and an empty file."""
    assert main(["build", "photos", "built", "--quiet", *NAMED]) == 0
    assert main(["export", "built", "-o", "exported.onnx", "--quiet", *TRUSTED]) == 0
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
        (2, "required: INDEX, IMAGE", ["explain"]),
        (2, "did you mean --recipe?", [*BUILD, "--reciep", "y"]),
        (2, "did you mean --transfer?", [*EXPLAIN, "--transfr=mean"]),
        (2, "'--tar margin' means nothing here", [*BUILD, "--tar", "margin"]),
        (2, "an empty name was given", ["build", "photos", ""]),
        (2, "'many' is not a whole number", [*BUILD, "--batch-size", "many"]),
        (2, "'7y7' is not a size; give 224 or 224x320", [*BUILD, "--size", "7y7"]),
        (5, "nothing: there is no index here; build one", ["info", "nothing"]),
        (5, "there is no index here", ["build", "nothing", "--refit"]),
        (2, "no network was named; give --network torchvision:NAME", BUILD),
        (2, "no images were given; name a folder", ["build", "x", *NAMED]),
        (4, "broken failed with KeyError: 'the shelf'",
         [*BUILD, "--network", "cli_toy_network:broken", "--layer", "relu"]),
        (4, "head ", [*BUILD, *NAMED, "--head", QUERY]),
        (2, "--device nonsense cannot be used here", [*BUILD, *NAMED, "--device", "nonsense"]),
        (2, "'lots' is no number and no .npy file of shape [N S 2]",
         [*BUILD, *NAMED, "--triplets", "lots"]),
        (6, "none.npy: there is no such file", [*BUILD, *NAMED, "--triplets", "none.npy"]),
        (2, "--rank means nothing here: it goes with --encoding low-rank",
         [*BUILD, *NAMED, "--encoding", "dense", "--rank", "3"]),
        (4, "did you mean make?", [*BUILD, "--network", "cli_toy_network:mak"]),
        (6, "none.toml: the recipe cannot be read", [*BUILD, "--recipe", "none.toml"]),
        (3, "photos/0: is a folder; name the pictures in it, as in photos/0/*.jpg, or give --repor",
         ["explain", "built", "photos/0"]),
        (2, "is one file and there are 2 queries; give a folder",
         [*EXPLAIN, "photos/0/1.png", "-o", "why.png"]),
        (2, "there is no folder nowhere; make it first", [*EXPLAIN, "-o", "nowhere/w.png"]),
        (2, "photos is a folder; give the name of a file in it", [*EXPLAIN, "--html", "photos"]),
        (6, "not a folder (File exists)", [*EXPLAIN, "-o", "plain"]),
        (2, "is read, and would be replaced; write", [*EXPLAIN, "-o", "photos/0"]),
        (2, "is read, and would be replaced", [*EXPLAIN, "--html", QUERY]),
        (2, "-n/--n-neighbors: not allowed with argument --neighbors",
         [*EXPLAIN, "--neighbors", "0/1.png", "-n", "2"]),
        (4, 'built with {"size": [32, 32]}, and given is {"size": [64, 64]}; leave out --size',
         [*EXPLAIN, "--size", "64"]),
        (4, "that is cli_toy_network:make with layer relu, given is torchvision:squeezenet1_1 with",
         [*EXPLAIN, "--network", "torchvision:squeezenet1_1", "--weights", "random"]),
        (2, "--above 0/1.png is a rival, and no result was named; give --result, the image",
         [*EXPLAIN, "--above", "0/1.png"]),
        (2, "photos is a folder; give a file, such as photos/network.onnx",
         ["export", "built", "-o", "photos"]),
        (2, "leave out --network, --no-normalize, --method",
         [*EXPLAIN, "--onnx", "exported.onnx", "--network", "x:y", "--no-normalize", "--method",
          "rise"]),
        (2, "--fill and --option are a method's; name it with --method",
         [*EXPLAIN, "--fill", "black"]),
        (2, "Grad-CAM fills nothing in; leave out --fill",
         [*EXPLAIN, "--method", "gradcam", "--fill", "black"]),
        (2, "'masks' is not NAME=VALUE, such as samples",
         [*EXPLAIN, "--method", "rise", "--option", "masks"]),
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
    refused(2, "it was removed; add it again", "explain", index, QUERY, "--result", "0/1.png")
    refused(6, "the ids cannot be read", "remove", index, "--from", tmp_path / "none")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[network]\nsize = 'big'", "[network] size = 'big'; give (height, width), whole numbers"),
        ("[images]\npaht = 'photos'", "[images] has no entry 'paht'; did you mean 'path'?"),
        ("[images]\nexclude = 3", "[images] exclude = 3; give a text or a list of texts"),
        ("[images]\nlabels = 'some'", "[images] labels = 'some' is unknown; known: auto, "),
    ],
)
def test_recipes_that_mean_nothing(refused, tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(toml)
    images = [] if "path =" in toml else ["photos"]
    refused(2, message, "build", *images, tmp_path / "i", "--recipe", tmp_path / "r.toml", *NAMED)


def test_options_stand_anywhere(say: Say, index: str) -> None:
    assert say("explain", index, QUERY, "-n", 1, "photos/1/1.png")[1].count("photos/") == 2
    assert answer(say, "remove", "--quiet", index, "--json", "0/0.png")["removed"] == 1
    known = parser().parse_args(["build", "photos", "--network", "a:b", "x.index"])
    assert (known.images, known.index, known.network) == ("photos", "x.index", "a:b")
    known = parser().parse_args(["build", "--network", "a:b", "x.index"])
    assert (known.images, known.index) == (None, "x.index")
    known = parser().parse_args(["remove", "x.index", "--", "-5.jpg", "--json"])
    assert (known.ids, known.json) == (["-5.jpg", "--json"], False)


def test_an_interruption_is_130_and_says_how_to_go_on(say, index, monkeypatch):
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
        passes = "forward passes: batches of 8, torch\n"
        assert say(*build) == (130, "", passes + again)
        assert say(*build)[2] == done + again
    assert say(*build, "--quiet")[::2] == (0, "")
    monkeypatch.setattr(Explainer, "explain", interrupted)
    monkeypatch.setattr("embedcam.demo.run_demo", interrupted)
    assert say("demo", demo)[2] == said("")
    demo.mkdir()
    (demo / "stages.json").write_text('{"scenes": "digest"}')
    assert say("demo", demo)[2] == again
    assert say("explain", index, QUERY)[::2] == (130, said(""))


def test_a_fault_of_our_own_is_70_and_a_disk_that_gives_up_is_6(refused, index, monkeypatch):
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
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for command in (["info", "built"], ["info", "built", "--json"]):
        words = [sys.executable, "-c", PROCESS, *command]
        done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writing)


def test_the_examples_of_help_parse() -> None:
    text = "\n".join(examples().values()).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("  embedcam ")]
    assert {line.split()[1] for line in lines} >= set(COMMANDS)
    for line in lines:
        words = line.split("  ")[0] if "--weights" not in line else line
        parser().parse_args(shlex.split(words.split("&&")[0].partition("  without ")[0])[1:])
