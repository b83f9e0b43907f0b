"""What happens to a probe picture in a network: which modules' positions reach the embedding.

A layer explains an embedding where it still has positions, all of which reach the embedding. The
last such layer is taken, but for what lies inside the last module that leaves positions behind (an
attention whose class token alone is read on, an attention pooling): of that its input is.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError
from .layers import (
    MAX_PREFIX,
    Output,
    OutputChoice,
    choose_embedding,
    first_tensor,
    replace_first,
    same_aspect,
    token_grid,
)
from .module import hookable
from .runner import run_part

# Of a layer's positions that must reach the embedding; behind a class token's last attention it is
# that token alone, and of a maximum over positions it is most of them.
_MOST = 0.5


@dataclass(eq=False)
class Visit:
    """One call of a module: its name, when it began and ended, what it was given and handed on."""

    name: str
    kind: str
    began: int
    given: list[Tensor]
    ended: int = 0
    onward: Tensor | None = None
    reaches: bool = False

    @property
    def is_attention(self) -> bool:
        """Whether the module is an attention by its class, not a block with one."""
        kind = self.kind.lower()
        return ("attention" in kind or "attn" in kind) and not kind.endswith(("block", "layer"))

    def holds(self, other: "Visit") -> bool:
        """Return whether the other call lies inside this one."""
        return self.began < other.began and other.ended < self.ended


@dataclass(eq=False)
class _Recorder:
    """Notes every call inside a module; what each hands on is a copy of its own.

    So a gradient tells what is read after the call, not what went on inside.
    """

    visits: list[Visit] = field(default_factory=list)
    _open: list[Visit] = field(default_factory=list)
    _time: int = 0

    def begin(self, name: str, kind: str, given: list[Tensor]) -> None:
        self._time += 1
        self._open.append(Visit(name, kind, self._time, given))

    def end(self, output: Output) -> Output:
        self._time += 1
        visit = self._open.pop()
        visit.ended = self._time
        self.visits.append(visit)
        with suppress(EmbedcamError, TypeError, ValueError):  # what cannot be taken apart
            tensor = first_tensor(output, visit.name)
            if tensor.requires_grad:
                onward = tensor.clone()
                output = replace_first(output, onward)
                visit.onward = onward
        return output


class Probe:
    """One run of a network in eval mode on images `[1 C H W]`, its graph kept.

    z: the embedding `[1 D]`; visits: every call, in the order they ended; candidates: those whose
    positions reach the embedding, of modules that are called once. Errors are the network's own.
    """

    def __init__(self, module: nn.Module, images: Tensor, output: OutputChoice = None) -> None:
        recorder = _Recorder()
        self.size = (images.shape[2], images.shape[3])
        self.z = _run_recorded(module, images, output, recorder)
        self.visits = recorder.visits
        _mark_reaching(self.visits, self.z)
        calls = Counter(visit.name for visit in self.visits)
        self.candidates = [
            v for v in self.visits if v.reaches and calls[v.name] == 1 and self._has_grid(v)
        ]

    def _has_grid(self, visit: Visit) -> bool:
        """Return whether tokens can lie on a grid: not those of a class and a teacher alone."""
        if visit.onward is None or visit.onward.ndim == 4:
            return True
        try:
            (height, width), _ = token_grid(count(visit.onward), self.size, None, None, visit.name)
        except EmbedcamError:
            return False
        return height * width > 1

    def last(self) -> Visit | None:
        """Return the call of the layer where positions last count."""
        if not self.candidates:
            return None
        chosen = self.outside(self.candidates[-1])
        inner = [one for one in self.candidates if one is not chosen]
        same = [one for one in inner if _equal(one.onward, chosen.onward)]
        if not same or not all(chosen.holds(one) for one in inner):
            return chosen
        # Of a whole network the last part that made what the network itself handed on.
        return max(same, key=lambda visit: visit.ended)

    def outside(self, last: Visit) -> Visit:
        """Return a candidate, or the input of what it is an inner part of."""
        leaving = [v for v in self.visits if not v.reaches and v is not last]
        around = [v for v in leaving if v.holds(last) and self._source(v) is not None]
        if not around:
            return last
        innermost = max(around, key=lambda visit: visit.began)
        # A block around an attention that is given the layer, or the attention itself.
        reads = any(innermost.holds(v) and self._source(v) is last for v in leaving)
        if reads and not innermost.is_attention:
            return last
        return self._source(innermost) or last

    def _source(self, visit: Visit) -> Visit | None:
        """Return the candidate whose positions a call was given."""
        sources = {id(one.onward): one for one in self.candidates}
        for tensor in visit.given:
            if (found := sources.get(id(tensor))) is not None:
                return found
            place = tensor.untyped_storage().data_ptr()
            for one in self.candidates:
                if one.onward is not None and one.onward.untyped_storage().data_ptr() == place:
                    return one
        return None

    def prefix(self, chosen: Visit) -> int | None:
        """Return how many more tokens a layer has than a map before it had positions."""
        if chosen.onward is None or chosen.onward.ndim != 3:
            return None
        maps = [v.onward for v in self.visits if v.onward is not None and v.ended < chosen.ended]
        counts = {
            one.shape[2] * one.shape[3]
            for one in maps
            if one.ndim == 4 and same_aspect(one.shape[2:], self.size)
        }
        more = [count(chosen.onward) - cells for cells in counts]
        return min((n for n in more if 0 <= n <= MAX_PREFIX), default=None)

    def leading(self, visit: Visit, others: Sequence[Visit]) -> list[Visit]:
        """Return those of other calls whose positions a call's output depends on."""
        last, direction = visit.onward, torch.Generator().manual_seed(0)
        if last is None or not others:
            return []
        # Not the sum, which is constant behind a norm.
        weights = torch.randn(last.shape, generator=direction).to(last)
        return [one for one, _ in _slopes(last, others, weights)]


def _run_recorded(
    module: nn.Module, images: Tensor, output: OutputChoice, recorder: _Recorder
) -> Tensor:
    with ExitStack() as stack:
        for name, part in hookable(module):

            def begin(
                part: nn.Module, args: Sequence[Output], named: Mapping[str, Output], n: str = name
            ) -> None:
                recorder.begin(n, type(part).__name__, [*_tensors([*args, *named.values()])])

            def end(_: nn.Module, __: object, out: Output) -> Output:
                return recorder.end(out)

            stack.enter_context(part.register_forward_pre_hook(begin, with_kwargs=True))
            stack.enter_context(part.register_forward_hook(end))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        leaf = images.detach().clone().requires_grad_()
        return choose_embedding(run_part(module, "network", leaf * 1), output, None)


def _tensors(values: Sequence[Output]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mark_reaching(visits: Sequence[Visit], z: Tensor) -> None:
    """Mark the calls whose output has several positions, most of which reach z `[1 D]`."""
    # No direction that a symmetry of the network could be blind to.
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    for visit, gradient in _slopes(z, visits, direction):
        axis = 1 if gradient.ndim == 4 else 2
        visit.reaches = float((gradient != 0).any(axis).float().mean()) >= _MOST


def _slopes(
    value: Tensor, visits: Sequence[Visit], direction: Tensor
) -> list[tuple[Visit, Tensor]]:
    """Return the derivative at each call with several positions that a value depends on."""
    kept = [v for v in visits if v.onward is not None and count(v.onward) > 1]
    if not kept or not value.requires_grad:
        return []
    tensors = [v.onward for v in kept if v.onward is not None]
    slopes = torch.autograd.grad(value, tensors, direction, retain_graph=True, allow_unused=True)
    pairs = zip(kept, slopes, strict=True)
    return [(one, slope) for one, slope in pairs if slope is not None and bool(slope.any())]


def count(tensor: Tensor) -> int:
    """Return how many positions a tensor has: `[1 K H W]`, `[1 H W K]`, `[1 T K]` or `[T 1 K]`."""
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[0] == 1:
        return min(shape[2] * shape[3], shape[1] * shape[2])
    if len(shape) == 3 and 1 in shape[:2] and shape[2] > 1:
        return shape[0] * shape[1]
    return 0


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.shape == other.shape and torch.equal(one, other)
