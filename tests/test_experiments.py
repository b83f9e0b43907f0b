"""scripts/experiments on a tiny made data set and network, beside literal computations."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_samples import CHANNELS, CLASSES, EACH, made_data, tiny_network

from embedcam import Recipe, build_index, evaluate_index
from embedcam.errors import InputError
from scripts.experiments import __main__ as script
from scripts.experiments import data, frontier, match, pairs, truth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny data set, a tiny network in place of the real one, and few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, frontier, match, pairs, truth):
            if hasattr(module, "frozen_network"):
                patch.setattr(module, "frozen_network", lambda *_: tiny_network())
        patch.setattr(truth, "reference_network", lambda *_: tiny_network())
        patch.setattr(pairs, "N_SCENES", 5)
        yield made_data(tmp_path_factory.mktemp("data") / "tiny")


def run(folder: Path, name: str, *more: str) -> str:
    output = folder.parent / "results" / f"{name}.md"
    script.main([name, str(folder), "--weights", "none", *more, "--output", str(output)])
    return output.read_text()


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line[:2] == "| " and line[:5] != "| ---"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ONE: dict[str, Any] = {
    "n_neighbors": 1, "measures": ("localisation",), "controls": False, "examples": 0,
}  # fmt: skip


def test_a_table_of_truth_is_what_evaluate_index_says(folder: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(truth.TABLES, "transfer", lambda _: iter([("One", ONE)]))
    text = run(folder, "truth", "--tables", "transfer", "--scenes", "4")
    assert "tiny, reference embedding" in text
    assert "tiny, frozen embedding" in text
    indexed, asked, boxes = truth.sources(folder)
    assert len(indexed) == CLASSES // 2 * EACH
    build_index(indexed, tiny_network(), tmp_path / "i", Recipe(), trust=False, progress=False)
    told = evaluate_index(
        tmp_path / "i", asked, tiny_network(), boxes=boxes, progress=False, **ONE
    ).summary["localisation"]["auc"]  # fmt: skip
    line = next(row for row in rows_of(text) if row[0] == "pixel AUC")
    assert line[2] == f"{told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}]"


def test_recipes_and_methods_have_a_column_each(folder: Path, monkeypatch) -> None:
    few = {"centred": Recipe(target="centred", norm="around", encoding="dense")}
    table = {**truth.OBJECTS, "scenes": 2, "faithfulness": 4, "recipes": few}
    monkeypatch.setitem(truth.TABLES, "recipes", lambda _: iter([("Few", table)]))
    text = run(folder, "truth", "--tables", "recipes", "methods", "--methods", "gradcam",
               "--pictures", "3")  # fmt: skip
    heads = [row for row in rows_of(text) if row[0] == "measure"]
    assert any("centred [95%]" in row for row in heads)
    assert any("Grad-CAM [95%]" in row for row in heads)


@pytest.mark.parametrize("name", list(truth.TABLES))
def test_every_table_is_of_choices_that_can_be_made(name: str) -> None:
    for title, choices in truth.TABLES[name](Namespace(pictures=10, scenes=20, methods=None)):
        assert title
        assert all(isinstance(one, Recipe) for one in choices.get("recipes", {}).values())


def test_receipts_tell_the_halves_of_a_scene(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "reference_head", lambda *_: np.eye(CHANNELS, dtype=np.float32))
    rows = {row[0]: row for row in rows_of(run(folder, "pairs"))}
    assert {"map, centred", "map, not centred", "above", "mean activation"} <= set(rows)


def test_the_frontier_has_rows_of_posed_and_real_pictures(folder, tmp_path, monkeypatch) -> None:
    made = {name: one for name, one in frontier.ROWS.items() if "triplet" not in name}
    monkeypatch.setattr(frontier, "ROWS", made)
    monkeypatch.setitem(truth.OBJECTS, "scenes", 2)
    text = run(folder, "frontier")
    assert text.count("### Single and pasted") == 2
    assert "margin, around" in text
    natural = tmp_path / "natural"
    natural.mkdir()
    (natural / "single").symlink_to(folder)
    made_data(natural / "several")
    lines = (natural / "several/annotations.csv").read_text().splitlines()
    path, _, _, y0, *_ = lines[1].split(",")
    lines.append(f"{path},class1,0,0,80,{y0},80,60")  # above the picture's own object
    (natural / "several/annotations.csv").write_text("\n".join(lines) + "\n")
    rows = rows_of(run(natural, "frontier"))
    assert [row[0] for row in rows].count(frontier.DEFAULT) == 3
    plain = next(row for row in rows if row[0] == "mean activation")
    assert plain[1][:5] == "0.500"


def test_the_reference_head_keeps_classes_apart() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c", "d"], 20)
    centers = generator.normal(size=(4, 8)).astype(np.float32)
    pooled = centers[np.repeat(range(4), 20)] + 0.3 * generator.normal(size=(80, 8))
    head = data.train_head(pooled.astype(np.float32), labels)
    vectors = data.unit(pooled @ head.T)
    alike = vectors @ vectors.T
    same = labels[:, None] == labels
    assert alike[same].mean() > alike[~same].mean() + 0.5


def test_a_download_as_it_comes_is_sent_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "bounding_boxes.txt").touch()
    message = r"CUB-200-2011 as it is downloaded.*prepare_data\.py birds"
    with pytest.raises(InputError, match=message):
        data.read_pictures(tmp_path)


def test_match_is_asked_of_the_other_half_of_each_label() -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 6))
    points = data.unit(centers[np.repeat(range(3), 40)] + 1.2 * generator.normal(size=(120, 6)))
    names = np.repeat(["a", "b", "c"], 40)
    far = [np.float32(30 * np.eye(6)[:2])]
    columns, (said, was_right) = match.figures(points, names, far, "all", 0)
    wrong, area, error, perfect, _, low = columns
    indexed, asked = data.halves(names, 0, 120)
    first = [names[indexed][np.argmin(((points[indexed] - points[i]) ** 2).sum(1))] for i in asked]
    assert wrong == pytest.approx(np.mean(first != names[asked]))
    assert (low, area > 0.6, 0 < perfect < 0.3, 0 < error < 0.3) == (1, True, True, True)
    assert error == pytest.approx(data.binned_error(said, was_right))
    assert was_right.tolist() == (first == names[asked]).tolist()
