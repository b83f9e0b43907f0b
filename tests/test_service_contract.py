"""Requests generated from the service's own description, the answers held against it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from service_client import awake, data_of, picture

from embedcam.service.pictures import RAW_TYPES

GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
TAKING = [("POST", "/explain"), ("POST", "/search"), ("POST", "/compare")]
TAKING += [("GET", "/items/{id}/image"), ("GET", "/items/{id}/cam")]
# Where nothing is taken, nothing can be wrong.
CASES = [(mode, *one) for one in TAKING for mode in (GOOD, BAD)]
CASES += [(GOOD, "GET", path) for path in ("/healthz", "/readyz", "/metrics")]
KINDS = st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"])
PICTURES = st.builds(lambda seed, kind: data_of(picture(seed), kind), st.integers(0, 9), KINDS)


@pytest.fixture(scope="module")
def description(app):
    app.state.pipeline.ready = True
    for kind in RAW_TYPES:  # bytes at random are no picture, and are refused as they should be
        schemathesis.openapi.media_type(kind, PICTURES)
    return schemathesis.openapi.from_asgi("/openapi.json", awake(app))


@pytest.mark.parametrize(("mode", "method", "path"), CASES)
def test_answers_keep_to_the_description(description, mode, method, path):
    operation, seen = description[path][method], list[int]()
    known = st.sampled_from([None, "c0/000.png", "c1/004.png"])

    @given(st.data())
    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    def check(data):
        fixed: dict[str, Any] = {}
        # Of ids at random there is none.
        name = data.draw(known) if mode is GOOD else None
        if name and "{id}" in path:
            fixed["path_parameters"] = {"id": name}
        if name and path == "/compare":
            fixed["query"] = {"result": [name]}
        case = data.draw(operation.as_strategy(mode, **fixed))
        seen.append(case.call_and_validate().status_code)

    check()
    if mode is GOOD:
        assert 200 in seen
        assert set(seen) <= {200, 404}
    else:
        assert all(400 <= status < 500 for status in seen)
