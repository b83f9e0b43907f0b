"""One run of a network, tapped at the layer. The only file that registers hooks.

And the only one that calls the user's code: what it raises is told as the network's own.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError, NetworkError
from .failures import own_failures
from .layers import bare_name
from .layouts import first_tensor, replace_first

Change = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What a tap does with the layer's output: what to keep of it, and what to hand on."""


class Parts(nn.Module):
    """Trunk and head side by side, for their parameters; neither is changed."""

    def __init__(self, trunk: Any, head: Any) -> None:
        super().__init__()
        self.training = False
        for name, part in (("trunk", trunk), ("head", head)):
            if isinstance(part, nn.Module):
                self.add_module(name, part)


class _Tap:
    """Sees the layer's output once, keeps one tensor of it and decides what goes on."""

    def __init__(self, change: Change, layer: str) -> None:
        self.change, self.layer = change, layer
        self.kept: Tensor | None = None
        self.calls = 0
        self.thread = threading.get_ident()

    def take(self, output: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            return output
        self.kept, onward = self.change(first_tensor(output, self.layer))
        return replace_first(output, onward)

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        # Another thread may be running the same module for somebody else.
        return self.take(output) if threading.get_ident() == self.thread else None


def run_whole(module: nn.Module, images: Tensor) -> Any:
    """What a module returns for its input, of which it gets a copy: it may change it in place.

    Raises:
        NetworkError, InputError: as `own_failures` says.
    """
    with own_failures(f"the network ({type(module).__name__})", module, images):
        return module(images.clone())


def run_head(head: Callable[[Any], Any], activations: Any) -> Any:
    """What a head that was given as a function returns for activations in the layer's own layout.

    Raises:
        NetworkError: as `own_failures` says.
    """
    shown = activations if isinstance(activations, Tensor) else None
    with own_failures(f"the head ({_named(head)})", head, shown):
        return head(activations)


def _named(part: Any) -> str:
    return getattr(part, "__qualname__", type(part).__name__)


def run_tapped(
    module: nn.Module, hooked: nn.Module, layer: str, images: Tensor, change: Change
) -> tuple[Any, Tensor]:
    """(what the module returned, what `change` kept of its layer's output).

    Raises:
        NetworkError: the layer is called never or more than once. The hook is gone either way.
    """
    tap = _Tap(change, layer)
    handle = hooked.register_forward_hook(tap)
    try:
        output = run_whole(module, images)
    finally:
        handle.remove()
    _check_called(tap)
    assert tap.kept is not None
    return output, tap.kept


def _check_called(tap: _Tap) -> None:
    if tap.kept is None:
        raise NetworkError(
            f"layer {tap.layer!r} is never called in a forward; choose one that is, or give the "
            "network as two functions with EmbeddingNetwork.from_parts"
        )
    if tap.calls > 1:
        raise NetworkError(
            f"layer {tap.layer!r} is called {tap.calls} times in one forward, so its output is not "
            "one thing; choose a layer that is called once, such as the block around it"
        )


def run_parts(
    trunk: Callable[[Tensor], Any],
    head: Callable[[Any], Any],
    layer: str,
    images: Tensor,
    change: Change,
) -> tuple[Any, Tensor]:
    """The same for a network given as two functions, without any hook."""
    tap = _Tap(change, layer)
    with own_failures(f"the trunk ({_named(trunk)})", trunk, images):
        raw = trunk(images.clone())
    output = run_head(head, tap.take(raw))
    assert tap.kept is not None
    return output, tap.kept


def watch(
    module: nn.Module, parts: Mapping[str, nn.Module], images: Tensor
) -> dict[str, tuple[int, ...]]:
    """The shapes of what some parts return in one run, in the order they return.

    What a run returned before it failed is told as well: an input of another size may not suit
    what follows.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    thread = threading.get_ident()

    def look(name: str, output: Any) -> None:
        if threading.get_ident() == thread:
            with suppress(NetworkError):
                shapes.setdefault(name, tuple(first_tensor(output, name).shape))

    handles = []
    try:
        for name, part in parts.items():
            if isinstance(part, torch.jit.ScriptModule):
                continue  # it takes no hooks
            handles.append(part.register_forward_hook(lambda *seen, name=name: look(name, seen[2])))
        with suppress(EmbedcamError):
            run_whole(module, images)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def with_positions(module: nn.Module, images: Tensor, before: str | None = None) -> list[str]:
    """Names of the layers that return maps of several positions, or tokens, in the order they run.

    Args:
        module: the network.
        images: its input, `[B C H W]`.
        before: the layer to stop at.
    """
    shapes = watch(module, {bare_name(n): part for n, part in module.named_modules() if n}, images)
    names = list(shapes)
    names = names[: names.index(before)] if before in names else names
    batch = len(images)
    return [
        name
        for name in names
        if len(shape := shapes[name]) in (3, 4)
        and shape[0] == batch
        and (shape[1] > 1 if len(shape) == 3 else max(shape[2:]) > 1)
    ]


def run_tapped_several(
    module: nn.Module,
    found: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    differentiable: bool = True,
) -> tuple[Any, list[Tensor], list[int]]:
    """Run a module and keep several layers' outputs, differentiable from the first that runs on.

    Args:
        module: the network; gradients are off when it starts, and are on behind the first layer.
        found: (name, layer), each once.
        images: its input.
        differentiable: with False gradients stay off, and copies are kept.

    Returns:
        What the module returned; each layer's output; the layers' places in the order they ran.

    Raises:
        NetworkError: a layer is called never or more than once. The hooks are gone either way.
    """
    order: list[int] = []

    def change(place: int) -> Change:
        def keep(raw: Tensor) -> tuple[Tensor, Tensor]:
            if not differentiable:
                order.append(place)
                return raw.clone(), raw
            # Behind the first, a layer's output is part of the graph already.
            kept = raw if raw.requires_grad else raw.detach().clone().requires_grad_()
            torch.set_grad_enabled(True)  # until the end of the caller's context
            order.append(place)
            return kept, kept.clone()  # what follows may begin with an in-place unit

        return keep

    taps = [_Tap(change(place), name) for place, (name, _) in enumerate(found)]
    handles = []
    try:
        for tap, (_, layer) in zip(taps, found, strict=True):
            handles.append(layer.register_forward_hook(tap))
        output = run_whole(module, images)
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        _check_called(tap)
    kept = [tap.kept for tap in taps if tap.kept is not None]
    return output, kept, [order.index(place) for place in range(len(taps))]
