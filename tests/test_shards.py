"""A build in pieces: the same bytes as one process, whatever the pieces and their order."""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from build_samples import (
    BAD,
    broken_pictures,
    built,
    dense,
    everything,
    paint,
    pictures,
    quicken,
    toy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_samples import CROP, Pooled
from toys import seeded

import embedcam.offline.concepts as concepts
import embedcam.offline.job as jobs
import embedcam.offline.merge as merge
import embedcam.offline.plan as plan
from embedcam.errors import EmbedcamError, ImageError, InputError, NetworkMismatch, PiecesMissing
from embedcam.images import ImageSource, find_images, from_dataset
from embedcam.index import faiss_build, remove
from embedcam.network import EmbeddingNetwork
from embedcam.offline import add_images, merge_job, missing_pieces, plan_job, run_shard
from embedcam.recipe.recipe import Recipe

FEW = {"batch_size": 4}
QUIET = {"workers": 0, "progress": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(plan, "CHUNK", 4)
    monkeypatch.setattr(concepts, "LEAST_IMAGES", 4)
    monkeypatch.setattr(concepts, "LEAST_CHANNELS", 4)


def in_pieces(source, network: EmbeddingNetwork, base: Path, recipe=None, **options) -> Path:
    """Plan, do every round of every piece backwards, and merge."""
    report = plan_job(source, network, base / "job", recipe, **{**FEW, "pieces": 3, **options})
    for _ in range(report.rounds):
        for piece in reversed(range(report.n_pieces)):
            run_shard(base / "job", piece, network=network, **QUIET)
    merge_job(base / "job", base / "merged", network, **QUIET)
    return base / "merged"


SEVERAL = {"method": "polycam", "layers": ("conv", "relu")}
KINDS = {
    "codes": ("affine", Recipe(), {}, 1),
    "drawn": ("affine", Recipe(triplets=4), {}, 1),
    "unlabelled": ("affine", Recipe(), {}, 1),
    "pooled": ("pooled", Recipe(triplets=4, rank=3), {}, 1),
    "gradcam++": ("other", Recipe(triplets=4, method="gradcam++", rank=3), {}, 2),
    "three rounds": ("other", Recipe(triplets=4, rank=3), {"scratch_gb": 0}, 3),
    "codes again": ("affine", Recipe(), {"scratch_gb": 0}, 3),
    "zoo": ("affine", dense(method="scorecam", encoding="top-m", m=3), {}, 2),
    "layers": ("layers", dense(**SEVERAL), {}, 2),
    "bare": ("affine", Recipe(encoding="dense"), {"own_maps": False, "trust": False}, 1),
    "unreadable": ("other", Recipe(triplets=4, rank=3), {"on_unreadable": "skip"}, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_bytes_of_one_process(tmp_path, kind) -> None:
    name, recipe, options, rounds = KINDS[kind]
    if name == "layers":
        network = EmbeddingNetwork(seeded(Pooled, 4), "relu", preprocess=CROP)
    else:
        network = toy(name).network
    source = pictures(tmp_path / "p", 18, 0 if kind == "unlabelled" else 3)
    if kind == "unreadable":
        source = broken_pictures(tmp_path / "p")
    build_options = {**FEW, **options}
    one = built(source, Made(network), tmp_path / "one", recipe, **build_options)
    several = in_pieces(source, network, tmp_path, recipe, **options)
    assert everything(several) == everything(one)
    assert jobs.read_choices(tmp_path / "job").rounds == rounds
    weighed = {path.name for path in (tmp_path / "job").glob("weights-*")}
    before = plan_job(source, network, tmp_path / "once", recipe, **FEW, pieces=2, **options)
    for piece in range(before.n_pieces):  # the merge does what is left
        run_shard(tmp_path / "once", piece, network=network, **QUIET)
    report = merge_job(tmp_path / "once", tmp_path / "left", network, **QUIET)
    assert everything(tmp_path / "left") == everything(one)
    assert [name for name, _ in report.skipped] == (BAD if kind == "unreadable" else [])
    assert {path.name for path in (tmp_path / "once").glob("weights-*")} == weighed or rounds == 1


class Made:
    """A network where `built` takes a toy."""

    def __init__(self, network: EmbeddingNetwork) -> None:
        self.network = network


def test_given_triplets_are_kept_in_the_job(tmp_path) -> None:
    it, source = toy(), pictures(tmp_path / "p")
    pairs = np.array(
        [[((i + 3) % 12, (i + 1) % 12), ((i + 6) % 12, (i + 2) % 12)] for i in range(12)]
    )
    recipe = Recipe(sampling="given", target="margin")
    one = built(source, it, tmp_path / "one", recipe, triplets=pairs, **FEW)
    several = in_pieces(source, it.network, tmp_path, recipe, triplets=pairs)
    assert everything(several) == everything(one)


def test_search_files_that_auto_chooses_are_the_same_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(faiss_build, "_AUTO", ((4, "Flat"), (1 << 40, "IVF2,SQ8")))
    monkeypatch.setattr(faiss_build, "MOST_BYTES", 100)
    it, source, recipe = toy("affine"), pictures(tmp_path / "p"), Recipe(faiss="auto")
    one = built(source, it, tmp_path / "one", recipe, **FEW)
    entry = json.loads((one / "manifest.json").read_text())["faiss"]
    assert (entry["factory"], entry["search"]) == ("IVF2,SQ8", {"nprobe": 2})
    assert [one["rows"] for one in entry["more"]] == [5]
    several = in_pieces(source, it.network, tmp_path, recipe)
    assert everything(several) == everything(one)


@pytest.mark.parametrize("kind", ["affine", "other"])
def test_an_addition_in_pieces_and_a_refit_make_the_bytes_of_one_process(tmp_path, kind) -> None:
    it, first = toy(kind), pictures(tmp_path / "p")
    one = built(first, it, tmp_path / "one", **FEW)
    shutil.copytree(one, tmp_path / "several")
    paint(tmp_path / "q", range(20, 29))
    more = find_images(tmp_path / "q")
    add_images(more, it.network, one, **FEW, **QUIET)
    several, job = tmp_path / "several", tmp_path / "job"
    options = {"add_to": several, "pieces": 2, "scratch_gb": 0, **FEW}
    report = plan_job(more, it.network, job, **options)
    for _ in range(report.rounds):
        for piece in (1, 0):
            run_shard(job, piece, network=it.network, **QUIET)
    merge_job(job, several, it.network, **QUIET)
    assert everything(several) == everything(one)
    assert merge_job(job, several, it.network, **QUIET).n_images == 0
    assert everything(several) == everything(one)
    paint(tmp_path / "r", [28], seed=6)  # another picture of a name that was added
    other, index = find_images(tmp_path / "r"), shutil.copytree(several, tmp_path / "changed")
    for change in (remove, lambda *_: add_images(other, it.network, index, **FEW, **QUIET)):
        change(index, other.ids)
        with pytest.raises(InputError, match=r"is not as it was when .*job was planned"):
            merge_job(job, index, it.network, **QUIET)
    with pytest.raises(InputError, match="9 of 9 images are in the index already"):
        plan_job(more, it.network, tmp_path / "again", **options)

    built(first, it, one, Recipe(seed=3), replace=True, **FEW)
    options = {"pieces": 2, "replace": True, **FEW}
    report = plan_job(first, it.network, tmp_path / "refit", Recipe(seed=3), **options)
    for piece in range(2):
        run_shard(tmp_path / "refit", piece, network=it.network, **QUIET)
    merge_job(tmp_path / "refit", several, it.network, **QUIET)
    assert everything(several) == everything(one)
    assert merge_job(tmp_path / "refit", several, it.network, **QUIET).n_images == 12


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[EmbeddingNetwork, Path, dict[str, str]]:
    """A network, a job of eleven chunks in seven pieces, and the bytes of one process."""
    base, it = tmp_path_factory.mktemp("planned"), toy("other")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        patch.setattr(plan, "CHUNK", 4)
        patch.setattr(concepts, "LEAST_IMAGES", 4)
        patch.setattr(concepts, "LEAST_CHANNELS", 4)
        source = pictures(base / "p", 42)
        recipe = Recipe(triplets=4, rank=3)
        expected = everything(built(source, it, base / "one", recipe, **FEW))
        plan_job(source, it.network, base / "job", recipe, pieces=7, **FEW)
    return it.network, base / "job", expected


@settings(max_examples=4)
@given(st.data())
def test_no_grouping_order_or_repetition_changes_a_byte(tmp_path_factory, planned, data) -> None:
    network, job, expected = planned
    base = tmp_path_factory.mktemp("grouped")
    shutil.copytree(job, base / "job")
    groups = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 9]), min_size=1, max_size=2))
    runs = [(piece, n) for n in groups for piece in range(n)]
    order = data.draw(st.permutations(runs))
    for piece, n in order[: data.draw(st.integers(len(order) // 2, len(order)))]:
        run_shard(base / "job", piece, n, network, **QUIET)
    for piece in missing_pieces(base / "job"):
        run_shard(base / "job", piece, network=network, **QUIET)
    merge_job(base / "job", base / "index", network, **QUIET)
    assert everything(base / "index") == expected


@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 130), st.integers(1, 9))
def test_pieces_of_any_number_divide_the_chunks_alike(n_images, pieces, groups, per_chunk) -> None:
    choices = jobs.Choices(
        **dict.fromkeys(("key", "recipe", "network", "loading", "libraries", "rounds"), None),
        **dict.fromkeys(("on_unreadable", "own_maps", "trust", "caches", "run"), None),
        kind="build", n_images=n_images, n_pieces=pieces, per_chunk=per_chunk,
    )  # fmt: skip
    job = jobs.Job(choices, None, None, None)
    for n in (groups, None):
        parts = [job.chunks_of(piece, n) for piece in range(pieces if n is None else n)]
        assert [c for part in parts for c in part] == list(range(-(-n_images // per_chunk)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for piece in range(pieces):
        assert all(job.piece_of(chunk) == piece for chunk in job.chunks_of(piece))


def test_pieces_where_nothing_is_said() -> None:
    assert [jobs.pieces_of(n, 256) for n in (1, 256, 257, 10**9)] == [1, 1, 2, 1000]


def test_missing_pieces_are_named(tmp_path, planned) -> None:
    network, job, _ = planned
    shutil.copytree(job, tmp_path / "job")
    assert missing_pieces(tmp_path / "job") == [0, 1, 2, 3, 4, 5, 6]
    for piece in (0, 2, 3, 4, 6):
        report = run_shard(tmp_path / "job", piece, network=network, **QUIET)
        assert (report.done, report.rounds, report.n_images) == (
            1,
            2,
            4 if piece in (0, 2, 3) else 8,
        ) or piece
    assert report.waits_for == [1, 5]
    with pytest.raises(PiecesMissing, match=r"2 of its 7 pieces are missing \(1, 5\)") as error:
        merge_job(tmp_path / "job", tmp_path / "index", network, **QUIET)
    assert error.value.pieces == [1, 5]
    assert not (tmp_path / "index").exists()
    for piece in (1, 5):
        report = run_shard(tmp_path / "job", piece, network=network, **QUIET)
    assert (report.done, report.waits_for) == (2, [])
    # A chunk that was cut short by a power failure is missing as well.
    file = tmp_path / "job/embed-0000000/embedding.bin"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match="piece 0 is damaged; do it again"):
        run_shard(tmp_path / "job", 3, network=network, **QUIET)
    with pytest.raises(PiecesMissing, match="piece 0 of its 7 is missing"):
        merge_job(tmp_path / "job", tmp_path / "index", network, **QUIET)


def test_a_piece_made_otherwise_is_refused_by_its_number(tmp_path, planned, monkeypatch) -> None:
    network, job, expected = planned
    shutil.copytree(job, tmp_path / "job")
    run_shard(tmp_path / "job", 0, 1, network, **QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "libraries_of", lambda of: {**plan.libraries_of(of), "numpy": "1.0"})
        with pytest.raises(InputError, match=r"was planned with numpy .*, and here is numpy 1\.0"):
            run_shard(tmp_path / "job", 0, network=network, **QUIET)
    # As if nobody had asked there: chunks of piece 3 by another numpy, of piece 5 by another job.
    for piece, change in ((3, {"libraries": {"numpy": "1.0"}}), (5, {"key": "f" * 64})):
        opened = jobs.Job.open(tmp_path / "job")
        maker = {**opened.maker(), **change}
        stamp = jobs.stamp_of(maker)
        (tmp_path / "job" / f"made-{stamp}.json").write_text(json.dumps(maker))
        other, chunk = jobs.Checkpoint(tmp_path / "job", stamp), opened.chunks_of(piece)[0]
        arrays = {name: np.array(a) for name, a in opened.checkpoint.read("embed", chunk).items()}
        other.put_aside("embed", chunk)
        other.write("embed", chunk, arrays)
        why = "numpy 1.0" if piece == 3 else "for another job"
        with pytest.raises(InputError, match=f"piece {piece} was made (with )?{why}"):
            merge_job(tmp_path / "job", tmp_path / "index", network, **QUIET)
        run_shard(tmp_path / "job", piece, network=network, **QUIET)
    merge_job(tmp_path / "job", tmp_path / "index", network, **QUIET)
    assert everything(tmp_path / "index") == expected


def test_another_network_is_refused_where_it_starts(tmp_path, planned) -> None:
    _, job, _ = planned
    with pytest.raises(NetworkMismatch, match=r"its parameters_sha256 is .*, given is"):
        run_shard(job, 0, network=toy("other", seed=1).network, **QUIET)
    plain = toy("other", normalize=False).network
    with pytest.raises(NetworkMismatch, match="its normalize is True, given is one with False"):
        run_shard(job, 0, network=plain, **QUIET)
    with pytest.raises(InputError, match="was not loaded by name; give it"):
        run_shard(job, 0, **QUIET)
    twin = toy("other").network
    identity = twin.identity()
    off = jobs.replace(identity, probe_embedding=identity.probe_embedding * np.float32(1.0001))
    twin.identity = lambda: off
    with pytest.raises(NetworkMismatch, match="on the probe picture the network differs by"):
        run_shard(job, 0, network=twin, **QUIET)


def test_an_image_that_changed_is_refused_where_it_is_read(tmp_path) -> None:
    it, source = toy("other"), pictures(tmp_path / "p")
    job = tmp_path / "job"
    plan_job(source, it.network, job, Recipe(triplets=4), pieces=3, **FEW)
    for piece in range(3):
        run_shard(job, piece, network=it.network, **QUIET)
    paint(tmp_path / "p", [4], seed=8)
    with pytest.raises(ImageError, match=r"c1/004\.png: its file changed after the job was plan"):
        merge_job(job, tmp_path / "index", it.network, **QUIET)
    shutil.rmtree(job / "embed-0000001")
    with pytest.raises(ImageError, match="its file changed after the job was planned"):
        run_shard(job, 1, network=it.network, **QUIET)
    (tmp_path / "p/c1/004.png").unlink()
    with pytest.raises(ImageError, match="its file was removed after the job was planned; put"):
        run_shard(job, 1, network=it.network, **QUIET)


def test_a_job_that_is_removed_under_the_work_gets_a_sentence(tmp_path, planned) -> None:
    network, job, _ = planned
    write, gather = jobs.Checkpoint.write, merge.gather
    said = "job: the job was removed, or is out of reach, while it was worked on; bring its folder"

    def gone(function, *given):
        shutil.rmtree(tmp_path / "job", ignore_errors=True)
        return function(*given)

    shutil.copytree(job, tmp_path / "job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Checkpoint, "write", lambda *given: gone(write, *given))
        with pytest.raises(EmbedcamError, match=said):
            run_shard(tmp_path / "job", 0, network=network, **QUIET)
    shutil.copytree(job, tmp_path / "job")
    run_shard(tmp_path / "job", 0, 1, network, **QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "gather", lambda *given: gone(gather, *given))
        with pytest.raises(EmbedcamError, match=said):
            merge_job(tmp_path / "job", tmp_path / "index", network, **QUIET)
    assert not (tmp_path / "index/manifest.json").exists()


def test_what_cannot_be_planned_or_done(tmp_path, planned) -> None:
    network, job, _ = planned
    source = ImageSource(find_images(job.parent / "p").items, job.parent / "p")
    for arguments, message in (
        ((7,), "piece = 7 of 7; pieces are counted from 0 to 6"),
        ((-1,), "piece = -1; give a whole number"),
        ((0, 0), "of = 0; give a whole number of at least 1"),
        ((3, 3), "piece = 3 of 3"),
    ):
        with pytest.raises(InputError, match=message):
            run_shard(job, *arguments, network=network, **QUIET)
    with pytest.raises(InputError, match=r"is no job \(there is no such folder\); plan one"):
        run_shard(tmp_path / "none", 0, network=network, **QUIET)
    with pytest.raises(InputError, match=r"is no job \(has no job\.json\)"):
        missing_pieces(tmp_path)
    with pytest.raises(InputError, match="holds another job"):
        plan_job(source, network, job, Recipe(seed=9), **FEW)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which is no part of a job"):
        plan_job(source, network, tmp_path, **FEW)
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which is no part of an index"):
        merge_job(job, tmp_path, network, **QUIET)
    with pytest.raises(InputError, match="pieces = 0; give a whole number from 1 to"):
        plan_job(source, network, tmp_path / "job", pieces=0, **FEW)
    with pytest.raises(InputError, match="lives in this process"):
        plan_job(from_dataset([np.zeros((9, 9, 3), "u1")] * 4), network, tmp_path / "job", **FEW)
    assert not (tmp_path / "job").exists()


def test_planning_again_is_the_same_job(tmp_path) -> None:
    it, source = toy(), pictures(tmp_path / "p")
    for _ in range(2):
        report = plan_job(source, it.network, tmp_path / "job", pieces=2, **FEW)
    assert (report.n_images, report.n_pieces, report.rounds) == (12, 2, 1)
    listed = everything(tmp_path / "job")
    (tmp_path / "job/job.json").unlink()  # killed before it was written
    plan_job(source, it.network, tmp_path / "job", pieces=2, **FEW)
    assert everything(tmp_path / "job") == listed
    for piece in range(2):
        run_shard(tmp_path / "job", piece, network=it.network, **QUIET)
    merge_job(tmp_path / "job", tmp_path / "index", it.network, **QUIET)
    done = everything(tmp_path / "job")
    assert plan_job(source, it.network, tmp_path / "job", pieces=2, **FEW) == report
    assert everything(tmp_path / "job") == done


def test_a_job_that_was_altered_gets_a_sentence(tmp_path, planned) -> None:
    network, job, _ = planned
    shutil.copytree(job, tmp_path / "job")
    file = tmp_path / "job/job.json"
    good, chance = json.loads(file.read_text()), random.Random(0)

    def refused(content: object) -> str:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError) as error:
            run_shard(tmp_path / "job", 0, network=network, **QUIET)
        assert str(tmp_path / "job") in str(error.value)
        return str(error.value)

    for text in ("", "{", "[]", "3", "null", "[" * 100_000, "{}"):
        refused(text)
    assert "is a job of version 2, and this embedcam does version 1" in refused(
        {**good, "version": 2}
    )
    assert "was altered" in refused({**good, "job": {**good["job"], "trust": False}})
    hostile = [None, -1, 0, 10**30, 1.5, "x", "../..", [], {}, [[]], True, "a" * 5000]
    for name in good["job"]:
        for value in chance.sample(hostile, 5):
            choices = {**good["job"], name: value}
            if value == good["job"][name] or (name == "loading" and value in (None, {})):
                continue
            content = {**good, "job": choices, "sha256": jobs._sha256(choices)}
            file.write_text(json.dumps(content))
            with suppress(InputError):
                jobs.Job.open(tmp_path / "job").chunks_of(0)
    file.write_text(json.dumps(good))
    for place in sorted((tmp_path / "job").glob("*-*/*")):
        kept = place.read_bytes()
        place.write_bytes(kept[: len(kept) // 2] if len(kept) > 1 else b"zz")
        if kept:
            with pytest.raises(InputError, match=r"list of (files|images)|belong") as error:
                jobs.Job.open(tmp_path / "job")
            assert str(error.value).endswith("; plan the job again in another folder")
            assert "[" not in str(error.value).removeprefix(str(tmp_path))
        place.write_bytes(kept)
    jobs.Job.open(tmp_path / "job")
    file.rename(tmp_path / "held")
    file.symlink_to(tmp_path / "held")
    with pytest.raises(InputError, match=r"job\.json: is a symbolic link; plan the job again"):
        jobs.Job.open(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    os.symlink(tmp_path / "elsewhere", tmp_path / "job")
    with pytest.raises(InputError, match="symbolic link"):
        jobs.Job.open(tmp_path / "job")


def test_what_can_be_read_now_counts_in_the_weights_of_all(tmp_path, monkeypatch) -> None:
    """Skipped for once, then asked for: nothing of what was reduced without it is used again."""
    it, source = toy("other"), pictures(tmp_path / "p")
    one = built(source, it, tmp_path / "one", **FEW)
    opened = ImageSource.open

    def sometimes(self, position):
        if position == 5:
            raise ImageError("busy")
        return opened(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "open", sometimes)
        patch.setattr("embedcam.index.writer.create", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            built(source, it, tmp_path / "two", on_unreadable="skip", **FEW)
    two = built(source, it, tmp_path / "two", **FEW)
    assert everything(two) == everything(one)
