"""`EmbeddingNetwork`: any torch module and the layer to explain.

`forward` gives embedding and activations of images, nothing differentiable; `head_pass` gives the
same and dy/dA of any cotangent at the embedding. In both the part before the layer runs without
gradients. Parameters, their `.grad`, modes and hooks stay as they are, also after an exception.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_sides, one_of, whole
from .._files import ProcessLock
from ..errors import EmbedcamError, EmbeddingError, InputError, NetworkError, NetworkMismatch
from ..index.identity import Identity, compare, difference_of
from ..index.manifest import RunEntry
from ..preprocess import (
    AnyPreprocess,
    Embedded,
    HeadMatrix,
    Transform,
    from_transform,
    refuse_random,
    usual_passes,
)
from ..preprocess.probe import probe_inputs
from . import open_clip_source, sentence_transformers_source, transformers_source
from .gradients import HeadPass
from .head import HeadAlone, HeadKind, ask_head, pooled_vjp, tolerance_of
from .held import HeldPass, held_pass
from .layers import (
    TOKENS,
    Images,
    LayoutName,
    OutputChoice,
    describe_choice,
    find_layer,
    split_reading,
)
from .module import (
    advice_of,
    bare_name,
    calls_of,
    full_float32,
    hash_parameters,
    is_convolutional,
    lay_out,
    message_of,
    no_gradients,
    one_thread,
    refuse_elsewhere,
    refuse_module,
    refuse_parts,
    twin_of,
)
from .reading import as_indexed
from .runner import (
    Features,
    Head,
    LayoutOptions,
    Run,
    Runner,
    Trunk,
    copied,
    in_graph,
    with_positions,
)
from .settings import place_of, refuse_settings
from .source import Foreign
from .steadiness import refuse_difference, takes_batches
from .texts import TextTower, embed_texts

if TYPE_CHECKING:
    from ..onnx import OnnxNetwork

Numbers = TypeVar("Numbers", np.ndarray, Tensor)
DEFAULT_INPUT_SIZE = (224, 224)


class EmbeddingNetwork:
    """A module that turns images into embeddings, and the layer whose activations explain them.

    Concurrent calls are safe. Hooks do not fire inside compiled modules: compile trunk and head
    separately and use `from_parts`. `spec`, of `load_network`, holds what loads it again.

    Parameters
    ----------
    module
        Any `nn.Module` in eval mode; images `[B C H W]` in, an embedding `[B D]` somewhere in what
        it returns.
    layer
        Dotted name, or the submodule itself.
    head, trunk
        Activations in the layer's own layout -> the module's output, as a function: for heads that
        are pooled but not affine, whose derivative can then be had from pooled vectors alone;
        checked before it is believed. Together with images -> activations: see `from_parts`.
    normalize
        L2-normalize the embedding. Part of an index's identity.
    output
        Which part of the output is the embedding: None for a tensor, the first of a tuple or the
        only entry of a dict; a name, a position, or a function.
    layout, grid, prefix_tokens
        "auto", "bkhw", "bhwk", "btk", or "bkl" for 1-D convolutions, whose inputs are signals
        `[B C L]`, tables `[B L]` or the numbers of words `[B L]`; (H, W) of tokens, when the
        input's shape does not tell, and how many class and register tokens come before them.
    preprocess, input_size
        Picture -> input `[C H W]`: a `Preprocess`, or what `from_transform` takes; without one,
        (H, W) of the input where it is fixed.
    device, channels_last
        Where the module is, by default where its parameters are; the memory format of its images,
        None for what suits the kind of network where that changes no result.
    autocast
        torch.bfloat16 or torch.float16 to compute in it; results are float32.
    name
        What to call it in an index.
    texts
        Texts -> their embeddings `[n D]` in the images' space, before normalisation: see
        `embed_texts`.

    Raises
    ------
    NetworkError, InputError
        With what was given, what was expected and what to do.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        layer: str | nn.Module,
        *,
        head: Head | None = None,
        trunk: Trunk | None = None,
        normalize: bool = True,
        output: OutputChoice = None,
        layout: LayoutName = "auto",
        grid: tuple[int, int] | None = None,
        prefix_tokens: int | None = None,
        preprocess: Transform | None = None,
        input_size: tuple[int, int] | None = None,
        device: str | torch.device | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool | None = None,
        name: str | None = None,
        texts: TextTower | None = None,
    ) -> None:
        refuse_parts(trunk, head)
        if trunk is None or not isinstance(module, nn.Module):
            refuse_module(module)
        refuse_settings(
            normalize=normalize,
            channels_last=channels_last,
            name=name,
            autocast=autocast,
            output=output,
            texts=texts,
        )
        place = place_of(device)
        one_of("layout", layout, get_args(LayoutName))
        grid = None if grid is None else check_sides("grid", grid)
        prefix_tokens = None if prefix_tokens is None else whole("prefix_tokens", prefix_tokens)
        input_size = None if input_size is None else check_sides("input_size", input_size)
        self.preprocess: AnyPreprocess | None = None
        if preprocess is not None:
            self.preprocess = from_transform(preprocess)
            refuse_random(self.preprocess)
        part = module
        if trunk is None:
            dotted, part = find_layer(module, layer)
            layer = bare_name(dotted)
        refuse_elsewhere(module, place)
        self.module, self.layer, self.name = module, str(layer), name
        self.output, self.normalize = output, normalize
        self.autocast, self.texts = autocast, texts
        self.runner = Runner(
            module,
            self.layer,
            part,
            trunk,
            head,
            output,
            input_size,
            place,
            autocast,
            bool(channels_last),
            normalize,
            (layout, grid, prefix_tokens),
        )
        self.spec: dict[str, Any] | None = None
        self._kind: HeadKind | None = None
        self._steady = self._sound = False
        self._session: OnnxNetwork | None = None
        # Whether the memory format is settled, and whether the module's may be changed with it.
        self._format_known, self.owns_module = channels_last is not None, False

    @classmethod
    def from_parts(
        cls,
        trunk: Trunk,
        head: Head,
        *,
        layer: str = "trunk",
        module: nn.Module | None = None,
        **settings: Any,
    ) -> Self:
        """Return a network given as trunk (images -> activations) and head (-> embedding).

        No hooks: each may be compiled, exported, or a plain function. `layer` names the trunk's
        output, `module` holds the parameters of functions; settings are the constructor's.
        """
        if module is None:  # trunk and head side by side, for their parameters; neither changes
            parts = {"trunk": trunk, "head": head}
            module = nn.ModuleDict({n: p for n, p in parts.items() if isinstance(p, nn.Module)})
            module.training = False
        return cls(module, layer, trunk=trunk, head=head, **settings)

    @classmethod
    def from_transformers(cls, model: nn.Module, processor: Foreign, **settings: Foreign) -> Self:
        """Return a model of transformers and its processor, or image processor, as a network.

        Layer, output, prefix tokens, preprocessing and the tower for texts are found; settings are
        the constructor's. The model stays as it is.
        """
        return cls(**{**transformers_source.wrapped(model, processor).settings(), **settings})

    @classmethod
    def from_open_clip(
        cls,
        model: nn.Module,
        preprocess: Transform,
        tokenizer: Callable[..., Foreign] | None = None,
        **settings: Foreign,
    ) -> Self:
        """Return a model of open_clip as a network; as `from_transformers`.

        `preprocess` is the last that `create_model_and_transforms` returns, `tokenizer` what
        `get_tokenizer` does; without it, texts cannot be embedded.
        """
        loaded = open_clip_source.wrapped(model, preprocess, tokenizer)
        return cls(**{**loaded.settings(), **settings})

    @classmethod
    def from_sentence_transformers(cls, model: nn.Module, **settings: Foreign) -> Self:
        """Return a SentenceTransformer that embeds images as a network; as `from_transformers`."""
        return cls(**{**sentence_transformers_source.wrapped(model).settings(), **settings})

    def without_autocast(self) -> Self:
        """Return this network computing in the precision of its parameters."""
        plain = copy.copy(self)
        plain.runner = copy.copy(self.runner)
        plain.autocast = plain.runner.autocast = plain._kind = plain._session = None
        return plain

    def side_by_side(self, count: int) -> list[Self]:
        """Return networks for as many threads: this one, and others of the same parameters.

        This one alone on a GPU, which takes one pass at a time, and where it cannot be copied, as
        functions and compiled modules cannot be, and a module that keeps things outside itself.
        """
        alone = count < 2 or self.device.type != "cpu" or not self.hooked or not self._copies_well
        twins = [None if alone else twin_of(self.module) for _ in range(count - 1)]
        return [self, *(self._of(twin) for twin in twins if twin is not None)]

    @cached_property
    def _copies_well(self) -> bool:
        """Whether a copy of the module computes the same, and by itself."""
        if twin_of(self.module) is None:
            return False
        first, second = np.split(self.probe_images(2), 2)
        try:
            expected = self.runner.forward(first)
            self.runner.forward(second)  # what it leaves is not of the first when it is copied
            if (twin := twin_of(self.module)) is None:
                return False
            with calls_of(self.module) as called:
                found = self._of(twin).runner.forward(first)
        except EmbedcamError:
            return False
        pairs = zip(vars(expected).values(), vars(found).values(), strict=True)
        return not called and all(torch.equal(*pair) for pair in pairs)

    def one_thread_each(self) -> AbstractContextManager[None]:
        """Return the context of a job whose passes go side by side: each on one thread.

        Numbers then do not depend on how many cores there are.
        """
        return one_thread() if len(self.side_by_side(2)) == 2 else nullcontext()

    def _of(self, module: nn.Module) -> Self:
        other = copy.copy(self)
        part = find_layer(module, self.layer)[1]
        other.module = module
        other.runner = replace(
            self.runner, module=module, part=part, lock=ProcessLock(), _layouts={}
        )
        return other

    def with_session(self, session: "OnnxNetwork") -> Self:
        """Return this network with its passes without gradients run by its own ONNX file.

        `session` is the file opened, as an `OnnxNetwork`; derivatives, other layers and what the
        head is are torch's as before. Parameters that change later do not change the file.

        Raises
        ------
        NetworkMismatch
            The file holds another network.
        NetworkError
            This network is not on the CPU or not in float32, or the file does not tell all.
        """
        kind = str(self.autocast or self.dtype).removeprefix("torch.")
        if self.device.type != "cpu" or kind != "float32":
            raise NetworkError(
                f"the network computes in {kind} on {self.device}, and ONNX Runtime runs it in "
                "float32 on the CPU; load it so, or leave that out (--runtime torch)"
            )
        differs = difference_of(self.identity(), session.identity())
        if differs is not None:
            raise NetworkMismatch(
                f"the ONNX file holds another network than the one it is to run: {differs}; write "
                "it again with `embedcam export`, or leave it out (--runtime onnx makes its own)"
            )
        network = copy.copy(self)
        network._session = session
        if session.embed(self.probe_images()).norm is None and not self.head_kind.affine:
            raise NetworkError(
                "the ONNX file does not tell the length of its embeddings before they are "
                "normalised, and what follows the layer is not affine; write it again with "
                "`embedcam export`"
            )
        return network

    # Facts

    @property
    def device(self) -> torch.device:
        """Where images are sent: where the parameters are, unless told at construction."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter: the input is converted to it."""
        return self.runner.dtype

    @property
    def hooked(self) -> bool:
        """Whether layers are found by hooks: False where trunk and head were given."""
        return self.runner.parts is None

    @property
    def onnx_file(self) -> Path | None:
        """The file that runs its passes without gradients; None where torch does."""
        return None if self._session is None else self._session.path

    @property
    def channels_last(self) -> bool:
        """Whether images go in with their channels last in memory; see `check_steady`."""
        return self.runner.channels_last

    @property
    def usual_run(self) -> RunEntry:
        """How forward passes are run where nobody says otherwise: see `usual_passes`."""
        if self._session is not None:
            return self._session.usual_run
        batch_size, _ = self._usual_passes()
        return RunEntry("torch", self.device.type, batch_size, self.channels_last)

    def repeat_run(self, run: RunEntry | None) -> int | None:
        """Return the batch size of an earlier run, and take its memory format where none was given.

        None, and nothing is taken, of a run by another runtime or on another kind of device.
        """
        usual = self.usual_run
        if run is None or (run.runtime, run.device) != (usual.runtime, usual.device):
            return None
        if not self._format_known:
            self._format_known = True
            self._put_channels_last(run.channels_last)
        return run.batch_size

    def _usual_passes(self) -> tuple[int, bool]:
        half = (self.autocast or self.dtype) in (torch.bfloat16, torch.float16)
        return usual_passes(
            "torch", self.device.type, convolutional=is_convolutional(self.module), half=half
        )

    @property
    def layout_options(self) -> LayoutOptions:
        """Layout, grid and prefix tokens, as they were given."""
        return self.runner.layout_options

    @property
    def layout(self) -> str:
        """The layer's layout, as found in the last forward; before one, as it was given."""
        found = self.runner.found
        return self.layout_options[0] if found is None else found.kind

    def __repr__(self) -> str:
        norm = "normalised" if self.normalize else "not normalised"
        name = self.name or type(self.module).__name__
        return f"<EmbeddingNetwork {name}: layer {self.layer}, {norm}, on {self.device}>"

    def describe(self) -> dict[str, Any]:
        """Return what identifies this network beside its parameters, ready for JSON."""
        return {
            "name": self.name,
            "layer": self.layer,
            "output": describe_choice(self.output),
            "layout": self.layout,
            "normalize": self.normalize,
            "preprocess": None if self.preprocess is None else self.preprocess.to_dict(),
        }

    def identity(self) -> Identity:
        """Return what tells this network from another, its probe taken with one forward pass."""
        self.check_steady()
        with full_float32(self.device), one_thread():
            features = self.forward(self.probe_images())
        described = self.describe()
        return Identity(
            parameters_sha256=hash_parameters(self.module),
            structure_sha256=hash_parameters(self.module, with_bytes=False),
            precision=str(self.autocast or self.dtype).removeprefix("torch."),
            probe_embedding=features.embedding[0].float().cpu().numpy(),
            probe_pooled=features.activations[0].mean((1, 2)).float().cpu().numpy(),
            # As it will come back from JSON: tuples as lists.
            preprocess=json.loads(json.dumps(described.pop("preprocess"))),
            **described,
        )

    def for_index(self, stored: Identity, layers: Sequence[str] = ()) -> Self:
        """Return this network as the one of an index; `NetworkMismatch` where it is another."""
        network = as_indexed(self, stored.layer)
        compare(stored, network.identity())
        return network

    def require_preprocess(self) -> AnyPreprocess:
        """Return the preprocessing, or an `InputError` where the network was given none."""
        if self.preprocess is None:
            raise InputError(
                "the network has no preprocessing, so images cannot be turned into its input; give "
                "EmbeddingNetwork(..., preprocess=Preprocess(...)), or let the function that makes "
                "it return (module, Preprocess.imagenet(224))"
            )
        return self.preprocess

    def probe_images(self, count: int = 1) -> np.ndarray:
        """Return the synthetic pictures as this network's input, float32 `[count C H W]`."""
        size = self.runner.input_size or DEFAULT_INPUT_SIZE
        return probe_inputs(count, self.preprocess, size, self.runner.channels)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Say of a failure inside that it was with an input of embedcam's own making."""
        try:
            yield
        except (NetworkError, InputError) as error:
            cause = error.__cause__
            if cause is None or self.preprocess is not None or advice_of(message_of(cause)):
                raise
            shape = [1, self.runner.channels, *(self.runner.input_size or DEFAULT_INPUT_SIZE)]
            raise NetworkError(
                f"a probe picture {shape} cannot go through the network ("
                f"{message_of(cause)}); give preprocess=, or input_size=(H, W)"
            ) from cause

    # Passes

    def forward(self, images: Images, *, allow_zero: bool = False) -> Features:
        """Return embeddings and activations of preprocessed images `[B C H W]`; no gradients.

        With `allow_zero` zeros are embedded as zeros: of a masked picture nothing may be left.

        Raises
        ------
        InputError
            Images of a wrong shape, or with NaN.
        NetworkError
            Training mode; a layer called twice or never; an unusable embedding.
        """
        if self._session is None:
            return self.runner.forward(images, allow_zero)
        try:
            embedding, norm, (maps,) = self._by_session(self._session, images)
        except EmbeddingError:
            if not allow_zero:
                raise
            return self.runner.forward(images, allow_zero)
        return Features(*map(torch.from_numpy, (embedding, norm, maps)))

    __call__ = forward

    def forward_layers(
        self, images: Images, layers: Sequence[str]
    ) -> tuple[Features, list[Tensor]]:
        """Return features as `forward`, of the last layer, and activations `[B K H W]` of all."""
        return self.runner.forward_layers(images, layers)

    def embed(self, images: Images, layers: Sequence[str] | None = None) -> Embedded:
        """Embed images `[B C H W]` into NumPy arrays; raises as `forward`."""
        if self._session is None or layers not in (None, (self.layer,), [self.layer]):
            return self.runner.embed(images, layers)
        return self._by_session(self._session, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts, float32 `[n D]`, of length 1 iff the network normalizes.

        `NetworkError` where the network has no tower for texts, or a broken one.
        """
        return embed_texts(self.texts, texts, self.normalize)

    def _by_session(self, session: "OnnxNetwork", images: Images) -> Embedded:
        """Embed images by the network's ONNX file."""
        embedded = session.embed(images.detach() if isinstance(images, Tensor) else images)
        head = None
        if embedded.norm is None:
            # An older file keeps no lengths; `with_session` has seen that the head is affine.
            head = session.affine_head(lambda: self.head_kind.weight(self.device).numpy())
        if head is None:
            return embedded
        norm = [head.norm(maps) for maps in embedded.activations[0]]
        return embedded._replace(norm=np.array(norm, np.float32))

    def run_several(
        self, images: Images, layers: Sequence[str], differentiable: bool = True
    ) -> Run:
        """Run once, hooked at several layers; see `several_pass`, and `forward_layers` without."""
        return self.runner.run(images, layers, in_graph if differentiable else copied)

    def run_from_input(
        self, images: Images, mode: AbstractContextManager[object] | None
    ) -> tuple[Features, Tensor, Tensor]:
        """Return features, z `[B D]` and the input as a leaf, gradients kept: `input_gradient`."""
        return self.runner.run_from_input(images, mode)

    def head_pass(self, images: Images) -> HeadPass:
        """Return a forward that is differentiable from the layer on; in inference mode too.

        Raises as `forward`, and where the layer's output, or that of all its patch tokens, never
        reaches the embedding.
        """
        return HeadPass(self.runner, self.runner.run(images, keep=in_graph))

    def held_pass(self, image: Images) -> HeldPass:
        """Return a forward of `[1 C H W]` that is a sum from the layer on; raises as `head_pass`.

        Attention weights, norms' statistics and the like are held: see `HeldPass.held`.
        """
        return held_pass(self.runner, image)

    def traceable(self, layers: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return images -> z `[B D]` and layers' `[B K H W]`, for exporters; nothing is checked."""
        return self.runner.traceable(self.probe_images(), layers)

    # Checks

    def check_tokens(self, images: Images) -> int:
        """Refuse a layer whose patch tokens reach nothing; returns how many images were run."""
        if self.layer in self.runner.reached or self.layout not in ("auto", *TOKENS):
            return 0
        self.head_pass(images[:1]).close()
        return 1

    def check(self, gradients: bool = True) -> None:
        """Run probe pictures, so that what cannot be explained (with `gradients`) says so early."""
        if self._sound:
            return
        self.check_steady()
        probes = self._probes()
        if gradients:
            with self.head_pass(probes) as passed:
                features = passed.features
                passed.refuse_unreached(self.module, flat=True)
        else:
            features = self.forward(probes)
        maps = features.activations
        if self.normalize and features.embedding.shape[1] == 1:
            raise NetworkError(
                "the embedding is one number, which normalised is 1 or -1 whatever the picture, so "
                "every map would be blank; give the output before it (output=), or normalize=False"
            )
        if maps.shape[2] * maps.shape[3] == 1 and not self.runner.over_positions:
            names: list[str] = []
            if self.hooked:
                with no_gradients(), self.runner.precision():
                    names = with_positions(self.module, self.runner.prepare(probes), self.layer)
            near = f", such as {names[-1]!r}" if names else ""
            size = " x ".join(str(side) for side in probes.shape[2:])
            raise NetworkError(
                f"layer {self.layer!r} has one position for an input of {size}, so every map would "
                f"be one even color; take a layer before the pooling{near}, or a larger input"
            )
        self._sound = gradients

    def check_steady(self) -> None:
        """Refuse an embedding that depends on the rest of its batch, or on chance; asked once.

        Then the memory format is settled, where it was not given.
        """
        if self._steady or self.runner.over_positions:
            return
        probes = self.probe_images(2)
        allowed = tolerance_of(self.autocast or self.dtype, self.device)
        with full_float32(self.device):
            with self.probing():
                alone = self.forward(probes[:1])
            if not takes_batches(self.forward, self.module, alone, probes, allowed):
                return  # a network of one picture at a time has no batch to depend on
            if not self._format_known:
                self._choose_format(alone, probes[:1], allowed)
        self._steady = True

    def _choose_format(self, expected: Features, probe: np.ndarray, allowed: float) -> None:
        """Have channels last where the table says so and the probe comes out the same."""
        self._format_known = True
        if not self._usual_passes()[1]:
            return
        self._put_channels_last(True)
        try:
            refuse_difference(expected, self.forward(probe), allowed, "", "")
        except NetworkError:  # such as of a module that takes views of contiguous memory only
            self._put_channels_last(False)

    def _put_channels_last(self, last: bool) -> None:
        self.runner.channels_last = last
        if self.owns_module:
            # Else the weights are laid out anew in every pass.
            lay_out(self.module, last)

    # The head

    @property
    def head_kind(self) -> HeadKind:
        """Whether the head is pooled and affine; found once, at the network's input size."""
        with self.runner.lock, torch.inference_mode(False):
            if self._kind is None:
                with self.probing():
                    alone = HeadAlone(self.runner, self._probes(), asking=True)
                self._kind = ask_head(self.runner, alone)
            return self._kind

    @property
    def already_normalized(self) -> bool:
        """Whether the module's own output always has length 1."""
        return self.head_kind.unit_norm

    def warm_up(self) -> None:
        """Find out once what later questions need: what the head is."""
        _ = self.head_kind

    @property
    def pooled_replay(self) -> bool:
        """Whether `pooled_vjp` can be used: the head is pooled, and affine or a function."""
        return self.head_kind.affine or self.head_kind.replayed

    def pooled_vjp(self, pooled: Numbers, cotangents: Images) -> Numbers:
        """Return dy/dp `[B (S) K]` of a pooled head for p `[B K]` and dy/dz `[B (S) D]`."""
        gradient = pooled_vjp(self.runner, self.head_kind, pooled, cotangents)
        return gradient.cpu().numpy() if isinstance(pooled, np.ndarray) else gradient

    def head_alone(self, image: Images, most: int | None = None) -> HeadAlone:
        """Return the head of one input `[1 C H W]` alone; at most `most` copies go at once."""
        return HeadAlone(self.runner, image, most)

    def head_outputs(self, image: Images, activations: Tensor) -> Tensor:
        """Return z `[n D]` of the head alone, on activations `[n K H W]`; see `head_alone`."""
        return HeadAlone(self.runner, image)(activations)

    def affine_head(self, stored_matrix: Callable[[], np.ndarray]) -> HeadMatrix | None:
        """Return the head where it is pooled and affine, perhaps with a norm held."""
        kind = self.head_kind
        if split_reading(self.layer)[1]:  # weights follow from it, but activations do not make z
            return None
        if not kind.affine:
            return kind.normed
        return HeadMatrix(None if kind.identity else kind.matrix)

    def _probes(self) -> Images:
        """Return two inputs to ask with: pictures, or what came first and the same reversed."""
        if not self.runner.over_positions:
            return self.probe_images(2)
        example = self.runner.example
        if example is None:
            raise InputError(
                "a network over positions has no probe of its own; run forward() on an input first"
            )
        return torch.cat([example, example.flip(-1)])
