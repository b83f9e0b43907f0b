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
from embedcam.errors import (
    EmbedcamError,
    ImageError,
    IndexBusyError,
    IndexFormatError,
    InputError,
    RecipeError,
)
from embedcam.images import ImageSource, find_images, from_dataset
from embedcam.index import Index, compact, lock, remove
from embedcam.offline import add_images, build_index, indexed_images
from embedcam.offline.checkpoint import Checkpoint
from embedcam.preprocess import custom
from embedcam.recipe.recipe import Recipe, RecipeWarning

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def broken(tmp_path) -> ImageSource:
    return broken_pictures(tmp_path / "pictures")


def test_an_unreadable_image_stops_the_build_with_its_path(tmp_path, broken) -> None:
    with pytest.raises(ImageError, match=r"pictures/c0/003\.png"):
        build_index(broken, toy().network, tmp_path / "i", DENSE)
    with pytest.raises(IndexFormatError, match="unfinished"):
        Index.open(tmp_path / "i")


@pytest.mark.parametrize("kind", ["affine", "other"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_a_skipped_image_shifts_no_other(tmp_path, broken, kind, batch_size, small_chunks) -> None:
    it = toy(kind)
    report = build_index(
        broken, it.network, tmp_path / "i", DENSE, batch_size=batch_size, on_unreadable="skip"
    )
    assert [name for name, _ in report.skipped] == BAD
    assert all(name in reason for name, reason in report.skipped)
    good = [item for item in broken.items if item.id not in BAD]
    alone = ImageSource(good, broken.root)
    build_index(alone, it.network, tmp_path / "good", DENSE)
    with opened(tmp_path / "i") as (index, live), opened(tmp_path / "good") as (other, _):
        assert list(index.ids[live]) == [item.id for item in good]
        assert list(index.paths[live]) == [item.path for item in good]
        assert list(index.labels[live]) == [item.label for item in good]
        assert off(index.embeddings(live), other.embeddings(live)) < 1e-6
        assert off(index.weights(live), other.weights(live)) < 1e-5
        np.testing.assert_allclose(index.coarse(live), other.coarse(live), atol=1e-3)


def test_a_build_that_failed_goes_on_when_told_to_skip(tmp_path, broken, small_chunks) -> None:
    # The bad pictures come into the second chunk of those sorted by id: 4 a chunk.
    order = sorted(broken.items, key=lambda item: item.id in BAD)
    source = ImageSource(order, broken.root)
    it = toy()
    with pytest.raises(ImageError):
        build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4)
    before = sum(it.batches)
    build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4, on_unreadable="skip")
    assert sum(it.batches) - before < 9
    build_index(source, toy().network, tmp_path / "j", DENSE, batch_size=4, on_unreadable="skip")
    assert everything(tmp_path / "i") == everything(tmp_path / "j")


def test_a_skip_is_not_taken_over_by_a_build_that_must_fail(tmp_path, broken, monkeypatch) -> None:
    given = (broken, toy().network, tmp_path / "i", DENSE)
    interrupt(monkeypatch, "merge.gather", build_index, *given, on_unreadable="skip")
    with pytest.raises(ImageError, match=r"c0/003\.png"):
        build_index(*given)


def test_an_image_that_vanishes_between_the_passes_is_named(tmp_path, monkeypatch) -> None:
    source = pictures(tmp_path / "pictures")

    def then_delete(*args):
        (source.root / "c1" / "004.png").unlink(missing_ok=True)
        return gather(*args)

    gather = merge.gather
    monkeypatch.setattr(merge, "gather", then_delete)
    for mode in ("skip", "fail"):
        paint(source.root, [4])
        with pytest.raises(ImageError, match=r"c1/004\.png"):
            build_index(source, toy("other").network, tmp_path / mode, DENSE, on_unreadable=mode)


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
    given = np.array([rng.permutation([g for g in good if g != row])[:4].reshape(2, 2)
                      for row in range(12)])  # fmt: skip
    build_index(broken, it.network, tmp_path / "i", recipe, triplets=given, on_unreadable="skip")
    alone = ImageSource([broken.items[row] for row in good], broken.root)
    places = np.full(12, -1)
    places[good] = np.arange(9)
    with opened(tmp_path / "i") as (index, live):
        expected, _ = literal_weights(
            it, alone, recipe, index.embeddings(live), places[given[good]]
        )
        assert off(index.weights(live), expected) < 2e-5
    given[good[2], 0, 0] = bad[1]
    with pytest.raises(InputError, match=r"triplets of image 'c0/009.png' name an image"):
        build_index(
            broken, it.network, tmp_path / "j", recipe, triplets=given, on_unreadable="skip"
        )


def counted_refusal(tmp_path, source, error, match, *, network=None, recipe=None, **options):
    """A refusal that comes before any picture is opened."""
    it = network or toy()
    opened_pictures = []

    class Watched(ImageSource):
        def open(self, position):
            opened_pictures.append(position)
            return super().open(position)

    watched = Watched(source.items, source.root)
    with pytest.raises(error, match=match):
        build_index(watched, it.network, tmp_path / "i", recipe, **options)
    assert opened_pictures == []


def test_refusals_come_before_the_first_image(tmp_path, source) -> None:
    def refuse(match, error=InputError, items=source.items, **options):
        counted_refusal(tmp_path, ImageSource(items, source.root), error, match, **options)

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


def test_a_folder_of_something_else_is_refused_untouched(tmp_path, source) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "holiday.jpg").write_bytes(b"mine")
    counted_refusal(tmp_path, source, InputError, "holds 'holiday.jpg'")
    counted_refusal(tmp_path, source, InputError, "holds 'holiday.jpg'", replace=True)
    assert os.listdir(tmp_path / "i") == ["holiday.jpg"]
    (tmp_path / "j").write_text("a file")
    with pytest.raises(InputError, match="not a directory"):
        build_index(source, toy().network, tmp_path / "j")


def test_another_writer_is_not_disturbed(tmp_path, source) -> None:
    with ThreadPoolExecutor(1) as other, lock(tmp_path / "i"):
        job = other.submit(build_index, source, toy().network, tmp_path / "i")
        with pytest.raises(IndexBusyError, match="another process is writing"):
            job.result(20)


@pytest.mark.parametrize("normalize", [True, False])
def test_around_is_refused_for_a_module_that_normalises(tmp_path, source, normalize) -> None:
    it = toy(normalize=normalize)
    head = it.network.runner.head
    it.network.runner.head = lambda maps: torch.nn.functional.normalize(head(maps))
    with pytest.raises(RecipeError, match="this module normalises its output itself; use norm 'th"):
        build_index(source, it.network, tmp_path / "i", dense(norm="around"))


def test_the_centred_target_through_the_norm_is_warned_about(tmp_path, source) -> None:
    recipe = dense(target="centred")
    with pytest.warns(RecipeWarning, match="'around' is the safe choice") as caught:
        build_index(source, toy().network, tmp_path / "i", recipe)
    assert caught[0].filename == __file__
    build_index(source, toy(normalize=False).network, tmp_path / "j", recipe)


def test_one_image_is_enough_for_the_centred_target(tmp_path) -> None:
    source = pictures(tmp_path / "p", 1, 0)
    report = build_index(
        source, toy().network, tmp_path / "i", Recipe(target="centred", norm="around")
    )
    assert (report.n_images, report.n_single, report.n_without_triplets) == (1, 0, 0)
    with opened(tmp_path / "i") as (index, live):
        np.testing.assert_allclose(index.weights(live), 0, atol=1e-7)
        np.testing.assert_allclose(index.coarse(live), 0, atol=1e-6)
    with pytest.raises(InputError, match="1 images are too few"):
        build_index(source, toy().network, tmp_path / "j")


def test_classes_of_one_image_are_counted(tmp_path) -> None:
    folder = tmp_path / "p"
    pictures(folder, 6, 2)
    paint(folder / "alone", [90], 0)
    paint(folder / "lonely", [91], 0)
    source = find_images(folder)
    assert build_index(source, toy().network, tmp_path / "i", DENSE).n_single == 2
    recipe = dense(target="centred", norm="around")
    assert build_index(source, toy().network, tmp_path / "j", recipe).n_single == 0


def test_images_with_every_hinge_satisfied_are_counted_and_have_no_weights(
    tmp_path, source
) -> None:
    recipe = dense(hinge=True, margin=1e-6)
    report = build_index(source, toy().network, tmp_path / "i", recipe)
    with opened(tmp_path / "i") as (index, live):
        none = index.triplets_used(live) == 0
        assert report.n_without_triplets == none.sum() > 0
        assert (index.weights(live)[none] == 0).all()
        assert (np.abs(index.weights(live)[~none]).sum(1) > 0).all()


def test_a_grid_that_changes_between_images_is_a_sentence(tmp_path, source, small_chunks) -> None:
    later = source.open(8).tobytes()

    def transform(image):
        side = 24 if image.tobytes() == later else 16
        return np.asarray(image.resize((side, side)), np.float32).transpose(2, 0, 1) / 255

    it = toy(preprocess=custom(transform, name="sizes"))
    with pytest.raises(InputError, match="preprocessed to"):
        build_index(source, it.network, tmp_path / "i", DENSE, batch_size=4, workers=0)


def test_replace_swaps_a_finished_index_for_readers_to_come(tmp_path, source) -> None:
    build_index(source, toy().network, tmp_path / "i", DENSE)
    with opened(tmp_path / "i") as (old, live):
        weights = old.weights(live)
        build_index(source, toy().network, tmp_path / "i", dense(norm="around"), replace=True)
        np.testing.assert_array_equal(old.weights(live), weights)
        with opened(tmp_path / "i") as (new, _):
            assert new.manifest.generation == 2
            assert off(new.weights(live), weights) > 0.01


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path, source, monkeypatch, small_chunks
) -> None:
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


def test_an_interruption_by_the_user_leaves_what_was_finished(
    tmp_path, source, monkeypatch, small_chunks
) -> None:
    it = toy()
    given = (source, it.network, tmp_path / "i", DENSE)
    interrupt(monkeypatch, "shard.weigh_chunks", build_index, *given)
    before = sum(it.batches)
    build_index(*given)
    assert sum(it.batches) - before < 4


def other_code(source, it):
    """The same parameters, another computation."""
    other = toy()
    first = other.network.runner.trunk
    other.network.runner.trunk = lambda images: first(images).sqrt()
    return source, other, DENSE


def other_image(source, it):
    path = source.root / source.items[3].path
    Image.fromarray(np.full((24, 24, 3), 77, np.uint8)).save(path)
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
    tmp_path, monkeypatch, change, small_chunks
) -> None:
    source, it = pictures(tmp_path / "p"), toy()
    interrupt(
        monkeypatch, "merge.fit_encodings", build_index, source, it.network, tmp_path / "i", DENSE
    )
    source, it, recipe = change(source, it)
    build_index(source, it.network, tmp_path / "i", recipe)
    build_index(source, it.network, tmp_path / "fresh", recipe)
    assert everything(tmp_path / "i") == everything(tmp_path / "fresh")


# --- a build that is run again: what counts as done, and what is said of what differs ---


@pytest.fixture
def own(tmp_path) -> ImageSource:
    return pictures(tmp_path / "p")


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
    again(path, own, recipe, triplets=pairs(1))
    again(path, own, recipe, triplets=pairs(1).astype(np.uint16))
    refused(path, own, "with another array of given triplets;", recipe, triplets=pairs(4))
    with opened(path) as (index, _):
        about = index.manifest.to_dict()["triplets"]
        assert (about["sampling"], about["count"], len(about["sha256"])) == ("given", 2, 64)
    refused(path, own, "with another recipe and array of given triplets;")
    build_index(own, toy().network, path, recipe, triplets=pairs(4), replace=True)
    again(path, own, recipe, triplets=pairs(4))


def test_a_replaced_picture_is_not_called_done(tmp_path, own) -> None:
    path = tmp_path / "i"
    build_index(own, toy().network, path, DENSE)
    file = own.root / own.items[3].path
    data, times = file.read_bytes(), os.stat(file)
    Image.fromarray(np.full((24, 24, 3), 77, np.uint8)).save(file)
    refused(path, own, "with image files changed since;")
    refused(path, own, "with another recipe, and with image files changed since;", Recipe())
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again(path, own)
    (own.root / own.items[3].path).write_bytes(b"")
    refused(path, own, "with image files changed since;")


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
    # The order decides what is drawn.
    refused(path, ImageSource(items[::-1], own.root), "with another list of images;")


def test_a_moved_folder_is_still_the_same(tmp_path, own) -> None:
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


def test_a_data_set_without_files_is_done_already(tmp_path, own) -> None:
    dataset = [(own.open(i), i % 3) for i in range(12)]
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
    tmp_path, own, recipe, sampling, count
) -> None:
    build_index(own, toy().network, tmp_path / "i", recipe)
    with opened(tmp_path / "i") as (index, _):
        expected = {"count": count, "hinge": False, "margin": 0.2, "seed": 0}
        assert index.manifest.to_dict()["triplets"] == {"sampling": sampling, **expected}


@pytest.mark.parametrize("encoding", ["dense", "top-m"])
def test_where_nothing_is_fitted_no_sample_is_read(tmp_path, own, monkeypatch, encoding) -> None:
    monkeypatch.setattr(
        "embedcam.offline.merge._sample", lambda work: pytest.fail("read for nothing")
    )
    build_index(own, toy().network, tmp_path / "i", dense(encoding=encoding, m=4))
    with opened(tmp_path / "i") as (index, live):
        assert index.weights(live).shape == (12, 8)


def test_ids_that_collide_are_shown_the_way_out(tmp_path, own) -> None:
    path = tmp_path / "i"
    build_index(own, toy().network, path, DENSE)
    other = pictures(tmp_path / "other", seed=6)
    with pytest.raises(InputError, match=r"a CSV with the columns path,label,id gives them other"):
        add_images(other, toy().network, path)
    lines = "".join(f"{i.path},{i.label},other/{i.id}\n" for i in other.items)
    (other.root / "list.csv").write_text("path,label,id\n" + lines)
    report = add_images(find_images(other.root / "list.csv"), toy().network, path)
    assert report.n_images == 12
