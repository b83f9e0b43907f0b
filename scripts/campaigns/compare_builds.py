"""Build small indexes with two checkouts and compare their bytes.

    python -m scripts.campaigns builds OLD [NEW]

OLD and NEW are checkouts of embedcam (NEW: this one). Every build of `CHOICES` is made by each on
this machine; the files of the indexes must be equal byte for byte. Prints a line a build; the exit
status is 1 where files differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "target": "margin",
        "sampling": "random",
        "triplets": 50,
        "encoding": "top-m",
        "m": 5,
    },
    "centred": {"target": "centred"},
    "discriminant": {"target": "discriminant", "encoding": "dense", "dtype": "float32"},
    "around": {"norm": "around", "target": "margin"},
    "semihard, hinge": {"sampling": "semihard", "hinge": True, "triplets": 5},
    "hard": {"sampling": "hard", "triplets": 3, "metric": "ip"},
    "gradcam++": {"method": "gradcam++", "triplets": 3},
    "ablationcam": {"method": "ablationcam"},
    "scorecam": {"method": "scorecam", "triplets": 2, "encoding": "dense"},
    "scorecam, blurred": {"method": "scorecam", "triplets": 2, "fill": "blur"},
    "hirescam, by position": {"method": "hirescam", "network": "flat"},
    "polycam, two layers": {"method": "polycam", "layers": ("layer1", "layer2")},
    "flat head": {"network": "flat", "triplets": 4},
    "numbers": {"labels": "numbers"},
    "no labels": {"source": "none"},
    "hnsw": {"faiss": "HNSW16"},
}
BUILD = """
import json, sys, warnings
from pathlib import Path
import torch
from torch import nn
warnings.simplefilter("ignore")
from embedcam import (EmbeddingNetwork, Preprocess, Recipe, add_images, build_from_features,
                      build_index, find_images)
from embedcam.prototypes import compress

class Net(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.flat, self.linear = flat, nn.Linear(12 * (64 if flat else 1), 6)

    def forward(self, images):
        maps = self.layer2(self.layer1(images))
        return self.linear(maps.flatten(1) if self.flat else maps.mean((2, 3)))

def network(flat=False):
    torch.manual_seed(0)
    return EmbeddingNetwork(Net(flat).eval(), "layer2", preprocess=Preprocess(size=(32, 32)))

choices, photos, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
for place, (name, given) in enumerate(choices.items()):
    given = dict(given)
    flat, source = given.pop("network", "") == "flat", given.pop("source", "auto")
    if "layers" in given:
        given["layers"] = tuple(given["layers"])
    numbers = given.get("labels") == "numbers"
    where = photos / "list.csv" if numbers else photos / "first"
    images = find_images(where, labels="numbers" if numbers else source)
    folder = out / str(place)
    try:
        build_index(images, network(flat), folder, Recipe(**given), progress=False, batch_size=4)
    except Exception as error:
        print(name, type(error).__name__, error, file=sys.stderr)
        folder.mkdir(exist_ok=True)
        (folder / "refused").write_text(type(error).__name__)
        continue
    if name in ("default", "paper", "no labels"):
        add_images(find_images(photos / "second", labels=source), network(flat), folder,
                   progress=False)
compress(out / "0", out / "prototypes", 5, progress=False)
import numpy as np
AffineHead = sys.modules[build_from_features.__module__].AffineHead
rng = np.random.default_rng(0)
pooled = np.abs(rng.normal(size=(60, 8))).astype(np.float32)
head = rng.normal(size=(8, 4)).astype(np.float32)
vectors = pooled @ head
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
build_from_features(vectors, pooled, out / "features", Recipe(target="centred"), grid=(4, 4),
                    head=AffineHead(head.T), labels=[str(n % 4) for n in range(60)])
"""


def write_photos(folder: Path) -> None:
    """Write small pictures of three labels, in two folders, and a CSV with a number for each."""
    rng, rows = np.random.default_rng(7), ["path,label"]
    for part, count in (("first", 12), ("second", 3)):
        for label in range(3):
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3)).astype(np.uint8)
                pixels[8 + label : 24, number : 16 + number, label] = 230
                file = folder / part / str(label) / f"{part}-{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
                if part == "first":
                    rows.append(f"first/{label}/first-{number}.png,{label + number / 20}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")


def built(checkout: Path, photos: Path, out: Path) -> dict[str, dict[str, str]]:
    """Build everything with a checkout; return the digests of each index's files."""
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILD, json.dumps(CHOICES), str(photos), str(out)]
    subprocess.run(command, check=True, env=environment, cwd=checkout)
    return {
        folder.name: {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        for folder in sorted(out.iterdir())
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout of the commit before")
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[2])
    options = parser.parse_args()
    names = dict(zip(map(str, range(len(CHOICES))), CHOICES, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_photos(photos)
        old = built(options.old.resolve(), photos, Path(folder) / "old")
        new = built(options.new.resolve(), photos, Path(folder) / "new")
    wrong = 0
    for index in sorted(old | new):
        before, after = old.get(index, {}), new.get(index, {})
        differ = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        wrong += bool(differ)
        print(f"{names.get(index, index):24} {len(before):3} files  {', '.join(differ) or 'equal'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
