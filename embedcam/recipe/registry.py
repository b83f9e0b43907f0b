"""Every method on one screen: its name, where its formula was published, and what it yields.

Names and places only: the formulas are in `embedcam.methods` and are loaded on first use. No
dataclass here and in `choices`: importing that takes longer than all else that `--help` does.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from .._checks import one_of

if TYPE_CHECKING:
    from ..methods.subject import MethodOutput


class Method(NamedTuple):
    """A class activation method, by its name in the papers (lower case, without hyphens)."""

    name: str
    title: str
    source: str
    where: str  # "module:function" below `embedcam.methods`
    seeded: bool = False  # it draws random numbers
    targeted: bool = True  # False where the map ignores the target: it cannot say what matched
    scored: bool = False  # it asks for scores, never for a gradient: the norm changes nothing
    several: bool = False  # it can work on several layers at once
    filled: bool = False  # what it masks, or begins from, takes the fill that is asked for
    trained: bool = False  # it needs a branch of its own that was trained (`methods.learned`)
    per_triplet: bool = False  # not linear in the target: weights are averaged over triplets
    own_map: bool = False  # the map is more than weights draw: `cam_for` shows it, an index not
    reading: str = ""  # what it reads inside a network's last attention (`network.reading`)
    nearest: str = ""  # of a method that no index can hold, the nearest that one can
    why: str = ""  # and why not

    @property
    def storable(self) -> bool:
        """Return whether an index can hold it."""
        return not isinstance(self, MapMethod)

    @property
    def attends(self) -> bool:
        """Return whether it is of transformers alone."""
        return self.where.startswith("attention:")

    @property
    def formula(self) -> str:
        """Return the method whose weights it takes: Grad-CAM's, where it reads an attention."""
        return "gradcam" if self.reading else self.name

    def load(self) -> "Callable[..., MethodOutput]":
        """Return the function: `function(subject, **options) -> MethodOutput`."""
        module, _, function = self.where.partition(":")
        loaded = import_module(f"embedcam.methods.{module}")
        method: Callable[..., MethodOutput] = getattr(loaded, function)
        return method


class WeightMethod(Method):
    """Yields channel weights `[B K]`, which an index keeps and transfers to queries."""


class LayersMethod(Method):
    """Yields one weight vector for each of several layers; an index keeps them all."""


class PositionMethod(Method):
    """Yields weights by position `[B K H W]`; an index keeps their principal components."""


class MapMethod(Method):
    """Yields a map and no weights, so that no index can hold it."""


FILLS = ("mean", "black", "blur")
"""What masked pixels may become, by name; `methods.masking.fill_like` says what each is."""

_EACH = "its gradient differs from position to position, so no one number a channel draws its map"
_PIXELS = "it works on pixels and never sees the layer's channels"
_ATTENTION = "its map is made of attention weights, which a query's own pass alone can give"
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
        WeightMethod("gradeclip", "Grad-ECLIP", "Zhao et al., ICML 2024", "attention:gradeclip",
                     reading="gradeclip"),
        WeightMethod("maskclip", "MaskCLIP", "Zhou et al., ECCV 2022", "attention:maskclip",
                     reading="value"),
        MapMethod("rollout", "Attention Rollout", "Abnar and Zuidema, ACL 2020",
                  "attention:rollout", targeted=False, nearest="gradeclip", why=_ATTENTION),
        MapMethod("genericattention", "Generic Attention", "Chefer et al., ICCV 2021",
                  "attention:generic_attention", nearest="gradeclip", why=_ATTENTION),
        MapMethod("legrad", "LeGrad", "Bousselham et al., ICCV 2025", "attention:legrad",
                  nearest="gradeclip", why=_ATTENTION),
    )
}  # fmt: skip
"""Every method by name."""


def find_method(name: str) -> Method:
    """Return the method of that name, or printed so; hyphens, spaces and case do not matter."""
    if isinstance(name, str):
        printed = {bare_name(method.title): one for one, method in METHODS.items()}
        name = printed.get(bare_name(name), bare_name(name))
    return METHODS[one_of("method", name, METHODS)]


def bare_name(name: str) -> str:
    """Return a printed name as `METHODS` has it: "Grad-CAM" -> "gradcam"."""
    return name.lower().translate(dict.fromkeys(map(ord, "-_ ")))


def storable_methods() -> tuple[str, ...]:
    """Return names of the methods an index can hold."""
    return tuple(name for name, method in METHODS.items() if method.storable)
