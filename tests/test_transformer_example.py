"""The example for CLIP and DINOv2, with small random networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
from examples import transformer as example

KINDS = ("dinov2", "clip")


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_grad_cam_of_the_cosine_similarity(kind: str) -> None:
    network = example.random_network(kind)
    query, other = network.probe_images(2)
    found = example.explain(network, query, other)

    made = network.head_pass(query[None])
    z = (made.features.embedding * made.features.norm[:, None]).clone().requires_grad_()
    target = network.forward(other[None]).embedding
    y = torch.nn.functional.cosine_similarity(z, target).sum()
    gradient = made.vjp(torch.autograd.grad(y, z)[0])[0]
    activations = made.features.activations[0]
    expected = np.zeros((4, 4))
    for k in range(len(activations)):
        expected += float(gradient[k].mean()) * activations[k].numpy()
    np.testing.assert_allclose(found, expected.clip(min=0), rtol=1e-3, atol=1e-6)
    assert found.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_patches_behind_the_last_attention_are_refused(kind: str) -> None:
    from embedcam.errors import NetworkError
    from embedcam.network import EmbeddingNetwork

    network = example.random_network(kind)
    last = network.layer.rpartition(".")[0]
    behind = EmbeddingNetwork(network.module, f"{last}.mlp", output=network.output)
    with pytest.raises(NetworkError, match=rf"before its attention, '{network.layer}'"):
        behind.head_pass(network.probe_images(2))
    unsaid = EmbeddingNetwork(network.module, network.layer)
    if network.output == "pooler_output":  # what is taken of its kind where nothing is said
        expected = network.forward(network.probe_images(2)).embedding
        torch.testing.assert_close(unsaid.forward(network.probe_images(2)).embedding, expected)
        return
    with pytest.raises(NetworkError, match=rf"{network.output}.*; say which is the embedding"):
        unsaid.forward(network.probe_images(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_writes_a_picture(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name in ("query.png", "other.png"):
        pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    network = example.random_network(kind, seed=1)
    network.module.save_pretrained(tmp_path / "checkpoint")
    out = tmp_path / "why.png"
    paths = [str(tmp_path / "query.png"), str(tmp_path / "other.png"), "--out", str(out)]
    example.main([*paths, "--kind", kind])
    first = np.asarray(Image.open(out))
    assert first.shape == (60, 80, 3)
    example.main([*paths, "--model", str(tmp_path / "checkpoint")])
    assert not np.array_equal(np.asarray(Image.open(out)), first)  # other weights, another map
    assert "looks like" in capsys.readouterr().out
    loaded = example.load(tmp_path / "checkpoint")
    images = network.probe_images(2)
    assert torch.equal(loaded.forward(images).embedding, network.forward(images).embedding)
