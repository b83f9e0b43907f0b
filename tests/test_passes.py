"""How forward passes are run: a table, what it changes, and that additions repeat it."""

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_samples import SQUASH, network_of, picture
from torch import Tensor, nn
from torchvision import models
from toys import seeded, small_vit

from embedcam import EmbeddingNetwork, Explainer, Index, add_images, build_index, find_images
from embedcam.errors import IndexFormatError
from embedcam.index import RunEntry
from embedcam.index.manifest import check
from embedcam.network import load_network
from embedcam.network.module import is_convolutional
from embedcam.preprocess import usual_passes
from embedcam.report import write_report

pytestmark = pytest.mark.usefixtures("quick_disk")


class Convolutional(nn.Module):
    """Two convolutions and a linear map; `seen` is (batch, channels last) of every input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.relu, self.linear = nn.ReLU(), nn.Linear(8, 5)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        last = images.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((len(images), last))
        return self.linear(self.relu(self.second(self.first(images))).mean((2, 3)))


class Viewing(Convolutional):
    """Takes contiguous memory only."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.view(len(images), -1).view(images.shape))


class Striding(Convolutional):
    """Computes something else where channels come last: wrong code, which runs."""

    def forward(self, images: Tensor) -> Tensor:
        z = super().forward(images)
        return z * torch.linspace(1, 2, 5) if self.seen[-1][1] else z


def plain() -> nn.Module:
    """The same, which can be exported."""
    pooled = [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
    first, second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
    parts = [("first", first), ("second", second), ("relu", nn.ReLU()), *pooled]
    return nn.Sequential(OrderedDict([*parts, ("linear", nn.Linear(8, 5))]))


def made() -> tuple[nn.Module, Any]:
    return seeded(plain), SQUASH


def wrapped(kind: type[Convolutional] = Convolutional, **settings: Any) -> EmbeddingNetwork:
    return EmbeddingNetwork(seeded(kind), "relu", preprocess=SQUASH, **settings)


def seen_of(network: EmbeddingNetwork) -> list[tuple[int, bool]]:
    assert isinstance(network.module, Convolutional)
    return network.module.seen


# The table


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (("torch", "cpu", False, False), (8, False)),
        (("torch", "cpu", True, False), (8, True)),
        (("torch", "cpu", True, True), (8, True)),
        (("torch", "cuda", True, False), (64, False)),
        (("torch", "cuda", True, True), (64, True)),
        (("torch", "cuda", False, True), (64, False)),
        (("onnx", "cpu", True, False), (32, False)),
    ],
)
def test_the_table(of: tuple[str, str, bool, bool], expected: tuple[int, bool]) -> None:
    runtime, device, convolutional, half = of
    assert usual_passes(runtime, device, convolutional=convolutional, half=half) == expected


def test_kinds_of_networks() -> None:
    with torch.device("meta"):
        known = {name: models.get_model(name) for name in ("resnet18", "mobilenet_v2", "vgg11")}
    assert all(map(is_convolutional, known.values()))
    assert not is_convolutional(small_vit())
    assert not is_convolutional(nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.MultiheadAttention(4, 2)))
    assert not is_convolutional(nn.ModuleDict())


# The memory format


def test_a_convolutional_network_gets_channels_last_and_its_module_stays_as_it_was() -> None:
    network, plain = wrapped(), wrapped(channels_last=False)
    assert not network.channels_last  # before anything was asked
    identity, expected = network.identity(), plain.identity()
    assert network.channels_last
    assert not plain.channels_last
    assert seen_of(network)[-1] == (1, True)
    assert {last for _, last in seen_of(plain)} == {False}
    np.testing.assert_allclose(identity.probe_embedding, expected.probe_embedding, rtol=1e-5)
    np.testing.assert_allclose(identity.probe_pooled, expected.probe_pooled, rtol=1e-5)
    assert identity.parameters_sha256 == expected.parameters_sha256
    weight = network.module.get_parameter("first.weight")
    assert weight.is_contiguous()
    assert network.forward(network.probe_images(2)).activations.is_contiguous()


@pytest.mark.parametrize("kind", [Viewing, Striding])
def test_a_module_that_minds_the_format_stays_contiguous(kind: type[Convolutional]) -> None:
    network = wrapped(kind)
    expected = wrapped(kind, channels_last=False).identity().probe_embedding
    assert np.array_equal(network.identity().probe_embedding, expected)
    assert (network.channels_last, network.usual_run.channels_last) == (False, False)
    assert seen_of(network)[-1] == (1, False)


def test_weights_follow_where_the_module_is_embedcam_s_own() -> None:
    network = load_network("test_passes:made", layer="relu")
    weight = network.module.get_parameter("second.weight")
    before = network.identity()
    assert network.channels_last
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert before.parameters_sha256 == wrapped().identity().parameters_sha256
    assert network.spec is not None
    assert network.spec["channels_last"] is None
    given = load_network("test_passes:made", layer="relu", channels_last=False)
    given.identity()
    assert not given.channels_last
    assert given.module.get_parameter("second.weight").is_contiguous()


# A job


def batches_of(network: EmbeddingNetwork, count: int) -> list[int]:
    """Return the sizes of the last batches that make up so many images."""
    sizes: list[int] = []
    for size, _ in seen_of(network)[::-1]:
        if sum(sizes) == count:
            break
        sizes.append(size)
    return sizes[::-1]


def embedded_in(network: EmbeddingNetwork, index: Path, photos: Path, **asked: Any) -> list[int]:
    """Build or add, and return the sizes of the batches of the embedding pass."""
    sizes: list[int] = []
    forward = network.forward

    def spied(images: Any, **more: Any) -> Any:
        sizes.append(len(images))
        return forward(images, **more)

    network.forward = spied  # type: ignore[method-assign]
    work = add_images if (index / "manifest.json").exists() else build_index
    work(find_images(photos), network, index, workers=0, progress=False, **asked)
    return [size for size in sizes if size > 2]  # but for probes


def more_photos(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        picture(1, 50 + number).save(folder / f"new{number}.png")
    return folder


def run_of(index: Path) -> RunEntry | None:
    with Index.open(index) as opened:
        return opened.manifest.run


def test_a_build_takes_the_table_s_and_says_and_keeps_it(photos, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    assert embedded_in(wrapped(), tmp_path / "i", photos)[:2] == [8, 4]
    assert run_of(tmp_path / "i") == RunEntry("torch", "cpu", 8, True)
    assert "forward passes: batches of 8, channels last, torch" in caplog.messages
    raw = json.loads((tmp_path / "i" / "manifest.json").read_text())
    run = {"runtime": "torch", "device": "cpu", "batch_size": 8, "channels_last": True}
    assert raw["run"] == run


def test_a_given_batch_size_wins_and_additions_repeat_it(photos, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    sizes = embedded_in(wrapped(channels_last=False), tmp_path / "i", photos, batch_size=5)
    assert sizes[:2] == [5, 5]
    assert run_of(tmp_path / "i") == RunEntry("torch", "cpu", 5, False)
    later, again = more_photos(tmp_path / "later"), wrapped()
    caplog.clear()
    assert embedded_in(again, tmp_path / "i", later)[:2] == [5, 5]
    assert not again.channels_last
    assert "forward passes: batches of 5, torch" in caplog.messages
    assert run_of(tmp_path / "i") == RunEntry("torch", "cpu", 5, False)


def test_what_is_given_to_an_addition_wins(photos, tmp_path) -> None:
    build_index(find_images(photos), wrapped(), tmp_path / "i", batch_size=5, progress=False)
    later, again = more_photos(tmp_path / "later"), wrapped(channels_last=False)
    assert embedded_in(again, tmp_path / "i", later, batch_size=7)[:1] == [7]
    assert not again.channels_last


def test_a_run_elsewhere_is_not_repeated() -> None:
    network = wrapped()
    for run in (
        None,
        RunEntry("onnx", "cpu", 32, False),
        RunEntry("torch", "cuda", 64, False),
    ):
        assert network.repeat_run(run) is None
    network.check_steady()
    assert network.channels_last
    assert network.repeat_run(RunEntry("torch", "cpu", 3, True)) == 3


def test_a_resumed_build_takes_the_same_batches(photos, tmp_path, monkeypatch) -> None:
    build_index(find_images(photos), wrapped(), tmp_path / "whole", progress=False)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("embedcam.offline.merge.gather", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_index(find_images(photos), wrapped(), tmp_path / "i", progress=False)
    assert embedded_in(wrapped(), tmp_path / "i", photos) == []  # nothing is embedded again
    with Index.open(tmp_path / "whole") as one, Index.open(tmp_path / "i") as other:
        assert one.manifest.run == other.manifest.run
        rows = one.live_positions()
        assert np.array_equal(one.embeddings(rows), other.embeddings(rows))


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        ({"batch_size": 0}, "batch_size = 0 is impossible"),
        ({"batch_size": 1 << 40}, "is impossible"),
        ({"runtime": "tpu"}, "known: torch, onnx"),
        ({"channels_last": 1}, "not of type bool"),
        ({"device": "x" * 101}, "at most 100"),
    ],
)
def test_a_manifest_s_run_is_read_with_suspicion(photos, tmp_path, run, wrong) -> None:
    build_index(find_images(photos), network_of(), tmp_path / "i", progress=False)
    raw = json.loads((tmp_path / "i" / "manifest.json").read_text())
    with pytest.raises(IndexFormatError, match=wrong):
        check(tmp_path, {**raw, "run": {**raw["run"], **run}})
    assert check(tmp_path, {**raw, "run": None}).run is None


def test_a_report_takes_the_table_s(photos, tmp_path, monkeypatch) -> None:
    network = wrapped()
    build_index(find_images(photos), network, tmp_path / "i", progress=False)
    sizes: list[int] = []
    explained = Explainer.explain_batch

    def spied(self: Explainer, queries: Any, **asked: Any) -> Any:
        sizes.append(len(queries))
        return explained(self, queries, **asked)

    monkeypatch.setattr(Explainer, "explain_batch", spied)
    with Explainer(tmp_path / "i", network) as explainer:
        write_report(explainer, find_images(photos), tmp_path / "r", side=32, progress=False)
        other = dataclasses.replace(explainer.network.usual_run, batch_size=3)
        monkeypatch.setattr(type(network), "usual_run", other)
        write_report(explainer, find_images(photos), tmp_path / "s", side=32, progress=False)
    assert sizes == [8, 4, 3, 3, 3, 3]
