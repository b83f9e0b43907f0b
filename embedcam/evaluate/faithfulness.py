"""Whether a map marks what brought the result back: pixels are removed, and the network asked.

What is followed is the similarity (the cosine of the embeddings) of the masked query to its nearest
result, and that result's place in the ranking of the whole index.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import NetworkError
from ..methods.masks import fill_like
from ..methods.subject import inputs_a_pass
from ..metrics import (
    curve_area,
    deletion_steps,
    leaves_top,
    noisy_linear_imputation,
    rank_drop,
    removal_masks,
    score_drops,
)
from ..network import EmbeddingNetwork
from ..ops import normalize
from .gallery import Gallery
from .measures import Number
from .settings import Clock, Settings


@dataclass(frozen=True)
class Asked:
    """One query, and the result whose similarity is followed.

    inputs: `[3 H W]`; embedding: of the whole picture, `[D]`; result: its row in the index; own:
    the query's own row, -1 where the index does not hold it.
    """

    inputs: np.ndarray
    embedding: np.ndarray
    result: int
    own: int


@dataclass
class Curves:
    """Mean similarity after each step, summed over queries, `[S+1]`."""

    deletion: np.ndarray
    insertion: np.ndarray
    count: int = 0


class Faithfulness:
    """Runs masked queries through the network, a few at a time, whatever mask they come from."""

    def __init__(
        self, network: EmbeddingNetwork, gallery: Gallery, settings: Settings, clock: Clock
    ) -> None:
        self.network, self.gallery, self.settings, self.clock = network, gallery, settings, clock
        self.batch = settings.batch_size or inputs_a_pass(network.device)
        self.passes = 0
        self.curves: dict[str, Curves] = {}
        self._channels_last = True

    def __call__(
        self, asked: Asked, maps: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, Number]]:
        """The measures of each way's map `[H W]` of one query.

        All masked pictures of a query go through the network together, way after way.
        """
        image = torch.from_numpy(np.ascontiguousarray(asked.inputs))
        fill = fill_like(image, self.settings.fill, self.network.preprocess)
        embeddings = self._embed(self._inputs(image, fill, maps))
        with self.clock("metrics"):
            to = self.gallery.index.embeddings([asked.result])[0]
            scores = _cosines(embeddings, to)
            whole = float(_cosines(asked.embedding[None], to)[0])
            base, rest = float(scores[0]), scores[1:].reshape(len(maps), -1)
            # The rank drop's picture is the last but two of each way's.
            removed = embeddings[1:].reshape(len(maps), rest.shape[1], -1)[:, -3]
            ranks = self.gallery.ranks(
                np.concatenate([asked.embedding[None], removed]), asked.result, asked.own
            )
            return {
                way: self._measured(way, whole, base, rest[place], ranks[[0, place + 1]])
                for place, way in enumerate(maps)
            }

    def _inputs(
        self, image: Tensor, fill: Tensor, maps: Mapping[str, np.ndarray]
    ) -> Iterator[Tensor]:
        """The wholly masked picture; then each way's: deletion and insertion between their ends,

        the top pixels removed, the same by imputation, and the map as a mask.
        """
        yield fill
        for drawn in maps.values():
            with self.clock("metrics"):
                _, masks = deletion_steps(drawn[None], self.settings.steps)
                taken = torch.from_numpy(masks[0, 1:-1])
                top = removal_masks(drawn[None], self.settings.removed)
            for mask in taken:
                yield torch.where(mask, fill, image)
            for mask in taken:
                yield torch.where(mask, image, fill)
            yield torch.where(torch.from_numpy(top[0]), fill, image)
            with self.clock("metrics"):
                imputed = noisy_linear_imputation(
                    image.numpy()[None], top, seed=self.settings.seed
                )[0]
            yield torch.from_numpy(imputed)
            soft = torch.from_numpy(np.asarray(normalize(drawn), np.float32))
            yield fill + (image - fill) * soft

    def _embed(self, inputs: Iterator[Tensor]) -> np.ndarray:
        found: list[np.ndarray] = []
        held: list[Tensor] = []
        for one in inputs:
            held.append(one)
            if len(held) == self.batch:
                found.append(self._forward(held))
                held = []
        if held:
            found.append(self._forward(held))
        return np.concatenate(found)

    def _forward(self, held: list[Tensor]) -> np.ndarray:
        self.passes += len(held)
        with self.clock("forward"):
            batch = torch.stack(held)
            if self._channels_last and self.network.device.type == "cpu":
                # Convolutions on CPUs run up to 1.6 times as fast on it.
                turned = batch.contiguous(memory_format=torch.channels_last)
                try:
                    return _numpy(self.network.forward(turned, allow_zero=True).embedding)
                except NetworkError:
                    self._channels_last = False  # takes views of contiguous memory only
            return _numpy(self.network.forward(batch, allow_zero=True).embedding)

    def _measured(
        self, way: str, whole: float, base: float, scores: np.ndarray, ranks: np.ndarray
    ) -> dict[str, Number]:
        between = self.settings.steps - 1
        deletion = np.array([whole, *scores[:between], base])
        insertion = np.array([base, *scores[between : 2 * between], whole])
        _, imputed, masked = scores[2 * between :]
        curves = self.curves.setdefault(way, Curves(np.zeros(between + 2), np.zeros(between + 2)))
        curves.deletion += deletion
        curves.insertion += insertion
        curves.count += 1
        drops, counted = score_drops([whole], [masked], [base])
        before, after = ranks[:1], ranks[1:]
        k = self.settings.n_neighbors
        return {
            "insertion": float(curve_area(insertion[None])[0]),
            "deletion": float(curve_area(deletion[None])[0]),
            "rank_drop": float(rank_drop(before, after)[0]),
            # One that was not among the results cannot leave them.
            "left_top": float(leaves_top(before, after, k)[0]) if before[0] <= k else None,
            "road_drop": float(whole - imputed),
            "drop": float(drops[0]) if counted[0] else None,
            "increase": float(masked > whole),
        }


def _cosines(embeddings: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Cosine of each `[n D]` to one vector; 0 for a vector of zeros."""
    wide, other = embeddings.astype(np.float64), to.astype(np.float64)
    length = np.linalg.norm(wide, axis=1) * np.linalg.norm(other)
    cosines: np.ndarray = (wide @ other) / np.where(length > 0, length, 1)
    return cosines


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.cpu().numpy()
    return found.astype(np.float32, copy=False)
