"""A module's place, precision and mode: what every forward asks, so found once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import NetworkError

# Layers that treat a batch differently in training mode: their numbers would mix images.
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class ModuleState:
    """Asked before every forward; walking a module's parts each time would cost a query 0.1 ms.

    Parts are those the modules had at construction; where they are, their precision and their
    modes are read anew each time.

    Args:
        modules: the network, or the network and the modules it is run by.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        modal = [part for one in modules for part in one.modules() if isinstance(part, _MODAL)]
        self._with_mode = [*modules, *modal]
        found = [
            (value, (part, name))
            for part in modules[0].modules()
            for name, value in part.named_parameters(recurse=False)
        ]
        floating = [place for value, place in found if value.is_floating_point()]
        # The part and the name, not the parameter: loading weights may put another in its place.
        self._first = found[0][1] if found else None
        self._first_floating = floating[0] if floating else None

    @property
    def device(self) -> torch.device:
        """Where the parameters or buffers are; the CPU if there are none."""
        first = _parameter(self._first)
        return module_device(self._modules[0]) if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter; float32 if there is none."""
        first = _parameter(self._first_floating)
        return torch.float32 if first is None else first.dtype

    def refuse_training(self) -> None:
        """Refuse a network in training mode.

        Raises:
            NetworkError: the network itself, or a batch norm or dropout in it, is in training mode.
        """
        if any(part.training for part in self._with_mode):
            for module in self._modules:
                _refuse_training(module)


def _parameter(place: tuple[nn.Module, str] | None) -> nn.Parameter | None:
    return None if place is None else getattr(place[0], place[1], None)


def _is_modeless(module: nn.Module) -> bool:
    """Whether training mode changes nothing: an exported graph, or plain layers without a mode."""
    if type(module).__name__.startswith("GraphModule"):
        return True
    return all(
        type(part).__module__.startswith("torch.nn.") and not isinstance(part, _MODAL)
        for part in module.modules()
    )


def _refuse_training(module: nn.Module) -> None:
    # The graph of an exported program carries a meaningless flag, and no modal layers.
    if module.training and not _is_modeless(module):
        raise NetworkError(
            f"the network ({type(module).__name__}) is in training mode, where batch norm and "
            "dropout make each embedding depend on the others; call .eval() on it first"
        )
    for name, part in module.named_modules():
        if part.training and isinstance(part, _MODAL):
            raise NetworkError(
                f"{name!r} ({type(part).__name__}) of the network is in training mode; call "
                ".eval() on the network first"
            )


@contextmanager
def no_gradients() -> Iterator[None]:
    """Run without gradients, and never in inference mode, also where the caller is in it.

    A network may keep a tensor from its first forward: one made in inference mode could never take
    part in a gradient again.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled code as it was written: an input of another size would compile it again."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def refuse_inference(module: nn.Module) -> None:
    """Refuse parameters that autograd can do nothing with.

    Raises:
        NetworkError: they were made inside inference mode.
    """
    if any(tensor.is_inference() for tensor in _tensors(module)):
        raise NetworkError(
            "the network's parameters were made inside torch.inference_mode and cannot be "
            "differentiated through; make the network outside of it"
        )


def input_channels(module: nn.Module) -> int:
    """How many channels a network's images have: as its first convolution takes them, else 3."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def module_device(module: nn.Module) -> torch.device:
    """Where a module's parameters or buffers are; the CPU if it has none."""
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))


def refuse_elsewhere(module: nn.Module, device: torch.device | None) -> None:
    """Refuse a module that is not where it is said to be: the caller's module is never moved.

    Raises:
        NetworkError: with both places; or its parameters are on the meta device, without values.
    """
    if any(tensor.is_meta for tensor in _tensors(module)):
        raise NetworkError(
            "the network's parameters are on the 'meta' device, so they have no values; call "
            "module.to_empty(device='cpu') and load its weights first"
        )
    found = next((tensor.device for tensor in _tensors(module)), device)
    if device is None or found is None:
        return
    if found.type != device.type or device.index not in (None, found.index):
        raise NetworkError(
            f"device={str(device)!r} was given, but the network is on {str(found)!r}; move it "
            f"with module.to({str(device)!r}) first"
        )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
