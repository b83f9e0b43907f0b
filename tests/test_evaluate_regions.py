"""Boxes and masks on the map's grid; the pure parts of an evaluation in closed form."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles_metrics import auc
from photo_samples import CROP, picture
from PIL import Image

from embedcam.errors import InputError
from embedcam.evaluate import summary as told
from embedcam.evaluate.gallery import Gallery, generator, sample
from embedcam.evaluate.measures import MEASURES, Maps, localized, retrieved, shares, told_apart
from embedcam.evaluate.regions import Region, of_boxes, of_masks
from embedcam.evaluate.report import notices, tables
from embedcam.evaluate.rivals import permuted_rows
from embedcam.images import ImageSource, Item
from embedcam.metrics import rank_of
from embedcam.render import Chart, Notice, Table, page
from embedcam.render.page import drawn_blocks, ticks

NOTHING: dict[str, Any] = {
    "retrieval": {}, "indexed_images": 1, "localisation": {}, "objects": {}, "controls": {},
    "faithfulness": {}, "sanity": [], "fidelity": {}, "methods": [], "recipes": {}, "sample": 0,
}  # fmt: skip
WHOLE = (0.0, 0.0, 40.0, 20.0)
MIDDLE = np.pad(np.ones((2, 2)), 1)
HEADER = "path,x0,y0,x1,y1"


def source_of(folder: Path, *names: str, label: str | None = None) -> ImageSource:
    return ImageSource([Item(name, name, label) for name in names], folder)


def boxes(folder: Path, *lines: str, header: str = HEADER) -> Path:
    (folder / "boxes.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder / "boxes.csv"


def test_a_box_on_the_grid_of_a_squashed_and_of_a_cropped_picture(tmp_path) -> None:
    regions = of_boxes(boxes(tmp_path, "a.png,10,5,30,15"), source_of(tmp_path, "a.png", "b.png"))
    assert len(regions) == 1
    found = regions.of(0, (40, 20), WHOLE, (4, 4))
    np.testing.assert_allclose(found.inside, MIDDLE)
    np.testing.assert_allclose(found.boxes, [[1, 1, 3, 3]])
    # Only the right half was seen: the box reaches from its left edge to half of it.
    right = regions.of(0, (40, 20), (20, 0, 40, 20), (4, 4))
    np.testing.assert_allclose(right.boxes, [[0, 1, 2, 3]])
    assert right.inside.sum() == 4
    # What was not seen is not measured.
    assert regions.of(0, (40, 20), (32, 0, 40, 20), (4, 4)) is None
    assert regions.of(1, (40, 20), WHOLE, (4, 4)) is None
    # A crop that was padded reaches beyond the picture.
    padded = regions.of(0, (40, 20), (0, -10, 40, 30), (4, 4))
    np.testing.assert_allclose(padded.boxes, [[1, 1.5, 3, 2.5]])


def test_a_bright_box_lands_where_the_region_says(tmp_path) -> None:
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:40, 30:70] = 255
    seen = CROP(Image.fromarray(pixels))
    regions = of_boxes(boxes(tmp_path, "a.png,30,20,70,40"), source_of(tmp_path, "a.png"))
    found = regions.of(0, (90, 60), CROP.extent(90, 60), (32, 32))
    assert np.abs(found.inside - (seen[0] > seen[0].mean())).mean() < 0.04


def test_boxes_of_another_size_of_the_picture(tmp_path) -> None:
    for line, expected in (
        ("100,50,300,150,400,200", [1, 1, 3, 3]), ("0.25,0,0.75,1,1,1", [1, 0, 3, 4])
    ):  # fmt: skip
        file = boxes(tmp_path, f"a.png,{line}", header=f"{HEADER},width,height")
        found = of_boxes(file, source_of(tmp_path, "a.png")).of(0, (40, 20), WHOLE, (4, 4))
        np.testing.assert_allclose(found.boxes, [expected])


def test_several_boxes_and_labels(tmp_path) -> None:
    lines = ("a.png,0,0,10,20,owl", "a.png,30,0,40,20,gull", "a.png,20,0,30,20,owl")
    file = boxes(tmp_path, *lines, header=f"{HEADER},label")
    found = of_boxes(file, source_of(tmp_path, "a.png")).of(0, (40, 20), WHOLE, (1, 4))
    np.testing.assert_allclose(found.inside, [[1, 0, 1, 1]])
    np.testing.assert_allclose(found.by_label["owl"], [[1, 0, 1, 0]])
    np.testing.assert_allclose(found.by_label["gull"], [[0, 0, 0, 1]])
    # The image's own label says which boxes its map should mark.
    owl = of_boxes(file, source_of(tmp_path, "a.png", label="owl"))
    np.testing.assert_allclose(owl.of(0, (40, 20), WHOLE, (1, 4)).inside, [[1, 0, 1, 0]])
    assert owl.pixels(0, (40, 20)) == [(0, 0, 10, 20), (20, 0, 30, 20)]


def test_paths_relative_to_the_csv_and_ids(tmp_path) -> None:
    source = ImageSource([Item("one", "sub/a.png"), Item("two", "b.png")], tmp_path)
    assert len(of_boxes(boxes(tmp_path, "sub/a.png,0,0,2,1", "two,0,0,1,1"), source)) == 2
    elsewhere = source_of(tmp_path / "sub", "a.png")
    assert len(of_boxes(boxes(tmp_path, "sub/a.png,0,0,2,2", "c.png,0,0,1,1"), elsewhere)) == 1


@pytest.mark.parametrize(
    ("line", "header", "message"),
    [
        ("a.png,1,2,3", "path,x0,y0,x1", "the header lacks y1; expected path,x0,y0,x1,y1"),
        (None, HEADER, "has no lines below its header"),
        ("a.png,5,0,5,9", HEADER, "line 2: the box 5, 0, 5, 9 is empty"),
        ("a.png,0,0,x,9", HEADER, "line 2: x1 is 'x'; give a number of pixels"),
        ("a.png,0,0,inf,9", HEADER, "line 2: x1 is 'inf'"),
        ("a.png,0,0,4", HEADER, "line 2: 4 fields under a header of 5"),
        ("z.png,0,0,4,4", HEADER, "no box belongs to one of the images: it names"),
        ("a.png,0.1,0,0.5,1", HEADER, "these look like shares of the picture; give"),
        ("a.png,0,0,4,4,0,9", f"{HEADER},width,height", "a picture of 0 x 9 pixels"),
    ],
)
def test_boxes_that_are_none(tmp_path, line, header, message) -> None:
    file = boxes(tmp_path, *([line] if line else []), header=header)
    with pytest.raises(InputError, match=f"boxes.csv.*{message}"):
        of_boxes(file, source_of(tmp_path, "a.png"))


def test_boxes_beyond_the_picture_and_files_that_are_not_there(tmp_path) -> None:
    source = source_of(tmp_path, "a.png")
    regions = of_boxes(boxes(tmp_path, "a.png,0,0,100,10"), source)
    with pytest.raises(InputError, match=r"line 2: the box 0, 0, 100, 10 reaches beyond its pic"):
        regions.of(0, (40, 20), WHOLE, (4, 4))
    with pytest.raises(InputError, match=r"none\.csv: cannot be read \(No such file"):
        of_boxes(tmp_path / "none.csv", source)
    (tmp_path / "bytes.csv").write_bytes(b"path,x0,y0,x1,y1\n\xff,1,1,2,2\n")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        of_boxes(tmp_path / "bytes.csv", source)


def test_masks(tmp_path) -> None:
    (tmp_path / "masks/sub").mkdir(parents=True)
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "masks/sub/a.gif")
    regions = of_masks(tmp_path / "masks", source_of(tmp_path, "b.jpg", "sub/a.jpg"))
    assert regions.of(0, (40, 20), WHOLE, (4, 4)) is None
    found = regions.of(1, (40, 20), WHOLE, (4, 4))
    np.testing.assert_allclose(found.inside, MIDDLE)
    np.testing.assert_allclose(found.boxes, [[1, 1, 3, 3]])
    padded = regions.of(1, (40, 20), (0, -10, 40, 30), (4, 4))
    np.testing.assert_allclose(padded.inside[1:3, 1:3], 0.5, atol=0.01)
    assert padded.inside[[0, 3]].sum() == 0
    with pytest.raises(InputError, match="the mask is 40 x 20 pixels and its picture 80 x 40"):
        regions.of(1, (80, 40), (0, 0, 80, 40), (4, 4))
    for folder, message in (
        ("masks", "no mask for any of"),
        ("nowhere", "is no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            of_masks(tmp_path / folder, source_of(tmp_path, "c.png"))


def test_photographs_are_no_masks(tmp_path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    picture(0, 1).save(masks / "a.jpg")
    Image.new("L", (48, 40), 255).save(tmp_path / "a.png")
    for folder, message in (
        (masks, r"a\.jpg: is a photograph in many colours and no mask"),
        (tmp_path, r"a\.png is the query itself; give a folder of masks"),
    ):
        with pytest.raises(InputError, match=message):
            of_masks(folder, source_of(tmp_path, "a.png"))
    # A mask saved as JPEG, in a single colour, and a soft one are masks.
    red = Image.new("RGB", (48, 40))
    red.paste((255, 0, 0), (10, 10, 30, 30))
    soft = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1)))
    for mask in (red, soft):
        mask.save(masks / "a.jpg", quality=60)
        assert len(of_masks(masks, source_of(tmp_path, "a.png"))) == 1
    # The first few are looked at before anything is done, others when they are read.
    names = [f"b{number}.png" for number in range(9)]
    for name in names:
        Image.new("L", (48, 40)).save(masks / name)
    picture(0, 1).save(masks / "b8.png")
    regions = of_masks(masks, source_of(tmp_path, *names))
    with pytest.raises(InputError, match=r"b8\.png: is a photograph"):
        regions.of(8, (48, 40), (0, 0, 48, 40), (4, 4))
    with pytest.raises(InputError, match=r"b8\.png: is a photograph"):
        of_masks(masks, source_of(tmp_path, *names[1:]))


def test_two_images_have_no_interval_and_beat_nothing() -> None:
    rows = [{"energy": 0.9, "mean activation: energy": 0.1, "area": 0.2}] * 3
    for count, shown, beats in ((2, "0.900", False), (3, "0.900 [0.900, 0.900]", True)):
        measured = told.measured(rows[:count], "localisation")
        (table,) = tables({**NOTHING, "localisation": measured})
        assert table.rows[0][2] == shown
        assert table.caption == f"Localisation, {count} images with a box or mask"
        compared = told.beside_others(rows[:count], ("localisation",))
        assert compared["energy"]["differences"]["mean activation"]["beats"] is beats


def test_recall_of_one_query() -> None:
    labels = ["b", "a", None, "a", "c", "b"]
    assert retrieved("a", labels) == {"recall_1": 0, "recall_5": 1, "recall_10": None}
    assert set(retrieved(None, labels).values()) == {None}


def test_shares_of_two_regions() -> None:
    drawn = np.array([[3.0, 1.0, 0.0, 4.0]])
    left, right = np.array([[1.0, 1, 0, 0]]), np.array([[0.0, 1, 1, 0]])
    # What both cover counts for neither; what none covers, not at all.
    assert shares(drawn, left, right) == (1, 0.5)
    assert shares(drawn, right, left) == (0, 0.5)
    assert shares(np.zeros((1, 4)), left, right) == (0.5, 0.5)
    wide = np.array([[1.0, 1, 1, 0]])
    assert shares(np.ones((1, 4)), wide, 1 - left) == pytest.approx((2 / 3, 2 / 3))
    for mine in (3.0, 2.0, 1.0):
        found = Maps(np.array([[[mine, 5.0, 2.0, 0.0]]]), np.zeros((1, 1, 4)))
        assert told_apart(found, left, right)["right"] == (mine > 2) + 0.5 * (mine == 2)


def test_two_objects_by_their_order_and_density() -> None:
    signed = np.array([[-3.0, 1.0, 2.0, -4.0, 2.0]])
    left, right = np.array([[1.0, 1, 0, 0, 0]]), np.array([[0.0, 1, 1, 1, 0]])
    found = Maps(np.maximum(signed, 0)[None], signed[None])
    told_of = told_apart(found, right, left)
    # The second pixel is both's, the last nobody's: it counts as the rest alone.
    alone, other = right * (1 - left), left * (1 - right)
    assert told_of["objects_auc"] == pytest.approx(auc(signed, alone, other))
    assert told_of["rest_auc"] == pytest.approx(auc(signed, right, 1 - right))
    assert (told_of["even_share"], told_of["denser"]) == (1, 1)
    halves = told_apart(found, left, 1 - left)
    assert "rest_auc" not in halves
    assert halves["even_share"] == pytest.approx((1 / 2) / (1 / 2 + 4 / 3))


@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(-3, 3))
def test_no_change_of_contrast_moves_what_is_free_of_it(seed, slope, offset) -> None:
    drawn = np.random.default_rng(seed)
    signed = drawn.integers(-4, 5, (1, 4, 5)).astype(float)
    inside = np.zeros((4, 5))
    inside[1:3, :2] = 1
    region = Region(inside, np.array([[0.0, 1, 2, 3]]))
    changed = slope * np.sign(signed) * np.abs(signed) ** 3 + offset
    before, after = (
        {
            **localized(Maps(np.maximum(one, 0), one), [region], 0.2)[0],
            **told_apart(Maps(np.maximum(one, 0), one), inside, np.roll(inside, 2, 1)),
        }
        for one in (signed, changed)
    )
    free = [name for name, measure in MEASURES.items() if measure.free]
    assert free == ["auc", "average_precision", "hottest", "objects_auc", "rest_auc"]
    assert [after[name] for name in free] == pytest.approx([before[name] for name in free])
    assert before["auc"] == pytest.approx(auc(signed[0], inside, 1 - inside))


def test_several_questions_of_one_picture_are_drawn_together() -> None:
    rows = [
        {"objects_auc": value, "right_chance": 0.5, "first": place, "second": -1}
        for place, value in enumerate((0.2, 0.4, 0.9, 0.7))
    ]
    once = told.measured(rows, "objects")["objects_auc"]
    again = told.measured([row for row in rows for _ in range(5)], "objects")["objects_auc"]
    assert again["n"] == 20
    # Asking five times as often about the same pictures makes nothing surer.
    for k in ("mean", "low", "high"):
        assert again[k] == pytest.approx(once[k])


def rows_of(mine: list[Any], theirs: list[Any], name: str) -> list[dict[str, Any]]:
    return [{name: a, f"random weights: {name}": b} for a, b in zip(mine, theirs, strict=True)]


@pytest.mark.parametrize(
    ("mine", "theirs", "name", "apart", "flag"),
    [
        ([0.9] * 8, [0.2] * 8, "energy", 0.7, ""),
        ([0.2] * 8, [0.9] * 8, "energy", -0.7, "worse in energy inside"),
        ([0.1, 0.9], [0.9, 0.1], "energy", 0, "not told apart by energy inside"),
        ([2.5] + [0.4] * 9, [0.5] * 10, "energy", 0.11, "not told apart by energy inside"),
        ([0.2] * 8, [0.9] * 8, "deletion", 0.7, ""),  # of a deletion area less is better
    ],
)
def test_a_method_that_does_not_beat_its_control_is_flagged(mine, theirs, name, apart, flag):
    table = told.beside_others(rows_of(mine, theirs, name), (MEASURES[name].group,))
    assert table[name]["differences"]["random weights"]["mean"] == pytest.approx(apart)
    said = [f"transferred beside random weights (images): {flag}"] if flag else []
    beats = f"transferred (images): better than every control in {MEASURES[name].title}"
    assert told.flags(table, "images") == said
    assert told.beaten(table, "images") == ([] if flag else [beats])


def test_the_two_flags_are_raised_by_the_paired_interval_alone() -> None:
    def told_of(apart: list[float]) -> list[tuple[str, bool]]:
        rows = [{"auc": 0.5 + d, "mean activation: auc": 0.5} for d in apart]
        asked = [
            {"objects_auc": 0.5 + d, "shuffled index: objects_auc": 0.5, "first": i, "second": -1}
            for i, d in enumerate(apart)
        ]
        return [(one["flag"], one["raised"]) for one in told.checks(rows, {"boxes": asked})]

    worse, no_better = told.WORSE, told.NO_BETTER
    assert told_of([0.1, 0.2, 0.1, 0.2]) == [(worse, False), (no_better, False)]
    assert told_of([-0.1, -0.2, -0.1, -0.2]) == [(worse, True), (no_better, True)]
    assert told_of([-0.2, 0.2, -0.1, 0.1]) == [(worse, False), (no_better, True)]
    assert told_of([-0.1, -0.2]) == []  # two pictures say nothing
    # Five questions of one picture are one picture.
    asked = [{"objects_auc": 0.9, "shuffled index: objects_auc": 0.5, "first": 0, "second": -1}] * 5
    assert told.checks([], {"boxes": asked}) == []


def test_raised_flags_stand_first_on_the_page_and_by_their_names() -> None:
    rows = [{"auc": 0.25, "mean activation: auc": 0.5}] * 3
    (one,) = told.checks(rows, {})
    assert "worse than the mean activation: pixel AUC 0.250 against 0.500, diff" in one["says"]
    summary = {**NOTHING, "checks": [one], "flags": [one["says"], "another"], "beats": [],
               "notes": []}  # fmt: skip
    assert notices(summary) == [
        Notice("Localises worse than the mean activation", [one["says"].partition(": ")[2]]),
        Notice("Does not beat every control", ["another"]),
    ]


def test_a_shuffled_index_moves_every_image_and_never_shows_the_query() -> None:
    gallery = Gallery(Memory(np.eye(7), list("aabbccc")), 3)
    near = np.arange(7)
    moved = permuted_rows(gallery, near, [-1])
    assert sorted(moved.tolist()) == near.tolist()
    assert (moved != near).all()
    for own in range(7):
        assert own not in permuted_rows(gallery, np.delete(near, own), [own])
    assert not {2, 5} & set(permuted_rows(gallery, np.array([0, 1, 3, 4, 6]), [2, 5]).tolist())
    other = Gallery(Memory(np.eye(7), list("aabbccc")), 4)
    assert permuted_rows(other, near, [-1]).tolist() != moved.tolist()


def test_what_does_not_apply_is_left_out_of_means() -> None:
    rows = rows_of([0.4, None, 0.6], [0.1, 0.2, None], "drop")
    told_of = told.beside_others(rows, ("faithfulness",))["drop"]
    assert told_of["differences"]["random weights"]["n"] == 1
    assert told.measured(rows, "faithfulness")["drop"]["mean"] == pytest.approx(0.5)
    chance = told.measured([{"energy": 0.6, "area": 0.2}, {"energy": None, "area": 1}],
                           "localisation")  # fmt: skip
    assert (chance["energy"]["mean"], chance["energy"]["chance"]) == (0.6, 0.2)


def test_samples_hang_on_the_seed_alone() -> None:
    assert sample(10, None, 0).tolist() == sample(10, 20, 0).tolist() == list(range(10))
    some = sample(100, 7, 3)
    assert len(set(some.tolist())) == 7
    assert (np.diff(some) > 0).all()
    np.testing.assert_array_equal(some, sample(100, 7, 3))
    one, same, other = (generator(0, "a", b).random() for b in ("b", "b", "c"))
    assert one == same != other


class Memory:
    path, metric = "memory", "l2"
    manifest = SimpleNamespace(near_share=None, faiss=None)

    def __init__(self, embeddings: np.ndarray, labels: list[str | None]) -> None:
        self._embeddings, self.n_rows = embeddings.astype(np.float32), len(embeddings)
        self.width = embeddings.shape[1]
        self.labels = np.array(labels, object)
        self.columns = {"embeddings": SimpleNamespace(shape=(self.width,), dtype="float32")}

    def live_positions(self) -> np.ndarray:
        return np.arange(self.n_rows)

    def embeddings(self, positions: Any) -> np.ndarray:
        return self._embeddings[positions]

    def select(self, positions: Any) -> SimpleNamespace:
        return SimpleNamespace(array=lambda column: self._embeddings[positions])


@pytest.mark.parametrize("held", [0, 1 << 28])
def test_ranks_and_precision_block_by_block(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcam.evaluate import gallery as module

    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "BLOCK", 50)
    drawn = np.random.default_rng(0)
    embeddings = drawn.standard_normal((30, 4)).astype(np.float32)
    labels = [None if i == 7 else str(i % 3) for i in range(30)]
    gallery = Gallery(Memory(embeddings, labels))
    queries = embeddings[:5] + 0.1
    apart = ((queries[:, None].astype(float) - embeddings) ** 2).sum(2)
    for item in (0, 11):
        keep = np.delete(np.arange(30), 3)
        expected = rank_of(-apart[:, keep], np.full(5, list(keep).index(item)))
        np.testing.assert_array_equal(gallery.ranks(queries, item, 3), expected)
    found = gallery.precision_at_r(queries, ["0", "1", "nowhere", None, "1"], np.full(5, -1))
    assert found[2:4] == [None, None]
    order = np.argsort(apart[0])[:10]
    hits = [labels[i] == "0" for i in order]
    precision = sum(sum(hits[: i + 1]) / (i + 1) for i in range(10) if hits[i]) / 10
    assert found[0] == pytest.approx(precision)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_take_in_both_ends(low: float, span: float) -> None:
    found = ticks(low, low + span)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-6 * step + 1e-9
    assert found[-1] >= low + span - 1e-6 * step - 1e-9
    assert (np.diff(found) > 0).all()


def test_a_chart_by_hand() -> None:
    lines = {"one": [(0, 0), (1, 1)], "two": [(0, 1), (1, 0)]}
    [text] = drawn_blocks([Chart("A <b>", lines, "x", "y")])
    assert 'points="46.0,220.0 408.0,12.0"' in text
    assert 'points="46.0,12.0 408.0,220.0"' in text
    assert "A &lt;b&gt;" in text
    assert "<b>one" not in text
    for points in ({}, {"one": []}, {"one": [(0.0, float("nan"))]}):
        with pytest.raises(InputError, match="has no points"):
            drawn_blocks([Chart("c", points)])


def test_notices_charts_and_tables_in_their_order() -> None:
    chart = Chart("chart", {"one": [(0, 1), (1, 2)]})
    text = page([], tables=[Notice("first", ["<i>"]), Table(["h"], [["0.4*"]]), chart, chart])
    places = [text.index(word) for word in ("first", "0.4*", 'class="charts"')]
    assert places == sorted(places)
    assert text.count('class="charts"') == 1
    assert "&lt;i&gt;" in text
    assert '<td class="number">0.4*' in text
