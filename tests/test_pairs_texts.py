"""Receipts of words and a picture: sums that are the similarity, against literal loops."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_explain_text import literal_map, unit
from text_samples import PROMPTS, built_words, tower, tower_of

from embedcam import Explainer, PairExplainer
from embedcam.errors import ImageError, InputError

KINDS = ("affine", "identity", "pooled", "other", "tokens")


def whole(receipt):
    of = receipt.query
    return of.shared + of.remainder + sum(getattr(of, "parts", {}).values())


@pytest.fixture(scope="module", params=KINDS)
def words(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *built_words(folder, request.param, tower=tower_of(request.param))


@given(
    text=st.text(min_size=1, max_size=9).filter(lambda text: text.strip()), row=st.integers(0, 11)
)
def test_a_receipt_of_any_words_adds_up(words, text, row):
    kind, explainer, _ = words
    name = explainer.index.ids[row]
    receipt = PairExplainer(explainer).text_receipt(text, name)
    f = explainer.index.embeddings([row])[0].astype(float)
    assert receipt.score == pytest.approx(f @ unit(tower_of(kind)([text])[0]), abs=1e-5)
    for values in (receipt.query.cells, receipt.query.channels):
        assert values.sum() + whole(receipt) == pytest.approx(receipt.score, abs=1e-6)
    assert sum(number for _, number in receipt.amounts(3)) == pytest.approx(receipt.score, abs=1e-6)


def test_what_positions_give_is_the_literal_loop(words):
    kind, explainer, made = words
    embed, name = tower_of(kind), explainer.index.ids[4]
    receipt = PairExplainer(explainer).text_receipt("a red car", name)
    mean = np.mean([unit(one) for one in embed(PROMPTS)], 0)
    direction = unit(embed(["a red car"])[0]) - mean
    expected = literal_map(made, explainer, name, direction, 0.0)
    np.testing.assert_allclose(
        receipt.query.cells, expected, atol=1e-8 + 2e-5 * np.abs(expected).max()
    )
    f = explainer.index.embeddings([4])[0].astype(float)
    assert (receipt.centred, receipt.shared) == (True, pytest.approx(float(f @ mean), abs=1e-5))
    above = PairExplainer(explainer).text_receipt("a red car", name, above="a dog")
    cat, dog = (unit(one) for one in embed(["a red car", "a dog"]))
    assert above.score == pytest.approx(float(f @ (cat - dog)), abs=1e-5)
    assert (above.centred, above.shared) == (False, 0.0)
    expected = literal_map(made, explainer, name, cat - dog, 0.0)
    np.testing.assert_allclose(
        above.query.cells, expected, atol=1e-8 + 2e-5 * np.abs(expected).max()
    )


def test_it_is_drawn_told_and_refused(tmp_path):
    explainer, _ = built_words(tmp_path)
    pairs, name = PairExplainer(explainer), explainer.index.ids[0]
    receipt = pairs.text_receipt("a cat", name, above="a dog")
    assert repr(receipt).startswith(f'<TextReceipt: "a cat" above "a dog" and {name}: ')
    assert receipt.save(tmp_path / "why.png").stat().st_size > 1000
    told = json.loads(json.dumps(receipt.to_dict(3)))
    assert (told["text"], told["above"], told["picture"]["id"]) == ("a cat", "a dog", name)
    assert len(told["channels"]) == 3
    given_picture = pairs.text_receipt("a cat", explainer.picture(name), texts=tower(["a cat"]))
    assert given_picture.score == pytest.approx(pairs.text_receipt("a cat", name).score, abs=1e-6)
    with pytest.raises(InputError, match="the text is empty"):
        pairs.text_receipt(" ", name)
    with pytest.raises(InputError, match="has no image"):
        pairs.text_receipt("a cat", "nobody.png")
    (tmp_path / "photos" / name).unlink()
    with pytest.raises(ImageError, match="does not exist"):
        pairs.text_receipt("a cat", name)
    assert isinstance(explainer, Explainer)
