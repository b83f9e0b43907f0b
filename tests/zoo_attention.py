"""Oracles of the methods made for transformers, on a small vision transformer: `CASES`.

`Run` is its forward written out token by token and head by head; nothing is called but the
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo_cases import SIZE, WIDTH, Case, Expected, make

from embedcam import EmbeddingNetwork

DIM, HEADS, GRID, SIDE = 8, 2, (2, 3), 6
Z = GRID[0] * GRID[1]


class Attention(nn.Module):
    """Self-attention, or by a `latent` query of its own, fused or by its formula."""

    def __init__(self, fused: bool, latent: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.latent = nn.Parameter(torch.randn(1, 1, DIM)) if latent else None
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        asking = x if self.latent is None else self.latent.expand(x.shape[0], -1, -1)
        heads = [
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.qkv(asking)[..., :DIM], *self.qkv(x)[..., DIM:].chunk(2, -1))
        ]
        if self.fused:
            o = nn.functional.scaled_dot_product_attention(*heads)
        else:
            q, k, v = heads
            o = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = Attention(fused)
        self.mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Pool(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attention, self.norm = Attention(fused, latent=True), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return (x + self.mlp(self.norm(x)))[:, 0]


class Transformer(nn.Module):
    """Class token and 6 patches of 6 x 6; what is read is "class", "mean" or "latent"."""

    def __init__(self, readout: str, fused: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, SIDE, stride=SIDE)
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.places = nn.Parameter(torch.randn(1, Z + 1, DIM))
        self.blocks = nn.Sequential(Block(fused), Block(fused))
        self.pool = Pool(fused) if readout == "latent" else nn.Identity()
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, WIDTH)
        self.readout = readout

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = self.blocks(x)
        if self.readout == "latent":
            return self.head(self.norm(self.pool(x)))
        x = self.norm(x)
        return self.head(x[:, 0] if self.readout == "class" else x[:, 1:].mean(1))


def made(target: str = "similarity", *, method: str, **kind: Any) -> Case:
    """As `zoo_cases.make`; head "pooled" reads the class token, others a mean or a latent query."""
    case = make(target=target, **{**kind, "head": "pooled"})
    signed = kind.get("signed", False)
    readout = "class" if kind.get("head", "pooled") == "pooled" else "mean"
    readout = "latent" if readout == "mean" and signed else readout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(kind.get("seed", 0))
        module = Transformer(readout, fused=not signed)
        for values in module.parameters():
            nn.init.normal_(values, 0.2, 0.6)
    module = module.double().eval()
    last = "pool.attention" if readout == "latent" else "blocks.1.attention"
    readings = {"gradeclip": f"{last}@gradeclip", "maskclip": f"{last}@value"}
    network = EmbeddingNetwork(
        module, readings.get(method, "blocks.1.norm1"), normalize=case.network.normalize,
        input_size=SIZE,
    )  # fmt: skip
    return Case(network, module, case.image, case.target, case.scores)


# The forward, written out


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.stack([(row * x).sum() for row in layer.weight]) + layer.bias


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def mlp(x: Tensor, layers: nn.Sequential) -> Tensor:
    h = linear(x, layers[0])
    return linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), layers[2])


class Attended:
    """q, k, v and o as lists of tokens `[C]`, A as one row a head and query."""

    def __init__(self, x: list[Tensor], layer: Attention) -> None:
        asking = x if layer.latent is None else [layer.latent[0, 0]]
        self.q = [linear(one, layer.qkv)[:DIM] for one in asking]
        self.k = [linear(one, layer.qkv)[DIM : 2 * DIM] for one in x]
        self.v = [linear(one, layer.qkv)[2 * DIM :] for one in x]
        size = DIM // HEADS
        self.A = [
            [self.row(q[h * size : h * size + size], h, size) for q in self.q] for h in range(HEADS)
        ]
        self.o = [
            torch.cat([self.sum_of(i, h, slice(h * size, h * size + size)) for h in range(HEADS)])
            for i in range(len(self.q))
        ]
        self.out = [linear(o, layer.proj) for o in self.o]

    def sum_of(self, i: int, h: int, part: slice) -> Tensor:
        return sum(a * v[part] for a, v in zip(self.A[h][i], self.v, strict=True))

    def row(self, q: Tensor, h: int, size: int) -> Tensor:
        scores = [(q * k[h * size : h * size + size]).sum() / math.sqrt(size) for k in self.k]
        powers = [torch.exp(one - max(scores).detach()) for one in scores]
        return torch.stack([one / sum(powers) for one in powers])

    def mean(self, each: Callable[[int, int], Tensor]) -> np.ndarray:
        """Mean over heads of `each(head, query)` `[T]`."""
        rows = [[each(h, i).detach().numpy() for i in range(len(self.q))] for h in range(HEADS)]
        return np.array(rows).sum(0) / HEADS


class Run:
    """A picture through the transformer: `attended` of each attention, tokens of blocks, z."""

    def __init__(self, case: Case) -> None:
        self.case, self.module = case, case.module
        module, image = case.module, case.image
        x = [module.token[0, 0] + module.places[0, 0]]
        for i, j in np.ndindex(*GRID):
            i, j = i * SIDE, j * SIDE
            patch = image[:, i : i + SIDE, j : j + SIDE]
            seen = torch.stack([(row * patch).sum() for row in module.patch.weight])
            x.append(seen + module.patch.bias + module.places[0, len(x)])
        self.attended, self.streams = [], []
        for block in module.blocks:
            attended = Attended([norm(one, block.norm1) for one in x], block.attention)
            x = [one + two for one, two in zip(x, attended.out, strict=True)]
            x = [one + mlp(norm(one, block.norm2), block.mlp) for one in x]
            self.attended.append(attended)
            self.streams.append(x)
        if module.readout == "latent":
            self.attended.append(self.pool(x))
        self.z = self.read(x)

    def pool(self, x: list[Tensor]) -> Attended:
        self.pooling = Attended(x, self.module.pool.attention)
        return self.pooling

    def read(self, x: list[Tensor]) -> Tensor:
        module = self.module
        if module.readout == "latent":
            (one,) = self.pooling.out
            x = [one + mlp(norm(one, module.pool.norm), module.pool.mlp)]
        x = [norm(one, module.norm) for one in x]
        read = x[0] if module.readout != "mean" else sum(x[1:]) / Z
        return linear(read, module.head)

    @property
    def rows(self) -> range:
        return range(1, Z + 1) if self.module.readout == "mean" else range(1)


def gradients(y: Tensor, inputs: Any) -> list[Tensor]:
    found = torch.autograd.grad(y, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def on_grid(values: Any) -> np.ndarray:
    return np.array([float(one) for one in values][1:]).reshape(GRID)


def gradeclip_activations(case: Case) -> np.ndarray:
    """lambda_i v_i `[C h w]`: cosines of key and query, of several the mean, in [0, 1]."""
    run = Run(case)
    last = run.attended[-1]
    q = [last.q[r] / last.q[r].norm() for r in run.rows]
    cosines = [sum((one * k / k.norm()).sum() for one in q).item() / len(q) for k in last.k[1:]]
    low, high = min(cosines), max(cosines)
    tokens = [(c - low) / (high - low) * v for c, v in zip(cosines, last.v[1:], strict=True)]
    return torch.stack(tokens, -1).detach().numpy().reshape(DIM, *GRID)


def gradeclip(case: Case) -> Expected:
    """w = dy/do at the token that is read; of several their sum (Zhao et al. 2024)."""
    run = Run(case)
    each = gradients(case.score(run.z), run.attended[-1].o)
    return Expected(sum(each[r] for r in run.rows).numpy())


def value_activations(case: Case) -> np.ndarray:
    """Each position's v through projection, last norm and head, alone `[D h w]`."""
    run, module = Run(case), case.module
    proj = (module.pool if module.readout == "latent" else module.blocks[1]).attention.proj
    values = [linear(norm(linear(v, proj), module.norm), module.head) for v in run.attended[-1].v]
    return torch.stack(values[1:], -1).detach().numpy().reshape(WIDTH, *GRID)


def maskclip(case: Case) -> Expected:
    """dy/dz, over the number of positions."""
    z = Run(case).z.detach().requires_grad_()
    return Expected(gradients(case.score(z), [z])[0].numpy() / Z)


def rollout(case: Case) -> Expected:
    """Product of (mean_h A + I) / 2 from the last to the first, its row that is read."""
    run = Run(case)
    joint = np.eye(Z + 1)
    for one in run.attended[:2]:
        joint = (one.mean(lambda h, i, one=one: one.A[h][i]) + np.eye(Z + 1)) / 2 @ joint
    if case.module.readout == "latent":
        joint = run.pooling.mean(lambda h, i: run.pooling.A[h][i]) @ joint
    return Expected(map=on_grid(sum(joint[r] for r in run.rows) / len(run.rows)))


def generic_attention(case: Case) -> Expected:
    """R = I, then R + mean_h ReLU(dy/dA * A) R for each (Chefer et al. 2021, eq. 5 and 6)."""
    run = Run(case)
    y, R = case.score(run.z), np.eye(Z + 1)
    for one in run.attended:
        rows = [a for head in one.A for a in head]
        slopes = gradients(y, rows)
        n = len(one.q)
        kept = [torch.clamp(a * g, min=0) for a, g in zip(rows, slopes, strict=True)]
        mean = one.mean(lambda h, i, kept=kept, n=n: kept[h * n + i])
        R = mean @ R if n == 1 else R + mean @ R
    R = R if case.module.readout == "latent" else R - np.eye(Z + 1)
    return Expected(map=on_grid(sum(R[r] for r in run.rows) / len(run.rows)))


def legrad(case: Case) -> Expected:
    """Mean over layers, heads and rows of ReLU(dy_l/dA_l) (Bousselham et al. 2025, sec. 3)."""
    run, total = Run(case), np.zeros(Z + 1)
    for number, stream in enumerate(run.streams):
        mean = sum(stream) / len(stream)
        one = run.attended[number]
        if case.module.readout == "latent":
            one, tokens = run.pool(stream), stream
        else:
            tokens = [mean] * len(stream)
        slopes = gradients(case.score(run.read(tokens)), [a for head in one.A for a in head])
        total += sum(torch.clamp(g, min=0).numpy() for g in slopes) / len(slopes) / 2
    return Expected(map=on_grid(total))


ORACLES: dict[str, Callable[[Case], Expected]] = {
    "gradeclip": gradeclip,
    "maskclip": maskclip,
    "rollout": rollout,
    "genericattention": generic_attention,
    "legrad": legrad,
}
CASES: dict[str, Callable[..., Case]] = {name: partial(made, method=name) for name in ORACLES}
