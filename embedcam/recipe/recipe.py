"""The choices that make an index what it is, checked together; read from and written to TOML."""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import refuse_device
from ..errors import EmbedcamWarning, RecipeError, short
from ..index.encoding import DTYPES
from ..targets import NORMS, TARGETS, WHITENED
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

N_TRIPLETS, MOST_TRIPLETS = 50, 1_000_000
"""S where none is asked for (Chen et al., WACV 2020)."""
ENCODINGS = ("low-rank", "top-m", "dense")
METRICS = ("l2", "ip")
SAMPLINGS = ("random", "semihard", "hard", "all")
LABELS = ("classes", "numbers")


class RecipeWarning(EmbedcamWarning):
    """Choices that are allowed and rarely wise."""


@dataclass(frozen=True)
class Recipe:
    """What is computed and how it is stored. The defaults are what measured best.

    Args:
        method: any of `registry.storable_methods()`, the methods that yield channel weights, or,
            for pictures that are all aligned, weights by position: "hirescam".
        target: "margin" (triplets), "centred" (needs neither labels nor sampling), "distinctive"
            (what sets an image's kind, and a little the image itself, apart from the rest),
            "discriminant" (the same of a label alone, in more strongly whitened embeddings; for
            both see `cotangents.AnchorCotangents`), or "auto": "distinctive" where the mean over
            every triplet has a closed form and nothing else is asked for, else "margin".
        norm: the gradient "through" the L2 norm or "around" it; see `AnchorCotangents` for what
            "through" is to the target "distinctive".
        sampling: "random", "semihard", "hard", "all" (the exact mean over every triplet, in closed
            form), "given", or "auto": "all" where it has a closed form (no hinge, and a method that
            sees the mean of the triplets) and no number of triplets is asked for, else "random".
        triplets: S, triplets drawn for each image; None draws 50 where triplets are drawn.
        hinge: leave out triplets that the margin already satisfies.
        margin: of the hinge and of semihard sampling.
        seed: of every draw.
        layers: names of the layers that a method of several layers draws with, the network's own
            among them, which must be the deepest; empty for all other methods.
        fill: what a masking method shows in place of masked pixels, and its baseline: "mean",
            "black" or "blur".
        options: the method's own, a mapping such as {"samples": 50}; kept as pairs in order.
        encoding: "low-rank", "top-m" (the paper's) or "dense".
        rank: R of low-rank.
        m: M, channels kept by top-m.
        by: top-m by "signed" value (the paper) or by "magnitude".
        dtype: of stored weights, "float16" or "float32".
        faiss: FAISS factory string; "none" leaves searching to others.
        metric: "l2" (squared) or "ip" (inner product).
        labels: "classes", or "numbers": an image's positives are the images nearest to it in value,
            its negatives those farthest from it, see `number_labels.Values`. A source whose labels
            are numbers (`find_images(..., labels="numbers")`) makes it "numbers".
        positives, negatives: of labels that are numbers, the shares of the labelled images.
    """

    method: str = "gradcam"
    target: str = "auto"
    norm: str = "through"
    sampling: str = "auto"
    triplets: int | None = None
    hinge: bool = False
    margin: float = 0.2
    seed: int = 0
    layers: tuple[str, ...] = ()
    fill: str = "mean"
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    encoding: str = "low-rank"
    rank: int = 128
    m: int = 50
    by: str = "signed"
    dtype: str = "float16"
    faiss: str = "Flat"
    metric: str = "l2"
    labels: str = "classes"
    positives: float = 0.1
    negatives: float = 0.5

    def __post_init__(self) -> None:
        if type(self.margin) is int and self.margin < 1 << 64:
            object.__setattr__(self, "margin", float(self.margin))
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "options", _pairs(self.options))
        for entry in fields(self):
            value, kind = getattr(self, entry.name), type(entry.default)
            if entry.name == "triplets":
                if value is None:
                    continue
                kind = int
            if type(value) is not kind:
                raise RecipeError(
                    f"{entry.name} = {short(value)} should be of type {kind.__name__}"
                )
        if bare_name(self.method) in METHODS:
            object.__setattr__(self, "method", bare_name(self.method))
        if self.method in METHODS and not METHODS[self.method].storable:
            raise RecipeError(f"method = {self.method!r}: {why_not_storable(METHODS[self.method])}")
        for name, known in _CHOICES.items():
            _one_of(name, getattr(self, name), known)
        for name, value in (("triplets", self.n_triplets), ("rank", self.rank), ("m", self.m)):
            if value < 1:
                raise RecipeError(f"{name} = {short(value)} is too small; give at least 1")
        if self.n_triplets > MOST_TRIPLETS:
            raise RecipeError(
                f"triplets = {short(self.triplets)} is more than {MOST_TRIPLETS:,} an image; give "
                "fewer, or take the exact mean of all of them by sampling 'all'"
            )
        if not 0 < self.margin < math.inf:
            raise RecipeError(f"margin = {self.margin} must be greater than 0; the usual is 0.2")
        if min(self.positives, self.negatives) <= 0 or not self.positives + self.negatives <= 1:
            raise RecipeError(
                f"positives = {self.positives} and negatives = {self.negatives} are shares of the "
                "images; give numbers above 0 that are at most 1 together, such as 0.1 and 0.5"
            )
        if not 0 <= self.seed < 1 << 64:
            raise RecipeError(
                f"seed = {short(self.seed)} must be a whole number from 0 to 2**64 - 1"
            )
        if not self.faiss:
            raise RecipeError("faiss is empty; give a factory string such as 'Flat', or 'none'")
        self._check_layers()
        self._check_options()
        self._check_together()

    def _check_layers(self) -> None:
        if not all(isinstance(name, str) and name for name in self.layers):
            raise RecipeError(f"layers = {list(self.layers)!r} should be names of layers")
        if isinstance(self.entry, LayersMethod):
            if len(set(self.layers)) < max(2, len(self.layers)):
                raise RecipeError(
                    f"{self.entry.title} draws with several layers and layers = "
                    f"{list(self.layers)!r}; name at least two, each once, such as "
                    "['layer2', 'layer3', 'layer4']"
                )
        elif self.layers:
            raise RecipeError(
                f"{self.entry.title} works on the network's own layer, so layers = "
                f"{list(self.layers)!r} means nothing; leave it out, or use method 'polycam'"
            )

    def _check_options(self) -> None:
        if self.fill != "mean" and not self.entry.filled:
            raise RecipeError(
                f"{self.entry.title} fills nothing in, so fill = {self.fill!r} means nothing; "
                "leave it out, or use a method that masks, such as 'scorecam'"
            )
        if "layers" in self.method_options:
            raise RecipeError("layers is an entry of its own and not one of options")

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's own options by name."""
        return dict(self.options)

    @property
    def resolved_sampling(self) -> str:
        """The sampling, with "auto" decided."""
        if self.resolved_target in WHITENED:
            return "all"
        if self.sampling != "auto":
            return self.sampling
        closed_form = not self.per_triplet and not self.hinge
        return "all" if closed_form and self.triplets is None else "random"

    @property
    def resolved_target(self) -> str:
        """The target, with "auto" decided."""
        if self.target != "auto":
            return self.target
        drawn = self.triplets is not None or self.sampling not in ("auto", "all")
        plain = not (drawn or self.hinge or self.per_triplet)
        return "distinctive" if plain else "margin"

    @property
    def near(self) -> float | None:
        """Share of the images that are positives in value; None where labels are classes."""
        return self.positives if self.labels == "numbers" else None

    @property
    def head_norm(self) -> str:
        """The norm's way that is left for the head: a whitened target has taken its own."""
        return "around" if self.resolved_target in WHITENED else self.norm

    @property
    def resolved(self) -> "Recipe":
        """The same with the target "auto" decided: what an index keeps."""
        return replace(self, target=self.resolved_target)

    @property
    def entry(self) -> Method:
        """The method's entry in the registry."""
        return METHODS[self.method]

    @property
    def per_triplet(self) -> bool:
        """Whether the method is not linear in the target, so that each triplet is seen apart."""
        return bool(getattr(self.entry, "per_triplet", False))

    @property
    def n_triplets(self) -> int:
        """S, the triplets drawn for each image."""
        return N_TRIPLETS if self.triplets is None else self.triplets

    def _check_together(self) -> None:
        if isinstance(self.entry, PositionMethod) and self.encoding != "low-rank":
            raise RecipeError(
                f"{self.entry.title} has a weight for every channel and position, which are kept "
                f"as principal components, and encoding = {self.encoding!r}; use 'low-rank'"
            )
        if self.norm == "around" and (self.entry.scored or not self.entry.targeted):
            raise RecipeError(
                f"norm 'around' changes the gradient, and {self.entry.title} never asks for one; "
                "leave it out, or use a method of the gradient, such as 'gradcam'"
            )
        if self.target == "centred" and self.hinge:
            raise RecipeError(
                "a hinge needs triplets, and the target 'centred' has none; drop the hinge, or "
                "use the target 'margin'"
            )
        if self.target in WHITENED and (self.hinge or self.triplets is not None):
            raise RecipeError(
                f"the target {self.target!r} takes every triplet in closed form, so a hinge or a "
                "number of triplets means nothing; leave them out, or use the target 'margin'"
            )
        if self.target in WHITENED and self.sampling not in ("auto", "all"):
            raise RecipeError(
                f"the target {self.target!r} takes every triplet, so sampling = {self.sampling!r} "
                "means nothing; leave it out, or use the target 'margin'"
            )
        if self.target != "centred" and self.sampling == "all" and self.triplets is not None:
            raise RecipeError(
                f"sampling 'all' takes every triplet, so triplets = {self.triplets} means nothing; "
                "leave it out, or use sampling 'random'"
            )
        if self.target != "centred" and self.sampling == "all":
            if self.hinge:
                raise RecipeError(
                    "the exact mean over 'all' triplets cannot leave out satisfied ones; drop the "
                    "hinge, or use sampling 'random' with it"
                )
            if self.per_triplet:
                raise RecipeError(
                    f"{self.entry.title} is not linear in the triplet, so 'all' has no closed form "
                    f"for it; use method 'gradcam' with 'all', or sampling 'random' with "
                    f"{self.method}"
                )

    @classmethod
    def paper(cls, **changes: Any) -> "Recipe":
        """The paper's own setting: top 50 channels by signed value, gradient through the norm."""
        paper = cls(
            target="margin", sampling="random", triplets=N_TRIPLETS, encoding="top-m", m=50,
            by="signed",
        )  # fmt: skip
        return replace(paper, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """A recipe from plain values; unknown names and wrong types are errors."""
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise RecipeError(f"{where} has an unknown entry {name!r}; {_hint(name, known)}")
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    @classmethod
    def of_index(cls, manifest: "Manifest") -> "Recipe":
        """The recipe an index was built by; an older one may leave its target to the manifest."""
        recipe = cls.from_dict(manifest.recipe, "the index's recipe")
        return recipe if recipe.target != "auto" else replace(recipe, target=manifest.target)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest; options as a table, where there are any."""
        values = asdict(self)
        values["options"] = self.method_options
        # Left out where they say nothing, so that an older index keeps its digest.
        for name in ("fill", "options"):
            if values[name] == getattr(Recipe, name) or not values[name]:
                del values[name]
        for name in ("labels", "positives", "negatives"):
            if self.labels == "classes" and values[name] == getattr(Recipe, name):
                del values[name]
        return values

    def _repr_html_(self) -> str:
        """A table of the choices for notebooks; "auto" with what it stands for here."""
        from ..render import Table, drawn_blocks

        decided = {"target": self.resolved_target, "sampling": self.resolved_sampling}
        rows = [
            (name, f"auto: {decided[name]}" if value == "auto" else value)
            for name, value in self.to_dict().items()
            if value not in (None, ())
        ]
        return "\n".join(drawn_blocks([Table(("recipe", ""), rows)]))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the choices."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that came along ("default", "paper", ...), or the file that was named.

    Raises:
        RecipeError: neither.
    """
    if Path(name).suffix or Path(name).exists():
        return Path(name)
    # Inside a wheel they lie in the package, in the sources beside the format of the index.
    package = Path(__file__).parents[1]
    folders = (package.parent / "index" / "recipes", package / "recipes")
    found = {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}
    if name not in found:
        raise RecipeError(
            f"{name}: there is no such recipe; {_hint(name, found)}; or give a TOML file"
        )
    return found[name]


def read_toml(path: str | Path) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """A recipe file: the recipe, and the images and the network it names.

    Returns:
        The recipe, and the tables `[images]` and `[network]` as they stand.

    Raises:
        RecipeError: unreadable, not TOML, or with entries that mean nothing.
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
    for table, entries in tables.items():
        if table not in ("images", "network", *_TABLES):
            known = ["images", "network", *_TABLES]
            raise RecipeError(f"{path}: unknown table [{table}]; {_hint(table, known)}")
        if not isinstance(entries, dict):
            raise RecipeError(f"{path}: {table} = {short(entries)} should be a table, [{table}]")
    choices: dict[str, Any] = {}
    for table, names in _TABLES.items():
        for name, value in tables.get(table, {}).items():
            if name not in names:
                raise RecipeError(f"{path}: [{table}] has no entry {name!r}; {_hint(name, names)}")
            choices[names[name]] = value
    recipe = Recipe.from_dict(choices, str(path))
    return recipe, tables.get("images", {}), tables.get("network", {})


_CHOICES: dict[str, tuple[str, ...]] = {
    "labels": LABELS,
    "method": storable_methods(),
    "target": ("auto", *TARGETS),
    "norm": NORMS,
    "fill": FILLS,
    "sampling": ("auto", *SAMPLINGS, "given"),
    "encoding": ENCODINGS,
    "by": ("signed", "magnitude"),
    "dtype": DTYPES,
    "metric": METRICS,
}
_TABLES: dict[str, dict[str, str]] = {
    "weights": {
        name: name
        for name in (
            "method", "target", "norm", "sampling", "triplets", "hinge", "margin", "seed",
            "labels", "positives", "negatives", "layers", "fill", "options",
        )
    },
    "encoding": {"name": "encoding", **{name: name for name in ("rank", "m", "by", "dtype")}},
    "search": {"faiss": "faiss", "metric": "metric"},
}  # fmt: skip


def _pairs(options: Any) -> tuple[tuple[str, Any], ...]:
    """Options as pairs in the order of their names, so that one set of choices is one recipe."""
    try:
        pairs = dict(options)
    except (TypeError, ValueError):
        pairs = {"": None}
    plain = (bool, int, float, str)
    for name, value in pairs.items():
        fine = type(value) in plain and (type(value) is not float or math.isfinite(value))
        if not isinstance(name, str) or not name or not (fine or value is None):
            raise RecipeError(
                f"options = {short(options)}; give a table of the method's options, each a number, "
                "a text or a truth value, such as { samples = 50 }"
            )
    return tuple(sorted(pairs.items()))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{name} = {value!r} is unknown; {_hint(value, known)}")


def _hint(given: str, known: Iterable[str]) -> str:
    """The nearest of the known names, and all of them."""
    names = list(known)
    near = get_close_matches(given, names, 1, 0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}"
