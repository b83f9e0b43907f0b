"""What a stranger may write into a manifest: each key once, hostile values, random damage."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_samples import encoding_of, header_of, make, part
from PIL import Image
from test_index_corrupt import MEAN, PART, at, content, edit, forge, u64

from embedcam.errors import EmbedcamError, IndexFormatError, InputError
from embedcam.explain.explanation import Explanation, may_follow
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
    encoding = encoding_of("top-m")
    network = {
        "layer": "features.18",
        "name": "toy",
        "preprocess": Preprocess((16, 16)).to_dict(),
        "loading": {"network": "torchvision:resnet18", "weights": None},
    }
    header = header_of(encoding, network=network, images={"root": "pictures"})
    shared = {"embedding_mean": np.zeros(8, np.float32)}
    return create(tmp_path / "x", header, [{}], shared, part(0, 12, encoding), factory="HNSW8")


# --- presence, type and range --------------------------------------------------------------------


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
    (("images", "root"), None, [[]], r"images\.root is \[\[\]\], not of type str"),
    (("images", "root"), "a\nb", "a\0b", r"images\.root is 'a\\x00b'; expected text without NUL"),
    (("network", "loading"), None, 1, "network.loading is 1, not of type dict"),
    (("network", "loading", "head"), None, [1], r"network\.loading\.head is \[1\], not of type"),
    (("network", "preprocess"), None, "x", "network.preprocess is 'x', not of type dict"),
    (("network", "preprocess", "size"), [8, 9], 1, "network.preprocess: preprocess: size is 1"),
    (("network", "preprocess", "mean"), [0, 0, 0], [10**400, 0, 0], "preprocess: mean is .1000"),
    (("network", "preprocess", "interpolation"), "box", [[1]], r"interpolation = \[\[1"),
    (("network", "loading", "weights"), "a b", "a\nb", "expected text without control characters"),
    (("network", "name"), None, 1e308, r"network\.name is 1e\+308, not of type str"),
    (("libraries",), {"a": "1"}, {"a": 1}, r"libraries\.a is 1, not of type str"),
    (("triplets", "margin"), 7, 10**400, "triplets.margin is 1000.*; expected a number from 0"),
    (("triplets", "seed"), 2**64 - 1, 2**64, "triplets.seed = 18446744073709551616 is impossible"),
    (("layers", 0, "name"), "x" * 500, "x" * 501, r"layers\[0\]\.name has 501 characters"),
    (("layers", 0, "cells"), 6, 7, r"layers\[0\]\.cells is 7 on a grid of 2 x 3"),
    (("layers", 0, "encoding", "by"), "signed", "x", r"encoding\.by is 'x'; known: signed, magn"),
    (("counts", "added_after_fit"), 0, 1, "of 1 added and 12 fitted rows of 12 do not go"),
    (("fit", "rows"), 12, 11, "counts.added_after_fit is not 1, the live rows behind the fit"),
    (("fit", "images"), 2**48 - 1, 2**48, "fit.images = 281474976710656 is impossible"),
    (("recipe",), {}, [], r"recipe is \[\], not of type dict"),
    (("method",), "mine", None, "method is None, not of type str"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "good", "bad", "message"), BELIEVED)
def test_what_is_believed_and_what_is_not(
    path: Path, place: tuple[str | int, ...], good: Any, bad: Any, message: str
) -> None:
    def placed(value: Any) -> None:
        at(*place, value=value)(path)
        if place[0] == "recipe":
            edit(lambda m: m.update(recipe_sha256=manifest_file.digest(m["recipe"])))(path)

    placed(bad)
    with pytest.raises(IndexFormatError, match=message) as caught:
        Index.open(path)
    assert len(str(caught.value)) < 400
    if place == ("layers", 0, "channels"):
        return  # so many channels have files of another type
    placed(good)
    Index.open(path).close()


def test_recipes_are_checked_as_deep_as_they_go(path: Path) -> None:
    for value in ("x" * 501, {"x" * 501: 1}, [[1 << 65]]):
        at("recipe", "options", value=value)(path)
        edit(lambda m: m.update(recipe_sha256=manifest_file.digest(m["recipe"])))(path)
        with pytest.raises(
            IndexFormatError, match=r"recipe\.options.* (has 501 char|= 36893.* is imp)"
        ):
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


def test_the_record_says_what_the_manifest_says(path: Path) -> None:
    with Index.open(path) as index:
        record, plain = index.manifest, index.manifest.to_dict()
        assert record.layers[0].name == "features.18"
        assert record.layers[0].encoding.m == plain["layers"][0]["encoding"]["m"] == 2
        assert record.layers[0].grid == (2, 3)
        assert record.parts[0].files["embeddings.f32"].shape == (12, 8)
        assert record.network.preprocess == Preprocess((16, 16))
        assert record.faiss.search.ef_search == 64
        assert record.faiss.search.nprobe is None
        assert record.manifest_sha256 == plain["manifest_sha256"]
        assert record.trust_calibration is None
        assert "trust_calibration" not in plain


# --- writing -------------------------------------------------------------------------------------


def test_what_could_not_be_read_is_not_written(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    before = content(path)
    with pytest.raises(IndexFormatError, match="generation = 0 is impossible"):
        manifest_file.write(path, {**manifest, "generation": 0})
    assert content(path) == before


def test_a_header_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    encoding = encoding_of("top-m")
    good = header_of(encoding)
    wide = {**good["layers"][0], "channels": 1 << 21}
    for change, message in (
        ({"method": "x" * 501}, "the header's method has 501 characters"),
        ({"layers": [wide]}, r"header's layers\[0\]\.channels"),
        ({"images": {"root": 3}}, "the header's images.root is 3, not of type str"),
        ({"network": {"loading": [1]}}, r"the header's network\.loading is \[1\]"),
    ):
        with pytest.raises(InputError, match=message):
            create(tmp_path / "x", {**good, **change}, [{}], {}, part(0, 4, encoding))
        assert not list((tmp_path / "x").glob("[!.]*"))


# --- files ---------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("first", [2**63, 2**64 - 1, 10**6])
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


def test_a_flipped_bit_in_the_order_of_ids(path: Path) -> None:
    file = path / PART / "ids.order.u32"
    whole = np.fromfile(file, np.uint32)
    for place in range(12):
        order = whole.copy()
        order[place] ^= 1 << 20
        order.tofile(file)
        with Index.open(path) as index:
            for row in range(12):
                try:
                    assert index.position(f"image-{row:04d}") == row
                except IndexFormatError as error:
                    assert "refers to row 1048" in str(error)  # noqa: PT017
            with pytest.raises(EmbedcamError):
                index.position(f"image-{place:04d}x")  # what it is near to is looked for


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


def test_more_lists_than_there_are(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 12, factory="IVF3,Flat")
    with Index.open(path) as index:
        found = [index.search(index.embeddings([3]), 4, nprobe=n) for n in (3, 2**31, 2**70)]
        for one in found:
            np.testing.assert_array_equal(one.positions, found[0].positions)


# --- the paths and the search of an index that someone else wrote ---------------------------------


@pytest.mark.parametrize(
    ("path", "root", "freely", "only_below"),
    [
        ("/data/images/a.jpg", "/data/images", True, True),
        ("/data/images/b/a..b.jpg", "/data/images", True, True),
        ("/data/images/../a.jpg", "/data/images", False, False),
        ("/data/images/b/../../../etc/a.jpg", "/data/images", False, False),
        ("/data/images/b/../a.jpg", "/data/images", False, False),  # b may be a link
        ("/elsewhere/a.jpg", "/data/images", True, False),
        ("/data/images-2/a.jpg", "/data/images", True, False),
        ("/elsewhere/../data/images/a.jpg", "/data/images", False, False),
        ("../images/a.jpg", "../images", True, True),
        ("../images/../a.jpg", "../images", False, False),
        ("a.jpg", ".", True, True),
        ("../a.jpg", ".", False, False),
        (f"{os.getcwd()}/images/a.jpg", "images", True, True),
        ("../a.jpg", None, True, True),
        ("", "/data/images", False, False),
    ],
)
def test_which_paths_are_followed(
    path: str, root: str | None, freely: bool, only_below: bool
) -> None:
    folder = None if root is None else Path(root)
    assert [may_follow(path, folder, below) for below in (False, True)] == [freely, only_below]


def test_pictures_outside_count_as_not_found(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for file in (root / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (4, 3), "red").save(file)
    (root / "text.png").write_text("no picture")
    names = ["in.png", "../out.png", str(tmp_path / "out.png"), "text.png"]

    def drawn(only_below: bool) -> list[bool]:
        why = Explanation(
            **dict.fromkeys(("signed_cam", "cam"), np.ones((2, 2), "f4")),
            **dict.fromkeys(("weights", "features"), np.zeros(3, "f4")),
            **dict.fromkeys(("distances", "similarities"), np.zeros(4, "f4")),
            ids=list("abcd"),
            labels=[None] * 4,
            paths=[str(root / name) for name in names],
            neighbor_cams=None,
            explained=["a"],
            transfer="mean",
            root=root,
            only_below=only_below,
        )
        assert len(why._repr_html_()) > 100
        return [tile.image is not None for tile in why.tiles()[1]]

    assert drawn(only_below=False) == [True, False, True, False]
    assert drawn(only_below=True) == [True, False, False, False]


@pytest.mark.parametrize(
    ("factory", "what"),
    [
        ("IVF9999999,Flat", "needs at least 9999999 images to train, and there are 12"),
        ("IVF8(IVF1048576,Flat),Flat", "needs at least 1048576 images"),
        ("PQ8x24", "needs at least 16777216 images"),
        ("IMI2x14,Flat", r"cannot be used \(2\^28 lists are too many for 12 images\)"),
    ],
)
def test_what_a_stranger_s_factory_asks_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, what: str
) -> None:
    path = make(tmp_path / "x", 12)
    manifest = manifest_file.read(path).to_dict()
    manifest["faiss"]["factory"] = factory
    manifest_file.write(path, manifest)

    def never(*_: object) -> None:
        raise AssertionError("FAISS was asked for it")

    monkeypatch.setattr(faiss, "index_factory", never)
    with pytest.raises(InputError, match=what):
        rebuild_faiss(path)


# --- every key, and any damage -------------------------------------------------------------------


def test_hostile_values_in_a_sample_of_keys_of_every_kind_of_index() -> None:
    printed = script("-m", "scripts.campaigns", "manifests", "--sample", 240, "--seed", 1)
    lines = printed.splitlines()
    assert len(lines) == 12
    for line in lines:
        assert ": 20 of " in line
        assert line.endswith(" 0 failed")


def test_a_sample_of_random_damage() -> None:
    table = script("-m", "scripts.campaigns", "mutants", "--count", 125, "--seed", 2).splitlines()
    assert table[0] == "| damage | mutants | refused | same answers | named by verify | failed |"
    total = [int(cell) for cell in table[-3].split("|")[2:-1]]
    assert total[0] == sum(total[1:]) == 125
    assert min(total[1:4]) > 5
    assert total[4] == 0


TRIAL = """
import os, signal, sys, time
from pathlib import Path
from unittest import mock
import numpy as np
import scripts.campaigns.trial as trial
from embedcam.errors import InputError
from embedcam.index import Index
from scripts.campaigns.kinds import build_kind
trial.SECONDS = 1
path = build_kind("dense", Path(sys.argv[1]))
expected = trial.Expected(path)
whole = Index.weights

class Long(InputError):
    def __str__(self):
        return "x" * 3000  # behind the back of the rule that cuts

def long(*_):
    raise Long("")

for instead in (
    whole,
    lambda *a: whole(*a) + 1,
    lambda *a: 1 / 0,
    lambda *a: time.sleep(9),
    lambda *a: os.kill(os.getpid(), signal.SIGSEGV),
    lambda *a: np.ones(1 << 28),
    long,
):
    with mock.patch.object(Index, "weights", instead):
        print(trial.in_child(lambda send: send(trial.judged(path, expected)))[-1])
"""


def test_the_trial_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Other answers, an exception, a hang, a crash, too much memory and a long message."""
    said = script("-c", TRIAL, tmp_path).splitlines()
    expected = ("same answers", "other answers", "ZeroDivisionError", "hangs over 1 s", "SIGSEGV",
                "MemoryError", "3000 characters")  # fmt: skip
    for line, what in zip(said, expected, strict=True):
        assert what in line
        assert ("FAILED" in line) == (what != "same answers")
