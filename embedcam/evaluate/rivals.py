"""What maps are held against: baselines, and methods and recipes that the user names.

A baseline draws without knowing why the results came back:

    mean activation     every channel counts the same: what is salient, whatever was asked
    random weights      Gaussian, other ones for each image
    wrong images        the weights that the index stores for images of other labels
    shuffled index      the index's weights permuted among all of its images
    shuffled network    the same steps with every parameter of the network shuffled

A method that does as well without the network's parameters, or with another image's weights,
explains neither (Adebayo et al., NeurIPS 2018).
"""

import copy
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import EmbedcamError, InputError, ran_out
from ..explain.explainer import Explainer
from ..images import ImageSource, Item, is_there, located
from ..index import Index
from ..methods import MethodWarning, cam_for
from ..network import EmbeddingNetwork
from ..offline import build_index
from ..ops import resize, signed_cam
from ..recipe.recipe import Recipe, read_toml, shipped_recipe
from ..recipe.registry import LayersMethod, Method, PositionMethod, WeightMethod, find_method
from ..targets import ClassProxy, Similarity
from .gallery import Gallery, generator
from .maps import Draw, Mapper, Question, Questions, Seen, maps_of
from .measures import MEAN, TRANSFERRED, Maps

if TYPE_CHECKING:
    from .work import Work

Recipes = Mapping[str, Recipe] | Sequence[str | Path]
"""By name; or TOML files, and names of recipes that came along."""
RANDOM, WRONG, SHUFFLED_INDEX = "random weights", "wrong images", "shuffled index"
SHUFFLED = "shuffled network"
BASELINES = (MEAN, RANDOM, WRONG, SHUFFLED_INDEX, SHUFFLED)
STAGES = 5


def baseline_maps(mapper: Mapper, gallery: Gallery, seed: int, asked: Questions) -> dict[str, Maps]:
    """Draw each question by every baseline of this network; wrong images only where others are."""
    weights = [random_weights(mapper.channels, seed, one.name) for one in asked.each]
    noise = [np.concatenate(layer) for layer in zip(*weights, strict=True)]
    maps = {MEAN: mean_activation(mapper, asked.seen), RANDOM: mapper.draw(asked.seen, noise)}
    wrong = [wrong_rows(gallery, one, seed) for one in asked.each]
    if all(len(rows) for rows in wrong):
        maps[WRONG] = mapper.maps(asked.seen, wrong)
    moved = [permuted_rows(gallery, one.near, one.left_out) for one in asked.each]
    return maps | {SHUFFLED_INDEX: mapper.maps(asked.seen, moved)}


def mean_activation(mapper: Mapper, seen: Seen) -> Maps:
    """Draw what all channels draw together."""
    ones = [np.ones((len(seen.embeddings), k), np.float32) for k in mapper.channels]
    return mapper.draw(seen, ones)


def random_weights(channels: Sequence[int], seed: int, name: str) -> list[np.ndarray]:
    """Return Gaussian weights `[1 K]` of each layer; they hang on the seed and the image's name."""
    numbers = generator(seed, "weights", name)
    return [numbers.standard_normal((1, k)).astype(np.float32) for k in channels]


def wrong_rows(gallery: Gallery, asked: Question, seed: int) -> np.ndarray:
    """Return random rows of other labels than the query's, else no neighbors; `[0]` without any."""
    near, left_out, label, name = asked
    free = ~np.isin(gallery.positions, [*near.tolist(), *left_out])
    other = free & (gallery.codes != gallery.code(label)) if label is not None else free
    rows = gallery.positions[other if other.any() else free]
    return generator(seed, "wrong", name).choice(rows, min(len(near), len(rows)), replace=False)


def permuted_rows(gallery: Gallery, near: np.ndarray, left_out: Sequence[int]) -> np.ndarray:
    """Return the rows after the neighbors in one cycle through all images; never the query's."""
    moved: np.ndarray = gallery.cycle[near]
    for _ in left_out:
        moved = np.where(np.isin(moved, left_out), gallery.cycle[moved], moved)
    return moved


class ShuffledNetwork:
    """A copy of a network, each parameter's numbers put in another order, from the head down.

    Batch norms are measured anew on `images [n C H W]`: with the old statistics a deep network
    computes nearly the same for every image. `stages`: how many modules are shuffled together.
    """

    def __init__(self, network: EmbeddingNetwork, seed: int, images: np.ndarray) -> None:
        if not network.hooked:
            raise EmbedcamError("the network was given as a trunk and a head, which are not copied")
        try:
            module = copy.deepcopy(network.module)
        except Exception as error:
            if ran_out(error):
                raise
            raise EmbedcamError(f"its module cannot be copied ({error})") from error
        layout, grid, prefix = network.layout_options
        self.network = EmbeddingNetwork(
            module, network.layer, normalize=network.normalize, output=network.output,
            layout=layout, grid=grid, prefix_tokens=prefix, preprocess=network.preprocess,
            autocast=network.autocast, channels_last=network.channels_last,
        )  # fmt: skip
        # From the output down, in the order in which modules were registered.
        groups = (
            [one for one in part.parameters(recurse=False) if one.numel() > 1]
            for part in module.modules()
        )
        self._groups = [group for group in groups if group][::-1]
        self.count = count = len(self._groups)
        if not count:
            raise EmbedcamError("it has no parameters")
        self.stages = sorted(
            {1, *(max(1, round(count * n / STAGES)) for n in range(1, STAGES + 1))}
        )
        self._kept = [[one.detach().clone() for one in group] for group in self._groups]
        order = torch.Generator().manual_seed(seed % (1 << 63))
        self._other = [[_shuffled(one, order) for one in group] for group in self._kept]
        self._images = torch.from_numpy(images).to(network.device, network.dtype)
        parts = (part for part in module.modules() if isinstance(part, _BatchNorm))
        self._norms = [part for part in parts if part.running_mean is not None]
        buffers = (one for norm in self._norms for one in (norm.running_mean, norm.running_var))
        self._buffers = [one for one in buffers if one is not None]
        self._statistics = {0: [one.clone() for one in self._buffers]}

    def shuffle(self, modules: int) -> None:
        """Shuffle the first modules from the output, 0 to `count`; others are as they were."""
        with torch.no_grad():
            values = self._other[:modules] + self._kept[modules:]
            for group, some in zip(self._groups, values, strict=True):
                for parameter, value in zip(group, some, strict=True):
                    parameter.copy_(value)
            if modules not in self._statistics:
                self._statistics[modules] = self._measure_statistics()
            for buffer, value in zip(self._buffers, self._statistics[modules], strict=True):
                buffer.copy_(value)

    def see(self, mapper: Mapper, inputs: np.ndarray) -> Seen | None:
        """Run inputs as it is shuffled now; None where nothing finite comes out."""
        try:
            return mapper.see(inputs, self.network)
        except EmbedcamError:
            return None

    def _measure_statistics(self) -> list[Tensor]:
        if not self._norms or len(self._images) < 2:
            return self._statistics[0]
        momenta = [norm.momentum for norm in self._norms]
        try:
            for norm in self._norms:
                norm.train().momentum = 1.0
            self.network.module(self._images)
        except (RuntimeError, ValueError) as error:
            if ran_out(error):
                raise
            return self._statistics[0]
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.eval().momentum = momentum
        return [one.clone() for one in self._buffers]


def _shuffled(values: Tensor, order: torch.Generator) -> Tensor:
    places = torch.randperm(values.numel(), generator=order)
    return values.flatten()[places.to(values.device)].reshape(values.shape)


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
    work: "Work", methods: Mapping[str, Method], recipes: Mapping[str, Recipe]
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


def _by_method(work: "Work", method: Method) -> Draw:
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


def _indexed_pictures(work: "Work") -> ImageSource:
    index, explainer = work.mapper.index, work.mapper.explainer
    index.refuse_prototypes("evaluate the index that they were made from")
    selected = index.select(index.live_positions())
    items, lacking = [], []
    for name, label in zip(selected.ids, selected.labels, strict=True):
        place = explainer.picture_place(name)
        if place is None or not is_there(place) or explainer.file_state(name) == "changed":
            lacking.append(name)
        else:
            items.append(Item(name, located(Path.cwd(), place), label))
    if lacking:
        raise InputError(
            f"recipes are computed for the pictures of the index, and {len(lacking)} of "
            f"{len(selected)} are not to be found as they were, such as {lacking[0]}; say where "
            "they lie now (--indexed, indexed=), or leave recipes out"
        )
    return ImageSource(items, max_pixels=work.source.max_pixels, numbers=work.gallery.numbers)
