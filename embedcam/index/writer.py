"""Every change of an index: new files first, then one rename of the manifest, then the sweep."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._files import NotPlain, is_folder, remove_files, remove_folders, sync_folder
from .._files import replace as replace_durably
from ..errors import EmbedcamError, IndexFormatError, InputError
from . import faiss_files, locking
from . import manifest as manifest_file
from .files import SUFFIXES, broken, open_checked, sha256_of, write_array
from .header import Arrays, counts, new_manifest, plain, write_fitted
from .joining import check_parts, check_tombstones, join_rows, parts_to_keep
from .layout import make_layers
from .manifest import PlainManifest as Manifest
from .parts import PartData, check_ids, write_part
from .query import EmbeddingRows
from .reader import Index

SCRATCH = ".building"
ADD_INSTEAD = "add images to the index it was compressed from, and compress that again"
_TRASH = re.compile(
    r"faiss-[0-9]+\.index(\.tmp)?|tombstones-[0-9]+\.u64(\.tmp)?|manifest\.json\.tmp"
)
_FOLDER = re.compile(r"[0-9]{6,12}(\.tmp)?")
_ARRAY = re.compile(rf"[a-z][a-z0-9_.]*\.({'|'.join(SUFFIXES.values())}|utf8)")
_PLACES = ("parts", "fitted")


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

    Args:
        path: a directory that is missing, empty, or holds an unfinished build.
        header: "recipe" (dict), "embedding" ({"width", "normalized"}), "metric", "method",
            "target", "norm", "triplets" (dict), "layers" (a list of dicts "name", "channels",
            "grid", "cells", "encoding" (`Encoding.spec()`), "coarse_grid"), and optionally
            "network" (dict or None), "images" (dict or None), "libraries" (dict of versions),
            "sign" ("margin"), "fitted_on" (else the part's rows) and "compressed" (dict, of an
            index of prototypes).
        fitted: for each layer, arrays kept once, by name (`Encoding.fitted`).
        shared: arrays kept once for the whole index, by name: "embedding_mean", "probe_embedding",
            "probe_pooled" and the like.
        part: the rows; memory maps are streamed.
        factory: FAISS factory string, "none" to leave searching to others; None takes the recipe's
            "faiss", and "Flat" where it has none.
        replace: swap a finished index that is there for this one; readers keep the old one.

    Raises:
        InputError: a directory that holds something else, or arrays that do not fit.
        IndexBusyError: another process writes to the index.
    """
    root = Path(path)
    check_target(root, replace)
    with _writing(root):
        check_target(root, replace)
        before = _in_place(root)
        generation = 1 if before is None else before["generation"] + 1
        manifest = new_manifest(header, generation, len(part), part.embeddings.shape[-1])
        layers = make_layers(root, manifest, [dict(f) for f in fitted])
        check_ids(part.ids)
        chosen = _factory(factory or str(manifest["recipe"].get("faiss", "Flat")))
        if chosen is not None:
            faiss_files.check_factory(
                chosen, manifest["embedding"]["width"], len(part), manifest["metric"]
            )
        manifest["fitted"] = write_fitted(root, generation, fitted, shared)
        entry = write_part(root, generation, part, *_shape_of(manifest), layers)
        manifest["parts"] = [entry]
        if chosen is not None:
            manifest["faiss"] = _fresh_faiss(root, manifest, chosen)
        _commit(root, manifest)
    return root


def append(path: str | Path, part: PartData, *, removing: Sequence[str] = ()) -> int:
    """Add rows; what the first build fitted stays as it is.

    Args:
        path: the index.
        part: the rows.
        removing: ids of images that are removed in the same step; the part may hold them anew.

    Returns:
        Position of the first new row.

    Raises:
        InputError: an id that the index already holds, or does not hold where it is to be removed;
            arrays that do not fit, or an index of prototypes; nothing changed.
        IndexFormatError: a file that would be rewritten does not match its checksum; nothing
            changed.
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
        first = int(index.starts[kept])
        joined = join_rows(index, np.arange(first, index.n_rows), part)
        entry = write_part(root, manifest["generation"], joined, *_shape_of(manifest), index.layers)
        manifest["parts"] = [*manifest["parts"][:kept], entry]
        for key in ("rows", "live", "added_after_fit"):
            manifest["counts"][key] += len(part)
        if len(gone):
            _bury(root, index, manifest, gone)
        if manifest["faiss"] is not None:
            loaded = _load_faiss(root, index.manifest.raw)
            rows = EmbeddingRows(_reopened(root, manifest))
            faiss_files.grow(loaded, rows, index.n_rows, manifest["faiss"]["factory"])
            manifest["faiss"] |= _save_faiss(root, manifest, loaded)
        _commit(root, manifest)
        return index.n_rows


def remove(path: str | Path, ids: Sequence[str]) -> int:
    """Mark images as removed; they are never returned again, and `compact` drops their bytes.

    Returns:
        How many were removed.

    Raises:
        InputError: an id that is unknown or already removed; nothing changed.
        IndexFormatError: the tombstones do not match their checksum; nothing changed.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        gone = np.unique(index.positions(ids))
        if not len(gone):
            return 0
        _bury(root, index, manifest, gone)
        _commit(root, manifest)
        return len(gone)


def compact(path: str | Path, *, rebuild_faiss: bool | str = False) -> int:
    """Rewrite the live rows as one part; positions change, ids do not.

    Args:
        path: the index.
        rebuild_faiss: True also makes the FAISS file again, as `rebuild_faiss`, in the same change;
            a factory string makes another one.

    Returns:
        How many rows were dropped.

    Raises:
        IndexFormatError: a file does not match its checksum; nothing changed.
        InputError: FAISS is to be made again where there is none; nothing changed.
    """
    root = Path(path)
    with _changing(root) as (index, manifest):
        dropped = index.n_rows - len(index)
        whole = not dropped and len(index.parts) == 1
        if whole and not rebuild_faiss:
            return 0
        factory = _asked_for(root, manifest, rebuild_faiss) if rebuild_faiss else None
        kept = index.live_positions()
        if not whole:
            _rewrite(root, index, manifest, kept)
        if rebuild_faiss:
            _put_faiss(root, manifest, factory)
        elif manifest["faiss"] is not None:
            loaded = _load_faiss(root, index.manifest.raw)
            rows = EmbeddingRows(index, kept)
            faiss_files.refill(loaded, rows, manifest["faiss"]["factory"])
            manifest["faiss"] |= _save_faiss(root, manifest, loaded)
        _commit(root, manifest)
        return dropped


def put_calibrations(
    path: str | Path, made: Mapping[str, Mapping[str, Any] | None], of: str | None = None
) -> None:
    """Write calibrations by their keys in the manifest; None takes one out.

    Nothing else is changed, and no file but the manifest is written.

    Args:
        path: of the index.
        made: calibrations by key.
        of: `manifest_sha256` of the version they were fitted to; None does not ask.

    Raises:
        InputError: the index is another version now.
    """
    root = Path(path)
    with _changing(root) as (_, manifest):
        if of is not None and manifest["manifest_sha256"] != of:
            raise InputError(
                f"{root}: the index changed while it was being calibrated, so nothing was written; "
                "run the command again"
            )
        manifest.update(made)
        _commit(root, manifest, always=True)


def rebuild_faiss(path: str | Path, factory: str | None = None) -> None:
    """Make the FAISS file again from the embeddings, training included; the old one is not loaded.

    Args:
        path: the index.
        factory: another factory string; "none" drops FAISS; None keeps the present one.
    """
    root = Path(path)
    with _changing(root) as (_, manifest):
        _put_faiss(root, manifest, _asked_for(root, manifest, factory or True))
        _commit(root, manifest, always=True)


def sweep(path: str | Path) -> None:
    """Delete what a killed writer left behind; every other change does so as well."""
    root = Path(path)
    manifest_file.read(root)
    _in_place(root)
    with _writing(root):
        pass


# Steps


def check_target(path: str | Path, replace: bool = False) -> None:
    """Refuse a directory that `create` would refuse; a job asks before it begins.

    Raises:
        InputError: not a directory, one that holds something else than an index, or, unless it is
            to be replaced, a finished index.
        IndexFormatError: an index that is to be replaced and is none, or holds links.
    """
    root = Path(path)
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(f"{root}: not a directory; give a new one for the index")
    if _finished(root):
        if not replace:
            raise InputError(
                f"{root}: already holds a finished index; add to it, replace it, or choose another "
                "directory"
            )
        _in_place(root)
        return
    for name in _strangers(root):
        raise InputError(
            f"{root}: holds {name!r}, which is no part of an index; choose an empty or a new "
            "directory"
        )
    _in_place(root)


def _strangers(root: Path) -> Iterator[str]:
    """What lies in an unfinished index and is none of its own: it would be in the sweep's way."""
    for entry in root.iterdir():
        if entry.name not in {SCRATCH, locking.NAME, *_PLACES} and not _TRASH.fullmatch(entry.name):
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


def _finished(root: Path) -> bool:
    return os.path.lexists(root / manifest_file.NAME)


def _in_place(root: Path) -> Manifest | None:
    """The manifest in place, None of an unfinished index; refuses links where a writer writes."""
    for name in (*_PLACES, SCRATCH):
        try:
            is_folder(root / name)
        except NotPlain as error:
            raise broken(root, name, str(error)) from error
    return manifest_file.read(root).to_dict() if _finished(root) else None


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Hold the lock, and leave nothing behind that the manifest in place does not name."""
    with locking.lock(root):
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
def _changing(root: Path) -> Iterator[tuple[Index, Manifest]]:
    """An index opened for a change, and the manifest of its next generation."""
    # Refused before a lock file appears in it, or in some other directory.
    Index.open(root, with_faiss=False).close()
    _in_place(root)
    with locking.lock(root), Index.open(root, with_faiss=False) as index, _writing(root):
        manifest = index.manifest.to_dict()
        manifest["generation"] += 1
        yield index, manifest


def _sweep(root: Path, manifest: Manifest | None) -> None:
    """Delete what no manifest names: leftovers of a killed writer, files of older generations."""
    named = set()
    if manifest is not None:
        named = {manifest["fitted"]["directory"], *(p["directory"] for p in manifest["parts"])}
        for key in ("tombstones", "faiss"):
            if manifest[key] is not None:
                named.add(manifest[key]["file"])
    for kind in _PLACES:
        kept = {name.rpartition("/")[2] for name in named if name.startswith(f"{kind}/")}
        remove_folders(root, kind, _FOLDER, _ARRAY, kept)
    remove_files(root, _TRASH, named)


def _bury(root: Path, index: Index, manifest: Manifest, gone: np.ndarray) -> None:
    """Write tombstones with live rows `gone` `[n]` among them, for the manifest of the change."""
    check_tombstones(index)
    tombstones = np.union1d(np.asarray(index.tombstones, np.int64), gone).astype(np.uint64)
    name = f"tombstones-{manifest['generation']:06d}.u64"
    entry = write_array(root, f"{name}.tmp", tombstones, "uint64")
    replace_durably(root / f"{name}.tmp", root / name)
    manifest["tombstones"] = {"file": name, **entry}
    manifest["counts"]["live"] -= len(gone)
    manifest["counts"]["added_after_fit"] -= int((gone >= manifest["fit"]["rows"]).sum())


def _commit(root: Path, manifest: Manifest, always: bool = False) -> None:
    """Put a manifest in place, unless it says what the one in place says of the same bytes.

    So a job that was killed when it was done, and runs again, changes nothing. Told `always`, a new
    generation is made of the same bytes, too.
    """
    before = None if always else _in_place(root)
    if before is not None and _unnumbered(before) == _unnumbered(manifest) and _whole(root, before):
        return
    sync_folder(root)
    manifest_file.write(root, manifest)


def _unnumbered(manifest: Manifest) -> Manifest:
    """What a manifest says, without the numbers of generations."""
    said = plain(manifest) | {"generation": 0, "manifest_sha256": None}
    for entry in (*said["parts"], said["fitted"]):
        del entry["directory"]
    for key in ("tombstones", "faiss"):
        if said[key] is not None:
            del said[key]["file"]
    return said


def _whole(root: Path, manifest: Manifest) -> bool:
    """Whether every file that a manifest names has its checksum."""
    named = {
        f"{group['directory']}/{name}": entry
        for group in (*manifest["parts"], manifest["fitted"])
        for name, entry in group["files"].items()
    }
    for key in ("tombstones", "faiss"):
        if manifest[key] is not None:
            named[manifest[key]["file"]] = manifest[key]
    for name, entry in named.items():
        try:
            descriptor = open_checked(root, name, entry["bytes"])
        except (OSError, IndexFormatError):
            return False
        try:
            if sha256_of(descriptor) != entry["sha256"]:
                return False
        finally:
            os.close(descriptor)
    return True


def _rewrite(root: Path, index: Index, manifest: Manifest, kept: np.ndarray) -> None:
    """Write the kept rows as one part, and say so in the manifest."""
    check_tombstones(index)
    check_parts(index)
    joined = join_rows(index, kept, None)
    entry = write_part(root, manifest["generation"], joined, *_shape_of(manifest), index.layers)
    manifest["parts"], manifest["tombstones"] = [entry], None
    seen = int((kept < manifest["fit"]["rows"]).sum())
    manifest["fit"]["rows"] = seen
    manifest["counts"] = counts(len(kept), len(kept) - seen)


def _shape_of(manifest: Manifest) -> tuple[int, bool]:
    return manifest["embedding"]["width"], manifest["embedding"]["normalized"]


def _factory(factory: str) -> str | None:
    return None if factory.lower() == "none" else factory


def _asked_for(root: Path, manifest: Manifest, factory: bool | str) -> str | None:
    """The factory of a FAISS file that is made again; True is the one that it has."""
    if factory is not True:
        return _factory(str(factory))
    if manifest["faiss"] is None:
        raise InputError(f"{root}: built without FAISS; name a factory, such as 'Flat'")
    return str(manifest["faiss"]["factory"])


def _put_faiss(root: Path, manifest: Manifest, factory: str | None) -> None:
    manifest["faiss"] = None if factory is None else _fresh_faiss(root, manifest, factory)


def _fresh_faiss(root: Path, manifest: Manifest, factory: str) -> dict[str, Any]:
    rows = _reopened(root, manifest)
    index, trained_on = faiss_files.build(
        factory, EmbeddingRows(rows), manifest["metric"], rows.live_positions()
    )
    return {
        "factory": factory,
        "trained_on": trained_on,
        "search": faiss_files.search_settings(index),
        **_save_faiss(root, manifest, index),
    }


def _save_faiss(root: Path, manifest: Manifest, index: Any) -> dict[str, Any]:
    import faiss

    name = f"faiss-{manifest['generation']:06d}.index"
    return {**faiss_files.write_faiss(root, index, name), "version": faiss.__version__}


def _load_faiss(root: Path, manifest: Manifest) -> Any:
    try:
        descriptor = faiss_files.open_faiss(root, manifest)
    except FileNotFoundError as error:
        name = manifest["faiss"]["file"]
        raise IndexFormatError(f"{root / name}: is missing; {faiss_files.REBUILD}") from error
    try:
        # Not mapped: FAISS aborts the process where a mapped index is added to.
        return faiss_files.load_faiss(root, manifest, descriptor, mapped=False)
    finally:
        os.close(descriptor)


def _reopened(root: Path, manifest: Manifest) -> Index:
    """Rows as they will be once the manifest is in place."""
    return Index(root, manifest_file.check(root, manifest), with_faiss=False)
