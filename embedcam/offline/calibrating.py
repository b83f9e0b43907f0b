"""How well an index's transfers draw: some of its images query it. See `embedcam.trust`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ImageError
from ..images import Batch
from ..index import PartData
from ..index.arrays import ArrayLike
from ..index.calibration import correlation, evidence
from ..index.encoding import Encoding, LowRank
from ..methods import DirectWeights
from ..network import EmbeddingNetwork
from ..ops import coefficients, drawn_and_signed, signed_cams
from ..recipe.recipe import Recipe
from .assembly import Gathered
from .passes import Tick, Work
from .trust import COUNTS, LEAST, SAMPLE, LeftOut, fit_calibration, leave_out, sample_rows

_BLOCK = 64
_SHARE = 8
"""One of so many images plays a query where it takes a gradient of its own."""
Rows = Callable[[int, np.ndarray], dict[str, np.ndarray]]
"""Fields of a layer's encoding at some rows, with "embedding" where it uses that."""


def in_closed_form(recipe: Recipe, network: EmbeddingNetwork) -> bool:
    """Whether weights are W^T dy/dz, so that they can be had for a smaller index at once."""
    matrix = network.head_kind.matrix
    return recipe.method == "gradcam" and matrix is not None and recipe.sampling != "given"


def trust_rows(n_rows: int, recipe: Recipe, network: EmbeddingNetwork) -> np.ndarray:
    """Rows that play queries; fewer where each takes a gradient beside its forward pass."""
    most = SAMPLE if in_closed_form(recipe, network) else min(SAMPLE, max(LEAST, n_rows // _SHARE))
    return sample_rows(n_rows, recipe.seed, most)


@dataclass(frozen=True)
class View:
    """What a sampled image is drawn with.

    Attributes:
        maps: activations of each layer, deepest first, `[K h w]`; where `mixed` combinations of
            them by the head's matrix, `[D h w]`.
        inputs: the network's input `[3 H W]`; None where no gradient is asked for.
    """

    maps: Sequence[np.ndarray]
    mixed: bool = False
    inputs: np.ndarray | None = None


def calibrate_build(
    work: Work,
    encodings: Sequence[Encoding],
    gathered: Gathered,
    part: PartData,
    tick: Tick,
) -> dict[str, Any] | None:
    """Calibrate trust for a new index, with the activations that its build kept.

    Args:
        work: with every chunk finished.
        encodings: of the index's layers.
        gathered: what the embedding pass found.
        part: the rows, as they will be stored.
        tick: told of progress.

    Returns:
        Calibrations by name, or None where there are too few images.
    """
    rows = trust_rows(len(part), work.recipe, work.network)

    def fields(layer: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: np.asarray(array)[chosen] for name, array in part.fields[layer].items()}
        return {**found, "embedding": gathered.own[chosen]}

    return calibrate_trust(
        work.recipe,
        work.network,
        encodings,
        fields,
        gathered.own,
        part.labels,
        rows,
        _kept(work, gathered, rows),
        tick,
    )


def calibrate_trust(
    recipe: Recipe,
    network: EmbeddingNetwork,
    encodings: Sequence[Encoding],
    fields: Rows,
    embeddings: ArrayLike,
    labels: Sequence[str | None],
    rows: np.ndarray,
    views: Iterator[View],
    tick: Tick,
) -> dict[str, Any] | None:
    """Let some of an index's images query the rest; what the manifest says of trust.

    Args:
        recipe: the index's.
        network: its network.
        encodings: of its layers.
        fields: fetches rows of a layer.
        embeddings: of all images, `[N D]`.
        labels: theirs.
        rows: of those that play queries, see `trust_rows`.
        views: what each of these is drawn with, in order.
        tick: told of progress.

    Returns:
        Calibrations by name, or None where there are too few images.
    """
    if not len(rows):
        return None
    closed, normalized = in_closed_form(recipe, network), network.normalize
    sample = leave_out(recipe, embeddings, labels, rows, closed_form=closed, normalized=normalized)
    direct = None if closed else DirectWeights(network, recipe)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in COUNTS}
    agreed: dict[str, list[float]] = {name: [] for name in COUNTS}
    for place, view in enumerate(views):
        for name, left_out in sample.items():
            one = left_out[place]
            if direct is None:
                drawn = _by_codes(one, view, network.head_kind.matrix, encodings[0])
            else:
                weights = [each.decode(fields(n, one.near)) for n, each in enumerate(encodings)]
                others = embeddings[one.near], embeddings[one.negatives]
                drawn = _Drawn(weights, weights, direct.weights(view.inputs, *others), view.maps)
            shares, found, expected = drawn.maps_by(one.distances)
            norm = float(np.linalg.norm(np.tensordot(shares, drawn.weights[0], 1)))
            raw = signed_cams(drawn.factors[0], view.maps[0])
            seen[name].append(evidence(raw, shares, norm, one.distances))
            agreed[name].append(float(correlation(found, expected)))
        tick(1)
    return {
        name: fit_calibration(
            np.array(seen[name]),
            np.array(agreed[name]),
            np.array([one.distances.min() for one in sample[name]]),
            neighbors=count,
            seed=recipe.seed,
        ).to_dict()
        for name, count in COUNTS.items()
    }


@dataclass(frozen=True)
class _Drawn:
    """One picture with its neighbours' weights and with its own.

    Attributes:
        weights: of the neighbours by layer, `[n K]`, or `[n K h w]` by position.
        factors: what multiplies the maps in their place: the same but where maps are mixed.
        own: what multiplies the maps for the picture's own weights, by layer, `[K]`.
        maps: by layer, `[K h w]`.
    """

    weights: Sequence[np.ndarray]
    factors: Sequence[np.ndarray]
    own: Sequence[np.ndarray]
    maps: Sequence[np.ndarray]

    def maps_by(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares of the neighbours; the signed maps by theirs and by its own, flat."""
        shares = [
            coefficients(
                np.linalg.norm(each.reshape(len(each), -1).astype(np.float64), axis=1), distances
            )
            for each in self.weights
        ]
        mixed = [
            np.tensordot(share, each, 1) for share, each in zip(shares, self.factors, strict=True)
        ]
        both = (drawn_and_signed(each, self.maps)[1] for each in (mixed, self.own))
        found, expected = (signed.astype(np.float64).ravel() for signed in both)
        return shares[0], found, expected


def _by_codes(one: LeftOut, view: View, matrix: np.ndarray | None, encoding: Encoding) -> _Drawn:
    assert one.codes is not None
    assert one.own is not None
    assert matrix is not None
    weights = one.codes @ matrix
    if view.mixed:
        return _Drawn([weights], [one.codes], [one.own], view.maps)
    if not (isinstance(encoding, LowRank) and encoding.origin == "head"):
        weights = encoding.decode(encoding.encode(weights))
    return _Drawn([weights], [weights], [one.own @ matrix], view.maps)


def _kept(work: Work, gathered: Gathered, rows: np.ndarray) -> Iterator[View]:
    """Views of the rows from what the build kept; where that is too little, forwarded again."""
    stage = "embed" if work.pooled else "weights"
    mixed = work.exact and not work.network.head_kind.identity
    closed = in_closed_form(work.recipe, work.network)
    first = 0
    for chunk in range(work.n_chunks):
        n = len(work.embedded(chunk))
        chosen = rows[(rows >= first) & (rows < first + n)] - first
        if len(chosen):
            arrays = work.scratch.read(stage, chunk)
            if not closed or "activations" not in arrays:
                batches = work.batches(gathered.positions[first + chosen])
                yield from forwarded(work.network, [name for name, _ in work.layers], batches)
            else:
                # A block at a time: NumPy widens halves twenty times slower than torch does.
                for start in range(0, len(chosen), _BLOCK):
                    some = chosen[start : start + _BLOCK]
                    halves = torch.from_numpy(np.array(arrays["activations"][some])).float()
                    for maps, peak in zip(halves.numpy(), arrays["peaks"][some], strict=True):
                        yield View([maps * np.float32(peak)], mixed)
        first += n


def forwarded(
    network: EmbeddingNetwork, layers: Sequence[str], batches: Generator[Batch, None, None]
) -> Iterator[View]:
    """Views of images by a forward pass; `layers` are those of an index that has several.

    Raises:
        ImageError: one that could be read when it was indexed cannot be read now.
    """
    with closing(batches):
        for batch in batches:
            for _, reason in batch.errors:
                raise ImageError(f"{reason}; it could be read before, so run the command again")
            if len(layers) > 1:
                tapped = network.forward_layers(batch.images, layers)[1]
            else:
                tapped = [network.forward(batch.images).activations]
            for row in range(len(batch)):
                maps = [each[row].float().cpu().numpy() for each in tapped]
                yield View(maps, inputs=np.asarray(batch.images[row]))
