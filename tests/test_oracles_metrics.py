"""Each oracle of the metrics can fail: break a line of it, and the comparison must notice."""

import metrics_cases as cases
import numpy as np
import oracles_metrics as oracles
import pytest
from test_oracles import assert_all_can_fail, assert_told_apart, numbered

# (function, what is printed, what it is broken to, the comparison that must notice)
BREAKS = [
    ("pointing", "== best", ">= 0.9 * best", cases.compare_localisation),
    ("pointing", "hits / count", "float(hits > 0)", cases.compare_localisation),
    ("marked", ">= limit", ">= limit - 0.25", cases.compare_localisation),
    ("marked", "threshold * max", "threshold * sum", cases.compare_localisation),
    ("iou", "- m * r", "", cases.compare_localisation),
    ("iou", "both += m * r", "both += m * (r > 0)", cases.compare_localisation),
    ("best_iou", "score > best + 1e-12", "score >= best - 1e-12", cases.compare_localisation),
    ("best_iou", "score > best", "score < best", cases.compare_localisation),
    ("largest_box", "1)]", "1) if dr * dc == 0]", cases.compare_localisation),
    ("largest_box", "len(part) > len", "len(part) >= len", cases.compare_localisation),
    ("largest_box", "max(rows) + 1", "max(rows)", cases.compare_localisation),
    ("boxes_iou", "width > 0 and height > 0", "width * height > 0", cases.compare_boxes),
    ("boxes_iou", " - both", "", cases.compare_boxes),
    ("found_share", ">= least", "> least", cases.compare_boxes),
    ("auc", "won += weight / 2", "won += weight", cases.compare_auc),
    ("auc", "else 0.5", "else 0.0", cases.compare_auc),
    ("auc", "* float(other.flat[j])", "", cases.compare_auc),
    ("ap", "inside += float(mask.flat[j])", "inside += 1", cases.compare_ap),
    ("ap", "/ reached", "/ image.size", cases.compare_ap),
    ("hottest", "min(1.0, left / len(same))", "1.0", cases.compare_hottest),
    ("hottest", "reverse=True", "reverse=False", cases.compare_hottest),
    ("equal_areas", "total / area if area", "total if area", cases.compare_equal_areas),
    ("equal_areas", "return 0.5", "return 0.0", cases.compare_equal_areas),
    ("order", "(-values[p], p)", "(-values[p], -p)", cases.compare_removal),
    ("order", "-values[p], p", "values[p], p", cases.compare_removal),
    ("first_pixels", "+ Fraction(1, 2)", "", cases.compare_removal),
    ("area_under", "(left + right) / 2", "left", cases.compare_curves),
    ("area_under", "/ steps", "", cases.compare_curves),
    ("place", "reverse=True", "reverse=False", cases.compare_ranks),
    ("place", "sum(places) / len(places)", "min(places)", cases.compare_ranks),
    ("drop", "y <= y_base", "y < y_base - 1", cases.compare_scores),
    ("drop", "max(0.0, y - y_masked)", "(y - y_masked)", cases.compare_scores),
    ("drop", ", 1.0)", ", 9.0)", cases.compare_scores),
    ("drop", "(y - y_base), 1", "y if y else 1.0, 1", cases.compare_scores),
    ("mean_drop", "len(counted)", "len(drops)", cases.compare_scores),
    ("increase", "after > before", "after >= before", cases.compare_scores),
    ("impute", "weight / total * float", "weight * float", cases.compare_imputation),
    ("impute", "1 / 12", "1 / 6", cases.compare_imputation),
    ("impute", "if mask[where]", "if False", cases.compare_imputation),
    ("found_by", "(total, i))", "(total, -i))", cases.compare_recall),
    ("found_by", "(x - y) * (x - y)", "abs(x - y)", cases.compare_map_at_r),
    ("labels_found", "queries, q)", "queries, None)", cases.compare_recall),
    ("recall", "near[:k]", "near[: k + 1]", cases.compare_recall),
    ("labels_found", "gallery_labels[i] for", "labels[i % 9] for", cases.compare_recall),
    ("precision_at_r", "if hits[i - 1]", "if True", cases.compare_map_at_r),
    ("precision_at_r", "total / r", "total / max(sum(hits[:r]), 1)", cases.compare_map_at_r),
    ("map_r", "len(scores)", "len(queries)", cases.compare_map_at_r),
    ("cosine", "norm_a * norm_b)", "norm_a * norm_a)", cases.compare_agreement),
    ("cosine", "norm_a > 0 and", "norm_a > 0.5 and", cases.compare_agreement),
    ("correlation", "x - mean_a", "x", cases.compare_agreement),
    ("correlation", "return 0.0", "return 1.0", cases.compare_agreement),
    ("rank_correlation", "sum(u == v for u in values)", "1", cases.compare_agreement),
    ("rank_correlation", "ranks(a), ranks(b)", "a, b", cases.compare_agreement),
    ("top_iou", "if values[p] > min(values)", "", cases.compare_agreement),
    ("top_iou", "max(1, math", "max(0, math", cases.compare_agreement),
    ("top_iou", "+ 0.5", "", cases.compare_agreement),
    ("interval_of_mean", "(1 - level) / 2,", "(1 - level),", cases.compare_interval),
    ("interval_of_mean", "(at - low) *", "", cases.compare_interval),
    ("win_rate", "0.5 if x == y", "1.0 if x == y", cases.compare_scores),
]  # fmt: skip


@pytest.mark.parametrize("compare", cases.COMPARISONS, ids=lambda c: c.__name__)
def test_the_metrics_are_the_loops(compare) -> None:
    compare(oracles)


@pytest.mark.parametrize("row", BREAKS, ids=numbered)
def test_a_broken_loop_is_told_apart(row) -> None:
    assert_told_apart(oracles, row)


def test_every_loop_and_every_comparison_can_fail() -> None:
    assert_all_can_fail(oracles, BREAKS, cases.COMPARISONS)


def test_hand_calculations() -> None:
    image = np.array([[0.0, 1.0, 4.0], [0.0, 0.0, 2.0]])
    mask = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.5]])
    assert oracles.pointing(image, mask) == 1.0
    assert oracles.best_iou(image, mask, [0.2, 0.5, 1.0]) == (0.75, 0.5)
    assert oracles.largest_box(image, 0.5) == (2, 0, 3, 2)
    assert oracles.boxes_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 2 / 6
    assert oracles.found_share([(0, 0, 2, 2)] * 2, [(0, 0, 2, 1), (1, 0, 3, 2)], 0.5) == 0.5
    whole = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert oracles.auc(image, whole, 1 - whole) == 1.0
    assert oracles.auc(image, 1 - mask, mask) == pytest.approx((3 * 0 + 0.5 * 0.25) / (4.5 * 1.5))
    assert oracles.ap(image, np.eye(2, 3)) == pytest.approx((2 / 6 + 2 / 6) / 2)
    assert oracles.hottest(image, whole, 3.0) == 2 / 3
    assert oracles.equal_areas(image, whole, 1 - whole) == 3 / (3 + 1 / 4)
    assert oracles.area_under([1.0, 0.0, 0.0]) == 0.25
    assert oracles.place([0.5, 0.9, 0.5, 0.1], 2) == 2.5
    assert oracles.drop(-1.0, -2.0, -3.0) == 0.5
    assert oracles.mean_drop([1.0, 0.0], [0.5, 9.0], [0.0, 0.0]) == 0.5
    # One hole in the corner: a direct neighbour on either side and one across, of weights 2 2 1.
    corner = np.array([[[0.0, 1.0], [2.0, 10.0]]])
    hole = np.array([[True, False], [False, False]])
    assert oracles.impute(corner, hole)[0, 0, 0] == pytest.approx((2 * 1 + 2 * 2 + 10) / 5)
    rows = np.array([[0.0], [1.0], [3.0]])
    assert oracles.recall(rows, ["a", "b", "a"], 2) == 2 / 3
    assert oracles.precision_at_r([True, False, True, True]) == pytest.approx((1 + 2 / 3) / 3)
    assert oracles.map_r(rows, ["a", "a", "b"]) == 1.0
    assert oracles.cosine([3.0, 4.0], [4.0, 3.0]) == 24 / 25
    assert oracles.correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    assert oracles.rank_correlation([1.0, 2.0, 9.0], [1.0, 9.0, 2.0]) == pytest.approx(0.5)
    assert oracles.top_iou(image, image[::-1], 1 / 3) == 1.0
    assert oracles.win_rate([1.0, 2.0, 3.0], [1.0, 1.0, 4.0]) == 0.5
