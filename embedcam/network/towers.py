"""What networks of other libraries are made into: an image side, a text side, the layer found."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..preprocess import AnyPreprocess
from ..preprocess.probe import probe_inputs
from .checkpoints import read_affine
from .finding import find_explained
from .module import calls_of, input_channels, module_device, no_gradients
from .source import Loaded, PathLike

Images = Callable[[nn.Module, Tensor], Tensor]
"""A library's model and images `[B 3 H W]` -> their embeddings `[B D]`."""
Words = Callable[[nn.Module, Sequence[str]], Tensor]
"""A library's model and texts -> their embeddings `[n D]`."""


class ImageSide(nn.Module):
    """A library's model as a function of images alone, perhaps with an affine map behind it.

    `module` as other wrappers call it, so that layers keep the library's own names.
    """

    def __init__(self, module: nn.Module, embed: Images, head: nn.Linear | None = None) -> None:
        super().__init__()
        # Not .eval(), which would change a module that is somebody else's.
        self.training = module.training
        self.module, self.embed = module, embed
        self.embedding_head = head or nn.Identity().train(module.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings `[B D]` of images `[B 3 H W]`."""
        embedding: Tensor = self.embedding_head(self.embed(self.module, images))
        return embedding


class TextSide(nn.Module):
    """A library's model as a function of texts: `TextTower`. A module, so that it can be moved."""

    def __init__(self, module: nn.Module, embed: Words) -> None:
        super().__init__()
        self.training = module.training
        self.module, self.embed = module, embed

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings `[n D]` of texts."""
        return self.embed(self.module, texts)


def assembled(
    model: nn.Module,
    images: Images,
    words: Words | None,
    preprocess: AnyPreprocess | None,
    head: PathLike = None,
    size: tuple[int, int] = (224, 224),
) -> Loaded:
    """Return a library's model as a network, its layer found by a probe picture.

    The probe's `size` matters without a preprocessing. Of the model the network has the parts that
    pictures go through; nothing of it is changed.
    """
    probe = torch.from_numpy(probe_inputs(1, preprocess, size, input_channels(model)))
    probe = probe.to(module_device(model), _dtype(model))
    with no_gradients(), calls_of(model) as called:
        width = ImageSide(model, images)(probe).shape[1]
    linear = None if head is None else read_affine(head, width)
    side = ImageSide(_only(model, called), images, linear)
    found = find_explained(side, probe)
    if found is None:
        raise NetworkError(
            f"no layer of {type(model).__name__} was found whose positions reach the embedding; "
            "give EmbeddingNetwork(module, layer) with a module that embeds images"
        )
    texts = None if words is None else TextSide(model, words)
    return Loaded(side, found.layer, preprocess, prefix_tokens=found.prefix_tokens, texts=texts)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _only(module: nn.Module, called: Sequence[str], prefix: str = "") -> nn.Module:
    """Return a module without the parts that were not called, such as a tower for texts.

    Parts are left out of what was not called itself, but by a method of another name; others may
    use a part without calling it. What loses a part is a copy that shares all that is left.
    """
    whole, kept = prefix.rstrip(".") in called and prefix != "", dict[str, nn.Module]()
    for name, child in module.named_children():
        if any(f"{one}.".startswith(f"{prefix}{name}.") for one in called):
            kept[name] = _only(child, called, f"{prefix}{name}.")
        elif whole:
            kept[name] = child
    if all(kept.get(name) is child for name, child in module.named_children()):
        return module
    part = copy.copy(module)
    part._modules = dict(kept)
    return part
