"""`HeadPass.jvp`: how z moves with the activations, against the whole Jacobian in float64."""

import numpy as np
import pytest
import torch
from build_samples import SIDE, toy
from oracles_pairs import jacobian
from toys import VIT_LAYER, seeded, small_vit

from embedcam import EmbeddingNetwork
from embedcam.errors import InputError, NetworkError


def inputs(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["affine", "pooled", "other", "tokens"])
def test_it_is_the_jacobian_times_the_change(kind: str) -> None:
    made = toy(kind)
    with made.network.head_pass(inputs(2), twice=True) as passed:
        maps = passed.features.activations
        change = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))
        found = [passed.jvp(change.numpy()).numpy(), passed.jvp(change).numpy()]
    expected = [
        np.einsum("dkij,kij->d", jacobian(made.head, one.double().numpy()), moved.double().numpy())
        for one, moved in zip(maps, change, strict=True)
    ]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])


def test_it_agrees_with_vjp_behind_attention() -> None:
    """<c, J t> = <J^T c, t>, inside inference mode too; parameters keep no gradient."""
    module = seeded(small_vit)
    network = EmbeddingNetwork(module, VIT_LAYER)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), network.head_pass(image, twice=True) as passed:
        shape = passed.features.activations.shape
        generator = torch.Generator().manual_seed(1)
        change = torch.randn(shape, generator=generator)
        c = torch.randn(1, passed.features.embedding.shape[1], generator=generator)
        moved, back = passed.jvp(change), passed.vjp(c)
    assert float((c * moved).sum()) == pytest.approx(float((back * change).sum()), rel=1e-4)
    assert float((back * change).sum()) != 0
    assert all(p.grad is None for p in module.parameters())


def test_refusals() -> None:
    made = toy("affine")
    passed = made.network.head_pass(inputs(1), twice=True)
    with pytest.raises(
        InputError, match=r"tangents are \[1, 8, 2, 2\]; expected .* \[1, 8, 4, 4\]"
    ):
        passed.jvp(np.zeros((1, 8, 2, 2), np.float32))
    passed.close()
    with pytest.raises(InputError, match="this pass was closed"):
        passed.jvp(np.zeros((1, 8, 4, 4), np.float32))


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class _Head(torch.nn.Module):
    def forward(self, maps):
        return _OnceOnly.apply(maps.mean((2, 3)))


def test_a_head_that_cannot_be_differentiated_twice_says_so() -> None:
    trunk = seeded(lambda: torch.nn.Conv2d(3, 8, 4, 4))
    network = EmbeddingNetwork.from_parts(trunk, _Head().eval())
    with network.head_pass(inputs(1), twice=True) as passed:
        assert passed.vjp(np.ones((1, 8), np.float32)).any()
        with pytest.raises(NetworkError, match=r"'trunk' cannot be differentiated twice"):
            passed.jvp(np.ones((1, 8, 4, 4), np.float32))
