"""The direction of the data: packages import one another in layers, without a circle."""

import pytest

from scripts.architecture import PACKAGE, below, imports, layer, modules, reached

MOST_LAYERS = 9
MOST_AT_THE_ROOT = 28
WITHOUT_TORCH = [
    "_checks", "_files", "_options", "errors", "explain", "images", "index", "metrics", "onnx",
    "ops", "pairs", "preprocess", "prototypes", "recipe", "render", "report", "targets",
]  # fmt: skip


@pytest.mark.parametrize("package", modules())
def test_a_package_is_in_no_circle_of_imports(package: str) -> None:
    for name in below()[package]:
        assert package not in reached(name), f"{package} and {name} import each other"


def test_the_layers_are_few() -> None:
    assert 1 + max(map(layer, modules())) <= MOST_LAYERS
    entries = [e for e in PACKAGE.iterdir() if e.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_AT_THE_ROOT, sorted(entry.name for entry in entries)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_packages_without_torch(package: str) -> None:
    for file in modules()[package]:
        heads = {name.split(".")[0] for name in imports(file)}
        assert not heads & {"torch", "torchvision"}, file.name


def test_offline_and_online_meet_only_on_disk() -> None:
    assert {"ops", "index"} <= reached("explain")
    assert not reached("explain") & {"targets", "methods", "offline", "network"}
    assert "explain" not in reached("offline")


def test_the_reader_of_imports_can_fail() -> None:
    names = imports(PACKAGE / "ops.py", "from .offline import build\nimport torch.nn")
    assert {"embedcam.offline.build", "torch.nn"} <= names
