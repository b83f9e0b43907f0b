"""`AttentionPass`: one forward, differentiable from its attentions' weights on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from .attention import AttentionWatch, watching
from .gradients import derivatives
from .layers import Images, Output, choose_embedding, find_layer, first_tensor, resolve
from .module import no_gradients
from .reading import attentions_of, n_tokens_read
from .runner import Features, Run, at_least_single, run_part
from .shadow import Shadow

if TYPE_CHECKING:
    from .embedding_network import EmbeddingNetwork


class AttentionPass:
    """One forward of B images, and the weights A `[B h Q T]` of its attentions over all positions.

    names: of the attentions in their order, Q = T but for a last one that `pools`; rows: queries of
    the last one that reach the embedding; layout: of its T tokens. With `depths` what each block
    alone would be embedded as can be asked for, see `at_each_depth`.
    """

    def __init__(self, network: "EmbeddingNetwork", images: Images, depths: bool = False) -> None:
        self._runner, runner = network.runner, network.runner
        self.names, self.pools = _names(network, images)
        self._kept: list[Tensor] = []
        self._streams: list[Tensor] = []
        self._shadow = Shadow()
        parts = [find_layer(network.module, name)[1] for name in self.names]
        with torch.inference_mode(False), torch.no_grad(), runner.precision(), runner.lock:
            self._batch = runner.prepare(images)
            name = f"{self.names[-1]}@gradeclip"
            self.rows = runner.tokens_read(name, parts[-1], self._batch)
            with ExitStack() as stack:
                for part in parts:
                    watch = AttentionWatch(len(self._batch), weights=self._keep)
                    stack.enter_context(watching(part, watch))
                if depths:
                    self._follow_blocks(network.module, stack)
                output = run_part(network.module, "network", self._batch.clone())
                z = choose_embedding(output, runner.output, len(self._batch))
                self._z = at_least_single(z)
            tokens = self._kept[-1].detach()[:, 0].mT
            self.layout = resolve(tokens, self._batch, "btk")
        self.features = self._features(self._z)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept, self._streams, self._shadow = [], [], Shadow()

    @property
    def weights(self) -> list[Tensor]:
        """A of each attention, without a graph."""
        return [one.detach() for one in self._kept]

    def vjp(self, cotangents: Tensor) -> list[Tensor]:
        """Return dy/dA of each attention for dy/dz `[B D]`."""
        return self._derived(self._z, self._kept, cotangents)

    def at_each_depth(self, cotangents: Callable[[Features], Tensor]) -> Iterator[Tensor]:
        """Yield for each block dy/dA, y being that of the block's own tokens alone.

        Behind the network's norm and head: of their mean, and A is the block's; or of what a last
        attention that pools makes of them, and A is that one's.
        """
        if not self._streams:
            yield self.vjp(cotangents(self.features))[-1]
        for number, stream in enumerate(self._streams):
            watch = AttentionWatch(len(self._batch), weights=lambda weights: weights)
            with torch.inference_mode(False), torch.enable_grad(), self._runner.precision():
                self._shadow.again(self._pooled(stream))
                with watch:
                    z = self._shadow.of(self._z, self.names[-1])
            weights = watch.seen[-1].weights if watch.seen else self._kept[number]
            if weights is None:
                raise NetworkError("the weights of the last attention cannot be seen")
            yield self._derived(z, [weights], cotangents(self._features(z)))[0]

    def _keep(self, weights: Tensor) -> Tensor:
        # The graph begins at the first attention.
        kept = weights if weights.requires_grad else weights.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)
        self._kept.append(kept)
        return kept.clone()

    def _features(self, z: Tensor) -> Features:
        run = Run([], z, [], self._batch, [], [])
        with no_gradients():
            return run.features(z.new_zeros(1, 1, 1, 1), self._runner.normalize)

    def _derived(self, z: Tensor, inputs: list[Tensor], cotangents: Tensor) -> list[Tensor]:
        with no_gradients():
            back = cotangents.to(z)
            found = derivatives(z, inputs, back, "the attention weights")
        return [
            torch.zeros_like(given) if one is None else one
            for one, given in zip(found, inputs, strict=True)
        ]

    # What each block alone leads to

    def _follow_blocks(self, module: nn.Module, stack: ExitStack) -> None:
        """Take the tokens behind each block, and follow what comes behind the last one."""
        thread, blocks = threading.get_ident(), _blocks(self.names, self.pools)

        def behind(_: nn.Module, __: object, output: Output) -> None:
            if threading.get_ident() != thread:
                return
            last = first_tensor(output, blocks[len(self._streams)])
            self._streams.append(last)
            if len(self._streams) == len(blocks):
                followed = self._pooled(last)
                sizes = [] if self.pools else [(last.shape[self._axis(last)], self._n_read(last))]
                self._shadow.begin(last, followed, sizes)
                stack.enter_context(self._shadow)

        for name in blocks:
            handle = find_layer(module, name)[1].register_forward_hook(behind)
            stack.callback(handle.remove)

    def _pooled(self, stream: Tensor) -> Tensor:
        """Return a block's tokens, or where a token of them is read as many of their mean."""
        axis = self._axis(stream)
        if self.pools:
            return stream
        shape = [-1, -1, -1]
        shape[axis] = self._n_read(stream)
        return stream.mean(axis, keepdim=True).expand(shape)

    def _axis(self, stream: Tensor) -> int:
        n_images, n_tokens = len(self._batch), self._kept[-1].shape[-1]
        axis = 1 if stream.shape[:2] == (n_images, n_tokens) else 0
        if stream.ndim != 3 or stream.shape[axis] != n_tokens:
            raise NetworkError(
                f"what follows a block is {list(stream.shape)}, not tokens; use 'genericattention'"
            )
        return axis

    def _n_read(self, stream: Tensor) -> int:
        tokens = stream.new_empty(len(self._batch), stream.shape[self._axis(stream)], 1)
        return n_tokens_read(self.rows, resolve(tokens, self._batch, "btk").prefix)


def _names(network: "EmbeddingNetwork", images: Images) -> tuple[list[str], bool]:
    """Return names of the attentions between all tokens, and whether a last one pools them."""
    found = attentions_of(network, images)
    last = found[-1]
    names = [one.name for one in found if one is last or one.queries == one.keys == last.keys]
    return names, last.queries != last.keys


def _blocks(names: list[str], pools: bool) -> list[str]:
    """Return names of the blocks that attentions are in: up to where the first two names part."""
    if len(names) == 1:
        return []
    first, second = (name.split(".") for name in names[:2])
    same = [one == other for one, other in zip(first, second, strict=False)]
    depth = same.index(False) if False in same else len(same)
    blocks = [".".join(name.split(".")[: depth + 1]) for name in names]
    return blocks[:-1] if pools else blocks
