"""The command line on what strangers wrote, and on what nobody should have typed."""

import json
import logging
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
from embedcam.images import progress
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
    assert main(["build", "list.csv", "evil", "--quiet", *NAMED]) == 0
    assert main(["build", "photos", "fine", "--quiet", *NAMED]) == 0
    yield cli_folder
    sys.modules.pop("cli_toy_quits", None)


def test_ids_and_labels_are_printed_escaped_each_on_its_line(say: Say) -> None:
    name, query = f"0{EVIL}0", "photos/0/0.png"
    out = say("info", "evil", "--ids")[1].splitlines()
    assert (len(out), f"0{SHOWN}0" in out) == (12, True)
    assert name in answer(say, "info", "evil", "--ids")
    out = say("explain", "evil", query)[1]
    assert len(out.splitlines()) == 1 + 1 + 5
    assert f"0{SHOWN}0  0{SHOWN}" in out
    header, *rows = out.splitlines()[1:]
    place = header.index("label")
    assert [row[place] for row in rows] == ["0"] * 4 + [rows[-1][place]]
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
        ("build", tmp_path / "wide.csv", *build[2:], "--labels", "folders"),
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
        (2, "/dev/zero: is a device; give a file", ["--recipe", "/dev/zero"]),
        (2, "'²' is no number and no .npy file", ["--triplets", "²"]),
        (2, "'HNSW99999999' cannot be used (HNSW99999999 is more than HNSW1024); 'Flat' always "
            "can", ["--faiss", "HNSW99999999"]),
        (2, "'IVF99999999999,Flat' cannot be used (99999999999 is more than 16777216)",
            ["--faiss", "IVF99999999999,Flat"]),
        (4, "cli_toy_network:exits failed with SystemExit: 3",
            ["--network", "cli_toy_network:exits"]),
        (4, "importing cli_toy_quits failed with SystemExit: 3",
            ["--network", "cli_toy_quits:make"]),
        (2, "an argument holds a NUL, which no name can", ["--weights", "a\0b"]),
        (2, "argument --seed: expected a value, not '--'", ["--seed=--"]),
    ],
)  # fmt: skip
def test_what_can_be_typed_is_refused_in_one_sentence(
    code: int, said: str, more: list[str], refused, tmp_path: Path
) -> None:
    Path("deep.toml").write_text(DEEP)
    Path("huge.toml").write_text(f"[weights]\nmargin = 1{'0' * 400}\n")
    Path("nul.toml").write_text('[network]\nweights = "a\\u0000b"\n')
    refused(code, said, "build", "photos", tmp_path / "i", *NAMED, *more)


def test_devices_are_not_read_to_their_end(refused) -> None:
    said = "embedcam: /dev/zero: is a device; give a file\n"
    refused(2, said, "remove", "fine", "--from", "/dev/zero")
    refused(2, said, "evaluate", "fine", "--images", "photos", "--boxes", "/dev/zero")


def test_an_exit_in_the_network_s_code_is_no_fault_of_embedcam_s(
    refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise SystemExit("enough")

    monkeypatch.setattr("embedcam.offline.build_index", leave)
    said = "embedcam: the network's own code ended the program (enough); it should raise an error"
    refused(4, said, "build", "photos", tmp_path / "i", *NAMED)


def test_a_job_without_a_terminal_says_how_far_it_is(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    _, out, err = say("build", "photos", tmp_path / "i", *NAMED)
    assert "embed: " in err
    assert " of 12 images, 0 s\n" in err
    assert out.count("\n") == 1
    assert say("build", "photos", tmp_path / "j", *NAMED, "--quiet")[2] == ""
    assert not logging.getLogger("embedcam.images.progress").handlers


def test_the_end_of_a_path_is_offered_first(say: Say) -> None:
    asked = ("explain", "fine", "photos/0/0.png", "--result")
    _, _, err = say(*asked, "some/where/photos/2/3.png")
    assert "no image 'some/where/photos/2/3.png'; did you mean '2/3.png'?; " in err
    _, _, err = say(*asked, "photos/9/3.png")
    offered = err.partition("; did you mean ")[2].partition("?; ")[0]
    assert sorted(offered.split(" or ")) == ["'0/3.png'", "'1/3.png'", "'2/3.png'"]


def test_trust_stands_beside_the_results(say: Say, tmp_path: Path) -> None:
    write_photos(tmp_path / "many", labels=2, each=21)
    index = tmp_path / "i"
    assert say("build", tmp_path / "many", index, "--quiet", *NAMED)[0] == 0
    query = tmp_path / "many/0/0.png"
    _, out, _ = say("explain", index, query)
    (record,) = json.loads(say("explain", index, query, "--json")[1])
    assert out.splitlines()[-1] == f"  trust {record['trust']:.2f}"
    why = Explainer(index, load_network(NAMED[1], layer="relu")).explain(query)
    assert repr(why).endswith(f"; trust {record['trust']:.2f}>")
    doubted = replace(why, trust=0.31, trust_low=0.24)
    said = "trust 0.31, but one in ten below 0.24: not trusted"
    assert doubted.trust_in_words == said
    assert repr(doubted).endswith(f"; {said}>")
    assert replace(doubted, direct=True).trust_in_words == "trust 0.31: computed on the query"
    assert repr(replace(why, trust=None)).endswith(", ...>")
    assert "  trust " not in say("explain", "fine", query)[1]
