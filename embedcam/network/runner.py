"""`Runner`: how a module is run: what goes in, in which precision, hooked where, read how.

The only file that registers hooks, and the one that calls the user's code.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._files import ProcessLock
from ..errors import EmbedcamError, NetworkError
from .gradients import SeveralRun, at_least_single
from .layers import (
    Images,
    Layout,
    LayoutName,
    OutputChoice,
    axes_told,
    check_images,
    choose_embedding,
    find_layers,
    first_tensor,
    replace_first,
    resolve,
    smaller,
)
from .module import ModuleState, bare_name, input_channels, no_gradients, uncompiled, user_code

Change = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A layer's output -> what to keep of it, and what to hand on."""
LayoutOptions = tuple[LayoutName, tuple[int, int] | None, int | None]
"""Layout, grid and prefix tokens, as they were given."""


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


def _run_whole(module: nn.Module, images: Tensor) -> Any:
    with user_code(f"the network ({type(module).__name__})", module, images):
        return module(images.clone())  # which it may change in place


def run_head(head: Callable[[Any], Any], activations: Any) -> Any:
    """Return what a head given as a function makes of activations in the layer's own layout."""
    shown = activations if isinstance(activations, Tensor) else None
    with user_code(f"the head ({_named(head)})", head, shown):
        return head(activations)


def _named(part: object) -> str:
    return getattr(part, "__qualname__", type(part).__name__)


def _run_hooked(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    change: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Any, list[Tensor]]:
    """Return what the module returned, and what `change(place, output)` kept of each layer's."""
    hooks = [ForwardHook(name, partial(change, place)) for place, (name, _) in enumerate(layers)]
    with _registered([(part, hook) for (_, part), hook in zip(layers, hooks, strict=True)]):
        output = _run_whole(module, images)
    return output, [hook.kept for hook in hooks]


def _run_parts(
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


def _run_layers(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    images: Tensor,
    differentiable: bool,
) -> tuple[Any, list[Tensor], list[int]]:
    """Return the output, each layer's own, and the layers' places in the order they ran."""
    order: list[int] = []

    def keep(place: int, raw: Tensor) -> tuple[Tensor, Tensor]:
        order.append(place)
        if not differentiable:
            return raw.clone(), raw
        # Behind the first, a layer's output is part of the graph already.
        kept = raw if raw.requires_grad else raw.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)  # until the end of the caller's context
        return kept, kept.clone()  # what follows may begin with an in-place unit

    output, kept = _run_hooked(module, layers, images, keep)
    return output, kept, [order.index(place) for place in range(len(layers))]


def _watch(
    module: nn.Module, parts: Mapping[str, nn.Module], images: Tensor
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that parts return in one run, in order; those before a failure count."""
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
        _run_whole(module, images)
    return shapes


def with_positions(module: nn.Module, images: Tensor, before: str | None = None) -> list[str]:
    """Return the names of layers with several positions, in the order they run, up to `before`."""
    shapes = _watch(module, {bare_name(n): part for n, part in module.named_modules() if n}, images)
    names = list(shapes)
    names = names[: names.index(before)] if before in names else names
    return [
        name
        for name in names
        if len(shape := shapes[name]) in (3, 4)
        and shape[0] == len(images)
        and (shape[1] > 1 if len(shape) == 3 else max(shape[2:]) > 1)
    ]


@dataclass(eq=False)
class Runner:
    """Runs a module hooked at its layer, or a trunk and a head, and reads what they return.

    Remembers the input's size, layouts, and in which type a trunk returns one plain tensor.
    """

    module: nn.Module
    layer: str
    hooked: nn.Module
    trunk: Callable[[Tensor], Any] | None
    head: Callable[[Any], Any] | None
    output: OutputChoice
    layout_options: LayoutOptions
    input_size: tuple[int, int] | None
    told_device: torch.device | None
    autocast: torch.dtype | None
    channels_last: bool
    layout: Layout | None = None
    example: Tensor | None = None
    plain_dtype: torch.dtype | None = None
    lock: ProcessLock = field(default_factory=ProcessLock)
    _last_layout: tuple[tuple[torch.Size, torch.Size], Layout] | None = None
    _told: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.channels = input_channels(self.module)
        run_by = [part for part in self.parts or () if isinstance(part, nn.Module)]
        self.state = ModuleState([self.module, *run_by])

    @property
    def device(self) -> torch.device:
        """Where images are sent: where the parameters are, unless told at construction."""
        return self.told_device or self.state.device

    @property
    def parts(self) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]] | None:
        """Trunk and head, where the network was given as two functions."""
        return None if self.trunk is None or self.head is None else (self.trunk, self.head)

    @property
    def over_positions(self) -> bool:
        """Whether inputs are signals, tables or words instead of images."""
        return self.layout_options[0] == "bkl"

    def prepare(self, images: Images) -> Tensor:
        """Return images as the module wants them: `[B C H W]`, its device, dtype and format."""
        self.state.refuse_training()
        checked = check_images(images, self.over_positions)
        if self.over_positions:
            self.example = checked[:1] if self.example is None else self.example
        elif self.input_size is None:
            self.input_size = checked.shape[2], checked.shape[3]
            self.channels = checked.shape[1]
        # Numbers of words stay whole, in a width that every embedding table takes.
        kind = self.state.dtype if checked.is_floating_point() else torch.int64
        batch = checked.to(self.device, kind)
        if self.channels_last and not self.over_positions:
            batch = batch.contiguous(memory_format=torch.channels_last)
        # An inference tensor cannot take part in gradients.
        return batch.clone() if batch.is_inference() else batch

    def precision(self, autocast: bool = True) -> AbstractContextManager[Any]:
        """Return the context of the chosen precision, shielded from an autocast around the call."""
        kind = self.device.type
        if self.autocast is not None and autocast:
            # Casted weights must not be cached: the first use may be without gradients.
            return torch.autocast(kind, dtype=self.autocast, cache_enabled=False)
        # Asked first on the CPU, which knows autocast: devices that do not would raise.
        known = kind == "cpu" or torch.amp.autocast_mode.is_autocast_available(kind)
        if known and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()

    def call(self, images: Tensor, change: Change, batch: int | None) -> tuple[Tensor, Tensor]:
        """Run once, hooked at the layer: z `[batch D]`, and what `change` kept."""
        if self.parts is not None:
            trunk, head = self.parts

            def run_trunk(inputs: Tensor) -> Any:
                output = trunk(inputs)
                if self.autocast is None or torch.is_autocast_enabled(self.device.type):
                    self.plain_dtype = output.dtype if isinstance(output, Tensor) else None
                return output

            output, kept = _run_parts(run_trunk, head, self.layer, images, change)
        else:
            layer = [(self.layer, self.hooked)]
            with self.lock:
                output, (kept,) = _run_hooked(
                    self.module, layer, images, lambda _, raw: change(raw)
                )
        return at_least_single(choose_embedding(output, self.output, batch)), kept

    def call_layers(
        self, images: Images, layers: Sequence[str], differentiable: bool = True
    ) -> SeveralRun:
        """Run once, hooked at several layers of a module."""
        named = find_layers(self.module, layers)
        if self.parts is not None:
            raise NetworkError(
                "this network was given as trunk and head, so no other layer can be found in it; "
                "give it as a module and a layer"
            )
        with no_gradients(), self.precision(), self.lock:
            batch = self.prepare(images)
            output, kept, depth = _run_layers(self.module, named, batch, differentiable)
            z = at_least_single(choose_embedding(output, self.output, len(batch)))
        names = [name for name, _ in named]
        layouts = [self._layout_of(name, raw, batch) for name, raw in zip(names, kept, strict=True)]
        return SeveralRun(names, z, kept, batch, layouts, depth)

    def traceable(
        self, probe: Images, layers: Sequence[str]
    ) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return images -> z `[B D]`, layers' `[B K H W]`, laid out as on the probe; no checks."""
        if self.parts is not None and list(layers) == [self.layer]:
            with no_gradients(), self.precision(False):
                batch = self.prepare(probe)
                _, raw = self.call(batch, lambda raw: (raw, raw), 1)
            layouts = [self.read_layout(batch, raw)]
        else:
            layouts = self.call_layers(probe, layers, differentiable=False).layouts

        def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
            if self.parts is not None:
                output, kept = _run_parts(*self.parts, self.layer, images, copied)
                raws = [kept]
            else:
                named = find_layers(self.module, layers)
                output, raws, _ = _run_layers(self.module, named, images, False)
            z = at_least_single(choose_embedding(output, self.output, None))
            return z, [layout.to_maps(raw) for layout, raw in zip(layouts, raws, strict=True)]

        return run

    def read_layout(self, images: Tensor, raw: Tensor) -> Layout:
        """Return the layout of the layer's output for `images`, read anew where shapes change."""
        shapes = (raw.shape, images.shape)
        known = self._last_layout
        if known is None or known[0] != shapes:
            known = shapes, self._layout_of(self.layer, raw, images)
            self._last_layout, self.layout = known, known[1]
        return known[1]

    def _layout_of(self, layer: str, raw: Tensor, images: Tensor) -> Layout:
        """Return a layout by the network's own options for its own layer; others are asked."""
        kind, grid, prefix = self.layout_options
        if layer != self.layer:
            kind, grid, prefix = "bkl" if kind == "bkl" else "auto", None, None
        told = self._axes(layer, raw, images) if kind == "auto" else kind
        return resolve(raw, images, told, grid, prefix, layer)

    def _axes(self, layer: str, raw: Tensor, images: Tensor) -> str:
        """Return which axes of a layer are positions, those a smaller input changes; asked once."""
        if layer not in self._told and raw.ndim in (3, 4):
            shape = tuple(raw.shape)
            # Where tokens are as many as images, a larger batch: a smaller input has fewer tokens.
            more = len(images) == 1 or shape[0] == shape[1]
            few = images[:1].repeat(len(images) + 1 if more else 1, 1, 1, 1)
            size = (int(images.shape[2]), int(images.shape[3]))
            answers = (
                self._shape_for(layer, few[:, :, :height, :width].contiguous())
                for height, width in smaller(size)
            )
            answer = next(filter(None, answers), ())
            self._told[layer] = axes_told((shape, answer), (len(images), len(few)), size, layer)
        return self._told.get(layer, "auto")

    def _shape_for(self, layer: str, images: Tensor) -> tuple[int, ...]:
        """Return the shape of a layer's output for an input; nothing where it is not taken."""
        with no_gradients(), self.precision(), uncompiled(), self.lock:
            if self.parts is None:
                parts = dict(find_layers(self.module, [layer]))
                return _watch(self.module, parts, images).get(layer, ())
            with suppress(EmbedcamError):
                kept = _run_parts(
                    self.parts[0], lambda raw: raw, layer, images, lambda raw: (raw, raw)
                )[1]
                return tuple(kept.shape)
        return ()


def copied(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a copy and hand on the original: what follows may change it in place."""
    return raw.clone(), raw
