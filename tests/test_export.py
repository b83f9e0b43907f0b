"""`export_onnx`: the file computes what torch does, says what it is, and is refused otherwise."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from photo_samples import DENSE, SQUASH, Flat, Pooled, build, network_of, picture
from test_network import assert_same_state, state_of
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import Permute
from toys import seeded

import embedcam
import embedcam.export as exporting
from embedcam import EmbeddingNetwork, Explainer, Index, Recipe
from embedcam.errors import IndexFormatError, InputError, NetworkError, NetworkMismatch
from embedcam.export import export_onnx
from embedcam.index.identity import NetworkWarning
from embedcam.onnx import OnnxNetwork


class Deep(nn.Module):
    """Two layers that can be explained, in-place units behind both; a value called embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.fine, self.relu = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.linear, self.added = nn.Linear(8, 5, bias=False), nn.Embedding(2, 5)

    def forward(self, images: Tensor) -> Tensor:
        coarse = self.second(self.fine(self.first(images)))
        added = self.added(torch.zeros(1, dtype=torch.int64))
        return self.linear(self.relu(coarse).mean((2, 3))) + added


class Swinlike(nn.Module):
    """Activations `[B H W K]`, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.last = Permute([0, 2, 3, 1])

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.last(self.conv(images)).mean((1, 2)))


def wrapped(build: Callable[[], nn.Module], layer: str, **settings: Any) -> EmbeddingNetwork:
    return EmbeddingNetwork(seeded(build), layer, preprocess=SQUASH, **settings)


def parts() -> EmbeddingNetwork:
    trunk = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU()))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return EmbeddingNetwork.from_parts(trunk, head, preprocess=SQUASH)


def vit() -> nn.Module:
    made = models.VisionTransformer(32, 16, 2, 2, 12, 24, num_classes=6)
    nn.init.normal_(made.heads.head.weight)
    return made


FINE = Recipe(method="polycam", layers=("fine", "relu"))
CASES: dict[str, tuple[Callable[[], EmbeddingNetwork], Recipe, str]] = {
    "affine": (network_of, Recipe(), "affine"),
    "not normalised": (lambda: network_of(Flat, normalize=False), DENSE, "other"),
    "pooled vector": (parts, Recipe(), "identity"),
    "tokens": (lambda: wrapped(vit, "encoder.layers.encoder_layer_1.ln_1"), DENSE, "other"),
    "channels last": (lambda: wrapped(Swinlike, "last", layout="bhwk"), Recipe(), "affine"),
    "several layers": (lambda: wrapped(Deep, "relu"), FINE, "affine"),
}
ONE_SIZE = ("tokens", "not normalised")
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module", params=CASES)
def case(request, photos, tmp_path_factory) -> tuple[str, EmbeddingNetwork, Path, Path]:
    make, recipe, _ = CASES[request.param]
    network = make()
    folder = tmp_path_factory.mktemp("case")
    index = build(photos, folder / "index", network, recipe)
    export_onnx(index, network, folder / "network.onnx")
    return request.param, network, index, folder / "network.onnx"


def test_it_computes_what_torch_does_for_batches_of_any_size(case) -> None:
    _, network, _, path = case
    file = OnnxNetwork(path)
    layers = list(file.layers)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        expected, found = network.embed(images, layers), file.embed(images, layers)
        assert len(found.activations) == len(layers)
        both = [(one.embedding, *one.activations) for one in (found, expected)]
        for mine, torchs in zip(*both, strict=True):
            assert mine.shape == torchs.shape
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, torchs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)


def test_an_explainer_draws_the_same_maps(case: tuple[str, EmbeddingNetwork, Path, Path]) -> None:
    name, network, index, path = case
    assert (OnnxNetwork(path).sides is None) == (name not in ONE_SIZE)
    queries = [picture(1, 40), picture(2, 41, (30, 60))]
    one_thread = OnnxNetwork(path, threads=1)
    with Explainer(index, network) as torchs, Explainer(index, one_thread) as ours:
        asked = {"result": ours.index.ids[0], "above": ours.index.ids[-1]}
        for how in ({}, asked, {"detail": 2}):
            both = (each.explain_batch(queries, **how) for each in (ours, torchs))
            for mine, expected in zip(*both, strict=True):
                assert (mine.ids, mine.extent) == (expected.ids, expected.extent)
                scale = np.abs(expected.signed_cam).max()
                assert scale > 0
                assert np.abs(mine.signed_cam - expected.signed_cam).max() < 1e-4 * scale
                np.testing.assert_allclose(mine.distances, expected.distances, rtol=1e-3, atol=1e-6)
                assert set(mine.layer_weights or ()) == set(expected.layer_weights or ())
        plain = ours.explain(queries[1]).signed_cam  # a finer map is another one
    assert np.abs(mine.signed_cam - plain).max() > 1e-2 * scale


def test_it_says_what_the_manifest_says(case) -> None:
    name, network, index, path = case
    model = onnx.load(str(path))
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["embedcam.version"] == embedcam.__version__
    with Index.open(index) as opened:
        stored = opened.manifest.to_dict()["network"]
    stored.pop("loading", None)
    assert json.loads(props["embedcam.network"]) == stored
    several = name == "several layers"
    assert json.loads(props["embedcam.layers"]) == [network.layer, *(["fine"] if several else [])]
    outputs = [one.name for one in model.graph.output]
    norm = [] if name == "not normalised" else ["norm"]
    assert outputs == ["activations", *(["activations_1"] if several else []), "embedding", *norm]
    assert "embedcam.loading" not in props  # a module of the caller's own
    (entry,) = model.graph.input
    sides = [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, *((32, 32) if name in ONE_SIZE else ("height", "width"))]
    assert json.loads(props["embedcam.head"])["kind"] == CASES[name][2]


def test_the_head_s_bias_makes_the_embedding_of_the_pooled_activations(case) -> None:
    """z = W p + b, with W as the index keeps it and b as the file says it."""
    name, network, index, path = case
    head = OnnxNetwork(path).head
    if CASES[name][2] == "other":
        assert head.bias is None
        return
    matrix = np.eye(8)
    if name == "several layers":
        matrix = network.module.get_parameter("linear.weight").detach().numpy()
    elif name != "pooled vector":
        np.testing.assert_allclose(head.bias, network.module.get_parameter("linear.bias").detach())
        with Index.open(index) as opened:
            encoding = opened.encoding(0)
            assert (encoding.name, encoding.origin) == ("low-rank", "head")
            matrix = encoding.fitted["basis"] * np.prod(opened.manifest.layers[0].grid)
    features = network.forward(network.probe_images(3))
    z = features.activations.numpy().mean((2, 3)) @ matrix.T + head.bias
    expected = features.embedding * features.norm[:, None]
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)


def test_a_half_precision_network_is_left_as_it_was(photos: Path, tmp_path: Path) -> None:
    network, target = network_of(autocast=torch.bfloat16), tmp_path / "network.onnx"
    target.write_text("what was there before")
    before, rng = state_of(network.module), torch.get_rng_state()
    with Index.open(build(photos, tmp_path / "index", network)) as opened:
        report = export_onnx(opened, network, str(target))
        assert len(opened) == 12  # still open
    assert network.autocast == torch.bfloat16
    assert_same_state(before, state_of(network.module))
    assert torch.equal(torch.get_rng_state(), rng)
    assert (report.path, report.bytes) == (target, target.stat().st_size)
    assert (report.layers, report.head) == (("relu",), "affine")
    assert 0 < report.difference < 1e-5
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index", "network.onnx"]
    with pytest.warns(NetworkWarning, match=r"\(bfloat16\) in the index, .* \(float32\) given"):
        Explainer(tmp_path / "index", onnx=target).index.close()


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(photos, tmp_path_factory.mktemp("built") / "index", network_of())


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(built: Path, tmp_path: Path) -> None:
    network, file = network_of(), tmp_path / "network.onnx"
    nowhere = tmp_path / "no" / "network.onnx"
    for index, given, path, error, message in (
        (built, network_of(Flat), file, NetworkMismatch, "not the network of the index"),
        (built, network_of(normalize=False), file, NetworkMismatch, "its normalize is True"),
        (tmp_path / "none", network, file, IndexFormatError, "there is no index here"),
        (built, network, tmp_path, InputError, r"is a folder; give a file, .*network\.onnx"),
        (built, network, nowhere, InputError, r"there is no folder .*; make it first"),
        (built, network, os.devnull, InputError, "is not a regular file"),
    ):
        with pytest.raises(error, match=message):
            export_onnx(index, given, path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_removed(built, tmp_path, monkeypatch) -> None:
    right = exporting.onnx_model

    def wrong(*given: Any) -> Any:
        model = right(*given)
        (bias,) = (one for one in model.graph.initializer if list(one.dims) == [5])
        values = np.frombuffer(bias.raw_data, np.float32) * np.float32(1.01)
        bias.raw_data = values.tobytes()
        return model

    monkeypatch.setattr(exporting, "onnx_model", wrong)
    target = tmp_path / "network.onnx"
    target.write_text("what was there before")
    with pytest.raises(NetworkError, match=r"ONNX Runtime's embedding is off from torch's by 0\.0"):
        export_onnx(built, network_of(), target)
    assert target.read_text() == "what was there before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["network.onnx"]


class Counting(Pooled):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).reshape(len(images), -1)  # the batch as a number


class Deciding(Pooled):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 if float(images.sum()) > -1e9 else -1)


def test_networks_that_cannot_be_followed(built: Path, tmp_path: Path) -> None:
    for kind, message in (
        (Counting, r"fixes the number of pictures in a batch.*x\.shape\[0\] where it says len"),
        (Deciding, r"torch cannot follow the network into ONNX \(.+\); give a module of tensor"),
    ):
        with pytest.raises(NetworkError, match=message) as caught:
            export_onnx(built, network_of(kind), tmp_path / "network.onnx")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_networks_that_no_file_of_one_piece_holds() -> None:
    half, large = network_of(), network_of()
    half.module.to(torch.bfloat16)
    large.module.register_buffer("table", torch.zeros(1).expand(1 << 30))
    for network, message in (
        (half, "computes in bfloat16, and ONNX files are written in"),
        (large, r"holds 4\.3 GB of parameters; one ONNX file holds at"),
        (network_of(layout="bkl"), "takes no pictures and cannot be exported"),
    ):
        with pytest.raises(NetworkError, match=message):
            exporting._refuse_unexportable(network)


def test_missing_packages_are_named(built, tmp_path, monkeypatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(NetworkError, match=rf'{name}, which .*"embedcam\[onnx\]"'):
                export_onnx(built, network_of(), tmp_path / "network.onnx")
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(NetworkError, match=r"takes torch 2\.6 or newer, and this is 2\.4\.1"):
        export_onnx(built, network_of(), tmp_path / "network.onnx")


def test_a_full_disk_leaves_nothing(built, tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(exporting, "_model_bytes", lambda *_: b"written")
    with pytest.raises(InputError, match=r"cannot be written to \(No space left on device\)"):
        export_onnx(built, network_of(), tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []
