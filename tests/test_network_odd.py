"""Networks that nobody planned for: found out before any work, and said in one sentence."""

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import Permute
from toys import images, seeded, toy

from embedcam.errors import InputError, NetworkError
from embedcam.index.identity import NetworkWarning
from embedcam.network import EmbeddingNetwork, load_network
from embedcam.network.checkpoints import load_state
from embedcam.preprocess import CustomPreprocess, Preprocess, custom, from_transform

SIZE = (32, 32)


class Net(nn.Module):
    """Convolution, ReLU, whatever a test puts between, pooling, linear."""

    def __init__(self, channels=3, stride=4, after=lambda z: z) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride, 1)
        self.relu, self.between = nn.ReLU(), nn.Identity()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        maps = self.relu(self.between(self.conv(x)))
        return self.after(self.linear(self.pool(maps).flatten(1)))


def wrapped(module: nn.Module, layer: str = "relu", **settings: Any) -> EmbeddingNetwork:
    return EmbeddingNetwork(module, layer, **{"input_size": SIZE, **settings})


@pytest.mark.parametrize("seed", range(2))
def test_chance_and_the_rest_of_the_batch_are_refused(seed: int) -> None:
    count = itertools.count(1)
    turns = iter([0, 0, 1, 0, 1] * 3)  # alone, again, beside, and again
    norm = nn.BatchNorm1d(6, track_running_stats=False).eval()
    torch.manual_seed(seed)
    for after, message in (
        (lambda z: F.dropout(z, 0.5), r"picture run twice.*random numbers \(.*dropout"),
        (lambda z: z + next(count), r"run twice.*what ran before"),
        (lambda z: z - 0.5 * z.mean(0), r"alone and beside another.*mixes the pictures"),
        (lambda z: z.flip(1) if torch.rand(()) < 0.4 else z, r"twice.*random numbers \(rand\)"),
        (lambda z: z.flip(1) if next(turns, 0) else z, r"run twice.*depends on chance"),
        (norm, r"statistics of the batch, also in eval mode"),
    ):
        with pytest.raises(NetworkError, match=message):
            wrapped(seeded(lambda after=after: Net(after=after))).check()


def test_ordinary_networks_are_steady_also_in_half_precision() -> None:
    for network in (wrapped(toy(), autocast=torch.bfloat16), wrapped(toy().to(torch.bfloat16))):
        network.check()


def failing(error: Exception) -> Callable[[Tensor], Tensor]:
    def fail(z: Tensor) -> Tensor:
        raise error

    return fail


def test_an_exception_of_the_network_is_told_as_its_own() -> None:
    cause = KeyError("the shelf")
    for run in (
        lambda network: network.forward(images()),
        lambda network: network.head_pass(images()),
        lambda network: network.forward_layers(images(), ["conv", "relu"]),
        lambda network: network.head_kind,
        lambda network: network.head_outputs(images(1), torch.zeros(1, 8, 4, 4)),
        lambda network: network.identity(),
    ):
        with pytest.raises(NetworkError, match="the shelf") as said:
            run(wrapped(seeded(lambda: Net(after=failing(cause)))))
        assert said.value.__cause__ is cause


def test_the_layer_at_fault_is_named() -> None:
    module = seeded(Net)
    module.between = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(NetworkError, match=r"'between' \(BatchNorm2d\) keeps no running statis"):
        wrapped(module).identity()
    module.between = nn.Linear(9, 8).eval()
    expected = r"\(Net\) failed on an input \[2, 3, 16, 16\], in its layer 'between' \(Linear\), wi"
    with pytest.raises(NetworkError, match=expected):
        wrapped(module).forward(images())


def test_memory_that_runs_out_is_no_fault_of_the_network() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to")):
        with pytest.raises(type(error)) as said:
            wrapped(seeded(lambda error=error: Net(after=failing(error)))).forward(images())
        assert said.value is error


def test_a_backward_that_fails() -> None:
    def no_way(z: Tensor) -> Tensor:
        if z.requires_grad:
            z.register_hook(failing(NotImplementedError("no way back")))
        return z

    with pytest.raises(NetworkError, match=r"derivative of what follows layer 'relu' failed.*no"):
        wrapped(seeded(lambda: Net(after=no_way))).check()


def test_torchscript_is_refused_whole_and_works_in_two_parts() -> None:
    module = seeded(Net)
    trunk = nn.Sequential(module.conv, module.relu).eval()
    head = nn.Sequential(module.pool, nn.Flatten(), module.linear).eval()
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have it exported
        script = torch.jit.trace(module, x)
        halves = torch.jit.trace(trunk, x), torch.jit.trace(head, trunk(x))
    with pytest.raises(NetworkError, match=r"TorchScript module.*from_parts\(trunk, head\)"):
        wrapped(script)
    parts = EmbeddingNetwork.from_parts(*halves, input_size=SIZE)
    expected = wrapped(module)
    torch.testing.assert_close(parts.forward(x).embedding, expected.forward(x).embedding)
    c = torch.ones(2, 5)
    torch.testing.assert_close(parts.head_pass(x).vjp(c), expected.head_pass(x).vjp(c))


def test_a_tensor_kept_from_the_first_forward_can_be_differentiated() -> None:
    kept: list[Tensor] = []

    def scaled(z: Tensor) -> Tensor:
        if not kept:
            kept.append(module.linear.bias * 2)
        return z * kept[0] * z

    module = seeded(lambda: Net(after=scaled))
    with torch.inference_mode():
        wrapped(module).forward(images())
    wrapped(module).forward_layers(images(), ["conv", "relu"])
    assert wrapped(module).head_pass(images()).vjp(torch.ones(2, 5)).any()


def test_networks_by_name_of_a_wrong_type() -> None:
    for given, message in (
        ({"network": nn.Identity()}, "network is a Identity"),
        ({"weights": 3}, "weights is a int"),
        ({"size": 3.5}, r"size = 3\.5; give"),
        ({"autocast": "int8"}, "known: off, bf16, fp16"),
    ):
        with pytest.raises(InputError, match=message):
            load_network(**{"network": "torchvision:resnet18", **given})


def test_torchvision_transforms_as_preprocess() -> None:
    from torchvision import models, transforms
    from torchvision.transforms import v2

    weights = models.ResNet18_Weights.DEFAULT
    network = EmbeddingNetwork(seeded(Net), "relu", preprocess=weights)
    assert network.preprocess == from_transform(weights.transforms())
    resize, to_tensor = transforms.Resize((8, 6)), transforms.ToTensor()
    old = transforms.Compose([transforms.Grayscale(), resize, to_tensor])
    assert from_transform(old) == Preprocess((8, 6), mean=(0.0,), std=(1.0,))
    steps = [v2.Resize((8, 6)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    new = from_transform(v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.25] * 3)]))
    assert new == Preprocess((8, 6), mean=(0.5,) * 3, std=(0.25,) * 3)
    flips = transforms.Compose([transforms.RandomHorizontalFlip(), to_tensor])
    with pytest.raises(InputError, match="without random steps"):
        EmbeddingNetwork(seeded(Net), "relu", preprocess=flips)


def test_hugging_face_processors_as_preprocess() -> None:
    class Processor:
        """What its settings say, and what it does, which need not be the same."""

        image_mean, image_std, resample = [0.5] * 3, [0.25] * 3, 3
        do_resize, do_rescale, do_normalize, rescale_factor = True, True, True, 1 / 255

        def __init__(self, does: Any, size: Any, crop: Any = None, **more: Any) -> None:
            vars(self).update(size=size, crop_size=crop, do_center_crop=crop is not None, **more)
            self.does = does

        def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
            return {"pixel_values": self.does(images)[None]}

    side, rest = {"height": 8, "width": 8}, ("bicubic", (0.5,) * 3, (0.25,) * 3)
    both = {"height": 10, "width": 12}
    for does, settings in (
        (Preprocess((8, 6), "squash", None, *rest), [{"height": 8, "width": 6}]),
        (Preprocess((8, 8), "crop", 10, *rest, "floor"), [{"shortest_edge": 10}, side]),
        (Preprocess((8, 8), "crop", (10, 12), *rest, "floor"), [both, side]),
        (Preprocess((14, 14), "crop", 16, *rest, "floor"), [{"shortest_edge": 14}, 14]),  # LeViT's
    ):
        assert from_transform(Processor(does, *settings)) == does
    # Numbers in [0, 255] taken to [-1, 1] first, as EfficientNet may.
    shifted = Preprocess((8, 8), "squash", None, "bicubic", (0.75,) * 3, (0.125,) * 3)
    found = from_transform(Processor(shifted, side, rescale_factor=1 / 127.5, rescale_offset=True))
    assert found == shifted
    # What is said is not what is done.
    other = from_transform(Processor(shifted, side))
    assert isinstance(other, CustomPreprocess)
    assert other.extent(5, 4) == (0, 0, 5, 4)
    np.testing.assert_array_equal(
        other(Image.new("RGB", (5, 4))), shifted(Image.new("RGB", (5, 4)))
    )
    with pytest.raises(InputError, match="crops pictures in a way"):
        from_transform(Processor(shifted, {"shortest_edge": 10}, crop_pct=0.9))


class Block(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens * 2, None


class Tokens(nn.Module):
    """8 x 8 patches as tokens in any order of axes; the mean of their squares embeds."""

    def __init__(self, order: tuple[int, int, int]) -> None:
        super().__init__()
        self.patches, self.block, self.order = nn.Conv2d(3, 4, 8, 8), Block(), order

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.block(tokens.permute(self.order))[0].permute(self.order)
        return {"z": tokens.pow(2).mean(1), "tokens": tokens}


@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_in_any_order(batch: int) -> None:
    for order, kind in (((0, 1, 2), "btk"), ((1, 0, 2), "tbk"), ((0, 2, 1), "bkt")):
        module = seeded(lambda order=order: Tokens(order))
        network, x = wrapped(module, "block", output="z"), images(batch)  # four of four channels
        made = network.head_pass(x)
        expected = 2 * module.patches(x).detach()
        assert network.layout == kind
        torch.testing.assert_close(made.features.activations, expected)
        torch.testing.assert_close(made.vjp(torch.ones(batch, 4)), expected / 2)
        assert not network.head_kind.pooled


@pytest.mark.parametrize("stride", [(4, 2), (2, 4)])
@pytest.mark.parametrize("last", [False, True])
def test_strides_that_differ_by_axis(stride: tuple[int, int], last: bool) -> None:
    there, back = ([0, 2, 3, 1], [0, 3, 1, 2]) if last else ([0, 1, 2, 3],) * 2
    conv = seeded(lambda: nn.Conv2d(3, 8, 3, stride, 1))
    pool = nn.Sequential(Permute(back), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = wrapped(nn.Sequential(conv, Permute(there), pool).eval(), "1")
    x = images(2, 32, 32)
    torch.testing.assert_close(network.forward(x).activations, conv(x).detach())
    assert network.layout == ("bhwk" if last else "bkhw")


def test_a_fixed_size_that_does_not_tell_asks_for_the_layout() -> None:
    fixed = [nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Unflatten(2, (4, 4))]
    module = nn.Sequential(*fixed, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(NetworkError, match=r"takes no other size.*say layout='bkhw' or 'bhwk'"):
        wrapped(module, "2").forward(images(1, 32, 32))
    wrapped(module, "2", layout="bkhw").forward(images(1, 32, 32))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_networks_of_other_channels(channels: int) -> None:
    module = seeded(lambda: Net(channels))
    network = wrapped(module)
    network.check()
    assert network.probe_images(2).shape == (2, channels, *SIZE)
    stacked = custom(lambda picture: np.ones((channels, 32, 32)), name="stacked")
    EmbeddingNetwork(module, "relu", preprocess=stacked).check()
    assert network.head_kind.affine


def test_a_copy_is_equal_and_independent() -> None:
    for network in (
        wrapped(seeded(Net)),
        # Its head is a function of the module's own.
        load_network("torchvision:mobilenet_v3_small", weights="random", size=64),
    ):
        x = torch.from_numpy(network.probe_images(2))
        before = network.forward(x).embedding
        other, c = copy.deepcopy(network), torch.ones_like(before)
        torch.testing.assert_close(other.forward(x).embedding, before)
        pooled = network.forward(x).activations.mean((2, 3))
        slope = network.pooled_vjp(pooled, c)
        with torch.no_grad():
            for parameter in other.module.parameters():
                parameter.mul_(-1.5)
        torch.testing.assert_close(network.forward(x).embedding, before)
        torch.testing.assert_close(network.pooled_vjp(pooled, c), slope)
        assert not torch.allclose(other.forward(x).embedding, before)
        assert not torch.allclose(other.pooled_vjp(pooled, c), slope)


def test_what_lies_beside_a_prefix_is_left_out_aloud() -> None:
    state = {f"net.{key}": value for key, value in seeded(Net, 1).state_dict().items()}
    with pytest.warns(NetworkWarning, match=r"1 entries beside 'net\.' are left out \(loss\.w\)"):
        load_state(seeded(Net), {**state, "loss.w": torch.ones(1)}, [], "weights")


def test_timm_networks_with_ways_of_their_own() -> None:
    pytest.importorskip("timm")
    for name in ("xcit_nano_12_p16_224", "cait_xxs24_224"):
        network = load_network(f"timm:{name}", weights="random")
        network.check()
        assert network.forward(network.probe_images()).activations.shape[2:] == (14, 14)


def test_a_network_that_changes_its_input_in_place_leaves_the_caller_s() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.sub_(0.5).mul_(2))

    plain, x = seeded(Net), images()
    before, expected = x.clone(), wrapped(plain).forward((x - 0.5) * 2).embedding
    trunk = lambda x: plain.relu(plain.conv(x.sub_(0.5).mul_(2)))  # noqa: E731
    head = lambda maps: plain.linear(plain.pool(maps).flatten(1))  # noqa: E731
    parts = EmbeddingNetwork.from_parts(trunk, head, module=plain, input_size=SIZE)
    for network in (wrapped(seeded(InPlace)), parts):
        for _ in range(2):
            torch.testing.assert_close(network.forward(x).embedding, expected)
        assert torch.equal(x, before)
        network.check()


class _MuteError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def test_outputs_that_are_no_real_vectors() -> None:
    for after, message in (
        (torch.fft.fft, r"output is a tensor of complex64.*view_as_real"),
        (lambda z: z.to_sparse(), r"output is a tensor of sparse_coo float32.*to_dense"),
        (lambda z: z.detach().numpy(), r"the network returned ndarray; expected the embedding"),
        (lambda z: None, r"the network returned NoneType; expected the embedding"),
        (failing(_MuteError()), r"failed on an input .* with _MuteError: no message"),
    ):
        with pytest.raises(NetworkError, match=message):
            wrapped(seeded(lambda after=after: Net(after=after))).forward(images())
    network = wrapped(seeded(Net), output=lambda out: out.last_hidden_state)
    with pytest.raises(NetworkError, match=r"output=.*failed.*last_hidden_state.*embedding \[B D"):
        network.forward(images())
    module = seeded(Net)
    module.relu.forward = torch.fft.fft2
    with pytest.raises(NetworkError, match="layer 'relu' returned a tensor of complex64; expected"):
        wrapped(module).forward(images())


def test_what_cannot_be_explained_is_said_before_any_work() -> None:
    for after, message, settings in (
        (lambda z: z[:, :1], r"the embedding is one number.*normalize=False", {}),
        (torch.sign, "zero everywhere", {"normalize": False}),
        (lambda z: (z > 0).float() + 1, "never reaches the embedding", {"normalize": False}),
    ):
        network = wrapped(seeded(lambda after=after: Net(after=after)), **settings)
        with pytest.raises(NetworkError, match=message):
            network.check()
        wrapped(network.module, normalize=False).check(gradients=not settings)


def test_a_layer_of_two_names_goes_by_either() -> None:
    module = seeded(Net)
    module.alias = module.relu
    assert wrapped(module, "alias").layer == "relu"


def test_a_layer_in_torchscript_is_refused_and_not_suggested() -> None:
    with pytest.raises(NetworkError, match=r"'pool' has one position .* such as 'relu'"):
        wrapped(seeded(Net), "pool").check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have it exported
        inner = torch.jit.script(nn.Sequential(nn.ReLU()))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.AdaptiveAvgPool2d(1)).eval()
    for layer in ("1", "1.0"):
        with pytest.raises(NetworkError, match=rf"layer '{layer}' is TorchScript.*from_parts"):
            wrapped(module, layer)
    with pytest.raises(NetworkError, match=r"one position.*such as '0'"):
        wrapped(module, "2").check()


def test_a_layer_inside_vmap_is_refused() -> None:
    module = seeded(Net)
    module.forward = torch.func.vmap(lambda one: Net.forward(module, one[None])[0])
    with pytest.raises(NetworkError, match=r"layer 'relu' returned a tensor inside torch\.vmap"):
        wrapped(module).forward(images())


def test_a_factory_whose_own_imports_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_it.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = r"^importing lacking_it failed with ModuleNotFoundError: .* import it by itself to see"
    with pytest.raises(NetworkError, match=said):
        load_network("lacking_it:make")
