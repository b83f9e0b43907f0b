"""What a user says of a network beside its module and layer, checked before it is believed."""

import torch

from ..errors import InputError
from .layers import OutputChoice
from .texts import TextTower

_AUTOCAST = (None, torch.bfloat16, torch.float16)


def refuse_settings(
    *,
    normalize: bool,
    channels_last: bool | None,
    name: str | None,
    autocast: torch.dtype | None,
    output: OutputChoice,
    texts: TextTower | None,
) -> None:
    """Refuse settings of another kind than `EmbeddingNetwork` takes."""
    chooses = output is None or isinstance(output, str | int) or callable(output)
    for setting, value, fits, expected in (
        ("normalize", normalize, isinstance(normalize, bool), "True or False"),
        (
            "channels_last",
            channels_last,
            isinstance(channels_last, bool | None),
            "True, False or None",
        ),
        ("name", name, isinstance(name, str | None), "a text, or None"),
        ("autocast", autocast, autocast in _AUTOCAST, "torch.bfloat16, torch.float16 or None"),
        ("output", output, chooses, "a name, a position or a function"),
        ("texts", texts, texts is None or callable(texts), "a function of a list of texts"),
    ):
        if not fits:
            raise InputError(f"{setting}={value!r}; give {expected}")


def place_of(device: str | torch.device | None) -> torch.device | None:
    """Return a device by its name; an `InputError` where there is none of that name."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device={device!r} is no torch device; give one such as 'cpu' or 'cuda'"
        ) from error
