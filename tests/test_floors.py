"""The direction of the data: a file imports only from the floors below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "embedcam"

FLOORS = {
    -2: ["printing"],
    -1: ["errors", "interrupts"],
    0: ["calibration", "number_labels"],
    1: [
        "_files",
        "cam",
        "classes",
        "encoding",
        "forking",
        "identity",
        "matching",
        "memory",
        "metrics",
        "preprocess",
        "probe",
        "progress",
        "queries",
        "transfer",
    ],
    2: [
        "images",
        "index",
        "network",
        "onnx_network",
        "registry",
        "render",
        "scratch",
        "targets",
        "triplets",
    ],
    3: [
        "fingerprint",
        "match_fit",
        "models",
        "neighborhoods",
        "neighbors",
        "number_triplets",
        "recipe",
        "weights",
    ],
    4: ["cotangents", "explanation", "export", "finer", "methods", "opened"],
    5: ["answer", "fallback", "passes", "trust"],
    6: ["assembly", "explain", "pairs", "prototypes"],
    7: ["build", "report"],
    8: ["demo", "evaluate", "features"],
    9: ["service"],
    10: ["cli"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# What a room must not load even indirectly: `explain` draws without back-propagation because the
# floors that differentiate are out of its reach, and `index` serves processes without torch.
FORBIDDEN = {
    "index": {"torch", "torchvision"},
    "explain": {"torch", "torchvision"},
    "answer": {"torch", "torchvision"},
    "opened": {"torch", "torchvision"},
    "neighbors": {"torch", "torchvision"},
    "forking": {"torch", "torchvision"},
    "explanation": {"torch", "torchvision"},
    "finer": {"torch", "torchvision"},
    "identity": {"torch", "torchvision", "faiss"},
    "onnx_network": {"torch", "torchvision", "faiss", "onnx"},
    "probe": {"torch", "torchvision", "faiss"},
    "queries": {"torch", "torchvision", "faiss"},
    "transfer": {"torch", "torchvision", "faiss"},
    "encoding": {"torch", "torchvision", "faiss"},
    "targets": {"torch", "torchvision", "faiss"},
    "registry": {"torch", "torchvision", "faiss"},
    "triplets": {"torch", "torchvision", "faiss"},
    "metrics": {"torch", "torchvision", "faiss"},
    "pairs": {"torch", "torchvision", "faiss"},
    "prototypes": {"torch", "torchvision", "faiss"},
    "report": {"torch", "torchvision", "faiss"},
}


def room_of(file: Path) -> str:
    """The room of a file: its name, or the folder under the package it lies in."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(tree: ast.AST, file: Path) -> set[str]:
    """Dotted names a module imports when it runs, function bodies included, typing aside."""
    found: set[str] = set()
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
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("embedcam", *file.relative_to(PACKAGE).parent.parts)
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base]).rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def source_files() -> list[Path]:
    return sorted(
        p for p in PACKAGE.rglob("*.py") if p.name != "__main__.py" or p.parent != PACKAGE
    )


@pytest.mark.parametrize("file", source_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{room} has no floor: add it to FLOORS"
    for name in imports(ast.parse(file.read_text()), file):
        if not name.startswith("embedcam."):
            continue
        other = name.split(".")[1]
        if other == room or other not in FLOOR_OF:
            continue
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}, which is not below it"


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_without_torch(room: str) -> None:
    files = [f for f in source_files() if room_of(f) == room]
    for file in files:
        heads = {name.split(".")[0] for name in imports(ast.parse(file.read_text()), file)}
        assert not heads & FORBIDDEN[room], f"{file.name} imports {heads & FORBIDDEN[room]}"


def test_the_floor_test_can_fail() -> None:
    file = PACKAGE / "transfer.py"
    found = imports(ast.parse("from .build import build\nimport torch.nn"), file)
    assert {"embedcam.build", "torch.nn"} <= found
