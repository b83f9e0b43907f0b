"""OFFLINE, without images: an index from embeddings and pooled activations that already exist."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .assembly import header, make_encoding, sample_places
from .build import BuildReport
from .cotangents import AnchorCotangents
from .encoding import LowRank
from .errors import InputError, RecipeError
from .identity import fingerprint
from .index import PartData, create
from .models.checkpoints import read_affine
from .network import EmbeddingNetwork
from .passes import is_exact
from .recipe import Recipe
from .targets import head_cotangent
from .triplets import Classes, label_codes
from .weights import weights_from_pooled

BLOCK = 1024
AGREEMENT = 1e-3
"""How far the embeddings may be from what the head makes of the pooled activations."""


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
) -> BuildReport:
    """Build an index from features that another system computed; no image is read.

    The layer must feed a global average pool and an affine head, which is checked on the features.
    Such an index has no own maps (they need activations). Named `network`, it can be queried with
    pictures; without, with `Explainer.explain_features` alone.

    Args:
        embeddings: `[N D]`, of unit length or not.
        pooled: mean of the layer's activations over positions, `[N K]`.
        path: folder of the index.
        recipe: the choices.
        grid: (H, W) of the layer.
        head: the affine head; None means the embedding is the pooled vector itself (D = K).
        normalize: whether the index's embeddings are L2-normalised.
        ids: of the images; None numbers them.
        labels: of the images, or None.
        positive_pooled: mean of max(A, 0), `[N K]`; Grad-CAM++ needs it where A can be negative.
        triplets: with sampling "given": `[N S 2]`.
        network: whose identity to record.
        replace: redo a finished index.

    Raises:
        InputError: shapes that do not fit, NaN, or features that the head does not connect.
    """
    recipe, path = recipe or Recipe(), Path(path)
    embeddings, pooled = _matrix("embeddings", embeddings), _matrix("pooled", pooled)
    head = head or _identity_head(embeddings, pooled)
    z, lengths = _checked_head(head, embeddings, pooled, normalize)
    embeddings = z / lengths[:, None] if normalize else z
    positive = _positive(recipe, pooled, positive_pooled)
    names = [str(i) for i in range(len(z))] if ids is None else [str(one) for one in ids]
    kept_labels: list[str | None] = [None] * len(z) if labels is None else list(labels)
    if not len(names) == len(kept_labels) == len(z):
        raise InputError(
            f"{len(z)} embeddings came with {len(names)} ids and {len(kept_labels)} labels"
        )
    mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    codes = label_codes(kept_labels)
    anchors = AnchorCotangents(recipe, embeddings, codes, mean, triplets)
    exact = is_exact(recipe, head.matrix)
    weights, counts = _weights(recipe, head, anchors, embeddings, lengths, pooled, positive,
                               normalize, grid, exact)  # fmt: skip
    encoding = make_encoding(
        recipe,
        head.matrix if exact else None,
        grid,
        mean,
        normalize,
        lambda: weights[sample_places(len(weights), recipe.seed)],
    )
    rows = encoding.encode_codes(weights) if isinstance(encoding, LowRank) and exact else None
    part = PartData(
        ids=names,
        labels=kept_labels,
        paths=[""] * len(z),
        embeddings=embeddings,
        triplets_used=np.minimum(counts, np.iinfo(np.uint32).max).astype(np.uint32),
        fields=[encoding.encode(weights) if rows is None else rows],
        coarse=[None],
    )
    identity = None if network is None else fingerprint(network)
    described = header(
        recipe,
        None
        if network is None or identity is None
        else ({**identity.to_dict(), "loading": network.spec}),
        None,
        embeddings.shape[1],
        normalize,
        "given" if network is None else network.layer,
        grid,
        encoding,
        None,
    )
    shared = {"embedding_mean": mean, **({} if identity is None else identity.arrays())}
    create(path, described, [encoding.fitted], shared, part, replace=replace)
    n_single = 0 if codes is None else Classes(codes).n_single
    return BuildReport(path, len(z), [], n_single, int((counts == 0).sum()))


def _weights(
    recipe: Recipe,
    head: AffineHead,
    anchors: AnchorCotangents,
    embeddings: np.ndarray,
    lengths: np.ndarray,
    pooled: np.ndarray,
    positive: np.ndarray,
    normalize: bool,
    grid: tuple[int, int],
    exact: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Averaged weights `[N K]`, or dy/dz `[N D]` where exact, and the triplets that counted."""
    weights, counts = [], []
    for start in range(0, len(embeddings), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(embeddings)))
        found = anchors.of(rows)
        at_head = head_cotangent(
            found.values, embeddings[rows], lengths[rows], recipe.norm, normalize
        ).astype(np.float32)
        counts.append(found.counts)
        if exact:
            weights.append(at_head)
            continue
        used = None if found.used is None else torch.from_numpy(found.used)
        averaged = weights_from_pooled(
            head,
            torch.from_numpy(pooled[rows]),
            torch.from_numpy(positive[rows]),
            torch.from_numpy(at_head),
            used,
            grid[0] * grid[1],
            recipe.method,
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
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a .npy array ({error})") from error


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
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise InputError(f"{name}: row {bad} holds a NaN or an infinity")
    return values.astype(np.float32, copy=False)


def _identity_head(embeddings: np.ndarray, pooled: np.ndarray) -> AffineHead:
    if embeddings.shape[1] != pooled.shape[1]:
        raise InputError(
            f"embeddings have {embeddings.shape[1]} numbers and pooled activations "
            f"{pooled.shape[1]}; give the affine head that leads from one to the other"
        )
    return AffineHead(np.eye(pooled.shape[1], dtype=np.float32))


def _checked_head(
    head: AffineHead, embeddings: np.ndarray, pooled: np.ndarray, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """z `[N D]` and |z| `[N]` as the head makes them, found to agree with the embeddings."""
    expected = (embeddings.shape[1], pooled.shape[1])
    if head.matrix.shape != expected or len(embeddings) != len(pooled):
        raise InputError(
            f"{len(embeddings)} embeddings of {expected[0]} numbers, {len(pooled)} pooled vectors "
            f"of {expected[1]} and a head {list(head.matrix.shape)} do not fit together"
        )
    z = head.output(pooled).astype(np.float32)
    lengths = np.linalg.norm(z, axis=1)
    if normalize and not (lengths > 0).all():
        raise InputError(f"embedding {int(lengths.argmin())} has length 0, so it has no direction")
    given = np.linalg.norm(embeddings, axis=1)
    made = z / lengths[:, None] if normalize else z
    stated = embeddings / np.maximum(given, 1e-30)[:, None] if normalize else embeddings
    off = np.linalg.norm(made - stated, axis=1) / np.maximum(np.linalg.norm(made, axis=1), 1e-30)
    worst = int(off.argmax())
    if off[worst] > AGREEMENT:
        raise InputError(
            f"embedding {worst} is off by {off[worst]:.2g} from what the head makes of its pooled "
            f"activations (allowed: {AGREEMENT:g}); give the head that belongs to these features"
        )
    return z, lengths


def _positive(recipe: Recipe, pooled: np.ndarray, given: np.ndarray | None) -> np.ndarray:
    if recipe.method == "gradcam":
        return pooled
    if given is not None:
        return _matrix("positive_pooled", given)
    if (pooled < 0).any():
        raise RecipeError(
            "some pooled activations are negative, so the mean of the positive ones is not known; "
            "give positive_pooled, or use method 'gradcam'"
        )
    return pooled
