"""Networks of sentence-transformers that embed images, by name or folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess, Preprocess
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
from .towers import assembled
from .transformers_source import preprocess_of

_OWN = "sentence_transformers."


def from_sentence_transformers(
    name: str, weights: PathLike, head: PathLike, sides: Sides, seed: int
) -> Loaded:
    """Load a model of sentence-transformers by its name on the hub or its folder.

    What is there is taken without asking the hub. No code of the model's own is run, no pickle.
    """
    library, full = imported("sentence_transformers", f"st:{name}"), f"st:{name}"
    place = place_of(full)
    _refuse_code(Path(place) / "modules.json", full)

    def load(local: bool) -> Foreign:
        return library.SentenceTransformer(
            place,
            device="cpu",
            local_files_only=local,
            trust_remote_code=False,
            model_kwargs={"weights_only": True},
        )

    def build(pretrained: bool) -> Foreign:
        model = fetched(load, full, "the whole")
        return model if pretrained else _initialized(model)

    model = made(build, full, weights, seed).eval().float()
    load_weights(model, weights, [])
    return _assembled(model, full, head, sides)


def wrapped(model: nn.Module) -> Loaded:
    """Return a SentenceTransformer that embeds images as a network."""
    return _assembled(model, f"the {type(model).__name__}", None, None)


def _refuse_code(modules: Path, full: str) -> None:
    """Refuse a folder whose modules are code of its own, before any of it is read as such."""
    try:
        entries = json.loads(modules.read_text("utf-8")) if modules.is_file() else []
        kinds = [str(entry["type"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NetworkError(
            f"the modules.json of {full} cannot be read ({type(error).__name__}); save the model "
            "again with save_pretrained"
        ) from error
    if other := [kind for kind in kinds if not kind.startswith(_OWN)]:
        raise NetworkError(
            f"{full} is made of code that comes with it ({other[0]}), which is not run by name; "
            "load it yourself and give EmbeddingNetwork.from_sentence_transformers(model)"
        )


def _initialized(model: Foreign) -> Foreign:
    """Return the model with weights as its libraries draw them."""
    first = model[0]
    first.model = type(first.model)(first.model.config)
    for part in [inner for one in list(model)[1:] for inner in one.modules()]:
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return model


def _assembled(model: Foreign, full: str, head: PathLike, sides: Sides) -> Loaded:
    kinds = getattr(model[0], "modalities", ["image", "text"])
    processor = getattr(model[0], "processor", None)
    if "image" not in kinds or processor is None:
        raise NetworkError(
            f"{full} embeds {' and '.join(map(str, kinds))}, no pictures; name a model for images, "
            "such as clip-ViT-B-32"
        )
    preprocess: AnyPreprocess = preprocess_of(processor)
    words = _words if "text" in kinds else None
    if sides is not None and isinstance(preprocess, Preprocess):
        preprocess = preprocess.sized(sides)
    return assembled(model, _images, words, preprocess, head)


def _images(model: Foreign, images: Tensor) -> Tensor:
    # Earlier versions ask which of the inputs are images; a list fixes the batch of an export.
    new = hasattr(model[0], "modalities")
    told = {"modality": "image"} if new else {"image_text_info": [0] * len(images)}
    return _embedding(model, {"pixel_values": images, **told})


def _words(model: Foreign, texts: Sequence[str]) -> Tensor:
    prompt = model.prompts.get(model.default_prompt_name)
    prompted = {} if prompt is None else {"prompt": prompt}
    features = getattr(model, "preprocess", model.tokenize)(list(texts), **prompted)
    device = module_device(model)
    moved = {
        key: one.to(device) if isinstance(one, Tensor) else one for key, one in features.items()
    }
    return _embedding(model, moved)


def _embedding(model: Foreign, features: Mapping[str, object]) -> Tensor:
    embedding: Tensor = model(features)["sentence_embedding"]
    return embedding if model.truncate_dim is None else embedding[:, : model.truncate_dim]
