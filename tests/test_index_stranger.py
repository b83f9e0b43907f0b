"""The paths and the search of an index that someone else wrote."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_samples import make
from PIL import Image

from embedcam.errors import InputError
from embedcam.explain.explanation import Explanation, may_follow
from embedcam.index import manifest as manifest_file
from embedcam.index import rebuild_faiss


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
    assert may_follow(path, folder, False) is freely
    assert may_follow(path, folder, True) is only_below


def test_pictures_outside_count_as_not_found(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for file in (root / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (4, 3), "red").save(file)
    (root / "text.png").write_text("no picture")
    names = ["in.png", "../out.png", str(tmp_path / "out.png"), "text.png"]

    def drawn(only_below: bool) -> list[bool]:
        why = Explanation(
            signed_cam=np.ones((2, 2), np.float32),
            cam=np.zeros((2, 2), np.float32),
            weights=np.zeros(3, np.float32),
            features=np.zeros(3, np.float32),
            ids=list("abcd"),
            labels=[None] * 4,
            paths=[str(root / name) for name in names],
            distances=np.zeros(4, np.float32),
            similarities=np.ones(4, np.float32),
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
