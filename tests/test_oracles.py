"""Each oracle can fail: agrees with hand-computed numbers, and a broken formula is told apart."""

import inspect
import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import oracles
import pytest
import torch

A_ = np.array([1.0, 2.0])
P_ = np.array([2.0, 4.0])  # D = 5
N_ = np.array([-1.0, 1.0])  # D = 5, of other direction
F_ = np.array([4.0, 6.0])  # D = 25


def toy() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Two channels of 1 x 2 cells, average-pooled, times the matrix [[3, 0], [0, 4]]."""
    matrix = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    A = torch.tensor([[[1.0, 3.0]], [[0.0, 4.0]]], dtype=torch.float64)
    return (lambda a: a.mean((2, 3)) @ matrix.T), A


def check_triplets(o: ModuleType) -> None:
    assert o.margin(A_, P_, F_) == 20.0
    assert o.margin(A_, P_, N_) == 0.0
    np.testing.assert_allclose(o.margin_gradient(A_, P_, F_), 2 * (P_ - F_), atol=1e-9)
    assert o.triplet_loss(A_, P_, F_, 0.2) == 0.0
    assert o.triplet_loss(A_, P_, N_, 0.2) == pytest.approx(0.2)
    assert o.triplet_loss(A_, F_, P_, 0.2) == pytest.approx(20.2)
    # Exactly at the border the loss is zero too.
    hinges = ((P_, F_, 0.2), (P_, N_, 0.2), (P_, F_, 20.0))
    assert [o.hinge_is_satisfied(A_, *one) for one in hinges] == [True, False, True]
    # mean of (1,2), (2,4), (6,0) = (3, 2)
    rows = np.stack([A_, P_, np.array([6.0, 0.0])])
    np.testing.assert_allclose(o.centred_target(rows, 2), [3.0, -2.0])


def check_gradient(o: ModuleType) -> None:
    # z = (6, 8), f = (.6, .8), y = f . (1, 0): dy/dz = ((1,0) - .6 (.6,.8)) / 10 = (.064, -.048);
    # dy/dp = (3 * .064, 4 * -.048) = (.192, -.192); each of 2 cells takes half.
    head, A = toy()
    G = o.gradient(head, A, o.dot_score(torch.tensor([1.0, 0.0])), normalize=True, norm="through")
    np.testing.assert_allclose(G.numpy(), [[[0.096, 0.096]], [[-0.096, -0.096]]], atol=1e-15)
    score = o.dot_score(torch.tensor([1.0, 0.5]))
    for normalize, norm in ((True, "around"), (False, "through"), (False, "around")):
        G = o.gradient(head, A, score, normalize=normalize, norm=norm)
        np.testing.assert_allclose(G.numpy(), [[[1.5, 1.5]], [[1.0, 1.0]]], atol=1e-15)
    # The cotangent at f = (.6, .8) of the margin is 2 (p - n), wherever f is.
    p, n = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    G = o.gradient(head, A, o.margin_score(p, n), normalize=True, norm="around")
    np.testing.assert_allclose(G.numpy(), [[[3.0, 3.0]], [[-4.0, -4.0]]], atol=1e-14)


def check_channels(o: ModuleType) -> None:
    G = torch.tensor([[[0.5, 1.0], [0.0, -2.0]]], dtype=torch.float64)
    A = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]], dtype=torch.float64)
    np.testing.assert_allclose(o.gradcam_weights(G), [-0.125])
    # S = 4: .5 / (2 + 2) + 1 / (2 + 4) ; zero and negative gradients add nothing
    np.testing.assert_allclose(o.gradcampp_weights(G, A), [0.125 + 1 / 6])
    np.testing.assert_allclose(o.gradcampp_weights_as_printed(G, A), [0.125 + 1 / 6])
    tiny = o.gradcampp_weights_as_printed(G * 1e-6, A)
    np.testing.assert_allclose(tiny, [0.75e-6], rtol=1e-4)
    # Negative activations do not take part in S.
    A[0, 0, 1] = -7.0
    np.testing.assert_allclose(o.gradcampp_weights(G, A), [0.125 + 1 / 6])


def check_averaged(o: ModuleType) -> None:
    # Not normalised, the weights of a triplet are W^T 2 (p - n) / Z, W = diag(3, 4), Z = 2.
    rows = np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 6.0], [-1.0, 1.0]])
    both, first = [(1, 2), (1, 3)], [(1, 2)]
    # The mean of the weights is not the weight of the mean (S = 4, 4): 18 / (2 + 72) and so on.
    plusplus = [2 * 9 / (2 + 4 * 9) / 2, 2 * 12 / (2 + 4 * 12) / 2]
    for triplets, choices, count, expected in (
        (both, {}, 2, [(-6.0 + 9.0) / 2, (-8.0 + 12.0) / 2]),
        (both, {"hinge": 0.2}, 1, [9.0, 12.0]),
        (both, {"method": "gradcam++"}, 2, plusplus),
        (first, {"hinge": 0.2}, 0, [0.0, 0.0]),
    ):
        w, used = o.averaged_weights(*toy(), rows[0], rows, triplets, normalize=False, **choices)
        assert used == count
        np.testing.assert_allclose(w, expected)


def check_choice(o: ModuleType) -> None:
    assert o.every_triplet(["a", "b", "a", "c"], 0) == [(2, 1), (2, 3)]
    rows = np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 6.0], [-1.0, 1.0]])
    np.testing.assert_allclose(o.mean_cotangent(rows, [(1, 2), (1, 3)]), [1.0, 1.0])
    rows, labels = np.array([[0.0], [1.0], [1.05], [2.0], [0.5]]), ["a", "a", "b", "b", "b"]
    allowed = [o.semihard_allows(rows, labels, 0, 1, n, 0.2) for n in (2, 3, 4)]
    assert allowed == [True, False, False]
    assert [o.semihard_allows(rows, labels, 0, 1, n, 0.01) for n in (2, 3)] == [True, False]
    assert o.nearest(np.array([[0.0], [3.0], [1.0], [2.0]]), 0, [0, 1, 2, 3], 2) == [2, 3]
    # printf '0\0a' | b2sum -l 64: 15d8..., of b 5d3e, c 00da, d 1449, of e with an accent fce4;
    # of the seed 1 5249, 480e, f533, 0075, 0f6a.
    assert [o.sample([*"abcd\xe9"], seed, 2) for seed in (0, 1)] == [[2, 3], [3, 4]]


def check_encoding(o: ModuleType) -> None:
    w = np.array([0.1, -5.0, 3.0, 2.0])
    np.testing.assert_array_equal(o.top_m(w, 2, "signed"), [0, 0, 3, 2])
    np.testing.assert_array_equal(o.top_m(w, 2, "magnitude"), [0, -5, 3, 0])
    np.testing.assert_array_equal(o.top_m(np.array([1.0, 1.0]), 1, "signed"), [1, 0])
    np.testing.assert_array_equal(o.top_m(w, 9, "signed"), w)
    basis = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    got = o.low_rank_decode(np.array([2.0, -1.0]), basis, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(got, [2.0, -0.5, 4.0])
    rows = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert o.best_rank_error(rows, np.zeros(2), 1) == pytest.approx(2.0)
    assert o.best_rank_error(rows, np.zeros(2), 2) == 0.0
    assert o.best_rank_error(rows + 5, np.array([5.0, 5.0]), 1) == pytest.approx(2.0)
    # A tie goes to the even neighbour.
    assert [o.half(x) for x in (1 + 2**-11, 1 + 3 * 2**-11, 1e-9)] == [1.0, 1 + 2**-9, 0.0]
    bound = o.half_bound(np.array([-2.0, 1.0, 0.0]))
    np.testing.assert_allclose(bound, [2**-10, 2**-11, 2**-24], rtol=2e-3)


def check_transfer(o: ModuleType) -> None:
    rows = np.array([[3.0, 4.0], [0.0, 2.0]])
    np.testing.assert_allclose(o.transfer_mean(rows), [0.3, 0.9])
    np.testing.assert_allclose(o.transfer_mean(rows[:1]), [3.0, 4.0])
    np.testing.assert_allclose(o.transfer_mean(np.vstack([rows, [[0.0, 0.0]]])), [0.3, 0.9])
    np.testing.assert_allclose(o.rival_weights(*rows), [0.6, -0.2])
    np.testing.assert_allclose(o.rival_weights(rows[0], np.zeros(2)), [0.6, 0.8])
    # Euclidean distances 1 and 3: shares 3/4 and 1/4
    np.testing.assert_allclose(o.transfer_distance(rows, [1.0, 9.0]), [0.45, 0.85])
    np.testing.assert_allclose(o.transfer_distance(rows, [1.0, 0.0]), [0.0, 1.0])
    np.testing.assert_allclose(o.transfer_distance(rows[:1], [9.0]), [3.0, 4.0])


def check_maps(o: ModuleType) -> None:
    A = np.array([[[1.0, 2.0]], [[3.0, 0.0]]])
    np.testing.assert_allclose(o.cam(np.array([1.0, -1.0]), A), [[0.0, 2.0]])
    np.testing.assert_allclose(o.min_max(np.array([[2.0, 4.0, 3.0]])), [[0, 1, 0.5]])
    np.testing.assert_allclose(o.min_max(np.array([[2.0, 2.0]])), [[0, 0]])
    mask = np.array([[1.0, 0.0, 0.5, 0.0]])
    assert o.energy_in_mask(np.array([[1.0, 2.0, 2.0, 3.0]]), mask) == 0.25
    assert o.energy_in_mask(np.zeros((1, 4)), mask) == 0.375
    box = o.box_mask((0.5, -1.0, 2.0, 1.0), 2, 3)
    np.testing.assert_allclose(box, [[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])


def check_resizing(o: ModuleType) -> None:
    # [0, 4] stretched to four: 0, 1, 3, 4; with aligned corners it would be 0, 1.3, 2.7, 4
    np.testing.assert_allclose(o.bilinear(np.array([[0.0, 4.0]]), 1, 4), [[0, 1, 3, 4]])
    np.testing.assert_allclose(o.bilinear(np.array([[0.0], [4.0]]), 4, 1), [[0], [1], [3], [4]])
    row = np.array([[1.0, 2.0, 6.0]])
    np.testing.assert_allclose(o.area_average(row, 1, 2), [[4 / 3, 14 / 3]])
    np.testing.assert_allclose(o.area_average(row.T, 2, 1), [[4 / 3], [14 / 3]])


# (function, what is printed, what it is broken to, the check that must notice)
BREAKS = [
    ("squared_distance", "(x - y) * (x - y)", "abs(x - y)", check_triplets),
    ("triplet_loss", "delta, 0.0", "delta, -9.0", check_triplets),
    ("triplet_loss", "(a, p) -", "(a, p) +", check_triplets),
    ("margin", "squared_distance(a, n) -", "-squared_distance(a, n) +", check_triplets),
    ("margin_gradient", "(2 * step)", "step", check_triplets),
    ("hinge_is_satisfied", "delta) == 0.0", "0.0) == 0.0", check_triplets),
    ("hinge_is_satisfied", "== 0.0", "< 0.0", check_triplets),
    ("centred_target", "total / n", "total / (n - 1)", check_triplets),
    ("gradient", "score(z / z.norm()), A", "score(z), A", check_gradient),
    ("gradient", "score(z / z.norm())", "score(z / z.norm().detach())", check_gradient),
    ("gradient", "(z * at_f)", "(z / z.norm() * at_f)", check_gradient),
    ("margin_score", "n.double()) - _", "n.double()) + _", check_gradient),
    ("dot_score", "f * c", "f + c", check_gradient),
    ("gradcam_weights", "/ (H * W)", "/ H", check_channels),
    ("gradcam_weights", "float(G[k, i, j])", "max(float(G[k, i, j]), 0)", check_channels),
    ("gradcampp_weights", "2.0 + S * g", "2.0 + S * g + 0.01", check_channels),
    ("gradcampp_weights", "max(float(activations[k, i, j]), 0.0)", "0.3", check_channels),
    ("gradcampp_weights", "2.0 + S", "2.0 + float(activations[k, i, j])", check_channels),
    ("gradcampp_weights", "g > 0.0", "True", check_channels),
    ("gradcampp_weights_as_printed", "2.0 * g**2", "1e-6 + 2.0 * g**2", check_channels),
    ("gradcampp_weights_as_printed", "max(g, 0.0)", "g", check_channels),
    ("averaged_weights", "continue", "pass", check_averaged),
    ("averaged_weights", "total / used", "total / len(triplets)", check_averaged),
    ("averaged_weights", "method=method, ", "", check_averaged),
    ("target_weights", "gradcampp_weights(G, a", "gradcampp_weights(G, 2 * a", check_averaged),
    ("every_triplet", "p == anchor or ", "", check_choice),
    ("every_triplet", "label_n != labels[anchor]", "True", check_choice),
    ("mean_cotangent", "2.0 * (", "(", check_choice),
    ("mean_cotangent", "p, d]) -", "p, d]) +", check_choice),
    ("top_m", "abs(here), abs(there)", "here, there", check_encoding),
    ("top_m", "here > there", "here >= there", check_encoding),
    ("top_m", "min(m, len(weights))", "min(m + 1, len(weights))", check_encoding),
    ("low_rank_decode", "float(offset[k])", "0.0", check_encoding),
    ("low_rank_decode", "basis[r, k]", "basis[r, 0]", check_encoding),
    ("best_rank_error", "max(K - rank, 0)", "rank", check_encoding),
    ("best_rank_error", "row - offset, row - offset", "row, row", check_encoding),
    ("half", '"<e"', '"<f"', check_encoding),
    ("half_bound", "2.0**-11", "2.0**-10", check_encoding),
    ("half_bound", "2.0**-25", "2.0**-30", check_encoding),
    ("transfer_mean", "/ length", "", check_transfer),
    ("transfer_mean", "len(rows) == 1", "False", check_transfer),
    ("transfer_mean", "len(counted)", "len(rows)", check_transfer),
    ("rival_weights", "/ ours", "", check_transfer),
    ("rival_weights", "/ theirs", "/ ours", check_transfer),
    ("rival_weights", "-= float", "+= float", check_transfer),
    ("l2_norm", "float(v) ** 2", "abs(float(v))", check_transfer),
    ("distance_shares", "math.sqrt(s)", "s", check_transfer),
    ("distance_shares", "1.0 if e else 0.0", "1.0", check_transfer),
    ("transfer_distance", "/ length", "", check_transfer),
    ("transfer_distance", "len(rows) == 1", "False", check_transfer),
    ("cam", "max(total, 0.0)", "total", check_maps),
    ("cam", "float(weights[k]) *", "abs(float(weights[k])) *", check_maps),
    ("bilinear", "(j + 0.5) * w / width - 0.5", "j * (w - 1) / (width - 1)", check_resizing),
    ("bilinear", "(i + 0.5) * h / height - 0.5", "i * h / height", check_resizing),
    ("bilinear", "fx = x - x0", "fx = round(x - x0)", check_resizing),
    ("area_average", "area = _overlap(y0, y1, r, r + 1) *", "area =", check_resizing),
    ("area_average", "area * float", "(area > 0.6) * float", check_resizing),
    ("_overlap", "max(a0, b0)", "b0", check_maps),
    ("min_max", "np.zeros(image.shape)", "image", check_maps),
    ("min_max", "(v - low)", "v", check_maps),
    ("energy_in_mask", "/ (H * W)", "", check_maps),
    ("energy_in_mask", "* float(mask[i, j])", "* (float(mask[i, j]) > 0)", check_maps),
    ("box_mask", "_overlap(x0, x1, j, j + 1)", "1", check_maps),
    ("semihard_allows", "d_p < d[i] < d_p + delta", "d[i] < d_p + delta", check_choice),
    ("semihard_allows", "d_p < d_n < d_p + delta", "d_n < d_p + delta", check_choice),
    ("semihard_allows", "d_n == min(beyond)", "True", check_choice),
    ("nearest", "if i != a", "", check_choice),
    ("nearest", "[:k]", "", check_choice),
    ("sample", '"big"', '"little"', check_choice),
    ("sample", "digest_size=8", "digest_size=16", check_choice),
    ("sample", "(seed, name", "(0, name", check_choice),
]  # fmt: skip
CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]


def assert_told_apart(module: ModuleType, row: tuple[str, str, str, Callable]) -> None:
    """One piece of one function's text is another in a copy of the module: its check must fail."""
    function, printed, replaced, check = row
    whole, source = inspect.getsource(module), inspect.getsource(getattr(module, function))
    head, body = source.split("\n", 1)
    assert printed in body, f"{function} no longer holds {printed!r}: bring this row up to date"
    changed = head + "\n" + body.replace(printed, replaced)
    wrong = ModuleType("broken_oracles")
    exec(compile(whole.replace(source, changed), "broken_oracles", "exec"), wrong.__dict__)
    # An error of another kind would be a break that does not run, which shows nothing.
    with pytest.raises(AssertionError):
        check(wrong)


def assert_all_can_fail(module: ModuleType, rows: list, checks: list[Callable]) -> None:
    """Each oracle is broken, each check has failed, and no code that is judged is imported."""
    functions = inspect.getmembers(module, inspect.isfunction)
    own = {name for name, value in functions if value.__module__ == module.__name__}
    assert own - {"_distance"} == {row[0] for row in rows}
    assert set(checks) == {row[3] for row in rows}
    assert not re.search(r"^(from|import) embedcam", inspect.getsource(module), re.MULTILINE)


def numbered(row: tuple[str, str, str, Callable]) -> str:
    return f"{row[0]}: {row[1]}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_an_oracle_gives_the_numbers_of_the_hand_calculation(check) -> None:
    check(oracles)


@pytest.mark.parametrize("row", BREAKS, ids=numbered)
def test_a_broken_oracle_is_told_apart(row) -> None:
    assert_told_apart(oracles, row)


def test_every_oracle_and_every_check_can_fail() -> None:
    assert_all_can_fail(oracles, BREAKS, CHECKS)


def test_the_two_forms_of_gradcampp_agree_where_activations_are_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) * 1e-4
    A = torch.rand(5, 3, 4, generator=generator, dtype=torch.float64)
    printed = oracles.gradcampp_weights_as_printed(G, A)
    np.testing.assert_allclose(oracles.gradcampp_weights(G, A), printed, rtol=1e-10)


def test_resizing_agrees_with_torch() -> None:
    image = np.random.default_rng(0).random((6, 8))
    there = torch.from_numpy(image)[None, None]
    for to in ((7, 9), (3, 2), (11, 4)):
        wanted = torch.nn.functional.interpolate(there, to, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(oracles.bilinear(image, *to), wanted[0, 0].numpy(), atol=1e-12)
    # Area averaging where cells divide.
    wanted = torch.nn.functional.adaptive_avg_pool2d(there[0], (3, 2))
    np.testing.assert_allclose(oracles.area_average(image, 3, 2), wanted[0].numpy(), atol=1e-12)
