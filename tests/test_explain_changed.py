"""Results whose pictures were replaced since the build, and queries that are of the index."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_samples import dense, pictures, toy
from PIL import Image
from service_client import ask, data_of, picture, post
from service_client import explainer as served
from test_build_update import unmarked

from embedcam import Explainer, PairExplainer, build_index, find_images
from embedcam.cli import main
from embedcam.errors import ImageError, InputError
from embedcam.index import Index, compact
from embedcam.prototypes import compress
from embedcam.render import Tile
from embedcam.report import write_report

YELLOW = (255, 255, 0)
CHANGED, QUERY = "c0/003.png", "photos/c0/000.png"


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures with their index, of which one was replaced and one removed since."""
    folder = tmp_path_factory.mktemp("photos")
    build_index(pictures(folder / "photos"), toy().network, folder / "i", dense(), progress=False)
    shutil.copytree(folder / "photos", folder / "as-built")
    Image.new("RGB", (40, 20), YELLOW).save(folder / "photos" / CHANGED)
    (folder / "photos/c1/004.png").unlink()
    os.utime(folder / "photos/c2/005.png", ns=(0, 0))
    return folder


@pytest.fixture
def why(made: Path) -> Any:
    with Explainer(made / "i", toy().network, n_neighbors=12) as explainer:
        yield explainer.explain(made / QUERY)


def test_each_result_says_what_became_of_its_file(why: Any) -> None:
    files = {one["id"]: one["file"] for one in why.to_dict((2, 2))["neighbors"]}
    assert (files.pop(CHANGED), files.pop("c1/004.png")) == ("changed", "missing")
    assert set(files.values()) == {"same"}  # a touched one among them
    assert (why.changed(), why.not_found()) == ([CHANGED], ["c1/004.png"])


def test_the_new_picture_is_shown_with_a_note_and_without_the_old_map(why: Any) -> None:
    _, tiles = why.tiles()
    by_name = {tile.caption: tile for tile in tiles}
    changed, same = by_name["003.png"], by_name["000.png"]
    assert (changed.changed, same.changed) == (True, False)
    assert changed.subcaption.endswith("changed since the build")
    assert "changed" not in same.subcaption
    size = (200, 100)
    plain, mapped = (np.asarray(one).astype(int) for one in changed.drawn(size, 1.0))
    assert (np.abs(plain[:70] - YELLOW) <= 3).all()
    assert (plain[80:] < 60).mean() > 0.3  # words on a dark strip
    alone = np.asarray(Tile(None, changed.cam).drawn((200, 200), 1.0)[1].resize(size))
    assert np.abs(mapped - alone).mean() < 4  # the map by itself, on grey
    assert not (np.abs(mapped - YELLOW) <= 40).all(-1).any()


def test_a_changed_result_that_was_asked_for(made: Path, tmp_path: Path) -> None:
    with Explainer(made / "i", toy().network, n_neighbors=1) as explainer:
        why = explainer.explain(made / QUERY, result=CHANGED)
        assert why.changed() == [CHANGED]
        assert why.to_dict()["result"]["file"] == "changed"
        assert why.tiles()[1][0].subcaption.endswith("asked for\nchanged since the build")
        states = [explainer.file_state(name) for name in (CHANGED, "c1/004.png", "c2/005.png")]
        assert states == ["changed", "missing", "same"]
    with Explainer(made / "i", toy().network, images=tmp_path) as explainer:
        found = explainer.explain(made / QUERY).to_dict()["neighbors"]
    assert {one["file"] for one in found} == {"missing"}  # the paths kept are not looked at


@pytest.fixture
def markless(made: Path, tmp_path: Path) -> Path:
    index = Path(shutil.copytree(made / "i", tmp_path / "markless"))
    unmarked(index)
    return index


def test_an_index_without_marks_says_once_that_it_cannot_tell(made, markless, caplog) -> None:
    with Explainer(made / "i", toy().network) as explainer:
        explainer.explain(made / QUERY)
    assert caplog.messages == []
    with Explainer(markless, toy().network, n_neighbors=12) as explainer:
        found = [explainer.explain(made / QUERY) for _ in range(2)]
        compact(markless)
        explainer.reload()
        assert explainer.file_state(CHANGED) is None
    assert len(caplog.messages) == 1
    assert "keeps no marks of its images' files" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING
    assert [one.changed() for one in found] == [[], []]
    assert {one["file"] for one in found[0].to_dict()["neighbors"]} == {None}
    assert found[0].not_found() == ["c1/004.png"]


@pytest.fixture
def say(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr("embedcam.cli.online.query_network", lambda *_: toy().network)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


Say = Callable[..., tuple[int, str, str]]


def test_the_command_says_it_in_the_table_and_in_a_note(say: Say, made: Path) -> None:
    asked = "explain", made / "i", made / QUERY, "-n"
    code, out, err = say(*asked, 12)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.endswith("changed since the build")]
    assert CHANGED in line
    assert "note: 1 indexed picture changed since the build (c0/003.png): the stored maps" in err
    assert f"`embedcam add --update {made / 'i'} IMAGES` takes the new ones in" in err
    assert "changed" not in "".join(say(*asked, 2, "--images", made / "as-built")[1:])
    assert say(*asked, 12, "--quiet")[2] == ""
    told = json.loads(say(*asked, 12, "--json")[1])[0]["neighbors"]
    assert [one["file"] for one in told].count("changed") == 1


def test_the_command_says_that_it_cannot_tell(say: Say, made: Path, markless: Path) -> None:
    _, _, err = say("explain", markless, made / QUERY, made / "photos/c0/006.png")
    assert err.count("keeps no marks of its images' files") == 1
    assert say("explain", markless, made / QUERY, "--quiet")[2] == ""
    with_marks, without = (say("info", index)[1] for index in (made / "i", markless))
    assert "  files       marked, 16 bytes an image more: a picture that was replaced" in with_marks
    assert "  files       not marked: whether a picture was replaced cannot be told" in without
    marked, plain = (json.loads(say("info", i, "--json")[1]) for i in (made / "i", markless))
    assert marked["bytes_an_image"] == plain["bytes_an_image"]
    assert marked["bytes"] == plain["bytes"] + 12 * 16
    assert (marked["bytes_a_mark"], plain["bytes_a_mark"]) == (16, 0)


def test_a_report_says_it_in_rows_lines_and_head(made: Path, tmp_path: Path) -> None:
    source = find_images(made / "as-built", "none").only([0, 1])
    with Explainer(made / "i", toy().network, n_neighbors=12) as explainer:
        report = write_report(explainer, source, tmp_path / "out", progress=False)
    assert report.n_changed == 2
    lines = (tmp_path / "out/explanations.jsonl").read_text().splitlines()
    files = [one["file"] for one in json.loads(lines[0])["neighbors"]]
    assert (files.count("changed"), files.count("missing")) == (1, 1)
    page = (tmp_path / "out/index.html").read_text()
    assert "2 with a result whose picture has changed since the build" in page
    assert page.count("<span>changed since the build</span>") == 2


def test_a_receipt_is_of_the_picture_that_is_shown(say: Say, made: Path, tmp_path: Path) -> None:
    """Another picture is refused by its embedding; the same one in another file is told."""
    folder = Path(shutil.copytree(made / "as-built", tmp_path / "photos"))
    with Image.open(folder / "c0/006.png") as old:
        old.save(folder / "c0/006.png", compress_level=0)
    asked = "compare", made / "i", folder / "c0/000.png"
    code, _, err = say(*asked, "c0/006.png", "--images", folder)
    assert code == 0
    assert "note: changed since the build: c0/006.png; what is compared is the picture as" in err
    code, _, err = say(*asked, "c0/009.png", "--images", folder)
    assert (code, "changed" in err) == (0, False)
    code, _, err = say(*asked, CHANGED)
    assert (code, "the picture has changed since it was indexed" in err) == (3, True)


def test_a_prototype_whose_picture_was_replaced_has_no_receipt(made, tmp_path, service) -> None:
    """No stored embedding is that picture's, so nothing but the mark can tell."""
    compress(made / "i", tmp_path / "small", 12, progress=False)
    with Index.open(tmp_path / "small") as index:
        names = dict(zip(index.paths, index.ids, strict=True))
    with Explainer(tmp_path / "small", toy().network) as explainer:
        pairs, query = PairExplainer(explainer), made / QUERY
        assert pairs.receipt(query, names["c0/006.png"]).similarity
        with pytest.raises(ImageError, match="in the middle of this prototype was replaced"):
            pairs.receipt(query, names[CHANGED])
    app = service(served(tmp_path / "small"))
    app.state.pipeline.ready = True
    asked = post(app, f"/compare?result={names[CHANGED]}", data_of(picture()))
    assert asked.error == (409, "changed_picture")


@pytest.fixture
def app(made: Path, service: Any) -> Any:
    app = service(served(made / "i"))
    app.state.pipeline.ready = True
    return app


def test_the_service_says_it_of_every_result_and_map(app: Any, made: Path) -> None:
    body, address = data_of(picture()), f"/items/{CHANGED}"
    found = post(app, "/explain?n_neighbors=12", body).json()["neighbors"]
    files = [one["file"] for one in found]
    assert [files.count(state) for state in ("changed", "missing", "same")] == [1, 1, 10]
    asked = post(app, f"/explain?n_neighbors=1&result={CHANGED}", body).json()["result"]
    told = ask(app, "GET", f"{address}/cam", accept="application/json").json()
    assert asked["file"] == told["file"] == "changed"
    drawn = ask(app, "GET", f"{address}/cam", accept="image/png").image()
    assert not (np.abs(np.asarray(drawn).astype(int) - YELLOW) < 40).all(-1).any()
    plain = ask(app, "GET", f"{address}/image", accept="image/jpeg").image()
    assert (np.abs(np.asarray(plain).astype(int) - YELLOW) < 12).all()  # pixels alone, as it says
    assert post(app, f"/compare?result={CHANGED}", body).error == (409, "changed_picture")


def test_the_query_s_own_file_is_left_out(made: Path, tmp_path: Path) -> None:
    """By whatever path; the others move up, and as many come back as were asked for."""
    query = made / QUERY
    link = tmp_path / "link.png"
    link.symlink_to(query)
    with Explainer(made / "i", toy().network, n_neighbors=4) as explainer:
        plain = explainer.explain(query, n_neighbors=5)
        assert plain.ids[0] == "c0/000.png"
        for path in (query, str(query), query.parent / "../c0/000.png", link):
            found = explainer.explain(path, exclude_query=True)
            assert found.ids == plain.ids[1:]
            np.testing.assert_array_equal(found.distances, plain.distances[1:])
            assert found.explained == found.ids
        named = {"neighbors": ["c0/006.png", "c0/000.png"]}
        assert explainer.explain(query, **named, exclude_query=True).ids == ["c0/006.png"]
        assert len(explainer.explain(query, n_neighbors=50, exclude_query=True).ids) == 11
        two = [query, made / "photos/c2/005.png"]
        batch = explainer.explain_batch(two, exclude_query=True)
        assert ["c0/000.png" in batch[0].ids, "c2/005.png" in batch[1].ids] == [False, False]
        assert [len(one.ids) for one in batch] == [4, 4]
        # A copy or another file leaves nothing out.
        data = query.read_bytes()
        for other in (data, shutil.copy(query, tmp_path / "000.png")):
            assert explainer.explain(other, exclude_query=True).ids == plain.ids[:4]
        own = explainer.explain_batch([data], exclude_query=True, files=[query])
        assert own[0].ids == plain.ids[1:]
        with pytest.raises(InputError, match="nothing but the query itself comes back"):
            explainer.explain(query, neighbors=["c0/000.png"], exclude_query=True)


def test_the_command_and_a_report_leave_the_query_out(say: Say, made: Path, tmp_path: Path) -> None:
    query = made / QUERY
    _, out, _ = say("explain", made / "i", query, "-n", 3, "--json", "--exclude-query")
    ids = [one["id"] for one in json.loads(out)[0]["neighbors"]]
    assert (len(ids), "c0/000.png" in ids) == (3, False)
    asked = "explain", made / "i", made / "photos", "--report", tmp_path / "out", "-n", 2
    assert say(*asked, "--exclude-query")[0] == 0
    lines = (tmp_path / "out/explanations.jsonl").read_text().splitlines()
    assert len(lines) == 11
    for line in map(json.loads, lines):
        ids = [one["id"] for one in line["neighbors"]]
        assert (len(ids), line["query"] in ids) == (2, False)
    assert "explained before; nothing to do" in say(*asked, "--exclude-query")[1]
    code, _, err = say(*asked)
    assert (code, "a report with exclude_query = True, and False is asked for" in err) == (2, True)
