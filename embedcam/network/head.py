"""What the head (activations -> embedding) does with positions, found by asking it.

A head is *pooled* if it sees its activations only through their mean over positions, and *affine*
if it is then z = W p + b of that mean p. Both are found numerically: the layer's output is
replaced by random activations and the embedding and its derivatives are compared. So a batch norm,
dropout or second linear layer behind the pooling needs no special case: all are folded into W.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import EmbedcamError
from .gradients import derivatives
from .injected import Injected, RunNetwork
from .layouts import Layout

# Scale and sign (0: both) of the random activations. Signed ones tell a ReLU or a power mean from a
# mean, different scales a normalisation or a saturating unit from an affine map.
_DRAWS = ((1.0, 0), (5.0, 0), (0.2, 0), (1.0, 1), (30.0, 0), (1.0, -1))
_CHUNK_NUMBERS = 1 << 22
_SHIFTED = 0.4
"""Change of z by a shift, of what the activations make of z: convolutions before pooling change up
to 0.31 (ResNet-18, MobileNetV2), depthwise and flattening heads 0.57 to 2.6 (VGG-11, digits)."""


class Run(Protocol):
    """The head of one picture, with its activations replaced."""

    def __call__(self, maps: Tensor, picture: int = 0, shake: bool = False) -> Tensor:
        """z `[n D]` for activations `[n K H W]`; `shake` also changes the prefix tokens."""


@dataclass(frozen=True, eq=False)
class HeadKind:
    """What was found out about a head.

    pooled: it sees activations only through p, their mean over positions.
    affine: it is z = W p + b; implies `pooled`.
    matrix: W `[D K]`, if affine; float64 for a float64 network, else float32.
    identity: W is the identity: the embedding is p itself (plus perhaps a constant).
    unit_norm: its output always has length 1: the module normalises by itself.
    uses_positions: a shift of the activations makes it largely another output: it does not pool.
    """

    pooled: bool
    affine: bool
    matrix: np.ndarray | None = None
    identity: bool = False
    unit_norm: bool = False
    uses_positions: bool = False


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference below which two results of a head count as equal."""
    if dtype in (torch.float16, torch.bfloat16):
        return 4e-2
    # Accelerators may multiply in TF32.
    return 1e-4 if device.type == "cpu" else 2e-3


def find_head_kind(
    run: Run,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    has_prefix: bool = False,
) -> HeadKind:
    """Ask a head whether it is pooled and affine.

    Args:
        run: the head, deterministic, each image by itself.
        shape: (K, H, W) of its activations.
        dtype: of the network's parameters. In half precision the comparison is at 4e-2: enough to
            tell kinds of heads apart; the matrix then has half precision's accuracy.
        device: where the activations live.
        has_prefix: whether tokens before the grid exist; a head that uses them is not pooled.

    Returns:
        HeadKind, with the matrix where affine.
    """
    tolerance = tolerance_of(dtype, device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    draws = _random_activations(shape, compute, device)
    # Early layers have large activations and are hardly ever pooled: two draws tell.
    large = draws.numel() > _CHUNK_NUMBERS // 4
    pooled, z = _is_pooled(run, draws[:2] if large else draws, tolerance)
    if pooled and large:
        pooled, z = _is_pooled(run, draws, tolerance)
    unit_norm = _near(torch.linalg.vector_norm(z, dim=1), 1.0, max(tolerance, 1e-3))
    if pooled and has_prefix:
        with torch.no_grad():
            moved = _distance(run(draws, shake=True), z)
        pooled = bool((moved <= tolerance * torch.linalg.vector_norm(z, dim=1)).all())
    products = _affine_products(run, draws, tolerance) if pooled else None
    if products is None:
        placed = not pooled and _uses_positions(run, draws[:2])
        return HeadKind(pooled, False, unit_norm=unit_norm, uses_positions=placed)
    if all(c.shape == w.shape and _near(w - c, 0.0, tolerance) for c, w in products):
        identity = torch.eye(shape[0], dtype=compute).numpy()
        return HeadKind(True, True, identity, True, unit_norm)
    return HeadKind(True, True, _matrix(run, shape, compute, device), False, unit_norm)


def _random_activations(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """`[n K H W]`, one for each of `_DRAWS`, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for scale, sign in _DRAWS:
        # Channels differ in their mean, or the mean over many positions would vanish.
        row = torch.randn(shape[0], 1, 1, generator=generator)
        row = row + torch.randn(shape, generator=generator)
        rows.append(scale * (row if sign == 0 else sign * row.abs()))
    return torch.stack(rows).to(device, dtype)


def _is_pooled(run: Run, draws: Tensor, tolerance: float) -> tuple[bool, Tensor]:
    """Whether z stays the same when each channel is replaced by its mean; and z `[n D]`."""
    flat = draws.mean((2, 3), keepdim=True).expand_as(draws)
    same, moved, z = _alike(run, draws, flat, tolerance)
    return bool((same & (moved > 0)).all()), z


def _uses_positions(run: Run, draws: Tensor) -> bool:
    """Whether z is largely another where the activations are shifted by half the grid.

    Convolutions and pooling mind a shift at the borders alone.
    """
    height, width = draws.shape[2:]
    shifted = draws.roll((height // 2, width // 2), (2, 3))
    return not bool(_alike(run, draws, shifted, _SHIFTED)[0].all())


def _alike(
    run: Run, draws: Tensor, others: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each draw: whether the other has its z, how far it moves z from that of zeros, and z."""
    with torch.no_grad():
        z, z_other, z_zero = run(torch.cat([draws, others, torch.zeros_like(draws[:1])])).split(
            [len(draws), len(draws), 1]
        )
    # Relative to how far the activations move z at all, not to a constant in it. At zero a head
    # that normalises may return NaN.
    moved = _distance(z, z_zero.nan_to_num(0.0, 0.0, 0.0))
    rounding = 64 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z, dim=1)
    return _distance(z, z_other) <= tolerance * moved + rounding, moved, z


def _affine_products(
    run: Run, draws: Tensor, tolerance: float
) -> list[tuple[Tensor, Tensor]] | None:
    """Random cotangents c `[D]` and W^T c `[K]`; None if the head has no one Jacobian W.

    It must be the same at every position, draw and picture. Random cotangents stand for all: two
    different Jacobians agree on them with probability zero.
    """
    products: list[tuple[Tensor, Tensor]] = []
    cells = draws.shape[2] * draws.shape[3]
    for picture in range(2):
        maps = draws.clone().requires_grad_()
        z = run(maps, picture=picture)
        if not z.requires_grad:
            return None
        for number, cotangent in enumerate(_random_cotangents(z, 2)):
            gradient = _gradient(z, maps, cotangent.expand_as(z))
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                return None
            if len(products) <= number:
                products.append((cotangent, gradient[0].sum((1, 2))))
            expected = (products[number][1] / cells)[None, :, None, None].expand_as(gradient)
            allowed = tolerance * torch.linalg.vector_norm(expected.flatten(1), dim=1)
            if not bool((_distance(gradient.flatten(1), expected.flatten(1)) <= allowed).all()):
                return None
    return products


def _matrix(
    run: Run, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> np.ndarray:
    """W `[D K]`, many rows a backward pass: sample i of the batch gets row i's unit cotangent."""
    count = max(1, min(64, _CHUNK_NUMBERS // int(np.prod(shape))))
    maps = torch.ones(count, *shape, dtype=dtype, device=device, requires_grad=True)
    z = run(maps)
    width = z.shape[1]
    rows = torch.empty(width, shape[0], dtype=dtype)
    for start in range(0, width, count):
        stop = min(start + count, width)
        cotangents = torch.zeros_like(z)
        cotangents[torch.arange(stop - start), torch.arange(start, stop)] = 1
        gradient = _gradient(z, maps, cotangents)
        assert gradient is not None
        rows[start:stop] = gradient.sum((2, 3))[: stop - start].cpu()
    return rows.numpy()


def _random_cotangents(z: Tensor, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, z.shape[1], generator=generator)
    return list(rows.to(z.device, z.dtype))


def _gradient(z: Tensor, maps: Tensor, cotangents: Tensor) -> Tensor | None:
    return derivatives(z, [maps], cotangents, "the layer")[0]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=1)


def _near(values: Tensor, target: float, tolerance: float) -> bool:
    return bool(((values - target).abs() <= tolerance).all())


def ask_head(
    network: RunNetwork,
    pictures: Tensor,
    raw: Tensor,
    layout: Layout,
    replay: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
) -> tuple[HeadKind, bool]:
    """What a network's head is, and whether it can be replayed from pooled vectors.

    Args:
        network: runs it with the layer's output changed; must undo any grad mode set meanwhile.
        pictures: two inputs, `[2 C H W]`.
        raw: the layer's output for the first, in `layout`.
        layout: of the layer.
        replay: pooled vectors `[n K]` -> z `[n D]`, where the head is known as a function.
        dtype: of the parameters.
    """
    maps = layout.to_maps(raw)
    run = Injected(network, pictures, layout)
    kind = find_head_kind(
        run,
        (maps.shape[1], maps.shape[2], maps.shape[3]),
        dtype=dtype,
        device=maps.device,
        has_prefix=layout.prefix > 0,
    )
    if replay is None or not kind.pooled or kind.affine:
        return kind, False
    return kind, _replay_agrees(run, replay, maps, tolerance_of(dtype, maps.device))


def _replay_agrees(
    run: Run, replay: Callable[[Tensor], Tensor], maps: Tensor, tolerance: float
) -> bool:
    """Whether the head, called as a function of pooled vectors, gives the network's own z."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    several = torch.cat([maps, -3 * maps])
    with torch.no_grad():
        expected = run(several)
        try:
            found = replay(several.mean((2, 3)))
        # A head made for larger grids just cannot be replayed.
        except EmbedcamError:
            return False
        if found.shape != expected.shape:
            return False
        allowed = tolerance * torch.linalg.vector_norm(expected, dim=1)
        return bool((_distance(found, expected) <= allowed).all())
