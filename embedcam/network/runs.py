"""How a network's module is run: what goes in, in which precision, tapped where, read how.

The other half of `EmbeddingNetwork`, which says what for.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from .gradients import Features, at_least_single, make_features
from .injected import Injected
from .layouts import (
    Layout,
    LayoutName,
    OutputChoice,
    check_images,
    choose_embedding,
    resolve,
)
from .probe import probe_inputs
from .state import ModuleState
from .tap import Change, run_parts, run_tapped

DEFAULT_INPUT_SIZE = (224, 224)
Images = np.ndarray | Tensor


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
    _input_size: tuple[int, int] | None
    _example: Tensor | None
    _device: torch.device | None
    _state: ModuleState
    _lock: threading.RLock

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
            float32 `[count 3 H W]`.
        """
        return probe_inputs(count, self.preprocess, self._input_size or DEFAULT_INPUT_SIZE)

    # ---------------------------------------------------------------- runs

    def head_outputs(self, image: Images, activations: Tensor) -> Tensor:
        """The head alone, on other activations than the layer's own; no gradients.

        Args:
            image: one input, `[1 C H W]`: its prefix tokens, if any, are kept, and the trunk runs
                on it once (where a module cannot mix batches, once for each of the activations).
            activations: `[n K H W]`.

        Returns:
            z `[n D]`, before any normalisation.
        """
        with torch.inference_mode(), self._autocast(True):
            batch = self._prepare(image)
            if self._layout is None:
                _, raw = self._call(batch, lambda raw: (raw, raw.clone()), 1)
                self._read_layout(batch, raw)
            assert self._layout is not None
            z = Injected(self._call, batch, self._layout)(activations.to(batch.device))
        with torch.inference_mode(False):
            return z.clone()

    def run_several(
        self,
        images: Images,
        run: Callable[[nn.Module, Tensor], tuple[Any, list[Tensor], list[int]]],
    ) -> tuple[Tensor, list[Tensor], Tensor, list[int]]:
        """For `several_pass`: z `[B D]`, what `run` kept, the prepared input, and `run`'s order."""
        with torch.inference_mode(False), torch.no_grad(), self._autocast(True), self._lock:
            batch = self._prepare(images)
            output, kept, order = run(self.module, batch)
            z = at_least_single(choose_embedding(output, self.output, len(batch)))
        return z, kept, batch, order

    def run_from_input(
        self, images: Images, mode: AbstractContextManager[Any] | None
    ) -> tuple[Features, Tensor, Tensor]:
        """For `input_gradient`: features, z `[B D]` and the input as a leaf, gradients kept."""
        with torch.inference_mode(False), torch.enable_grad(), self._autocast(True):
            leaf = self._prepare(images).detach().clone().requires_grad_()
            with mode or nullcontext():
                # The clone keeps what an in-place unit behind the layer would overwrite.
                z, raw = self._call(leaf, lambda raw: (raw.detach().clone(), raw), len(leaf))
        with torch.inference_mode(False), torch.no_grad():
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
            self._input_size = (checked.shape[2], checked.shape[3])
        # Numbers of words stay whole, in a width that every embedding table takes.
        kind = self.dtype if checked.is_floating_point() else torch.int64
        batch = checked.to(self.device, kind)
        if self.channels_last and not over_positions:
            batch = batch.contiguous(memory_format=torch.channels_last)
        # Outside inference mode, an inference tensor cannot take part in gradients.
        inference = batch.is_inference() and not torch.is_inference_mode_enabled()
        return batch.clone() if inference else batch

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
            output, kept = run_parts(self._trunk, self._head, self.layer, images, change)
        else:
            assert self._hooked is not None
            with self._lock:
                output, kept = run_tapped(self.module, self._hooked, self.layer, images, change)
        return at_least_single(choose_embedding(output, self.output, batch)), kept

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
            kind, grid, prefix = self._layout_options
            known = shapes, resolve(raw, images, kind, grid, prefix, self.layer)
            self._last_layout, self._layout = known, known[1]
        return known[1]

    def _features(
        self, images: Tensor, z: Tensor, raw: Tensor, allow_zero: bool = False
    ) -> tuple[Features, Layout]:
        layout = self._read_layout(images, raw)
        maps = layout.to_maps(raw)
        return make_features(images, z, maps, self.normalize, allow_zero), layout
