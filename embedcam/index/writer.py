"""Every change of an index: new files first, then one rename of the manifest, then the sweep."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._files import (
    NotPlain,
    held,
    is_folder,
    make_folder,
    remove_files,
    remove_folders,
    sync_folder,
)
from .._files import replace as replace_durably
from ..errors import EmbedcamError, IndexBusyError, IndexFormatError, InputError
from ..images.progress import SILENT, Stage
from . import faiss_build, faiss_files
from . import manifest as manifest_file
from .arrays import SUFFIXES, ArrayLike, Told, broken, open_checked, sha256_of, write_array
from .faiss_choice import enough_lists
from .manifest import FAISS_BLOCK, MOST_FAISS_BLOCKS, FaissFileEntry, FileEntry, Manifest
from .parts import Arrays, PartData, check_ids, parts_to_keep, write_fitted, write_rows
from .reader import Index, missing
from .records import Json, Wrong
from .rows import IndexRows, Layer, columns_of, make_layers
from .verify import check_files

if TYPE_CHECKING:
    import faiss

ADD_INSTEAD = "add images to the index it was compressed from, and compress that again"
_CHECKPOINT, _LOCK = ".building", ".lock"
_TRASH = re.compile(
    r"faiss-[0-9]+(\.[0-9]+)?\.index(\.tmp)?|tombstones-[0-9]+\.u64(\.tmp)?|manifest\.json\.tmp"
)
_FOLDER = re.compile(r"[0-9]{6,12}(\.tmp)?")
_ARRAY = re.compile(rf"[a-z][a-z0-9_.]*\.({'|'.join(SUFFIXES.values())}|utf8)")
_PLACES = ("parts", "fitted")
_OURS = re.compile(
    rf"\.building|\.lock|{_TRASH.pattern}|(parts|fitted)(/{_FOLDER.pattern}(/{_ARRAY.pattern})?)?"
)
_CALIBRATIONS = ("trust_calibration", "match_calibration")
_NEEDED = ("recipe", "embedding", "metric", "method", "target", "norm", "triplets", "layers")
_RARE = ("compressed", "run", *_CALIBRATIONS)
_OPTIONAL = ("sign", "network", "images", "libraries", "fitted_on", *_RARE)
# Per thread and task, so that a job which holds the lock can call `append` and the others, while a
# second thread is as busy as a second process.
_locked: ContextVar[frozenset[Path]] = ContextVar("embedcam_locked_indexes", default=frozenset())


def create(
    path: str | Path,
    header: Json,
    fitted: Sequence[Arrays],
    shared: Arrays,
    part: PartData,
    *,
    factory: str | None = None,
    replace: bool = False,
    stage: Stage = SILENT,
) -> Path:
    """Write a new index.

    Parameters
    ----------
    path : a directory that is missing, empty, or holds an unfinished build.
    header : "recipe" (dict), "embedding" ({"width", "normalized"}), "metric", "method", "target",
        "norm", "triplets" (dict), "layers" (a list of dicts "name", "channels", "grid", "cells",
        "encoding" (`Encoding.spec()`), "coarse_grid"), and optionally "network" (dict or None),
        "images" (dict or None), "libraries" (dict of versions), "sign" ("margin"), "fitted_on"
        (else the part's rows), "compressed" (dict, of an index of prototypes) and "run" (dict: how
        the network's forward passes were run).
    fitted : for each layer, arrays kept once, by name (`Encoding.fitted`).
    shared : arrays kept once for the whole index, by name: "embedding_mean" and the like.
    part : the rows; memory maps are streamed.
    factory : FAISS factory string, "auto", "none" to leave searching to others; None takes the
        recipe's "faiss", and "Flat" where it has none.
    replace : swap a finished index that is there for this one; readers keep the old one.
    stage : shows how far each stage is, as `progress_of` does.

    Raises
    ------
    InputError
        A directory that holds something else, or arrays that do not fit.
    IndexBusyError
        Another process writes to the index.
    """
    root = Path(path)
    check_target(root, replace)
    with _writing(root):
        check_target(root, replace)
        before = _in_place(root)
        generation = 1 if before is None else before.generation + 1
        width = part.embeddings.shape[-1]
        manifest, layers = _first_manifest(root, header, generation, len(part), width, fitted)
        check_ids(part.ids)
        chosen = factory or str(manifest["recipe"].get("faiss", "Flat"))
        if chosen.lower() != "none":
            faiss_build.check_factory(chosen, width, len(part), manifest["metric"])
        manifest["fitted"] = write_fitted(root, generation, fitted, shared)
        columns = columns_of(width, manifest["embedding"]["normalized"], layers)
        manifest["parts"] = [write_rows(root, generation, part, columns, stage=stage)]
        manifest["fit"]["rows"] = len(part)
        draft = _Draft(root, manifest, stage)
        draft.count()
        draft.make_faiss(chosen)
        draft.commit()
    return root


def append(
    path: str | Path, part: PartData, *, removing: Sequence[str] = (), stage: Stage = SILENT
) -> int:
    """Add rows and return the position of the first; what the first build fitted stays as it is.

    Parameters
    ----------
    path : the index.
    part : the rows.
    removing : ids of images that are removed in the same step; the part may hold them anew.
    stage : as for `create`.

    Raises
    ------
    InputError
        An id that the index already holds, or does not hold where it is to be removed; arrays that
        do not fit, or an index of prototypes; nothing changed.
    IndexFormatError
        A file that would be rewritten does not match its checksum; nothing changed.
    """
    root = Path(path)
    with _changing(root, stage) as (index, draft):
        index.refuse_prototypes(ADD_INSTEAD)
        check_ids(part.ids)
        gone = np.unique(index.positions(removing))
        if known := sorted(index.find_live(part.ids).keys() - set(removing)):
            some = ", ".join(map(repr, known[:3])) + (" ..." if len(known) > 3 else "")
            raise InputError(
                f"{len(known)} of {len(part)} ids are already in the index: {some}; remove them "
                "first, or leave them out"
            )
        kept = parts_to_keep(index, len(part))
        draft.join(index, kept, np.arange(index.starts[kept], index.n_rows), part)
        draft.bury(index, gone)
        draft.grow_faiss(index, index.n_rows)
        draft.commit()
        return index.n_rows


def remove(path: str | Path, ids: Sequence[str]) -> int:
    """Mark images as removed and return how many; `compact` drops their bytes.

    Unknown or already removed ids are an `InputError`; nothing changed then.
    """
    root = Path(path)
    with _changing(root) as (index, draft):
        gone = np.unique(index.positions(ids))
        if len(gone):
            draft.bury(index, gone)
            draft.commit()
        return len(gone)


def compact(path: str | Path, *, rebuild_faiss: bool | str = False, stage: Stage = SILENT) -> int:
    """Rewrite the live rows as one part and return how many were dropped; ids stay as they are.

    `rebuild_faiss` also makes the FAISS file again in the same change; a factory string makes
    another one. `stage` is as for `create`.
    """
    root = Path(path)
    with _changing(root, stage) as (index, draft):
        dropped = index.n_rows - len(index)
        is_whole = not dropped and len(index.parts) == 1
        if is_whole and not rebuild_faiss:
            return 0
        kept = index.live_positions()
        if not is_whole:
            check_files(index, "tombstones-")
            draft.join(index, 0, kept)
            draft.manifest["tombstones"] = None
            draft.manifest["fit"]["rows"] = int((kept < index.manifest.fit.rows).sum())
            draft.count()
        if rebuild_faiss:
            draft.make_faiss(None if rebuild_faiss is True else rebuild_faiss)
        else:
            draft.grow_faiss(index, 0)
        draft.commit()
        return dropped


def put_calibrations(
    path: str | Path, made: Mapping[str, Json | None], of: str | None = None
) -> None:
    """Write calibrations by their keys in the manifest, and nothing else; None takes one out.

    `of` is the `manifest_sha256` of the version they were fitted to, which must still be in place.
    """
    root = Path(path)
    with _changing(root) as (index, draft):
        if of is not None and index.manifest.manifest_sha256 != of:
            raise InputError(
                f"{root}: the index changed while it was being calibrated, so nothing was written; "
                "run the command again"
            )
        draft.manifest.update(made)
        draft.commit(always=True)


def rebuild_faiss(path: str | Path, factory: str | None = None) -> None:
    """Make the FAISS file again from the embeddings, training included; the old one is not loaded.

    `factory` is another factory string; "auto" chooses one anew; "none" drops FAISS; None keeps the
    present one, and how far it searches.
    """
    root = Path(path)
    with _changing(root) as (_, draft):
        draft.make_faiss(factory)
        draft.commit(always=True)


def sweep(path: str | Path) -> None:
    """Delete what a killed writer left behind; every other change does so as well."""
    with _changing(Path(path)):
        pass


def check_target(path: str | Path, replace: bool = False) -> None:
    """Refuse a directory that `create` would refuse; a job asks before it begins."""
    root = Path(path)
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(f"{root}: not a directory; give a new one for the index")
    if not os.path.lexists(root / manifest_file.NAME):
        # What the sweep would leave, or stumble over.
        places = [root / kind for kind in _PLACES if not (root / kind).is_symlink()]
        for path in chain(root.iterdir(), *(place.rglob("*") for place in places)):
            name = path.relative_to(root).as_posix()
            if not _OURS.fullmatch(name) or (_FOLDER.fullmatch(path.name) and not path.is_dir()):
                raise InputError(
                    f"{root}: holds {name!r}, which is no part of an index; choose an empty or a "
                    "new directory"
                )
    elif not replace:
        raise InputError(
            f"{root}: already holds a finished index; add to it, replace it, or choose another "
            "directory"
        )
    _in_place(root)


# One writer at a time, and what each leaves behind


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the writer's lock of an index, made where missing; nested uses in a thread are one.

    The kernel releases it when its holder dies; held by another process or thread it is an
    `IndexBusyError`.
    """
    path = Path(path)
    make_folder(path)
    root = path.resolve()
    before = _locked.get()
    if root in before:
        yield
        return
    busy = IndexBusyError(
        f"{path}: another process is writing to this index; wait until it is done"
    )
    with held(_open_lock(root), path, busy):
        _locked.set(before | {root})
        try:
            yield
        finally:
            _locked.set(before)


def _open_lock(root: Path) -> int:
    # Nothing is made through a link.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(root / _LOCK, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    what = "is no regular file, so it cannot be locked"
    raise broken(root, _LOCK, what, "delete it and run the same command again")


def _in_place(root: Path) -> Manifest | None:
    """Return the manifest in place, None of an unfinished index; refuse links where one writes."""
    for name in (*_PLACES, _CHECKPOINT):
        try:
            is_folder(root / name)
        except NotPlain as error:
            raise broken(root, name, str(error)) from error
    return manifest_file.read(root) if os.path.lexists(root / manifest_file.NAME) else None


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Hold the lock, and leave nothing behind that the manifest in place does not name."""
    with lock(root):
        before = _in_place(root)
        if before is not None:
            # A writer before may have seen its last sync fail, and left the generation before that
            # for the case that it comes back.
            sync_folder(root)
        _sweep(root, before)
        try:
            yield
        except BaseException:
            with suppress(EmbedcamError, OSError):
                # Not where the manifest changed: it may not have reached the disk.
                if (now := _in_place(root)) == before:
                    _sweep(root, now)
            raise
        _sweep(root, _in_place(root))


@contextmanager
def _changing(root: Path, stage: Stage = SILENT) -> Iterator[tuple[Index, "_Draft"]]:
    """Open an index for a change, with a draft of its next generation."""
    if root.is_file():
        raise InputError(
            f"{root}: is a file, as a model is, and holds no images; give the folder of the index"
        )
    # Refused before a lock file appears in it, or in some other directory.
    Index.open(root, with_faiss=False).close()
    _in_place(root)
    with lock(root), Index.open(root, with_faiss=False) as index, _writing(root):
        manifest = index.manifest.to_dict()
        yield index, _Draft(root, {**manifest, "generation": manifest["generation"] + 1}, stage)


def _sweep(root: Path, manifest: Manifest | None) -> None:
    """Delete what no manifest names: leftovers of a killed writer, files of older generations."""
    folders = [] if manifest is None else [manifest.fitted, *manifest.parts]
    for kind in _PLACES:
        kept = [folder.directory.removeprefix(f"{kind}/") for folder in folders]
        remove_folders(root, kind, _FOLDER, _ARRAY, kept)
    remove_files(root, _TRASH, {} if manifest is None else manifest.files)


# Steps of a change; each writes its files and says so in the manifest to come


def _first_manifest(
    root: Path,
    header: Json,
    generation: int,
    rows: int,
    width: int,
    fitted: Sequence[Arrays],
) -> tuple[Json, list[Layer]]:
    """Return the manifest of a first build, without its files, and its layers."""
    if unknown := sorted(set(header) - {*_NEEDED, *_OPTIONAL}):
        raise InputError(
            f"the header has the unknown {unknown}; it takes {sorted({*_NEEDED, *_OPTIONAL})}"
        )
    present = [key for key in _RARE if header.get(key) is not None]
    chosen = {key: header.get(key) for key in (*_NEEDED, "network", "images", *present)}
    try:
        manifest: Json = json.loads(json.dumps(chosen, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the header cannot be written as JSON ({error})") from error
    libraries = {"numpy": np.__version__}
    with suppress(metadata.PackageNotFoundError):
        libraries["embedcam"] = metadata.version("embedcam")
    nothing = {"grid": None, "cells": None, "coarse_grid": None}
    manifest |= {
        "recipe_sha256": manifest_file.digest(manifest["recipe"]),
        "format": manifest_file.FORMAT,
        "format_version": manifest_file.FORMAT_VERSION,
        "generation": generation,
        "sign": header.get("sign", "margin"),
        "libraries": {**libraries, **header.get("libraries", {})},
        "layers": [{**nothing, **layer} for layer in manifest["layers"]],
        "fit": {"images": int(header.get("fitted_on", rows)), "rows": 0},
        "counts": {"rows": 0, "live": 0, "added_after_fit": 0},
        "parts": [],
        "fitted": {"directory": f"fitted/{generation:06d}", "files": {}},
        "tombstones": None,
        "faiss": None,
    }
    try:
        checked = manifest_file.typed(manifest)
        if checked.embedding.width != width:
            what = f" is {checked.embedding.width}; expected the width {width} of the rows given"
            raise Wrong(what, "embedding", "width")
    except Wrong as wrong:
        raise InputError(f"the header's {wrong}; see index/README.md") from wrong
    return manifest, make_layers(root, checked.layers, [dict(one) for one in fitted], width)


class _Draft:
    """The manifest of a generation to be, as JSON has it, and the steps that write its files."""

    def __init__(self, root: Path, manifest: Json, stage: Stage) -> None:
        self.root, self.manifest, self.stage = root, manifest, stage
        self.number: int = manifest["generation"]

    def count(self, removed: Sequence[int] = ()) -> None:
        """Count the rows, of which those at the positions `removed` are no longer live."""
        rows = sum(part["count"] for part in self.manifest["parts"])
        later = rows - self.manifest["fit"]["rows"]
        later -= sum(row >= self.manifest["fit"]["rows"] for row in removed)
        counts = {"rows": rows, "live": rows - len(removed), "added_after_fit": later}
        self.manifest["counts"] = counts

    def bury(self, index: Index, gone: np.ndarray) -> None:
        """Write tombstones with live rows `gone` `[n]` among them, where there are any."""
        removed = np.asarray(index.tombstones, np.int64)
        if len(gone):
            check_files(index, "tombstones-")
            removed = np.union1d(removed, gone)
            name = f"tombstones-{self.number:06d}.u64"
            entry = write_array(self.root, f"{name}.tmp", removed, "uint64")
            replace_durably(self.root / f"{name}.tmp", self.root / name)
            self.manifest["tombstones"] = {"file": name, **entry}
        self.count(removed.tolist())

    def join(
        self, index: Index, kept: int, positions: np.ndarray, new: PartData | None = None
    ) -> None:
        """Write rows of an index and new ones as one part, behind the first `kept` ones."""
        check_files(index, *(f"{part.directory}/" for part in index.parts[kept:]))
        of = (self.root, self.number, new, index.columns, (index, positions))
        entry = write_rows(*of, self.stage)
        self.manifest["parts"][kept:] = [entry]

    def make_faiss(self, factory: str | None) -> None:
        """Make the FAISS files of the rows to be; None of the present kind, "none" drops it."""
        entry = self.manifest["faiss"]
        if factory is None and entry is None:
            raise InputError(f"{self.root}: built without FAISS; name a factory, such as 'Flat'")
        self.manifest["faiss"] = None
        if factory is not None and factory.lower() == "none":
            return
        rows = self._rows()
        live, metric = rows.index.live_positions(), rows.index.metric
        auto = factory is not None and factory.lower() == faiss_build.AUTO
        chosen = faiss_build.choose(factory or str(entry["factory"]), len(live))
        if not faiss_build.is_flat(chosen, rows.shape[1], len(live), metric):
            with self.stage("train", 0):
                made, trained_on = faiss_build.train(chosen, rows, metric, live, auto)
            # What was chosen for these images, or set by hand, is kept where the kind is.
            search = entry["search"] if factory is None else faiss_build.search_settings(made)
            told = {"factory": chosen, "trained_on": trained_on, "search": search}
            self._save(told, made, rows)
            nprobe = self._enough_lists(rows) if auto else None
            if not auto or nprobe is not None:
                self.manifest["faiss"]["search"] = search | ({"nprobe": nprobe} if auto else {})
                return
            chosen = "Flat"  # these embeddings are not to be told apart by 8 bits a dimension
        self._save_flat({"factory": chosen, "trained_on": 0, "search": {}}, rows)

    def _enough_lists(self, rows: IndexRows) -> int | None:
        manifest = manifest_file.check(self.root, self.manifest)
        assert manifest.faiss is not None
        with (
            closing(faiss_files.FaissFile(self.root, manifest, manifest.faiss)) as file,
            self.stage("lists", rows.shape[0]) as progressed,
        ):
            return enough_lists(file.joined(), rows, manifest.metric, progressed)

    def grow_faiss(self, index: Index, start: int) -> None:
        """Add the rows to be from `start` on to the FAISS files, where there are any.

        From 0 on all are written anew. Else those that are full stay, and the last grows.
        """
        entry = index.manifest.faiss
        if entry is not None:
            kept, rows = self.manifest["faiss"], self._rows()
            try:
                with closing(faiss_files.FaissFile(self.root, index.manifest, entry)) as first:
                    files = [first, *first.more]
                    last = files[-1] if start else first
                    told = [{**kept, "rows": first.rows}, *kept.get("more", ())] if start else []
                    if first.is_flat():
                        self._save_flat(kept, rows, told, last if start else None)
                        return
                    loaded = last.read(mapped=False)
            except FileNotFoundError as error:
                raise missing(self.root, index.manifest, error) from error
            if not start:
                loaded.reset()
            self._save(kept, loaded, rows, told)

    def _save(
        self, entry: Json, made: "faiss.Index", rows: IndexRows, files: Sequence[Json] = ()
    ) -> None:
        """Write what `made`, the last of the `files` where there are any, grows to."""

        def write(rows: ArrayLike, name: str, start: int, stop: int, grown: int) -> Json:
            if made.ntotal and not grown:
                made.reset()
            faiss_build.add(made, rows, start + made.ntotal, stop, factory=str(entry["factory"]))
            return faiss_files.write_faiss(self.root, made, name)

        files = files if faiss_build.can_grow(made) else ()  # else it is the one there is
        self._write_faiss(entry, files, rows, faiss_build.rows_a_file(made), write)

    def _save_flat(
        self,
        entry: Json,
        rows: IndexRows,
        files: Sequence[Json] = (),
        last: faiss_files.FaissFile | None = None,
    ) -> None:
        """Write Flat files, of which the `last` of those there are grows."""
        metric = rows.index.metric

        def write(rows: ArrayLike, name: str, start: int, stop: int, grown: int) -> Json:
            of = (self.root, name, rows, metric, last if grown else None)
            return faiss_files.write_flat(*of, start + grown, stop)

        each = max(1, faiss_build.MOST_BYTES // (4 * rows.shape[1]))
        self._write_faiss(entry, files, rows, each, write)

    def _write_faiss(
        self,
        entry: Json,
        files: Sequence[Json],
        rows: ArrayLike,
        each: int,
        write: Callable[[ArrayLike, str, int, int, int], Json],
    ) -> None:
        """Write search files of `each` rows, behind those that are full, and enter them all.

        `write` gets the rows, a name, their start and stop, and how many the last file holds.
        """
        total, kept, grown = rows.shape[0], list(files), 0
        if kept and (kept[-1]["rows"] < each or len(kept) == manifest_file.MOST_FAISS_FILES):
            grown = kept.pop()["rows"]
        start = sum(one["rows"] for one in kept)
        with self.stage("faiss", total - start - grown) as progressed:
            told = Told(rows, progressed)
            while start < total or not kept:
                most = max(each, grown)
                if len(kept) == manifest_file.MOST_FAISS_FILES - 1:
                    most = total
                stop, further = min(total, start + most), f".{len(kept):04d}" if kept else ""
                name = f"faiss-{self.number:06d}{further}.index"
                kept.append({**write(told, name, start, stop, grown), "rows": stop - start})
                start, grown = stop, 0
        if sum(one["bytes"] for one in kept) > FAISS_BLOCK * MOST_FAISS_BLOCKS:
            kept = [{**one, "blocks": None} for one in kept]
        first, *more = kept
        whole = {key: one for key, one in (entry | first).items() if key not in ("rows", "more")}
        self.manifest["faiss"] = whole | ({"more": more} if more else {})

    def _rows(self) -> IndexRows:
        """Return the embeddings as they will be once the manifest is in place."""
        manifest = manifest_file.check(self.root, {**self.manifest, "faiss": None})
        return IndexRows(Index(self.root, manifest, with_faiss=False))

    def commit(self, always: bool = False) -> None:
        """Put the manifest in place."""
        # Where it says what the one in place says of the same bytes, nothing changes but with
        # `always`: a job that was killed when it was done runs again.
        before = None if always else _in_place(self.root)
        if (
            before is not None
            and _unnumbered(before.raw) == _unnumbered(self.manifest)
            and all(_is_whole(self.root, name, entry) for name, entry in before.files.items())
        ):
            return
        sync_folder(self.root)
        manifest_file.write(self.root, self.manifest)


def _unnumbered(manifest: Json) -> Json:
    """Return what a manifest says, without the numbers of generations."""
    plain: Json = json.loads(json.dumps(manifest))
    plain |= {"generation": 0, "manifest_sha256": None}
    for entry in (
        *plain["parts"],
        plain["fitted"],
        plain["tombstones"] or {},
        plain["faiss"] or {},
        *(plain["faiss"] or {}).get("more", ()),
    ):
        entry |= {"directory": None, "file": None}
    return plain


def _is_whole(root: Path, name: str, entry: FileEntry | FaissFileEntry) -> bool:
    try:
        with open(open_checked(root, name, entry.bytes), "rb") as file:
            return sha256_of(file.fileno()) == entry.sha256
    except (OSError, IndexFormatError):
        return False
