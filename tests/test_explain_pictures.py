"""Explanations as pictures and as JSON: what is drawn, where, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photo_samples import CHANNELS, CROP, GRID, SIDE, build, network_of, picture, write_photos
from PIL import Image

from embedcam import Explainer
from embedcam.errors import InputError, NetworkMismatch
from embedcam.ops import area_average
from embedcam.preprocess import custom
from embedcam.render import overlay


@pytest.fixture(scope="module")
def cropped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    network = network_of(preprocess=CROP)
    path = build(photos, tmp_path_factory.mktemp("cropped") / "index", network)
    return Explainer(path, network, n_neighbors=2)


def test_the_extent_is_what_the_crop_saw(cropped: Explainer) -> None:
    # 90 x 40 becomes 81 x 36; 32 of it are kept, from (24, 2) on: half of 49 is rounded to even.
    why = cropped.explain(picture(0, 3, (90, 40)))
    left, top = 24 * 90 / 81, 2 * 40 / 36
    expected = (left, top, left + 32 * 90 / 81, top + 32 * 40 / 36)
    assert why.extent == pytest.approx(expected, rel=1e-12)
    assert why.to_dict()["extent"] == pytest.approx(list(expected), rel=1e-12)
    drawn = np.asarray(overlay(why.image, np.ones_like(why.cam), why.extent), int)
    changed = (drawn != np.asarray(why.image, int)).any(axis=2)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    assert np.floor(expected[1]) <= rows.min() <= rows.max() < np.ceil(expected[3])
    assert np.floor(expected[0]) <= columns.min() <= columns.max() < np.ceil(expected[2])
    query_tile, results = why.tiles()
    assert query_tile.extent == why.extent
    assert results[0].extent == CROP.extent(48, 40)
    assert results[0].caption == why.ids[0].rpartition("/")[2]
    assert results[0].subcaption.splitlines()[0] == why.labels[0]


def test_to_dict_is_json_and_holds_what_it_says(cropped: Explainer) -> None:
    why = cropped.explain(picture(2, 1))
    told = json.loads(json.dumps(why.to_dict(), allow_nan=False))
    np.testing.assert_array_equal(np.array(told["cam"], np.float32), why.cam)
    small = why.to_dict(size=(4, 4))
    np.testing.assert_allclose(small["cam"], area_average(why.cam, (4, 4)), rtol=1e-6)
    assert (told["transfer"], told["empty"], why.empty) == ("mean", False, False)
    assert told["explained"] == why.ids
    columns = {
        "id": why.ids, "label": why.labels, "path": why.paths, "distance": why.distances,
        "similarity": why.similarities, "cam": why.neighbor_cams,
    }  # fmt: skip
    for name, column in columns.items():
        values = [neighbor[name] for neighbor in told["neighbors"]]
        np.testing.assert_array_equal(np.array(values, np.asarray(column).dtype), column)
    # Results are drawn with weights of one length.
    norms = np.linalg.norm(cropped.index.weights(cropped.index.positions(why.ids)), axis=1)
    np.testing.assert_allclose(why.neighbor_norms, norms, rtol=1e-6)
    _, results = why.tiles()
    for tile, own, norm in zip(results, why.neighbor_cams, norms, strict=True):
        np.testing.assert_allclose(tile.cam, own / norm, rtol=1e-5)


@pytest.mark.parametrize("name", ["why.png", "why.JPG", "why.webp"])
def test_save_writes_the_plot(cropped: Explainer, tmp_path: Path, name: str) -> None:
    why, options = cropped.explain(picture(0, 0)), {"title": "A title", "scale": "each"}
    assert why.save(tmp_path / name, **options) == tmp_path / name
    plot = why.plot(**options)
    assert plot != why.plot(title="A title", scale="joint")
    with Image.open(tmp_path / name) as written:
        assert written.size == plot.size
        if name == "why.png":
            np.testing.assert_array_equal(written, plot)


def test_where_no_picture_can_be_written(cropped: Explainer, tmp_path: Path) -> None:
    why = cropped.explain(picture(0, 0))
    for name, scale, message in (
        ("why.txt", "joint", r"why\.txt: \.txt is no picture format; name it \.png or \.jpg"),
        ("why", "joint", r"why: no ending is no picture format"),
        ("nowhere/why.png", "joint", r"why\.png: cannot be written \(No such file"),
        ("why.png", "both", "scale is 'both'"),
    ):
        with pytest.raises(InputError, match=message):
            why.save(tmp_path / name, scale=scale)
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_form_is_escaped_and_self_contained(cropped: Explainer) -> None:
    why = replace(cropped.explain(picture(0, 0)), ids=['<b>"&.png', "b"])
    assert repr(why).startswith("<Explanation: 32 x 32 map by ")
    html = why._repr_html_()
    assert html.startswith('<img alt="query and its nearest images: &lt;b&gt;&#34;&amp;.png, b"')
    assert 'src="data:image/jpeg;base64,' in html
    assert html.count("<") == 1
    assert "http" not in html


def test_a_missing_picture_of_a_neighbour_breaks_nothing(dense, network, tmp_path) -> None:
    gone = Explainer(dense, network, images=tmp_path / "moved").explain(picture(0, 0))
    assert gone.paths[0].startswith(str(tmp_path / "moved"))
    assert [tile.image for tile in gone.tiles()[1]] == [None] * 5
    assert gone.plot().width > 0
    write_photos(tmp_path / "moved")
    back = Explainer(dense, network, images=tmp_path / "moved").explain(picture(0, 0))
    assert all(tile.image is not None for tile in back.tiles()[1])


def test_a_transform_of_the_callers_own_and_an_index_without_own_maps(
    photos: Path, tmp_path: Path
) -> None:
    half = lambda width, height: (0.0, 0.0, width / 2, float(height))  # noqa: E731

    def left_half(image: Image.Image) -> np.ndarray:
        pixels = image.crop((0, 0, image.width // 2, image.height)).resize((SIDE, SIDE))
        return np.asarray(pixels, np.float32).transpose(2, 0, 1) / 255

    network = network_of(preprocess=custom(left_half, name="left half", extent=half))
    path = build(photos, tmp_path / "index", network, own_maps=False)
    explainer = Explainer(path, network, n_neighbors=2)
    why = explainer.explain(photos / "1/1.png")
    assert why.ids[0] == "1/1.png"
    assert why.extent == (0, 0, 24, 40)
    assert why.tiles()[1][0].extent == (0, 0, 24, 40)
    assert why.neighbor_cams is why.to_dict()["neighbors"][0]["cam"] is None
    assert why.plot().width > 0
    # Without the network its transform is but a name: results are drawn without their pictures.
    vector, maps = explainer.index.embeddings([0])[0], np.ones((CHANNELS, *GRID))
    alone = Explainer(path).explain_features(vector, maps)
    assert [tile.image for tile in alone.tiles()[1]] == [None] * 5
    assert alone.plot().width > 0
    with pytest.raises(NetworkMismatch, match="left half"):
        Explainer(path, network_of())
