"""The gradient at the input, plain or guided: Springenberg et al., ICLR 2015.

Guided backpropagation keeps a gradient at a rectifier only where the input and the gradient are
both positive. The rectifiers are met as they are called, as modules or as functions, so no module
is replaced and none has to be put back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import InputError, NetworkError
from .embedding_network import EmbeddingNetwork
from .gradients import Features, at_least_single, derivatives, half_scale
from .runs import Images
from .state import no_gradients, refuse_inference

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELU6 = (F.relu6,)
_BOUNDED = (F.hardtanh, F.hardtanh_)
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
        found = _Guided.apply(x, top)
        # Whoever asked for a change in place may go on with its own tensor.
        return x.copy_(found) if _in_place(func, args, kwargs) else found


def _top_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float | None:
    """Where a rectifier is cut off above, infinity for a plain one; None for other functions."""
    if func in _RELU:
        return float("inf")
    if func in _RELU6:
        return 6.0
    if func in _BOUNDED:
        low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
        return float(high) if low == 0 else None
    return None


def _in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    place = _INPLACE_AT.get(func)
    given = kwargs.get("inplace", False)
    return func in _IN_PLACE or bool(args[place] if place and len(args) > place else given)


def input_gradient(
    network: EmbeddingNetwork,
    images: Images,
    cotangents: Callable[[Features], Tensor],
    *,
    guided: bool = True,
) -> tuple[Features, Tensor]:
    """dy/dX of the input, through the whole network.

    Args:
        network: the network.
        images: `[B C H W]`.
        cotangents: dy/dz `[B D]` of what the forward pass gave.
        guided: whether rectifiers are guided.

    Returns:
        The features, and the gradient `[B C H W]`.

    Raises:
        InputError: inputs that are numbers of words, which have no derivative.
        NetworkError: guided, and the network calls no rectifier (ReLU or ReLU6); or the embedding
            does not depend on the input by way of autograd.
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
        found = None
        if z.requires_grad:
            found = derivatives(z, [leaf], c * scale, "the input", keep=False)[0]
    if found is None:
        raise NetworkError(
            "no gradient comes back from the embedding to the input; run no part of the network "
            "under no_grad, and cut nothing with detach()"
        )
    found = at_least_single(found)
    return features, found / scale.reshape(-1, *[1] * (found.ndim - 1))
