"""One explainer and many threads, its index replaced meanwhile: the sequential answers."""

import gc
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import index_samples
import numpy as np
import pytest
import torch
from photo_samples import Flat, build, network_of, picture, tensor_of, write_photos
from rounding import same_arrays

from embedcam import DirectWeights, EmbeddingNetwork, Explainer, Explanation, Index, Recipe
from embedcam.errors import IndexFormatError, InputError, NetworkMismatch
from embedcam.explain.explanation import Result
from embedcam.index import append, compact, remove

pytestmark = pytest.mark.usefixtures("quick_disk")
THREADS, QUERIES = 4, 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", each=14)


@pytest.fixture(scope="module")
def built(photos, network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(photos, tmp_path_factory.mktemp("built") / "index", network)


def same(a: Any, b: Any) -> bool:
    """Alike in everything an explanation holds but the picture and what prepared it."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, Explanation | Result):
        names = {field.name for field in fields(a)} - {"image", "preprocess"}
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    return bool(same_arrays(a, b) if isinstance(a, np.ndarray) else a == b)


def all_same(found: Sequence[Explanation], right: Sequence[Explanation]) -> bool:
    return len(found) == len(right) and all(map(same, found, right))


def strange(number: int) -> np.ndarray:
    """Noise, which no transfer is trusted for."""
    return np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)


Ask = Callable[[Explainer], Sequence[Explanation]]


def questions(network: EmbeddingNetwork) -> list[Ask]:
    """Every way to ask, of several queries."""
    pictures = [picture(n % 3, 50 + n) for n in range(QUERIES)]
    made = network.forward(torch.stack([tensor_of(one) for one in pictures]))
    vectors, maps = made.embedding.numpy(), made.activations.numpy()
    asked: list[Ask] = [
        lambda e: e.explain_batch(pictures),
        lambda e: e.explain_features(vectors, maps, n_neighbors=7),
    ]
    for n in range(QUERIES):
        asked += [
            lambda e, n=n: [e.explain(pictures[n])],
            lambda e, n=n: [e.explain_features(vectors[n], maps[n], size=(20, 30))],
            lambda e, n=n: [e.explain_features(vectors[n], maps[n], result="1/3.png")],
            lambda e, n=n: [e.explain(pictures[n], neighbors=["0/1.png", "2/2.png"])],
        ]
    return asked


def hammer(explainer: Explainer, asked, right, rounds=1, meanwhile=lambda: None) -> list[int]:
    """Ask everything in every thread, each in its own order; count whose answers came back.

    `right` holds the sequential answers of each version of the index: any will do, but all parts
    of one answer must be of one version. At least `rounds` times, and while `meanwhile` lasts.
    """
    counts, done, start = [0] * len(right), threading.Event(), threading.Barrier(THREADS + 1)

    def change() -> None:
        start.wait(20)
        try:
            meanwhile()
        finally:
            done.set()

    def ask(number: int) -> None:
        start.wait(20)
        order = islice(cycle(range(len(asked))), 5 * number, None)
        for turn, which in enumerate(order):
            if done.is_set() and turn >= rounds * len(asked):
                return
            found = asked[which](explainer)
            whose = [n for n, answers in enumerate(right) if all_same(found, answers[which])]
            assert whose, f"question {which} has an answer of no version"
            counts[whose[0]] += 1

    with ThreadPoolExecutor(THREADS + 1) as pool:
        for one in [pool.submit(change), *(pool.submit(ask, n) for n in range(THREADS))]:
            one.result()
    return counts


@pytest.mark.parametrize("with_faiss", [True, False])
def test_threads_get_the_answers_of_one(built, network, with_faiss) -> None:
    asked = questions(network)
    with Index.open(built, with_faiss=with_faiss) as index:
        right = [one(Explainer(index, network)) for one in asked]
    assert right[0][0].trust is not None
    with Index.open(built, with_faiss=with_faiss) as index:
        counts = hammer(Explainer(index, network), asked, [right], rounds=2)
    assert sum(counts) >= 2 * THREADS * len(asked)


def test_threads_whose_transfer_is_not_trusted(built: Path, network: EmbeddingNetwork) -> None:
    asked: list[Ask] = [lambda e, n=n: [e.explain(strange(n))] for n in range(4)]
    asked += [lambda e: e.explain_batch([strange(5), strange(6)]), *questions(network)[:3]]
    with Explainer(built, network, fallback=DirectWeights(network, Recipe())) as explainer:
        right = [one(explainer) for one in asked]
        assert [answers[0].direct for answers in right] == [True] * 5 + [False] * 3
        hammer(explainer, asked, [right])


def switch(link: Path, to: Path) -> Path:
    """Let a link name another index, in one step."""
    link.with_name("next").symlink_to(to)
    return link.with_name("next").replace(link)


@pytest.fixture
def versions(tmp_path: Path, photos: Path, network: EmbeddingNetwork) -> list[Path]:
    """Two indexes of the network, which differ in images, encoding, FAISS and trust."""
    paths = [build(photos, tmp_path / "one", network)]
    recipe = Recipe(encoding="dense", target="margin", faiss="HNSW8")
    paths.append(build(photos, tmp_path / "two", network, recipe, trust=False))
    remove(paths[1], ["0/0.png", "1/4.png", "2/7.png"])
    return paths


def test_reloading_under_threads_mixes_no_versions(tmp_path, versions, network) -> None:
    link, asked = switch(tmp_path / "current", versions[0]), questions(network)
    right = [[one(Explainer(path, network)) for one in asked] for path in versions]
    assert not any(same(a[0], b[0]) for a, b in zip(*right, strict=True))
    explainer = Explainer(link, network)

    def change() -> None:
        for turn in range(1, 11):
            switch(link, versions[turn % 2])
            assert explainer.reload() is True
            assert explainer.reload() is False

    assert min(hammer(explainer, asked, right, meanwhile=change)) > 0


def test_a_writer_changes_the_index_under_threads(tmp_path: Path) -> None:
    """In place, files of older generations swept away while requests use them."""
    path = index_samples.make(tmp_path / "index", 120, "low-rank")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((QUERIES, index_samples.WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shape = (QUERIES, index_samples.CHANNELS, *index_samples.GRID)
    maps = rng.standard_normal(shape)
    asked: list[Ask] = [lambda e: e.explain_features(vectors, maps)]
    asked += [lambda e, n=n: [e.explain_features(vectors[n], maps[n])] for n in range(QUERIES)]
    with Explainer(path) as explainer:
        nearest = explainer.explain_features(vectors, maps)[0].ids[0]
    encoding, number = index_samples.encoding_of("low-rank"), int(nearest[-4:])
    right = []

    def without() -> None:
        remove(path, [nearest])
        compact(path)

    def again() -> None:
        append(path, index_samples.part(number, number + 1, encoding))

    for step in (lambda: None, without, again, without):
        step()
        with Explainer(path) as explainer:
            right.append([one(explainer) for one in asked])
    assert [answers[1][0].ids[0] == nearest for answers in right] == [True, False, True, False]
    explainer = Explainer(path)

    def change() -> None:
        for _ in range(3):
            for step in (again, without):
                step()
                assert explainer.reload()

    assert sum(hammer(explainer, asked, right, meanwhile=change)) >= THREADS * len(asked)


def test_a_request_ends_with_the_version_it_began_with(tmp_path, versions) -> None:
    """Held in its forward pass while the version changes, and the files are let go after it."""
    network, query = network_of(), picture(0, 60)
    link = switch(tmp_path / "current", versions[0])
    explainer = Explainer(link, network)
    expected, maps = explainer.explain(query), Path("/proc/self/maps")
    inside, go_on, embed = threading.Event(), threading.Event(), network.embed

    def held(*given: Any) -> Any:
        inside.set()
        assert go_on.wait(10)
        return embed(*given)

    network.embed = held  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(explainer.explain, query)
        assert inside.wait(10)
        network.embed = embed  # type: ignore[method-assign]
        switch(link, versions[1])
        gc.collect()
        gc.disable()
        try:
            assert explainer.reload()
            assert not maps.exists() or str(versions[0]) in maps.read_text()
            assert explainer.explain(query).trust is None
            go_on.set()
            assert same(waiting.result(), expected)
            del waiting
            assert not maps.exists() or str(versions[0]) not in maps.read_text()
        finally:
            gc.enable()


def flipped(place: int) -> Callable[[bytes], bytes]:
    """Change one bit of the byte at a place."""
    return lambda held: held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :]


PART = "parts/*/embeddings.f32"


@pytest.mark.parametrize(
    ("file", "harm", "message", "options", "opened"),
    [
        ("faiss-*.index", flipped(-5), "does not match its checksum", {}, True),
        (PART, lambda held: held[:-4], "truncated to", {}, False),
        (PART, flipped(3), "embeddings.f32", {"verify": True}, True),
        ("manifest.json", None, "manifest.json", {}, False),
    ],
)
def test_a_broken_version_leaves_the_old_one_serving(
    tmp_path, versions, network, monkeypatch, file, harm, message, options, opened
) -> None:
    link = switch(tmp_path / "current", versions[0])
    explainer = Explainer(link, network)
    before, expected = explainer.index, explainer.explain(picture(0, 60))
    broken = next(versions[1].glob(file))
    broken.write_bytes(harm(broken.read_bytes())) if harm else broken.unlink()
    switch(link, versions[1])
    closed: list[Index] = []
    close = Index.close
    monkeypatch.setattr(Index, "close", lambda self: (closed.append(self), close(self))[1])
    for _ in range(2):
        with pytest.raises(IndexFormatError, match=message):
            explainer.reload(**options)
    assert explainer.index is before
    assert before not in closed
    assert len(closed) == 2 * opened
    assert same(explainer.explain(picture(0, 60)), expected)
    switch(link, versions[0])
    assert not explainer.reload()


def test_a_new_network_is_checked(tmp_path, photos, versions, network, monkeypatch) -> None:
    link = switch(tmp_path / "current", versions[0])
    explainer = Explainer(link, network)
    checks, admit = [], EmbeddingNetwork.for_index
    counted = lambda *given: (checks.append(given), admit(*given))[1]  # noqa: E731
    monkeypatch.setattr(EmbeddingNetwork, "for_index", counted)
    switch(link, versions[1])
    assert explainer.reload()
    assert checks == []
    switch(link, build(photos, tmp_path / "three", network_of(Flat)))
    with pytest.raises(NetworkMismatch, match="this is not the network of the index"):
        explainer.reload()
    assert len(checks) == 1
    assert explainer.explain(picture(0, 60)).trust is None
    switch(link, index_samples.make(tmp_path / "four"))
    with pytest.raises(InputError, match="built from features alone"):
        explainer.reload()


def test_an_index_that_was_handed_in_stays_the_callers(versions) -> None:
    with Index.open(versions[0], with_faiss=False, n_threads=1) as index:
        explainer = Explainer(index)
        assert explainer.reload() is False
        assert explainer.index is index
        remove(versions[0], ["0/0.png"])
        assert explainer.reload() is True
        served = explainer.index
        assert (served.with_faiss, served.n_threads) == (False, 1)
        assert (len(served), len(index)) == (41, 42)
        explainer.close()
        assert index.ids[0] == "0/0.png"
        with pytest.raises(InputError, match="the index is closed"):
            _ = served.ids[0]


def test_a_path_is_kept_from_elsewhere(tmp_path, versions, network, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Explainer("one", network) as explainer:
        monkeypatch.chdir(versions[1])
        remove(versions[0], ["0/0.png"])
        assert explainer.reload()
        assert len(explainer.explain(picture(0, 1), n_neighbors=50).ids) == 41
        with pytest.raises(InputError, match=r"not pickled.*Explainer\(path, \.\.\.\)"):
            pickle.dumps(explainer)
    with pytest.raises(InputError, match="the index is closed; open it again"):
        explainer.explain(picture(0, 1))


def test_what_an_operator_reads(tmp_path, versions, network, caplog) -> None:
    root = logging.getLogger("embedcam")
    assert (root.handlers, root.level) == ([], logging.NOTSET)
    link = switch(tmp_path / "current", versions[0])
    with caplog.at_level(logging.INFO, "embedcam"):
        explainer = Explainer(link, network, fallback=DirectWeights(network, Recipe()))
        assert explainer.explain(strange(0)).direct
        assert not explainer.reload()
        assert caplog.messages == []
        switch(link, versions[1])
        assert explainer.reload()
    assert caplog.messages == [
        f"{link}: serving generation 2 with 39 images, after generation 1 with 42 images"
    ]
    caplog.clear()
    switch(link, versions[0])
    with caplog.at_level(logging.DEBUG, "embedcam"):
        assert explainer.reload()
        found = explainer.explain(strange(0))
    told = f"trust {found.trust:.2f}, one in ten below {found.trust_low:.2f}: weights computed"
    assert caplog.messages[1:] == [told]
    assert {record.name for record in caplog.records} == {"embedcam"}
