"""scripts/trust.py: the calibration without strangers."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from embedcam import trust

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("trust_script", SCRIPTS / "trust.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        yield loaded
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in set(sys.modules) - before:
            where = getattr(sys.modules[name], "__file__", None) or ""
            if where.startswith(str(SCRIPTS)):
                del sys.modules[name]


def test_the_same_images_are_fitted_again_without_strangers(script: ModuleType) -> None:
    generator = np.random.default_rng(0)
    evidence, novel = generator.normal(size=(60, 7)), generator.normal(size=(120, 7)) - 1
    true, strange = generator.random(60), generator.random(120) / 2
    nearest = generator.random(60)
    given = (evidence, true, novel, strange, nearest)
    usual = trust.fit_calibration
    with script.alone() as fitted:
        made = trust.fit_calibration(*given, neighbors=5, seed=3)
        one = trust.fit_calibration(evidence[:, 3:], true, novel[:, 3:], strange, nearest,
                                    neighbors=1)  # fmt: skip
    assert trust.fit_calibration is usual
    assert made == usual(*given, neighbors=5, seed=3)
    none = np.empty((0, 7)), np.empty(0)
    assert fitted["several"] == usual(evidence, true, *none, nearest, neighbors=5, seed=3)
    assert fitted["several"] != made
    assert fitted["one"].mean == pytest.approx(evidence[:, 3:].mean(0))
    assert one.mean == pytest.approx(np.concatenate([evidence, novel])[:, 3:].mean(0))


def test_the_package_is_put_back_after_an_error(script: ModuleType) -> None:
    usual = trust.fit_calibration

    def fail() -> None:
        with script.alone():
            assert trust.fit_calibration is not usual
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert trust.fit_calibration is usual
