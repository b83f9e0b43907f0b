"""The Attention Branch Network: a trained map of where to look (Fukui et al., CVPR 2019)."""

from copy import deepcopy

from torch import Tensor, nn

from ...errors import InputError, NetworkError

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class ABNetwork(nn.Module):
    """A network cut before its last stage, with an attention branch at the cut.

        A  = trunk(X)                                       [B K H W], before the last stage
        E  = conv1x1(stage'(A))                             [B D H W], stage' = stage at stride 1
        g  = mean_ij E                                      [B D], the branch's own embedding
        M  = sigmoid(batch norm(conv3x3(E)))                [B H W]
        f  = head(stage(A (1 + M)))                         [B D']

    Both f and g are trained, each by the loss of the embedding: g teaches the branch to see what
    tells images apart, f to look there. M does not depend on what an image is compared with. It is
    a sigmoid: never 0, and about 1/2 where the branch is undecided.

    Departures: with classes g are their scores, here it is an embedding. The authors' code has a
    batch norm and a ReLU around the 1 x 1 convolution and another one before the mean; left out.

    Args:
        trunk: images `[B C h w]` -> A `[B K H W]`; called once a forward.
        stage: the last stage, A -> `[B n_channels H' W']`.
        head: what the stage returns -> embedding `[B D']`.
        n_channels: of what the stage returns.
        embedding_size: D of the branch's own embedding.
        branch: A -> `[B n_channels H W]`, in place of `at_stride_one(stage)`.

    Attributes:
        trunk: as given; its output is the layer to explain.
        stage: as given.
        head: as given.
        branch: stage at stride 1, a copy with weights of its own.
        evidence: the 1 x 1 convolution.
        look: 3 x 3 convolution to one channel, batch norm, sigmoid.

    Raises:
        InputError: n_channels or embedding_size below 1.
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
        if n_channels < 1 or embedding_size < 1:
            raise InputError(
                f"n_channels = {n_channels}, embedding_size = {embedding_size}; give the number of "
                "channels of the stage's output, and at least 1 for the branch's embedding"
            )
        self.trunk, self.stage, self.head = trunk, stage, head
        self.branch = at_stride_one(stage) if branch is None else branch
        self.evidence = nn.Conv2d(n_channels, embedding_size, 1)
        self.look = nn.Sequential(
            nn.Conv2d(embedding_size, 1, 3, padding=1, bias=False),
            nn.BatchNorm2d(1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embedding f `[B D']` of images `[B C h w]`."""
        return self.both(images)[0]

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """f `[B D']` and the branch's own embedding g `[B D]`: for training."""
        activations, attention, own = self.attend(images)
        return self.head(self.stage(activations * (1 + attention[:, None]))), own

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A `[B K H W]`, M `[B H W]` and g `[B D]` of images `[B C h w]`."""
        activations = self.trunk(images)
        return activations, *self.attention(activations)

    def attention(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """M `[B H W]` in (0, 1) and g `[B D]` of A `[B K H W]`.

        Raises:
            NetworkError: the branch does not keep H x W.
        """
        evidence = self.evidence(self.branch(activations))
        attention = self.look(evidence)[:, 0]
        if attention.shape[-2:] != activations.shape[-2:]:
            raise NetworkError(
                f"the branch makes {list(attention.shape[-2:])} of the trunk's "
                f"{list(activations.shape[-2:])} positions, and its map must cover each of them: "
                "the stage shrinks its input by more than strides; give branch=, a module that "
                "keeps H x W"
            )
        return attention, evidence.mean((-2, -1))


def at_stride_one(stage: nn.Module) -> nn.Module:
    """A copy of a stage whose convolutions and pools have stride 1, with weights of its own.

    Args:
        stage: any module; a ResNet's `layer4` keeps H x W then. Pools without padding still shrink
            their input a little, which `ABNetwork` refuses.
    """
    copied = deepcopy(stage)
    for part in copied.modules():
        if isinstance(part, _STRIDED):
            part.stride = 1 if isinstance(part.stride, int) else (1, 1)
    return copied
