"""Every method on one screen: its name, where its formula was published, and what it yields.

Whether a method can be put in an index is its type: a `WeightMethod` yields one number a channel,
which an index keeps and transfers to queries; a `LayersMethod` yields such a vector for each of
several layers, and an index keeps them all; a `PositionMethod` yields one number a channel and
position, which an index keeps for pictures that are aligned; a `MapMethod` yields nothing but a
map. Names and places only: the formulas are in `embedcam.methods` and are loaded on first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar

from ..errors import InputError


@dataclass(frozen=True)
class Method:
    """A class activation method, by its name in the papers (lower case, without hyphens)."""

    name: str
    title: str
    source: str
    where: str
    """"module:function" below `embedcam.methods`."""
    seeded: bool = False
    """It draws random numbers."""
    targeted: bool = True
    """False where the map ignores the target: it cannot say what matched."""
    scored: bool = False
    """It asks for scores of the embedding and never for a gradient, so the norm changes nothing."""
    several: bool = False
    """It can work on several layers at once."""
    filled: bool = False
    """What it masks, or begins its steps from, takes the fill that is asked for."""
    trained: bool = False
    """It needs a branch of its own that was trained (`methods.learned`)."""
    storable: ClassVar[bool] = False

    def load(self) -> Callable[..., Any]:
        """Return the function: `function(subject, **options) -> MethodOutput`."""
        module, _, function = self.where.partition(":")
        method: Callable[..., Any] = getattr(import_module(f"embedcam.methods.{module}"), function)
        return method


@dataclass(frozen=True)
class WeightMethod(Method):
    """Yields channel weights `[B K]`: an index can hold them."""

    per_triplet: bool = False
    """Not linear in the target, so weights are averaged over triplets."""
    own_map: bool = False
    """The paper's map is more than its weights draw: `cam_for` shows it, an index the weights'."""
    storable: ClassVar[bool] = True


@dataclass(frozen=True)
class LayersMethod(Method):
    """Yields one weight vector a layer, and a map made of all of them: an index can hold them."""

    storable: ClassVar[bool] = True


@dataclass(frozen=True)
class PositionMethod(Method):
    """Yields weights by position `[B K H W]`: an index keeps their principal components."""

    storable: ClassVar[bool] = True


@dataclass(frozen=True)
class MapMethod(Method):
    """Yields a map and no weights: `why` not, and which storable method comes `nearest`."""

    nearest: str = ""
    why: str = ""


FILLS = ("mean", "black", "blur")
"""What masked pixels may become, by name; `methods.masking.fill_like` says what each is."""

_EACH = "its gradient differs from position to position, so no one number a channel draws its map"
_PIXELS = "it works on pixels and never sees the layer's channels"
_BRANCH = "its map comes out of a trained branch and not of a sum over channels"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        WeightMethod("cam", "CAM", "Zhou et al., CVPR 2016", "gradients:cam"),
        WeightMethod("gradcam", "Grad-CAM", "Selvaraju et al., ICCV 2017", "gradients:gradcam"),
        WeightMethod("gradcam++", "Grad-CAM++", "Chattopadhay et al., WACV 2018",
                     "gradients:gradcam_plus_plus", per_triplet=True),
        WeightMethod("smoothgradcam++", "Smooth Grad-CAM++", "Omeiza et al., 2019",
                     "gradients:smooth_gradcam_plus_plus", seeded=True, per_triplet=True),
        WeightMethod("xgradcam", "XGrad-CAM", "Fu et al., BMVC 2020", "gradients:xgradcam"),
        WeightMethod("integratedgradcam", "Integrated Grad-CAM", "Sattarzadeh et al., ICASSP 2021",
                     "gradients:integrated_gradcam", own_map=True, filled=True),
        PositionMethod("hirescam", "HiResCAM", "Draelos and Carin, 2020", "gradients:hirescam"),
        MapMethod("layercam", "Layer-CAM", "Jiang et al., TIP 2021", "gradients:layercam",
                  several=True, nearest="gradcam", why=_EACH),
        MapMethod("zoomcam", "Zoom-CAM", "Shi et al., ICPR 2020", "gradients:zoomcam",
                  several=True, nearest="gradcam", why=_EACH),
        MapMethod("guidedbackprop", "Guided Backpropagation", "Springenberg et al., ICLR 2015",
                  "gradients:guided_backprop", nearest="gradcam", why=_PIXELS),
        MapMethod("guidedgradcam", "Guided Grad-CAM", "Selvaraju et al., ICCV 2017",
                  "gradients:guided_gradcam", nearest="gradcam", why=_PIXELS),
        WeightMethod("eigencam", "Eigen-CAM", "Muhammad and Yeasin, IJCNN 2020",
                     "gradients:eigencam", targeted=False),
        WeightMethod("eigengradcam", "EigenGrad-CAM", "pytorch-grad-cam",
                     "gradients:eigengradcam", own_map=True),
        WeightMethod("scorecam", "Score-CAM", "Wang et al., CVPR Workshops 2020",
                     "masking:scorecam", scored=True, filled=True),
        WeightMethod("ablationcam", "Ablation-CAM", "Desai and Ramaswamy, WACV 2020",
                     "masking:ablationcam", scored=True),
        WeightMethod("groupcam", "Group-CAM", "Zhang et al., 2021", "grouping:groupcam",
                     seeded=True, own_map=True),
        WeightMethod("clustercam", "Cluster-CAM", "Feng et al., 2023", "grouping:clustercam",
                     seeded=True, own_map=True, scored=True, filled=True),
        WeightMethod("cosinecam", "Cosine-CAM", "tetutaro/class_activation_mapping",
                     "grouping:cosinecam", seeded=True, own_map=True),
        LayersMethod("polycam", "Poly-CAM", "Englebert et al., 2022", "masking:polycam",
                     several=True, scored=True, filled=True),
        MapMethod("rise", "RISE", "Petsiuk et al., BMVC 2018", "masking:rise", seeded=True,
                  scored=True, filled=True, nearest="scorecam", why=_PIXELS),
        MapMethod("lime", "LIME", "Ribeiro et al., KDD 2016", "masking:lime", seeded=True,
                  scored=True, filled=True, nearest="scorecam", why=_PIXELS),
        MapMethod("sbsm", "SBSM", "Dong et al., CVPR Workshops 2019", "masking:sbsm",
                  scored=True, filled=True, nearest="scorecam", why=_PIXELS),
        WeightMethod("lficam", "LFI-CAM", "Lee et al., ICCV 2021", "learned:lficam",
                     targeted=False, trained=True),
        MapMethod("abn", "ABN", "Fukui et al., CVPR 2019", "learned:abn", targeted=False,
                  trained=True, nearest="lficam", why=_BRANCH),
    )
}  # fmt: skip
"""Every method by name."""


def find_method(name: str) -> Method:
    """Return the method of that name; hyphens, spaces and case do not matter."""
    if not isinstance(name, str):
        raise InputError(f"a method is named by a string such as 'gradcam'; given {name!r}")
    bare = bare_name(name)
    if bare in METHODS:
        return METHODS[bare]
    near = get_close_matches(bare, METHODS, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "known:"
    listed = "" if near else f" {', '.join(METHODS)}"
    raise InputError(f"method {name!r} is unknown; {hint}{listed}")


def bare_name(name: str) -> str:
    """Return a printed name as `METHODS` has it: "Grad-CAM" -> "gradcam"."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def storable_methods() -> tuple[str, ...]:
    """Return names of the methods an index can hold."""
    return tuple(name for name, method in METHODS.items() if method.storable)


def why_not_storable(method: Method) -> str:
    """Return one sentence on why an index cannot hold a method, naming the nearest it can."""
    why, nearest = (method.why, method.nearest) if isinstance(method, MapMethod) else ("", "")
    return (
        f"{method.title} cannot be put in an index: {why}; the nearest method that can is "
        f"{nearest!r}"
    )
