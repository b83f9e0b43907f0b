"""`HeldPass`: an embedding as the sum of what positions and everything else give to it.

From the layer on the network runs with what is not linear held (see `Holding`): z is then exactly
the sum of its derivative at each leaf times the leaf, plus biases. The leaves are the layer's
positions; its class and register tokens; what passes the layer by, such as the residual stream
around the last attention; and what activation functions give. One backward pass tells them all.
"""

from contextlib import ExitStack
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import as_array
from ..errors import InputError, NetworkError
from .gradients import Graph, derivatives, half_scale
from .holding import Holding
from .layers import TOKENS, Images, before_attention, split_reading
from .module import no_gradients
from .runner import Run, Runner, in_graph

PREFIX = "class and register tokens"
CLASS, PASSED = "the class token before the last attention", "what passes the layer by"
MLP, BENT = "the MLP", "what is not linear"


class HeldPass(Graph):
    """One forward of one picture, from the layer on a sum with what is not linear held.

    features: with the activations of the layer; held: words for what was held; exact: whether all
    adds up but for biases. Where no activation reaches the embedding so, nothing is held, and all
    is of first order in the activations.
    """

    def __init__(self, network: Runner, run: Run, holding: Holding | None) -> None:
        super().__init__(network, run)
        self.exact, self.held = holding is not None, () if holding is None else holding.held
        self._parts: list[tuple[str, Tensor]] = []
        self._twice: tuple[Tensor, Tensor] | None = None
        if holding is not None:
            tokens = self._layouts[0].kind in TOKENS
            entered, bent = CLASS if tokens else PASSED, MLP if holding.attended else BENT
            self._parts = [(entered, one) for one in holding.entered]
            self._parts += [(bent, one) for one in holding.bent.values()]

    def products(
        self, direction: np.ndarray, within: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Return what gives how much to z . direction, direction `[D]`.

        By channel `[K]` and position `[H W]`, of which `within`, weights `[H W]`, tells what is
        counted; and what is neither, by its name.
        """
        z, (leaf,) = self._open()
        names, others = [name for name, _ in self._parts], [one for _, one in self._parts]
        with no_gradients(), self._network.precision(autocast=False):
            c = torch.as_tensor(direction, device=z.device).to(z.dtype)[None]
            scale = half_scale(c) if leaf.dtype == torch.float16 else torch.ones_like(c[:, :1])
            slopes = derivatives(z, [leaf, *others], c * scale, f"layer {self._names[0]!r}")
        amounts = [
            None if slope is None else _double(slope / scale) * _double(one.detach())
            for slope, one in zip(slopes, [leaf, *others], strict=True)
        ]
        first = torch.zeros_like(_double(leaf)) if amounts[0] is None else amounts[0]
        cells, parts = as_array(self._layouts[0].to_maps(first))[0], dict[str, float]()
        if self.exact and self._layouts[0].prefix:
            parts[PREFIX] = float(first.sum()) - float(cells.sum())
        for name, amount in zip(names, amounts[1:], strict=True):
            if amount is not None:  # such as what only a held divisor is made of
                parts[name] = parts.get(name, 0.0) + float(amount.sum())
        cells = cells if within is None else cells * within
        return cells.sum((1, 2)), cells.sum(0), parts

    def vectors(self, masks: np.ndarray) -> np.ndarray:
        """Return what sets of positions give to z, `[n D]`; masks `[n H W]` from 0 to 1."""
        z, (leaf,) = self._open()
        with torch.inference_mode(False), torch.enable_grad():
            maps, chosen = self.features.activations, torch.as_tensor(masks, device=leaf.device)
            if chosen.shape[1:] != maps.shape[2:]:
                raise InputError(
                    f"masks are {list(chosen.shape)}; expected [n, {maps.shape[2]}, "
                    f"{maps.shape[3]}], a number from 0 to 1 for each position"
                )
            moved = (maps * chosen.to(maps.dtype)[:, None]).to(leaf.dtype)
            none, layout = torch.zeros_like(leaf), self._layouts[0]
            tangents = [layout.to_raw(one[None], none) for one in moved]
            if not tangents:
                return np.zeros((0, z.shape[1]))
            try:
                if self._twice is None:
                    # dz/dA^T u is linear in u: its derivative towards u is dz/dA.
                    u = torch.zeros_like(z, requires_grad=True)
                    self._twice = u, torch.autograd.grad(z, leaf, u, create_graph=True)[0]
                u, back = self._twice
                (outcome,) = torch.autograd.grad(
                    back, u, torch.stack(tangents), retain_graph=True, is_grads_batched=True
                )
            except (RuntimeError, NotImplementedError) as error:
                message = str(error).partition("\n")[0][:200]
                raise NetworkError(
                    f"what follows layer {self._names[0]!r} cannot be differentiated twice "
                    f"({message}); take a layer behind that step"
                ) from error
        return as_array(outcome)[:, 0].astype(np.float64)

    def close(self) -> None:
        """Free the graph; the features stay."""
        super().close()
        self._twice, self._parts = None, []


def held_pass(network: Runner, image: Images) -> HeldPass:
    """Run one picture `[1 C H W]` once, with what is not linear behind the layer held.

    What has to be held beside attention and norms is found out by the first pictures, and kept.
    """
    if split_reading(network.layer)[1]:
        other = before_attention(network.module)
        raise NetworkError(
            f"layer {network.layer!r} is read inside an attention, and what is read does not add "
            "up to the embedding, so that no receipt can be made of it; build an index at "
            f"layer {other or 'before it'!r} (--layer) for receipts"
        )
    if len(image) != 1:
        raise InputError(f"a held pass is of one picture; given {len(image)}")
    while network.opened is not None:
        run, holding = _run(network, image, network.opened)
        if network.sums:
            return HeldPass(network, run, holding)
        reached, ahead = _reached(run, holding)
        network.sums = reached
        if not reached:
            network.opened = network.opened | ahead if ahead else None
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones cannot be differentiated twice
        return HeldPass(network, network.run(image, keep=in_graph), None)


def _double(values: Tensor) -> Tensor:
    return values.cpu().double()  # not every device has float64


def _run(network: Runner, image: Images, opened: frozenset[int]) -> tuple[Run, Holding]:
    module = network.module
    holding = Holding(chain(module.parameters(), module.buffers()), opened)
    with ExitStack() as stack:

        def keep(raw: Tensor) -> tuple[Tensor, Tensor]:
            kept = in_graph(raw)
            stack.enter_context(holding)
            return kept

        return network.run(image, keep=keep), holding


def _reached(run: Run, holding: Holding) -> tuple[bool, frozenset[int]]:
    """Return whether positions reach z, and the steps ahead of z that may be opened for that."""
    if not run.z.requires_grad:
        return False, frozenset()
    cotangents = torch.linspace(-1, 1, run.z.shape[1] + 1)[1:].to(run.z)[None]
    leaves = [run.kept[0], *holding.bent.values()]
    slopes = derivatives(run.z, leaves, cotangents, "the layer")
    positions = slopes[0] is not None and bool(run.layouts[0].to_maps(slopes[0]).any())
    met = zip(holding.bent, slopes[1:], strict=True)
    ahead = {number for number, slope in met if slope is not None and bool(slope.any())}
    return positions, frozenset(ahead & holding.openable)
