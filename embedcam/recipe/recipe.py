"""The recipe of an index: its choices checked together, read from TOML and from an index."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import nearest_of
from .._files import refuse_device
from .._options import check, from_tables, settings_of
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
    concepts : int
        Parts that the activations of a sample are divided into, at most 64, 0 for none: what
        receipts name beside channels.
    faiss, metric : str
        FAISS factory string, "auto" chooses one by the number of images (`faiss_build.choose`),
        "none" leaves searching to others; "l2" (squared) or "ip".
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
        for sentence in self._conflicts():
            raise RecipeError(sentence)

    def _conflicts(self) -> Iterator[str]:
        """Yield what is wrong with choices together."""
        entry, title, target = self.entry, self.entry.title, f"the target {self.target!r}"
        several, layers = isinstance(entry, LayersMethod), list(self.layers)
        whitened, drawn = self.target in WHITENED, self.triplets is not None
        every = self.target != "centred" and self.sampling == "all"
        shares = f"positives = {self.positives} and negatives = {self.negatives} are shares"
        if self.positives + self.negatives > 1:
            yield f"{shares}; give numbers above 0 that are at most 1 together"
        if not self.faiss:
            yield "faiss is empty; give a factory string such as 'Flat', or 'none'"
        if several and len(set(layers)) < max(2, len(layers)):
            rest = "name at least two, each once, such as ['layer2', 'layer3', 'layer4']"
            yield f"{title} draws with several layers and layers = {layers!r}; {rest}"
        if layers and not several:
            rest = "leave it out, or use method 'polycam'"
            yield f"{title} works on the network's own layer, not on layers = {layers!r}; {rest}"
        if self.fill != "mean" and not entry.filled:
            rest = "leave it out, or use a method that masks, such as 'scorecam'"
            yield f"{title} fills nothing in, so fill = {self.fill!r} means nothing; {rest}"
        if "layers" in self.method_options:
            yield "layers is an entry of its own, not one of options"
        if isinstance(entry, PositionMethod) and self.encoding != "low-rank":
            rest = f"principal components, and encoding = {self.encoding!r}; use 'low-rank'"
            yield f"{title} has a weight for every channel and position, kept as {rest}"
        if self.norm == "around" and (entry.scored or not entry.targeted):
            rest = "leave it out, or use a method of the gradient, such as 'gradcam'"
            yield f"norm 'around' changes the gradient, and {title} never asks for one; {rest}"
        if self.target == "centred" and self.hinge:
            yield f"{target} has no triplets; drop the hinge, or use the target 'margin'"
        if whitened and (self.hinge or drawn):
            rest = "takes every triplet in closed form, without a hinge or a number of triplets"
            yield f"{target} {rest}; leave them out, or use the target 'margin'"
        if whitened and self.sampling not in ("auto", "all"):
            rest = f"takes every triplet, so sampling = {self.sampling!r} means nothing"
            yield f"{target} {rest}; leave it out, or use the target 'margin'"
        if every and drawn:
            rest = f"takes every triplet, so triplets = {self.triplets} means nothing"
            yield f"sampling 'all' {rest}; leave it out, or use sampling 'random'"
        if every and self.hinge:
            rest = "drop the hinge, or use sampling 'random' with it"
            yield f"the exact mean over 'all' triplets cannot leave out satisfied ones; {rest}"
        if every and self.per_triplet:
            rest = f"use method 'gradcam' with 'all', or sampling 'random' with {self.method}"
            yield f"{title} is not linear in the triplet, and has no closed form; {rest}"

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
        drawn = self.per_triplet or self.hinge or self.triplets is not None
        return "random" if drawn else "all"

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
        known = settings_of(cls)
        for name in values:
            if name not in known:
                raise RecipeError(
                    f"{where} has an unknown entry {name!r}; {nearest_of(name, known)}"
                )
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
        values = asdict(self) | {"options": self.method_options}
        # Left out where they say nothing, so that an older index keeps its digest.
        classes = ("labels", "positives", "negatives") if self.labels == "classes" else ()
        for name in ("fill", "options", "concepts", *classes):
            if values[name] in ((), {}) or values[name] == getattr(Recipe, name):
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
