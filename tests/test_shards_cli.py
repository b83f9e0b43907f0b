"""`embedcam plan`, `shard` and `merge`, and the scripts that docs/shards.md shows for them."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cli_samples import NAMED, TRUSTED, Say, answer
from input_samples import png
from photo_samples import picture

from embedcam.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "shards.md").read_text(encoding="utf-8")
PLAN = ["plan", "photos", "--pieces", 3, "--batch-size", 2, *NAMED]


@pytest.fixture(scope="module", autouse=True)
def small_chunks(cli_folder: Path, quick_disk: None):
    """A working folder, and chunks of four images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedcam.offline.plan.CHUNK", 4)
        assert main(["build", "photos", "one", "--quiet", "--batch-size", "2", *NAMED]) == 0
        yield


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_plan_shard_merge(say: Say, refused, tmp_path: Path) -> None:
    job, index = tmp_path / "job", tmp_path / "index"
    code, out, _ = say(*PLAN, job)
    assert (code, out) == (
        0,
        f"{job}: 12 images in 3 pieces\n  do each piece: embedcam shard {job} I, I = 0 to 2\n"
        f"  then: embedcam merge {job} INDEX\n",
    )
    assert say("shard", job, 1, *TRUSTED)[:2] == (0, f"{job}: piece 1 of 3, 4 images: done\n")
    missing = f"embedcam: {job}: 2 of its 3 pieces are missing (0, 2); do each of them: `embedcam"
    refused(2, missing, "merge", job, index)
    code, out, err = say("merge", job, index, "--json")
    assert (code, json.loads(out)) == (2, {"path": str(job), "missing": [0, 2]})
    assert err.startswith(missing)
    told = answer(say, "shard", job, 0, "--of", 1, *TRUSTED)
    assert (told["n_images"], told["done"], told["rounds"], told["waits_for"]) == (12, 1, 1, [])
    code, out, _ = say("merge", job, index, *TRUSTED)
    assert (code, out.startswith(f"{index}: built, 12 images in ")) == (0, True)
    assert files(index) == files("one")
    told = f"{index}: holds these images already; nothing to do\n"
    assert say("merge", job, index, *TRUSTED)[:2] == (0, told)


def test_a_second_round_and_what_it_waits_for(say: Say, tmp_path: Path) -> None:
    job, index = tmp_path / "job", tmp_path / "index"
    slow = ["--method", "scorecam", "--encoding", "dense"]
    assert "  do each piece, twice: embedcam shard" in say(*PLAN, job, *slow)[1]
    said = "embedded; do it again once piece{} embedded too, or leave the rest to the merge"
    for piece, text in ((0, said.format("s 1, 2 are")), (1, said.format(" 2 is")), (2, "done")):
        assert say("shard", job, piece, *TRUSTED)[1].endswith(f": {text}\n")
    assert say("shard", job, 0, *TRUSTED)[1].endswith(": done\n")
    assert say("merge", job, index, *TRUSTED)[0] == 0
    assert say("build", "photos", tmp_path / "one", "--batch-size", 2, *NAMED, *slow)[0] == 0
    assert files(index) == files(tmp_path / "one")


def test_additions_and_refits(say: Say, refused, tmp_path: Path) -> None:
    index, more, one = tmp_path / "index", tmp_path / "more", tmp_path / "one"
    for place in (index, one):
        assert say("build", "photos", place, "--batch-size", 2, *NAMED)[0] == 0
    (more / "0").mkdir(parents=True)
    for number in range(3):
        picture(0, 90 + number).save(more / f"0/new{number}.png")
    job = tmp_path / "job"
    plan = ["plan", more, job, "--add", index, "--batch-size", 2, *TRUSTED]
    assert say(*plan)[1].endswith(f"then: embedcam merge {job} {index}\n")
    assert say("shard", job, 0, *TRUSTED)[0] == 0
    assert say("merge", job, index, *TRUSTED)[1].startswith(f"{index}: 3 images added in ")
    said = f"{index}: holds these images already; nothing to do\n"
    assert say("merge", job, index, *TRUSTED)[:2] == (0, said)
    assert say("add", one, more, "--batch-size", 2)[0] == 0
    assert files(index) == files(one)
    refused(2, "3 of 3 images are in the index already", *plan[:2], tmp_path / "j", *plan[3:])
    skipping = [*plan[:2], tmp_path / "j", *plan[3:], "--skip-existing", "--quiet"]
    refused(2, "holds these images already; there is nothing to add", *skipping)
    again = tmp_path / "again"
    assert say("plan", again, "--refit", index, "--batch-size", 2, *TRUSTED)[0] == 0
    assert say("shard", again, 0, "--of", 1, *TRUSTED)[0] == 0
    assert "built, 15 images" in say("merge", again, index, *TRUSTED)[1]
    assert say("build", one, "--refit", "--batch-size", 2)[0] == 0
    assert files(index) == files(one)


def test_wrong_words(say: Say, refused, tmp_path: Path) -> None:
    job = tmp_path / "job"
    for command in (["shard", job, 0], ["merge", job, tmp_path / "index"]):
        refused(6, f"{job}: is no job (there is no such folder); plan one: embedcam plan", *command)
    assert say(*PLAN, job)[0] == 0
    for words, message in (
        (["shard", job, 3, *TRUSTED], "piece = 3 of 3; pieces are counted from 0 to 2"),
        (["shard", job, 0], "this job names the network 'cli_toy_network:make', which is code of"),
        (["merge", job, "photos", *TRUSTED], "which is no part of an index"),
        (["plan", "photos", "photos", *NAMED], "which is no part of a job"),
        (["plan", "photos", job, "--batch-size", 3, *NAMED], "holds another job"),
        (["plan", job, *NAMED], "no images were given; name a folder or a CSV"),
        (["plan", "photos", "j", "--skip-existing", *NAMED], "--skip-existing goes with --add IND"),
        (
            ["plan", "photos", "j", "--add", "one", "--top-m", 3, "--no-trust", *TRUSTED],
            "--add takes images in by the recipe of one; leave out --top-m, --no-trust, or plan",
        ),
    ):
        if words[0] == "merge":
            for piece in range(3):
                assert say("shard", job, piece, *TRUSTED)[0] == 0
        refused(2, message, *words)
    broken = ["--network", "cli_toy_network:make", "--layer", "conv"]
    refused(4, "this is not the network of the plan: its layer is", "shard", job, 0, *broken)
    for words in (["shard", job, -1], ["shard", job, "x"], ["shard", job, 0, "--of", 0]):
        assert say(*words)[0] == 2


def test_what_to_do_about_a_picture_that_cannot_be_read(say: Say, refused, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"p{number}.png").write_bytes(png(number) if number else b"none")
    job = tmp_path / "job"
    assert say("plan", tmp_path, job, *NAMED)[0] == 0
    says = "; planned again in another folder, --on-unreadable skip leaves such files out\n"
    refused(3, says, "shard", job, 0, "--quiet", *TRUSTED)
    (tmp_path / "p0.png").unlink()
    says = "its file was removed after the job was planned; put the old one back, or plan the job "
    refused(3, f"{says}again in another folder\n", "shard", job, 0, "--quiet", *TRUSTED)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run_as(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """The embedcam commands that a shell script runs, each once, in any order."""
    (folder / "bin").mkdir(exist_ok=True)
    said = folder / "said"
    said.write_text("")
    for name, code in (
        ("embedcam", f'echo "embedcam $*" >> {shlex.quote(str(said))}'),
        ("sbatch", '[ "$2" != --wrap ] || sh -c "$3"; echo 17'),
    ):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command, env = ["bash", "-euc", script], {"PATH": path, **variables}
    subprocess.run(command, env=env, check=True, cwd=folder, capture_output=True)
    return sorted(line.split()[1:] for line in said.read_text().splitlines())


def test_the_scripts_of_the_page_do_every_piece(say: Say, tmp_path: Path, monkeypatch) -> None:
    array, submit, loop = blocks("bash")
    tasks = re.search(r"^#SBATCH --array=0-(\d+)$", array, re.MULTILINE)
    count = int(tasks[1]) + 1
    commands: list[list[str]] = []
    for task in range(count):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(count)}
        commands += run_as(array, tmp_path, SLURM_CPUS_PER_TASK="4", **slurm)
    assert commands == [["shard", "job/", str(n), "--of", str(count)] for n in range(count)]
    merges = run_as(submit, tmp_path)
    assert merges == [["merge", "job/", "my.index"]]
    halves = run_as(loop, tmp_path)
    assert halves == [["shard", "job/", str(n), "--of", "2"] for n in range(2)]
    # What they run makes the index.
    photos = Path("photos").resolve()
    for number, words in enumerate((commands, halves)):
        (tmp_path / str(number)).mkdir()
        job = tmp_path / str(number) / "job"
        assert say("plan", photos, *PLAN[2:], job)[0] == 0
        for command in words:
            assert say("shard", job, *command[2:], *TRUSTED)[0] == 0
        index = tmp_path / str(number) / "my.index"
        assert say("merge", job, index, *TRUSTED)[0] == 0
        assert files(index) == files("one")


def test_the_kubernetes_job_of_the_page_does_every_piece(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", 8)
    (container,) = spec["template"]["spec"]["containers"]
    (volume,) = spec["template"]["spec"]["volumes"]
    assert [one["name"] for one in container["volumeMounts"]] == [volume["name"]]
    assert container["command"][:2] == ["sh", "-c"]
    found = []
    for index in range(spec["completions"]):
        found += run_as(container["command"][2], tmp_path, JOB_COMPLETION_INDEX=str(index))
    assert found == [["shard", "/data/job", str(n), "--of", "8"] for n in range(8)]
