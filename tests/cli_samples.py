"""A working folder for the command line: photos, and a module with a network to be named."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from photo_samples import write_photos

Say = Callable[..., tuple[int, str, str]]
NETWORK = """
from photo_samples import CROP, Pooled
from toys import seeded

def make():
    return seeded(Pooled, 4), CROP

def broken():
    raise KeyError("the shelf")

def exits():
    raise SystemExit(3)
"""
NAMED = ["--network", "cli_toy_network:make", "--layer", "relu"]
TRUSTED = NAMED[:2]


@contextmanager
def working_folder(folder: Path, each: int = 4) -> Iterator[Path]:
    (folder / "cli_toy_network.py").write_text(NETWORK)
    write_photos(folder / "photos", each=each)
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("cli_toy_network", None)


def trusting(words: list[str]) -> list[str]:
    """Return what names the code of an index of these tests, where a command loads it unnamed."""
    loads = set(words[:1]) & {"explain", "compare", "add", "export", "evaluate", "calibrate"}
    manifests = [Path(word) / "manifest.json" for word in words if len(word) < 1000]
    ours = any(file.is_file() and NAMED[1] in file.read_text() for file in manifests)
    named = {"--network", "--onnx"} & set(words)
    return TRUSTED if (loads or "--refit" in words) and ours and not named else []


def answer(say: Say, *arguments: object) -> Any:
    code, out, err = say(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)
