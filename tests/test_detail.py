"""A finer map of a query: shown larger once more, joined, from pictures, inputs and features."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photo_samples import SIDE, build, picture, write_photos
from torch import nn

from embedcam import EmbeddingNetwork, Explainer, Preprocess, Recipe
from embedcam.errors import InputError, NetworkError
from embedcam.explain.queries import finer_activations, larger_input
from embedcam.ops import area_average, joined, resize, signed_cam
from embedcam.preprocess import custom


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, network: EmbeddingNetwork) -> Path:
    folder = tmp_path_factory.mktemp("detail")
    return build(write_photos(folder / "photos"), folder / "index", network, Recipe(norm="around"))


def test_both_maps_are_joined_and_the_search_stays(index: Path, network: EmbeddingNetwork) -> None:
    query = picture(0, 7)
    with Explainer(index, network) as explainer:
        plain, fine = explainer.explain(query), explainer.explain(query, detail=2)
        assert (fine.ids, fine.trust) == (plain.ids, plain.trust)
        np.testing.assert_array_equal(fine.weights, plain.weights)
    size, prepared = (SIDE, SIDE), network.preprocess(query)
    larger = larger_input(query, prepared, network.preprocess)
    assert larger.shape == (3, 2 * SIDE, 2 * SIDE)
    features = [network.forward(one[None]) for one in (prepared, larger)]
    first, second = (one.activations[0].numpy() for one in features)
    coarse = signed_cam(plain.weights, first)
    expected = joined(coarse, signed_cam(plain.weights, second))
    assert expected.shape == tuple(2 * side for side in coarse.shape)
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(fine.signed_cam, resize(expected, size), atol=tolerance)
    drawn = resize(np.maximum(expected, 0), size)
    np.testing.assert_allclose(fine.cam, drawn, atol=tolerance)
    assert np.abs(fine.signed_cam - plain.signed_cam).max() > 10 * tolerance
    np.testing.assert_allclose(plain.signed_cam, resize(coarse, size), atol=tolerance)
    with Explainer(index, None) as explainer:
        vector = features[0].embedding[0].numpy()
        again = explainer.explain_features(vector, first, size=size, detail_activations=second)
        np.testing.assert_allclose(again.cam, fine.cam, atol=tolerance)
        with pytest.raises(InputError, match="coarser than the activations'"):
            explainer.explain_features(vector, second, detail_activations=first)


def test_the_signed_map_is_in_json_on_request(index: Path, network: EmbeddingNetwork) -> None:
    with Explainer(index, network) as explainer:
        made = explainer.explain(picture(0, 7))
    plain, whole = made.to_dict(), made.to_dict(signed=True)
    np.testing.assert_array_equal(np.float32(whole.pop("signed_cam")), made.signed_cam)
    assert whole == plain
    small = made.to_dict((4, 4), signed=True)["signed_cam"]
    assert np.min(small) < 0
    atol = 1e-5 * np.abs(small).max()
    np.testing.assert_allclose(small, area_average(made.signed_cam, (4, 4)), atol=atol)


def test_a_batch_and_an_explainer_of_its_own_detail(index: Path, network: EmbeddingNetwork) -> None:
    query = picture(0, 7)
    with Explainer(index, network, detail=2) as explainer:
        several, one = explainer.explain_batch([picture(1, 7), query]), explainer.explain(query)
        coarse = explainer.explain(query, detail=1)
        inputs = network.preprocess(query)
        larger = larger_input(query, inputs, network.preprocess)
        given = explainer.explain_batch(inputs[None], larger=[larger])[0]
    scale = 1e-4 * float(one.cam.max())
    np.testing.assert_allclose(several[1].cam, one.cam, atol=scale)
    np.testing.assert_allclose(given.cam, one.cam, atol=scale)
    assert np.abs(coarse.cam - one.cam).max() > scale


def test_larger_inputs_that_are_not_the_queries_are_refused(index, network) -> None:
    inputs = [network.preprocess(picture(0, 7)), network.preprocess(picture(1, 7))]
    larger = [larger_input(None, one, None) for one in inputs]
    with Explainer(index, network) as explainer:
        kept = explainer.explain_batch(inputs, larger=np.stack(larger), detail=2)
        alike = explainer.explain_batch(inputs, larger=larger, detail=2)
        np.testing.assert_array_equal(kept[1].cam, alike[1].cam)
        for given in (larger[:1], [*larger, larger[0]], inputs, "no inputs"):
            with pytest.raises(InputError, match=r"larger has the shapes .*; expected 2 of \["):
                explainer.explain_batch(inputs, larger=given, detail=2)
        with pytest.raises(InputError, match="give detail=2 with it"):
            explainer.explain_batch(inputs, larger=larger, detail=1)
        for detail in (0, 3, True, "2", 1.5, np.array([1, 2])):
            with pytest.raises(InputError, match="give a whole number from 1 to 2"):
                explainer.explain(inputs[0], detail=detail)
        with pytest.raises(InputError, match="give a whole number from 1 to 2"):
            Explainer(index, network, detail=3)


def test_an_input_without_its_picture_is_resized() -> None:
    given = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    found = larger_input(None, torch.from_numpy(given), None)
    np.testing.assert_allclose(found, resize(given, (8, 12)), atol=1e-6)
    own = custom(lambda image: given)
    np.testing.assert_allclose(larger_input(picture(0, 7), given, own), found, atol=1e-6)


class OneSize(nn.Module):
    """Takes inputs of 8 x 8 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).flatten(1))


def test_a_network_of_one_size_sees_the_quarters() -> None:
    torch.manual_seed(0)
    network = EmbeddingNetwork(OneSize().eval(), "layer", preprocess=Preprocess(size=(8, 8)))
    batch = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with pytest.raises(NetworkError):
        network.forward(batch)
    asked: list[int] = []
    snapshot: Any = SimpleNamespace(network=network, layers=(network.layer,), refused_sizes=set())
    network.module.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[-1]))
    first = finer_activations(snapshot, batch)[0]
    assert asked[0] == 16
    asked.clear()
    found = finer_activations(snapshot, batch)[0]
    assert asked == [8, 8, 8, 8]  # what was refused is not tried again
    np.testing.assert_array_equal(found, first)
    assert found.shape == (2, 4, 8, 8)
    for y, x in np.ndindex(2, 2):
        part = np.ascontiguousarray(batch[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8])
        expected = network.forward(part).activations.numpy()
        there = found[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        np.testing.assert_allclose(there, expected, atol=1e-5)
