"""A thread pool over one explainer, while the index is changed and reloaded.

    python examples/threads.py

An `Explainer` may be shared by any number of threads. `reload()` takes the version of the index
that lies at its path now: requests in flight end with the one they began with, none is dropped.
The network here has random weights and the pictures are noise, so that nothing is downloaded.
"""

import logging
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from embedcam import EmbeddingNetwork, Explainer, Preprocess, build_index, find_images
from embedcam.index import remove


def random_network() -> EmbeddingNetwork:
    """A small network; yours is any `torch.nn.Module` and a layer of it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 16, 5, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 8),
        ).eval()  # fmt: skip
    return EmbeddingNetwork(module, "1", preprocess=Preprocess(size=(64, 64)))


def picture(seed: int) -> np.ndarray:
    """uint8 `[64 64 3]`, one of two colours."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 100, (64, 64, 3)) + np.array([[100, 0, 40], [0, 120, 90]])[seed % 2]
            ).astype(np.uint8)  # fmt: skip


def build(folder: Path, network: EmbeddingNetwork, count: int = 24) -> Path:
    """An index of pictures in a folder for each label."""
    for seed in range(count):
        file = folder / "photos" / ("brick", "fern")[seed % 2] / f"{seed}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(file)
    path = folder / "my.index"
    build_index(find_images(folder / "photos"), network, path, progress=False)
    return path


def main() -> None:
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("embedcam").setLevel(logging.INFO)  # says what is served after a reload
    with tempfile.TemporaryDirectory() as folder:
        network = random_network()
        path = build(Path(folder), network)
        with Explainer(path, network) as explainer, ThreadPoolExecutor(4) as pool:
            queries = [picture(1000 + number) for number in range(40)]
            waiting = [pool.submit(explainer.explain, query) for query in queries]
            # Another process could do this: an index is changed by whoever holds its lock.
            gone = explainer.index.ids[0]
            remove(path, [gone])
            print("changed:", explainer.reload())
            waiting += [pool.submit(explainer.explain, query) for query in queries]
            answers = [one.result() for one in waiting]
            print("answered:", len(answers), "of", 2 * len(queries))
            after = {name for answer in answers[len(queries) :] for name in answer.ids}
            print(f"{gone} in answers after the change:", gone in after)


if __name__ == "__main__":
    main()
