"""Words for concepts: against a literal derivative, on the command line, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from build_samples import quicken, toy
from cli_samples import answer
from text_samples import built_words, tower_of

import embedcam.offline.concepts as offline
from embedcam import Explainer, load_network
from embedcam.errors import InputError, NetworkError
from embedcam.index.concepts import read_names
from embedcam.pairs import suggest_names

WORDS = ["a wheel", "a wing", "grass", "the sky", "fur", "a mast", "a beak", "snow"]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(offline, "LEAST_IMAGES", 4)
    monkeypatch.setattr(offline, "LEAST_CHANNELS", 4)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["affine", "signed", "identity"])
def test_a_word_goes_where_more_of_the_part_takes_the_average_picture(kind, normalize, tmp_path):
    embed = tower_of(kind)
    explainer, made = built_words(tmp_path, kind, normalize=normalize, tower=embed)
    index, parts = explainer.index, explainer.index.concepts().parts.astype(float)
    if kind == "signed":
        parts = parts[:, :8] - parts[:, 8:]
    mean, text_mean = (index.fitted(f"{of}_mean").astype(float) for of in ("embedding", "text"))

    def z(pooled: np.ndarray) -> np.ndarray:
        return made.head(torch.tensor(pooled)[None, :, None, None])[0].detach().numpy()

    expected = {}
    for number, part in enumerate(parts):
        moved = mean + 1e-4 * (z(part) - z(0 * part))
        if normalize:
            moved *= np.linalg.norm(mean) / np.linalg.norm(moved)
        told = []
        for word in WORDS:
            text = embed([word])[0].astype(float)
            text = text / np.linalg.norm(text) if normalize else text
            told.append((cosine(text - text_mean, moved - mean), word))
        if max(told)[0] > 0:
            expected[number] = max(told)
    found = suggest_names(explainer, WORDS)
    assert len(found) >= 3
    assert {n: word for n, (word, _) in found.items()} == {n: w for n, (_, w) in expected.items()}
    for number, (_, near) in found.items():
        assert near == pytest.approx(expected[number][0], abs=2e-3)


def test_words_that_lie_where_parts_lead_are_found(tmp_path) -> None:
    explainer, made = built_words(tmp_path, normalize=False)
    matrix = made.network.head_kind.matrix
    towards = explainer.index.concepts().parts @ matrix.T
    texts = np.concatenate([towards[::-1] * 3, -towards]) + explainer.index.fitted("text_mean")
    words = [f"part {n}" for n in reversed(range(4))] + [f"no part {n}" for n in range(4)]
    found = suggest_names(explainer, words, texts=texts)
    assert {n: word for n, (word, _) in found.items()} == {n: f"part {n}" for n in range(4)}


def test_what_cannot_be_named_is_said(tmp_path, monkeypatch) -> None:
    explainer, _ = built_words(tmp_path / "a")
    for words, said in (
        ("wheel", "give a list of two words"),
        (["wheel"], "give a list of two words"),
        (["wheel", ""], "the text is empty"),
        (["wheel", "x" * 101], "100 characters at most"),
        (["wheel", "a\tb"], "is no name"),
    ):
        with pytest.raises(InputError, match=said):
            suggest_names(explainer, words)
    with (
        Explainer(explainer.index.path, toy().network) as deaf,
        pytest.raises(NetworkError, match="tower for texts"),
    ):
        suggest_names(deaf, WORDS)
    bent, _ = built_words(tmp_path / "b", "pooled")
    with pytest.raises(InputError, match="by hand"):
        suggest_names(bent, WORDS)
    monkeypatch.setattr(offline, "LEAST_IMAGES", 99)
    bare, _ = built_words(tmp_path / "c")
    with pytest.raises(InputError, match="has no concepts"):
        suggest_names(bare, WORDS)


def test_on_the_command_line(cli_folder, say, monkeypatch) -> None:
    Path("named_towers.py").write_text(
        "from cli_toy_network import make as pictures\n"
        "from embedcam import EmbeddingNetwork\n"
        "from text_samples import tower\n\n"
        "def make():\n"
        "    module, preprocess = pictures()\n"
        "    return EmbeddingNetwork(module, 'relu', preprocess=preprocess, texts=tower)\n"
    )
    words = ['a "wheel"', "back\\slash", "grün", "\U0001f989", *WORDS]
    Path("words.txt").write_text("\n".join(words), encoding="utf-8")
    named = ("--network", "named_towers:make")
    assert say("build", "photos", "named", *named, "--concepts", 4, "--quiet")[0] == 0
    code, out, _ = say("info", "named", "--suggest-names", "words.txt", *named)
    assert code == 0
    Path("concepts.toml").write_text(out, encoding="utf-8")
    with Explainer("named", load_network("named_towers:make")) as explainer:
        found = suggest_names(explainer, words)
    assert read_names("concepts.toml") == {n: word for n, (word, _) in found.items()}
    assert found
    told = answer(say, "info", "named", "--suggest-names", "words.txt", *named)
    assert {int(n): (one["name"], one["cosine"]) for n, one in told["concepts"].items()} == {
        n: (word, pytest.approx(near)) for n, (word, near) in found.items()
    }
