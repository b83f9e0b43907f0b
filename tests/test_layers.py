"""The direction of the data: packages import one another in layers, without a circle."""

import pytest

from scripts.architecture import PACKAGE, below, layer, modules, package_of, reached

MOST_LAYERS = 9
MOST_AT_THE_ROOT = 29
WITHOUT_TORCH = {
    "_checks", "_files", "_options", "errors", "explain", "images", "index", "metrics", "onnx",
    "ops", "pairs", "preprocess", "prototypes", "recipe", "render", "report", "stores", "targets",
}  # fmt: skip


@pytest.mark.parametrize("package", sorted(below()))
def test_a_package_is_in_no_circle_of_imports(package: str) -> None:
    ahead, met = set(below()[package]), set[str]()
    while ahead - met:
        name = (ahead - met).pop()
        met.add(name)
        ahead |= below()[name]
    assert package not in met


def test_the_layers_are_few() -> None:
    assert max(map(layer, below())) < MOST_LAYERS
    entries = [e for e in PACKAGE.iterdir() if e.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_AT_THE_ROOT, sorted(entry.name for entry in entries)


def test_packages_without_torch() -> None:
    assert below().keys() >= WITHOUT_TORCH
    for file, names in modules().items():
        if package_of(file) in WITHOUT_TORCH:
            heads = {name.split(".")[0] for name in names}
            assert not heads & {"torch", "torchvision"}, file


def test_offline_and_online_meet_only_on_disk() -> None:
    online = reached("explain")
    assert online >= {"ops", "index"}
    assert not online & {"targets", "methods", "offline", "network"}
    assert "explain" not in reached("offline")
