"""What a type checker knows of `explain_features`."""

import re
import sys
from pathlib import Path

import pytest

import embedcam

USES = """
from collections.abc import Sequence
from typing import Any

import numpy as np

from embedcam import Explainer

explainer = Explainer("my.index")
maps = np.zeros((8, 7, 7), np.float32)
one, several = np.zeros(4, np.float32), np.zeros((3, 4), np.float32)
reveal_type(explainer.explain_features(one, maps))  # Explanation
reveal_type(explainer.explain_features(one, maps, neighbors=["a"]))  # Explanation
reveal_type(explainer.explain_features([0.6, 0.8], maps))  # Explanation
reveal_type(explainer.explain_features(several, maps))  # list
reveal_type(explainer.explain_features([one, one], maps, neighbors=[["a"], ["b"]]))  # list
reveal_type(explainer.explain_features([[0.6, 0.8]], maps))  # list


def of_unknown_axes(embedding: np.ndarray) -> None:
    reveal_type(explainer.explain_features(embedding, maps))  # Any


explainer.explain_features("one", maps)  # error
explainer.explain_features(one, maps, neighbors=[["a"]])  # error
reveal_type(explainer.explain("query.jpg"))  # Explanation
reveal_type(explainer.explain_batch(["query.jpg"]))  # list
reveal_type(explainer.reload())  # bool
"""
# What is not numpy's or embedcam's is left aside: reading torch would take most of a minute.
SETTINGS = f"""
[mypy]
mypy_path = {Path(embedcam.__file__).parents[1]}
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*,torchvision.*,PIL.*,sklearn.*,scipy.*,matplotlib.*,timm.*,transformers.*]
follow_imports = skip
"""
SHOWN = {
    "Explanation": "embedcam.explain.explanation.Explanation",
    "list": "list[embedcam.explain.explanation.Explanation]",
    "Any": "Any",
    "bool": "bool",
}


def test_one_or_several_by_the_number_of_axes(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    file = tmp_path / "uses.py"
    file.write_text(USES)
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    arguments = [str(file), "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
    arguments += ["--python-executable", sys.executable]
    told, refused, _ = mypy.run(arguments)
    assert refused == ""
    by_line = {
        int(number): kind if kind == "error" else words
        for number, kind, words in re.findall(r"uses\.py:(\d+): (\w+): (.*)", told)
        if kind == "error" or "Revealed type" in words
    }
    shown = {kind: f'Revealed type is "{name}"' for kind, name in SHOWN.items()}
    assert by_line == {
        number: shown.get(word := line.rpartition("# ")[2], word)
        for number, line in enumerate(USES.splitlines(), 1)
        if "  # " in line
    }, told
