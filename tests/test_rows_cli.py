"""`embedcam rows` and `model`, and `explain` and `compare` by what they wrote."""

import json
from pathlib import Path

import pytest
from cli_samples import NAMED, TRUSTED, Say, answer

from embedcam import Index
from embedcam.cli import main

QUERY = "photos/2/1.png"


@pytest.fixture(scope="module", autouse=True)
def built(cli_folder: Path, quick_disk: None) -> None:
    """A working folder with an index of twelve photographs, its model and its rows."""
    assert main(["build", "photos", "i", "--quiet", *NAMED]) == 0
    assert main(["model", "i", "-o", "m.embedcam"]) == 0
    assert main(["rows", "i", "--to", "i.lance", "--quiet"]) == 0


STORED = ["--store", "i.lance", *TRUSTED]


def test_rows_are_written_once_and_removed_ones_go(say: Say, tmp_path: Path) -> None:
    index, store = tmp_path / "i", tmp_path / "rows.lance"
    assert main(["build", "photos", str(index), "--quiet", *NAMED]) == 0
    generation = Index.open(index).generation
    told = say("rows", index, "--to", store)[1]
    assert told == f"{store}: 12 rows written, generation {generation}\n"
    told = say("rows", index, "--to", store)[1]
    assert told == f"{store}: nothing to write, 12 there before, generation {generation}\n"
    assert main(["remove", str(index), "1/0.png", "1/1.png"]) == 0
    assert main(["compact", str(index)]) == 0
    told = answer(say, "rows", index, "--to", store)
    assert (told["written"], told["unknown"], told["pruned"]) == (10, 2, 0)
    told = say("rows", index, "--to", store, "--prune")[1]
    assert "10 there before, 2 pruned, which the index does not know" in told
    assert answer(say, "rows", index, "--to", store)["unknown"] == 0


def test_generations_lie_side_by_side_until_one_is_dropped(say: Say, tmp_path: Path) -> None:
    store, old, new = tmp_path / "rows.lance", Index.open("i").generation, tmp_path / "new"
    assert main(["build", "photos", str(new), "--quiet", "--target", "margin", *NAMED]) == 0
    assert main(["rows", "i", "--to", str(store), "--quiet"]) == 0
    told = answer(say, "rows", new, "--to", store)
    assert (told["written"], told["others"]) == (12, {old: 12})
    assert main(["model", str(new), "-o", str(tmp_path / "new.embedcam")]) == 0
    for model, index in (("m.embedcam", "i"), (tmp_path / "new.embedcam", new)):
        found = answer(say, "explain", "--model", model, "--store", store, QUERY, *TRUSTED)
        assert found == answer(say, "explain", index, QUERY)
    told = say("rows", new, "--to", store, "--drop-generation", old)[1]
    assert f"12 rows of generation {old} dropped" in told
    code, _, err = say("explain", "--model", "m.embedcam", "--store", store, QUERY, *TRUSTED)
    assert (code, f"no row came back of generation {old}" in err) == (2, True)


@pytest.mark.parametrize(
    "more", [[], ["--result", "1/0.png"], ["--result", "1/0.png", "--above", "0/0.png"],
             ["--neighbors", "0/1.png,1/2.png"], ["-n", "2"], ["--exclude-query"],
             ["--method", "gradcam++"], ["--method", "gradcam", "--result", "1/0.png"]],
)  # fmt: skip
def test_explain_answers_as_the_index_does(say: Say, more: list[str]) -> None:
    expected = answer(say, "explain", "i", QUERY, *more, *TRUSTED)
    found = answer(say, "explain", "--model", "m.embedcam", QUERY, *more, *STORED)
    assert found == expected
    assert answer(say, "explain", "m.embedcam", QUERY, *more, *STORED) == expected


def test_compare_answers_as_the_index_does(say: Say) -> None:
    for more in ([], ["--above", "0/0.png"]):
        expected = answer(say, "compare", "i", QUERY, "1/0.png", *more, *TRUSTED)
        assert answer(say, "compare", "m.embedcam", QUERY, "1/0.png", *more, *STORED) == expected


def test_a_model_says_what_it_is(say: Say, tmp_path: Path) -> None:
    told = answer(say, "model", "i", "-o", tmp_path / "m.embedcam")
    size = (tmp_path / "m.embedcam").stat().st_size
    assert told["bytes"] == size == Path("m.embedcam").stat().st_size
    assert told["generation"] == Index.open("i").generation
    assert say("verify", "m.embedcam")[0] == 0
    assert json.loads(say("info", "m.embedcam", "--json")[1])["counts"]["rows"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows", "i", "--to", "cloud://x"], "is the address of no store that is known; expected"),
        (["rows", "m.embedcam", "--to", "x.lance"], "is a model, which holds no images; give the"),
        (["rows", "i", "--to", "x.lance", "--embedding", "third"], "invalid choice: 'third'"),
        (["rows", "i"], "required: --to"),
        (["model", "i", "-o", "photos"], "photos is a folder; give the name of a file in it"),
        (["model", "i", "-o", "no/m.embedcam"], "there is no folder no; make it first"),
        (["explain", "--model", "m.embedcam", QUERY], "say with --store URL where its rows are"),
        (["explain", "m.embedcam", QUERY], "of a model, say with --store URL where its rows are"),
        (["explain", "i", QUERY, "--store", "i.lance"], "--store goes with the file of a model"),
        (["explain", "i"], "no picture was given"),
        (
            ["explain", "m.embedcam", QUERY, "--store", "i.lance", "--result", "nobody"],
            "the store holds no row of 'nobody'; check the id",
        ),
        (
            ["explain", "m.embedcam", QUERY, "--store", "i.lance", "--report", "r"],
            "--report tells of a whole index",
        ),
        (
            ["explain", "m.embedcam", QUERY, "--store", "i.lance", "--fallback", *TRUSTED],
            "leave out --fallback",
        ),
        (["compare", "m.embedcam", QUERY, "1/0.png"], "say with --store URL where its rows are"),
        (["compare", "i", QUERY, "1/0.png", "--store", "x"], "--store goes with the file of a"),
        (["compact", "m.embedcam"], "give the folder of the index"),
    ],
)
def test_wrong_words_are_told_in_one_sentence(say: Say, words: list[str], said: str) -> None:
    code, out, err = say(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_its_own_generation_is_not_dropped(say: Say) -> None:
    own = Index.open("i").generation
    code, _, err = say("rows", "i", "--to", "i.lance", "--drop-generation", own)
    assert (code, "is the generation of this index" in err) == (2, True)


def test_a_store_that_is_not_there_is_told(say: Say) -> None:
    words = ["explain", "--model", "m.embedcam", "--store", "gone.lance", QUERY, *TRUSTED]
    code, _, err = say(*words)
    assert (code, "gone.lance: holds no table" in err) == (6, True)
