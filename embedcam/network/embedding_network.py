"""`EmbeddingNetwork`: any torch module and the layer to explain.

Two ways through a network:

    forward      image -> embedding and activations, nothing differentiable, nothing kept
    head_pass    the same, and dy/dA of any cotangent at the embedding, as often as wanted

In both, the part before the layer (the trunk) runs without gradients: in a `head_pass` the layer's
output becomes a leaf and only what follows it (the head) is differentiated. Parameters, their
`.grad` and `requires_grad`, modes and hooks stay as they are, also after an exception.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._files import ProcessLock
from ..errors import InputError, NetworkError
from ..index.identity import Identity, compare
from ..preprocess import AffineHead, Embedded, from_transform
from .accepted import refuse_module, refuse_parts, refuse_preprocess, refuse_settings
from .fingerprint import hash_parameters, hash_structure
from .gradients import (
    Features,
    HeadPass,
    at_least_single,
    refuse_flat,
    refuse_unreached,
    replay_vjp,
)
from .head import HeadKind, ask_head, tolerance_of
from .layers import bare_name, find_layer
from .layouts import (
    Layout,
    LayoutName,
    OutputChoice,
    check_options,
    choose_embedding,
    describe_choice,
)
from .runs import Images, ModuleRuns
from .state import (
    ModuleState,
    input_channels,
    no_gradients,
    refuse_elsewhere,
    refuse_inference,
    uncompiled,
)
from .steady import Drawn, by_batch, by_chance, difference, full_float32
from .tap import Change, Parts, run_head, with_positions

# Runs of one picture that show chance which leaves most embeddings as they are.
_DRAWS = 8


class EmbeddingNetwork(ModuleRuns):
    """A module that turns images into embeddings, and the layer whose activations explain them.

    Args:
        module: any `nn.Module` in eval mode; images `[B C H W]` in, an embedding `[B D]` somewhere
            in what it returns.
        layer: dotted name, or the submodule itself.
        head: activations in the layer's own layout -> the module's output, as a function. Only
            needed for heads that are pooled but not affine, whose derivative can then be had from
            pooled vectors alone; checked numerically before it is believed.
        trunk: images -> activations, where the network is given as two functions: `from_parts`.
        normalize: L2-normalise the embedding. Part of an index's identity.
        output: which part of the module's output is the embedding: None for a tensor, the first
            of a tuple or the only entry of a dict; a name, a position, or a function.
        layout: "auto", "bkhw", "bhwk", "btk", or "bkl" for 1-D convolutions, whose inputs are
            signals `[B C L]`, tables `[B L]` or the numbers of words `[B L]`.
        grid: (H, W) of the tokens, when it cannot be found from the input's shape.
        prefix_tokens: how many tokens come before the grid's (class and register tokens).
        preprocess: picture -> input `[C H W]`: an `embedcam.preprocess.Preprocess`, or what
            `from_transform` takes: torchvision's and timm's transforms, a Hugging Face image
            processor, a function.
        input_size: (H, W) of the input, for a network without preprocess whose input size is fixed.
        device: where the module is; default: where its parameters are.
        autocast: torch.bfloat16 or torch.float16 to compute in it; results are float32.
        channels_last: hand images on in that memory format, which convolutions on CPUs prefer.
        name: what to call it in an index.

    `spec`, where `embedcam.models.load_network` made the network, holds what loads it again.

    Hooks do not fire inside compiled modules: compile trunk and head separately and use
    `from_parts`. Concurrent calls are safe.

    Raises:
        NetworkError, InputError: with what was given, what was expected and what to do.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        layer: str | nn.Module,
        *,
        head: Callable[[Any], Any] | None = None,
        trunk: Callable[[Tensor], Any] | None = None,
        normalize: bool = True,
        output: OutputChoice = None,
        layout: LayoutName = "auto",
        grid: tuple[int, int] | None = None,
        prefix_tokens: int | None = None,
        preprocess: Any = None,
        input_size: tuple[int, int] | None = None,
        device: str | torch.device | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        name: str | None = None,
    ) -> None:
        refuse_parts(trunk, head, whole=True)
        if trunk is None or not isinstance(module, nn.Module):
            refuse_module(module)
        refuse_settings(
            {
                "normalize": normalize,
                "channels_last": channels_last,
                "name": name,
                "input_size": input_size,
                "device": device,
                "autocast": autocast,
            }
        )
        check_options(layout, grid, prefix_tokens, output)
        if preprocess is not None:
            preprocess = from_transform(preprocess)
            refuse_preprocess(preprocess)
        self._hooked: nn.Module | None = None
        if trunk is None:
            found, self._hooked = find_layer(module, layer)
            layer = bare_name(found)
        self.module, self.layer = module, str(layer)
        self.normalize, self.output, self.preprocess = normalize, output, preprocess
        self.autocast, self.channels_last, self.name = autocast, channels_last, name
        self.spec: dict[str, Any] | None = None
        self._trunk, self._head = trunk, head
        self._layout_options = (layout, grid, prefix_tokens)
        self._layout: Layout | None = None
        self._last_layout: tuple[tuple[torch.Size, torch.Size], Layout] | None = None
        self._told: dict[str, str] = {}
        self._plain: torch.dtype | None = None
        self._input_size = None if input_size is None else (input_size[0], input_size[1])
        self._channels = input_channels(module)
        self._device = None if device is None else torch.device(device)
        refuse_elsewhere(module, self._device)
        run_by = [part for part in (trunk, head) if isinstance(part, nn.Module)]
        self._example: Tensor | None = None
        self._state = ModuleState([module, *(run_by if trunk is not None else [])])
        self._lock = ProcessLock()
        self._reached = self._steady = self._sound = False
        self._kind: HeadKind | None = None
        self._matrix: Tensor | None = None
        self._replays = False

    @classmethod
    def from_parts(
        cls,
        trunk: Callable[[Tensor], Any],
        head: Callable[[Any], Any],
        *,
        layer: str = "trunk",
        module: nn.Module | None = None,
        **settings: Any,
    ) -> Self:
        """A network given as trunk (images -> activations) and head (activations -> embedding).

        No hooks: each may be compiled, exported, or a plain function.

        Args:
            trunk: images `[B C H W]` -> activations, in any of the layouts.
            head: what the trunk returns -> what the network returns.
            layer: what to call the trunk's output; an index remembers it.
            module: holds the parameters, where trunk and head are functions.
            **settings: as of the constructor.
        """
        refuse_parts(trunk, head, whole=False)
        parts = Parts(trunk, head) if module is None else module
        return cls(parts, layer, trunk=trunk, head=head, **settings)

    # ---------------------------------------------------------------- facts

    def __repr__(self) -> str:
        """What is explained of what; the module's own is pages long."""
        norm = "normalised" if self.normalize else "not normalised"
        name = self.name or type(self.module).__name__
        return f"<EmbeddingNetwork {name}: layer {self.layer}, {norm}, on {self.device}>"

    def describe(self) -> dict[str, Any]:
        """What identifies this network beside its parameters, ready for JSON."""
        return {
            "name": self.name,
            "layer": self.layer,
            "output": describe_choice(self.output),
            "layout": self.layout,
            "normalize": self.normalize,
            "preprocess": None if self.preprocess is None else self.preprocess.to_dict(),
        }

    def identity(self) -> Identity:
        """Return what tells this network from another, its probe taken with one forward pass.

        A network without preprocess is asked at the input size it has seen, 224 x 224 before any.

        Raises
        ------
        NetworkError
            The embedding depends on the rest of a batch, or on chance: it has no identity.
        """
        self.check_steady()
        with full_float32(self.device):
            features = self.forward(self.probe_images())
        described = self.describe()
        return Identity(
            parameters_sha256=hash_parameters(self.module),
            structure_sha256=hash_structure(self.module),
            precision=str(self.autocast or self.dtype).removeprefix("torch."),
            probe_embedding=features.embedding[0].float().cpu().numpy(),
            probe_pooled=features.activations[0].mean((1, 2)).float().cpu().numpy(),
            # As it will come back from JSON: tuples as lists.
            preprocess=json.loads(json.dumps(described.pop("preprocess"))),
            **described,
        )

    def for_index(self, stored: Identity, layers: Sequence[str] = ()) -> Self:
        """Return this network as the one of an index; `NetworkMismatch` where it is another."""
        compare(stored, self.identity())
        return self

    # ---------------------------------------------------------------- passes

    def embed(self, images: Images, layers: Sequence[str] | None = None) -> Embedded:
        """Embed images `[B C H W]` into NumPy arrays; raises as `forward`."""
        if layers is None or list(layers) == [self.layer]:
            features = self.forward(images)
            maps = [features.activations]
        else:
            features, maps = self.forward_layers(images, layers)
        embedding, norm = features.embedding.cpu().numpy(), features.norm.cpu().numpy()
        return Embedded(embedding, norm, [one.cpu().numpy() for one in maps])

    def forward(self, images: Images, *, allow_zero: bool = False) -> Features:
        """Embeddings and activations of preprocessed images; no gradients.

        Args:
            images: `[B C H W]`, an array or tensor.
            allow_zero: an output of zeros is embedded as zeros, not refused: what is left of a
                masked picture may be nothing.

        Raises:
            InputError: images of a wrong shape, or with NaN.
            NetworkError: training mode; a layer called twice or never; an embedding that is not
                finite, or zero and to be normalised.
        """

        def keep(raw: Tensor) -> tuple[Tensor, Tensor]:
            # The copy is kept and the original handed on: what follows may change it in place.
            return raw.clone(), raw

        with no_gradients(), self._autocast(True):
            batch = self._prepare(images)
            z, raw = self._call(batch, keep, len(batch))
        with no_gradients():
            return self._features(batch, z, raw, allow_zero)[0]

    __call__ = forward

    def head_pass(self, images: Images, *, twice: bool = False) -> HeadPass:
        """As `forward`, but differentiable from the layer on; works inside inference mode too.

        Args:
            images: `[B C H W]`, an array or tensor.
            twice: for `HeadPass.jvp`: attention is then computed by formulas that torch can
                differentiate twice, a little slower.

        Raises:
            as `forward`; NetworkError: the layer's output, or that of all its patch tokens, never
                reaches the embedding.
        """

        def cut(raw: Tensor) -> tuple[Tensor, Tensor]:
            leaf = raw.detach().clone().requires_grad_()
            torch.set_grad_enabled(True)  # until the end of the context below
            return leaf, leaf.clone()  # the head may begin with an in-place unit

        if not self._reached:
            refuse_inference(self.module)
        attention = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
        with no_gradients(), self._autocast(True), attention:
            batch = self._prepare(images)
            z, leaf = self._call(batch, cut, len(batch))
        with no_gradients():
            features, layout = self._features(batch, z.detach(), leaf.detach())
        made = HeadPass(features, z, leaf, layout, self.layer)
        if not self._reached:
            refuse_unreached(made, self.module)
            self._reached = True
        return made

    def check_tokens(self, images: Images) -> int:
        """Refuse a layer whose patch tokens never reach the embedding, as `head_pass` does.

        For whoever asks for no gradient and would get rounding noise from such a layer.

        Args:
            images: `[B C H W]`, of which at most the first is run.

        Returns:
            How many inputs were run: 1, or 0 where the layer has no tokens or is known to be fine.

        Raises:
            as `head_pass`.
        """
        if self._reached or self.layout in ("bkhw", "bhwk", "bkl"):
            return 0
        self.head_pass(images[:1]).close()
        return 1

    def check(self, gradients: bool = True) -> None:
        """Run probe pictures through once, so that what cannot be explained says so before work.

        Args:
            gradients: whether derivatives of the embedding will be asked for.

        Raises:
            InputError: a network over positions has seen no input yet, and no picture fits it.
            NetworkError: as `forward`, `head_pass` and `check_steady`; a layer of one position,
                whose map is one value; an embedding whose derivative at the layer is zero.
        """
        if self._sound:
            return
        self.check_steady()
        probes = self._probes()
        if gradients:
            with self.head_pass(probes) as made:
                features = made.features
                refuse_flat(made)
        else:
            features = self.forward(probes)
        maps = features.activations
        if self.normalize and features.embedding.shape[1] == 1:
            raise NetworkError(
                "the embedding is one number, which normalised is 1 or -1 whatever the picture, so "
                "every map would be blank; give the output before it (output=), or normalize=False"
            )
        if maps.shape[2] * maps.shape[3] == 1 and self.layout != "bkl":
            raise self._one_position(torch.as_tensor(probes))
        self._sound = gradients

    def _one_position(self, probes: Tensor) -> NetworkError:
        near = ""
        if self._hooked is not None:
            with no_gradients(), self._autocast(True):
                names = with_positions(self.module, self._prepare(probes), self.layer)
            near = f", such as {names[-1]!r}" if names else ""
        size = " x ".join(str(side) for side in probes.shape[2:])
        return NetworkError(
            f"layer {self.layer!r} has one position for an input of {size}, so every map would be "
            f"one even colour; take a layer before the pooling{near}, or a larger input"
        )

    def check_steady(self) -> None:
        """Refuse a network whose embedding depends on the rest of its batch, or on chance.

        A probe picture is run alone, again, and in a batch with another one; found out once.

        Raises:
            NetworkError: with the cause, where it can be told.
        """
        if self._steady or self._layout_options[0] == "bkl":
            return
        probes = self.probe_images(2)
        with full_float32(self.device):
            with self.probing():
                alone = self.forward(probes[:1])
            allowed = tolerance_of(self.autocast or self.dtype, self.device)

            def run_again() -> None:
                with uncompiled(), drawn:
                    again = self.forward(probes[:1])
                if (off := difference(alone, again)) > allowed:
                    raise by_chance(drawn.names, off, allowed)

            drawn = Drawn()
            run_again()
            # What is drawn may change an embedding only now and then.
            for _ in range(_DRAWS if drawn.names else 0):
                run_again()
            try:
                beside = self.forward(probes)
            except NetworkError:
                return  # a network of one picture at a time has no batch to depend on
            if (off := difference(alone, beside)) > allowed:
                for _ in range(_DRAWS):  # chance that torch knows nothing of
                    run_again()
                raise by_batch(self.module, off, allowed)
        self._steady = True

    # ---------------------------------------------------------------- the head

    @property
    def head_kind(self) -> HeadKind:
        """Whether the head is pooled and affine; found once, at the network's input size."""
        with self._lock:
            if self._kind is None:
                self._kind = self._ask_head()
            return self._kind

    def affine_head(self, stored_matrix: Callable[[], np.ndarray]) -> AffineHead | None:
        """Return the head where it is pooled and affine; nothing is asked of an index."""
        kind = self.head_kind
        return AffineHead(None if kind.identity else kind.matrix) if kind.affine else None

    @property
    def already_normalized(self) -> bool:
        """Whether the module's own output always has length 1."""
        return self.head_kind.unit_norm

    @property
    def pooled_replay(self) -> bool:
        """Whether `pooled_vjp` can be used: the head is pooled, and affine or known as a function.

        A head that is pooled but neither is to be treated as any other head.
        """
        kind = self.head_kind
        return kind.pooled and (kind.affine or self._replays)

    def pooled_vjp(self, pooled: Images, cotangents: Images) -> Any:
        """dy/dp of a pooled head, without images: p is the mean of the activations over positions.

        Args:
            pooled: p, `[B K]`.
            cotangents: dy/dz before normalisation, `[B D]` or `[B S D]`.

        Returns:
            `[B K]` or `[B S K]`; an array if `pooled` is one, else a tensor.

        Raises:
            InputError: shapes that do not belong together.
            NetworkError: not `pooled_replay`.
        """
        if not self.pooled_replay:
            raise NetworkError(
                f"what follows layer {self.layer!r} is not a function of the pooled activations; "
                "use head_pass(images).vjp"
            )
        with no_gradients():
            single = torch.float64 if self.dtype == torch.float64 else torch.float32
            p = torch.as_tensor(pooled, device=self.device).to(single)
            c = torch.as_tensor(cotangents, device=self.device).to(single)
            if p.ndim != 2 or c.ndim not in (2, 3) or len(c) != len(p):
                raise InputError(
                    f"pooled {list(p.shape)} and cotangents {list(c.shape)} do not belong "
                    "together; expected [B K] with [B D] or [B S D]"
                )
            found = self._pooled_vjp(p.clone(), c.clone())
        return found.cpu().numpy() if isinstance(pooled, np.ndarray) else found

    def _pooled_vjp(self, pooled: Tensor, cotangents: Tensor) -> Tensor:
        kind = self.head_kind
        if kind.identity:
            return cotangents
        if kind.affine:
            if self._matrix is None or self._matrix.device != cotangents.device:
                self._matrix = torch.as_tensor(kind.matrix, device=cotangents.device)
            return cotangents @ self._matrix.to(cotangents.dtype)
        with self._autocast(True):
            every = cotangents if cotangents.ndim == 3 else cotangents[:, None]
            found = replay_vjp(self._replay, pooled, every)
        return found if cotangents.ndim == 3 else found[:, 0]

    def _replay(self, pooled: Tensor) -> Tensor:
        """z `[n D]` of pooled activations `[n K]`, by running the head on a grid of one cell."""
        assert self._head is not None
        assert self._layout is not None
        output = run_head(self._head, self._layout.one_cell(pooled.to(self.dtype)))
        return at_least_single(choose_embedding(output, self.output, len(pooled)))

    def _ask_head(self) -> HeadKind:
        """Ask the head what it is, with probe pictures before it and its activations replaced."""
        with no_gradients(), self._autocast(False):
            pictures = self._prepare(self._probes())

        def run(picture: Tensor, change: Change, batch: int) -> tuple[Tensor, Tensor]:
            with no_gradients(), self._autocast(False):
                return self._call(picture, change, batch)

        with torch.inference_mode(False):
            with self.probing():
                _, raw = run(pictures[:1], lambda raw: (raw, raw.clone()), 1)
            layout = self._read_layout(pictures[:1], raw)
            replay = None if self._head is None else self._replay
            kind, self._replays = ask_head(run, pictures, raw, layout, replay, self.dtype)
        return kind
