"""The recipe of an index: its choices checked together, read from TOML and from an index."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import nearest_of
from .._files import refuse_device
from .._options import check, from_tables
from ..errors import EmbedcamWarning, RecipeError, short
from .choices import N_TRIPLETS, WHITENED, Choices
from .registry import METHODS, LayersMethod, Method, PositionMethod

if TYPE_CHECKING:
    from ..index import Manifest


class RecipeWarning(EmbedcamWarning):
    """Choices that are allowed and rarely wise."""


@dataclass(frozen=True)
class Recipe(Choices):
    """What is computed and how it is stored. The defaults are what measured best.

    Parameters
    ----------
    method : str
        One that yields channel weights, by name; of aligned pictures also "hirescam".
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
        S, triplets drawn for each image; None draws 50 (Chen et al., WACV 2020).
    hinge, margin : bool, float
        Leave out triplets that the margin satisfies; the margin, also of semihard sampling.
    seed : int
        Of every draw.
    layers : tuple of str
        The layers that a method of several layers draws with, the deepest one the network's own.
    fill : str
        What a masking method shows in place of masked pixels: "mean", "black" or "blur".
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
    faiss, metric : str
        FAISS factory string, "none" leaves searching to others; "l2" (squared) or "ip".
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

    # What is declared above, as the dataclass's own.
    __annotations__ = Choices.__annotations__

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
        return self.entry.per_triplet

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
    """Return a file's recipe, and its tables `[images]` and `[network]` as they stand."""
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
