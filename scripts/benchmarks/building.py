"""A build beside a plain embedding of the same pictures, and beside the literal loop."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from embedcam import EmbeddingNetwork, build_index, find_images
from embedcam.images import ImageSource, load_batches
from embedcam.index import rebuild_faiss
from embedcam.index.encoding import fit_pca
from embedcam.methods.weights import gradcam
from embedcam.offline.merge import SAMPLE
from embedcam.offline.strategies import is_exact
from embedcam.recipe.recipe import Recipe

from .cases import fresh, frozen_network, gem_network, linear_network, write_pictures
from .timing import Case, alternate, ratio, section, table, verdict

TRIPLETS = 50
CHUNK = 256
POOLED_BAR, OTHER_BAR, LITERAL_BAR = 1.05, 2.2, 100
LARGE = 10_000
HEADS = ("frozen", "linear", "gem")


class Subject(NamedTuple):
    """A network, the methods it is built with, and the bar."""

    name: str
    network: EmbeddingNetwork
    methods: tuple[str, ...]
    bar: float


def subject_of(head: str, name: str, folder: Path) -> Subject:
    both = ("gradcam", "gradcam++")
    if head == "frozen":
        return Subject("frozen pooled vector", frozen_network(name), both, POOLED_BAR)
    if head == "linear":
        return Subject("linear head, 128", linear_network(name, folder), both, POOLED_BAR)
    return Subject("GeM head, 128", gem_network(name), both[:1], OTHER_BAR)


class Runs:
    """What is timed for one subject over one list of pictures."""

    def __init__(self, subject: Subject, source: ImageSource, batch: int, folder: Path) -> None:
        self.subject, self.source, self.batch, self.folder = subject, source, batch, folder
        self.stages: dict[str, list[dict[str, float]]] = {m: [] for m in subject.methods}

    def seconds(self, rounds: int) -> dict[str, np.ndarray]:
        """Seconds of the embedding, of itself again, and of a build with each method."""
        runs = {m: partial(self.build, m) for m in self.subject.methods}
        cases = {
            name: Case(run, self.ready, shutil.rmtree)
            for name, run in {"embedding": self.embed, **runs}.items()
        }
        return alternate(cases, rounds, control=True)

    def ready(self) -> Path:
        """An empty folder."""
        out = self.folder / "run"
        out.mkdir()
        return out

    def embed(self, out: Path) -> None:
        """What a build is measured against: load, forward, normalise, write a chunk at a time."""
        network, chunk, seen = self.subject.network, [], 0
        places = np.arange(len(self.source))
        for batch in load_batches(self.source, places, network.preprocess, self.batch):
            with torch.inference_mode():
                z = network.module(torch.from_numpy(batch.images))
                chunk.append((z / torch.linalg.vector_norm(z, dim=1, keepdim=True)).numpy())
            seen += len(z)
            if seen == len(places) or sum(map(len, chunk)) >= CHUNK:
                np.save(out / f"{seen}.npy", np.concatenate(chunk))
                chunk = []

    def build(self, method: str, out: Path) -> None:
        """Everything a build does with a network that was just wrapped; keeps its stages."""
        start = time.perf_counter()
        made = build_index(
            self.source,
            fresh(self.subject.network),
            out / "index",
            Recipe(method=method, triplets=TRIPLETS, faiss="none"),
            batch_size=self.batch,
            trust=False,
            progress=False,
        )
        total = time.perf_counter() - start
        before = {"before": total - sum(made.seconds.values())}
        self.stages[method].append({**before, **made.seconds})

    def forwards(self, method: str) -> int:
        """How many pictures a build puts through the module, probe pictures included."""
        seen = 0

        def count(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal seen
            seen += len(arguments[0])

        handle = self.subject.network.module.register_forward_pre_hook(count)
        out = self.ready()
        try:
            self.build(method, out)
        finally:
            handle.remove()
            shutil.rmtree(out)
        return seen


def report(
    name: str, images: int, rounds: int, batch: int, folder: Path, heads: Sequence[str] = HEADS
) -> str:
    """Ratios, stages and the literal loop of one network."""
    source = find_images(write_pictures(folder / f"pictures-{images}", images))
    less = min(batch, len(source) // 4)
    few = ImageSource(source.items[:: len(source) // less][:less], source.root)
    fit, apart = once_for_an_index(name, source, batch, folder)
    ratios, stages, loops = [], [], []
    names = ["before", "embed", "weights", "encode", "write"]
    for head in heads:
        subject = subject_of(head, name, folder)
        large, small = (Runs(subject, s, batch, folder) for s in (source, few))
        took = large.seconds(rounds)
        ratios += _ratio_rows(large, small, took, small.seconds(rounds), fit)
        for method, listed in large.stages.items():
            middle = [np.median([run[stage] for run in listed[-rounds:]]) for stage in names]
            stages.append([f"{subject.name}, {method}", *(f"{value:.2f}" for value in middle)])
        if subject.bar == POOLED_BAR:
            loops.append(_loop_row(large, float(np.median(took["gradcam"])) / len(source), rounds))
    return section(
        f"Build / embedding, {name}",
        f"S = {TRIPLETS}, {images} pictures of 320 x 240 (JPEG), batches of {batch}, page cache "
        "warm. Embedding: the same loader, plain forward, embeddings written a chunk at a time. "
        "Build: everything `build_index` does with a network just wrapped, checksums included, "
        "FAISS and the calibration of trust not. *Each further image*: the same without what is "
        f"paid once, from builds and embeddings of {images} and of {less} images. *At {LARGE:,}*: "
        "predicted from both, the fit of principal components included. *Forwards*: pictures "
        "through the module for each image built, and probe pictures once.",
        ["network and method", "seconds", f"ratio at {images}", "bar", "each further image",
         f"at {LARGE:,}", "bar", "forwards"],
        ratios,
    ) + (
        "\nSeconds of a build's stages (median). *before*: identity, head, digest of the list; "
        "*write* holds checksums and syncs.\n\n"
        + table(["network and method", *names], stages)
        + f"\n{apart}\n"
        + f"\nBeside loops over triplets, milliseconds an image at S = {TRIPLETS}, Grad-CAM. "
        "*Literal*: three forwards and one backward through the head a triplet, in the same "
        "batches, pictures read before; one triplet an image is measured and multiplied. *Head "
        "only*: one forward an image, then a backward through the head for each triplet over "
        "cached embeddings: the fair baseline.\n\n"
        + table(["network", "build", "head only", "literal", "literal / build", "bar"], loops)
    )  # fmt: skip


def _ratio_rows(
    large: Runs,
    small: Runs,
    took: dict[str, np.ndarray],
    took_few: dict[str, np.ndarray],
    fit: float,
) -> list[list[str]]:
    subject, n, few = large.subject, len(large.source), len(small.source)

    def predicted(name: str, once: float = 0) -> tuple[float, float]:
        """Seconds of each further image, and of many."""
        many, less = (float(np.median(seconds[name])) for seconds in (took, took_few))
        each = (many - less) / (n - few)
        return each, once + less + (LARGE - few) * each

    rows, (base_each, base) = [], predicted("embedding")
    for name, seconds in took.items():
        measured = ratio(seconds, took["embedding"])
        line = [f"{subject.name}: {name}", f"{np.median(seconds):.2f}", str(measured)]
        if name in subject.methods:
            exact = is_exact(Recipe(method=name), subject.network.head_kind.matrix)
            each, all_of_them = predicted(name, 0 if exact else fit)
            many, less = large.forwards(name), small.forwards(name)
            forwards = (many - less) / (n - few)
            line += [
                verdict(measured.median, subject.bar),
                f"{each / base_each:.3f}",
                f"{all_of_them / base:.3f}",
                verdict(all_of_them / base, subject.bar),
                f"{forwards:g} + {many - n * forwards:g}",
            ]
        rows.append(line + [""] * (8 - len(line)))
    return rows


def once_for_an_index(
    name: str, source: ImageSource, batch: int, folder: Path
) -> tuple[float, str]:
    """Seconds of fitting principal components, and a sentence on what is timed apart."""
    network, path, recipe = frozen_network(name), folder / "apart", Recipe(faiss="none")
    made = build_index(source, network, path, recipe, batch_size=batch, progress=False)
    width = network.forward(network.probe_images()).activations.shape[1]
    sample = np.random.default_rng(0).standard_normal((SAMPLE, width)).astype(np.float32)
    fit = Case(lambda: fit_pca(sample, 128)).seconds()
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    checksums = Case(lambda: [hashlib.sha256(f.read_bytes()) for f in files]).seconds()
    flat = Case(lambda: rebuild_faiss(path, "Flat")).seconds()
    shutil.rmtree(path)
    return fit, (
        f"Apart: trust, calibrated on at most 512 images an index: {made.seconds['trust']:.2f} s; "
        f"FAISS Flat of {len(source)} x {width}: {flat:.3f} s; SHA-256 of the index's "
        f"{size / 1e6:.1f} MB: {checksums:.3f} s; once an index, where the basis is fitted, "
        f"principal components of {SAMPLE:,} vectors of {width}: {fit:.2f} s."
    )


def _loop_row(runs: Runs, build: float, rounds: int) -> list[str]:
    network, batch = runs.subject.network, runs.batch
    places = np.arange(min(batch, len(runs.source)))
    images = next(load_batches(runs.source, places, network.preprocess, batch)).images
    z = network.forward(images).embedding
    cotangents = [z.roll(shift % 3 + 1, 0) - z.roll(shift % 2 + 4, 0) for shift in range(TRIPLETS)]

    def head_only() -> None:
        with closing(network.head_pass(images)) as head_pass:
            torch.stack([gradcam(head_pass.vjp(c)) for c in cotangents]).mean(0)

    def literal() -> None:
        with closing(network.head_pass(images)) as head_pass:
            network.forward(images)  # the positives
            network.forward(images)  # the negatives
            gradcam(head_pass.vjp(cotangents[0]))

    took = alternate({"head": head_only, "literal": literal}, rounds)
    head, loop = (float(np.median(took[name])) / len(images) for name in ("head", "literal"))
    times = loop * TRIPLETS / build
    return [
        runs.subject.name, f"{1e3 * build:.1f}", f"{1e3 * head:.1f}",
        f"{1e3 * loop * TRIPLETS:.0f}", f"{times:.0f}", verdict(times, LITERAL_BAR, at_least=True),
    ]  # fmt: skip
