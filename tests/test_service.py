"""The service answers what the Python API answers, and serves the indexed images alone."""

import asyncio
import io
import logging
import os
import re
import shutil

import numpy as np
import pytest
from build_samples import dense, everything, paint, toy
from PIL import Image, PngImagePlugin
from rounding import assert_same_picture
from service_client import FORM, ask, built, data_of, explainer, form, picture, post, send
from starlette.requests import Request

from embedcam import Explainer, Index, add_images, build_index, find_images
from embedcam.errors import IndexFormatError, InputError
from embedcam.images import ImageSource
from embedcam.index import remove
from embedcam.ops import area_average
from embedcam.render import Tile, top_value
from embedcam.render import overlay as render_overlay
from embedcam.service import Limits
from embedcam.service.schemas import ExplainAnswer, ItemCam, SearchAnswer, urls_of

QUERY = data_of(picture(3))
ONE = "result=c1%2F004.png"


def test_explain_says_what_the_explainer_says(app, index):
    body = post(app, "/explain?n_neighbors=3", QUERY).json()
    ExplainAnswer.model_validate(body)
    expected = explainer(index).explain(QUERY, n_neighbors=3)
    np.testing.assert_allclose(body["cam"], area_average(expected.cam, (14, 14)), atol=1e-6)
    assert [(one["id"], one["label"]) for one in body["neighbors"]] == list(
        zip(expected.ids, expected.labels, strict=True)
    )
    for one, told in zip(body["neighbors"], expected.neighbors(), strict=True):
        for name in ("distance", "similarity", "norm", "cam"):
            np.testing.assert_allclose(one[name], getattr(told, name), rtol=1e-5, atol=1e-6)
    assert (body["picture"], body["extent"]) == ({"width": 40, "height": 30}, [0, 0, 40, 30])
    assert (body["explained"], body["trust"], body["result"]) == (expected.ids, None, None)


def test_a_form_and_a_body_are_one(app):
    in_form = ask(app, "POST", "/explain", form(QUERY), content_type=FORM)
    nameless = ask(app, "POST", "/explain", form(QUERY, filename="x"), content_type=FORM)
    bare = ask(app, "POST", "/explain", QUERY)  # without any type
    for found in (in_form, nameless, bare):
        assert found.json() == post(app, "/explain", QUERY).json()


def test_one_result_alone_is_explained(app, index):
    body = post(app, f"/explain?{ONE}&map_size=3", QUERY).json()
    expected = explainer(index).explain(QUERY, result="c1/004.png")
    asked = body["result"]
    assert (body["explained"], asked["id"], asked["label"]) == (["c1/004.png"], "c1/004.png", "c1")
    for name in ("distance", "similarity", "norm", "cam"):
        np.testing.assert_allclose(asked[name], getattr(expected.asked, name), atol=1e-6)
    np.testing.assert_allclose(body["cam"], area_average(expected.cam, (3, 3)), atol=1e-6)


def test_a_result_is_told_from_a_rival(app, index):
    target = f"/explain?{ONE}&rival=c0%2F000.png"
    body = post(app, target, QUERY).json()
    ExplainAnswer.model_validate(body)
    expected = explainer(index).explain(QUERY, result="c1/004.png", above="c0/000.png")
    assert expected.cam.any()
    np.testing.assert_allclose(body["cam"], area_average(expected.cam, (14, 14)), atol=1e-6)
    assert (body["result"]["id"], body["rival"]["id"]) == ("c1/004.png", "c0/000.png")
    assert body["rival"]["distance"] == pytest.approx(expected.rival.distance, abs=1e-6)
    assert (body["trust"], body["trusted"], body["why_empty"]) == (None, None, None)
    drawn = [post(app, asked, QUERY, accept="image/png") for asked in (target, f"/explain?{ONE}")]
    assert drawn[0].image().tobytes() != drawn[1].image().tobytes()
    for refused, error in (
        ("rival=c0%2F000.png", (422, "no_result")),
        (f"{ONE}&rival=c1%2F004.png", (422, "same_image")),
        (f"{ONE}&rival=zebra", (404, "unknown_image")),
    ):
        assert post(app, f"/explain?{refused}", QUERY).error == error


def test_a_finer_map_is_made_of_the_picture_itself(app, index):
    body, plain = (
        post(app, f"/explain?detail={detail}&map_size=28", QUERY).json() for detail in (2, 1)
    )
    fine = explainer(index).explain(QUERY, detail=2)
    expected = area_average(fine.cam, tuple(min(28, side) for side in fine.cam.shape))
    np.testing.assert_allclose(body["cam"], expected, atol=1e-4 * expected.max())
    assert np.abs(np.array(plain["cam"]) - expected).max() > 1e-2 * expected.max()
    # What is asked beyond the network's size stops there.
    assert np.shape(post(app, "/explain?map_size=224", QUERY).json()["cam"]) == (16, 16)


def test_the_signed_map_comes_on_request(app, index):
    plain, whole = (
        post(app, f"/explain?map_size=4&signed={said}", QUERY).json() for said in ("false", "true")
    )
    ExplainAnswer.model_validate(whole)
    signed = np.array(whole.pop("signed_cam"))
    assert whole == plain
    full = explainer(index).explain(QUERY).signed_cam
    rows, columns = (np.arange(side).reshape(4, -1) for side in full.shape)
    literal = np.array([[full[np.ix_(r, c)].mean() for c in columns] for r in rows])
    assert literal.min() < 0
    np.testing.assert_allclose(signed, literal, atol=1e-5 * np.abs(full).max())
    assert "signed" in post(app, "/explain?signed=perhaps", QUERY).message


def test_search_finds_what_explain_finds(app):
    found = post(app, "/search?n_neighbors=4", QUERY).json()
    SearchAnswer.model_validate(found)
    explained = post(app, "/explain?n_neighbors=4", QUERY).json()
    same = ("id", "label", "image_url", "cam_url")
    for one, other in zip(found["neighbors"], explained["neighbors"], strict=True):
        assert [one[name] for name in same] == [other[name] for name in same]
        assert one["distance"] == pytest.approx(other["distance"], abs=1e-6)


def test_an_overlay_is_the_picture_with_its_map(app, index):
    query = picture(3, (300, 200))
    for kind in ("webp", "png"):
        found = post(app, "/explain?picture_size=150", data_of(query), accept=f"image/{kind}")
        assert (found.headers["content-type"], found.headers["vary"]) == (f"image/{kind}", "Accept")
        assert (found.image().format, found.image().size) == (kind.upper(), (150, 100))
    cam = explainer(index).explain(query).cam
    small = query.resize((150, 100), Image.Resampling.LANCZOS, reducing_gap=3.0)
    expected = render_overlay(small, cam, (0, 0, 150, 100), top_value([Tile(None, cam)]))
    assert_same_picture(found.image(), expected)
    # A small one is not enlarged.
    assert post(app, "/explain", QUERY, accept="image/png").image().size == (40, 30)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("image/*", "image/png"),
        ("text/html, application/json;q=0.1, */*;q=0.0", "application/json"),
        ("application/json;q=0, */*;q=0.2", "image/png"),
        ("image/avif,image/webp,image/apng,image/*;q=0.8,*/*;q=0.5", "image/webp"),
    ],
)
def test_accept_chooses(app, accept, kind):
    assert post(app, "/explain", QUERY, accept=accept).headers["content-type"] == kind


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "application/json;q=0", "*/*;q=nan"])
def test_what_is_not_on_offer_is_refused(app, accept):
    assert post(app, "/explain", QUERY, accept=accept).error == (406, "no_such_type")


def test_the_decoder_looks_at_the_bytes_and_turns_the_picture(app):
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"):
        assert post(app, "/search", data_of(picture(), kind)).status == 200
    turned = picture(1, (40, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    body = post(app, "/explain", data_of(turned, "JPEG", exif=exif)).json()
    assert (body["picture"], body["extent"]) == ({"width": 30, "height": 40}, [0, 0, 30, 40])


def test_an_image_is_made_again_of_its_pixels(tmp_path, service):
    made, note = service(explainer(built(tmp_path))), PngImagePlugin.PngInfo()
    file = tmp_path / "photos" / "c0" / "000.png"
    own = Image.open(io.BytesIO(file.read_bytes()))
    note.add_text("place", "at home")
    own.save(file, pnginfo=note)
    found = ask(made, "GET", "/items/c0/000.png/image?size=16", accept="image/jpeg")
    shown = found.image()
    assert (shown.format, shown.size, shown.mode) == ("JPEG", (16, 16), "RGB")
    assert b"at home" not in found.body
    small = own.resize((16, 16), Image.Resampling.LANCZOS)
    grey = [np.asarray(one.convert("L"), float).ravel() for one in (shown, small)]
    assert np.corrcoef(*grey)[0, 1] > 0.95


def test_the_own_map(app, index):
    found = ask(app, "GET", "/items/c1/004.png/cam")
    body = found.json()
    ItemCam.model_validate(body)
    with Index.open(index) as opened:
        position = [opened.position("c1/004.png")]
        np.testing.assert_allclose(body["cam"], opened.coarse(position)[0], atol=1e-8)
        norm = np.linalg.norm(opened.weights(position))
    assert body["norm"] == pytest.approx(norm, rel=1e-5)
    assert (body["label"], body["extent"]) == ("c1", [0, 0, 24, 24])
    drawn = ask(app, "GET", "/items/c1/004.png/cam", accept="image/png")
    plain = Image.open(index.parent / "photos" / "c1" / "004.png")
    expected = render_overlay(plain, np.array(body["cam"], np.float32), (0, 0, 24, 24))
    assert_same_picture(drawn.image(), expected)


def test_what_a_browser_has_it_keeps(app, index):
    target = "/items/c0/003.png/image"
    first, told = (ask(app, method, target) for method in ("GET", "HEAD"))
    assert (told.status, told.body, told.headers) == (200, b"", first.headers)
    tag = first.headers["etag"]
    for known in (f'"other", W/{tag}', "*"):
        again = ask(app, "GET", target, if_none_match=known)
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert ask(app, "GET", f"{target}?size=20", if_none_match=tag).status == 200
    assert ask(app, "GET", target, if_none_match=tag, accept="image/webp").status == 200
    file = index.parent / "photos" / "c0" / "003.png"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert ask(app, "GET", target, if_none_match=tag).status == 200


def test_addresses_in_answers_lead_to_the_images(tmp_path, service):
    names = ["a b/ü?#%.png", "a/../b.png", "//x.png", "image", "a/image/cam", "..", 'q"<>&.png']
    lines = ["path,label,id"]
    for number, name in enumerate(names):
        picture(number, (24, 24)).save(tmp_path / f"{number}.png")
        quoted = name.replace('"', '""')
        lines.append(f'{number}.png,{"xy"[number % 2]},"{quoted}"')
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    build_index(find_images(tmp_path / "list.csv"), toy().network, tmp_path / "i", progress=False)
    made = service(explainer(tmp_path / "i", n_neighbors=len(names)))
    for one in post(made, "/explain", QUERY).json()["neighbors"]:
        assert ask(made, "GET", one["image_url"]).status == 200, one["id"]
        assert ask(made, "GET", one["cam_url"]).json()["id"] == one["id"]
        parts = one["image_url"].split("/")
        assert ".." not in parts[2:-1] or one["id"] == ".."
        assert "" not in parts[2:]


def test_pictures_lie_where_the_folder_says(index, tmp_path, service):
    made = service(explainer(index, images=tmp_path))
    gone = ask(made, "GET", "/items/c0/000.png/image")
    assert gone.error == (404, "no_picture")
    assert str(tmp_path) not in gone.message
    body = ask(made, "GET", "/items/c0/000.png/cam").json()
    assert (body["picture"], body["extent"]) == (None, None)
    alone = ask(made, "GET", "/items/c0/000.png/cam?size=64", accept="image/png")
    assert alone.image().size == (64, 64)
    (tmp_path / "c0").mkdir()
    picture(0, (50, 20)).save(tmp_path / "c0" / "000.png")
    assert ask(made, "GET", "/items/c0/000.png/image").image().size == (50, 20)


def test_an_index_without_own_maps_says_so(tmp_path, service):
    made = service(explainer(built(tmp_path, own_maps=False)))
    assert ask(made, "GET", "/items/c0/000.png/cam").error == (404, "no_map")
    body = post(made, "/explain", QUERY).json()
    assert [one["cam"] for one in body["neighbors"]] == [None] * 5


def test_it_is_ready_once_the_network_has_answered(index, service):
    made = service(explainer(index))

    async def life():
        before = await send(made, "GET", "/readyz")
        async with made.router.lifespan_context(made):
            while not made.state.pipeline.ready:
                await asyncio.sleep(0.01)
            within = await send(made, "GET", "/readyz")
        return before, within, await send(made, "GET", "/readyz")

    before, within, after = asyncio.run(life())
    assert before.error == after.error == (503, "not_ready")
    with Index.open(index) as opened:
        about = {"images": 12, "generation": 1, "digest": opened.generation, "words": False}
    assert within.json() == {"status": "ready", **about}


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError, "failed"), (IndexFormatError, "damaged_index")]
)
def test_a_network_that_fails_is_never_ready(index, caplog, service, error, code):
    why = explainer(index)
    made = service(why)

    def fail(*_, **__):
        raise error("secret /etc/network")

    why.explain_batch = fail  # type: ignore[method-assign]
    asyncio.run(made.state.pipeline.probe())
    assert not made.state.pipeline.ready
    found = post(made, "/explain", QUERY)
    assert found.error == (500, code)
    assert "secret" not in found.message
    assert "secret" in caplog.text


def test_requests_are_counted_by_route(index, service):
    made = service(explainer(index))
    post(made, "/explain", QUERY)
    ask(made, "GET", "/items/nothing/image")
    ask(made, "BREW", "/made-up/" + "x" * 50)
    text = ask(made, "GET", "/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    told = text.body.decode()
    for line in (
        "embedcam_batch_pictures_count 1.0", "embedcam_in_progress 0.0", "embedcam_ready 0.0",
        'requests_total{method="POST",route="/explain",status="200"} 1.0',
        'requests_total{method="GET",route="/items/{id:path}/image",status="404"} 1.0',
        'requests_total{method="other",route="other",status="404"} 1.0',
    ):  # fmt: skip
        assert f"{line}\n" in told
    assert "made-up" not in told


def test_a_map_of_an_index_built_anew_is_sent_anew(tmp_path, service):
    tags = []
    for seed in (0, 1):
        index = built(tmp_path, recipe=dense(seed=seed))
        os.utime(tmp_path / "photos" / "c0" / "000.png", (1, 1))
        made = service(explainer(index))
        tags.append(ask(made, "GET", "/items/c0/000.png/cam").headers["etag"])
        shutil.rmtree(index)
    assert tags[0] != tags[1]


def test_a_version_that_cannot_be_served_is_not_ready(tmp_path, service):
    index = built(tmp_path)
    made = service(explainer(index))
    pipeline = made.state.pipeline
    pipeline.ready = True
    remove(index, list(pipeline.index.ids))
    with pytest.raises(InputError, match="every image was removed; add images first"):
        pipeline.reload()
    assert ask(made, "GET", "/readyz").status == 503
    for folder in (index, tmp_path / "photos"):
        shutil.rmtree(folder)
    built(tmp_path)
    assert [pipeline.reload(), pipeline.reload()] == [True, False]
    assert ask(made, "GET", "/readyz").status == 200


def test_a_changed_index_is_served_after_a_reload(tmp_path, service):
    why = explainer(built(tmp_path))
    made = service(why)
    made.state.pipeline.ready = True
    before = ask(made, "GET", "/readyz").json()
    tag = ask(made, "GET", "/items/c0/000.png/image").headers["etag"]
    paint(tmp_path / "photos", range(12, 15))
    every = find_images(tmp_path / "photos")
    new = ImageSource([one for one in every.items if one.id not in why.index.ids], every.root)
    add_images(new, why.network, tmp_path / "photos.index", progress=False)
    assert ask(made, "GET", "/items/c0/012.png/image").error == (404, "unknown_image")
    assert why.reload()
    after = ask(made, "GET", "/readyz").json()
    assert (before["images"], after["images"]) == (12, 15)
    assert after["generation"] > before["generation"]
    for name, known in (("012", "none"), ("000", tag)):
        found = ask(made, "GET", f"/items/c0/{name}.png/image", if_none_match=known)
        assert found.status == 200
    assert len(post(made, "/explain?n_neighbors=100", QUERY).json()["neighbors"]) == 15
    why.close()


def test_a_line_a_request(app, caplog):
    with caplog.at_level(logging.INFO, "embedcam.service"):
        post(app, "/explain?result=c0%2F000.png", QUERY)
        ask(app, "GET", "/items/a%0Aforged%20GET%20/x/image")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("POST /explain 200 ")
    assert second.startswith("GET /items/a%0Aforged%20GET%20/x/image 404 ")


def test_nothing_on_disk_changes_and_browsers_trust_nothing_else(app, index):
    before = everything(index.parent)
    for found in (
        post(app, "/explain", QUERY, accept="image/png"),
        ask(app, "GET", "/items/c0/000.png/image"),
        ask(app, "GET", "/nothing"),
    ):
        assert found.headers["content-security-policy"].startswith("default-src 'self';")
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in found.headers
    assert everything(index.parent) == before


def test_the_page_s_files_are_served_and_no_others(app):
    front = ask(app, "GET", "/")
    assert front.headers["content-type"] == "text/html; charset=utf-8"
    sources = re.findall(r'(?:src|href)="([a-z]+\.[a-z]+)"', front.body.decode())
    assert {"main.js", "style.css", "icon.svg", "openapi.json"} <= set(sources)
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for source in sources:
        found = ask(app, "GET", f"/{source}")
        kind = kinds.get(source.rpartition(".")[2], "application/json")
        assert (found.status, found.headers["content-type"].partition(";")[0]) == (200, kind)
    tag = ask(app, "GET", "/main.js").headers["etag"]
    for target, status in (("/main.js", 304), ("/style.css", 200)):
        again = ask(app, "GET", target, if_none_match=tag)
        assert (again.status, again.headers["cache-control"]) == (status, "no-cache")
    for target in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/app.py", "/page/main.js"):
        assert ask(app, "GET", target).error == (404, "unknown_path")
    for method, target in (("POST", "/"), ("GET", "/explain"), ("POST", "/main.js")):
        assert ask(app, method, target).error == (405, "unknown_method")


def test_only_names_of_its_own(index, service):
    made = service(explainer(index), hosts=["localhost", "127.0.0.1", "[::1]"])
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert ask(made, "GET", "/healthz", host=host).status == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
        found = post(made, "/explain", QUERY, host=host)
        assert found.error == (403, "wrong_host")
        assert "evil" not in found.message


def test_an_explainer_that_cannot_is_refused(index, tmp_path, service):
    with pytest.raises(InputError, match="give the Explainer the network"):
        service(Explainer(index))
    with pytest.raises(InputError, match="needs an Explainer; given str"):
        service("index")
    with pytest.raises(InputError, match="built without FAISS, so a service cannot search"):
        service(explainer(built(tmp_path, recipe=dense(faiss="none"))))
    for limits, said in (
        ({"body_bytes": 0}, "body_bytes = 0; give a whole number of at least 1"),
        ({"concurrency": 1.5}, "concurrency = 1.5; give a whole number"),
        ({"seconds": float("nan")}, "seconds = nan; give a number of at least 0.01"),
    ):
        with pytest.raises(InputError, match=said):
            Limits(**limits)


def test_ids_are_quoted():
    asked = Request({"type": "http", "root_path": "/proxy"})
    for name, quoted in (("c0/a b", "c0/a%20b"), ("a/../b", "a%2F..%2Fb"), ("\ud800", "%3F")):
        assert urls_of(asked, name)["cam_url"] == f"/proxy/items/{quoted}/cam"


def test_examples_are_from_all_over_the_index(app):
    items = ask(app, "GET", "/examples?count=4").json()["items"]
    ids = app.state.pipeline.index.ids
    assert [one["id"] for one in items] == [ids[place] for place in (0, 3, 7, 11)]
    assert len(ask(app, "GET", "/examples?count=24").json()["items"]) == 12
    assert ask(app, "GET", "/examples?count=25").error == (422, "unusable_parameter")
