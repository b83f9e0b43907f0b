"""Other ways of drawing, named by the user: methods on the query itself, and other recipes."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..images import ImageSource, Item
from ..index import Index
from ..methods import MethodWarning, cam_for
from ..offline import build_index
from ..ops import resize, signed_cam
from ..recipe.recipe import Recipe, read_toml, shipped_recipe
from ..recipe.registry import LayersMethod, Method, PositionMethod, WeightMethod, find_method
from ..targets import ClassProxy, Similarity
from .controls import CONTROLS
from .maps import Mapper, Maps, Questions, Way
from .settings import METHOD
from .work import Reader

Recipes = Mapping[str, Recipe] | Sequence[str | Path]
"""By name; or TOML files, and names of recipes that came along."""


def named_methods(names: Iterable[str]) -> dict[str, Method]:
    """Look methods up, by the names of their columns.

    Raises:
        InputError: unknown, twice, or one whose branch is trained with the network.
    """
    if isinstance(names, str):
        raise InputError(f"methods = {names!r}; give a list of names such as ['gradcam']")
    found = [find_method(name) for name in names]
    for one in found:
        if one.trained:
            raise InputError(
                f"{one.title} draws with a branch that is trained with the network, which only "
                "embedcam.cam_for is given; leave it out of methods"
            )
    return {one.title: one for one in found}


def named_recipes(recipes: Recipes) -> dict[str, Recipe]:
    """Read recipes, by the names of their columns: those of their files, without the ending.

    Raises:
        InputError: no recipe, or two of one name.
    """
    if isinstance(recipes, str | Path):
        raise InputError(f"recipes = {str(recipes)!r}; give a list of files such as ['paper.toml']")
    if isinstance(recipes, Mapping):
        found = dict(recipes)
        for name, one in found.items():
            if not isinstance(name, str) or not isinstance(one, Recipe):
                raise InputError(
                    f"recipes: {name!r} is a {type(one).__name__}; give a Recipe by its name"
                )
    else:
        files = [shipped_recipe(str(name)) for name in recipes]
        found = {file.stem: read_toml(file)[0] for file in files}
        if len(found) < len(files):
            raise InputError("two recipes have one name; rename a file, for names head the columns")
    for name in found:
        if name in (METHOD, *CONTROLS):
            raise InputError(f"the recipe {name!r} has the name of a column; give it another")
    return found


@contextmanager
def rivals_of(
    reader: Reader, methods: Mapping[str, Method], recipes: Mapping[str, Recipe]
) -> Iterator[dict[str, Way]]:
    """Yield what draws by each method and each recipe; indexes of recipes are there meanwhile.

    Raises:
        InputError: a method that this index has too few layers for, a recipe whose index cannot be
            built, or one that has a method's name.
    """
    mapper = reader.mapper
    for one in methods.values():
        if isinstance(one, LayersMethod) and len(mapper.layers) < 2:
            raise InputError(
                f"{one.title} draws with several layers and this index has one; leave it out of "
                "methods, or give a recipe that names layers"
            )
    if twice := sorted(set(methods) & set(recipes)):
        raise InputError(f"a method and a recipe are both called {twice[0]!r}; rename the recipe")
    ways = {name: _by_method(reader, one) for name, one in methods.items()}
    with ExitStack() as stack:
        source = _gallery_pictures(mapper, reader.source.max_pixels) if recipes else None
        for name, recipe in recipes.items():
            assert source is not None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "index"
            try:
                build_index(
                    source, mapper.network, folder, recipe, workers=reader.workers,
                    own_maps=False, trust=False, progress=reader.progress,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"the recipe {name!r} builds no index: {error}") from error
            index = stack.enter_context(Index.open(folder))
            other = Mapper(index, mapper.network, reader.settings, mapper.clock)
            ways[name] = _by_recipe(mapper, other)
        yield ways


def _by_method(reader: Reader, method: Method) -> Way:
    """Draw on the queries themselves: of how similar they are to what they are explained by."""
    mapper, settings = reader.mapper, reader.settings
    options: dict[str, Any] = {}
    if isinstance(method, LayersMethod):
        options["layers"] = mapper.layers

    def draw(asked: Questions) -> Maps:
        seen = asked.seen
        proxies = [ClassProxy(mapper.index.embeddings(rows)).proxy for rows in asked.near]
        with mapper.clock("methods"), warnings.catch_warnings():
            warnings.simplefilter("ignore", MethodWarning)  # the report says it
            made = cam_for(
                mapper.network, seen.inputs, Similarity(np.stack(proxies)), method.name,
                seed=settings.seed % (1 << 63), progress=False, **options,
            )  # fmt: skip
        signed = made.cam
        if _by_weights(method) and made.weights is not None:
            signed = resize(signed_cam(made.weights, seen.activations[0]), seen.size)
        return Maps(np.maximum(made.cam, 0), signed)

    return draw


def _by_weights(method: Method) -> bool:
    """Whether the method's map is what its weights draw, so that it has a sign."""
    if isinstance(method, PositionMethod):
        return True
    return isinstance(method, WeightMethod) and not method.own_map


def notes_of(methods: Mapping[str, Method]) -> Iterator[str]:
    """What a reader must know of methods, a sentence each."""
    for title, one in methods.items():
        if not one.targeted:
            yield f"{title} ignores what is asked: it shows what stands out, not what matched"
        if not _by_weights(one):
            yield f"{title} draws more than its weights do, so its map is scored as drawn"


def _by_recipe(mapper: Mapper, other: Mapper) -> Way:
    """Draw with the weights that another index holds for the same images."""

    def draw(asked: Questions) -> Maps:
        seen = asked.seen
        if other.layers != mapper.layers:
            seen = replace(other.see(seen.inputs), size=seen.size)
        ids = [mapper.index.ids[rows.tolist()] for rows in asked.near]
        return Maps.of(other.explained(seen, ids))

    return draw


def _gallery_pictures(mapper: Mapper, max_pixels: int) -> ImageSource:
    """The pictures of the index, every one as it was indexed.

    Raises:
        InputError: one that is not to be found, or was replaced.
    """
    index, explainer = mapper.index, mapper.explainer
    if index.manifest.is_compressed:
        raise InputError(
            "recipes are computed for the pictures of the index, and prototypes have none; "
            "evaluate the index that they were made from"
        )
    selected = index.select(index.live_positions())
    items, lacking = [], []
    for name, label in zip(selected.ids, selected.labels, strict=True):
        file = explainer.picture_file(name)
        if file is None or not file.is_file() or explainer.file_state(name) == "changed":
            lacking.append(name)
        else:
            items.append(Item(name, str(file.absolute()), label))
    if lacking:
        raise InputError(
            f"recipes are computed for the pictures of the index, and {len(lacking)} of "
            f"{len(selected)} are not to be found as they were, such as {lacking[0]}; say where "
            "they lie now (--indexed, indexed=), or leave recipes out"
        )
    numbers = index.manifest.near_share is not None
    return ImageSource(items, max_pixels=max_pixels, numbers=numbers)
