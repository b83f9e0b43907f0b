"""A build in pieces: the same bytes as one process, whatever the pieces, order and kills."""

from pathlib import Path

import pytest
from build_samples import built, dense, everything, pictures, quicken, toy

import embedcam.offline.plan as plan
from embedcam.network import EmbeddingNetwork
from embedcam.offline import merge_job, plan_job, run_shard
from embedcam.recipe.recipe import Recipe

FEW = {"batch_size": 4}
QUIET = {"workers": 0, "progress": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    quicken(monkeypatch)
    monkeypatch.setattr(plan, "CHUNK", 4)


def in_pieces(source, network: EmbeddingNetwork, base: Path, recipe=None, **options) -> Path:
    """Plan, do every round of every piece backwards, and merge."""
    job = base / "job"
    report = plan_job(source, network, job, recipe, **{**FEW, **options})
    for _ in range(report.rounds):
        for piece in reversed(range(report.n_pieces)):
            run_shard(job, piece, network=network, **QUIET)
    merge_job(job, base / "merged", network, **QUIET)
    return base / "merged"


KINDS = {
    "codes": ("affine", Recipe(), {}),
    "drawn": ("affine", Recipe(triplets=4), {}),
    "pooled": ("pooled", Recipe(triplets=4, rank=3), {}),
    "gradcam++": ("other", Recipe(triplets=4, method="gradcam++", rank=3), {}),
    "again": ("other", Recipe(triplets=4, rank=3), {"scratch_gb": 0}),
    "codes again": ("affine", Recipe(), {"scratch_gb": 0}),
    "zoo": ("affine", dense(method="scorecam", encoding="top-m", m=3), {}),
    "bare": ("affine", Recipe(encoding="dense"), {"own_maps": False, "trust": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_bytes_of_one_process(tmp_path, kind) -> None:
    name, recipe, options = KINDS[kind]
    it, source = toy(name), pictures(tmp_path / "p", 18)
    one = built(source, it, tmp_path / "one", recipe, **FEW, **options)
    several = in_pieces(source, it.network, tmp_path, recipe, pieces=3, **options)
    assert everything(several) == everything(one)
