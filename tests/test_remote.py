"""Pictures at addresses: memory:// and a local S3 server; listed, built, kept within bounds."""

import io
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from build_samples import DENSE, built, everything, pictures, toy
from input_samples import grays, labelled, png, shard
from PIL import Image
from service_client import ask

from embedcam import Explainer, add_images, build_index
from embedcam.errors import ImageError, InputError
from embedcam.images import ImageSource, find_images, is_collection, load_source, remote
from embedcam.index import Index
from embedcam.offline import indexed_images

MEMORY = "memory://bucket"


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)
    system.store.clear()


def put(system: fsspec.AbstractFileSystem, folder: Path, to: str) -> str:
    """Copy a folder into a store."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            system.pipe_file(f"{to}/{file.relative_to(folder)}", file.read_bytes())
    return to


def test_a_folder_in_a_store(store, tmp_path: Path) -> None:
    local = pictures(tmp_path / "p")
    (tmp_path / "p/c0/notes.txt").write_text("x")
    (tmp_path / "p/.hidden").mkdir()
    (tmp_path / "p/.hidden/a.png").write_bytes(b"x")
    put(store, tmp_path / "p", MEMORY)
    for address in (MEMORY, f"{MEMORY}/"):
        source = find_images(address)
        assert list(source.items) == list(local.items)
        assert source.root == MEMORY
        assert str(source.left_out) == "1 .txt, 1 hidden"
        assert source.name(1) == f"{MEMORY}/{local.items[1].path}"
        np.testing.assert_array_equal(source.open(5), local.open(5))
    before = source.fingerprints()
    source.save(tmp_path / "job")
    loaded = load_source(tmp_path / "job")
    assert (loaded.root, loaded.fingerprints()) == (MEMORY, before)
    mark = source.mark(0)
    assert mark.any()
    assert source.state(0, mark) == "same"
    store.pipe_file(f"{MEMORY}/{local.items[0].path}", png(7))
    again = find_images(MEMORY)
    assert (again.state(0, mark), again.state(1, source.mark(1))) == ("changed", "same")
    assert find_images(MEMORY, exclude="c0").ids == local.ids[4:]


def test_shards_tables_and_lists_in_a_store(store, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shard(tmp_path / "s/0.tar", labelled({"a": (1, "x"), "b": (2, "y")}))
    shard(tmp_path / "s/1.tar", labelled({"c": (3, "x")}))
    rows = {"id": list("abc"), "image": [png(value) for value in (1, 2, 3)], "label": list("xyx")}
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "t/0.parquet", row_group_size=2)
    with (
        pa.OSFile(str(tmp_path / "0.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.table(rows).schema) as writer,
    ):
        writer.write_table(pa.table(rows))
    (tmp_path / "list.csv").write_text(
        f"path,label,id\n/p/1.png,x,a\np/2.png,y,b\n{MEMORY}/p/3.png,x,c\n"
    )
    put(store, tmp_path, MEMORY)
    for value in (1, 2, 3):
        store.pipe_file(f"{MEMORY}/p/{value}.png", png(value))
    for address in ("s", "s/*.tar", "s/{0,1}.tar", "t", "t/0.parquet", "0.arrow", "list.csv"):
        assert is_collection(f"{MEMORY}/{address}")
        source = find_images(f"{MEMORY}/{address}")
        assert (source.ids, source.labels) == (["a", "b", "c"], ["x", "y", "x"]), address
        assert grays(source) == [1, 2, 3]
        assert "unreadable" not in source.fingerprints()[:]
    # A list elsewhere names no file of this machine.
    assert source.items.paths[:1] == ["p/1.png"]
    store.pipe_file(f"{MEMORY}/list.csv", b"path,label\n/etc/hostname.png,x\n")
    with pytest.raises(ImageError, match=r"^memory://bucket/etc/hostname\.png: .*does not exist"):
        find_images(f"{MEMORY}/list.csv").open(0)


def test_the_same_index_from_every_kind_of_input(store, tmp_path: Path, quick) -> None:
    """Where ids and labels are equal, all but the paths, marks and the manifest is."""
    local = pictures(tmp_path / "p")
    (tmp_path / "own.csv").write_text(
        "path,label,id\n"
        + "".join(
            f"p/{one.path},{one.label},{one.id.removesuffix('.png')}\n" for one in local.items
        )
    )
    members = [(f"{one.path}", (tmp_path / "p" / one.path).read_bytes()) for one in local.items]
    shard(tmp_path / "s/0.tar", members[:5])
    shard(tmp_path / "s/1.tar", members[5:])
    put(store, tmp_path / "s", MEMORY)
    apart = re.compile(r"paths\.|marks\.|manifest\.json")

    def arrays(source: ImageSource, name: str) -> dict[str, str]:
        path = built(source, toy(), tmp_path / name)
        return {file: sum for file, sum in everything(path).items() if not apart.search(file)}

    expected = arrays(find_images(tmp_path / "own.csv"), "csv")
    assert len(expected) > 10
    assert arrays(find_images(tmp_path / "s"), "tars") == expected
    assert arrays(find_images(MEMORY), "remote") == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "memory://nowhere",
            "memory://nowhere: does not exist; give a folder of images, or a file",
        ),
        ("file:///etc", "file:///etc: is no address that is read; known: s3://, gs://, https://"),
        ("memory://a::file:///etc", "is no address that is read"),
        ("gs://bucket", r"gs://bucket: is an address, which fsspec reads (Please install gcsfs"),
    ],
)
def test_addresses_that_cannot_be_used(store, address: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        find_images(address)


def test_one_wrong_address_of_a_list_is_an_image_that_cannot_be_read(store, tmp_path: Path) -> None:
    put(store, pictures(tmp_path / "p", 3).root, MEMORY)
    names = [f"{MEMORY}/c0/000.png", "file:///etc/hostname", "s3://a::b/c.png"]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{name},x\n" for name in names))
    source = find_images(tmp_path / "l.csv")
    assert list(source.fingerprints())[1:] == ["unreadable"] * 2
    assert source.open(0).size == (24, 24)
    for position in (1, 2):
        message = f"{names[position]}: is no address that is read; known: s3://"
        with pytest.raises(ImageError, match=re.escape(message)) as caught:
            source.open(position)
        assert source.refused(position) == str(caught.value)


def test_what_a_store_gives_is_bounded(store, monkeypatch) -> None:
    store.pipe_file(f"{MEMORY}/a.png", png(1))
    source = find_images(MEMORY)
    monkeypatch.setattr(remote, "MAX_BYTES", 10)
    asked = []
    monkeypatch.setattr(type(store), "cat_file", lambda *given, **more: asked.append(given))
    with pytest.raises(ImageError, match=r"memory://bucket/a.png: has \d+ bytes, and of one pict"):
        source.open(0)
    assert not asked
    monkeypatch.undo()
    store.rm(f"{MEMORY}/a.png")
    with pytest.raises(ImageError, match=r"memory://bucket/a\.png: does not exist"):
        source.open(0)


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionError("gone"), KeyError("x")])
def test_a_store_s_failures_are_sentences(store, monkeypatch, error: Exception) -> None:
    store.pipe_file(f"{MEMORY}/a.png", png(1))
    source = find_images(MEMORY)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(store), "cat_file", fail)
    said = rf"^memory://bucket/a\.png: cannot be read \({type(error).__name__}: "
    with pytest.raises(ImageError, match=said):
        source.open(0)


def answered(service, path: Path, images: str | None, target: str = "/items/c0%2F003.png/image"):
    with Explainer(path, toy().network, images=images) as explainer:
        return ask(service(explainer), "GET", target)


def test_a_service_reads_addresses_that_were_named(store, service, tmp_path: Path, quick) -> None:
    local = pictures(tmp_path / "p")
    put(store, tmp_path / "p", MEMORY)
    path = built(find_images(MEMORY), toy(), tmp_path / "i", DENSE)
    with Index.open(path) as index:
        assert index.manifest.images_root == MEMORY
        assert list(index.paths) == list(local.ids)
        with pytest.raises(InputError, match="the index names pictures at memory://bucket, and"):
            indexed_images(index)
        assert indexed_images(index, MEMORY).open(3).size == local.open(3).size
    assert answered(service, path, None).status == 404
    assert answered(service, path, "memory://elsewhere").status == 404
    named = answered(service, path, MEMORY)
    assert named.status == 200
    with Image.open(io.BytesIO(named.body)) as picture:
        assert picture.size == local.open(3).size
    examples = answered(service, path, MEMORY, "/examples").json()["items"]
    assert len(examples) == 6
    assert answered(service, path, None, "/examples").json()["items"] == []
    # Moved: the same names lie below another root.
    put(store, tmp_path / "p", "memory://moved")
    assert answered(service, path, "memory://moved").status == 200
    with Explainer(path, toy().network, images=MEMORY) as explainer:
        why = explainer.explain(local.open(3))
        assert [tile.image is not None for tile in why.tiles()[1]] == [True] * 5
        assert (why.not_found(), why.changed()) == ([], [])
    with Explainer(path, toy().network) as explainer:
        why = explainer.explain(local.open(3))
        assert [tile.image is not None for tile in why.tiles()[1]] == [False] * 5
        assert len(why.not_found()) == 5


def test_a_stranger_s_index_makes_a_service_read_no_address(
    store, service, tmp_path: Path, quick, monkeypatch, caplog
) -> None:
    """Neither by its paths nor by its root, whatever folder was named."""
    local = pictures(tmp_path / "p")
    items = [type(one)(one.id, f"{MEMORY}/{one.path}", one.label) for one in local.items]
    put(store, tmp_path / "p", MEMORY)
    path = built(ImageSource(items, tmp_path / "p"), toy(), tmp_path / "i", DENSE)
    read = []
    monkeypatch.setattr(remote, "filesystem", lambda address: read.append(address))
    caplog.set_level(logging.CRITICAL)
    for images in (None, str(tmp_path / "p"), "memory://else", "memory://bucket/c9"):
        assert answered(service, path, images).status == 404
        assert answered(service, path, images, "/examples").json()["items"] == []
        answered(service, path, images, "/items/c0%2F003.png/cam")
    assert not read


def test_a_service_shows_members_and_rows(service, tmp_path: Path, quick) -> None:
    local = pictures(tmp_path / "p")
    members = [(f"{one.path}", (tmp_path / "p" / one.path).read_bytes()) for one in local.items]
    shard(tmp_path / "s/0.tar", members)
    path = built(find_images(tmp_path / "s"), toy(), tmp_path / "i", DENSE)
    target = "/items/c0%2F003/image"
    for images in (None, str(tmp_path / "s")):
        reply = answered(service, path, images, target)
        assert reply.status == 200
    assert answered(service, path, str(tmp_path / "p"), target).status == 404
    tag = {"if-none-match": reply.headers["etag"]}
    with Explainer(path, toy().network) as explainer:
        app = service(explainer)
        assert ask(app, "GET", target, **tag).status in (200, 304)
        assert explainer.file_state("c0/003") == "same"
        assert explainer.picture_file("c0/003") is None
        assert explainer.picture_place("c0/003").startswith(f"{tmp_path}/s/0.tar?c0/003.png@")
    (tmp_path / "s/0.tar").unlink()
    assert answered(service, path, None, target).status == 404


def test_additions_and_updates_from_a_store(store, tmp_path: Path, quick) -> None:
    pictures(tmp_path / "p")
    put(store, tmp_path / "p", MEMORY)
    path = built(find_images(MEMORY), toy(), tmp_path / "i", DENSE)
    store.rm(f"{MEMORY}/c0/000.png")
    store.pipe_file(f"{MEMORY}/c0/003.png", (tmp_path / "p/c1/004.png").read_bytes())
    store.pipe_file(f"{MEMORY}/c0/100.png", (tmp_path / "p/c1/001.png").read_bytes())
    report = add_images(find_images(MEMORY), toy().network, path, update=True, progress=False)
    changes = report.changes
    assert changes is not None
    assert (changes.new, changes.changed, changes.vanished) == (
        ["c0/100.png"], ["c0/003.png"], ["c0/000.png"],
    )  # fmt: skip
    # From a folder of this machine: its paths are absolute.
    (tmp_path / "q/c0").mkdir(parents=True)
    (tmp_path / "q/c0/200.png").write_bytes((tmp_path / "p/c1/001.png").read_bytes())
    add_images(find_images(tmp_path / "q"), toy().network, path, progress=False)
    with Index.open(path) as index:
        (row,) = index.select([index.position("c0/200.png")]).paths
        assert row == str((tmp_path / "q/c0/200.png").resolve())


class Answers(BaseHTTPRequestHandler):
    """A server of one file, at /a.png with its length, at /b.png without; ranges as it likes."""

    data, ranges, at_once, pause = b"", True, 1 << 30, 0.0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        data = self.data
        if span and self.ranges:
            data = data[int(span[1]) : int(span[2] or len(data)) + 1]
        self.send_response(206 if span and self.ranges else 200)
        if self.path != "/b.png":
            self.send_header("Content-Length", str(len(data)))
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
            if span:
                said = f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{len(self.data)}"
                self.send_header("Content-Range", said)
        self.end_headers()
        if self.command == "GET":
            for start in range(0, len(data), self.at_once):
                self.wfile.write(data[start : start + self.at_once])
                time.sleep(self.pause)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_web_server_is_read_within_bounds(web: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"path,label\n{web}/a.png,x\n{web}/b.png,y\n")
    source = find_images(path)
    monkeypatch.setattr(Answers, "data", png(9))
    assert grays(source) == [9, 9]
    with monkeypatch.context() as slow:  # a picture that arrives in parts
        slow.setattr(Answers, "at_once", len(png(9)) // 2)
        slow.setattr(Answers, "pause", 0.05)
        assert grays(source) == [9, 9]
    monkeypatch.setattr(remote, "MAX_BYTES", 40)
    for place, name in enumerate("ab"):
        with pytest.raises(ImageError, match=rf"^{web}/{name}\.png: has \d+ bytes, and of one"):
            source.open(place)
    monkeypatch.setattr(remote, "MAX_BYTES", 1 << 20)
    members = shard(tmp_path / "0.tar", labelled({"a": (1, "x"), "b": (2, "y")}))
    monkeypatch.setattr(Answers, "data", members.read_bytes())
    shards = find_images(f"{web}/0.tar")
    assert grays(shards) == [1, 2]
    monkeypatch.setattr(Answers, "ranges", False)
    with pytest.raises(ImageError, match=rf"^{web}/0\.tar\?b\.png: .*support range requests"):
        shards.open(1)


def test_a_build_asks_a_web_server_twice_for_a_picture(
    web: str, tmp_path: Path, monkeypatch, quick
) -> None:
    asked = Counter[tuple[str, str]]()

    def answer(handler: Answers) -> None:
        asked[handler.command, handler.path] += 1
        handler.data = (tmp_path / "p" / handler.path[1:]).read_bytes()
        get(handler)

    get = Answers.do_GET
    monkeypatch.setattr(Answers, "do_GET", answer)
    local = pictures(tmp_path / "p")
    lines = [f"{web}/{one.path},{one.label}" for one in local.items]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    source = find_images(tmp_path / "list.csv")
    build_index(source, toy().network, tmp_path / "i", DENSE, progress=False)
    assert asked == {(how, f"/{one.path}"): 1 for how in ("HEAD", "GET") for one in local.items}
    build_index(local, toy().network, tmp_path / "here", DENSE, progress=False)
    with Index.open(tmp_path / "i") as index, Index.open(tmp_path / "here") as here:
        weights = (one.weights(one.live_positions()) for one in (index, here))
        np.testing.assert_array_equal(*weights)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server of its own, and the settings by which s3fs finds it."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir("pictures")
        yield "s3://pictures"
    running.stop()


def test_an_index_from_s3(s3: str, service, tmp_path: Path, quick) -> None:
    local = pictures(tmp_path / "p")
    system = fsspec.filesystem("s3", use_listings_cache=False)
    put(system, tmp_path / "p", f"{s3}/p")
    members = [(f"{one.path}", (tmp_path / "p" / one.path).read_bytes()) for one in local.items]
    shard(tmp_path / "s/0.tar", members[:7])
    shard(tmp_path / "s/1.tar", members[7:])
    put(system, tmp_path / "s", f"{s3}/s")
    source = find_images(f"{s3}/p")
    assert list(source.items) == list(local.items)
    assert len(set(source.fingerprints())) == 12
    for address in (f"{s3}/s", f"{s3}/s/*.tar"):
        shards = find_images(address)
        assert list(shards.ids) == [name.removesuffix(".png") for name in local.ids]
        for place in (0, 11):
            np.testing.assert_array_equal(shards.open(place), local.open(place))
    path = tmp_path / "i"
    build_index(source, toy().network, path, DENSE, workers=4, progress=False)
    assert answered(service, path, None).status == 404
    assert answered(service, path, f"{s3}/p").status == 200
    with pytest.raises(InputError, match=r"s3://pictures/nothing: does not exist"):
        find_images(f"{s3}/nothing")
    with pytest.raises(InputError, match=r"s3://none-such/a\.csv: does not exist"):
        find_images("s3://none-such/a.csv")
