"""What a forward pass gives, and the derivatives of the head: dy/dA for a cotangent at z."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EmbeddingError, InputError, NetworkError
from .failures import own_failures
from .layers import before_attention
from .layouts import Layout
from .state import no_gradients

_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class Features:
    """What one forward pass of B images gives; float32, or float64 for a float64 network.

    embedding: `[B D]`, of length 1 iff the network normalises.
    norm: `[B]`, the length |z| of the head's output z before that.
    activations: `[B K H W]`, whatever the layer's own layout.
    """

    embedding: Tensor
    norm: Tensor
    activations: Tensor


class HeadPass:
    """One forward of B images that can be differentiated from the layer on, as often as wanted.

    Holds the head's graph until it is dropped or closed (`with` closes it).
    """

    def __init__(
        self, features: Features, z: Tensor, leaf: Tensor, layout: Layout, layer: str
    ) -> None:
        self.features, self.layout, self.layer = features, layout, layer
        self._graph: tuple[Tensor, Tensor] | None = (z, leaf)
        self._twice: tuple[Tensor, Tensor] | None = None

    def vjp(self, cotangents: np.ndarray | Tensor) -> Tensor:
        """dy/dA `[B K H W]` for the cotangents dy/dz `[B D]` at z, BEFORE any normalisation.

        Raises:
            InputError: wrong shape, or the pass was closed.
            NetworkError: the layer's output never reaches the embedding.
        """
        z, leaf = self._open()
        with no_gradients():
            c = torch.as_tensor(cotangents, device=z.device).to(z.dtype)
            if c.shape != z.shape:
                raise InputError(
                    f"cotangents are {list(c.shape)}; expected one for each embedding, "
                    f"{list(z.shape)}"
                )
            if not z.requires_grad:
                raise unreachable(self.layer)
            c = c.clone() if c.is_inference() else c
            half = leaf.dtype == torch.float16
            scale = half_scale(c) if half else torch.ones_like(c[:, :1])
            # autograd.grad, never backward: no parameter's .grad is touched.
            found = derivatives(z, [leaf], c * scale, f"layer {self.layer!r}")[0]
            if found is None:
                raise unreachable(self.layer)
            maps = at_least_single(self.layout.to_maps(found))
            return (maps / scale[:, :, None, None] if half else maps).contiguous()

    def jvp(self, tangents: np.ndarray | Tensor) -> Tensor:
        """How z moves with the activations, to first order: dz/dA dA, `[B D]`.

        The pass must have been made with `twice=True`. Prefix tokens stay as they are.

        Args:
            tangents: dA, `[B K H W]`.

        Raises:
            InputError: wrong shape, or the pass was closed.
            NetworkError: the head cannot be differentiated twice, or not at all.
        """
        z, leaf = self._open()
        with torch.inference_mode(False), torch.enable_grad():
            given = torch.as_tensor(tangents, device=leaf.device).to(leaf.dtype)
            shape = self.features.activations.shape
            if given.shape != shape:
                raise InputError(
                    f"tangents are {list(given.shape)}; expected those of the activations, "
                    f"{list(shape)}"
                )
            try:
                if self._twice is None:
                    self._twice = _backwards(z, leaf, self.layer)
                u, back = self._twice
                raw = self.layout.to_raw(given, torch.zeros_like(leaf))
                found = torch.autograd.grad(back, u, raw, retain_graph=True)[0]
            except (RuntimeError, NotImplementedError) as error:
                said = str(error).partition("\n")[0][:200]
                raise NetworkError(
                    f"what follows layer {self.layer!r} cannot be differentiated twice ({said}); "
                    "make the pass with twice=True, or take a layer behind that step"
                ) from error
        return at_least_single(found)

    def close(self) -> None:
        """Free the graph; the features stay."""
        self._graph, self._twice = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> tuple[Tensor, Tensor]:
        """z and the leaf, while the graph is held."""
        if self._graph is None:
            raise InputError("this head pass was closed; call head_pass again")
        return self._graph


def _backwards(z: Tensor, leaf: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """u `[B D]` and dz/dA^T u: linear in u, so that its derivative towards u is dz/dA."""
    if not z.requires_grad:
        raise unreachable(layer)
    u = torch.zeros_like(z, requires_grad=True)
    back = torch.autograd.grad(z, leaf, u, create_graph=True, allow_unused=True)[0]
    if back is None:
        raise unreachable(layer)
    return u, back


def derivatives(
    z: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, since: str, keep: bool = True
) -> tuple[Tensor | None, ...]:
    """What comes back to each input from cotangents at z; None where z does not depend on it.

    Args:
        z: `[n D]`.
        inputs: what it was computed from.
        cotangents: `[n D]`.
        since: what the inputs are, for messages.
        keep: whether the graph is used again.

    Raises:
        NetworkError: a step of the network cannot be differentiated.
    """
    what = f"the derivative of what follows {since}"
    with own_failures(what, advice="take a layer behind the step that has no derivative"):
        return torch.autograd.grad(
            z, inputs, cotangents, retain_graph=keep or None, allow_unused=True
        )


def half_scale(cotangents: Tensor) -> Tensor:
    """`[B 1]`: by what to multiply cotangents `[B D]` before they go back in half precision.

    Gradients of embeddings are about 1e-4 and would lose their digits there. A power of two and its
    inverse are exact.
    """
    largest = cotangents.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.exp2(8 - torch.log2(largest).ceil())


def make_features(
    images: Tensor, z: Tensor, maps: Tensor, normalize: bool, allow_zero: bool = False
) -> Features:
    """Features of a forward pass, refused where an embedding is not a usable vector.

    Args:
        images: the input `[B C H W]`, to tell a bad picture from a bad network.
        z: the head's output, `[B D]`.
        maps: activations, `[B K H W]`.
        normalize: whether the embedding is z / |z| or z.
        allow_zero: normalise a z of zeros to zeros instead of refusing it.

    Raises:
        InputError: an image holds NaN or infinity.
        EmbeddingError: an embedding or the activations do, or it is zero and was to be normalised.
    """
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
    embedding = z / divisor[:, None] if normalize else z
    return Features(embedding, norm, kept)


def _refuse_bad(images: Tensor, norm: Tensor, maps: Tensor, zero_too: bool) -> None:
    bad_images = ~torch.isfinite(images.flatten(1)).all(dim=1)
    if bool(bad_images.any()):
        raise InputError(
            f"images at positions {listed(bad_images)} of the batch hold NaN or infinity; "
            "check their preprocessing"
        )
    weights = "leave the picture out, or check the network's weights"
    causes = (
        (~torch.isfinite(norm), "the embedding holds NaN or infinity",
         f"{weights}, or compute in float32"),
        ((norm == 0) & zero_too, "the embedding is zero and cannot be normalised",
         f"{weights}, or use normalize=False"),
        (~torch.isfinite(maps.flatten(1)).all(1), "the layer's activations hold NaN or infinity",
         f"{weights}, or compute in float32"),
    )  # fmt: skip
    found = [
        (flags.nonzero().flatten().tolist(), what, advice)
        for flags, what, advice in causes
        if bool(flags.any())
    ]
    if found:
        # The first picture's cause, however large the batch is.
        rows, what, advice = min(found, key=lambda one: one[0][0])
        raise EmbeddingError(what, advice, rows, len(norm))


def not_finite(which: str) -> NetworkError:
    """The error for embeddings with NaN or infinity."""
    return NetworkError(
        f"the embeddings {which} hold NaN or infinity; check the weights, or compute in float32"
    )


def listed(flags: Tensor) -> str:
    """The first few places where flags `[n]` are set, in words."""
    found = flags.nonzero().flatten().tolist()
    shown = ", ".join(map(str, found[:10]))
    return f"{shown}, ..." if len(found) > 10 else shown


def refuse_unreached(made: HeadPass, module: nn.Module) -> None:
    """Refuse a layer whose output, or whose patch tokens, cannot change the embedding.

    Raises:
        NetworkError: naming a layer that can be taken instead, where one is known.
    """
    assert made._graph is not None
    gradient = made.vjp(any_cotangents(made._graph[0]))
    if made.layout.tokens and not bool(gradient.any()):
        raise dead_tokens(made.layer, module)


def refuse_flat(made: HeadPass) -> None:
    """Refuse an embedding whose derivative at the layer is zero everywhere.

    Raises:
        NetworkError: naming the layer, and what such steps are.
    """
    gradient = made.vjp(any_cotangents(made._open()[0]))
    if not bool(gradient.any()):
        raise NetworkError(
            f"the derivative of the embedding at layer {made.layer!r} is zero everywhere, as "
            "behind a sign, a rounding or a hash, so every map would be blank; give the output "
            "before that step (output=), or take a method of scores, such as 'scorecam'"
        )


def any_cotangents(z: Tensor) -> Tensor:
    """Cotangents `[B D]` that look at every number of z: what they do not reach, nothing does."""
    return torch.linspace(-1, 1, z.shape[1] + 1, device=z.device)[1:].expand_as(z)


def dead_tokens(layer: str, module: nn.Module) -> NetworkError:
    """The error for a layer whose patch tokens the embedding does not depend on."""
    nearest = before_attention(module)
    advice = f", {nearest!r}" if nearest and nearest != layer else ""
    return NetworkError(
        f"the patch tokens of layer {layer!r} never reach the embedding (their gradient is zero): "
        "after the last attention only the class token counts; take the layer before its "
        f"attention{advice}"
    )


def unreachable(layer: str) -> NetworkError:
    """The error for a layer that the embedding does not depend on."""
    return NetworkError(
        f"the output of layer {layer!r} never reaches the embedding, so it cannot explain it; "
        "choose a layer between the image and the embedding (and one not run under no_grad)"
    )


def at_least_single(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def replay_vjp(replay: Callable[[Tensor], Tensor], pooled: Tensor, cotangents: Tensor) -> Tensor:
    """dy/dp of a head behind the pooling, by running it on the pooled vectors.

    Args:
        replay: p `[n K]` -> z `[n D]`.
        pooled: `[B K]`.
        cotangents: dy/dz, `[B S D]`.

    Returns:
        `[B S K]`.
    """
    images, triplets, width = cotangents.shape
    rows = pooled.repeat_interleave(triplets, dim=0)
    flat = cotangents.reshape(-1, width)
    step = max(1, _CHUNK_NUMBERS // max(pooled.shape[1], width))
    found = []
    with torch.enable_grad():
        for start in range(0, len(rows), step):
            part = rows[start : start + step].detach().clone().requires_grad_()
            # A clone is handed on: the head may begin with an in-place unit.
            z = replay(part.clone())
            back = derivatives(z, [part], flat[start : start + step], "the pooling", keep=False)[0]
            assert back is not None
            found.append(back)
    gradients = torch.cat(found) if found else torch.zeros_like(rows)
    return gradients.reshape(images, triplets, -1)
