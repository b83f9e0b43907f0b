"""Every change of an index: new files first, then one rename of the manifest, then the sweep."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

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
from . import faiss_files
from . import manifest as manifest_file
from .arrays import SUFFIXES, broken, open_checked, sha256_of, write_array
from .manifest import FolderEntry, Manifest, Wrong
from .parts import (
    Arrays,
    PartData,
    check_ids,
    parts_to_keep,
    write_fitted,
    write_part,
    write_rows,
)
from .reader import Index
from .rows import columns_of, make_layers
from .search import EmbeddingRows
from .verify import check_parts, check_tombstones

ADD_INSTEAD = "add images to the index it was compressed from, and compress that again"
_CHECKPOINT, _LOCK = ".building", ".lock"
_TRASH = re.compile(
    r"faiss-[0-9]+\.index(\.tmp)?|tombstones-[0-9]+\.u64(\.tmp)?|manifest\.json\.tmp"
)
_FOLDER = re.compile(r"[0-9]{6,12}(\.tmp)?")
_ARRAY = re.compile(rf"[a-z][a-z0-9_.]*\.({'|'.join(SUFFIXES.values())}|utf8)")
_PLACES = ("parts", "fitted")
_CALIBRATIONS = ("trust_calibration", "match_calibration")
_NEEDED = ("recipe", "embedding", "metric", "method", "target", "norm", "triplets", "layers")
_OPTIONAL = ("sign", "network", "images", "libraries", "fitted_on", "compressed", *_CALIBRATIONS)
# Per thread and task, so that a job which holds the lock can call `append` and the others, while a
# second thread is as busy as a second process.
_locked: ContextVar[frozenset[Path]] = ContextVar("embedcam_locked_indexes", default=frozenset())


def create(
    path: str | Path,
    header: Mapping[str, Any],
    fitted: Sequence[Arrays],
    shared: Arrays,
    part: PartData,
    *,
    factory: str | None = None,
    replace: bool = False,
) -> Path:
    """Write a new index.

    Parameters
    ----------
    path : a directory that is missing, empty, or holds an unfinished build.
    header : "recipe" (dict), "embedding" ({"width", "normalized"}), "metric", "method", "target",
        "norm", "triplets" (dict), "layers" (a list of dicts "name", "channels", "grid", "cells",
        "encoding" (`Encoding.spec()`), "coarse_grid"), and optionally "network" (dict or None),
        "images" (dict or None), "libraries" (dict of versions), "sign" ("margin"), "fitted_on"
        (else the part's rows) and "compressed" (dict, of an index of prototypes).
    fitted : for each layer, arrays kept once, by name (`Encoding.fitted`).
    shared : arrays kept once for the whole index, by name: "embedding_mean" and the like.
    part : the rows; memory maps are streamed.
    factory : FAISS factory string, "none" to leave searching to others; None takes the recipe's
        "faiss", and "Flat" where it has none.
    replace : swap a finished index that is there for this one; readers keep the old one.

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
        manifest = _first_manifest(header, generation, len(part), width)
        entries = manifest_file.layers_of(manifest)
        layers = make_layers(root, entries, [dict(one) for one in fitted], width)
        check_ids(part.ids)
        chosen = factory or str(manifest["recipe"].get("faiss", "Flat"))
        if chosen.lower() != "none":
            faiss_files.check_factory(chosen, width, len(part), manifest["metric"])
        manifest["fitted"] = write_fitted(root, generation, fitted, shared)
        columns = columns_of(width, manifest["embedding"]["normalized"], layers)
        manifest["parts"] = [write_part(root, generation, part, columns, layers)]
        _make_faiss(root, manifest, chosen)
        _commit(root, manifest)
    return root


def append(path: str | Path, part: PartData, *, removing: Sequence[str] = ()) -> int:
    """Add rows and return the position of the first; what the first build fitted stays as it is.

    Parameters
    ----------
    path : the index.
    part : the rows.
    removing : ids of images that are removed in the same step; the part may hold them anew.

    Raises
    ------
    InputError
        An id that the index already holds, or does not hold where it is to be removed; arrays that
        do not fit, or an index of prototypes; nothing changed.
    IndexFormatError
        A file that would be rewritten does not match its checksum; nothing changed.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
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
        check_parts(index, kept)
        rewritten = np.arange(int(index.starts[kept]), index.n_rows)
        entry = write_rows(root, manifest["generation"], index, rewritten, part)
        manifest["parts"] = [*manifest["parts"][:kept], entry]
        for key in ("rows", "live", "added_after_fit"):
            manifest["counts"][key] += len(part)
        if len(gone):
            _bury(root, index, manifest, gone)
        if index.manifest.faiss is not None:
            loaded, factory = _load_faiss(root, index.manifest), index.manifest.faiss.factory
            faiss_files.grow(loaded, _rows_to_be(root, manifest), index.n_rows, factory)
            manifest["faiss"] |= _save_faiss(root, manifest, loaded)
        _commit(root, manifest)
        return index.n_rows


def remove(path: str | Path, ids: Sequence[str]) -> int:
    """Mark images as removed and return how many; `compact` drops their bytes.

    Unknown or already removed ids are an `InputError`; nothing changed then.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        gone = np.unique(index.positions(ids))
        if len(gone):
            _bury(root, index, manifest, gone)
            _commit(root, manifest)
        return len(gone)


def compact(path: str | Path, *, rebuild_faiss: bool | str = False) -> int:
    """Rewrite the live rows as one part and return how many were dropped; ids stay as they are.

    `rebuild_faiss` also makes the FAISS file again in the same change; a factory string makes
    another one.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        dropped = index.n_rows - len(index)
        is_whole = not dropped and len(index.parts) == 1
        if is_whole and not rebuild_faiss:
            return 0
        factory = _asked_for(index, rebuild_faiss) if rebuild_faiss else ""
        kept = index.live_positions()
        if not is_whole:
            check_tombstones(index)
            check_parts(index)
            entry = write_rows(root, manifest["generation"], index, kept, None)
            fitted = int((kept < index.manifest.fit.rows).sum())
            manifest |= {"parts": [entry], "tombstones": None}
            manifest["fit"]["rows"] = fitted
            manifest["counts"] = _counts(len(kept), len(kept) - fitted)
        if rebuild_faiss:
            _make_faiss(root, manifest, factory)
        elif index.manifest.faiss is not None:
            loaded = _load_faiss(root, index.manifest)
            faiss_files.grow(loaded, EmbeddingRows(index, kept), 0, index.manifest.faiss.factory)
            manifest["faiss"] |= _save_faiss(root, manifest, loaded)
        _commit(root, manifest)
        return dropped


def put_calibrations(
    path: str | Path, made: Mapping[str, Mapping[str, Any] | None], of: str | None = None
) -> None:
    """Write calibrations by their keys in the manifest, and nothing else; None takes one out.

    `of` is the `manifest_sha256` of the version they were fitted to, which must still be in place.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        if of is not None and index.manifest.manifest_sha256 != of:
            raise InputError(
                f"{root}: the index changed while it was being calibrated, so nothing was written; "
                "run the command again"
            )
        manifest.update(made)
        _commit(root, manifest, always=True)


def rebuild_faiss(path: str | Path, factory: str | None = None) -> None:
    """Make the FAISS file again from the embeddings, training included; the old one is not loaded.

    `factory` is another factory string; "none" drops FAISS; None keeps the present one.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        _make_faiss(root, manifest, _asked_for(index, factory or True))
        _commit(root, manifest, always=True)


def sweep(path: str | Path) -> None:
    """Delete what a killed writer left behind; every other change does so as well."""
    manifest_file.read(Path(path))
    _in_place(Path(path))
    with _writing(Path(path)):
        pass


def check_target(path: str | Path, replace: bool = False) -> None:
    """Refuse a directory that `create` would refuse; a job asks before it begins."""
    root = Path(path)
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(f"{root}: not a directory; give a new one for the index")
    if not os.path.lexists(root / manifest_file.NAME):
        for name in _foreign(root):
            raise InputError(
                f"{root}: holds {name!r}, which is no part of an index; choose an empty or a new "
                "directory"
            )
    elif not replace:
        raise InputError(
            f"{root}: already holds a finished index; add to it, replace it, or choose another "
            "directory"
        )
    _in_place(root)


def _foreign(root: Path) -> Iterator[str]:
    """Yield what lies in an unfinished index and is none of its own: it would bar the sweep."""
    for entry in root.iterdir():
        if entry.name not in {_CHECKPOINT, _LOCK, *_PLACES} and not _TRASH.fullmatch(entry.name):
            yield entry.name
    for kind in _PLACES:
        place = root / kind
        for folder in place.iterdir() if place.is_dir() and not place.is_symlink() else ():
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir():
                yield f"{kind}/{folder.name}"
                continue
            for file in folder.iterdir():
                if not _ARRAY.fullmatch(file.name):
                    yield f"{kind}/{folder.name}/{file.name}"


# One writer at a time, and what each leaves behind


@contextlib.contextmanager
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


@contextlib.contextmanager
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
            with contextlib.suppress(EmbedcamError, OSError):
                # Not where the manifest changed: it may not have reached the disk.
                if (now := _in_place(root)) == before:
                    _sweep(root, now)
            raise
        _sweep(root, _in_place(root))


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[tuple[Index, dict[str, Any]]]:
    """Open an index for a change, with the manifest of its next generation as JSON has it."""
    # Refused before a lock file appears in it, or in some other directory.
    Index.open(root, with_faiss=False).close()
    _in_place(root)
    with lock(root), Index.open(root, with_faiss=False) as index, _writing(root):
        manifest = index.manifest.to_dict()
        manifest["generation"] += 1
        yield index, manifest


def _sweep(root: Path, manifest: Manifest | None) -> None:
    """Delete what no manifest names: leftovers of a killed writer, files of older generations."""
    named = [] if manifest is None else list(manifest.files)
    folders: list[FolderEntry] = [] if manifest is None else [manifest.fitted, *manifest.parts]
    kept = [folder.directory.split("/") for folder in folders]
    for kind in _PLACES:
        remove_folders(root, kind, _FOLDER, _ARRAY, {name for place, name in kept if place == kind})
    remove_files(root, _TRASH, named)


# Steps of a change; each writes its files and says so in the manifest to come


def _first_manifest(
    header: Mapping[str, Any], generation: int, rows: int, width: int
) -> dict[str, Any]:
    """Return the manifest of a first build, without its files."""
    missing = [key for key in _NEEDED if key not in header]
    unknown = sorted(set(header) - {*_NEEDED, *_OPTIONAL})
    if missing or unknown:
        known = sorted({*_NEEDED, *_OPTIONAL})
        raise InputError(
            f"the header lacks {missing} and has the unknown {unknown}; it takes {known}"
        )
    embedding = {"width": width, "normalized": header["embedding"].get("normalized")}
    if header["embedding"] != embedding or type(embedding["normalized"]) is not bool:
        raise InputError(
            f"the header says embedding = {header['embedding']}; expected the width {width} of the "
            "embeddings given, and normalized true or false"
        )
    present = [key for key in ("compressed", *_CALIBRATIONS) if header.get(key) is not None]
    chosen = {key: header.get(key) for key in (*_NEEDED, "network", "images", *present)}
    try:
        manifest: dict[str, Any] = json.loads(json.dumps(chosen, allow_nan=False))
        recipe_digest = manifest_file.digest(dict(header["recipe"]))
    except (TypeError, ValueError) as error:
        raise InputError(f"the header cannot be written as JSON ({error})") from error
    libraries = {"numpy": np.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        libraries["embedcam"] = metadata.version("embedcam")
    manifest |= {
        "recipe_sha256": recipe_digest,
        "format": manifest_file.FORMAT,
        "format_version": manifest_file.FORMAT_VERSION,
        "generation": generation,
        "sign": header.get("sign", "margin"),
        "libraries": {**libraries, **header.get("libraries", {})},
        "layers": [
            {"grid": None, "cells": None, "coarse_grid": None, **layer}
            for layer in manifest["layers"]
        ],
        "fit": {"images": int(header.get("fitted_on", rows)), "rows": rows},
        "counts": _counts(rows, 0),
        "parts": [],
        "tombstones": None,
        "faiss": None,
    }
    try:
        manifest_file.check_partly(manifest)
    except Wrong as wrong:
        raise InputError(f"the header's {wrong}; see index/README.md") from wrong
    return manifest


def _counts(rows: int, later: int) -> dict[str, int]:
    # Of an index without removed rows, `later` of them added after the fit.
    return {"rows": rows, "live": rows, "added_after_fit": later}


def _bury(root: Path, index: Index, manifest: dict[str, Any], gone: np.ndarray) -> None:
    """Write tombstones with live rows `gone` `[n]` among them."""
    check_tombstones(index)
    tombstones = np.union1d(np.asarray(index.tombstones, np.int64), gone).astype(np.uint64)
    name = f"tombstones-{manifest['generation']:06d}.u64"
    entry = write_array(root, f"{name}.tmp", tombstones, "uint64")
    replace_durably(root / f"{name}.tmp", root / name)
    manifest["tombstones"] = {"file": name, **entry}
    manifest["counts"]["live"] -= len(gone)
    manifest["counts"]["added_after_fit"] -= int((gone >= manifest["fit"]["rows"]).sum())


def _asked_for(index: Index, factory: bool | str) -> str:
    """Return the factory of a FAISS file that is made again; True is the one that it has."""
    if factory is not True:
        return str(factory)
    if index.manifest.faiss is None:
        raise InputError(f"{index.path}: built without FAISS; name a factory, such as 'Flat'")
    return index.manifest.faiss.factory


def _make_faiss(root: Path, manifest: dict[str, Any], factory: str) -> None:
    if factory.lower() == "none":
        manifest["faiss"] = None
        return
    rows = _rows_to_be(root, manifest)
    live = rows.index.live_positions()
    index, trained_on = faiss_files.build(factory, rows, manifest["metric"], live)
    search = faiss_files.search_settings(index)
    entry = {"factory": factory, "trained_on": trained_on, "search": search}
    manifest["faiss"] = entry | _save_faiss(root, manifest, index)


def _save_faiss(root: Path, manifest: dict[str, Any], index: Any) -> dict[str, Any]:
    return faiss_files.write_faiss(root, index, f"faiss-{manifest['generation']:06d}.index")


def _load_faiss(root: Path, manifest: Manifest) -> Any:
    try:
        with faiss_files.FaissFile(root, manifest) as file:
            return file.read(mapped=False)
    except FileNotFoundError as error:
        name = os.path.relpath(error.filename or root, root)
        raise IndexFormatError(f"{root / name}: is missing; {faiss_files.REBUILD}") from error


def _rows_to_be(root: Path, manifest: dict[str, Any]) -> EmbeddingRows:
    """Return the embeddings as they will be once the manifest is in place."""
    return EmbeddingRows(Index(root, manifest_file.check(root, manifest), with_faiss=False))


def _commit(root: Path, manifest: dict[str, Any], always: bool = False) -> None:
    # Where it says what the one in place says of the same bytes, nothing changes but with `always`:
    # a job that was killed when it was done runs again.
    before = None if always else _in_place(root)
    if (
        before is not None
        and _unnumbered(before.to_dict()) == _unnumbered(manifest)
        and all(_is_whole(root, name, entry) for name, entry in before.files.items())
    ):
        return
    sync_folder(root)
    manifest_file.write(root, manifest)


def _unnumbered(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says, without the numbers of generations."""
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    plain |= {"generation": 0, "manifest_sha256": None}
    for entry in (*plain["parts"], plain["fitted"]):
        del entry["directory"]
    for key in ("tombstones", "faiss"):
        if plain[key] is not None:
            del plain[key]["file"]
    return plain


def _is_whole(root: Path, name: str, entry: Any) -> bool:
    try:
        with open(open_checked(root, name, entry.bytes), "rb") as file:
            return sha256_of(file.fileno()) == str(entry.sha256)
    except (OSError, IndexFormatError):
        return False
