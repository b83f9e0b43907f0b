"""Networks with a trained attention branch: LFI-CAM and the Attention Branch Network.

Each wraps a trunk (images -> A `[B K H W]`) and a head (A -> embedding), and is trained like any
embedding network: `examples/train_attention.py` shows it. `EmbeddingNetwork(module, "trunk")` makes
it one that embedcam explains, by 'lficam' or 'abn' and by every other method.

lfi.py   `LFINetwork`: how important each channel of A is
abn.py   `ABNetwork`: where to look, as a map
"""

from .abn import ABNetwork, at_stride_one
from .lfi import LFINetwork

__all__ = ["ABNetwork", "LFINetwork", "at_stride_one"]
