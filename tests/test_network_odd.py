"""Networks that nobody planned for: found out before any work, and said in one sentence."""

import copy
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
from toys import images, seeded, toy

from embedcam.errors import InputError, NetworkError
from embedcam.index.identity import NetworkWarning
from embedcam.network import EmbeddingNetwork, load_network
from embedcam.network.checkpoints import load_state
from embedcam.preprocess import CustomPreprocess, Preprocess, custom, from_transform

SIZE = (32, 32)


class Net(nn.Module):
    """Convolution, ReLU, whatever a test puts between, pooling, linear."""

    def __init__(
        self, channels: int = 3, stride: Any = 4, after: Callable[[Tensor], Any] = lambda z: z
    ) -> None:
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


def counting() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []
    return lambda z: z + (calls.append(1), len(calls))[1]  # type: ignore[func-returns-value]


def sometimes() -> Callable[[Tensor], Tensor]:
    turns = iter([0, 0, 1, 0, 1] * 3)  # alone, again, beside, and again
    return lambda z: z.flip(1) if next(turns) else z


UNSTEADY: list[tuple[Callable[[], Callable[[Tensor], Any]], str]] = [
    (lambda: lambda z: F.dropout(z, 0.5), r"picture run twice.*random numbers \(.*dropout"),
    (counting, r"run twice.*what ran before"),
    (lambda: lambda z: z - 0.5 * z.mean(0), r"alone and beside another.*mixes the pictures"),
    (lambda: lambda z: z.flip(1) if torch.rand(()) < 0.4 else z,
     r"run twice.*random numbers \(rand\)"),
    (sometimes, r"run twice.*depends on chance"),
    (lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(),
     r"statistics of the batch, also in eval mode"),
]  # fmt: skip


@pytest.mark.parametrize(("after", "message"), UNSTEADY, ids=lambda one: str(one)[:20])
@pytest.mark.parametrize("seed", range(2))
def test_chance_and_the_rest_of_the_batch_are_refused(
    after: Callable[[], Callable[[Tensor], Any]], message: str, seed: int
) -> None:
    module = seeded(lambda: Net(after=after()))
    torch.manual_seed(seed)
    with pytest.raises(NetworkError, match=message):
        wrapped(module).check()


def test_ordinary_networks_are_steady_also_in_half_precision() -> None:
    for network in (wrapped(toy(), autocast=torch.bfloat16), wrapped(toy().to(torch.bfloat16))):
        network.check()


def failing(error: Exception) -> Callable[[Tensor], Tensor]:
    def fail(z: Tensor) -> Tensor:
        raise error

    return fail


RUNS: dict[str, Callable[[EmbeddingNetwork], Any]] = {
    "forward": lambda network: network.forward(images()),
    "head_pass": lambda network: network.head_pass(images()),
    "several": lambda network: network.forward_layers(images(), ["conv", "relu"]),
    "head_kind": lambda network: network.head_kind,
    "head alone": lambda network: network.head_outputs(images(1), torch.zeros(1, 8, 4, 4)),
    "fingerprint": lambda network: network.identity(),
}


@pytest.mark.parametrize("run", RUNS)
def test_an_exception_of_the_network_is_told_as_its_own(run: str) -> None:
    cause = KeyError("the shelf")
    network = wrapped(seeded(lambda: Net(after=failing(cause))))
    with pytest.raises(NetworkError, match="the shelf") as said:
        RUNS[run](network)
    assert said.value.__cause__ is cause


def test_the_layer_at_fault_is_named() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("a bad gate")

    module = seeded(Net)
    module.between = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(NetworkError, match=r"'between' \(BatchNorm2d\) keeps no running statis"):
        wrapped(module).identity()
    module.between = Broken().eval()
    expected = r"\(Net\) failed on an input \[2, 3, 16, 16\], in its layer 'between' \(Broken\), wi"
    with pytest.raises(NetworkError, match=expected):
        wrapped(module).forward(images())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to")])
def test_memory_that_runs_out_is_no_fault_of_the_network(error: Exception) -> None:
    with pytest.raises(type(error)) as said:
        wrapped(seeded(lambda: Net(after=failing(error)))).forward(images())
    assert said.value is error


def test_a_backward_that_fails() -> None:
    class NoWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise NotImplementedError("no way back")

    network = wrapped(seeded(lambda: Net(after=NoWay.apply)))
    with pytest.raises(NetworkError, match=r"derivative of what follows layer 'relu' failed.*no"):
        network.check()


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
    class Keeps(Net):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Any:
            if self.kept is None:
                self.kept = self.linear.weight * 2
            pooled = self.relu(self.conv(x)).mean((2, 3))
            return (pooled[:, None] * self.kept * pooled[:, None]).sum(2)

    network = wrapped(seeded(Keeps))
    with torch.inference_mode():
        network.forward(images())
    network.forward_layers(images(), ["conv", "relu"])
    assert network.head_pass(images()).vjp(torch.ones(2, 5)).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": nn.Identity()}, "network is a Identity"),
        ({"weights": 3}, "weights is a int"),
        ({"size": 3.5}, r"size = 3\.5; give"),
        ({"autocast": "int8"}, "known: off, bf16, fp16"),
    ],
)
def test_networks_by_name_of_a_wrong_type(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_network(**{"network": "torchvision:resnet18", **given})


def test_torchvision_transforms_as_preprocess() -> None:
    from torchvision import models, transforms
    from torchvision.transforms import v2

    weights = models.ResNet18_Weights.DEFAULT
    network = EmbeddingNetwork(seeded(Net), "relu", preprocess=weights)
    assert network.preprocess == from_transform(weights.transforms())
    old = transforms.Compose(
        [transforms.Grayscale(), transforms.Resize((8, 6)), transforms.ToTensor()]
    )
    assert from_transform(old) == Preprocess((8, 6), mean=(0.0,), std=(1.0,))
    steps = [v2.Resize((8, 6)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    new = from_transform(v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.25] * 3)]))
    assert new == Preprocess((8, 6), mean=(0.5,) * 3, std=(0.25,) * 3)
    flips = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    with pytest.raises(InputError, match="without random steps"):
        EmbeddingNetwork(seeded(Net), "relu", preprocess=flips)


def test_hugging_face_processors_as_preprocess() -> None:
    class Processor:
        image_mean, image_std, resample = [0.5] * 3, [0.25] * 3, 3
        do_resize, do_rescale, do_normalize, rescale_factor = True, True, True, 1 / 255

        def __init__(self, size: Any, crop: Any = None, **more: Any) -> None:
            self.size, self.crop_size, self.do_center_crop = size, crop, crop is not None
            vars(self).update(more)

        def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
            return {"pixel_values": np.ones((1, 3, 8, 8))}

    side = {"height": 8, "width": 8}
    squashed = from_transform(Processor({"height": 8, "width": 6}))
    assert squashed == Preprocess((8, 6), "squash", None, "bicubic", (0.5,) * 3, (0.25,) * 3)
    cropped = from_transform(Processor({"shortest_edge": 10}, side))
    assert cropped == Preprocess((8, 8), "crop", 10, "bicubic", (0.5,) * 3, (0.25,) * 3)
    more = from_transform(Processor(side, do_pad=True))
    assert isinstance(more, CustomPreprocess)
    assert more(Image.new("RGB", (5, 4))).shape == (3, 8, 8)
    with pytest.raises(InputError, match="crops pictures in a way"):
        from_transform(Processor({"shortest_edge": 10}, crop_pct=0.9))


class Tokens(nn.Module):
    """8 x 8 patches as tokens in any order of axes; the mean of their squares embeds."""

    def __init__(self, order: tuple[int, int, int]) -> None:
        super().__init__()
        self.patches, self.block, self.order = nn.Conv2d(3, 4, 8, 8), nn.Identity(), order

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.block(tokens.permute(self.order)).permute(self.order)
        return tokens.pow(2).mean(1)


@pytest.mark.parametrize(
    ("order", "kind"), [((0, 1, 2), "btk"), ((1, 0, 2), "tbk"), ((0, 2, 1), "bkt")]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_in_any_order(order: tuple[int, int, int], kind: str, batch: int) -> None:
    module = seeded(lambda: Tokens(order))
    network, x = wrapped(module, "block"), images(batch)  # four tokens, four channels
    made = network.head_pass(x)
    expected = module.patches(x).detach()
    assert network.layout == kind
    torch.testing.assert_close(made.features.activations, expected)
    torch.testing.assert_close(made.vjp(torch.ones(batch, 4)), expected / 2)
    assert not network.head_kind.pooled


class Laid(nn.Module):
    """Activations with the channels last or not, of one size of input or any."""

    def __init__(self, conv: nn.Conv2d, last: bool = False, side: int | None = None) -> None:
        super().__init__()
        self.conv, self.layer, self.last, self.side = conv, nn.Identity(), last, side

    def forward(self, x: Tensor) -> Tensor:
        assert self.side in (None, x.shape[2])
        maps = self.conv(x)
        if not self.last:
            return self.layer(maps).mean((2, 3))
        return self.layer(maps.permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize("stride", [(4, 2), (2, 4)])
@pytest.mark.parametrize("last", [False, True])
def test_strides_that_differ_by_axis(stride: tuple[int, int], last: bool) -> None:
    module = seeded(lambda: Laid(nn.Conv2d(3, 8, 3, stride, 1), last))
    network, x = wrapped(module, "layer"), images(2, 32, 32)
    torch.testing.assert_close(network.forward(x).activations, module.conv(x).detach())
    assert network.layout == ("bhwk" if last else "bkhw")


def test_a_fixed_size_that_does_not_tell_asks_for_the_layout() -> None:
    module = seeded(lambda: Laid(nn.Conv2d(3, 4, 8, 8), side=32))
    with pytest.raises(NetworkError, match=r"takes no other size.*say layout='bkhw' or 'bhwk'"):
        wrapped(module, "layer").forward(images(1, 32, 32))
    wrapped(module, "layer", layout="bkhw").forward(images(1, 32, 32))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_networks_of_other_channels(channels: int) -> None:
    module = seeded(lambda: Net(channels))
    network = wrapped(module)
    network.check()
    assert network.probe_images(2).shape == (2, channels, *SIZE)
    stacked = custom(lambda picture: np.ones((channels, 32, 32)), name="stacked")
    EmbeddingNetwork(module, "relu", preprocess=stacked).check()
    assert network.head_kind.affine


@pytest.mark.parametrize("named", [False, True])
def test_a_copy_is_equal_and_independent(named: bool) -> None:
    network, x = wrapped(seeded(Net)), images()
    if named:  # its head is a function of the module's own
        network = load_network("torchvision:mobilenet_v3_small", weights="random", size=64)
        x = torch.from_numpy(network.probe_images(2))
    before = network.forward(x).embedding
    other = copy.deepcopy(network)
    c = torch.ones_like(before)
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
    assert other.head_pass(x).vjp(c).any()


def test_what_lies_beside_a_prefix_is_left_out_aloud() -> None:
    state = {f"net.{key}": value for key, value in seeded(Net, 1).state_dict().items()}
    with pytest.warns(NetworkWarning, match=r"1 entries beside 'net\.' are left out \(loss\.w\)"):
        load_state(seeded(Net), {**state, "loss.w": torch.ones(1)}, [], "weights")


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_timm_networks_with_ways_of_their_own(name: str) -> None:
    pytest.importorskip("timm")
    network = load_network(f"timm:{name}", weights="random")
    network.check()
    assert network.forward(network.probe_images()).activations.shape[2:] == (14, 14)


@pytest.mark.parametrize("parts", [False, True])
def test_a_network_that_changes_its_input_in_place_leaves_the_caller_s(parts: bool) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.sub_(0.5).mul_(2))

    plain, module = seeded(Net), seeded(InPlace)
    x = images()
    before, expected = x.clone(), wrapped(plain).forward((x - 0.5) * 2).embedding
    network = wrapped(module)
    if parts:
        network = EmbeddingNetwork.from_parts(
            lambda x: plain.relu(plain.conv(x.sub_(0.5).mul_(2))),
            lambda maps: plain.linear(plain.pool(maps).flatten(1)),
            module=plain,
            input_size=SIZE,
        )
    for _ in range(2):
        torch.testing.assert_close(network.forward(x).embedding, expected)
    assert torch.equal(x, before)
    network.check()


class _MuteError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (torch.fft.fft, r"output is a tensor of complex64.*view_as_real"),
        (lambda z: z.to_sparse(), r"output is a tensor of sparse_coo float32.*to_dense"),
        (lambda z: z.detach().numpy(), r"the network returned ndarray; expected the embedding"),
        (lambda z: None, r"the network returned NoneType; expected the embedding"),
        (failing(_MuteError()), r"failed on an input .* with _MuteError: no message"),
    ],
)
def test_outputs_that_are_no_real_vectors(after: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        wrapped(seeded(lambda: Net(after=after))).forward(images())


def test_an_output_function_that_fails() -> None:
    network = wrapped(seeded(Net), output=lambda out: out.last_hidden_state)
    with pytest.raises(NetworkError, match=r"output=.*failed.*last_hidden_state.*embedding \[B D"):
        network.forward(images())


def test_layers_that_are_no_real_numbers() -> None:
    class Changing(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return torch.fft.fft2(maps)

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Changing()).eval()
    with pytest.raises(NetworkError, match="layer '1' returned a tensor of complex64; expected"):
        wrapped(module, "1").forward(images())


CANNOT_BE_EXPLAINED: list[tuple[Callable[[Tensor], Tensor], str, dict[str, bool]]] = [
    (lambda z: z[:, :1], r"the embedding is one number.*normalize=False", {}),
    (torch.sign, "zero everywhere", {"normalize": False}),
    (torch.round, "zero everywhere", {"normalize": False}),
    (lambda z: (z > 0).float() + 1, "never reaches the embedding", {"normalize": False}),
]


@pytest.mark.parametrize(("after", "message", "settings"), CANNOT_BE_EXPLAINED)
def test_what_cannot_be_explained_is_said_before_any_work(
    after: Callable[[Tensor], Tensor], message: str, settings: dict[str, bool]
) -> None:
    network = wrapped(seeded(lambda: Net(after=after)), **settings)
    with pytest.raises(NetworkError, match=message):
        network.check()
    wrapped(network.module, normalize=False).check(gradients=not settings)


def test_a_layer_of_two_names_goes_by_either() -> None:
    module = seeded(Net)
    module.alias = module.relu
    assert wrapped(module, "alias").layer == "relu"
    with pytest.raises(NetworkError, match="has no layer 'alas'"):
        wrapped(module, "alas")


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
    class Mapped(Net):
        def forward(self, x: Tensor) -> Any:
            return torch.func.vmap(lambda one: Net.forward(self, one[None])[0])(x)

    with pytest.raises(NetworkError, match=r"layer 'relu' returned a tensor inside torch\.vmap"):
        wrapped(seeded(Mapped)).forward(images())


def test_a_factory_whose_own_imports_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_it.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetworkError) as raised:
        load_network("lacking_it:make")
    assert str(raised.value) == (
        "importing lacking_it failed with ModuleNotFoundError: No module named "
        "'no_such_package_at_all'; import it by itself to see the whole of it"
    )
