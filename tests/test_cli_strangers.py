"""The command line on what strangers wrote, and on what nobody should have typed."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_samples import NAMED, Say, answer
from photo_samples import write_photos

from embedcam import Explainer, load_network
from embedcam.cli import main
from embedcam.index import manifest as manifest_file

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\n  forged line\x9b\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202e\n  forged line\x9b\x7f"


@pytest.fixture(scope="module", autouse=True)
def here(cli_folder: Path) -> Iterator[Path]:
    """A working folder with a module that ends the process, and a stranger's index."""
    (cli_folder / "cli_toy_quits.py").write_text("raise SystemExit(3)\n")
    rows = [
        f'photos/{label}/{number}.png,"{label}{EVIL}","{number}{EVIL}{label}"\n'
        for label in range(3)
        for number in range(4)
    ]
    (cli_folder / "list.csv").write_text("path,label,id\n" + "".join(rows), newline="")
    for images, index in (("list.csv", "evil"), ("photos", "fine")):
        assert main(["build", images, index, "--quiet", *NAMED]) == 0
    yield cli_folder
    sys.modules.pop("cli_toy_quits", None)


def test_ids_and_labels_are_printed_escaped_each_on_its_line(say: Say) -> None:
    name, query = f"0{EVIL}0", "photos/0/0.png"
    out = say("info", "evil", "--ids")[1].splitlines()
    assert (len(out), f"0{SHOWN}0" in out) == (12, True)
    out = say("explain", "evil", query)[1]
    assert len(out.splitlines()) == 1 + 1 + 5
    assert f"0{SHOWN}0  0{SHOWN}" in out
    assert answer(say, "explain", "evil", query)[0]["neighbors"][0]["id"] == name
    out = say("compare", "evil", query, name, "-o", "r.png")[1]
    assert out.splitlines()[0] == f"{query} and 0{SHOWN}0"
    assert say("remove", "evil", f"9{EVIL}9")[0] == 2


def test_a_query_s_name_is_printed_escaped(say: Say) -> None:
    Path(f"q{EVIL}.png").write_bytes(Path("photos/0/0.png").read_bytes())
    assert say("explain", "fine", f"q{EVIL}.png")[1].splitlines()[0] == f"q{SHOWN}.png"
    code, _, err = say("explain", "fine", f"gone{EVIL}.png")
    assert (code, err) == (3, f"embedcam: gone{SHOWN}.png: does not exist\n")
    assert say("explain", "fine", "photos/0/0.png", f"--option{EVIL}")[2].count("\n") == 1


def rewritten(folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of an index with another manifest, sealed again."""
    shutil.copytree("fine", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest_file.sealed(manifest)))
    return folder


def test_names_in_a_manifest_are_printed_escaped(say: Say, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["libraries"] = {EVIL: EVIL}
        manifest["network"]["name"] = EVIL

    code, out, err = say("info", rewritten(tmp_path / "i", change))
    assert code == 0, err
    assert f"\n  made with   {SHOWN} {SHOWN}; generation 1\n" in out
    assert out.count("\n") == say("info", "fine")[1].count("\n")


def test_no_message_is_longer_than_it_may_be(say: Say, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["metric"] = "a" * 10**6

    (tmp_path / "wide.csv").write_text(f"path,{'x' * 2_000_000}\na,b\n")
    build = ("build", "photos", tmp_path / "w", *NAMED)
    names = ("--recipe", "--method", "--faiss", "--triplets", "--network", "--option")
    for words in (
        ("info", rewritten(tmp_path / "i", change)),
        ("build", tmp_path / "wide.csv", *build[2:]),
        *((*build, name, "z" * 10**6) for name in names),
        ("explain", "fine", "photos/0/0.png", "--result", "r/" * 10**6),
    ):
        code, out, err = say(*words)
        assert (code in (2, 4, 5, 6), out) == (True, "")
        assert 0 < len(err) <= 2_001
        assert err.startswith("embedcam")


DEEP = "a=" + "[" * 5_000 + "]" * 5_000


@pytest.mark.parametrize(
    ("code", "said", "more"),
    [
        (2, "deep.toml: tables or lists lie in one another too deep", ["--recipe", "deep.toml"]),
        (2, "huge.toml: margin = 1000000000000000000", ["--recipe", "huge.toml"]),
        (2, "[network] weights = 'a\\x00b' holds a NUL, which no name can",
            ["--recipe", "nul.toml"]),
        (2, "'HNSW99999999' cannot be used (HNSW99999999 is more than HNSW1024); 'Flat' always "
            "can", ["--faiss", "HNSW99999999"]),
        (4, "cli_toy_network:exits failed with SystemExit: 3",
            ["--network", "cli_toy_network:exits"]),
        (4, "importing cli_toy_quits failed with SystemExit: 3",
            ["--network", "cli_toy_quits:make"]),
        (2, "an argument holds a NUL, which no name can", ["--weights", "a\0b"]),
        (2, "argument --seed: expected a value, not '--'", ["--seed=--"]),
    ],
)  # fmt: skip
def test_what_can_be_typed_is_refused_in_one_sentence(code, said, more, refused, tmp_path):
    Path("deep.toml").write_text(DEEP)
    Path("huge.toml").write_text(f"[weights]\nmargin = 1{'0' * 400}\n")
    Path("nul.toml").write_text('[network]\nweights = "a\\u0000b"\n')
    refused(code, said, "build", "photos", tmp_path / "i", *NAMED, *more)
    refused(2, "/dev/zero: is a device; give a file\n", "remove", "fine", "--from", "/dev/zero")


def test_an_exit_in_the_network_s_code_is_no_fault_of_embedcam_s(refused, monkeypatch, tmp_path):
    def leave(*_: object, **__: object) -> None:
        raise SystemExit("enough")

    monkeypatch.setattr("embedcam.offline.build_index", leave)
    said = "embedcam: the network's own code ended the program (enough); it should raise an error"
    refused(4, said, "build", "photos", tmp_path / "i", *NAMED)


def test_trust_stands_beside_the_results(say: Say, tmp_path: Path) -> None:
    many, index = write_photos(tmp_path / "many", labels=2, each=21), tmp_path / "i"
    assert say("build", many, index, "--quiet", *NAMED)[0] == 0
    why = Explainer(index, load_network(NAMED[1], layer="relu")).explain(many / "0/0.png")
    last = say("explain", index, many / "0/0.png")[1].splitlines()[-1]
    assert last == f"  trust {why.trust:.2f}"
    doubted = replace(why, trust=0.31, trust_low=0.24)
    assert doubted.trust_in_words == "trust 0.31, but one in ten below 0.24: not trusted"
    assert repr(doubted).endswith(f"; {doubted.trust_in_words}>")
    assert replace(doubted, direct=True).trust_in_words == "trust 0.31: computed on the query"
    assert repr(replace(why, trust=None)).endswith(", ...>")
