"""Networks with random weights, and pictures for them: nothing here needs data."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn
from torchvision import models

from embedcam import EmbeddingNetwork, Recipe, load_network
from embedcam.index import PartData, create, quantize_coarse
from embedcam.index.calibration import Calibration
from embedcam.index.encoding import Encoding, LowRank, fit_pca
from embedcam.offline import calibrate_index
from embedcam.offline.merge import header, layer_entry
from embedcam.preprocess import Preprocess

HEAD_WIDTH = 128
SIZE = 224
ROWS, BLOCK = 2000, 50_000


def calibration(width: int, neighbors: int) -> dict[str, object]:
    """One that costs what any costs; its figures mean nothing."""
    return Calibration(
        mean=(0.0,) * width,
        scale=(1.0,) * width,
        linear=(0.1,) * width,
        intercept=0.0,
        scores=tuple(np.linspace(-3, 3, 20)),
        correlations=tuple(np.linspace(0, 1, 20)),
        lows=tuple(np.linspace(0, 0.8, 20)),
        largest_distance=2.0,
        neighbors=neighbors,
        images=1000,
    ).to_dict()


TRUST = {"one": calibration(3, 1), "several": calibration(6, 5)}


class GeM(nn.Module):
    """Trunk, generalised mean pooling, linear head: a head that is not a global average pool."""

    def __init__(
        self, trunk: nn.Module, width: int, out: int = HEAD_WIDTH, power: float = 3
    ) -> None:
        super().__init__()
        self.trunk, self.power = trunk, power
        self.head = nn.Linear(width, out)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `[B D]` before any norm."""
        activations = self.trunk(images).clamp(min=1e-6)
        return self.head(activations.pow(self.power).mean((-2, -1)).pow(1 / self.power))


def trunk_of(name: str) -> tuple[nn.Module, int]:
    """A torchvision CNN up to its last activations, with random weights, and their channels."""
    module = seeded(lambda: models.get_model(name, weights=None))
    if hasattr(module, "features"):
        trunk = module.features
    else:
        trunk = nn.Sequential(OrderedDict(list(module.named_children())[:-2]))
    with torch.inference_mode():
        return trunk, trunk(torch.zeros(1, 3, 64, 64)).shape[1]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in eval mode, its random weights from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().eval()


def gem_network(name: str) -> EmbeddingNetwork:
    """Any head but a pooled one, at the layer of the others."""
    trunk, width = trunk_of(name)
    module = seeded(lambda: GeM(trunk, width))
    return EmbeddingNetwork(
        module, "trunk", preprocess=Preprocess.imagenet(SIZE), name=f"{name}-gem"
    )


def frozen_network(name: str) -> EmbeddingNetwork:
    """The pooled vector itself as embedding, D = K."""
    return load_network(f"torchvision:{name}", weights="random", size=SIZE)


def linear_network(name: str, folder: Path) -> EmbeddingNetwork:
    """A linear head of 128 numbers behind the pooling."""
    width = trunk_of(name)[1]
    path = folder / f"{name}-head.safetensors"
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((HEAD_WIDTH, width)) / np.sqrt(width)
    save_file({"weight": matrix.astype(np.float32)}, path)
    return load_network(f"torchvision:{name}", weights="random", head=path, size=SIZE)


def fresh(network: EmbeddingNetwork) -> EmbeddingNetwork:
    """The same module in a wrapper that knows nothing yet: a build pays for finding out."""
    return EmbeddingNetwork(
        network.module,
        network.layer,
        normalize=network.normalize,
        preprocess=network.preprocess,
        name=network.name,
    )


def write_pictures(folder: Path, count: int, classes: int = 8) -> Path:
    """JPEG files of 320 x 240, smooth shapes with some noise, a folder per class."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class-{number % classes}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def query_input(seed: int = 0) -> Tensor:
    """One preprocessed picture `[3 224 224]`."""
    return torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def near(n: int, seed: int, clusters: int = 1000) -> np.ndarray:
    """Unit vectors `[n 128]` around the same centres, whatever the seed."""
    centres = np.random.default_rng(0).standard_normal((clusters, HEAD_WIDTH), np.float32)
    rng = np.random.default_rng([1, seed])
    vectors = centres[rng.integers(0, clusters, n)]
    vectors += np.float32(0.7) * rng.standard_normal(vectors.shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_index(
    path: Path,
    vectors: np.ndarray,
    encoding: Encoding,
    recipe: Recipe,
    grid: tuple[int, int] = (7, 7),
    network: EmbeddingNetwork | None = None,
    trust: dict[str, dict[str, object]] | None = None,
) -> Path:
    """An index of these embeddings `[n D]` whose weights and own maps are random."""
    rng, rows = np.random.default_rng(0), len(vectors)

    def fields(n: int) -> dict[str, np.ndarray]:
        if isinstance(encoding, LowRank):
            return encoding.encode_codes(rng.standard_normal((n, encoding.rank), np.float32))
        return encoding.encode(rng.standard_normal((n, encoding.n_channels), np.float32))

    blocks = [fields(min(BLOCK, rows - start)) for start in range(0, rows, BLOCK)]
    coarse = (min(8, grid[0]), min(8, grid[1]))  # an index keeps at most 64 cells
    paths = [f"folder/{row:08d}.jpg" for row in range(rows)]
    part = PartData(
        ids=paths,
        labels=[f"class {row % max(20, rows // 100)}" for row in range(rows)],
        paths=paths,
        embeddings=vectors,
        triplets_used=np.full(rows, 50, np.uint32),
        fields=[{name: np.concatenate([one[name] for one in blocks]) for name in blocks[0]}],
        coarse=[quantize_coarse(rng.random((rows, *coarse), np.float32))],
    )
    shared = {"embedding_mean": vectors.mean(0)}
    described, layer, unit = None, "features", True
    if network is not None:
        identity, layer, unit = network.identity(), network.layer, network.normalize
        described, shared = {**identity.to_dict(), "loading": None}, {**identity.arrays(), **shared}
    about = header(
        recipe, described, None, vectors.shape[1], unit,
        [layer_entry(layer, grid, encoding, coarse)],
    )  # fmt: skip
    if trust is not None:
        about["trust_calibration"] = trust
    create(path, about, [encoding.fitted], shared, part)
    return path


def index_of(
    network: EmbeddingNetwork, path: Path, rows: int = ROWS, method: str = "gradcam"
) -> Path:
    """An index of that network whose rows are random, own maps and calibrations included."""
    features = network.forward(network.probe_images())
    channels, height, width = features.activations.shape[1:]
    rng, matrix = np.random.default_rng(0), network.head_kind.matrix
    vectors = rng.standard_normal((rows, features.embedding.shape[1])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    encoding: Encoding
    if matrix is not None and len(matrix) <= 128:
        encoding = LowRank(matrix, np.zeros(channels), "head")
    else:
        encoding = fit_pca(rng.standard_normal((256, channels)).astype(np.float32), 128)
    write_index(path, vectors, encoding, Recipe(method=method), (height, width), network, TRUST)
    calibrate_index(path)
    return path
