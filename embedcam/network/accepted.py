"""What can be given as a network, a head or a preprocessing: refused where the network is made."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import InputError, NetworkError
from ..preprocess import CustomPreprocess
from ..preprocess.probe import probe_inputs
from .layouts import is_pair


def refuse_module(module: Any) -> None:
    """Refuse a module that hooks do not reach into, or that takes something else than images.

    Raises:
        InputError: no module at all.
        NetworkError: with what to give instead.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module, given {_kind(module)}; for two functions use "
            "EmbeddingNetwork.from_parts(trunk, head)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError(
            f"the network is a TorchScript module ({kind}), whose layers cannot be watched; give "
            "the module it was made from, or its two halves as EmbeddingNetwork.from_parts(trunk, "
            "head)"
        )
    if any(base.__name__ == "SentenceTransformer" for base in type(module).__mro__):
        raise NetworkError(
            "a SentenceTransformer takes a dict of features, not images; give the vision model in "
            "it, such as model[0].model.vision_model, with its layer and preprocess="
        )
    main = getattr(module, "main_input_name", "pixel_values")
    if main != "pixel_values":
        raise NetworkError(
            f"{kind} takes {main!r} first, not images; give its vision part, such as "
            "CLIPVisionModelWithProjection or model.vision_model"
        )
    _refuse_arguments(module, kind)


def _refuse_arguments(module: nn.Module, kind: str) -> None:
    """Refuse a forward that cannot be called with images alone."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # builtins tell nothing; the first run will
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    asked = [
        one.name
        for place, one in enumerate(parameters)
        if one.default is one.empty
        and one.kind not in variable
        and (place > 0 or one.kind is one.KEYWORD_ONLY)
    ]
    if asked:
        raise NetworkError(
            f"the forward of {kind} also asks for {', '.join(asked)}, and embedcam calls it with "
            "images alone; give a module whose forward takes nothing else, such as one around it"
        )


def refuse_parts(
    trunk: Callable[..., Any] | None, head: Callable[..., Any] | None, whole: bool
) -> None:
    """Refuse a trunk or a head that cannot be called, and a trunk without its head.

    Args:
        trunk, head: as given, perhaps None.
        whole: whether a module runs instead of them, so that both may be missing.

    Raises:
        InputError: with what to give.
    """
    for part, role in ((trunk, "trunk"), (head, "head")):
        if part is None and whole:
            continue
        if not callable(part) or isinstance(part, type):
            raise InputError(f"{role} is {_kind(part)}; expected something to call")
    if trunk is not None and head is None:
        raise InputError(
            "trunk= was given without head=, so nothing leads from its activations to the "
            "embedding; give both, as EmbeddingNetwork.from_parts(trunk, head), or neither"
        )


def refuse_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of another type than they have.

    Args:
        settings: by name: normalize, channels_last, name, input_size, device, autocast.

    Raises:
        InputError: naming the setting.
    """
    for name in ("normalize", "channels_last"):
        if not isinstance(settings[name], bool):
            raise InputError(f"{name}={settings[name]!r}; give True or False")
    if not isinstance(settings["name"], str | None):
        raise InputError(f"name={settings['name']!r}; give a text, or None")
    size = settings["input_size"]
    if size is not None and not is_pair(size):
        raise InputError(f"input_size={size!r} is not a size; give (H, W) in pixels")
    if settings["autocast"] not in (None, torch.bfloat16, torch.float16):
        raise InputError(
            f"autocast={settings['autocast']!r}; give torch.bfloat16, torch.float16 or None"
        )
    try:
        torch.device(settings["device"] or "cpu")
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device={settings['device']!r} is no torch device; give one such as 'cpu' or 'cuda'"
        ) from error


def refuse_preprocess(preprocess: Any) -> None:
    """Try a caller's own transform on the synthetic picture.

    Raises:
        InputError: it fails, returns no input `[C H W]`, or another one each time.
    """
    if not isinstance(preprocess, CustomPreprocess):
        return
    steps = getattr(preprocess.transform, "transforms", None)
    steps = steps if isinstance(steps, list | tuple) else []
    # A flip in one of two pictures would pass a trial too often.
    random = any(type(step).__name__.startswith("Random") for step in steps)
    first, second = (probe_inputs(1, preprocess, (1, 1)) for _ in range(2))
    if random or first.shape != second.shape or (first != second).any():
        raise InputError(
            f"preprocess {preprocess.name}: gives another input each time it sees one picture; "
            "give the transform that is used for evaluation, without random steps"
        )


def _kind(value: Any) -> str:
    """What was given, in a word."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
