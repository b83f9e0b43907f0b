"""EmbeddingNetwork: gradients equal full autograd, nothing is left behind, misuse is refused."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from toys import VIT_LAYER, by_full_autograd, images, seeded, small_vgg, small_vit, toy

from embedcam.errors import InputError, NetworkError
from embedcam.network import EmbeddingNetwork, input_gradient, several_pass
from embedcam.preprocess import Preprocess

# A layer, an embedding of ten numbers, and the layout the layer has.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "resnet18": (lambda: models.resnet18(num_classes=10), "layer4.1.bn1", "bkhw"),
    "vgg": (small_vgg, "features.9", "bkhw"),
    "densenet": (lambda: models.densenet121(num_classes=10), "features", "bkhw"),
    "swin_t": (lambda: models.swin_t(num_classes=10), "norm", "bhwk"),
    "vit": (small_vit, VIT_LAYER, "btk"),
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_that_of_full_autograd(name: str) -> None:
    build, layer, layout = NETWORKS[name]
    module = seeded(build)
    x = images(2, 64, 64 if name == "vit" else 96)
    c = torch.randn(2, 10, generator=torch.Generator().manual_seed(5))
    network = EmbeddingNetwork(module, layer, normalize=False)
    single = network.head_pass(x).vjp(c)
    module.double()
    made, plain = network.head_pass(x), network.forward(x)
    double = made.vjp(c)
    full = by_full_autograd(module, [layer], x.double(), c.double())[layer]
    if layout == "btk":
        full = [one[:, 1:].unflatten(1, double.shape[2:]) for one in full]
    activations, expected = (one if layout == "bkhw" else one.permute(0, 3, 1, 2) for one in full)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert relative(double, expected) < 1e-10
    assert relative(single, expected) < 2e-4
    assert network.layout == layout
    # Both ways through give the same features, in-place units after the layer or not.
    for features in (made.features, plain):
        torch.testing.assert_close(features.activations, activations)
        torch.testing.assert_close(features.embedding, module(x.double()).detach())


def test_a_head_pass_answers_as_often_as_asked_until_it_is_closed() -> None:
    network, x = EmbeddingNetwork(toy(), "relu"), images()
    a, b = torch.randn(2, 5), torch.randn(2, 5)
    with network.head_pass(x) as made:
        both = made.vjp(2 * a - b)
        torch.testing.assert_close(both, 2 * made.vjp(a) - made.vjp(b))
        np.testing.assert_array_equal(made.vjp(a.numpy()), made.vjp(a))
        with pytest.raises(InputError, match=r"cotangents are \[2, 4\]; expected .* \[2, 5\]"):
            made.vjp(torch.ones(2, 4))
    with pytest.raises(InputError, match="this pass was closed"):
        made.vjp(a)


def test_normalisation_is_the_users_choice_and_the_norm_is_kept() -> None:
    module, x, c = toy(), images(), torch.randn(2, 5)
    z = module(x).detach()
    plain = EmbeddingNetwork(module, "relu", normalize=False).head_pass(x)
    torch.testing.assert_close(plain.features.embedding, z)
    unit = EmbeddingNetwork(module, "relu").head_pass(x)
    torch.testing.assert_close(unit.features.norm, z.norm(dim=1))
    torch.testing.assert_close(unit.features.embedding, z / z.norm(dim=1, keepdim=True))
    # The cotangent is at z, whether or not the embedding is normalised.
    torch.testing.assert_close(unit.vjp(c), plain.vjp(c))


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        "modes": [part.training for part in module.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "requires": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "values": [value.clone() for value in module.state_dict().values()],
        "enabled": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


Pass = Callable[[EmbeddingNetwork, Tensor, Tensor], Tensor]
PASSES: dict[str, Pass] = {
    "head_pass": lambda n, x, c: n.head_pass(x).vjp(c),
    "several_pass": lambda n, x, c: several_pass(n, x, ["conv", "relu"]).vjp(c)[0],
    "input_gradient": lambda n, x, c: input_gradient(n, x, lambda _: c, guided=False)[1],
    "guided": lambda n, x, c: input_gradient(n, x, lambda _: c)[1],
}
RUNS: dict[str, Pass] = {"forward": lambda n, x, c: n.forward(x).embedding, **PASSES}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_module_comes_back_as_it_was_also_after_an_exception(run: Pass) -> None:
    fails = False

    def wrap(z: Tensor) -> Tensor:
        if fails:
            raise KeyError("in the middle of a forward")
        return z

    module, x, c = toy(wrap), images(), torch.ones(2, 5)
    module.linear.weight.requires_grad_(False)
    module.conv.weight.grad = torch.full_like(module.conv.weight, 7)
    module.relu.register_forward_hook(lambda *_: None)  # the caller's own
    network, before = EmbeddingNetwork(module, "relu", autocast=torch.bfloat16), state_of(module)
    parts, kept = list(map(type, module.modules())), x.clone()
    run(network, x, c)
    assert network.head_kind.pooled
    assert_same_state(before, state_of(module))
    fails = True
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(NetworkError, match="in the middle") as said:
            run(network, x, c)
        assert isinstance(said.value.__cause__, KeyError)
        assert_same_state(before, state_of(module))
    assert parts == list(map(type, module.modules()))
    assert torch.equal(x, kept)
    assert not x.requires_grad


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_gradients_are_off(run: Pass, mode: Callable[[], Any]) -> None:
    network, c = EmbeddingNetwork(toy(), "relu"), torch.randn(2, 5)
    expected = run(network, images(), c)
    with mode():
        gradient = run(network, images().clone(), c.clone())
        features = network.forward(images().clone())
        by_pool = network.pooled_vjp(features.activations.mean((2, 3)), c)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(gradient, expected)
    expected = network.head_pass(images()).vjp(c)
    torch.testing.assert_close(by_pool, expected.sum((2, 3)))


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_digits_of_small_cotangents(run: Pass, dtype: torch.dtype) -> None:
    module, x, c = toy(), images(), torch.randn(2, 5)
    exact = run(EmbeddingNetwork(module, "relu"), x, c)
    network = EmbeddingNetwork(module, "relu", autocast=dtype)
    gradient = run(network, x, 1e-9 * c)
    assert gradient.dtype == torch.float32
    # ReLUs at zero flip with rounding: a few positions only.
    assert relative(1e9 * gradient, exact) < 0.3
    assert not run(network, x, 0 * c).any()


def test_concurrent_calls_do_not_mix() -> None:
    module, c = toy(), torch.randn(2, 5)
    first, second = EmbeddingNetwork(module, "relu"), EmbeddingNetwork(module, "conv")
    batches = [images(seed=seed) for seed in range(8)]
    barrier = threading.Barrier(4)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return first.head_pass(x).vjp(c), second.forward(x).activations, first.forward(x).embedding

    expected = [run(x) for x in batches]

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(24):
            i = (number + turn) % len(batches)
            torch.testing.assert_close(run(batches[i]), expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not module.relu._forward_hooks
    assert not module.conv._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
def test_half_precision_gives_float32_near_the_full_precision(dtype, cast) -> None:
    module, x, c = toy(), images(4), torch.randn(4, 5) * 1e-4
    exact = EmbeddingNetwork(module, "relu").head_pass(x)
    expected = exact.vjp(c)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what is around it changes nothing
        around = EmbeddingNetwork(module, "relu").head_pass(x)
        assert torch.equal(around.vjp(c), expected)
    low = EmbeddingNetwork(module, "relu", autocast=dtype)
    if not cast:
        low = EmbeddingNetwork(module.to(dtype), "relu")
    made = low.head_pass(x)
    gradient, features = made.vjp(c), made.features
    assert {one.dtype for one in (gradient, *vars(features).values())} == {torch.float32}
    assert 0 < relative(features.embedding, exact.features.embedding) < 3e-2
    assert relative(gradient, expected) < 3e-2
    torch.testing.assert_close(low.forward(x).embedding, features.embedding)


def test_channels_last_changes_the_memory_and_not_the_result() -> None:
    seen = []
    module, x = toy(), images()
    module.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    expected = EmbeddingNetwork(module, "relu").forward(x)
    features = EmbeddingNetwork(module, "relu", channels_last=True).forward(x)
    last = torch.channels_last
    whole = [one.is_contiguous(memory_format=last) for one in seen if len(one) == len(x)]
    assert whole == [False, True]
    torch.testing.assert_close(features.activations, expected.activations)
    assert features.activations.is_contiguous()


def test_arrays_go_in_read_only_or_not() -> None:
    network, x = EmbeddingNetwork(toy(), "relu"), images()
    array = x.numpy().copy()
    array.flags.writeable = False
    features = network.forward(array)
    assert torch.equal(features.embedding, network.forward(x).embedding)
    for tensor in vars(features).values():
        assert not tensor.is_inference()
        assert not tensor.requires_grad


# Dynamo itself looks at .grad of what it is given, and hides the warning unless it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_parts_give_what_the_hooked_module_gives_also_compiled() -> None:
    module, x, c = toy(), images(), torch.randn(2, 5)
    hooked = EmbeddingNetwork(module, "norm").head_pass(x)
    trunk = nn.Sequential(module.conv, module.norm).eval()
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), module.linear).eval()
    compiled = [torch.compile(part, backend="eager") for part in (trunk, head)]
    for pair in ((trunk, lambda a: module.linear(module.relu(a).mean((2, 3)))), compiled):
        parts = EmbeddingNetwork.from_parts(*pair, layer="norm")
        made = parts.head_pass(x)
        torch.testing.assert_close(made.vjp(c), hooked.vjp(c))
        torch.testing.assert_close(made.features.activations, hooked.features.activations)
        torch.testing.assert_close(parts.forward(x).embedding, hooked.features.embedding)
        assert parts.layer == "norm"
    with pytest.raises(NetworkError, match=r"'relu' lies inside a compiled.*from_parts"):
        EmbeddingNetwork(torch.compile(module, backend="eager"), "relu")


def test_a_network_describes_itself_in_print_and_for_json() -> None:
    preprocess = Preprocess(size=(16, 24))
    network = EmbeddingNetwork(toy(), "relu", preprocess=preprocess, name="toy")
    assert repr(network) == "<EmbeddingNetwork toy: layer relu, normalised, on cpu>"
    network.forward(network.probe_images(2))
    said = {"name": "toy", "layer": "relu", "output": None, "layout": "bkhw", "normalize": True}
    assert network.describe() == {**said, "preprocess": preprocess.to_dict()}
