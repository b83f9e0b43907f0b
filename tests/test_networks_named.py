"""Layers found by themselves: late class tokens, streams side by side, auxiliary heads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from embedcam.errors import InputError
from embedcam.network import EmbeddingNetwork, load_network
from embedcam.network.finding import find_explained
from embedcam.network.module import lay_out

# Name, what makes it tiny, side of its input, layer, grid, whether positions go through it alone.
TINY: list[tuple[str, dict[str, Any], int, str, tuple[int, int], bool]] = [
    ("cait_xxs24_224", {"embed_dim": 24, "depth": 4, "num_heads": 2, "init_values": 0.5}, 32,
     "blocks.3", (2, 2), True),
    ("xcit_nano_12_p8_224", {"embed_dim": 24, "depth": 2}, 32, "blocks.1", (4, 4), True),
    ("convit_tiny", {"embed_dim": 24, "depth": 3, "local_up_to_layer": 1, "num_heads": 2}, 32,
     "blocks.2.norm1", (2, 2), False),
    ("crossvit_tiny_240", {"embed_dim": (16, 24), "depth": ((1, 1, 1),), "img_scale": (1.0, 0.5),
     "patch_size": (8, 8), "num_heads": (2, 2)}, 32, "blocks.0.fusion.1.0.norm1", (4, 4), False),
    ("coat_tiny", {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1}, 64,
     "parallel_blocks.0.norm12", (8, 8), False),
    ("coat_lite_tiny", {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4}, 64,
     "patch_embed4", (2, 2), True),
    ("pit_ti_224", {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (1, 1, 1)}, 96,
     "transformers.2.blocks.0.norm1", (3, 3), False),
    ("tnt_s_patch16_224", {"embed_dim": 24, "inner_dim": 4, "depth": 2, "num_heads_outer": 2,
     "num_heads_inner": 2}, 32, "blocks.1.norm_out", (2, 2), False),
    ("efficientvim_m1", {"embed_dim": (8, 8, 8), "depths": (1, 1, 1)}, 128, "norm.3", (2, 2),
     False),
]  # fmt: skip


def tiny(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **given: create(*a, **given, **settings))


@pytest.mark.parametrize("row", TINY, ids=lambda row: row[0])
def test_timm(row: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings, side, layer, grid, alone = row
    tiny(monkeypatch, settings)
    network = load_network(f"timm:{name}", weights="random", size=side, normalize=False)
    pictures = torch.from_numpy(network.probe_images(2))
    features = network.forward(pictures)
    assert network.layer == layer
    library: Any = network.module.module
    with torch.no_grad(), hooked(library.get_submodule(layer)) as outputs:
        z = library.forward_head(library.forward_features(pictures))
    torch.testing.assert_close(features.embedding, z)
    torch.testing.assert_close(features.activations, as_maps(outputs[0], grid))
    network.check()  # its positions reach the embedding
    slopes = network.head_pass(pictures).vjp(torch.randn(z.shape, generator=seeded()))
    assert bool((slopes != 0).any(1).all())
    if alone:  # a picture with the other's activations has the other's embedding
        with torch.no_grad(), exchanged(library.get_submodule(layer)):
            moved = library.forward_head(library.forward_features(pictures))
        torch.testing.assert_close(moved, z.flip(0), rtol=1e-4, atol=1e-5)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def as_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return maps `[B K H W]` of maps, or of tokens whose last are the patches, row by row."""
    if tokens.ndim == 4:
        return tokens
    (height, width), before = grid, tokens.shape[1] - grid[0] * grid[1]
    maps = torch.zeros(len(tokens), tokens.shape[2], height, width)
    for row in range(height):
        for column in range(width):
            maps[:, :, row, column] = tokens[:, before + row * width + column]
    return maps


@contextmanager
def hooked(part: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = part.register_forward_hook(lambda _, __, out: outputs.append(out))
    yield outputs
    handle.remove()


@contextmanager
def exchanged(part: nn.Module) -> Iterator[None]:
    handle = part.register_forward_hook(lambda _, __, out: out.flip(0))
    yield
    handle.remove()


def test_the_stream_that_was_chosen_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, settings, side, layer, *_ = next(row for row in TINY if row[0].startswith("crossvit"))
    tiny(monkeypatch, settings)
    with caplog.at_level("INFO", "embedcam"):
        load_network(f"timm:{name}", weights="random", size=side)
    assert (
        f"2 streams of positions lead to the embedding side by side, and the finest is explained, "
        f"layer {layer} (16 positions); layer= takes another: blocks.0.fusion.0.0.norm1 (4 pos"
    ) in caplog.text
    caplog.clear()
    other = "blocks.0.fusion.0.0.norm1"
    with caplog.at_level("INFO", "embedcam"):
        network = load_network(f"timm:{name}", weights="random", size=side, layer=other)
    assert network.forward(network.probe_images()).activations.shape[2:] == (2, 2)
    assert "streams" not in caplog.text


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96)])
def test_inception_norms_its_input_as_its_weights_expect(name: str, side: int) -> None:
    network = load_network(f"torchvision:{name}", weights="random", size=side, normalize=False)
    make: Callable[..., Any] = getattr(models, name)
    plain = make(weights=None, init_weights=False, transform_input=False, aux_logits=False).eval()
    plain.fc = nn.Identity()
    plain.load_state_dict(network.module.state_dict())
    pictures = torch.from_numpy(network.probe_images(2))
    # From the mean and deviation of ImageNet to half and half, as the weights were trained with.
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = plain((pictures * deviation + mean - 0.5) / 0.5)
    found = network.forward(pictures)
    torch.testing.assert_close(found.embedding, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.activations.mean((2, 3)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_files_with_auxiliary_heads_load(name: str, tmp_path: Path) -> None:
    make: Callable[..., Any] = getattr(models, name)
    whole = make(weights=None, init_weights=False).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    network = load_network(f"torchvision:{name}", weights=tmp_path / "whole.pth")
    state, other = network.module.state_dict(), whole.state_dict()
    assert {name.partition(".")[0] for name in {*other} - {*state}} <= {
        "fc", "aux1", "aux2", "AuxLogits",
    }  # fmt: skip
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_maxvit_is_made_for_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, weights: Any = None, input_size: tuple[int, int] = (224, 224)) -> Any:
        assert name == "maxvit_t"
        return models.MaxVit(input_size, 8, 1, [8, 8, 8, 16], [1] * 4, 4, 0.0)

    monkeypatch.setattr(models, "get_model", small)
    network = load_network("torchvision:maxvit_t", weights="random", size=64, normalize=False)
    pictures = torch.from_numpy(network.probe_images(2))
    features, library = network.forward(pictures), network.module
    x = pictures
    with torch.no_grad():
        for part in (library.stem, *library.blocks):
            x = part(x)
        expected = torch.tanh(library.classifier[3](library.classifier[2](x.mean((2, 3)))))
    torch.testing.assert_close(features.activations, x)
    torch.testing.assert_close(features.embedding, expected)
    assert network.head_kind.pooled
    assert network.pooled_replay
    # Another size than it was trained at keeps the weights.
    bigger = load_network("torchvision:maxvit_t", size=128)
    assert bigger.forward(bigger.probe_images()).activations.shape[2:] == (4, 4)
    with pytest.raises(InputError, match="is not square, which torchvision:maxvit_t needs"):
        load_network("torchvision:maxvit_t", weights="random", size=(64, 128))


class Streams(nn.Module):
    """Two convolutions side by side, and numbers that are no positions: they never grow fewer."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.first, self.fine = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 4, 4)
        self.coarse, self.state = nn.Conv2d(3, 4, 8, 8), nn.LayerNorm(4)
        self.joined = joined

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.fine(images), self.coarse(images)
        slots = torch.linspace(0, 1, 100)[:, None] * images.mean((1, 2, 3))[:, None, None]
        state = self.state(slots * torch.arange(4.0)).square().sum((1, 2))[:, None]
        if self.joined:
            return self.first(images).mean((2, 3)) + coarse.mean((2, 3))
        return torch.cat([fine.mean((2, 3)), coarse.mean((2, 3)), state], 1)


def test_streams_of_positions_are_told_from_other_numbers() -> None:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32)
    found = find_explained(Streams(joined=False).eval(), picture)
    assert found is not None
    assert (found.layer, found.prefix_tokens) == ("fine", None)
    assert found.said.startswith("2 streams of positions")
    assert found.said.endswith("layer fine (64 positions); layer= takes another: coarse (16 "
                               "positions)")  # fmt: skip
    # What the embedding does not read is no stream, whatever its grid.
    joined = find_explained(Streams(joined=True).eval(), picture)
    assert joined is not None
    assert joined.layer == "first"
    assert "layer fine" not in joined.said


def test_a_network_without_positions_has_no_layer() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert find_explained(flat, torch.rand(1, 3, 2, 2)) is None
    assert find_explained(flat, torch.rand(1, 3, 9, 9)) is None  # it does not take the input


def test_weights_of_three_dimensions_stay_as_they_lie() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.deep(self.flat(images)[:, None])[:, 0].mean((2, 3))

    network = EmbeddingNetwork(Mixed().eval(), "flat", input_size=(8, 8), channels_last=False)
    before = network.forward(network.probe_images()).embedding
    lay_out(network.module, True)
    assert network.module.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.module.deep.weight.is_contiguous()
    torch.testing.assert_close(network.forward(network.probe_images()).embedding, before)
    lay_out(network.module, False)
    assert network.module.flat.weight.is_contiguous()
