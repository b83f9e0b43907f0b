"""What the package offers, and that importing it costs nothing."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import embedcam

HEAVY = ("torch", "torchvision", "numpy", "faiss", "matplotlib", "PIL", "sklearn", "tqdm", "timm")


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh process holds after running some code."""
    told = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", told], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", embedcam.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(embedcam, name)
    if name == "__version__":
        assert found == version("embedcam")
        return
    assert found is getattr(import_module(f"embedcam.{embedcam._WHERE[name]}"), name)
    assert len(found.__doc__.strip()) > 10


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'embedcam' has no attribute 'Explaner'"):
        _ = embedcam.Explaner  # type: ignore[attr-defined]


def test_what_type_checkers_see_is_what_is_there() -> None:
    tree = ast.parse(Path(embedcam.__file__).read_text(encoding="utf-8"))
    tests = {ast.unparse(n.test): n.body for n in tree.body if isinstance(n, ast.If)}
    imports = [node for node in tests["TYPE_CHECKING"] if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == embedcam._WHERE
    assert set(seen) == set(embedcam.__all__) - {"__version__"}
    assert dir(embedcam) == sorted(embedcam.__all__)
    assert (Path(embedcam.__file__).parent / "py.typed").exists()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import embedcam") == set()
    assert loaded_after("from embedcam.cli.parser import parser\nparser().format_help()") == set()


@pytest.mark.parametrize(
    "module", ["index", "explain", "ops", "images", "metrics", "render", "onnx", "preprocess"]
)
def test_what_serves_queries_needs_no_torch(module: str) -> None:
    loaded = loaded_after(f"import embedcam.{module}")
    assert not loaded & {"torch", "torchvision", "timm", "sklearn", "matplotlib"}
