"""What a job refuses before it embeds an image, and what it says when the disk gives up."""

import errno
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EmbedcamError, ImageError, InputError, NetworkMismatch, RecipeError
from ..images import ImageSource, embed, load_batches
from ..index import Index, check_factory
from ..index.encoding import Encoding, LowRank, TopM
from ..index.identity import Identity
from ..methods import Subject, run_method
from ..methods.masking import fill_like
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe, RecipeWarning
from ..recipe.registry import PositionMethod
from ..targets import Direction
from .cotangents import AnchorCotangents, coded_labels
from .trust import LEAST

_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}


def check_options(
    source: ImageSource, network: EmbeddingNetwork, batch_size: int, unreadable: str, gb: float
) -> None:
    """Refuse options that no job can work with."""
    if len(source) == 0:
        raise InputError("there are no images to index; give a folder or a CSV that names some")
    if unreadable not in ("fail", "skip"):
        raise InputError(f"on_unreadable = {unreadable!r}; use 'fail' or 'skip'")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size = {batch_size!r}; give a whole number from 1")
    if not gb >= 0:
        raise InputError(f"scratch_gb = {gb!r}; give 0 or more")
    if network.preprocess is None:
        raise InputError(
            "the network has no preprocessing, so images cannot be turned into its input; give "
            "EmbeddingNetwork(..., preprocess=Preprocess(...)), or let the function that makes it "
            "return (module, Preprocess.imagenet(224))"
        )
    if unreadable == "fail":
        # Known without a look at the files: said before hours of work, not after.
        reasons = (source.refused(position) for position in range(len(source)))
        if reason := next((reason for reason in reasons if reason is not None), None):
            raise ImageError(reason)


def check_norm(recipe: Recipe, network: EmbeddingNetwork) -> None:
    """Refuse `around` for a module that normalises by itself."""
    if recipe.norm == "around" and network.already_normalized:
        raise RecipeError(
            "norm 'around' needs the embedding before its L2 norm, and this module normalises its "
            "output itself; use norm 'through', or a module that returns the vector before the norm"
        )


def warn_of_norm(recipe: Recipe, normalize: bool, stacklevel: int) -> None:
    """Warn of the centred target through the norm."""
    by_gradient = recipe.entry.targeted and not recipe.entry.scored
    centred = recipe.resolved_target == "centred"
    if by_gradient and centred and recipe.norm == "through" and normalize:
        warnings.warn(
            "the centred target through the L2 norm loses its own part at the image itself and "
            "can point at the wrong object; 'around' is the safe choice",
            RecipeWarning,
            stacklevel=stacklevel + 1,
        )


def check_amounts(
    recipe: Recipe,
    names: list[str],
    labels: list[str | None],
    width: int,
    n_channels: int,
    given: np.ndarray | None,
) -> None:
    """Refuse what the encoding, FAISS or the triplets could only refuse after all the work.

    Args:
        recipe: the choices.
        names: of the images, `[N]` if all can be read.
        labels: theirs, `[N]`.
        width: D.
        n_channels: K.
        given: the user's triplets, or None.
    """
    if recipe.encoding == "top-m":
        TopM(n_channels, recipe.m, recipe.by, recipe.dtype)
    if recipe.faiss.lower() != "none":
        check_factory(recipe.faiss, width, len(names), recipe.metric)
    # No embedding is looked at before cotangents are asked for.
    unseen = np.broadcast_to(np.float32(0), (len(names), width))
    AnchorCotangents(recipe, unseen, coded_labels(recipe, labels, names), unseen[0], given)


def head_note(recipe: Recipe, network: EmbeddingNetwork) -> str | None:
    """What to know of a head that does not pool, a sentence; None of others."""
    if not network.head_kind.uses_positions:
        return None
    what = f"what follows layer {network.layer!r} does not pool: where a thing lies counts"
    if isinstance(recipe.entry, PositionMethod):
        return (
            f"{what}; the weights are kept by position, so transferred maps hold for queries "
            "aligned as the indexed pictures are"
        )
    return (
        f"{what}, and weights by channel, being means over positions, cannot say so; where all "
        "pictures are aligned, as faces are, build with method 'hirescam' (--method hirescam), "
        "which keeps weights by position; elsewhere have the map computed on the query: `embedcam "
        "explain --method hirescam` or xgradcam"
    )


def check_method(recipe: Recipe, network: EmbeddingNetwork) -> None:
    """Refuse a method that this network cannot do, before any image is embedded.

    Raises:
        RecipeError: weights by position, of a head that pools.
        InputError: options that the method does not have, or values they do not take.
        NetworkError: CAM without an affine head, or a trained branch that is not there.
    """
    if isinstance(recipe.entry, PositionMethod) and network.head_kind.pooled:
        raise RecipeError(
            f"behind average pooling {recipe.entry.title} is Grad-CAM, whose weights belong to "
            "channels and take less room; use method 'gradcam'"
        )
    inputs = torch.from_numpy(network.probe_images()).to(network.device)
    options = recipe.method_options
    if recipe.layers:
        options["layers"] = list(recipe.layers)
    if recipe.fill != "mean":
        fill_like(inputs[0], recipe.fill, network.preprocess)
    whole = recipe.method == "cam" or recipe.entry.trained
    width = network.forward(inputs).embedding.shape[1] if whole else 1
    kind = Subject if whole else _Rehearsal
    with kind(network, inputs, Direction(np.zeros(width))) as subject, suppress(_FirstPass):
        run_method(subject, recipe.entry, **options)


class _FirstPass(Exception):  # noqa: N818 - an event, caught above
    """A method asks for its first pass: by then it has checked its options."""


class _Rehearsal(Subject):
    """Runs nothing: a method of a thousand passes is not to be run for its options' sake."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _FirstPass

    features = property(_refuse)
    head = property(_refuse)
    differentiate = several = scores = _refuse


def layers_of(network: EmbeddingNetwork, recipe: Recipe) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Names and grids of the layers a method of several draws with, deepest first; else nothing.

    Raises:
        RecipeError: the deepest is not the network's own.
        NetworkError: a layer that cannot be tapped.
    """
    if not recipe.layers:
        return ()
    run = network.run_several(network.probe_images(), recipe.layers, differentiable=False)
    order = sorted(range(len(run.names)), key=lambda place: -run.depth[place])
    found = tuple((run.names[place], run.layouts[place].grid) for place in order)
    if found[0][0] != network.layer:
        raise RecipeError(
            f"the deepest of layers = {list(recipe.layers)!r} is {found[0][0]!r}, and the network "
            f"explains {network.layer!r}; name that one as the deepest, or load the network with "
            f"layer {found[0][0]!r}"
        )
    return found


def files_digest(fingerprints: Sequence[str]) -> str:
    """SHA-256 over what tells of each indexed image's file whether it changed, in order."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def same_index(
    index: Index,
    recipe: Recipe,
    identity: Identity,
    source: ImageSource,
    files: Sequence[str],
    own_maps: bool,
    trust: bool,
    given: str | None,
    embeds: EmbeddingNetwork,
) -> list[tuple[str, str]]:
    """Refuse to call a finished index done where another one was asked for.

    Args:
        index: the finished one.
        recipe, identity, source, own_maps, trust: what is asked for.
        files: fingerprint of each image of the source.
        given: digest of the user's own triplets, or None.
        embeds: the network itself.

    Returns:
        (id, reason) of images that are not in it because they cannot be read or embedded.

    Raises:
        InputError: naming what differs.
    """
    manifest = index.manifest
    unusable = _unusable(source, set(index.ids[index.live_positions()]), embeds)
    checks = {
        "recipe": manifest.recipe_sha256 == recipe.resolved.digest(),
        "network": index.identity is not None and index.identity.to_dict() == identity.to_dict(),
        "choice of own maps": (manifest.layers[0].coarse_grid is not None) == own_maps,
        "choice of trust": (manifest.trust_calibration is not None)
        == (trust and manifest.fit.images >= LEAST),
        "array of given triplets": manifest.triplets.sha256 == given,
    }
    differs = [what for what, same in checks.items() if not same]
    said = [f"another {' and '.join(differs)}"] if differs else []
    said += _other_images(index, source, files, unusable)
    if said:
        raise InputError(
            f"{index.path} holds a finished index with {', and with '.join(said)}; choose "
            "another folder, add images with `embedcam add`, or redo it with --refit (replace=True)"
        )
    return list((unusable or {}).values())


def _other_images(
    index: Index,
    source: ImageSource,
    files: Sequence[str],
    unusable: Mapping[int, tuple[str, str]] | None,
) -> list[str]:
    """How the images of an index differ from those of a source that can be used."""
    counts, live = index.manifest.counts, index.live_positions()
    added = counts.added_after_fit
    removed = index.manifest.fit.images - (counts.live - added)
    changes = [f"{n:,} {how} since" for n, how in ((added, "added"), (removed, "removed")) if n]
    if changes:
        return [f"another list of images ({', '.join(changes)})"]
    places = [p for p in range(len(source)) if p not in (unusable or {})]
    items = [source.items[place] for place in places]
    listed = list(zip(index.ids[live], index.paths[live], strict=True))
    if unusable is None or [(item.id, item.path) for item in items] != listed:
        return ["another list of images"]
    said = []
    if [item.label for item in items] != list(index.labels[live]):
        said.append("other labels")
    stored = index.manifest.images.files_sha256 if index.manifest.images else None
    if stored is not None and stored != files_digest([files[place] for place in places]):
        said.append("image files changed since")
    return said


def _unusable(
    source: ImageSource, known: set[str], network: EmbeddingNetwork
) -> dict[int, tuple[str, str]] | None:
    """(id, reason) of the images that are not known, by place; None if one of them can be used."""
    places = [place for place, item in enumerate(source.items) if item.id not in known]
    found: dict[int, tuple[str, str]] = {}
    batches = load_batches(source, places, network.preprocess, 1, workers=0, on_error="skip")
    with closing(batches):
        for read in batches:
            batch, _ = embed(read, source, network.forward, "skip")
            if len(batch):
                return None
            found |= {place: (source.items[place].id, why) for place, why in batch.errors}
    return found


def check_addable(recipe: Recipe, encoding: Encoding, network: EmbeddingNetwork) -> bool:
    """Refuse additions that the index's encoding cannot take; whether its codes are dy/dz."""
    if recipe.sampling == "given" and recipe.resolved_target == "margin":
        raise InputError(
            "this index was built from given triplets, which say nothing about new images; build "
            "it again with all images and their triplets"
        )
    if not isinstance(encoding, LowRank) or encoding.origin != "head":
        return False
    matrix = network.head_kind.matrix
    if matrix is None or matrix.shape != encoding.fitted["basis"].shape:
        raise NetworkMismatch(
            "the index keeps weights in the matrix of an affine head behind average pooling, "
            f"{list(encoding.fitted['basis'].shape)}, and this network "
            f"{'has none' if matrix is None else f'has one of {list(matrix.shape)}'}; give the "
            "network that the index was built with, in the same precision"
        )
    return True


def check_new(index: Index, source: ImageSource) -> None:
    """Refuse ids that the index already has."""
    known = sorted(index.find_live(source.ids))
    if known:
        some = ", ".join(known[:3]) + (" ..." if len(known) > 3 else "")
        raise InputError(
            f"{len(known)} of {len(source)} images are in the index already ({some}); leave "
            "them out (--skip-existing), or remove them from the index first; where they are other "
            "pictures of the same names, a CSV with the columns path,label,id gives them other ids"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full or unwritable disk as one sentence; what is finished stays, and is used again."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmbedcamError) or error.errno not in _DISK_ERRORS:
            raise
        raise EmbedcamError(
            f"{error.filename or path}: cannot be written ({error.strerror}); see to the disk and "
            "run the same command again: it goes on where it stopped"
        ) from error
