"""`embedcam explain --report`: what it prints, writes and refuses."""

import json
from functools import partial

import pytest
from build_samples import everything
from cli_samples import NAMED
from photo_samples import picture

from embedcam import Explainer, find_images, load_network, write_report
from embedcam.cli import main


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder):
    """A working folder with an index, queries, and a module with its network."""
    (cli_folder / "queries/deep/er").mkdir(parents=True)
    for number in range(5):
        picture(number % 3, 70 + number).save(cli_folder / f"queries/deep/er/{number}.png")
    (cli_folder / "queries/broken.jpg").write_text("a letter")
    assert main(["build", "photos", "my.index", "--quiet", *NAMED]) == 0


@pytest.fixture
def say(say):
    return partial(say, "explain", "my.index")


def test_a_folder_of_queries_is_one_page(say, tmp_path):
    out = tmp_path / "out"
    code, told, noted = say("queries", "--report", out, "-n", 2, "--batch-size", 2)
    assert (code, told) == (0, f"{out}/index.html: 6 queries\n")
    passes, unreadable = noted.splitlines()
    assert passes == "forward passes: batches of 2, torch"
    assert unreadable.startswith("note: queries/broken.jpg: is not an image of a known kind")
    explainer = Explainer("my.index", load_network("cli_toy_network:make", layer="relu"))
    source = find_images("queries", "none")
    write_report(explainer, source, tmp_path / "same", n_neighbors=2, batch_size=2)
    assert everything(out) == everything(tmp_path / "same")
    told = f"{out}/index.html: all 6 queries explained before; nothing to do\n"
    assert say("queries", "--report", out, "-n", 2, "--quiet") == (0, told, "")


def test_pictures_are_queries_too(say, tmp_path):
    named = ["photos/1/1.png", "queries/deep/er/1.png"]
    told = f"{tmp_path}/a/index.html: 2 queries\n"
    passes = "forward passes: batches of 8, torch\n"
    more = ("--scale", "each", "--no-receipts")
    assert say(*named, "--report", tmp_path / "a", *more) == (0, told, passes)
    assert "beneath" not in (tmp_path / "a/index.html").read_text()
    lines = (tmp_path / "a/explanations.jsonl").read_text().splitlines()
    assert [json.loads(line)["query"] for line in lines] == named


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "--receipts is of a report", ["photos/1/1.png", "--receipts"]),
        (2, "leave out -o", ["queries", "--report", "OUT", "-o", "x.png"]),
        (2, "leave out --html", ["queries", "--report", "OUT", "--html", "x.html"]),
        (2, "writes index.html and explanations.jsonl", ["queries", "--report", "OUT", "--json"]),
        (2, "leave out --method rise", ["queries", "--report", "OUT", "--method", "rise"]),
        (2, "--batch-size is of a report", ["photos/0/0.png", "--batch-size", "3"]),
        (2, "give one folder, one CSV or pictures", ["queries", "photos", "--report", "OUT"]),
        (3, "nothing.png: does not exist", ["nothing.png", "--report", "OUT"]),
        (3, "or give --report FOLDER", ["queries"]),
    ],
)
def test_refused_before_the_network_is_loaded(refused, tmp_path, monkeypatch, code, message, words):
    monkeypatch.delattr("embedcam.network.load_network")
    out = tmp_path / "out"
    refused(code, message, *(out if word == "OUT" else word for word in words))
    assert not out.exists()
