"""Strings and labels kept as columns give back what was put in, small or large."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcam.images import texts
from embedcam.images.texts import LabelColumn, Texts

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@given(st.lists(TEXT.filter(lambda text: max(text, default="") < "\ud800"), max_size=40))
def test_texts_are_what_was_put_in(in_memory: int, strings: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_IN_MEMORY", in_memory)
        kept = Texts.of(iter(strings))
    assert len(kept) == len(strings)
    assert list(kept) == kept[:] == strings == kept
    assert kept[1:-1] == strings[1:-1]
    assert kept[::-2] == strings[::-2]
    for row, text in enumerate(strings):
        assert kept[row] == kept[row - len(strings)] == text
    rows = np.arange(len(strings))[::-1]
    assert kept[rows] == strings[::-1]


def test_a_name_that_is_no_utf8_comes_back_as_it_was() -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Texts.of([name, "b"])[0] == name


def test_a_place_beyond_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="3 of 2 strings"):
        Texts.of(["a", "b"])[3]


@given(st.lists(st.one_of(st.none(), st.sampled_from(["cat", "dog", "", "none"])), max_size=30))
def test_labels_are_what_was_put_in(labels: list[str | None]) -> None:
    kept = LabelColumn.of(iter(labels))
    assert list(kept) == kept[:] == labels == kept
    assert [kept[row] for row in range(len(labels))] == labels
    assert kept[::2] == labels[::2]
