"""The README is true: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mobilenet_v2

from embedcam.cli.parser import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STORES = sorted((ROOT / "docs" / "stores").glob("*.md"))
"""Their Python is run by tests of their own."""


def blocks(language: str, page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for label in ("owl", "gull"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (90, 120, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = mobilenet_v2()
    save_file(made.state_dict(), tmp_path / "weights.safetensors")
    unit = generator.standard_normal(1280).astype(np.float32)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = {
        "photos": tmp_path / "photos",
        "weights": tmp_path / "weights.safetensors",
        "query": tmp_path / "photos" / "owl" / "1.png",
        "embed": lambda texts: np.stack([unit * (1 + len(text)) for text in texts]) + 0.01,
        "embedding": unit / np.linalg.norm(unit),
        "activations": generator.random((1280, 7, 7), np.float32),
        "module": nn.Sequential(OrderedDict(features=made.features, head=head)).eval(),
        "trunk": made.features.eval(),
        "head": head,
    }
    for code in blocks("python", PAGES[0]):
        exec(compile(code, "README.md", "exec"), names)
    for name in ("why.png", "receipt.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert names["receipt"].exact
    # The README ends with networks of other kinds; its pages speak of the index's.
    names["network"] = names["explainer"].network
    for page in PAGES[1:]:
        own = dict(names)
        for code in blocks("python", page):
            exec(compile(code, page.name, "exec"), own)
        if page.stem == "service":
            assert len(own["body"]["neighbors"]) == 5


def test_its_commands_parse() -> None:
    text = "\n".join(block for page in [*PAGES, *STORES] for block in blocks("sh", page)).replace(
        "\\\n", " "
    )
    for line in text.splitlines():
        if line.startswith("embedcam "):
            assert callable(parser().parse_args(shlex.split(line, comments=True)[1:]).run), line


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    known = re.findall(r"^\| `embedcam (\w+)", page, re.MULTILINE)
    actions = [a for a in parser()._actions if a.choices]
    assert sorted(set(known)) == sorted(actions[0].choices)


def test_its_links_lead_somewhere() -> None:
    for page in [*PAGES, *STORES]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_drawing_of_the_architecture_is_of_these_imports() -> None:
    from scripts.architecture import drawing

    drawn = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == drawing(), "run python scripts/architecture.py > docs/images/architecture.svg"
