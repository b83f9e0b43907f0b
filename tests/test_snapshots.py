"""What users hold on to stays as it is written in tests/snapshots."""

from collections.abc import Iterator

import pytest
from snapshots import COLLECTED, saved, working_folder


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    with working_folder():
        yield


@pytest.mark.parametrize("part", COLLECTED)
@pytest.mark.filterwarnings("default")
def test_what_users_hold_on_to_is_as_it_was(part: str) -> None:
    pytest.importorskip({"json": "onnx", "openapi": "fastapi"}.get(part, "torch"))
    now, before = COLLECTED[part](), saved(part)
    assert now.keys() == before.keys()
    for name, was in before.items():
        if part == "public" and isinstance(was, dict):  # a class may offer more than it did
            assert {key: now[name].get(key) for key in was} == was, name
        else:
            assert now[name] == was, name
