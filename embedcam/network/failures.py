"""What goes wrong in code that is not embedcam's: a network's forward, its derivative, a choice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import EmbedcamError, InputError, NetworkError, ran_out, text_of

_MOST = 300
_ADVICE = {
    "missing 1 required": "embedcam calls it with images alone: give one that takes nothing else",
    "Expected more than 1 value per channel": "it norms by the statistics of the batch, also in "
    "eval mode, so that one picture cannot be embedded alone: use a norm with running statistics",
    "Inference tensors cannot be": "it keeps a tensor made inside torch.inference_mode: make the "
    "network anew, and run it under torch.no_grad instead",
}
_OTHERWISE = "call it by itself on a tensor of that shape to see the whole of it"


@contextmanager
def own_failures(
    what: str, module: Any = None, images: Tensor | None = None, advice: str = _OTHERWISE
) -> Iterator[None]:
    """Report an exception of the user's own code as that, the exception kept as the cause.

    Args:
        what: the code that runs inside, such as "the network (ResNet)".
        module: whose parts are looked for in the traceback, where it is a module.
        images: its input, whose shape is told.
        advice: what to do next, where the exception itself does not say.

    Raises:
        NetworkError: for whatever was raised inside, with its message and the part it came from;
            errors of embedcam's own, and those of memory, pass as they are.
        InputError: for inputs with a wrong number of channels.
    """
    try:
        yield
    except EmbedcamError:
        raise
    except (Exception, SystemExit) as error:
        if ran_out(error):
            raise
        said = said_of(error)
        if images is not None and "channels, but got" in said:
            raise InputError(
                f"the images are {list(images.shape)}, and the network takes another number of "
                f"channels ({said}); give inputs as the network's preprocessing makes them"
            ) from error
        shown = "" if images is None else f" on an input {list(images.shape)}"
        raise NetworkError(
            f"{what} failed{shown}{_place(error, module)} with {type(error).__name__}: "
            f"{said or 'no message'}; {advice_of(said) or advice}"
        ) from error


def advice_of(said: str) -> str | None:
    """What to do about a message whose cause is known, whatever the input was."""
    return next((step for sign, step in _ADVICE.items() if sign in said), None)


def said_of(error: BaseException) -> str:
    """An exception's own message on one line, no longer than one reads."""
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    # TorchScript begins with its own traceback and ends with the reason.
    line = lines[-1 if "TorchScript interpreter" in lines[0] else 0] if lines else ""
    return line[:_MOST].rstrip(". ")


def _place(error: BaseException, module: Any) -> str:
    """ ", in its layer 'encoder.norm' (LayerNorm),": the innermost part in the traceback."""
    if not isinstance(module, nn.Module):
        return ""
    names = {id(part): (name, part) for name, part in module.named_modules() if name}
    found, trace = None, error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return "" if found is None else f", in its layer {found[0]!r} ({type(found[1]).__name__}),"
