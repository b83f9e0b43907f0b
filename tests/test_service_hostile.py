"""What nobody honest sends: each is refused with its status and one sentence, and costs little."""

import tracemalloc
from collections.abc import Callable

import pytest
from PIL import Image
from service_client import BOUNDARY, FORM, ask, built, data_of, explainer, form, picture, post

from embedcam.service import Limits, create_app
from embedcam.service.pictures import MAX_SCANS
from scripts.benchmarks import load as hostile

LIMITS = Limits(body_bytes=3_000_000, seconds=10)
QUERY = data_of(picture(3))
JPEG = data_of(picture(3), "JPEG")
POLYGLOT = data_of(Image.new("P", (0x2A2F, 2), 1), "GIF") + b"*/=1;alert(1)"


@pytest.fixture(scope="module")
def app(index):
    made = create_app(explainer(index), limits=LIMITS)
    yield made
    made.state.pipeline.close()


def besides(comment):
    return JPEG[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + JPEG[2:]


REFUSED: dict[tuple[int, str], dict[str, Callable[[], bytes]]] = {
    (413, "too_many_pixels"): {"100,000 x 100,000": hostile.claimed, "a bomb": hostile.bomb},
    (422, "unreadable_image"): {
        "one pixel high": lambda: hostile.png(200_000, 1, b""),
        "a long strip": lambda: data_of(Image.new("L", (1, 101))),
        "no pixels": lambda: hostile.png(0, 10, b""),
        "a truncated JPEG": lambda: JPEG[: len(JPEG) // 2],
        "a truncated PNG": lambda: QUERY[: len(QUERY) // 2],
        "a marker that stands alone": lambda: JPEG[:2] + b"\xff\x01" + JPEG[2:],
        "a JPEG of many scans": lambda: hostile.scans(MAX_SCANS + 1),
        "a script that looks like a GIF": lambda: b"GIF89a/*" + bytes(20) + b"*/=1;alert(1);//",
        "a PDF before a JPEG": lambda: b"%PDF-1.4\n" + JPEG,
        "SVG": lambda: hostile.SVG,
        "HTML": lambda: b"<html><script>alert(1)</script>",
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zeros": lambda: bytes(1000),
    },
    (422, "several_kinds"): {
        "a JPEG that is a ZIP too": hostile.archive,
        "a JPEG that is HTML too": lambda: JPEG + b"<HTML><p>",
        "a JPEG with a script in a comment": lambda: besides(b"<script>alert(1)</script>"),
        "a PNG that is PHP too": lambda: QUERY + b"<?php system($_GET[0]);",
        "a JPEG that is a PDF too": lambda: besides(b"%PDF-1.4\n"),
        "a GIF that is a script too": lambda: POLYGLOT,
    },
    (422, "empty_body"): {"nothing": lambda: b""},
    (413, "body_too_long"): {"too much": lambda: bytes(LIMITS.body_bytes + 1)},
}
BODIES = {name: (make, error) for error, made in REFUSED.items() for name, make in made.items()}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("in_form", [False, True], ids=["body", "form"])
def test_hostile_pictures(app, name, in_form):
    make, error = BODIES[name]
    data = make()
    body, kind = (form(data), FORM) if in_form else (data, "image/png")
    for target in ("/explain", "/search"):
        found = ask(app, "POST", target, body, content_type=kind)
        assert found.error == error
        assert "alert" not in found.message
        assert "0x" not in found.message


ANSWERED: dict[str, Callable[[], bytes]] = {
    "data beyond its pixels": hostile.overlong,
    "a GIF of 5,000 frames": lambda: hostile.animation(5000),
    "a TIFF of 300 pages": lambda: hostile.pages(300),
    "a JPEG of as many scans as are allowed": lambda: hostile.scans(MAX_SCANS - 20),
    "a JPEG before a film": lambda: JPEG + b"\xff\xda\x00\x08" * 5000,
    "a JPEG with a comment": lambda: besides(b"a secret"),
    "a JPEG with a second one": lambda: JPEG + JPEG,
    "a bomb in a comment": hostile.text_bomb,  # never inflated
}


@pytest.mark.parametrize("name", ANSWERED)
def test_strange_pictures_are_their_first_pixels(app, name):
    data = ANSWERED[name]()
    found = post(app, "/explain", data)
    assert found.status == 200
    drawn = post(app, "/explain", data, accept="image/png")
    assert b"secret" not in found.body + drawn.body
    if "film" in name:
        assert found.json() == post(app, "/explain", JPEG).json()


def test_none_of_it_is_kept(app):
    """What Python and NumPy hold after each hostile picture has come twice more."""
    post(app, "/explain", QUERY)
    bodies = [make() for make, _ in BODIES.values()]
    for body in bodies:
        post(app, "/explain", body)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for body in bodies * 2:
        post(app, "/explain", body)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 400_000
    assert peak - before < 40_000_000


LAST = f"--{BOUNDARY}--\r\n".encode()
NAMELESS = f"--{BOUNDARY}\r\nContent-Type: image/png\r\n\r\nx\r\n--{BOUNDARY}--".encode()
ENDLESS = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name={'x' * 100_000}".encode()
FORMS: dict[str, tuple[bytes, str, tuple[int, str]]] = {
    "another name": (form(QUERY, "file"), FORM, (422, "unknown_part")),
    "twice": (form(QUERY)[: -len(LAST)] + form(QUERY), FORM, (422, "too_many_parts")),
    "cut off": (form(QUERY)[:-20], FORM, (422, "broken_form")),
    "no parts": (LAST, FORM, (422, "empty_body")),
    "an empty part": (form(b""), FORM, (422, "empty_body")),
    "no boundary": (form(QUERY), "multipart/form-data", (422, "broken_form")),
    "another boundary": (form(QUERY), FORM + "x", (422, "broken_form")),
    "an endless boundary": (form(QUERY), FORM + 5000 * "x", (422, "broken_form")),
    "long headers": (form(QUERY, filename=f'filename="{"x" * 8192}"'), FORM, (422, "broken_form")),
    "endless headers": (ENDLESS, FORM, (422, "broken_form")),
    "no name": (NAMELESS, FORM, (422, "unknown_part")),
    "near boundaries by the million": (form(b"\r\n--" * 500_000), FORM, (422, "unreadable_image")),
    "JSON": (b'{"image": "aGk="}', "application/json", (422, "unusable_text")),
    "a form of text": (b"image=x", "application/x-www-form-urlencoded", (415, "unusable_type")),
    "SVG by name": (hostile.SVG, "image/svg+xml", (415, "unusable_type")),
    "no type at all": (QUERY, "nonsense", (415, "unusable_type")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_hostile_forms(app, name):
    body, kind, expected = FORMS[name]
    assert ask(app, "POST", "/explain", body, content_type=kind).error == expected


FILENAMES = [
    'filename="../../etc/passwd"', 'filename="x\\"; name=\\"other"', 'filename="\xff\xfe"',
    "filename*=UTF-8''%0d%0aSet-Cookie:%20a=b", "filename=", 'filename="a\r\nSet-Cookie: a=b"',
]  # fmt: skip


@pytest.mark.parametrize("filename", FILENAMES)
def test_file_names_mean_nothing(app, filename):
    found = ask(app, "POST", "/search", form(QUERY, filename=filename), content_type=FORM)
    if "\n" in filename:  # a field with a broken head
        assert found.status in (200, 422)
    else:
        assert found.json() == post(app, "/search", QUERY).json()
    assert "set-cookie" not in found.headers


@pytest.mark.parametrize("length", ["-1", "1e3", "nan", "\xb3", "9" * 30, "0x10", "1, 2"])
def test_lengths_that_are_no_numbers(app, length):
    found = ask(app, "POST", "/explain", [QUERY], content_type="image/png", content_length=length)
    assert found.error == (400, "unusable_header")


NUMBERS = [
    "0", "-1", "1000000", "101", "nan", "-inf", "1e2", "1.5", "0x5", "", "1%00", "%00",
    "%EF%BC%95%EF%BC%95x", "true", "9" * 5000, "-" + "9" * 400, "5;6", "[5]", "%ff%fe",
]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: value[:20])
def test_hostile_numbers(app, value):
    fits = value == "101"  # of a size, and no number of neighbours
    for asked in ("explain?n_neighbors", "search?n_neighbors", "explain?detail"):
        found = post(app, f"/{asked}={value}", QUERY)
        assert found.error == (422, "unusable_parameter")
        assert "9999" not in found.message
    assert post(app, f"/explain?map_size={value}", QUERY).status == (200 if fits else 422)
    for what in ("image", "cam"):
        found = ask(app, "GET", f"/items/c0/000.png/{what}?size={value}")
        assert found.status == (200 if fits else 422)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("n_neighbors=3&n_neighbors=4", "repeated_parameter"),
        ("result=a&result=b", "repeated_parameter"),
        ("__proto__=3", "unknown_parameter"),
        ("&".join(f"a{number}=1" for number in range(900)), "unknown_parameter"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_parameters(app, query, code):
    assert post(app, f"/explain?{query}", QUERY).error == (422, code)


IDS = [
    "../photos.index/manifest.json", "..%2Fphotos.index%2Fmanifest.json", "%2e%2e/etc/passwd",
    "c0/../../photos.index/manifest.json", "/etc/passwd", "%2Fetc%2Fpasswd", "//etc/passwd",
    "c0/000.png%00", "%00", "c0/000.png%00.jpg", "..", ".", "", "c0", "c0/", "/c0/000.png",
    "c0//000.png", "./c0/000.png", "C0/000.PNG", "c0\\000.png", "c0%5C000.png", "c0/000%ff.png",
    "%c0%ae%c0%ae/x", "%25%32%65%25%32%65/x", "x" * 10_000, "%F0%9F%A6%89" * 100, "%0d%0aA:%20b",
    "file:///etc/passwd", "http://127.0.0.1/x", "c0/000.png%3Fx", "c0/000.png;a=b", "~root/.ssh",
    "c0/000.png/image", "*", "c%3F/000.png", "'%20OR%201=1--", "{{7*7}}",
]  # fmt: skip


@pytest.mark.parametrize("name", IDS, ids=lambda name: name[:40] or "empty")
def test_ids_that_no_image_has(app, index, name):
    for what in ("image", "cam"):
        found = ask(app, "GET", f"/items/{name}/{what}")
        # No route takes a line break.
        assert found.error == (404, "unknown_path" if "%0a" in name else "unknown_image")
    found = post(app, f"/explain?result={name.replace('&', '%26').replace(';', '%3B')}", QUERY)
    assert found.error[0] == 404
    assert str(index.parent) not in found.message


def test_an_index_cannot_send_the_service_elsewhere(tmp_path, monkeypatch, service):
    made = built(tmp_path / "a")
    picture(0).save(tmp_path / "secret.png")
    why = explainer(made, images=tmp_path / "a" / "photos")
    app = service(why)
    for crafted in ("../../secret.png", str(tmp_path / "secret.png"), "c0/../../../secret.png"):
        with monkeypatch.context() as patch:
            paths = property(lambda rows, one=crafted: [one] * len(rows.positions))
            patch.setattr(type(why.index.select([0])), "paths", paths)
            image = ask(app, "GET", "/items/c0/000.png/image")
            receipt = post(app, "/compare?result=c0%2F000.png", QUERY)
            assert image.error == receipt.error == (404, "no_picture"), crafted
            assert ask(app, "GET", "/items/c0/000.png/cam").json()["picture"] is None
    assert ask(app, "GET", "/items/c0/000.png/image").status == 200

    for content in (b"root:x:0:0", b"", JPEG[:200]):
        (tmp_path / "a" / "photos" / "c0" / "000.png").write_bytes(content)
        found = ask(app, "GET", "/items/c0/000.png/image")
        assert (found.error, str(tmp_path) in found.message) == ((404, "no_picture"), False)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("HEAD", "/explain", 405), ("DELETE", "/items/c0/000.png/image", 405),
        ("TRACE", "/healthz", 405), ("CONNECT", "/healthz", 405), ("BREW", "/healthz", 405),
        ("GET", "/docs", 404), ("GET", "/explain/", 404), ("GET", "/%00", 404), ("GET", "//", 404),
        ("GET", "/.git/config", 404), ("GET", "/" + "a" * 50_000, 404),
    ],
)  # fmt: skip
def test_unknown_addresses_and_methods(app, method, target, status):
    found = ask(app, method, target)
    assert (found.status if method == "HEAD" else found.error[0]) == status
    assert ("allow" in found.headers) == (status == 405)


def test_heads_that_are_too_long_or_of_two_lengths_close_the_connection(app):
    assert ask(app, "GET", "/healthz", x="a" * 60_000).status == 200
    long = ask(app, "GET", "/healthz", x="a" * 33_000, y="a" * 33_000)
    assert (long.error, long.headers["connection"]) == ((431, "head_too_long"), "close")
    for name in ("Transfer-Encoding", "transfer-encoding"):
        two = ask(app, "POST", "/search", QUERY, **{name: "chunked", "content_length": "4"})
        assert (two.error, two.headers["connection"]) == ((400, "broken_request"), "close")
