"""Maps and receipts as heatmaps of a FiftyOne data set: what in each picture brought its result.

    embedcam export my.index -o network.onnx
    python examples/fiftyone_maps.py my.index network.onnx queries/*.jpg --dataset why
    fiftyone app launch why

Needs `pip install fiftyone`, in an environment of its own without torch if you like. Each picture
is a group of two: the query with its map `why`, the nearest image's label and how likely it is
right, and the nearest image; both with their side of the receipt, zero amid its range where some
evidence speaks against.
Of a model and a store: `model.embedcam network.onnx queries/*.jpg --store photos.lance`.
"""

import argparse
from pathlib import Path

import fiftyone as fo
import numpy as np
from PIL import Image

from embedcam import Explainer, Index, PairExplainer
from embedcam.render.overlay import Extent
from embedcam.stores import Table, open_store

SIDE = 224
"""Of a heatmap, at most: FiftyOne stretches it over the picture."""


def heatmap(values: np.ndarray, size: tuple[int, int], extent: Extent | None) -> fo.Heatmap:
    """Return a map over all of a picture of (width, height) `size`, zero where it was not seen."""
    scale = min(1, SIDE / max(size))
    left, top, right, bottom = (round(scale * edge) for edge in extent or (0, 0, *size))
    part = Image.fromarray(values.astype(np.float32))
    whole = Image.new("F", (round(scale * size[0]), round(scale * size[1])))
    whole.paste(part.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    most = float(np.abs(values).max()) or 1.0
    # Of evidence for and against zero is in the middle.
    return fo.Heatmap(map=np.array(whole), range=[-most if values.min() < 0 else 0.0, most])


def pair_of(explainer: Explainer, file: Path) -> list[fo.Sample]:
    """Return a picture and its nearest image as samples of one group."""
    why = explainer.explain(file)
    receipt = PairExplainer(explainer.of_ids([why.ids[0]])).receipt(file, why.ids[0])
    group, samples = fo.Group(), []
    for name, path, side in (
        ("query", str(file), receipt.query),
        ("result", why.paths[0], receipt.result),
    ):
        assert side.shown.image is not None
        sample = fo.Sample(path, pair=group.element(name))
        sample["receipt"] = heatmap(side.cells, side.shown.image.size, side.shown.extent)
        samples.append(sample)
    assert why.image is not None
    samples[0]["why"] = heatmap(why.cam, why.image.size, why.extent)
    samples[0]["nearest"] = fo.Classification(label=why.labels[0], confidence=why.match)
    samples[0]["trust"], samples[0]["similarity"] = why.trust, receipt.similarity
    return samples


def main(given: list[str] | None = None) -> fo.Dataset:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("index", help="folder of the index, or with --store the file of a model")
    parser.add_argument("network", help="what `embedcam export` wrote")
    parser.add_argument("queries", type=Path, nargs="+", help="pictures")
    parser.add_argument("--store", help="where the model's rows are")
    parser.add_argument("--dataset", default="why", help="name; one that is there is replaced")
    options = parser.parse_args(given)
    if options.store is None:
        explainer = Explainer(options.index, onnx=options.network)
    else:
        with Index.open(options.index) as model:
            store = open_store(options.store, Table.of(model))
        explainer = Explainer.from_model(options.index, store=store, onnx=options.network)
    dataset = fo.Dataset(options.dataset, persistent=True, overwrite=True)
    dataset.add_group_field("pair", default="query")
    samples = [sample for file in options.queries for sample in pair_of(explainer, file)]
    dataset.add_samples(samples)
    print(f"{dataset.name}: {len(dataset)} groups; `fiftyone app launch {dataset.name}` shows them")
    return dataset


if __name__ == "__main__":
    main()
