"""Words for concepts, by a network that embeds pictures and texts side by side.

A picture with a little more of part v in it has another pooled p and z = W p + b; seen from the
average picture m, of length 1 where embeddings are, its embedding goes along

    d = (I - m m^T) W v

(without the bracket where embeddings are not normalized). The word for a part is the one whose t,
less the mean m' of texts, has the largest cosine with d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, short
from ..explain.side_maker import SideMaker
from ..explain.texts import Texts, check_text, embed_words
from ..index.concepts import LONGEST_NAME

if TYPE_CHECKING:
    from ..explain.explainer import Explainer


def suggest_names(
    explainer: Explainer, words: Sequence[str], *, texts: Texts | None = None
) -> dict[int, tuple[str, float]]:
    """Return for each concept, by number, the nearest of the words and the cosine, if above 0.

    `texts` embeds words in place of the network, as for `Explainer.explain_text`. Raises InputError
    of an index without concepts, of words that are no names, and of a head that is not average
    pooling and affine; NetworkError of a network without a tower for texts.
    """
    snapshot = explainer.snapshot
    index, concepts = snapshot.index, snapshot.index.concepts()
    if concepts is None:
        raise InputError(f"{index.path}: has no concepts to be named; build it again with some")
    head = None if snapshot.network is None else SideMaker(snapshot.network).head(index)
    if head is None or head.held is not None:
        raise InputError(
            "words for concepts follow from a network whose head is average pooling and affine; "
            "name this one's in a concepts.toml by hand"
        )
    if isinstance(words, str) or len(words) < 2:
        raise InputError(f"words = {short(words)}; give a list of two words or more")
    for word in map(check_text, words):
        if len(word) > LONGEST_NAME or not word.isprintable():
            raise InputError(f"{short(word)} is no name; give {LONGEST_NAME} characters at most")
    embedded = embed_words(snapshot, list(words), texts).astype(np.float64)
    embedded -= index.shared().get("text_mean", embedded.mean(0))
    parts, n_channels = concepts.parts.astype(np.float64), index.layers[0].channels
    if parts.shape[1] != n_channels:  # of signed activations
        parts = parts[:, :n_channels] - parts[:, n_channels:]
    along = parts if head.matrix is None else parts @ head.matrix.T
    if index.normalized:
        mean = index.fitted("embedding_mean").astype(np.float64)
        along -= np.outer(along @ mean, mean / (mean @ mean or 1))
    lengths = np.outer(np.linalg.norm(along, axis=1), np.linalg.norm(embedded, axis=1))
    cosines = along @ embedded.T / np.where(lengths > 0, lengths, 1)
    best = cosines.argmax(1)
    found = zip(best.tolist(), cosines.max(1).tolist(), strict=True)
    return {n: (words[one], cosine) for n, (one, cosine) in enumerate(found) if cosine > 0}
