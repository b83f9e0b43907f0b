"""One run of a network with forward hooks at its layers.

The only file that registers hooks, and the one that calls the user's code.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError, NetworkError
from .layers import first_tensor, replace_first
from .module import bare_name, user_code

Change = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A layer's output -> what to keep of it, and what to hand on."""


class ForwardHook:
    """Sees a layer's output once, keeps one tensor of it and decides what goes on."""

    def __init__(self, layer: str, change: Change) -> None:
        self.layer, self.change = layer, change
        self.calls = 0
        self._kept: Tensor | None = None
        self._thread = threading.get_ident()

    def take(self, output: Any) -> Any:
        """Return the output to go on with."""
        self.calls += 1
        if self.calls > 1:
            return output
        self._kept, onward = self.change(first_tensor(output, self.layer))
        return replace_first(output, onward)

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Take the output of the layer's call, in the thread that is run for."""
        # Another thread may be running the same module for somebody else.
        return self.take(output) if threading.get_ident() == self._thread else None

    @property
    def kept(self) -> Tensor:
        """What was kept; a `NetworkError` where the layer was called never or more than once."""
        if self._kept is None:
            raise NetworkError(
                f"layer {self.layer!r} is never called in a forward; choose one that is, or give "
                "the network as two functions with EmbeddingNetwork.from_parts"
            )
        if self.calls > 1:
            raise NetworkError(
                f"layer {self.layer!r} is called {self.calls} times in one forward, so its output "
                "is not one thing; choose a layer that is called once, such as the block around it"
            )
        return self._kept


@contextmanager
def _registered(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = []
    try:
        for part, hook in hooks:
            handles.append(part.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_whole(module: nn.Module, images: Tensor) -> Any:
    """Return what a module makes of its input: a copy, which it may change in place."""
    with user_code(f"the network ({type(module).__name__})", module, images):
        return module(images.clone())


def run_head(head: Callable[[Any], Any], activations: Any) -> Any:
    """Return what a head given as a function makes of activations in the layer's own layout."""
    shown = activations if isinstance(activations, Tensor) else None
    with user_code(f"the head ({_named(head)})", head, shown):
        return head(activations)


def _named(part: object) -> str:
    return getattr(part, "__qualname__", type(part).__name__)


def run_hooked(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    change: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Any, list[Tensor]]:
    """Return what the module returned, and what `change(place, output)` kept of each layer's."""
    hooks = [ForwardHook(name, partial(change, place)) for place, (name, _) in enumerate(layers)]
    with _registered([(part, hook) for (_, part), hook in zip(layers, hooks, strict=True)]):
        output = run_whole(module, images)
    return output, [hook.kept for hook in hooks]


def run_parts(
    trunk: Callable[[Tensor], Any],
    head: Callable[[Any], Any],
    layer: str,
    images: Tensor,
    change: Change,
) -> tuple[Any, Tensor]:
    """Return the same of a network given as two functions, without any hook."""
    hook = ForwardHook(layer, change)
    with user_code(f"the trunk ({_named(trunk)})", trunk, images):
        raw = trunk(images.clone())
    output = run_head(head, hook.take(raw))
    return output, hook.kept


def run_layers(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    differentiable: bool = True,
) -> tuple[Any, list[Tensor], list[int]]:
    """Run a module whose gradients are off, differentiable behind the first of several layers.

    Returns what the module returned, each layer's output, and the layers' places in the order they
    ran; without `differentiable` gradients stay off and copies are kept.
    """
    order: list[int] = []

    def keep(place: int, raw: Tensor) -> tuple[Tensor, Tensor]:
        order.append(place)
        if not differentiable:
            return raw.clone(), raw
        # Behind the first, a layer's output is part of the graph already.
        kept = raw if raw.requires_grad else raw.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)  # until the end of the caller's context
        return kept, kept.clone()  # what follows may begin with an in-place unit

    output, kept = run_hooked(module, layers, images, keep)
    return output, kept, [order.index(place) for place in range(len(layers))]


def watch(
    module: nn.Module, parts: Mapping[str, nn.Module], images: Tensor
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what parts return in one run, in the order they return.

    Those from before a failure count too: an input of another size may not suit what follows.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    thread = threading.get_ident()

    def look(name: str, output: Any) -> None:
        if threading.get_ident() == thread:
            with suppress(NetworkError):
                shapes.setdefault(name, tuple(first_tensor(output, name).shape))

    hooks = [
        (part, lambda *seen, name=name: look(name, seen[2]))
        for name, part in parts.items()
        if not isinstance(part, torch.jit.ScriptModule)  # it takes no hooks
    ]
    with _registered(hooks), suppress(EmbedcamError):
        run_whole(module, images)
    return shapes


def with_positions(module: nn.Module, images: Tensor, before: str | None = None) -> list[str]:
    """Return the names of layers with several positions, in the order they run, up to `before`."""
    shapes = watch(module, {bare_name(n): part for n, part in module.named_modules() if n}, images)
    names = list(shapes)
    names = names[: names.index(before)] if before in names else names
    return [
        name
        for name in names
        if len(shape := shapes[name]) in (3, 4)
        and shape[0] == len(images)
        and (shape[1] > 1 if len(shape) == 3 else max(shape[2:]) > 1)
    ]
