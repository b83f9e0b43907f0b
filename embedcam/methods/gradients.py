"""Methods of one gradient: CAM, Grad-CAM, Grad-CAM++ and XGrad-CAM."""

import torch

from ..errors import NetworkError
from .subject import Found, Subject
from .weights import gradcam as gradcam_weights
from .weights import gradcam_plus_plus as gradcam_plus_plus_weights
from .weights import weights_from_pooled


def cam(subject: Subject) -> Found:
    """CAM: w = W^T dy/dz for pooled activations -> linear W -> z (Zhou et al. 2016, eq. 1 and 2).

    Exact, from the activations alone: the linear map's bias drops out, and whatever affine follows
    the pooling (a batch norm, a second linear map) is folded into W. Grad-CAM's weights are these
    divided by Z = H W. A class score is one row of W; a target of an embedding mixes the rows by
    dy/dz. Where the pooled vector is itself the embedding, W is the identity.

    Returns:
        Weights `[B K]`.

    Raises:
        NetworkError: what follows the layer is not pooling and an affine map.
    """
    features = subject.features
    if not subject.network.head_kind.affine:
        raise NetworkError(
            f"CAM needs average pooling and one linear map behind layer {subject.network.layer!r}, "
            "and something else follows it; use 'gradcam', its generalisation"
        )
    pooled = features.activations.mean((-2, -1))
    return Found(subject.network.pooled_vjp(pooled, subject.mean_cotangents(features)))


def gradcam(subject: Subject) -> Found:
    """Grad-CAM: w = (1/Z) sum_ij G_ij (Selvaraju et al. 2017, eq. 1).

    Linear in the target: over triplets it is one backward pass with the mean cotangent.

    Returns:
        Weights `[B K]`.
    """
    return Found(gradcam_weights(subject.gradients))


def gradcam_plus_plus(subject: Subject) -> Found:
    """Grad-CAM++: w = sum_ij a_ij ReLU(G_ij), a = 1 / (2 + S G), S = sum_ij A_ij.

    Chattopadhay et al. 2018, eq. 10 and 19, with G^2 cancelled: no epsilon, which would decide the
    result where gradients are small. Not linear in the target, so the weights of each triplet are
    averaged, not the gradients. The factor exp(y) of the paper's derivation is left out: it would
    weigh triplets, and cancels for one target. S takes positive activations, as the paper assumes
    A >= 0. Behind a global average pool in closed form from the pooled vector, else one product
    through the head for each triplet.

    Returns:
        Weights `[B K]`, >= 0.
    """
    network, features = subject.network, subject.head.features
    activations = features.activations
    # What the head is, is found out by asking it, which takes longer than a backward pass or two.
    if subject.several_targets and network.pooled_replay:
        each, counted = subject.cotangents(features)
        return Found(
            weights_from_pooled(
                network,
                activations.mean((-2, -1)),
                activations.clamp(min=0).mean((-2, -1)),
                each,
                counted,
                activations[0, 0].numel(),
                "gradcam++",
            )
        )
    total = torch.zeros_like(activations[:, :, 0, 0])
    counts = total.new_zeros(len(total))
    for gradients, used in subject.each_gradient():
        total += gradcam_plus_plus_weights(gradients, activations) * used[:, None]
        counts += used
    return Found(total / counts.clamp(min=1)[:, None])


def xgradcam(subject: Subject) -> Found:
    """XGrad-CAM: w = sum_ij (A_ij / sum A) G_ij (Fu et al. 2020, eq. 8).

    Behind average pooling it is Grad-CAM. A channel whose activations sum to zero has no share of
    positions: its weight is 0. So it is where positive and negative activations cancel to the
    rounding of their sum, whose inverse would be noise. A negative sum is taken as it is.

    Returns:
        Weights `[B K]`.
    """
    gradients, activations = subject.gradients, subject.activations
    sums, sizes = activations.sum((-2, -1)), activations.abs().sum((-2, -1))
    cells = activations[0, 0].numel()
    real = sums.abs() > cells * torch.finfo(sums.dtype).eps * sizes
    return Found((activations * gradients).sum((-2, -1)) / torch.where(real, sums, 1) * real)
