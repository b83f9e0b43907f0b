"""Embeddings of texts, by the tower for texts that some networks have beside that for images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NetworkError
from .module import user_code

TextTower = Callable[[Sequence[str]], "Tensor | np.ndarray"]
"""Texts -> their embeddings `[n D]` in the space of the images', before any normalisation."""


def embed_texts(tower: TextTower | None, texts: Sequence[str], normalize: bool) -> np.ndarray:
    """Return the embeddings of texts, float32 `[n D]`, of length 1 iff `normalize`.

    Raises
    ------
    NetworkError
        There is no tower, or it returned something else.
    InputError
        The texts are no list of texts.
    """
    if tower is None:
        raise NetworkError(
            "the network embeds images alone, so words cannot be embedded by it; load one with a "
            "tower for texts, such as CLIP, give EmbeddingNetwork(..., texts=function), or embed "
            "the words elsewhere (--text-embedding FILE.npy)"
        )
    if isinstance(texts, str) or not texts or not all(isinstance(one, str) for one in texts):
        raise InputError(f"texts are {texts!r:.100}; give a list of texts, at least one")
    advice = "give a function that takes a list of texts and returns their embeddings [n D]"
    with user_code("texts=", advice), torch.inference_mode(False), torch.no_grad():
        found = tower(list(texts))
    if isinstance(found, Tensor):
        found = found.detach().float().cpu().numpy()
    shape = list(np.shape(found))
    if len(shape) != 2 or shape[0] != len(texts):
        raise NetworkError(
            f"texts= returned {shape} for {len(texts)} texts; expected their embeddings "
            f"[{len(texts)} D], as long as the images'"
        )
    embeddings = np.array(found, np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (normalize and not lengths.all()):
        raise NetworkError("the embeddings of texts hold NaN, infinity or zeros; check the weights")
    return embeddings / lengths if normalize else embeddings
