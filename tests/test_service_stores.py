"""A service over a store answers what one over the index does, and says what its store lacks."""

import asyncio
import base64
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from build_samples import dense, quicken
from service_client import ask, data_of, picture, post, send
from store_samples import Sample, sample

from embedcam import Explainer, build_index, find_images
from embedcam.errors import InputError, StoreError
from embedcam.index import Index
from embedcam.index.model import write_model
from embedcam.index.row_batches import row_batches
from embedcam.service import Limits
from embedcam.stores import Table, copy_rows, open_store

QUERY = data_of(picture(3))
OTHER = "f" * 16
PNG = {"content-type": "image/png"}


class Held:
    """A store that is an index; `change` may fail, wait, or answer something else."""

    def __init__(self, index: Index, generation: str | None = None) -> None:
        self.index, self.change, self.asked = index, _as_it_is, list[str]()
        rows = [row for batch in row_batches(index) for row in batch.rows.to_pylist()]
        if generation is not None:
            rows = [{**row, "generation": generation} for row in rows]
        self.rows = {row["id"]: row for row in rows}

    def search(self, embedding: np.ndarray, n: int) -> Any:
        self.asked.append("search")
        near = self.index.ids[self.index.search(embedding[None], n).positions[0]]
        return self.change([self.rows[name] for name in near if name in self.rows])

    def fetch(self, ids: Sequence[str]) -> Any:
        self.asked.append("fetch")
        return self.change([self.rows[name] for name in ids if name in self.rows])

    def generations(self) -> dict[str, int]:
        return {self.index.generation: len(self.change([*self.rows.values()]))}


def _as_it_is(rows: Any) -> Any:
    return rows


def failing(error: Exception) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    return sample(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def index(of):
    with Index.open(of.index) as opened:
        yield opened


@pytest.fixture
def store(index):
    return Held(index)


def stored(of, store):
    return Explainer.from_model(of.model, of.network, store=store)


@pytest.fixture
def app(of, store, service):
    made = service(stored(of, store))
    made.state.pipeline.ready = True
    return made


def lines(app, name: str) -> dict[str, float]:
    """What the metrics say of a name, by labels."""
    text = ask(app, "GET", "/metrics").body.decode()
    found = (line.rpartition(" ") for line in text.splitlines() if line.startswith(f"{name}{{"))
    return {labels.partition("{")[2].rstrip("}"): float(value) for labels, _, value in found}


def asked_of(index) -> dict[str, tuple[str, str]]:
    """Requests of all kinds about a picture, and the type that is accepted."""
    one, two, three = index.ids[[3, 17, 40]]
    far = index.ids[index.search(np.eye(1, index.width, dtype=np.float32), 48).positions[0]][-1]
    named = {name: urlencode(values, doseq=True) for name, values in {
        "two": {"result": one, "rival": far}, "three": {"result": [one, two, three]},
        "pair": {"result": two, "rival": far, "lines": 3}, "cell": {"result": one, "cell": "1,2"},
    }.items()}  # fmt: skip
    return {
        "explain": ("/explain", "*/*"),
        "many": ("/explain?n_neighbors=20&map_size=16", "*/*"),
        "two": ("/explain?n_neighbors=2&signed=true", "*/*"),
        "result": (f"/explain?{urlencode({'result': far})}", "*/*"),
        "rival": (f"/explain?{named['two']}", "*/*"),
        "finer": ("/explain?detail=2&map_size=28", "*/*"),
        "drawn": ("/explain?picture_size=30", "image/png"),
        "search": ("/search?n_neighbors=7", "*/*"),
        "receipts": (f"/compare?{named['three']}", "*/*"),
        "comparison": (f"/compare?{named['pair']}", "*/*"),
        "cell": (f"/compare?{named['cell']}", "*/*"),
        "receipt drawn": (f"/compare?{urlencode({'result': one})}", "image/webp"),
        "comparison drawn": (f"/compare?{named['pair']}", "image/png"),
    }


def test_what_it_answers_is_what_the_index_answers(of, index, store, service):
    # Pictures that go through the network together differ in their last digits.
    app, whole = (
        service(one, limits=Limits(batch=1))
        for one in (stored(of, store), Explainer(of.index, of.network))
    )
    for name, (target, accept) in asked_of(index).items():
        found, expected = (post(one, target, QUERY, accept=accept) for one in (app, whole))
        assert (name, found.status) == (name, 200)
        assert found.body == expected.body, name
    answer = post(app, "/explain", QUERY).json()
    assert 0 <= answer["trust_low"] <= answer["trust"] <= 1
    assert 0 <= answer["match"] <= 1
    for one in answer["neighbors"]:
        for target, accept in (
            (one["image_url"], "*/*"), (one["cam_url"], "*/*"), (one["cam_url"], "image/png"),
        ):  # fmt: skip
            found, expected = (ask(made, "GET", target, accept=accept) for made in (app, whole))
            assert (found.status, found.body) == (200, expected.body)
            tag = found.headers["etag"]
            assert ask(app, "GET", target, accept=accept, if_none_match=tag).status == 304
    counted = lines(app, "embedcam_store_seconds_count")
    assert counted['operation="search"'] == 9
    assert counted['operation="fetch"'] > 9


def test_another_row_of_an_id_is_another_answer(app, store):
    name, *_ = store.rows
    target = f"/items/{name}/cam"
    before = ask(app, "GET", target)
    store.rows[name] = {**store.rows[name], "codes": [*store.rows.values()][9]["codes"]}
    after = ask(app, "GET", target, if_none_match=before.headers["etag"])
    assert (after.status, after.json()["cam"] != before.json()["cam"]) == (200, True)


def test_match_of_few_rows_is_the_index_s_only_where_they_are_all(of, index, service):
    """Of a store that holds three images match is told, and of three of forty-eight it is not."""
    few = Held(index)
    few.rows = dict([*few.rows.items()][:3])
    few.search = lambda *_: [*few.rows.values()]  # type: ignore[method-assign]
    answer = post(service(stored(of, few)), "/explain", QUERY).json()
    assert len(answer["neighbors"]) == 3
    assert answer["match"] is not None


def test_examples_are_different_images_with_pictures(app, store):
    items = ask(app, "GET", "/examples?count=24").json()["items"]
    ids = [one["id"] for one in items]
    assert len(set(ids)) == 24
    assert set(ids) <= set(store.rows)
    for one in items:
        assert one["label"] == store.rows[one["id"]]["label"]
        assert ask(app, "GET", one["image_url"]).image().size == (24, 24)


def test_an_unknown_image(app):
    for target in ("/items/zebra/image", "/items/../../etc/passwd/cam"):
        assert ask(app, "GET", target).error == (404, "unknown_image")
    for target in (
        "/explain?result=zebra", "/compare?result=zebra", "/explain?result=c0%2F000.png&rival=zebra"
    ):  # fmt: skip
        assert post(app, target, QUERY).error == (404, "unknown_image")
    for target in (
        "/explain?rival=c0%2F000.png",
        "/compare?result=c0%2F000.png&rival=c0%2F000.png",
    ):
        assert post(app, target, QUERY).error[0] == 422


def test_ready_says_how_many_rows_of_which_generation(app, index):
    expected = {"status": "ready", "images": 48, "generation": 1, "digest": index.generation}
    expected["words"] = False  # the network has no tower for texts
    assert ask(app, "GET", "/readyz").json() == expected
    app.state.pipeline.ready = False
    assert ask(app, "GET", "/readyz").error == (503, "not_ready")


def test_a_store_of_two_functions_is_enough(of, index, service):
    whole = Held(index)

    class Two:
        search, fetch = whole.search, whole.fetch

    app = service(stored(of, Two()))
    app.state.pipeline.ready = True
    assert ask(app, "GET", "/readyz").json()["images"] is None
    assert post(app, "/explain", QUERY).status == 200


TROUBLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "gone": (failing(StoreError("postgresql://db.internal/shop: gone")), "store_unavailable"),
    "broken": (failing(RuntimeError("db.internal fell over")), "store_unavailable"),
    "empty": (lambda rows: rows[:0], "no_rows"),
    "of another generation": (
        lambda rows: [{**row, "generation": OTHER} for row in rows], "other_generation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLE)
def test_a_store_in_trouble_is_said_and_counted_and_comes_back(app, store, name, caplog):
    change, code = TROUBLE[name]
    store.change = change
    for target in ("/explain", "/search"):
        refused = post(app, target, QUERY)
        assert refused.error == (503, code)
        assert refused.headers["retry-after"] == "5"
        assert "internal" not in refused.message
    refused = ask(app, "GET", "/readyz")
    assert refused.error == (503, code)
    fetched = ask(app, "GET", "/items/c0/000.png/image").error
    assert fetched == ((404, "unknown_image") if code == "no_rows" else (503, code))
    asked = 3 if code == "no_rows" else 4
    assert lines(app, "embedcam_store_failures_total") == {f'reason="{code}"': asked}
    assert f"{code}: " in caplog.text
    assert ("db.internal" in caplog.text) == (code == "store_unavailable")
    store.change = _as_it_is
    assert post(app, "/explain", QUERY).status == 200
    app.state.pipeline._told = (-np.inf, None)  # a second has gone by
    assert ask(app, "GET", "/readyz").status == 200


def test_ready_asks_the_store_once_a_second(app, store):
    for _ in range(5):
        assert ask(app, "GET", "/readyz").status == 200
    assert store.asked == ["search"]


class Hanging:
    """What a store does that answers once it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def __call__(self, rows: Any) -> Any:
        self.begun.release()
        self.go.wait(60)
        return rows


@pytest.fixture
def hanging():
    made = Hanging()
    yield made
    made.go.set()


def test_a_store_that_does_not_answer_costs_its_own_request_alone(of, store, hanging, service):
    app = service(stored(of, store), limits=Limits(store_seconds=60))
    expected = post(app, "/explain", QUERY).body

    async def two():
        store.change = hanging
        first = asyncio.create_task(send(app, "POST", "/explain", QUERY, PNG))
        await asyncio.to_thread(hanging.begun.acquire)
        store.change = _as_it_is
        others = [await send(app, "POST", "/explain", QUERY, PNG) for _ in range(3)]
        assert not first.done()
        hanging.go.set()
        return [await first, *others]

    assert [one.body for one in asyncio.run(two())] == [expected] * 4


def test_a_store_that_is_late_is_not_waited_for(of, store, hanging, service):
    limits = Limits(store_seconds=0.05, concurrency=1)
    app = service(stored(of, store), limits=limits)
    app.state.pipeline.ready = True
    store.change = hanging
    for target in ("/explain", "/search"):
        refused = post(app, target, QUERY)
        assert refused.error == (503, "store_slow")
        assert refused.headers["retry-after"] == "5"
    # Two threads wait for it, as many as may: it is asked no more.
    assert ask(app, "GET", "/items/c0/000.png/image").error == (503, "store_slow")
    assert ask(app, "GET", "/readyz").error == (503, "store_slow")
    assert store.asked == ["search", "search"]
    assert lines(app, "embedcam_store_failures_total") == {'reason="store_slow"': 4}
    store.change = _as_it_is
    hanging.go.set()
    free = app.state.pipeline._free
    for _ in range(2):
        assert free.acquire(timeout=60)
    free.release(2)
    assert post(app, "/search", QUERY).status == 200


def test_it_begins_beside_a_store_that_is_gone(of, store, service):
    app = service(stored(of, store))
    store.change = failing(StoreError("photos.lance: gone"))

    async def life():
        async with app.router.lifespan_context(app):
            while not app.state.pipeline.ready:
                await asyncio.sleep(0.01)
            within = await send(app, "GET", "/readyz")
            store.change = _as_it_is
            app.state.pipeline._told = (-np.inf, None)
            return within, await send(app, "GET", "/readyz")

    gone, back = asyncio.run(life())
    assert (gone.error, back.status) == ((503, "store_unavailable"), 200)


def _with(**values: Any) -> Callable[[Any], Any]:
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "short codes": _with(codes=b"\1\2"),
    "no codes": _with(codes=None),
    "codes of numbers": _with(codes=[1, 2]),
    "a NaN": _with(embedding=[float("nan")] * 5),
    "too few numbers": _with(embedding=[1.0]),
    "a negative scale": _with(scale=-1.0),
    "an endless scale": _with(scale=float("inf")),
    "an id that is a list": _with(id=[]),
    "a label of a million": _with(label="x" * 10**6),
    "a label that a terminal would obey": _with(label="\x1b[2J"),
    "one of another generation": _with(generation=OTHER),
    "one twice": lambda rows: [rows[0], *rows],
    "no mapping": lambda rows: [rows[0], "row"],
    "a word": lambda rows: "rows",
    "nothing": lambda rows: None,
    "twenty thousand": lambda rows: [rows[0]] * 20_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_rows_that_cannot_be_read_are_said(app, store, name, caplog):
    store.change = HOSTILE[name]
    for found in (
        post(app, "/explain", QUERY),
        post(app, "/search", QUERY),
        ask(app, "GET", "/items/c0/000.png/cam"),
    ):
        if name == "one of another generation" and found.error[0] == 503:
            assert found.error[1] == "other_generation"  # it was the only one
            continue
        assert found.error == (502, "unusable_rows")
        assert "c0" not in found.message
    assert "unusable_rows: " in caplog.text


def test_odd_rows_are_served(app, store):
    """Codes as text, a label of another language, and columns that nobody asked for."""
    before = post(app, "/explain", QUERY).json()
    store.change = lambda rows: [
        {
            **row,
            "codes": base64.b64encode(row["codes"]).decode(),
            "label": "café",
            "more": object(),
        }
        for row in rows
    ]
    after = post(app, "/explain", QUERY).json()
    assert after["cam"] == before["cam"]
    assert {one["label"] for one in after["neighbors"]} == {"café"}


def test_no_picture_is_read_beside_those_of_the_root(of, store, tmp_path, service):
    """Rows are written by whoever may write to the store; they say where pictures lie."""
    secret = tmp_path / "secret.png"
    picture(1).save(secret)
    photos = of.index.parent / "photos"
    explainer = Explainer.from_model(of.model, of.network, store=store, images=photos)
    app = service(explainer)
    target = "/items/c0/000.png/image"
    assert ask(app, "GET", target).status == 200
    for path in (str(secret), f"../../{secret.name}", "http://127.0.0.1:9/secret.png"):
        store.rows["c0/000.png"]["path"] = path
        assert ask(app, "GET", target).error == (404, "no_picture")


@pytest.fixture(scope="module")
def second(tmp_path_factory, of):
    """The same network and pictures, built again otherwise."""
    folder = tmp_path_factory.mktemp("second")
    source = find_images(of.index.parent / "photos", labels="folders")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        build_index(source, of.network, folder / "index", dense(), progress=False)
    with Index.open(folder / "index") as opened:
        model = write_model(opened, folder / "model.embedcam")
    return Sample(folder / "index", model, of.network)


@pytest.fixture
def other(second):
    with Index.open(second.index) as opened:
        yield Held(opened)


def test_a_model_of_another_generation_is_served_once_its_rows_are_there(
    of, second, other, store, hanging, service
):
    at, rows, closed = of, other, list[Any]()
    rows.close = lambda: closed.append(rows)  # type: ignore[attr-defined]
    store.close = lambda: closed.append(store)
    rows.change = lambda found: found[:0]

    def renew() -> Explainer:
        return stored(at, store if at is of else rows)

    app = service(stored(of, store), renew=renew, limits=Limits(store_seconds=60, seconds=60))
    pipeline = app.state.pipeline
    assert pipeline.reload() is False
    closed.clear()
    at = second
    before = post(app, "/explain", QUERY).json()
    with pytest.raises(InputError, match="holds no row of the generation"):
        pipeline.reload()
    assert closed == [rows]
    assert post(app, "/explain", QUERY).json() == before
    rows.change = _as_it_is

    async def replaced():
        store.change = hanging
        first = asyncio.create_task(send(app, "POST", "/explain", QUERY, PNG))
        await asyncio.to_thread(hanging.begun.acquire)
        assert await asyncio.to_thread(pipeline.reload)
        after = await send(app, "POST", "/explain", QUERY, PNG)
        hanging.go.set()
        return (await first).json(), after.json()

    first, after = asyncio.run(replaced())
    assert first == before  # as it began
    whole = service(Explainer(second.index, second.network))
    assert after == post(whole, "/explain", QUERY).json() != before
    assert store not in closed


def check_real(of, index, url, service) -> Any:
    """Write the rows, hold every answer beside the index's, and return the service."""
    with closing(open_store(url, Table.of(index, "full"))) as written:
        copy_rows(index, written)
    opened = open_store(url, Table.of(index), seconds=20)
    limits = Limits(batch=1, store_seconds=20)
    whole = service(Explainer(of.index, of.network), limits=limits)
    app = service(stored(of, opened), limits=limits)
    app.state.pipeline.ready = True
    for name, (target, accept) in asked_of(index).items():
        found, expected = (post(one, target, QUERY, accept=accept) for one in (app, whole))
        assert found.body == expected.body, name
    assert ask(app, "GET", "/readyz").json()["images"] == 48
    assert len(ask(app, "GET", "/examples").json()["items"]) == 6
    return app


def test_it_is_served_from_lance(of, index, tmp_path, service):
    pytest.importorskip("lancedb")
    app = check_real(of, index, f"lance:{tmp_path}/rows", service)
    app.state.pipeline.explainer.store.close()


def test_it_is_served_from_postgresql_which_goes_and_comes_back(
    of, index, postgres, database, service
):
    app = check_real(of, index, database, service)
    postgres.stop()
    refused = post(app, "/explain", QUERY)
    assert refused.error == (503, "store_unavailable")
    assert str(postgres.folder) not in refused.message
    postgres.start()
    assert post(app, "/explain", QUERY).status == 200
    app.state.pipeline.explainer.store.close()
