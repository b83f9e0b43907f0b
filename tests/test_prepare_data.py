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
    picture(root / "images" / classes[0] / "a_1.jpg", (500, 335))
    picture(root / "images" / classes[1] / "b_1.jpg", (200, 400))
    picture(root / "images" / classes[2] / "c_1.jpg", (100, 80))
    tables = {
        "classes": [f"{i} {name}" for i, name in enumerate(classes, 1)],
        "images": [f"1 {classes[0]}/a_1.jpg", f"2 {classes[1]}/b_1.jpg", f"3 {classes[2]}/c_1.jpg"],
        "image_class_labels": ["1 1", "2 2", "3 3"],
        "train_test_split": ["1 0", "2 1", "3 1"],
        "bounding_boxes": [
            "1 60.0 27.0 325.0 304.0",
            "2 10.0 20.0 500.0 40.0",
            "3 1.0 2.0 30.0 40.0",
        ],
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
    annotate(
        annotations / "Airplanes_Side_2" / "annotation_0001.mat", [101, 200, 201, 400], square * 5
    )
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
    assert first["path"] == "images/001.Albatross/a_1.jpg"
    assert (first["label"], first["split"], first["width"], first["height"]) == (
        "001.Albatross", "test", "320", "214",
    )  # fmt: skip
    # 60 * 0.64, 27 * 214 / 335, 385 * 0.64, 331 * 214 / 335
    assert box(first) == [38.4, 17.2, 246.4, 211.4]
    # Clipped to the picture.
    assert second["split"] == "train"
    assert box(second) == [8.0, 16.0, 160.0, 48.0]
    # Never enlarged.
    assert box(third) == [1.0, 2.0, 31.0, 42.0]
    with Image.open(out / third["path"]) as image:
        assert image.size == (100, 80)
    with Image.open(out / first["path"]) as image:
        assert image.size == (320, 214)
    assert list(out.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (["002"], ["002.Auklet"]),
        (["001-002"], ["001.Albatross", "002.Auklet"]),
        (["003.Bobolink", "001"], ["001.Albatross", "003.Bobolink"]),
        (["@classes.txt"], ["002.Auklet", "003.Bobolink"]),
    ],
)
def test_classes(
    birds: Path,
    tmp_path: Path,
    wanted: list[str],
    labels: list[str],
    monkeypatch: pytest.MonkeyPatch,
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
    with Image.open(out / crab["path"]) as image:
        assert image.mode == "L"
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
    with Image.open(kept) as image:
        assert image.size == (50, 40)
    assert box(table(out)[1]) == [5.0, 10.0, 15.0, 20.0]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert script.main([str(argument) for argument in arguments] + ["--quiet"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_errors_are_one_sentence(
    birds: Path,
    objects: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert "no images.txt" in fails(capsys, "birds", tmp_path / "none", out)
    assert "no class 'owl'" in fails(capsys, "birds", birds, out, "--classes", "owl")
    (birds / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n")
    assert "disagree about image 2" in fails(capsys, "birds", birds, out)
    annotation = objects / "Annotations/crab/annotation_0001.mat"
    annotation.write_bytes(b"not a matrix")
    assert "not an annotation" in fails(capsys, "objects", objects, out)
    annotation.unlink()
    assert "no such annotation" in fails(capsys, "objects", objects, out)
    assert not out.exists()


def test_an_unreadable_picture_is_named(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (birds / "images/002.Auklet/b_1.jpg").write_bytes(b"")
    message = fails(capsys, "birds", birds, tmp_path / "out")
    assert "b_1.jpg: cannot be read as an image" in message
    assert not (tmp_path / "out" / "annotations.csv").exists()
