"""Additions to an index, and its refit."""

import shutil

import numpy as np
import oracles
import pytest
import torch
from build_samples import (
    CELLS,
    DENSE,
    WIDTH,
    Toy,
    activations_of,
    dense,
    drawn,
    everything,
    literal_weights,
    off,
    opened,
    paint,
    pictures,
    toy,
)

from embedcam.errors import IndexFormatError, InputError, NetworkMismatch
from embedcam.images import ImageSource, find_images, from_dataset
from embedcam.index import remove, verify
from embedcam.index.identity import NetworkWarning
from embedcam.offline import add_images, build_index, indexed_images
from embedcam.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def grown(tmp_path):
    """A built index of twelve images, and six more."""
    first, later = pictures(tmp_path / "p"), tmp_path / "later"
    paint(later, range(20, 26))
    return first, find_images(later)


ADDABLE = {
    "dense": ("affine", DENSE),
    "pca": ("other", Recipe(triplets=4, rank=3, dtype="float32")),
    "exact": ("affine", Recipe(triplets=4, dtype="float32")),
    "derived": ("affine", Recipe(target="centred", norm="around")),
    "top-m": ("tokens", dense(encoding="top-m", m=4)),
    "all": ("pooled", dense(target="margin", sampling="all", triplets=None)),
    "hinge": ("affine", dense(hinge=True, method="gradcam++")),
}


@pytest.mark.parametrize("case", ADDABLE)
def test_additions_keep_what_was_fitted_and_draw_from_old_and_new(tmp_path, grown, case) -> None:
    (first, later), (kind, recipe) = grown, ADDABLE[case]
    it = toy(kind)
    build_index(first, it.network, tmp_path / "i", recipe)
    fitted = everything(tmp_path / "i" / "fitted")
    with opened(tmp_path / "i") as (index, live):
        old = {n: a.tobytes() for n, a in index.rows(live).items()}
        old_maps, mean = index.coarse(live).tobytes(), index.fitted("embedding_mean").copy()
    report = add_images(later, it.network, tmp_path / "i", batch_size=4)
    assert report.n_images == 6
    assert everything(tmp_path / "i" / "fitted") == fitted
    assert verify(tmp_path / "i").problems == []
    with opened(tmp_path / "i") as (index, live):
        assert {n: a.tobytes() for n, a in index.rows(live[:12]).items()} == old
        assert index.coarse(live[:12]).tobytes() == old_maps
        assert list(index.ids[live]) == [*first.ids, *later.ids]
        counts = index.manifest.to_dict()["counts"]
        assert (counts["rows"], counts["added_after_fit"]) == (18, 6)
        assert index.manifest.to_dict()["fit"] == {"images": 12, "rows": 12}
        embeddings, encoding, rows = index.embeddings(live), index.encoding(), live[12:]
        if recipe.target == "centred":
            weights = (embeddings[12:] - mean) @ it.network.head_kind.matrix / CELLS
            assert off(index.weights(rows), weights) < 1e-5
            return
        labels = [*first.labels, *later.labels]
        if case == "all":
            triplets = np.array([oracles.every_triplet(labels, row) for row in range(12, 18)])
        else:
            triplets = drawn(recipe, embeddings, labels)[12:]
        assert (triplets < 12).any()
        assert (triplets >= 12).any()
        weights, used = literal_weights(it, later, recipe, embeddings, triplets)
        if case == "pca":
            weights = encoding.decode(encoding.encode(weights.astype(np.float32)))
        elif case == "top-m":
            weights = np.stack([oracles.top_m(one, 4, "signed") for one in weights])
        assert max(map(off, index.weights(rows), weights)) < 1e-4
        assert index.triplets_used(rows).tolist() == used.tolist()
        own = oracles.cam(index.weights(rows)[2], activations_of(it, later)[2].numpy())
        np.testing.assert_allclose(index.coarse(rows)[2], own, atol=own.max() * 0.8 / 255)
        near = index.search(embeddings[12:], 1)
        assert near.positions[:, 0].tolist() == list(range(12, 18))


def test_paths_of_additions_lead_to_their_files_wherever_they_lie(tmp_path, grown) -> None:
    first, later = grown
    paint(first.root / "c1", [40], 0)
    inside = ImageSource([find_images(first.root / "c1", "none").items[-1]], first.root / "c1")
    it = toy()
    build_index(first, it.network, tmp_path / "i", DENSE)
    add_images(later, it.network, tmp_path / "i")
    add_images(inside, it.network, tmp_path / "i")
    with opened(tmp_path / "i") as (index, live):
        paths = list(index.paths[live])
        assert paths[12] == str((later.root / later.items[0].path).resolve())
        assert paths[18] == "c1/040.png"
        shutil.move(first.root, tmp_path / "moved")
        again = indexed_images(index, tmp_path / "moved")
        for position in range(len(again)):
            again.open(position)


def test_a_refit_redoes_every_weight_and_forgets_what_was_added(tmp_path, grown) -> None:
    first, later = grown
    it = toy()
    build_index(first, it.network, tmp_path / "i", DENSE)
    add_images(later, it.network, tmp_path / "i")
    remove(tmp_path / "i", [first.ids[0]])
    with opened(tmp_path / "i") as (index, _):
        source = indexed_images(index)
    assert source.ids == [*first.ids[1:], *later.ids]
    build_index(source, it.network, tmp_path / "i", DENSE, replace=True)
    with opened(tmp_path / "i") as (index, live):
        counts = index.manifest.to_dict()["counts"]
        assert (counts["rows"], counts["live"], counts["added_after_fit"]) == (17, 17, 0)
        assert index.manifest.to_dict()["fit"] == {"images": 17, "rows": 17}
        embeddings = index.embeddings(live)
        mean = embeddings.astype(np.float64).mean(0)
        np.testing.assert_allclose(index.fitted("embedding_mean"), mean, atol=1e-7)
        triplets = drawn(DENSE, embeddings, source.labels)
        expected, _ = literal_weights(it, source, DENSE, embeddings, triplets)
        assert off(index.weights(live), expected) < 2e-5


def test_additions_that_cannot_be_are_refused_and_change_nothing(tmp_path, grown) -> None:
    first, later = grown
    build_index(first, toy().network, tmp_path / "i", DENSE)
    before = everything(tmp_path / "i")
    both = ImageSource([*later.items, first.items[3]], None)
    for error, match, source, network in (
        (InputError, r"1 of 7 .* already \(c0/009.png\).*columns path,label,id", both, toy()),
        (NetworkMismatch, "not the network of the index", later, toy(seed=4)),
        (NetworkMismatch, "normalize", later, toy(normalize=False)),
        (InputError, "there are no images", ImageSource([]), toy()),
        (InputError, "no preprocessing", later, toy(preprocess=None)),
    ):
        with pytest.raises(error, match=match):
            add_images(source, network.network, tmp_path / "i")
    with pytest.raises(InputError, match="on_unreadable"):
        add_images(later, toy().network, tmp_path / "i", on_unreadable="drop")
    assert everything(tmp_path / "i") == before
    with pytest.raises(IndexFormatError, match="there is no index here"):
        add_images(later, toy().network, tmp_path / "nowhere")
    given = np.tile([[1, 2]], (12, 1, 1))
    given[1], given[2] = [[3, 2]], [[1, 3]]
    build_index(first, toy().network, tmp_path / "j", dense(sampling="given"), triplets=given)
    with pytest.raises(InputError, match="given triplets, which say nothing about new images"):
        add_images(later, toy().network, tmp_path / "j")


def bent(by: float) -> Toy:
    """A network whose head is affine but for so much."""
    it = toy()
    head = it.network.runner.head
    it.network.runner.head = lambda maps: head(maps) + by * maps.std((1, 2, 3))[:, None]
    return it


def test_an_admitted_network_without_the_head_the_codes_need_is_refused(tmp_path, grown) -> None:
    first, later = grown
    build_index(first, toy().network, tmp_path / "i", Recipe(triplets=4))
    # The same on the probe picture, yet no longer found to be affine.
    with pytest.raises(NetworkMismatch, match="this network has none"):
        add_images(later, bent(1e-3).network, tmp_path / "i")


def test_codes_in_principal_components_stay_so_for_a_network_found_affine(tmp_path, grown) -> None:
    first, later = grown
    recipe, plain = Recipe(triplets=4, rank=WIDTH, dtype="float32"), toy()
    build_index(first, bent(1e-4).network, tmp_path / "i", recipe)
    add_images(later, plain.network, tmp_path / "i")
    with opened(tmp_path / "i") as (index, live):
        assert index.encoding().spec()["origin"] == "pca"
        embeddings = index.embeddings(live)
        triplets = drawn(recipe, embeddings, [*first.labels, *later.labels])[12:]
        expected, _ = literal_weights(plain, later, recipe, embeddings, triplets)
        assert off(index.weights(live[12:]), expected) < 0.05


def test_faiss_grows_with_the_additions_by_what_it_was_trained_on(tmp_path, grown) -> None:
    first, later = grown
    paint(later.root / "new", [50], 0)
    it = toy()
    build_index(first, it.network, tmp_path / "i", dense(faiss="IVF2,Flat"))
    assert add_images(find_images(later.root), it.network, tmp_path / "i").n_single == 1
    with opened(tmp_path / "i") as (index, live):
        assert index.manifest.faiss.trained_on == 12
        found = index.search(index.embeddings(live), 1).positions[:, 0]
        assert found.tolist() == list(range(19))


def test_an_index_of_a_data_set_can_grow_and_cannot_be_refitted(tmp_path) -> None:
    rng = np.random.default_rng(0)
    data = [(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8), i % 3) for i in range(9)]
    build_index(from_dataset(data), toy().network, tmp_path / "i", DENSE)
    add_images(from_dataset(data[:3], ids=["x", "y", "z"]), toy().network, tmp_path / "i")
    with opened(tmp_path / "i") as (index, live):
        assert list(index.paths[live]) == [""] * 12
        with pytest.raises(InputError, match="does not know where its images lie"):
            indexed_images(index)


def test_a_network_in_half_precision_may_add_with_a_warning(tmp_path, grown) -> None:
    first, later = grown
    build_index(first, toy().network, tmp_path / "i", DENSE)
    with pytest.warns(NetworkWarning, match="not the same computation"):
        added = add_images(later, toy(autocast=torch.bfloat16).network, tmp_path / "i")
    assert added.n_images == 6
