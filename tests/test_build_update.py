"""Updates: an index follows its folder, in one commit, without a refit."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_samples import dense, everything, opened, paint, pictures, toy
from PIL import Image

from embedcam.errors import ImageError, InputError
from embedcam.images import find_images, from_dataset
from embedcam.index import Index, remove, verify
from embedcam.index import manifest as manifest_file
from embedcam.offline import add_images, build_index
from embedcam.prototypes import compress

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures in three folders, with their index beside them."""
    source = pictures(tmp_path / "photos")
    build_index(source, toy().network, tmp_path / "i", dense(), progress=False)
    return tmp_path / "photos"


@pytest.fixture
def add(photos, monkeypatch, say):
    monkeypatch.setattr("embedcam.cli.offline.load_named", lambda chosen: toy().network)
    return partial(say, "add", photos.with_name("i"), "--network", "toy:make", unasked=False)


def replaced(path: Path, color: str = "orange") -> None:
    Image.new("RGB", (31, 17), color).save(path)


def update(photos: Path, **options: Any) -> Any:
    options |= {"update": True, "progress": False}
    return add_images(find_images(photos), toy().network, photos.with_name("i"), **options)


def states(photos: Path) -> dict[str, str | None]:
    source = find_images(photos)
    places = {name: place for place, name in enumerate(source.ids)}
    with opened(photos.with_name("i")) as (index, live):
        rows = index.select(live)
        return {
            name: source.state(places[name], mark) if name in places else "missing"
            for name, mark in zip(rows.ids, rows.marks, strict=True)
        }


def test_new_changed_and_vanished_files_are_taken_in(photos: Path) -> None:
    two_steps = photos.with_name("two")
    shutil.copytree(photos.with_name("i"), two_steps)
    with opened(photos.with_name("i")) as (index, live):
        before = dict(zip(index.ids[live], index.weights(live).tolist(), strict=True))
    paint(photos, [30, 31])
    replaced(photos / "c1/004.png")
    (photos / "c2/005.png").unlink()
    (photos / "c0/003.png").rename(photos / "c1/003.png")
    report = update(photos)
    changes = report.changes
    assert changes.new == ["c0/030.png", "c1/003.png", "c1/031.png"]
    assert changes.changed == ["c1/004.png"]
    assert sorted(changes.vanished) == ["c0/003.png", "c2/005.png"]
    assert (changes.n_same, changes.n_unmarked, report.n_images) == (9, 0, 4)
    source = find_images(photos)
    remove(two_steps, changes.gone)
    wanted = [*changes.new, *changes.changed]
    places = [place for place, name in enumerate(source.ids) if name in wanted]
    add_images(source.only(places), toy().network, two_steps, progress=False)
    with opened(photos.with_name("i")) as (index, live), opened(two_steps) as (other, others):
        assert index.manifest.generation == 2
        assert sorted(index.ids[live]) == sorted(source.ids)
        assert index.ids[live] == other.ids[others]
        for rows in ("weights", "embeddings", "coarse"):
            np.testing.assert_array_equal(getattr(index, rows)(live), getattr(other, rows)(others))
        labels = dict(zip(index.ids[live], index.labels[live], strict=True))
        assert labels["c1/003.png"] == "c1"
        after = dict(zip(index.ids[live], index.weights(live).tolist(), strict=True))
        kept = set(before) - set(changes.gone)
        assert all(after[name] == before[name] for name in kept)
        assert index.manifest.to_dict()["counts"] == {"rows": 16, "live": 13, "added_after_fit": 4}
    assert set(states(photos).values()) == {"same"}
    before = everything(photos.with_name("i"))
    again = update(photos)
    assert (again.n_images, again.changes.gone, again.changes.new) == (0, [], [])
    assert again.changes.n_same == 13
    assert everything(photos.with_name("i")) == before


def test_ids_of_one_hash_are_told_apart(photos: Path, monkeypatch) -> None:
    monkeypatch.setattr("embedcam.images.texts.hash", len, raising=False)
    names = [*find_images(photos).ids]
    (photos / names[0]).unlink()
    replaced(photos / names[5])
    replaced(photos / "c0/new.png")
    changes = update(photos).changes
    assert (changes.vanished, changes.changed) == ([names[0]], [names[5]])
    assert (changes.new, changes.n_same) == (["c0/new.png"], 10)
    assert set(states(photos).values()) == {"same"}


def test_images_of_another_folder_are_left_alone(photos: Path, tmp_path: Path) -> None:
    paint(tmp_path / "more", [40, 41])
    add_images(find_images(tmp_path / "more"), toy().network, tmp_path / "i", progress=False)
    (photos / "c2/005.png").unlink()
    assert update(photos).changes.vanished == ["c2/005.png"]
    with Index.open(tmp_path / "i") as index:
        assert index.find_live(["c1/040.png", "c2/041.png"]).keys() == {"c1/040.png", "c2/041.png"}


def test_a_csv_is_followed_as_a_folder_is(photos: Path, tmp_path: Path) -> None:
    """Another label is another image: what its weights speak for has changed."""
    table, index = photos / "list.csv", tmp_path / "listed"
    lines = [f"c{n % 3}/{n:03d}.png,kind {n % 2},image {n}" for n in range(8)]
    table.write_text("path,label,id\n" + "\n".join(lines))
    build_index(find_images(table), toy().network, index, dense(), progress=False)
    lines[2] = lines[2].replace("kind 0", "kind 1")
    lines[5] = "c2/008.png,kind 1,image 5"
    table.write_text("path,label,id\n" + "\n".join([*lines[:7], "c0/009.png,kind 0,image 9"]))
    report = add_images(find_images(table), toy().network, index, update=True, progress=False)
    changes = report.changes
    assert (changes.new, changes.changed) == (["image 9"], ["image 2", "image 5"])
    assert (changes.vanished, changes.n_same) == (["image 7"], 5)
    with opened(index) as (made, live):
        kept = zip(made.ids[live], made.labels[live], made.paths[live], strict=True)
        rows = {name: (label, path) for name, label, path in kept}
    assert rows["image 2"] == ("kind 1", "c2/002.png")
    assert rows["image 5"] == ("kind 1", "c2/008.png")


@pytest.mark.parametrize("others", [False, True])
def test_files_that_cannot_be_read_leave_the_index(photos: Path, others: bool) -> None:
    (photos / "c1/004.png").write_text("a letter")
    (photos / "c1/broken.png").write_text("another")
    if others:
        paint(photos, [30])
    manifest = (photos.with_name("i") / "manifest.json").read_bytes()
    with pytest.raises(ImageError, match="is not an image"):
        update(photos)
    assert (photos.with_name("i") / "manifest.json").read_bytes() == manifest
    report = update(photos, on_unreadable="skip")
    changes = report.changes
    assert [name for name, _ in report.skipped] == ["c1/004.png", "c1/broken.png"]
    assert (changes.vanished, changes.changed) == (["c1/004.png"], [])
    assert changes.new == (["c0/030.png"] if others else [])
    with Index.open(photos.with_name("i")) as index:
        assert len(index) == 11 + others
    assert not (photos.with_name("i") / ".building").exists()
    report = update(photos, on_unreadable="skip")
    assert (report.changes.gone, report.changes.new) == ([], [])


def unmarked(path: Path) -> None:
    """An index as earlier versions wrote it."""
    manifest = json.loads((path / "manifest.json").read_text())
    for entry in manifest["parts"]:
        del entry["files"]["marks.u32"]
        (path / entry["directory"] / "marks.u32").unlink()
    manifest_file.write(path, manifest)


def test_without_marks_new_and_vanished_files_are_all_that_is_seen(photos, add) -> None:
    unmarked(photos.with_name("i"))
    assert add(photos, "--update")[2] == (
        "note: 12 images of the index without a mark of the file, so whether one changed cannot "
        "be told; `embedcam build --refit` adds marks\n"
    )
    paint(photos, [30])
    replaced(photos / "c1/004.png")
    (photos / "c2/005.png").unlink()
    changes = update(photos).changes
    assert (changes.new, changes.changed, changes.vanished) == (["c0/030.png"], [], ["c2/005.png"])
    assert (changes.n_same, changes.n_unmarked) == (11, 11)
    replaced(photos / "c0/030.png")  # which has a mark
    assert update(photos).changes.changed == ["c0/030.png"]
    options = {"recipe": dense(), "replace": True, "progress": False}
    build_index(find_images(photos), toy().network, photos.with_name("i"), **options)
    assert set(states(photos).values()) == {"same"}


def test_what_cannot_be_followed_is_one_sentence(photos: Path, add: Callable[..., Any]) -> None:
    path, other = photos.with_name("i"), shutil.copytree(photos, photos.with_name("other"))
    before = everything(path)

    def refuse(message: str, source: Any, path: Path = path) -> None:
        with pytest.raises(InputError, match=message):
            add_images(source, toy().network, path, update=True)

    refuse("was built from .*photos, and .*other is given", find_images(other))
    data = from_dataset([np.zeros((8, 8, 3), np.uint8)], labels=["x"])
    refuse("a data set has no files to compare", data)
    refuse("has labels, and the images given come without", find_images(photos, "none"))
    code, _, err = add(other, "--update")
    assert (code, err.count("\n")) == (2, 1)
    assert "without --update, or redo the index with --refit where" in err
    compress(path, photos.with_name("small"), 3, progress=False)
    refuse("holds prototypes", find_images(photos), photos.with_name("small"))
    shutil.rmtree(photos)
    paint(photos, [50])
    refuse("none of its 12 images is among the 1 given", find_images(photos))
    assert everything(path) == before


def test_a_file_that_comes_back_under_an_old_name_is_new(photos: Path) -> None:
    held = (photos / "c2/005.png").read_bytes()
    (photos / "c2/005.png").unlink()
    update(photos)
    (photos / "c2/005.png").write_bytes(held)
    assert update(photos).changes.new == ["c2/005.png"]
    with Index.open(photos.with_name("i")) as index:
        assert (len(index), index.n_rows) == (12, 13)
    assert verify(photos.with_name("i")).ok


@pytest.mark.parametrize("seed", range(3))
def test_an_index_follows_whatever_becomes_of_its_folder(photos: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    for round in range(3):
        files = sorted(photos.rglob("*.png"))
        for file in chance.permutation(np.array(files, object))[:4].tolist():
            match chance.choice(["unlink", "replace", "move", "touch", "copy"]):
                case "unlink":
                    file.unlink()
                case "replace":
                    Image.fromarray(chance.integers(0, 256, (20, 20, 3), np.uint8)).save(file)
                case "move":
                    file.rename(photos / f"c{chance.integers(3)}/moved-{round}-{file.name}")
                case "touch":
                    os.utime(file, ns=(round, round))
                case "copy":
                    shutil.copy(file, file.with_name(f"copy-{round}-{file.name}"))
        update(photos)
        source = find_images(photos)
        with opened(photos.with_name("i")) as (index, live):
            rows = sorted(zip(index.ids[live], index.labels[live], strict=True))
            assert rows == [(item.id, item.label) for item in source.items]
        assert set(states(photos).values()) == {"same"}
        report = update(photos)
        assert (report.n_images, report.changes.gone, report.changes.new) == (0, [], [])
    assert verify(photos.with_name("i")).ok


def test_the_command_says_what_it_did(photos: Path, add: Callable[..., Any]) -> None:
    index = photos.with_name("i")
    paint(photos, range(30, 35))
    replaced(photos / "c1/004.png")
    (photos / "c2/005.png").unlink()
    code, out, err = add(photos, "--update")
    said = "labels: 3 (c0, c1, c2), of 1 (c2) to 3 (c1) images each\n"
    assert (code, err) == (0, f"forward passes: batches of 8, torch\n{said}")
    assert out.startswith(
        f"{index}: 5 new (c0/030.png, c0/033.png, c1/031.png, ...), 1 changed (c1/004.png), "
        "1 vanished (c2/005.png); 10 as before, in "
    )
    assert add(photos, "--update")[1].startswith(f"{index}: nothing to update, 16 as before, in ")
    changes = json.loads(add(photos, "--update", "--json")[1])["changes"]
    expected = {"new": [], "changed": [], "vanished": [], "n_same": 16, "n_unmarked": 0}
    assert changes == expected
