"""LFI-CAM's trainable branch: how important each channel is (Lee et al., ICCV 2021)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, NetworkError
from ...ops import cam, normalize


class LFINetwork(nn.Module):
    """A trunk and a head with a feature importance network (FIN) between them.

        A  = trunk(X)                                       [B K H W]
        S  = softmax_k mean_ij FIN(U(grey(X)) * N(A))       [B K]
        M  = N(ReLU(sum_k S_k A_k))                         [B H W]
        f  = head(A (1 + M))                                [B D]

    grey is the mean over the input's channels, U bilinear to H x W, N min-max to [0, 1] of each map
    by itself, a flat one to zeros: a flat A_k shows FIN nothing, and where M is flat A stays as it
    is. FIN is four 3 x 3 convolutions, batch norm and ReLU between them. It is trained with the
    rest, by whatever trains the embedding; S and M do not depend on what an image is compared with.

    Departures of the authors' code: it takes the minimum and maximum of M over the whole batch, so
    that an image's map depends on its company, leaves N(A) out, and cuts M from the graph, so that
    FIN is never trained. Here each image is by itself and FIN learns through M.

    Args:
        trunk: images `[B C h w]` -> A `[B K H W]`; called once a forward.
        head: `[B K H W]` -> embedding `[B D]`.
        n_channels: K.
        width: channels inside FIN; default K.

    Attributes:
        trunk: as given; its output is what S weighs, so it is the layer to explain.
        head: as given.
        fin: the four convolutions, `[B K H W]` -> `[B K H W]`.

    Raises:
        InputError: n_channels or width below 1.
    """

    def __init__(
        self, trunk: nn.Module, head: nn.Module, n_channels: int, width: int | None = None
    ) -> None:
        super().__init__()
        width = n_channels if width is None else width
        if n_channels < 1 or width < 1:
            raise InputError(
                f"n_channels = {n_channels}, width = {width}; give the number of channels of the "
                "trunk's output, and at least 1 for the branch"
            )
        self.n_channels = n_channels
        self.trunk, self.head = trunk, head
        self.fin = nn.Sequential(
            *_convolution(n_channels, width),
            *_convolution(width, width),
            *_convolution(width, width),
            nn.Conv2d(width, n_channels, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embedding `[B D]` of images `[B C h w]`."""
        return self.embed(images, self.trunk(images))

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A `[B K H W]`, S `[B K]` and M `[B H W]` of images `[B C h w]`."""
        activations = self.trunk(images)
        importance = self.importance(images, activations)
        return activations, importance, self.attention(activations, importance)

    def embed(self, images: Tensor, activations: Tensor) -> Tensor:
        """Embedding `[B D]` of images whose trunk's output is known, or changed.

        Args:
            images: `[B C h w]`, or one for all `[1 C h w]`.
            activations: A, `[B K H W]`.
        """
        attention = self.attention(activations, self.importance(images, activations))
        found: Tensor = self.head(activations * (1 + attention[:, None]))
        return found

    def stacked(self, images: Tensor, activations: Tensor) -> Tensor:
        """What FIN sees: U(grey(X)) * N(A_k), stacked K deep, `[B K H W]`.

        Raises:
            NetworkError: A is not `[B K H W]`.
        """
        if activations.ndim != 4 or activations.shape[1] != self.n_channels:
            raise NetworkError(
                f"the trunk's output is {list(activations.shape)}; expected [B {self.n_channels} "
                "H W], as n_channels says: give LFINetwork the trunk's own number of channels"
            )
        size = (activations.shape[2], activations.shape[3])
        grey = images.mean(1, keepdim=True)
        small = F.interpolate(grey, size=size, mode="bilinear", align_corners=False)
        return small * normalize(activations)

    def importance(self, images: Tensor, activations: Tensor) -> Tensor:
        """S `[B K]`, > 0 and of sum 1, of images `[B C h w]` and their A `[B K H W]`."""
        scores = self.fin(self.stacked(images, activations)).mean((-2, -1))
        found: Tensor = scores.softmax(1)
        return found

    def attention(self, activations: Tensor, importance: Tensor) -> Tensor:
        """M = N(ReLU(sum_k S_k A_k)), `[B H W]` in [0, 1]; zeros where that sum is flat."""
        return normalize(cam(importance, activations))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    # The batch norm that follows has an offset of its own.
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
