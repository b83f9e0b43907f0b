"""The example for CLIP and DINOv2, with small random networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedcam.errors import NetworkError
from embedcam.network import EmbeddingNetwork

pytest.importorskip("transformers")
from examples import transformer as example

pytestmark = pytest.mark.parametrize("kind", ["dinov2", "clip"])


def test_the_map_is_grad_cam_of_the_cosine_similarity(kind: str) -> None:
    network = example.random_network(kind)
    query, other = network.probe_images(2)
    found = example.explain(network, query, other)
    made = network.head_pass(query[None])
    z = (made.features.embedding * made.features.norm[:, None]).clone().requires_grad_()
    target = network.forward(other[None]).embedding
    y = torch.nn.functional.cosine_similarity(z, target).sum()
    weights = made.vjp(torch.autograd.grad(y, z)[0])[0].mean((1, 2))
    expected = torch.tensordot(weights, made.features.activations[0], 1).clamp(min=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert found.max() > 0


def test_patches_behind_the_last_attention_are_refused(kind: str) -> None:
    network = example.random_network(kind)
    x = network.probe_images(2)
    last = network.layer.rpartition(".")[0]
    behind = EmbeddingNetwork(network.module, f"{last}.mlp", output=network.output)
    with pytest.raises(NetworkError, match=rf"before its attention, '{network.layer}'"):
        behind.head_pass(x)
    unsaid = EmbeddingNetwork(network.module, network.layer)
    if network.output == "pooler_output":  # what is taken of its kind where nothing is said
        expected = network.forward(x).embedding
        torch.testing.assert_close(unsaid.forward(x).embedding, expected)
    else:
        with pytest.raises(NetworkError, match=rf"{network.output}.*; say which is the embedding"):
            unsaid.forward(x)


def test_the_program_writes_a_picture(kind: str, tmp_path: Path, capsys) -> None:
    generator = np.random.default_rng(0)
    query, other, out = (tmp_path / name for name in ("query.png", "other.png", "why.png"))
    for path in (query, other):
        Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    network = example.random_network(kind, seed=1)
    network.module.save_pretrained(tmp_path / "checkpoint")
    given = [str(query), str(other), "--out", str(out)]
    example.main([*given, "--kind", kind])
    first = np.asarray(Image.open(out))
    assert first.shape == (60, 80, 3)
    example.main([*given, "--model", str(tmp_path / "checkpoint")])
    assert not np.array_equal(np.asarray(Image.open(out)), first)  # other weights, another map
    assert "looks like" in capsys.readouterr().out
    loaded, images = example.load(tmp_path / "checkpoint"), network.probe_images(2)
    assert torch.equal(loaded.forward(images).embedding, network.forward(images).embedding)
