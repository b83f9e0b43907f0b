"""Networks of transformers by name or folder: vision models, and images beside texts."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess, Preprocess, from_transform
from ..preprocess.recognizing import recognized
from .module import module_device
from .source import (
    Foreign,
    Loaded,
    PathLike,
    Sides,
    fetched,
    imported,
    load_weights,
    made,
    place_of,
)
from .towers import Words, assembled

_IMAGES = "get_image_features"
_TEXTS = "get_text_features"
# How far a text's embedding moves by padding that its tower does not read: rounding.
_UNREAD = 1e-3


def from_transformers(
    name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int
) -> Loaded:
    """Load a vision or two-tower model by its name on the hub or its folder.

    What is there is taken without asking the hub. No code of the model's own is run, no pickle.
    """
    library, full = imported("transformers", f"hf:{name}"), f"hf:{name}"
    place = place_of(full)
    config = fetched(_loading(library.AutoConfig.from_pretrained, place), full, "the config.json")
    missing = list[str]()

    def build(pretrained: bool) -> Foreign:
        special = _special(library, config)
        if not pretrained:
            return special(config) if special else library.AutoModel.from_config(config)
        load = _loading(
            (special or library.AutoModel).from_pretrained,
            place,
            config=config,
            weights_only=True,
            output_loading_info=True,
        )
        model, loading = fetched(load, full, "the whole")
        missing.extend(loading["missing_keys"])
        return model

    model = made(build, full, weights, seed).eval().float()
    _refuse_blind(model, full)
    _without_untrained(model, missing, full)
    load_weights(model, weights, [])
    try:
        load = _loading(library.AutoImageProcessor.from_pretrained, place)
        processor = fetched(load, full, "the preprocessor_config.json")
        preprocess: AnyPreprocess | None = preprocess_of(processor)
    except NetworkError:
        # Pretrained ones without it are told so where a picture comes; random ones see anything.
        preprocess = Preprocess(size=_side(model)) if weights == "random" else None
    if sides is not None and isinstance(preprocess, Preprocess):
        preprocess = preprocess.sized(sides)
    tokens = _loading(library.AutoProcessor.from_pretrained, place)
    words = words_of(model, partial(fetched, tokens, full, "the tokenizer"))
    return assembled(model, images_of(model, preprocess), words, preprocess, head, _side(model))


def wrapped(model: nn.Module, processor: Foreign) -> Loaded:
    """Return a model of transformers and its processor, or image processor alone, as a network."""
    _refuse_blind(model, f"the {type(model).__name__}")
    preprocess = preprocess_of(processor)
    has_tokens = getattr(processor, "tokenizer", None) is not None
    words = words_of(model, lambda: processor) if has_tokens else None
    return assembled(model, images_of(model, preprocess), words, preprocess)


# What is fetched


def _loading(load: Callable[..., Foreign], *given: object, **more: object) -> Foreign:
    """Return a `from_pretrained` as what `fetched` takes; no code of the model's own is run."""

    def run(local: bool) -> Foreign:
        return load(*given, **more, local_files_only=local, trust_remote_code=False)

    return run


def _special(library: ModuleType, config: Foreign) -> Foreign:
    """Return the class that a checkpoint names where the usual one would leave something out."""
    names = [one for one in config.architectures or () if one.endswith("WithProjection")]
    return next((getattr(library, one) for one in names if hasattr(library, one)), None)


def _refuse_blind(model: nn.Module, full: str) -> None:
    main = getattr(model, "main_input_name", "pixel_values")
    if main != "pixel_values" and not hasattr(model, _IMAGES):
        raise NetworkError(
            f"{full} takes {main!r}, no pictures; name a vision model, or one for images and texts "
            "such as CLIP"
        )


def _without_untrained(model: nn.Module, missing: Sequence[str], full: str) -> None:
    """Take off a pooler that a checkpoint has no weights for; refuse what else is missing."""
    poolers = {key[: key.index("pooler") + len("pooler")] for key in missing if "pooler" in key}
    other = [key for key in missing if not any(key.startswith(f"{one}.") for one in poolers)]
    if other:
        raise NetworkError(
            f"{full} lacks {len(other)} weights of its {type(model).__name__} ({other[0]}, ...); "
            "give them all with --weights FILE, or name another model"
        )
    for name in poolers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)


def preprocess_of(processor: Foreign) -> AnyPreprocess:
    """Return what a processor, or the image processor in it, amounts to."""
    images: Foreign = getattr(processor, "image_processor", processor)
    most: int | None = getattr(images, "max_num_patches", None)
    if most is None:
        return from_transform(processor)
    # As many patches as it takes, in a square: images of one index have one size.
    side = int(most**0.5) * images.patch_size
    found = recognized([side, side], None, images.resample, images.image_mean, images.image_std)
    return found or from_transform(processor)


def _side(model: nn.Module) -> tuple[int, int]:
    """Return (H, W) of the pictures that a model's configuration speaks of."""
    config = model.config
    side = getattr(getattr(config, "vision_config", config), "image_size", None) or 224
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


# Images


def images_of(
    model: nn.Module, preprocess: AnyPreprocess | None
) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return how a model's images are embedded, `[B 3 H W]` -> `[B D]`."""
    asked = inspect.signature(getattr(model, _IMAGES, model.forward)).parameters
    config: Foreign = model.config
    naflex = "spatial_shapes" in asked
    vision: Foreign = getattr(config, "vision_config", config)
    patch: int | None = vision.patch_size if naflex else None
    other = isinstance(preprocess, Preprocess) and preprocess.size != _side(model)
    return partial(_embed, patch=patch, resized=other and "interpolate_pos_encoding" in asked)


def _embed(model: nn.Module, images: Tensor, patch: int | None, resized: bool) -> Tensor:
    given = {"pixel_values": images} if patch is None else _patches(images, patch)
    method = getattr(model, _IMAGES, model)
    more = {"interpolate_pos_encoding": True} if resized else {}
    return _vector(model, method(**given, **more))


def _patches(images: Tensor, patch: int) -> dict[str, Tensor]:
    """Return images `[B C H W]` as a NaFlex model takes them: patches `[B T P*P*C]`, all seen."""
    batch, channels, height, width = images.shape
    grid = (height // patch, width // patch)
    cut = images.reshape(batch, channels, grid[0], patch, grid[1], patch)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], device=images.device).int(),
        "spatial_shapes": torch.tensor([grid] * batch, device=images.device),
    }


def _vector(model: nn.Module, output: Foreign) -> Tensor:
    """Return the embedding `[B D]` in what a model returned.

    Its projection; else what its pooler made; else its class token, or the mean over positions.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found.flatten(1)
    last: Tensor = output.last_hidden_state
    if last.ndim == 4:
        return last.mean((2, 3))
    tokens = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    mean = getattr(model.config, "use_mean_pooling", False)
    if {"cls_token", "class_embedding", "class_token"}.isdisjoint(tokens):
        return last.mean(1)
    return last[:, 1:].mean(1) if mean else last[:, 0]


# Texts


def words_of(model: nn.Module, processor: Callable[[], Foreign]) -> Words | None:
    """Return how a model's texts are embedded; None of a model for images alone."""
    return _Texts(processor) if hasattr(model, _TEXTS) else None


@dataclass(eq=False)
class _Texts:
    """Texts -> embeddings `[n D]`; the processor is loaded for the first."""

    load: Callable[[], Foreign]
    processor: Foreign = None
    padding: dict[str, object] = field(default_factory=dict)

    def __call__(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        if self.processor is None:
            self.processor = self.load()
            self.padding = self._padding(model)
        return self._run(model, texts, self.padding)

    def _run(self, model: nn.Module, texts: Sequence[str], padding: dict[str, object]) -> Tensor:
        given = self.processor(text=list(texts), return_tensors="pt", **padding)
        device = module_device(model)
        method = getattr(model, _TEXTS)
        return _vector(model, method(**{key: one.to(device) for key, one in given.items()}))

    def _padding(self, model: nn.Module) -> dict[str, object]:
        """Return how texts are padded: as the processor says, else as the tower was trained.

        One whose answer depends on padding (SigLIP reads the last token) had its whole length.
        """
        kind = type(self.processor)
        said = getattr(kind, "text_kwargs", None) or {}
        known = getattr(getattr(kind, "valid_processor_kwargs", None), "_defaults", {})
        if "padding" in {**known.get("text_kwargs", {}), **said}:
            return {}
        tokenizer: Foreign = getattr(self.processor, "tokenizer", self.processor)
        config: Foreign = getattr(model.config, "text_config", model.config)
        most = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        length = min(most, tokenizer.model_max_length)
        short: dict[str, object] = {"padding": True, "truncation": True, "max_length": length}
        whole = {**short, "padding": "max_length"}
        one, other = (self._run(model, ["a"], padding) for padding in (short, whole))
        moved = float((one - other).norm() / one.norm())
        return short if moved < _UNREAD else whole
