"""Settings every test shares."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Seeded and without a database: the same examples on every machine, no folder left behind.
hypothesis.settings.register_profile(
    "embedcam", database=None, deadline=None, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("embedcam")
# Pictures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")

if TYPE_CHECKING:
    from embedcam import EmbeddingNetwork, Explainer


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from photo_samples import write_photos

    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="session")
def network() -> "EmbeddingNetwork":
    from photo_samples import network_of

    return network_of()


@pytest.fixture(scope="session")
def dense(
    photos: Path, network: "EmbeddingNetwork", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index of the photos with dense weights."""
    from photo_samples import DENSE, build

    return build(photos, tmp_path_factory.mktemp("dense") / "dense", network, DENSE)


@pytest.fixture
def explainer(dense: Path, network: "EmbeddingNetwork") -> "Iterator[Explainer]":
    from embedcam import Explainer, Index

    with Index.open(dense) as index:
        yield Explainer(index, network, n_neighbors=3)
