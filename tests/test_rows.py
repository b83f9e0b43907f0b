"""Rows and models: an index's rows carried elsewhere explain as the index itself does."""

import base64
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import CHANNELS, GRID, WIDTH, encoding_of, header_of, make, part

from embedcam import Explainer, Index
from embedcam.errors import EmbedcamError, IndexFormatError, InputError
from embedcam.index import append, compact, remove, verify
from embedcam.index.in_memory import MOST_ROWS, index_of_rows
from embedcam.index.model import write_model
from embedcam.index.row_batches import removed_ids, row_batches, schema

pytestmark = pytest.mark.usefixtures("quick_disk")
KINDS = ["top-m", "low-rank", "embedding", "by-position", "dense", "dense32"]


def made(folder: Path, kind: str = "low-rank", **choices: Any) -> tuple[Index, Path]:
    """An open index and its model."""
    make(folder / "index", kind=kind, **choices)
    index = Index.open(folder / "index")
    return index, write_model(index, folder / "model.embedcam")


def features(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(WIDTH).astype(np.float32)
    maps = rng.random((CHANNELS, *GRID)).astype(np.float32)
    return vector / np.linalg.norm(vector), maps


def rows_of(index: Index, **choices: Any) -> list[dict[str, Any]]:
    return [row for batch in index.rows(**choices) for row in batch.to_pylist()]


def near(index: Index, vector: np.ndarray, n: int = 10) -> list[dict[str, Any]]:
    """What a store with a search of its own returns."""
    known = {row["id"]: row for row in rows_of(index)}
    found = index.search(vector[None], n).positions[0]
    return [known[name] for name in index.select(found).ids]


# The model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_index_without_its_rows(kind: str, tmp_path: Path) -> None:
    index, path = made(tmp_path, kind)
    model = Index.open(path)
    assert len(model) == 0
    assert model.generation == index.generation
    assert model.fitted_files.keys() == index.fitted_files.keys()
    for name, array in index.fitted_files.items():
        np.testing.assert_array_equal(model.fitted_files[name], array)
    assert model.layers[0].encoding.spec() == index.layers[0].encoding.spec()
    assert verify(path).ok
    with pytest.raises(InputError, match="is a model, which holds no images; give the rows"):
        model.search(features()[0][None], 3)


def test_a_model_has_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    index, path = made(tmp_path)
    again = write_model(index, tmp_path / "again.embedcam")
    from_model = write_model(Index.open(path), tmp_path / "third.embedcam")
    assert path.read_bytes() == again.read_bytes() == from_model.read_bytes()
    assert zipfile.ZipFile(path).testzip() is None


def test_a_generation_is_what_decodes_rows_and_nothing_else(tmp_path: Path) -> None:
    index, _ = made(tmp_path)
    first = index.generation
    encoding = encoding_of("low-rank")
    append(index.path, part(12, 20, encoding))
    remove(index.path, ["image-0003"])
    compact(index.path)
    assert Index.open(index.path).generation == first
    make(tmp_path / "other", kind="top-m")
    assert Index.open(tmp_path / "other").generation != first
    make(tmp_path / "same", kind="low-rank", start=100)
    assert Index.open(tmp_path / "same").generation == first


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_broken_model_is_refused(place: float, harm: str, tmp_path: Path) -> None:
    _, path = made(tmp_path)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if harm == "cut":
        del content[at:]
    else:
        content[at] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(IndexFormatError, match=re.escape(str(path))) as caught:
        Index.open(path)
    assert str(caught.value).isprintable()


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "more": (lambda files: files.update({"../../evil": b"x"}), "not those that its manifest names"),
    "less": (lambda files: files.pop(min(files)), "not those that its manifest names"),
    "no manifest": (lambda files: files.pop("manifest.json"), "holds no manifest.json"),
    "other bytes": (
        lambda files: files.update({min(files): bytes(len(files[min(files)]))}),
        "does not match its checksum",
    ),
    "no json": (lambda files: files.update({"manifest.json": b"{"}), "not a readable JSON file"),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_forged_model_is_refused(harm: str, tmp_path: Path) -> None:
    _, path = made(tmp_path)
    files = members(path)
    change, said = HOSTILE[harm]
    change(files)
    zipped(path, files)
    with pytest.raises(IndexFormatError, match=said):
        Index.open(path)


def test_a_compressed_or_a_foreign_file_is_no_model(tmp_path: Path) -> None:
    _, path = made(tmp_path)
    zipped(path, members(path), zipfile.ZIP_DEFLATED)
    with pytest.raises(IndexFormatError, match=r"holds a compressed file; write it again with"):
        Index.open(path)
    path.write_bytes(b"GIF89a" * 9)
    with pytest.raises(IndexFormatError, match="is no model of embedcam"):
        Index.open(path)
    with pytest.raises(IndexFormatError, match=r"is no file of a model; `embedcam model INDEX"):
        Explainer.from_model(tmp_path)


def test_a_model_that_names_rows_is_none(tmp_path: Path) -> None:
    index, path = made(tmp_path)
    files = members(path)
    files["manifest.json"] = (index.path / "manifest.json").read_bytes()
    zipped(path, files)
    with pytest.raises(IndexFormatError, match="names rows, which a model has none of"):
        Index.open(path)


def test_what_changes_an_index_refuses_a_model(tmp_path: Path) -> None:
    _, path = made(tmp_path)
    for change in (compact, lambda path: remove(path, ["image-0001"])):
        with pytest.raises(EmbedcamError, match="give the folder of the index"):
            change(path)


# Rows out


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_what_the_index_holds(kind: str, tmp_path: Path) -> None:
    index, path = made(tmp_path, kind)
    rows = rows_of(index, batch_rows=5)
    assert [row["id"] for row in rows] == list(index.ids)
    assert [row["label"] for row in rows] == list(index.labels)
    assert [row["path"] for row in rows] == list(index.paths)
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_array_equal(vectors, index.embeddings(range(12)))
    back, every = index_of_rows(Index.open(path), rows), np.arange(12)
    np.testing.assert_array_equal(back.weights(every), index.weights(every))
    np.testing.assert_array_equal(back.coarse(every), index.coarse(every))
    np.testing.assert_array_equal(back.select(every).marks, index.select(every).marks)


def test_removed_rows_are_left_out_and_named(tmp_path: Path) -> None:
    index, _ = made(tmp_path)
    remove(index.path, ["image-0003", "image-0007"])
    append(index.path, part(7, 8, encoding_of("low-rank")))  # one of them again
    index = Index.open(index.path)
    ids = [row["id"] for row in rows_of(index)]
    assert sorted(ids) == [f"image-{row:04d}" for row in range(12) if row != 3]
    assert list(removed_ids(index)) == [["image-0003"]]


def test_batches_go_on_where_a_part_was_left(tmp_path: Path) -> None:
    index, _ = made(tmp_path)
    whole = list(row_batches(index, size=5))
    assert [batch.upto for batch in whole] == [5, 10, 12]
    rest = list(row_batches(index, size=5, start={whole[0].part: 10, "unknown": 3}))
    assert [batch.rows["id"].to_pylist() for batch in rest] == [["image-0010", "image-0011"]]


def test_embeddings_in_half_precision_or_none(tmp_path: Path) -> None:
    index, _ = made(tmp_path)
    half = rows_of(index, embedding="half")
    expected = index.embeddings(range(12)).astype(np.float16)
    np.testing.assert_array_equal([row["embedding"] for row in half], expected)
    assert "embedding" not in rows_of(index, embedding="none")[0]
    assert schema(index, "half").field("embedding").type == pa.list_(pa.float16(), WIDTH)
    with pytest.raises(InputError, match="embedding = 'tiny'"):
        index.rows(embedding="tiny")
    wide, _ = made(tmp_path / "wide", "embedding")
    with pytest.raises(InputError, match="makes weights of its embeddings, which in half"):
        wide.rows(embedding="half")


def test_a_label_with_control_characters_is_not_written(tmp_path: Path) -> None:
    rows = part(0, 3, encoding_of("low-rank"))
    rows.labels = ["a", "b\x1b[31m", None]
    index, _ = made(tmp_path, rows=rows)
    with pytest.raises(InputError, match=r"holds the label 'b.x1b\[31m', with control characters"):
        rows_of(index)


# Rows in


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["rows", "base64", "arrow", "text"])
def test_rows_explain_as_their_index_does(kind: str, how: str, tmp_path: Path) -> None:
    index, path = made(tmp_path, kind)
    with Explainer(index) as whole, Explainer.from_model(path) as by_rows:
        for seed in range(5):
            vector, maps = features(seed)
            rows: Any = near(index, vector)
            if how == "base64":
                rows = [{**row, "codes": base64.b64encode(row["codes"]).decode()} for row in rows]
            elif how == "arrow":
                rows = pa.Table.from_pylist(rows, schema=schema(index))
            elif how == "text":
                rows = [{**row, "embedding": json.dumps(row["embedding"])} for row in rows]
            for options in ({}, {"result": rows_id(rows, 2)}, {"n_neighbors": 1}):
                expected = whole.explain_features(vector, maps, **options)
                found = by_rows.explain_rows(vector, maps, rows, **options)
                assert (found.ids, found.labels) == (expected.ids, expected.labels)
                for name in ("cam", "signed_cam", "weights", "distances", "neighbor_cams"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert np.abs(found.signed_cam).max() > 0


def rows_id(rows: Any, place: int) -> str:
    return rows["id"][place].as_py() if isinstance(rows, pa.Table) else rows[place]["id"]


def test_a_rival_among_rows(tmp_path: Path) -> None:
    index, path = made(tmp_path)
    vector, maps = features()
    rows = near(index, vector)
    named = {"result": rows[1]["id"], "above": rows[4]["id"]}
    expected = Explainer(index).explain_features(vector, maps, **named)
    found = Explainer.from_model(path).explain_rows(vector, maps, rows, **named)
    np.testing.assert_array_equal(found.signed_cam, expected.signed_cam)
    with pytest.raises(InputError, match="the index has no image 'image-9999'"):
        Explainer.from_model(path).explain_rows(vector, maps, rows, result="image-9999")


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_without_embeddings_the_stores_own_distances_count(metric: str, tmp_path: Path) -> None:
    index, path = made(tmp_path, metric=metric)
    vector, maps = features(3)
    expected = Explainer(index).explain_features(vector, maps)
    rows = near(index, vector)
    for row in rows:
        row["similarity"] = float(np.array(row.pop("embedding")) @ vector.astype(np.float64))
    found = Explainer.from_model(path).explain_rows(vector, maps, rows[::-1])
    assert found.ids == expected.ids
    np.testing.assert_array_equal(found.signed_cam, expected.signed_cam)
    np.testing.assert_allclose(found.distances, expected.distances, atol=1e-6)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)
    (row,) = rows[:1]
    row["distance"] = 2 - 2 * row.pop("similarity")
    found = Explainer.from_model(path).explain_rows(vector, maps, [row])
    np.testing.assert_allclose(found.similarities, expected.similarities[:1], atol=1e-6)
    del row["distance"]
    with pytest.raises(InputError, match="without embeddings, and without distances; select"):
        Explainer.from_model(path).explain_rows(vector, maps, [row])
    with pytest.raises(InputError, match="the rows came without embeddings, which this needs"):
        index_of_rows(index, [{**row, "distance": 1.0}]).embeddings([0])
    for other in ({"distance": -0.1}, {"similarity": -1.1}, {"distance": 0.2, "similarity": 0.8}):
        with pytest.raises(InputError, match="expected the squared Euclidean distance and the inn"):
            index_of_rows(index, [{**row, **other}])


def test_vectors_of_any_length_need_both_distances(tmp_path: Path) -> None:
    index, path = made(tmp_path, normalized=False)
    vector, maps = features()
    rows = [{**row, "embedding": None, "distance": 1.0} for row in near(index, vector)]
    with pytest.raises(InputError, match=r'select both "distance" \(squared Euclidean\) and'):
        Explainer.from_model(path).explain_rows(vector, maps, rows)


def test_weights_of_embeddings_need_them(tmp_path: Path) -> None:
    index, path = made(tmp_path, "embedding")
    vector, maps = features()
    rows = [{**row, "embedding": None, "distance": 1.0} for row in near(index, vector)]
    with pytest.raises(InputError, match="without embeddings, of which this model makes the weigh"):
        Explainer.from_model(path).explain_rows(vector, maps, rows)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "short codes": (
        lambda row: row.update(codes=row["codes"][:-1]),
        "bytes of codes, where its",
    ),
    "no codes": (lambda row: row.update(codes=None), "has no codes; expected bytes, or base64"),
    "codes of numbers": (lambda row: row.update(codes=[1, 2]), "has codes of type list"),
    "no base64": (lambda row: row.update(codes="*" * 40), "has codes that are no base64"),
    "NaN": (lambda row: row.update(codes=b"\xff" * len(row["codes"])), "is broken"),
    "negative scale": (lambda row: row.update(scale=-1.0), "scales: has the scale -1.0"),
    "no scale": (lambda row: row.update(scale=None), "has the scale None; expected a finite"),
    "infinite scale": (lambda row: row.update(scale=float("inf")), "has the scale inf"),
    "generation": (lambda row: row.update(generation="0" * 16), "has the generation '00000000"),
    "no generation": (lambda row: row.pop("generation"), "has no generation, and"),
    "short embedding": (lambda row: row["embedding"].pop(), r"of shape \[7\] and type float64"),
    "NaN embedding": (lambda row: row["embedding"].append(row["embedding"].pop() * np.nan), "NaN"),
    "long embedding": (
        lambda row: row.update(embedding=[9.0] * WIDTH),
        "where unit vectors are promised",
    ),
    "text embedding": (lambda row: row.update(embedding="[1, 2"), r"has the embedding '\[1, 2'"),
    "control": (lambda row: row.update(label="a\x1b[2J"), "with control characters"),
    "long label": (lambda row: row.update(label="a" * 5000), "expected a text of at most 4,096"),
    "label": (lambda row: row.update(label=7), "has the label 7"),
    "half a character": (lambda row: row.update(path="\ud800"), "expected a text"),
    "no id": (lambda row: row.pop("id"), "has the id None"),
    "twice": (lambda row: row.update(id="image-0001"), "came back twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    index, path = made(tmp_path)
    vector, maps = features()
    rows = rows_of(index)
    change, said = BROKEN[kind]
    change(rows[6])
    with pytest.raises(InputError, match=said) as caught:
        Explainer.from_model(path).explain_rows(vector, maps, rows)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    assert "row 6" in message if kind == "no id" else rows[6]["id"] in message


def test_a_channel_beyond_the_layer_is_refused(tmp_path: Path) -> None:
    index, path = made(tmp_path, "top-m")
    rows = rows_of(index)
    rows[2]["codes"] = b"\xff" * 4 + rows[2]["codes"][4:]
    with pytest.raises(InputError, match=r"'image-0002' of the store is broken \(layer0.channels"):
        Explainer.from_model(path).explain_rows(*features(), rows)


def test_what_is_no_list_of_rows_is_refused(tmp_path: Path) -> None:
    index, path = made(tmp_path)
    row, explainer = rows_of(index)[0], Explainer.from_model(path)
    for rows, said in (
        ([], "no row came back of generation"),
        ("image-0001", "expected a list of rows"),
        (row, "expected a list of rows"),
        ([tuple(row.values())], "the row 0 is a tuple; expected a mapping"),
        ([row] * (MOST_ROWS + 1), "more than 10,000 rows for one query"),
        (pa.table({"id": ["a"] * (MOST_ROWS + 1)}), "more than 10,000 rows for one query"),
    ):
        with pytest.raises(InputError, match=said):
            explainer.explain_rows(*features(), rows)


@settings(max_examples=60)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["id", "embedding", "codes", "scale", "label", "path", "generation", "distance"]
            ),
            st.one_of(st.none(), st.text(), st.binary(), st.floats(), st.lists(st.floats())),
        ),
        max_size=3,
    )
)
def test_whatever_comes_back_is_refused_as_input(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError) as caught:
        index_of_rows(MODEL[0], rows)
    assert str(caught.value).isprintable()


MODEL: list[Index] = []


@pytest.fixture(autouse=True, scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> None:
    MODEL[:] = [Index.open(made(tmp_path_factory.mktemp("model"))[1])]


def test_several_layers_are_kept_in_one_column(tmp_path: Path) -> None:
    encodings = [encoding_of("low-rank"), encoding_of("dense")]
    header = header_of(encodings[0])
    second = header_of(encodings[1])["layers"][0]
    header["layers"].append({**second, "name": "features.7", "coarse_grid": None})
    both = [part(0, 12, encoding) for encoding in encodings]
    both[0].fields = [both[0].fields[0], both[1].fields[0]]
    both[0].coarse = [both[0].coarse[0], None]
    from embedcam.index import create

    fitted = [one.fitted for one in encodings]
    create(tmp_path / "index", header, fitted, {"embedding_mean": np.zeros(8, "f4")}, both[0])
    index = Index.open(tmp_path / "index")
    path = write_model(index, tmp_path / "model.embedcam")
    vector, maps = features()
    expected = Explainer(index).explain_features(vector, [maps, maps])
    found = Explainer.from_model(path).explain_rows(vector, [maps, maps], near(index, vector))
    assert np.array_equal(found.signed_cam, expected.signed_cam)
    for name, weights in expected.layer_weights.items():
        np.testing.assert_array_equal(found.layer_weights[name], weights)
