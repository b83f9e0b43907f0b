"""Requests generated from the service's own description, the answers held against it.

Well-formed and malformed ones, few and seeded; what exactly is answered is tested elsewhere.
"""

from typing import Any

import pytest
import schemathesis
from build_samples import quicken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from service_client import awake, built, data_of, explainer, picture

from embedcam.service import create_app
from embedcam.service.pictures import RAW_TYPES

POST = ["/explain", "/search", "/compare"]
GET = ["/items/{id}/image", "/items/{id}/cam", "/healthz", "/readyz", "/metrics"]
OPERATIONS = [*(("POST", path) for path in POST), *(("GET", path) for path in GET)]
CASES = [
    (mode, method, path)
    for method, path in OPERATIONS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Where nothing is taken, nothing can be wrong.
    if mode is GenerationMode.POSITIVE or path in (*POST, *GET[:2])
]
PICTURES = st.builds(
    lambda seed, kind: data_of(picture(seed), kind),
    st.integers(0, 9),
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        index = built(tmp_path_factory.mktemp("contract"))
    made = create_app(explainer(index))
    made.state.pipeline.ready = True
    yield made
    made.state.pipeline.close()


@pytest.fixture(scope="module")
def description(app):
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
        name = data.draw(known) if mode is GenerationMode.POSITIVE else None
        if name and "{id}" in path:
            fixed["path_parameters"] = {"id": name}
        if name and path == "/compare":
            fixed["query"] = {"result": [name]}
        case = data.draw(operation.as_strategy(mode, **fixed))
        seen.append(case.call_and_validate().status_code)

    check()
    if mode is GenerationMode.POSITIVE:
        assert 200 in seen
        assert set(seen) <= {200, 404}
    else:
        assert all(400 <= status < 500 for status in seen)
