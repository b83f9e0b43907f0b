"""The choices that make an index what it is, checked together; read from and written to TOML."""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from .._checks import nearest_of, one_of
from .._files import refuse_device
from .._options import check, from_tables, setting
from ..errors import EmbedcamWarning, InputError, RecipeError, short
from .registry import (
    FILLS,
    METHODS,
    LayersMethod,
    Method,
    PositionMethod,
    bare_name,
    storable_methods,
    why_not_storable,
)

if TYPE_CHECKING:
    from ..index import Manifest

TARGETS = ("margin", "centred", "discriminant", "distinctive")
WHITENED = ("discriminant", "distinctive")
"""Targets that measure the margin in whitened embeddings, over every triplet."""
NORMS = ("through", "around")
SAMPLINGS = ("random", "semihard", "hard", "all")
ENCODINGS = ("low-rank", "top-m", "dense")
DTYPES = ("float16", "float32")
METRICS = ("l2", "ip")
LABELS = ("classes", "numbers")
N_TRIPLETS, MOST_TRIPLETS = 50, 1_000_000
"""S where none is asked for (Chen et al., WACV 2020)."""


class RecipeWarning(EmbedcamWarning):
    """Choices that are allowed and rarely wise."""


def _method(name: str, value: Any) -> str:
    bare = bare_name(value) if isinstance(value, str) else ""
    if bare in METHODS and not METHODS[bare].storable:
        raise InputError(f"{name} = {bare!r}: {why_not_storable(METHODS[bare])}")
    return bare if bare in METHODS else one_of(name, value, storable_methods())


def _pairs(name: str, options: Any) -> tuple[tuple[str, Any], ...]:
    """Return options as pairs in the order of their names: one set of choices is one recipe."""
    try:
        pairs = dict(options)
    except (TypeError, ValueError):
        pairs = {"": None}
    for key, value in pairs.items():
        plain = type(value) in (bool, int, str, NoneType)
        plain |= type(value) is float and math.isfinite(value)
        if not isinstance(key, str) or not key or not plain:
            raise InputError(
                f"{name} = {short(options)}; give a table of the method's options, each a number, "
                "a text or a truth value, such as { samples = 50 }"
            )
    return tuple(sorted(pairs.items()))


def _pair(text: str) -> tuple[str, Any]:
    """Return NAME=VALUE, the value a number, true, false, none or words."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"{text!r} is not NAME=VALUE, such as samples=50")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _count_or_file(text: str) -> int | str:
    try:
        return text if text.endswith(".npy") else int(text)
    except ValueError:
        raise InputError(
            f"{short(text)} is no number and no .npy file of shape [N S 2]; for all there are, use "
            "--sampling all"
        ) from None


_weights, _stored = partial(setting, table="weights"), partial(setting, table="encoding")


@dataclass(frozen=True)
class Recipe:
    """What is computed and how it is stored. The defaults are what measured best.

    Parameters
    ----------
    method : str
        Any of `registry.storable_methods()`, which yield channel weights, or, for pictures that
        are all aligned, weights by position: "hirescam".
    target : str
        "margin" (triplets), "centred" (needs neither labels nor sampling), "distinctive" (what
        sets an image's kind, and a little the image itself, apart from the rest), "discriminant"
        (the same of a label alone, in more strongly whitened embeddings), or "auto": "distinctive"
        where the mean over every triplet has a closed form and nothing else is asked for, else
        "margin".
    norm : str
        The gradient "through" the L2 norm or "around" it.
    sampling : str
        "random", "semihard", "hard", "all" (the exact mean over every triplet, in closed form),
        "given", or "auto": "all" where it has a closed form (no hinge, and a method that sees the
        mean of the triplets) and no number of triplets is asked for, else "random".
    triplets : int, optional
        S, triplets drawn for each image; None draws 50 where triplets are drawn.
    hinge : bool
        Leave out triplets that the margin already satisfies.
    margin : float
        Of the hinge and of semihard sampling.
    seed : int
        Of every draw.
    layers : tuple of str
        The layers that a method of several layers draws with, the deepest one the network's own.
    fill : str
        What a masking method shows in place of masked pixels, and its baseline: "mean", "black"
        or "blur".
    options : mapping
        The method's own, such as {"samples": 50}; kept as pairs in order.
    encoding : str
        "low-rank", "top-m" (the paper's) or "dense".
    rank, m : int
        R of low-rank; M, channels kept by top-m.
    by : str
        Top-m by "signed" value (the paper) or by "magnitude".
    dtype : str
        Of stored weights, "float16" or "float32".
    faiss : str
        FAISS factory string; "none" leaves searching to others.
    metric : str
        "l2" (squared) or "ip" (inner product).
    labels : str
        "classes", or "numbers": an image's positives are the images nearest to it in value, its
        negatives those farthest from it. A source whose labels are numbers makes it "numbers".
    positives, negatives : float
        Of labels that are numbers, the shares of the labelled images, above 0 and at most 1
        together.

    Raises
    ------
    RecipeError
        Choices that mean nothing, alone or together.
    """

    method: str = _weights(
        "gradcam",
        "NAME",
        "gradcam (default), gradcam++, scorecam, ...: any that yields channel weights",
        check=_method,
    )
    target: str = _weights(
        "auto",
        "NAME",
        "auto (default: distinctive where it has a closed form, else margin), margin, "
        "distinctive, discriminant or centred",
        choices=("auto", *TARGETS),
    )
    norm: str = _weights("through", "WAY", "through (default) or around the L2 norm", choices=NORMS)
    sampling: str = _weights(
        "auto",
        "NAME",
        "auto (default), all, random, semihard or hard",
        choices=("auto", *SAMPLINGS, "given"),
    )
    triplets: int | None = _weights(
        None,
        "S|FILE",
        "S for each image (default 50), or a .npy file [N S 2]",
        kind=int,
        least=1,
        most=MOST_TRIPLETS,
        read=_count_or_file,
    )
    hinge: bool = _weights(False, help="leave out triplets that the margin satisfies")
    margin: float = _weights(0.2, "X", "of hinge and semihard (default 0.2)", above=0)
    seed: int = _weights(0, "N", "of all sampling (default 0)", least=0, most=(1 << 64) - 1)
    layers: tuple[str, ...] = _weights(
        (),
        "NAMES",
        "of a method of several layers, such as layer2,layer3,layer4; the last is the one "
        "the network explains, named as a build prints it",
    )
    fill: str = _weights(
        "mean",
        "WHAT",
        "what a masking method puts in place of masked pixels: mean (default), black or blur",
        choices=FILLS,
    )
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = _weights(
        (),
        "NAME=VALUE",
        "an option of the method, such as samples=50; may be repeated",
        flag="option",
        read=_pair,
        repeated=True,
        check=_pairs,
    )
    encoding: str = _stored(
        "low-rank", "NAME", "low-rank (default), top-m or dense", choices=ENCODINGS, entry="name"
    )
    rank: int = _stored(128, "R", "R of low-rank (default 128)", least=1)
    m: int = _stored(50, "M", "M of top-m (default 50)", least=1, flag="top_m")
    by: str = _stored(
        "signed", "WHAT", "top-m by signed (default) or magnitude", choices=("signed", "magnitude")
    )
    dtype: str = _stored("float16", "NAME", "float16 (default) or float32", choices=DTYPES)
    faiss: str = setting(
        "Flat", "FACTORY", "FAISS factory string (default Flat), or none", table="search"
    )
    metric: str = setting("l2", "NAME", "l2 (default) or ip", choices=METRICS, table="search")
    labels: str = _weights("classes", choices=LABELS)
    positives: float = _weights(0.1, above=0, most=1)
    negatives: float = _weights(0.5, above=0, most=1)

    def __post_init__(self) -> None:
        check(self, RecipeError)
        for wrong, sentence in self._conflicts():
            if wrong:
                raise RecipeError(sentence)

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yield what may be wrong with choices together, and what to say of it."""
        entry, layers = self.entry, list(self.layers)
        several = isinstance(entry, LayersMethod)
        whitened, drawn = self.target in WHITENED, self.triplets is not None
        every = self.target != "centred" and self.sampling == "all"
        yield (
            self.positives + self.negatives > 1,
            f"positives = {self.positives} and negatives = {self.negatives} are shares of the "
            "images; give numbers above 0 that are at most 1 together, such as 0.1 and 0.5",
        )
        yield not self.faiss, "faiss is empty; give a factory string such as 'Flat', or 'none'"
        yield (
            several and len(set(layers)) < max(2, len(layers)),
            f"{entry.title} draws with several layers and layers = {layers!r}; name at least two, "
            "each once, such as ['layer2', 'layer3', 'layer4']",
        )
        yield (
            bool(layers) and not several,
            f"{entry.title} works on the network's own layer, so layers = {layers!r} means "
            "nothing; leave it out, or use method 'polycam'",
        )
        yield (
            self.fill != "mean" and not entry.filled,
            f"{entry.title} fills nothing in, so fill = {self.fill!r} means nothing; leave it "
            "out, or use a method that masks, such as 'scorecam'",
        )
        yield "layers" in self.method_options, "layers is an entry of its own, not one of options"
        yield (
            isinstance(entry, PositionMethod) and self.encoding != "low-rank",
            f"{entry.title} has a weight for every channel and position, which are kept as "
            f"principal components, and encoding = {self.encoding!r}; use 'low-rank'",
        )
        yield (
            self.norm == "around" and (entry.scored or not entry.targeted),
            f"norm 'around' changes the gradient, and {entry.title} never asks for one; leave it "
            "out, or use a method of the gradient, such as 'gradcam'",
        )
        yield (
            self.target == "centred" and self.hinge,
            "a hinge needs triplets, and the target 'centred' has none; drop the hinge, or use "
            "the target 'margin'",
        )
        yield (
            whitened and (self.hinge or drawn),
            f"the target {self.target!r} takes every triplet in closed form, so a hinge or a "
            "number of triplets means nothing; leave them out, or use the target 'margin'",
        )
        yield (
            whitened and self.sampling not in ("auto", "all"),
            f"the target {self.target!r} takes every triplet, so sampling = {self.sampling!r} "
            "means nothing; leave it out, or use the target 'margin'",
        )
        yield (
            every and drawn,
            f"sampling 'all' takes every triplet, so triplets = {self.triplets} means nothing; "
            "leave it out, or use sampling 'random'",
        )
        yield (
            every and self.hinge,
            "the exact mean over 'all' triplets cannot leave out satisfied ones; drop the hinge, "
            "or use sampling 'random' with it",
        )
        yield (
            every and self.per_triplet,
            f"{entry.title} is not linear in the triplet, so 'all' has no closed form for it; use "
            f"method 'gradcam' with 'all', or sampling 'random' with {self.method}",
        )

    @property
    def method_options(self) -> dict[str, Any]:
        """Return the method's own options by name."""
        return dict(self.options)

    @property
    def resolved_sampling(self) -> str:
        """Return the sampling, with "auto" decided."""
        if self.resolved_target in WHITENED:
            return "all"
        if self.sampling != "auto":
            return self.sampling
        closed_form = not self.per_triplet and not self.hinge
        return "all" if closed_form and self.triplets is None else "random"

    @property
    def resolved_target(self) -> str:
        """Return the target, with "auto" decided."""
        if self.target != "auto":
            return self.target
        drawn = self.triplets is not None or self.sampling not in ("auto", "all")
        return "margin" if drawn or self.hinge or self.per_triplet else "distinctive"

    @property
    def near(self) -> float | None:
        """Return the share of positives in value; None where labels are classes."""
        return self.positives if self.labels == "numbers" else None

    @property
    def head_norm(self) -> str:
        """Return the norm that is left for the head: a whitened target has taken its own."""
        return "around" if self.resolved_target in WHITENED else self.norm

    @property
    def resolved(self) -> "Recipe":
        """Return the recipe with the target "auto" decided: what an index keeps."""
        return replace(self, target=self.resolved_target)

    @property
    def entry(self) -> Method:
        """Return the method's entry in the registry."""
        return METHODS[self.method]

    @property
    def per_triplet(self) -> bool:
        """Return whether the method is not linear in the target: each triplet is seen apart."""
        return bool(getattr(self.entry, "per_triplet", False))

    @property
    def n_triplets(self) -> int:
        """Return S, the triplets drawn for each image."""
        return N_TRIPLETS if self.triplets is None else self.triplets

    @classmethod
    def paper(cls, **changes: Any) -> "Recipe":
        """Return the paper's own setting: top 50 channels by value, gradient through the norm."""
        drawn = cls(target="margin", sampling="random", triplets=N_TRIPLETS, encoding="top-m")
        return replace(drawn, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """Return a recipe of plain values; unknown names and wrong types are errors."""
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                hint = nearest_of(name, known)
                raise RecipeError(f"{where} has an unknown entry {name!r}; {hint}")
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    @classmethod
    def of_index(cls, manifest: "Manifest") -> "Recipe":
        """Return the recipe an index was built by; an older one left its target to the manifest."""
        recipe = cls.from_dict(manifest.recipe, "the index's recipe")
        return recipe if recipe.target != "auto" else replace(recipe, target=manifest.target)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a manifest; options as a table, where there are any."""
        values = asdict(self)
        values["options"] = self.method_options
        # Left out where they say nothing, so that an older index keeps its digest.
        classes = ("labels", "positives", "negatives") if self.labels == "classes" else ()
        for name in ("fill", "options", *classes):
            if values[name] == getattr(Recipe, name) or not values[name]:
                del values[name]
        return values

    def _repr_html_(self) -> str:
        from ..render import Table, drawn_blocks

        decided = {"target": self.resolved_target, "sampling": self.resolved_sampling}
        rows = [
            (name, f"auto: {decided[name]}" if value == "auto" else value)
            for name, value in self.to_dict().items()
            if value not in (None, ())
        ]
        return "\n".join(drawn_blocks([Table(("recipe", ""), rows)]))

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON of the choices."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def shipped_recipe(name: str) -> Path:
    """Return the file of a recipe that came along ("default", "paper", ...), or the one named."""
    if Path(name).suffix or Path(name).exists():
        return Path(name)
    # Inside a wheel they lie in the package, in the sources beside the format of the index.
    package = Path(__file__).parents[1]
    folders = (package.parent / "index" / "recipes", package / "recipes")
    files = {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}
    if name not in files:
        raise RecipeError(
            f"{name}: there is no such recipe; {nearest_of(name, files)}; or give a TOML file"
        )
    return files[name]


def read_toml(path: str | Path) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """Return a file's recipe, and its tables `[images]` and `[network]` as they stand.

    Raises RecipeError: unreadable, not TOML, or with entries that mean nothing.
    """
    path = Path(path)
    refuse_device(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not a TOML file ({error})") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: tables or lists lie in one another too deep") from error
    version = tables.pop("recipe_version", 1)
    if version != 1:
        raise RecipeError(
            f"{path}: recipe_version = {short(version)}; this embedcam reads version 1"
        )
    choices = from_tables(Recipe, tables, str(path), RecipeError, others=("images", "network"))
    recipe = Recipe.from_dict(choices, str(path))
    return recipe, tables.get("images", {}), tables.get("network", {})
