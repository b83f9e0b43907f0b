"""Search: exact values, live rows only, whatever FAISS index proposes the candidates."""

from pathlib import Path

import numpy as np
import pytest
from index_samples import WIDTH, encoding_of, make, part

from embedcam.errors import InputError
from embedcam.index import Index, Selection, append, compact, nearest, remove

FACTORIES = ["Flat", "HNSW8", "IVF8,Flat", "PCA4,IVF8,SQ8", "IVF8,Flat,RFlat", "NSG8", "LSH"]
pytestmark = pytest.mark.usefixtures("quick_disk")


def truth(vectors, queries, alive, k, metric) -> np.ndarray:
    """Positions of the k best live rows, by a literal loop."""
    found = []
    for query in queries.astype(np.float64):
        scored = []
        for row in alive:
            vector = vectors[row].astype(np.float64)
            score = -(vector @ query) if metric == "ip" else ((vector - query) ** 2).sum()
            scored.append((score, row))
        found.append([row for _, row in sorted(scored)[:k]])
    return np.array(found)


@pytest.mark.parametrize(
    ("factory", "metric"),
    [*((f, "l2") for f in FACTORIES), *((f, "ip") for f in FACTORIES if f != "LSH")],
)
def test_search_through_a_life_of_changes(tmp_path: Path, factory: str, metric: str) -> None:
    path = make(tmp_path / "x", 300, "dense", factory, metric)
    append(path, part(300, 320, encoding_of("dense")))
    vectors = part(0, 320, encoding_of("dense")).embeddings
    queries = np.concatenate([vectors[[5, 310]], -vectors[:6]])
    gone = [5, 6, 7, *range(100, 160)]
    remove(path, [f"image-{row:04d}" for row in gone])
    alive = np.setdiff1d(np.arange(320), gone)
    expected = truth(vectors, queries, alive, 7, metric)
    for _ in range(2):
        with Index.open(path) as index:
            found = index.search(queries, 7)
            numbers = np.array([[int(i[-4:]) for i in index.ids[row]] for row in found.positions])
            assert index.live(found.positions.reshape(-1)).all()
        assert found.positions.shape == (8, 7)
        if factory == "Flat":
            np.testing.assert_array_equal(numbers, expected)
        overlap = np.mean([len(set(a) & set(b)) for a, b in zip(numbers, expected, strict=True)])
        assert overlap >= (1 if factory == "LSH" else 4)
        # The values are exact for every type of index.
        near, wide = vectors[numbers].astype(np.float64), queries.astype(np.float64)[:, None]
        apart, alike = ((near - wide) ** 2).sum(axis=2), (near * wide).sum(axis=2)
        np.testing.assert_allclose(found.distances, apart, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.similarities, alike, rtol=1e-6, atol=1e-7)
        ordered = -found.similarities if metric == "ip" else found.distances
        assert (np.diff(ordered, axis=1) >= 0).all()
        assert found.distances[1, 0] == 0  # the query's own row, exactly
        compact(path)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8", "NSG8"])
def test_fewer_live_images_than_asked_for(tmp_path: Path, factory: str) -> None:
    path = make(tmp_path / "x", 128, "dense", factory)
    remove(path, [f"image-{row:04d}" for row in range(124)])
    with Index.open(path) as index:
        found = index.search(index.embeddings([0, 1]), 10)
        assert np.sort(found.positions).tolist() == [[124, 125, 126, 127]] * 2
    remove(path, [f"image-{row:04d}" for row in range(124, 128)])
    with Index.open(path) as index, pytest.raises(InputError, match=r"every image .* removed"):
        index.search(np.eye(1, WIDTH), 3)
    if factory in ("Flat", "HNSW8"):
        compact(path)
        append(path, part(0, 3, encoding_of("dense")))
        with Index.open(path) as index:
            assert index.search(index.embeddings([1]), 1).positions.tolist() == [[1]]


def test_ties_fall_to_the_lower_position(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 10, "dense")
    rows = part(20, 26, encoding_of("dense"))
    rows.embeddings[:] = rows.embeddings[0]
    append(path, rows)
    with Index.open(path) as index:
        found = index.search(rows.embeddings[:1], 6)
    assert found.positions.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert not found.distances.any()


def test_queries_are_checked(tmp_path: Path) -> None:
    index = Index.open(make(tmp_path / "x", 10))
    good, wide = index.embeddings([0]), index.embeddings([0]).astype(float)
    for queries, k, message in [
        (good[0], 3, r"shape \[8\].*expected numbers \[B 8\]"),
        (good[:, :4], 3, r"shape \[1, 4\]"),
        ([[1.0, 2.0], [3.0]], 3, r"queries cannot be read as an array of numbers"),
        (good, 0, "n_neighbors = 0"),
        (good, 2.5, "n_neighbors = 2.5"),
        ([good[0], 1.01 * good[0]], 3, r"query 1 has length 1\.01; this index holds vectors of le"),
        ([good[0], 0 * good[0]], 3, r"query 1 has length 0"),
        ([good[0], np.nan * good[0]], 3, r"the embedding of query 1 holds a NaN or an infinity"),
        ([good[0], 1e300 * wide[0]], 3, r"query 1 holds -?\d.*e\+\d+, and numbers may go up"),
    ]:
        with np.errstate(all="ignore"), pytest.raises(InputError, match=message):
            index.search(queries, k)
    assert index.search(good[:0], 3).positions.shape == (0, 3)
    assert index.search((1 + 5e-4) * good, 1).positions[0, 0] == 0  # within rounding
    with Index.open(make(tmp_path / "any", 20, normalized=False)) as index:
        assert index.search(2 * index.embeddings([4]), 3).positions.shape == (1, 3)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_brute_force_is_exact_and_does_not_depend_on_blocks(monkeypatch, metric) -> None:
    vectors = part(0, 90, encoding_of("dense")).embeddings
    vectors[40:50] = vectors[3]
    expected = truth(vectors, vectors[:20], np.arange(90), 12, metric)
    np.testing.assert_array_equal(nearest(vectors, vectors[:20], 12, metric).positions, expected)
    monkeypatch.setattr("embedcam.index.arrays.BLOCK_BYTES", 7 * WIDTH * 4)
    np.testing.assert_array_equal(nearest(vectors, vectors[:20], 12, metric).positions, expected)
    assert nearest(vectors, vectors[:2], 500, metric).positions.shape == (2, 90)
    with pytest.raises(InputError, match="metric = 'cosine' is unknown"):
        nearest(vectors, vectors, 1, "cosine")
    with pytest.raises(InputError, match="no embeddings"):
        nearest(vectors[:0], vectors, 1)


@pytest.mark.parametrize("factory", ["HNSW8", "NSG8", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4"])
def test_building_is_deterministic(tmp_path: Path, factory: str) -> None:
    import faiss

    before, written = faiss.omp_get_max_threads(), []
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        path = make(tmp_path / str(threads), 300, "dense", factory)
        append(path, part(300, 310, encoding_of("dense")))
        assert faiss.omp_get_max_threads() == threads
        written.append((path / "faiss-000002.index").read_bytes())
    faiss.omp_set_num_threads(before)
    assert written[0] == written[1]


def test_nprobe_and_search_without_faiss(tmp_path: Path) -> None:
    path = make(tmp_path / "x", 300, "dense", "IVF64,Flat")
    with Index.open(path) as index:
        assert index.manifest.faiss.search.nprobe == 8
        queries = -index.embeddings(np.arange(40))
        exact = nearest(index.embeddings(np.arange(300)), queries, 5).positions
        for probes in (64, 2**31, 2**70):
            np.testing.assert_array_equal(index.search(queries, 5, nprobe=probes).positions, exact)
        assert (index.search(queries, 5, nprobe=1).positions != exact).any()
        for probes in ("x", 1.5, True, 0, -1, [3]):
            with pytest.raises(InputError, match=r"nprobe = .*(whole|least 1)"):
                index.search(queries, 5, nprobe=probes)
    (path / "faiss-000001.index").write_bytes(b"not to be read")
    with Index.open(path, with_faiss=False) as index:
        np.testing.assert_array_equal(index.search(queries, 5).positions, exact)


def test_stored_numbers_that_overflow_are_refused(tmp_path, monkeypatch) -> None:
    with Index.open(make(tmp_path / "x", 20, normalized=False)) as index:
        query = index.embeddings([4])
        huge = property(lambda rows: np.full((len(rows), WIDTH), 3e38, np.float32))
        monkeypatch.setattr(Selection, "embeddings", huge)
        with pytest.raises(InputError, match=r"an indexed embedding holds numbers beyond 1e\+15"):
            index.search(query, 3)
