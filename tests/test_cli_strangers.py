"""The command line on what strangers wrote, and on what nobody should have typed."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_samples import NAMED, Say
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
    name = f"0{EVIL}0"
    code, out, _ = say("info", "evil", "--ids")
    assert (code, len(out.splitlines())) == (0, 12)
    assert f"0{SHOWN}0" in out.splitlines()
    code, out, _ = say("info", "evil", "--ids", "--json")
    assert name in json.loads(out)
    code, out, _ = say("explain", "evil", "photos/0/0.png")
    assert code == 0
    assert len(out.splitlines()) == 1 + 1 + 5
    assert f"0{SHOWN}0  0{SHOWN}" in out
    header, *rows = out.splitlines()[1:]
    place = header.index("label")
    assert [row[place] for row in rows] == ["0"] * 4 + [rows[-1][place]]
    code, out, _ = say("explain", "evil", "photos/0/0.png", "--json")
    assert json.loads(out)[0]["neighbors"][0]["id"] == name
    code, out, _ = say("compare", "evil", "photos/0/0.png", name, "-o", "r.png")
    assert (code, out.splitlines()[0]) == (0, f"photos/0/0.png and 0{SHOWN}0")
    assert say("remove", "evil", f"9{EVIL}9")[0] == 2


def test_a_query_s_name_is_printed_escaped(say: Say) -> None:
    query = Path("photos/0/0.png").read_bytes()
    Path(f"q{EVIL}.png").write_bytes(query)
    code, out, err = say("explain", "fine", f"q{EVIL}.png")
    assert (code, out.splitlines()[0]) == (0, f"q{SHOWN}.png")
    code, _, err = say("explain", "fine", f"gone{EVIL}.png")
    assert (code, err) == (3, f"embedcam: gone{SHOWN}.png: does not exist\n")
    _, _, err = say("explain", "fine", "photos/0/0.png", f"--option{EVIL}")
    assert len(err.splitlines()) == 1


def rewritten(folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of an index with another manifest, sealed again."""
    import shutil

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
    plain = say("info", "fine")[1]
    assert code == 0, err
    assert f"\n  made with   {SHOWN} {SHOWN}; generation 1\n" in out
    assert len(out.splitlines()) == len(plain.splitlines())


def test_no_message_is_longer_than_it_may_be(say: Say, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["metric"] = "a" * 10**6

    code, out, err = say("info", rewritten(tmp_path / "i", change))
    assert (code, out) == (5, "")
    assert 0 < len(err) <= 2_001
    (tmp_path / "wide.csv").write_text(f"path,{'x' * 2_000_000}\na,b\n")
    for given in (("--labels", "folders"), ()):
        code, _, err = say("build", tmp_path / "wide.csv", tmp_path / "w", *given, *NAMED)
        assert code == 2
        assert len(err) <= 2_001
    for name in ("--recipe", "--method", "--faiss", "--triplets", "--network", "--option"):
        code, _, err = say("build", "photos", tmp_path / "w", *NAMED, name, "z" * 10**6)
        assert code in (2, 4, 6)
        assert 0 < len(err) <= 2_001
        assert err.startswith("embedcam")
    assert len(say("explain", "fine", "photos/0/0.png", "--result", "r/" * 10**6)[2]) <= 2_001


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
    code: int, said: str, more: list[str], say: Say, tmp_path: Path
) -> None:
    Path("deep.toml").write_text(DEEP)
    Path("huge.toml").write_text(f"[weights]\nmargin = 1{'0' * 400}\n")
    Path("nul.toml").write_text('[network]\nweights = "a\\u0000b"\n')
    found, out, err = say("build", "photos", tmp_path / "i", *NAMED, *more)
    assert (found, out, len(err.splitlines())) == (code, "", 1), err
    assert said in err


def test_devices_are_not_read_to_their_end(say: Say, tmp_path: Path) -> None:
    for arguments in (
        ["remove", "fine", "--from", "/dev/zero"],
        ["evaluate", "fine", "--images", "photos", "--boxes", "/dev/zero"],
    ):
        code, _, err = say(*arguments)
        assert (code, err) == (2, "embedcam: /dev/zero: is a device; give a file\n")


def test_an_exit_in_the_network_s_code_is_no_fault_of_embedcam_s(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise SystemExit("enough")

    monkeypatch.setattr("embedcam.offline.build_index", leave)
    code, _, err = say("build", "photos", tmp_path / "i", *NAMED, "--quiet")
    assert code == 4
    assert err == (
        "embedcam: the network's own code ended the program (enough); it should raise an error\n"
    )


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


def test_an_example_of_pictures_finds_some(say: Say, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for given, example in (("photos/0/", "photos/0/*.png"), ("photos", "photos/*/*.png")):
        code, _, err = say("explain", "fine", given)
        assert code == 3
        assert err == (
            f"embedcam: {given}: is a folder; name the pictures in it, as in {example}, or give "
            "--report FOLDER\n"
        )
        assert list(Path().glob(example))
    _, _, err = say("explain", "fine", tmp_path / "none")
    assert err.endswith("none: is a folder without a picture in it; name pictures\n")


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
