"""Networks of open_clip by name: images beside texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess, Extent, custom, from_transform
from ..preprocess.transforms import offsets
from .layers import near_misses
from .module import module_device
from .source import (
    Foreign,
    Loaded,
    PathLike,
    Sides,
    fetched,
    hub_closed,
    imported,
    load_weights,
    made,
    place_of,
    quiet,
)
from .towers import assembled

_SCHEMES = ("hf-hub:", "local-dir:")
_FEW = 6


def from_open_clip(name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int) -> Loaded:
    """Load NAME or NAME:PRETRAINED of open_clip, a tag of its weights or a file; or a folder's."""
    library, full = imported("open_clip", f"open_clip:{name}"), f"open_clip:{name}"
    name, tag = _parts(name)
    if not name.startswith(_SCHEMES) and name not in library.list_models():
        raise NetworkError(f"open_clip has no {name!r}{near_misses(name, library.list_models())}")
    if weights is None and not name.startswith(_SCHEMES):
        _refuse_tag(library.list_pretrained_tags_by_model(name), tag, full)
    side = sides[0] if sides is not None and sides[0] == sides[1] else sides
    create = partial(library.create_model, name, force_image_size=side)

    def build(pretrained: bool) -> Foreign:
        if not pretrained:
            bare = {"load_weights": False} if name.startswith(_SCHEMES) else {}
            with quiet():
                return create(pretrained_text=False, **bare)

        def load(local: bool) -> Foreign:
            with hub_closed(local):
                return create(pretrained=tag or None, weights_only=True)

        return fetched(load, full, "the whole")

    model = made(build, full, weights, seed).eval()
    load_weights(model, weights, [])
    settings = library.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = library.transform.image_transform_v2(settings, is_train=False)

    def tokenizer(local: bool) -> Foreign:
        with hub_closed(local):
            return library.get_tokenizer(name)

    words = _Texts(partial(fetched, tokenizer, full, "the tokenizer"))
    return assembled(model, _images, words, _preprocess_of(transform), head)


def wrapped(model: nn.Module, preprocess: Foreign, tokenizer: Foreign = None) -> Loaded:
    """Return a model of open_clip, its transform and perhaps its tokenizer as a network."""
    if not hasattr(model, "encode_image"):
        raise NetworkError(
            f"the {type(model).__name__} has no encode_image; give what "
            "open_clip.create_model_and_transforms returned first"
        )
    words = None if tokenizer is None else _Texts(lambda: tokenizer)
    return assembled(model, _images, words, _preprocess_of(preprocess))


def _parts(name: str) -> tuple[str, str]:
    """Return a model's name, as open_clip takes it, and the tag or file of its weights."""
    if name.startswith(_SCHEMES):
        return name, ""
    folder = Path(place_of(f"open_clip:{name}"))
    if folder.is_dir():
        return f"local-dir:{folder}", ""
    name, _, tag = name.partition(":")
    return name.replace("/", "-"), tag


def _refuse_tag(tags: Sequence[str], tag: str, full: str) -> None:
    """Refuse weights that are neither a tag of a model nor a file."""
    if tag in tags or Path(tag).is_file():
        return
    few = ", ".join([*tags[:_FEW], *["..."][: len(tags) > _FEW]])
    said = f"knows no weights {tag!r}{near_misses(tag, tags)}" if tag else "names no weights"
    raise NetworkError(
        f"{full} {said}; give NAME:TAG{f' with one of {few}' if few else ''}, NAME:FILE, or "
        "--weights FILE or random"
    )


# The two towers


def _images(model: Foreign, images: Tensor) -> Tensor:
    embedding: Tensor = model.encode_image(images, normalize=False)
    return embedding


@dataclass(eq=False)
class _Texts:
    """Texts -> embeddings `[n D]`; the tokenizer is loaded for the first."""

    load: Callable[[], Foreign]
    tokenizer: Foreign = None

    def __call__(self, model: Foreign, texts: Sequence[str]) -> Tensor:
        if self.tokenizer is None:
            self.tokenizer = self.load()
        tokens: Tensor = self.tokenizer(list(texts))
        embedding: Tensor = model.encode_text(tokens.to(module_device(model)), normalize=False)
        return embedding


# Pictures


def _preprocess_of(transform: Foreign) -> AnyPreprocess:
    """Return what a transform of open_clip amounts to, also of those that keep whole pictures."""
    steps = list(getattr(transform, "transforms", []))
    if not steps or type(steps[0]).__name__ != "ResizeKeepRatio":
        return from_transform(transform)
    return custom(transform, name="open_clip.ResizeKeepRatio", extent=partial(_kept, steps[0]))


def _kept(resize: Foreign, width: int, height: int) -> Extent:
    """Return what is seen of a picture resized by its ratio and cropped or padded to a size."""
    ratios = height / resize.size[0], width / resize.size[1]
    ratio = max(ratios) * resize.longest + min(ratios) * (1 - resize.longest)
    across, down = round(width / ratio), round(height / ratio)
    left, top = offsets((across, down), (resize.size[1], resize.size[0]), "round")
    right, bottom = left + resize.size[1], top + resize.size[0]
    return (
        left * width / across,
        top * height / down,
        right * width / across,
        bottom * height / down,
    )
