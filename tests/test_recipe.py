"""Recipes: what goes together, what is said where it does not, and TOML there and back."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcam.errors import RecipeError
from embedcam.recipe.recipe import Recipe, read_toml

RECIPES = sorted((Path(__file__).parents[1] / "index" / "recipes").glob("*.toml"))
TABLES = {
    "weights": "method target norm sampling triplets hinge margin seed labels positives negatives",
    "encoding": "encoding rank m by dtype concepts",
    "search": "faiss metric",
}


def as_toml(recipe: Recipe) -> str:
    lines = ["recipe_version = 1"]
    for table, names in TABLES.items():
        chosen = [(name, getattr(recipe, name)) for name in names.split()]
        lines += [f"[{table}]"] + [
            f"{'name' if name == 'encoding' else name} = {json.dumps(value)}"
            for name, value in chosen
            if value is not None
        ]
    return "\n".join(lines)


def read(tmp_path, text: str):
    (tmp_path / "r.toml").write_text(text)
    return read_toml(tmp_path / "r.toml")


recipes = st.builds(
    lambda **choices: Recipe(
        **{**choices, **({"triplets": None} if choices["sampling"] == "all" else {})}
    ),
    method=st.just("gradcam"),
    norm=st.sampled_from(["through", "around"]),
    target=st.sampled_from(["margin", "centred"]),
    sampling=st.sampled_from(["auto", "random", "semihard", "hard", "all", "given"]),
    triplets=st.one_of(st.none(), st.integers(1, 10**6)),
    margin=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**63 - 1),
    encoding=st.sampled_from(["low-rank", "top-m", "dense"]),
    rank=st.integers(1, 4096),
    m=st.integers(1, 4096),
    by=st.sampled_from(["signed", "magnitude"]),
    dtype=st.sampled_from(["float16", "float32"]),
    faiss=st.sampled_from(["Flat", "HNSW32", "none"]),
    metric=st.sampled_from(["l2", "ip"]),
    labels=st.sampled_from(["classes", "numbers"]),
    positives=st.floats(0.01, 0.5),
    negatives=st.floats(0.01, 0.5),
)


@given(recipes)
def test_a_recipe_survives_toml_and_plain_values(tmp_path_factory, recipe) -> None:
    found, images, network = read(tmp_path_factory.mktemp("r"), as_toml(recipe))
    assert found == recipe
    assert (images, network) == ({}, {})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert found.digest() == recipe.digest()


def test_the_digest_tells_every_choice_apart() -> None:
    other = Recipe(
        "gradcam++", "centred", "around", "hard", 7, False, 0.3, 1, (), "mean", {"a": 1},
        "dense", 9, 8, "magnitude", "float32", 0, "HNSW8", "ip", "numbers", 0.2, 0.3,
    )  # fmt: skip
    names = [
        entry.name for entry in fields(Recipe) if entry.name not in ("hinge", "layers", "fill")
    ]
    digests = {replace(Recipe(), **{name: getattr(other, name)}).digest() for name in names}
    digests |= {Recipe().digest(), Recipe(hinge=True).digest()}
    # Several layers go with a method of several layers only, a fill with one that masks.
    digests |= {Recipe("polycam", layers=pair).digest() for pair in (("a", "b"), ("a", "c"))}
    digests |= {Recipe("scorecam", fill=fill).digest() for fill in ("mean", "black", "blur")}
    assert len(digests) == len(fields(Recipe)) + 4
    assert Recipe(margin=1).digest() == Recipe(margin=1.0).digest()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_that_come_along_can_be_read(path) -> None:
    paper = Recipe(
        target="margin", sampling="random", triplets=50, encoding="top-m", m=50, by="signed"
    )
    unlabelled = Recipe(target="centred", norm="around")
    expected = {"default": Recipe(), "paper": paper, "unlabelled": unlabelled}
    recipe, *others = read_toml(path)
    assert (recipe, others) == (expected.get(path.stem, recipe), [{}, {}])
    assert expected.keys() <= {p.stem for p in RECIPES}
    assert Recipe.paper(triplets=50) == Recipe.paper() == paper


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"sampling": "all", "triplets": 7}, "leave it out, or use sampling 'random'"),
        ({"sampling": "all", "hinge": True}, "drop the hinge, or use sampling 'random' with it"),
        ({"sampling": "all", "method": "gradcam++"}, "use method 'gradcam' with 'all', or sampli"),
        ({"method": "rise"}, "RISE cannot be put in an index: it works on pixels"),
        ({"method": "Layer-CAM"}, "the nearest method that can is 'gradcam'"),
        ({"target": "centred", "hinge": True}, "drop the hinge, or use the target 'margin'"),
        ({"method": "gradcam+"}, "method = 'gradcam\\+' is unknown; did you mean 'gradcam\\+\\+'"),
        ({"encoding": "lowrank"}, "did you mean 'low-rank'"),
        ({"metric": "cosine"}, "metric = 'cosine' is unknown; known: l2, ip"),
        ({"triplets": 0}, "triplets = 0; give a whole number from 1 to 1,000,000"),
        ({"margin": 0.0}, "margin = 0.0; give a number above 0"),
        ({"seed": 1 << 64}, "give a whole number from 0"),
        ({"faiss": ""}, "faiss is empty; give a factory string"),
        ({"triplets": "50"}, "triplets = '50'; give a whole number"),
        ({"positives": 0.6}, "give numbers above 0 that are at most 1 together"),
        ({"method": None}, "method = None is unknown; known: cam, gradcam"),
        ({"fill": "white"}, "fill = 'white' is unknown; known: mean, black, blur"),
        ({"fill": "blur"}, "Grad-CAM fills nothing in, so fill = 'blur' means nothing; leave it"),
        ({"options": {"layers": "a"}}, "layers is an entry of its own, not one of options"),
        ({"options": {"samples": [5]}}, "such as { samples = 50 }"),
        ({"options": {"sigma": float("nan")}}, "each a number, a text or a truth value"),
        ({"options": {"": 1}}, "give a table of the method's options"),
        ({"options": 5}, "options = 5; give a table"),
    ],
)
def test_what_does_not_go_together_names_what_does(choices, says) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe(**choices)
    with pytest.raises(RecipeError, match="my file: .*" + says):
        Recipe.from_dict(choices, "my file")


def test_choices_that_another_choice_leaves_unused_are_allowed() -> None:
    Recipe(target="centred", sampling="all", method="gradcam++")
    Recipe(sampling="all", encoding="top-m")
    Recipe(hinge=True, sampling="given")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[weights]\nrank = 3", r"\[weights\] has no entry 'rank'; .*known: method, target"),
        ("[encoding]\nencoding = 'dense'", "has no entry 'encoding'; "),
        ("[weight]\nmethod = 'gradcam'", r"unknown table \[weight\]; did you mean 'weights'"),
        ("method = 'gradcam'", r"unknown table \[method\]; .*known: images, network, weights"),
        ("weights = 3", r"weights = 3 should be a table, \[weights\]"),
        ("recipe_version = 2", "recipe_version = 2; this embedcam reads version 1"),
        ("[weights]\nhinge = true\nsampling = 'all'", "drop the hinge"),
        ("[weights", "not a TOML file"),
    ],
)
def test_a_file_with_a_mistake_says_where_and_what(tmp_path, text, says) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml: .*" + says):
        read(tmp_path, text)
    with pytest.raises(RecipeError, match=r"none\.toml: the recipe cannot be read \(No such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a TOML file"):
        read_toml(tmp_path / "b.toml")


def test_a_fill_and_a_methods_own_options_are_kept(tmp_path) -> None:
    text = '[weights]\nmethod = "scorecam"\nfill = "blur"\n'
    text += 'options = { temperature = 0.1, weights = "softmax" }'
    recipe, _, _ = read(tmp_path, text)
    options = {"weights": "softmax", "temperature": 0.1}
    assert recipe == Recipe("scorecam", fill="blur", options=options)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(recipe) != hash(Recipe("scorecam"))


def test_what_is_not_chosen_is_not_written_so_that_older_indexes_keep_their_digest() -> None:
    assert not {"fill", "options"} & Recipe("scorecam").to_dict().keys()
    known = "01bd5e4180e4ec512a65213d613dd74d6a300fbb5bc1ee92e8e2d1b039712c14"
    assert Recipe(target="margin").digest() == known


def test_the_target_is_the_distinctive_where_nothing_else_is_asked_for() -> None:
    for plain in ({}, {"method": "scorecam"}, {"norm": "around"}, {"sampling": "all"}):
        assert Recipe(**plain).resolved_target == "distinctive"
        assert Recipe(**plain).resolved_sampling == "all"
    for other in ({"triplets": 9}, {"hinge": True}, {"method": "gradcam++"}, {"sampling": "given"}):
        assert Recipe(**other).resolved_target == "margin"
    assert Recipe.paper().resolved_target == "margin"
    assert Recipe(target="centred", norm="around").resolved_target == "centred"
    assert Recipe(norm="around", encoding="dense").resolved_sampling == "all"
    for changed in ({"method": "gradcam++"}, {"hinge": True}, {"triplets": 50}):
        assert Recipe(**changed).resolved_sampling == "random"
    for name in ("random", "semihard", "hard", "given", "all"):
        assert Recipe(sampling=name).resolved_sampling == name


def test_images_and_network_pass_through_and_unknown_entries_do_not(tmp_path) -> None:
    text = "[images]\npath = 'photos'\n[network]\nnetwork = 'torchvision:resnet50'\nsize = 224"
    network = {"network": "torchvision:resnet50", "size": 224}
    assert read(tmp_path, text) == (Recipe(), {"path": "photos"}, network)
    with pytest.raises(RecipeError, match="stored has an unknown entry 'tripletts'; did you mea"):
        Recipe.from_dict({"tripletts": 3}, "stored")
