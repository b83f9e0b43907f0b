"""What the command line says beside its results: notes, hints, and what is refused in words."""

from pathlib import Path

import numpy as np
import pytest
from cli_samples import NAMED, Say, answer
from photo_samples import write_photos
from PIL import Image
from rounding import same_values

from embedcam import Explainer, Explanation, Index, TripletMargin, cam_for, load_network
from embedcam.cli import main
from embedcam.ops import area_average

QUERY = "photos/0/0.png"


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Path:
    """A working folder with an index of each of two targets."""
    assert main(["build", "photos", "shared", "--quiet", *NAMED]) == 0
    assert main(["build", "photos", "margin", "--quiet", "--target", "margin", *NAMED]) == 0
    return cli_folder


def explained(index: str, result: str, **more: str) -> Explanation:
    explainer = Explainer(index, load_network(NAMED[1], layer="relu"), n_neighbors=2)
    return explainer.explain(QUERY, result=result, **more)


def test_images_of_a_label_that_share_an_answer_are_said_to(say: Say) -> None:
    asked = ("explain", "shared", QUERY, "--result", "2/3.png", "-o", "why.png")
    code, out, err = say(*asked)
    assert code == 0
    assert out.splitlines()[0] == f"{QUERY} -> why.png (what speaks for 2)"
    note = "the images of a label share most of their answer: what speaks for 2; "
    again = f"`embedcam compare shared {QUERY} 2/3.png` says what matches this one image"
    assert note + again in err
    assert note not in say(*asked, "--quiet")[2]
    # Margins are each image's own, and so is a map that a method makes of the result itself.
    _, out, err = say("explain", "margin", *asked[2:])
    assert ("(what matched 2/3.png)" in out, err) == (True, "")
    _, out, err = say(*asked, "--method", "eigencam")
    assert ("(what matched 2/3.png)" in out, note in err) == (True, False)


def test_a_rival_is_named_told_and_shown(say: Say) -> None:
    asked = ["--result", "2/3.png", "--above", "1/0.png", "-n", 2]
    for index, words in (("margin", "2/3.png rather than 1/0.png"), ("shared", "2 rather than 1")):
        code, out, err = say("explain", index, QUERY, *asked, "-o", "rival.png")
        assert code == 0
        assert out.splitlines()[0] == f"{QUERY} -> rival.png (what speaks for {words})"
        assert [row.split()[0] for row in out.splitlines()[2:4]] == ["asked", "rival"]
        again = f"`embedcam compare shared {QUERY} 2/3.png --above 1/0.png` says what puts the one "
        assert (f"what speaks for 2 rather than 1; {again}" in err) == (index == "shared")
        (told,) = answer(say, "explain", index, QUERY, *asked)
        expected = explained(index, "2/3.png", above="1/0.png").to_dict((14, 14))
        assert same_values(told, {"query": QUERY, **expected})
    err = say("explain", "margin", QUERY, *asked, "--fallback")[2]
    assert "a map with a rival has no trust; leave out --fallback, or give --method gradcam" in err


def test_a_method_computes_the_margin_of_both_distances(say: Say) -> None:
    asked = ["--result", "2/3.png", "--above", "1/0.png", "--method", "gradcam", "--quiet"]
    (told,) = answer(say, "explain", "margin", QUERY, *asked)
    network = load_network(NAMED[1], layer="relu")
    with Index.open("margin") as index:
        one, other = index.embeddings(index.positions(["2/3.png", "1/0.png"]))
    expected = cam_for(network, QUERY, TripletMargin(one[None], other[None]), "gradcam").cam
    drawn = area_average(expected, np.shape(told["cam"]))
    assert expected.max() > 0
    np.testing.assert_allclose(told["cam"], drawn, rtol=1e-4, atol=1e-6 * expected.max())
    assert told["rival"]["id"] == "1/0.png"


def test_the_result_that_was_asked_for_is_shown_once_however_far_it_is(say: Say) -> None:
    why = explained("margin", "2/3.png")
    assert "2/3.png" not in why.ids
    _, (first, *others) = why.tiles()
    with Index.open("margin") as index:
        place = index.position("2/3.png")
        norm = float(np.linalg.norm(index.weights([place])))
        np.testing.assert_allclose(first.cam, index.coarse([place])[0] / norm, rtol=1e-5)
        both = index.embeddings([place, index.position("0/0.png")]).astype(np.float64)
    apart = ((both[0] - both[1]) ** 2).sum()
    assert first.subcaption == f"2\ndistance {apart:.3f}\nasked for"
    assert [tile.caption for tile in others] == [name.rpartition("/")[2] for name in why.ids]
    record = why.to_dict()["result"]
    assert (record["id"], record["label"], record["path"]) == ("2/3.png", "2", why.asked.path)
    assert record["distance"] == pytest.approx(apart, rel=1e-5)
    assert record["similarity"] == pytest.approx(both[0] @ both[1], rel=1e-5)
    asked = ("explain", "margin", QUERY, "-n", 2, "--result")
    row = say(*asked, "2/3.png")[1].splitlines()[2].split()
    assert row == ["asked", f"{apart:.3g}", "2/3.png", "2"]

    near = explained("margin", "0/0.png")
    assert near.ids[0] == near.to_dict()["result"]["id"] == "0/0.png"
    assert near.tiles()[1][0].subcaption.endswith("\nasked for")
    (line,) = (one for one in say(*asked, "0/0.png")[1].splitlines() if "asked" in one)
    assert line.split()[0] == "1"


def test_that_no_picture_was_written_is_said(say: Say) -> None:
    note = "note: no picture was written; -o why.png draws one\n"
    assert say("explain", "margin", QUERY)[2] == note
    for option in (["--json"], ["--quiet"], ["-o", "why.png"]):
        assert say("explain", "margin", QUERY, *option)[2] == ""


def test_indexed_pictures_that_moved_are_counted(say: Say, tmp_path: Path) -> None:
    write_photos(tmp_path / "before", labels=2)
    index = tmp_path / "index"
    assert say("build", tmp_path / "before", index, "--quiet", *NAMED)[0] == 0
    asked = ("explain", index, QUERY, "-n", 3)
    assert say(*asked, "--html", tmp_path / "a.html")[2] == f"page: {tmp_path / 'a.html'}\n"
    (tmp_path / "before").rename(tmp_path / "after")
    assert say(*asked, "-o", tmp_path / "why.png")[2] == (
        f"note: 3 of 3 indexed pictures were not found under {tmp_path / 'before'}; "
        "--images FOLDER says where they are\n"
    )
    assert say(*asked, "-o", tmp_path / "why.png", "--images", tmp_path / "after")[2] == ""
    for words in (asked, ("compare", index, QUERY, "0/0.png")):
        code, out, err = say(*words, "--images", tmp_path / "none")
        assert (code, out) == (2, "")
        assert f"--images {tmp_path / 'none'}: there is no such folder; give the one" in err


def test_a_prototype_is_compared_by_its_picture(say: Say, tmp_path: Path) -> None:
    assert say("compress", "margin", tmp_path / "small", "--prototypes", "2", "--quiet")[0] == 0
    name = say("info", tmp_path / "small", "--ids")[1].splitlines()[0]
    code, out, err = say("compare", tmp_path / "small", QUERY, name, "--lines", "99")
    assert code == 0
    assert "other channels" not in out
    assert err == (
        "note: a prototype is the mean of several images; what is compared is the picture in its "
        "middle\n"
    )
    assert say("compare", "margin", QUERY, "0/1.png")[2] == ""


def test_a_folder_for_pictures_is_made_when_there_are_some(say: Say, tmp_path: Path) -> None:
    wanted = tmp_path / "not" / "yet"
    code, _, _ = say("explain", "margin", QUERY, "-o", wanted, "--result", "none")
    assert code == 2
    assert list(tmp_path.iterdir()) == []
    assert say("explain", "margin", QUERY, "-o", wanted)[0] == 0
    assert [file.name for file in wanted.iterdir()] == ["0.png"]


def test_ids_are_listed_and_their_list_is_named(say: Say, refused) -> None:
    expected = [f"{label}/{number}.png" for label in range(3) for number in range(4)]
    assert say("info", "margin", "--ids")[1].splitlines() == expected
    said = "the index has no image 'zebra'; `embedcam info INDEX --ids` lists those it has\n"
    refused(2, said, "remove", "margin", "zebra")
    refused(2, said, "explain", "margin", QUERY, "--neighbors", "0/0.png,zebra")


def test_ids_of_an_empty_index(say: Say, refused, tmp_path: Path) -> None:
    index = tmp_path / "i"
    assert say("build", "photos", index, "--quiet", *NAMED)[0] == 0
    ids = answer(say, "info", index, "--ids")
    assert say("remove", index, *ids[1:])[0] == 0
    gone = f"embedcam: the image {ids[1]!r} is not in the index any more: it was removed; "
    refused(2, f"{gone}nothing to do\n", "remove", index, ids[1])
    refused(2, "leave it out; nothing was removed", "remove", index, *ids[:2])
    assert say("remove", index, ids[0])[0] == 0
    assert say("info", index, "--ids")[1] == ""


def test_only_new_images_are_added_where_asked(say: Say, refused, tmp_path: Path) -> None:
    photos, index = write_photos(tmp_path / "photos", labels=2), tmp_path / "index"
    assert say("build", photos, index, "--quiet", *NAMED)[0] == 0
    again = ("add", index, photos)
    refused(2, "; leave them out (--skip-existing), or remove them from the index first;", *again)
    told, note = "holds these images already; nothing to do", "8 images left out: in the index"
    answered = (0, f"{index}: {told}\n", f"{note} already\n")
    assert say(*again, "--skip-existing") == answered
    Image.new("RGB", (40, 40), "teal").save(photos / "1/new.png")
    code, out, err = say(*again, "--skip-existing")
    assert (code, err.startswith(f"{note} already\n")) == (0, True)
    assert out.startswith(f"{index}: 1 image added in ")


def test_what_stops_at_a_broken_file_names_the_way_around_it(say, refused, tmp_path):
    more, index = write_photos(tmp_path / "more", labels=2), tmp_path / "index"
    assert say("build", more, index, "--quiet", *NAMED)[0] == 0
    (more / "1/fake.jpg").write_text("no picture")
    build = ["build", more, tmp_path / "other", *NAMED]
    for words in (build, ["add", index, more, "--skip-existing"]):
        refused(3, "; --on-unreadable skip leaves such files out\n", *words, "--quiet")
    code, _, err = say(*build, "--on-unreadable", "skip")
    assert code == 0
    assert "skipped 1/fake.jpg: is not an image" in err


def test_recipes_that_came_along_are_called_by_name(say: Say, refused, tmp_path: Path) -> None:
    build = ("build", "photos", tmp_path / "index", "--quiet", *NAMED, "--recipe")
    assert say(*build, "paper", "--top-m", 4)[0] == 0
    recipe = answer(say, "info", tmp_path / "index")["recipe"]
    assert (recipe["encoding"], recipe["m"], recipe["triplets"]) == ("top-m", 4, 50)
    known = "default, gradeclip, maskclip, paper, unlabelled"
    said = f"papre: there is no such recipe; did you mean 'paper'? known: {known}"
    refused(2, f"embedcam: {said}; or give a TOML file\n", *build, "papre")


def test_info_says_when_trust_was_calibrated(say: Say, tmp_path: Path) -> None:
    many, index = write_photos(tmp_path / "many", labels=3, each=14), tmp_path / "index"
    extra = write_photos(tmp_path / "extra", labels=1, each=1)
    (extra / "0/0.png").rename(extra / "0/extra.png")
    assert say("build", many, index, "--quiet", *NAMED)[0] == 0
    told = "; calibrated on 42 images that queried it"
    assert f"{told}\n" in say("info", index)[1]
    assert say("add", index, extra, "--quiet")[0] == 0
    assert f"{told}; 1 image more came after the build\n" in say("info", index)[1]
    assert "match calibrated on 43 images\n" in say("calibrate", index, "--no-trust")[1]
    assert answer(say, "calibrate", index) == {"match": 43, "trust": 43}


def test_a_report_takes_labels_from_a_csv_and_begins_with_those_that_came_back_wrong(say, tmp_path):
    asked, named = tmp_path / "asked.csv", Path("photos").resolve()
    asked.write_text(f"path,label\n{named}/0/0.png,1\n{named}/1/0.png,1\n")
    for name, told in (("auto", True), ("none", False)):
        report = ("--report", tmp_path / name, "--labels", name)
        assert say("explain", "shared", asked, *report)[0] == 0
        page = (tmp_path / name / "index.html").read_text(encoding="utf-8")
        assert ("First result of another label: 1 of 2 queries" in page) == told
