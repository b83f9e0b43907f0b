"""Words on the command line: prompts at the build, texts and embeddings that ask, and refusals."""

from pathlib import Path

import numpy as np
import pytest
from cli_samples import NAMED, Say, answer
from rounding import same_values
from text_samples import PROMPTS, tower

from embedcam import Explainer, Index, PairExplainer, load_network
from embedcam.cli import main
from embedcam.network.source import Loaded
from embedcam.offline.prompts import read_prompts

TOWERS = """
from cli_toy_network import make as pictures
from embedcam import EmbeddingNetwork
from text_samples import tower

def make():
    module, preprocess = pictures()
    return EmbeddingNetwork(module, "relu", preprocess=preprocess, texts=tower)
"""


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Path:
    """A working folder with indexes of networks with a tower for texts, and without one."""
    Path("towers.py").write_text(TOWERS)
    Path("prompts.txt").write_text("\n".join([*PROMPTS, "", "  "]))
    named = ["--network", "towers:make", "--prompts", "prompts.txt"]
    assert main(["build", "photos", "words", "--quiet", *named]) == 0
    assert main(["build", "photos", "plain", "--quiet", *NAMED]) == 0
    np.save("text.npy", tower(["a cat"])[0])
    np.save("texts.npy", tower(["a cat", "a dog"]))
    np.save("nan.npy", np.full(5, np.nan))
    np.save("wide.npy", np.ones(7))
    np.save("objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    Path("none.npy").write_text("a letter")
    Path("empty.txt").write_text("\n\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00a")
    return cli_folder


ASKED = ("explain", "words", "--network", "towers:make", "--text", "a cat")


def test_words_are_asked(say: Say) -> None:
    code, out, err = say(*ASKED, "-n", 2, "-o", "where.png")
    assert (code, err) == (0, "")
    explainer = Explainer("words", load_network("towers:make"))
    expected = explainer.explain_text("a cat", n_neighbors=2)
    head, titles, first, second = out.splitlines()
    assert head == '"a cat" -> where.png'
    assert titles.split() == ["similarity", "result", "label"]
    label = expected.labels[0]
    assert first.split() == ["1", f"{expected.similarities[0]:.3f}", expected.ids[0], label]
    assert second.split()[2] == expected.ids[1]
    assert Path("where.png").stat().st_size > 1000
    (told,) = answer(say, *ASKED, "-n", 2)
    assert same_values(told, expected.to_dict())


def test_several_texts_a_rival_and_a_picture(say: Say) -> None:
    more = ("--text", "the sea/ocean", "--above-text", "a dog", "-n", 2)
    code, out, _ = say(*ASKED, *more, "-o", "maps/")
    assert code == 0
    assert sorted(file.name for file in Path("maps").iterdir()) == [
        "a-cat.png",
        "the-sea-ocean.png",
    ]
    assert '"the sea/ocean" above "a dog" -> maps/the-sea-ocean.png' in out
    (told,) = answer(say, *ASKED, "photos/0/0.png", "--above-text", "a dog")
    explainer = Explainer("words", load_network("towers:make"))
    expected = explainer.explain_text("a cat", above="a dog", image="photos/0/0.png")
    assert same_values(told, expected.to_dict())
    assert "the picture" in say(*ASKED, "photos/0/0.png")[1]


def test_embeddings_of_words_from_a_file(say: Say) -> None:
    expected = answer(say, *ASKED)
    told = answer(say, "explain", "words", *ASKED[2:4], "--text-embedding", "text.npy")
    assert told[0]["text"] == "text"
    assert same_values(told[0]["results"], expected[0]["results"])
    plain = ("explain", "plain", "--text", "a cat", "--above-text", "a dog")
    code, _, err = say(*plain, "--text-embedding", "texts.npy")
    assert (code, "no mean embedding" in err) == (0, False)
    code, _, err = say(*plain[:4], "--text-embedding", "text.npy")
    assert (code, "this index keeps no mean embedding of texts" in err) == (0, True)


REFUSED = [
    (["--text", ""], 2, "the text is empty; give words, such as 'a red car'"),
    (["--text", "a", "--above-text", ""], 2, "the text is empty"),
    (["--text", "  "], 2, "the text is empty"),
    (["--text", "a", "--text", "a"], 2, "says the same twice"),
    (["--text", "a", "--above-text", "a"], 2, "is the text itself"),
    (["photos/0/0.png", "--above-text", "a"], 2, "goes with --text"),
    (["--text", "a", "photos/0/0.png", "photos/0/1.png"], 2, "one picture"),
    (["--text", "a", "photos/none.png"], 2, "photos/none.png: "),
    (["--text", "a", "photos/0/0.png", "-n", "3"], 2, "-n is of a search"),
    (["--text", "a", "--html", "a.html"], 2, "--html is of a picture"),
    (["--text", "a", "--method", "rise"], 2, "--method is of a picture"),
    (["--text", "a", "--result", "0/0.png"], 2, "--result is of a picture"),
    (["--text", "a", "--text", "b", "-o", "a.png"], 2, "is one file and there are 2"),
    (["--text", "a", "-o", "a.xyz"], 2, "no picture format"),
    (["--text-embedding", "gone.npy"], 6, "there is no such file"),
    (["--text-embedding", "none.npy"], 2, "not a .npy array of numbers"),
    (["--text-embedding", "objects.npy"], 2, "not a .npy array of numbers"),
    (["--text-embedding", "nan.npy"], 2, "nan.npy: the embedding of"),
    (["--text-embedding", "wide.npy"], 2, "wide.npy: the embedding of the text is float64"),
    (["--text-embedding", "texts.npy"], 2, "this index holds 5"),
    ([], 2, "no picture was given"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "status", "said"), REFUSED)
def test_what_cannot_be_asked_is_said_in_one_sentence(say: Say, words, status, said) -> None:
    code, out, err = say("explain", "words", "--network", "towers:make", *words)
    assert (code, out) == (status, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_words_and_a_result_are_compared(say: Say) -> None:
    named = ("compare", "words", "--network", "towers:make", "--lines", 3)
    code, out, err = say(*named, "--text", "a cat", "2/1.png", "-o", "sentence.png")
    pairs = PairExplainer(Explainer("words", load_network("towers:make")))
    receipt = pairs.text_receipt("a cat", "2/1.png")
    assert (code, err) == (0, "picture: sentence.png\n")
    assert Path("sentence.png").stat().st_size > 1000
    head, *rows = out.splitlines()
    assert head == '"a cat" and 2/1.png'
    assert [row.rsplit(maxsplit=1) for row in rows] == [
        [f"  {words}", f"{number:+.3f}"] for words, number in (*receipt.amounts(3), receipt.total)
    ]
    told = answer(say, *named, "--text-embedding", "text.npy", "2/1.png")["pair"]
    assert (told.pop("text"), told["score"]) == ("text", pytest.approx(receipt.score, abs=1e-6))
    # Held against words that the picture answers better, it says so.
    less, more = sorted(
        ("a cat", "a dog"), key=lambda text: pairs.text_receipt(text, "2/1.png").score
    )
    said = f'The picture answers "{more}" better than "{less}".'
    asked = (*named, "2/1.png", "--text")
    assert said in say(*asked, less, "--above-text", more)[1]
    assert "better" not in say(*asked, more, "--above-text", less)[1]
    asked = ("explain", "words", *named[2:4], "photos/2/1.png", "--text")
    assert f'answers "{more}" better' in say(*asked, less, "--above-text", more)[1]
    assert "better" not in say(*asked, more, "--above-text", less)[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos/0/0.png"], "no result was named"),
        (["photos/0/0.png", "0/0.png", "--text", "a"], "IMAGE is of a picture as the query"),
        (["0/0.png", "--text", "a", "--box", "0", "0", "1", "1"], "--box is of a picture"),
        (["0/0.png", "--text", "a", "--above", "0/1.png"], "--above is of a picture"),
        (["0/0.png", "--text", "a", "--not-centred"], "--not-centred is of a picture"),
        (["0/0.png", "--text", "a", "--text", "b"], "a receipt is of one text"),
        (["0/0.png", "--text", ""], "the text is empty"),
        (["0/0.png", "--text-embedding", "wide.npy"], "wide.npy: the embedding of the text"),
        (["photos/0/0.png", "0/0.png", "--above-text", "a"], "goes with --text"),
        (["nobody.png", "--text", "a"], "has no image 'nobody.png'; `embedcam"),
    ],
)  # fmt: skip
def test_what_words_are_not_compared_with(say: Say, words, said) -> None:
    code, out, err = say("compare", "words", "--network", "towers:make", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_network_without_a_tower(say: Say) -> None:
    code, _, err = say("explain", "plain", "--text", "a cat")
    assert code == 4
    assert "the network embeds images alone" in err
    code, _, err = say("build", "photos", "other", *NAMED, "--prompts", "prompts.txt")
    assert code == 4
    assert not Path("other/manifest.json").exists()


def test_prompts(say: Say) -> None:
    rows = tower(PROMPTS).astype(float)
    mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
    with Index.open("words") as index:
        np.testing.assert_allclose(index.fitted("text_mean"), mean, atol=1e-6)
    again = ("build", "photos", "words", "--network", "towers:make", "--prompts")
    assert "holds these images already" in say(*again, "prompts.txt")[1]
    Path("others.txt").write_text("a\nb\n")
    code, _, err = say(*again, "others.txt")
    assert (code, "a finished index of other prompts" in err) == (2, True)
    for file, said in (
        ("empty.txt", "0 prompts"),
        ("bytes.txt", "cannot be read"),
        ("gone", "cann"),
    ):
        code, _, err = say("build", "photos", "other", *again[3:], file)
        assert (code, said in err) == (6 if file == "gone" else 2, True), err


def test_the_prompts_that_come_along() -> None:
    prompts = read_prompts()
    assert len(prompts) == len(set(prompts)) == 221
    assert all(len(one) < 60 for one in prompts)
    assert Loaded.__dataclass_fields__["texts"].default is None
