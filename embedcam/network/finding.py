"""Finding the layer to explain by running a network once, and a few times more in doubt.

Where all of a picture still goes through one layer late in the network, that layer explains it:
what a convolutional network pools, the blocks before a class token that joins late (CaiT, XCiT).
Where a class token gathers on the way (ViT), positions last count before the last attention. The
first is asked by exchanging two pictures' activations, the second by a derivative (`probing`).
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import EmbedcamError
from .layers import (
    Output,
    OutputChoice,
    choose_embedding,
    first_tensor,
    replace_first,
    same_aspect,
    smaller,
)
from .module import bare_name, no_gradients, uncompiled
from .probing import Probe, Visit, count
from .runner import run_part

_TESTED = 6
"""Layers that are asked whether all of the picture goes through them."""
_SAME = 1e-2
"""Of the distance between two pictures' embeddings, what counts as none."""
_LATE = 0.5
"""Of the modules with parameters, how many have run before a layer counts as late."""


@dataclass(frozen=True)
class Found:
    """The layer found, how many tokens come before its patches, None where that is open.

    said: a sentence about the choice, where there was one.
    """

    layer: str
    prefix_tokens: int | None
    said: str = ""


def find_explained(module: nn.Module, images: Tensor, output: OutputChoice = None) -> Found | None:
    """Return the layer that explains a network in eval mode; None where there is none.

    `images` are a picture `[1 C H W]` as its input; `output` says what is the embedding, as for an
    `EmbeddingNetwork`.
    """
    try:
        finder = _Finder(module, images, output)
        return finder.find()
    except EmbedcamError:
        return None


@dataclass(eq=False)
class _Finder:
    module: nn.Module
    images: Tensor
    output: OutputChoice
    probe: Probe = field(init=False)

    def __post_init__(self) -> None:
        self.probe = Probe(self.module, self.images, self.output)

    def find(self) -> Found | None:
        last = self.probe.last()
        if last is None:
            return None
        late = [one for one in self._late() if one is not last]
        for one in (last, *late[: -_TESTED - 1 : -1]):
            if self.probe.prefix(one) in (None, 0) and self._holds_all(one):
                return self._found(one)
        streams = [last, *self._beside(last)]
        if len(streams) > 1:
            streams = self._of_positions(streams) or streams
        finest = max(streams, key=self._positions)
        if len(streams) == 1:
            return self._found(finest)
        others = ", ".join(self._described(one) for one in streams if one is not finest)
        said = (
            f"{len(streams)} streams of positions lead to the embedding side by side, and the "
            f"finest is explained, layer {self._described(finest)}; layer= takes another: {others}"
        )
        return self._found(finest, said)

    def _found(self, visit: Visit, said: str = "") -> Found:
        name, part = visit.name, self.module.get_submodule(visit.name)
        while isinstance(part, nn.Sequential) and len(part):  # the block that a sequence ends with
            name, part = f"{name}.{len(part) - 1}", part[-1]
        return Found(bare_name(name), self.probe.prefix(visit), said)

    def _described(self, visit: Visit) -> str:
        return f"{bare_name(visit.name)} ({self._positions(visit)} positions)"

    def _positions(self, visit: Visit) -> int:
        raw = visit.onward
        if raw is None:
            return 0
        if raw.ndim == 4:
            last = same_aspect(raw.shape[1:3], self.probe.size)
            last = last and not same_aspect(raw.shape[2:], self.probe.size)
            return int(raw[0, :, :, 0].numel() if last else raw[0, 0].numel())
        return count(raw) - (self.probe.prefix(visit) or 0)

    # All of the picture

    def _late(self) -> list[Visit]:
        """Return the candidates of maps, or of patches alone, in the second half of the network."""
        own = {name for name, part in self.module.named_modules() if _has_parameters(part)}
        total, ran, late = len(own), 0, list[Visit]()
        for visit in self.probe.visits:
            ran += visit.name in own
            maps = visit.onward is not None and visit.onward.ndim == 4
            if ran > _LATE * total and (maps or self.probe.prefix(visit) == 0):
                late.append(visit)
        return [visit for visit in late if visit in self.probe.candidates]

    def _holds_all(self, visit: Visit) -> bool:
        """Return whether pictures whose activations are exchanged exchange their embeddings."""
        pictures = torch.cat([self.images, self.images.flip(-1, -2)])

        def exchange(_: nn.Module, __: object, given: Output) -> Output:
            raw = first_tensor(given, visit.name)
            return replace_first(given, raw.flip(0 if len(raw) == len(pictures) else 1))

        with no_gradients():
            z = self._run(pictures)
            with self.module.get_submodule(visit.name).register_forward_hook(exchange):
                moved = self._run(pictures).flip(0) - z
        apart = float(torch.linalg.vector_norm(z[0] - z[1]))
        rounding = 8 * torch.finfo(z.dtype).eps * float(torch.linalg.vector_norm(z))
        return float(torch.linalg.vector_norm(moved)) <= _SAME * apart + rounding

    def _run(self, images: Tensor) -> Tensor:
        given = run_part(self.module, "network", images.clone())
        return choose_embedding(given, self.output, len(images))

    # Several streams

    def _beside(self, last: Visit) -> list[Visit]:
        """Return, for every other number of positions, the last layer that does not lead here."""
        grids: dict[int, list[Visit]] = {}
        for visit in self.probe.candidates:
            grids.setdefault(self._positions(visit), []).append(visit)
        grids.pop(self._positions(last), None)
        others = dict.fromkeys(self.probe.outside(group[-1]) for group in grids.values())
        others.pop(last, None)
        leading = self.probe.leading(last, list(others))
        return [one for one in others if one not in leading]

    def _of_positions(self, streams: list[Visit]) -> list[Visit]:
        """Return those of which a smaller input has fewer; none where the network takes none."""
        changed: list[Visit] = []

        def compare(one: Visit) -> Callable[[nn.Module, object, Output], None]:
            def look(_: nn.Module, __: object, given: Output) -> None:
                if one.onward is None or first_tensor(given, one.name).shape != one.onward.shape:
                    changed.append(one)

            return look

        height, width = smaller((self.images.shape[2], self.images.shape[3]))[-1]
        part = self.images[:, :, :height, :width].contiguous()
        with no_gradients(), uncompiled(), ExitStack() as stack, suppress(EmbedcamError):
            for one in streams:
                part_of = self.module.get_submodule(one.name)
                stack.enter_context(part_of.register_forward_hook(compare(one)))
            run_part(self.module, "network", part)
        return changed


def _has_parameters(part: nn.Module) -> bool:
    return next(part.parameters(recurse=False), None) is not None
