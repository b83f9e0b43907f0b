"""How a network's module is run: what goes in, in which precision, tapped where, read how.

The other half of `EmbeddingNetwork`, which says what for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._files import ProcessLock
from ..errors import EmbedcamError, InputError, NetworkError
from ..preprocess.probe import probe_inputs
from .failures import advice_of, said_of
from .gradients import Features, at_least_single, make_features
from .injected import HeadAlone, Injected
from .layers import find_layers
from .layouts import (
    Layout,
    LayoutName,
    OutputChoice,
    axes_told,
    check_images,
    choose_embedding,
    resolve,
    smaller,
)
from .state import ModuleState, no_gradients, uncompiled
from .tap import Change, run_head, run_parts, run_tapped, run_tapped_several, watch

DEFAULT_INPUT_SIZE = (224, 224)
Images = np.ndarray | Tensor


@dataclass
class SeveralRun:
    """One run tapped at several layers.

    names: of the layers, as asked for; z: the head's output `[B D]`; kept: each layer's output;
    batch: the prepared input; layouts: of the layers; depth: their places in the order they ran.
    """

    names: list[str]
    z: Tensor
    kept: list[Tensor]
    batch: Tensor
    layouts: list[Layout]
    depth: list[int]


class ModuleRuns:
    """Runs a module, or a trunk and a head. `EmbeddingNetwork` sets what is declared here."""

    module: nn.Module
    layer: str
    normalize: bool
    output: OutputChoice
    preprocess: Any
    autocast: torch.dtype | None
    channels_last: bool
    _hooked: nn.Module | None
    _trunk: Callable[[Tensor], Any] | None
    _head: Callable[[Any], Any] | None
    _layout_options: tuple[LayoutName, tuple[int, int] | None, int | None]
    _layout: Layout | None
    _last_layout: tuple[tuple[torch.Size, torch.Size], Layout] | None
    _told: dict[str, str]
    _plain: torch.dtype | None
    _input_size: tuple[int, int] | None
    _channels: int
    _example: Tensor | None
    _device: torch.device | None
    _state: ModuleState
    _lock: ProcessLock

    # ---------------------------------------------------------------- facts

    @property
    def device(self) -> torch.device:
        """Where images are sent: where the parameters are, unless told at construction."""
        return self._device or self._state.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: the input is converted to it."""
        return self._state.dtype

    @property
    def layout(self) -> str:
        """The layer's layout, as found in the last forward; before one, as it was given."""
        return self._layout_options[0] if self._layout is None else self._layout.kind

    @property
    def hooked(self) -> bool:
        """Whether layers are found by hooks: False where trunk and head were given."""
        return self._hooked is not None

    @property
    def layout_options(self) -> tuple[LayoutName, tuple[int, int] | None, int | None]:
        """Layout, grid and prefix tokens, as they were given."""
        return self._layout_options

    def probe_images(self, count: int = 1) -> np.ndarray:
        """The synthetic pictures as this network's input, through its own preprocessing.

        Returns:
            float32 `[count C H W]`.
        """
        size = self._input_size or DEFAULT_INPUT_SIZE
        return probe_inputs(count, self.preprocess, size, self._channels)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Say of a failure inside that it was with an input of embedcam's own making.

        Raises:
            NetworkError: the network does not take the probe picture, and what it takes is unknown.
        """
        try:
            yield
        except (NetworkError, InputError) as error:
            cause = error.__cause__
            if cause is None or self.preprocess is not None or advice_of(said_of(cause)):
                raise
            shape = [1, self._channels, *(self._input_size or DEFAULT_INPUT_SIZE)]
            raise NetworkError(
                f"a probe picture {shape} cannot go through the network ("
                f"{said_of(cause)}); give preprocess=, or input_size=(H, W)"
            ) from cause

    # ---------------------------------------------------------------- runs

    def head_outputs(self, image: Images, activations: Tensor) -> Tensor:
        """The head alone, on other activations than the layer's own; no gradients.

        Args:
            image: one input, `[1 C H W]`, see `head_alone`.
            activations: `[n K H W]`.

        Returns:
            z `[n D]`, before any normalisation.
        """
        return self.head_alone(image)(activations)

    def head_alone(self, image: Images, most: int | None = None) -> HeadAlone:
        """The head of one input as a function of the activations; no gradients.

        A head that was given as a function, with its trunk, is called by itself. Elsewhere, and
        where it needs more of the trunk (prefix tokens, or several outputs), the trunk runs on the
        image once a call; where a module cannot mix batches, once for each of the activations.

        Args:
            image: one input, `[1 C H W]`: its prefix tokens, if any, are kept.
            most: inputs at once, where the image must be repeated; None: no limit.
        """
        asked = 0
        with no_gradients(), self._autocast(True):
            batch = self._prepare(image)
            if self._layout is None:
                _, raw = self._call(batch, lambda raw: (raw, raw.clone()), 1)
                self._read_layout(batch, raw)
                asked = 1
        layout, head, dtype = self._layout, self._head, self._plain
        assert layout is not None

        def alone(maps: Tensor) -> Tensor:
            assert head is not None
            # A copy: the head may begin with an in-place unit.
            output = run_head(head, layout.to_raw(maps, maps).to(dtype, copy=True))
            return at_least_single(choose_embedding(output, self.output, len(maps)))

        direct = self._trunk is not None and dtype is not None and layout.prefix == 0
        injected = None if direct else Injected(self._call, batch, layout, most)
        run = injected or alone

        def apply(maps: Tensor) -> Tensor:
            with no_gradients(), self._autocast(True):
                return run(maps.to(batch.device))

        return HeadAlone(apply, injected, asked)

    def run_several(
        self, images: Images, layers: Sequence[str], differentiable: bool = True
    ) -> SeveralRun:
        """One run tapped at several layers; see `several_pass`, and `forward_layers` without.

        Raises:
            InputError: no layer, or one twice.
            NetworkError: an unknown layer, one that runs never or more than once; or trunk and head
                were given, so that no other layer can be found.
        """
        found = find_layers(self.module, layers)
        if self._hooked is None:
            raise NetworkError(
                "this network was given as trunk and head, so no other layer can be found in it; "
                "give it as a module and a layer"
            )
        with no_gradients(), self._autocast(True), self._lock:
            batch = self._prepare(images)
            output, kept, depth = run_tapped_several(self.module, found, batch, differentiable)
            z = at_least_single(choose_embedding(output, self.output, len(batch)))
        names = [name for name, _ in found]
        layouts = [self._layout_of(name, raw, batch) for name, raw in zip(names, kept, strict=True)]
        return SeveralRun(names, z, kept, batch, layouts, depth)

    def forward_layers(
        self, images: Images, layers: Sequence[str]
    ) -> tuple[Features, list[Tensor]]:
        """As `forward`, with the activations `[B K H W]` of several layers, in the order given.

        The features' own are those of the last layer. Raises as `forward` and `run_several`.
        """
        run = self.run_several(images, layers, differentiable=False)
        with no_gradients():
            maps = [
                at_least_single(layout.to_maps(raw)).contiguous()
                for layout, raw in zip(run.layouts, run.kept, strict=True)
            ]
            return make_features(run.batch, run.z, maps[-1], self.normalize), maps

    def traceable(self, layers: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """images `[B C H W]` -> z `[B D]` and the layers' `[B K H W]`, by tensor operations alone.

        For exporters, which follow a run of it; nothing of the input or the output is checked. The
        network is run once on the probe picture, to find out how its layers are laid out.

        Args:
            layers: names; this network's own for one given as trunk and head.

        Raises:
            as `forward` and `run_several`.
        """
        probe = self.probe_images()
        if self._hooked is None and list(layers) == [self.layer]:
            with no_gradients(), self._autocast(False):
                batch = self._prepare(probe)
                _, raw = self._call(batch, lambda raw: (raw, raw), 1)
            layouts = [self._read_layout(batch, raw)]
        else:
            layouts = self.run_several(probe, layers, differentiable=False).layouts

        def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
            if self._trunk is not None:
                assert self._head is not None
                output, kept = run_parts(
                    self._trunk, self._head, self.layer, images, lambda raw: (raw.clone(), raw)
                )
                raws = [kept]
            else:
                found = find_layers(self.module, layers)
                output, raws, _ = run_tapped_several(self.module, found, images, False)
            z = at_least_single(choose_embedding(output, self.output, None))
            return z, [layout.to_maps(raw) for layout, raw in zip(layouts, raws, strict=True)]

        return run

    def run_from_input(
        self, images: Images, mode: AbstractContextManager[Any] | None
    ) -> tuple[Features, Tensor, Tensor]:
        """For `input_gradient`: features, z `[B D]` and the input as a leaf, gradients kept."""
        with torch.inference_mode(False), torch.enable_grad(), self._autocast(True):
            leaf = self._prepare(images).detach().clone().requires_grad_()
            with mode or nullcontext():
                # The clone keeps what an in-place unit behind the layer would overwrite.
                z, raw = self._call(leaf, lambda raw: (raw.detach().clone(), raw), len(leaf))
        with no_gradients():
            features, _ = self._features(leaf.detach(), z.detach(), raw)
        return features, z, leaf

    # ---------------------------------------------------------------- inside

    def _prepare(self, images: Images) -> Tensor:
        """Images as the module wants them: `[B C H W]`, its device, dtype and memory format."""
        self._state.refuse_training()
        over_positions = self._layout_options[0] == "bkl"
        checked = check_images(images, over_positions)
        if over_positions:
            self._example = checked[:1] if self._example is None else self._example
        elif self._input_size is None:
            self._input_size, self._channels = (
                (checked.shape[2], checked.shape[3]),
                checked.shape[1],
            )
        # Numbers of words stay whole, in a width that every embedding table takes.
        kind = self.dtype if checked.is_floating_point() else torch.int64
        batch = checked.to(self.device, kind)
        if self.channels_last and not over_positions:
            batch = batch.contiguous(memory_format=torch.channels_last)
        # An inference tensor cannot take part in gradients.
        return batch.clone() if batch.is_inference() else batch

    def _autocast(self, wanted: bool) -> AbstractContextManager[Any]:
        """The chosen precision; also shields from an autocast around the call."""
        if self.autocast is not None and wanted:
            # Casted weights must not be cached: the first use may be without gradients.
            return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)
        kind = self.device.type
        # Asked first on the CPU, which knows autocast: devices that do not would raise.
        known = kind == "cpu" or torch.amp.autocast_mode.is_autocast_available(kind)
        if known and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()

    def _call(self, images: Tensor, change: Change, batch: int) -> tuple[Tensor, Tensor]:
        """Run the network once with a tap at the layer: z `[batch D]`, and what the tap kept."""
        if self._trunk is not None:
            assert self._head is not None
            output, kept = run_parts(self._run_trunk, self._head, self.layer, images, change)
        else:
            assert self._hooked is not None
            with self._lock:
                output, kept = run_tapped(self.module, self._hooked, self.layer, images, change)
        return at_least_single(choose_embedding(output, self.output, batch)), kept

    def _run_trunk(self, images: Tensor) -> Any:
        """The trunk; notes in which type its output is one plain tensor, as calls compute it."""
        assert self._trunk is not None
        output = self._trunk(images)
        if self.autocast is None or torch.is_autocast_enabled(self.device.type):
            self._plain = output.dtype if isinstance(output, Tensor) else None
        return output

    def _probes(self) -> Images:
        """Two inputs to ask the head with: pictures, or what came first and the same reversed."""
        if self._layout_options[0] != "bkl":
            return self.probe_images(2)
        if self._example is None:
            raise InputError(
                "a network over positions has no probe of its own; run forward() on an input first"
            )
        return torch.cat([self._example, self._example.flip(-1)])

    def _read_layout(self, images: Tensor, raw: Tensor) -> Layout:
        shapes = (raw.shape, images.shape)
        known = self._last_layout
        if known is None or known[0] != shapes:
            known = shapes, self._layout_of(self.layer, raw, images)
            self._last_layout, self._layout = known, known[1]
        return known[1]

    def _layout_of(self, layer: str, raw: Tensor, images: Tensor) -> Layout:
        """The network's own options for its own layer; other layers are asked."""
        kind, grid, prefix = self._layout_options
        if layer != self.layer:
            kind, grid, prefix = "bkl" if kind == "bkl" else "auto", None, None
        told = self._axes(layer, raw, images) if kind == "auto" else kind
        return resolve(raw, images, told, grid, prefix, layer)

    def _axes(self, layer: str, raw: Tensor, images: Tensor) -> str:
        """Which axes of a layer are positions: those that a smaller input changes; asked once."""
        if layer not in self._told and raw.ndim in (3, 4):
            own = tuple(raw.shape)
            # Where tokens are as many as images, a larger batch: a smaller input has fewer tokens.
            more = len(images) == 1 or own[0] == own[1]
            few = images[:1].repeat(len(images) + 1 if more else 1, 1, 1, 1)
            size = (int(images.shape[2]), int(images.shape[3]))
            answer: tuple[int, ...] = ()
            for height, width in smaller(size):
                answer = self._answer(layer, few[:, :, :height, :width].contiguous())
                if answer:
                    break
            self._told[layer] = axes_told((own, answer), (len(images), len(few)), size, layer)
        return self._told.get(layer, "auto")

    def _answer(self, layer: str, images: Tensor) -> tuple[int, ...]:
        """The shape of a layer's output for an input; nothing where it is not taken."""
        with no_gradients(), self._autocast(True), uncompiled(), self._lock:
            if self._trunk is None:
                parts = dict(find_layers(self.module, [layer]))
                return watch(self.module, parts, images).get(layer, ())
            with suppress(EmbedcamError):
                _, kept = run_parts(self._trunk, lambda raw: raw, layer, images, _unchanged)
                return tuple(kept.shape)
        return ()

    def _features(
        self, images: Tensor, z: Tensor, raw: Tensor, allow_zero: bool = False
    ) -> tuple[Features, Layout]:
        layout = self._read_layout(images, raw)
        maps = layout.to_maps(raw)
        return make_features(images, z, maps, self.normalize, allow_zero), layout


def _unchanged(raw: Tensor) -> tuple[Tensor, Tensor]:
    return raw, raw
