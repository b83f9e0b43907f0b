"""What a stranger may write into a manifest: each key once, hostile values, random damage."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import faiss
import numpy as np
import pytest
from index_samples import encoding_of, header_of, make, part
from PIL import Image
from test_index_corrupt import MEAN, PART, at, content, edit, forge, u64

from embedcam.errors import IndexFormatError, InputError
from embedcam.explain.drawing import may_follow
from embedcam.explain.explanation import Explanation
from embedcam.index import Index, create, rebuild_faiss, verify
from embedcam.index import manifest as manifest_file
from embedcam.preprocess import Preprocess

ROOT = Path(__file__).parents[1]


def script(*arguments: object) -> str:
    """What a script prints, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An index with every key that may be there: HNSW, a network, pictures, own maps."""
    encoding, shared = encoding_of("top-m"), {"embedding_mean": np.zeros(8, np.float32)}
    loading = {"network": "torchvision:resnet18", "weights": None}
    network = {"layer": "features.18", "name": "toy", "loading": loading}
    network["preprocess"] = Preprocess((16, 16)).to_dict()
    header = header_of(encoding, network=network, images={"root": "pictures"})
    return create(tmp_path / "x", header, [{}], shared, part(0, 12, encoding), factory="HNSW8")


NEEDED = [
    *((key,) for key in (
        "recipe", "recipe_sha256", "network", "images", "libraries", "embedding", "metric", "sign",
        "method", "target", "norm", "triplets", "layers", "fit", "counts", "parts", "fitted",
        "tombstones", "faiss", "generation",
    )),
    *(("layers", 0, key) for key in ("name", "channels", "grid", "cells", "coarse_grid")),
    *(("faiss", key) for key in ("file", "factory", "search", "bytes", "sha256", "trained_on")),
    ("triplets", "hinge"), ("embedding", "normalized"), ("parts", 0, "files"), ("fit", "rows"),
]  # fmt: skip


def test_a_missing_key_is_named(path: Path) -> None:
    whole = (path / "manifest.json").read_bytes()
    for place in NEEDED:
        at(*place, absent=True)(path)
        with pytest.raises(IndexFormatError, match=rf"json: .*{place[-1]} is missing; restore"):
            Index.open(path)
        (path / "manifest.json").write_bytes(whole)


BELIEVED = [
    (("layers", 0, "channels"), 1 << 20, 2**20 + 1, "= 1048577 is impossible; expected 1 to 10485"),
    (("faiss", "search", "ef_search"), 1 << 16, 65537, "= 65537 is impossible; expected 1 to 6553"),
    (("faiss", "search", "nprobe"), 1 << 24, 2**24 + 1, "= 16777217 is impossible"),
    (("faiss", "factory"), "HNSW1234567", "IVF12345678,Flat", "expected numbers of at most 7 di"),
    (("generation",), 1 << 32, 2**32 + 1, "generation = 4294967297 is impossible"),
    (("images", "root"), "/" * 4096, "/" * 4097, "images.root has 4097 characters; at most 4096"),
    (("images", "root"), "a\nb", "a\0b", r"images\.root is 'a\\x00b'; expected text without NUL"),
    (("network", "loading", "head"), None, [1], r"network\.loading\.head is \[1\], not of type"),
    (("network", "preprocess"), None, "x", "network.preprocess is 'x', not of type dict"),
    (("network", "preprocess", "size"), [8, 9], 1, "network.preprocess: preprocess: size is 1"),
    (("network", "preprocess", "mean"), [0, 0, 0], [10**400, 0, 0], "preprocess: mean is .1000"),
    (("network", "loading", "weights"), "a b", "a\nb", "expected text without control characters"),
    (("triplets", "margin"), 7, 10**400, "triplets.margin is 1000.*; expected a number from 0"),
    (("triplets", "seed"), 2**64 - 1, 2**64, "triplets.seed = 18446744073709551616 is impossible"),
    (("layers", 0, "name"), "x" * 500, "x" * 501, r"layers\[0\]\.name has 501 characters"),
    (("layers", 0, "cells"), 6, 7, r"layers\[0\]\.cells is 7 on a grid of 2 x 3"),
    (("layers", 0, "encoding", "by"), "signed", "x", r"encoding\.by is 'x'; known: signed, magn"),
    (("counts", "added_after_fit"), 0, 1, "of 1 added and 12 fitted rows of 12 do not go"),
    (("fit", "rows"), 12, 11, "counts.added_after_fit is not 1, the live rows behind the fit"),
    (("method",), "mine", None, "method is None, not of type str"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "good", "bad", "message"), BELIEVED)
def test_what_is_believed_and_what_is_not(path, place, good, bad, message) -> None:
    at(*place, value=bad)(path)
    with pytest.raises(IndexFormatError, match=message) as caught:
        Index.open(path)
    assert len(str(caught.value)) < 400
    if place == ("layers", 0, "channels"):
        return  # so many channels have files of another type
    at(*place, value=good)(path)
    Index.open(path).close()


def test_recipes_are_checked_as_deep_as_they_go(path: Path) -> None:
    for value in ("x" * 501, {"x" * 501: 1}, [[1 << 65]]):
        at("recipe", "options", value=value)(path)
        edit(lambda m: m.update(recipe_sha256=manifest_file.digest(m["recipe"])))(path)
        said = r"recipe\.options.* (has 501 char|= 36893.* is imp)"
        with pytest.raises(IndexFormatError, match=said):
            Index.open(path)


def test_keys_of_later_versions_are_ignored(path: Path) -> None:
    def top(manifest: dict[str, Any]) -> None:
        for key in ("network", "images", "embedding", "triplets", "fit", "counts", "faiss"):
            manifest[key]["later"] = {"a": [None]}
        manifest["layers"][0]["later"] = manifest["parts"][0]["later"] = manifest["later"] = "x"
        for entry in manifest["parts"][0]["files"].values():
            entry["later"] = 1

    edit(top)(path)
    verify(path)
    at("later", value=json.loads("[" * 21 + "]" * 21))(path)
    with pytest.raises(IndexFormatError, match="it is nested more than 20 deep"):
        Index.open(path)


def test_no_more_files_than_can_be_mapped(path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        part = manifest["parts"][0]
        line = part["files"]["ids.utf8"]
        part["files"] |= {f"a{n}.u8": line for n in range(1 << 14)}

    edit(change)(path)
    with pytest.raises(IndexFormatError, match="names 16398 files of parts; at most 16384 are map"):
        Index.open(path)


def test_what_could_not_be_read_is_not_written(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    before = content(path)
    with pytest.raises(IndexFormatError, match="generation = 0 is impossible"):
        manifest_file.write(path, {**manifest, "generation": 0})
    assert content(path) == before


@pytest.mark.parametrize(
    ("make_it", "what"),
    [
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a symbolic link"),
        (lambda path: path.symlink_to(path.parent / "kept"), "is a symbolic link"),
    ],
)
def test_the_manifest_is_a_plain_file(path: Path, make_it: Any, what: str) -> None:
    (path / "manifest.json").rename(path / "kept")
    make_it(path / "manifest.json")
    with pytest.raises(IndexFormatError, match=rf"manifest\.json: {what}"):
        Index.open(path)


@pytest.mark.parametrize("name", ["ids", "paths", "labels"])
@pytest.mark.parametrize("first", [2**63, 10**6])
def test_offsets_that_lead_outside(path: Path, name: str, first: int) -> None:
    n = 4 if name == "labels" else 13
    forge(f"{PART}/{name}.offsets.u64", u64(first, *[2**64 - 1] * (n - 1)))(path)
    with pytest.raises(IndexFormatError, match=rf"{name}\.offsets\.u64: the offsets run from"):
        verify(path)
    with Index.open(path) as index:
        strings = getattr(index, name)
        for read in (lambda: strings[0], lambda: strings[:], lambda: strings[np.array([5, 1])]):
            with pytest.raises(IndexFormatError, match=rf"{name}\.off.*: offsets fall or lead"):
                read()


@pytest.mark.parametrize("shape", [[0], [7], [8, 1], [2, 4]])
def test_the_mean_has_the_width_of_the_embeddings(path: Path, shape: list[int]) -> None:
    data = bytes(4 * int(np.prod(shape)))
    (path / MEAN).write_bytes(data)
    entry = {"dtype": "float32", "shape": shape, "bytes": len(data)}
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    at("fitted", "files", "embedding_mean.f32", value=entry)(path)
    with pytest.raises(IndexFormatError, match=r"mean.f32: holds float32 .* is no embedding_mean"):
        Index.open(path)


def test_arrays_of_no_rows_are_finite(tmp_path: Path) -> None:
    encoding, shared = encoding_of("dense32"), {"empty": np.zeros((0, 3), np.float32)}
    verify(create(tmp_path / "x", header_of(encoding), [{}], shared, part(0, 4, encoding)))


@pytest.mark.parametrize(
    ("path", "root", "freely", "only_below"),
    [
        ("/data/images/a.jpg", "/data/images", True, True),
        ("/data/images/b/a..b.jpg", "/data/images", True, True),
        ("/data/images/../a.jpg", "/data/images", False, False),
        ("/data/images/b/../a.jpg", "/data/images", False, False),  # b may be a link
        ("/elsewhere/a.jpg", "/data/images", True, False),
        ("/data/images-2/a.jpg", "/data/images", True, False),
        ("../images/a.jpg", "../images", True, True),
        ("a.jpg", ".", True, True),
        ("../a.jpg", ".", False, False),
        (f"{os.getcwd()}/images/a.jpg", "images", True, True),
        ("../a.jpg", None, True, True),
        ("", "/data/images", False, False),
    ],
)
def test_which_paths_are_followed(path, root, freely, only_below) -> None:
    folder = None if root is None else Path(root)
    assert [may_follow(path, folder, below) for below in (False, True)] == [freely, only_below]


def test_pictures_outside_count_as_not_found(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for file in (root / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (4, 3), "red").save(file)
    (root / "text.png").write_text("no picture")
    names = ["in.png", "../out.png", str(tmp_path / "out.png"), "text.png"]
    arrays = dict.fromkeys(("signed_cam", "cam"), np.ones((2, 2), "f4"))
    arrays |= dict.fromkeys(("weights", "features"), np.zeros(3, "f4"))
    arrays |= dict.fromkeys(("distances", "similarities"), np.zeros(4, "f4"))
    rows = {"ids": list("abcd"), "labels": [None] * 4, "neighbor_cams": None, "explained": ["a"]}
    rows["paths"] = [str(root / name) for name in names]

    def drawn(only_below: bool) -> list[bool]:
        why = Explanation(**arrays, **rows, transfer="mean", root=root, only_below=only_below)
        assert len(why._repr_html_()) > 100
        return [tile.image is not None for tile in why.tiles()[1]]

    assert drawn(only_below=False) == [True, False, True, False]
    assert drawn(only_below=True) == [True, False, False, False]


def test_what_a_stranger_s_factory_asks_for_is_not_taken(tmp_path, monkeypatch) -> None:
    path = make(tmp_path / "x", 12)
    monkeypatch.setattr(faiss, "index_factory", Mock(side_effect=AssertionError("asked for it")))
    for factory, what in (
        ("IVF9999999,Flat", "needs at least 9999999 images to train, and there are 12"),
        ("IVF8(IVF1048576,Flat),Flat", "needs at least 1048576 images"),
        ("PQ8x24", "needs at least 16777216 images"),
        ("IMI2x14,Flat", r"cannot be used \(2\^28 lists are too many for 12 images\)"),
    ):
        at("faiss", "factory", value=factory)(path)
        with pytest.raises(InputError, match=what):
            rebuild_faiss(path)


def test_hostile_values_in_a_sample_of_keys_of_every_kind_of_index() -> None:
    printed = script("-m", "scripts.campaigns", "manifests", "--sample", 240, "--seed", 1)
    lines = printed.splitlines()
    assert len(lines) == 12
    assert all(": 20 of " in line and line.endswith(" 0 failed") for line in lines)


def test_a_sample_of_random_damage() -> None:
    table = script("-m", "scripts.campaigns", "mutants", "--count", 125, "--seed", 2).splitlines()
    assert table[0] == "| damage | mutants | refused | same answers | named by verify | failed |"
    total = [int(cell) for cell in table[-3].split("|")[2:-1]]
    assert total[0] == sum(total[1:]) == 125
    assert (min(total[1:4]) > 5, total[4]) == (True, 0)
