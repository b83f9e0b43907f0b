"""Recall@K and mAP@R by their laws and closed forms."""

import metrics_cases
import numpy as np
import oracles_metrics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcam.errors import InputError
from embedcam.metrics import map_at_r, recall_at_k, recalls_at, retrieval


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(4, 14))
def test_laws_of_both(seed, n) -> None:
    rng = np.random.default_rng(seed)
    # Random numbers hardly tie, so that the order of storage does not matter.
    embeddings, labels = rng.normal(size=(n, 3)), rng.integers(0, 2, n)
    labels[:2] = 0
    both = recalls_at(embeddings, labels, [1, 2]), map_at_r(embeddings, labels)
    assert 0 <= both[1] <= 1
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = rng.permutation(n)
    for other, names in [
        (embeddings @ turn * 4, labels),
        (embeddings[moved], labels[moved]),
        (embeddings, np.array(["a", "b"])[labels]),
        (embeddings * 2.0**600, labels),
    ]:
        assert recalls_at(other, names, [1, 2]) == pytest.approx(both[0])
        assert map_at_r(other, names) == pytest.approx(both[1])


def test_blocks_change_nothing(monkeypatch) -> None:
    rows, labels = metrics_cases.some_items(3, 40)
    whole = recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)
    monkeypatch.setattr(retrieval, "BLOCK", 7 * 40)
    assert (recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)) == whole
    metrics_cases.compare_recall(oracles_metrics)
    metrics_cases.compare_map_at_r(oracles_metrics)
    # A gallery larger than a block still goes, one query at a time.
    monkeypatch.setattr(retrieval, "BLOCK", 3)
    assert (recalls_at(rows, labels, [1, 5]), map_at_r(rows, labels)) == whole


def test_recall_over_many_images() -> None:
    labels = np.repeat(np.arange(600), 2)
    embeddings = np.stack([labels * 10.0, np.tile([0.0, 1.0], 600)], axis=1)
    assert recall_at_k(embeddings, labels) == 1.0
    assert map_at_r(embeddings, labels) == 1.0
    assert recall_at_k(embeddings, np.arange(1200)) == 0.0
    # Only the last class is torn apart: 2 of 1200 miss.
    embeddings[-1] = [-5.0, 0.0]
    assert recall_at_k(embeddings, labels) == pytest.approx(1198 / 1200)
    assert map_at_r(embeddings, labels) == pytest.approx(1198 / 1200)


def test_an_image_never_finds_itself() -> None:
    assert recall_at_k(np.zeros((3, 2)), np.arange(3), 2) == 0.0
    # Among a gallery that holds it, it does.
    assert recall_at_k(np.eye(3), np.arange(3), 1, np.eye(3), np.arange(3)) == 1.0
    assert map_at_r(np.eye(3), np.arange(3), np.eye(3), np.arange(3)) == 1.0


def test_map_at_r_in_closed_form() -> None:
    # The query at 0 has R = 3; of its three nearest the first and the third are its own.
    query, gallery = [[0.0]], [[1.0], [2.0], [3.0], [4.0]]
    score = map_at_r(query, ["a"], gallery, ["a", "b", "a", "a"])
    assert score == pytest.approx((1 + 2 / 3) / 3)
    # All wrong before the right ones.
    assert map_at_r(query, ["a"], gallery, ["b", "b", "a", "a"]) == 0.0


def test_an_image_alone_with_its_label() -> None:
    """It misses in recall, and has no precision to average."""
    embeddings, labels = np.array([[0.0], [1.0], [9.0]]), ["a", "a", "b"]
    assert recall_at_k(embeddings, labels) == pytest.approx(2 / 3)
    assert map_at_r(embeddings, labels) == 1.0


TWO = np.eye(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_at_k(np.zeros((3, 2)), np.zeros(3), 3), "k = 3 with 3 images; k must be 1"),
        (lambda: recall_at_k(np.zeros((3, 2)), np.zeros(3), 0), "k = 0 with 3 images"),
        (lambda: recall_at_k(TWO, [0, 1], 3, TWO, [0, 1]), "k = 3 with 2 images; k must be 1 to G"),
        (lambda: recalls_at(TWO, [0, 1], []), r"no k; give one or more, as \[1, 5, 10\]"),
        (lambda: recalls_at(TWO, [0, 1], [0.5]), "k = 0.5 with 2 images; k must be"),  # type: ignore[list-item]
        (lambda: recall_at_k(TWO, [0]), r"labels \[1\] with embeddings \[2, 2\]; give one label a"),
        (lambda: recall_at_k(TWO * np.nan, [0, 1]), "embeddings must be finite"),
        (lambda: recall_at_k(TWO[0], [0, 1]), r"embeddings \[2\] must be \[N D\]"),
        (lambda: map_at_r(TWO, [0, np.nan]), "a label is NaN, which equals nothing"),
        (lambda: map_at_r(TWO, [0, 1]), "none of 2 images has another of its label, .* not ids"),
        (lambda: map_at_r(TWO, [0, 1], TWO), "a gallery needs its labels, .* give both"),
        (lambda: map_at_r(TWO, [0, 1], np.eye(3), [0, 1, 2]), "differ in width; take both from on"),
        (lambda: map_at_r(TWO, [0, 1], TWO, ["0", "1"]), "never match; give both as strings or as"),
        (lambda: map_at_r(TWO, [0, 1], TWO, [0]), r"labels \[1\] with gallery \[2, 2\]"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
