"""Small networks with seeded weights, and pictures for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

VIT_LAYER = "encoder.layers.encoder_layer_2.ln_1"


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().eval()


def small_vit() -> nn.Module:
    vit = models.VisionTransformer(64, 16, 3, 4, 48, 96, num_classes=10)
    nn.init.normal_(vit.heads.head.weight)  # zero as torchvision makes it
    return vit


def small_vgg() -> nn.Module:
    plan = [16, "M", 32, "M", 512, 512, "M"]
    vgg = models.VGG(models.vgg.make_layers(plan), num_classes=10, init_weights=False)
    vgg.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(True), nn.Linear(64, 10))
    return vgg


class Toy(nn.Module):
    """Convolution, in-place ReLU, pooling, linear; what it returns is the test's choice."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)
        self.side = nn.Conv2d(3, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 5)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        self.side(images)
        activations = self.relu(self.norm(self.conv(images)))
        return self.wrap(self.linear(self.drop(activations.mean((2, 3)))))


def toy(wrap: Callable[[Tensor], Any] = lambda z: z) -> nn.Module:
    return seeded(lambda: Toy(wrap))


def images(batch: int = 2, height: int = 16, width: int = 16, seed: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def by_full_autograd(module, layers, x, c, embedding=lambda output: output):
    """A and dy/dA of each layer: every parameter differentiable, retained from the input on."""
    kept: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: kept.setdefault(name, output).clone()
        )
        for name in layers
    ]
    z = embedding(module(x.clone().requires_grad_()))
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(z, [kept[name] for name in layers], c)
    return {name: (kept[name].detach(), g) for name, g in zip(layers, gradients, strict=True)}
