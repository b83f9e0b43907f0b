"""The small transformers of scripts/experiments: what they learn from, and that it is one."""

import numpy as np
import pytest
import torch
from PIL import Image

from embedcam.demo.digits_network import save_weights
from embedcam.demo.scenes import SceneMaker
from embedcam.metrics import box_mask
from scripts.experiments import small_vit, transformers
from scripts.experiments.small_vit import GRID, SIDE, Scenes, Sizes

SIZES = Sizes(width=16, depth=2, embedding=8, scenes=30, batch=20, steps=4, text_steps=3)


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return small_vit.train_vit(SIZES, seed=1, progress=False)


def test_training_gives_one_result_and_leaves_the_random_state(vit) -> None:
    before = torch.get_rng_state()
    again = small_vit.train_vit(SIZES, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    other = small_vit.train_vit(SIZES, seed=2, progress=False)
    for name, values in vit.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name
    assert not torch.equal(vit.head.weight, other.head.weight)


def test_towers_are_trained_from_the_vit_on_and_read_back(vit, tmp_path) -> None:
    towers = small_vit.train_towers(vit, SIZES, seed=1, progress=False)
    again = small_vit.train_towers(vit, SIZES, seed=1, progress=False)
    assert all(
        torch.equal(*pair) for pair in zip(towers.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(towers.pictures.head.weight, vit.head.weight)
    save_weights(towers, tmp_path / "two-towers.safetensors")
    network = small_vit.two_towers(tmp_path / "two-towers.safetensors")
    assert network.layer == "pictures.blocks.1.norm1"
    image = Image.fromarray(SceneMaker(1, SIDE).scene("pair", 0).pixels)
    made = network.forward(network.preprocess(image)[None])
    assert made.activations.shape == (1, 16, GRID, GRID)
    with torch.no_grad():
        expected = towers(torch.from_numpy(network.preprocess(image))[None])
        texts = towers.embed_texts(["a two", "two handwritten"])
    expected = torch.nn.functional.normalize(expected, dim=1)
    torch.testing.assert_close(made.embedding, expected, rtol=1e-4, atol=1e-5)
    found = network.embed_texts(["Two!", "handwritten two"])
    lengths = torch.linalg.vector_norm(texts, dim=1, keepdim=True)
    np.testing.assert_allclose(found, texts / lengths, rtol=1e-4, atol=1e-5)


def test_training_sees_no_handwriting_of_queries() -> None:
    maker = SceneMaker(0, SIDE)
    samples = {
        split: {sample.tobytes() for digit in digits for sample in digit}
        for split, digits in maker._digits.items()
    }
    assert not samples["train"] & (samples["gallery"] | samples["query"])
    for split in ("gallery", "query"):
        maker._digits[split] = [[] for _ in range(10)]  # drawing one of them fails from here on
    assert [len(maker.scene("train", n, two).digits) for n, two in ((3, True), (3, None))] == [2, 1]
    with pytest.raises(ValueError, match="high"):
        maker.scene("pair", 3)


def test_scenes_are_of_the_digits_they_show(vit) -> None:
    scenes, maker = Scenes(0, 40, progress=False), SceneMaker(0, SIDE)
    for number, shown in enumerate(scenes.shares(np.arange(40)).numpy()):
        labels = [int(one.label) for one in maker.scene("train", number, number >= 20).digits]
        np.testing.assert_allclose(shown, np.bincount(labels, minlength=10) / len(labels))


def test_the_loss_is_the_cross_entropy_of_cosines() -> None:
    rng = np.random.default_rng(0)
    found, classes = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (3, 10))
    shown = torch.from_numpy(rng.dirichlet(np.ones(10), 3))
    lost = []
    for one, shares in zip(found, shown.numpy(), strict=True):
        cosines = [float(one @ each / (one.norm() * each.norm())) for each in classes]
        powers = np.exp(small_vit.SCALE * np.array(cosines))
        lost.append(-float(shares @ np.log(powers / powers.sum())))
    got = small_vit.classified(found, classes, shown)
    np.testing.assert_allclose(float(got), np.mean(lost))


def test_captions_name_digits_that_are_there() -> None:
    scenes = Scenes(0, 20, progress=False)
    named = [scenes.caption(number) for number in range(20) for _ in range(5)]
    for number, (text, digits) in enumerate(named):
        assert digits <= set(scenes.digits[number // 5])
        words = {small_vit.NUMBERS.index(one) for one in text.split() if one in small_vit.NUMBERS}
        assert words | {int(one) for one in text.split() if one.isdigit()} == digits
    assert {len(digits) for _, digits in named[50:]} == {1, 2}
    assert {len(digits) for _, digits in named[:50]} == {1}


def test_scores_are_of_the_digit_asked_for() -> None:
    left, right = (box_mask(box, (SIDE, SIDE)) for box in ((5, 5, 25, 30), (45, 30, 75, 60)))
    own, other = np.stack([left, right]), np.stack([right, left])
    about = transformers.Asked(np.zeros((2, 1)), own, other, np.array(["1", "2"]))
    only_left = np.stack([left, left]) - 0.5
    found = list(transformers.scored(only_left, about).values())
    area, all_ = right.sum(), SIDE * SIDE
    tied = (all_ - area - left.sum()) / (all_ - area) / 2  # the right one is as the rest is
    np.testing.assert_allclose(np.concatenate(found), [0.5, (1 + tied) / 2, 0.5])
    alone = about._replace(other=np.zeros_like(other))
    auc, hottest = transformers.scored(own, alone).values()
    np.testing.assert_allclose(auc, 1)
    fifth = all_ / 5
    expected = [(one.sum() + 0) / fifth if one.sum() < fifth else 1 for one in own]
    np.testing.assert_allclose(hottest, expected)
