"""`Runner`: how a module is run: what goes in, in which precision, hooked where, read how."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._files import ProcessLock
from ..errors import EmbedcamError, NetworkError
from .gradients import SeveralRun, at_least_single
from .hooks import Change, run_hooked, run_layers, run_parts, watch
from .layers import (
    Images,
    Layout,
    LayoutName,
    OutputChoice,
    axes_told,
    check_images,
    choose_embedding,
    find_layers,
    resolve,
    smaller,
)
from .module import ModuleState, input_channels, no_gradients, uncompiled

LayoutOptions = tuple[LayoutName, tuple[int, int] | None, int | None]
"""Layout, grid and prefix tokens, as they were given."""


class Runner:
    """Runs a module hooked at its layer, or a trunk and a head, and reads what they return.

    Remembers what inputs and outputs showed: the input's size, the layer's layout, which axes of a
    layer are positions, and in which type a trunk returns one plain tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        hooked: nn.Module,
        *,
        trunk: Callable[[Tensor], Any] | None,
        head: Callable[[Any], Any] | None,
        output: OutputChoice,
        layout_options: LayoutOptions,
        input_size: tuple[int, int] | None,
        device: torch.device | None,
        autocast: torch.dtype | None,
        channels_last: bool,
    ) -> None:
        self.module, self.layer, self.hooked = module, layer, hooked
        self.trunk, self.head = trunk, head
        self.output, self.layout_options, self.input_size = output, layout_options, input_size
        self.autocast, self.channels_last = autocast, channels_last
        self.channels = input_channels(module)
        self.layout: Layout | None = None
        self.example: Tensor | None = None
        self.plain_dtype: torch.dtype | None = None
        run_by = [part for part in self.parts or () if isinstance(part, nn.Module)]
        self.state = ModuleState([module, *run_by])
        self.lock = ProcessLock()
        self._device = device
        self._last_layout: tuple[tuple[torch.Size, torch.Size], Layout] | None = None
        self._told: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Where images are sent: where the parameters are, unless told at construction."""
        return self._device or self.state.device

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

            output, kept = run_parts(run_trunk, head, self.layer, images, change)
        else:
            layer = [(self.layer, self.hooked)]
            with self.lock:
                output, (kept,) = run_hooked(self.module, layer, images, lambda _, raw: change(raw))
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
            output, kept, depth = run_layers(self.module, named, batch, differentiable)
            z = at_least_single(choose_embedding(output, self.output, len(batch)))
        names = [name for name, _ in named]
        layouts = [self._layout_of(name, raw, batch) for name, raw in zip(names, kept, strict=True)]
        return SeveralRun(names, z, kept, batch, layouts, depth)

    def traceable(
        self, probe: Images, layers: Sequence[str]
    ) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return images -> z `[B D]` and the layers' `[B K H W]`, by tensor operations alone.

        For exporters; nothing of input or output is checked. One run on the probe finds out how
        the layers are laid out. Of trunk and head the only layer is the network's own.
        """
        if self.parts is not None and list(layers) == [self.layer]:
            with no_gradients(), self.precision(False):
                batch = self.prepare(probe)
                _, raw = self.call(batch, unchanged, 1)
            layouts = [self.read_layout(batch, raw)]
        else:
            layouts = self.call_layers(probe, layers, differentiable=False).layouts

        def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
            if self.parts is not None:
                output, kept = run_parts(*self.parts, self.layer, images, copied)
                raws = [kept]
            else:
                output, raws, _ = run_layers(
                    self.module, find_layers(self.module, layers), images, False
                )
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
                return watch(self.module, parts, images).get(layer, ())
            with suppress(EmbedcamError):
                _, kept = run_parts(self.parts[0], lambda raw: raw, layer, images, unchanged)
                return tuple(kept.shape)
        return ()


def unchanged(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the layer's output itself."""
    return raw, raw


def copied(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a copy and hand on the original: what follows may change it in place."""
    return raw.clone(), raw
