"""What a build refuses, skips, resumes and does not call done."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from build_samples import (
    BAD,
    DENSE,
    broken_pictures,
    dense,
    everything,
    interrupt,
    literal_weights,
    off,
    opened,
    paint,
    pictures,
    toy,
)
from PIL import Image

import embedcam.offline.merge as merge
from embedcam.errors import EmbedcamError, ImageError, IndexBusyError, InputError, RecipeError
from embedcam.images import ImageSource, find_images, from_dataset
from embedcam.index import Index, compact, lock, remove
from embedcam.offline import add_images, build_index, indexed_images
from embedcam.offline.checkpoint import Checkpoint
from embedcam.recipe.recipe import Recipe, RecipeWarning

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def broken(tmp_path) -> ImageSource:
    return broken_pictures(tmp_path / "pictures")


@pytest.fixture
def own(tmp_path) -> ImageSource:
    return pictures(tmp_path / "p")


@pytest.mark.parametrize("kind", ["affine", "other"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_skipped_image_shifts_no_other(tmp_path, broken, kind, batch_size, small_chunks) -> None:
    it = toy(kind)
    asked = {"batch_size": batch_size, "on_unreadable": "skip"}
    report = build_index(broken, it.network, tmp_path / "i", DENSE, **asked)
    assert [name for name, _ in report.skipped] == BAD
    assert all(name in reason for name, reason in report.skipped)
    good = [item for item in broken.items if item.id not in BAD]
    build_index(ImageSource(good, broken.root), it.network, tmp_path / "good", DENSE)
    with opened(tmp_path / "i") as (index, live), opened(tmp_path / "good") as (other, _):
        for column in ("ids", "paths", "labels"):
            found = list(getattr(index, column)[live])
            assert found == [getattr(item, column[:-1]) for item in good]
        assert off(index.embeddings(live), other.embeddings(live)) < 1e-6
        assert off(index.weights(live), other.weights(live)) < 1e-5
        np.testing.assert_allclose(index.coarse(live), other.coarse(live), atol=1e-3)


def test_a_build_that_failed_goes_on_when_told_to_skip(tmp_path, broken, small_chunks) -> None:
    # The bad pictures come into the second chunk of those sorted by id: 4 a chunk.
    order = sorted(broken.items, key=lambda item: item.id in BAD)
    source, it = ImageSource(order, broken.root), toy()
    with pytest.raises(ImageError, match=r"pictures/c0/003\.png"):
        build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4)
    with pytest.raises(EmbedcamError, match="unfinished"):
        Index.open(tmp_path / "i")
    before = sum(it.batches)
    for name in ("i", "j"):
        build_index(source, it.network, tmp_path / name, DENSE, batch_size=4, on_unreadable="skip")
        assert sum(it.batches) - before < 9 or name == "j"
    assert everything(tmp_path / "i") == everything(tmp_path / "j")


def test_a_skip_is_not_taken_over_by_a_build_that_must_fail(tmp_path, broken, monkeypatch) -> None:
    given = (broken, toy().network, tmp_path / "i", DENSE)
    interrupt(monkeypatch, "merge.gather", build_index, *given, on_unreadable="skip")
    with pytest.raises(ImageError, match=r"c0/003\.png"):
        build_index(*given)


def test_an_image_that_vanishes_between_the_passes_is_named(tmp_path, own, monkeypatch) -> None:
    gather = merge.gather

    def then_delete(*args):
        (own.root / "c1" / "004.png").unlink(missing_ok=True)
        return gather(*args)

    monkeypatch.setattr(merge, "gather", then_delete)
    for mode in ("skip", "fail"):
        paint(own.root, [4])
        with pytest.raises(ImageError, match=r"c1/004\.png"):
            build_index(own, toy("other").network, tmp_path / mode, DENSE, on_unreadable=mode)


def test_not_one_readable_image_is_one_sentence(tmp_path) -> None:
    source = pictures(tmp_path / "pictures", 6, 2)
    for item in source.items:
        (source.root / item.path).write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 6 images could be used; .*0\.png"):
        build_index(source, toy().network, tmp_path / "i", on_unreadable="skip")


def test_given_triplets_keep_to_their_images_when_one_is_skipped(tmp_path, broken) -> None:
    recipe, it = dense(sampling="given"), toy()
    bad = [broken.ids.index(name) for name in BAD]
    good = [row for row in range(12) if row not in bad]
    rng = np.random.default_rng(0)
    others = [rng.permutation([g for g in good if g != row])[:4] for row in range(12)]
    given = np.reshape(others, (12, 2, 2))
    skip = {"on_unreadable": "skip"}
    build_index(broken, it.network, tmp_path / "i", recipe, triplets=given, **skip)
    alone = ImageSource([broken.items[row] for row in good], broken.root)
    places = np.full(12, -1)
    places[good] = np.arange(9)
    with opened(tmp_path / "i") as (index, live):
        embeddings = index.embeddings(live)
        expected, _ = literal_weights(it, alone, recipe, embeddings, places[given[good]])
        assert off(index.weights(live), expected) < 2e-5
    given[good[2], 0, 0] = bad[1]
    with pytest.raises(InputError, match=r"triplets of image 'c0/009.png' name an image"):
        build_index(broken, it.network, tmp_path / "j", recipe, triplets=given, **skip)


def test_refusals_come_before_the_first_image(tmp_path, source, monkeypatch) -> None:
    monkeypatch.setattr(ImageSource, "open", None)

    def refuse(match, items=source.items, recipe=None, network=None, **options):
        given = ImageSource(items, source.root), (network or toy()).network, tmp_path / "i"
        with pytest.raises(InputError, match=match):
            build_index(*given, recipe, **options)

    one_class = [item for item in source.items if item.label == "c0"]
    given = np.zeros((11, 1, 2), int)
    refuse("there are no images", items=[])
    refuse("all 4 images have one label", items=one_class)
    refuse("2 images are too few", items=source.items[:2])
    refuse("m = 50 channels of 8", recipe=Recipe.paper())
    refuse("'Flatt'", recipe=dense(faiss="Flatt"))
    refuse("needs at least 64 images", recipe=dense(faiss="IVF64,Flat"))
    refuse("give both or neither", recipe=dense(sampling="given"))
    refuse("give both or neither", triplets=given)
    refuse(r"expected \[12 S 2\]", recipe=dense(sampling="given"), triplets=given)
    refuse("on_unreadable = 'ignore'", on_unreadable="ignore")
    refuse("batch_size = 0", batch_size=0)
    refuse("scratch_gb = -1", scratch_gb=-1)
    refuse("no preprocessing", network=toy(preprocess=None))
    assert not (tmp_path / "i").exists()
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "holiday.jpg").write_bytes(b"mine")
    for replaced in (False, True):
        refuse("holds 'holiday.jpg'", replace=replaced)
    assert os.listdir(tmp_path / "i") == ["holiday.jpg"]
    (tmp_path / "i" / "holiday.jpg").unlink()
    (tmp_path / "i").rmdir()
    (tmp_path / "i").write_text("a file")
    refuse("not a directory")


def test_another_writer_is_not_disturbed(tmp_path, source) -> None:
    with ThreadPoolExecutor(1) as other, lock(tmp_path / "i"):
        job = other.submit(build_index, source, toy().network, tmp_path / "i")
        with pytest.raises(IndexBusyError, match="another process is writing"):
            job.result(20)


def test_around_is_refused_for_a_module_that_normalises(tmp_path, source) -> None:
    it = toy(normalize=False)
    head = it.network.runner.head
    it.network.runner.head = lambda maps: torch.nn.functional.normalize(head(maps))
    with pytest.raises(RecipeError, match="this module normalises its output itself; use norm 'th"):
        build_index(source, it.network, tmp_path / "i", dense(norm="around"))


def test_the_centred_target_through_the_norm_is_warned_about(tmp_path, source) -> None:
    with pytest.warns(RecipeWarning, match="'around' is the safe choice") as caught:
        build_index(source, toy().network, tmp_path / "i", dense(target="centred"))
    assert caught[0].filename == __file__
    build_index(source, toy(normalize=False).network, tmp_path / "j", dense(target="centred"))


def test_one_image_is_enough_for_the_centred_target(tmp_path) -> None:
    source, recipe = pictures(tmp_path / "p", 1, 0), Recipe(target="centred", norm="around")
    report = build_index(source, toy().network, tmp_path / "i", recipe)
    assert (report.n_images, report.n_single, report.n_without_triplets) == (1, 0, 0)
    with opened(tmp_path / "i") as (index, live):
        np.testing.assert_allclose(index.weights(live), 0, atol=1e-7)
        np.testing.assert_allclose(index.coarse(live), 0, atol=1e-6)
    with pytest.raises(InputError, match="1 images are too few"):
        build_index(source, toy().network, tmp_path / "j")


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, source, monkeypatch, small_chunks):
    it = toy()
    write = Checkpoint.write

    def full(self, stage, chunk, arrays):
        if (stage, chunk) == ("embed", 2):
            raise OSError(28, "No space left on device", "chunk")
        write(self, stage, chunk, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", full)
        with pytest.raises(EmbedcamError, match=r"No space left on device\); see to the disk"):
            build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4)
    before = sum(it.batches)
    build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4)
    assert sum(it.batches) - before < 4 + 4
    build_index(source, toy().network, tmp_path / "j", DENSE, batch_size=4)
    assert everything(tmp_path / "i") == everything(tmp_path / "j")


def other_code(source, it):
    """The same parameters, another computation."""
    other = toy()
    first = other.network.runner.trunk
    other.network.runner.trunk = lambda images: first(images).sqrt()
    return source, other, DENSE


def other_image(source, it):
    Image.new("RGB", (24, 24), "gray").save(source.root / source.items[3].path)
    return source, it, DENSE


CHANGES = {
    "recipe": lambda source, it: (source, it, dense(seed=9)),
    "network": lambda source, it: (source, toy(seed=9), DENSE),
    "code": other_code,
    "image": other_image,
    "order": lambda source, it: (ImageSource(source.items[::-1], source.root), it, DENSE),
    "labels": lambda source, it: (find_images(source.root, "none"), it, DENSE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_finished_for_other_choices_is_not_used(
    tmp_path, own, monkeypatch, change, small_chunks
) -> None:
    source, it = own, toy()
    given = (source, it.network, tmp_path / "i", DENSE)
    interrupt(monkeypatch, "merge.fit_encodings", build_index, *given)
    source, it, recipe = change(source, it)
    build_index(source, it.network, tmp_path / "i", recipe)
    build_index(source, it.network, tmp_path / "fresh", recipe)
    assert everything(tmp_path / "i") == everything(tmp_path / "fresh")


def again(path, own, recipe=DENSE, **options) -> None:
    """Built again, it is done already, and no image is embedded."""
    before = everything(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedcam.offline.shard.embed_chunks", None)
        assert build_index(own, toy().network, path, recipe, **options).n_images == 0
    assert everything(path) == before


def refused(path, own, match: str, recipe=DENSE, seed: int = 0, **options) -> None:
    """Built again, it is refused with these words, and nothing changes."""
    before = everything(path)
    with pytest.raises(InputError, match=match + ".*--refit"):
        build_index(own, toy(seed=seed).network, path, recipe, **options)
    assert everything(path) == before


def pairs(step: int) -> np.ndarray:
    rows = np.arange(12)
    return np.stack([(rows[:, None] + [3, 6]) % 12, (rows[:, None] + [step, 2]) % 12], -1)


def test_other_given_triplets_are_not_called_done(tmp_path, own) -> None:
    path, recipe = tmp_path / "i", dense(sampling="given")
    build_index(own, toy().network, path, recipe, triplets=pairs(1))
    again(path, own, recipe, triplets=pairs(1).astype(np.uint16))
    refused(path, own, "with another array of given triplets;", recipe, triplets=pairs(4))
    refused(path, own, "with another recipe and array of given triplets;")
    build_index(own, toy().network, path, recipe, triplets=pairs(4), replace=True)
    again(path, own, recipe, triplets=pairs(4))


def test_a_replaced_picture_is_not_called_done(tmp_path, own) -> None:
    path = tmp_path / "i"
    build_index(own, toy().network, path, DENSE)
    file = own.root / own.items[3].path
    data, times = file.read_bytes(), os.stat(file)
    Image.new("RGB", (24, 24), "gray").save(file)
    refused(path, own, "with image files changed since;")
    refused(path, own, "with another recipe, and with image files changed since;", Recipe())
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again(path, own)


def test_other_choices_labels_paths_and_orders_are_not_called_done(tmp_path, own) -> None:
    path, items = tmp_path / "i", own.items
    build_index(own, toy().network, path, DENSE)
    refused(path, own, "another recipe;", dense(seed=1))
    refused(path, own, "another network;", seed=1)
    refused(path, own, "another recipe and network;", Recipe(), seed=1)
    refused(path, own, "another choice of own maps;", own_maps=False)
    refused(path, ImageSource(items[:-1], own.root), "another list of images;")
    other = [replace(items[0], label="another"), *items[1:]]
    refused(path, ImageSource(other, own.root), "with other labels;")
    refused(path, find_images(own.root, "none"), "with other labels;")
    swapped = [replace(items[0], path=items[1].path), *items[1:]]
    refused(path, ImageSource(swapped, own.root), "with another list of images;")
    refused(path, ImageSource(items[::-1], own.root), "with another list of images;")


def test_a_moved_folder_and_a_data_set_without_files_are_the_same(tmp_path, own) -> None:
    dataset = [(own.open(i), i % 3) for i in range(12)]
    build_index(from_dataset(dataset), toy().network, tmp_path / "j", DENSE)
    again(tmp_path / "j", from_dataset(dataset))
    build_index(own, toy().network, tmp_path / "i", DENSE)
    own.root.rename(tmp_path / "moved")
    again(tmp_path / "i", find_images(tmp_path / "moved"))


def test_skipped_images_count_once_they_can_be_read(tmp_path) -> None:
    own, path = broken_pictures(tmp_path / "b"), tmp_path / "i"
    build_index(own, toy().network, path, DENSE, on_unreadable="skip")
    report = build_index(own, toy().network, path, DENSE, on_unreadable="skip")
    assert [name for name, _ in report.skipped] == BAD
    paint(own.root, [3])
    refused(path, own, "with another list of images;", on_unreadable="skip")


def test_additions_and_removals_are_named(tmp_path, own) -> None:
    path = tmp_path / "i"
    build_index(own, toy().network, path, DENSE)
    paint(tmp_path / "later", range(20, 23))
    add_images(find_images(tmp_path / "later"), toy().network, path)
    refused(path, own, r"with another list of images \(3 added since\);")
    remove(path, [own.ids[0], own.ids[5]])
    refused(path, own, r"with another list of images \(3 added since, 2 removed since\);")
    remove(path, find_images(tmp_path / "later").ids)
    compact(path)
    refused(path, own, r"with another list of images \(2 removed since\);")
    with opened(path) as (index, _):
        kept = indexed_images(index)
    build_index(kept, toy().network, path, DENSE, replace=True)
    again(path, kept)
