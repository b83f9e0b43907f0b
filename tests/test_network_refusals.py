"""What `EmbeddingNetwork` refuses, and in which words."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from toys import VIT_LAYER, Toy, images, seeded, small_vit, toy

from embedcam.errors import EmbeddingError, InputError, NetworkError
from embedcam.network import EmbeddingNetwork, input_gradient, several_pass
from embedcam.preprocess import Preprocess


def test_a_network_in_training_mode_is_refused() -> None:
    module = toy()
    network = EmbeddingNetwork(module, "relu")
    module.train()
    with pytest.raises(NetworkError, match=r"\(Toy\) is in training mode.*\.eval\(\)"):
        network.forward(images())
    module.eval().norm.train()
    with pytest.raises(NetworkError, match=r"'norm' \(BatchNorm2d\).*\.eval\(\)"):
        network.head_pass(images())
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    parts = EmbeddingNetwork.from_parts(trunk, lambda a: a.mean((2, 3)))
    with pytest.raises(NetworkError, match="training mode"):
        parts.forward(images())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # plain layers have no mode
    assert EmbeddingNetwork.from_parts(nn.Conv2d(3, 4, 1), pool).forward(images()).norm.all()


def test_layers_that_cannot_be_explained() -> None:
    for layer, message in (
        ("unused", r"layer 'unused' is never called.*from_parts"),
        ("side", r"'side' never reaches the embedding.*between the image and the embedding"),
        ("linear", r"layer 'linear' returned a tensor \[2, 5\]; .*before the pooling"),
        ("rleu", r"Toy has no layer 'rleu'; did you mean relu"),
        ("zzz", r"Toy has no layer 'zzz'; its parts are .*norm.*, relu"),
        ("", r"Toy has no layer ''"),
    ):
        with pytest.raises(NetworkError, match=message):
            EmbeddingNetwork(toy(), layer).head_pass(images())
    network = EmbeddingNetwork(seeded(lambda: models.resnet18(num_classes=4)), "layer4.0.relu")
    with pytest.raises(NetworkError, match=r"called 2 times in one forward.*the block around it"):
        network.forward(images(1, 64, 64))


def test_patch_tokens_behind_the_last_attention_are_refused() -> None:
    layer = "encoder.ln"
    network = EmbeddingNetwork(seeded(small_vit), layer)
    network.forward(images(1, 64, 64))  # an embedding can be had
    with pytest.raises(NetworkError, match=rf"patch tokens of layer '{layer}'.*'{VIT_LAYER}'"):
        network.check()
    EmbeddingNetwork(seeded(small_vit), VIT_LAYER, input_size=(64, 64)).check()


def test_inputs_that_are_not_batches_of_images() -> None:
    network = EmbeddingNetwork(toy(), "relu")
    for given, message in (
        (torch.zeros(3, 8, 8), r"images are \[3, 8, 8\].*add the batch dimension"),
        (torch.zeros(0, 3, 8, 8), r"images are \[0, 3, 8, 8\]"),
        ("picture.jpg", r"images are str"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"uint8.*apply the network's preprocess"),
    ):
        with pytest.raises(InputError, match=message):
            network.forward(given)
    for call in (network.forward, network.head_pass, lambda x: network.forward_layers(x, ["relu"])):
        with pytest.raises(InputError, match=r"images are \[2, 4, .*takes another number"):
            call(torch.zeros(2, 4, 32, 32))


def test_embeddings_that_are_not_vectors_name_their_positions() -> None:
    x = images(4)
    x[1, 0, 0, 0], x[3, 2, 1, 1] = float("nan"), float("inf")
    network = EmbeddingNetwork(toy(), "relu")
    for call in (network.forward, network.head_pass):
        with pytest.raises(InputError, match=r"images at positions 1, 3 of the batch hold NaN"):
            call(x)
    pick = torch.tensor([1.0, float("inf"), 1.0, 1.0])[:, None]
    infinite = EmbeddingNetwork(toy(lambda z: z * pick), "relu")
    with pytest.raises(EmbeddingError, match=r"NaN or infinity \(positions 1 of the") as caught:
        infinite.forward(images(4))
    assert caught.value.rows == [1]
    some = torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None]
    zero = toy(lambda z: z * some)
    with pytest.raises(NetworkError, match=r"is zero .*positions 1, 2 of .*normalize=False"):
        EmbeddingNetwork(zero, "relu").forward(images(4))
    unnormalised = EmbeddingNetwork(zero, "relu", normalize=False).forward(images(4))
    assert unnormalised.norm[1] == 0
    # The embedding of what no pass could draw a map of: one activation that is not finite.
    spoil = torch.zeros(4, 1, 1, 1)
    spoil[2] = float("nan")
    spoilt = EmbeddingNetwork.from_parts(lambda x: x + spoil, lambda a: 1 + a.nansum((2, 3)))
    with pytest.raises(EmbeddingError, match="layer's activations hold NaN or infinity") as caught:
        spoilt.forward(images(4))
    assert caught.value.rows == [2]


class WithLabels(Toy):
    def forward(self, images: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images)


class Words(Toy):
    main_input_name = "input_ids"


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"module": lambda x: x}, r"given function; for two functions use .*from_parts"),
    ({"module": seeded(WithLabels)}, "also asks for labels"),
    ({"module": seeded(Words)}, "takes 'input_ids' first"),
    ({"module": toy().to("meta")}, r"on the 'meta' device.*load its weights"),
    ({"layer": nn.ReLU()}, r"a ReLU, is not part of the Toy"),
    ({"layer": 3}, "neither a name nor a module"),
    ({"trunk": nn.Identity()}, "trunk= was given without head="),
    ({"head": "linear"}, "head is str; expected something to call"),
    ({"normalize": "yes"}, "normalize='yes'; give True or False"),
    ({"channels_last": 1}, "channels_last=1"),
    ({"name": 3}, "name=3"),
    ({"autocast": torch.int8}, r"autocast=torch\.int8; give torch\.bfloat16"),
    ({"device": "gpu"}, "device='gpu' is no torch device"),
    ({"device": "meta"}, "device='meta' was given, but the network is on 'cpu'"),
    ({"input_size": 32}, "input_size = 32; give"),
    ({"layout": "khw"}, r"layout = 'khw' is unknown; .*known: auto, bkhw, bhwk, btk"),
    ({"grid": "7x7"}, "grid = '7x7'; give"),
    ({"grid": (0, 3)}, r"grid = \(0, 3\); give"),
    ({"prefix_tokens": -1}, "prefix_tokens = -1; give a whole"),
    ({"output": 1.5}, r"output=1.5; give a name, a position"),
    ({"preprocess": 3}, "expected a transform, given 3"),
    ({"preprocess": Preprocess}, "given the class Preprocess; give an instance"),
    ({"preprocess": lambda picture: picture.nothing}, "failed with AttributeError.*nothing"),
    ({"preprocess": lambda picture: torch.rand(3, 8, 8)}, "another input each time"),
]


@pytest.mark.parametrize(("changed", "message"), OPTIONS)
def test_options_that_cannot_be_used(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, NetworkError), match=message):
        EmbeddingNetwork(**{"module": toy(), "layer": "relu", **changed})


def test_parameters_made_in_inference_mode_are_refused_for_gradients() -> None:
    with torch.inference_mode():
        network = EmbeddingNetwork(toy(), "relu")
    network.forward(images())
    for call in (
        network.head_pass,
        lambda x: several_pass(network, x, ["relu"]),
        lambda x: input_gradient(network, x, lambda features: features.embedding),
    ):
        with pytest.raises(NetworkError, match=r"made inside torch\.inference_mode"):
            call(images())
