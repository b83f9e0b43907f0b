"""`embedcam evaluate` on the command line."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
from cli_samples import NAMED, Say
from photo_samples import picture

from embedcam.cli import main

FEW = ["--faithfulness", "2", "--scenes", "2", "--fidelity", "3", "--steps", "3", "--examples", "1"]


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Path:
    """A working folder with an index, queries, boxes and a network to be named."""
    folder = cli_folder
    for label in range(3):
        (folder / "queries" / str(label)).mkdir(parents=True)
        picture(label, 60).save(folder / "queries" / str(label) / "q.png")
    (folder / "boxes.csv").write_text(
        "path,x0,y0,x1,y1\n" + "".join(f"queries/{i}/q.png,10,10,40,30\n" for i in range(3))
    )
    (folder / "beyond.csv").write_text("path,x0,y0,x1,y1\nqueries/0/q.png,10,10,400,30\n")
    (folder / "empty").mkdir()
    assert main(["build", "photos", "my.index", "--quiet", *NAMED]) == 0
    return folder


@pytest.fixture
def say(say: Say) -> Say:
    return partial(say, "evaluate", "my.index")


def test_a_table_a_page_and_numbers(say: Say, tmp_path: Path) -> None:
    page, numbers = tmp_path / "report.html", tmp_path / "numbers.csv"
    code, out, err = say("--images", "queries", "--boxes", "boxes.csv", *FEW,
                         "--html", page, "--csv", numbers)  # fmt: skip
    assert code == 0, err
    for words in ("3 of 3 images against an index of 12", "Recall@1", "energy inside",
                  "Telling two objects apart", "Beside controls that know nothing, 2 images",
                  "shuffled network", "Transfer fidelity", "in forward passes",
                  "\nOn pictures of one object mean activation, which shows what is salient, is ha",
                  "of another label",
                  ):  # fmt: skip
        assert words in out
    assert f"page: {page}" in err
    assert page.read_text().startswith("<!DOCTYPE html>")
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["0/q.png", "1/q.png", "2/q.png"]
    assert all(0 <= float(row["energy"]) <= 1 for row in rows)


def test_json_and_choices(say: Say) -> None:
    code, out, err = say("--images", "queries", *FEW, "--json", "--quiet", "--limit", 2, "-n", 1,
                         "--measures", "retrieval,faithfulness", "--no-controls")  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["images"]["measured"] == 2
    assert told["settings"]["n_neighbors"] == 1
    assert told["settings"]["measures"] == ["retrieval", "faithfulness"]
    assert (told["controls"], told["objects"], told["fidelity"]) == ({}, {}, {})
    assert told["faithfulness"]["deletion"]["n"] == 2
    assert "a seeded sample of 2 of 3 images was queried" in told["notes"]


def test_methods_and_recipes_are_columns(say: Say, here: Path, tmp_path: Path) -> None:
    (here / "five.toml").write_text('[weights]\ntarget = "margin"\n')
    page, numbers = tmp_path / "report.html", tmp_path / "numbers.csv"
    code, out, err = say("--images", "queries", *FEW, "--measures", "objects,faithfulness",
                         "--methods", "gradcam,hirescam", "--recipes", "five.toml", "--html", page,
                         "--csv", numbers)  # fmt: skip
    assert code == 0, err
    assert "transferred [95%]" in out
    for way in ("Grad-CAM", "HiResCAM", "five"):
        assert f"{way} [95%]" in out
        assert f'<b title="{way}">{way}</b>' in page.read_text()
        assert f"{way}: deletion" in numbers.read_text().partition("\n")[0]
    code, _, err = say("--images", "queries", "--recipes", "none.toml", "--quiet")
    assert (code, err) == (6, "embedcam: none.toml: the recipe cannot be read (No such file or "
                              "directory)\n")  # fmt: skip


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "nowhere: does not exist", ["--images", "nowhere"]),
        (2, "empty: contains no images", ["--images", "empty"]),
        (2, "beyond.csv, line 2: the box 10, 10, 400, 30 reaches beyond its picture of 48 x 40",
         ["--images", "queries", "--boxes", "beyond.csv"]),
        (2, "argument --boxes: not allowed with argument --masks",
         ["--images", "queries", "--masks", "empty", "--boxes", "boxes.csv"]),
        (2, "there is no folder nowhere", ["--images", "queries", "--html", "nowhere/r.html"]),
        (2, "photos is a folder; give the name of a file",
         ["--images", "queries", "--csv", "photos"]),
        (2, "boxes.csv is read, and would be replaced; write somewhere else",
         ["--images", "queries", "--boxes", "boxes.csv", "--csv", "./boxes.csv"]),
        (2, "--html and --csv both name r.txt; give each its own file",
         ["--images", "queries", "--html", "./r.txt", "--csv", "r.txt"]),
        (2, "--indexed nowhere: there is no such folder",
         ["--images", "queries", "--indexed", "nowhere"]),
        (2, "measures = 'energy' is unknown; known: retrieval, ",
         ["--images", "queries", "--measures", "energy"]),
        (4, "not the network of the index",
         ["--images", "queries", "--weights", "random", "--layer", "conv"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done(
    say: Say, refused, code: int, message: str, arguments: list[str]
) -> None:
    refused(code, message, *arguments, "--quiet")


def test_broken_images_are_skipped_where_asked(say: Say, here: Path) -> None:
    (here / "broken").mkdir()
    picture(0, 61).save(here / "broken/a.png")
    (here / "broken/b.png").write_bytes(b"nothing")
    assert say("--images", "broken", *FEW, "--quiet")[0] == 3
    code, out, _ = say("--images", "broken", *FEW, "--quiet", "--on-unreadable", "skip")
    assert code == 0
    assert "1 image could not be used" in out
