"""What a type checker knows of `explain_features`."""

import sys
from pathlib import Path

import pytest

import embedcam

USES = """
from typing import Any, assert_type
import numpy as np
from embedcam import Explainer, Explanation

explainer = Explainer("my.index")
maps = np.zeros((8, 7, 7), np.float32)
one, several = np.zeros(4, np.float32), np.zeros((3, 4), np.float32)
explain = explainer.explain_features
assert_type(explain(one, maps), Explanation)
assert_type(explain(one, maps, neighbors=["a"]), Explanation)
assert_type(explain([0.6, 0.8], maps), Explanation)
assert_type(explain(several, maps), list[Explanation])
assert_type(explain([one, one], maps, neighbors=[["a"], ["b"]]), list[Explanation])
assert_type(explain([[0.6, 0.8]], maps), list[Explanation])

def of_unknown_axes(embedding: np.ndarray) -> None:
    assert_type(explain(embedding, maps), Any)

explain("one", maps)  # type: ignore[arg-type]
explain(one, maps, neighbors=[["a"]])  # type: ignore[list-item]
assert_type(explainer.explain("query.jpg"), Explanation)
assert_type(explainer.explain_batch(["query.jpg"]), list[Explanation])
assert_type(explainer.reload(), bool)
"""
# What is not numpy's or embedcam's is left aside: reading torch would take most of a minute.
SETTINGS = f"""
[mypy]
mypy_path = {Path(embedcam.__file__).parents[1]}
ignore_missing_imports = True
follow_imports = silent
warn_unused_ignores = True
[mypy-torch.*,torchvision.*,PIL.*,sklearn.*,scipy.*,matplotlib.*,timm.*,transformers.*]
follow_imports = skip
"""


def test_one_or_several_by_the_number_of_axes(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    file, settings = tmp_path / "uses.py", tmp_path / "mypy.ini"
    file.write_text(USES)
    settings.write_text(SETTINGS)
    arguments = [str(file), "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
    told, refused, code = mypy.run([*arguments, "--python-executable", sys.executable])
    assert (refused, code) == ("", 0), told
