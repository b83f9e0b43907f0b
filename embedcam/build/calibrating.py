"""A build's last look: how well do its own transfers draw? See `embedcam.trust`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from ..assembly import Gathered, grid_of
from ..cam import cam, sharpen
from ..encoding import Encoding, LowRank
from ..errors import ImageError
from ..index import PartData
from ..passes import Tick, Work
from ..transfer import coefficients
from ..trust import Twice, sample_rows

_BLOCK = 64
Rows = Callable[[int, np.ndarray], dict[str, np.ndarray]]
"""Fields of a layer's encoding at some rows, with "embedding" where it uses that."""


def calibrate(
    work: Work,
    encodings: Sequence[Encoding],
    gathered: Gathered,
    part: PartData,
    labels: np.ndarray | None,
    mean: np.ndarray,
    tick: Tick,
) -> dict[str, Any] | None:
    """Explain a sample of a new index's images twice; what the manifest says of trust.

    Args:
        work: with every chunk finished.
        encodings: of the index's layers.
        gathered: what the embedding pass found.
        part: the rows, as they will be stored.
        labels: codes, see `Twice`, or None.
        mean: mean embedding.
        tick: told of progress.

    Returns:
        Calibrations by name, or None where there are too few images.
    """
    rows = sample_rows(len(part), work.recipe.seed)
    if not len(rows):
        return None
    twice = Twice(gathered.own, labels, rows, work.recipe.metric, work.recipe.seed)

    def fields(layer: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: np.asarray(array)[chosen] for name, array in part.fields[layer].items()}
        return {**found, "embedding": gathered.own[chosen]}

    for place, (maps, mixed) in enumerate(_activations(work, gathered, rows)):
        factors = _Mixed(work, encodings[0], fields, mean) if mixed else None
        twice.see(place, Sampled(maps, encodings, fields, factors))
        tick(1)
    return {name: one.to_dict() for name, one in twice.fit().items()}


class Sampled:
    """One image's activations, drawn with the stored weights of any rows; a `trust.Drawn`.

    Args:
        activations: of each layer, deepest first, `[K h w]`.
        encodings: of the layers.
        fields: fetches rows.
        mixed: where the activations are combinations by the head's matrix, what goes with them.
    """

    def __init__(
        self,
        activations: Sequence[np.ndarray],
        encodings: Sequence[Encoding],
        fields: Rows,
        mixed: "_Mixed | None" = None,
    ) -> None:
        self._maps, self._encodings, self._fields, self._mixed = (
            activations, encodings, fields, mixed,
        )  # fmt: skip

    def look(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `trust.Drawn`."""
        weights = self._encodings[0].decode(self._fields(0, rows))
        factors = weights if self._mixed is None else self._mixed.of(rows)
        return np.tensordot(factors, self._maps[0], 1), weights @ weights.T

    def fuse(self, drawn: np.ndarray, rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """See `trust.Drawn`."""
        for layer in range(1, len(self._encodings)):
            encoding = self._encodings[layer]
            unpacked = encoding.unpack(self._fields(layer, rows))
            # Each layer's weights count by their own lengths, as `Explainer` has it.
            own = coefficients(encoding.norms(unpacked), np.ones(len(rows)))
            drawn = sharpen(cam(encoding.combine(unpacked, own), self._maps[layer]), drawn)
        return drawn


class _Mixed:
    """What multiplies activations that were kept as W A: codes over the number of cells."""

    def __init__(self, work: Work, encoding: Encoding, fields: Rows, mean: np.ndarray) -> None:
        assert isinstance(encoding, LowRank)
        self._encoding, self._fields, self._mean = encoding, fields, mean
        self._cells = np.prod(grid_of(work))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """`[n D]`."""
        codes = self._encoding.stored_codes(self._fields(0, rows))
        if self._encoding.uses_embedding:
            codes = codes - self._mean
        found: np.ndarray = codes / self._cells
        return found


def _activations(
    work: Work, gathered: Gathered, rows: np.ndarray
) -> Iterator[tuple[list[np.ndarray], bool]]:
    """Activations `[K h w]` of the rows by layer, and whether they are kept as W A.

    From what the build kept; where it kept none, by one more forward pass of the sample.
    """
    stage = "embed" if work.pooled else "weights"
    head = work.network.head_kind
    first = 0
    for chunk in range(work.n_chunks):
        n = len(work.embedded(chunk))
        chosen = rows[(rows >= first) & (rows < first + n)] - first
        if len(chosen):
            arrays = work.scratch.read(stage, chunk)
            if "activations" in arrays:
                # A block at a time: NumPy widens halves twenty times slower than torch does.
                for start in range(0, len(chosen), _BLOCK):
                    some = chosen[start : start + _BLOCK]
                    halves = torch.from_numpy(np.array(arrays["activations"][some])).float()
                    for maps, peak in zip(halves.numpy(), arrays["peaks"][some], strict=True):
                        yield [maps * np.float32(peak)], work.exact and not head.identity
            else:
                for maps in _forwarded(work, gathered.positions[first + chosen]):
                    yield maps, False
        first += n


def _forwarded(work: Work, positions: np.ndarray) -> Iterator[list[np.ndarray]]:
    with closing(work.batches(positions)) as batches:
        for batch in batches:
            for _, reason in batch.errors:
                raise ImageError(f"{reason}; it could be read before, so run the build again")
            if work.layers:
                names = [name for name, _ in work.layers]
                tapped = work.network.forward_layers(batch.images, names)[1]
            else:
                tapped = [work.network.forward(batch.images).activations]
            for row in range(len(batch)):
                yield [maps[row].float().cpu().numpy() for maps in tapped]
