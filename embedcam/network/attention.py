"""Attention modules: where they are, and what one computes, as q, k, v `[B h T d]` and weights.

An attention is seen as it is called, whatever library it is from: `scaled_dot_product_attention`,
`multi_head_attention_forward`, or a softmax between two products. Nothing is replaced in a module,
and a mode is entered inside one attention of one thread, and left there, also by an exception.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import NetworkError
from .module import hookable

Change = Callable[[Tensor], Tensor]
"""What an attention goes on with, in place of its weights `[B h Q T]` or its output `[B h Q d]`."""
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
MULTI_HEAD = signature(F.multi_head_attention_forward)
"""Its arguments by name, of which there are twenty-five."""
_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


@dataclass(frozen=True, eq=False)
class Attended:
    """One attention of B images: q `[B h Q d]`, k and v `[B h T d]`, output `[B h Q d]`.

    The output is that before the projection. weights: `[B h Q T]` where they were asked for, or the
    attention is not a fused one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    weights: Tensor | None


class AttentionWatch(TorchFunctionMode):
    """Sees every attention of a batch that is called inside, in order: `seen`.

    `weights` and `output` change what goes on; with `weights` attention is computed by its formula.
    `noted` is told each with its output as it goes on.
    """

    def __init__(
        self,
        batch: int,
        weights: Change | None = None,
        output: Change | None = None,
        noted: Callable[[Attended, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.seen: list[Attended] = []
        self._batch, self._weights, self._output = batch, weights, output
        self._noted = noted
        self._seen_by: dict[object, Callable[..., object]] = {
            F.scaled_dot_product_attention: self._fused,
            F.multi_head_attention_forward: self._multi_head,
            **dict.fromkeys(_SOFTMAX, self._softmax),
            **dict.fromkeys(_PRODUCTS, self._product),
        }
        self._last: tuple[Tensor, Tensor] | None = None
        self._soft: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        seen = self._seen_by.get(func)
        if seen is not None and (func not in _PRODUCTS or len(args) == 2):
            return seen(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _fused(self, func: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        given: Callable[..., tuple[Tensor, Tensor | None]] = self._attend
        return given(*args, **kwargs)[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        formula: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of scaled dot-product attention, and its weights if they were made."""
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (one.repeat_interleave(repeats, -3) for one in (key, value))
        weights = None
        if self._weights is None and not formula:
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale
            )
        else:
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            if is_causal:
                attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            elif attn_mask is not None:
                scores = scores + attn_mask
            weights = self._changed(scores.softmax(-1), self._weights)
            output = weights @ value
        return self._note(query, key, value, output, weights), weights

    def _multi_head(
        self, func: Callable[..., Tensor], *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `multi_head_attention_forward` does: `[Q B C]`, weights if asked for."""
        bound = MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        unusual = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
        if given["add_zero_attn"] or any(given[name] is not None for name in unusual):
            raise NetworkError(
                "an attention with bias_k, add_zero_attn, a padding mask or static keys cannot be "
                "read; take the layer before it"
            )
        matrices = [given[f"{name}_proj_weight"] for name in "qkv"]
        if not given["use_separate_proj_weight"]:
            matrices = given["in_proj_weight"].chunk(3)
        bias, heads = given["in_proj_bias"], given["num_heads"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        tokens = [given[name] for name in ("query", "key", "value")]
        q, k, v = (
            F.linear(one, matrix, bias).reshape(*one.shape[:2], heads, -1).permute(1, 2, 0, 3)
            for one, matrix, bias in zip(tokens, matrices, biases, strict=True)
        )
        mask = given["attn_mask"]
        if mask is not None and mask.ndim == 3:
            mask = mask.reshape(-1, heads, *mask.shape[1:])
        output, weights = self._attend(q, k, v, mask, formula=given["need_weights"])
        joined = output.permute(2, 0, 1, 3).flatten(2)
        projected = F.linear(joined, given["out_proj_weight"], given["out_proj_bias"])
        if weights is None or not given["need_weights"]:
            return projected, None
        return projected, weights.mean(1) if given["average_attn_weights"] else weights

    def _product(self, func: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
        """Return a product: of queries and keys, of weights and values, or of something else."""
        soft, last, self._last = self._soft, self._last, None
        product = func(left, right)
        if soft is not None and last is not None and left.shape == soft.shape:
            self._soft = None
            return self._note(last[0], last[1], right, product, left)
        if soft is None and left.ndim == right.ndim > 2:
            self._last = left, right.mT
        return product

    def _softmax(self, func: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        weights = func(*args, **kwargs)
        if self._last is None or weights.ndim < 3:
            return weights
        query, key = self._last
        if weights.shape[-2:] != (query.shape[-2], key.shape[-2]):
            return weights
        self._soft = self._changed(weights, self._weights)
        return self._soft

    def _note(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Keep an attention, and return what it goes on with."""
        output = self._changed(output, self._output)
        q, k, v, o = map(self._by_image, (query, key, value, output))
        seen = Attended(q, k, v, o, None if weights is None else self._by_image(weights))
        self.seen.append(seen)
        if self._noted is not None:
            self._noted(seen, output)
        return output

    def _changed(self, tensor: Tensor, change: Change | None) -> Tensor:
        if change is None:
            return tensor
        changed = change(self._by_image(tensor))
        return changed.flatten(0, 1) if tensor.ndim == 3 else changed

    def _by_image(self, tensor: Tensor) -> Tensor:
        """Return `[B h T d]` of what may be `[B*h T d]`."""
        apart = (self._batch, -1, *tensor.shape[1:])
        return tensor.reshape(apart) if tensor.ndim == 3 else tensor


@contextmanager
def watching(
    part: nn.Module, mode: TorchFunctionMode, before: Callable[[], object] | None = None
) -> Iterator[None]:
    """Enter a mode for as long as this thread is inside a module's forward, `before` it is called.

    What `before` enters lies around the mode and is not left with it.
    """
    thread, inside = threading.get_ident(), ExitStack()
    depth = list[None]()

    def enter(*_: object) -> None:
        if threading.get_ident() == thread and not depth:
            if before is not None:
                before()
            inside.enter_context(mode)
            depth.append(None)

    def leave(*_: object) -> None:
        if threading.get_ident() == thread and depth:
            depth.clear()
            inside.close()

    after = part.register_forward_hook(leave, always_call=True)
    with part.register_forward_pre_hook(enter), after:
        try:
            yield
        finally:
            leave()


@dataclass(frozen=True)
class AttentionLayer:
    """An attention by the name of the module that computes it: Q queries, T keys, its batch."""

    name: str
    queries: int
    keys: int
    batch: int


@contextmanager
def attention_layers(module: nn.Module, batch: int) -> Iterator[list[AttentionLayer]]:
    """Yield a list that names the attentions of a forward that runs inside, in their order."""
    thread, inside, found = threading.get_ident(), list[str](), list[AttentionLayer]()

    def noted(seen: Attended, _: Tensor) -> None:
        name, shape = inside[-1] if inside else "", seen.query.shape
        found.append(AttentionLayer(name, shape[2], seen.key.shape[2], shape[0]))

    def entering(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name) if threading.get_ident() == thread else None

    def leave(*_: object) -> None:
        if threading.get_ident() == thread:
            inside.pop()

    with ExitStack() as stack:
        for name, part in hookable(module):
            stack.enter_context(part.register_forward_pre_hook(entering(name)))
            stack.enter_context(part.register_forward_hook(leave, always_call=True))
        stack.enter_context(AttentionWatch(batch, noted=noted))
        yield found
