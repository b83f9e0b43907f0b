"""An index from features that already exist: the same as from the images they were made of."""

import numpy as np
import pytest
import torch
from build_samples import DENSE, Mean, Toy, dense, everything, inputs, off, opened, pictures, toy
from safetensors.torch import save_file

from embedcam.errors import InputError, NetworkError, RecipeError
from embedcam.explain.explainer import Explainer
from embedcam.images import ImageSource, find_images
from embedcam.index import verify
from embedcam.offline import add_images, build_index
from embedcam.offline.features import AffineHead, build_from_features, read_array, read_head
from embedcam.recipe.recipe import Recipe, RecipeWarning

GRID = (4, 4)


pytestmark = pytest.mark.usefixtures("quick")


def features(it: Toy, source: ImageSource) -> dict[str, np.ndarray]:
    found = it.network.forward(inputs(it, source))
    return {
        "embeddings": found.embedding.numpy(),
        "pooled": found.activations.mean((-2, -1)).numpy(),
        "positive_pooled": found.activations.clamp(min=0).mean((-2, -1)).numpy(),
    }


def head_of(it: Toy) -> AffineHead:
    if isinstance(it.network.runner.head, Mean):
        return AffineHead(np.eye(8, dtype=np.float32))
    linear = it.network.runner.head[1]
    return AffineHead(linear.weight.detach().numpy(), linear.bias.detach().numpy())


def from_features(it, source, path, recipe, **options):
    given = {"head": head_of(it), "grid": GRID, "ids": source.ids, "labels": source.labels,
             "normalize": it.network.normalize, **features(it, source), **options}  # fmt: skip
    return build_from_features(path=path, recipe=recipe, **given)


RECIPES = {
    "dense": DENSE,
    "around": dense(norm="around", hinge=True, margin=0.02),
    "plus": dense(method="gradcam++"),
    "all": dense(sampling="all", triplets=None),
    "centred": dense(target="centred", norm="around", method="gradcam++"),
    "exact": Recipe(triplets=4),
    "derived": Recipe(target="centred", norm="around"),
    "pca": Recipe(triplets=4, rank=3, dtype="float32"),
    "top-m": dense(encoding="top-m", m=8),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_features_in_files_give_the_index_of_their_images(
    tmp_path, source, name, normalize
) -> None:
    it, recipe = toy("signed", normalize=normalize), RECIPES[name]
    report = build_index(source, it.network, tmp_path / "images", recipe, own_maps=False)
    for key, array in features(it, source).items():
        np.save(tmp_path / f"{key}.npy", array)
    linear = it.network.runner.head[1]
    save_file({"weight": linear.weight, "bias": linear.bias}, tmp_path / "head.safetensors")
    read = {key: read_array(tmp_path / f"{key}.npy") for key in features(it, source)}
    found = from_features(
        it, source, tmp_path / "features", recipe, **read,
        head=read_head(tmp_path / "head.safetensors"), network=it.network,
    )  # fmt: skip
    assert (found.n_images, found.n_without_triplets) == (12, report.n_without_triplets)
    assert verify(tmp_path / "features").problems == []
    with opened(tmp_path / "features") as (a, live), opened(tmp_path / "images") as (b, _):
        np.testing.assert_allclose(a.embeddings(live), b.embeddings(live), atol=1e-6)
        assert list(a.ids[live]) == list(b.ids[live])
        assert list(a.labels[live]) == list(b.labels[live])
        assert a.triplets_used(live).tolist() == b.triplets_used(live).tolist()
        half = recipe.dtype == "float16" and recipe.target == "margin"
        assert off(a.weights(live), b.weights(live)) < (2**-10 if half else 1e-5)
        assert a.coarse(live) is None
        same = ("recipe_sha256", "network", "triplets", "method", "target", "norm", "embedding")
        assert all(getattr(a.manifest, key) == getattr(b.manifest, key) for key in same)
        one, other = a.manifest.layers[0], b.manifest.layers[0]
        assert one == other


def test_blocks_change_nothing(tmp_path, source, monkeypatch) -> None:
    it = toy()
    from_features(it, source, tmp_path / "one", DENSE)
    monkeypatch.setattr("embedcam.offline.features.BLOCK", 5)
    from_features(it, source, tmp_path / "three", DENSE)
    with opened(tmp_path / "one") as (a, live), opened(tmp_path / "three") as (b, _):
        assert off(a.weights(live), b.weights(live)) < 1e-6


def test_unit_embeddings_are_kept_to_the_bit_and_others_made_so(tmp_path, source) -> None:
    it = toy()
    given = features(it, source)["embeddings"]
    from_features(it, source, tmp_path / "unit", DENSE)
    scaled = given * np.linspace(1, 9, 12, dtype=np.float32)[:, None]
    from_features(it, source, tmp_path / "long", DENSE, embeddings=scaled)
    with opened(tmp_path / "unit") as (a, live), opened(tmp_path / "long") as (b, _):
        assert a.embeddings(live).tobytes() == given.tobytes()
        np.testing.assert_allclose(b.embeddings(live), given, atol=1e-6)
        assert off(a.weights(live), b.weights(live)) < 1e-5


def test_half_precision_features_are_accepted(tmp_path, source) -> None:
    it = toy()
    small = {key: array.astype(np.float16) for key, array in features(it, source).items()}
    from_features(it, source, tmp_path / "i", DENSE, **small)
    assert verify(tmp_path / "i").problems == []


def test_the_pooled_vector_itself_needs_no_head(tmp_path, source) -> None:
    it = toy("identity")
    from_features(it, source, tmp_path / "i", DENSE, head=None)
    build_index(source, it.network, tmp_path / "j", DENSE)
    with opened(tmp_path / "i") as (a, live), opened(tmp_path / "j") as (b, _):
        assert off(a.weights(live), b.weights(live)) < 1e-5
    with pytest.raises(InputError, match="embeddings have 5 numbers and pooled activations 8; giv"):
        from_features(toy(), source, tmp_path / "k", DENSE, head=None)


def test_with_its_network_named_it_answers_pictures_and_grows(tmp_path, source) -> None:
    it = toy()
    from_features(it, source, tmp_path / "i", DENSE, network=it.network)
    more = pictures(tmp_path / "more", 6, seed=9)
    renamed = ImageSource([type(i)("x" + i.id, i.path, i.label) for i in more.items], more.root)
    add_images(renamed, it.network, tmp_path / "i")
    with opened(tmp_path / "i") as (index, live):
        assert len(live) == 18
        explainer = Explainer(index, it.network)
        explanation = explainer.explain(source.root / source.items[3].path)
        assert explanation.ids[0] == source.ids[3]


def test_without_a_network_it_cannot_grow(tmp_path, source) -> None:
    from_features(toy(), source, tmp_path / "i", DENSE)
    with pytest.raises(InputError, match="built from features alone and does not know its network"):
        add_images(find_images(source.root), toy().network, tmp_path / "i")


def test_a_network_that_did_not_make_the_features_is_refused(tmp_path, source) -> None:
    it = toy()
    for network, says in (
        (toy(normalize=False), "normalize True and the network False"),
        (toy("fine"), r"grid \[4, 4\] and the network \[16, 16\]"),
        (toy("other"), r"head \[5, 8\] and the network None"),
        (toy(seed=3), "the features' head is off by .* from the network's"),
    ):
        with pytest.raises(InputError, match=says):
            from_features(it, source, tmp_path / "i", DENSE, network=network.network)
    assert not (tmp_path / "i").exists()


def spoiled(array: np.ndarray, value: float = np.nan) -> np.ndarray:
    array = array.copy()
    array[4, 1] = value
    return array


def test_features_that_do_not_belong_together_are_refused(tmp_path, source) -> None:
    it = toy("signed")
    good = features(it, source)
    matrix, bias = head_of(it).matrix, head_of(it).bias
    for says, options in (
        ("embeddings: row 4 holds a NaN", {"embeddings": spoiled(good["embeddings"])}),
        ("pooled: row 4 holds", {"pooled": spoiled(good["pooled"], np.inf)}),
        (r"pooled: row 4 holds 3e\+38, and numbers may go up to 1e\+15",
         {"pooled": spoiled(good["pooled"], 3e38)}),
        (r"embeddings: row 4 holds -2e\+15, and",
         {"embeddings": spoiled(good["embeddings"], -2e15)}),
        (r"the head's matrix: row 4 holds 1e\+16, and",
         {"head": AffineHead(spoiled(matrix, 1e16), bias)}),
        (r"the head's bias: row 0 holds 1e\+16, and",
         {"head": AffineHead(matrix, np.full_like(bias, 1e16))}),
        ("what the head makes of the pooled vectors: row 0 holds",
         {"head": AffineHead(np.full_like(matrix, 1e15), bias), "pooled": good["pooled"] + 9}),
        ("embedding 4 is off by", {"pooled": spoiled(good["pooled"], 9.0)}),
        ("is off by", {"head": AffineHead(matrix)}),
        ("is off by", {"head": AffineHead(-matrix, bias)}),
        ("do not fit together", {"head": AffineHead(matrix[:3], bias)}),
        ("do not fit together", {"head": AffineHead(matrix, bias[:2])}),
        ("do not fit together", {"pooled": good["pooled"][:7]}),
        (r"embeddings is int64 of shape \[3\]", {"embeddings": np.arange(3)}),
        ("pooled is float32 of shape", {"pooled": np.empty((0, 8), np.float32)}),
        ("12 embeddings came with 3 ids", {"ids": ["a", "b", "c"]}),
        ("12 embeddings came with 12 ids and 2 labels", {"labels": ["a", "b"]}),
        (r"grid = \(0, 4\)", {"grid": (0, 4)}),
        ("grid = ", {"grid": (4,)}),
        ("all 12 images have one label", {"labels": ["a"] * 12}),
        (r"expected means of max\(A, 0\)", {"recipe": RECIPES["plus"],
                                          "positive_pooled": -good["positive_pooled"]}),
        ("positive_pooled is", {"recipe": RECIPES["plus"],
                                "positive_pooled": good["positive_pooled"][:4]}),
        ("m = 50 channels of 8", {"recipe": Recipe.paper()}),
        ("give both or neither", {"triplets": np.zeros((12, 1, 2), int)}),
        ("ids", {"ids": ["same"] * 12}),
    ):  # fmt: skip
        options = {"recipe": DENSE, **options}
        with pytest.raises(InputError, match=says):
            from_features(it, source, tmp_path / "i", **options)
    zero = good["embeddings"].copy()
    zero[2] = 0
    with pytest.raises(InputError, match="embedding 2 has length 0, so it has no direction"):
        from_features(it, source, tmp_path / "i", DENSE, embeddings=zero)


def test_negative_pooled_activations_need_their_positive_mean(tmp_path, source) -> None:
    it = toy("signed")
    assert (features(it, source)["pooled"] < 0).any()
    with pytest.raises(RecipeError, match="give positive_pooled, or use method 'gradcam'"):
        from_features(it, source, tmp_path / "i", RECIPES["plus"], positive_pooled=None)
    from_features(it, source, tmp_path / "i", DENSE, positive_pooled=None)
    from_features(toy(), source, tmp_path / "j", RECIPES["plus"], positive_pooled=None)


def test_folders_and_finished_indexes_are_not_overwritten(tmp_path, source) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'mine\.txt'"):
        from_features(toy(), source, tmp_path / "i", DENSE)
    from_features(toy(), source, tmp_path / "j", DENSE)
    before = everything(tmp_path / "j")
    with pytest.raises(InputError, match="already holds a finished index"):
        from_features(toy(), source, tmp_path / "j", dense(seed=1))
    assert everything(tmp_path / "j") == before
    from_features(toy(), source, tmp_path / "j", dense(seed=1), replace=True)
    from_features(toy(), source, tmp_path / "k", DENSE)
    assert everything(tmp_path / "k") == before


def test_unwise_choices_are_warned_about_and_lonely_classes_counted(tmp_path, source) -> None:
    with pytest.warns(RecipeWarning, match="'around' is the safe choice") as caught:
        from_features(toy(), source, tmp_path / "i", dense(target="centred"))
    assert caught[0].filename == __file__
    labels = ["alone", *source.labels[1:]]
    assert from_features(toy(), source, tmp_path / "j", DENSE, labels=labels).n_single == 1
    ids = build_from_features(
        **{k: v for k, v in features(toy(), source).items() if k != "positive_pooled"},
        path=tmp_path / "k", grid=GRID, head=head_of(toy()), recipe=DENSE,
    )  # fmt: skip
    assert ids.n_single == 0
    with opened(tmp_path / "k") as (index, live):
        assert list(index.ids[live]) == [str(i) for i in range(12)]
        assert list(index.labels[live]) == [None] * 12


def test_files_that_are_no_arrays(tmp_path) -> None:
    (tmp_path / "x.npy").write_bytes(b"no array")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "e.npy").write_bytes(b"")
    for name in ("x.npy", "o.npy", "e.npy", "none.npy"):
        with pytest.raises(InputError, match=rf"{name}: (not a|there is no)"):
            read_array(tmp_path / name)
    with pytest.raises(NetworkError, match="not a file"):
        read_head(tmp_path / "none.safetensors")
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "h.safetensors")
    assert read_head(tmp_path / "h.safetensors").bias is None
