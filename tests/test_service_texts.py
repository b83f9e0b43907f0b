"""Words over HTTP: what they find, where it answers them, what is kept, and what is refused."""

import asyncio
import json
from functools import partial

import numpy as np
import pytest
from service_client import data_of, send
from test_service_stores import Held
from text_samples import built_words

from embedcam import Explainer, PairExplainer
from embedcam.index.model import write_model
from embedcam.service import Limits, create_app
from embedcam.service.texts import Kept, Shelf

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return built_words(tmp_path_factory.mktemp("words"))


def asked(app, target, body, headers=JSON):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(send(app, "POST", target, data, headers))


def app_of(explainer, **limits):
    return create_app(explainer, limits=Limits(**limits))


def assert_told(reply, expected, signed=False):
    assert reply.status == 200, reply.body
    told = reply.json()
    assert (told["text"], told["above"]) == (expected.text, expected.above)
    assert [one["id"] for one in told["neighbors"]] == expected.ids
    for one, result in zip(told["neighbors"], expected.results, strict=True):
        assert one["similarity"] == pytest.approx(result.similarity, abs=1e-5)
        np.testing.assert_allclose(one["cam"], result.cam, atol=1e-5)
        assert ("signed_cam" in one) == signed
        if signed:
            np.testing.assert_allclose(one["signed_cam"], result.signed_cam, atol=1e-5)
        assert one["picture"] == {"width": 24, "height": 24}
        assert one["file"] == "same"


@pytest.mark.parametrize("kind", ["affine", "tokens"])
def test_words_are_explained_cold_and_warm(kind, tmp_path):
    explainer, made = built_words(tmp_path, kind)
    app = app_of(explainer)
    expected = explainer.explain_text("a red car", n_neighbors=3)
    assert_told(asked(app, "/explain?n_neighbors=3", {"text": "a red car"}), expected)
    made.batches.clear()
    assert_told(asked(app, "/explain?n_neighbors=3", {"text": "a red car"}), expected)
    assert made.batches == []  # no picture went through the network
    body = {"text": "a cat", "above": "a dog"}
    expected = explainer.explain_text("a cat", above="a dog", n_neighbors=2)
    told = asked(app, "/explain?n_neighbors=2", body)
    assert_told(told, expected, signed=True)
    rivals = [one["rival_similarity"] for one in told.json()["neighbors"]]
    expected_rivals = [one.rival_similarity for one in expected.results]
    np.testing.assert_allclose(rivals, expected_rivals, atol=1e-5)
    app.state.pipeline.close()


def test_words_find_without_the_why(words):
    explainer, made = words
    app = app_of(explainer)
    made.batches.clear()
    told = asked(app, "/search?n_neighbors=4", {"text": "the sea"}).json()
    assert told["text"] == "the sea"
    expected = explainer.explain_text("the sea", n_neighbors=4)
    made.batches.clear()
    assert [one["id"] for one in told["neighbors"]] == expected.ids
    assert set(told) == {"text", "neighbors"}
    drawn = asked(app, "/explain", {"text": "the sea"}, {**JSON, "accept": "image/png"})
    assert drawn.headers["content-type"] == "image/png"
    assert min(drawn.image().size) > 300
    app.state.pipeline.close()


def test_words_are_asked_of_a_picture_that_is_sent(words):
    explainer, _ = words
    app, name = app_of(explainer), explainer.index.ids[3]
    picture = data_of(explainer.picture(name))
    ask = partial(asked, app, body=picture, headers={"content-type": "image/png"})
    told = ask("/explain?text=a+cat&above=a+dog").json()
    expected = explainer.explain_text("a cat", above="a dog", image=explainer.picture(name))
    (result,) = expected.results
    assert (told["text"], told["above"], told["exact"]) == ("a cat", "a dog", True)
    assert told["similarity"] == pytest.approx(result.similarity, abs=1e-6)
    assert told["rival_similarity"] == pytest.approx(result.rival_similarity, abs=1e-6)
    np.testing.assert_allclose(told["cam"], result.cam, atol=1e-6)
    np.testing.assert_allclose(told["signed_cam"], result.signed_cam, atol=1e-6)
    assert told["picture"] == {"width": 24, "height": 24}
    assert "signed_cam" not in ask("/explain?text=a+cat").json()
    drawn = ask("/explain?text=a", headers={"content-type": "image/png", "accept": "image/png"})
    assert drawn.headers["content-type"] == "image/png"
    assert ask("/explain?text=a&result=nobody").error == (404, "unknown_image")
    assert "neighbors" in ask("/explain?above=a").json()
    for query in ("text=a&result=c0/000.png", "text=", "text=+"):
        assert ask(f"/explain?{query}").error == (422, "unusable_parameter")
    app.state.pipeline.close()


@pytest.mark.parametrize("above", [None, "a dog"])
def test_receipts_of_words(words, above):
    explainer, _ = words
    app, ids = app_of(explainer), [explainer.index.ids[row] for row in (2, 3)]
    body = {"text": "a cat"} | ({} if above is None else {"above": above})
    told = asked(app, f"/compare?lines=3&result={ids[0]}&result={ids[1]}", body).json()
    assert (told["text"], told["above"]) == ("a cat", above)
    pairs = PairExplainer(explainer)
    for name, one in zip(ids, told["receipts"], strict=True):
        receipt = pairs.text_receipt("a cat", name, above=above)
        expected = receipt.to_dict(3)
        assert (one["id"], one["exact"], one["centred"]) == (name, True, above is None)
        assert one["score"] == pytest.approx(receipt.score, abs=1e-6)
        np.testing.assert_allclose(one["cells"], expected["picture"]["cells"], atol=1e-6)
        lines = [line["contribution"] for line in one["channels"]]
        total = sum(lines) + one["other_channels"] + one["shared"] + one["remainder"]
        assert total == pytest.approx(one["score"], abs=1e-6)
        assert one["channels"][0]["exemplars"][0]["crop_url"].startswith("/items/")
    drawn = asked(app, f"/compare?result={ids[0]}", body, {**JSON, "accept": "image/png"})
    assert min(drawn.image().size) > 300
    app.state.pipeline.close()


def test_a_picture_that_is_gone_or_replaced(tmp_path):
    explainer, _ = built_words(tmp_path)
    app = app_of(explainer)
    ask = partial(asked, app, "/explain?n_neighbors=3", {"text": "a cat"})
    first, second, third = (one["id"] for one in ask().json()["neighbors"])
    photos = tmp_path / "photos"
    (photos / first).unlink()
    (photos / second).write_bytes((photos / third).read_bytes())
    gone, changed, _ = ask().json()["neighbors"]
    assert (gone["cam"], gone["picture"], gone["file"]) == (None, None, "missing")
    # What is kept is of the old file, and is not shown for the new one.
    assert changed["file"] == "changed"
    expected = explainer.explain_text("a cat", n_neighbors=3).cams[1]
    np.testing.assert_allclose(changed["cam"], expected, atol=1e-5)
    app.state.pipeline.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", (422, "empty_body")),
        (b"{", (422, "unusable_text")),
        (b"[]", (422, "unusable_text")),
        (b'"a cat"', (422, "unusable_text")),
        (b"[" * 30_000, (422, "unusable_text")),
        (b"\xff\xfe", (422, "unusable_text")),
        ({}, (422, "unusable_text")),
        ({"text": ""}, (422, "unusable_text")),
        ({"text": " \n "}, (422, "unusable_text")),
        ({"text": 7}, (422, "unusable_text")),
        ({"text": ["a cat"]}, (422, "unusable_text")),
        ({"text": "a" * 1001}, (422, "unusable_text")),
        (b'{"text": "\\ud800"}', (422, "unusable_text")),
        ({"text": "a cat", "image": "x"}, (422, "unusable_text")),
        ({"text": "a cat", "above": ""}, (422, "unusable_text")),
        ({"text": "a" * 70_000}, (413, "body_too_long")),
    ],
)
def test_other_bodies_are_refused(words, body, said):
    app = app_of(words[0])
    for target in ("/explain", "/search"):
        assert asked(app, target, body).error == said
    app.state.pipeline.close()


def test_what_goes_with_words_and_what_does_not(words):
    app = app_of(words[0])
    body = {"text": "a cat"}
    assert asked(app, "/explain?result=c0/000.png", body).error == (422, "unusable_parameter")
    alone = asked(app, "/compare?result=c0/000.png", body).json()
    assert asked(app, "/compare?result=c0/000.png&cell=0,0", body).json() == alone
    rival = f"rival={words[0].index.ids[0]}"
    assert asked(app, f"/compare?result=c0/000.png&{rival}", body).error[0] == 422
    assert asked(app, "/compare?result=nobody", body).error == (404, "unknown_image")
    alone = asked(app, "/explain", body).json()
    assert asked(app, "/explain?text=a&above=b", body).json() == alone
    strange = {"text": "\x00</script><b>\u202e \U0001f697", "above": "$(rm -rf)"}
    assert asked(app, "/search", {"text": "a cat", "above": None}).status == 200
    told = asked(app, "/explain", strange).json()
    assert (told["text"], told["above"]) == (strange["text"], strange["above"])
    assert asked(app, "/explain", body, {"content-type": "text/plain"}).error[0] == 415
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert asked(app, "/explain", body, typed).status == 200
    ready = asyncio.run(send(app, "GET", "/openapi.json")).json()
    assert "application/json" in ready["paths"]["/explain"]["post"]["requestBody"]["content"]
    app.state.pipeline.close()


def test_a_network_without_a_tower_for_texts(tmp_path):
    explainer, made = built_words(tmp_path)
    made.network.texts = None
    app = app_of(explainer)
    assert asked(app, "/explain", {"text": "a cat"}).error == (501, "no_words")
    assert asked(app, "/search", {"text": "a cat"}).error == (501, "no_words")
    app.state.pipeline.close()


def test_words_over_a_store(words, tmp_path):
    explainer, made = words
    model = write_model(explainer.index, tmp_path / "model.embedcam")
    stored = Explainer.from_model(model, made.network, store=Held(explainer.index))
    expected = explainer.explain_text("a cat", above="a dog", n_neighbors=3)
    told = stored.explain_text("a cat", above="a dog", n_neighbors=3)
    assert told.ids == expected.ids
    np.testing.assert_allclose(told.cams[2], expected.cams[2], atol=1e-5)
    app = create_app(stored)
    reply = asked(app, "/explain?n_neighbors=3", {"text": "a cat", "above": "a dog"})
    assert_told(reply, expected, signed=True)
    app.state.pipeline.close()


def test_the_shelf_keeps_what_was_used_last_within_its_bytes():
    def kept(numbers):
        return Kept(np.zeros((1, 1, numbers), np.float32), lambda d: d, (1, 1), (0, 0, 1, 1))

    shelf = Shelf(10_000)
    for name in "abc":
        shelf.put(name, kept(600))  # 2,900 bytes each
    assert (len(shelf), shelf.bytes) == (3, 8700)
    assert shelf.find("a") is not None
    shelf.put("d", kept(600))
    assert [name for name in "abcd" if shelf.find(name)] == ["a", "c", "d"]
    shelf.put("a", kept(100))
    assert shelf.bytes == 2 * 2900 + 900
    shelf.put("e", kept(5000))  # more than there is room for at all
    assert shelf.find("e") is None
    assert shelf.bytes <= 10_000
    Shelf(0).put("a", kept(1))
