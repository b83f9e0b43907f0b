"""A build that is run again: what counts as done already, and what is said of what differs."""

import os
from dataclasses import replace

import numpy as np
import pytest
from build_samples import (
    BAD,
    DENSE,
    broken_pictures,
    dense,
    everything,
    opened,
    paint,
    pictures,
    toy,
)
from PIL import Image

from embedcam.errors import InputError
from embedcam.images import ImageSource, find_images, from_dataset
from embedcam.index import compact, remove
from embedcam.offline import add_images, build_index, indexed_images
from embedcam.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def source(tmp_path) -> ImageSource:
    return pictures(tmp_path / "p")


def again(path, source, recipe=DENSE, **options) -> None:
    """Built again, it is done already."""
    before = everything(path)
    assert build_index(source, toy().network, path, recipe, **options).n_images == 0
    assert everything(path) == before


def refused(path, source, match: str, recipe=DENSE, **options) -> None:
    """Built again, it is refused with these words, and nothing changes."""
    before = everything(path)
    with pytest.raises(InputError, match=match + ".*--refit"):
        build_index(source, toy().network, path, recipe, **options)
    assert everything(path) == before


def pairs(step: int) -> np.ndarray:
    rows = np.arange(12)
    return np.stack([(rows[:, None] + [3, 6]) % 12, (rows[:, None] + [step, 2]) % 12], -1)


def test_other_given_triplets_are_not_called_done(tmp_path, source) -> None:
    path, recipe = tmp_path / "i", dense(sampling="given")
    build_index(source, toy().network, path, recipe, triplets=pairs(1))
    again(path, source, recipe, triplets=pairs(1))
    again(path, source, recipe, triplets=pairs(1).astype(np.uint16))
    refused(path, source, "with another array of given triplets;", recipe, triplets=pairs(4))
    with opened(path) as (index, _):
        about = index.manifest.to_dict()["triplets"]
        assert (about["sampling"], about["count"], len(about["sha256"])) == ("given", 2, 64)
    refused(path, source, "with another recipe and array of given triplets;")
    build_index(source, toy().network, path, recipe, triplets=pairs(4), replace=True)
    again(path, source, recipe, triplets=pairs(4))


def test_a_replaced_picture_is_not_called_done(tmp_path, source) -> None:
    path = tmp_path / "i"
    build_index(source, toy().network, path, DENSE)
    file = source.root / source.items[3].path
    data, times = file.read_bytes(), os.stat(file)
    Image.fromarray(np.full((24, 24, 3), 77, np.uint8)).save(file)
    refused(path, source, "with image files changed since;")
    refused(path, source, "with another recipe, and with image files changed since;", Recipe())
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again(path, source)
    (source.root / source.items[3].path).write_bytes(b"")
    refused(path, source, "with image files changed since;")


def test_other_labels_paths_and_orders_are_not_called_done(tmp_path, source) -> None:
    path, items = tmp_path / "i", source.items
    build_index(source, toy().network, path, DENSE)
    other = [replace(items[0], label="another"), *items[1:]]
    refused(path, ImageSource(other, source.root), "with other labels;")
    refused(path, find_images(source.root, "none"), "with other labels;")
    swapped = [replace(items[0], path=items[1].path), *items[1:]]
    refused(path, ImageSource(swapped, source.root), "with another list of images;")
    # The order decides what is drawn.
    refused(path, ImageSource(items[::-1], source.root), "with another list of images;")


def test_a_moved_folder_is_still_the_same(tmp_path, source) -> None:
    build_index(source, toy().network, tmp_path / "i", DENSE)
    source.root.rename(tmp_path / "moved")
    again(tmp_path / "i", find_images(tmp_path / "moved"))


def test_skipped_images_count_once_they_can_be_read(tmp_path) -> None:
    source, path = broken_pictures(tmp_path / "b"), tmp_path / "i"
    build_index(source, toy().network, path, DENSE, on_unreadable="skip")
    report = build_index(source, toy().network, path, DENSE, on_unreadable="skip")
    assert [name for name, _ in report.skipped] == BAD
    paint(source.root, [3])
    refused(path, source, "with another list of images;", on_unreadable="skip")


def test_additions_and_removals_are_named(tmp_path, source) -> None:
    path = tmp_path / "i"
    build_index(source, toy().network, path, DENSE)
    paint(tmp_path / "later", range(20, 23))
    add_images(find_images(tmp_path / "later"), toy().network, path)
    refused(path, source, r"with another list of images \(3 added since\);")
    remove(path, [source.ids[0], source.ids[5]])
    refused(path, source, r"with another list of images \(3 added since, 2 removed since\);")
    remove(path, find_images(tmp_path / "later").ids)
    compact(path)
    refused(path, source, r"with another list of images \(2 removed since\);")
    with opened(path) as (index, _):
        kept = indexed_images(index)
    build_index(kept, toy().network, path, DENSE, replace=True)
    again(path, kept)


def test_a_data_set_without_files_is_done_already(tmp_path, source) -> None:
    dataset = [(source.open(i), i % 3) for i in range(12)]
    build_index(from_dataset(dataset), toy().network, tmp_path / "i", DENSE)
    again(tmp_path / "i", from_dataset(dataset))


@pytest.mark.parametrize(
    ("recipe", "sampling", "count"),
    [
        (Recipe(target="centred", norm="around"), "none", 0),
        (Recipe(), "all", 0),
        (Recipe(triplets=7), "random", 7),
        (Recipe(sampling="hard"), "hard", 50),
    ],
)
def test_the_manifest_says_which_triplets_were_drawn(
    tmp_path, source, recipe, sampling, count
) -> None:
    build_index(source, toy().network, tmp_path / "i", recipe)
    with opened(tmp_path / "i") as (index, _):
        expected = {"count": count, "hinge": False, "margin": 0.2, "seed": 0}
        assert index.manifest.to_dict()["triplets"] == {"sampling": sampling, **expected}


@pytest.mark.parametrize("encoding", ["dense", "top-m"])
def test_where_nothing_is_fitted_no_sample_is_read(tmp_path, source, monkeypatch, encoding) -> None:
    monkeypatch.setattr(
        "embedcam.offline.merge._sample", lambda work: pytest.fail("read for nothing")
    )
    build_index(source, toy().network, tmp_path / "i", dense(encoding=encoding, m=4))
    with opened(tmp_path / "i") as (index, live):
        assert index.weights(live).shape == (12, 8)


def test_ids_that_collide_are_shown_the_way_out(tmp_path, source) -> None:
    path = tmp_path / "i"
    build_index(source, toy().network, path, DENSE)
    other = pictures(tmp_path / "other", seed=6)
    with pytest.raises(InputError, match=r"a CSV with the columns path,label,id gives them other"):
        add_images(other, toy().network, path)
    lines = "".join(f"{i.path},{i.label},other/{i.id}\n" for i in other.items)
    (other.root / "list.csv").write_text("path,label,id\n" + lines)
    report = add_images(find_images(other.root / "list.csv"), toy().network, path)
    assert report.n_images == 12
