"""The method zoo: every class activation method, on embedding networks, with a target.

direct.py         `cam_for`: a method on a picture
subject.py        what a method works on; runs networks, counts passes
custom.py         any function as a target
masks.py          masks and what fills them
options.py        checks of options that several methods have
gradients.py      CAM, Grad-CAM, Grad-CAM++, XGrad-CAM
sampled.py        Smooth Grad-CAM++, Integrated Grad-CAM
elementwise.py    HiResCAM, Layer-CAM, Zoom-CAM
guided.py         Guided Backpropagation, Guided Grad-CAM
decomposition.py  Eigen-CAM, EigenGrad-CAM
masking.py        Score-CAM
ablation.py       Ablation-CAM
grouping.py       Group-CAM, Cluster-CAM, Cosine-CAM
clusters.py       which channels belong together
polycam.py        Poly-CAM
pixels.py         RISE, LIME, SBSM
attention.py      LFI-CAM, ABN, drawn
learned/          the trainable branches of LFI-CAM and ABN

Each method is a function `method(subject, **options) -> Found`; `embedcam.registry` lists them.
"""

from .direct import MethodMap, MethodWarning, cam_for, found_for, weights_for
from .fallback import DirectWeights
from .subject import Found, Passes, Subject, inputs_a_pass

__all__ = [
    "DirectWeights",
    "Found",
    "MethodMap",
    "MethodWarning",
    "Passes",
    "Subject",
    "cam_for",
    "found_for",
    "inputs_a_pass",
    "weights_for",
]
