"""LFI-CAM and the Attention Branch Network: networks with a trained branch, and their maps.

`examples/train_attention.py` trains them; `EmbeddingNetwork(module, "trunk")` explains them.
"""

from copy import deepcopy
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import whole
from ..errors import NetworkError
from ..network import EmbeddingNetwork
from ..network.layers import find_layer
from ..ops import cam, normalize
from .subject import MethodOutput, Subject

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class LFINetwork(nn.Module):
    """A trunk and a head with a feature importance network (FIN) between them.

        A  = trunk(X)                                       [B K H W]
        S  = softmax_k mean_ij FIN(U(grey(X)) * N(A))       [B K]
        M  = N(ReLU(sum_k S_k A_k))                         [B H W]
        f  = head(A (1 + M))                                [B D]

    Lee et al., ICCV 2021. grey is the mean over the input's channels, U bilinear to H x W, N
    min-max to [0, 1] of each map by itself, a flat one to zeros. FIN (`fin`), four 3 x 3
    convolutions with batch norm and ReLU between them, is trained with the rest.

    Parameters
    ----------
    trunk, head
        X `[B C h w]` -> A, the layer to explain, called once a forward; `[B K H W]` -> f.
    n_channels, width
        K, and channels inside FIN (default K), at least 1.
    """

    def __init__(
        self, trunk: nn.Module, head: nn.Module, n_channels: int, width: int | None = None
    ) -> None:
        super().__init__()
        self.n_channels = whole("n_channels", n_channels, 1)
        width = n_channels if width is None else whole("width", width, 1)
        self.trunk, self.head = trunk, head
        layers: list[nn.Module] = []
        for inputs in (n_channels, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.fin = nn.Sequential(*layers, nn.Conv2d(width, n_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding `[B D]` of images `[B C h w]`."""
        return self.embed(images, self.trunk(images))

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A `[B K H W]`, S `[B K]` and M `[B H W]` of images `[B C h w]`."""
        activations = self.trunk(images)
        importance = self.importance(images, activations)
        return activations, importance, self.attention(activations, importance)

    def embed(self, images: Tensor, activations: Tensor) -> Tensor:
        """Return the embedding `[B D]` of images, or of one `[1 C h w]`, whose A is known."""
        attention = self.attention(activations, self.importance(images, activations))
        embedding: Tensor = self.head(activations * (1 + attention[:, None]))
        return embedding

    def stacked(self, images: Tensor, activations: Tensor) -> Tensor:
        """Return what FIN sees: U(grey(X)) * N(A_k), stacked K deep, `[B K H W]`."""
        if activations.ndim != 4 or activations.shape[1] != self.n_channels:
            expected = f"expected [B {self.n_channels} H W], as n_channels says"
            raise NetworkError(f"the trunk's output is {list(activations.shape)}; {expected}")
        size = (activations.shape[2], activations.shape[3])
        grey = images.mean(1, keepdim=True)
        small = F.interpolate(grey, size=size, mode="bilinear", align_corners=False)
        return small * normalize(activations)

    def importance(self, images: Tensor, activations: Tensor) -> Tensor:
        """Return S `[B K]`, > 0 and of sum 1, of images `[B C h w]` and their A `[B K H W]`."""
        scores: Tensor = self.fin(self.stacked(images, activations))
        return scores.mean((-2, -1)).softmax(1)

    def attention(self, activations: Tensor, importance: Tensor) -> Tensor:
        """Return M `[B H W]` in [0, 1]; zeros where sum_k S_k A_k is flat."""
        return normalize(cam(importance, activations))


class ABNetwork(nn.Module):
    """A network cut before its last stage, with an attention branch at the cut.

        A  = trunk(X)                                       [B K H W], before the last stage
        E  = conv1x1(stage'(A))                             [B D H W], stage' = stage at stride 1
        g  = mean_ij E                                      [B D], the branch's own embedding
        M  = sigmoid(batch norm(conv3x3(E)))                [B H W]
        f  = head(stage(A (1 + M)))                         [B D']

    Fukui et al., CVPR 2019. Both f and g are trained, each by the loss of the embedding.

    Parameters
    ----------
    trunk, stage, head
        X `[B C h w]` -> A, the layer to explain, called once a forward; A -> what the last stage
        makes, `[B n_channels H' W']`; that -> f.
    n_channels, embedding_size
        Of what the stage returns, and D, at least 1.
    branch
        A -> `[B n_channels H W]`, in place of `at_stride_one(stage)`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        stage: nn.Module,
        head: nn.Module,
        n_channels: int,
        embedding_size: int,
        branch: nn.Module | None = None,
    ) -> None:
        super().__init__()
        n_channels = whole("n_channels", n_channels, 1)
        embedding_size = whole("embedding_size", embedding_size, 1)
        self.trunk, self.stage, self.head = trunk, stage, head
        self.branch = at_stride_one(stage) if branch is None else branch
        self.evidence = nn.Conv2d(n_channels, embedding_size, 1)
        self.look = nn.Sequential(
            nn.Conv2d(embedding_size, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding f `[B D']` of images `[B C h w]`."""
        return self.both(images)[0]

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return f `[B D']` and the branch's own embedding g `[B D]`, for training."""
        activations, attention, branch_embedding = self.attend(images)
        return self.head(self.stage(activations * (1 + attention[:, None]))), branch_embedding

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A `[B K H W]`, M `[B H W]` and g `[B D]` of images `[B C h w]`."""
        activations = self.trunk(images)
        return activations, *self.attention(activations)

    def attention(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Return M `[B H W]` in (0, 1) and g `[B D]` of A `[B K H W]`."""
        evidence = self.evidence(self.branch(activations))
        attention = self.look(evidence)[:, 0]
        if attention.shape[-2:] != activations.shape[-2:]:
            made, given = (list(one.shape[-2:]) for one in (attention, activations))
            what = f"the branch makes {made} of the trunk's {given} positions"
            raise NetworkError(f"{what}; give branch=, a module that keeps H x W")
        return attention, evidence.mean((-2, -1))


def at_stride_one(stage: nn.Module) -> nn.Module:
    """Return a copy of a stage whose convolutions and pools have stride 1, with its own weights."""
    copied = deepcopy(stage)
    for part in copied.modules():
        if isinstance(part, _STRIDED):
            part.stride = 1 if isinstance(part.stride, int) else (1, 1)
    return copied


Learned = TypeVar("Learned", LFINetwork, ABNetwork)


def lficam(subject: Subject) -> MethodOutput:
    """LFI-CAM: w = S, the importance the branch gives each channel (Lee et al. 2021)."""
    network = subject.network
    learned = _learned(network, LFINetwork, "LFI-CAM")
    if not _is_output_of(network, learned.trunk):
        what = f"LFI-CAM weighs the trunk, and this network explains layer {network.layer!r}"
        raise NetworkError(f"{what}; use EmbeddingNetwork(module, 'trunk')")
    activations = subject.activations
    with network.runner.precision():
        importance = learned.importance(
            *(one.to(network.device, network.dtype) for one in (subject.images, activations))
        )
    return MethodOutput(importance.to(activations.dtype))


def abn(subject: Subject) -> MethodOutput:
    """ABN: the branch's own map M, `[B H W]` in (0, 1) (Fukui et al. 2019, section 3.2)."""
    network = subject.network
    learned = _learned(network, ABNetwork, "ABN")
    activations = subject.activations  # first: it refuses training mode and unfit inputs
    with network.runner.precision():
        if _is_output_of(network, learned.trunk):
            attention, _ = learned.attention(activations.to(network.device, network.dtype))
        else:
            subject.passes.forwards += len(subject)
            images = subject.images.to(network.device, network.dtype)
            _, attention, _ = learned.attend(images)
    return MethodOutput(maps=attention.to(activations.dtype))


def _learned(network: EmbeddingNetwork, kind: type[Learned], title: str) -> Learned:
    """Return the network's module, out of wrappers that hand images on as they are."""
    module: nn.Module | None = network.module if network.hooked else None
    while isinstance(module, nn.Module) and not isinstance(module, kind):
        module = getattr(module, "module", None)
    if isinstance(module, kind):
        return module
    what = type(network.module).__name__ if network.hooked else "network given as trunk and head"
    raise NetworkError(
        f"{title} draws what a trained branch says, and this {what} has none; wrap trunk and head "
        f"in embedcam.methods.learned.{kind.__name__}, train it as examples/train_attention.py does"
    )


def _is_output_of(network: EmbeddingNetwork, trunk: nn.Module) -> bool:
    """Return whether the layer explained is the trunk, or the last part of one in sequence."""
    layer = find_layer(network.module, network.layer)[1]
    while layer is not trunk and isinstance(trunk, nn.Sequential) and len(trunk):
        trunk = trunk[-1]
    return layer is trunk
