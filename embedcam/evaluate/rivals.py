"""Other methods that maps are held against, named by the user: on the query, and by recipes."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..explain.explainer import Explainer
from ..images import ImageSource, Item
from ..index import Index
from ..methods import MethodWarning, cam_for
from ..offline import build_index
from ..ops import resize, signed_cam
from ..recipe.recipe import Recipe, read_toml, shipped_recipe
from ..recipe.registry import LayersMethod, Method, PositionMethod, WeightMethod, find_method
from ..targets import ClassProxy, Similarity
from .baselines import BASELINES
from .maps import Draw, Mapper, Maps, Questions, maps_of
from .measures import TRANSFERRED
from .work import Work

Recipes = Mapping[str, Recipe] | Sequence[str | Path]
"""By name; or TOML files, and names of recipes that came along."""


def named_methods(names: Iterable[str]) -> dict[str, Method]:
    """Look methods up, by the names of their columns; refuse those trained with the network."""
    if isinstance(names, str):
        raise InputError(f"methods = {names!r}; give a list of names such as ['gradcam']")
    methods = {one.title: one for one in map(find_method, names)}
    for title, one in methods.items():
        if one.trained:
            raise InputError(
                f"{title} draws with a branch that is trained with the network; leave it out of "
                "methods"
            )
    return methods


def named_recipes(recipes: Recipes) -> dict[str, Recipe]:
    """Read recipes, by the names of their columns: those of their files, without the ending."""
    if isinstance(recipes, str | Path):
        raise InputError(f"recipes = {str(recipes)!r}; give a list of files such as ['paper.toml']")
    if isinstance(recipes, Mapping):
        by_name = dict(recipes)
    else:
        files = [shipped_recipe(str(name)) for name in recipes]
        by_name = {file.stem: read_toml(file)[0] for file in files}
        if len(by_name) < len(files):
            raise InputError("two recipes have one name; rename a file, for names head the columns")
    for name, one in by_name.items():
        if not isinstance(name, str) or not isinstance(one, Recipe):
            kind = type(one).__name__
            raise InputError(f"recipes: {name!r} is a {kind}; give a Recipe by its name")
        if name in (TRANSFERRED, *BASELINES):
            raise InputError(f"the recipe {name!r} has the name of a column; give it another")
    return by_name


@contextmanager
def rivals_of(
    work: Work, methods: Mapping[str, Method], recipes: Mapping[str, Recipe]
) -> Iterator[dict[str, Draw]]:
    """Yield what draws by each method and each recipe; indexes of recipes are there meanwhile."""
    mapper = work.mapper
    for title, one in methods.items():
        if isinstance(one, LayersMethod) and len(mapper.layers) < 2:
            raise InputError(
                f"{title} draws with several layers and this index has one; leave it out of "
                "methods, or give a recipe that names layers"
            )
        if title in recipes:
            raise InputError(f"a method and a recipe are both called {title!r}; rename the recipe")
    rivals = {title: _by_method(work, one) for title, one in methods.items()}
    with ExitStack() as stack:
        source = _indexed_pictures(work) if recipes else ImageSource([])
        for name, recipe in recipes.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "index"
            try:
                build_index(
                    source, mapper.network, folder, recipe, workers=work.workers,
                    own_maps=False, trust=False, progress=work.progress,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"the recipe {name!r} builds no index: {error}") from error
            index = stack.enter_context(Index.open(folder))
            other = Explainer(index, mapper.network, transfer=work.settings.transfer)
            rivals[name] = _by_recipe(mapper, Mapper(other, mapper.network, mapper.clock))
        yield rivals


def _by_method(work: Work, method: Method) -> Draw:
    mapper = work.mapper
    cam = partial(cam_for, layers=mapper.layers) if isinstance(method, LayersMethod) else cam_for

    def draw(asked: Questions) -> Maps:
        seen = asked.seen
        proxies = [ClassProxy(mapper.index.embeddings(rows)).proxy for rows in asked.near]
        with mapper.clock("methods"), warnings.catch_warnings():
            warnings.simplefilter("ignore", MethodWarning)  # the report says it
            result = cam(
                mapper.network, seen.inputs, Similarity(np.stack(proxies)), method.name,
                seed=work.settings.seed % (1 << 63), progress=False,
            )  # fmt: skip
        signed = result.cam
        if _by_weights(method) and result.weights is not None:
            signed = resize(signed_cam(result.weights, seen.activations[0]), seen.size)
        return Maps(np.maximum(result.cam, 0), signed)

    return draw


def _by_weights(method: Method) -> bool:
    weights = isinstance(method, WeightMethod) and not method.own_map
    return weights or isinstance(method, PositionMethod)


def notes_of(methods: Mapping[str, Method]) -> Iterator[str]:
    """Yield what a reader must know of methods, a sentence each."""
    for title, one in methods.items():
        if not one.targeted:
            yield f"{title} ignores what is asked: it shows what stands out, not what matched"
        if not _by_weights(one):
            yield f"{title} draws more than its weights do, so its map is scored as drawn"


def _by_recipe(mapper: Mapper, other: Mapper) -> Draw:

    def draw(asked: Questions) -> Maps:
        seen = asked.seen
        if other.layers != mapper.layers:
            seen = replace(other.see(seen.inputs), size=seen.size)
        ids = [mapper.index.ids[rows.tolist()] for rows in asked.near]
        return maps_of(other.explained(seen, ids))

    return draw


def _indexed_pictures(work: Work) -> ImageSource:
    index, explainer = work.mapper.index, work.mapper.explainer
    index.refuse_prototypes("evaluate the index that they were made from")
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
    return ImageSource(items, max_pixels=work.source.max_pixels, numbers=work.gallery.numbers)
