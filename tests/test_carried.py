"""The mean of texts, parts and exemplars go wherever an index goes: same values, same answers."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from build_samples import activations_of, built, pictures, quicken, toy
from oracles_concepts import largest
from test_shards import in_pieces
from text_samples import PROMPTS, built_words, tower

import embedcam.offline.concepts as offline
from embedcam import Explainer, PairExplainer, add_images
from embedcam.images import find_images
from embedcam.index import Index, compact, remove
from embedcam.index.concepts import ARRAYS, EXEMPLARS
from embedcam.index.model import write_model
from embedcam.offline import merge_job, plan_job, run_shard
from embedcam.prototypes import compress

QUIET = {"workers": 0, "progress": False}
KEPT = {"text_mean", "embedding_mean", *ARRAYS}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    quicken(monkeypatch)
    _few(monkeypatch)


def _few(patch) -> None:
    patch.setattr(offline, "LEAST_IMAGES", 4)
    patch.setattr(offline, "LEAST_CHANNELS", 4)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Path:
    """A folder with `photos` and their `index`."""
    folder = tmp_path_factory.mktemp("carried")
    with pytest.MonkeyPatch.context() as patch:
        _few(patch)
        built_words(folder)[0].close()
    return folder


@pytest.fixture
def path(indexed, tmp_path) -> Path:
    """An index of its own for a test that changes it."""
    return shutil.copytree(indexed / "index", tmp_path / "index")


def with_words():
    return toy(texts=tower)


def mean_of_prompts() -> np.ndarray:
    """Add up the prompts' embeddings, each of length 1, one by one."""
    total = np.zeros(5)
    for row in tower(PROMPTS).astype(float):
        total += row / np.sqrt((row**2).sum())
    return total / len(PROMPTS)


def fitted(where: Path) -> dict[str, bytes]:
    with Index.open(where) as index:
        return {name: array.tobytes() for name, array in index.shared().items() if name in KEPT}


def test_an_index_that_changes_keeps_what_was_fitted(indexed, path, tmp_path) -> None:
    first, made = fitted(path), with_words()
    assert first.keys() == KEPT
    activations = activations_of(made, find_images(indexed / "photos")).numpy()
    with Index.open(path) as index:
        np.testing.assert_allclose(index.fitted("text_mean"), mean_of_prompts(), atol=1e-6)
        ids = [*index.ids]
    later = pictures(tmp_path / "later", 2, 0, seed=8)
    gone = ids[largest(activations, 0, 1)[0][1]]
    for change in (
        lambda: remove(path, [gone, ids[5]]),
        lambda: compact(path),
        lambda: add_images(later, made.network, path, **QUIET),
        lambda: compact(path, rebuild_faiss="Flat"),
    ):
        change()
        assert fitted(path) == first
    with Index.open(path) as index:
        index.verify()
        for channel in range(8):
            expected = [ids[image] for _, image, _ in largest(activations, channel, 5)]
            expected = [name for name in expected if name not in (gone, ids[5])]
            assert [one.id for one in index.exemplars("channel", channel, 5)] == expected
    with Explainer(path, made.network) as explainer:
        assert explainer.explain_text("a red car", n_neighbors=1).centred


class Rows:
    """A database in a list, searched by comparing with every row."""

    def __init__(self, index: Index) -> None:
        self.rows = [row for batch in index.rows() for row in batch.to_pylist()]

    def search(self, embedding: np.ndarray, n: int) -> list[dict[str, object]]:
        def far(row) -> float:
            return -float(np.array(row["embedding"]) @ embedding)

        return sorted(self.rows, key=far)[:n]

    def fetch(self, ids: Sequence[str]) -> list[dict[str, object]]:
        return [row for row in self.rows if row["id"] in ids]


def test_a_model_and_rows_answer_as_their_index(indexed, path, tmp_path) -> None:
    made, images = with_words(), indexed / "photos"
    with Index.open(path) as index:
        remove(path, [index.exemplar_ids("channel", 0)[0]])
    with Index.open(path) as index:
        model, store = write_model(index, tmp_path / "model.embedcam"), Rows(index)
        query, name = find_images(images).open(0), index.ids[index.live_positions()[3]]
        whole = Explainer(index, made.network, images=images)
        expected = whole.explain_text("a red car", n_neighbors=3)
        receipt = PairExplainer(whole).receipt(query, name)
        alone = Explainer.from_model(model, made.network, store=store, images=images)
        told = alone.explain_text("a red car", n_neighbors=3)
        found = PairExplainer(alone).receipt(query, name)
        assert fitted(model) == fitted(path)
        assert (told.ids, told.centred) == (expected.ids, True)
        np.testing.assert_allclose(told.signed_cams, expected.signed_cams, atol=1e-6)
        for one, other in zip(found.lines(8), receipt.lines(8), strict=True):
            assert (one.number, one.exemplars) == (other.number, other.exemplars)
            assert one.contribution == pytest.approx(other.contribution, abs=1e-6)
        concepts = [(one.number, one.exemplars) for one in found.concepts()]
        assert concepts == [(one.number, one.exemplars) for one in receipt.concepts()]
        assert all(exemplars for _, exemplars in concepts)


def test_prototypes_answer_words_with_the_mean_of_texts(path, indexed, tmp_path) -> None:
    before, made = fitted(path), with_words()
    with Index.open(path) as index:
        compress(index, tmp_path / "small", 4)
    after = fitted(tmp_path / "small")
    assert after == {name: one for name, one in before.items() if name not in EXEMPLARS}
    with Explainer(tmp_path / "small", made.network, images=indexed / "photos") as explainer:
        told = explainer.explain_text("a red car", n_neighbors=2)
        text = tower(["a red car"])[0].astype(float)
        text /= np.linalg.norm(text)
        np.testing.assert_allclose(told.direction, text - mean_of_prompts(), atol=1e-6)


def test_pieces_fit_what_one_process_does(tmp_path) -> None:
    made, source = with_words(), pictures(tmp_path / "p")
    options = {"prompts": PROMPTS}
    one = built(source, made, tmp_path / "one", **options)
    assert fitted(one).keys() == KEPT
    several = in_pieces(source, made.network, tmp_path, **options)
    assert fitted(several) == fitted(one)
    later = pictures(tmp_path / "q", 2, 0, seed=8)
    job = tmp_path / "more"
    report = plan_job(later, made.network, job, add_to=several, pieces=2, batch_size=4)
    for _ in range(report.rounds):
        for piece in range(report.n_pieces):
            run_shard(job, piece, network=made.network, **QUIET)
    merge_job(job, several, made.network, **QUIET)
    assert fitted(several) == fitted(one)
    with Index.open(several) as index:
        assert len(index) == 14
