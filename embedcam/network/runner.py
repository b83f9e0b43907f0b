"""`Runner`: how a module is run: what goes in, in which precision, hooked where, read how.

The only file that registers hooks, but for those of an attention, and that calls the user's code.
"""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from .._files import ProcessLock
from ..errors import EmbedcamError, EmbeddingError, InputError, NetworkError
from ..preprocess import Embedded
from .attention import AttentionLayer
from .layers import (
    Images,
    Layout,
    LayoutName,
    Output,
    OutputChoice,
    axes_told,
    choose_embedding,
    find_layers,
    first_tensor,
    replace_first,
    resolve,
    smaller,
    split_reading,
)
from .module import (
    MODAL,
    bare_name,
    hookable,
    input_channels,
    module_device,
    no_gradients,
    refuse_training,
    tell_failure,
    twin_of,
    uncompiled,
)
from .reading import LAYOUTS, Reading, ValueLayout, tokens_read

Keep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A layer's output -> what to keep of it, and what to hand on."""
LayoutOptions = tuple[LayoutName, tuple[int, int] | None, int | None]
"""Layout, grid and prefix tokens, as they were given."""
Trunk = Callable[[Tensor], Output]
Head = Callable[[Output], Output]

# What a run gives


@dataclass(frozen=True, eq=False)
class Features:
    """What one forward pass of B images gives; float32, or float64 for a float64 network.

    embedding: `[B D]`, of length 1 iff the network normalizes.
    norm: `[B]`, the length |z| of the head's output z before that.
    activations: `[B K H W]`, whatever the layer's own layout.
    """

    embedding: Tensor
    norm: Tensor
    activations: Tensor


@dataclass(eq=False)
class Run:
    """One run hooked at one layer or several.

    names: of the layers, as asked for; z: the head's output `[B D]`; kept: each layer's output;
    batch: the prepared input; layouts: of the layers; depth: their places in the order they ran;
    readings: by name, of the layers read inside an attention.
    """

    names: list[str]
    z: Tensor
    kept: list[Tensor]
    batch: Tensor
    layouts: list[Layout]
    depth: list[int]
    readings: dict[str, Reading] = field(default_factory=dict)

    def activations(self) -> list[Tensor]:
        """Return `[B K H W]` of each layer, without a graph."""
        return [
            at_least_single(
                self.readings[name].maps if name in self.readings else layout.to_maps(raw.detach())
            ).contiguous()
            for name, raw, layout in zip(self.names, self.kept, self.layouts, strict=True)
        ]

    def features(self, maps: Tensor, normalize: bool, allow_zero: bool = False) -> Features:
        """Return the features with maps `[B K H W]`, all finite, no z of length zero."""
        z = self.z.detach()
        norm = torch.linalg.vector_norm(z, dim=1)
        # In Python: for one query, five small tensor operations cost more than the division.
        lengths = norm.tolist()
        vanished = normalize and 0.0 in lengths
        # One sum tells of most; a sum may also overflow where no number is infinite.
        finite = all(map(math.isfinite, [*lengths, float(maps.sum())]))
        if not finite or (vanished and not allow_zero):
            _refuse_bad(self.batch.detach(), norm, maps, normalize and not allow_zero)
        divisor = torch.where(norm > 0, norm, 1) if vanished else norm
        return Features(z / divisor[:, None] if normalize else z, norm, maps)


def _refuse_bad(images: Tensor, norm: Tensor, maps: Tensor, zero_too: bool) -> None:
    bad_images = ~torch.isfinite(images.flatten(1)).all(dim=1)
    if bool(bad_images.any()):
        raise InputError(
            f"images at positions {listed(bad_images)} of the batch hold NaN or infinity; "
            "check their preprocessing"
        )
    step, precise = "or use normalize=False", "or compute in float32"
    zero, bad_maps = (norm == 0) & zero_too, ~torch.isfinite(maps.flatten(1)).all(1)
    causes = (
        (~torch.isfinite(norm), "the embedding holds NaN or infinity", precise),
        (zero, "the embedding is zero and cannot be normalised", step),
        (bad_maps, "the layer's activations hold NaN or infinity", precise),
    )
    bad = [(flags.nonzero().flatten().tolist(), what, step) for flags, what, step in causes]
    if any(rows for rows, _, _ in bad):
        # The first picture's cause, however large the batch is.
        rows, what, step = min((one for one in bad if one[0]), key=lambda one: one[0][0])
        advice = f"leave the picture out, or check the network's weights, {step}"
        raise EmbeddingError(what, advice, rows, len(norm))


def listed(flags: Tensor) -> str:
    """Return the first few places where flags `[n]` are set, in words."""
    places = flags.nonzero().flatten().tolist()
    return ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")


def not_finite(which: str) -> NetworkError:
    """Return the error for embeddings with NaN or infinity."""
    return NetworkError(
        f"the embeddings {which} hold NaN or infinity; check the weights, or compute in float32"
    )


def at_least_single(values: Tensor) -> Tensor:
    """Return half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


# What a run keeps


def copied(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a copy and hand on the original: what follows may change it in place."""
    return raw.clone(), raw


def in_graph(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a tensor of the graph, which begins at the first layer, and hand on its copy."""
    # Behind the first, a layer's output is part of the graph already.
    kept = raw if raw.requires_grad else raw.detach().clone().requires_grad_()
    torch.set_grad_enabled(True)  # until the end of the caller's context
    return kept, kept.clone()  # what follows may begin with an in-place unit


def run_part(part: Callable[..., Output], what: str, given: Output) -> Output:
    """Return what the user's network, trunk or head makes of what it is given."""
    try:
        return part(given)
    except (Exception, SystemExit) as error:
        name = getattr(part, "__qualname__", type(part).__name__)
        advice = "call it by itself on a tensor of that shape to see the whole of it"
        tell_failure(error, f"the {what} ({name})", advice, part, given)
        raise


def with_positions(module: nn.Module, images: Tensor, before: str | None = None) -> list[str]:
    """Return the names of layers with several positions, in the order they run, up to `before`."""
    shapes: dict[str, tuple[int, ...]] = {}
    thread = threading.get_ident()

    def look(name: str, output: Output) -> None:
        if threading.get_ident() == thread:
            with suppress(NetworkError):
                shapes.setdefault(name, tuple(first_tensor(output, name).shape))

    with ExitStack() as stack, suppress(EmbedcamError):  # what ran before a failure counts
        for dotted, part in hookable(module):
            name = bare_name(dotted)
            hook = part.register_forward_hook(lambda *seen, name=name: look(name, seen[2]))
            stack.enter_context(hook)
        run_part(module, "network", images.clone())
    names = list(shapes)
    return [
        name
        for name in names[: names.index(before) if before in names else None]
        if len(shape := shapes[name]) in (3, 4)
        and shape[0] == len(images)
        and (shape[1] > 1 if len(shape) == 3 else max(shape[2:]) > 1)
    ]


class _Keeper:
    """Takes what layers return in one run of this thread, and hands on what `keep` says."""

    def __init__(self, keep: Keep) -> None:
        self.kept: dict[str, Tensor] = {}
        self._keep, self._calls, self._thread = keep, list[str](), threading.get_ident()

    def take(self, name: str, raw: Tensor) -> Tensor:
        self._calls.append(name)
        if name in self.kept:
            return raw
        self.kept[name], onward = self._keep(raw)
        return onward

    def take_first(self, name: str, output: Output) -> Output:
        """Take the first tensor of what a layer returned."""
        raw = first_tensor(output, name)
        onward = self.take(name, raw)
        return onward if raw is output else replace_first(output, onward)

    def hook(self, name: str) -> Callable[[nn.Module, object, Output], Output]:
        # Another thread may be running the same module for somebody else.
        def taken(_: nn.Module, __: object, output: Output) -> Output:
            return self.take_first(name, output) if threading.get_ident() == self._thread else None

        return taken

    def of(self, name: str) -> Tensor:
        """Return what was kept of a layer, which must have been called once."""
        if name not in self.kept:
            raise NetworkError(
                f"layer {name!r} is never called in a forward; choose one that is, or give "
                "the network as two functions with EmbeddingNetwork.from_parts"
            )
        if (times := self._calls.count(name)) > 1:
            raise NetworkError(
                f"layer {name!r} is called {times} times in one forward, so its output "
                "is not one thing; choose a layer called once, such as the block around it"
            )
        return self.kept[name]


@dataclass(eq=False)
class Runner:
    """Runs a module hooked at its layer, or a trunk and a head, and reads what they return.

    Remembers the input's size, layouts, which layers reach the embedding, in which type a trunk
    returns one plain tensor, and of `held_pass` which steps were opened (None: nothing is held)
    and whether the embedding then is a sum over positions.
    """

    module: nn.Module
    layer: str
    part: nn.Module
    trunk: Trunk | None
    head: Head | None
    output: OutputChoice
    input_size: tuple[int, int] | None
    told_device: torch.device | None
    autocast: torch.dtype | None
    channels_last: bool
    normalize: bool
    layout_options: LayoutOptions = ("auto", None, None)
    example: Tensor | None = None
    plain_dtype: torch.dtype | None = None
    opened: frozenset[int] | None = frozenset()
    sums: bool = False
    lock: ProcessLock = field(default_factory=ProcessLock)
    reached: set[str] = field(default_factory=set)
    _layouts: dict[str, tuple[tuple[torch.Size, torch.Size], Layout]] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)
    attentions: list[AttentionLayer] = field(default_factory=list)
    _read: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.channels = input_channels(self.module)
        self._run_by = [self.module, *(p for p in self.parts or () if isinstance(p, nn.Module))]
        modal = [part for one in self._run_by for part in one.modules() if isinstance(part, MODAL)]
        self._with_mode = [*self._run_by, *modal]
        # The part and the name, not the parameter: loading weights may put another in its place.
        places = [
            (value.is_floating_point(), (part, name))
            for part in self.module.modules()
            for name, value in part.named_parameters(recurse=False)
        ]
        self._first = next((place for _, place in places), None)
        self._first_floating = next((place for floating, place in places if floating), None)

    @property
    def device(self) -> torch.device:
        """Where images are sent: where the parameters are, unless told at construction."""
        if self.told_device is not None:
            return self.told_device
        first: Tensor | None = self._first and getattr(*self._first, None)
        return module_device(self.module) if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter: the input is converted to it."""
        first: Tensor | None = self._first_floating and getattr(*self._first_floating, None)
        return torch.float32 if first is None else first.dtype

    @property
    def parts(self) -> tuple[Trunk, Head] | None:
        """Trunk and head, where the network was given as two functions."""
        return None if self.trunk is None or self.head is None else (self.trunk, self.head)

    @property
    def over_positions(self) -> bool:
        """Whether inputs are signals, tables or words instead of images."""
        return self.layout_options[0] == "bkl"

    @property
    def found(self) -> Layout | None:
        """The layer's layout in the last run."""
        return self._layouts[self.layer][1] if self.layer in self._layouts else None

    # Passes

    def forward(self, images: Images, allow_zero: bool = False) -> Features:
        """Return features of the layer, see `EmbeddingNetwork.forward`."""
        with torch.inference_mode(False), torch.no_grad():
            run = self.run(images)
            return run.features(run.activations()[0], self.normalize, allow_zero)

    def forward_layers(
        self, images: Images, layers: Sequence[str]
    ) -> tuple[Features, list[Tensor]]:
        """Return features of the last layer, and activations `[B K H W]` of all."""
        with torch.inference_mode(False), torch.no_grad():
            run = self.run(images, layers)
            maps = run.activations()
            return run.features(maps[-1], self.normalize), maps

    def embed(self, images: Images, layers: Sequence[str] | None = None) -> Embedded:
        """Embed images `[B C H W]` into NumPy arrays."""
        features, maps = self.forward_layers(images, (self.layer,) if layers is None else layers)
        embedding, norm = features.embedding.cpu().numpy(), features.norm.cpu().numpy()
        return Embedded(embedding, norm, [one.cpu().numpy() for one in maps])

    def run_from_input(
        self, images: Images, mode: AbstractContextManager[object] | None
    ) -> tuple[Features, Tensor, Tensor]:
        """Return features, z `[B D]` and the input as a leaf, gradients kept: `input_gradient`."""
        with torch.inference_mode(False), torch.enable_grad(), self.precision():
            leaf = self.prepare(images).detach().clone().requires_grad_()
            with mode or nullcontext():
                # The clone keeps what an in-place unit behind the layer would overwrite.
                run = self._run_prepared(leaf, lambda raw: (raw.detach().clone(), raw))
        with no_gradients():
            return run.features(run.activations()[0], self.normalize), run.z, leaf

    def run(self, images: Images, layers: Sequence[str] | None = None, keep: Keep = copied) -> Run:
        """Run once without gradients until `keep` turns them on, hooked at the layer or several."""
        with torch.inference_mode(False), torch.no_grad(), self.precision():
            return self._run_prepared(self.prepare(images), keep, layers)

    def _run_prepared(self, batch: Tensor, keep: Keep, layers: Sequence[str] | None = None) -> Run:
        named, readings = self.find(layers), dict[str, Reading]()
        z, kept, depth = self.call(batch, keep, len(batch), named, readings)
        names = [name for name, _ in named]
        layouts = [
            readings[name].layout if name in readings else self.read_layout(name, raw, batch)
            for name, raw in zip(names, kept, strict=True)
        ]
        return Run(names, z, kept, batch, layouts, depth, readings)

    def traceable(
        self, probe: Images, layers: Sequence[str]
    ) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return images -> z `[B D]` and layers' `[B K H W]`, which lie as those of the probe."""
        layouts, named = self.run(probe, layers).layouts, self.find(layers)

        def run(images: Tensor) -> tuple[Tensor, list[Tensor]]:
            readings = dict[str, Reading]()
            z, raws, _ = self.call(images, copied, None, named, readings)
            return z, [
                readings[name].maps if name in readings else layout.to_maps(raw)
                for (name, _), layout, raw in zip(named, layouts, raws, strict=True)
            ]

        return run

    def find(self, layers: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
        """Return bare names and modules of layers; None for the network's own."""
        if layers is None or list(layers) == [self.layer]:
            return [(self.layer, self.part)]
        if self.parts is not None:
            raise NetworkError(
                "this network was given as trunk and head, so no other layer can be found in it; "
                "give it as a module and a layer"
            )
        return find_layers(self.module, layers)

    # One run

    def prepare(self, images: Images) -> Tensor:
        """Return images as the module wants them: `[B C H W]`, its device, dtype and format."""
        if any([part.training for part in self._with_mode]):
            refuse_training(self._run_by)
        if isinstance(images, np.ndarray):
            # torch warns about arrays it could write to though it should not.
            images = torch.from_numpy(images if images.flags.writeable else images.copy())
        positions = self.over_positions
        fits = isinstance(images, Tensor) and 0 not in images.shape
        if fits and positions:
            fits = images.ndim in (2, 3)
        elif fits:
            fits = images.ndim == 4 and images.is_floating_point()
        if not fits:
            what = type(images).__name__
            if isinstance(images, Tensor):
                what = f"{list(images.shape)} of {images.dtype}"
            if positions:
                raise InputError(
                    f"the input is {what}; layout='bkl' expects signals [B C L], tables [B L] or "
                    "the numbers of words [B L], at least one"
                )
            raise InputError(
                f"images are {what}; expected floats [B 3 H W], at least one: add the batch "
                "dimension to a single image, and apply the network's preprocess first"
            )
        if positions:
            self.example = images[:1] if self.example is None else self.example
        elif self.input_size is None:
            self.channels, self.input_size = images.shape[1], (images.shape[2], images.shape[3])
        # Numbers of words stay whole, in a width that every embedding table takes.
        kind = self.dtype if images.is_floating_point() else torch.int64
        batch = images.to(self.device, kind)
        if self.channels_last and not positions:
            batch = batch.contiguous(memory_format=torch.channels_last)
        # An inference tensor cannot take part in gradients.
        return batch.clone() if batch.is_inference() else batch

    def precision(self, autocast: bool = True) -> AbstractContextManager[object]:
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

    def call(
        self,
        images: Tensor,
        keep: Keep,
        batch: int | None,
        layers: Sequence[tuple[str, nn.Module]] = (),
        readings: dict[str, Reading] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[int]]:
        """Run once, hooked: z `[batch D]`, what `keep` kept of each layer, their order.

        What was read inside attentions is put among the `readings`.
        """
        layers = layers or [(self.layer, self.part)]
        readings = {} if readings is None else readings
        keeper = _Keeper(keep)
        if self.parts is not None:
            trunk, head = self.parts
            raw = run_part(trunk, "trunk", images.clone())  # which it may change in place
            if self.autocast is None or torch.is_autocast_enabled(self.device.type):
                self.plain_dtype = raw.dtype if isinstance(raw, Tensor) else None
            output = run_part(head, "head", keeper.take_first(self.layer, raw))
            z = at_least_single(choose_embedding(output, self.output, batch))
        else:
            with self.lock, ExitStack() as stack:
                for name, part in layers:
                    if "@" in name:  # read inside an attention
                        rows, take = (
                            self.tokens_read(name, part, images),
                            partial(keeper.take, name),
                        )
                        readings[name] = Reading(name, rows, images.shape[0])
                        layout_of = partial(self.read_layout, name, images=images)
                        stack.enter_context(readings[name].inside(part, take, layout_of))
                    else:
                        stack.callback(part.register_forward_hook(keeper.hook(name)).remove)
                output = run_part(self.module, "network", images.clone())
                last = any(isinstance(one.layout, ValueLayout) for one in readings.values())
                # What stands in z's place comes later, perhaps of more activations than images.
                count = images.shape[0] if last else batch
                z = at_least_single(choose_embedding(output, self.output, count))
                for name, reading in readings.items():
                    z = reading.embedded(z, partial(keeper.take, name))
        order = list(keeper.kept)
        names = [name for name, _ in layers]
        return z, [keeper.of(name) for name in names], [order.index(name) for name in names]

    def tokens_read(self, name: str, part: nn.Module, images: Tensor) -> tuple[int, ...]:
        """Return which tokens of an attention reach the embedding; asked once."""
        if name not in self._read:

            def run() -> Tensor:
                output = run_part(self.module, "network", images[:1].clone())
                return at_least_single(choose_embedding(output, self.output, 1))

            self._read[name] = tokens_read(name, part, run)
        return self._read[name]

    # Layouts

    def read_layout(self, layer: str, raw: Tensor, images: Tensor) -> Layout:
        """Return the layout of a layer's output for `images`, read anew where shapes change."""
        shapes, known = (raw.shape, images.shape), self._layouts.get(layer)
        if known is not None and torch.compiler.is_compiling():
            return known[1]  # an exporter's shapes are no numbers
        if known is None or known[0] != shapes:
            kind, grid, prefix = self.layout_options
            if split_reading(layer)[1]:  # tokens, and those of an attention may be others
                kind, grid, prefix = "btk", None, None
            elif layer != self.layer:  # the network's own options are for its own layer
                kind, grid, prefix = "bkl" if kind == "bkl" else "auto", None, None
            told = self._axes(layer, raw, images) if kind == "auto" else kind
            layout = resolve(raw, images, told, grid, prefix, layer)
            if reading := split_reading(layer)[1]:
                layout = LAYOUTS[reading](layout.kind, layout.grid, layout.prefix)
            known = shapes, layout
            self._layouts[layer] = known
        return known[1]

    def _apart(self) -> Self:
        """Return this with a module of the same parameters, for inputs of another size.

        A module may keep what they did to it: Swin of transformers its smallest window.
        """
        twin = None if self.parts is not None else twin_of(self.module)
        if twin is None:
            return self
        part = find_layers(twin, [self.layer])[0][1]
        return replace(self, module=twin, part=part, lock=ProcessLock(), _layouts={})

    def _axes(self, layer: str, raw: Tensor, images: Tensor) -> str:
        """Return which axes of a layer are positions, those a smaller input changes; asked once."""
        if layer not in self._told and raw.ndim in (3, 4):
            shape = tuple(raw.shape)
            # Where tokens are as many as images, a larger batch: a smaller input has fewer tokens.
            more = len(images) == 1 or shape[0] == shape[1]
            few = images[:1].repeat(len(images) + 1 if more else 1, 1, 1, 1)
            size = (int(images.shape[2]), int(images.shape[3]))
            seen: list[tuple[int, ...]] = []

            def look(raw: Tensor) -> tuple[Tensor, Tensor]:
                seen.append(tuple(raw.shape))
                return raw, raw

            apart = self._apart()
            for height, width in smaller(size):
                part = few[:, :, :height, :width].contiguous()
                # What comes behind the layer may not take the input.
                with no_gradients(), self.precision(), uncompiled(), suppress(EmbedcamError):
                    apart.call(part, look, None, apart.find([layer]))
                if seen:
                    break
            shapes, batches = (shape, seen[0] if seen else ()), (len(images), len(few))
            self._told[layer] = axes_told(shapes, batches, size, layer)
        return self._told.get(layer, "auto")
