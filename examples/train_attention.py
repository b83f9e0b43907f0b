"""Train LFI-CAM and ABN on the demonstration's scenes, and see whether they look at the digit.

    python examples/train_attention.py OUTPUT

Each network is the demo's own, cut in two, with its attention branch at the cut, trained from
random weights by the demo's semi-hard triplet loss (ABN: by the sum of those of its two
embeddings). Measured on held-out scenes, before and after:

- loss, of the first and the last tenth of the steps; Recall@1, leave one out;
- where the energy of the attention map lies: its share inside the digit's box, maps resized to the
  scene, nothing else; and how often the map's highest place lies there. Chance for both is the
  box's share of the area.
- the control, another share of energy: beside LFI-CAM's map the same sum with every channel alike,
  which shows what the branch adds to the trunk; beside ABN's M, a sigmoid with a floor everywhere,
  each map with its minimum taken off.

Writes lfi.safetensors and abn.safetensors (read back, with names and shapes checked, before they
are measured) and attention.png.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from embedcam import EmbeddingNetwork
from embedcam.demo import digits_network as training
from embedcam.demo.digits_network import digits_preprocess, initialise, save_weights
from embedcam.demo.scenes import Scene, SceneMaker
from embedcam.demo.settings import DemoSettings
from embedcam.methods import MethodWarning, cam_for
from embedcam.methods.learned import ABNetwork, LFINetwork
from embedcam.metrics import box_mask, energy_share, pointing_hit, recall_at_k
from embedcam.network.checkpoints import load_state, read_state
from embedcam.ops import normalize, resize
from embedcam.render import overlay
from embedcam.targets import Coordinate

METHOD = {LFINetwork: "lficam", ABNetwork: "abn"}


def make_lfi(settings: DemoSettings, width: int = 32) -> LFINetwork:
    """The demo's network with LFI-CAM between its trunk and its pooling."""
    network = initialise(settings.channels, settings.embedding_size, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LFINetwork(network.trunk, pooled(network.head), settings.channels, width)


def make_abn(settings: DemoSettings) -> ABNetwork:
    """The demo's network with ABN before its last two blocks."""
    network = initialise(settings.channels, settings.embedding_size, settings.seed)
    trunk, stage = network.trunk[:4], network.trunk[4:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ABNetwork(
            trunk, stage, pooled(network.head), settings.channels, settings.embedding_size
        )


def pooled(head: nn.Linear) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def train(module: LFINetwork | ABNetwork, settings: DemoSettings, progress: bool = True) -> Tensor:
    """Train in place, as the demo trains its network; the loss of each step, `[steps]`."""
    batches = training.Batches(settings, progress)
    module.train().to(memory_format=torch.channels_last)
    both = module.both if isinstance(module, ABNetwork) else lambda images: [module(images)]
    losses = training.descend(module, batches, settings, both, progress)
    module.eval().to(memory_format=torch.contiguous_format)
    return losses


def explained(module: nn.Module, settings: DemoSettings) -> EmbeddingNetwork:
    return EmbeddingNetwork(
        module, "trunk", preprocess=digits_preprocess(settings.input_size), name="digits"
    )


def held_out(settings: DemoSettings) -> list[Scene]:
    maker = SceneMaker(settings.seed, settings.scene_size)
    return [maker.scene("query", number) for number in range(settings.n_query)]


def attention(module: nn.Module, settings: DemoSettings, scenes: Sequence[Scene]) -> np.ndarray:
    """Maps `[n h w]` on the layer's own grid."""
    network, pixels = explained(module, settings), [scene.pixels for scene in scenes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)  # it ignores the target, as it should here
        made = cam_for(network, pixels, Coordinate(0), METHOD[type(module)], progress=False)
    return made.grid_cam


def measure(
    module: nn.Module, settings: DemoSettings, scenes: Sequence[Scene], maps: np.ndarray
) -> dict[str, float]:
    """Recall@1, and shares of energy in the digit's box: of the maps, and of their control."""
    network = explained(module, settings)
    assert network.preprocess is not None
    images = np.stack([network.preprocess(Image.fromarray(scene.pixels)) for scene in scenes])
    found = [network.forward(images[start : start + 50]) for start in range(0, len(images), 50)]
    embedding = torch.cat([part.embedding for part in found]).numpy()
    labels = np.array([scene.digits[0].label for scene in scenes])
    size = scenes[0].pixels.shape[:2]
    boxes = np.stack([box_mask(scene.digits[0].box, size) for scene in scenes])
    drawn = resize(maps, size)
    if isinstance(module, LFINetwork):
        activations = torch.cat([part.activations for part in found]).numpy()
        control = activations.mean(1).clip(min=0)
    else:
        control = normalize(maps)
    return {
        "recall": recall_at_k(embedding, labels),
        "share": float(energy_share(drawn, boxes).mean()),
        "peak": float(pointing_hit(drawn, boxes).mean()),
        "control": float(energy_share(resize(control, size), boxes).mean()),
        "chance": float(boxes.mean()),
    }


def reloaded(module: LFINetwork | ABNetwork, fresh: nn.Module, path: Path) -> nn.Module:
    """Save a module and read it back into another; names and shapes that differ are refused."""
    save_weights(module, path)
    load_state(fresh, read_state(path), (), str(path))
    return fresh.eval()


def draw(path: Path, scenes: Sequence[Scene], columns: dict[str, np.ndarray]) -> None:
    """Draw a row for each scene: itself, and each column's map over it, on its own scale."""
    from matplotlib.figure import Figure

    figure = Figure((1.6 * (1 + len(columns)), 1.6 * len(scenes)), layout="constrained")
    axes = figure.subplots(len(scenes), 1 + len(columns), squeeze=False)
    for row, scene in enumerate(scenes):
        plain = Image.fromarray(scene.pixels)
        for axis, maps in zip(axes[row], [None, *columns.values()], strict=True):
            axis.imshow(plain if maps is None else overlay(plain, maps[row]))
            axis.set_axis_off()
    for axis, name in zip(axes[0], ["scene", *columns], strict=True):
        axis.set_title(name)
    figure.savefig(path)


def run(folder: Path, settings: DemoSettings, n_shown: int = 6, progress: bool = True) -> None:
    """Train both, print what was measured, write weights and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = held_out(settings)
    columns: dict[str, np.ndarray] = {}
    titles = ("loss", "Recall@1", "energy in box", "peak in box", "control")
    print(f"{'':8}" + "".join(f"{title:>18}" for title in titles) + f"{'chance':>9}")
    for name, make in (("lfi", make_lfi), ("abn", make_abn)):
        module = make(settings).eval()
        first = attention(module, settings, scenes)
        before = measure(module, settings, scenes, first)
        started = time.perf_counter()
        losses = train(module, settings, progress)
        seconds = time.perf_counter() - started
        module = reloaded(module, make(settings), folder / f"{name}.safetensors")
        last = attention(module, settings, scenes)
        after = measure(module, settings, scenes, last)
        tenth = max(1, len(losses) // 10)
        start, end = float(losses[:tenth].mean()), float(losses[-tenth:].mean())
        figures = [(start, end)]
        figures += [(before[key], after[key]) for key in ("recall", "share", "peak", "control")]
        print(
            f"{METHOD[type(module)]:8}"
            + "".join(f"{f'{one:.3f} > {two:.3f}':>18}" for one, two in figures)
            + f"{after['chance']:>9.3f}   ({seconds:.0f} s)"
        )
        columns[f"{name} before"] = normalize(first[:n_shown])
        columns[f"{name} after"] = normalize(last[:n_shown])
    draw(folder / "attention.png", scenes[:n_shown], columns)
    print(f"wrote {folder / 'attention.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the weights and the picture")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and batches")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--scenes", type=int, default=1000, help="for training")
    parser.add_argument("--batch-size", type=int, default=40, help="scenes a step, of 10 classes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    settings = DemoSettings(
        seed=given.seed, steps=given.steps, n_train=given.scenes, batch_size=given.batch_size,
        n_query=200, scene_size=96,
    )  # fmt: skip
    run(given.output, settings)


if __name__ == "__main__":
    main()
