"""Texts beside images: the tower of a network by hand."""

import numpy as np
import pytest
import torch
from toys import toy

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork


def letters(texts: list[str]) -> torch.Tensor:
    """How often each vowel stands in a text."""
    return torch.tensor([[float(text.count(vowel)) for vowel in "aeiou"] for text in texts])


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_texts_are_embedded_as_pictures_are(kind: type) -> None:
    def tower(texts: list[str]) -> torch.Tensor | np.ndarray:
        return letters(texts) if kind is torch.Tensor else letters(texts).numpy()

    unit = EmbeddingNetwork(toy(), "relu", texts=tower)
    found = unit.embed_texts(["a red car", "blue"])
    expected = np.array([[2, 1, 0, 0, 0], [0, 1, 0, 0, 1]]) / np.sqrt([[5], [2]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    plain = EmbeddingNetwork(toy(), "relu", texts=tower, normalize=False)
    np.testing.assert_array_equal(plain.embed_texts(["blue"]), [[0, 1, 0, 0, 1]])


def test_towers_that_are_not_there_or_are_broken_say_so() -> None:
    with pytest.raises(NetworkError, match=r"embeds images alone.*texts=function"):
        EmbeddingNetwork(toy(), "relu").embed_texts(["a"])
    with pytest.raises(InputError, match=r"texts=3; give a function"):
        EmbeddingNetwork(toy(), "relu", texts=3)
    network = EmbeddingNetwork(toy(), "relu", texts=letters)
    for texts in ("car", [], [3]):
        with pytest.raises(InputError, match="give a list of texts"):
            network.embed_texts(texts)
    with pytest.raises(NetworkError, match="zeros"):
        network.embed_texts(["rhythm"])
    network.texts = lambda texts: letters(texts)[0]
    with pytest.raises(NetworkError, match=r"returned \[5\] for 1 texts"):
        network.embed_texts(["a"])
    network.texts = lambda texts: 1 / 0
    with pytest.raises(NetworkError, match="texts= failed with ZeroDivisionError"):
        network.embed_texts(["a"])
