"""Whether a map marks what brought the result back: pixels are removed, and the network asked.

What is followed is the similarity (the cosine of the embeddings) of the masked query to its nearest
result, and that result's place in the ranking of the whole index.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..errors import NetworkError
from ..methods.masking import fill_like
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
from .maps import as_float32
from .measures import Clock, Number
from .settings import Settings


class Faithfulness:
    """Runs masked queries through the network; keeps each method's curves `[2 S+1]` a query."""

    def __init__(
        self, network: EmbeddingNetwork, gallery: Gallery, settings: Settings, clock: Clock
    ) -> None:
        self.network, self.gallery, self.settings, self.clock = network, gallery, settings, clock
        self.batch = settings.batch_size or inputs_a_pass(network.device)
        self.passes = 0
        self.curves: dict[str, list[np.ndarray]] = {}
        self._channels_last = network.device.type == "cpu"

    def __call__(
        self,
        inputs: np.ndarray,
        embedding: np.ndarray,
        result: int,
        own_row: int,
        maps: Mapping[str, np.ndarray],
    ) -> dict[str, dict[str, Number]]:
        """Return the measures of each method's map `[H W]` of one query `[3 H W]`."""
        image = torch.from_numpy(np.ascontiguousarray(inputs))
        fill = fill_like(image, self.settings.fill, self.network.preprocess)
        embeddings = self._embed(self._masked(image, fill, maps))
        with self.clock("metrics"):
            target = self.gallery.index.embeddings([result])[0]
            scores = _cosines(embeddings, target)
            whole = float(_cosines(embedding[None], target)[0])
            base, rest = float(scores[0]), scores[1:].reshape(len(maps), -1)
            # The rank drop's picture is the last but two of each method's.
            removed = embeddings[1:].reshape(len(maps), rest.shape[1], -1)[:, -3]
            queries = np.concatenate([embedding[None], removed])
            ranks = self.gallery.ranks(queries, result, own_row)
            return {
                method: self._measured(method, whole, base, rest[place], ranks[[0, place + 1]])
                for place, method in enumerate(maps)
            }

    def _masked(
        self, image: Tensor, fill: Tensor, maps: Mapping[str, np.ndarray]
    ) -> Iterator[Tensor]:
        """Yield the fill; of each method deletion, insertion, removed, imputed, soft-masked."""
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
                seed = self.settings.seed
                imputed = noisy_linear_imputation(image.numpy()[None], top, seed=seed)[0]
            yield torch.from_numpy(imputed)
            soft = torch.from_numpy(np.asarray(normalize(drawn), np.float32))
            yield fill + (image - fill) * soft

    def _embed(self, pictures: Iterator[Tensor]) -> np.ndarray:
        chunks = iter(lambda: list(islice(pictures, self.batch)), [])
        return np.concatenate([self._forward(chunk) for chunk in chunks])

    def _forward(self, pictures: list[Tensor]) -> np.ndarray:
        self.passes += len(pictures)
        with self.clock("forward"):
            batch = torch.stack(pictures)
            if self._channels_last:
                # Convolutions on CPUs run up to 1.6 times as fast on it.
                turned = batch.contiguous(memory_format=torch.channels_last)
                try:
                    return as_float32(self.network.forward(turned, allow_zero=True).embedding)
                except NetworkError:
                    self._channels_last = False  # takes views of contiguous memory only
            return as_float32(self.network.forward(batch, allow_zero=True).embedding)

    def _measured(
        self, method: str, whole: float, base: float, scores: np.ndarray, ranks: np.ndarray
    ) -> dict[str, Number]:
        between = self.settings.steps - 1
        deletion = np.array([whole, *scores[:between], base])
        insertion = np.array([base, *scores[between : 2 * between], whole])
        _, imputed, masked = scores[2 * between :]
        self.curves.setdefault(method, []).append(np.stack([deletion, insertion]))
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


def _cosines(embeddings: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the cosine of each `[n D]` to one vector; 0 for a vector of zeros."""
    wide, other = embeddings.astype(np.float64), target.astype(np.float64)
    length = np.linalg.norm(wide, axis=1) * np.linalg.norm(other)
    cosines: np.ndarray = (wide @ other) / np.where(length > 0, length, 1)
    return cosines
