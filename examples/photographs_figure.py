"""Draw the README's picture: two photographs side by side, explained by a result that shows one.

    python examples/photographs_figure.py OUTPUT.jpg [--weights FILE]

The photographs come with scikit-learn and scikit-image (`pip install scikit-image`); the network is
torchvision's MobileNetV2 with ImageNet weights, loaded from FILE where there is no connection.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from embedcam import Explainer, build_index, find_images, load_network
from embedcam.render import overlay

CROPS = 12
QUERIES = [("cat", "coffee"), ("motorcycle", "flower"), ("astronaut", "temple")]


def photographs() -> dict[str, Image.Image]:
    """Return the photographs by name."""
    loaded = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "rocket")}
    loaded |= {"cat": skimage.data.chelsea(), "motorcycle": skimage.data.stereo_motorcycle()[0]}
    loaded |= {"temple": load_sample_image("china.jpg"), "flower": load_sample_image("flower.jpg")}
    return {name: Image.fromarray(pixels) for name, pixels in loaded.items()}


def crop(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random square crop, 65 to 95 % of the shorter side, mirrored half of the time."""
    side = int(min(photograph.size) * rng.uniform(0.65, 0.95))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    square = photograph.crop((left, top, left + side, top + side)).resize((224, 224))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square


def draw(output: Path, weights: str | None) -> None:
    """Build an index of crops and draw every query with two results."""
    rng, pictures = np.random.default_rng(3), photographs()
    with tempfile.TemporaryDirectory() as folder:
        for name, photograph in pictures.items():
            (Path(folder) / "photos" / name).mkdir(parents=True)
            for number in range(CROPS):
                crop(photograph, rng).save(Path(folder) / "photos" / name / f"{number}.jpg")
        network = load_network("torchvision:mobilenet_v2", weights=weights, resize="squash")
        build_index(find_images(Path(folder) / "photos"), network, Path(folder) / "index")
        explainer = Explainer(Path(folder) / "index", network)
        figure, rows = plt.subplots(
            len(QUERIES), 5, figsize=(12, 5.2), width_ratios=(2, 1, 2, 1, 2), layout="constrained"
        )
        for (first, second), axes in zip(QUERIES, rows, strict=True):
            query = Image.new("RGB", (448, 224))
            query.paste(crop(pictures[first], rng), (0, 0))
            query.paste(crop(pictures[second], rng), (224, 0))
            draw_row(axes, explainer, query, (first, second), Path(folder) / "photos")
        figure.savefig(output, dpi=110, pil_kwargs={"quality": 88})


def draw_row(
    axes: np.ndarray,
    explainer: Explainer,
    query: Image.Image,
    labels: tuple[str, str],
    photos: Path,
) -> None:
    """Draw a query, and for each label its nearest result with the query's map."""
    axes[0].imshow(query)
    axes[0].set_title("query", fontsize=9)
    neighbors = explainer.explain(query, n_neighbors=len(explainer.index))
    for place, label in enumerate(labels):
        result = next(name for name in neighbors.ids if name.startswith(f"{label}/"))
        why = explainer.explain(query, result=result, detail=2)
        axes[1 + 2 * place].imshow(Image.open(photos / result))
        axes[1 + 2 * place].set_title(f"result: {label}", fontsize=9)
        axes[2 + 2 * place].imshow(overlay(query, why.cam))
        axes[2 + 2 * place].set_title("why it came back", fontsize=9)
    for one in axes:
        one.axis("off")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--weights", help="ImageNet weights of torchvision's mobilenet_v2")
    options = parser.parse_args()
    draw(options.output, options.weights)
