"""One checkout's side of `forward`: a build for each line on stdin, and a line of what it took.

PYTHONPATH=CHECKOUT python scripts/benchmarks/embedding_pass.py PICTURES NETWORK RUNTIME THREADS
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from embedcam import EmbeddingNetwork, Recipe, build_index, find_images, load_network
from embedcam.images import ImageSource
from embedcam.images.reading import file_mark, read_image

FEW = 16
"""Images of the build that tells what one costs whatever the number of images is."""


def main(pictures: str, name: str, runtime: str, threads: int) -> None:
    torch.set_num_threads(threads)
    source = find_images(pictures)
    places = range(0, len(source), max(1, len(source) // FEW))[:FEW]  # of every label
    few = ImageSource([source.items[place] for place in places], source.root)
    with tempfile.TemporaryDirectory(prefix="embedcam-forward-") as folder:
        network = load_network(f"torchvision:{name}", weights="random", size=224)
        if runtime == "onnx":
            network = by_onnx(network, Path(folder))
        once = min(build(few, network, Path(folder))[1] for _ in range(3))
        print(json.dumps(parts(source, network)), flush=True)
        for _ in sys.stdin:
            seconds, cpu = build(source, network, Path(folder))
            further = (cpu - once) / (len(source) - len(few))
            told = {"images": len(source), "wall": seconds, "cpu": further}
            print(json.dumps(told), flush=True)


def by_onnx(network: EmbeddingNetwork, folder: Path) -> EmbeddingNetwork:
    """The network with its passes run by the file that is exported of it, as `--runtime onnx`."""
    from embedcam.export import through_onnx

    return through_onnx(network, folder / "network.onnx", progress=False)


def build(source: ImageSource, network: EmbeddingNetwork, folder: Path) -> tuple[float, float]:
    """Seconds of the embedding pass of a build, and CPU seconds of all of it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        start = time.process_time()
        made = build_index(
            source, network, Path(name) / "i", Recipe(faiss="none"), trust=False, progress=False
        )
        return made.seconds["embed"], time.process_time() - start


def parts(source: ImageSource, network: EmbeddingNetwork) -> dict[str, float]:
    """CPU milliseconds an image of what comes before the network, on one thread."""
    files = [Path(source.name(place)) for place in range(min(64, len(source)))]
    pictures = [read_image(file) for file in files]
    prepare = network.require_preprocess()
    return {
        "decode": each(read_image, files),
        "prepare": each(prepare, pictures),
        "mark": each(file_mark, files),
    }


def each(run: Callable[..., object], given: list[object]) -> float:
    took = []
    for _ in range(5):
        start = time.process_time()
        for one in given:
            run(one)
        took.append(1e3 * (time.process_time() - start) / len(given))
    return sorted(took)[2]


if __name__ == "__main__":
    main(*sys.argv[1:4], threads=int(sys.argv[4]))
