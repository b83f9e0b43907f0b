"""Methods and recipes beside the maps of an index, against literal re-computations."""

import re
import shutil
from pathlib import Path
from typing import Any

import evaluate_samples
import numpy as np
import pytest
import torch
from oracles import box_mask
from photo_samples import SQUASH, build, picture, write_photos
from PIL import Image

from embedcam import EmbeddingNetwork, Explainer, Recipe, find_images
from embedcam.errors import InputError
from embedcam.evaluate import Evaluation
from embedcam.evaluate.report import tables
from embedcam.evaluate.rivals import named_methods, notes_of
from embedcam.images import ImageSource
from embedcam.metrics import pixel_auc
from embedcam.prototypes import compress

FIVE = Recipe.paper(m=5, triplets=4)


def run(site: Path, network: EmbeddingNetwork, **more: Any) -> Evaluation:
    some = {"boxes": site / "boxes.csv", "scenes": 3, "faithfulness": 5, "steps": 3}
    return evaluate_samples.run(
        site, network, **{**some, "measures": ("localisation", "objects"), **more}
    )


@pytest.fixture(scope="module")
def found(site: Path, network: EmbeddingNetwork) -> Evaluation:
    """One evaluation that several tests look at."""
    recipes = {"same": Recipe(), "five": FIVE}
    return run(site, network, methods=["Grad-CAM", "hirescam"], recipes=recipes)


def scene(source: ImageSource, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The network's input of a pair of pictures, and the half that is asked about."""
    pair = [SQUASH(Image.open(source.name(row[name]))) for name in ("first", "second")]
    side = np.zeros((1, 32, 64))
    side[:, :, :32] = 1
    return np.concatenate(pair, 2), side if row["side"] == 0 else 1 - side


def signed_map(network: EmbeddingNetwork, inputs: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Grad-CAM of the cosine to the mean of embeddings `[n D]`, by autograd, before the ReLU."""
    module = network.module
    activations = module.relu(module.conv(torch.from_numpy(inputs)[None])).detach()
    activations.requires_grad_()
    proxy = torch.nn.functional.normalize(torch.from_numpy(near.mean(0)), dim=0)
    cosine = torch.nn.functional.cosine_similarity(module.head(activations)[0], proxy, dim=0)
    (gradient,) = torch.autograd.grad(cosine, activations)
    grid = (gradient.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True)
    size = (inputs.shape[1], inputs.shape[2])
    full = torch.nn.functional.interpolate(grid.detach(), size, mode="bilinear")
    return full[0].numpy()


def test_a_method_draws_on_the_query_what_it_is_explained_by(site, network, found) -> None:
    explainer, source = Explainer(site / "index", network), find_images(site / "queries")
    index, lines = explainer.index, (site / "boxes.csv").read_text().splitlines()[1:]
    measured = [one for one in enumerate(found.rows) if "Grad-CAM: auc" in one[1]]
    assert len(measured) == 5
    for place, row in measured:
        inputs = SQUASH(Image.open(source.name(place)))
        ids = explainer.explain(inputs, n_neighbors=2).ids
        drawn = signed_map(network, inputs, index.embeddings(index.positions(ids)))
        edges = np.array(lines[place].split(",")[1:5], float) * [2 / 3, 0.8, 2 / 3, 0.8]
        auc = pixel_auc(drawn, box_mask(edges, 32, 32)[None])[0]
        assert row["Grad-CAM: auc"] == pytest.approx(auc, abs=1e-3)
    for row in found.scenes:
        near = index.embeddings([index.position(row["result"])])
        inputs, side = scene(source, row)
        expected = pixel_auc(signed_map(network, inputs, near), side)[0]
        assert row["Grad-CAM: objects_auc"] == pytest.approx(expected, abs=1e-3)


def test_a_recipe_draws_with_the_weights_that_an_index_of_it_holds(site, network, found, tmp_path):
    build(site / "photos", tmp_path / "five", network, FIVE)
    other, source = Explainer(tmp_path / "five", network), find_images(site / "queries")
    apart = []
    for row in found.scenes:
        assert row["same: objects_auc"] == pytest.approx(row["objects_auc"], abs=1e-5)
        inputs, side = scene(source, row)
        drawn = other.explain(inputs, neighbors=[row["result"]]).signed_cam
        assert row["five: objects_auc"] == pytest.approx(pixel_auc(drawn[None], side)[0], abs=1e-5)
        apart.append(abs(row["five: objects_auc"] - row["objects_auc"]))
    assert max(apart) > 0.01
    for row in found.rows:
        if "same: auc" in row:
            assert row["same: auc"] == pytest.approx(row["auc"], abs=1e-5)


def test_a_column_each_in_tables_and_in_the_grid(found: Evaluation) -> None:
    ways = ["Grad-CAM", "HiResCAM", "same", "five"]
    summary = found.summary
    assert (summary["methods"], list(summary["recipes"])) == (ways[:2], ways[2:])
    assert summary["recipes"]["five"]["m"] == 5
    heads = [f"{way} [95%]" for way in ["transferred", *ways]]
    for start in ("Telling two", "Beside other ways and controls"):
        (table,) = [one for one in tables(summary) if one.caption.startswith(start)]
        assert table.header[2:7] == heads
        assert all(len(row) == len(table.header) for row in table.rows)
    assert len(found.grid) == 2
    for row in found.grid:
        captions = [tile.caption for tile in (row.query, *row.results)]
        assert captions == ["transferred", *ways, "mean activation"]
        assert all(tile.subcaption.startswith("pixel AUC 0.") for tile in row.results)
    # Judged are controls alone: that a method does as well is no fault.
    assert not [text for text in summary["flags"] if any(way in text for way in ways)]
    # Behind average pooling HiResCAM's weights are Grad-CAM's at every position: one signed map.
    compared = [row for row in found.rows if "HiResCAM: auc" in row]
    mine, other = ([row[f"{way}: auc"] for row in compared] for way in ways[:2])
    assert mine == pytest.approx(other, abs=1e-3)
    assert not [note for note in summary["notes"] if "scored as drawn" in note]
    told = " ".join(notes_of(named_methods(["layercam", "hirescam", "eigencam"])))
    assert re.match(r"Layer-CAM .* scored as drawn Eigen-CAM ignores what is asked", told)
    assert "asked for" in found.html()


def test_what_is_compared_does_not_hang_on_the_batch_or_on_controls(site, network, found) -> None:
    again = run(site, network, methods=["gradcam", "hirescam"], batch_size=2, controls=False)
    for here, there in zip(again.rows + again.scenes, found.rows + found.scenes, strict=True):
        for name in ("Grad-CAM: auc", "HiResCAM: auc", "HiResCAM: objects_auc"):
            if name in here:
                assert here[name] == pytest.approx(there[name], abs=1e-3)
    (table,) = [one for one in tables(again.summary) if one.caption.startswith("Beside")]
    assert table.header[2:] == [
        "transferred [95%]", "Grad-CAM [95%]", "HiResCAM [95%]", "mean activation"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"methods": "gradcam"}, r"methods = 'gradcam'; give a list of names such as \['gradcam"),
        ({"methods": ["abn"]}, "ABN draws with a branch that is trained with the network"),
        ({"methods": ["polycam"]}, "Poly-CAM draws with several layers and this index has one"),
        ({"recipes": "paper"}, "recipes = 'paper'; give a list of files"),
        ({"recipes": ["nowhere"]}, "nowhere: there is no such recipe"),
        ({"recipes": ["paper", "paper"]}, "two recipes have one name"),
        ({"recipes": {"a": 1}}, "recipes: 'a' is a int; give a Recipe by its name"),
        ({"recipes": {"wrong images": Recipe()}}, "'wrong images' has the name of a column"),
        ({"recipes": {"a": Recipe.paper()}}, "the recipe 'a' builds no index: m = 50 channels"),
        ({"recipes": {"Grad-CAM": Recipe()}, "methods": ["gradcam"]}, "both called 'Grad-CAM'"),
    ],
)
def test_what_cannot_be_compared(site, network, choices, message) -> None:
    with pytest.raises(InputError, match=message):
        run(site, network, **choices)


def test_recipes_need_the_indexed_pictures_as_they_were(site, network, tmp_path) -> None:
    photos = write_photos(tmp_path / "photos")
    build(photos, tmp_path / "index", network)
    shutil.copytree(site / "queries", tmp_path / "queries")
    some = {"recipes": {"five": FIVE}, "boxes": None, "measures": ("objects",), "scenes": 2}
    picture(2, 99).save(photos / "1/2.png")
    with pytest.raises(InputError, match=r"1 of 12 are not to be found as they were, such as 1/2"):
        run(tmp_path, network, **some)
    photos.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"12 of 12 .* say where they lie now \(--indexed"):
        run(tmp_path, network, **some)
    picture(1, 2).save(tmp_path / "moved/1/2.png")
    assert run(tmp_path, network, indexed=tmp_path / "moved", **some).scenes
    compress(tmp_path / "index", tmp_path / "small", 3)
    (tmp_path / "index").rename(tmp_path / "large")
    (tmp_path / "small").rename(tmp_path / "index")
    with pytest.raises(InputError, match=r"holds prototypes, .* that they were made from"):
        run(tmp_path, network, indexed=tmp_path / "moved", **some)
