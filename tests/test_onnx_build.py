"""Jobs whose forward passes ONNX Runtime runs: the same index, admitted either way."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_samples import pooled_model, save
from photo_samples import DENSE, Flat, Pooled, network_of, picture, same, write_photos
from test_onnx_network import described
from test_passes import embedded_in, more_photos
from toys import seeded

from embedcam import EmbeddingNetwork, Explainer, Index, build_index, find_images
from embedcam.errors import EmbeddingError, InputError, NetworkError, NetworkMismatch
from embedcam.export import opened_for, through_onnx
from embedcam.index import RunEntry
from embedcam.network import Features, load_network
from embedcam.onnx import OnnxNetwork

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "network.onnx"
    through_onnx(network_of(), path, progress=False)
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingNetwork:
    """A head that is not affine, so that the file itself must tell the embeddings' lengths."""
    return through_onnx(network_of(Flat), tmp_path_factory.mktemp("flat") / "n.onnx")


def noise(count: int = 3, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal((count, 3, 32, 32))
    return numbers.astype(np.float32)


def alike(mine: Features, other: Features) -> None:
    for name, values in vars(other).items():
        torch.testing.assert_close(vars(mine)[name], values, rtol=1e-4, atol=1e-5)


def by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("ONNX Runtime was asked")

    monkeypatch.setattr(OnnxNetwork, "embed", never)


# One network


@pytest.mark.parametrize("kind", [Pooled, Flat])
def test_passes_give_what_torch_gives(kind, file: Path, flat: EmbeddingNetwork) -> None:
    torchs = network_of(kind)
    network = opened_for(torchs, file) if kind is Pooled else flat
    for images in (noise(), torch.from_numpy(noise(1)), torch.from_numpy(noise()).requires_grad_()):
        given = images.detach() if isinstance(images, torch.Tensor) else images
        expected = torchs.forward(given)
        alike(network.forward(images), expected)
        embedding, norm, (maps,) = network.embed(images)
        alike(Features(*map(torch.from_numpy, (embedding, norm, maps))), expected)


def test_passes_are_the_session_s_and_derivatives_torch_s(file, monkeypatch) -> None:
    torchs = network_of()
    network = opened_for(torchs, file)
    calls: list[int] = []
    torchs.module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    network.forward(noise())
    network.embed(noise(), ["relu"])
    assert calls == []
    cotangents = torch.ones(3, 5)
    with network.head_pass(noise()) as mine, torchs.head_pass(noise()) as other:
        assert torch.equal(mine.vjp(cotangents), other.vjp(cotangents))
    calls.clear()
    network.forward_layers(noise(2), ["conv", "relu"])
    assert calls[0] == 2
    by_torch_alone(monkeypatch)
    alike(network.without_autocast().forward(noise()), torchs.forward(noise()))


def test_what_it_is_and_how_it_is_run(file: Path) -> None:
    torchs = network_of()
    network = opened_for(torchs, file)
    assert network.usual_run == RunEntry("onnx", "cpu", 32, False)
    assert network.identity().to_dict() == torchs.identity().to_dict()
    assert network.repeat_run(RunEntry("onnx", "cpu", 7, False)) == 7
    assert network.repeat_run(RunEntry("torch", "cpu", 7, True)) is None


def test_weights_with_channels_last_are_exported(tmp_path: Path) -> None:
    torchs = load_network("test_passes:made", layer="relu")
    network = through_onnx(torchs, tmp_path / "n.onnx", progress=False)
    assert torchs.channels_last
    assert not network.usual_run.channels_last
    alike(network.forward(noise()), torchs.forward(noise()))
    described = OnnxNetwork(tmp_path / "n.onnx").described
    assert described is not None
    assert described.loading == torchs.spec


def test_a_masked_picture_may_be_zero_and_a_bad_one_is_named(flat, tmp_path) -> None:
    torchs = network_of()
    with torch.no_grad():
        torchs.module.get_parameter("conv.bias").zero_()
        torchs.module.get_parameter("linear.bias").zero_()
    network = through_onnx(torchs, tmp_path / "n.onnx", progress=False)
    images = noise()
    images[1] = 0
    with pytest.raises(EmbeddingError) as refused:
        network.forward(images)
    assert refused.value.rows == [1]
    zeros = network.forward(images, allow_zero=True)
    alike(zeros, torchs.forward(images, allow_zero=True))
    assert not zeros.embedding[1].any()
    images[2, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        flat.forward(images)


# Another file


def test_another_network_s_file_is_refused(file: Path, tmp_path: Path) -> None:
    other = EmbeddingNetwork(seeded(Pooled, 7), "relu", preprocess=network_of().preprocess)
    with pytest.raises(NetworkMismatch, match=r"holds another network .* on the probe picture"):
        opened_for(other, file)
    with pytest.raises(NetworkMismatch, match="their normalize differs, False and True"):
        opened_for(network_of(normalize=False), file)
    with pytest.raises(NetworkMismatch, match="their layer differs, 'conv' and 'relu'"):
        opened_for(EmbeddingNetwork(seeded(Pooled), "conv", preprocess=other.preprocess), file)
    with pytest.raises(NetworkError, match="computes in bfloat16 on cpu"):
        opened_for(network_of(autocast=torch.bfloat16), file)
    foreign = save(pooled_model(other), tmp_path / "foreign.onnx")
    with pytest.raises(NetworkError, match="not written by `embedcam export`"):
        opened_for(other, foreign)


def test_an_older_file_tells_no_length_which_an_affine_head_gives(tmp_path: Path) -> None:
    torchs = network_of()
    older = save(pooled_model(torchs, props=described(torchs)), tmp_path / "older.onnx")
    assert OnnxNetwork(older).embed(noise()).norm is None
    alike(opened_for(torchs, older).forward(noise()), torchs.forward(noise()))


def test_an_older_file_without_such_a_head_is_refused(flat, monkeypatch) -> None:
    embed = OnnxNetwork.embed
    cut = lambda *given: embed(*given)._replace(norm=None)  # noqa: E731
    monkeypatch.setattr(OnnxNetwork, "embed", cut)
    session = flat._session
    with pytest.raises(NetworkError, match="does not tell the length of its embeddings"):
        network_of(Flat).with_session(session)


# An index


def rows_of(path: Path) -> tuple[Any, np.ndarray, list[np.ndarray]]:
    with Index.open(path) as index:
        rows = index.live_positions()
        fields = index.select(rows).fields(0)
        return index.manifest, np.array(index.embeddings(rows)), [fields[n] for n in sorted(fields)]


@pytest.mark.parametrize("kind", [Pooled, Flat])
def test_an_index_is_the_same_and_either_network_is_admitted(kind, photos, tmp_path) -> None:
    recipe = None if kind is Pooled else DENSE
    torchs = network_of(kind)
    network = through_onnx(torchs, tmp_path / "n.onnx", progress=False)
    both = {}
    for name, one in (("torch", torchs), ("onnx", network)):
        build_index(find_images(photos), one, tmp_path / name, recipe, progress=False)
        both[name] = rows_of(tmp_path / name)
    (first, *expected), (second, *found) = both["torch"], both["onnx"]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for mine, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
    assert second.run == RunEntry("onnx", "cpu", 32, False)
    assert second.libraries["onnxruntime"] == onnxruntime.__version__
    assert "onnxruntime" not in first.libraries
    query = picture(2, 77)
    answers = []
    for name in both:
        for one in (torchs, network, OnnxNetwork(tmp_path / "n.onnx")):
            with Explainer(tmp_path / name, one, n_neighbors=3) as explainer:
                answers.append(explainer.explain(query))
    for answer in answers[1:]:
        same(answers[0], answer, rtol=1e-3)


def test_an_index_of_a_derivative_s_method_takes_torch_for_it(photos, tmp_path) -> None:
    network = through_onnx(network_of(Flat), tmp_path / "n.onnx", progress=False)
    calls: list[int] = []
    network.module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    assert embedded_in(network, tmp_path / "i", photos, recipe=DENSE, trust=False)[:1] == [12]
    assert calls.count(12) == 1  # the head's derivative, of all twelve


# The command line


@pytest.fixture(scope="module")
def folder(cli_folder: Path) -> Path:
    return cli_folder


NAMED = ("--network", "cli_toy_network:make", "--layer", "relu")


def manifest_of(path: str) -> dict[str, Any]:
    return dict(json.loads((Path(path) / "manifest.json").read_text()))


def test_a_command_exports_on_the_way_and_additions_follow(folder, say) -> None:
    code, out, err = say("build", "photos", "way.index", *NAMED, "--runtime", "onnx")
    assert code == 0, err
    assert "forward passes: batches of 32, ONNX Runtime" in err
    assert manifest_of("way.index")["run"]["runtime"] == "onnx"
    more_photos(folder / "later")
    code, out, err = say("add", "way.index", "later")
    assert code == 0, err
    assert "forward passes: batches of 32, ONNX Runtime" in err
    write_photos(folder / "latest" / "x", 1, 2)
    code, out, err = say("add", "way.index", "latest", "--runtime", "torch", "--batch-size", 3)
    assert code == 0, err
    assert "forward passes: batches of 3, torch" in err
    code, out, err = say("info", "way.index")
    assert "  passes      batches of 32, ONNX Runtime\n" in out
    asked = ("--measures", "retrieval", "--runtime", "onnx", "--batch-size", 4)
    code, out, err = say("evaluate", "way.index", "--images", "photos", *asked)
    assert code == 0, err
    assert "forward passes: batches of 4, ONNX Runtime" in err
    code, out, err = say("build", "photos", "way.index", "--refit")
    assert "forward passes: batches of 32, ONNX Runtime" in err


def test_a_command_runs_a_file_which_may_say_how_torch_loads_it(folder, say, refused) -> None:
    assert say("build", "photos", "plain.index", *NAMED)[0] == 0
    assert say("export", "plain.index", "-o", "n.onnx")[0] == 0
    message = "n.onnx names the network 'cli_toy_network:make', which is code of whoever built it"
    refused(2, message, "build", "photos", "file.index", "--onnx", "n.onnx")
    trusted = ("--network", "cli_toy_network:make")
    code, _, err = say("build", "photos", "file.index", "--onnx", "n.onnx", *NAMED)
    assert code == 0, err
    assert manifest_of("file.index")["run"]["runtime"] == "onnx"
    code, _, err = say("add", "file.index", "photos", "--skip-existing", *trusted)
    assert code == 0, err


def test_a_job_is_run_by_the_file_that_it_keeps(folder, say, refused) -> None:
    assert say("build", "photos", "whole.index", *NAMED, "--runtime", "onnx")[0] == 0
    assert say("plan", "photos", "job", *NAMED, "--runtime", "onnx")[0] == 0
    assert say("shard", "job", 0, *NAMED[:2])[0] == 0
    assert say("merge", "job", "merged.index", *NAMED[:2])[0] == 0
    one, several = (Path(name) for name in ("whole.index", "merged.index"))
    names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert names == {str(p.relative_to(several)) for p in several.rglob("*") if p.is_file()}
    assert all((one / name).read_bytes() == (several / name).read_bytes() for name in names)
    (file,) = Path("job").glob("network-*.onnx")
    held = file.read_bytes()
    lost = f"{file}: is missing or damaged, and runs the job's network; plan the job again in"
    for content in (None, b"", held[: len(held) // 2]):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        for command in (("shard", "job", 0), ("merge", "job", "lost.index")):
            refused(4, lost, *command, *NAMED[:2])
        file.write_bytes(held)
    save(pooled_model(network_of(), props=described(network_of()), scale=2.0), file)
    refused(4, f"{file}: holds another network than the one given", "shard", "job", 0, *NAMED[:2])


def test_what_cannot_be_is_refused_before_any_work(folder, say, refused, monkeypatch) -> None:
    network = network_of()
    save(pooled_model(network, props=described(network)), folder / "silent.onnx")
    of = ("build", "photos", "none.index")
    message = "silent.onnx does not say how torch loads its network"
    refused(2, message, *of, "--onnx", "silent.onnx")
    refused(4, "holds another network than the one", *of, *NAMED, "--onnx", "silent.onnx")
    refused(2, "leave out --runtime torch", *of, "--onnx", "silent.onnx", "--runtime", "torch")
    refused(2, "--onnx gone.onnx: there is no such file", *of, *NAMED, "--onnx", "gone.onnx")
    features = ("--embeddings", "e.npy", "--pooled", "p.npy", "--grid", "2x2")
    refused(2, "leave out --onnx and --runtime", "build", "x.index", *features, "--runtime", "onnx")
    code, _, err = say("build", "photos", "by.index", *NAMED, "--runtime", "onnx")
    assert code == 0, err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    extra = 'exporting takes onnxscript, which is not installed; run pip install "embedcam[onnx]"'
    refused(4, extra, *of, *NAMED, "--runtime", "onnx")
    refused(4, f"{extra}, or give --runtime torch", "add", "by.index", "photos")
    assert not (folder / "none.index").exists()
