"""OFFLINE, without images: an index from embeddings and pooled activations that already exist."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._checks import wrong_number
from ..errors import InputError, RecipeError
from ..index import PartData, check_target, create
from ..index.encoding import LowRank
from ..index.identity import ALIKE, Identity
from ..methods.weights import weights_from_pooled
from ..network import EmbeddingNetwork
from ..network.checkpoints import read_affine
from ..recipe.recipe import Recipe
from ..targets import head_cotangent
from .assembly import described, header, make_encoding, sample_places
from .checks import check_amounts, disk_errors, warn_of_norm
from .classes import alone
from .cotangents import AnchorCotangents, coded_labels
from .match_fit import calibrate_match
from .passes import POOLED_METHODS, is_exact
from .report import BuildReport, Stages, label_counts, number_range

BLOCK = 1024
AGREEMENT = 1e-3
"""How far the embeddings may be from what the head makes of the pooled activations."""
UNIT = 1e-5
"""Embeddings this near unit length are kept to the bit; others are divided by their length."""


@dataclass(frozen=True)
class AffineHead:
    """z = W p + b behind a global average pool.

    Args:
        matrix: W, float32 `[D K]`.
        bias: b, `[D]`, or None.
    """

    matrix: np.ndarray
    bias: np.ndarray | None = None

    def output(self, pooled: np.ndarray) -> np.ndarray:
        """z `[n D]` of pooled activations `[n K]`."""
        z = pooled @ self.matrix.T
        return z if self.bias is None else z + self.bias

    def pooled_vjp(self, pooled: Tensor, cotangents: Tensor) -> Tensor:
        """dy/dp, which is W^T dy/dz wherever it is asked for."""
        return cotangents @ torch.from_numpy(self.matrix).to(cotangents)


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
    network: EmbeddingNetwork | None = None,
    replace: bool = False,
    progress: bool | None = None,
) -> BuildReport:
    """Build an index from features that another system computed; no image is read.

    The layer must feed a global average pool and an affine head, which is checked on the features.
    Such an index has no own maps (they need activations). Named `network`, it can be queried with
    pictures; without, with `Explainer.explain_features` alone.

    Args:
        embeddings: `[N D]`; with `normalize` of unit length or not.
        pooled: mean of the layer's activations over positions, `[N K]`.
        path: folder of the index.
        recipe: the choices.
        grid: (H, W) of the layer.
        head: the affine head; None means the embedding is the pooled vector itself (D = K).
        normalize: whether the index's embeddings are L2-normalised.
        ids: of the images; None numbers them.
        labels: of the images, or None; texts of numbers with a recipe of labels "numbers".
        positive_pooled: mean of max(A, 0), `[N K]`; Grad-CAM++ needs it where A can be negative.
        triplets: with sampling "given": `[N S 2]`.
        network: whose identity to record; its layer, head and grid must be those of the features.
        replace: redo a finished index.
        progress: a bar; None shows it on a terminal or in a notebook, else logs how far it is.

    Raises:
        InputError: shapes that do not fit, NaN, or features that the head does not connect.
    """
    recipe, path = recipe or Recipe(), Path(path)
    check_target(path, replace)
    if recipe.method not in POOLED_METHODS:
        raise RecipeError(
            f"method = {recipe.method!r} needs the images, and features alone are given; use "
            f"{' or '.join(map(repr, POOLED_METHODS))}, or build from the images"
        )
    warn_of_norm(recipe, normalize, 2)
    features = _checked(recipe, embeddings, pooled, positive_pooled, head, normalize, grid)
    n, width = features.embeddings.shape
    names = [str(i) for i in range(n)] if ids is None else [str(one) for one in ids]
    kept_labels: list[str | None] = [None] * n if labels is None else list(labels)
    if not len(names) == len(kept_labels) == n:
        raise InputError(f"{n} embeddings came with {len(names)} ids and {len(kept_labels)} labels")
    n_channels = features.pooled.shape[1]
    check_amounts(recipe, names, kept_labels, width, n_channels, triplets)
    identity = None if network is None else _identity(network, features)
    mean = features.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    codes = coded_labels(recipe, kept_labels, names)
    anchors = AnchorCotangents(recipe, features.embeddings, codes, mean, triplets)
    exact = is_exact(recipe, features.head.matrix, normalize)
    encoding = make_encoding(
        recipe,
        features.head.matrix if exact else None,
        features.grid,
        mean,
        normalize,
        lambda: features.weights(anchors, sample_places(n, recipe.seed), False)[0],
        n_channels=n_channels,
    )
    fields = {name: np.empty((n, *f.shape), f.dtype) for name, f in encoding.fields.items()}
    counts = np.empty(n, np.uint32)
    stages = Stages(progress)
    with stages("weights", n) as tick:
        for start in range(0, n, BLOCK):
            places = np.arange(start, min(start + BLOCK, n))
            weights, used = features.weights(anchors, places, exact)
            if exact and isinstance(encoding, LowRank):
                rows = encoding.encode_codes(weights)
            else:
                rows = encoding.encode(weights)
            for name, values in rows.items():
                fields[name][places] = values
            counts[places] = np.minimum(used, np.iinfo(np.uint32).max)
            tick(len(places))
    part = PartData(names, kept_labels, [""] * n, features.embeddings, counts, [fields], [None])
    about = header(
        recipe,
        None if network is None or identity is None else described(network, identity),
        None,
        width,
        normalize,
        "given" if network is None else network.layer,
        features.grid,
        encoding,
        None,
        given=triplets,
    )
    about["match_calibration"] = calibrate_match(
        features.embeddings, kept_labels, recipe.metric, recipe.seed, recipe.near
    )
    shared = {"embedding_mean": mean, **({} if identity is None else identity.arrays())}
    with stages("write"), disk_errors(path):
        create(path, about, [encoding.fitted], shared, part, replace=replace)
    by_label = codes is not None and recipe.resolved_target != "centred" and triplets is None
    n_single = int(alone(codes).sum()) if by_label and codes is not None else 0
    n_empty = int((counts == 0).sum())
    return BuildReport(
        path,
        n,
        [],
        n_single,
        n_empty,
        stages.seconds,
        *label_counts(kept_labels, recipe.labels),
        numbers=number_range(kept_labels, recipe.labels),
    )


@dataclass(frozen=True)
class _Features:
    """Features found to fit together.

    Args:
        recipe: the choices.
        head: z of the pooled vectors.
        embeddings: f, `[N D]`.
        lengths: |z|, `[N]`.
        pooled, positive: `[N K]`.
        normalize: whether f = z / |z|.
        grid: (H, W).
    """

    recipe: Recipe
    head: AffineHead
    embeddings: np.ndarray
    lengths: np.ndarray
    pooled: np.ndarray
    positive: np.ndarray
    normalize: bool
    grid: tuple[int, int]

    def weights(
        self, anchors: AnchorCotangents, places: np.ndarray, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Averaged weights `[n K]`, or dy/dz `[n D]` where exact, and the triplets that counted."""
        weights, counts = [], []
        for start in range(0, len(places), BLOCK):
            rows = places[start : start + BLOCK]
            found = anchors.of(rows)
            at_head = head_cotangent(
                found.values,
                self.embeddings[rows],
                self.lengths[rows],
                self.recipe.head_norm,
                self.normalize,
            ).astype(np.float32)
            counts.append(found.counts)
            if exact:
                weights.append(at_head)
                continue
            averaged = weights_from_pooled(
                self.head,
                torch.from_numpy(self.pooled[rows]),
                torch.from_numpy(self.positive[rows]),
                torch.from_numpy(at_head),
                None if found.used is None else torch.from_numpy(found.used),
                self.grid[0] * self.grid[1],
                self.recipe.method,
            )
            weights.append(averaged.numpy())
        return np.concatenate(weights), np.concatenate(counts)


def read_array(path: str | Path) -> np.ndarray:
    """An array from a `.npy` file, memory-mapped; never unpickled.

    Raises:
        InputError: not readable as one array.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; give a .npy array") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: not a .npy array of numbers; save one with numpy.save"
        ) from error


def read_head(path: str | Path) -> AffineHead:
    """An affine head from a safetensors file with `weight [D K]` and perhaps `bias [D]`."""
    affine = read_affine(path, None)
    bias = None if affine.bias is None else affine.bias.detach().numpy()
    return AffineHead(affine.weight.detach().numpy(), bias)


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind != "f":
        raise InputError(
            f"{name} is {values.dtype} of shape {list(values.shape)}; expected floats [N width]"
        )
    if 0 in values.shape:
        raise InputError(f"{name} is empty, {list(values.shape)}; expected floats [N width]")
    _check_numbers(name, values)
    return values.astype(np.float32, copy=False)


def _check_numbers(name: str, values: np.ndarray) -> None:
    wrong = wrong_number(values)
    if wrong is not None:
        raise InputError(f"{name}: row {wrong[0]} {wrong[1]}")


def _checked(
    recipe: Recipe,
    embeddings: np.ndarray,
    pooled: np.ndarray,
    positive_pooled: np.ndarray | None,
    head: AffineHead | None,
    normalize: bool,
    grid: tuple[int, int],
) -> _Features:
    embeddings, pooled = _matrix("embeddings", embeddings), _matrix("pooled", pooled)
    if len(grid) != 2 or any(int(side) != side or side < 1 for side in grid):
        raise InputError(f"grid = {grid!r}; give (H, W) of the layer, such as (7, 7)")
    head = head or _identity_head(embeddings, pooled)
    z = _checked_head(head, embeddings, pooled)
    lengths = np.linalg.norm(z, axis=1)
    given = np.linalg.norm(embeddings, axis=1)
    if normalize:
        if not (np.minimum(lengths, given) > 0).all():
            row = int(np.minimum(lengths, given).argmin())
            raise InputError(f"embedding {row} has length 0, so it has no direction")
        z = z / lengths[:, None]
        if (np.abs(given - 1) > UNIT).any():
            embeddings = embeddings / given[:, None]
    made = np.linalg.norm(z, axis=1)
    # Relative to each, but near 0 an embedding is all rounding.
    off = np.linalg.norm(z - embeddings, axis=1) / np.maximum(made, 1e-3 * made.max() + 1e-30)
    if off.max() > AGREEMENT:
        worst = int(off.argmax())
        raise InputError(
            f"embedding {worst} is off by {off[worst]:.2g} from what the head makes of its pooled "
            f"activations (allowed: {AGREEMENT:g}); give the head that belongs to these features, "
            "and say whether the embeddings are L2-normalised"
        )
    positive = _positive(recipe, pooled, positive_pooled)
    height, breadth = (int(side) for side in grid)
    return _Features(
        recipe, head, embeddings, lengths, pooled, positive, normalize, (height, breadth)
    )


def _identity(network: EmbeddingNetwork, features: _Features) -> Identity:
    """The identity of the network, found to be one that these features can be of."""
    identity, kind = network.identity(), network.head_kind
    activations = network.forward(network.probe_images()).activations
    shape = None if kind.matrix is None else list(kind.matrix.shape)
    said = {
        "normalize": (features.normalize, network.normalize),
        "grid": (list(features.grid), list(activations.shape[2:])),
        "head": (list(features.head.matrix.shape), shape),
    }
    for what, (mine, its) in said.items():
        if mine != its:
            raise InputError(
                f"the features have {what} {mine} and the network {its}; give the network and "
                "layer that the features were computed with"
            )
    matrix = features.head.matrix
    assert kind.matrix is not None
    off = float(np.linalg.norm(kind.matrix - matrix)) / max(float(np.linalg.norm(matrix)), 1e-30)
    if off > ALIKE:
        raise InputError(
            f"the features' head is off by {off:.2g} from the network's (allowed: {ALIKE:g}); "
            "give the network that the features were computed with"
        )
    return identity


def _identity_head(embeddings: np.ndarray, pooled: np.ndarray) -> AffineHead:
    if embeddings.shape[1] != pooled.shape[1]:
        raise InputError(
            f"embeddings have {embeddings.shape[1]} numbers and pooled activations "
            f"{pooled.shape[1]}; give the affine head that leads from one to the other"
        )
    return AffineHead(np.eye(pooled.shape[1], dtype=np.float32))


def _checked_head(head: AffineHead, embeddings: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """z `[N D]` as the head makes it."""
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
    with np.errstate(over="ignore", invalid="ignore"):
        z = head.output(pooled).astype(np.float32)
    _check_numbers("what the head makes of the pooled vectors", z)
    return z


def _positive(recipe: Recipe, pooled: np.ndarray, given: np.ndarray | None) -> np.ndarray:
    if recipe.method != "gradcam++":
        return pooled
    if given is not None:
        positive = _matrix("positive_pooled", given)
        if positive.shape != pooled.shape or positive.min() < 0:
            raise InputError(
                f"positive_pooled is {list(positive.shape)}, its least value {positive.min():.3g}; "
                f"expected means of max(A, 0), {list(pooled.shape)} and not negative"
            )
        return positive
    if pooled.min() < 0:
        raise RecipeError(
            "some pooled activations are negative, so the mean of the positive ones is not known; "
            "give positive_pooled, or use method 'gradcam'"
        )
    return pooled
