"""The command line takes every kind of input, from listing to a page."""

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_samples import NAMED, answer
from input_samples import shard

from embedcam.service import server

SHARDS = "made/{000..002}.tar"


@pytest.fixture(scope="module")
def inputs(cli_folder: Path, quick_disk) -> Path:
    """The photos as three shards with a broken member, as a table, and in a store."""
    files = sorted((cli_folder / "photos").rglob("*.*"))
    members = [(str(f.relative_to(cli_folder / "photos")), f.read_bytes()) for f in files]
    for number in range(3):
        part = members[number * 4 : number * 4 + 4]
        broken = [("c0/bad.png", b"no picture")] if number == 1 else []
        shard(cli_folder / f"made/{number:03d}.tar", part + broken)
    rows = {"id": [name for name, _ in members], "image": [data for _, data in members]}
    rows["label"] = [name.split("/")[0] for name, _ in members]
    pq.write_table(pa.table(rows), cli_folder / "photos.parquet")
    system = fsspec.filesystem("memory")
    for name, data in members:
        system.pipe_file(f"memory://photos/{name}", data)
    yield cli_folder
    system.store.clear()


def test_from_shards_to_a_page(inputs: Path, say, tmp_path: Path) -> None:
    index = tmp_path / "i"
    code, out, err = say("build", SHARDS, index, *NAMED, "--on-unreadable", "skip")
    assert code == 0, err
    assert "12 images" in out
    assert "skipped c0/bad: " in err
    assert "skipped by shard: 1 of 001.tar" in err
    page = tmp_path / "page"
    code, out, err = say("explain", index, SHARDS, "--report", page, "--exclude", "c0/bad")
    assert code == 0, err
    lines = [json.loads(line) for line in (page / "explanations.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(len(line["neighbors"]) == 5 for line in lines)
    assert lines[0]["path"].startswith(f"{inputs}/made/000.tar?")
    text = (page / "index.html").read_text()
    assert text.count("<img") >= 12 * 6
    asked = ["--images", SHARDS, "--exclude", "c0/bad", "--limit", "4"]
    assert answer(say, "evaluate", index, *asked)


def test_a_table_and_a_store(inputs: Path, say, refused, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[images]\npath = "photos.parquet"\n')
    code, _, err = say("build", tmp_path / "t", *NAMED, "--recipe", recipe)
    assert code == 0, err
    assert answer(say, "info", tmp_path / "t")["labels"] == 3
    code, _, err = say("build", "memory://photos", tmp_path / "i", *NAMED)
    assert code == 0, err
    refused(2, "the index names pictures at memory://photos", "build", tmp_path / "i", "--refit")
    code, _, err = say("build", "memory://photos", tmp_path / "i", "--refit")
    assert code == 0, err
    query = next((inputs / "photos").rglob("*.*"))
    for named, words in (
        ([], "5 of 5 indexed pictures were not shown under memory://photos; addresses"),
        (["--images", "memory://photos"], ""),
    ):
        code, _, err = say("explain", tmp_path / "i", query, "-o", tmp_path / "w.png", *named)
        assert code == 0, err
        assert words in err
        assert ("not shown" in err) is bool(words)


def test_a_service_says_where_pictures_at_addresses_are_to_be_named(
    inputs: Path, say, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(server, "serve", lambda *_, **__: None)
    names = sorted(str(f.relative_to(inputs)) for f in (inputs / "photos").rglob("*.*"))
    paths = {"here": names, "list": [f"memory://{name}" for name in names]}
    for kind, of in paths.items():
        lines = [f"{path},{path.split('/')[-2]}" for path in of]
        (inputs / f"{kind}.csv").write_text("\n".join(["path,label", *lines]))
    told = "lie at addresses, which are read below one that you name, so they are not shown"
    for kind, given, named in (
        ("here.csv", [], None),
        ("memory://photos", [], "memory://photos"),
        ("memory://photos", ["--images", "memory://photos"], None),
        ("list.csv", [], f"{paths['list'][0].rpartition('/')[0]}"),
    ):
        index = tmp_path / kind.replace("/", "")
        assert say("build", kind, index, *NAMED)[0] == 0
        code, _, err = say("serve", index, "--port", 0, *NAMED, *given)
        assert (code, err.count(told)) == (0, int(named is not None)), err
        assert named is None or err.endswith(f"{told}: serve it with --images {named}\n")
