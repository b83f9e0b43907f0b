"""Evaluating an index: what must always hold, what cannot be measured, what comes out."""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from evaluate_samples import measure, run
from oracles import box_mask
from photo_samples import CROP, SQUASH, Flat, Pooled, build, network_of, picture, write_photos
from PIL import Image

from embedcam import (
    EmbeddingNetwork,
    Explainer,
    Index,
    Preprocess,
    Recipe,
    evaluate_index,
    find_images,
)
from embedcam.errors import ImageError, InputError, NetworkMismatch
from embedcam.evaluate import Evaluation, Settings
from embedcam.evaluate.groups import RESULTS
from embedcam.images import ImageSource
from embedcam.index import remove


def test_batches_and_seeds(site: Path, network: EmbeddingNetwork, evaluation: Evaluation) -> None:
    again = run(site, network, boxes=site / "boxes.csv", batch_size=2)
    assert len(again.rows) == len(evaluation.rows) == 9
    for here, there in zip(again.rows, evaluation.rows, strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            if isinstance(value, float):
                assert value == pytest.approx(there[name], abs=2e-4), name
            else:
                assert value == there[name], name
    assert [row["result"] for row in again.scenes] == [row["result"] for row in evaluation.scenes]
    other = run(site, network, seed=2**70, limit=4, measures=("faithfulness", "sanity"))
    assert len(other.rows) == other.summary["images"]["asked"] == 4
    assert other.summary["sanity"]
    # The network and the index are left as they were.
    assert all(p.grad is None and p.requires_grad for p in network.module.parameters())
    with Index.open(site / "index") as index:
        index.verify()


class Counting(ImageSource):
    """Counts the pictures that are alive at once."""

    def __init__(self, inner: ImageSource) -> None:
        super().__init__(inner.items, inner.root)
        self.alive: list[weakref.ref[Image.Image]] = []
        self.most = self.opened = 0

    def open(self, position: int) -> Image.Image:
        made = super().open(position)
        self.opened += 1
        self.alive = [one for one in self.alive if one() is not None] + [weakref.ref(made)]
        self.most = max(self.most, len(self.alive))
        return made


def test_pictures_are_let_go(network: EmbeddingNetwork, site: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "many", labels=3, each=20)
    source = Counting(find_images(tmp_path / "many"))
    gc.collect()
    assert len(measure(site / "index", source, network).rows) == 60
    assert source.most <= 4


def test_without_labels_and_boxes(site: Path, network: EmbeddingNetwork) -> None:
    source = find_images(site / "queries", "none")
    told = measure(site / "index", source, network).summary
    assert [told[group] for group in ("retrieval", "localisation", "objects")] == [{}, {}, {}]
    for note in ("retrieval quality: no image", "localisation: neither", "pictures need labels"):
        assert note in "\n".join(told["notes"])


@pytest.mark.parametrize("width", [32, 33])
def test_a_network_of_one_size_is_shown_both_pictures_at_half_their_width(tmp_path, width) -> None:
    def wide() -> Flat:
        module = Flat()
        module.linear = torch.nn.Linear(8 * 8 * ((width + 3) // 4), 5)
        return module

    shape = Preprocess(size=(32, width))
    network = network_of(wide, preprocess=shape)
    photos = write_photos(tmp_path / "photos")
    build(photos, tmp_path / "index", network)
    told = run(tmp_path, network, images="photos", measures=("objects",))
    (said,) = told.summary["notes"]
    assert "both pictures at half their width: the network takes no picture of 32 x " in said
    assert len(told.scenes) == 8
    assert told.examples
    explainer, source = Explainer(tmp_path / "index", network), find_images(photos)
    edge, shares = width // 2, []
    for row in told.scenes:
        scene = np.zeros((3, 32, width), np.float32)
        for place, start, stop in ((row["first"], 0, edge), (row["second"], edge, width)):
            one = shape(Image.open(source.name(place))).astype(float)
            for column in range(start, stop):
                left, right = (np.array([0, 1]) + column - start) * width / (stop - start)
                (covered,) = box_mask((left, 0, right, 1), 1, width)
                scene[:, :, column] = one @ covered / sum(covered)
        drawn = explainer.explain(scene, neighbors=[row["result"]]).cam
        halves = drawn[:, :edge].sum(), drawn[:, edge:].sum()
        own = edge if row["side"] == 0 else width - edge
        share = halves[row["side"]] / sum(halves) if sum(halves) else own / width
        shares.append(share)
        assert row["share"] == pytest.approx(share, abs=1e-4)
        assert row["share_chance"] == pytest.approx(own / width)
    assert len({round(share, 3) for share in shares}) > 2
    explainer.index.close()


class Deep(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 6, 3, 2, 1)
        self.conv = torch.nn.Conv2d(6, 8, 3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(self.first(images))))


def test_maps_of_several_layers_tokens_and_networks_in_two_parts(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    module = toys.seeded(Deep)
    deep = EmbeddingNetwork(module, "relu", preprocess=SQUASH)
    parts = EmbeddingNetwork.from_parts(
        lambda images: module.relu(module.conv(module.first(images))),
        module.head,
        module=module,
        preprocess=SQUASH,
    )
    vit = EmbeddingNetwork(
        toys.seeded(toys.small_vit), toys.VIT_LAYER, preprocess=Preprocess(size=(64, 64))
    )
    layers = Recipe(method="polycam", layers=("first", "relu"))
    for name, network, recipe, said in (
        ("layers", deep, layers, ""),
        ("parts", parts, None, "given as a trunk and a head, which are not copied"),
        ("tokens", vit, None, "half their width: the network takes no picture of 64 x 128"),
    ):
        build(photos, tmp_path / name, network, recipe)
        told = measure(tmp_path / name, find_images(photos), network)
        assert said in "\n".join(told.summary["notes"])
        assert bool(told.summary["sanity"]) == (name != "parts")
        assert told.summary["objects"]["pasted pairs"]["questions"] == 8
        assert told.summary["faithfulness"]["insertion"]["n"] == 3
        assert told.summary["fidelity"][RESULTS[0]][0]["n"] == 5


def test_controls_are_drawn_on_images_with_a_region(site, network, tmp_path) -> None:
    source = find_images(site / "queries")
    for number in range(9):
        (tmp_path / "boxes.csv").write_text(f"path,x0,y0,x1,y1\n{source.ids[number]},0,0,20,20\n")
        some = {"boxes": tmp_path / "boxes.csv", "measures": ("localisation",), "faithfulness": 1}
        told = measure(site / "index", source, network, **some)
        assert told.summary["controls"]["energy"]["differences"]["random weights"]["n"] == 1
    (tmp_path / "masks/0").mkdir(parents=True)
    Image.new("L", (48, 40)).save(tmp_path / "masks/0/q0.png")
    for measures, stages in ((("localisation",), 0), (("localisation", "sanity"), 2)):
        some = {"masks": tmp_path / "masks", "measures": measures}
        told = measure(site / "index", source, network, **some)
        assert "localisation leaves out 9 of 9 images" in told.summary["notes"][0]
        assert told.summary["controls"] == {}
        assert len(told.summary["sanity"]) == stages
        assert told.html()


def test_images_that_go_while_it_runs(site: Path, network: EmbeddingNetwork) -> None:
    class Going(Counting):
        def open(self, position: int) -> Image.Image:
            if self.opened == 9:
                raise ImageError("gone")
            return super().open(position)

    source = Going(find_images(site / "queries"))
    told = measure(site / "index", source, network, on_unreadable="skip")
    assert len(told.rows) == 9
    assert (
        "no controls: the images could be read before, and no longer can" in told.summary["notes"]
    )
    assert told.html()


def test_broken_images(site: Path, network: EmbeddingNetwork, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture(0, 3).save(tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes(b"not a picture")
    source = find_images(tmp_path / "images")
    with pytest.raises(ImageError, match=r"b\.png: is not an image"):
        measure(site / "index", source, network)
    told = measure(site / "index", source, network, on_unreadable="skip")
    assert [row["id"] for row in told.rows] == ["a.png"]
    assert "b.png" in told.summary["images"]["skipped"][0]
    only = ImageSource([source.items[1]], source.root)
    with pytest.raises(InputError, match="none of the 1 images could be used"):
        measure(site / "index", only, network, on_unreadable="skip")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 0}, "steps = 0; give a whole number of at least 1"),
        ({"limit": True}, "limit = True"),
        ({"removed": 1.0}, "removed = 1.0; give a number between 0 and 1"),
        ({"fill": "red"}, "fill = 'red' is unknown"),
        ({"measures": ("energy",)}, "measures = 'energy' is unknown; .*known: retrieval"),
        ({"measures": ()}, "measures names nothing"),
        ({"measures": "retrieval"}, "measures = 'retrieval'; give a list of names"),
        ({"indexed": "nowhere"}, "nowhere: there is no such folder"),
        ({"nothing": 1}, "unexpected keyword argument 'nothing'"),
        ({"settings": Settings(), "steps": 3}, "not both"),
        ({"boxes": "a", "masks": "b"}, "give boxes or masks, not both"),
        ({"on_unreadable": "maybe"}, "on_unreadable = 'maybe' is unknown; known: fail, skip"),
    ],
)
def test_choices_that_mean_nothing(site, network, choices, message) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_index(site / "index", find_images(site / "queries"), network, **choices)


def test_what_cannot_be_evaluated_is_refused_at_the_first(site, network) -> None:
    source = Counting(find_images(site / "queries"))
    for choices, message in (
        ({"steps": 1025}, "give a whole number from 1 to 1,024"),
        ({"removed": 0.9999}, "removed = 0.9999 is every one of the 1024 pixels"),
    ):
        source.opened = 0
        with pytest.raises(InputError, match=message):
            measure(site / "index", source, network, batch_size=2, **choices)
        assert source.opened == 2
    for given, message in (
        ((str(site / "queries"), network), r"source is a str; .*find_images\(folder\)"),
        ((source, network.module), "network is a Pooled; give the EmbeddingNetwork"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_index(site / "index", *given)  # type: ignore[arg-type]
    with pytest.raises(NetworkMismatch):
        run(site, network_of(preprocess=CROP))


def test_pictures_that_have_moved(site: Path, network: EmbeddingNetwork, tmp_path: Path) -> None:
    """The index knows where they were, and is told where they are."""
    photos = write_photos(tmp_path / "photos")
    build(photos, tmp_path / "index", network)
    photos.rename(tmp_path / "moved")
    own = find_images(tmp_path / "moved", "none")
    renamed = ImageSource([replace(item, id=f"x/{item.id}") for item in own.items], own.root)
    for more, indexed in (({}, 0), ({"indexed": tmp_path / "moved"}, 12)):
        some = {"measures": ("retrieval",), **more}
        rows = measure(tmp_path / "index", renamed, network, **some).rows
        assert sum(row["indexed"] for row in rows) == indexed


def test_prototypes_are_no_images_of_the_index(site, network, tmp_path) -> None:
    from embedcam.prototypes import compress

    compress(site / "index", tmp_path / "two", 2)
    compress(site / "index", tmp_path / "all", 12)
    source = find_images(site / "photos")
    for name, indexed in (("two", 0), ("all", 12)):
        told = measure(tmp_path / name, source, network, measures=("retrieval", "fidelity"))
        assert told.summary["images"]["indexed"] == indexed
        notes = "\n".join(told.summary["notes"])
        assert "holds prototypes and does not know what was merged into them" in notes
        assert bool(told.summary["fidelity"]) == (name == "all")
        few = "the index holds too few images to tell a query from"
        assert (few in notes) == (name == "two")


def test_an_index_without_faiss(network: EmbeddingNetwork, site: Path, tmp_path: Path) -> None:
    build(site / "photos", tmp_path / "index", network, replace(Recipe(), faiss="none"))
    source = find_images(site / "queries")
    gone = ["0/0.png", "1/2.png"]  # positions and places among the live are no longer the same
    shutil.copytree(site / "index", tmp_path / "with")
    for name in ("index", "with"):
        remove(tmp_path / name, gone)
    here, there = (
        measure(tmp_path / name, source, network, measures=("retrieval",)).rows
        for name in ("index", "with")
    )
    assert [row["result"] for row in here] == [row["result"] for row in there]
    assert not {row["result"] for row in here} & set(gone)


def test_files(evaluation: Evaluation, tmp_path: Path) -> None:
    text = evaluation.save_html(tmp_path / "report.html").read_text()
    for word in ("<script", "http://", "https://", "@import", "url("):
        assert word not in text
    for word in ("Recall@1", "ROAD drop", "shuffled network", "<svg", "data:image/jpeg"):
        assert word in text
    lines = evaluation.save_csv(tmp_path / "numbers.csv").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("id,label,indexed,result,")
    with pytest.raises(InputError, match="cannot be written"):
        evaluation.save_csv(tmp_path / "nowhere/numbers.csv")


def test_stages_and_time_add_up(evaluation: Evaluation) -> None:
    stages, seconds = (evaluation.summary[name] for name in ("sanity", "seconds"))
    assert [(one["modules"], one["of"], one["n"]) for one in stages] == [(1, 2, 3), (2, 2, 3)]
    assert all(-1 <= one["mean"] <= 1 and 0 <= one["empty"] <= 1 for one in stages)
    assert 0 < seconds["forward"] < sum(seconds.values()) - seconds["total"] <= seconds["total"]
