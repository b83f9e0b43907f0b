"""One version of an index as requests see it: read once by each request, never changed."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Self

import numpy as np

from .._files import compute_on_one_thread
from ..errors import EmbedcamError, InputError
from ..images import as_root
from ..index import Index, Manifest
from ..index.in_memory import Rows, index_of_rows
from ..preprocess import Network
from .drawing import may_follow

SHARED = {"discriminant": "one answer", "distinctive": "most of their answer"}
"""What the images of a label share, by targets that hold labels against each other."""
_LOG = logging.getLogger("embedcam")


class Snapshot:
    """An open index with the network it was built with.

    `layers`, `channels` and `encodings` are deepest first, `calibrations` of trust and `matches` by
    "one" and "several" neighbors; `place` is where the next version is looked for.
    """

    def __init__(
        self,
        index: Index,
        network: Network | None,
        images: str | Path | None,
        before: Snapshot | None = None,
        *,
        owned: bool = True,
    ) -> None:
        manifest = index.manifest
        self.index, self.owned, self.process = index, owned, os.getpid()
        self.place = Path(os.path.abspath(index.path))
        self._opened_with = network, images
        self.network: Network | None = None
        if before is not None and _same_network(index, before.index):
            self.network = before.network
        elif network is not None:
            if not isinstance(network, Network):
                raise InputError(
                    f"network is a {type(network).__name__}; expected an EmbeddingNetwork: wrap it "
                    "as EmbeddingNetwork(module, layer, preprocess=...)"
                )
            if (stored := index.identity) is None:
                raise InputError(
                    "this index was built from features alone and does not know its network, so a "
                    "network cannot be checked against it; use explain_features, or build it again "
                    "naming the network"
                )
            self.network = network.for_index(stored, manifest.layer_names)
        folder = images or manifest.images_root
        self.root, self.only_below = as_root(folder or ""), images is not None
        self.prefix = str(self.root) if folder else ""
        self.layers = tuple(manifest.layer_names)
        self.channels = tuple(layer.channels for layer in manifest.layers)
        self.encodings = tuple(index.encoding(number) for number in range(len(self.layers)))
        self.calibrations = manifest.trust_calibration or {}
        self.matches = manifest.match_calibration or {}
        self.marked, self.prototypes = index.marked, manifest.is_compressed
        self.shared = shared_of(manifest)
        self.refused_sizes: set[tuple[int, ...]] = set()
        self.preprocess = None if manifest.network is None else manifest.network.preprocess
        if self.network is not None and self.network.preprocess is not None:
            self.preprocess = self.network.preprocess
        unmarked = not self.marked and (before is None or before.marked)
        # Of pictures at addresses none are kept.
        local = not isinstance(self.root, str)
        if unmarked and local and any(index.select(index.live_positions()[:1]).paths):
            _LOG.warning(
                "%s keeps no marks of its images' files, so whether a picture was replaced since "
                "the build cannot be told; `embedcam build --refit` adds them",
                index.path,
            )
        if before is None and manifest.has_earlier_trust:
            _LOG.warning(
                "%s holds a calibration of trust by an earlier definition, which is not read; "
                "`embedcam calibrate %s` makes it again, without building the index",
                *[index.path] * 2,
            )

    @classmethod
    def open(
        cls,
        index: Index | str | Path,
        network: Network | None,
        images: str | Path | None,
        before: Snapshot | None = None,
        n_threads: int | None = None,
    ) -> Self:
        """Open an index; one that is open already stays the caller's to close."""
        if isinstance(index, Index):
            return cls(index, network, images, owned=False)
        with_faiss = before is None or before.index.with_faiss
        opened = Index.open(index, with_faiss=with_faiss, n_threads=n_threads)
        try:
            return cls(opened, network, images, before)
        except BaseException:
            opened.close()
            raise

    def next(self, *, verify: bool = False) -> Self | None:
        """Open the version that lies at the same place now; None where it is this one.

        Its FAISS file is loaded, so that a broken one is refused and no request waits for it.
        """
        after = self.open(self.place, *self._opened_with, self, self.index.n_threads)
        try:
            if after.index.manifest.manifest_sha256 == self.index.manifest.manifest_sha256:
                after.index.close()
                return None
            after.index.load()
            if verify:
                after.index.verify()
        except BaseException:
            after.index.close()
            raise
        return after

    def with_rows(self, rows: Rows, wanted: int | None = None) -> Self:
        """Return the same of these rows, and of no others; they are all where fewer than wanted."""
        kept = object.__new__(type(self))
        vars(kept).update(vars(self))
        kept.index = index_of_rows(self.index, rows)
        kept.index.is_whole = wanted is not None and len(kept.index) < wanted
        kept.owned, kept.marked = False, kept.index.marked
        return kept

    def in_child(self) -> Self:
        """Open the files again in a forked child, with one thread for torch and FAISS.

        What cannot be opened again is served as it was: its files are still mapped.
        """
        compute_on_one_thread()
        try:
            if self.index.in_memory:
                raise InputError("rows of a store are in memory")
            return self.open(self.place, *self._opened_with, self, n_threads=1)
        except EmbedcamError as error:
            _LOG.warning("in a forked child the version of the parent is served on: %s", error)
            kept = copy.copy(self)
            kept.process = os.getpid()
            return kept

    def follows(self, path: str) -> bool:
        """Return whether such a file may be read, see `may_follow`."""
        return may_follow(path, self.root, self.only_below)

    def refuse_by_position(self) -> None:
        """Refuse a finer map where weights belong to positions of the network's own input size."""
        if any(encoding.grid is not None for encoding in self.encodings):
            raise InputError(
                "this index keeps weights by position, which a query shown larger does not have; "
                "leave out detail (--detail), or use an index of weights by channel, such as of "
                "'gradcam'"
            )


def shared_of(manifest: Manifest) -> str | None:
    """Return what of their weights the images of a label share; None where it is little."""
    return SHARED.get(manifest.target) if manifest.near_share is None else None


def _same_network(index: Index, before: Index) -> bool:
    """Return whether two versions name one network, which was checked against the one before."""
    now, then = index.probe(), before.probe()
    return (
        index.manifest.network == before.manifest.network
        and now.keys() == then.keys()
        and all(np.array_equal(now[name], then[name]) for name in now)
    )
