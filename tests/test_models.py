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
from embedcam.network.torchvision_source import FAMILIES, _family_of
from embedcam.preprocess import Preprocess

SMALL = {"size": 64, "weights": "random"}

# Name, layer, K, D, pooled, affine.
DEFAULTS = [
    ("resnet18", "layer4", 512, 512, True, True),
    ("mobilenet_v2", "features", 1280, 1280, True, True),
    ("mobilenet_v3_small", "features", 576, 1024, True, False),
    ("efficientnet_b0", "features", 1280, 1280, True, True),
    ("convnext_tiny", "features", 768, 768, True, False),
    ("densenet121", "features", 1024, 1024, False, False),
    ("squeezenet1_1", "features", 512, 512, True, True),
    ("swin_t", "permute", 768, 768, True, True),
    ("shufflenet_v2_x0_5", "conv5", 1024, 1024, True, True),
]


def pictures(network: EmbeddingNetwork, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(network.probe_images(count))


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row[0])
def test_the_defaults_of_the_families(row: tuple[Any, ...]) -> None:
    name, layer, channels, width, pooled, affine = row
    network = load_network(f"torchvision:{name}", **SMALL)
    network.check()
    features, kind = network.forward(pictures(network)), network.head_kind
    assert (network.layer, network.layout) == (layer, "bkhw")
    assert (features.activations.shape[1], features.embedding.shape) == (channels, (2, width))
    assert (kind.pooled, kind.affine, network.pooled_replay) == (pooled, affine, pooled)
    assert kind.identity == affine  # the embedding is the pooled vector
    if kind.identity:
        z = features.embedding * features.norm[:, None]
        torch.testing.assert_close(z, features.activations.mean((2, 3)), rtol=1e-4, atol=1e-5)
    if pooled:
        c = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
        with network.head_pass(pictures(network)) as made:
            expected = made.vjp(c).sum((2, 3))
            found = network.pooled_vjp(made.features.activations.mean((2, 3)), c)
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


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
    names = models.list_models(module=models)
    assert {id(_family_of(name)) for name in names} == {id(one) for one in FAMILIES.values()}
    tiny = nn.Module()
    tiny.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert FAMILIES["vgg"].layer(tiny) == "features.1"  # the last ReLU


def test_the_preprocessing_is_that_of_the_weights() -> None:
    def load(name: str = "resnet18", **settings: Any) -> EmbeddingNetwork:
        return load_network(f"torchvision:{name}", weights="random", **settings)

    assert load().preprocess == Preprocess.imagenet()
    b3 = load("efficientnet_b3").preprocess
    assert (b3.size, b3.resize_to, b3.interpolation) == ((300, 300), 320, "bicubic")
    half = load(size=112).preprocess
    assert (half.size, half.resize_to) == ((112, 112), 128)
    wide = load(size=(64, 96), resize="squash")
    assert wide.preprocess == Preprocess(size=(64, 96))
    assert wide.forward(pictures(wide)).activations.shape == (2, 512, 2, 3)
    assert load(preprocess=Preprocess((32, 32))).preprocess == Preprocess((32, 32))
    with pytest.raises(InputError, match=r"size = 'big'; give"):
        load(size="big")


def test_random_weights_are_seeded_and_the_spec_loads_the_network_again() -> None:
    before = torch.get_rng_state()
    own, other = (load_network("torchvision:squeezenet1_1", seed=s, **SMALL) for s in (0, 1))
    again = load_network(**json.loads(json.dumps(own.spec)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.spec, again.preprocess) == (own.spec, own.preprocess)
    one, same, another = (each.module.state_dict() for each in (own, again, other))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], another[key]) for key in one)


def test_offline_without_weights_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    said = r"^the pretrained weights of torchvision:squeezenet1_1 could .*no route.*; give a file w"
    with pytest.raises(NetworkError, match=said) as caught:
        load_network("torchvision:squeezenet1_1")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return models.squeezenet1_1().state_dict()


def load(path: Path, **given: Any) -> EmbeddingNetwork:
    return load_network("torchvision:squeezenet1_1", weights=path, size=64, **given)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_checkpoints_are_unwrapped(squeezenet, tmp_path: Path, wrapper: str | None) -> None:
    for prefix in ("", "module.", "_orig_mod.module.", "model.backbone.", "a._orig_mod."):
        content: Any = {prefix + key: value for key, value in squeezenet.items()}
        content = content if wrapper is None else {wrapper: content, "epoch": 3}
        torch.save(content, tmp_path / "weights.pth")
        state = load(tmp_path / "weights.pth").module.state_dict()
        assert state  # the classifier was cut off, everything else is there
        assert all(torch.equal(value, squeezenet[key]) for key, value in state.items())


def test_mixed_precision_files_become_float32(squeezenet, tmp_path: Path) -> None:
    mixed = {k: v.half() if k.endswith("weight") else v for k, v in squeezenet.items()}
    save_file(mixed, tmp_path / "weights.safetensors")
    state = load(tmp_path / "weights.safetensors").module.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, mixed[key].float()) for key, value in state.items())


def test_densenet_files_with_the_old_names_load(tmp_path: Path) -> None:
    name = "features.denseblock1.denselayer1.norm{}1.weight"
    torch.save({name.format("."): torch.ones(2)}, tmp_path / "old.pth")
    assert [*read_state(tmp_path / "old.pth")] == [name.format("")]


def test_weights_that_do_not_fit_say_how(squeezenet, tmp_path) -> None:
    renamed = dict(squeezenet)
    renamed["features.0.wieght"] = renamed.pop("features.0.weight")
    renamed["features.3.squeeze.bias"] = torch.zeros(7)
    path = tmp_path / "weights.safetensors"
    save_file(renamed, path)
    said = (
        r"do not fit the network: 1 missing \(features\.0\.weight\), 1 unexpected .*wieght\), 1 of"
        r" another shape .*bias \[7\] instead of \[16\]\); did you mean features\.0\.weight\?$"
    )
    with pytest.raises(NetworkError, match=said):
        load(path)
    save_file(load_network("torchvision:resnet18", **SMALL).module.state_dict(), path)
    said = r"^[^?]*; these are another network's weights: give this one's, or name the other$"
    with pytest.raises(NetworkError, match=said):
        load(path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run by the unpickler",))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_that_cannot_be_read(tmp_path, name, capsys) -> None:
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
    name, head = f"torchvision:{name}", tmp_path / "head.safetensors"
    plain = load_network(name, normalize=False, **SMALL)
    z = plain.forward(pictures(plain)).embedding
    weight, bias = torch.randn(8, z.shape[1]), torch.randn(8)
    save_file({"weight": weight.half(), "bias": bias}, head)
    network = load_network(name, head=head, normalize=False, **SMALL)
    expected, found = z @ weight.half().float().T + bias, network.forward(pictures(plain))
    torch.testing.assert_close(found.embedding, expected, rtol=1e-4, atol=1e-3)
    assert network.pooled_replay
    if network.head_kind.affine:
        np.testing.assert_allclose(network.head_kind.matrix, weight.half().float(), atol=1e-4)
    assert network.head_kind.affine == ("mobilenet" not in name)
    assert any(torch.equal(v, bias) for v in network.module.state_dict().values())


# A header that promises far more than the file holds.
HEADER = b'{"weight":{"dtype":"F32","shape":[4096,512],"data_offsets":[0,8388608]}}'


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    good, path = torch.ones(4, 512), tmp_path / "head.safetensors"
    for tensors, message in (
        (None, "is not a file"),
        (len(HEADER).to_bytes(8, "little") + HEADER, r"head .* cannot be read"),
        ({"weight": torch.ones(4, 100)}, r"weight \[4, 100\] of F32; expected weight \[D 512\]"),
        ({"weight": torch.ones(512)}, r"holds weight \[512\] of F32; expected"),
        ({"bias": torch.ones(4)}, r"holds bias \[4\] of F32; expected weight \[D 512\]"),
        ({"weight": good, "other": torch.ones(1)}, r"holds .*other \[1\] of F32"),
        ({"weight": good, "bias": torch.ones(3)}, r"holds .*bias \[3\] of F32"),
        ({"weight": good.int()}, r"of I32; expected .* floating point"),
        ({"weight": good * float("nan")}, r"holds NaN or infinity"),
    ):
        if isinstance(tensors, bytes):
            path.write_bytes(tensors)
        elif tensors is not None:
            save_file(tensors, path)
        with pytest.raises(NetworkError, match=message):
            load_network("torchvision:squeezenet1_1", head=path, **SMALL)


def test_names_that_are_nearly_right() -> None:
    for network, message in (
        ("torchvision:resnet5", r"no model 'resnet5'; did you mean .*resnet50"),
        ("resnet18", r"'resnet18' is not a network; give torchvision:, .*torchvision:resnet18"),
        ("torchvison:resnet18", r"'torchvison' cannot be imported.*did you mean torchvision\?"),
        ("timm:resnet5O", r"timm has no model 'resnet5O'; did you mean .*resnet50"),
        ("json:dumpz", r"json has no 'dumpz'; did you mean dump, dumps"),
        ("json:__name__", r"json:__name__ is a str; expected a function"),
        ("toys.toy", r"write toys:toy, with a colon before the function"),
        ("resnet50.a1_in1k", "did you mean"),
    ):
        with pytest.raises(NetworkError, match=message):
            load_network(network, weights="random")


@pytest.mark.parametrize("row", ["resnet bkhw forward_features", "vit btk blocks.5.norm1"])
def test_timm(row: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name, layout, layer = f"test_{row}".split()
    network = load_network(f"timm:{name}", weights="random")
    x = pictures(network)
    features = network.forward(x)
    network.check()
    assert (network.layer, network.layout) == (layer, layout)
    assert network.pooled_replay == (layout == "bkhw")
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
    given = {"layer": "conv", "output": "a"}
    pair = load_network(f"{factory}:pair", **given)
    assert pair.preprocess == Preprocess(size=(16, 16))
    assert pair.forward(pictures(pair)).embedding.shape == (2, 4)
    given["head"], given["weights"] = tmp_path / "head.safetensors", tmp_path / "w.safetensors"
    save_file({"weight": torch.eye(4)[:2]}, given["head"])
    state = {"conv.weight": torch.ones(4, 3, 4, 4), "conv.bias": torch.arange(4.0)}
    save_file(state, given["weights"])
    headed = load_network(f"{factory}:net", normalize=False, **given)
    assert headed.forward(torch.ones(1, 3, 8, 8)).embedding.tolist() == [[48.0, 49.0]]
    np.testing.assert_allclose(headed.head_kind.matrix, np.eye(4)[:2])
    ready = load_network(f"{factory}:ready", device="cpu")
    assert (ready.layer, ready.spec) == ("conv", {"network": f"{factory}:ready"})


def test_factories_that_cannot_be_used(factory: str) -> None:
    for name, given, message in (
        ("net", {}, r"no default layer is known .*--layer.*conv"),
        ("wrong", {}, r"wrong returned int; expected a torch\.nn\.Module"),
        ("net", {"layer": "conv", "size": 32}, r"let the function .* return \(module, Prep"),
        ("ready", {"layer": "conv"}, "returns an EmbeddingNetwork, which settles layer itself"),
        ("ready", {"resize": "squash", "grid": (2, 2)}, "settles grid, resize itself; set it"),
        ("ready", {"normalize": False, "autocast": "bf16"}, "settles autocast, normalize itself"),
        ("ready", {"prefix_tokens": 1, "layout": "btk"}, "settles layout, prefix_tokens itself"),
        ("ready", {"channels_last": True, "device": "meta"}, "settles channels_last, device its"),
    ):
        with pytest.raises((NetworkError, InputError), match=message):
            load_network(f"{factory}:{name}", **given)
