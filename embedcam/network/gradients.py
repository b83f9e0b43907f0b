"""Derivatives from a forward pass: of the head at its layers, of all at the input.

Guided backpropagation (Springenberg et al., ICLR 2015) keeps a gradient at a rectifier only where
input and gradient are both positive. Rectifiers are met as they are called: no module is replaced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.overrides import TorchFunctionMode

from ..errors import InputError, NetworkError
from .layers import TOKENS, Images, before_attention
from .module import no_gradients, user_code
from .runner import Features, Run, Runner, at_least_single

if TYPE_CHECKING:
    from .embedding_network import EmbeddingNetwork


def derivatives(
    z: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, since: str, keep: bool = True
) -> tuple[Tensor | None, ...]:
    """Return what comes back to inputs from cotangents `[n D]` at z; None where nothing does."""
    what = f"the derivative of what follows {since}"
    with user_code(what, advice="take a layer behind the step that has no derivative"):
        # autograd.grad, never backward: no parameter's .grad is touched.
        return torch.autograd.grad(
            z, inputs, cotangents, retain_graph=keep or None, allow_unused=True
        )


def half_scale(cotangents: Tensor) -> Tensor:
    """Return powers of two `[B 1]`, by which cotangents `[B D]` keep digits in half precision."""
    largest = cotangents.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.exp2(8 - torch.log2(largest).ceil())


def unreachable(layer: str) -> NetworkError:
    """Return the error for a layer that the embedding does not depend on."""
    return NetworkError(
        f"the output of layer {layer!r} never reaches the embedding, so it cannot explain it; "
        "choose a layer between the image and the embedding (and one not run under no_grad)"
    )


class Graph:
    """The graph from layers' outputs to z, held until it is closed (`with` closes it).

    features: with the activations of the last layer; activations: of each, `[B K H W]`.
    """

    def __init__(self, network: Runner, run: Run) -> None:
        self._held: tuple[Tensor, list[Tensor]] | None = (run.z, run.kept)
        self._layouts, self._names, self._network = run.layouts, run.names, network
        with no_gradients():
            self.activations = run.activations()
            self.features = run.features(self.activations[-1], network.normalize)
        if not network.reached.issuperset(run.names):
            self.refuse_unreached(network.module)
            network.reached.update(run.names)

    def close(self) -> None:
        """Free the graph; the features stay."""
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> tuple[Tensor, list[Tensor]]:
        if self._held is None:
            raise InputError("this pass was closed; make another")
        return self._held

    def _back(self, cotangents: Images | None) -> list[Tensor]:
        """Return dy/dA `[B K H W]` of each layer for cotangents `[B D]`, None for any, at z."""
        z, kept = self._open()
        # What goes back has its types from the forward pass: an autocast around the call is none.
        with no_gradients(), self._network.precision(autocast=False):
            if cotangents is None:  # to every number of z: what they do not reach, nothing does
                cotangents = torch.linspace(-1, 1, z.shape[1] + 1)[1:].expand_as(z)
            c = torch.as_tensor(cotangents, device=z.device).to(z.dtype)
            if c.shape != z.shape:
                raise InputError(
                    f"cotangents are {list(c.shape)}; expected one for each embedding, "
                    f"{list(z.shape)}"
                )
            if not z.requires_grad:
                raise unreachable(", ".join(self._names))
            c = c.clone() if c.is_inference() else c
            half = any(raw.dtype == torch.float16 for raw in kept)
            scale = half_scale(c) if half else torch.ones_like(c[:, :1])
            since = f"{'layer' if len(kept) == 1 else 'layers'} {', '.join(map(repr, self._names))}"
            gradients = []
            for name, layout, raw in zip(
                self._names, self._layouts, derivatives(z, kept, c * scale, since), strict=True
            ):
                if raw is None:
                    raise unreachable(name)
                maps = at_least_single(layout.to_maps(raw))
                gradients.append((maps / scale[:, :, None, None] if half else maps).contiguous())
        return gradients

    def refuse_unreached(self, module: nn.Module, flat: bool = False) -> None:
        """Refuse a layer whose output, or all whose patch tokens, cannot change the embedding.

        With `flat` also an embedding whose derivative is zero everywhere.
        """
        for name, layout, gradient in zip(
            self._names, self._layouts, self._back(None), strict=True
        ):
            reached = bool(gradient.any())
            if layout.kind in TOKENS and not reached:
                nearest = before_attention(module)
                advice = f", {nearest!r}" if nearest and nearest != name else ""
                raise NetworkError(
                    f"the patch tokens of layer {name!r} never reach the embedding: after the last "
                    f"attention only the class token counts; take the layer before its "
                    f"attention{advice}"
                )
            if flat and not reached:
                raise NetworkError(
                    f"the derivative of the embedding at layer {name!r} is zero everywhere, as "
                    "behind a sign, a rounding or a hash, so every map would be blank; give the "
                    "output before that step (output=), or take a method of scores, such as "
                    "'scorecam'"
                )


class HeadPass(Graph):
    """One forward of B images that can be differentiated from the layer on, until it is closed."""

    def vjp(self, cotangents: Images) -> Tensor:
        """Return dy/dA `[B K H W]` for the cotangents dy/dz `[B D]` at z, before normalization."""
        return self._back(cotangents)[0]


class SeveralPass(Graph):
    """One forward that can be differentiated from several layers on, until it is closed.

    layers: names, in the order they were asked for; depth: their places in the order they ran.
    """

    def __init__(self, network: Runner, run: Run) -> None:
        super().__init__(network, run)
        self.layers, self.depth = run.names, run.depth

    def vjp(self, cotangents: Images) -> list[Tensor]:
        """Return dy/dA of each layer, `[B K H W]`, for the cotangents dy/dz `[B D]` at z."""
        return self._back(cotangents)


def several_pass(network: "EmbeddingNetwork", images: Images, layers: Sequence[str]) -> SeveralPass:
    """Run a network, given as a module, once and keep several layers' outputs, differentiable."""
    return SeveralPass(network.runner, network.run_several(images, layers))


# At the input

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_)
# The arguments behind the input of those that have any.
_ARGUMENTS: dict[Callable[..., Tensor], Sequence[str]] = {
    F.relu: ["inplace"],
    F.relu6: ["inplace"],
    F.hardtanh: ["min_val", "max_val", "inplace"],
    F.hardtanh_: ["min_val", "max_val"],
}
Argument = Tensor | float


class _Guided(torch.autograd.Function):
    """max(x, 0), at most `top`; back through it goes what is positive, where x was between."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients: Tensor) -> tuple[Tensor, None]:
        (passed,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * passed, None


class _GuidedMode(TorchFunctionMode):
    """Every rectifier called inside is a guided one; they are counted."""

    count = 0

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: Sequence[Argument] = (),
        kwargs: Mapping[str, Argument] | None = None,
    ) -> Tensor:
        kwargs = kwargs or {}
        names = ("input", *_ARGUMENTS.get(func, ()))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, top = given.get("input"), _top_of(func, given)
        if top is None or not isinstance(x, Tensor):
            return func(*args, **kwargs)
        self.count += 1
        rectified: Tensor = _Guided.apply(x, top)
        # Whoever asked for a change in place may go on with its own tensor.
        in_place = func in _IN_PLACE or given.get("inplace", False)
        return x.copy_(rectified) if in_place else rectified


def _top_of(func: Callable[..., Tensor], given: Mapping[str, Argument]) -> float | None:
    """Return where a rectifier is cut off above, infinity for a plain one; None for the rest."""
    if func in _RELU:
        return math.inf
    if func in (F.hardtanh, F.hardtanh_) and given.get("min_val", -1.0) == 0:
        return float(given.get("max_val", 1.0))
    return 6.0 if func is F.relu6 else None


def input_gradient(
    network: "EmbeddingNetwork",
    images: Images,
    cotangents: Callable[[Features], Tensor],
    *,
    guided: bool = True,
) -> tuple[Features, Tensor]:
    """Return the features and dy/dX `[B C H W]` of the input, rectifiers perhaps guided.

    `cotangents` makes dy/dz `[B D]` of what the forward pass gave.
    """
    if not torch.as_tensor(images[:1]).is_floating_point():
        raise InputError(
            "the input is whole numbers, such as words, which have no gradient; use a method of "
            "the layer, such as 'gradcam'"
        )
    mode = _GuidedMode()
    features, z, leaf = network.run_from_input(images, mode if guided else None)
    if guided and not mode.count:
        raise NetworkError(
            "guided backpropagation changes what goes back through ReLU, and this network has "
            "none; use a method of the layer, such as 'gradcam' or 'layercam'"
        )
    with no_gradients():
        c = cotangents(features).to(z.dtype)
        scale = half_scale(c)
        gradient = None
        if z.requires_grad:
            gradient = derivatives(z, [leaf], c * scale, "the input", keep=False)[0]
    if gradient is None:
        raise NetworkError(
            "no gradient comes back from the embedding to the input; run no part of the network "
            "under no_grad, and cut nothing with detach()"
        )
    gradient = at_least_single(gradient)
    return features, gradient / scale.reshape(-1, *[1] * (gradient.ndim - 1))
