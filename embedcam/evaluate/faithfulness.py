"""Whether a map marks what brought the result back: pixels are removed, and the network asked.

What is followed is the similarity (the cosine of the embeddings) of the masked query to its nearest
result, and that result's place in the ranking of the whole index.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from .._checks import as_array
from ..errors import NetworkError
from ..methods.masking import fill_like
from ..metrics import (
    cosines,
    curve_area,
    deletion_steps,
    leaves_top,
    noisy_linear_imputation,
    rank_drop,
    removal_masks,
    score_drops,
)
from ..ops import normalize
from .maps import Question, Seen
from .measures import Number
from .work import Work


class Faithfulness:
    """Runs masked queries through the network; keeps each method's curves `[2 S+1]` a query."""

    def __init__(self, work: Work, curves: dict[str, list[np.ndarray]]) -> None:
        self.network, self.clock = work.mapper.network, work.mapper.clock
        self.gallery, self.settings, self.batch = work.gallery, work.settings, work.batch_size
        self.passes, self.curves = 0, curves
        # Convolutions on CPUs run up to 1.6 times as fast on it.
        on_cpu = self.network.device.type == "cpu"
        self._layout = torch.channels_last if on_cpu else torch.contiguous_format

    def __call__(
        self, seen: Seen, place: int, asked: Question, maps: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, Number]]:
        """Return the measures of each method's map `[H W]` of one of the queries."""
        image = torch.from_numpy(np.ascontiguousarray(seen.inputs[place]))
        embedding, result, own_row = seen.embeddings[place], int(asked.near[0]), asked.left_out[0]
        fill = fill_like(image, self.settings.fill, self.network.preprocess)
        pictures = self._masked(image, fill, maps)
        chunks = iter(lambda: list(islice(pictures, self.batch)), [])
        embeddings = np.concatenate([embedding[None], *map(self._embed, chunks)])
        with self.clock("metrics"):
            target = self.gallery.index.embeddings([result])
            scores = cosines(embeddings, np.repeat(target, len(embeddings), axis=0))
            each = scores[2:].reshape(len(maps), -1)
            # The rank drop's picture is the last but two of each method's.
            removed = embeddings[2:].reshape(*each.shape, -1)[:, -3]
            ranks = self.gallery.ranks(np.stack([embedding, *removed]), result, own_row)
            return {
                method: self._measured(method, scores[:2], each[place], ranks[[0, place + 1]])
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
            yield from (torch.where(mask, fill, image) for mask in taken)
            yield from (torch.where(mask, image, fill) for mask in taken)
            yield torch.where(torch.from_numpy(top[0]), fill, image)
            with self.clock("metrics"):
                seed = self.settings.seed
                imputed = noisy_linear_imputation(image.numpy()[None], top, seed=seed)[0]
            yield torch.from_numpy(imputed)
            soft = torch.from_numpy(np.asarray(normalize(drawn), np.float32))
            yield fill + (image - fill) * soft

    def _embed(self, pictures: list[Tensor]) -> np.ndarray:
        self.passes += len(pictures)
        with self.clock("forward"):
            batch = torch.stack(pictures).contiguous(memory_format=self._layout)
            try:
                found = self.network.forward(batch, allow_zero=True)
            except NetworkError:
                if self._layout == torch.contiguous_format:
                    raise
                self._layout = torch.contiguous_format  # it takes views of such memory only
                found = self.network.forward(batch.contiguous(), allow_zero=True)
            return as_array(found.embedding, np.float32)

    def _measured(
        self, method: str, ends: np.ndarray, scores: np.ndarray, ranks: np.ndarray
    ) -> dict[str, Number]:
        (whole, base), between = ends, self.settings.steps - 1
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
