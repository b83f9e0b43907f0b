"""A small vision transformer and a small network of two towers, trained on the demo's scenes.

- *small ViT*: pictures of 80 x 80, five convolutions to 10 x 10 tokens of 8 x 8 pixels, a class
  token and 4 registers, 3 blocks of width 96, the class token through a LayerNorm and a linear map
  to 32 numbers of length 1. Trained on scenes with one digit and with two by cross-entropy over the
  cosines to a proxy a class (NormFace, Wang et al. 2017).
- *two towers*: the same, trained further on scenes with one digit and with two, beside a tower for
  texts (a mean of word embeddings, and two layers), by SigLIP's loss (Zhai et al. 2023): a caption
  belongs to every scene of a batch that shows all digits it names; beside it the loss from before,
  with the texts "a zero", "a one", ... as the proxies.

Scenes are embedcam.demo's: training has 60% of scikit-learn's handwriting, galleries and queries
20% each of the rest, and all have seeds of their own.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from embedcam import EmbeddingNetwork
from embedcam.demo.digits_network import MEAN, STD, digits_preprocess, save_weights
from embedcam.demo.scenes import Scene, SceneMaker, Split
from embedcam.images.progress import progress_of
from embedcam.network.checkpoints import load_state, read_state

from ..benchmarks.timing import table

Network = TypeVar("Network", bound=nn.Module)
Made = TypeVar("Made")
SIDE, GRID, REGISTERS = 80, 10, 4
"""Of the input, in pixels; of the tokens' grid."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ONE = (
    "{a}", "a {a}", "the digit {i}", "the number {a}", "a photo of a {a}", "a handwritten {a}",
    "a {a} among doodles",
)  # fmt: skip
TWO = (
    "{a} and {b}", "a {a} and a {b}", "the digits {i} and {j}", "a {a} next to a {b}",
    "a photo of a {a} and a {b}",
)  # fmt: skip
"""Captions of one digit and of two, in words (a, b) and in ciphers (i, j)."""
FIRST = 1
"""Seed; seed 0 was looked at while the networks were designed."""
SCALE = 16.0
"""Of the cosines to the proxies."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks and their training; the defaults take minutes on one core."""

    width: int = 96
    depth: int = 3
    embedding: int = 32
    scenes: int = 4000
    batch: int = 64
    steps: int = 800
    text_steps: int = 500
    rate: float = 2e-3


def caption(template: str, digits: Sequence[int]) -> str:
    """Return a caption of one or two digits."""
    first, last = digits[0], digits[-1]
    return template.format(a=NUMBERS[first], b=NUMBERS[last], i=first, j=last)


PROMPTS = [caption(one, [digit]) for one in ONE for digit in range(10)]
"""Every caption of one digit: what the mean text is taken of."""
_WORDS = {word for text in [*PROMPTS, *TWO] for word in re.findall(r"\w\w+|\b\d\b", text)}
VOCABULARY = {word: place for place, word in enumerate(["", *sorted(_WORDS)])}
"""Words by their rows; those of one letter, and all that were never seen, have none."""


def vision_transformer(sizes: Sizes) -> VisionTransformer:
    """Return a ViT `[B 3 80 80]` -> `[B D]`, whose tokens come out of convolutions."""
    vit = VisionTransformer(
        img_size=SIDE, patch_size=SIDE // GRID, embed_dim=sizes.width, depth=sizes.depth,
        num_heads=4, mlp_ratio=2, reg_tokens=REGISTERS, num_classes=sizes.embedding,
        global_pool="token",
    )  # fmt: skip
    # A linear map of the pixels learns no shapes from a thousand digits; convolutions do. The last
    # two let a token see a digit: attention does not learn from so few to put strokes together.
    vit.patch_embed.proj = nn.Sequential(
        _convolution(3, 24),
        _convolution(24, 48),
        _convolution(48, 96),
        _convolution(96, 96, 1),
        _convolution(96, 96, 1),
        nn.Conv2d(96, sizes.width, 1),
    )
    return vit


def _convolution(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class TwoTowers(nn.Module):
    """Pictures `[B 3 80 80]` and texts -> embeddings `[B D]` in one space, not normalised."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.pictures = vision_transformer(sizes)
        self.words = nn.EmbeddingBag(len(VOCABULARY), 64, mode="mean")
        self.texts = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, sizes.embedding))
        self.scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-4.0))

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures."""
        embedding: Tensor = self.pictures(images)
        return embedding

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, words in any order; those never seen count nothing."""
        rows = [
            [VOCABULARY[word] for word in re.findall(r"\w+", text.lower()) if word in VOCABULARY]
            or [0]
            for text in texts
        ]
        ends = np.cumsum([0, *map(len, rows)])[:-1]
        bags = torch.tensor([row for some in rows for row in some])
        embedding: Tensor = self.texts(self.words(bags, torch.from_numpy(ends)))
        return embedding


# Loading


def small_vit(path: str | Path | None = None, reading: str = "") -> EmbeddingNetwork:
    """Return the small ViT of a file, None: of small-vit.safetensors in the folder $TOYS.

    reading: of its last attention, such as "@gradeclip"; "": the norm before it is the layer.
    """
    module = _read(path or _toys() / "small-vit.safetensors", "head.weight", vision_transformer)
    return _network(module, "", "small ViT", None, reading)


def two_towers(path: str | Path | None = None, reading: str = "") -> EmbeddingNetwork:
    """Return the two towers of a file, None: of two-towers.safetensors in the folder $TOYS."""
    path = path or _toys() / "two-towers.safetensors"
    module = _read(path, "pictures.head.weight", TwoTowers)
    return _network(module, "pictures.", "two towers", module.embed_texts, reading)


def _toys() -> Path:
    return Path(os.environ.get("TOYS", "."))


def _read(path: str | Path, head: str, make: Callable[[Sizes], Network]) -> Network:
    state = read_state(path)
    embedding, width = state[head].shape
    depth = sum(name.endswith(".norm1.weight") for name in state)
    module = make(Sizes(width, depth, embedding))
    load_state(module, state, [], str(path))
    return module.eval()


def _network(
    module: nn.Module,
    tower: str,
    name: str,
    texts: Callable[[Sequence[str]], Tensor] | None,
    reading: str,
) -> EmbeddingNetwork:
    last = f"{tower}blocks.{len(module.get_submodule(f'{tower}blocks')) - 1}"
    return EmbeddingNetwork(
        module, f"{last}.attn{reading}" if reading else f"{last}.norm1", name=name, texts=texts,
        prefix_tokens=1 + REGISTERS, preprocess=digits_preprocess(SIDE),
    )  # fmt: skip


# Training


class Scenes:
    """Training scenes kept in memory, half with one digit and half with two; batches of them."""

    def __init__(self, seed: int, count: int, progress: bool) -> None:
        maker, shown = SceneMaker(seed, SIDE), None if progress else False
        scenes: list[Scene] = []
        with progress_of("drawing", count, "scenes", shown=shown) as advance:
            for number in range(count):
                scenes.append(maker.scene("train", number, number >= count // 2))
                advance(1)
        self.pixels = [scene.pixels for scene in scenes]
        self.digits = [[int(one.label) for one in scene.digits] for scene in scenes]
        self._rng = np.random.default_rng([seed, 7])

    def draw(self, count: int) -> tuple[Tensor, np.ndarray]:
        """Draw normalised images `[B 3 80 80]`, their colours shuffled, and their numbers `[B]`."""
        numbers = self._rng.integers(len(self.pixels), size=count)
        images = np.stack([self.pixels[one][..., self._rng.permutation(3)] for one in numbers])
        return normalised(images), numbers

    def shares(self, numbers: np.ndarray) -> Tensor:
        """Return shares of classes `[B 10]`, alike of the digits that scenes show."""
        shown = torch.zeros(len(numbers), 10)
        for row, number in zip(shown, numbers, strict=True):
            row[self.digits[number]] = 1 / len(self.digits[number])
        return shown

    def caption(self, number: int) -> tuple[str, set[int]]:
        """Draw a caption that belongs to a scene, and the digits it names."""
        digits = [int(one) for one in self._rng.permutation(self.digits[number])]
        templates = ONE if len(digits) == 1 or self._rng.random() < 0.5 else TWO
        digits = digits[: 1 if templates is ONE else 2]
        return caption(templates[int(self._rng.integers(len(templates)))], digits), set(digits)


def normalised(pixels: np.ndarray) -> Tensor:
    """Return uint8 `[B H W 3]` as inputs `[B 3 H W]`."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def train_vit(sizes: Sizes, seed: int = 0, progress: bool = True) -> VisionTransformer:
    """Train the small ViT, in eval mode when it is done."""
    scenes = Scenes(seed, sizes.scenes, progress)
    vit, proxies = _seeded(
        seed, lambda: (vision_transformer(sizes), nn.Parameter(torch.randn(10, sizes.embedding)))
    )

    def loss() -> Tensor:
        images, numbers = scenes.draw(sizes.batch)
        return classified(vit(images), proxies, scenes.shares(numbers))

    descend(vit.train(), [proxies], loss, sizes.steps, sizes.rate, progress)
    return vit.eval()


def train_towers(
    vit: VisionTransformer, sizes: Sizes, seed: int = 0, progress: bool = True
) -> TwoTowers:
    """Train two towers, the pictures' from the small ViT on; in eval mode when it is done."""
    scenes = Scenes(seed, sizes.scenes, progress)
    towers = _seeded(seed, lambda: TwoTowers(sizes))
    towers.pictures.load_state_dict(vit.state_dict())

    def loss() -> Tensor:
        images, numbers = scenes.draw(sizes.batch)
        texts, told = zip(*(scenes.caption(one) for one in numbers), strict=True)
        shown = [set(scenes.digits[one]) for one in numbers]
        belongs = torch.tensor([[1.0 if one <= all_ else -1.0 for one in told] for all_ in shown])
        found = towers(images)
        cosines = F.normalize(found, dim=1) @ F.normalize(towers.embed_texts(texts), dim=1).T
        sure = F.logsigmoid(belongs * (towers.scale.exp() * cosines + towers.bias))
        names = towers.embed_texts([caption(ONE[1], [digit]) for digit in range(10)])
        return classified(found, names, scenes.shares(numbers)) - sure.sum(1).mean()

    descend(towers.train(), [], loss, sizes.text_steps, sizes.rate / 2, progress)
    return towers.eval()


def classified(found: Tensor, classes: Tensor, shown: Tensor) -> Tensor:
    """Return the cross-entropy of embeddings `[B D]`, by cosines to classes `[10 D]`.

    shown: shares of the classes, `[B 10]`.
    """
    cosines = F.normalize(found, dim=1) @ F.normalize(classes, dim=1).T
    return F.cross_entropy(SCALE * cosines, shown)


def _seeded(seed: int, make: Callable[[], Made]) -> Made:
    """Call with a random state of a seed; the caller's stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def descend(
    module: nn.Module,
    more: list[nn.Parameter],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    progress: bool,
) -> None:
    """Train in place, on one thread, so that the result is one."""
    parameters = [*module.parameters(), *more]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.15
    )
    before, shown = torch.get_num_threads(), None if progress else False
    torch.set_num_threads(1)
    try:
        with progress_of("training", steps, "steps", shown=shown) as advance:
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                loss().backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                advance(1)
    finally:
        torch.set_num_threads(before)


# The experiment


def trained(folder: Path, seed: int, sizes: Sizes) -> tuple[Path, Path]:
    """Return the files of both networks of a seed; train those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    end = f"{f'-{seed}' if seed != FIRST else ''}.safetensors"
    vit, towers = folder / f"small-vit{end}", folder / f"two-towers{end}"
    if not vit.exists():
        save_weights(train_vit(sizes, seed), vit)
    if not towers.exists():
        module = small_vit(vit).module
        assert isinstance(module, VisionTransformer)
        save_weights(train_towers(module, sizes, seed), towers)
    return vit, towers


def embeddings(network: EmbeddingNetwork, seed: int, split: Split, count: int) -> np.ndarray:
    """Return embeddings `[n D]` of scenes of a split."""
    maker = SceneMaker(seed, SIDE)
    pictures = np.stack([maker.scene(split, number).pixels for number in range(count)])
    parts = np.array_split(normalised(pictures).numpy(), max(count // 50, 1))
    return np.concatenate([network.forward(part).embedding.numpy() for part in parts])


def recalls(network: EmbeddingNetwork, seed: int) -> tuple[float, float]:
    """Return Recall@1 of queries among the gallery, and how often the better digit is captioned.

    The second, of networks with texts, is over pairs: the two digits that score highest are both
    in the scene. nan without texts.
    """
    gallery, queries = (embeddings(network, seed, split, 400) for split in ("gallery", "query"))
    classes = np.arange(400) % 10
    found = float(np.mean(classes[(queries @ gallery.T).argmax(1)] == classes))
    if network.texts is None:
        return found, float("nan")
    maker = SceneMaker(seed, SIDE)
    scores = (
        embeddings(network, seed, "pair", 200)
        @ network.embed_texts([caption("a {a}", [digit]) for digit in range(10)]).T
    )
    best = np.argsort(scores, axis=1)[:, -2:]
    both = [
        set(best[number].tolist()) == {int(one.label) for one in maker.scene("pair", number).digits}
        for number in range(200)
    ]
    return found, float(np.mean(both))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where the weights lie, or are written")
    parser.add_argument("--seeds", type=int, default=2)
    for name in ("scenes", "steps", "text_steps", "width", "depth"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(Sizes, name))


def measure(options: argparse.Namespace) -> Iterator[str]:
    """Train what is missing, and yield how well it retrieves."""
    sizes = Sizes(
        **{name: getattr(options, name) for name in Sizes.__annotations__ if name in options}
    )
    rows = []
    for seed in range(FIRST, FIRST + options.seeds):
        files = trained(options.folder, seed, sizes)
        for file, read in zip(files, (small_vit, two_towers), strict=True):
            found, both = recalls(read(file), seed)
            rows.append(
                [file.stem, str(seed), f"{found:.3f}", "" if np.isnan(both) else f"{both:.3f}"]
            )
    yield table(("network", "seed", "Recall@1", "both digits are the best two captions"), rows)
