"""Pictures in Parquet, Arrow, Feather and Lance, as others write them; streams of rows."""

import hashlib
import io
import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_samples import grays, png, shard

from embedcam.errors import ImageError, InputError
from embedcam.images import find_images, from_dataset, load_batches, tables
from embedcam.preprocess import Preprocess

ROWS = {
    "id": ["a", "b", "c", "d", "e"],
    "image": [png(value) for value in range(5)],
    "label": ["x", "y", None, "", "x"],
}
NAMES = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})


def digest(value: int) -> str:
    return hashlib.blake2b(png(value), digest_size=16).hexdigest()


def written(path: Path, table: pa.Table, **options) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    elif path.suffix == ".feather":
        pa.feather.write_feather(table, path, **options)
    elif path.suffix == ".lance":
        pytest.importorskip("lance").write_dataset(table, str(path), **options)
    else:
        stream = options.pop("stream", False)
        with pa.OSFile(str(path), "wb") as file:
            make = pa.ipc.new_stream if stream else pa.ipc.new_file
            with make(file, table.schema) as writer:
                writer.write_table(table, **options)
    return path


KINDS = [
    ("a.parquet", {"row_group_size": 2}), ("a.parquet", {}), ("a.arrow", {"max_chunksize": 2}),
    ("a.arrow", {"stream": True}), ("a.feather", {"chunksize": 3}), ("a.lance", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_every_kind_of_table(tmp_path: Path, name: str, options) -> None:
    source = find_images(written(tmp_path / name, pa.table(ROWS), **options))
    assert source.ids == ROWS["id"]
    assert source.labels == ["x", "y", None, None, "x"]
    assert source.items.paths == [f"{name}#{row}" for row in range(5)]
    assert grays(source) == [0, 1, 2, 3, 4]
    for row in (4, 0, 3, 3, 1):
        assert np.asarray(source.open(row))[0, 0, 0] == row
    assert source.state(2, source.mark(2)) == "same"
    assert find_images(tmp_path / name, "none", exclude="b").items[1].id == "c"
    assert find_images(tmp_path / name, "none").labels == [None] * 5


def test_hugging_face_s_columns(tmp_path: Path) -> None:
    pictures = [{"bytes": png(value), "path": "same.png"} for value in (1, 2, 3)]
    table = pa.table({"image": pictures, "label": [1, -1, 0]})
    table = table.replace_schema_metadata({"huggingface": NAMES})
    source = find_images(written(tmp_path / "a.parquet", table))
    assert source.ids == [digest(1), digest(2), digest(3)]
    assert source.labels == ["dog", None, "cat"]
    assert grays(source) == [1, 2, 3]
    written(tmp_path / "b.parquet", table.slice(1))
    more = pa.table({"image": [{"bytes": None, "path": "x"}, pictures[0]], "label": [0, 1]})
    written(tmp_path / "c.parquet", more)
    every = find_images(tmp_path / "*.parquet")
    assert every.ids == source.ids
    assert str(every.left_out) == "3 pictures twice, 1 without a picture"
    with pytest.raises(InputError, match="a table has a label column; take labels="):
        find_images(tmp_path, "folders")
    table = table.set_column(1, "label", [[1, 2, 0]])
    with pytest.raises(InputError, match="row 1: the label is 2, and 2 classes are named"):
        find_images(written(tmp_path / "a.parquet", table))


def test_a_saved_data_set_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [{"bytes": png(v), "path": None} for v in (5, 6)], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = find_images(tmp_path / "saved")
    assert (source.ids, source.labels) == ([digest(5), digest(6)], ["dog", "cat"])
    assert grays(source) == [5, 6]


def test_img2dataset_s_output(tmp_path: Path) -> None:
    rows = {
        "url": ["https://h/1.jpg", "https://h/2.jpg"], "key": ["000000000", "000000001"],
        "caption": ["one", "two"], "status": ["success", "failed_to_download"],
        "jpg": [png(1), None],
    }  # fmt: skip
    written(tmp_path / "00000.parquet", pa.table(rows))
    (tmp_path / "00000_stats.json").write_text("{}")
    source = find_images(tmp_path)
    assert (source.ids, grays(source), source.labels) == (["000000000"], [1], [None])
    # Its shards have the same table beside them, without the bytes.
    written(tmp_path / "00000.parquet", pa.table(rows).drop_columns("jpg"))
    members = [("000000000.jpg", png(7)), ("000000000.txt", b"one"), ("000000000.json", b"{}")]
    shard(tmp_path / "00000.tar", members)
    source = find_images(tmp_path)
    assert (source.ids, grays(source)) == (["000000000"], [7])
    listed = find_images(tmp_path / "00000.parquet")
    assert list(listed.items.paths) == ["https://h/1.jpg"]


def test_clip_retrieval_s_metadata(tmp_path: Path, say) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        rows = {"image_path": [f"{tmp_path}/{number}.png"], "caption": ["words"]}
        (tmp_path / "metadata").mkdir(exist_ok=True)
        written(tmp_path / f"metadata/metadata_{number}.parquet", pa.table(rows))
    source = find_images(tmp_path / "metadata")
    assert list(source.ids) == [f"{tmp_path}/0.png", f"{tmp_path}/1.png"]
    assert source.labels == [None, None]
    assert grays(source) == [0, 1]
    np.save(tmp_path / "e.npy", np.eye(2, 4, dtype=np.float32))
    np.save(tmp_path / "p.npy", np.eye(2, 4, dtype=np.float32))
    code, _, err = say(
        "build", tmp_path / "i", "--embeddings", tmp_path / "e.npy", "--pooled", tmp_path / "p.npy",
        "--grid", "2x2", "--ids", tmp_path / "metadata", "--target", "centred", "--faiss", "none",
    )  # fmt: skip
    assert code == 0, err
    assert say("info", tmp_path / "i", "--ids")[1].split() == list(source.ids)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1], "image": [3]}, "has the columns x, image; one has to hold pictures"),
        ({"path": ["a.png", None]}, "row 1: the path is empty; leave such rows out"),
        ({"id": ["a", None], "image": [b"", b""]}, "row 1: the id is empty; fill it"),
        ({"id": [0.5, 1], "image": [b"", b""]}, "row 0: the id is 0.5, no text and no whole"),
        ({"id": [1, 1], "image": [b"", b""]}, "a.parquet#1 have the same id '1'; ids must be uni"),
        ({"id": ["a"], "image": [b"x"], "label": [float("inf")]}, None),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, columns, message: str | None) -> None:
    path = written(tmp_path / "a.parquet", pa.table(columns))
    if message is None:
        assert find_images(path).labels == ["inf"]
        message = "the label 'inf' is not a finite number"
        with pytest.raises(InputError, match=message):
            find_images(path, "numbers")
        return
    with pytest.raises(InputError, match=re.escape(message)):
        find_images(path)


def test_rows_that_cannot_be_read_are_named_with_their_table(tmp_path: Path, monkeypatch) -> None:
    rows = {"id": ["a", "b", "c"], "image": [png(1), None, b"no picture"]}
    source = find_images(written(tmp_path / "a.parquet", pa.table(rows)))
    places = range(3)
    preprocess = Preprocess((4, 4))
    (batch,) = load_batches(source, places, preprocess, 4, on_error="skip")
    assert [place for place, _ in batch.errors] == [1, 2]
    assert batch.errors[0][1] == f"{tmp_path}/a.parquet#1: the row holds no picture"
    assert batch.errors[1][1].startswith(f"{tmp_path}/a.parquet#2: is not an image of a known kind")
    monkeypatch.setattr(tables, "MAX_BYTES", 20)
    with pytest.raises(ImageError, match=r"#0: has \d+ bytes, and of one picture at most 20 are"):
        source.open(0)
    monkeypatch.undo()
    written(tmp_path / "a.parquet", pa.table({"id": ["a"], "image": [png(1)]}))
    with pytest.raises(ImageError, match="#2: its table has 1 rows now; list its images again"):
        source.open(2)
    written(tmp_path / "a.parquet", pa.table({"path": ["a", "b"]}))
    with pytest.raises(ImageError, match="#1: its table holds no pictures now; list its images"):
        source.open(1)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ImageError, match=r"#1: a\.parquet does not exist"):
        source.open(1)


def test_one_row_does_not_read_its_table(tmp_path: Path, monkeypatch) -> None:
    """Of twenty groups of rows one is read."""
    noise = np.random.default_rng(0).bytes(100_000)
    rows = {"id": list(range(200)), "image": [noise[n:] + bytes([n]) for n in range(200)]}
    path = written(
        tmp_path / "a.parquet", pa.table(rows), row_group_size=10, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    read = [0]

    class File(io.FileIO):
        def read(self, n: int = -1) -> bytes:
            data = super().read(n)
            read[0] += len(data)
            return data

    with File(path) as opened:
        monkeypatch.setattr(tables, "_source", lambda file: opened)
        assert tables.open_table(str(path)).cell(123) == rows["image"][123]
    assert path.stat().st_size > 19_000_000
    assert read[0] < 3_000_000


@settings(max_examples=40)
@given(st.sampled_from(["a.parquet", "a.arrow", "a.feather"]), st.data())
def test_changed_bytes_are_refused_or_harmless(tmp_path_factory, name: str, data) -> None:
    path = tmp_path_factory.mktemp("t") / name
    whole = bytearray(written(path, pa.table(ROWS)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(whole)
    with suppress(InputError):
        source = find_images(path)
        for place in range(len(source)):
            with suppress(ImageError):
                source.open(place)


def test_offsets_that_lead_out_of_a_table_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.arrow", pa.table({"id": ["a", "b"], "image": [b"abc", b"x" * 99]}))
    before, after = (np.array(ends, np.int32).tobytes() for ends in ([3, 102], [3, 1 << 30]))
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(
        ImageError, match=r"a\.arrow#1: cannot be read .*a\.arrow: cannot be read as"
    ):
        find_images(path).open(1)


def test_an_extra_that_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    written(tmp_path / "a.parquet", pa.table(ROWS))
    (tmp_path / "a.lance").mkdir()
    for module, file, extra in (
        ("pyarrow.parquet", "a.parquet", "parquet"),
        ("lance", "a.lance", "lance"),
    ):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(InputError, match=rf'pip install "embedcam\[{extra}\]"'):
            find_images(tmp_path / file)


class Rows:
    """What can be iterated again and again, and has no length."""

    def __init__(self, rows) -> None:
        self.rows, self.passes, self.given = rows, 0, 0

    def __iter__(self):
        self.passes += 1
        for row in self.rows:
            self.given += 1
            yield row


def test_a_stream_is_read_once_a_pass() -> None:
    rows = [{"__key__": f"k{n}", "jpg": png(n), "cls": str(n % 2).encode()} for n in range(200)]
    stream = Rows(rows)
    source = from_dataset(stream)
    assert (source.ids[:2], source.labels[:2]) == (["k0", "k1"], ["0", "1"])
    assert (stream.passes, stream.given) == (1, 200)
    preprocess = Preprocess((4, 4), mean=(0, 0, 0), std=(1, 1, 1))
    for passes in (2, 3):
        batches = list(load_batches(source, range(200), preprocess, 8, workers=4))
        seen = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
        np.testing.assert_allclose(seen * 255, np.arange(200), atol=1e-3)
        assert (stream.passes, stream.given) == (passes, passes * 200)
    assert [int(np.asarray(source.open(place))[0, 0, 0]) for place in (9, 3, 7)] == [9, 3, 7]
    assert stream.passes == 4  # rows just passed are kept
    assert from_dataset(stream, labels="none").labels == [None] * 200


def test_a_streamed_data_set_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [{"bytes": png(v), "path": None} for v in (5, 6)], "label": [1, 0]}
    stream = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    source = from_dataset(stream)
    assert (source.ids, source.labels) == ([digest(5), digest(6)], ["dog", "cat"])
    assert grays(source) == [5, 6]


@pytest.mark.parametrize(
    ("stream", "options", "message"),
    [
        (iter([1]), {}, "is read once alone; give what can be iterated again"),
        (Rows([]), {}, "Rows: is empty; give a data set with rows"),
        (Rows([{"jpg": 3}]), {}, "row 0 of the data set has no id, and ids are no positions"),
        (Rows([(png(1), 2)]), {}, "row 0 of the data set has no id"),
        (Rows([{"id": 1, "jpg": png(1)}]), {"ids": ["a"]}, "ids= or labels= are given; put them"),
    ],
)
def test_streams_that_cannot_be_used(stream, options, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        from_dataset(stream, **options)


def test_a_stream_in_another_order_is_refused() -> None:
    stream = Rows([{"id": n, "jpg": png(n)} for n in range(4)])
    source = from_dataset(stream)
    stream.rows = stream.rows[::-1]
    with pytest.raises(InputError, match="gave '0' as row 0 before, and something else now"):
        source.open(1)
    with pytest.raises(InputError, match="a stream is read whole"):
        source.only([1])
