"""Networks by name: `load_network("torchvision:resnet50")` is ready to build an index with.

families.py     torchvision's families: the layer to explain, the classifier to leave out
checkpoints.py  weights and heads from files, checked before they are believed
loading.py      `load_network`: torchvision, timm, or a function of your own
"""

from .loading import load_network

__all__ = ["load_network"]
