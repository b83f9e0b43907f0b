"""`write_report`: what it writes is what `explain` finds; resumed, refused, and held in memory."""

import base64
import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from build_samples import everything
from photo_samples import CROP, SIDE, build, network_of, picture, write_photos
from PIL import Image

from embedcam import Explainer, Explanation, Index, PairExplainer, find_images, write_report
from embedcam.errors import ImageError, InputError
from embedcam.images import ImageSource, Item, from_dataset
from embedcam.index import remove
from embedcam.preprocess import custom
from embedcam.render.page import Look, Row, page_row
from embedcam.report import LINES, PAGE
from embedcam.report import report as job_room
from embedcam.report.report import finished, open_query
from embedcam.report.words import Fact, blocks, facts, intro

BROKEN = "1/broken.png"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def network():
    return network_of(preprocess=CROP)


@pytest.fixture(scope="module")
def built(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return build(write_photos(folder / "photos"), folder / "my.index", network)


@pytest.fixture
def explainer(built, network):
    with Index.open(built) as index:
        yield Explainer(index, network, n_neighbors=3)


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Seven pictures in folders, one of them larger than the page shows it, and one broken file."""
    folder = tmp_path_factory.mktemp("queries")
    for number in range(7):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        size = (300, 260) if number == 3 else (48, 40)
        picture(number % 3, 60 + number, size).save(folder / str(number % 2) / f"{number}.png")
    (folder / BROKEN).write_text("a letter")
    return folder


@pytest.fixture
def source(queries):
    return find_images(queries, "none")


@pytest.fixture(autouse=True)
def seldom(monkeypatch):
    """No receipts where none are asked for: they take most of the time."""
    monkeypatch.setattr(job_room, "MOST_RECEIPTS", 0)


def records(folder):
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def words_of(table):
    return [list(map(str, row)) for row in table.rows]


def told(explanation):
    return json.loads(json.dumps(explanation.to_dict((14, 14))))


def test_the_lines_are_what_explain_finds(explainer, queries, tmp_path, source):
    found = write_report(explainer, source, tmp_path / "out", batch_size=1)
    assert found.path == tmp_path / "out" / PAGE
    assert (found.n_queries, found.n_new, found.n_untrusted, found.n_empty) == (8, 8, 0, 0)
    ids = ["0/0.png", "0/2.png", "0/4.png", "0/6.png", "1/1.png", "1/3.png", "1/5.png", BROKEN]
    written = records(tmp_path / "out")
    assert [(one.pop("query"), one.pop("label"), one.pop("path")) for one in written] == [
        (name, None, str(queries / name)) for name in ids
    ]
    assert written[:-1] == [told(explainer.explain(queries / name)) for name in ids[:-1]]
    assert found.unreadable == [(BROKEN, written[-1].pop("error"))]
    assert found.unreadable[0][1].startswith(f"{queries / BROKEN}: is not an image of a known kind")
    assert written[-1] == {}


def test_a_batch_changes_nothing_beyond_rounding(explainer, tmp_path, source):
    for size in (1, 3, 50):
        write_report(explainer, source, tmp_path / str(size), batch_size=size)
    expected = records(tmp_path / "1")
    for found in (records(tmp_path / "3"), records(tmp_path / "50")):
        assert found[-1] == expected[-1]
        for one, other in zip(found[:-1], expected[:-1], strict=True):
            assert [n["id"] for n in one["neighbors"]] == [n["id"] for n in other["neighbors"]]
            np.testing.assert_allclose(one["cam"], other["cam"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", ["joint", "each"])
def test_the_page_shows_what_explain_draws(explainer, queries, tmp_path, scale, source):
    write_report(explainer, source, tmp_path / "out", batch_size=1, scale=scale, side=64)
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    look = Look(scale, 64, quality=80, long=True)
    rows = []
    for position, item in enumerate(source.items):
        if item.id == BROKEN:
            continue
        query, results = explainer.explain(queries / item.path).tiles()
        rows.append(page_row(Row(query, results, "", item.id, anchor=f"q{position + 1}"), look))
        assert rows[-1].count("data:image/jpeg") == 8
    assert page.endswith("".join(rows) + "</main>\n</body>\n</html>\n")
    assert page.count("<a href=") == 7
    for words in (
        "A frame marks what the network saw",
        '<a href="#q6">1/<wbr>3.png</a>',
        "<td>1/broken.png</td>",
        "8 queries against the index my.index: 12 images, generation 1, embedded by",
        "Grad-CAM weights transferred from the 3 nearest images",
        "is not an image of a known kind",
    ):
        assert words in page


def test_below_each_query_is_its_receipt(explainer, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(job_room, "MOST_RECEIPTS", 3)
    names = ["0/0.png", "1/3.png", BROKEN]
    source = ImageSource([Item(name, str(queries / name)) for name in names])
    write_report(explainer, source, tmp_path / "out")
    _, *rows = (tmp_path / "out" / PAGE).read_text(encoding="utf-8").split("<section")
    pairs = PairExplainer(explainer)
    for name, row in zip(names, rows, strict=False):
        receipt = pairs.receipt(queries / name, explainer.explain(queries / name).ids[0])
        *places, _ = receipt.in_words()
        (line,) = (line for line in row.splitlines() if 'class="beneath"' in line)
        assert all(place in line for place in places)
        assert f"similarity {receipt.similarity:+.3f}" in line
        data = line.rpartition("base64,")[2].partition('"')[0]
        drawn = Image.open(io.BytesIO(base64.b64decode(data)))
        assert drawn.size == receipt.plot().size
    assert len(rows) == 2
    asked = {"result": "2/3.png", "above": "0/1.png", "receipts": True}
    write_report(explainer, source, tmp_path / "above", **asked)
    expected = pairs.above(queries / names[0], "2/3.png", "0/1.png")
    page = (tmp_path / "above" / PAGE).read_text(encoding="utf-8")
    assert f"more similar by {expected.score:+.3f}" in page
    # None is kept where there are too many, where they are not wanted, or without a picture.
    monkeypatch.setattr(job_room, "MOST_RECEIPTS", 2)
    gone = Explainer(explainer.index, explainer.network, images=tmp_path)
    for where, by, more in (("a", explainer, {}), ("b", gone, {"receipts": True})):
        write_report(by, source, tmp_path / where, **more)
        assert "beneath" not in (tmp_path / where / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"result": "2/3.png", "n_neighbors": 2}, "Grad-CAM weights of the one image 2/3.png"),
        ({"result": "2/3.png", "above": "0/1.png"}, "image 2/3.png less those of 0/1.png"),
        ({"neighbors": ["2/3.png", "0/1.png"]}, "transferred from 2/3.png, 0/1.png"),
    ],
)
def test_what_explains_every_query(explainer, queries, tmp_path, source, asked, words):
    for _ in range(2):
        write_report(explainer, source, tmp_path / "a", batch_size=1, **asked)
    first, *_ = records(tmp_path / "a")
    assert told(explainer.explain(queries / "0/0.png", **asked)).items() <= first.items()
    assert words in (tmp_path / "a" / PAGE).read_text()


def test_a_csv_and_a_data_set_are_sources_too(explainer, queries, tmp_path):
    (tmp_path / "q.csv").write_text(f"id,path\nx,{queries}/0/0.png\ny,{queries}/0/0.png\ngone,no\n")
    write_report(explainer, find_images(tmp_path / "q.csv", "none"), tmp_path / "a")
    x, y, gone = records(tmp_path / "a")
    assert (x["query"], y["query"], x["cam"]) == ("x", "y", y["cam"])
    assert (gone["query"], gone["error"]) == ("gone", f"{tmp_path}/no: does not exist")
    held = from_dataset([picture(0, 1), picture(1, 1)], ids=["p", "q"])
    write_report(explainer, held, tmp_path / "b", batch_size=1)
    p, q = records(tmp_path / "b")
    assert (p.pop("query"), p.pop("path"), p.pop("label"), q["query"]) == ("p", None, None, "q")
    assert p == told(explainer.explain(picture(0, 1)))


def test_a_query_without_an_embedding_stops_nothing(tmp_path):
    def input_of(image):
        return np.asarray(image.resize((SIDE, SIDE)), np.float32).transpose(2, 0, 1) / 255

    network = network_of(preprocess=custom(input_of, name="plain"))
    with torch.no_grad():
        for module in (network.module.conv, network.module.linear):
            module.bias.zero_()
    index = build(write_photos(tmp_path / "photos"), tmp_path / "index", network)
    for number, factor in enumerate((1, 0, 1)):
        image = picture(0, number).point(lambda value, factor=factor: factor * value)
        image.save(tmp_path / f"{number}.png")
    source = ImageSource([Item(f"{n}.png", f"{n}.png") for n in range(3)], tmp_path)
    explainer = Explainer(index, network)
    ((name, reason),) = write_report(explainer, source, tmp_path / "out", batch_size=3).unreadable
    assert (name, "zero" in reason) == ("1.png", True)
    assert reason.startswith(f"{tmp_path / '1.png'}: the embedding")
    written = records(tmp_path / "out")
    for n in (0, 2):
        assert told(explainer.explain(tmp_path / f"{n}.png")).items() <= written[n].items()


def test_notes_of_maps_that_are_empty_or_not_trusted(explainer, queries, source):
    opened = open_query(source, explainer.preprocess, 48, 0)
    made = explainer.explain(queries / "0/0.png")

    def kept(**changes):
        look = Look(side=48, long=True)
        return finished(source, look, False, 0, opened, replace(made, **changes))

    shown = kept(trust=0.31, trust_low=0.2)
    assert "below 0.20 with a map computed on the query itself." in shown.row
    assert json.loads(shown.line)["trusted"] is False
    empty = kept(cam=np.zeros_like(made.cam)).row
    assert "Its map is empty: nothing in it speaks for these results." in empty
    assert ["not to be trusted" in row for row in (shown.row, kept().row)] == [True, False]


def test_the_overview_begins_with_results_of_another_label_then_the_least_match():
    def record(query, label, found, match):
        near = {"id": "n", "label": found, "distance": 0.5}
        kept = {"match": match, "trust": 0.5, "trusted": True, "direct": False, "empty": False}
        return json.dumps({"query": query, "label": label, "neighbors": [near], **kept})

    lines = [record("right", "owl", "owl", 0.4), record("sure", "owl", "owl", 0.9)]
    (overview,) = blocks(facts(lines))
    assert overview.caption == "All queries, the least likely matches first"
    lines += [record("wrong", "owl", "gull", 0.8), record("unknown", None, "gull", 0.6)]
    doubts, overview = blocks(facts(lines))
    assert doubts.caption == "First result of another label: 1 of 4 queries"
    assert (doubts.folded, overview.folded) == (False, True)
    assert doubts.header[:5] == ["query", "its label", "nearest image", "label", "distance"]
    assert words_of(doubts) == [["wrong", "owl", "n", "gull", "0.500", "0.80", "0.50"]]
    assert overview.caption == "All queries, those first"
    assert [row[0] for row in words_of(overview)] == ["wrong", "right", "unknown", "sure"]
    doubts, overview = blocks(facts(record(str(n), "owl", "gull", n / 100) for n in range(60)))
    told = "First result of another label: 60 of 60 queries, the 50 least likely matches"
    assert (doubts.caption, len(doubts.rows), len(overview.rows)) == (told, 50, 60)


def test_the_overview_begins_with_what_is_least_trusted():
    known = [
        Fact(0, "a", None, "n/1", "owl", 0.5, 0.9, True),
        Fact(1, "b", None, "n/2", None, 0.25, 0.2, False),
        Fact(2, "c", "c: is truncated"),
        Fact(3, "d", None, "n/3", "gull", 1.0, 0.3, True, direct=True),
        Fact(4, "e", None, "n/1", "owl", 2.0, None, None, empty=True),
    ]
    notice, failed, overview = blocks(known)
    assert notice.title == "Of 5 queries"
    assert list(notice.lines) == [
        "1 could not be explained",
        "1 with a map that is not to be trusted",
        "1 with an empty map",
        "1 whose weights were computed on the query itself",
    ]
    assert [list(row) for row in failed.rows] == [["c", "c: is truncated"]]
    assert words_of(overview) == [
        ["e", "n/1", "owl", "2.000", "-", "empty"],
        ["b", "n/2", "", "0.250", "0.20", "not trusted"],
        ["d", "n/3", "gull", "1.000", "0.30", "computed on the query"],
        ["a", "n/1", "owl", "0.500", "0.90", ""],
    ]
    assert [row[0].anchor for row in overview.rows] == ["q5", "q2", "q4", "q1"]
    (many,) = blocks([Fact(n, str(n), None, "x", None, 0.5) for n in range(13)])
    assert (many.caption, many.folded, overview.folded) == ("All queries", True, False)
    assert blocks([Fact(0, "a", None, "x")]) == []


def test_the_intro_says_how_the_maps_were_made(explainer):
    options = {"result": None, "neighbors": None, "transfer": "distance", "trusted_from": 0.4}
    known = [Fact(0, "a", None, "x", None, 0.5, 0.5, True)]
    said = intro("i", explainer.index.manifest, {**options, "n_neighbors": 1}, known)
    assert "transferred from the nearest image;" in said
    assert said.endswith("where more than one in ten such maps are expected below 0.4.")
    said = intro("i", explainer.index.manifest, {**options, "n_neighbors": 4}, [Fact(0, "a")])
    assert "transferred from the 4 nearest images, weighted by distance;" in said


def stopped_after(monkeypatch, batches):
    """The user interrupts when so many batches are explained; returns what undoes it."""
    explain, left = Explainer.explain_batch, iter(range(batches))

    def counted(self, *given, **asked):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return explain(self, *given, **asked)

    monkeypatch.setattr(Explainer, "explain_batch", counted)
    return lambda: monkeypatch.setattr(Explainer, "explain_batch", explain)


def test_an_interrupted_report_goes_on_to_the_same_bytes(explainer, tmp_path, monkeypatch, source):
    whole = write_report(explainer, source, tmp_path / "whole", batch_size=2)
    again = stopped_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        write_report(explainer, source, tmp_path / "out", batch_size=2)
    assert not (tmp_path / "out" / PAGE).exists()
    again()
    found = write_report(explainer, source, tmp_path / "out", batch_size=2)
    assert (found.n_queries, found.n_new) == (8, 4)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert sorted(everything(tmp_path / "out")) == [LINES, PAGE, "report.json"]
    assert found.unreadable == whole.unreadable
    before = (tmp_path / "out" / PAGE).stat().st_mtime_ns
    stopped_after(monkeypatch, 0)
    assert write_report(explainer, source, tmp_path / "out") == replace(found, n_new=0)
    assert (tmp_path / "out" / PAGE).stat().st_mtime_ns == before


def test_what_was_altered_is_explained_anew(explainer, tmp_path, monkeypatch, source):
    write_report(explainer, source, tmp_path / "whole", batch_size=4)
    again = stopped_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        write_report(explainer, source, tmp_path / "out", batch_size=4)
    again()
    kept = tmp_path / "out/.finished/00000002.json"
    kept.write_text(kept.read_text().replace("distance", "distence"))
    assert write_report(explainer, source, tmp_path / "out", batch_size=4).n_new == 8
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_another_report_is_never_mixed_in(built, network, queries, tmp_path):
    index = shutil.copytree(built, tmp_path / "index")
    own = shutil.copytree(queries, tmp_path / "queries")
    out = tmp_path / "out"

    def report(where=index, **asked):
        choices = {name: asked.pop(name) for name in ("transfer", "images") if name in asked}
        explainer = Explainer(where, network, n_neighbors=3, **choices)
        return write_report(explainer, find_images(own, "none"), out, **asked)

    def refused(message, *given, **asked):
        before = everything(out)
        with pytest.raises(InputError) as caught:
            report(*given, **asked)
        assert str(caught.value).startswith(f"{out}: holds {message}")
        assert str(caught.value).endswith("; give a new folder, or delete this one")
        assert everything(out) == before

    report(batch_size=2)
    assert report(batch_size=3).n_new == 0  # which changes nothing that could be mixed
    changes = {"n_neighbors": (3, 2), "transfer": ("mean", "distance"), "side": (200, 64)}
    for name, (before, now) in changes.items():
        refused(f"a report with {name} = {before!r}, and {now!r} is asked for", **{name: now})
    refused(f"a report with images = '{built.parent}/photos', and '{own} alone' is ", images=own)
    extra = own / "0/extra.png"
    picture(0, 90).save(extra)
    refused("a report with queries count = 8, and 9 is asked for")
    extra.unlink()
    before = (own / "0/0.png").stat()
    os.utime(own / "0/0.png", ns=(0, 0))
    refused("a report with queries sha256 = ")
    os.utime(own / "0/0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert report().n_new == 0
    remove(index, ["2/3.png"])
    refused("a report with index generation = 1, and 2 is asked for")
    other = build(write_photos(tmp_path / "photos", labels=2), tmp_path / "other", network)
    refused("a report with index sha256 = ", other)
    mark = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**mark, "embedcam": "0.0.1"}))
    with pytest.raises(InputError, match=r"with embedcam = '0\.0\.1', and "):
        write_report(Explainer(built, network, n_neighbors=3), find_images(own, "none"), out)


def test_an_index_that_is_exchanged_meanwhile_is_not_mixed_in(
    explainer, tmp_path, monkeypatch, source
):
    versions = iter([{"generation": n, "sha256": ""} for n in (1, 1, 2)])
    monkeypatch.setattr(job_room, "_version", lambda _: next(versions))
    with pytest.raises(InputError, match="given another version of its index while the report"):
        write_report(explainer, source, tmp_path / "out", batch_size=2)
    assert len(list((tmp_path / "out/.finished").iterdir())) == 2


def test_folders_that_hold_something_else(explainer, queries, tmp_path, source):
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text('{"format": "novel"}')
    for folder, message in (
        (tmp_path / "file", "file: is a file; a report is a folder, so give another"),
        (queries, r"holds something else \(0\); a report takes a folder"),
        (tmp_path / "out", r"report\.json: is not a report's; give a new folder"),
    ):
        with pytest.raises(InputError, match=message):
            write_report(explainer, source, folder)
    (tmp_path / "out/report.json").rename(tmp_path / "out/report.json.tmp")
    assert write_report(explainer, source, tmp_path / "out").n_new == 8  # left by a kill
    assert sorted(everything(tmp_path / "out")) == [LINES, PAGE, "report.json"]


def test_one_writer_at_a_time(explainer, tmp_path, source):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing this report; wait"):
        write_report(explainer, source, tmp_path)
    os.close(holder)
    assert write_report(explainer, source, tmp_path).n_new == 8


def test_a_full_disk_is_one_sentence(explainer, tmp_path, monkeypatch, source):
    def full(source, target):
        if target.name == PAGE:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    rename, said = os.replace, r"cannot be written \(No space left on device\); see to the disk"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(InputError, match=rf"index\.html: {said}"):
            write_report(explainer, source, tmp_path / "out")
    assert write_report(explainer, source, tmp_path / "out").n_new == 0
    assert sorted(everything(tmp_path / "out")) == [LINES, PAGE, "report.json"]


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("batch_size = 0; give a whole number of at least 1", {"batch_size": 0}),
        ("give n_neighbors to search, or neighb", {"n_neighbors": 1, "neighbors": ["0/0.png"]}),
        ("no image 'x'", {"result": "x"}),
        ("scale is 'all'", {"scale": "all"}),
        ("there is no query; give at least one picture", {"source": ImageSource([])}),
        ("needs the index's network", {"network": None}),
    ],
)
def test_arguments_that_cannot_be_used(built, network, tmp_path, source, message, given):
    why = Explainer(built, given.pop("network", network))
    with pytest.raises(InputError, match=message):
        write_report(why, given.pop("source", source), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_no_more_than_a_batch_is_held(explainer, queries, tmp_path, monkeypatch):
    items = [Item(str(n), f"0/{2 * (n % 4)}.png") for n in range(24)]
    explain, alive = Explainer.explain_batch, weakref.WeakSet[Explanation]()

    def watched(self, *given, **asked):
        assert len(alive) <= 3
        found = explain(self, *given, **asked)
        assert all(one.image is None for one in found)  # no picture of full size
        alive.update(found)
        return found

    monkeypatch.setattr(Explainer, "explain_batch", watched)
    write_report(explainer, ImageSource(items, queries), tmp_path / "out", batch_size=3)
    assert len(records(tmp_path / "out")) == 24


def test_a_bar_where_it_is_wanted(explainer, tmp_path, capsys, source):
    for name, progress, told in (("a", True, True), ("b", None, False), ("c", False, False)):
        write_report(explainer, source, tmp_path / name, progress=progress)
        assert ("8/8" in capsys.readouterr().err) == told


def test_what_is_at_fault_for_every_query_stops_the_report(
    explainer, queries, tmp_path, monkeypatch, source
):
    def thin(self, *size):
        raise ImageError("a picture of 9 x 9 pixels is too long and thin")

    monkeypatch.setattr(type(CROP), "extent", thin)
    said = f"{queries}/0/0.png: a picture of 9 x 9 pixels is too long and thin"
    assert open_query(source, explainer.preprocess, 48, 0) == said
    wrong = custom(lambda image: np.zeros((2, 3)), name="wrong")
    with pytest.raises(InputError, match=r"0\.png: preprocess wrong: expected an array \[C H W\]"):
        open_query(source, wrong, 48, 0)


def test_a_killed_report_run_again_ends_in_the_same_bytes(tmp_path):
    """SIGKILL at any moment: a whole page or none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("report_killer.py"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
