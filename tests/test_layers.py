"""The direction of the data: packages import one another in layers, without a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "embedcam"
MOST_LAYERS = 9
MOST_AT_THE_ROOT = 28
WITHOUT_TORCH = [
    "_checks", "_files", "_options", "errors", "explain", "images", "index", "metrics", "onnx",
    "ops", "pairs", "preprocess", "prototypes", "recipe", "render", "report", "targets",
]  # fmt: skip


def package_of(file: Path) -> str:
    """Return the entry at the package's root that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST, file: Path) -> set[str]:
    """Return the dotted names a module imports when it runs, functions included, typing aside."""
    names: set[str] = set()
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("embedcam", *file.relative_to(PACKAGE).parent.parts)
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def source_files() -> list[Path]:
    return sorted(f for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE or f.stem[:2] != "__")


@cache
def below(package: str) -> frozenset[str]:
    """Return the packages that a package imports."""
    known = {package_of(file) for file in source_files()}
    names = {
        name.split(".")[1]
        for file in source_files()
        if package_of(file) == package
        for name in imports(ast.parse(file.read_text(encoding="utf-8")), file)
        if name.startswith("embedcam.")
    }
    return frozenset(names & known - {package})


def reached_from(package: str) -> set[str]:
    """Return the packages a package reaches through every import, itself included."""
    reached, ahead = set[str](), [package]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += below(name)
    return reached


def layer(package: str) -> int:
    """Return the length of the longest chain of imports that begins at a package."""
    return 1 + max(map(layer, below(package)), default=0)


@pytest.mark.parametrize("package", sorted({package_of(f) for f in source_files()}))
def test_a_package_is_in_no_circle_of_imports(package: str) -> None:
    for name in below(package):
        assert package not in reached_from(name), f"{package} and {name} import each other"


def test_the_layers_are_few() -> None:
    packages = {package_of(file) for file in source_files()}
    assert max(map(layer, packages)) <= MOST_LAYERS
    entries = [e for e in PACKAGE.iterdir() if e.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_AT_THE_ROOT, sorted(entry.name for entry in entries)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_packages_without_torch(package: str) -> None:
    for file in source_files():
        if package_of(file) == package:
            heads = {name.split(".")[0] for name in imports(ast.parse(file.read_text()), file)}
            assert not heads & {"torch", "torchvision"}, file.name


def test_offline_and_online_meet_only_on_disk() -> None:
    reached = reached_from("explain")
    assert {"ops", "index"} <= reached
    assert not reached & {"targets", "methods", "offline", "network"}
    assert "explain" not in reached_from("offline")


def test_the_reader_of_imports_can_fail() -> None:
    names = imports(ast.parse("from .offline import build\nimport torch.nn"), PACKAGE / "ops.py")
    assert {"embedcam.offline.build", "torch.nn"} <= names
