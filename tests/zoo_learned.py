"""Oracles of the trained attention branches, with cases of their own: `CASES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from oracles import bilinear
from oracles import min_max as unit
from torch import Tensor, nn
from zoo_cases import Case, Expected, Pooled, make, trunk

from embedcam import EmbeddingNetwork
from embedcam.methods.learned import ABNetwork, LFINetwork

Array = np.ndarray


class LFICase(Case):
    """A case whose head also sees the picture."""

    def trunk(self, image: Tensor) -> Tensor:
        return self.module.trunk(image[None])[0]

    def head(self, activations: Tensor) -> Tensor:
        return self.module.embed(self.image[None], activations[None])[0]


class ABNCase(Case):
    """A case whose head is stage and attention branch."""

    def trunk(self, image: Tensor) -> Tensor:
        return self.module.trunk(image[None])[0]

    def head(self, activations: Tensor) -> Tensor:
        attention, _ = self.module.attention(activations[None])
        return self.module.head(self.module.stage(activations[None] * (1 + attention[:, None])))[0]


def lfi_module(signed: bool = False) -> LFINetwork:
    """A between `[6 4 6]` and a pooled linear head; FIN is 6, 4, 4, 4, 6 channels wide."""
    return LFINetwork(trunk(signed), Pooled(), 6, width=4)


def abn_module(signed: bool = False) -> ABNetwork:
    """The stage halves `[6 4 6]` to `[6 2 3]`; the branch's own embedding has 4 numbers."""
    stage = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())
    return ABNetwork(trunk(signed), stage, Pooled(), 6, 4)


def case_of(
    kind: type[Case], build: Callable[[bool], Any], target: str = "similarity", **choices: Any
) -> Case:
    """As `zoo_cases.make`, with a network of the method."""
    case = make("pooled", target, **choices)
    seed, signed = choices.get("seed", 0), choices.get("signed", False)
    module = lively(lambda: build(signed), seed).double()
    normalize = case.network.normalize
    network = EmbeddingNetwork(module, "trunk", normalize=normalize, input_size=(12, 18))
    return kind(network, module, case.image, case.target, case.scores)


lfi_case, abn_case = partial(case_of, LFICase, lfi_module), partial(case_of, ABNCase, abn_module)
CASES: dict[str, Callable[..., Case]] = {"lficam": lfi_case, "abn": abn_case}


def lively(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A network in eval mode whose batch norms are as after some training: not the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for values in (part.running_mean, part.bias.data):
                    nn.init.normal_(values, 0, 0.3)
                for values in (part.running_var, part.weight.data):
                    nn.init.uniform_(values, 0.5, 2)
            if isinstance(part, nn.Conv2d):
                part.weight.data *= 3  # so that a softmax of what comes out is far from flat
    return module


def grey(image: Array) -> Array:
    """Mean over channels of an input `[C H W]`."""
    return sum(list(image)) / len(image)


def convolution(x: Array, layer: nn.Conv2d, stride: int = 1) -> Array:
    """A convolution `[C H W]` -> `[O H' W']` with the layer's numbers, zeros around."""
    weight = layer.weight.detach().double().numpy()
    outputs, inputs, reach, _ = weight.shape
    pad = layer.padding[0]
    _, height, width = x.shape
    rows, columns = ((side + 2 * pad - reach) // stride + 1 for side in (height, width))
    out = np.zeros((outputs, rows, columns))
    for o, i, j in np.ndindex(outputs, rows, columns):
        out[o, i, j] = 0.0 if layer.bias is None else float(layer.bias[o].detach())
        for c, u, v in np.ndindex(inputs, reach, reach):
            y, z = i * stride + u - pad, j * stride + v - pad
            if 0 <= y < height and 0 <= z < width:
                out[o, i, j] += x[c, y, z] * weight[o, c, u, v]
    return out


def batch_norm(x: Array, layer: nn.BatchNorm2d) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias of each channel, with the running numbers."""
    out = np.zeros_like(x)
    for c in range(len(x)):
        mean, var = float(layer.running_mean[c]), float(layer.running_var[c])
        scale = float(layer.weight[c].detach()) / math.sqrt(var + layer.eps)
        out[c] = (x[c] - mean) * scale + float(layer.bias[c].detach())
    return out


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def softmax(values: Array) -> Array:
    powers = [math.exp(v - max(values)) for v in values]
    return np.array([p / sum(powers) for p in powers])


def stacked(image: Array, activations: Array) -> Array:
    """What FIN sees: the small grey picture times N(A_k), for each k."""
    small = bilinear(grey(image), *activations.shape[1:])
    return np.stack([small * unit(one) for one in activations])


def importance(x: Array, fin: nn.Sequential, pool: Callable[[Array], float] = np.mean) -> Array:
    """Four convolutions, the mean over positions, a softmax over channels: S `[K]`."""
    for first in (0, 3, 6):
        x = relu(batch_norm(convolution(x, fin[first]), fin[first + 1]))
    x = convolution(x, fin[9])
    return softmax(np.array([pool(one) for one in x]))


def attended(activations: Array, attention: Array) -> Array:
    """A' = A (1 + M), channel by channel."""
    return np.stack([one * (1 + attention) for one in activations])


def abn_branch(activations: Array, module: ABNetwork) -> tuple[Array, Array]:
    """M `[H W]` and g `[D]` of A; the stage's convolution with its own numbers, at stride 1."""
    e = convolution(relu(convolution(activations, module.branch[0], stride=1)), module.evidence)
    seen = batch_norm(convolution(e, module.look[0]), module.look[1])[0]
    return 1 / (1 + np.exp(-seen)), np.array([one.sum() / one.size for one in e])


def numbers(case: Case) -> tuple[Array, Array]:
    """The picture `[C H W]` and A `[K h w]`."""
    with torch.no_grad():
        return case.image.numpy(), case.trunk(case.image).numpy()


def lficam(case: Case) -> Expected:
    """S."""
    return Expected(importance(stacked(*numbers(case)), case.module.fin))


def abn(case: Case) -> Expected:
    """M."""
    _, activations = numbers(case)
    return Expected(map=abn_branch(activations, case.module)[0])


ORACLES: dict[str, Callable[[Case], Expected]] = {"lficam": lficam, "abn": abn}
