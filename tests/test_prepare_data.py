"""examples/prepare_data.py on tiny downloads made here, in the official layouts."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from examples import prepare_data as script


def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert(mode).save(path)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    classes = ["001.Albatross", "002.Auklet", "003.Bobolink"]
    names = [f"{name}/{letter}_1.jpg" for name, letter in zip(classes, "abc", strict=True)]
    for name, size in zip(names, ((500, 335), (200, 400), (100, 80)), strict=True):
        picture(root / "images" / name, size)
    tables = {
        "classes": [f"{i} {name}" for i, name in enumerate(classes, 1)],
        "images": [f"{i} {name}" for i, name in enumerate(names, 1)],
        "image_class_labels": ["1 1", "2 2", "3 3"],
        "train_test_split": ["1 0", "2 1", "3 1"],
        "bounding_boxes": ["1 60.0 27.0 325.0 304.0", "2 10.0 20.0 500.0 40.0", "3 1 2.0 30 40.0"],
    }
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def annotate(path: Path, box: list[float], contour: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"box_coord": np.array([box]), "obj_contour": contour})


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    root = tmp_path / "caltech-101"
    images, annotations = root / "101_ObjectCategories", root / "Annotations"
    # A square from pixel 11 to 30 across and 21 to 40 down, counted from 1.
    square = np.array([[0, 19, 19, 0], [0, 0, 19, 19]], float)
    picture(images / "crab" / "image_0001.jpg", (100, 80), "L")
    annotate(annotations / "crab" / "annotation_0001.mat", [21, 40, 11, 30], square)
    # Twice the size allowed: 640 x 320 is written as 320 x 160.
    picture(images / "airplanes" / "image_0001.jpg", (640, 320))
    plane = annotations / "Airplanes_Side_2" / "annotation_0001.mat"
    annotate(plane, [101, 200, 201, 400], square * 5)
    picture(images / "BACKGROUND_Google" / "image_0001.jpg", (50, 50))
    return root


def table(out: Path) -> list[dict[str, str]]:
    with (out / "annotations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def box(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in ("x0", "y0", "x1", "y1")]


def test_birds(birds: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(["birds", str(birds), str(out), "--quiet"]) == 0
    first, second, third = table(out)
    assert (first["path"], first["label"]) == ("images/001.Albatross/a_1.jpg", "001.Albatross")
    assert (first["split"], first["width"], first["height"]) == ("test", "320", "214")
    # 60 * 0.64, 27 * 214 / 335, 385 * 0.64, 331 * 214 / 335
    assert box(first) == [38.4, 17.2, 246.4, 211.4]
    # Clipped to the picture.
    assert second["split"] == "train"
    assert box(second) == [8.0, 16.0, 160.0, 48.0]
    # Never enlarged.
    assert box(third) == [1.0, 2.0, 31.0, 42.0]
    assert np.asarray(Image.open(out / first["path"])).shape == (214, 320, 3)
    assert np.asarray(Image.open(out / third["path"])).shape == (80, 100, 3)
    assert list(out.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (["003.Bobolink", "001-002"], ["001.Albatross", "002.Auklet", "003.Bobolink"]),
        (["@classes.txt"], ["002.Auklet", "003.Bobolink"]),
    ],
)
def test_classes(
    birds: Path, tmp_path: Path, wanted: list[str], labels: list[str], monkeypatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    Path("classes.txt").write_text("002\n\n003.Bobolink\n")
    assert script.main(["birds", str(birds.parent), str(out), "--quiet", "--classes", *wanted]) == 0
    assert [row["label"] for row in table(out)] == labels


def test_objects(objects: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(["objects", str(objects), str(out), "--quiet"]) == 0
    plane, crab = table(out)
    assert list(crab) == ["path", "label", "x0", "y0", "x1", "y1", "width", "height", "mask"]
    assert box(crab) == [10.0, 20.0, 30.0, 40.0]
    assert np.asarray(Image.open(out / crab["path"])).ndim == 2
    mask = np.asarray(Image.open(out / crab["mask"]))
    expected = np.zeros((80, 100), np.uint8)
    expected[20:40, 10:30] = 255
    np.testing.assert_array_equal(mask, expected)
    assert box(plane) == [100.0, 50.0, 200.0, 100.0]
    mask = np.asarray(Image.open(out / plane["mask"])) > 0
    assert mask.shape == (160, 320)
    rows, columns = np.nonzero(mask)
    # The outline, 0 to 95 from the box's corner (200, 100), halved: to the pixel.
    np.testing.assert_allclose([columns.min(), rows.min()], [100, 50], atol=1)
    np.testing.assert_allclose([columns.max(), rows.max()], [147.5, 97.5], atol=1)


def test_a_second_run_keeps_and_repairs(objects: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ["objects", str(objects), str(out), "--quiet"]
    script.main(run)
    before = (out / "annotations.csv").read_bytes()
    kept, cut = out / "images/crab/image_0001.jpg", out / "masks/airplanes/image_0001.png"
    stamp = kept.stat().st_mtime_ns
    whole = cut.read_bytes()
    cut.write_bytes(b"")
    script.main(run)
    assert kept.stat().st_mtime_ns == stamp
    assert cut.read_bytes() == whole
    assert (out / "annotations.csv").read_bytes() == before
    script.main([*run, "--max-side", "50"])
    assert np.asarray(Image.open(kept)).shape[:2] == (40, 50)
    assert box(table(out)[1]) == [5.0, 10.0, 15.0, 20.0]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert script.main([str(argument) for argument in arguments] + ["--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_errors_are_one_sentence(birds: Path, objects: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    (birds / "images/002.Auklet/b_1.jpg").write_bytes(b"")
    assert "b_1.jpg: cannot be read as an image" in fails(capsys, "birds", birds, out)
    assert not (out / "annotations.csv").exists()
    assert "no images.txt" in fails(capsys, "birds", tmp_path / "none", out)
    assert "no class 'owl'" in fails(capsys, "birds", birds, out, "--classes", "owl")
    (birds / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n")
    assert "disagree about image 2" in fails(capsys, "birds", birds, out)
    annotation = objects / "Annotations/crab/annotation_0001.mat"
    annotation.write_bytes(b"not a matrix")
    assert "not an annotation" in fails(capsys, "objects", objects, out)
    annotation.unlink()
    assert "no such annotation" in fails(capsys, "objects", objects, out)
