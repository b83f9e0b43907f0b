r"""Every method of the zoo on one query, side by side, with its time and passes, as one picture.

    python examples/zoo_figure.py demo-output --output zoo.png
    python examples/zoo_figure.py DATA/birds20 --weights mobilenet_v2_imagenet.safetensors \\
        --output birds.png

The first form takes a folder that `embedcam demo` wrote: a scene with two digits, and the gallery's
nearest picture of one of them as the result. The second takes a folder per class of photographs,
pastes two of different classes side by side, and takes the nearest other picture of the left one's
class. The target of every method is the cosine similarity of scene and result: a method that can
say what matched lights up the left half, which the result shows. Maps are the methods' own, each by
its own scale; below stands how much of the map's energy lies on that half, chance 50%.
"""

import argparse
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from embedcam import (
    METHODS,
    Coordinate,
    EmbedcamError,
    EmbeddingNetwork,
    Similarity,
    cam_for,
    load_network,
)
from embedcam.errors import InputError
from embedcam.images import find_images, read_image
from embedcam.methods import MethodMap, MethodWarning
from embedcam.recipe.registry import Method
from embedcam.render import overlay

SIDE = 224


def main() -> None:
    options = arguments()
    try:
        digits = (options.folder / "network.safetensors").is_file()
        network, scene, result, layers = demo_scene(options) if digits else photographs(options)
    except EmbedcamError as error:
        sys.exit(f"zoo_figure: {error}")
    embedding = network.forward(torch.from_numpy(network.preprocess(result))[None]).embedding[0]
    shown = [("the query", scene, ""), ("the result", result, "")]
    print(f"{'method':24} {'ms':>9} {'forwards':>9} {'head':>6} {'back':>5} {'share':>6}")
    branches = attention(options.attention, network) if options.attention else {}
    for method in (METHODS[name] for name in options.methods or METHODS):
        if method.attends or (method.trained and method.name not in branches):
            continue
        # A branch is trained with a network of its own, and ignores the target.
        own = branches.get(method.name, network)
        aim = Similarity(embedding) if own is network else Coordinate(0)
        made, seconds = timed(method, own, scene, aim, layers)
        cam = np.maximum(made.cam, 0)
        share = cam[:, : cam.shape[1] // 2].sum() / cam.sum() if cam.any() else 0.5
        passes = made.passes
        back = passes.head_backwards + passes.full_backwards
        print(
            f"{method.title:24} {1e3 * seconds:9.1f} {passes.forwards:9} {passes.heads:6} "
            f"{back:5} {share:6.2f}",
            flush=True,
        )
        spent = [f"{passes.forwards} forward", f"{passes.heads} head", f"{back} back"]
        told = " + ".join(one for one in spent if not one.startswith("0 "))
        took = f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
        below = f"{took}, {told}\n{share:.0%} on the left half"
        shown.append((method.title, overlay(scene, cam), below))
    draw(shown, options.output, columns=6 if digits else 4)
    print(f"written to {options.output}")


def attention(folder: Path, network: EmbeddingNetwork) -> dict[str, EmbeddingNetwork]:
    """The networks that examples/train_attention.py trained on the demonstration's scenes."""
    from train_attention import make_abn, make_lfi

    from embedcam.demo.settings import DemoSettings
    from embedcam.network.checkpoints import load_state, read_state

    found = {}
    for name, file, make in (("lficam", "lfi", make_lfi), ("abn", "abn", make_abn)):
        path = folder / f"{file}.safetensors"
        module = make(DemoSettings()).eval()
        load_state(module, read_state(path), (), str(path))
        found[name] = EmbeddingNetwork(module, "trunk", preprocess=network.preprocess)
    return found


def timed(
    method: Method,
    network: EmbeddingNetwork,
    scene: Image.Image,
    target: Similarity | Coordinate,
    layers: list[str],
) -> tuple[MethodMap, float]:
    """A method's map of the scene, and the seconds it took once the network was warm."""
    options = {"layers": layers} if method.name == "polycam" else {}
    cheap = method.name not in ("scorecam", "rise", "lime", "sbsm", "polycam")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodWarning)
        if cheap:
            cam_for(network, scene, target, method.name, progress=False, **options)
        start = time.perf_counter()
        made = cam_for(network, scene, target, method.name, **options)
    return made, time.perf_counter() - start


def demo_scene(
    options: argparse.Namespace,
) -> tuple[EmbeddingNetwork, Image.Image, Image.Image, list[str]]:
    """A scene of the demonstration with two digits, and the nearest picture of the left one's."""
    from embedcam.demo.digits_network import LAYER, digits_preprocess, load_weights
    from embedcam.demo.scenes import read_scenes

    module = load_weights(options.folder / "network.safetensors")
    network = EmbeddingNetwork(module, LAYER, preprocess=digits_preprocess(), name="digits")
    folder = options.folder / "scenes"
    path, digits = list(read_scenes(folder, "pair").items())[options.number]
    scene = read_image(folder / path)
    same = [
        read_image(folder / one)
        for one, placed in read_scenes(folder, "gallery").items()
        if placed[0].label == digits[0].label
    ]
    batch = np.stack([network.preprocess(picture) for picture in (scene, *same)])
    vectors = network.forward(batch).embedding
    result = same[int((vectors[1:] @ vectors[0]).argmax())]
    # The demonstration's network takes scenes of any width: the whole scene, not squashed.
    height = network.preprocess.size[0]
    network.preprocess = replace(
        network.preprocess, size=(height, height * scene.width // scene.height)
    )
    return network, scene, result.resize(scene.size), ["trunk.1", "trunk.3", "trunk"]


def photographs(
    options: argparse.Namespace,
) -> tuple[EmbeddingNetwork, Image.Image, Image.Image, list[str]]:
    """Two photographs of different classes side by side, and another of the left one's class."""
    network = load_network(
        "torchvision:mobilenet_v2", weights=options.weights, size=(SIDE, 2 * SIDE), resize="squash"
    )
    listed = options.folder / "annotations.csv"
    source = find_images(listed if listed.is_file() else options.folder)
    generator = np.random.default_rng(options.number)
    labels = np.array([item.label for item in source.items])
    if len(set(labels.tolist())) < 2:
        raise InputError(f"{options.folder}: one class only; give a folder of folders, or a CSV")
    left = int(generator.integers(len(source)))
    right = int(generator.choice(np.flatnonzero(labels != labels[left])))
    same = np.flatnonzero(labels == labels[left])
    scene = Image.new("RGB", (2 * SIDE, SIDE))
    for place, one in enumerate((left, right)):
        scene.paste(source.open(one).resize((SIDE, SIDE)), (place * SIDE, 0))
    batch = [source.open(int(one)).resize((SIDE, SIDE)) for one in (left, *same[same != left][:16])]
    alone = replace(network.preprocess, size=(SIDE, SIDE))
    vectors = network.forward(np.stack([alone(picture) for picture in batch])).embedding
    nearest = 1 + int((vectors[1:] @ vectors[0]).argmax())
    result = Image.new("RGB", scene.size)
    result.paste(batch[nearest].resize(scene.size), (0, 0))
    return network, scene, result, ["features.6", "features.13", "features"]


def draw(shown: list[tuple[str, Image.Image, str]], output: Path, columns: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(shown) // columns)
    width, height = shown[0][1].size
    across = 13 / columns
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(across * columns, rows * (across * height / width + 0.75)), dpi=110
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture, below) in zip(axes.flat, shown, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=11)
        axis.text(0.5, -0.04, below, transform=axis.transAxes, ha="center", va="top", fontsize=8.5)
    figure.subplots_adjust(0.01, 0.06, 0.99, 0.95, wspace=0.05, hspace=0.42)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the demonstration, or of photographs")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, for photographs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--attention", type=Path, help="of examples/train_attention.py's networks")
    parser.add_argument("--number", type=int, default=0, help="which scene, from 0")
    parser.add_argument("--output", type=Path, default=Path("zoo.png"), help="picture to write")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    return options


if __name__ == "__main__":
    main()
