"""An index from features that already exist: the same as from the images they were made of."""

import numpy as np
import pytest
import torch
from build_samples import DENSE, Mean, Toy, dense, everything, inputs, off, opened, pictures, toy
from safetensors.torch import save_file

from embedcam.errors import InputError, NetworkError, RecipeError
from embedcam.explain.explainer import Explainer
from embedcam.images import ImageSource
from embedcam.index import verify
from embedcam.index.arrays import read_array
from embedcam.offline import add_images, build_index
from embedcam.offline.features import AffineHead, build_from_features, read_head
from embedcam.recipe.recipe import Recipe, RecipeWarning

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
    given = {"head": head_of(it), "grid": (4, 4), "ids": source.ids, "labels": source.labels,
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
def test_features_in_files_give_the_index_of_their_images(tmp_path, source, name, normalize):
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
        for of in ("ids", "labels"):
            assert list(getattr(a, of)[live]) == list(getattr(b, of)[live])
        assert a.triplets_used(live).tolist() == b.triplets_used(live).tolist()
        half = recipe.dtype == "float16" and recipe.target == "margin"
        assert off(a.weights(live), b.weights(live)) < (2**-10 if half else 1e-5)
        assert a.coarse(live) is b.coarse(live) is None
        same = ("recipe_sha256", "network", "triplets", "method", "target", "norm", "embedding")
        assert all(getattr(a.manifest, key) == getattr(b.manifest, key) for key in same)
        assert a.manifest.layers[0] == b.manifest.layers[0]


def test_unit_embeddings_are_kept_and_others_made_so_also_in_blocks(tmp_path, source, monkeypatch):
    it = toy()
    given = features(it, source)["embeddings"]
    from_features(it, source, tmp_path / "unit", DENSE)
    monkeypatch.setattr("embedcam.offline.features.BLOCK", 5)
    scaled = given * np.linspace(1, 9, 12, dtype=np.float32)[:, None]
    from_features(it, source, tmp_path / "long", DENSE, embeddings=scaled)
    with opened(tmp_path / "unit") as (a, live), opened(tmp_path / "long") as (b, _):
        assert a.embeddings(live).tobytes() == given.tobytes()
        np.testing.assert_allclose(b.embeddings(live), given, atol=1e-6)
        assert off(a.weights(live), b.weights(live)) < 1e-5


def test_the_pooled_vector_itself_needs_no_head(tmp_path, source) -> None:
    it = toy("identity")
    from_features(it, source, tmp_path / "i", DENSE, head=None)
    build_index(source, it.network, tmp_path / "j", DENSE)
    with opened(tmp_path / "i") as (a, live), opened(tmp_path / "j") as (b, _):
        assert off(a.weights(live), b.weights(live)) < 1e-5
    with pytest.raises(InputError, match="embeddings have 5 numbers and pooled activations 8; giv"):
        from_features(toy(), source, tmp_path / "k", DENSE, head=None)


def test_with_its_network_named_alone_it_answers_pictures_and_grows(tmp_path, source) -> None:
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
    small = {key: array.astype(np.float16) for key, array in features(it, source).items()}
    from_features(it, source, tmp_path / "alone", DENSE, **small)
    with pytest.raises(InputError, match="built from features alone and does not know its network"):
        add_images(renamed, it.network, tmp_path / "alone")


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


def test_features_that_do_not_belong_together_are_refused(tmp_path, source) -> None:
    it = toy("signed")
    good, head, plus = features(it, source), head_of(it), {"recipe": RECIPES["plus"]}
    matrix, bias = head.matrix, head.bias

    def spoiled(array: np.ndarray, value: float) -> np.ndarray:
        array = array.copy()
        array[4, 1] = value
        return array

    def refuse(says: str, **options) -> None:
        with pytest.raises(InputError, match=says):
            from_features(it, source, tmp_path / "i", **{"recipe": DENSE, **options})

    for name, value, says in (
        ("embeddings", np.nan, "holds a NaN"), ("pooled", np.inf, "holds"),
        ("pooled", 3e38, r"holds 3e\+38, and numbers may go up to 1e\+15"),
    ):  # fmt: skip
        refuse(f"{name}: row 4 {says}", **{name: spoiled(good[name], value)})
    for says, *parts in (
        (r"the head's matrix: row 4 holds 1e\+16, and", spoiled(matrix, 1e16), bias),
        ("is off by", matrix),
        ("do not fit together", matrix[:3], bias),
        ("do not fit together", matrix, bias[:2]),
    ):
        refuse(says, head=AffineHead(*parts))
    says = "what the head makes of the pooled vectors: row 0 holds"
    refuse(says, head=AffineHead(np.full_like(matrix, 1e15), bias), pooled=good["pooled"] + 9)
    refuse("embedding 4 is off by", pooled=spoiled(good["pooled"], 9.0))
    refuse("do not fit together", pooled=good["pooled"][:7])
    refuse(r"embeddings is int64 of shape \[3\]", embeddings=np.arange(3))
    refuse("pooled is float32 of shape", pooled=np.empty((0, 8), np.float32))
    refuse("12 embeddings came with 3 ids", ids=["a", "b", "c"])
    refuse("12 embeddings came with 12 ids and 2 labels", labels=["a", "b"])
    refuse("ids", ids=["same"] * 12)
    refuse(r"grid = \(0, 4\)", grid=(0, 4))
    refuse("all 12 images have one label", labels=["a"] * 12)
    refuse(r"expected means of max\(A, 0\)", **plus, positive_pooled=-good["positive_pooled"])
    refuse("positive_pooled is", **plus, positive_pooled=good["positive_pooled"][:4])
    refuse("m = 50 channels of 8", recipe=Recipe.paper())
    refuse("give both or neither", triplets=np.zeros((12, 1, 2), int))
    good["embeddings"][2] = 0
    refuse("embedding 2 has length 0, so it has no direction", embeddings=good["embeddings"])


def test_negative_pooled_activations_need_their_positive_mean(tmp_path, source) -> None:
    it = toy("signed")
    assert (features(it, source)["pooled"] < 0).any()
    with pytest.raises(RecipeError, match="give positive_pooled, or use method 'gradcam'"):
        from_features(it, source, tmp_path / "i", RECIPES["plus"], positive_pooled=None)
    from_features(it, source, tmp_path / "i", DENSE, positive_pooled=None)
    from_features(toy(), source, tmp_path / "j", RECIPES["plus"], positive_pooled=None)


def test_finished_indexes_are_not_overwritten(tmp_path, source) -> None:
    from_features(toy(), source, tmp_path / "j", DENSE)
    before = everything(tmp_path / "j")
    with pytest.raises(InputError, match="already holds a finished index"):
        from_features(toy(), source, tmp_path / "j", dense(seed=1))
    assert everything(tmp_path / "j") == before
    from_features(toy(), source, tmp_path / "j", dense(seed=1), replace=True)
    assert everything(tmp_path / "j") != before


def test_unwise_choices_are_warned_about_and_lonely_classes_counted(tmp_path, source) -> None:
    with pytest.warns(RecipeWarning, match="'around' is the safe choice") as caught:
        from_features(toy(), source, tmp_path / "i", dense(target="centred"))
    assert caught[0].filename == __file__
    labels = ["alone", *source.labels[1:]]
    assert from_features(toy(), source, tmp_path / "j", DENSE, labels=labels).n_single == 1
    bare = {"ids": None, "labels": None, "positive_pooled": None}
    assert from_features(toy(), source, tmp_path / "k", DENSE, **bare).n_single == 0
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
