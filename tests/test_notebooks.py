"""What objects show of themselves in a notebook: pictures that stay small, and tables."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photo_samples import SIDE, build, network_of, picture, write_photos
from PIL import Image

import embedcam
from embedcam import BuildReport, Explainer, PairExplainer, Recipe, Similarity, cam_for
from embedcam.render import in_notebook

LARGE = (1_200, 900)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large pictures full of noise, the hardest to make small, and their index."""
    place = tmp_path_factory.mktemp("notebook")
    for label in range(2):
        (place / "photos" / str(label)).mkdir(parents=True)
        for number in range(6):
            noisy = picture(label, number, LARGE)
            noisy.save(place / "photos" / str(label) / f"{number}.jpg", quality=95)
    build(place / "photos", place / "index", network_of())
    return place


def shown(html: str) -> Image.Image:
    """The only thing in it: a picture."""
    found = re.fullmatch(r'<img alt="[^"]*" style="[^"]*" src="data:image/jpeg;base64,(.*)">', html)
    assert found is not None
    drawn = Image.open(io.BytesIO(base64.b64decode(found[1])))
    drawn.load()
    return drawn


def cells(html: str) -> list[list[str]]:
    """The rows of the tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_two_explanations_fit_into_a_notebook_of_a_megabyte(place: Path) -> None:
    with Explainer(place / "index", network_of()) as explainer:
        query = place / "photos" / "0" / "0.jpg"
        for results, most in ((5, 500_000), (11, 800_000)):
            why = explainer.explain(query, n_neighbors=results)
            html = why._repr_html_()
            assert len(html) < most
            drawn, plotted = shown(html), why.plot()
            assert drawn.width * drawn.height <= 1_600_000
            assert f"width: {plotted.width}px" in html
        receipt = PairExplainer(explainer).receipt(query, why.ids[1])
        assert len(receipt._repr_html_()) < 500_000
        assert shown(receipt._repr_html_()).width > 500


def test_the_words_of_a_picture_are_short_and_escaped() -> None:
    html = in_notebook(picture(0, 0), '<"\x1b&' + "x" * 10_000)
    assert html.startswith('<img alt="&lt;&#34;\N{REPLACEMENT CHARACTER}&amp;xxx')
    assert len(html.partition("style=")[0]) < 450
    assert shown(in_notebook(Image.new("LA", (4, 4)), "")).size == (4, 4)


def test_a_map_draws_itself_over_its_picture() -> None:
    network, image = network_of(), picture(0, 0)
    target = Similarity(np.ones(5, np.float32))
    made = cam_for(network, image, target)
    assert made.image is not None
    assert made.image.size == image.size == shown(made._repr_html_() or "").size
    assert made.extent == (0, 0, *image.size)
    # Of what is no picture nothing but the map is known, and of several there is no one picture.
    alone = cam_for(network, network.preprocess(image), target)
    assert alone.image is None
    assert shown(alone._repr_html_() or "").size == (SIDE, SIDE)
    assert cam_for(network, [image, image], target)._repr_html_() is None
    assert cam_for(network, [image], target).image is None


def test_a_build_is_a_table() -> None:
    skipped = [(f"{n}<b>.png", "broken\x1b") for n in range(12)]
    labels = {"owl": 700, "gull": 500}
    report = BuildReport(Path("my.index"), 1_200, skipped, 3, 4, {"embed": 12.34}, labels)
    rows = cells(report._repr_html_())
    assert rows[:7] == [
        ["build", ""],
        ["index", "my.index"],
        ["images", "1,200"],
        ["labels", "2 (owl, gull), of 500 (gull) to 700 (owl) images each"],
        ["alone in their class", "3"],
        ["without evidence", "4"],
        ["not taken", "12 skipped"],
    ]
    assert rows[7] == ["skipped: 0&lt;b&gt;.png", "broken\N{REPLACEMENT CHARACTER}"]
    assert rows[-1] == ["embed", "12.3 s"]
    assert len(rows) == 7 + 10 + 1


def test_a_recipe_is_a_table_of_what_it_decides() -> None:
    rows = dict(map(tuple, cells(Recipe()._repr_html_())))  # type: ignore[arg-type]
    assert rows["target"] == "auto: distinctive"
    assert rows["sampling"] == "auto: all"
    assert rows["rank"] == "128"
    assert "triplets" not in rows
    rows = dict(map(tuple, cells(replace(Recipe.paper(), seed=7)._repr_html_())))  # type: ignore[arg-type]
    assert (rows["target"], rows["triplets"], rows["seed"]) == ("margin", "50", "7")


def test_an_evaluation_is_its_tables(tmp_path: Path) -> None:
    photos, index = write_photos(tmp_path / "photos"), tmp_path / "index"
    build(photos, index, network_of())
    asked = embedcam.find_images(photos)
    told = embedcam.evaluate_index(index, asked, network_of(), progress=False, workers=0)
    html = told._repr_html_()
    assert "Recall@1" in html
    assert f"<td>{told.summary['flags'][0]}" in html or told.summary["flags"][0][:20] in html
    assert len(html) < 50_000
