"""An index from embeddings and pooled activations that already exist; no image is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._checks import check_sides, wrong_number
from ..errors import InputError, RecipeError
from ..images.progress import Advance
from ..images.texts import LabelColumn, Texts
from ..index import PartData, check_target, create
from ..index.arrays import scratch_array
from ..index.identity import ALIKE, Identity
from ..network import EmbeddingNetwork
from ..network.checkpoints import read_affine
from ..network.module import one_thread
from ..recipe.recipe import Recipe
from .cotangents import AnchorCotangents, coded_labels
from .match import calibrate_match
from .merge import MOST_COUNTED, SAMPLE, encode_rows, header, layer_entry, make_encoding, plain
from .plan import check_amounts, disk_errors, warn_of_norm
from .prompts import check_prompts, read_prompts, text_mean
from .report import BuildReport, Stages, report_of
from .strategies import POOLED_METHODS, HeadCodes, PooledClosedForm, is_exact
from .triplets import sample_of, total_of

BLOCK = 1024
AGREEMENT = 1e-3
"""How far the embeddings may be from what the head makes of the pooled activations."""
UNIT = 1e-5
"""Embeddings this near unit length are kept to the bit; others are divided by their length."""


@dataclass(frozen=True)
class AffineHead:
    """z = W p + b behind a global average pool; W is float32 `[D K]`, b `[D]` or None."""

    matrix: np.ndarray
    bias: np.ndarray | None = None

    def output(self, pooled: np.ndarray) -> np.ndarray:
        """Return z `[n D]` of pooled activations `[n K]`."""
        return np.asarray(pooled @ self.matrix.T + (0 if self.bias is None else self.bias))

    def pooled_vjp(self, pooled: Tensor, cotangents: Tensor) -> Tensor:
        """Return dy/dp, which is W^T dy/dz wherever it is asked for."""
        return cotangents @ torch.from_numpy(self.matrix).to(cotangents)


@one_thread()
def build_from_features(
    embeddings: np.ndarray,
    pooled: np.ndarray,
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    grid: tuple[int, int],
    head: AffineHead | None = None,
    normalize: bool = True,
    ids: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    positive_pooled: np.ndarray | None = None,
    triplets: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
    network: EmbeddingNetwork | None = None,
    replace: bool = False,
    progress: bool | None = None,
) -> BuildReport:
    """Build an index from features that another system computed; no image is read.

    The layer must feed a global average pool and an affine head, which is checked on the features.
    Such an index has no own maps (they need activations). Named `network`, it can be queried with
    pictures; without, with `Explainer.explain_features` alone.

    Parameters
    ----------
    embeddings
        `[N D]`; with `normalize` of unit length or not.
    pooled
        Mean of the layer's activations over positions, `[N K]`.
    path
        Folder of the index.
    recipe
        The choices.
    grid
        (H, W) of the layer.
    head
        The affine head; None means the embedding is the pooled vector itself (D = K).
    normalize
        Whether the index's embeddings are L2-normalised.
    ids, labels
        Of the images; None numbers them, or leaves them without a label. With a recipe of labels
        "numbers" their texts.
    positive_pooled
        Mean of max(A, 0), `[N K]`; Grad-CAM++ needs it where A can be negative.
    network
        Whose identity to record; its layer, head and grid must be those of the features.
    triplets, prompts, replace, progress
        As for `build_index`.

    Raises
    ------
    InputError
        Shapes that do not fit, NaN, or features that the head does not connect.
    """
    recipe, path = recipe or Recipe(), Path(path)
    check_target(path, replace)
    if recipe.method not in POOLED_METHODS:
        raise RecipeError(
            f"method = {recipe.method!r} needs the images, and features alone are given; use "
            f"{' or '.join(map(repr, POOLED_METHODS))}, or build from the images"
        )
    if prompts is not None and check_prompts(prompts) and network is None:
        raise InputError("prompts are embedded by a network; name it (network=, --network)")
    warn_of_norm(recipe, normalize, 3)  # one more for the context around
    embeddings, pooled = _matrix("embeddings", embeddings), _matrix("pooled", pooled)
    grid = check_sides("grid", grid)
    (n, width), n_channels = embeddings.shape, pooled.shape[1]
    if head is None and width != n_channels:
        raise InputError(
            f"embeddings have {width} numbers and pooled activations {n_channels}; give the affine "
            "head that leads from one to the other"
        )
    head = head or AffineHead(np.eye(n_channels, dtype=np.float32))
    stages, folder = Stages(progress), _beside(path)
    with stages("check", n) as progressed, disk_errors(folder):
        embeddings, lengths = _agreeing(head, embeddings, pooled, normalize, folder, progressed)
        positive = _positive(recipe, pooled, positive_pooled)
    names = ids if isinstance(ids, Texts) else Texts.of(map(str, range(n) if ids is None else ids))
    kept_labels = LabelColumn.of(repeat(None, n) if labels is None else labels)
    if not len(names) == len(kept_labels) == n:
        raise InputError(f"{n} embeddings came with {len(names)} ids and {len(kept_labels)} labels")
    check_amounts(recipe, names, kept_labels, width, n_channels, triplets)
    mean = (total_of(embeddings) / n).astype(np.float32)
    described, layer, shared = None, "given", {"embedding_mean": mean}
    if network is not None:
        identity = _identity(network, head, normalize, grid)
        described, layer = {**identity.to_dict(), "loading": network.spec}, network.layer
        shared |= identity.arrays()
        if prompts is not None or network.texts is not None:
            shared["text_mean"] = text_mean(network, prompts or read_prompts(), stages)
    codes = coded_labels(recipe, kept_labels, names)
    anchors = AnchorCotangents(recipe, embeddings, codes, mean, triplets, folder=folder)
    exact, of = is_exact(recipe, head.matrix, normalize), (recipe, normalize, torch.device("cpu"))
    strategy = HeadCodes(*of, head, head.matrix) if exact else PooledClosedForm(*of, head)
    arrays = {"embedding": embeddings, "length": lengths}
    arrays |= {"pooled": pooled, "positive_pooled": positive}

    def weights(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cotangents, rows = anchors.of(places), slice(0, len(places))
        some = {name: np.asarray(values[places], np.float32) for name, values in arrays.items()}
        weighed = strategy.weigh(pooled, {**some, "grid": np.array(grid)}, rows, cotangents)
        return weighed["weights"], cotangents.counts

    def sample() -> np.ndarray:
        places = sample_of(names, recipe.seed, SAMPLE)
        return np.concatenate([weights(some)[0] for some in _blocks(places)])

    with disk_errors(folder):
        anchors.statistics(stages)
    with stages("weights", n) as progressed, disk_errors(folder):
        matrix = head.matrix if exact else None
        encoding = make_encoding(recipe, matrix, grid, mean, normalize, sample, n_channels)
        fields = {
            name: scratch_array((n, *field.shape), field.dtype, folder)
            for name, field in encoding.fields.items()
        }
        counts = np.empty(n, np.uint32)
        for places in _blocks(np.arange(n)):
            values, used = weights(places)
            rows, _ = encode_rows(encoding, values, embeddings[places], mean, grid)
            for name, stored in rows.items():
                fields[name][places] = stored
            counts[places] = np.minimum(used, MOST_COUNTED)
            progressed(len(places))
    part = PartData(names, kept_labels, Texts.blank(n), embeddings, counts, [fields], [None])
    entry = layer_entry(layer, grid, encoding, None)
    about = header(recipe, described, None, width, normalize, [entry], given=triplets)
    match = calibrate_match(names, embeddings, kept_labels, recipe, stages)
    about["match_calibration"] = plain(match)
    with disk_errors(path):
        create(path, about, [encoding.fitted], shared, part, replace=replace, stage=stages)
    return report_of(path, recipe, kept_labels, codes, counts, stages)


def read_head(path: str | Path) -> AffineHead:
    """Read an affine head from a safetensors file with `weight [D K]` and perhaps `bias [D]`."""
    affine = read_affine(path, None)
    bias = None if affine.bias is None else affine.bias.detach().numpy()
    return AffineHead(affine.weight.detach().numpy(), bias)


def _beside(path: Path) -> Path:
    """Return the folder of an index, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _blocks(places: np.ndarray) -> Iterator[np.ndarray]:
    return (places[start : start + BLOCK] for start in range(0, len(places), BLOCK))


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind != "f" or 0 in values.shape:
        shape = list(values.shape)
        raise InputError(f"{name} is {values.dtype} of shape {shape}; expected floats [N width]")
    _check_numbers(name, values)
    return values


def _check_numbers(name: str, values: np.ndarray, first: int = 0) -> None:
    if wrong := wrong_number(values, first=first):
        raise InputError(f"{name}: {wrong}")


def _agreeing(
    head: AffineHead,
    embeddings: np.ndarray,
    pooled: np.ndarray,
    normalize: bool,
    folder: Path,
    progressed: Advance,
) -> tuple[np.ndarray, np.ndarray]:
    """Return f `[N D]` and |z| `[N]` of embeddings that are what the head makes.

    Those that are not stored as they were given lie in a file in `folder`.
    """
    expected = (embeddings.shape[1], pooled.shape[1])
    bias = expected[:1] if head.bias is None else head.bias.shape
    if head.matrix.shape != expected or bias != expected[:1] or len(embeddings) != len(pooled):
        raise InputError(
            f"{len(embeddings)} embeddings of {expected[0]} numbers, {len(pooled)} pooled vectors "
            f"of {expected[1]} and a head {list(head.matrix.shape)} do not fit together"
        )
    _check_numbers("the head's matrix", head.matrix)
    if head.bias is not None:
        _check_numbers("the head's bias", head.bias[None])
    n, norms = len(embeddings), np.empty(len(embeddings), np.float32)
    for rows in _blocks(np.arange(n)):
        norms[rows] = np.linalg.norm(embeddings[rows].astype(np.float32, copy=False), axis=1)
    divided, stored = normalize and bool((np.abs(norms - 1) > UNIT).any()), embeddings
    if divided or embeddings.dtype != np.float32:
        stored = scratch_array(embeddings.shape, "float32", folder)
    lengths, sizes, apart = (np.empty(n, np.float32) for _ in range(3))
    for rows in _blocks(np.arange(n)):
        with np.errstate(over="ignore", invalid="ignore"):
            z = head.output(pooled[rows].astype(np.float32, copy=False)).astype(np.float32)
        _check_numbers("what the head makes of the pooled vectors", z, int(rows[0]))
        lengths[rows] = np.linalg.norm(z, axis=1)
        some = embeddings[rows].astype(np.float32, copy=False)
        if normalize:
            shorter = np.minimum(lengths[rows], norms[rows])
            if not (shorter > 0).all():
                row = int(rows[shorter.argmin()])
                raise InputError(f"embedding {row} has length 0, so it has no direction")
            z = z / lengths[rows, None]
        if divided:
            some = some / norms[rows, None]
        if stored is not embeddings:
            stored[rows] = some
        sizes[rows], apart[rows] = (np.linalg.norm(one, axis=1) for one in (z, z - some))
        progressed(len(rows))
    # Relative to each, but near 0 an embedding is all rounding.
    off = apart / np.maximum(sizes, 1e-3 * sizes.max() + 1e-30)
    if off.max() > AGREEMENT:
        worst = int(off.argmax())
        raise InputError(
            f"embedding {worst} is off by {off[worst]:.2g} from what the head makes of its pooled "
            f"activations (allowed: {AGREEMENT:g}); give the head that belongs to these features, "
            "and say whether the embeddings are L2-normalised"
        )
    return stored, lengths


def _identity(
    network: EmbeddingNetwork, head: AffineHead, normalize: bool, grid: tuple[int, int]
) -> Identity:
    """Return the identity of the network, if these features can be its."""
    identity, matrix = network.identity(), network.head_kind.matrix
    activations = network.forward(network.probe_images()).activations
    shape = None if matrix is None else list(matrix.shape)
    facts = {
        "normalize": (normalize, network.normalize),
        "grid": (list(grid), list(activations.shape[2:])),
        "head": (list(head.matrix.shape), shape),
    }
    for what, (mine, its) in facts.items():
        if mine != its:
            raise InputError(
                f"the features have {what} {mine} and the network {its}; give the network and "
                "layer that the features were computed with"
            )
    length = max(float(np.linalg.norm(head.matrix)), 1e-30)
    off = float(np.linalg.norm(np.asarray(matrix) - head.matrix)) / length
    if off > ALIKE:
        raise InputError(
            f"the features' head is off by {off:.2g} from the network's (allowed: {ALIKE:g}); "
            "give the network that the features were computed with"
        )
    return identity


def _positive(recipe: Recipe, pooled: np.ndarray, given: np.ndarray | None) -> np.ndarray:
    """Return the mean of max(A, 0), `[N K]`, where the method needs it."""
    if recipe.method != "gradcam++":
        return pooled
    if given is None and pooled.min() < 0:
        raise RecipeError(
            "some pooled activations are negative, so the mean of the positive ones is not known; "
            "give positive_pooled, or use method 'gradcam'"
        )
    positive = pooled if given is None else _matrix("positive_pooled", given)
    if positive.shape != pooled.shape or positive.min() < 0:
        raise InputError(
            f"positive_pooled is {list(positive.shape)}, its least value {positive.min():.3g}; "
            f"expected means of max(A, 0), {list(pooled.shape)} and not negative"
        )
    return positive
