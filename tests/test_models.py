"""Networks by name: defaults, files of weights and heads, and what is refused."""

import json
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork, load_network
from embedcam.network.checkpoints import read_state
from embedcam.network.loading import FAMILIES, _family_of
from embedcam.preprocess import Preprocess

SMALL = {"size": 64, "weights": "random"}

# Name, layer, K, D, layout, pooled, affine, replayed.
DEFAULTS = [
    ("resnet18", "layer4", 512, 512, "bkhw", True, True, True),
    ("mobilenet_v2", "features", 1280, 1280, "bkhw", True, True, True),
    ("mobilenet_v3_small", "features", 576, 1024, "bkhw", True, False, True),
    ("efficientnet_b0", "features", 1280, 1280, "bkhw", True, True, True),
    ("convnext_tiny", "features", 768, 768, "bkhw", True, False, True),
    ("densenet121", "features", 1024, 1024, "bkhw", False, False, False),
    ("squeezenet1_1", "features", 512, 512, "bkhw", True, True, True),
    ("swin_t", "permute", 768, 768, "bkhw", True, True, True),
    ("shufflenet_v2_x0_5", "conv5", 1024, 1024, "bkhw", True, True, True),
]


def pictures(network: EmbeddingNetwork, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(network.probe_images(count))


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row[0])
def test_the_defaults_of_the_families(row: tuple[Any, ...]) -> None:
    name, layer, channels, width, layout, pooled, affine, replayed = row
    network = load_network(f"torchvision:{name}", **SMALL)
    network.check()
    features = network.forward(pictures(network))
    assert network.layer == layer
    assert features.activations.shape[1] == channels
    assert features.embedding.shape == (2, width)
    assert network.layout == layout
    kind = network.head_kind
    assert (kind.pooled, kind.affine, network.pooled_replay) == (pooled, affine, replayed)
    assert kind.identity == affine  # the embedding is the pooled vector
    if kind.identity:
        z = features.embedding * features.norm[:, None]
        torch.testing.assert_close(z, features.activations.mean((2, 3)), rtol=1e-4, atol=1e-5)
    if replayed:
        c = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
        with network.head_pass(pictures(network)) as made:
            expected = made.vjp(c).sum((2, 3))
            found = network.pooled_vjp(made.features.activations.mean((2, 3)), c)
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


def test_the_layer_of_a_vgg_is_its_last_relu() -> None:
    tiny = nn.Module()
    tiny.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    tiny.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert FAMILIES["vgg"].layer(tiny) == "features.1"


def test_a_vit_is_explained_before_its_last_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, weights: Any = None, image_size: int = 224) -> nn.Module:
        assert name == "vit_b_16"
        return models.VisionTransformer(image_size, 16, 3, 4, 48, 96)

    monkeypatch.setattr(models, "get_model", tiny)
    network = load_network("torchvision:vit_b_16", size=64, weights="random")
    assert network.layer == "encoder.layers.encoder_layer_2.ln_1"
    assert network.forward(pictures(network)).embedding.shape == (2, 48)
    network.check()
    assert not network.head_kind.pooled
    with pytest.raises(InputError, match=r"size=\(64, 32\) is not square"):
        load_network("torchvision:vit_b_16", size=(64, 32), weights="random")
    # Pretrained, and another size than it was trained at: the position embeddings are resized.
    bigger = load_network("torchvision:vit_b_16", size=96)
    assert bigger.forward(pictures(bigger)).activations.shape == (2, 48, 6, 6)


def test_every_family_names_an_existing_model() -> None:
    unknown = ("googlenet", "inception_v3", "maxvit_t")
    names = [name for name in models.list_models(module=models) if name not in unknown]
    assert {id(_family_of(name)) for name in names} == {id(one) for one in FAMILIES.values()}


def test_the_preprocessing_is_that_of_the_weights() -> None:
    network = load_network("torchvision:resnet18", weights="random")
    expected = Preprocess(size=(224, 224), resize="crop", resize_to=256)
    assert network.preprocess == expected
    b3 = load_network("torchvision:efficientnet_b3", weights="random").preprocess
    assert (b3.size, b3.resize_to, b3.interpolation) == ((300, 300), 320, "bicubic")
    half = load_network("torchvision:resnet18", weights="random", size=112).preprocess
    assert (half.size, half.resize_to) == ((112, 112), 128)
    wide = load_network("torchvision:resnet18", weights="random", size=(64, 96), resize="squash")
    assert wide.preprocess == Preprocess(size=(64, 96))
    assert wide.forward(pictures(wide)).activations.shape == (2, 512, 2, 3)
    own = load_network("torchvision:resnet18", weights="random", preprocess=Preprocess((32, 32)))
    assert own.preprocess == Preprocess((32, 32))
    with pytest.raises(InputError, match=r"size = 'big'; give"):
        load_network("torchvision:resnet18", size="big")


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    own, same, other = (
        load_network("torchvision:squeezenet1_1", seed=seed, **SMALL).module.state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(own[key], same[key]) for key in own)
    assert not all(torch.equal(own[key], other[key]) for key in own)


def test_offline_without_weights_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(NetworkError) as caught:
        load_network("torchvision:squeezenet1_1")
    assert "\n" not in str(caught.value)
    assert str(caught.value) == (
        "the pretrained weights of torchvision:squeezenet1_1 could not be fetched (URLError: "
        "<urlopen error no route to host>); give a file with --weights FILE, or random ones with "
        "--weights random"
    )


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return models.squeezenet1_1().state_dict()


def load(path: Path, **given: Any) -> EmbeddingNetwork:
    return load_network("torchvision:squeezenet1_1", weights=path, size=64, **given)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "model.backbone.", "a._orig_mod."]
)
def test_checkpoints_are_unwrapped(
    squeezenet: dict[str, torch.Tensor], tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    content: Any = {prefix + key: value for key, value in squeezenet.items()}
    content = content if wrapper is None else {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    network = load(tmp_path / "weights.pth")
    state = network.module.state_dict()
    assert state  # the classifier was cut off, everything else is there
    assert all(torch.equal(value, squeezenet[key]) for key, value in state.items())


def test_mixed_precision_files_become_float32(
    squeezenet: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    mixed = {k: v.half() if k.endswith("weight") else v for k, v in squeezenet.items()}
    save_file(mixed, tmp_path / "weights.safetensors")
    state = load(tmp_path / "weights.safetensors").module.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    key = "features.0.weight"
    assert torch.equal(state[key], squeezenet[key].half().float())


def test_densenet_files_with_the_old_names_load(tmp_path: Path) -> None:
    name = "features.denseblock1.denselayer1.norm{}1.weight"
    torch.save({name.format("."): torch.ones(2)}, tmp_path / "old.pth")
    assert [*read_state(tmp_path / "old.pth")] == [name.format("")]


def test_weights_that_do_not_fit_say_how(
    squeezenet: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    renamed = dict(squeezenet)
    renamed["features.0.wieght"] = renamed.pop("features.0.weight")
    renamed["features.3.squeeze.bias"] = torch.zeros(7)
    path = tmp_path / "weights.safetensors"
    save_file(renamed, path)
    with pytest.raises(NetworkError) as caught:
        load(path)
    assert str(caught.value) == (
        f"weights {path} do not fit the network: 1 missing "
        "(features.0.weight), 1 unexpected (features.0.wieght), 1 of another shape "
        "(features.3.squeeze.bias [7] instead of [16]); did you mean features.0.weight?"
    )
    save_file(load_network("torchvision:resnet18", **SMALL).module.state_dict(), path)
    said = r"[^?]*; these are another network's weights: give this one's, or name the other$"
    with pytest.raises(NetworkError, match=said) as caught:
        load(path)
    assert "did you mean" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run by the unpickler",))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    with pytest.raises(NetworkError, match=r"a\.\w+ is not a file"):
        load(path)
    for content in (b"", b"\x80\x04garbage", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(NetworkError, match=r"cannot be read .*weights_only=True"):
            load(path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(NetworkError, match=r"evil\.pt cannot be read"):
        load(tmp_path / "evil.pt")
    assert "run by" not in capsys.readouterr().out
    for content, said in (([1, 2], "hold a list"), ({"epoch": 3}, r"not tensors \(epoch\)")):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(NetworkError, match=said):
            load(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "resnet18"])
def test_an_affine_head_is_put_after_the_embedding(name: str, tmp_path: Path) -> None:
    plain = load_network(f"torchvision:{name}", normalize=False, **SMALL)
    x = pictures(plain)
    z = plain.forward(x).embedding
    weight, bias = torch.randn(8, z.shape[1]), torch.randn(8)
    save_file({"weight": weight.half(), "bias": bias}, tmp_path / "head.safetensors")
    network = load_network(
        f"torchvision:{name}", head=tmp_path / "head.safetensors", normalize=False, **SMALL
    )
    expected = z @ weight.half().float().T + bias
    torch.testing.assert_close(network.forward(x).embedding, expected, rtol=1e-4, atol=1e-3)
    assert network.pooled_replay
    if name != "mobilenet_v3_small":
        np.testing.assert_allclose(network.head_kind.matrix, weight.half().float(), atol=1e-4)
    assert any(torch.equal(v, bias) for v in network.module.state_dict().values())


# A header that promises far more than the file holds.
HEADER = b'{"weight":{"dtype":"F32","shape":[4096,512],"data_offsets":[0,8388608]}}'


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "is not a file"),
        (len(HEADER).to_bytes(8, "little") + HEADER, r"head .* cannot be read"),
        ({"weight": torch.ones(4, 100)}, r"weight \[4, 100\] of F32; expected weight \[D 512\]"),
        ({"weight": torch.ones(512)}, r"holds weight \[512\] of F32; expected"),
        ({"bias": torch.ones(4)}, r"holds bias \[4\] of F32; expected weight \[D 512\]"),
        ({"weight": torch.ones(4, 512), "other": torch.ones(1)}, r"holds .*other \[1\] of F32"),
        ({"weight": torch.ones(4, 512), "bias": torch.ones(3)}, r"holds .*bias \[3\] of F32"),
        ({"weight": torch.ones(4, 512, dtype=torch.int32)}, r"of I32; expected .* floating point"),
        ({"weight": torch.full((4, 512), float("nan"))}, r"holds NaN or infinity"),
    ],
)
def test_heads_that_do_not_fit(
    tensors: dict[str, torch.Tensor] | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, path)
    with pytest.raises(NetworkError, match=message):
        load_network("torchvision:squeezenet1_1", head=path, **SMALL)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("torchvision:resnet5", r"no model 'resnet5'; did you mean .*resnet50"),
        ("resnet18", r"'resnet18' is not a network; give torchvision:NAME.*torchvision:resnet18"),
        ("torchvison:resnet18", r"'torchvison' cannot be imported.*did you mean torchvision\?"),
        ("timm:resnet5O", r"timm has no model 'resnet5O'; did you mean .*resnet50"),
        ("torchvision:maxvit_t", r"does not know where the embedding of torchvision:maxvit_t is"),
        ("json:dumpz", r"json has no 'dumpz'; did you mean dump, dumps"),
        ("json:__name__", r"json:__name__ is a str; expected a function"),
        ("toys.toy", r"write toys:toy, with a colon before the function"),
        ("resnet50.a1_in1k", "did you mean"),
    ],
)
def test_names_that_are_nearly_right(network: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(network, weights="random")


@pytest.mark.parametrize(
    ("name", "layer", "layout", "pooled"),
    [
        ("test_resnet", "forward_features", "bkhw", True),
        ("test_convnext", "forward_features", "bkhw", True),
        ("test_vit", "blocks.5.norm1", "btk", False),
    ],
)
def test_timm(name: str, layer: str, layout: str, pooled: bool, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = load_network(f"timm:{name}", weights="random")
    x = pictures(network)
    features = network.forward(x)
    network.check()
    assert (network.layer, network.layout) == (layer, layout)
    assert network.pooled_replay == pooled
    assert network.preprocess.size == (160, 160)
    # Weights of the whole classifier, into the network without one.
    whole = timm.create_model(name, pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    loaded = load_network(f"timm:{name}", weights=tmp_path / "whole.pth", normalize=False)
    expected = whole.forward_head(whole.forward_features(x), pre_logits=True).detach()
    torch.testing.assert_close(loaded.forward(x).embedding, expected)
    again = load_network(**json.loads(json.dumps(network.spec)))
    assert torch.equal(again.forward(x).embedding, features.embedding)


FACTORY = """
import torch
from torch import nn
from embedcam import EmbeddingNetwork, Preprocess

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)
    def forward(self, x):
        return {"a": self.conv(x).mean((2, 3)), "b": x.mean((2, 3))}

net = Net
def pair():
    return Net(), Preprocess(size=(16, 16))
def ready():
    return EmbeddingNetwork(Net().eval(), "conv", output="a")
def wrong():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_factory_of_mine.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "a_factory_of_mine", raising=False)
    return "a_factory_of_mine"


def test_factories(factory: str, tmp_path: Path) -> None:
    pair = load_network(f"{factory}:pair", layer="conv", output="a")
    assert pair.preprocess == Preprocess(size=(16, 16))
    assert pair.forward(pictures(pair)).embedding.shape == (2, 4)
    head, weights = tmp_path / "head.safetensors", tmp_path / "weights.safetensors"
    save_file({"weight": torch.eye(4)[:2]}, head)
    save_file({"conv.weight": torch.ones(4, 3, 4, 4), "conv.bias": torch.arange(4.0)}, weights)
    headed = load_network(
        f"{factory}:net", layer="conv", output="a", head=head, weights=weights, normalize=False
    )
    assert headed.layer == "conv"
    assert headed.forward(torch.ones(1, 3, 8, 8)).embedding.tolist() == [[48.0, 49.0]]
    np.testing.assert_allclose(headed.head_kind.matrix, np.eye(4)[:2])
    ready = load_network(f"{factory}:ready", device="cpu")
    assert (ready.layer, ready.spec) == ("conv", {"network": f"{factory}:ready"})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("net", {}, r"no default layer is known .*--layer.*conv"),
        ("wrong", {}, r"wrong returned int; expected a torch\.nn\.Module"),
        ("net", {"layer": "conv", "size": 32}, r"let the function .* return \(module, Prep"),
        ("ready", {"layer": "conv"}, "returns an EmbeddingNetwork, which settles layer itself"),
        ("ready", {"resize": "squash", "grid": (2, 2)}, "settles grid, resize itself; set it"),
        ("ready", {"normalize": False, "autocast": "bf16"}, "settles autocast, normalize itself"),
        ("ready", {"prefix_tokens": 1, "layout": "btk"}, "settles layout, prefix_tokens itself"),
        ("ready", {"channels_last": True, "device": "meta"}, "settles channels_last, device its"),
    ],
)
def test_factories_that_cannot_be_used(
    factory: str, name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises((NetworkError, InputError), match=message):
        load_network(f"{factory}:{name}", **given)


def test_the_spec_loads_the_network_again() -> None:
    network = load_network("torchvision:mobilenet_v2", seed=4, resize="squash", **SMALL)
    again = load_network(**json.loads(json.dumps(network.spec)))
    assert again.spec == network.spec
    assert again.preprocess == network.preprocess
    x = pictures(network)
    assert torch.equal(again.forward(x).embedding, network.forward(x).embedding)
