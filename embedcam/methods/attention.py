"""Methods made for transformers: of the last attention's values, or of all attention weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NetworkError
from ..network import AttentionPass
from . import weights as closed_forms
from .subject import MethodOutput, Subject


def gradeclip(subject: Subject) -> MethodOutput:
    """Grad-ECLIP: ReLU(sum_c w_c lambda_i v_ic), w = dy/do (Zhao et al. 2024, eq. 9-11).

    o is the last attention's output before its projection, at the token that is read; v its values,
    all heads side by side; lambda_i the cosine of that token's query and key i, scaled to [0, 1].
    """
    return _of_reading(subject, "gradeclip")


def maskclip(subject: Subject) -> MethodOutput:
    """MaskCLIP: each position's value taken to the embedding, times dy/dz / Z (Zhou et al. 2022).

    With the centred target the weights are the stored embedding itself.
    """
    return _of_reading(subject, "value")


def _of_reading(subject: Subject, reading: str) -> MethodOutput:
    layer = subject.network.layer
    if not layer.endswith(f"@{reading}"):
        raise NetworkError(
            f"the network explains layer {layer!r}, and this method reads its last attention; load "
            f"it with --layer @{reading} (layer='@{reading}'), or take embedcam.network.read_by("
            f"network, {reading!r})"
        )
    return MethodOutput(closed_forms.gradcam(subject.gradients))


def rollout(subject: Subject) -> MethodOutput:
    """Attention Rollout: row of prod_l (mean_h A_l + I) / 2 (Abnar and Zuidema 2020, sec. 3).

    The row is that of the token that is read, or the mean of several.
    """
    with subject.attentions() as run:
        *blocks, last = [one.mean(1) for one in run.weights]
        if last.shape[1] == last.shape[2]:
            blocks, last = [*blocks, last], torch.eye(last.shape[1]).to(last)[None]
        joint = torch.eye(last.shape[2]).to(last)[None]
        for one in blocks:
            mixed = one + torch.eye(one.shape[1]).to(one)
            joint = mixed / mixed.sum(-1, keepdim=True) @ joint
        return _read(run, last @ joint)


def generic_attention(subject: Subject) -> MethodOutput:
    """Return generic attention: from R = I on, R + mean_h ReLU(dy/dA_l * A_l) R for each layer l.

    Chefer et al. 2021, eq. 5 and 6; of the rows that are read, without the identity. A last
    attention that pools has no row of its own yet: R is then mean_h ReLU(dy/dA * A) R.
    """
    with subject.attentions() as run:
        gradients = run.vjp(subject.mean_cotangents(run.features))
        subject.passes.head_backwards += len(subject)
        *blocks, last = [
            (gradient * one).clamp(min=0).mean(1)
            for gradient, one in zip(gradients, run.weights, strict=True)
        ]
        identity = torch.eye(last.shape[2]).to(last)[None]
        joint = identity
        for one in blocks:
            joint = joint + one @ joint
        square = last.shape[1] == last.shape[2]
        return _read(run, joint + last @ joint - identity if square else last @ joint)


def legrad(subject: Subject) -> MethodOutput:
    """LeGrad: mean over layers, heads and queries of ReLU(dy_l/dA_l) (Bousselham et al. 2025).

    y_l is the target at what the network's norm and head make of layer l's tokens: of their mean,
    or, where a last attention pools, of what that makes of them, and A_l is then its weights.
    """
    with subject.attentions(depths=True) as run:
        layers = list(run.at_each_depth(subject.mean_cotangents))
        subject.passes.head_backwards += len(subject) * len(layers)
        each = [gradient.clamp(min=0).mean(1) for gradient in layers]
        return _read(run, torch.stack(each).mean(0).mean(1, keepdim=True), rows=(0,))


def _read(run: AttentionPass, relevance: Tensor, rows: Sequence[int] | None = None) -> MethodOutput:
    """Return the mean of the rows that are read of `[B Q T]`, its positions as a map `[B H W]`."""
    chosen = relevance[:, list(run.rows if rows is None else rows)].mean(1)
    maps = run.layout.to_maps(chosen[..., None])[:, 0]
    return MethodOutput(maps=maps.to(torch.promote_types(maps.dtype, torch.float32)))
