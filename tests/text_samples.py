"""A tower for texts: any text has an embedding of its own, the same in every process."""

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from build_samples import WIDTH, dense, pictures, quicken, toy

from embedcam import Explainer, build_index

PROMPTS = ["a dog", "a cat on a mat", "two red cars", "the sea"]


def tower(texts: Sequence[str], width: int = WIDTH) -> np.ndarray:
    """Embeddings `[n D]`, not of length 1, all in one cone."""
    rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=width) for text in texts]
    return np.array(rows, np.float32) + 2


def tower_of(kind: str):
    """The tower of a toy, whose embeddings of the head "identity" are wider."""
    return lambda texts: tower(texts, 8 if kind == "identity" else WIDTH)


def built_words(folder, kind="affine", *, normalize=True, tower=tower, prompts=PROMPTS, **settings):
    """An index of twelve pictures by a network with a tower for texts, and the toy."""
    made = toy(kind, normalize=normalize, texts=tower)
    settings = {"recipe": dense(), "progress": False, **settings}
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        build_index(
            pictures(folder / "photos"), made.network, folder / "index", prompts=prompts, **settings
        )
    return Explainer(folder / "index", made.network), made
