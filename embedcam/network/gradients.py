"""What a forward pass gives, and derivatives: of the head at its layers, of all at the input.

Guided backpropagation (Springenberg et al., ICLR 2015) keeps a gradient at a rectifier only where
input and gradient are both positive. Rectifiers are met as they are called: no module is replaced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import EmbeddingError, InputError, NetworkError
from .layers import Images, Layout, before_attention
from .module import no_gradients, refuse_inference, user_code

if TYPE_CHECKING:
    from .embedding_network import EmbeddingNetwork

_CHUNK_NUMBERS = 1 << 22


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


@dataclass
class SeveralRun:
    """One run hooked at several layers.

    names: of the layers, as asked for; z: the head's output `[B D]`; kept: each layer's output;
    batch: the prepared input; layouts: of the layers; depth: their places in the order they ran.
    """

    names: list[str]
    z: Tensor
    kept: list[Tensor]
    batch: Tensor
    layouts: list[Layout]
    depth: list[int]

    def activations(self) -> list[Tensor]:
        """Return `[B K H W]` of each layer, without a graph."""
        return [
            at_least_single(layout.to_maps(raw.detach())).contiguous()
            for raw, layout in zip(self.kept, self.layouts, strict=True)
        ]


def make_features(
    images: Tensor, z: Tensor, maps: Tensor, normalize: bool, allow_zero: bool = False
) -> Features:
    """Return the features of z `[B D]` and maps `[B K H W]`, all finite, no z of length zero."""
    norm = torch.linalg.vector_norm(z, dim=1)
    # In Python: for one query, five small tensor operations cost more than the division.
    lengths = norm.tolist()
    vanished = normalize and 0.0 in lengths
    kept = at_least_single(maps).contiguous()
    # One sum tells of most; a sum may also overflow where no number is infinite.
    finite = all(map(math.isfinite, [*lengths, float(kept.sum())]))
    if not finite or (vanished and not allow_zero):
        _refuse_bad(images, norm, kept, normalize and not allow_zero)
    divisor = torch.where(norm > 0, norm, 1) if vanished else norm
    return Features(z / divisor[:, None] if normalize else z, norm, kept)


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


def any_cotangents(z: Tensor) -> Tensor:
    """Return cotangents `[B D]` to every number of z: what they do not reach, nothing does."""
    return torch.linspace(-1, 1, z.shape[1] + 1, device=z.device)[1:].expand_as(z)


def unreachable(layer: str) -> NetworkError:
    """Return the error for a layer that the embedding does not depend on."""
    return NetworkError(
        f"the output of layer {layer!r} never reaches the embedding, so it cannot explain it; "
        "choose a layer between the image and the embedding (and one not run under no_grad)"
    )


def dead_tokens(layer: str, module: nn.Module) -> NetworkError:
    """Return the error for a layer whose patch tokens the embedding does not depend on."""
    nearest = before_attention(module)
    advice = f", {nearest!r}" if nearest and nearest != layer else ""
    return NetworkError(
        f"the patch tokens of layer {layer!r} never reach the embedding: after the last attention "
        f"only the class token counts; take the layer before its attention{advice}"
    )


class _Graph:
    """The graph from several layers' outputs to z, held until it is closed (`with` closes it)."""

    def __init__(
        self, z: Tensor, kept: list[Tensor], layouts: list[Layout], layers: list[str]
    ) -> None:
        self._held: tuple[Tensor, list[Tensor]] | None = (z, kept)
        self._layouts, self._names = layouts, layers

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

    def _back(self, cotangents: Images) -> list[Tensor]:
        """Return dy/dA `[B K H W]` of each layer for cotangents `[B D]` at z."""
        z, kept = self._open()
        c = torch.as_tensor(cotangents, device=z.device).to(z.dtype)
        if c.shape != z.shape:
            raise InputError(
                f"cotangents are {list(c.shape)}; expected one for each embedding, {list(z.shape)}"
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


class HeadPass(_Graph):
    """One forward of B images that can be differentiated from the layer on, until it is closed."""

    def __init__(
        self, features: Features, z: Tensor, leaf: Tensor, layout: Layout, layer: str
    ) -> None:
        super().__init__(z, [leaf], [layout], [layer])
        self.features, self.layout, self.layer = features, layout, layer
        self._twice: tuple[Tensor, Tensor] | None = None

    def vjp(self, cotangents: Images) -> Tensor:
        """Return dy/dA `[B K H W]` for the cotangents dy/dz `[B D]` at z, before normalization."""
        with no_gradients():
            return self._back(cotangents)[0]

    def jvp(self, tangents: Images) -> Tensor:
        """Return dz/dA dA `[B D]`, prefix tokens as they are; the pass is of `twice=True`."""
        z, (leaf,) = self._open()
        with torch.inference_mode(False), torch.enable_grad():
            moved = torch.as_tensor(tangents, device=leaf.device).to(leaf.dtype)
            shape = self.features.activations.shape
            if moved.shape != shape:
                raise InputError(
                    f"tangents are {list(moved.shape)}; expected those of the activations, "
                    f"{list(shape)}"
                )
            try:
                if self._twice is None:
                    # dz/dA^T u is linear in u: its derivative towards u is dz/dA.
                    u = torch.zeros_like(z, requires_grad=True)
                    self._twice = u, torch.autograd.grad(z, leaf, u, create_graph=True)[0]
                u, back = self._twice
                raw = self.layout.to_raw(moved, torch.zeros_like(leaf))
                outcome = torch.autograd.grad(back, u, raw, retain_graph=True)[0]
            except (RuntimeError, NotImplementedError) as error:
                message = str(error).partition("\n")[0][:200]
                raise NetworkError(
                    f"what follows layer {self.layer!r} cannot be differentiated twice "
                    f"({message}); make the pass with twice=True, or take a layer behind that step"
                ) from error
        return at_least_single(outcome)

    def close(self) -> None:
        """Free the graph; the features stay."""
        super().close()
        self._twice = None

    def refuse_unreached(self, module: nn.Module) -> None:
        """Refuse a layer whose output, or whose patch tokens, cannot change the embedding."""
        gradient = self.vjp(any_cotangents(self._open()[0]))
        if self.layout.tokens and not bool(gradient.any()):
            raise dead_tokens(self.layer, module)

    def refuse_flat(self) -> None:
        """Refuse an embedding whose derivative at the layer is zero everywhere."""
        if not bool(self.vjp(any_cotangents(self._open()[0])).any()):
            raise NetworkError(
                f"the derivative of the embedding at layer {self.layer!r} is zero everywhere, as "
                "behind a sign, a rounding or a hash, so every map would be blank; give the output "
                "before that step (output=), or take a method of scores, such as 'scorecam'"
            )


class SeveralPass(_Graph):
    """Activations of several layers from one forward of B images, and dy/dA at each of them.

    layers: names, in the order they were asked for; features: with the activations of the last;
    activations: of each, `[B K H W]`; depth: the layers' places in the order they ran.
    """

    def __init__(self, run: SeveralRun, normalize: bool, module: nn.Module) -> None:
        super().__init__(run.z, run.kept, run.layouts, run.names)
        self.layers, self.depth, self._module = run.names, run.depth, module
        with no_gradients():
            self.activations = run.activations()
            last = self.activations[-1]
            self.features = make_features(run.batch, run.z.detach(), last, normalize)

    def vjp(self, cotangents: Tensor) -> list[Tensor]:
        """Return dy/dA of each layer, `[B K H W]`, for the cotangents dy/dz `[B D]` at z."""
        with no_gradients():
            gradients = self._back(cotangents)
            z, kept = self._open()
            for layer, layout, raw, gradient in zip(
                self.layers, self._layouts, kept, gradients, strict=True
            ):
                # Zeros may be the target's own; those that no cotangent moves are the network's.
                if layout.tokens and not bool(gradient.any()):
                    every = any_cotangents(z).to(z.dtype)
                    every = every * half_scale(every)
                    (reached,) = torch.autograd.grad(z, raw, every, retain_graph=True)
                    if not bool(layout.to_maps(reached).any()):
                        raise dead_tokens(layer, self._module)
        return gradients


def several_pass(network: "EmbeddingNetwork", images: Images, layers: Sequence[str]) -> SeveralPass:
    """Run a network, given as a module, once and keep several layers' outputs, differentiable."""
    refuse_inference(network.module)
    run = network.run_several(images, layers)
    return SeveralPass(run, network.normalize, network.module)


def replay_vjp(replay: Callable[[Tensor], Tensor], pooled: Tensor, cotangents: Tensor) -> Tensor:
    """Return dy/dp `[B S K]` of a head behind the pooling, p `[B K]`, dy/dz `[B S D]`."""
    images, triplets, width = cotangents.shape
    rows = pooled.repeat_interleave(triplets, dim=0)
    flat = cotangents.reshape(-1, width)
    step = max(1, _CHUNK_NUMBERS // max(pooled.shape[1], width))
    gradients = torch.zeros_like(rows)
    with torch.enable_grad():
        for start in range(0, len(rows), step):
            part = rows[start : start + step].detach().clone().requires_grad_()
            # A clone is handed on: the head may begin with an in-place unit.
            z = replay(part.clone())
            c = flat[start : start + step]
            back = derivatives(z, [part], c, "the pooling", keep=False)[0]
            if back is None:
                raise unreachable("the pooling")
            gradients[start : start + step] = back
    return gradients.reshape(images, triplets, -1)


# At the input

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_)
# Where `inplace` stands among the arguments of those that have it.
_INPLACE_AT = {F.relu: 1, F.relu6: 1, F.hardtanh: 3}


class _Guided(torch.autograd.Function):
    """max(x, 0), at most `top`; back through it goes what is positive, where x was between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (passed,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * passed, None


class _GuidedMode(TorchFunctionMode):
    """Every rectifier called inside is a guided one; they are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        top = _top_of(func, args, kwargs)
        if top is None:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        rectified = _Guided.apply(x, top)
        place = _INPLACE_AT.get(func)
        asked = args[place] if place and len(args) > place else kwargs.get("inplace", False)
        # Whoever asked for a change in place may go on with its own tensor.
        return x.copy_(rectified) if func in _IN_PLACE or asked else rectified


def _top_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float | None:
    """Return where a rectifier is cut off above, infinity for a plain one; None for the rest."""
    if func in _RELU or func is F.relu6:
        return 6.0 if func is F.relu6 else math.inf
    if func not in (F.hardtanh, F.hardtanh_):
        return None
    low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
    return float(high) if low == 0 else None


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
    refuse_inference(network.module)
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
