"""The pages about stores are true: their Python and commands run, mistakes say their sentences."""

import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photo_samples import SQUASH, Pooled, build, picture
from PIL import Image
from toys import seeded

from embedcam import EmbedcamError, EmbeddingNetwork, Explainer, Index
from embedcam.cli import main
from embedcam.index.model import write_model
from embedcam.stores import Table, open_store

pytestmark = pytest.mark.usefixtures("quick_disk")
DOCS = Path(__file__).parents[1] / "docs" / "stores"
NETWORKS = """
from test_docs_stores import made_network

def old():
    return made_network(0)

def new():
    return made_network(1)
"""
OLD = "3f0c9a61d2b84e57"
"""The old network's generation, as the pages write it."""
ONLY_PARSED = ("docker", "embedcam serve", "embedcam export")


def made_network(seed: int) -> EmbeddingNetwork:
    return EmbeddingNetwork(seeded(Pooled, seed), "relu", preprocess=SQUASH)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, an index of them and its model, and a module that makes two networks."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "doc_networks.py").write_text(NETWORKS)
    for label, name in enumerate(("owl", "gull", "heron")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(14):
            picture(label, number).save(folder / "photos" / name / f"{number}.jpg")
    picture(0, 99).save(folder / "query.jpg")
    build(folder / "photos", folder / "my.index", made_network(0))
    with Index.open(folder / "my.index") as index:
        write_model(index, folder / "model.embedcam")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, in which the test works."""
    folder = Path(shutil.copytree(made, tmp_path / "work"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def known(here: Path) -> dict[str, Any]:
    """What the pages take for known."""
    network = made_network(0)
    embedding, activations = features(network)
    return {
        "network": network,
        "query": here / "query.jpg",
        "embedding": embedding,
        "activations": activations,
        "new_embedding": features(made_network(1))[0],
    }


def features(network: EmbeddingNetwork) -> tuple[np.ndarray, np.ndarray]:
    embeddings, _, (activations,) = network.embed(SQUASH(Image.open("query.jpg"))[None])
    return embeddings[0], activations[0]


def page(name: str, *titles: str) -> str:
    """Return a page, or these sections of it."""
    text = (DOCS / name).read_text(encoding="utf-8")
    _, *sections = text.split("\n## ")
    return "".join(one for one in sections if one.startswith(titles)) if titles else text


def run(text: str, known: dict[str, Any], old: str = "") -> None:
    """Run the Python and the commands of a text, in their order."""
    for language, code in re.findall(r"^```(python|sh)\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            exec(compile(code, "docs/stores", "exec"), known)
            continue
        for line in code.replace("\\\n", " ").replace(OLD, old).splitlines():
            if line and not line.startswith(ONLY_PARSED):
                assert main(with_toys(shlex.split(line, comments=True)[1:])) == 0, line


def with_toys(words: list[str]) -> list[str]:
    """Return a command with the networks of this test in place of those of the pages."""
    for option in ("--network", "--weights"):
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    if words[0] in ("build", "compare", "explain") and "--pooled" not in words:
        age = "new" if any(word.startswith("new.") for word in words) else "old"
        words += ["--network", f"doc_networks:{age}"]
    return words


def in_files(folder: Path, *secrets: bytes) -> list[str]:
    """Return the files below a folder that hold one of these bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file.name for file in files if any(one in file.read_bytes() for one in secrets)]


def test_the_first_page(known: dict[str, Any], here: Path) -> None:
    (here / "my.index").rename("whole.index")
    (here / "model.embedcam").unlink()
    run(page("index.md"), known)
    with Explainer("whole.index", known["network"]) as whole:
        expected = whole.explain(known["query"])
        np.testing.assert_array_equal(known["why"].cam, expected.cam)
        assert (known["why"].ids, known["why"].match) == (expected.ids, expected.match)
        named = whole.explain(known["query"], result=expected.ids[2])
        np.testing.assert_array_equal(known["named"].cam, named.cam)
    assert known["receipt"].exact
    assert min((here / name).stat().st_size for name in ("why.png", "receipt.png")) > 5_000


def test_another_store(known: dict[str, Any], here: Path) -> None:
    run(page("other.md"), known)
    with Explainer("my.index", known["network"]) as whole:
        expected = whole.explain(known["query"])
        again = whole.explain(known["query"], result=expected.ids[1])
        features = known["embedding"], known["activations"]
        np.testing.assert_array_equal(known["again"].cam, again.cam)
        np.testing.assert_array_equal(known["why"].cam, whole.explain_features(*features).cam)
    assert (known["same"].ids, known["same"].match) == (expected.ids, expected.match)


def as_hex(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "codes": row["codes"].hex()}


def quantized(row: dict[str, Any], back: float) -> dict[str, Any]:
    whole = np.round(np.array(row["embedding"]) * 50).astype(np.int8)
    return {**row, "embedding": whole / back if back != 1 else whole}


def without(row: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {**{name: row[name] for name in row if name != "embedding"}, **other}


MISTAKES: dict[str, Callable[[list[dict[str, Any]]], list[Any]]] = {
    "positions as ids": lambda rows: [{**row, "id": n} for n, row in enumerate(rows)],
    "vectors quantized anew": lambda rows: [quantized(row, 50) for row in rows],
    "the same, as whole numbers": lambda rows: [quantized(row, 1) for row in rows],
    "another metric's distance": lambda rows: [without(row, distance=-0.7) for row in rows],
    "codes of another generation": lambda rows: [{**row, "generation": OLD} for row in rows],
    "codes cut short": lambda rows: [{**row, "codes": row["codes"][:-9]} for row in rows],
    "codes as hexadecimal digits": lambda rows: [as_hex(row) for row in rows],
    "a picture that the index": lambda rows: [{**row, "codes": None} for row in rows],
    "a join that multiplies": lambda rows: rows * 2,
    "neither vector nor": lambda rows: [without(row) for row in rows],
    "all rows in place": lambda rows: rows * 300,
}


def test_what_breaks(known: dict[str, Any]) -> None:
    """Every mistake says its sentence, numbers and ids aside."""
    with Index.open("my.index") as index:
        rows = [row for batch in index.rows() for row in batch.to_pylist()]
    explainer = Explainer.from_model("model.embedcam", known["network"])
    listed = re.findall(r"^\| ([^|]+) \| (`.*`) \|$", page("other.md", "What breaks"), re.M)

    def plain(text: str) -> str:
        text = re.sub(r"'[0-9a-f]{16}'|'\w+/\d+\.jpg'", "'...'", text.strip("` "))
        return re.sub(r"-?\d[\d.,]*\d|\d", "N", text)

    def said(given: list[Any], **asked: Any) -> str:
        with pytest.raises(EmbedcamError) as caught:
            explainer.explain(known["query"], rows=given, **asked)
        return plain(str(caught.value))

    found = {title: said(mistake(rows)) for title, mistake in MISTAKES.items()}
    found["the same, as text"] = said(rows, result="17")
    for title, sentence in listed:
        (start,) = [one for one in found if title.startswith(one)]
        assert plain(sentence) == found.pop(start)
    assert not found


def test_a_first_load(known: dict[str, Any], here: Path) -> None:
    shutil.rmtree(here / "my.index")
    labels = [f"kind {number % 10}" for number in range(300)]
    pooled = np.random.default_rng(0).random((300, 16), np.float32)
    pooled[range(300), np.arange(300) % 10] += 1
    for name in ("pooled", "embeddings"):
        np.save(f"{name}.npy", pooled)
    known |= {"labels": labels, "ids": [f"{number}.jpg" for number in range(300)]}
    lines = [f"{one},{label}" for one, label in zip(known["ids"], labels, strict=True)]
    (here / "ids.csv").write_text("\n".join(["id,label", *lines, ""]))
    run(page("day.md", "A first load"), known)
    assert Path("loaded.embedcam").read_bytes() == Path("model.embedcam").read_bytes()
    for name in ("loaded", "photos"):
        with (
            Index.open("model.embedcam") as model,
            closing(open_store(f"{name}.lance", Table.of(model))) as store,
        ):
            assert store.generations() == {model.generation: 300}


def test_a_deleted_picture(known: dict[str, Any], here: Path) -> None:
    assert main(["rows", "my.index", "--to", "photos.lance"]) == 0
    with Index.open("my.index") as index:
        (vector,) = index.embeddings([index.position("owl/1.jpg")])
    secrets = b"owl/1.jpg", vector.tobytes()
    assert len(in_files(here / "my.index", *secrets)) >= 3
    assert in_files(here / "photos.lance", *secrets)
    run(page("day.md", "A picture deleted everywhere"), known)
    for place in ("my.index", "photos.lance"):
        assert in_files(here / place, *secrets) == []
        assert in_files(here / place, b"owl/2.jpg")


def test_a_new_network_beside_the_old_one(
    known: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rows", "my.index", "--to", "photos.lance"]) == 0
    with Index.open("my.index") as index:
        old, (vector,) = Table.of(index), index.embeddings([0])
    before, after = page("day.md", "A new network").split("Meanwhile")
    run(before, known)
    assert "has the generation" in capsys.readouterr().out
    assert Path("old.png").read_bytes() != Path("new.png").read_bytes()
    assert known["store"].generations() == {old.generation: 42, known["new"].generation: 42}
    assert in_files(here / "photos.lance", vector.tobytes())
    run(after, known, old.generation)
    assert not in_files(here / "photos.lance", vector.tobytes())
    with closing(open_store("photos.lance", old)) as store:
        assert store.generations() == {known["new"].generation: 42}
        assert len(store.fetch(["owl/2.jpg"])) == 0
