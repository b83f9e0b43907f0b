"""`Shadow`: what comes behind a tensor, followed a second time in the same run with other values.

f(x) is also f(x') for everything that is made of x. A vision transformer's tail after its last
attention, its norm, the choice of a token and its projection, is so asked what it would make of
each position's value, whatever library it is from, at the cost of what the answer needs alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import NetworkError
from .module import message_of

_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
_SHAPED = (torch.reshape, Tensor.reshape, Tensor.view, Tensor.expand, torch.unflatten)


@dataclass(eq=False)
class _Other:
    """The other values of a tensor, made when they are asked for; `number` tells what came first.

    `of` is kept alive, since another tensor could get its id.
    """

    of: Tensor
    number: int
    make: Callable[[], Tensor]
    made: Tensor | None = None

    def value(self) -> Tensor:
        if self.made is None:
            self.made = self.make()
        return self.made


class Shadow(TorchFunctionMode):
    """Follows other values from `begin` on, with another batch and another number of tokens.

    Without `streams` residual streams are left out: of a sum with what was there before the
    followed values go on, and of what came first and a branch made of it (`x + mlp(norm(x))`) what
    came first.
    """

    def __init__(self, streams: bool = True) -> None:
        super().__init__()
        self._streams = streams
        self._others: dict[int, _Other] = {}
        self._sizes: list[tuple[int, int]] = []
        self._number = 0

    def begin(self, tensor: Tensor, values: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        """Follow values in place of a tensor; `sizes` are pairs of its batch and tokens, theirs."""
        self._others[id(tensor)] = _Other(tensor, 0, lambda: values)
        self._sizes = list(sizes)

    def again(self, values: Tensor) -> None:
        """Follow other values still, of the same shape, through the same run."""
        for other in self._others.values():
            other.made = values if other.number == 0 else None

    def of(self, tensor: Tensor, layer: str) -> Tensor:
        """Return the other values of a tensor."""
        other = self._others.get(id(tensor))
        try:
            if other is not None:
                return other.value()
            why = "it does not lead to the embedding"
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            why = message_of(error)
        raise NetworkError(
            f"what follows layer {layer!r} cannot be followed with one position's value ({why}); "
            "use '@gradeclip', or the layer before it with 'gradcam'"
        )

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        known = {id(one): self._others.get(id(one)) for one in tree_leaves((args, kwargs))}
        result = func(*args, **kwargs)
        ours = [other for other in known.values() if other is not None]
        if ours:
            leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    self._follow(func, args, kwargs, known, leaf, place)
        return result

    def _follow(
        self,
        func: Callable[..., Tensor],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        known: Mapping[int, _Other | None],
        result: Tensor,
        place: int,
    ) -> None:
        first = min((one for one in known.values() if one is not None), key=lambda one: one.number)
        others = [one for one in args if isinstance(one, Tensor) and known.get(id(one)) is None]
        stream = any(one.shape == first.of.shape for one in others)
        branch = sum(one is not None for one in known.values()) > 1
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if known.get(id(result)) is not None and not in_place:
            return  # handed on as it is, as by a dropout in eval mode
        self._number = number = self._number + 1
        if func in _SUMS and (stream or branch) and not self._streams:
            self._others[id(result)] = _Other(result, number, first.value)
            return

        def make() -> Tensor:
            def swap(one: object) -> object:
                other = known.get(id(one))
                return one if other is None else other.value()

            swapped, options = tree_map(swap, (tuple(args), dict(kwargs)))
            if func in _SHAPED:
                swapped = (swapped[0], *self._resized(swapped[1:]))
            if in_place:
                swapped = (swapped[0].clone(), *swapped[1:])
            made = func(*swapped, **options)
            return made if isinstance(made, Tensor) else tree_leaves(made)[place]

        self._others[id(result)] = _Other(result, number, make)

    def _resized(self, sizes: Sequence[object]) -> list[object]:
        """Return sizes of the followed tensor as those of the values, the batch before tokens."""
        first = sizes[0] if len(sizes) == 1 else None
        nested = isinstance(first, tuple | list)
        flat = list[object](first if isinstance(first, tuple | list) else sizes)
        waiting = list(self._sizes)
        for place, size in enumerate(flat):
            if waiting and size == waiting[0][0]:
                flat[place] = waiting.pop(0)[1]
        return [tuple(flat)] if nested else flat
