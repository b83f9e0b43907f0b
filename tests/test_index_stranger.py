"""The paths of an index that someone else wrote."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcam.explanation import Explanation, may_follow


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
            cam=np.zeros((2, 2), np.float32),
            weights=np.zeros(3, np.float32),
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
