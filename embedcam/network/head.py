"""The head of a network (activations -> embedding): what it is, run alone, and its derivative.

A head is *pooled* if it sees its activations only through their mean over positions, and *affine*
if it is then z = W p + b of that mean p. Both are found numerically: the layer's output is
replaced by random activations and the embedding and its derivatives are compared. So a batch norm,
dropout or second linear layer behind the pooling needs no special case: all are folded into W.
So is what stands behind a LayerNorm or RMSNorm, whose statistics a receipt holds; its derivative
is not that of an affine head.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._checks import as_array
from ..errors import EmbedcamError, InputError, NetworkError
from ..preprocess import HeadMatrix, HeldNorm
from .gradients import derivatives, unreachable
from .layers import Images, Layout, choose_embedding
from .module import no_gradients
from .reading import Reading
from .runner import Runner, at_least_single, run_part

# Scale and sign (0: both) of the random activations. Signed ones tell a ReLU or a power mean from a
# mean, different scales a normalization or a saturating unit from an affine map.
_DRAWS = ((1.0, 0), (5.0, 0), (0.2, 0), (1.0, 1), (30.0, 0), (1.0, -1))
_CHUNK_NUMBERS = 1 << 22
_SHIFTED = 0.4
"""Change of z by a shift, of what the activations make of z: convolutions before pooling change up
to 0.31 (ResNet-18, MobileNetV2), depthwise and flattening heads 0.57 to 2.6 (VGG-11, digits)."""


@dataclass(frozen=True, eq=False)
class HeadKind:
    """What was found out about a head.

    pooled: it sees activations only through p, their mean over positions.
    affine: it is z = W p + b; implies `pooled`.
    matrix: W `[D K]`, if affine; float64 for a float64 network, else float32.
    normed: what it is with the statistics of a norm over channels held, if it is affine then.
    identity: the embedding is p itself, plus perhaps a constant.
    unit_norm: its output always has length 1: the module normalizes by itself.
    uses_positions: a shift of the activations makes it largely another output.
    replayed: it was given as a function, which is one of p and gives the network's own output.
    """

    pooled: bool
    affine: bool
    matrix: np.ndarray | None = None
    identity: bool = False
    unit_norm: bool = False
    uses_positions: bool = False
    replayed: bool = False
    normed: HeadMatrix | None = None
    _weights: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def weight(self, device: torch.device) -> Tensor:
        """Return W `[D K]` on a device, where it stays."""
        if device not in self._weights:
            self._weights[device] = torch.as_tensor(self.matrix, device=device)
        return self._weights[device]


class HeadAlone:
    """The head of one input as a function of the activations; `inputs` counts what the trunk saw.

    The trunk sees one picture and the head a batch, in pieces of `most`; where a module does not
    allow that, the picture is repeated. While it is asked what it is, gradients are the caller's,
    nothing is cast, and `maps` are the first input's activations.
    """

    def __init__(
        self, runner: Runner, images: Images, most: int | None = None, *, asking: bool = False
    ) -> None:
        self.inputs = 0
        self._runner, self._most, self._asking, self._repeat = runner, most, asking, False
        with no_gradients(), runner.precision(not asking):
            self._pictures = runner.prepare(images)
            layout = runner.found
            if asking or layout is None:
                one, readings = self._pictures[:1], dict[str, Reading]()
                _, (raw,), _ = runner.call(one, lambda raw: (raw, raw.clone()), 1, (), readings)
                self.inputs, self.maps = 1, torch.empty(0)
                if readings:
                    (read,) = readings.values()
                    layout, self.maps = read.layout, read.maps
                else:
                    layout = runner.read_layout(runner.layer, raw, one)
                    self.maps = layout.to_maps(raw)
        self.layout = layout
        plain = runner.parts is not None and not layout.prefix and not asking
        self._dtype = runner.plain_dtype if plain else None

    def __call__(self, maps: Tensor, picture: int = 0, shake: bool = False) -> Tensor:
        """Return z `[n D]` for activations `[n K H W]`; `shake` also changes the prefix tokens."""
        runner = self._runner
        with torch.inference_mode(False):
            maps = maps.to(self._pictures.device)
            if self._dtype is not None:
                with no_gradients(), runner.precision():
                    # A copy: the head may begin with an in-place unit.
                    raw = self.layout.to_raw(maps, maps).to(self._dtype, copy=True)
                    return _embedded(runner, raw, len(maps))
            one = self._pictures[picture : picture + 1]
            if not self._repeat:
                try:
                    return self._run(one, maps, shake)
                except EmbedcamError:
                    self._repeat = True
            rest = [1] * (one.ndim - 1)
            pieces = torch.split(maps, self._most or len(maps))
            return torch.cat([self._run(one.repeat(len(p), *rest), p, shake) for p in pieces])

    def _run(self, images: Tensor, maps: Tensor, shake: bool) -> Tensor:
        self.inputs += len(images)
        gradients = self._asking and torch.is_grad_enabled()

        def inject(raw: Tensor) -> tuple[Tensor, Tensor]:
            like = raw.detach() * -3 + 1 if shake else raw.detach()
            torch.set_grad_enabled(gradients)
            onward = self.layout.to_raw(maps, like.to(maps.dtype))
            return raw, onward.to(raw.dtype).clone()

        with no_gradients(), self._runner.precision(not self._asking):
            return self._runner.call(images, inject, len(maps))[0]


def _embedded(runner: Runner, raw: Tensor, count: int) -> Tensor:
    """Return z `[n D]` of a layer's output, by the head as a function."""
    if runner.head is None:
        raise unreachable(runner.layer)
    return at_least_single(
        choose_embedding(run_part(runner.head, "head", raw), runner.output, count)
    )


def _replayed(runner: Runner, layout: Layout, pooled: Tensor) -> Tensor:
    """Return z `[n D]` of pooled activations `[n K]`, by the head on a grid of one position."""
    return _embedded(runner, layout.one_position(pooled.to(runner.dtype)), len(pooled))


def pooled_vjp(runner: Runner, kind: HeadKind, pooled: Images, cotangents: Images) -> Tensor:
    """Return dy/dp `[B K]` or `[B S K]` for p `[B K]` and dy/dz `[B D]` or `[B S D]`."""
    layout = runner.found
    if layout is None or not (kind.affine or kind.replayed):
        raise NetworkError(
            f"what follows layer {runner.layer!r} is not a function of the pooled activations; use "
            "head_pass(images).vjp"
        )
    single = torch.float64 if runner.dtype == torch.float64 else torch.float32
    with no_gradients():
        p = torch.as_tensor(pooled, device=runner.device).to(single)
        c = torch.as_tensor(cotangents, device=runner.device).to(single)
        if p.ndim != 2 or c.ndim not in (2, 3) or len(c) != len(p):
            raise InputError(
                f"pooled {list(p.shape)} and cotangents {list(c.shape)} do not belong together; "
                "expected [B K] with [B D] or [B S D]"
            )
        if kind.identity:
            return c.clone()
        if kind.affine:
            return c @ kind.weight(c.device).to(c.dtype)
        triplets = c.shape[1] if c.ndim == 3 else 1
        rows = p.clone().repeat_interleave(triplets, dim=0)
        flat = c.clone().reshape(-1, c.shape[-1])
        step = max(1, _CHUNK_NUMBERS // max(rows.shape[1], flat.shape[1]))
        gradients = []
        with runner.precision(), torch.enable_grad():
            for part, back in zip(torch.split(rows, step), torch.split(flat, step), strict=True):
                leaf = part.clone().requires_grad_()
                # A clone is handed on: the head may begin with an in-place unit.
                z = _replayed(runner, layout, leaf.clone())
                (gradient,) = derivatives(z, [leaf], back, "the pooling", keep=False)
                if gradient is None:
                    raise unreachable("the pooling")
                gradients.append(gradient)
        return torch.cat(gradients).reshape(*c.shape[:-1], -1)


# What a head is


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative difference below which two results of a head count as equal."""
    if dtype in (torch.float16, torch.bfloat16):
        return 4e-2
    # Accelerators may multiply in TF32.
    return 1e-4 if device.type == "cpu" else 2e-3


def ask_head(runner: Runner, run: HeadAlone) -> HeadKind:
    """Ask a deterministic head whether it is pooled and affine."""
    channels, *grid = run.maps.shape[1:]
    shape, dtype, device = (channels, grid[0], grid[1]), runner.dtype, run.maps.device
    tolerance = tolerance_of(dtype, device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    draws = _random_activations(shape, compute, device)
    # Early layers have large activations and are hardly ever pooled: two draws tell.
    large = draws.numel() > _CHUNK_NUMBERS // 4
    pooled, z = _is_pooled(run, draws[:2] if large else draws, tolerance)
    if pooled and large:
        pooled, z = _is_pooled(run, draws, tolerance)
    unit_norm = _near(torch.linalg.vector_norm(z, dim=1), 1.0, max(tolerance, 1e-3))
    if pooled and run.layout.prefix:  # a head that uses prefix tokens is not pooled
        with torch.no_grad():
            moved = _distance(run(draws, shake=True), z)
        pooled = bool((moved <= tolerance * torch.linalg.vector_norm(z, dim=1)).all())
    products = _affine_products(run, draws, tolerance) if pooled else None
    if products is None:
        placed = not pooled and _uses_positions(run, draws[:2])
        replayed = pooled and runner.head is not None and _agrees(runner, run, tolerance)
        normed = _normed(run, draws, pooled, tolerance) if pooled or not large else None
        return HeadKind(
            pooled,
            False,
            normed=normed,
            unit_norm=unit_norm,
            uses_positions=placed,
            replayed=replayed,
        )
    if all(c.shape == w.shape and _near(w - c, 0.0, tolerance) for c, w in products):
        identity = torch.eye(channels, dtype=compute).numpy()
        return HeadKind(True, True, identity, True, unit_norm)
    matrix = _matrix(run, torch.ones(shape, dtype=compute, device=device))
    return HeadKind(True, True, matrix, False, unit_norm)


def _agrees(runner: Runner, run: HeadAlone, tolerance: float) -> bool:
    """Return whether the head as a function of pooled vectors gives the network's own z."""
    maps = run.maps.to(torch.promote_types(run.maps.dtype, torch.float32))
    several = torch.cat([maps, -3 * maps])
    with torch.no_grad():
        expected = run(several)
        try:
            replayed = _replayed(runner, run.layout, several.mean((2, 3)))
        # A head made for larger grids just cannot be replayed.
        except EmbedcamError:
            return False
    allowed = tolerance * torch.linalg.vector_norm(expected, dim=1)
    return replayed.shape == expected.shape and bool(
        (_distance(replayed, expected) <= allowed).all()
    )


def _random_activations(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `[n K H W]`, one for each of `_DRAWS`, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for scale, sign in _DRAWS:
        # Channels differ in their mean, or the mean over many positions would vanish.
        row = torch.randn(shape[0], 1, 1, generator=generator)
        row = row + torch.randn(shape, generator=generator)
        rows.append(scale * (row if sign == 0 else sign * row.abs()))
    return torch.stack(rows).to(device, dtype)


def _is_pooled(run: HeadAlone, draws: Tensor, tolerance: float) -> tuple[bool, Tensor]:
    """Return whether z stays when each channel is replaced by its mean; and z `[n D]`."""
    flat = draws.mean((2, 3), keepdim=True).expand_as(draws)
    same, moved, z = _alike(run, draws, flat, tolerance)
    return bool((same & (moved > 0)).all()), z


def _uses_positions(run: HeadAlone, draws: Tensor) -> bool:
    """Return whether a shift by half the grid, which pooling hardly minds, changes z largely."""
    height, width = draws.shape[2:]
    shifted = draws.roll((height // 2, width // 2), (2, 3))
    return not bool(_alike(run, draws, shifted, _SHIFTED)[0].all())


def _alike(
    run: HeadAlone, draws: Tensor, others: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each draw whether the other has its z, how far z is from that of zeros, and z."""
    with torch.no_grad():
        both = run(torch.cat([draws, others, torch.zeros_like(draws[:1])]))
        z, z_other, z_zero = torch.split(both, [len(draws), len(draws), 1])
    # Relative to how far the activations move z at all, not to a constant in it. At zero a head
    # that normalizes may return NaN.
    moved = _distance(z, z_zero.nan_to_num(0.0, 0.0, 0.0))
    rounding = 64 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z, dim=1)
    return _distance(z, z_other) <= tolerance * moved + rounding, moved, z


def _affine_products(
    run: HeadAlone, draws: Tensor, tolerance: float
) -> list[tuple[Tensor, Tensor]] | None:
    """Return random cotangents c `[D]` and W^T c `[K]`; None if no one Jacobian W is seen."""
    products: list[tuple[Tensor, Tensor]] = []
    for picture in range(2):
        maps = draws.clone().requires_grad_()
        z = run(maps, picture=picture)
        if not z.requires_grad:
            return None
        rows = torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(1))
        for number, cotangent in enumerate(rows.to(z.device, z.dtype)):
            (gradient,) = derivatives(z, [maps], cotangent.expand_as(z), "the layer")
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                return None
            if len(products) <= number:
                products.append((cotangent, gradient[0].sum((1, 2))))
            each = products[number][1] / (draws.shape[2] * draws.shape[3])
            expected = each[None, :, None, None].expand_as(gradient)
            allowed = tolerance * torch.linalg.vector_norm(expected.flatten(1), dim=1)
            if not bool((_distance(gradient.flatten(1), expected.flatten(1)) <= allowed).all()):
                return None
    return products


def _normed(run: HeadAlone, draws: Tensor, pooled: bool, tolerance: float) -> HeadMatrix | None:
    """Return the head as z = W mean(A / sqrt(v + epsilon)) + b, v of a norm; None of another head.

    At zero its derivative is W / sqrt(epsilon). Of activations that are the same everywhere,
    |z - b|^2 is the share epsilon / (v + epsilon) of what that derivative makes of them.
    """
    few = draws[:2]
    alike, moved, _ = _alike(run, few, 4 * few, 1e-2)
    if not bool((alike & (moved > 0)).all()):  # a norm hardly minds how large they are
        return None
    slopes = _matrix(run, torch.zeros_like(draws[0]))
    flat = draws.mean((2, 3), keepdim=True)
    with torch.no_grad():
        even = torch.cat([torch.zeros_like(flat[:1]), flat]).expand(-1, *draws.shape[1:])
        bias, *at_flat = as_array(run(even))
        # Of another picture, and with other prefix tokens.
        z = as_array(run(draws, picture=1, shake=bool(run.layout.prefix)))
    p, maps = as_array(flat)[:, :, 0, 0].astype(np.float64), as_array(draws)
    with np.errstate(all="ignore"):
        shares = (_lengths(at_flat - bias) / _lengths(p @ slopes.T)) ** 2
        for centered in (True, False):
            v = p.var(1) if centered else (p**2).mean(1)
            epsilon = float(np.median(v * shares / (1 - shares)))
            matrix = slopes * slopes.dtype.type(epsilon**0.5 if epsilon > 0 else np.nan)
            head = HeadMatrix(matrix, bias, HeldNorm(epsilon, centered, pooled))
            off = _lengths([head.output(one) for one in maps] - z)
            if bool((off <= tolerance * _lengths(z - bias)).all()):
                return head
    return None


def _matrix(run: HeadAlone, at: Tensor) -> np.ndarray:
    """Return dz/dA `[D K]` at `[K H W]`, many rows a backward pass.

    Sample i of the batch gets row i's cotangent.
    """
    count = max(1, min(64, _CHUNK_NUMBERS // at.numel()))
    maps = at.expand(count, *at.shape).clone().requires_grad_()
    z = run(maps)
    rows = []
    for start in range(0, z.shape[1], count):
        places = torch.arange(min(count, z.shape[1] - start))
        cotangents = torch.zeros_like(z)
        cotangents[places, start + places] = 1
        (gradient,) = derivatives(z, [maps], cotangents, "the layer")
        if gradient is None:
            raise unreachable("the layer")
        rows.append(gradient.sum((2, 3))[: len(places)].cpu())
    return torch.cat(rows).numpy()


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(rows, axis=1))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return lengths


def _near(values: Tensor, target: float, tolerance: float) -> bool:
    return bool(((values - target).abs() <= tolerance).all())
