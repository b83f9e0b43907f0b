"""Running a head with what is not linear in it held, so that its output is a sum.

A head mixes its activations by steps that are linear in them (projections, means, residuals) and
steps that are not. Of the latter, attention weights and the norms' statistics only say *how much*
of a linear step is taken: held at their values, what follows is linear. What a rectifier or
another activation function makes is left out of the sum and told apart, unless everything goes
through it: then its slope (output over input) is held. So the output is exactly what activations,
other inputs and such outputs give, plus biases. What is not known here is told apart, too.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import MULTI_HEAD
from .runner import at_least_single

Argument: TypeAlias = "Tensor | float | str | slice | Sequence[Argument] | None"
Function = Callable[..., Tensor]
Arguments = Sequence[Argument]
Change = Callable[[Tensor], Tensor]
Named = Mapping[str, Argument]

ATTENTION, NORMS = "attention weights", "the norms' statistics"
LARGEST, SLOPES = "which values are largest", "the slopes of activation functions"


def _named_so(names: str) -> frozenset[str]:
    return frozenset(names.split())


# By the functions' names without the underscores of their variants, such as add_ and __rsub__.
_LINEAR = _named_so(
    "view view_as reshape reshape_as permute transpose swapaxes swapdims t movedim moveaxis "
    "flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to repeat tile "
    "repeat_interleave contiguous clone to float double half bfloat16 type type_as cpu cuda chunk "
    "split split_with_sizes tensor_split unbind narrow select getitem index_select gather "
    "take_along_dim roll flip cat concat concatenate stack hstack vstack pad constant_pad_nd "
    "unfold fold im2col col2im as_strided diagonal tril triu pixel_shuffle pixel_unshuffle where "
    "masked_fill sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample neg negative positive add sub "
    "subtract rsub dropout dropout1d dropout2d feature_dropout alpha_dropout batch_norm "
    "setitem copy index_add scatter_add"
)
_PRODUCTS = _named_so(
    "mul multiply matmul rmatmul mm bmm mv dot inner outer einsum linear bilinear conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution addmm addbmm baddbmm "
    "addmv addcmul"
)
_LARGEST = _named_so(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool2d_with_indices amax amin max min maximum minimum topk "
    "sort"
)
# Elementwise, and zero at zero, so that the output over the input has no pole there.
_BENT = _named_so(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardtanh tanh "
    "hardshrink softshrink tanhshrink softsign sin asinh atan erf expm1 log1p abs clamp clamp_min "
    "clamp_max clip square sqrt pow"
)
_GATES = {"sigmoid", "hardsigmoid"}
_SCALES = {"rsqrt", "reciprocal", "rdiv", "rtruediv"}
_AS_ANOTHER = {"view_as", "expand_as", "reshape_as", "type_as", "to"}
_AS_IT_IS = {"get", "set", "detach"}  # properties, such as .shape and .T


class Holding(TorchFunctionMode):
    """Inside, from a differentiable tensor on, all that is computed is affine in the leaves.

    Parameters
    ----------
    constants
        The network's parameters and buffers; what else comes from before is an input.
    opened
        Numbers of the activation functions, in the order they are called, whose slopes are held
        instead of their outputs.

    Attributes: `entered`, the inputs other than the first, and `bent`, what activation functions
    and unknown steps gave, by number, all leaves; `openable`, numbers that may be opened; `held`,
    words for what was held.
    """

    def __init__(self, constants: Iterable[Tensor], opened: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.entered: list[Tensor] = []
        self.bent: dict[int, Tensor] = {}
        self.openable, self._opened = set[int](), opened
        self._words = dict[str, None]()
        self._constants = {id(one): one for one in constants}
        self._inputs = dict[tuple[int, int], tuple[Tensor, Tensor]]()
        self._made = weakref.WeakValueDictionary[int, Tensor]()
        self._gates = weakref.WeakValueDictionary[int, Tensor]()
        self._count = 0

    @property
    def held(self) -> tuple[str, ...]:
        """What was held, in words, in the order it was met."""
        return tuple(self._words)

    @property
    def attended(self) -> bool:
        """Whether an attention was met."""
        return ATTENTION in self._words

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Named | None = None,
    ) -> Argument:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        if name in _AS_IT_IS:
            return func(*args, **kwargs)
        given = list(_tensors((args, *kwargs.values())))
        live = sum(map(_is_live, given))
        if not live:
            return self._constant(func, given, args, kwargs)
        if name.endswith("_like") or name.startswith("new_"):
            return self._constant(func, [], args, kwargs)
        if name in _AS_ANOTHER and isinstance(args[0], Tensor) and not _is_live(args[0]):
            return self._constant(func, [args[0]], args, kwargs)
        if name in _RULES:
            return _RULES[name](self, *args, **kwargs)
        if name in _LINEAR:
            return self._linear(func, args, kwargs)
        if name in _LARGEST:
            self._words[LARGEST] = None
            return func(*_mapped(args, _plain), **kwargs)
        if name in ("div", "divide", "true_divide") and "rounding_mode" not in kwargs:
            return self._quotient(func, args, kwargs)
        if name in _PRODUCTS:
            factors = args[1:] if name.startswith(("add", "badd")) else args
            return self._product(func, args, kwargs, (*factors, *kwargs.values()))
        negative = name == "pow" and len(args) == 2 and _below_zero(args[1])
        if negative or name in _SCALES or name in _GATES or name == "softmax":
            return self._weights(func, name, args, kwargs)
        return self._other(func, name in _BENT and live == 1, args, kwargs)

    # Constants, and what comes in from before

    def _constant(
        self, func: Function, given: Sequence[Tensor], args: Arguments, kwargs: Named
    ) -> Argument:
        if not given and not list(_tensors((args, *kwargs.values()))):
            out = func(*args, **kwargs)  # which may be what turns gradients on or off
        else:
            with torch.no_grad():
                out = func(*args, **kwargs)
        foreign, gated = any(map(self._is_input, given)), any(map(self._is_gate, given))
        for one in _tensors(out):
            if gated:
                self._gates[id(one)] = one
            if foreign:
                self._made.pop(id(one), None)
            else:
                self._made[id(one)] = one
        return out

    def _is_gate(self, one: Tensor) -> bool:
        return self._gates.get(id(one)) is one

    def _is_input(self, one: Tensor) -> bool:
        """Whether a tensor is neither differentiated nor made of parameters alone."""
        return (
            one.is_floating_point()
            and not _is_live(one)
            and not isinstance(one, nn.Parameter)
            and id(one) not in self._constants
            and self._made.get(id(one)) is not one
        )

    def _joined(self, one: Tensor) -> Tensor:
        """Return an input as a leaf that takes part in the sum; all else as it is, or plain."""
        if not self._is_input(one):
            return _plain(one)
        key = id(one), one._version
        if key not in self._inputs:
            leaf = one.detach().clone().requires_grad_()
            self.entered.append(leaf)
            # The tensor is kept, so that no other takes its id.
            self._inputs[key] = one, leaf.clone()
        return self._inputs[key][1]

    # Steps

    def _linear(self, func: Function, args: Arguments, kwargs: Named) -> Argument:
        first = args[0] if args else None
        if _in_place(func) and isinstance(first, Tensor) and self._is_input(first):
            first.copy_(self._joined(first))
        return func(*_behind(func, args, self._joined), **_named(kwargs, self._joined))

    def _quotient(self, func: Function, args: Arguments, kwargs: Named) -> Argument:
        above, below = (*args, *kwargs.values())[:2]
        if isinstance(below, Tensor):
            self._words.update({NORMS: None} if _is_live(below) else {})
            below = below.detach()
        return func(above, below)

    def _product(
        self, func: Function, args: Arguments, kwargs: Named, factors: Arguments
    ) -> Argument:
        tensors = list(_tensors(factors))
        live = sum(map(_is_live, tensors))
        if live < 2 and not any(map(self._is_gate, tensors)):
            return func(*_behind(func, args, _plain), **_named(kwargs, _plain))
        # In place only in the end: until then both factors are needed.
        first = args[0].clone() if _in_place(func) and isinstance(args[0], Tensor) else args[0]
        given = (first, *args[1:])
        with torch.no_grad():
            value = func(*_mapped(given, _copied), **kwargs)

        def shared() -> Tensor:
            # Of a b each factor has half; a gate has nothing.
            parts = [func(*_only(given, place), **kwargs) for place in range(live)]
            return parts[0] if live == 1 else (parts[0] + parts[1]) / 2

        return self._written(func, args, self._bend(value, shared if live < 3 else None))

    def _weights(self, func: Function, name: str, args: Arguments, kwargs: Named) -> Argument:
        self._words[ATTENTION if name == "softmax" else SLOPES if name in _GATES else NORMS] = None
        with torch.no_grad():
            out = func(*_mapped(args, _copied), **kwargs)
        if name in _GATES:
            self._gates.update((id(one), one) for one in _tensors(out))
        return self._written(func, args, out)

    def _other(self, func: Function, bent: bool, args: Arguments, kwargs: Named) -> Argument:
        with torch.no_grad():
            copies = _mapped(args, _copied)
            out = func(*copies, **_named(kwargs, _copied))
            if not any(one.is_floating_point() for one in _tensors(out)):
                return func(*args, **kwargs)  # such as a size, a comparison, a largest place
        x = next(filter(_is_live, _tensors(args)), None)

        def bend(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            if not bent or x is None or x.shape != value.shape:
                return self._bend(value, None)
            flat = x.detach()
            slope = torch.where(flat == 0, 0, value / torch.where(flat == 0, 1, flat))
            return self._bend(value, lambda: x * slope)

        return self._written(func, args, _changed(out, bend), any(out is one for one in copies))

    def _written(
        self, func: Function, args: Arguments, made: Argument, in_place: bool = False
    ) -> Argument:
        """Return what was made, in the tensor that was to be changed where it was to be."""
        first = args[0] if args else None
        if (in_place or _in_place(func)) and isinstance(first, Tensor) and isinstance(made, Tensor):
            return first.copy_(made)
        return made

    def _bend(self, value: Tensor, slope: Callable[[], Tensor] | None) -> Tensor:
        """Return the output of a step that is not linear, as a leaf or with its slope held."""
        number, self._count = self._count, self._count + 1
        if slope is not None:
            self.openable.add(number)
        if slope is not None and number in self._opened:
            self._words[SLOPES] = None
            linear = slope()
            return value + (linear - linear.detach())  # the value stays, also of zero
        self.bent[number] = value.detach().clone().requires_grad_()
        return self.bent[number].clone()

    # Norms and attention, as they are written

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: bool,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        return self._normed(input, over, weight, bias, eps)

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        over = tuple(range(-len(normalized_shape), 0))
        smallest = torch.finfo(input.dtype).eps if eps is None else eps
        return self._normed(input, over, weight, None, smallest, centred=False)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: bool,
    ) -> Tensor:
        grouped = input.reshape(len(input), num_groups, -1)
        normed = self._normed(grouped, (-1,), None, None, eps).reshape(input.shape)
        shape = (1, -1, *[1] * (input.ndim - 2))
        normed = normed if weight is None else normed * weight.detach().view(shape)
        return normed if bias is None else normed + bias.detach().view(shape)

    def _normed(
        self,
        x: Tensor,
        over: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool = True,
    ) -> Tensor:
        self._words[NORMS] = None
        single = at_least_single(x)
        single = single - single.mean(over, keepdim=True) if centred else single
        normed = single * torch.rsqrt(single.detach().square().mean(over, keepdim=True) + eps)
        normed = normed if weight is None else normed * weight.detach()
        return (normed if bias is None else normed + bias.detach()).to(x.dtype)

    def _unit(
        self,
        input: Tensor,
        p: float = 2.0,
        dim: int = 1,
        eps: float = 1e-12,
        out: None = None,
    ) -> Tensor:
        self._words[NORMS] = None
        length: Tensor = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True)
        return input / length.clamp_min(eps)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self._words[ATTENTION] = None
        v = self._joined(value)
        with torch.no_grad():
            q, k = query.detach(), key.detach()
            if enable_gqa:
                times = q.shape[-3] // k.shape[-3]
                k = k.repeat_interleave(times, -3)
            # Of the identity as values, attention is its weights, masks and all.
            places = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device)
            places = places.expand(*k.shape[:-2], -1, -1)
            weights = F.scaled_dot_product_attention(
                q, k, places, attn_mask, 0.0, is_causal, scale=scale
            )
        return weights @ (v.repeat_interleave(times, -3) if enable_gqa else v)

    def _multi_head(self, *args: Argument, **kwargs: Argument) -> tuple[Tensor, Tensor | None]:
        self._words[ATTENTION] = None
        bound = MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        given, weighing = bound.arguments, {"dropout_p": 0.0, "training": False}
        weighing |= {"need_weights": True, "average_attn_weights": False}
        plain = {name: given[name].detach() for name in ("query", "key", "value")}
        with torch.no_grad():
            weights = F.multi_head_attention_forward(**{**given, **plain, **weighing})[1]
        assert weights is not None
        separate, width = given["use_separate_proj_weight"], given["embed_dim_to_check"]
        matrix = given["v_proj_weight"] if separate else given["in_proj_weight"]
        bias, last = _detached(given["in_proj_bias"]), given["bias_v"]
        bias = None if bias is None else bias[-width:]
        v = F.linear(self._joined(given["value"]), matrix[-width:].detach(), bias)  # [S (B) E]
        if last is not None:
            v = torch.cat([v, last.detach().reshape(1, *[1] * (v.ndim - 2), -1).expand_as(v[:1])])
        if given["add_zero_attn"]:
            v = torch.cat([v, torch.zeros_like(v[:1])])
        heads = v.reshape(*v.shape[:-1], given["num_heads"], -1).movedim(0, -2)  # [(B) H S E/H]
        mixed = (weights @ heads).movedim(-2, 0).flatten(-2)
        out = F.linear(mixed, given["out_proj_weight"].detach(), _detached(given["out_proj_bias"]))
        if not given["need_weights"]:
            return out, None
        return out, weights.mean(-3) if given["average_attn_weights"] else weights


_RULES: dict[str, Callable[..., Argument]] = {
    "layer_norm": Holding._layer_norm,
    "rms_norm": Holding._rms_norm,
    "group_norm": Holding._group_norm,
    "normalize": Holding._unit,
    "scaled_dot_product_attention": Holding._attention,
    "multi_head_attention_forward": Holding._multi_head,
}


# The tensors among a function's arguments


def _tensors(given: Argument) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)


def _changed(given: Argument, change: Change) -> Argument:
    """Return an argument, or what a function returned, with each tensor in it changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, list | tuple):
        kind: Callable[[list[Argument]], Argument] = type(given)
        return kind(_mapped(given, change))
    return given


def _mapped(args: Arguments, change: Change) -> list[Argument]:
    return [_changed(one, change) for one in args]


def _behind(func: Function, args: Arguments, change: Change) -> list[Argument]:
    """Return arguments with each tensor changed, but for the one that is written to."""
    kept = int(_in_place(func))
    return [*args[:kept], *_mapped(args[kept:], change)]


def _named(kwargs: Named, change: Change) -> dict[str, Argument]:
    return {name: _changed(one, change) for name, one in kwargs.items()}


def _only(args: Arguments, place: int) -> list[Argument]:
    """Return arguments of whose differentiated tensors one stays so."""
    met = count()
    return _mapped(args, lambda one: one if _is_live(one) and next(met) == place else one.detach())


def _is_live(one: Tensor) -> bool:
    """Whether a tensor is differentiated; parameters, which are leaves, are constants here."""
    return one.requires_grad and not one.is_leaf


def _plain(one: Tensor) -> Tensor:
    return one if _is_live(one) else one.detach()


def _detached(one: Tensor | None) -> Tensor | None:
    return None if one is None else one.detach()


def _copied(one: Tensor) -> Tensor:
    return one.detach().clone()


def _in_place(func: Function) -> bool:
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _below_zero(exponent: Argument) -> bool:
    value = exponent.max() if isinstance(exponent, Tensor) else exponent
    return isinstance(value, float | int | Tensor) and bool(value < 0)
