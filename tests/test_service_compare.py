"""Receipts over HTTP are the Python API's, and what cannot be compared is refused."""

import json
import os
import time
import weakref
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from build_samples import pictures, quicken, toy
from PIL import Image
from rounding import assert_same_picture
from service_client import ask, built, data_of, explainer, form, picture, post

from embedcam import EmbeddingNetwork, Explainer, build_index
from embedcam.errors import InputError
from embedcam.export import export_onnx
from embedcam.pairs import PairExplainer, make_receipt
from embedcam.service import Limits, compare, create_app
from embedcam.service.compare import rounded
from embedcam.service.schemas import CompareAnswer

QUERY = data_of(picture(3))
IDS = ["c0/000.png", "c1/004.png", "c2/011.png"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Behind a head whose receipts are of first order."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        folder = tmp_path_factory.mktemp("other")
        build_index(pictures(folder / "photos"), toy("other").network, folder / "i", progress=False)
    made = create_app(Explainer(folder / "i", toy("other").network))
    yield made, folder / "i"
    made.state.pipeline.close()


def target(*results, **others):
    named = [("result", name) for name in results] + list(others.items())
    return "/compare?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in named)


def expected(index, *ids):
    return PairExplainer(explainer(index)).receipts(QUERY, list(ids))


def assert_is(found, receipt):
    """The JSON of one receipt, number by number."""
    shown = receipt.to_dict()
    assert (found["id"], found["label"]) == (shown["result"]["id"], shown["result"]["label"])
    assert found["extent"] == shown["result"]["extent"]
    assert found["exact"] == shown["exact"]
    for name in ("similarity", "shared", "remainder", "other_channels"):
        assert found[name] == pytest.approx(shown[name], abs=1e-6)
    for name in ("query", "result"):
        for part in ("cells", "shared", "remainder"):
            np.testing.assert_allclose(found[name][part], shown[name][part], atol=1e-6)
    assert [one["channel"] for one in found["channels"]] == [
        one["channel"] for one in shown["channels"]
    ]
    assert [(one["query"], one["result"]) for one in found["links"]] == [
        (one["query"], one["result"]) for one in shown["links"]
    ]


# --- what is answered ---


def test_receipts_are_the_python_api_s(app, index):
    found = post(app, target(*IDS), QUERY)
    assert found.status == 200
    body = found.json()
    CompareAnswer.model_validate(body)
    assert body["picture"] == {"width": 40, "height": 30}
    assert body["extent"] == [0, 0, 40, 30]
    assert body["contrast"] is None
    assert [one["id"] for one in body["receipts"]] == IDS
    for one, receipt in zip(body["receipts"], expected(index, *IDS), strict=True):
        assert_is(one, receipt)
        assert one["picture"] == {"width": 24, "height": 24}
        assert one["point"] is None
        np.testing.assert_allclose(one["pairs"], receipt.matrix().reshape(16, 16), rtol=6e-4)


def test_what_is_shown_adds_up(app):
    (one,) = post(app, target(IDS[1]), QUERY).json()["receipts"]
    channels = sum(line["contribution"] for line in one["channels"]) + one["other_channels"]
    total = one["shared"] + channels + one["remainder"]
    assert total == pytest.approx(one["similarity"], abs=1e-5)
    for side in (one["query"], one["result"]):
        total = np.sum(side["cells"]) + side["shared"] + side["remainder"]
        assert total == pytest.approx(one["similarity"], abs=1e-5)


def test_as_many_lines_and_links_as_asked(app):
    (one,) = post(app, target(IDS[1], lines=3, links=0), QUERY).json()["receipts"]
    assert (len(one["channels"]), one["links"]) == (3, [])


def test_the_similarity_is_the_search_s(app):
    near = post(app, "/explain?n_neighbors=3", QUERY).json()["neighbors"]
    body = post(app, target(*(one["id"] for one in near)), QUERY).json()
    for one, receipt in zip(near, body["receipts"], strict=True):
        assert receipt["similarity"] == pytest.approx(one["similarity"], abs=1e-5)


def test_a_rival(app, index):
    body = post(app, target(IDS[0], rival=IDS[2]), QUERY).json()
    CompareAnswer.model_validate(body)
    made = PairExplainer(explainer(index)).above(QUERY, IDS[0], IDS[2])
    for one, receipt in zip(body["receipts"], (made.result, made.rival), strict=True):
        assert_is(one, receipt)
    contrast, shown = body["contrast"], made.to_dict()
    assert contrast["score"] == pytest.approx(made.score, abs=1e-6)
    assert contrast["exact"] is True
    np.testing.assert_allclose(contrast["query"], made.query.cells, atol=1e-6)
    assert contrast["channels"] == shown["channels"]
    lines = sum(one["contribution"] for one in contrast["channels"])
    total = lines + contrast["other_channels"] + contrast["remainder"]
    assert total == pytest.approx(contrast["score"], abs=1e-5)


@pytest.mark.parametrize("of", ["query", "result"])
def test_a_point(app, index, of):
    body = post(app, target(*IDS[:2], cell="1,2", of=of), QUERY).json()
    for one, receipt in zip(body["receipts"], expected(index, *IDS[:2]), strict=True):
        np.testing.assert_allclose(one["point"], receipt.point(1, 2, of), rtol=6e-4)
        pairs = np.reshape(one["pairs"], (4, 4, 4, 4))
        same = pairs[1, 2] if of == "query" else pairs[:, :, 1, 2]
        np.testing.assert_allclose(one["point"], same, rtol=1e-5, atol=1e-8)


def test_a_receipt_of_first_order_has_points_and_no_pairs(other):
    app, index = other
    body = post(app, target(IDS[0], cell="3,0"), QUERY).json()
    CompareAnswer.model_validate(body)
    (one,) = body["receipts"]
    assert (one["exact"], one["pairs"]) == (False, None)
    made = PairExplainer(Explainer(index, toy("other").network)).receipt(QUERY, IDS[0])
    assert_is(one, made)
    np.testing.assert_allclose(one["point"], made.point(3, 0), rtol=6e-4)


def test_receipts_end_with_the_one_begun_when_time_is_up(other, monkeypatch, service):
    """A pass of the head takes long: what nobody waits for any more is not done."""
    why = Explainer(other[1], toy("other").network)
    app = service(why, limits=Limits(seconds=0.3))
    begun = []

    def slow(*given, **named):
        begun.append(given)
        time.sleep(0.2)
        return make_receipt(*given, **named)

    monkeypatch.setattr(compare, "make_receipt", slow)
    pipeline = app.state.pipeline
    try:
        assert post(app, target(*why.index.ids[:8]), QUERY).error == (503, "too_slow")
        pipeline.close()
        assert 1 <= len(begun) <= 2
    finally:
        pipeline.close()


def test_graphs_of_heads_do_not_pile_up(other, monkeypatch, service):
    """Of many results no more sides are held at once than go through the network together."""
    why = Explainer(other[1], toy("other").network)
    app = service(why, limits=Limits(batch=2))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    def counted(*given, **named):
        made = make_receipt(*given, **named)
        alive.update(made.sides)
        most.append(len(alive))
        return made

    monkeypatch.setattr(compare, "make_receipt", counted)
    body = post(app, target(*why.index.ids[:8]), QUERY).json()
    assert [one["id"] for one in body["receipts"]] == why.index.ids[:8]
    assert len(most) == 8
    assert max(most) <= 1 + 2 + 2


def test_pairs_are_left_out_where_they_would_be_too_many(app, monkeypatch):
    monkeypatch.setattr(compare, "MAX_PAIRS", 600)
    body = post(app, target(*IDS), QUERY).json()
    assert [one["pairs"] is None for one in body["receipts"]] == [False, False, True]


@pytest.mark.parametrize("rival", [None, IDS[2]])
def test_a_receipt_as_a_picture(app, rival):
    chosen = {} if rival is None else {"rival": rival}
    found = post(app, target(IDS[0], **chosen), QUERY, accept="image/png")
    assert found.headers["content-type"] == "image/png"
    assert found.headers["vary"] == "Accept"
    wide = found.image().width
    assert wide > (700 if rival is None else 1000)
    webp = post(app, target(IDS[0], **chosen), QUERY, accept="image/webp").image()
    assert (webp.format, webp.width) == ("WEBP", wide)


def test_a_drawn_receipt_is_the_receipt_s_own(app, index):
    small = post(app, target(IDS[0]), QUERY, accept="image/png").image()
    (own,) = expected(index, IDS[0])
    assert_same_picture(small, own.plot().convert("RGB"))


def test_a_large_picture_is_drawn_small_and_told_whole(app):
    large = data_of(picture(3, (900, 700)))
    body = post(app, target(IDS[0]), large).json()
    assert (body["picture"], body["extent"]) == ({"width": 900, "height": 700}, [0, 0, 900, 700])
    small, drawn = (
        post(app, target(IDS[0]), one, accept="image/png").image() for one in (QUERY, large)
    )
    assert drawn.width == small.width


def test_many_results_go_in_steps(index, monkeypatch, service):
    """No more wait for the network at a time than go through it together."""
    made = service(explainer(index), limits=Limits(batch=4))
    ids = sorted(explainer(index).index.ids)
    together: list[int] = []
    monkeypatch.setattr(made.state.pipeline._batcher, "_batched", together.append)
    body = post(made, target(*ids), QUERY).json()
    assert [one["id"] for one in body["receipts"]] == ids
    assert sum(together) == 13
    assert max(together) <= 4
    for one, receipt in zip(body["receipts"], expected(index, *ids), strict=True):
        assert_is(one, receipt)


def test_four_digits():
    values = np.array([[0.0, -0.0, 0.123456], [-12345.6, 1e-9, 3.00049e-7]])
    assert rounded(values) == [[0.0, 0.0, 0.1235], [-12346.0, 1e-9, 3e-07]]
    assert json.dumps(rounded(np.array([0.00012344999, 0.9999999]))) == "[0.0001234, 1.0]"


def test_what_is_shared_may_stay_in(app, index):
    (one,) = post(app, target(IDS[0], centred="false"), QUERY).json()["receipts"]
    assert (one["centred"], one["shared"]) == (False, 0)
    made = PairExplainer(explainer(index)).receipt(QUERY, IDS[0], centred=False)
    assert_is(one, made)


def test_an_index_that_no_longer_tells_the_head(app, monkeypatch, caplog):
    """After a reload the matrix that an ONNX file leaves to the index may be gone."""

    def gone(*_):
        raise InputError("the matrix is neither in /srv/network.onnx nor in the index")

    monkeypatch.setattr(PairExplainer, "head", gone)
    found = post(app, target(IDS[0]), QUERY)
    assert found.error == (501, "no_receipts")
    assert "/srv" not in found.message
    assert "/srv/network.onnx" in caplog.text


def test_an_onnx_file_answers_as_its_network_does(tmp_path, service):
    pytest.importorskip("onnxruntime")
    index = built(tmp_path, recipe=None)  # which keeps the head's matrix
    own = explainer(index)
    module = own.network.module
    # Without what counts the batches of a toy, which no exporter can follow.
    plain = EmbeddingNetwork.from_parts(*module, module=module, preprocess=own.preprocess)
    export_onnx(own.index, plain, tmp_path / "network.onnx")
    apps = [service(Explainer(index, onnx=tmp_path / "network.onnx")), service(own)]
    (one,), (other,) = (post(each, target(IDS[1]), QUERY).json()["receipts"] for each in apps)
    assert one["exact"]
    np.testing.assert_allclose(one["pairs"], other["pairs"], atol=1e-5, rtol=1e-3)
    found, wanted = (post(each, "/explain", QUERY).json() for each in apps)
    assert [a["id"] for a in found["neighbors"]] == [a["id"] for a in wanted["neighbors"]]
    np.testing.assert_allclose(found["cam"], wanted["cam"], atol=1e-4 * np.max(wanted["cam"]))
    fine, expected = (
        np.array(post(each, "/explain?detail=2&signed=true", QUERY).json()["signed_cam"])
        for each in apps
    )
    np.testing.assert_allclose(fine, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(fine).max() > 0


def test_a_network_whose_head_is_not_to_be_had(index, monkeypatch, service):
    def none(_):
        raise InputError("the ONNX file holds no head")

    monkeypatch.setattr(compare, "PairExplainer", none)
    made = service(explainer(index))
    assert post(made, target(IDS[0]), QUERY).error == (501, "no_receipts")
    assert post(made, "/search", QUERY).status == 200


# --- what is refused ---

REFUSED: dict[str, tuple[str, tuple[int, str]]] = {
    "no result": ("/compare", (422, "unusable_parameter")),
    "an unknown id": (target("nothing"), (404, "unknown_image")),
    "one unknown id of two": (target(IDS[0], "nothing"), (404, "unknown_image")),
    "an unknown rival": (target(IDS[0], rival="nothing"), (404, "unknown_image")),
    "an empty id": (target(""), (404, "unknown_image")),
    "a path": (target("../../etc/passwd"), (404, "unknown_image")),
    "a NUL": (target("c0/000.png\0"), (404, "unknown_image")),
    "a result twice": (target(IDS[0], IDS[0]), (422, "repeated_result")),
    "its own rival": (target(IDS[0], rival=IDS[0]), (422, "same_image")),
    "a rival of two": (target(IDS[0], IDS[1], rival=IDS[2]), (422, "too_many_results")),
    "two rivals": (
        target(IDS[0], rival=IDS[1]) + "&rival=x", (422, "repeated_parameter")),
    "101 results": (target(*map(str, range(101))), (422, "unusable_parameter")),
    "a row alone": (target(IDS[0], cell="1"), (422, "unusable_parameter")),
    "three numbers": (target(IDS[0], cell="1,2,3"), (422, "unusable_parameter")),
    "a row outside": (target(IDS[0], cell="4,0"), (404, "unknown_cell")),
    "a column outside": (target(IDS[0], cell="0,4", of="result"), (404, "unknown_cell")),
    "a row below": (target(IDS[0], cell="-1,0"), (422, "unusable_parameter")),
    "a huge row": (target(IDS[0], cell=f"{10**30},0"), (422, "unusable_parameter")),
    "a row of NaN": (target(IDS[0], cell="nan,0"), (422, "unusable_parameter")),
    "a row of 1e1": (target(IDS[0], cell="1e1,0"), (422, "unusable_parameter")),
    "other digits": (target(IDS[0], cell="\u0663,0"), (422, "unusable_parameter")),
    "a line more": (target(IDS[0], cell="1,2\n"), (422, "unusable_parameter")),
    "a side that is none": (
        target(IDS[0], cell="0,0", of="rival"), (422, "unusable_parameter")),
    "a million channels": (target(IDS[0], lines=10**6), (422, "unusable_parameter")),
    "infinite links": (target(IDS[0], links="inf"), (422, "unusable_parameter")),
    "an unknown parameter": (target(IDS[0], cel="1,1"), (422, "unknown_parameter")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(app, name):
    asked, error = REFUSED[name]
    assert post(app, asked, QUERY).error == error


def test_messages_say_what_to_do(app):
    told = {
        target(IDS[0], cell="4,0"): "cell (4, 0) is not on the query's grid of 4 x 4",
        target(IDS[0], rival=IDS[0]): "result and rival are the same image; name two",
        target(IDS[0], cell="1;2"): "cell: string should match pattern",
        target(*map(str, range(101))): "result: list should have at most 100 items",
    }
    for asked, sentence in told.items():
        assert sentence in post(app, asked, QUERY).message


def test_what_has_no_picture_is_refused(app):
    for asked in (target(*IDS[:2]), target(IDS[0], cell="0,0")):
        assert post(app, asked, QUERY, accept="image/png").error == (422, "not_drawable")
    assert post(app, target(IDS[0]), QUERY, accept="text/html").error == (406, "no_such_type")


def test_a_broken_query_is_refused_as_everywhere(app):
    assert post(app, target(IDS[0]), b"no picture").error == (422, "unreadable_image")
    assert post(app, target(IDS[0]), b"").error == (422, "empty_body")
    broken = ask(app, "POST", target(IDS[0]), form(QUERY)[:-9], content_type="text/plain")
    assert broken.error == (415, "unusable_type")


def test_pictures_that_went_or_changed(tmp_path, service):
    index = built(tmp_path)
    made = service(explainer(index))
    file = tmp_path / "photos" / "c0" / "000.png"
    Image.new("RGB", (24, 24), (255, 0, 0)).save(file)
    changed = post(made, target(IDS[1], IDS[0]), QUERY)
    assert changed.error == (409, "changed_picture")
    file.write_bytes(b"nothing")
    broken = post(made, target(IDS[0]), QUERY)
    os.unlink(file)
    gone = post(made, target(IDS[0]), QUERY)
    for refused in (broken, gone):
        assert refused.error == (404, "no_picture")
        assert "c0" not in refused.message
        assert str(tmp_path) not in refused.message
    assert post(made, target(IDS[1]), QUERY).status == 200


def test_a_path_that_climbs_is_not_followed(tmp_path, monkeypatch, service):
    """The index says a path outside of its images: no picture, whatever lies there."""
    index = built(tmp_path / "a")
    picture(9, (24, 24)).save(tmp_path / "secret.png")
    why = explainer(index, images=tmp_path / "a" / "photos")
    made = service(why)
    paths = property(lambda rows: ["../../secret.png"] * len(rows.positions))
    monkeypatch.setattr(type(why.index.select([0])), "paths", paths)
    assert post(made, target(IDS[0]), QUERY).error == (404, "no_picture")


def test_it_takes_a_place_and_a_time(index, monkeypatch, service):
    made = service(explainer(index), limits=Limits(concurrency=1))
    with made.state.pipeline.place():
        assert post(made, target(IDS[0]), QUERY).error == (503, "busy")
    slow = service(explainer(index), limits=Limits(seconds=0.01))

    def late(_, index, inputs):
        time.sleep(0.1)
        return inputs

    monkeypatch.setattr(PairExplainer, "sides", late)
    assert post(slow, target(IDS[0]), QUERY).error == (503, "too_slow")
