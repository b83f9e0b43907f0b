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
    now, before = COLLECTED[part](), saved(part)
    assert now.keys() == before.keys()
    for name in before:
        assert now[name] == before[name], name
