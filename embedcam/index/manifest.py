"""manifest.json: read with suspicion, checked against the format, written canonically."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import NotPlain, fresh, read_regular, replace
from ..calibration import Calibration
from ..errors import IndexFormatError, InputError
from .files import broken, check_entry, is_plain_name, is_sha256

NAME = "manifest.json"
FORMAT = "embedcam-index"
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
MAX_COARSE_CELLS = 64
METRICS = ("l2", "ip")
_DIRECTORY = {kind: re.compile(rf"{kind}/[0-9]{{6,12}}") for kind in ("parts", "fitted")}
_PIECES = re.compile(r"(parts|fitted|\.building|\.lock|faiss-.*|tombstones-.*|manifest\.json\.tmp)")
Manifest = dict[str, Any]


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: the form that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> Manifest:
    """The manifest with `manifest_sha256` over everything else."""
    rest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return {**rest, "manifest_sha256": digest(rest)}


def write(root: Path, manifest: Mapping[str, Any]) -> None:
    """Put a manifest in place by one durable rename."""
    text = json.dumps(sealed(manifest), sort_keys=True, indent=1, allow_nan=False) + "\n"
    unfinished = root / f"{NAME}.tmp"
    with fresh(unfinished) as file:
        file.write(text.encode("ascii"))
    replace(unfinished, root / NAME)


def read(root: Path) -> Manifest:
    """The manifest of an index, checked; no other file is touched.

    Raises:
        IndexFormatError: no index, an unfinished one, or a manifest that cannot be believed.
    """
    manifest = _parse(root, _read_bytes(root))
    if manifest.get("format") != FORMAT:
        raise broken(root, NAME, f"its format is {manifest.get('format')!r}, not {FORMAT!r}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        newer = type(version) is int and version > FORMAT_VERSION
        remedy = "install a newer embedcam" if newer else "build the index again"
        what = f"has format version {version!r}, and this embedcam reads {FORMAT_VERSION}"
        raise broken(root, NAME, what, remedy)
    if manifest != sealed(manifest):
        raise broken(root, NAME, "does not match its own checksum, so it was altered")
    _check(root, manifest)
    return manifest


def named_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of all files that a manifest names; its own are not among them."""
    entries = [entry for part in manifest["parts"] for entry in part["files"].values()]
    entries += manifest["fitted"]["files"].values()
    entries += [entry for key in ("faiss", "tombstones") if (entry := manifest[key]) is not None]
    return sum(entry["bytes"] for entry in entries)


def refuse_prototypes(root: Path, manifest: Mapping[str, Any], instead: str) -> None:
    """Refuse what needs the images themselves where rows are prototypes merged from several.

    Args:
        root: of the index.
        manifest: its manifest.
        instead: what to do, as the end of a sentence.

    Raises:
        InputError: the index holds prototypes.
    """
    if manifest.get("compressed") is not None:
        raise InputError(f"{root}: holds prototypes, each merged from several images; {instead}")


def _read_bytes(root: Path) -> bytes:
    try:
        return read_regular(root, NAME, MAX_BYTES)
    except NotPlain as error:
        raise broken(root, NAME, str(error)) from error
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(root) from None
    except OSError as error:
        raise broken(root, NAME, f"cannot be read ({error.strerror})") from error


def _absent(root: Path) -> IndexFormatError:
    if root.is_file():
        return IndexFormatError(f"{root}: a file, not an index; give the folder of the index")
    if not root.is_dir():
        return IndexFormatError(f"{root}: there is no index here; build one with `embedcam build`")
    if any(_PIECES.fullmatch(entry.name) for entry in root.iterdir()):
        return IndexFormatError(
            f"{root}: the index is unfinished (no {NAME}); run the same build again and it resumes"
        )
    return IndexFormatError(f"{root}: not an embedcam index (no {NAME}); check the path")


def _parse(root: Path, data: bytes) -> Manifest:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def finite(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=finite)
        canonical(manifest)
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise broken(root, NAME, f"is not a readable JSON file ({what})") from error
    if not isinstance(manifest, dict):
        raise broken(root, NAME, "is not a JSON object")
    return manifest


class _Checker:
    """Typed access to a manifest; every failure is one sentence."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fail(self, what: str) -> IndexFormatError:
        return broken(self.root, NAME, what)

    def get(self, holder: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
        value = holder.get(key)
        if type(value) is not kind:
            raise self.fail(f"{where}{key} is {_short(value)}, not of type {kind.__name__}")
        return value

    def count(self, holder: Mapping[str, Any], key: str, where: str, low: int = 0) -> int:
        value: int = self.get(holder, key, int, where)
        if not low <= value < 1 << 48:
            raise self.fail(f"{where}{key} = {value} is impossible")
        return value

    def files(self, holder: Mapping[str, Any], kind: str) -> None:
        """A directory with its files: names and entries, not the files themselves."""
        directory = self.get(holder, "directory", str, f"{kind}: ")
        if not _DIRECTORY[kind].fullmatch(directory):
            raise self.fail(f"names the directory {directory!r}; expected {kind}/NNNNNN")
        for name, entry in self.get(holder, "files", dict, f"{directory}: ").items():
            if not is_plain_name(name):
                raise self.fail(f"names the file {name!r}, which is not a plain file name")
            check_entry(self.root, f"{directory}/{name}", entry)

    def grid(self, layer: Mapping[str, Any], key: str, where: str) -> None:
        value = layer.get(key)
        if value is None:
            return
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(n) is not int or not 1 <= n < 1 << 16 for n in value)
        ):
            raise self.fail(f"{where}{key} is {_short(value)}; expected [H, W] or null")
        if key == "coarse_grid" and value[0] * value[1] > MAX_COARSE_CELLS:
            raise self.fail(f"{where}{key} {value} has more than {MAX_COARSE_CELLS} cells")


def _check(root: Path, manifest: Manifest) -> None:
    check = _Checker(root)
    check.count(manifest, "generation", "", 1)
    _check_choices(check, manifest)
    embedding = check.get(manifest, "embedding", dict)
    check.count(embedding, "width", "embedding.", 1)
    check.get(embedding, "normalized", bool, "embedding.")
    layers = check.get(manifest, "layers", list)
    if not layers:
        raise check.fail("describes no layer")
    for number, layer in enumerate(layers):
        where = f"layers[{number}]."
        if not isinstance(layer, dict):
            raise check.fail(f"layers[{number}] is not an object")
        check.count(layer, "channels", where, 1)
        check.get(layer, "encoding", dict, where)
        check.grid(layer, "grid", where)
        check.grid(layer, "coarse_grid", where)
    _check_rows(check, manifest)
    _check_faiss(check, manifest)
    _check_trust(check, manifest)
    if manifest.get("compressed") is not None:
        _check_compressed(check, check.get(manifest, "compressed", dict))


def _check_choices(check: _Checker, manifest: Manifest) -> None:
    recipe = check.get(manifest, "recipe", dict)
    if manifest.get("recipe_sha256") != digest(recipe):
        raise check.fail("recipe_sha256 is not the digest of the recipe")
    for key in ("network", "images"):
        if manifest.get(key) is not None:
            check.get(manifest, key, dict)
    for key in ("method", "target", "norm", "metric", "sign"):
        check.get(manifest, key, str)
    for key in ("triplets", "libraries"):
        check.get(manifest, key, dict)
    if manifest["metric"] not in METRICS:
        raise check.fail(f"metric is {manifest['metric']!r}; known: l2, ip")
    if manifest["sign"] != "margin":
        raise check.fail(f"sign is {manifest['sign']!r}; this version knows only 'margin'")


def _check_trust(check: _Checker, manifest: Manifest) -> None:
    if manifest.get("trust") is None:
        return
    for name, values in check.get(manifest, "trust", dict).items():
        if name not in ("one", "several"):
            raise check.fail(f"trust has the unknown entry {_short(name)}; known: one, several")
        try:
            neighbors = Calibration.from_dict(values).neighbors
        except InputError as error:
            raise check.fail(f"trust.{name}: {error}") from error
        if (neighbors == 1) != (name == "one"):
            raise check.fail(f"trust.{name} is of explanations by {neighbors} neighbours")


def _check_rows(check: _Checker, manifest: Manifest) -> None:
    counts, fit = check.get(manifest, "counts", dict), check.get(manifest, "fit", dict)
    rows = check.count(counts, "rows", "counts.")
    live = check.count(counts, "live", "counts.")
    check.count(counts, "added_after_fit", "counts.")
    check.count(fit, "images", "fit.")
    check.count(fit, "rows", "fit.")
    total, seen = 0, set()
    for part in check.get(manifest, "parts", list):
        if not isinstance(part, dict):
            raise check.fail("parts holds something that is not an object")
        check.files(part, "parts")
        total += check.count(part, "count", f"{part['directory']}: ")
        seen.add(part["directory"])
    if len(seen) != len(manifest["parts"]):
        raise check.fail("names one part twice")
    check.files(check.get(manifest, "fitted", dict), "fitted")
    removed = 0
    if manifest.get("tombstones") is not None:
        tombstones = check.get(manifest, "tombstones", dict)
        name = _numbered(check, tombstones, "tombstones", "u64")
        check_entry(check.root, name, tombstones)
        if tombstones["dtype"] != "uint64" or len(tombstones["shape"]) != 1:
            raise check.fail(f"{name} should be uint64 [n]")
        removed = tombstones["shape"][0]
    if rows != total or live != rows - removed:
        raise check.fail(
            f"counts {rows} rows and {live} live; its parts hold {total}, {removed} of them removed"
        )
    if fit["rows"] > rows or counts["added_after_fit"] > rows - fit["rows"]:
        raise check.fail("counts of the fit do not go with the rows")


def _check_faiss(check: _Checker, manifest: Manifest) -> None:
    if manifest.get("faiss") is None:
        return
    faiss = check.get(manifest, "faiss", dict)
    _numbered(check, faiss, "faiss", "index")
    check.get(faiss, "factory", str, "faiss.")
    search = check.get(faiss, "search", dict, "faiss.")
    for key in search:
        check.count(search, key, "faiss.search.", 1)
    check.count(faiss, "bytes", "faiss.", 1)
    check.count(faiss, "trained_on", "faiss.")
    if not is_sha256(faiss.get("sha256")):
        raise check.fail("its entry for the FAISS file has no SHA-256")


def _check_compressed(check: _Checker, compressed: Mapping[str, Any]) -> None:
    where = "compressed."
    images = check.count(compressed, "from_rows", where, 1)
    check.count(compressed, "from_bytes", where)
    check.count(compressed, "seed", where)
    check.get(compressed, "per_class", bool, where)
    for key in ("prototypes", "rows"):
        if check.count(compressed, key, where, 1) > images:
            raise check.fail(f"{where}{key} is {compressed[key]}, of {images} images")
    fidelity = check.get(compressed, "fidelity", dict, where)
    where += "fidelity."
    if check.count(fidelity, "images", where) > images:
        raise check.fail(f"{where}images is {fidelity['images']}, of {images}")
    cosine = check.get(fidelity, "cosine", dict, where)
    named = {f"cosine.{count}": one for count, one in cosine.items()}
    if not all(count.isascii() and count.isdigit() for count in cosine):
        raise check.fail(f"{where}cosine is {_short(cosine)}; expected numbers of neighbours")
    for name, one in {**named, "recall_at_1": fidelity.get("recall_at_1")}.items():
        if one is None:
            continue
        if not isinstance(one, dict):
            raise check.fail(f"{where}{name} is {_short(one)}, not of type dict")
        for key in ("index", "prototypes", "loss"):
            if type(one.get(key)) not in (int, float) or not -2 <= one[key] <= 2:
                raise check.fail(f"{where}{name}.{key} is {_short(one.get(key))}; no such share")


def _numbered(check: _Checker, holder: Mapping[str, Any], stem: str, ending: str) -> str:
    name: str = check.get(holder, "file", str, f"{stem}.")
    if not re.fullmatch(rf"{stem}-[0-9]{{6,12}}\.{ending}", name):
        raise check.fail(f"names the file {name!r}; expected {stem}-NNNNNN.{ending}")
    return name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
