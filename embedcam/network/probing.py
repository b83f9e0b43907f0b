"""Finding the layer that explains a network, by what happens to a probe picture in it.

A layer explains an embedding where it still has positions, all of which reach the embedding. The
last such layer is taken, but for what lies inside the last module that leaves positions behind (an
attention whose class token alone is read on, an attention pooling): of that its input is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError
from .layers import MAX_PREFIX, Output, OutputChoice, choose_embedding, first_tensor, replace_first
from .module import bare_name
from .runner import run_part

# Of a layer's positions that must reach the embedding; behind a class token's last attention it is
# that token alone, and of a maximum over positions it is most of them.
_MOST = 0.5


@dataclass(frozen=True)
class Found:
    """The layer found, and how many tokens come before its patches, None where that is open."""

    layer: str
    prefix_tokens: int | None


@dataclass(eq=False)
class _Visit:
    """One call of a module: its name, when it began and ended, what it was given and handed on."""

    name: str
    began: int
    given: list[Tensor]
    ended: int = 0
    onward: Tensor | None = None
    reaches: bool = False

    def holds(self, other: "_Visit") -> bool:
        """Return whether the other call lies inside this one."""
        return self.began < other.began and other.ended < self.ended


@dataclass(eq=False)
class _Recorder:
    """Notes every call inside a module; what each hands on is a copy of its own.

    So a gradient tells what is read after the call, not what went on inside.
    """

    visits: list[_Visit] = field(default_factory=list)
    _open: list[_Visit] = field(default_factory=list)
    _time: int = 0

    def begin(self, name: str, given: list[Tensor]) -> None:
        self._time += 1
        self._open.append(_Visit(name, self._time, given))

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


def find_explained(module: nn.Module, images: Tensor, output: OutputChoice = None) -> Found | None:
    """Return the layer that explains `module(images)`, images `[1 C H W]`; None where none does."""
    recorder = _Recorder()
    try:
        z = _run_recorded(module, images, output, recorder)
    except EmbedcamError:
        return None
    visits = recorder.visits
    _mark_reaching(visits, z)
    calls = [visit.name for visit in visits]
    candidates = [v for v in visits if v.reaches and calls.count(v.name) == 1]
    if not candidates:
        return None
    chosen = _inside(_chosen(visits, candidates), candidates)
    return Found(bare_name(chosen.name), _prefix(visits, chosen))


def _run_recorded(
    module: nn.Module, images: Tensor, output: OutputChoice, recorder: _Recorder
) -> Tensor:
    with ExitStack() as stack:
        for name, part in module.named_modules():
            if name and not isinstance(part, torch.jit.ScriptModule):  # it takes no hooks

                def begin(
                    _: nn.Module, args: Sequence[Output], named: Mapping[str, Output], n: str = name
                ) -> None:
                    recorder.begin(n, [*_tensors([*args, *named.values()])])

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


def _mark_reaching(visits: Sequence[_Visit], z: Tensor) -> None:
    """Mark the calls whose output has several positions, most of which reach z `[1 D]`."""
    kept = [v for v in visits if v.onward is not None and _count(v.onward) > 1]
    if not kept or not z.requires_grad:
        return
    # No direction that a symmetry of the network could be blind to.
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    tensors = [v.onward for v in kept if v.onward is not None]
    gradients = torch.autograd.grad(z, tensors, direction, allow_unused=True)
    for visit, gradient in zip(kept, gradients, strict=True):
        if gradient is not None:
            axis = 1 if gradient.ndim == 4 else 2
            visit.reaches = float((gradient != 0).any(axis).float().mean()) >= _MOST


def _count(tensor: Tensor) -> int:
    """Return how many positions a tensor has: `[1 K H W]`, `[1 H W K]`, `[1 T K]` or `[T 1 K]`."""
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[0] == 1:
        return min(shape[2] * shape[3], shape[1] * shape[2])
    if len(shape) == 3 and 1 in shape[:2] and shape[2] > 1:
        return shape[0] * shape[1]
    return 0


def _chosen(visits: Sequence[_Visit], candidates: Sequence[_Visit]) -> _Visit:
    """Return the last candidate, or the input of what it is an inner part of."""
    last = max(candidates, key=lambda visit: visit.ended)
    sources = {id(v.onward): v for v in candidates}

    def source(visit: _Visit) -> _Visit | None:
        """Return the candidate whose positions a call was given."""
        for tensor in visit.given:
            if (found := sources.get(id(tensor))) is not None:
                return found
            place = tensor.untyped_storage().data_ptr()
            for one in candidates:
                if one.onward is not None and one.onward.untyped_storage().data_ptr() == place:
                    return one
        return None

    leaving = [v for v in visits if not v.reaches and v is not last]
    around = [v for v in leaving if v.holds(last) and source(v) is not None]
    if not around:
        return last
    innermost = max(around, key=lambda visit: visit.began)
    if any(innermost.holds(v) and source(v) is last for v in leaving):
        return last
    return source(innermost) or last


def _inside(chosen: _Visit, candidates: Sequence[_Visit]) -> _Visit:
    """Return the last part of a whole network that made what the network itself handed on."""
    inner = [one for one in candidates if one is not chosen]
    same = [v for v in inner if v.onward is not None and _equal(v.onward, chosen.onward)]
    if not same or not all(chosen.holds(one) for one in inner):
        return chosen
    return max(same, key=lambda visit: visit.ended)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _prefix(visits: Sequence[_Visit], chosen: _Visit) -> int | None:
    """Return how many more tokens a layer has than a map before it had positions."""
    if chosen.onward is None or chosen.onward.ndim != 3:
        return None
    tokens = _count(chosen.onward)
    maps = {
        v.onward.shape[2] * v.onward.shape[3]
        for v in visits
        if v.onward is not None and v.onward.ndim == 4 and v.ended < chosen.began
    }
    fitting = [tokens - count for count in maps if 0 <= tokens - count <= MAX_PREFIX]
    return min(fitting, default=None)
