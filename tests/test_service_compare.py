"""Receipts over HTTP are the Python API's, and what cannot be compared is refused."""

import os
import time
import weakref
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from rounding import assert_same_picture
from service_client import ask, built, data_of, explainer, picture, post

from embedcam import EmbeddingNetwork, Explainer
from embedcam.errors import InputError
from embedcam.export import export_onnx
from embedcam.offline import concepts
from embedcam.pairs import PairExplainer, make_receipt
from embedcam.service import Limits, create_app, queries, receipts
from embedcam.service.schemas import CompareAnswer

QUERY = data_of(picture(3))
IDS = ["c0/000.png", "c1/004.png", "c2/011.png"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Behind a head whose receipts are of first order."""
    return explainer(built(tmp_path_factory.mktemp("other"), "other"), "other")


def target(*results, **others):
    named = [("result", name) for name in results] + list(others.items())
    return "/compare?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in named)


def expected(index, *ids):
    return PairExplainer(explainer(index)).receipts(QUERY, list(ids))


def assert_is(found, receipt):
    """The JSON of one receipt, number by number."""
    shown = receipt.to_dict()
    result = shown["result"]
    assert (found["id"], found["label"]) == (result["id"], result["label"])
    assert (found["extent"], found["exact"]) == (result["extent"], shown["exact"])
    for name in ("similarity", "shared", "remainder", "other_channels"):
        assert found[name] == pytest.approx(shown[name], abs=1e-6)
    for name in ("query", "result"):
        for part in ("cells", "shared", "remainder"):
            np.testing.assert_allclose(found[name][part], shown[name][part], atol=1e-6)
    for name, parts in (("channels", ["channel"]), ("links", ["query", "result"])):
        one, other = ([[one[p] for p in parts] for one in told[name]] for told in (found, shown))
        assert one == other


def test_receipts_are_the_python_api_s(app, index):
    body = post(app, target(*IDS), QUERY).json()
    CompareAnswer.model_validate(body)
    assert body["contrast"] is None
    assert [one["id"] for one in body["receipts"]] == IDS
    for one, receipt in zip(body["receipts"], expected(index, *IDS), strict=True):
        assert_is(one, receipt)
        assert (one["picture"], one["point"]) == ({"width": 24, "height": 24}, None)
        np.testing.assert_allclose(one["pairs"], receipt.matrix().reshape(16, 16), rtol=6e-4)


def test_what_is_shown_adds_up_and_what_is_shared_may_stay_in(app, index):
    (one,) = post(app, target(IDS[1], lines=3, links=0), QUERY).json()["receipts"]
    assert (len(one["channels"]), one["links"]) == (3, [])
    whole = sum(line["contribution"] for line in one["channels"]) + one["other_channels"]
    whole += one["shared"] + one["remainder"]
    assert whole == pytest.approx(one["similarity"], abs=1e-5)
    (one,) = post(app, target(IDS[0], centred="false"), QUERY).json()["receipts"]
    assert (one["centred"], one["shared"]) == (False, 0)
    assert_is(one, PairExplainer(explainer(index)).receipt(QUERY, IDS[0], centred=False))


def test_a_rival(app, index):
    body = post(app, target(IDS[0], rival=IDS[2]), QUERY).json()
    CompareAnswer.model_validate(body)
    made = PairExplainer(explainer(index)).above(QUERY, IDS[0], IDS[2])
    for one, receipt in zip(body["receipts"], (made.result, made.rival), strict=True):
        assert_is(one, receipt)
    contrast, shown = body["contrast"], made.to_dict()
    np.testing.assert_allclose(contrast["query"], made.query.cells, atol=1e-6)
    of = [
        [(line["channel"], line["contribution"]) for line in told["channels"]]
        for told in (contrast, shown)
    ]
    assert (of[0], contrast["exact"]) == (of[1], True)
    for name in ("score", "other_channels", "remainder"):
        assert contrast[name] == pytest.approx(shown[name], abs=1e-6)


def test_places_are_the_python_api_s(app, index):
    (one,) = post(app, target(IDS[1]), QUERY).json()["receipts"]
    receipt = PairExplainer(explainer(index)).receipt(QUERY, IDS[1])
    assert one["places"]
    for place, shown in zip(one["places"], receipt.to_dict()["places"], strict=True):
        assert place["query"] == shown["query"]
        assert place["result"] == shown["result"]
        for name in ("contribution", "share"):
            assert place[name] == pytest.approx(shown[name], abs=1e-6)


def test_what_lies_in_a_box(app, index):
    body = post(app, target(*IDS, box="-1,0,12.5,18"), QUERY).json()
    CompareAnswer.model_validate(body)
    pairs = PairExplainer(explainer(index))
    for one, receipt in zip(
        body["receipts"], pairs.receipts(QUERY, IDS, box=(-1, 0, 12.5, 18)), strict=True
    ):
        assert_is(one, receipt)
        assert one["outside"] == pytest.approx(receipt.outside, abs=1e-6)
        assert abs(one["outside"]) > 1e-3
    drawn = post(app, target(IDS[0], box="0,0,12,18"), QUERY, accept="image/png").image()
    made = pairs.receipts(QUERY, IDS[:1], box=(0, 0, 12, 18))[0].plot()
    assert_same_picture(drawn, made.convert("RGB"))
    assert post(app, target(IDS[0], box="90,90,99,99"), QUERY).error == (404, "unknown_box")
    assert post(app, target(IDS[0], box="9,9,3,12"), QUERY).error == (404, "unknown_box")
    said = post(app, target(IDS[0], box="1,2,3"), QUERY).json()["error"]["message"]
    assert said.startswith("box: give four numbers x0,y0,x1,y1 in pixels")


def test_a_concept_is_told_by_the_name_a_user_gave_it(index, tmp_path, monkeypatch, service):
    with pytest.raises(InputError, match="has no concepts"):
        create_app(explainer(index), concept_names={1: "wheel"})
    monkeypatch.setattr(concepts, "LEAST_IMAGES", 4)
    monkeypatch.setattr(concepts, "LEAST_CHANNELS", 4)
    path = built(tmp_path)
    with pytest.raises(InputError, match="concept 9 is named 'wheel', and the index has 4"):
        create_app(explainer(path), concept_names={9: "wheel"})
    app = service(explainer(path), concept_names={1: "wheel"})
    (one,) = post(app, target(IDS[1]), QUERY).json()["receipts"]
    told = {line["concept"]: line["name"] for line in one["concepts"]}
    assert told == {0: "", 1: "wheel", 2: "", 3: ""}


def test_a_line_shows_where_it_answers_most(app, index):
    (one,) = post(app, target(IDS[1]), QUERY).json()["receipts"]
    lines = one["concepts"] + one["channels"]
    shown = explainer(index).index.exemplars("channel", one["channels"][0]["channel"])
    told = one["channels"][0]["exemplars"]
    assert [(a["id"], a["row"], a["column"]) for a in told] == [
        (a.id, a.row, a.column) for a in shown
    ]
    for exemplar in lines[0]["exemplars"] + told:
        found = ask(app, "GET", exemplar["crop_url"], accept="image/webp")
        assert found.image().size == (52, 52)
    assert ask(app, "GET", f"/items/{IDS[0]}/image?cell=4,0").error == (404, "unknown_cell")
    assert ask(app, "GET", f"/items/{IDS[0]}/image?cell=x").error == (422, "unusable_parameter")


@pytest.mark.parametrize("of", ["query", "result"])
def test_a_point(app, index, of):
    body = post(app, target(*IDS[:2], cell="1,2", of=of), QUERY).json()
    for one, receipt in zip(body["receipts"], expected(index, *IDS[:2]), strict=True):
        np.testing.assert_allclose(one["point"], receipt.point(1, 2, of), rtol=6e-4)


def test_a_receipt_behind_another_head_has_points_and_no_pairs(other, service):
    body = post(service(other), target(IDS[0], cell="3,0"), QUERY).json()
    CompareAnswer.model_validate(body)
    (one,) = body["receipts"]
    assert (one["exact"], one["pairs"]) == (True, None)
    made = PairExplainer(other).receipt(QUERY, IDS[0])
    assert_is(one, made)
    np.testing.assert_allclose(one["point"], made.point(3, 0), rtol=6e-4)


def test_receipts_end_with_the_one_begun_when_time_is_up(other, monkeypatch, service):
    app, begun = service(other, limits=Limits(seconds=0.3)), []

    def slow(*given, **named):
        begun.append(given)
        time.sleep(0.2)
        return make_receipt(*given, **named)

    monkeypatch.setattr(queries, "make_receipt", slow)
    assert post(app, target(*other.index.ids[:8]), QUERY).error == (503, "too_slow")
    app.state.pipeline.close()
    assert 1 <= len(begun) <= 2


def test_graphs_of_heads_do_not_pile_up(other, monkeypatch, service):
    app, alive, most = service(other, limits=Limits(batch=2)), weakref.WeakSet[Any](), []

    def counted(*given, **named):
        made = make_receipt(*given, **named)
        alive.update(made.sides)
        most.append(len(alive))
        return made

    monkeypatch.setattr(queries, "make_receipt", counted)
    assert len(post(app, target(*other.index.ids[:8]), QUERY).json()["receipts"]) == 8
    assert (len(most), max(most) <= 1 + 2 + 2) == (8, True)


def test_pairs_are_left_out_where_they_would_be_too_many(app, monkeypatch):
    monkeypatch.setattr(receipts, "MAX_PAIRS", 600)
    body = post(app, target(*IDS), QUERY).json()
    assert [one["pairs"] is None for one in body["receipts"]] == [False, False, True]


@pytest.mark.parametrize("rival", [None, IDS[2]])
def test_a_receipt_as_a_picture(app, index, rival):
    chosen, pairs = {} if rival is None else {"rival": rival}, PairExplainer(explainer(index))
    made = pairs.receipt(QUERY, IDS[0]) if rival is None else pairs.above(QUERY, IDS[0], rival)
    for kind in ("webp", "png"):
        found = post(app, target(IDS[0], **chosen), QUERY, accept=f"image/{kind}")
        assert (found.headers["content-type"], found.headers["vary"]) == (f"image/{kind}", "Accept")
        assert found.image().format == kind.upper()
    assert_same_picture(found.image(), made.plot().convert("RGB"))
    large = data_of(picture(3, (900, 700)))  # is drawn small, and told whole
    drawn = post(app, target(IDS[0], **chosen), large, accept="image/png").image()
    assert drawn.width == found.image().width
    body = post(app, target(IDS[0]), large).json()
    assert (body["picture"], body["extent"]) == ({"width": 900, "height": 700}, [0, 0, 900, 700])


def test_many_results_go_in_steps(index, monkeypatch, service):
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


def test_an_onnx_file_answers_as_its_network_does(tmp_path, service):
    pytest.importorskip("onnxruntime")
    index = built(tmp_path, recipe=None)  # which keeps the head's matrix
    own = explainer(index)
    module = own.network.module
    # Without what counts the batches of a toy, which no exporter can follow.
    plain = EmbeddingNetwork.from_parts(*module, module=module, preprocess=own.preprocess)
    export_onnx(own.index, plain, tmp_path / "network.onnx")
    apps = [service(Explainer(index, onnx=tmp_path / "network.onnx")), service(own)]

    one, other = (post(each, target(IDS[1]), QUERY).json()["receipts"][0] for each in apps)
    assert one["exact"]
    np.testing.assert_allclose(one["pairs"], other["pairs"], atol=1e-5, rtol=1e-3)
    found, wanted = (post(each, "/explain?detail=2&signed=1", QUERY).json() for each in apps)
    for name in ("cam", "signed_cam"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4 * np.max(wanted[name]))


def test_a_network_whose_head_is_not_to_be_had(index, monkeypatch, service, caplog):
    """None in the file; or after a reload the matrix that a file leaves to the index is gone."""

    def gone(*_):
        raise InputError("the matrix is neither in /srv/network.onnx nor in the index")

    with monkeypatch.context() as patch:
        patch.setattr("embedcam.explain.side_maker.SideMaker.head", gone)
        made = service(explainer(index))
        found = post(made, target(IDS[0]), QUERY)
    assert found.error == (501, "no_receipts")
    assert "/srv" not in found.message
    assert post(made, "/search", QUERY).status == 200
    assert "/srv/network.onnx" in caplog.text


REFUSED: dict[str, tuple[str, tuple[int, str]]] = {
    "no result": ("/compare", (422, "unusable_parameter")),
    "one unknown id of two": (target(IDS[0], "nothing"), (404, "unknown_image")),
    "an unknown rival": (target(IDS[0], rival="nothing"), (404, "unknown_image")),
    "a path": (target("../../etc/passwd"), (404, "unknown_image")),
    "a result twice": (target(IDS[0], IDS[0]), (422, "repeated_result")),
    "its own rival": (target(IDS[0], rival=IDS[0]), (422, "same_image")),
    "a rival of two": (target(IDS[0], IDS[1], rival=IDS[2]), (422, "too_many_results")),
    "two rivals": (f"{target(IDS[0])}&rival=y&rival=x", (422, "repeated_parameter")),
    "101 results": (target(*map(str, range(101))), (422, "unusable_parameter")),
    "a row alone": (target(IDS[0], cell="1"), (422, "unusable_parameter")),
    "three numbers": (target(IDS[0], cell="1,2,3"), (422, "unusable_parameter")),
    "a row outside": (target(IDS[0], cell="4,0"), (404, "unknown_cell")),
    "a column outside": (target(IDS[0], cell="0,4", of="result"), (404, "unknown_cell")),
    "a huge row": (target(IDS[0], cell=f"{10**30},0"), (422, "unusable_parameter")),
    "a row of NaN": (target(IDS[0], cell="nan,0"), (422, "unusable_parameter")),
    "other digits": (target(IDS[0], cell="\u0663,0"), (422, "unusable_parameter")),
    "a line more": (target(IDS[0], cell="1,2\n"), (422, "unusable_parameter")),
    "a side that is none": (target(IDS[0], of="rival"), (422, "unusable_parameter")),
    "a box of three": (target(IDS[0], box="1,2,3"), (422, "unusable_parameter")),
    "a box of words": (target(IDS[0], box="a,b,c,d"), (422, "unusable_parameter")),
    "a box and a rival": (target(IDS[0], rival=IDS[1], box="0,0,9,9"), (422, "unusable_parameter")),
    "a million channels": (target(IDS[0], lines=10**6), (422, "unusable_parameter")),
    "infinite links": (target(IDS[0], links="inf"), (422, "unusable_parameter")),
    "an unknown parameter": (target(IDS[0], cel="1,1"), (422, "unknown_parameter")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(app, name):
    asked, error = REFUSED[name]
    assert post(app, asked, QUERY).error == error


def test_what_has_no_picture_is_refused(app):
    for asked in (target(*IDS[:2]), target(IDS[0], cell="0,0")):
        assert post(app, asked, QUERY, accept="image/png").error == (422, "not_drawable")
    assert post(app, target(IDS[0]), QUERY, accept="text/html").error == (406, "no_such_type")
    assert post(app, target(IDS[0]), b"no picture").error == (422, "unreadable_image")


def test_pictures_that_went_or_changed(tmp_path, service):
    made = service(explainer(built(tmp_path)))
    file = tmp_path / "photos" / "c0" / "000.png"
    Image.new("RGB", (24, 24), (255, 0, 0)).save(file)
    assert post(made, target(IDS[1], IDS[0]), QUERY).error == (409, "changed_picture")
    file.write_bytes(b"nothing")
    for spoil in (lambda: None, lambda: os.unlink(file)):
        spoil()
        refused = post(made, target(IDS[0]), QUERY)
        assert (refused.error, "c0" in refused.message) == ((404, "no_picture"), False)
    assert post(made, target(IDS[1]), QUERY).status == 200
