"""Which networks count as the one of an index, and what is said to the others."""

import copy
import hashlib
import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import toy

from embedcam.errors import IndexFormatError, NetworkMismatch
from embedcam.index.identity import Identity, NetworkWarning
from embedcam.network import EmbeddingNetwork, load_network
from embedcam.network.module import hash_parameters
from embedcam.preprocess import Preprocess
from embedcam.preprocess.probe import probe_picture


def network(module=None, layer="relu", **given: Any) -> EmbeddingNetwork:
    settings = {"preprocess": Preprocess(size=(32, 32)), **given}
    return EmbeddingNetwork(module or toy(), layer, **settings)


def stored(original: EmbeddingNetwork) -> Identity:
    """As it comes back from an index: through JSON, and arrays apart."""
    identity = original.identity()
    return Identity.from_dict(json.loads(json.dumps(identity.to_dict())), identity.arrays())


def changed(name: str, change: float) -> nn.Module:
    module = toy()
    with torch.no_grad():
        module.get_parameter(name).mul_(1 + change)
    return module


def test_the_probe_is_what_the_network_makes_of_the_picture() -> None:
    original = network()
    identity = original.identity()
    features = original.forward(original.probe_images())
    np.testing.assert_array_equal(identity.probe_embedding, features.embedding[0])
    np.testing.assert_allclose(identity.probe_pooled, features.activations[0].mean((1, 2)))
    assert identity.probe_embedding.dtype == identity.probe_pooled.dtype == np.float32
    assert network().identity().to_dict() == identity.to_dict()


def test_the_picture_is_the_same_for_ever() -> None:
    digests = [hashlib.sha256(probe_picture(i).tobytes()).hexdigest()[:16] for i in range(2)]
    assert digests == ["a4fcb6b2a2123fd3", "75a0bf2930955ce0"]


def test_the_digest_is_of_names_dtypes_shapes_and_bytes() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return hash_parameters(module)

    a, b = torch.arange(6.0), torch.ones(2)
    base = digest(a=a, b=b)
    assert base.startswith("7930cbbf65629ea8")  # of an index built long ago
    assert digest(b=b, a=torch.arange(12.0)[::2] / 2) == base  # whatever the order and strides
    assert digest(a=a, b=b, num_batches_tracked=torch.tensor(3)) == base
    changes = (a.reshape(2, 3), a.double(), a.half(), a + 1e-6, a.int())
    others = [digest(a=a), digest(a=a, c=b), *(digest(a=other, b=b) for other in changes)]
    assert len({base, *others}) == len(others) + 1


def test_prefixes_of_wrappers_change_nothing() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.training = module, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    module = toy()
    wrapped = Wrapper(Wrapper(module))
    assert next(iter(wrapped.state_dict())).startswith("module.module.")
    assert hash_parameters(wrapped) == hash_parameters(module)
    assert hash_parameters(torch.compile(module, backend="eager")) == hash_parameters(module)
    for layer in ("relu", "module.module.relu"):
        other = network(wrapped, layer=layer)
        assert other.layer == "relu"
        other.for_index(stored(network(module)))


def test_the_same_network_is_admitted_silently() -> None:
    network().for_index(stored(network()))
    loaded = load_network("torchvision:squeezenet1_1", weights="random", size=64)
    load_network(**loaded.spec).for_index(stored(loaded))


def test_nearly_the_same_computation_is_admitted_with_a_warning() -> None:
    identity = stored(network())
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.warns(NetworkWarning, match=rf"\({str(dtype)[6:]}\) given: not the same"):
            network(toy().to(dtype)).for_index(identity)
        with pytest.warns(NetworkWarning, match="admitted because on the probe picture"):
            network(autocast=dtype).for_index(identity)
    with pytest.warns(NetworkWarning, match=r"differ by only 0\.00"):
        network(changed("linear.weight", 5e-3)).for_index(identity)


def test_other_trunks_and_heads_of_the_same_network_are_admitted() -> None:
    module = toy()
    trunk = nn.Sequential(module.conv, module.norm, nn.ReLU()).eval()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), module.linear).eval()
    preprocess, identity = Preprocess(size=(32, 32)), stored(network(module))
    examples = torch.randn(2, 3, 32, 32), torch.randn(2, 6, 16, 16)
    batch = ({0: torch.export.Dim("batch")},)
    exported = [
        torch.export.export(part, (x,), dynamic_shapes=batch).module()
        for part, x in zip((trunk, head), examples, strict=True)
    ]
    compiled = [torch.compile(part, backend="eager") for part in (trunk, head)]
    for parts in ([trunk, head], exported, compiled):
        other = EmbeddingNetwork.from_parts(*parts, layer="relu", preprocess=preprocess)
        with pytest.warns(NetworkWarning, match="not the same computation"):
            other.for_index(identity)
        unnamed = EmbeddingNetwork.from_parts(*parts, preprocess=preprocess)
        with pytest.raises(NetworkMismatch, match=r"its layer is 'relu', given .*'trunk'.*layer="):
            unnamed.for_index(identity)


def test_other_settings_are_refused_with_both_values() -> None:
    side = {"size": (32, 32)}
    cropped = Preprocess(**side, resize="crop", resize_to=40)
    for other, message in (
        ({"layer": "norm"}, r"its layer is 'relu', given is one with 'norm'; choose that layer"),
        ({"preprocess": cropped}, r'built with \{"resize": "squash"\}, and given is \{"resize": '
         r'"crop"\}; leave out --resize \(resize=\), give the network that preprocess, or build'),
        ({"normalize": False}, r"its normalize is True, given is one with False"),
        ({"preprocess": None}, r'its preprocess is \{"kind".*\}, given is one with None'),
        ({"preprocess": Preprocess(**side, mean=(0, 0, 0))},
         r'"mean": \[0\.485.*given is one with .*"mean": \[0\.0, 0\.0, 0\.0\]'),
    ):  # fmt: skip
        with pytest.raises(NetworkMismatch, match=message):
            network(**other).for_index(stored(network()))


def test_another_network_is_called_by_its_name() -> None:
    identity = stored(network(name="torchvision:this"))
    steps = {"conv": nn.Conv2d(3, 4, 4), "relu": nn.ReLU(), "flat": nn.Flatten()}
    for layer in ("relu", "conv"):
        other = network(nn.Sequential(OrderedDict(steps)), layer=layer, name="torchvision:that")
        with pytest.raises(NetworkMismatch) as caught:
            other.for_index(identity)
        assert str(caught.value) == (
            "this is not the network of the index: that is torchvision:this with layer relu, given "
            f"is torchvision:that with layer {layer}; leave out --network, --weights and --layer "
            "(or load the index's), or build the index again"
        )
    # The same one by another name has the same structure: there the layer is to blame.
    renamed = network(layer="norm", name="mine:make")
    with pytest.raises(NetworkMismatch, match="its layer is 'relu', given is one with 'norm'; cho"):
        renamed.for_index(identity)


def test_other_parameters_are_refused_with_both_values() -> None:
    identity, other = stored(network()), network(changed("conv.weight", 0.3))
    with pytest.raises(NetworkMismatch) as caught:
        other.for_index(identity)
    said = str(caught.value)
    assert identity.parameters_sha256[:12] in said
    assert hash_parameters(other.module)[:12] in said
    assert "where 0.001 is allowed" in said
    for numbers in (identity, other.identity()):
        assert f"{numbers.probe_pooled[0]:.4g}" in said


def test_the_same_parameters_that_compute_something_else_are_refused() -> None:
    identity = stored(network())
    slightly = toy(lambda z: z + 4e-3 * z.norm(dim=1, keepdim=True) * torch.eye(5)[0])
    # The very same would be admitted, with a warning, if the parameters were others.
    with pytest.raises(NetworkMismatch, match=r"in the embedding, where 0\.001 is allowed"):
        network(slightly).for_index(identity)
    message = r"differ by inf.*5 numbers: .* in the index, 3 numbers: .* given"
    with pytest.raises(NetworkMismatch, match=message):
        network(toy(lambda z: z[:, :3])).for_index(identity)


def test_a_head_of_its_own_is_part_of_the_parameters() -> None:
    trunk, head = nn.Conv2d(3, 4, 4), nn.Linear(4, 3)
    parts = EmbeddingNetwork.from_parts(trunk.eval(), lambda a: head(a.mean((2, 3))))
    whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    with_head = EmbeddingNetwork.from_parts(trunk, whole)
    assert hash_parameters(parts.module) != hash_parameters(with_head.module)
    before = hash_parameters(with_head.module)
    with torch.no_grad():
        head.bias.add_(1)
    assert hash_parameters(with_head.module) != before


def test_broken_identities_are_errors_of_the_index() -> None:
    identity = network().identity()
    good, arrays = identity.to_dict(), identity.arrays()
    cases = [
        ({k: v for k, v in good.items() if k != "layer"}, arrays, "layer is missing"),
        ({**good, "normalize": "yes"}, arrays, "normalize is 'yes'"),
        ({**good, "parameters_sha256": 5}, arrays, "parameters_sha256 is 5"),
        (good, {}, "probe_embedding is missing"),
        (good, {**arrays, "probe_pooled": np.zeros((2, 2), np.float32)}, "probe_pooled is no row"),
        (good, {**arrays, "probe_pooled": np.full(6, np.nan, np.float32)}, "holds NaN"),
    ]
    for values, given, message in cases:
        with pytest.raises(IndexFormatError, match=message):
            Identity.from_dict(values, given)
    # What a newer or older writer adds is left alone.
    assert Identity.from_dict({**good, "loading": {}}, arrays).to_dict() == good


def test_a_probe_that_is_not_a_number_is_never_near() -> None:
    broken = copy.copy(network().identity())
    object.__setattr__(broken, "probe_pooled", np.full(6, np.nan, np.float32))
    with pytest.raises(NetworkMismatch):
        network().for_index(broken)


def test_another_training_of_the_same_structure_is_refused() -> None:
    identity, near = stored(network()), network(changed("conv.weight", 0.005))
    moved = near.identity().probe_pooled - identity.probe_pooled
    assert 1e-3 < np.linalg.norm(moved) / np.linalg.norm(identity.probe_pooled) < 2e-2
    with pytest.raises(NetworkMismatch, match=r"where 0\.001 is allowed"):
        near.for_index(identity)
    # In another form of the network, whose structure differs, it would pass.
    object.__setattr__(identity, "structure_sha256", None)
    with pytest.warns(NetworkWarning):
        near.for_index(identity)
