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
    folder = cli_folder
    for label in range(3):
        (folder / "queries" / str(label)).mkdir(parents=True)
        picture(label, 60).save(folder / "queries" / str(label) / "q.png")
    (folder / "boxes.csv").write_text(
        "path,x0,y0,x1,y1\n" + "".join(f"queries/{i}/q.png,10,10,40,30\n" for i in range(3))
    )
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
                  "of another label"):  # fmt: skip
        assert words in out
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
    assert (told["controls"], told["objects"], told["fidelity"]) == ({}, {}, {})
    assert told["faithfulness"]["deletion"]["n"] == 2


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


def test_what_cannot_be_done(refused) -> None:
    for code, message, words in (
        (2, "photos is a folder; give the name of a file", "--csv photos"),
        (2, "boxes.csv is read, and would be replaced", "--boxes boxes.csv --csv ./boxes.csv"),
        (2, "--html and --csv both name r.txt; give each", "--html ./r.txt --csv r.txt"),
        (4, "not the network of the index", "--weights random --layer conv"),
    ):
        refused(code, message, "--images", "queries", *words.split(), "--quiet")


def test_broken_images_are_skipped_where_asked(say: Say, here: Path) -> None:
    (here / "broken").mkdir()
    picture(0, 61).save(here / "broken/a.png")
    (here / "broken/b.png").write_bytes(b"nothing")
    code, out, _ = say("--images", "broken", *FEW, "--quiet", "--on-unreadable", "skip")
    assert (code, "1 image could not be used" in out) == (0, True)
