"""Settings every test shares."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

# Seeded and without a database: the same examples on every machine, no folder left behind.
hypothesis.settings.register_profile(
    "embedcam", database=None, deadline=None, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("embedcam")
# Pictures are drawn without a screen.
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture
def same_draws() -> Iterator[None]:
    """Draw the same random numbers in every test, whatever ran before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
